"""How fast the loop is and how its cost grows, as ratios taken in one run. No test and no gate.

    python tests/benchmark.py            the module against itself
    python tests/benchmark.py --torch    and against the same step in PyTorch (CPU, eager, as many threads)

A ratio is the median over rounds in which what is compared takes turns, after a warm-up: it means
the same on any machine, where a time in seconds would not. Sizes are the module's defaults
unless a row names others. Below the aim is good, above the limit is not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[1] / "rlhf_loop_pseudo.py"
sys.path.insert(0, str(SCRIPT.parent))
loop = importlib.import_module("rlhf_loop_pseudo")
# runs one command and prints its peak memory; RUSAGE_CHILDREN is the maximum of all children, so this has only one
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)"""


# ------------------------------------------------------------------ measuring


def seconds(action):
    """Time of one call, begun when the threads of the one before no longer spin."""
    time.sleep(0.05)
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratios(rounds, base, *actions):
    """Time of each action as a multiple of base's: medians over rounds in which all take turns."""
    for action in (base, *actions):
        action()
    times = np.array([[seconds(action) for action in (base, *actions)] for _ in range(rounds)])
    return np.median(times[:, 1:] / times[:, :1], axis=0)


def child(*arguments):
    """A function that runs python with these arguments, its output thrown away."""
    return lambda: subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)


def peak(*arguments):
    """Peak memory in MB of the module run with these arguments: the median of three."""
    command = [sys.executable, "-c", PEAK, sys.executable, str(SCRIPT), *arguments]
    return np.median([float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(3)])


def show(name, measured, limit, aim, unit="x"):
    """Print one row, each number with the unit behind it."""
    verdict = "aim reached" if measured <= aim else "within the limit" if measured <= limit else "OVER THE LIMIT"
    digits = 2 if unit == "x" else 0
    cells = [f"{measured:.{digits}f}{unit}", f"{limit:g}{unit}", f"{aim:g}{unit}"]
    print(f"{name:58}{''.join(cell.rjust(9) for cell in cells)}  {verdict}", flush=True)


# ------------------------------------------------------------------ the module against itself


def gradient_inputs(config):
    """Arguments of actor_gradients for a random batch: what generate returned, and advantages."""
    rng = np.random.default_rng(config.seed)
    actor = loop.init_models(config, rng).actor
    prompts = loop.sample_prompts(rng, config.batch_size, config.prompt_length, config.vocab_size)
    responses, mask, logprobs, _ = loop.generate(
        actor, prompts, config.response_length, rng, config.vocab_size - 1, keep_logits=False
    )
    advantages = rng.standard_normal(mask.shape, dtype=np.float32) * mask
    return actor, prompts, responses, logprobs, advantages, mask, config.clip


