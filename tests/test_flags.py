"""The flags: what is refused and how, presets, --help, and recipes for other trainers."""

import io
import json
import os
import re
import shlex
import sys

import numpy as np
import pytest
from conftest import shown

import rlhf_loop_pseudo as loop

TINY = "--vocab-size 12 --batch-size 4 --prompt-length 3 --response-length 5 --width 4"
WHOLE = ["batch-size", "prompt-length", "response-length", "width", "preference-pairs", "steps", "ppo-epochs"]
LEAST = "a whole number of at least"
BAD = [
    *((f"--{name}", value, f"{LEAST} 1") for name in WHOLE for value in ("0", "-1")),
    *((f"--{name}", value, "int") for name in WHOLE for value in ("1.5", "many", "nan", "")),
    *(
        (f"--{name}", value, "a finite number of at least 0")
        for name in ("beta", "learning-rate", "drift")
        for value in ("-1", "-0.001", "-inf", "nan", "inf", "1e999")
    ),
    *(
        (f"--{name}", value, "a number from 0 to 1")
        for name in ("gamma", "lam")
        for value in ("-0.1", "1.1", "nan", "inf")
    ),
    *(("--clip", value, "a number between 0 and 1") for value in ("0", "1", "-0.2", "nan")),
    *(("--vocab-size", value, f"{LEAST} 2") for value in ("0", "1", "-5")),
    ("--group-size", "1", f"{LEAST} 2"),
    ("--seed", "-1", f"{LEAST} 0"),
    ("--seed", "0.5", "int"),
    ("--beta", "x", "float"),
    ("--kl-estimator", "k4", "k1, k2, k3"),
    ("--advantage", "ppo", "gae, rloo, grpo"),
    ("--preset", "gpt3", "letters"),
    ("--recipe", "ppo", "verl"),
    ("--inspect", "4", "0 to 3"),
    ("--inspect", "-1", "0 to 3"),
    ("--inspect", "first", "int"),
    ("--export", "x.png", ".svg .html .txt"),
    ("--export", "x", ".svg .html .txt"),
    ("--save", "x.npy", ".npz"),
    ("--save", "/no/such/folder/x.npz", "folder"),
    ("--export", "/no/such/folder/x.svg", "folder"),
    ("--show", "gea", "function"),
    ("--show", "SLICE", "function"),
]


@pytest.fixture
def refused(capsys, monkeypatch):
    """Checks that flags are refused before any work, and returns the one sentence that says why."""

    def check(*flags):
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "default_rng", lambda *_: pytest.fail("work was done"))
            assert loop.main(list(flags)) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert "Traceback" not in output.err
        *_, last = output.err.splitlines()
        assert last.startswith("rlhf_loop_pseudo.py: error: ")
        return last.split("error: ", 1)[1]

    return check


@pytest.mark.parametrize(("flag", "value", "allowed"), BAD)
def test_a_bad_value_is_refused_in_one_sentence(flag, value, allowed, refused):
    sentence = refused(f"{flag}={value}")
    assert flag in sentence
    assert value.replace("1e999", "inf") in sentence
    assert allowed in sentence


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch-size", "--batch-size.*expected one argument"),
        ("--beta", "--beta.*expected at least one"),
        ("--bogus", "--bogus"),
        ("--batch 3", "--batch"),
        ("stray", "stray"),
        ("--beta 0 -1 --steps 2", "--beta: -1.0 is not"),
        ("--beta 0 0.1", "--beta.*--steps above 1"),
        ("--advantage gae rloo", "--advantage.*--steps"),
        ("--advantage rloo --batch-size 6", "--batch-size: 6 .*--group-size, 4"),
        ("--advantage gae grpo --steps 2 --batch-size 6", "--batch-size: 6 .*--group-size, 4"),
        ("--steps 2 --inspect 0", "--inspect.*walk-through"),
        ("--recipe trl", "--recipe.*trl.*no PPO since 1.13.*--advantage gae"),
        ("--recipe trl --advantage rloo gae --steps 2", "--recipe.*gae"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words, refused):
    assert re.search(words, refused(*flags.split()))


