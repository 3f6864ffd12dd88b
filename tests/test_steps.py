"""Every step function against a slow, obvious definition of its formula."""

import statistics
import tracemalloc

import numpy as np
import pytest
from conftest import Batch, one_head, read_only, real_tokens, slow_hidden, slow_logprobs, small_model
from hypothesis import given
from hypothesis import strategies as st

import rlhf_loop_pseudo as loop

shapes = {
    "seed": st.integers(0, 2**32 - 1),
    "rows": st.integers(1, 4),
    "prompt_length": st.integers(1, 4),
    "response_length": st.integers(2, 6),
    "vocab_size": st.integers(2, 9),
    "width": st.integers(1, 6),
}
batches = st.builds(Batch, **shapes)
any_batches = st.builds(Batch, **shapes, holes=st.booleans())
unit = st.floats(0, 1)


def everywhere(mask):
    """(row, position) of every token, padding too."""
    return real_tokens(np.ones_like(mask))


def last_real(mask):
    """The position of each row's last 1."""
    return [max(t for t in range(len(row)) if row[t]) for row in mask]


def assert_zero_at_padding(x, mask):
    assert x.shape == mask.shape
    assert (x[mask == 0] == 0).all()


# ------------------------------------------------------------------ 1. prompts


def test_prompts_use_every_token_but_the_end_token():
    prompts = loop.sample_prompts(np.random.default_rng(0), 50, 20, 5)
    assert prompts.shape == (50, 20)
    assert set(prompts.ravel()) == {0, 1, 2, 3}


def test_the_smallest_vocabulary_has_one_prompt_token():
    assert not loop.sample_prompts(np.random.default_rng(0), 3, 4, 2).any()


# ------------------------------------------------------------------ 2. generation


