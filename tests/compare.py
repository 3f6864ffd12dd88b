"""Your PPO functions beside ours on random inputs, and the smallest input on which they differ.

    python tests/compare.py my_ppo.py
    python tests/compare.py my_ppo.py --only gae
    python tests/compare.py my_ppo.py --map gae=compute_advantages --map whiten=Trainer.whiten

Each function of ours that my_ppo.py defines, under our name or one given by --map, is called as
ours is: the same arguments in the same order. They are torch tensors if my_ppo.py imports torch,
and NumPy arrays otherwise. What yours refuses (a dtype, a mask of floats, arrays) is tried in
another way. Yours returns arrays, tensors or lists in our order, or a dict with our names; the
first results are enough. A torch loss that comes without its gradients is differentiated here.

A known difference of convention is named and counts as agreeing. A function that agrees is asked
further questions, which count with --strict: NaN at padding, holes in the mask, zeros in front, a
row without a real token. tests/README.md explains the verdicts and shows adapters.

Exit code: 0 if all agree, 1 if one differs, 2 if nothing can be compared.
"""

import argparse
import inspect
import io
import itertools
import math
import runpy
import sys
import textwrap
import time
import warnings
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.text import Text

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import rlhf_loop_pseudo as loop
    from compare_calls import COMPARED, OURS, TOLERANCE, Function, in_words, same
    from compare_cases import BY_ROW, BY_TOKEN, CHOICES, Case, random_cases, smallest
    from conventions import (
        FAR,
        KNOWN,
        MASK_IGNORED,
        PADDING_COUNTED,
        PARTS,
        PLAIN,
        PROBED,
        CannotTell,
        Convention,
        factor,
        mistakes,
    )
except ModuleNotFoundError as missing:
    package = missing.name.partition(".")[0]
    print(f"compare.py needs {package}: python -m pip install {package}", file=sys.stderr)
    sys.exit(2)


LOOSE = 1e-3  # where a convention brings another epsilon
RIGHT, WRONG, QUESTION = "bold cyan", "bold red", "bold yellow"
SMALL_ERROR = 0.01
KINDS = ["numbers", "shape", "missing", "not finite", "raises"]  # the most instructive first
NOT_FINITE = KINDS.index("not finite")


class Outcome(NamedTuple):  # how an answer of yours compares with ours
    kind: str = ""  # of the difference; empty where they agree
    words: str = ""
    part: str = ""  # the first result that differs
    error: float = 0.0  # as a share of the largest number in play
    padding: bool = False  # yours is not 0 there
    told: bool = True  # False where ours cannot tell what is right


class Example(NamedTuple):  # a smallest input, and what is said of it
    title: str
    case: Case
    columns: dict  # results by name, under the heading of their column
    remarks: list


# ------------------------------------------------------------------ one answer


def compare(case, expected, answer, tolerance):
    """Compare an answer with what ours expects, None where it cannot tell."""
    found, real = answer.found, case.real
    if answer.problem:
        told = expected is not None or real.sum() > 1  # one token has no variance: it may raise
        return Outcome("raises" if told else "", answer.problem, told=told)
    if expected is None:  # nothing varies: any finite number will do, and for one token anything
        bad = [x for x, y in found.items() if y.shape == real.shape and np.isnan(y[real]).any()]
        if bad and real.sum() > 1:
            return Outcome("not finite", "yours is not finite where nothing varies", bad[0])
        return Outcome(told=False)
    if not found.keys() & expected.keys():
        return Outcome("missing", f"yours returns none of {', '.join(expected)}")
    finite = [np.abs(x[np.isfinite(x)]).max(initial=0) for x in expected.values()]
    scale, limit = max(case.largest, *finite), max(TOLERANCE[answer.dtype], tolerance)
    worst, padding = 0.0, False
    for part in [part for part in expected if part in found]:
        a, b = expected[part], found[part]
        if a.shape != b.shape:
            return Outcome("shape", f"{part}: ours has the shape {a.shape}, yours {b.shape}", part)
        error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b) / scale)
        error = np.where(np.isnan(error), math.inf, error)
        if a.shape == real.shape and not part.startswith(("d_", "grad")):
            padding |= bool((error[~real] > limit).any())
            error = np.where(real | (a != 0), error, 0)  # but a gradient there would be learnt
        worst = max(worst, error.max(initial=0))
        if worst > limit:
            return numbers_differ(part, a, b, tuple(np.argwhere(error > limit)[0]), worst)
    return Outcome(error=worst, padding=padding)


