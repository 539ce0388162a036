"""Fixtures and hypothesis profiles; `Golden` knows where other libraries may differ."""

import json
import mmap
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings

import roialign
import tolerance
from backends import BACKENDS, arrays_of, calls, choose, pair
from oracle import Problem

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported, and Triton

settings.register_profile("local", deadline=None, max_examples=250)
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True)
settings.register_profile("quick", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

GOLDEN = Path(__file__).parent / "golden"
CONVENTIONS = tuple(roialign.conventions)[:6]  # the canonical names
NO_GRADIENT = ("ncnn", "onnx", "openvino")
ROUND_ONCE = ("ncnn", "onnx", "openvino", "paddle")  # the others round every operation in float16


@dataclass(frozen=True)
class Golden:
    """One recorded call of another library."""

    library: str
    entry: dict  # of manifest.json

    def __str__(self):
        return f"{self.library}-{self.entry['id'][-3:]}-{self.entry['kind']}"

    def parameter(self, *names):
        return next(v for k, v in self.entry["params"].items() if k in names)

    @property
    def convention(self):
        """Its name for users of that library; None if that is none of ours.

        The last of its parameters that names one: a mode comes after the opset that it overrules.
        """
        library, params = self.library.partition("_")[0], self.entry["params"].items()
        names = [f"{library}:{word}" for key, value in params for word in (value, f"{key}={value}")]
        return next((name for name in reversed(names) if name in roialign.conventions), None)

    @property
    def reduction(self):
        """Ours; ONNX Runtime's "max" is of weighted corners."""
        if not self.library.endswith("_max"):
            return "mean"
        return "max_corner" if self.library.startswith("onnx") else "max"

    @property
    def fractional_index(self):
        return "fractional image index" in self.entry.get("note", "")

    @property
    def differentiates(self):
        return not self.library.startswith(NO_GRADIENT)

    @cached_property
    def arrays(self):
        with np.load(GOLDEN / self.library / self.entry["file"]) as arrays:
            return dict(arrays)

    @property
    def features(self):
        return self.arrays["features"]

    @property
    def rois(self):
        return self.arrays["rois"]

    @cached_property
    def problem(self):
        scale = float(np.float32(self.parameter("spatial_scale")))  # as they do, for float64 too
        try:
            size = tuple(self.parameter("output_size", "pooled_size"))
        except StopIteration:
            height = self.parameter("pooled_height", "pooled_h", "output_height")
            size = height, self.parameter("pooled_width", "pooled_w", "output_width")
        return Problem(
            features=self.features,
            boxes=self.rois[:, 1:],
            index=self.rois[:, 0].astype(np.int64),
            size=size,
            scale=(scale, scale),
            sampling=self.parameter("sampling_ratio", "sample_ratio", "sample_num"),
            convention=roialign.conventions[self.convention],
        )

    @cached_property
    def known(self):
        """[K]: the rows that the library wrote, and not with NaN (CONVENTIONS: deliberate).

        Nor with mmcv's largest number of none, -10000.
        """
        y = self.arrays["y"]
        written = self.arrays.get("y_valid", np.ones(len(y), bool))
        return written & ~(np.isnan(y) | (y == -10000)).any((1, 2, 3))

    @cached_property
    def d_output(self):
        """[K, C, P, Q]: `dy`, 0 in the rows that are not known."""
        return np.where(self.known[:, None, None, None], self.arrays["dy"], 0)

    def check_forward(self, output):
        self._check(output[self.known], self.arrays["y"][self.known])

    def check_adjoint(self, d_features):
        self._check(d_features, self.arrays.get("df_adjoint", self.arrays["df"]))

    def _check(self, actual, expected):
        once = self.library.startswith(ROUND_ONCE) or self.features.dtype != self.rois.dtype
        peers = max(tolerance.PEERS[a.dtype][once] for a in (self.features, expected))
        size = np.abs(self.features.astype(np.float64)).max(initial=1)
        tolerance.check(actual, expected.astype(np.float64), np.full(expected.shape, peers * size))


def golden_cases():
    for manifest in sorted(GOLDEN.glob("*/manifest.json")):
        for entry in json.loads(manifest.read_text())["cases"]:
            case = Golden(manifest.parent.name, entry)
            if case.convention and "rotated" not in case.library and "peer_quirk" not in entry:
                yield case


def rotated_cases():
    """Boxes (image, x, y, width, height, angle)."""
    for manifest in sorted(GOLDEN.glob("*rotated*/manifest.json")):
        record = json.loads(manifest.read_text())
        for entry in record["cases"]:
            yield Golden(manifest.parent.name, entry | {"angle": record["angle_unit"]})


# fixture: the golden cases that it goes through
GOLDEN_FIXTURES = {
    "golden": lambda case: case.reduction == "mean" and not case.fractional_index,
    "golden_gradient": lambda case: (
        case.reduction == "mean" and not case.fractional_index and case.differentiates
    ),
    "golden_largest": lambda case: case.reduction != "mean",
    "golden_mindspore": lambda case: not case.fractional_index and case.library == "mindspore",
    "golden_fractional": lambda case: case.fractional_index,
}


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        choices={backend.family for backend in BACKENDS},
        help="of the tests of all backends those of this one alone, and an error if it is missing",
    )


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("backends")
        chosen = choose(*marker.args if marker else ())
        metafunc.parametrize("backend", list(offered(chosen, metafunc.config)), indirect=True)
    if "golden_rotated" in metafunc.fixturenames:
        metafunc.parametrize("golden_rotated", list(rotated_cases()), ids=str)
    for name, chosen in GOLDEN_FIXTURES.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(filter(chosen, golden_cases())), ids=str)


