"""How compare.py calls your functions and ours: arguments in your form, results by their names."""

import dataclasses
import inspect
import io
import itertools
import sys
import textwrap
import traceback
from contextlib import redirect_stdout
from functools import partial
from typing import NamedTuple

import numpy as np

import rlhf_loop_pseudo as loop
from compare_cases import BY_TOKEN, CHOICES, Case, random_cases


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


# What is compared: the kinds of our function's arguments (see random_case), names of its results
COMPARED = {
    "score_responses": ("reward_model prompts responses mask", "scores"),
    "token_logprobs": ("actor prompts responses", "logprobs"),
    "logprobs": ("logits responses", "logprobs"),
    "kl_penalty": ("logprobs logprobs estimator", "kl"),
    "shape_rewards": ("scores numbers mask beta", "rewards"),
    "critic_values": ("critic prompts responses", "values"),
    "gae": ("numbers numbers mask discount discount", "advantages returns"),
    "rloo_advantages": ("numbers mask group_size", "advantages"),
    "grpo_advantages": ("numbers mask group_size", "advantages"),
    "whiten": ("numbers mask", "whitened"),
    "ppo_loss": ("logprobs logprobs numbers mask clip", "loss d_new_logprobs ratio"),
    "kl_loss": ("logprobs logprobs mask estimator", "loss d_new_logprobs"),
    "value_loss": ("numbers numbers mask", "loss d_values"),
    "clipped_value_loss": ("numbers numbers numbers mask clip", "loss d_values"),
    "actor_gradients": ("actor prompts responses small small mask clip", "gradients loss ratio"),
    "critic_gradients": ("critic prompts responses small mask", "gradients loss"),
    "adam_step": ("numbers numbers numbers learning_rate", "params"),
    "human_scores": ("prompts responses mask vocab_size", "scores"),
    "preference_loss": ("scores scores", "loss d_chosen d_rejected"),
    "reward_gradients": ("critic prompts responses pair_mask", "gradients loss"),
    "dpo_loss": ("scores scores scores scores beta", "loss d_chosen d_rejected"),
    "dpo_gradients": ("actor logprobs prompts responses pair_mask beta", "gradients loss"),
}
OURS = {"logprobs": logprobs, "clipped_value_loss": clipped_value_loss}
DIMENSIONS = {"loss": 0, "scores": 1}  # of a first result; of all others 2
# What is no difference, as a share of the largest number in play: rounding, and an epsilon of 1e-8
TOLERANCE = {"float64": 1e-7, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
WATCHED = 100  # calls after which it is known which arguments are overwritten
NOT_THERE = (NotImplementedError, ValueError, KeyError, AssertionError)  # for an unknown setting


class Way(NamedTuple):  # how yours wants its arguments
    container: str
    mask: str = "floats"  # or bool, int64
    dtypes: tuple = ("float64", "float32")


class Answer(NamedTuple):
    found: dict  # what yours returned, by name and in float64
    dtype: str  # the coarsest in play
    problem: str = ""
    not_there: bool = False  # the problem may mean that a setting is unknown to yours


class Unreadable(Exception):
    """Results of yours that cannot be told apart."""


# ------------------------------------------------------------------ calling yours


def torch_is_used():
    """Whether your module imports torch, itself or by what it imports."""
    return "torch" in sys.modules


def hand_over(case, way):
    """What yours gets in place of our arguments, by name: always copies."""
    torch = sys.modules.get("torch")

    def convert(x, kind):
        if isinstance(x, dict):
            return {key: convert(part, kind) for key, part in x.items()}
        if not isinstance(x, np.ndarray):
            return x
        dtype = "int64" if x.dtype.kind == "i" else case.dtype
        dtype = way.mask if way.mask != "floats" and kind.endswith("mask") else dtype
        if way.container == "tensors":
            return torch.tensor(x).to(getattr(torch, dtype))
        return x.astype(dtype)

    return {name: convert(x, case.kinds[name]) for name, x in case.arguments.items()}


def flat(results):
    """{name: result}, the parts of a dict as 'gradients["head"]'; without None and text."""
    found = {}
    for name, x in results.items():
        if isinstance(x, dict):
            found |= flat({f'{name}["{key}"]': part for key, part in x.items()})
        elif x is not None and not isinstance(x, str):
            found[name] = x
    return found


def as_array(x, width=0):
    """A result in float64: a number, an array, a tensor, or a list of rows, ragged or not."""
    if isinstance(x, list | tuple):
        rows = [as_array(row) for row in x]
        longest = max((row.size for row in rows if row.ndim == 1), default=0)
        longest = max(longest, width)  # rows may end with their last real token
        return np.array([np.pad(x, (0, longest - len(x))) if x.ndim == 1 else x for x in rows])
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()  # NumPy has no bfloat16
    return np.asarray(x).astype(float)


def depth(x):
    """The number of dimensions of an array, or of lists of lists."""
    if isinstance(x, list | tuple):
        return 1 + (depth(x[0]) if x else 0)
    return len(getattr(x, "shape", ()))


def same(a, b):
    """Whether the arrays of two dicts are equal."""
    a, b = ({name: as_array(x) for name, x in flat(each).items()} for each in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(a[x], b[x], equal_nan=True) for x in a)


def in_words(problem):
    words = " ".join(traceback.format_exception_only(problem)[-1].split())
    return textwrap.shorten(words, 240, placeholder=" ...")


class Function:
    """One of yours beside ours, and how it is called."""

    def __init__(self, name, yours, tick=lambda: None):
        kinds, results = (words.split() for words in COMPARED[name])
        both = OURS.get(name) or getattr(loop, name), yours
        self.ours, self.yours = (
            [partial(two_updates, x) for x in both] if name == "adam_step" else both
        )
        self.name, self.results, self.tick = name, results, tick
        self.kinds = dict(zip(inspect.signature(self.ours).parameters, kinds))
        self.way = Way("tensors" if torch_is_used() else "arrays")
        self.asked, self.overwritten, self.problems = 0, set(), {}
        try:
            parameters = inspect.signature(self.yours).parameters.values()
        except (TypeError, ValueError):  # some callables have no signature
            parameters = []
        by_keyword = [x.name for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY]
        self.by_keyword = [x for x in by_keyword if x in self.kinds]

    def by_name(self, answer):
        """Results by name, all of a dict's parts: they come in our order, or with our names."""
        if hasattr(answer, "_asdict") and set(self.results) & set(answer._fields):
            answer = answer._asdict()
        if dataclasses.is_dataclass(answer):
            answer = vars(answer)
        if isinstance(answer, dict) and set(self.results) & set(answer):
            return flat({name: answer.get(name) for name in self.results})
        if isinstance(answer, dict) and self.results[0] != "gradients":
            keys, names = (", ".join(map(str, x)) for x in (answer, self.results))
            raise Unreadable(f"yours returns a dict with the keys {keys}; ours are {names}")
        if isinstance(answer, list) and len(answer) and self.results[0] != "gradients":
            several = depth(answer[0]) == DIMENSIONS.get(self.results[0], 2)
            answer = tuple(answer) if several else answer
        elif depth(answer) == 3 and not isinstance(answer, tuple):
            answer = tuple(answer)
        return flat(dict(zip(self.results, answer if isinstance(answer, tuple) else [answer])))

    def call(self, given):
        """Call yours. Returns its results by name, with the gradients that it left to autograd."""
        wanted = [name for name in given if f"d_{name}" in self.results]
        leaves = {x: given[x].requires_grad_() for x in wanted if hasattr(given[x], "grad")}
        for name, leaf in leaves.items():
            given[name] = leaf.clone()  # yours may overwrite it, which a leaf does not allow
            given[name].retain_grad()
        rows = [x for x in given if self.way.container == "rows" and self.kinds[x] in BY_TOKEN]
        passed = {name: list(x) if name in rows else x for name, x in given.items()}
        keywords = {name: passed.pop(name) for name in self.by_keyword}
        with redirect_stdout(io.StringIO()):
            results = self.by_name(self.yours(*passed.values(), **keywords))
        differentiable = getattr(results.get("loss"), "requires_grad", False)
        if leaves and differentiable:  # what follows the loss may be other figures, for a log
            shape = next(iter(leaves.values())).shape
            results = {n: x for n, x in results.items() if n == "loss" or np.shape(x) == shape}
        leaves = {name: leaf for name, leaf in leaves.items() if f"d_{name}" not in results}
        not_done = all(leaf.grad is None for leaf in leaves.values())
        if leaves and not_done and differentiable and results["loss"].dim() == 0:
            results["loss"].backward()
        for name, leaf in leaves.items():
            results[f"d_{name}"] = 0 * leaf.detach() if leaf.grad is None else leaf.grad
        return results

    def ask(self, case):
        self.tick()
        given = hand_over(case, self.way)
        try:
            results = self.call(given)
            width = case.real.shape[1]
            found = {name: as_array(x, width) for name, x in results.items()}
        except Unreadable as problem:
            return Answer({}, case.dtype, str(problem))
        except (Exception, SystemExit) as problem:
            not_there = isinstance(problem, NOT_THERE)
            return Answer({}, case.dtype, f"yours raises {in_words(problem)}", not_there)
        advantages = found.get("advantages", np.zeros(0))
        if "group_size" in self.kinds and advantages.size == len(case.real):  # one a response
            found["advantages"] = advantages.reshape(-1, 1) * case.real
        firsts = [x[0] if isinstance(x, list) and x else x for x in results.values()]
        dtypes = [str(getattr(x, "dtype", "")).removeprefix("torch.") for x in firsts]
        dtypes = [case.dtype, *(dtype for dtype in dtypes if dtype in TOLERANCE)]
        self.asked += 1
        if self.asked < WATCHED:
            before = hand_over(case, self.way)
            self.overwritten |= {x for x in given if not same({"": given[x]}, {"": before[x]})}
        return Answer(found, max(dtypes, key=list(TOLERANCE).index))

    def plain_case(self, **numbers):
        """One row of one token: 0 and the first setting where no number is given."""
        arguments = {}
        for name, kind in self.kinds.items():
            usual = CHOICES[kind][0] if kind in CHOICES else 1.0 if kind == "mask" else 0.0
            number = numbers.get(name, usual)
            shape = (1,) if kind == "scores" else (1, 1)
            arguments[name] = number if kind in CHOICES else np.full(shape, float(number))
        return Case(arguments, self.kinds, self.way.dtypes[0])

    def probe(self, **numbers):
        """Yours, for a plain case: the first result, a number."""
        found = self.ask(self.plain_case(**numbers)).found
        return np.append(found.get(self.results[0], []), np.nan)[0]

    def changed(self, conventions, given):
        """What ours returns with these conventions, the first innermost. May raise CannotTell."""

        def ours(given):
            results = self.by_name(self.ours(*given.values()))
            return {name: np.asarray(x) for name, x in results.items()}

        for one in conventions:
            ours = partial(one.change, ours)
        return ours(given)

    def expect(self, conventions, case):
        return self.changed(conventions, case.arguments)

    def exact(self):
        """Whether half precision is in play, so that inputs should be exact in it."""
        answers = [self.ask(case) for case in random_cases(self.kinds, self.way.dtypes, True, 3)]
        return any("16" in answer.dtype for answer in answers)

    def find_way(self):
        """Find how yours wants its arguments. Returns notes on what it refuses.

        Something is refused where a call fails and succeeds in another way. Where none
        succeeds, problems says why, for each dtype.
        """
        usual, works = self.way, {}  # the problems of some calls in each way, "" where it works
        tensors = usual.container == "tensors"
        containers = ["tensors", "arrays", "rows"] if tensors else ["arrays", "rows"]
        masks = ["floats", "bool", "int64"] if "mask" in self.kinds else ["floats"]
        dtypes = [*TOLERANCE]
        cases = random_cases(self.kinds, dtypes[:1], True, 12)
        for container, mask, dtype in itertools.product(containers, masks, dtypes):
            if dtype == "bfloat16" and container != "tensors":
                continue  # NumPy has no such dtype
            self.way = Way(container, mask, (dtype,))
            answers = [self.ask(dataclasses.replace(case, dtype=dtype)) for case in cases]
            works[container, mask, dtype] = [answer.problem for answer in answers]
            if len(works) == len(usual.dtypes) and not any(map(any, works.values())):
                break
        self.way = usual
        best = max(works, key=lambda way: works[way].count(""))
        if all(works[best]):
            self.problems = {way[2]: x[0] for way, x in works.items() if way[:2] == usual[:2]}
            return []

        def refused(*way):
            """The problem of a call that works in the best way but not in this one."""
            problems = zip(works.get(way, []), works[best])
            found = next((x for x, good in problems if x and not good), "")
            return found.removeprefix("yours raises ")

        notes, (container, mask, dtype) = [], best
        if problem := refused(usual.container, mask, dtype):
            takes = "lists of rows" if container == "rows" else container
            notes.append(f"yours refuses {usual.container} (it takes {takes}): {problem}")
        if problem := refused(container, "floats", dtype):
            notes.append(f"yours refuses a mask of floats (it takes {mask}): {problem}")
        taken = []
        for other in usual.dtypes:
            if problem := refused(container, mask, other):
                notes.append(f"yours refuses {other}: {problem}")
            else:
                taken.append(other)
        self.way = Way(container, mask, tuple(taken) or (dtype,))
        return notes
