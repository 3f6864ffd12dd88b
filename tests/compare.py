"""Your PPO functions beside ours on random inputs, and the smallest input on which they differ.

    python tests/compare.py my_ppo.py
    python tests/compare.py my_ppo.py --map gae=compute_advantages --map whiten=masked_whiten

Every function of the table below that my_ppo.py defines, under our name or one given by --map, is called as ours is:
the same arguments in the same order. They are NumPy arrays, or torch tensors if my_ppo.py imports torch. Either may
come back, or what np.asarray understands; of several results the first are enough, and None is not compared.
Masks are 1s and then 0s, and padding holds junk. A known difference of convention counts as agreeing, and is said.
The same file gets the same report. Exit code: 0 where all agree, 1 where one differs, 2 for nothing to compare.
"""

import argparse
import importlib.machinery
import importlib.util
import inspect
import math
import sys
import textwrap
import traceback
import warnings
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, NoSuchExample

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
loop = importlib.import_module("rlhf_loop_pseudo")

# What is compared: our function, the kinds of its arguments (made in cases), the names of its results. "moderate" is
# "numbers" without the extreme ones, which cancel in gradients and leave nothing of float32
COMPARED = {
    "score_responses": ("reward_model prompts responses mask", "scores"),
    "token_logprobs": ("actor prompts responses", "logprobs"),
    "kl_penalty": ("logprobs logprobs estimator", "kl"),
    "shape_rewards": ("scores logprobs mask beta", "rewards"),
    "critic_values": ("critic prompts responses", "values"),
    "gae": ("numbers numbers mask discount discount", "advantages returns"),
    "group_advantages": ("numbers mask group_size method", "advantages"),
    "whiten": ("numbers mask", "whitened"),
    "ppo_loss": ("logprobs logprobs numbers mask clip", "loss d_new_logprobs ratio"),
    "value_loss": ("numbers numbers mask", "loss d_values"),
    "actor_gradients": ("actor prompts responses moderate moderate mask clip", "gradients loss ratio"),
    "critic_gradients": ("critic prompts responses moderate mask", "gradients loss"),
    "adam_step": ("weights weights weights learning_rate", "params"),
    "human_scores": ("responses mask vocab_size", "scores"),
    "preference_loss": ("scores scores", "loss d_chosen d_rejected"),
    "reward_gradients": ("critic prompts responses mask_of_pairs", "gradients loss"),
}
# A share of the largest number in play: above rounding, and above what an epsilon of 1e-8 in a denominator does
TOLERANCE = {"float64": 1e-7, "float32": 1e-4}

# ------------------------------------------------------------------ random arguments
# Round numbers come first, because hypothesis shrinks towards what comes first.

ODD = [n / 1000 for n in range(-2999, 3000, 97)]
NUMBERS = [0, 1, -1, 2, -2, 0.5, *ODD]
LOGPROBS = [0, -1, -2, -0.5, *(-abs(x) for x in ODD)]
CHOICES = {
    "estimator": ["k1", "k2", "k3"],
    "method": ["rloo", "grpo"],
    "beta": [1.0, 0.0, 0.1],
    "discount": [1.0, 0.0, 0.9],
    "clip": [0.2, 0.1],
    "learning_rate": [1.0, 0.1],
}


