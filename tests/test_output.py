"""What the walk-through prints: the lines it promises, each number from an array that --save hands over."""

import contextlib
import io
import json
import re

import numpy as np
import pytest

import rlhf_loop_pseudo as loop

# The promised lines, in order: words as they are, values as patterns.
LISTED = r"\[-?\d\.\d\d, .*-?\d\.\d\d\]"
TRANSCRIPT = [
    r"=== RLHF Training Loop Demo ===",
    r"",
    r"Step 1: Sample prompts",
    r"  Batch size: {B}",
    r"  Prompt shapes: \({B}, {P}\) tokens",
    r"",
    r"Step 2: Generate responses \(Actor\)",
    r"  Actor forward pass\.\.\.",
    r"  Generated tokens: \({B}, {T}\)",
    r"  Actor logits: \({B}, {T}, {V}\)",
    r"  Old log probs: \({B}, {T}\)",
    r"",
    r"Step 3: Score responses \(Reward Model\)",
    r"  Reward model forward pass\.\.\.",
    r"  Scores: " + LISTED,
    r"",
    r"Step 4: Compute KL penalty \(Reference\)",
    r"  Reference forward pass\.\.\.",
    r"  Reference log probs: \({B}, {T}\)",
    r"  KL divergence per token: \({B}, {T}\)",
    r"  Mean KL: -?\d\.\d\d",
    r"",
    r"Step 5: Compute total rewards",
    r"  reward = reward_model_score - β \* KL",
    r"  Total rewards: " + LISTED,
    r"",
    r"Step 6: Compute advantages \(Critic \+ GAE\)",
    r"  Critic forward pass\.\.\.",
    r"  Values: \({B}, {T}\)",
    r"  GAE advantages: \({B}, {T}\)",
    r"",
    r"Step 7: PPO update",
    r"  Ratio = exp\(new_log_prob - old_log_prob\)",
    r"  Clipped ratio: clip\(ratio, 0\.8, 1\.2\)",
    r"  Actor loss: -?\d\.\d\d\d",
    r"  Critic loss: \d\.\d\d\d",
    r"",
    r"  Update complete!",
]
SIZES = {"gpt2": {"B": 4, "P": 64, "T": 128, "V": 50257}, "letters": {"B": 64, "P": 8, "T": 16, "V": 27}}


@pytest.fixture(scope="module", params=["gpt2", "letters"])
def shown(request, tmp_path_factory):
    """The text of a walk-through at both presets, and the arrays it saved."""
    path = tmp_path_factory.mktemp("walk") / "arrays.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert loop.main(["--preset", request.param, "--inspect", "1", "--inspect-all", "--save", str(path)]) == 0
    with np.load(path) as arrays:
        return output.getvalue(), {name: arrays[name] for name in arrays}, SIZES[request.param]


def test_every_promised_line_comes_in_order(shown):
    text, _, sizes = shown
    lines = iter(text.splitlines())
    for pattern in TRANSCRIPT:
        for letter, size in sizes.items():
            pattern = pattern.replace(f"{{{letter}}}", str(size))
        assert any(re.match(pattern + ("$" if not pattern else ""), line) for line in lines), pattern


def test_plain_text_of_80_columns(shown):
    text, _, _ = shown
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert not any(line != line.rstrip() for line in text.splitlines())


def numbers(line):
    """All numbers of a line."""
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", line)]


def find(text, start):
    """The first line that begins so, without its beginning."""
    return next(line for line in text.splitlines() if line.strip().startswith(start)).strip()[len(start) :]


