"""Inputs for compare.py: random ones, and the smallest one on which something can be seen."""

import itertools
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

import rlhf_loop_pseudo as loop

# The kinds of arguments. "small" is "numbers" without the extreme ones, which cancel in gradients.
FLOATS_BY_TOKEN = ("numbers", "small", "logprobs")
BY_TOKEN = (*FLOATS_BY_TOKEN, "mask", "pair_mask", "responses", "logits")
BY_ROW = (*BY_TOKEN, "prompts", "scores")
CHOICES = {  # settings, and their values: the simplest first
    "estimator": ["k1", "k2", "k3"],
    "beta": [1.0, 0.0, 0.1],
    "discount": [1.0, 0.0, 0.9, 0.5, 0.97],
    "clip": [0.2, 0.1, 0.3, 0.4],
    "learning_rate": [1.0, 0.1],
}
SIMPLE = [0, 1, -1, 2, -2, 0.5]  # the simplest first
ODD = [n / 1000 for n in range(-2999, 3000, 97)]
EIGHTHS = [n / 8 for n in range(-24, 25)]  # half precision holds these exactly
EXTREME = {"numbers": [1000, -1000], "scores": [1000, -1000], "logprobs": [-30], "head": [50, -50]}
LONG = 200  # tokens in one case of fifty: whatever works in chunks needs more than one


@dataclass(frozen=True)
class Case:
    """The arguments of one call in float64 (yours gets them in dtype), and their kinds."""

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

    def of_kinds(self, kinds):
        return {name: x for name, x in self.arguments.items() if self.kinds[name] in kinds}

    def at_padding(self, junk):
        """The case with junk, a number or an array, at padding."""
        floats = self.of_kinds(FLOATS_BY_TOKEN)
        return self.but(**{name: np.where(self.real, x, junk) for name, x in floats.items()})

    def size(self, axis, kinds):
        return max((x.shape[axis] for x in self.of_kinds(kinds).values()), default=0)

    def without(self, axis, kinds, indices):
        """The case without some rows, tokens or tokens of the prompt; at least one stays."""
        concerned = self.of_kinds(kinds)
        if len(set(indices)) >= self.size(axis, kinds) or max(indices) >= self.size(axis, kinds):
            return self
        return self.but(**{name: np.delete(x, indices, axis) for name, x in concerned.items()})

    def with_number(self, number, position, place):
        """The case with another number at a place of its array at that position."""
        arguments = {
            name: {key: part.copy() for key, part in x.items()} if isinstance(x, dict) else x
            for name, x in self.arguments.items()
        }
        arguments |= {n: x.copy() for n, x in arguments.items() if isinstance(x, np.ndarray)}
        changed = self.but(**arguments)
        list(changed.arrays())[position][1][place] = number
        return changed

    def complexity(self):
        """What the smallest input has least of: numbers, padding, numbers that are not 0."""
        arrays = [x for name, x in self.arrays() if name != "mask"]
        numbers, padding = sum(x.size for x in arrays), np.count_nonzero(~self.real)
        return self.size(0, BY_ROW), numbers, padding, sum(map(np.count_nonzero, arrays))


def row_groups(case):
    """The rows that are only taken away together: a group, or a chosen and a rejected one."""
    rows = np.arange(case.size(0, BY_ROW)).reshape(-1, case.arguments.get("group_size", 1))
    return rows.reshape(2, -1).T if "pair_mask" in case.kinds.values() else rows


def shorter(case):
    """Steps that take away halves, quarters, ..., single rows and tokens, the last ones first."""
    tokens = np.arange(case.size(1, BY_TOKEN))[:, None]
    prompt = np.arange(case.size(1, ["prompts"]))[:, None]
    for axis, kinds, units in (
        (0, BY_ROW, row_groups(case)),
        (1, BY_TOKEN, tokens),
        (1, ["prompts"], prompt),
    ):
        count = len(units)
        while count > 1:
            count = (count + 1) // 2
            for start in reversed(range(0, len(units), count)):
                indices = units[start : start + count].ravel()
                yield partial(Case.without, axis=axis, kinds=kinds, indices=indices)
            if count == 1:
                break


