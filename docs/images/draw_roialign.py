"""Draws roialign.png, RoIPool beside RoIAlign: python docs/images/draw_roialign.py [PICTURE]"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import roialign
from roialign import _explain_figure as draw
from roialign._explain import Panel

BOX = np.array([2.7, 1.7, 8.4, 5.4])  # x1, y1, x2, y2 at scale 1
BINS = 2, 3
BIN = 0, 1  # the bin that is followed
MOVES = np.linspace(0, 2, 401)  # of the box to the right, in pixels


def whole_bins(box):
    """RoIPool's bins in whole pixels, first and end of each: of y, of x."""
    first, last = np.floor(box.reshape(2, 2)[:, ::-1] + 0.5).astype(int)
    sizes = np.maximum(last - first + 1, 1)
    return [
        [(start + k * size // n, start - -(k + 1) * size // n) for k in range(n)]
        for start, size, n in zip(first, sizes, BINS, strict=True)
    ]


def roi_pool(features, box):
    """The largest pixel of each bin: [P, Q]."""
    rows, columns = whole_bins(box)
    return np.array([[features[a:b, c:d].max() for c, d in columns] for a, b in rows])


def roi_align(features, box):
    rois = np.array([[0, *box]])
    return roialign.roi_align(features[None, None], rois, BINS, sampling_ratio=2)[0, 0]


def main(picture):
    y, x = np.ogrid[:8, :12]
    features = (2 + np.sin(x / 1.9 - 0.7) + np.cos(y / 1.6 - x / 9)) / 4
    rule = {"spatial_scale": 1.0, "convention": "half_pixel", "sampling_ratio": 2}
    panel = Panel(BOX, features, BINS, rule)
    corners = panel.edges[:, [[0, 0], [-1, -1]], [[0, -1], [0, -1]]]
    rows, columns = whole_bins(BOX)
    ends = [np.array([bins[0][0], *(end for _, end in bins)]) - 0.5 for bins in (rows, columns)]
    part = features[slice(*rows[BIN[0]]), slice(*columns[BIN[1]])]
    sample = panel.samples[:, BIN[0], BIN[1], 0, 0]
    distance = abs(np.indices(features.shape) - sample[:, None, None])

    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    axes = figure.subplot_mosaic([["RoIPool", "RoIAlign"], ["moved"] * 2], height_ratios=[3, 2])
    for name, edges, read, words in (
        (
            "RoIPool",
            np.array(np.meshgrid(*ends, indexing="ij")),
            features == part.max(),
            "The box and its bins are rounded to whole pixels.\nA bin is its largest pixel.",
        ),
        (
            "RoIAlign",
            panel.edges,
            (distance < 1).all(0),
            "Nothing is rounded. A sample is interpolated from\n"
            "four pixels, and a bin is the mean of its samples.",
        ),
    ):
        map_ = axes[name]
        map_.set_title(name, fontweight="bold", fontsize=13)
        map_.set_xlabel(words)
        draw.draw_map(map_, features, [[0, 7], [0, 11]], {"cmap": "Greys", "vmin": 0, "vmax": 2})
        draw.draw_lines(map_, corners, "the box on the image", c="k", ls=":", lw=2)
        draw.draw_lines(map_, edges, "bins", c=draw.BLUE, lw=1.6)
        draw.draw_bin(map_, edges, *BIN)
        draw.draw_pixels(map_, *np.nonzero(read), "pixels that are read")
    draw.draw_samples(map_, panel.samples, panel.inside, 4, "samples")
    draw.draw_sample(map_, sample, 8, "one sample")
    figure.legend(*map_.get_legend_handles_labels(), loc="outside lower center", ncols=5)

    for pool, style in (
        (roi_pool, {"c": "k", "ls": "--", "drawstyle": "steps-post"}),
        (roi_align, {"c": draw.BLUE, "lw": 2.4}),
    ):
        values = [pool(features, BOX + move * np.array([1, 0, 1, 0]))[BIN] for move in MOVES]
        name = "RoIPool" if pool is roi_pool else "RoIAlign"
        axes["moved"].plot(MOVES, values, label=name, **style)
    axes["moved"].set(
        xlabel="pixels by which the box is moved to the right", ylabel="value of the blue bin"
    )
    axes["moved"].legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:] or [Path(__file__).with_name("roialign.png")])
