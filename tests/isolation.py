"""A test body, or a program, in a fresh interpreter: a crash or a hang fails that test alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HANG = 600  # seconds that no process takes, with a sanitizer and on a slow machine neither


def python(*arguments, env=None, **options):
    """The finished process, its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=HANG,
        **options,
    )


def printed(*arguments, **options):
    """What Python prints with these arguments, if it succeeds."""
    ran = python(*arguments, **options)
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def calling(body, *args):
    """The arguments with which Python calls `body(*args)`, a function of a test module."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); "
        f"import {body.__module__} as module; module.{body.__name__}(*{args!r})"
    )
    return "-X", "faulthandler", "-c", code


def isolated(body, *args, **options):
    """Call `body(*args)`, a function of a test module, and return what it printed."""
    return printed(*calling(body, *args), **options)


def in_a_child(body):
    """Whether `body()` is true in a forked child that does not hang."""
    if (child := os.fork()) == 0:
        right = False
        try:
            signal.alarm(HANG)
            right = body()
        finally:
            os._exit(not right)
    return os.waitpid(child, 0)[1] == 0
