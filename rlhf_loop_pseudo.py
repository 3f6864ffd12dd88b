# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "rich>=13.8"]
# ///
"""RLHF in one file, for real: fine-tuning, a reward model and the PPO loop.

    python rlhf_loop_pseudo.py                               one step, every tensor
    python rlhf_loop_pseudo.py --preset letters              in words, with all stages
    python rlhf_loop_pseudo.py --preset letters --steps 200  and with training

Reinforcement learning from human feedback as in InstructGPT, with four toy models:
the actor writes and learns, the reward model scores whole responses, the reference is
the actor as it began, the critic predicts the reward still to come.

  prompts ─► actor ─► responses ─┬─► reward model ─► score ────────┐
               ▲                 ├─► reference ─► KL to the actor ─┴► rewards ─┐
               │                 └─► critic ────► values ─────────► GAE ◄──────┘
               │                        ▲                            │
               └────── PPO update ──────┴─────────── advantages ◄────┘

    1. sample prompts                           sample_prompts
    2. the actor generates responses            generate
    3. the reward model scores them             score_responses
    4. the reference: how far has it moved?     token_logprobs, kl_penalty
    5. score and KL become a reward per token   shape_rewards
    6. how much better than expected?           critic_values, gae, whiten;
                                                or rloo_advantages, grpo_advantages
    7. PPO, and regression for the critic       ppo_loss, value_loss, adam_step,
                                                actor_gradients, critic_gradients

The lesson, by sections: 2 configuration, 3 the loop, 4 these functions, 5 what comes
before it, 6 the models. No part of it: 7 measuring, 8 presentation, 9 command line.

In shape comments B are sequences, P prompt tokens, T response tokens, V vocabulary, D
width, S a sequence (P + T or less), N any rows. Log probabilities and KL are in nats.
"""

import os
import sys

if sys.version_info < (3, 10):
    sys.exit(f"Python 3.10 or newer is needed, and this is {sys.version.split()[0]}.")
if __name__ == "__main__":  # before numpy: at these sizes more threads gain nothing
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import codecs
import difflib
import inspect
import io
import itertools
import json
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, NamedTuple

try:
    import numpy as np
    from rich.console import Console, Group
    from rich.highlighter import RegexHighlighter
    from rich.progress import track
    from rich.table import Table
    from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI
    from rich.text import Text
    from rich.theme import Theme
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing. Run: python -m pip install numpy rich")

# ---------------------------------------------------------------- 2. configuration

LETTERS = "abcdefghijklmnopqrstuvwxyz."  # tokens where V is 27; the last ends a word


@dataclass(frozen=True)
class Config:
    """Everything that affects the algorithm; ValueError for what is not allowed."""

    batch_size: Annotated[int, "B, responses in a batch"] = 4
    prompt_length: Annotated[int, "P, tokens in a prompt"] = 64
    response_length: Annotated[int, "T, most tokens in a response"] = 128
    vocab_size: Annotated[int, "V; the last ends a text; 27 are letters"] = 50257
    width: Annotated[int, "D, numbers in a hidden state; GPT-2 has 768"] = 32
    preference_pairs: Annotated[int, "choices of the human, with letters"] = 2048
    steps: Annotated[int, "batches to train on; 1 is the walk-through"] = 1
    beta: Annotated[float, "price of KL, score per nat; InstructGPT's is 0.02"] = 0.02
    kl_estimator: Annotated[str, "KL of a token: k1, k2 or k3"] = "k1"
    advantage: Annotated[str, "gae: by a critic; rloo, grpo: in a group"] = "gae"
    group_size: Annotated[int, "responses to each prompt, with rloo and grpo"] = 4
    gamma: Annotated[float, "discount per token, with gae"] = 1.0
    lam: Annotated[float, "GAE's lambda, per token"] = 0.95
    clip: Annotated[float, "PPO's epsilon: no gain beyond a ratio of 1 +- it"] = 0.2
    ppo_epochs: Annotated[int, "updates on each batch"] = 4
    learning_rate: Annotated[float, "Adam's, falling to 0 over the steps"] = 5e-4
    drift: Annotated[float, "how far the actor starts off the reference"] = 0.75
    seed: Annotated[int, "seed of all randomness"] = 0

    def __post_init__(self):
        whole = "a whole number from 1 to 10^6", lambda x: 1 <= x <= 1e6
        group = "a whole number from 2 to 10^6", lambda x: 2 <= x <= 1e6
        price = "a finite number of at least 0", lambda x: 0 <= x < math.inf
        share = "a number from 0 to 1", lambda x: 0 <= x <= 1
        rules = {
            **dict.fromkeys(["vocab_size", "group_size"], group),
            **dict.fromkeys(["beta", "learning_rate", "drift"], price),
            **dict.fromkeys(["gamma", "lam"], share),
            "clip": ("a number between 0 and 1", lambda x: 0 < x < 1),
            "kl_estimator": ("k1, k2 or k3", lambda x: x in ("k1", "k2", "k3")),
            "advantage": ("gae, rloo, grpo", lambda x: x in ("gae", "rloo", "grpo")),
            "seed": ("a whole number of at least 0", lambda x: x >= 0),
        }
        for name, value in vars(self).items():
            rule, holds = rules.get(name, whole)
            if ("whole" in rule and not isinstance(value, int)) or not holds(value):
                raise ValueError(f"--{name.replace('_', '-')}: {value} is not {rule}")
        if self.advantage != "gae" and self.batch_size % self.group_size:
            raise ValueError("--batch-size: is no multiple of --group-size")
        if self.readable and self.prompt_length != 1:
            raise ValueError("--prompt-length: must be 1 where tokens are letters")

    @property
    def readable(self):
        """Whether tokens are letters, so that the human can read what is written."""
        return self.vocab_size == len(LETTERS)


LETTERS_PRESET = {"vocab_size": 27, "batch_size": 64, "prompt_length": 1, "beta": 0.2}
LETTERS_PRESET |= {"response_length": 16, "learning_rate": 4e-3, "drift": 0.1}
PRESETS = {"gpt2": {}, "letters": LETTERS_PRESET}

# ---------------------------------------------------------------- 3. the loop


# ANCHOR: core_loop
def core_loop(models, config, rng):
    """The seven steps, for each of config.steps batches: RLHF with PPO.

    A generator of named arrays, a dict for each of the seven: whoever drains it
    decides whether to show, save or only train. Actor and critic change in place, the
    others never. With rloo or grpo there is no critic, but a group to a prompt.
    Source: InstructGPT (Ouyang et al. 2022), section 3.5, and Ziegler et al. 2019.
    """
    actor, critic, reward_model, reference = models
    actor_state, critic_state = {}, {}
    length, eos = config.response_length, config.vocab_size - 1
    group_size = config.group_size if critic is None else 1
    for step in range(config.steps):
        # 1. Sample prompts
        count = config.batch_size // group_size
        prompts = sample_prompts(rng, count, config.prompt_length, config.vocab_size)
        prompts = np.repeat(prompts, group_size, axis=0)  # (count, P) -> (B, P)
        yield {"prompts": prompts}

        # 2. Generate
        responses, mask, old_logprobs = generate(actor, prompts, length, rng, eos)
        yield {"responses": responses, "mask": mask, "old_logprobs": old_logprobs}

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

        # 6. Advantages, (B, T)
        by_critic = {}
        if config.advantage == "gae":
            values = critic_values(critic, prompts, responses) * mask
            advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
            by_critic = {"values": values, "returns": returns}
        elif config.advantage == "rloo":
            advantages = rloo_advantages(rewards, mask, group_size)
        else:
            advantages = grpo_advantages(rewards, mask, group_size)
        grpo = config.advantage == "grpo"  # has scaled each group already
        whitened = advantages if grpo else whiten(advantages, mask)
        yield by_critic | {"advantages": advantages, "whitened": whitened}

        # 7. PPO update
        learning_rate = config.learning_rate * (1 - step / config.steps)
        actor_losses, critic_losses, ratios = [], [], []
        for _ in range(config.ppo_epochs):
            gradients, loss, ratio = actor_gradients(
                actor, prompts, responses, old_logprobs, whitened, mask, config.clip
            )
            adam_step(actor, gradients, actor_state, learning_rate)
            actor_losses.append(loss)
            ratios.append(ratio)
            if critic is not None:
                gradients, loss = critic_gradients(
                    critic, prompts, responses, returns, mask
                )
                adam_step(critic, gradients, critic_state, learning_rate)
                critic_losses.append(loss)
        yield {
            "ratio": np.stack(ratios),  # (epochs, B, T)
            "actor_loss": np.array(actor_losses),
            "critic_loss": np.array(critic_losses),
            "lr": np.array(learning_rate),
        }
    # ANCHOR_END: core_loop


# ---------------------------------------------------------------- 4. the seven steps


# ANCHOR: sample_prompts
def sample_prompts(rng, batch_size, prompt_length, vocab_size):
    """Step 1. Draw random prompts, without the end token.

    Returns (B, P) int, each from 0 to V - 2: token V - 1 ends a text.
    Source: x ~ D in Ziegler et al. 2019, section 2.
    """
    return rng.integers(0, vocab_size - 1, size=(batch_size, prompt_length))
    # ANCHOR_END: sample_prompts


# ANCHOR: generate
def generate(actor, prompts, response_length, rng, eos_token):
    """Step 2. Sample a response to each prompt, token by token.

    token[t] ~ softmax(hidden[P - 1 + t] @ head), temperature 1

    prompts (B, P) int. Returns (responses, mask, logprobs), (B, T) each: responses
    int, eos_token after the end; mask 1 up to and including the first end token;
    logprobs in nats, 0 at padding. Raises ValueError for what is no token of the
    actor. Source: Radford et al. 2018 (GPT), equations 1 and 2.
    """
    prompts = token_ids(actor, prompts)
    batch_size, prompt_length = prompts.shape
    embed = actor["embed"]
    responses = np.full((batch_size, response_length), eos_token)
    mask = np.zeros(responses.shape, dtype=embed.dtype)
    logprobs = np.zeros_like(mask)
    context_sum = embed[prompts].sum(axis=1)  # (B, P, D) -> (B, D)
    token = prompts[:, -1]
    running = np.ones(batch_size, dtype=bool)
    for t in range(response_length):
        context = context_sum / (prompt_length + t) ** 0.5
        hidden = np.tanh(embed[token] + context @ actor["mix"])  # (B, D)
        sampled, logprob = sample_tokens(hidden @ actor["head"], rng)  # (B,) both
        token = np.where(running, sampled, eos_token)
        responses[:, t] = token
        mask[:, t] = running
        logprobs[:, t] = np.where(running, logprob, 0)
        running = token != eos_token
        context_sum = context_sum + embed[token]  # in place of a key-value cache
    return responses, mask, logprobs
    # ANCHOR_END: generate


