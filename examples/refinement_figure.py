"""What the examples of box refinement print and draw of their result, from NumPy arrays."""

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt


def iou(a, b):
    """Of each row of boxes with its row, (K,)."""
    size = np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0)
    common = size.prod(1)
    return common / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common)


def report(path, history, images, image_index, rough, refined, true):
    """Writes the picture: the columns of the history (the loss of judge, that of the refined boxes,
    the norm of the box gradient) and some of the images (N, 3, H, W) with their boxes (K, 4)."""
    before, after = iou(rough, true), iou(refined, true)
    figure, axes = plt.subplot_mosaic(
        "L012;G345", figsize=(13, 5.4), width_ratios=[1.3, 1, 1, 1], layout="constrained"
    )
    steps = range(1, len(history) + 1)
    axes["L"].plot(steps, history[:, 0], lw=1, label="judge: class and IoU of boxes")
    axes["L"].plot(steps, history[:, 1], lw=1, color="tab:purple", label="refined boxes, by judge")
    axes["L"].set(title="Losses", ylabel="loss", ylim=0)
    axes["L"].legend(frameon=False)
    axes["G"].plot(steps, history[:, 2], lw=1, color="tab:green")
    axes["G"].set(title="Gradient that came through the boxes", xlabel="step", ylabel="norm")
    kinds = {
        "before": (rough, "orange", "-"),
        "after": (refined, "cyan", "-"),
        "true": (true, "white", "--"),
    }
    height, width = images.shape[2:]
    for shown in range(6):
        axis = axes[str(shown)]
        image = (images[shown].transpose(1, 2, 0) / 2 + 0.3).clip(0, 1)
        axis.imshow(image, extent=(0, width, height, 0))
        here = np.flatnonzero(image_index == shown)
        for row in here:
            for label, (boxes, colour, style) in kinds.items():
                x1, y1, x2, y2 = boxes[row]
                look = {"edgecolor": colour, "linestyle": style, "linewidth": 1.6, "label": label}
                axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **look))
        axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
        pairs = ",  ".join(f"{before[row]:.2f} to {after[row]:.2f}" for row in here)
        axis.set_title("IoU " + pairs, fontsize=10)
    lines = axes["0"].patches[:3]
    look = {"facecolor": "0.4", "labelcolor": "white", "framealpha": 1}
    figure.legend(handles=lines, loc="outside lower right", ncols=3, **look)
    figure.savefig(path, dpi=110)
    print(f"mean norm of the box gradient  {history[:, 2].mean():.2e}")
    print(f"held-out mean IoU before       {before.mean():.3f}")
    print(f"held-out mean IoU after        {after.mean():.3f}")
    print(f"written to {path}")
