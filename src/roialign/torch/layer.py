"""MindSpore's operator as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import roialign

from . import adapter, script


class ROIAlign(torch.nn.Module):
    """MindSpore's RoIAlign as a layer. For torchvision's and detectron2's, see `roialign.compat`.

    Args:
        pooled_height, pooled_width, spatial_scale, sample_num, roi_end_mode: as in
            :class:`roialign.ROIAlign`. Errors are the same too.

    Called with ``features`` (N, C, H, W) and ``rois`` (K, 5), rows
    ``(image_index, x1, y1, x2, y2)`` in image pixels, it gives (K, C, pooled_height, pooled_width)
    in the features' dtype. Gradients reach both. It has no parameters and an empty ``state_dict``.

    >>> import torch, roialign.torch
    >>> pool = roialign.torch.ROIAlign(2, 2, 0.5)
    >>> features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> rois = torch.tensor([[0, 0.2, 0.3, 0.2, 0.3]])
    >>> pool(features, rois)
    tensor([[[[1.7750, 2.0250],
              [2.2750, 2.5250]]]])
    """

    def __init__(
        self,
        pooled_height: int,
        pooled_width: int,
        spatial_scale: float,
        sample_num: int = 2,
        roi_end_mode: int = 1,
    ) -> None:
        super().__init__()
        operator = roialign.ROIAlign(
            pooled_height, pooled_width, spatial_scale, sample_num, roi_end_mode
        )
        self.__setstate__({**vars(self), "operator": operator})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).update(vars(self.operator))  # its numbers, which TorchScript reads here

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        if torch.jit.is_scripting() or script.is_recorded(features):
            return torch.ops.roialign.ROIAlign(
                features,
                rois,
                self.pooled_height,
                self.pooled_width,
                self.spatial_scale,
                self.sample_num,
                self.roi_end_mode,
            )
        else:  # TorchScript reads none of it
            adapter.check_array("features", features)
            return self.operator(features, rois)

    def extra_repr(self) -> str:
        return repr(self.operator)[len("ROIAlign(") : -1]


ROIAlign.__module__ = "roialign.torch"  # what pickles and pages call it