@given(batches)
def test_backbone(batch):
    hidden, context = loop.backbone(*read_only(batch.model, batch.prompts))
    for b, prompt in enumerate(batch.prompts):
        for t in range(len(prompt)):
            so_far = sum(batch.model["embed"][token] for token in prompt[: t + 1]) / np.sqrt(t + 1)
            np.testing.assert_allclose(context[b, t], so_far, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(hidden[b, t], slow_hidden(batch.model, prompt[: t + 1]), rtol=1e-9, atol=1e-12)


@given(batches)
def test_generated_logits_and_logprobs(batch):
    length, eos = batch.mask.shape[1], batch.vocab_size - 1
    read_only(batch.model, batch.prompts)
    responses, mask, logprobs, logits = loop.generate(batch.model, batch.prompts, length, batch.rng, eos)
    assert responses.shape == mask.shape == logprobs.shape == batch.mask.shape
    assert logits.shape == (*batch.mask.shape, batch.vocab_size)
    for b, prompt in enumerate(batch.prompts):
        ended = False
        for t in range(length):
            assert mask[b, t] == (not ended)
            tokens = [*prompt, *responses[b, :t]]
            np.testing.assert_allclose(logits[b, t], slow_hidden(batch.model, tokens) @ batch.model["head"], rtol=1e-9)
            expected = 0 if ended else slow_logprobs(batch.model, tokens)[responses[b, t]]
            np.testing.assert_allclose(logprobs[b, t], expected, rtol=1e-9, atol=1e-12)
            if ended:
                assert responses[b, t] == eos
            ended = ended or responses[b, t] == eos


def test_keeping_logits_changes_nothing_else(batch):
    results = [
        loop.generate(batch.model, batch.prompts, 6, np.random.default_rng(0), 6, keep_logits=keep)
        for keep in (True, False)
    ]
    assert results[0][3].shape == (3, 6, 7)
    assert results[1][3] is None
    for kept, dropped in zip(results[0][:3], results[1][:3]):
        np.testing.assert_array_equal(kept, dropped)


def test_responses_follow_the_actors_distribution():
    model = small_model(np.random.default_rng(1), vocab_size=4, scale=0.5)
    prompts = np.tile([[0, 1]], (40_000, 1))
    responses, _, _, _ = loop.generate(model, prompts, 2, np.random.default_rng(2), 3)
    for first in range(4):
        chosen = responses[responses[:, 0] == first]
        share = np.exp(slow_logprobs(model, [0, 1])[first])
        assert abs(len(chosen) / len(prompts) - share) < 5 * np.sqrt(share / len(prompts))
        if first != 3:
            shares = np.exp(slow_logprobs(model, [0, 1, first]))
            counts = np.bincount(chosen[:, 1], minlength=4) / len(chosen)
            assert (np.abs(counts - shares) < 5 * np.sqrt(shares / len(chosen)) + 1e-3).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_token_of_probability_zero_is_never_sampled(dtype):
    logits = np.tile(np.array([-1e4, 0, -1e4, 0, -1e4], dtype=dtype), (5000, 1))
    tokens, logprobs = loop.sample_tokens(*read_only(logits), np.random.default_rng(0))
    assert set(tokens) == {1, 3}
    np.testing.assert_allclose(logprobs, -np.log(2), rtol=1e-6)


class Given:
    """A generator whose random numbers are given."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def random(self, size):
        return np.resize(self.numbers, size)


def test_sampling_at_both_ends_of_the_random_numbers():
    logits = np.array([[-1e4, 0, 0, -1e4]] * 2, dtype=np.float32)
    tokens, _ = loop.sample_tokens(logits, Given(0.0, 1 - 2**-53))
    assert list(tokens) == [2, 1]


def test_a_long_tail_of_small_probabilities_is_not_lost():
    logits = np.full((1, 50_000), -17, dtype=np.float32)
    logits[0, 0] = 0  # each of the others is too small to change a sum of 1 in float32
    assert loop.sample_tokens(logits, Given(0.0))[0] == 49_999


# ------------------------------------------------------------------ 3. scores


@given(any_batches, st.sampled_from([None, 0.0, 2.5]))
def test_scores(batch, bias):
    model, last = one_head(batch.model), last_real(batch.mask)
    if bias is not None:
        model["bias"] = np.array([bias])
    read_only(model, batch.prompts, batch.responses, batch.mask)
    scores = loop.score_responses(model, batch.prompts, batch.responses, batch.mask)
    assert scores.shape == (len(batch.mask),)
    for b, score in enumerate(scores):
        expected = slow_hidden(model, batch.sequence(b, last[b] + 1)) @ model["head"][:, 0] + (bias or 0)
        assert score == pytest.approx(expected, rel=1e-9, abs=1e-12)


# ------------------------------------------------------------------ 4. log probabilities and KL


@given(batches, st.sampled_from([1, 10, 10**6]))
def test_token_logprobs_in_slices_of_any_size(batch, size):
    read_only(batch.model, batch.prompts, batch.responses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SLICE", size)
        logprobs = loop.token_logprobs(batch.model, batch.prompts, batch.responses)
    assert logprobs.shape == batch.responses.shape
    for b, t in everywhere(batch.mask):
        expected = slow_logprobs(batch.model, batch.sequence(b, t))[batch.responses[b, t]]
        assert logprobs[b, t] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("size", [1, 10**6])
def test_extreme_logits_stay_finite(size, monkeypatch):
    monkeypatch.setattr(loop, "SLICE", size)
    logits = np.array([[1e4, -1e4, 0], [1e4, 1e4, -1e4], [-1e4, -1e4, -2e4], [60, 90, 90], [-200, 0, 1]], np.float32)
    tokens = np.array([0, 1, 0, 2, 1])
    expected = [0, -np.log(2), -np.log(2), -np.log(2), -np.log(1 + np.e)]
    states = np.eye(5, dtype=np.float32)[None]  # (B, T, D) that select the rows of a head (D, V)
    logprobs, log_sums = loop.chosen_logprobs(states, logits, tokens[None])
    np.testing.assert_allclose(logprobs[0], expected, atol=1e-3)  # at 1e4, float32 has three decimals
    np.testing.assert_allclose(log_sums[0], np.logaddexp.reduce(np.float64(logits), axis=1), rtol=1e-6)
    ones = np.ones_like(logprobs)
    for gradient in loop.chosen_logprobs_gradients(states, logits, tokens[None], log_sums, ones):
        assert np.isfinite(gradient).all()
    sampled, logprobs = loop.sample_tokens(logits, np.random.default_rng(0))
    assert sampled[0] == 0 and set(sampled[1:3]) <= {0, 1} and set(sampled[3:]) <= {1, 2}
    distribution = np.float64(logits) - np.logaddexp.reduce(np.float64(logits), axis=1, keepdims=True)
    np.testing.assert_allclose(logprobs, distribution[np.arange(5), sampled], atol=1e-6)


def test_the_logits_of_all_tokens_are_never_held_whole(monkeypatch):
    monkeypatch.setattr(loop, "SLICE", 10_000)
    rng = np.random.default_rng(0)
    model, tokens = loop.init_model(rng, 5000, 4, 5000), rng.integers(0, 5000, size=(10, 20))
    ones = np.ones(tokens.shape, dtype=np.float32)
    whole = tokens.size * 5000 * 4  # bytes of the logits
    tracemalloc.start()
    try:
        loop.actor_gradients(model, tokens, tokens, -9 * ones, ones, ones, 0.2)
        assert tracemalloc.get_traced_memory()[1] < whole / 4
    finally:
        tracemalloc.stop()


@given(batches)
def test_exact_kl(batch):
    other, tokens = small_model(batch.rng, batch.vocab_size, batch.width), (batch.prompts, batch.responses)
    p, q = (
        np.array([slow_logprobs(model, batch.sequence(*place)) for place in everywhere(batch.mask)])
        for model in (batch.model, other)
    )  # (B * T, V) both
    logits = p.reshape(*batch.mask.shape, -1) + 5  # a shift changes no probability
    read_only(logits, other, *tokens)
    expected = (np.exp(p) * (p - q)).sum(axis=1).reshape(batch.mask.shape)
    np.testing.assert_allclose(loop.exact_kl(logits, other, *tokens), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(loop.exact_kl(logits, batch.model, *tokens), 0, atol=1e-9)


@given(batches)
def test_exact_kl_of_policies_that_are_almost_sure(batch):
    """Their logits are hundreds apart, more than exp can hold."""
    sure = {**batch.model, "head": batch.model["head"] * 1e4}
    other, tokens = {**sure, "head": sure["head"] * 0.9}, (batch.prompts, batch.responses)
    p, q = (
        np.array([slow_logprobs(model, batch.sequence(*place)) for place in everywhere(batch.mask)])
        for model in (sure, other)
    )
    assert np.ptp(p) > 2000
    expected = (np.exp(p) * (p - q)).sum(axis=1).reshape(batch.mask.shape)
    kl = loop.exact_kl(p.reshape(*batch.mask.shape, -1), other, *tokens)
    np.testing.assert_allclose(kl, expected, rtol=1e-6, atol=1e-6)


@given(st.floats(-30, 5), st.floats(-30, 5))
def test_kl_estimators(lp, ref):
    arrays = read_only(np.array([[lp]]), np.array([[ref]]))
    assert loop.kl_penalty(*arrays)[0, 0] == lp - ref
    assert loop.kl_penalty(*arrays, estimator="k1")[0, 0] == lp - ref
    assert loop.kl_penalty(*arrays, estimator="k2")[0, 0] == pytest.approx((lp - ref) ** 2 / 2, rel=1e-12)
    expected = np.exp(ref - lp) - 1 - (ref - lp)
    assert loop.kl_penalty(*arrays, estimator="k3")[0, 0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_k1_and_k3_have_the_kl_as_their_mean_and_only_k1_its_gradient():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    exact = sum(p * np.log(p / q))
    means = {each: sum(p * loop.kl_penalty(np.log(p), np.log(q), each)) for each in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(exact)
    assert means["k3"] == pytest.approx(exact)
    assert (loop.kl_penalty(np.log(p), np.log(q), "k2") >= 0).all()
    assert (loop.kl_penalty(np.log(p), np.log(q), "k3") >= 0).all()
    assert (loop.kl_penalty(np.log(p), np.log(q), "k1") < 0).any()
    # near q, log p is log q + a little x: E[grad log p * kl] for the logits is p (kl - E[kl])
    x = 1e-4 * rng.standard_normal(6)
    p = q * np.exp(x) / sum(q * np.exp(x))
    exact = p * (np.log(p / q) - sum(p * np.log(p / q)))
    for each, share in (("k1", 1), ("k2", 0), ("k3", 0)):
        kl = loop.kl_penalty(np.log(p), np.log(q), each)
        np.testing.assert_allclose(p * (kl - sum(p * kl)), share * exact, atol=1e-3 * abs(exact).max())


# ------------------------------------------------------------------ 5. rewards


@given(any_batches, st.floats(0, 3))
def test_shaped_rewards(batch, beta):
    scores, kl = batch.rng.random(len(batch.mask)), batch.normal()
    read_only(scores, kl, batch.mask)
    rewards = loop.shape_rewards(scores, kl, batch.mask, beta)
    assert_zero_at_padding(rewards, batch.mask)
    for b, last in enumerate(last_real(batch.mask)):
        for t in np.flatnonzero(batch.mask[b]):
            assert rewards[b, t] == pytest.approx(-beta * kl[b, t] + (scores[b] if t == last else 0), abs=1e-12)
        assert rewards[b].sum() == pytest.approx(scores[b] - beta * np.nansum(kl[b]), abs=1e-9)


def test_the_score_lands_on_the_last_one_of_the_mask():
    mask = np.array([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]])  # a hole, left padding, both
    rewards = loop.shape_rewards(np.array([7.0, 8.0, 9.0]), np.zeros((3, 5)), mask, 0.1)
    assert rewards.tolist() == [[0, 0, 0, 7, 0], [0, 0, 0, 0, 8], [0, 9, 0, 0, 0]]


# ------------------------------------------------------------------ 6. values and advantages


@given(batches)
def test_critic_values(batch):
    critic = one_head(batch.model)
    values = loop.critic_values(*read_only(critic, batch.prompts, batch.responses))
    assert values.shape == batch.responses.shape
    for b, t in everywhere(batch.mask):
        expected = slow_hidden(critic, batch.sequence(b, t)) @ critic["head"][:, 0]
        assert values[b, t] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(any_batches, unit, unit)
def test_gae_is_the_discounted_sum_of_td_errors(batch, gamma, lam):
    rewards, values = batch.normal(), batch.normal()
    read_only(rewards, values, batch.mask)
    advantages, returns = loop.gae(rewards, values, batch.mask, gamma, lam)
    assert_zero_at_padding(advantages, batch.mask)
    assert_zero_at_padding(returns, batch.mask)
    for b, row in enumerate(batch.mask):
        real = np.flatnonzero(row)  # without holes
        r, v = rewards[b, real], [*values[b, real], 0]
        deltas = [r[s] + gamma * v[s + 1] - v[s] for s in range(len(real))]
        for t, place in enumerate(real):
            expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(real)))
            assert advantages[b, place] == pytest.approx(expected, abs=1e-9)
            assert returns[b, place] == pytest.approx(expected + v[t], abs=1e-9)


@given(any_batches)
def test_gae_with_lambda_one_gives_the_monte_carlo_return(batch):
    rewards, values = batch.normal(), batch.normal()
    _, returns = loop.gae(rewards, values, batch.mask, 1.0, 1.0)
    for b, t in real_tokens(batch.mask):
        assert returns[b, t] == pytest.approx(np.nansum(rewards[b, t:]), abs=1e-9)


group_batches = st.builds(
    lambda seed, groups, size, length: (Batch(seed, groups * size, 1, length, holes=True), size),
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 3),
    size=st.integers(2, 5),
    length=st.integers(1, 5),
)


@given(group_batches)
def test_group_advantages(batch_and_size):
    """As verl's compute_rloo_outcome_advantage and compute_grpo_outcome_advantage have them."""
    batch, size = batch_and_size
    rewards = batch.normal()
    read_only(rewards, batch.mask)
    rloo, grpo = (loop.group_advantages(rewards, batch.mask, size, method) for method in ("rloo", "grpo"))
    totals = [sum(reward for reward in row if not np.isnan(reward)) for row in rewards]
    for advantages in (rloo, grpo):
        assert_zero_at_padding(advantages, batch.mask)
        constants = [advantages[b, t] for b, t in enumerate(last_real(batch.mask))]
        for b, t in real_tokens(batch.mask):
            assert advantages[b, t] == constants[b]
        for start in range(0, len(totals), size):
            assert sum(constants[start : start + size]) == pytest.approx(0, abs=1e-6)
    for b, t in real_tokens(batch.mask):
        start = b - b % size
        group, others = totals[start : start + size], [*totals[start:b], *totals[b + 1 : start + size]]
        assert rloo[b, t] == pytest.approx(totals[b] - statistics.fmean(others), abs=1e-9)
        expected = (totals[b] - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)
        assert grpo[b, t] == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, int])
