"""The map of ratios that `python -m bench.regimes` draws."""

from itertools import pairwise, product

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Every eye tells orange from blue; in grey, an outline and bold type mark what is below 1.
COLOURS = {  # from a ratio on
    0.0: "#e6550d",
    0.5: "#fdae6b",
    1.0: "#eef4fa",
    2.0: "#d0e2f2",
    5.0: "#a3cbe3",
    10.0: "#62a8d3",
    30.0: "#2c7bb8",
    100.0: "#0b4688",
}
WHITE = 30  # the least ratio in white type
GAP = 0.4  # between blocks of cells


def draw(panels, maps, channels, counts, bins, title, path):
    """`panels`: title -> {(map, channels, boxes, bins): ratio}; what is not there stays blank."""
    y, x = places(maps, bins), places(channels, counts)
    size = 8.3, 1.6 + 3.2 * len(panels)
    figure, axes = pyplot.subplots(len(panels), figsize=size, squeeze=False, layout="constrained")
    for ax, (name, ratios) in zip(axes[:, 0], panels.items(), strict=True):
        for (map_, channel, count, bin_), ratio in ratios.items():
            cell(ax, x[channel, count], y[map_, bin_], ratio)
        ax.set(xlim=(0, max(x.values()) + 1), ylim=(max(y.values()) + 1, 0))
        ax.set_title(name, loc="left", weight="bold", pad=20)
        ax.set_xlabel("boxes", size=8)
        ax.set_xticks([at + 0.5 for at in x.values()], [count for _, count in x])
        ax.set_yticks([at + 0.5 for at in y.values()], [f"{bin_}x{bin_}" for _, bin_ in y])
        ax.tick_params(length=0, labelsize=7)
        ax.spines[:].set_visible(False)
        ax.text(-0.7, -0.4, "bins", ha="center", size=8)
        ax.text(-1.5, -0.4, "map", ha="right", size=8)
        for channel in channels:
            middle = x[channel, counts[0]] + len(counts) / 2
            ax.text(middle, -0.4, f"C = {channel}", ha="center", size=9)
        for map_ in maps:
            middle = y[map_, bins[0]] + len(bins) / 2
            ax.text(-1.5, middle, map_, ha="right", va="center", size=9)
    keys = [pyplot.Rectangle((0, 0), 1, 1, **fill(least)) for least in COLOURS]
    names = [f"{one:g} to {two:g}" for one, two in pairwise(COLOURS)] + [f"from {max(COLOURS):g}"]
    style = {"ncols": len(keys), "frameon": False, "fontsize": 8, "handlelength": 1.2}
    figure.legend(keys, names, loc="outside lower center", columnspacing=1.2, **style)
    figure.suptitle(title, fontsize=9, x=0.02, ha="left")
    figure.savefig(path, dpi=200)
    pyplot.close(figure)


def places(blocks, lines):
    """(block, line) -> where it begins."""
    size = len(lines) + GAP
    pairs = product(enumerate(blocks), enumerate(lines))
    return {(block, line): i * size + j for (i, block), (j, line) in pairs}


def fill(ratio):
    colour = next(COLOURS[least] for least in sorted(COLOURS, reverse=True) if least <= ratio)
    edge = {"edgecolor": "black", "linewidth": 1.3, "zorder": 2}
    return {"facecolor": colour} | (edge if ratio < 1 else {})


def cell(ax, x, y, ratio):
    ratio = round(ratio, 2 if ratio < 1 else 1)
    ax.add_patch(pyplot.Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, **fill(ratio)))
    text = f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
    style = {"weight": "bold"} if ratio < 1 else {"color": "white"} if ratio >= WHITE else {}
    middle = {"ha": "center", "va": "center_baseline", "zorder": 3}
    ax.text(x + 0.5, y + 0.5, text, size=6.5, **middle, **style)
