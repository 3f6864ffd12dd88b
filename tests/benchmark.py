"""How fast the loop is and how its cost grows, as ratios taken in one run. No test and no gate.

    python tests/benchmark.py            the module against itself
    python tests/benchmark.py --torch    and against the same steps in PyTorch (CPU, eager)

A ratio is the median over rounds in which what is compared takes turns, after a warm-up: it carries over to other
machines, where a time in seconds would not. What is compared is processor time, with one thread a side: on an idle
machine the same as the clock's, on a busy one less disturbed. Sizes are the defaults unless a row names others.
"""

import argparse
import importlib
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy, which reads it once

import numpy as np

SCRIPT = Path(__file__).resolve().parents[1] / "rlhf_loop_pseudo.py"
sys.path.insert(0, str(SCRIPT.parent))
loop = importlib.import_module("rlhf_loop_pseudo")

# prints the peak memory of the one command it runs: RUSAGE_CHILDREN is the maximum over all children
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)"""


def seconds(action):
    """Processor time of one call, user and system, of this process and of its children."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    start = sum(sum(resource.getrusage(who)[:2]) for who in whose)
    action()
    return sum(sum(resource.getrusage(who)[:2]) for who in whose) - start


def ratios(rounds, base, *actions):
    """Time of each action as a multiple of base's: medians over rounds in which all take turns."""
    for action in (base, *actions):
        action()
    times = np.array([[seconds(action) for action in (base, *actions)] for _ in range(rounds)])
    return np.median(times[:, 1:] / times[:, :1], axis=0)


def peak(*arguments):
    """Peak memory in MB of the module run with these arguments; it hardly varies, so one run is enough."""
    return float(subprocess.check_output([sys.executable, "-c", PEAK, sys.executable, str(SCRIPT), *arguments]))


def show(name, measured, limit, aim, unit="x"):
    """Print one row."""
    reached = "aim" if measured <= aim else "limit" if measured <= limit else "NEITHER"
    cells = [f"{measured:.{2 if unit == 'x' else 0}f}{unit}", f"{limit:g}{unit}", f"{aim:g}{unit}", reached]
    print(f"{name:46}{''.join(cell.rjust(8) for cell in cells)}", flush=True)


def gradient_inputs(config):
    """Arguments of actor_gradients, at random."""
    rng, size = np.random.default_rng(config.seed), (config.batch_size, config.prompt_length + config.response_length)
    actor = loop.init_models(config, rng).actor
    prompts, responses = np.split(rng.integers(0, config.vocab_size - 1, size), [config.prompt_length], axis=1)
    logprobs = loop.token_logprobs(actor, prompts, responses)
    advantages = rng.standard_normal(logprobs.shape, dtype=np.float32)
    return actor, prompts, responses, logprobs, advantages, np.ones_like(logprobs), config.clip


def fastest_floor(count, head):
    """A function that does only what no actor_gradients can spare, in the slices that suit this machine best."""
    states = np.random.default_rng(0).standard_normal((count, len(head)), dtype=head.dtype)  # (N, D)

    def floor(n, v):
        for row in range(0, len(states), n):
            for column in range(0, head.shape[1], v):
                rows, columns = states[row : row + n], head[:, column : column + v]
                matrix = rows @ columns  # (n, D) @ (D, v)
                np.exp(matrix, out=matrix)
                rows.T @ matrix  # (D, n) @ (n, v)
                matrix @ columns.T  # (n, v) @ (v, D)

    floors = []
    for numbers in (500_000, 1_000_000, 2_000_000):  # of some rows and all columns, and the other way round
        shapes = (numbers // head.shape[1], head.shape[1]), (len(states), numbers // len(states))
        floors += [partial(floor, *shape) for shape in shapes]
    return floors[np.argmin([1, *ratios(5, *floors)])]


def train(config):
    """core_loop from fresh models."""
    rng = np.random.default_rng(config.seed)
    list(loop.core_loop(loop.init_models(config, rng), config, rng))


# ------------------------------------------------------------------ the same in PyTorch


def tensors(model):
    """A model's arrays as tensors that learn."""
    return {name: torch.tensor(array, requires_grad=True) for name, array in model.items()}


def torch_hidden(model, tokens):
    """backbone. (B, S) -> (B, S, D)."""
    x = model["embed"][tokens]
    roots = torch.sqrt(torch.arange(1, x.shape[1] + 1, dtype=x.dtype))[:, None]
    return torch.tanh(x + torch.cumsum(x, 1) / roots @ model["mix"])


def torch_outputs(model, prompts, responses):
    """Logits (B, T, V) or values (B, T, 1)."""
    return torch_hidden(model, torch.cat([prompts, responses[:, :-1]], 1))[:, prompts.shape[1] - 1 :] @ model["head"]


def torch_logprobs(model, prompts, responses):
    """token_logprobs. Returns (B, T)."""
    return torch.log_softmax(torch_outputs(model, prompts, responses), -1).gather(2, responses[..., None])[..., 0]


def torch_generate(actor, prompts, length, eos_token):
    """generate with keep_logits=False. Returns responses, mask, logprobs, (B, T) each."""
    context_sum, token = actor["embed"][prompts].sum(1), prompts[:, -1]
    running, columns = torch.ones(len(prompts), dtype=torch.bool), []
    for t in range(length):
        context = context_sum / (prompts.shape[1] + t) ** 0.5
        hidden = torch.tanh(actor["embed"][token] + context @ actor["mix"])
        logprobs = torch.log_softmax(hidden @ actor["head"], -1)  # (B, D) -> (B, V)
        token = torch.where(running, torch.multinomial(logprobs.exp(), 1)[:, 0], eos_token)
        columns.append((token, running.float(), logprobs.gather(1, token[:, None])[:, 0] * running))
        running = running & (token != eos_token)
        context_sum = context_sum + actor["embed"][token]
    return [torch.stack(column, 1) for column in zip(*columns)]


def torch_policy_loss(actor, prompts, responses, logprobs, advantages, mask, clip):
    """ppo_loss of the actor as it is now."""
    ratio = torch.exp((torch_logprobs(actor, prompts, responses) - logprobs) * mask)
    return -(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages) * mask).sum() / mask.sum()


