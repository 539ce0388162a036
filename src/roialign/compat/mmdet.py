"""mmdet's ``SingleRoIExtractor`` and ``GenericRoIExtractor``, without mmdet and mmcv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import roialign
from roialign import _checks
from roialign.compat import mmcv
from roialign.torch import check_array, refuse

__all__ = ["GenericRoIExtractor", "SingleRoIExtractor"]


LAYERS = {"RoIAlign": mmcv.RoIAlign, "RoIAlignRotated": mmcv.RoIAlignRotated}


def _layer(spatial_scale: float, type: Any = None, **arguments: Any) -> nn.Module:
    """mmcv's layer of these arguments."""
    name = getattr(type, "__name__", type)
    _checks.one_of("roi_layer['type']", name, LAYERS)
    return LAYERS[name](spatial_scale=spatial_scale, **arguments)


class _Extractor(nn.Module):
    def __init__(
        self,
        roi_layer: Mapping[str, Any],
        out_channels: int,
        featmap_strides: Sequence[int],
        init_cfg: Any = None,
    ) -> None:
        super().__init__()
        _checks.mapping("roi_layer", roi_layer)
        names, strides = _checks.several("featmap_strides", featmap_strides, "a stride")
        for name, stride in zip(names, strides):
            _checks.scales(name, (_checks.real(name, stride),) * 2)
        self.roi_layers = nn.ModuleList([_layer(1 / stride, **roi_layer) for stride in strides])
        self.out_channels = out_channels
        self.featmap_strides = featmap_strides

    __prepare_scriptable__ = refuse

    @property
    def num_inputs(self) -> int:
        """How many maps there are strides for."""
        return len(self.featmap_strides)

    @property
    def turns(self) -> bool:
        """Whether boxes have an angle."""
        return isinstance(self.roi_layers[0], mmcv.RoIAlignRotated)

    def roi_rescale(self, rois: Tensor, scale_factor: float) -> Tensor:
        """The rois, each ``scale_factor`` times as large about its centre."""
        scale_factor = _checks.real("roi_scale_factor", scale_factor)
        if self.turns:
            return torch.cat([rois[:, :3], rois[:, 3:5] * scale_factor, rois[:, 5:]], 1)
        start, end = rois[:, 1:3], rois[:, 3:]
        centre, half = (start + end) * 0.5, (end - start) * scale_factor * 0.5
        return torch.cat([rois[:, :1], centre - half, centre + half], 1)

    def layers_for(self, feats: Sequence[Tensor], rois: Tensor) -> list[Any]:
        """The layer of each map; checks what else they take."""
        _checks.sequence("feats", "or list of maps", feats)
        names, maps = _checks.several("feats", feats, "an array")
        for name, array in zip((*names, "rois"), (*maps, rois)):
            check_array(name, array)
        numbers = 6 if self.turns else 5
        if rois.ndim != 2 or rois.shape[1] != numbers:
            _checks.refuse_shape("rois", f"(K, {numbers})", rois.shape)
        if len(feats) > len(self.roi_layers):
            raise ValueError(
                f"`feats` must be at most {len(self.roi_layers)} maps, one for each of "
                f"`featmap_strides`, got {len(feats)}"
            )
        return list(self.roi_layers)[: len(feats)]

    def checked(self, output: Tensor) -> Tensor:
        """The output (K, C, P, Q), if it has ``out_channels``."""
        if output.shape[1] != self.out_channels:
            raise ValueError(
                f"`out_channels` must be those of the result, {output.shape[1]}, "
                f"got {self.out_channels}"
            )
        return output