def test_a_group_of_equal_rewards_has_nothing_to_learn(method, dtype):
    rewards = np.array([[5, 2], [7, 0], [3, 4], [1, 0], [1, 0], [0, 1]], dtype=dtype)
    advantages = loop.group_advantages(rewards, np.ones((6, 2)), 3, method)
    np.testing.assert_allclose(advantages, 0, atol=1e-9)


def test_grpo_next_to_nothing_stays_next_to_nothing():
    """The 1e-6 beside the deviation: differences far below it give advantages far below 1."""
    advantages = loop.group_advantages(np.array([[1e-9], [-1e-9]]), np.ones((2, 1)), 2, "grpo")
    np.testing.assert_allclose(advantages, [[1e-9 / (2**0.5 * 1e-9 + 1e-6)], [-1e-9 / (2**0.5 * 1e-9 + 1e-6)]])


@given(any_batches)
def test_whitening(batch):
    x = batch.normal() * 3 + 5
    white = loop.whiten(*read_only(x, batch.mask))
    assert_zero_at_padding(white, batch.mask)
    values = x[batch.mask == 1]
    if len(values) > 1:
        expected = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(white[batch.mask == 1], expected, atol=1e-9)


def test_whitening_two_numbers():
    np.testing.assert_allclose(loop.whiten(np.array([[1.0, 3.0]]), np.ones((1, 2))), [[-(0.5**0.5), 0.5**0.5]])


