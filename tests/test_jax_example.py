"""`examples/jax_box_refinement.py`, shortened: it learns, and through the boxes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="the example needs JAX")
pytest.importorskip("matplotlib", reason="the example needs Matplotlib (roialign[plot])")

EXAMPLE = Path(__file__).parent.parent / "examples" / "jax_box_refinement.py"


def run(tmp_path, *arguments):
    """Columns of the `step` lines (judge, refined, box gradient), and the held-out IoUs."""
    picture = tmp_path / "picture.png"
    ran = subprocess.run(
        [sys.executable, EXAMPLE, "--seed", "0", "--output", picture, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    step = r"^step +\d+  judge (\S+)  refined (\S+)  box gradient (\S+)$"
    rows = re.findall(step, ran.stdout, re.MULTILINE)
    before, after = re.findall(r"^held-out mean IoU \w+ +(\S+)$", ran.stdout, re.MULTILINE)
    columns = [[float(value) for value in column] for column in zip(*rows)]
    return columns, float(before), float(after)


def test_boxes_learn_through_roi_align(tmp_path):
    (judge, refined, gradient), before, after = run(tmp_path, "--steps", "80")
    assert judge[-1] < 0.8 * judge[0]
    assert refined[-1] < 0.8 * refined[0]
    assert min(gradient) > 0
    assert after > before + 0.1


def test_without_the_box_gradient_no_box_moves(tmp_path):
    (judge, _, gradient), before, after = run(tmp_path, "--steps", "16", "--detach")
    assert judge[-1] < judge[0]
    assert max(gradient) == 0
    assert after == before
