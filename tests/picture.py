"""Draw README's picture: the data flow, and what four betas come to, in words.

python tests/picture.py            picture-dark.svg and picture-light.svg, here
python tests/picture.py .github    in that folder
"""

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
loop = importlib.import_module("rlhf_loop_pseudo")

COMMAND = ["--preset", "letters", "--steps", "200", "--beta", "0", "0.05", "0.2", "1"]


def main(folder="."):
    """Train, and keep what the picture shows."""
    _, configs = loop.read_command_line(COMMAND)
    opening, *_, outcome, _ = loop.training_pages(configs, {}, [])
    data_flow = loop.Group(*opening.renderables[:2])  # without the text below it
    for theme in ("dark", "light"):
        path = Path(folder) / f"picture-{theme}.svg"
        path.write_bytes(loop.exported(path, theme, [data_flow, outcome]))
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:2])
