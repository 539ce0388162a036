"""The figure of `roialign.explain`."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from roialign._explain import Panel
from roialign._grid import sampling_grid
from roialign._rule import Convention

MOST_DOTS = 600  # where there are more samples, those of one bin are drawn
MOST_LINES = 64  # where more pixels are in view, their borders are not drawn
BLUE, RED = "#0072b2", "#d55e00"  # of Okabe and Ito: colour-blind people tell them apart
SQUARE_X, SQUARE_Y = np.array([[-0.5, 0.5, 0.5, -0.5, -0.5], [-0.5, -0.5, 0.5, 0.5, -0.5]])
WIDTH, HEIGHT = 5.6, 7.6  # of a panel, inches


def follow(panel: Panel, map_size: tuple[int, ...], wanted: Any) -> Any:
    """The bin and the sample to look at: those wanted, else one between pixels, not far in."""
    inside, at, sides = panel.inside, panel.samples, np.reshape(map_size, (2, 1, 1, 1, 1))
    known = wanted and (np.array(wanted) < inside.shape).all()
    if not inside.any() or (known and inside[wanted]):
        return wanted
    p, q = [abs(np.arange(bins) - (bins - 1) // 3) for bins in panel.pooled.shape]
    between = (at > 0) & (at < sides - 1) & (abs(at - np.floor(at) - 0.5) < 0.4)
    cost = (p[:, None] + q)[..., None, None] + 10 * ~between.all(0)
    return tuple(map(int, np.unravel_index(np.where(inside, cost, np.inf).argmin(), cost.shape)))


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
        style = {"color": "0.6", "lw": 0.5, "zorder": 0.6}
        axes.vlines(np.arange(x0, x1) + 0.5, y0 - 0.5, y1 + 0.5, **style)
        axes.hlines(np.arange(y0, y1) + 0.5, x0 - 0.5, x1 + 0.5, **style)


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
        text += "\nthe box: y {:.4g} to {:.4g}, x {:.4g} to {:.4g}".format(*ends[0], *ends[1])
    return text


def draw_panel(
    part: Any, panel: Panel, outline: np.ndarray, features: np.ndarray, followed: Any, look: Any
) -> Any:
    """What is drawn of one rule. Returns the axes of its map."""
    view, colours, crowded = look
    axes = part.subplot_mosaic([["map", "map"], ["sample", "pooled"]], height_ratios=[3, 2])
    map_, sample = axes["map"], axes["sample"]
    part.suptitle(panel.name, fontweight="bold", fontsize=13)
    map_.set_title(caption(panel, view), fontsize=10)
    draw_map(map_, features, view, colours)
    draw_lines(map_, outline, "box, where the image has it", c="k", ls=":", lw=2)
    draw_lines(map_, panel.edges, "bins", c=BLUE, lw=1.2)
    draw_pooled(axes["pooled"], panel.pooled, followed and followed[:2], colours)
    apart = abs(panel.size / panel.pooled.shape / np.fmax(panel.inside.shape[2:], 1)).min()
    dot = float(np.clip(120 * apart / max(map(np.ptp, view)), 1, 4))  # points
    if not followed:
        draw_samples(map_, panel.samples, panel.inside, dot, "samples")
        sample.set_axis_off()
        sample.text(0.5, 0.5, "no sample is on the map:\nthe result is 0", ha="center")
        return map_
    p, q, j, i = followed
    at = panel.samples[:, p, q, j, i]
    point = [*at[::-1], *at[::-1]]  # a box of size 0, which has this sample
    rule: Any = {"sampling_ratio": 1, "convention": Convention(), "dtype": features.dtype}
    rows, columns, weights = sampling_grid(point, features.shape, 1, **rule).pixels(0, 0)
    if crowded:
        draw_samples(map_, panel.samples[:, p, q], panel.inside[p, q], dot, "samples of one bin")
    else:
        draw_samples(map_, panel.samples, panel.inside, dot, "samples")
    draw_bin(map_, panel.edges, p, q)
    first = [min(int(np.floor(k)), side - 1) for k, side in zip(at, features.shape)]
    draw_map(sample, features, [(k, k + 1) for k in first], colours)
    for each, size in ((map_, dot + 4), (sample, 9)):
        draw_pixels(each, rows, columns, "the pixels that it reads")
        draw_sample(each, at, size, "one sample, followed below")
    draw_weights(sample, at, (rows, columns, weights), features[rows, columns])
    return map_


def draw(panels: list[Panel], outline: np.ndarray, features: np.ndarray, said: list[str]) -> Figure:
    """The panels side by side, and above them what is said."""
    known = features[np.isfinite(features)]
    low, high = (known.min(), known.max()) if known.size else (0, 1)
    every = [outline, *[panel.edges for panel in panels]]
    look = (
        bounds(every, any([panel.inside.any() for panel in panels]), features.shape),
        {"cmap": "Greys", "vmin": low, "vmax": low + 2 * (high - low)},  # half grey at most
        any([panel.inside.size > MOST_DOTS for panel in panels]),
    )
    count = len(panels)
    figure = Figure(figsize=(WIDTH * count, HEIGHT), layout="constrained")
    if said:
        lines = [part for line in said for part in textwrap.wrap(line, int(12 * WIDTH * count))]
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10.5)
    handles: dict[str, Any] = {}
    followed = None
    for panel, part in zip(panels, figure.subfigures(1, count, squeeze=False)[0]):
        followed = follow(panel, features.shape, followed)
        axes = draw_panel(part, panel, outline, features, followed, look)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    columns = 2 if count == 1 else 3
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9)
    return figure
