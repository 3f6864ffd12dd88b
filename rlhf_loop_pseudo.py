# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "rich>=13.8"]
# ///
"""RLHF in one file, for real: fine-tuning, a reward model, the PPO loop, and DPO.

    python rlhf_loop_pseudo.py                               one step, every tensor
    python rlhf_loop_pseudo.py --preset letters              the same in words
    python rlhf_loop_pseudo.py --preset letters --steps 200  a whole training

Reinforcement learning from human feedback, as in InstructGPT, with four small models.

  prompts ─► actor ─► responses ─┬─► reward model ─► score ────────┐
               ▲                 ├─► reference ─► KL to the actor ─┴► rewards ─┐
               │                 └─► critic ────► values ─────────► GAE ◄──────┘
               │                        ▲                            │
               └────── PPO update ──────┴─────────── advantages ◄────┘

    1. sample prompts                       sample_prompts
    2. the actor generates responses        generate
    3. the reward model scores them         score_responses
    4. KL: how far has the actor moved?     token_logprobs, kl_penalty
    5. score and KL become token rewards    shape_rewards
    6. advantages: better than expected?    critic_values, gae, whiten; without a
                                            critic rloo_advantages, grpo_advantages
    7. the update                           ppo_loss, kl_loss, value_loss, adam_step,
                                            actor_gradients, critic_gradients

Sections 2 to 6 are the lesson: configuration, the loop, the seven steps, before the
loop and without it, the models. Sections 7 to 9 measure and show.

In shape comments B counts sequences, P prompt tokens, T response tokens, V the
vocabulary, D the width of a hidden state, N rows. All logarithms are natural.
"""

import argparse
import ast
import codecs
import inspect
import io
import itertools
import json
import os
import sys
import textwrap
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    if sys.version_info < (3, 10):
        sys.exit(f"This needs Python 3.10 or newer, not {sys.version.split()[0]}.")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # more threads gain nothing
try:
    import numpy as np
    from rich.console import Console, Group
    from rich.progress import track
    from rich.table import Table
    from rich.terminal_theme import DEFAULT_TERMINAL_THEME, TerminalTheme
    from rich.text import Text
    from rich.theme import Theme
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"{missing.name} is missing. Run: python -m pip install numpy rich")

# ---------------------------------------------------------------- 2. configuration

LETTERS = "abcdefghijklmnopqrstuvwxyz."  # the tokens if V is 27; "." ends a word

# What a setting may be: its type, a test, and the words for the error message
COUNT = Integral, lambda x: 1 <= x <= 10**6, "a whole number from 1 to 10^6"
TWO_OR_MORE = Integral, lambda x: 2 <= x <= 10**6, "a whole number from 2 to 10^6"
NATURAL = Integral, lambda x: x >= 0, "a whole number of at least 0"
NOT_NEGATIVE = Real, lambda x: 0 <= x < np.inf, "a finite number of at least 0"
FRACTION = Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"
CLIP = Real, lambda x: 0 < x < 1, "a number between 0 and 1"
METHOD = str, lambda x: x in ("ppo", "rloo", "grpo", "dpo"), "ppo, rloo, grpo or dpo"
SCORER = str, lambda x: x in ("learned", "human"), "learned or human"
PLACE = str, lambda x: x in ("reward", "loss"), "reward or loss"
ESTIMATOR = str, lambda x: x in ("k1", "k2", "k3"), "k1, k2 or k3"


def setting(default, rule, meaning, group="algorithm"):
    """A field of Config: its default, its rule, and its line in --help."""
    return field(
        default=default, metadata={"rule": rule, "help": meaning, "group": group}
    )


@dataclass(frozen=True)
class Config:
    """All that affects the algorithm. Raises ValueError if it is out of range."""

    batch_size: int = setting(4, COUNT, "B, responses in a batch", "sizes")
    prompt_length: int = setting(64, COUNT, "P, tokens in a prompt", "sizes")
    response_length: int = setting(128, COUNT, "T, tokens in a response", "sizes")
    vocab_size: int = setting(50257, TWO_OR_MORE, "V; the last ends a text", "sizes")
    width: int = setting(32, COUNT, "D, the width of a hidden state", "sizes")
    preference_pairs: int = setting(2048, COUNT, "pairs of responses", "sizes")
    steps: int = setting(1, COUNT, "batches to train on; 1 is the walk-through")
    method: str = setting("ppo", METHOD, "ppo, rloo, grpo or dpo")
    reward: str = setting("learned", SCORER, "what scores: learned or human")
    beta: float = setting(
        0.02, NOT_NEGATIVE, "β, the KL coefficient, in score per nat"
    )
    kl_in: str = setting("reward", PLACE, "where the KL goes: reward or loss")
    kl_estimator: str = setting("k1", ESTIMATOR, "of a token's KL: k1, k2 or k3")
    group_size: int = setting(4, TWO_OR_MORE, "responses to each prompt (rloo, grpo)")
    gamma: float = setting(1.0, FRACTION, "γ, the discount per token (ppo)")
    lam: float = setting(0.95, FRACTION, "λ of GAE (ppo)")
    clip: float = setting(0.2, CLIP, "ε; the ratio is clipped to 1 - ε .. 1 + ε")
    ppo_epochs: int = setting(4, COUNT, "updates on each batch")
    learning_rate: float = setting(
        5e-4, NOT_NEGATIVE, "Adam's at first; it falls to 0"
    )
    drift: float = setting(None, NOT_NEGATIVE, "random part of first actor")
    seed: int = setting(0, NATURAL, "seed of all random numbers")

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            kind, allowed, words = item.metadata["rule"]
            right_type = isinstance(value, kind) and not isinstance(value, bool)
            default = item.name == "drift" and value is None
            if not default and not (right_type and allowed(value)):
                raise ValueError(f"{flag(item.name)} must be {words}, not {value!r}")
        refuse_conflicts(self)

    @property
    def uses_letters(self):
        """Whether tokens are letters, so that texts can be read and judged."""
        return self.vocab_size == len(LETTERS)

    @property
    def start_drift(self):
        """The drift, by default 0 in a training, which starts at the reference."""
        if self.drift is not None:
            return self.drift
        return 0.0 if self.steps > 1 else 0.1 if self.uses_letters else 0.75


LETTERS_PRESET = {"vocab_size": 27, "batch_size": 64, "prompt_length": 1, "beta": 0.2}
LETTERS_PRESET |= {"response_length": 16, "learning_rate": 4e-3}
PRESETS = {"gpt2": {}, "letters": LETTERS_PRESET}

# ---------------------------------------------------------------- 3. the loop


# ANCHOR: core_loop
def core_loop(models, config, rng=None):
    """The seven steps, config.steps times: RLHF with PPO, RLOO or GRPO.

    Yields a Step after each update; the caller decides what to do with it. The
    weights of actor and critic change in place, those of the other models never do.
    With rloo and grpo there is no critic, and each prompt gets group_size responses.
    Raises ValueError if the method is dpo, which has a loop of its own: dpo_loop.
    Source: InstructGPT (Ouyang et al. 2022), section 3.5, and Ziegler et al. 2019.
    """
    if config.method == "dpo":
        raise ValueError("method: dpo has a loop of its own, dpo_loop")
    actor, critic, reward_model, reference = models
    rng = rng or np.random.default_rng([config.seed, 2])
    length, eos = config.response_length, config.vocab_size - 1
    has_critic, kl_in_loss = config.method == "ppo", config.kl_in == "loss"
    group_size = 1 if has_critic else config.group_size
    actor_state, critic_state = {}, {}
    for step in range(config.steps):
        # 1. Sample prompts
        count = config.batch_size // group_size
        prompts = sample_prompts(rng, count, config.prompt_length, config.vocab_size)
        prompts = np.repeat(prompts, group_size, axis=0)  # (count, P) -> (B, P)

        # 2. Generate
        responses, mask, old_logprobs = generate(actor, prompts, length, rng, eos)

        # 3. Score
        scores = score_responses(reward_model, prompts, responses, mask)  # (B,)

        # 4. KL penalty
        ref_logprobs = token_logprobs(reference, prompts, responses) * mask  # (B, T)
        kl = kl_penalty(old_logprobs, ref_logprobs, config.kl_estimator)  # (B, T)

        # 5. Total rewards
        reward_beta = 0.0 if kl_in_loss else config.beta
        rewards = shape_rewards(scores, kl, mask, reward_beta)  # (B, T)

        # 6. Advantages
        values = returns = None
        if has_critic:
            values = critic_values(critic, prompts, responses) * mask  # (B, T)
            advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
            loss_advantages = whiten(advantages, mask)  # (B, T)
        elif config.method == "rloo":
            advantages = rloo_advantages(rewards, mask, group_size)  # (B, T)
            loss_advantages = whiten(advantages, mask)
        else:
            advantages = grpo_advantages(rewards, mask, group_size)  # (B, T)
            loss_advantages = advantages  # each group has been scaled already

        # 7. PPO update
        learning_rate = config.learning_rate * (1 - step / config.steps)
        batch = prompts, responses, old_logprobs, loss_advantages, mask, config.clip
        kl_term = {}
        if kl_in_loss:
            kl_term = {"ref_logprobs": ref_logprobs, "beta": config.beta}
            kl_term["estimator"] = config.kl_estimator
        ratios, actor_losses, critic_losses = [], [], []
        for _ in range(config.ppo_epochs):
            gradients, loss, ratio = actor_gradients(actor, *batch, **kl_term)
            adam_step(actor, gradients, actor_state, learning_rate)
            actor_losses.append(loss)
            ratios.append(ratio)
            if has_critic:
                gradients, loss = critic_gradients(
                    critic, prompts, responses, returns, mask
                )
                adam_step(critic, gradients, critic_state, learning_rate)
                critic_losses.append(loss)
        yield Step(
            prompts=prompts,
            responses=responses,
            mask=mask,
            old_logprobs=old_logprobs,
            scores=scores,
            ref_logprobs=ref_logprobs,
            kl=kl,
            rewards=rewards,
            values=values,
            returns=returns,
            advantages=advantages,
            loss_advantages=loss_advantages,
            ratio=np.stack(ratios),
            actor_loss=np.array(actor_losses),
            critic_loss=np.array(critic_losses),
            learning_rate=learning_rate,
        )
    # ANCHOR_END: core_loop


@dataclass
class Step:
    """The arrays of one step. Floats are 0 at padding, where the mask is 0."""

    prompts: np.ndarray  # (B, P) token ids
    responses: np.ndarray  # (B, T) token ids
    mask: np.ndarray  # (B, T) 1 up to and including the end token, then 0
    old_logprobs: np.ndarray  # (B, T) of the actor that wrote the responses
    scores: np.ndarray  # (B,) one number for each response
    ref_logprobs: np.ndarray  # (B, T) of the reference
    kl: np.ndarray  # (B, T) an estimate of each token's KL, in nats
    rewards: np.ndarray = None  # (B, T) per token: see shape_rewards
    values: np.ndarray = None  # (B, T) the critic's predictions; None without one
    returns: np.ndarray = None  # (B, T) the critic's targets; None without one
    advantages: np.ndarray = None  # (B, T) how much better than expected
    loss_advantages: np.ndarray = None  # (B, T) for the loss: whitened, or GRPO's own
    ratio: np.ndarray = None  # (epochs, B, T) new probability over old, in each epoch
    actor_loss: np.ndarray = None  # (epochs,) before each update
    critic_loss: np.ndarray = None  # (epochs,) the same; (0,) without a critic
    learning_rate: float = None


# ---------------------------------------------------------------- 4. the seven steps

# In sections 4 and 5 a mask is (B, T). It is 0 at padding, and any other number marks
# a real token. A function that takes a mask ignores whatever stands at padding, NaN
# too, and its results are 0 there. Arrays of floats are float32 or float64; token ids
# may have any integer type, and one that is out of range raises ValueError. Gradients
# are dicts with the weights' names, and losses are scalars. Log probabilities and KL
# are in nats.


# ANCHOR: sample_prompts
def sample_prompts(rng, batch_size, prompt_length, vocab_size):
    """Step 1. Draw random prompts (B, P), without the end token V - 1.

    Returns ids from 0 to V - 2. Source: x ~ D in Ziegler et al. 2019, section 2.
    """
    return rng.integers(0, vocab_size - 1, size=(batch_size, prompt_length))
    # ANCHOR_END: sample_prompts


# ANCHOR: generate
def generate(actor, prompts, response_length, rng, eos_token):
    """Step 2. Sample a response to each prompt, token by token.

    token[t] ~ softmax(hidden[P - 1 + t] @ head), at temperature 1

    prompts (B, P), without padding. Returns (responses, mask, logprobs), (B, T) each.
    The mask is 1 up to and including the first end token; responses repeat it after
    that, and logprobs are 0 there.
    Source: Radford et al. 2018 (GPT), equations 1 and 2.
    """
    prompts = token_ids(actor, prompts)
    batch_size, prompt_length = prompts.shape
    embed = actor["embed"]
    responses = np.full((batch_size, response_length), eos_token)
    mask = np.zeros(responses.shape, dtype=embed.dtype)
    logprobs = np.zeros_like(mask)
    context_sum = embed[prompts].sum(axis=1)  # (B, P, D) -> (B, D)
    token = prompts[:, -1]
    unfinished = np.ones(batch_size, dtype=bool)
    for t in range(response_length):
        context = context_sum / (prompt_length + t) ** 0.5
        hidden = np.tanh(embed[token] + context @ actor["context_proj"])  # (B, D)
        sampled, logprob = sample_tokens(hidden @ actor["head"], rng)  # (B,) each
        token = np.where(unfinished, sampled, eos_token)
        responses[:, t] = token
        mask[:, t] = unfinished
        logprobs[:, t] = np.where(unfinished, logprob, 0)
        unfinished = token != eos_token
        context_sum = context_sum + embed[token]  # this takes the place of a KV cache
    return responses, mask, logprobs
    # ANCHOR_END: generate


