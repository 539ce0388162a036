"""``detectron2.layers.ROIAlign``, without detectron2: torchvision's layer, aligned by default."""

from __future__ import annotations

from collections.abc import Sequence

from roialign.compat.torchvision import RoIAlign

__all__ = ["ROIAlign"]


class ROIAlign(RoIAlign):
    """``detectron2.layers.ROIAlign``.

    Args:
        output_size: bins (P, Q), or an int for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        aligned: whether pixel centres are at half coordinates: the convention
            "detectron2:aligned=True", else "detectron2:aligned=False".

    Called with ``input`` (N, C, H, W), float16, bfloat16, float32 or float64, and ``rois`` (K, 5),
    rows ``(image_index, x1, y1, x2, y2)`` in image pixels, it gives (K, C, P, Q) in the dtype of
    ``input``. ``rois`` keep their own dtype, where detectron2 rounds them to that of ``input``.

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
