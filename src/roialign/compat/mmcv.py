"""``mmcv.ops``: ``roi_align``, ``RoIAlign``, ``roi_align_rotated`` and ``RoIAlignRotated``, without
mmcv."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import roialign
from roialign import _checks
from roialign.torch import refuse

__all__ = ["RoIAlign", "RoIAlignRotated", "roi_align", "roi_align_rotated"]

REDUCTIONS = {"avg": "mean", "max": "max"}  # by the names of mmcv's `pool_mode`


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = "avg",
    aligned: bool = True,
) -> Tensor:
    """``mmcv.ops.roi_align``.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64.
        rois: (K, 5), rows ``(image_index, x1, y1, x2, y2)`` in image pixels.
        output_size: bins (P, Q), or an int for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        pool_mode: "avg", or "max", the largest sample of a bin.
        aligned: whether pixel centres are at half coordinates: the convention "mmcv:aligned=True",
            else "mmcv:aligned=False".

    Returns:
        (K, C, P, Q), contiguous, in the dtype of ``input``.

    Raises:
        ValueError: ``pool_mode`` is neither "avg" nor "max".
        TypeError, ValueError, IndexError: as :func:`roialign.roi_align`. Messages call ``input``
            `features`.

    Gradients reach ``input`` and also ``rois``, which mmcv does not offer. What differs from mmcv:
    with "max" a bin without samples is 0, where mmcv's is -10000; the winning sample has its
    gradient also where it lies at exactly -1 in y, where mmcv's has none; ``rois`` keep their own
    dtype, and ``spatial_scale`` is not rounded to float32. Source: mmcv's documentation, and
    recorded results of it.

    >>> import torch
    >>> from roialign.compat.mmcv import roi_align
    >>> ramp = torch.arange(8.0).repeat(1, 1, 8, 1)  # f(y, x) = x
    >>> roi_align(ramp, torch.tensor([[0.0, 2, 2, 6, 6]]), (1, 2), pool_mode="max")
    tensor([[[[3., 5.]]]])
    """
    _checks.one_of("pool_mode", pool_mode, REDUCTIONS)
    return roialign.roi_align(
        input,
        rois,
        output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        convention=f"mmcv:aligned={_checks.flag('aligned', aligned)}",
        reduction=REDUCTIONS[pool_mode],
    ).contiguous()


def roi_align_rotated(
    input: Tensor,
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
    clockwise: bool = False,
) -> Tensor:
    """``mmcv.ops.roi_align_rotated``.

    Args:
        input, output_size, spatial_scale, sampling_ratio: as in :func:`roi_align`.
        rois: (K, 6), rows ``(image_index, centre x, centre y, width, height, angle)``: image
            pixels, and radians.
        aligned: whether pixel centres are at half coordinates: the convention "mmcv:aligned=True",
            else "mmcv:aligned=False".
        clockwise: whether angles count clockwise.

    Returns:
        (K, C, P, Q), contiguous, in the dtype of ``input``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roialign.roi_align_rotated`. Messages call
            ``input`` `features`.

    Gradients reach ``input`` and also ``rois``, which mmcv does not offer. What differs from mmcv:
    a negative side gives 0 with adaptive sampling, where mmcv raises; ``rois`` keep their own
    dtype, and ``spatial_scale`` is not rounded to float32. Source: mmcv's documentation, and
    recorded results of it.

    >>> import torch
    >>> from roialign.compat.mmcv import roi_align_rotated
    >>> ramp = torch.arange(8.0).repeat(1, 1, 8, 1)  # f(y, x) = x
    >>> roi_align_rotated(ramp, torch.tensor([[0, 4, 4, 4, 2, 0.0]]), (1, 2), 1.0)
    tensor([[[[2.5000, 4.5000]]]])
    """
    return roialign.roi_align_rotated(
        input,
        rois,
        output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        convention=f"mmcv:aligned={_checks.flag('aligned', aligned)}",
        angle="radians",
        clockwise=_checks.flag("clockwise", clockwise),
    ).contiguous()


def from_maps(
    maps: Sequence[Tensor], rois: Tensor, levels: Tensor | None, layers: Sequence[nn.Module]
) -> Tensor:
    """Every RoI of rows (K, 6), by the layer of its map: for boxes that turn."""
    if levels is None:
        return layers[0](maps[0], rois)
    shape = rois.shape[0], maps[0].shape[1], *layers[0].output_size
    output = maps[0].new_zeros(shape)
    for i, (features, layer) in enumerate(zip(maps, layers)):
        rows = (levels == i).nonzero().squeeze(1)
        output = output.index_put((rows,), layer(features, rois[rows]))
    return output


def upright(rois: Tensor) -> Tensor:
    """Boxes (K, 4) of the sizes of those of rows (K, 6): levels are those of the sizes."""
    return torch.nn.functional.pad(rois[:, 3:5], (2, 0))


class _Layer(nn.Module):
    """A function of this module as a layer, which has what it takes as attributes."""

    taken: tuple[str, ...]
    function: Callable[..., Tensor]

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int
    ) -> None:
        super().__init__()
        self.sampling_ratio = _checks.samples("sampling_ratio", sampling_ratio)
        self.output_size = _checks.bins("output_size", _checks.integers("output_size", output_size))
        self.spatial_scale = _checks.real("spatial_scale", spatial_scale)

    __prepare_scriptable__ = refuse

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return self.function(input, rois, **{name: getattr(self, name) for name in self.taken})

    def extra_repr(self) -> str:
        return ", ".join([f"{name}={getattr(self, name)}" for name in self.taken])


class RoIAlign(_Layer):
    """``mmcv.ops.RoIAlign``: :func:`roi_align` as a layer.

    Args:
        output_size, spatial_scale, sampling_ratio, pool_mode, aligned: as in :func:`roi_align`.
        use_torchvision: changes nothing here.

    Called with ``input`` and ``rois`` as :func:`roi_align`, which says what is raised, what the
    gradients are and what differs from mmcv.

    >>> import torch
    >>> from roialign.compat.mmcv import RoIAlign
    >>> pool = RoIAlign(2, spatial_scale=0.5, pool_mode="max")
    >>> pool(torch.ones(1, 3, 8, 8), torch.tensor([[0.0, 2, 2, 10, 10]])).shape
    torch.Size([1, 3, 2, 2])
    """

    taken = "output_size", "spatial_scale", "sampling_ratio", "pool_mode", "aligned"
    function = staticmethod(roi_align)

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
        use_torchvision: bool = False,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio)
        _checks.one_of("pool_mode", pool_mode, REDUCTIONS)
        self.pool_mode = pool_mode
        self.aligned = aligned
        self.use_torchvision = use_torchvision

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, use_torchvision={self.use_torchvision}"


class RoIAlignRotated(_Layer):
    """``mmcv.ops.RoIAlignRotated``: :func:`roi_align_rotated` as a layer.

    Args:
        output_size, spatial_scale, sampling_ratio, aligned, clockwise: as in
            :func:`roi_align_rotated`.

    Called with ``input`` and ``rois`` as :func:`roi_align_rotated`, which says what is raised, what
    the gradients are and what differs from mmcv.

    >>> import torch
    >>> from roialign.compat.mmcv import RoIAlignRotated
    >>> pool = RoIAlignRotated(2, spatial_scale=0.5, clockwise=True)
    >>> pool(torch.ones(1, 3, 8, 8), torch.tensor([[0.0, 6, 6, 8, 4, 0.7]])).shape
    torch.Size([1, 3, 2, 2])
    """

    taken = "output_size", "spatial_scale", "sampling_ratio", "aligned", "clockwise"
    function = staticmethod(roi_align_rotated)

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int = 0,
        aligned: bool = True,
        clockwise: bool = False,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio)
        self.aligned = aligned
        self.clockwise = clockwise