@st.composite
def cases(draw, kinds):
    """The arguments of one call: few rows, few tokens, and in one case of three extreme numbers among them."""
    dtype = draw(st.sampled_from([np.float64, np.float32]))
    vocab_size = 27 if "vocab_size" in kinds else draw(st.integers(2, 4))  # 27: the human reads letters
    width, prompt_length, length = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    group_size = draw(st.integers(2, 3)) if "group_size" in kinds else 2 if "mask_of_pairs" in kinds else 1
    extreme = draw(st.sampled_from([0, 0, 30]))
    moderate = st.sampled_from(NUMBERS)
    numbers = st.sampled_from(NUMBERS + extreme * [1000, -1000])
    logprobs = st.sampled_from(LOGPROBS + extreme * [-30])
    tokens = st.integers(0, vocab_size - 2)

    # a column for each argument of (B, T), drawn row by row so that hypothesis can take out a row
    columns = {"numbers": numbers, "moderate": moderate, "scores": numbers, "weights": numbers}
    columns |= {"logprobs": logprobs, "prompts": tokens, "responses": tokens}
    table, ends = [], []
    for _ in range(group_size * draw(st.integers(1, 3))):
        ends.append([draw(st.integers(0, length))])  # where the end token stands, if it comes at all
        table.append([[draw(columns[kind]) for kind in kinds if kind in columns] for _ in range(length)])
    column = iter(np.moveaxis(np.array(table), 2, 0))
    positions = np.arange(length)
    mask = (positions <= ends).astype(dtype)

    def model(**shapes):
        weights = {"head": st.sampled_from(NUMBERS + extreme * [50, -50])}  # elsewhere they only saturate tanh
        return {
            name: np.array([draw(weights.get(name, moderate)) for _ in range(math.prod(shape))], dtype).reshape(shape)
            for name, shape in {"embed": (vocab_size, width), "mix": (width, width), **shapes}.items()
        }

    make = {
        "numbers": lambda: next(column).astype(dtype),
        "moderate": lambda: next(column).astype(dtype),
        "logprobs": lambda: next(column).astype(dtype),
        "scores": lambda: next(column)[:, 0].astype(dtype),
        "weights": lambda: {"w": next(column).astype(dtype)},
        "prompts": lambda: next(column)[:, :prompt_length].astype(int),
        "responses": lambda: np.where(positions == ends, vocab_size - 1, next(column)).astype(int),
        "mask": lambda: mask,
        "mask_of_pairs": lambda: mask,
        "actor": lambda: model(head=(width, vocab_size)),
        "critic": lambda: model(head=(width, 1)),
        "reward_model": lambda: model(head=(width, 1), bias=(1,)),
        "group_size": lambda: group_size,
        "vocab_size": lambda: vocab_size,
    }
    return [make[kind]() if kind in make else draw(st.sampled_from(CHOICES[kind])) for kind in kinds]


# ------------------------------------------------------------------ known differences of convention
# Ours with one convention changed; None where an epsilon would show.

LITTLE = 0.3  # a deviation beside which every usual epsilon is small


def whiten(x, mask, ddof):
    centered = np.where(mask, x - x[mask > 0].mean(), 0)
    variance = (centered**2).sum() / max(1, np.count_nonzero(mask) - ddof)
    return centered / np.sqrt(variance + 1e-8) if variance > LITTLE**2 else None


def whitened_gae(rewards, values, mask, gamma, lam, ddof):
    advantages, returns = loop.gae(rewards, values, mask, gamma, lam)
    whitened = whiten(advantages, mask, ddof)
    return None if whitened is None else (whitened, returns)


def grpo(rewards, mask, group_size, method, ddof):
    if method != "grpo":
        return loop.group_advantages(rewards, mask, group_size, method)
    totals = np.where(mask, rewards, 0).sum(axis=1).reshape(-1, group_size)
    centered, deviation = totals - totals.mean(axis=1, keepdims=True), totals.std(axis=1, keepdims=True, ddof=ddof)
    advantages = (centered / (deviation + 1e-6)).reshape(-1, 1)
    return np.where(mask, advantages, 0) if deviation.min() > LITTLE else None


def score_after_end(scores, kl, mask, beta, padding):
    rewards = -beta * np.where(mask, kl, padding * kl)
    rewards[np.arange(len(mask)), np.minimum(np.count_nonzero(mask, axis=1), mask.shape[1] - 1)] += scores
    return rewards


def capped_kl(logprobs, ref_logprobs, estimator, capped):
    kl = loop.kl_penalty(logprobs, ref_logprobs, estimator)
    return kl.clip(-10, 10) if estimator in capped else kl


