"""The loop: what a step does, what it changes, what is measured of it, and how far it can get."""

import contextlib
import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import (
    SlowAdam,
    real_tokens,
    shown,
    slow_gae,
    slow_grpo,
    slow_human,
    slow_kl,
    slow_logprobs,
    slow_ppo,
    slow_rewards,
    slow_rloo,
    slow_whiten,
)

SMALL = loop.Config(
    batch_size=8, prompt_length=4, response_length=5, vocab_size=6, width=8, learning_rate=0.02
)
FLAGS = "--prompt-length 4 --response-length 5 --vocab-size 6 --width 8 --learning-rate 0.02"
LETTERS = loop.Config(**loop.PRESETS["letters"])
ADVANTAGES = ("gae", "rloo", "grpo")


def start(config, *learned):
    """Models and generator as the command line makes them."""
    rng = np.random.default_rng(config.seed)
    return loop.init_models(config, rng, *learned), rng


def copies(models):
    """The models as they are now."""
    return loop.Models(*copy.deepcopy(list(models)))


def precise(models):
    """The models in float64, in which rounding is far below what is compared."""
    return loop.Models(*(m and {k: np.float64(w) for k, w in m.items()} for m in models))


def steps_of(models, rng, config, run=loop.core_loop):
    """For each step: models and generator before it, its seven dicts, the models after it."""
    before, stages = (copies(models), copy.deepcopy(rng)), []
    for stage in run(models, config, rng):
        stages.append(stage)
        if "ratio" in stage:
            yield *before, stages, copies(models)
            before, stages = (copies(models), copy.deepcopy(rng)), []


def merged(stages):
    """The dicts of a step as one."""
    return {name: array for stage in stages for name, array in stage.items()}


def walk(config, *learned):
    """The models before the walk-through, its arrays, and the models after it."""
    [(before, _, stages, after)] = steps_of(*start(config, *learned), config, loop.walk_through)
    return before, merged(stages), after


def close(actual, expected, tolerance=1e-7):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def same(first, second):
    """Whether two models are the same bit for bit."""
    return all(first[name].tobytes() == second[name].tobytes() for name in {*first, *second})


@pytest.fixture(scope="module")
def stages():
    """(untrained, reference, reward_model) of the stages before the loop."""
    config = replace(LETTERS, preference_pairs=500)
    return loop.learn_from_human(config, np.random.default_rng([0, 1]))[:3]


@pytest.fixture(scope="module")
def learned(stages):
    """(reference, reward_model)."""
    return stages[1:]


# ------------------------------------------------------------------ the models at the start


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_training_starts_at_the_reference_with_a_critic_only_for_gae(advantage):
    config = replace(SMALL, drift=0.0, advantage=advantage)
    models, _ = start(config)
    assert same(models.actor, models.reference)
    assert (models.critic is None) == (advantage != "gae")
    present = [model for model in models if model]
    for model, name in itertools.product(present, ("embed", "mix")):
        np.testing.assert_array_equal(model[name], models.reference[name])
    weights = [array for model in present for array in model.values()]
    assert not any(np.shares_memory(*pair) for pair in itertools.combinations(weights, 2))
    assert not models.critic or not models.critic["head"].any()


def test_drift_moves_actor_and_critic_in_proportion():
    none, half, whole = (start(replace(SMALL, drift=drift))[0] for drift in (0.0, 0.5, 1.0))
    for name, reference in none.reference.items():
        np.testing.assert_array_equal(reference, whole.reference[name])
        moved = whole.actor[name] - reference
        close(moved, 2 * (half.actor[name] - reference), 1e-5)
        assert 0.5 < moved.std() / reference.std() < 2
        assert abs(np.corrcoef(moved.ravel(), reference.ravel())[0, 1]) < 0.5
    close(whole.critic["head"], 2 * half.critic["head"], 1e-5)
    assert whole.critic["head"].any()


def test_models_are_drawn_with_the_stated_deviations():
    models, _ = start(loop.Config(vocab_size=3000, width=100, drift=0.5))
    stated = {"embed": 0.1, "mix": 0.5, "head": 0.1}
    for name, deviation in stated.items():
        weights = models.reference[name]
        assert weights.std() == pytest.approx(deviation, rel=0.03)
        assert abs(weights.mean()) < 0.03 * deviation
        assert abs(weights).max() < 1.74 * deviation  # uniform
    assert models.critic["head"].std() == pytest.approx(0.05, rel=0.2)
    assert models.reward_model["head"].std() == pytest.approx(0.25, rel=0.2)


