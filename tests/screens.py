"""Reading a screen: its pages, the figures after a label and the columns of a table."""

import contextlib
import functools
import io
import re

import pytest

import rlhf_loop_pseudo as loop
from conftest import after, numbers, run, shown

learn_once = functools.cache(loop.learn_from_human)


@pytest.fixture(scope="module")
def letters_once():
    """The stages before the loop, computed once for each configuration of them.

    What they learn depends on none of the settings that are left out of the key.
    """
    names = "seed", "vocab_size", "width", "prompt_length", "response_length", "preference_pairs"

    def learn(config):
        return learn_once(loop.Config(**{name: getattr(config, name) for name in names}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learn_from_human", learn)
        yield


@pytest.fixture(scope="module")
def little_theory(letters_once):
    """The optimum from few responses, where a test does not ask how exact it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "theory", functools.partial(loop.theory, count=24))
        yield


def printed(flags, code=0):
    """What the command line prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert run(*flags.split()) == code
    return output.getvalue()


def pages_of(text):
    """The pages of a screen by their titles. A title is all that begins at the margin."""
    found = [page.rstrip() for page in re.split(r"(?m)^(?=[=A-Z])", text)[1:]]
    return {re.match("[^:\n]*", page)[0].strip("= "): page for page in found}


def walk(flags, folder):
    """(pages, arrays) of a run."""
    text, data = shown(flags, folder)
    return pages_of(text), data


def sentence(page):
    """A page as one line, for words that textwrap may break anywhere."""
    return " ".join(page.split())


def figures(page, label):
    """The numbers after a label that begins a line."""
    return numbers(after(page, label))


def is_shown(number, value):
    """Whether a printed number is this value, rounded as it is printed."""
    return abs(number - value) <= 0.5000001 * 10**-number.decimals + 2e-6 * abs(value)


def are_shown(found, values):
    """The same of several: as many, and in this order."""
    values = list(values)
    assert len(found) == len(values), (found, values)
    wrong = [pair for pair in zip(found, values) if not is_shown(*pair)]
    assert not wrong, wrong
    return True


def listed(row):
    """What is left of a row that is printed as [a, b, …, z], of three numbers or of all."""
    return [*row[:2], row[-1]] if len(row) > 3 else row


def table(page, first, gap=2):
    """{head: cells} of the table whose heads begin so; cells have at least gap blanks between."""
    lines = page.splitlines()
    top = next(i for i, line in enumerate(lines) if line.split()[:1] == [first])
    rows = []
    for line in lines[top:]:
        cells = re.split(rf"\s{{{gap},}}", line.strip())
        if rows and gap > 1:  # a last cell may hold several words
            cells = cells[: len(rows[0])]
        if rows and len(cells) != len(rows[0]):
            break
        rows.append(cells)
    heads, *rows = rows
    return dict(zip(heads, zip(*rows), strict=True))
