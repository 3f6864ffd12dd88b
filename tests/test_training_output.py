"""What a training shows, and a comparison of several: each number at its place.

Views are given small runs of distinct numbers; all else is read from what --save wrote.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import TINY, lines_of, numbers, rounds, shown, texts_of
from record import same_as_recorded

SMALL = "--preset letters --batch-size 8 --preference-pairs 200 --width 8 --learning-rate 1e-3"
SEVERAL = f"{SMALL} --steps 6 --beta 0 0.2 --advantage rloo gae"
LETTERS = loop.Config(steps=7, batch_size=8, prompt_length=1, vocab_size=27, beta=0.25)


@pytest.fixture(autouse=True, scope="module")
def little_theory():
    """What is tested here does not depend on how exactly the optimum is estimated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.attainable_gain, "__defaults__", (32,))
        yield


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """(text, arrays, settings) of two betas with two advantages."""
    text, data = shown(SEVERAL, tmp_path_factory.mktemp("several"))
    return text, data, json.loads(str(data.pop("config")))


def rows_of(view, begin=r"\d+(-\d+)? +-?\d"):
    """The words of the lines that begin so."""
    return [line.split() for line in lines_of(view) if re.match(rf" *{begin}", line)]


def made_run(config=LETTERS, label="first", shift=0.0, **outcome):
    """A run of seven steps in distinct numbers, and what came of it."""
    step = np.arange(1.0, 8)
    history = {
        "objective/scores": step + shift,
        "objective/kl": (step - 1) ** 2 + shift,
        "policy/clipfrac_avg": step / 100,
    }
    if config.readable:
        history["objective/human_scores"] = np.array([0.5, 0.5, 0.75, 0.875, 0.75, 0.5, 0.5])
        history["val/words"] = 1 - step / 32
    figures = ["score", "kl", "human", "words", "J_start", "J", "J_star", "share"]
    defaults = {name: i + 0.125 + shift for i, name in enumerate(figures)}
    if not config.readable:
        del defaults["human"], defaults["words"]
    errors = {f"{name}_error": defaults[name] / 64 for name in figures[4:]}
    texts = [f"{letter}at. {letter}ot." for letter in "abcdefg"]
    run = {"label": label, "config": config, "history": history, "texts": texts}
    run |= {"words": f"{label}.", "start": "start.", "outcome": defaults | errors | outcome}
    return run


def test_transcript_of_a_training(several):
    same_as_recorded("training", several[0])


def test_rows_are_means_over_stretches_that_double():
    rows = rows_of(loop.training_page(made_run()))
    assert rows == [
        "1-1 1.00 0.50 0.97 0.00 1.0% aat. aot.".split(),
        "2-3 2.50 0.62 0.92 2.50 2.5% cat. cot.".split(),
        "4-7 5.50 0.66* 0.83 21.50 5.5% gat. got.".split(),
    ]


def test_where_nobody_can_read_there_is_no_human():
    config = loop.Config(steps=7, vocab_size=9)
    rows = rows_of(loop.training_page(made_run(config)))
    assert rows[1] == "2-3 2.50 2.50 2.5% cat. cot.".split()
    run = made_run(config, shift=-1.0)
    run["history"]["objective/scores"][0] = -0.001
    assert rows_of(loop.training_page(run))[0][1] == "0.00"  # no negative zero
    page = lines_of(loop.outcome_page([run]))
    assert not re.search("human|words", "".join(page))


def test_the_chart_has_its_marks_where_the_figures_are():
    runs = [made_run(), made_run(label="second", shift=13.0)]
    runs[1]["history"]["objective/human_scores"] = np.full(7, 0.25)
    lines = lines_of(loop.chart_page(runs))
    grid = [line.partition("│")[2].ljust(60) for line in lines if "│" in line]
    first, second = (
        next(x.split()[0] for x in lines if x.endswith(f" {r['label']}")) for r in runs
    )
    marks = np.array([list(line) for line in grid])
    for run, mark in zip(runs, (first, second)):
        columns = np.sqrt(run["history"]["objective/kl"] / 49) * 59  # 49 is the largest
        rows = (0.875 - run["history"]["objective/human_scores"]) / 0.625 * (len(grid) - 1)
        places = {(round(row), round(column)) for row, column in zip(rows, columns)}
        assert places == set(zip(*np.nonzero(marks == mark)))
    assert set(marks.flat) == {first, second, " "}
    assert [numbers(lines[i + 1])[0] for i in range(9) if lines[i + 1][:8].strip()] == [0.88, 0.25]
    assert any(numbers(line) == [0, 49.0] for line in lines)


def test_a_mark_for_each_of_nine():
    lines = lines_of(loop.chart_page([made_run(label=f"run {i}", shift=i) for i in range(9)]))
    marks = [mark for line in lines for mark in re.findall(r"(\S) run \d", line)]
    assert len(set(marks)) == len(marks) == 9