def test_trained_models_are_taken_as_they_are(learned):
    models, _ = start(replace(LETTERS, drift=0.0), *learned)
    assert models.reference is learned[0]
    assert models.reward_model is learned[1]
    assert same(models.actor, learned[0])
    np.testing.assert_array_equal(models.critic["embed"], learned[0]["embed"])


def test_one_step_starts_off_the_reference_and_training_at_it(tmp_path):
    _, one = shown(f"{FLAGS} --steps 1", tmp_path)
    _, two = shown(f"{FLAGS} --steps 2", tmp_path)
    assert (one["exact_kl"].sum(axis=1) > 0.01).all()
    assert abs(one["kl"]).max() > 0.1
    assert abs(two["objective/kl"][0]) < 1e-5
    assert abs(two["objective/kl"][1]) > 1e-5
    for estimator in ("k1", "k2", "k3"):
        config = replace(SMALL, drift=0.0, kl_estimator=estimator)
        _, data, _ = walk(config)
        for name in ("kl", "exact_kl", "k1", "k2", "k3"):
            close(data[name], 0 * data[name], 1e-5)
        assert not data["values"].any()


def test_in_training_both_actor_and_reference_write_words(tmp_path):
    """Fine-tuning that reached one of them alone would show as a KL, or in words."""
    _, arrays = shown("--preset letters --steps 2 --preference-pairs 300", tmp_path)
    assert arrays["val/words"][0] > 0.7
    assert abs(arrays["objective/kl"][0]) < 1e-4
    assert abs(arrays["theory/J_start"]) < 0.3  # scores of the reference's words average 0
    assert arrays["fine_tuning/words"] > 0.8


# ------------------------------------------------------------------ a step, by hand