def clamped(new_logprobs, old_logprobs, advantages, mask, clip, highest=math.inf):
    log_ratio = new_logprobs - old_logprobs
    clamped = log_ratio.clip(-20, 20)
    # a loss of at most highest * -A where A < 0 is a log ratio of at most log(highest) there
    used = np.where(advantages < 0, clamped.clip(None, math.log(highest)), clamped)
    loss, d_loss, _ = loop.ppo_loss(used, np.zeros_like(used), advantages, mask, clip)
    return loss, np.where(used == log_ratio, d_loss, 0), np.where(mask, np.exp(clamped), 0)


AFTER_END = "the score on the position after the last token where there is one, as in TRL"
CLAMPED = "a log ratio clamped to +-20, as in OpenRLHF and verl"
SMALL = f"deviations below {LITTLE}, where epsilons and rounding show"
BY_N = f"a variance divided by n, as in OpenRLHF and np.std, and {SMALL}"
WHITENED = "advantages already whitened, as in verl"
KNOWN = {
    "kl_penalty": {
        "k3 clamped to +-10, as in verl": partial(capped_kl, capped=["k3"]),
        "estimates clamped to +-10, as in OpenRLHF": partial(capped_kl, capped=["k1", "k2", "k3"]),
    },
    "shape_rewards": {
        AFTER_END: partial(score_after_end, padding=0),
        f"{AFTER_END}, and KL at padding": partial(score_after_end, padding=1),
        "scores clipped to +-10, as in OpenRLHF": lambda x, *others: loop.shape_rewards(x.clip(-10, 10), *others),
    },
    "gae": {
        f"{WHITENED}, and {SMALL}": partial(whitened_gae, ddof=1),
        f"{WHITENED}, with {BY_N}": partial(whitened_gae, ddof=0),
    },
    "group_advantages": {SMALL: partial(grpo, ddof=1), BY_N: partial(grpo, ddof=0)},
    "whiten": {SMALL: partial(whiten, ddof=1), BY_N: partial(whiten, ddof=0)},
    "ppo_loss": {CLAMPED: clamped, f"{CLAMPED}, and to log 3 where A < 0": partial(clamped, highest=3)},
    "value_loss": {
        "the factor 0.5, as in TRL, OpenRLHF and verl": lambda *x: tuple(y / 2 for y in loop.value_loss(*x)),
    },
}
KNOWN_TOLERANCE = 1e-3  # they come with other epsilons

# ------------------------------------------------------------------ one call


class Differ(Exception):
    """What differs first, in words; our results; yours."""


def two_updates(adam_step):
    """adam_step returns nothing and changes its arguments: what two calls make of params."""

    def updated(params, gradients, next_gradients, learning_rate):
        state = {}
        adam_step(params, gradients, state, learning_rate)
        adam_step(params, next_gradients, state, learning_rate)
        return params

    return updated


def copied(x, copy=np.copy):
    """An argument, its arrays copied."""
    if isinstance(x, dict):
        return {key: copied(part, copy) for key, part in x.items()}
    return copy(x) if isinstance(x, np.ndarray) else x


def for_yours(array):
    """What your function gets in place of an array."""
    return sys.modules["torch"].tensor(array) if "torch" in sys.modules else array.copy()


def by_name(names, values):
    """Values as {name: array of floats}, the parts of a dict as 'gradients["mix"]'; None and text left out."""
    arrays = {}
    for name, x in zip(names, values):
        if isinstance(x, dict):
            arrays |= by_name([f'{name}["{key}"]' for key in x], x.values())
        elif x is not None and not isinstance(x, str):
            x = x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)
            arrays[name] = x if x.dtype.kind == "f" else x.astype(float)
    return arrays


