"""Human feedback: what the human likes, how they choose, and the reward model that learns from the choices."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import read_only, slow_human
from hypothesis import given
from hypothesis import strategies as st

import rlhf_loop_pseudo as loop

ALPHABET = "abcdefghijklmnopqrstuvwxyz."  # the dot ends a word
LETTERS = loop.Config(vocab_size=27, prompt_length=2, response_length=12)


def start(seed, config=LETTERS):
    """Models and generator."""
    rng = np.random.default_rng(seed)
    return loop.init_models(config, rng), rng


def words_of(responses, mask):
    """The letters of each response, as strings."""
    return [
        "".join(ALPHABET[token] for token, real in zip(row, row_mask) if real).replace(".", "")
        for row, row_mask in zip(responses, mask)
    ]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------ the human

rows = st.lists(st.tuples(st.sampled_from(ALPHABET), st.booleans()), min_size=5, max_size=5)


@given(st.lists(rows, min_size=1, max_size=4))
def test_human_scores(table):
    responses = np.array([[ALPHABET.index(letter) for letter, _ in row] for row in table])
    mask = np.array([[real for _, real in row] for row in table])
    for each in (mask, mask.astype(np.float32)):
        scores = loop.human_scores(*read_only(responses, each), 27)
        np.testing.assert_allclose(scores, [slow_human(word) for word in words_of(responses, mask)], atol=1e-12)


@pytest.mark.parametrize(
    "text, score",
    [("ab.", 1), ("taco", 1), ("aaaa", 0), ("tttt", 0), ("tata", 0.5), ("quick", 0.8), ("eat", 2 / 3), (".", 0)],
)
def test_what_the_human_likes(text, score):
    tokens = np.array([[ALPHABET.index(letter) for letter in text]])
    assert loop.human_scores(tokens, np.ones(tokens.shape), 27)[0] == pytest.approx(score)


# ------------------------------------------------------------------ choices


def test_choices_follow_bradley_terry():
    config = replace(LETTERS, response_length=6, preference_pairs=12_000)
    models, rng = start(0, config)
    read_only(models.reference)
    prompts, responses, mask = loop.collect_preferences(models.reference, config, rng)
    assert prompts.shape == (24_000, 2)
    assert responses.shape == mask.shape == (24_000, 6)
    np.testing.assert_array_equal(*np.split(prompts, 2))  # a pair answers one prompt
    opinions = np.array([slow_human(word) for word in words_of(responses, mask)])
    chosen, rejected = np.split(opinions, 2)
    differences = abs(chosen - rejected)
    for low, high in ((0.01, 0.2), (0.2, 0.4), (0.4, 1.01), (0.01, 1.01)):
        pairs = (differences >= low) & (differences < high)
        p = sigmoid(8 * differences[pairs])  # that the better one is chosen
        assert pairs.sum() > 500
        assert abs((chosen > rejected)[pairs].sum() - p.sum()) < 5 * np.sqrt((p * (1 - p)).sum())


def test_the_first_is_chosen_as_often_as_its_lead_says(monkeypatch):
    """With opinions that are given: response i to its prompt is a row of i, the first ones come first."""
    pairs = 30_000
    config = replace(LETTERS, preference_pairs=pairs)
    leads = np.resize([-0.4, -0.1, 0.0, 0.1, 0.4], pairs)
    opinions = np.concatenate([0.5 + leads / 2, 0.5 - leads / 2])
    ids = np.repeat(np.arange(2 * pairs)[:, None], 3, axis=1)
    monkeypatch.setattr(loop, "generate", lambda *_, **__: (ids, np.ones(ids.shape), None, None))
    monkeypatch.setattr(loop, "human_scores", lambda responses, *_: opinions[responses[:, 0]])
    _, responses, _ = loop.collect_preferences(None, config, np.random.default_rng(0))
    chosen, rejected = np.split(responses[:, 0], 2)
    np.testing.assert_array_equal(np.minimum(chosen, rejected), np.arange(pairs))  # the two of a pair stay together
    np.testing.assert_array_equal(abs(chosen - rejected), pairs)
    for lead in np.unique(leads):
        first = (chosen < rejected)[leads == lead]
        p = sigmoid(8 * lead)
        assert abs(first.mean() - p) < 5 * np.sqrt(p * (1 - p) / len(first))


def test_the_pairs_are_the_references_own_words():
    """A reference that ends at once writes nothing; its two responses are otherwise drawn apart."""
    config = replace(LETTERS, preference_pairs=200)
    models, rng = start(0, config)
    _, responses, mask = loop.collect_preferences(models.reference, config, rng)
    words = np.array(words_of(responses, mask))
    assert (words[:200] != words[200:]).mean() > 0.9
    assert all((row[row_mask == 0] == 26).all() for row, row_mask in zip(responses, mask))
    silent = {name: 0 * weights for name, weights in models.reference.items()}
    silent["embed"] = np.ones_like(silent["embed"])
    silent["head"][:, 26] = 100
    _, responses, mask = loop.collect_preferences(silent, config, rng)
    assert (responses == 26).all()
    assert (mask == np.eye(config.response_length)[0]).all()


# ------------------------------------------------------------------ the loss


@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=5))
def test_preference_loss(pairs):
    chosen, rejected = read_only(*np.array(pairs).T.copy())
    loss, d_chosen, d_rejected = loop.preference_loss(chosen, rejected)
    assert loss == pytest.approx(np.mean([-np.log(sigmoid(c - r)) for c, r in pairs]), rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(d_rejected, [sigmoid(r - c) / len(pairs) for c, r in pairs], rtol=1e-9)
    np.testing.assert_array_equal(d_chosen, -d_rejected)


def test_preference_loss_of_extreme_scores_stays_finite():
    loss, d_chosen, d_rejected = loop.preference_loss(np.array([1e4, -1e4]), np.array([-1e4, 1e4]))
    assert loss == 1e4
    assert d_chosen.tolist() == [0, -0.5]
    assert d_rejected.tolist() == [0, 0.5]


def test_who_cannot_tell_has_a_loss_of_ln_2():
    loss, d_chosen, d_rejected = loop.preference_loss(np.zeros(4), np.zeros(4))
    assert loss == pytest.approx(np.log(2))
    assert (d_chosen.tolist(), d_rejected.tolist()) == ([-1 / 8] * 4, [1 / 8] * 4)


# ------------------------------------------------------------------ the reward model


def accuracy(reward_model, reference, rng):
    """The share of fresh pairs in which the model agrees with the choice."""
    pairs = loop.collect_preferences(reference, replace(LETTERS, preference_pairs=1000), rng)
    chosen, rejected = np.split(loop.score_responses(reward_model, *pairs), 2)
    return (chosen > rejected).mean()


def learn(seed, pairs):
    """Preferences, the start and the end of a reward model, its losses, and its accuracy."""
    models, rng = start(seed)
    read_only(models.reference, models.reward_model)
    before = {name: weights.copy() for name, weights in models.reference.items()}
    data = loop.collect_preferences(models.reference, replace(LETTERS, preference_pairs=pairs), rng)
    reward_model, losses = loop.train_reward_model(models.reward_model, *read_only(*data), rng)
    for name, weights in models.reference.items():
        assert weights.tobytes() == before[name].tobytes()
    return data, models.reward_model, reward_model, losses, accuracy(reward_model, models.reference, rng)


@pytest.fixture(scope="module")
def many():
    """Three reward models that have learned from 2048 pairs."""
    return [learn(seed, 2048) for seed in range(3)]


def test_the_loss_falls(many):
    for _, _, _, losses, _ in many:
        assert losses.shape == (200,)
        assert losses[:5].mean() > 0.6
        assert losses[-20:].mean() < 0.55


def test_scores_have_mean_0_and_deviation_1(many):
    for data, _, reward_model, _, _ in many:
        scores = np.float64(loop.score_responses(reward_model, *data))
        assert scores.mean() == pytest.approx(0, abs=1e-5)
        assert scores.std() == pytest.approx(1, abs=1e-5)


def test_a_new_model_learns_and_the_given_one_does_not_change(many):
    for seed, (_, given_model, reward_model, _, _) in enumerate(many):
        models, _ = start(seed)
        assert reward_model.keys() == {*given_model, "bias"}
        for name, weights in given_model.items():
            assert not np.shares_memory(weights, reward_model[name])
            assert (weights != reward_model[name]).any()
            assert reward_model[name].dtype == np.float32
            np.testing.assert_array_equal(weights, models.reward_model[name])


def test_a_trained_model_can_be_trained_again(many):
    """The bias that it comes with says nothing about its new weights."""
    data, _, trained, _, _ = many[0]
    trained = {**trained, "bias": trained["bias"] + 3}
    again, _ = loop.train_reward_model(trained, *data, np.random.default_rng(5))
    assert loop.score_responses(again, *data).mean() == pytest.approx(0, abs=1e-5)


def test_it_learns_what_the_human_likes_and_more_from_more_pairs(many):
    good = np.mean([share for *_, share in many])
    poor = np.mean([learn(seed, 128)[-1] for seed in range(3)])
    assert good > 0.7
    assert 0.6 < poor < good - 0.04


def test_each_update_sees_128_whole_pairs(monkeypatch):
    config = replace(LETTERS, response_length=2, preference_pairs=50)
    models, rng = start(0, config)
    data = loop.collect_preferences(models.reference, config, rng)
    seen, original = [], loop.reward_gradients

    def watching(model, *batch):
        seen.append(batch)
        return original(model, *batch)

    def pairs(prompts, responses, mask):
        first, second = np.split(np.hstack([prompts, responses, mask]), 2)  # the chosen, the rejected
        return [tuple(row) for row in np.hstack([first, second])]

    monkeypatch.setattr(loop, "reward_gradients", watching)
    loop.train_reward_model(models.reward_model, *data, rng)
    drawn = [pairs(*batch) for batch in seen]
    assert [len(each) for each in drawn] == [128] * 200
    assert set().union(*drawn) == {*pairs(*data)}  # every pair has its turn, and none is torn apart
