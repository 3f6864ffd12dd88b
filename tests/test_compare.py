"""The tool that lays a reader's own PPO beside ours: it passes what is right and finds the bugs."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import compare
import rlhf_loop_pseudo as loop

# A PPO as somebody else would write it
THEIRS = """
import numpy as np

def token_logprobs(model, prompts, responses):
    x = model["embed"][np.concatenate([prompts, responses], axis=1)]
    roots = np.sqrt(np.arange(x.shape[1]) + 1, dtype=x.dtype)[:, None]
    logits = np.tanh(x + x.cumsum(axis=1) / roots @ model["mix"]) @ model["head"]
    return logprobs(logits[:, prompts.shape[1] - 1 : -1], responses)

def logprobs(logits, labels):
    logits = logits - logits.max(axis=2, keepdims=True)
    logits = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return [[row[t, x] for t, x in enumerate(xs)] for row, xs in zip(logits, labels)]

def kl_penalty(logprobs, ref_logprobs, estimator="k1"):
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": 0.5 * d**2, "k3": np.exp(-d) - 1 + d}[estimator]

def shape_rewards(scores, kl, mask, beta):
    rewards = -beta * np.where(mask, kl, 0)
    for row, score in enumerate(scores):
        rewards[row, np.flatnonzero(mask[row])[-1]] += score
    return rewards

def gae(rewards, values, mask, gamma, lam):
    values = values * mask
    deltas = (rewards + gamma * np.pad(values, ((0, 0), (0, 1)))[:, 1:] - values) * mask
    steps = np.arange(mask.shape[1])[:, None] - np.arange(mask.shape[1])
    weights = np.where(steps >= 0, (gamma * lam) ** np.maximum(0, steps), 0)
    advantages = (deltas @ weights * mask).astype(values.dtype)
    return advantages, advantages + values

def rloo_advantages(rewards, mask, group_size):
    totals = (rewards * mask).sum(axis=1)
    groups = [totals[i - i % group_size :][:group_size] for i in range(len(totals))]
    return [x - (group.sum() - x) / (group_size - 1) for x, group in zip(totals, groups)]

def grpo_advantages(rewards, mask, group_size):
    totals = (rewards * mask).sum(axis=1).reshape(-1, group_size)
    centered = totals - totals.mean(axis=1, keepdims=True)
    return (centered / (totals.std(axis=1, ddof=1, keepdims=True) + 1e-6)).reshape(-1, 1) * mask

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

def clipped_value_loss(values, old_values, returns, mask, clip):
    near = np.minimum(np.maximum(values, old_values - clip), old_values + clip)
    plain, clipped = ((values - returns) ** 2, (near - returns) ** 2)
    loss = (np.maximum(plain, clipped) * mask).sum() / mask.sum()
    return loss, np.where(plain >= clipped, 2 * (values - returns), 0) * mask / mask.sum()

def preference_loss(chosen, rejected):
    margin = chosen - rejected
    loss = -np.minimum(margin, 0) + np.log1p(np.exp(-np.abs(margin)))
    slope = -np.exp(-margin - loss) / len(margin)
    return loss.mean(), slope, -slope
"""
DEFINITIONS = THEIRS.split("\ndef ")[1:]
FUNCTIONS = {x.split("(")[0]: f"import numpy as np\n\n\ndef {x}" for x in DEFINITIONS}
FUNCTIONS["token_logprobs"] += "\n\n" + FUNCTIONS["logprobs"]

# In each table below: a name, and under it the function and what stands there instead of what
# The ten classic bugs
BUGS = """
log probabilities shifted by one
    token_logprobs: prompts.shape[1] - 1 : -1 => prompts.shape[1] :
mask without the end token
    ppo_loss: ratio = => mask = np.pad(mask, ((0, 0), (0, 1)))[:, 1:]; ratio =
the value of padding leaks
    gae: values = values * mask => pass
gae runs over padding
    gae: - values) * mask => - values)
mean over the padded length
    value_loss: (error**2).sum() / mask.sum() => (error**2).mean()
clip on the wrong side
    ppo_loss: np.clip(ratio, 1 - clip, 1 + clip)
        => np.where(advantages > 0, ratio.clip(1 - clip), ratio.clip(None, 1 + clip))
