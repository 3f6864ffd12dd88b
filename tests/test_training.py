"""The loop: what it leaves alone, what it learns, and how close it comes to the exact optimum."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from conftest import slow_logprobs

import rlhf_loop_pseudo as loop

SMALL = loop.Config(batch_size=3, prompt_length=4, response_length=5, vocab_size=6, width=8, learning_rate=0.02)


def start(config):
    """Models and generator as the command line makes them."""
    rng = np.random.default_rng(config.seed)
    return loop.init_models(config, rng), rng


def walk(config):
    """All arrays of one step, and the models after it."""
    models, rng = start(config)
    data = {}
    for stage in loop.walk_through(models, config, rng):
        data.update(stage)
    return data, models


def same(first, second):
    """Whether two models are the same bit for bit."""
    return all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_actor_and_critic_learn_and_the_others_are_frozen():
    before, _ = start(SMALL)
    _, after = walk(SMALL)
    for name in ("reward_model", "reference"):
        assert same(getattr(before, name), getattr(after, name))
    for name in ("actor", "critic"):
        for weights in ("embed", "mix", "head"):
            assert (getattr(before, name)[weights] != getattr(after, name)[weights]).any()


def test_the_models_start_from_one_backbone():
    models, _ = start(replace(SMALL, drift=0.0))
    for model in models:
        for weights in ("embed", "mix"):
            np.testing.assert_array_equal(model[weights], models.reference[weights])
            assert model is models.reference or not np.shares_memory(model[weights], models.reference[weights])
    assert same(models.actor, models.reference)
    assert not models.critic["head"].any()
    assert all(weights.dtype == np.float32 for model in models for weights in model.values())


def test_drift_moves_the_actor_in_proportion():
    (none, _), (half, _), (whole, _) = (start(replace(SMALL, drift=drift)) for drift in (0.0, 0.5, 1.0))
    for name in ("embed", "mix", "head"):
        reference = none.reference[name]
        np.testing.assert_allclose(
            whole.actor[name] - reference, 2 * (half.actor[name] - reference), rtol=1e-4, atol=1e-5
        )
        assert 0.5 < (whole.actor[name] - reference).std() / reference.std() < 2
    np.testing.assert_allclose(whole.critic["head"], 2 * half.critic["head"], rtol=1e-5)


def test_a_fresh_run_has_no_kl_and_no_values():
    data, _ = walk(replace(SMALL, drift=0.0))
    np.testing.assert_allclose(data["kl"], 0, atol=1e-5)
    np.testing.assert_allclose(data["exact_kl"], 0, atol=1e-5)
    assert not data["values"].any()


def test_initial_weights_have_the_stated_deviation():
    model = loop.init_model(np.random.default_rng(0), 2000, 100, 50, scale=2.0)
    assert [weights.shape for weights in model.values()] == [(2000, 100), (100, 100), (100, 50)]
    for name, deviation in (("embed", 0.1), ("mix", 0.5), ("head", 0.2)):
        assert model[name].std() == pytest.approx(deviation, rel=0.03)
        assert model[name].mean() == pytest.approx(0, abs=0.02 * deviation + 0.005)


def test_the_four_models_start_as_stated():
    config = loop.Config(vocab_size=500, width=100, drift=0.5)
    models, _ = start(config)
    assert models.reward_model["head"].shape == models.critic["head"].shape == (100, 1)
    shift = models.actor["head"] - models.reference["head"]
    for weights, deviation in (
        (models.reference["head"], 0.2),
        (shift, 0.1),
        (models.reward_model["head"], 0.3),
        (models.critic["head"], 0.05),
    ):
        assert weights.std() == pytest.approx(deviation, rel=0.15)
    # a model's plain head has deviation 1 / sqrt(width), and the actor moves by + drift * a second draw
    rng = np.random.default_rng(config.seed)
    assert loop.init_model(rng, 500, 100, 500)["head"].std() == pytest.approx(0.1, rel=0.03)
    noise = loop.init_model(rng, 500, 100, 500, scale=2.0)["head"]
    np.testing.assert_allclose(shift, 0.5 * noise, atol=1e-6)
    assert loop.init_head(rng, 100, 500).std() == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_the_ratio_is_one_in_the_first_epoch_and_leaves_it(seed):
    data, _ = walk(replace(SMALL, seed=seed))
    real = data["mask"] == 1
    np.testing.assert_allclose(data["ratio"][0][real], 1, atol=1e-5)
    assert np.abs(data["ratio"][1][real] - 1).max() > 1e-3
    assert np.abs(data["actor_loss"][0]) < 1e-5
    assert data["actor_loss"][-1] < data["actor_loss"][0]


def test_every_array_of_a_step_follows_from_the_others():
    for estimator, beta, gamma, lam in (("k1", 0.02, 1.0, 0.95), ("k2", 0.5, 0.9, 0.5), ("k3", 0.0, 0.0, 1.0)):
        config = replace(SMALL, kl_estimator=estimator, beta=beta, gamma=gamma, lam=lam)
        data, _ = walk(config)
        check_formulas(data, config)


def check_formulas(data, config):
    """That the arrays of a walk-through satisfy every formula on its screen."""
    mask, n = data["mask"], data["mask"].sum()
    lp, ref = data["old_logprobs"], data["ref_logprobs"]
    lengths = mask.sum(axis=1).astype(int)
    responses, eos = data["responses"], config.vocab_size - 1
    for row, length in zip(responses, lengths):
        assert eos not in row[: length - 1]
        assert (row[length:] == eos).all()
        assert length == config.response_length or row[length - 1] == eos
    for name in ("old_logprobs", "ref_logprobs", "kl", "exact_kl", "rewards", "values", "advantages", "returns"):
        assert (data[name][mask == 0] == 0).all()
    kl = {"k1": lp - ref, "k2": (lp - ref) ** 2 / 2, "k3": np.exp(ref - lp) - 1 - (ref - lp)}[config.kl_estimator]
    np.testing.assert_allclose(data["kl"], kl, atol=1e-4, rtol=1e-4)
    assert data["mean_kl"] == pytest.approx(kl.sum() / n, abs=1e-4)
    assert (data["exact_kl"] > -1e-4).all()
    rewards = -config.beta * data["kl"]
    rewards[np.arange(len(mask)), lengths - 1] += data["scores"]
    np.testing.assert_allclose(data["rewards"], rewards, atol=1e-5)
    np.testing.assert_allclose(data["total_rewards"], rewards.sum(axis=1), atol=1e-4)
    np.testing.assert_allclose(data["kl_per_response"], data["kl"].sum(axis=1), atol=1e-5)
    advantages, returns = loop.gae(data["rewards"], data["values"], mask, config.gamma, config.lam)
    np.testing.assert_allclose(data["advantages"], advantages, atol=1e-6)
    np.testing.assert_allclose(data["returns"], returns, atol=1e-6)
    shifted = np.hstack([data["values"][:, 1:], np.zeros((len(mask), 1))])
    np.testing.assert_allclose(
        data["td_errors"], (data["rewards"] + config.gamma * shifted - data["values"]) * mask, atol=1e-5
    )
    assert data["whitened"].sum() == pytest.approx(0, abs=1e-3)
    if advantages[mask == 1].std() > 1e-3:
        assert (data["whitened"] ** 2).sum() / max(n - 1, 1) == pytest.approx(1, abs=1e-2)
    ratio, white = data["ratio"], data["whitened"]
    clipped = np.clip(ratio, 1 - config.clip, 1 + config.clip)
    losses = [-np.minimum(r * white, c * white)[mask == 1].mean() for r, c in zip(ratio, clipped)]
    np.testing.assert_allclose(data["actor_loss"], losses, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(ratio[0], mask, atol=1e-5)
    stopped = ((ratio < 1 - config.clip) & (white < 0)) | ((ratio > 1 + config.clip) & (white > 0))
    for name in ("old_logprobs", "ref_logprobs", "kl", "values", "advantages", "whitened"):
        np.testing.assert_allclose(data[f"mean_{name}"], data[name][mask == 1].mean(), rtol=1e-4, atol=1e-5)
    for name in ("scores", "total_rewards"):
        assert data[f"mean_{name}"] == data[name].mean()
    np.testing.assert_array_equal(data["clipped"], stopped)
    np.testing.assert_allclose(data["clip_fraction"], stopped.sum(axis=(1, 2)) / n)
    first = ((data["values"] - data["returns"]) ** 2).sum() / n
    assert data["critic_loss"][0] == pytest.approx(first, rel=1e-4)
    for name, pick in (("ratio_min", np.min), ("ratio_max", np.max)):
        np.testing.assert_allclose(data[name], [pick(r[mask == 1]) for r in ratio])


def test_the_exact_kl_is_that_of_the_models_before_the_update():
    before, _ = start(SMALL)
    data, _ = walk(SMALL)
    for b, t in zip(*np.nonzero(data["mask"])):
        tokens = [*data["prompts"][b], *data["responses"][b, :t]]
        p, q = (slow_logprobs(model, tokens) for model in (before.actor, before.reference))
        assert data["exact_kl"][b, t] == pytest.approx(np.exp(p) @ (p - q), abs=1e-4)
    real = data["mask"] == 1
    assert data["mean_exact_kl"] == pytest.approx(data["exact_kl"][real].mean(), rel=1e-4)
    assert data["kl_error"] == pytest.approx(data["kl"][real].std() / real.sum() ** 0.5, rel=1e-4)
    assert data["negative_fraction"] == (data["old_logprobs"] < data["ref_logprobs"])[real].mean()


def test_theory_keeps_its_order_at_any_beta():
    config = replace(SMALL, drift=2.0)
    models, _ = start(config)
    for beta in (0.0, 0.001, 0.1, 1.0, 100.0):
        gain = loop.attainable_gain(
            models.actor, models.reference, models.reward_model, replace(config, beta=beta), np.random.default_rng(0)
        )
        assert gain["kl"] > 0
        assert max(gain["J_start"], gain["J"]) <= gain["J_star"]


def test_passes_are_those_that_happen(monkeypatch):
    config, counted = replace(SMALL, ppo_epochs=3), {}
    models, rng = start(config)
    names = {id(model["head"]): name for name, model in models._asdict().items()}

    def count(function, kind):
        original = getattr(loop, function)

        def counting(model, *rest, **options):
            key = names[id(model["head"])], kind
            counted[key] = counted.get(key, 0) + 1
            return original(model, *rest, **options)

        monkeypatch.setattr(loop, function, counting)

    for function in ("generate", "backbone_and_context"):
        count(function, "forward")
    count("backbone_gradients", "backward")
    for _ in loop.core_loop(models, config, rng):
        pass
    expected = {
        (name, kind): n for name, pair in loop.passes(config).items() for kind, n in zip(("forward", "backward"), pair)
    }
    assert counted == {key: n for key, n in expected.items() if n}


def test_the_rate_falls_linearly_to_zero():
    config = replace(SMALL, steps=4)
    rates = [metrics["lr"] for metrics, _ in loop.train(*[start(config)[0], config, np.random.default_rng(0)])]
    np.testing.assert_allclose(rates, [0.02, 0.015, 0.01, 0.005])


def test_metrics_are_those_of_their_names(monkeypatch):
    config, models, rng = replace(SMALL, steps=2, beta=0.3), *start(replace(SMALL, steps=2))
    seen, original = [], loop.step_metrics
    monkeypatch.setattr(loop, "step_metrics", lambda data, *rest: seen.append(data) or original(data, *rest))
    history = list(loop.train(models, config, rng))
    for step, (data, (metrics, response)) in enumerate(zip(seen, history)):
        mask = data["mask"] == 1
        assert response.tolist() == data["responses"][0, : mask[0].sum()].tolist()
        kl, score = data["kl"].sum(axis=1).mean(), data["scores"].mean()
        assert data["logits"] is None
        expected = {
            "objective/scores": score,
            "objective/kl": kl,
            "objective/entropy": -data["old_logprobs"].sum() / len(mask),
            "objective/non_score_reward": -0.3 * kl,
            "objective/rlhf_reward": data["rewards"].sum() / len(mask),
            "policy/approxkl_avg": np.mean([0.5 * np.mean(np.log(r[mask]) ** 2) for r in data["ratio"]]),
            "policy/clipfrac_avg": np.mean([((r - 1) * np.sign(data["whitened"]) > 0.2)[mask] for r in data["ratio"]]),
            "loss/policy_avg": data["actor_loss"].mean(),
            "loss/value_avg": data["critic_loss"].mean(),
            "val/ratio": np.mean([r[mask].mean() for r in data["ratio"]]),
            "val/num_eos_tokens": sum(5 in row[m] for row, m in zip(data["responses"], mask)),
            "val/response_length": mask.sum() / len(mask),
            "lr": 0.02 * (1 - step / 2),
            "episode": 3 * (step + 1),
        }
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# Two prompts, three tokens, three positions: every response can be written down.
TINY = loop.Config(
    batch_size=64, prompt_length=1, response_length=3, vocab_size=3, width=8, steps=150, learning_rate=0.01, drift=0.0
)


def all_responses():
    """Every response over {0, 1, end} of at most three tokens."""
    for length in (1, 2, 3):
        for tokens in itertools.product(range(3), repeat=length):
            if 2 not in tokens[:-1] and (length == 3 or tokens[-1] == 2):
                yield tokens


def exact(models, beta):
    """J of the reference, J of the actor and J*, by summing over all prompts and responses."""
    sums = np.zeros(3)
    for prompt in (0, 1):
        scores, logprobs = [], {"actor": [], "reference": []}
        for response in all_responses():
            padded = np.array([[*response, 2, 2]])[:, :3]
            mask = np.arange(3)[None] < len(response)
            scores.append(loop.score_responses(models.reward_model, np.array([[prompt]]), padded, mask)[0])
            for name, values in logprobs.items():
                model = getattr(models, name)
                steps = [slow_logprobs(model, [prompt, *response[:t]])[token] for t, token in enumerate(response)]
                values.append(sum(steps))
        scores, actor, reference = np.array(scores), np.array(logprobs["actor"]), np.array(logprobs["reference"])
        assert np.exp(reference).sum() == pytest.approx(1)
        best = beta * np.log(np.sum(np.exp(reference + scores / beta))) if beta else scores.max()
        gain = scores - beta * (actor - reference)
        sums += [np.exp(reference) @ scores, np.exp(actor) @ gain, best]
    return sums / 2


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.1, 1.0])
def test_theory_agrees_with_enumeration_and_training_gets_there(beta, monkeypatch):
    config = replace(TINY, beta=beta)
    models, rng = start(config)
    for _ in loop.train(models, config, rng):
        pass
    monkeypatch.setattr(loop, "sample_prompts", lambda rng, size, *_: np.arange(size)[:, None] % 2)  # both as often
    gain = loop.attainable_gain(models.actor, models.reference, models.reward_model, config, np.random.default_rng(1))
    reference, actor, best = exact(models, beta)
    assert gain["J_start"] == pytest.approx(reference, abs=0.01)
    assert gain["J"] == pytest.approx(actor, abs=0.01)
    assert gain["J_star"] == pytest.approx(best, abs=0.005)
    assert gain["share"] == (gain["J"] - gain["J_start"]) / (gain["J_star"] - gain["J_start"])
    assert gain["J"] == pytest.approx(gain["score"] - beta * gain["kl"])
    assert actor <= best + 1e-6
    if beta < 1:
        assert (actor - reference) / (best - reference) > 0.9


def test_letters_learn_and_beta_holds_the_kl():
    results = {}
    for beta in (0.0, 0.02, 1.0):
        config = loop.Config(**loop.PRESETS["letters"], steps=40, drift=0.0, beta=beta)
        models, rng = start(config)
        history = [metrics for metrics, _ in loop.train(models, config, rng)]
        results[beta] = [(metrics["objective/scores"], metrics["objective/kl"]) for metrics in history]
    assert results[0.02][-1][0] > results[0.02][0][0] + 0.15
    assert results[0.0][-1][0] > 0.95
    assert results[0.0][-1][1] > 10
    assert 1.5 < results[0.02][-1][1] < 6
    assert results[1.0][-1][1] < 1.5


# Theory takes 3 * 2 * 32 * 128 passes over a response; cheap are 2e9 multiplications (of width * (width + vocabulary)
# each token), and a fifth of the training's passes (batch * (3 + 4 * epochs) each step).
@pytest.mark.parametrize(
    "prompt_length, response_length, width, vocab_size, work",
    [(1, 1, 1, 40_689, 2), (1, 2, 10, 2_702, 30), (2, 1, 10, 2_702, 30)],
)
def test_theory_is_shown_where_it_takes_hardly_any_time(prompt_length, response_length, width, vocab_size, work):
    config = loop.Config(
        prompt_length=prompt_length, response_length=response_length, width=width, vocab_size=vocab_size
    )
    assert 3 * 2 * 32 * 128 * work * (width + vocab_size) < 2e9 < 3 * 2 * 32 * 128 * work * (width + vocab_size + 1)
    assert loop.theory_is_cheap(config)
    assert not loop.theory_is_cheap(replace(config, vocab_size=vocab_size + 1))


@pytest.mark.parametrize("batch_size, ppo_epochs, steps", [(4, 4, 1616), (5, 1, 3510)])
def test_theory_is_shown_where_it_takes_a_fifth_of_the_training(batch_size, ppo_epochs, steps):
    config = loop.Config(batch_size=batch_size, ppo_epochs=ppo_epochs, steps=steps)
    one_step = batch_size * (3 + 4 * ppo_epochs)
    assert one_step * steps < 5 * 3 * 2 * 32 * 128 < one_step * (steps + 1)
    assert not loop.theory_is_cheap(config)
    assert loop.theory_is_cheap(replace(config, steps=steps + 1))