SETTINGS = [
    {},
    {"kl_estimator": "k2", "beta": 0.5, "gamma": 0.9, "lam": 0.5, "clip": 0.1, "seed": 1},
    {"kl_estimator": "k3", "beta": 0.0, "gamma": 0.0, "lam": 1.0, "seed": 2, "ppo_epochs": 1},
    {"advantage": "rloo", "beta": 0.3, "kl_estimator": "k3", "seed": 3},
    {"advantage": "rloo", "group_size": 2, "ppo_epochs": 2},
    {"advantage": "grpo", "beta": 0.3, "seed": 4},
    {"advantage": "grpo", "group_size": 8, "kl_estimator": "k2", "gamma": 0.5, "seed": 5},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_dict_follows_from_those_before_it(settings):
    config = replace(SMALL, steps=3, **settings)
    models, rng = start(config)
    adams = {"actor": {}, "critic": {}}
    steps = list(steps_of(precise(models), rng, config))
    assert len(steps) == 3
    for step, (before, rng_before, stages, after) in enumerate(steps):
        check_experience(stages, before, rng_before, config)
        check_advantages(merged(stages), stages[5], config)
        check_update(merged(stages), stages[6], before, after, adams, config)
        assert stages[6]["lr"] == pytest.approx(0.02 * (3 - step) / 3)


def check_experience(stages, models, rng, config):
    """Steps 1 to 5: seven dicts, of which the first five hold what their steps give."""
    assert len(stages) == 7
    group = 1 if config.advantage == "gae" else config.group_size
    sizes = config.prompt_length, config.vocab_size
    prompts = loop.sample_prompts(rng, config.batch_size // group, *sizes).repeat(group, axis=0)
    expected = [{"prompts": prompts}]
    names, end = ("responses", "mask", "old_logprobs"), config.vocab_size - 1
    texts = loop.generate(models.actor, prompts, config.response_length, rng, end)
    expected.append(dict(zip(names, texts)))
    responses, mask, old_logprobs = texts
    scores = loop.score_responses(models.reward_model, prompts, responses, mask)
    expected.append({"scores": scores})
    ref_logprobs = loop.token_logprobs(models.reference, prompts, responses) * mask
    kl = slow_kl(old_logprobs, ref_logprobs, config.kl_estimator)
    expected.append({"ref_logprobs": ref_logprobs, "kl": kl})
    expected.append({"rewards": slow_rewards(scores, kl, mask, config.beta)})
    for stage, wanted in zip(stages, expected):
        assert stage.keys() == wanted.keys()
        for name, array in wanted.items():
            close(stage[name], array)
    close(old_logprobs, loop.token_logprobs(models.actor, prompts, responses) * mask)


def check_advantages(data, stage, config):
    """Step 6, whose whitening grpo does without; the values are those of the start."""
    rewards, mask = data["rewards"], data["mask"]
    if config.advantage == "gae":
        advantages, returns = slow_gae(rewards, data["values"], mask, config.gamma, config.lam)
        close(stage["returns"], returns)
        assert stage.keys() == {"values", "advantages", "returns", "whitened"}
    else:
        groups = {"rloo": slow_rloo, "grpo": slow_grpo}
        advantages = groups[config.advantage](rewards, mask, config.group_size)
        assert stage.keys() == {"advantages", "whitened"}
    close(stage["advantages"], advantages)
    acting = advantages if config.advantage == "grpo" else slow_whiten(advantages, mask)
    close(stage["whitened"], acting)


def check_update(data, stage, before, after, adams, config):
    """Step 7: an Adam step of actor and critic in each epoch; the others stay."""
    texts, mask, rate = (data["prompts"], data["responses"]), data["mask"], data["lr"]
    actor, critic = before.actor, before.critic
    if critic:
        close(data["values"], loop.critic_values(critic, *texts) * mask)
    for epoch in range(config.ppo_epochs):
        rest = data["old_logprobs"], data["whitened"], mask, config.clip
        gradients, loss, ratio = loop.actor_gradients(actor, *texts, *rest)
        close(loss, slow_ppo(loop.token_logprobs(actor, *texts), *rest)[0])
        close(stage["actor_loss"][epoch], loss)
        close(stage["ratio"][epoch], ratio)
        actor = adam_step(actor, gradients, adams["actor"], rate)
        if critic:
            gradients, loss = loop.critic_gradients(critic, *texts, data["returns"], mask)
            close(stage["critic_loss"][epoch], loss)
            critic = adam_step(critic, gradients, adams["critic"], rate)
    assert stage.keys() == {"ratio", "actor_loss", "critic_loss", "lr"}
    assert len(stage["ratio"]) == len(stage["actor_loss"]) == config.ppo_epochs
    assert len(stage["critic_loss"]) == (config.ppo_epochs if critic else 0)
    for learned, wanted in zip(after[:2], (actor, critic)):
        for name in wanted or ():
            close(learned[name], wanted[name], 1e-6)
    assert same(before.reference, after.reference)
    assert same(before.reward_model, after.reward_model)


def adam_step(model, gradients, states, rate):
    """A model one update further."""
    return {
        name: states.setdefault(name, SlowAdam()).step(weights, gradients[name], rate)
        for name, weights in model.items()
    }


def test_only_actor_and_critic_are_changed_in_place():
    models, rng = start(SMALL)
    arrays = [dict(model) for model in models]
    before = copies(models)
    list(loop.core_loop(models, SMALL, rng))
    for name, model, kept, old in zip(models._fields, models, arrays, before):
        assert same(model, old) == (name in ("reward_model", "reference"))
        assert all(model[weights] is kept[weights] for weights in kept)


def test_each_step_has_its_own_prompts_and_each_group_one():
    for advantage, size in (("gae", 1), ("rloo", 4), ("grpo", 4)):
        config = replace(SMALL, prompt_length=12, vocab_size=30, steps=4, advantage=advantage)
        steps = [merged(stages) for *_, stages, _ in steps_of(*start(config), config)]
        prompts = [tuple(row) for data in steps for row in data["prompts"]]
        assert prompts == [prompts[i - i % size] for i in range(len(prompts))]
        assert len({*prompts}) == len(prompts) // size
        responses = [tuple(row) for data in steps for row in data["responses"]]
        assert len({*responses}) > 0.9 * len(responses)  # those of a group differ


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_seed_decides_everything(advantage):
    config = replace(SMALL, advantage=advantage, steps=2)
    runs = []
    for seed in (1, 1, 2):
        models, rng = start(replace(config, seed=seed))
        trained = list(loop.train(models, config, rng))
        runs.append({**trained[-1][1], **models.actor})
    first, again, other = runs
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    for name in ("prompts", "responses", "whitened", "embed"):
        assert not np.array_equal(first[name], other[name])


def test_several_runs_of_one_command_are_those_of_each_alone(tmp_path):
    """Nothing of one run, of its models or of its chance, reaches the next."""
    flags = f"{FLAGS} --steps 3"
    _, both = shown(f"{flags} --advantage gae rloo --beta 1 0.1", tmp_path)
    runs = itertools.product(("1", "0.1"), ("gae", "rloo"))
    for row, (beta, advantage) in enumerate(runs):
        _, alone = shown(f"{flags} --advantage {advantage} --beta {beta}", tmp_path)
        for name in alone.keys() - {"config"}:
            np.testing.assert_array_equal(both[name][row], alone[name])


# ------------------------------------------------------------------ what the walk-through adds


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[3], SETTINGS[5]])
def test_what_the_walk_through_shows_besides(settings):
    config = replace(SMALL, **settings)
    before, data, after = walk(config)
    texts, mask, real = (data["prompts"], data["responses"]), data["mask"], data["mask"] == 1
    for b, t in np.ndindex(mask.shape):
        tokens = [*data["prompts"][b], *data["responses"][b, :t]]
        p, q = (slow_logprobs(model, tokens) for model in (before.actor, before.reference))
        close(data["exact_kl"][b, t], math.fsum(np.exp(p) * (p - q)) * mask[b, t], 1e-4)
        close(loop.log_softmax(data["logits"][b, t]), p, 1e-4)
    for name in ("k1", "k2", "k3"):
        close(data[name], slow_kl(data["old_logprobs"], data["ref_logprobs"], name), 1e-5)
    close(data["kl"], data[config.kl_estimator])
    ratio, gain, clip = data["ratio"][:, real], data["whitened"][real], config.clip
    too_far = ((ratio > 1 + clip) & (gain > 0)) | ((ratio < 1 - clip) & (gain < 0))
    np.testing.assert_array_equal(data["clipped"][:, real], too_far)
    assert too_far.any()
    assert not data["clipped"][:, ~real].any()
    close(data["new_logprobs"], loop.token_logprobs(after.actor, *texts) * mask, 1e-5)
    assert abs(data["new_logprobs"] - data["old_logprobs"]).max() > 0.01
    assert ("td_errors" in data) == (config.advantage == "gae")
    if "td_errors" in data:
        arrays = data["rewards"], data["values"], mask
        close(data["td_errors"], slow_gae(*arrays, config.gamma, 0)[0], 1e-5)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_to_be_watched_changes_nothing(advantage):
    config = replace(SMALL, advantage=advantage)
    _, watched, after_watched = walk(config)
    [(*_, stages, after)] = steps_of(*start(config), config)
    for name, array in merged(stages).items():
        np.testing.assert_array_equal(array, watched[name])
    for first, second in zip(after, after_watched):
        assert first is second is None or same(first, second)


