"""Files, interrupts, pipes and terminals: nothing is lost, nothing half written, never a traceback."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import shown

import rlhf_loop_pseudo as loop

SCRIPT = Path(loop.__file__)
TINY = "--vocab-size 12 --batch-size 4 --prompt-length 3 --response-length 5 --width 4"
SMALL = "--preset letters --prompt-length 2 --response-length 4 --width 4 --preference-pairs 50 --batch-size 8"
posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and terminals of POSIX")


@pytest.fixture(autouse=True)
def little_theory(monkeypatch):
    """What is tested here does not depend on how exactly the optimum is estimated."""
    monkeypatch.setattr(loop.attainable_gain, "__defaults__", (2, 128))


# Files


@pytest.mark.parametrize("flags", [TINY, f"{TINY} --steps 2"])
def test_an_existing_file_is_replaced_and_nothing_is_left_beside_it(flags, tmp_path):
    for name in ("arrays.npz", "page.svg", "page.html", "page.txt"):
        (tmp_path / name).write_text("old")
        os.link(tmp_path / name, tmp_path / "link")
        shown(f"{flags} --export {tmp_path / name}" if "page" in name else flags, tmp_path)
        assert (tmp_path / name).stat().st_size > 100
        assert (tmp_path / "link").read_text() == "old"  # a new file took its place, in one step
        (tmp_path / "link").unlink()
    assert sorted(os.listdir(tmp_path)) == ["arrays.npz", "page.html", "page.svg", "page.txt"]


@posix
@pytest.mark.parametrize(("flag", "name"), [("--save", "x.npz"), ("--export", "x.txt"), ("--export", "x.svg")])
def test_a_disk_that_is_full_leaves_the_old_file_whole(flag, name, tmp_path, capsys):
    import resource

    path = tmp_path / name
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        code = loop.main([*TINY.split(), flag, str(path)])
    except OSError:
        code = 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_locked_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert loop.main([*TINY.split(), "--save", str(tmp_path / "x.npz")]) == 2
    assert "--save" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "name"), [("--save", "x.npz"), ("--export", "x.html")])
def test_a_place_that_cannot_be_written_is_refused_first(flag, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(np.random, "default_rng", lambda *_: pytest.fail("work was done"))
    (tmp_path / name).mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    (tmp_path / "locked").mkdir()
    for path in (tmp_path / name, tmp_path / "locked" / name, tmp_path / "missing" / name):
        assert loop.main([flag, str(path)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert re.search(f"error: {flag}: .*{re.escape(str(path))}.*folder that is there and writable", output.err)


@pytest.mark.parametrize("flags", [f"{TINY} --inspect 1", f"{SMALL} --steps 3 --beta 0 1"])
def test_every_export_holds_what_was_shown(flags, tmp_path, capsys):
    for suffix in (".txt", ".svg", ".html"):
        path = tmp_path / f"page{suffix}"
        assert loop.main([*flags.split(), "--export", str(path)]) == 0
        printed, page = capsys.readouterr().out, path.read_text(encoding="utf-8")
        if suffix == ".txt":
            assert page == printed
        else:
            text = re.sub(r"(?s)<(style|defs|title)>.*?</\1>|<[^>]*>", "", page)
            words = re.sub(r"\s", "", html.unescape(text)).removeprefix("rlhf_loop_pseudo")
            assert words == re.sub(r"\s", "", printed)


LONG = f"{TINY} --beta 0.12345678901234567890123456789012345 --learning-rate 0.01"


@pytest.mark.parametrize("flags", [LONG, f"{SMALL} --steps 3 --advantage gae rloo --group-size 8"])
def test_a_picture_cuts_nothing(flags, tmp_path, capsys):
    path = tmp_path / "page.svg"
    assert loop.main([*flags.split(), "--export", str(path)]) == 0
    printed, picture = capsys.readouterr().out, path.read_text(encoding="utf-8")
    assert flags != LONG or max(map(len, printed.splitlines())) > 80
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', picture).groups())
    screen = re.search(r'terminal">\s*<rect x="0" y="0" width="(\S+)" height="(\S+)"', picture)
    clip = [float(size) for size in screen.groups()]
    ends = [
        (float(x) + float(length), float(y))
        for x, y, length in re.findall(
            r'<text class="\S+-r\d+" x="(\S+)" y="(\S+)" textLength="(\S+)"[^>]*>\S', picture
        )
    ]
    assert max(x for x, _ in ends) <= clip[0] + 1.5 < width  # rich's own pixel; a character has 12
    assert max(y for _, y in ends) <= clip[1] < height
    rows = {y for _, y in ends}
    assert len(rows) >= len([line for line in printed.splitlines() if line])
    assert "…" not in html.unescape(picture) or "…" in printed


def contrast(colour, background):
    """WCAG's contrast of two colours #rrggbb, from 1 to 21."""
    light = []
    for each in (colour, background):
        channels = np.array([int(each[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        light.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(light) / min(light)


def test_every_colour_of_an_export_can_be_read(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert loop.main([*SMALL.split(), "--inspect", "1", "--export", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    background = re.search(r"background-color: (#\w{6})", text)[1]
    colours = set(re.findall(r"(?<!-)color: (#\w{6})", text))
    assert len(colours) >= 7  # five owners, notes, and what has no colour
    assert "background-color" not in text.split("<body>")[1]
    assert min(contrast(colour, background) for colour in colours) >= 4.5
    picture = tmp_path / "page.svg"
    assert loop.main([*SMALL.split(), "--steps", "3", "--beta", "0", "1", "--export", str(picture)]) == 0
    text = picture.read_text(encoding="utf-8")
    background = re.search(r'<rect fill="(#\w{6})"', text)[1]
    colours = set(re.findall(r"-r\d+ \{ fill: (#\w{6})", text))
    assert len(colours) >= 7
    assert min(contrast(colour, background) for colour in colours) >= 4.5


# Divergence and interrupts


@pytest.mark.parametrize("steps", ["1", "5", "5 --beta 0.1 0.2"])
def test_divergence_says_so_and_keeps_what_there_is(steps, tmp_path, capsys):
    page = tmp_path / "page.txt"
    epochs = 4 if steps == "1" else 1  # the first epoch's losses are those before any update
    flags = f"{TINY} --steps {steps} --ppo-epochs {epochs} --learning-rate 1e30 --export {page}"
    text, data = shown(flags, tmp_path, code=1)
    error = capsys.readouterr().err
    step = int(re.fullmatch(r"rlhf_loop_pseudo.py: step (\d): the loss .*--learning-rate.*\n", error)[1])
    assert "Update complete!" not in text
    assert page.read_text(encoding="utf-8") == text
    if steps == "1":
        assert step == 1
        assert {"kl", "advantages"} <= set(data)
        assert "Step 6" in text
    else:
        kl = np.atleast_2d(data["objective/kl"])
        assert np.isfinite(kl[0]).sum() == step - 1 > 0
        assert not np.isfinite(kl[1:]).any()


def test_the_critics_loss_is_watched_too(tmp_path, monkeypatch, capsys):
    original = loop.critic_gradients
    monkeypatch.setattr(loop, "critic_gradients", lambda *arguments: (original(*arguments)[0], np.nan))
    shown(TINY, tmp_path, code=1)
    assert "step 1: the loss is not finite" in capsys.readouterr().err


def test_the_actors_loss_is_watched_too(monkeypatch, capsys):
    original = loop.actor_gradients
    monkeypatch.setattr(loop, "actor_gradients", lambda *a: (original(*a)[0], np.inf, original(*a)[2]))
    assert loop.main([*TINY.split(), "--advantage", "grpo", "--steps", "2"]) == 1
    assert "step 1: the loss is not finite" in capsys.readouterr().err


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The runs that need a process of their own, started together: name -> (code, output, errors, folder)."""
    script, python = str(SCRIPT), sys.executable
    commands = {
        "interrupted walk-through": [script, "--vocab-size", "2000", "--ppo-epochs", "9999", "--save", "x.npz"],
        "interrupted training": [script, *TINY.split(), "--steps", "100", "--beta", *map(str, range(20))],
        "head": ["-u", script, *TINY.split(), "--inspect", "1", "--save", "x.npz"],
        "head of a recipe": ["-u", script, "--recipe", "verl"],
        "no numpy": [script],
        "no rich": [script],
        "import": [
            "-c",
            "import os, signal; before = dict(os.environ), signal.getsignal(2); import rlhf_loop_pseudo; "
            "print(before == (dict(os.environ), signal.getsignal(2)))",
        ],
        "ascii": [script, *TINY.split(), "--steps", "3", "--export", "x.txt"],
    }
    commands["interrupted training"] += ["--save", "x.npz", "--export", "x.txt"]
    started, options = {}, {}
    if os.name == "posix":  # where tests run in the background of a shell, Ctrl-C may be ignored
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name, command in commands.items():
        if os.name != "posix" and name.startswith(("interrupted", "head")):
            continue
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        environment = {**os.environ, "PYTHONIOENCODING": "ascii" if name == "ascii" else "utf-8"}
        environment["PYTHONPATH"] = str(SCRIPT.parent)
        if name.startswith("no "):
            missing = name.split()[1]
            error = f"raise ModuleNotFoundError('No module named {missing}', name={missing!r})"
            (folder / f"{missing}.py").write_text(error)
            environment["PYTHONPATH"] = str(folder)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "bufsize": 0}
        process = subprocess.Popen([python, *command], cwd=folder, env=environment, **pipes, **options)
        started[name] = process, folder
    try:
        yield {name: (*end_of(name, process), folder) for name, (process, folder) in started.items()}
    finally:
        for process, _ in started.values():
            process.kill()


def end_of(name, process):
    """Interrupt a process, or close its output, once it has printed enough. Returns (code, output, errors)."""
    wait = {"interrupted walk-through": b"Step 6", "interrupted training": b"a response"}.get(name)
    seen = b""
    if name.startswith("head"):
        process.stdout.readline()
        process.stdout.close()
        with process.stderr:
            return process.wait(60), b"", process.stderr.read()
    while wait and wait not in seen and (line := process.stdout.readline()):
        seen += line
    if wait:
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    return process.returncode, seen + output, errors


@posix
def test_ctrl_c_in_the_walk_through_keeps_the_steps_so_far(processes):
    code, output, errors, folder = processes["interrupted walk-through"]
    assert (code, errors) == (130, b"")
    assert output.endswith(b"Interrupted.\n\n")
    with np.load(folder / "x.npz") as data:
        assert {"whitened", "values", "config"} <= set(data)
        assert "ratio" not in data
    assert os.listdir(folder) == ["x.npz"]


@posix
def test_ctrl_c_in_the_second_of_many_trainings_keeps_the_first(processes):
    code, output, errors, folder = processes["interrupted training"]
    assert (code, errors) == (130, b"")
    with np.load(folder / "x.npz") as data:
        kl = data["objective/kl"]
        assert json.loads(str(data["config"]))["beta"] == list(range(20))
    assert kl.shape == (20, 100)
    assert np.isfinite(kl[0]).all()
    assert np.isnan(kl[-1]).all()
    assert output.endswith(b"Interrupted.\n\n")
    assert b"compared" not in output
    assert (folder / "x.txt").read_text(encoding="utf-8") == output.decode()
    assert sorted(os.listdir(folder)) == ["x.npz", "x.txt"]


@posix
@pytest.mark.parametrize("name", ["head", "head of a recipe"])
def test_a_reader_that_leaves_is_no_error(name, processes):
    assert processes[name][2] == b""


@pytest.mark.parametrize("name", ["numpy", "rich"])
def test_a_missing_package_says_what_to_run(name, processes):
    code, output, errors, _ = processes[f"no {name}"]
    assert (code, output) == (1, b"")
    assert errors.decode() == f"{name} is not installed. Run: python -m pip install numpy rich\n"


def test_importing_has_no_side_effect(processes):
    assert processes["import"][:3] == (0, b"True\n", b"")


@pytest.mark.parametrize("given", [None, "3"])
def test_a_script_of_its_own_takes_one_thread_unless_told_otherwise(given):
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    environment |= {"OPENBLAS_NUM_THREADS": given} if given else {}
    program = f"""import os, runpy, sys
sys.argv[1:] = ["--recipe", "verl"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit:
    sys.stderr.write(os.environ.get("OPENBLAS_NUM_THREADS", "none"))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, env=environment)
    assert done.stderr == (given or "1")


def test_an_output_without_greek_letters(processes):
    code, output, errors, folder = processes["ascii"]
    assert (code, errors) == (0, b"")
    assert "score" in output.decode("ascii")
    assert "β" in (folder / "x.txt").read_text(encoding="utf-8")


# Terminals


def test_plain_when_piped_and_colours_when_asked_for(capsys, monkeypatch):
    pages = {}
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("", "FORCE_COLOR", "NO_COLOR"):
        for each in ("FORCE_COLOR", "NO_COLOR"):
            monkeypatch.delenv(each, raising=False)
        if name:
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv(name, "1")
        assert loop.main([*TINY.split(), "--steps", "3"]) == 0
        pages[name] = capsys.readouterr().out
    assert "\x1b" not in pages[""]
    assert re.search(r"\x1b\[(1;)?3[1-6]m", pages["FORCE_COLOR"])
    assert not re.search(r"\x1b\[(1;)?[39]\dm", pages["NO_COLOR"])
    for page in pages.values():
        assert re.sub(r"\x1b\[[0-9;]*m", "", page) == pages[""]


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_same_text_in_any_width(columns, capsys, monkeypatch):
    pages = []
    for width in ("80", columns):
        monkeypatch.setenv("COLUMNS", width)
        assert loop.main([*TINY.split(), "--inspect", "0"]) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]


def in_terminal(*arguments, answers=0, size=(24, 80)):
    """The script in a terminal of that size. At each [Enter], answers it. Returns (code, output up to each answer)."""
    import fcntl
    import pty
    import select
    import struct
    import termios

    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(SCRIPT), *arguments]
    parts, output = [], b""
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment) as process:
        os.close(inner)
        while True:
            try:
                output += os.read(outer, 65536)
            except OSError:  # it has ended
                break
            if len(parts) < answers and output.endswith(b"[Enter] "):
                parts.append(output)
                output = b""
                assert not select.select([outer], [], [], 0.05)[0], "it does not wait"
                os.write(outer, b"\n")
    os.close(outer)
    return process.returncode, [part.decode() for part in [*parts, output]]


@posix
def test_pause_waits_for_enter_after_every_step_the_last_too():
    code, parts = in_terminal(*TINY.split(), "--pause", answers=7)
    assert code == 0
    for step, part in enumerate(parts[:7], 1):
        assert re.findall(r"Step (\d):", part) == [str(step)]
        assert part.count("[Enter]") == 1
    assert "Update complete!" in parts[6]
    assert "parameters" in parts[7]
    assert "parameters" not in parts[6]
    assert "[Enter]" not in parts[7]


@posix
@pytest.mark.parametrize("width", [80, 50])
def test_live_figures_fit_the_terminal_and_leave_nothing_behind(width):
    arguments = f"{SMALL} --steps 150 --beta 0 0.1"
    code, (output,) = in_terminal(*arguments.split(), size=(40, width))
    assert code == 0
    live = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", output)]
    live = [line for line in live if re.search(r"\d+/150", line)]
    assert max(map(len, live)) <= width
    assert {"β 0, gae", "β 0.1, gae"} == {re.search(r"β \S+ \w+", line)[0] for line in live}
    if width == 80:
        assert any(re.search(r"score -?\d+\.\d\d human \d\.\d\d KL -?\d+\.\d\d", line) for line in live)
    screen = Screen(width)
    screen.feed(output)
    text = "\n".join(screen.lines)
    assert "/150" not in text
    assert "a response" in text
    assert "\x1b[?25l" not in output.rpartition("\x1b[?25h")[2]  # the cursor is back


class Screen:
    """A terminal of endless height that knows what rich uses: text, CR, LF, cursor up, erase line, colours."""

    def __init__(self, width):
        self.width, self.lines, self.row, self.column = width, [""], 0, 0

    def feed(self, output):
        """Write the output on the screen."""
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", output):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                self.row -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif not part.startswith("\x1b"):
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1


def test_no_live_figures_in_a_pipe_or_an_export(tmp_path, capsys):
    page = tmp_path / "page.txt"
    assert loop.main([*TINY.split(), "--steps", "5", "--export", str(page)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert page.read_text(encoding="utf-8") == output.out
    assert "/5" not in output.out