# ANCHOR: score_responses
def score_responses(reward_model, prompts, responses, mask):
    """Step 3. Score each response by one real number.

    score = hidden[last real token] @ head, plus the bias of a trained model

    prompts (B, P), responses, mask (B, T). Returns (B,). Raises ValueError for shapes
    that differ, an empty row, or what is no token of the model.
    Source: InstructGPT (Ouyang et al. 2022), section 3.5.
    """
    last = last_positions(prompts, responses, mask)
    hidden, _ = backbone(reward_model, token_ids(reward_model, prompts, responses))
    scores = hidden[last] @ reward_model["head"]  # (B, P + T, D) -> (B, D) -> (B, 1)
    return scores[:, 0] + reward_model.get("bias", 0.0)
    # ANCHOR_END: score_responses


# ANCHOR: token_logprobs
def token_logprobs(model, prompts, responses):
    """Step 4. Log probability of each response token, at once.

    logprob[t] = log softmax(hidden[P - 1 + t] @ head)[responses[t]]

    prompts (B, P), responses (B, T). Returns (B, T) in nats, padding not masked.
    Raises ValueError for what is no token. Source: Radford et al. 2018, equation 2.
    """
    logprobs, _ = forward_logprobs(model, prompts, responses)
    return logprobs
    # ANCHOR_END: token_logprobs


# ANCHOR: kl_penalty
def kl_penalty(logprobs, ref_logprobs, estimator="k1"):
    """Step 4. Estimate KL(actor || reference), token by token.

    k1 = lp - ref    k2 = (lp - ref)² / 2    k3 = exp(ref - lp) - 1 - (ref - lp)

    k1 and k3 have the KL as their mean, k2 nearly; k1 may be negative on a token, the
    others never. In the reward only k1 trains RLHF: a reward moves the policy along
    E[∇ log p * kl], which is ∇ KL for k1, but for k2 and k3 vanishes to first order
    where actor and reference are equal: there, they do not pull the actor back.

    logprobs, ref_logprobs (B, T). Returns (B, T), all in nats. Raises ValueError for
    shapes that differ or another estimator.
    Source: Schulman 2020, "Approximating KL Divergence".
    """
    if np.shape(logprobs) != np.shape(ref_logprobs):
        raise ValueError("logprobs, ref_logprobs: shapes differ")
    difference = 1.0 * np.asarray(logprobs) - np.asarray(ref_logprobs)
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

    reward[t] = -beta * kl[t], and the score on top of it at the last real token,
    where the response is complete. A row's sum is score - beta * its KL.

    scores (B,), kl (B, T) in nats, mask (B, T), beta in score per nat. Returns (B,
    T), 0 at padding. Raises ValueError for shapes that do not fit or an empty row.
    Source: Ziegler et al. 2019, equation 2.
    """
    real = np.asarray(mask).astype(bool)
    if np.shape(kl) != real.shape or np.shape(scores) != real.shape[:-1]:
        raise ValueError("scores, kl, mask: shapes are not (B,), (B, T), (B, T)")
    if not real.any(axis=1).all():
        raise ValueError("mask: a row without a real token has nowhere to score")
    last = real.shape[1] - 1 - real[:, ::-1].argmax(axis=1)  # (B, T) -> (B,)
    priced = np.where(real & (beta != 0), kl, 0.0)  # 0 times infinity would be NaN
    scores = 1.0 * np.asarray(scores)
    rewards = np.zeros(real.shape, dtype=np.result_type(scores, priced))
    rewards[np.arange(len(last)), last] = scores
    return rewards - float(beta) * priced
    # ANCHOR_END: shape_rewards


# ANCHOR: critic_values
def critic_values(critic, prompts, responses):
    """Step 6. Predict of each state the reward still to come.

    value[t] = hidden[P - 1 + t] @ head: the state before token t is chosen

    prompts (B, P), responses (B, T). Returns (B, T), in units of reward, padding not
    masked. Raises ValueError for what is no token of the critic.
    Source: V in Schulman et al. 2016, section 2.
    """
    states, _ = predicting_states(critic, prompts, responses)  # (B, T, D)
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
    real = np.asarray(mask).astype(bool)
    if real.ndim != 2 or not np.shape(rewards) == np.shape(values) == real.shape:
        raise ValueError("rewards, values, mask: shapes are not (B, T), all three")
    rewards = np.where(real, rewards, 0.0)
    values = np.where(real, values, 0.0)
    advantages = np.zeros(real.shape, dtype=np.result_type(rewards, values))
    next_value = np.zeros(len(real), dtype=advantages.dtype)
    next_advantage = np.zeros_like(next_value)
    for t in reversed(range(real.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_advantage = np.where(real[:, t], advantages[:, t], next_advantage)
        next_value = np.where(real[:, t], values[:, t], next_value)
    advantages = np.where(real, advantages, 0.0)
    return advantages, advantages + values
    # ANCHOR_END: gae


# ANCHOR: rloo_advantages
def rloo_advantages(rewards, mask, group_size):
    """Step 6 without a critic. Each response against the others of its group.

    advantage = R - mean of the other R's, R the sum of a response's rewards

    rewards, mask (B, T), a group in group_size adjacent rows. Returns (B, T), the
    same for all real tokens of a response, 0 at padding. Raises ValueError for shapes
    that differ and rows not in whole groups. Source: RLOO, Ahmadian et al. 2024.
    """
    if np.shape(rewards) != np.shape(mask) or np.ndim(mask) != 2:
        raise ValueError("rewards, mask: shapes are not (B, T), both")
    if group_size < 2 or len(mask) % group_size:
        raise ValueError("group_size: rows are not in whole groups of 2 or more")
    rewards = np.where(mask, rewards, 0.0)
    totals = rewards.sum(axis=1, dtype=np.float64).reshape(-1, group_size)  # (B/G, G)
    others = (totals.sum(axis=1, keepdims=True) - totals) / (group_size - 1)
    advantages = (totals - others).reshape(-1, 1)  # (B/G, G) -> (B, 1)
    return np.where(mask, advantages, 0.0).astype(rewards.dtype)  # (B, 1) -> (B, T)
    # ANCHOR_END: rloo_advantages


# ANCHOR: grpo_advantages
def grpo_advantages(rewards, mask, group_size):
    """Step 6 without a critic. Each response's distance from its group's mean.

    advantage = (R - mean) / (deviation + 1e-6), R the sum of a response's rewards

    The deviation is the unbiased standard deviation of the group. rewards, mask (B,
    T), a group in group_size adjacent rows. Returns (B, T), the same for all real
    tokens of a response, 0 at padding. Raises ValueError for shapes that differ and
    rows not in whole groups. Source: GRPO, Shao et al. 2024, section 4.1.2.
    """
    if np.shape(rewards) != np.shape(mask) or np.ndim(mask) != 2:
        raise ValueError("rewards, mask: shapes are not (B, T), both")
    if group_size < 2 or len(mask) % group_size:
        raise ValueError("group_size: rows are not in whole groups of 2 or more")
    rewards = np.where(mask, rewards, 0.0)
    totals = rewards.sum(axis=1, dtype=np.float64).reshape(-1, group_size)  # (B/G, G)
    centered = totals - totals.mean(axis=1, keepdims=True)
    deviation = totals.std(axis=1, ddof=1, keepdims=True)  # (B/G, 1)
    advantages = (centered / (deviation + 1e-6)).reshape(-1, 1)  # -> (B, 1)
    return np.where(mask, advantages, 0.0).astype(rewards.dtype)  # (B, 1) -> (B, T)
    # ANCHOR_END: grpo_advantages


# ANCHOR: whiten
def whiten(x, mask):
    """Step 6. Shift and scale to mean 0 and variance 1.

    (x - mean) / sqrt(variance + 1e-8), mean and variance over the real tokens

    The variance is unbiased, divided by n - 1; a single token has variance 0 and not
    0 / 0. The sums are in float64: in float32 equal numbers would differ.
    x, mask (B, T). Returns (B, T), 0 at padding. Raises ValueError for shapes that
    differ or no real token. Source: masked_whiten in TRL.
    """
    x, mask = np.asarray(x), np.asarray(mask)
    if x.shape != mask.shape or not mask.any():
        raise ValueError("mask: needs the shape of x, and a real token")
    real = x[mask.astype(bool)].astype(np.float64)  # (B, T) -> (N,)
    variance = real.var(ddof=min(1, len(real) - 1))
    whitened = (x.astype(np.float64) - real.mean()) / np.sqrt(variance + 1e-8)
    return np.where(mask, whitened, 0.0).astype(np.result_type(x, 1.0))
    # ANCHOR_END: whiten


# ANCHOR: ppo_loss
def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip):
    """Step 7. PPO's clipped policy loss and its derivative.

    ratio = exp(new - old)
    loss = mean over real tokens of -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)
    d loss / d new = -ratio A / n where ratio A is the smaller of the two, else 0

    The minimum takes away the gain, and so the gradient, of moving the ratio past the
    clip. All (B, T), log probabilities in nats. Returns (loss, d_loss/d_new_logprobs,
    ratio): scalar, (B, T), (B, T), 0 at padding. Raises ValueError for shapes that
    differ or no real token. Source: Schulman et al. 2017, equation 7.
    """
    n = int(np.count_nonzero(mask))
    shapes = {np.shape(x) for x in (new_logprobs, old_logprobs, advantages, mask)}
    if len(shapes) > 1 or n == 0:
        raise ValueError("log probs, advantages, mask: shapes differ, or no token")
    log_ratio = np.where(mask, new_logprobs, 0.0) - np.where(mask, old_logprobs, 0.0)
    ratio = np.where(mask, np.exp(log_ratio), 0.0)
    advantages = np.where(mask, advantages, 0.0)
    clipped = np.clip(ratio, 1 - float(clip), 1 + float(clip)) * advantages
    unclipped = np.where(advantages == 0, 0.0, ratio * advantages)  # even if infinite
    loss = -np.minimum(unclipped, clipped).sum(dtype=np.float64) / n
    return loss, np.where(unclipped <= clipped, -unclipped, 0.0) / n, ratio
    # ANCHOR_END: ppo_loss


def is_clipped(ratio, advantages, clip):
    """True where PPO's clip stops the gradient; of real tokens, the clip fraction."""
    return ratio * advantages > np.clip(ratio, 1 - clip, 1 + clip) * advantages


# ANCHOR: value_loss
def value_loss(values, returns, mask):
    """Step 7. The critic's squared error and its derivative.

    loss = mean over real tokens of (value - return)²
    d loss / d value = 2 (value - return) / n

    All (B, T). Returns (loss, d_loss/d_values): scalar, (B, T), 0 at padding. Raises
    ValueError for shapes that differ or no real token.
    Source: Schulman et al. 2017, section 5 (L^VF).
    """
    n = int(np.count_nonzero(mask))
    if not np.shape(values) == np.shape(returns) == np.shape(mask) or n == 0:
        raise ValueError("values, returns, mask: shapes differ, or no real token")
    error = np.where(mask, values, 0.0) - np.where(mask, returns, 0.0)
    return np.square(error, dtype=np.float64).sum() / n, 2 * error / n
    # ANCHOR_END: value_loss


