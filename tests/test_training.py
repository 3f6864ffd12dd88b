"""The loop: what a step does, what it changes, what is measured of it, and how far it can get."""

import contextlib
import copy
import itertools
import math
import statistics
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import (
    SlowAdam,
    least_loss,
    shown,
    slow_gae,
    slow_grpo,
    slow_human,
    slow_kl,
    slow_logprobs,
    slow_rewards,
    slow_rloo,
    slow_whiten,
    texts_of,
)

SMALL = loop.Config(
    batch_size=8, prompt_length=4, response_length=5, vocab_size=6, width=8, learning_rate=0.02
)
LETTERS = loop.Config(**loop.PRESETS["letters"])
ADVANTAGES = ("gae", "rloo", "grpo")


def start(config, *learned):
    """Models and generator as the command line makes them."""
    rng = np.random.default_rng(config.seed)
    return loop.init_models(config, rng, *learned), rng


def steps_of(models, rng, config, run=loop.core_loop):
    """For each step: models and generator before it, its dicts, the models after it."""
    before, stages = copy.deepcopy((models, rng)), []
    for stage in run(models, config, rng):
        stages.append(stage)
        if "ratio" in stage:
            after = copy.deepcopy((models, rng))
            yield *before, stages, after[0]
            before, stages = after, []


def merged(stages):
    """The dicts of a step as one."""
    return {name: array for stage in stages for name, array in stage.items()}


def close(actual, expected, tolerance=1e-7):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def stages():
    """(untrained, reference, reward_model) of the stages before the loop."""
    config = replace(LETTERS, preference_pairs=500)
    return loop.learn_from_human(config, np.random.default_rng([0, 1]))[:3]


# ------------------------------------------------------------------ the models at the start


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_training_starts_at_the_reference_with_a_critic_only_for_gae(advantage):
    models, _ = start(replace(SMALL, drift=0.0, advantage=advantage))
    np.testing.assert_array_equal(models.actor["head"], models.reference["head"])
    assert (models.critic is None) == (advantage != "gae")
    assert not models.critic or not models.critic["head"].any()
    present = [model for model in models if model]
    for model, name in itertools.product(present, ("embed", "mix")):
        np.testing.assert_array_equal(model[name], models.reference[name])
    weights = [array for model in present for array in model.values()]
    assert not any(np.shares_memory(*pair) for pair in itertools.combinations(weights, 2))