def test_every_printed_number_is_saved(shown):
    text, data, sizes = shown
    mask = data["mask"] == 1
    previews = {
        "Old log probs:": "old_logprobs",
        "Reference log probs:": "ref_logprobs",
        "KL divergence per token:": "kl",
        "Values:": "values",
        "GAE advantages:": "advantages",
        "Whitened:": "whitened",
    }
    for start, name in previews.items():
        x = data[name]
        rows, columns, *shown_values, mean = numbers(find(text, start))
        assert (rows, columns) == x.shape
        first = x[0][mask[0]]
        np.testing.assert_allclose(shown_values, [first[0], first[1], first[-1]], atol=0.00501)
        assert mean == pytest.approx(x[mask].mean(), abs=0.000501)
    for start, name in {"Scores:": "scores", "Total rewards:": "total_rewards"}.items():
        *values, mean = numbers(find(text, start))
        expected = data[name] if len(values) == len(data[name]) else [*data[name][: len(values) - 1], data[name][-1]]
        np.testing.assert_allclose(values, expected, atol=0.00501)
        assert mean == pytest.approx(data[name].mean(), abs=0.000501)
    mean, error, *_ = numbers(find(text, "Mean KL:"))
    assert mean == pytest.approx(data["kl"][mask].mean(), abs=0.000501)
    assert error == pytest.approx(data["kl"][mask].std() / mask.sum() ** 0.5, abs=0.000501)
    assert numbers(find(text, "Exact KL:"))[0] == pytest.approx(data["exact_kl"][mask].mean(), abs=0.000501)
    assert numbers(find(text, "Actor loss:"))[0] == pytest.approx(data["actor_loss"][-1], abs=0.000501)
    assert numbers(find(text, "Critic loss:"))[0] == pytest.approx(data["critic_loss"][-1], abs=0.000501)
    assert numbers(find(text, "Batch size:")) == [sizes["B"]]
    negative = (data["old_logprobs"] < data["ref_logprobs"])[mask].mean()
    assert f"is negative on {negative:.0%} of the tokens" in text
    score, beta, kl, total = [abs(x) for x in numbers(find(text, "The first:"))]
    assert score - beta * kl == pytest.approx(data["total_rewards"][0], abs=2e-4)
    assert total == pytest.approx(abs(data["total_rewards"][0]), abs=1e-4)
    last = numbers(find(text, "token: ["))[-1]
    assert last == pytest.approx(data["rewards"][0][mask[0]][-1], abs=0.00501)
    *first_tokens, last = re.findall(r"\w+", find(text, "Generated tokens:").split(")")[1])
    if sizes["V"] > 27:
        row = data["responses"][0][mask[0]]
        assert [int(token) for token in (*first_tokens, last)] == [*row[:2], row[-1]]


def test_every_epoch_row_is_saved(shown):
    text, data, _ = shown
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["epoch", "ratio"])
    for epoch in range(4):
        number, low, high, clipped, actor, critic = numbers(lines[start + 1 + epoch].replace("..", " "))
        ratio = data["ratio"][epoch][data["mask"] == 1]
        assert number == epoch + 1
        assert (low, high) == pytest.approx((ratio.min(), ratio.max()), abs=0.000501)
        white = data["whitened"][data["mask"] == 1]
        stopped = ((ratio > 1.2) & (white > 0)) | ((ratio < 0.8) & (white < 0))
        assert clipped == pytest.approx(100 * stopped.mean(), abs=0.0501)
        assert actor == pytest.approx(data["actor_loss"][epoch], abs=0.0000501)
        assert critic == pytest.approx(data["critic_loss"][epoch], abs=0.0000501)


