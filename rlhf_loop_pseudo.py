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
before the loop, 6 the models and their gradients. No part of it: 7 measuring, 8 the
presentation, 9 the command line. Models and human are toys; no number is made up.

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
import dis
import inspect
import io
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, NamedTuple

try:
    import numpy as np
    from rich import terminal_theme
    from rich.console import Console, Group
    from rich.highlighter import RegexHighlighter
    from rich.padding import Padding
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table
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
    clip: Annotated[float, "PPO's epsilon: a ratio past 1 +- it gains nothing"] = 0.2
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
            raise ValueError("--batch-size: is not a whole number of --group-size")
        if self.readable and self.prompt_length != 1:
            raise ValueError("--prompt-length: is 1 where the 27 tokens are letters")

    @property
    def readable(self):
        """Whether tokens are letters, so that the human can read what is written."""
        return self.vocab_size == len(LETTERS)


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
    length, eos_token = config.response_length, config.vocab_size - 1
    group_size = config.group_size if critic is None else 1
    for step in range(config.steps):
        # 1. Sample prompts
        count = config.batch_size // group_size
        prompts = sample_prompts(rng, count, config.prompt_length, config.vocab_size)
        prompts = np.repeat(prompts, group_size, axis=0)  # (count, P) -> (B, P)
        yield {"prompts": prompts}

        # 2. Generate
        responses, mask, old_logprobs = generate(
            actor, prompts, length, rng, eos_token
        )
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
        if config.advantage == "gae":
            values = critic_values(critic, prompts, responses) * mask
            advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
            whitened = whiten(advantages, mask)
            yield {
                "values": values,
                "advantages": advantages,
                "returns": returns,
                "whitened": whitened,
            }
        elif config.advantage == "rloo":
            advantages = rloo_advantages(rewards, mask, group_size)
            whitened = whiten(advantages, mask)
            yield {"advantages": advantages, "whitened": whitened}
        else:  # each group is scaled by its own deviation already
            whitened = grpo_advantages(rewards, mask, group_size)
            yield {"advantages": whitened, "whitened": whitened}

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

    The context is a running sum, so that each token costs one position, not the whole
    sequence: what a key-value cache does for a transformer.

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
        context_sum = context_sum + embed[token]
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
    Raises ValueError for what is no token of the model.
    Source: Radford et al. 2018 (GPT), equations 1 and 2.
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
    totals = rewards.sum(axis=1, dtype=np.float64)  # (B, T) -> (B,)
    totals = totals.reshape(-1, group_size)  # (B,) -> (B / G, G)
    others = (totals.sum(axis=1, keepdims=True) - totals) / (group_size - 1)
    advantages = (totals - others).reshape(-1, 1)  # (B / G, G) -> (B, 1)
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
    totals = rewards.sum(axis=1, dtype=np.float64)  # (B, T) -> (B,)
    totals = totals.reshape(-1, group_size)  # (B,) -> (B / G, G)
    centered = totals - totals.mean(axis=1, keepdims=True)
    deviation = totals.std(axis=1, ddof=1, keepdims=True)  # (B / G, 1)
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
    loss, d_new_logprobs, ratio = ppo_loss(
        new_logprobs, old_logprobs, advantages, mask, clip
    )
    return backward_logprobs(actor, cache, d_new_logprobs), loss, ratio
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
    gradients = predicting_states_gradients(critic, cache, d_states)
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
            raise ValueError(f"{name}: is no parameter, or of another shape")
        if params[name].dtype.kind != "f":
            raise ValueError(f"{name}: parameters are to be floats")
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
        raise ValueError("--response-length: no word with its end token is so short")
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
    word and is no letter. Training never sees these scores.

    prompts (B, P), responses, mask (B, T). Returns (B,) in [0, 1], 0 for an empty
    word. Raises ValueError for shapes that differ. Source: the role of the gold
    reward model in Gao et al. 2023; the rule is ours.
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


# ANCHOR: collect_preferences
def collect_preferences(reference, config, rng):
    """Let the human choose between two responses to each prompt.

    P(the first is chosen) = sigmoid(8 (human(first) - human(second)))

    so that labels are noisy, as people's are. The reference writes both. With N =
    config.preference_pairs, returns (prompts, responses, mask) of 2 N rows: the
    chosen responses, then the rejected ones in the same order; (2 N, P), (2 N, T)
    both. Source: Bradley & Terry 1952; Christiano et al. 2017, section 2.2.
    """
    pairs, length = config.preference_pairs, config.response_length
    vocab_size = config.vocab_size
    prompts = sample_prompts(rng, pairs, config.prompt_length, vocab_size)
    prompts = np.concatenate([prompts, prompts])  # (N, P) -> (2 N, P)
    responses, mask, _ = generate(reference, prompts, length, rng, vocab_size - 1)
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

    chosen, rejected (N,): the scores of both responses of each pair.
    Returns (loss, d_chosen, d_rejected): scalar in nats, (N,), (N,).
    Raises ValueError for shapes that differ or no pair.
    Source: Stiennon et al. 2020, section 3.4; InstructGPT, equation 1.
    """
    if np.shape(chosen) != np.shape(rejected) or not np.size(chosen):
        raise ValueError("chosen, rejected: shapes differ, or no pair")
    lead = 1.0 * np.asarray(rejected) - np.asarray(chosen)  # of the wrong one
    losses = np.logaddexp(0, lead)  # -log sigmoid(x) = log(1 + exp(-x))
    d_rejected = np.exp(lead - losses) / losses.size  # a sigmoid
    return losses.mean(), -d_rejected, d_rejected
    # ANCHOR_END: preference_loss


# ANCHOR: reward_gradients
def reward_gradients(reward_model, prompts, responses, mask):
    """Gradients of preference_loss for the reward model.

    prompts (2 N, P), responses, mask (2 N, T), the chosen first, as
    collect_preferences returns them. Returns (gradients, loss): keyed like the
    parameters, scalar. Raises ValueError as score_responses does. Source:
    InstructGPT, equation 1, chain rule.
    """
    head = reward_model["head"]
    tokens = token_ids(reward_model, prompts, responses)
    hidden, context = backbone(reward_model, tokens)  # (2 N, P + T, D) both
    last = last_positions(prompts, responses, mask)
    scores = hidden[last] @ head[:, 0]  # (2 N, P + T, D) -> (2 N, D) -> (2 N,)
    loss, d_chosen, d_rejected = preference_loss(*np.split(scores, 2))
    d_scores = np.concatenate([d_chosen, d_rejected])[:, None]  # (2 N, 1)
    d_hidden = np.zeros_like(hidden)
    d_hidden[last] = d_scores * head[:, 0]  # (2 N, D)
    gradients = backbone_gradients(reward_model, tokens, hidden, context, d_hidden)
    gradients["head"] = hidden[last].T @ d_scores  # (D, 1)
    return gradients, loss
    # ANCHOR_END: reward_gradients


# ANCHOR: train_reward_model
def train_reward_model(reward_model, prompts, responses, mask, rng):
    """Learn to score as the human chose.

    200 Adam updates on 128 pairs each, from the given weights. Then scores are
    shifted and scaled to mean 0 and standard deviation 1 over these responses, if
    they differ at all. prompts (2 N, P), responses, mask (2 N, T): as returned by
    collect_preferences. Returns (reward_model, losses): a new model with a bias, and
    (200,). Raises ValueError for shapes that do not fit. Source: Stiennon et al.
    2020, section 3.4; InstructGPT, section 3.5.
    """
    reward_model = {p: reward_model[p].copy() for p in ("embed", "mix", "head")}
    prompts, responses, mask = map(np.asarray, (prompts, responses, mask))
    rows = {len(prompts), len(responses), len(mask)}
    if len(rows) > 1 or len(prompts) % 2 or not len(prompts):
        raise ValueError("prompts, responses, mask: not 2 N rows each")
    pairs, state, losses = len(prompts) // 2, {}, []
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

    Returns (untrained, reference, reward_model, losses): the model before and after
    fine-tuning, and losses of both stages by name. The reward model begins from the
    backbone before fine-tuning. From the fine-tuned one, whose states saturate, it
    agrees with the human as often, but at beta 0 it is hacked on some seeds only.
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


def init_model(rng, vocab_size, width, out_width, scale=1.0):
    """Draw a model in float32: embed (V, D), mix (D, D), head (D, out_width)."""
    return {  # context outweighs the token, so that late states know the whole text
        "embed": init_weights(rng, vocab_size, width, 0.1),
        "mix": init_weights(rng, width, width, 5 / width**0.5),
        "head": init_weights(rng, width, out_width, scale / width**0.5),
    }


def init_reward_model(model, rng):
    """A reward model before it learns: a model's backbone and a random head."""
    width = len(model["mix"])
    head = init_weights(rng, width, 1, 2.5 / width**0.5)
    return {**{p: model[p].copy() for p in ("embed", "mix")}, "head": head}