def offered(chosen, config):
    """Parameters: the backends that are there, with --backend those of it alone; and one that is
    skipped, for the others.
    """
    only, missing = config.getoption("backend"), {}
    for backend in chosen:
        if only and backend.family != only:
            continue
        reason = backend.missing()
        if only and reason:
            raise pytest.UsageError(f"--backend {only}: {backend.name} {reason}")
        if reason:
            missing[backend.family] = reason
        else:
            yield pytest.param(backend, id=backend.name)
    if missing:
        reasons = ", ".join(dict.fromkeys(missing.values()))
        yield pytest.param(None, id="others", marks=pytest.mark.skip(reason=reasons))


def pytest_collection_modifyitems(config, items):
    """Slow backends have a few cases of each test, and those that do not take bytes none of these.
    With --backend, in files of tests of all backends, only its own."""
    only, slow, left = config.getoption("backend"), {}, set()
    shared = {item.path for item in items if "backend" in item.fixturenames}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend")
        if only and item.path in shared and getattr(backend, "family", None) != only:
            left.add(item)
        elif backend is None:
            continue
        elif not backend.takes(**params):
            left.add(item)
        elif "slow" in backend.traits:
            slow.setdefault((item.function, backend), []).append(item)
    for cases in slow.values():
        left.update(set(cases) - set(cover(cases)))
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


def cover(items):
    """Of a test's cases a few that show every value of each parameter."""
    shown = {i: {(name, str(value)) for name, value in i.callspec.params.items()} for i in items}
    while any(shown.values()):
        best = max(shown, key=lambda item: len(shown[item]))
        yield best
        new = shown.pop(best)
        for values in shown.values():
            values -= new


@pytest.fixture
def backend(request, monkeypatch):
    request.param.start(monkeypatch)
    yield request.param
    request.param.stop()


@pytest.fixture(scope="session")
def golden_by_convention():
    by_record = {}
    for case in golden_cases():
        if case.reduction == "mean" and not case.fractional_index:
            by_record.setdefault(roialign.conventions[case.convention], []).append(case)
    return by_record


@pytest.fixture(params=CONVENTIONS)
def convention(request):
    return roialign.conventions[request.param]


@pytest.fixture(scope="session")
def make_problem():
    return draw_problem


