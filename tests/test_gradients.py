"""The hand-written gradients against automatic differentiation, in float64, with masks that really mask."""

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import elementwise_grad, grad
from conftest import Batch, read_only

import rlhf_loop_pseudo as loop

CLIP = 0.2


def states(model, prompts, responses):
    """Hidden states before each response token, as the design gives them, differentiable."""
    tokens = np.concatenate([prompts, responses], axis=1)[:, :-1]
    x = model["embed"][tokens]
    length = tokens.shape[1]
    context = anp.stack([anp.sum(x[:, : t + 1], axis=1) / anp.sqrt(t + 1.0) for t in range(length)], axis=1)
    return anp.tanh(x + anp.dot(context, model["mix"]))[:, prompts.shape[1] - 1 :]


def logprobs_of(model, prompts, responses):
    """Log probabilities of the responses, differentiable."""
    logits = anp.dot(states(model, prompts, responses), model["head"])
    logits = logits - anp.log(anp.sum(anp.exp(logits), axis=-1, keepdims=True))
    rows, columns = np.indices(responses.shape)
    return logits[rows, columns, responses]


def clipped_loss(new, old, advantages, mask):
    """PPO's loss, differentiable."""
    ratio = anp.exp(new - old)
    gain = anp.minimum(ratio * advantages, anp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    return -anp.sum(gain * mask) / np.sum(mask)


def squared_error(values, returns, mask):
    """The critic's loss, differentiable."""
    return anp.sum((values - returns) ** 2 * mask) / np.sum(mask)


def filled(batch):
    """Random numbers of the responses' shape, real ones at padding too."""
    return batch.rng.standard_normal(batch.mask.shape)


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
    _, d_values = loop.value_loss(values, returns, batch.mask)
    expected = elementwise_grad(squared_error)(values, returns, batch.mask)
    np.testing.assert_allclose(d_values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 20, 10**6])
def test_actor(batch, size, monkeypatch):
    monkeypatch.setattr(loop, "SLICE", size)  # a row at a time, a few, all at once
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
    expected = grad(objective)(batch.model)
    assert gradients.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-8, atol=1e-12)


def test_critic(batch):
    critic = {**batch.model, "head": batch.model["head"][:, :1]}
    tokens, returns, mask = (batch.prompts, batch.responses), filled(batch), batch.mask
    read_only(critic, *tokens, returns, mask)
    gradients, loss = loop.critic_gradients(critic, *tokens, returns, mask)

    def objective(model):
        return squared_error(anp.dot(states(model, *tokens), model["head"])[..., 0], returns, mask)

    assert loss == pytest.approx(objective(critic), rel=1e-9)
    expected = grad(objective)(critic)
    assert gradients.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-8, atol=1e-12)


def test_padding_never_matters(batch):
    """Other tokens, NaN and infinities at padding change no gradient, loss, ratio or score."""
    real, critic = batch.mask == 1, {**batch.model, "head": batch.model["head"][:, :1]}
    other = np.where(real, batch.responses, batch.rng.integers(0, 7, size=real.shape))
    old, advantages = filled(batch), filled(batch)
    assert (other != batch.responses).any()
    results = []
    for responses, padding in ((batch.responses, 0), (other, np.nan), (other, np.inf)):
        padded = [np.where(real, x, padding) for x in (old, advantages)]
        gradients, *rest = loop.actor_gradients(batch.model, batch.prompts, responses, *padded, batch.mask, CLIP)
        values, loss = loop.critic_gradients(critic, batch.prompts, responses, padded[1], batch.mask)
        scores = loop.score_responses(critic, batch.prompts, responses, batch.mask)
        results.append([*gradients.values(), *rest, *values.values(), loss, scores])
    for first, *others in zip(*results):
        for each in others:
            np.testing.assert_allclose(each, first, rtol=1e-12, atol=1e-15)


def test_one_long_sequence():
    batch = Batch(5, rows=2, prompt_length=1, response_length=30, vocab_size=3, width=4)
    tokens, advantages = (batch.prompts, batch.responses), filled(batch)
    old = loop.token_logprobs(batch.model, *tokens)
    gradients, _, _ = loop.actor_gradients(batch.model, *tokens, old, advantages, batch.mask, CLIP)
    expected = grad(lambda model: clipped_loss(logprobs_of(model, *tokens), old, advantages, batch.mask))(batch.model)
    for name in expected:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-8, atol=1e-12)