def numbers_differ(part, a, b, place, error):
    axes = ("row", "column" if "[" in part else "token")
    where = "".join(f", {axis} {i}" for axis, i in zip(axes, place))
    words = f"first in {part}{where}: ours {a[place] + 0.0:.9g}, yours {b[place] + 0.0:.9g}"
    if part.startswith("d_") and not b.any():
        words = f"the gradient of your loss with respect to {part[2:]} is 0, ours is not"
    return Outcome("numbers" if np.isfinite(b[place]) else "not finite", words, part, error)


def agree(outcomes):
    """Whether nothing differs, and ours could tell in one case of ten at least."""
    told = sum(outcome.told for outcome in outcomes)
    return told >= len(outcomes) / 10 and not any(outcome.kind for outcome in outcomes)


# ------------------------------------------------------------------ masks that come from elsewhere


def one_block(mask):
    """Whether each row's real tokens stand side by side."""
    starts = np.diff(mask > 0, axis=1, prepend=False) & (mask > 0)
    return (starts.sum(axis=1) <= 1).all()


def usual_mask(case):
    return case.real[:, 0].all() and one_block(case.real)


def holed(rng, mask):
    mask = 1.0 * (rng.random(mask.shape) < 0.6)
    mask[:, 0] = 1
    return mask


def begun_late(rng, mask):
    length = mask.shape[1]
    starts = rng.integers(0, length, (len(mask), 1))
    ends = np.maximum(starts + 1, rng.integers(1, length + 1, (len(mask), 1)))
    return 1.0 * (np.arange(length) >= starts) * (np.arange(length) < ends)


def empty_rows(rng, mask):
    stays = rng.integers(len(mask))
    empty = (rng.random(len(mask)) < 0.5) & (np.arange(len(mask)) != stays)
    return np.where(empty[:, None], 0, mask)


QUESTIONS = [  # of a function that agrees: the title, another mask, and which masks to keep to
    ("where the mask has a hole, {}", holed, lambda case: case.real[:, 0].all()),
    (
        "with zeros in front (a prompt, left padding), {}",
        begun_late,
        lambda case: case.real.any(axis=1).all() and one_block(case.real),
    ),
    (
        "where a row has no real token, {}",
        empty_rows,
        lambda case: case.real.any() and one_block(case.real),
    ),
]


# ------------------------------------------------------------------ one function