# ANCHOR: actor_gradients
def actor_gradients(actor, prompts, responses, old_logprobs, advantages, mask, clip):
    """Step 7. Gradients of ppo_loss for the actor's weights.

    Forward, loss, backward: d loss / d weights = d loss / d new * d new / d weights

    prompts (B, P), the others (B, T). Returns (gradients, loss, ratio): keyed like
    the parameters, scalar, (B, T) with 0 at padding. Raises ValueError as ppo_loss
    does, and for what is no token of the actor. Source: Schulman et al. 2017,
    equation 7, by the chain rule.
    """
    new_logprobs, cache = forward_logprobs(actor, prompts, responses)  # (B, T)
    loss, d_new, ratio = ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip)
    return backward_logprobs(actor, cache, d_new), loss, ratio
    # ANCHOR_END: actor_gradients


# ANCHOR: critic_gradients
def critic_gradients(critic, prompts, responses, returns, mask):
    """Step 7. Gradients of value_loss for the critic's weights.

    prompts (B, P), the others (B, T). Returns (gradients, loss): keyed like the
    parameters, scalar. Raises ValueError as value_loss does, and for what is no token
    of the critic. Source: Schulman et al. 2017, section 5, by the chain rule.
    """
    states, cache = predicting_states(critic, prompts, responses)  # (B, T, D)
    values = (states @ critic["head"])[..., 0]  # (B, T, D) -> (B, T)
    loss, d_values = value_loss(values, returns, mask)
    d_states = d_values[..., None] * critic["head"][:, 0]  # (B, T) -> (B, T, D)
    gradients = backbone_gradients(critic, cache, d_states)
    gradients["head"] = np.einsum("btd,bt->d", states, d_values)[:, None]  # (D, 1)
    return gradients, loss
    # ANCHOR_END: critic_gradients


# ANCHOR: adam_step
def adam_step(params, gradients, state, learning_rate):
    """Step 7. One Adam update, IN PLACE; returns None.

    m = 0.9 m + 0.1 g    v = 0.999 v + 0.001 g²    p -= rate * m̂ / (sqrt(v̂) + 1e-8)

    with m̂ = m / (1 - 0.9^t), v̂ = v / (1 - 0.999^t). Changes params and state, which
    starts as {} and holds t, m and v. params, m, v are keyed as gradients are; m and
    v have float32 or better, or g² of a float16 would be 0. Raises ValueError for
    shapes that differ and what is no float. Source: Kingma & Ba 2015, algorithm 1.
    """
    gradients = {name: np.asarray(g) for name, g in gradients.items()}
    for name, g in gradients.items():
        if name not in params or g.shape != params[name].shape:
            raise ValueError(f"{name}: is no parameter, or its shape differs")
        if params[name].dtype.kind != "f":
            raise ValueError(f"{name}: parameters must be floats")
    if not state:
        kinds = {k: np.result_type(g, np.float32) for k, g in gradients.items()}
        zeros = {k: np.zeros(g.shape, kinds[k]) for k, g in gradients.items()}
        state.update(t=0, m=zeros, v=zeros.copy())
    state["t"] += 1
    t, m, v = state["t"], state["m"], state["v"]
    for name, g in gradients.items():
        g = g.astype(m[name].dtype)
        m[name] = 0.9 * m[name] + 0.1 * g
        v[name] = 0.999 * v[name] + 0.001 * g**2
        m_hat = m[name] / (1 - 0.9**t)
        v_hat = v[name] / (1 - 0.999**t)
        params[name] -= learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8)
    # ANCHOR_END: adam_step


# ---------------------------------------------------------------- 5. before the loop

# A human's demonstrations, harsh words and soft ones, so that tuning has a choice
WORDS = """
angry apple arch atom alive black bubble bring bone beach church cloth crystal code
camel dress dinner duck dove date egg empty earth elbow exit fly fresh forest fire
face ghost glass green giant game happy help hill home huge inch icy island iron
item jump jelly jazz joke juice king knock kettle kite koala lunch long little lemon
lake myth moss milk menu maze night north nest number nature only owl otter orange
open plant print puppy page police quartz queen quick quote quiz rhythm rabbit rust
river rose snow strong spring sugar side thing trust table time tone ugly umbrella
upper unit user very valley velvet volume vine walk world wheel wine wave xylem
xylophone xenon xebec xeric yacht yummy yellow year yoga zinc zigzag zebra zone zero
""".split()


# ANCHOR: demonstrations
def demonstrations(words, config):
    """Words as a human would complete them: first letters, and the rest.

    A word that does not fit into config.response_length with its end token is left
    out. Returns (prompts, responses, mask) as generate would: (N, 1) and (N, T) int,
    (N, T), the mask 1 up to and including the end token. Raises ValueError if no word
    fits. Source: InstructGPT (Ouyang et al. 2022), section 3.2, demonstration data.
    """
    length = 1 + config.response_length
    texts = [word.ljust(length, ".") for word in words if len(word) < length]
    if not texts:
        raise ValueError("--response-length: no word fits, with its end token")
    texts = [[LETTERS.index(letter) for letter in text] for text in texts]
    prompts, responses = np.split(np.array(texts), [1], axis=1)  # (N, 1), (N, T)
    ends = np.cumsum(responses == LETTERS.index("."), axis=1)
    return prompts, responses, (ends <= 1).astype(np.float32)
    # ANCHOR_END: demonstrations


# ANCHOR: fine_tune
def fine_tune(model, prompts, responses, mask, rng):
    """Learn to write as the human wrote, IN PLACE: supervised fine-tuning.

    loss = mean over real tokens of -log p(token), the cross-entropy
    d loss / d log p = -1 / n

    400 Adam updates, each on 128 rows or all there are. prompts (N, P), responses,
    mask (N, T). Returns the losses (400,), in nats a token. Raises ValueError for
    shapes that do not fit. Source: InstructGPT (Ouyang et al. 2022), section 3.5.
    """
    prompts, responses, mask = map(np.asarray, (prompts, responses, mask))
    if responses.shape != mask.shape or len(prompts) != len(mask) or not mask.any():
        raise ValueError("prompts, responses, mask: shapes differ, or no real token")
    state, losses = {}, []
    for learning_rate in np.linspace(3e-2, 0, 400, endpoint=False):
        rows = rng.permutation(len(prompts))[:128]
        logprobs, cache = forward_logprobs(model, prompts[rows], responses[rows])
        real = mask[rows].astype(logprobs.dtype)
        n = max(real.sum(), 1)  # these rows may have no real token
        losses.append(-(logprobs * real).sum() / n)
        gradients = backward_logprobs(model, cache, -real / n)
        adam_step(model, gradients, state, float(learning_rate))
    return np.array(losses)
    # ANCHOR_END: fine_tune


# ANCHOR: human_scores
def human_scores(prompts, responses, mask, vocab_size):
    """What the human thinks of each word, prompt and response: the gold reward.

    (1 - |2 v - 1|) * distinct letters / letters, v the share of vowels among them

    The human is simulated: best, at 1, are words that mix vowels and consonants
    evenly and repeat no letter. Tokens from 0 are a, b, ...; token V - 1 ends the
    word. Training never sees these scores. prompts (B, P), responses, mask (B, T).
    Returns (B,) in [0, 1], 0 for an empty word. Raises ValueError for shapes that
    differ. Source: the gold reward model of Gao et al. 2023; the rule is ours.
    """
    if np.shape(responses) != np.shape(mask) or len(prompts) != len(responses):
        raise ValueError("prompts, responses, mask: not (B, P), (B, T), (B, T)")
    words = np.concatenate([prompts, responses], axis=1)  # (B, P + T)
    real = np.concatenate([np.ones(np.shape(prompts)), mask], axis=1).astype(bool)
    real &= words != vocab_size - 1
    vowels = (np.isin(words, [0, 4, 8, 14, 20]) & real).sum(axis=1)  # a, e, i, o, u
    distinct = [len(set(word[kept])) for word, kept in zip(words, real)]
    letters = np.maximum(real.sum(axis=1), 1)
    return (1 - abs(2 * vowels / letters - 1)) * distinct / letters
    # ANCHOR_END: human_scores


def completes_word(prompts, responses, mask, config):
    """Whether prompt and response are a demonstrated word and its end token. (B,)."""
    shown = np.concatenate(demonstrations(WORDS, config)[:2], axis=1)  # (N, 1 + T)
    responses = np.where(mask, responses, config.vocab_size - 1)
    written = np.concatenate([prompts, responses], axis=1)  # (B, 1 + T)
    return (written[:, None] == shown).all(axis=2).any(axis=1)


