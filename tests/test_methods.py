"""What stands beside PPO: DPO, the KL in the loss, rewards of one's own, and Config's rules."""

import copy
from dataclasses import fields, replace

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import elementwise_grad

import rlhf_loop_pseudo as loop
from conftest import read_only, slow_kl
from test_gradients import CLIP, assert_derivatives, clipped_loss, filled, logprobs_of

LETTERS = loop.configure("letters", steps=4, batch_size=8, preference_pairs=64, width=8)
DPO = replace(LETTERS, method="dpo")


@pytest.fixture(scope="module")
def stages():
    """Of a small model, computed once."""
    return loop.learn_from_human(LETTERS)


def implicit_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO's loss, differentiable: -log sigmoid of the difference of the implicit rewards."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return anp.mean(anp.log(1 + anp.exp(-margin)))


def mean_kl(new, ref, mask, name):
    """The mean of an estimator over real tokens, differentiable."""
    k1 = new - ref
    return (
        anp.sum({"k1": k1, "k2": k1**2 / 2, "k3": anp.exp(-k1) - 1 + k1}[name] * mask) / mask.sum()
    )


# ------------------------------------------------------------------ losses and gradients


@pytest.mark.parametrize("beta", [0.1, np.float64(2.0)])
def test_dpo_loss_is_its_formula_and_its_derivatives(beta):
    sums = read_only(*np.random.default_rng(0).normal(scale=3, size=(4, 6)))
    loss, *derivatives = loop.dpo_loss(*sums, beta)
    assert loss == pytest.approx(implicit_loss(*sums, beta), rel=1e-12)
    for place, found in enumerate(derivatives):
        wanted = elementwise_grad(implicit_loss, place)(*sums, beta)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    narrow = [x.astype(np.float32) for x in sums]
    assert [x.dtype for x in loop.dpo_loss(*narrow, beta)[1:]] == [np.float32] * 2
    for place in range(4):
        wrong = [x[:5] if i == place else x for i, x in enumerate(sums)]
        with pytest.raises(ValueError):
            loop.dpo_loss(*wrong, beta)


def test_dpo_loss_is_the_sigmoid_loss_of_other_trainers():
    torch = pytest.importorskip("torch")
    sums = np.random.default_rng(1).normal(size=(4, 5))
    chosen, rejected, ref_chosen, ref_rejected = map(torch.tensor, sums)
    ratios, ref_ratios = chosen - rejected, ref_chosen - ref_rejected
    wanted = -torch.nn.functional.logsigmoid(0.3 * (ratios - ref_ratios)).mean()
    assert loop.dpo_loss(*sums, 0.3)[0] == pytest.approx(wanted.item(), rel=1e-12)


def test_dpo_gradients(batch):
    tokens, ref = (batch.prompts, batch.responses), filled(batch)
    mask, tokens = (
        np.concatenate([batch.mask] * 2),
        [np.concatenate([x, np.roll(x, 1, 0)]) for x in tokens],
    )
    ref = np.where(mask, np.concatenate([ref, ref + 1]), np.nan)
    read_only(batch.model, *tokens, ref, mask)

    def objective(model):
        sums = anp.sum(logprobs_of(model, *tokens) * mask, axis=1)
        halves = [*np.split(np.nan_to_num(ref).sum(axis=1), 2)]
        return implicit_loss(sums[:3], sums[3:], *halves, 0.4)

    gradients, loss = loop.dpo_gradients(batch.model, ref, *tokens, mask, 0.4)
    assert_derivatives((gradients, loss), objective, batch.model)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_loss(name, batch):
    new, ref, mask = filled(batch), filled(batch), batch.mask
    loss, d_new = loop.kl_loss(*read_only(new, ref, mask), name)
    assert_derivatives((d_new, loss), lambda x: mean_kl(x, ref, mask, name), new)
    real = mask != 0
    assert loss == pytest.approx(slow_kl(new[real], ref[real], name).mean(), rel=1e-12)
    for junk in (np.nan, np.inf):
        padded = [np.where(mask, x, junk) for x in (new, ref)]
        for found, wanted in zip(loop.kl_loss(*padded, -mask, name), (loss, d_new)):
            np.testing.assert_array_equal(found, wanted)
    assert loop.kl_loss(*np.float32([new, ref]), mask, name)[1].dtype == np.float32


def test_kl_loss_refuses_what_does_not_fit():
    x, mask = np.zeros((2, 3)), np.ones((2, 3))
    for arguments in ((x[:, :1], x, mask), (x, x[:1], mask), (x, x, mask[:1]), (x, x, 0 * mask)):
        with pytest.raises(ValueError):
            loop.kl_loss(*arguments, "k2")
    with pytest.raises(ValueError):
        loop.kl_loss(x, x, mask, "k4")


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_actor_learns_from_both_losses(name, batch):
    tokens, advantages, mask = (batch.prompts, batch.responses), filled(batch), batch.mask
    old = loop.token_logprobs(batch.model, *tokens) + 0.1 * filled(batch)
    ref = old + 0.5 * filled(batch)
    rest = (*tokens, old, advantages, mask, CLIP)

    def objective(model):
        new = logprobs_of(model, *tokens)
        return clipped_loss(new, old, advantages, mask) + 0.7 * mean_kl(new, ref, mask, name)

    both = loop.actor_gradients(batch.model, *rest, ref_logprobs=ref, beta=0.7, estimator=name)
    assert_derivatives(both[:2], objective, batch.model)
    alone = loop.actor_gradients(batch.model, *rest)
    np.testing.assert_equal(loop.actor_gradients(batch.model, *rest, ref, 0.0, name), alone)


