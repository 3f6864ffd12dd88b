"""The loop: what it does in a step, what it leaves alone, what it learns, and how close it comes to the optimum."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from conftest import slow_logprobs

import rlhf_loop_pseudo as loop

SMALL = loop.Config(
    batch_size=6, prompt_length=4, response_length=5, vocab_size=6, width=8, group_size=3, learning_rate=0.02
)
FLAGS = "--batch-size 6 --prompt-length 4 --response-length 5 --vocab-size 6 --width 8 --group-size 3 --steps 3"
ADVANTAGES = ("gae", "rloo", "grpo")


def start(config):
    """Models and generator as the command line makes them."""
    rng = np.random.default_rng(config.seed)
    return loop.init_models(config, rng), rng


def copies(models):
    """The models as they are now."""
    return loop.Models(*(model and {name: weights.copy() for name, weights in model.items()} for model in models))


def steps_of(config, run=loop.core_loop, models=None):
    """For each step: the models before it, its arrays, and the models after it."""
    models, rng = (models, np.random.default_rng(config.seed)) if models else start(config)
    steps, before, data = [], copies(models), {}
    for stage in run(models, config, rng):
        data.update(stage)
        if "ratio" in stage:
            after = copies(models)
            steps.append((before, data, after))
            before, data = after, {}
    return steps


def walk(config):
    """The models before the walk-through, its arrays, and the models after it."""
    [step] = steps_of(config, loop.walk_through)
    return step


def saved(folder, flags):
    """What a command saves."""
    path = folder / "run.npz"
    assert loop.main([*flags.split(), "--save", str(path)]) == 0
    with np.load(path) as arrays:
        return dict(arrays)


def watch_generators(monkeypatch, *functions):
    """The state of the generator that each call of these functions is handed, by the function's name."""
    states = {name: [] for name in functions}

    def watch(name, original):
        def watching(models, config, rng):
            states[name].append(rng.bit_generator.state["state"]["state"])
            return original(models, config, rng)

        monkeypatch.setattr(loop, name, watching)

    for name in functions:
        watch(name, getattr(loop, name))
    return states


def same(first, second):
    """Whether two models are the same bit for bit."""
    return all(first[name].tobytes() == second[name].tobytes() for name in {*first, *second})


# ------------------------------------------------------------------ the models at the start


def test_the_models_start_from_one_backbone():
    models, _ = start(replace(SMALL, drift=np.float64(0)))
    for model in models:
        for weights in ("embed", "mix"):
            np.testing.assert_array_equal(model[weights], models.reference[weights])
    assert same(models.actor, models.reference)
    assert not models.critic["head"].any()
    everything = [weights for model in models for weights in model.values()]
    assert not any(np.shares_memory(*pair) for pair in itertools.combinations(everything, 2))
    assert all(weights.dtype == np.float32 for weights in everything)


def test_the_method_changes_nothing_but_the_critic():
    (first, _), *others = (start(replace(SMALL, advantage=advantage)) for advantage in ADVANTAGES)
    assert first.critic["head"].shape == (8, 1)
    for models, _ in others:
        assert models.critic is None
        for name in ("actor", "reward_model", "reference"):
            assert same(getattr(models, name), getattr(first, name))


def test_drift_moves_the_actor_in_proportion():
    (none, _), (half, _), (whole, _) = (start(replace(SMALL, drift=drift)) for drift in (0.0, 0.5, 1.0))
    for name in ("embed", "mix", "head"):
        reference = none.reference[name]
        np.testing.assert_array_equal(reference, whole.reference[name])
        moved = whole.actor[name] - reference
        np.testing.assert_allclose(moved, 2 * (half.actor[name] - reference), rtol=1e-4, atol=1e-5)
        assert 0.5 < moved.std() / reference.std() < 2
        assert abs(np.corrcoef(moved.ravel(), reference.ravel())[0, 1]) < 0.5
    np.testing.assert_allclose(whole.critic["head"], 2 * half.critic["head"], rtol=1e-5)
    assert whole.critic["head"].any()


def test_the_models_start_with_weights_of_the_stated_deviation():
    config = loop.Config(vocab_size=3000, width=100, drift=0.5)
    models, _ = start(config)
    for model, name, deviation in (
        (models.reference, "embed", 0.1),
        (models.reference, "mix", 0.5),
        (models.reference, "head", 0.1),
        (models.critic, "head", 0.05),
    ):
        rows = 100 if name != "embed" else 3000
        assert model[name].shape[0] == rows
        few = 1 in model[name].shape
        assert model[name].std() == pytest.approx(deviation, rel=0.12 if few else 0.03)
        assert model[name].mean() == pytest.approx(0, abs=deviation * (0.3 if few else 0.03))
        assert abs(model[name]).max() < 1.74 * deviation  # uniform
    scaled = loop.init_model(np.random.default_rng(0), 50, 100, 50, scale=2.0)
    assert [weights.shape for weights in scaled.values()] == [(50, 100), (100, 100), (100, 50)]
    assert scaled["head"].std() == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize("sizes", [{}, {"vocab_size": 27, "prompt_length": 8, "response_length": 16}])
