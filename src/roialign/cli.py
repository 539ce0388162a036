"""The `roialign` command: `roialign demo`, `identify`, `info`, `show`."""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from roialign import __version__, _core, explain, get_num_threads

LIBRARIES = "numpy", "torch", "jax", "mindspore", "cupy"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
EXAMPLES = {  # of each command
    "demo": "roialign demo --output picture.png",
    "info": "roialign info --json",
    "identify": "roialign identify --onnx model.onnx",
    "show": "roialign show --box 10,20,60,50 --map 32x48 --scale 1/4 "
    "--convention onnx:half_pixel openvino:half_pixel -o why.png",
}
ENDS = """exit status:
  0  done; identify: each node has a rule of roialign's
  1  the answer is no, or something is missing: a file, a package
  2  wrong usage

What the conventions are, and every error, is in docs/ of the source: start with README.md."""


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
    """Name -> what is known of it."""
    isas = ", ".join(
        isa if isa in _core.usable_isas else f"{isa} (not on this CPU)"
        for isa in _core.compiled_isas
    )
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("ROIALIGN_")]
    bfloat16, triton = installed("ml_dtypes"), installed("triton")
    return {
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


def run_demo(output):
    try:
        from roialign import demo
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        sys.exit("roialign demo: needs Pillow: pip install pillow, or install roialign[demo]")
    demo.run(output)


def run_identify(path, as_json):
    """0 if every RoiAlign node has a rule of ours, 1 if one has not or there is none."""
    try:
        from roialign import _identify_onnx
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxruntime"):
            raise
        sys.exit("roialign identify: needs ONNX and its runtime: pip install onnx onnxruntime")
    found = list(_identify_onnx.identify_nodes(path))
    if as_json:
        rows = [
            {"node": node, "attributes": given, "verdict": str(rule), **asdict(rule)}
            for node, given, rule in found
        ]
        print(json.dumps(rows, indent=2))
    else:
        for node, given, rule in found:
            attributes = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
            print(f"{node} ({attributes})\n  {rule}\n  {rule.advice}")
        if not found:
            print(f"{path} has no RoiAlign node")
    return 0 if found and all(rule.matches for _, _, rule in found) else 1


def listed(separator, number, example):
    """A reader of numbers with a separator between them."""

    def read(text):
        try:
            return tuple(number(part) for part in text.split(separator))
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"{text!r} is not like {example}") from None

    return read


def quotient(text):
    """1/4 or 0.25."""
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def run_show(given):
    """0 if the picture was written, 2 if none can be made of what was given."""
    try:
        figure = explain(
            *(given.box, given.map, given.bins * 2 if len(given.bins) == 1 else given.bins),
            spatial_scale=given.scale[0] if len(given.scale) == 1 else given.scale,
            sampling_ratio=given.sampling_ratio,
            convention=given.convention,
            angle=given.angle,
            clockwise=given.clockwise,
        )
        figure.savefig(given.output, dpi=120)
    except ImportError as error:
        sys.exit(f"roialign show: {error}")
    except (TypeError, ValueError) as error:
        print(f"roialign show: {error}", file=sys.stderr)
        return 2
    print(*[text.get_text() for text in figure.texts], given.output, sep="\n")
    return 0


def run_info(as_json):
    rows = info()
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(f"{name:13} {value}" for name, value in rows.items()))


def with_examples(*commands):
    """Options of a parser: these examples and the exit status at the end of its help."""
    lines = "\n  ".join(EXAMPLES[command] for command in commands)
    return {
        "epilog": f"examples:\n  {lines}\n\n{ENDS}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="roialign",
        description="RoIAlign for NumPy, PyTorch, JAX and MindSpore:\nsee that it works here, and "
        "which rule a model has.",
        **with_examples(*EXAMPLES),
    )
    parser.add_argument("--version", action="version", version=f"roialign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="pool regions of a photograph, draw and print them",
        description="Pools four regions of a photograph, draws them and prints times.",
        **with_examples("demo"),
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("roialign-demo.png"),
        metavar="PATH",
        help="the picture to write (default: %(default)s)",
    )
    about = commands.add_parser(
        "info",
        help="print version, instruction set, threads, array libraries",
        description="Prints versions, the instruction set, threads and the array libraries that\n"
        "are usable: what a report of an error needs.",
        **with_examples("info"),
    )
    identify = commands.add_parser(
        "identify",
        help="say which rule the RoiAlign nodes of an ONNX model have",
        description="Runs each RoiAlign node of a model in ONNX Runtime. Says which rule it has,\n"
        "and the call of roialign that gives the same.",
        **with_examples("identify"),
    )
    identify.add_argument("--onnx", type=Path, required=True, metavar="MODEL", help="its file")
    for command in (about, identify):
        command.add_argument("--json", action="store_true", help="print all of it as JSON")
    shown = commands.add_parser(
        "show",
        help="draw what RoIAlign does with a box, under one convention or several",
        description="Draws the feature grid, the box, its bins and samples, one sample with its\n"
        "pixels and weights, and the pooled values. Several conventions are drawn side by\n"
        "side, and what differs is said in words. Needs Matplotlib.",
        **with_examples("show"),
    )
    pair = listed("x", int, "32x48")
    add = shown.add_argument
    add(
        "--box",
        type=listed(",", float, "10,20,60,50"),
        required=True,
        metavar="X1,Y1,X2,Y2",
        help="in image pixels; --box=-3,... if it begins with a minus; "
        "with --angle: X,Y,WIDTH,HEIGHT,ANGLE",
    )
    add("--map", type=pair, required=True, metavar="HxW", help="rows and columns of the map")
    add("--bins", type=pair, default=(7,), metavar="PxQ", help="bins, one number for both (7)")
    add(
        "--scale",
        type=listed(",", quotient, "1/4 or 0.25,0.5"),
        default=(1.0,),
        metavar="S",
        help="spatial_scale, feature pixels per image pixel, as 1/4 or 0.25; y,x if they differ",
    )
    add("--sampling-ratio", type=int, nargs="+", default=[0], metavar="N", help="0: adaptive")
    add("--convention", nargs="+", default=["half_pixel"], metavar="NAME", help="or an alias")
    add("--angle", choices=("degrees", "radians"), help="the unit of the angle of a turned box")
    add("--clockwise", action="store_true", help="how a box turns")
    add("--output", "-o", type=Path, default=Path("roialign-show.png"), metavar="PATH")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "demo":
            run_demo(arguments.output)
        elif arguments.command == "identify":
            return run_identify(arguments.onnx, arguments.json)
        elif arguments.command == "show":
            return run_show(arguments)
        else:
            run_info(arguments.json)
    except (OSError, ValueError) as error:  # a path, an environment variable
        sys.exit(f"roialign {arguments.command}: {error}")
