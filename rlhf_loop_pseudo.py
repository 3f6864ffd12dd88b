# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "rich>=13.8"]
# ///
"""The complete RLHF-PPO training loop in one file, with real numbers.

    python rlhf_loop_pseudo.py                               one step, every tensor shown
    python rlhf_loop_pseudo.py --preset letters --steps 200  human feedback, then training

Reinforcement learning from human feedback, as in InstructGPT, with four toy models: the actor writes and learns, the
critic predicts its reward, the reward model scores whole responses, the reference is the actor as it began. The steps:

    1. sample prompts                                 sample_prompts
    2. the actor generates responses                  generate
    3. the reward model scores them                   score_responses
    4. the reference: how far has the actor moved?    token_logprobs, kl_penalty
    5. score and KL become one reward per token       shape_rewards
    6. GAE: how much better than the critic thought?  critic_values, gae, whiten; or group_advantages
    7. PPO for the actor, regression for the critic   ppo_loss, value_loss, actor_gradients, critic_gradients, adam_step

The lesson, by sections: 2 the knobs, 3 the loop, 4 these functions, 5 the human and the reward model, before the loop,
6 the models, forward and backward. The rest is no part of it: 7 measuring, 8 the presentation, 9 the command line.

The models are tiny and start at random; what happens to them is real: gradients, masks, clipping and Adam are exact.
Letters in shape comments: B sequences, P prompt tokens, T response tokens, V vocabulary,
D width, S sequence (P + T or less), N any number of rows. Log probabilities and KL are in nats.
"""

import os
import sys

if __name__ == "__main__":  # at these sizes a second BLAS thread gains nothing and, on a busy machine, costs a lot
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import ast
import inspect
import io
import json
import math
import re
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

try:
    import numpy as np
    from rich.console import Console
    from rich.terminal_theme import TerminalTheme
    from rich.text import Text
    from rich.theme import Theme
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed. Run: python -m pip install numpy rich")

# Laid out by hand from here on: what stands between anchors fits a page of 88 columns.
# fmt: off
# ------------------------------------------------------------------ 2. configuration

LETTERS = "abcdefghijklmnopqrstuvwxyz."  # the last ends a word
# A rule is a pair: what is allowed, in words, and the test for it.
NOT_NEGATIVE = "a finite number of at least 0", lambda x: 0 <= x < math.inf
FRACTION = "a number from 0 to 1", lambda x: 0 <= x <= 1
BETWEEN = "a number between 0 and 1, both excluded", lambda x: 0 < x < 1

def at_least(least):
    """The rule for a whole number that has a lower bound."""
    return f"a whole number of at least {least}", lambda x: x >= least and x % 1 == 0

def one_of(*names):
    """The rule for a name."""
    return f"one of {', '.join(names)}", lambda x: x in names

def knob(default, rule, meaning):
    """A field of Config: its default, what is allowed, and what it means."""
    return field(default=default, metadata={"rule": rule, "meaning": meaning})

@dataclass(frozen=True)
class Config:
    """Everything that affects the algorithm; raises ValueError for a value that is not allowed."""

    batch_size: int = knob(4, at_least(1), "B, responses in a batch")
    prompt_length: int = knob(64, at_least(1), "P, tokens in a prompt")
    response_length: int = knob(128, at_least(1), "T, most tokens in a response")
    vocab_size: int = knob(50257, at_least(2), "V; the last token ends a text; GPT-2 has 50257")
    width: int = knob(32, at_least(1), "D, numbers in a hidden state; GPT-2 has 768")
    preference_pairs: int = knob(2048, at_least(1), "choices of the human, where V is 27 and text can be read")
    steps: int = knob(1, at_least(1), "batches to train on, each by the seven steps; 1 is the walk-through")
    beta: float = knob(0.02, NOT_NEGATIVE, "price of KL, score per nat; 0.02 is InstructGPT's")
    kl_estimator: str = knob("k1", one_of("k1", "k2", "k3"), "KL of a token; as a reward only k1 has KL's gradient")
    advantage: str = knob("gae", one_of("gae", "rloo", "grpo"), "from a critic (gae), or by comparison in a group")
    group_size: int = knob(4, at_least(2), "responses to each prompt, with rloo and grpo")
    gamma: float = knob(1.0, FRACTION, "discount per token")
    lam: float = knob(0.95, FRACTION, "GAE's lambda, per token")
    clip: float = knob(0.2, BETWEEN, "PPO's epsilon: past 1 +- this, a ratio new / old gains nothing")
    ppo_epochs: int = knob(4, at_least(1), "updates on each batch")
    learning_rate: float = knob(5e-4, NOT_NEGATIVE, "Adam's, falling to 0 over the steps")
    drift: float = knob(0.75, NOT_NEGATIVE, "how far the actor starts off the reference, in deviations; 0 in training")
    seed: int = knob(0, at_least(0), "seed of all randomness")

    def __post_init__(self):
        for each in fields(self):
            value, (allowed, holds) = getattr(self, each.name), each.metadata["rule"]
            if not holds(value):
                raise ValueError(f"--{each.name.replace('_', '-')}: {value!r} is not {allowed}")
        if self.advantage != "gae" and self.batch_size % self.group_size:
            raise ValueError(f"--batch-size: {self.batch_size} is no multiple of --group-size, {self.group_size}")

    @property
    def readable(self):
        """Whether tokens are letters, which the human can read and judge."""
        return self.vocab_size == len(LETTERS)

# ------------------------------------------------------------------ 3. the loop

# ANCHOR: core_loop
def core_loop(models, config, rng):
    """The seven steps, for each of config.steps batches: RLHF with PPO.

    A generator of named arrays, a dict for each of the seven: whoever drains it decides
    whether to show, save or only train. Actor and critic change in place, the others
    never. With rloo or grpo there is no critic, but a group of responses to a prompt.
    """
    actor, critic, reward_model, reference = models
    actor_state, critic_state, eos_token = {}, {}, config.vocab_size - 1
    group_size = 1 if critic else config.group_size
    for step in range(config.steps):
        # 1. Sample prompts
        count = config.batch_size // group_size
        prompts = sample_prompts(rng, count, config.prompt_length, config.vocab_size)
        prompts = np.repeat(prompts, group_size, axis=0)  # (count, P) -> (B, P)
        yield {"prompts": prompts}

        # 2. Generate
        responses, mask, old_logprobs, logits = generate(
            actor, prompts, config.response_length, rng, eos_token,
            keep_logits=config.steps == 1)  # three (B, T), one (B, T, V) or None
        yield {"responses": responses, "mask": mask,
               "old_logprobs": old_logprobs, "logits": logits}
        del logits  # only shown, and the largest array of all

        # 3. Score
        scores = score_responses(reward_model, prompts, responses, mask)  # (B,)
        yield {"scores": scores}

        # 4. KL penalty
        ref_logprobs = token_logprobs(reference, prompts, responses) * mask
        kl = kl_penalty(old_logprobs, ref_logprobs, config.kl_estimator)  # (B, T)
        yield {"ref_logprobs": ref_logprobs, "kl": kl}

        # 5. Total rewards
        rewards = shape_rewards(scores, kl, mask, config.beta)  # (B, T)
        yield {"rewards": rewards}

        # 6. Advantages
        if critic:
            values = critic_values(critic, prompts, responses) * mask
            advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
            besides = {"values": values, "returns": returns}
        else:
            advantages = group_advantages(rewards, mask, group_size, config.advantage)
            besides = {}
        scaled = config.advantage == "grpo"  # by the deviation of each group
        whitened = advantages if scaled else whiten(advantages, mask)
        yield {**besides, "advantages": advantages, "whitened": whitened}

        # 7. PPO update
        learning_rate = config.learning_rate * (1 - step / config.steps)
        actor_losses, critic_losses, ratios = [], [], []
        for _ in range(config.ppo_epochs):
            gradients, actor_loss, ratio = actor_gradients(
                actor, prompts, responses, old_logprobs, whitened, mask, config.clip)
            adam_step(actor, gradients, actor_state, learning_rate)
            actor_losses.append(actor_loss)
            ratios.append(ratio)
            if critic:
                gradients, critic_loss = critic_gradients(
                    critic, prompts, responses, returns, mask)
                adam_step(critic, gradients, critic_state, learning_rate)
                critic_losses.append(critic_loss)
        yield {"ratio": np.stack(ratios), "actor_loss": np.array(actor_losses),
               "critic_loss": np.array(critic_losses), "lr": np.array(learning_rate)}
# ANCHOR_END: core_loop

# ------------------------------------------------------------------ 4. the seven steps

# ANCHOR: sample_prompts
def sample_prompts(rng, batch_size, prompt_length, vocab_size):
    """Step 1. Draw random prompts, without the end token.

    Returns (B, P) int, each from 0 to V - 2: token V - 1 ends a text.
    Source: x ~ D in Ziegler et al. 2019, section 2.
    """
    return rng.integers(0, vocab_size - 1, size=(batch_size, prompt_length))
# ANCHOR_END: sample_prompts

# ANCHOR: generate
def generate(actor, prompts, response_length, rng, eos_token, keep_logits=True):
    """Step 2. Sample a response to each prompt, token by token.

    token[t] ~ softmax(hidden[P - 1 + t] @ head), temperature 1

    The context is a running sum, so that each token costs one position, not the whole
    sequence: what a key-value cache does for a transformer.

    prompts (B, P) int. Returns (responses, mask, logprobs, logits): responses (B, T)
    int, eos_token after the end; mask (B, T), 1 up to and including the first end
    token; logprobs (B, T) in nats, 0 at padding; logits (B, T, V), None unless
    keep_logits. Source: Radford et al. 2018 (GPT), equations 1 and 2.
    """
    (batch_size, prompt_length), head = prompts.shape, actor["head"]
    responses = np.full((batch_size, response_length), eos_token)
    mask, logprobs = np.zeros((2, *responses.shape), dtype=head.dtype)
    logits = None
    if keep_logits:
        logits = np.empty((*responses.shape, head.shape[1]), dtype=head.dtype)
    context_sum = actor["embed"][prompts].sum(axis=1)  # (B, P, D) -> (B, D)
    token, running = prompts[:, -1], np.ones(batch_size, dtype=bool)
    for t in range(response_length):
        context = context_sum / (prompt_length + t) ** 0.5
        hidden = np.tanh(actor["embed"][token] + context @ actor["mix"])  # (B, D)
        token_logits = hidden @ head  # (B, D) -> (B, V)
        sampled, logprob = sample_tokens(token_logits, rng)  # (B, V) -> (B,)
        token = np.where(running, sampled, eos_token)
        responses[:, t], mask[:, t], logprobs[:, t] = token, running, running * logprob
        if keep_logits:
            logits[:, t] = token_logits
        running = token != eos_token
        context_sum = context_sum + actor["embed"][token]
    return responses, mask, logprobs, logits
