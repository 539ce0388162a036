"""Pool two boxes of one image, take a gradient back to the features and to the boxes, check it."""

import numpy as np

from roialign import roi_align, roi_align_adjoint, roi_align_box_gradient

random = np.random.default_rng(0)
features = random.standard_normal((1, 16, 32, 48))  # [N, C, H, W], float64
rois = np.array(  # [K, 5]: image index, x1, y1, x2, y2 in image pixels
    [[0, 10.3, 20.7, 120.9, 100.1], [0, 55.2, 8.4, 90.6, 71.3]]
)
options = {"spatial_scale": 0.25, "sampling_ratio": 2, "convention": "half_pixel"}

output = roi_align(features, rois, (7, 7), **options)  # [K, C, P, Q]
print("output      ", output.shape)

# the loss |output|^2 / 2: its gradient in the output is the output
d_features = roi_align_adjoint(output, rois, features.shape, **options)  # [N, C, H, W]
d_rois = roi_align_box_gradient(output, features, rois, **options)  # [K, 5], column 0 is 0
print("d_features  ", d_features.shape)
print("d_rois      ", d_rois.shape)


def loss(features, rois):
    return np.square(roi_align(features, rois, (7, 7), **options)).sum() / 2


def report(name, gradient, towards, direction, step=1e-5):
    """The gradient along a direction, and the same from two values of the loss."""
    slope = np.vdot(gradient, direction)
    difference = (loss(*towards(step * direction)) - loss(*towards(-step * direction))) / (2 * step)
    print(f"{name} {slope:.6f}, by differences {difference:.6f}")


direction = random.standard_normal(features.shape)
report("in features ", d_features, lambda d: (features + d, rois), direction)
direction = random.standard_normal(rois.shape) * [0, 1, 1, 1, 1]  # not the image index
report("in boxes    ", d_rois, lambda d: (features, rois + d), direction)
