"""What a training prints, and a comparison of several: each number from a metric that --save hands over."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from conftest import Number, after, numbers, owned, rounds, shown, table_below

import rlhf_loop_pseudo as loop

SMALL = "--preset letters --prompt-length 3 --response-length 8 --width 16 --preference-pairs 500"
TINY = "--vocab-size 12 --batch-size 4 --prompt-length 3 --response-length 5 --width 4"
RUNS = {
    "beta 0": f"{SMALL} --batch-size 16 --steps 60 --learning-rate 1e-2 --beta 0",
    "beta 0.2": f"{SMALL} --batch-size 16 --steps 60 --learning-rate 1e-2",
    "short": f"{SMALL} --batch-size 8 --steps 12 --learning-rate 3e-2 --kl-estimator k3 --gamma 0.9 --beta 0.1",
    "several": f"{SMALL} --batch-size 8 --steps 7 --learning-rate .03 --ppo-epochs 3 --beta 0 0.5 --advantage gae grpo",
}


class Training:
    """The page and the metrics of a training, or of several."""

    def __init__(self, flags, folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.attainable_gain, "__defaults__", (6, 128))
            self.text, self.data = shown(flags, folder)
        self.settings = json.loads(str(self.data.pop("config")))
        self.steps = self.settings["steps"]

    def theory(self, name):
        """A number of the comparison with theory."""
        return self.data[f"theory/{name}"]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """The trainings, each made when it is first asked for."""
    made, folder = {}, tmp_path_factory.mktemp("training")

    def training(name):
        if name not in made:
            made[name] = Training(RUNS.get(name, name), folder)
        return made[name]

    return training


@pytest.fixture(params=["beta 0", "beta 0.2", "short"])
def training(request, trainings):
    """Three trainings: one that is hacked, one that is not, and one with other settings."""
    return trainings(request.param)


COLUMNS = {
    "score": ("objective/scores", 2),
    "human": ("objective/human_scores", 2),
    "KL": ("objective/kl", 2),
    "total": ("objective/rlhf_reward", 2),
    "entropy": ("objective/entropy", 1),
    "clipped": ("policy/clipfrac_avg", 3),
    "length": ("val/response_length", 1),
}


def check_rows(rows, metrics, steps):
    """The table of a training against its metrics. Returns the steps that are shown, and the marked ones."""
    for step, *cells, response in rows:
        for printed, (name, digits) in zip(cells, COLUMNS.values(), strict=True):
            assert rounds(Number(printed), metrics[name][int(step.rstrip("*")) - 1], digits), name
        assert re.fullmatch(r"[a-z]*\.|[a-z]{8}", response)
    marked = [int(step.rstrip("*")) for step, *_ in rows if step.endswith("*")]
    shown_steps = [int(step.rstrip("*")) for step, *_ in rows]
    assert shown_steps == sorted(set(shown_steps))
    assert (shown_steps[0], shown_steps[-1]) == (1, steps)
    return shown_steps, marked


def test_the_table_shows_steps_of_the_training(training):
    rows = table_below(training.text, "step", *COLUMNS)
    shown_steps, marked = check_rows(rows, training.data, training.steps)
    assert len(shown_steps) >= 8
    human = training.data["objective/human_scores"]
    parts = np.array_split(np.arange(1, training.steps + 1), min(40, training.steps))
    best = max(parts, key=lambda part: human[part - 1].mean())  # where it is not one lucky batch
    assert len(marked) == 1
    assert marked[0] in best
    assert "total = score - β * KL; *: where the human likes them best." in training.text
    assert f"{training.steps} steps of {training.settings['batch_size']} responses" in training.text


def test_without_readable_text_there_is_no_human(tmp_path):
    text, data = shown(f"{TINY} --steps 3", tmp_path)
    rows = table_below(text, "step", *COLUMNS)
    assert [row[2] for row in rows] == ["-"] * 3
    assert "likes" not in text
    assert "human (right)" not in text
    assert "objective/human_scores" not in data


def test_reward_hacking_is_said_where_it_was_measured(trainings):
    text, data = trainings("beta 0").text, trainings("beta 0").data
    low, high, start, peak, end = numbers(text.split("Reward hacking:")[1].split("only the model")[0])
    scores, human = (
        [part.mean() for part in np.array_split(data[f"objective/{name}"], 40)] for name in ("scores", "human_scores")
    )
    for printed, value in zip((low, high, start, peak, end), (scores[0], scores[-1], human[0], max(human), human[-1])):
        assert rounds(printed, value, 2)
    assert end < start < peak
    assert "hacking" not in trainings("beta 0.2").text
    human = trainings("beta 0.2").data["objective/human_scores"]
    assert human[-3:].mean() > human[:3].mean() + 0.1


def test_hacking_is_measured_in_the_score_and_not_in_the_total(trainings):
    training = trainings(f"{SMALL} --batch-size 16 --steps 40 --learning-rate 2e-2 --beta 0.02")
    low, high, *_ = numbers(training.text.split("Reward hacking:")[1])
    assert rounds(low, training.data["objective/scores"][0], 2)
    assert rounds(high, training.data["objective/scores"][-1], 2)
    assert not rounds(high, training.data["objective/rlhf_reward"][-1], 2)


def test_a_fall_that_may_be_chance_is_no_hacking(trainings):
    falls = 0
    for seed in range(12):
        training = trainings(f"{SMALL} --batch-size 64 --steps 2 --learning-rate 1e-3 --beta 0 --seed {seed}")
        (low, high), (start, end) = (training.data[f"objective/{name}"] for name in ("scores", "human_scores"))
        falls += low < high and end < start
        assert "hacking" not in training.text
    assert falls


def test_what_comes_in_a_page_beside_the_numbers(trainings):
    for name in RUNS:
        text = trainings(name).text
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80
        assert not any(line != line.rstrip() for line in text.splitlines())
        assert text.count("Before the loop") == 1


def test_k3_as_a_reward_is_warned_of(trainings, tmp_path):
    warning = "does not have the gradient of the KL"
    assert f"As a reward k3 {warning}" in trainings("short").text
    assert f"As a reward k2 {warning}" in shown(f"{TINY} --steps 2 --kl-estimator k2", tmp_path)[0]
    assert warning not in trainings("beta 0.2").text
    assert warning not in shown(f"{TINY} --steps 2 --kl-estimator k2 --beta 0", tmp_path)[0]


def test_a_discount_is_said_where_there_is_one(trainings):
    assert "J is not discounted; with γ = 0.9 training maximised a discounted reward." in trainings("short").text
    assert "discounted" not in trainings("beta 0.2").text
    assert "discounted" not in trainings("several").text
    assert "J = score - β * KL, not discounted, about" in trainings(f"{TINY} --steps 2 --beta 0 1 --gamma 0.9").text


def test_the_numbers_against_theory(training):
    for start, name in {"J at the start:": "J_start", "J now:": "J", "J*:": "J_star"}.items():
        assert rounds(numbers(after(training.text, start))[0], training.theory(name), 3)
    j, score, beta, kl = re.match(r" (\S+) +(\S+) - (\S+) \* (\S+)$", after(training.text, "J now:")).groups()
    assert float(beta) == training.settings["beta"]
    assert rounds(Number(score), training.theory("score"), 3)
    assert rounds(Number(kl), training.theory("kl"), 3)
    assert float(j) == pytest.approx(float(score) - float(beta) * float(kl), abs=0.00111)
    assert after(training.text, "J*:").startswith(" at least ")
    assert "(J - start) / (J* - start), ± its standard error" in training.text
    share = re.match(r" at most (-?\d+)% ± (\d+\.\d)%$", after(training.text, "Share of the attainable gain:"))
    assert rounds(Number(share[1]), 100 * training.theory("share"), 0)
    assert rounds(Number(share[2]), 100 * training.theory("share_error"), 1)
    start, now, best = (training.theory(name) for name in ("J_start", "J", "J_star"))
    assert training.theory("share") == pytest.approx((now - start) / (best - start))
    assert start <= best
    assert now <= best + 1e-9


def test_training_comes_near_to_what_theory_allows(trainings):
    assert 0.8 < trainings("beta 0").theory("share") <= 1
    assert 0.6 < trainings("beta 0.2").theory("share") <= 1


def test_theory_does_not_depend_on_how_long_training_took(trainings):
    two, three = (trainings(f"{TINY} --learning-rate 0 --steps {steps}") for steps in (2, 3))
    assert two.theory("J_start") == three.theory("J_start")
    assert two.theory("J_star") == three.theory("J_star")


def test_a_share_that_is_lost_in_noise_is_a_dash(trainings):
    training = trainings(f"{TINY} --steps 2 --beta 1000")
    assert np.isnan(training.theory("share"))
    assert after(training.text, "Share of the attainable gain:").strip() == "-"
    assert "lost in noise" in training.text
    assert "standard error" not in training.text.split("Against theory")[1]


def test_a_loss_is_no_share(trainings):
    training = trainings(f"{SMALL} --batch-size 4 --steps 3 --beta 1 --learning-rate 0.1")
    assert training.theory("J") < training.theory("J_start")
    assert "%" not in after(training.text, "Share of the attainable gain:")


def test_an_actor_that_began_elsewhere(trainings):
    training = trainings(f"{TINY} --steps 2 --drift 0.5")
    assert "J at the start" not in training.text
    assert rounds(numbers(after(training.text, "J of the reference:"))[0], training.theory("J_start"), 3)
    assert training.data["objective/kl"][0] != 0
    assert trainings("short").data["objective/kl"][0] == pytest.approx(0, abs=1e-5)


DEAR = "--vocab-size 9000 --batch-size 2 --prompt-length 3 --response-length 5 --width 4 --steps 2"


def test_no_theory_where_it_is_dear(tmp_path):
    text, data = shown(DEAR, tmp_path)
    assert "No comparison with theory: at these sizes it would cost more than it tells." in text
    assert "J*" not in text
    assert not [name for name in data if name.startswith("theory/")]
    text, data = shown(f"{DEAR} --beta 0.3 1", tmp_path)
    assert "fresh prompts" not in text
    rows = table_below(text, "score", "human", "KL", "J", "share", "passes")
    for run, (_, _, _, score, human, kl, j, share, *_) in enumerate(rows):
        assert rounds(Number(score), data["objective/scores"][run, -1], 2)
        assert rounds(Number(kl), data["objective/kl"][run, -1], 2)
        assert rounds(Number(j), data["objective/rlhf_reward"][run, -1], 2)
        assert human == share == "-"
    assert "nan" not in text


class Chart:
    """A chart read back: its grid of 12 rows, the scales at its sides and the mark of each curve."""

    def __init__(self, page):
        lines = page.splitlines()
        axis = next(i for i, line in enumerate(lines) if re.fullmatch(r" {9}\S(─|-){58}", line))
        rows = [line.ljust(80) for line in lines[axis - 12 : axis]]
        self.grid = [row[10:68] for row in rows]
        self.left = [Number(row[:9]) for row in rows if row[:9].strip()]
        self.right = [Number(row[69:]) for row in rows if row[69:].strip()]
        self.bars = {row[9] for row in rows}
        assert len(lines[axis + 1]) == 68  # its last label ends below the last column
        self.ends = [numbers(lines[axis + 1])[i] for i in (0, -1)]
        self.marks = {part[2:]: part[0] for part in lines[axis + 2].strip().split("   ")}

    def check_scale(self, values, scale):
        """That the labels of a scale are the greatest, the middle row's and the least value."""
        high, low = np.max(values), np.min(values)
        for printed, value in zip(scale, (high, high - (high - low) * 6 / 11, low), strict=True):
            assert rounds(printed, value, 2)

    def check_curve(self, name, x, y, every_x, every_y):
        """That each point of a curve is in its cell, if only below a later curve, and no mark is far from it."""
        marks = list(self.marks.values())
        mine = self.marks[name]
        later = marks[marks.index(mine) :]
        columns = np.round((x - np.min(every_x)) / np.ptp(every_x) * 57).astype(int)
        rows = np.round((np.max(every_y) - y) / np.ptp(every_y) * 11).astype(int)
        for column, row in zip(columns, rows):
            assert self.grid[row][column] in later
        assert any(mine in line for line in self.grid)
        for row, line in enumerate(self.grid):
            for column in [at for at, mark in enumerate(line) if mark == mine]:
                near = np.abs(columns - column).argsort()[:4]
                assert min(columns) <= column <= max(columns)
                assert rows[near].min() - 1 <= row <= rows[near].max() + 1


