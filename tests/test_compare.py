"""The tool that lays a reader's own PPO beside ours: it passes what is right and finds the bugs."""

import itertools
import os
import re
import subprocess
import sys
import textwrap
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
# Parts of the functions above that are replaced several times
LAST = "np.flatnonzero(mask[row])[-1]"
AFTER_LAST = "min(np.flatnonzero(mask[row])[-1] + 1, len(mask[0]) - 1)"
GRADIENT_TOO = "gradient, ratio * mask"


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


PPO = "ppo_loss(new, old, advantages, mask, clip)"
RATIO = "ratio = np.exp(np.where(mask, new - old, 0)); a = np.where(mask, advantages, 0)"
GAE = "gae(rewards, values, mask, gamma, lam)"
KL = "kl_penalty(new, ref, estimator)"


@pytest.fixture
def run(tmp_path, capsys):
    """Compare a module with this source. Returns the exit code, the report, and it in one line."""

    def compared(source, *options):
        path = tmp_path / "my_ppo.py"
        path.write_text(source)
        code = compare.main([str(path), *options])
        report = capsys.readouterr().out
        assert max(map(len, report.splitlines()), default=0) <= 80
        return code, report, " ".join(report.split())

    return compared


def smallest_input(report):
    """The arguments in a report, by name: they can be pasted."""
    source = textwrap.dedent("".join(re.findall(r"^    \w+ = .*\n(?:     .*\n)*", report, re.M)))
    exec(source, given := {"np": np})
    return {name: x for name, x in given.items() if name not in ("np", "__builtins__")}


def test_another_right_ppo_agrees(run):
    code, report, _ = run(THEIRS, "--cases", "60")
    assert code == 0
    digits = r"\d\d digits in float64, \d in float32"
    agreeing = re.findall(rf"^  (\w+) +agrees \(60 inputs, {digits}\)$", report, re.M)
    assert {*agreeing} == {*DEFINITIONS}


def test_our_own_functions_agree_and_no_question_remains(run):
    source = Path(loop.__file__).read_text(encoding="utf-8")
    public = set(re.findall(r"^ *# ANCHOR: (\w+)$", source, re.MULTILINE))
    ours = public & set(compare_calls.COMPARED)
    code, _, report = run(source, "--cases", "30", "--strict")
    assert code == 0
    assert report.count(" agrees (30 inputs, 15 digits in") == len(ours)
    assert "where" not in report and "NaN" not in report


@pytest.mark.parametrize(
    "name, source, size",
    [
        ("token_logprobs", theirs("token_logprobs", "1] - 1 : -1", "1] :"), 1),
        ("ppo_loss", theirs("ppo_loss", "ratio = ", "mask = np.roll(mask, -1, 1); ratio = "), 2),
        ("gae", theirs("gae", "values = values * mask", "pass"), 2),
        ("gae", theirs("gae", "- values) * mask", "- values)"), 2),
        (
            "value_loss",
            theirs("value_loss", "(error**2).sum() / mask.sum()", "(error**2).mean()"),
            2,
        ),
        ("ppo_loss", theirs("ppo_loss", "1 - clip, 1 + clip", "1 + clip, 1 - clip"), 1),
        ("ppo_loss", theirs("ppo_loss", "np.minimum(plain", "np.maximum(plain"), 1),
        ("kl_penalty", theirs("kl_penalty", "logprobs - ref_", "ref_logprobs - "), 1),
        ("whiten", theirs("whiten", "x[mask > 0]", "x.ravel()"), 3),
        ("shape_rewards", theirs("shape_rewards", LAST, "-1"), 2),
    ],
)
def test_a_classic_bug_is_found_and_made_small(name, source, size, run):
    code, report, _ = run(source, "--cases", "80")
    assert code == 1
    assert re.search(rf"^  {name:<18} DIFFERS$", report, re.MULTILINE)
    given = smallest_input(report)
    assert {len(x) for x in given.values() if isinstance(x, np.ndarray)} == {1}
    assert given.get("mask", np.ones(1)).size <= size
    exec(source, module := {})
    with np.errstate(all="ignore"):
        answers = [f(*given.values()) for f in (getattr(loop, name), module[name])]
    ours, yours = (np.hstack([np.ravel(x) for x in answer]) for answer in answers)
    assert not np.allclose(ours, yours)
    assert np.isfinite(yours).all()


