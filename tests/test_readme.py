"""Every command, output, snippet and claim of README.md, its picture, and the script's own metadata.

Words are compared to the letter, each number by a tolerance of its own: one that another processor or BLAS still meets
(they round differently, and a training multiplies that), and that a change of the algorithm does not.
"""

import ast
import dataclasses
import html
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import rlhf_loop_pseudo as loop

ROOT = Path(loop.__file__).parent
SOURCE = Path(loop.__file__).read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = re.findall(r"^```bash\n(.*?)\n```$", README, re.DOTALL | re.MULTILINE)
PYTHON = re.findall(r"^```python\n(.*?)\n```$", README, re.DOTALL | re.MULTILINE)
SHOWN = dict(re.findall(r"^```console\n\$ (.*?)\n(.*?)\n```$", README, re.DOTALL | re.MULTILINE))
WALK, TRAINING, COMPARE = SHOWN
PICTURE = next(command for command in BASH if "--export" in command)
IMAGE = re.search(r'<img src="([^"]+)"', README)[1]
INLINE = re.findall(r"`(python rlhf_loop_pseudo\.py [^`]*)`", README)
SHAPES, BETAS, MEMORY = INLINE  # the exercises
BUG = """import numpy as np

def gae(rewards, values, mask, gamma, lam):  # its recursion runs over the padding
    advantages, advantage, next_value = np.zeros_like(rewards), 0, 0
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        next_value, advantages[:, t] = values[:, t], advantage * mask[:, t]
    return advantages, advantages + values * mask
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where README's commands run, with the files that they expect."""
    path = tmp_path_factory.mktemp("readme")
    (path / IMAGE).parent.mkdir()
    (path / "my_ppo.py").write_text(BUG)
    return path


@pytest.fixture(scope="module")
def outputs(folder):
    """The real output of every command that README shows, each run once, the longest first."""

    def run(command):
        python, script, *arguments = shlex.split(command)
        assert python == "python"
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, ROOT / script, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120)
        assert not done.stderr
        return done.stdout.decode().replace("\r\n", "\n")

    commands = [PICTURE, BETAS, TRAINING, WALK, COMPARE, SHAPES, MEMORY]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands)))


# ------------------------------------------------------------------ numbers, each by its own tolerance

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")
# of the columns of a training's tables: a share of the number, and at least so much
SCORE, HUMAN, KL, J, SHARE = (0.05, 0.08), (0, 0.04), (0.05, 0.3), (0.02, 0.04), (0, 3)
COLUMNS = {"step": (0, 0), "score": SCORE, "human": HUMAN, "KL": KL, "total": SCORE, "entropy": (0, 1.5)}
COLUMNS |= {"clipped": (0, 0.02), "length": (0, 0.5), "J": J, "share": SHARE}
LINES = {  # of its other lines, by their first words: for each number in turn; those of all others are exact
    "Reward model loss:": [(0, 0.02), (0, 0.02)],
    "Fresh pairs right:": [(0, 1.5), (0, 0.2)],
    "J at the start:": [(0, 0.03)],
    "J now:": [J, SCORE, (0, 0), KL],
    "J*:": [(0, 0.03)],
    "Share of the attainable gain:": [SHARE, (0, 0.3)],
}


def check_numbers(real, shown, tolerances):
    """That each number of the real line is as near to the one shown as it has to be."""
    for mine, printed, (part, least) in zip(NUMBER.findall(real), NUMBER.findall(shown), tolerances, strict=True):
        number, expected = (float(text.replace(",", "")) for text in (mine, printed))
        allowed = max(part * abs(expected), least)
        assert abs(number - expected) < allowed + 1e-9, f"{mine} is not {printed} +- {allowed}:\n{real}\n{shown}"


def words_of(line):
    """A line without its numbers, and without spaces, which depend on how long a number is."""
    return re.sub(r"[\s*]", "", NUMBER.sub("#", line))


def check_line_of_walk_through(real, shown):
    """Words and whole numbers as they are, others within 1 % or 2 in the last digit."""
    assert words_of(real) == words_of(shown)
    digits = [len(number.partition(".")[2]) for number in NUMBER.findall(shown)]
    check_numbers(real, shown, [(0.01, 2 * 10.0**-each) if each else (0, 0) for each in digits])


