"""Every step function against a slow, obvious definition of its formula."""

import numpy as np
import pytest
from conftest import Batch, read_only, slow_hidden, slow_logprobs, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_loop_pseudo as loop

batches = st.builds(
    Batch,
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    prompt_length=st.integers(1, 4),
    response_length=st.integers(2, 6),
    vocab_size=st.integers(2, 9),
    width=st.integers(1, 6),
)
unit = st.floats(0, 1)
quick = settings(max_examples=40, deadline=None)


def real(mask):
    """(row, position) of every real token."""
    return [(b, t) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]


def assert_zero_at_padding(x, mask):
    assert (x[mask == 0] == 0).all()


def test_prompts_use_every_token_but_the_end_token():
    prompts = loop.sample_prompts(np.random.default_rng(0), 50, 20, 5)
    assert prompts.shape == (50, 20)
    assert set(prompts.ravel()) == {0, 1, 2, 3}


def test_the_smallest_vocabulary_has_one_prompt_token():
    assert not loop.sample_prompts(np.random.default_rng(0), 3, 4, 2).any()


@quick
@given(batches)
def test_backbone(batch):
    hidden = loop.backbone(batch.model, batch.prompts)
    for b, prompt in enumerate(batch.prompts):
        for t in range(len(prompt)):
            np.testing.assert_allclose(hidden[b, t], slow_hidden(batch.model, prompt[: t + 1]), rtol=1e-9)


@quick
@given(batches)
def test_generated_logits_and_logprobs(batch):
    length, eos = batch.mask.shape[1], batch.vocab_size - 1
    read_only(batch.model, batch.prompts)
    responses, mask, logprobs, logits = loop.generate(batch.model, batch.prompts, length, batch.rng, eos)
    assert responses.shape == mask.shape == logprobs.shape == logits.shape[:2]
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
    tokens, logprobs = loop.sample_tokens(logits, np.random.default_rng(0))
    assert set(tokens) == {1, 3}
    np.testing.assert_allclose(logprobs, -np.log(2), rtol=1e-6)


def test_sampling_at_both_ends_of_the_random_numbers():
    class Ends:
        def random(self, size):
            return np.resize([0.0, 1 - 2**-53], size)

    tokens, _ = loop.sample_tokens(np.array([[-1e4, 0, 0, -1e4]] * 2, dtype=np.float32), Ends())
    assert list(tokens) == [2, 1]


@quick
@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_sampling_in_blocks_is_sampling(vocab_size, block, seed):
    logits = np.random.default_rng(seed).normal(size=(50, vocab_size)) * 3
    drawn = []
    for size in (block, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "BLOCK", size)
            drawn.append(loop.sample_tokens(logits, np.random.default_rng(seed)))
    for in_blocks, at_once in zip(*drawn):
        np.testing.assert_array_equal(in_blocks, at_once)


def test_a_long_tail_of_small_probabilities_is_not_lost():
    class End:
        def random(self, size):
            return np.zeros(size)

    logits = np.full((1, 50_000), -17, dtype=np.float32)
    logits[0, 0] = 0  # each of the others is too small to change a sum of 1 in float32
    assert loop.sample_tokens(logits, End())[0] == 49_999


@quick
@given(batches)
def test_scores(batch):
    batch.model["head"] = batch.model["head"][:, :1]
    read_only(batch.model, batch.prompts, batch.responses, batch.mask)
    scores = loop.score_responses(batch.model, batch.prompts, batch.responses, batch.mask)
    for b, score in enumerate(scores):
        logit = slow_hidden(batch.model, batch.sequence(b, int(batch.mask[b].sum()))) @ batch.model["head"][:, 0]
        assert score == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-9)


