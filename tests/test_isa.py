"""Every instruction set that this machine runs gives the same function."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from roialign import _core

ROOT = Path(__file__).parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("golden", "properties", "laws", "tangent")]


def run(isa, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"ROIALIGN_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("isa", _core.usable_isas)
def test_forced(isa):
    done = run(isa, "-c", "from roialign import _core; print(_core.isa)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@pytest.mark.parametrize("isa", [isa for isa in _core.usable_isas if isa != _core.isa])
def test_same_function(isa):
    """The tests of values; those of the chosen instruction set run without this."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=quick"]
    done = run(isa, "-m", "pytest", *options, *TESTS)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("isa", sorted({"v2", "v3", "v4", "neon", "bogus"} - {*_core.usable_isas}))
def test_not_usable(isa):
    done = run(isa, "-c", "import roialign")
    assert done.returncode != 0
    assert "ImportError" in done.stderr and isa in done.stderr
