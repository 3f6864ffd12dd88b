"""How fast the loop is, how much memory it takes and how its cost grows. No test and no gate.

    python tests/benchmark.py            the script against itself
    python tests/benchmark.py --torch    and against the same in PyTorch (CPU, eager)
    python tests/benchmark.py --against old.py    and a training against another version's

Before anything is timed, the step in PyTorch is asserted to compute the same numbers. A ratio is
the median over rounds in which both sides take turns, after a warm-up: it carries over to other
machines. Processor time is measured, with one thread a side: a busy machine disturbs it less than
the clock's. Sizes are the defaults unless a row names others.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

for library in ("OPENBLAS", "MKL", "OMP"):
    os.environ[f"{library}_NUM_THREADS"] = "1"  # before numpy, which reads it once

import numpy as np

loop = torch = None  # imported where they are needed: each is timed without the other
SCRIPT = Path(__file__).resolve().parents[1] / "rlhf_loop_pseudo.py"

# Prints the peak memory of the one command that it runs, as RUSAGE_CHILDREN is the largest.
PEAK = """import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL, check=True)
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6)"""


def seconds(action):
    """Processor time of one call, user and system, of this process and of its children."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    start = sum(sum(resource.getrusage(who)[:2]) for who in whose)
    action()
    return sum(sum(resource.getrusage(who)[:2]) for who in whose) - start


def ratios(rounds, base, *actions):
    """Time of each action as a multiple of base's: medians over rounds in which all take turns."""
    times = [[seconds(action) for action in (base, *actions)] for _ in range(1 + rounds)]
    return np.median([np.divide(row[1:], row[0]) for row in times[1:]], axis=0)  # 0 warms up


def run(*command):
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)


def peak(*command):
    """Peak memory of such a command in MB; it hardly varies, so one run is enough."""
    return float(subprocess.check_output([sys.executable, "-c", PEAK, *command]))


def show(name, measured, limit, unit="x"):
    digits = {"x": 2, " MB": 0}[unit]
    verdict = "" if limit is None else "within" if measured <= limit else "ABOVE"
    limit = "" if limit is None else f"{limit:g}{unit}"
    print(f"{name:58}{measured:>9.{digits}f}{unit:3}{limit:>9}  {verdict}", flush=True)


def gradient_inputs(config):
    """Arguments of actor_gradients, at random."""
    rng, length = np.random.default_rng(config.seed), config.prompt_length + config.response_length
    actor = loop.init_models(config, rng).actor
    tokens = rng.integers(0, config.vocab_size - 1, (config.batch_size, length))
    prompts, responses = np.split(tokens, [config.prompt_length], axis=1)
    logprobs = loop.token_logprobs(actor, prompts, responses)
    advantages = rng.standard_normal(logprobs.shape, dtype=np.float32)
    return actor, prompts, responses, logprobs, advantages, np.ones_like(logprobs), config.clip