# ANCHOR_END: generate

# ANCHOR: score_responses
def score_responses(reward_model, prompts, responses, mask):
    """Step 3. Score each response by one real number.

    score = hidden[last real token] @ head, plus the bias of a trained model

    prompts (B, P), responses, mask (B, T). Returns (B,). Raises ValueError for shapes
    that differ or an empty row. Source: InstructGPT (Ouyang et al. 2022), section 3.5.
    """
    hidden, _ = backbone(reward_model, np.concatenate([prompts, responses], axis=1))
    last = hidden[last_positions(prompts, responses, mask)]  # (B, P + T, D) -> (B, D)
    return (last @ reward_model["head"])[:, 0] + reward_model.get("bias", 0.0)
# ANCHOR_END: score_responses

# ANCHOR: token_logprobs
def token_logprobs(model, prompts, responses):
    """Step 4. Log probability of each response token, at once.

    logprob[t] = log softmax(hidden[P - 1 + t] @ head)[responses[t]]

    prompts (B, P), responses (B, T). Returns (B, T) in nats, padding not masked.
    Source: Radford et al. 2018 (GPT), equations 1 and 2.
    """
    hidden, _ = backbone(model, response_inputs(prompts, responses))  # (B, S, D)
    states = hidden[:, prompts.shape[1] - 1 :]  # (B, S, D) -> (B, T, D)
    logprobs, _ = chosen_logprobs(states, model["head"], responses)  # (B, T)
    return logprobs
# ANCHOR_END: token_logprobs

# ANCHOR: kl_penalty
def kl_penalty(logprobs, ref_logprobs, estimator="k1"):
    """Step 4. Estimate KL(actor || reference), token by token.

    k1 = lp - ref    k2 = (lp - ref)² / 2    k3 = exp(ref - lp) - 1 - (ref - lp)

    k1 and k3 have the KL as their mean, k2 nearly; k1 may be negative on a token, the
    others never. In the reward only k1 trains RLHF: a reward moves the policy along
    E[∇ log p * kl], which is ∇ KL for k1, but for k2 and k3 vanishes to first order
    where actor and reference are equal: with these the actor drifts off.

    logprobs, ref_logprobs (B, T). Returns (B, T), all in nats. Raises ValueError for
    shapes that differ or another estimator.
    Source: Schulman 2020, "Approximating KL Divergence".
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError("logprobs, ref_logprobs: shapes differ")
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
    """Step 5. Merge score and KL penalty: a reward per token.

    reward[t] = -beta * kl[t], and the score on top of it at the last real token, where
    the response is complete and can be judged. A row's sum is score - beta * its KL.

    scores (B,), kl (B, T) in nats, mask (B, T), beta in score per nat. Returns (B, T),
    0 at padding. Raises ValueError for shapes that do not fit or an empty row.
    Source: Ziegler et al. 2019, equation 2.
    """
    if kl.shape != mask.shape or scores.shape != mask.shape[:1]:
        raise ValueError("scores, kl, mask: shapes are not (B,), (B, T), (B, T)")
    real = mask.astype(bool)
    if not real.any(axis=1).all():
        raise ValueError("mask: a row without a real token has no place for its score")
    last = real.shape[1] - 1 - real[:, ::-1].argmax(axis=1)  # (B, T) -> (B,)
    rewards = np.zeros(kl.shape, dtype=np.result_type(scores, kl))
    rewards[np.arange(len(last)), last] = scores
    return rewards - float(beta) * np.where(real, kl, 0)
# ANCHOR_END: shape_rewards

# ANCHOR: critic_values
def critic_values(critic, prompts, responses):
    """Step 6. Predict of each state the reward still to come.

    value[t] = hidden[P - 1 + t] @ head: the state before token t is chosen

    prompts (B, P), responses (B, T). Returns (B, T), in units of reward, padding not
    masked. Source: V in Schulman et al. 2016, section 2.
    """
    hidden, _ = backbone(critic, response_inputs(prompts, responses))  # (B, S, D)
    states = hidden[:, prompts.shape[1] - 1 :]  # (B, S, D) -> (B, T, D)
    return (states @ critic["head"])[..., 0]  # (B, T, D) -> (B, T)
# ANCHOR_END: critic_values

# ANCHOR: gae
def gae(rewards, values, mask, gamma, lam):
    """Step 6. Generalized advantage estimation.

    δ[t] = reward[t] + γ value[t + 1] - value[t]
    advantage[t] = δ[t] + γ λ advantage[t + 1]
    return[t] = advantage[t] + value[t]

    t + 1 is the next real token; past the last one, value and advantage are 0.
    λ = 0 leaves δ, the TD error; λ = 1 is the Monte Carlo return minus the value.
    rewards, values, mask (B, T); gamma, lam in [0, 1]. Returns (advantages, returns),
    (B, T) both, 0 at padding. Raises ValueError for shapes that differ.
    Source: Schulman et al. 2016, equations 11 and 16 to 18.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError("rewards, values, mask: shapes differ")
    real = mask.astype(bool)
    rewards, values = np.where(real, rewards, 0.0), np.where(real, values, 0.0)
    advantages = np.zeros(mask.shape, dtype=np.result_type(rewards, values))
    next_value = next_advantage = np.zeros(len(mask), dtype=advantages.dtype)
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_advantage = np.where(real[:, t], advantages[:, t], next_advantage)
        next_value = np.where(real[:, t], values[:, t], next_value)
    advantages = np.where(real, advantages, 0.0)
    return advantages, advantages + values
# ANCHOR_END: gae

# ANCHOR: group_advantages
def group_advantages(rewards, mask, group_size, method):
    """Step 6 without a critic. Compare the responses of a group.

    R is the sum of a response's rewards; mean and deviation are those of its group.

    rloo: R - mean of the other R's
    grpo: (R - mean) / (unbiased standard deviation + 1e-6)

    rewards, mask (B, T), a group in group_size adjacent rows; method "rloo" or "grpo".
    Returns (B, T), the same for all real tokens of a response, 0 at padding. Raises
    ValueError for other shapes or methods, and rows not in whole groups of 2 or more.
    Source: Ahmadian et al. 2024, section 3; Shao et al. 2024, section 4.1.2.
    """
    if rewards.shape != mask.shape or group_size < 2 or len(mask) % group_size:
        raise ValueError("rewards, mask: shapes differ, or no whole groups of 2 and up")
    if method not in ("rloo", "grpo"):
        raise ValueError(f"method: {method!r} is not rloo or grpo")
    rewards = np.where(mask, rewards, 0.0)
    totals = rewards.sum(axis=1, dtype=np.float64).reshape(-1, group_size)  # (B / G, G)
    if method == "rloo":
        others = (totals.sum(axis=1, keepdims=True) - totals) / (group_size - 1)
        advantages = totals - others
    else:
        centered = totals - totals.mean(axis=1, keepdims=True)
        advantages = centered / (totals.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    advantages = advantages.reshape(-1, 1).astype(rewards.dtype)  # (B / G, G) -> (B, 1)
    return np.where(mask, advantages, 0.0)  # (B, 1) -> (B, T)
# ANCHOR_END: group_advantages

# ANCHOR: whiten
def whiten(x, mask):
    """Step 6. Shift and scale to mean 0 and variance 1.

    Over the real tokens: (x - mean) / sqrt(variance + 1e-8), the variance unbiased
    (divided by n - 1). The sums are in float64: in float32 equal numbers would differ.
    x, mask (B, T). Returns (B, T), 0 at padding. Raises ValueError for shapes that
    differ or no real token. Source: masked_whiten in TRL.
    """
    if x.shape != mask.shape or not mask.any():
        raise ValueError("mask: needs the shape of x, and a real token")
    real = x[mask.astype(bool)].astype(np.float64)  # (B, T) -> (N,)
    variance = real.var(ddof=min(1, len(real) - 1))
    whitened = (x - float(real.mean())) / float(np.sqrt(variance + 1e-8))
    return np.where(mask, whitened, 0.0)
# ANCHOR_END: whiten

# ANCHOR: ppo_loss
def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip):
    """Step 7. PPO's clipped policy loss and its derivative.

    ratio = exp(new - old)
    loss = mean over real tokens of -min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)
    d loss / d new = -ratio * A / n where ratio * A is the smaller of the two, else 0

    The minimum takes away the gain, and so the gradient, of moving the ratio past the
    clip. All (B, T), log probabilities in nats. Returns (loss, d_loss/d_new_logprobs,
    ratio): scalar, (B, T), (B, T), 0 at padding. Raises ValueError for shapes that
    differ or no real token. Source: Schulman et al. 2017, equation 7.
    """
    if not new_logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape:
        raise ValueError("new_logprobs, old_logprobs, advantages, mask: shapes differ")
    if not mask.any():
        raise ValueError("mask: no real token to learn from")
    n = int(np.count_nonzero(mask))
    log_ratio = np.where(mask, new_logprobs, 0) - np.where(mask, old_logprobs, 0)
    ratio = np.where(mask, np.exp(log_ratio), 0.0)
    advantages = np.where(mask, advantages, 0)
    unclipped = ratio * advantages
    clipped = np.clip(ratio, 1 - float(clip), 1 + float(clip)) * advantages
    loss = -np.minimum(unclipped, clipped).sum() / n
    return loss, np.where(unclipped <= clipped, -unclipped, 0.0) / n, ratio
# ANCHOR_END: ppo_loss

# ANCHOR: value_loss
def value_loss(values, returns, mask):
    """Step 7. The critic's squared error and its derivative.

    loss = mean over real tokens of (value - return)²
    d loss / d value = 2 (value - return) / n

    All (B, T). Returns (loss, d_loss/d_values): scalar, (B, T), 0 at padding. Raises
    ValueError for shapes that differ or no real token.
    Source: Schulman et al. 2017, section 5 (L^VF).
    """
    if not values.shape == returns.shape == mask.shape or not mask.any():
        raise ValueError("values, returns, mask: shapes differ, or no real token")
    n = int(np.count_nonzero(mask))
    error = np.where(mask, values, 0) - np.where(mask, returns, 0)
    return (error**2).sum() / n, 2 * error / n
# ANCHOR_END: value_loss