def course_of(training):
    """The curves of a training: name, values, side."""
    data = training.data
    curves = [("score", data["objective/scores"], 0), ("human (right)", data["objective/human_scores"], 1)]
    if training.settings["beta"]:
        curves.append(("score - β KL", data["objective/rlhf_reward"], 0))
    return [*curves, ("J*, its limit", np.full(training.steps, training.theory("J_star")), 0)]


def test_the_course_of_a_training_as_a_chart(trainings):
    training = trainings("short")
    chart, curves = Chart(training.text.split("The course of the training\n")[1]), course_of(training)
    assert list(chart.marks) == [name for name, _, _ in curves]
    assert len(set(chart.marks.values())) == 4
    assert chart.bars == {"│"}
    assert chart.ends == [1, 12]
    x = np.arange(1, 13)
    for side, scale in ((0, chart.left), (1, chart.right)):
        every_y = np.concatenate([y for _, y, at in curves if at == side])
        chart.check_scale(every_y, scale)
        for name, y, _ in [curve for curve in curves if curve[2] == side]:
            chart.check_curve(name, x, y, x, every_y)


def test_a_long_training_is_smoothed(trainings):
    training = trainings("beta 0")
    chart, data = Chart(training.text.split("The course of the training\n")[1]), training.data
    assert "score - β KL" not in chart.marks
    score, human, steps = (
        np.array([part.mean() for part in np.array_split(x, 40)])
        for x in (data["objective/scores"], data["objective/human_scores"], np.arange(1, 61))
    )
    limit = training.theory("J_star")
    chart.check_scale([*score, limit], chart.left)
    chart.check_scale(human, chart.right)
    chart.check_curve("human (right)", steps, human, steps, human)
    chart.check_curve("score", steps, score, steps, [*score, limit])


