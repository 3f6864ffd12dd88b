"""What the walk-through shows: the promised lines, and each number at its place.

Views are given small arrays of distinct numbers; all else is read from what --save wrote.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import after, lines_of, numbers, rounds, shown
from record import same_as_recorded

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
LETTERS = loop.Config(batch_size=2, prompt_length=1, response_length=4, vocab_size=27, drift=0.1)
NUMBERS = loop.Config(batch_size=2, prompt_length=1, response_length=4, vocab_size=40, beta=0.5)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """(text, arrays) of the walk-through at its own sizes."""
    return shown("--inspect 2", tmp_path_factory.mktemp("walk"))


def cells(view):
    """The words of each of its lines."""
    return [line.split() for line in lines_of(view)]


def test_transcript_of_the_walk_through(walk):
    same_as_recorded("walk_through", walk[0])
    assert max(map(len, walk[0].splitlines())) <= 80


def test_the_promised_lines_in_their_order_with_the_numbers_of_the_arrays(walk):
    text, data = walk
    lines = iter(text.splitlines())
    for promised in PROMISED.splitlines():
        pattern = re.escape(promised)
        if re.search("Scores|rewards:|KL:|loss:", promised):
            pattern = re.sub(r"(\\-)?\d\\\.\d+", r"-?\\d+\\.\\d+", pattern)
        assert any(re.match(pattern if promised else "$", line) for line in lines), promised
    real = data["mask"] != 0
    assert all(map(rounds, numbers(after(text, "Scores:")), data["scores"], [2] * 4))
    assert all(map(rounds, numbers(after(text, "Total rewards:")), data["rewards"].sum(1), [2] * 4))
    assert rounds(numbers(after(text, "Mean KL:"))[0], data["kl"][real].mean(), 3)
    for owner in ("actor", "critic"):
        assert rounds(
            numbers(after(text, f"{owner.title()} loss:"))[0], data[f"{owner}_loss"][-1], 3
        )


def test_a_figure_that_stands_twice_is_the_same(walk):
    text, data = walk
    rows = [line.split() for line in text.splitlines()]
    effect = [row for row in rows if row[:1] and row[0].startswith("[")]
    assert [float(row[-5]) for row in effect] == numbers(after(text, "Total rewards:"))
    mean = numbers(after(text, "Mean KL:"))[0]
    assert numbers(text.split("Step 4")[1].split("Step 5")[0]).count(mean) >= 2
    last = [row for row in rows if row[:1] == ["4"] and ".." in row][-1]
    for place, owner in ((-2, "Actor loss:"), (-1, "Critic loss:")):
        assert abs(float(last[place]) - numbers(after(text, owner))[0]) <= 0.00056
    tokens = [row[1:2] for row in rows if len(row) == 10 and row[0].isdigit()]
    assert tokens == [[str(token)] for token in data["responses"][2][data["mask"][2] != 0]]


def test_what_is_saved(walk):
    data, config = dict(walk[1]), loop.Config()
    assert loop.Config(**json.loads(str(data.pop("config")))) == config
    wide = "old_logprobs ref_logprobs kl k1 k2 k3 exact_kl rewards values advantages"
    wide = f"{wide} returns whitened new_logprobs mask responses".split()
    shapes = dict.fromkeys(wide, (4, 128)) | {"prompts": (4, 64), "scores": (4,), "lr": ()}
    shapes |= dict.fromkeys(["ratio", "clipped"], (4, 4, 128))
    shapes |= dict.fromkeys(["actor_loss", "critic_loss"], (4,))
    assert {name: array.shape for name, array in data.items()} == shapes
    kinds = {"prompts": "i", "responses": "i", "clipped": "b"}
    assert all(array.dtype.kind == kinds.get(name, "f") for name, array in data.items())
    floats = [data[name].dtype for name in wide if name != "responses"]
    assert set(floats) == {np.dtype(np.float32)}


def test_the_seed_decides_and_nothing_else(tmp_path):
    flags = "--preset letters --batch-size 8 --preference-pairs 50 --width 8 --response-length 8"
    runs = [shown(f"{flags} --seed {seed}", tmp_path) for seed in (1, 1, 2)]
    (first, data), (again, _), (other, _) = runs
    assert first == again
    assert re.search(rf"(?m)^ +0 +[{loop.LETTERS[data['responses'][0, 0]]}] +-\d", first)
    assert first.split("Step 1")[0] != other.split("Step 1")[0]
    padding = data["mask"] == 0
    assert padding.any()
    for name, array in data.items():
        if array.shape[-2:] == padding.shape and not name.startswith(("responses", "pref")):
            assert not array[..., padding].any(), name
    tiny = "--vocab-size 2 --prompt-length 1 --response-length 1"  # only the models are left
    seen = [set(shown(f"{tiny} --seed {s}", tmp_path)[1]["ref_logprobs"].flat) for s in (1, 2)]
    assert not seen[0] & seen[1]


def test_numbers_have_no_response_token_by_token_unless_asked(tmp_path):
    assert not re.search(r"(?m)^ +0 +\d+ +-\d", shown("--vocab-size 9", tmp_path)[0])


def by_hand(config):
    """What a step leaves, in distinct numbers; rows end at their third and second token."""
    count = iter(range(1, 99))
    mask = np.array([[1.0, 1, 1, 0], [1, 1, 0, 0]])

    def wide(scale):
        return np.array([[scale * next(count) for _ in range(4)] for _ in range(2)]) * mask

    names = "ref_logprobs kl k2 k3 exact_kl rewards values advantages returns whitened"
    data = {name: wide(0.0625) for name in names.split()}
    eos = config.vocab_size - 1
    return data | {
        "prompts": np.array([[2], [3]]),
        "responses": np.array([[0, 19, eos, eos], [14, eos, eos, eos]]),
        "mask": mask,
        "logits": np.zeros((2, 4, config.vocab_size)),
        "old_logprobs": np.array([[-0.25, -0.5, -0.125, 0], [-1.5, -0.75, 0, 0]]),
        "new_logprobs": np.array([[-0.125, -0.25, -0.25, 0], [-2, -0.5, 0, 0]]),
        "k1": np.array([[-0.5, 0.25, 0.375, 0], [-0.125, 0.75, 0, 0]]),
        "scores": np.array([0.75, -1.25]),
        "ratio": np.array(
            [[[1, 1, 1, 0], [1, 1, 0, 0]], [[0.5, 1.375, 0.75, 0], [1.25, 1.5, 0, 0]]]
        ),
        "clipped": np.array([np.zeros((2, 4)), [[0, 1, 0, 0], [1, 0, 0, 0]]]) == 1,
        "actor_loss": np.array([-0.00001, -0.0625]),
        "critic_loss": np.array([1.5, 1.25]),
    }


def pages_of(data, config):
    """The lines, in words, of each of the seven pages, which answer the seven questions."""
    pages = [cells(page) for page in loop.step_pages(data, config)]
    for question, page in zip(loop.WHY, pages, strict=True):
        assert any(question in " ".join(line) for line in page)
    return pages


def holds(page, *figures):
    """Whether these figures stand in one of its lines, in this order, rounded as they are there."""

    def same(printed, figure):
        return (printed.decimals or figure % 1 == 0) and rounds(printed, figure, printed.decimals)

    for line in page:
        found = numbers(" ".join(line))
        for start in range(len(found) - len(figures) + 1):
            if all(map(same, found[start:], figures)):
                return True
    return False


def test_each_figure_of_the_steps_is_at_its_place():
    data = by_hand(NUMBERS)
    mean = {name: x.sum() / 5 for name, x in data.items() if x.shape == (2, 4)}
    one, two, three, four, five, six, seven = pages_of(data, NUMBERS)
    assert holds(one, 2)
    assert holds(one, 2, 1)
    assert holds(two, 2, 4, 40)
    assert holds(two, -np.log(40))
    assert holds(three, 0.75, -1.25)
    previews = {"old_logprobs": two, "ref_logprobs": four, "values": six, "advantages": six}
    for name, page in (previews | {"whitened": six}).items():  # of row 0, and the mean of all
        assert holds(page, 2, 4, *data[name][0, :3], mean[name]), name
    assert holds(four, 2, 4, *data["kl"][0, :3])
    assert holds(four, mean["kl"])
    assert holds(four, mean["exact_kl"], 40)
    assert holds(four, mean["k1"], mean["k2"], mean["k3"])
    assert any("40%" in line for line in four)  # of the tokens k1 is below 0
    totals = data["rewards"].sum(axis=1)
    assert holds(five, *totals)
    assert holds(five, 0.75, 0.5, data["kl"][0].sum(), totals[0])
    assert holds(five, *data["rewards"][0, :3])
    assert ["1", "1.000", "..", "1.000", "0.0%", "0.0000", "1.5000"] in seven  # no negative zero
    assert ["2", "0.500", "..", "1.500", "40.0%", "-0.0625", "1.2500"] in seven
    assert holds(seven, 0.8, 1.2)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_without_a_critic_a_group_is_compared(method):
    config = replace(NUMBERS, group_size=2, advantage=method)
    data = {n: x for n, x in by_hand(config).items() if n not in ("values", "returns")}
    data |= {"rewards": np.array([[0, 0, 1.5, 0], [0, -0.25, 0, 0]]), "critic_loss": np.array([])}
    data["advantages"] = np.array([[1.75, 0, 0, 0], [-1.75, 0, 0, 0]])  # shown is the first token's
    *_, six, seven = pages_of(data, config)
    assert holds(six, 1.5, -0.25)
    assert holds(six, 1.75, -1.75)
    assert holds(six, 2, 4, *data["whitened"][0, :3]) == (method == "rloo")
    assert ["2", "0.500", "..", "1.500", "40.0%", "-0.0625"] in seven
    response = cells(loop.response_page(data, config, 0))
    assert {len(line) for line in response if line[:1] in (["0"], ["1"], ["2"])} == {9}
    pages = " ".join(word for line in six + seven for word in line)
    assert not re.search("critic loss|GAE|values?:", pages, re.I)


def test_of_many_responses_the_first_are_shown(tmp_path):
    sizes = "--vocab-size 12 --batch-size 8 --prompt-length 3 --response-length 5 --width 4"
    text, data = shown(f"{sizes} --advantage rloo --group-size 2", tmp_path)
    opening, walk = text.split("Step 1")
    assert "critic" not in opening  # none is drawn where there is none
    totals = data["rewards"].sum(axis=1)
    assert f" {loop.listed(totals[:2])}\n" in walk  # the group of the first prompt
    assert f" {loop.listed(data['advantages'][:2, 0])}\n" in walk
    effect = [line.split("]")[1] for line in walk.splitlines() if line.startswith("  [")]
    assert all(map(rounds, [numbers(line)[0] for line in effect], totals[:4], [2] * 4))
    assert len(effect) == 4


def test_what_the_update_did():
    config, names = LETTERS, ["0.62", "1.50", "-0.88", "-0.62", "0.25", "41.69%", "->", "53.53%"]
    data = by_hand(config) | {"rewards": np.array([[0.125, 0, 0.5, 0], [0, -0.0001, 0, 0]])}
    data["whitened"] = np.array([[1, 2, 1.5, 9], [-0.25, -0.75, 9, 9]]) * data["mask"]
    lines = cells(loop.effect_page(data, config))
    first, second = ["cat.", *names], "do. 0.00 -0.50 -2.25 -2.50 -0.25 10.54% -> 8.21%".split()
    assert lines.index(second) == lines.index(first) + 1  # responses in their order
    assert holds(lines, 100)  # percent of the responses whose probability went as A says
    opposite = data | {"whitened": abs(data["whitened"])}
    assert holds(cells(loop.effect_page(opposite, config)), 50)
    still = data | {"new_logprobs": data["old_logprobs"]}  # no change is no fall
    assert any("0%" in line for line in cells(loop.effect_page(still, config)))
    lines = cells(loop.effect_page(data, NUMBERS))
    assert ["[0,", "19,", "…,", "26]", *names[:5]] in lines
    long = np.full((2, 20), 1)
    long[1, 9:] = 26
    lines = cells(loop.effect_page(data | {"responses": long}, config))
    assert [line[0] for line in lines if "->" in line] == ["cbbbbbbbbb…", "dbbbbbbbbb."]


@pytest.mark.parametrize(
    ("config", "row", "response", "tokens", "ratios"),
    [
        (LETTERS, 0, "cat.", "at.", ["0.50", "1.38*", "0.75"]),  # of the last epoch
        (NUMBERS, 0, "[0, 19, …, 39]", ["0", "19", "39"], ["0.50", "1.38*", "0.75"]),
        (LETTERS, 1, "do.", "o.", ["1.25*", "1.50"]),
    ],
)
def test_a_response_token_by_token(config, row, response, tokens, ratios):
    data = by_hand(config)
    title, _, *lines = cells(loop.response_page(data, config, row))
    rows = lines[: len(tokens)]
    assert [line[0] for line in lines if line and line[0].isdigit()] == ["0", "1", "2"][: len(rows)]
    assert [line[1] for line in rows] == [*tokens]
    names = "old_logprobs ref_logprobs kl rewards values advantages whitened"
    wanted = [data[name][row, : len(rows)] for name in names.split()]
    shown = [[float(figure) for figure in line[2:-1]] for line in rows]
    np.testing.assert_allclose(shown, np.transpose(wanted), atol=0.0051)
    assert [line[-1] for line in rows] == ratios
    assert holds([title], row)
    assert holds([title], data["scores"][row])
    assert f" {response}," in " ".join(title)


def test_the_stages_before_the_loop():
    eos, words = 26, "fox cat dog bee elk fox hen cow ant owl".split()
    tokens = np.array([[ord(letter) - 97 for letter in word] + [eos] for word in words])
    seen = {
        "preferences/prompts": tokens[:, :1],
        "preferences/responses": tokens[:, 1:],
        "preferences/mask": np.ones((10, 3)),
        "preferences/human": np.array([0, 0.25, 0.5, 0.75, 0, 0, 0.125, 0.375, 0.625, 0]),
        "preferences/scores": np.array([0, 1.5, -0.001, 2.5, 0, 0, -1.25, -0.75, 0.5, 0]),
        "preferences/accuracy": 0.75,
        "preferences/losses": np.repeat([0.5, 1.5, 9, 1.25, 0.25], [19, 1, 160, 1, 19]),
        "fine_tuning/losses": np.r_[3.25, np.full(379, 9), np.full(20, 0.5)],
        "fine_tuning/best_loss": 0.375,
        "fine_tuning/words": 0.625,
        "fine_tuning/count": 17,
        "fine_tuning/before": np.array([[25, 25, eos]] * 4),
    }
    lines = cells(loop.stages_page(seen, LETTERS))
    assert holds(lines, 3.25, 0.5)
    for figure in (17, 0.38, 62.5, loop.Config.preference_pairs):
        assert holds(lines, figure)
    assert holds(lines, 0.55, 0.3)
    assert holds(lines, 75, 19.3649)  # percent right of five pairs, and their standard error
    assert ["fzz.", "czz.", "dzz.", "bzz."] in lines
    assert [f"{word}." for word in words[:4] + words[5:9]] in lines  # chosen and rejected alike
    pairs = [("cat.", "0.25", "1.50"), ("hen.", "0.12", "-1.25"), ("dog.", "0.50", "0.00")]
    pairs += [("cow.", "0.38", "-0.75"), ("bee.", "0.75", "2.50"), ("ant.", "0.62", "0.50")]
    rows = [line[1:] for line in lines if line[1:] and tuple(line[1:]) in pairs]
    assert list(map(tuple, rows)) == pairs
    assert len({line[0] for line in lines if tuple(line[1:]) in pairs[::2]}) == 1  # chosen


def test_the_first_prompt_of_letters_is_shown_once():
    first_page = pages_of(by_hand(LETTERS), LETTERS)[0]
    assert any(line[-1:] == ["c"] for line in first_page)