def init_models(config, rng, reference=None, reward_model=None):
    """All four as the loop finds them; random where no trained ones are given.

    Actor and critic begin as the reference. drift sets the actor off it and the
    critic's head off 0, as training would: or every KL of the first step were 0.
    """
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
    if any(part.ndim != 2 or len(part) != len(parts[0]) for part in parts):
        raise ValueError("prompts, responses: shapes are not (B, P), (B, T)")
    if any(part.dtype.kind not in "iu" for part in parts):
        raise ValueError("prompts, responses: tokens are whole numbers")
    tokens = np.concatenate([part.astype(np.int64) for part in parts], axis=1)
    if not all(part.size for part in parts):
        raise ValueError("prompts, responses: at least one token each")
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
    """Hidden states of a causal one-layer model. (B, S) int -> (B, S, D) twice.

    context[t] = sum(embed[x[0..t]]) / sqrt(t + 1): equal attention to every token so
        far, at constant variance
    hidden[t] = tanh(embed[x[t]] + context[t] @ mix)
    """
    x = model["embed"][tokens]  # (B, S) -> (B, S, D)
    context = uniform_attention(x) @ x  # (S, S) @ (B, S, D)
    return np.tanh(x + context @ model["mix"]), context


def backbone_gradients(model, tokens, hidden, context, d_hidden):
    """Gradients for embed and mix, given d_hidden = d loss / d hidden (B, S, D)."""
    d_before = d_hidden * (1 - hidden**2)  # through tanh
    d_mix = np.einsum("bsd,bse->de", context, d_before, optimize=True)
    d_x = d_before + uniform_attention(hidden).T @ (d_before @ model["mix"].T)
    return {"embed": sum_by_token(tokens, d_x, len(model["embed"])), "mix": d_mix}


def uniform_attention(x):
    """How position t of x (B, S, D) attends to s: 1 / sqrt(t + 1) up to t. (S, S)."""
    positions = np.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return np.tri(len(positions), dtype=x.dtype) / np.sqrt(positions)[:, None]


def predicting_states(model, prompts, responses):
    """The states that predict the response, (B, T, D), token t at P - 1 + t, and a
    cache for their gradients. prompts (B, P), responses (B, T)."""
    tokens = token_ids(model, prompts, responses)[:, :-1]  # nothing follows the last
    hidden, context = backbone(model, tokens)  # (B, P + T - 1, D) both
    states = hidden[:, np.shape(prompts)[1] - 1 :]
    return states, (tokens, hidden, context)


def predicting_states_gradients(model, cache, d_states):
    """Gradients for embed and mix, given d_states = d loss / d states (B, T, D)."""
    tokens, hidden, context = cache
    d_hidden = np.zeros_like(hidden)
    d_hidden[:, -d_states.shape[1] :] = d_states
    return backbone_gradients(model, tokens, hidden, context, d_hidden)