def test_models_are_drawn_with_the_stated_deviations_and_drift_in_proportion():
    models, _ = start(loop.Config(vocab_size=3000, width=100, drift=0.5))
    for name, deviation in (("embed", 0.1), ("mix", 0.5), ("head", 0.1)):
        weights, drift = models.reference[name], models.actor[name] - models.reference[name]
        assert (weights.std(), drift.std()) == pytest.approx((deviation, deviation / 2), rel=0.03)
        assert abs(weights.mean()) < 0.03 * deviation
        assert abs(weights).max() < 1.74 * deviation  # uniform
        assert abs(np.corrcoef(weights.ravel(), drift.ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(models.critic["embed"], models.reference["embed"])
    assert [m["head"].std() for m in models[1:3]] == pytest.approx([0.05, 0.25], rel=0.2)


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
@pytest.mark.parametrize("run", [loop.core_loop, loop.walk_through])
def test_a_step_is_what_its_seven_parts_give_watched_or_not(run, settings):
    """In float64, in which rounding is far below what is compared."""
    config = replace(SMALL, steps=3, **settings)
    models, rng = start(config)
    models = loop.Models(*(m and {k: np.float64(w) for k, w in m.items()} for m in models))
    adams = defaultdict(SlowAdam), defaultdict(SlowAdam)
    steps = steps_of(models, rng, config, run)
    for step, (before, rng_before, stages, after) in enumerate(steps):
        rate = 0.02 * (3 - step) / 3
        expected, left = by_hand(before, rng_before, config, rate, adams)
        for stage, wanted in zip(stages, expected, strict=True):
            assert stage.keys() == wanted.keys() or run is loop.walk_through
            for name, array in wanted.items():
                close(stage[name], array)
        for model, wanted in zip(after, left):
            for name in wanted or ():
                close(model[name], wanted[name], 1e-6)
    assert step == 2


def by_hand(models, rng, config, rate, adams):
    """The seven dicts of a step, and the models that it leaves."""
    actor, critic, reward_model, reference = models
    size = 1 if critic else config.group_size
    count, end = config.batch_size // size, config.vocab_size - 1
    prompts = loop.sample_prompts(rng, count, config.prompt_length, config.vocab_size)
    prompts = prompts.repeat(size, axis=0)
    responses, mask, old = loop.generate(actor, prompts, config.response_length, rng, end)
    texts = prompts, responses
    scores = loop.score_responses(reward_model, *texts, mask)
    ref_logprobs = loop.token_logprobs(reference, *texts) * mask
    kl = slow_kl(old, ref_logprobs, config.kl_estimator)
    rewards, judged = slow_rewards(scores, kl, mask, config.beta), {}
    if critic:
        values = judged["values"] = loop.critic_values(critic, *texts) * mask
        advantages, returns = slow_gae(rewards, values, mask, config.gamma, config.lam)
        judged["returns"] = returns
    else:
        compare = {"rloo": slow_rloo, "grpo": slow_grpo}[config.advantage]
        advantages = compare(rewards, mask, size)
    whitened = advantages if config.advantage == "grpo" else slow_whiten(advantages, mask)
    rest, ratios, losses = (old, whitened, mask, config.clip), [], ([], [])
    for _ in range(config.ppo_epochs):
        gradients, loss, ratio = loop.actor_gradients(actor, *texts, *rest)
        actor = adam_step(actor, gradients, adams[0], rate)
        ratios.append(ratio)
        losses[0].append(loss)
        if critic:
            gradients, loss = loop.critic_gradients(critic, *texts, returns, mask)
            critic = adam_step(critic, gradients, adams[1], rate)
            losses[1].append(loss)
    return [
        {"prompts": prompts},
        {"responses": responses, "mask": mask, "old_logprobs": old},
        {"scores": scores},
        {"ref_logprobs": ref_logprobs, "kl": kl},
        {"rewards": rewards},
        {**judged, "advantages": advantages, "whitened": whitened},
        {"ratio": ratios, "actor_loss": losses[0], "critic_loss": losses[1], "lr": rate},
    ], loop.Models(actor, critic, reward_model, reference)


def adam_step(model, gradients, adams, rate):
    """A model one update further."""
    return {name: adams[name].step(w, gradients[name], rate) for name, w in model.items()}


# ------------------------------------------------------------------ what the walk-through adds


def too_far(data, clip):
    """Whether each real token's ratio has gone, in each epoch, past the clip that stops it."""
    real = data["mask"] == 1
    ratio, gain = data["ratio"][:, real], data["whitened"][real]
    return ((ratio > 1 + clip) & (gain > 0)) | ((ratio < 1 - clip) & (gain < 0))


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[4], SETTINGS[5]])
def test_what_the_walk_through_shows_besides(settings):
    config = replace(SMALL, **settings)
    [(before, _, stages, after)] = steps_of(*start(config), config, loop.walk_through)
    data = merged(stages)
    texts, mask, real = (data["prompts"], data["responses"]), data["mask"], data["mask"] == 1
    for b, t in np.ndindex(mask.shape):
        tokens = [*data["prompts"][b], *data["responses"][b, :t]]
        p, q = (slow_logprobs(model, tokens) for model in (before.actor, before.reference))
        close(data["exact_kl"][b, t], math.fsum(np.exp(p) * (p - q)) * mask[b, t], 1e-4)
        close(loop.log_softmax(data["logits"][b, t]), p, 1e-4)
    for name in ("k1", "k2", "k3"):
        close(data[name], slow_kl(data["old_logprobs"], data["ref_logprobs"], name), 1e-5)
    assert data["clipped"].any()
    np.testing.assert_array_equal(data["clipped"][:, real], too_far(data, config.clip))
    assert not data["clipped"][:, ~real].any()
    close(data["new_logprobs"], loop.token_logprobs(after.actor, *texts) * mask, 1e-5)