max for min
    ppo_loss: np.minimum(plain => np.maximum(plain
kl with the wrong sign
    kl_penalty: logprobs - ref_logprobs => ref_logprobs - logprobs
whitening over padding
    whiten: x[mask > 0] => x.ravel()
score on the last position
    shape_rewards: np.flatnonzero(mask[row])[-1] => -1
"""
# Known differences of convention, named by what the report says
CONVENTIONS = """
but for: the factor 0.5, as in TRL, OpenRLHF and verl (
    value_loss: (error**2).sum() => 0.5 * (error**2).sum() // 2 * error => error
but for: the factor 0.05 (
    value_loss: (error**2).sum() => 0.05 * (error**2).sum() // 2 * error => 0.1 * error
but for: a mean over each response, then over responses, as in GRPO's paper (
    value_loss: MEAN => (error**2 * share).sum(), 2 * error * share // error = => SHARE; error =
as in GRPO's paper; and the factor 0.25 (
    value_loss: MEAN => 0.25 * (error**2 * share).sum(), 0.5 * error * share // error =
        => SHARE; error =
but for: a sum over each response, then a mean over responses (
    value_loss: MEAN => (error**2).sum() / len(mask), 2 * error / len(mask)
a variance divided by n, as in OpenRLHF; deviations below 0.3 are left out (
    whiten: ddof=1 => ddof=0
but for: deviations below 0.3, where epsilons and rounding show (
    whiten: np.sqrt(variance + 1e-8) => (np.sqrt(variance) + 1e-5)
a variance divided by n, as in np.std; deviations
    grpo_advantages: ddof=1 => ddof=0
deviations below 0.3, where epsilons
    grpo_advantages: 1e-6 => 1e-4
but for: the mean without the deviation, as in Dr. GRPO (
    grpo_advantages: (centered / (totals.std(axis=1, ddof=1, keepdims=True) + 1e-6)) => centered
but for: advantages whitened inside, as in verl;
    gae: return advantages, => WHITENED + 1e-8) * mask,
whitened inside, as in verl, with a variance divided by n;
    gae: return advantages, => WHITENED * ((mask.sum() - 1) / mask.sum()) ** 0.5 + 1e-8) * mask,
but for: one value kept past the end, as in TRL (
    gae: values = values * mask => PAST; rewards = rewards * mask // - values) * mask
        => - values) * past
but for: one value kept past the end, and its reward, as in TRL (
    gae: values = values * mask => PAST // - values) * mask => - values) * past
but for: the score on the position after the last token where there is one, as in TRL (
    shape_rewards: LAST => AFTER
as in TRL, and KL at padding (
    shape_rewards: LAST => AFTER // np.where(mask, kl, 0) => kl
but for: scores clipped to +-10, as in OpenRLHF (
    shape_rewards: += score => += np.clip(score, -10, 10)
but for: scores clipped to [-3, 7] (
    shape_rewards: += score => += np.clip(score, -3, 7)
as in TRL; and scores clipped to +-5 (
    shape_rewards: LAST => AFTER // += score => += np.clip(score, -5, 5)
but for: k3 clipped to +-10, as in verl (
    kl_penalty: np.exp(-d) - 1 + d => (np.exp(-d) - 1 + d).clip(-10, 10)
but for: estimates clipped to +-10, as in OpenRLHF (
    kl_penalty: [estimator] => [estimator].clip(-10, 10)
but for: log ratios clipped to +-4 (
    kl_penalty: logprobs - ref_logprobs => np.clip(logprobs - ref_logprobs, -4, 4)
but for: log ratios within +-20, as in OpenRLHF and verl (
    ppo_loss: old_logprobs) * mask) => old_logprobs).clip(-20, 20) * mask) // smaller == plain
        => (smaller == plain) & (abs(new_logprobs - old_logprobs) < 20)
but for: a second clip at 3 where A < 0, as in verl; and log ratios within +-20
    ppo_loss: old_logprobs) * mask) => old_logprobs).clip(-20, 20) * mask)
        // np.minimum(plain, clipped) => np.maximum(np.minimum(plain, clipped), np.minimum(3 *
        advantages * mask, 0)) // gradient, ratio => None, ratio
"""
# Cases as public code and bug reports have them, and what is said: the exit code, the shape of the
# smallest input or a dash, sentences between bars
CASES = """
NaN at padding
    ppo_loss: (new_logprobs - old_logprobs) * mask => new_logprobs - old_logprobs
    0 (1,2) agrees (80 inputs | NaN or infinity at padding reaches your loss: | np.nan
a hole in the mask
    value_loss: error = => mask = np.arange(len(mask[0])) < mask.sum(axis=1, keepdims=True); error =
    0 - agrees (80 inputs | where the mask has a hole, they differ in loss:
        | np.array([[1., 0., 1.]])
whitening over padding
    whiten: x[mask > 0] => x.ravel() // len(real) > 1 => True
    1 (1,3) whiten DIFFERS | mask = np.array([[1., 1., 0.]])
a factor, and a mean over all positions
    value_loss: (error**2).sum() / mask.sum() => 0.5 * (error**2).mean()
        // 2 * error / mask.sum() => error / error.size
    1 (1,2) value_loss: apart from the factor 0.5, as in TRL, OpenRLHF and verl, they still differ
        here: | ours 0.5, yours 0.25 | yours divides by the number of all positions, padding
        included
no mask
    gae: values = values * mask => mask = np.ones_like(mask)
    1 (1,2) gae: they differ here: | with a mask of all ones they agree: yours ignores the mask
only k1
    kl_penalty: d = => d = no(estimator) or
        // import numpy as np => NO_K2
    0 - agrees ( | estimator k2, k3: not there in yours
only float32
    grpo_advantages: totals = => assert rewards.dtype == "float32", "Double"; totals =
    0 - digits in float32) | yours refuses float64: AssertionError: Double
only a bool mask
    whiten: x[mask > 0] => x[mask]
    0 - agrees ( | yours refuses a mask of floats (it takes bool): IndexError
only lists of rows
    whiten: real = => assert type(x) is list; x, mask = np.array(x), np.array(mask); real =
    0 - agrees ( | yours refuses arrays (it takes lists of rows): AssertionError
half precision
    gae: .astype(values.dtype) => .astype(np.float16)
    0 - agrees (80 inputs, within 1%, as float16 goes)
half precision inside
    gae: .astype(values.dtype) => .astype(np.float16).astype(float)
    1 - all differences are below 1 %: is half precision used inside?
a window of six
    gae: steps >= 0 => (steps >= 0) & (steps < 6)
    1 (1,7) with up to five tokens they agree
swapped results
    gae: advantages, advantages + values => advantages + values, advantages
    1 (1,1) they agree if you return returns, advantages: swapped?
a dict with our names
    gae: advantages, advantages + values => dict(returns=advantages + values, advantages=advantages)
    0 - agrees (80 inputs, 1
an overwritten argument
    gae: values = values * mask => values *= mask
    0 - agrees (80 inputs, 1 | yours overwrites its argument values
a group without spread
    grpo_advantages:  + 1e-6 => NOTHING
    1 (2,1) yours is not finite where nothing varies
no lambda
    gae: gamma * lam => gamma
    1 (1,2) where lam is 1.0 they agree
a wrong k3
    kl_penalty: np.exp(-d) - 1 + d => d
    1 (1,1) unless estimator is k3 they agree
an overflow
    preference_loss: -np.minimum(margin, 0) + np.log1p(np.exp(-np.abs(margin)))
        => np.log1p(np.exp(-margin))
    1 - with numbers below 30 they agree | 1000.
wrong in float32
    kl_penalty: logprobs - ref_logprobs
        => (logprobs - ref_logprobs) * (1 + (logprobs.dtype == "float32"))
    1 (1,1) in float64 they agree | dtype=np.float32
sys.exit
    whiten: real = => exit("bye"); real =
    1 (1,1) yours raises SystemExit: bye
no array
    kl_penalty: return => return object();
    1 (1,1) yours raises TypeError: float() argument
another shape
    kl_penalty: return => return 0;
    1 (1,1) kl: ours has the shape (1, 1), yours ()
nothing
    kl_penalty: return => pass;
    1 (1,1) yours returns none of kl
no gradient
    value_loss: , 2 * error / mask.sum() => NOTHING
    0 - agrees (80 inputs | not compared: d_values
junk left at padding
    whiten: 1e-8) * mask => 1e-8)
    0 - agrees (80 inputs | at padding yours is not 0
a gradient at padding
    value_loss: 2 * error / => 2 * (values - returns) /
    1 (1,2) first in d_values, row 0, token 1: ours 0, yours | with 0 at padding they agree: yours
        reads what stands there
another answer each time
    kl_penalty: d = logprobs
        => calls = globals().setdefault("calls", []); calls.append(0); d = (len(calls) % 5 == 0) +
        logprobs
    1 - kl_penalty DIFFERS from one call to the next, on the same input
nothing but NotImplementedError
    whiten: real = => raise NotImplementedError; real =
    2 - whiten not compared: yours raises NotImplementedError
"""
SHORT = {
    "NO_K2": "import numpy as np\ndef no(k):\n    if k != 'k1': raise NotImplementedError",
    "NOTHING": "",
    "MEAN": "(error**2).sum() / mask.sum(), 2 * error / mask.sum()",
    "SHARE": "share = mask / mask.sum(axis=1, keepdims=True) / len(mask)",
    "WHITENED": "z = advantages[mask > 0]; return (advantages - z.mean()) / (z.std(ddof=1)",
    "PAST": "past = np.roll(mask, 1, 1); past[:, 0] = 1; values = values * past",
    "LAST": "np.flatnonzero(mask[row])[-1]",
    "AFTER": "min(np.flatnonzero(mask[row])[-1] + 1, len(mask[0]) - 1)",
}


def read(table):
    """{name: the lines under it} of a table; a line is continued by a deeper indent."""
    blocks = re.findall(r"^(\S.*)\n((?: {4}.*\n)+)", table.replace("\n" + 8 * " ", " "), re.M)
    return {name: [line[4:] for line in lines.splitlines()] for name, lines in blocks}


BUGS, CONVENTIONS, CASES = map(read, (BUGS, CONVENTIONS, CASES))


def changed(line):
    """(function, source) of a line of a table."""
    name, _, edits = line.partition(": ")
    source = FUNCTIONS[name]
    for edit in edits.split(" // "):
        old, new = (SHORT.get(x, x) for x in edit.split(" => "))
        new = re.sub("|".join(SHORT), lambda word: SHORT[word[0]], new)
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return name, source


SLOWLY = """
from conftest import slow_gae as gae, slow_grpo as grpo_advantages, slow_kl as kl_penalty
from conftest import slow_ppo as ppo_loss, slow_rewards as shape_rewards, slow_whiten as whiten
from conftest import slow_rloo as rloo_advantages, slow_value_loss as value_loss
"""
RANDOM = {"core_loop", "sample_prompts", "generate", "collect_preferences", "train_reward_model"}
NOT_COMPARED = RANDOM | {"demonstrations", "fine_tune"}
OURS_ALONE = {"logprobs", "clipped_value_loss"}


@pytest.fixture
def run(tmp_path, capsys):
    """Compare a module with this source. Returns the exit code, the report, and it in one line."""

    def compared(source, *options):
        path = tmp_path / "my_ppo.py"
        path.write_text(source)
        code = compare.main([str(path), *options])
        report = capsys.readouterr().out
        assert max(map(len, report.splitlines()), default=0) <= 80
        return code, report, " ".join(report.split())

    return compared


def smallest_input(report):
    """The arguments in a report, by name: they can be pasted."""
    source = textwrap.dedent("".join(re.findall(r"^    \w+ = .*\n(?:     .*\n)*", report, re.M)))
    exec(source, given := {"np": np})
    return {name: x for name, x in given.items() if name not in ("np", "__builtins__")}


@pytest.mark.parametrize("source, extra", [(THEIRS, []), (SLOWLY, ["--strict"])])
def test_another_right_ppo_agrees(source, extra, run):
    code, report, _ = run(source, "--cases", "60", *extra)
    assert code == 0
    digits = r"\d\d digits in float64, \d in float32"
    agreeing = re.findall(rf"^  (\w+) +agrees \(60 inputs, {digits}\)$", report, re.M)
    assert agreeing == [x for x in compare.COMPARED if re.search(rf"(def|as) {x}\b", source)]


def test_every_function_of_arrays_is_compared(run):
    source = Path(loop.__file__).read_text(encoding="utf-8")
    public = set(re.findall(r"^ *# ANCHOR: (\w+)$", source, re.M))
    assert public - set(compare.COMPARED) <= NOT_COMPARED
    assert set(compare.COMPARED) - public == OURS_ALONE
    code, _, report = run(source, "--cases", "20", "--strict")
    assert code == 0
    compared = len(compare.COMPARED) - len(OURS_ALONE)
    assert report.count("agrees (20 inputs, 15 digits in") == compared


@pytest.mark.parametrize("bug", BUGS)
def test_a_classic_bug_is_found_and_made_small(bug, run):
    name, source = changed(*BUGS[bug])
    code, report, _ = run(source, "--cases", "80")
    assert code == 1
    assert re.search(rf"^  {name:<18} DIFFERS$", report, re.M)
    given = smallest_input(report)
    assert {len(x) for x in given.values() if isinstance(x, np.ndarray)} == {1}
    assert given.get("mask", np.ones(1)).size <= 2 + (name == "whiten")
    exec(source, theirs := {})
    with np.errstate(all="ignore"):
        answers = [f(*given.values()) for f in (getattr(loop, name), theirs[name])]
    ours, yours = (np.hstack([np.ravel(x) for x in answer]) for answer in answers)
    assert not np.allclose(ours, yours)
    assert np.isfinite(yours).all()


@pytest.mark.parametrize("words", CONVENTIONS)
def test_a_known_convention_is_no_mistake_and_is_named(words, run):
    name, source = changed(*CONVENTIONS[words])
    code, _, report = run(source, "--cases", "80")
    assert code == 0
    assert f"{name} agrees, but for: " in report
    assert words in report


@pytest.mark.parametrize("case", CASES)
def test_a_case_from_public_code_gets_its_verdict(case, run):
    edits, verdict = CASES[case]
    expected, shape, sentences = verdict.split(" ", 2)
    code, report, words = run(changed(edits)[1], "--cases", "80")
    assert code == int(expected)
    assert [x for x in sentences.split(" | ") if x not in words] == []
    if shape != "-":
        arrays = [x for x in smallest_input(report).values() if np.ndim(x) == 2]
        assert {str(x.shape).replace(" ", "") for x in arrays} == {shape}


@pytest.mark.parametrize("case", ["NaN at padding", "a hole in the mask"])
def test_strict(case, run):
    assert run(changed(CASES[case][0])[1], "--strict", "--cases", "50")[0] == 1


WORD_FOR_WORD = """my_ppo.py beside rlhf_loop_pseudo.py
  grpo_advantages    DIFFERS

grpo_advantages: they differ here:
    rewards = np.array([[0.], [1.]])
    mask = np.array([[1.], [1.]])
    group_size = 2

                ours          yours
    advantages  [[-0.7071]    [[0.7071]
                 [ 0.7071]]    [2.1213]]

    first in advantages, row 0, token 0: ours -0.707106781, yours 0.707105781
"""


def test_a_difference_word_for_word(run):
    source = changed("grpo_advantages: totals - totals.mean => totals + totals.mean")[1]
    assert run(source)[:2] == (1, WORD_FOR_WORD)


def test_other_names(run):
    source = f"""{FUNCTIONS["gae"].replace("def gae", "def compute")}
critic_gradients = lambda *arguments: ({{}}, 0.0)
class PPO:
    kl = staticmethod(lambda new, ref, estimator: new - ref)
    def loss(self, values, returns, mask):
        return (((values - returns) * mask) ** 2).sum() / mask.sum()
"""
    maps = "gae=compute", "kl_penalty=PPO.kl", "value_loss=PPO.loss"
    options = [word for pair in maps for word in ("--map", pair)]
    code, _, report = run(source, *options, "--cases", "50")
    assert code == 1
    verdicts = "critic_gradients DIFFERS", "gae agrees", "kl_penalty DIFFERS", "value_loss agrees"
    assert [words for words in verdicts if f" {words} " not in report] == []


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("import no_such", "", "my_ppo.py cannot be imported: ModuleNotFoundError: No module"),
        ("import sys; sys.exit(1)", "", "my_ppo.py cannot be imported: SystemExit: 1"),
        ("def unrelated(): pass", "", "my_ppo.py defines none of score_responses, "),
        ("from rlhf_loop_pseudo import gae", "", "my_ppo.py defines none of "),
        (THEIRS, "--map gea=gae", "--map gea=gae: there is no 'gea' here"),
        (THEIRS, "--map gae=advantages", "has no attribute 'advantages'"),
        (THEIRS, "--map gae=PPO.gae", "has no attribute 'PPO'"),
        (THEIRS, "--cases 0", "--cases 0: at least 1"),
    ],
)
def test_nothing_to_compare(source, options, words, tmp_path, capsys):
    (tmp_path / "my_ppo.py").write_text(source)
    assert compare.main([str(tmp_path / "my_ppo.py"), *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("compare.py: ") and err.count("\n") == 1
    assert words in err


def in_a_process(source, *arguments):
    """The same tool in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(compare.__file__).parent)}
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("module, code", [("numpy", 2), ("rich", 2), ("hypothesis", 0)])
def test_a_missing_module_is_said_in_one_sentence(module, code, tmp_path):
    """Training environments seldom have hypothesis: it is not needed."""
    path = tmp_path / "my_ppo.py"
    path.write_text(FUNCTIONS["whiten"])
    start = f"import sys; sys.modules[{module!r}] = None; import compare"
    done = in_a_process(f"{start}; sys.exit(compare.main(sys.argv[1:]))", path, "--cases", "20")
    assert done.returncode == code
    assert re.fullmatch(rf"compare\.py: .*{module}.*\n" if code else "", done.stderr)


RIGHT = """
import torch

def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip):
    real = mask > 0
    ratio = torch.exp(torch.where(real, new_logprobs, 0) - torch.where(real, old_logprobs, 0))
    advantages = torch.where(real, advantages, 0)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-ratio * advantages, -clipped * advantages)[real].mean()

def value_loss(values, returns, mask):
    values *= mask
    loss = torch.nn.functional.mse_loss(values[mask.bool()], returns[mask.bool()])
    loss.backward()
    return loss

def rloo_advantages(rewards, mask, group_size):
    if rewards.dtype != torch.float32:
        raise RuntimeError("expected scalar type Float but found Double")
    totals = torch.where(mask > 0, rewards, 0).sum(1).reshape(-1, group_size)
    others = (totals.sum(1, keepdim=True) - totals) / (group_size - 1)
    return (totals - others).reshape(-1, 1) * mask

def kl_penalty(logprobs, ref_logprobs, estimator):
    d = (logprobs - ref_logprobs).bfloat16()
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
"""
WRONG = f"""{RIGHT}
right = ppo_loss

def ppo_loss(new_logprobs, *others):
    return right(new_logprobs.detach(), *others) + 0 * new_logprobs.sum()

def value_loss(values, returns, mask):
    return (((values - returns) * mask) ** 2).sum().item() / mask.sum().item()
"""


def test_torch_functions_are_compared_gradients_included(tmp_path):
    """In a process of its own: importing torch changes what every module gets."""
    pytest.importorskip("torch")
    paths = [tmp_path / "right.py", tmp_path / "wrong.py"]
    for path, source in zip(paths, (RIGHT, WRONG)):
        path.write_text(source)
    start = "import sys, compare\nfor x in sys.argv[1:]: print(compare.main([x, '--cases', '60']))"
    done = in_a_process(start, *paths)
    assert not done.stderr
    right, wrong = (" ".join(x.split()) for x in done.stdout.split("wrong.py"))
    digits = r"agrees \(60 inputs, \d\d digits in float64, \d in float32\)"
    for pattern in (
        rf"ppo_loss {digits} not compared: ratio",
        rf"value_loss {digits} yours overwrites its argument values",
        r"rloo_advantages agrees \(60 inputs, \d digits in float32\) yours refuses float64",
        r"kl_penalty agrees \(60 inputs, within 5%, as bfloat16 goes\)",
    ):
        assert re.search(pattern, right)
    assert right.endswith(" 0")
    for loss, argument in (("ppo_loss", "new_logprobs"), ("value_loss", "values")):
        assert f"{loss} DIFFERS" in wrong
        words = f"the gradient of your loss with respect to {argument} is 0, ours is not"
        assert words in wrong
    assert wrong.endswith(" 1")
