"""The tool that lays a reader's own PPO beside ours: it passes what is right and finds the bugs."""

import itertools
import os
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import compare
import compare_calls
import conventions
import rlhf_loop_pseudo as loop

THEIRS = """
import numpy as np

def token_logprobs(model, prompts, responses):
    embed, context, head = model.values()
    x = embed[np.concatenate([prompts, responses], axis=1)]
    roots = np.sqrt(np.arange(x.shape[1]) + 1, dtype=x.dtype)[:, None]
    logits = np.tanh(x + x.cumsum(axis=1) / roots @ context) @ head
    return logprobs(logits[:, prompts.shape[1] - 1 : -1], responses)

def logprobs(logits, labels):
    logits = logits - logits.max(axis=2, keepdims=True)
    logits = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return [[row[t, x] for t, x in enumerate(xs)] for row, xs in zip(logits, labels)]

def kl_penalty(logprobs, ref_logprobs, estimator="k1"):
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": 0.5 * d**2, "k3": np.exp(-d) - 1 + d}[estimator]

def shape_rewards(scores, kl, mask, beta):
    rewards = -beta * np.where(mask, kl, 0)
    for row, score in enumerate(scores):
        rewards[row, np.flatnonzero(mask[row])[-1]] += score
    return rewards

def gae(rewards, values, mask, gamma, lam):
    values = values * mask
    deltas = (rewards + gamma * np.pad(values, ((0, 0), (0, 1)))[:, 1:] - values) * mask
    steps = np.arange(mask.shape[1])[:, None] - np.arange(mask.shape[1])
    weights = np.where(steps >= 0, (gamma * lam) ** np.maximum(0, steps), 0)
    advantages = (deltas @ weights * mask).astype(values.dtype)
    return advantages, advantages + values

def rloo_advantages(rewards, mask, group_size):
    totals = (rewards * mask).sum(axis=1)
    groups = [totals[i - i % group_size :][:group_size] for i in range(len(totals))]
    return [x - (group.sum() - x) / (group_size - 1) for x, group in zip(totals, groups)]

def grpo_advantages(rewards, mask, group_size):
    totals = (rewards * mask).sum(axis=1).reshape(-1, group_size)
    centered = totals - totals.mean(axis=1, keepdims=True)
    return (centered / (totals.std(axis=1, ddof=1, keepdims=True) + 1e-6)).reshape(-1, 1) * mask

def whiten(x, mask):
    real = x[mask > 0]
    variance = real.var(ddof=1) if len(real) > 1 else 0
    return (x - real.mean()) / np.sqrt(variance + 1e-8) * mask

def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip):
    ratio = np.exp((new_logprobs - old_logprobs) * mask)
    plain = ratio * advantages * mask
    clipped = np.clip(ratio, 1 - clip, 1 + clip) * advantages * mask
    smaller = np.minimum(plain, clipped)
    gradient = np.where(smaller == plain, -plain, 0) / mask.sum()
    return -smaller.sum() / mask.sum(), gradient, ratio * mask

def value_loss(values, returns, mask):
    error = (values - returns) * mask
    return (error**2).sum() / mask.sum(), 2 * error / mask.sum()

def clipped_value_loss(values, old_values, returns, mask, clip):
    near = np.minimum(np.maximum(values, old_values - clip), old_values + clip)
    plain, clipped = ((values - returns) ** 2, (near - returns) ** 2)
    loss = (np.maximum(plain, clipped) * mask).sum() / mask.sum()
    return loss, np.where(plain >= clipped, 2 * (values - returns), 0) * mask / mask.sum()

def preference_loss(chosen, rejected):
    margin = chosen - rejected
    loss = -np.minimum(margin, 0) + np.log1p(np.exp(-np.abs(margin)))
    slope = -np.exp(-margin - loss) / len(margin)
    return loss.mean(), slope, -slope
"""
DEFINITIONS = {text.split("(")[0]: text for text in THEIRS.split("\ndef ")[1:]}
DEFINITIONS["token_logprobs"] += "\n\ndef " + DEFINITIONS["logprobs"]
LAST = "np.flatnonzero(mask[row])[-1]"
AFTER_LAST = "min(np.flatnonzero(mask[row])[-1] + 1, len(mask[0]) - 1)"
SQUARES = "(error**2).sum() / mask.sum(), 2 * error / mask.sum()"
K3 = "np.exp(-d) - 1 + d"
GROUP_STD = "totals.std(axis=1, ddof=1, keepdims=True)"
DIFFERENCE = "(new_logprobs - old_logprobs)"
BOTH = "advantages, advantages + values"
PPO = "ppo_loss(new, old, advantages, mask, clip)"
RATIO = "ratio = np.exp(np.where(mask, new - old, 0)); a = np.where(mask, advantages, 0)"
CLIPPED = "loss = np.maximum(-ratio * a, -ratio.clip(1 - clip, 1.5) * a)"
MEAN_LOSS = "return (loss * mask).sum() / mask.sum()"
GAE = "gae(rewards, values, mask, gamma, lam)"


