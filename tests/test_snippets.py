"""For the copier and the chapter: each function stands alone, and mdBook shows it whole."""

import ast
import html
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import rlhf_loop_pseudo as loop

SCRIPT = Path(loop.__file__)
SOURCE = SCRIPT.read_text(encoding="utf-8")
ALONE = """sample_prompts kl_penalty shape_rewards gae group_advantages whiten ppo_loss value_loss adam_step
human_scores preference_loss""".split()
PUBLIC = {
    *ALONE,
    *"generate score_responses token_logprobs critic_values actor_gradients critic_gradients".split(),
}
PUBLIC |= {"core_loop"}
ANCHORED = re.findall(r"^# ANCHOR: (.+)$", SOURCE, re.MULTILINE)
FUNCTIONS = [node.name for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)]


def show(name, capsys):
    """What --show NAME prints into a pipe."""
    assert loop.main(["--show", *name.split()]) == 0
    return capsys.readouterr().out


def test_anchors_pair_and_hold_one_function_each():
    assert set(ANCHORED) >= PUBLIC
    assert len(ANCHORED) == len(set(ANCHORED))
    assert re.findall(r"^# ANCHOR_END: (.+)$", SOURCE, re.MULTILINE) == ANCHORED
    for name in ANCHORED:
        body = SOURCE.split(f"# ANCHOR: {name}\n")[1].split(f"# ANCHOR_END: {name}\n")[0]
        (function,) = ast.parse(body).body
        assert function.name == name
        assert body.startswith("def ")
        assert not body.endswith("\n\n"), f"{name}: an empty line at its end"


def test_the_loop_comes_before_what_it_calls_and_within_150_lines():
    assert ANCHORED[0] == "core_loop"
    assert SOURCE.split("# ANCHOR: core_loop")[0].count("\n") < 150


def test_the_first_lines_name_the_functions_of_each_step():
    told = [
        (number, name)
        for number, names in re.findall(
            r"^    (\d)\. .*?  +(\w+(?:[,;] (?:or )?\w+)*)$", loop.__doc__, re.MULTILINE
        )
        for name in re.split(r"[,;] (?:or )?", names)
    ]
    steps = {name: re.match(r"Step (\d)", getattr(loop, name).__doc__) for name in ANCHORED}
    assert sorted(told) == sorted((step[1], name) for name, step in steps.items() if step)
    section_4 = SOURCE.split(" 4. the seven steps")[1].split(" 5. before the loop")[0]
    assert all(f"\ndef {name}(" in section_4 for _, name in told)


def test_no_line_is_too_long_for_a_page():
    between = False
    for number, line in enumerate(SOURCE.splitlines(), 1):
        between = (between or line.startswith("# ANCHOR:")) and not line.startswith("# ANCHOR_END:")
        assert len(line) <= (88 if between else 120), f"line {number}: {line}"


X, Y, Z = np.random.default_rng(0).standard_normal((3, 4, 5))
MASK = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
ARGUMENTS = {
    "kl_penalty": (X, Y, "k3"),
    "shape_rewards": (X[:, 0], Y, MASK, 0.1),
    "gae": (X, Y, MASK, 0.9, 0.8),
    "group_advantages": (X, MASK, 2, "grpo"),
    "whiten": (X, MASK),
    "ppo_loss": (X, Y, Z, MASK, 0.2),
    "value_loss": (X, Y, MASK),
    "human_scores": (MASK + 3, MASK, 27),
    "preference_loss": (X[0], Y[0]),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_pasted_function_runs_with_numpy_alone(name, capsys):
    space = {}
    exec(show(name, capsys), space)
    assert {key for key in space if not key.startswith("__")} == {"np", name}
    if name == "sample_prompts":
        assert space[name](np.random.default_rng(0), 2, 3, 5).shape == (2, 3)
    elif name == "adam_step":
        space[name](params := {"w": X.copy()}, {"w": Y}, {}, 0.1)
        np.testing.assert_allclose(params["w"], X - 0.1 * np.sign(Y), atol=1e-6)
    else:
        np.testing.assert_equal(
            space[name](*ARGUMENTS[name]), getattr(loop, name)(*ARGUMENTS[name])
        )


def test_what_every_function_shows_runs_in_a_fresh_namespace(capsys):
    for name in FUNCTIONS:
        source, space = show(name, capsys), {"__name__": "notebook", "__file__": str(SCRIPT)}
        exec(source, space)
        assert callable(space[name]), name
        assert "import numpy as np\n" in source
        assert "\x1b" not in source
        used = {
            node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)
        } & set(vars(loop))
        assert used - {"__file__", "__name__"} <= set(space), (
            name
        )  # what it calls, and what that calls