# ANCHOR: score_responses
def score_responses(reward_model, prompts, responses, mask):
    """Step 3. Score each response with one number.

    score = hidden[last real token] @ head + bias

    reward_model is a dict of weights (a trained one has a bias), or your own function
    of (prompts, responses, mask). prompts (B, P) have no padding: it would change the
    score. Returns (B,). Raises ValueError if shapes differ, a row has no real token,
    or your function returns anything but B finite numbers. Source: InstructGPT
    (Ouyang et al. 2022), section 3.5.
    """
    if callable(reward_model):
        scores = np.asarray(reward_model(prompts, responses, mask))
        if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
            raise ValueError("your reward function must return (B,) finite numbers")
        return scores.astype(np.result_type(mask, np.float32))
    tokens = token_ids(reward_model, prompts, responses)
    last = last_positions(prompts, responses, mask)
    hidden, _ = backbone(reward_model, tokens)
    scores = hidden[last] @ reward_model["head"]  # (B, P + T, D) -> (B, D) -> (B, 1)
    return scores[:, 0] + reward_model.get("bias", 0.0)
    # ANCHOR_END: score_responses


# ANCHOR: token_logprobs
def token_logprobs(model, prompts, responses):
    """Step 4. Log probabilities of given response tokens, in one forward pass.

    logprob[t] = log softmax(hidden[P - 1 + t] @ head)[responses[t]]

    Returns (B, T); padding is not zeroed. Source: Radford et al. 2018, equation 2.
    """
    logprobs, _ = forward_logprobs(model, prompts, responses)
    return logprobs
    # ANCHOR_END: token_logprobs


# ANCHOR: kl_penalty
def kl_penalty(logprobs, ref_logprobs, estimator="k1"):
    """Step 4. Estimate KL(actor || reference) from the sampled tokens alone.

    k1 = log p_actor - log p_reference    k2 = k1² / 2    k3 = exp(-k1) - 1 + k1

    k1 and k3 are unbiased; k2 is biased, but little near the reference. Only k1 can
    be negative. In the reward only k1 has KL's own gradient: near the reference, that
    of k2 and k3 is 0 to first order. In the loss it is the other way round. Both
    arguments are (B, T). Returns (B, T) in nats. Raises ValueError if the shapes
    differ or the estimator is unknown. Source: Schulman 2020, "Approximating KL
    Divergence".
    """
    if logprobs.shape != ref_logprobs.shape or estimator not in ("k1", "k2", "k3"):
        raise ValueError("kl_penalty: needs equal shapes, and k1, k2 or k3")
    k1 = logprobs - ref_logprobs
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1**2 / 2
    return np.expm1(-k1) + k1
    # ANCHOR_END: kl_penalty


# ANCHOR: shape_rewards
def shape_rewards(scores, kl, mask, beta):
    """Step 5. Merge scores and KL into one reward per token.

    reward[t] = -β kl[t], plus the score on the last real token

    The score judges the whole response, so it is paid where that ends. scores (B,),
    kl (B, T) in nats, β in score per nat. Returns (B, T). Raises ValueError if the
    shapes differ or a row has no real token. Source: Ziegler et al. 2019, equation 2.
    """
    fits = kl.shape == mask.shape and scores.shape == mask.shape[:1]
    if not fits or not mask.any(axis=1).all():
        raise ValueError("scores, kl, mask: shapes differ, or a row is empty")
    last = mask.shape[1] - 1 - (mask[:, ::-1] != 0).argmax(axis=1)  # (B, T) -> (B,)
    rewards = -float(beta) * np.where(mask, kl, 0.0)
    rewards[np.arange(len(last)), last] += scores
    return rewards
    # ANCHOR_END: shape_rewards


# ANCHOR: critic_values
def critic_values(critic, prompts, responses):
    """Step 6. Predict the return from each state.

    value[t] = hidden[P - 1 + t] @ head, the state before token t is chosen

    Returns (B, T); padding is not zeroed. Source: V in Schulman et al. 2016, sec. 2.
    """
    states, _ = predicting_states(critic, prompts, responses)  # (B, T, D)
    return (states @ critic["head"])[..., 0]  # (B, T, D) -> (B, T)
    # ANCHOR_END: critic_values


# ANCHOR: gae
def gae(rewards, values, mask, gamma, lam):
    """Step 6. Generalized advantage estimation, from the last token to the first.

    δ[t] = reward[t] + γ value[t + 1] - value[t]
    advantage[t] = δ[t] + γ λ advantage[t + 1]
    return[t] = advantage[t] + value[t]

    Here t + 1 is the next real token; after the last one, value and advantage are 0.
    λ = 0 leaves the TD error δ; λ = 1 the sum of the discounted rewards to come,
    minus the value. All (B, T). Returns (advantages, returns). Raises ValueError if
    the shapes differ. Source: Schulman et al. 2016, equations 11 and 16 to 18.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError("rewards, values and mask must have the same shape")
    rewards, values = np.where(mask, rewards, 0.0), np.where(mask, values, 0.0)
    advantages = np.zeros_like(values)
    next_value = next_advantage = 0.0
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = np.where(mask[:, t], values[:, t], next_value)
        next_advantage = np.where(mask[:, t], advantages[:, t], next_advantage)
    advantages = np.where(mask, advantages, 0.0)
    return advantages, advantages + values
    # ANCHOR_END: gae


# ANCHOR: rloo_advantages
def rloo_advantages(rewards, mask, group_size):
    """Step 6 without a critic. Compare each response with the others of its group.

    advantage = R - mean of the other R's, where R is the sum of a response's rewards

    RLOO as published is REINFORCE; here its advantages are whitened and go into PPO's
    clipped loss. group_size adjacent rows answer the same prompt. rewards (B, T).
    Returns (B, T): the tokens of a response share its advantage. Raises ValueError if
    the shapes differ or a group is incomplete. Source: Ahmadian et al. 2024 (RLOO).
    """
    if rewards.shape != mask.shape or group_size < 2 or len(mask) % group_size:
        raise ValueError("rewards, mask: shapes differ, or groups are not complete")
    rewards = np.where(mask, rewards, 0.0)
    totals = rewards.sum(axis=1, dtype=np.float64).reshape(-1, group_size)  # (B/G, G)
    others = (totals.sum(axis=1, keepdims=True) - totals) / (group_size - 1)
    advantages = (totals - others).reshape(-1, 1)  # (B/G, G) -> (B, 1)
    return np.where(mask, advantages, 0.0).astype(rewards.dtype)  # (B, 1) -> (B, T)
    # ANCHOR_END: rloo_advantages


# ANCHOR: grpo_advantages
def grpo_advantages(rewards, mask, group_size):
    """Step 6 without a critic. Standardize each response within its group.

    advantage = (R - mean) / (std + 1e-6), where R is the sum of a response's rewards

    The group's std is divided by G - 1. GRPO as published has the KL in the loss, and
    takes the mean of the loss over each response first; here it is over all tokens.
    rewards (B, T). Returns (B, T): the tokens of a response share its advantage.
    Raises ValueError if the shapes differ or a group is incomplete. Source: Shao et
    al. 2024 (GRPO), section 4.1.2.
    """
    if rewards.shape != mask.shape or group_size < 2 or len(mask) % group_size:
        raise ValueError("rewards, mask: shapes differ, or groups are not complete")
    rewards = np.where(mask, rewards, 0.0)
    groups = rewards.sum(axis=1, dtype=np.float64).reshape(-1, group_size)  # (B/G, G)
    centered = groups - groups.mean(axis=1, keepdims=True)
    std = groups.std(axis=1, ddof=1, keepdims=True)  # (B/G, 1)
    advantages = (centered / (std + 1e-6)).reshape(-1, 1)  # (B/G, G) -> (B, 1)
    return np.where(mask, advantages, 0.0).astype(rewards.dtype)  # (B, 1) -> (B, T)
    # ANCHOR_END: grpo_advantages


# ANCHOR: whiten
def whiten(x, mask):
    """Step 6. Shift and scale to mean 0 and variance 1, over the real tokens.

    (x - mean) / sqrt(variance + 1e-8)

    The variance is divided by n - 1; that of a single token counts as 0. Sums are in
    float64, because rounding in float32 would tell equal numbers apart. x (B, T).
    Returns (B, T). Raises ValueError if the shapes differ or no token is real.
    Source: masked_whiten in TRL.
    """
    if x.shape != mask.shape or not mask.any():
        raise ValueError("x, mask: shapes differ, or no token is real")
    real = x[mask != 0].astype(np.float64)  # (B, T) -> (N,)
    std = np.sqrt(real.var(ddof=min(1, len(real) - 1)) + 1e-8)
    whitened = np.where(mask, (x.astype(np.float64) - real.mean()) / std, 0.0)
    return whitened.astype(np.result_type(x, 1.0))
    # ANCHOR_END: whiten


# ANCHOR: ppo_loss
def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip):
    """Step 7. PPO's clipped policy loss and its derivative.

    ratio = exp(new - old)
    loss = mean over real tokens of -min(ratio A, clip(ratio, 1 - ε, 1 + ε) A)
    d loss / d new = -ratio A / n where ratio A <= clipped ratio A, else 0

    The gradient of a token is 0 once its ratio has left the clip range in the
    direction that its advantage A asks for. All (B, T). Returns (loss, d_loss/d_new,
    ratio). Raises ValueError if the shapes differ or no token is real. Source:
    Schulman et al. 2017, equation 7.
    """
    arrays = new_logprobs, old_logprobs, advantages
    if any(x.shape != mask.shape for x in arrays) or not mask.any():
        raise ValueError("logprobs, advantages, mask: shapes differ, or no token")
    n = int(np.count_nonzero(mask))
    log_ratio = np.where(mask, new_logprobs, 0.0) - np.where(mask, old_logprobs, 0.0)
    ratio = np.where(mask, np.exp(log_ratio), 0.0)
    unclipped = ratio * np.where(mask, advantages, 0.0)
    clipped = np.clip(ratio, 1 - clip, 1 + clip) * np.where(mask, advantages, 0.0)
    loss = -np.minimum(unclipped, clipped).sum(dtype=np.float64) / n
    return loss, np.where(unclipped <= clipped, -unclipped, 0.0) / n, ratio
    # ANCHOR_END: ppo_loss


def is_clipped(ratio, advantages, clip):
    """Where PPO's clip stops the gradient; the mean of this is the clip fraction."""
    return ratio * advantages > np.clip(ratio, 1 - clip, 1 + clip) * advantages


# ANCHOR: kl_loss
def kl_loss(new_logprobs, ref_logprobs, mask, estimator):
    """Step 7, with --kl-in loss. The KL as a part of the loss, and its derivative.

    loss = mean over real tokens of k1, k2 or k3 (see kl_penalty)
    d loss / d new = 1 / n for k1, k1 / n for k2, (1 - exp(-k1)) / n for k3

    As in trainers, the sampling is not differentiated. So k1's expected gradient is 0
    in the first epoch: it restrains nothing. k2's is KL's own, for each token by
    itself, and k3's is near to it while the actor is near the reference. All (B, T).
    Returns (loss, d_loss/d_new). Raises ValueError if the shapes differ, no token is
    real or the estimator is unknown. Source: Shao et al. 2024 (GRPO), equation 4, for
    k3.
    """
    if not new_logprobs.shape == ref_logprobs.shape == mask.shape or not mask.any():
        raise ValueError("logprobs, mask: shapes differ, or no token is real")
    n = int(np.count_nonzero(mask))
    new_logprobs = np.where(mask, new_logprobs, 0.0)
    ref_logprobs = np.where(mask, ref_logprobs, 0.0)
    loss = kl_penalty(new_logprobs, ref_logprobs, estimator).sum(dtype=np.float64) / n
    k1 = new_logprobs - ref_logprobs
    slopes = {"k1": np.ones_like(k1), "k2": k1, "k3": -np.expm1(-k1)}
    return loss, np.where(mask, slopes[estimator], 0.0) / n
    # ANCHOR_END: kl_loss


# ANCHOR: value_loss
def value_loss(values, returns, mask):
    """Step 7. The critic's squared error and its derivative.

    loss = mean over real tokens of (value - return)²
    d loss / d value = 2 (value - return) / n

    All (B, T). Returns (loss, d_loss/d_values). Raises ValueError if the shapes
    differ or no token is real. Source: Schulman et al. 2017, section 5 (L^VF).
    """
    if not values.shape == returns.shape == mask.shape or not mask.any():
        raise ValueError("values, returns, mask: shapes differ, or no token is real")
    n = int(np.count_nonzero(mask))
    error = np.where(mask, values, 0.0) - np.where(mask, returns, 0.0)
    return np.square(error, dtype=np.float64).sum() / n, 2 * error / n
    # ANCHOR_END: value_loss


# ANCHOR: actor_gradients
def actor_gradients(
    actor,
    prompts,
    responses,
    old_logprobs,
    advantages,
    mask,
    clip,
    ref_logprobs=None,
    beta=0.0,
    estimator="k1",
):
    """Step 7. Gradients of ppo_loss, plus β kl_loss if ref_logprobs are given.

    d loss / d weights = d loss / d new * d new / d weights

    prompts (B, P), the others (B, T), as is the ratio. Returns (gradients, loss,
    ratio). Source: Schulman et al. 2017, equation 7.
    """
    new_logprobs, cache = forward_logprobs(actor, prompts, responses)  # (B, T)
    loss, d_new, ratio = ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip)
    if ref_logprobs is not None:
        kl, d_kl = kl_loss(new_logprobs, ref_logprobs, mask, estimator)
        loss = loss + float(beta) * kl
        d_new = d_new + float(beta) * d_kl
    return backward_logprobs(actor, cache, d_new), loss, ratio
    # ANCHOR_END: actor_gradients