def gradient_floor(states, head):
    """A function that does only what no form of actor_gradients can spare: three products and an exp, in slices."""
    rows = max(1, loop.SLICE // head.shape[1])
    buffer, d_head = np.empty((rows, head.shape[1]), head.dtype), np.empty_like(head)

    def floor():
        for h in np.split(states, range(rows, len(states), rows)):
            matrix = np.matmul(h, head, out=buffer[: len(h)])  # (n, D) @ (D, V)
            np.exp(matrix, out=matrix)
            np.matmul(h.T, matrix, out=d_head)  # (D, n) @ (n, V)
            matrix @ head.T  # (n, V) @ (V, D)

    return floor


def drained(**sizes):
    """A function that runs two steps of core_loop at these sizes; with learning rate 0, the same two each time."""
    config = loop.Config(**sizes, steps=2, learning_rate=0.0)
    models = loop.init_models(config, np.random.default_rng(config.seed))
    return lambda: list(loop.core_loop(models, config, np.random.default_rng(config.seed)))


def growth(rounds=5):
    """Time of the loop when B, T or V doubles, from half the default sizes, as multiples: three numbers."""
    half = {"batch_size": 2, "prompt_length": 32, "response_length": 64, "vocab_size": 25128}
    doubled = [drained(**{**half, name: 2 * half[name]}) for name in ("batch_size", "response_length", "vocab_size")]
    return ratios(rounds, drained(**half), *doubled)


# ------------------------------------------------------------------ the same in PyTorch


def tensors(model, learning=True):
    """A model's arrays as tensors."""
    return {name: torch.tensor(array, requires_grad=learning) for name, array in model.items()}


def torch_states(model, tokens):
    """backbone. (B, S) -> (B, S, D)."""
    x = model["embed"][tokens]
    context = torch.cumsum(x, 1) / torch.sqrt(torch.arange(1, x.shape[1] + 1, dtype=x.dtype))[:, None]
    return torch.tanh(x + context @ model["mix"])


def torch_response_states(model, prompts, responses):
    """response_states. Returns (B, T, D)."""
    return torch_states(model, torch.cat([prompts, responses[:, :-1]], 1))[:, prompts.shape[1] - 1 :]


def torch_logprobs(model, prompts, responses):
    """token_logprobs. Returns (B, T)."""
    logits = torch_response_states(model, prompts, responses) @ model["head"]  # (B, T, D) -> (B, T, V)
    return torch.log_softmax(logits, -1).gather(2, responses[..., None])[..., 0]


def torch_values(critic, prompts, responses):
    """critic_values. Returns (B, T)."""
    return (torch_response_states(critic, prompts, responses) @ critic["head"])[..., 0]


def torch_generate(actor, prompts, length, eos_token):
    """generate with keep_logits=False. Returns (responses, mask, logprobs), (B, T) each."""
    total, token = actor["embed"][prompts].sum(1), prompts[:, -1]
    running, columns = torch.ones(len(prompts), dtype=torch.bool), []
    for t in range(length):
        context = total / (prompts.shape[1] + t) ** 0.5
        hidden = torch.tanh(actor["embed"][token] + context @ actor["mix"])
        logprobs = torch.log_softmax(hidden @ actor["head"], -1)  # (B, D) -> (B, V)
        token = torch.where(running, torch.multinomial(logprobs.exp(), 1)[:, 0], eos_token)
        columns.append((token, running.float(), logprobs.gather(1, token[:, None])[:, 0] * running))
        running = running & (token != eos_token)
        total = total + actor["embed"][token]
    return [torch.stack(column, 1) for column in zip(*columns)]


def torch_policy_loss(actor, prompts, responses, logprobs, advantages, mask, clip):
    """ppo_loss of the actor as it is now."""
    ratio = torch.exp((torch_logprobs(actor, prompts, responses) - logprobs) * mask)
    return -(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages) * mask).sum() / mask.sum()


def torch_step(models, config):
    """Steps 1 to 6 of the loop. Returns what step 7 needs: prompts, responses, mask, logprobs, advantages, returns."""
    actor, critic, reward_model, reference = models
    prompts = torch.randint(0, config.vocab_size - 1, (config.batch_size, config.prompt_length))
    responses, mask, logprobs = torch_generate(actor, prompts, config.response_length, config.vocab_size - 1)
    rows, lengths = torch.arange(config.batch_size), mask.sum(1).long()
    last = torch_states(reward_model, torch.cat([prompts, responses], 1))[rows, config.prompt_length + lengths - 1]
    rewards = -config.beta * (logprobs - torch_logprobs(reference, prompts, responses)) * mask
    rewards[rows, lengths - 1] += torch.sigmoid((last @ reward_model["head"])[:, 0])
    values = torch_values(critic, prompts, responses) * mask
    advantages, next_value, next_advantage = torch.zeros_like(values), torch.zeros(len(rows)), torch.zeros(len(rows))
    for t in reversed(range(config.response_length)):
        delta = rewards[:, t] + config.gamma * next_value - values[:, t]
        advantages[:, t] = (delta + config.gamma * config.lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t], advantages[:, t]
    centered = (advantages - advantages.sum() / mask.sum()) * mask
    whitened = centered / torch.sqrt((centered**2).sum() / (mask.sum() - 1) + 1e-8)
    return prompts, responses, mask, logprobs, whitened, advantages + values


