# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24", "rich>=13.8"]
# ///
"""The complete RLHF-PPO training loop in one file, with real numbers.

    python rlhf_loop_pseudo.py                               one step, every tensor shown
    python rlhf_loop_pseudo.py --preset letters --steps 200  training, in seconds

Four toy models (actor, critic, reward, reference) go through the seven steps of
"Fine-Tuning Language Models from Human Preferences" and InstructGPT:

    1. sample prompts
    2. the actor generates responses
    3. the reward model scores them
    4. the reference measures how far the actor has moved: the KL penalty
    5. score and penalty become one reward per token
    6. the critic and GAE turn rewards into advantages
    7. PPO updates the actor, regression updates the critic

The models are toys: tiny, with uniform attention and random weights, on random prompts. A score is an
arbitrary function to maximise; no text means anything. Gradients, masks, clipping and Adam are exact.

Letters in shape comments: B sequences, P prompt tokens, T response tokens, V vocabulary,
D width, S sequence (P + T or less), N real tokens in the batch. Log probabilities and KL are in nats.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _signal  # the built-in part of signal, which itself takes a while to load
    import os

    # Ctrl-C during the imports ends as quietly as it does later
    _signal.signal(_signal.SIGINT, lambda *_: os._exit(130))
    # Two threads are enough for matrices this small; one without work sleeps soon (2**16 cycles), or it slows the other
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")

import argparse
import codecs
import contextlib
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import threading
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import default_rng  # now: while it loads, a Ctrl-C would be lost
from rich.console import Console
from rich.text import Text

# ------------------------------------------------------------------ 2. configuration


def setting(default, allowed, meaning):
    """One field of Config: its default, the rule for its values and its meaning."""
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})


COUNT = "a whole number of at least 1"
NOT_NEGATIVE = "a finite number of at least 0"
FRACTION = "a number from 0 to 1"
ALLOWED = {
    COUNT: lambda x: x >= 1 and x % 1 == 0,
    "a whole number of at least 2": lambda x: x >= 2 and x % 1 == 0,
    "a whole number of at least 0": lambda x: x >= 0 and x % 1 == 0,
    NOT_NEGATIVE: lambda x: 0 <= x < math.inf,
    FRACTION: lambda x: 0 <= x <= 1,
    "a number between 0 and 1, both excluded": lambda x: 0 < x < 1,
    "k1, k2 or k3": lambda x: x in ("k1", "k2", "k3"),
}


@dataclass(frozen=True)
class Config:
    """Everything that affects the algorithm; raises ValueError for a value outside its rule."""

    batch_size: int = setting(4, COUNT, "B, sequences in a batch (TRL per_device_train_batch_size)")
    prompt_length: int = setting(64, COUNT, "P, tokens in a prompt (verl data.max_prompt_length)")
    response_length: int = setting(128, COUNT, "T, most tokens in a response (TRL response_length)")
    vocab_size: int = setting(50257, "a whole number of at least 2", "V; the last token ends a text; GPT-2 has 50257")
    width: int = setting(32, COUNT, "D, numbers in a hidden state (n_embd in GPT-2, there 768)")
    steps: int = setting(1, COUNT, "RLHF steps, a batch each; 1 is the walk-through")
    beta: float = setting(0.02, NOT_NEGATIVE, "price of KL, score per nat (InstructGPT's; TRL kl_coef)")
    kl_estimator: str = setting("k1", "k1, k2 or k3", "how KL is estimated from a token (TRL kl_estimator)")
    gamma: float = setting(1.0, FRACTION, "discount per token (TRL gamma)")
    lam: float = setting(0.95, FRACTION, "GAE's lambda, per token (TRL lam)")
    clip: float = setting(0.2, "a number between 0 and 1, both excluded", "PPO's epsilon, a ratio (TRL cliprange)")
    ppo_epochs: int = setting(4, COUNT, "updates on each batch (TRL num_ppo_epochs)")
    learning_rate: float = setting(4e-4, NOT_NEGATIVE, "Adam's, falling to 0 over the steps (TRL learning_rate)")
    drift: float = setting(0.5, NOT_NEGATIVE, "noise, in deviations, between actor and reference; 0 in training")
    seed: int = setting(0, "a whole number of at least 0", "seed of all randomness (TRL seed)")

    def __post_init__(self):
        for each in fields(self):
            value, allowed = getattr(self, each.name), each.metadata["allowed"]
            if not ALLOWED[allowed](value):
                raise ValueError(f"{each.name}: {value!r} is not {allowed}")


# ------------------------------------------------------------------ 3. toy models

SLICE = 6_000_000  # numbers of an (N, V) matrix held at once: 24 MB
np.empty(SLICE, dtype=np.float32)  # freed at once: from now on glibc keeps arrays of up to this size for the next


def init_weights(rng, shape, deviation):
    """Draw weights uniformly around 0 with the given standard deviation, float32."""
    return (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(deviation * 12**0.5)


def init_head(rng, width, out_width, scale=1.0):
    """Draw a (D, out) matrix with standard deviation scale / sqrt(D)."""
    return init_weights(rng, (width, out_width), scale / width**0.5)


def init_model(rng, vocab_size, width, out_width, scale=1.0):
    """Draw a model: backbone (embed, mix) and head, float32.

    Returns {"embed": (V, D), "mix": (D, D), "head": (D, out_width)}. The context outweighs the current
    token, so that a late token's state still depends on the whole text.
    """
    return {
        "embed": init_weights(rng, (vocab_size, width), 0.1),
        "mix": init_head(rng, width, width, scale=5.0),
        "head": init_head(rng, width, out_width, scale),
    }


class Models(NamedTuple):
    """The four models of RLHF. Two learn, two are frozen."""

    actor: dict
    critic: dict
    reward_model: dict
    reference: dict


def init_models(config, rng):
    """Start all four from one backbone, as RLHF starts them from one fine-tuned model.

    drift sets the actor off the reference, and the critic's head off zero, as training would.
    """
    sizes, drift = (config.vocab_size, config.width), np.float32(config.drift)
    reference = init_model(rng, *sizes, config.vocab_size, scale=2.0)
    noise = init_model(rng, *sizes, config.vocab_size, scale=2.0)
    embed, mix = reference["embed"], reference["mix"]
    return Models(
        actor={name: reference[name] + drift * noise[name] for name in reference},
        critic={"embed": embed.copy(), "mix": mix.copy(), "head": drift * init_head(rng, config.width, 1)},
        reward_model={"embed": embed.copy(), "mix": mix.copy(), "head": init_head(rng, config.width, 1, scale=3.0)},
        reference=reference,
    )


def root_positions(x):
    """sqrt(t + 1) for each position t of x (B, S, D). Returns (S, 1)."""
    return np.sqrt(np.arange(1, x.shape[1] + 1, dtype=x.dtype))[:, None]


def attend(x):
    """Causal attention to every position so far equally: sum(x[0..t]) / sqrt(t + 1). (B, S, D) -> (B, S, D).

    The root, not t + 1, so that the context keeps its variance. Summed in the order in which generate
    sums, so that both find the same log probabilities: to the last bit, where matrix products allow.
    """
    return np.cumsum(x, axis=1) / root_positions(x)


def backbone(model, tokens):
    """Hidden states of a causal one-layer model: tanh(embed[x[t]] + attend(embed[x])[t] @ mix).

    tokens (B, S) int. Returns (B, S, D), every number in (-1, 1).
    """
    return backbone_and_context(model, tokens)[0]


def backbone_and_context(model, tokens):
    """What backbone returns, and attend(embed[x]) (B, S, D), which its gradient needs."""
    x = model["embed"][tokens]  # (B, S) -> (B, S, D)
    context = attend(x)
    return np.tanh(x + context @ model["mix"]), context


def backbone_gradients(model, tokens, hidden, context, d_hidden):
    """Gradients of a loss with respect to embed and mix, given d_hidden = d loss / d hidden (B, S, D)."""
    width = hidden.shape[-1]
    d_before = d_hidden * (1 - hidden**2)  # through tanh
    d_mix = context.reshape(-1, width).T @ d_before.reshape(-1, width)  # (D, B * S) @ (B * S, D)
    d_running = d_before @ model["mix"].T / root_positions(hidden)  # through mix and the root, to the running sum
    d_x = d_before + np.cumsum(d_running[:, ::-1], axis=1)[:, ::-1]  # x[t] is in that of every later position
    # one token's rows of d_x are added up; sorted first, because np.add.at is slow
    order = np.argsort(tokens, axis=None, kind="stable")
    used, first = np.unique(tokens.ravel()[order], return_index=True)
    d_embed = np.zeros_like(model["embed"])
    d_embed[used] = np.add.reduceat(d_x.reshape(-1, width)[order], first, axis=0)
    return {"embed": d_embed, "mix": d_mix}


def response_inputs(prompts, responses):
    """The tokens from which the response is predicted: all but the last. (B, P), (B, T) -> (B, P + T - 1).

    Response token t is predicted one position to its left, at P - 1 + t.
    """
    return np.concatenate([prompts, responses[:, :-1]], axis=1)


def response_states(model, prompts, responses):
    """Hidden states before each response token. Returns (B, T, D)."""
    return backbone(model, response_inputs(prompts, responses))[:, prompts.shape[1] - 1 :]


def row_slices(rows, vocab_size):
    """Slices of about equal size over the rows of an (N, V) matrix, each of at most SLICE numbers or one row."""
    count = max(1, math.ceil(rows / max(1, SLICE // vocab_size)))
    step = max(1, math.ceil(rows / count))
    return [slice(start, min(start + step, rows)) for start in range(0, rows or 1, step)]


def sliced_logits(states, head):
    """Yield states @ head as (rows, logits), at most SLICE logits at once, each time in the same buffer.

    A whole (N, V) matrix would cost more in fresh memory than in arithmetic.
    """
    slices = row_slices(len(states), head.shape[1])
    buffer = np.empty((slices[0].stop, head.shape[1]), dtype=head.dtype)
    for rows in slices:
        yield rows, np.matmul(states[rows], head, out=buffer[: rows.stop - rows.start])  # (n, D) -> (n, V)


def safe_to_exp(logits):
    """Logits (n, V) with the maximum taken off each row that is so large or small that its exps would be lost.

    Softmax does not change. Most rows stay as they are, which spares a pass over the matrix.
    """
    high = logits.max(axis=1, keepdims=True)
    extreme = np.abs(high) > 30
    return logits - np.where(extreme, high, 0) if extreme.any() else logits


def exp_and_logprobs(logits, tokens):
    """Softmax in parts. Mostly works in the place of logits: their values are lost.

    logits (n, V), tokens (n,). Returns (exps, sums, logprobs): exps (n, V), its rows not yet divided
    by their sums (n,); logprobs (n,) are those of tokens, in nats.
    """
    logits = safe_to_exp(logits)
    chosen = logits[np.arange(len(tokens)), tokens]  # (n, V) -> (n,)
    exps = np.exp(logits, out=logits)
    sums = exps.sum(axis=1)
    return exps, sums, chosen - np.log(sums)


# ------------------------------------------------------------------ 4. the seven steps


# ANCHOR: sample_prompts
def sample_prompts(rng, batch_size, prompt_length, vocab_size):
    """Step 1. Draw random prompts, without the end token.

    Returns (B, P) int, each from 0 to V - 2: token V - 1 ends a text. Source: x ~ D in Ziegler et al. 2019, section 2.
    """
    return rng.integers(0, vocab_size - 1, size=(batch_size, prompt_length))


# ANCHOR_END: sample_prompts


# ANCHOR: generate
def generate(actor, prompts, response_length, rng, eos_token, keep_logits=True):
    """Step 2. Sample a response to each prompt, token by token.

    token[t] ~ softmax(hidden[P - 1 + t] @ head), temperature 1. The context is a running sum, so that each
    token costs one position, not the whole sequence: what a key-value cache does for a transformer.

    prompts (B, P) int. Returns (responses, mask, logprobs, logits):
    responses (B, T) int, filled with eos_token after the end; mask (B, T), 1 up to and including
    the first end token; logprobs (B, T) in nats, 0 where the mask is 0; logits (B, T, V) or None.
    Source: Radford et al. 2018 (GPT), equations 1 and 2.
    """
    batch_size, prompt_length = prompts.shape
    embed, mix, head = actor["embed"], actor["mix"], actor["head"]
    responses = np.full((batch_size, response_length), eos_token)
    logprobs = np.zeros((batch_size, response_length), dtype=head.dtype)
    mask = np.zeros_like(logprobs)
    logits = np.empty((*mask.shape, head.shape[1]), dtype=head.dtype) if keep_logits else None
    context_sum = embed[prompts].sum(axis=1)  # (B, P, D) -> (B, D)
    token = prompts[:, -1]
    running = np.ones(batch_size, dtype=bool)
    for t in range(response_length):
        context = context_sum / (prompt_length + t) ** 0.5
        hidden = np.tanh(embed[token] + context @ mix)  # (B, D)
        token_logits = hidden @ head  # (B, D) -> (B, V)
        if keep_logits:
            logits[:, t] = token_logits
        token, logprob = sample_tokens(token_logits, rng)  # (B, V) -> (B,)
        token = np.where(running, token, eos_token)
        responses[:, t], mask[:, t], logprobs[:, t] = token, running, np.where(running, logprob, 0)
        running = token != eos_token
        context_sum = context_sum + embed[token]
    return responses, mask, logprobs, logits


# ANCHOR_END: generate


BLOCK = 256  # tokens of a large vocabulary that sample_tokens takes together


def sample_tokens(logits, rng):
    """Draw a token for each row from softmax(logits). (B, V) -> tokens, logprobs (B,)."""
    rows, vocab_size = np.arange(len(logits)), logits.shape[1]
    logits = safe_to_exp(logits)
    exps = np.exp(logits)
    weights, first, share = exps, 0, 1 - rng.random(len(logits))  # in (0, 1], so that a weight of 0 is never drawn
    if vocab_size > BLOCK:  # a running sum over all of V would be the slowest part of generation
        starts = np.arange(0, vocab_size, BLOCK)
        block, share = invert_cumulative(np.add.reduceat(exps, starts, axis=1), share)
        first = starts[block]
        columns = first[:, None] + np.arange(BLOCK)
        weights = np.where(columns < vocab_size, exps[rows[:, None], np.minimum(columns, vocab_size - 1)], 0)
    tokens = first + invert_cumulative(weights, share)[0]
    return tokens, logits[rows, tokens] - np.log(exps.sum(axis=1))


def invert_cumulative(weights, share):
    """Where the running sum of each row of weights (B, n) reaches share (B,), in (0, 1], of the row's total.

    Returns (index, share), both (B,): the share is how much of the weight at index it takes, in (0, 1].
    """
    rows = np.arange(len(weights))
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)  # in float32 the tail would be lost
    threshold = share * cumulative[:, -1]
    index = np.argmax(cumulative >= threshold[:, None], axis=1)  # the first
    # rounding must not make it 0, which would draw a weight of 0
    return index, np.maximum(1 - (cumulative[rows, index] - threshold) / weights[rows, index], 1e-300)


# ANCHOR: score_responses
def score_responses(reward_model, prompts, responses, mask):
    """Step 3. Score each response by one number.

    score = sigmoid(hidden[last real token] @ head)

    prompts (B, P), responses (B, T), mask (B, T). Returns scores (B,), each in (0, 1).
    Raises ValueError for a mask with an empty row. Source: InstructGPT (Ouyang et al. 2022), section 3.5.
    """
    lengths = np.count_nonzero(mask, axis=1)
    if not lengths.all():
        raise ValueError("mask: a row without a real token has no last token to score")
    hidden = backbone(reward_model, np.concatenate([prompts, responses], axis=1))  # (B, P + T, D)
    last = hidden[np.arange(len(lengths)), prompts.shape[1] + lengths - 1]  # (B, P + T, D) -> (B, D)
    logit = (last @ reward_model["head"])[:, 0]
    return 0.5 * (1 + np.tanh(logit / 2))  # the sigmoid, in a form that cannot overflow


# ANCHOR_END: score_responses


# ANCHOR: token_logprobs
def token_logprobs(model, prompts, responses):
    """Step 4. Log probability of each response token.

    logprob[t] = log softmax(hidden[P - 1 + t] @ head)[responses[t]]

    One forward pass over the whole sequence, at most SLICE logits at once.
    prompts (B, P), responses (B, T). Returns (B, T) in nats, padding not masked.
    Source: Radford et al. 2018 (GPT), equations 1 and 2.
    """
    states = response_states(model, prompts, responses)
    states = states.reshape(-1, states.shape[-1])  # (B, T, D) -> (B * T, D)
    tokens = responses.ravel()
    logprobs = np.empty(len(tokens), dtype=states.dtype)
    for rows, logits in sliced_logits(states, model["head"]):
        _, _, logprobs[rows] = exp_and_logprobs(logits, tokens[rows])
    return logprobs.reshape(responses.shape)


# ANCHOR_END: token_logprobs


# ANCHOR: kl_penalty
def kl_penalty(logprobs, ref_logprobs, estimator="k1"):
    """Step 4. Estimate KL(actor || reference), token by token.

    k1 = lp - ref    k2 = (lp - ref)² / 2    k3 = exp(ref - lp) - 1 - (ref - lp)

    k1 and k3 have the KL as their mean; k1 may be negative on a token, k3 never; k2 is biased.
    logprobs, ref_logprobs (B, T) in nats. Returns (B, T) in nats.
    Raises ValueError for shapes that differ or an unknown estimator.
    Source: Schulman 2020, "Approximating KL Divergence".
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"ref_logprobs: shape {ref_logprobs.shape} is not that of logprobs, {logprobs.shape}")
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return np.expm1(-difference) + difference
    raise ValueError(f"estimator: {estimator!r} is not k1, k2 or k3")


