"""What several test files need: small models, ragged batches, and definitions too slow to be wrong."""

import contextlib
import io
import itertools
import os
import re

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: more threads only wait on small matrices

import numpy as np
import pytest
from hypothesis import settings

import rlhf_loop_pseudo as loop

settings.register_profile("steady", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("steady")


def small_model(rng, vocab_size=7, width=5, out_width=None, scale=3.0):
    """A model in float64, big enough in all its weights to leave the linear range."""
    model = loop.init_model(rng, vocab_size, width, out_width or vocab_size, scale)
    return {name: weights.astype(np.float64) * (5 if name == "embed" else 1) for name, weights in model.items()}


def ragged_mask(rng, rows, length):
    """A mask whose rows end at different places."""
    return (np.arange(length) < rng.integers(1, length + 1, size=(rows, 1))).astype(np.float64)


def holed_mask(rng, rows, length):
    """A mask with padding anywhere, and at least one real token in each row."""
    mask = (rng.random((rows, length)) < 0.6).astype(np.float64)
    mask[np.arange(rows), rng.integers(0, length, size=rows)] = 1
    return mask


def read_only(*arrays):
    """The arrays, protected: a function that writes to its arguments raises."""
    for array in arrays:
        for each in array.values() if isinstance(array, dict) else [array]:
            each.flags.writeable = False
    return arrays


def slow_hidden(model, tokens):
    """The hidden state after one sequence of tokens, from the design's formula, in plain loops."""
    embed, mix = model["embed"], model["mix"]
    context = sum(embed[token] for token in tokens) / np.sqrt(len(tokens))
    width = len(mix)
    return np.array(
        [np.tanh(embed[tokens[-1]][j] + sum(context[i] * mix[i][j] for i in range(width))) for j in range(width)]
    )


def slow_logprobs(model, tokens):
    """Log probabilities of all tokens that may follow a sequence."""
    logits = slow_hidden(model, tokens) @ model["head"]
    return logits - np.logaddexp.reduce(logits)


def slow_human(word):
    """The human's opinion of a word, a string of letters: half vowels, and none twice, is best."""
    if not word:
        return 0.0
    vowels = sum(letter in "aeiou" for letter in word) / len(word)
    return (1 - abs(2 * vowels - 1)) * len(set(word)) / len(word)


def one_head(model):
    """The model with a head of a single number: a critic, or a reward model."""
    return {**model, "head": model["head"][:, :1].copy()}


def real_tokens(mask):
    """(row, position) of every real token."""
    return [(b, t) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]


class Batch:
    """Prompts, responses, a mask that really masks, and a model, all in float64.

    The mask is 1 up to some place in each row; with holes, padding may be anywhere, on the left too.
    """

    def __init__(self, seed, rows=3, prompt_length=4, response_length=5, vocab_size=7, width=5, holes=False):
        rng = self.rng = np.random.default_rng(seed)
        self.vocab_size, self.width = vocab_size, width
        self.model = small_model(rng, vocab_size, width)
        self.prompts = rng.integers(0, vocab_size - 1, size=(rows, prompt_length))
        self.mask = (holed_mask if holes else ragged_mask)(rng, rows, response_length)
        if not holes:
            self.mask[0] = 1
            self.mask[-1, -1] = 0
        responses = rng.integers(0, vocab_size - 1, size=(rows, response_length))
        self.responses = np.where(self.mask, responses, vocab_size - 1)

    def normal(self):
        """Random numbers of the responses' shape, NaN at padding: whoever looks there is found out."""
        return np.where(self.mask, self.rng.standard_normal(self.mask.shape), np.nan)

    def sequence(self, row, length):
        """A row's prompt and the first length tokens of its response."""
        return [*self.prompts[row], *self.responses[row, :length]]


@pytest.fixture(params=[0, 1, 2, "holes"])
def batch(request):
    """Four different batches; the mask of the last has holes."""
    return Batch(3, holes=True) if request.param == "holes" else Batch(request.param)


# From here on: what the tests of the screen and of the command line share.


def shown(flags, folder, code=0):
    """Run the command line. Returns (what it printed, the arrays that it saved)."""
    path = folder / "arrays.npz"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert loop.main([*flags.split(), "--save", str(path)]) == code
    with np.load(path) as arrays:
        return output.getvalue(), {name: arrays[name] for name in arrays}


class Number(float):
    """A printed number, which knows how many decimals it has."""

    def __new__(cls, text):
        text = text.strip().replace(",", "")
        self = super().__new__(cls, text)
        self.decimals = len(text.partition(".")[2])
        return self


def numbers(text):
    """All numbers of a text."""
    return [Number(number) for number in re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)]


def after(text, start):
    """What follows in the first line that begins so."""
    return next(line for line in text.splitlines() if line.strip().startswith(start)).strip()[len(start) :]


def table_below(text, *heads):
    """The rows of words below the line that begins with these heads, up to the next empty line or note."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.split()[: len(heads)] == list(heads))
    return [line.split() for line in itertools.takewhile(lambda line: line[:4].strip(), lines)]


COLOURS = {"36": "actor", "35": "critic", "32": "reward", "94": "reference", "31": "human", "1": "n", "2": "note"}


def owned(line):
    """The parts of a line that have a colour, as (whose it is, text)."""
    parts = re.findall(r"\x1b\[(?:1;)?(\d+)m([^\x1b]+)", line)
    return [(COLOURS[code], text) for code, text in parts if code in COLOURS]


def rounds(printed, value, digits):
    """Whether a printed Number is that value, rounded to that many decimals."""
    return printed.decimals == digits and abs(printed - value) <= 0.5000001 * 10**-digits + 1e-6 * abs(value)
