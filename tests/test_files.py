"""Files, pipes and terminals: nothing is lost, nothing half written, never a traceback."""

import contextlib
import functools
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import rlhf_loop_pseudo as loop
from conftest import TINY, run

SCRIPT = Path(loop.__file__)
SMALL = "--preset letters --preference-pairs 50 --batch-size 8 --width 4 --response-length 5"
RUNS = [f"{TINY} --inspect 1", f"{SMALL} --steps 3 --beta 0 1"]
posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and terminals of POSIX")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is tested here needs no exact theory, and no reference that writes words."""
    monkeypatch.setattr(loop, "theory", functools.partial(loop.theory, count=8))
    monkeypatch.setattr(loop, "fine_tune", lambda *_: np.ones(400))


# Files


@pytest.mark.parametrize("lost", ["npz", "txt"])
def test_a_file_that_cannot_be_written_loses_no_other(lost, tmp_path, capsys, monkeypatch):
    original = loop.replace_file

    def fails(path, data):
        if path.suffix == f".{lost}":
            raise OSError(f"{path}: no")
        original(path, data)

    monkeypatch.setattr(loop, "replace_file", fails)
    files = [f"--save={tmp_path / 'x.npz'}", f"--export={tmp_path / 'x.txt'}"]
    assert run(*TINY.split(), *files) == 1
    assert re.fullmatch(rf"rlhf_loop_pseudo.py: .*x.{lost}.*\n", capsys.readouterr().err)
    kept = {"npz": "x.txt", "txt": "x.npz"}[lost]
    assert [path.name for path in tmp_path.iterdir()] == [kept]


@pytest.mark.parametrize("flags", RUNS)
def test_every_export_holds_what_was_shown(flags, tmp_path, capsys):
    for suffix in (".txt", ".svg", ".html"):
        path = tmp_path / f"page{suffix}"
        assert run(*flags.split(), "--export", str(path)) == 0
        printed, page = capsys.readouterr().out, path.read_text(encoding="utf-8")
        text = page
        if suffix != ".txt":
            text = re.sub(r"(?s)<(style|defs|title)>.*?</\1>|<[^>]*>", "", page)
            text = html.unescape(text).strip().removeprefix("rlhf_loop_pseudo")
        same = [re.sub(r"\s", "", part) for part in (text, printed)]
        assert same[0] == same[1]
        if suffix == ".html":  # a block for a page that has its own style
            assert page.count("<pre ") == page.count("</pre>") == 1
            assert not re.search("<style|<body|<html|class=|<script", page)


def contrast(colour, background):
    """WCAG's contrast of two colours #rrggbb, from 1 to 21."""
    light = []
    for one in (colour, background):
        channels = np.array([int(one[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        light.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("theme", ["", "--theme light"])
def test_every_colour_of_an_export_can_be_read(theme, tmp_path, capsys):
    pages = {}
    for suffix in ("html", "svg"):
        path = tmp_path / f"page.{suffix}"
        assert run(*SMALL.split(), *theme.split(), "--export", str(path)) == 0
        pages[suffix] = path.read_text(encoding="utf-8")
    block = re.search(r'<pre style="[^"]*background: *(#\w{6})', pages["html"])[1]
    screen = re.search(r'<rect fill="(#\w{6})"', pages["svg"])[1]
    found = {
        block: set(re.findall(r"(?<![-\w])color: *(#\w{6})", pages["html"])),
        screen: set(re.findall(r"fill: (#\w{6})", pages["svg"].split(".terminal-")[-1]))
        | set(re.findall(r"-r\d+ \{ fill: (#\w{6})", pages["svg"])),
    }
    for background, colours in found.items():
        assert (contrast(background, "#ffffff") < 1.2) == bool(theme)
        assert len(colours) >= 7  # four models, notes, words and the rest
        colours -= {background}  # that of a title, on a block of the other colour
        assert min(contrast(colour, background) for colour in colours) >= 4.5, colours
    assert not re.search("opacity|font-style: dim", pages["html"])


# Pipes and interrupts: these need processes of their own


def environment(**changes):
    """That of a user at a terminal of 80 columns."""
    own = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    same = {name: value for name, value in os.environ.items() if name not in own}
    return {**same, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **changes}


@posix
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("to", "codes"), [(">&-", {0}), ("> /dev/full", {1}), ("| head -1", {0, 1})]
)
def test_an_output_that_takes_nothing_loses_no_file(steps, to, codes, tmp_path):
    if "full" in to and not Path("/dev/full").exists():
        pytest.skip("a device of Linux")
    run = f"'{sys.executable}' '{SCRIPT}' {TINY} --steps {steps} --save x.npz --export x.txt"
    command = f"{{ {run}; echo $? > code; }} {to}" if "|" in to else f"{run} {to}; echo $? > code"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, check=False
    )
    assert int((tmp_path / "code").read_text()) in codes
    said = done.stderr.decode().splitlines()
    assert len(said) == ("full" in to)
    assert all(line.startswith("rlhf_loop_pseudo.py: ") for line in said)
    files = {path.name for path in tmp_path.iterdir()} - {"code"}
    assert files == (set() if "full" in to else {"x.npz", "x.txt"})  # nothing was computed


@posix
@pytest.mark.parametrize("flags", ["", "--help", "--show gae"])
@pytest.mark.parametrize("buffered", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffer", "none"])
@pytest.mark.parametrize("to", ["> /dev/full", "| true"])
def test_a_full_or_closed_output_ends_with_one_sentence(flags, buffered, to, tmp_path):
    if "full" in to and not Path("/dev/full").exists():
        pytest.skip("a device of Linux")
    run = f"'{sys.executable}' '{SCRIPT}' {flags or TINY}"
    command = f"{{ {run}; echo $? > code; }} {to}"
    own = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **buffered}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=own, capture_output=True, check=False
    )
    assert (tmp_path / "code").read_text().strip() in "01"  # argparse ignores a full disk
    said = done.stderr.decode().splitlines()
    assert len(said) == ("full" in to and (flags != "--help" or not buffered))
    assert all(re.match("rlhf_loop_pseudo.py: .*space", line) for line in said)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError("no memory"), OSError("disk")])
