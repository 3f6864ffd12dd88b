"""The tool that lays a reader's own PPO beside ours: it passes what is right and finds the classic bugs."""

import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import compare
import numpy as np
import pytest

import rlhf_loop_pseudo as loop

# A PPO as somebody else would write it
THEIRS = """
import numpy as np


def token_logprobs(model, prompts, responses):
    x = model["embed"][np.concatenate([prompts, responses], axis=1)]
    roots = np.sqrt(np.arange(x.shape[1]) + 1, dtype=x.dtype)[:, None]
    logits = np.tanh(x + x.cumsum(axis=1) / roots @ model["mix"]) @ model["head"]
    logits = logits - logits.max(axis=2, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return np.array([
        [logprobs[b, prompts.shape[1] + t - 1, token] for t, token in enumerate(row)] for b, row in enumerate(responses)
    ])


def kl_penalty(logprobs, ref_logprobs, estimator="k1"):
    log_ratio = logprobs - ref_logprobs
    return {"k1": log_ratio, "k2": 0.5 * log_ratio**2, "k3": np.exp(-log_ratio) - 1 + log_ratio}[estimator]


def shape_rewards(scores, kl, mask, beta):
    rewards = -beta * kl * mask
    for row, score in enumerate(scores):
        rewards[row, int(mask[row].sum()) - 1] += score
    return rewards


def gae(rewards, values, mask, gamma, lam):
    values = values * mask
    deltas = (rewards + gamma * np.pad(values, ((0, 0), (0, 1)))[:, 1:] - values) * mask
    length = mask.shape[1]
    weights = np.array([[(gamma * lam) ** max(0, s - t) * (s >= t) for t in range(length)] for s in range(length)])
    advantages = (deltas @ weights * mask).astype(values.dtype)
    return advantages, advantages + values


def group_advantages(rewards, mask, group_size, method):
    totals = (rewards * mask).sum(axis=1)
    result = np.zeros_like(mask)
    for row, total in enumerate(totals):
        first = row - row % group_size
        group = totals[first : first + group_size]
        if method == "rloo":
            result[row] = total - (group.sum() - total) / (group_size - 1)
        else:
            result[row] = (total - group.mean()) / (group.std(ddof=1) + 1e-6)
    return result * mask


def whiten(x, mask):
    real = x[mask > 0]
    variance = real.var(ddof=1) if len(real) > 1 else 0
    return (x - real.mean()) / np.sqrt(variance + 1e-8) * mask


def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip):
    ratio = np.exp((new_logprobs - old_logprobs) * mask)
    plain = ratio * advantages * mask
    clipped = np.clip(ratio, 1 - clip, 1 + clip) * advantages * mask
    smaller = np.minimum(plain, clipped)
    gradient = np.where(smaller == plain, -plain, 0) / mask.sum()
    return -smaller.sum() / mask.sum(), gradient, ratio * mask


def value_loss(values, returns, mask):
    error = (values - returns) * mask
    return (error**2).sum() / mask.sum(), 2 * error / mask.sum()


def preference_loss(chosen, rejected):
    margin = chosen - rejected
    loss = -np.minimum(margin, 0) + np.log1p(np.exp(-np.abs(margin)))
    slope = -np.exp(-margin - loss) / len(margin)
    return loss.mean(), slope, -slope
"""
FUNCTIONS = {block.split("(")[0]: f"import numpy as np\n\n\ndef {block}" for block in THEIRS.split("\ndef ")[1:]}

