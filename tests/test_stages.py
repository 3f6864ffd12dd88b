"""The stages before the loop: demonstrations, fine-tuning, preferences and the reward model."""

from dataclasses import replace
from functools import partial
from math import log

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import rlhf_loop_pseudo as loop
from conftest import least_loss, read_only, slow_human, texts_of

ALPHABET = "abcdefghijklmnopqrstuvwxyz."  # the dot ends a word
CONFIG = loop.Config(vocab_size=27, prompt_length=1, response_length=12, width=32)
some_words = st.lists(st.text(ALPHABET[:26], min_size=1, max_size=7), min_size=1, max_size=9)


def copied(model):
    """The same model in other arrays."""
    return {name: weights.copy() for name, weights in model.items()}


def untrained(seed, config=CONFIG, dtype=np.float32):
    """A random model, and the generator that drew it."""
    rng = np.random.default_rng(seed)
    model = loop.init_model(rng, 27, config.width, 27)
    return {name: weights.astype(dtype) for name, weights in model.items()}, rng


def rows_of(*arrays):
    """Each row of arrays side by side, as a tuple."""
    return [tuple(row) for row in np.hstack(arrays).tolist()]


# ------------------------------------------------------------------ demonstrations


@given(some_words, st.integers(3, 8))
def test_demonstrations(words, length):
    config = replace(CONFIG, response_length=length)
    fit = [word for word in words if len(word) <= length]  # the rest, and an end
    assume(fit)
    prompts, responses, mask = loop.demonstrations(words, config)
    for word, prompt, response, real in zip(fit, prompts, responses, mask, strict=True):
        assert prompt.tolist() == [ALPHABET.index(word[0])]
        assert "".join(ALPHABET[token] for token in response) == word[1:].ljust(length, ".")
        assert real.tolist() == [1] * len(word) + [0] * (length - len(word))


# ------------------------------------------------------------------ fine-tuning

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.claims) for seed in range(2, 12))]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_learns_the_words_as_well_as_can_be(seed):
    model, rng = untrained(seed)
    losses = loop.fine_tune(model, *loop.demonstrations(loop.WORDS, CONFIG), rng)
    assert losses.shape == (400,)
    assert losses[0] == pytest.approx(log(27), abs=0.3)  # all letters alike
    assert -0.01 < losses[-20:].mean() - least_loss(loop.WORDS) < 0.1
    prompts = np.repeat(np.arange(26), 40)[:, None]
    responses, mask, _ = loop.generate(model, prompts, CONFIG.response_length, rng, 26)
    written = texts_of(prompts, responses, mask)
    words = {f"{word}." for word in loop.WORDS}
    assert np.mean([word in words for word in written]) >= 0.8
    assert len(words.intersection(written)) >= 100  # and not one for each letter


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fine_tuning_works_in_place_and_keeps_the_type(dtype):
    """Weights that it does not know are left alone."""
    config = replace(CONFIG, width=4, response_length=6)
    data = read_only(*loop.demonstrations(loop.WORDS[:12], config))
    model, rng = untrained(0, config, dtype)
    model["more"] = np.ones(2, dtype=dtype)
    before, arrays = copied(model), dict(model)
    losses = loop.fine_tune(model, *data, rng)
    for name, weights in model.items():
        assert weights is arrays[name]
        assert weights.dtype == dtype
        assert (weights != before[name]).any() == (name != "more")
    assert losses[-20:].mean() < losses[:20].mean() - 0.5