# ANCHOR: critic_gradients
def critic_gradients(critic, prompts, responses, returns, mask):
    """Step 7. Gradients of value_loss: d loss / d values * d values / d weights.

    prompts (B, P), the others (B, T). Returns (gradients, loss).
    Source: Schulman et al. 2017, section 5.
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
    """Step 7. One update of Adam, IN PLACE. Returns None.

    m = 0.9 m + 0.1 g    v = 0.999 v + 0.001 g²    p -= rate * m̂ / (sqrt(v̂) + 1e-8)

    m̂ = m / (1 - 0.9^t) and v̂ = v / (1 - 0.999^t) correct for the start at 0. state
    is {} at first and keeps t, m and v. Raises ValueError, before anything has
    changed, if a gradient has no parameter of its name and shape, or is new after the
    first update. Source: Kingma & Ba 2015, algorithm 1.
    """
    known = state["m"] if state else params
    for name, g in gradients.items():
        if name not in known or g.shape != params[name].shape:
            raise ValueError(f"{name}: the parameter is unknown or has another shape")
    if not state:
        state.update(t=0, m={}, v={})
    state["t"] += 1
    t, m, v = state["t"], state["m"], state["v"]
    for name, g in gradients.items():
        m[name] = 0.9 * m.get(name, 0.0) + 0.1 * g
        v[name] = 0.999 * v.get(name, 0.0) + 0.001 * g**2
        m_hat = m[name] / (1 - 0.9**t)
        v_hat = v[name] / (1 - 0.999**t)
        params[name] -= learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8)
    # ANCHOR_END: adam_step


# ---------------------------------------------------------------- 5. before the loop

# Words that a human wrote. Some sound hard and some soft, so that there is a choice.
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
TUNING_UPDATES, TUNING_BATCH, TUNING_RATE = 400, 128, 3e-2
REWARD_UPDATES, REWARD_BATCH, REWARD_RATE = 200, 128, 5e-3
DPO_RATE = 1e-3


# ANCHOR: demonstrations
def demonstrations(words, config):
    """Stage 1. Split words into prompts (first letters) and responses (the rest).

    Words that do not fit into config.response_length with their end token are left
    out. Returns (prompts, responses, mask): (N, 1), (N, T), (N, T).
    Source: InstructGPT (Ouyang et al. 2022), section 3.2.
    """
    length = 1 + config.response_length
    padded = [word.ljust(length, ".") for word in words if len(word) < length]
    tokens = np.array([[LETTERS.index(letter) for letter in text] for text in padded])
    prompts, responses = np.split(tokens, [1], axis=1)  # (N, 1), (N, T)
    ends = np.cumsum(responses == LETTERS.index("."), axis=1)
    return prompts, responses, (ends <= 1).astype(np.float32)
    # ANCHOR_END: demonstrations


# ANCHOR: fine_tune
def fine_tune(model, prompts, responses, mask, rng):
    """Stage 1. Supervised fine-tuning: learn to write as the human wrote, IN PLACE.

    loss = mean over real tokens of -log p(token), the cross-entropy
    d loss / d log p = -1 / n

    The mean is over a batch's tokens, so it is not the mean of its parts' means. Each
    of 400 Adam updates sees at most 128 of the N rows: prompts (N, P), responses and
    mask (N, T). Returns the losses (400,) in nats per token. Raises ValueError as
    score_responses does. Source: InstructGPT (Ouyang et al. 2022), section 3.5.
    """
    token_ids(model, prompts, responses)  # raises if they do not fit each other
    last_positions(prompts, responses, mask)  # nor the mask to them
    state, losses = {}, []
    for update in range(TUNING_UPDATES):
        rows = rng.permutation(len(prompts))[:TUNING_BATCH]
        logprobs, cache = forward_logprobs(model, prompts[rows], responses[rows])
        real = (mask[rows] != 0).astype(logprobs.dtype)
        n = real.sum()
        losses.append(-(logprobs * real).sum() / n)
        gradients = backward_logprobs(model, cache, -real / n)
        rate = TUNING_RATE * (1 - update / TUNING_UPDATES)
        adam_step(model, gradients, state, rate)
    return np.array(losses)
    # ANCHOR_END: fine_tune


# ANCHOR: human_scores
def human_scores(prompts, responses, mask, vocab_size):
    """The simulated human's opinion of each word, from 0 to 1: (B,).

    (1 - |2 vowels / letters - 1|) * distinct letters / letters

    They like words with as many vowels as consonants, and no letter twice. Prompt (B,
    P) and response (B, T) are one word; token V - 1 ends it. Returns 0 for no
    letters. Source: the gold reward model of Gao et al. 2023; the rule is ours.
    """
    words = np.concatenate([prompts, responses], axis=1)  # (B, P + T)
    real = np.concatenate([np.ones(prompts.shape), mask], axis=1) != 0
    real &= words != vocab_size - 1
    vowels = (np.isin(words, [0, 4, 8, 14, 20]) & real).sum(axis=1)  # a, e, i, o, u
    distinct = [len(set(word[kept])) for word, kept in zip(words, real)]
    letters = np.maximum(real.sum(axis=1), 1)
    return (1 - abs(2 * vowels / letters - 1)) * distinct / letters
    # ANCHOR_END: human_scores


def choice_probability(lead):
    """How likely the human chooses what they like better by lead."""
    return 1 / (1 + np.exp(-8 * lead))


def completes_word(prompts, responses, mask, config):
    """Whether each prompt and response spell one of WORDS and its end token, (B,)."""
    responses = np.where(mask, responses, config.vocab_size - 1)
    tokens = np.concatenate([prompts, responses], axis=1)  # (B, 1 + T)
    length = tokens.shape[1]
    letters = np.array(list(LETTERS))[tokens]  # (B, 1 + T) of single letters
    texts = letters.view(f"<U{length}")[:, 0]  # joined, (B,)
    return np.isin(texts, [w.ljust(length, ".") for w in WORDS if len(w) < length])


# ANCHOR: collect_preferences
def collect_preferences(reference, config, rng):
    """Stage 2. Let the human choose between two responses of the reference.

    P(the first is chosen) = sigmoid(8 (human(first) - human(second)))

    So the choices are noisy, as people's are. With N = config.preference_pairs,
    returns (prompts, responses, mask) of 2 N rows: the chosen responses, then the
    rejected ones in the same order. Source: Christiano et al. 2017, section 2.2.
    """
    pairs, vocab_size = config.preference_pairs, config.vocab_size
    prompts = sample_prompts(rng, pairs, config.prompt_length, vocab_size)
    prompts = np.concatenate([prompts, prompts])  # (N, P) -> (2 N, P)
    length, eos_token = config.response_length, vocab_size - 1
    responses, mask, _ = generate(reference, prompts, length, rng, eos_token)
    first, second = np.split(human_scores(prompts, responses, mask, vocab_size), 2)
    first_wins = rng.random(pairs) < choice_probability(first - second)
    chosen = np.arange(pairs) + np.where(first_wins, 0, pairs)
    rejected = np.arange(pairs) + np.where(first_wins, pairs, 0)
    order = np.concatenate([chosen, rejected])
    return prompts, responses[order], mask[order]
    # ANCHOR_END: collect_preferences


# ANCHOR: preference_loss
def preference_loss(chosen, rejected):
    """Stage 2. Bradley-Terry: how badly the scores explain the human's choices.

    loss = mean of -log sigmoid(chosen - rejected)
    d loss / d chosen = -sigmoid(rejected - chosen) / n = -d loss / d rejected

    A number added to all scores changes nothing, so they are centered after training.
    chosen, rejected (N,) are the scores of each pair. Returns (loss, d_chosen,
    d_rejected). Raises ValueError if the shapes differ or there is no pair.
    Source: Stiennon et al. 2020; InstructGPT, equation 1.
    """
    if chosen.shape != rejected.shape or not chosen.size:
        raise ValueError("chosen, rejected: shapes differ, or there is no pair")
    margin = rejected - chosen
    losses = np.logaddexp(0, margin)  # -log sigmoid(x) = log(1 + exp(-x))
    d_rejected = np.exp(margin - losses) / losses.size  # sigmoid(margin) / n
    return losses.mean(), -d_rejected, d_rejected
    # ANCHOR_END: preference_loss


# ANCHOR: reward_gradients
def reward_gradients(reward_model, prompts, responses, mask):
    """Stage 2. Gradients of preference_loss for the reward model's weights.

    prompts (2 N, P), responses, mask (2 N, T): the chosen ones first. Returns
    (gradients, loss). Source: InstructGPT (Ouyang et al. 2022), equation 1.
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
    """Stage 2. Learn to score as the human chose, in 200 Adam updates on 128 pairs.

    Then the scores are shifted and scaled to mean 0 and standard deviation 1 over
    these responses; "score_std" keeps what they were divided by. prompts (2 N, P),
    responses, mask (2 N, T): the chosen ones first. Returns (reward_model, losses): a
    new model with a bias, and (200,). Source: Ziegler et al. 2019, section 2;
    InstructGPT, section 3.5.
    """
    token_ids(
        reward_model, prompts, responses
    )  # raises if they do not fit each other
    last_positions(prompts, responses, mask)  # nor the mask to them
    reward_model = {name: reward_model[name].copy() for name in WEIGHTS}
    chosen_rows, rejected_rows = np.split(np.arange(len(prompts)), 2)
    state, losses = {}, []
    for update in range(REWARD_UPDATES):
        pairs = rng.integers(0, len(chosen_rows), size=REWARD_BATCH)
        rows = np.concatenate([chosen_rows[pairs], rejected_rows[pairs]])  # (256,)
        batch = prompts[rows], responses[rows], mask[rows]
        gradients, loss = reward_gradients(reward_model, *batch)
        rate = REWARD_RATE * (1 - update / REWARD_UPDATES)
        adam_step(reward_model, gradients, state, rate)
        losses.append(loss)
    scores = np.float64(score_responses(reward_model, prompts, responses, mask))
    std = scores.std() if np.ptp(scores) > 1e-6 else 1.0  # all scores may be equal
    reward_model["head"] /= std
    reward_model["bias"] = np.float32([-scores.mean() / std])
    reward_model["score_std"] = np.float32([std])
    return reward_model, np.array(losses)
    # ANCHOR_END: train_reward_model


class Stages(NamedTuple):
    """What the stages before the loop leave behind."""

    untrained: dict  # weights before fine-tuning
    reference: dict  # weights after it
    reward_model: dict
    pairs: tuple  # prompts, responses, mask of collect_preferences
    losses: dict  # of "fine_tuning" and of "preferences"


def learn_from_human(config, rng=None):
    """Both stages before the loop, the first two of InstructGPT. Returns Stages.

    The reward model starts from the weights before fine-tuning: from those after it,
    it is as accurate, but hacked at beta 0 on some seeds only.
    """
    rng = rng or np.random.default_rng([config.seed, 1])
    untrained = init_model(rng, config.vocab_size, config.width, config.vocab_size)
    reference = {name: weights.copy() for name, weights in untrained.items()}
    tuning = fine_tune(reference, *demonstrations(WORDS, config), rng)
    pairs = collect_preferences(reference, config, rng)
    start = init_reward_model(untrained, rng)
    reward_model, choosing = train_reward_model(start, *pairs, rng)
    losses = {"fine_tuning": tuning, "preferences": choosing}
    return Stages(untrained, reference, reward_model, pairs, losses)


# Without the loop: DPO learns from the same pairs, and samples nothing.


