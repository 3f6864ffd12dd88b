"""What several test files need: small models, ragged batches, and each formula once, slowly."""

import contextlib
import io
import math
import os
import re
import statistics

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: more threads gain nothing here

import numpy as np
import pytest
from hypothesis import Phase, settings

import rlhf_loop_pseudo as loop

PHASES = [Phase.explicit, Phase.generate]  # shrinking takes long where much is wrong
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=25, phases=PHASES)
settings.load_profile("steady")
TINY = "--vocab-size 12 --batch-size 4 --prompt-length 3 --response-length 5 --width 4"


def small_model(rng, vocab_size=7, width=5, out_width=None, scale=3.0):
    """A model in float64, big enough in all its weights to leave the linear range."""
    model = loop.init_model(rng, vocab_size, width, out_width or vocab_size)
    scales = {"embed": 5.0, "context_proj": 1.0, "head": scale}
    return {name: np.float64(weights) * scales[name] for name, weights in model.items()}


def one_head(model):
    """The model with a head of a single number: a critic, or a reward model."""
    return {**model, "head": model["head"][:, :1].copy()}


def ragged_mask(rng, rows, length):
    """A mask whose rows end at different places."""
    return np.float64(np.arange(length) < rng.integers(1, length + 1, size=(rows, 1)))


def holed_mask(rng, rows, length):
    """A mask with padding anywhere, and at least one real token in each row."""
    mask = np.float64(rng.random((rows, length)) < 0.6)
    mask[np.arange(rows), rng.integers(0, length, size=rows)] = 1
    return mask


def read_only(*arrays):
    """The arrays, protected: a function that writes to its arguments raises."""
    for array in arrays:
        for part in array.values() if isinstance(array, dict) else [array]:
            part.flags.writeable = False
    return arrays


def real_tokens(mask):
    """(row, position) of every real token."""
    return [(b, t) for b in range(len(mask)) for t in range(len(mask[b])) if mask[b][t]]


def last_real(mask):
    """The position of each row's last real token."""
    return [max(t for t in range(len(row)) if row[t]) for row in mask]


class Batch:
    """Prompts, responses, a mask that really masks, and a model, all in float64.

    The mask is 1 up to some place in each row; with holes, padding may be anywhere.
    """

    def __init__(
        self, seed, rows=3, prompt_length=4, response_length=5, vocab_size=7, width=5, holes=False
    ):
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
        """Random numbers of the responses' shape, NaN at padding: who looks there is seen."""
        return np.where(self.mask, self.rng.standard_normal(self.mask.shape), np.nan)

    def sequence(self, row, length):
        """A row's prompt and the first length tokens of its response."""
        return [*self.prompts[row], *self.responses[row, :length]]


@pytest.fixture(params=[0, 1, 2, "holes"])
def batch(request):
    """Four different batches; the mask of the last has holes."""
    return Batch(3, holes=True) if request.param == "holes" else Batch(request.param)


# From here on: each formula once, slowly. Arrays are (B, T); results are in float64.


def slow_log_softmax(logits):
    """Log probabilities of one row of logits."""
    highest = max(logits)
    log_sum = math.log(math.fsum(math.exp(logit - highest) for logit in logits))
    return np.array([logit - highest - log_sum for logit in logits])


def slow_hidden(model, tokens):
    """The hidden state after one sequence of tokens."""
    embed, projection = model["embed"], model["context_proj"]
    context = sum(embed[token] for token in tokens) / math.sqrt(len(tokens))
    width = range(len(projection))
    projected = [sum(context[i] * projection[i][j] for i in width) for j in width]
    return np.tanh(embed[tokens[-1]] + projected)


def slow_logprobs(model, tokens):
    """Log probabilities of all tokens that may follow a sequence."""
    return slow_log_softmax(slow_hidden(model, tokens) @ model["head"])


def slow_kl(logprobs, ref_logprobs, estimator="k1"):
    """Schulman's estimators of a token's KL."""
    lead = np.subtract(logprobs, ref_logprobs, dtype=np.float64)
    return {"k1": lead, "k2": lead**2 / 2, "k3": np.exp(-lead) - 1 + lead}[estimator]


def slow_rewards(scores, kl, mask, beta):
    """The price of a token's KL, and the score at the last one."""
    rewards = np.zeros(mask.shape)
    for place in real_tokens(mask):
        rewards[place] = -beta * float(kl[place]) if beta else 0
    for b, t in enumerate(last_real(mask)):
        rewards[b, t] += float(scores[b])
    return rewards


def slow_gae(rewards, values, mask, gamma, lam):
    """(advantages, returns): each advantage the discounted sum of the TD errors after it."""
    advantages, returns = np.zeros((2, *mask.shape))
    for b, row in enumerate(mask):
        real = np.flatnonzero(row)
        r, v = rewards[b, real].astype(float), [*values[b, real].astype(float), 0]
        errors = [r[s] + gamma * v[s + 1] - v[s] for s in range(len(real))]
        for s, t in enumerate(real):
            later = enumerate(errors[s:])
            advantages[b, t] = sum((gamma * lam) ** steps * error for steps, error in later)
            returns[b, t] = advantages[b, t] + v[s]
    return advantages, returns


