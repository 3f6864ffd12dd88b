"""The flags: what is refused and why, what a slip was meant to be, presets and --help."""

import io
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import run

COUNTS = "batch-size prompt-length response-length width preference-pairs steps ppo-epochs".split()
NO_COUNT = "0 -1 1.5 1e3 many nan inf 1e400 99999999999999999999".split()
NO_PRICE = "-1 -0.001 nan inf -inf 1e400 dear".split()
BAD = {
    **{f"--{name}": NO_COUNT for name in COUNTS},
    **{f"--{name}": ["1", *NO_COUNT] for name in ("vocab-size", "group-size")},
    **{f"--{name}": NO_PRICE for name in ("beta", "learning-rate", "drift")},
    **{f"--{name}": ["-0.1", "1.1", "nan", "inf", "all"] for name in ("gamma", "lam")},
    "--clip": ["0", "1", "-0.2", "nan"],
    "--seed": ["-1", "0.5", "1e3", "nan"],
    "--inspect": ["4", "-1", "first", "0.5"],
    "--kl-estimator": ["k4", "K1"],
    "--method": ["gae", "PPO"],
    "--reward": ["gold", "Human"],
    "--kl-in": ["both", "Loss"],
    "--only": ["0", "8", "first"],
    "--preset": ["gpt3"],
    "--theme": ["blue"],
    "--save": ["x.npy", "x", "/no/such/folder/x.npz"],
    "--export": ["x.png", "x", "/no/such/folder/x.svg"],
    "--show": ["LETTERS", "np", "9", "xyz"],
}


@pytest.fixture
def refused(capsys, monkeypatch):
    """Checks that flags are refused before any work, and returns the one sentence that says why."""

    def check(flags):
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "default_rng", lambda *_: pytest.fail("work was done"))
            assert run(*flags.split()) == 2
        output = capsys.readouterr()
        assert output.out == ""
        *_, last = output.err.splitlines()
        assert len(output.err.splitlines()) <= 2
        return re.fullmatch(r"rlhf_loop_pseudo.py: error: (.*)", last)[1]

    return check


@pytest.mark.parametrize("flag", BAD)
def test_a_bad_value_is_refused_in_one_sentence_that_names_the_flag(flag, refused):
    alone = {"--group-size": "--method rloo ", "--preference-pairs": "--preset letters "}
    alone["--theme"] = "--export x.svg "
    for value in BAD[flag]:
        assert flag in refused(f"{alone.get(flag, '')}{flag}={value}"), value


DPO = "--preset letters --method dpo --steps 2"
REFUSED = [  # flags, the flag that the sentence names, and what to do instead
    ("--batch-size", "--batch-size", "argument"),
    ("--inspect 4", "--inspect", "row"),
    ("--export x.png", "--export", ".svg or .html or .txt"),
    ("--beta 0 -1 --steps 2", "--beta", "-1"),
    ("--beta 0 0.1 --method ppo", "--beta", "--steps"),
    ("--beta 0.1 0.1 --steps 2", "--beta", "once"),
    ("--method ppo rloo", "--method", "--steps"),
    ("--preset letters --reward learned human", "--reward", "--steps"),
    ("--method rloo --batch-size 6", "--batch-size", "--group-size"),
    ("--method ppo grpo --steps 2 --batch-size 6", "--batch-size", "--group-size"),
    ("--steps 2 --inspect 3", "--inspect", "--steps"),
    ("--steps 2 --only 3", "--only", "--steps"),
    ("--gamma 0.9 --method rloo", "--gamma", "--method ppo"),
    ("--lam 0.9 --method rloo grpo --steps 2", "--lam", "--method ppo"),
    ("--group-size 2", "--group-size", "rloo or grpo"),
    ("--preference-pairs 9", "--preference-pairs", "letters"),
    ("--show gae --save x.npz", "--show", "alone"),
    ("--theme light", "--theme", "--export"),
    ("--preset letters --prompt-length 2", "--prompt-length", "letters"),
    ("--preset letters --response-length 2", "--response-length", "3"),
    ("--reward human", "--reward", "--preset letters"),
    ("--method dpo --steps 2", "--method dpo", "--preset letters"),
    ("--method dpo --preset letters", "--method dpo", "--steps 2"),
    (f"{DPO} --beta 0", "--method dpo", "--beta above 0"),
    (f"{DPO} --kl-in loss", "--kl-in", "leave it out"),
    (f"{DPO} --reward human", "--reward", "leave it out"),
    (f"{DPO} --kl-estimator k2", "--kl-estimator", "leave it out"),
    (f"{DPO} --clip 0.1", "--clip", "leave it out"),
    (f"{DPO} --ppo-epochs 2", "--ppo-epochs", "leave it out"),
    (f"{DPO} --learning-rate 0.1", "--learning-rate", "leave it out"),
    (f"{DPO} --group-size 2", "--group-size", "rloo or grpo"),
    (f"{DPO} --gamma 0.9", "--gamma", "--method ppo"),
]


