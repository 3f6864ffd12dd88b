"""Your PPO functions beside ours on random inputs, and the smallest input on which they differ.

    python tests/compare.py my_ppo.py
    python tests/compare.py my_ppo.py --map gae=compute_advantages --map whiten=Trainer.whiten

Each function of the table below that my_ppo.py defines, under our name or one given by --map, is
called as ours is: the same arguments in the same order. They are NumPy arrays, or torch tensors if
my_ppo.py imports torch; what yours refuses (a dtype, a mask of numbers, arrays in place of lists of
rows) is tried in another way, and said. It returns arrays, tensors or lists in our order, or a dict
with our names; the first results are enough. A torch loss without gradients is differentiated here.

Masks are 1s and then 0s; at padding stands 0 or any number. A known difference of convention is
named, and counts as agreeing. What agrees is asked two more questions, which count with --strict:
does NaN or infinity at padding reach its results, does it agree where the mask has holes? Exit
code: 0 where all agree, 1 where one differs, 2 where nothing can be compared.
"""

import argparse
import inspect
import itertools
import math
import runpy
import sys
import textwrap
import traceback
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import rlhf_loop_pseudo as loop
    from conventions import CLIPS, KNOWN, MISTAKES, SMALL, Convention, probe, reordered, scaled
except (ModuleNotFoundError, SystemExit) as missing:
    print(f"compare.py: {missing}", file=sys.stderr)
    sys.exit(2)