def theirs(name, *replacements):
    """The source of one function above, with each odd text replaced by the next one."""
    source = f"import numpy as np\n\n\ndef {DEFINITIONS[name]}"
    for old, new in zip(replacements[::2], replacements[1::2]):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def written(signature, *lines):
    """The source of a function of these lines."""
    return f"import numpy as np\n\n\ndef {signature}:\n    " + "\n    ".join(lines)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Compare a module with this source. Returns the exit code, the report, and it in one line."""

    def compared(source, *options):
        # other tests may have imported torch into this process
        monkeypatch.setattr(compare_calls, "torch_is_used", lambda: "import torch" in source)
        path = tmp_path / "my_ppo.py"
        path.write_text(source)
        code = compare.main([str(path), *options])
        report = capsys.readouterr().out
        assert max(map(len, report.splitlines()), default=0) <= 80
        return code, report, " ".join(report.split())

    return compared


@pytest.fixture
def says(run):
    """Check the exit code and some words of the report on a source, or on changed lines above."""

    def checked(code, words, source, *replacements):
        source = source if "\n" in source else theirs(source, *replacements)
        found, report, line = run(source, "--cases", "45")
        assert found == code and words in line, report
        return line

    return checked


@pytest.fixture
def agrees(says):
    return partial(says, 0)


@pytest.fixture
def differs(says):
    return partial(says, 1)


def smallest_input(report):
    """The arguments in a report, by name: they can be pasted."""
    source = textwrap.dedent("".join(re.findall(r"^    \w+ = .*\n(?:     .*\n)*", report, re.M)))
    exec(source, given := {"np": np})
    return {name: x for name, x in given.items() if name not in ("np", "__builtins__")}


def test_another_right_ppo_agrees(run):
    code, report, _ = run(THEIRS, "--cases", "40")
    assert code == 0
    digits = r"\d\d digits in float64, \d in float32"
    agreeing = re.findall(rf"^  (\w+) +agrees \(40 inputs, {digits}\)$", report, re.M)
    assert {*agreeing} == {*DEFINITIONS}


def test_our_own_functions_agree_and_no_question_remains(run):
    source = Path(loop.__file__).read_text(encoding="utf-8")
    ours = set(re.findall(r"^ *# ANCHOR: (\w+)$", source, re.M)) & set(compare_calls.COMPARED)
    code, _, report = run(source, "--cases", "30", "--strict")
    assert code == 0
    assert report.count(" agrees (30 inputs, 15 digits in") == len(ours) > 15
    assert "where" not in report and "NaN" not in report


@pytest.mark.parametrize(
    "name, old, new, size",
    [
        ("token_logprobs", "1] - 1 : -1", "1] :", 1),
        ("ppo_loss", "ratio = ", "mask = np.roll(mask, -1, 1); ratio = ", 2),
        ("gae", "values = values * mask", "pass", 2),
        ("gae", "- values) * mask", "- values)", 2),
        ("value_loss", "(error**2).sum() / mask.sum()", "(error**2).mean()", 2),
        ("ppo_loss", "1 - clip, 1 + clip", "1 + clip, 1 - clip", 1),
        ("ppo_loss", "np.minimum(plain", "np.maximum(plain", 1),
        ("kl_penalty", "logprobs - ref_", "ref_logprobs - ", 1),
        ("whiten", "x[mask > 0]", "x.ravel()", 3),
        ("shape_rewards", LAST, "-1", 2),
    ],
)
def test_a_classic_bug_is_found_and_made_small(name, old, new, size, run):
    source = theirs(name, old, new)
    code, report, _ = run(source, "--cases", "50")
    assert code == 1
    assert re.search(rf"^  {name:<18} DIFFERS$", report, re.M)
    given = smallest_input(report)
    assert {len(x) for x in given.values() if isinstance(x, np.ndarray)} == {1}
    assert given.get("mask", np.ones(1)).size <= size
    exec(source, module := {})
    with np.errstate(all="ignore"):
        answers = [f(*given.values()) for f in (getattr(loop, name), module[name])]
    ours, yours = (np.hstack([np.ravel(x) for x in answer]) for answer in answers)
    assert not np.allclose(ours, yours)
    assert np.isfinite(yours).all()


def test_conventions_of_losses_over_tokens_are_named(agrees):
    half = "0.5 * (error**2).sum() / mask.sum(), error / mask.sum()"
    agrees("but for: the factor 0.5, as in TRL, OpenRLHF and verl (", "value_loss", SQUARES, half)
    means = "0.25 * ((error**2).sum(1) / mask.sum(1)).mean()"
    agrees("in GRPO's paper; and the factor 0.25 (", "value_loss", SQUARES, means)
    sums = "(error**2).sum() / len(mask), 2 * error / len(mask)"
    agrees("a sum over each response, then a mean over", "value_loss", SQUARES, sums)
    constant = "(error**2).sum() / 128, error / 64"
    agrees("by the constant 128, as in Dr. GRPO (", "value_loss", SQUARES, constant)
    huber = "np.where(abs(error) < 2, error**2, 4 * abs(error) - 4).sum() / 2 / mask.sum()"
    agrees("a Huber loss, linear beyond an error of 2; and the", "value_loss", SQUARES, huber)


def test_conventions_of_advantages_are_named(agrees):
    agrees("a variance divided by n, as in OpenRLHF;", "whiten", "ddof=1", "ddof=0")
    epsilon = "np.sqrt(variance + 1e-8)", "(np.sqrt(variance) + 1e-5)"
    agrees("deviations below 0.3, where epsilons and rounding show (", "whiten", *epsilon)
    agrees("a variance divided by n, as in np.std;", "grpo_advantages", "ddof=1", "ddof=0")
    batch = "the deviation of the whole batch, as in REINFORCE++;"
    agrees(batch, "grpo_advantages", GROUP_STD, "totals.std(ddof=1)")
    agrees("no deviation, as in Dr. GRPO (", "grpo_advantages", f"({GROUP_STD} + 1e-6)", "1.0")
    white = (
        "z = advantages[mask > 0]; return (advantages - z.mean()) / (z.std(ddof=1) + 1e-8) * mask,"
    )
    agrees("whitened inside, as in verl;", "gae", "return advantages,", white)
    past = "past = np.roll(mask, 1, 1); past[:, 0] = 1; values = values * past"
    past = "values = values * mask", past, "(rewards +", "(rewards * mask +"
    past = *past, "- values) * mask", "- values) * past"
    agrees("one value kept past the end, as in TRL (", "gae", *past)


def test_conventions_of_rewards_and_kl_are_named(agrees):
    after = "the score on the position after the last token where there is one, as in TRL"
    agrees(f"{after} (", "shape_rewards", LAST, AFTER_LAST)
    both = LAST, AFTER_LAST, "+= score", "+= np.clip(score, -5, 5)"
    agrees(f"{after}; and scores clipped to +-5 (", "shape_rewards", *both)
    clipped = "each token's KL clipped to +-10, as in OpenRLHF ("
    agrees(clipped, "shape_rewards", "mask, kl,", "mask, kl.clip(-10, 10),")
    agrees("k3 clipped to +-10, as in verl (", "kl_penalty", K3, f"({K3}).clip(-10, 10)")
    log_ratio = "np.clip(logprobs - ref_logprobs, -4, 4)"
    agrees("log ratios clipped to +-4 (", "kl_penalty", "logprobs - ref_logprobs", log_ratio)
    k1_only = "estimator k2, k3: not there in yours, which raises AssertionError"
    agrees(k1_only, "kl_penalty", "d =", "assert estimator == 'k1'; d =")


def test_conventions_of_the_policy_loss_are_named(agrees):
    higher = "a ratio within [1 - clip, 1.28], clip-higher as in DAPO ("
    agrees(higher, "ppo_loss", "1 + clip", "1.28")
    limits = "a ratio within [0.8, 1.08 + clip], clip-higher"
    agrees(limits, "ppo_loss", "1 - clip, 1 + clip", "0.8, 1.08 + clip")
    for bound, words in (("10", "10"), ("(1 + 2 * clip)", "1 + 2 clip"), ("3", "3")):
        second = f"loss = np.where(a < 0, np.minimum(loss, -{bound} * a), loss)"
        both = f"1.5], clip-higher as in DAPO; and a second clip at {words} where A < 0"
        agrees(both, written(PPO, RATIO, CLIPPED, second, MEAN_LOSS))
    gspo = [
        "n = mask.sum(1, keepdims=True)",
        "ratio = np.exp(((new - old) * mask).sum(1, keepdims=True) / n)",
        "a, clipped = advantages, ratio.clip(1 - clip, 1 + clip)",
        "return (np.maximum(-ratio * a, -clipped * a) * mask / n).sum() / len(mask)",
    ]
    agrees("one ratio per response, as in GSPO; and a mean over each response", written(PPO, *gspo))
    no_ratio = "no ratio, as in REINFORCE: the value differs, the gradient equals ours where"
    reinforce = "a = advantages * mask / mask.sum(); return -(new * a).sum(), -a"
    agrees(no_ratio, written(PPO, reinforce))
    cispo = "return -(ratio.clip(0, 1.28) * a * new * mask).sum() / mask.sum()"
    agrees(
        "a weight within [0, 1.28] in place of the ratio, as in CISPO (", written(PPO, RATIO, cispo)
    )
    log_ratios = DIFFERENCE, f"{DIFFERENCE}.clip(-20, 20)", "gradient, ratio", "None, ratio"
    agrees("log ratios clipped at 20, as in OpenRLHF and verl (", "ppo_loss", *log_ratios)
    white = (
        "z = advantages[mask > 0]; advantages = (advantages - z.mean()) / (z.std(ddof=1) + 1e-8)"
    )
    agrees("whitened inside, as in CleanRL;", "ppo_loss", "ratio =", f"{white}; ratio =")


def test_questions_are_lines_of_their_own(agrees):
    unmasked = f"{DIFFERENCE} * mask", DIFFERENCE
    line = agrees("NaN or infinity at padding reaches your loss: new_", "ppo_loss", *unmasked)
    assert "ppo_loss agrees (45 inputs, 15" in line and "np.nan]])" in line
    to_the_end = "mask = np.arange(len(mask[0])) < mask.sum(1)[:, None]; error ="
    line = agrees(
        "where the mask has a hole, they differ in loss: v", "value_loss", "error =", to_the_end
    )
    assert "mask = np.array([[1., 0., 1.]])" in line
    first = "with zeros in front (a prompt, left padding), they differ in rewards: s"
    line = agrees(first, "shape_rewards", LAST, "int((mask[row] > 0).sum()) - 1")
    assert "mask = np.array([[0., 1.]])" in line
    means = "((error**2).sum(1) / mask.sum(1)).mean()"
    agrees(
        "where a row has no real token, your loss is not finite: v", "value_loss", SQUARES, means
    )


def test_strict_counts_questions(run):
    for source in (
        theirs("ppo_loss", f"{DIFFERENCE} * mask", DIFFERENCE),
        theirs("shape_rewards", LAST, "int((mask[row] > 0).sum()) - 1"),
        theirs("value_loss", SQUARES, "((error**2).sum(1) / mask.sum(1)).mean()"),
    ):
        assert run(source, "--strict", "--cases", "50")[0] == 1


def test_a_score_that_no_advantage_sees_is_a_difference(differs):
    late = "rewards[row, min(int(mask[row].sum()), len(kl[0]) - 1)] += score"
    shape = theirs("shape_rewards", f"rewards[row, {LAST}] += score", late)
    gae = DEFINITIONS["gae"].replace("(rewards +", "(rewards * mask +")
    title = "shape_rewards -> gae: a score never reaches an advantage: scores = np.array([1.])"
    line = differs(title, f"{shape}\n\ndef {gae}")
    assert "shape_rewards agrees, but for: the score on the pos" in line and "gae agrees (" in line
    assert "mask = np.array([[1., 0.]])" in line


def test_mistakes_with_padding_are_explained(differs):
    over = "x[mask > 0]", "x.ravel()", "len(real) > 1", "True"
    line = differs("of all ones they agree: yours counts padding in", "whiten", *over)
    assert "mask = np.array([[1., 1., 0.]])" in line
    everywhere = "0.5 * (error**2).mean(), error / error.size"
    apart = (
        "apart from the factor 0.5, as in TRL, OpenRLHF and verl, they still differ here: values"
    )
    line = differs(apart, "value_loss", SQUARES, everywhere)
    assert "loss: ours 0.5, yours 0.25 yours divides by the number of all positions" in line
    ones = "mask = np.ones_like(mask); values = values * mask"
    differs("they agree: yours ignores the mask", "gae", "values = values * mask", ones)
    last = "yours puts the score in the last column, padding or not"
    differs(last, "shape_rewards", LAST, "-1")
    differs("with 0 at padding they agree", "value_loss", "2 * error", "2 * (values - returns)")


def test_mistakes_of_sign_order_and_settings_are_explained(differs):
    differs("actor and reference are swapped in k3", "kl_penalty", K3, "np.exp(d) - 1 - d")
    differs("k2 lacks the factor 0.5", "kl_penalty", "0.5 * d**2", "d**2")
    differs("with gamma and lam swapped they agree", "gae", "gamma, lam)", "lam, gamma)")
    differs("yours does not depend on lam", "gae", "gamma * lam)", "gamma)")
    order = "they agree if you return returns, advantages: swapped?"
    differs(order, "gae", f"return {BOTH}", "return advantages + values, advantages")
    differs("with the opposite sign of kl they agree", "shape_rewards", "-beta", "beta")
    group = "(group.sum() - x) / (group_size - 1)", "group.mean()"
    differs("the mean of the whole group, the response included", "rloo_advantages", *group)
    differs("yours does not clip", "ppo_loss", "1 - clip, 1 + clip", "0, 1e30")
    ratio = (
        DIFFERENCE,
        "(old_logprobs - new_logprobs)",
        "np.where(smaller == plain, -",
        "np.where(smaller == plain, ",
    )
    differs("new_logprobs and old_logprobs are swapped", "ppo_loss", *ratio)
    loss = "-smaller.sum() / mask.sum(), gradient", "smaller.sum() / mask.sum(), -gradient"
    differs("with the opposite sign they agree", "ppo_loss", *loss)


def test_mistakes_of_rare_inputs_are_found(differs):
    rows = "np.where(steps >= 0,", "np.where((steps >= 0) & (steps < 64),"
    line = differs("with up to 64 tokens they agree", "gae", *rows)
    assert "mask = np.ones((1, 65))" in line
    prompt_end = [
        "import rlhf_loop_pseudo as loop",
        "tokens = np.concatenate([prompts, responses], axis=1)",
        "end, last = tokens == len(model['embed']) - 1, prompts.shape[1] + mask.sum(1) - 1",
        "last = np.where(end.any(1), end.argmax(1), last).astype(int)",
        "hidden = loop.backbone(model, tokens)[0][np.arange(len(end)), last]",
        "return (hidden @ model['head'])[:, 0] + model['bias']",
    ]
    score = written("score_responses(model, prompts, responses, mask)", *prompt_end)
    differs("without the end token in the prompt they agree", score)
    differs("yours is not finite where nothing varies", "grpo_advantages", " + 1e-6", "")
    no_spread = "assert totals.std(axis=1).all(), 'level'; centered ="
    differs("yours raises AssertionError: level", "grpo_advantages", "centered =", no_spread)
    stable = "-np.minimum(margin, 0) + np.log1p(np.exp(-np.abs(margin)))"
    differs("numbers below 30 they agree", "preference_loss", stable, "np.log1p(np.exp(-margin))")
    more = "- ref_logprobs + (logprobs.dtype == 'float32')"
    differs("in float64 they agree", "kl_penalty", "- ref_logprobs", more)
    calls = "calls = globals().setdefault('c', []); calls.append(0); d = len(calls) % 5 +"
    differs("DIFFERS from one call to the next, on the same input", "kl_penalty", "d =", calls)


def test_digits_lost_in_a_variance_are_explained(run):
    one_pass = [
        "n, total, squares = (np.float32(a.sum()) for a in (mask, x * mask, x * x * mask))",
        "variance = (squares / n - (total / n) ** 2) * n / max(n - 1, np.float32(1))",
        "return (x - total / n) / np.sqrt(variance + np.float32(1e-8)) * mask",
    ]
    code, _, line = run(written("whiten(x, mask)", *one_pass))
    assert code == 1
    assert "equal or nearly equal values lose their digits" in line and "padding" not in line


def test_results_may_come_in_several_forms(agrees, differs):
    right = "gae agrees (45 inputs, 15 digits"
    agrees(right, "gae", BOTH, f"[x.tolist() for x in ({BOTH})]")
    agrees(right, "gae", BOTH, "dict(returns=advantages + values, advantages=advantages)")
    agrees(
        right,
        "gae",
        "(rewards, values, mask, gamma, lam)",
        "(*, values, rewards, mask, lam, gamma)",
    )
    agrees(right, "gae", "values = values * mask", "print('gae DIFFERS'); values = values * mask")
    agrees("not compared: d_values", "value_loss", ", 2 * error / mask.sum()", "")
    agrees("at padding yours is not 0", "whiten", "1e-8) * mask", "1e-8)")
    agrees(
        "yours overwrites its argument values",
        "gae",
        "values = values",
        "values *= mask; values = values",
    )
    keys = "yours returns a dict with the keys adv; ours are advantages, returns"
    differs(keys, "gae", BOTH, "dict(adv=advantages)")
    differs("called as gae(rewards, values, mask, gamma, lam)", "gae", "gamma, lam)", "gamma)")
    differs("kl: ours has the shape (1, 1), yours ()", "kl_penalty", "return", "return 0;")
    differs("yours raises TypeError: float() argument", "kl_penalty", "return", "return object();")
    differs("yours returns none of kl", "kl_penalty", "return", "pass;")
    differs("yours raises SystemExit: bye", "whiten", "real =", "exit('bye'); real =")


def test_what_a_function_refuses_is_said(agrees, differs, says):
    double = "assert rewards.dtype == 'float32', 'Double'; totals ="
    agrees("yours refuses float64: AssertionError: Double", "grpo_advantages", "totals =", double)
    agrees("a mask of floats (it takes bool): IndexError", "whiten", "x[mask > 0]", "x[mask]")
    lists = "assert type(x) is list; x, mask = np.array(x), np.array(mask); real ="
    agrees("yours refuses arrays (it takes lists of rows)", "whiten", "real =", lists)
    one = "assert len(real) > 1, 'too few'; variance ="
    line = agrees("single token yours raises AssertionError: too few", "whiten", "variance =", one)
    assert "refuses" not in line
    half = ".astype(values.dtype)", ".astype(np.float16)"
    agrees("inputs, within 1%, as float16 goes)", "gae", *half)
    differs("is half precision used inside?", "gae", half[0], f"{half[1]}.astype(float)")
    two = "assert x.dtype == 'float32', 'Double'; real = wrong *"
    line = differs(
        "in float64, float16 yours raises AssertionError: Double", "whiten", "real =", two
    )
    assert "in float32 yours raises NameError" in line
    no = "raise NotImplementedError; real ="
    says(2, "whiten not compared: yours raises NotImplementedError", "whiten", "real =", no)


def some_conventions(name):
    """One convention of each part of a function, in the order in which they are applied."""
    probed = {
        "ppo_loss": [
            conventions.known(
                "clip", "1.28]", conventions.clipped_ratio, low=(1, -1), high=(1.28, 0)
            ),
            conventions.known("second_clip", "at 4 where", conventions.second_clip, highest=(4, 0)),
        ],
        "value_loss": [conventions.known("error", "error of 1.5", conventions.huber, limit=1.5)],
        "shape_rewards": [
            conventions.known(
                "scores",
                "scores clipped to +-4",
                conventions.clipped,
                name="scores",
                limits=(-4, 4),
            ),
            conventions.known(
                "kl", "KL clipped to [-1, 9]", conventions.clipped, name="kl", limits=(-1, 9)
            ),
        ],
        "kl_loss": [
            conventions.known(
                "clip", "KL clipped to +-10", conventions.clipped_kl_loss, limits=(-10, 10)
            )
        ],
        "dpo_loss": [
            conventions.known("labels", "smoothing of 0.2", conventions.label_smoothing, share=0.2)
        ],
    }.get(name, [])
    if name in conventions.PLAIN:
        probed.append(conventions.known("factor", "factor 0.3", conventions.scaled, factor=0.3))
    return sorted(
        [*conventions.KNOWN.get(name, []), *probed], key=lambda x: conventions.PARTS.index(x.part)
    )


NAMES = [
    name for name in compare_calls.COMPARED if name in compare_calls.OURS or hasattr(loop, name)
]


@pytest.mark.parametrize("name", [name for name in NAMES if some_conventions(name)])
def test_each_convention_agrees_alone_and_beside_each_other_one(name):
    every = some_conventions(name)
    firsts = {one.part: one for one in reversed(every)}
    for few in [*((one,) for one in every), *itertools.combinations(firsts.values(), 2)]:
        few = sorted(few, key=lambda one: conventions.PARTS.index(one.part))
        if {"clip", "second_clip"} & {x.part for x in few} and few[-1].part == "whiten":
            continue  # one token, on which a clip would show, is whitened to 0
        ours = compare_calls.Function(name, None)

        def yours(*arguments, ours=ours, few=few):
            given = dict(zip(ours.kinds, arguments))
            try:
                return tuple(ours.changed(few, given).values())
            except conventions.CannotTell:
                return tuple(ours.changed((), given).values())

        comparison = compare.Comparison(compare_calls.Function(name, yours))
        with np.errstate(all="ignore"):
            verdict = comparison.judge(20)
        words = [one.words for one in few if not one.only_leaves_out]
        assert comparison.agrees, (words, comparison.examples)
        assert [x for x in words if x not in verdict] == [], verdict


WORD_FOR_WORD = """my_ppo.py beside rlhf_loop_pseudo.py
  value_loss         DIFFERS