# ANCHOR: actor_gradients
def actor_gradients(actor, prompts, responses, old_logprobs, advantages, mask, clip):
    """Step 7. Gradients of ppo_loss for the actor's weights.

    Forward, loss, backward, with
    d loss / d logits = d_loss/d_new_logprob * (one-hot of the token - softmax(logits))

    prompts (B, P), the others (B, T). Returns (gradients, loss, ratio): keyed like the
    parameters, scalar, (B, T) with 0 at padding. Raises ValueError as ppo_loss does.
    Source: Schulman et al. 2017, equation 7, by the chain rule.
    """
    inputs, head = response_inputs(prompts, responses), actor["head"]
    hidden, context = backbone(actor, inputs)  # (B, S, D) both
    states = hidden[:, prompts.shape[1] - 1 :]  # (B, S, D) -> (B, T, D)
    new_logprobs, log_sums = chosen_logprobs(states, head, responses)  # (B, T) both

    loss, d_new_logprobs, ratio = ppo_loss(
        new_logprobs, old_logprobs, advantages, mask, clip)

    d_states, d_head = chosen_logprobs_gradients(
        states, head, responses, log_sums, d_new_logprobs)
    d_hidden = np.zeros_like(hidden)
    d_hidden[:, prompts.shape[1] - 1 :] = d_states  # (B, T, D) -> (B, S, D)
    gradients = backbone_gradients(actor, inputs, hidden, context, d_hidden)
    return {**gradients, "head": d_head}, loss, ratio
# ANCHOR_END: actor_gradients

# ANCHOR: critic_gradients
def critic_gradients(critic, prompts, responses, returns, mask):
    """Step 7. Gradients of value_loss for the critic's weights.

    prompts (B, P), the others (B, T). Returns (gradients, loss): keyed like the
    parameters, scalar. Raises ValueError as value_loss does.
    Source: Schulman et al. 2017, section 5, by the chain rule.
    """
    inputs, head = response_inputs(prompts, responses), critic["head"]
    hidden, context = backbone(critic, inputs)  # (B, S, D) both
    states = hidden[:, prompts.shape[1] - 1 :]  # (B, S, D) -> (B, T, D)
    values = (states @ head)[..., 0]  # (B, T, D) -> (B, T)

    loss, d_values = value_loss(values, returns, mask)

    d_head = np.einsum("btd,bt->d", states, d_values)[:, None]  # (D, 1)
    d_hidden = np.zeros_like(hidden)
    d_hidden[:, prompts.shape[1] - 1 :] = d_values[..., None] * head[:, 0]
    gradients = backbone_gradients(critic, inputs, hidden, context, d_hidden)
    return {**gradients, "head": d_head}, loss
# ANCHOR_END: critic_gradients

# ANCHOR: adam_step
def adam_step(params, gradients, state, learning_rate):
    """Step 7. One Adam update, IN PLACE; returns None.

    m = 0.9 m + 0.1 g    v = 0.999 v + 0.001 g²    p -= rate * m̂ / (sqrt(v̂) + 1e-8)

    with m̂ = m / (1 - 0.9^t), v̂ = v / (1 - 0.999^t). Changes params and state, which
    starts as {} and holds t, m and v. params, m, v are keyed as gradients are. Raises
    ValueError for shapes that differ. Source: Kingma & Ba 2015, algorithm 1.
    """
    for name, g in gradients.items():
        if g.shape != params[name].shape:
            raise ValueError(f"gradients: {name} has not its parameter's shape")
    t = state["t"] = state.get("t", 0) + 1
    ms, vs = state.setdefault("m", {}), state.setdefault("v", {})
    for name, g in gradients.items():
        m = ms[name] = 0.9 * ms.get(name, 0) + 0.1 * g
        v = vs[name] = 0.999 * vs.get(name, 0) + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        params[name] -= learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8)
# ANCHOR_END: adam_step

# ------------------------------------------------------------------ 5. before the loop: human feedback

# ANCHOR: human_scores
def human_scores(responses, mask, vocab_size):
    """What the human thinks of each response: the gold reward.

    (1 - |2 v - 1|) * distinct letters / letters, v the share of vowels among them

    The human is simulated: best are words that mix vowels and consonants evenly and
    repeat no letter. Tokens from 0 are a, b, ...; token V - 1 ends the word and is no
    letter. Training never sees these scores.

    responses, mask (B, T). Returns (B,) in [0, 1], 0 for an empty word.
    Source: the role of the gold reward model in Gao et al. 2023; the rule is ours.
    """
    real = mask.astype(bool) & (responses != vocab_size - 1)  # (B, T)
    vowels = (np.isin(responses, [0, 4, 8, 14, 20]) & real).sum(axis=1)  # a, e, i, o, u
    distinct = [len(set(word[kept])) for word, kept in zip(responses, real)]
    letters = np.maximum(real.sum(axis=1), 1)
    return (1 - abs(2 * vowels / letters - 1)) * distinct / letters
# ANCHOR_END: human_scores

# ANCHOR: collect_preferences
def collect_preferences(reference, config, rng):
    """Let the human choose between two responses to each prompt.

    P(the first is chosen) = sigmoid(8 (human(first) - human(second)))

    so that labels are noisy, as people's are. The reference writes both. With
    N = config.preference_pairs, returns (prompts, responses, mask) of 2 N rows: the
    chosen responses, then the rejected ones in the same order; (2 N, P), (2 N, T) both.
    Source: Bradley & Terry 1952; Christiano et al. 2017, section 2.2.
    """
    vocab_size, pairs = config.vocab_size, config.preference_pairs
    prompts = sample_prompts(rng, pairs, config.prompt_length, vocab_size)
    prompts = np.concatenate([prompts, prompts])  # (N, P) -> (2 N, P)
    responses, mask, _, _ = generate(
        reference, prompts, config.response_length, rng, vocab_size - 1, False)
    first, second = np.split(human_scores(responses, mask, vocab_size), 2)  # (N,) both
    first_wins = rng.random(pairs) < 1 / (1 + np.exp(-8 * (first - second)))
    chosen = np.arange(pairs) + np.where(first_wins, 0, pairs)
    rejected = np.arange(pairs) + np.where(first_wins, pairs, 0)
    order = np.concatenate([chosen, rejected])
    return prompts, responses[order], mask[order]
# ANCHOR_END: collect_preferences

# ANCHOR: preference_loss
def preference_loss(chosen, rejected):
    """Bradley-Terry: how badly scores explain the choices.

    loss = mean of -log sigmoid(chosen - rejected)
    d loss / d chosen = -sigmoid(rejected - chosen) / n = -d loss / d rejected

    chosen, rejected (N,): the scores of both responses of each pair.
    Returns (loss, d_chosen, d_rejected): scalar in nats, (N,), (N,).
    Raises ValueError for shapes that differ or no pair.
    Source: Stiennon et al. 2020, section 3.4; InstructGPT, equation 1.
    """
    if chosen.shape != rejected.shape or not chosen.size:
        raise ValueError("chosen, rejected: shapes differ, or no pair")
    losses = np.logaddexp(0, rejected - chosen)  # -log sigmoid(x) = log(1 + exp(-x))
    d_rejected = np.exp(rejected - chosen - losses) / len(losses)  # a sigmoid
    return losses.mean(), -d_rejected, d_rejected
# ANCHOR_END: preference_loss

# ANCHOR: reward_gradients
def reward_gradients(reward_model, prompts, responses, mask):
    """Gradients of preference_loss for the reward model.

    prompts (2 N, P), responses, mask (2 N, T), the chosen first, as collect_preferences
    returns them. Returns (gradients, loss): keyed like the parameters, scalar. Raises
    ValueError as score_responses does. Source: InstructGPT, equation 1, chain rule.
    """
    tokens, head = np.concatenate([prompts, responses], axis=1), reward_model["head"]
    hidden, context = backbone(reward_model, tokens)  # (2 N, P + T, D) both
    last = last_positions(prompts, responses, mask)
    scores = hidden[last] @ head[:, 0]  # (2 N, P + T, D) -> (2 N, D) -> (2 N,)
    chosen, rejected = np.split(scores, 2)  # (N,) both

    loss, d_chosen, d_rejected = preference_loss(chosen, rejected)

    d_scores = np.concatenate([d_chosen, d_rejected])[:, None]  # (2 N, 1)
    d_hidden = np.zeros_like(hidden)
    d_hidden[last] = d_scores * head[:, 0]  # (2 N, D)
    gradients = backbone_gradients(reward_model, tokens, hidden, context, d_hidden)
    return {**gradients, "head": hidden[last].T @ d_scores}, loss
# ANCHOR_END: reward_gradients

# ANCHOR: train_reward_model
def train_reward_model(reward_model, prompts, responses, mask, rng):
    """Learn to score as the human chose.

    200 Adam updates on 128 pairs each, from the given weights: the reference's backbone
    and a random head. Then scores are shifted and scaled to mean 0 and standard
    deviation 1 over these responses. prompts, responses, mask: as collect_preferences
    returns them. Returns (reward_model, losses): a new model with a bias, and (200,).
    Source: Stiennon et al. 2020, section 3.4; InstructGPT, section 3.5.
    """
    reward_model = {p: reward_model[p].copy() for p in ("embed", "mix", "head")}
    pairs, state, losses = len(prompts) // 2, {}, []
    for learning_rate in np.linspace(2e-3, 0, 200, endpoint=False):
        chosen = rng.integers(0, pairs, size=128)
        rows = np.concatenate([chosen, chosen + pairs])  # (256,): each pair's two rows
        gradients, loss = reward_gradients(
            reward_model, prompts[rows], responses[rows], mask[rows])
        adam_step(reward_model, gradients, state, float(learning_rate))
        losses.append(loss)
    scores = np.float64(score_responses(reward_model, prompts, responses, mask))
    reward_model["head"] /= scores.std()
    bias = -scores.mean() / scores.std()
    reward_model["bias"] = np.array([bias], dtype=reward_model["head"].dtype)
    return reward_model, np.array(losses)
# ANCHOR_END: train_reward_model

def learn_from_human(models, config, rng):
    """Collect preferences, train the reward model, judge it on fresh pairs. Returns the models, with that one, and what
    was seen: accuracy is the share of fresh pairs in which the model agrees with the choice, best_accuracy that in
    which the human's own opinion does: choices are noisy, and no scorer can expect more."""
    preferences = collect_preferences(models.reference, config, rng)
    reward_model, losses = train_reward_model(models.reward_model, *preferences, rng)
    prompts, responses, mask = collect_preferences(models.reference, replace(config, preference_pairs=2048), rng)
    scores = score_responses(reward_model, prompts, responses, mask)
    human = human_scores(responses, mask, config.vocab_size)
    seen = {"losses": losses, "responses": responses, "mask": mask, "scores": scores, "human": human}
    for name, opinion in (("accuracy", scores), ("best_accuracy", human)):
        chosen, rejected = np.split(opinion, 2)
        seen[name] = np.mean(chosen > rejected) + np.mean(chosen == rejected) / 2
    return models._replace(reward_model=reward_model), seen