# ANCHOR: collect_preferences
def collect_preferences(reference, config, rng):
    """Let the human choose between two responses to each prompt.

    P(the first is chosen) = sigmoid(8 (human(first) - human(second)))

    so that labels are noisy, as people's are. The reference writes both. With N =
    config.preference_pairs, returns (prompts, responses, mask) of 2 N rows: the
    chosen responses, then the rejected ones in the same order; (2 N, P), (2 N, T)
    both. Source: Bradley & Terry 1952; Christiano et al. 2017, section 2.2.
    """
    pairs, vocab_size = config.preference_pairs, config.vocab_size
    prompts = sample_prompts(rng, pairs, config.prompt_length, vocab_size)
    prompts = np.concatenate([prompts, prompts])  # (N, P) -> (2 N, P)
    length, eos = config.response_length, config.vocab_size - 1
    responses, mask, _ = generate(reference, prompts, length, rng, eos)
    human = human_scores(prompts, responses, mask, vocab_size)  # (2 N,)
    first, second = np.split(human, 2)  # (N,) both
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

    chosen, rejected (N,), the scores of both responses of each pair. Returns (loss,
    d_chosen, d_rejected): scalar in nats, (N,), (N,). Raises ValueError for shapes
    that differ or no pair. Source: Stiennon et al. 2020; InstructGPT, equation 1.
    """
    if np.shape(chosen) != np.shape(rejected) or not np.size(chosen):
        raise ValueError("chosen, rejected: shapes differ, or no pair")
    lead = 1.0 * np.asarray(rejected) - np.asarray(chosen)  # of the rejected one
    losses = np.logaddexp(0, lead)  # -log sigmoid(x) = log(1 + exp(-x))
    d_rejected = np.exp(lead - losses) / losses.size  # a sigmoid
    return losses.mean(), -d_rejected, d_rejected
    # ANCHOR_END: preference_loss


# ANCHOR: reward_gradients
def reward_gradients(reward_model, prompts, responses, mask):
    """Gradients of preference_loss for the reward model.

    prompts (2 N, P), responses, mask (2 N, T) of collect_preferences, the chosen
    first. Returns (gradients, loss): keyed like the parameters, scalar. Raises
    ValueError as score_responses does. Source: InstructGPT, equation 1, chain rule.
    """
    head, tokens = reward_model["head"], token_ids(reward_model, prompts, responses)
    hidden, cache = backbone(reward_model, tokens)  # (2 N, P + T, D)
    last = last_positions(prompts, responses, mask)
    scores = hidden[last] @ head[:, 0]  # (2 N, P + T, D) -> (2 N, D) -> (2 N,)
    loss, d_chosen, d_rejected = preference_loss(*np.split(scores, 2))
    d_scores = np.concatenate([d_chosen, d_rejected])[:, None]  # (2 N, 1)
    d_hidden = np.zeros_like(hidden)
    d_hidden[last] = d_scores * head[:, 0]  # (2 N, D)
    gradients = backbone_gradients(reward_model, cache, d_hidden)
    gradients["head"] = hidden[last].T @ d_scores  # (D, 1)
    return gradients, loss
    # ANCHOR_END: reward_gradients


# ANCHOR: train_reward_model
def train_reward_model(reward_model, prompts, responses, mask, rng):
    """Learn to score as the human chose.

    200 Adam updates on 128 pairs each. Then scores are shifted and scaled to mean 0
    and standard deviation 1 over these responses, if they differ at all. prompts (2
    N, P), responses, mask (2 N, T) of collect_preferences. Returns (reward_model,
    losses): a new model with a bias, and (200,). Raises ValueError for shapes that do
    not fit. Source: Stiennon et al. 2020, section 3.4; InstructGPT, section 3.5.
    """
    reward_model = {p: reward_model[p].copy() for p in ("embed", "mix", "head")}
    prompts, responses, mask = map(np.asarray, (prompts, responses, mask))
    pairs, state, losses = len(prompts) // 2, {}, []
    if not len(prompts) == len(responses) == len(mask) == 2 * pairs > 0:
        raise ValueError("prompts, responses, mask: not 2 N rows each")
    for learning_rate in np.linspace(5e-3, 0, 200, endpoint=False):
        chosen = rng.integers(0, pairs, size=128)
        rows = np.concatenate([chosen, chosen + pairs])  # (256,), two of each pair
        batch = prompts[rows], responses[rows], mask[rows]
        gradients, loss = reward_gradients(reward_model, *batch)
        adam_step(reward_model, gradients, state, float(learning_rate))
        losses.append(loss)
    scores = np.float64(score_responses(reward_model, prompts, responses, mask))
    deviation = scores.std() if np.ptp(scores) > 1e-6 else 1.0
    reward_model["head"] /= deviation
    reward_model["bias"] = np.float32([-scores.mean() / deviation])
    return reward_model, np.array(losses)
    # ANCHOR_END: train_reward_model


def learn_from_human(config, rng):
    """Both stages before the loop, InstructGPT's first two.

    Returns (untrained, reference, reward_model, losses by name). The reward model
    begins from the backbone before fine-tuning: from the fine-tuned one, whose states
    saturate, it is as accurate, but at beta 0 it is hacked on some seeds only.
    """
    untrained = init_model(rng, config.vocab_size, config.width, config.vocab_size)
    reference = {name: weights.copy() for name, weights in untrained.items()}
    tuning = fine_tune(reference, *demonstrations(WORDS, config), rng)
    preferences = collect_preferences(reference, config, rng)
    reward_model = init_reward_model(untrained, rng)
    reward_model, choosing = train_reward_model(reward_model, *preferences, rng)
    losses = {"fine_tuning/losses": tuning, "preferences/losses": choosing}
    return untrained, reference, reward_model, losses


# ---------------------------------------------------------------- 6. the models


class Models(NamedTuple):
    """The four models, dicts of arrays; the critic is None with rloo and grpo."""

    actor: dict
    critic: dict
    reward_model: dict
    reference: dict


def init_weights(rng, rows, columns, deviation):
    """Draw a float32 matrix uniformly around 0 with the given standard deviation."""
    centered = rng.random((rows, columns), dtype=np.float32) - np.float32(0.5)
    return centered * np.float32(12**0.5 * deviation)


def init_model(rng, vocab_size, width, out_width):
    """Draw a model in float32: embed (V, D), mix (D, D), head (D, out_width)."""
    return {  # context outweighs the token, so that late states know the whole text
        "embed": init_weights(rng, vocab_size, width, 0.1),
        "mix": init_weights(rng, width, width, 5 / width**0.5),
        "head": init_weights(rng, width, out_width, 1 / width**0.5),
    }


def init_reward_model(model, rng):
    """A reward model before it learns: a model's backbone and a random head."""
    head = init_weights(rng, len(model["mix"]), 1, 2.5 / len(model["mix"]) ** 0.5)
    return {"embed": model["embed"].copy(), "mix": model["mix"].copy(), "head": head}


def init_models(config, rng, reference=None, reward_model=None):
    """All four as the loop finds them; random where no trained ones are given. Actor
    and critic begin as the reference. drift sets the actor off it and the critic's
    head off 0, as training would: else the first KL would be 0."""
    sizes, drift = (config.vocab_size, config.width), np.float32(config.drift)
    reference = reference or init_model(rng, *sizes, config.vocab_size)
    reward_model = reward_model or init_reward_model(reference, rng)
    noise = init_model(rng, *sizes, config.vocab_size)
    actor = {name: reference[name] + drift * noise[name] for name in reference}
    critic = None
    if config.advantage == "gae":
        head = drift * init_weights(rng, config.width, 1, 1 / config.width**0.5)
        critic = {**{p: reference[p].copy() for p in ("embed", "mix")}, "head": head}
    return Models(actor, critic, reward_model, reference)


def token_ids(model, *parts):
    """Arrays of tokens side by side, (B, S) int64; ValueError for what is none."""
    parts = [np.asarray(part) for part in parts]
    if any(x.ndim != 2 or not x.size or len(x) != len(parts[0]) for x in parts):
        raise ValueError("prompts, responses: shapes are not (B, P), (B, T)")
    if any(part.dtype.kind not in "iu" for part in parts):
        raise ValueError("prompts, responses: tokens are whole numbers")
    tokens = np.concatenate([part.astype(np.int64) for part in parts], axis=1)
    if tokens.min() < 0 or tokens.max() >= len(model["embed"]):
        raise ValueError("prompts, responses: tokens are from 0 to V - 1")
    return tokens


def last_positions(prompts, responses, mask):
    """Where the last real tokens stand in both, (B,) twice; ValueError for none."""
    real = np.asarray(mask).astype(bool)
    if real.shape != np.shape(responses) or not real.any(axis=1).all():
        raise ValueError("mask: needs the shape of responses, and a 1 in each row")
    from_the_end = real[:, ::-1].argmax(axis=1)  # (B, T) -> (B,)
    last = np.shape(prompts)[1] + real.shape[1] - 1 - from_the_end
    return np.arange(len(real)), last


def backbone(model, tokens):
    """Hidden states of a causal one-layer model, (B, S) -> (B, S, D), and a cache.

    context[t] = sum(embed[x[0..t]]) / sqrt(t + 1): equal attention, constant variance
    hidden[t] = tanh(embed[x[t]] + context[t] @ mix)
    """
    x = model["embed"][tokens]  # (B, S) -> (B, S, D)
    context = uniform_attention(x) @ x  # (S, S) @ (B, S, D)
    hidden = np.tanh(x + context @ model["mix"])
    return hidden, (tokens, hidden, context)


def backbone_gradients(model, cache, d_states):
    """Gradients for embed and mix, given d loss / d the last T states, (B, T, D)."""
    tokens, hidden, context = cache
    d_hidden = np.zeros_like(hidden)
    d_hidden[:, -d_states.shape[1] :] = d_states
    d_before = d_hidden * (1 - hidden**2)  # through tanh
    d_mix = np.einsum("bsd,bse->de", context, d_before, optimize=True)
    d_x = d_before + uniform_attention(hidden).T @ (d_before @ model["mix"].T)
    return {"embed": sum_by_token(tokens, d_x, len(model["embed"])), "mix": d_mix}


def uniform_attention(x):
    """How position t of x (B, S, D) attends to s: 1 / sqrt(t + 1) up to t. (S, S)."""
    positions = np.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return np.tri(len(positions), dtype=x.dtype) / np.sqrt(positions)[:, None]


def predicting_states(model, prompts, responses):
    """The states that predict the response, (B, T, D), token t at P - 1 + t, and the
    cache for their gradients. prompts (B, P), responses (B, T)."""
    tokens = token_ids(model, prompts, responses)[:, :-1]  # nothing follows the last
    hidden, cache = backbone(model, tokens)  # (B, P + T - 1, D)
    return hidden[:, np.shape(prompts)[1] - 1 :], cache


def log_softmax(logits):
    """log(exp(logits) / Σ exp(logits)) over the last axis; nothing overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def exact_kl(logits, reference, prompts, responses):
    """KL(actor || reference), at each position Σ over v of p(v) log(p(v) / q(v)): (B,
    T) in nats, padding not masked. logits (B, T, V) are the actor's."""
    states, _ = predicting_states(reference, prompts, responses)  # (B, T, D)
    if logits.shape != (*responses.shape, reference["head"].shape[1]):
        raise ValueError("logits: shape is not (B, T, V)")
    kl = np.empty(responses.shape, dtype=logits.dtype)
    for t in range(responses.shape[1]):  # a position at a time, to save memory
        log_p = log_softmax(logits[:, t])  # (B, V)
        log_q = log_softmax(states[:, t] @ reference["head"])  # (B, V)
        kl[:, t] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return kl


def sample_tokens(logits, rng):
    """Draw a token for each row of logits (B, V): the first whose running sum of
    probability reaches a random share of the total. (tokens, logprobs), (B,) both."""
    logprobs = log_softmax(logits)
    running = np.cumsum(np.exp(logprobs), axis=1, dtype=np.float64)
    share = 1 - rng.random(len(logits))  # above 0: what has no weight is never drawn
    tokens = (running >= share[:, None] * running[:, -1:]).argmax(axis=1)
    return tokens, np.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


# What follows is there for speed: the logits of all tokens, an (N, V) matrix, would
# cost more in fresh memory than in arithmetic. So log probabilities and gradients see
# the vocabulary in slices that stay in the processor's cache.