@pytest.mark.parametrize("shape", [(2, 5, 6), (8, 4, 6), (8, 5, 7)])
def test_exact_kl_refuses_logits_of_another_shape(shape):
    models, _ = start(SMALL)
    prompts, responses = np.zeros((8, 4), int), np.zeros((8, 5), int)
    with pytest.raises(ValueError, match="logits"):
        loop.exact_kl(np.zeros(shape), models.reference, prompts, responses)


def right_moves(config, *learned, seeds=range(3)):
    """Whether each response that did better than expected became more probable, and so on."""
    moves = []
    for seed in seeds:
        _, data, _ = walk(replace(config, seed=seed), *learned)
        better = data["whitened"].sum(axis=1) / data["mask"].sum(axis=1)
        change = (data["new_logprobs"] - data["old_logprobs"]).sum(axis=1)
        moves += [*((better > 0) == (change > 0))]
    return moves


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_what_did_better_than_expected_became_more_probable(advantage):
    sizes = {"batch_size": 16, "prompt_length": 16, "response_length": 32, "vocab_size": 1000}
    assert np.mean(right_moves(loop.Config(**sizes, advantage=advantage))) >= 0.9


def test_with_letters_too_what_did_better_became_more_probable(learned):
    """Words share their letters, so one that did a little better may fall with its like."""
    assert np.mean(right_moves(LETTERS, *learned, seeds=range(6))) >= 0.8


# ------------------------------------------------------------------ divergence


def stopped(step):
    """What a run must raise that diverged in this step."""
    return pytest.raises(FloatingPointError, match=rf"step {step} .*--learning-rate")


@pytest.mark.parametrize("run", [loop.train, loop.walk_through])
@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_weights_that_run_away_stop_the_run(run, advantage, rate):
    """Whether a loss is then finite is up to the processor's rounding: the weights are not."""
    for seed, epochs in itertools.product(range(5), (1, 4)):
        config = replace(
            SMALL, advantage=advantage, learning_rate=rate, ppo_epochs=epochs, seed=seed
        )
        models, rng = start(config)
        with np.errstate(all="ignore"), stopped(1):
            list(run(models, config, rng))


@pytest.mark.parametrize("run", [loop.train, loop.walk_through])
@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("broken", ["actor", "critic", "reward_model", "reference"])
def test_weights_that_are_no_numbers_stop_the_run(run, advantage, broken):
    config = replace(SMALL, advantage=advantage)
    models, rng = start(config)
    if getattr(models, broken):
        getattr(models, broken)["mix"][0, 0] = np.nan
        with np.errstate(all="ignore"), stopped(1):
            list(run(models, config, rng))


