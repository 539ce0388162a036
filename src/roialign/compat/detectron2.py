"""``ROIAlign`` and ``ROIAlignRotated`` of ``detectron2.layers``, and
``detectron2.modeling.poolers.ROIPooler``, without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import roialign
from roialign import _checks
from roialign.compat import mmcv, torchvision
from roialign.torch import check_array, is_recorded, refuse

__all__ = ["ROIAlign", "ROIAlignRotated", "ROIPooler"]

POOLERS = {
    "ROIAlign": "detectron2:aligned=False",
    "ROIAlignV2": "detectron2:aligned=True",
    "ROIAlignRotated": "detectron2:aligned=True",
}


class ROIAlign(torchvision.RoIAlign):
    """``detectron2.layers.ROIAlign``.

    Args:
        output_size: bins (P, Q), or an int for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        aligned: whether pixel centres are at half coordinates: the convention
            "detectron2:aligned=True", else "detectron2:aligned=False".

    Called with ``input`` (N, C, H, W), float16, bfloat16, float32 or float64, and ``rois`` (K, 5),
    rows ``(image_index, x1, y1, x2, y2)`` in image pixels, it gives (K, C, P, Q) in the dtype of
    ``input``. An ``input`` that is quantised is dequantised. ``rois`` keep their own dtype, where
    detectron2 rounds them to that of ``input``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roialign.roi_align`, from the call (of
            ``sampling_ratio`` at construction). Messages call ``input`` `features`.

    Gradients reach ``input`` and also ``rois``, which detectron2 does not offer. Source:
    detectron2's documentation, and recorded results of torchvision, whose function it calls.

    >>> import torch
    >>> from roialign.compat.detectron2 import ROIAlign
    >>> pool = ROIAlign((1, 2), spatial_scale=0.5, sampling_ratio=0)
    >>> pool
    ROIAlign(output_size=(1, 2), spatial_scale=0.5, sampling_ratio=0, aligned=True)
    >>> ramp = torch.arange(8.0).repeat(1, 1, 8, 1)  # f(y, x) = x
    >>> pool(ramp, torch.tensor([[0.0, 2, 2, 10, 10]]))
    tensor([[[[1.5000, 3.5000]]]])
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, aligned)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        if torch.jit.is_scripting() or is_recorded(input):
            features = input
        else:  # TorchScript reads none of it
            check_array("input", input)
            features = input.dequantize() if input.is_quantized else input
        return torchvision.roi_align(
            features, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )


class ROIAlignRotated(nn.Module):
    """``detectron2.layers.ROIAlignRotated``.

    Args:
        output_size: bins (P, Q), or an int for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.

    Called with ``input`` (N, C, H, W), float16, bfloat16, float32 or float64, and ``rois`` (K, 6),
    rows ``(image_index, centre x, centre y, width, height, angle)`` in image pixels and
    counter-clockwise degrees, it gives (K, C, P, Q), contiguous, in the dtype of ``input``. The
    convention is "detectron2:aligned=True". ``rois`` keep their own dtype.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roialign.roi_align_rotated`, from the call (of
            the arguments above at construction). Messages call ``input`` `features`.

    Gradients reach ``input`` and also ``rois``, which detectron2 does not offer. What differs: a
    negative side gives 0 with adaptive sampling, where detectron2 raises. Source: detectron2's
    documentation, and recorded results of it.

    >>> import torch
    >>> from roialign.compat.detectron2 import ROIAlignRotated
    >>> pool = ROIAlignRotated((1, 2), spatial_scale=1.0, sampling_ratio=0)
    >>> ramp = torch.arange(8.0).repeat(1, 1, 8, 1)  # f(y, x) = x
    >>> pool(ramp, torch.tensor([[0, 4, 4, 4, 2, 180.0]]))
    tensor([[[[4.5000, 2.5000]]]])
    """

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int
    ) -> None:
        super().__init__()
        self.sampling_ratio = _checks.samples("sampling_ratio", sampling_ratio)
        bins = _checks.integers("output_size", output_size)
        self.output_size = _checks.bins("output_size", bins)
        self.spatial_scale = spatial_scale

    __prepare_scriptable__ = refuse

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return roialign.roi_align_rotated(
            input,
            rois,
            self.output_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            convention="detectron2:aligned=True",
        ).contiguous()

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}"
        )


class ROIPooler(nn.Module):
    """``detectron2.modeling.poolers.ROIPooler``: pools every box from one map of a pyramid.

    Args:
        output_size: bins (P, Q), or an int for both.
        scales: for each map its feature pixels per image pixel: powers of 2, from fine to coarse,
            each half of the one before.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        pooler_type: "ROIAlignV2" (the convention "detectron2:aligned=True"), "ROIAlign"
            ("detectron2:aligned=False"), or "ROIAlignRotated" for boxes that turn.
        canonical_box_size: the size, in image pixels, of a box that belongs to ``canonical_level``.
        canonical_level: that level; level k has scale 2^-k.

    Called with

    - ``x``: the maps, a list of (N, C, H_i, W_i);
    - ``box_lists``: for each image the boxes (K_i, 4), ``x1, y1, x2, y2`` in image pixels, a tensor
      or an object with such a ``tensor``, as detectron2's ``Boxes``; boxes that turn are (K_i, 5),
      centre x, y, width, height and counter-clockwise degrees, as its ``RotatedBoxes``,

    it gives a contiguous (K, C, P, Q) in the dtype of the maps, in the order of the boxes. The
    levels are those of :func:`roialign.assign_levels` with ``rule="detectron2"``. As in detectron2,
    a box whose area is negative or NaN has no map and gives 0, and one map takes all boxes.

    Gradients reach the maps and the boxes. The choice of a map has no gradient.

    Raises:
        ValueError: ``scales`` are no pyramid; or ``pooler_type`` is another: there is no "ROIPool".
        TypeError, ValueError, IndexError: as :func:`roialign.multiscale_roi_align`, from the call.
            Messages call ``box_lists`` `rois`.

    What differs from detectron2 on purpose: any ``output_size`` works with several maps, where
    detectron2 gives P rows and P columns. Source: detectron2's documentation, and recorded results
    of it.

    >>> import torch
    >>> from roialign.compat.detectron2 import ROIPooler
    >>> pool = ROIPooler(7, scales=(1 / 4, 1 / 8), sampling_ratio=0, pooler_type="ROIAlignV2")
    >>> x = [torch.zeros(1, 5, 128, 128), torch.ones(1, 5, 64, 64)]
    >>> output = pool(x, [torch.tensor([[0.0, 0, 500, 500], [8, 8, 40, 40]])])
    >>> output.shape, output[:, 0, 3, 3]
    (torch.Size([2, 5, 7, 7]), tensor([1., 0.]))
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        _checks.one_of("pooler_type", pooler_type, POOLERS)
        _checks.sequence("scales", "or list, with a scale for each map", scales)
        self.scales = tuple([_checks.real(f"scales[{i}]", s) for i, s in enumerate(scales)])
        finest = 1 - math.frexp(self.scales[0])[1] if self.scales else 0
        if not scales or self.scales != tuple([2.0 ** -(finest + i) for i in range(len(scales))]):
            raise ValueError(
                "`scales` must be powers of 2, each half of the one before, "
                f"got {_checks.shown(scales)}"
            )
        self.output_size = _checks.integers("output_size", output_size)
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.min_level, self.max_level = finest, finest + len(scales) - 1
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    __prepare_scriptable__ = refuse

    def forward(self, x: Sequence[Tensor], box_lists: Sequence[Any]) -> Tensor:
        _checks.sequence("box_lists", "or list, with boxes for each image", box_lists)
        boxes = [getattr(each, "tensor", each) for each in box_lists]
        if self.pooler_type == "ROIAlignRotated":
            return self._pool_rotated(x, boxes)
        return roialign.multiscale_roi_align(
            x,
            boxes,
            self.output_size,
            spatial_scales=self.scales,
            levels=self._levels(boxes),
            sampling_ratio=self.sampling_ratio,
            convention=POOLERS[self.pooler_type],
        ).contiguous()

    def _levels(self, boxes: list[Tensor]) -> Tensor | None:
        """Which map each box has; None: there is one map."""
        levels = None
        if len(self.scales) > 1:
            levels = roialign.assign_levels(
                boxes,
                (self.min_level, self.max_level),
                rule="detectron2",
                canonical_size=self.canonical_box_size,
                canonical_level=self.canonical_level,
            )
        return levels

    def _pool_rotated(self, x: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        rois = torch.cat([nn.functional.pad(each, (1, 0), value=i) for i, each in enumerate(boxes)])
        layers = [
            ROIAlignRotated(self.output_size, scale, self.sampling_ratio) for scale in self.scales
        ]
        return mmcv.from_maps(x, rois, self._levels([mmcv.upright(rois)]), layers)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, scales={self.scales}, "
            f"sampling_ratio={self.sampling_ratio}, pooler_type={self.pooler_type!r}"
        )
