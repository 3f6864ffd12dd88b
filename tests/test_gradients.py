"""The hand-written gradients against automatic differentiation, in float64, with masks that really mask."""

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import elementwise_grad, grad
from conftest import Batch, one_head, read_only

import rlhf_loop_pseudo as loop

CLIP = 0.2


def hidden_states(model, tokens):
    """Hidden states after each token, as the design gives them, differentiable."""
    x = model["embed"][tokens]
    length = tokens.shape[1]
    context = anp.stack([anp.sum(x[:, : t + 1], axis=1) / anp.sqrt(t + 1.0) for t in range(length)], axis=1)
    return anp.tanh(x + anp.dot(context, model["mix"]))


def states_before(model, prompts, responses):
    """Hidden states before each response token."""
    tokens = np.concatenate([prompts, responses], axis=1)[:, :-1]
    return hidden_states(model, tokens)[:, prompts.shape[1] - 1 :]


def logprobs_of(model, prompts, responses):
    """Log probabilities of the responses, differentiable."""
    logits = anp.dot(states_before(model, prompts, responses), model["head"])
    logits = logits - anp.log(anp.sum(anp.exp(logits), axis=-1, keepdims=True))
    rows, columns = np.indices(responses.shape)
    return logits[rows, columns, responses]


def scores_of(model, prompts, responses, mask):
    """Scores of the responses, differentiable."""
    last = [prompts.shape[1] + max(np.flatnonzero(row)) for row in mask]
    states = hidden_states(model, np.concatenate([prompts, responses], axis=1))
    return anp.dot(states[np.arange(len(mask)), last], model["head"])[:, 0]


def clipped_loss(new, old, advantages, mask):
    """PPO's loss, differentiable."""
    ratio = anp.exp(new - old)
    gain = anp.minimum(ratio * advantages, anp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    return -anp.sum(gain * mask) / np.sum(mask)


def squared_error(values, returns, mask):
    """The critic's loss, differentiable."""
    return anp.sum((values - returns) ** 2 * mask) / np.sum(mask)


def bradley_terry(chosen, rejected):
    """The reward model's loss, differentiable."""
    return -anp.mean(anp.log(1 / (1 + anp.exp(-(chosen - rejected)))))


def filled(batch):
    """Random numbers of the responses' shape, real ones at padding too."""
    return batch.rng.standard_normal(batch.mask.shape)


def assert_same_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-8, atol=1e-12, err_msg=name)


def test_the_masks_really_mask(batch):
    assert 0 < batch.mask.mean() < 1


def test_ppo_loss(batch):
    new, old, advantages = filled(batch), filled(batch), filled(batch)
    loss, d_new, _ = loop.ppo_loss(new, old, advantages, batch.mask, CLIP)
    assert loss == pytest.approx(clipped_loss(new, old, advantages, batch.mask))
    expected = elementwise_grad(clipped_loss)(new, old, advantages, batch.mask)
    np.testing.assert_allclose(d_new, expected, rtol=1e-9, atol=1e-12)


def test_value_loss(batch):
    values, returns = filled(batch), filled(batch)
    loss, d_values = loop.value_loss(values, returns, batch.mask)
    assert loss == pytest.approx(squared_error(values, returns, batch.mask))
    expected = elementwise_grad(squared_error)(values, returns, batch.mask)
    np.testing.assert_allclose(d_values, expected, rtol=1e-9, atol=1e-12)


def test_preference_loss():
    chosen, rejected = 3 * np.random.default_rng(0).standard_normal((2, 9))
    loss, d_chosen, d_rejected = loop.preference_loss(*read_only(chosen, rejected))
    assert loss == pytest.approx(bradley_terry(chosen, rejected), rel=1e-9)
    np.testing.assert_allclose(d_chosen, grad(bradley_terry, 0)(chosen, rejected), rtol=1e-9)
    np.testing.assert_allclose(d_rejected, grad(bradley_terry, 1)(chosen, rejected), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 20, 50, 10**6])
