"""Transcripts: the words of a run, with all that rounding may change masked.

To record them anew: RECORD=1 python -m pytest -k transcript
"""

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "transcripts"
COMMAND = "RECORD=1 python -m pytest -k transcript"


def masked(text):
    """The text with # for figures and ~ for words that a model wrote, without the chart's marks.

    A sentence is one line, wherever it was wrapped, and a row like the one above it is left out.
    """
    lines, inside = [], False
    for line in map(str.rstrip, text.splitlines()):
        paragraph = re.match(r"    [A-Za-z(-]", line)
        line = line if re.search("[►▲└]|^$", line) else " ".join(line.split())
        if not paragraph:
            line = re.sub(r"(?<![\w.])[a-z]+[.…](?=,? |,|$)", "~", line)
        line = re.sub(r"(?<![a-z_\d])-?\d[\d,.]*(-\d+)?%?(?<![,.])\*?", "#", line)
        line = re.sub(r"# ± #|(?<=[#~] )-( -)*(?= |$)", "#", line)
        line = re.sub(r"(# |#, |…, )+#|(~ )+~", lambda row: row[0][-1], line)
        line = re.sub(r"^(# )?│[^─►▲]*$", "│", line)
        line = re.sub(r"^[A-Z][a-z, ]+(?=: human #)", "verdict", line)  # held by its own test
        if paragraph and inside:
            lines[-1] += f" {line}"
        elif [line] != lines[-1:]:
            lines.append(line)
        inside = paragraph
    return re.sub(r"(?<=\w[.?]) (?=[A-Z])", "\n", "\n".join(lines)) + "\n"


def same_as_recorded(name, text):
    """Compare with a transcript, or make it one; what is wrong says how."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("RECORD"):
        path.write_text(masked(text), encoding="utf-8")
    recorded = path.read_text(encoding="utf-8").splitlines()
    assert masked(text).splitlines() == recorded, f"is that meant? Then: {COMMAND}"
