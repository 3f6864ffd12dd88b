"""What compare.py knows of other people's PPO: conventions, which agree, and frequent mistakes.

Each is our function with one thing changed. A change is called with ours and the arguments by name,
and returns the results by name, or raises CannotTell. As a change calls ours, which may be changed
already, several can be combined.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from rlhf_loop_pseudo import kl_penalty

LITTLE = 0.3  # a deviation beside which every usual epsilon is small
FAR = 1000.0  # beyond every limit that anybody clips to
FAR_RATIO = 80.0  # such a log ratio; its exponential is still finite in float32
CLIP_RANGES = (0.1, 0.2, 0.4)


class CannotTell(Exception):
    """What is right here depends on an epsilon, or on rounding."""


class Convention(NamedTuple):
    words: str
    change: Callable
    part: str  # of the function, that it changes: two of one part cannot be combined
    loose: bool = False  # it brings an epsilon of its own: compare fewer digits
    only_leaves_out: bool = False  # it changes nothing, and leaves out small deviations


# Parts of a function. A change of an earlier one is applied inside those of later ones.
PARTS = "place scores kl end returns clip second_clip ratio error labels mean scale whiten factor"
PARTS = PARTS.split()

# ------------------------------------------------------------------ how ours is changed


def whitened(ours, given, ddof):
    """x, or the advantages that ours returns, with a variance of 1."""
    results = {"whitened": given["x"]} if "x" in given else ours(given)
    name = "whitened" if "x" in given else "advantages"
    return results | {name: standardized(results[name], given["mask"], ddof)}


def whitened_before(ours, given, ddof):
    """The loss of whitened advantages."""
    white = standardized(given["advantages"], given["mask"], ddof)
    return ours(given | {"advantages": white})


def standardized(x, mask, ddof):
    real = x[mask > 0]
    if len(real) <= ddof or real.std(ddof=ddof) < LITTLE:
        raise CannotTell
    return np.where(mask, x - real.mean(), 0) / real.std(ddof=ddof)


def without_one_token(ours, given):
    if np.count_nonzero(given["mask"]) == 1:
        raise CannotTell
    return ours(given)


def grouped(ours, given, of, ddof):
    """GRPO by the deviation of each group, of all totals, of all differences, or by none."""
    totals = np.where(given["mask"], given["rewards"], 0).sum(axis=1)
    totals = totals.reshape(-1, given["group_size"])
    centered = totals - totals.mean(axis=1, keepdims=True)
    if of == "groups":
        deviation = totals.std(axis=1, keepdims=True, ddof=ddof)
    else:
        deviation = {"totals": totals, "differences": centered, "nothing": None}[of]
        deviation = np.ones(1) if deviation is None else deviation.std(ddof=ddof, keepdims=True)
    if deviation.min() < LITTLE:
        raise CannotTell
    return {"advantages": np.where(given["mask"], (centered / deviation).reshape(-1, 1), 0)}


def one_past_the_end(ours, given, reward):
    mask = given["mask"]
    longer = np.maximum(mask, np.pad(mask, ((0, 0), (1, 0)))[:, :-1])
    rewards = np.where(longer if reward else mask, given["rewards"], 0)
    results = ours(given | {"mask": longer, "rewards": rewards})
    return {name: np.where(mask, x, 0) for name, x in results.items()}


def monte_carlo_returns(ours, given):
    return ours(given) | {"returns": ours(given | {"lam": 1.0})["returns"]}


def score_after_end(ours, given, kl_at_padding):
    mask, kl = given["mask"], given["kl"]
    if not mask.any(axis=1).all():
        raise ValueError("a row without a real token")  # as ours does
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


def clipped_kl_loss(ours, given, limits, estimators=("k1", "k2", "k3")):
    """The loss of clipped estimates: beyond a limit the loss is constant, and the gradient 0."""
    if given["estimator"] not in estimators:
        return ours(given)
    new, ref = given["new_logprobs"], given["ref_logprobs"]
    estimates = kl_penalty(new, ref, given["estimator"])
    clipped_ones = estimates.clip(*limits)
    beyond = (estimates != clipped_ones) & (given["mask"] > 0)
    results = ours(given | {"new_logprobs": np.where(beyond, ref, new)})
    shares = ours(given | {"estimator": "k1"})["d_new_logprobs"]  # of each token in the mean
    loss = results["loss"] + np.sum(shares * np.where(beyond, clipped_ones, 0))
    return {"loss": loss, "d_new_logprobs": np.where(beyond, 0, results["d_new_logprobs"])}


def gradient_of_k2(ours, given):
    return ours(given) | {"d_new_logprobs": ours(given | {"estimator": "k2"})["d_new_logprobs"]}


def log_ratio_of(given):
    return np.where(given["mask"], given["new_logprobs"] - given["old_logprobs"], 0)


def clipped_ratio(ours, given, low, high):
    """Each limit is (a, b), for a + b clip. Ours has one clip: one call for each sign of A."""
    clip, advantages = given["clip"], given["advantages"]
    above, below = high[0] + high[1] * clip - 1, 1 - low[0] - low[1] * clip
    gains = ours(given | {"clip": above, "advantages": np.where(advantages > 0, advantages, 0)})
    losses = ours(given | {"clip": below, "advantages": np.where(advantages > 0, 0, advantages)})
    return {n: x if n == "ratio" else x + losses[n] for n, x in gains.items()}


def second_clip(ours, given, highest):
    """Where A < 0, a ratio of at most a + b clip."""
    log_ratio = log_ratio_of(given)
    limit = math.log(highest[0] + highest[1] * given["clip"])
    used = np.where(given["advantages"] < 0, log_ratio.clip(None, limit), log_ratio)
    results = ours(given | {"new_logprobs": used, "old_logprobs": 0 * used})
    d_new = np.where(used == log_ratio, results["d_new_logprobs"], 0)
    return results | {"d_new_logprobs": d_new, "ratio": np.exp(log_ratio) * (given["mask"] > 0)}


def clipped_log_ratio(ours, given, low, high):
    log_ratio = log_ratio_of(given)
    used = log_ratio.clip(low, high)
    results = ours(given | {"new_logprobs": used, "old_logprobs": 0 * used})
    d_new = np.where(used == log_ratio, results["d_new_logprobs"], 0)
    return results | {"d_new_logprobs": d_new}


def ratio_of_response(ours, given, mean, through_others):
    """One ratio for all tokens of a response, from the mean or the sum of its log ratios."""
    mask = given["mask"] > 0
    count = mask.sum(axis=1, keepdims=True).clip(1) if mean else 1
    used = np.where(mask, log_ratio_of(given).sum(axis=1, keepdims=True) / count, 0)
    results = ours(given | {"new_logprobs": used, "old_logprobs": 0 * used})
    if not through_others:
        return results
    total = results["d_new_logprobs"].sum(axis=1, keepdims=True)
    return results | {"d_new_logprobs": np.where(mask, total / count, 0)}


def ratio_one(ours, given):
    return ours(given | {"old_logprobs": given["new_logprobs"]})


def weighted_log_probability(ours, given, low, high):
    """-A log p, times a ratio within limits that passes no gradient: CISPO; limits of 1: none."""
    low, high = (a + b * given["clip"] for a, b in (low, high))
    mask, ratio = given["mask"] > 0, np.exp(log_ratio_of(given))
    d_new = ratio_one(ours, given)["d_new_logprobs"] * ratio.clip(low, high)
    loss = np.sum(d_new * np.where(mask, given["new_logprobs"], 0))
    return {"loss": loss, "d_new_logprobs": d_new, "ratio": ratio * mask}


def huber(ours, given, limit):
    """Squared within the limit, linear with the same slope beyond it."""
    values, returns = given["values"], given["returns"]
    near = values.clip(returns - limit, returns + limit)
    results = ours(given | {"values": near})
    beyond = results["d_values"] * np.where(given["mask"], values - near, 0)
    return results | {"loss": results["loss"] + beyond.sum()}


def label_smoothing(ours, given, share):
    """A share of the pairs is taken the other way round."""
    results, names = ours(given), {name: swapped_name(name) for name in given}
    turned = ours({name: given[names[name]] for name in given})
    return {n: (1 - share) * x + share * turned[swapped_name(n)] for n, x in results.items()}


def swapped_name(name):
    there = "rejected" if "rejected" in name else "chosen"
    return name.replace(there, "chosen" if there == "rejected" else "rejected")


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


def summed(ours, given):
    return scaled(ours, given, np.count_nonzero(given["mask"]))


def without_mask(ours, given):
    mask = given["mask"]
    results = ours(given | {"mask": np.ones_like(mask)})
    by_token = [x for x in results if np.ndim(results[x]) == 2 and "[" not in x]
    return results | {x: results[x] * (mask > 0) for x in by_token}


def over_all_positions(ours, given):
    return scaled(ours, given, (given["mask"] > 0).mean())


def reordered(ours, given, order):
    results = ours(given)
    return dict(zip(results, (results[name] for name in order)))


def swapped(ours, given, first, second, estimators=()):
    if estimators and given["estimator"] not in estimators:
        return ours(given)
    return ours(given | {first: given[second], second: given[first]})


def negated(ours, given, name):
    return ours(given | {name: -given[name]})


def opposite(ours, given):
    results = ours(given)
    return {name: x if name == "ratio" else -x for name, x in results.items()}


def max_for_min(ours, given):
    return opposite(partial(negated, ours, name="advantages"), given)


def without_clip(ours, given):
    return ours(given | {"clip": 1e30})


def ratio_upside_down(ours, given):
    results = swapped(ours, given, "new_logprobs", "old_logprobs")
    return results | {"d_new_logprobs": -results["d_new_logprobs"]}


def score_in_last_column(ours, given):
    rewards = ours(given | {"scores": 0 * given["scores"]})["rewards"] + 0.0
    rewards[:, -1] += given["scores"]
    return {"rewards": rewards}


def score_on_every_token(ours, given):
    rewards = ours(given | {"scores": 0 * given["scores"]})["rewards"]
    return {"rewards": rewards + given["scores"][:, None] * (given["mask"] > 0)}


def whole_groups_mean(ours, given):
    share = 1 - 1 / given["group_size"]
    return {name: x * share for name, x in ours(given).items()}


def mean_kept(ours, given):
    x, mask = given["x"], given["mask"]
    return {"whitened": ours(given)["whitened"] + np.where(mask, x[mask > 0].mean(), 0)}


def scaled_k2(ours, given, factor):
    return {"kl": ours(given)["kl"] * (factor if given["estimator"] == "k2" else 1)}


# ------------------------------------------------------------------ conventions


def known(part, words, change, loose=False, only_leaves_out=False, **settings):
    return Convention(words, partial(change, **settings), part, loose, only_leaves_out)


LEFT_OUT = f"deviations below {LITTLE} are left out"
SMALL = f"deviations below {LITTLE}, where epsilons and rounding show"
BY_N = "a variance divided by n"
NUMPY_STD = f"{BY_N}, as in np.std; {LEFT_OUT}"
OPENRLHF_STD = f"{BY_N}, as in OpenRLHF; {LEFT_OUT}"
PAST = "one value kept past the end"
AFTER = "the score on the position after the last token where there is one, as in TRL"
BATCH = "the deviation of the whole batch"
GSPO = "one ratio per response, as in GSPO"
SUM_OF_LOGS = "one ratio per response, from the sum of its log ratios"
GSPO_TOKEN = f"{GSPO}; each token keeps its own gradient"
MEAN_OF_MEANS = "a mean over each response, then over responses, as in GRPO's paper"
MEAN_OF_SUMS = "a sum over each response, then a mean over responses"
MEANS = [
    known("mean", MEAN_OF_MEANS, per_response, total=False),
    known("mean", MEAN_OF_SUMS, per_response, total=True),
    known("mean", "a sum over all tokens", summed),
]


def whitened_inside(change, who):
    words = f"advantages whitened inside, as in {who}"
    return [
        known("whiten", f"{words}; {LEFT_OUT}", change, True, ddof=1),
        known("whiten", f"{words}, with {BY_N}; {LEFT_OUT}", change, True, ddof=0),
    ]


def batch_deviation(words, of):
    return [
        known("scale", f"{BATCH}{words}; {LEFT_OUT}", grouped, True, of=of, ddof=1),
        known("scale", f"{BATCH}{words}, with {BY_N}; {LEFT_OUT}", grouped, True, of=of, ddof=0),
    ]


KNOWN = {
    "shape_rewards": [
        known("place", AFTER, score_after_end, kl_at_padding=False),
        known("place", f"{AFTER}, and KL at padding", score_after_end, kl_at_padding=True),
    ],
    "gae": [
        known("end", f"{PAST}, as in TRL", one_past_the_end, reward=False),
        known("end", f"{PAST}, and its reward, as in TRL", one_past_the_end, reward=True),
        known("returns", "returns are the rewards still to come", monte_carlo_returns),
        *whitened_inside(whitened, "verl"),
    ],
    "rloo_advantages": whitened_inside(whitened, "TRL"),
    "grpo_advantages": [
        known("scale", SMALL, grouped, True, True, of="groups", ddof=1),
        known("scale", NUMPY_STD, grouped, True, of="groups", ddof=0),
        *batch_deviation(", as in REINFORCE++", "totals"),
        *batch_deviation(" after subtracting the groups' means", "differences"),
        known("scale", "no deviation, as in Dr. GRPO", grouped, of="nothing", ddof=None),
        *whitened_inside(whitened, "REINFORCE++"),
    ],
    "whiten": [
        known("scale", "one token, which has no variance", without_one_token, False, True),
        known("scale", SMALL, whitened, True, True, ddof=1),
        known("scale", OPENRLHF_STD, whitened, True, ddof=0),
    ],
    "ppo_loss": [
        known("ratio", GSPO, ratio_of_response, mean=True, through_others=True),
        known("ratio", GSPO_TOKEN, ratio_of_response, mean=True, through_others=False),
        known("ratio", SUM_OF_LOGS, ratio_of_response, mean=False, through_others=True),
        known("ratio", "a ratio of 1, as for one update a batch", ratio_one),
        *MEANS,
        *whitened_inside(whitened_before, "CleanRL"),
    ],
    "kl_loss": [
        known("ratio", "the gradient of k2 for all estimators, as in verl's k3+", gradient_of_k2),
        *MEANS,
    ],
    "value_loss": MEANS,
    "clipped_value_loss": MEANS,
}

# ------------------------------------------------------------------ conventions with a number,
# which yours shows in one row of one token. probe(argument=number, ...) calls yours and returns its
# first result; what is not given is 0, 1 in the mask, or the first choice.


def limits_shown(low, high):
    """The limits, as words, if yours has some; None otherwise."""
    low, high = np.round([low, high], 4) + 0.0
    low = -low if low == high else low  # an estimate that is positive on both sides
    if not min(abs(low), abs(high)) < 0.9 * FAR:
        return None
    return (low, high), f"+-{high:g}" if low == -high else f"[{low:g}, {high:g}]"


def probe_rewards(probe):
    for name, what, sign in (("scores", "scores", 1), ("kl", "each token's KL", -1)):
        if found := limits_shown(*(sign * probe(**{name: x, "beta": 1.0}) for x in (-FAR, FAR))):
            limits, words = found
            who = ", as in OpenRLHF" if words == "+-10" else ""
            yield known(name, f"{what} clipped to {words}{who}", clipped, name=name, limits=limits)


def probe_kl(probe, new, change, loss=False):
    estimates = [
        ("k3", "k3", partial(change, estimators=["k3"]), "verl"),
        ("each token's KL", "k1", change, "OpenRLHF"),
    ]
    if change is clipped_kl:
        log_ratio = partial(clipped, name="logprobs", center="ref_logprobs")
        estimates.append(("log ratios", "k1", log_ratio, ""))
    for what, estimator, change_of_it, who in estimates:

        def estimate(x, estimator=estimator):
            return probe(**{new: min(x, 0.0), "ref_logprobs": min(-x, 0.0), "estimator": estimator})

        unit = estimate(1.0) / (1 if estimator == "k1" else math.exp(-1)) if loss else 1
        if found := limits_shown(*(estimate(x) / unit for x in (-FAR, FAR))):
            limits, words = found
            who = f", as in {who}" if who and words == "+-10" else ""
            yield known("clip", f"{what} clipped to {words}{who}", change_of_it, limits=limits)


def straight_line(limit):
    """(a, b) where limit(clip) is a + b clip; None where it is something else."""
    first, middle, last = (limit(clip) for clip in CLIP_RANGES)
    slope = (last - first) / (CLIP_RANGES[2] - CLIP_RANGES[0])
    if not abs(first) < FAR or not abs(last) < FAR:
        return None
    a, b = np.round([first - slope * CLIP_RANGES[0], slope], 5) + 0.0
    return (a, b) if abs(a + b * CLIP_RANGES[1] - middle) < 1e-4 else None


def at_usual_clip(line):
    return line[0] + line[1] * CLIP_RANGES[1]


def line_in_words(line):
    a, b = line
    size = "" if abs(b) == 1 else f"{abs(b):g} "
    return f"{a:g} {'-' if b < 0 else '+'} {size}clip" if b else f"{a:g}"


def probe_ppo(probe):
    def loss(log_ratio, advantage, clip=CLIP_RANGES[1]):
        new, old = min(log_ratio, 0), min(-log_ratio, 0)
        return probe(new_logprobs=new, old_logprobs=old, advantages=advantage, clip=clip)

    unit = -loss(0, 1)
    if unit == 0:
        yield from probe_log_probability(probe)
    if not abs(unit) > 0:
        return
    high = straight_line(lambda clip: -loss(FAR_RATIO, 1, clip) / unit)
    low = straight_line(lambda clip: loss(-FAR_RATIO, -1, clip) / unit)
    if high and low and at_usual_clip(high) + at_usual_clip(low) > 2 + 1e-5:
        words = f"a ratio within [{line_in_words(low)}, {line_in_words(high)}], clip-higher as"
        yield known("clip", f"{words} in DAPO", clipped_ratio, low=low, high=high)
    highest = loss(FAR_RATIO, -1) / unit
    lowest = -loss(-FAR_RATIO, 1) / unit
    second = straight_line(lambda clip: loss(FAR_RATIO, -1, clip) / unit)
    if second and lowest < 1e-6 and second != high:
        words = f"a second clip at {line_in_words(second)} where A < 0"
        words += ", as in verl" if second == (3, 0) else ""
        yield known("second_clip", words, second_clip, highest=second)
    elif 1 < highest < math.exp(FAR_RATIO - 1) and second != high:
        limit = np.round(math.log(highest), 4)
        bottom = -math.inf if lowest < 1e-6 else np.round(math.log(lowest), 4)
        words = f"log ratios clipped at {limit:g}" + (f" and {bottom:g}" if lowest > 1e-6 else "")
        words += ", as in OpenRLHF and verl" if limit == 20 else ""
        yield known("second_clip", words, clipped_log_ratio, low=bottom, high=limit)


def probe_log_probability(probe):
    """Of a loss that is 0 where log p is 0: the weight of -A log p."""

    def weight(new, old, clip):
        unit = probe(new_logprobs=-1.0, old_logprobs=-1.0, advantages=1.0, clip=clip)
        loss = probe(new_logprobs=new, old_logprobs=old, advantages=1.0, clip=clip)
        return loss / -new / unit

    high = straight_line(lambda clip: weight(-1.0, -FAR_RATIO, clip))
    low = straight_line(lambda clip: weight(-FAR_RATIO, -1.0, clip))
    if high and low:
        limits = f"[{line_in_words(low)}, {line_in_words(high)}]"
        words = f"a weight within {limits} in place of the ratio, as in CISPO"
        if low == high == (1, 0):
            words = "no ratio, as in REINFORCE: the value differs, the gradient equals ours"
            words += " where the ratio is 1"
        yield known("ratio", words, weighted_log_probability, low=low, high=high)


def probe_huber(probe):
    near, middle, far = (probe(values=x) for x in (100.0, 200.0, 400.0))
    slope = (middle - near) / 100
    limit = np.round(2 * (100 - near / slope), 4) if slope else 0
    if 0 < limit < 90 and abs(far - middle - 200 * slope) < 1e-3 * abs(far):
        words = f"a Huber loss, linear beyond an error of {limit:g}"
        yield known("error", words, huber, limit=limit)


def probe_pairs(probe):
    turned, usual = probe(chosen=FAR, beta=1.0), probe(rejected=FAR, beta=1.0)
    share = np.round(turned / (turned + usual), 4)
    if 0 < share < 0.5:
        words = f"label smoothing of {share:g}, as in conservative DPO"
        yield known("labels", words, label_smoothing, share=share)


PROBED = {
    "shape_rewards": probe_rewards,
    "kl_penalty": partial(probe_kl, new="logprobs", change=clipped_kl),
    "kl_loss": partial(probe_kl, new="new_logprobs", change=clipped_kl_loss, loss=True),
    "ppo_loss": probe_ppo,
    "value_loss": probe_huber,
    "preference_loss": probe_pairs,
    "dpo_loss": probe_pairs,
}
PLAIN = {  # what a loss is asked for to find a factor; a small error, or a Huber loss is linear
    "ppo_loss": {"new_logprobs": -1.0, "old_logprobs": -1.0, "advantages": 1.0},
    "value_loss": {"values": 0.125},
    "clipped_value_loss": {"values": 0.125, "old_values": 0.125},
    "kl_loss": {"new_logprobs": -1.0, "ref_logprobs": -2.0},
    "preference_loss": {"chosen": 1.0},
    "dpo_loss": {"chosen": 1.0, "beta": 1.0},
}


def factor(loss, expected, name, conventions):
    """[the factor that yours has], or [] if it is 1 or none."""
    ratio = loss / expected if expected else math.nan
    if not 1e-6 < ratio < 1e6 or abs(ratio - 1) < 1e-5:
        return []
    words = f"the factor {ratio:.4g}"
    if "value_loss" in name and words == "the factor 0.5":
        words += ", as in TRL, OpenRLHF and verl"
    if ratio < 1 and any(one in MEANS[1:] for one in conventions):  # sums
        words = f"a division by the constant {1 / ratio:.4g}, as in Dr. GRPO"
    return [known("factor", words, scaled, factor=ratio)]


# ------------------------------------------------------------------ mistakes
# A sentence for each is printed where its change explains every difference.

MASK_IGNORED = "with a mask of all ones they agree: yours ignores the mask"
PADDING_COUNTED = "with a mask of all ones they agree: yours counts padding in"
ALL_POSITIONS = "yours divides by the number of all positions, padding included"
KL_SWAPPED = partial(swapped, first="logprobs", second="ref_logprobs")
OF_ONE = {  # of one function
    "kl_penalty": [
        ("actor and reference are swapped in k1", partial(KL_SWAPPED, estimators=["k1"])),
        ("actor and reference are swapped in k3", partial(KL_SWAPPED, estimators=["k3"])),
        ("actor and reference are swapped", KL_SWAPPED),
        ("k2 lacks the factor 0.5", partial(scaled_k2, factor=2)),
    ],
    "shape_rewards": [
        ("yours puts the score in the last column, padding or not", score_in_last_column),
        ("yours puts the score on every token", score_on_every_token),
    ],
    "rloo_advantages": [
        ("yours subtracts the mean of the whole group, the response included", whole_groups_mean)
    ],
    "whiten": [("yours adds the mean back", mean_kept)],
    "ppo_loss": [
        ("yours takes the larger of the two objectives, ours the smaller", max_for_min),
        ("new_logprobs and old_logprobs are swapped", ratio_upside_down),
        ("yours does not clip: while no ratio is outside the clip they agree", without_clip),
    ],
}


def mistakes(name, kinds, results):
    """(words, change) of what may explain all differences."""
    yield from OF_ONE.get(name, [])
    if "mask" in kinds:
        yield PADDING_COUNTED, without_mask
        if "loss" in results:
            yield (
                "yours divides by the number of all positions, padding included",
                (over_all_positions),
            )
    if "gradients" not in results:
        for order in list(itertools.permutations(results))[1:]:
            words = f"they agree if you return {', '.join(order)}: swapped?"
            yield words, partial(reordered, order=order)
    yield "with the opposite sign they agree", opposite
    floats = ("numbers", "small", "logprobs", "scores", "discount", "beta")
    names = [name for name, kind in kinds.items() if kind in floats]
    for first, second in itertools.combinations(names, 2):
        if kinds[first] == kinds[second]:
            words = f"with {first} and {second} swapped they agree"
            yield words, partial(swapped, first=first, second=second)
    for name in names:
        yield f"with the opposite sign of {name} they agree", partial(negated, name=name)