# ------------------------------------------------------------------ divergence


def stopped(step):
    """What a run must raise that diverged in this step."""
    return pytest.raises(FloatingPointError, match=rf"step {step} .*--learning-rate")


@pytest.mark.parametrize("run", [loop.train, loop.walk_through])
@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_weights_that_run_away_stop_the_run(run, advantage, rate):
    """Whether a loss is then finite is up to the processor's rounding: the weights are not."""
    config = replace(SMALL, advantage=advantage, learning_rate=rate)
    models, rng = start(config)
    with np.errstate(all="ignore"), stopped(1):
        list(run(models, config, rng))


def ratios(*values):
    """A function that replaces the last epoch's ratios of real tokens."""
    return lambda models, data: np.place(data["ratio"][-1], data["mask"] == 1, values)


SOUND = [
    ratios(0.0, np.inf, 0.5),
    lambda models, data: models.actor["head"].fill(9e5),
    lambda models, data: models.critic["embed"].fill(-9e5),
]
SPOILED = [
    *(ratios(*values) for values in ([0.0], [np.inf], [0.0, np.inf])),
    *(lambda models, data, w=w: models.actor["head"].put(3, w) for w in (np.nan, np.inf, 1e6)),
    *(lambda models, data, w=w: models.critic["mix"].put(3, w) for w in (np.nan, -np.inf, -1e6)),
    lambda models, data: data["actor_loss"].put(0, np.nan),
    lambda models, data: data["critic_loss"].put(1, np.inf),
]


@pytest.mark.parametrize("spoil", SOUND + SPOILED)
def test_one_bad_weight_or_loss_and_no_good_ratio_stop_their_step(spoil, monkeypatch):
    """Here the third of three, and those before it are kept."""
    config, done, core_loop = replace(SMALL, steps=3), [], loop.core_loop

    def spoiled(*given):
        data = {}
        for stage in core_loop(*given):
            data |= stage
            if "ratio" in stage and len(done) == 2:
                spoil(given[0], data)
            yield stage

    monkeypatch.setattr(loop, "core_loop", spoiled)
    models, rng = start(config)
    bad = spoil in SPOILED
    with np.errstate(all="ignore"), stopped(3) if bad else contextlib.nullcontext():
        for metrics, _ in loop.train(models, config, rng):
            done.append(metrics["episode"])
    assert done == ([8, 16] if bad else [8, 16, 24])


# ------------------------------------------------------------------ metrics


def readers(texts, config):
    """(what the human thinks of each text, whether it is a demonstrated word that fits)."""
    shown = {f"{word}." for word in loop.WORDS if len(word) <= config.response_length}
    return np.array([(slow_human(text.rstrip(".")), text in shown) for text in texts]).T


