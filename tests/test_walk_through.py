"""What the walk-through prints: the lines it promises, and each number from an array that --save hands over."""

import json
import re
from decimal import Decimal

import numpy as np
import pytest
from conftest import Number, after, numbers, owned, rounds, shown, table_below

import rlhf_loop_pseudo as loop

TRANSCRIPT = """\
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
TINY = "--vocab-size 40 --batch-size 6 --prompt-length 3 --response-length 9 --width 4"
RUNS = {
    "gpt2": "--inspect 2",
    "letters": "--preset letters --inspect 1",
    "other": f"{TINY} --inspect 3 --gamma 0.9 --lam 0.8 --kl-estimator k2 --beta 0.5 --clip 0.1 --ppo-epochs 3 "
    "--learning-rate 0.05",
}


class Walk:
    """The page and the arrays of one walk-through."""

    def __init__(self, flags, folder):
        self.text, self.data = shown(flags, folder)
        self.settings = json.loads(str(self.data.pop("config")))
        self.config = loop.Config(**self.settings)
        self.real = self.data["mask"] == 1
        self.totals = self.data["rewards"].sum(axis=1)

    def step(self, number):
        """The text of one step."""
        return self.text.split(f"\nStep {number}: ")[1].split(f"\nStep {number + 1}: ")[0]

    def mean(self, name):
        """Mean of an array over the real tokens."""
        return self.data[name][self.real].mean(dtype=np.float64)


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """The walk-throughs, each made when it is first asked for."""
    made, folder = {}, tmp_path_factory.mktemp("walk")

    def walk(name):
        if name not in made:
            made[name] = Walk(RUNS.get(name, name), folder)
        return made[name]

    return walk


@pytest.fixture(params=RUNS)
def walk(request, walks):
    """Three walk-throughs: both presets, and one with other settings."""
    return walks(request.param)


@pytest.mark.parametrize("name", ["gpt2", "letters"])
def test_the_transcript_line_by_line(name, walks):
    config = walks(name).config
    sizes = {4: config.batch_size, 64: config.prompt_length, 128: config.response_length, 50257: config.vocab_size}
    lines = iter(walks(name).text.splitlines())
    for promised in TRANSCRIPT.splitlines():
        pattern = re.escape(promised)
        if promised.startswith("  ") and "clip(" not in promised:
            pattern = re.sub(r"\\\[.*\\\]", r"\\[(-?\\d+\\.\\d\\d|…)(, (-?\\d+\\.\\d\\d|…))+\\]", pattern)
            pattern = re.sub(r"(\\-)?\d\\\.(\d+)", lambda found: rf"-?\d\.\d{{{len(found[2])}}}", pattern)
            pattern = re.sub(r"(?<=[( ])\d+(?=[,)\\ ]|$)", lambda size: str(sizes[int(size[0])]), pattern)
        assert any(re.match(pattern if promised else "$", line) for line in lines), promised


def test_plain_text_within_80_columns(walk):
    lines = walk.text.splitlines()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", walk.text)
    assert max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)
    assert "\n\n\n" not in walk.text


def test_the_first_steps_show_what_is_there(walk):
    data, config = walk.data, walk.config
    batch, prompt, response, vocab = config.batch_size, config.prompt_length, config.response_length, config.vocab_size
    assert numbers(after(walk.text, "Batch size:")) == [batch]
    assert after(walk.text, "Prompt shapes:").startswith(f" ({batch}, {prompt}) tokens ")
    assert f" ({batch}, {response}, {vocab}) " in after(walk.text, "Actor logits:")
    for start, name in {"Prompt shapes:": "prompts", "Generated tokens:": "responses"}.items():
        tokens = data[name][0] if name == "prompts" else data[name][0][walk.real[0]]
        if vocab == 27:
            assert after(walk.text, start).split()[-1] == "".join(loop.LETTERS[token] for token in tokens)
        else:
            assert numbers(after(walk.text, start))[2:] == [tokens[0], tokens[1], tokens[-1]]
    size, unit = after(walk.text, "Actor logits:").split(")")[1].split(";")[0].split()
    nbytes = 4 * batch * response * vocab
    assert rounds(Number(size), nbytes / {"kB": 1e3, "MB": 1e6}[unit], 1)
    assert ("random" in walk.step(3)) == (vocab != 27)


PREVIEWS = {
    "Old log probs:": "old_logprobs",
    "Reference log probs:": "ref_logprobs",
    "KL divergence per token:": "kl",
    "Values:": "values",
    "GAE advantages:": "advantages",
    "Whitened:": "whitened",
}


@pytest.mark.parametrize("start", PREVIEWS)
def test_a_preview_shows_the_first_values_the_last_and_the_mean(start, walk):
    x = walk.data[PREVIEWS[start]]
    rows, columns, *values, mean = numbers(after(walk.text, start))
    assert (rows, columns) == x.shape
    first = x[0][walk.real[0]]
    assert len(values) == min(3, len(first))
    for printed, value in zip(values, [first[0], first[1], first[-1]]):
        assert rounds(printed, value, 2)
    assert rounds(mean, walk.mean(PREVIEWS[start]), 3)


@pytest.mark.parametrize("start", ["Scores:", "Total rewards:"])
def test_scores_and_totals(start, walk):
    x = walk.data["scores"] if start == "Scores:" else walk.totals
    *values, mean = numbers(after(walk.text, start))
    expected = x if len(x) == 4 else [*x[:3], x[-1]]
    assert len(values) == 4
    assert ("…" in after(walk.text, start)) == (len(x) > 4)
    assert all(rounds(printed, value, 2) for printed, value in zip(values, expected))
    assert rounds(mean, x.mean(), 3)


def test_the_estimates_of_the_kl(walk):
    k1, config = (walk.data["old_logprobs"] - walk.data["ref_logprobs"])[walk.real].astype(float), walk.config
    estimates = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1}
    mean, error, *_ = numbers(after(walk.text, "Mean KL:"))
    mine = estimates[config.kl_estimator]
    assert rounds(mean, mine.mean(), 3)
    assert rounds(error, mine.std() / len(mine) ** 0.5, 3)
    assert after(walk.text, "Mean KL:").endswith(f"nats a token, {config.kl_estimator}")
    printed = re.findall(r"(k\d) (-?\d\.\d+)", after(walk.text, "By estimator:"))
    assert [name for name, _ in printed] == ["k1", "k2", "k3"]
    assert all(rounds(Number(number), estimates[name].mean(), 3) for name, number in printed)
    exact, over = numbers(after(walk.text, "Exact KL:"))
    assert rounds(exact, walk.mean("exact_kl"), 3)
    assert over == config.vocab_size
    assert f"k1 is negative on {(k1 < 0).mean():.0%} of the tokens" in walk.step(4)


def check_calculation(walk):
    """That score - beta * KL = total holds for who types in what is printed, and is the total's first."""
    line = after(walk.text, "The first:")
    score, beta, kl, total = re.match(r" (-?\d+\.\d+) - (\S+) \* (-?\d+\.\d+) = (-?\d+\.\d+), KL", line).groups()
    assert float(beta) == walk.config.beta
    assert rounds(Number(score), walk.data["scores"][0], 4)
    assert rounds(Number(kl), walk.data["kl"][0].sum(), 4)
    assert rounds(Number(total), walk.totals[0], 2)
    assert abs(Decimal(score) - Decimal(beta) * Decimal(kl) - Decimal(total)) <= Decimal("0.005")


