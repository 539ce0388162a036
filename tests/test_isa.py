"""Every instruction set that this machine runs gives the same function."""

from pathlib import Path

import pytest

from isolation import python
from roialign import _core

ROOT = Path(__file__).parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("golden", "properties", "laws", "tangent")]


@pytest.mark.parametrize("isa", [isa for isa in _core.usable_isas if isa != _core.isa])
def test_same_function(isa):
    """The tests of values; those of the chosen instruction set run without this."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=quick"]
    env = {"ROIALIGN_ISA": isa}
    done = python("-m", "pytest", *options, *TESTS, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