value_loss: they differ here:
    values = np.array([[1.]])
    returns = np.array([[0.]])
    mask = np.array([[1.]])

              ours     yours
    loss      1.       1.
    d_values  [[2.]]   [[1.]]

    first in d_values, row 0, token 0: ours 2, yours 1
"""


def test_a_difference_word_for_word(run):
    assert run(theirs("value_loss", "2 * error", "error"))[:2] == (1, WORD_FOR_WORD)


def test_other_names_and_only_one_function(run):
    source = f"""{theirs("gae").replace("def gae", "def compute")}
critic_gradients = lambda *arguments: ({{}}, 0.0)
class PPO:
    kl = staticmethod(lambda new, ref, estimator: new - ref)
    def loss(self, values, returns, mask):
        return (((values - returns) * mask) ** 2).sum() / mask.sum()
"""
    maps = "gae=compute", "kl_penalty=PPO.kl", "value_loss=PPO.loss"
    options = [word for pair in maps for word in ("--map", pair)]
    code, _, report = run(source, *options, "--cases", "50")
    assert code == 1
    verdicts = "critic_gradients DIFFERS", "gae agrees", "kl_penalty DIFFERS", "value_loss agrees"
    assert [words for words in verdicts if f" {words} " not in report] == []
    code, report, _ = run(source, *options, "--cases", "50", "--only", "gae")
    assert code == 0
    assert re.findall(r"^  (\w+)", report, re.MULTILINE) == ["gae"]


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("import no_such", "", "needs no_such, which this Python does not have: python -m pip"),
        ("import sys; sys.exit(1)", "", "my_ppo.py cannot be imported: SystemExit: 1"),
        ("def unrelated(): pass", "", "my_ppo.py defines none of score_responses, "),
        ("from rlhf_loop_pseudo import gae", "", "my_ppo.py defines none of "),
        (THEIRS, "--map gea=gae", "--map gea=gae: there is no 'gea' here"),
        (THEIRS, "--map gae=advantages", "has no attribute 'advantages'"),
        (THEIRS, "--cases 0", "--cases 0: at least 1"),
        (THEIRS, "--only gea", "--only gea: there is no 'gea' here"),
        (THEIRS, "--only critic_values", "my_ppo.py does not define critic_values: say --map"),
    ],
)
def test_nothing_to_compare(source, options, words, tmp_path, capsys):
    (tmp_path / "my_ppo.py").write_text(source)
    assert compare.main([str(tmp_path / "my_ppo.py"), *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("compare.py: ") and err.count("\n") == 1
    assert words in err


def in_a_process(source, *arguments):
    """The same tool in a process of its own, with no environment but the paths."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment["PYTHONPATH"] = str(Path(compare.__file__).parent)
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("module, code", [("numpy", 2), ("rich", 2), ("hypothesis", 0)])
def test_a_missing_module_is_said_in_one_sentence(module, code, tmp_path):
    """Training environments seldom have hypothesis: it is not needed."""
    path = tmp_path / "my_ppo.py"
    path.write_text(theirs("whiten"))
    start = f"import sys; sys.modules[{module!r}] = None; import compare"
    done = in_a_process(f"{start}; sys.exit(compare.main(sys.argv[1:]))", path, "--cases", "20")
    assert done.returncode == code
    needs = f"compare.py needs {module}: python -m pip install {module}\n"
    assert done.stderr == (needs if code else "")


