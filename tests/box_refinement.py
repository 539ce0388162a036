"""The examples of box refinement, shortened: they learn, and through the boxes."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(example, tmp_path, *arguments):
    """Columns of the `step` lines (judge, refined, box gradient), and the held-out IoUs."""
    picture = tmp_path / "picture.png"
    ran = subprocess.run(
        [sys.executable, EXAMPLES / example, "--seed", "0", "--output", picture, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # steady where other work runs beside it
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    step = r"^step +\d+  judge (\S+)  refined (\S+)  box gradient (\S+)$"
    rows = re.findall(step, ran.stdout, re.MULTILINE)
    before, after = re.findall(r"^held-out mean IoU \w+ +(\S+)$", ran.stdout, re.MULTILINE)
    columns = [[float(value) for value in column] for column in zip(*rows, strict=True)]
    return columns, float(before), float(after)


def assert_boxes_learn_through_roi_align(example, tmp_path):
    (judge, refined, gradient), before, after = run(example, tmp_path, "--steps", "80")
    assert judge[-1] < 0.8 * judge[0]
    assert refined[-1] < 0.8 * refined[0]
    assert min(gradient) > 0
    assert after > before + 0.1


def assert_no_box_moves_without_the_box_gradient(example, tmp_path):
    (judge, _, gradient), before, after = run(example, tmp_path, "--steps", "16", "--detach")
    assert judge[-1] < judge[0]
    assert max(gradient) == 0
    assert after == before
