"""For the copier and the chapter: each function stands alone, and mdBook shows it whole."""

import ast
import copy
import html
import inspect
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import Batch

SCRIPT = Path(loop.__file__)
SOURCE = SCRIPT.read_text(encoding="utf-8")
LESSON, PRESENTATION = re.split(r"\n# -+ 8\. .*", SOURCE)
TREE = ast.parse(SOURCE)
FUNCTIONS = [node.name for node in TREE.body if isinstance(node, ast.FunctionDef)]
ANCHORED = re.findall(r"^# ANCHOR: (.+)$", SOURCE, re.M)
X, Y, Z = np.random.default_rng(0).standard_normal((3, 4, 5))
MASK = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
ALONE = {  # pure functions of arrays, with arguments
    "kl_penalty": (X, Y, "k3"),
    "shape_rewards": (X[:, 0], Y, MASK, 0.1),
    "gae": (X, Y, MASK, 0.9, 0.8),
    "rloo_advantages": (X, MASK, 2),
    "grpo_advantages": (X, MASK, 2),
    "whiten": (X, MASK),
    "ppo_loss": (X, Y, Z, MASK, 0.2),
    "value_loss": (X, Y, MASK),
    "adam_step": ({"w": X}, {"w": Y}, {}, 0.1),
    "human_scores": (MASK[:, :1], MASK + 3, MASK, 27),
    "preference_loss": (X[0], Y[0]),
}
NEEDED = {  # what comes along, in the order of the file
    "sample_prompts": "sample_prompts",
    "token_logprobs": "token_logprobs token_ids backbone uniform_attention predicting_states "
    "forward_logprobs vocabulary_slices",
    "critic_values": "critic_values token_ids backbone uniform_attention predicting_states",
    "score_responses": "score_responses token_ids last_positions backbone uniform_attention",
    "generate": "generate token_ids log_softmax sample_tokens",
    "demonstrations": "LETTERS demonstrations",
}


def show(name, capsys):
    """What --show prints of a function into a pipe."""
    assert loop.main(["--show", *name.split()]) == 0
    return capsys.readouterr().out


def anchored(name):
    """The lines that mdBook takes."""
    return re.search(rf"# ANCHOR: {name}\n(.*?) *# ANCHOR_END: {name}\n", SOURCE, re.S)[1]


def test_anchors_pair_and_hold_one_function_each():
    assert len(ANCHORED) == len(set(ANCHORED))
    assert set(ANCHORED) >= {*ALONE, *NEEDED, "core_loop", "actor_gradients", "critic_gradients"}
    assert re.findall(r"^    # ANCHOR_END: (.+)$", SOURCE, re.M) == ANCHORED  # formatters keep it
    assert SOURCE.count("ANCHOR_END") == len(ANCHORED)
    for name in ANCHORED:
        body = anchored(name)
        (function,) = ast.parse(body).body
        assert function.name == name
        assert body.startswith("def ")
        assert not body.endswith("\n\n")


def test_the_loop_comes_first_and_within_160_lines():
    assert ANCHORED[0] == "core_loop"
    assert SOURCE.split("# ANCHOR: core_loop")[0].count("\n") < 160


def test_the_first_lines_name_the_functions_of_each_step():
    steps = {name: re.match(r"Step (\d)", getattr(loop, name).__doc__) for name in ANCHORED}
    told = re.split(r"\n    (\d)\. ", loop.__doc__.split("The lesson, by sections")[0])[1:]
    for number, text in zip(told[::2], told[1::2]):
        named = {name for name in ANCHORED if re.search(rf"\b{name}\b", text)}
        assert named == {name for name, step in steps.items() if step and step[1] == number}
    assert told[::2] == list("1234567")


def test_the_first_lines_show_the_picture():
    picture = loop.PICTURE.strip("\n")
    assert picture in loop.__doc__
    assert len(picture.splitlines()) <= 10
    assert max(map(len, picture.splitlines())) <= 80


def test_no_line_is_too_wide_for_a_page():
    assert max(map(len, LESSON.splitlines())) <= 86
    assert max(map(len, SOURCE.splitlines())) <= 100


