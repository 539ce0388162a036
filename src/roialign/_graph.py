"""For MindSpore's compiler, which reads the source of what runs in a graph.

It does not know all of Python. Of ``if IN_GRAPH:  # @jit.cond: True`` it takes the comment for the
value, and reads only that branch.
"""

from __future__ import annotations

import importlib
from typing import Any

IN_GRAPH = False


def graph_adapter() -> Any:
    """It has what the compiler calls in place of what it cannot read."""
    return importlib.import_module("roialign.mindspore")