class Terminal(io.StringIO):
    """A standard input at which somebody sits."""

    def isatty(self):
        return True


def test_pause_needs_a_terminal_and_a_walk_through(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * 9))
    assert re.search("--pause.*terminal", refused("--pause"))
    monkeypatch.setattr(sys, "stdin", Terminal("\n" * 9))
    assert re.search("--pause.*walk-through", refused("--pause", "--steps", "2"))
    assert loop.main([*TINY.split(), "--pause"]) == 0


def test_a_group_only_matters_where_there_are_groups(capsys):
    assert loop.main([*TINY.split(), "--group-size", "3"]) == 0
    assert loop.main([*TINY.split(), *"--group-size 2 --advantage rloo --response-length 1".split()]) == 0


@pytest.mark.parametrize(
    ("flags", "least"),
    [("--vocab-size 99999999999", 204_799), ("--batch-size 99999999", 2_573_158), ("--width 99999999", 400_000_000)],
)
def test_sizes_that_never_fit_are_refused(flags, least, refused):
    sentence = refused(*flags.split())
    assert flags.split()[0] in sentence
    needed, available = re.search(r": ([\d,]+) GB are needed, of (\d+) GB of memory", sentence).groups()
    assert least <= int(needed.replace(",", "")) < 5 * least
    if hasattr(os, "sysconf"):
        assert int(available) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**9


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system does not say how much memory it has")
def test_what_fits_depends_on_the_memory(refused, monkeypatch, capsys):
    def memory(megabytes):
        pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": megabytes * 10**6 // 4096}
        monkeypatch.setattr(os, "sysconf", pages.__getitem__)

    memory(300)
    assert loop.main(["--recipe", "verl"]) == 0  # the walk-through takes some 230 MB
    assert loop.main("--recipe verl --preset letters --steps 10000".split()) == 0
    capsys.readouterr()
    assert "--vocab-size" in refused("--vocab-size", "100000")
    refused("--batch-size", "8")
    memory(180)
    capsys.readouterr()
    assert "--response-length" in refused("--recipe", "verl")
    assert loop.main("--recipe verl --steps 2".split()) == 0  # training never holds the logits
    capsys.readouterr()
    refused("--steps", "2", "--width", "64")
    refused(*"--preset letters --steps 2 --batch-size 99999".split())


def test_the_defaults_are_the_designs():
    config = loop.Config()
    assert (config.batch_size, config.prompt_length, config.response_length) == (4, 64, 128)
    assert (config.vocab_size, config.width, config.steps, config.seed) == (50257, 32, 1, 0)
    assert (config.beta, config.gamma, config.lam, config.clip, config.ppo_epochs) == (0.02, 1.0, 0.95, 0.2, 4)
    assert (config.kl_estimator, config.advantage, config.group_size) == ("k1", "gae", 4)
    assert config.preference_pairs == 2048


def test_the_letters_preset_and_flags_that_win_over_it(capsys, tmp_path):
    assert loop.main("--preset letters --recipe openrlhf".split()) == 0
    text = capsys.readouterr().out
    for setting in ("train.batch_size 64", "data.max_len 24", "rollout.max_new_tokens 16", "algo.kl.init_coef 0.2"):
        assert f"--{setting} \\" in text
    flags = "--preset letters --vocab-size 11 --batch-size 2 --response-length 3 --beta 0.7"
    _, data = shown(f"{flags} --kl-estimator k3 --seed 5 --width 6", tmp_path)
    config = json.loads(str(data["config"]))
    given = {"vocab_size": 11, "batch_size": 2, "response_length": 3, "beta": 0.7, "kl_estimator": "k3", "seed": 5}
    assert config == config | given | {"prompt_length": 8, "width": 6}
    assert data["prompts"].shape == (2, 8)
    assert data["responses"].shape == (2, 3)
    assert config["drift"] == loop.Config.drift > 0
    _, data = shown(f"{flags} --steps 2", tmp_path)
    assert json.loads(str(data["config"]))["drift"] == 0