@pytest.mark.parametrize("x", [np.full((64, 128), 0.1, np.float32), np.full((3, 4), 7.0), np.full((1, 1), 7)])
def test_whitening_equal_values_gives_zeros(x):
    assert not loop.whiten(x, np.ones(x.shape)).any()


def test_whitening_hardly_different_values_keeps_them_small():
    """The 1e-8 beside the variance: a deviation far below 1e-4 is not blown up to 1."""
    expected = np.array([[-1, 1]]) * 1e-6 / np.sqrt(2e-12 + 1e-8)
    np.testing.assert_allclose(loop.whiten(np.array([[-1e-6, 1e-6]]), np.ones((1, 2))), expected)


# ------------------------------------------------------------------ 7. losses and Adam


@given(any_batches, st.floats(0.01, 0.99))
def test_ppo_loss(batch, clip):
    new, old, advantages = batch.normal(), batch.normal(), batch.normal()
    read_only(new, old, advantages, batch.mask)
    loss, d_new, ratio = loop.ppo_loss(new, old, advantages, batch.mask, clip)
    assert_zero_at_padding(ratio, batch.mask)
    assert_zero_at_padding(d_new, batch.mask)
    losses = []
    for b, t in real_tokens(batch.mask):
        r, a = np.exp(new[b, t] - old[b, t]), advantages[b, t]
        assert ratio[b, t] == pytest.approx(r)
        losses.append(-min(r * a, min(max(r, 1 - clip), 1 + clip) * a))
        stopped = (a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip)
        assert d_new[b, t] == pytest.approx(0 if stopped else -r * a / batch.mask.sum())
    assert loss == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e4, -1e4])
