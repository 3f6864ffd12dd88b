"""Every step's function against a slow definition of its formula, for every kind of array."""

import copy
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_loop_pseudo as loop
from conftest import (
    Batch,
    holed_mask,
    last_real,
    one_head,
    ragged_mask,
    read_only,
    real_tokens,
    slow_gae,
    slow_grpo,
    slow_hidden,
    slow_kl,
    slow_log_softmax,
    slow_logprobs,
    slow_ppo,
    slow_preference_loss,
    slow_rewards,
    slow_rloo,
    slow_value_loss,
    slow_whiten,
    small_model,
)

SHAPES = {
    "seed": st.integers(0, 2**32 - 1),
    "rows": st.integers(1, 4),
    "prompt_length": st.integers(1, 4),
    "response_length": st.integers(2, 6),
    "vocab_size": st.integers(2, 9),
    "width": st.integers(1, 6),
}
batches = st.builds(Batch, **SHAPES)
any_batches = st.builds(Batch, **SHAPES, holes=st.booleans())
close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def tupled(results):
    """One result as those of a function that has several."""
    return results if isinstance(results, tuple) else (results,)


def constant_model(logits):
    """A model whose logits are these after every text."""
    logits = np.array([logits])
    embed = np.full((logits.shape[1], 1), 20, dtype=logits.dtype)  # tanh(20) is 1
    return {"embed": embed, "context_proj": np.zeros((1, 1), dtype=logits.dtype), "head": logits}


# ------------------------------------------------------------------ arrays of every kind

STEPS = {  # (ours, slow, the arrays it takes, its settings)
    "k1": (loop.kl_penalty, slow_kl, "a b", ()),
    "k2": (loop.kl_penalty, slow_kl, "a b", ("k2",)),
    "k3": (loop.kl_penalty, slow_kl, "a b", ("k3",)),
    "shape_rewards": (loop.shape_rewards, slow_rewards, "scores a mask", (0.3,)),
    "free": (loop.shape_rewards, slow_rewards, "scores a mask", (0,)),
    "gae": (loop.gae, slow_gae, "a b mask", (1.0, 0.9)),
    "rloo": (loop.rloo_advantages, slow_rloo, "a mask", (2,)),
    "grpo": (loop.grpo_advantages, slow_grpo, "a mask", (4,)),
    "whiten": (loop.whiten, slow_whiten, "a mask", ()),
    "ppo_loss": (loop.ppo_loss, slow_ppo, "a b c mask", (0.2,)),
    "value_loss": (loop.value_loss, slow_value_loss, "a b mask", ()),
    "preference_loss": (loop.preference_loss, slow_preference_loss, "a b", ()),
}
LAYOUTS = {
    "plain": lambda x: x,
    "turned": np.asfortranarray,
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
}
FLOATS, MASKS = ["f4", "f8"], ["f4", "f8", "i1", "u1", "i8", "?"]
REWARDED = ["shape_rewards", "free", "gae", "rloo", "grpo", "whiten"]  # rewards may be whole
TYPED = [(step, dtype) for step in STEPS for dtype in FLOATS]
TYPED += [(step, dtype) for step in REWARDED for dtype in ("i1", "u1", "i8", "?")]