def compare(name, ours, yours, arguments, tolerance=0, padding=True):
    """Call both. Returns (precision, error, results not compared), error as a share of the largest number in play.

    None where ours cannot tell. Raises Differ. Without padding, yours may hold anything there where ours is 0.
    """
    kinds, results = (words.split() for words in COMPARED[name])
    answer = ours(*[copied(x) for x in arguments])
    if answer is None:
        return None
    expected, found = by_name(results, answer if isinstance(answer, tuple) else [answer]), {}
    try:
        answer = yours(*[copied(x, for_yours) for x in arguments])
        found = by_name(results, answer if isinstance(answer, tuple) else [answer])
    except Exception as problem:
        raise Differ(f"yours raises {last_line(problem)}", expected, found) from None
    compared = [part for part in expected if part in found]
    if not compared:
        raise Differ(f"yours returns none of {', '.join(expected)}", expected, found)
    numbers = [*by_name(map(str, range(len(kinds))), arguments).values(), *expected.values()]
    largest = max(1, *(np.abs(x[np.isfinite(x)]).max(initial=0) for x in numbers))
    precision = "float32" if np.float32 in [x.dtype for x in [*numbers, *found.values()]] else "float64"
    mask, errors = arguments[kinds.index("mask")] if "mask" in kinds else None, []
    for part in compared:
        a, b = expected[part], found[part]
        if a.shape != b.shape:
            raise Differ(f"{part}: the shape of ours is {a.shape}, of yours {b.shape}", expected, found)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if not padding and a.shape == np.shape(mask):
            same |= (mask == 0) & (a == 0)
        error = np.where(same, 0, np.nan_to_num(np.abs(a - b), nan=math.inf)) / largest
        for place in np.argwhere(error > max(TOLERANCE[precision], tolerance))[:1]:
            axes = ("row", "column" if "[" in part else "token")
            where = "".join(f", {axis} {i}" for axis, i in zip(axes, place))
            a, b = a[tuple(place)], b[tuple(place)]
            raise Differ(f"first in {part}{where}: ours {a}, yours {b}", expected, found)
        errors.append(error.max())
    return precision, max(errors), [part for part in expected if part not in found]


def last_line(problem):
    return traceback.format_exception_only(problem)[-1].strip()


# ------------------------------------------------------------------ several hundred calls


def search(name, ours, yours, count, shrink=False, junk=True, **how):
    """Look for a case in which they differ. Returns it, or None, and what compare returned for the others."""
    kinds, returned = COMPARED[name][0].split(), []

    def differ(arguments):
        try:
            returned.append(compare(name, ours, yours, arguments if junk else without_junk(kinds, arguments), **how))
        except Differ:
            return True
        return False

    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    rules = settings(max_examples=count, derandomize=True, database=None, phases=phases, deadline=None)
    try:
        case = find(cases(kinds), differ, settings=rules)
    except NoSuchExample:
        case = None
    return case, [each for each in returned if each]


def without_junk(kinds, arguments):
    """The arguments with 0 at padding."""
    real = arguments[kinds.index("mask")] > 0 if "mask" in kinds else np.zeros(0)
    return [x * real.astype(x.dtype) if np.shape(x) == real.shape else x for x in arguments]


def agreement(name, ours, yours, count, junk=True):
    """How they agree, in words; None where they do not."""
    for known, changed in {"": ours, **KNOWN.get(name, {})}.items():
        for padding in (True, False):
            tolerance = KNOWN_TOLERANCE if known else 0
            case, returned = search(name, changed, yours, count, junk=junk, tolerance=tolerance, padding=padding)
            if case is None and returned:
                return (
                    f"agrees to {digits(returned)} ({len(returned)} cases)"
                    + f", but for {known}" * bool(known)
                    + "; padding is not 0" * (not padding)
                    + f"; not compared: {', '.join(returned[0][2])}" * bool(returned[0][2])
                )
    return None


def digits(returned):
    """To how many digits all cases agree, in words."""
    least = {}
    for precision, error, _ in returned:
        each = math.floor(-math.log10(error + np.finfo(precision).eps))
        least[precision] = min(each, least.get(precision, each))
    words = [f"{least[precision]} in {precision}" for precision in ("float64", "float32") if precision in least]
    return ", ".join(words).replace(" in", " digits in", 1)