@pytest.mark.parametrize("count", [7, len(loop.WORDS)])
def test_each_update_sees_128_words_or_all_there_are(count, monkeypatch):
    config = replace(CONFIG, width=2, response_length=10)
    (model, rng), seen, original = untrained(0, config), [], loop.forward_logprobs
    pulls, backward = [], loop.backward_logprobs
    prompts, responses, mask = loop.demonstrations(loop.WORDS[:count], config)

    def watching(model, *texts):
        seen.append(set(rows_of(*texts)))
        return original(model, *texts)

    def pulling(model, cache, d_logprobs):
        pulls.append(d_logprobs.sum())
        return backward(model, cache, d_logprobs)

    monkeypatch.setattr(loop, "forward_logprobs", watching)
    monkeypatch.setattr(loop, "backward_logprobs", pulling)
    loop.fine_tune(model, prompts, responses, mask, rng)
    np.testing.assert_allclose(pulls, -1, rtol=1e-5)  # a mean over the tokens
    assert [len(batch) for batch in seen] == [min(128, count)] * 400  # none of them twice
    assert set().union(*seen) == set(rows_of(prompts, responses))


def test_the_reference_is_fine_tuned_and_the_untrained_model_is_not(monkeypatch):
    """The reference is who writes the pairs; the reward model begins untrained."""
    config, seen = replace(CONFIG, preference_pairs=16, width=8, response_length=5), []
    for name in ("collect_preferences", "train_reward_model"):
        original = getattr(loop, name)
        watching = partial(lambda call, *given: seen.append(given[0]) or call(*given), original)
        monkeypatch.setattr(loop, name, watching)
    stages = loop.learn_from_human(config, np.random.default_rng(3))
    first, reference, losses = stages.untrained, stages.reference, stages.losses
    prompts, responses, mask = loop.demonstrations(loop.WORDS, config)
    before, after = (
        -(loop.token_logprobs(model, prompts, responses) * mask).sum() / mask.sum()
        for model in (first, reference)
    )
    assert after + 1 < before == pytest.approx(log(27), abs=0.3)
    expected, _ = untrained(3, config)
    assert all((first[name] == expected[name]).all() for name in expected)
    assert not any(np.shares_memory(first[name], reference[name]) for name in first)
    writer, start = seen
    assert writer is reference
    assert all((start[name] == first[name]).all() for name in ("embed", "context_proj"))
    assert [len(losses[name]) for name in ("fine_tuning", "preferences")] == [400, 200]
    assert "bias" in stages.reward_model
    assert [len(part) for part in stages.pairs] == [32] * 3


# ------------------------------------------------------------------ the human

rows = st.lists(st.tuples(st.sampled_from(ALPHABET), st.booleans()), min_size=5, max_size=5)


@example([[(".", False)] * 5], 1)
@given(st.lists(rows, min_size=1, max_size=4), st.integers(1, 4))
def test_the_human_reads_prompt_and_response_as_one_word(table, length):
    """Without the end tokens, and without what the mask takes out of the response."""
    tokens = np.array([[ALPHABET.index(letter) for letter, _ in row] for row in table])
    real = np.array([[kept for _, kept in row] for row in table])
    texts, mask = np.split(tokens, [length], axis=1), real[:, length:]
    words = [
        "".join(ALPHABET[t] for t, kept in zip(row, [*[1] * length, *m]) if kept and t < 26)
        for row, m in zip(tokens, mask)
    ]
    for kind in (bool, np.float32, np.int64):
        scores = loop.human_scores(*read_only(*texts, mask.astype(kind)), 27)
        np.testing.assert_allclose(scores, [slow_human(word) for word in words], atol=1e-12)


# ------------------------------------------------------------------ choices


def test_choices_follow_bradley_terry():
    config = replace(CONFIG, response_length=6, preference_pairs=12_000)
    reference, rng = untrained(0, config)
    read_only(reference)
    prompts, responses, mask = loop.collect_preferences(reference, config, rng)
    np.testing.assert_array_equal(*np.split(prompts, 2))  # a pair answers one prompt
    assert (responses[mask == 0] == 26).all()
    words = texts_of(prompts, responses, mask)
    assert np.mean(np.array(words[:12_000]) == words[12_000:]) < 0.1  # in two ways
    chosen, rejected = np.split(np.array([slow_human(word.rstrip(".")) for word in words]), 2)
    differ = abs(chosen - rejected) > 0.01
    p = 1 / (1 + np.exp(-8 * abs(chosen - rejected)[differ]))  # that the better one is chosen
    assert abs((chosen > rejected)[differ].sum() - p.sum()) < 5 * np.sqrt((p * (1 - p)).sum())