def test_the_token_table_is_saved_and_gae_can_be_checked_by_hand(shown):
    text, data, _ = shown
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Response 1,")) + 2
    length = int(data["mask"][1].sum())
    names = ["old_logprobs", "ref_logprobs", "kl", "rewards", "values", "td_errors", "advantages", "returns"]
    rows = []
    for t, line in enumerate(lines[start : start + length]):
        position, token, *rest = line.split()
        assert int(position) == t
        expected = data["responses"][1, t]
        assert token == (str(expected) if expected > 27 else loop.LETTERS[expected])
        clipped = rest[-1].endswith("*")
        rest = [float(number.strip("*")) for number in rest]
        np.testing.assert_allclose(rest[:8], [data[name][1, t] for name in names], atol=0.000501)
        np.testing.assert_allclose(rest[8:], [data["whitened"][1, t], data["ratio"][-1, 1, t]], atol=0.00501)
        assert clipped == data["clipped"][-1, 1, t]
        rows.append(rest)
    advantage = 0
    for (*_, reward, value, td, adv, ret, _, _), below in zip(reversed(rows), [None, *reversed(rows)]):
        assert td == pytest.approx(reward + (below[4] if below else 0) - value, abs=0.002)
        advantage = td + 0.95 * advantage
        assert adv == pytest.approx(advantage, abs=0.02)
        assert ret == pytest.approx(adv + value, abs=0.002)


def test_the_closing_tables_count_what_is_there(shown):
    text, _, sizes = shown
    models = loop.init_models(loop.Config(vocab_size=sizes["V"]), np.random.default_rng(0))
    for name, model in models._asdict().items():
        line = find(text, loop.title(name) + "  ").split()
        assert int(line[0].replace(",", "")) == sum(weights.size for weights in model.values())
        frozen = name in ("reward_model", "reference")
        assert line[-3:] == (["1", "0", "frozen"] if frozen else ["5", "4", "updated"])
    shape = sizes["B"], sizes["T"], sizes["V"]
    assert find(text, "Logits  ").split() == [*str(shape).split(), f"{4 * np.prod(shape) / 1e6:.1f}", "MB"]


def test_what_is_saved(shown):
    _, data, sizes = shown
    b, p, t = sizes["B"], sizes["P"], sizes["T"]
    assert data["prompts"].shape == (b, p)
    for name in "responses mask old_logprobs ref_logprobs kl rewards values advantages returns".split():
        assert data[name].shape == (b, t)
    assert data["scores"].shape == (b,)
    assert data["ratio"].shape == (4, b, t)
    assert "logits" not in data
    config = json.loads(str(data["config"]))
    assert config["batch_size"] == b
    assert loop.Config(**config).response_length == t


def test_the_defaults_show_what_they_are_meant_to(shown):
    """A divergence, scores to tell apart, and a last epoch that clips 5 to 30 % of the tokens."""
    _, data, sizes = shown
    if sizes["V"] > 27:
        assert 0.05 < data["mean_kl"] < 0.5
        assert 0.05 < data["scores"].min() < data["scores"].max() < 0.98
        assert np.diff(np.sort(data["scores"])).min() > 0.02
        assert 0.05 < data["clip_fraction"][-1] < 0.3


@pytest.mark.parametrize(
    "flags", [["--kl-estimator", "k3", "--beta", "0.5"], ["--vocab-size", "100", "--width", "3", "--clip", "0.1"]]
)
def test_explicit_flags_win_over_the_preset(flags, capsys, tmp_path):
    path = tmp_path / "x.npz"
    assert loop.main(["--preset", "letters", "--batch-size", "2", *flags, "--save", str(path)]) == 0
    config = json.loads(str(np.load(path)["config"]))
    assert config["batch_size"] == 2
    assert config["prompt_length"] == 8
    for flag, value in zip(flags[::2], flags[1::2]):
        assert str(config[flag[2:].replace("-", "_")]) == value
    text = capsys.readouterr().out
    assert f"clip(ratio, {1 - config['clip']:g}, {1 + config['clip']:g})" in text
    assert f"β = {config['beta']}" in text
    assert config["kl_estimator"] in text