def log_softmax(logits):
    """log(exp(logits) / Σ exp(logits)) over the last axis; nothing overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


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
    return {**predicting_states_gradients(model, cache, d_states), "head": d_head}


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


def is_clipped(ratio, advantages, clip):
    """True where clipping lowers the gain and so stops the gradient. (..., B, T)."""
    return ratio * advantages > np.clip(ratio, 1 - clip, 1 + clip) * advantages


def exact_kl(logits, reference, prompts, responses):
    """KL(actor || reference), at each position Σ over v of p(v) log(p(v) / q(v)).

    logits (B, T, V) are the actor's. Returns (B, T) in nats; padding is not masked.
    """
    states, _ = predicting_states(reference, prompts, responses)  # (B, T, D)
    if logits.shape != (*responses.shape, reference["head"].shape[1]):
        raise ValueError("logits: shape is not (B, T, V)")
    kl = np.empty(responses.shape, dtype=logits.dtype)
    for t in range(responses.shape[1]):  # a position at a time, to save memory
        log_p = log_softmax(logits[:, t])  # (B, V)
        log_q = log_softmax(states[:, t] @ reference["head"])  # (B, V)
        kl[:, t] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return kl


def completes_word(prompts, responses, mask, config):
    """Whether prompt and response are a demonstrated word and its end token. (B,)."""
    shown = np.concatenate(demonstrations(WORDS, config)[:2], axis=1)  # (N, 1 + T)
    responses = np.where(mask, responses, config.vocab_size - 1)
    written = np.concatenate([prompts, responses], axis=1)  # (B, 1 + T)
    return (written[:, None] == shown).all(axis=2).any(axis=1)


def best_loss(prompts, responses, mask):
    """The least cross-entropy that is possible, in nats a token, if all responses
    differ: each is one in as many as share its prompt."""
    alike = (prompts[:, None] == prompts).all(axis=2).sum(axis=1)  # (N,)
    return np.log(alike).sum() / np.count_nonzero(mask)


def judge_stages(untrained, reference, reward_model, config, rng):
    """What both stages before the loop reached, on fresh responses: arrays by name.

    accuracy is the share of fresh pairs in which the reward model agrees with the
    choice, human_accuracy that in which the human's own opinion does.
    """
    fresh = replace(config, preference_pairs=2048)
    pairs = collect_preferences(reference, fresh, rng)
    length, eos_token = config.response_length, config.vocab_size - 1
    before, *_ = generate(untrained, pairs[0][:4], length, rng, eos_token)
    seen = dict(zip(("prompts", "responses", "mask"), pairs))
    seen["scores"] = score_responses(reward_model, *pairs)
    seen["human"] = human_scores(*pairs, config.vocab_size)
    for name, opinion in ("accuracy", "scores"), ("human_accuracy", "human"):
        chosen, rejected = np.split(seen[opinion], 2)
        seen[name] = np.mean(chosen > rejected) + np.mean(chosen == rejected) / 2
    return {f"preferences/{name}": array for name, array in seen.items()} | {
        "fine_tuning/best_loss": best_loss(*demonstrations(WORDS, config)),
        "fine_tuning/before": before,
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
        if "values" in stage:  # GAE with lambda 0 is the TD error
            arrays = data["rewards"], data["values"], data["mask"]
            stage["td_errors"], _ = gae(*arrays, config.gamma, 0.0)
        if "ratio" in stage:
            check_finite(models, data, 1)
            ratio, after = data["ratio"], token_logprobs(models.actor, *texts)
            stage["clipped"] = is_clipped(ratio, data["whitened"], config.clip)
            stage["new_logprobs"] = after * data["mask"]
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
    """Raises FloatingPointError where a step has left nothing to train on."""
    learned = [*models.actor.values(), *(models.critic or {}).values()]
    losses = [*data["actor_loss"], *data["critic_loss"]]
    sound = np.isfinite(losses).all() and all((abs(w) < 1e6).all() for w in learned)
    if not sound or np.isin(data["ratio"][-1][data["mask"] != 0], [0, np.inf]).all():
        raise FloatingPointError(
            f"step {step} diverged: a loss is not finite, a weight beyond 10^6, or "
            "every ratio 0 or infinite; lower --learning-rate, --beta or --drift"
        )


def step_metrics(data, config, step):
    """What a step of training is judged by, under TRL's names where it has one.

    Of sums over a response the mean over the batch; of policy/, loss/ and val/ratio
    the mean over the epochs' real tokens. data holds the step's arrays.
    """
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


def stretch_starts(steps):
    """Where stretches of steps begin that double in length: 0, 1, 3, 7, ..."""
    return 2 ** np.arange(int(steps).bit_length()) - 1


def stretch_means(values):
    """Means over those stretches, (steps,) -> (stretches,), and their standard
    errors, from how much neighbouring steps differ."""
    starts = stretch_starts(len(values))
    lengths = np.diff([*starts, len(values)])
    deviation = np.sqrt(np.mean(np.diff(values) ** 2) / 2)  # of one step
    return np.add.reduceat(values, starts) / lengths, deviation / np.sqrt(lengths)


def standard_error(values, every_prompt):
    """Of the mean of values (prompts, responses): over the prompts where these are
    drawn, over the responses alone where every prompt there is stands among them."""
    if every_prompt:
        variances = values.var(axis=1, ddof=1) / values.shape[1]  # (prompts,)
        return variances.sum() ** 0.5 / len(values)
    return values.mean(axis=1).std(ddof=1) / len(values) ** 0.5


def best_objective(start, beta):
    """What the best policy reaches: β log E[exp(score / β)] for each prompt.

    start (prompts, responses) are scores of the reference's responses. Returns (best,
    bias): (prompts, responses), whose mean is the estimate and whose spread its
    noise; and by how much the estimate is lower with half of the responses.
    """
    highest = start.max(axis=1, keepdims=True)  # (prompts, 1)
    weights = np.exp((start - highest) / beta)
    mean = weights.mean(axis=1, keepdims=True)
    best = highest + beta * (np.log(mean) + weights / mean - 1)
    halves = weights.reshape(len(start), 2, -1).mean(axis=2)  # (prompts, 2)
    return best, best.mean() - (highest + beta * np.log(halves)).mean()


def gain_shares(start, reached, beta, every_prompt):
    """J_start, J, J_star and the share of the gain, with standard errors, by name.

    start, reached (prompts, responses): score - beta * KL, of both policies' own.
    """
    estimates = {"J_start": start, "J": reached, "J_star": start * np.nan}
    gain = dict.fromkeys(("share", "share_error", "settled"), np.nan)
    if beta:
        best, bias = best_objective(start, beta)
        estimates["J_star"], stake = best, best - start
        share = (reached - start).mean() / stake.mean()
        error = standard_error(reached - start - share * stake, every_prompt)
        settled = bias <= standard_error(best, every_prompt)
        clear = stake.mean() > max(3 * standard_error(stake, every_prompt), 1e-6)
        gain["settled"] = float(settled)
        if settled and clear:
            gain["share"], gain["share_error"] = share, error / stake.mean()
    for name, values in estimates.items():
        gain[name] = values.mean()
        gain[f"{name}_error"] = standard_error(values, every_prompt)
    return gain


def attainable_gain(models, config, rng, response_count=512):
    """How much of what is possible training has reached, in J = E[score] - β E[KL].

    No policy exceeds J* = E over prompts of β log E[exp(score / β)], over the
    reference's responses (Korbak et al. 2022; Rafailov et al. 2023, equation 4).
    share is (J - J_start) / (J_star - J_start), J_start the reference's. All from
    response_count fresh responses to each prompt, to every one where prompts are
    letters, else to 32 drawn ones. share is NaN where J_star has not settled, so that
    half of the responses lower it by more than its standard error, or where J_star -
    J_start is lost in its own.

    Returns floats by name, J_star NaN where beta is 0; {} where it would take long.
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
    start, reached = samples  # of the reference KL is 0
    gain = {"score": scores.mean(), "kl": kl.mean()}
    if config.readable:
        texts = prompts, responses, mask
        gain["human"] = human_scores(*texts, config.vocab_size).mean()
        gain["words"] = completes_word(*texts, config).mean()
    return gain | gain_shares(start, reached, config.beta, every_prompt)


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
MARKS = "●○△#+x%&@"
OWNERS = ("actor", "critic", "reward", "reference", "human")
STYLES = {  # a terminal's own theme decides on its colours; exports have theirs
    "terminal": ("dim", "cyan", "magenta", "green", "blue", "red"),
    "dark": ("#a0a0a0", "#50c8dc", "#dc8ce6", "#50d278", "#82aaff", "#ff7878"),
    "light": ("#606060", "#00687a", "#8b2a96", "#1c6b2c", "#1f4fbf", "#b3261e"),
}


class Styled(RegexHighlighter):
    """Styles pages, which are texts, by layout and by the names of the models."""

    highlights = (
        r"(?m)^(?P<title>\S.*)",  # a line without indent
        r"(?m)(?P<quiet>^    (?! ).*|\t.*)",  # narration, by its indent; notes, after a tab
        r"(?<![\w.])(?P<figure>-?\d[\d,.]*\d|\d)",
        *(rf"(?i)\b(?P<{owner}>{owner}( model)?)\b" for owner in OWNERS),
    )


def make_console(styles="terminal", **options):
    """A console of 80 columns that neither wraps nor cuts what it shows."""
    quiet, *colours = STYLES[styles]
    theme = {owner: f"not dim {colour}" for owner, colour in zip(OWNERS, colours)}
    theme |= {"title": "bold", "quiet": quiet, "figure": "bold not dim"}
    options |= {"width": 80, "tab_size": 38, "soft_wrap": True, "markup": False}
    return Console(emoji=False, highlight=False, theme=Theme(theme), **options)


