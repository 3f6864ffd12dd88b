"""What README says: its commands, what it shows of them, its snippets and its picture."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import kl_gradients
import rlhf_loop_pseudo as loop
from conftest import numbers

ROOT = Path(loop.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SCRIPT_COMMANDS = re.findall(r"(?:python|uv run) (rlhf_loop_pseudo\.py[^`\n<]*)", README)
TRAINING_OF_FOUR = "$ python rlhf_loop_pseudo.py --preset"
OWN_REWARD, BEST_OF_N, PLOT = (text for kind, text in BLOCKS if kind == "python")


def block(language, start):
    """The block of code in this language that begins so."""
    return next(text for kind, text in BLOCKS if kind == language and text.startswith(start))


def rows_of(head):
    """The rows of the table whose head begins so."""
    (table,) = re.findall(rf"^{re.escape(head)}.*\n\|[-|: ]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    return table.splitlines()


def printed(command):
    """What the script prints for a command of README."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert loop.main(shlex.split(command)[1:]) == 0
    return output.getvalue()


def masked(text):
    """A line without its figures and without the width of its blanks."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d+(\.\d+)?", "0", text)).strip()


def assert_same_figures(shown, computed, atol, rtol=0.0):
    """Two lines that differ in nothing but their figures, and in these by little."""
    assert masked(shown) == masked(computed)
    np.testing.assert_allclose(numbers(shown), numbers(computed), rtol, atol, err_msg=shown)


def test_two_commands_set_up_and_run():
    first, second = (text for kind, text in BLOCKS[:2] if kind == "bash")
    start = "python3 -m venv .venv && .venv/bin/pip install -q -r "
    assert first == f"{start}requirements.txt && .venv/bin/python rlhf_loop_pseudo.py\n"
    assert second == f"{start}tests/requirements.txt && .venv/bin/python -m pytest -q\n"
    assert README.index(second) < README.index("\n## ")


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 260
    text = [line for line in lines if not line.startswith(("|", "  <img"))]
    assert max(map(len, text)) <= 140


@pytest.mark.parametrize("command", SCRIPT_COMMANDS)
def test_every_command_is_accepted(command):
    _, configs = loop.read_command_line(shlex.split(command.rstrip(" .:"))[1:])
    assert configs


def test_every_flag_and_file_that_is_named_exists():
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        loop.read_command_line(["--help"])
    before, after = README.split("## On to a real model")
    ours = before + after.split("## What is left out")[1]
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"`--algo\S+", "", ours)))
    assert flags - {"--torch"} <= set(re.findall(r"--[a-z-]+", text.getvalue()))
    for path in re.findall(r"(?:\.github|tests)/[\w.-]+", README):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def walk_through():
    return printed("rlhf_loop_pseudo.py")


def test_what_a_step_shows(walk_through):
    output = iter(walk_through.splitlines())
    for line in block("console", "$ python rlhf_loop_pseudo.py\n").splitlines()[1:]:
        printed_line = next(text for text in output if masked(text) == masked(line))
        assert_same_figures(line, printed_line, atol=0.02, rtol=0.001)
    assert "102.9 MB" in README


def test_the_answers_to_the_exercises(walk_through):
    shapes, _, critic = re.findall(r"<summary>Answer</summary>(.*?)</details>", README, re.S)
    command = shlex.split(re.search(r"<code>python (.*?)</code>", shapes)[1])
    _, (config,) = loop.read_command_line(command[1:])
    B, T, V = config.batch_size, config.response_length, config.vocab_size
    assert f"({B}, {T}) for tokens" in shapes
    assert f"({B}, {T}, {V}), which is {4e-6 * B * T * V:.1f} MB" in shapes
    forward, backward, *sizes = numbers(re.search(r"^  critic (.*\d)$", walk_through, re.M)[1])
    assert f"{sum(sizes):.1f} MB, {forward:g} passes forward and {backward:g} backward" in critic


@pytest.mark.claims
def test_the_shares_in_an_answer():
    answer = re.search(r"<code>python (\S+ [^<]*ppo rloo grpo)</code>(.*?)</details>", README, re.S)
    rows = re.findall(r"^  β 0.2, \w+ .*?([\d.]+ ± [\d.]+)$", printed(answer[1]), re.MULTILINE)
    shown = re.findall(r"[\d.]+ ± [\d.]+", answer[2])[:3]
    for share, row in zip(shown, rows[-3:], strict=True):
        assert_same_figures(share, row, atol=0.02)


@pytest.mark.claims
def test_what_four_betas_come_to():
    """The words may differ from processor to processor, the verdicts may not."""
    first, *shown = block("console", TRAINING_OF_FOUR).splitlines()
    verdicts = [line for line in shown if line.startswith("    ")]
    found = [line for line in printed(first[9:]).splitlines() if re.search(r"; words \d", line)]
    for line, now in zip(verdicts, found, strict=True):
        assert_same_figures(line, now, atol=0.12)
    assert len(verdicts) == 4


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_picture_shows_the_same(theme):
    svg = (ROOT / ".github" / f"picture-{theme}.svg").read_text(encoding="utf-8")
    text = re.sub(r"\s|&#160;", "", re.sub(r"<[^>]+>", "", svg))
    for line in block("console", TRAINING_OF_FOUR).splitlines()[1:]:
        assert re.sub(r"\s", "", line) in text, line
    assert "PPOupdate" in text
    ends = re.findall(r"end ([\d.]+)", block("console", TRAINING_OF_FOUR))
    assert all(end in re.search(r'alt="([^"]*)"', README)[1] for end in (ends[0], *ends[2:]))
    assert re.search(r'viewBox="0 0 (\d+)', svg)[1] == "994"  # 80 columns: readable at 830


def run_snippet(code):
    """What a block of Python prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "README.md", "exec"), {"__name__": "snippet"})
    return output.getvalue().splitlines()


