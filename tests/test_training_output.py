"""What a training shows, and a comparison of several: each number at its place.

All is read from what the command line prints, and compared with what --save wrote.
"""

import html
import json
import re

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import TINY, numbers, shown, texts_of
from record import same_as_recorded
from screens import (  # noqa: F401, the last two are fixtures
    are_shown,
    is_shown,
    letters_once,
    little_theory,
    pages_of,
    printed,
    sentence,
    table,
)

pytestmark = pytest.mark.usefixtures("little_theory")
SEVERAL = "--preset letters --steps 9 --batch-size 24 --learning-rate 0.01 --ppo-epochs 3 --seed 2"
SEVERAL += " --beta 0.3 0.7 --method ppo grpo dpo"
LABELS = [f"β {beta}, {method}" for beta in (0.3, 0.7) for method in ("ppo", "grpo", "dpo")]
HEADS = {"score": "objective/scores", "human": "objective/human_scores", "words": "val/words"}
HEADS |= {"KL": "objective/kl"}


@pytest.fixture(scope="module")
def several(little_theory, tmp_path_factory):  # noqa: F811
    """(pages, arrays, export) of six runs, in which all settings differ."""
    folder = tmp_path_factory.mktemp("several")
    text, data = shown(f"{SEVERAL} --export {folder / 'page.html'}", folder)
    return pages_of(text), data, (folder / "page.html").read_text(encoding="utf-8"), text


@pytest.fixture(scope="module")
def hacked(little_theory, tmp_path_factory):  # noqa: F811
    """(text, arrays) of a training without KL, by the reward model and by the human's rule."""
    flags = "--preset letters --steps 100 --beta 0 --reward learned human"
    return shown(flags, tmp_path_factory.mktemp("hacked"))


def test_transcript_of_a_training(several):
    same_as_recorded("training", several[3])


def test_a_page_fits_a_terminal(several, hacked):
    for title, page in [*several[0].items(), *pages_of(hacked[0]).items()]:
        lines = page.splitlines()
        assert max(map(len, lines)) <= 80, title
        rows = len(re.findall("(?m)^ +β", page))  # two for each run, of which there are six
        assert len(lines) <= 22 + max(rows - 8, 0), title


def windows(steps):
    """(first, last) step of each row: 1, 2, 4, 8, ... steps."""
    starts = [2**n - 1 for n in range(20) if 2**n - 1 < steps]
    return list(zip(starts, [*starts[1:], steps]))


@pytest.mark.parametrize("run", range(6), ids=LABELS)
def test_rows_are_means_over_windows_that_double(several, run):
    pages, data, _, _ = several
    page = pages[f"RLHF Training, {LABELS[run]}"]
    columns = table(page, "step")
    rows = windows(9)
    assert columns["step"] == tuple(f"{first + 1}-{last}" for first, last in rows)
    for head, name in HEADS.items():
        found = [numbers(cell)[0] for cell in columns[head]]
        are_shown(found, [data[name][run, first:last].mean() for first, last in rows])
    assert ("clipped" in columns) == ("dpo" not in LABELS[run])
    if "clipped" in columns:
        means = [data["policy/clipfrac_avg"][run, first:last].mean() for first, last in rows]
        are_shown([numbers(cell)[0] for cell in columns["clipped"]], 100 * np.array(means))


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo"])
def test_from_python_equals_the_command_line(several, method):
    """Number by number, and the two responses in a row are those of its last step."""
    (pages, data, _, _), run = several, LABELS.index(f"β 0.7, {method}")
    settings = {"steps": 9, "batch_size": 24, "learning_rate": 0.01, "ppo_epochs": 3, "seed": 2}
    config = loop.configure("letters", **settings, beta=0.7, method=method)
    models = loop.prepare(config)
    pairs = loop.learn_from_human(config).pairs
    history, rows = [], []
    for metrics, step in loop.train(models, config, pairs):
        history.append(metrics)
        rows.append(texts_of(step.prompts[:2], step.responses[:2], step.mask[:2]))
    for name in history[0]:
        np.testing.assert_array_equal(data[name][run], [metrics[name] for metrics in history])
    for owner, model in models._asdict().items():
        for name, weights in (model or {}).items():
            np.testing.assert_array_equal(data[f"models/{owner}/{name}"][run], weights)
    assert np.isnan(data["models/critic/head"][run]).all() == (models.critic is None)
    columns = table(pages[f"RLHF Training, {LABELS[run]}"], "step", gap=1)
    last = pages[f"RLHF Training, {LABELS[run]}"].splitlines()
    lines = [line.split()[-2:] for line in last if re.match(r" +\d+-\d+ ", line)]
    for (_, end), words in zip(windows(9), lines):
        assert [word[:7] for word in words] == [text[:7] for text in rows[end - 1]]
    assert columns