def test_each_figure_of_the_outcome_is_in_its_labels_row():
    runs = [
        made_run(),
        made_run(label="second", shift=0.5, human=2.25, J_star=np.nan, share=np.nan),
    ]
    page = loop.outcome_page(runs)
    assert rows_of(page, "first")[0] == ["first", "first."]
    first, second = rows_of(page, "first")[1:], rows_of(page, "second")
    assert second[0] == ["second", "second."]
    assert first[0] == "first 0.12 2.12 3.12 1.12".split()
    assert second[1] == "second 0.62 2.25* 3.62 1.62".split()
    theory = "first 4.125 ± 0.064 5.125 ± 0.080 6.125 ± 0.096 7.125 ± 0.111"
    assert first[1] == theory.split()
    assert second[2] == "second 4.625 ± 0.072 5.625 ± 0.088 - -".split()


def test_each_run_has_its_words_and_what_happened_to_it():
    runs = [made_run(), made_run(label="second")]
    runs[1]["history"]["objective/human_scores"] = np.full(7, 0.25)
    lines = [line.strip() for line in lines_of(loop.outcome_page(runs))]
    for run in runs:
        place = next(i for i, line in enumerate(lines) if line.endswith(f" {run['label']}."))
        assert loop.what_happened(run["history"]) in lines[place + 1]


def test_whether_advantages_differ_is_said_as_their_errors_say():
    other = made_run(replace(LETTERS, beta=0.5), J=99.0)
    for gap, differ in ((0.5, True), (0.21, True), (0.19, False), (0.01, False)):
        outcomes = [(1.0, 0.06), (1 + gap, 0.08), (1.005, 9.0)]
        runs = [made_run(J=figure, J_error=error) for figure, error in outcomes]
        *_, before, said, _ = lines_of(loop.outcome_page([*runs, other]))
        assert all(map(rounds, numbers(said)[-2:], [gap, 0.1], [3, 3]))
        assert (" not " in said) != differ
        assert "±" not in before
        assert "±" not in lines_of(loop.outcome_page(runs[:1]))[-2]