def expected_metrics(data, config, step):
    """Every figure of a step, from its arrays, slowly."""
    mask, batch, real = data["mask"], config.batch_size, data["mask"] == 1
    kl, ratios = data["kl"].sum() / batch, np.float64(data["ratio"][:, real])
    metrics = {
        "objective/scores": data["scores"].sum() / batch,
        "objective/kl": kl,
        "objective/entropy": -data["old_logprobs"].sum() / batch,
        "objective/non_score_reward": -config.beta * kl,
        "objective/rlhf_reward": data["rewards"].sum() / batch,
        "policy/approxkl_avg": np.mean(np.log(ratios) ** 2 / 2),
        "policy/clipfrac_avg": np.mean(too_far(data, config.clip)),
        "loss/policy_avg": np.mean(data["actor_loss"]),
        "val/ratio": np.mean(ratios),
        "val/num_eos_tokens": list(data["responses"][real]).count(config.vocab_size - 1),
        "val/response_length": real.sum() / batch,
        "lr": data["lr"],
        "episode": batch * step,
    }
    if config.advantage == "gae":
        metrics["loss/value_avg"] = np.mean(data["critic_loss"])
    if config.vocab_size == 27:
        texts = texts_of(data["prompts"], data["responses"], mask)
        human, words = readers(texts, config)
        metrics |= {"objective/human_scores": human.mean(), "val/words": words.mean()}
    return metrics


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, steps=3, learning_rate=0.04, beta=0.3),
        replace(SMALL, steps=3, learning_rate=0.04, advantage="rloo", clip=0.05, beta=0.0),
        replace(LETTERS, steps=3),
    ],
)
def test_metrics_are_those_of_their_names_and_of_their_step(config, stages):
    learned = stages[1:] if config.readable else ()
    steps = [merged(dicts) for *_, dicts, _ in steps_of(*start(config, *learned), config)]
    models, rng = start(config, *learned)
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
        assert config.beta or not np.signbit(metrics["objective/non_score_reward"])
        data["ratio"][0, 0, 0] = 0  # which has no finite logarithm
        assert np.isfinite([*loop.step_metrics(data, config, number).values()]).all()


@pytest.mark.parametrize("length", [16, 4])
@pytest.mark.parametrize("padding", "a.")
def test_words_are_counted_up_to_their_end_and_not_over_padding(length, padding):
    config = replace(LETTERS, response_length=length)
    texts = "apple. appl. apples. apple fly. fly.ing fly.fly. flyfly. icy.a ice. only. p. zzzz."
    texts = [text.ljust(1 + length, padding)[: 1 + length] for text in texts.split()]
    codes = np.array([[loop.LETTERS.index(letter) for letter in text] for text in texts])
    real = np.array([["." not in text[:t] for t in range(1, 1 + length)] for text in texts])
    arrays = codes[:, :1], codes[:, 1:], real
    _, expected = readers(texts_of(*arrays), config)
    assert 3 <= sum(expected) < len(texts)
    np.testing.assert_array_equal(loop.completes_word(*arrays, config), expected)


def test_the_stages_are_judged_by_fresh_texts(stages):
    few, config = replace(LETTERS, preference_pairs=3), replace(LETTERS, preference_pairs=2048)
    seen = loop.judge_stages(*stages, few, np.random.default_rng(7))
    rng, (untrained, reference, reward_model) = np.random.default_rng(7), stages
    pairs = loop.collect_preferences(reference, config, rng)
    human, words = readers(texts_of(*pairs), config)
    scores = loop.score_responses(reward_model, *pairs)
    signs = np.sign(np.subtract(*np.split(scores, 2)))
    assert 0 in signs  # a tie counts half
    expected = dict(zip(("prompts", "responses", "mask"), pairs))
    expected |= {"scores": scores, "human": human, "accuracy": np.mean(1 + signs) / 2}
    expected = {f"preferences/{name}": value for name, value in expected.items()}
    expected["fine_tuning/best_loss"] = least_loss(loop.WORDS)
    expected["fine_tuning/before"] = loop.generate(untrained, pairs[0][:4], 16, rng, 26)[0]
    expected |= {"fine_tuning/words": words.mean(), "fine_tuning/count": len(loop.WORDS)}
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-6)


@pytest.mark.parametrize("steps", [2, 3, 7, 8, 60])
def test_means_over_stretches_that_double_and_the_error_of_each(steps):
    """The mean square of an error is the variance of what it is of."""
    noise = np.random.default_rng(steps).standard_normal((2000, steps))
    _, means, errors = np.swapaxes([loop.stretch_means(row) for row in noise], 0, 1)
    starts = [2**n - 1 for n in range(6) if 2**n - 1 < steps]
    close(means.T, [noise[:, first : 2 * first + 1].mean(axis=1) for first in starts])
    close(np.mean(errors**2, axis=0) / means.var(axis=0), np.ones(len(starts)), 0.15)