# ------------------------------------------------------------------ 6. the models and their gradients

Models = namedtuple("Models", "actor critic reward_model reference")  # the critic is None with rloo and grpo

def init_weights(rng, rows, columns, deviation):
    """Draw a float32 matrix uniformly around 0 with the given standard deviation."""
    return (rng.random((rows, columns), dtype=np.float32) - np.float32(0.5)) * np.float32(12**0.5 * deviation)

def init_model(rng, vocab_size, width, out_width, scale=1.0):
    """Draw a model in float32: {"embed": (V, D), "mix": (D, D), "head": (D, out_width)}. Context outweighs the current
    token, so that a late token's state still depends on the whole text."""
    return {
        "embed": init_weights(rng, vocab_size, width, 0.1),
        "mix": init_weights(rng, width, width, 5 / width**0.5),
        "head": init_weights(rng, width, out_width, scale / width**0.5),
    }

def init_models(config, rng):
    """Start all four from one backbone, as RLHF starts them from one fine-tuned model. drift sets the actor off the
    reference, and the critic's head off zero, as training would. The reward model is random until one is trained."""
    sizes, drift = (config.vocab_size, config.width), np.float32(config.drift)
    reference = init_model(rng, *sizes, config.vocab_size)
    noise = init_model(rng, *sizes, config.vocab_size)
    critic, reward_model = ({"embed": reference["embed"].copy(), "mix": reference["mix"].copy()} for _ in range(2))
    critic["head"] = drift * init_weights(rng, config.width, 1, 1 / config.width**0.5)
    reward_model["head"] = init_weights(rng, config.width, 1, 2.5 / config.width**0.5)
    actor = {name: reference[name] + drift * noise[name] for name in reference}
    return Models(actor, critic if config.advantage == "gae" else None, reward_model, reference)

def response_inputs(prompts, responses):
    """All tokens but the last: response token t is predicted one position to its left, at P - 1 + t. (B, P + T - 1)."""
    return np.concatenate([prompts, responses[:, :-1]], axis=1)

def last_positions(prompts, responses, mask):
    """Where the last real tokens stand in prompts and responses: rows and positions, (B,) both, an index. Raises
    ValueError for shapes that differ or a row without one."""
    if mask.shape != responses.shape or not mask.any(axis=1).all():
        raise ValueError("mask: needs the shape of responses, and a 1 in each row")
    from_the_end = mask[:, ::-1].astype(bool).argmax(axis=1)  # (B, T) -> (B,)
    return np.arange(len(mask)), prompts.shape[1] + mask.shape[1] - 1 - from_the_end

def backbone(model, tokens):
    """Hidden states of a causal one-layer model. tokens (B, S) int. Returns (hidden, context), (B, S, D) both.

    context[t] = sum(embed[x[0..t]]) / sqrt(t + 1): attention to every token so far equally, at constant variance
    hidden[t] = tanh(embed[x[t]] + context[t] @ mix)
    """
    x = model["embed"][tokens]  # (B, S) -> (B, S, D)
    context = uniform_attention(x) @ x  # (S, S) @ (B, S, D)
    return np.tanh(x + context @ model["mix"]), context

def backbone_gradients(model, tokens, hidden, context, d_hidden):
    """Gradients of a loss with respect to embed and mix, given d_hidden = d loss / d hidden (B, S, D)."""
    d_before = d_hidden * (1 - hidden**2)  # through tanh
    d_mix = np.einsum("bsd,bse->de", context, d_before, optimize=True)
    d_x = d_before + uniform_attention(hidden).T @ (d_before @ model["mix"].T)
    return {"embed": sum_by_token(tokens, d_x, len(model["embed"])), "mix": d_mix}

def uniform_attention(x):
    """The weights with which position t attends to position s of x (B, S, D): 1 / sqrt(t + 1) up to t. (S, S)."""
    positions = np.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return np.tri(len(positions), dtype=x.dtype) / np.sqrt(positions)[:, None]

def log_softmax(logits):
    """log(exp(logits) / Σ exp(logits)) over the last axis, in a form that cannot overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

def draw(weights, rng):
    """Draw a column of each row, by weights that need not sum to 1: the first whose running sum reaches a random share
    of the total. (B, n) -> (B,)."""
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)  # in float32 the tail would be lost
    draws = (1 - rng.random(len(weights))) * cumulative[:, -1]  # above 0: what has no weight is never drawn
    return (cumulative >= draws[:, None]).argmax(axis=1)

def exact_kl(logits, reference, prompts, responses):
    """KL(actor || reference) over the whole vocabulary: Σ over v of p(v) (log p(v) - log q(v)), a position at a time.
    logits (B, T, V) are the actor's. Returns (B, T) in nats, without meaning at padding."""
    hidden, _ = backbone(reference, response_inputs(prompts, responses))  # (B, S, D)
    states, kl = hidden[:, prompts.shape[1] - 1 :], np.empty(responses.shape, dtype=logits.dtype)
    for t in range(responses.shape[1]):
        log_p, log_q = log_softmax(logits[:, t]), log_softmax(states[:, t] @ reference["head"])  # (B, V) both
        kl[:, t] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return kl

# From here to the end of the section things are there for speed: a running sum over the vocabulary is slow, and
# the logits of all tokens, an (N, V) matrix, would cost more in fresh memory than in arithmetic. So sample_tokens sums
# twice over fewer numbers, and chosen_logprobs and its gradients see slices of the vocabulary that stay in the
# processor's cache; the last line lets the C library keep freed arrays for the next.

SLICE = 1_000_000  # numbers: 4 MB

def sample_tokens(logits, rng):
    """Draw a token for each row from softmax(logits): one of √V blocks, then a token in it.

    logits (B, V). Returns (tokens, logprobs), (B,) both, in nats.
    """
    (count, vocab_size), size = logits.shape, int(np.ceil(logits.shape[1] ** 0.5))
    weights = np.zeros((count, size * size), dtype=logits.dtype)
    weights[:, :vocab_size] = np.exp(logits - logits.max(axis=1, keepdims=True))  # softmax, not yet divided by its sum
    rows, blocks = np.arange(count), weights.reshape(count, size, size)
    sums = blocks.sum(axis=2, dtype=np.float64)  # (B, √V, √V) -> (B, √V)
    block = draw(sums, rng)
    tokens = block * size + draw(blocks[rows, block], rng)
    return tokens, np.log(weights[rows, tokens] / sums.sum(axis=1))

def chosen_logprobs(states, head, tokens):
    """log softmax(states @ head) of the chosen tokens: state · head[token] - log Σ exp(state · head[v]), in nats.

    states (B, T, D), head (D, V), tokens (B, T). Returns (logprobs, log_sums), (B, T) both, one for the gradients.
    """
    flat = states.reshape(-1, states.shape[-1])  # (B, T, D) -> (N, D)
    log_sums = np.full(len(flat), -np.inf, dtype=states.dtype)
    for columns in vocabulary_slices(flat, head):
        logits = flat @ head[:, columns]  # (N, D) -> (N, v)
        highest = logits.max(axis=1)
        logits -= highest[:, None]
        sums = np.exp(logits, out=logits) @ np.ones(logits.shape[1], logits.dtype)  # faster than .sum
        log_sums = np.logaddexp(log_sums, highest + np.log(sums))
    log_sums = log_sums.reshape(tokens.shape)  # (N,) -> (B, T)
    return np.einsum("btd,dbt->bt", states, head[:, tokens]) - log_sums, log_sums

def chosen_logprobs_gradients(states, head, tokens, log_sums, d_logprobs):
    """Gradients of a loss, (d_states, d_head) of (B, T, D) and (D, V), given d_logprobs = d loss / d logprobs (B, T).

    d logprob / d logits = one-hot(token) - softmax
    """
    flat = states.reshape(-1, states.shape[-1])  # (B, T, D) -> (N, D)
    scale, log_sums, tokens = d_logprobs.reshape(-1, 1), log_sums.reshape(-1, 1), tokens.ravel()
    scaled = scale * flat  # (N, D): so that the (N, v) matrix need not be scaled itself
    d_states, d_head = scale * head.T[tokens], np.empty_like(head)  # the one-hot's share of d_states
    for columns in vocabulary_slices(flat, head):
        softmax = flat @ head[:, columns]  # (N, D) -> (N, v)
        softmax -= log_sums
        np.exp(softmax, out=softmax)
        d_states -= scale * (softmax @ head[:, columns].T)  # (N, v) -> (N, D)
        d_head[:, columns] = -scaled.T @ softmax  # (D, N) @ (N, v)
    d_head += sum_by_token(tokens, scaled, head.shape[1]).T  # the one-hot's share of d_head
    return d_states.reshape(states.shape), d_head

def sum_by_token(tokens, rows, vocab_size):
    """Add up the rows (..., D) of each token, (...) -> (V, D). On flat arrays np.add.at takes a sixth of the time."""
    width = rows.shape[-1]
    sums = np.zeros(vocab_size * width, dtype=rows.dtype)
    np.add.at(sums, (tokens[..., None] * width + np.arange(width)).ravel(), rows.ravel())
    return sums.reshape(vocab_size, width)