# ------------------------------------------------------------------ DPO's loop


def test_dpo_learns_from_the_pairs_and_changes_the_actor_alone(stages):
    config = replace(DPO, steps=40, batch_size=64)
    models = loop.prepare(config, stages)
    before, pairs = copy.deepcopy(models), copy.deepcopy(stages.pairs)
    losses = list(loop.dpo_loop(models, stages.pairs, config))
    assert len(losses) == 40
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # the actor is the reference still
    assert np.mean(losses[-5:]) < np.log(2) - 0.02
    assert models.critic is None
    np.testing.assert_equal((models[1:], stages.pairs), (before[1:], pairs))
    assert all((models.actor[name] != before.actor[name]).any() for name in before.actor)
    prompts, responses, mask = pairs
    gain = [loop.token_logprobs(m, prompts, responses) for m in (models.actor, before.reference)]
    chosen, rejected = np.split(((gain[0] - gain[1]) * mask).sum(axis=1), 2)
    assert (chosen - rejected).mean() > 0.05


def test_dpo_aims_with_beta_times_the_scale_of_the_scores(stages, monkeypatch):
    betas, original = [], loop.dpo_loss
    monkeypatch.setattr(loop, "dpo_loss", lambda *x: betas.append(x[-1]) or original(*x))
    list(loop.dpo_loop(loop.prepare(DPO, stages), stages.pairs, DPO))
    std = stages.reward_model["score_std"].item()
    assert betas == [pytest.approx(DPO.beta * std)] * 4
    raw = {**stages.reward_model, "head": stages.reward_model["head"] * std}
    assert loop.score_responses(raw, *stages.pairs).std() == pytest.approx(std, rel=1e-4)


def test_dpo_has_a_loop_of_its_own(stages):
    with pytest.raises(ValueError, match="dpo_loop"):
        next(loop.core_loop(loop.prepare(DPO, stages), DPO))
    runs = []
    for rng in (None, np.random.default_rng([DPO.seed, 2])):
        models = loop.prepare(DPO, stages)
        runs.append((list(loop.dpo_loop(models, stages.pairs, DPO, rng)), models.actor))
    np.testing.assert_equal(*runs)


# ------------------------------------------------------------------ rewards


def test_the_actor_learns_a_reward_of_ones_own(stages):
    config = replace(LETTERS, steps=40, batch_size=32, beta=0.0)
    models = loop.prepare(config, stages)._replace(
        reward_model=lambda prompts, responses, mask: (responses == 4).sum(axis=1) / 4
    )
    means = [step.scores.mean() for step in loop.core_loop(models, config)]
    assert np.mean(means[-5:]) > 2 * np.mean(means[:5])


@pytest.mark.parametrize("wrong", ["shape", "nan", "raises"])
def test_a_reward_function_that_fails_changes_nothing(wrong, stages):
    def reward(prompts, responses, mask):
        scores = np.zeros(len(prompts))
        return {"shape": mask, "nan": scores * np.nan}[wrong]  # or raises KeyError

    models = loop.prepare(LETTERS, stages)._replace(reward_model=reward)
    before = copy.deepcopy(models[:2])
    with pytest.raises(KeyError if wrong == "raises" else ValueError):
        next(loop.core_loop(models, LETTERS))
    np.testing.assert_equal(models[:2], before)


def test_the_humans_rule_is_scaled_as_learned_scores_are(stages):
    config = replace(LETTERS, reward="human")
    scores = loop.score_responses(loop.prepare(config, stages).reward_model, *stages.pairs)
    assert (scores.mean(), scores.std()) == pytest.approx((0, 1), abs=1e-5)
    human = loop.human_scores(*stages.pairs, 27)
    assert np.corrcoef(scores, human)[0, 1] == pytest.approx(1, abs=1e-6)


# ------------------------------------------------------------------ from Python


def test_a_run_from_python_starts_as_a_config_by_hand(stages):
    by_hand = loop.Config(**loop.PRESETS["letters"] | {"steps": 50, "beta": 0.1})
    assert by_hand == loop.configure("letters", steps=50, beta=0.1)
    assert by_hand.start_drift == 0
    step = next(loop.core_loop(loop.prepare(replace(by_hand, width=8), stages), by_hand))
    assert abs(step.kl).max() < 1e-5
    assert replace(by_hand, drift=0.5).start_drift == 0.5


def test_stages_that_are_given_are_not_computed_again(stages, monkeypatch):
    monkeypatch.setattr(loop, "learn_from_human", lambda *_: pytest.fail("computed again"))
    models = loop.prepare(LETTERS, stages)
    assert models.reward_model is stages.reward_model
    assert models.reference is stages.reference


@pytest.mark.parametrize(
    "settings, named", [({"preset": "gpt3"}, "gpt3"), ({"advantage": "gae"}, "advantage")]
)
def test_what_is_unknown_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        loop.configure(**settings)


@pytest.mark.parametrize("item", fields(loop.Config), ids=lambda item: item.name)
def test_a_setting_has_one_type_and_a_range(item):
    name = item.name.replace("_", "-")
    wrong = {
        int: [True, 2.0, -1, "2", None],
        float: [True, "1", np.nan, -0.1, [0.5]],
        str: [1, "", None],
    }
    for value in wrong[item.type]:
        with pytest.raises(ValueError, match=f"--{name} must be"):
            loop.Config(**{item.name: value})
    right = {int: np.int64(2), float: np.float32(0.5)}
    if item.type in right:
        assert loop.Config(**{item.name: right[item.type]})