def slow_groups(rewards, mask, size, judge):
    """judge(a response's sum of rewards, those of the others in its group), at real tokens."""
    totals = [np.float64(row[real != 0]).sum() for row, real in zip(rewards, mask)]
    advantages = np.zeros(mask.shape)
    for b, t in real_tokens(mask):
        group = range(b - b % size, b - b % size + size)
        advantages[b, t] = judge(totals[b], [totals[other] for other in group if other != b])
    return advantages


def slow_rloo(rewards, mask, size):
    """Against the mean of the others."""
    return slow_groups(rewards, mask, size, lambda own, others: own - statistics.fmean(others))


def slow_grpo(rewards, mask, size):
    """Against the mean of the group, in its standard deviations."""

    def judge(own, others):
        return (own - statistics.fmean([own, *others])) / (statistics.stdev([own, *others]) + 1e-6)

    return slow_groups(rewards, mask, size, judge)


def slow_whiten(x, mask):
    """Mean 0 and unbiased variance 1 over the real tokens."""
    real = [float(x[place]) for place in real_tokens(mask)]
    variance = statistics.variance(real) if len(real) > 1 else 0
    white = np.zeros(mask.shape)
    for place in real_tokens(mask):
        white[place] = (float(x[place]) - statistics.fmean(real)) / math.sqrt(variance + 1e-8)
    return white


def slow_ppo(new, old, advantages, mask, clip):
    """(loss, its derivative, ratio) of PPO, by the cases of its clip."""
    loss, n, (derivative, ratio) = 0.0, len(real_tokens(mask)), np.zeros((2, *mask.shape))
    for place in real_tokens(mask):
        r, a = math.exp(float(new[place]) - float(old[place])), float(advantages[place])
        ratio[place] = r
        stopped = (a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip)
        loss -= a * (1 + clip if a > 0 else 1 - clip) / n if stopped else a * r / n
        derivative[place] = 0 if stopped else -r * a / n
    return loss, derivative, ratio


def slow_value_loss(values, returns, mask):
    """(loss, its derivative) of the critic."""
    errors = {i: float(values[i]) - float(returns[i]) for i in real_tokens(mask)}
    derivative = np.zeros(mask.shape)
    for place, error in errors.items():
        derivative[place] = 2 * error / len(errors)
    return statistics.fmean(error**2 for error in errors.values()), derivative


def slow_preference_loss(chosen, rejected):
    """(loss, d_chosen, d_rejected) of Bradley and Terry: -log sigmoid of the lead."""
    leads = np.subtract(chosen, rejected, dtype=np.float64)
    d_rejected = 1 / (1 + np.exp(leads)) / leads.size
    return np.log1p(np.exp(-leads)).mean(), -d_rejected, d_rejected


def slow_human(word):
    """The human's opinion of a string of letters: half vowels, and none twice, is best."""
    if not word:
        return 0.0
    vowels = sum(letter in "aeiou" for letter in word) / len(word)
    return (1 - abs(2 * vowels - 1)) * len(set(word)) / len(word)


def texts_of(*texts):
    """Prompts and the real tokens of their responses, as strings, the end token included."""
    return ["".join(loop.LETTERS[t] for t in [*p, *r[m != 0]]) for p, r, m in zip(*texts)]


def least_loss(words):
    """Nats a token of who knows these words: each is one of those that begin like it."""
    initials = [word[0] for word in words]
    return sum(math.log(initials.count(first)) for first in initials) / sum(map(len, words))


class SlowAdam:
    """Algorithm 1 of Kingma and Ba, for one parameter."""

    t, m, v = 0, 0.0, 0.0

    def step(self, parameter, gradient, rate):
        """The parameter after one more update."""
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * np.float64(gradient)
        self.v = 0.999 * self.v + 0.001 * np.float64(gradient) ** 2
        m_hat, v_hat = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return parameter - rate * m_hat / (np.sqrt(v_hat) + 1e-8)


# From here on: what the tests of the screen and of the command line share.


def run(*arguments):
    """The exit code of the command line."""
    try:
        return loop.main(list(arguments))
    except SystemExit as stop:  # of argparse
        return stop.code


def shown(flags, folder, code=0):
    """Run the command line. Returns (what it printed, the arrays that it saved)."""
    path = folder / "arrays.npz"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert run(*flags.split(), "--save", str(path)) == code
    with np.load(path) as arrays:
        return output.getvalue(), {name: arrays[name] for name in arrays}


def lines_of(view):
    """What a view shows in a pipe."""
    console = loop.make_console(file=io.StringIO())
    console.print(view)
    return console.file.getvalue().splitlines()


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
    lines = map(str.strip, text.splitlines())
    return next(line for line in lines if line.startswith(start))[len(start) :]


def rounds(printed, value, digits):
    """Whether a printed Number is that value, rounded to that many decimals."""
    slack = 0.5000001 * 10**-digits + 1e-6 * abs(value)
    return printed.decimals == digits and abs(printed - value) <= slack
