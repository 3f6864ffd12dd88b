"""For the copier and the chapter: each function stands alone, and mdBook can include it."""

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
ALONE = ["kl_penalty", "shape_rewards", "gae", "whiten", "ppo_loss", "value_loss", "adam_step", "sample_prompts"]
WITH_MODELS = ["generate", "score_responses", "token_logprobs", "critic_values", "actor_gradients", "critic_gradients"]
PUBLIC = [*ALONE, *WITH_MODELS, "core_loop"]


def show(name, capsys):
    """What --show NAME prints into a pipe."""
    assert loop.main(["--show", name]) == 0
    return capsys.readouterr().out


def test_anchors_pair_and_hold_one_function_each():
    source = SCRIPT.read_text(encoding="utf-8")
    assert sorted(re.findall(r"^# ANCHOR: (\w+)$", source, re.MULTILINE)) == sorted(PUBLIC)
    for name in PUBLIC:
        body = source.split(f"# ANCHOR: {name}\n")[1].split(f"# ANCHOR_END: {name}\n")[0]
        assert re.findall(r"^def (\w+)", body, re.MULTILINE) == [name]


@pytest.mark.parametrize("name", ALONE)
def test_a_pasted_function_runs_with_numpy_alone(name, capsys):
    space = {}
    exec(show(name, capsys), space)
    assert {key for key in space if not key.startswith("__")} == {"np", name}
    rng = np.random.default_rng(0)
    x, y, z = rng.standard_normal((3, 2, 4))
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    arguments = {
        "kl_penalty": (x, y, "k3"),
        "shape_rewards": (x[:, 0], y, mask, 0.1),
        "gae": (x, y, mask, 0.9, 0.8),
        "whiten": (x, mask),
        "ppo_loss": (x, y, z, mask, 0.2),
        "value_loss": (x, y, mask),
    }
    if name == "sample_prompts":
        assert space[name](rng, 2, 3, 5).shape == (2, 3)
    elif name == "adam_step":
        space[name](params := {"w": x.copy()}, {"w": y}, {}, 0.1)
        np.testing.assert_allclose(params["w"], x - 0.1 * np.sign(y), atol=1e-6)
    else:
        np.testing.assert_equal(space[name](*arguments[name]), getattr(loop, name)(*arguments[name]))


def test_a_pipe_gets_plain_source_that_runs():
    shown = subprocess.run([sys.executable, SCRIPT, "--show", "gae"], capture_output=True, check=True)
    assert b"\x1b" not in shown.stdout
    subprocess.run([sys.executable, "-"], input=shown.stdout, check=True)


def test_the_list_names_every_function_with_one_line(capsys):
    lines = show("", capsys).splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(PUBLIC)
    assert all(len(line) <= 80 and line.endswith(".") for line in lines)


def test_an_unknown_name_is_refused(capsys):
    assert loop.main(["--show", "gea"]) == 2
    assert re.search(r"'gea' is not one of .*gae", capsys.readouterr().err)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_what_a_reader_needs(name):
    doc = getattr(loop, name).__doc__
    summary, *_rest = doc.split("\n\n")
    assert summary.endswith(".")
    assert "\n" not in summary
    if name not in ("core_loop", "adam_step"):
        assert "Returns" in doc
        assert "(B, " in doc
    if name in ("kl_penalty", "shape_rewards", "gae", "whiten", "ppo_loss", "value_loss", "adam_step"):
        assert "Source: " in doc
    if name in ("kl_penalty", "shape_rewards", "gae", "whiten", "ppo_loss", "value_loss", "score_responses"):
        assert "Raises ValueError" in doc


def test_a_real_mdbook_shows_each_function(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "book.toml").write_text('[book]\ntitle = "t"\n')
    (tmp_path / "src" / "SUMMARY.md").write_text("[Page](page.md)\n")
    include = [f"```python\n{{{{#include {SCRIPT.as_posix()}:{name}}}}}\n```\n" for name in PUBLIC]
    (tmp_path / "src" / "page.md").write_text("\n".join(include))
    mdbook = shutil.which("mdbook", path=sysconfig.get_path("scripts"))
    subprocess.run([mdbook, "build", str(tmp_path)], check=True, capture_output=True)
    page = (tmp_path / "book" / "page.html").read_text(encoding="utf-8")
    blocks = re.findall(r"<code class=\"language-python[^>]*>(.*?)</code>", page, re.DOTALL)
    assert len(blocks) == len(PUBLIC)
    for name, block in zip(PUBLIC, blocks):
        assert block.startswith(f"def {name}(")
        assert "ANCHOR" not in block
        assert block.count("def ") == 1