def vocabulary_slices(states, head):
    """Slices of the vocabulary in which the logits states @ head have at most SLICE numbers, or one column."""
    step = max(1, SLICE // len(states))
    return [slice(first, first + step) for first in range(0, head.shape[1], step)]

np.empty(8 * SLICE, dtype=np.float32)  # freed at once: from here on glibc keeps what is smaller

# ------------------------------------------------------------------ 7. measuring: no part of the algorithm

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
        if "kl" in stage:
            stage |= {name: kl_penalty(seen["old_logprobs"], seen["ref_logprobs"], name) for name in ("k1", "k2", "k3")}
            exact = exact_kl(seen.pop("logits"), models.reference, seen["prompts"], seen["responses"])  # frees them
            stage["exact_kl"] = exact * seen["mask"]
        if "values" in stage:  # GAE with lambda 0 is the TD error
            stage["td_errors"], _ = gae(seen["rewards"], seen["values"], seen["mask"], config.gamma, 0.0)
        if "ratio" in stage:
            check_finite(stage, 1)
            stage["clipped"] = is_clipped(stage["ratio"], seen["whitened"], config.clip)
        yield stage

def train(models, config, rng):
    """core_loop, drained a step at a time: yields (metrics, the first response's real tokens)."""
    data, step = {}, 0
    for stage in core_loop(models, config, rng):
        data.update(stage)
        if "ratio" in stage:
            check_finite(stage, step := step + 1)
            yield step_metrics(data, config, step), data["responses"][0][data["mask"][0] != 0]

def check_finite(stage, step):
    """Raises FloatingPointError where the losses of a step are not finite."""
    if not np.isfinite([*stage["actor_loss"], *stage["critic_loss"]]).all():
        raise FloatingPointError(f"step {step}: the loss is not finite; try a lower --learning-rate, --beta or --drift")

def step_metrics(data, config, step):
    """What a step of training is judged by, under TRL's names where it has one: of sums over a response the mean over
    the batch, of policy/, loss/ and val/ratio the mean over the epochs' real tokens. data holds the step's arrays."""
    mask, ratio, kl, score = data["mask"], data["ratio"], data["kl"].sum(axis=1).mean(), data["scores"].mean()
    log_ratio = np.log(np.maximum(np.where(mask, ratio, 1), 1e-37))  # (epochs, B, T), finite where exp underflowed
    metrics = {
        "objective/scores": score, "objective/kl": kl, "objective/entropy": -data["old_logprobs"].sum(axis=1).mean(),
        "objective/non_score_reward": 0.0 - config.beta * kl, "objective/rlhf_reward": score - config.beta * kl,
        "policy/approxkl_avg": 0.5 * real_mean(log_ratio**2, mask).mean(),
        "policy/clipfrac_avg": real_mean(is_clipped(ratio, data["whitened"], config.clip), mask).mean(),
        "loss/policy_avg": data["actor_loss"].mean(), "val/ratio": real_mean(ratio, mask).mean(),
        "val/num_eos_tokens": np.count_nonzero((data["responses"] == config.vocab_size - 1) & (mask != 0)),
        "val/response_length": np.count_nonzero(mask) / len(mask),
        "lr": data["lr"], "episode": step * config.batch_size,
    }
    if config.advantage == "gae":
        metrics["loss/value_avg"] = data["critic_loss"].mean()
    if config.readable:
        metrics["objective/human_scores"] = human_scores(data["responses"], mask, config.vocab_size).mean()
    return metrics

def attainable_gain(models, config, rng, prompt_count=32, response_count=128):
    """How much of what is possible training has reached, in J = E[score] - beta * E[KL]: floats, by name.

    No policy exceeds J* = E over prompts of beta * log E over reference responses of exp(score / beta) (Korbak et al.
    2022; Rafailov et al. 2023, equation 4), for beta = 0 the largest score. Few reference responses are good ones, so
    those of the actor are added, and every expectation is a mean over all with weights p / p_mixture that sum to 1
    (Veach & Guibas 1995, the balance heuristic). Then neither J exceeds J*, in theory as in the estimate, which is one
    from below: what neither policy writes is missing from it. J_start is the reference's. share, of J_star - J_start,
    is NaN where that is within three standard errors of nothing; share_error is its standard error over the prompts.
    Returns {} where this would take a second or so and more, and more than a fifth of the training besides.
    """
    passes, training = 6 * prompt_count * response_count, config.steps * config.batch_size * (3 + 4 * config.ppo_epochs)
    per_pass = (config.prompt_length + config.response_length) * config.width * (config.width + config.vocab_size)
    if passes > 0.2 * training and passes * per_pass > 2e9:
        return {}
    prompts = sample_prompts(rng, prompt_count, config.prompt_length, config.vocab_size)
    prompts, pool = np.repeat(prompts, response_count, axis=0), []
    for policy in (models.reference, models.actor):
        responses, mask, *_ = generate(policy, prompts, config.response_length, rng, config.vocab_size - 1, False)
        logprobs = [token_logprobs(each, prompts, responses) * mask for each in (models.actor, models.reference)]
        human = human_scores(responses, mask, config.vocab_size) if config.readable else np.full(len(mask), np.nan)
        scores = score_responses(models.reward_model, prompts, responses, mask)
        pool.append([scores, human, *(each.sum(axis=1) for each in logprobs)])
    pool = np.array(pool, dtype=np.float64).reshape(2, 4, prompt_count, response_count)
    scores, human, *logprobs = np.concatenate(pool, axis=2)  # (prompts, 2 * responses) each
    of_actor, of_reference = (log_softmax(each - np.logaddexp(*logprobs)) for each in logprobs)  # log weights
    start, best = (np.exp(of_reference) * scores).sum(axis=1), scores.max(axis=1)
    score, human, kl = ((np.exp(of_actor) * x).sum(axis=1) for x in (scores, human, of_actor - of_reference))
    if config.beta:
        best = best + config.beta * np.logaddexp.reduce((scores - best[:, None]) / config.beta + of_reference, axis=1)
    objective, stake = score - config.beta * kl, best - start  # (prompts,) both
    share = (objective - start).mean() / stake.mean()
    noise, stake_noise = (x.std(ddof=1) / len(x) ** 0.5 for x in (objective - start - share * stake, stake))
    means = {"J_start": start, "J": objective, "J_star": best, "score": score, "kl": kl, "human": human}
    share = share if stake.mean() > 3 * max(noise, stake_noise) else np.nan
    return {name: x.mean() for name, x in means.items()} | {"share": share, "share_error": noise / stake.mean()}

# ------------------------------------------------------------------ 8. the presentation: pages of text from arrays

# Whose number it is, in the terminal's own colours; [n] marks nobody's, and all stand out from dim narration
OWNERS = {"actor": "cyan", "critic": "magenta", "reward": "green", "reference": "bright_blue", "human": "red"}
NAMES = re.compile(f"\\b({'|'.join(OWNERS)})\\b")
LEGEND = NAMES.sub(r"[\1]\1[/]", "  actor writes, critic predicts, reward judges, reference stays, human decides")

def make_console(**options):
    """A console that prints text as it stands, in the owners' colours."""
    theme = Theme({name: f"not dim {style}" for name, style in {**OWNERS, "n": "bold"}.items()})
    system = None if os.environ.get("NO_COLOR") else "auto"  # rich alone would keep bold and dim
    return Console(color_system=system, highlight=False, emoji=False, theme=theme, **options)

def show(console, page):
    """Print a page and a blank line, nothing wrapped: titles without indent (bold), narration with four spaces (dim),
    and lines in which [actor]3[/] is the actor's number, and what follows a tab a dim note beside it."""
    for line in page.splitlines():
        line, _, note = line.partition("\t")
        narration = line.startswith("    ") and "[/]" not in line  # so its brackets are text
        text = Text(line, "dim") if narration else Text.from_markup(line, style="bold" if line[:1].strip() else "")
        if note:
            text.append(" " * max(38 - text.cell_len, 2)).append_text(Text.from_markup(note, style="dim"))
        text.rstrip()
        console.print(text, soft_wrap=True)
    console.print()

def table(columns, rows, gap="  "):
    """A page with a table. Columns are "owner:head"; the first and last stand to the left, the others to the right."""
    owners, heads = zip(*(column.split(":") for column in columns))
    widths, page = [max(map(len, column)) for column in zip(heads, *rows)], ""
    for colours, row in [(["dim"] * len(heads), heads), *((owners, row) for row in rows)]:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]
        cells = [f"[{who}]{cell}[/]" if who else NAMES.sub(r"[\1]\1[/]", cell) for who, cell in zip(colours, cells)]
        page += gap.join(["", *cells]) + "\n"
    return page

def fixed(value, digits=2):
    """A number with that many decimals, and never a negative zero; a dash where there is none."""
    return "-" if np.isnan(value) else f"{round(float(value), digits) + 0.0:.{digits}f}"

def listed(values, most=4, between=", ", form=fixed):
    """As in [0.73, 0.45, 0.91, …, 0.62]."""
    texts = [form(value) for value in values]
    return f"[{between.join(texts if len(texts) <= most else [*texts[: most - 1], '…', texts[-1]])}]"

def text_of(tokens, config):
    """Tokens as letters where the vocabulary has 27, as numbers elsewhere."""
    text = "".join(LETTERS[token] for token in tokens) if config.readable else listed(tokens, 3, " ", str)
    return f"{text[:15]}…" if config.readable and len(text) > 16 else text