def test_junk_at_padding_costs_nothing_not_even_a_warning(junk):
    x, mask = np.array([[0.0, junk]]), np.array([[1, 0]])
    for arrays in ((x, 0 * mask, x), (0 * mask, x, x)):
        loss, d_new, ratio = loop.ppo_loss(*arrays, mask, 0.2)
        assert (loss, d_new.tolist(), ratio.tolist()) == (0, [[0, 0]], [[1, 0]])
    loss, d_values = loop.value_loss(x, x, mask)
    assert (loss, d_values.tolist()) == (0, [[0, 0]])
    assert loop.shape_rewards(np.array([2.0]), x, mask, 0.1).tolist() == [[2, 0]]
    assert [each.tolist() for each in loop.gae(x + 1, x, mask, 1.0, 1.0)] == [[[1, 0]], [[1, 0]]]
    assert loop.whiten(x, mask).tolist() == [[0, 0]]
    rewards = np.array([[1.0, junk], [3.0, junk]])
    assert loop.group_advantages(rewards, np.array([[1, 0], [1, 0]]), 2, "rloo").tolist() == [[-2, 0], [2, 0]]


@given(any_batches)
def test_value_loss(batch):
    values, returns = read_only(batch.normal(), batch.normal())
    loss, d_values = loop.value_loss(values, returns, batch.mask)
    assert_zero_at_padding(d_values, batch.mask)
    assert loss == pytest.approx(np.mean([(values[i] - returns[i]) ** 2 for i in real_tokens(batch.mask)]))
    for i in real_tokens(batch.mask):
        assert d_values[i] == pytest.approx(2 * (values[i] - returns[i]) / batch.mask.sum())


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_adam_is_algorithm_1(shape):
    rng = np.random.default_rng(0)
    start = rng.standard_normal(shape)
    params, state = {"w": start.copy(), "unused": np.ones(2)}, {}
    m = v = np.zeros(shape)
    expected = start
    for t in range(1, 4):
        (gradient,) = read_only(rng.standard_normal(shape) * 1e-7)  # so small that epsilon counts
        assert loop.adam_step(params, {"w": gradient}, state, 0.1) is None
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        expected = expected - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(params["w"], expected, rtol=1e-9)
        np.testing.assert_allclose(state["m"]["w"], m, rtol=1e-12)
        np.testing.assert_allclose(state["v"]["w"], v, rtol=1e-12)
        assert state["t"] == t
    assert (params["unused"] == 1).all()