# ------------------------------------------------------------------ theory

# So small that all responses can be written down; prompts of two tokens are drawn
TINY = loop.Config(prompt_length=1, response_length=3, vocab_size=4, width=8, beta=1.0, drift=0.5)
DRAWN = replace(TINY, prompt_length=2, vocab_size=3, beta=0.5)


def enumerated(models, config):
    """J_start, J, J_star, score and kl, as means over all prompts, by full sums."""
    end, length, rows = config.vocab_size - 1, config.response_length, []
    every = itertools.product(range(end + 1), repeat=length)
    responses = np.array([r for r in every if [*r] == sorted(r, key=end.__eq__)])  # ends are last
    mask = np.arange(length) <= (responses != end).sum(axis=1, keepdims=True)
    for prompt in itertools.product(range(end), repeat=config.prompt_length):
        texts = np.tile(prompt, (len(responses), 1)), responses
        scores = np.float64(loop.score_responses(models.reward_model, *texts, mask))
        p, q = (
            (loop.token_logprobs(model, *texts) * mask).sum(axis=1, dtype=np.float64)
            for model in (models.actor, models.reference)
        )
        assert (sum(np.exp(p)), sum(np.exp(q))) == pytest.approx((1, 1), abs=1e-5)
        score, kl = np.exp(p) @ scores, np.exp(p) @ (p - q)
        best = config.beta * math.log(np.exp(q) @ np.exp(scores / config.beta))
        rows.append([np.exp(q) @ scores, score - config.beta * kl, best, score, kl])
    return dict(zip(("J_start", "J", "J_star", "score", "kl"), np.mean(rows, axis=0)))


@pytest.fixture(scope="module", params=[(TINY, 512), (DRAWN, 32)], ids=["all", "drawn"])
def theories(request):
    """The truth about a pair of policies, and 200 estimates of it."""
    config, count = request.param
    models, _ = start(config)
    rows = [
        loop.attainable_gain(models, config, np.random.default_rng(seed), count)
        for seed in range(200)
    ]
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


@pytest.mark.parametrize("name", ["J_start", "J", "J_star", "share"])
def test_an_error_is_the_spread_of_what_it_is_of(theories, name):
    _, estimates = theories
    seen, errors = estimates[name], estimates[f"{name}_error"]
    sure = ~np.isnan(seen)
    assert sure.mean() > 0.5
    assert 0.75 < errors[sure].mean() / seen[sure].std() < 1.33


def error_of(values, config):
    """The standard error of a mean of values (prompts, responses)."""
    if config is TINY:  # every prompt is there, and is no noise
        return math.sqrt(sum(map(statistics.variance, values)) / values.shape[1]) / len(values)
    return statistics.stdev(values.mean(axis=1)) / len(values) ** 0.5


