"""The tree: who imports whom, how the native code is cut and built."""

import ast
import importlib
import inspect
import re
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import roialign
from roialign import _core
from roialign._adapter import Adapter

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "roialign"
CSRC = ROOT / "csrc"
ADAPTER = "_core _checks _rois _operations _threads"

# module: modules beside it, or of the package, that it may import
PLACES = {
    "__init__": "_api _explain _grid _identify _rule",
    "__main__": "cli",
    "_api": "_adapter _checks _graph _layout _levels _rois _rule _threads",
    "_adapter": "_checks _graph _rois numpy torch jax mindspore cupy",
    "_checks": "_adapter _graph _layout _rule",
    "_explain": "_api _explain_figure _grid _rule",
    "_explain_figure": "_explain _grid _rule",
    "_graph": "mindspore",
    "_layout": "",
    "_grid": "_checks _core _rule",
    "_identify": "_api _checks _rule",
    "_identify_onnx": "_identify",
    "_levels": "_adapter _checks _graph",
    "_operations": "",
    "_rois": "_adapter _checks",
    "_rule": "_core",
    "_threads": "_checks _core",
    "numpy": ADAPTER,
    "_dense": "",
    "jax": f"{ADAPTER} _dense _layout _rule _triton",
    "mindspore": f"{ADAPTER} _layout _levels _rule",
    "cupy": "_checks _rois torch",
    "cli": "_core _identify_onnx demo",
    "demo": "",
    "torch/__init__": "adapter former kernels layer script",
    "torch/former": "",
    "torch/calls": "_checks _core _rule",
    "torch/kernels": "calls _checks _core _rois _threads _triton _ascend",
    "torch/transforms": "calls _operations",
    "torch/operators": "calls kernels transforms _core _operations",
    "torch/sharding": "operators _operations",
    "torch/onnx": "calls kernels _core _rule",
    "torch/routes": "calls kernels onnx operators sharding transforms _core",
    "torch/adapter": "calls kernels routes _checks _core _rois numpy",
    "torch/script": "_checks",
    "torch/layer": "adapter script",
    "_triton/__init__": "",
    "_triton/geometry": "",
    "_triton/kernels": "geometry",
    "_triton/rows": "geometry kernels",
    "_triton/launch": "geometry kernels rows _rois",
    "_triton/sampled": "geometry kernels launch",
    "_triton/turned": "geometry kernels launch sampled",
    "_triton/compiled": "kernels launch sampled turned _rois",
    "_ascend/__init__": "",
    "_ascend/products": "_triton",
    "_ascend/launch": "products _triton _rois",
    "compat/__init__": "",
    "compat/detectron2": "compat _checks torch",
    "compat/mmcv": "_checks torch",
    "compat/mmdet": "compat _checks torch",
    "compat/torchvision": "_checks torch",
}
# file or folder: what it may import beyond the package and the standard library
BEYOND = {
    "_explain": "numpy matplotlib",
    "_explain_figure": "numpy matplotlib",
    "_grid": "numpy",
    "_identify": "numpy",
    "_identify_onnx": "google numpy onnx onnxruntime",
    "_levels": "numpy",
    "numpy": "numpy",
    "_dense": "jax",
    "jax": "numpy jax jaxlib jax_triton",
    "mindspore": "numpy mindspore",
    "cupy": "numpy cupy torch",
    "demo": "numpy PIL",
    "torch": "torch numpy",
    "_triton": "triton",
    "_ascend": "triton",
    "compat": "torch torchvision",
}


