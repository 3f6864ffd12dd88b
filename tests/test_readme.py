"""Every command, output, snippet and claim of the README, and the script's own metadata."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rlhf_loop_pseudo as loop

ROOT = Path(loop.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = [block.split("\n", 1) for block in re.findall(r"```console\n\$ (.*?)\n```", README, re.DOTALL)]
BASH = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
PYTHON = re.findall(r"^```python\n(.*?)\n^```", README, re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?")


def run(command):
    """The output of one of the README's commands, which begin with `python rlhf_loop_pseudo.py`."""
    python, script, *arguments = command.split()
    assert (python, script) == ("python", "rlhf_loop_pseudo.py")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, env=environment, timeout=120, check=True
    )
    return done.stdout.decode()


@pytest.fixture(scope="module")
def outputs():
    """The real output of every command that the README shows alone or with its output."""
    commands = [command for command, _ in CONSOLE] + [command for command in BASH if command.startswith("python ")]
    commands.sort(key=lambda command: "--beta" not in command)  # the longest first
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands)))


@pytest.mark.parametrize(("command", "shown"), CONSOLE)
def test_the_outputs_are_real(command, shown, outputs):
    """Words must agree to the letter; numbers of one step closely, those of a training roughly.

    Another processor rounds differently, which a training multiplies.
    """
    real, training = outputs[command].strip("\n"), "--steps" in command
    if shown.startswith("...\n"):
        shown = shown[4:]
        real = real[real.index(shown.split("\n")[0]) :]
    assert len(real.splitlines()) == len(shown.splitlines())
    for ours, theirs in zip(real.splitlines(), shown.splitlines()):
        if training:
            ours, theirs = (re.sub(r"[▁-█]+|  [a-z]+\.?$", "", line).split() for line in (ours, theirs))
            ours, theirs = " ".join(ours), " ".join(theirs)
        assert NUMBER.sub("#", ours) == NUMBER.sub("#", theirs)
        for mine, printed in zip(NUMBER.findall(ours), NUMBER.findall(theirs)):
            mine, printed = (float(number.replace(",", "")) for number in (mine, printed))
            tolerance = {"rel": 0.3, "abs": 20.0 if "%" in ours else 0.2} if training else {"rel": 0.01, "abs": 0.011}
            assert mine == pytest.approx(printed, **tolerance), (ours, theirs)


def share(text):
    return int(re.search(r"attainable gain: (\d+)%", text)[1])


def column(text, name):
    """A column of the table that compares betas, by beta."""
    lines = text.split("The same training at each β\n")[1].splitlines()
    rows = [line.split() for line in lines if re.match(r"\d", line)]
    return {float(row[0]): float(row[["score", "KL", "J", "share"].index(name) + 1].strip("%")) for row in rows}


def test_training_comes_close_to_what_is_possible(outputs):
    assert share(outputs["python rlhf_loop_pseudo.py --preset letters --steps 200"]) >= 85


def test_reward_hacking_is_there_to_see(outputs):
    text = outputs["python rlhf_loop_pseudo.py --preset letters --steps 200 --beta 0 0.02 0.1 1"]
    score, kl = column(text, "score"), column(text, "KL")
    assert score[0] > 0.95
    assert kl[0] > 10
    assert kl[1] < 1.5
    assert score[0] > score[0.02] > score[0.1] > score[1]
    assert kl[0] > kl[0.02] > kl[0.1] > kl[1]
    exercise = outputs["python rlhf_loop_pseudo.py --preset letters --steps 50 --beta 0 10"]
    assert column(exercise, "KL")[0] > 10
    assert column(exercise, "KL")[10] < 0.1


def test_the_first_exercise(outputs):
    text = outputs["python rlhf_loop_pseudo.py --response-length 100"]
    assert "(4, 100, 50257)" in text
    assert text.count("(4, 100)") >= 5
    passes = [line.split()[-3:] for line in text.splitlines() if line.endswith(("updated", "frozen"))]
    assert passes == [["5", "4", "updated"]] * 2 + [["1", "0", "frozen"]] * 2


def test_the_third_exercise(outputs):
    assert "102.9 MB" in README
    assert "Actor logits: (8, 128, 50257)       205.9 MB" in outputs["python rlhf_loop_pseudo.py --batch-size 8"]


def test_the_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loop.main(["--preset", "letters", "--save", "arrays.npz"]) == 0
    blocks = [block for block in PYTHON if "#include" not in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})


def test_every_function_and_flag_that_it_names_is_there(capsys):
    names = re.findall(r"`([a-z]+_[a-z_]+|gae|whiten|generate)`", README.split("## The same setting elsewhere")[0])
    assert len(set(names)) > 12
    assert all(hasattr(loop, name) for name in names)
    loop.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    tables = re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)
    used = re.findall(r"rlhf_loop_pseudo\.py((?: +[^\s|`]+)*)", README)
    assert known >= {*tables, *re.findall(r"--[a-z-]+", " ".join(used))}


def test_two_commands_set_up_run_and_test():
    run_it, test_it = BASH[:2]
    assert run_it.endswith("-r requirements.txt && .venv/bin/python rlhf_loop_pseudo.py")
    assert test_it.endswith("-r tests/requirements.txt && .venv/bin/python -m pytest -q")


def test_the_inline_metadata_is_requirements_txt():
    source = Path(loop.__file__).read_text(encoding="utf-8")
    metadata = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", source)[1]
    inline = re.findall(r'"([^"]+)"', metadata.split("dependencies")[1])
    assert inline == (ROOT / "requirements.txt").read_text().split()
    assert 'requires-python = ">=3.10"' in metadata


def test_nothing_else_is_imported():
    source = Path(loop.__file__).read_text(encoding="utf-8")
    modules = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE))
    assert modules - set(sys.stdlib_module_names) == {"numpy", "rich"}
