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


def find(names, given):
    """Name -> Python: from the command line, from `--setup`, or this one where it has the library."""
    found = {}
    for name in names:
        own = python_of(ENVIRONMENTS / name)
        if name in given:
            found[name] = given[name]
        elif own.exists():
            found[name] = str(own)
        elif name == "ours" or importlib.util.find_spec(name):
            found[name] = sys.executable
    return found


def set_up(names):
    """Makes the environments that are missing and prints which of them work; those that do not."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    failed = []
    for name in names:
        folder = ENVIRONMENTS / name
        reason = fault(name, folder) if folder.exists() else "is new"
        if reason:
            venv.create(folder, with_pip=True, clear=True)
            pip = [python_of(folder), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]]
            reason = error_of(pip) or fault(name, folder)
        print(f"{name}: {reason or 'ready'}", flush=True)
        if reason:
            failed.append(name)
            shutil.rmtree(folder)
    return failed


def python_of(folder):
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fault(name, folder):
    """Why the library cannot pool a pixel; None if it can."""
    code = f"from bench.worker import Session; Session({name!r}, 'cpu').versions()"
    return error_of([python_of(folder), "-c", code])


def error_of(command):
    """The last line that a failed command wrote; None for one that succeeds."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
