"""The tree: who imports whom, how the native code is cut and built."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

import roialign
from roialign import _core
from roialign._adapter import Adapter

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "roialign"
CSRC = ROOT / "csrc"
ADAPTER = {"_core", "_checks", "_rois", "_operations", "_threads"}

# module: (modules of the package that it may import, others beyond the standard library)
ALLOWED = {
    "__init__": ({"_api", "_rule"}, set()),
    "__main__": ({"cli"}, set()),
    "_api": ({"_adapter", "_checks", "_rois", "_rule", "_threads", "mindspore"}, set()),
    "_adapter": (
        {"_checks", "_rois", "numpy", "torch", "jax", "mindspore", "cupy"},
        set(),
    ),
    "_checks": ({"_adapter", "_rule"}, set()),
    "_operations": (set(), set()),
    "_rois": ({"_adapter", "_checks"}, set()),
    "_rule": ({"_core"}, set()),
    "_threads": ({"_checks", "_core"}, set()),
    "numpy": (ADAPTER, {"numpy"}),
    "_dense": (set(), {"jax"}),
    "jax": (ADAPTER | {"_dense", "_triton"}, {"numpy", "jax", "jaxlib", "jax_triton"}),
    "mindspore": (ADAPTER | {""}, {"numpy", "mindspore"}),
    "cupy": ({"_checks", "_rois", "torch"}, {"numpy", "cupy", "torch"}),
    "cli": ({"", "_core", "demo"}, set()),
    "demo": ({""}, {"numpy", "PIL"}),
}
MODULES = sorted(PACKAGE.glob("*.py"))

# rooms: modules beside them, or of the package, that they may import; others: `BEYOND`
ROOMS = {
    "torch/__init__": {"adapter", "former", "kernels", "layer", "rows"},
    "torch/former": set(),
    "torch/calls": {"_operations"},
    "torch/kernels": {"calls", "_checks", "_core", "_rois", "_threads", "_triton", "_ascend"},
    "torch/transforms": {"calls", "_operations"},
    "torch/operators": {"calls", "kernels", "transforms", "_checks", "_core", "_operations"},
    "torch/sharding": {"calls", "operators", "_operations"},
    "torch/onnx": {"calls", "_core", "_rule"},
    "torch/routes": {"calls", "kernels", "onnx", "operators", "sharding", "transforms", "_core"},
    "torch/adapter": {"calls", "kernels", "routes", "_checks", "_rois"},
    "torch/rows": {"adapter", "calls", "kernels", "routes", "_core", "_rois"},
    "torch/layer": {"adapter", "_checks"},
    "_triton/__init__": set(),
    "_triton/geometry": set(),
    "_triton/kernels": {"geometry"},
    "_triton/launch": {"geometry", "kernels", "_rois"},
    "_ascend/__init__": set(),
    "_ascend/products": {"_triton"},
    "_ascend/launch": {"products", "_triton", "_rois"},
}
BEYOND = {
    "torch": {"roialign", "torch", "numpy"},
    "_triton": {"roialign", "triton"},
    "_ascend": {"roialign", "triton"},
}


def imports(tree, package="roialign", root=PACKAGE):
    """(modules of the package, top-level names of others) that a module imports, anywhere in it."""
    inner, outer = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            # from . import a, b; from .a import c
            names = (
                [f"{package}.{node.module}"]
                if node.module
                else [f"{package}.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module == package:
                names = [f"{package}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
        ):
            name = str(node.args[0].value)
            names = [package + name if name.startswith(".") else name]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == package:
                module = rest.split(".")[0]
                submodule = (root / f"{module}.py").exists() or (root / module).is_dir()
                # a public name comes from the package itself
                inner.add(module if submodule or module == "_core" else "")
            elif head not in sys.stdlib_module_names:
                outer.add(head)
    return inner, outer


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_imports_what_its_place_allows(path):
    assert path.stem in ALLOWED, f"{path.name} has no place in the tree: give it one here"
    inner, outer = imports(ast.parse(path.read_text(encoding="utf-8")))
    inner_allowed, outer_allowed = ALLOWED[path.stem]
    assert inner <= inner_allowed
    assert outer <= outer_allowed


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_its_place_allows(name):
    path = (PACKAGE / name).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    beside, outer = imports(tree, path.parent.name, path.parent)
    above, _ = imports(tree)
    assert (beside | above) - {""} <= ROOMS[name]
    assert outer <= BEYOND[path.parent.name]


@pytest.mark.parametrize("folder", BEYOND)
def test_rooms_have_a_place(folder):
    assert {f"{folder}/{p.stem}" for p in (PACKAGE / folder).glob("*.py")} <= set(ROOMS)


@pytest.mark.parametrize(
    "code, inner, outer",
    [
        ("import torch.nn", set(), {"torch"}),
        ("def f():\n    from jax import numpy", set(), {"jax"}),
        ("from . import _core, ROIAlign", {"_core", ""}, set()),
        ("from ._checks import f", {"_checks"}, set()),
        ("import roialign.numpy", {"numpy"}, set()),
        ("import numpy as np, os", set(), {"numpy"}),
        ("import importlib\nimportlib.import_module('torch')", set(), {"torch"}),
        ("__import__('roialign._api')", {"_api"}, set()),
    ],
)
def test_the_reader_of_imports_sees(code, inner, outer):
    assert imports(ast.parse(code)) == (inner, outer)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "mindspore"])
def test_an_adapter_has_what_it_owes(library):
    pytest.importorskip(library, reason=f"the adapter is imported with {library}")
    adapter = importlib.import_module(f"roialign.{library}")
    owed = [name for name, value in vars(Adapter).items() if inspect.isfunction(value)]
    assert {"forward", "check_array", "takes_rows"} <= set(owed)
    for name in owed:
        if name.startswith("_") or (name == "forward_rows" and not hasattr(adapter, name)):
            continue  # where `takes_rows` never is true
        _, *parameters = inspect.signature(getattr(Adapter, name)).parameters
        own = list(inspect.signature(getattr(adapter, name)).parameters)
        assert [p for p in own if p != "tangent"] == parameters, name
    assert adapter.float32 is not None


def test_the_rule_has_one_list():
    # names of its numbers: where they are declared, and where coordinates are computed from them
    known = {
        "csrc/rule.hpp",
        "csrc/geometry.cpp",
        "src/roialign/_rule.py",
        "src/roialign/_dense.py",
        "src/roialign/_triton/geometry.py",
        "src/roialign/torch/onnx.py",
    }
    paths = [*PACKAGE.rglob("*.py"), *SOURCES, *(ROOT / "bench").rglob("*.py")]
    naming = {p for p in paths if "end_offset" in p.read_text(encoding="utf-8")}
    assert {p.relative_to(ROOT).as_posix() for p in naming} <= known


def test_compat_is_apart():
    # the incumbents' signatures stand on the public API
    for path in (PACKAGE / "compat").glob("*.py"):
        inner, _ = imports(ast.parse(path.read_text(encoding="utf-8")))
        assert not inner & {"_core", "_api"}, path.name


SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".cpp", ".hpp", ".h", ".cc", ".inc"})
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(
    r"Python|nanobind|pybind|numpy|xla|dlpack|mindspore|torch|ATen|jax|omp\.h|tbb", re.IGNORECASE
)


def outside_bindings():
    return [p for p in SOURCES if CSRC / "bindings" not in p.parents]


@pytest.mark.parametrize("path", outside_bindings(), ids=lambda p: p.name)
def test_the_core_includes_itself_and_the_standard_library(path):
    text = path.read_text(encoding="utf-8")
    for name in INCLUDE.findall(text):
        assert not FOREIGN.search(name), name
        assert "bindings" not in name, name
    assert "#pragma omp" not in text


def test_there_is_a_core_and_a_binding():
    names = {p.stem for p in outside_bindings()}
    assert {"params", "geometry", "parallel"} <= names
    bindings = [p for p in SOURCES if CSRC / "bindings" in p.parents]
    assert any(
        "nanobind" in name
        for p in bindings
        for name in INCLUDE.findall(p.read_text(encoding="utf-8"))
    )


def test_geometry_knows_its_axis_alone():
    # the rule of coordinates: no threads, no engines, no memory
    for path in CSRC.glob("geometry.*"):
        own = {n for n in INCLUDE.findall(path.read_text(encoding="utf-8")) if n.endswith("hpp")}
        assert own <= {"geometry.hpp", "rule.hpp"}, path.name


def test_what_is_built_per_instruction_set_instantiates_no_library_code():
    # the linker keeps one copy of an inline function: it could be the one of another CPU
    seen, todo = set(), [CSRC / "engine" / "engine.cpp"]
    while todo:
        path = todo.pop()
        names = INCLUDE.findall(path.read_text(encoding="utf-8"))
        own = {p for p in (path.parent / name for name in names) if p.exists()}
        foreign = {name for name in names if not (path.parent / name).exists()}
        allowed = re.compile(r"c[a-z]+|[a-z0-9_]+\.h")  # C's own headers, and intrinsics
        assert all(allowed.fullmatch(name) for name in foreign), f"{path.name}: {foreign}"
        seen.add(path)
        todo += own - seen
    assert len(seen) > 3


def cmake():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    return re.sub(r"#[^\n]*", "", text)


def test_coordinates_are_built_without_contraction():
    commands = re.findall(r"(\w+)\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)", cmake())
    mentions = [body for _, body in commands if "ffp-contract=off" in body]
    assert mentions, "no -ffp-contract=off in CMakeLists.txt"
    # for geometry.cpp, or for every source
    assert any("geometry.cpp" in body for body in mentions) or any(
        name in ("add_compile_options", "target_compile_options")
        for name, body in commands
        if "ffp-contract=off" in body
    )


def test_the_build_keeps_ieee_and_links_no_runtime_of_threads():
    text = cmake()
    for flag in (
        "fast-math",
        "Ofast",
        "-fopenmp",
        "OpenMP",
        "funsafe",
        "associative-math",
        "ffinite-math",
    ):
        assert flag not in text, flag


def test_one_unit_per_instruction_set():
    text = cmake()
    assert "x86-64-" in text
    for isa in ("v2", "v3", "v4", "neon"):
        assert re.search(rf"\b(x86-64-)?{isa}\b", text), isa
    assert set(_core.compiled_isas) <= {"v2", "v3", "v4", "neon"}


def test_every_source_is_built():
    text = cmake()
    for path in SOURCES:
        if path.suffix == ".cpp":
            named = path.name in text or path.stem in text
            assert named or "GLOB" in text, f"{path.name} is in no target"


def test_types_are_marked():
    assert (PACKAGE / "py.typed").exists()
    installed = Path(roialign.__file__).parent
    assert (installed / "py.typed").exists()


def test_version_agrees():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    static = re.search(r'^version\s*=\s*"([^"]+)"', project, re.MULTILINE)
    assert static, "pyproject.toml has no version"
    assert roialign.__version__ == static[1]


def test_names_of_files():
    # nouns; none of the drawers that collect everything
    refused = {"utils", "util", "helpers", "helper", "common", "misc"}
    for path in [*PACKAGE.rglob("*.py"), *SOURCES, *(ROOT / "tests").glob("*.py")]:
        assert path.stem not in refused, path
