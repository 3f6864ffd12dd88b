"""What each estimator of the KL does to the gradient, by exact sums over all responses.

    python tests/kl_gradients.py        README's table

A policy is a table of logits, one row for each of the 31 prefixes of a response of T = 3
tokens from V = 5. All 125 responses are summed, so nothing is sampled.
"""

import importlib
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
loop = importlib.import_module("rlhf_loop_pseudo")

V, T, PAIRS = 5, 3, 20
RESPONSES = np.array(list(itertools.product(range(V), repeat=T)))  # (125, T)
FIRST, SECOND = RESPONSES[:, 0], RESPONSES[:, 1]
PREFIXES = np.stack([0 * FIRST, 1 + FIRST, 1 + V + V * FIRST + SECOND], axis=1)  # rows of logits
DISTANCES = 0.05, 0.5, 1.5  # standard deviation of the actor's logits around the reference's
PLACES = [(name, place) for name in ("k1", "k2", "k3") for place in ("reward", "loss")]


def logprobs_of(logits):
    """Log probabilities of every token of every response, (125, T)."""
    return loop.log_softmax(logits)[PREFIXES, RESPONSES]


def kl_of(logits, ref_logits):
    """KL(actor || reference) of whole responses, by its definition."""
    logprobs, ref_logprobs = (logprobs_of(x).sum(axis=1) for x in (logits, ref_logits))
    return np.exp(logprobs) @ (logprobs - ref_logprobs)


def exact_gradient(logits, ref_logits, step=1e-6):
    """d KL / d logits, by differences."""
    gradient = np.zeros_like(logits)
    for place in np.ndindex(logits.shape):
        moved = np.zeros_like(logits)
        moved[place] = step
        ends = [kl_of(logits + change, ref_logits) for change in (moved, -moved)]
        gradient[place] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def expected_gradient(logits, ref_logits, estimator, place):
    """What takes the place of d KL / d logits, in expectation, by the sum over tokens."""
    logprobs, ref_logprobs = logprobs_of(logits), logprobs_of(ref_logits)
    if place == "reward":
        kl = loop.kl_penalty(logprobs, ref_logprobs, estimator)  # of all tokens, for each
        weights = np.repeat(kl.sum(axis=1, keepdims=True), T, axis=1)
    else:
        mask = np.ones(logprobs.shape)
        weights = mask.size * loop.kl_loss(logprobs, ref_logprobs, mask, estimator)[1]
    weights = weights * np.exp(logprobs.sum(axis=1, keepdims=True))  # times p(response)
    d_logits = np.eye(V)[RESPONSES] - np.exp(loop.log_softmax(logits))[PREFIXES]
    gradient = np.zeros_like(logits)
    np.add.at(gradient, PREFIXES, weights[..., None] * d_logits)
    return gradient


def compare(distance):
    """(KL, [(relative error, cosine) of each place]): medians over random pairs of policies."""
    rows = []
    for seed in range(PAIRS):
        ref_logits, noise = np.random.default_rng(seed).standard_normal((2, 1 + V + V * V, V))
        logits = ref_logits + distance * noise
        exact, rows = exact_gradient(logits, ref_logits), [*rows, [kl_of(logits, ref_logits)]]
        size = np.linalg.norm(exact)
        for place in PLACES:
            found = expected_gradient(logits, ref_logits, *place)
            length = max(np.linalg.norm(found), 1e-9 * size)
            rows[-1] += np.linalg.norm(found - exact) / size, (found * exact).sum() / length / size
    kl, *figures = np.median(rows, axis=0) + 0.0
    return kl, list(zip(figures[::2], figures[1::2]))


def table():
    """The lines of README's table."""
    lines = [["KL", *(f"{name} in the {place}" for name, place in PLACES)]]
    lines.append(["---"] * len(lines[0]))
    for distance in DISTANCES:
        kl, figures = compare(distance)
        pairs = [f"{loop.fixed(error)}, {loop.fixed(cosine)}" for error, cosine in figures]
        lines.append([f"{kl:.1g}" if kl < 1 else f"{kl:.1f}", *pairs])
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    print("\n".join(table()))
