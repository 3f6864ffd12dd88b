"""What the walk-through shows: the promised lines, and each number at its own label.

All is read from what the command line prints, and compared with what --save wrote.
"""

import json
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import after, numbers, shown
from record import same_as_recorded
from screens import (  # noqa: F401, letters_once is a fixture
    are_shown,
    figures,
    is_shown,
    letters_once,
    listed,
    pages_of,
    printed,
    sentence,
    table,
    walk,
)

PROMISED = """\
=== RLHF Training Loop Demo ===

Step 1: Sample prompts
  Batch size: 4
  Prompt shapes: (4, 64) tokens

Step 2: Generate responses (Actor)
  Actor forward pass...
  Generated tokens: (4, 128)
  Actor logits: (4, 128, 50257)
  Old log probs: (4, 128)

Step 3: Score responses (Reward Model)
  Reward model forward pass...
  Scores: [0.73, 0.45, 0.91, 0.62]

Step 4: Compute KL penalty (Reference)
  Reference forward pass...
  Reference log probs: (4, 128)
  KL divergence per token: (4, 128)
  Mean KL: 0.23

Step 5: Compute total rewards
  reward = reward_model_score - β * KL
  Total rewards: [0.50, 0.28, 0.75, 0.41]

Step 6: Compute advantages (Critic + GAE)
  Critic forward pass...
  Values: (4, 128)
  GAE advantages: (4, 128)

Step 7: PPO update
  Ratio = exp(new_log_prob - old_log_prob)
  Clipped ratio: clip(ratio, 0.8, 1.2)
  Actor loss: -0.042
  Critic loss: 0.156

  Update complete!
"""
# No two of these settings are equal, so that none can stand under another's name.
SIZES = "--prompt-length 5 --response-length 7 --vocab-size 11 --width 3 --inspect 1"
OTHERS = "--beta 0.3 --gamma 0.9 --lam 0.8 --clip 0.15 --drift 0.4 --learning-rate 0.07 --seed 8"
PPO = f"{SIZES} {OTHERS} --batch-size 6 --ppo-epochs 3 --kl-estimator k2"
RATES = "--beta 0.6 --clip 0.25 --drift 0.7 --learning-rate 0.05"
RLOO = f"{SIZES} {RATES} --batch-size 12 --method rloo --group-size 4 --ppo-epochs 8"
GRPO = f"{SIZES} {RATES} --batch-size 6 --method grpo --group-size 3 --ppo-epochs 2"
GRPO += " --kl-in loss --kl-estimator k3"


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """(text, arrays) of the walk-through at its own sizes."""
    return shown("--inspect 2", tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    """(pages, arrays) of settings that all differ."""
    return walk(PPO, tmp_path_factory.mktemp("ppo"))


@pytest.fixture(scope="module")
def rloo(tmp_path_factory):
    return walk(RLOO, tmp_path_factory.mktemp("rloo"))


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    return walk(GRPO, tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def letters(letters_once, tmp_path_factory):  # noqa: F811
    """(pages, arrays) of the walk-through in words."""
    return walk("--preset letters --seed 3", tmp_path_factory.mktemp("letters"))


def means(data):
    """The mean of each array over the real tokens."""
    real = data["mask"] != 0
    return {k: x[real].mean() for k, x in data.items() if x.shape == real.shape}


def test_transcript_of_the_walk_through(default):
    same_as_recorded("walk_through", default[0])


def test_the_promised_lines_in_their_order_with_the_numbers_of_the_arrays(default):
    text, data = default
    lines = iter(text.splitlines())
    for promised in PROMISED.splitlines():
        pattern = re.escape(promised)
        if re.search("Scores|rewards:|KL:|loss:", promised):
            pattern = re.sub(r"(\\-)?\d\\\.\d+", r"-?\\d+\\.\\d+", pattern)
        assert any(re.match(pattern if promised else "$", line) for line in lines), promised
    are_shown(figures(text, "Scores:"), data["scores"])
    are_shown(figures(text, "Total rewards:"), data["rewards"].sum(axis=1))
    assert is_shown(figures(text, "Mean KL:")[0], means(data)["kl"])
    for owner in ("actor", "critic"):
        assert is_shown(figures(text, f"{owner.title()} loss:")[0], data[f"{owner}_loss"][-1])


METHODS = ["ppo", "rloo", "grpo", "grpo --kl-in loss --kl-estimator k3", "rloo --group-size 8"]
METHODS += ["ppo --ppo-epochs 8 --kl-in loss --beta 0.12345"]
LETTERS = ["--preset letters", "--preset letters --reward human"]
HEIGHTS = [
    f"{preset} --method {method}"
    for preset in ("--batch-size 8 --response-length 9 --width 8", *LETTERS)
    for method in METHODS
]


@pytest.mark.parametrize("flags", HEIGHTS)
def test_a_page_fits_a_terminal(flags, letters_once):  # noqa: F811
    """80 columns, and 22 lines with the question, which is printed with its page."""
    pages = pages_of(printed(flags))
    assert len(pages) == 9 + 3 * ("letters" in flags)
    for title, page in pages.items():
        lines = page.splitlines()
        assert max(map(len, lines)) <= 80, title
        assert len(lines) <= 22, title


# ------------------------------------------------------------------ a number at its label


def test_steps_1_to_3(ppo):
    pages, data = ppo
    mask, prompts, responses = data["mask"] != 0, data["prompts"], data["responses"]
    one, two, three = pages["Step 1"], pages["Step 2"], pages["Step 3"]
    assert figures(one, "Batch size:") == [6]
    assert figures(one, "Prompt shapes:") == [6, 5, *listed(prompts[0])]
    assert figures(two, "Generated tokens:") == [6, 7, *listed(responses[0])]
    *shape, size = figures(two, "Actor logits:")
    assert shape == [6, 7, 11]
    assert is_shown(size, 6 * 7 * 11 * 4e-3)  # kB in float32, where models are small
    row = listed(data["old_logprobs"][0][mask[0]])
    are_shown(figures(two, "Old log probs:"), [6, 7, *row, means(data)["old_logprobs"]])
    uniform = re.search(r"it would be (\S+) if all tokens were equally likely", sentence(two))
    assert is_shown(numbers(uniform[1])[0], -np.log(11))
    ended = (responses[mask] == 10).sum()
    assert 0 < ended < 6
    assert f" {ended} of 6 responses ended " in sentence(two)
    assert f" {6 - ended} were cut off after 7 tokens" in sentence(two)
    are_shown(figures(three, "Scores:"), [*data["scores"][:3], data["scores"][-1]])


def test_the_largest_tensor_in_mb(default):
    text, _ = default
    assert figures(text, "Actor logits:")[-1] == pytest.approx(4 * 128 * 50257 * 4 / 1e6, abs=0.05)


def test_step_4(ppo):
    page, data = ppo[0]["Step 4"], ppo[1]
    real, mean = data["mask"] != 0, means(data)
    row = listed(data["ref_logprobs"][0][real[0]])
    are_shown(figures(page, "Reference log probs:"), [6, 7, *row, mean["ref_logprobs"]])
    row = listed(data["kl"][0][real[0]])
    are_shown(figures(page, "KL divergence per token:"), [6, 7, *row])
    np.testing.assert_array_equal(data["kl"], data["k2"])
    assert is_shown(figures(page, "Mean KL:")[0], mean["k2"])
    assert after(page, "Mean KL:").endswith("by k2")
    columns = table(page, "estimator")
    assert columns["estimator"] == ("k1", "k2", "k3", "exact")
    wanted = [mean["k1"], mean["k2"], mean["k3"], mean["exact_kl"]]
    are_shown([numbers(cell)[0] for cell in columns["mean"]], wanted)
    assert "11 tokens" in columns["formula"][-1]
    assert "--drift has added 0.4 times" in sentence(page)
    negative = re.search(r"here on (\d+)% of the tokens", sentence(page))[1]
    assert is_shown(numbers(negative)[0], 100 * (data["k1"][real] < 0).mean())


@pytest.mark.parametrize("screen", ["default", "ppo", "letters"])
def test_step_5_works_out_with_the_figures_that_are_printed(screen, request):
    pages, data = request.getfixturevalue(screen)
    page = (pages_of(pages) if screen == "default" else pages)["Step 5"]
    totals, mask = data["rewards"].sum(axis=1), data["mask"][0] != 0
    beta = json.loads(str(data["config"]))["beta"]
    are_shown(figures(page, "Total rewards:"), totals if len(totals) < 5 else totals[[0, 1, 2, -1]])
    assert f"β = {beta:g} points of score per nat" in sentence(page)
    score, price, kl, total = numbers(
        re.search(r"(\S+ - \S+ \* \S+ = \S+)\. ", sentence(page))[1].replace(" - ", " ")
    )
    are_shown([score, price, kl, total], [data["scores"][0], beta, data["kl"][0].sum(), totals[0]])
    assert abs(score - price * kl - total) <= 10**-total.decimals
    row = re.search(r"its rewards are (\[.*?\])", sentence(page))[1]
    rewards = data["rewards"][0][mask]
    are_shown(numbers(row), rewards if len(rewards) < 5 else rewards[[0, 1, 2, -1]])


def test_step_6_with_a_critic(ppo):
    page, data = ppo[0]["Step 6"], ppo[1]
    names = {"Values:": "values", "GAE advantages:": "advantages", "Whitened:": "loss_advantages"}
    for label, name in names.items():
        row = listed(data[name][0][data["mask"][0] != 0])
        are_shown(figures(page, label), [6, 7, *row, means(data)[name]])
    assert re.search(r"γ = 0\.9, λ = 0\.8\b", page)


@pytest.mark.parametrize(("method", "size"), [("rloo", 4), ("grpo", 3)])
def test_step_6_with_a_group_works_out_with_the_figures_that_are_printed(method, size, request):
    pages, data = request.getfixturevalue(method)
    page, count = pages["Step 6"], len(data["mask"])
    row = listed(data["advantages"][0][data["mask"][0] != 0])
    wanted = [count, 7, *row, means(data)["advantages"]]
    are_shown(figures(page, "Group advantages:"), wanted)
    assert ("Whitened:" in page) == (method == "rloo")
    totals, advantages = figures(page, "R:"), figures(page, "advantages:")
    are_shown(totals, data["rewards"].sum(axis=1)[:size])
    are_shown(advantages, data["advantages"][:size, 0])
    for place, total in enumerate(totals):
        others = np.delete(totals, place)
        by_hand = total - others.mean()
        if method == "grpo":
            by_hand = (total - np.mean(totals)) / np.std(totals, ddof=1)
        assert abs(advantages[place] - by_hand) <= 10 ** -advantages[place].decimals
    groups = f"{len(data['prompts']) // size} prompts, {size} responses to each"
    assert groups in sentence(pages["Step 1"])
    shown_without = pages["RLHF Training Loop Demo"] + page + pages["Step 7"]
    assert not re.search("critic loss|values?:|GAE", shown_without, re.I)


@pytest.mark.parametrize(("method", "clip"), [("ppo", 0.15), ("rloo", 0.25), ("grpo", 0.25)])
def test_step_7(method, clip, request):
    pages, data = request.getfixturevalue(method)
    page, real, columns = pages["Step 7"], data["mask"] != 0, table(pages["Step 7"], "epoch")
    epochs = {"ppo": [0, 1, 2], "rloo": [0, 1, 6, 7], "grpo": [0, 1]}[method]
    assert figures(page, "Clipped ratio: clip(ratio,") == [1 - clip, 1 + clip]
    says = f"Above {1 + clip:g} where A > 0, and below {1 - clip:g} where A < 0"
    assert says in sentence(page)
    assert columns["epoch"] == tuple(str(epoch + 1) for epoch in epochs)
    for place, epoch in enumerate(epochs):
        ratio, clipped = data["ratio"][epoch][real], data["clipped"][epoch][real]
        are_shown(numbers(columns["ratio"][place].replace("..", " ")), [ratio.min(), ratio.max()])
        assert is_shown(numbers(columns["clipped"][place])[0], 100 * clipped.mean())
    assert data["clipped"].any()
    for owner in ("actor", "critic")[: 2 if method == "ppo" else 1]:
        losses = data[f"{owner}_loss"]
        are_shown([numbers(cell)[0] for cell in columns[f"{owner} loss"]], losses[epochs])
        assert is_shown(figures(page, f"{owner.title()} loss:")[0], losses[-1])
    formula = after(page, "Actor loss:")
    assert ("β * mean k3" in formula) == (method == "grpo")
    assert ("group advantage" in sentence(page)) == (method == "grpo")


def test_with_the_kl_in_the_loss_the_rewards_are_the_scores(grpo):
    page, data = grpo[0]["Step 5"], grpo[1]
    np.testing.assert_allclose(data["rewards"].sum(axis=1), data["scores"], rtol=1e-6)
    assert "β * KL" not in page
    assert "step 7" in sentence(page)


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo"])
def test_what_the_update_did_works_out_with_the_figures_that_are_printed(method, request):
    pages, data = request.getfixturevalue(method)
    page, mask = pages["What the update did"], data["mask"] != 0
    columns = table(page, "response")
    cells = {head: [numbers(x)[-1] for x in cells] for head, cells in columns.items()}
    used = [row[real].mean() for row, real in zip(data["loss_advantages"], mask)]
    old, new = data["old_logprobs"].sum(axis=1), data["new_logprobs"].sum(axis=1)
    names = {"total reward": data["rewards"].sum(axis=1), "mean A": used}
    for head, values in (names | {"log prob": old, "after": new, "change": new - old}).items():
        are_shown(cells[head], values[:4])
    for before, later, change in zip(cells["log prob"], cells["after"], cells["change"]):
        assert abs(later - before - change) <= 1.001 * 10**-change.decimals
    for text, response in zip(columns["response"], data["responses"]):
        assert numbers(text) == listed(response)
    followed = sum(np.sign(used) == np.sign(new - old))
    assert f": {followed} of {len(mask)} moved so." in sentence(page)


@pytest.mark.parametrize(
    ("flags", "unit"),
    [(PPO, "kB"), (RLOO, "kB"), ("--vocab-size 2000 --width 30 --response-length 3", "MB")],
    ids=["ppo", "rloo", "large"],
)
def test_what_the_step_cost_is_what_can_be_counted(flags, unit, monkeypatch):
    """Passes are calls that are counted; memory is that of arrays that were there."""
    _, (config,) = loop.read_command_line(flags.split())
    models = loop.prepare(config)
    names = {id(model): name for name, model in models._asdict().items() if model}
    forward, backward, sizes = Counter(), Counter(), {name: [0, 0] for name in names.values()}

    def counted(original, calls, *arguments):
        calls[names[id(arguments[0])]] += 1
        if calls is backward:
            _, gradients, state, _ = arguments
            original(*arguments)
            learned = gradients, state["m"], state["v"]
            first, *moments = [sum(x.nbytes for x in arrays.values()) for arrays in learned]
            sizes[names[id(arguments[0])]] = [first, sum(moments)]
            return None
        return original(*arguments)

    for name, calls in ("backbone", forward), ("generate", forward), ("adam_step", backward):
        monkeypatch.setattr(loop, name, partial(counted, getattr(loop, name), calls))
    list(loop.core_loop(models, config))
    monkeypatch.undo()
    page = pages_of(printed(flags))["What the update did"]
    model, passes_forward, passes_backward, *memory = table(page, "model").values()
    assert page.count(f", {unit}") == 3
    assert sorted(model) == sorted(name.replace("_", " ") for name in names.values())
    for row, name in enumerate(name.replace(" ", "_") for name in model):
        assert numbers(passes_forward[row]) == [forward[name]], name
        assert numbers(passes_backward[row]) == [backward[name]], name
        weights = sum(w.nbytes for w in models._asdict()[name].values())
        found = [numbers(column[row])[0] for column in memory]
        are_shown(found, np.divide([weights, *sizes[name]], {"kB": 1e3, "MB": 1e6}[unit]))


# ------------------------------------------------------------------ a response, and words


@pytest.mark.parametrize("screen", ["ppo", "rloo", "letters"])
def test_a_response_token_by_token_can_be_checked_by_hand(screen, request):
    pages, data = request.getfixturevalue(screen)
    row = 0 if screen == "letters" else 1
    title, page = next(x for x in pages.items() if x[0].startswith("Response"))
    real = data["mask"][row] != 0
    columns = table(page, "t", gap=1)
    tokens = data["responses"][row, real]
    assert columns["t"] == tuple(map(str, np.flatnonzero(real)))
    names = {"actor": "old_logprobs", "reference": "ref_logprobs", "KL": "kl", "reward": "rewards"}
    names |= {"value": "values"} if screen != "rloo" else {}
    names |= {"advantage": "advantages", "A": "loss_advantages"}
    cells = {head: [numbers(x)[0] for x in columns[head]] for head in [*names, "ratio"]}
    assert list(columns) == ["t", "token", *names, "ratio"]
    for head, name in names.items():
        are_shown(cells[head], data[name][row, real])
    are_shown(cells["ratio"], data["ratio"][-1, row, real])
    stars = [cell.endswith("*") for cell in columns["ratio"]]
    assert stars == data["clipped"][-1, row, real].tolist()
    assert title == f"Response {row}"
    first = page.splitlines()[0]
    assert is_shown(numbers(first)[-1], data["scores"][row])
    config = json.loads(str(data["config"]))
    if config["kl_estimator"] == "k1":
        for p, q, kl in zip(cells["actor"], cells["reference"], cells["KL"]):
            assert abs(p - q - kl) <= 10**-kl.decimals
    rewards = -config["beta"] * np.array(cells["KL"])
    rewards[-1] += numbers(first)[-1]
    assert np.abs(rewards - cells["reward"]).max() <= 10**-3
    if screen == "letters":
        assert columns["token"] == tuple(loop.LETTERS[token] for token in tokens)
        word = loop.LETTERS[data["prompts"][0, 0]] + "".join(columns["token"])
        assert first.startswith(f"Response 0: {word},")
        errors = np.array(cells["reward"]) - cells["value"] + [*cells["value"][1:], 0]
        advantages = [
            sum(errors[t:] * 0.95 ** np.arange(len(errors) - t)) for t in range(len(errors))
        ]
        assert np.abs(np.subtract(advantages, cells["advantage"])).max() <= 10**-2
    else:
        assert numbers(" ".join(columns["token"])) == tokens.tolist()


def test_the_stages_before_the_loop(letters):
    pages, data = letters
    one, two = pages["Stage 1"], pages["Stage 2"]
    for page, stage in ((one, "fine_tuning"), (two, "preferences")):
        losses = data[f"{stage}/losses"]
        are_shown(figures(page, "Loss:")[:2], [losses[0], losses[-20:].mean()])
    assert figures(one, "Words to learn from:") == [len(loop.WORDS)]
    assert is_shown(figures(one, "Best possible loss:")[0], data["fine_tuning/best_loss"])
    assert is_shown(figures(one, "Listed words:")[0], 100 * data["fine_tuning/words"])
    assert figures(two, "Preference pairs:") == [2048]
    right = data["preferences/accuracy"]
    error = (right * (1 - right) / 2048) ** 0.5
    wanted = [right, error, data["preferences/best_accuracy"]]
    are_shown(figures(two, "Correct on new pairs:")[:3], 100 * np.array(wanted))
    texts = [data[f"preferences/{name}"] for name in ("prompts", "responses")]
    words = ["".join(loop.LETTERS[t] for t in [*p, *r]).partition(".")[0] for p, r in zip(*texts)]
    rows = re.findall(r"(?m)^  (chosen|rejected) +(\S+)\. +(\S+) +(\S+)$", two)
    differ = [row for row in range(2048) if words[row] != words[row + 2048]][:3]
    places = [place for row in differ for place in (row, row + 2048)]
    assert [(row[0], row[1]) for row in rows] == [
        (("chosen", "rejected")[place >= 2048], words[place]) for place in places
    ]
    for name, column in ("human", 2), ("scores", 3):
        found = [numbers(row[column])[0] for row in rows]
        are_shown(found, data[f"preferences/{name}"][places])
    written = after(one, "After:").split()
    assert [word.strip(".") for word in written] == words[:5]


def test_a_figure_that_stands_twice_is_the_same(default):
    text, _ = default
    pages = pages_of(text)
    rewards = [
        numbers(cell)[0] for cell in table(pages["What the update did"], "response")["total reward"]
    ]
    assert rewards == figures(text, "Total rewards:")
    estimates = dict(zip(*list(table(pages["Step 4"], "estimator").values())[::2]))
    assert numbers(estimates["k1"]) == figures(text, "Mean KL:")[:1]
    assert figures(text, "Scores:")[2] == pytest.approx(numbers(pages["Response 2"])[4], abs=0.0056)


def test_what_is_saved(default):
    data = dict(default[1])
    assert loop.Config(**json.loads(str(data.pop("config")))) == loop.Config()
    wide = "old_logprobs ref_logprobs kl k1 k2 k3 exact_kl rewards values advantages"
    wide = f"{wide} returns loss_advantages new_logprobs mask responses".split()
    shapes = dict.fromkeys(wide, (4, 128)) | {"prompts": (4, 64), "scores": (4,)}
    shapes |= dict.fromkeys(["ratio", "clipped"], (4, 4, 128)) | {"learning_rate": ()}
    shapes |= dict.fromkeys(["actor_loss", "critic_loss"], (4,))
    assert {name: array.shape for name, array in data.items()} == shapes
    kinds = {"prompts": "i", "responses": "i", "clipped": "b"}
    assert all(array.dtype.kind == kinds.get(name, "f") for name, array in data.items())
    floats = [data[name].dtype for name in wide if name != "responses"]
    assert set(floats) == {np.dtype(np.float32)}


def test_the_walk_through_is_the_first_step_of_core_loop(ppo):
    _, (config,) = loop.read_command_line(PPO.split())
    (step,) = loop.core_loop(loop.prepare(config), config)
    for name, array in vars(step).items():
        np.testing.assert_array_equal(ppo[1][name], array)


def test_the_seed_decides_and_nothing_else(tmp_path):
    sizes = "--preset letters --batch-size 8 --preference-pairs 50 --width 8 --response-length 8"
    (first, data), (again, _), (other, _) = [
        shown(f"{sizes} --seed {seed}", tmp_path) for seed in (1, 1, 2)
    ]
    assert first == again
    assert first.split("Step 1")[0] != other.split("Step 1")[0]
    padding = data["mask"] == 0
    assert padding.any()
    for name, array in data.items():
        if array.shape[-2:] == padding.shape and not name.startswith(("responses", "pref")):
            assert not array[..., padding].any(), name
