"""Hard to break: bad input, odd terminals, interrupts, full disks. Never a traceback, never a lost result."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import check_formulas

import rlhf_loop_pseudo as loop

SCRIPT = Path(loop.__file__)
FAST = ["--preset", "letters", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def little_theory(monkeypatch):
    """What is tested here does not depend on how exactly the optimum is estimated."""
    monkeypatch.setattr(loop, "THEORY_PROMPTS", 2)


posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and devices of POSIX")


def run(*arguments, encoding="utf-8", **options):
    """The script in a process of its own."""
    options.setdefault("env", {**os.environ, "PYTHONIOENCODING": encoding})
    options.setdefault("stdout", subprocess.PIPE)
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60, **options)


INTEGERS = ["batch-size", "prompt-length", "response-length", "width", "steps", "ppo-epochs"]
BAD = [
    *((f"--{name}", value) for name in INTEGERS for value in ("0", "-1", "1.5", "many", "nan", "")),
    *(
        (f"--{name}", value)
        for name in ("beta", "learning-rate", "drift")
        for value in ("-1", "-1e-3", "-inf", "nan", "inf", "1e999", "x")
    ),
    *((f"--{name}", value) for name in ("gamma", "lam") for value in ("-0.1", "1.1", "nan", "inf")),
    *(("--clip", value) for value in ("0", "1", "-0.2", "nan")),
    *(("--vocab-size", value) for value in ("0", "1", "-5")),
    *(("--seed", value) for value in ("-1", "0.5")),
    ("--kl-estimator", "k4"),
    ("--preset", "gpt3"),
    ("--inspect", "4"),
    ("--inspect", "-1"),
    ("--inspect", "first"),
    ("--export", "x.png"),
    ("--export", "x"),
    ("--save", "x.npy"),
    ("--save", "/no/such/folder/x.npz"),
    ("--save", "."),
    ("--batch-size", "99999999999999999999"),
    ("--vocab-size", "99999999999"),
    ("--prompt-length", "999999999"),
    ("--response-length", "9" * 400),
    ("--width", "99999999"),
    ("--steps", "99999999999999999999"),
    ("--ppo-epochs", "999999999999"),
]


@pytest.mark.parametrize(("flag", "value"), BAD)
def test_a_bad_value_is_refused_in_one_sentence(flag, value, capsys, monkeypatch):
    monkeypatch.setattr(loop, "init_models", lambda *_: pytest.fail("work was done"))
    assert loop.main([f"{flag}={value}"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert flag in output.err or "memory" in output.err
    assert value[:8] in output.err or "memory" in output.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size"], "--batch-size.*expected one argument"),
        (["--beta"], "--beta.*expected at least one"),
        (["--bogus"], "--bogus"),
        (["--batch", "3"], "--batch"),
        (["stray"], "stray"),
        (["--seed", "1", "--seed", "2"], "--seed: given twice"),
        (["--beta", "0.1", "0.10", "--steps", "2"], "--beta: 0.1 is given twice"),
        (["--beta", "0", "0.1"], "--beta.*--steps"),
        (["--steps", "2", "--inspect", "0"], "--inspect.*--steps"),
        (["--steps", "2", "--pause"], "--pause.*--steps"),
        (["--inspect-all"], "--inspect-all: needs --inspect"),
        (["--pause"], "--pause.*terminal"),
        (["--show", "gae", "--seed", "0"], "--show.*--seed has no place"),
        (["--show", "--inspect-all"], "--show.*--inspect-all has no place"),
        (["--save", "x" * 300 + ".npz"], "--save: cannot write.*too long"),
        (["--save", ".npz"], "--save: '.npz' is no file name that ends in .npz"),
        (["--b\x1b[31md"], r"unrecognized arguments: --b\?\[31md"),
    ],
)
def test_contradictions_are_refused(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert loop.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert re.search(words, output.err)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"vocab_size": 10**9}, "--vocab-size"),
        ({"batch_size": 10**6}, "--batch-size"),
        ({"response_length": 10**6, "vocab_size": 10**6}, "--response-length"),
        ({"width": 10**7, "vocab_size": 5}, "--width"),
        ({"prompt_length": 10**7, "vocab_size": 5, "width": 1}, "--prompt-length"),
        ({"steps": 10**15}, "--steps"),
        ({"ppo_epochs": 10**12}, "--ppo-epochs"),
    ],
)
def test_what_does_not_fit_says_what_to_lower(changes, flag, monkeypatch):
    monkeypatch.setattr(loop, "memory_available", lambda: 8 * 10**9)
    with pytest.raises(loop.UserError, match=rf"need .* GB of memory and 8\.0 GB are free: lower .*{flag}"):
        loop.check_memory(loop.Config(**changes))


def test_the_defaults_fit_into_half_a_gigabyte(monkeypatch):
    monkeypatch.setattr(loop, "memory_available", lambda: 5 * 10**8)
    loop.check_memory(loop.Config())
    loop.check_memory(loop.Config(**loop.PRESETS["letters"], steps=1000))


def test_memory_where_the_system_does_not_tell(monkeypatch):
    assert 10**8 < loop.memory_available() < 10**14
    monkeypatch.setattr(loop.Path, "read_text", lambda self: "")
    assert 10**8 < loop.memory_available() < 10**14
    monkeypatch.delattr(loop.os, "sysconf", raising=False)
    assert loop.memory_available() == np.inf


def test_out_of_memory_all_the_same(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(loop, "adam_step", full)
    assert loop.main([*FAST, "--save", str(tmp_path / "a.npz")]) == 1
    assert capsys.readouterr().err == "rlhf_loop_pseudo.py: not enough memory\n"
    assert "whitened" in np.load(tmp_path / "a.npz")  # what there was is kept
    monkeypatch.setattr(loop, "init_models", full)
    assert loop.main([*FAST, "--export", str(tmp_path / "a.txt")]) == 1
    assert (tmp_path / "a.txt").read_text() == ""


def test_a_config_refuses_what_the_command_line_refuses():
    for value in (0, 2.5, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"batch_size: {value} is not a whole number of at least 1"):
            loop.Config(batch_size=value)


EDGES = {
    "one token, one row, two words": "--vocab-size 2 --batch-size 1 --prompt-length 1 --response-length 1 --width 1",
    "no KL price": "--beta 0",
    "a high KL price": "--beta 1000",
    "hardly a KL price": "--beta 1e-310",
    "myopic": "--gamma 0 --lam 0",
    "no learning": "--learning-rate 0",
    "no drift": "--drift 0",
    "far drift": "--drift 20",
    "one epoch": "--ppo-epochs 1",
    "k3": "--kl-estimator k3",
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("steps", [1, 3])
def test_extreme_but_legal_values_stay_finite(edge, steps, tmp_path):
    path = tmp_path / "x.npz"
    assert loop.main([*FAST[:2], "--steps", str(steps), *EDGES[edge].split(), "--save", str(path)]) == 0
    with np.load(path) as data:
        assert all(np.isfinite(data[name]).all() for name in data if name not in ("config", "theory/share"))


sizes = st.integers(1, 5)
legal = st.fixed_dictionaries(
    {
        "batch_size": sizes,
        "prompt_length": sizes,
        "response_length": sizes,
        "vocab_size": st.integers(2, 30),
        "width": sizes,
        "beta": st.floats(0, 2),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "gamma": st.floats(0, 1),
        "lam": st.floats(0, 1),
        "clip": st.floats(0.01, 0.9),
        "ppo_epochs": st.integers(1, 3),
        "learning_rate": st.floats(0, 0.01),
        "drift": st.floats(0, 1),
        "seed": st.integers(0, 10**12),
    }
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(flags=legal, training=st.booleans())
def test_any_legal_flags_end_well_and_satisfy_every_formula(flags, training, tmp_path, capsys):
    path = tmp_path / "x.npz"
    arguments = [text for name, value in flags.items() for text in (loop.flag(name), str(value))]
    arguments += ["--steps", "2"] if training else ["--inspect", "0", "--inspect-all"]
    assert loop.main([*arguments, "--save", str(path)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    with np.load(path) as data:
        arrays = {name: data[name] for name in data}
    assert {name: json.loads(str(arrays["config"]))[name] for name in flags} == flags
    if not training:
        check_formulas(arrays, loop.Config(**flags))


@pytest.mark.parametrize("steps", ["1", "5"])
def test_divergence_says_so_and_keeps_what_there_is(steps, tmp_path, capsys):
    path = tmp_path / "x.npz"
    assert loop.main([*FAST, "--steps", steps, "--learning-rate", "1e30", "--save", str(path)]) == 1
    output = capsys.readouterr()
    assert re.fullmatch(r"rlhf_loop_pseudo.py: step \d at beta 0.02: .*--learning-rate.*\n", output.err)
    assert "Update complete!" not in output.out
    data = np.load(path)
    assert "kl" in data if steps == "1" else len(data["objective/kl"]) == 1


def test_one_of_several_betas_diverges(tmp_path, capsys):
    path = tmp_path / "x.npz"
    assert loop.main([*FAST, "--steps", "4", "--beta", "0.1", "1e38", "0.2", "--save", str(path)]) == 1
    assert "at beta 1e+38" in capsys.readouterr().err
    data = np.load(path)
    assert np.isfinite(data["objective/kl"][0]).all()
    assert np.isnan(data["objective/kl"][2]).all()
    assert np.isfinite(data["theory/J"][0])
    assert np.isnan(data["theory/J"][1:]).all()


@pytest.mark.parametrize("rate", ["1.5", "3", "30"])
def test_updates_far_too_large_but_finite_end_well(rate, tmp_path, capsys):
    path = tmp_path / "x.npz"
    assert loop.main([*FAST, "--steps", "6", "--learning-rate", rate, "--save", str(path)]) in (0, 1)
    assert "objective/kl" in np.load(path)
    capsys.readouterr()
    assert len(loop.sparkline(np.array([1.0, np.nan, np.inf, 2.0]))) == 4


@pytest.mark.parametrize("suffix", [".svg", ".html", ".txt"])
@pytest.mark.parametrize("steps", ["1", "3"])
def test_export_holds_what_was_shown(suffix, steps, tmp_path, capsys):
    path = tmp_path / f"shown{suffix}"
    assert loop.main([*FAST, "--steps", steps, "--export", str(path)]) == 0
    shown, text = capsys.readouterr().out, path.read_text(encoding="utf-8")
    words = re.sub(r"<[^>]*>|&#?\w+;|\s", "", re.sub(r"(?s)<(style|defs)>.*?</\1>", "", text))
    for line in shown.splitlines():
        assert re.sub(r"\s|[&<>\"']", "", line) in words.replace("&", "").translate({ord(c): None for c in "<>\"'"})
    assert os.listdir(tmp_path) == [path.name]


def test_a_wide_line_is_not_cut_in_a_picture(tmp_path, capsys):
    path = tmp_path / "x.svg"
    assert loop.main([*FAST, "--beta", "0.123456789012345678", "--export", str(path)]) == 0
    wide = [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]
    picture = path.read_text(encoding="utf-8").replace("&#160;", " ")
    assert wide
    for line in wide:
        assert line[-20:] in picture


@pytest.mark.parametrize("flag", ["--save", "--export"])
def test_a_full_disk_leaves_the_old_file_whole(flag, tmp_path, monkeypatch, capsys):
    path = tmp_path / ("x.npz" if flag == "--save" else "x.txt")
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.os, "replace", full)
    assert loop.main([*FAST, flag, str(path)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    def locked(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", locked)
    assert loop.main([*FAST, "--save", str(tmp_path / "x.npz")]) == 2
    assert re.search("--save: cannot write .*Permission denied", capsys.readouterr().err)


def test_a_file_that_looks_like_a_negative_number_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loop.main([*FAST, "--save", "-1.npz"]) == 2  # a flag, for argparse
    assert loop.main([*FAST, "--save=-1.npz"]) == 0
    assert os.listdir() == ["-1.npz"]


def test_negative_numbers_are_read_as_numbers(capsys):
    assert loop.main(["--beta", "-1e-3"]) == 2
    assert "'-1e-3' is not a finite number of at least 0" in capsys.readouterr().err


@posix
def test_a_device_or_a_pipe_is_not_replaced(tmp_path, capsys):
    pipe = tmp_path / "x.txt"
    os.mkfifo(pipe)
    assert loop.main([*FAST, "--export", str(pipe)]) == 2
    assert "no ordinary file" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_one_file_that_fails_does_not_cost_the_other(tmp_path, monkeypatch, capsys):
    save, export = tmp_path / "x.npz", tmp_path / "x.txt"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.np, "savez", full)
    assert loop.main([*FAST, "--save", str(save), "--export", str(export)]) == 1
    assert re.search(r"--save: cannot write '.*x\.npz' \(No space left on device\)", capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["x.txt"]


@posix
def test_ctrl_c_while_saving_does_not_lose_it(tmp_path, monkeypatch):
    save, original = tmp_path / "x.npz", np.savez

    def interrupted(*arguments, **arrays):
        signal.raise_signal(signal.SIGINT)
        original(*arguments, **arrays)

    monkeypatch.setattr(loop.np, "savez", interrupted)
    assert loop.main([*FAST, "--save", str(save)]) == 0
    assert "kl" in np.load(save)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@posix
def test_ctrl_c_while_metrics_are_joined_does_not_lose_them(tmp_path, monkeypatch):
    original = loop.join_histories

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(loop, "show_metrics", lambda *_: monkeypatch.setattr(loop, "join_histories", interrupted))
    assert loop.main([*FAST, "--steps", "2", "--save", str(tmp_path / "x.npz")]) == 0
    assert len(np.load(tmp_path / "x.npz")["objective/kl"]) == 2


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "x.npz"
    path.write_text("old")
    assert loop.main([*FAST, "--save", str(path)]) == 0
    assert "kl" in np.load(path)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_encoding(encoding):
    for arguments in (["--inspect", "0"], ["--steps", "2"]):
        done = run(*FAST, *arguments, encoding=encoding)
        assert (done.returncode, done.stderr) == (0, b"")
        text = done.stdout.decode(encoding)
        assert "?" not in text
        assert ("β" if encoding == "utf-8" else "beta") in text


@pytest.mark.parametrize("changes", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "40"}, {"COLUMNS": "200"}])
def test_plain_when_piped_in_any_terminal(changes):
    plain = run(*FAST).stdout
    done = run(*FAST, env={**os.environ, "PYTHONIOENCODING": "utf-8", **changes})
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", plain)


def in_terminal(*arguments, keys=b"", **changes):
    """The script in a pseudo-terminal; keys are typed at once. Returns (exit code, all output)."""
    import pty

    outer, inner = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **changes}
    command = [sys.executable, SCRIPT, *arguments]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment) as process:
        os.close(inner)
        os.write(outer, keys)
        output = b""
        while True:
            try:
                chunk = os.read(outer, 65536)
            except OSError:
                break
            if not chunk:
                break
            output += chunk
    os.close(outer)
    return process.returncode, output.decode()


@posix
def test_a_terminal_gets_dim_notes_and_no_color_is_honoured():
    code, output = in_terminal(*FAST)
    assert code == 0
    assert "\x1b[2m" in output
    code, output = in_terminal(*FAST, NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3\dm", output)
    code, output = in_terminal(*FAST, TERM="dumb")
    assert code == 0
    assert "\x1b" not in output


@posix
def test_live_progress_in_a_terminal_leaves_only_the_rows():
    code, output = in_terminal("--preset", "letters", "--steps", "40")
    assert code == 0
    assert re.search(r"step \d+: score 0\.\d+, KL", output)
    assert "━" not in output.split("metric")[1]
    assert output.count("a response") == 1


@posix
def test_pause_waits_for_enter_between_steps():
    code, output = in_terminal(*FAST, "--pause", keys=b"\n" * 6)
    assert code == 0
    assert output.count("[Enter]") == 6
    assert "Update complete!" in output


@posix
@pytest.mark.parametrize("tool", ["gae", ""])
def test_show_in_a_terminal(tool):
    code, output = in_terminal("--show", *([tool] if tool else []))
    assert code == 0
    assert "gae" in re.sub(r"\x1b\[[0-9;]*m", "", output)


@posix
def test_show_cuts_no_line_in_a_narrow_terminal():
    _, output = in_terminal("--show", "actor_gradients")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", output).replace("\r\n", "\n")
    assert max(map(len, shown.splitlines())) > 100
    assert shown.partition("import numpy as np\n\n\n")[2].strip() in SCRIPT.read_text(encoding="utf-8")


@posix
@pytest.mark.parametrize("arguments", [[], ["--steps", "3"]])
def test_a_reader_that_leaves_is_no_error(arguments, tmp_path):
    path = tmp_path / "x.npz"
    command = [sys.executable, SCRIPT, *FAST, *arguments, "--save", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert np.isfinite(np.load(path)["kl" if not arguments else "objective/kl"]).all()


@posix
def test_closed_and_full_outputs():
    done = subprocess.run([sys.executable, SCRIPT, *FAST], stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            done = run(*FAST, stdout=full)
        assert done.returncode == 1
        assert re.fullmatch(rb"rlhf_loop_pseudo.py: .*No space left.*\n", done.stderr)


@posix
def test_a_closed_or_full_stderr_changes_no_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "0"], stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2)
    )
    assert (done.returncode, done.stdout) == (2, b"")
    if os.path.exists("/dev/full"):
        diverges = [*FAST, "--steps", "2", "--drift", "1e10", "--save", tmp_path / "x.npz"]
        with open("/dev/full", "wb") as full:
            assert subprocess.run([sys.executable, SCRIPT, "--steps", "0"], stderr=full).returncode == 2
            command = [sys.executable, SCRIPT, *diverges]
            assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full).returncode == 1
        assert "objective/kl" in np.load(tmp_path / "x.npz")


@posix
def test_pause_with_a_closed_stdout_still_saves(tmp_path):
    import pty

    outer, inner = pty.openpty()
    os.write(outer, b"\n" * 6)
    command = [sys.executable, SCRIPT, *FAST, "--pause", "--save", tmp_path / "x.npz"]
    done = subprocess.run(command, stdin=inner, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1), timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "ratio" in np.load(tmp_path / "x.npz")


def test_forced_colours_bring_no_progress_bar_into_a_pipe():
    done = run(*FAST, "--steps", "3", env={**os.environ, "FORCE_COLOR": "1", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0
    assert not re.search(rb"\x1b\[[0-9?]*[A-Zhl]", done.stdout)


class FullObject(io.StringIO):
    """An output that is no file and takes nothing."""

    def write(self, _):
        raise OSError(28, "No space left on device")


def test_in_a_thread_and_into_any_object(tmp_path, monkeypatch, capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(loop.main([*FAST, "--save", str(tmp_path / "a.npz")])))
    thread.start()
    thread.join()
    monkeypatch.setattr(sys, "stdout", FullObject())
    codes.append(loop.main([*FAST, "--save", str(tmp_path / "b.npz")]))
    assert codes == [0, 1]
    assert "No space left" in capsys.readouterr().err
    assert "ratio" in np.load(tmp_path / "a.npz")
    assert "config" in np.load(tmp_path / "b.npz")


def interrupt(arguments, after, times=1):
    """Start the script, send Ctrl-C once its output holds `after`. Returns (exit code, output, errors)."""
    command = [sys.executable, "-u", SCRIPT, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen = b""
        while after not in seen:
            seen += process.stdout.readline()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        output, errors = process.communicate(timeout=30)
    return process.returncode, (seen + output).decode(), errors


@posix
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_training_keeps_what_was_computed(times, tmp_path):
    save, export = tmp_path / "x.npz", tmp_path / "x.txt"
    arguments = [*FAST, "--steps", "100000", "--save", save, "--export", export]
    code, output, errors = interrupt(arguments, b"     1   0.", times)
    assert (code, errors) == (130, b"")
    assert "Interrupted" in output
    data = np.load(save)
    assert 1 <= len(data["objective/kl"]) < 100_000
    assert len({len(data[name]) for name in data if name != "config"}) == 1
    assert "     1   0." in export.read_text(encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == ["x.npz", "x.txt"]


@posix
def test_ctrl_c_in_the_second_of_several_betas(tmp_path):
    save = tmp_path / "x.npz"
    flags = [*FAST, "--steps", "40", "--beta", "0", "0.5", "1", "--save", save]
    code, _, errors = interrupt(flags, "β = 0.5".encode())
    assert (code, errors) == (130, b"")
    kl = np.load(save)["objective/kl"]
    assert np.isfinite(kl[0]).all()
    assert np.isnan(kl[2]).all()


@posix
def test_ctrl_c_in_the_walk_through_keeps_the_steps_so_far(tmp_path):
    save = tmp_path / "x.npz"
    code, output, errors = interrupt(["--response-length", "300", "--ppo-epochs", "50", "--save", save], b"Step 6")
    assert (code, errors) == (130, b"")
    assert "Interrupted" in output
    assert "kl" in np.load(save)
    assert "ratio" not in np.load(save)


@posix
@pytest.mark.parametrize("wait", [0.15, 0.25, 0.4])
def test_ctrl_c_while_it_starts(wait):
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--response-length", "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == b""


def test_help_names_every_flag_its_default_and_its_other_names(capsys):
    assert loop.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in loop.Config.__dataclass_fields__.items():
        assert f"{loop.flag(name)} " in text
        assert f"default {field.default}" in text
    for other in ("kl_coef", "cliprange", "num_ppo_epochs", "learning_rate", "response_length", "lam", "gamma"):
        assert other in text


def test_importing_has_no_side_effect():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import rlhf_loop_pseudo, signal; print(signal.getsignal(2))"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT.parent], capture_output=True, check=True, text=True)
    assert done.stdout == f"{signal.default_int_handler}\n" or "default_int_handler" in done.stdout
    assert done.stderr == ""