def test_it_stops_at_the_step_that_diverged_and_keeps_those_before():
    config, done = replace(SMALL, steps=4), []
    models, rng = start(config)
    with np.errstate(all="ignore"), stopped(3):
        for metrics, _ in loop.train(models, config, rng):
            done.append(metrics["episode"])
            if len(done) == 2:
                models.actor["head"][:] = np.inf
    assert done == [8, 16]


def set_ratios(values):
    """A function that replaces the last epoch's ratios of real tokens."""

    def spoil(models, data):
        real = data["mask"] != 0
        data["ratio"][-1][real] = np.resize(values, real.sum())

    return spoil


SOUND = [
    set_ratios([0.0, np.inf, 0.5]),
    lambda models, data: models.actor["head"].fill(9e5),
    lambda models, data: models.critic["embed"].fill(-9e5),
]
SPOILED = [
    *map(set_ratios, (0.0, np.inf, [0.0, np.inf])),
    *(lambda models, data, w=w: models.actor["head"].put(3, w) for w in (np.nan, np.inf, 1e6)),
    *(lambda models, data, w=w: models.critic["mix"].put(3, w) for w in (np.nan, -np.inf, -1e6)),
    lambda models, data: data["actor_loss"].put(0, np.nan),
    lambda models, data: data["critic_loss"].put(1, np.inf),
]


@pytest.mark.parametrize("spoil", SOUND + SPOILED)
def test_one_bad_weight_or_loss_and_no_good_ratio_are_divergence(spoil):
    models, rng = start(SMALL)
    [(_, data)] = loop.train(models, SMALL, rng)
    spoil(models, data)
    with stopped(7) if spoil in SPOILED else contextlib.nullcontext():
        loop.check_finite(models, data, 7)


# ------------------------------------------------------------------ metrics


def words_of(data):
    """Prompt and real response tokens as strings, the end token included."""
    rows = zip(data["prompts"], data["responses"], data["mask"])
    letters = loop.LETTERS
    return ["".join(letters[t] for t in [*p, *r[m != 0]]) for p, r, m in rows]


def is_shown_word(text, config):
    """Whether a text with its end token was demonstrated, and fits."""
    return text[-1] == "." and text[:-1] in loop.WORDS and len(text) <= 1 + config.response_length


def expected_metrics(data, config, step):
    """Every figure of a step, from its arrays, slowly."""
    mask, batch = data["mask"], config.batch_size
    real, (epochs, clip) = real_tokens(mask), (data["ratio"], config.clip)
    ratios = [[float(ratio[b, t]) for b, t in real] for ratio in epochs]
    gains = [float(data["whitened"][b, t]) for b, t in real]
    pairs = [pair for epoch in ratios for pair in zip(epoch, gains)]
    held = [(a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip) for r, a in pairs]
    kl, score = data["kl"].sum() / batch, data["scores"].sum() / batch
    ended = [data["responses"][b, t] == config.vocab_size - 1 for b, t in real]
    metrics = {
        "objective/scores": score,
        "objective/kl": kl,
        "objective/entropy": -data["old_logprobs"].sum() / batch,
        "objective/non_score_reward": -config.beta * kl,
        "objective/rlhf_reward": data["rewards"].sum() / batch,
        "policy/approxkl_avg": np.mean([math.log(r) ** 2 / 2 for e in ratios for r in e]),
        "policy/clipfrac_avg": np.mean(held),
        "loss/policy_avg": np.mean(data["actor_loss"]),
        "val/ratio": np.mean(ratios),
        "val/num_eos_tokens": sum(ended),
        "val/response_length": len(real) / batch,
        "lr": data["lr"],
        "episode": batch * step,
    }
    if config.advantage == "gae":
        metrics["loss/value_avg"] = np.mean(data["critic_loss"])
    if config.vocab_size == 27:
        texts = words_of(data)
        human = [slow_human(text.rstrip(".")) for text in texts]
        metrics["objective/human_scores"] = np.mean(human)
        metrics["val/words"] = np.mean([is_shown_word(text, config) for text in texts])
    return metrics


@pytest.mark.parametrize(
    "settings", [{"beta": 0.3}, {"advantage": "rloo", "clip": 0.05}, "letters"]
)
def test_metrics_are_those_of_their_names_and_of_their_step(settings, learned):
    config, models = replace(LETTERS, steps=3), learned
    if settings != "letters":
        config, models = replace(SMALL, steps=3, learning_rate=0.04, **settings), ()
    steps = [merged(stages) for *_, stages, _ in steps_of(*start(config, *models), config)]
    models, rng = start(config, *models)
    trained = loop.train(models, config, rng)
    for number, (step, (metrics, data)) in enumerate(zip(steps, trained, strict=True), 1):
        for name, array in step.items():
            np.testing.assert_array_equal(data[name], array)
        expected = expected_metrics(step, config, number)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert metrics["policy/clipfrac_avg"] > 0
        assert metrics.get("val/words", 1) > 0.3