def test_a_calculator_gets_the_first_total(walk):
    check_calculation(walk)
    rewards = walk.data["rewards"][0][walk.real[0]]
    values = numbers(after(walk.text, "token: ["))
    assert len(values) == min(4, len(rewards))
    assert all(rounds(printed, value, 2) for printed, value in zip(values, [*rewards[:3], rewards[-1]]))
    assert f"β = {walk.config.beta}" in after(walk.text, "reward = reward_model_score")


def test_gae_is_spelled_out_with_its_numbers(walk):
    page = walk.step(6)
    assert "δ[t] = reward[t] + γ value[t+1] - value[t]" in page
    assert "advantage[t] = δ[t] + γ λ advantage[t+1]" in page
    assert f"γ = {walk.config.gamma}, λ = {walk.config.lam};" in page


def test_a_row_for_each_epoch_and_the_last_losses(walk):
    data, clip = walk.data, walk.config.clip
    rows = table_below(walk.text, "epoch", "ratio", "clipped", "actor", "loss", "critic", "loss")
    rows = [row for row in rows if row[0].isdigit()]
    assert len(rows) == walk.config.ppo_epochs
    white = data["whitened"][walk.real]
    for epoch, (number, low, _, high, clipped, actor, critic) in enumerate(rows):
        ratio = data["ratio"][epoch][walk.real]
        stopped = ((ratio > 1 + clip) & (white > 0)) | ((ratio < 1 - clip) & (white < 0))
        assert int(number) == epoch + 1
        assert rounds(Number(low), ratio.min(), 3)
        assert rounds(Number(high), ratio.max(), 3)
        assert rounds(Number(clipped.rstrip("%")), 100 * stopped.mean(), 1)
        assert rounds(Number(actor), data["actor_loss"][epoch], 4)
        assert rounds(Number(critic), data["critic_loss"][epoch], 4)
    assert rows[0][1] == rows[0][3] == "1.000"
    assert rows[-1][4] != "0.0%" or walk.config.batch_size == 64
    for name in ("actor", "critic"):
        assert rounds(numbers(after(walk.text, f"{name.title()} loss:"))[0], data[f"{name}_loss"][-1], 3)
    assert "Why the ratio is 1 in epoch 1" in walk.step(7)
    low, high = f"{1 - clip:.1f}", f"{1 + clip:.1f}"
    assert f"clip(ratio, {low}, {high})" in walk.step(7)
    assert f"the ratio above {high} where A > 0, or below {low} where A < 0" in walk.step(7)