@pytest.mark.parametrize("config", [TINY, DRAWN])
def test_the_best_its_error_and_whether_it_has_settled(config, monkeypatch):
    """From scores of the reference's responses, so high that exp cannot hold them."""
    seen, settled, score_responses = [], set(), loop.score_responses

    def watching(*given):
        seen.append(np.float64(score_responses(*given)))
        return 1e4 + seen[-1]

    monkeypatch.setattr(loop, "score_responses", watching)
    models, _ = start(config)
    for beta, count in itertools.product((0.01, 0.1, 0.3, 1.0), (4, 64)):
        rng = np.random.default_rng(0)
        gain = loop.attainable_gain(models, replace(config, beta=beta), rng, count)
        scores = seen[-2].reshape(3 if config is TINY else 32, count)
        best, half_best = (
            np.mean([beta * math.log(np.mean(np.exp(part / beta))) for part in parts])
            for parts in (scores, scores.reshape(-1, count // 2))
        )
        mean = np.exp(scores / beta).mean(axis=1, keepdims=True)
        noise = error_of(beta * (np.log(mean) + np.exp(scores / beta) / mean), config)
        settled.add(clear := best - half_best <= noise)
        wanted = (1e4 + best, noise) if clear else (np.nan, np.nan)
        assert (gain["J_star"], gain["J_star_error"]) == pytest.approx(wanted, 1e-6, nan_ok=True)
        assert clear or np.isnan([gain["share"], gain["share_error"]]).all()
        assert gain["J_start_error"] == pytest.approx(error_of(scores, config), rel=1e-4)
    assert settled == {False, True}


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_trained_actor_comes_near_the_best_and_never_beats_it(beta):
    config = replace(TINY, beta=beta, batch_size=64, steps=100, learning_rate=0.01, drift=0.0)
    models, rng = start(config)
    for metrics, _ in loop.train(models, config, rng):
        if metrics["episode"] % 640 == 0:
            truth = enumerated(models, config)
            assert truth["J"] <= truth["J_star"] + 1e-6
    assert share_of(truth) > 0.9
    gain = loop.attainable_gain(models, config, np.random.default_rng(0))
    assert gain["share"] == pytest.approx(share_of(truth), abs=4 * gain["share_error"] + 0.01)
    assert gain["share"] == pytest.approx(share_of(gain))


def test_a_share_that_is_the_same_everywhere_has_no_error():
    start, beta = np.random.default_rng(0).standard_normal((26, 512)), 2.0
    mean = np.exp(start / beta).mean(axis=1, keepdims=True)
    best = beta * (np.log(mean) + np.exp(start / beta) / mean - 1)
    gain = loop.gain_shares(start, (start + best) / 2, beta, True)
    assert (gain["share"], gain["share_error"]) == pytest.approx((0.5, 0), abs=1e-9)


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
    assert np.isfinite(gain["J_star"])
    assert np.isfinite(gain["share"]) == np.isfinite(gain["share_error"]) == clear


def test_without_a_price_there_is_no_best():
    config = replace(TINY, beta=0.0)
    models, _ = start(config)
    gain = loop.attainable_gain(models, config, np.random.default_rng(0))
    assert gain["J"] == pytest.approx(gain["score"])
    assert all(np.isnan(gain.get(name, np.nan)) for name in ("J_star", "share"))
    assert "human" not in gain


def test_theory_of_letters_knows_the_human_and_words(stages):
    """Of the actor, and from all 26 letters: here the actor writes what the reference does."""
    config = replace(LETTERS, drift=0.0)
    models, _ = start(config, *stages[1:])
    gain = loop.attainable_gain(models, config, np.random.default_rng(0), 40)
    prompts = np.repeat(np.arange(26)[:, None], 40, axis=0)
    rng = np.random.default_rng(0)
    for policy in (models.reference, models.actor):
        responses, mask, _ = loop.generate(policy, prompts, 16, rng, 26)
    expected = readers(texts_of(prompts, responses, mask), config).mean(axis=1)
    assert (gain["human"], gain["words"]) == pytest.approx(tuple(expected))
    assert gain["words"] > 0.7


@pytest.mark.parametrize(
    "length, vocab_size, drawn", [(1, 33, False), (1, 34, True), (2, 33, True)]
)
def test_prompts_are_drawn_only_where_there_are_many(length, vocab_size, drawn, monkeypatch):
    config = replace(TINY, prompt_length=length, vocab_size=vocab_size)
    models, rng = start(config)
    monkeypatch.delattr(loop, "sample_prompts")
    with pytest.raises(NameError) if drawn else contextlib.nullcontext():
        loop.attainable_gain(models, config, rng, 2)


def test_theory_is_left_out_where_it_would_take_long():
    for name in ("vocab_size", "width", "response_length", "prompt_length"):
        config = replace(DRAWN, **{name: 10**5})
        assert loop.attainable_gain(None, config, np.random.default_rng(0)) == {}