def draw_problem(
    seed=0,
    *,
    shape=(2, 5, 9, 11),
    count=7,
    size=(3, 2),
    scale=(0.5, 0.4),
    sampling=2,
    convention="half_pixel",
    dtype=np.float32,
    inside=False,
):
    """A random `Problem`; boxes in and around the map, or so that every tap is `inside` it."""
    rng = np.random.default_rng(seed)
    length = np.array([shape[3], shape[2]])
    low, high = (1, length - 2.5) if inside else (-3, length + 2)
    start = low + (high - low - 1) * rng.random((count, 2))
    end = start + 1 + (high - start - 1) * rng.random((count, 2))
    boxes = np.concatenate([start, end], 1) / np.tile(scale[::-1], 2)
    return Problem(
        features=draw_features(rng, shape, dtype),
        boxes=boxes.astype(np.float64 if dtype == np.float64 else np.float32),
        index=rng.integers(shape[0], size=count),
        size=size,
        scale=scale,
        sampling=sampling,
        convention=roialign.conventions.get(convention, convention),
    )


def draw_features(rng, shape, dtype):
    """Standard normal; half of the bytes are 0."""
    values = rng.standard_normal(shape)
    return (100 * values.clip(0, 2.5) if dtype in tolerance.BYTES else values).astype(dtype)


@pytest.fixture
def problem(make_problem):
    """In float64, away from kinks: for derivatives."""
    return make_problem(dtype=np.float64, shape=(2, 3, 9, 11), count=4, inside=True)


@pytest.fixture(scope="session")
def pyramid():
    return draw_pyramid


def draw_pyramid(dtype=np.float64, sampling=2, channels=3, count=7, maps=2, form=pair):
    """RoIs on one map, or on several and on none; functions of their arrays, and these."""
    options = {"dtype": dtype, "sampling": sampling, "count": count, "inside": True}
    problems = [
        replace(draw_problem(seed, shape=(2, channels, *size), **options), scale=scale)
        for seed, (size, scale) in enumerate([((9, 11), (0.5, 0.4)), ((5, 8), (0.25, 0.3))])
    ]
    problem, levels = problems[0], np.resize([1, 0, -1, 1, 0, 0, 1], count)
    forward, adjoint, box_gradient = calls(problems[:maps], form)
    rois = arrays_of(form, *problem.rois) if maps == 1 else (*problem.rois, levels)

    def together(d_output, *given):
        d_maps = adjoint(d_output, *given[maps:])
        return forward(*given), *d_maps, box_gradient(d_output, *given)

    def loss(*given):
        return (forward(*given[:-1]) * given[-1]).sum()

    return SimpleNamespace(
        maps=[p.features for p in problems[:maps]], rois=rois, d_output=problem.draw_output(),
        problems=problems, forward=forward, adjoint=adjoint, box_gradient=box_gradient,
        together=together, loss=loss,
    )  # fmt: skip


@pytest.fixture(scope="session")
def layouts():
    """Name -> a function that gives the same values with other strides, or in other memory."""
    return {
        "contiguous": np.ascontiguousarray,
        "channels_last": lambda a: _through(a, (0, *range(2, a.ndim), 1)[: a.ndim]),
        "transposed": lambda a: _through(a, np.roll(range(a.ndim), 1)[::-1]),
        "columns_first": lambda a: _through(a, (*range(a.ndim - 2), *range(a.ndim)[:-3:-1])),
        "reversed": lambda a: a[_every(a, -1)].copy()[_every(a, -1)],
        "sliced": _apart,
        "field": _field,
        "read_only": _read_only,
        "mapped": lambda a: _filled(np.frombuffer(mmap.mmap(-1, a.nbytes), a.dtype), a),
        "unaligned": lambda a: moved(a, 1),
        "shifted": lambda a: moved(a, a.itemsize),
    }


def _every(array, step, start=None):
    return (slice(start, None, step),) * array.ndim


def _through(array, order):
    return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))


def _apart(array):
    """With NaN between the elements."""
    bytes_ = np.full([2 * n + 1 for n in array.shape], 0xFF, np.uint8).repeat(array.itemsize, -1)
    return _filled(bytes_.view(array.dtype)[_every(array, 2, 1)], array)


def _field(array):
    """Of packed records: strides that are no multiple of the item size."""
    return _filled(np.zeros(array.shape, [("head", "u1"), ("value", array.dtype)])["value"], array)


def _filled(room, array):
    room = room.reshape(array.shape)
    room[...] = array
    return room


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def moved(array, offset):
    """The array so many bytes past a multiple of 64."""
    raw = np.empty(array.nbytes + 64 + offset, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return _filled(raw[start : start + array.nbytes].view(array.dtype), array)