def test_the_comparison_as_a_table(trainings):
    training = trainings("several")
    names = ["β 0, gae", "β 0, grpo", "β 0.5, gae", "β 0.5, grpo"]
    rows = table_below(training.text, "score", "human", "KL", "J", "share", "passes")
    assert [" ".join(row[:3]) for row in rows] == names
    for run, row in enumerate(rows):
        _, _, _, score, human, kl, j, *share, passes, response = row
        for printed, name in ((score, "score"), (human, "human"), (kl, "kl"), (j, "J")):
            assert rounds(Number(printed), training.theory(name)[run], 2)
        if share == ["-"]:
            assert np.isnan(training.theory("share")[run])
        elif share == ["none"]:
            assert training.theory("share")[run] < 0
        else:
            assert rounds(Number(share[0].rstrip("%")), 100 * training.theory("share")[run], 0)
            assert share[1] == "±"
            assert rounds(Number(share[2].rstrip("%")), 100 * training.theory("share_error")[run], 1)
        assert passes == ("6+3" if run % 2 else "10+6")  # actor, reward, reference and perhaps the critic
        assert response == table_below(training.text.split(f"Training, {names[run]} ===")[1], "step")[-1][-1]
    assert any("%" in " ".join(row) for row in rows)
    (start,) = numbers(re.search(r"J = score - β \* KL, about (.*) at the start", training.text)[1])
    assert rounds(start, training.theory("J_start").mean(), 2)
    page = " ".join(training.text.split())
    assert "share: of the gain in J to be had at this β, at most, ± standard error." in page