def imports(tree, package="roialign"):
    """(modules of the package, top-level names of others) that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTERS):
            given = getattr(node.args[0], "value", None)  # of a constant
            names |= {resolve_name(given, package)} if given else set()
    inner = {module_of(name) for name in names if name.startswith("roialign")}
    outer = {name.partition(".")[0] for name in names} - {"roialign", *sys.stdlib_module_names}
    return inner, outer


IMPORTERS = "import_module", "__import__"


def module_of(name):
    """Of a module or what is in it, as in PLACES; a public name comes from the package itself."""
    path = name.replace(".", "/").partition("/")[2]
    while path and path != "_core" and not {path, f"{path}/__init__"} & set(PLACES):
        path = path.rpartition("/")[0]
    return path


def test_every_module_has_a_place():
    found = {p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py")}
    assert found == set(PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_a_module_imports_what_its_place_allows(place):
    path = (PACKAGE / place).with_suffix(".py")
    folder = place.rpartition("/")[0]
    package = f"roialign.{folder}".rstrip(".")
    inner, outer = imports(ast.parse(path.read_text(encoding="utf-8")), package)
    folders, beside = PLACES[place].split(), {"", folder}
    beside |= {f"{folder}/{name}" for name in folders}
    assert not [n for n in inner - beside if n.partition("/")[0] not in folders]
    assert outer <= set(BEYOND.get(place.split("/")[0], "").split())


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


# Of an adapter that `takes_rows` never, or `takes_any_form`
UNASKED = {"forward_rows", "numbered"}


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "mindspore"])
def test_an_adapter_has_what_it_owes(library):
    pytest.importorskip(library, reason=f"the adapter is imported with {library}")
    adapter = importlib.import_module(f"roialign.{library}")
    owed = [name for name, value in vars(Adapter).items() if inspect.isfunction(value)]
    assert {"forward", "check_array", "takes_rows"} <= set(owed)
    for name in owed:
        if name.startswith("_") or (name in UNASKED and not hasattr(adapter, name)):
            continue
        _, *parameters = inspect.signature(getattr(Adapter, name)).parameters
        own = list(inspect.signature(getattr(adapter, name)).parameters)
        assert [p for p in own if p not in ("tangent", "selectors")] == parameters, name
    assert adapter.float32 is not None


def test_the_rule_has_one_list():
    # names of its numbers: where they are declared, computed with, or told in words
    known = {
        "csrc/rule.hpp",
        "csrc/geometry.hpp",
        "src/roialign/_rule.py",
        "src/roialign/_dense.py",
        "src/roialign/_explain.py",
        "src/roialign/_triton/geometry.py",
        "src/roialign/torch/onnx.py",
    }
    paths = [*PACKAGE.rglob("*.py"), *SOURCES, *(ROOT / "bench").rglob("*.py")]
    naming = {p for p in paths if "end_offset" in p.read_text(encoding="utf-8")}
    assert {p.relative_to(ROOT).as_posix() for p in naming} <= known


SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".cpp", ".hpp", ".h", ".cc", ".inc"})
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(
    r"bindings|Python|nanobind|pybind|numpy|xla|dlpack|mindspore|torch|ATen|jax|omp\.h|tbb",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_the_core_includes_itself_and_the_standard_library(path):
    text = path.read_text(encoding="utf-8")
    assert "#pragma omp" not in text
    if CSRC / "bindings" not in path.parents:
        assert not [name for name in INCLUDE.findall(text) if FOREIGN.search(name)]


def test_geometry_knows_its_axis_alone():
    # the rule of coordinates: no threads, no engines, no memory
    for path in CSRC.glob("geometry.*"):
        own = {n for n in INCLUDE.findall(path.read_text(encoding="utf-8")) if n.endswith("hpp")}
        assert own <= {"geometry.hpp", "rule.hpp"}, path.name


def test_what_is_built_per_instruction_set_instantiates_no_library_code():
    # the linker keeps one copy of an inline function: it could be the one of another CPU
    seen, todo = set(), list((CSRC / "engine").glob("*.cpp"))
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
    mentions = [command for command in commands if "ffp-contract=off" in command[1]]
    for_all = "add_compile_options", "target_compile_options"
    assert any(name in for_all or "geometry.cpp" in body for name, body in mentions)


def test_the_build_keeps_ieee_and_links_no_runtime_of_threads():
    text = cmake()
    flags = "fast-math Ofast -fopenmp OpenMP funsafe associative-math ffinite-math"
    assert not [flag for flag in flags.split() if flag in text]


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
    assert (Path(roialign.__file__).parent / "py.typed").exists()


def test_version_agrees():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version\s*=\s*"([^"]+)"', project, re.MULTILINE) == [roialign.__version__]


def test_names_of_files():
    # nouns; none of the drawers that collect everything
    refused = {"utils", "util", "helpers", "helper", "common", "misc"}
    for path in [*PACKAGE.rglob("*.py"), *SOURCES, *(ROOT / "tests").glob("*.py")]:
        assert path.stem not in refused, path
