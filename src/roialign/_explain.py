"""What RoIAlign does with one box, in numbers and in words: `roialign.explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from roialign._api import roi_align, roi_align_rotated
from roialign._grid import SamplingGrid, sampling_grid
from roialign._rule import Convention, conventions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PIXELS, MOST_BINS, MOST_SAMPLES = 2**24, 32, 2**22  # of the map, on an axis, of the box

# What a field of the rule decides, and what a rule does with it
FIELDS = {
    "pixel_offset": ("place", "subtracts {} from both ends", "a feature pixel"),
    "input_offset": ("place", "adds {} to both ends", "an image pixel"),
    "end_offset": ("size", "adds {} at the end", "an image pixel"),
    "min_size": ("size", "clamps it to {} at least", "a feature pixel"),
    "adaptive": ("samples", "rounds the length of a bin {}", ""),
}


def corners(grid: SamplingGrid) -> np.ndarray:
    """Of the bins, y before x: [2, P + 1, Q + 1]."""
    y, x = grid.edges_y, grid.edges_x
    return np.array((y, x) if y.ndim == 2 else np.meshgrid(y, x, indexing="ij"))


class Panel:
    """One box as one rule takes it, in feature pixels, y before x."""

    def __init__(self, box: Any, features: np.ndarray, output_size: Any, given: Any) -> None:
        turned, rule = "angle" in given, given["convention"]
        grid = sampling_grid(box, features.shape, output_size, **given, dtype=features.dtype)
        samples, inside = (grid.samples_y, grid.samples_x), (grid.inside_y, grid.inside_x)
        if not turned:
            samples, inside = [(y[:, None, :, None], x[:, None]) for y, x in (samples, inside)]
        shape = np.broadcast_shapes(*[at.shape for at in samples])
        if max(shape[:2]) > MOST_BINS or np.prod(shape, dtype=float) > MOST_SAMPLES:
            raise ValueError(
                f"`output_size` must be at most {MOST_BINS} here, and `box` must have at most "
                f"{MOST_SAMPLES} samples (a `sampling_ratio` limits them), got {shape}"
            )
        names = [name for name, record in conventions.items() if rule in (name, record)]
        self.name = names[0] if names else "your convention"
        self.rule = asdict(conventions.get(self.name, rule)) | given
        self.edges = corners(grid)
        self.samples = np.array(np.broadcast_arrays(*samples))  # [2, P, Q, S_y, S_x]
        self.inside = inside[0] & inside[1]  # [P, Q, S_y, S_x]
        first, last = self.edges[:, 0, 0], self.edges[:, -1, -1]
        self.place = (first + last) / 2 if turned else first
        sides = self.edges[:, [-1, 0], [0, -1]] - first[:, None]
        self.size = np.hypot(*sides) if turned else last - first
        pool: Any = roi_align_rotated if turned else roi_align
        rois = np.array([[0, *box]], np.float64)
        self.pooled = pool(features[None, None], rois, output_size, **given)[0, 0]  # [P, Q]

    def does(self, field: str) -> str:
        """What this field of the rule does with this box, if it does something."""
        value, (_, words, unit) = self.rule[field], FIELDS[field]
        acts, shown = bool(value), length(value, unit)
        if field == "min_size":
            acts = value is not None and np.isclose(self.size, value).any()
        elif field == "adaptive":
            acts = not self.rule["sampling_ratio"]
        return f"{self.name} {words.format(shown)}" if acts else ""


def length(value: Any, a_pixel: str) -> str:
    """A field in words: lengths are in what `a_pixel` names, such as "an image pixel"."""
    pixel = a_pixel.partition(" ")[2]
    known = {0.5: f"half {a_pixel}", 1.0: f"one {pixel}", "ceil": "up", "floor": "down"}
    return known.get(value) or f"{value or 0:.3g} {pixel}s"


def differences(first: Panel, other: Panel) -> list[str]:
    """What `other` does otherwise than `first`, in sentences made from the numbers."""
    one, two, found = first.name, other.name, {}
    least = 8 * np.finfo(first.edges.dtype).eps * np.fmax(1, abs(first.edges).max())
    down, right = other.place - first.place
    ways = {"right" if right > 0 else "left": abs(right), "down" if down > 0 else "up": abs(down)}
    if abs(abs(right) - abs(down)) <= least:
        ways = {" and ".join(ways): abs(right)}
    moves = [
        f"{length(v, 'a feature pixel')} further {way}" for way, v in ways.items() if v > least
    ]
    if moves:
        found["place"] = f"{two} lies {' and '.join(moves)} than {one}"
    new, old = ("{1:.4g} wide and {0:.4g} high".format(*panel.size) for panel in (other, first))
    if (abs(other.size - first.size) > least).any():
        found["size"] = f"{two} takes the box as {new} in feature pixels, {one} as {old}"
    new, old = ("{2} x {3}".format(*panel.inside.shape) for panel in (other, first))
    if new != old:
        found["samples"] = f"{two} has {new} samples in a bin, {one} {old}"
    sentences = []
    for what, effect in found.items():
        fields = [f for f in FIELDS if FIELDS[f][0] == what and first.rule[f] != other.rule[f]]
        causes = [panel.does(field) for field in fields for panel in (first, other)]
        sentences.append(": ".join([effect, ", ".join(filter(None, causes))]).rstrip(": ") + ".")
    if not found:
        same = np.array_equal(first.samples, other.samples, equal_nan=True)
        bits = "to the last bit" if same else "up to rounding"
        sentences.append(f"{two} has the bins and samples of {one} for this box, {bits}.")
    apart = abs(other.pooled - first.pooled).max()
    values = f"differ by {apart:.2g} at most" if apart else "are equal"
    return [*sentences, f"The pooled values {values}."]


def waves(size: tuple[int, ...], outline: np.ndarray) -> np.ndarray:
    """Features of that size: about one wave in a box on each axis."""
    long = np.nan_to_num(np.ptp(outline, (1, 2)))
    y, x = [np.arange(n) * 2 * np.pi / np.clip(k, 12, max(n, 12)) for n, k in zip(size, long)]
    return ((2 + np.sin(x) + np.cos(y)[:, None]) / 4).astype(np.float32)


@np.errstate(over="ignore", invalid="ignore")  # of a box that is not finite
def explain(
    box: Any,
    map_size: Sequence[int],
    output_size: int | Sequence[int] = 7,
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    sampling_ratio: int | Sequence[int] = 0,
    convention: str | Convention | Sequence[str | Convention] = "half_pixel",
    angle: str | None = None,
    clockwise: bool = False,
    features: Any = None,
) -> Figure:
    """A picture of what RoIAlign does with one box, under one convention or several.

    It shows the map, the box, its bins and samples; one sample with the pixels that it reads and
    their weights; and the pooled values. Several conventions are drawn side by side, and the text
    above them says what the others do otherwise than the first. The numbers are those of
    :func:`sampling_grid` and :func:`roi_align`. Needs Matplotlib: ``pip install matplotlib``, or
    ``'.[plot]'``.

    Args:
        box, map_size, spatial_scale, angle, clockwise: as in :func:`sampling_grid`.
        output_size: as in :func:`roi_align`, at most 32 on an axis.
        sampling_ratio, convention: as in :func:`roi_align`; or lists of them, to compare.
        features: the map, real numbers (H, W). float64 is kept, all else becomes float32. None: a
            pattern of waves as long as the box.

    Returns:
        A ``matplotlib.figure.Figure``, to be written with ``figure.savefig("why.png")``.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError, ValueError: as :func:`sampling_grid`; and there are more than 2**24 pixels or
            2**22 samples, or the lists have different lengths.

    >>> import roialign
    >>> figure = roialign.explain(
    ...     [10, 20, 60, 50],
    ...     (32, 48),
    ...     spatial_scale=0.25,
    ...     convention=["half_pixel", "asymmetric"],
    ... )
    >>> print(figure.texts[0].get_text())
    asymmetric lies half a feature pixel further right and down than half_pixel: half_pixel ...
    """
    try:
        from roialign import _explain_figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError(
            "roialign.explain needs Matplotlib: pip install matplotlib, or '.[plot]'"
        ) from error
    rules = [convention] if isinstance(convention, (str, Convention)) else list(convention)
    ratios = list(sampling_ratio) if isinstance(sampling_ratio, Sequence) else [sampling_ratio]
    count = max(len(rules), len(ratios))
    if {len(rules), len(ratios)} - {1, count} or not rules or not ratios:
        raise ValueError(
            "`convention` and `sampling_ratio` must have one value or equally many, got "
            f"{len(rules)} and {len(ratios)}"
        )
    given: dict[str, Any] = {"spatial_scale": spatial_scale}
    given |= {} if angle is None else {"angle": angle, "clockwise": clockwise}
    outline = corners(sampling_grid(box, map_size, 1, sampling_ratio=1, **given))
    size = tuple(map_size)
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"`map_size` must have at most {MOST_PIXELS} pixels here, got {size}")
    values = waves(size, outline) if features is None else np.asarray(features)
    if values.shape != size or values.dtype.kind not in "fiub":
        raise ValueError(
            f"`features` must be real numbers of shape {size}, got {values.dtype} {values.shape}"
        )
    values = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
    panels = []
    for k in range(count):
        options = {"convention": rules[k % len(rules)], "sampling_ratio": ratios[k % len(ratios)]}
        panels.append(Panel(box, values, output_size, given | options))
        if len(ratios) > 1:
            panels[k].name += f" (sampling_ratio {options['sampling_ratio']})"
    said = [sentence for panel in panels[1:] for sentence in differences(panels[0], panel)]
    return _explain_figure.draw(panels, outline, values, said)