def test_every_compared_training_has_its_table(trainings):
    training = trainings("several")
    for run, name in enumerate(["β 0, gae", "β 0, grpo", "β 0.5, gae", "β 0.5, grpo"]):
        page = training.text.split(f"=== RLHF Training, {name} ===")[1]
        rows = table_below(page, "step", *COLUMNS)
        check_rows(rows, {key: training.data[key][run] for key, _ in COLUMNS.values()}, training.steps)
    assert "The course of the training" not in training.text
    assert "Against theory" not in training.text


def test_the_comparison_as_a_chart(trainings):
    training = trainings("several")
    page = training.text.split("The human's opinion over KL")[1]
    chart = Chart(page.split("\n", 1)[1])
    assert list(chart.marks) == ["β 0, gae", "β 0, grpo", "β 0.5, gae", "β 0.5, grpo"]
    assert len(set(chart.marks.values())) == 4
    kl, human = training.data["objective/kl"], training.data["objective/human_scores"]
    x = np.sqrt(np.maximum(kl, 0))
    assert [f"{end:.1f}" for end in chart.ends] == [f"{max(kl.min(), 0):.1f}", f"{kl.max():.1f}"]
    chart.check_scale(human, chart.left)
    marks = list(chart.marks.values())
    columns = np.round((x - x.min()) / np.ptp(x) * 57).astype(int)
    rows = np.round((human.max() - human) / np.ptp(human) * 11).astype(int)
    for run in range(4):
        for row, column in zip(rows[run], columns[run]):
            assert chart.grid[row][column] in marks[run:]


