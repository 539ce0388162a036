"""What the memory of this machine allows: measured bandwidths and the bytes a workload must move.

The DRAM floor counts each touched cache line of the map and each byte of the result once. The
cache floor adds the windows: every RoI loads its touched pixels once from the L2 cache.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

LARGE = 256 * 2**20  # bytes, beyond any L3
CACHED = 256 * 2**10  # beyond L1, within L2
LINE = 64


def bandwidths(threads):
    """Bytes per second from and to DRAM, and loaded from L2, for `threads` threads together."""
    return {
        "copy": parallel(threads, copying),
        "read": parallel(threads, lambda: reading(LARGE, 1)),
        "cache": parallel(threads, lambda: reading(CACHED, 2000)),
    }


def copying():
    source, target = np.ones(LARGE // 2, np.uint8), np.ones(LARGE // 2, np.uint8)
    return LARGE, lambda: np.copyto(target, source)  # LARGE / 2 read, LARGE / 2 written


def reading(size, times):
    source = np.broadcast_to(np.ones(size // 4, np.float32), (times, size // 4))
    maxima = np.empty(times, np.float32)
    return size * times, lambda: np.maximum.reduce(source, axis=1, out=maxima)


def parallel(threads, make, tries=5):
    made = [make() for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = np.inf
        for _ in range(tries + 1):  # the first touches everything
            start = time.perf_counter()
            list(pool.map(lambda bytes_and_run: bytes_and_run[1](), made))
            best = min(best, time.perf_counter() - start)
    return sum(size for size, _ in made) / best


def traffic(operation, shape, output_shape, rois, axes, itemsize, layout):
    """(bytes through DRAM, bytes between L2 and registers) that an operation cannot avoid."""
    channels = shape[1]
    map_bytes = np.prod(shape, dtype=np.int64) * itemsize
    touched = touched_pixels(shape, rois, axes, LINE // itemsize if layout == "nchw" else 1)
    touched_bytes = touched * channels * itemsize
    output_bytes = np.prod(output_shape, dtype=np.int64) * itemsize
    windows = sum(y.pixels.size * x.pixels.size for y, x in axes) * channels * itemsize
    through_dram, through_cache = {
        "forward": (touched_bytes + output_bytes, windows),
        "adjoint": (map_bytes + output_bytes, 2 * windows),  # read, added to, written
        "box_gradient": (touched_bytes + output_bytes, windows),
    }[operation]
    return int(through_dram), int(through_cache)


def touched_pixels(shape, rois, axes, group):
    """Pixels of the map in a window of any RoI, in groups that follow each other in memory."""
    images, _, height, width = shape
    touched = np.zeros((images, height, width), bool)
    for image, (y, x) in zip(rois[:, 0].astype(int), axes, strict=True):
        touched[image, y.pixels[:, None], x.pixels] = True
    plane = touched.reshape(images, -1)
    plane = np.pad(plane, ((0, 0), (0, -plane.shape[1] % group)))
    return plane.reshape(images, -1, group).any(2).sum() * group


def seconds(through_dram, through_cache, bandwidth):
    """(DRAM floor, DRAM-plus-cache floor)."""
    dram = through_dram / max(bandwidth["copy"], bandwidth["read"])
    return dram, dram + through_cache / bandwidth["cache"]