def test_a_failed_run_costs_no_older_file(failure, tmp_path, capsys, monkeypatch):
    """And leaves a file of what there is only where none was."""
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    old.write_bytes(b"older")
    original, calls = loop.core_loop, []

    def fails(*arguments):
        for step in original(*arguments):
            calls.append(1)
            if len(calls) > 3:
                raise failure
            yield step

    monkeypatch.setattr(loop, "core_loop", fails)
    for path in (old, new):
        calls.clear()
        code = run(*TINY.split(), "--steps", "5", "--save", str(path))
        assert code == (130 if failure is KeyboardInterrupt else 1)
        said = capsys.readouterr().out.splitlines()[-1]
        assert (said == "Interrupted.") == (failure is KeyboardInterrupt)
    assert old.read_bytes() == b"older"
    with np.load(new) as data:
        assert np.isfinite(data["objective/kl"]).tolist() == [True] * 3 + [False] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.npz", "old.npz"]


def test_a_failure_while_writing_costs_no_older_file(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.npz"
    path.write_bytes(b"older")

    def full(place, data):
        with place.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run(*TINY.split(), "--save", str(path)) == 1
    assert path.read_bytes() == b"older"
    assert [place.name for place in tmp_path.iterdir()] == ["x.npz"]
    assert capsys.readouterr().err.count("\n") == 1


@posix
def test_kills_at_random_moments_cost_no_older_file(tmp_path):
    path = tmp_path / "x.npz"
    command = [sys.executable, SCRIPT, *TINY.split(), "--save", str(path)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    for number in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(0.15 + 0.06 * number)
        process.kill()
        process.wait()
        with np.load(path) as data:
            assert len(data) > 10


@pytest.mark.parametrize("name", ["", "n" * 300 + ".npz", "folder.npz", "none/x.npz", "locked.npz"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    name, tmp_path, capsys, monkeypatch
):
    (tmp_path / "folder.npz").mkdir()
    locked = tmp_path / "locked.npz"
    locked.touch()
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, *mode: path != locked and access(path, *mode))
    monkeypatch.setattr(np.random, "default_rng", lambda *_: pytest.fail("work was done"))
    assert run(*TINY.split(), "--save", str(tmp_path / name)) == 2
    error = capsys.readouterr().err
    assert re.search(r"--save: .* must be a .npz file .*write\n$", error)


@posix
def test_ctrl_c_keeps_what_was_there(tmp_path):
    flags = f"{TINY} --steps 1000000 --beta 0 1 --save x.npz --export x.txt"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags.split()],
        cwd=tmp_path,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    with np.load(tmp_path / "x.npz") as data:
        kl = data["objective/kl"]
        assert json.loads(str(data["config"]))["beta"] == [0, 1]
    there = np.isfinite(kl[0]).sum()
    assert kl.shape == (2, 1000000)
    assert 0 < there < 1000000
    assert np.isfinite(kl[0, :there]).all()
    assert np.isnan(kl[1]).all()
    assert sorted(os.listdir(tmp_path)) == ["x.npz", "x.txt"]


def in_process(*arguments, folder):
    """What Python does where modules are looked for in this folder first."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(PYTHONPATH=str(folder)),
        capture_output=True,
        check=False,
        encoding="utf-8",
    )


@pytest.mark.parametrize("name", ["numpy", "rich"])
def test_a_missing_package_says_what_to_run(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    done = in_process(SCRIPT, folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"{name} .*python -m pip install numpy rich\s*", done.stderr)


def test_importing_has_no_side_effect():
    program = """import os, signal, sys; before = dict(os.environ), signal.getsignal(2), sys.stdout
import rlhf_loop_pseudo; assert before == (dict(os.environ), signal.getsignal(2), sys.stdout)"""
    done = in_process("-c", program, folder=SCRIPT.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Terminals


def page_with(monkeypatch, capsys, flags, **changes):
    """What is shown with these variables set."""
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert run(*flags.split()) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", RUNS)
def test_colours_where_there_are_any_and_the_same_text_everywhere(flags, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    piped = page_with(monkeypatch, capsys, flags)
    colours = page_with(monkeypatch, capsys, flags, FORCE_COLOR="1")
    none = page_with(monkeypatch, capsys, flags, FORCE_COLOR="1", NO_COLOR="1")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", piped)
    assert re.search(r"\x1b\[[\d;]*3[1-6]m", colours)
    assert not re.search(r"\x1b\[(?:\d+;)*(3|4|9|10)\d[;m]", none)
    for page in (colours, none):
        assert re.sub(r"\x1b\[[\d;]*m", "", page) == piped
    for columns in ("0", "40", "200"):
        assert page_with(monkeypatch, capsys, flags, COLUMNS=columns) == piped


WIDE = [
    "--vocab-size 7 --response-length 3 --inspect 0",
    "--vocab-size 50257 --width 2 --batch-size 8 --response-length 3 --method grpo --inspect 7",
    f"{TINY} --learning-rate 0.3 --gamma 0.87654321 --lam 0.54321",
    f"{TINY} --learning-rate 0.1 --steps 40 --drift 3 --beta 123456",
    f"{SMALL} --inspect 5",
    f"{SMALL} --steps 3 --beta 0.05 1 --method ppo rloo grpo dpo",
]


@pytest.mark.parametrize("flags", WIDE)
def test_no_line_is_wider_than_80_columns(flags, capsys):
    assert run(*flags.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert not re.search(r"\d\.?\d*…(?!\])", "\n".join(lines)), "a figure is cut"


@pytest.mark.parametrize("flags", RUNS)
def test_an_encoding_without_boxes_gets_plain_characters(flags, tmp_path):
    pages = []
    for encoding in ("ascii", "utf-8"):
        output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with contextlib.redirect_stdout(output):
            assert run(*flags.split(), "--export", str(tmp_path / "x.txt")) == 0
        output.flush()
        pages.append(output.buffer.getvalue().decode(encoding).splitlines())
    plain, boxes = pages
    assert list(map(len, plain)) == list(map(len, boxes))
    picture = [i for i, line in enumerate(boxes) if re.search("[─►▲│]", line)]
    assert len(picture) >= 5
    assert not any("?" in plain[i] for i in picture)
    assert len({plain[i] for i in picture}) == len({boxes[i] for i in picture})
    assert "β" in (tmp_path / "x.txt").read_text(encoding="utf-8")


def uncoloured(output):
    """Bytes of a terminal as text without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", output.decode())


def in_terminal(*arguments, answers=(), early=b""):
    """The script in a terminal: (code, output up to each wait, which gets an answer).

    It waits where its output stops after a blank.
    """
    import pty
    import select

    outer, inner = pty.openpty()
    parts, output, left = [], b"", list(answers)
    os.write(outer, early)
    with subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=environment(),
        start_new_session=True,
    ) as process:
        os.close(inner)
        try:
            while select.select([outer], [], [], 60)[0]:
                try:
                    output += os.read(outer, 65536)
                except OSError:  # it has ended
                    break
                if left and output.endswith(b" ") and not select.select([outer], [], [], 0.2)[0]:
                    parts.append(uncoloured(output))
                    output = b""
                    os.write(outer, left.pop(0))
            process.wait(9)
        finally:
            process.kill()
    os.close(outer)
    return process.returncode, [*parts, uncoloured(output)]