def test_adam_changes_the_parameters_in_place():
    weights = np.ones(3)
    loop.adam_step({"w": weights}, {"w": np.array([1.0, -1.0, 0.0])}, {}, 0.1)
    np.testing.assert_allclose(weights, [0.9, 1.1, 1])


def test_adam_with_no_gradient_and_no_rate_stays_put():
    params, state = {"w": np.ones(3)}, {}
    loop.adam_step(params, {"w": np.zeros(3)}, state, 0.1)
    loop.adam_step(params, {"w": np.ones(3)}, state, 0.0)
    assert (params["w"] == 1).all()


def test_adam_takes_parameters_of_any_shape_and_refuses_what_does_not_fit():
    params = {"scalar": np.array(1.0), "none": np.zeros((0, 3)), "turned": np.ones((3, 2)).T}
    loop.adam_step(params, {name: np.ones_like(param) for name, param in params.items()}, {}, 0.1)
    assert params["scalar"] == pytest.approx(0.9)
    np.testing.assert_allclose(params["turned"], 0.9)
    with pytest.raises(ValueError, match="gradients: scalar"):
        loop.adam_step(params, {"turned": np.ones((2, 3)), "scalar": np.ones(2)}, {}, 0.1)
    np.testing.assert_allclose(params["turned"], 0.9)  # refused before anything moves


# ------------------------------------------------------------------ dtypes and refusals