def test_same_seed_same_bytes_other_seed_other_bytes(capsys):
    texts = []
    for seed in ("3", "3", "4"):
        assert loop.main(["--preset", "letters", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_training_shows_and_saves_the_same_numbers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "THEORY_PROMPTS", 2)
    path = tmp_path / "x.npz"
    assert loop.main([*"--preset letters --steps 12 --batch-size 8 --save".split(), str(path)]) == 0
    text, data = capsys.readouterr().out, np.load(path)
    lines = text.splitlines()
    rows = [line for line in lines if re.match(r" +\d+ +\d\.\d{3}", line)]
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    names = ["scores", "kl", "rlhf_reward", "entropy"]
    for row in rows:
        step, *values = row.split()
        expected = [data[f"objective/{name}"][int(step) - 1] for name in names]
        np.testing.assert_allclose([float(value) for value in values[:4]], expected, atol=0.00501)
        assert float(values[4][:-1]) == pytest.approx(100 * data["policy/clipfrac_avg"][int(step) - 1], abs=0.0501)
        assert float(values[5]) == pytest.approx(data["val/response_length"][int(step) - 1], abs=0.0501)
        assert re.fullmatch(r"[a-z]*\.?", values[6])
    for name in [name for name in data if not name.startswith(("theory/", "config"))]:
        first, last, bars = find(text, name).split()
        assert data[name].shape == (12,)
        assert float(first) == pytest.approx(data[name][0], rel=1e-4, abs=1e-12)
        assert float(last) == pytest.approx(data[name][-1], rel=1e-4, abs=1e-12)
        assert len(bars) == 12
        if data[name].max() > data[name].min():
            assert bars[data[name].argmax()] == "█"
            assert bars[data[name].argmin()] == "▁"
    for start, name in {"J at the start:": "J_start", "J now:": "J", "J*:": "J_star"}.items():
        assert numbers(find(text, start))[0] == pytest.approx(data[f"theory/{name}"], abs=0.000501)
    assert find(text, "Share of the attainable gain:").split()[0] == loop.share_text(data["theory/share"])


def test_several_betas_are_compared_and_saved(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "THEORY_PROMPTS", 2)
    path = tmp_path / "x.npz"
    flags = "--preset letters --steps 3 --batch-size 8 --beta 0 0.1 1 --save".split()
    assert loop.main([*flags, str(path)]) == 0
    text, data = capsys.readouterr().out, np.load(path)
    assert data["objective/kl"].shape == (3, 3)
    assert json.loads(str(data["config"]))["beta"] == [0, 0.1, 1]
    table = text.split("The same training at each β\n")[1].splitlines()
    for i, row in enumerate(table[1:4]):
        beta, score, kl, objective, share, response = row.split()
        assert float(beta) == [0, 0.1, 1][i]
        for shown_value, name in ((score, "score"), (kl, "kl"), (objective, "J")):
            assert float(shown_value) == pytest.approx(data[f"theory/{name}"][i], abs=0.000501)
        if share == "none":
            assert data["theory/share"][i] < 0
        else:
            assert float(share[:-1]) == pytest.approx(100 * data["theory/share"][i], abs=0.501)
        assert re.fullmatch(r"[a-z]*\.?", response)
    alone = tmp_path / "y.npz"
    assert loop.main([*"--preset letters --steps 3 --batch-size 8 --beta 0.1 --save".split(), str(alone)]) == 0
    np.testing.assert_array_equal(np.load(alone)["objective/kl"], data["objective/kl"][1])


def test_without_theory_the_comparison_still_stands(capsys, monkeypatch):
    monkeypatch.setattr(loop, "theory_is_cheap", lambda config: False)
    assert loop.main("--preset letters --steps 2 --batch-size 8 --beta 0 1".split()) == 0
    assert "nan" not in capsys.readouterr().out
    assert loop.main("--preset letters --steps 2 --batch-size 8".split()) == 0
    assert "No comparison with theory" in capsys.readouterr().out


def test_a_share_is_a_percentage_where_there_is_one():
    assert [loop.share_text(share) for share in (0.951, 0.0, -0.4, np.nan)] == ["95%", "0%", "none", "-"]


def test_sparkline():
    assert loop.sparkline(np.arange(8.0)) == "▁▂▃▄▅▆▇█"
    assert loop.sparkline(np.ones(3)) == "▁▁▁"
    assert len(loop.sparkline(np.arange(1000.0))) == 28
