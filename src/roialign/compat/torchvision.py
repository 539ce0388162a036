"""``torchvision.ops.roi_align``, ``RoIAlign`` and ``MultiScaleRoIAlign``, without torchvision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import roialign
from roialign import _checks
from roialign.torch import check_array

__all__ = ["MultiScaleRoIAlign", "RoIAlign", "roi_align"]


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """``torchvision.ops.roi_align``: :func:`roialign.roi_align` with torchvision's arguments.

    Args:
        input: (N, C, H, W), as ``features`` of :func:`roialign.roi_align`.
        boxes: (K, 5), rows ``(image_index, x1, y1, x2, y2)``, or one (K_i, 4) for each image; in
            image pixels, of any float or integer dtype, not only of ``input``'s.
        output_size: bins (P, Q), or an int for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        aligned: whether pixel centres are at half coordinates: the convention
            "torchvision:aligned=True", else "torchvision:aligned=False".

    Returns:
        (K, C, P, Q) in the dtype of ``input``, float32 for uint8 and bool.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roialign.roi_align`, whose messages call
            ``input`` `features` and ``boxes`` `rois`.

    Gradients reach ``input`` and also ``boxes``, which torchvision's kernels do not offer. Results
    are those of torchvision's kernels, in every mode of torch. (On a GPU, under
    ``torch.use_deterministic_algorithms(True)``, torchvision itself takes another function, which
    does not pool 0 beyond the map: see :class:`MultiScaleRoIAlign`.)

    Source: torchvision's documentation, and recorded results of torchvision 0.27.

    >>> import torch
    >>> from roialign.compat.torchvision import roi_align
    >>> ramp = torch.arange(8.0).repeat(1, 1, 8, 1)  # f(y, x) = x
    >>> roi_align(ramp, [torch.tensor([[1.0, 1, 5, 5]])], (1, 2), sampling_ratio=2)
    tensor([[[[2., 4.]]]])
    """
    return roialign.roi_align(
        input,
        list(boxes) if isinstance(boxes, tuple) else boxes,  # one tensor per image, not a pair
        output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        convention="torchvision:aligned=True" if aligned else "torchvision:aligned=False",
    )


def _samples(sampling_ratio: int) -> int:
    _checks.samples("sampling_ratio", _checks.integer("sampling_ratio", sampling_ratio))
    return sampling_ratio


class RoIAlign(nn.Module):
    """``torchvision.ops.RoIAlign``: :func:`roi_align` as a layer.

    Args:
        output_size, spatial_scale, sampling_ratio, aligned: as in :func:`roi_align`.

    Called with ``input`` (N, C, H, W) and ``rois`` (K, 5), or one (K_i, 4) for each image, in image
    pixels, it gives (K, C, P, Q) in the dtype of ``input``. ``sampling_ratio`` is checked at
    construction. The call checks the other arguments, and raises what :func:`roi_align` raises.
    Gradients reach both. Source: torchvision's documentation.

    >>> import torch
    >>> from roialign.compat.torchvision import RoIAlign
    >>> pool = RoIAlign((1, 2), spatial_scale=0.5, sampling_ratio=2, aligned=True)
    >>> pool
    RoIAlign(output_size=(1, 2), spatial_scale=0.5, sampling_ratio=2, aligned=True)
    >>> ramp = torch.arange(8.0).repeat(1, 1, 8, 1)  # f(y, x) = x
    >>> pool(ramp, torch.tensor([[0.0, 2, 2, 10, 10]]))
    tensor([[[[1.5000, 3.5000]]]])
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = _samples(sampling_ratio)
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_align(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, "
            f"spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}, "
            f"aligned={self.aligned})"
        )


class MultiScaleRoIAlign(nn.Module):
    """``torchvision.ops.MultiScaleRoIAlign``: pools every box from one map of a feature pyramid.

    Args:
        featmap_names: the maps to use, by their names in ``x``.
        output_size: bins (P, Q), or an int for both.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        canonical_scale: the size, in image pixels, of a box that belongs to ``canonical_level``.
        canonical_level: that level; level k has scale 2^-k.

    Called with

    - ``x``: the maps by name, (N, C, H_i, W_i), from fine to coarse; maps with other names are not
      used;
    - ``boxes``: one (K_i, 4) for each image, ``x1, y1, x2, y2`` in image pixels, of any dtype;
    - ``image_shapes``: (height, width) of each image, in pixels,

    it gives (K, C, P, Q) in the dtype of the first map (float32 for uint8 and bool), in the order
    of the boxes. The scale of a map is the power of 2 nearest to its height divided by the greatest
    height of an image. A box of area A has the level
    ``floor(canonical_level + log2(sqrt(A) / canonical_scale) + 1e-6)``. Levels finer than the
    finest map, or coarser than the coarsest, count as that map's level. The
    convention is "torchvision:aligned=False".

    Gradients reach the maps and the boxes. The choice of a map has no gradient.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roi_align`, from the call (of
            ``sampling_ratio`` at construction).
        ValueError: ``x`` has no map of ``featmap_names``, or a coarser one before a finer one;
            there is no image, or a map without a height; ``boxes`` are not (K_i, 4), one for each
            image.

    What differs from torchvision on purpose:

    - Scales are computed in each call. torchvision keeps those of the first call, in its attributes
      ``scales`` and ``map_levels``, which do not exist here.
    - Every box is pooled from a map; torchvision gives zeros where it finds none. A box whose area
      is negative or NaN is pooled from the finest map. If a level between the maps is missing, a
      box that would come after the last map is pooled from the last.

    torchvision's deterministic mode: on a GPU, under ``torch.use_deterministic_algorithms(True)``,
    torchvision computes its ``roi_align`` by another function (torchvision 0.28). It gives other
    values where boxes reach beyond the map: on a map of ones, a box that lies wholly outside gives
    1, where torchvision's C++ kernels, ONNX Runtime and this class give 0. This class gives the
    same values in both modes, and is always deterministic.

    Source: torchvision's documentation; the levels are equation 1 of Feature Pyramid Networks
    (arXiv:1612.03144).

    >>> import torch
    >>> from roialign.compat.torchvision import MultiScaleRoIAlign
    >>> pool = MultiScaleRoIAlign(["fine", "coarse"], output_size=7, sampling_ratio=2)
    >>> x = {"fine": torch.zeros(1, 5, 128, 128), "coarse": torch.ones(1, 5, 64, 64)}
    >>> boxes = [torch.tensor([[0.0, 0, 500, 500], [8, 8, 40, 40], [0, 0, 224, 224]])]
    >>> output = pool(x, boxes, [(512, 512)])
    >>> output.shape, output[:, 0, 3, 3]
    (torch.Size([3, 5, 7, 7]), tensor([1., 0., 1.]))
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = featmap_names
        self.sampling_ratio = _samples(sampling_ratio)
        try:
            self.output_size = tuple(output_size)  # type: ignore[arg-type]  # an int is the exception
        except TypeError:
            self.output_size = _checks.integers("output_size", output_size)
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        maps = [features for name, features in x.items() if name in self.featmap_names]
        if not maps:
            raise ValueError(f"`x` must have a map of {self.featmap_names}, got {list(x)}")
        levels = _levels_of_maps(maps, image_shapes)
        all_boxes, image_index = _joined(boxes, maps[0].shape[0])
        chosen = self._choose(all_boxes.detach(), levels)
        rows = [torch.nonzero(chosen == i).squeeze(1) for i in range(len(maps))]
        pooled = [
            roialign.roi_align(
                features,
                (all_boxes[row], image_index[row]),
                self.output_size,
                spatial_scale=2.0**-level,
                sampling_ratio=self.sampling_ratio,
                convention="torchvision:aligned=False",
            )
            for features, level, row in zip(maps, levels, rows)
        ]
        if len(maps) == 1:
            return pooled[0]
        output = torch.cat([each.to(pooled[0].dtype) for each in pooled])
        return torch.empty_like(output).index_copy_(0, torch.cat(rows), output)

    def _choose(self, boxes: Tensor, levels: list[int]) -> Tensor:
        """Which of the maps, of these levels, each box (K, 4) is pooled from: (K,)."""
        boxes = boxes if boxes.dtype is torch.float64 else boxes.float()
        size = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        level = torch.floor(self.canonical_level + torch.log2(size / self.canonical_scale) + 1e-6)
        level = level.nan_to_num(nan=levels[0]).clamp(levels[0], levels[-1])
        return (level - levels[0]).clamp(max=len(levels) - 1)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(featmap_names={self.featmap_names}, "
            f"output_size={self.output_size}, sampling_ratio={self.sampling_ratio})"
        )