def page(*parts):
    """Texts, styled, and tables, one below the other."""
    style = Styled()
    return Group(*[style(part) if isinstance(part, str) else part for part in parts])


def table(heads, rows, gap=2):
    """A table of texts, numbers to the right. heads are {head: whose numbers}."""
    grid = Table(
        box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="quiet"
    )
    for (head, owner), cell in zip(heads.items(), rows[0]):
        justify = "right" if cell[:1] in "-0123456789" else "left"
        grid.add_column(head, style=owner, justify=justify, no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return Padding(grid, (0, 0, 0, 2), expand=False)


def fixed(value, digits=2):
    """A number with so many decimals, never a negative zero; a dash for none."""
    text = f"{round(float(value), digits) + 0.0:.{digits}f}"
    return "-" if np.isnan(value) else text


def starred(values):
    """Each as text, with a star at the largest."""
    top = max(values)
    return [fixed(value) + (" " if value < top else "*") for value in values]


def listed(values, most=4, between=", ", form=fixed):
    """As in [0.73, 0.45, …, 0.62]."""
    texts = [form(value) for value in values]
    if len(texts) > most:
        texts[most - 1 : -1] = ["…"]
    return f"[{between.join(texts)}]"


def texts_of(prompts, responses, config, most=17):
    """Responses as text: as words, which begin with the prompt, or by their numbers."""
    if not config.readable:
        return [listed(row, 3, " ", str) for row in responses]
    rows = np.concatenate([prompts, responses], axis=1)
    words = ["".join(LETTERS[token] for token in row).partition(".") for row in rows]
    return [w + dot if len(w) <= most else w[:most] + "…" for w, dot, _ in words]


def mean_of(data, name):
    """The mean over all real tokens."""
    return fixed(real_mean(data[name], data["mask"]), 3)


def preview(data, name):
    """The first response's first values and last, and the mean over all real tokens."""
    values = data[name][0][data["mask"][0] != 0]
    return f"{listed(values, 3, ' ')} mean {mean_of(data, name)}"


def stages_page(seen, config):
    """Before the loop: fine-tuning on words, and the reward model."""
    seen = {name.replace("preferences/", ""): array for name, array in seen.items()}
    words = texts_of(seen["prompts"], seen["responses"], config)
    before = texts_of(seen["prompts"][:4], seen["fine_tuning/before"], config)
    tuning, choosing = seen["fine_tuning/losses"], seen["losses"]
    start, end = choosing[:20].mean(), choosing[-20:].mean()
    pairs, right, best = len(words) // 2, seen["accuracy"], seen["human_accuracy"]
    noise = (right * (1 - right) / pairs) ** 0.5
    differ = [row for row in range(pairs) if words[row] != words[row + pairs]]
    rows = []
    for row in np.add.outer(differ[:3], [0, pairs]).ravel():
        figures = fixed(seen["human"][row]), fixed(seen["scores"][row])
        rows.append(["chosen" if row < pairs else "rejected", words[row], *figures])
    text = f"""Stage 1: Fine-tuning on {len(WORDS)} words that a human wrote
  Loss: {tuning[0]:.2f} -> {tuning[-20:].mean():.2f}\tnats a letter (a bit is 0.69 nats)
  Best possible: {seen["fine_tuning/best_loss"]:.2f}\tthe first letter leaves a choice
  Real words: {seen["fine_tuning/words"]:.1%}\tof what it writes are words it was shown
    A prompt is a first letter; a . ends a word. What it wrote before and after:
    {" ".join(before)}
    {" ".join(words[:8])}
    This is the reference from now on, and the actor begins as its copy.

Stage 2: A reward model that learns from a human's choices
  Choices between two: {config.preference_pairs}\tby the human's opinion, and some chance
  Loss: {start:.3f} -> {end:.3f}\tmean of -log sigmoid(chosen - rejected)
  Fresh pairs right: {right:.1%}\t± {noise:.1%}; by the human's opinion {best:.1%}
    The human likes vowels and consonants evenly mixed, no letter twice: from 0
    to 1. The reward model sees only which one was chosen; it is frozen now."""
    heads = {"": "", "word": "actor", "human": "human", "score": "reward"}
    return page(text, table(heads, rows), "")


def step_pages(data, config):
    """A question and its page for each of the steps, of what data holds by then."""
    group = "    Each stands {} times: a group of responses to compare.\n"
    group = "" if config.advantage == "gae" else group.format(config.group_size)
    first, *_ = texts_of(data["prompts"][:, :0], data["prompts"], config)
    yield (why := "Why only prompts, and no answers?")
    yield f"""Step 1: Sample prompts
  Batch size: {len(data["prompts"])}
  Prompt shapes: {data["prompts"].shape} tokens\tthe first: {first}
{group}    {why} The actor writes its own training data.
"""
    logits, mask = data["logits"].shape, data["mask"]
    first, *_ = texts_of(data["prompts"], data["responses"], config)
    uniform = fixed(-math.log(config.vocab_size))
    yield (why := 'Why are log probs "old"?')
    yield f"""Step 2: Generate responses (Actor)
  Actor forward pass...
  Generated tokens: {mask.shape}\tthe first: {first}
  Actor logits: {logits}\t{4e-6 * math.prod(logits):.1f} MB; softmax: probabilities
  Old log probs: {mask.shape}\t{preview(data, "old_logprobs")}
    [...]: the first response's first tokens and last; mean: over all tokens. In
    nats, units of the natural logarithm: {uniform} if all tokens were alike.
    {why} They stay while step 7 changes the actor.
"""
    origin = "was trained above" if config.readable else "is random"
    yield (why := "Why one number for a whole response?")
    yield f"""Step 3: Score responses (Reward Model)
  Reward model forward pass...
  Scores: {listed(data["scores"])}
    {why} Only what is complete can be judged.
    This reward model {origin}.
"""
    means = [mean_of(data, name) for name in ("k1", "k2", "k3")]
    yield (why := "Why can the KL of a token be negative?")
    yield f"""Step 4: Compute KL penalty (Reference)
  Reference forward pass...
  Reference log probs: {mask.shape}\t{preview(data, "ref_logprobs")}
  KL divergence per token: {mask.shape}\t{listed(data["kl"][0][mask[0] != 0], 3, " ")}
  Mean KL: {mean_of(data, "kl")}\tnats a token, by {config.kl_estimator}
  Exact KL: {mean_of(data, "exact_kl")}\tby a sum over all {config.vocab_size} tokens
    KL: how far the actor is from the reference. At its start that would be 0;
    this one was moved by --drift {config.drift:g}, as if training had begun. The sum
    costs too much in training. Estimates from the sampled token alone:
    k1 = log p_actor - log p_reference, k2 = k1²/2, k3 = exp(-k1) - 1 + k1, here
    {" ".join(means)} in the mean. As a reward only k1 has KL's gradient.
    {why} k1 is, on {real_mean(data["k1"] < 0, mask):.0%} of them:
    those likelier under the reference. The exact KL is never below 0.
"""
    score, kl, totals = data["scores"][0], data["kl"][0].sum(), data["rewards"].sum(1)
    by_token = listed(data["rewards"][0][mask[0] != 0])
    yield (why := "Why does the score stand on the last token?")
    yield f"""Step 5: Compute total rewards
  reward = reward_model_score - β * KL
  Total rewards: {listed(totals)}
    The first: {score:.6g} - {config.beta:g} * {kl:.6g} = {fixed(totals[0])}, its KL summed.
    By token: {by_token}: -β * KL each, the last + score.
    {why} It judges what is complete.
"""
    yield (why := "Why advantages, and not the rewards themselves?")
    yield advantages_text(data, config, why)
    yield (why := "Why is the ratio 1 in the first epoch, and why clip it?")
    yield update_page(data, config, why)


def advantages_text(data, config, why):
    """The page of step 6, with a critic or without."""
    shape = data["mask"].shape
    whitened = f"  Whitened: {shape}\t{preview(data, 'whitened')}\n"
    if config.advantage == "gae":
        return f"""Step 6: Compute advantages (Critic + GAE)
  Critic forward pass...
  Values: {shape}\t{preview(data, "values")}
  GAE advantages: {shape}\t{preview(data, "advantages")}
{whitened}    Value: the reward that the critic expects before a token is chosen. GAE,
    generalized advantage estimation: how much better it turned out.
    δ[t] = reward[t] + γ value[t+1] - value[t], and all are 0 past the end
    advantage[t] = δ[t] + γ λ advantage[t+1], γ = {config.gamma:g}, λ = {config.lam:g}
    return[t] = advantage[t] + value[t], the reward still to come
    {why} A high reward may still be
    less than expected. Whitened, to mean 0 and variance 1: the update must not
    grow with the scale of the scores.
"""
    totals = data["rewards"].sum(axis=1)[: config.group_size]
    first, others, mean = totals[0], totals[1:].mean(), totals.mean()
    advantages = data["advantages"][: config.group_size, 0]
    formula = f"R - mean of the others' R = {first:.5g} - ({others:.5g})"
    if config.advantage == "grpo":
        deviation, whitened = totals.std(ddof=1), ""  # each group is scaled already
        formula = f"(R - mean) / deviation = {first - mean:.5g} / {deviation:.5g}"
    return f"""Step 6: Compute advantages ({config.advantage}, no critic)
  Group advantages: {shape}\t{preview(data, "advantages")}
{whitened}    Total rewards R of the first group: {listed(totals)}
    Its advantages, one for all tokens: {listed(advantages)}
    The first: {formula} = {fixed(advantages[0])}.
    {why} What else was written to
    the prompt says what was to be expected, as a critic would.
"""


def update_page(data, config, why):
    """The page of step 7, a row for each epoch."""
    low, high = f"{1 - config.clip:g}", f"{1 + config.clip:g}"
    real = data["mask"] != 0
    losses = {owner: data[f"{owner}_loss"] for owner in ("actor", "critic")}
    losses = {owner: values for owner, values in losses.items() if len(values)}
    heads = {"epoch": "", "ratio": "actor", "clipped": "actor"}
    heads, rows = heads | {f"{owner} loss": owner for owner in losses}, []
    for epoch, (ratio, clipped) in enumerate(zip(data["ratio"], data["clipped"])):
        ratios = f"{ratio[real].min():.3f} .. {ratio[real].max():.3f}"
        figures = [fixed(values[epoch], 4) for values in losses.values()]
        rows.append([str(epoch + 1), ratios, f"{clipped[real].mean():.1%}", *figures])
    critic = "    critic loss = mean of (value - return)²" * ("critic" in losses)
    last = [f"  {o.title()} loss: {fixed(v[-1], 3)}\n" for o, v in losses.items()]
    formulas = f"""Step 7: PPO update
  Ratio = exp(new_log_prob - old_log_prob)
  Clipped ratio: clip(ratio, {low}, {high})
    actor loss = mean of -min(ratio * A, clipped ratio * A), A: last of step 6
{critic}""".rstrip()
    answer = f"""{"".join(last)}    {why} At first the
    weights are those that generated; the loss is minus the mean of A, about 0,
    but its gradient is not. Clipped are tokens above {high} where A > 0, below
    {low} where A < 0: they gain no more, so the update does not chase them.

  Update complete!
"""
    return page(formulas, table(heads, rows), answer)


def effect_page(data, models, config):
    """What the update did to the first four responses, and what it cost."""
    before, after = data["old_logprobs"].sum(axis=1), data["new_logprobs"].sum(axis=1)
    advantages = data["whitened"].sum(axis=1) / np.count_nonzero(data["mask"], axis=1)
    rows, texts = [], texts_of(data["prompts"], data["responses"], config, 10)
    for row, (old, new) in enumerate(zip(before[:4], after[:4])):
        figures = data["rewards"][row].sum(), advantages[row], old, new, new - old
        rows.append([str(row), *map(fixed, figures)])
        if config.readable:
            rows[-1][0] = texts[row]
            rows[-1].append(f"{math.exp(old):.2%} -> {math.exp(new):.2%}")
    heads = {"response": "actor", "total reward": "reward", "mean A": "critic"}
    heads |= dict.fromkeys(("log prob", "after", "change", "probability"), "actor")
    learning = [model for model in models[:2] if model]
    weights = sum(w.nbytes for model in learning for w in model.values()) / 1e6
    backward = len(learning) * config.ppo_epochs
    forward = backward + len(learning) + 2
    followed = np.mean((advantages > 0) == (after > before))
    note = f"""    mean A: of the advantage that acts, over the tokens. What was better than
    expected became more probable, what was worse less so: that is RLHF, and
    {followed:.0%} of the responses followed; the rest share tokens with others.
    It cost {forward} forward and {backward} backward passes. Adam's m and v, running means of
    the gradient and its square, take twice the {weights:.2f} MB of learning weights.
"""
    return page("What the update did", table(heads, rows), note)


def response_page(data, config, row):
    """One response token by token, so that every formula can be checked by hand."""
    ledger = [
        "old_logprobs ref_logprobs kl rewards values td_errors advantages returns whitened",
        "actor        ref          KL reward  value  TD        adv        return  A",
        "actor       reference reference reward critic critic reward     critic  reward",
    ]
    ledger = [column for column in zip(*map(str.split, ledger)) if column[0] in data]
    rows = []
    for t in np.flatnonzero(data["mask"][row]):
        token = data["responses"][row, t]
        token = LETTERS[token] if config.readable else str(token)
        figures = [fixed(data[name][row, t]) for name, _, _ in ledger]
        ratio = fixed(data["ratio"][-1, row, t])
        ratio += "*" if data["clipped"][-1, row, t] else ""
        rows.append([str(t), token, *figures, ratio])
    heads = {"t": "", "tok": "actor"} | {head: owner for _, head, owner in ledger}
    text = texts_of(data["prompts"], data["responses"], config)[row]
    score = fixed(data["scores"][row])
    note = """    actor, ref: log probabilities; adv: advantage, and A as it acts; ratio: in
    the last epoch, * if clipped. With a critic, and 0 past the end: TD = reward
    + γ value[t+1] - value, adv = TD + γ λ adv[t+1], return = adv + value.
"""
    title = f"Response {row} in all steps: {text} with score {score}"
    return page(title, table(heads | {"ratio": "actor"}, rows, gap=1), note)


def what_happened(history):
    """A sentence on a training: from the first stretch of steps, the best and the last.

    Hacked: the end lies below the start, by three standard errors. Losing words: less
    than 0.7 of them are left. Liked better: the human's opinion ends at 0.9 or more.
    """
    human, noise = stretch_means(history["objective/human_scores"])
    words, _ = stretch_means(history["val/words"])
    margin = max(3 * math.hypot(noise[0], noise[-1]), 0.005)
    verdict = "Moved little"
    if human[-1] < human[0] - margin:
        verdict = "Reward hacking"
    elif words[-1] < 0.7 * words[0]:
        verdict = "Words are being lost"
    elif human[-1] >= max(0.9, human[0] + margin):
        verdict = "Better liked, in words"
    start, best, end = map(fixed, (human[0], human.max(), human[-1]))
    words = f"words {fixed(words[0])} to {fixed(words[-1])}"
    return f"{verdict}: human {start}, best {best}, end {end}; {words}"


def figures_in(metrics):
    """What is shown of a training: (metric, theory's name for it, head, owner) each."""
    figures = (
        ("objective/scores", "score", "score", "reward"),
        ("objective/human_scores", "human", "human", "human"),
        ("val/words", "words", "words", "human"),
        ("objective/kl", "kl", "KL", "reference"),
    )
    return [figure for figure in figures if figure[0] in metrics]


def training_page(run):
    """A training, a row for each stretch of steps, and what happened."""
    config, history = run["config"], run["history"]
    starts = stretch_starts(config.steps)
    ends = [*starts[1:], config.steps]
    heads = {"step": ""}
    cells = [[f"{a + 1}-{b}" if b > a + 1 else str(b) for a, b in zip(starts, ends)]]
    for metric, _, head, owner in figures_in(history):
        means, _ = stretch_means(history[metric])
        cells.append(starred(means) if head == "human" else list(map(fixed, means)))
        heads[head] = owner
    clipped, _ = stretch_means(history["policy/clipfrac_avg"])
    cells += [[f"{c:.1%}" for c in clipped], [run["texts"][end - 1] for end in ends]]
    heads |= {"clipped": "actor", "two responses": "actor"}
    text = f"""=== RLHF Training, {run["label"]} ===
    {config.steps} steps of {config.batch_size} responses; rows are means over stretches of steps.
    score: of the reward model; KL: nats a response; clipped: tokens that PPO's
    clip stopped; two responses: of the stretch's last step."""
    note = "\n" * (not config.readable)
    if config.readable:
        text += "\n    human: its opinion, 0 to 1, * best; words: share of real ones."
        note = f"  {what_happened(history)}\n"
    if config.kl_estimator != "k1" and config.beta:
        note += f"    As a reward {config.kl_estimator} does not have the gradient of the KL.\n"
    return page(text, table(heads, list(zip(*cells))), note)


def chart_page(runs, width=60, height=9):
    """The human's opinion over KL; the score's course, where nobody can read."""
    readable, shares = runs[0]["config"].readable, min(60, runs[0]["config"].steps)
    metric = "objective/human_scores" if readable else "objective/scores"
    points, legend = [], ""
    for run, mark in zip(runs, MARKS * len(runs)):
        legend += f"          {mark} {run['label']}\n"
        kl = np.array_split(run["history"]["objective/kl"], shares)
        opinion = np.array_split(run["history"][metric], shares)
        for x, y in zip(kl, opinion):  # means over shares of the run, against noise
            points.append((mark, max(x.mean(), 0) ** 0.5, y.mean()))
    _, x, y = zip(*points)
    low, high, right = min(y), max(y), max(x) or 1
    grid = [[" "] * width for _ in range(height)]
    for mark, x, y in points:
        row = round((high - y) / (high - low or 1) * (height - 1))
        grid[row][round(x / right * (width - 1))] = mark
    labels = [fixed(high), *[""] * (height - 2), fixed(low)]
    rows = [f"  {label:>6} │{''.join(row)}\n" for label, row in zip(labels, grid)]
    end = f"KL in nats, on a scale of square roots: to {right**2:.1f}"
    text = f"""{"".join(rows)}         └{"─" * width}
          {end:>{width}}
{legend}"""
    title = "The human's opinion over KL" if readable else "The score over KL"
    return page(f"{title}, from the start at the left", Text(text))


LIMITS = {"J before": "J_start", "J": "J", "J*": "J_star", "share": "share"}


def outcome_page(runs):
    """What the trainings came to, words of each, and how near to the best possible."""
    readable, theory = runs[0]["config"].readable, "J" in runs[0]["outcome"]
    shown = figures_in(runs[0]["history"])
    heads = {"": "", **{head: owner for *_, head, owner in shown}}
    heads |= dict.fromkeys(LIMITS if theory else (), "")
    human = starred([run["outcome"].get("human", 0) for run in runs])
    rows, text = [], "What came of it"
    if readable:
        text += "\n    β is the price of KL, of writing unlike the reference, which wrote words:"
        text += f"\n  {'reference':12}  {runs[0]['start']}"
    for number, run in enumerate(runs):
        label, outcome = run["label"], run["outcome"]
        rows.append([label, *[fixed(outcome[name]) for _, name, *_ in shown]])
        if readable:
            rows[-1][2] = human[number]
            text += f"\n  {label:12}  {run['words']}"
            text += f"\n    {what_happened(run['history'])}"
        if theory:
            blank = [" ± std. error", *[""] * len(shown)]
            rows[-1] += [in_units(outcome, name) for name in LIMITS.values()]
            errors = [in_units(outcome, f"{name}_error") for name in LIMITS.values()]
            rows.append([*blank, *errors])
    text += (
        "\n    The sentences are of training, these figures of fresh responses:"
        * theory
    )
    note = """    J = score - β * KL is maximised; J before: of the reference; J*: the most
    that a policy can reach; share: of the way from J before to J*, in percent,
    a dash where β is 0 or J* cannot be told from so few responses.
"""
    if not theory:
        note = "    At these sizes a comparison with theory would take long.\n"
    return page(text, table(heads, rows), note + differences(runs))


def in_units(outcome, name):
    """A figure of theory as text: shares in percent, J* where it has settled."""
    if "share" in name:
        return fixed(100 * outcome[name], 1)
    if outcome.get("settled") == 0 and name in ("J_star", "J_star_error"):
        return "-"
    return fixed(outcome[name], 3)


def differences(runs):
    """For each beta a sentence: do advantages differ in J by more than noise?"""
    text = ""
    for beta in dict.fromkeys(run["config"].beta for run in runs):
        same = [run["outcome"] for run in runs if run["config"].beta == beta]
        if len(same) > 1 and "J" in same[0]:
            low, *_, high = sorted(same, key=lambda outcome: outcome["J"])
            noise = math.hypot(low["J_error"], high["J_error"])
            gap = high["J"] - low["J"]
            than = "more" if gap > 2 * noise else "not more"
            text += f"    At β {beta:g} advantages differ in J by {gap:.3f} ± {noise:.3f}, {than}\n"
            text += "    than by chance in these responses; another seed would move both.\n"
    return text


# ---------------------------------------------------------------- 9. the command line

LETTERS_PRESET = {"vocab_size": 27, "batch_size": 64, "prompt_length": 1, "beta": 0.2}
LETTERS_PRESET |= {"response_length": 16, "learning_rate": 4e-3, "drift": 0.1}
PRESETS = {"gpt2": {}, "letters": LETTERS_PRESET}
SIZES = "batch_size prompt_length response_length vocab_size width".split()
ABOUT = "RLHF with PPO, in real numbers. Without flags: one step of it, shown."
EXAMPLES = """examples:
  python rlhf_loop_pseudo.py --preset letters --inspect 3
  python rlhf_loop_pseudo.py --preset letters --steps 200 --beta 0 0.05 0.2 1"""


def flag(name):
    """A name as the command line has it."""
    return f"--{name.replace('_', '-')}"


def make_parser():
    """The flags: one for each field of Config, and those of what is shown and saved."""
    parser = argparse.ArgumentParser("rlhf_loop_pseudo.py", "%(prog)s [flags]", ABOUT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog, parser.allow_abbrev = EXAMPLES, False
    groups = "sizes", "algorithm (several beta or advantage: compared)", "output"
    sizes, algorithm, output = map(parser.add_argument_group, groups)
    sizes.add_argument("--preset", choices=PRESETS, help="what to start from (gpt2)")
    for setting in fields(Config):
        kind, text = setting.type.__origin__, setting.type.__metadata__[0]
        options = {"type": kind, "help": f"{text} ({setting.default})"}
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
        options["nargs"] = "+" if setting.name in ("beta", "advantage") else None
        group = sizes if setting.name in SIZES else algorithm
        group.add_argument(flag(setting.name), **options)
    add = output.add_argument
    add("--inspect", type=int, metavar="ROW", help="show a response token by token")
    add("--pause", action="store_const", const=True, help="ask before every step")
    add("--show", nargs="?", const="", metavar="NAME", help="print a function")
    add("--save", type=Path, metavar="FILE.npz", help="save arrays or metrics")
    add("--export", type=Path, metavar="FILE", help="save it as: .svg .html .txt")
    add("--theme", choices=("dark", "light"), help="colours of the export (dark)")
    return parser


def meant(name, names):
    """A question for a name that is not known: which begins so, by initials, or alike."""
    plain = {known.strip("-").replace("_", "-"): known for known in names}
    wanted = name.strip("-").replace("_", "-").lower()
    near = [known for known in plain if known.startswith(wanted)]
    near += [k for k in plain if "".join(word[:1] for word in k.split("-")) == wanted]
    near += difflib.get_close_matches(wanted, plain)
    return f"; did you mean {plain[near[0]]}?" if near else ""


def read_command_line(argv):
    """What was given, and a Config for each beta and advantage; or exit with 2."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(argv)
    given = {name: x for name, x in vars(options).items() if x is not None}
    preset = "letters" if options.vocab_size == len(LETTERS) else "gpt2"
    settings = PRESETS[given.get("preset", preset)].copy()
    if given.get("steps", 1) > 1:
        settings["drift"] = 0.0  # training starts at the reference
    betas = given.get("beta", [settings.get("beta", Config.beta)])
    advantages = given.get("advantage", [Config.advantage])
    settings |= {name: x for name, x in given.items() if hasattr(Config, name)}
    configs = []
    try:
        for name in unknown:
            flags = map(flag, vars(options))
            raise ValueError(f"{name} is no flag{meant(name, flags)}")
        for settings["beta"] in betas:
            for settings["advantage"] in advantages:
                configs.append(Config(**settings))
        refuse(given, configs)
    except ValueError as problem:
        parser.error(str(problem))
    return given, configs


def refuse(given, configs):
    """Raises ValueError where something cannot be, or would have no effect."""
    config, rows = configs[0], range(configs[0].batch_size)
    gae = [config.advantage == "gae" for config in configs]
    kinds = {"save": [".npz"], "export": [".svg", ".html", ".txt"]}
    fits = {n: given.get(n, Path()).suffix in kinds[n] for n in kinds}
    here = {n: os.access(given.get(n, Path()).parent, os.W_OK) for n in kinds}
    single, different = len(configs) == 1, len(set(configs)) == len(configs)
    rules = [  # flags, whether they work here, and how they would
        ("gamma lam", any(gae), "with --advantage gae"),
        ("group_size", not all(gae), "with --advantage rloo or grpo"),
        ("preference_pairs", config.readable, "with --preset letters"),
        ("inspect pause", config.steps == 1, "in a walk-through, without --steps"),
        (
            "inspect",
            given.get("inspect", -1) in rows,
            f"with a row from 0 to {rows[-1]}",
        ),
        ("pause", sys.stdin and sys.stdin.isatty(), "in a terminal"),
        ("beta advantage", single or config.steps > 1, "with one value, or --steps"),
        ("beta advantage", different, "with each value once"),
        ("show", len(given) == 1, "alone"),
        ("theme", "export" in given, "with --export"),
        ("save", fits["save"], "with a file that ends in .npz"),
        ("export", fits["export"], "with a file that ends in .svg, .html or .txt"),
        ("save", here["save"], "in a folder that can be written to"),
        ("export", here["export"], "in a folder that can be written to"),
    ]
    for flags, works, how in rules:
        for name in given.keys() & set(flags.split()):
            if not works:
                raise ValueError(f"{flag(name)}: works only {how}")
    functions_named(given.get("show", ""))
    if config.readable:
        demonstrations(WORDS, config)
    logits = config.batch_size * config.response_length * config.vocab_size
    weights = 12 * config.width * config.vocab_size
    needed = 4 * (weights + logits * (config.steps == 1))
    memory = math.inf
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:  # the largest array, and models with Adam's m and v
        raise ValueError(f"sizes: {needed:.1e} bytes are needed of {memory:.1e}")


def functions_named(name):
    """Functions of this file by name, in any case, or by their step; none for ""."""
    docs = {n: str(x.__doc__) for n, x in globals().items() if inspect.isfunction(x)}
    names = [known for known in docs if known.lower() == name.lower()]
    names = names or [n for n, doc in docs.items() if doc.startswith(f"Step {name}")]
    if name and not names:
        raise ValueError(f"--show: {name} is no function here{meant(name, docs)}")
    return names


def global_names(code):
    """Names that a code object, and those inside it, look up in their module."""
    looks = ("LOAD_GLOBAL", "LOAD_NAME")
    names = {i.argval for i in dis.get_instructions(code) if i.opname in looks}
    inner = [global_names(part) for part in code.co_consts if inspect.iscode(part)]
    return names.union(*inner)


def source_of(names):
    """Functions and all in this file that they need, in its order, ready to paste."""
    found, wanted = {}, list(names)
    for name in wanted:  # which grows
        value = globals()[name]
        home = getattr(value, "__module__", None)
        found[name] = f"from {home} import {name}\n"
        if inspect.ismodule(value):
            found[name] = f"import {value.__name__} as {name}\n"
        elif home is None:
            found[name] = f"{name} = {value!r}\n"
        elif home == __name__:
            found[name] = inspect.getsource(value)
        needed = global_names(compile(found[name], name, "exec")) & globals().keys()
        wanted += [n for n in needed if n not in wanted and n[0] != "_"]
    return "\n\n".join(found[name] for name in globals() if name in found)


def show_page(name):
    """The source of a function, or a list of the public ones."""
    if name:
        return Text(source_of(functions_named(name)))
    functions = [x for x in globals().values() if inspect.isfunction(x)]
    public = [f for f in functions if "Source:" in str(f.__doc__)]
    lines = [f"  {f.__name__:20} {f.__doc__.splitlines()[0]}" for f in public]
    return Text("\n".join(lines))


def opening_pages(title, configs, arrays):
    """The data flow, and the stages before the loop; returns what init_models takes."""
    critic, config = any(c.advantage == "gae" for c in configs), configs[0]
    yield page(f"""=== {title} ==={PICTURE if critic else PICTURE_WITHOUT_CRITIC}\
    The actor is the model that writes and learns, the reference what it was at
    first. A forward pass computes, for each position, the next token's chances.
""")
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
    for stage in walk_through(models, config, rng):
        arrays |= stage
        question = next(pages)
        if "pause" in given:
            yield page(f"  {question}")
            wait_for_enter()
        yield page(next(pages))
        arrays.pop("logits", None)  # only shown, and the largest of all
    if config.readable or "inspect" in given:
        yield response_page(arrays, config, given.get("inspect", 0))
    yield effect_page(arrays, models, config)


def wait_for_enter():
    """Wait for Enter, but for none that was pressed before the question stood there."""
    if sys.platform != "win32":
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)
    input("  [Enter] ")


def training_pages(configs, arrays, runs):
    """The trainings; runs gets what each came to, arrays what was before them."""
    before = yield from opening_pages("RLHF Training", configs, arrays)
    for config in configs:
        run = {"label": f"β {config.beta:g}, {config.advantage}", "config": config}
        runs.append(run | {"history": {}, "texts": [], "outcome": {}})
        models = init_models(config, np.random.default_rng(config.seed), *before)
        train_and_watch(runs[-1], models)
        yield training_page(runs[-1])
    yield chart_page(runs)
    yield outcome_page(runs)


def train_and_watch(run, models):
    """Train, with live figures in a terminal; run gets metrics, texts and outcome."""
    config, history, label = run["config"], run["history"], run["label"]
    rngs = [np.random.default_rng([config.seed, stream]) for stream in (2, 3)]
    columns = "{task.description}", MofNCompleteColumn(), TimeRemainingColumn()
    hidden = not sys.stdout.isatty()
    console = make_console(quiet=hidden)
    with Progress(*columns, console=console, transient=True, disable=hidden) as live:
        task = live.add_task(label, total=config.steps)
        for metrics, data in train(models, config, rngs[0]):
            for name, value in metrics.items():
                history.setdefault(name, []).append(float(value))
            texts = texts_of(data["prompts"][:2], data["responses"][:2], config, 10)
            run["texts"].append(" ".join(texts))
            shown = figures_in(metrics)
            now = [f"{head} {fixed(metrics[metric])}" for metric, _, head, _ in shown]
            live.update(task, advance=1, description="  ".join([label, *now]))
    last = {name: stretch_means(history[m])[0][-1] for m, name, *_ in shown}
    run["outcome"] = attainable_gain(models, config, rngs[1]) or last
    if config.readable:
        prompts, length = np.arange(0, 26, 5)[:, None], config.response_length
        for name, model in ("start", models.reference), ("words", models.actor):
            rng = np.random.default_rng([config.seed, 4])
            responses, *_ = generate(model, prompts, length, rng, 26)
            run[name] = " ".join(texts_of(prompts, responses, config, 8))


def saved(configs, arrays, runs):
    """All arrays, and the configuration as JSON, as bytes; several runs a row each."""
    rows, config, steps = {}, {}, configs[0].steps
    for row, run in enumerate(runs):  # what an interrupted run lacks is NaN
        for name, values in run["history"].items():
            metric = rows.setdefault(name, np.full((len(configs), steps), np.nan))
            metric[row, : len(values)] = values
        for name, value in run["outcome"].items():
            theory = rows.setdefault(f"theory/{name}", np.full(len(configs), np.nan))
            theory[row] = value
    if len(configs) == 1:
        rows = {name: values[0] for name, values in rows.items()}
    for name, value in vars(configs[0]).items():
        values = [vars(other)[name] for other in configs]
        config[name] = values if len(set(values)) > 1 else value
    data = io.BytesIO()
    np.savez(data, config=json.dumps(config), **arrays, **rows)
    return data.getvalue()


def exported(path, theme, parts):
    """What was shown, as the bytes of a file of path's kind."""
    console = make_console(theme, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    light, dark = terminal_theme.DEFAULT_TERMINAL_THEME, terminal_theme.MONOKAI
    colours = light if theme == "light" else dark
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


def write(path, data):
    """Write bytes to a file, whole or not at all. Returns the exit code."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        return complain(problem)
    return 0


def show_all(pages, shown):
    """Print pages as they come; shown gets them. Returns the exit code."""
    console = make_console()
    try:
        with np.errstate(all="ignore"):  # check_finite speaks of what is not finite
            for part in pages:
                shown.append(part)
                console.print(part)
        sys.stdout.flush()
    except (KeyboardInterrupt, EOFError):
        console.print("\nInterrupted.")
        return 130
    except SystemExit:  # rich's answer to a closed pipe
        return 1
    except (FloatingPointError, MemoryError, OSError) as problem:
        return complain(problem)
    return 0


def complain(problem):
    """Say on stderr what went wrong. Returns the exit code for that."""
    print(f"rlhf_loop_pseudo.py: {problem}", file=sys.stderr)
    return 1


def main(argv=None):
    """Run the command line argv, sys.argv without it. Returns the exit code."""
    sys.stdout = sys.stdout or io.StringIO()  # where it is closed
    if hasattr(sys.stdout, "reconfigure"):
        codecs.register_error("plain", plain)
        sys.stdout.reconfigure(errors="plain")
    try:
        given, configs = read_command_line(argv)
    except SystemExit as stop:  # --help, or bad input
        return stop.code
    arrays, runs, shown = {}, [], []
    pages = training_pages(configs, arrays, runs)
    if "show" in given:
        pages = [show_page(given["show"])]
    elif configs[0].steps == 1:
        pages = one_step_pages(given, configs[0], arrays)
    code = show_all(pages, shown)
    if "save" in given:
        code = write(given["save"], saved(configs, arrays, runs)) or code
    if "export" in given:
        theme = given.get("theme", "dark")
        code = write(given["export"], exported(given["export"], theme, shown)) or code
    return code


if __name__ == "__main__":
    sys.exit(main())