class SingleRoIExtractor(_Extractor):
    """mmdet's ``SingleRoIExtractor``: pools every RoI from one map of a pyramid.

    Args:
        roi_layer: ``type="RoIAlign"`` or ``"RoIAlignRotated"``, or a class of such a name, and the
            arguments of this class of :mod:`roialign.compat.mmcv`, but for ``spatial_scale``.
        out_channels: channels of the maps.
        featmap_strides: image pixels per feature pixel of each map, from fine to coarse.
        finest_scale: RoIs smaller than twice this, in image pixels, belong to the first map.
        init_cfg: not used, because there are no weights.

    Called with

    - ``feats``: the maps, (N, C, H_i, W_i), at most as many as strides;
    - ``rois``: (K, 5), rows ``(image_index, x1, y1, x2, y2)`` in image pixels; for boxes that turn
      (K, 6), as :func:`roialign.compat.mmcv.roi_align_rotated` takes them;
    - ``roi_scale_factor``: how much larger about its centre a RoI is that is pooled than the one
      that has a level, or None; with one map it does nothing, as in mmdet,

    it gives a contiguous (K, C, P, Q) in the dtype of the maps. The levels are those of
    :func:`roialign.assign_levels` with ``rule="mmdet"``. As in mmdet, a RoI whose area is negative
    or NaN has no map and gives 0, and one map takes all RoIs.

    Gradients reach all maps and the rois. The choice of a map has no gradient.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roialign.multiscale_roi_align`, from the call;
            for arguments of ``roi_layer`` that mmcv's ``RoIAlign`` does not have, or that are
            others than those above, at construction.

    What differs from mmdet on purpose: ``rois`` keep their own dtype, where mmdet rounds them to
    that of the maps, so in float16 a RoI of more than 65504 square pixels has the coarsest map.
    Boxes that turn have the levels of their width and height, as in mmrotate's
    ``RotatedSingleRoIExtractor``. Source: mmdet's documentation, and recorded results of it (of
    mmrotate there are none).

    >>> import torch
    >>> from roialign.compat.mmdet import SingleRoIExtractor
    >>> extract = SingleRoIExtractor(
    ...     roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
    ...     out_channels=5,
    ...     featmap_strides=[4, 8],
    ... )
    >>> feats = torch.zeros(1, 5, 128, 128), torch.ones(1, 5, 64, 64)
    >>> output = extract(feats, torch.tensor([[0.0, 0, 0, 500, 500], [0, 8, 8, 40, 40]]))
    >>> output.shape, output[:, 0, 3, 3]
    (torch.Size([2, 5, 7, 7]), tensor([1., 0.]))
    """

    def __init__(
        self,
        roi_layer: Mapping[str, Any],
        out_channels: int,
        featmap_strides: Sequence[int],
        finest_scale: int = 56,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(roi_layer, out_channels, featmap_strides, init_cfg)
        self.finest_scale = finest_scale

    def map_roi_levels(self, rois: Tensor, num_levels: int) -> Tensor:
        """Which of so many maps each of the rois is pooled from; -1 for none."""
        return roialign.assign_levels(
            [mmcv.upright(rois)] if self.turns else rois,
            (0, num_levels - 1),
            rule="mmdet",
            canonical_size=self.finest_scale,
            canonical_level=0,
        )

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        layers, levels = self.layers_for(feats, rois), None
        if len(feats) > 1:
            levels = self.map_roi_levels(rois, len(feats))
            if roi_scale_factor is not None:
                rois = self.roi_rescale(rois, roi_scale_factor)
        if self.turns:
            return self.checked(mmcv.from_maps(feats, rois, levels, layers))
        output = roialign.multiscale_roi_align(
            feats,
            rois,
            layers[0].output_size,
            spatial_scales=[layer.spatial_scale for layer in layers],
            levels=levels,
            sampling_ratio=layers[0].sampling_ratio,
            convention=f"mmcv:aligned={bool(layers[0].aligned)}",
            reduction=mmcv.REDUCTIONS[layers[0].pool_mode],
        )
        return self.checked(output).contiguous()


class GenericRoIExtractor(_Extractor):
    """mmdet's ``GenericRoIExtractor``: pools every RoI from all maps of a pyramid.

    Args:
        aggregation: "sum" adds what is pooled from the maps; "concat" puts it side by side as
            channels.
        pre_cfg: an ``nn.Module`` that is applied to what is pooled from each map, or None.
        post_cfg: an ``nn.Module`` that is applied to the result, or None.
        kwargs: ``roi_layer``, ``featmap_strides`` and ``init_cfg`` as in
            :class:`SingleRoIExtractor`; ``out_channels``, the channels of the aggregation.

    Called with ``feats``, ``rois`` and ``roi_scale_factor`` as :class:`SingleRoIExtractor`, it
    gives (K, C, P, Q), where C are ``out_channels``, or those of ``post_cfg``. As in mmdet, one map
    is pooled without ``roi_scale_factor`` and modules, and where there are no rois, no module runs.

    Gradients reach all maps and the rois.

    Raises:
        TypeError: ``pre_cfg`` or ``post_cfg`` is a configuration, which needs mmcv to be built:
            give the module.
        TypeError, ValueError, IndexError: as :class:`SingleRoIExtractor`.

    Source: mmdet's documentation; the extractor is that of arXiv:2004.13665.

    >>> import torch
    >>> from roialign.compat.mmdet import GenericRoIExtractor
    >>> extract = GenericRoIExtractor(
    ...     aggregation="sum",
    ...     roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2),
    ...     out_channels=5,
    ...     featmap_strides=[4, 8],
    ... )
    >>> feats = torch.ones(1, 5, 128, 128), torch.ones(1, 5, 64, 64)
    >>> output = extract(feats, torch.tensor([[0.0, 8, 8, 40, 40]]))
    >>> output.shape, output[0, 0, 3, 3]
    (torch.Size([1, 5, 7, 7]), tensor(2.))
    """

    def __init__(
        self,
        aggregation: str = "sum",
        pre_cfg: nn.Module | None = None,
        post_cfg: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _checks.one_of("aggregation", aggregation, ["sum", "concat"])
        self.aggregation = aggregation
        self.pre_module = _module("pre_cfg", pre_cfg)
        self.post_module = _module("post_cfg", post_cfg)

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        layers = self.layers_for(feats, rois)
        if rois.shape[0] == 0:
            return feats[0].new_zeros((0, self.out_channels, *layers[0].output_size))
        if len(feats) == 1:
            return layers[0](feats[0], rois)
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        pooled = [self.pre_module(layer(each, rois)) for layer, each in zip(layers, feats)]
        joined = sum(pooled) if self.aggregation == "sum" else torch.cat(pooled, 1)
        return self.post_module(self.checked(joined))


def _module(name: str, value: Any) -> nn.Module:
    if not (value is None or isinstance(value, nn.Module)):
        raise TypeError(
            f"`{name}` must be an nn.Module or None, got {_checks.type_name(value)}: build it with "
            "mmcv.cnn.bricks.build_plugin_layer"
        )
    return nn.Identity() if value is None else value
