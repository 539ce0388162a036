"""The bytes that a workload must move, and the seconds that they take at measured bandwidths.

The DRAM floor counts each touched cache line of the map and each byte of the result once. The
cache floor adds the windows: every RoI loads its touched pixels once from the L2 cache.
"""

import numpy as np

LINE = 64


def traffic(operation, workload, rois, axes, itemsize, layout):
    """(bytes through DRAM, bytes between L2 and registers) that an operation cannot avoid."""
    channels = workload.shape[1]
    group = LINE // itemsize if layout == "nchw" else 1
    pixels = touched_pixels(workload.stored, rois, axes, group) * channels
    if operation == "adjoint":
        pixels = np.prod(workload.stored, dtype=np.int64)
    output = np.prod(workload.output_shape, dtype=np.int64)
    windows = sum(y.pixels.size * x.pixels.size for y, x in axes) * channels
    passes = 2 if operation == "adjoint" else 1  # read, added to, written
    return int(pixels + output) * itemsize, int(passes * windows) * itemsize


def touched_pixels(shape, rois, axes, group):
    """Pixels of the map in a window of any RoI, in groups that follow each other in memory."""
    images, _, height, width = shape
    touched = np.zeros((images, -(-height * width // group) * group), bool)
    for image, (y, x) in zip(rois[:, 0].astype(int), axes, strict=True):
        touched[image, y.places[:, None] + x.pixels] = True
    return touched.reshape(images, -1, group).any(2).sum() * group


def seconds(through_dram, through_cache, bandwidth):
    """The DRAM floor and, where the cache's bandwidth is known, the one with the cache."""
    dram = through_dram / max(bandwidth["copy"], bandwidth.get("read", 0))
    cache = bandwidth.get("cache")
    return {"dram": dram} | ({"dram_and_cache": dram + through_cache / cache} if cache else {})
