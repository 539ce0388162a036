"""A picture of what RoIAlign does with one box: `roialign.explain` and `roialign show`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from roialign._api import roi_align, roi_align_rotated
from roialign._grid import SamplingGrid, sampling_grid
from roialign._rule import Convention, conventions

MOST_PIXELS, MOST_BINS, MOST_SAMPLES = 2**24, 32, 2**22  # of the map, on an axis, of the box
MOST_DOTS = 600  # where there are more samples, those of one bin are drawn
MOST_LINES = 64  # where more pixels are in view, their borders are not drawn
BLUE, RED = "#0072b2", "#d55e00"  # of Okabe and Ito: colour-blind people tell them apart
SQUARE_X, SQUARE_Y = np.array([[-0.5, 0.5, 0.5, -0.5, -0.5], [-0.5, -0.5, 0.5, 0.5, -0.5]])
WIDTH, HEIGHT = 5.6, 7.6  # of a panel, inches

# What a field of the rule decides, and what a rule with it does
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
        record = conventions[rule] if isinstance(rule, str) else rule
        names = (
            [rule] if isinstance(rule, str) else [k for k in conventions if conventions[k] == rule]
        )
        self.name = [*names, "your convention"][0]
        self.rule = asdict(record) | given
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

    def followed(self, map_size: Any, wanted: Any) -> tuple[int, ...] | None:
        """Bin and sample to look at: those wanted, else one between pixels, not far in."""
        known = wanted and (np.array(wanted) < self.inside.shape).all()
        if not self.inside.any() or (known and self.inside[wanted]):
            return wanted
        at, sides = self.samples, np.reshape(map_size, (2, 1, 1, 1, 1))
        p, q = [abs(np.arange(bins) - (bins - 1) // 3) for bins in self.pooled.shape]
        between = (at > 0) & (at < sides - 1) & (abs(at - np.floor(at) - 0.5) < 0.4)
        cost = (p[:, None] + q)[..., None, None] + 10 * ~between.all(0)
        best = np.where(self.inside, cost, np.inf).argmin()
        return tuple([int(k) for k in np.unravel_index(best, self.inside.shape)])

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


def bounds(every: list[np.ndarray], touched: bool, map_size: tuple[int, ...]) -> list[list[int]]:
    """The first and last pixel in view on each axis: of the boxes, and not too far from the map.

    If no sample is on the map all of it is in view.
    """
    view = []
    for axis, side in enumerate(map_size):
        ends: Any = np.concatenate([edges[axis].ravel() for edges in every])
        ends = np.append(ends[np.isfinite(ends)], [] if touched else [0, side - 1])
        ends = np.clip(ends, -2 - side // 2, side + 1 + side // 2)
        view.append([int(np.floor(ends.min() - 0.8)), int(np.ceil(ends.max() + 0.8))])
    longest = max(last - first for first, last in view)
    for ends in view:  # no sliver
        more = max(0, (longest // 2 - (ends[1] - ends[0])) // 2)
        ends[:] = ends[0] - more, ends[1] + more
    return view


def draw_map(axes: Any, features: np.ndarray, view: Any, colours: dict[str, Any]) -> None:
    """The pixels in view. Where the map has none it is hatched."""
    (y0, y1), (x0, x1) = view
    top, left = max(y0, 0), max(x0, 0)
    part = features[top : max(y1 + 1, 0), left : max(x1 + 1, 0)]
    if part.size:
        extent = np.array([left, left + part.shape[1], top + part.shape[0], top]) - 0.5
        axes.imshow(part, extent=extent, zorder=0.5, **colours)
    axes.patch.set(facecolor="white", hatch="////", edgecolor="0.8", linewidth=0)
    axes.set(xlim=(x0 - 0.5, x1 + 0.5), ylim=(y1 + 0.5, y0 - 0.5), aspect="equal")
    axes.locator_params(integer=True, nbins=8)
    if max(y1 - y0, x1 - x0) < MOST_LINES:
        axes.set_xticks(np.arange(x0, x1 + 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(y0, y1 + 1) + 0.5, minor=True)
        axes.grid(which="minor", color="0.6", lw=0.5)
    axes.tick_params(which="minor", length=0)


def draw_lines(axes: Any, edges: np.ndarray, label: str, **style: Any) -> None:
    """Between bins, and around them."""
    y, x = edges
    lines = [*axes.plot(x, y, **style), *axes.plot(x.T, y.T, **style)]
    lines[0].set_label(label)


def draw_samples(axes: Any, at: np.ndarray, inside: np.ndarray, size: float, label: str) -> None:
    style = {"ls": "none", "color": "black", "mfc": "white", "ms": size, "mew": size / 5}
    for kept, marker, name in ((inside, "o", label), (~inside, "x", "samples off the map: 0")):
        if kept.any() and kept.size <= MOST_DOTS:
            y, x = at[:, kept]
            axes.plot(x, y, marker, label=name, **style)


def draw_bin(axes: Any, edges: np.ndarray, p: int, q: int) -> None:
    """The bin that is followed."""
    y, x = edges[:, [p, p, p + 1, p + 1], [q, q + 1, q + 1, q]]
    axes.fill(x, y, color=BLUE, alpha=0.25, lw=0)


def draw_pixels(axes: Any, rows: np.ndarray, columns: np.ndarray, label: str) -> None:
    """Those that it reads."""
    style = {"color": RED, "lw": 2.4, "solid_joinstyle": "miter"}
    lines = axes.plot(columns + SQUARE_X[:, None], rows + SQUARE_Y[:, None], **style)
    lines[0].set_label(label)


def draw_sample(axes: Any, at: np.ndarray, size: float, label: str) -> None:
    style = {"color": RED, "ms": size, "mec": "black", "ls": "none", "zorder": 4}
    axes.plot(at[1], at[0], "D", label=label, **style)


def draw_weights(axes: Any, at: np.ndarray, taps: Any, values: np.ndarray) -> None:
    """The pixels of that sample, each with its weight and its value, and what they add up to."""
    plate = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
    for row, column, weight, value in zip(*taps, values):
        axes.plot([at[1], column], [at[0], row], color=RED, lw=1 + 5 * weight, alpha=0.5)
        axes.plot(column, row, "s", color="black", ms=3)
        text = f"weight {weight:.3f}\nx pixel {value:.3f}"
        away = 0.3 if row > at[0] else -0.3
        axes.text(column, row + away, text, ha="center", va="center", fontsize=8.5, bbox=plate)
    axes.set_title(f"one sample: x = {at[1]:.4g}, y = {at[0]:.4g}", fontsize=10)
    axes.set_xlabel(f"sum of weight x pixel = {np.dot(taps[2], values):.3f}")


def draw_pooled(axes: Any, pooled: np.ndarray, bin_: Any, colours: dict[str, Any]) -> None:
    axes.imshow(pooled, **colours)
    axes.set_title("pooled values, one for each bin", fontsize=10)
    axes.locator_params(integer=True, nbins=8, min_n_ticks=1)
    if max(pooled.shape) <= 8:
        size = 10 if max(pooled.shape) < 5 else 6.5
        for (p, q), value in np.ndenumerate(pooled):
            axes.text(q, p, f"{value:.2f}", ha="center", va="center", fontsize=size)
    if bin_:
        axes.plot(bin_[1] + SQUARE_X, bin_[0] + SQUARE_Y, color=RED, lw=2.4)
        axes.set_xlabel(f"the bin of that sample = {pooled[bin_]:.3f}")


def caption(panel: Panel, view: list[list[int]]) -> str:
    (p, q, *samples), (height, width) = panel.inside.shape, abs(panel.size / panel.pooled.shape)
    text = f"{p} x {q} bins of {height:.3g} x {width:.3g} feature pixels, "
    text += f"{samples[0]} x {samples[1]} samples in each"
    if not panel.inside.all():
        off = panel.inside.size - panel.inside.sum()
        text += f"\nsamples off the map, which count as 0: {off} of {panel.inside.size}"
    ends = [(edges.min(), edges.max()) for edges in panel.edges]
    if not all(a <= first <= last <= b for (a, b), (first, last) in zip(view, ends)):
        text += "\nthe whole box: y {:.4g} to {:.4g}, x {:.4g} to {:.4g}".format(*ends[0], *ends[1])
    return text


def draw_panel(part: Any, panel: Panel, features: np.ndarray, shared: dict[str, Any]) -> Any:
    """What is drawn for one rule. Returns the axes of its map."""
    view, colours, size = shared["view"], shared["colours"], features.shape
    followed = shared["followed"] = panel.followed(size, shared["followed"])
    axes = part.subplot_mosaic([["map", "map"], ["sample", "pooled"]], height_ratios=[3, 2])
    part.suptitle(panel.name, fontweight="bold", fontsize=13)
    axes["map"].set_title(caption(panel, view), fontsize=10)
    draw_map(axes["map"], features, view, colours)
    draw_lines(axes["map"], shared["outline"], "box, where the image has it", c="k", ls=":", lw=2)
    draw_lines(axes["map"], panel.edges, "bins", c=BLUE, lw=1.2)
    draw_pooled(axes["pooled"], panel.pooled, followed and followed[:2], colours)
    apart = abs(panel.size / panel.pooled.shape / np.fmax(panel.inside.shape[2:], 1)).min()
    dot = float(np.clip(120 * apart / max(map(np.ptp, view)), 1, 4))  # points
    if shared["crowded"] and followed:
        p, q = followed[:2]
        one = panel.samples[:, p, q], panel.inside[p, q]
        draw_samples(axes["map"], *one, dot, "samples of one bin")
    else:
        draw_samples(axes["map"], panel.samples, panel.inside, dot, "samples")
    if not followed:
        axes["sample"].set_axis_off()
        axes["sample"].text(0.5, 0.5, "no sample is on the map:\nthe result is 0", ha="center")
        return axes["map"]
    p, q, j, i = followed
    at = panel.samples[:, p, q, j, i]
    point = [*at[::-1], *at[::-1]]  # a box of size 0, which has this sample
    rule: Any = {"sampling_ratio": 1, "convention": Convention(), "dtype": features.dtype}
    rows, columns, weights = sampling_grid(point, size, 1, **rule).pixels(0, 0)
    draw_bin(axes["map"], panel.edges, p, q)
    draw_map(axes["sample"], features, [(int(k), int(k) + 1) for k in np.floor(at)], colours)
    for name, marker in (("map", dot + 4), ("sample", 9)):
        draw_pixels(axes[name], rows, columns, "the pixels that it reads")
        draw_sample(axes[name], at, marker, "one sample, followed below")
    draw_weights(axes["sample"], at, (rows, columns, weights), features[rows, columns])
    return axes["map"]


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
) -> Any:
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
        from matplotlib.figure import Figure
    except ImportError as error:
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
    if features is None:
        y, x = np.ogrid[: size[0], : size[1]]
        long = np.nan_to_num(np.ptp(outline, (1, 2)))
        waves = np.clip(long, 12, np.fmax(size, 12)) / 2 / np.pi
        features = np.float32((2 + np.sin(x / waves[1]) + np.cos(y / waves[0])) / 4)
    values = np.asarray(features)
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
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0, 1)
    every, touched = [outline, *[p.edges for p in panels]], any([p.inside.any() for p in panels])
    shared = {
        "view": bounds(every, touched, size),
        "colours": {"cmap": "Greys", "vmin": low, "vmax": low + 2 * (high - low)},  # no darker
        "outline": outline,
        "followed": None,
        "crowded": any([panel.inside.size > MOST_DOTS for panel in panels]),
    }
    figure: Any = Figure(figsize=(WIDTH * count, HEIGHT), layout="constrained")
    said = [line for panel in panels[1:] for line in differences(panels[0], panel)]
    if said:
        lines = [part for line in said for part in textwrap.wrap(line, int(11.5 * WIDTH * count))]
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10.5)
    handles: dict[str, Any] = {}
    for panel, part in zip(panels, np.atleast_1d(figure.subfigures(1, count))):
        axes = draw_panel(part, panel, values, shared)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    columns = 2 if count == 1 else 3
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9)
    return figure