def torch_batch(actor, critic, reward_model, reference, config):
    """Steps 1 to 6. Returns the arguments of torch_policy_loss, and returns."""
    prompts = torch.randint(0, config.vocab_size - 1, (config.batch_size, config.prompt_length))
    responses, mask, logprobs = torch_generate(actor, prompts, config.response_length, config.vocab_size - 1)
    last = config.prompt_length + mask.sum(1).long() - 1
    hidden = torch_hidden(reward_model, torch.cat([prompts, responses], 1))[torch.arange(len(last)), last]
    scores = (hidden @ reward_model["head"])[:, 0].numpy()
    kl = ((logprobs - torch_logprobs(reference, prompts, responses)) * mask).numpy()
    values = (torch_outputs(critic, prompts, responses)[..., 0] * mask).numpy()
    rewards = loop.shape_rewards(scores, kl, mask.numpy(), config.beta)
    advantages, returns = loop.gae(rewards, values, mask.numpy(), config.gamma, config.lam)
    whitened = torch.from_numpy(loop.whiten(advantages, mask.numpy()))
    return (prompts, responses, logprobs, whitened, mask, config.clip), torch.from_numpy(returns)


def torch_train(config):
    """train, of which only steps 5 and 6 are the module's."""
    models = loop.init_models(config, np.random.default_rng(config.seed))
    actor, critic, *frozen = map(tensors, models)
    optimizers = [torch.optim.Adam(model.values()) for model in (actor, critic)]
    for step in range(config.steps):
        with torch.no_grad():
            batch, returns = torch_batch(actor, critic, *frozen, config)
        prompts, responses, _, _, mask, _ = batch
        for _ in range(config.ppo_epochs):
            error = (torch_outputs(critic, prompts, responses)[..., 0] - returns) * mask
            for optimizer, loss in zip(optimizers, (torch_policy_loss(actor, *batch), (error**2).sum() / mask.sum())):
                optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


# ------------------------------------------------------------------ the table


def show_torch_rows(config, inputs):
    """What is compared with PyTorch; inputs are those of actor_gradients."""
    commands = [sys.executable, "-c", "import torch"], [sys.executable, str(SCRIPT)]
    processes = [partial(subprocess.run, each, stdout=subprocess.DEVNULL, check=True) for each in commands]
    show("walk-through, whole process / import torch", *ratios(9, *processes), 0.75, 0.6)
    torch.set_num_threads(1)
    actor, (prompts, *rest) = tensors(inputs[0]), map(torch.from_numpy, inputs[1:-1])
    rng, length, eos_token = np.random.default_rng(config.seed), config.response_length, config.vocab_size - 1

    def torch_gradients():
        torch.autograd.grad(torch_policy_loss(actor, prompts, *rest, config.clip), list(actor.values()))

    torch_sampling = partial(torch.no_grad()(torch_generate), actor, prompts, length, eos_token)
    sampling = partial(loop.generate, *inputs[:2], length, rng, eos_token, keep_logits=False)
    letters = loop.Config(vocab_size=27, batch_size=64, prompt_length=8, response_length=16, drift=0.0, steps=20)
    training = partial(torch_train, letters), partial(train, letters)
    show("actor_gradients / PyTorch", *ratios(7, torch_gradients, partial(loop.actor_gradients, *inputs)), 0.5, 0.3)
    show("generate / PyTorch", *ratios(7, torch_sampling, sampling), 0.4, 0.2)
    show("training, preset letters / PyTorch", *ratios(7, *training), 1, 0.5)


def main():
    """Print the table, a row as soon as it is measured."""
    print(f"{f'numpy {np.__version__}':46}measured   limit     aim reached", flush=True)
    inputs = gradient_inputs(loop.Config())
    floor = fastest_floor(inputs[2].size, inputs[0]["head"])
    measured = ratios(15, floor, partial(loop.actor_gradients, *inputs))
    show("actor_gradients / three products and an exp", *measured, 1.75, 1.5)
    if torch:
        show_torch_rows(loop.Config(), inputs)
    show("walk-through, peak memory", peak(), 250, 200, " MB")
    small = ("--steps=2", "--prompt-length=16", "--response-length=16")
    more = peak(*small, "--batch-size=64") - peak(*small, "--batch-size=4")
    show("peak, 2 steps of P 16, T 16: B 64 less B 4", more, 80, 20, " MB")
    half = {"steps": 2, "batch_size": 2, "prompt_length": 32, "response_length": 64, "vocab_size": 25128}
    doubled = ({name: 2 * half[name]} for name in ("batch_size", "response_length", "vocab_size"))
    runs = [partial(train, loop.Config(**{**half, **each})) for each in ({}, *doubled)]
    for letter, measured in zip("BTV", ratios(5, *runs)):
        show(f"loop when {letter} doubles, from half of all sizes", measured, 2.3, 2.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How fast the loop is, as ratios.", allow_abbrev=False)
    parser.add_argument("--torch", action="store_true", help="compare with PyTorch, which has to be installed")
    torch = importlib.import_module("torch") if parser.parse_args().torch else None
    main()