# ANCHOR_END: kl_penalty


# ANCHOR: shape_rewards
def shape_rewards(scores, kl, mask, beta):
    """Step 5. Merge score and KL penalty into a reward per token.

    reward[t] = -beta * kl[t], and the score on top of it at the last real token, where the
    response is complete and can be judged. A row's sum is score - beta * its KL.

    scores (B,), kl (B, T) in nats, mask (B, T), beta in score per nat. Returns (B, T), 0 at padding.
    Raises ValueError for shapes that do not fit or a mask with an empty row.
    Source: Ziegler et al. 2019, equation 2.
    """
    if kl.shape != mask.shape or scores.shape != mask.shape[:1]:
        raise ValueError(f"scores {scores.shape}, kl {kl.shape}, mask {mask.shape} must be (B,), (B, T), (B, T)")
    lengths = np.count_nonzero(mask, axis=1)
    if not lengths.all():
        raise ValueError("mask: a row without a real token has no place for its score")
    rewards = np.zeros(kl.shape, dtype=scores.dtype)
    rewards[np.arange(len(lengths)), lengths - 1] = scores
    return np.where(mask, rewards - float(beta) * kl, 0)


# ANCHOR_END: shape_rewards


# ANCHOR: critic_values
def critic_values(critic, prompts, responses):
    """Step 6. Predict the return of each state.

    value[t] = hidden[P - 1 + t] @ head: the state before token t is chosen.

    prompts (B, P), responses (B, T). Returns (B, T), in units of reward, padding not masked.
    Source: V in Schulman et al. 2016, section 2.
    """
    return (response_states(critic, prompts, responses) @ critic["head"])[..., 0]  # (B, T, D) -> (B, T)