def test_scores_of_a_random_reward_model_differ_and_are_of_order_1(sizes):
    deviations = []
    for seed in range(3):
        config = loop.Config(**{"vocab_size": 200, **sizes}, batch_size=24, seed=seed)
        [(_, data, _)] = steps_of(replace(config, learning_rate=0.0, ppo_epochs=1))
        deviations.append(data["scores"].std())
    assert 0.5 < np.mean(deviations) < 2


def test_a_drifted_walk_through_has_a_divergence_to_show():
    kl = [walk(loop.Config(vocab_size=2000, seed=seed))[1] for seed in range(2)]
    assert all(0.05 < data["exact_kl"].sum() / data["mask"].sum() < 0.5 for data in kl)


# ------------------------------------------------------------------ a step

SETTINGS = [
    {},
    {"kl_estimator": "k2", "beta": 0.5, "gamma": 0.9, "lam": 0.5, "clip": 0.1, "seed": 1},
    {"kl_estimator": "k3", "beta": 0.0, "gamma": 0.0, "lam": 1.0, "seed": 2},
    {"advantage": "rloo", "beta": 0.3, "kl_estimator": "k3", "seed": 3},
    {"advantage": "rloo", "group_size": 2, "ppo_epochs": 2},
    {"advantage": "grpo", "beta": 0.3, "seed": 4},
    {"advantage": "grpo", "group_size": 6, "kl_estimator": "k2", "gamma": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_array_of_a_step_follows_from_the_others(settings):
    config = replace(SMALL, **settings)
    before, data, _ = walk(config)
    check_step(data, before, config)
    check_what_the_walk_through_adds(data, before, config)
    steps = steps_of(replace(config, steps=3))
    assert len(steps) == 3
    for before, data, _ in steps:
        check_step(data, before, config)
        assert data["logits"] is None


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def check_step(data, models, config):
    """That the arrays of a step are what the seven steps make of the models before it."""
    prompts, responses, mask = data["prompts"], data["responses"], data["mask"]
    real, n, end = mask == 1, mask.sum(), config.vocab_size - 1
    assert responses.shape == mask.shape == (config.batch_size, config.response_length)
    assert prompts.shape == (config.batch_size, config.prompt_length)
    assert 0 <= prompts.min() <= prompts.max() < end
    for row, row_mask in zip(responses.tolist(), real.tolist()):
        length = row.index(end) + 1 if end in row else len(row)
        assert row_mask == [t < length for t in range(len(row))]
        assert row[length:] == [end] * (len(row) - length)
    close(data["old_logprobs"], loop.token_logprobs(models.actor, prompts, responses) * mask)
    close(data["ref_logprobs"], loop.token_logprobs(models.reference, prompts, responses) * mask)
    close(data["scores"], loop.score_responses(models.reward_model, prompts, responses, mask))

    k1 = data["old_logprobs"] - data["ref_logprobs"]
    close(data["kl"], {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1}[config.kl_estimator])
    rewards = -config.beta * data["kl"]
    rewards[np.arange(len(mask)), real.sum(axis=1) - 1] += data["scores"]
    close(data["rewards"], rewards)

    if config.advantage == "gae":
        values, gamma, lam = data["values"], config.gamma, config.lam
        close(values, loop.critic_values(models.critic, prompts, responses) * mask)
        advantage, value = np.zeros((2, len(mask)))
        for t in reversed(range(mask.shape[1])):
            advantage = (rewards[:, t] + gamma * value - values[:, t] + gamma * lam * advantage) * mask[:, t]
            value = values[:, t]
            close(data["advantages"][:, t], advantage)
        close(data["returns"], data["advantages"] + values)
        assert len(data["critic_loss"]) == config.ppo_epochs
        assert data["critic_loss"][0] == pytest.approx(((values - data["returns"])[real] ** 2).mean(), rel=1e-4)
    else:
        totals = rewards.sum(axis=1)
        for row, total in enumerate(totals):
            first = row - row % config.group_size
            group = totals[first : first + config.group_size]
            if config.advantage == "rloo":
                expected = total - (group.sum() - total) / (len(group) - 1)
            else:
                expected = (total - group.mean()) / (np.sqrt(((group - group.mean()) ** 2).sum() / (len(group) - 1)))
            close(data["advantages"][row], expected * mask[row], 1e-4)
            np.testing.assert_array_equal(prompts[row], prompts[first])
        assert "values" not in data
        assert "returns" not in data
        assert not len(data["critic_loss"])
    advantages = data["advantages"][real].astype(float)
    if config.advantage == "grpo":
        close(data["whitened"], data["advantages"])
    else:
        close(data["whitened"][real], (advantages - advantages.mean()) / advantages.std(ddof=1), 1e-4)
    for name in ("old_logprobs", "ref_logprobs", "kl", "rewards", "advantages", "whitened", "values", "returns"):
        assert not data.get(name, mask)[~real].any()

    ratio, gain = data["ratio"], data["whitened"]
    assert ratio.shape == (config.ppo_epochs, *mask.shape)
    close(ratio[0], mask)
    assert abs(ratio[1:] - mask).max() > 1e-3
    bounded = np.clip(ratio, 1 - config.clip, 1 + config.clip)
    close(data["actor_loss"], -np.minimum(ratio * gain, bounded * gain).sum(axis=(1, 2)) / n)


def check_what_the_walk_through_adds(data, models, config):
    """The exact KL, sums and marks that a reader sees besides."""
    mask, ratio, gain = data["mask"], data["ratio"], data["whitened"]
    for b, t in np.ndindex(mask.shape):
        tokens = [*data["prompts"][b], *data["responses"][b, :t]]
        p, q = (slow_logprobs(model, tokens) for model in (models.actor, models.reference))
        close(data["exact_kl"][b, t], np.exp(p) @ (p - q) * mask[b, t], 1e-4)
        if mask[b, t]:
            close(loop.log_softmax(data["logits"][b, t]), p, 1e-4)
    k1 = data["old_logprobs"] - data["ref_logprobs"]
    for name, kl in (("k1", k1), ("k2", k1**2 / 2), ("k3", np.exp(-k1) - 1 + k1)):
        close(data[name], kl)
    if config.advantage == "gae":
        next_values = np.pad(data["values"][:, 1:], ((0, 0), (0, 1)))
        close(data["td_errors"], (data["rewards"] + config.gamma * next_values - data["values"]) * mask)
    else:
        assert "td_errors" not in data
    too_far = ((ratio > 1 + config.clip) & (gain > 0)) | ((ratio < 1 - config.clip) & (gain < 0))
    np.testing.assert_array_equal(data["clipped"], too_far)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_the_walk_through_changes_nothing(advantage):
    config = replace(SMALL, advantage=advantage)
    _, shown, after_walk = walk(config)
    [(_, data, after)] = steps_of(config)
    assert all(shown[name].tobytes() == array.tobytes() for name, array in data.items())
    assert all(first is second is None or same(first, second) for first, second in zip(after_walk, after))


def test_a_fresh_run_has_no_kl_and_no_values():
    _, data, _ = walk(replace(SMALL, drift=0.0))
    for name in ("kl", "exact_kl", "k1", "k2", "k3"):
        np.testing.assert_allclose(data[name], 0, atol=1e-5)
    assert not data["values"].any()


def test_each_step_has_its_own_prompts_and_each_group_one():
    for config in (SMALL, replace(SMALL, advantage="rloo")):
        steps = [data["prompts"] for _, data, _ in steps_of(replace(config, prompt_length=12, steps=4))]
        groups = 1 if config.advantage == "gae" else 3
        texts = [tuple(prompt) for prompts in steps for prompt in prompts[::groups]]
        assert len({*texts}) == len(texts) == 4 * 6 // groups


def test_responses_of_a_group_differ():
    [(_, data, _)] = steps_of(replace(SMALL, advantage="grpo", vocab_size=100, response_length=12))
    assert len({tuple(row) for row in data["responses"]}) == 6


def test_with_gae_nothing_depends_on_the_group_size():
    runs = [steps_of(replace(SMALL, steps=2, group_size=size)) for size in (2, 4, 50)]
    for other in runs[1:]:
        for (_, data, after), (_, other_data, other_after) in zip(runs[0], other):
            assert all(same(*pair) for pair in zip(after, other_after))
            for name in data.keys() - {"logits"}:
                np.testing.assert_array_equal(data[name], other_data[name])


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_actor_and_critic_learn_and_the_others_are_frozen(advantage):
    for before, _, after in steps_of(replace(SMALL, steps=3, advantage=advantage)):
        assert same(before.reward_model, after.reward_model)
        assert same(before.reference, after.reference)
        for name in ("actor", "critic") if advantage == "gae" else ("actor",):
            for weights in ("embed", "mix", "head"):
                assert (getattr(before, name)[weights] != getattr(after, name)[weights]).any()


def adam_update(weights, gradients, moments, learning_rate):
    """Kingma & Ba, algorithm 1, on a model; moments is a list of (t, m, v), the last one at the end."""
    t, m, v = moments[-1] if moments else (0, dict.fromkeys(weights, 0), dict.fromkeys(weights, 0))
    t, m = t + 1, {name: 0.9 * m[name] + 0.1 * g for name, g in gradients.items()}
    v = {name: 0.999 * v[name] + 0.001 * g**2 for name, g in gradients.items()}
    moments.append((t, m, v))
    for name in weights:
        m_hat, v_hat = m[name] / (1 - 0.9**t), v[name] / (1 - 0.999**t)
        weights[name] = weights[name] - np.float32(learning_rate) * m_hat / (np.sqrt(v_hat) + 1e-8)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("epochs", [1, 3])
def test_both_take_an_adam_step_in_each_epoch_at_a_rate_that_falls_linearly(advantage, epochs):
    config = replace(SMALL, steps=4, ppo_epochs=epochs, advantage=advantage, clip=0.05)
    of_actor, of_critic = [], []
    for step, (before, data, after) in enumerate(steps_of(config)):
        learning_rate = [0.02, 0.015, 0.01, 0.005][step]
        assert data["lr"] == pytest.approx(learning_rate)
        models, texts, mask = copies(before), (data["prompts"], data["responses"]), data["mask"]
        for epoch in range(epochs):
            gradients, loss, ratio = loop.actor_gradients(
                models.actor, *texts, data["old_logprobs"], data["whitened"], mask, 0.05
            )
            close(data["actor_loss"][epoch], loss, 1e-3)
            close(data["ratio"][epoch], ratio, 1e-3)
            adam_update(models.actor, gradients, of_actor, learning_rate)
            if advantage == "gae":
                gradients, loss = loop.critic_gradients(models.critic, *texts, data["returns"], mask)
                close(data["critic_loss"][epoch], loss, 1e-3)
                adam_update(models.critic, gradients, of_critic, learning_rate)
        for name in ("embed", "mix", "head"):
            close(after.actor[name], models.actor[name], 1e-4)
            if advantage == "gae":
                close(after.critic[name], models.critic[name], 1e-4)


def test_the_first_update_moves_both_by_the_learning_rate():
    [(before, _, after)] = steps_of(replace(SMALL, ppo_epochs=1))
    for name in ("actor", "critic"):
        moved = [abs(getattr(after, name)[weights] - getattr(before, name)[weights]).max() for weights in before.actor]
        np.testing.assert_allclose(moved, 0.02, rtol=1e-3)


def test_the_losses_fall_over_the_epochs_of_a_step():
    [(_, data, after)] = steps_of(replace(SMALL, learning_rate=0.005))
    assert abs(data["actor_loss"][0]) < 1e-5
    values = loop.critic_values(after.critic, data["prompts"], data["responses"])
    end, _ = loop.value_loss(values, data["returns"], data["mask"])
    assert (np.diff([*data["critic_loss"], end]) < 0).all()
    _, end, _ = loop.actor_gradients(
        after.actor, data["prompts"], data["responses"], data["old_logprobs"], data["whitened"], data["mask"], 0.2
    )
    assert (np.diff([*data["actor_loss"], end]) < 0).all()


@pytest.mark.parametrize("what", ["--seed", "--kl-estimator"])
def test_a_training_depends_on(what, tmp_path):
    flags = f"{FLAGS} --drift 0.5 --learning-rate 0.05 --beta 0.5"
    one, two = ("1", "2") if what == "--seed" else ("k1", "k3")
    first, again, other = (saved(tmp_path, f"{flags} {what} {value}") for value in (one, one, two))
    for name in ("objective/scores", "objective/kl", "loss/policy_avg", "theory/J"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


def test_all_that_is_random_in_the_loop_comes_from_the_given_generator():
    """With the same models throughout, and a vocabulary of two in which there is but one prompt."""
    for config, name in ((SMALL, "prompts"), (replace(SMALL, vocab_size=2, response_length=20), "responses")):
        config, drawn = replace(config, steps=3, learning_rate=0.0, ppo_epochs=2, drift=0.0), []
        for seed in (0, 1):
            models, _ = start(config)
            drawn += [data[name].tobytes() for _, data, _ in steps_of(replace(config, seed=seed), models=models)]
        assert len({*drawn}) == 6


# ------------------------------------------------------------------ divergence


@pytest.mark.parametrize("run", [loop.train, loop.walk_through])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_an_actor_that_diverges_stops_the_run(run, advantage):
    config = replace(SMALL, advantage=advantage, learning_rate=1e30, steps=1 if run is loop.walk_through else 3)
    models, rng = start(config)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"step 1: .*--learning-rate"):
        list(run(models, config, rng))


@pytest.mark.parametrize("run", [loop.train, loop.walk_through])
def test_a_critic_that_diverges_stops_the_run(run):
    """Its values are so large that their squares overflow; everything else is still finite."""
    config = replace(SMALL, steps=1 if run is loop.walk_through else 3, ppo_epochs=2)
    models, rng = start(config)
    models.critic["head"] *= np.float32(1e25)
    with np.errstate(all="ignore"):
        [(_, data, _)] = steps_of(replace(config, steps=1), models=copies(models))
        assert np.isfinite(data["actor_loss"]).all()
        assert not np.isfinite(data["critic_loss"]).all()
        with pytest.raises(FloatingPointError, match="step 1"):
            list(run(models, config, rng))


def test_it_stops_at_the_step_whose_loss_is_the_first_that_is_not_finite():
    config = replace(SMALL, learning_rate=1e30, steps=4, ppo_epochs=1)  # one update, seen by the next step's loss
    episodes, (models, rng) = [], start(config)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="step 2"):
        episodes.extend(metrics["episode"] for metrics, _ in loop.train(models, config, rng))
    assert episodes == [6]


# ------------------------------------------------------------------ metrics

LETTERS = {"vocab_size": 27, "prompt_length": 3, "response_length": 16, "seed": 5}


@pytest.mark.parametrize("settings", [{"beta": 0.3}, LETTERS, {"advantage": "rloo", "beta": 1.0}, {"clip": 0.05}])
def test_metrics_are_those_of_their_names(settings):
    config, shares = replace(SMALL, steps=3, **{"learning_rate": 0.04, **settings}), []
    models, rng = start(config)
    trained = list(loop.train(models, config, rng))
    for step, ((_, data, _), (metrics, response)) in enumerate(zip(steps_of(config), trained, strict=True)):
        real, batch = data["mask"] == 1, config.batch_size
        assert response.tolist() == data["responses"][0][real[0]].tolist()
        kl, score = data["kl"].sum() / batch, data["scores"].sum() / batch
        ratios = [ratio[real] for ratio in data["ratio"]]
        gain, clip = data["whitened"][real], config.clip
        stopped = [((r > 1 + clip) & (gain > 0)) | ((r < 1 - clip) & (gain < 0)) for r in ratios]
        expected = {
            "objective/scores": (score, 1e-6),
            "objective/kl": (kl, 1e-5),
            "objective/entropy": (-data["old_logprobs"].sum() / batch, 1e-5),
            "objective/non_score_reward": (-config.beta * kl, 1e-5),
            "objective/rlhf_reward": (data["rewards"].sum() / batch, 1e-5),
            "policy/approxkl_avg": (np.mean([np.mean(np.log(r) ** 2) / 2 for r in ratios]), 1e-6),
            "policy/clipfrac_avg": (np.mean(stopped), 1e-9),
            "loss/policy_avg": (np.mean(data["actor_loss"]), 1e-7),
            "val/ratio": (np.mean(ratios), 1e-5),
            "val/num_eos_tokens": (sum(config.vocab_size - 1 in row for row in data["responses"]), 0),
            "val/response_length": (real.sum() / batch, 0),
            "lr": (0.04 * (1 - step / 3), 1e-9),
            "episode": (batch * (step + 1), 0),
        }
        if config.advantage == "gae":
            expected["loss/value_avg"] = np.mean(data["critic_loss"]), 1e-6
        if config.vocab_size == 27:
            human = loop.human_scores(data["responses"], data["mask"], 27)
            expected["objective/human_scores"] = human.mean(), 1e-9
            assert 0 < human.mean() < 1
        assert metrics.keys() == expected.keys()
        for name, (value, tolerance) in expected.items():
            assert metrics[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
        shares.append(np.mean(stopped))
    assert 0 < np.mean(shares) < 1


def test_a_ratio_of_zero_leaves_the_metrics_finite():
    [(_, data, _)] = steps_of(SMALL)
    data["ratio"][1, 0, 0] = 0.0
    metrics = loop.step_metrics(data, SMALL, 1)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["policy/approxkl_avg"] > 1


def test_no_penalty_is_zero_and_not_minus_zero():
    config = replace(SMALL, beta=0.0)
    models, rng = start(config)
    [(metrics, _)] = loop.train(models, config, rng)
    assert metrics["objective/kl"] > 0
    assert not np.signbit(metrics["objective/non_score_reward"])


# ------------------------------------------------------------------ learning from the human


def test_only_where_tokens_are_letters_a_human_is_asked(tmp_path, monkeypatch):
    states = watch_generators(monkeypatch, "learn_from_human", "train", "attainable_gain")
    sizes = "--batch-size 4 --prompt-length 3 --response-length 3 --width 8 --preference-pairs 20 --steps 2"
    kept = saved(tmp_path, f"{sizes} --vocab-size 27 --beta 0.1")
    assert {"preferences/accuracy", "objective/human_scores"} <= kept.keys()
    assert 0 < kept["theory/human"] < 1
    assert len({state for [state] in states.values()}) == 3  # what one draws is no other's
    several = saved(tmp_path, f"{sizes} --vocab-size 27 --beta 1 0.1")  # one reward model for all
    assert {name: len(each) for name, each in states.items()} == {
        "learn_from_human": 2,
        "train": 3,
        "attainable_gain": 3,
    }
    for name in kept.keys() - {"config"}:
        np.testing.assert_array_equal(several[name] if "preferences" in name else several[name][1], kept[name])
    kept = saved(tmp_path, f"{sizes} --vocab-size 26")
    assert not [name for name in kept if ("human" in name and name != "theory/human") or "preferences" in name]
    assert np.isnan(kept["theory/human"])


def test_the_reward_model_is_judged_by_fresh_pairs(monkeypatch):
    config = loop.Config(vocab_size=27, prompt_length=3, response_length=5, preference_pairs=60)
    models, _ = start(config)
    collected, original, train = [], loop.collect_preferences, loop.train_reward_model

    def collect(reference, *rest):
        collected.append(original(reference, *rest))
        assert reference is models.reference
        return collected[-1]

    def train_from_the_given_weights(reward_model, *rest):
        assert reward_model is models.reward_model
        return train(reward_model, *rest)

    monkeypatch.setattr(loop, "collect_preferences", collect)
    monkeypatch.setattr(loop, "train_reward_model", train_from_the_given_weights)
    learned, seen = loop.learn_from_human(models, config, np.random.default_rng(0))
    training, fresh = collected
    assert [len(prompts) for prompts, _, _ in collected] == [2 * 60, 2 * 2048]
    assert not np.array_equal(training[1], fresh[1][:120])
    for name in ("actor", "critic", "reference"):
        assert getattr(learned, name) is getattr(models, name)
    scores = loop.score_responses(learned.reward_model, *training)
    assert scores.mean() == pytest.approx(0, abs=1e-5)  # it is those pairs that it has learned from
    assert scores.std() == pytest.approx(1, abs=1e-5)
    assert seen["losses"].shape == (200,)
    np.testing.assert_array_equal(seen["responses"], fresh[1])
    np.testing.assert_array_equal(seen["mask"], fresh[2])
    np.testing.assert_array_equal(seen["scores"], loop.score_responses(learned.reward_model, *fresh))
    np.testing.assert_array_equal(seen["human"], loop.human_scores(*fresh[1:], 27))
    for name, opinion in (("accuracy", seen["scores"]), ("best_accuracy", seen["human"])):
        chosen, rejected = opinion[:2048], opinion[2048:]
        assert seen[name] == pytest.approx(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())
    assert (seen["human"][:2048] == seen["human"][2048:]).any()  # ties, which count half
    assert 0.5 < seen["accuracy"] < seen["best_accuracy"] < 0.9


# ------------------------------------------------------------------ theory

# Two prompts, three tokens, three positions: every response can be written down.
TINY = loop.Config(
    batch_size=64, prompt_length=1, response_length=3, vocab_size=3, width=8, steps=100, learning_rate=0.01, drift=0.0
)


def all_responses():
    """Every response over {0, 1, end} of at most three tokens."""
    for length in (1, 2, 3):
        for tokens in itertools.product(range(3), repeat=length):
            if 2 not in tokens[:-1] and (length == 3 or tokens[-1] == 2):
                yield tokens


def exact(models, beta):
    """J of the reference, J of the actor, J*, the actor's score and KL, by summing over all prompts and responses."""
    sums = np.zeros(5)
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
        score, kl = np.exp(actor) @ scores, np.exp(actor) @ (actor - reference)
        sums += [np.exp(reference) @ scores, score - beta * kl, best, score, kl]
    return sums / 2


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.1, 1.0])
def test_theory_agrees_with_enumeration_and_training_gets_there(beta, monkeypatch):
    config = replace(TINY, beta=beta)
    models, rng = start(config)
    for _ in loop.train(models, config, rng):
        pass
    monkeypatch.setattr(loop, "sample_prompts", lambda rng, size, *_: np.arange(size)[:, None] % 2)  # both as often
    rows = [loop.attainable_gain(models, config, np.random.default_rng(seed)) for seed in range(2)]
    reference, actor, best, score, kl = exact(models, beta)
    for name, value in (("J_start", reference), ("J", actor), ("J_star", best), ("score", score), ("kl", kl)):
        assert np.mean([gain[name] for gain in rows]) == pytest.approx(value, abs=0.02), name
    for gain in rows:
        assert gain["share"] == pytest.approx((gain["J"] - gain["J_start"]) / (gain["J_star"] - gain["J_start"]))
        assert gain["J"] == pytest.approx(gain["score"] - beta * gain["kl"])
    assert actor <= best + 1e-6
    assert (actor - reference) / (best - reference) > 0.9


