"""What becomes of the human's opinion while training maximises a model of it (Gao et al. 2023), on one seed."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

import rlhf_loop_pseudo as loop

LETTERS = {**loop.PRESETS["letters"], "steps": 200, "drift": 0.0, "seed": 0}
BETA = LETTERS.pop("beta")
RUNS = {
    "greedy": {"beta": 0.0},
    "gae": {"beta": BETA},
    "rloo": {"beta": BETA, "advantage": "rloo"},
    "grpo": {"beta": BETA, "advantage": "grpo"},
    "k2": {"beta": BETA, "kl_estimator": "k2"},
    "k3": {"beta": BETA, "kl_estimator": "k3"},
}


def learned_reward_model():
    """The reward model that the command line would train."""
    config = loop.Config(**LETTERS)
    models = loop.init_models(config, np.random.default_rng(config.seed))
    models, _ = loop.learn_from_human(models, config, np.random.default_rng([config.seed, 1]))
    return models.reward_model


def train(reward_model, settings):
    """Metrics, each (steps,), the words that came first in their batches, and theory at the end, if KL has a price."""
    config = loop.Config(**LETTERS, **settings)
    rng = np.random.default_rng(config.seed)
    models = loop.init_models(config, rng)._replace(reward_model=reward_model)
    metrics, words = zip(*loop.train(models, config, rng))
    gain = loop.attainable_gain(models, config, np.random.default_rng([config.seed, 2])) if config.beta else {}
    return {name: np.array([each[name] for each in metrics]) for name in metrics[0]}, words, gain


@pytest.fixture(scope="module")
def runs():
    """All trainings, two at a time."""
    reward_model = learned_reward_model()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {name: pool.submit(train, reward_model, settings) for name, settings in RUNS.items()}
        return {name: future.result() for name, future in futures.items()}


def human_opinion(metrics):
    """Means of five steps in a row."""
    return np.convolve(metrics["objective/human_scores"], np.ones(5) / 5, mode="valid")


def test_without_a_price_of_kl_the_score_rises_to_the_end(runs):
    metrics, _, _ = runs["greedy"]
    score = metrics["objective/scores"]
    assert abs(score[:5].mean()) < 0.3  # the reference's scores have mean 0
    assert score[-20:].mean() >= 2.5
    assert score[-20:].mean() > score[80:100].mean()
    assert metrics["objective/kl"][-20:].mean() > 25


def test_without_a_price_of_kl_the_human_is_pleased_at_first_and_then_lost(runs):
    metrics, _, _ = runs["greedy"]
    human = human_opinion(metrics)
    assert human[:56].max() >= human[0] + 0.08  # within 60 steps
    assert human[-1] <= human[:56].max() - 0.15
    assert human[-1] < human[0]


def test_without_a_price_of_kl_words_become_a_few_letters_repeated(runs):
    _, words, _ = runs["greedy"]
    first, last = ([len(set(word)) / len(word) for word in part] for part in (words[:20], words[-20:]))
    assert np.mean(last) < 0.6 * np.mean(first)


def test_the_presets_price_of_kl_keeps_the_human_near_its_best(runs):
    metrics, _, gain = runs["gae"]
    human = human_opinion(metrics)
    end = metrics["objective/human_scores"][-20:].mean()
    assert end >= human[0] + 0.15
    assert end >= 0.9 * human.max()
    assert gain["share"] >= 0.85
    assert gain["human"] == pytest.approx(end, abs=0.03)  # theory's estimate of the same
    assert gain["score"] == pytest.approx(metrics["objective/scores"][-20:].mean(), abs=0.2)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_a_critic_it_gets_as_far(runs, advantage):
    (_, _, with_critic), (metrics, _, gain) = runs["gae"], runs[advantage]
    assert gain["share"] == pytest.approx(with_critic["share"], abs=0.03)
    assert "loss/value_avg" not in metrics


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_as_a_reward_other_estimators_do_not_hold_the_actor(runs, estimator):
    (_, _, k1), (_, _, other) = runs["gae"], runs[estimator]
    assert other["kl"] > 1.8 * k1["kl"]
    assert other["J"] < k1["J"] - 0.5
    assert other["share"] < 0.2