def logprobs(logits, labels):
    return np.take_along_axis(loop.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


def clipped_value_loss(values, old_values, returns, mask, clip):
    """The mean of the larger of two squared errors: the value's, and that of it clipped."""
    clipped = values.clip(old_values - clip, old_values + clip)
    worse = np.where(abs(values - returns) >= abs(clipped - returns), values, clipped)
    loss, d_values = loop.value_loss(worse, returns, mask)
    return loss, np.where(worse == values, d_values, 0)


def two_updates(adam_step, params, gradients, next_gradients, learning_rate):
    """adam_step changes its arguments and returns nothing: what two calls make of an array."""
    weights, state = {"w": params + 0}, {}
    adam_step(weights, {"w": gradients}, state, learning_rate)
    adam_step(weights, {"w": next_gradients}, state, learning_rate)
    return weights["w"]


# What is compared: the kinds of our function's arguments (made in random_case), the names of its
# results. "small" is "numbers" without the extreme ones, which cancel in gradients.
COMPARED = {
    "score_responses": ("reward_model prompts responses mask", "scores"),
    "token_logprobs": ("actor prompts responses", "logprobs"),
    "logprobs": ("logits responses", "logprobs"),
    "kl_penalty": ("logprobs logprobs estimator", "kl"),
    "shape_rewards": ("scores logprobs mask beta", "rewards"),
    "critic_values": ("critic prompts responses", "values"),
    "gae": ("numbers numbers mask discount discount", "advantages returns"),
    "rloo_advantages": ("numbers mask group_size", "advantages"),
    "grpo_advantages": ("numbers mask group_size", "advantages"),
    "whiten": ("numbers mask", "whitened"),
    "ppo_loss": ("logprobs logprobs numbers mask clip", "loss d_new_logprobs ratio"),
    "value_loss": ("numbers numbers mask", "loss d_values"),
    "clipped_value_loss": ("numbers numbers numbers mask clip", "loss d_values"),
    "actor_gradients": ("actor prompts responses small small mask clip", "gradients loss ratio"),
    "critic_gradients": ("critic prompts responses small mask", "gradients loss"),
    "adam_step": ("numbers numbers numbers learning_rate", "params"),
    "human_scores": ("prompts responses mask vocab_size", "scores"),
    "preference_loss": ("scores scores", "loss d_chosen d_rejected"),
    "reward_gradients": ("critic prompts responses pair_mask", "gradients loss"),
}
# What is no difference, as a share of the largest number in play: rounding, and an epsilon of 1e-8
TOLERANCE = {"float64": 1e-7, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
LOOSE = 1e-3  # where a convention brings another epsilon
REFUSED = "yours raises NotImplementedError"
KINDS = ["numbers", "shape", "missing", "not finite", "raises"]  # the most instructive first

FLOATS_BY_TOKEN = "numbers small logprobs".split()
BY_TOKEN = [*FLOATS_BY_TOKEN, *"mask pair_mask responses logits".split()]
BY_ROW = [*BY_TOKEN, "prompts", "scores"]
SIMPLE = [0, 1, -1, 2, -2, 0.5]  # the simplest first
ODD = [n / 1000 for n in range(-2999, 3000, 97)]
EIGHTHS = [n / 8 for n in range(-24, 25)]  # half precision holds these exactly
FAR = {"numbers": [1000, -1000], "scores": [1000, -1000], "logprobs": [-30], "head": [50, -50]}
CHOICES = {
    "estimator": ["k1", "k2", "k3"],
    "beta": [1.0, 0.0, 0.1],
    "discount": [1.0, 0.0, 0.9, 0.5, 0.97],
    "clip": [0.2, 0.1, 0.3, 0.4],
    "learning_rate": [1.0, 0.1],
}


class Way(NamedTuple):  # how yours wants its arguments
    dtypes: tuple = ("float64", "float32")
    mask: str | None = None  # a dtype of its own
    rows: bool = False  # lists of rows in place of arrays
    exact: bool = False  # only numbers that half precision holds


@dataclass(frozen=True)
class Case:
    """The arguments of one call, in float64 (yours gets them in dtype), and their kinds."""

    arguments: dict
    kinds: dict
    dtype: str

    @cached_property
    def real(self):
        """Where real tokens are, (B, T) bool; all are where the function has no mask."""
        return np.array(self.arguments.get("mask", [[1]])) > 0

    def arrays(self):
        """(argument, array), the parts of a model one by one."""
        for name, x in self.arguments.items():
            parts = x.values() if isinstance(x, dict) else [x]
            yield from ((name, part) for part in parts if isinstance(part, np.ndarray))

    @cached_property
    def largest(self):
        """The largest number, at least 1; what stands at padding does not count."""
        return np.max([1, *(np.abs(x).max(initial=0) for _, x in self.at_padding(0).arrays())])

    def but(self, **arguments):
        return replace(self, arguments=self.arguments | arguments)

    def named(self, kinds):
        return {name: x for name, x in self.arguments.items() if self.kinds[name] in kinds}

    def at_padding(self, junk):
        """The case with junk, a number or an array, at padding."""
        concerned = self.named(FLOATS_BY_TOKEN)
        return self.but(**{name: np.where(self.real, x, junk) for name, x in concerned.items()})

    def size(self, axis, kinds):
        return max((x.shape[axis] for x in self.named(kinds).values()), default=0)

    def simpler(self):
        """Cases that are one step smaller or simpler, the largest steps first."""
        if self.dtype == "float32":
            yield replace(self, dtype="float64")
        rows = np.arange(self.size(0, BY_ROW)).reshape(-1, self.arguments.get("group_size", 1))
        if "pair_mask" in self.kinds.values():
            rows = rows.reshape(2, -1).T
        for axis, kinds in ((0, BY_ROW), (1, BY_TOKEN), (1, ["prompts"])):
            concerned = self.named(kinds).items()
            units = range(self.size(1, kinds)) if axis else rows
            for unit in units if len(units) > 1 else ():
                yield self.but(**{name: np.delete(x, unit, axis) for name, x in concerned})
        for name, kind in self.kinds.items():
            simpler = itertools.takewhile(self.arguments[name].__ne__, CHOICES.get(kind, []))
            yield from (self.but(**{name: x}) for x in simpler)
        for i, (name, array) in enumerate(self.arrays()):
            for place, number in simpler_numbers(array, self.kinds[name]):
                simpler = self.but(**deepcopy(self.arguments))
                list(simpler.arrays())[i][1][place] = number
                yield simpler

    def complexity(self):
        """What the smallest input has least of: numbers, padding, numbers that are not 0."""
        arrays = [x for name, x in self.arrays() if name != "mask"]
        numbers, padding = sum(x.size for x in arrays), np.count_nonzero(~self.real)
        return self.size(0, BY_ROW), numbers, padding, sum(map(np.count_nonzero, arrays))

    def valid(self):
        """Whether real tokens are finite, and no padding stands before them."""
        return np.isfinite(self.largest) and self.real[:, 0].all()

    def facts(self):
        """What all cases that differ may have in common, by what to say then."""
        junk = not same(self.arguments, self.at_padding(0).arguments)
        facts = {
            "with 0 at padding they agree: yours reads what stands there": junk,
            "without padding they agree: yours counts it in": not self.real.all(),
            "with up to five tokens they agree": self.size(1, BY_TOKEN) > 5,
            "in float64 they agree": self.dtype != "float64",
            "with numbers below 30 they agree": self.largest >= 30,
        }
        for name, kind in self.kinds.items():
            value, options = self.arguments[name], CHOICES.get(kind, [])
            facts |= {f"unless {name} is {x} they agree": value == x for x in options}
            facts |= {f"where {name} is {x} they agree": value != x for x in options[:1]}
        return facts


def simpler_numbers(array, kind):
    """(place, simpler number); first of all 0 everywhere."""
    if array.any() and not kind.endswith("mask"):
        yield ..., 0
    for place in np.ndindex(array.shape):
        value = array[place]
        pool = [-abs(x) for x in SIMPLE] if kind == "logprobs" else SIMPLE
        pool = [1] if kind.endswith("mask") else range(value) if array.dtype.kind == "i" else pool
        others = [np.nan] if np.isinf(value) else [np.round(value)] * bool(np.isfinite(value))
        yield from ((place, x) for x in itertools.takewhile(value.__ne__, [*pool, *others]))


def random_case(rng, kinds, way):
    """Few rows, few tokens; extreme numbers in one case of three, long rows in one of ten."""
    length = int(rng.integers(6, 13) if rng.random() < 0.1 else rng.integers(1, 6))
    group_size = int(rng.integers(2, 4)) if "group_size" in kinds else 1
    rows = group_size * int(rng.integers(1, 4)) * (2 if "pair_mask" in kinds.values() else 1)
    end = 26 if "vocab_size" in kinds else int(rng.integers(1, 4))  # the last token; 26: letters
    width, prompt_length = rng.integers(1, 3, 2)
    ends = rng.integers(0 if rng.random() < 0.7 else length, length + 1, (rows, 1))
    mask, ended = 1.0 * (np.arange(length) <= ends), np.arange(length) == ends
    junk = 0 if rng.random() < 0.5 and "mask" in kinds else 1
    extreme = rng.random() < 1 / 3 and not way.exact
    level = rng.random() < 0.1  # a group without spread is nothing rare

    def numbers(kind, *shape):
        pool = SIMPLE * 4 + (EIGHTHS if way.exact else ODD) + FAR.get(kind, []) * 15 * extreme
        x = np.full(shape, rng.choice(pool)) if level else rng.choice(np.array(pool), shape)
        return -abs(x) if kind == "logprobs" else x

    def model(outputs, **more):
        shapes = {"embed": (end + 1, width), "mix": (width, width), "head": (width, outputs)}
        return {name: numbers(name, *shape) for name, shape in (shapes | more).items()}

    make = {
        "mask": lambda: mask,
        "pair_mask": lambda: mask,
        "scores": lambda: numbers("scores", rows),
        "prompts": lambda: rng.integers(0, end, (rows, prompt_length)),
        "responses": lambda: np.where(ended, end, rng.integers(0, end, (rows, length))),
        "logits": lambda: numbers("numbers", rows, length, end + 1),
        "actor": lambda: model(end + 1),
        "critic": lambda: model(1),
        "reward_model": lambda: model(1, bias=(1,)),
        "group_size": lambda: group_size,
        "vocab_size": lambda: end + 1,
    }

    def argument(kind):
        if kind in FLOATS_BY_TOKEN:
            return numbers(kind, rows, length) * np.where(mask, 1, junk) + 0.0
        options = CHOICES.get(kind)
        return options[rng.integers(len(options))] if options else make[kind]()

    arguments = {name: argument(kind) for name, kind in kinds.items()}
    return Case(arguments, kinds, way.dtypes[rng.integers(len(way.dtypes))])


class Answer(NamedTuple):
    found: dict  # what yours returned, by name and in float64
    dtype: str = "float64"  # the coarsest in play
    problem: str = ""  # REFUSED for NotImplementedError


def hand_over(case, way):
    """What yours gets in place of our arguments, by name: always copies."""
    torch = sys.modules.get("torch")

    def convert(x, kind):
        if isinstance(x, dict):
            return {key: convert(part, kind) for key, part in x.items()}
        if not isinstance(x, np.ndarray):
            return x
        dtype = "int64" if x.dtype.kind == "i" else case.dtype
        dtype = way.mask if way.mask and kind.endswith("mask") else dtype
        return torch.tensor(x).to(getattr(torch, dtype)) if torch else x.astype(dtype)

    return {name: convert(x, case.kinds[name]) for name, x in case.arguments.items()}


def flat(results):
    """{name: result}, the parts of a dict as 'gradients["mix"]'; without None and text."""
    found = {}
    for name, x in results.items():
        if isinstance(x, dict):
            found |= flat({f'{name}["{key}"]': part for key, part in x.items()})
        elif x is not None and not isinstance(x, str):
            found[name] = x
    return found


def as_array(x):
    """A result in float64: a number, an array, a tensor, or a list of rows, ragged or not."""
    if isinstance(x, list | tuple):
        rows = [as_array(row) for row in x]
        longest = max((row.size for row in rows if row.ndim == 1), default=0)
        return np.array([np.pad(x, (0, longest - len(x))) if x.ndim == 1 else x for x in rows])
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()  # NumPy has no bfloat16
    return np.asarray(x).astype(float)


def same(a, b):
    """Whether the arrays of two dicts are equal."""
    a, b = ({name: as_array(x) for name, x in flat(each).items()} for each in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(a[x], b[x], equal_nan=True) for x in a)


def last_line(problem):
    return traceback.format_exception_only(problem)[-1].strip()


class Outcome(NamedTuple):  # how an answer of yours compares with ours
    kind: str = ""  # of the difference; empty where they agree
    words: str = ""
    part: str = ""  # the first result that differs
    error: float = 0.0  # as a share of the largest number in play
    padding: bool = False  # yours is not 0 there
    told: bool = True  # False where ours cannot tell what is right


def compare(case, expected, answer, tolerance):
    """Compare an answer with what ours expects, None where it cannot tell."""
    found, real = answer.found, case.real
    if answer.problem:
        return Outcome("raises", answer.problem)
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


class Comparison:
    def __init__(self, name, yours):
        both = globals().get(name) or getattr(loop, name), yours
        twice = (partial(two_updates, x) for x in both)
        self.ours, self.yours = twice if name == "adam_step" else both
        kinds, results = (words.split() for words in COMPARED[name])
        self.name, self.results = name, results
        self.kinds = dict(zip(inspect.signature(self.ours).parameters, kinds))
        self.way, self.agrees = Way(), None  # None: nothing could be compared
        self.notes, self.examples, self.overwritten = [], [], set()

    def cases(self, count):
        rng = np.random.default_rng(0)
        return [random_case(rng, self.kinds, self.way) for _ in range(count)]

    def by_name(self, answer):
        """Results by name, all of a dict's parts: they come in our order, or with our names."""
        if isinstance(answer, dict) and set(self.results) & set(answer):
            return flat({name: answer.get(name) for name in self.results})
        return flat(dict(zip(self.results, answer if isinstance(answer, tuple) else [answer])))

    def call(self, given):
        """Call yours. Returns its results by name, with the gradients that it left to autograd."""
        wanted = [name for name in given if f"d_{name}" in self.results]
        leaves = {x: given[x].requires_grad_() for x in wanted if hasattr(given[x], "grad")}
        for name, leaf in leaves.items():
            given[name] = leaf.clone()  # yours may overwrite it, which a leaf does not allow
            given[name].retain_grad()
        rows = [name for name in given if self.way.rows and self.kinds[name] in BY_TOKEN]
        results = self.by_name(self.yours(*(list(x) if y in rows else x for y, x in given.items())))
        leaves = {name: leaf for name, leaf in leaves.items() if f"d_{name}" not in results}
        backward = all(leaf.grad is None for leaf in leaves.values())  # yours did not do it
        if leaves and backward and getattr(results.get("loss"), "requires_grad", False):
            results["loss"].backward()
        for name, leaf in leaves.items():
            results[f"d_{name}"] = 0 * leaf.detach() if leaf.grad is None else leaf.grad
        return results

    def ask(self, case):
        given, before = hand_over(case, self.way), hand_over(case, self.way)
        try:
            results = self.call(given)
            found = {name: as_array(x) for name, x in results.items()}
        except NotImplementedError:
            return Answer({}, problem=REFUSED)
        except (Exception, SystemExit) as problem:
            return Answer({}, problem=f"yours raises {last_line(problem)}")
        advantages = found.get("advantages", np.zeros(0))
        if "group_size" in self.kinds and advantages.size == len(case.real):  # one a response
            found["advantages"] = advantages.reshape(-1, 1) * case.real
        firsts = [x[0] if isinstance(x, list) and x else x for x in results.values()]
        dtypes = [str(getattr(x, "dtype", "")).removeprefix("torch.") for x in firsts]
        dtypes = [case.dtype, *(dtype for dtype in dtypes if dtype in TOLERANCE)]
        self.overwritten |= {x for x in given if not same({"": given[x]}, {"": before[x]})}
        return Answer(found, max(dtypes, key=list(TOLERANCE).index))

    def find_way(self):
        """Find the first way that yours takes, and note what it refuses of the ways before."""
        dtypes = [Way().dtypes, ("float32",), ("float64",), ("float16",)]
        dtypes += [("bfloat16",)] * ("torch" in sys.modules)
        reason = ""
        for way in itertools.product(dtypes, [None, "bool", "int64"], [False, True]):
            self.way = Way(*way)
            answers = [self.ask(case) for case in self.cases(8)]
            problems = [x.problem for x in answers if x.problem not in ("", REFUSED)]
            if not problems:
                break
            reason = reason or problems[0].removeprefix("yours raises ")
        self.way = Way() if problems else self.way
        refused = [dtype for dtype in Way().dtypes if dtype not in self.way.dtypes]
        refused += [f"a mask of floats (it takes {self.way.mask})"] * bool(self.way.mask)
        refused += ["arrays (it takes lists of rows)"] * self.way.rows
        self.notes += [f"yours refuses {' and '.join(refused)}: {reason}"] * bool(refused)
        self.way = self.way._replace(exact=any("float16" in answer.dtype for answer in answers))

    def expect(self, conventions, case):
        """What ours returns with these conventions, the first innermost; None if it cannot tell."""

        def ours(given):
            results = self.by_name(self.ours(*given.values()))
            return {name: np.asarray(x) for name, x in results.items()}

        for one in conventions:
            ours = partial(one.change, ours)
        return ours(case.arguments)

    def compare_all(self, conventions, pairs):
        loose = LOOSE * any("deviations" in one.words for one in conventions)
        return [compare(x, self.expect(conventions, x), answer, loose) for x, answer in pairs]

    def clips(self):
        """The clips that yours shows when asked for numbers far beyond any limit."""
        for words, estimator, change, usual in CLIPS.get(self.name, []):
            far = []
            for given in (probe(-1000, estimator), probe(1000, estimator)):
                given = {name: given[name] for name in self.kinds}
                found = self.ask(Case(given, self.kinds, self.way.dtypes[0])).found
                far.append(np.append(found.get(self.results[0], []), np.nan)[0])
            low, high = np.round(np.log(np.abs(far)) if self.name == "ppo_loss" else far, 4)
            low = -low if low == high else low  # k3 is positive on both sides
            if min(abs(low), abs(high)) < 900:
                limits = f"+-{high:g}" if low == -high else f"[{low:g}, {high:g}]"
                who = f", as in {usual}" if usual and limits == "+-10" else ""
                change = partial(change, limits=(low, high))
                yield Convention(f"{words} clipped to {limits}{who}", change)

    def constant_factor(self, conventions, pairs):
        """The factor by which most losses differ, as a convention in a list, or an empty list."""
        factors = {}
        for case, answer in pairs:
            loss, expected = answer.found.get("loss"), self.expect(conventions, case)["loss"]
            if np.shape(loss) == () and loss and abs(expected) > 1e-3:
                factors.setdefault(f"{loss / expected:.4g}", []).append(loss / expected)
        words, alike = max(factors.items(), key=lambda x: len(x[1]), default=("1", []))
        if words == "1" or not 0 < float(words) < math.inf or len(alike) < len(pairs) / 10:
            return []
        factor = np.median(alike)
        usual = words == "0.5" and self.name.endswith("value_loss")
        words = f"the factor {words}" + ", as in TRL, OpenRLHF and verl" * usual
        return [Convention(words, partial(scaled, factor=factor))]

    def combinations(self, pairs):
        """No convention, one, or two, the first inside the second."""
        fixed = KNOWN.get(self.name, [])
        known = [Convention(words, partial(x, **how)) for words, x, how in fixed] + [*self.clips()]
        options = [(), *((one,) for one in known), *itertools.combinations(known, 2)]
        if "loss" in self.results:
            for few in options[: len(known) + 1]:
                options += [(*few, one) for one in self.constant_factor(few, pairs)]
        return sorted(options, key=len)

    def nearest(self, pairs):
        """The conventions that agree on most cases; each has to earn its place."""
        few, costs = pairs[:80], {}
        for conventions in self.combinations(few):
            outcomes = self.compare_all(conventions, few)
            if agree(outcomes) and agree(outcomes := self.compare_all(conventions, pairs)):
                return conventions, outcomes
            price = sum(-0.1 if one.words == SMALL else len(few) / 20 for one in conventions)
            costs[conventions] = sum(bool(outcome.kind) for outcome in outcomes) + price
        best = min(costs, key=costs.get)
        return best, self.compare_all(best, pairs)

    def named_mistake(self, conventions, pairs):
        """What explains all differences, in words, and the conventions that are beside it."""
        names = {*self.kinds, *self.results}
        known = [Convention(words, change) for needs, words, change in MISTAKES if needs <= names]
        for order in list(itertools.permutations(self.results))[1:] * ("gradients" not in names):
            words = f"they agree if you return {', '.join(order)}: swapped?"
            known.append(Convention(words, partial(reordered, order=order)))
        for mistake, some in itertools.product(known, ((), conventions)):
            if agree(self.compare_all((*some, mistake), pairs)):
                return [mistake.words], some
        return [], conventions

    def add_example(self, title, conventions, pairs, outcomes, remarks):
        """Keep the smallest input on which they differ."""

        def fits(case):
            valid = case.valid() and case.dtype in self.way.dtypes
            return valid and self.compare_all(conventions, [(case, self.ask(case))])[0].kind == kind

        def shrink(case):
            smaller = next(filter(fits, case.simpler()), None)
            return shrink(smaller) if smaller else case

        differing = [(case, x.kind) for (case, _), x in zip(pairs, outcomes) if x.kind]
        differing.sort(key=lambda x: (KINDS.index(x[1]), x[0].largest > 10, x[0].complexity()))
        kind = differing[0][1]
        found = [shrink(case) for case, other in differing[:3] if other == kind]
        case = min(found, key=Case.complexity)
        (outcome,) = self.compare_all(conventions, [(case, self.ask(case))])
        title = title.format(outcome.part or "answer")
        self.examples.append((title, case, conventions, [outcome.words, *remarks]))

    def judge(self, count):
        """Compare on so many inputs. Returns the verdict; sets agrees, notes and examples."""
        self.find_way()
        asked = [(case, self.ask(case)) for case in self.cases(count)]
        pairs = [pair for pair in asked if pair[1].problem != REFUSED]
        if not pairs:
            return f"not compared: {REFUSED}"
        self.agrees = False
        if any(not same(self.ask(case).found, answer.found) for case, answer in pairs[29::-1]):
            return "DIFFERS from one call to the next, on the same input"
        conventions, outcomes = self.nearest(pairs)
        self.agrees = agree(outcomes)
        self.add_notes(pairs, outcomes)
        if self.agrees:
            self.ask_more(conventions, [case for case, _ in pairs])
            words = "; and ".join(one.words for one in conventions)
            return "agrees" + f", but for: {words}" * bool(words) + f" ({reach(pairs, outcomes)})"
        mistake, conventions = self.named_mistake(conventions, pairs)
        outcomes = self.compare_all(conventions, pairs)
        apart = "; and ".join(one.words for one in conventions if one.words != SMALL)
        title = f"apart from {apart}, they still differ here" if apart else "they differ here"
        self.add_example(title, conventions, pairs, outcomes, mistake or peculiar(pairs, outcomes))
        return "DIFFERS"

    def ask_more(self, conventions, cases):
        """Ask of a function that agrees what counts with --strict only."""
        rng = np.random.default_rng(0)
        junk, holed = [], []
        for case in [x for x in cases if not x.real.all()][:100]:
            junk.append(case.at_padding(rng.choice([np.nan, np.inf, -np.inf], case.real.shape)))
            mask = 1.0 * (rng.random(case.real.shape) < 0.6)
            mask[:, 0] = 1
            holed.append(case.but(mask=mask))
        for title, changed in (
            ("NaN or infinity at padding reaches your {}", junk),
            ("where the mask has a hole, they differ in {}", holed),
        ):
            pairs = [(case, self.ask(case)) for case in changed]
            outcomes = self.compare_all(conventions, pairs)
            if any(outcome.kind for outcome in outcomes):
                self.add_example(title, conventions, pairs, outcomes, [])
                self.notes.append(self.examples[-1][0])

    def add_notes(self, pairs, outcomes):
        """Note what is not there in yours, not compared, overwritten, or left at padding."""
        for name, kind in self.kinds.items():
            there = [case.arguments[name] for case, _ in pairs]
            missing = [str(x) for x in CHOICES.get(kind, []) if x not in there]
            self.notes += [f"{name} {', '.join(missing)}: not there in yours"] * bool(missing)
        found = " ".join(pairs[0][1].found)
        missing = [part for part in self.results if part not in found]
        self.notes += [f"not compared: {', '.join(missing)}"] * bool(missing and found)
        names = ", ".join(sorted(self.overwritten))
        self.notes += [f"yours overwrites its argument {names}"] * bool(names)
        self.notes += ["at padding yours is not 0"] * any(x.padding for x in outcomes)

    def show(self, title, case, conventions, remarks):
        """Print a smallest input, what both make of it side by side, and the remarks."""
        say(f"{self.name}: {title}:", 0, 2)
        for name, x in case.arguments.items():
            dtype = self.way.mask if self.way.mask and name == "mask" else case.dtype
            say(f"{name} = {literal(x, dtype)}", 4, 8)
        both = self.expect(conventions, case) or self.expect((), case), self.ask(case).found
        parts = [part for part in both[0] if part in both[1]]
        label = max(map(len, parts), default=0) + 2
        width = 35 - label // 2
        changed = any(one.words != SMALL for one in conventions)
        rows = [("", "ours, with that" if changed else "ours", "yours")] * bool(parts)
        for part in parts:
            rows.append((part, *(np.array2string(x[part] + 0.0, width, 4, True) for x in both)))
        middle = max((len(line) for _, ours, _ in rows for line in ours.splitlines()), default=0)
        print()
        for row in rows:
            for name, left, right in itertools.zip_longest(*map(str.splitlines, row), fillvalue=""):
                print(f"    {name:<{label}}{left:<{middle + 3}}{right}".rstrip())
        print()
        for remark in remarks:
            say(remark, 4, 6)


def peculiar(pairs, outcomes):
    """What all cases that differ have in common and ten that agree have not, in words."""
    told = [(case.facts(), bool(x.kind)) for (case, _), x in zip(pairs, outcomes) if x.told]
    sentences = []
    for sentence in told[0][0]:
        others = [differs for facts, differs in told if not facts[sentence]]
        sentences += [sentence] * (len(others) >= 10 and not any(others))
    worst = max(x.error if x.kind == "numbers" else 1 for x in outcomes if x.kind)
    small = ["all differences are below 1 %: is half precision used inside?"] * bool(worst < 0.01)
    return sentences[:1] + small


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


def say(text, first, rest):
    print(textwrap.fill(text, 80, initial_indent=" " * first, subsequent_indent=" " * rest))


def literal(x, dtype):
    """An argument as Python source, in one line."""
    if isinstance(x, dict):
        return "{" + ", ".join(f'"{key}": {literal(part, dtype)}' for key, part in x.items()) + "}"
    if not isinstance(x, np.ndarray):
        return repr(x)
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


def find_functions(path, pairs):
    """What can be compared; your file may import those beside it. Raises ValueError in words."""
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module = runpy.run_path(str(path), run_name="yours")
    except (Exception, SystemExit) as problem:
        raise ValueError(f"{path} cannot be imported: {last_line(problem)}") from None
    found = {name: module[name] for name in COMPARED if name in module}
    for pair in pairs:
        ours, _, theirs = pair.partition("=")
        if ours not in COMPARED:
            raise ValueError(f"--map {pair}: there is no {ours!r} here")
        try:
            found[ours] = look_up(module, theirs)
        except (AttributeError, TypeError) as problem:
            raise ValueError(f"--map {pair}: {problem}") from None
    yours = {name: x for name, x in found.items() if x is not getattr(loop, name, None)}
    if not yours:
        raise ValueError(f"{path} defines none of {', '.join(COMPARED)}: say --map OURS=YOURS")
    return [Comparison(name, x) for name, x in yours.items()]


def report(comparisons, options):
    """Print a summary, then the examples. Returns the exit code."""
    for one in comparisons:
        say(f"  {one.name:<19}{one.judge(options.cases)}", 0, 21)
        for note in one.notes:
            say(note, 21, 23)
    for one in comparisons:
        for example in one.examples:
            print()
            one.show(*example)
    compared = [one for one in comparisons if one.agrees is not None]
    bad = any(not one.agrees or (options.strict and one.examples) for one in compared)
    return 1 if bad else 0 if compared else 2


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("module", type=Path, help="your file")
    add("--map", action="append", default=[], metavar="OURS=YOURS", help="your name for a function")
    add("--cases", type=int, default=300, help="random inputs for each function (default 300)")
    add("--strict", action="store_true", help="NaN at padding and holes in masks count too")
    options = parser.parse_args(argv)
    try:
        if options.cases < 1:
            raise ValueError(f"--cases {options.cases}: at least 1")
        comparisons = find_functions(options.module, options.map)
    except ValueError as problem:
        print(f"compare.py: {problem}", file=sys.stderr)
        return 2
    print(f"{options.module.name} beside {Path(loop.__file__).name}")
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # an overflow shows in the answers
        warnings.simplefilter("ignore")
        return report(comparisons, options)


if __name__ == "__main__":
    sys.exit(main())