def test_actor(batch, size, monkeypatch):
    monkeypatch.setattr(loop, "SLICE", size)  # a column of the vocabulary at a time, a few, all at once
    tokens, advantages, mask = (batch.prompts, batch.responses), filled(batch), batch.mask
    old = loop.token_logprobs(batch.model, *tokens) + 0.3 * filled(batch)
    read_only(batch.model, *tokens, old, advantages, mask)
    gradients, loss, ratio = loop.actor_gradients(batch.model, *tokens, old, advantages, mask, CLIP)

    def objective(model):
        return clipped_loss(logprobs_of(model, *tokens), old, advantages, mask)

    assert (np.abs(ratio[mask == 1] - 1) > CLIP).any()
    assert (np.abs(ratio[mask == 1] - 1) < CLIP).any()
    assert (ratio[mask == 0] == 0).all()
    assert loss == pytest.approx(objective(batch.model), rel=1e-9)
    np.testing.assert_allclose(ratio[mask == 1], np.exp(logprobs_of(batch.model, *tokens) - old)[mask == 1], rtol=1e-9)
    assert_same_gradients(gradients, grad(objective)(batch.model))


def test_critic(batch):
    critic = one_head(batch.model)
    tokens, returns, mask = (batch.prompts, batch.responses), filled(batch), batch.mask
    read_only(critic, *tokens, returns, mask)
    gradients, loss = loop.critic_gradients(critic, *tokens, returns, mask)

    def objective(model):
        return squared_error(anp.dot(states_before(model, *tokens), model["head"])[..., 0], returns, mask)

    assert loss == pytest.approx(objective(critic), rel=1e-9)
    assert_same_gradients(gradients, grad(objective)(critic))


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_reward_model(seed, holes):
    batch = Batch(seed, rows=6, holes=holes)
    model, data = one_head(batch.model), (batch.prompts, batch.responses, batch.mask)
    read_only(model, *data)
    gradients, loss = loop.reward_gradients(model, *data)

    def objective(model):
        scores = scores_of(model, *data)
        return bradley_terry(scores[:3], scores[3:])

    assert loss == pytest.approx(objective(model), rel=1e-9)
    assert_same_gradients(gradients, grad(objective)(model))
    swapped = [np.roll(array, 3, axis=0) for array in data]
    assert loop.reward_gradients(model, *swapped)[1] != pytest.approx(loss, rel=1e-3)


def test_padding_never_matters():
    """Other tokens, NaN and infinities after the end change no gradient, loss, ratio or score."""
    batch = Batch(0, rows=4)
    real, critic = batch.mask == 1, one_head(batch.model)
    other = np.where(real, batch.responses, batch.rng.integers(0, 7, size=real.shape))
    old, advantages = filled(batch), filled(batch)
    assert (other != batch.responses).any()
    results = []
    for responses, padding in ((batch.responses, 0), (other, np.nan), (other, np.inf)):
        tokens, padded = (batch.prompts, responses), [np.where(real, x, padding) for x in (old, advantages)]
        gradients, *rest = loop.actor_gradients(batch.model, *tokens, *padded, batch.mask, CLIP)
        for model_gradients, loss in (
            loop.critic_gradients(critic, *tokens, padded[1], batch.mask),
            loop.reward_gradients(critic, *tokens, batch.mask),
        ):
            rest += [*model_gradients.values(), loss]
        results.append([*gradients.values(), *rest, loop.score_responses(critic, *tokens, batch.mask)])
    for first, *others in zip(*results):
        for each in others:
            np.testing.assert_allclose(each, first, rtol=1e-12, atol=1e-15)


def test_one_long_sequence():
    batch = Batch(5, rows=2, prompt_length=1, response_length=30, vocab_size=3, width=4)
    tokens, advantages = (batch.prompts, batch.responses), filled(batch)
    old = loop.token_logprobs(batch.model, *tokens)
    gradients, _, _ = loop.actor_gradients(batch.model, *tokens, old, advantages, batch.mask, CLIP)
    expected = grad(lambda model: clipped_loss(logprobs_of(model, *tokens), old, advantages, batch.mask))(batch.model)
    assert_same_gradients(gradients, expected)