def test_theory_keeps_its_order_at_any_beta():
    config = replace(SMALL, drift=2.0)
    models, _ = start(config)
    for beta in (0.0, 0.001, 0.1, 1.0, 100.0):
        gain = loop.attainable_gain(models, replace(config, beta=beta), np.random.default_rng(0))
        assert gain["kl"] > 0
        assert max(gain["J_start"], gain["J"]) <= gain["J_star"]
        assert np.isnan(gain["human"])


def gains(config, seeds):
    """Theory of an actor that has drifted, drawn with several seeds."""
    models, _ = start(config)
    rows = [loop.attainable_gain(models, config, np.random.default_rng(seed)) for seed in seeds]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("beta", [0.02, 0.5])
def test_the_standard_error_of_a_share_is_its_spread_over_theories(beta):
    seen = gains(replace(SMALL, prompt_length=2, response_length=3, beta=beta), range(10))
    spread = seen["share"].std(ddof=1)
    assert 0.5 < seen["share_error"].mean() / spread < 2
    assert spread > 0.005


def test_where_nothing_is_at_stake_there_is_no_share():
    assert np.isnan(gains(replace(SMALL, beta=1000.0), range(3))["share"]).all()
    assert np.isfinite(gains(replace(SMALL, beta=0.1), range(3))["share"]).all()