@pytest.mark.parametrize("name", ALONE)
def test_a_pasted_function_runs_with_numpy_alone(name, capsys):
    space, results = {}, []
    exec(show(name, capsys), space)
    assert {key for key in space if not key.startswith("__")} | {"np"} == {"np", name}
    for function in (space[name], getattr(loop, name)):
        arguments = copy.deepcopy(ALONE[name])
        results.append((function(*arguments), arguments[0]))  # which adam_step changes
    np.testing.assert_equal(*results)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_shown_of_any_function_runs_in_a_fresh_namespace(name, capsys):
    source, space = show(name, capsys), {"__name__": "notebook", "__file__": str(SCRIPT)}
    exec(source, space)
    assert callable(space[name])
    assert "\x1b" not in source
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    own = {node.id for node in found if isinstance(node.ctx, ast.Store)}
    uses = {node.id for node in found if hasattr(loop, node.id)} - own - {"__doc__"}
    assert uses <= set(space)  # in generators and lambdas, too


@pytest.mark.parametrize("name", NEEDED)
def test_a_function_comes_with_what_it_needs_and_no_more(name, capsys):
    found = re.findall(r"^(?:def |class )?(\w+)(?:\(| = )", show(name, capsys), re.M)
    assert sorted(found) == sorted(NEEDED[name].split())


@pytest.mark.parametrize("name", ANCHORED)
def test_a_lesson_needs_nothing_of_the_presentation(name, capsys):
    """A local variable that has a function's name would bring that function along."""
    defined = re.findall(r"^(?:def|class) (\w+)", show(name, capsys), re.M)
    assert name in defined
    assert all(re.search(rf"^(def|class) {part}\b", LESSON, re.M) for part in defined)


def test_pasted_functions_with_their_helpers_give_the_same_numbers(capsys):
    batch, space = Batch(0), {}
    exec(show("actor_gradients", capsys), space)
    arguments = batch.model, batch.prompts, batch.responses, *np.ones((2, 3, 5)), batch.mask, 0.2
    np.testing.assert_equal(space["actor_gradients"](*arguments), loop.actor_gradients(*arguments))
    exec(show("core_loop", capsys), space)
    config = loop.Config(batch_size=2, prompt_length=3, response_length=4, vocab_size=9, width=4)
    stages = []
    for module in (space, vars(loop)):
        models = loop.init_models(config, np.random.default_rng(1))
        steps = module["core_loop"](models, config, np.random.default_rng(2))
        stages.append([vars(step) for step in steps])
    np.testing.assert_equal(*stages)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_say_what_a_reader_needs(name):
    function = getattr(loop, name)
    doc = " ".join(function.__doc__.split())
    assert len(doc) > 20
    if name not in ANCHORED:
        return
    first, *rest = function.__doc__.splitlines()
    assert first.endswith(".")
    assert not rest or not rest[0].strip()
    assert "Source: " in doc
    assert name == "core_loop" or re.search("[Rr]eturns? ", doc)
    arrays = {"mask", "prompts", "responses", "rewards", "chosen"} & set(
        inspect.signature(function).parameters
    )
    assert not arrays or re.search(r"\((B|2 N|N)\b", doc) or "(B, T)" in doc
    if "raise ValueError" in anchored(name):
        assert "Raises ValueError" in doc


def test_a_real_mdbook_shows_each_function_whole(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "book.toml").write_text('[book]\ntitle = "t"\n')
    (tmp_path / "src" / "SUMMARY.md").write_text("[Page](page.md)\n")
    blocks = [f"```python\n{{{{#include {SCRIPT.as_posix()}:{name}}}}}\n```\n" for name in ANCHORED]
    (tmp_path / "src" / "page.md").write_text("\n".join(blocks))
    mdbook = shutil.which("mdbook", path=sysconfig.get_path("scripts"))
    subprocess.run([mdbook, "build", str(tmp_path)], check=True, capture_output=True)
    page = (tmp_path / "book" / "page.html").read_text(encoding="utf-8")
    found = re.findall(r"<code class=\"language-python[^>]*>(.*?)</code>", page, re.S)
    assert [html.unescape(block).strip("\n") for block in found] == [
        anchored(name).rstrip() for name in ANCHORED
    ]
