"""The flags: what is refused and why, what a slip was meant to be, presets and --help."""

import io
import os
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
    "--advantage": ["ppo", "gea"],
    "--preset": ["gpt3"],
    "--theme": ["blue"],
    "--save": ["x.npy", "x", "/no/such/folder/x.npz"],
    "--export": ["x.png", "x", "/no/such/folder/x.svg"],
    "--show": ["LETTERS", "np", "9"],
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
    alone = {"--group-size": "--advantage rloo ", "--preference-pairs": "--preset letters "}
    alone["--theme"] = "--export x.svg "
    for value in BAD[flag]:
        assert flag in refused(f"{alone.get(flag, '')}{flag}={value}"), value


@pytest.mark.parametrize(
    ("flags", "flag", "reason"),
    [
        ("--batch-size", "--batch-size", "argument"),
        ("--inspect 4", "--inspect", "rows 0 to 3"),
        ("--export x.png", "--export", ".svg or .html or .txt"),
        ("--beta 0 -1 --steps 2", "--beta", "-1"),
        ("--beta 0 0.1 --advantage gae", "--beta", "--steps"),
        ("--beta 0.1 0.1 --steps 2", "--beta", "once"),
        ("--advantage gae rloo", "--advantage", "--steps"),
        ("--advantage rloo --batch-size 6", "--batch-size", "--group-size"),
        ("--advantage gae grpo --steps 2 --batch-size 6", "--batch-size", "--group-size"),
        ("--steps 2 --inspect 99", "--inspect", "--steps"),
        ("--steps 2 --pause", "--pause", "--steps"),
        ("--gamma 0.9 --advantage rloo", "--gamma", "gae"),
        ("--lam 0.9 --advantage rloo grpo --steps 2", "--lam", "gae"),
        ("--group-size 2", "--group-size", "rloo"),
        ("--preference-pairs 9", "--preference-pairs", "letters"),
        ("--show gae --save x.npz", "--show", "alone"),
        ("--theme light", "--theme", "--export"),
        ("--preset letters --prompt-length 2", "--prompt-length", "letters"),
        ("--preset letters --response-length 2", "--response-length", "word"),
        ("--vocab-size 999999 --width 999999", "sizes", "memory|bytes"),
        ("--batch-size 999999", "sizes", "memory|bytes"),
    ],
)
def test_a_refusal_gives_the_reason_that_holds(flags, flag, reason, refused):
    sentence = refused(flags)
    assert sentence.startswith(flag) or f" {flag}:" in sentence
    assert re.search(reason, sentence.replace(flag, "", 1))


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        ("--lr 3", "--learning-rate"),
        ("--batch_size 3", "--batch-size"),
        ("--bata 1", "--beta"),
        ("--group_size=2", "--group-size"),
        ("--show GAEE", "gae"),
        ("--show whitten", "whiten"),
        ("--show ppo", "ppo_loss"),
        ("--xyz 3", None),
        ("--show xyz", None),
    ],
)
def test_what_a_slip_was_meant_to_be(flags, meant, refused):
    sentence = refused(flags)
    assert re.split("[ =]", flags)[meant is not None and "--show" in flags] in sentence
    assert re.findall(r"([\w-]+)\?$", sentence) == ([meant] if meant else [])
    assert refused("stray").startswith("stray ")


def test_functions_are_found_in_any_case_and_by_step(capsys):
    pages = []
    for name in ("gae", "GAE", "6", "5", "shape_rewards"):
        assert run("--show", name) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]
    for name in "critic_values gae rloo_advantages grpo_advantages whiten".split():
        assert f"def {name}(" in pages[2]
    assert not re.search("^def (kl_penalty|.*_(text|page))", pages[2], re.M)
    assert pages[3] == pages[4]


def test_to_pause_somebody_must_be_there(refused, monkeypatch):
    for nobody in (io.StringIO("\n" * 9), None):
        monkeypatch.setattr(sys, "stdin", nobody)
        assert re.search("--pause.*terminal", refused("--pause"))


@pytest.mark.parametrize("where, what, answer", [(os, "access", 0), (loop.Path, "is_dir", 1)])
def test_a_file_that_cannot_be_written_is_refused(where, what, answer, refused, monkeypatch):
    monkeypatch.setattr(where, what, lambda *_: answer)
    for flags in ("--save x.npz", "--export x.html"):
        assert refused(flags).startswith(flags.split()[0])


def configured(flags):
    """What these flags come to, for the first run."""
    return loop.read_command_line(flags.split())[1][0]


def test_a_flag_that_has_an_effect_on_one_run_is_allowed():
    assert configured("--steps 2 --gamma 0.9 --group-size 2 --advantage gae rloo")
    assert configured("--advantage grpo --group-size 2 --inspect 3")


def test_the_letters_preset_and_flags_that_win_over_it():
    letters = configured("--preset letters")
    assert letters == replace(letters, vocab_size=27, batch_size=64, prompt_length=1, beta=0.2)
    assert letters == configured("--vocab-size 27")
    own = configured("--vocab-size 11 --batch-size 2 --beta 0.7 --drift 0.5 --preset letters")
    assert own == replace(letters, vocab_size=11, batch_size=2, beta=0.7, drift=0.5)


def test_a_training_begins_at_the_reference_unless_a_drift_was_asked_for():
    assert configured("--preset letters --steps 2").drift == 0
    assert configured("--preset letters --steps 2 --drift 0.5").drift == 0.5
    for one_step in ("", "--steps 1"):
        assert configured(one_step).drift == loop.Config.drift
    assert configured("--preset letters").drift > 0


def test_what_fits_depends_on_the_memory(refused, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100 * 10**6 // 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__, raising=False)
    assert "sizes" in refused("--inspect 0")  # the default logits alone take 103 MB
    assert configured("--steps 2")  # which keeps none


def test_help_has_every_flag_and_no_other_programs_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    text = capsys.readouterr().out
    fields = {
        "--" + name.replace("_", "-"): f for name, f in loop.Config.__dataclass_fields__.items()
    }
    own = "--preset --inspect --pause --show --save --export --theme".split()
    helps = {part.split()[0]: " ".join(part.split()) for part in re.split(r"\n  (?=--)", text)[1:]}
    assert set(helps) == {*fields, *own}
    for flag, field in fields.items():
        assert f"({field.default})" in helps[flag]
    assert all(len(text) > len(flag) + 12 for flag, text in helps.items())
    assert len(text.splitlines()) <= 75
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search("trl|verl|openrlhf", text, re.I)
    examples = re.findall(r"^ +python rlhf_loop_pseudo.py (.*)", text, re.M)
    assert len(examples) == 2
    for example in examples:
        assert loop.read_command_line(example.split())


@pytest.mark.parametrize("name", ["batch_size", "group_size", "seed"])
def test_whole_numbers_are_ints(name):
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        loop.Config(**{name: 2.0})