COLUMNS = {
    "actor": ("old_logprobs", 3),
    "ref": ("ref_logprobs", 3),
    "KL": ("kl", 3),
    "rew": ("rewards", 3),
    "value": ("values", 3),
    "TD": ("td_errors", 3),
    "adv": ("advantages", 3),
    "return": ("returns", 3),
    "white": ("whitened", 2),
}


def inspected(walk):
    """The row of --inspect and, for each of its tokens, a dict of what is printed."""
    row, length = map(int, re.search(r"^Response (\d+), (\d+) tokens", walk.text, re.MULTILINE).groups())
    rows = [dict(zip(["t", "tok", *COLUMNS, "ratio"], cells)) for cells in table_below(walk.text, "t", "tok", *COLUMNS)]
    assert len(rows) == length
    return row, rows


def test_every_number_of_an_inspected_response_stands_below_its_head(walk):
    row, rows = inspected(walk)
    data = walk.data
    assert len(rows) == walk.real[row].sum() > 5
    for t, cells in enumerate(rows):
        assert int(cells["t"]) == t
        token = data["responses"][row, t]
        assert cells["tok"] == (loop.LETTERS[token] if walk.config.vocab_size == 27 else str(token))
        for head, (name, digits) in COLUMNS.items():
            assert rounds(Number(cells[head]), data[name][row, t], digits), head
        assert rounds(Number(cells["ratio"].rstrip("*")), data["ratio"][-1, row, t], 2)
        assert cells["ratio"].endswith("*") == data["clipped"][-1, row, t]


def test_the_rows_asked_for_are_shown(walks):
    assert [inspected(walks(name))[0] for name in RUNS] == [2, 1, 3]
    assert any("*" in cells["ratio"] for cells in inspected(walks("gpt2"))[1])


def test_the_legend_of_an_inspected_response_holds_on_its_numbers(walk):
    gamma, lam, beta = walk.config.gamma, walk.config.lam, walk.config.beta
    row, rows = inspected(walk)
    legend = " ".join(walk.text.split(f"Response {row},")[1].split())
    for formula in ("TD = rew + γ value[t+1] - value", "adv = TD + γ λ adv[t+1]", "return = adv + value"):
        assert formula in legend
    rows = [{head: float(cells[head].rstrip("*")) for head in [*COLUMNS, "ratio"]} for cells in rows]
    past_the_end = {"value": 0.0, "adv": 0.0}
    for cells, following in zip(rows, [*rows[1:], past_the_end]):
        k1 = cells["actor"] - cells["ref"]
        assert cells["KL"] == pytest.approx(k1**2 / 2 if walk.config.kl_estimator == "k2" else k1, abs=0.006)
        if following is not past_the_end:
            assert cells["rew"] == pytest.approx(-beta * cells["KL"], abs=0.0011)
        assert cells["TD"] == pytest.approx(cells["rew"] + gamma * following["value"] - cells["value"], abs=0.0021)
        assert cells["adv"] == pytest.approx(cells["TD"] + gamma * lam * following["adv"], abs=0.0016)
        assert cells["return"] == pytest.approx(cells["adv"] + cells["value"], abs=0.0016)
    score = walk.data["scores"][row]
    assert rows[-1]["rew"] == pytest.approx(score - beta * rows[-1]["KL"], abs=0.0011)