@posix
def test_pause_asks_first_and_waits_at_every_page():
    """The opening, then each page's questions on a cleared screen, and the page."""
    code, parts = in_terminal(*TINY.split(), "--pause", answers=[b"\n"] * 17)
    assert code == 0
    assert len(parts) == 18  # the last is what comes after the last answer
    parts = [re.sub(r"\x1b\[[\d;]*[A-Z]", "", part) for part in parts]  # clears the screen
    titles = [re.findall(r"^(?:Step \d|=== |What the)", part, re.M) for part in parts]
    pages = [f"Step {number}" for number in range(1, 8)] + ["What the"]
    assert titles == [["=== "], *[part for page in pages for part in ([], [page])], []]
    for asked, page in zip(parts[1:-1:2], parts[2:-1:2]):
        questions = re.findall(r"\S.*\?", asked)
        assert questions
        assert all(question in page for question in questions)


@posix
def test_ctrl_d_ends_the_walk(tmp_path):
    path = tmp_path / "x.npz"
    flags = [*TINY.split(), "--pause", "--save", str(path)]
    code, parts = in_terminal(*flags, answers=[b"\n", b"\n", b"\x04"])
    assert code == 130
    assert "Traceback" not in parts[-1]
    with np.load(path) as data:
        assert "responses" in data


@posix
def test_a_bar_counts_the_steps_and_leaves_nothing_behind():
    code, (output,) = in_terminal(*SMALL.split(), "--steps", "25", "--beta", "1")
    assert code == 0
    assert "0:00:00" in output  # the time left comes to an end
    assert "100%" in output
    assert output.rpartition("\x1b[?25l")[2].count("\x1b[?25h") >= 1  # the cursor is back
    assert "%" not in re.split(r"\x1b\[2K", output)[-1].split("===")[0]