# The ten classic bugs: the function, what stands in it, what stands there instead
BUGS = {
    "log probabilities shifted by one": ("token_logprobs", "prompts.shape[1] + t - 1", "prompts.shape[1] + t"),
    "mask without the end token": ("ppo_loss", "ratio = ", "mask = np.pad(mask, ((0, 0), (0, 1)))[:, 1:]; ratio = "),
    "the value of padding leaks": ("gae", "values = values * mask", "pass"),
    "gae runs over padding": ("gae", "- values) * mask", "- values)"),
    "mean over the padded length": ("value_loss", "(error**2).sum() / mask.sum()", "(error**2).mean()"),
    "clip on the wrong side": (
        "ppo_loss",
        "np.clip(ratio, 1 - clip, 1 + clip)",
        "np.where(advantages > 0, np.maximum(ratio, 1 - clip), np.minimum(ratio, 1 + clip))",
    ),
    "max for min": ("ppo_loss", "np.minimum(plain", "np.maximum(plain"),
    "kl with the wrong sign": ("kl_penalty", "logprobs - ref_logprobs", "ref_logprobs - logprobs"),
    "whitening over padding": ("whiten", "x[mask > 0]", "x.ravel()"),
    "score on the last position": ("shape_rewards", "int(mask[row].sum()) - 1", "-1"),
}
# Known differences of convention: what the report says of them; the function, what stands in it, what instead, ...
AFTER_END = ("int(mask[row].sum()) - 1", "min(int(mask[row].sum()), mask.shape[1] - 1)")
WHITENED = "real = advantages[mask > 0]; return (advantages - real.mean()) / (real.std(ddof={}) + 1e-8) * mask, "
K3 = "np.exp(-log_ratio) - 1 + log_ratio"
CLAMPED = ("old_logprobs) * mask)", "old_logprobs).clip(-20, 20) * mask)")
INSIDE = ("smaller == plain", "(smaller == plain) & (abs(new_logprobs - old_logprobs) < 20)")
LOG_3 = ("np.minimum(plain, clipped)", "np.maximum(np.minimum(plain, clipped), np.minimum(3 * advantages * mask, 0))")
CONVENTIONS = {
    "the factor 0.5, as in TRL": ("value_loss", "(error**2)", "0.5 * (error**2)", "2 * error", "error"),
    "a variance divided by n, as in OpenRLHF": ("whiten", "ddof=1", "ddof=0"),
    "but for deviations below 0.3": ("whiten", "np.sqrt(variance + 1e-8)", "(np.sqrt(variance) + 1e-5)"),
    "np.std, and deviations below": ("group_advantages", "ddof=1", "ddof=0"),
    "deviations below 0.3, where epsilons": ("group_advantages", "1e-6", "1e-4"),
    "already whitened, as in verl, and deviations": ("gae", "return advantages, ", WHITENED.format(1)),
    "already whitened, as in verl, with a variance divided by n": ("gae", "return advantages, ", WHITENED.format(0)),
    "the score on the position after the last token where there is one, as in TRL": ("shape_rewards", *AFTER_END),
    "as in TRL, and KL at padding": ("shape_rewards", *AFTER_END, "kl * mask", "kl"),
    "scores clipped to +-10": ("shape_rewards", "+= score", "+= np.clip(score, -10, 10)"),
    "k3 clamped to +-10": ("kl_penalty", K3, f"({K3}).clip(-10, 10)"),
    "estimates clamped to +-10": ("kl_penalty", "[estimator]", "[estimator].clip(-10, 10)"),
    "a log ratio clamped to +-20, as in OpenRLHF and verl": ("ppo_loss", *CLAMPED, *INSIDE),
    "and to log 3 where A < 0; not compared: d_new": ("ppo_loss", *CLAMPED, *LOG_3, "gradient, ratio", "None, ratio"),
    "padding is not 0": ("whiten", "1e-8) * mask", "1e-8)"),
    "not compared: d_values": ("value_loss", ", 2 * error / mask.sum()", ""),
}
RANDOM = {"core_loop", "sample_prompts", "generate", "collect_preferences", "train_reward_model"}  # not compared


def changed(name, *fragments):
    """The source of one of their functions, with every second fragment in place of the one before it."""
    source = FUNCTIONS[name]
    for old, new in zip(fragments[::2], fragments[1::2]):
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


