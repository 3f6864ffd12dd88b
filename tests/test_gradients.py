"""The hand-written gradients against automatic differentiation, in float64, masks and all."""

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import elementwise_grad, grad

import rlhf_loop_pseudo as loop
from conftest import Batch, SlowAdam, last_real, one_head, read_only

CLIP = 0.2


def hidden_states(model, tokens):
    """Hidden states after each token, as the design gives them, differentiable."""
    x = model["embed"][tokens]
    so_far = [anp.sum(x[:, : t + 1], axis=1) / (t + 1) ** 0.5 for t in range(tokens.shape[1])]
    return anp.tanh(x + anp.dot(anp.stack(so_far, axis=1), model["context_proj"]))


def outputs_before(model, prompts, responses):
    """What the head makes of the state before each response token."""
    tokens = np.concatenate([prompts, responses], axis=1)[:, :-1]
    return anp.dot(hidden_states(model, tokens)[:, prompts.shape[1] - 1 :], model["head"])


def logprobs_of(model, prompts, responses):
    """Log probabilities of the responses, differentiable."""
    logits = outputs_before(model, prompts, responses)
    rows, columns = np.indices(responses.shape)
    return logits[rows, columns, responses] - anp.log(anp.sum(anp.exp(logits), axis=-1))


def scores_of(model, prompts, responses, mask):
    """Scores of the responses, differentiable."""
    states = hidden_states(model, np.concatenate([prompts, responses], axis=1))
    last = np.add(last_real(mask), prompts.shape[1])
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
    return anp.mean(anp.log(1 + anp.exp(rejected - chosen)))


def filled(batch):
    """Random numbers of the responses' shape, real ones at padding too."""
    return batch.rng.standard_normal(batch.mask.shape)


def assert_derivatives(ours, objective, *arguments):
    """Our loss and derivatives, a dict or an array, against those of an objective."""
    derivatives, loss = ours
    assert loss == pytest.approx(objective(*arguments), rel=1e-8)
    expected = (grad if isinstance(derivatives, dict) else elementwise_grad)(objective)(*arguments)
    if not isinstance(derivatives, dict):
        derivatives, expected = {"": derivatives}, {"": expected}
    assert derivatives.keys() == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_allclose(derivatives[name], wanted, rtol=1e-8, atol=1e-11, err_msg=name)


@pytest.fixture(params=[1, 3, 10**6, None])
def slices(request, monkeypatch):
    """A column of the vocabulary at a time, a few, all at once, and as the script has it."""

    def of_that_size(states, head):
        return [slice(v, v + request.param) for v in range(0, head.shape[1], request.param)]

    if request.param:
        monkeypatch.setattr(loop, "vocabulary_slices", of_that_size)


def test_losses(batch):
    new, old, advantages, mask = filled(batch), filled(batch), filled(batch), batch.mask
    loss, d_new, _ = loop.ppo_loss(new, old, advantages, mask, CLIP)
    assert_derivatives((d_new, loss), clipped_loss, new, old, advantages, mask)
    loss, d_values = loop.value_loss(new, old, mask)
    assert_derivatives((d_values, loss), squared_error, new, old, mask)
    loss, d_new, d_old = loop.preference_loss(*read_only(3 * new, 3 * old))
    assert_derivatives((d_new, loss), bradley_terry, 3 * new, 3 * old)
    assert_derivatives((d_old, loss), lambda x: bradley_terry(3 * new, x), 3 * old)


def test_actor(batch, slices):
    tokens, advantages, mask = (batch.prompts, batch.responses), filled(batch), batch.mask
    old = loop.token_logprobs(batch.model, *tokens) + 0.3 * filled(batch)
    read_only(batch.model, *tokens, old, advantages, mask)
    gradients, loss, ratio = loop.actor_gradients(batch.model, *tokens, old, advantages, mask, CLIP)

    def objective(model):
        return clipped_loss(logprobs_of(model, *tokens), old, advantages, mask)

    moved = abs(ratio[mask == 1] - 1)
    assert moved.min() < CLIP < moved.max()
    np.testing.assert_allclose(ratio, np.exp(logprobs_of(batch.model, *tokens) - old) * mask)
    assert_derivatives((gradients, loss), objective, batch.model)


def test_critic(batch):
    tokens, returns, mask = (batch.prompts, batch.responses), filled(batch), batch.mask
    critic = one_head(batch.model)
    read_only(critic, *tokens, returns, mask)
    assert_derivatives(
        loop.critic_gradients(critic, *tokens, returns, mask),
        lambda model: squared_error(outputs_before(model, *tokens)[..., 0], returns, mask),
        critic,
    )


def test_reward_model(batch):
    """Each response is chosen once, and once rejected for another."""
    model, data = one_head(batch.model), (batch.prompts, batch.responses, batch.mask)
    data = [np.concatenate([x, np.roll(x, 1, axis=0)]) for x in data]
    read_only(model, *data)

    def objective(model):
        scores = scores_of(model, *data)
        return bradley_terry(scores[:3], scores[3:])

    assert_derivatives(loop.reward_gradients(model, *data), objective, model)


def test_padding_never_matters():
    """Other tokens, NaN and infinity after the end change no gradient, loss, ratio or score."""
    batch = Batch(0, rows=4)
    real, critic = batch.mask == 1, one_head(batch.model)
    other = np.where(real, batch.responses, batch.rng.integers(0, 7, size=real.shape))
    assert (other != batch.responses).any()
    old, advantages = filled(batch), filled(batch)
    results = []
    for responses, junk in ((batch.responses, 0), (other, np.nan), (other, np.inf)):
        tokens = batch.prompts, responses
        padded = [np.where(real, x, junk) for x in (old, advantages)]
        scored = loop.score_responses(critic, *tokens, batch.mask)
        of_actor = loop.actor_gradients(batch.model, *tokens, *padded, batch.mask, CLIP)
        of_critic = loop.critic_gradients(critic, *tokens, padded[1], batch.mask)
        of_reward = loop.reward_gradients(critic, *tokens, batch.mask)
        parts = [scored, *of_actor, *of_critic, *of_reward]
        results.append([x for p in parts for x in (p.values() if isinstance(p, dict) else [p])])
    for first, *others in zip(*results):
        np.testing.assert_allclose(others, [first, first], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1, 1e-7])
def test_adam_is_algorithm_1(size):
    """With gradients so small that its epsilon counts, too."""
    rng, state = np.random.default_rng(0), {}
    params = {"w": rng.standard_normal((2, 3)), "b": rng.standard_normal(3)}
    expected = {name: x.copy() for name, x in params.items()}
    adams = {name: SlowAdam() for name in params}
    for rate in (0.1, 0.1, 0.05, 0.2):
        gradients = {name: size * rng.standard_normal(x.shape) for name, x in params.items()}
        loop.adam_step(params, *read_only(gradients), state, rate)
        for name, adam in adams.items():
            expected[name] = adam.step(expected[name], gradients[name], rate)
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-9)
        assert state["t"] == adam.t
