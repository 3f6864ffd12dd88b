"""README's tables of trainings, which take many seeds, and what it claims about them.

The suite has three short ones. All of them, printed in Markdown as README has them:

    python -m pytest -m claims -n 0 -s tests/test_claims.py
"""

import functools
from dataclasses import replace

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from test_readme import assert_same_figures, rows_of

STEPS = 200
SEEDS = {"0 to 9": range(10), "100 to 109": range(100, 110), "300 to 309": range(300, 310)}
GRPO = {"method": "grpo", "kl_in": "loss"}  # as published, with k3
TRAININGS = {f"β {beta:g}": {"beta": beta} for beta in (0.0, 0.05, 1.0)}  # letters, but for these
TRAININGS |= {"ppo": {}} | {name: {"method": name} for name in ("rloo", "grpo", "dpo")}
for name in ("k1", "k2", "k3"):
    TRAININGS[f"grpo, {name} in the loss"] = GRPO | {"kl_estimator": name}
TRAININGS["grpo, k3 in the loss, β 0.6"] = GRPO | {"kl_estimator": "k3", "beta": 0.6}
TRAININGS["the human's rule"] = {"reward": "human", "beta": 0.0}
PRICES = {"0": "β 0", "0.05": "β 0.05", "0.2": "ppo", "1": "β 1"}
METHODS = "reference ppo rloo grpo dpo".split() + [name for name in TRAININGS if "loss" in name]


@functools.cache
def stages_of(seed):
    """The stages before the loop, which all trainings of a seed share."""
    return loop.learn_from_human(loop.configure("letters", seed=seed))