def run(tmp_path, capsys, source, *options):
    """Compare a module with this source. Returns the exit code and the report."""
    path = tmp_path / "my_ppo.py"
    path.write_text(source)
    code = compare.main([str(path), *options])
    return code, capsys.readouterr().out


def test_another_right_ppo_agrees(tmp_path, capsys):
    code, report = run(tmp_path, capsys, THEIRS, "--cases", "60")
    assert code == 0
    assert re.findall(r"^  (\w+) +agrees to 1[45] digits in float64, \d in float32 \(60 cases\)$", report, re.M) == [
        name for name in compare.COMPARED if name in FUNCTIONS
    ]


def test_every_function_of_arrays_is_compared(tmp_path, capsys):
    source = Path(loop.__file__).read_text(encoding="utf-8")
    public = set(re.findall(r"^# ANCHOR: (\w+)$", source, re.M))
    assert public - set(compare.COMPARED) == RANDOM
    code, report = run(tmp_path, capsys, source, "--cases", "20")
    assert code == 0
    assert report.count("agrees to 15 digits in float64, 6 in float32 (20 cases)\n") == len(compare.COMPARED)


@pytest.mark.parametrize("bug", BUGS)
def test_a_classic_bug_is_found_and_made_small(bug, tmp_path, capsys):
    name, source = BUGS[bug][0], changed(*BUGS[bug])
    code, report = run(tmp_path, capsys, source)
    assert code == 1
    assert f"\n  {name:<17} DIFFERS\n" in report
    assert max(map(len, report.splitlines())) <= 80
    assert re.search(r"first in \w+(, row 0, token 0)?: ours \S+, yours\s+\S+\n", report)
    assert ("with 0 at padding they agree" in report) == (name == "gae")
    given, theirs = {}, {}
    exec("import numpy as np\n" + textwrap.dedent(smallest_input(report)), given)  # it can be pasted
    exec(source, theirs)
    arguments = [given[parameter] for parameter in inspect.signature(getattr(loop, name)).parameters]
    assert all(len(x) <= 2 and x.shape[-1] <= 3 for x in arguments if isinstance(x, np.ndarray))
    with np.errstate(all="ignore"):
        answers = [function(*arguments) for function in (getattr(loop, name), theirs[name])]
    ours, yours = (np.hstack([np.ravel(x) for x in answer]) for answer in answers)
    assert not np.allclose(ours, yours)


def test_a_difference_word_for_word(tmp_path, capsys):
    code, report = run(tmp_path, capsys, "def whiten(x, mask):\n    return x + 1\n")
    assert code == 1
    assert (
        report
        == """my_ppo.py beside rlhf_loop_pseudo.py
  whiten            DIFFERS
    smallest input:
      x = np.array([[0.]])
      mask = np.array([[1.]])
                        ours                        yours
    whitened            [[0.]]                      [[1.]]
    first in whitened, row 0, token 0: ours 0.0, yours 1.0
"""
    )


def smallest_input(report):
    return re.search(r"smallest input:\n(.*)^ +ours +yours$", report, re.M | re.S)[1]


@pytest.mark.parametrize("words", CONVENTIONS)
def test_a_known_convention_is_no_mistake(words, tmp_path, capsys):
    name, *fragments = CONVENTIONS[words]
    code, report = run(tmp_path, capsys, changed(name, *fragments), "--cases", "100")
    assert code == 0
    assert words in " ".join(report.split())


def test_a_mistake_beside_a_known_convention_is_found(tmp_path, capsys):
    source = changed("value_loss", "(error**2).sum() / mask.sum(), 2 *", "0.5 * (error**2).mean(), 1 *")
    assert run(tmp_path, capsys, source)[0] == 1