def numbers_of(dtype, rng, shape):
    """Numbers of a type, some too far apart for it where these are whole."""
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    low, high = {"i": (-100, 101), "u": (0, 201), "b": (0, 2)}[dtype.kind]
    return rng.integers(low, high, size=shape).astype(dtype)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 5),
    holes=st.booleans(),
    mask_type=st.sampled_from(MASKS),
    layout=st.sampled_from(list(LAYOUTS)),
    junk=st.sampled_from([np.nan, np.inf, -np.inf]),
    number=st.sampled_from([float, np.float64]),  # of the settings: as one from an array
    scale=st.floats(0.01, 1),
)
@pytest.mark.parametrize("step, dtype", TYPED)
def test_a_step_is_its_formula(
    step, dtype, seed, length, holes, mask_type, layout, junk, number, scale
):
    ours, slow, names, constants = STEPS[step]
    constants = [number(scale * x) if isinstance(x, float) else x for x in constants]
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    mask = (holed_mask if holes else ragged_mask)(rng, 4, length).astype(mask_type)
    arrays = {name: numbers_of(dtype, rng, (4, length)) for name in "abc"}
    if "mask" in names and dtype.kind == "f":
        arrays = {k: np.where(mask, x, dtype.type(junk)) for k, x in arrays.items()}
    arrays |= {"mask": mask, "scores": numbers_of(dtype, rng, 4)}
    plain = [arrays[name] for name in names.split()]
    laid_out = [LAYOUTS[layout](x) for x in plain]
    read_only(*laid_out)
    results, expected = tupled(ours(*laid_out, *constants)), tupled(slow(*plain, *constants))
    tolerance = 1e-4 if dtype == np.float32 else 1e-9
    for result, wanted in zip(results, expected, strict=True):
        assert np.shape(result) == np.shape(wanted)
        np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance)
        if np.ndim(wanted):
            assert result.dtype == (dtype if dtype.kind == "f" else np.float64)
            assert "mask" not in names or not result[mask == 0].any()


# ------------------------------------------------------------------ what was once silently wrong


def whole(dtype, *rows):
    """Arrays (1,) of a type."""
    return [np.array([row], dtype=dtype) for row in rows]


def pair(first, second):
    """Two rows of one token."""
    return np.array([[first], [second]])


TENTHS, ALL = np.full((64, 128), 0.1, np.float32), np.ones((64, 128))
AT_THE_EDGE = {  # what is computed, and what it should be, shapes included
    "equal scores": (
        lambda: loop.preference_loss(np.zeros(6), np.zeros(6)),
        (np.log(2), np.full(6, -1 / 12), np.full(6, 1 / 12)),
    ),
    "a sure choice": (
        lambda: loop.preference_loss(*whole("f8", 1e4, -1e4)),
        (0, np.zeros(1), np.zeros(1)),
    ),
    "a sure mistake": (
        lambda: loop.preference_loss(*whole("f8", -1e4, 1e4)),
        (2e4, -np.ones(1), np.ones(1)),
    ),
    "equal numbers": (lambda: loop.whiten(TENTHS, ALL), np.zeros((64, 128))),
    "a single token": (lambda: loop.whiten(7 * ALL[:1, :1], ALL[:1, :1]), np.zeros((1, 1))),
    "equal rewards": (
        lambda: loop.grpo_advantages(np.array([[5, 2], [3, 4]]), np.ones((2, 2)), 2),
        np.zeros((2, 2)),
    ),
    "the 1e-8 beside a variance of 2e-12": (
        lambda: loop.whiten(np.array([[-1e-6, 1e-6]]), np.ones((1, 2)))[0, 1],
        1e-6 / np.sqrt(2e-12 + 1e-8),
    ),
    "the 1e-6 beside a deviation of 1.4e-6": (
        lambda: loop.grpo_advantages(pair(1e-6, -1e-6), np.ones((2, 1)), 2),
        pair(1, -1) / (1 + 2**0.5),
    ),
}


@pytest.mark.parametrize("case", AT_THE_EDGE)
def test_numbers_at_the_edge(case):
    call, expected = AT_THE_EDGE[case]
    for result, wanted in zip(tupled(call()), tupled(expected), strict=True):
        assert np.shape(result) == np.shape(wanted)
        np.testing.assert_allclose(result, wanted, atol=1e-9)


# ------------------------------------------------------------------ prompts and responses


@pytest.mark.parametrize("vocab_size", [2, 5])
def test_prompts_use_every_token_but_the_end_token(vocab_size):
    prompts = loop.sample_prompts(np.random.default_rng(0), 50, 20, vocab_size)
    assert prompts.shape == (50, 20)
    assert set(prompts.ravel()) == set(range(vocab_size - 1))


