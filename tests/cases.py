"""Workloads as data, shared by the tests and the benchmark: maps of common detectors and boxes
with log-normal sides inside the image. The same bits for the same workload, always.
"""

from dataclasses import dataclass, replace

import numpy as np

SEED = 20260101


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    shape: tuple  # N, C, H, W
    scale: float
    per_image: int  # RoIs of each image
    output_size: tuple  # P, Q
    sampling: int  # per bin and axis; 0 adapts to the box
    side: tuple  # least, median, largest side of a box in feature pixels, sigma of its logarithm
    window: tuple  # least, mean, largest pixels that a box touches on an axis
    coarser: int = 0  # maps beside: each of half the one before, and its boxes are those of FPN

    @property
    def rois_number(self):
        return self.shape[0] * self.per_image

    @property
    def output_shape(self):
        return (self.rois_number, self.shape[1], *self.output_size)

    @property
    def sizes(self):
        """(H, W) of each map, from fine to coarse."""
        return [
            tuple(side >> level for side in self.shape[2:]) for level in range(1 + self.coarser)
        ]

    @property
    def scales(self):
        return [self.scale / 2**level for level in range(1 + self.coarser)]

    @property
    def stored(self):
        """The shape of `features`: those of several maps are one row, map after map."""
        pixels = sum(height * width for height, width in self.sizes)
        return (*self.shape[:2], 1, pixels) if self.coarser else self.shape

    def levels(self, rois):
        """[K]: the map of each box, by its area."""
        side = np.sqrt((rois[:, 3:] - rois[:, 1:3]).prod(1))
        finest = -np.log2(self.scale)
        level = np.floor(4 + np.log2(side / 224) + 1e-6) - finest
        return level.clip(0, self.coarser).astype(int)

    def rois(self):
        """(K, 5) float32: image, x1, y1, x2, y2 in image pixels, image after image."""
        random = np.random.default_rng((SEED, 1))
        least, median, largest, sigma = self.side
        images, _, height, width = self.shape
        size = random.lognormal(np.log(median), sigma, self.rois_number)  # [K]
        aspect = random.lognormal(0.0, sigma / 2, self.rois_number)
        sides = np.stack([size * aspect, size / aspect], 1).clip(least, largest)  # [K, 2]: x, y
        room = np.array([width, height]) - sides
        start = random.random(room.shape) * room
        boxes = np.concatenate([start, start + sides], 1) / self.scale  # [K, 4]
        index = np.repeat(np.arange(images), self.per_image)
        return np.concatenate([index[:, None], boxes], 1).astype(np.float32)

    def turned(self):
        """(K, 6) float32: the boxes of `rois`, turned: image, x, y, width, height, degrees."""
        image, start, end = np.split(self.rois(), (1, 3), 1)
        degrees = np.random.default_rng((SEED, 4)).uniform(-180, 180, image.shape)
        turned = np.concatenate([image, (start + end) / 2, end - start, degrees], 1)
        return turned.astype(np.float32)

    def features(self):
        """`stored` float32, standard normal."""
        random = np.random.default_rng((SEED, 2))
        return random.standard_normal(self.stored, np.float32)

    def d_output(self):
        """(K, C, P, Q) float32, standard normal."""
        random = np.random.default_rng((SEED, 3))
        return random.standard_normal(self.output_shape, np.float32)


FPN = (1, 256, 200, 304)
C4 = (1, 1024, 50, 76)
BIG = ((14.0, 34.5, 76.0, 0.5), (15, 37, 75))
ASSIGNED = ((13.5, 18.6, 27.5, 0.5), (14, 20, 28))
MASK = ((14.0, 30.5, 73.0, 0.5), (15, 36, 75))
SMALL = ((0.5, 7.6, 35.5, 0.9), (2, 13, 37))
MASKS = ((100, 1, 800, 1333), 1.0, 1, (28, 28))
TARGET = ((56.0, 138.0, 304.0, 0.5), (57, 162, 301))
CROPS = ((1, 3, 2160, 3840), 1.0, 64, (224, 224))

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "box head, big boxes", FPN, 1 / 4, 1000, (7, 7), 2, *BIG),
        Workload("W1f", "box head, FPN-assigned", FPN, 1 / 4, 1000, (7, 7), 2, *ASSIGNED),
        Workload("W2", "box head, big boxes, adaptive", FPN, 1 / 4, 1000, (7, 7), 0, *BIG),
        Workload("W2f", "box head, FPN-assigned, adaptive", FPN, 1 / 4, 1000, (7, 7), 0, *ASSIGNED),
        Workload("W3", "mask head", FPN, 1 / 4, 100, (14, 14), 2, *MASK),
        Workload("W3a", "mask head, adaptive", FPN, 1 / 4, 100, (14, 14), 0, *MASK),
        Workload("W4", "C4 head, adaptive", C4, 1 / 16, 300, (14, 14), 0, *SMALL),
        Workload("W4s", "C4 head", C4, 1 / 16, 300, (14, 14), 2, *SMALL),
        Workload(
            "W5", "batch of 8 images", (8, 256, 100, 152), 1 / 8, 512, (7, 7), 2,
            (6.0, 18.7, 60.0, 0.5), (7, 22, 60),
        ),
        Workload(
            "W6", "call overhead", (1, 64, 32, 32), 1 / 16, 8, (7, 7), 2,
            (4.0, 8.0, 16.0, 0.5), (5, 9, 17),
        ),
        Workload("W9", "mask targets, a box each", *MASKS, 1, *TARGET),
        Workload("W9a", "mask targets, adaptive", *MASKS, 0, *TARGET),
        Workload(
            "W10", "crops of an RGB image, adaptive", *CROPS, 0,
            (100.0, 500.0, 2000.0, 0.5), (179, 622, 1947),
        ),
    )
}  # fmt: skip

PROPOSALS = (4.0, 37.5, 200.0, 0.9)
W7 = Workload(
    "W7", "pyramid, box head", FPN, 1 / 4, 1000, (7, 7), 2, PROPOSALS, (5, 21, 94), coarser=3
)
W8 = replace(
    W7, name="W8", title="pyramid, mask head", per_image=100, output_size=(14, 14),
    window=(6, 23, 66),
)  # fmt: skip
ON_P2 = {"coarser": 0, "title": "all of its boxes on P2"}
PYRAMIDS = {
    workload.name: workload
    for workload in (
        W7,
        replace(W7, name="W7a", title="pyramid, adaptive", sampling=0),
        replace(W7, name="W7p", window=(5, 53, 188), **ON_P2),
        W8,
        replace(W8, name="W8p", window=(6, 61, 195), **ON_P2),
    )
}