def verdict(human, words=(1.0, 1.0)):
    """What is said before the figures; words are those of the first half and the second."""
    words = np.repeat(words, (len(human) + 1) // 2)
    return loop.what_happened({"objective/human_scores": human, "val/words": words}).split(":")[0]


def test_what_happened_to_a_training():
    fall, rise = np.r_[0.7, 0.9, 0.9, np.r_[0.8:0.3:28j]], np.r_[0.5:0.7:30j]
    hacked, lost = verdict(fall, (1, 0.1)), verdict(rise, (1, 0.68))
    liked, moved = verdict(rise), verdict(np.full(30, 0.5))
    assert len({hacked, lost, liked, moved}) == 4
    assert verdict(rise, (1, 0.72)) == verdict(rise, (0.5, 0.36)) == liked
    assert verdict(np.full(30, 0.95), (0.5, 0.34)) == lost
    for x, said in ((0.0049, moved), (0.0051, liked), (-0.0049, moved), (-0.0051, hacked)):
        assert verdict(np.r_[np.full(15, 0.5), np.full(16, 0.5 + x)]) == said
    noisy = np.r_[0.7, 0.9, 0.5, 0.9, 0.4, np.r_[0.8, 0.5, 0.75, 0.6] - 0.05]
    assert verdict(noisy) == moved  # no more than chance
    _, means, _ = loop.stretch_means(fall)
    said = loop.what_happened({"objective/human_scores": fall, "val/words": np.r_[1, fall[1:] * 0]})
    assert numbers(said) == [*np.round([means[0], max(means), means[-1]], 2), 1, 0]


def test_noise_is_not_called_hacking():
    """A training with a learning rate of 0: the opinions of its steps are chance alone."""
    rng = np.random.default_rng(0)
    hacked = verdict(np.r_[np.full(15, 0.9), np.r_[0.9:0.3:15j]])
    for steps in (2, 3, 8, 30, 200):
        opinions = 0.6 + 0.1 * rng.standard_normal((200, steps))
        alarms = [verdict(human, np.ones(2)) == hacked for human in opinions if steps > 2]
        assert sum(alarms) <= 4, steps


METRICS = {
    *(f"objective/{name}" for name in "scores kl entropy non_score_reward rlhf_reward".split()),
    *"policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/ratio".split(),
    *"val/num_eos_tokens val/response_length lr episode val/words objective/human_scores".split(),
}
THEORY = {"score", "kl", "human", "words", "share", "J", "J_start", "J_star"}
THEORY |= {f"{name}_error" for name in ("share", "J", "J_start", "J_star")}
STAGES = "accuracy human scores mask responses prompts losses".split()
STAGES = {f"preferences/{name}" for name in STAGES}
STAGES |= {f"fine_tuning/{name}" for name in ("losses", "best_loss", "before", "count", "words")}


def test_what_is_saved(several):
    _, data, settings = several
    assert set(data) == METRICS | STAGES | {f"theory/{name}" for name in THEORY}
    assert {data[name].shape for name in METRICS} == {(4, 6)}
    assert {data[f"theory/{name}"].shape for name in THEORY} == {(4,)}
    assert {data[name].dtype for name in METRICS} == {np.dtype(float)}
    assert data["fine_tuning/losses"].shape == (400,)
    assert data["preferences/responses"].shape == (4096, 16)
    assert settings["beta"] == [0, 0, 0.2, 0.2]
    assert settings["advantage"] == ["rloo", "gae"] * 2
    assert settings["steps"] == 6
    assert settings["drift"] == 0  # training begins at the reference
    assert np.isnan(data["loss/value_avg"]).all(axis=1).tolist() == [True, False] * 2
    assert np.isnan(data["theory/J_star"][:2]).all()  # at beta 0
    np.testing.assert_array_equal(data["episode"], np.tile(8 * np.arange(1, 7), (4, 1)))


def test_each_run_is_as_it_would_be_alone_and_shows_its_own(several, tmp_path):
    text, data, _ = several
    flags = SEVERAL.replace("--beta 0 0.2 --advantage rloo gae", "--beta 0.2 --advantage gae")
    alone_text, alone = shown(flags, tmp_path)
    for name in METRICS | {f"theory/{name}" for name in THEORY}:
        np.testing.assert_array_equal(alone[name], data[name][3])
    pages = text.split("\n=== ")
    assert alone_text.split("\n=== ")[1].split("\n\n")[0] in pages[-1]
    for run, page in enumerate(pages[1:]):
        first = next(line for line in page.splitlines() if line.split()[:1] == ["1-1"])
        names = ["objective/scores", "objective/human_scores", "val/words", "objective/kl"]
        assert all(map(rounds, numbers(first)[2:6], [data[n][run, 0] for n in names], [2] * 4))


def test_the_responses_in_a_row_are_the_first_two_of_its_last_step(tmp_path, monkeypatch):
    original, steps = loop.train, []

    def remembers(*arguments):
        for step in original(*arguments):
            steps.append(step[1])
            yield step

    monkeypatch.setattr(loop, "train", remembers)
    text, _ = shown(f"{SMALL} --steps 3", tmp_path)
    (row,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["2-3"])
    words = texts_of(*(steps[-1][name][:2] for name in ("prompts", "responses", "mask")))
    assert [word[:5] for word in row[-2:]] == [word[:5] for word in words]


def test_the_words_of_the_reference_stay_and_those_of_the_actor_change(tmp_path):
    words = []
    for learning_rate in (0, 1):
        text, _ = shown(f"{SMALL} --steps 2 --learning-rate {learning_rate}", tmp_path)
        _, _, reference, actor, *_ = text.rstrip().split("\n\n")[-1].splitlines()
        words += [reference.split()[1:], actor.split()[3:]]
    assert words[0] == words[1] == words[2] != words[3]


@pytest.mark.parametrize("steps", [1, 4])
def test_a_training_that_diverges_saves_what_was_there(steps, tmp_path, capsys, monkeypatch):
    original, calls = loop.actor_gradients, []

    def diverges(*arguments):
        calls.append(1)
        gradients, loss, ratio = original(*arguments)
        return gradients, loss if len(calls) < 2 * steps else np.nan, ratio

    monkeypatch.setattr(loop, "actor_gradients", diverges)
    page = tmp_path / "page.txt"
    flags = f"{TINY} --steps {steps} --ppo-epochs 2 --export {page}"
    text, data = shown(flags, tmp_path, code=1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"step {steps} " in error
    assert "--learning-rate" in error
    assert page.read_text(encoding="utf-8") == text
    if steps == 1:
        assert {"kl", "whitened"} <= set(data)
        assert "ratio" not in data or len(calls) == 2
    else:
        data.pop("config")
        for name, values in data.items():
            assert np.isfinite(values).tolist() == [True, True, True, False], name


def test_settings_reach_the_training(tmp_path):
    flags = f"{TINY} --steps 3 --beta 0.5 --learning-rate 0.05"
    kl = shown(flags, tmp_path)[1]["objective/kl"]
    np.testing.assert_array_equal(shown(f"{flags} --seed 0", tmp_path)[1]["objective/kl"], kl)
    others = "--seed 1|--kl-estimator k2|--gamma 0.5|--lam 0|--clip 0.01|--ppo-epochs 2|--beta 1"
    for other in others.split("|"):
        assert (shown(f"{flags} {other}", tmp_path)[1]["objective/kl"] != kl).any(), other


def test_the_seed_is_in_all_random_numbers_and_no_two_uses_share_them(monkeypatch, tmp_path):
    original, seeds = np.random.default_rng, []

    def remembers(seed):
        seeds.append(seed)
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", remembers)
    shown(f"{SMALL} --steps 2 --seed 5", tmp_path)
    assert all(np.ravel(seed)[0] == 5 for seed in seeds)
    assert len({str(seed) for seed in seeds}) == 5  # stages, models, training, theory, words
