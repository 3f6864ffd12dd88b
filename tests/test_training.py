"""The loop: how its models start, and what a step does, by hand."""

import copy
import itertools
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import (
    SlowAdam,
    shown,
    slow_gae,
    slow_grpo,
    slow_kl,
    slow_rewards,
    slow_rloo,
    slow_whiten,
)

SMALL = loop.Config(
    batch_size=8, prompt_length=4, response_length=5, vocab_size=6, width=8, learning_rate=0.02
)
METHODS = ("ppo", "rloo", "grpo")


def start(config):
    """Models and generator, at random."""
    rng = np.random.default_rng(config.seed)
    return loop.init_models(config, rng), rng


def close(actual, expected, tolerance=1e-7):
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ the models at the start


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_at_the_reference_with_a_critic_only_for_ppo(method):
    models, _ = start(replace(SMALL, steps=2, method=method))
    np.testing.assert_array_equal(models.actor["head"], models.reference["head"])
    assert (models.critic is None) == (method != "ppo")
    assert not models.critic or not models.critic["head"].any()
    present = [model for model in models if model]
    for model, name in itertools.product(present, ("embed", "context_proj")):
        np.testing.assert_array_equal(model[name], models.reference[name])
    weights = [array for model in present for array in model.values()]
    assert not any(np.shares_memory(*pair) for pair in itertools.combinations(weights, 2))