def test_a_ratio_of_nothing_leaves_the_metrics_finite():
    models, rng = start(SMALL)
    [(_, data)] = loop.train(models, SMALL, rng)
    data["ratio"][1, 0, 0] = 0.0
    metrics = loop.step_metrics(data, SMALL, 1)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["policy/approxkl_avg"] > 1


def test_no_price_is_nothing_and_not_minus_nothing():
    models, rng = start(replace(SMALL, beta=0.0))
    [(metrics, _)] = loop.train(models, replace(SMALL, beta=0.0), rng)
    assert metrics["objective/kl"] > 0
    assert not np.signbit(metrics["objective/non_score_reward"])


@pytest.mark.parametrize("length", [16, 4])
def test_words_are_counted_up_to_their_end_and_not_over_padding(length):
    config = replace(LETTERS, response_length=length)
    texts = ["apple.", "apple", "apples.", "appl.", "fly.", "zzzz.", "only.", "onlyx", "a."]
    texts += ["fly.ing", "fly.fly.", "flyfly.", "ice.", "icy.a", "p.", "page."]
    codes, real = np.full((len(texts), 1 + length), 26), np.zeros((len(texts), 1 + length))
    for row, text in enumerate(texts):
        text = text[: 1 + length] if "." in text else text.ljust(1 + length, "e")
        codes[row, : len(text)] = [loop.LETTERS.index(letter) for letter in text]
        real[row, : text.find(".") + 1 or len(text)] = 1  # what follows the end is padding
    whole = [text[: 1 + length].partition(".") for text in texts]
    expected = [bool(end) and word in loop.WORDS for word, end, _ in whole]
    assert 3 <= sum(expected) < len(texts)
    arrays = codes[:, :1], codes[:, 1:], real[:, 1:]
    np.testing.assert_array_equal(loop.completes_word(*arrays, config), expected)
    junk = codes[:, :1], np.where(real[:, 1:], codes[:, 1:], 3), real[:, 1:]
    np.testing.assert_array_equal(loop.completes_word(*junk, config), expected)


def test_the_stages_are_judged_by_fresh_texts(stages):
    few, config = replace(LETTERS, preference_pairs=3), replace(LETTERS, preference_pairs=2048)
    seen = loop.judge_stages(*stages, few, np.random.default_rng(7))
    rng, (untrained, reference, reward_model) = np.random.default_rng(7), stages
    pairs = loop.collect_preferences(reference, config, rng)
    before = loop.generate(untrained, pairs[0][:4], 16, rng, 26)[0]
    data = dict(zip(("prompts", "responses", "mask"), pairs))
    words, scores = words_of(data), loop.score_responses(reward_model, *pairs)
    opinions = {"scores": scores, "human": [slow_human(word.rstrip(".")) for word in words]}
    for name, expected in {**data, **opinions}.items():
        np.testing.assert_allclose(seen[f"preferences/{name}"], expected, rtol=1e-6)
    for name, opinion in zip(("accuracy", "human_accuracy"), opinions.values()):
        right = [(1 + np.sign(a - b)) / 2 for a, b in zip(opinion[:2048], opinion[2048:])]
        assert seen[f"preferences/{name}"] == pytest.approx(np.mean(right))
    assert 0.5 in right  # a tie counts half
    initials = [word[0] for word in loop.WORDS]
    best = sum(math.log(initials.count(i)) for i in initials) / sum(map(len, loop.WORDS))
    assert seen["fine_tuning/best_loss"] == pytest.approx(best)  # as many tokens as letters
    shown_words = np.mean([is_shown_word(word, LETTERS) for word in words])
    assert seen["fine_tuning/words"] == pytest.approx(shown_words)
    np.testing.assert_array_equal(seen["fine_tuning/before"], before)


@pytest.mark.parametrize("steps", [2, 3, 7, 8, 200])
def test_means_over_stretches_that_double(steps):
    values = np.random.default_rng(steps).standard_normal(steps).cumsum()
    stretches, first = [], 0
    while first < steps:
        stretches.append(values[first : 2 * first + 1])
        first = 2 * first + 1
    means, errors = loop.stretch_means(values)
    close(means, [stretch.mean() for stretch in stretches])
    variance = np.mean([(b - a) ** 2 for a, b in itertools.pairwise(values)]) / 2
    close(errors, [math.sqrt(variance / len(stretch)) for stretch in stretches])


