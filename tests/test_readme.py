"""What README says: its commands, what it shows of them, its snippets and its picture."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rlhf_loop_pseudo as loop

ROOT = Path(loop.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SCRIPT_COMMANDS = re.findall(
    r"(?:python|uv run|pipx run) (?:\./)?(rlhf_loop_pseudo\.py[^`\n<]*)", README
)


def block(language, start):
    """The block of code in this language that begins so."""
    return next(text for kind, text in BLOCKS if kind == language and text.startswith(start))


def printed(command):
    """What the script prints for a command of README."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert loop.main(shlex.split(command)[1:]) == 0
    return output.getvalue()


def masked(text):
    """A line without its figures and without the width of its blanks."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d+(\.\d+)?", "0", text)).strip()


def test_two_commands_set_up_and_run():
    first, second = (text for kind, text in BLOCKS[:2] if kind == "bash")
    start = "python3 -m venv .venv && .venv/bin/pip install -q -r "
    assert first == f"{start}requirements.txt && .venv/bin/python rlhf_loop_pseudo.py\n"
    assert second == f"{start}tests/requirements.txt && .venv/bin/python -m pytest -q\n"
    assert README.index(second) < README.index("\n## ")


def test_it_is_short():
    assert README.count("\n") <= 240


@pytest.mark.parametrize("command", SCRIPT_COMMANDS)
def test_every_command_is_accepted(command):
    _, configs = loop.read_command_line(shlex.split(command.rstrip(" ."))[1:])
    assert configs


def test_every_flag_and_file_that_is_named_exists():
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        loop.read_command_line(["--help"])
    ours = README.split("## On to a real model")[0] + README.split("## Plot it")[1]
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    others = {"--map", "--torch", "--strict"}
    assert flags - others <= set(re.findall(r"--[a-z-]+", text.getvalue()))
    for path in re.findall(r"(?:\.github|tests)/[\w.-]+", README):
        assert (ROOT / path).exists(), path


def test_what_a_step_shows():
    output = [masked(line) for line in printed("rlhf_loop_pseudo.py").splitlines()]
    start = "$ python rlhf_loop_pseudo.py\n"
    for line in block("console", start).removeprefix(start).splitlines():
        assert masked(line) in output, line


@pytest.fixture(scope="module")
def four():
    """What the command of four betas prints, from README's seed."""
    return printed(block("console", "$ python rlhf_loop_pseudo.py --preset").splitlines()[0][9:])


@pytest.mark.claims
def test_what_four_betas_come_to(four):
    """The words may differ from processor to processor, the verdicts may not."""
    shown = block("console", "$ python rlhf_loop_pseudo.py --preset")
    verdicts = re.findall(r"^    (\S.*?): human (\S+), best (\S+), end (\S+); words", shown, re.M)
    found = re.findall(r"^    (\S.*?): human (\S+), best (\S+), end (\S+); words", four, re.M)
    assert len(verdicts) == 4
    for (verdict, *figures), (verdict_now, *figures_now) in zip(verdicts, found[-4:]):
        assert verdict == verdict_now
        np.testing.assert_allclose([*map(float, figures)], [*map(float, figures_now)], atol=0.12)


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_picture_shows_the_same(theme):
    svg = (ROOT / ".github" / f"picture-{theme}.svg").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>|&#160;", "", svg)
    shown = block("console", "$ python rlhf_loop_pseudo.py --preset").splitlines()[1:]
    for line in shown:
        assert re.sub(r"\s", "", line) in re.sub(r"\s", "", text), line
    assert "rewards" in text
    assert re.search(r'viewBox="0 0 (\d+)', svg)[1] == "994"  # 80 columns: readable at 830


def test_every_function_of_the_table_is_one():
    table = README.split("| step | function |")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) > 15
    assert all(callable(getattr(loop, name)) for name in names)


def test_twelve_words_at_most():
    glossary = README.split("words</summary>")[1].split("</details>")[0]
    assert 8 <= len(re.findall(r"\*\*\w[\w ]*\*\*:", glossary)) <= 12


def test_the_plot_runs(tmp_path):
    path = tmp_path / "runs.npz"
    command = f"rlhf_loop_pseudo.py --preset letters --steps 3 --beta 0 0.2 --save {path}"
    printed(command)
    code = "import matplotlib; matplotlib.use('Agg')\n" + block("python", "import matplotlib")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "overoptimisation.png").stat().st_size > 1000


PADDED_GAE = """import numpy as np


def gae(rewards, values, mask, gamma, lam):
    advantages = np.zeros_like(values)
    last = next_value = 0
    for t in reversed(range(values.shape[1])):
        last = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        advantages[:, t], next_value = last, values[:, t]
    advantages *= mask
    return advantages, (advantages + values) * mask
"""


def test_the_comparison_shows_what_readme_says(tmp_path):
    (tmp_path / "my_ppo.py").write_text(PADDED_GAE, encoding="utf-8")
    command = [sys.executable, ROOT / "tests" / "compare.py", tmp_path / "my_ppo.py"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    output = [line.strip() for line in done.stdout.splitlines()]
    for line in block("console", "$ python tests/compare.py").splitlines()[1:]:
        assert line.strip() in output, line


def test_the_adapter_is_python():
    compile(block("python", "def ppo_loss"), "adapter", "exec")


def test_requirements_are_said_once():
    source = Path(loop.__file__).read_text(encoding="utf-8")
    listed = re.search(r"^# dependencies = \[(.*)\]$", source, re.MULTILINE)[1]
    assert re.findall(r'"(.*?)"', listed) == (ROOT / "requirements.txt").read_text().split()
