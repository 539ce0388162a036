"""Which rule a RoIAlign has: a table of hypotheses, and the output of each on probes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from roialign import _checks
from roialign._api import roi_align
from roialign._rule import Convention, conventions

# In each list the commonest comes first, and so does its match.
NAMES = (
    *("half_pixel", "asymmetric", "mindspore"),
    *("openvino_half_pixel", "mindspore_legacy", "mmdet_legacy"),
)
SAMPLING = (2, 0, 1, 3, 4, 5, 6, 7, 8)
REDUCTIONS = ("mean", "max", "max_corner")
ORDERS = {  # what four numbers mean: x1, y1, x2, y2 of them
    "xyxy": lambda a, b, c, d: (a, b, c, d),
    "yxyx": lambda a, b, c, d: (b, a, d, c),
    "xywh": lambda a, b, c, d: (a, b, a + c, b + d),
}
WRITTEN = {  # the same as code
    "xyxy": "rois",
    "yxyx": "rois[:, [0, 2, 1, 4, 3]]",
    "xywh": "np.column_stack([rois[:, :3], rois[:, 1:3] + rois[:, 3:]])",
}
NORMALISED = "normalised "
# How results are rounded: the largest error, in units of the largest feature. The last two are for
# results that are numbers of 16 bits.
PRECISIONS = {"float32": 2e-5, "16 bits": 5e-3, "16 bits, coordinates too": 6e-2}


@dataclass(frozen=True)
class Match:
    """A rule, and how far it is from what came.

    Attributes:
        convention: a canonical name; or a record, where adaptive sampling is rounded as no
            convention with a name rounds it.
        sampling_ratio, reduction, spatial_scale: as in :func:`roi_align`.
        boxes: what their numbers are: "xyxy", "yxyx", "xywh", or one of these after "normalised "
            (from 0 to 1 on the map: the scale is then (H, W)).
        max_error: the largest difference of an element, in units of the largest feature.

    >>> import roialign
    >>> print(roialign.Match("half_pixel", 2, "mean", "xyxy", 0.25, 0.0))
    half_pixel, sampling_ratio 2, mean, spatial_scale 0.25
    """

    convention: str | Convention
    sampling_ratio: int
    reduction: str
    boxes: str
    spatial_scale: float | tuple[float, float]
    max_error: float

    def __str__(self) -> str:
        named = self.convention
        if isinstance(named, Convention):
            usual = replace(named, adaptive="ceil")
            name = next(name for name in NAMES if conventions[name] == usual)
            named = f"{name} with adaptive='floor'"
        sampling = f"sampling_ratio {self.sampling_ratio or '0 (adaptive)'}"
        boxes = "" if self.boxes == "xyxy" else f"boxes {self.boxes}, "
        scale = self.spatial_scale
        shown = f"{scale:g}" if isinstance(scale, float) else str(scale)
        return f"{named}, {sampling}, {self.reduction}, {boxes}spatial_scale {shown}"


@dataclass(frozen=True)
class Identification:
    """What :func:`identify` found; as a str, a short verdict.

    Attributes:
        matches: the rules that the probes cannot tell apart, commonest first.
        nearest: of the rules that do not fit, the best first, at most 3.
        precision: of the results: "float32", "16 bits" (rounded once), or "16 bits, coordinates
            too"; "" if nothing fits.
        advice: what to write for the first match.

    >>> import roialign
    >>> print(roialign.identify(lambda features, rois: roialign.roi_align(features, rois, 3)))
    half_pixel (torchvision aligned=True, ...), sampling_ratio 0 (adaptive), mean, ...
    """

    matches: tuple[Match, ...]
    nearest: tuple[Match, ...]
    precision: str
    advice: str

    def __str__(self) -> str:
        nearest = self.nearest[0] if self.nearest else None
        if not self.matches:
            best = f" The nearest, {nearest}, is off by {nearest.max_error:.1g}." if nearest else ""
            return f"No rule fits.{best}"
        first = self.matches[0]
        same = [m.convention for m in self.matches if _rest_of(m) == _rest_of(first)]
        known = [_known_as(name) for name in dict.fromkeys(same) if isinstance(name, str)]
        words = str(first).partition(", ")
        rule = f"{' or '.join(known) or words[0]}, {words[2]}"
        verdict = f"{rule}: agrees to {max(m.max_error for m in self.matches):.1g}"
        if self.precision != "float32":
            verdict += f" ({self.precision})"
        others = len(self.matches) - len(same)
        if others:
            more = f", and {others - 1} more" if others > 1 else ""
            another = next(m for m in self.matches if _rest_of(m) != _rest_of(first))
            verdict += f". On these boxes {another} agrees too{more}"
        if nearest:
            verdict += f". The next best, {nearest}, is off by {nearest.max_error:.1g}"
        return verdict + "."


def _rest_of(match: Match) -> tuple[Any, ...]:
    """All but the convention and the error."""
    return match.sampling_ratio, match.reduction, match.boxes, match.spatial_scale


def _known_as(name: str) -> str:
    """A canonical name with the first of its aliases."""
    aliases = [
        alias.replace(":", " ")
        for alias, row in conventions.items()
        if row == conventions[name] and alias not in NAMES
    ]
    more = ", ..." if len(aliases) > 3 else ""
    return f"{name} ({', '.join(aliases[:3])}{more})"


@dataclass(frozen=True)
class Probe:
    """One recorded call; outputs that are not finite say nothing."""

    features: np.ndarray
    rois: np.ndarray
    output: np.ndarray

    def error_of(self, given: Match) -> float:
        """In units of the largest feature."""
        rois = self.rois
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = ORDERS[given.boxes.removeprefix(NORMALISED)](*rois[:, 1:].T)
        rois = np.column_stack([rois[:, 0], *numbers])
        ours = roi_align(
            self.features,
            rois,
            self.output.shape[2:],
            spatial_scale=given.spatial_scale,
            sampling_ratio=given.sampling_ratio,
            convention=given.convention,
            reduction=given.reduction,
        )
        known = np.isfinite(self.output) & np.isfinite(ours)
        same = [ours] if given.reduction == "mean" else [ours, ours.clip(0)]  # OpenVINO's is >= 0
        errors = [np.abs(self.output - each)[known].max(initial=0) for each in same]
        largest = np.abs(self.features[np.isfinite(self.features)]).max(initial=1e-30)
        return float(min(errors) / largest)

    def is_narrow(self) -> bool:
        """Whether all outputs are numbers of 16 bits, float16 or bfloat16."""
        narrow = self.output.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            half = narrow.astype(np.float16) == narrow
        brain = narrow.view(np.uint32) & 0xFFFF == 0
        return bool(half[np.isfinite(narrow)].all() or brain.all())


def hypotheses(scales: list[float], size: tuple[int, ...]) -> Iterator[Match]:
    """All rules, the commonest first."""
    placed: list[tuple[Any, str]] = [(s, order) for s in scales for order in ORDERS]
    placed += [((float(size[0]), float(size[1])), NORMALISED + order) for order in ORDERS]
    for (scale, boxes), reduction in itertools.product(placed, REDUCTIONS):
        for name, ratio in itertools.product(NAMES, SAMPLING):
            yield Match(name, ratio, reduction, boxes, scale, 0.0)
        for name in ("half_pixel", "openvino_half_pixel"):  # each of the others has a counterpart
            rounded = replace(conventions[name], adaptive="floor")
            yield Match(rounded, 0, reduction, boxes, scale, 0.0)


def scales_about(scale: float | None) -> list[float]:
    if scale is None:
        return [2.0**-k for k in range(7)] + [2.0**k for k in range(1, 7)]
    near = [scale * 2.0**k for k in (0, 1, -1, 2, -2, 3, -3)]
    return list(dict.fromkeys([*near, 1 / scale]))


def identify(
    function: Any,
    rois: np.ndarray | None = None,
    output: np.ndarray | None = None,
    *,
    spatial_scale: float | None = None,
    shape: tuple[int, int, int, int] = (2, 3, 24, 32),
    count: int = 16,
) -> Identification:
    """Which rule a RoIAlign has: from a function that calls it, or from one call that was recorded.

    It compares with every convention that has a name, 1 to 8 samples and both adaptive ones, each
    reduction, the order of a box's numbers (also normalised ones), and scales that are off by a
    power of two or inverted.

    Args:
        function: takes features (N, C, H, W) and rois (K, 5), rows of (image_index, x1, y1, x2,
            y2), as float32 NumPy arrays, and gives (K, C, P, Q). Or the features of a recorded
            call.
        rois, output: of the recorded call, (K, 5) and (K, C, P, Q). None for a function.
        spatial_scale: what the call was given. None: a power of two from 1/64 to 64.
        shape: of the features that the function gets; H and W at least 16.
        count: of the rois that it gets in each call.

    Returns:
        An :class:`Identification`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape or number is wrong, or a recorded output has no finite number.
        Exception: whatever the function raises. (Boxes whose ends are swapped it may refuse.)

    >>> import functools, roialign
    >>> mine = functools.partial(
    ...     roialign.roi_align, output_size=7, spatial_scale=1 / 4, convention="mindspore"
    ... )
    >>> found = roialign.identify(mine)
    >>> found.matches[0].convention, found.matches[0].sampling_ratio
    ('mindspore', 0)
    >>> print(found.advice)
    roialign.roi_align(features, rois, (7, 7), spatial_scale=0.25, sampling_ratio=0, ...)
    """
    if spatial_scale is not None:
        spatial_scale = _checks.real("spatial_scale", spatial_scale)
        _checks.scales("spatial_scale", (spatial_scale,) * 2)
    scales = scales_about(spatial_scale)
    probes: dict[Any, list[Probe]]
    if callable(function):
        _check_probe(shape, count)
        size = shape[2:]
        wanted: list[Any] = [*scales, tuple(map(float, size))]
        probes = {s: list(_asked(function, s, shape, count)) for s in wanted}
    else:
        recorded = _recorded(function, rois, output)
        size = recorded.features.shape[2:]
        probes = {scale: [recorded] for scale in [*scales, tuple(map(float, size))]}
    everything = {id(probe): probe for group in probes.values() for probe in group}.values()
    narrow = all(probe.is_narrow() for probe in everything)
    precisions = dict(itertools.islice(PRECISIONS.items(), 3 if narrow else 1))
    tried = []
    for hypothesis in hypotheses(scales, size):
        error = 0.0
        for probe in (*probes[hypothesis.spatial_scale], *everything):
            error = max(error, probe.error_of(hypothesis))
            if error > max(PRECISIONS.values()):
                break
        tried.append(replace(hypothesis, max_error=error))
    return _verdict(tried, precisions, next(iter(everything)).output.shape[2:])


def _check_probe(shape: Any, count: Any) -> None:
    _checks.sequence("shape", "(N, C, H, W)", shape)
    if len(_checks.integers("shape", shape)) != 4 or min(shape[:2]) < 1 or min(shape[2:]) < 16:
        raise ValueError(f"`shape` must be (N, C, H, W), H and W at least 16, got {shape}")
    if _checks.integer("count", count) < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")


def _recorded(features: Any, rois: Any, output: Any) -> Probe:
    for name, array in (("features", features), ("rois", rois), ("output", output)):
        if not isinstance(array, np.ndarray):
            _checks.refuse_array(name, "numpy.ndarray", array)
    if features.ndim != 4:
        _checks.refuse_shape("features", "(N, C, H, W)", features.shape)
    if rois.ndim != 2 or rois.shape[1] != 5:
        _checks.refuse_shape("rois", "(K, 5)", rois.shape)
    expected = (len(rois), features.shape[1])
    if output.ndim != 4 or output.shape[:2] != expected or 0 in output.shape[1:]:
        _checks.refuse_shape("output", f"({expected[0]}, {expected[1]}, P, Q)", output.shape)
    if not np.isfinite(output).any():
        raise ValueError("`output` must have a finite number, got none")
    real = np.float64 if features.dtype == np.float64 else np.float32
    return Probe(*(np.asarray(array, real) for array in (features, rois, output)))


def _asked(
    function: Callable[..., Any], scale: Any, shape: tuple[int, ...], count: int
) -> Iterator[Probe]:
    """What the function says of boxes that cover a map at this scale."""
    random = np.random.default_rng(17)
    features = random.integers(1, 17, shape).astype(np.float32)  # exact in 16 bits too
    length = np.array(shape[:1:-1])  # x, y
    sides = np.exp(random.uniform(np.log(0.3), np.log(0.9 * length), (16, 2)))
    start = random.uniform(-2, length - sides / 2, (16, 2))
    end = start + sides
    scale_xy = np.ones(2) * np.flip(scale) if isinstance(scale, tuple) else scale
    for first, last, required in ((start, end, True), (end[8:], start[8:], False)):
        boxes = np.concatenate([first / scale_xy, last / scale_xy], 1)
        for k in range(0, len(boxes), count):
            chosen = np.resize(boxes[k : k + count], (count, 4))
            rois = np.column_stack([np.arange(count) % shape[0], chosen]).astype(np.float32)
            try:
                output = np.asarray(function(features.copy(), rois.copy()))
            except Exception:
                if required:
                    raise
                continue
            if output.ndim != 4 or output.shape[:2] != (count, shape[1]):
                wanted = f"({count}, {shape[1]}, P, Q)"
                _checks.refuse_shape("the function's result", wanted, output.shape)
            yield Probe(features, rois, output.astype(np.float32))


def _verdict(
    tried: list[Match], precisions: dict[str, float], bins: tuple[int, ...]
) -> Identification:
    best = min(match.max_error for match in tried)
    precision = next((p for p, error in precisions.items() if best <= error), "")
    limit = precisions.get(precision, -1.0)
    if precision == list(PRECISIONS)[-1]:  # a tolerance that is wide: rules are far apart in it
        limit = 2 * best
    matches = tuple([match for match in tried if match.max_error <= limit])
    rest = sorted((m for m in tried if m.max_error > limit), key=lambda m: m.max_error)
    return Identification(matches, tuple(rest[:3]), precision, _advice(matches, bins))


def _advice(matches: tuple[Match, ...], bins: tuple[int, ...]) -> str:
    if not matches:
        return "No rule of roialign gives these numbers."
    match = matches[0]
    rois = WRITTEN[match.boxes.removeprefix(NORMALISED)]
    reduction = "" if match.reduction == "mean" else f", reduction={match.reduction!r}"
    convention = match.convention
    shown = repr(convention) if isinstance(convention, str) else f"roialign.{convention!r}"
    return (
        f"roialign.roi_align(features, {rois}, {tuple(map(int, bins))}, "
        f"spatial_scale={match.spatial_scale}, sampling_ratio={match.sampling_ratio}, "
        f"convention={shown}{reduction})"
    )