def check_line_of_training(real, shown, columns):
    """A row of the table without its response, or another line."""
    if is_row(shown):
        real, shown = (line.replace("*", " ").rsplit(maxsplit=1)[0] for line in (real, shown))
        nearer = 4 if int(shown.split()[0]) < 12 else 1  # little has been multiplied by then
        check_numbers(real, shown, [[each / nearer for each in COLUMNS[column]] for column in columns])
        return
    assert words_of(real) == words_of(shown)
    exact = [(0, 0)] * len(NUMBER.findall(shown))
    check_numbers(real, shown, next((LINES[key] for key in LINES if shown.strip().startswith(key)), exact))


def is_row(line):
    return re.match(r" +\d+\*? +-?\d+\.\d", line)


def same_place(real, shown):
    """Whether two lines begin alike: rows of a table by their number, others by their words."""
    if is_row(real) or is_row(shown):
        return bool(is_row(real) and is_row(shown)) and real.split()[0] == shown.split()[0]
    return words_of(real)[:16] == words_of(shown)[:16]


@pytest.mark.parametrize("command", [WALK, TRAINING])
def test_the_outputs_are_real(command, outputs):
    """The lines that README shows stand in the real output, in the same order; it leaves some out, and says so."""
    lines, columns = outputs[command].splitlines(), None
    assert len(SHOWN[command].splitlines()) > 8
    for shown in SHOWN[command].splitlines():
        if shown.startswith("  step "):
            columns = shown.removesuffix("a response").split()
        if re.match(r"  \d+\*", shown):  # another processor may find another step best, with about the same opinion
            best = next(line for line in lines if re.match(r"  \d+\*", line))
            check_numbers(best.split()[2], shown.split()[2], [HUMAN])
            continue
        place = next((place for place, real in enumerate(lines) if same_place(real, shown)), None)
        assert place is not None, f"not in the output, or not there: {shown}"
        if command == WALK:
            check_line_of_walk_through(lines[place], shown)
        else:
            check_line_of_training(lines[place], shown, columns)
        del lines[: place + 1]


def test_the_planted_bug_is_found_as_shown(outputs):
    assert outputs[COMPARE].strip("\n") == SHOWN[COMPARE]


# ------------------------------------------------------------------ the picture