def fastest_floor(count, head):
    """Only what no actor_gradients can spare, in the slices that suit this machine best."""
    states = np.random.default_rng(0).standard_normal((count, len(head)), dtype=head.dtype)

    def floor(n, v):
        for row in range(0, len(states), n):
            for column in range(0, head.shape[1], v):
                rows, columns = states[row : row + n], head[:, column : column + v]
                matrix = rows @ columns  # (n, D) @ (D, v)
                np.exp(matrix, out=matrix)
                rows.T @ matrix  # (D, n) @ (n, v)
                matrix @ columns.T  # (n, v) @ (v, D)

    sizes = 500_000, 1_000_000, 2_000_000  # of all columns, and of all rows
    floors = [partial(floor, n // head.shape[1], head.shape[1]) for n in sizes]
    floors += [partial(floor, count, n // count) for n in sizes]
    return floors[np.argmin([1, *ratios(5, *floors)])]


def train(config):
    rng = np.random.default_rng(config.seed)
    list(loop.core_loop(loop.init_models(config, rng), config, rng))


def as_command_line_allocates():
    """What the script's main does for the allocator, here for calls in this process."""
    np.empty(32_000_000, dtype=np.uint8)


def torch_model(vocab_size, width, out_width, scale=1.0):
    sizes = ("embed", vocab_size, width, 0.1), ("context_proj", width, width, 5 / width**0.5)
    sizes += (("head", width, out_width, scale / width**0.5),)
    return {n: (torch.rand(r, c) - 0.5) * 12**0.5 * deviation for n, r, c, deviation in sizes}


def torch_models(c):
    """Actor, critic, reward model and reference, as init_models makes them; two optimizers."""
    reference, noise = (torch_model(c.vocab_size, c.width, c.vocab_size) for _ in range(2))
    actor = {name: reference[name] + c.start_drift * noise[name] for name in reference}
    reward_model = {**reference, "head": torch_model(1, c.width, 1, 2.5)["head"]}
    critic = {name: weights.clone() for name, weights in reference.items()}
    critic["head"] = c.start_drift * torch_model(1, c.width, 1)["head"]
    return (actor, critic, reward_model, reference), torch_optimizers(actor, critic, c)


def torch_optimizers(actor, critic, c):
    for weights in (*actor.values(), *critic.values()):
        weights.requires_grad_()
    return [torch.optim.Adam(x.values(), c.learning_rate) for x in (actor, critic)]


def torch_hidden(model, tokens):
    """backbone. (B, S) -> (B, S, D)."""
    x = model["embed"][tokens]
    roots = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).sqrt()[:, None]
    return torch.tanh(x + torch.cumsum(x, 1) / roots @ model["context_proj"])


def torch_outputs(model, prompts, responses):
    """Logits (B, T, V) or values (B, T, 1)."""
    hidden = torch_hidden(model, torch.cat([prompts, responses[:, :-1]], 1))
    return hidden[:, prompts.shape[1] - 1 :] @ model["head"]


def torch_logprobs(model, prompts, responses):
    logprobs = torch.log_softmax(torch_outputs(model, prompts, responses), -1)
    return logprobs.gather(2, responses[..., None])[..., 0]


def torch_generate(actor, prompts, c):
    """generate. Returns responses, mask, logprobs, (B, T) each."""
    context_sum, token, eos_token = actor["embed"][prompts].sum(1), prompts[:, -1], c.vocab_size - 1
    running, columns = torch.ones(len(prompts), dtype=torch.bool), []
    for t in range(c.response_length):
        context = context_sum / (prompts.shape[1] + t) ** 0.5
        hidden = torch.tanh(actor["embed"][token] + context @ actor["context_proj"])
        logprobs = torch.log_softmax(hidden @ actor["head"], -1)  # (B, D) -> (B, V)
        token = torch.where(running, torch.multinomial(logprobs.exp(), 1)[:, 0], eos_token)
        chosen = logprobs.gather(1, token[:, None])[:, 0]
        columns.append((token, running.float(), chosen * running))
        running = running & (token != eos_token)
        context_sum = context_sum + actor["embed"][token]
    return [torch.stack(column, 1) for column in zip(*columns)]


def torch_advantages(rewards, values, mask, c):
    """gae and whiten. Returns whitened advantages and returns, (B, T) both."""
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
    errors = (rewards + c.gamma * following - values) * mask
    advantages, last = torch.zeros_like(values), 0
    for t in reversed(range(values.shape[1])):
        advantages[:, t] = last = errors[:, t] + c.gamma * c.lam * last
    advantages *= mask
    real = advantages[mask.bool()]
    whitened = (advantages - real.mean()) / (real.var() + 1e-8).sqrt() * mask
    return whitened, advantages + values


def torch_policy_loss(actor, prompts, responses, old_logprobs, advantages, mask, clip):
    """ppo_loss of the actor as it is now, and the ratio."""
    log_ratio = (torch_logprobs(actor, prompts, responses) - old_logprobs) * mask
    ratio = torch.exp(log_ratio)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(gain * mask).sum() / mask.sum(), ratio


def torch_experience(models, c):
    """Steps 1 to 6. Returns their arrays by name."""
    actor, critic, reward_model, reference = models
    prompts = torch.randint(0, c.vocab_size - 1, (c.batch_size, c.prompt_length))
    responses, mask, old_logprobs = torch_generate(actor, prompts, c)
    last = prompts.shape[1] + mask.sum(1).long() - 1
    rows, tokens = torch.arange(len(last)), torch.cat([prompts, responses], 1)
    scores = (torch_hidden(reward_model, tokens)[rows, last] @ reward_model["head"])[:, 0]
    ref_logprobs = torch_logprobs(reference, prompts, responses) * mask
    kl = old_logprobs - ref_logprobs
    rewards = -c.beta * kl
    rewards[rows, last - prompts.shape[1]] += scores
    values = torch_outputs(critic, prompts, responses)[..., 0] * mask
    whitened, returns = torch_advantages(rewards, values, mask, c)
    seen = {"prompts": prompts, "responses": responses, "mask": mask, "old_logprobs": old_logprobs}
    seen |= {"ref_logprobs": ref_logprobs, "kl": kl, "scores": scores, "rewards": rewards}
    return seen | {"values": values, "whitened": whitened, "returns": returns}


def torch_update(models, optimizers, seen, c):
    actor, critic = models[:2]
    batch = "prompts", "responses", "old_logprobs", "whitened", "mask"
    loss, ratio = torch_policy_loss(actor, *(seen[name] for name in batch), c.clip)
    values = torch_outputs(critic, seen["prompts"], seen["responses"])[..., 0]
    error = (((values - seen["returns"]) * seen["mask"]) ** 2).sum() / seen["mask"].sum()
    for optimizer, objective in zip(optimizers, (loss, error)):
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    return loss.detach(), error.detach(), ratio.detach()


def torch_train(c):
    models, optimizers = torch_models(c)
    for step in range(c.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = c.learning_rate * (1 - step / c.steps)
        with torch.no_grad():
            seen = torch_experience(models, c)
        for _ in range(c.ppo_epochs):
            torch_update(models, optimizers, seen, c)


def torch_walk_through(c):
    """One step, with all that takes time of what the walk-through shows."""
    models, optimizers = torch_models(c)
    with torch.no_grad():
        seen = torch_experience(models, c)
        tokens = seen["prompts"], seen["responses"]
        logits = torch_outputs(models[0], *tokens)
        log_p = torch.log_softmax(logits, -1)
        log_q = torch.log_softmax(torch_outputs(models[3], *tokens), -1)
        print(logits.shape, ((log_p.exp() * (log_p - log_q)).sum(-1) * seen["mask"]).mean())
        del logits, log_p, log_q
    for name, array in seen.items():
        print(name, tuple(array.shape), array.ravel()[:3].tolist(), array.double().mean())
    for _ in range(c.ppo_epochs):
        loss, error, ratio = torch_update(models, optimizers, seen, c)
        print(ratio.min(), ratio.max(), loss, error)
    with torch.no_grad():
        after = torch_logprobs(models[0], *tokens) * seen["mask"]
    print("log probabilities", (after - seen["old_logprobs"]).sum(1).tolist())


def assert_same_numbers(config):
    """Steps 3 to 7 in PyTorch, on the tokens and weights of one of our steps, give its numbers."""
    models = loop.prepare(config)
    copies = [{k: torch.tensor(w) for k, w in model.items()} for model in models]
    step = next(loop.core_loop(models, config))
    ours = {k: torch.from_numpy(x) for k, x in vars(step).items() if isinstance(x, np.ndarray)}
    actor, critic, reward_model, reference = copies
    tokens, mask = (ours["prompts"], ours["responses"]), ours["mask"]
    with torch.no_grad():
        last = len(tokens[0][0]) + mask.sum(1).long() - 1
        hidden = torch_hidden(reward_model, torch.cat(tokens, 1))
        found = {
            "scores": (hidden[torch.arange(len(last)), last] @ reward_model["head"])[:, 0],
            "old_logprobs": torch_logprobs(actor, *tokens) * mask,
            "ref_logprobs": torch_logprobs(reference, *tokens) * mask,
            "values": torch_outputs(critic, *tokens)[..., 0] * mask,
        }
        used, returns = torch_advantages(ours["rewards"], found["values"], mask, config)
    found |= {"loss_advantages": used, "returns": returns}
    batch = {**ours, "whitened": ours["loss_advantages"]}
    optimizers = torch_optimizers(actor, critic, config)
    updates = [torch_update(copies, optimizers, batch, config) for _ in range(config.ppo_epochs)]
    losses = zip(*[(loss, error) for loss, error, _ in updates])
    found |= dict(zip(("actor_loss", "critic_loss"), map(torch.stack, losses)))
    for name, array in found.items():
        np.testing.assert_allclose(array, ours[name], rtol=2e-3, atol=2e-4, err_msg=name)
    for name, weights in models.actor.items():
        theirs = actor[name].detach().numpy()
        np.testing.assert_allclose(theirs, weights, atol=2 * config.learning_rate, err_msg=name)


def show_torch_rows(config, inputs):
    """What is compared with PyTorch; inputs are those of actor_gradients."""
    assert_same_numbers(config)
    settings = vars(config) | {"start_drift": config.start_drift}
    same_step = __file__, "--torch-step", json.dumps(settings)
    measured = ratios(5, partial(run, *same_step), partial(run, str(SCRIPT)))
    show("walk-through / the same step in PyTorch, whole processes", *measured, 0.3)
    show("peak memory of that step in PyTorch", peak(*same_step), None, " MB")
    actor = {name: torch.tensor(w, requires_grad=True) for name, w in inputs[0].items()}
    prompts, *rest = map(torch.from_numpy, inputs[1:-1])

    def torch_gradients():
        loss, _ = torch_policy_loss(actor, prompts, *rest, config.clip)
        torch.autograd.grad(loss, list(actor.values()))

    measured = ratios(7, torch_gradients, partial(loop.actor_gradients, *inputs))
    show("actor_gradients / PyTorch", *measured, 0.5)
    letters = loop.configure("letters", steps=20)
    measured = ratios(7, partial(torch_train, letters), partial(train, letters))
    show("the loop, preset letters / PyTorch", *measured, 0.7)


def show_against(other):
    """A whole training on letters against that of another version of the script."""
    flags = "--preset", "letters", "--steps", "200"
    measured = ratios(3, partial(run, other, *flags), partial(run, str(SCRIPT), *flags))
    show("a training on letters / that of the other version", *measured, 1.0)


def main(against=None):
    as_command_line_allocates()
    print(f"{f'numpy {np.__version__}':58}{'measured':>12}{'limit':>9}", flush=True)
    inputs = gradient_inputs(loop.Config())
    if torch:
        show_torch_rows(loop.Config(), inputs)
    floor = fastest_floor(inputs[2].size, inputs[0]["head"])
    measured = ratios(15, floor, partial(loop.actor_gradients, *inputs))
    show("actor_gradients / three products and an exp", *measured, 2.2)
    show("walk-through, peak memory", peak(str(SCRIPT)), 200, " MB")
    if against:
        show_against(against)
    half = {"batch_size": 2, "prompt_length": 32, "response_length": 64, "vocab_size": 25128}
    names = "batch_size", "response_length", "vocab_size"
    sizes = half, *({**half, name: 2 * half[name]} for name in names)
    measured = ratios(5, *(partial(train, loop.Config(**size, steps=2)) for size in sizes))
    for letter, ratio in zip("BTV", measured):
        show(f"the loop when {letter} doubles, from half of all sizes", ratio, 2.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How fast the loop is.", allow_abbrev=False)
    parser.add_argument("--torch", action="store_true", help="compare with PyTorch, if installed")
    parser.add_argument("--against", metavar="FILE", help="another version of the script")
    parser.add_argument("--torch-step", help=argparse.SUPPRESS)  # that whole process, by itself
    options = parser.parse_args()
    if options.torch or options.torch_step:
        torch = importlib.import_module("torch")
        torch.set_num_threads(1)
    if options.torch_step:
        torch_walk_through(argparse.Namespace(**json.loads(options.torch_step)))
    else:
        sys.path.insert(0, str(SCRIPT.parent))
        loop = importlib.import_module("rlhf_loop_pseudo")
        main(options.against)