def test_the_error_of_a_stretch_is_its_spread():
    noise = np.random.default_rng(0).standard_normal((400, 60))
    means, errors = np.swapaxes([loop.stretch_means(row) for row in noise], 0, 1)
    close(errors.mean(axis=0) / means.std(axis=0), np.ones(6), 0.12)


# ------------------------------------------------------------------ theory

# So small that every response to every prompt can be written down: with one prompt token all
# prompts are judged, with two they are drawn.
TINY = loop.Config(prompt_length=1, response_length=3, vocab_size=4, width=8, beta=1.0, drift=0.5)
DRAWN = replace(TINY, prompt_length=2, vocab_size=3, beta=0.5)


def all_responses(config):
    """Every response that can be written, without what follows its end token."""
    end = config.vocab_size - 1
    for length in range(1, config.response_length + 1):
        for tokens in itertools.product(range(end), repeat=length - 1):
            yield (*tokens, end)
    yield from itertools.product(range(end), repeat=config.response_length)


def enumerated(models, config):
    """J_start, J, J_star, score and kl, as means over all prompts, by full sums."""
    end, length, answers = config.vocab_size - 1, config.response_length, [*all_responses(config)]
    padded = np.array([(*a, *[end] * (length - len(a))) for a in answers])
    mask = np.array([[t < len(a) for t in range(length)] for a in answers])
    rows = []
    for prompt in itertools.product(range(end), repeat=config.prompt_length):
        prompts = np.tile(prompt, (len(answers), 1))
        scores = loop.score_responses(models.reward_model, prompts, padded, mask)
        p, q = (
            np.array([chance(model, prompt, answer) for answer in answers])
            for model in (models.actor, models.reference)
        )
        assert math.fsum(np.exp(q)) == pytest.approx(1)
        score, kl = np.exp(p) @ scores, np.exp(p) @ (p - q)
        best = config.beta * math.log(np.exp(q) @ np.exp(scores / config.beta))
        rows.append([np.exp(q) @ scores, score - config.beta * kl, best, score, kl])
    return dict(zip(("J_start", "J", "J_star", "score", "kl"), np.mean(rows, axis=0)))


def chance(model, prompt, answer):
    """Log probability of a whole response."""
    before = [[*prompt, *answer[:t]] for t in range(len(answer))]
    return sum(slow_logprobs(model, s)[token] for s, token in zip(before, answer))


@pytest.fixture(scope="module", params=[(TINY, 512), (DRAWN, 32)], ids=["all", "drawn"])
def theories(request):
    """The truth about a pair of policies, and 200 estimates of it."""
    config, count = request.param
    models, _ = start(config)
    rngs = map(np.random.default_rng, range(200))
    rows = [loop.attainable_gain(models, config, rng, count) for rng in rngs]
    return enumerated(models, config), {k: np.array([row[k] for row in rows]) for k in rows[0]}


def share_of(truth):
    """What part of the way from J_start to J_star has been made."""
    return (truth["J"] - truth["J_start"]) / (truth["J_star"] - truth["J_start"])


def test_theory_is_what_full_sums_give(theories):
    truth, estimates = theories
    for name, value in truth.items():
        seen = estimates[name]
        assert abs(seen.mean() - value) < 5 * seen.std() / 200**0.5 + 0.005, name
    assert np.nanmean(estimates["share"]) == pytest.approx(share_of(truth), rel=0.1)


@pytest.mark.parametrize("name", ["J_start", "J", "J_star"])
def test_what_theory_says_holds_as_often_as_it_claims(theories, name):
    """Of 200 estimates, with bounds that five in a million fair ones would break."""
    truth, estimates = theories
    distance = abs(estimates[name] - truth[name]) / estimates[f"{name}_error"]
    assert 0.53 <= np.mean(distance < 1) <= 0.82
    assert np.mean(distance < 2) >= 0.88


def test_the_error_of_a_share_is_its_spread(theories):
    _, estimates = theories
    share, error = estimates["share"], estimates["share_error"]
    sure = ~np.isnan(share)
    assert sure.mean() > 0.5
    assert 0.75 < error[sure].mean() / share[sure].std() < 1.33


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_trained_actor_comes_near_the_best_and_never_beats_it(beta):
    sizes = {"batch_size": 64, "steps": 100, "learning_rate": 0.01, "drift": 0.0}
    config = replace(TINY, **sizes, beta=beta)
    models, rng = start(config)
    for metrics, _ in loop.train(models, config, rng):
        if metrics["episode"] % 640 == 0:
            truth = enumerated(models, config)
            assert truth["J"] <= truth["J_star"] + 1e-6
    assert share_of(truth) > 0.9
    gain = loop.attainable_gain(models, config, np.random.default_rng(0))
    assert gain["share"] == pytest.approx(share_of(truth), abs=4 * gain["share_error"] + 0.01)
    assert gain["share"] == pytest.approx(share_of(gain))
    assert gain["J"] == pytest.approx(gain["score"] - beta * gain["kl"])