def test_more_curves_than_marks():
    curves = [(f"curve {i}", "n", np.arange(3.0), np.full(3, float(i)), 0) for i in range(11)]
    page = re.sub(r"\[\w*\]|\[/\]", "", loop.chart(loop.make_console(), "x", curves))
    chart = Chart(page)
    assert list(chart.marks) == [name for name, *_ in curves]
    assert sum(bool(line.strip()) for line in chart.grid) == 11


def test_a_comparison_trains_each_as_it_would_be_alone(trainings):
    several = trainings("several").data
    flags = RUNS["several"].replace("--beta 0 0.5 --advantage gae grpo", "--beta 0.5 --advantage grpo")
    alone = trainings(flags).data
    for name in alone:
        if name.startswith(("objective/", "theory/", "policy/")):
            np.testing.assert_array_equal(alone[name], several[name][3])


def test_what_is_saved(trainings):
    metrics = {
        *(f"objective/{name}" for name in "scores kl entropy non_score_reward rlhf_reward human_scores".split()),
        *"policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/ratio".split(),
        *"val/num_eos_tokens val/response_length lr episode".split(),
    }
    theory = {f"theory/{name}" for name in "J_start J J_star share share_error score kl human".split()}
    for name, runs in (("short", ()), ("several", (4,))):
        training = trainings(name)
        saved = {key: values for key, values in training.data.items() if not key.startswith("preferences/")}
        assert saved.keys() == metrics | theory
        assert {saved[key].shape for key in metrics} == {(*runs, training.steps)}
        assert {saved[key].shape for key in theory} == {runs}
        assert {"preferences/accuracy", "preferences/losses"} <= training.data.keys()
    data = trainings("several").data
    assert trainings("several").settings["beta"] == [0, 0, 0.5, 0.5]
    assert trainings("several").settings["advantage"] == ["gae", "grpo"] * 2
    assert np.isnan(data["loss/value_avg"][[1, 3]]).all()
    assert np.isfinite(data["loss/value_avg"][[0, 2]]).all()
    assert trainings("short").settings["beta"] == 0.1
    np.testing.assert_array_equal(trainings("short").data["episode"], 8 * np.arange(1, 13))


@pytest.mark.parametrize("beta", ["0.1", "0.1 0.2"])
def test_an_interrupted_training_is_saved_as_far_as_it_got(beta, tmp_path, monkeypatch):
    original, calls = loop.score_responses, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > (4 if " " in beta else 2):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "attainable_gain", lambda *_: {})
    monkeypatch.setattr(loop, "score_responses", interrupted)
    text, data = shown(f"{TINY} --steps 3 --beta {beta}", tmp_path, code=130)
    assert text.rstrip().endswith("Interrupted.")
    data.pop("config")
    expected = [[True, True, False]] if " " not in beta else [[True, True, True], [True, False, False]]
    for values in data.values():
        np.testing.assert_array_equal(np.isfinite(np.atleast_2d(values)), expected)