def test_the_chart_has_its_marks_where_the_figures_are(several):
    pages, data, _, _ = several
    lines = pages["The human's opinion over KL"].splitlines()
    legend = dict(re.findall(r"(\S) (β \S+ \S+)", "\n".join(lines)))
    assert sorted(legend.values()) == sorted(LABELS)
    rows = [line.partition("│") for line in lines if "│" in line]
    grid = np.array([list(row.ljust(60)) for _, _, row in rows])
    kl, human = data["objective/kl"], data["objective/human_scores"]
    columns = np.sqrt(np.maximum(kl, 0) / kl.max()) * 59
    places = np.round((human.max() - human) / np.ptp(human) * (len(grid) - 1))
    for run, label in enumerate(LABELS):
        (mark,) = (mark for mark, name in legend.items() if name == label)
        here = {(int(y), round(x)) for x, y in zip(columns[run], places[run])}
        marked = set(zip(*map(np.ndarray.tolist, np.nonzero(grid == mark))))
        assert marked <= here, label
        assert all(grid[place] in [*legend, "S"] for place in here), label
        assert grid[int(places[run, 0]), round(columns[run, 0])] == "S"
        assert marked
    are_shown([numbers(rows[i][0])[0] for i in (0, -1)], [human.max(), human.min()])
    assert not any(before.strip() for before, _, _ in rows[1:-1])
    (axis,) = (line for line in lines if "nats per response" in line)
    are_shown(numbers(axis), [0, kl.max()])


def test_each_figure_of_the_outcome_is_in_its_labels_row(several):
    pages, data, _, _ = several
    page = pages["What came of it"]
    history = {name: data[name] for name in HEADS.values()}
    for run, label in enumerate(LABELS):
        lines = page.splitlines()
        place = next(i for i, line in enumerate(lines) if line.strip().startswith(label))
        said = lines[place + 1].strip()
        assert said.startswith(loop.verdict({name: x[run] for name, x in history.items()}))
        human, words = (
            [history[HEADS[name]][run, first:last].mean() for first, last in windows(9)]
            for name in ("human", "words")
        )
        wanted = [human[0], max(human), human[-1], words[0], words[-1]]
        are_shown(numbers(said.partition(":")[2]), wanted)


def test_each_figure_of_the_optimum_is_in_its_labels_row(several):
    pages, data, _, _ = several
    page = pages["How near to the best possible"]
    means, best = table(page, "fresh"), table(page, "J_start")
    theory = {k.partition("/")[2]: x for k, x in data.items() if k.startswith("theory/")}
    assert means["fresh responses"] == tuple(LABELS)
    for head in HEADS:
        are_shown([numbers(cell)[0] for cell in means[head]], theory[head.lower()])
    rows = [line.strip() for line in page.splitlines() if line.strip().startswith("β")][6:]
    for run, (label, row) in enumerate(zip(LABELS, rows, strict=True)):
        assert row.startswith(label)
        cells = re.split(r"\s{2,}", row.removeprefix(label).strip())
        for name, cell in zip(
            best if len(best) == 4 else ("J_start", "J", "J_star", "share"), cells
        ):
            value = theory[name][run]
            if np.isnan(value):
                assert cell == "-"
                continue
            wanted = [value, theory[f"{name}_error"][run]][: 1 + ("±" in cell)]
            are_shown(numbers(cell), wanted)
        assert "±" in cells[1]