def test_what_has_not_settled_has_no_share():
    config = replace(TINY, beta=0.01, response_length=6)
    models, _ = start(config)
    few, many = (
        loop.attainable_gain(models, replace(config, beta=beta), np.random.default_rng(0), count)
        for beta, count in ((0.01, 8), (1.0, 512))
    )
    assert few["settled"] == 0
    assert np.isnan(few["share"])
    assert np.isnan(few["share_error"])
    assert many["settled"] == 1
    assert np.isfinite(many["share"])


@pytest.mark.parametrize("at_stake, clear", [(7, False), (8, True), (32, True)])
def test_a_gain_that_is_lost_in_its_noise_has_no_share(at_stake, clear, monkeypatch):
    """Where k of 32 prompts can win, all the same, (gain / error)² is 31 k / (32 - k)."""

    def score_responses(model, prompts, responses, mask):
        return np.where(responses[:, 0] % 2, 1.0, -1.0) * (prompts[:, 0] == 1)

    prompts = np.repeat([[1, 0], [0, 0]], [at_stake, 32 - at_stake], axis=0)
    monkeypatch.setattr(loop, "sample_prompts", lambda *_: prompts)
    monkeypatch.setattr(loop, "score_responses", score_responses)
    config = replace(DRAWN, beta=1.0)
    models, _ = start(config)
    gain = loop.attainable_gain(models, config, np.random.default_rng(0), 4096)
    assert gain["settled"] == 1
    assert np.isfinite(gain["share"]) == np.isfinite(gain["share_error"]) == clear


def test_without_a_price_there_is_no_best():
    config = replace(TINY, beta=0.0)
    models, _ = start(config)
    gain = loop.attainable_gain(models, config, np.random.default_rng(0))
    assert gain["J"] == pytest.approx(gain["score"])
    assert all(np.isnan(gain.get(name, np.nan)) for name in ("J_star", "share", "settled"))
    assert "human" not in gain


def test_theory_of_letters_knows_the_human_and_words(learned):
    """Of the actor, and from all 26 letters: here the actor writes what the reference does."""
    config = replace(LETTERS, drift=0.0)
    models, _ = start(config, *learned)
    gain = loop.attainable_gain(models, config, np.random.default_rng(0), 40)
    prompts = np.repeat(np.arange(26)[:, None], 40, axis=0)
    rng = np.random.default_rng(0)
    for policy in (models.reference, models.actor):
        texts = loop.generate(policy, prompts, 16, rng, 26)[:2]
    data = {"prompts": prompts, "responses": texts[0], "mask": texts[1]}
    words = words_of(data)
    close(gain["human"], np.mean([slow_human(word.rstrip(".")) for word in words]))
    close(gain["words"], np.mean([is_shown_word(word, config) for word in words]))
    assert gain["words"] > 0.7


def test_theory_is_left_out_where_it_would_take_long():
    rng = np.random.default_rng(0)
    assert loop.attainable_gain(None, loop.Config(), rng) == {}
    for name in ("vocab_size", "width", "response_length", "prompt_length"):
        assert loop.attainable_gain(None, replace(DRAWN, **{name: 10**5}), rng) == {}


def test_best_objective_is_the_log_of_a_mean_of_exponentials():
    start_scores = np.random.default_rng(0).standard_normal((3, 8))
    for beta in (0.05, 0.5, 5.0):
        best, bias = loop.best_objective(start_scores, beta)
        whole, half = (
            np.mean([beta * math.log(np.mean(np.exp(part / beta))) for part in parts])
            for parts in (start_scores, start_scores.reshape(6, 4))
        )
        assert best.mean() == pytest.approx(whole)
        assert bias == pytest.approx(whole - half)
        assert bias > 0
    assert np.isfinite(loop.best_objective(1e4 + start_scores, 0.01)[0]).all()


def test_standard_errors_are_of_prompts_where_these_are_drawn():
    """Prompts that differ widely are noise where they are drawn, and none where all are there."""
    rng = np.random.default_rng(0)
    prompts, noise = 10 * rng.standard_normal((2000, 6, 1)), rng.standard_normal((2000, 6, 5))
    drawn = [loop.standard_error(values, False) for values in prompts + noise]
    every = [loop.standard_error(values, True) for values in prompts + noise]
    close(np.mean(np.square(drawn)), (100 + 1 / 5) / 6, 0.05)
    close(np.mean(np.square(every)), 1 / 30, 0.05)