@pytest.mark.parametrize("flags, flag, reason", REFUSED, ids=[flags for flags, *_ in REFUSED])
def test_a_refusal_gives_the_reason_that_holds(flags, flag, reason, refused):
    sentence = refused(flags)
    assert sentence.removeprefix("argument ").startswith(flag)
    assert re.search(re.escape(reason), sentence.replace("argument", "", reason != "argument"))


@pytest.mark.parametrize("flags", ["--lr 3", "--batch_size 3", "--xyz=2", "stray"])
def test_an_unknown_flag_is_named(flags, refused):
    assert flags in refused(flags)


def test_functions_are_found_in_any_case_and_by_step(capsys):
    pages = []
    for name in ("gae", "GAE", "6", "5", "shape_rewards"):
        assert run("--show", name) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]
    for name in "critic_values gae rloo_advantages grpo_advantages whiten".split():
        assert f"def {name}(" in pages[2]
    assert not re.search("^def (kl_penalty|.*_page)", pages[2], re.M)
    assert pages[3] == pages[4]


def test_to_pause_somebody_must_be_there(refused, monkeypatch):
    for nobody in (io.StringIO("\n" * 9), None):
        monkeypatch.setattr(sys, "stdin", nobody)
        assert re.search("--pause.*terminal", refused("--pause"))


def configured(flags):
    """What these flags come to, for the first run."""
    return loop.read_command_line(flags.split())[1][0]


def test_a_flag_that_has_an_effect_on_one_run_is_allowed():
    assert configured("--steps 2 --gamma 0.9 --group-size 2 --method ppo rloo")
    assert configured("--method grpo --group-size 2 --inspect 3")
    assert configured("--preset letters --steps 2 --clip 0.1 --method ppo dpo")


def test_every_combination_of_several_values_is_run_in_order():
    flags = "--preset letters --steps 2 --beta 0.1 0.2 --method ppo rloo --reward human learned"
    _, configs = loop.read_command_line(flags.split())
    found = [(config.beta, config.method, config.reward) for config in configs]
    assert len(found) == len(set(found)) == 8
    assert found[0] == (0.1, "ppo", "human")


def test_flags_may_be_abbreviated():
    assert configured("--learning 0.1").learning_rate == 0.1


def test_the_letters_preset_and_flags_that_win_over_it():
    letters = configured("--preset letters")
    assert letters == replace(letters, vocab_size=27, batch_size=64, prompt_length=1, beta=0.2)
    assert letters == configured("--vocab-size 27")
    own = configured("--vocab-size 11 --batch-size 2 --beta 0.7 --drift 0.5 --preset letters")
    assert own == replace(letters, vocab_size=11, batch_size=2, beta=0.7, drift=0.5)


def test_a_training_begins_at_the_reference_unless_a_drift_was_asked_for():
    assert configured("--preset letters --steps 2").start_drift == 0
    assert configured("--preset letters --steps 2 --drift 0.5").start_drift == 0.5
    assert configured("--preset letters").start_drift == 0.1
    assert configured("").start_drift == 0.75


def test_help_has_every_flag_and_no_other_programs_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    text = capsys.readouterr().out
    fields = {
        "--" + name.replace("_", "-"): f for name, f in loop.Config.__dataclass_fields__.items()
    }
    own = "--preset --only --inspect --pause --show --save --export --theme".split()
    helps = {part.split()[0]: " ".join(part.split()) for part in re.split(r"\n  (?=--)", text)[1:]}
    assert set(helps) == {*fields, *own}
    for flag, field in fields.items():
        default = "0 in a training" if field.default is None else field.default
        assert f"({default})" in helps[flag]
    assert all(len(text) > len(flag) + 12 for flag, text in helps.items())
    assert len(text.splitlines()) <= 75
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search("trl|verl|openrlhf", text, re.I)
    examples = re.findall(r"^ +python rlhf_loop_pseudo.py (.*)", text, re.M)
    assert len(examples) == 3
    for example in examples:
        assert loop.read_command_line(example.split())


@pytest.mark.parametrize("name", ["batch_size", "group_size", "seed"])
def test_whole_numbers_are_ints(name):
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        loop.Config(**{name: 2.0})