def test_j_and_share_work_out_with_the_figures_that_are_printed(several):
    """Within one unit of the last digit shown."""
    page = several[0]["How near to the best possible"]
    rows = [line.strip() for line in page.splitlines() if line.strip().startswith("β")]
    for label, first, second in zip(LABELS, rows[:6], rows[6:]):
        beta = numbers(label)[0]
        score, _, _, kl = numbers(first.removeprefix(label))
        cells = re.split(r"\s{2,}", second.removeprefix(label).strip())
        j_start, j, best, share = (numbers(cell)[:1] for cell in cells)
        assert abs(score - beta * kl - j[0]) <= 10 ** -j[0].decimals, label
        if share and best:
            by_hand = (j[0] - j_start[0]) / (best[0] - j_start[0])
            assert abs(by_hand - share[0]) <= 10 ** -share[0].decimals, label


def spans(page):
    """(style, text) of each piece of an export."""
    found = re.findall(r'(?s)<span style="([^"]*)">(.*?)</span>', page)
    return [(style, html.unescape(text)) for style, text in found]


def colour(style):
    return re.search(r"(?:^|; )color: (#\w{6})", style)[1]


def test_each_run_has_one_colour_and_one_mark(several):
    pieces = spans(several[2])
    colours = {}
    for label in LABELS:
        found = [colour(style) for style, text in pieces if label in text]
        assert len(found) >= 5, label  # its title, the legend, the outcome and two tables
        assert len(set(found)) == 1, label
        colours[label] = found[0]
    assert len(set(colours.values())) == 6
    found = [(text, label) for _, text in pieces for label in LABELS if label in text]
    legend = [(text[0], label) for text, label in found if re.match(rf"[^ =] {label}", text)]
    assert len({mark for mark, _ in legend}) == 6
    for mark, label in legend:
        marks = [colour(style) for style, text in pieces if text.strip() == mark]
        assert set(marks) == {colours[label]}, label


def test_words_and_other_strings_differ_in_more_than_colour(hacked, tmp_path):
    """Red and green alone would look the same to one man in twelve."""
    path = tmp_path / "page.html"
    printed(f"--preset letters --steps 2 --learning-rate 1 --beta 0.2 --export {path}")
    styles = {True: set(), False: set()}
    for style, text in spans(path.read_text(encoding="utf-8")):
        if re.fullmatch(r"[a-z]+\.", text):
            styles[text[:-1] in loop.WORDS].add(
                re.sub(r"(text-decoration-)?color: #\w{6}", "", style)
            )
    assert len(styles[True]) == len(styles[False]) == 1
    assert styles[True] != styles[False]


def test_what_gets_hacked_are_the_mistakes_of_the_reward_model(hacked):
    text, data = hacked
    page = pages_of(text)["What came of it"]
    learned, human = data["objective/human_scores"][:, -40:].mean(axis=1)
    assert learned < 0.6 < 0.95 < human
    verdicts = re.findall(r"(?m)^    ([A-Z][a-z, ]+): human", page)
    assert verdicts == ["Reward hacking", "Better liked, in words"]
    assert "hacking comes from the mistakes of the learned reward model" in sentence(page)
    for line in page.splitlines():  # a label ends before the first word begins
        assert not re.match(r"  β \S+ \w+(, human)?[a-z]{2,}\.", line), line