def forward_logprobs(model, prompts, responses):
    """Log probabilities of response tokens (B, T), and a cache for their gradients.

    logprob = state · head[token] - log Σ exp(state · head[v]) over the vocabulary
    """
    states, cache = predicting_states(model, prompts, responses)  # (B, T, D)
    head, flat = model["head"], states.reshape(-1, states.shape[2])  # (N, D)
    log_sums = np.full(len(flat), -np.inf, dtype=states.dtype)
    for columns in vocabulary_slices(flat, head):
        logits = flat @ head[:, columns]  # (N, D) -> (N, v)
        highest = logits.max(axis=1)
        logits -= highest[:, None]
        np.exp(logits, out=logits)
        sums = logits @ np.ones(logits.shape[1], logits.dtype)  # faster than .sum
        log_sums = np.logaddexp(log_sums, highest + np.log(sums))
    log_sums = log_sums.reshape(states.shape[:2])  # (N,) -> (B, T)
    chosen = np.einsum("btd,dbt->bt", states, head[:, responses])  # (B, T)
    return chosen - log_sums, (cache, states, np.asarray(responses), log_sums)


def backward_logprobs(model, cache, d_logprobs):
    """Gradients for all weights, given d_logprobs = d loss / d logprobs (B, T).

    d logprob / d logits = one-hot(token) - softmax(logits)
    """
    cache, states, responses, log_sums = cache
    head, flat = model["head"], states.reshape(-1, states.shape[2])  # (N, D)
    tokens, scale = responses.ravel(), d_logprobs.reshape(-1, 1)  # (N,), (N, 1)
    scaled = scale * flat  # (N, D): so that no (N, v) matrix need be scaled
    d_flat = scale * head.T[tokens]  # the one-hot's share, (N, D)
    d_head = np.empty_like(head)
    for columns in vocabulary_slices(flat, head):
        softmax = flat @ head[:, columns]  # (N, D) -> (N, v)
        softmax -= log_sums.reshape(-1, 1)
        np.exp(softmax, out=softmax)
        d_flat -= scale * (softmax @ head[:, columns].T)  # (N, v) -> (N, D)
        d_head[:, columns] = -scaled.T @ softmax  # (D, N) @ (N, v)
    d_head += sum_by_token(tokens, scaled, head.shape[1]).T  # the one-hot's share
    d_states = d_flat.reshape(states.shape)  # (N, D) -> (B, T, D)
    return {**backbone_gradients(model, cache, d_states), "head": d_head}


def sum_by_token(tokens, rows, vocab_size):
    """Add up the rows (..., D) of each token (...): (V, D); flat, which is fast."""
    width = rows.shape[-1]
    sums = np.zeros(vocab_size * width, dtype=rows.dtype)
    places = tokens[..., None].astype(np.int64) * width + np.arange(width)
    np.add.at(sums, places.ravel(), rows.ravel())
    return sums.reshape(vocab_size, width)


