"""The `roialign` command: `roialign demo`, `roialign info`."""

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from roialign import __version__, _core, get_num_threads

LIBRARIES = "numpy", "torch", "jax", "mindspore", "cupy"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def installed(library):
    """Its version, None if it is not installed; nothing is imported."""
    if find_spec(library) is None:
        return None
    try:
        return version(library)
    except PackageNotFoundError:  # not installed by pip: a source tree on the path
        return "unknown version"


def library_status(library):
    release = installed(library)
    return "no (not installed)" if release is None else f"yes ({release})"


def huge_pages():
    try:
        words = HUGE_PAGES.read_text().split()
    except OSError:
        return "no setting on this system"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def info():
    isas = ", ".join(
        isa if isa in _core.usable_isas else f"{isa} (not on this CPU)"
        for isa in _core.compiled_isas
    )
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("ROIALIGN_")]
    bfloat16, triton = installed("ml_dtypes"), installed("triton")
    rows = {
        "roialign": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "ISA": f"{_core.isa}, compiled: {isas}",
        "threads": get_num_threads(),
        "huge pages": huge_pages(),
        "environment": " ".join(settings) or "no ROIALIGN_ variable set",
        **{library: library_status(library) for library in LIBRARIES},
        "gpu kernels": f"yes (triton {triton})" if triton else "no (needs triton)",
        "bfloat16": f"yes (ml_dtypes {bfloat16})" if bfloat16 else "no (needs ml_dtypes)",
    }
    return "\n".join(f"{name:13} {value}" for name, value in rows.items())


def run_demo(output):
    try:
        from roialign import demo
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        sys.exit("roialign demo: needs Pillow: pip install pillow, or install roialign[demo]")
    demo.run(output)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="roialign", description="RoIAlign for NumPy, PyTorch, JAX and MindSpore."
    )
    parser.add_argument("--version", action="version", version=f"roialign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="pool regions of a photograph, draw and print them")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("roialign-demo.png"),
        metavar="PATH",
        help="the picture to write (default: %(default)s)",
    )
    commands.add_parser("info", help="print version, instruction set, threads, array libraries")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "demo":
            run_demo(arguments.output)
        else:
            print(info())
    except (OSError, ValueError) as error:  # a path, an environment variable
        sys.exit(f"roialign {arguments.command}: {error}")
