"""README's tables of trainings, which take many seeds, and what it claims about them.

The suite trains on two seeds only. All of it, printed in Markdown as README has it:

    python -m pytest -m claims -n 0 -s tests/test_claims.py
"""

import dataclasses

import numpy as np
import pytest

import rlhf_loop_pseudo as loop

STEPS = 200
SEEDS = {"0 to 9": range(10), "100 to 109": range(100, 110), "300 to 309": range(300, 310)}
TRAININGS = {  # settings that differ from those of --preset letters
    "β 0": {"beta": 0.0},
    "β 0.05": {"beta": 0.05},
    "ppo": {},
    "β 1": {"beta": 1.0},
    "rloo": {"method": "rloo"},
    "grpo": {"method": "grpo"},
    "dpo": {"method": "dpo"},
    "k1 in the loss": {"method": "grpo", "kl_in": "loss", "kl_estimator": "k1"},
    "k2 in the loss": {"method": "grpo", "kl_in": "loss", "kl_estimator": "k2"},
    "k3 in the loss": {"method": "grpo", "kl_in": "loss", "kl_estimator": "k3"},
    "k3 in the loss, β 0.6": {
        "method": "grpo",
        "kl_in": "loss",
        "kl_estimator": "k3",
        "beta": 0.6,
    },
    "k2": {"kl_estimator": "k2"},
    "k3": {"kl_estimator": "k3"},
    "human's rule, β 0": {"reward": "human", "beta": 0.0},
}
FIGURES = "score", "kl", "start", "best", "human", "words", "share"


def measure(seed, names):
    """{training: {figure: value}} for one seed, whose trainings share the stages before."""
    results, stages = {}, loop.learn_from_human(loop.configure("letters", seed=seed))
    for name in names:
        settings = {"steps": STEPS, "seed": seed} | TRAININGS[name]
        results[name] = train(loop.configure("letters", **settings), stages)
    config = loop.configure("letters", seed=seed)
    models = loop.prepare(config, stages)
    reference = models._replace(actor=models.reference)
    results["reference"] = loop.theory(reference, config)
    return results


@np.errstate(all="ignore")
def train(config, stages):
    """A training: figures of fresh responses, and the human's opinion at start and best."""
    models = loop.prepare(config, stages)
    metrics = [metrics for metrics, _ in loop.train(models, config, stages.pairs)]
    history = loop.Run(config, "", models, metrics, [], {}, {}).history
    _, human, _ = loop.window_means(history["objective/human_scores"])
    figures = {"start": human[0], "best": human.max(), "verdict": loop.verdict(history)}
    if "policy/clipfrac_avg" in history:
        figures["clipped"] = history["policy/clipfrac_avg"][: STEPS // 2].mean()
    return figures | loop.theory(models, config)