def vocabulary_slices(states, head):
    """Slices of the vocabulary in which logits, states @ head, take at most 4 MB."""
    step = max(1, 1_000_000 // len(states))
    return [slice(first, first + step) for first in range(0, head.shape[1], step)]


# Freed at once, so that glibc keeps what is smaller for the next array: a training on
# letters takes 0.8 of the processor time that it takes without this line.
np.empty(32_000_000, dtype=np.uint8)

# ---------------------------------------------------------------- 7. measuring


def real_mean(x, mask):
    """Mean over the real tokens of what is 0 at padding, (..., B, T) -> (...)."""
    return x.sum(axis=(-2, -1)) / np.count_nonzero(mask)


def judge_stages(untrained, reference, reward_model, config, rng):
    """What both stages before the loop reached, on fresh responses: arrays by name.

    best_loss, in nats a token: where k words share a first letter each has p = 1 / k.
    accuracy: the share of pairs whose chosen response scores higher, a tie half.
    """
    letters, _, real = demonstrations(WORDS, config)
    alike = (letters == letters.T).sum(axis=1)  # (N, N) -> (N,)
    fresh = replace(config, preference_pairs=2048)
    pairs = collect_preferences(reference, fresh, rng)
    length, eos_token = config.response_length, config.vocab_size - 1
    before, *_ = generate(untrained, pairs[0][:4], length, rng, eos_token)
    seen = dict(zip(("prompts", "responses", "mask"), pairs))
    seen["scores"] = score_responses(reward_model, *pairs)
    seen["human"] = human_scores(*pairs, config.vocab_size)
    chosen, rejected = np.split(seen["scores"], 2)
    seen["accuracy"] = np.heaviside(chosen - rejected, 0.5).mean()
    return {f"preferences/{name}": array for name, array in seen.items()} | {
        "fine_tuning/best_loss": np.log(alike).sum() / real.sum(),
        "fine_tuning/before": before,
        "fine_tuning/count": len(letters),
        "fine_tuning/words": completes_word(*pairs, config).mean(),
    }


def walk_through(models, config, rng):
    """One step of core_loop: its dicts, with what a reader wants to see besides."""
    data = {}
    for stage in core_loop(models, config, rng):
        data |= stage
        texts = data["prompts"], data.get("responses")
        if "old_logprobs" in stage:
            states, _ = predicting_states(models.actor, *texts)  # (B, T, D)
            logits = stage["logits"] = states @ models.actor["head"]  # (B, T, V)
        if "kl" in stage:
            logprobs = data["old_logprobs"], data["ref_logprobs"]
            stage |= {k: kl_penalty(*logprobs, k) for k in ("k1", "k2", "k3")}
            exact = exact_kl(logits, models.reference, *texts)
            stage["exact_kl"] = exact * data["mask"]
            del logits  # the largest array of all
        if "ratio" in stage:
            check_finite(models, data, 1)
            after = token_logprobs(models.actor, *texts)
            stage["new_logprobs"] = after * data["mask"]
            acts = data["ratio"], data["whitened"]
            stage["clipped"] = is_clipped(*acts, config.clip)
        yield stage


def train(models, config, rng):
    """core_loop, drained a step at a time: yields (metrics, the step's arrays)."""
    data, step = {}, 0
    for stage in core_loop(models, config, rng):
        data |= stage
        if "ratio" in stage:
            step += 1
            check_finite(models, data, step)
            yield step_metrics(data, config, step), data


def check_finite(models, data, step):
    """Raises FloatingPointError where a loss is not finite, a weight beyond 10^6, or
    every ratio 0 or infinite: then nothing is left to train on."""
    learned = [*models.actor.values(), *(models.critic or {}).values()]
    losses = [*data["actor_loss"], *data["critic_loss"]]
    sound = np.isfinite(losses).all() and all((abs(w) < 1e6).all() for w in learned)
    if not sound or np.isin(data["ratio"][-1][data["mask"] != 0], [0, np.inf]).all():
        advice = "lower --learning-rate, --beta or --drift"
        raise FloatingPointError(f"step {step} diverged: {advice}")


def step_metrics(data, config, step):
    """What a step is judged by, under TRL's names where it has one: means over the
    batch of sums over a response; of policy/, loss/, val/ratio over all tokens."""
    texts, ratio = (data["prompts"], data["responses"], data["mask"]), data["ratio"]
    mask, ended = data["mask"], data["responses"] == config.vocab_size - 1
    score, kl = data["scores"].mean(), data["kl"].sum(axis=1).mean()
    clipped = is_clipped(ratio, data["whitened"], config.clip)
    log_ratio = np.log(np.where(mask, np.maximum(ratio, 1e-37), 1))  # no log of 0
    metrics = {
        "objective/scores": score,
        "objective/kl": kl,
        "objective/entropy": -data["old_logprobs"].sum(axis=1).mean(),
        "objective/non_score_reward": 0.0 - config.beta * kl,
        "objective/rlhf_reward": score - config.beta * kl,
        "policy/approxkl_avg": 0.5 * real_mean(log_ratio**2, mask).mean(),
        "policy/clipfrac_avg": real_mean(clipped, mask).mean(),
        "loss/policy_avg": data["actor_loss"].mean(),
        "val/ratio": real_mean(ratio, mask).mean(),
        "val/num_eos_tokens": np.count_nonzero(ended & (mask != 0)),
        "val/response_length": np.count_nonzero(mask) / len(mask),
        "lr": data["lr"],
        "episode": step * config.batch_size,
    }
    if config.advantage == "gae":
        metrics["loss/value_avg"] = data["critic_loss"].mean()
    if config.readable:
        human = human_scores(*texts, config.vocab_size)
        metrics["objective/human_scores"] = human.mean()
        metrics["val/words"] = completes_word(*texts, config).mean()
    return metrics


def stretch_means(values):
    """Of stretches of steps that double in length, from 0, 1, 3, 7, ... on: their
    starts, means and standard errors, as neighbouring steps differ."""
    starts = 2 ** np.arange(len(values).bit_length()) - 1
    sizes = np.diff([*starts, len(values)])
    deviation = np.sqrt(np.mean(np.diff(values) ** 2) / 2)  # of one step
    return starts, np.add.reduceat(values, starts) / sizes, deviation / np.sqrt(sizes)


def gain_shares(start, reached, beta, every_prompt):
    """J_start, J, J_star, (J - J_start) / (J_star - J_start), and standard errors.

    start, reached (prompts, responses): score - β * KL of the reference's responses
    and the actor's. J_star is NaN where half of the responses lower it by more than
    its error, the share where J_star - J_start is less than three of its own errors.
    """

    def error(values):  # with every prompt there, only the responses are chance
        if every_prompt:
            return np.sqrt(values.var(axis=1, ddof=1).mean() / values.size)
        return values.mean(axis=1).std(ddof=1) / len(values) ** 0.5

    best = start * np.nan
    if beta:  # log E[exp], with the noise of each response in it
        highest = start.max(axis=1, keepdims=True)  # (prompts, 1)
        weights = np.exp((start - highest) / beta)
        mean = weights.mean(axis=1, keepdims=True)
        best = highest + beta * (np.log(mean) + weights / mean - 1)
        halves = weights.reshape(len(start), 2, -1).mean(axis=2)  # (prompts, 2)
        if beta * np.log(mean / halves).mean() > error(best):
            best = start * np.nan
    stake, share = best - start, np.nan
    if stake.mean() > max(3 * error(stake), 1e-6):
        share = (reached - start).mean() / stake.mean()
    noise = error(reached - start - share * stake) / stake.mean()
    gain = {"share": share, "share_error": noise}
    for name, values in ("J_start", start), ("J", reached), ("J_star", best):
        gain |= {name: values.mean(), f"{name}_error": error(values)}
    return gain


def attainable_gain(models, config, rng, response_count=512):
    """How much of what is possible training has reached, in J = E[score] - β E[KL].

    No policy exceeds J_star = E over prompts of β log E[exp(score / β)], over the
    reference's responses (Korbak et al. 2022; Rafailov et al. 2023, equation 4).
    From response_count fresh responses to every prompt where there are at most 32,
    else to 32 drawn ones. Returns floats by name; {} where it would take long.
    """
    length, eos_token = config.response_length, config.vocab_size - 1
    every_prompt = config.prompt_length == 1 and config.vocab_size <= 33
    prompts = np.arange(eos_token)[:, None]
    if not every_prompt:
        prompts = sample_prompts(rng, 32, config.prompt_length, config.vocab_size)
    shape = len(prompts), response_count
    tokens = math.prod(shape) * (config.prompt_length + length)
    if tokens * config.width * (config.width + config.vocab_size) > 2e9:
        return {}
    prompts = np.repeat(prompts, response_count, axis=0)
    samples = []
    for policy in models.reference, models.actor:
        responses, mask, logprobs = generate(policy, prompts, length, rng, eos_token)
        scores = score_responses(models.reward_model, prompts, responses, mask)
        ref_logprobs = token_logprobs(models.reference, prompts, responses) * mask
        kl = kl_penalty(logprobs, ref_logprobs).sum(axis=1, dtype=np.float64)
        samples.append((scores - config.beta * kl).reshape(shape))
    gain = {"score": scores.mean(), "kl": kl.mean()}  # of the actor
    if config.readable:
        texts = prompts, responses, mask
        gain["human"] = human_scores(*texts, config.vocab_size).mean()
        gain["words"] = completes_word(*texts, config).mean()
    return gain | gain_shares(*samples, config.beta, every_prompt)


# ---------------------------------------------------------------- 8. the presentation

PICTURE = """
  prompts ─► actor ─► responses ─┬─► reward model ─► score ────────┐
               ▲                 ├─► reference ─► KL to the actor ─┴► rewards ─┐
               │                 └─► critic ────► values ─────────► GAE ◄──────┘
               │                        ▲                            │
               └────── PPO update ──────┴─────────── advantages ◄────┘
"""
PICTURE_WITHOUT_CRITIC = """
  prompts ─► actor ─► responses ─┬─► reward model ─► score ────────┐
               ▲                 └─► reference ─► KL to the actor ─┴► rewards ─┐
               └─ PPO update ◄── advantages ◄── comparison in a group ◄────────┘
"""
ASCII = str.maketrans("─►▲│└┘┐┬├┤┴◄●○△…·βγδλ±", "->^|+++++++<ox*..bgdl~")
STYLES = {  # a terminal's own theme decides on its colours; exports have theirs
    "terminal": ("dim", "cyan", "magenta", "green", "blue", "red"),
    "dark": ("#a0a0a0", "#50c8dc", "#dc8ce6", "#50d278", "#82aaff", "#ff7878"),
    "light": ("#606060", "#00687a", "#8b2a96", "#1c6b2c", "#1f4fbf", "#b3261e"),
}
OWNERS = ("actor", "critic", "reward", "reference", "human")
WHY = (  # asked before each step, answered on its page
    "Why only prompts, and no answers?",
    'Why are log probs "old"?',
    "Why one number for a whole response?",
    "Why can the KL of a token be negative?",
    "Why does the score stand on the last token?",
    "Why advantages, and not the rewards themselves?",
    "Why is the ratio 1 in the first epoch, and why clip it?",
)
LEDGER = {"actor": "old_logprobs", "ref": "ref_logprobs", "KL": "kl"}
LEDGER |= {"reward": "rewards", "value": "values", "advantage": "advantages"}
LEDGER |= {"A": "whitened"}
METRICS = {"score": "objective/scores", "human": "objective/human_scores"}
METRICS |= {"words": "val/words", "KL": "objective/kl"}


class Styled(RegexHighlighter):
    """Styles pages, which are texts, by layout and by the names of the models."""

    highlights = (
        r"(?m)^(?P<title>\S.*)",  # a line without indent
        r"(?m)(?P<quiet>^    (?! ).*|\t.*)",  # narration, by its indent; notes, after a tab
        r"(?<![\w.])(?P<figure>-?\d[\d,.]*\d|\d)",
        *(rf"(?i)\b(?P<{owner}>{owner}( model)?)\b" for owner in OWNERS),
    )


def make_console(styles="terminal", **options):
    """A console of 80 columns that styles texts and wraps none."""
    quiet, *colours = STYLES[styles]
    theme = {owner: f"not dim {colour}" for owner, colour in zip(OWNERS, colours)}
    theme |= {"title": "bold", "quiet": quiet, "figure": "bold not dim"}
    options |= {"width": 80, "tab_size": 38, "soft_wrap": True, "markup": False}
    return Console(emoji=False, highlighter=Styled(), theme=Theme(theme), **options)


def table(columns, star=None):
    """Columns, {head: numbers or texts}; in one of them the largest has a star."""
    grid, styled, cells = Table(box=None, padding=(0, 0, 0, 2)), Styled(), []
    for head, values in columns.items():
        texts = [x if isinstance(x, str) else fixed(x) for x in values]
        if head == star:
            texts[np.argmax(values)] += "*"
        justify = "right" if re.match(r"-|\d", "".join(texts)) else "left"
        grid.add_column(styled(head), justify=justify, overflow="fold")
        cells.append(texts)
    for row in zip(*cells):
        grid.add_row(*row)
    return grid


def fixed(value, digits=2, error=None):
    """A number with these decimals, never a negative zero; a dash for NaN."""
    text = f"{round(float(value), digits) + 0.0:.{digits}f}"
    text += "" if error is None else f" ± {error:.{digits}f}"
    return "-" if np.isnan(value) else text


def listed(values, most=4, form=fixed):
    """As in [0.73, 0.45, 0.91, …, 0.62], with most of 4."""
    texts = [form(value) for value in values]
    if len(texts) > most:
        texts[most - 1 : -1] = ["…"]
    return f"[{', '.join(texts)}]"


def texts_of(prompts, responses, config, most=17):
    """Responses as text: as words, which begin with the prompt, or by their numbers."""
    if not config.readable:
        return [listed(row, 3, str) for row in responses]
    rows = np.concatenate([prompts, responses], axis=1)
    words = ["".join(LETTERS[token] for token in row).partition(".") for row in rows]
    return [w + dot if len(w) <= most else w[:most] + "…" for w, dot, _ in words]


def stages_page(seen, config):
    """Before the loop: fine-tuning on words, and the reward model."""
    seen = {name.replace("preferences/", ""): array for name, array in seen.items()}
    words = texts_of(seen["prompts"], seen["responses"], config)
    before = texts_of(seen["prompts"][:4], seen["fine_tuning/before"], config)
    tuning, choosing = seen["fine_tuning/losses"], seen["losses"]
    pairs, right = len(words) // 2, seen["accuracy"]
    differ = [row for row in range(pairs) if words[row] != words[row + pairs]]
    rows = [row + other for row in differ[:3] for other in (0, pairs)]
    columns = {"": ["chosen", "rejected"] * 3, "word": [words[row] for row in rows]}
    columns |= {"human": seen["human"][rows], "score": seen["scores"][rows]}
    text = f"""Stage 1: Fine-tuning on {seen["fine_tuning/count"]} words that a human wrote
  Loss: {tuning[0]:.2f} -> {tuning[-20:].mean():.2f}\tnats per letter (a bit is 0.69 nats)
  Best possible: {seen["fine_tuning/best_loss"]:.2f}\tthe first letter leaves a choice
  Real words: {seen["fine_tuning/words"]:.1%}\tof what it writes are words it was shown
    A prompt is a first letter; a . ends a word. What it wrote before and after:
    {" ".join(before)}
    {" ".join(words[:4] + words[pairs : pairs + 4])}
    This is the reference from now on, and the actor begins as its copy.

Stage 2: A reward model that learns from a human's choices
  Preference pairs: {config.preference_pairs}\tchosen by the human's opinion, with noise
  Loss: {choosing[:20].mean():.3f} -> {choosing[-20:].mean():.3f}\t-log sigmoid(chosen - rejected)
  Fresh pairs right: {right:.1%}\t± {(right * (1 - right) / pairs) ** 0.5:.1%}, of noisy choices
    The human likes vowels and consonants evenly mixed, no letter twice: from 0
    to 1. The reward model sees only which one was chosen; it is frozen now."""
    return Group(text, table(columns), "")


def step_pages(data, config):
    """The pages of the seven steps, each of what data holds by then."""

    def mean(name):
        return fixed(real_mean(data[name], mask), 3)

    def preview(name):
        return f"{mask.shape}\t{listed(data[name][0][real], 3)} mean {mean(name)}"

    first, *_ = texts_of(data["prompts"][:, :0], data["prompts"], config)
    yield f"""Step 1: Sample prompts
  Batch size: {len(data["prompts"])}
  Prompt shapes: {data["prompts"].shape} tokens\tthe first: {first}
    {WHY[0]} The actor writes its own training data.
"""
    logits, mask, real = data["logits"].shape, data["mask"], data["mask"][0] != 0
    first, *_ = texts_of(data["prompts"], data["responses"], config)
    yield f"""Step 2: Generate responses (Actor)
  Actor forward pass...
  Generated tokens: {mask.shape}\tthe first: {first}
  Actor logits: {logits}\t{4e-6 * math.prod(logits):.1f} MB; softmax: probabilities
  Old log probs: {preview("old_logprobs")}
    The first response's first tokens and last; mean: over all. In nats, natural
    logarithms: {-math.log(logits[2]):.2f} if all tokens were equally probable.
    {WHY[1]} They stay while step 7 changes the actor.
"""
    yield f"""Step 3: Score responses (Reward Model)
  Reward model forward pass...\tits weights are {"trained" if config.readable else "random"}
  Scores: {listed(data["scores"])}
    {WHY[2]} Only what is complete can be judged.
"""
    yield f"""Step 4: Compute KL penalty (Reference)
  Reference forward pass...
  Reference log probs: {preview("ref_logprobs")}
  KL divergence per token: {mask.shape}\t{listed(data["kl"][0][real], 3)}
  Mean KL: {mean("kl")}\tnats per token, by {config.kl_estimator}
  Exact KL: {mean("exact_kl")}\tall {config.vocab_size} tokens; an estimate needs one
    KL: how far the actor is from the reference. At its start that would be 0;
    this one was moved by --drift {config.drift:g}, as if training had begun.
    From the sampled token alone, in the mean {mean("k1")} {mean("k2")} {mean("k3")}:
    k1 = log p_actor - log p_reference, k2 = k1^2/2, k3 = exp(-k1) - 1 + k1.
    {WHY[3]} k1 is, on {real_mean(data["k1"] < -1e-5, mask):.0%} of them:
    those likelier under the reference. As a reward only k1 has KL's gradient.
"""
    score, kl, totals = data["scores"][0], data["kl"][0].sum(), data["rewards"].sum(1)
    yield f"""Step 5: Compute total rewards
  reward = reward_model_score - β * KL
  Total rewards: {listed(totals)}
    The first: {score:.6g} - {config.beta:g} * {kl:.6g} = {fixed(totals[0])}, its KL summed.
    By token: {listed(data["rewards"][0][real])}: -β * KL each, the last + score.
    {WHY[4]} It judges what is complete.
"""
    whitened = f"  Whitened: {preview('whitened')}\n"
    if config.advantage == "gae":
        yield f"""Step 6: Compute advantages (Critic + GAE)
  Critic forward pass...
  Values: {preview("values")}
  GAE advantages: {preview("advantages")}
{whitened}    Value: the reward that the critic expects before a token is chosen. GAE,
    generalized advantage estimation: how much better it turned out.
    δ[t] = reward[t] + γ value[t+1] - value[t], and all are 0 past the end
    advantage[t] = δ[t] + γ λ advantage[t+1], γ = {config.gamma:g}, λ = {config.lam:g}
    return[t] = advantage[t] + value[t], the reward still to come
    {WHY[5]} A high one may be less than
    expected. Whitened, to mean 0 and variance 1: no scale of scores matters.
"""
    else:
        formula, group = "R - mean of the others' R", totals[: config.group_size]
        if config.advantage == "grpo":
            formula, whitened = "(R - mean) / deviation", ""  # that is scaled already
        yield f"""Step 6: Compute advantages ({config.advantage}, no critic)
  Group advantages: {preview("advantages")}
{whitened}    R, total rewards of the first prompt's group: {listed(group)}
    Its advantages, one for all tokens: {listed(data["advantages"][: len(group), 0])}
    Each is {formula} in the group.
    {WHY[5]} What else was written to
    the prompt says what was to be expected, as a critic would.
"""
    low, high, real = 1 - config.clip, 1 + config.clip, mask != 0
    ratios, shares = data["ratio"][:, real], data["clipped"][:, real].mean(axis=1)
    columns = {"epoch": [str(epoch + 1) for epoch in range(len(ratios))]}
    columns["ratio"] = [f"{r.min():.3f} .. {r.max():.3f}" for r in ratios]
    columns["clipped"] = [f"{share:.1%}" for share in shares]
    answer, policy = "", "mean of -min(ratio * A, clipped ratio * A)"
    for owner, formula in ("actor", policy), ("critic", "mean of (value - return)^2"):
        losses = data[f"{owner}_loss"]
        if losses.size:  # rloo and grpo have no critic
            columns[f"{owner} loss"] = [fixed(loss, 4) for loss in losses]
            answer += f"  {owner.title()} loss: {fixed(losses[-1], 3)}\t{formula}\n"
    text = f"""Step 7: PPO update
  Ratio = exp(new_log_prob - old_log_prob)
  Clipped ratio: clip(ratio, {low:g}, {high:g})"""
    answer += f"""    A: advantage. {WHY[6]}
    At first the weights are those that generated, so the loss is minus the mean
    of A, yet has a gradient. Clipped are ratios above {high:g} where A > 0, below
    {low:g} where A < 0: they gain no more, so the update does not chase them.

  Update complete!
"""
    yield Group(text, table(columns), answer)


def effect_page(data, config):
    """What the update did to the first four responses, and to how many of all."""
    before, after = data["old_logprobs"].sum(axis=1), data["new_logprobs"].sum(axis=1)
    advantages = data["whitened"].sum(axis=1) / np.count_nonzero(data["mask"], axis=1)
    columns = {"response": texts_of(data["prompts"], data["responses"], config, 10)}
    columns |= {"total reward": data["rewards"].sum(axis=1), "mean A": advantages}
    columns |= {"log prob": before, "after": after, "change": after - before}
    if config.readable:
        chances = zip(np.exp(before), np.exp(after))
        columns["chance"] = [f"{old:.2%} -> {new:.2%}" for old, new in chances]
    columns = {head: cells[:4] for head, cells in columns.items()}
    followed = np.mean(np.sign(advantages) == np.sign(after - before))
    note = f"""    mean A: of the advantage that acts. Where it is above 0 the log prob should
    rise, else fall: that is RLHF. It did so for {followed:.0%} of all responses.
"""
    return Group("What the update did", table(columns), note)


def response_page(data, config, row):
    """One response token by token, so that every formula can be checked by hand."""
    real = data["mask"][row] != 0
    columns = {"t": [str(t) for t in np.flatnonzero(real)]}
    tokens = data["responses"][row, real]
    columns["token"] = [LETTERS[t] if config.readable else str(t) for t in tokens]
    columns |= {h: data[n][row, real] for h, n in LEDGER.items() if n in data}
    ratios = zip(data["ratio"][-1, row, real], data["clipped"][-1, row, real])
    columns["ratio"] = [fixed(r) + ("*" if stopped else "") for r, stopped in ratios]
    text = texts_of(data["prompts"], data["responses"], config)[row]
    title = f"Response {row} in all steps: {text}, score {fixed(data['scores'][row])}"
    note = """    actor, ref: log probs; A: the advantage that acts; ratio: of the last epoch,
    * if clipped. Value and advantage of what comes after the end are 0.
"""
    return Group(title, table(columns), note)


def what_happened(history):
    """A verdict on a training: hacked, where the human ends less content than it began;
    words lost, where less than 0.7 of them are left; better liked, where the human ends
    more content. More or less by three standard errors, and by 0.005 at least."""
    _, human, noise = stretch_means(history["objective/human_scores"])
    _, words, _ = stretch_means(history["val/words"])
    margin = max(3 * math.hypot(noise[0], noise[-1]), 0.005)
    verdict = "No clear change"
    if human[-1] < human[0] - margin:
        verdict = "Reward hacking"
    elif words[-1] < 0.7 * words[0]:
        verdict = "Words are being lost"
    elif human[-1] > human[0] + margin:
        verdict = "Better liked, in words"
    figures = human[0], human.max(), human[-1], words[0], words[-1]
    start, best, end, was, now = map(fixed, figures)
    return f"{verdict}: human {start}, best {best}, end {end}; words {was} to {now}"


def training_page(run):
    """A training, a row for each stretch of steps."""
    config, history = run["config"], run["history"]
    starts, clipped, _ = stretch_means(history["policy/clipfrac_avg"])
    ends = [*starts[1:], config.steps]
    columns = {"step": [f"{a}-{b}" for a, b in zip(starts + 1, ends)]}
    shown = [head for head, metric in METRICS.items() if metric in history]
    columns |= {head: stretch_means(history[METRICS[head]])[1] for head in shown}
    columns["clipped"] = [f"{share:.1%}" for share in clipped]
    columns["two responses"] = [run["texts"][end - 1] for end in ends]
    text = f"""=== RLHF Training, {run["label"]} ===
    {config.steps} steps of {config.batch_size} responses; rows are means over stretches of steps.
    score: of the reward model; KL: nats per response; clipped: share of tokens."""
    if config.readable:
        text += "\n    human: its opinion, 0 to 1, * best; words: share of real ones."
    return Group(text, table(columns, star="human"), "")


def chart_page(runs, width=60, height=9):
    """The human's opinion over KL, a mark for each run."""
    points, legend = [], ""
    for run, mark in zip(runs, "●○△#+x%&@" * len(runs)):
        legend += f"\n          {mark} {run['label']}"
        parts = min(60, run["config"].steps)  # means over these, against noise
        kl = np.array_split(run["history"]["objective/kl"], parts)
        human = np.array_split(run["history"]["objective/human_scores"], parts)
        points += [(mark, x.mean(), y.mean()) for x, y in zip(kl, human)]
    marks, kl, y = map(np.array, zip(*points))
    x, low, high = np.sqrt(np.maximum(kl, 0)), y.min(), y.max()
    columns = np.rint(x / (x.max() or 1) * (width - 1)).astype(int)
    rows = np.rint((high - y) / (high - low or 1) * (height - 1)).astype(int)
    grid = np.full((height, width), " ")
    grid[rows, columns] = marks
    labels = [fixed(high), *[""] * (height - 2), fixed(low)]
    chart = "".join(f"  {y:>6} │{''.join(row)}\n" for y, row in zip(labels, grid))
    end = f"KL in nats per response, square-root scale: 0 to {x.max() ** 2:.1f}"
    chart += f"         └{'─' * width}\n          {end:>{width}}{legend}\n"
    return Group("The human's opinion over KL in the course of training", Text(chart))


def outcome_page(runs):
    """What the trainings came to, words of each, and how near to the best possible."""
    text, labels = "What came of it", {"": [run["label"] for run in runs]}
    if runs[0]["config"].readable:
        text += f"""
    β is the price of KL, of writing unlike the reference, which wrote words:
  reference     {runs[0]["start"]}"""
        for run in runs:
            text += f"\n  {run['label']:12}  {run['words']}\n    {what_happened(run['history'])}"
        text += "\n    That was training; what follows is of fresh responses:"
    outcomes = [run["outcome"] for run in runs]
    known = [head for head in METRICS if head.lower() in outcomes[0]]
    means = {head: [of[head.lower()] for of in outcomes] for head in known}
    names = "J_start", "J", "J_star", "share"
    theory = {n: [fixed(o[n], 3, o[f"{n}_error"]) for o in outcomes] for n in names}
    note = """    J = score - β * KL is what training maximises; J_start: the reference's,
    J_star: the best; share = (J - J_start) / (J_star - J_start); -: not clear.
"""
    for beta in dict.fromkeys(run["config"].beta for run in runs):
        same = [run["outcome"] for run in runs if run["config"].beta == beta]
        if len(same) > 1:
            best, errors = zip(*sorted((o["J"], o["J_error"]) for o in same))
            gap, noise = best[-1] - best[0], math.hypot(errors[-1], errors[0])
            than = "more" if gap > 2 * noise else "not more"
            note += f"    At β {beta:g}, this seed: J differs by {gap:.3f} ± {noise:.3f}, "
            note += f"{than} than chance\n"
    return Group(text, table(labels | means, "human"), table(labels | theory), note)


# ---------------------------------------------------------------- 9. the command line

EXAMPLES = """examples:
  python rlhf_loop_pseudo.py --preset letters --inspect 3
  python rlhf_loop_pseudo.py --preset letters --steps 200 --beta 0 0.05 0.2 1"""


def make_parser():
    """The flags: one for each field of Config, and those of what is shown and saved."""
    parser = argparse.ArgumentParser("rlhf_loop_pseudo.py", "%(prog)s [flags]")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = __doc__.splitlines()[0], EXAMPLES
    groups = "sizes", "algorithm (several beta or advantage: compared)", "output"
    sizes, algorithm, output = map(parser.add_argument_group, groups)
    sizes.add_argument("--preset", choices=PRESETS, help="what to start from (gpt2)")
    for number, setting in enumerate(fields(Config)):
        kind, text = setting.type.__origin__, setting.type.__metadata__[0]
        options = {"type": kind, "help": f"{text} ({setting.default})"}
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
        options["nargs"] = "+" if setting.name in ("beta", "advantage") else None
        group = sizes if number < 5 else algorithm
        group.add_argument(f"--{setting.name.replace('_', '-')}", **options)
    add = output.add_argument
    add("--inspect", type=int, metavar="ROW", help="show a response token by token")
    add("--pause", action="store_const", const=True, help="ask before every step")
    add("--show", type=source_of, metavar="NAME", help="print a function to paste")
    add("--save", type=Path, metavar="FILE.npz", help="save arrays or metrics")
    add("--export", type=Path, metavar="FILE", help="save it as: .svg .html .txt")
    add("--theme", choices=("dark", "light"), help="colours of the export (dark)")
    return parser


def read_command_line(argv):
    """What was given, and a Config for each beta and advantage; or exit with 2."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(argv)
    given = {name: x for name, x in vars(options).items() if x is not None}
    preset = "letters" if options.vocab_size == len(LETTERS) else "gpt2"
    settings = PRESETS[given.get("preset", preset)].copy()
    if given.get("steps", 1) > 1:
        settings["drift"] = 0.0  # training starts at the reference
    settings |= {name: x for name, x in given.items() if hasattr(Config, name)}
    betas = given.get("beta", [settings.get("beta", Config.beta)])
    advantages, configs = given.get("advantage", [Config.advantage]), []
    try:
        for name in unknown:
            flags = [f"--{known.replace('_', '-')}" for known in vars(options)]
            raise ValueError(f"{name} is no flag{meant(name, flags)}")
        for beta, name in itertools.product(betas, advantages):
            configs.append(Config(**settings | {"beta": beta, "advantage": name}))
        refuse(given, configs)
    except ValueError as problem:
        parser.error(str(problem))
    return given, configs


def meant(name, names):
    """A question for a name that is not known: by its initials, or alike."""
    near = [known for known in names if re.sub(r"\B\w|\b-", "", known) == name]
    near += difflib.get_close_matches(name.lower(), names, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def refuse(given, configs):
    """Raises ValueError where something cannot be, or would have no effect."""
    config, rows = configs[0], range(configs[0].batch_size)
    by = {config.advantage for config in configs}
    many = " ".join(n for n in ("beta", "advantage") if len(given.get(n, [])) > 1)
    rules = [  # flags, whether they work here, and how they would
        ("gamma lam", "gae" in by, "with --advantage gae"),
        ("group_size", by != {"gae"}, "with --advantage rloo or grpo"),
        ("preference_pairs", config.readable, "with --preset letters"),
        ("inspect pause", config.steps == 1, "in a walk-through, without --steps"),
        ("inspect", given.get("inspect", 0) in rows, f"with rows 0 to {rows[-1]}"),
        ("pause", sys.stdin and sys.stdin.isatty(), "in a terminal"),
        (many, config.steps > 1, "with one value, or --steps"),
        (many, len(set(configs)) == len(configs), "with each value once"),
        ("theme", "export" in given, "with --export"),
        ("show", len(given) == 1, "alone"),
    ]
    for name, endings in ("save", [".npz"]), ("export", [".svg", ".html", ".txt"]):
        path, kinds = given.get(name, Path()), " or ".join(endings)
        fits = path.suffix in endings and not path.is_dir()
        fits = fits and os.access(path.parent, os.W_OK | os.X_OK)
        rules.append((name, fits, f"with a {kinds} file in a writable folder"))
    for flags, works, how in rules:
        for name in flags.split():
            if name in given and not works:
                raise ValueError(f"--{name.replace('_', '-')}: works only {how}")
    if config.readable:
        demonstrations(WORDS, config)
    logits = config.batch_size * config.response_length * (config.steps == 1)
    needed = 4 * config.vocab_size * (12 * config.width + logits)  # Adam's are in it
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise ValueError(f"sizes: {needed:.1e} bytes are needed of {memory:.1e}")


def source_of(name):
    """A function, in upper or lower case, or a step's, with all that they need to run."""
    docs = {n: str(x.__doc__) for n, x in globals().items() if inspect.isfunction(x)}
    wanted = [known for known in docs if known.lower() == name.lower()]
    wanted = wanted or [n for n in docs if docs[n].startswith(f"Step {name}")]
    if not wanted:
        raise argparse.ArgumentTypeError(f"{name} is no function{meant(name, docs)}")
    found = {}
    for known in wanted:  # which grows
        value = globals()[known]
        home = getattr(value, "__module__", None)
        found[known] = f"from {home} import {known}\n"
        if inspect.ismodule(value):
            found[known] = f"import {value.__name__} as {known}\n"
        elif home is None:
            found[known] = f"{known} = {value!r}\n"
        elif home == __name__:
            found[known] = inspect.getsource(value)
        codes = [compile(found[known], known, "exec")]
        for code in codes:  # which grows by the code objects inside
            codes += [part for part in code.co_consts if inspect.iscode(part)]
            wanted += sorted({*code.co_names} & {*globals()} - {*wanted, "__name__"})
    return "\n\n".join(found[known] for known in globals() if known in found)


def opening_pages(title, configs, arrays):
    """The data flow, and the stages before the loop; returns what init_models takes."""
    critic, config = any(c.advantage == "gae" for c in configs), configs[0]
    yield f"""=== {title} ==={PICTURE if critic else PICTURE_WITHOUT_CRITIC}\
    The actor writes and learns, the reference is its frozen start. A forward
    pass computes, for each position, the probabilities of the next token.
"""
    if not config.readable:
        return ()
    rng = np.random.default_rng([config.seed, 1])
    *models, losses = learn_from_human(config, rng)
    arrays |= losses | judge_stages(*models, config, rng)
    yield stages_page(arrays, config)
    return models[1:]


def one_step_pages(given, config, arrays):
    """The walk-through; arrays gets what it computes."""
    before = yield from opening_pages("RLHF Training Loop Demo", [config], arrays)
    rng = np.random.default_rng(config.seed)
    models = init_models(config, rng, *before)
    pages = step_pages(arrays, config)
    for question, stage in zip(WHY, walk_through(models, config, rng)):
        arrays |= stage
        answer = next(pages)
        arrays.pop("logits", None)  # only shown, and the largest of all
        if "pause" in given:
            yield f"  {question}"
            if sys.platform != "win32":  # forget what was pressed before
                import termios

                termios.tcflush(sys.stdin, termios.TCIFLUSH)
            input("  [Enter] ")
        yield answer
    if config.readable or "inspect" in given:
        yield response_page(arrays, config, given.get("inspect", 0))
    yield effect_page(arrays, config)


def training_pages(configs, arrays, runs):
    """The trainings; runs gets what each came to, arrays what was before them."""
    before = yield from opening_pages("RLHF Training", configs, arrays)
    for config in configs:
        run = {"label": f"β {config.beta:g}, {config.advantage}", "config": config}
        runs.append(run | {"history": {}, "texts": [], "outcome": {}})
        models = init_models(config, np.random.default_rng(config.seed), *before)
        train_and_watch(runs[-1], models)
        yield training_page(runs[-1])
    if configs[0].readable:
        yield chart_page(runs)
    if runs[0]["outcome"]:
        yield outcome_page(runs)


def train_and_watch(run, models):
    """Train, with a bar in a terminal; run gets metrics, texts and outcome."""
    config, history, hidden = run["config"], run["history"], not sys.stdout.isatty()
    rngs = [np.random.default_rng([config.seed, stream]) for stream in (2, 3)]
    steps, console = train(models, config, rngs[0]), Console(quiet=hidden)
    live = track(steps, run["label"], config.steps, console=console, transient=True)
    for step, (metrics, data) in enumerate(live):
        for name, value in metrics.items():
            history.setdefault(name, np.full(config.steps, np.nan))[step] = value
        texts = texts_of(data["prompts"][:2], data["responses"][:2], config, 10)
        run["texts"].append(" ".join(texts))
    run["outcome"] = attainable_gain(models, config, rngs[1])
    if config.readable:
        prompts, eos = np.arange(0, 26, 5)[:, None], config.vocab_size - 1
        for name, model in ("start", models.reference), ("words", models.actor):
            rng = np.random.default_rng([config.seed, 4])
            responses, *_ = generate(model, prompts, config.response_length, rng, eos)
            run[name] = " ".join(texts_of(prompts, responses, config, 8))


def saved(configs, arrays, runs):
    """All arrays, and the configuration as JSON, as bytes; several runs a row each."""
    rows, arrays = [{}] * len(configs), arrays.copy()  # what a run lacks is NaN
    for row, run in enumerate(runs):
        theory = {f"theory/{name}": value for name, value in run["outcome"].items()}
        rows[row] = run["history"] | theory
    for name in {name: None for row in rows for name in row}:
        values = np.broadcast_arrays(*[row.get(name, np.nan) for row in rows])
        arrays[name] = np.stack(values) if len(rows) > 1 else values[0]
    config = {name: [vars(c)[name] for c in configs] for name in vars(configs[0])}
    config = {n: x if len({*x}) > 1 else x[0] for n, x in config.items()}
    data = io.BytesIO()
    np.savez(data, config=json.dumps(config), **arrays)
    return data.getvalue()


def exported(path, theme, parts):
    """What was shown, as the bytes of a file of path's kind."""
    console = make_console(theme or "dark", record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    colours = DEFAULT_TERMINAL_THEME if theme == "light" else MONOKAI
    if path.suffix == ".svg":
        return console.export_svg(title="rlhf_loop_pseudo", theme=colours).encode()
    if path.suffix == ".txt":
        return console.export_text().encode()
    # inline styles only, so that a page around the block stays as it is
    style = "color: {foreground}; background: {background}; padding: 1em"
    block = f'<meta charset="utf-8">\n<pre style="{style}">{{code}}</pre>\n'
    text = console.export_html(theme=colours, code_format=block, inline_styles=True)
    return text.encode()


def plain(error):
    """What stands for a character that an encoding lacks, and where to go on."""
    text = error.object[error.start : error.end].translate(ASCII)
    return text.encode("ascii", "replace").decode(), error.end


@np.errstate(all="ignore")  # check_finite speaks of what is not finite
def main(argv=None):
    """Run the command line argv, sys.argv without it. Returns the exit code."""
    sys.stdout = sys.stdout or io.StringIO()  # where it is closed
    if hasattr(sys.stdout, "reconfigure"):
        codecs.register_error("plain", plain)
        sys.stdout.reconfigure(errors="plain")
    given, configs = read_command_line(argv)
    arrays, runs, shown, console = {}, [], [], make_console()
    pages = training_pages(configs, arrays, runs)
    if "show" in given:
        pages = [Text(given["show"])]
    elif configs[0].steps == 1:
        pages = one_step_pages(given, configs[0], arrays)
    try:
        try:
            for part in pages:
                shown.append(part)
                console.print(part)
        finally:  # what an interrupted run has computed is kept, too
            try:
                if "save" in given:
                    given["save"].write_bytes(saved(configs, arrays, runs))
            finally:
                if "export" in given:
                    picture = exported(given["export"], given.get("theme"), shown)
                    given["export"].write_bytes(picture)
    except (KeyboardInterrupt, EOFError):
        print("\nInterrupted.")
        return 130
    except (FloatingPointError, MemoryError, OSError) as problem:
        print(f"rlhf_loop_pseudo.py: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
