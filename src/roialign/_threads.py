"""How many CPU threads a call may use."""

from __future__ import annotations

import os

from roialign import _checks, _core

_chosen: int | None = None


def _default() -> int:
    text = os.environ.get("ROIALIGN_NUM_THREADS", "")
    if not text:
        return _core.available_cpus()
    digits = text.lstrip("0")
    if not (digits.isdecimal() and digits.isascii()):
        raise ValueError(f"ROIALIGN_NUM_THREADS must be an integer >= 1, got {text!r}")
    return min(int(digits[:6]), 2**15)


def set_num_threads(n: int) -> None:
    """Sets how many CPU threads a call may use.

    Results are the same bits for any number of threads.

    Args:
        n: at least 1. Anything with ``__index__`` but a bool.

    Raises:
        TypeError: ``n`` is not an int.
        ValueError: ``n`` < 1.

    >>> import roialign
    >>> before = roialign.get_num_threads()
    >>> roialign.set_num_threads(1)
    >>> roialign.get_num_threads()
    1
    >>> roialign.set_num_threads(before)
    """
    global _chosen
    n = _checks.integer("n", n)
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {_checks.shown(n)}")
    _chosen = min(n, 2**15)
    _core.set_xla_threads(_chosen)  # compiled programs of JAX run without Python


def get_num_threads() -> int:
    """How many CPU threads a call may use.

    This is the number that :func:`set_num_threads` set. If it was not called, it is that of the
    environment variable ``ROIALIGN_NUM_THREADS``. If that is not set, it is the number of CPUs that
    this process may use (its affinity and the quota of its cgroup).

    >>> import roialign
    >>> roialign.get_num_threads() >= 1
    True
    """
    global _chosen
    if _chosen is None:
        _chosen = _default()
    return _chosen