def test_an_actor_learns_a_reward_of_ones_own():
    """The words may differ from processor to processor."""
    shown, lines = re.findall(r"^# (.*)$", OWN_REWARD, re.MULTILINE), run_snippet(OWN_REWARD)
    for line, now in zip(shown, lines, strict=True):
        assert_same_figures(line.split()[0], now.split()[0], atol=0.1)
        assert len(line.split()) == len(now.split())
    assert numbers(lines[-1])[0] > numbers(lines[0])[0] + 0.3


def test_the_best_of_n_please_the_human_until_n_is_too_large():
    rows = run_snippet(BEST_OF_N)
    for shown, row in zip(rows_of("| n |"), rows, strict=True):
        assert_same_figures(shown, row, atol=0.05)
    n, score, bound, human, words = np.transpose([numbers(row) for row in rows])
    np.testing.assert_allclose(bound, np.log(n) - 1 + 1 / n, atol=0.005)
    assert (np.diff(score) > 0).all()
    assert human[-1] < max(human)
    assert words[-1] < words[-2] - 0.1


def test_the_estimators_gradients():
    head, _, *computed = kl_gradients.table()
    shown = rows_of(head)
    for line, row in zip(shown, computed, strict=True):
        assert_same_figures(line, row, atol=0.011)


def test_trainers_repair_k3_to_the_gradient_of_k2():
    """With a ratio of 1, the derivative of ratio * k3 is k3's own plus k3: that is k1."""
    logprobs, ref_logprobs = np.random.default_rng(0).standard_normal((2, 3, 4))
    mask = np.ones((3, 4))
    (_, slope_k2), (_, slope_k3) = (
        loop.kl_loss(logprobs, ref_logprobs, mask, name) for name in ("k2", "k3")
    )
    k3 = loop.kl_penalty(logprobs, ref_logprobs, "k3")
    np.testing.assert_allclose(slope_k3 + k3 / mask.size, slope_k2, rtol=1e-12, atol=1e-15)


def test_the_plot_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    command = re.search(r"`python (rlhf_loop_pseudo\.py [^`]* --save runs\.npz)`", README)[1]
    printed(f"{command} --steps 2")
    run_snippet(PLOT)
    assert Path(re.search(r'savefig\("(.*?)"', PLOT)[1]).stat().st_size > 1000


def test_requirements_are_said_once():
    source = Path(loop.__file__).read_text(encoding="utf-8")
    listed = re.search(r"^# dependencies = \[(.*)\]$", source, re.MULTILINE)[1]
    assert re.findall(r'"(.*?)"', listed) == (ROOT / "requirements.txt").read_text().split()