# ANCHOR_END: critic_values


# ANCHOR: gae
def gae(rewards, values, mask, gamma, lam):
    """Step 6. Generalized advantage estimation.

    δ[t] = reward[t] + γ value[t + 1] - value[t]
    advantage[t] = δ[t] + γ λ advantage[t + 1]
    return[t] = advantage[t] + value[t]

    Past the last real token, value and advantage are 0. λ = 0 leaves δ, the TD error; λ = 1 is the
    Monte Carlo return minus the value.
    rewards, values, mask (B, T); gamma, lam in [0, 1]. Returns (advantages, returns), (B, T), 0 at padding.
    Raises ValueError for shapes that differ. Source: Schulman et al. 2016, equations 11 and 16 to 18.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(f"rewards {rewards.shape}, values {values.shape}, mask {mask.shape} must all be (B, T)")
    values = np.where(mask, values, 0)
    advantages = np.zeros(values.shape, dtype=np.result_type(rewards, values))
    next_value = next_advantage = 0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = np.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


# ANCHOR_END: gae


# ANCHOR: whiten
def whiten(x, mask):
    """Step 6. Shift and scale to mean 0 and variance 1.

    Over the real tokens: (x - mean) / sqrt(variance + 1e-8), the variance unbiased (divided by n - 1).
    x, mask (B, T). Returns (B, T), 0 at padding. Raises ValueError for shapes that differ or no real token.
    Source: masked_whiten in TRL.
    """
    if x.shape != mask.shape or not mask.any():
        raise ValueError(f"mask: needs the shape of x, {x.shape}, and a real token; its shape is {mask.shape}")
    count = int(np.count_nonzero(mask))
    mean = np.where(mask, x, 0).sum() / count
    centered = np.where(mask, x - mean, 0)
    variance = (centered**2).sum() / max(count - 1, 1)
    return centered / np.sqrt(variance + 1e-8)


# ANCHOR_END: whiten


# ANCHOR: ppo_loss
def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip):
    """Step 7. PPO's clipped policy loss and its derivative.

    ratio = exp(new - old)
    loss = mean over real tokens of -min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)
    d loss / d new = -ratio * A / n where the first of the two is not the larger, else 0

    The minimum takes away the gain, and so the gradient, of moving the ratio past the clip.
    All (B, T), log probabilities in nats. Returns (loss, d_loss/d_new_logprobs, ratio): scalar, (B, T),
    (B, T), 0 at padding. Raises ValueError for shapes that differ or no real token.
    Source: Schulman et al. 2017, equation 7.
    """
    if not new_logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape or not mask.any():
        raise ValueError("new_logprobs, old_logprobs, advantages, mask must have one shape, and mask a real token")
    count = int(np.count_nonzero(mask))
    log_ratio = np.where(mask, new_logprobs, 0) - np.where(mask, old_logprobs, 0)
    ratio = np.where(mask, np.exp(log_ratio), 0)
    advantages = np.where(mask, advantages, 0)
    unclipped = ratio * advantages
    clipped = np.clip(ratio, 1 - float(clip), 1 + float(clip)) * advantages
    loss = -np.minimum(unclipped, clipped).sum() / count
    return loss, np.where(unclipped <= clipped, -unclipped, 0) / count, ratio


# ANCHOR_END: ppo_loss


# ANCHOR: value_loss
def value_loss(values, returns, mask):
    """Step 7. The critic's mean squared error and its derivative.

    loss = mean over real tokens of (value - return)²    d loss / d value = 2 (value - return) / n

    All (B, T). Returns (loss, d_loss/d_values): scalar, (B, T), 0 at padding.
    Raises ValueError for shapes that differ or no real token. Source: Schulman et al. 2017, section 5 (L^VF).
    """
    if not values.shape == returns.shape == mask.shape or not mask.any():
        raise ValueError("values, returns, mask must have one shape, and mask a real token")
    count = int(np.count_nonzero(mask))
    error = np.where(mask, values, 0) - np.where(mask, returns, 0)
    return (error**2).sum() / count, 2 * error / count


# ANCHOR_END: value_loss


# ANCHOR: actor_gradients
def actor_gradients(actor, prompts, responses, old_logprobs, advantages, mask, clip):
    """Step 7. Gradients of ppo_loss for the actor's parameters.

    One forward and one backward pass, with
    d loss / d logits = d_loss/d_new_logprob * (one-hot of the token - softmax(logits))

    prompts (B, P), the others (B, T). Returns (gradients, loss, ratio): keyed like the parameters,
    scalar, (B, T) with 0 at padding. Raises ValueError for a mask without a real token.
    Source: Schulman et al. 2017, equation 7, by the chain rule.
    """
    inputs, real = response_inputs(prompts, responses), mask.astype(bool)
    if not real.any():
        raise ValueError("mask: no real token to learn from")
    hidden, context = backbone_and_context(actor, inputs)  # (B, S, D) both
    states, tokens = hidden[:, prompts.shape[1] - 1 :][real], responses[real]  # (N, D), (N,)
    old_logprobs, advantages = old_logprobs[real], advantages[real]
    head, loss = actor["head"], 0.0
    d_head, d_states, ratio = np.zeros_like(head), np.empty_like(states), np.empty_like(old_logprobs)
    for rows, logits in sliced_logits(states, head):
        exps, sums, new_logprobs = exp_and_logprobs(logits, tokens[rows])
        ones = np.ones_like(new_logprobs)
        mean, d_mean, ratio[rows] = ppo_loss(new_logprobs, old_logprobs[rows], advantages[rows], ones, clip)
        part = len(ones) / len(tokens)  # the loss is a mean over all rows, ppo_loss saw these
        loss += part * mean
        exps[np.arange(len(sums)), tokens[rows]] -= sums  # now -(one-hot - softmax) * sums
        scale = (part * d_mean / sums)[:, None]  # (n, 1), small: the (n, V) matrix is never scaled itself
        d_head -= (states[rows] * scale).T @ exps  # (D, n) @ (n, V)
        d_states[rows] = -scale * (exps @ head.T)  # (n, V) @ (V, D)
    d_hidden, all_ratios = np.zeros_like(hidden), np.zeros(mask.shape, dtype=ratio.dtype)
    d_hidden[:, prompts.shape[1] - 1 :][real] = d_states
    all_ratios[real] = ratio
    return {**backbone_gradients(actor, inputs, hidden, context, d_hidden), "head": d_head}, loss, all_ratios


# ANCHOR_END: actor_gradients


# ANCHOR: critic_gradients
def critic_gradients(critic, prompts, responses, returns, mask):
    """Step 7. Gradients of value_loss for the critic's parameters.

    One forward and one backward pass.

    prompts (B, P), the others (B, T). Returns (gradients, loss): keyed like the parameters, scalar.
    Raises ValueError for a mask without a real token. Source: Schulman et al. 2017, section 5, by the chain rule.
    """
    inputs, head = response_inputs(prompts, responses), critic["head"]
    hidden, context = backbone_and_context(critic, inputs)  # (B, S, D) both
    states = hidden[:, prompts.shape[1] - 1 :]  # (B, T, D)
    loss, d_values = value_loss((states @ head)[..., 0], returns, mask)
    d_head = states.reshape(-1, len(head)).T @ d_values.reshape(-1, 1)  # (D, B * T) @ (B * T, 1)
    d_hidden = np.zeros_like(hidden)
    d_hidden[:, prompts.shape[1] - 1 :] = d_values[..., None] * head[:, 0]
    return {**backbone_gradients(critic, inputs, hidden, context, d_hidden), "head": d_head}, loss


# ANCHOR_END: critic_gradients


# ANCHOR: adam_step
def adam_step(params, gradients, state, learning_rate):
    """Step 7. One Adam update, IN PLACE.

    Changes params and state, returns None.

    m = 0.9 m + 0.1 g    v = 0.999 v + 0.001 g²    p -= rate * m̂ / (sqrt(v̂) + 1e-8)

    with m̂ = m / (1 - 0.9^t) and v̂ = v / (1 - 0.999^t). params and gradients share their keys and shapes;
    state starts as {} and holds t, m and v. Raises ValueError for shapes that differ.
    Source: Kingma & Ba 2015, algorithm 1.
    """
    for name, gradient in gradients.items():
        if gradient.shape != params[name].shape:
            raise ValueError(f"gradients: {name} has shape {gradient.shape}, its parameter {params[name].shape}")
    if not state:
        state.update(t=0, m={}, v={})
        for name, param in params.items():
            state["m"][name], state["v"][name] = np.zeros_like(param), np.zeros_like(param)
    state["t"] += 1
    rate, v_scale = learning_rate / (1 - 0.9 ** state["t"]), 1 - 0.999 ** state["t"]
    for name, gradient in gradients.items():
        every = [np.atleast_1d(x) for x in (params[name], gradient, state["m"][name], state["v"][name])]
        step = max(1, 32768 * len(every[0]) // max(1, gradient.size))
        for start in range(0, len(every[0]), step):  # in blocks that stay in the processor's cache
            p, g, m, v = (x[start : start + step] for x in every)
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            p -= rate * m / (np.sqrt(v / v_scale) + 1e-8)


# ANCHOR_END: adam_step


def exact_kl(logits, logprobs, reference, ref_logprobs, prompts, responses):
    """KL(actor || reference) of each token's whole distribution: Σ over v of p(v) (log p(v) - log q(v)).

    For the walk-through only: training samples one token where this needs V. With log p(v) = logits[v] - log Z,
    and the same for q, it is E_p[logits] - log Z - E_p[ref_logits] + log Z_ref. Both log Z follow from the
    sampled token, and E_p[ref_logits] = state · Σ p(v) head[:, v], so that no second (N, V) matrix is needed.
    logits (B, T, V), logprobs and ref_logprobs (B, T). Returns (B, T) in nats, without meaning at padding.
    """
    states, head = response_states(reference, prompts, responses), reference["head"]
    log_z = np.take_along_axis(logits, responses[..., None], axis=2)[..., 0] - logprobs  # (B, T, V) -> (B, T)
    ref_log_z = np.einsum("btd,dbt->bt", states, head[:, responses]) - ref_logprobs
    kl = ref_log_z - log_z
    for row in range(len(kl)):
        probs = logits[row] - log_z[row][:, None]  # (T, V)
        np.exp(probs, out=probs)
        kl[row] += np.einsum("tv,tv->t", probs, logits[row])
        kl[row] -= np.einsum("td,td->t", probs @ head.T, states[row])
        del probs  # so that the next row's take its place
    return np.maximum(kl, 0)  # less is rounding


# ------------------------------------------------------------------ 5. the loop


# ANCHOR: core_loop
def core_loop(models, config, rng):
    """The seven steps, config.steps times: RLHF with PPO.

    A generator of named arrays, a dict for each of the seven. Whoever drains it decides what to do with
    them: show, wait, save or only train. The actor and the critic in models change in place; the reward
    model and the reference never do.
    """
    actor, critic, reward_model, reference = models
    actor_state, critic_state, eos_token = {}, {}, config.vocab_size - 1
    for step in range(config.steps):
        # 1. Sample prompts
        prompts = sample_prompts(rng, config.batch_size, config.prompt_length, config.vocab_size)
        yield {"prompts": prompts}

        # 2. Generate
        responses, mask, old_logprobs, logits = generate(
            actor, prompts, config.response_length, rng, eos_token, keep_logits=config.steps == 1
        )
        yield {"responses": responses, "mask": mask, "old_logprobs": old_logprobs, "logits": logits}
        del logits  # only shown, and the largest array of all

        # 3. Score
        scores = score_responses(reward_model, prompts, responses, mask)
        yield {"scores": scores}

        # 4. KL penalty
        ref_logprobs = token_logprobs(reference, prompts, responses) * mask
        kl = kl_penalty(old_logprobs, ref_logprobs, config.kl_estimator)
        yield {"ref_logprobs": ref_logprobs, "kl": kl}

        # 5. Total rewards
        rewards = shape_rewards(scores, kl, mask, config.beta)
        yield {"rewards": rewards}

        # 6. Advantages
        values = critic_values(critic, prompts, responses) * mask
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        whitened = whiten(advantages, mask)
        yield {"values": values, "advantages": advantages, "returns": returns, "whitened": whitened}

        # 7. PPO update
        learning_rate = config.learning_rate * (1 - step / config.steps)
        actor_losses, critic_losses, ratios = [], [], []
        for _ in range(config.ppo_epochs):
            gradients, actor_loss, ratio = actor_gradients(
                actor, prompts, responses, old_logprobs, whitened, mask, config.clip
            )
            adam_step(actor, gradients, actor_state, learning_rate)
            gradients, critic_loss = critic_gradients(critic, prompts, responses, returns, mask)
            adam_step(critic, gradients, critic_state, learning_rate)
            actor_losses.append(actor_loss)
            critic_losses.append(critic_loss)
            ratios.append(ratio)
        yield {
            "ratio": np.stack(ratios),  # (epochs, B, T)
            "actor_loss": np.array(actor_losses),
            "critic_loss": np.array(critic_losses),
            "learning_rate": np.array(learning_rate),
        }


# ANCHOR_END: core_loop


def real_mean(x, mask):
    """Mean over the real tokens of an array that is 0 at padding, (..., B, T) -> (...)."""
    return x.sum(axis=(-2, -1)) / np.count_nonzero(mask)


def is_clipped(ratio, advantages, clip):
    """True where clipping takes effect: it lowers the gain and so stops the gradient. (..., B, T)."""
    return ratio * advantages > np.clip(ratio, 1 - clip, 1 + clip) * advantages


def walk_through(models, config, rng):
    """One step of core_loop, with what a reader wants to see besides. Yields its dicts, with more in them."""
    seen = {}
    for stage in core_loop(models, config, rng):
        seen.update(stage)
        mask = seen.get("mask")
        if "kl" in stage:
            logprobs, ref_logprobs = seen["old_logprobs"], seen["ref_logprobs"]
            texts = seen["prompts"], seen["responses"]
            exact = exact_kl(seen.pop("logits"), logprobs, models.reference, ref_logprobs, *texts)  # frees them
            stage["exact_kl"] = np.where(mask, exact, 0)
            stage["kl_error"] = np.std(stage["kl"], where=mask != 0) / np.count_nonzero(mask) ** 0.5
            stage["mean_exact_kl"] = real_mean(stage["exact_kl"], mask)
            stage["negative_fraction"] = real_mean(logprobs < ref_logprobs, mask)
        if "rewards" in stage:
            stage["kl_per_response"] = seen["kl"].sum(axis=1)
            stage["total_rewards"] = stage["rewards"].sum(axis=1)
        if "advantages" in stage:  # GAE with lambda 0 is the TD error
            stage["td_errors"], _ = gae(seen["rewards"], seen["values"], mask, config.gamma, 0.0)
        if "ratio" in stage:
            stage["ratio_min"] = np.where(mask, stage["ratio"], np.inf).min(axis=(1, 2))
            stage["ratio_max"] = stage["ratio"].max(axis=(1, 2))
            stage["clipped"] = is_clipped(stage["ratio"], seen["whitened"], config.clip)
            stage["clip_fraction"] = real_mean(stage["clipped"], mask)
        for name in ("scores", "total_rewards"):
            if name in stage:
                stage[f"mean_{name}"] = stage[name].mean()
        for name in ("old_logprobs", "ref_logprobs", "kl", "values", "advantages", "whitened"):
            if name in stage:
                stage[f"mean_{name}"] = real_mean(stage[name], mask)
        yield stage


def passes(config):
    """Forward and backward passes of one step, by model: one pass is one run over all P + T positions.

    The actor's first is the generation, a token at a time with its context kept.
    """
    epochs = config.ppo_epochs
    return {"actor": (1 + epochs, epochs), "critic": (1 + epochs, epochs), "reward_model": (1, 0), "reference": (1, 0)}


def step_metrics(data, config, step):
    """What one step of training is judged by, under TRL's names where it has one; data holds the step's arrays.

    Sums over a response are averaged over the batch; policy/, loss/ and val/ratio over the epochs' real tokens.
    """
    mask, ratio, kl = data["mask"], data["ratio"], data["kl"].sum(axis=1).mean()
    log_ratio = np.log(np.maximum(np.where(mask, ratio, 1), 1e-37))  # (epochs, B, T), finite where exp underflowed
    score = data["scores"].mean()
    return {
        "objective/scores": score,
        "objective/kl": kl,
        "objective/entropy": -data["old_logprobs"].sum(axis=1).mean(),
        "objective/non_score_reward": 0.0 - config.beta * kl,
        "objective/rlhf_reward": score - config.beta * kl,
        "policy/approxkl_avg": 0.5 * real_mean(log_ratio**2, mask).mean(),
        "policy/clipfrac_avg": real_mean(is_clipped(ratio, data["whitened"], config.clip), mask).mean(),
        "loss/policy_avg": data["actor_loss"].mean(),
        "loss/value_avg": data["critic_loss"].mean(),
        "val/ratio": real_mean(ratio, mask).mean(),
        "val/num_eos_tokens": np.count_nonzero((data["responses"] == config.vocab_size - 1) & (mask != 0)),
        "val/response_length": np.count_nonzero(mask) / len(mask),
        "lr": data["learning_rate"],
        "episode": (step + 1) * config.batch_size,
    }


def train(models, config, rng):
    """core_loop, drained a step at a time: yields (metrics, the first response's real tokens)."""
    data, step = {}, 0
    for stage in core_loop(models, config, rng):
        data.update(stage)
        if "ratio" in stage:
            yield step_metrics(data, config, step), data["responses"][0][data["mask"][0] != 0]
            data, step = {}, step + 1


THEORY_PROMPTS, THEORY_RESPONSES = 32, 128  # for each policy; more no longer changes the printed share


def theory_is_cheap(config):
    """Whether attainable_gain takes at most a fifth of the training, or a second or so, counted in forward passes."""
    theory = 3 * 2 * THEORY_PROMPTS * THEORY_RESPONSES  # a sampling and two evaluations of each response
    training = config.steps * config.batch_size * (3 + 4 * config.ppo_epochs)  # backward passes cost some two
    multiplications = (
        (config.prompt_length + config.response_length) * config.width * (config.width + config.vocab_size)
    )
    return theory * multiplications < 2e9 or theory < 0.2 * training


def attainable_gain(actor, reference, reward_model, config, rng):
    """How much of what is possible training has reached, in J = E[score] - beta * E[KL].

    No policy exceeds J* = E over prompts of beta * log E over reference responses of exp(score / beta)
    (Korbak et al. 2022; Rafailov et al. 2023, equation 4); for beta = 0 that is the largest score.
    Few reference responses are good ones, so responses of the reference and of the actor are pooled, and
    every expectation is a weighted mean over the pool, with weights p / p_mixture that sum to 1 (Veach &
    Guibas 1995, the balance heuristic). Then J_start and J never exceed J_star, in theory as in the estimate.

    Returns floats: J_start (the reference's J), J, J_star, share = (J - J_start) / (J_star - J_start),
    and the actor's score and kl, all on the same fresh prompts.
    """
    rows = []
    for prompt in sample_prompts(rng, THEORY_PROMPTS, config.prompt_length, config.vocab_size):
        prompts, sampled = np.tile(prompt, (THEORY_RESPONSES, 1)), []
        for policy in (reference, actor):
            responses, mask, _, _ = generate(
                policy, prompts, config.response_length, rng, config.vocab_size - 1, keep_logits=False
            )
            scores = score_responses(reward_model, prompts, responses, mask)
            logprobs = [(token_logprobs(model, prompts, responses) * mask).sum(axis=1) for model in (actor, reference)]
            sampled.append(np.array([scores, *logprobs], dtype=np.float64))
        scores, *logprobs = np.concatenate(sampled, axis=1)  # (2 * responses,) each
        mixture = np.logaddexp(*logprobs)
        of_actor, of_reference = (each - mixture - np.logaddexp.reduce(each - mixture) for each in logprobs)
        start, score = np.exp(of_reference) @ scores, np.exp(of_actor) @ scores
        kl = np.exp(of_actor) @ (of_actor - of_reference)
        best = scores.max()
        if config.beta:
            best += config.beta * np.logaddexp.reduce((scores - best) / config.beta + of_reference)
        rows.append((start, score, kl, best))
    start, score, kl, best = np.mean(rows, axis=0)
    objective = score - config.beta * kl
    share = (objective - start) / (best - start)
    return {"J_start": start, "J": objective, "J_star": best, "share": share, "score": score, "kl": kl}


# ------------------------------------------------------------------ 6. the presentation

NOTE_COLUMN = 38  # where the dim notes beside the numbers begin
LETTERS = "abcdefghijklmnopqrstuvwxyz."
BARS = "▁▂▃▄▅▆▇█"
PLAIN = {"β": "beta", "γ": "gamma", "λ": "lambda", "δ": "delta", "…": "...", "±": "+-", **dict(zip(BARS, "_.,-=+*#"))}


class Screen(Console):
    """A console at least 80 wide that goes on in silence when its reader has gone, as with `| head`."""

    def __init__(self, **options):
        columns = shutil.get_terminal_size().columns
        super().__init__(width=max(80, columns), highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self):
        """Send what is still to come nowhere; raising would lose what --save and --export are for."""
        silence(sys.stdout)


def silence(stream):
    """Let a stream that can no longer be written to end in the null device; one that is no file is left alone."""
    with contextlib.suppress(AttributeError, OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def spell_out(error):
    """Codec error handler: letters that the output's encoding lacks, in ones that it has."""
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def say(console, line="", note="", style=""):
    """Print one line, never wrapped or cut, with a dim note beside it."""
    text = Text(line, style=style)
    if note:
        text.append(" " * max(NOTE_COLUMN - len(line), 2) + note, style="dim")
    console.print(text, soft_wrap=True)


def explain(console, *lines):
    """Print dim lines, indented under a step's numbers."""
    for line in lines:
        console.print(Text(f"    {line}", style="dim"), soft_wrap=True)
    console.print()


def show_table(console, columns, rows, gap="  "):
    """Print a table, as wide as it needs; its first and last columns hold text, the others numbers."""
    first, *widths, _ = (max(map(len, cells)) for cells in zip(columns, *rows))
    for row in (columns, *rows):
        numbers = gap.join(text.rjust(width) for text, width in zip(row[1:-1], widths))
        line = f"{row[0].ljust(first)}{gap}{numbers}{gap}{row[-1]}".rstrip()
        say(console, line, style="dim" if row is columns else "")


def shorten(texts, most):
    """Of more than most texts, keep the beginning and the last."""
    return texts if len(texts) <= most else [*texts[: most - 1], "…", texts[-1]]


def fixed(value, digits):
    """A number with that many decimals, and never a negative zero."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def number_list(values, most=4):
    """As in [0.73, 0.45, 0.91, …, 0.62]."""
    return f"[{', '.join(shorten([fixed(value, 2) for value in values], most))}]"


def preview(data, name):
    """The first response's first values and last, and the mean over all real tokens."""
    values = shorten([fixed(value, 2) for value in data[name][0][data["mask"][0] != 0]], 3)
    return f"[{' '.join(values)}] mean {fixed(data[f'mean_{name}'], 3)}"


def token_text(tokens, config):
    """Tokens as letters where the vocabulary has 27, as numbers elsewhere."""
    if config.vocab_size == len(LETTERS):
        text = "".join(LETTERS[token] for token in tokens)
        return text if len(text) <= 24 else f"{text[:16]}…{text[-7:]}"
    return f"[{' '.join(shorten([str(token) for token in tokens], 3))}]"


def title(name):
    """reward_model -> Reward model"""
    return name.replace("_", " ").capitalize()


def megabytes(size):
    """Bytes as text, in units of a million."""
    return f"{size / 1e6:.1f} MB"


def show_prompts(console, data, config):
    """Step 1."""
    say(console, "Step 1: Sample prompts", style="bold")
    prompts = data["prompts"]
    say(console, f"  Batch size: {len(prompts)}")
    say(console, f"  Prompt shapes: {prompts.shape} tokens", token_text(prompts[0], config))
    explain(console, "Why only prompts: the actor writes its own training data, in step 2.")


def show_generation(console, data, config):
    """Step 2."""
    say(console, "Step 2: Generate responses (Actor)", style="bold")
    responses, mask, logits = data["responses"], data["mask"], data["logits"]
    say(console, "  Actor forward pass...")
    say(console, f"  Generated tokens: {responses.shape}", token_text(responses[0][mask[0] != 0], config))
    say(console, f"  Actor logits: {logits.shape}", f"{megabytes(logits.nbytes)}; training keeps only slices")
    say(console, f"  Old log probs: {mask.shape}", preview(data, "old_logprobs"))
    explain(
        console,
        'Why "old": they stay as they are while step 7 changes the actor.',
        "[...]: the first response's first tokens and last; mean: over all tokens.",
    )


def show_scores(console, data, config):
    """Step 3."""
    say(console, "Step 3: Score responses (Reward Model)", style="bold")
    scores = data["scores"]
    say(console, "  Reward model forward pass...")
    say(console, f"  Scores: {number_list(scores)}", f"mean {data['mean_scores']:.3f}")
    explain(console, "Why one number a response: only a finished response can be judged.")


def show_kl(console, data, config):
    """Step 4."""
    say(console, "Step 4: Compute KL penalty (Reference)", style="bold")
    kl = data["kl"]
    say(console, "  Reference forward pass...")
    say(console, f"  Reference log probs: {kl.shape}", preview(data, "ref_logprobs"))
    say(console, f"  KL divergence per token: {kl.shape}", preview(data, "kl"))
    mean, error, exact = (fixed(data[name], 3) for name in ("mean_kl", "kl_error", "mean_exact_kl"))
    say(console, f"  Mean KL: {mean}", f"± {error} nats per token, by {config.kl_estimator}")
    say(console, f"  Exact KL: {exact}", f"nats per token, over all {config.vocab_size} tokens", "dim")
    explain(
        console,
        f"Why k1 = log p_actor - log p_reference is negative on {data['negative_fraction']:.0%} of the tokens: it",
        "looks at the sampled token only. Its mean over many is the exact KL, which",
        "is never negative, but needs the whole vocabulary at every position.",
    )


def show_rewards(console, data, config):
    """Step 5."""
    say(console, "Step 5: Compute total rewards", style="bold")
    totals, score, kl = data["total_rewards"], data["scores"][0], data["kl_per_response"][0]
    say(console, "  reward = reward_model_score - β * KL", f"β = {config.beta}")
    say(
        console, f"  Total rewards: {number_list(totals)}", f"per response, mean {fixed(data['mean_total_rewards'], 3)}"
    )
    explain(
        console,
        f"The first: {score:.4f} - {config.beta} * {kl:.4f} = {totals[0]:.4f}, KL summed over its tokens.",
        "Why the score sits on the last token: nothing before it was judged. Token by",
        f"token: {number_list(data['rewards'][0][data['mask'][0] != 0], 5)}, each -β * KL, the last + score.",
    )


def show_advantages(console, data, config):
    """Step 6."""
    say(console, "Step 6: Compute advantages (Critic + GAE)", style="bold")
    mask = data["mask"]
    say(console, "  Critic forward pass...")
    say(console, f"  Values: {mask.shape}", preview(data, "values"))
    say(console, f"  GAE advantages: {mask.shape}", preview(data, "advantages"))
    say(console, f"  Whitened: {mask.shape}", preview(data, "whitened"), "dim")
    explain(
        console,
        f"δ[t] = reward[t] + γ value[t+1] - value[t]           γ = {config.gamma}, λ = {config.lam};",
        "advantage[t] = δ[t] + γ λ advantage[t+1]             all are 0 past the end",
        "Why whiten: the update must not grow with the scale of the scores.",
    )


def show_update(console, data, config):
    """Step 7."""
    say(console, "Step 7: PPO update", style="bold")
    say(console, "  Ratio = exp(new_log_prob - old_log_prob)")
    say(console, f"  Clipped ratio: clip(ratio, {1 - config.clip:g}, {1 + config.clip:g})")
    say(console, "      actor loss = mean of -min(ratio * A, clipped ratio * A), A whitened", style="dim")
    say(console, "      critic loss = mean of (value - return)^2, return = advantage + value", style="dim")
    columns = [data[name] for name in ("ratio_min", "ratio_max", "clip_fraction", "actor_loss", "critic_loss")]
    rows = [
        (f"{epoch:11}", f"{low:.3f} .. {high:.3f}", f"{clipped:.1%}", fixed(actor, 4), fixed(critic, 4), "")
        for epoch, (low, high, clipped, actor, critic) in enumerate(zip(*columns), start=1)
    ]
    show_table(console, ["      epoch", "ratio", "clipped", "actor loss", "critic loss", ""], rows)
    say(console, f"  Actor loss: {fixed(data['actor_loss'][-1], 3)}", "in the last epoch, before its update")
    say(console, f"  Critic loss: {fixed(data['critic_loss'][-1], 3)}", "in the last epoch, before its update")
    explain(
        console,
        "clipped: tokens whose gain, and so gradient, the clip takes away.",
        "Why the ratio is 1 in epoch 1: the weights are still those that generated.",
        "The loss is then minus the mean whitened advantage: 0, but not its gradient.",
    )
    say(console, "  Update complete!", style="bold")


STEPS = (show_prompts, show_generation, show_scores, show_kl, show_rewards, show_advantages, show_update)


def show_costs(console, models, config, sizes):
    """What each model costs, and the largest tensors; sizes holds (name, shape, bytes)."""
    console.print()
    rows = []
    for name, (forward, backward) in passes(config).items():
        weights = getattr(models, name).values()
        parameters, size = sum(w.size for w in weights), sum(w.nbytes for w in weights)
        adam, state = (megabytes(2 * size), "updated") if backward else ("-", "frozen")
        rows.append((title(name), f"{parameters:,}", megabytes(size), adam, str(forward), str(backward), state))
    show_table(console, ["model", "parameters", "weights", "Adam's m, v", "forward", "backward", ""], rows)
    console.print()
    largest = sorted(sizes, key=lambda item: -item[2])[:5]
    rows = [(name, str(shape), megabytes(size), "") for name, shape, size in largest]
    show_table(console, ["largest tensors", "shape", "memory", ""], rows)
    explain(
        console,
        "forward, backward: passes over the batch; the actor's first is generation;",
        "not among the tensors: Adam's m and v, and what a step needs in passing",
    )


def show_response(console, data, config, row, every_token):
    """One response token by token (--inspect), so that every formula can be checked by hand."""
    length = np.count_nonzero(data["mask"][row])
    names = ("old_logprobs", "ref_logprobs", "kl", "rewards", "values", "td_errors", "advantages", "returns")
    columns = ["t", "tok", "actor", "ref", "KL", "rew", "value", "TD", "adv", "return", "white", "ratio"]
    shown = range(length) if every_token or length <= 20 else [*range(8), None, *range(length - 8, length)]
    rows = []
    for t in shown:
        if t is None:
            rows.append(["…", *[""] * (len(columns) - 1)])
            continue
        token = token_text(data["responses"][row, t : t + 1], config).strip("[]")
        numbers = [fixed(data[name][row, t], 3) for name in names]
        ratio = fixed(data["ratio"][-1, row, t], 2) + ("*" if data["clipped"][-1, row, t] else "")
        rows.append([str(t), token, *numbers, fixed(data["whitened"][row, t], 2), ratio])
    say(console, f"Response {row}, {length} tokens, with the ratio of the last epoch (*: clipped)", style="bold")
    show_table(console, columns, rows, gap=" ")
    explain(
        console,
        "actor, ref: log probabilities; rew: reward; return = adv + value; white: the",
        "whitened adv. With t+1 the next token, past the end 0:",
        "TD = rew + γ value[t+1] - value; adv = TD + γ λ adv[t+1]",
    )


CHECKPOINT = "{:>6} {:>7.3f} {:>7.2f} {:>7.3f} {:>8.2f} {:>8.1%} {:>7.1f}  {}"


def show_checkpoint_header(console):
    """The heads of the columns of show_checkpoint."""
    header = re.sub(r"\.\d[f%]", "", CHECKPOINT)
    say(console, header.format("step", "score", "KL", "total", "entropy", "clipped", "length", "a response"))


def show_checkpoint(console, step, metrics, response, config):
    """One row of the training table."""
    names = ("objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy", "policy/clipfrac_avg")
    numbers = [metrics[name] for name in (*names, "val/response_length")]
    say(console, CHECKPOINT.format(step, *numbers, token_text(response, config)))


def sparkline(values):
    """A row of bars, each the mean of an equal share of the values; a gap where that is not finite."""
    means = np.array([part.mean() for part in np.array_split(values, min(28, len(values)))])
    finite = np.isfinite(means)
    low, high = means.min(initial=np.inf, where=finite), means.max(initial=-np.inf, where=finite)
    levels = np.where(finite, means - low, 0) / ((high - low) or 1) * (len(BARS) - 1)
    return "".join(BARS[int(level)] if real else " " for level, real in zip(levels, finite))


def show_metrics(console, history):
    """A sparkline for each metric, from its first value to its last."""
    rows = [(name, f"{x[0]:.5g}", f"{x[-1]:.5g}", sparkline(x)) for name, x in history.items()]
    show_table(console, ["metric", "first", "last", "course"], rows)


def show_theory(console, gain, config):
    """Where training stands against the best that any policy can reach."""
    console.print()
    say(console, "Against theory: J = score - β * KL per response, on fresh prompts", style="bold")
    start = "of the reference" if config.drift else "at the start"
    say(console, f"  J {start}: {gain['J_start']:.3f}", "the reference's score")
    say(console, f"  J now: {gain['J']:.3f}", f"{gain['score']:.3f} - {config.beta} * {gain['kl']:.3f}")
    say(console, f"  J*: {gain['J_star']:.3f}", "no policy exceeds it; estimated")
    say(console, f"  Share of the attainable gain: {share_text(gain['share'])}", "(J - start) / (J* - start)")


def share_text(share):
    """A share in percent; a dash where theory was left out, and for a loss its sign, as its size says nothing."""
    return "-" if math.isnan(share) else "none" if share < 0 else f"{share + 0.0:.0%}"


def show_comparison(console, rows):
    """The betas side by side; rows holds (beta, summary, response text)."""
    say(console, "The same training at each β", style="bold")
    cells = [
        (f"{beta:g}", *(f"{gain[name]:.3f}" for name in ("score", "kl", "J")), share_text(gain["share"]), text)
        for beta, gain, text in rows
    ]
    show_table(console, ["β", "score", "KL", "J", "share", "a response"], cells)
    explain(console, "J = score - β * KL; share: of the gain in J that is attainable at this β")


def progress_bar(console):
    """Live figures at the bottom of a terminal; nothing elsewhere, and never in an export."""
    from rich.progress import BarColumn, Progress, TextColumn  # only training pays for this import

    silent = not console.file.isatty() or console.is_dumb_terminal  # is_terminal may have been forced on a pipe
    columns = TextColumn("{task.description}"), BarColumn()
    return Progress(*columns, console=Console(quiet=silent), transient=True, disable=silent)


def show_source(name):
    """Print a public function, ready to paste, or with an empty name the list of them. Raises UserError."""
    source = Path(__file__).read_text(encoding="utf-8")
    anchored = dict(re.findall(r"^# ANCHOR: (\w+)\n(.*?)\n+# ANCHOR_END: \1$", source, flags=re.DOTALL | re.MULTILINE))
    if name and name not in anchored:
        raise UserError(f"--show: {name!r} is not one of {', '.join(anchored)}")
    console, functions = Screen(), re.findall(r"^def (\w+)", source, flags=re.MULTILINE)
    if not name:
        for each, text in anchored.items():
            summary = text.split('"""')[1].splitlines()[0]
            say(console, f"{each:18}{summary}")
        return
    calls = [each for each in functions if each != name and re.search(rf"\b{each}\(", anchored[name])]
    heading = f"# calls {', '.join(calls)}\n" if calls else ""
    text = f"{heading}import numpy as np\n\n\n{anchored[name]}"
    if console.is_terminal:
        from rich.syntax import Syntax  # only a terminal pays for this import

        console.print(Syntax("", "python", background_color="default").highlight(text), soft_wrap=True)
    else:
        say(console, text)


def export(console, path):
    """Write what was shown to path, in the format of its suffix."""
    text = console.export_text(clear=False)
    console.width = max([80, *map(len, text.splitlines())])
    if path.suffix == ".svg":
        text = console.export_svg(title="rlhf_loop_pseudo", clear=False)
    elif path.suffix == ".html":
        text = console.export_html(clear=False)
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


# ------------------------------------------------------------------ 7. the command line

PRESETS = {
    "gpt2": {},
    "letters": {
        "vocab_size": 27,
        "batch_size": 64,
        "prompt_length": 8,
        "response_length": 16,
        "learning_rate": 4e-3,
    },
}
EXPORTS = (".svg", ".html", ".txt")


class UserError(Exception):
    """The command line asks for something that cannot be done; the message says what and why."""


class Diverged(Exception):
    """A loss is not finite."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message):
        """Raise instead of printing the usage and exiting."""
        raise UserError(message)


class Once(argparse.Action):
    """Store a value, and refuse a second one."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Called by argparse for each occurrence of the flag."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string}: given twice")
        setattr(namespace, self.dest, values)


def reader(kind, allowed):
    """A function for argparse that reads a value and says what is allowed where it is not."""

    def read(text):
        """The value of text; raises argparse.ArgumentTypeError."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ALLOWED[allowed](value):
            raise argparse.ArgumentTypeError(f"{text.strip()[:40]!r} is not {allowed}")
        return value

    return read


def flag(name):
    """batch_size -> --batch-size"""
    return "--" + name.replace("_", "-")


def parse_arguments(argv):
    """Read the command line. Raises UserError."""
    parser = Parser(
        prog="rlhf_loop_pseudo.py",
        allow_abbrev=False,
        description="The complete RLHF-PPO training loop, with real numbers: one step shown in full, or training.",
    )
    parser.add_argument("--preset", choices=PRESETS, action=Once, help="sizes to start from; explicit flags win")
    for each in fields(Config):
        kind = {"int": int, "float": float, "str": str.strip}[each.type]
        meaning, allowed = each.metadata["meaning"], each.metadata["allowed"]
        parser.add_argument(
            flag(each.name),
            type=reader(kind, allowed),
            action=Once,
            nargs="+" if each.name == "beta" else None,
            metavar=each.name.rsplit("_")[-1].upper(),
            help=f"{meaning}; {allowed}; default {each.default}",
        )
    whole = reader(int, "a whole number of at least 0")
    parser.add_argument("--inspect", type=whole, action=Once, metavar="ROW", help="show a response token by token")
    parser.add_argument("--inspect-all", action="store_true", help="with --inspect: every token of a long response")
    parser.add_argument("--pause", action="store_true", help="wait for Enter between steps")
    parser.add_argument("--show", nargs="?", const="", action=Once, metavar="NAME", help="print a function; list them")
    parser.add_argument("--save", action=Once, metavar="FILE.npz", help="save the arrays, or a training's metrics")
    parser.add_argument("--export", action=Once, metavar="FILE", help="save what was shown, as .svg, .html or .txt")
    return parser.parse_args([protect(text) for text in (sys.argv[1:] if argv is None else argv)])


def protect(text):
    """A space before a negative number, so that argparse does not take -1e-3 or -inf for a flag."""
    return f" {text}" if re.fullmatch(r"-(inf|nan|\.?\d[\d.e+-]*)", text, re.IGNORECASE) else text


def make_configs(options):
    """One Config for each beta, from preset and flags. Raises UserError."""
    given = {name: getattr(options, name) for name in Config.__dataclass_fields__ if getattr(options, name) is not None}
    settings = {**PRESETS[options.preset or "gpt2"], **given}
    if settings.get("steps", 1) > 1:
        settings.setdefault("drift", 0.0)  # training starts from the reference
    betas = settings.pop("beta", [Config.beta])
    if len(set(betas)) < len(betas):
        raise UserError(f"--beta: {max(betas, key=betas.count):g} is given twice")
    return [Config(**settings, beta=beta) for beta in betas]


def check_options(options, configs):
    """Refuse what cannot be done, before any work is done. Raises UserError."""
    config, training = configs[0], configs[0].steps > 1
    if len(configs) > 1 and not training:
        raise UserError("--beta: several values are for training, which --steps N (N above 1) asks for")
    if options.inspect is not None and training:
        raise UserError("--inspect: shows a response of the walk-through, which --steps above 1 replaces")
    if options.inspect is not None and options.inspect >= config.batch_size:
        raise UserError(f"--inspect: row {options.inspect} does not exist, rows go from 0 to {config.batch_size - 1}")
    if options.inspect_all and options.inspect is None:
        raise UserError("--inspect-all: needs --inspect ROW")
    if options.pause and training:
        raise UserError("--pause: waits between the steps of the walk-through, which --steps above 1 replaces")
    if options.pause and not (sys.stdin and sys.stdin.isatty()):
        raise UserError("--pause: waits for Enter, and there is no terminal to press it in")
    for name, suffixes in (("save", (".npz",)), ("export", EXPORTS)):
        if getattr(options, name) is not None:
            check_output(flag(name), getattr(options, name), suffixes)
    check_memory(config)


def check_output(name, given, suffixes):
    """Refuse a file that could not be written later, by writing beside it now. Raises UserError."""
    if Path(given).suffix not in suffixes:
        raise UserError(f"{name}: {given!r} is no file name that ends in {' or '.join(suffixes)}")
    path = Path(os.path.realpath(given))
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UserError(f"{name}: {given!r} is there and is no ordinary file")
        if not path.parent.is_dir():
            raise UserError(f"{name}: the folder {str(path.parent)!r} does not exist")
        write_whole(path, None)
    except OSError as error:
        raise UserError(f"{name}: cannot write {given[:80]!r} ({error.strerror})") from None


def write_whole(path, write):
    """Call write(file) on a new file beside path and put it in path's place: whole, or not at all.

    With None for write it only tries to make that new file. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{os.urandom(8).hex()}.partial")
    try:
        with open(partial, "xb") as file:
            if write:
                write(file)
        if write:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def memory_needed(config):
    """Estimate of the bytes held at the peak, by the flags that lower them."""
    batch, length, vocab, width = config.batch_size, config.response_length, config.vocab_size, config.width
    positions = config.prompt_length + length
    models = 20 * width * (vocab + width)  # four models, Adam's two states and gradients of two
    hidden = batch * positions * (10 * width + 40)
    tokens = batch * length * (20 + 4 * config.ppo_epochs)
    logits = batch * vocab * 5 + 2 * max(SLICE, vocab) + ((batch + 1) * length * vocab if config.steps == 1 else 0)
    return {
        "--vocab-size or --width": 4 * models,
        "--batch-size, --prompt-length, --response-length or --width": 4 * hidden,
        "--batch-size, --response-length or --ppo-epochs": 4 * tokens,
        "--batch-size, --response-length or --vocab-size": 4 * logits,
        "--steps": 1200 * config.steps,
    }


def memory_available():
    """Bytes of memory that are free; infinity where the system does not tell."""
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))[1])
    except (OSError, TypeError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def check_memory(config):
    """Refuse sizes that cannot fit. Raises UserError."""
    needed, available = memory_needed(config), memory_available()
    if sum(needed.values()) > available:
        flags = max(needed, key=needed.get)
        raise UserError(
            f"these sizes need {gigabytes(sum(needed.values()))} of memory and {gigabytes(available)} are free: "
            f"lower {flags}"
        )


def gigabytes(size):
    """Bytes as text, in units of a thousand million."""
    return f"{size / 1e9:,.1f} GB" if size < 10**18 else "over a billion GB"


def run_walk_through(console, options, config, kept):
    """Show one step; kept collects the arrays for --save."""
    rng = default_rng(config.seed)
    models, sizes = init_models(config, rng), []
    say(console, "=== RLHF Training Loop Demo ===", style="bold")
    console.print()
    for number, (show, stage) in enumerate(zip(STEPS, walk_through(models, config, rng)), start=1):
        sizes += [(title(name), array.shape, array.nbytes) for name, array in stage.items()]
        kept.update(stage)
        if "ratio" in stage:
            check_finite(1, config, stage["actor_loss"], stage["critic_loss"])
        show(console, kept, config)
        kept.pop("logits", None)
        if options.pause and number < len(STEPS):
            wait_for_enter(console)
    for model, weights in models._asdict().items():
        sizes += [(f"{title(model)} {name}", array.shape, array.nbytes) for name, array in weights.items()]
    show_costs(console, models, config, sizes)
    if options.inspect is not None:
        show_response(console, kept, config, options.inspect, options.inspect_all)


def wait_for_enter(console):
    """Stop until Enter is pressed; the end of the input counts as that."""
    print("  [Enter] ", end="", flush=True)
    if not sys.stdin.buffer.readline():
        console.print()
    console.print()


def check_finite(step, config, *losses):
    """Raises Diverged."""
    if not all(np.isfinite(loss).all() for loss in losses):
        raise Diverged(
            f"step {step} at beta {config.beta:g}: the loss is not a finite number any more, an update was too large; "
            "try a lower --learning-rate, --beta or --drift"
        )


def run_training(console, config, history):
    """Train at one beta and show the checkpoints; history collects the metrics of each step.

    Returns (gain, response): what attainable_gain says, None where that would cost too much; the last response.
    """
    rng = default_rng(config.seed)
    models = init_models(config, rng)
    say(console, f"=== RLHF Training, β = {config.beta:g} ===", style="bold")
    say(console, f"  {config.steps} steps of {config.batch_size} responses; means per response, clipped per token")
    console.print()
    show_checkpoint_header(console)
    checkpoints = np.linspace(1, config.steps, min(11, config.steps)).round()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=config.steps)
        for step, (metrics, response) in enumerate(train(models, config, rng), start=1):
            history.append(metrics)
            check_finite(step, config, metrics["loss/policy_avg"], metrics["loss/value_avg"])
            score, kl = metrics["objective/scores"], metrics["objective/kl"]
            progress.update(task, advance=1, description=f"step {step}: score {score:.3f}, KL {kl:.2f}")
            if step in checkpoints:
                progress.stop()
                show_checkpoint(console, step, metrics, response, config)
                progress.start()
    if not theory_is_cheap(config):
        return None, response
    rng = default_rng([config.seed, 1])  # so that theory and training do not disturb each other
    return attainable_gain(models.actor, models.reference, models.reward_model, config, rng), response