def test_models_are_drawn_with_the_stated_deviations_and_drift_in_proportion():
    models, _ = start(loop.Config(vocab_size=3000, width=100, drift=0.5))
    for name, deviation in (("embed", 0.1), ("context_proj", 0.5), ("head", 0.1)):
        weights, drift = models.reference[name], models.actor[name] - models.reference[name]
        assert (weights.std(), drift.std()) == pytest.approx((deviation, deviation / 2), rel=0.03)
        assert abs(weights.mean()) < 0.03 * deviation
        assert abs(weights).max() < 1.74 * deviation  # uniform
        assert abs(np.corrcoef(weights.ravel(), drift.ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(models.critic["embed"], models.reference["embed"])
    assert [m["head"].std() for m in models[1:3]] == pytest.approx([0.05, 0.25], rel=0.2)


def test_in_training_both_actor_and_reference_write_words(tmp_path):
    """Fine-tuning that reached one of them alone would show as a KL, or in words."""
    _, arrays = shown("--preset letters --steps 2 --preference-pairs 300", tmp_path)
    assert arrays["val/words"][0] > 0.7
    assert abs(arrays["objective/kl"][0]) < 1e-4
    assert abs(arrays["theory/J_start"]) < 0.3  # scores of the reference's words average 0
    assert arrays["fine_tuning/words"] > 0.8


# ------------------------------------------------------------------ a step, by hand

SETTINGS = [
    {},
    {"kl_estimator": "k2", "beta": 0.5, "gamma": 0.9, "lam": 0.5, "clip": 0.1, "seed": 1},
    {"kl_estimator": "k3", "beta": 0.0, "gamma": 0.0, "lam": 1.0, "seed": 2, "ppo_epochs": 1},
    {"method": "rloo", "beta": 0.3, "kl_estimator": "k3", "seed": 3},
    {"method": "rloo", "group_size": 2, "ppo_epochs": 2},
    {"method": "grpo", "beta": 0.3, "seed": 4},
    {"method": "grpo", "group_size": 8, "kl_estimator": "k2", "gamma": 0.5, "seed": 5},
    {"kl_in": "loss", "beta": 0.4, "kl_estimator": "k1", "seed": 6},
    {"method": "grpo", "kl_in": "loss", "beta": 0.4, "kl_estimator": "k3", "seed": 7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_is_what_its_seven_parts_give(settings):
    """In float64, in which rounding is far below what is compared."""
    config = replace(SMALL, steps=3, drift=0.75, **settings)
    models, rng = start(config)
    models = loop.Models(*(m and {k: np.float64(w) for k, w in m.items()} for m in models))
    before, adams = copy.deepcopy((models, rng)), (defaultdict(SlowAdam), defaultdict(SlowAdam))
    for number, step in enumerate(loop.core_loop(models, config, rng)):
        expected, left = by_hand(*before, config, 0.02 * (3 - number) / 3, adams)
        assert vars(step).keys() == expected.keys()
        for name, wanted in expected.items():
            if wanted is None:
                assert getattr(step, name) is None
            else:
                close(getattr(step, name), wanted)
        for model, wanted in zip(models, left):
            for name in wanted or ():
                close(model[name], wanted[name], 1e-6)
        before = copy.deepcopy((models, rng))
    assert number == 2


def by_hand(models, rng, config, rate, adams):
    """The arrays of a step, and the models that it leaves."""
    actor, critic, reward_model, reference = models
    size = 1 if critic else config.group_size
    count, end = config.batch_size // size, config.vocab_size - 1
    prompts = loop.sample_prompts(rng, count, config.prompt_length, config.vocab_size)
    prompts = prompts.repeat(size, axis=0)
    responses, mask, old = loop.generate(actor, prompts, config.response_length, rng, end)
    texts = prompts, responses
    scores = loop.score_responses(reward_model, *texts, mask)
    ref_logprobs = loop.token_logprobs(reference, *texts) * mask
    kl = slow_kl(old, ref_logprobs, config.kl_estimator)
    in_loss = config.kl_in == "loss"
    rewards = slow_rewards(scores, kl, mask, 0 if in_loss else config.beta)
    values = returns = None
    if critic:
        values = loop.critic_values(critic, *texts) * mask
        advantages, returns = slow_gae(rewards, values, mask, config.gamma, config.lam)
    else:
        compare = {"rloo": slow_rloo, "grpo": slow_grpo}[config.method]
        advantages = compare(rewards, mask, size)
    used = advantages if config.method == "grpo" else slow_whiten(advantages, mask)
    kl_term = (ref_logprobs, config.beta, config.kl_estimator) if in_loss else ()
    rest, ratios, losses = (old, used, mask, config.clip, *kl_term), [], ([], [])
    for _ in range(config.ppo_epochs):
        gradients, loss, ratio = loop.actor_gradients(actor, *texts, *rest)
        actor = adam_step(actor, gradients, adams[0], rate)
        ratios.append(ratio)
        losses[0].append(loss)
        if critic:
            gradients, loss = loop.critic_gradients(critic, *texts, returns, mask)
            critic = adam_step(critic, gradients, adams[1], rate)
            losses[1].append(loss)
    arrays = {"prompts": prompts, "responses": responses, "mask": mask, "old_logprobs": old}
    arrays |= {"scores": scores, "ref_logprobs": ref_logprobs, "kl": kl, "rewards": rewards}
    arrays |= {"values": values, "returns": returns, "advantages": advantages}
    arrays |= {"loss_advantages": used, "ratio": ratios, "actor_loss": losses[0]}
    arrays |= {"critic_loss": losses[1], "learning_rate": rate}
    return arrays, loop.Models(actor, critic, reward_model, reference)


def adam_step(model, gradients, adams, rate):
    """A model one update further."""
    return {name: adams[name].step(w, gradients[name], rate) for name, w in model.items()}


def test_without_a_generator_it_is_that_of_the_seed():
    config = replace(SMALL, steps=2, seed=3)
    runs = []
    for rng in (None, np.random.default_rng([3, 2])):
        steps = loop.core_loop(loop.prepare(config), config, rng)
        runs.append([vars(step) for step in steps])
    np.testing.assert_equal(*runs)


def test_no_step_holds_an_array_that_a_later_one_changes():
    config = replace(SMALL, steps=3)
    steps, copies = [], []
    for step in loop.core_loop(loop.prepare(config), config):
        steps.append(vars(step))
        copies.append(copy.deepcopy(vars(step)))
    np.testing.assert_equal(steps, copies)