def test_that_is_said_only_where_both_were_run(several):
    assert "hacking comes from" not in sentence(several[0]["What came of it"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [("--steps 60", "Better liked, in words"),
     ("--steps 5 --learning-rate 0", "No clear change"),
     ("--steps 60 --beta 0.02", "Words are being lost")],
    ids=["liked", "still", "lost"],
)  # fmt: skip
def test_a_verdict_in_words(flags, said):
    page = pages_of(printed(f"--preset letters {flags}"))["What came of it"]
    assert re.findall(r"(?m)^    ([A-Z][a-z, ]+): human", page) == [said]


def test_a_training_whose_score_falls_has_collapsed(monkeypatch):
    original = loop.train

    def falling(*arguments):
        for number, (metrics, step) in enumerate(original(*arguments)):
            yield metrics | {"objective/scores": -float(number)}, step

    monkeypatch.setattr(loop, "train", falling)
    page = pages_of(printed("--preset letters --steps 8"))["What came of it"]
    assert "Training collapsed: human" in page


@pytest.mark.parametrize(
    ("flags", "said"),
    [("--kl-in loss", "k1 in the loss"), ("--kl-estimator k2", "k2 in the reward"),
     ("--kl-estimator k3 --method rloo", "k3 in the reward"), ("", None),
     ("--kl-in loss --kl-estimator k2", None), ("--kl-in loss --kl-estimator k3", None),
     ("--kl-estimator k2 --beta 0", None)],
    ids=["k1 loss", "k2 reward", "k3 reward", "k1 reward", "k2 loss", "k3 loss", "beta 0"],
)  # fmt: skip
def test_where_an_estimator_fails_the_page_says_so(flags, said):
    text = sentence(printed(f"{TINY} --steps 2 {flags}"))
    assert re.findall("k[123] in the (?:loss|reward)", text) == ([said] if said else [])
    assert ("restrains" in text) == bool(said)


def test_without_letters_there_is_no_human_and_no_optimum(tmp_path):
    text, data = shown(f"{TINY} --steps 3", tmp_path)
    assert list(pages_of(text)) == ["RLHF Training", "RLHF Training, β 0.02, ppo"]
    assert not re.search("human|words", pages_of(text)["RLHF Training, β 0.02, ppo"])
    assert not any(re.search("human|words|theory", name) for name in data)


METRICS = {
    *(f"objective/{name}" for name in "scores kl entropy non_score_reward rlhf_reward".split()),
    *"policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/ratio".split(),
    *"val/num_eos_tokens val/response_length lr episode val/words objective/human_scores".split(),
}
THEORY = {"score", "kl", "human", "words", "share", "J", "J_start", "J_star"}
THEORY |= {f"{name}_error" for name in ("share", "J", "J_start", "J_star")}
STAGES = "accuracy best_accuracy human scores mask responses prompts losses".split()
STAGES = {f"preferences/{name}" for name in STAGES}
STAGES |= {f"fine_tuning/{name}" for name in ("losses", "best_loss", "before", "count", "words")}
WEIGHTS = {
    f"models/{owner}/{name}"
    for owner in ("actor", "critic", "reward_model", "reference")
    for name in ("embed", "context_proj", "head")
} | {"models/reward_model/bias", "models/reward_model/score_std"}


def test_what_is_saved(several):
    data = dict(several[1])
    settings = json.loads(str(data.pop("config")))
    assert set(data) == METRICS | STAGES | WEIGHTS | {f"theory/{name}" for name in THEORY}
    assert {data[name].shape for name in METRICS} == {(6, 9)}
    assert {data[f"theory/{name}"].shape for name in THEORY} == {(6,)}
    assert data["models/actor/head"].shape == (6, 32, 27)
    assert data["fine_tuning/losses"].shape == (400,)
    assert settings["beta"] == [0.3] * 3 + [0.7] * 3
    assert settings["method"] == ["ppo", "grpo", "dpo"] * 2
    assert settings["steps"] == 9
    assert np.isnan(data["loss/value_avg"]).all(axis=1).tolist() == [False, True, True] * 2
    np.testing.assert_array_equal(data["episode"], np.tile(24 * np.arange(1, 10), (6, 1)))