@pytest.mark.parametrize(
    "body, words",
    [
        ("raise OverflowError('too much')", "yours raises OverflowError: too much"),
        ("return object()", "yours raises TypeError: float() argument must be"),
        ("return np.zeros(())", "whitened: the shape of ours is (1, 1), of yours ()"),
        ("return None", "yours returns none of whitened"),
    ],
)
def test_answers_that_cannot_be_compared(body, words, tmp_path, capsys):
    code, report = run(tmp_path, capsys, f"import numpy as np\ndef whiten(x, mask):\n    {body}\n")
    assert code == 1
    assert words in report


def test_a_function_that_changes_its_mind(tmp_path, capsys):
    source = changed("kl_penalty", "= logprobs", "= (calls.append(0) or len(calls) % 5 == 0) + logprobs")
    code, report = run(tmp_path, capsys, "calls = []\n" + source)
    assert code == 1
    assert "DIFFERS from one call to the next, on the same input" in report


def test_extreme_numbers_are_tried(tmp_path, capsys):
    source = changed(
        "preference_loss", "-np.minimum(margin, 0) + np.log1p(np.exp(-np.abs(margin)))", "np.log(1 + np.exp(-margin))"
    )
    code, report = run(tmp_path, capsys, source)
    assert code == 1
    assert "1000." in smallest_input(report)


def test_float32_is_tried(tmp_path, capsys):
    source = changed(
        "kl_penalty", "logprobs - ref_logprobs", "(logprobs - ref_logprobs) * (1 + (logprobs.dtype == np.float32))"
    )
    code, report = run(tmp_path, capsys, source)
    assert code == 1
    assert "dtype=np.float32" in smallest_input(report)


def test_one_report_for_one_module(tmp_path, capsys):
    source = changed(*CONVENTIONS["but for deviations below 0.3"])  # says in how many cases, which is chance
    assert len({run(tmp_path, capsys, source, "--cases", "60") for _ in range(2)}) == 1


def test_other_names(tmp_path, capsys):
    source = FUNCTIONS["gae"].replace("def gae", "def compute") + FUNCTIONS["whiten"].replace("def whiten", "def norm")
    code, report = run(tmp_path, capsys, source, "--map", "gae=compute", "--map", "whiten=norm", "--cases", "20")
    assert code == 0
    assert report.count("agrees") == 2


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("import no_such_thing", [], "my_ppo.py cannot be imported: ModuleNotFoundError: No module"),
        ("import sys; sys.exit(1)", [], "my_ppo.py cannot be imported: SystemExit: 1"),
        ("def unrelated(): pass", [], "my_ppo.py defines none of score_responses, "),
        ("from rlhf_loop_pseudo import gae", [], "my_ppo.py defines none of "),
        (THEIRS, ["--map", "gea=gae"], "--map gea=gae: there is no 'gea' here"),
        (THEIRS, ["--map", "gae=advantages"], "or no 'advantages' in "),
        (THEIRS, ["--cases", "0"], "--cases 0: at least 1"),
    ],
)
def test_nothing_to_compare(source, options, words, tmp_path, capsys):
    (tmp_path / "my_ppo.py").write_text(source)
    assert compare.main([str(tmp_path / "my_ppo.py"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("compare.py: ") and err.count("\n") == 1
    assert words in err


def test_the_command_itself(tmp_path):
    command = [sys.executable, compare.__file__, tmp_path / "missing.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"compare.py: .*missing.py cannot be imported: FileNotFoundError: .*\n", done.stderr)


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_torch_gets_tensors_and_returns_them(tmp_path):
    """In a process of its own, because importing torch changes what all modules get."""
    (tmp_path / "my_ppo.py").write_text("""
import torch


def value_loss(values, returns, mask):
    values.requires_grad_()
    loss = torch.nn.functional.mse_loss(values[mask.bool()], returns[mask.bool()])
    loss.backward()
    return loss, values.grad
""")
    command = [sys.executable, compare.__file__, tmp_path / "my_ppo.py", "--cases", "50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees to 15 digits in float64, 6 in float32 (50 cases)\n" in done.stdout
