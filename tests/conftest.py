"""What several test files need: small models, ragged batches, and definitions too slow to be wrong."""

import os

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


def check_formulas(data, config):
    """That the arrays of one step, as the walk-through yields and saves them, satisfy the formulas on its screen."""
    mask, responses = data["mask"], data["responses"]
    real, n = mask == 1, np.count_nonzero(mask)
    for row, length in zip(responses, mask.sum(axis=1).astype(int)):
        assert config.vocab_size - 1 not in row[: length - 1]
        assert (row[length:] == config.vocab_size - 1).all()
        assert length == config.response_length or row[length - 1] == config.vocab_size - 1
    of_tokens = {"old_logprobs", "ref_logprobs", "kl", "exact_kl", "rewards", "values", "advantages", "returns"}
    for name in of_tokens & data.keys():
        assert data[name].shape == mask.shape
        assert (data[name][~real] == 0).all()

    k1 = data["old_logprobs"].astype(np.float64) - data["ref_logprobs"]
    estimators = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1}
    for name, kl in {**estimators, "kl": estimators[config.kl_estimator]}.items():
        np.testing.assert_allclose(data[name], kl, atol=1e-4, rtol=1e-4)
    assert (data["exact_kl"] > -1e-4).all()
    rewards = -config.beta * data["kl"]
    for b, row in enumerate(real):
        rewards[b, np.flatnonzero(row)[-1]] += data["scores"][b]
    np.testing.assert_allclose(data["rewards"], rewards, atol=1e-5)
    np.testing.assert_allclose(data["total_rewards"], rewards.sum(axis=1), atol=1e-4)

    if config.advantage == "gae":
        values, advantages = data["values"], data["advantages"]
        next_values, next_advantages = (np.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (values, advantages))
        td_errors = (data["rewards"] + config.gamma * next_values - values) * mask
        np.testing.assert_allclose(data["td_errors"], td_errors, atol=1e-5)
        expected = td_errors + config.gamma * config.lam * next_advantages * mask
        np.testing.assert_allclose(advantages, expected, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(data["returns"], advantages + values, atol=1e-6)
        assert data["critic_loss"].shape == (config.ppo_epochs,)
        assert data["critic_loss"][0] == pytest.approx(((values - data["returns"]) ** 2).sum() / n, rel=1e-4)
    else:
        groups = data["rewards"].sum(axis=1, dtype=np.float64).reshape(-1, config.group_size)
        centered = groups - groups.mean(axis=1, keepdims=True)
        if config.advantage == "rloo":  # R - mean of the others
            expected = centered * config.group_size / (config.group_size - 1)
        else:
            expected = centered / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(data["advantages"], expected.reshape(-1, 1) * mask, atol=1e-4, rtol=1e-4)
        assert not {"values", "returns", "td_errors"} & data.keys()

    white, ratio = data["whitened"].astype(np.float64), data["ratio"]
    if config.advantage == "grpo":
        np.testing.assert_array_equal(data["whitened"], data["advantages"])
    else:
        assert white.sum() == pytest.approx(0, abs=1e-3)
        if data["advantages"][real].std() > 1e-3:
            assert (white**2).sum() / max(n - 1, 1) == pytest.approx(1, abs=1e-2)
    bounded = np.clip(ratio, 1 - config.clip, 1 + config.clip)
    losses = [-np.minimum(r * white, c * white)[real].mean() for r, c in zip(ratio, bounded)]
    assert ratio.shape == (config.ppo_epochs, *mask.shape)
    np.testing.assert_allclose(ratio[0], mask, atol=1e-5)
    np.testing.assert_allclose(data["actor_loss"], losses, atol=1e-5, rtol=1e-4)
    stopped = ((ratio < 1 - config.clip) & (white < 0)) | ((ratio > 1 + config.clip) & (white > 0))
    np.testing.assert_array_equal(data["clipped"], stopped)