def in_bytes(words):
    """The number of bytes of words like 12.9 MB, and half of their last digit."""
    unit = {"kB": 1e3, "MB": 1e6}[words[1]]
    return float(words[0]) * unit, 0.0501 * unit


def check_costs(text, config):
    """The table of the models against models of these sizes."""
    width, vocab, epochs = config.width, config.vocab_size, config.ppo_epochs
    rows = {cells[0]: cells[1:] for cells in table_below(text, "model", "parameters")}
    assert list(rows) == ["actor", "critic", "reward", "reference"]
    for name, (parameters, *cells) in rows.items():
        count = vocab * width + width * width + width * (vocab if name in ("actor", "reference") else 1)
        assert int(parameters.replace(",", "")) == count
        assert in_bytes(cells[:2])[0] == pytest.approx(4 * count, abs=in_bytes(cells[:2])[1])
        if name in ("actor", "critic"):
            assert in_bytes(cells[2:4])[0] == pytest.approx(8 * count, abs=in_bytes(cells[2:4])[1])
            assert cells[4:6] == [str(1 + epochs), str(epochs)]
            state = "updated" if name == "actor" or config.advantage == "gae" else "no critic"
            assert " ".join(cells[6:]).endswith(state)
        else:
            assert cells[2:] == ["-", "1", "0", "frozen"]


@pytest.mark.parametrize("name", [*RUNS, f"{TINY} --advantage rloo --group-size 3 --ppo-epochs 2"])
def test_the_models_are_counted(name, walks):
    check_costs(walks(name).text, walks(name).config)


def test_the_largest_tensors(walks):
    size = 4 * 50257 * 32
    tensors = {
        "logits (4, 128, 50257)": (4 * 4 * 128 * 50257, ""),
        "embed (50257, 32)": (size, "actor, critic, reward, reference"),
        "head (32, 50257)": (size, "actor, reference"),
        "ratio (4, 4, 128)": (4 * 4 * 4 * 128, ""),
    }
    page = walks("gpt2").text.split("largest tensors")[1]
    assert len([line for line in page.splitlines()[1:7] if line[:4].strip()]) == 5
    for line, (start, (nbytes, owners)) in zip(page.splitlines()[1:], tensors.items()):
        cells = " ".join(line.split())
        assert cells.startswith(start)
        number, unit, *of_each = cells[len(start) :].split()
        assert in_bytes([number, unit])[0] == pytest.approx(nbytes, abs=in_bytes([number, unit])[1])
        assert " ".join(of_each) == owners
    assert after(walks(GRPO).text, "embed").split("kB")[1].strip() == "actor, reward, reference"


def test_the_human_feedback_that_came_before(walks):
    walk = walks("letters")
    seen = {name.split("/")[1]: array for name, array in walk.data.items() if name.startswith("preferences/")}
    page = walk.text.split("Step 1")[0]
    assert numbers(after(page, "Preference pairs:"))[0] == walk.config.preference_pairs == 2048
    first, last = re.match(r" (\d\.\d{3}) -> (\d\.\d{3}) ", after(page, "Reward model loss:")).groups()
    assert rounds(Number(first), seen["losses"][0], 3)
    assert rounds(Number(last), seen["losses"][-20:].mean(), 3)
    right, most = numbers(after(page, "Fresh pairs right:"))
    chosen, rejected = np.split(seen["scores"], 2)
    assert rounds(right, 100 * seen["accuracy"], 1)
    assert seen["accuracy"] == pytest.approx((chosen > rejected).mean(), abs=0.001)
    assert rounds(most, 100 * seen["best_accuracy"], 1)
    rows = table_below(page, "chosen", "human", "score", "rejected", "human", "score")
    assert len(rows) == 3
    half = len(seen["responses"]) // 2
    for i, cells in enumerate(rows):
        for (text, human, score), at in ((cells[:3], i), (cells[3:], i + half)):
            tokens = seen["responses"][at][seen["mask"][at] == 1]
            assert text == "".join(loop.LETTERS[token] for token in tokens)
            assert rounds(Number(human), seen["human"][at], 2)
            assert rounds(Number(score), seen["scores"][at], 2)
            expected = loop.human_scores(tokens[None], np.ones((1, len(tokens))), 27)[0]
            assert seen["human"][at] == pytest.approx(expected)
    assert "Before the loop" not in walks("gpt2").text


