"""The conventions that compare.py knows: what trainers do otherwise than rlhf_loop_pseudo.py.

Each is our function with one thing changed: from arguments by name to results by name, or to None
where it cannot tell. As it calls the next one inside, ours, two can be combined.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np

LITTLE = 0.3  # a deviation beside which every usual epsilon is small


class Convention(NamedTuple):
    words: str
    change: partial


def whitened(ours, given, ddof):
    """x, or the advantages that gae returns, with a variance of 1."""
    mask, results = given["mask"], {"whitened": given["x"]} if "x" in given else ours(given)
    name, x = next(iter(results.items())) if results else ("", np.zeros(mask.shape))
    deviation = x[mask > 0].std(ddof=ddof) if mask.sum() > ddof else 0
    if deviation < LITTLE:
        return None
    return results | {name: np.where(mask, x - x[mask > 0].mean(), 0) / deviation}


def grouped(ours, given, ddof):
    """GRPO; without the deviation where ddof is None."""
    totals = np.where(given["mask"], given["rewards"], 0).sum(axis=1)
    totals = totals.reshape(-1, given["group_size"])
    deviation = np.ones(1) if ddof is None else totals.std(axis=1, keepdims=True, ddof=ddof)
    if deviation.min() < LITTLE:
        return None
    advantages = (totals - totals.mean(axis=1, keepdims=True)) / deviation
    return {"advantages": np.where(given["mask"], advantages.reshape(-1, 1), 0)}


def one_past_the_end(ours, given, reward):
    mask = given["mask"]
    longer = np.maximum(mask, np.pad(mask, ((0, 0), (1, 0)))[:, :-1])
    rewards = np.where(longer if reward else mask, given["rewards"], 0)
    results = ours(given | {"mask": longer, "rewards": rewards})
    return results and {name: np.where(mask, x, 0) for name, x in results.items()}


def score_after_end(ours, given, kl_at_padding):
    mask, kl = given["mask"], given["kl"]
    rewards = -given["beta"] * (kl if kl_at_padding else np.where(mask, kl, 0))
    after = mask.shape[1] - (mask[:, ::-1] > 0).argmax(axis=1)
    rewards[np.arange(len(mask)), after.clip(None, mask.shape[1] - 1)] += given["scores"]
    return {"rewards": rewards}


def clipped(ours, given, limits, name, center=None):
    """An argument within limits, around another one if there is a center."""
    low, high = (given.get(center, 0) + limit for limit in limits)
    return ours(given | {name: given[name].clip(low, high)})


def clipped_kl(ours, given, limits, estimators=("k1", "k2", "k3")):
    kl = ours(given)["kl"]
    return {"kl": kl.clip(*limits) if given["estimator"] in estimators else kl}


def clipped_log_ratio(ours, given, limits=(-math.inf, math.inf), highest=math.inf):
    """The log ratio within limits, and where A < 0 a loss of at most highest * -A."""
    log_ratio = np.where(given["mask"], given["new_logprobs"] - given["old_logprobs"], 0)
    inside = log_ratio.clip(*limits)
    used = np.where(given["advantages"] < 0, inside.clip(None, math.log(highest)), inside)
    results = ours(given | {"new_logprobs": used, "old_logprobs": 0 * used})
    d_loss = np.where(used == log_ratio, results["d_new_logprobs"], 0)
    return results | {"d_new_logprobs": d_loss, "ratio": np.exp(inside) * (given["mask"] > 0)}


def scaled(ours, given, factor):
    """The loss and its gradients times a factor; the ratio stays."""
    return {name: x if name == "ratio" else x * factor for name, x in ours(given).items()}


def per_response(ours, given, total):
    """The mean (or total) over the tokens of each response, then the mean over responses."""
    masks = given["mask"] * np.eye(len(given["mask"]))[..., None]  # of one response each
    masks = masks[masks.any(axis=(1, 2))]
    weights = masks.sum(axis=(1, 2)) if total else np.ones(len(masks))
    answers = [scaled(ours, given | {"mask": x}, w / len(masks)) for x, w in zip(masks, weights)]
    return {name: sum(answer[name] for answer in answers) for name in answers[0]}


def without_mask(ours, given):
    mask = given["mask"]
    results = ours(given | {"mask": np.ones_like(mask)})
    by_token = [x for x in results or () if np.ndim(results[x]) == 2 and "[" not in x]
    return results and results | {x: results[x] * (mask > 0) for x in by_token}


def reordered(ours, given, order):
    results = ours(given)
    return results and dict(zip(results, (results[name] for name in order)))


def probe(x, estimator):
    """Arguments by name for one row of one token: a score and a log ratio far out at x."""
    one, new, old = np.array([[[1.0]], [[min(x, 0)]], [[min(-x, 0)]]])
    given = {"scores": x * one[0], "kl": 0 * one, "mask": one, "beta": 1.0, "clip": 0.2}
    given |= {"logprobs": new, "ref_logprobs": old, "estimator": estimator}
    return given | {"new_logprobs": new, "old_logprobs": old, "advantages": -np.sign(x) * one}


PAST = "one value kept past the end"
AFTER = "the score on the position after the last token where there is one, as in TRL"
INSIDE = "advantages whitened inside, as in verl"
WITHIN = "log ratios within +-20, as in OpenRLHF and verl"
LEFT_OUT = f"deviations below {LITTLE} are left out"
SMALL = f"deviations below {LITTLE}, where epsilons and rounding show"
BY_N = f"a variance divided by n, as in {{}}; {LEFT_OUT}"
MEANS = "a mean over each response, then over responses, as in GRPO's paper"
TOTALS = "a sum over each response, then a mean over responses"
PER_RESPONSE = [(MEANS, per_response, {"total": False}), (TOTALS, per_response, {"total": True})]
KNOWN = {  # the words, the change and what it needs; in a pair the first is inside the second
    "shape_rewards": [
        (AFTER, score_after_end, {"kl_at_padding": False}),
        (f"{AFTER}, and KL at padding", score_after_end, {"kl_at_padding": True}),
    ],
    "gae": [
        (f"{PAST}, as in TRL", one_past_the_end, {"reward": False}),
        (f"{PAST}, and its reward, as in TRL", one_past_the_end, {"reward": True}),
        (f"{INSIDE}; {LEFT_OUT}", whitened, {"ddof": 1}),
        (f"{INSIDE}, with a variance divided by n; {LEFT_OUT}", whitened, {"ddof": 0}),
    ],
    "grpo_advantages": [
        (SMALL, grouped, {"ddof": 1}),
        (BY_N.format("np.std"), grouped, {"ddof": 0}),
        ("the mean without the deviation, as in Dr. GRPO", grouped, {"ddof": None}),
    ],
    "whiten": [(SMALL, whitened, {"ddof": 1}), (BY_N.format("OpenRLHF"), whitened, {"ddof": 0})],
    "ppo_loss": [
        ("a second clip at 3 where A < 0, as in verl", clipped_log_ratio, {"highest": 3}),
        (WITHIN, clipped_log_ratio, {"limits": (-20, 20)}),
        *PER_RESPONSE,
    ],
    "value_loss": PER_RESPONSE,
    "clipped_value_loss": PER_RESPONSE,
}
CLIPS = {  # what is clipped, the estimator to ask for, the change, who has +-10
    "shape_rewards": [("scores", None, partial(clipped, name="scores"), "OpenRLHF")],
    "kl_penalty": [
        ("k3", "k3", partial(clipped_kl, estimators=["k3"]), "verl"),
        ("estimates", "k1", clipped_kl, "OpenRLHF"),
        ("log ratios", "k1", partial(clipped, name="logprobs", center="ref_logprobs"), ""),
    ],
    "ppo_loss": [("log ratios", None, clipped_log_ratio, "")],
}
ALL_POSITIONS = "yours divides by the number of all positions, padding included"
MISTAKES = [  # no conventions; said where one explains all differences
    ({"mask"}, "with a mask of all ones they agree: yours ignores the mask", without_mask),
    ({"mask", "loss"}, ALL_POSITIONS, lambda ours, x: scaled(ours, x, (x["mask"] > 0).mean())),
]