SQUARES = "(error**2).sum() / mask.sum(), 2 * error / mask.sum()"
SHARES = "share = mask / mask.sum(axis=1, keepdims=True) / len(mask); error ="
WHITE = "z = advantages[mask > 0]; return (advantages - z.mean()) / (z.std(ddof={}) + 1e-8) * mask,"
PAST = "past = np.roll(mask, 1, 1); past[:, 0] = 1; "
K = "np.exp(-d) - 1 + d"
GROUP_STD = "totals.std(axis=1, ddof=1, keepdims=True)"


@pytest.mark.parametrize(
    "words, source",
    [
        (
            "the factor 0.5, as in TRL, OpenRLHF and verl (",
            theirs(
                "value_loss", SQUARES, "0.5 * (error**2).sum() / mask.sum(), error / mask.sum()"
            ),
        ),
        (
            "a mean over each response, then over responses, as in GRPO's paper; and the factor 0.25 (",
            theirs(
                "value_loss",
                SQUARES,
                "0.25 * (error**2 * share).sum(), 0.5 * error * share",
                "error =",
                SHARES,
            ),
        ),
        (
            "a sum over each response, then a mean over responses (",
            theirs("value_loss", SQUARES, "(error**2).sum() / len(mask), 2 * error / len(mask)"),
        ),
        (
            "a sum over all tokens; and a division by the constant 128, as in Dr. GRPO (",
            theirs("value_loss", SQUARES, "(error**2).sum() / 128, error / 64"),
        ),
        (
            "a Huber loss, linear beyond an error of 2; and the factor 0.5, as",
            written(
                "value_loss(values, returns, mask)",
                "e = abs(values - returns) * mask",
                "return np.where(e < 2, e**2 / 2, 2 * e - 2).sum() / mask.sum()",
            ),
        ),
        ("a variance divided by n, as in OpenRLHF;", theirs("whiten", "ddof=1", "ddof=0")),
        (
            "deviations below 0.3, where epsilons and rounding show (",
            theirs("whiten", "np.sqrt(variance + 1e-8)", "(np.sqrt(variance) + 1e-5)"),
        ),
        ("a variance divided by n, as in np.std;", theirs("grpo_advantages", "ddof=1", "ddof=0")),
        (
            "no deviation, as in Dr. GRPO (",
            theirs("grpo_advantages", f"({GROUP_STD} + 1e-6)", "1.0"),
        ),
        (
            "the deviation of the whole batch, as in REINFORCE++;",
            theirs("grpo_advantages", GROUP_STD, "totals.std(ddof=1)"),
        ),
        (
            "whitened inside, as in verl;",
            theirs("gae", "return advantages,", WHITE.format(1)),
        ),
        (
            "one value kept past the end, as in TRL (",
            theirs(
                "gae",
                "values = values * mask",
                f"{PAST} values = values * past",
                "(rewards +",
                "(rewards * mask +",
                "- values) * mask",
                "- values) * past",
            ),
        ),
        (
            "returns are the rewards still to come (",
            written(
                GAE,
                "advantages, returns = np.zeros((2, *mask.shape))",
                "a = r = v = 0",
                "for t in reversed(range(mask.shape[1])):",
                "    m = mask[:, t]",
                "    a = (rewards[:, t] + gamma * v - values[:, t] + gamma * lam * a) * m",
                "    r, v = (rewards[:, t] + gamma * r) * m, values[:, t] * m",
                "    advantages[:, t], returns[:, t] = a, r",
                "return advantages, returns",
            ),
        ),
        (
            "the score on the position after the last token where there is one, as in TRL (",
            theirs("shape_rewards", LAST, AFTER_LAST),
        ),
        (
            "there is one, as in TRL; and scores clipped to +-5 (",
            theirs("shape_rewards", LAST, AFTER_LAST, "+= score", "+= np.clip(score, -5, 5)"),
        ),
        (
            "each token's KL clipped to +-10, as in OpenRLHF (",
            theirs("shape_rewards", "mask, kl,", "mask, kl.clip(-10, 10),"),
        ),
        ("k3 clipped to +-10, as in verl (", theirs("kl_penalty", K, f"({K}).clip(-10, 10)")),
        (
            "log ratios clipped to +-4 (",
            theirs(
                "kl_penalty", "logprobs - ref_logprobs", "np.clip(logprobs - ref_logprobs, -4, 4)"
            ),
        ),
        (
            "a ratio within [1 - clip, 1.28], clip-higher as in DAPO (",
            theirs("ppo_loss", "1 + clip", "1.28"),
        ),
        (
            "a ratio within [0.8, 0.08 + clip + 1], clip-higher".replace(
                "0.08 + clip + 1", "1.08 + clip"
            ),
            theirs("ppo_loss", "1 - clip, 1 + clip", "0.8, 1.08 + clip"),
        ),
        (
            "a second clip at 3 where A < 0, as in verl (",
            written(
                PPO,
                RATIO,
                "loss = np.maximum(-ratio * a, -ratio.clip(1 - clip, 1 + clip) * a)",
                "loss = np.where(a < 0, np.minimum(loss, -3 * a), loss)",
                "return (loss * mask).sum() / mask.sum()",
            ),
        ),
        (
            "clip-higher as in DAPO; and a second clip at 1 + 2 clip where A < 0 (",
            written(
                PPO,
                RATIO,
                "loss = np.maximum(-ratio * a, -ratio.clip(1 - clip, 1.5) * a)",
                "loss = np.where(a < 0, np.minimum(loss, -(1 + 2 * clip) * a), loss)",
                "return (loss * mask).sum() / mask.sum()",
            ),
        ),
        (
            "log ratios clipped to +-20, as in OpenRLHF and verl (",
            theirs(
                "ppo_loss",
                "(new_logprobs - old_logprobs)",
                "(new_logprobs - old_logprobs).clip(-20, 20)",
                "gradient, ratio * mask",
                "None, ratio * mask",
            ),
        ),
        (
            "one ratio per response, as in GSPO; and a mean over each response",
            written(
                PPO,
                "n = mask.sum(1, keepdims=True)",
                "ratio = np.exp(((new - old) * mask).sum(1, keepdims=True) / n)",
                "loss = -np.minimum(ratio * advantages, ratio.clip(1 - clip, 1 + clip) * advantages)",
                "return (loss * mask / n).sum() / len(mask)",
            ),
        ),
        (
            "no ratio, as in REINFORCE: the value differs, the gradient equals ours",
            written(
                PPO,
                "return -(new * advantages * mask).sum() / mask.sum(), -advantages * mask / mask.sum()",
            ),
        ),
        (
            "a weight within [0, 1.28] in place of the ratio, as in CISPO (",
            written(
                PPO, RATIO, "return -(ratio.clip(0, 1.28) * a * new * mask).sum() / mask.sum()"
            ),
        ),
        (
            "advantages whitened inside, as in CleanRL;",
            theirs(
                "ppo_loss",
                "ratio =",
                "z = advantages[mask > 0]; "
                "advantages = (advantages - z.mean()) / (z.std(ddof=1) + 1e-8); ratio =",
            ),
        ),
        (
            "label smoothing of 0.1, as in conservative DPO (",
            written(
                "preference_loss(chosen, rejected)",
                "m = chosen - rejected",
                "return (0.9 * np.logaddexp(0, -m) + 0.1 * np.logaddexp(0, m)).mean()",
            ),
        ),
    ],
)
def test_a_known_convention_is_no_mistake_and_is_named(words, source, run):
    code, _, report = run(source, "--cases", "80")
    assert code == 0
    assert f" agrees, but for: " in report
    assert words in report


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