def theory_of_two_answers(monkeypatch, chances, stakes, beta):
    """Theory where each of 32 prompts has two answers, that score stake and -stake: all can be written down.

    The reference gives the better one in half of the cases, the actor with the chance that belongs to the prompt,
    a multiple of a quarter. The human thinks 0.25 of the better one and 1 of the other.
    """
    config = replace(SMALL, vocab_size=27, beta=beta)
    models, _ = start(config)
    chances, stakes = np.resize(chances, 32), np.resize(stakes, 32)

    def sample_prompts(rng, batch_size, *sizes):
        assert sizes == (4, 27)
        return np.arange(batch_size)[:, None]

    def generate(policy, prompts, response_length, rng, eos_token, keep_logits):
        assert (response_length, eos_token, keep_logits) == (5, 26, False)
        better = 0.5 if policy is models.reference else chances[prompts]
        answers = (np.arange(len(prompts))[:, None] % 4 >= 4 * better).astype(int)  # 0 is the better one
        return answers, np.ones(answers.shape), None, None

    def token_logprobs(model, prompts, answers):
        better = 0.5 if model is models.reference else chances[prompts]
        return np.log(np.where(answers == 0, better, 1 - better))

    def score_responses(model, prompts, answers, mask):
        assert model is models.reward_model
        return stakes[prompts[:, 0]] * np.where(answers[:, 0] == 0, 1.0, -1.0)

    def human_scores(answers, mask, vocab_size):
        assert vocab_size == 27
        assert mask.all()
        return np.where(answers[:, 0] == 0, 0.25, 1.0)

    for function in (human_scores, sample_prompts, generate, token_logprobs, score_responses):
        monkeypatch.setattr(loop, function.__name__, function)
    return loop.attainable_gain(models, config, None)