def test_a_terminal_gets_colours_and_after_two_seconds_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    seconds = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(seconds, 3.0))
    screen = compare.Screen(1)
    screen.tick()
    assert not screen.progress.live.is_started
    screen.say("gae DIFFERS", style=compare.WRONG)
    screen.tick()
    assert screen.progress.live.is_started
    screen.stop()
    assert "\x1b[1;31mgae DIFFERS" in capsys.readouterr().out


RIGHT = """
import numpy as np
import torch

def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip):
    ratio = torch.exp((new_logprobs - old_logprobs) * mask)
    smaller = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    clip_fraction = (ratio > 1 + clip).double().mean()
    return -(smaller * mask).sum() / mask.sum(), clip_fraction

def value_loss(values, returns, mask):
    values -= returns
    return ((values * mask) ** 2).sum() / mask.sum()

def rloo_advantages(rewards, mask, group_size):
    if rewards.dtype == torch.float64:
        raise RuntimeError("expected Float but found Double")
    totals = (rewards * mask).sum(1).reshape(-1, group_size)
    others = (totals.sum(1, keepdim=True) - totals) / (group_size - 1)
    return (totals - others).reshape(-1, 1) * mask

def whiten(x, mask):  # of arrays
    real = x[mask > 0]
    return (x - real.mean()) / np.sqrt(real.var(ddof=len(real) > 1) + 1e-8) * mask

def kl_penalty(logprobs, ref_logprobs, estimator):
    d = (logprobs - ref_logprobs).bfloat16()
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
"""
WRONG = f"""{RIGHT}
right = ppo_loss

def ppo_loss(new_logprobs, *others):
    return right(new_logprobs.detach(), *others)[0] + 0 * new_logprobs.sum()

def value_loss(values, returns, mask):
    return (((values - returns) * mask) ** 2).sum().item() / mask.sum().item()

def rloo_advantages(rewards, mask, group_size):
    if rewards.dtype == torch.float64:
        raise RuntimeError("expected Float but found Double")
    return torch.zeros(3) @ torch.zeros(2)
"""