# ------------------------------------------------------------------ the report


def literal(x):
    """An argument as Python source, in one line."""
    if isinstance(x, dict):
        return "{" + ", ".join(f'"{key}": {literal(part)}' for key, part in x.items()) + "}"
    return "np." + " ".join(repr(x).replace("dtype=", "dtype=np.").split()) if np.ndim(x) else repr(x)


def say(text, indent):
    """Print a line, wrapped where it is longer than a terminal."""
    rules = {"subsequent_indent": " " * indent, "break_long_words": False, "break_on_hyphens": False}
    print(*textwrap.wrap(text, 80, **rules), sep="\n")


def report(name, yours, count):
    """Print what there is to say about one function. Returns whether they agree."""
    ours = getattr(loop, name)
    if name == "adam_step":
        ours, yours = two_updates(ours), two_updates(yours)
    try:
        words = agreement(name, ours, yours, count)
        case = None if words else search(name, ours, yours, count, shrink=True, padding=False)[0]
        clean = case and agreement(name, ours, yours, count, junk=False)
    except Flaky:  # hypothesis's word for another answer to the same input
        words, case = None, None
    if not case:
        say(f"  {name:<17} {words or 'DIFFERS from one call to the next, on the same input'}", 20)
        return words is not None
    print(f"  {name:<17} DIFFERS\n    smallest input:")
    for parameter, x in zip(inspect.signature(ours).parameters, case):
        say(f"      {parameter} = {literal(x)}", 8)
    try:
        compare(name, ours, yours, case, padding=False)
    except Differ as difference:
        words, expected, found = difference.args
        print(f"{'':<24}{'ours':<28}yours")
        for part in expected:
            sides = [str(side[part].round(4) + 0.0) if part in side else "-" for side in (expected, found)]
            for line in zip_longest([f"    {part}"], *map(str.splitlines, sides), fillvalue=""):
                print("{:<23} {:<27} {}".format(*line).rstrip())
        say(f"    {words}", 6)
    if clean:
        print("    with 0 at padding they agree: yours reads what stands there")
    return False


def load(path):
    """Import a file; it may import the files beside it."""
    sys.path.insert(0, str(path.resolve().parent))
    loader = importlib.machinery.SourceFileLoader("yours", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("yours", loader))
    sys.modules["yours"] = module  # a dataclass looks for its module there
    loader.exec_module(module)
    return module


def complain(sentence):
    print(f"compare.py: {sentence}", file=sys.stderr)
    return 2


def main(argv=None):
    """Compare all that can be compared. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path, help="your file")
    parser.add_argument("--map", action="append", default=[], metavar="OURS=YOURS", help="your name for a function")
    parser.add_argument("--cases", type=int, default=300, help="random inputs for each function (default 300)")
    options = parser.parse_args(argv)
    if options.cases < 1:
        return complain(f"--cases {options.cases}: at least 1")
    try:
        module = load(options.module)
    except (Exception, SystemExit) as problem:
        return complain(f"{options.module} cannot be imported: {last_line(problem)}")
    functions = {name: getattr(module, name) for name in COMPARED if hasattr(module, name)}
    for pair in options.map:
        ours, _, theirs = pair.partition("=")
        if ours not in COMPARED or not hasattr(module, theirs):
            return complain(f"--map {pair}: there is no {ours!r} here or no {theirs!r} in {options.module}")
        functions[ours] = getattr(module, theirs)
    functions = {name: yours for name, yours in functions.items() if yours is not getattr(loop, name)}
    if not functions:
        return complain(f"{options.module} defines none of {', '.join(COMPARED)}: say --map OURS=YOURS")
    print(f"{options.module.name} beside {Path(loop.__file__).name}")
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # an overflow shows in the answers
        warnings.simplefilter("ignore")
        agree = [report(name, yours, options.cases) for name, yours in functions.items()]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