@pytest.mark.parametrize("beta", [0.0, 0.2, 3.0])
def test_theory_of_two_answers(beta, monkeypatch):
    chances, stakes = np.tile([0.75, 0.5], 16), np.tile([1.0, 2.0, 1.0, 4.0], 8)
    gain = theory_of_two_answers(monkeypatch, chances, stakes, beta)
    score = stakes * (2 * chances - 1)
    kl = chances * np.log(2 * chances) + (1 - chances) * np.log(2 * (1 - chances))
    best = beta * np.log(np.cosh(stakes / beta)) if beta else stakes
    share = (score - beta * kl).mean() / best.mean()
    error = (score - beta * kl - share * best).std(ddof=1) / 32**0.5 / best.mean()
    expected = {"J_start": 0 * score, "score": score, "kl": kl, "J": score - beta * kl, "J_star": best}
    expected |= {"share": share, "share_error": error, "human": 1 - 0.75 * chances}
    for name, value in expected.items():
        assert gain[name] == pytest.approx(np.mean(value), rel=1e-9, abs=1e-9), name


def test_a_share_that_is_the_same_for_every_prompt_has_no_error(monkeypatch):
    gain = theory_of_two_answers(monkeypatch, chances=0.75, stakes=[1.0, 2.0, 3.0], beta=0.0)
    assert gain["share"] == pytest.approx(0.5)
    assert gain["share_error"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("prompts_at_stake, certain", [(7, False), (8, True), (32, True)])
def test_a_share_is_shown_where_the_stake_is_three_standard_errors(prompts_at_stake, certain, monkeypatch):
    """Where k of 32 prompts have something at stake, and all the same, (mean / error)² is 31 k / (32 - k)."""
    gain = theory_of_two_answers(monkeypatch, 0.5, np.arange(32) < prompts_at_stake, beta=0.0)
    assert gain["J_star"] == pytest.approx(prompts_at_stake / 32)
    assert gain["share"] == 0 if certain else np.isnan(gain["share"])


def test_theory_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    """Training does not change with it, and it does not change with what training drew."""
    states = watch_generators(monkeypatch, "attainable_gain")["attainable_gain"]
    alone = saved(tmp_path, f"{FLAGS} --advantage rloo")
    both = saved(tmp_path, f"{FLAGS} --advantage gae rloo")  # the first draws more prompts
    saved(tmp_path, f"{FLAGS} --seed 1")
    monkeypatch.setattr(loop, "attainable_gain", lambda *_: {})
    without = saved(tmp_path, f"{FLAGS} --advantage gae rloo")
    assert not [name for name in without if "theory" in name]
    for name in without.keys() - {"config"}:
        np.testing.assert_array_equal(without[name], both[name])
    for name in alone.keys() - {"config"}:
        np.testing.assert_array_equal(alone[name], both[name][1])
    *same_seed, other_seed = states
    assert len({*same_seed}) == 1
    assert other_seed not in same_seed
    assert np.random.default_rng(0).bit_generator.state["state"]["state"] not in same_seed


class TheoryBegins(Exception):
    """Raised where prompts for it are drawn."""


def theory_is_shown(config, monkeypatch):
    """Whether attainable_gain sets to work."""

    def begin(*_):
        raise TheoryBegins

    monkeypatch.setattr(loop, "sample_prompts", begin)
    try:
        assert loop.attainable_gain(None, config, None) == {}
    except TheoryBegins:
        return True
    return False


# Theory takes 3 * 2 * 32 * 128 passes over a response; cheap are 2e9 multiplications (of width * (width + vocabulary)
# each token), and a fifth of the training's passes (batch * (3 + 4 * epochs) each step).
@pytest.mark.parametrize(
    "prompt_length, response_length, width, vocab_size, work",
    [(1, 1, 1, 40_689, 2), (1, 2, 10, 2_702, 30), (2, 1, 10, 2_702, 30)],
)
def test_theory_is_shown_where_it_takes_hardly_any_time(
    prompt_length, response_length, width, vocab_size, work, monkeypatch
):
    config = loop.Config(
        prompt_length=prompt_length, response_length=response_length, width=width, vocab_size=vocab_size
    )
    assert 3 * 2 * 32 * 128 * work * (width + vocab_size) < 2e9 < 3 * 2 * 32 * 128 * work * (width + vocab_size + 1)
    assert theory_is_shown(config, monkeypatch)
    assert not theory_is_shown(replace(config, vocab_size=vocab_size + 1), monkeypatch)


@pytest.mark.parametrize("batch_size, ppo_epochs, steps", [(4, 4, 1616), (5, 1, 3510)])
def test_theory_is_shown_where_it_takes_a_fifth_of_the_training(batch_size, ppo_epochs, steps, monkeypatch):
    config = loop.Config(batch_size=batch_size, ppo_epochs=ppo_epochs, steps=steps)
    one_step = batch_size * (3 + 4 * ppo_epochs)
    assert one_step * steps < 5 * 3 * 2 * 32 * 128 < one_step * (steps + 1)
    assert not theory_is_shown(config, monkeypatch)
    assert theory_is_shown(replace(config, steps=steps + 1), monkeypatch)