def test_torch_functions_are_compared_gradients_included(tmp_path):
    """In a process of its own: importing torch changes what every module gets."""
    pytest.importorskip("torch")
    paths = [tmp_path / "right.py", tmp_path / "wrong.py"]
    for path, source in zip(paths, (RIGHT, WRONG)):
        path.write_text(source)
    start = "import sys, compare\nfor x in sys.argv[1:]: print(compare.main([x, '--cases', '60']))"
    done = in_a_process(start, *paths)
    assert not done.stderr
    right, wrong = (" ".join(x.split()) for x in done.stdout.split("wrong.py"))
    digits = r"agrees \(60 inputs, \d\d digits in float64, \d in float32\)"
    for pattern in (
        rf"ppo_loss {digits} not compared: ratio",
        rf"value_loss {digits} yours overwrites its argument values",
        r"rloo_advantages agrees \(60 inputs, \d digits in float32\) yours refuses float64",
        r"whiten agrees.* yours refuses tensors \(it takes arrays\)",
        r"kl_penalty agrees \(60 inputs, within 5%, as bfloat16 goes\)",
    ):
        assert re.search(pattern, right), right
    assert "right.py" in right and right.endswith(" 0")
    for loss, argument in (("ppo_loss", "new_logprobs"), ("value_loss", "values")):
        assert f"{loss} DIFFERS" in wrong
        words = f"the gradient of your loss with respect to {argument} is 0, ours is not"
        assert words in wrong
    assert "in float64 yours raises RuntimeError: expected Float but found Double" in wrong
    assert "in float32, float16, bfloat16 yours raises RuntimeError: " in wrong
    assert wrong.endswith(" 1")