# ANCHOR: dpo_loss
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Direct preference optimization: preference_loss of the implicit rewards.

    implicit reward = β (log p_actor(response) - log p_reference(response))
    loss = mean of -log sigmoid(implicit reward of chosen - that of rejected)

    All (N,): sums of log probabilities over each response's real tokens. Returns
    (loss, d_loss/d_chosen, d_loss/d_rejected). Raises ValueError if the shapes
    differ. Source: Rafailov et al. 2023, equation 7.
    """
    if chosen.shape != ref_chosen.shape or rejected.shape != ref_rejected.shape:
        raise ValueError("actor's and reference's log probabilities: shapes differ")
    reward_chosen = float(beta) * (chosen - ref_chosen)
    reward_rejected = float(beta) * (rejected - ref_rejected)
    loss, d_chosen, d_rejected = preference_loss(reward_chosen, reward_rejected)
    return loss, float(beta) * d_chosen, float(beta) * d_rejected
    # ANCHOR_END: dpo_loss


# ANCHOR: dpo_gradients
def dpo_gradients(actor, ref_logprobs, prompts, responses, mask, beta):
    """Gradients of dpo_loss for the actor's weights.

    prompts (2 N, P), the others (2 N, T): the chosen ones first. Returns (gradients,
    loss). Source: Rafailov et al. 2023, equation 7.
    """
    logprobs, cache = forward_logprobs(actor, prompts, responses)  # (2 N, T)
    sums = np.where(mask, logprobs, 0.0).sum(axis=1)  # (2 N, T) -> (2 N,)
    ref_sums = np.where(mask, ref_logprobs, 0.0).sum(axis=1)
    halves = *np.split(sums, 2), *np.split(ref_sums, 2)  # (N,) each
    loss, d_chosen, d_rejected = dpo_loss(*halves, beta)
    d_sums = np.concatenate([d_chosen, d_rejected])[:, None]  # (2 N, 1)
    d_logprobs = np.where(mask, d_sums, 0.0)  # (2 N, 1) -> (2 N, T)
    return backward_logprobs(actor, cache, d_logprobs), loss
    # ANCHOR_END: dpo_gradients


# ANCHOR: dpo_loop
def dpo_loop(models, pairs, config, rng=None):
    """DPO in place of core_loop: config.steps updates on batch_size pairs each.

    Changes the actor in place, at a rate of its own that falls from 1e-3 to 0, and
    yields the loss of each update. Scores in the loop are divided by their standard
    deviation and implicit rewards are not, so β times that deviation aims at the same
    optimum. pairs are (prompts, responses, mask) of collect_preferences, (2 N, P) and
    (2 N, T). Returns a generator. Source: Rafailov et al. 2023, section 4.
    """
    prompts, responses, mask = pairs
    rng = rng or np.random.default_rng([config.seed, 2])
    beta = config.beta * float(models.reward_model["score_std"][0])
    ref_logprobs = token_logprobs(models.reference, prompts, responses)  # (2 N, T)
    chosen_rows, rejected_rows = np.split(np.arange(len(prompts)), 2)
    state = {}
    for step in range(config.steps):
        picked = rng.integers(0, len(chosen_rows), size=config.batch_size)
        rows = np.concatenate([chosen_rows[picked], rejected_rows[picked]])
        batch = ref_logprobs[rows], prompts[rows], responses[rows], mask[rows]
        gradients, loss = dpo_gradients(models.actor, *batch, beta)
        rate = DPO_RATE * (1 - step / config.steps)
        adam_step(models.actor, gradients, state, rate)
        yield loss
    # ANCHOR_END: dpo_loop


# ---------------------------------------------------------------- 6. the models

WEIGHTS = "embed", "context_proj", "head"  # the names of a model's weights


class Models(NamedTuple):
    """The four models. Each is a dict of weights."""

    actor: dict
    critic: dict | None  # None without one: with rloo, grpo and dpo
    reward_model: dict  # or a function, as in score_responses
    reference: dict


def init_weights(rng, rows, columns, std):
    """Draw a float32 matrix uniformly around 0 with this standard deviation."""
    centered = rng.random((rows, columns), dtype=np.float32) - np.float32(0.5)
    return centered * np.float32(12**0.5 * std)


def init_model(rng, vocab_size, width, out_width):
    """Draw a model: embed (V, D), context_proj (D, D), head (D, out_width)."""
    return {  # the context counts more than the token, so the last state knows it all
        "embed": init_weights(rng, vocab_size, width, 0.1),
        "context_proj": init_weights(rng, width, width, 5 / width**0.5),
        "head": init_weights(rng, width, out_width, 1 / width**0.5),
    }


def with_head(model, head):
    """A copy of a model with another head."""
    return {**{name: model[name].copy() for name in WEIGHTS}, "head": head}


def init_reward_model(model, rng):
    """A reward model before it learns: a copy of a model with a random head."""
    width = len(model["context_proj"])
    return with_head(model, init_weights(rng, width, 1, 2.5 / width**0.5))


def init_models(config, rng, reference=None, reward_model=None):
    """All four models as the loop finds them, random unless they are given.

    Actor and critic start from the reference. In the walk-through drift moves the
    actor off it, and the critic's head off 0, as training would. Otherwise the first
    KL would be 0.
    """
    sizes, drift = (config.vocab_size, config.width), np.float32(config.start_drift)
    reference = reference or init_model(rng, *sizes, config.vocab_size)
    reward_model = reward_model or init_reward_model(reference, rng)
    noise = init_model(rng, *sizes, config.vocab_size)
    actor = {name: reference[name] + drift * noise[name] for name in reference}
    critic = None
    if config.method == "ppo":
        head = init_weights(rng, config.width, 1, 1 / config.width**0.5)
        critic = with_head(reference, drift * head)
    return Models(actor, critic, reward_model, reference)


def configure(preset="gpt2", **settings):
    """The Config that the command line makes of these flags.

    Raises ValueError if the preset or a setting is unknown, or a value is wrong.
    """
    known = [item.name for item in fields(Config)]
    unknown = [name for name in settings if name not in known]
    if preset not in PRESETS or unknown:
        raise ValueError(f"unknown {unknown or preset}: presets are gpt2 and letters")
    return Config(**PRESETS[preset] | settings)


def prepare(config, stages=None):
    """The Models that the loop starts with.

    With letters, the stages before the loop are computed unless they are given. The
    human's rule is scaled as the learned scores are.
    """
    rng = np.random.default_rng(config.seed)
    if not config.uses_letters:
        return init_models(config, rng)
    stages = stages or learn_from_human(config)
    reward_model, V = stages.reward_model, config.vocab_size
    if config.reward == "human":
        opinions = human_scores(*stages.pairs, V)
        mean, std = opinions.mean(), opinions.std() or 1.0

        def reward_model(*texts):
            return (human_scores(*texts, V) - mean) / std

    return init_models(config, rng, stages.reference, reward_model)


def token_ids(model, prompts, responses=None):
    """Prompts (B, P) and responses (B, T) side by side, (B, P + T) int64."""
    parts = [prompts] if responses is None else [prompts, responses]
    vocab_size = len(model["embed"])
    for ids in parts:
        whole = ids.ndim == 2 and ids.dtype.kind in "iu" and len(ids) == len(prompts)
        if not whole or not ids.size or ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError("token ids must be (B, S) integers from 0 to V - 1")
    return np.concatenate([ids.astype(np.int64) for ids in parts], axis=1)


def last_positions(prompts, responses, mask):
    """(row, column) indices of the last real token of each row, (B,) each."""
    if mask.shape != responses.shape or not mask.any(axis=1).all():
        raise ValueError("responses, mask: shapes differ, or a row has no real token")
    from_the_end = (mask[:, ::-1] != 0).argmax(axis=1)  # (B, T) -> (B,)
    last = prompts.shape[1] + mask.shape[1] - 1 - from_the_end
    return np.arange(len(mask)), last


def backbone(model, tokens):
    """Hidden states of a causal model of one layer, (B, S) -> (B, S, D), and a cache.

    context[t] = sum(embed[x[0..t]]) / sqrt(t + 1), which is uniform attention
    hidden[t] = tanh(embed[x[t]] + context[t] @ context_proj)
    """
    x = model["embed"][tokens]  # (B, S) -> (B, S, D)
    context = uniform_attention(x) @ x  # (S, S) @ (B, S, D)
    hidden = np.tanh(x + context @ model["context_proj"])
    return hidden, (tokens, hidden, context)


def backbone_gradients(model, cache, d_states):
    """Gradients of embed and context_proj, from those of the last T states."""
    tokens, hidden, context = cache
    d_hidden = np.zeros_like(hidden)
    d_hidden[:, -d_states.shape[1] :] = d_states  # (B, T, D) -> (B, S, D)
    d_before = d_hidden * (1 - hidden**2)  # through tanh
    d_proj = np.einsum("bsd,bse->de", context, d_before, optimize=True)
    d_context = d_before @ model["context_proj"].T
    d_x = d_before + uniform_attention(hidden).T @ d_context
    d_embed = sum_by_token(tokens, d_x, len(model["embed"]))
    return {"embed": d_embed, "context_proj": d_proj}


def uniform_attention(x):
    """How position t of x (B, S, D) attends to s: 1 / sqrt(t + 1) up to t. (S, S)."""
    positions = np.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return np.tri(len(positions), dtype=x.dtype) / np.sqrt(positions)[:, None]


def predicting_states(model, prompts, responses):
    """The states that predict the response, (B, T, D), and the cache.

    Token t is predicted by the state at position P - 1 + t.
    """
    tokens = token_ids(model, prompts, responses)[:, :-1]  # the last predicts nothing
    hidden, cache = backbone(model, tokens)  # (B, P + T - 1, D)
    return hidden[:, prompts.shape[1] - 1 :], cache


def log_softmax(logits):
    """log(exp(logits) / Σ exp(logits)) over the last axis, without overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def sample_tokens(logits, rng):
    """Draw a token for each row of logits (B, V), and its log probability: (B,) each.

    It is the first one where the running sum of the probabilities reaches a random
    fraction of their total.
    """
    logprobs = log_softmax(logits)
    running = np.cumsum(np.exp(logprobs), axis=1, dtype=np.float64)
    fraction = 1 - rng.random(len(logits))  # above 0: p = 0 is never drawn
    tokens = (running >= fraction[:, None] * running[:, -1:]).argmax(axis=1)
    return tokens, np.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


def exact_kl(actor, reference, prompts, responses):
    """KL(actor || reference) at each position: Σ p log(p / q) over the vocabulary.

    prompts (B, P), responses (B, T). Returns (B, T) in nats; padding positions are
    not zeroed. No (B, T, V) array is ever in memory.
    """
    states, _ = predicting_states(actor, prompts, responses)  # (B, T, D)
    ref_states, _ = predicting_states(reference, prompts, responses)  # (B, T, D)
    kl = np.empty(responses.shape, dtype=states.dtype)
    for t in range(responses.shape[1]):
        log_p = log_softmax(states[:, t] @ actor["head"])  # (B, V)
        log_q = log_softmax(ref_states[:, t] @ reference["head"])  # (B, V)
        kl[:, t] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return kl