RLOO = f"{TINY} --advantage rloo --group-size 3 --inspect 0 --beta 0.7"
GRPO = f"{TINY} --advantage grpo --group-size 3 --inspect 0 --beta 0.7"


@pytest.mark.parametrize("flags", [RLOO, GRPO])
def test_step_6_without_a_critic_can_be_checked_by_hand(flags, walks):
    walk = walks(flags)
    page, data, grpo = walk.step(6), walk.data, flags == GRPO
    totals, advantages = (numbers(after(page, start)) for start in ("Total rewards R of group 1:", "Its advantages:"))
    assert len(totals) == len(advantages) == 3
    assert all(rounds(printed, value, 2) for printed, value in zip(totals, walk.totals))
    assert all(rounds(printed, value, 2) for printed, value in zip(advantages, data["advantages"][:, 0]))
    for i, advantage in enumerate(advantages):
        others = [total for j, total in enumerate(totals) if j != i]
        by_hand = (totals[i] - np.mean(totals)) / np.std(totals, ddof=1) if grpo else totals[i] - np.mean(others)
        assert advantage == pytest.approx(by_hand, abs=0.06 if grpo else 0.0151)
    line = after(page, "The first:")
    if grpo:
        pattern = r" \(R - mean\) / deviation = \((\S+) - \((\S+)\)\) / (\S+) = (\S+)\."
        first, mean, deviation, advantage = map(Number, re.match(pattern, line).groups())
        assert rounds(mean, walk.totals[:3].mean(), 4)
        assert rounds(deviation, walk.totals[:3].std(ddof=1), 4)
        assert advantage == pytest.approx((first - mean) / deviation, abs=0.0055)
    else:
        pattern = r" R - mean of the others' R = (\S+) - \((\S+)\) = (\S+)\."
        first, others, advantage = map(Number, re.match(pattern, line).groups())
        assert rounds(others, walk.totals[1:3].mean(), 4)
        assert advantage == pytest.approx(first - others, abs=0.0052)
    assert rounds(first, walk.totals[0], 4)
    assert advantage == advantages[0]
    mean = numbers(after(page, "Group advantages:"))[-1]
    assert rounds(mean, walk.mean("advantages"), 3)
    assert ("Whitened:" in page) == (not grpo)


@pytest.mark.parametrize("flags", [RLOO, GRPO])
def test_without_a_critic_nothing_of_one_is_shown(flags, walks):
    walk = walks(flags)
    assert not {"values", "returns", "td_errors"} & walk.data.keys()
    for word in ("Critic loss", "critic loss", "Values:", "GAE"):
        assert word not in walk.text
    assert f"Compute advantages ({walk.config.advantage}, no critic)" in walk.text
    assert "Each prompt stands 3 times" in walk.step(1)
    heads = "t tok actor ref KL rew adv white ratio".split()
    rows = [dict(zip(heads, cells)) for cells in table_below(walk.text, *heads)]
    assert len(rows) == walk.real[0].sum()
    for t, cells in enumerate(rows):
        for head, name in {"adv": "advantages", "white": "whitened", "rew": "rewards"}.items():
            assert rounds(Number(cells[head]), walk.data[name][0, t], 2 if head == "white" else 3)
    assert len(table_below(walk.text, "epoch")[0]) == 6
    assert max(map(len, walk.text.splitlines())) <= 80


def test_what_is_saved(walk):
    config, data = walk.config, walk.data
    batch, response = config.batch_size, config.response_length
    assert data["prompts"].shape == (batch, config.prompt_length)
    names = "responses mask old_logprobs ref_logprobs kl k1 k2 k3 exact_kl rewards values td_errors advantages returns"
    for name in [*names.split(), "whitened"]:
        assert data[name].shape == (batch, response)
    assert data["scores"].shape == (batch,)
    assert data["ratio"].shape == data["clipped"].shape == (config.ppo_epochs, batch, response)
    assert data["actor_loss"].shape == data["critic_loss"].shape == (config.ppo_epochs,)
    assert "logits" not in data
    assert set(walk.settings) == set(loop.Config.__dataclass_fields__)


