"""The Python of each environment: frameworks want different NumPys, so each has its own."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "bench" / ".environments"
TORCH = ("--extra-index-url", "https://download.pytorch.org/whl/cpu", "torch==2.13.0")
REQUIREMENTS = {
    "onnxruntime": ("onnxruntime==1.32.0", "onnx==1.23.2"),
    "paddle": ("paddlepaddle==3.3.1",),
    "openvino": ("openvino==2026.4.1",),
    "mindspore": ("mindspore==2.10.0", "numpy==1.26.4"),
    "torchvision": (*TORCH, "torchvision==0.28.0"),
}
MENDS = {"torchvision": ROOT / ".ci" / "torchvision"}  # takes the Python, where there is a fault


def find(names, given):
    """Name -> Python: from the command line, from `--setup`, or this one if it has the library."""
    found = {name: str(python_of(name)) for name in names if python_of(name).exists()} | given
    for name in names - found.keys():
        if name == "ours" or importlib.util.find_spec(name):
            found[name] = sys.executable
    return found


def set_up(names):
    """Makes the environments that are missing and prints which of them work; those that do not."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    failed = []
    for name in names:
        python, reason = python_of(name), "is new"
        if python.exists():
            reason = fault(name)
        if reason:
            venv.create(ENVIRONMENTS / name, with_pip=True, clear=True)
            pip = [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]]
            reason = error_of(pip) or fault(name)
            if reason and name in MENDS:
                reason = error_of([MENDS[name], python]) or fault(name)
        print(f"{name}: {reason or 'ready'}", flush=True)
        if reason:
            failed.append(name)
            shutil.rmtree(ENVIRONMENTS / name)
    return failed


def python_of(name):
    return ENVIRONMENTS / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fault(name):
    """Why the library cannot pool a pixel; None if it can."""
    code = f"from bench.worker import Session; Session({name!r}, 'cpu').versions()"
    return error_of([python_of(name), "-c", code])


def error_of(command):
    """The last line that a failed command wrote; None for one that succeeds."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