@given(batches)
def test_generated_responses(batch):
    length, eos = batch.mask.shape[1], batch.vocab_size - 1
    read_only(batch.model, batch.prompts)
    results = loop.generate(batch.model, batch.prompts, length, batch.rng, eos)
    assert [result.shape for result in results] == [batch.mask.shape] * 3
    responses, mask, logprobs = results
    for b, t in real_tokens(np.ones_like(mask)):
        ended = eos in responses[b, :t]
        assert mask[b, t] == (not ended)
        assert not ended or responses[b, t] == eos
        before = [*batch.prompts[b], *responses[b, :t]]
        close(logprobs[b, t], 0 if ended else slow_logprobs(batch.model, before)[responses[b, t]])


def test_responses_follow_the_actors_distribution():
    model = small_model(np.random.default_rng(1), vocab_size=4, scale=0.5)
    prompts = np.tile([[0, 1]], (40_000, 1))
    responses, _, _ = loop.generate(model, prompts, 2, np.random.default_rng(2), 3)
    first = slow_logprobs(model, [0, 1])
    second = [slow_logprobs(model, [0, 1, token]) for token in range(3)]
    shares = np.array([*np.exp(first[:3, None] + second).flat, 0, 0, 0, np.exp(first[3])])
    counts = np.bincount(responses @ [4, 1], minlength=16)
    assert (abs(counts / 40_000 - shares) <= 5 * np.sqrt(shares / 40_000)).all()


class Given:
    """A generator whose random numbers are the least and the greatest that there are."""

    def random(self, size):
        return np.resize([0.0, 1 - 2**-53], size)


def test_a_long_tail_of_small_probabilities_is_not_lost():
    logits = np.full(50_000, -18, dtype=np.float32)
    logits[0] = 0  # each of the others is too small to change a sum of 1 in float32
    tokens, _, _ = loop.generate(constant_model(logits), pair(1, 1), 1, Given(), 49_999)
    assert sorted(tokens[:, 0] > 0) == [False, True]


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0], [-1e4, -1e4, -2e4], [60, 90, 90], [-200, 0, 1]])
def test_extreme_logits_stay_finite_and_what_has_no_probability_is_never_sampled(logits):
    model, ones = constant_model(np.float32(logits)), np.ones((1, 3))
    prompts, tokens = np.array([[0]]), np.array([[0, 1, 2]])
    expected = slow_log_softmax(logits)
    np.testing.assert_allclose(loop.token_logprobs(model, prompts, tokens), [expected], atol=2e-3)
    old = expected[None].astype(np.float32)
    gradients, loss, _ = loop.actor_gradients(model, prompts, tokens, old, ones, ones, 0.2)
    assert loss == pytest.approx(-1, abs=1e-2)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    for rng in (np.random.default_rng(0), Given()):
        sampled, _, logprobs = loop.generate(model, np.zeros((99, 1), int), 1, rng, 2)
        np.testing.assert_allclose(logprobs, expected[sampled], atol=1e-5)
        assert (expected[sampled] > -50).all()


@given(any_batches, st.sampled_from([None, 0.0, 2.5]))
def test_scores(batch, bias):
    model, data = one_head(batch.model), (batch.prompts, batch.responses, batch.mask)
    if bias is not None:
        model["bias"] = np.array([bias])
    read_only(model, *data)
    expected = [
        slow_hidden(model, batch.sequence(b, last + 1)) @ model["head"][:, 0] + (bias or 0)
        for b, last in enumerate(last_real(batch.mask))
    ]
    close(loop.score_responses(model, *data), expected)


@given(batches)
def test_log_probabilities_and_values(batch):
    tokens, critic = (batch.prompts, batch.responses), one_head(batch.model)
    read_only(batch.model, critic, *tokens)
    logprobs = loop.token_logprobs(batch.model, *tokens)
    values = loop.critic_values(critic, *tokens)
    assert logprobs.shape == values.shape == batch.responses.shape
    for b, t in real_tokens(np.ones_like(batch.mask)):
        before = batch.sequence(b, t)
        close(logprobs[b, t], slow_logprobs(batch.model, before)[batch.responses[b, t]])
        close(values[b, t], slow_hidden(critic, before) @ critic["head"][:, 0])