def simpler_settings(case):
    """Steps to float64, and to the simplest value of each setting."""
    if case.dtype == "float32":
        yield partial(replace, dtype="float64")
    for name, kind in case.kinds.items():
        simpler = itertools.takewhile(case.arguments[name].__ne__, CHOICES.get(kind, []))
        for x in reversed(list(simpler)):  # the simplest last: what fits in the end stays
            yield partial(Case.but, **{name: x})


def simpler_numbers(case):
    """Steps to 0 everywhere in an array, then number by number."""
    for position, (name, array) in enumerate(case.arrays()):
        kind = case.kinds[name]
        if array.any() and not kind.endswith("mask"):
            yield partial(Case.with_number, number=0, position=position, place=...)
    for position, (name, array) in enumerate(case.arrays()):
        for place in np.ndindex(array.shape):
            for number in simpler_than(array[place], case.kinds[name], array.dtype.kind == "i"):
                yield partial(Case.with_number, number=number, position=position, place=place)


def simpler_than(value, kind, token):
    """Numbers simpler than this one, the simplest last: what fits in the end stays."""
    pool = [-abs(x) for x in SIMPLE] if kind == "logprobs" else SIMPLE
    if kind.endswith("mask"):
        pool = [1]
    elif token:
        pool = range(value)
    elif np.isinf(value):
        pool = [*pool, np.nan]
    elif np.isfinite(value):
        pool = [*pool, np.round(value)]
    return list(itertools.takewhile(value.__ne__, pool))[::-1]


def smallest(case, fits):
    """The case made as small and simple as can be while fits(case) holds."""
    before = None
    while case is not before:
        before = case
        for steps in (shorter, simpler_settings, simpler_numbers):
            for step in steps(case):
                changed = step(case)
                if changed is not case and fits(changed):
                    case = changed
    return case


def random_case(rng, kinds, dtypes, exact=False, long=False):
    """Few rows, few tokens; extreme numbers in one case of three. exact: half precision holds it"""
    length = int(rng.integers(6, 13) if rng.random() < 0.1 else rng.integers(1, 6))
    group_size = int(rng.integers(2, 4)) if "group_size" in kinds.values() else 1
    rows = group_size * int(rng.integers(1, 4)) * (2 if "pair_mask" in kinds.values() else 1)
    letters = "vocab_size" in kinds.values()
    end = 26 if letters else int(rng.integers(1, 4))  # the last token
    width, prompt_length = (int(x) for x in rng.integers(1, 3, 2))
    full = rng.random() < 0.3
    if long:
        length, full = LONG, True
    ends = rng.integers(length if full else 0, length + 1, (rows, 1))
    mask, ended = 1.0 * (np.arange(length) <= ends), np.arange(length) == ends
    junk = rng.random() < 0.5 or "mask" not in kinds.values()
    extreme = rng.random() < 1 / 3 and not exact and not long
    level = rng.random() < 0.1  # a group without spread is nothing rare
    in_prompt = end + (rng.random() < 0.25 and not letters)  # the end token may stand there too

    def numbers(kind, *shape):
        pool = SIMPLE * 4 + (EIGHTHS if exact else ODD) + EXTREME.get(kind, []) * 15 * extreme
        x = np.full(shape, rng.choice(pool)) if level else rng.choice(np.array(pool), shape)
        return -abs(x) if kind == "logprobs" else x

    def model(outputs, **more):
        ours = loop.init_model(rng, end + 1, width, outputs)
        shapes = {name: weights.shape for name, weights in ours.items()} | more
        return {name: numbers(name, *shape) for name, shape in shapes.items()}

    make = {
        "mask": lambda: mask,
        "pair_mask": lambda: mask,
        "scores": lambda: numbers("scores", rows),
        "prompts": lambda: rng.integers(0, in_prompt, (rows, prompt_length)),
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
    return Case(arguments, kinds, dtypes[rng.integers(len(dtypes))])


def random_cases(kinds, dtypes, exact, count):
    rng = np.random.default_rng(0)
    return [random_case(rng, kinds, dtypes, exact, long=i % 50 == 20) for i in range(count)]