def test_the_first_is_chosen_as_often_as_its_lead_says(monkeypatch):
    """With opinions that are given: response i is a row of i, and the first ones come first."""
    pairs = 30_000
    leads = np.resize([-0.4, -0.1, 0.0, 0.1, 0.4], pairs)
    opinions = np.concatenate([0.5 + leads / 2, 0.5 - leads / 2])
    ids = np.repeat(np.arange(2 * pairs)[:, None], 3, axis=1)
    monkeypatch.setattr(loop, "generate", lambda *_: (ids, np.ones(ids.shape), None))
    monkeypatch.setattr(loop, "human_scores", lambda _, responses, *__: opinions[responses[:, 0]])
    config, rng = replace(CONFIG, preference_pairs=pairs), np.random.default_rng(0)
    _, responses, _ = loop.collect_preferences(None, config, rng)
    chosen, rejected = np.split(responses[:, 0], 2)
    np.testing.assert_array_equal(np.minimum(chosen, rejected), np.arange(pairs))
    np.testing.assert_array_equal(abs(chosen - rejected), pairs)  # a pair stays together
    for lead in np.unique(leads):
        p = 1 / (1 + np.exp(-8 * lead))
        first = (chosen < rejected)[leads == lead]
        assert abs(first.mean() - p) < 5 * np.sqrt(p * (1 - p) / len(first))


# ------------------------------------------------------------------ the reward model


def preferences(reference, pairs, rng):
    """Choices between fresh responses."""
    config = replace(CONFIG, preference_pairs=pairs, response_length=8)
    return loop.collect_preferences(reference, config, rng)


def learn(seed, pairs):
    """(data, start, end, losses, the share of fresh pairs where it agrees with the choice)."""
    reference, rng = untrained(seed)
    start = loop.init_reward_model(reference, rng)
    read_only(reference, start)
    data = read_only(*preferences(reference, pairs, rng))
    reward_model, losses = loop.train_reward_model(start, *data, rng)
    scores = loop.score_responses(reward_model, *preferences(reference, 1000, rng))
    chosen, rejected = np.split(scores, 2)
    return data, start, reward_model, losses, (chosen > rejected).mean()


@pytest.fixture(scope="module")
def many():
    """Two reward models that have learned from 2048 pairs."""
    return [learn(seed, 2048) for seed in range(2)]


def test_a_new_model_learns_and_the_given_one_does_not_change(many):
    for data, start, reward_model, losses, _ in many:  # start is protected
        assert losses.shape == (200,)
        assert losses[-20:].mean() < 0.57 < 0.6 < losses[:5].mean()
        scores = np.float64(loop.score_responses(reward_model, *data))
        assert (scores.mean(), scores.std()) == pytest.approx((0, 1), abs=1e-5)
        assert reward_model.keys() == {*start, "bias", "score_std"}
        for name, weights in start.items():
            assert not np.shares_memory(weights, reward_model[name])
            assert (weights != reward_model[name]).any()
            assert reward_model[name].dtype == np.float32


def test_a_trained_model_can_be_trained_again(many):
    """The bias that it comes with says nothing about its new weights."""
    data, _, trained, _, _ = many[0]
    trained = {**trained, "bias": trained["bias"] + 3}
    again, _ = loop.train_reward_model(trained, *data, np.random.default_rng(5))
    assert loop.score_responses(again, *data).mean() == pytest.approx(0, abs=1e-5)


def test_scores_that_are_all_equal_are_not_blown_up():
    """One pair of equal responses has no deviation to divide by."""
    reference, rng = untrained(0)
    start, mask = loop.init_reward_model(reference, rng), np.ones((2, 3))
    texts = np.zeros((2, 1), dtype=int), np.zeros((2, 3), dtype=int)
    model, losses = loop.train_reward_model(start, *texts, mask, rng)
    np.testing.assert_allclose(losses, log(2), rtol=1e-6)
    np.testing.assert_allclose(loop.score_responses(model, *texts, mask), 0, atol=1e-5)
    assert abs(loop.score_responses(model, texts[0], texts[1] + 1, mask)).max() < 100


