"""The Python of each implementation: frameworks want different NumPys, so each has its own."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "bench" / ".environments"
PEERS = ("onnxruntime", "paddle", "openvino", "mindspore", "torchvision")


def find(given):
    """Name -> Python: from the command line, from `--setup`, or this one where it has the peer."""
    found = {}
    for name in PEERS:
        own = python_of(ENVIRONMENTS / name)
        if name in given:
            found[name] = given[name]
        elif own.exists():
            found[name] = str(own)
        elif importlib.util.find_spec(name):
            found[name] = sys.executable
    return found


def set_up(names):
    """Makes the environments that are missing and prints which peers can be run."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    failed = []
    for name in names:
        folder = ENVIRONMENTS / name
        reason = loads(name, folder) if folder.exists() else "is new"
        if reason:
            venv.create(folder, with_pip=True, clear=True)
            requirements = ROOT / "bench" / "peers" / f"{name}.txt"
            pip = [python_of(folder), "-m", "pip", "install", "--quiet", "-r", requirements]
            reason = error_of(pip) or loads(name, folder)
        print(f"{name}: {reason or 'ready'}", flush=True)
        if reason:
            failed.append(name)
            shutil.rmtree(folder)
    return failed


def python_of(folder):
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def loads(name, folder):
    code = f"import bench.peers.{name} as peer; peer.versions()"
    return error_of([python_of(folder), "-c", code])


def error_of(command):
    """The last line that a failed command wrote; None for one that succeeds."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
