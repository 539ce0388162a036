"""A head on pooled features learns to name shapes in MindSpore, with our ROIAlign or its own.

python examples/mindspore_training.py              # roialign.ROIAlign
python examples/mindspore_training.py --theirs     # mindspore.ops.ROIAlign: the same losses
python examples/mindspore_training.py --graph      # compiled
"""

import argparse
import time

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

import roialign

SIZE, STRIDE, BINS, CHANNELS = 64, 2, 5, 16
KINDS = 4  # filled and hollow, square and disc


def draw(random, images, boxes):
    """Images (N, 1, H, W), rois (K, 5) and what is in them (K,)."""
    y, x = np.mgrid[:SIZE, :SIZE]
    pictures = 0.2 * random.standard_normal((images, 1, SIZE, SIZE))
    rois, kinds = [], []
    for image in range(images):
        for _ in range(boxes):
            radius = random.uniform(5, 10)
            centre = random.uniform(radius, SIZE - radius, 2)
            kind = random.integers(KINDS)
            away = np.abs(x - centre[0]), np.abs(y - centre[1])
            distance = np.maximum(*away) if kind % 2 else np.hypot(*away)
            hollow = (distance > 0.6 * radius) | (kind < 2)
            pictures[image, 0][(distance < radius) & hollow] = 1
            rois.append([image, *(centre - radius), *(centre + radius - 1)])
            kinds.append(kind)
    return (
        Tensor(pictures.astype(np.float32)),
        Tensor(np.array(rois, np.float32)),
        Tensor(np.array(kinds, np.int32)),
    )


class Model(nn.Cell):
    def __init__(self, pool):
        super().__init__()
        self.features = nn.SequentialCell(
            nn.Conv2d(1, CHANNELS, 3, STRIDE),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3),
            nn.ReLU(),
        )
        self.pool = pool
        self.head = nn.SequentialCell(nn.Flatten(), nn.Dense(CHANNELS * BINS * BINS, KINDS))

    def construct(self, images, rois, kinds):
        pooled = self.pool(self.features(images), rois)
        return ops.cross_entropy(self.head(pooled), kinds)


def train(theirs=False, graph=False, steps=60, seed=0):
    """The loss of each step."""
    mindspore.set_seed(seed)
    mindspore.set_context(mode=mindspore.GRAPH_MODE if graph else mindspore.PYNATIVE_MODE)
    random = np.random.default_rng(seed)
    ROIAlign = mindspore.ops.ROIAlign if theirs else roialign.ROIAlign
    model = Model(ROIAlign(BINS, BINS, 1 / STRIDE, 2))
    optimizer = nn.Adam(model.trainable_params(), 5e-3)
    value_and_grad = mindspore.value_and_grad(model, None, optimizer.parameters)
    losses = []
    for _ in range(steps):
        loss, gradients = value_and_grad(*draw(random, 8, 4))
        optimizer(gradients)
        losses.append(float(loss.asnumpy()))
    return losses


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", action="store_true", help="mindspore.ops.ROIAlign")
    parser.add_argument("--graph", action="store_true", help="Graph mode")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    losses = train(options.theirs, options.graph, options.steps)
    every = max(1, options.steps // 6)
    for step in range(every - 1, options.steps, every):
        print(f"step {step + 1:3d}  loss {np.mean(losses[step + 1 - every : step + 1]):.4f}")
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
