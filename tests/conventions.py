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
    loose: bool = False  # it brings another epsilon


def whitened(ours, given, ddof):
    x, mask = given["x"], given["mask"]
    deviation = x[mask > 0].std(ddof=ddof) if mask.sum() > ddof else 0
    if deviation < LITTLE:
        return None
    return {"whitened": np.where(mask, x - x[mask > 0].mean(), 0) / deviation}


def whitened_inside(ours, given, ddof):
    results = ours(given)
    inner = results and whitened(None, {"x": results["advantages"], "mask": given["mask"]}, ddof)
    return inner and results | {"advantages": inner["whitened"]}


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


def clipped_scores(ours, given, limits):
    return ours(given | {"scores": given["scores"].clip(*limits)})


def clipped_kl(ours, given, limits, estimators=("k1", "k2", "k3")):
    kl = ours(given)["kl"]
    return {"kl": kl.clip(*limits) if given["estimator"] in estimators else kl}


def clipped_difference(ours, given, limits):
    difference = (given["logprobs"] - given["ref_logprobs"]).clip(*limits)
    return ours(given | {"logprobs": difference, "ref_logprobs": 0 * difference})


def clipped_log_ratio(ours, given, limits=(-math.inf, math.inf), highest=math.inf):
    """The log ratio within limits, and where A < 0 a loss of at most highest * -A."""
    log_ratio = np.where(given["mask"], given["new_logprobs"] - given["old_logprobs"], 0)
    inside = log_ratio.clip(*limits)
    used = np.where(given["advantages"] < 0, inside.clip(None, math.log(highest)), inside)
    zeros = {"old_logprobs": 0 * used}
    results = ours(given | zeros | {"new_logprobs": used})
    ratio = ours(given | zeros | {"new_logprobs": inside})["ratio"]
    d_loss = np.where(used == log_ratio, results["d_new_logprobs"], 0)
    return results | {"d_new_logprobs": d_loss, "ratio": ratio}


def scaled(ours, given, factor):
    """The loss and its gradients times a factor; the ratio stays."""
    return {name: x if name == "ratio" else x * factor for name, x in ours(given).items()}


def per_response(ours, given, total):
    """The mean (or total) over the tokens of each response, then the mean over responses."""
    answers = []
    for row in range(len(given["mask"])):
        one = {name: x[row : row + 1] if np.ndim(x) else x for name, x in given.items()}
        weight = np.count_nonzero(one["mask"]) if total else 1
        answers.append(scaled(ours, one, weight / len(given["mask"])))
    results = {name: [answer[name] for answer in answers] for name in answers[0]}
    return {name: sum(x) if name == "loss" else np.concatenate(x) for name, x in results.items()}


def without_mask(ours, given):
    mask = given["mask"]
    results = ours(given | {"mask": np.ones_like(mask)})
    return results and {x: y * (mask > 0) if y.ndim == 2 else y for x, y in results.items()}


def reordered(ours, given, order):
    results = ours(given)
    return results and dict(zip(results, (results[name] for name in order)))


def pair(x, estimator):
    """The arguments of kl_penalty for one token with a log ratio of x."""
    return [[min(x, 0)]], [[min(-x, 0)]], estimator


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
        (f"{INSIDE}; {LEFT_OUT}", whitened_inside, {"ddof": 1}),
        (f"{INSIDE}, with a variance divided by n; {LEFT_OUT}", whitened_inside, {"ddof": 0}),
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
ONLY_K3 = partial(clipped_kl, estimators=["k3"])
CLIPS = {  # what is clipped, arguments far beyond the limits, the change, who has +-10
    "shape_rewards": [("scores", lambda x: ([x], [[0]], [[1]], 1.0), clipped_scores, "OpenRLHF")],
    "kl_penalty": [
        ("k3", lambda x: pair(-1000, "k3"), ONLY_K3, "verl"),
        ("estimates", lambda x: pair(x, "k1"), clipped_kl, "OpenRLHF"),
        ("log ratios", lambda x: pair(x, "k1"), clipped_difference, ""),
    ],
    "ppo_loss": [
        ("log ratios", lambda x: (*pair(x, [[-np.sign(x)]]), [[1]], 0.2), clipped_log_ratio, ""),
    ],
}
ALL_POSITIONS = "yours divides by the number of all positions, padding included"
MISTAKES = [  # no conventions; said where one explains all differences
    ({"mask"}, "with a mask of all ones they agree: yours ignores the mask", without_mask),
    ({"mask", "loss"}, ALL_POSITIONS, lambda ours, x: scaled(ours, x, (x["mask"] > 0).mean())),
]