@quick
@given(batches, st.sampled_from([1, 10, 10**6]))
def test_token_logprobs_in_slices_of_any_size(batch, size):
    read_only(batch.model, batch.prompts, batch.responses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SLICE", size)
        logprobs = loop.token_logprobs(batch.model, batch.prompts, batch.responses)
    for b, t in real(np.ones_like(batch.mask)):
        expected = slow_logprobs(batch.model, batch.sequence(b, t))[batch.responses[b, t]]
        assert logprobs[b, t] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_logits_are_held_once(monkeypatch):
    monkeypatch.setattr(loop, "SLICE", 12)
    rng = np.random.default_rng(0)
    states, head = rng.random((7, 3), dtype=np.float32), rng.random((3, 4), dtype=np.float32)
    buffers = []
    for rows, logits in loop.sliced_logits(states, head):
        np.testing.assert_array_equal(logits, states[rows] @ head)
        assert logits.dtype == np.float32
        exps, _, _ = loop.exp_and_logprobs(logits, np.zeros(len(logits), dtype=int))
        buffers += [logits, exps]
    assert len(buffers) == 6
    assert all(np.shares_memory(each, buffers[0]) for each in buffers)


def test_whitening_two_numbers():
    np.testing.assert_allclose(loop.whiten(np.array([[1.0, 3.0]]), np.ones((1, 2))), [[-(0.5**0.5), 0.5**0.5]])


def test_a_small_weight_after_a_large_one_is_found():
    weights = np.array([[2.0**24, 1, 1]], dtype=np.float32)  # in float32 their sum would stay 2**24
    assert loop.invert_cumulative(weights, np.ones(1))[0] == 2


def test_a_share_is_never_rounded_to_zero():
    weights = np.array([[2.0**-10, 1 - 2.0**-10]])
    index, share = loop.invert_cumulative(weights, np.nextafter(weights[:, 0], 1))  # just past the first
    assert index == 1 and 0 < share < 1e-9
    assert loop.invert_cumulative(np.array([[0.0, 1.0]]), share)[0] == 1


@quick
@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 30))
def test_row_slices_are_even_and_never_too_large(rows, vocab_size, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SLICE", size)
        slices = loop.row_slices(rows, vocab_size)
    lengths = [part.stop - part.start for part in slices]
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
    assert max(lengths) * vocab_size <= max(size, vocab_size)
    assert len(slices) == 1 or min(lengths) > 0
    assert len(slices) <= max(1, -(-rows // max(1, size // vocab_size)))  # no more than it takes
    assert set(lengths[:-1]) <= {-(-rows // len(slices))}  # even, but for the last


@quick
@given(batches)
def test_exact_kl(batch):
    other = small_model(batch.rng, batch.vocab_size, batch.width)
    arguments = batch.prompts, batch.responses
    logits = loop.response_states(batch.model, *arguments) @ batch.model["head"]
    logprobs, ref_logprobs = (loop.token_logprobs(model, *arguments) for model in (batch.model, other))
    read_only(logits, logprobs, ref_logprobs)
    kl = loop.exact_kl(logits, logprobs, other, ref_logprobs, *arguments)
    assert (kl >= 0).all() and (loop.exact_kl(logits, logprobs, batch.model, logprobs, *arguments) >= 0).all()
    for b, t in real(np.ones_like(batch.mask)):
        p, q = (slow_logprobs(model, batch.sequence(b, t)) for model in (batch.model, other))
        assert kl[b, t] == pytest.approx(sum(np.exp(p[v]) * (p[v] - q[v]) for v in range(len(p))), rel=1e-6, abs=1e-9)


@quick
@given(st.floats(-30, 5), st.floats(-30, 5))
def test_kl_estimators(lp, ref):
    arrays = read_only(np.array([[lp]]), np.array([[ref]]))
    assert loop.kl_penalty(*arrays)[0, 0] == lp - ref
    assert loop.kl_penalty(*arrays, estimator="k1")[0, 0] == lp - ref
    assert loop.kl_penalty(*arrays, estimator="k2")[0, 0] == pytest.approx((lp - ref) ** 2 / 2, rel=1e-12)
    expected = np.exp(ref - lp) - 1 - (ref - lp)
    assert loop.kl_penalty(*arrays, estimator="k3")[0, 0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_k1_and_k3_have_the_kl_as_their_mean():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    exact = sum(p * np.log(p / q))
    for estimator in ("k1", "k3"):
        assert sum(p * loop.kl_penalty(np.log(p), np.log(q), estimator)) == pytest.approx(exact)
    assert (loop.kl_penalty(np.log(p), np.log(q), "k3") >= 0).all()
    assert (loop.kl_penalty(np.log(p), np.log(q), "k1") < 0).any()


@quick
@given(batches, st.floats(0, 3))
def test_shaped_rewards(batch, beta):
    scores, kl = batch.rng.random(len(batch.mask)), batch.normal()
    read_only(scores, kl, batch.mask)
    rewards = loop.shape_rewards(scores, kl, batch.mask, beta)
    assert_zero_at_padding(rewards, batch.mask)
    for b, row in enumerate(batch.mask):
        length = int(row.sum())
        for t in range(length):
            assert rewards[b, t] == pytest.approx(-beta * kl[b, t] + (scores[b] if t == length - 1 else 0))
        assert rewards[b].sum() == pytest.approx(scores[b] - beta * kl[b, :length].sum())


@quick
@given(batches)
def test_critic_values(batch):
    critic = {**batch.model, "head": batch.model["head"][:, :1]}
    values = loop.critic_values(*read_only(critic, batch.prompts, batch.responses))
    assert values.shape == batch.responses.shape
    for b, t in real(np.ones_like(batch.mask)):
        expected = slow_hidden(critic, batch.sequence(b, t)) @ critic["head"][:, 0]
        assert values[b, t] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@quick
@given(batches, unit, unit)
def test_gae_is_the_discounted_sum_of_td_errors(batch, gamma, lam):
    rewards, values = batch.normal(), batch.normal()
    read_only(rewards, values, batch.mask)
    advantages, returns = loop.gae(rewards, values, batch.mask, gamma, lam)
    assert_zero_at_padding(advantages, batch.mask)
    assert_zero_at_padding(returns, batch.mask)
    for b, t in real(batch.mask):
        length = int(batch.mask[b].sum())
        deltas = [
            rewards[b, s] + (gamma * values[b, s + 1] if s + 1 < length else 0) - values[b, s] for s in range(length)
        ]
        expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
        assert advantages[b, t] == pytest.approx(expected, abs=1e-9)
        assert returns[b, t] == pytest.approx(expected + values[b, t], abs=1e-9)


@quick
@given(batches)
def test_gae_with_lambda_one_gives_the_monte_carlo_return(batch):
    rewards, values = batch.normal(), batch.normal()
    _, returns = loop.gae(rewards, values, batch.mask, 1.0, 1.0)
    for b, t in real(batch.mask):
        assert returns[b, t] == pytest.approx(np.nansum(rewards[b, t:]), abs=1e-9)


@quick
@given(batches)
def test_whitening(batch):
    x = batch.normal() * 3 + 5
    white = loop.whiten(*read_only(x, batch.mask))
    assert_zero_at_padding(white, batch.mask)
    values = x[batch.mask == 1]
    if len(values) > 1:
        expected = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(white[batch.mask == 1], expected, atol=1e-9)


def test_whitening_equal_values_gives_zeros():
    for shape in ((1, 1), (3, 4)):
        assert not loop.whiten(np.full(shape, 7.0), np.ones(shape)).any()


@quick
@given(batches, st.floats(0.01, 0.99))
def test_ppo_loss(batch, clip):
    new, old, advantages = batch.normal(), batch.normal(), batch.normal()
    read_only(new, old, advantages, batch.mask)
    loss, d_new, ratio = loop.ppo_loss(new, old, advantages, batch.mask, clip)
    assert_zero_at_padding(ratio, batch.mask)
    assert_zero_at_padding(d_new, batch.mask)
    losses = []
    for b, t in real(batch.mask):
        r, a = np.exp(new[b, t] - old[b, t]), advantages[b, t]
        assert ratio[b, t] == pytest.approx(r)
        losses.append(-min(r * a, min(max(r, 1 - clip), 1 + clip) * a))
        stopped = (a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip)
        assert d_new[b, t] == pytest.approx(0 if stopped else -r * a / batch.mask.sum())
    assert loss == pytest.approx(np.mean(losses))


@quick
@given(batches)
def test_value_loss(batch):
    values, returns = read_only(batch.normal(), batch.normal())
    loss, d_values = loop.value_loss(values, returns, batch.mask)
    assert_zero_at_padding(d_values, batch.mask)
    assert loss == pytest.approx(np.mean([(values[i] - returns[i]) ** 2 for i in real(batch.mask)]))
    for i in real(batch.mask):
        assert d_values[i] == pytest.approx(2 * (values[i] - returns[i]) / batch.mask.sum())


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 40_000), (40_000, 2)])
def test_adam_is_algorithm_1(shape):
    rng = np.random.default_rng(0)
    start = rng.standard_normal(shape)
    params, state = {"w": start.copy(), "unused": np.ones(2)}, {}
    m = v = np.zeros(shape)
    expected = start
    for t in range(1, 4):
        gradient = rng.standard_normal(shape)
        gradient.flags.writeable = False
        assert loop.adam_step(params, {"w": gradient}, state, 0.1) is None
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        expected = expected - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(params["w"], expected, rtol=1e-9)
    assert state["t"] == 3
    assert (params["unused"] == 1).all()


def test_adam_with_no_gradient_and_no_rate_stays_put():
    params, state = {"w": np.ones(3)}, {}
    loop.adam_step(params, {"w": np.zeros(3)}, state, 0.1)
    loop.adam_step(params, {"w": np.ones(3)}, state, 0.0)
    assert (params["w"] == 1).all()


@pytest.mark.parametrize("mask_type", [bool, int, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_kept(dtype, mask_type):
    batch = Batch(0)
    model = {name: weights.astype(dtype) for name, weights in batch.model.items()}
    critic = {**model, "head": model["head"][:, :1]}
    a, b = (np.nan_to_num(batch.normal()).astype(dtype) for _ in range(2))
    mask, tokens = batch.mask.astype(mask_type), (batch.prompts, batch.responses)
    responses, generated_mask, logprobs, logits = loop.generate(model, batch.prompts, 5, batch.rng, 6)
    assert responses.dtype.kind == "i"
    gradients, _, ratio = loop.actor_gradients(model, *tokens, a, b, mask, 0.2)
    critic_gradients, _ = loop.critic_gradients(critic, *tokens, a, mask)
    results = [
        generated_mask,
        logprobs,
        logits,
        loop.backbone(model, batch.prompts),
        loop.score_responses(critic, *tokens, mask),
        loop.token_logprobs(model, *tokens),
        *(loop.kl_penalty(a, b, estimator) for estimator in ("k1", "k2", "k3")),
        loop.shape_rewards(a[:, 0], b, mask, 0.1),
        loop.critic_values(critic, *tokens),
        *loop.gae(a, b, mask, 0.9, 0.8),
        loop.whiten(a, mask),
        *loop.ppo_loss(a, b, a, mask, 0.2)[1:],
        loop.value_loss(a, b, mask)[1],
        ratio,
        *gradients.values(),
        *critic_gradients.values(),
    ]
    loop.adam_step(model, gradients, state := {}, 0.1)
    results += [*model.values(), *state["m"].values(), *state["v"].values()]
    assert {result.dtype for result in results} == {np.dtype(dtype)}


def test_whole_numbers_are_not_rounded_down():
    whole, mask = np.zeros((1, 3), dtype=int), np.ones((1, 3), dtype=int)
    assert loop.shape_rewards(np.array([0.7]), whole, mask, 0.1)[0, 2] == 0.7
    assert loop.shape_rewards(np.array([1]), np.full((1, 3), 0.5), mask, 1.0).tolist() == [[-0.5, -0.5, 0.5]]
    advantages, _ = loop.gae(np.array([[0, 0, 0.7]]), whole, mask, 1.0, 1.0)
    np.testing.assert_allclose(advantages, [[0.7, 0.7, 0.7]])
    advantages, _ = loop.gae(whole, np.full((1, 3), 0.5), mask, 1.0, 0.0)
    np.testing.assert_allclose(advantages, [[0, 0, -0.5]])


def test_adam_takes_parameters_of_any_shape():
    params = {"scalar": np.array(1.0), "none": np.zeros((0, 3)), "turned": np.ones((3, 2)).T}
    loop.adam_step(params, {name: np.ones_like(param) for name, param in params.items()}, {}, 0.1)
    assert params["scalar"] == pytest.approx(0.9)
    np.testing.assert_allclose(params["turned"], 0.9)
    with pytest.raises(ValueError, match="gradients: scalar"):
        loop.adam_step(params, {"turned": np.ones((2, 3)), "scalar": np.ones(2)}, {}, 0.1)
    np.testing.assert_allclose(params["turned"], 0.9)  # refused before anything moves


def test_a_ratio_that_overflows_costs_nothing_at_padding():
    x, mask = np.array([[0.0, np.inf]]), np.array([[1, 0]])
    loss, d_new, ratio = loop.ppo_loss(x, x, x, mask, 0.2)
    assert (loss, d_new.tolist(), ratio.tolist()) == (0, [[0, 0]], [[1, 0]])
    assert loop.value_loss(x, x, mask)[0] == 0


def empty_row():
    mask = np.ones((2, 3))
    mask[1] = 0
    return mask


def test_what_would_silently_go_wrong_is_refused():
    x, wide, column, ones = np.zeros((2, 3)), np.zeros((2, 4)), np.zeros((2, 1)), np.ones((2, 3))
    empty = np.zeros((0, 3))
    model = {"embed": np.ones((4, 2)), "mix": np.ones((2, 2)), "head": np.ones((2, 1))}
    tokens = np.zeros((2, 3), dtype=int)
    refused = {
        "ref_logprobs": [lambda: loop.kl_penalty(x, column)],
        "estimator": [lambda: loop.kl_penalty(x, x, "k4")],
        "kl": [lambda: loop.shape_rewards(x[:, 0], column, ones, 0.1)],
        "scores": [lambda: loop.shape_rewards(x, x, ones, 0.1), lambda: loop.shape_rewards(x[0], x, ones, 0.1)],
        "rewards": [lambda: loop.gae(column, x, ones, 1, 1)],
        "values": [lambda: loop.gae(x, wide, ones, 1, 1), lambda: loop.value_loss(column, x, ones)],
        "returns": [lambda: loop.value_loss(x, x[0], ones), lambda: loop.value_loss(empty, empty, empty)],
        "advantages": [lambda: loop.ppo_loss(x, x, column, ones, 0.2)],
        "mask": [
            lambda: loop.score_responses(model, tokens, tokens, empty_row()),
            lambda: loop.shape_rewards(x[:, 0], x, empty_row(), 0.1),
            lambda: loop.gae(x, x, column, 1, 1),
            lambda: loop.whiten(x, column),
            lambda: loop.whiten(x, np.zeros((2, 3))),
            lambda: loop.whiten(empty, empty),
            lambda: loop.ppo_loss(x, x, x, np.zeros((2, 3)), 0.2),
            lambda: loop.ppo_loss(empty, empty, empty, empty, 0.2),
            lambda: loop.actor_gradients(model, tokens, tokens, x, x, np.zeros((2, 3)), 0.2),
        ],
    }
    for argument, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=argument):
                call()


def test_extreme_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 0], [1e4, 1e4, -1e4], [-1e4, -1e4, -2e4], [60, 90, 90], [-200, 0, 1]], np.float32)
    tokens = np.array([0, 1, 0, 2, 1])
    exps, sums, logprobs = loop.exp_and_logprobs(logits.copy(), tokens)
    np.testing.assert_allclose(logprobs, [0, -np.log(2), -np.log(2), -np.log(2), -np.log(1 + np.e)], atol=1e-6)
    np.testing.assert_allclose(exps.sum(axis=1), sums)
    assert np.isfinite(sums).all() and (sums >= 1).all()
    sampled, logprobs = loop.sample_tokens(logits, np.random.default_rng(0))
    assert sampled[0] == 0 and set(sampled[1:3]) <= {0, 1} and set(sampled[3:]) <= {1, 2}
    np.testing.assert_allclose(logprobs, loop.exp_and_logprobs(logits.copy(), sampled)[2])


def test_scores_saturate():
    model = {"embed": np.full((2, 1), 100.0), "mix": np.ones((1, 1)), "head": np.array([[1e4]])}
    tokens, mask = np.zeros((1, 1), dtype=int), np.ones((1, 1))
    assert loop.score_responses(model, tokens, tokens, mask) == 1
    model["head"] *= -1
    assert loop.score_responses(model, tokens, tokens, mask) == 0
