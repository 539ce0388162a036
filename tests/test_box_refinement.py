"""The examples of box refinement, shortened: they learn, and through the boxes."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from isolation import printed

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("matplotlib", reason="the examples need Matplotlib (roialign[plot])")


@pytest.fixture(params=filter(find_spec, ["torch", "jax"]))
def run(request, tmp_path):
    example, picture = EXAMPLES / f"{request.param}_box_refinement.py", tmp_path / "picture.png"

    def run(*arguments):
        """Columns of the `step` lines (judge, refined, box gradient), and the held-out IoUs."""
        env = {"OMP_NUM_THREADS": "1"}  # steady where other work runs beside it
        arguments = "--seed", 0, "--output", picture, *arguments
        shown = printed(example, *arguments, env=env)
        assert picture.read_bytes().startswith(b"\x89PNG")
        step = r"^step +\d+  judge (\S+)  refined (\S+)  box gradient (\S+)$"
        rows = re.findall(step, shown, re.MULTILINE)
        before, after = re.findall(r"^held-out mean IoU \w+ +(\S+)$", shown, re.MULTILINE)
        columns = [[float(value) for value in column] for column in zip(*rows, strict=True)]
        return columns, float(before), float(after)

    return run


def test_boxes_learn_through_roi_align(run):
    (judge, refined, gradient), before, after = run("--steps", 80)
    assert judge[-1] < 0.8 * judge[0]
    assert refined[-1] < 0.8 * refined[0]
    assert min(gradient) > 0
    assert after > before + 0.1


def test_without_the_box_gradient_no_box_moves(run):
    (judge, _, gradient), before, after = run("--steps", 16, "--detach")
    assert judge[-1] < judge[0]
    assert max(gradient) == 0
    assert after == before