def drawn(path):
    """What an SVG by rich shows: its lines of text, put together from pieces and their places, and its colours."""
    svg, rows = path.read_text(encoding="utf-8"), {}
    for x, y, text in re.findall(r'<text class="\S+-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg):
        rows.setdefault(float(y), []).append((round(float(x) / 12.2), html.unescape(text).replace("\xa0", " ")))
    lines = []
    for _, pieces in sorted(rows.items()):
        lines.append("")
        for column, text in sorted(pieces):
            lines[-1] = lines[-1].ljust(column) + text
    return [line.rstrip() for line in lines], set(re.findall(r"-r\d+ { fill: (#\w{6})", svg))


def without_chance(lines):
    """Lines without what another processor changes: numbers, a chart's marks, sampled words, the rows of a training."""
    kept = []
    for line in lines:
        if "│" in line:
            line = line.partition("│")[1]
        elif re.match(r"  β [\d.]+, \w+ +-?\d", line):  # a row of the table that compares
            line = line.rsplit(maxsplit=1)[0]
        if not is_row(line):
            kept.append(words_of(line).replace("#or#", "#"))
    return kept


def test_the_picture_is_what_its_command_draws(outputs, folder):
    (real, colours), (committed, committed_colours) = drawn(folder / IMAGE), drawn(ROOT / IMAGE)
    assert f"--export {IMAGE}" in PICTURE
    assert [line for line in outputs[PICTURE].splitlines() if line] == [line for line in real if line]
    assert without_chance(real) == without_chance(committed)
    assert colours == committed_colours
    for lines in (real, committed):
        assert 60 < len(lines) < 90
        assert sum(map(bool, map(is_row, lines))) in (20, 21, 22)  # ten rows a training, and the best step
        assert sum("●" in line or "○" in line for line in lines) > 10


# ------------------------------------------------------------------ what it says


def compared(text):
    """The rows of the table that compares trainings, by their first two words: numbers by column, the response."""
    header, *lines = text.split("The same training, compared")[1].splitlines()[1:]
    rows = {}
    for line in lines[: next(n for n, line in enumerate(lines) if line.startswith("    "))]:
        label, cells = line.split(", ")[0].strip(), re.sub(r" ± ", "±", line.split(", ")[1]).split()
        rows[f"{label}, {cells[0]}"] = dict(zip(["score", "human", "KL", "J", "share", "passes", "word"], cells[1:]))
    assert header.split()[:6] == ["score", "human", "KL", "J", "share", "passes"]
    return rows


def claimed(pattern):
    """The numbers that README gives in a sentence."""
    found = re.search(pattern.replace(" ", r"\s+"), README)
    assert found, pattern
    return found.groups()


def test_reward_hacking_is_as_told(outputs):
    text = outputs[PICTURE]
    rows = [line.split() for line in text.split("β 0.2, gae ===")[0].splitlines() if is_row(line)]
    score, last_score = claimed(r"the score rises from ([\d.]+) to ([\d.]+)\.")
    check_numbers(f"{rows[0][1]} {rows[-1][1]}", f"{score} {last_score}", [SCORE, SCORE])
    opinions = claimed(r"opinion rises from ([\d.]+) to ([\d.]+), turns, and ends at ([\d.]+)")
    best = next(row for row in rows if row[0].endswith("*"))
    check_numbers(" ".join(row[2] for row in (rows[0], best, rows[-1])), " ".join(opinions), [HUMAN] * 3)
    assert "Reward hacking: " in text.split("β 0.2, gae ===")[0]
    word = rows[-1][-1].strip(".")
    assert sum(letter in "aeiou" for letter in word) >= 0.8 * len(word)  # "vowels only": one word, and chance
    first, last = (float(row.split()[2]) for row in outputs[TRAINING].splitlines() if is_row(row) and "*" not in row[:8]
                   and row.split()[0] in ("1", "200"))  # fmt: skip
    assert 1.6 < last / first < 2  # "nearly twice as much as at first"


def test_the_exercises_have_their_answers(outputs):
    text = outputs[SHAPES]
    assert "Actor logits: (4, 100, 50257)" in text
    assert text.count("(4, 100)") >= 5
    passes = [line.split()[-3:] for line in text.splitlines() if line.endswith(("updated", "frozen"))]
    assert passes == [["5", "4", "updated"]] * 2 + [["1", "0", "frozen"]] * 2

    rows = {label: {key: float(row[key]) for key in ("score", "human", "KL")}
            for label, row in compared(outputs[BETAS]).items()}  # fmt: skip
    assert max(rows, key=lambda label: rows[label]["human"]) == "β 0.2, gae"
    assert max(rows, key=lambda label: rows[label]["score"]) == "β 0, gae"
    assert rows["β 1, gae"]["KL"] < 1 < rows["β 0.2, gae"]["KL"]

    small, large = claimed(r"from ([\d.]+ MB) to ([\d.]+ MB)")
    for command, size in ((WALK, small), (MEMORY, large)):
        assert re.search(rf"Actor logits: .* {size};", outputs[command])
    for name in ("actor", "critic"):  # weights, and Adam's m and v
        assert len({re.search(rf"^  {name} .*", outputs[command], re.MULTILINE)[0] for command in (WALK, MEMORY)}) == 1


def test_what_the_critic_costs(capsys):
    assert loop.main(["--preset", "letters", "--steps", "2", "--advantage", "gae", "rloo", "grpo"]) == 0
    gae, rloo, grpo = (row["passes"] for row in compared(capsys.readouterr().out).values())
    numbers = claimed(r"(\d+) forward and (\d+) backward passes a step, against (\d+) and (\d+)")
    assert [gae, rloo, grpo] == ["+".join(numbers[:2]), "+".join(numbers[2:]), "+".join(numbers[2:])]


def test_the_plot_and_the_names_of_what_is_saved(outputs, folder, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(folder)
    (block,) = PYTHON
    assert len(block.splitlines()) <= 8
    exec(block, {})
    assert Path("overoptimisation.png").stat().st_size > 5000
    runs, told = np.load("runs.npz"), README.split("## Plot it yourself")[1].split("\n## ")[0]
    metrics = [name for name in runs if not name.startswith(("theory/", "preferences/", "config"))]
    assert len(metrics) > 12
    assert all(f"`{name}`" in told or f"`{name.split('/')[1]}`" in told for name in metrics)
    assert all(runs[name].shape == (2, 200) for name in metrics)
    full = [name for name in re.findall(r"`([\w/]+)`", told) if "/" in name]
    assert full
    assert all(name in runs for name in full)


def test_every_function_and_flag_that_it_names_is_there(capsys):
    names = re.findall(r"`([a-z]+(?:_[a-z]+)+|gae|whiten|generate)`", README.split("## Plot it yourself")[0])
    assert len(set(names)) > 15
    assert all(hasattr(loop, name) for name in names)
    loop.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    ours = README.replace("--torch", "").replace("--map", "")  # of the benchmark and of compare.py
    used = re.findall(r"(?:^\| |`[^`|]*?)`?(--[a-z-]+)(?![\w.-])", ours, re.MULTILINE)
    used = [flag for flag in used if not re.search(rf"`{flag}\.", ours)]
    assert len(set(used)) > 15
    assert set(used) <= known
    anchor = re.search(r"{{#include rlhf_loop_pseudo\.py:(\w+)}}", README)[1]
    assert f"# ANCHOR: {anchor}\n" in SOURCE
    compare = (ROOT / "tests" / "compare.py").read_text(encoding="utf-8")
    assert '"--map"' in compare
    assert f"default={claimed(r'beside ours on (.*) random')[0]}" in compare
    assert claimed(r"choices in (.*) pairs") == (str(loop.Config.preference_pairs),)


def test_the_table_of_names_is_that_of_config():
    rows = [line.split(" | ") for line in README.splitlines() if line.startswith("| `--")]
    rows = [(re.findall(r"--([a-z-]+)", row[0]), row[1:]) for row in rows if len(row) == 4]
    peers = {
        field.name: {
            trainer: " ".join(re.findall(rf"([\w.]+)[ =]{{{field.name}(?:_\w+)?}}", page))
            for trainer, page in loop.RECIPES.items()
        }
        for field in dataclasses.fields(loop.Config)
    }
    told = {flag.replace("-", "_") for flags, _ in rows for flag in flags}
    assert {name for name, names in peers.items() if any(names.values())} - told == {
        "steps", "prompt_length", "response_length", "seed",  # --help has these
    }  # fmt: skip
    for flags, cells in rows:
        for trainer, cell in zip(("trl", "openrlhf", "verl"), cells, strict=True):
            told = {name.removeprefix("--").partition("=")[0] for name in re.findall(r"`([^` ]+)`", cell)}
            names = " ".join(peers[flag.replace("-", "_")][trainer] for flag in flags).split()
            names = {name.partition("=")[0] for name in names}
            assert names <= told, (flags, trainer)
            assert all(name in SOURCE for name in told - names), (flags, trainer)
    for page in loop.RECIPES.values():
        trainer, number = re.match(r"# (\w+) ([\d.]+),", page).groups()
        assert f"{trainer} {number.removesuffix('.0')}" in README


def test_the_two_commands_and_the_length():
    run_it, test_it, *_ = BASH
    assert run_it.endswith("-r requirements.txt && .venv/bin/python rlhf_loop_pseudo.py")
    assert test_it.endswith("-r tests/requirements.txt && .venv/bin/python -m pytest -q")
    assert len(README.splitlines()) <= 230
    assert "XX" not in README


def test_the_inline_metadata_is_requirements_txt():
    metadata = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", SOURCE)[1]
    inline = re.findall(r'"([^"]+)"', metadata.split("dependencies")[1])
    assert inline == (ROOT / "requirements.txt").read_text().split()
    assert 'requires-python = ">=3.10"' in metadata


def test_nothing_else_is_imported():
    nodes = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or alias.name for node in nodes for alias in node.names]
    modules = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert modules - {"pygments"} == {"numpy", "rich"}  # rich brings pygments