def test_help_has_every_flag_its_default_and_its_other_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "900")
    assert loop.main(["--help"]) == 0
    helps = dict(re.findall(r"^  (--[\w-]+)[^\n]*?(?:  |\n {20,})(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    fields = {"--" + name.replace("_", "-"): field for name, field in loop.Config.__dataclass_fields__.items()}
    others = "--preset --inspect --pause --show --save --export --recipe".split()
    for flag, field in fields.items():
        assert f"; default {field.default}" in helps[flag]
    for flag in others:
        assert len(helps[flag]) > 20
    assert set(helps) >= {*fields, *others}
    assert "default gpt2" in helps["--preset"]
    for flag, name in {
        "--beta": "verl: algorithm.kl_ctrl.kl_coef",
        "--lam": "openrlhf: algo.advantage.lambd",
        "--clip": "trl: epsilon; openrlhf: actor.eps_clip; verl: actor_rollout_ref.actor.clip_ratio_low",
        "--ppo-epochs": "trl: num_iterations; openrlhf: train.max_epochs",
        "--response-length": "trl: max_completion_length; openrlhf: rollout.max_new_tokens",
        "--kl-estimator": "only k1",
    }.items():
        assert name in helps[flag]
    assert "{" not in "".join(helps.values())


RUN = """--batch-size 12 --prompt-length 5 --response-length 7 --steps 9 --beta 0.3 --kl-estimator k2 --group-size 3
--gamma 0.9 --lam 0.8 --clip 0.1 --ppo-epochs 2 --learning-rate 0.003 --seed 11"""
# What this run is there, as looked up in TRL 1.16.0, OpenRLHF 0.11.2 and verl 0.9.1; {} is what depends on the method
TRL = """--per_device_train_batch_size 12 --max_completion_length 7 --max_steps 18 --beta 0.3 --num_generations 3
--epsilon 0.1 --num_iterations 2 --learning_rate 0.003 --seed 11
--model_name_or_path MODEL --dataset_name DATASET --reward_model_name_or_path REWARD_MODEL"""
OPENRLHF = """--train.batch_size 12 --data.max_len 12 --rollout.max_new_tokens 7 --algo.kl.init_coef 0.3
--algo.kl.estimator k2 --actor.eps_clip 0.1 --train.max_epochs 2 --actor.adam.lr 0.003 --train.seed 11
--actor.model_name_or_path MODEL --reward.model_name_or_path REWARD_MODEL --data.prompt_dataset DATASET"""
GROUPS = "--rollout.batch_size 4 --rollout.n_samples_per_prompt 3 --data.max_samples 36 --algo.advantage.estimator"
VERL = """data.max_prompt_length=5 data.max_response_length=7 trainer.total_training_steps=9
algorithm.kl_ctrl.kl_coef=0.3 algorithm.kl_penalty=k2 algorithm.use_kl_in_reward=True
actor_rollout_ref.actor.clip_ratio_low=0.1 actor_rollout_ref.actor.clip_ratio_high=0.1
actor_rollout_ref.actor.ppo_epochs=2 actor_rollout_ref.actor.optim.lr=0.003 data.seed=11
actor_rollout_ref.model.path=MODEL reward.reward_model.enable=True reward.reward_model.model_path=REWARD_MODEL
data.train_files=DATASET.parquet"""
COMMANDS = {
    ("trl", "rloo"): f"{TRL} --normalize_advantages True",
    ("trl", "grpo"): TRL,
    ("openrlhf", "gae"): f"""{OPENRLHF} --algo.advantage.estimator gae --rollout.batch_size 12
--rollout.n_samples_per_prompt 1 --data.max_samples 108 --critic.adam.lr 0.003 --algo.advantage.gamma 0.9
--algo.advantage.lambd 0.8 --critic.model_name_or_path MODEL""",
    ("openrlhf", "rloo"): f"{OPENRLHF} {GROUPS} rloo",
    ("openrlhf", "grpo"): f"{OPENRLHF} {GROUPS} group_norm",
    ("verl", "gae"): f"""{VERL} algorithm.adv_estimator=gae data.train_batch_size=12
actor_rollout_ref.actor.ppo_mini_batch_size=12 actor_rollout_ref.rollout.n=1 algorithm.gamma=0.9 algorithm.lam=0.8
critic.optim.lr=0.003 critic.model.path=MODEL""",
    **{
        ("verl", method): f"""{VERL} algorithm.adv_estimator={method} data.train_batch_size=4
actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.rollout.n=3"""
        for method in ("rloo", "grpo")
    },
}
STARTS = {
    "trl": ("TRL 1.16.0", "trl {}"),
    "openrlhf": ("OpenRLHF 0.11.2", "python3 -m openrlhf.cli.train_ppo_ray"),
    "verl": ("verl 0.9.1", "python3 -m verl.trainer.main_ppo"),
}


def settings_in(command):
    """The settings of a shell command: --name value, --name or name=value."""
    words = command.replace("\\\n", " ").split()
    if any(word.startswith("--") for word in words):
        return [each.strip() for each in re.split(r"(?:^| )--", " ".join(words))[1:]]
    return [word for word in words if "=" in word]


@pytest.mark.parametrize(("trainer", "method"), COMMANDS)
def test_a_recipe_gives_every_setting_its_name_there(trainer, method, capsys, monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", lambda *_: pytest.fail("work was done"))
    assert loop.main([*RUN.split(), "--advantage", method, "--recipe", trainer]) == 0
    text = capsys.readouterr().out
    comments = [line for line in text.splitlines() if line.startswith("#")]
    command = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    settings = settings_in(command)
    assert set(settings_in(COMMANDS[trainer, method])) <= set(settings)
    names = [re.split("[ =]", setting)[0] for setting in settings]
    assert len(names) == len(set(names))
    version, start = STARTS[trainer]
    assert version in comments[0]
    assert command.startswith(start.format(method) + " \\\n")
    assert len(shlex.split(command)) > 15
    notes = "".join(comments)
    for note in ("MODEL, DATASET, REWARD_MODEL are yours", "learning rate of about 1e-6", "README"):
        assert note in notes
    assert ("no flag for --prompt-length, --kl-estimator, --gamma, --lam" in notes) == (trainer == "trl")
    assert not re.search("(gae|rloo|grpo):", text)
    if method != "gae":
        assert not re.search("critic|gamma|lam", command)


@pytest.mark.parametrize("trainer", STARTS)
def test_a_recipe_has_the_names_that_help_gives(trainer, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "900")
    loop.main(["--help"])
    names = re.findall(rf"{trainer}: ([^;\n]*)", capsys.readouterr().out)
    assert loop.main(["--recipe", trainer, "--advantage", "rloo" if trainer == "trl" else "gae"]) == 0
    text = capsys.readouterr().out
    assert len(names) >= 9
    for name in " ".join(names).split():
        assert re.search(rf"(^|[ -]){re.escape(name)}[ =]", text, re.MULTILINE), name


def test_a_recipe_for_each_of_several(capsys):
    assert loop.main("--recipe verl --beta 0.1 0.4 --advantage gae rloo".split()) == 0
    commands = capsys.readouterr().out.split("\n\n")
    for command, beta, method in zip(commands, ("0.1", "0.1", "0.4", "0.4"), ("gae", "rloo") * 2, strict=True):
        assert f"kl_coef={beta} " in command
        assert f"adv_estimator={method} " in command