@pytest.mark.parametrize("name", ANCHORED)
def test_a_function_comes_with_nothing_that_it_does_not_need(name, capsys):
    """A local variable that has a function's name would bring that function along."""
    lesson = SOURCE.split("7. measuring")[0]
    shown = re.findall(r"^(?:def|class) (\w+)", show(name, capsys), re.MULTILINE)
    assert name in shown
    assert all(f"def {each}(" in lesson for each in shown)


def test_a_pasted_function_with_its_helpers_gives_the_same_numbers(capsys):
    rng = np.random.default_rng(0)
    actor = loop.init_model(rng, 9, 4, 9)
    prompts = rng.integers(0, 8, (4, 3))
    responses = rng.integers(0, 9, (4, 5))
    space = {}
    exec(show("actor_gradients", capsys), space)
    arguments = actor, prompts, responses, X, Y, MASK, 0.2
    np.testing.assert_equal(space["actor_gradients"](*arguments), loop.actor_gradients(*arguments))
    exec(show("core_loop", capsys), space)
    config = loop.Config(batch_size=2, prompt_length=3, response_length=4, vocab_size=9, width=4)
    mine, theirs = (
        list(
            module["core_loop"](
                loop.init_models(config, np.random.default_rng(1)), config, np.random.default_rng(2)
            )
        )
        for module in (space, vars(loop))
    )
    for stage, expected in zip(mine, theirs, strict=True):
        np.testing.assert_equal(stage, expected)


def test_a_pipe_gets_source_and_the_interpreter_runs_it():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--show", "gae"], capture_output=True, check=True, text=True
    )
    assert done.stdout.startswith("import numpy as np\n")
    assert done.stdout.split("\n\n", 1)[1].strip() in SOURCE


def test_a_terminal_gets_colours_that_follow_its_theme(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("actor_gradients", "read_command_line"):
        shown = show(name, capsys)
        assert re.search(r"\x1b\[[0-9;]*m", shown)
        codes = {
            code for codes in re.findall(r"\x1b\[([0-9;]*)m", shown) for code in codes.split(";")
        }
        assert codes <= {
            "",
            "0",
            "1",
            "2",
            "3",
            "49",
            *map(str, [*range(31, 37), *range(91, 97)]),
        }  # no white, no black, no background
        monkeypatch.delenv("FORCE_COLOR")
        plain = show(name, capsys)
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert re.sub(r"\x1b\[[0-9;]*m", "", shown).split() == plain.split()
        lines = map(str.rstrip, re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())
        assert set(map(str.rstrip, plain.splitlines())) <= set(lines)  # not wrapped at 80 columns


def test_the_list_names_every_anchor_with_its_first_line(capsys):
    lines = [line for line in show("", capsys).splitlines() if line]
    assert [line.split()[0] for line in lines] == ANCHORED
    for line, name in zip(lines, ANCHORED):
        assert line.split(None, 1)[1] == getattr(loop, name).__doc__.splitlines()[0]


@pytest.mark.parametrize("name", ANCHORED)
def test_docstrings_say_what_a_reader_needs(name):
    doc = getattr(loop, name).__doc__
    summary, *_ = doc.split("\n\n")
    assert summary.endswith(".")
    assert "\n" not in summary
    if name not in ("core_loop", "adam_step"):
        assert re.search(r"[Rr]eturns?\b", doc)
        assert "Source: " in doc
        assert re.search(r"\((B|2 N|N|200),", doc)
    if "raise ValueError" in SOURCE.split(f"# ANCHOR: {name}\n")[1].split("# ANCHOR_END")[0]:
        assert "Raises ValueError" in " ".join(doc.split())


def test_a_real_mdbook_shows_each_function_whole(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "book.toml").write_text('[book]\ntitle = "t"\n')
    (tmp_path / "src" / "SUMMARY.md").write_text("[Page](page.md)\n")
    include = [
        f"```python\n{{{{#include {SCRIPT.as_posix()}:{name}}}}}\n```\n" for name in ANCHORED
    ]
    (tmp_path / "src" / "page.md").write_text("\n".join(include))
    mdbook = shutil.which("mdbook", path=sysconfig.get_path("scripts"))
    subprocess.run([mdbook, "build", str(tmp_path)], check=True, capture_output=True)
    page = (tmp_path / "book" / "page.html").read_text(encoding="utf-8")
    blocks = re.findall(r"<code class=\"language-python[^>]*>(.*?)</code>", page, re.DOTALL)
    assert len(blocks) == len(ANCHORED)
    for name, block in zip(ANCHORED, blocks):
        body = SOURCE.split(f"# ANCHOR: {name}\n")[1].split(f"# ANCHOR_END: {name}\n")[0]
        assert html.unescape(block).rstrip("\n") == body.rstrip("\n")
        assert max(map(len, html.unescape(block).splitlines())) <= 88