class Comparison:
    def __init__(self, function):
        self.function, self.name = function, function.name
        self.agrees = None  # None: nothing could be compared
        self.notes, self.questions, self.examples = [], [], []

    def ask_all(self, cases):
        return [(case, self.function.ask(case)) for case in cases]

    def outcome(self, conventions, case, answer, coarse=False):
        try:
            expected = self.function.expect(conventions, case)
        except CannotTell:
            expected = None
        except ValueError:  # ours refuses it, so there is nothing to compare
            return Outcome(told=False)
        loose = LOOSE if any(one.loose for one in conventions) else 0
        tolerance = max(loose, TOLERANCE["float32"] if coarse else 0)
        return compare(case, expected, answer, tolerance)

    def outcomes(self, conventions, pairs, coarse=False):
        return [self.outcome(conventions, *pair, coarse) for pair in pairs]

    def explains(self, conventions, pairs):
        """Whether all pairs agree with these conventions."""
        outcomes = []
        for pair in pairs:
            outcomes.append(self.outcome(conventions, *pair))
            if outcomes[-1].kind:
                return False
        return agree(outcomes)

    def combinations(self, pairs):
        """Conventions that may hold together: few of those known, with all that yours shows."""
        known = KNOWN.get(self.name, [])
        shown = list(PROBED[self.name](self.function.probe)) if self.name in PROBED else []
        chosen = [(), *((one,) for one in known), *itertools.combinations(known, 2)]
        subsets = [some for n in range(len(shown) + 1) for some in itertools.combinations(shown, n)]
        found = []
        for conventions in (some + few for some in subsets for few in chosen):
            parts = [one.part for one in conventions]
            if len({*parts}) == len(parts):
                found.append(tuple(sorted(conventions, key=lambda one: PARTS.index(one.part))))
        if self.name in PLAIN:
            for conventions in found.copy():
                found += [(*conventions, one) for one in self.factors(conventions, pairs)]
        return sorted(found, key=len)

    def factors(self, conventions, pairs):
        """[the factor between the losses], by the first input on which ours can tell."""
        plain = self.function.plain_case(**PLAIN[self.name])
        without_padding = [pair for pair in pairs[:20] if pair[0].real.all()]
        for case, answer in [(plain, self.function.ask(plain)), *without_padding]:
            loss = answer.found.get("loss", np.zeros(1))
            if np.shape(loss) != ():
                return []
            with suppress(CannotTell):
                expected = self.function.expect(conventions, case)["loss"]
                return factor(loss, expected, self.name, conventions)
        return []

    def nearest(self, pairs):
        """The conventions that agree on most cases; each has to earn its place."""
        few = pairs[:40]
        combinations = self.combinations(pairs)
        for conventions in combinations:
            if self.explains(conventions, pairs):
                return conventions
        best, least = (), math.inf
        for conventions in combinations:
            cost = sum(-0.1 if one.only_leaves_out else 2 for one in conventions)
            for pair in few:
                cost += bool(self.outcome(conventions, *pair).kind)
                if cost >= least:
                    break
            else:
                best, least = conventions, cost
        return best

    def named_mistake(self, conventions, pairs):
        """What explains all differences, in a list of words, and the conventions beside it."""
        function = self.function
        known = list(mistakes(self.name, function.kinds, function.results))
        for some in dict.fromkeys([(), conventions]):
            for words, change in known:
                if self.explains((*some, Convention(words, change, "mistake")), pairs):
                    if words == PADDING_COUNTED and self.ignores("mask", pairs):
                        words = MASK_IGNORED
                    return [words], some
        return [], conventions

    def ignores(self, name, pairs):
        """Whether other values of an argument change nothing in yours, but something in ours."""
        ours_changes = False
        for case, answer in pairs[:40]:
            value = case.arguments[name]
            options = CHOICES.get(self.function.kinds[name], [])
            others = [x for x in options if x != value][:2] if options else [np.ones_like(value)]
            for other in others:
                changed = case.but(**{name: other})
                if not same(self.function.ask(changed).found, answer.found):
                    return False
                ours = (self.function.expect((), x) for x in (case, changed))
                ours_changes = ours_changes or not same(*ours)
        return ours_changes

    def smallest_example(self, title, conventions, pairs, fits_mask, coarse=False):
        """The smallest input of those that differ, as an example."""
        worst = max(x.error for x in self.outcomes(conventions, pairs, coarse) if x.kind)

        def rank(outcome):
            small = outcome.kind == "numbers" and outcome.error < min(worst, SMALL_ERROR)
            return small, KINDS.index(outcome.kind)

        def fits(case):
            if not (np.isfinite(case.largest) and fits_mask(case)):
                return False
            if case.dtype not in self.function.way.dtypes:
                return False
            outcome = self.outcome(conventions, case, self.function.ask(case), coarse)
            return bool(outcome.kind) and rank(outcome) == kind

        differing = [(case, self.outcome(conventions, case, x, coarse)) for case, x in pairs]
        differing = [(rank(x), case) for case, x in differing if x.kind]
        differing.sort(key=lambda x: (x[0], x[1].largest > 10, x[1].complexity()))
        kind = differing[0][0]
        several = 1 if differing[0][1].size(1, BY_TOKEN) > 20 else 2  # long rows take long
        found = [smallest(case, fits) for other, case in differing[:several] if other == kind]
        case = min(found, key=Case.complexity)
        answer = self.function.ask(case)
        outcome = self.outcome(conventions, case, answer, coarse)
        try:
            expected = self.function.expect(conventions, case)
        except CannotTell:
            conventions, expected = (), self.function.expect((), case)
        changed = any(not one.only_leaves_out for one in conventions)
        columns = {"ours, with that" if changed else "ours": expected, "yours": answer.found}
        part = outcome.part or "the answer"
        words = f"your {part} is not finite" if kind[1] == NOT_FINITE else f"they differ in {part}"
        title = title.format(words, part=part)
        return Example(f"{self.name}: {title}:", case, columns, [outcome.words])

    def judge(self, count):
        """Compare on so many inputs. Returns the verdict; sets agrees, notes and examples."""
        function = self.function
        self.notes += function.find_way()
        cases = random_cases(function.kinds, function.way.dtypes, function.exact(), count)
        pairs = self.ask_all(cases)
        if function.problems:
            return self.judge_nothing(pairs)
        pairs = self.leave_out_unknown_settings(pairs)
        self.agrees = False
        if any(not same(function.ask(case).found, answer.found) for case, answer in pairs[29::-1]):
            return "DIFFERS from one call to the next, on the same input"
        conventions = self.nearest(pairs)
        coarse = not agree(self.outcomes(conventions, pairs))
        outcomes = self.outcomes(conventions, pairs, coarse)
        self.agrees = agree(outcomes)
        self.add_notes(pairs, outcomes)
        if not self.agrees:
            self.add_difference(conventions, pairs)
            return "DIFFERS"
        if coarse:
            self.notes.append("in float64 they agree only as closely as in float32")
        self.ask_more(conventions, [case for case, _ in pairs], coarse)
        words = "; and ".join(one.words for one in conventions)
        return "agrees" + f", but for: {words}" * bool(words) + f" ({reach(pairs, outcomes)})"

    def judge_nothing(self, pairs):
        """The verdict on a function that raises on every input."""
        problems = self.function.problems
        if all("NotImplementedError" in problem for problem in problems.values()):
            return "not compared: yours raises NotImplementedError"
        self.agrees = False
        example = self.smallest_example("no input works", (), pairs[:3], usual_mask)
        by_problem = {}
        for dtype, problem in problems.items():
            by_problem.setdefault(problem, []).append(dtype)
        remarks = [f"in {', '.join(dtypes)} {words}" for words, dtypes in by_problem.items()]
        if len(by_problem) == 1:
            remarks = [f"{problem}, in every dtype" for problem in by_problem]
        if any("argument" in problem for problem in by_problem):
            remarks.append(f"it is called as {self.name}({', '.join(self.function.kinds)})")
        self.examples.append(example._replace(remarks=remarks))
        return "DIFFERS"

    def leave_out_unknown_settings(self, pairs):
        """The pairs without those for which yours has no such setting."""
        for name, kind in self.function.kinds.items():
            problems = {}
            for setting in CHOICES.get(kind, []):
                answers = [x for case, x in pairs if case.arguments[name] == setting]
                if answers and all(answer.not_there for answer in answers):
                    problems[setting] = answers[0].problem
            if problems and len(problems) < len(CHOICES[kind]):
                pairs = [pair for pair in pairs if pair[0].arguments[name] not in problems]
                words = f"{name} {', '.join(map(str, problems))}: not there in yours, which raises"
                problem = next(iter(problems.values())).removeprefix("yours raises ")
                self.notes.append(f"{words} {problem}")
        return [pair for pair in pairs if "NotImplementedError" not in pair[1].problem]

    def add_notes(self, pairs, outcomes):
        """Note what is not compared, overwritten, left at padding, or raised on one token."""
        found = " ".join(name for _, answer in pairs for name in answer.found)
        missing = [part for part in self.function.results if part not in found]
        if missing and found:
            self.notes.append(f"not compared: {', '.join(missing)}")
        if self.function.overwritten:
            names = ", ".join(sorted(self.function.overwritten))
            self.notes.append(f"yours overwrites its argument {names}")
        if any(outcome.padding for outcome in outcomes):
            self.notes.append("at padding yours is not 0")
        raised = [outcome.words for outcome in outcomes if not outcome.told and outcome.words]
        if raised and not any(outcome.kind for outcome in outcomes):
            self.notes.append(f"on a single token {raised[0]}")

    def add_difference(self, conventions, pairs):
        """Show the smallest input on which they differ, and what explains it."""
        plain = sum(bool(outcome.kind) for outcome in self.outcomes((), pairs))
        left = sum(bool(outcome.kind) for outcome in self.outcomes(conventions, pairs))
        if left > plain / 2:  # they do not explain enough to be named
            conventions = tuple(one for one in conventions if one.only_leaves_out)
        remarks, conventions = self.named_mistake(conventions, pairs)
        apart = "; and ".join(one.words for one in conventions if not one.only_leaves_out)
        title = f"apart from {apart}, they still differ here" if apart else "they differ here"
        example = self.smallest_example(title, conventions, pairs, usual_mask)
        remarks = remarks or self.confirmed_facts(conventions, pairs, example.case)
        self.examples.append(example._replace(remarks=[*example.remarks, *remarks]))

    def confirmed_facts(self, conventions, pairs, case):
        """What the differing inputs have in common, where one more call confirms it."""

        def agrees_on(changed):
            outcome = self.outcome(conventions, changed, self.function.ask(changed))
            return not outcome.kind

        outcomes = self.outcomes(conventions, pairs)
        told = [(pair[0], x.kind) for pair, x in zip(pairs, outcomes) if x.told]
        sentences = []
        for sentence, holds, mended in facts(case):
            others = [kind for other, kind in told if not holds(other)]
            if holds(case) and len(others) >= 10 and not any(others) and agrees_on(mended):
                sentences.append(sentence)
        for name, kind in self.function.kinds.items():
            if kind in CHOICES and self.ignores(name, pairs):
                sentences.insert(0, f"yours does not depend on {name}")
        if self.name == "whiten" and nearly_level(case):
            centered = np.where(case.real, case.arguments["x"] - case.arguments["x"].mean(), 0)
            if agrees_on(case.but(x=centered)):
                words = "equal or nearly equal values lose their digits: with their mean"
                sentences.append(f"{words} subtracted beforehand they agree")
        worst = max(x.error if x.kind == "numbers" else 1 for x in outcomes if x.kind)
        if worst < SMALL_ERROR:
            sentences.append("all differences are below 1 %: is half precision used inside?")
        return sentences[:2]

    def ask_more(self, conventions, cases, coarse):
        """Ask of a function that agrees what counts with --strict only."""
        rng = np.random.default_rng(0)
        if "mask" not in self.function.kinds:
            return
        cases = [case for case in cases if case.size(1, BY_TOKEN) < 20][: len(cases) // 2]
        padded = [case for case in cases if not case.real.all()]
        junk = [x.at_padding(rng.choice([np.nan, np.inf, -np.inf], x.real.shape)) for x in padded]
        questions = [("NaN or infinity at padding reaches your {part}", junk, usual_mask)]
        for title, change, fits_mask in QUESTIONS:
            changed = [case.but(mask=change(rng, case.arguments["mask"])) for case in cases]
            questions.append((title, [case for case in changed if fits_mask(case)], fits_mask))
        for title, changed, fits_mask in questions:
            pairs = self.ask_all(changed)
            if any(outcome.kind for outcome in self.outcomes(conventions, pairs, coarse)):
                example = self.smallest_example(title, conventions, pairs, fits_mask, coarse)
                self.questions.append(example)
                self.notes.append(example.title.partition(": ")[2].rstrip(":"))


def nearly_level(case):
    real = case.arguments["x"][case.real]
    return len(real) > 1 and real.std() <= 0.01 * abs(real.mean())


def facts(case):
    """(sentence, whether it may hold for a case, this case changed so that they should agree)."""
    arguments, ones = case.arguments, np.ones_like(case.arguments.get("mask", 0))
    yield (
        "with 0 at padding they agree: yours reads what stands there",
        lambda x: not same(x.arguments, x.at_padding(0).arguments),
        case.at_padding(0),
    )
    if "mask" in arguments:
        yield (
            "without padding they agree: yours counts it in",
            lambda x: not x.real.all(),
            case.but(mask=ones),
        )
    length = case.size(1, BY_TOKEN)
    if length > 5:
        yield (
            f"with up to {length - 1} tokens they agree",
            lambda x: x.size(1, BY_TOKEN) >= length,
            case.without(1, BY_TOKEN, [length - 1]),
        )
    group_size = arguments.get("group_size", 1)
    if case.size(0, BY_ROW) > group_size and "pair_mask" not in case.kinds.values():
        one = "one group" if group_size > 1 else "one row"
        rows = np.arange(group_size, case.size(0, BY_ROW))
        yield (
            f"with {one} they agree",
            lambda x: x.size(0, BY_ROW) > x.arguments.get("group_size", 1),
            case.without(0, BY_ROW, rows),
        )
    if "prompts" in arguments:
        prompts = arguments["prompts"]
        yield (
            "without the end token in the prompt they agree",
            end_in_prompt,
            case.but(prompts=np.where(is_end(case, prompts), 0, prompts)),
        )
    yield "in float64 they agree", lambda x: x.dtype != "float64", replace(case, dtype="float64")
    yield (
        "with numbers below 30 they agree",
        lambda x: x.largest >= 30,
        case.but(**{n: x / 100 for n, x in arguments.items() if np.asarray(x).dtype.kind == "f"}),
    )
    for name, kind in case.kinds.items():
        options = CHOICES.get(kind, [])
        for option in options:
            others = [x for x in options if x != option]
            yield (
                f"unless {name} is {option} they agree",
                lambda x, name=name, option=option: x.arguments[name] == option,
                case.but(**{name: others[0]}),
            )
        for option in options[:1]:
            yield (
                f"where {name} is {option} they agree",
                lambda x, name=name, option=option: x.arguments[name] != option,
                case.but(**{name: option}),
            )


def is_end(case, tokens):
    """Where the last token of the vocabulary stands."""
    models = [x for x in case.arguments.values() if isinstance(x, dict)]
    return tokens == (len(models[0]["embed"]) if models else math.inf) - 1


def end_in_prompt(case):
    return is_end(case, case.arguments["prompts"]).any()


def reach(pairs, outcomes):
    """How many inputs were compared, and how closely they agree, in words."""
    words = [f"{sum(outcome.told for outcome in outcomes)} inputs"]
    for dtype in TOLERANCE:
        errors = [x.error for x, (_, answer) in zip(outcomes, pairs) if answer.dtype == dtype]
        if errors and "16" in dtype:
            words.append(f"within {TOLERANCE[dtype]:.0%}, as {dtype} goes")
        elif errors:
            digits = math.floor(-math.log10(max(errors) + np.finfo(float).eps))
            words.append(f"{digits}{' digits' * (len(words) == 1)} in {dtype}")
    return ", ".join(words)


# ------------------------------------------------------------------ the chain


def lost_score(shaping, advantages):
    """An example of a score that no advantage sees, or None."""
    kinds = shaping.kinds | advantages.kinds

    def chain(case):
        """(rewards, advantages), or nothing where one raises."""
        given = {name: case.arguments[name] for name in shaping.kinds}
        rewards = shaping.ask(replace(case, arguments=given, kinds=shaping.kinds)).found
        if "rewards" not in rewards or rewards["rewards"].shape != case.real.shape:
            return None
        given = case.arguments | {next(iter(advantages.kinds)): rewards["rewards"]}
        given = {name: given[name] for name in advantages.kinds}
        found = advantages.ask(replace(case, arguments=given, kinds=advantages.kinds)).found
        return rewards | found if "advantages" in found else None

    def lost(case):
        if not usual_mask(case):
            return False
        for row in range(len(case.real)):
            low, high = case.arguments["scores"].copy(), case.arguments["scores"].copy()
            low[row], high[row] = -FAR, FAR
            both = [chain(case.but(scores=scores)) for scores in (low, high)]
            if None not in both and np.array_equal(*(x["advantages"][row] for x in both)):
                return True
        return False

    kinds = {name: kind for name, kind in kinds.items() if name != "rewards"}
    dtypes = [x for x in shaping.way.dtypes if x in advantages.way.dtypes]
    for case in random_cases(kinds, dtypes, True, 20) if dtypes else ():
        settings = {name: 1.0 for name, kind in kinds.items() if kind in ("discount", "beta")}
        case = case.but(**settings)
        if lost(case):
            case = smallest(case, lost)
            case = case.but(scores=np.ones_like(case.arguments["scores"]))
            title = f"{shaping.name} -> {advantages.name}: a score never reaches an advantage"
            remark = "with any other score the advantages are the same"
            return Example(f"{title}:", case, {"yours": chain(case)}, [remark])
    return None


# ------------------------------------------------------------------ the screen


class Screen:
    """Text of 80 columns; on a terminal with colours, and a progress bar after two seconds."""

    def __init__(self, count):
        terminal = sys.stdout.isatty()
        self.console = Console(
            highlight=False, markup=False, soft_wrap=True, force_terminal=terminal
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
        )
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.task = self.progress.add_task("", total=count)
        self.bar_from = time.monotonic() + 2 if terminal else math.inf

    def tick(self):
        """Called often: shows the bar when it is time."""
        if time.monotonic() > self.bar_from:
            self.bar_from = math.inf
            self.progress.start()

    def stop(self):
        if self.progress.live.is_started:
            self.progress.stop()

    def say(self, text, first=0, rest=0, style=""):
        indents = {"initial_indent": " " * first, "subsequent_indent": " " * rest}
        self.console.print(Text(textwrap.fill(text, 80, break_on_hyphens=False, **indents), style))

    def verdict(self, comparison, words):
        """One function's lines of the summary."""
        style = {True: RIGHT, False: WRONG, None: QUESTION}[comparison.agrees]
        self.say(f"  {comparison.name:<19}{words}", 0, 21, style)
        for note in comparison.notes:
            self.say(note, 21, 23)

    def show(self, example, style):
        """A smallest input, what both make of it side by side, and the remarks."""
        self.console.print()
        self.say(example.title, 0, 2, style)
        for name, x in example.case.arguments.items():
            self.say(f"{name} = {literal(x, example.case.dtype)}", 4, 8)
        self.console.print()
        rows = table(example.columns)
        for line in rows:
            self.console.print(Text(line))
        if rows:
            self.console.print()
        for remark in example.remarks:
            self.say(remark, 4, 6)


def table(columns):
    """The results in columns, as lines."""
    first, *others = columns.values()
    parts = [part for part in first if all(part in other for other in others)]
    label = max(map(len, parts), default=0) + 2
    form = {"max_line_width": 35 - label // 2, "precision": 4, "suppress_small": True}
    form |= {"threshold": 12 * len(columns), "edgeitems": 3}
    rows = [("", *columns)] if parts else []
    rows += [
        (part, *(np.array2string(x[part] + 0.0, **form) for x in columns.values()))
        for part in parts
    ]
    width = max((len(line) for row in rows for line in row[1].splitlines()), default=0)
    lines = []
    for row in rows:
        for name, *cells in itertools.zip_longest(*map(str.splitlines, row), fillvalue=""):
            cells = "   ".join(f"{cell:<{width}}" for cell in cells)
            lines.append(f"    {name:<{label}}{cells}".rstrip())
    return lines


def literal(x, dtype):
    """An argument as Python source, in one line."""
    if isinstance(x, dict):
        return "{" + ", ".join(f'"{key}": {literal(part, dtype)}' for key, part in x.items()) + "}"
    if not isinstance(x, np.ndarray):
        return repr(x)
    for number, maker in ((0, "zeros"), (1, "ones")):
        if x.size > 12 and (x == number).all():
            return f"np.{maker}({x.shape})"
    x = x.astype(dtype) if x.dtype.kind == "f" and dtype != "bfloat16" else x
    source = " ".join(repr(x).replace("dtype=", "dtype=np.").split())
    return "np." + source.replace("nan", "np.nan").replace("inf", "np.inf")


def look_up(module, name):
    """The function of a name such as PPO.advantages; a method is taken from PPO()."""
    *owners, last = name.split(".")
    owner = reduce(getattr, owners, argparse.Namespace(**module))
    if isinstance(owner, type) and inspect.isfunction(inspect.getattr_static(owner, last)):
        owner = owner()
    return getattr(owner, last)


def find_functions(path, maps, only):
    """Yours by our names; your file may import those beside it. Raises ValueError in words."""
    names = [name for name in COMPARED if name in OURS or hasattr(loop, name)]
    for name in only:
        if name not in names:
            raise ValueError(f"--only {name}: there is no {name!r} here")
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with redirect_stdout(io.StringIO()):
            module = runpy.run_path(str(path), run_name="yours")
    except ModuleNotFoundError as missing:
        words = f"{path} needs {missing.name}, which this Python does not have"
        raise ValueError(f"{words}: python -m pip install {missing.name}") from None
    except (Exception, SystemExit) as problem:
        raise ValueError(f"{path} cannot be imported: {in_words(problem)}") from None
    found = {name: module[name] for name in names if name in module}
    for pair in maps:
        ours, _, theirs = pair.partition("=")
        if ours not in names:
            raise ValueError(f"--map {pair}: there is no {ours!r} here")
        try:
            found[ours] = look_up(module, theirs)
        except (AttributeError, TypeError) as problem:
            raise ValueError(f"--map {pair}: {problem}") from None
    yours = {name: x for name, x in found.items() if x is not getattr(loop, name, None)}
    if only and not yours.keys() & set(only):
        raise ValueError(f"{path} does not define {', '.join(only)}: say --map OURS=YOURS")
    if not yours:
        raise ValueError(f"{path} defines none of {', '.join(names)}: say --map OURS=YOURS")
    return {name: x for name, x in yours.items() if not only or name in only}


def report(screen, yours, options):
    """Print a summary, then the examples. Returns the exit code."""
    comparisons = [Comparison(Function(name, x, screen.tick)) for name, x in yours.items()]
    for one in comparisons:
        screen.progress.update(screen.task, description=one.name)
        screen.verdict(one, one.judge(options.cases))
        screen.progress.advance(screen.task)
    right = {one.name: one.function for one in comparisons if one.agrees}
    lost = []
    for name in ("gae", "rloo_advantages", "grpo_advantages"):
        if "shape_rewards" in right and name in right:
            lost += [lost_score(right["shape_rewards"], right[name])]
    lost = [example for example in lost if example]
    for example in lost:
        screen.say(f"  {example.title.rstrip(':')}", 0, 21, WRONG)
    for one in comparisons:
        for example in one.examples:
            screen.show(example, WRONG)
    for example in lost:
        screen.show(example, WRONG)
    questions = [example for one in comparisons for example in one.questions]
    for example in questions:
        screen.show(example, QUESTION)
    compared = [one for one in comparisons if one.agrees is not None]
    if lost or any(not one.agrees for one in compared) or (options.strict and questions):
        return 1
    return 0 if compared else 2


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("module", type=Path, help="your file")
    add("--only", action="append", default=[], metavar="OURS", help="compare this function alone")
    add("--map", action="append", default=[], metavar="OURS=YOURS", help="your name for a function")
    add("--cases", type=int, default=300, help="random inputs for each function (default 300)")
    add("--strict", action="store_true", help="NaN, holes and empty rows count too")
    options = parser.parse_args(argv)
    try:
        if options.cases < 1:
            raise ValueError(f"--cases {options.cases}: at least 1")
        yours = find_functions(options.module, options.map, options.only)
    except ValueError as problem:
        print(f"compare.py: {problem}", file=sys.stderr)
        return 2
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # an overflow shows in the answers
        warnings.simplefilter("ignore")
        screen = Screen(len(yours))
        screen.say(f"{options.module.name} beside {Path(loop.__file__).name}")
        try:
            return report(screen, yours, options)
        finally:
            screen.stop()


if __name__ == "__main__":
    sys.exit(main())