def size_of(size):
    """Bytes as text."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"

def feedback_page(seen, config):
    """What happened before the loop: the human's choices, and the reward model that learned from them."""
    words = [text_of(tokens[real != 0], config).ljust(16) for tokens, real in zip(seen["responses"], seen["mask"])]
    cells = [(*texts, "") for texts in zip(words, map(fixed, seen["human"]), map(fixed, seen["scores"]))]
    pairs = [chosen + rejected for chosen, rejected in zip(cells[:3], cells[len(cells) // 2 :])]
    columns = [":chosen", "human:human", "reward:score", ":", f":{'rejected':16}", "human:human", "reward:score", ":"]
    losses, right, most = seen["losses"], seen["accuracy"], seen["best_accuracy"]
    return f"""Before the loop: [human]human[/] feedback, and a [reward]reward[/] model that learns from it
  Preference pairs: [human]{config.preference_pairs}[/]\tthe human likes vowels mixed evenly with
                                      consonants, no letter twice, and may err
  Reward model loss: [reward]{losses[0]:.3f} -> {losses[-20:].mean():.3f}[/]\tof -log sigmoid(chosen - rejected)
  Fresh pairs right: [reward]{right:.1%}[/]\tof at most [human]{most:.1%}[/], choices being so noisy
{table(columns, pairs)}\
    Scores have mean 0, deviation 1 over the reference's responses; the model is
    frozen now. It saw only which of two was chosen. A . ends a word."""

def step_pages(data, config):
    """The seven pages of the walk-through, each of the arrays that data holds by then."""

    def preview(name):
        """The first response's first values and last, and the mean over all real tokens."""
        values = data[name][0][data["mask"][0] != 0]
        return f"{listed(values, 3, ' ')} mean {fixed(real_mean(data[name], data['mask']), 3)}"

    gae_used, prompts = config.advantage == "gae", data["prompts"]
    group = "" if gae_used else f"    Each prompt stands {config.group_size} times: a group of responses to compare.\n"
    yield f"""Step 1: Sample prompts
  Batch size: [n]{len(prompts)}[/]
  Prompt shapes: [n]{prompts.shape}[/] tokens\t[n]{text_of(prompts[0], config)}[/]
{group}    Why only prompts: the actor writes its own training data, in step 2."""
    mask = data["mask"]
    yield f"""Step 2: Generate responses ([actor]Actor[/])
  [dim]Actor forward pass...[/]
  Generated tokens: [actor]{mask.shape}[/]\t[actor]{text_of(data["responses"][0][mask[0] != 0], config)}[/]
  Actor logits: [actor]{data["logits"].shape}[/]\t[actor]{size_of(data["logits"].nbytes)}[/]; training keeps only slices
  Old log probs: [actor]{mask.shape}[/]\t[actor]{preview("old_logprobs")}[/]
    Why "old": they stay as they are while step 7 changes the actor.
    [...]: the first response's first tokens and last; mean: over all tokens."""
    scores = data["scores"]
    origin = "learned from choices, above" if config.readable else "is random; --preset letters trains one on choices"
    yield f"""Step 3: Score responses ([reward]Reward Model[/])
  [dim]Reward model forward pass...[/]
  Scores: [reward]{listed(scores)}[/]\tmean [reward]{fixed(scores.mean(), 3)}[/]
    Why one number a response: only a finished response can be judged.
    This reward model {origin}."""
    error = data["kl"][mask != 0].std() / np.count_nonzero(mask) ** 0.5
    mean, k1, k2, k3, exact = (fixed(real_mean(data[name], mask), 3) for name in ("kl", "k1", "k2", "k3", "exact_kl"))
    yield f"""Step 4: Compute KL penalty ([reference]Reference[/])
  [dim]Reference forward pass...[/]
  Reference log probs: [reference]{mask.shape}[/]\t[reference]{preview("ref_logprobs")}[/]
    KL: how far the actor has moved from the reference. Of the sampled token:
    k1 = log p_actor - log p_reference, k2 = k1²/2, k3 = exp(-k1) - 1 + k1
  KL divergence per token: [reference]{mask.shape}[/]\t[reference]{preview("kl")}[/]
  Mean KL: [reference]{mean}[/]\t± {error:.3f} (standard error) nats a token, {config.kl_estimator}
  By estimator: [reference]k1 {k1}, k2 {k2}, k3 {k3}[/]
  Exact KL: [reference]{exact}[/]\tover all {config.vocab_size} tokens, at each position
    Why k1 is negative on {real_mean(data["k1"] < 0, mask):.0%} of the tokens: it looks at the sampled one only.
    Its mean over many is the exact KL, never below 0. As a reward only k1 has
    the gradient of the KL: with k2 or k3 in its place the actor drifts off."""
    totals, first, first_kl = data["rewards"].sum(axis=1), fixed(scores[0], 4), fixed(data["kl"][0].sum(), 4)
    yield f"""Step 5: Compute total rewards
  reward = reward_model_score - β * KL\tβ = [n]{config.beta}[/]
  Total rewards: [n]{listed(totals)}[/]\tper response, mean [n]{fixed(totals.mean(), 3)}[/]
    The first: {first} - {config.beta} * {first_kl} = {fixed(totals[0])}, KL summed over its tokens.
    Why the score sits on the last token: nothing before it was judged. Token by
    token: {listed(data["rewards"][0][mask[0] != 0])}, each -β * KL, the last + score."""
    whitened = "" if config.advantage == "grpo" else f"  Whitened: [n]{mask.shape}[/]\t[n]{preview('whitened')}[/]\n"
    if gae_used:
        yield f"""Step 6: Compute advantages ([critic]Critic[/] + GAE)
  [dim]Critic forward pass...[/]
  Values: [critic]{mask.shape}[/]\t[critic]{preview("values")}[/]
  GAE advantages: [n]{mask.shape}[/]\t[n]{preview("advantages")}[/]
{whitened}\
    Value: the reward expected from there on. GAE, generalized advantage
    estimation: how much better than that each token turned out.
    δ[t] = reward[t] + γ value[t+1] - value[t]           γ = {config.gamma}, λ = {config.lam};
    advantage[t] = δ[t] + γ λ advantage[t+1]             all are 0 past the end
    return[t] = advantage[t] + value[t]                  reward still to come
    Why whiten: the update must not grow with the scale of the scores."""
    else:
        totals, advantages = totals[: config.group_size], data["advantages"][: config.group_size, 0]
        first, mean, others = (fixed(x, 4) for x in (totals[0], totals.mean(), totals[1:].mean()))
        rloo = f"R - mean of the others' R = {first} - ({others})"
        grpo = f"(R - mean) / deviation = ({first} - ({mean})) / {fixed(totals.std(ddof=1), 4)}"
        yield f"""Step 6: Compute advantages ({config.advantage}, no critic)
  Group advantages: [n]{mask.shape}[/]\t[n]{preview("advantages")}[/]
  Total rewards R of group 1: [n]{listed(totals, 8)}[/]
  Its advantages: [n]{listed(advantages, 8)}[/]\tone for all tokens of a response
{whitened}\
    The first: {grpo if config.advantage == "grpo" else rloo} = {fixed(advantages[0])}.
    Why a group: what else was written to the same prompt says what was to be
    expected, as a critic would."""
    low, high, names, rows = f"{1 - config.clip:g}", f"{1 + config.clip:g}", ("actor", "critic")[: 1 + gae_used], []
    for epoch, (ratio, clipped) in enumerate(zip(data["ratio"], data["clipped"])):
        losses = [fixed(data[f"{name}_loss"][epoch], 4) for name in names]
        ratios = f"{ratio[mask != 0].min():.3f} .. {ratio.max():.3f}"
        rows.append([str(epoch + 1), ratios, f"{real_mean(clipped, mask):.1%}", *losses, ""])
    columns = [":epoch", "actor:ratio", "actor:clipped", *(f"{name}:{name} loss" for name in names), ":"]
    last = {name: f"[{name}]{fixed(data[f'{name}_loss'][-1], 3)}[/]\tbefore the last update\n" for name in names}
    critic = "    critic loss = mean of (value - return)²\n" if gae_used else ""
    yield f"""Step 7: PPO update
  Ratio = exp(new_log_prob - old_log_prob)
  Clipped ratio: clip(ratio, {low}, {high})
    actor loss = mean of -min(ratio * A, clipped ratio * A), A: last of step 6
{critic}{table(columns, rows)}\
{"".join(f"  {name.title()} loss: {loss}" for name, loss in last.items())}\
    clipped: tokens whose gain, and so gradient, the clip takes away: those with
    the ratio above {high} where A > 0, or below {low} where A < 0.
    Why the ratio is 1 in epoch 1: the weights are still those that generated.
    The loss is then minus the mean of A, about 0, but its gradient is not.

  [n]Update complete![/]"""

def cost_page(models, config, arrays):
    """What each model costs, and the largest tensors; arrays holds (name, shape, bytes) of the data."""
    rows, tensors, epochs = [], {each: [] for each in arrays}, config.ppo_epochs
    for owner, model in zip(OWNERS, (models.actor, models.critic, models.reward_model, models.reference)):
        shapes = model or models.reward_model  # those of an absent critic, to show what is saved
        weights = [(part, w.shape, w.nbytes) for part, w in shapes.items() if part != "bias"]
        size = sum(nbytes for *_, nbytes in weights)
        learns = [size_of(2 * size), str(1 + epochs), str(epochs), "updated" if model else "no critic"]
        costs = learns if owner in ("actor", "critic") else ["-", "1", "0", "frozen"]
        rows.append([owner, f"{size // 4:,}", size_of(size), *costs])
        for each in weights if model else []:
            tensors.setdefault(each, []).append(owner)
    largest = sorted(tensors.items(), key=lambda item: -item[0][2])[:5]
    largest = [(name, str(shape), size_of(size), ", ".join(owners)) for (name, shape, size), owners in largest]
    return f"""{table([":model", ":parameters", ":weights", ":Adam's m, v", ":forward", ":backward", ":"], rows)}
{table([":largest tensors", ":shape", ":memory", ":whose"], largest)}\
    forward, backward: passes over the batch; the actor's first is generation;
    not among the tensors: Adam's m and v, and what a step needs in passing"""

def response_page(data, config, row):
    """One response token by token (--inspect), so that every formula can be checked by hand."""
    heads = "actor:actor reference:ref reference:KL n:rew critic:value critic:TD n:adv critic:return n:white".split()
    names = "old_logprobs ref_logprobs kl rewards values td_errors advantages returns whitened".split()
    columns, rows = {head: data[name][row] for head, name in zip(heads, names) if name in data}, []
    for t in np.flatnonzero(data["mask"][row]):
        token = text_of(data["responses"][row, t : t + 1], config).strip("[]")
        numbers = [fixed(x[t], 2 if head == "n:white" else 3) for head, x in columns.items()]
        ratio = fixed(data["ratio"][-1, row, t]) + "*" * int(data["clipped"][-1, row, t])
        rows.append([str(t), token, *numbers, ratio])
    return f"""Response {row}, {len(rows)} tokens, with the ratio of the last epoch (*: clipped)
{table([":t", "actor:tok", *columns, "actor:ratio"], rows, gap=" ")}\
    actor, ref: log probabilities; rew: reward; adv: advantage; white: whitened.
    With a critic: TD = rew + γ value[t+1] - value and adv = TD + γ λ adv[t+1],
    which are 0 past the end; return = adv + value."""

def smooth(values, most=40):
    """Means of at most that many equal shares of a run, so that one sees its course and not its noise."""
    return np.array([part.mean() for part in np.array_split(values, min(most, len(values)))])

def chart(console, x_label, curves, x_text="{:.0f}".format, width=58, height=12):
    """A page with curves over x. Each is (name, owner, x, y, side): its scale stands left (0) or right (1)."""
    marks, (bar, corner, dash) = ("*o+x#@%&", "|+-") if console.options.ascii_only else ("●○▲△■□◆◇", "│└─")
    grid, page, marks = [[" "] * width for _ in range(height)], "", marks * len(curves)
    left, right = (edge(np.concatenate([x for _, _, x, _, _ in curves])) for edge in (np.min, np.max))
    sides = [np.concatenate([y for *_, y, at in curves if at == side]) for side in sorted({at for *_, at in curves})]
    for mark, (_, owner, x, y, side) in zip(marks, curves):
        along = np.linspace(0, len(x) - 1, 1 + width * (len(x) - 1))  # on the line from each value to the next
        x, y = (np.interp(along, np.arange(len(each)), each) for each in (x, y))
        columns = (x - left) / (right - left or 1) * (width - 1)
        rows = (sides[side].max() - y) / (np.ptp(sides[side]) or 1) * (height - 1)
        for row, column in zip(rows.round().astype(int), columns.round().astype(int)):
            grid[row][column] = f"[{owner}]{mark}[/]"
    for row, line in enumerate(grid):
        shown = row in (0, height // 2, height - 1)
        scales = [fixed(y.max() - np.ptp(y) * row / (height - 1)) if shown else "" for y in sides]
        page += f"  {scales[0]:>6} {bar}{''.join(line)}{''.join(f'{bar} {scale}' for scale in scales[1:])}[n][/]\n"
    legend = [f"[{owner}]{mark} {name}[/]{' (right)' * side}" for mark, (name, owner, *_, side) in zip(marks, curves)]
    return f"""{page}         {corner}{dash * width}
          {x_text(left)}{x_label:^{width - len(x_text(left)) - len(x_text(right))}}{x_text(right)}
          {"   ".join(legend)}"""

COLUMNS = {
    "reward:score": (2, "objective/scores"), "human:human": (2, "objective/human_scores"),  # owner:head, digits, metric
    "reference:KL": (2, "objective/kl"), "n:total": (2, "objective/rlhf_reward"),
    "actor:entropy": (1, "objective/entropy"), "actor:clipped": (3, "policy/clipfrac_avg"),
    "actor:length": (1, "val/response_length"),
}

def training_page(label, config, history, texts):
    """A training: some of its steps with a response in words, and hacking where it was measured."""
    notes, best = "", None
    if config.kl_estimator != "k1" and config.beta:
        notes = f"    As a reward {config.kl_estimator} does not have the gradient of the KL: the actor drifts off.\n"
    if config.readable:
        score, human = smooth(history["objective/scores"]), smooth(history["objective/human_scores"])
        best = 1 + int(smooth(np.arange(config.steps))[human.argmax()])
        if human[-1] < human[0] - 0.1 and score[-1] > score[0]:  # more than chance
            low, high, first, peak, last = map(fixed, (score[0], score[-1], human[0], human.max(), human[-1]))
            notes += f"""    Reward hacking: the score rose from {low} to {high}, the human's opinion went
    from {first} to {peak} and down to {last}: only the model likes the last words.\n"""
    rows, steps = [], 1 + ((config.steps - 1) * np.linspace(0, 1, 10) ** 2).round().astype(int)  # denser at first
    for step in sorted({*steps, best} - {None}):
        numbers = [fixed(history[name][step - 1], digits) for digits, name in COLUMNS.values()]
        rows.append([f"{step}{'*' if step == best else ''}", *numbers, texts[step - 1]])
    return f"""=== RLHF Training, {label} ===
    {config.steps} steps of {config.batch_size} responses. Means per response, clipped per token;
    total = score - β * KL{"; *: where the human likes them best" if config.readable else ""}.
{table([":step", *COLUMNS, "actor:a response"], rows).replace("*", "[human]*[/]")}{notes}"""

def share_of(gain):
    """The share with its standard error; a dash where what could be gained is lost in noise, "none" after a loss."""
    share = gain.get("share", np.nan)
    return "-" if np.isnan(share) else "none" if share < 0 else f"{share:.0%} ± {gain['share_error']:.1%}"

def course_page(console, config, history, gain):
    """What mattered over the steps, and where training stands against the best that any policy can reach."""
    steps = smooth(np.arange(1, config.steps + 1))
    score, human, total = (smooth(history[f"objective/{name}"]) for name in ("scores", "human_scores", "rlhf_reward"))
    curves = [("score", "reward", steps, score, 0)]
    curves += [("human", "human", steps, human, 1)] if config.readable else []
    curves += [("score - β KL", "n", steps, total, 0)] if config.beta else []
    curves += [("J*, its limit", "reference", steps[[0, -1]], np.full(2, gain["J_star"]), 0)] if gain else []
    page = f"The course of the training\n{chart(console, 'step, smoothed', curves)}\n\n"
    if not gain:
        return f"{page}    No comparison with theory: at these sizes it would cost more than it tells."
    why = "lost in noise: the gain at stake is too small" if np.isnan(gain["share"]) else "± its standard error"
    if config.gamma < 1 and config.advantage == "gae":
        why += f"\n    J is not discounted; with γ = {config.gamma} training maximised a discounted reward."
    start, now, limit, score, kl = (fixed(gain[name], 3) for name in ("J_start", "J", "J_star", "score", "kl"))
    return f"""{page}Against theory: J = score - β * KL per response, on fresh prompts
  J {"of the reference" if config.drift else "at the start"}: [n]{start}[/]\tthe reference's score
  J now: [n]{now}[/]\t[reward]{score}[/] - {config.beta} * [reference]{kl}[/]
  J*: at least [n]{limit}[/]\tno policy exceeds J*; estimated from below
  Share of the attainable gain: {"at most " if gain["share"] >= 0 else ""}[n]{share_of(gain)}[/]
    (J - start) / (J* - start), {why}"""

def comparison_page(console, runs):
    """The trainings side by side; runs holds (label, config, history, gain, responses) of each."""
    rows, curves, start = [], [], np.mean([gain.get("J_start", np.nan) for *_, gain, _ in runs])
    last = {"score": "scores", "human": "human_scores", "kl": "kl", "J": "rlhf_reward"}  # where there is no theory
    for (label, config, history, gain, texts), colour in zip(runs, ["human", "n", "yellow", "blue"] * len(runs)):
        numbers = [gain.get(name, history[f"objective/{metric}"][-1]) for name, metric in last.items()]
        learners = 1 + (config.advantage == "gae")
        passes = f"{learners * (1 + config.ppo_epochs) + 2}+{learners * config.ppo_epochs}"
        rows.append([label, *map(fixed, numbers), share_of(gain), passes, texts[-1]])
        if config.readable:
            roots = smooth(history["objective/kl"]).clip(0) ** 0.5
            curves.append((label, colour, roots, smooth(history["objective/human_scores"]), 0))
    columns = [":", "reward:score", "human:human", "reference:KL", "n:J", ":share", ":passes", "actor:a response"]
    page = f"""The same training, compared{" on fresh prompts" if runs[0][3] else ""}
{table(columns, rows)}\
    J = score - β * KL{", not discounted" if config.gamma < 1 else ""}, about {fixed(start)} at the start.
    share: of the gain in J to be had at this β, at most, ± standard error.
    passes: forward+backward of all models in a step."""
    if curves:
        page += "\n\nThe human's opinion over KL, from the start at the left\n"
        page += chart(console, "KL in nats, on a scale of square roots", curves, lambda root: f"{root**2:.1f}")
    return page

def show_source(console, name):
    """Print a function of this file after all in the file that it needs, ready to paste; or the list of the anchors."""
    text, names = Path(__file__).read_text(encoding="utf-8"), [each for each in globals() if each[:2] != "__"]
    if name:
        wanted, found = ["np", name], {}
        for each in wanted:  # which grows meanwhile
            constant = rf"^(?:\w+, )*{each}(?:, \w+)* = (?:{{\n(?:.*\n)*?}}|.*)\n"
            line = re.search(rf"{constant}|^ *(?:from \S+ )?import .*\b{each}\b.*\n", text, re.MULTILINE)
            found[each] = line[0].lstrip() if line else inspect.getsource(globals()[each])
            parts = ast.walk(ast.parse(found[each]))
            wanted += {part.id for part in parts if isinstance(part, ast.Name) and part.id in names}.difference(wanted)
        text = Text("\n".join(dict.fromkeys(found[each] for each in sorted(found, key=names.index))))
        text.highlight_regex(r"\b(def|class|return|yield|raise|if|else|for|in|not|and|or|lambda)\b", "bold")
        text.highlight_regex(r"(?<=def )\w+", "cyan")
        text.highlight_regex(r'(?m)"""(?:.|\n)*?"""|  # .*|^# .*', "not bold dim")
    else:
        anchored = re.findall(r"^# ANCHOR\b: (\w+)", text, re.MULTILINE)
        text = "\n".join(f"  [n]{each:20}[/]{globals()[each].__doc__.splitlines()[0]}" for each in anchored) + "\n"
    console.print(text, soft_wrap=True)

# ------------------------------------------------------------------ 9. the command line

LETTERS_PRESET = {"vocab_size": 27, "batch_size": 64, "prompt_length": 8, "response_length": 16, "beta": 0.2}
PRESETS = {"gpt2": {}, "letters": LETTERS_PRESET}

# The same experiment in other trainers: {names} are Config's, some converted. --help finds the other names here, too.
RECIPES = {
    "trl": """# TRL 1.16.0, with its own settings for GPUs
trl {method} --model_name_or_path MODEL --dataset_name DATASET --reward_model_name_or_path REWARD_MODEL
    --per_device_train_batch_size {batch_size} --num_generations {group_size} --max_completion_length {response_length}
    --max_steps {steps_in_updates} --beta {beta} --epsilon {clip} --num_iterations {ppo_epochs}
    --learning_rate {learning_rate} --seed {seed}
# no flag for --prompt-length, --kl-estimator, --gamma, --lam""",
    "openrlhf": """# OpenRLHF 0.11.2, with its own settings for GPUs
python3 -m openrlhf.cli.train_ppo_ray --data.prompt_dataset DATASET --data.input_key prompt --vllm.num_engines 8
    --actor.model_name_or_path MODEL --reward.model_name_or_path REWARD_MODEL --train.colocate_all --train.seed {seed}
    --train.batch_size {batch_size} --rollout.batch_size {batch_size_in_prompts} --train.max_epochs {ppo_epochs}
    --rollout.n_samples_per_prompt {group_size} --data.max_samples {steps_in_prompts} --actor.eps_clip {clip}
    --data.max_len {prompt_length_and_response} --rollout.max_new_tokens {response_length} --algo.kl.init_coef {beta}
    --algo.kl.estimator {kl_estimator} --algo.advantage.estimator {advantage_there} --actor.adam.lr {learning_rate}
gae:    --algo.advantage.gamma {gamma} --algo.advantage.lambd {lam}
gae:    --critic.model_name_or_path MODEL --critic.adam.lr {learning_rate}""",
    "verl": """# verl 0.9.1, with its own settings for GPUs
python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=MODEL actor_rollout_ref.actor.use_dynamic_bsz=True
    reward.reward_model.enable=True reward.reward_model.model_path=REWARD_MODEL reward.reward_model.rollout.name=vllm
    data.train_files=DATASET.parquet data.val_files=DATASET.parquet actor_rollout_ref.rollout.name=vllm
    data.train_batch_size={batch_size_in_prompts} actor_rollout_ref.actor.ppo_mini_batch_size={batch_size_in_prompts}
    data.max_prompt_length={prompt_length} data.max_response_length={response_length} algorithm.use_kl_in_reward=True
    trainer.total_training_steps={steps} algorithm.kl_ctrl.kl_coef={beta} algorithm.kl_penalty={kl_estimator}
    algorithm.adv_estimator={advantage} actor_rollout_ref.rollout.n={group_size} actor_rollout_ref.rollout.seed={seed}
    actor_rollout_ref.actor.clip_ratio_low={clip} actor_rollout_ref.actor.clip_ratio_high={clip} data.seed={seed}
    actor_rollout_ref.actor.ppo_epochs={ppo_epochs} actor_rollout_ref.actor.optim.lr={learning_rate}
gae:    algorithm.gamma={gamma} algorithm.lam={lam} critic.model.path=MODEL critic.optim.lr={learning_rate}""",
}

def recipe(trainer, config):
    """The command that starts the same experiment in a trainer, and in comments what is different there."""
    method, group = config.advantage, 1 if config.advantage == "gae" else config.group_size
    values = asdict(config) | {
        "group_size": group, "batch_size_in_prompts": config.batch_size // group,
        "steps_in_prompts": config.steps * config.batch_size // group,
        "steps_in_updates": config.steps * config.ppo_epochs,
        "prompt_length_and_response": config.prompt_length + config.response_length,
        "advantage_there": method.replace("grpo", "group_norm"),
        "method": method.replace("rloo", "rloo --normalize_advantages True"),
    }
    lines = (line for line in RECIPES[trainer].splitlines() if method == "gae" or not line.startswith("gae:"))
    page = "\n".join(line.removeprefix("gae:") for line in lines).format(**values)
    page = re.sub(r"\s+(?=--[\w.]+ |[\w.]+=)", " \\\\\n    ", page)  # a setting a line
    return f"""{page}
# MODEL, DATASET, REWARD_MODEL are yours to name; a real model wants a learning rate of about 1e-6
# what is not named here (optimizer, schedule) is as there by default; README says where the algorithms differ"""

def read_command_line(argv):
    """Options, and a Config for each beta and advantage; where something is wrong, exits with 2 and one sentence."""
    parser = argparse.ArgumentParser(prog="rlhf_loop_pseudo.py", usage="%(prog)s [flags], --help lists them",
                                     description="The RLHF-PPO training loop, with real numbers.", allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="gpt2", help="sizes to start from; explicit flags win; default gpt2")
    peers = {peer: re.findall(r"([\w.]+)[ =]{(\w+)}", page) for peer, page in RECIPES.items()}
    for each in fields(Config):
        names = {peer: [name for name, key in pairs if key.startswith(each.name)] for peer, pairs in peers.items()}
        elsewhere = [f"{peer}: {' '.join(found)}" for peer, found in names.items() if found]
        text = "; ".join([each.metadata["meaning"], each.metadata["rule"][0], f"default {each.default}", *elsewhere])
        several = "+" if each.name in ("beta", "advantage") else None
        add("--" + each.name.replace("_", "-"), type=each.type, nargs=several, metavar="VALUE", help=text)
    add("--inspect", type=int, metavar="ROW", help="show a response of the walk-through token by token; default none")
    add("--pause", action="store_true", help="wait for Enter after every step")
    add("--show", nargs="?", const="", metavar="NAME", help="print a function and its helpers; without a name, a list")
    add("--save", type=Path, metavar="FILE.npz", help="save the arrays of the walk-through, or the metrics of training")
    add("--export", type=Path, metavar="FILE", help="save what was shown, as .svg, .html or .txt")
    add("--recipe", choices=RECIPES, help="print the command that starts the same experiment in that trainer")
    options = parser.parse_args(argv)
    given = {each.name: value for each in fields(Config) if (value := getattr(options, each.name)) is not None}
    start = {} if options.steps in (None, 1) else {"drift": 0.0}  # training starts from the reference
    settings = {"beta": Config.beta, "advantage": Config.advantage, **start, **PRESETS[options.preset], **given}
    betas, advantages = (x if isinstance(x, list) else [x] for x in (settings.pop("beta"), settings.pop("advantage")))
    try:
        configs = [Config(**settings, beta=beta, advantage=advantage) for beta in betas for advantage in advantages]
        refuse(options, configs)
    except ValueError as problem:
        parser.error(str(problem))
    return options, configs

def refuse(options, configs):
    """Raises ValueError with a sentence where something is asked for that cannot be done."""
    config, training = configs[0], configs[0].steps > 1
    if options.show and not callable(globals().get(options.show)):
        raise ValueError(f"--show: {options.show!r} is no function of this file; --show alone lists some")
    if options.recipe == "trl" and "gae" in [each.advantage for each in configs]:
        raise ValueError("--recipe trl: TRL has no PPO since 1.13, so nothing for --advantage gae, but rloo and grpo")
    if len(configs) > 1 and not (training or options.recipe):
        raise ValueError("--beta, --advantage: several values are for training, which --steps above 1 asks for")
    if options.inspect is not None and (training or not 0 <= options.inspect < config.batch_size):
        raise ValueError(f"--inspect: {options.inspect} is not 0 to {config.batch_size - 1} of a walk-through")
    if options.pause and (training or not sys.stdin.isatty()):
        raise ValueError("--pause: waits for Enter in a terminal, after every step of the walk-through")
    for path, flag, kinds in ((options.save, "--save", ".npz"), (options.export, "--export", ".svg .html .txt")):
        if path and (path.suffix not in kinds.split() or path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ValueError(f"{flag}: {str(path)!r} is no file ({kinds}) in a folder that is there and writable")
    rows = max(16 * config.batch_size, 10 * config.preference_pairs * config.readable)
    weights, length = config.width * (config.vocab_size + config.width), config.prompt_length + config.response_length
    logits = 0 if training else config.batch_size * config.response_length * config.vocab_size
    needed = 4 * (20 * weights + rows * length * config.width + 3 * length**2 + logits)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if needed > memory:
        sizes = "--batch-size, --preference-pairs, --prompt-length, --response-length, --vocab-size, --width"
        raise ValueError(f"{sizes}: {needed // 10**9:,} GB are needed, of {memory // 10**9} GB of memory")

def set_up(console, config, kept, before=None):
    """Models and random numbers; where tokens are letters, the human chooses and the reward model learns, once."""
    rng = np.random.default_rng(config.seed)
    models = init_models(config, rng)
    if before:  # the reward model is frozen, so it serves all trainings
        models = models._replace(reward_model=before.reward_model)
    elif config.readable:
        models, seen = learn_from_human(models, config, np.random.default_rng([config.seed, 1]))
        kept.update((f"preferences/{name}", array) for name, array in seen.items())
        show(console, feedback_page(seen, config))
    return models, rng

def run_walk_through(console, options, config, kept):
    """Show one step; kept collects the arrays for --save."""
    show(console, f"=== RLHF Training Loop Demo ===\n{LEGEND}")
    models, rng = set_up(console, config, kept)
    pages, arrays = step_pages(kept, config), []
    for stage in walk_through(models, config, rng):
        kept.update(stage)
        arrays += [(name, array.shape, array.nbytes) for name, array in stage.items()]
        show(console, next(pages))
        kept.pop("logits", None)
        if options.pause:
            input("  [Enter] ")
    show(console, cost_page(models, config, arrays))
    if options.inspect is not None:
        show(console, response_page(kept, config, options.inspect))

def run_trainings(console, configs, kept):
    """Train once for each Config and compare; kept collects (runs, steps) and (runs,) arrays for --save."""
    runs, steps, models = [], configs[0].steps, None
    show(console, LEGEND)
    for run, config in enumerate(configs):
        models, rng = set_up(console, config, kept, models)
        history = {"objective/human_scores": np.full(steps, np.nan)}  # which stays where nobody can read
        label, texts, begun = f"β {config.beta:g}, {config.advantage}", [], time.monotonic()
        with make_console(quiet=not sys.stdout.isatty()).status("") as live:  # another console: never in an export
            for metrics, response in train(models, config, rng):
                for name, value in metrics.items():
                    history[name] = kept.setdefault(name, np.full((len(configs), steps), np.nan))[run]
                    history[name][len(texts)] = value
                texts.append(text_of(response, config))
                left = (time.monotonic() - begun) * (steps / len(texts) - 1)
                now = {name.rpartition("/")[2]: fixed(values[len(texts) - 1]) for name, values in history.items()}
                live.update(f"{label} {len(texts)}/{steps} [reward]score {now['scores']}[/] "
                            f"[human]human {now['human_scores']}[/] [reference]KL {now['kl']}[/] {left:.0f} s left")
            rng = np.random.default_rng([config.seed, 2])  # so that theory and training do not disturb each other
            gain = attainable_gain(models, config, rng)
        for name, value in gain.items():
            kept.setdefault(f"theory/{name}", np.full(len(configs), np.nan))[run] = value
        runs.append((label, config, history, gain, texts))
        show(console, training_page(label, config, history, texts))
    show(console, comparison_page(console, runs) if len(runs) > 1 else course_page(console, config, history, gain))

def write_whole(path, data):
    """Write bytes to a new file beside path and put it in path's place: whole, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

def save(path, configs, kept):
    """Write what kept holds, and the configuration as JSON; a single training's arrays without the axis of runs."""
    if configs[0].steps > 1 and len(configs) == 1:
        kept = {name: array if name.startswith("preferences") else array[0] for name, array in kept.items()}
    values = {name: [getattr(each, name) for each in configs] for name in asdict(configs[0])}
    config = {name: each if len(set(each)) > 1 else each[0] for name, each in values.items()}
    np.savez(file := io.BytesIO(), config=json.dumps(config), **kept)
    write_whole(path, file.getvalue())

def export(path, console):
    """Write what was shown in the format of path's suffix, in colours that can be read on black."""
    text = console.export_text(clear=False)
    console.width = 2 + max([80, *map(len, text.splitlines())])  # so that nothing touches the edge
    colours = "000000 ff7878 50d278 dcc85a 82aaff dc8ce6 50c8dc ffffff".split()  # black, red, green and so on
    theme = TerminalTheme((12, 12, 12), (255, 255, 255), [tuple(bytes.fromhex(colour)) for colour in colours])
    if path.suffix == ".svg":
        text = console.export_svg(title="rlhf_loop_pseudo", theme=theme)
    elif path.suffix == ".html":
        text = console.export_html(theme=theme)
    write_whole(path, text.encode("utf-8"))

def main(argv=None):
    """Run the command line argv, sys.argv without it. Returns the exit code: 0, 1, 2 or 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an encoding without Greek letters gets question marks
    console, kept, options, code = make_console(record=True), {}, None, 0
    try:
        options, configs = read_command_line(argv)
        with np.errstate(all="ignore"):  # check_finite speaks of what is not finite
            if options.show is not None:
                show_source(console, options.show)
            elif options.recipe:
                console.print(Text("\n\n".join(recipe(options.recipe, config) for config in configs)), soft_wrap=True)
            elif configs[0].steps == 1:
                run_walk_through(console, options, configs[0], kept)
            else:
                run_trainings(console, configs, kept)
    except SystemExit as stop:  # --help, or bad input
        code = stop.code
    except (KeyboardInterrupt, EOFError):
        show(console, "\nInterrupted.")
        code = 130
    except (FloatingPointError, MemoryError) as problem:
        print(f"rlhf_loop_pseudo.py: {problem}", file=sys.stderr)
        code = 1
    finally:
        if options and options.save and kept:
            save(options.save, configs, kept)
        if options and options.export:
            export(options.export, console)
    return code

if __name__ == "__main__":
    sys.exit(main())
