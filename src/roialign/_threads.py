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

    Results do not depend on it: they are the same bits for any number.

    Args:
        n: at least 1; anything with ``__index__`` but a bool.

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

    What :func:`set_num_threads` set; before that the environment's ``ROIALIGN_NUM_THREADS``, else
    the CPUs that this process may use (its affinity and its cgroup's quota).

    >>> import roialign
    >>> roialign.get_num_threads() >= 1
    True
    """
    global _chosen
    if _chosen is None:
        _chosen = _default()
    return _chosen