def _levels_of_maps(maps: list[Tensor], image_shapes: list[tuple[int, int]]) -> list[int]:
    """How often the images were halved to give each map."""
    image = max([0, *(height for height, _ in image_shapes)])
    heights = [features.shape[-2] for features in maps]
    if min(image, *heights) < 1:
        raise ValueError(
            f"`image_shapes` and the maps of `x` must have a height, got {list(image_shapes)} and "
            f"{heights}"
        )
    levels = [-round(math.log2(height / image)) for height in heights]
    if levels != sorted(levels):
        raise ValueError(f"the maps of `x` must go from fine to coarse, got heights {heights}")
    return levels


def _joined(boxes: list[Tensor], images: int) -> tuple[Tensor, Tensor]:
    """The boxes of all images (K, 4), and the image of each (K,)."""
    if len(boxes) != images:
        raise ValueError(f"`boxes` must have one tensor per image, {images}, got {len(boxes)}")
    for i, each in enumerate(boxes):
        check_array(f"boxes[{i}]", each)
        if each.ndim != 2 or each.shape[1] != 4:
            raise ValueError(f"`boxes[{i}]` must have shape (K, 4), got {tuple(each.shape)}")
    index = [torch.full((each.shape[0],), i, device=each.device) for i, each in enumerate(boxes)]
    return torch.cat(tuple(boxes)), torch.cat(index)