def test_the_defaults_show_what_they_are_meant_to(walks):
    """A divergence, values, scores to tell apart, and a last epoch that clips 5 to 30 % of the tokens."""
    walk = walks("gpt2")
    assert 0.05 < walk.mean("kl") < 0.5
    assert np.abs(walk.data["values"]).mean() > 0.05
    assert 0.05 < walk.data["clipped"][-1][walk.real].mean() < 0.3
    fresh = walks(f"{TINY} --drift 0")
    assert numbers(after(fresh.text, "Mean KL:"))[:2] == [0, 0]
    assert not fresh.data["values"].any()


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    first, again, other = (shown(f"{TINY} --inspect 0 --seed {seed}", tmp_path)[0] for seed in (3, 3, 4))
    assert first == again != other


def test_the_models_depend_on_the_seed(tmp_path):
    flags = "--vocab-size 2 --prompt-length 1 --response-length 1"  # so that prompts and responses leave no choice
    seen = [set(shown(f"{flags} --seed {seed}", tmp_path)[1]["ref_logprobs"].ravel()) for seed in (1, 1, 2)]
    assert seen[0] == seen[1]
    assert not seen[0] & seen[2]


def test_the_human_and_the_reward_model_depend_on_the_seed(tmp_path):
    flags = "--preset letters --batch-size 4 --prompt-length 2 --response-length 4 --preference-pairs 50 --width 4"
    texts = [shown(f"{flags} --seed {seed}", tmp_path)[0].split("Step 1")[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert numbers(after(texts[0], "Preference pairs:"))[0] == 50


def test_colour_says_whose_number_it_is(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert loop.main(f"{TINY} --inspect 3".split()) == 0
    lines = capsys.readouterr().out.splitlines()

    def line_of(start):
        return next(line for line in lines if re.sub(r"\x1b\[[0-9;]*m", "", line).strip().startswith(start))

    def owners_of(start):
        return [owner for owner, _ in owned(line_of(start)) if owner != "note"]

    assert owned(lines[1]) == [(name, name) for name in ("actor", "critic", "reward", "reference", "human")]
    owners = {
        "Generated tokens:": "actor",
        "Actor logits:": "actor",
        "Old log probs:": "actor",
        "Scores:": "reward",
        "Reference log probs:": "reference",
        "KL divergence per token:": "reference",
        "Mean KL:": "reference",
        "By estimator:": "reference",
        "Exact KL:": "reference",
        "Values:": "critic",
        "Actor loss:": "actor",
        "Critic loss:": "critic",
        "Batch size:": "n",
        "Prompt shapes:": "n",
        "reward = reward_model_score": "n",
        "Total rewards:": "n",
        "GAE advantages:": "n",
        "Whitened:": "n",
        "Update complete!": "n",
    }
    for start, owner in owners.items():
        assert set(owners_of(start)) == {owner}, start
    titles = {2: "actor", 3: "reward", 4: "reference", 6: "critic"}
    for number, owner in titles.items():
        assert owner in owners_of(f"Step {number}:")
    for line in lines[next(i for i, line in enumerate(lines) if "parameters" in line) + 1 :][:4]:
        assert [(owner, owner) for owner, _ in owned(line)] == owned(line) != []
    assert owners_of("1      1.000") == ["actor", "actor", "actor", "critic"]
    expected = "actor actor reference reference n critic critic n critic n actor".split()
    at = next(i for i, line in enumerate(lines) if "Response 3," in line)
    assert [owner for owner, _ in owned(lines[at + 2])] == expected
    assert loop.main(f"{TINY} --advantage rloo --group-size 3".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in ("Group advantages:", "Total rewards R of group 1:", "Its advantages:", "Whitened:"):
        assert set(owners_of(start)) == {"n"}
    assert owners_of("1      1.000") == ["actor"] * 3
    assert owned(line_of("Why a group"))[0][0] == "note"
    assert ("note", "; training keeps only slices") in owned(line_of("Actor logits:"))


@pytest.mark.parametrize("beta", ["0", "0.02", "0.1", "3"])
def test_a_calculator_gets_the_first_total_at_any_beta(beta, walks):
    for seed in range(6):
        check_calculation(walks(f"{TINY} --beta {beta} --seed {seed}"))