@pytest.mark.parametrize("mask_type", [bool, int, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_kept(dtype, mask_type):
    batch = Batch(0, rows=4)
    model = {name: weights.astype(dtype) for name, weights in batch.model.items()}
    critic = one_head(model)
    reward_model = {**critic, "bias": np.ones(1, dtype=dtype)}
    a, b = (np.nan_to_num(batch.normal()).astype(dtype) for _ in range(2))
    mask, tokens = batch.mask.astype(mask_type), (batch.prompts, batch.responses)
    responses, generated_mask, logprobs, logits = loop.generate(model, batch.prompts, 5, batch.rng, 6)
    assert responses.dtype.kind == "i"
    gradients, _, ratio = loop.actor_gradients(model, *tokens, a, b, mask, 0.2)
    critic_gradients, _ = loop.critic_gradients(critic, *tokens, a, mask)
    reward_gradients, _ = loop.reward_gradients(critic, *tokens, mask)
    results = [
        generated_mask,
        logprobs,
        logits,
        *loop.backbone(model, batch.prompts),
        loop.score_responses(critic, *tokens, mask),
        loop.score_responses(reward_model, *tokens, mask),
        loop.token_logprobs(model, *tokens),
        *(loop.kl_penalty(a, b, estimator) for estimator in ("k1", "k2", "k3")),
        loop.shape_rewards(a[:, 0], b, mask, 0.1),
        loop.critic_values(critic, *tokens),
        *loop.gae(a, b, mask, 0.9, 0.8),
        *(loop.group_advantages(a, mask, 2, method) for method in ("rloo", "grpo")),
        loop.whiten(a, mask),
        *loop.ppo_loss(a, b, a, mask, 0.2)[1:],
        *loop.value_loss(a, b, mask)[1:],
        *loop.preference_loss(a[:, 0], b[:, 0])[1:],
        ratio,
        *gradients.values(),
        *critic_gradients.values(),
        *reward_gradients.values(),
    ]
    loop.adam_step(model, gradients, state := {}, 0.1)
    results += [*model.values(), *state["m"].values(), *state["v"].values()]
    assert {result.dtype for result in results} == {np.dtype(dtype)}


def test_settings_from_numpy_count_as_numbers():
    """A beta or a clip taken from an array is a float64, and must not turn float32 into that, nor stop a gradient."""
    x, y = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    ones = np.ones(x.shape)
    results = [
        [
            loop.shape_rewards(x[:, 0], x, ones, setting),
            *loop.gae(x, y, ones, setting, setting),
            *loop.ppo_loss(x / 9, y / 9, y, ones, setting)[1:],
        ]
        for setting in (0.3, np.float64(0.3))
    ]
    for of_python, of_numpy in zip(*results):
        assert of_numpy.dtype == np.float32
        np.testing.assert_allclose(of_numpy, of_python, rtol=1e-4, atol=1e-6)


def test_whole_numbers_count_as_float64():
    whole, mask = np.array([[0, 0, 1]]), np.ones((1, 3), dtype=int)
    advantages, returns = loop.gae(whole, 0 * whole, mask, 1.0, 0.95)
    np.testing.assert_allclose(advantages, [[0.9025, 0.95, 1]])
    np.testing.assert_allclose(returns, [[0.9025, 0.95, 1]])
    rows = np.array([[0, 1], [0, 0], [2, 1]])
    ones, tokens = np.ones((3, 2), dtype=int), np.array([0, 1, 0])
    calls = {
        "shape_rewards": lambda t: [loop.shape_rewards(t(tokens), t(rows), ones, 0.3)],
        "gae": lambda t: loop.gae(t(rows), t(rows), ones, 0.9, 0.8),
        "rloo": lambda t: [loop.group_advantages(t(rows), ones, 3, "rloo")],
        "grpo": lambda t: [loop.group_advantages(t(rows), ones, 3, "grpo")],
        "whiten": lambda t: [loop.whiten(t(rows), ones)],
        "k2": lambda t: [loop.kl_penalty(t(rows), t(rows[::-1]), "k2")],
        "k3": lambda t: [loop.kl_penalty(t(rows), t(rows[::-1]), "k3")],
        "ppo_loss": lambda t: loop.ppo_loss(t(-rows), t(-rows[::-1]), t(rows - 1), ones, 0.2),
        "value_loss": lambda t: loop.value_loss(t(rows), t(rows[::-1]), ones),
        "preference_loss": lambda t: loop.preference_loss(t(tokens), t(tokens[::-1] - 1)),
    }
    for name, call in calls.items():
        for ours, expected in zip(call(np.array), call(np.float64)):
            assert ours.dtype == np.float64, name
            np.testing.assert_array_equal(ours, expected, err_msg=name)


def empty_row():
    mask = np.ones((2, 3))
    mask[1] = 0
    return mask


def test_what_would_silently_go_wrong_is_refused():
    x, wide, column, ones = np.zeros((2, 3)), np.zeros((2, 4)), np.zeros((2, 1)), np.ones((2, 3))
    empty, nothing = np.zeros((0, 3)), np.zeros((2, 3))
    model = {"embed": np.ones((4, 2)), "mix": np.ones((2, 2)), "head": np.ones((2, 1))}
    tokens = np.zeros((2, 3), dtype=int)
    refused = {
        "ref_logprobs": [lambda: loop.kl_penalty(x, column)],
        "estimator": [lambda: loop.kl_penalty(x, x, "k4")],
        "kl": [lambda: loop.shape_rewards(x[:, 0], column, ones, 0.1)],
        "scores": [
            lambda: loop.shape_rewards(x, x, ones, 0.1),
            lambda: loop.shape_rewards(x[0], x, ones, 0.1),
            lambda: loop.shape_rewards(x[:1, 0], x, ones, 0.1),
        ],
        "rewards": [
            lambda: loop.gae(column, x, ones, 1, 1),
            lambda: loop.gae(x, x, column, 1, 1),
            lambda: loop.group_advantages(column, ones, 2, "rloo"),
            lambda: loop.group_advantages(x, column, 2, "rloo"),
            lambda: loop.group_advantages(x, ones, 1, "rloo"),
            lambda: loop.group_advantages(x, ones, 1, "grpo"),
            lambda: loop.group_advantages(x, ones, 3, "rloo"),
            lambda: loop.group_advantages(x, ones, 4, "rloo"),
        ],
        "method": [lambda: loop.group_advantages(x, ones, 2, "gae")],
        "values": [
            lambda: loop.gae(x, wide, ones, 1, 1),
            lambda: loop.gae(x, column, ones, 1, 1),
            lambda: loop.value_loss(column, x, ones),
        ],
        "returns": [lambda: loop.value_loss(x, x[0], ones), lambda: loop.value_loss(empty, empty, empty)],
        "advantages": [lambda: loop.ppo_loss(x, x, column, ones, 0.2)],
        "old_logprobs": [lambda: loop.ppo_loss(x, column, x, ones, 0.2)],
        "new_logprobs": [lambda: loop.ppo_loss(column, x, x, ones, 0.2)],
        "rejected": [
            lambda: loop.preference_loss(x[:, 0], x[:1, 0]),
            lambda: loop.preference_loss(x[:0, 0], x[:0, 0]),
        ],
        "mask": [
            lambda: loop.score_responses(model, tokens, tokens, empty_row()),
            lambda: loop.score_responses(model, tokens, tokens, ones[:, :2]),
            lambda: loop.score_responses(model, tokens, tokens, ones[:1]),
            lambda: loop.shape_rewards(x[:, 0], x, empty_row(), 0.1),
            lambda: loop.shape_rewards(x[:1, 0], x[:1], column, 0.1),
            lambda: loop.whiten(x, column + 1),
            lambda: loop.whiten(x, nothing),
            lambda: loop.whiten(empty, empty),
            lambda: loop.ppo_loss(x, x, x, column + 1, 0.2),
            lambda: loop.ppo_loss(x, x, x, nothing, 0.2),
            lambda: loop.ppo_loss(empty, empty, empty, empty, 0.2),
            lambda: loop.value_loss(x, x, column + 1),
            lambda: loop.value_loss(x, x, nothing),
            lambda: loop.actor_gradients(model, tokens, tokens, x, x, nothing, 0.2),
            lambda: loop.actor_gradients(model, tokens, tokens, x, x, column + 1, 0.2),
            lambda: loop.critic_gradients(model, tokens, tokens, x, nothing),
            lambda: loop.critic_gradients(model, tokens, tokens, x, column + 1),
        ],
    }
    for argument, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=argument):
                call()
