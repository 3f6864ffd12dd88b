"""What several test files need: small models, ragged batches, and definitions too slow to be wrong."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: more threads only wait on small matrices

import numpy as np
import pytest

import rlhf_loop_pseudo as loop


def small_model(rng, vocab_size=7, width=5, out_width=None, scale=3.0):
    """A model in float64, big enough in all its weights to leave the linear range."""
    model = loop.init_model(rng, vocab_size, width, out_width or vocab_size, scale)
    return {name: weights.astype(np.float64) * (5 if name == "embed" else 1) for name, weights in model.items()}


def ragged_mask(rng, rows, length):
    """A mask whose rows end at different places."""
    return (np.arange(length) < rng.integers(1, length + 1, size=(rows, 1))).astype(np.float64)


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


class Batch:
    """Prompts, responses, a mask that really masks, and a model, all in float64."""

    def __init__(self, seed, rows=3, prompt_length=4, response_length=5, vocab_size=7, width=5):
        rng = self.rng = np.random.default_rng(seed)
        self.vocab_size, self.width = vocab_size, width
        self.model = small_model(rng, vocab_size, width)
        self.prompts = rng.integers(0, vocab_size - 1, size=(rows, prompt_length))
        self.mask = ragged_mask(rng, rows, response_length)
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


@pytest.fixture(params=range(3))
def batch(request):
    """Three different batches."""
    return Batch(request.param)