def run_trainings(console, configs, kept):
    """Train at each beta and compare; kept collects the metrics for --save, complete or not."""
    histories, gains, rows = [[] for _ in configs], [], []
    try:
        for config, history in zip(configs, histories):
            gain, response = run_training(console, config, history)
            gains.append(gain or {})
            if gain is None:
                score, kl, total = (history[-1][f"objective/{name}"] for name in ("scores", "kl", "rlhf_reward"))
                gain = {"score": score, "kl": kl, "J": total, "share": math.nan}
            rows.append((config.beta, gain, token_text(response, config)))
            console.print()
            if len(configs) == 1:
                show_metrics(console, join_histories(histories, [], configs))
                if gains[0]:
                    show_theory(console, gain, config)
                else:
                    explain(console, "", "No comparison with theory: at these sizes it would cost more than it tells.")
    finally:
        with uninterrupted():
            kept.update(join_histories(histories, gains, configs))
    if len(configs) > 1:
        show_comparison(console, rows)


def join_histories(histories, gains, configs):
    """Metrics as arrays: (steps,) for one beta, (betas, steps) for several, NaN where a run did not get to."""
    several, joined = len(configs) > 1, {}
    steps = configs[0].steps if several else len(histories[0])
    for name in histories[0][0] if histories[0] else ():
        rows = [[metrics[name] for metrics in history] + [np.nan] * (steps - len(history)) for history in histories]
        joined[name] = np.array(rows, dtype=np.float64)
    for name in gains[0] if gains else ():
        joined[f"theory/{name}"] = np.array([gain[name] for gain in gains] + [np.nan] * (len(configs) - len(gains)))
    return joined if several else {name: values[0] for name, values in joined.items()}


