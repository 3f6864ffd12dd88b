"""Transcripts: the words of a run, with all that rounding may change masked.

To record them anew: RECORD=1 python -m pytest -k transcript
"""

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "transcripts"
COMMAND = "RECORD=1 python -m pytest -k transcript"


def masked(text):
    """The text with # for each figure, ~ for what a model wrote and no marks in the chart.

    Blanks that only align are one, and a line that repeats the one above it is left out.
    """
    lines = []
    for line in map(str.rstrip, text.splitlines()):
        indent = re.match(" {0,4}", line)[0]
        line = re.sub(r"(?:^|(?<=  ))(?:[a-z]+[.…]? )*[a-z]+[.…]?$", written, line)
        line = re.sub(r"(?<![a-z_\d])-?\d[\d,.]*(-\d+)?%?(?<![,.])\*?", "#", " ".join(line.split()))
        line = re.sub(r"\b[a-z]+[.…] (?=#)", "~ ", line)  # a word before its figures
        line = line if "=" in line else re.sub(r"(?<=# )(- )*-$|(?<=# )-(?= #)", "#", line)
        line = line.replace(", not more", ", more")  # by its own test
        line = re.sub(r"(# )+#(?=\]|$)", "#", line)  # more figures, or fewer
        line = re.sub(r"^(# )?│[^─►▲]*$", "│", line)  # the chart
        line = line if re.match("[#~ .]+$|│$", line) else indent + line
        lines += [line] if [line] != lines[-1:] else []
    return "\n".join(lines) + "\n"


def written(words):
    """A mask for words that end in full stops one by one, as no sentence does."""
    return "~" if re.search(r"[a-z][.…] [a-z]", words[0]) else words[0]


def same_as_recorded(name, text):
    """Compare with a transcript, or make it one; what is wrong says how."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("RECORD"):
        path.write_text(masked(text), encoding="utf-8")
    recorded = path.read_text(encoding="utf-8").splitlines()
    assert masked(text).splitlines() == recorded, f"is that meant? Then: {COMMAND}"