def test_seeds_and_settings_reach_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.attainable_gain, "__defaults__", (2, 128))
    flags = f"{TINY} --steps 3 --beta 0.5 --learning-rate 0.05"
    kl = shown(flags, tmp_path)[1]["objective/kl"]
    np.testing.assert_array_equal(shown(f"{flags} --seed 0", tmp_path)[1]["objective/kl"], kl)
    for other in ("--seed 1", "--kl-estimator k2", "--gamma 0.5", "--lam 0", "--clip 0.01", "--ppo-epochs 2"):
        assert (shown(f"{flags} {other}", tmp_path)[1]["objective/kl"] != kl).any(), other


def test_plain_characters_where_there_are_no_others(monkeypatch):
    monkeypatch.setattr(loop.attainable_gain, "__defaults__", (2, 128))
    pages = {}
    for encoding in ("ascii", "utf-8"):
        output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with contextlib.redirect_stdout(output):
            assert loop.main(f"{TINY} --steps 4 --learning-rate 0.05".split()) == 0
        output.flush()
        pages[encoding] = output.buffer.getvalue().decode(encoding).split("The course of the training\n")[1]
    plain, boxes = Chart(pages["ascii"]), Chart(pages["utf-8"])
    assert list(plain.marks.values()) == ["*", "o", "+"]
    translate = str.maketrans(dict(zip(boxes.marks.values(), plain.marks.values())))
    assert plain.grid == [line.translate(translate) for line in boxes.grid]
    assert plain.left == boxes.left
    assert len(plain.bars) == len(boxes.bars) == 1
    assert " " not in plain.bars


def test_colour_says_whose_number_it_is(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(loop.attainable_gain, "__defaults__", (2, 128))
    flags = f"{SMALL} --batch-size 4 --response-length 4 --width 4 --preference-pairs 50 --steps 3"
    assert loop.main(flags.split()) == 0
    text = capsys.readouterr().out
    assert not re.search(r"\x1b\[[0-9?]*[A-Zhl]", text)
    lines = text.splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]

    def owners(start):
        line = lines[next(i for i, words in enumerate(plain) if words.strip().startswith(start))]
        return [owner for owner, _ in owned(line) if owner != "note"]

    row = lines[next(i for i, words in enumerate(plain) if words.strip().startswith("step")) + 2]
    assert [owner for owner, part in owned(row) if part != "*"][-8:] == [
        *"reward human reference n actor actor actor actor".split()
    ]
    assert [owned(line)[0] for line, words in zip(lines, plain) if re.match(r"  \d\* ", words)] == [("human", "*")]
    assert owners("● score") == ["reward", "human", "n", "reference"]
    assert owners("J now:") == ["n", "reward", "reference"]
    assert owners("J*:") == owners("J at the start:") == owners("Share of") == ["n"]
    assert owners("Before the loop") == ["n", "human", "n", "reward", "n"]
    assert owners("Preference pairs:") == ["human"]
    assert owners("Reward model loss:") == ["reward"]
    assert owners("Fresh pairs right:") == ["reward", "human"]
    pair = lines[next(i for i, words in enumerate(plain) if words.strip().startswith("chosen")) + 1]
    assert [owner for owner, _ in owned(pair)] == ["human", "reward"] * 2
    assert loop.main([*flags.split(), "--beta", "0", "1"]) == 0
    lines = capsys.readouterr().out.split("The same training")[1].splitlines()
    assert [owner for owner, _ in owned(lines[2])] == ["reward", "human", "reference", "n", "actor"]
    curves = {
        line[:8].strip(): code for code, line in re.findall(r"\x1b\[([\d;]+)m([●○▲△] β[^\x1b]*)", "\n".join(lines))
    }
    assert len(curves) == len(set(curves.values())) == 2  # each in a colour of its own