def test_it_learns_what_the_human_likes_and_more_from_more_pairs(many):
    good = np.mean([share for *_, share in many])
    poor = np.mean([learn(seed, 128)[-1] for seed in range(2)])
    assert 0.6 < poor < good - 0.03
    assert good > 0.72


def test_each_update_of_it_sees_128_whole_pairs(monkeypatch):
    config = replace(CONFIG, width=2)
    (reference, rng), seen, original = untrained(0, config), [], loop.reward_gradients
    data = preferences(reference, 50, rng)

    def pairs(*batch):
        return list(zip(*[rows_of(*half) for half in zip(*map(np.split, batch, [2] * 3))]))

    def watching(model, *batch):
        seen.append(pairs(*batch))
        return original(model, *batch)

    monkeypatch.setattr(loop, "reward_gradients", watching)
    loop.train_reward_model(loop.init_reward_model(reference, rng), *data, rng)
    assert [len(batch) for batch in seen] == [128] * 200
    assert set().union(*seen) == {*pairs(*data)}  # each has its turn, and none is torn apart


# ------------------------------------------------------------------ what they are given


TRAININGS = [(loop.fine_tune, 0), (loop.train_reward_model, 1)]


def small_data():
    """(fine_tune's arguments, train_reward_model's) but for the generator."""
    config = replace(CONFIG, width=3, response_length=5, preference_pairs=8)
    model, rng = untrained(0, config)
    demonstrated = loop.demonstrations(loop.WORDS[:8], config)
    chosen = loop.collect_preferences(model, config, rng)
    return (copied(model), *demonstrated), (loop.init_reward_model(model, rng), *chosen)


@pytest.mark.parametrize("function, which", TRAININGS)
def test_texts_may_have_any_integer_type(function, which):
    results = []
    for dtype in (np.int64, np.uint8):
        model, *data = small_data()[which]
        losses = function(model, *[x.astype(dtype) for x in data], np.random.default_rng(0))
        results.append(losses if which == 0 else losses[1])
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_a_mask_counts_by_whether_it_is_0():
    """A mask of -1 would otherwise train away from the words."""
    results = []
    for factor in (1, -1, 7):
        model, prompts, responses, mask = small_data()[0]
        results.append(
            loop.fine_tune(model, prompts, responses, factor * mask, np.random.default_rng(0))
        )
    np.testing.assert_array_equal(results[1:], [results[0]] * 2)


@pytest.mark.parametrize("function, which", TRAININGS)
def test_training_data_that_does_not_fit_is_refused(function, which):
    """Above all what would be learned all the same, put together wrongly."""
    model, prompts, responses, mask = small_data()[which]
    wrong = [(prompts[:6], responses, mask), (prompts, responses[:6], mask)]
    wrong += [(prompts, responses, np.tile(mask, (2, 1))), (prompts, responses, mask[:, :1])]
    wrong += [(prompts[:0], responses[:0], mask[:0]), (prompts, responses, 0 * mask)]
    if function is loop.train_reward_model:
        wrong.append((prompts[:7], responses[:7], mask[:7]))  # whose is the last?
    for data in wrong:
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            function(copied(model), *data, np.random.default_rng(0))


@pytest.mark.parametrize("function, which", TRAININGS)
def test_the_learning_rate_falls_to_0(function, which, monkeypatch):
    rates, original = [], loop.adam_step
    monkeypatch.setattr(
        loop, "adam_step", lambda *given: rates.append(given[3]) or original(*given)
    )
    function(*small_data()[which], np.random.default_rng(0))
    assert (np.diff(rates) < 0).all()
    assert rates[0] == (0.03, 0.005)[which]
    assert 0 < rates[-1] < rates[0] / 100