@np.errstate(all="ignore")  # as the command line does
def train(name, seed, steps=STEPS):
    """Train as the command line does. Returns figures of fresh responses, and others."""
    config = loop.configure("letters", **{"steps": steps, "seed": seed} | TRAININGS[name])
    models, pairs = loop.prepare(config, stages_of(seed)), stages_of(seed).pairs
    metrics = [metrics for metrics, _ in loop.train(models, config, pairs)]
    history = loop.Run(config, name, models, metrics, [], {}, {}).history
    _, human, _ = loop.window_means(history["objective/human_scores"])
    figures = {"start": human[0], "best": human.max(), "verdict": loop.verdict(history)}
    if config.method != "dpo":
        figures["clipped"] = history["policy/clipfrac_avg"][: STEPS // 2].mean()
    return figures | loop.theory(models, config)


def reference(seed):
    """The same figures of the reference."""
    config = loop.configure("letters", seed=seed)
    models = loop.prepare(config, stages_of(seed))
    figures = loop.theory(models._replace(actor=models.reference), config)
    return figures | {"start": figures["human"], "best": figures["human"], "verdict": ""}


def check_no_price(run):
    """At first the human is pleased, then lost with the words."""
    assert run["best"] >= run["start"] + 0.08
    assert run["human"] <= run["start"] - 0.1
    assert run["words"] < 0.15
    assert run["verdict"] == "Reward hacking"
    assert np.isnan(run["share"])


def check_price(run):
    """The human ends near its best, and most of what it reads are words."""
    assert run["human"] >= run["start"] + 0.12
    assert run["human"] >= 0.95 * run["best"]
    assert run["words"] > 0.75
    assert run["verdict"] == "Better liked, in words"


def check_dpo(run):
    """Liked better than at the start, in words, and not as near to the optimum as PPO."""
    assert run["human"] > run["start"] + 0.15
    assert run["words"] > 0.65
    assert 0.5 < run["share"] < 0.9


def test_without_a_price_of_kl_the_human_is_lost_and_with_it_pleased():
    check_no_price(free := train("β 0", 0, 100))
    check_price(priced := train("ppo", 0, 100))
    assert free["score"] > priced["score"] + 0.5
    assert free["kl"] > 10 * priced["kl"]
    assert 0.8 < priced["share"] <= 1
    assert 0.005 <= priced["clipped"] < 0.2


def test_dpo_learns_from_pairs_alone():
    check_dpo(train("dpo", 100, 100))


# ------------------------------------------------------------------ over many seeds


@pytest.fixture(scope="module", params=SEEDS)
def many(request):
    """{training: {figure: its values over ten seeds}}, printed as README's tables."""
    rows = {"reference": [reference(seed) for seed in SEEDS[request.param]]}
    rows |= {name: [train(name, seed) for seed in SEEDS[request.param]] for name in TRAININGS}
    runs = {n: {f: np.array([run[f] for run in row]) for f in row[0]} for n, row in rows.items()}
    print(f"\n\nseeds {request.param}\n\n", *prices(runs), "\n", *methods(runs), sep="\n")
    return runs


def medians(run, figures):
    """Medians over the seeds, as README shows them: a dash for a share below -1."""
    values = [np.median(run[name]) for name in figures.split()]
    values = [value if value > -1 else np.nan for value in values]
    return [loop.fixed(value, 1 if value > 100 else 2) for value in values]


def prices(runs):
    """The rows of README's table of four betas."""
    for beta, name in (PRICES | {"0, the human's rule": "the human's rule"}).items():
        human = ", ".join(medians(runs[name], "start best human"))
        score, kl, words, share = medians(runs[name], "score kl words share")
        yield f"| {beta} | {score} | {kl} | {human} | {words} | {share} |"


def methods(runs):
    """The rows of README's table of methods."""
    for name in METHODS:
        yield f"| {name} | {' | '.join(medians(runs[name], 'score kl human words share'))} |"


@pytest.mark.claims
def test_the_medians_are_readmes(many):
    """Those of other seeds and processors are near, but for trainings that nothing restrains."""
    for head, rows in ("| β |", prices(many)), ("| method |", methods(many)):
        for shown, row in zip(rows_of(head), rows, strict=True):
            free = "k1" in row or row.startswith("| 0 |")
            assert_same_figures(shown, row, 0.15 if free else 0.06, 0.6 if free else 0.2)


@pytest.mark.claims
def test_on_every_seed_the_human_is_lost_without_a_price_and_likes_the_presets_best(many):
    for check, name in (check_no_price, "β 0"), (check_price, "ppo"):
        for figures in zip(*many[name].values()):
            check(dict(zip(many[name], figures)))
    ends = [many[name]["human"] for name in PRICES.values()]
    assert {[*PRICES][best] for best in np.argmax(ends, axis=0)} == {"0.2"}


@pytest.mark.claims
@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo"])
def test_most_of_what_is_attainable_is_attained_with_a_critic_and_without(many, name):
    share = many[name]["share"]
    assert 0.9 <= np.median(share) <= 1
    assert abs((many["ppo"]["share"] - share).mean()) < 0.03


@pytest.mark.claims
def test_dpo_learns_in_the_median_of_any_five_neighbouring_seeds(many):
    figures = "start human words share".split()
    for first in range(6):
        check_dpo({f: np.median(many["dpo"][f][first : first + 5]) for f in figures})


@pytest.mark.claims
def test_the_humans_own_rule_is_hacked_on_no_seed(many):
    run = many["the human's rule"]
    assert run["human"].min() > 0.97
    assert 0.4 < run["words"].min() < run["words"].max() < 0.95
    assert "Reward hacking" not in run["verdict"]


@pytest.mark.claims
def test_k1_in_the_loss_restrains_nothing_and_k2_does(many):
    k1, k2, k3 = (many[f"grpo, {name} in the loss"] for name in ("k1", "k2", "k3"))
    assert k1["words"].max() < 0.1
    assert (k1["verdict"] == "Reward hacking").mean() >= 0.8
    assert np.median(k1["kl"]) > 0.5 * np.median(many["β 0"]["kl"])
    assert k2["words"].min() > k1["words"].max() + 0.1
    assert np.median(k2["words"]) > np.median(k3["words"])
    assert np.median(many["grpo, k3 in the loss, β 0.6"]["words"]) > 0.65


@pytest.mark.claims
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_errors_of_the_optimum_are_calibrated(beta):
    """Nine in ten repetitions lie within two errors of their mean; on seed 0, three in four."""
    sizes = {"J_star": [], "J": [], "share": []}  # differences from the mean, in errors
    for seed in range(4):
        config = loop.configure("letters", steps=STEPS, beta=beta, seed=seed)
        models = loop.prepare(config, stages_of(seed))
        assert all(step.mask.any() for step in loop.core_loop(models, config))
        found = [loop.theory(models, replace(config, seed=1000 + n)) for n in range(20)]
        for name, size in sizes.items():
            values, errors = (np.array([x[f] for x in found]) for f in (name, f"{name}_error"))
            size.extend((abs(values - np.nanmean(values)) / errors)[~np.isnan(values)])
    for name, size in sizes.items():
        assert len(size) >= 70, name  # few dashes
        assert np.mean(np.less_equal(size, 2)) >= 0.9, name
        assert np.median(size) > 0.2, name  # nor are the errors far too large