def run(options):
    """Do what the command line asks for. Returns the exit code; raises UserError."""
    if options.show is not None:
        for name, value in vars(options).items():
            if name != "show" and value is not None and value is not False:
                raise UserError(f"--show: prints a function and nothing else, {flag(name)} has no place beside it")
        show_source(options.show)
        return 0
    configs = make_configs(options)
    check_options(options, configs)
    console, kept = Screen(record=options.export is not None), {}
    code = 130
    try:
        code = work(console, options, configs, kept)
    finally:
        with uninterrupted():
            code = max(code, write_results(console, options, configs, kept))
    return code


@contextlib.contextmanager
def uninterrupted():
    """Ignore Ctrl-C, which must not lose what is being saved. Only a main thread gets one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)


def work(console, options, configs, kept):
    """Compute and show, kept collecting the arrays. Returns the exit code, whatever happens."""
    try:
        with np.errstate(all="ignore"):  # a loss that is not finite is reported by check_finite
            if configs[0].steps > 1:
                run_trainings(console, configs, kept)
            else:
                run_walk_through(console, options, configs[0], kept)
    except KeyboardInterrupt:
        say(console, "\nInterrupted.")
        return 130
    except Diverged as problem:
        return complain(problem)
    except OSError as problem:  # the output is full
        silence(sys.stdout)
        return complain(problem)
    except MemoryError as problem:
        return complain(str(problem) or "not enough memory")
    return 0


def write_results(console, options, configs, kept):
    """Write the files of --save and --export. Returns the exit code: 1 where one of them failed."""
    betas = [config.beta for config in configs]
    config = json.dumps({**asdict(configs[0]), "beta": betas if len(betas) > 1 else betas[0]})
    kept = {name: array for name, array in kept.items() if name != "logits"}
    code = 0
    for name, write in (
        ("save", lambda path: write_whole(path, lambda file: np.savez(file, config=config, **kept))),
        ("export", lambda path: export(console, path)),
    ):
        path = getattr(options, name)
        try:
            if path is not None:
                write(Path(path))
        except OSError as problem:
            code = complain(f"{flag(name)}: cannot write {path!r} ({problem.strerror})")
    return code


def complain(problem, code=1):
    """One sentence on stderr, if there is one. Returns the exit code."""
    sentence = "".join(letter if letter.isprintable() else "?" for letter in str(problem))
    try:
        if sys.stderr:
            print(f"rlhf_loop_pseudo.py: {sentence}", file=sys.stderr)
    except OSError:
        silence(sys.stderr)
    return code


def interrupt_once(*_):
    """Ctrl-C: stop, and ignore a second one, which could lose what the first one saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv=None):
    """Run the command line argv, sys.argv without it. Returns the exit code: 0, 1, 2 or 130."""
    codecs.register_error("spell_out", spell_out)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="spell_out")
    try:
        return run(parse_arguments(argv))
    except SystemExit as done:  # --help
        return done.code or 0
    except KeyboardInterrupt:
        return 130
    except UserError as problem:
        return complain(problem, code=2)
    except (OSError, MemoryError) as problem:
        return complain(str(problem) or "not enough memory")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt_once)
    exit_code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    sys.exit(exit_code)