@given(batches, st.sampled_from([1, 1e4]))
def test_exact_kl(batch, sureness):
    """Of policies that are almost sure, too: their logits are more apart than exp can hold."""
    actor = {**batch.model, "head": batch.model["head"] * sureness}
    other = {**actor, "head": actor["head"] * 0.9}
    tokens, shape = (batch.prompts, batch.responses), batch.mask.shape
    texts = [batch.sequence(*place) for place in real_tokens(np.ones(shape))]
    p, q = (np.array([slow_logprobs(model, t) for t in texts]) for model in (actor, other))
    read_only(actor, other, *tokens)
    expected = (np.exp(p) * (p - q)).sum(axis=1).reshape(shape)
    close(loop.exact_kl(actor, other, *tokens), expected, rtol=1e-6, atol=1e-6)
    close(loop.exact_kl(actor, actor, *tokens), 0, atol=1e-6)


def test_the_logits_of_all_tokens_are_never_held_whole():
    rng = np.random.default_rng(0)
    model, tokens = loop.init_model(rng, 20_000, 4, 20_000), rng.integers(0, 20_000, size=(50, 20))
    ones = np.ones(tokens.shape, dtype=np.float32)
    tracemalloc.start()
    loop.actor_gradients(model, tokens, tokens, -10 * ones, ones, ones, 0.2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < tokens.size * 20_000 * 4 / 4  # a quarter of the logits' bytes


# ------------------------------------------------------------------ types of models and tokens


def model_results(model, prompts, responses, mask, numbers):
    """By name, what every function of a model and tokens returns."""
    head, tokens = one_head(model), (prompts, responses)
    logprobs = loop.token_logprobs(model, *tokens)
    old = logprobs - numbers / 10  # no ratio is near the clip
    gradients, _, ratio = loop.actor_gradients(model, *tokens, old, numbers, mask, 0.9)
    critic_gradients, _ = loop.critic_gradients(head, *tokens, numbers, mask)
    reward_gradients, _ = loop.reward_gradients(head, *tokens, mask)
    _, _, sampled = loop.generate(constant_model(model["head"][0]), prompts, 1, Given(), 127)
    return {
        "logprobs": logprobs,
        "ratio": ratio,
        "values": loop.critic_values(head, *tokens),
        "scores": loop.score_responses(head, *tokens, mask),
        "sampled": sampled,
        **{f"actor {name}": gradient for name, gradient in gradients.items()},
        **{f"critic {name}": gradient for name, gradient in critic_gradients.items()},
        **{f"reward {name}": gradient for name, gradient in reward_gradients.items()},
    }


WIDE = Batch(0, rows=4, vocab_size=128, width=520)  # token * width is beyond 16 bits
NUMBERS = np.nan_to_num(WIDE.normal()).clip(-2, 2)
TOKENS = WIDE.prompts, WIDE.responses


@pytest.fixture(scope="module")
def of_int64():
    return model_results(WIDE.model, *TOKENS, WIDE.mask, NUMBERS)


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "u8", ">i4"])
def test_tokens_of_every_type(kind, of_int64):
    texts, mask = [x.astype(kind) for x in TOKENS], WIDE.mask.astype(kind)
    results = model_results(WIDE.model, *texts, mask, NUMBERS)
    human = loop.human_scores(*texts, mask, 128)
    close(human, loop.human_scores(*TOKENS, WIDE.mask, 128))
    mixed = loop.token_logprobs(WIDE.model, texts[0], TOKENS[1])
    close(mixed, of_int64["logprobs"])
    for name, expected in of_int64.items():
        np.testing.assert_allclose(results[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("mask_type", [bool, np.int8, np.float32, np.float64])
@pytest.mark.parametrize("dtype, tolerance", [("f4", 1e-4), ("f8", 1e-9)])
def test_the_type_of_a_model_is_kept(dtype, tolerance, mask_type):
    batch = Batch(0, rows=4)
    numbers = np.nan_to_num(batch.normal()).clip(-2, 2)
    data = batch.prompts, batch.responses
    exact = model_results(batch.model, *data, batch.mask, numbers)
    model = {name: weights.astype(dtype) for name, weights in batch.model.items()}
    results = model_results(model, *data, batch.mask.astype(mask_type), numbers.astype(dtype))
    for name, expected in exact.items():
        assert results[name].dtype == dtype, name
        scale = abs(expected).max()
        np.testing.assert_allclose(
            results[name], expected, rtol=tolerance, atol=tolerance * scale, err_msg=name
        )
    _, mask, logprobs = loop.generate(model, batch.prompts, 5, batch.rng, 6)
    assert mask.dtype == logprobs.dtype == dtype


# ------------------------------------------------------------------ Adam


def test_adam_changes_only_what_has_a_gradient_and_in_place():
    """Scalars, empty and turned arrays too."""
    params = {"w": np.ones(3), "scalar": np.array(1.0), "none": np.zeros((0, 3))}
    params |= {"turned": np.ones((3, 2)).T, "unused": np.ones(2)}
    before, state = dict(params), {}
    gradients = {name: np.ones_like(params[name]) for name in ("scalar", "none", "turned")}
    gradients["w"] = np.array([1.0, -1.0, 0.0])
    read_only(gradients)
    assert loop.adam_step(params, gradients, state, 0.1) is None
    loop.adam_step(params, gradients, state, 0.0)
    assert all(params[name] is before[name] for name in params)
    moved = {"w": np.array([0.9, 1.1, 1]), "scalar": np.array(0.9), "none": np.zeros((0, 3))}
    moved |= {"turned": np.full((2, 3), 0.9), "unused": np.ones(2)}
    for name, wanted in moved.items():
        assert params[name].shape == wanted.shape
        close(params[name], wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gradient_type", FLOATS)
@pytest.mark.parametrize("rate", [0.25, np.float64(0.25)])
def test_adam_keeps_the_type_of_the_parameters(dtype, gradient_type, rate):
    params, state = {"w": np.ones(2, dtype)}, {}
    gradient = np.array([1e-4, -1e-4]).astype(gradient_type)
    loop.adam_step(params, {"w": gradient}, state, rate)
    assert params["w"].dtype == dtype
    np.testing.assert_allclose(params["w"], 1 - 0.25 * np.sign(gradient), rtol=1e-3)


@pytest.mark.parametrize("updates", [0, 1])
def test_adam_refuses_before_anything_moves(updates):
    params, state = {"a": np.ones(3), "b": np.ones(1), "late": np.ones(2)}, {}
    for _ in range(updates):
        loop.adam_step(params, {"a": np.ones(3)}, state, 0.1)
    before, start = copy.deepcopy(params), copy.deepcopy(state)
    wrong = {"b": np.ones(2), "unknown": np.ones(2)}
    wrong |= {"late": np.ones(2)} if updates else {}  # new after the first update
    for name, gradient in wrong.items():
        with pytest.raises(ValueError, match=name):
            loop.adam_step(params, {"a": np.ones(3), name: gradient}, state, 0.1)
    np.testing.assert_equal((params, state), (before, start))


def test_adam_keeps_its_two_means_apart():
    state, gradients = {}, {"a": np.ones(2), "b": np.ones(2)}
    loop.adam_step({"a": np.ones(2), "b": np.ones(2)}, gradients, state, 0.1)
    arrays = [*state["m"].values(), *state["v"].values(), *gradients.values()]
    shared = [np.shares_memory(x, y) for i, x in enumerate(arrays) for y in arrays[:i]]
    assert not any(shared)


# ------------------------------------------------------------------ refusals

X, FULL = np.zeros((4, 3)), np.ones((4, 3))
TEXTS = [np.zeros((4, 3), dtype=int)] * 2
FOUR = {"embed": np.ones((4, 2)), "context_proj": np.ones((2, 2)), "head": np.ones((2, 4))}
HEAD = one_head(FOUR)
MASKS = [FULL[:, :1], FULL[:1], FULL[:, :2], FULL[0], 0 * FULL]
OF_TEXTS = [  # and the masks that they refuse: of scores, an empty row as well
    (lambda *texts, mask=FULL: loop.actor_gradients(FOUR, *texts, X, X, mask, 0.2), MASKS),
    (lambda *texts, mask=FULL: loop.critic_gradients(HEAD, *texts, X, mask), MASKS),
    (partial(loop.reward_gradients, HEAD, mask=FULL), [*MASKS, np.tril(FULL, -1)]),
    (partial(loop.score_responses, HEAD, mask=FULL), [*MASKS, np.tril(FULL, -1)]),
    (partial(loop.critic_values, HEAD), []),
    (partial(loop.token_logprobs, FOUR), []),
]


def assert_refused(call, *arguments, **named):
    """By a sentence of our own, or by numpy where the shapes do not fit at all."""
    with pytest.raises(ValueError, match=r"\w+ .+ \w+"):
        call(*arguments, **named)


@pytest.mark.parametrize("step", STEPS)
def test_arrays_that_do_not_fit_are_refused(step):
    """Above all those that numpy would stretch until they do."""
    ours, _, names, constants = STEPS[step]
    right = [{"mask": FULL, "scores": X[:, 0]}.get(name, X) for name in names.split()]
    wrong = [X[:, :1], X[:1], X[0], X[0, :1], X[:, :2], X[:0]]
    if step == "free":
        wrong = wrong[:-1]  # no score and no row is a batch of none
    for place in range(len(right)):
        for array in wrong:
            assert_refused(ours, *right[:place], array, *right[place + 1 :], *constants)
    if step in ("shape_rewards", "whiten", "ppo_loss", "value_loss"):
        assert_refused(ours, *right[:-1], np.tril(FULL, -1) * (step == "shape_rewards"), *constants)
    if step in ("preference_loss", "whiten", "ppo_loss", "value_loss"):
        assert_refused(ours, *[array[:0] for array in right], *constants)


@pytest.mark.parametrize("call, masks", OF_TEXTS)
def test_texts_and_masks_that_do_not_fit_are_refused(call, masks):
    """What is no token of the model, shapes that differ, nothing at all."""
    prompts, responses = TEXTS
    wrong = [(prompts[:, :0], responses), (prompts[:0], responses[:0]), (prompts[:1], responses)]
    wrong += [(prompts[0], responses[0]), (prompts, responses[0])]
    for token in (4, -1, 0.0, False):
        bad = np.where([0, 0, 1], token, np.zeros((4, 3), dtype=type(token)))
        wrong += [(bad, responses), (prompts, bad)]
    for texts in wrong:
        assert_refused(call, *texts)
    for mask in masks:
        assert_refused(call, *TEXTS, mask=mask)


def test_other_things_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    for prompts in ([[4]], [[-1]], [[0.0]], [[False]], [0], np.zeros((0, 2), int)):
        assert_refused(loop.generate, FOUR, np.array(prompts), 2, rng, 3)
    for size in (-2, 0, 1, 3, 8):
        assert_refused(loop.rloo_advantages, X, FULL, size)
        assert_refused(loop.grpo_advantages, X, FULL, size)
    assert_refused(loop.kl_penalty, X, X, "k4")
    assert_refused(loop.exact_kl, FOUR, FOUR, TEXTS[0][:1], TEXTS[1])
    assert_refused(loop.human_scores, TEXTS[0][:1], TEXTS[1][:1], FULL[:3], 4)
    assert_refused(loop.human_scores, *TEXTS, FULL[:, :1], 4)
    assert_refused(loop.human_scores, TEXTS[0][:1], TEXTS[1], FULL, 4)