def torch_train(config):
    """train from fresh models, without its metrics."""
    models = loop.init_models(config, np.random.default_rng(config.seed))
    models = [tensors(model, learning) for model, learning in zip(models, (True, True, False, False))]
    optimizers = [torch.optim.Adam(model.values(), lr=config.learning_rate) for model in models[:2]]
    for step in range(config.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
        with torch.no_grad():
            prompts, responses, mask, logprobs, whitened, returns = torch_step(models, config)
        for _ in range(config.ppo_epochs):
            actor_loss = torch_policy_loss(models[0], prompts, responses, logprobs, whitened, mask, config.clip)
            critic_loss = (((torch_values(models[1], prompts, responses) - returns) * mask) ** 2).sum() / mask.sum()
            for optimizer, loss in zip(optimizers, (actor_loss, critic_loss)):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def numpy_train(config):
    """train from fresh models."""
    rng = np.random.default_rng(config.seed)
    for _ in loop.train(loop.init_models(config, rng), config, rng):
        pass


def show_torch_rows(config, inputs):
    """The rows that compare a part of the loop with PyTorch in this process; inputs are actor_gradients'."""
    torch.set_num_threads(os.cpu_count())
    actor, rest = tensors(inputs[0]), [torch.tensor(array) for array in inputs[1:-1]]
    parameters = list(actor.values())

    def torch_gradients():
        return torch.autograd.grad(torch_policy_loss(actor, *rest, config.clip), parameters)

    def torch_sampling():
        with torch.no_grad():
            return torch_generate(actor, rest[0], config.response_length, config.vocab_size - 1)

    def numpy_sampling():
        rng, eos_token = np.random.default_rng(0), config.vocab_size - 1
        return loop.generate(*inputs[:2], config.response_length, rng, eos_token, keep_logits=False)

    show("actor_gradients / PyTorch", *ratios(5, torch_gradients, lambda: loop.actor_gradients(*inputs)), 0.5, 0.3)
    show("generate / PyTorch", *ratios(5, torch_sampling, numpy_sampling), 0.4, 0.2)
    letters = loop.Config(**loop.PRESETS["letters"], steps=60, drift=0.0)
    measured = ratios(5, lambda: torch_train(letters), lambda: numpy_train(letters))
    show("training, preset letters / PyTorch", *measured, 1, 0.5)


def show_memory_rows():
    """The rows about peak memory."""
    if sys.platform == "win32":
        print("peak memory: skipped, Python's resource module does not exist on Windows")
        return
    show("walk-through, peak memory", peak(), 400, 250, " MB")
    small = ("--steps", "2", "--prompt-length", "16", "--response-length", "16", "--batch-size")
    show("2 steps of P 16, T 16: peak, B 64 less B 4", peak(*small, "64") - peak(*small, "4"), 80, 20, " MB")


def main():
    """Print the table."""
    print(f"{'':58}{'measured':>9}{'limit':>9}{'aim':>9}")
    config = loop.Config()
    if torch:
        measured = ratios(5, child("-c", "import torch"), child(str(SCRIPT)))
        show("walk-through, the process / import torch", *measured, 0.8, 0.4)
    inputs = gradient_inputs(config)
    actor, prompts, responses, *_, mask, _ = inputs
    floor = gradient_floor(loop.response_states(actor, prompts, responses)[mask != 0], actor["head"])
    measured = ratios(9, floor, lambda: loop.actor_gradients(*inputs))
    show("actor_gradients / its three products and one exp", *measured, 1.6, 1.25)
    if torch:
        show_torch_rows(config, inputs)
    show_memory_rows()
    for letter, measured in zip("BTV", growth()):
        show(f"the loop when {letter} doubles, from half the sizes", measured, 2.3, 2.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ratios that say how fast the loop is.", allow_abbrev=False)
    parser.add_argument("--torch", action="store_true", help="compare with PyTorch, which has to be installed")
    try:
        torch = importlib.import_module("torch") if parser.parse_args().torch else None
    except ImportError as problem:
        parser.error(f"--torch: {problem}")
    main()