def forward_logprobs(model, prompts, responses):
    """Log probabilities of response tokens (B, T), and a cache for their gradients.

    logprob = state @ head[:, token] - log Σ exp(state @ head)

    The sum over the vocabulary is taken in slices, which saves memory and time: all
    logits at once would be (N, V), with N = B T.
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
    return chosen - log_sums, (cache, states, responses, log_sums)


def backward_logprobs(model, cache, d_logprobs):
    """Gradients of all weights, from d_logprobs = d loss / d logprobs (B, T).

    d logprob / d logits = one_hot(token) - softmax(logits)

    The part of softmax is taken in the same slices.
    """
    cache, states, responses, log_sums = cache
    head, flat = model["head"], states.reshape(-1, states.shape[2])  # (N, D)
    tokens, scale = responses.ravel(), d_logprobs.reshape(-1, 1)  # (N,), (N, 1)
    scaled = scale * flat  # (N, D)
    d_flat = scale * head.T[tokens]  # one_hot's part, (N, D)
    d_head = np.empty_like(head)
    for columns in vocabulary_slices(flat, head):
        softmax = flat @ head[:, columns]  # (N, D) -> (N, v)
        softmax -= log_sums.reshape(-1, 1)
        np.exp(softmax, out=softmax)
        d_flat -= scale * (softmax @ head[:, columns].T)  # (N, v) -> (N, D)
        d_head[:, columns] = -scaled.T @ softmax  # (D, N) @ (N, v)
    d_head += sum_by_token(tokens, scaled, head.shape[1]).T  # one_hot's part, (D, V)
    d_states = d_flat.reshape(states.shape)  # (N, D) -> (B, T, D)
    return {**backbone_gradients(model, cache, d_states), "head": d_head}


def sum_by_token(tokens, rows, vocab_size):
    """Add up the rows (..., D) of each token (...). Returns (V, D)."""
    width = rows.shape[-1]
    sums = np.zeros(vocab_size * width, dtype=rows.dtype)
    places = tokens[..., None].astype(np.int64) * width + np.arange(width)
    np.add.at(sums, places.ravel(), rows.ravel())  # much faster on flat arrays
    return sums.reshape(vocab_size, width)


def vocabulary_slices(states, head):
    """Slices of the vocabulary in which logits, states @ head, take at most 4 MB."""
    step = max(1, 1_000_000 // len(states))
    return [slice(first, first + step) for first in range(0, head.shape[1], step)]


# ---------------------------------------------------------------- 7. measuring

METRICS = {"score": "objective/scores", "human": "objective/human_scores"}
METRICS |= {"words": "val/words", "KL": "objective/kl"}  # what a training shows
LOST_WORDS = 0.7  # "Words are being lost" if less than this fraction of them is left
HUMAN_MARGIN, SCORE_MARGIN = 0.005, 0.02  # smaller changes are never called a change


def masked_mean(x, mask):
    """Mean over the real tokens; x must be 0 at padding. (..., B, T) -> (...)."""
    return x.sum(axis=(-2, -1)) / np.count_nonzero(mask)


def sample_step(policy, models, prompts, config, rng):
    """The first parts of a Step: responses of a policy, from which nobody learns."""
    length, eos_token = config.response_length, config.vocab_size - 1
    responses, mask, logprobs = generate(policy, prompts, length, rng, eos_token)
    scores = score_responses(models.reward_model, prompts, responses, mask)
    ref_logprobs = token_logprobs(models.reference, prompts, responses) * mask
    kl = kl_penalty(logprobs, ref_logprobs)
    return Step(prompts, responses, mask, logprobs, scores, ref_logprobs, kl)


def judge_stages(stages, config):
    """What the stages before the loop reached, on new responses: arrays by name.

    best_loss, in nats per token, is that of a model that knows all words by heart: if
    k words share a first letter, each has probability 1 / k. accuracy is the fraction
    of pairs whose chosen response scores higher (a tie counts half), and
    best_accuracy that of a scorer that knows the human's opinions: the choices are
    noisy.
    """
    rng, V = np.random.default_rng([config.seed, 5]), config.vocab_size
    letters, _, real = demonstrations(WORDS, config)
    alike = (letters == letters.T).sum(axis=1)  # (N, N) -> (N,)
    new = replace(config, preference_pairs=2048)
    prompts, responses, mask = texts = collect_preferences(stages.reference, new, rng)
    length = config.response_length
    before, *_ = generate(stages.untrained, prompts[:4], length, rng, V - 1)
    human = human_scores(*texts, V)
    scores = score_responses(stages.reward_model, *texts)
    lead, preference = (np.subtract(*np.split(x, 2)) for x in (scores, human))
    return {
        "fine_tuning/losses": stages.losses["fine_tuning"],
        "fine_tuning/best_loss": np.log(alike).sum() / real.sum(),
        "fine_tuning/before": before,
        "fine_tuning/count": len(letters),
        "fine_tuning/words": completes_word(*texts, config).mean(),
        "preferences/losses": stages.losses["preferences"],
        "preferences/prompts": prompts,
        "preferences/responses": responses,
        "preferences/mask": mask,
        "preferences/human": human,
        "preferences/scores": scores,
        "preferences/accuracy": np.heaviside(lead, 0.5).mean(),
        "preferences/best_accuracy": choice_probability(abs(preference)).mean(),
    }


@dataclass
class WalkThrough:
    """One Step, and what a reader wants to see besides."""

    step: Step
    estimates: dict  # k1, k2 and k3 of each token, (B, T) in nats
    exact_kl: np.ndarray  # (B, T) in nats
    new_logprobs: np.ndarray  # (B, T) of the actor after the update
    clipped: np.ndarray  # (epochs, B, T), True where the clip stopped the gradient
    costs: dict  # of step_costs


def walk_through(models, config):
    """Compute one step of core_loop. Returns a WalkThrough."""
    old_actor = {name: weights.copy() for name, weights in models.actor.items()}
    (step,) = core_loop(models, config)
    check_finite(models, step, 1)
    texts = step.prompts, step.responses
    logprobs = step.old_logprobs, step.ref_logprobs
    estimates = {name: kl_penalty(*logprobs, name) for name in ("k1", "k2", "k3")}
    exact = exact_kl(old_actor, models.reference, *texts) * step.mask
    new_logprobs = token_logprobs(models.actor, *texts) * step.mask
    clipped = is_clipped(step.ratio, step.loss_advantages, config.clip)
    costs = step_costs(models, config)
    return WalkThrough(step, estimates, exact, new_logprobs, clipped, costs)


def step_costs(models, config):
    """{model: passes forward, backward, bytes of weights, gradients, Adam's m and v}.

    A reward function has no weights, and is left out.
    """
    costs = {}
    for name, model in models._asdict().items():
        if isinstance(model, dict):
            updates = config.ppo_epochs if name in ("actor", "critic") else 0
            size = sum(model[weights].nbytes for weights in WEIGHTS)
            learned = size if updates else 0
            costs[name] = 1 + updates, updates, size, learned, 2 * learned
    return costs


def train(models, config, pairs=None):
    """Train for config.steps. Yields (metrics, Step) of each step.

    DPO samples nothing, so its Step holds new responses, from which it does not
    learn.
    """
    if config.method != "dpo":
        for number, step in enumerate(core_loop(models, config), 1):
            check_finite(models, step, number)
            yield step_metrics(step, config, number), step
        return
    rng = np.random.default_rng([config.seed, 6])
    for number, loss in enumerate(dpo_loop(models, pairs, config), 1):
        count, length = config.batch_size, config.prompt_length
        prompts = sample_prompts(rng, count, length, config.vocab_size)
        step = sample_step(models.actor, models, prompts, config, rng)
        step.actor_loss = np.array([loss])
        check_finite(models, step, number)
        metrics = {"loss/policy_avg": loss, "episode": number * count}
        yield text_metrics(step, config) | metrics, step


def check_finite(models, step, number):
    """Raises FloatingPointError if a loss is not finite, a weight is beyond 10^6, or
    every ratio of the last epoch is 0 or infinite."""
    learned = [*models.actor.values(), *(models.critic or {}).values()]
    sound = np.isfinite(step.actor_loss).all()  # the critic's follows its weights
    sound = sound and all((abs(w) < 1e6).all() for w in learned)
    if sound and step.ratio is not None:
        sound = not np.isin(step.ratio[-1][step.mask != 0], [0, np.inf]).all()
    if not sound:
        advice = "Lower --learning-rate, --beta or --drift."
        raise FloatingPointError(f"step {number} diverged. {advice}")


def text_metrics(step, config):
    """What responses are judged by, under TRL's names where it has one.

    Means over the batch of sums over a response.
    """
    ended = (step.responses == config.vocab_size - 1) & (step.mask != 0)
    k1 = kl_penalty(step.old_logprobs, step.ref_logprobs)  # whatever trains the actor
    score, kl = step.scores.mean(), k1.sum(axis=1).mean()
    metrics = {
        "objective/scores": score,
        "objective/kl": kl,
        "objective/entropy": -step.old_logprobs.sum(axis=1).mean(),
        "objective/non_score_reward": 0.0 - config.beta * kl,
        "objective/rlhf_reward": score - config.beta * kl,
        "val/num_eos_tokens": np.count_nonzero(ended),
        "val/response_length": np.count_nonzero(step.mask) / len(step.mask),
    }
    if config.uses_letters:
        texts = step.prompts, step.responses, step.mask
        human = human_scores(*texts, config.vocab_size)
        metrics["objective/human_scores"] = human.mean()
        metrics["val/words"] = completes_word(*texts, config).mean()
    return metrics


def step_metrics(step, config, number):
    """text_metrics of a Step, and means over its tokens and epochs."""
    mask, ratio = step.mask, step.ratio
    clipped = is_clipped(ratio, step.loss_advantages, config.clip)
    log_ratio = np.log(np.where(mask, np.maximum(ratio, 1e-37), 1))  # no log of 0
    metrics = text_metrics(step, config) | {
        "policy/approxkl_avg": 0.5 * masked_mean(log_ratio**2, mask).mean(),
        "policy/clipfrac_avg": masked_mean(clipped, mask).mean(),
        "loss/policy_avg": step.actor_loss.mean(),
        "val/ratio": masked_mean(ratio, mask).mean(),
        "lr": step.learning_rate,
        "episode": number * config.batch_size,
    }
    if config.method == "ppo":
        metrics["loss/value_avg"] = step.critic_loss.mean()
    return metrics


def window_means(values):
    """Starts, means and standard errors over windows of 1, 2, 4, 8, ... steps. The
    errors come from the differences between neighbouring steps."""
    starts = 2 ** np.arange(len(values).bit_length()) - 1
    sizes = np.diff([*starts, len(values)])
    std = np.sqrt(np.mean(np.diff(values) ** 2) / 2)  # of one step
    return starts, np.add.reduceat(values, starts) / sizes, std / np.sqrt(sizes)


def direction(values, least):
    """1 if the last window is clearly above the first, -1 if below, 0 if neither."""
    _, means, errors = window_means(values)
    change, noise = means[-1] - means[0], np.hypot(errors[0], errors[-1])
    return np.sign(change) if abs(change) > max(3 * noise, least) else 0


def verdict(history):
    """What a training on letters came to, in a few words."""
    human = direction(history["objective/human_scores"], HUMAN_MARGIN)
    score = direction(history["objective/scores"], SCORE_MARGIN)
    _, words, _ = window_means(history["val/words"])
    if score < 0:
        return "Training collapsed"
    if human < 0 < score:
        return "Reward hacking"
    if words[-1] < LOST_WORDS * words[0]:
        return "Words are being lost"
    return "Better liked, in words" if human > 0 else "No clear change"


def estimator_warning(config):
    """A sentence where the KL does not restrain the actor as it should, else ""."""
    name = config.kl_estimator
    if config.method == "dpo" or config.beta == 0:
        return ""
    if config.kl_in == "loss" and name == "k1":
        return "k1 in the loss restrains nothing: its expected gradient is 0."
    if config.kl_in == "reward" and name != "k1":
        return f"{name} in the reward restrains otherwise: its gradient is not KL's."
    return ""


def optimum(scores, leads, beta):
    """J_star for each prompt, the responses' weights, and the estimate's bias.

    J_star = β log E_reference[exp(score / β)]

    is the largest possible E[score] - β KL (Rafailov et al. 2023, equation 4). Half
    of the responses are the reference's and half the actor's, so the weight of each
    is exp(score / β) * reference / mixture. scores and leads = log p_actor - log
    p_reference are (prompts, responses). NaN at β 0, and if one response carries more
    than half of a prompt's weight. The bias is the jackknife's.
    """
    if not beta:
        return np.full(len(scores), np.nan), np.zeros_like(scores), np.nan
    logits, n = scores / beta - np.logaddexp(0, leads) + np.log(2), scores.shape[1]
    highest = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - highest)
    j_star = beta * (highest[:, 0] + np.log(weights.mean(axis=1)))
    weights = weights / weights.sum(axis=1, keepdims=True)
    if weights.max() > 0.5:
        return np.nan * j_star, weights, np.nan
    without_one = np.log1p(-weights) + np.log(n / (n - 1))  # log Z, one by one
    return j_star, weights, beta * (n - 1) * without_one.mean()


def theory(models, config, count=512):
    """How the actor does on count new responses to each letter, and how near it comes
    to the optimum: floats by name.

    J = score - β KL is the actor's, J_start the reference's, and share = (J -
    J_start) / (J_star - J_start), NaN if its denominator is less than three of its
    errors. Errors are standard errors by the delta method, J_star's plus the bias.
    """
    rng = np.random.default_rng([config.seed, 3])
    prompts = np.repeat(np.arange(config.vocab_size - 1)[:, None], count, axis=0)
    start = sample_step(models.reference, models, prompts, config, rng)
    end = sample_step(models.actor, models, prompts, config, rng)
    by_actor = token_logprobs(models.actor, prompts, start.responses) * start.mask
    sums = (by_actor - start.ref_logprobs).sum(axis=1), end.kl.sum(axis=1)
    arrays = start.scores, end.scores, *sums
    by_prompt = [np.float64(x).reshape(-1, count) for x in arrays]  # (prompts, count)
    j_start, scores, lead_start, kl = by_prompt
    j, leads = scores - config.beta * kl, np.hstack([lead_start, kl])
    best, weights, bias = optimum(np.hstack([j_start, scores]), leads, config.beta)
    pull = np.split(config.beta * count * weights, 2, axis=1)  # of each on J_star

    def error(of_start, of_end):  # every prompt is there, so only responses vary
        variance = of_start.var(axis=1, ddof=1) + of_end.var(axis=1, ddof=1)
        return np.sqrt(variance.mean() / j.size)

    stake = best.mean() - j_start.mean()
    stake_error = error(pull[0] - j_start, pull[1]) + abs(bias)
    share = (j.mean() - j_start.mean()) / stake if stake > 3 * stake_error else np.nan
    rest = error((share - 1) * j_start - share * pull[0], j - share * pull[1])
    texts = prompts, end.responses, end.mask
    return {
        "score": scores.mean(),
        "human": human_scores(*texts, config.vocab_size).mean(),
        "words": completes_word(*texts, config).mean(),
        "kl": kl.mean(),
        "J_start": j_start.mean(),
        "J_start_error": error(j_start, 0 * j),
        "J": j.mean(),
        "J_error": error(0 * j, j),
        "J_star": best.mean(),
        "J_star_error": error(*pull) + abs(bias),
        "share": share,
        "share_error": (rest + abs(share * bias)) / stake,
    }


@dataclass
class Run:
    """A training: its metrics and two texts of each step, and what came of it."""

    config: Config
    label: str
    models: Models
    metrics: list
    texts: list
    theory: dict
    words: dict  # six texts of "reference" and "actor": prompts, responses, mask

    @property
    def history(self):
        """The metrics as arrays (steps,), NaN for steps that were not reached."""
        missing = [np.nan] * (self.config.steps - len(self.metrics))
        names = self.metrics[0] if self.metrics else ()
        return {n: np.array([m[n] for m in self.metrics] + missing) for n in names}


def six_words(models, config):
    """Responses of the reference and of the actor to the same six first letters."""
    words, prompts = {}, np.arange(0, 26, 5)[:, None]
    for name, model in ("reference", models.reference), ("actor", models.actor):
        rng = np.random.default_rng([config.seed, 4])
        step = sample_step(model, models, prompts, config, rng)
        words[name] = prompts, step.responses, step.mask
    return words


# ---------------------------------------------------------------- 8. the presentation

PICTURE = """\
  prompts ─► actor ─► responses ─┬─► reward model ─► score ────────┐
               ▲                 ├─► reference ─► KL to the actor ─┴► rewards ─┐
               │                 └─► critic ────► values ─────────► GAE ◄──────┘
               │                        ▲                            │
               └────── PPO update ──────┴─────────── advantages ◄────┘"""
PICTURE_OF_GROUPS = """\
  prompts ─► actor ─► responses ─┬─► reward model ─► score ────────┐
               ▲                 └─► reference ─► KL to the actor ─┴► rewards ─┐
               └─── update ◄──── advantages ◄── comparison in a group ◄────────┘"""
PICTURE_OF_DPO = """\
  chosen and ─┬─► reference ─► log probs ─┐
  rejected    └─► actor ─────► log probs ─┴► implicit rewards ─► DPO loss ─┐
  responses         ▲                                                      │
                    └───────────────────── update ◄────────────────────────┘"""
PICTURES = {
    PICTURE: "The critic learns to predict the reward to come.",
    PICTURE_OF_GROUPS: "There is no critic: responses to one prompt are compared.",
    PICTURE_OF_DPO: "DPO learns from pairs that the human compared, not from scores.",
}
PICTURE_OF = {"ppo": PICTURE, "dpo": PICTURE_OF_DPO}  # otherwise of groups
ASCII = str.maketrans("─►▲│└┘┐┬├┤┴◄●○△…·βγδλΣ±²", "->^|+++++++<ox*..bgdlS~2")
# Each colour has a contrast of at least 4.5 on black and on white.
MODELS = {"actor": "#088199", "critic": "#a347e5", "reward model": "#957000"}
MODELS |= {"reference": "#1870ec"}
GOOD, BAD, WARNING = "bold #0f8823", "bold #e12c2c", "bold #b85c00"
STYLES = {"question": "bold italic", "note": "#757575"}
STYLES |= {"word": GOOD, "string": "italic underline #e12c2c"}
VERDICTS = {"Better liked, in words": GOOD, "Words are being lost": WARNING}
VERDICTS |= {"Reward hacking": BAD, "Training collapsed": BAD}  # others are bold
MARKS = "●○△#+x%&"
COLOURS = "#c525d3 #697e00 #765eed #657697 #bf5622 #cf4064 #4a8321 #757575".split()
BLACK = TerminalTheme((0, 0, 0), (217, 217, 217), [(0, 0, 0)] * 8)


def make_console(**options):
    """A console of 80 columns, with the styles above."""
    options |= {"width": 80, "soft_wrap": True, "highlight": False, "markup": False}
    return Console(emoji=False, theme=Theme(MODELS | STYLES), **options)


def with_names(text, style=""):
    """A text with the name of each model in the model's colour."""
    text = Text(text, style)
    for name in MODELS:
        text.highlight_regex(rf"(?i)\b{name}\b", name)
    return text


def page(heading, *parts):
    """A title, then lines (tuples: label, figure, note), paragraphs (strings) and more.

    A paragraph that ends with a question mark is a question: --pause asks it first.
    """
    shown = [with_names(heading, "bold")]
    shown[0].stylize("reverse", 0, heading.find(":") + 1)
    for part in parts:
        if isinstance(part, str):
            lines = textwrap.fill(" ".join(part.split()), 76)
            style = "question" if lines.endswith("?") else ""
            part = with_names(textwrap.indent(lines, "    "), style)
        elif isinstance(part, tuple):
            label, figure, note = (*part, "", "")[:3]
            part = Text.assemble("  ", label, (str(figure), "bold"))
            part.pad_right(max(38 - len(part), 2) if note else 0)
            part.append(note, "note")
        shown.append(part)
    return Group(*shown)


def table(columns, left=1, gap=2):
    """Rich's table of {head: cells}; the first columns are aligned to the left."""
    grid = Table(box=None, padding=(0, 0, 0, gap), header_style="")
    for number, head in enumerate(columns):
        justify = "left" if number < left else "right"
        grid.add_column(with_names(head), justify=justify, overflow="fold")
    for row in zip(*columns.values()):
        grid.add_row(*[x if isinstance(x, Text) else with_names(str(x)) for x in row])
    return grid


def fixed(value, digits=2, error=None):
    """A number with these decimals, never a negative zero; a dash for NaN."""
    form = f".{digits}f" if abs(value) < 1e5 else ".1g"
    text = f"{round(float(value), digits) + 0.0:{form}}"
    text += "" if error is None else f" ± {error:.{digits}f}"
    return "-" if np.isnan(value) else text


def listed(values, most=4, digits=2):
    """As in [0.73, 0.45, 0.91, …, 0.62]; token ids have no decimals."""
    texts = [str(x) if isinstance(x, Integral) else fixed(x, digits) for x in values]
    if len(texts) > most:
        texts[most - 1 : -1] = ["…"]
    return f"[{', '.join(texts)}]"


def preview(array, mask):
    """An array's shape, the first response's values, and the mean over all tokens."""
    values = listed(array[0][mask[0] != 0], 3)
    return array.shape, f"{values} mean {fixed(masked_mean(array, mask), 3)}"


def texts_of(prompts, responses, config, most=17):
    """Responses as words, which begin with the prompt, or as lists of token ids."""
    if not config.uses_letters:
        return [listed(row, 3) for row in responses]
    rows = np.concatenate([prompts, responses], axis=1)
    words = ["".join(LETTERS[token] for token in row).partition(".") for row in rows]
    return [w + dot if len(w) <= most else w[:most] + "…" for w, dot, _ in words]


def words_line(label, texts, config, most=8):
    """Responses side by side: real words in one style, other strings in another."""
    line, real = Text(label), [None] * len(texts[0])
    if config.uses_letters:
        real = completes_word(*texts, config)
    for text, known in zip(texts_of(*texts[:2], config, most), real):
        line.append(text, {None: "", True: "word", False: "string"}[known])
        line.append(" " * (most + 2 - len(text)))
    return line


def unit_of(config):
    """The unit of memory for models of this size, in bytes."""
    return ("MB", 1e6) if config.vocab_size > 1000 else ("kB", 1e3)


def fall(losses):
    """How a loss fell, and what its two figures are."""
    means = f"{losses[0]:.2f} -> {losses[-20:].mean():.2f}"
    return means, "first update -> mean of the last 20"


def opening_page(heading, configs):
    """What takes part, for each method."""
    config, methods = configs[0], [config.method for config in configs]
    pictures = dict.fromkeys(PICTURE_OF.get(m, PICTURE_OF_GROUPS) for m in methods)
    scorer = "human's rule" if config.reward == "human" else "reward model"
    shown = [with_names(text.replace("reward model", scorer)) for text in pictures]
    says = f"""All weights are random here: the numbers are real, but the text means nothing.
        Tokens are numbers from 0 to {config.vocab_size - 1}. --preset letters uses real words."""
    if config.uses_letters:
        says = """A prompt is the first letter of a word, the response is the rest, and a full stop
            ends it. Each letter is a token."""
    if config.kl_in == "loss":
        says += " Here the KL to the actor counts in the update, not in the rewards."
    if config.steps > 1:
        says += " A step is one batch. β is the price of KL, of moving away from the reference."
    return page(
        f"=== {heading} ===",
        *shown,
        f"""RLHF is reinforcement learning from human feedback, PPO proximal policy optimization.
        The actor writes responses and learns. The {scorer} scores them. The reference is the
        actor as it was before this training. It is frozen, as is the {scorer}: no step changes it.
        {" ".join(map(PICTURES.get, pictures))} {says}""",
    )


def tuning_page(report, config):
    """Stage 1: what fine-tuning reached."""
    best, real = report["fine_tuning/best_loss"], report["fine_tuning/words"]
    losses, before = report["fine_tuning/losses"], report["fine_tuning/before"]
    names = "preferences/prompts", "preferences/responses", "preferences/mask"
    after = [report[name][:5] for name in names]
    untrained = after[0][:4], before, np.cumsum(before == 26, axis=1) <= 1
    return page(
        "Stage 1: Supervised fine-tuning (Reference)",
        ("Words to learn from: ", report["fine_tuning/count"], "written by a human"),
        ("Loss: ", *fall(losses)),
        ("Best possible loss: ", fixed(best), "nats per token"),
        ("Listed words: ", f"{real:.1%}", "of the 4096 words that it wrote after"),
        words_line("  Before: ", untrained, config, 12),
        words_line("  After:  ", after, config, 12),
        """The loss is the mean of -log p of each next token, in nats (natural logarithms). It
        cannot reach 0, because several words share a first letter. This model is now the
        reference, and the actor is made from a copy of it.""",
        "Why learn from examples first?",
        """The actor will learn only from what it happens to write. Before this stage that was
        almost never a word.""",
    )


def choices_page(report, config):
    """Stage 2: what the reward model learned."""
    seen = {name.partition("/")[2]: x for name, x in report.items() if "pref" in name}
    words = texts_of(seen["prompts"], seen["responses"], config)
    pairs, right = len(words) // 2, seen["accuracy"]
    error = (right * (1 - right) / pairs) ** 0.5
    best = f"{seen['best_accuracy']:.1%} for one who knows the ratings"
    differ = [row for row in range(pairs) if words[row] != words[row + pairs]]
    rows = [row + other for row in differ[:3] for other in (0, pairs)]
    columns = {"": ["chosen", "rejected"] * 3, "word": [words[row] for row in rows]}
    for head, name in ("human", "human"), ("score", "scores"):
        columns[head] = [fixed(seen[name][row]) for row in rows]
    return page(
        "Stage 2: Learning from a human's choices (Reward Model)",
        ("Preference pairs: ", config.preference_pairs, "one of two is chosen"),
        ("Loss: ", *fall(seen["losses"])),
        ("Correct on new pairs: ", f"{right:.1%} ± {error:.1%}", best),
        table(columns, left=2),
        """The loss is -log sigmoid(score of chosen - score of rejected); a coin toss has 0.69, and
        random scores have more. The human is simulated: they rate a word from 0 to 1, highest if
        it has as many vowels as consonants and repeats no letter. They often choose the word with
        the higher rating, but not always, so no scorer can predict every choice. ± is one standard
        error.""",
        "What does the reward model see of the ratings?",
        """It never sees a rating, only which of two words was preferred. Its scores are then
        scaled to mean 0 and standard deviation 1. It is frozen from now on, and it is unreliable
        for texts that are unlike these words.""",
    )


def prompts_page(seen, config):
    """The page of step 1: prompts."""
    prompts, times = seen.step.prompts, config.group_size
    first, *_ = texts_of(prompts[:, :0], prompts, config)
    grouped = f"{len(prompts) // times} prompts, {times} responses to each"
    return page(
        "Step 1: Sample prompts",
        ("Batch size: ", len(prompts), "" if config.method == "ppo" else grouped),
        ("Prompt shapes: ", f"{prompts.shape} tokens", f"the first: {first}"),
        "Why only prompts, and no answers?",
        """The actor writes the answers itself, in step 2. It learns from its own attempts, not
        from examples.""",
    )


def responses_page(seen, config):
    """The page of step 2: responses."""
    step, mask, V, D = seen.step, seen.step.mask, config.vocab_size, config.width
    (B, T), P = mask.shape, config.prompt_length
    first, *_ = texts_of(step.prompts, step.responses, config)
    ended = int(((step.responses == V - 1) & (mask != 0)).any(axis=1).sum())
    unit, scale = unit_of(config)
    widest = "would be the step's largest tensor, so they" * (V * T > D * (P + T))
    return page(
        "Step 2: Generate responses (Actor)",
        ("Actor forward pass...",),
        ("Generated tokens: ", mask.shape, f"the first: {first}"),
        (
            "Actor logits: ",
            (B, T, V),
            f"{4 * B * T * V / scale:.1f} {unit} if all were kept",
        ),
        ("Old log probs: ", *preview(step.old_logprobs, mask)),
        f"""A forward pass gives each of the {V} tokens a number at each position, its logit.
        Softmax turns the logits into probabilities, and one token is sampled. The log of its
        probability is kept; it would be {-np.log(V):.2f} if all tokens were equally likely. Lists
        show the first response's first tokens and its last one; means leave padding out. The
        logits {widest} are kept for one position at a time. {ended} of {B} responses ended with
        the end token; {B - ended} were cut off after {T} tokens and are scored as they are.""",
        'Why are log probs "old"?',
        """They belong to the actor that wrote the responses. Step 7 changes the actor and compares
        its new log probs with these, which are held fixed.""",
    )


def scores_page(seen, config):
    """The page of step 3: scores."""
    owner, line = (
        "Reward Model",
        ("Reward model forward pass...", "", "its weights are random"),
    )
    why = "A trained reward model has learned from choices between whole responses"
    if config.uses_letters:
        line = "Reward model forward pass...", "", "trained in stage 2"
    if config.reward == "human":
        owner, line = "Human's Rule", ("The human's rule is applied...",)
        why = "The human rates whole words"
    return page(
        f"Step 3: Score responses ({owner})",
        line,
        ("Scores: ", listed(seen.step.scores)),
        "A score says how much a response should be liked: the higher, the better.",
        "Why one number for a whole response?",
        f"{why}, so a score is for a whole response, too.",
    )


def kl_page(seen, config):
    """The page of step 4: KL."""
    step, mask, V = seen.step, seen.step.mask, config.vocab_size
    means = {name: masked_mean(x, mask) for name, x in seen.estimates.items()}
    means["exact"] = masked_mean(seen.exact_kl, mask)
    formulas = ["log p_actor - log p_reference", "k1² / 2", "exp(-k1) - 1 + k1"]
    formulas.append(f"Σ p log(p / q), {V} tokens")
    columns = {"estimator": means, "formula": formulas}
    columns["mean"] = [fixed(mean, 3) for mean in means.values()]
    negative = masked_mean(seen.estimates["k1"] < -1e-5, mask)
    by, first = f"nats per token, by {config.kl_estimator}", step.kl[0][mask[0] != 0]
    return page(
        "Step 4: Compute KL penalty (Reference)",
        ("Reference forward pass...",),
        ("Reference log probs: ", *preview(step.ref_logprobs, mask)),
        ("KL divergence per token: ", mask.shape, listed(first, 3)),
        ("Mean KL: ", fixed(masked_mean(step.kl, mask), 3), by),
        f"""The KL divergence says how far the actor's probabilities p are from the reference's q.
        It is 0 if they are equal, as at the start of a training; here --drift has added
        {config.start_drift:g} times random weights to the actor's. k1, k2 and k3 estimate it from
        the sampled token alone, because the exact sum needs all {V} probabilities of both.""",
        table(columns, left=2),
        "Why can an estimate of the KL be negative?",
        f"""k1 is negative where the reference finds the sampled token likelier than the actor
        does, here on {negative:.0%} of the tokens. Over many tokens it averages to the KL, which
        is never negative.""",
    )


def rewards_page(seen, config):
    """The page of step 5: rewards."""
    step, beta = seen.step, config.beta
    passes = "passes it back" if config.method == "ppo" else "gives its advantage"
    formula = "reward = reward_model_score - β * KL"
    totals, score = step.rewards.sum(axis=1), fixed(step.scores[0], 3)
    tokens = listed(step.rewards[0][step.mask[0] != 0])
    kl, total = fixed(step.kl[0].sum(), 3 + len(f"{beta:.0f}")), fixed(totals[0], 3)
    says = f"""A reward model can be trusted only near the texts that it learned from. So moving
        away from the reference has a price: β = {beta:g} points of score per nat. The first
        response's total is its score minus β times the KL of all its tokens:
        {score} - {beta:g} * {kl} = {total}. Token by token, its rewards are {tokens}: each token
        pays β times its own KL, and the last one also gets the score."""
    if config.kl_in == "loss":
        formula = "reward = reward_model_score"
        says = f"""With --kl-in loss the rewards are the scores alone; β = {beta:g} times the KL is
            a part of the loss in step 7. Token by token, the first response's rewards are
            {tokens}."""
    if config.reward == "human":
        formula = formula.replace("reward_model", "human")
    return page(
        "Step 5: Compute total rewards",
        (formula,),
        ("Total rewards: ", listed(totals)),
        says,
        "Why does the score stand on the last token?",
        f"""It judges the whole response, so it is paid where the response ends. Step 6
        {passes} to the earlier tokens.""",
    )


def advantages_page(seen, config):
    """The page of step 6: advantages."""
    step, mask, group = seen.step, seen.step.mask, config.group_size
    advantages = preview(step.advantages, mask)
    whitened = [("Whitened: ", *preview(step.loss_advantages, mask))]
    std = step.advantages[mask != 0].std(ddof=min(1, np.count_nonzero(mask) - 1))
    scaled = f"""Whitening subtracts the advantages' mean and divides by their standard deviation,
        {fixed(std, 3)}, so that the size of the update does not depend on the rewards' scale."""
    expected = "what the critic predicted"
    if config.method == "ppo":
        heading, gamma, lam = "Critic + GAE", f"{config.gamma:g}", f"{config.lam:g}"
        values = preview(step.values, mask)
        lines = [("Critic forward pass...",), ("Values: ", *values)]
        lines += [("GAE advantages: ", *advantages), *whitened]
        says = """Before each token the critic predicts the reward to come: the value, which is the
            baseline. A token's advantage says how much better than that it went. Generalized
            advantage estimation (GAE) goes from the last token, after which value and advantage
            are 0, to the first. γ discounts later rewards (1: not at all). λ sets how far back a
            surprise δ is passed (0: not at all, 1: to the first token). The return is the reward
            to come as it now looks:"""
        check = [
            ("    δ[t] = reward[t] + γ value[t+1] - value[t]",),
            (
                f"    advantage[t] = δ[t] + γ λ advantage[t+1], γ = {gamma}, λ = {lam}",
            ),
            ("    return[t] = advantage[t] + value[t], the critic's target",),
        ]
    else:
        heading, expected = (
            f"{config.method.upper()}, no critic",
            "what its group got",
        )
        formula = "R - mean of the others' R"
        lines = [("Group advantages: ", *advantages), *whitened]
        if config.method == "grpo":
            formula = f"(R - mean) / std, where std has the divisor {group - 1}"
            lines = lines[:1]
            scaled = "The division scales the advantages, so they are not whitened."
        says = f"""R is the total reward of a response. The responses to the same prompt serve as
            the baseline: each advantage is {formula}, and all tokens of a response have the same.
            For the first prompt:"""
        check = [
            ("    R:          ", listed(step.rewards.sum(axis=1)[:group], digits=5)),
            ("    advantages: ", listed(step.advantages[:group, 0])),
        ]
    return page(
        f"Step 6: Compute advantages ({heading})",
        *lines,
        says,
        *check,
        scaled,
        "Why advantages, and not the rewards themselves?",
        f"""A high reward may still be below {expected}. Only the difference tells the actor what
        to do more often.""",
    )


def update_page(seen, config):
    """The page of step 7: the update."""
    step, real = seen.step, seen.step.mask != 0
    low, high = f"{1 - config.clip:g}", f"{1 + config.clip:g}"
    epochs = np.arange(len(step.ratio))
    epochs = epochs if len(epochs) <= 4 else epochs[[0, 1, -2, -1]]
    ratios, clipped = step.ratio[epochs][:, real], seen.clipped[epochs][:, real]
    columns = {"epoch": [str(epoch + 1) for epoch in epochs]}
    columns["ratio"] = [f"{ratio.min():.3f} .. {ratio.max():.3f}" for ratio in ratios]
    columns["clipped"] = [f"{fraction:.1%}" for fraction in clipped.mean(axis=1)]
    heading = (
        "PPO update" if config.method == "ppo" else "Update with PPO's clipped loss"
    )
    formula, also, gradient = (
        "mean of -min(ratio * A, clipped ratio * A)",
        "",
        "gradient",
    )
    if config.kl_in == "loss":
        formula = f"the clipped loss plus β * mean {config.kl_estimator}"
        also, gradient = (
            f", plus β times the mean {config.kl_estimator}",
            "clipped gradient",
        )
    lines = []
    formulas = {"Actor": formula, "Critic": "mean of (value - return)^2"}
    for owner, losses in ("Actor", step.actor_loss), ("Critic", step.critic_loss):
        if losses.size:  # rloo and grpo have no critic
            columns[f"{owner.lower()} loss"] = [fixed(x, 4) for x in losses[epochs]]
            lines.append((f"{owner} loss: ", fixed(losses[-1], 3), formulas[owner]))
    which = "group" if config.method == "grpo" else "whitened"
    return page(
        f"Step 7: {heading}",
        ("Ratio = exp(new_log_prob - old_log_prob)",),
        (f"Clipped ratio: clip(ratio, {low}, {high})",),
        table(columns),
        *lines,
        f"""A is a token's {which} advantage. Each epoch is an update on the whole batch, and its
        row is from before the update.""",
        "Why is the ratio 1 in the first epoch, and what is learned then?",
        f"""The actor still is the one that wrote the responses. The loss is minus the mean of
        A{also}. Its gradient is not 0: raising a ratio with A > 0 lowers the loss.""",
        "Why is the ratio clipped?",
        f"""Above {high} where A > 0, and below {low} where A < 0, a token's {gradient} is 0, so it
        pushes its ratio no further, though others may. clipped is the fraction of such tokens.""",
        Text(""),
        ("Update complete!",),
    )


def effect_page(seen, config):
    """What the update did to the first four responses, and what the step cost."""
    step, count = seen.step, len(seen.step.mask)
    before, after = step.old_logprobs.sum(axis=1), seen.new_logprobs.sum(axis=1)
    means = step.loss_advantages.sum(axis=1) / np.count_nonzero(step.mask, axis=1)
    followed = int((np.sign(means) == np.sign(after - before)).sum())
    columns = {"response": texts_of(step.prompts[:4], step.responses[:4], config, 10)}
    columns["total reward"] = map(fixed, step.rewards.sum(axis=1))
    columns["mean A"] = map(fixed, means)
    sums = {"log prob": before, "after": after, "change": after - before}
    columns |= {head: [fixed(x, 3) for x in values] for head, values in sums.items()}
    unit, scale = unit_of(config)
    forward, backward, *sizes = zip(*seen.costs.values())
    costs = {"model": [name.replace("_", " ") for name in seen.costs]}
    costs |= {"passes forward": forward, "backward": backward}
    for head, values in zip(("weights", "gradients", "Adam's m and v"), sizes):
        costs[f"{head}, {unit}"] = [fixed(x / scale, 1) for x in values]
    return page(
        "What the update did: the first four responses",
        table(columns),
        "Did the responses move the right way?",
        f"""log prob is that of the whole response, before and after the update, and mean A the
        average per token of the advantage that the loss uses. A response with a
        positive one should become more likely, with a negative one less: {followed} of {count}
        moved so.
        All responses share the same weights, so some move the other way.""",
        table(costs),
        """This is what the step cost: one pass to generate (a whole response counts as one), score
        or predict, then one per epoch to learn. What learns also needs gradients g, and running
        means m of g and v of g² for Adam, the optimizer. The others are frozen.""",
    )


def response_page(seen, config, row):
    """One response token by token, so that every formula can be checked by hand."""
    step, real = seen.step, seen.step.mask[row] != 0
    tokens = step.responses[row, real]
    columns = {"t": np.flatnonzero(real), "token": tokens}
    if config.uses_letters:
        columns["token"] = [LETTERS[token] for token in tokens]
    arrays = {"actor": (step.old_logprobs, 4), "reference": (step.ref_logprobs, 4)}
    arrays |= {"KL": (step.kl, 3), "reward": (step.rewards, 3)}
    arrays |= {"value": (step.values, 4), "advantage": (step.advantages, 2)}
    if config.method != "grpo":  # there A is the advantage itself
        arrays["A"] = step.loss_advantages, 2
    for head, (array, digits) in arrays.items():
        if array is not None:
            columns[head] = [fixed(x, digits) for x in array[row, real]]
    ratios = zip(step.ratio[-1, row, real], seen.clipped[-1, row, real])
    columns["ratio"] = [fixed(r) + "*" * bool(stopped) for r, stopped in ratios]
    text = texts_of(step.prompts, step.responses, config)[row]
    return page(
        f"Response {row}: {text}, score {fixed(step.scores[row], 3)}",
        table(columns, left=0, gap=1),
        """actor and reference are log probs; A is the advantage that the loss uses, whitened. The
        ratio is from before the last update, and * marks a clipped one.""",
    )


def training_page(run, number):
    """A training, a row for each window of steps."""
    config, history = run.config, run.history
    starts, _, _ = window_means(history["objective/kl"])
    ends = [*starts[1:], config.steps]
    columns = {"step": [f"{a}-{b}" for a, b in zip(starts + 1, ends)]}
    for head, name in METRICS.items():
        if name in history:
            columns[head] = [fixed(mean) for mean in window_means(history[name])[1]]
    scorer = "human's rule" if config.reward == "human" else "reward model"
    about = f"""Each row is a mean over the steps in its first column; the two responses are from
        the last of these. score is by the {scorer}, KL in nats per response."""
    if config.uses_letters:
        about += """ human is the human's opinion, from 0 to 1, and words the fraction of responses
            that are in the training list."""
    if config.method == "dpo":
        std = float(run.models.reward_model["score_std"][0])
        about += f""" DPO learns from pairs, not from these responses. Its β is {config.beta:g}
            times {std:.2f}, by which the scores were divided."""
    else:
        clipped = window_means(history["policy/clipfrac_avg"])[1]
        columns["clipped"] = [f"{fraction:.1%}" for fraction in clipped]
        about += " clipped is the fraction of tokens whose gradient PPO's clip stops."
    texts = [words_line("", run.texts[end - 1], config) for end in ends]
    columns["two responses"] = texts
    heading = Text(
        f"=== RLHF Training, {run.label} ===", f"bold {COLOURS[number % 8]}"
    )
    about += f" {estimator_warning(config)}"
    return Group(heading, *page("", about, table(columns)).renderables[1:])


def chart_page(runs, width=60, height=10):
    """The human's opinion over KL, in each run's mark and colour."""
    points, legend = [], []
    for number, run in enumerate(runs):
        look = MARKS[number % 8], COLOURS[number % 8]
        parts = min(60, run.config.steps)  # means over these, against noise
        kl = [x.mean() for x in np.array_split(run.history["objective/kl"], parts)]
        opinions = np.array_split(run.history["objective/human_scores"], parts)
        human = [x.mean() for x in opinions]
        first = (run.history[METRICS[name]][0] for name in ("KL", "human"))
        start = *first, ("S", "bold")
        points = [*zip(kl, human, [look] * parts), *points, start]
        legend += [Text(" " * 10)] if number % 3 == 0 else []
        legend[-1].append(f"{look[0]} {run.label:<20}", look[1])
    far, low = max(x for x, *_ in points), min(y for _, y, _ in points)
    high = max(y for _, y, _ in points)
    grid = [[(" ", "")] * width for _ in range(height)]
    for x, y, look in points:  # the starts come last
        column = round((max(x, 0) / (far or 1)) ** 0.5 * (width - 1))
        grid[round((high - y) / (high - low or 1) * (height - 1))][column] = look
    labels = [fixed(high), *[""] * (height - 2), fixed(low)]
    return page(
        "The human's opinion over KL: from the first step (S) to the last",
        Text("   human, 0 to 1; each mark is a mean over a sixtieth of the training"),
        *[Text.assemble(f"  {y:>6} │", *cells) for y, cells in zip(labels, grid)],
        Text("         └" + "─" * width),
        Text(
            f"{'':10}KL in nats per response, 0 to {far:.1f} on a square-root scale"
        ),
        *legend,
    )


def outcome_page(runs):
    """What the trainings came to, in words."""
    config, lines, hacked = runs[0].config, [], {}
    width = max(len(run.label) for run in runs) + 4
    most = (80 - width) // 6 - 2  # letters of each of the six words
    free = ""
    if any(run.config.beta == 0 for run in runs):
        free = "; at β 0 it is free, and the actor finds strings that the reward model overrates"
    for number, run in enumerate(runs):
        said, history = verdict(run.history), run.history
        human = window_means(history["objective/human_scores"])[1]
        words = [fixed(x) for x in window_means(history["val/words"])[1]]
        figures = f": human {fixed(human[0])}, best {fixed(max(human))}, "
        figures += f"end {fixed(human[-1])}; words {words[0]} to {words[-1]}"
        label = f"  {run.label}".ljust(width), f"bold {COLOURS[number % 8]}"
        words_of = words_line("", run.words["actor"], config, most)
        lines.append(Text.assemble(label, words_of))
        style = VERDICTS.get(said, "bold")
        lines.append(Text.assemble("    ", (said, style), figures))
        hacked.setdefault(run.config.reward, set()).add(said == "Reward hacking")
    if True in hacked.get("learned", ()) and hacked.get("human") == {False}:
        lines.append("""With the human's rule as the reward, the human's opinion stays high. So the
            hacking comes from the mistakes of the learned reward model.""")
    return page(
        "What came of it: six words from the same first letters",
        f"""The reference writes words, and each actor started from it. Words of the training
        list are bold and green, other strings red and underlined. β is the price of moving away
        from the reference{free}. human is the human's opinion, from 0 to 1: at first, at its best
        and at the end. words is the fraction of responses in the training list. Reward hacking
        means that the score rose and the human's opinion fell below its start.""",
        words_line(
            "  reference".ljust(width), runs[0].words["reference"], config, most
        ),
        *lines,
    )


def optimum_page(runs):
    """Fresh responses, and how near each actor comes to the best possible."""
    labels = [Text(r.label, f"bold {COLOURS[n % 8]}") for n, r in enumerate(runs)]
    means, best = {"fresh responses": labels}, {"": labels}
    digits = {
        "score": 5,
        "KL": 5,
        "J": 4,
        "J_star": 4,
    }  # so that J and share work out
    for head in METRICS:
        values = [run.theory[head.lower()] for run in runs]
        means[head] = [fixed(value, digits.get(head, 3)) for value in values]
    best["J_start"] = [fixed(run.theory["J_start"], 4) for run in runs]
    for name in ("J", "J_star", "share"):
        results = [(run.theory[name], run.theory[f"{name}_error"]) for run in runs]
        best[name] = [
            fixed(value, digits.get(name, 3), error) for value, error in results
        ]
    return page(
        "How near to the best possible: measured on fresh responses",
        table(means),
        Text(""),
        table(best),
        """These are new responses, many more than in a row of a training. For experts: J = score -
        β * KL is what PPO and RLOO aim at. J_start is the reference's. J_star, the highest that
        any actor could reach, is estimated anew in each row. share is how much of the way was
        covered: (J - J_start) / (J_star - J_start). ± is one standard error. A dash means that a
        figure is too noisy to report; at β 0 nothing limits J, and there is no best. Compare J
        between rows of the same β and the same reward.""",
    )


# ---------------------------------------------------------------- 9. the command line

EXAMPLES = """examples:
  python rlhf_loop_pseudo.py --preset letters --only 6 --inspect 3
  python rlhf_loop_pseudo.py --preset letters --steps 200 --beta 0 0.05 0.2 1
  python rlhf_loop_pseudo.py --preset letters --steps 200 --method ppo grpo dpo"""
SEVERAL = "beta", "method", "reward"  # with several values, these are compared
STEP_PAGES = prompts_page, responses_page, scores_page, kl_page, rewards_page
STEP_PAGES += advantages_page, update_page


def flag(name):
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def refuse(wrong, sentence):
    """Raises ValueError with this sentence if something is wrong."""
    if wrong:
        raise ValueError(sentence)


def refuse_conflicts(config):
    """Raises ValueError if settings of a Config do not go together."""
    letters, dpo = config.uses_letters, config.method == "dpo"
    human, in_loss = config.reward == "human", config.kl_in == "loss"
    short = letters and config.response_length < 3  # no word fits
    rest = config.method in ("rloo", "grpo") and config.batch_size % config.group_size
    refuse(rest, "--batch-size must be a multiple of --group-size")
    refuse(
        letters and config.prompt_length > 1, "--prompt-length must be 1 with letters"
    )
    refuse(short, "--response-length must be at least 3 with letters")
    refuse(dpo and not letters, "--method dpo needs --preset letters, for its pairs")
    refuse(human and not letters, "--reward human needs --preset letters")
    refuse(dpo and config.steps == 1, "--method dpo needs --steps 2 or more")
    refuse(dpo and config.beta == 0, "--method dpo needs a --beta above 0")
    refuse(dpo and in_loss, "--kl-in loss has no effect with dpo: leave it out")
    refuse(dpo and human, "--reward human has no effect with dpo: leave it out")


def refuse_without_effect(given, configs):
    """Raises ValueError if a flag that was given would have no effect, or cannot work."""
    config, methods = configs[0], {config.method for config in configs}
    walk, terminal = config.steps == 1, sys.stdin is not None and sys.stdin.isatty()
    row_exists = 0 <= given.get("inspect", 0) < config.batch_size
    works = {
        "gamma": ("ppo" in methods, "needs --method ppo"),
        "lam": ("ppo" in methods, "needs --method ppo"),
        "group_size": (methods & {"rloo", "grpo"}, "needs --method rloo or grpo"),
        "preference_pairs": (config.uses_letters, "needs --preset letters"),
        "only": (walk, "works in the walk-through: leave out --steps"),
        "inspect": (walk and row_exists, "needs a row of the batch, and no --steps"),
        "pause": (terminal, "needs a terminal, where you can press Enter"),
        "theme": ("export" in given, "needs --export"),
    }
    for name in "kl_estimator kl_in clip ppo_epochs learning_rate reward".split():
        works[name] = methods != {"dpo"}, "has no effect with dpo: leave it out"
    for name, (effect, what_to_do) in works.items():
        refuse(name in given and not effect, f"{flag(name)} {what_to_do}")
    for name in SEVERAL:
        values = given.get(name, [])
        refuse(
            len(values) > 1 and walk, f"{flag(name)}: several need --steps 2 or more"
        )
        refuse(len(set(values)) < len(values), f"{flag(name)}: give each value once")


def output_file(*endings):
    """A type for argparse: the path of a file that can be written."""

    def path(text):
        place = Path(text)
        try:
            folder = place.parent.is_dir() and os.access(
                place.parent, os.W_OK | os.X_OK
            )
            free = not place.exists() or (
                place.is_file() and os.access(place, os.W_OK)
            )
        except OSError:  # the name is too long, for instance
            folder = free = False
        if not folder or not free or place.suffix not in endings:
            kinds = " or ".join(endings)
            raise argparse.ArgumentTypeError(
                f"{text} must be a {kinds} file in a folder where you can write"
            )
        return place

    return path


def make_parser():
    """The flags: one for each field of Config, and those of what is shown and saved."""
    parser = argparse.ArgumentParser("rlhf_loop_pseudo.py", "%(prog)s [flags]")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = __doc__.splitlines()[0], EXAMPLES
    names = "sizes", "algorithm", "output"
    groups = {name: parser.add_argument_group(name) for name in names}
    groups[
        "algorithm"
    ].description = "Several betas, methods or rewards are compared."
    groups["sizes"].add_argument(
        "--preset", choices=PRESETS, help="defaults; in brackets: those of gpt2"
    )
    for item in fields(Config):
        default = "0 in a training" if item.default is None else item.default
        options = {"type": item.type, "help": f"{item.metadata['help']} ({default})"}
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[item.type]
        options["nargs"] = "+" if item.name in SEVERAL else None
        groups[item.metadata["group"]].add_argument(flag(item.name), **options)
    add, steps = groups["output"].add_argument, range(1, 8)
    add(
        "--only",
        type=int,
        nargs="+",
        choices=steps,
        metavar="N",
        help="show these steps",
    )
    add("--inspect", type=int, metavar="ROW", help="show a response token by token")
    add("--pause", action="store_const", const=True, help="wait at every page")
    add("--show", metavar="NAME", help="print a function, or Config, ready to paste")
    add(
        "--save", type=output_file(".npz"), metavar="FILE.npz", help="save the arrays"
    )
    pictures = output_file(".svg", ".html", ".txt")
    add(
        "--export",
        type=pictures,
        metavar="FILE",
        help="save the screen: .svg .html .txt",
    )
    add("--theme", choices=("dark", "light"), help="colours of the export (dark)")
    return parser


def read_command_line(argv):
    """What was given, and a Config for each combination; or exit with 2."""
    parser = make_parser()
    given = {k: x for k, x in vars(parser.parse_args(argv)).items() if x is not None}
    preset = "letters" if given.get("vocab_size") == len(LETTERS) else "gpt2"
    preset = given.get("preset", preset)
    settings = {k: x for k, x in given.items() if k in Config.__dataclass_fields__}
    lists = {name: settings.pop(name) for name in SEVERAL if name in settings}
    try:
        combinations = itertools.product(*lists.values())
        chosen = [dict(zip(lists, values)) for values in combinations]
        configs = [configure(preset, **settings, **several) for several in chosen]
        refuse_without_effect(given, configs)
        if "show" in given:
            refuse(len(given) > 1, "--show works alone")
            given["show"] = source_of(given["show"])
    except ValueError as problem:
        parser.error(str(problem))
    return given, configs


def defined_names(node):
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def source_of(name):
    """A function or class, or those of a step, with all that they need to run."""
    source, statements = inspect.getsource(sys.modules[__name__]), {}
    for node in ast.parse(source).body:
        for part in node.body if isinstance(node, ast.Try) else [node]:  # the imports
            for known in defined_names(part):
                statements.setdefault(known, []).append(part)
    own = {
        n: x for n, x in globals().items() if getattr(x, "__module__", "") == __name__
    }
    wanted = [n for n in own if n.lower() == name.lower()]
    wanted += [n for n, x in own.items() if str(x.__doc__).startswith(f"Step {name}")]
    refuse(
        not wanted, f"--show: no function is named {name}; try gae, or 6 for step 6"
    )
    call = ", ".join(inspect.signature(own[wanted[0]]).parameters)
    call, found = f"# {wanted[0]}({call})", set()
    while wanted:
        nodes = statements[wanted.pop()]
        used = {x.id for n in nodes for x in ast.walk(n) if isinstance(x, ast.Name)}
        found.update(nodes)
        wanted += [n for n in used & {*statements} if not found >= {*statements[n]}]
    parts, lines = [], source.splitlines()
    for node in sorted(found, key=lambda node: node.lineno):
        first = min(
            [node, *getattr(node, "decorator_list", [])], key=lambda x: x.lineno
        )
        parts.append("\n".join(lines[first.lineno - 1 : node.end_lineno]))
    return "\n\n\n".join(textwrap.dedent(part) for part in [*parts, call])


def walk_pages(given, config, arrays):
    """The walk-through; arrays gets what it computes."""
    only, stages = given.get("only", []), None
    if not only:
        yield opening_page("RLHF Training Loop Demo", [config])
    if config.uses_letters:
        stages = learn_from_human(config)
        arrays |= judge_stages(stages, config)
    if stages and not only:
        yield tuning_page(arrays, config)
        yield choices_page(arrays, config)
    seen = walk_through(prepare(config, stages), config)
    arrays |= {
        k: x for k, x in vars(seen.step).items() if x is not None
    } | seen.estimates
    arrays |= {k: vars(seen)[k] for k in ("exact_kl", "new_logprobs", "clipped")}
    for number in only or range(1, 8):
        yield STEP_PAGES[number - 1](seen, config)
    if "inspect" in given or (config.uses_letters and not only):
        yield response_page(seen, config, given.get("inspect", 0))
    if not only:
        yield effect_page(seen, config)


def training_pages(configs, arrays, runs):
    """The trainings; arrays gets what was before them, runs what each came to."""
    config, stages = configs[0], None
    yield opening_page("RLHF Training", configs)
    if config.uses_letters:
        stages = learn_from_human(config)
        arrays |= judge_stages(stages, config)
        yield tuning_page(arrays, config)
        yield choices_page(arrays, config)
    bar = Console(quiet=not sys.stdout.isatty())
    for number, config in enumerate(configs):
        label = f"β {config.beta:g}, {config.method}"
        label += ", human" * (config.reward == "human")
        models = prepare(config, stages)
        run = Run(config, label, models, [], [], {}, {})
        runs.append(run)
        steps = train(models, config, stages and stages.pairs)
        for metrics, step in track(
            steps, label, config.steps, console=bar, transient=True
        ):
            run.metrics.append(metrics)
            run.texts.append((step.prompts[:2], step.responses[:2], step.mask[:2]))
        if stages:
            run.theory, run.words = theory(models, config), six_words(models, config)
        yield training_page(run, number)
    if stages:
        yield chart_page(runs)
        yield outcome_page(runs)
        yield optimum_page(runs)


def saved(configs, arrays, runs):
    """What --save keeps, as bytes: all arrays and the settings, as JSON. Several runs
    have a row each, NaN where one has no such figure."""
    rows = [{}] * len(configs)
    for number, run in enumerate(runs):
        rows[number] = run.history | {f"theory/{k}": x for k, x in run.theory.items()}
        for owner, model in run.models._asdict().items():
            if isinstance(model, dict):
                rows[number] |= {f"models/{owner}/{k}": x for k, x in model.items()}
    arrays = dict(arrays)
    for name in {name: None for row in rows for name in row}:
        values = np.broadcast_arrays(*[row.get(name, np.nan) for row in rows])
        arrays[name] = np.stack(values) if len(rows) > 1 else values[0]
    settings = {k: [vars(config)[k] for config in configs] for k in vars(configs[0])}
    for name, values in settings.items():
        settings[name] = values if len(set(values)) > 1 else values[0]
    data = io.BytesIO()
    np.savez(data, config=json.dumps(settings), **arrays)
    return data.getvalue()


def exported(path, theme, pages):
    """What was shown, as the bytes of a file of path's kind."""
    console = make_console(record=True, file=io.StringIO(), force_terminal=True)
    for shown in pages:
        console.print(shown, "")
    colours = DEFAULT_TERMINAL_THEME if theme == "light" else BLACK
    if path.suffix == ".svg":
        return console.export_svg(title="rlhf_loop_pseudo", theme=colours).encode()
    if path.suffix == ".txt":
        return console.export_text().encode()
    # inline styles only, so that a page around the block stays as it is
    style = "color: {foreground}; background: {background}; padding: 1em"
    block = f'<meta charset="utf-8">\n<pre style="{style}">{{code}}</pre>\n'
    text = console.export_html(theme=colours, code_format=block, inline_styles=True)
    return text.encode()


def replace_file(path, data):
    """Write beside the file's place and rename, so that an older file stays until then."""
    beside = path.with_name(f".{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def show(shown, console, pause):
    """Print a page. With --pause ask its questions first, and wait."""
    if pause:
        console.clear()
        parts = shown.renderables
        questions = [x for x in parts if getattr(x, "style", "") == "question"]
        if questions:
            console.print(*questions, sep="\n")
            input("  [Enter] ")
            console.clear()
    console.print(shown, "")
    if pause:
        input("  [Enter] ")


def readable(error):
    """What stands for a character that an encoding lacks, and where to go on."""
    text = error.object[error.start : error.end].translate(ASCII)
    return text.encode("ascii", "replace").decode(), error.end


def complain(problem):
    """Say what went wrong. Returns the exit code."""
    print(f"rlhf_loop_pseudo.py: {problem}", file=sys.stderr)
    return 1


def close_output(code):
    """Print what is still waiting. Returns the exit code, 1 if that cannot be printed."""
    try:
        sys.stdout.flush()
    except OSError as problem:  # a full disk, or nobody who reads it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        closed = code or isinstance(problem, BrokenPipeError)
        return code or (1 if closed else complain(problem))
    return code


def print_pages(pages, printed, pause):
    """Print pages and keep them in printed. Returns the exit code."""
    console = make_console()
    try:
        for shown in pages:
            printed.append(shown)
            show(shown, console, pause)
    except (KeyboardInterrupt, EOFError):
        print("\nInterrupted.")
        return 130
    except SystemExit as stop:  # rich's answer to a closed pipe
        return stop.code
    except (FloatingPointError, MemoryError, OSError) as problem:
        return complain(problem)
    return 0


@np.errstate(all="ignore")  # check_finite speaks of what is not finite
def main(argv=None):
    """Run the command line argv, sys.argv without it. Returns the exit code."""
    sys.stdout = sys.stdout or io.StringIO()  # where it is closed
    if hasattr(sys.stdout, "reconfigure"):
        codecs.register_error("readable", readable)
        sys.stdout.reconfigure(errors="readable")
    np.empty(
        32_000_000, dtype=np.uint8
    )  # freed at once: glibc then reuses small memory
    try:
        given, configs = read_command_line(argv)
    except SystemExit as stop:
        sys.exit(close_output(stop.code))
    arrays, runs, printed = {}, [], []
    if "show" in given:
        pages = [Group(Text(given["show"]))]
    elif configs[0].steps == 1:
        pages = walk_pages(given, configs[0], arrays)
    else:
        pages = training_pages(configs, arrays, runs)
    code = print_pages(pages, printed, "pause" in given)
    files = {}
    if arrays or any(run.metrics for run in runs):  # else there is nothing to keep
        files["save"] = lambda: saved(configs, arrays, runs)
        files["export"] = lambda: exported(
            given["export"], given.get("theme"), printed
        )
    for name in files.keys() & given.keys():
        if not code or not given[name].exists():  # a failed run costs no older file
            try:
                replace_file(given[name], files[name]())
            except OSError as problem:
                code = complain(problem)
    return close_output(code)


if __name__ == "__main__":
    sys.exit(main())
