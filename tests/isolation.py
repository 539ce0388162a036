"""A test body in a fresh interpreter: a crash or a hang fails that test and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def isolated(body, *args, env=None, timeout=60):
    """Call `body(*args)`, a function of a test module, and return what it printed."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); "
        f"import {body.__module__} as module; module.{body.__name__}(*{args!r})"
    )
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout
