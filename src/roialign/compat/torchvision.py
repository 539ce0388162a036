"""``torchvision.ops.roi_align``, ``RoIAlign`` and ``MultiScaleRoIAlign``.

torchvision need not be there. Where it can be imported, its model classes accept these layers,
which are subclasses of its own; :func:`patch` puts them into a model that was built with its
layers, and within :func:`replaced` it calls this `roi_align`.
"""

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit.annotations import BroadcastingList2

import roialign
from roialign import _checks
from roialign.torch import (
    check_array,
    is_compiling,
    is_recorded,
    is_traced,
    joined,
    register,
    repeated,
)

__all__ = ["MultiScaleRoIAlign", "RoIAlign", "patch", "replaced", "roi_align", "unpatch"]

try:
    from torchvision import ops as _theirs
except Exception as error:  # of any kind: it may be built for another torch
    _theirs, _missing = None, f"{type(error).__name__}: {error}"
_Layer: Any = _theirs.RoIAlign if _theirs else nn.Module
_PyramidLayer: Any = _theirs.MultiScaleRoIAlign if _theirs else nn.Module


@torch.fx.wrap  # type: ignore[untyped-decorator]
def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: BroadcastingList2[int],  # an int or a pair, as TorchScript writes it
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """``torchvision.ops.roi_align``: :func:`roialign.roi_align` with torchvision's arguments.

    Args:
        input: (N, C, H, W), as ``features`` of :func:`roialign.roi_align`.
        boxes: (K, 5), rows ``(image_index, x1, y1, x2, y2)``, or a list with one (K_i, 4) for each
            image, of which the last may be missing; in image pixels, of any float or integer dtype,
            not only of ``input``'s.
        output_size: bins (P, Q), or an int for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        aligned: whether pixel centres are at half coordinates: the convention
            "torchvision:aligned=True", else "torchvision:aligned=False".

    Returns:
        (K, C, P, Q) in the dtype of ``input``, float32 for uint8 and bool. As torchvision's it is
        contiguous, whatever the strides of ``input`` are.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roialign.roi_align`, whose messages call
            ``input`` `features` and ``boxes`` `rois`. A list may be longer than there are images
            if what is beyond them is empty, else that is an IndexError.

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
    if torch.jit.is_scripting() or is_traced():
        if isinstance(boxes, Tensor):
            return torch.ops.roialign.torchvision_roi_align(
                input, boxes, output_size, spatial_scale, sampling_ratio, aligned
            )
        return torch.ops.roialign.torchvision_roi_align_of_list(
            input, boxes, output_size, spatial_scale, sampling_ratio, aligned
        )
    else:  # TorchScript reads none of it
        return roialign.roi_align(
            input,
            _joined(boxes) if isinstance(boxes, (list, tuple)) else boxes,
            output_size,
            spatial_scale=spatial_scale,
            sampling_ratio=sampling_ratio,
            convention=_convention(aligned),
        ).contiguous()


for _name, _type in (("roi_align", "Tensor"), ("roi_align_of_list", "Tensor[]")):
    register(
        f"torchvision_{_name}",
        f"(Tensor input, {_type} boxes, int[2] output_size, float spatial_scale, "
        "int sampling_ratio, bool aligned) -> Tensor",
        roi_align,
    )


def _convention(aligned: bool) -> str:
    return f"torchvision:aligned={_checks.flag('aligned', aligned)}"


def _joined(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The boxes of all images (K, 4), and the image of each (K,)."""
    if not isinstance(boxes, Tensor) or boxes.ndim == 0:  # one may stand for a list of them
        _checks.sequence("boxes", "or list, with an array for each image", boxes)
    for i, each in enumerate(boxes):
        check_array(f"boxes[{i}]", each)
        if each.ndim != 2 or each.shape[1] != 4:
            raise ValueError(f"`boxes[{i}]` must have shape (K, 4), got {tuple(each.shape)}")
    together = joined(list(boxes))
    return together, repeated([each.shape[0] for each in boxes], together)


class RoIAlign(_Layer):
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
        nn.Module.__init__(self)  # theirs, if there is one, takes arguments
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = _checks.samples("sampling_ratio", sampling_ratio)
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        return roi_align(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, "
            f"spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}, "
            f"aligned={self.aligned})"
        )


class MultiScaleRoIAlign(_PyramidLayer):
    """``torchvision.ops.MultiScaleRoIAlign``: pools every box from one map of a feature pyramid.

    Args:
        featmap_names: the maps to use, by their names in ``x``.
        output_size: bins (P, Q), or an int for both.
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        canonical_scale: the size, in image pixels, of a box that belongs to ``canonical_level``.
        canonical_level: that level; level k has scale 2^-k.
        scales: of the maps that are used, from fine to coarse, instead of those from heights.
            torchvision has no such argument, nor the next.
        aligned: as in :func:`roi_align`.

    Called with

    - ``x``: the maps by name, (N, C, H_i, W_i), from fine to coarse; maps with other names are not
      used;
    - ``boxes``: a list with one (K_i, 4) for each image, of which the last may be missing;
      ``x1, y1, x2, y2`` in image pixels, of any dtype;
    - ``image_shapes``: (height, width) of each image, in pixels,

    it gives a contiguous (K, C, P, Q) in the dtype of the first map (float32 for uint8 and bool),
    in the order of the boxes. The scale of a map is the power of 2 nearest to its height divided by
    the greatest height of an image. A box of area A has the level
    ``floor(canonical_level + log2(sqrt(A) / canonical_scale) + 1e-6)``. Levels finer than the
    finest map, or coarser than the coarsest, count as that map's level. A box whose area is NaN or
    negative has no map: its row is 0.

    After a call ``scales`` and ``map_levels`` show the scales and the levels that it used. (Not
    after one that a compiler, a tracer or TorchScript ran.)

    Gradients reach the maps and the boxes. The choice of a map has no gradient.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roi_align`, from the call (of
            ``sampling_ratio`` at construction).
        ValueError: ``x`` has no map of ``featmap_names``, a coarser one before a finer one, or
            two between which a level is missing, such as maps of strides 4 and 16; there is no
            image, or a map without a height; ``boxes`` are not (K_i, 4).

    What differs from torchvision on purpose:

    - Scales are computed in each call. torchvision keeps those of the first call for ever.
    - If a level between the maps is missing, that is an error. torchvision pools boxes of that
      level from the next map, and gives 0 for boxes of the last. (In small images a map may miss a
      level because its height was rounded. Then boxes of the last level are pooled from it.)

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

    __jit_ignored_attributes__ = "scales", "map_levels", "before_patch"

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        scales: Sequence[float] | None = None,
        aligned: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # theirs, if there is one, takes arguments
        self.featmap_names = featmap_names
        self.sampling_ratio = _checks.samples("sampling_ratio", sampling_ratio)
        try:
            self.output_size = tuple(output_size)  # type: ignore[arg-type]  # an int is the exception
        except TypeError:
            self.output_size = _checks.integers("output_size", output_size)
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.__dict__.update(_FIRST, aligned=aligned)
        if scales is not None:
            _checks.sequence("scales", "or list, with a scale for each map", scales)
            reals = [_checks.real(f"scales[{i}]", scale) for i, scale in enumerate(scales)]
            self.given_scales = [_checks.scales("scales", (real, real))[0] for real in reals]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**_FIRST, **state})

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        if torch.jit.is_scripting() or is_recorded(x):
            return _as_operator(
                x,
                boxes,
                image_shapes,
                self.featmap_names,
                self.given_scales,
                self.output_size,
                self.sampling_ratio,
                float(self.canonical_scale),
                self.canonical_level,
                self.aligned,
            )
        else:
            return self._forward(x, boxes, image_shapes)

    def _forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        _checks.mapping("x", x)
        maps = [features for name, features in x.items() if name in self.featmap_names]
        for name, features in x.items():
            check_array(f"x[{name!r}]", features)
        heights = _heights(image_shapes)
        if not maps:
            raise ValueError(f"`x` must have a map of {self.featmap_names}, got {list(x)}")
        levels, scales = _placed(maps, heights, self.given_scales)
        mapper = LevelMapper(levels[0], levels[-1], self.canonical_scale, self.canonical_level)
        if not is_compiling():
            self.scales, self.map_levels = scales, mapper
        return _pool(
            maps, boxes, scales, mapper, self.output_size, self.sampling_ratio, self.aligned
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(featmap_names={self.featmap_names}, "
            f"output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
            + f", scales={self.given_scales}" * (self.given_scales is not None)
            + f", aligned={self.aligned}" * self.aligned
            + ")"
        )


# What a layer may lack that 0.2 saved, or torchvision built.
_FIRST = {"scales": None, "map_levels": None, "given_scales": None, "aligned": False}


class LevelMapper(NamedTuple):
    """The levels of a pyramid's maps, as ``MultiScaleRoIAlign.map_levels`` shows them.

    Called with a list of boxes (K_i, 4) it gives the map of each box (K,), from 0.
    """

    k_min: int
    k_max: int
    s0: float
    lvl0: int

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        return self.assign(_joined(boxlists))

    def assign(self, rois: tuple[Tensor, Tensor]) -> Tensor:
        ends = self.k_min, self.k_max
        return roialign.assign_levels(rois, ends, canonical_size=self.s0, canonical_level=self.lvl0)


@torch.fx.wrap  # type: ignore[untyped-decorator]
def _as_operator(
    x: dict[str, Tensor],
    boxes: list[Tensor],
    image_shapes: list[tuple[int, int]],
    names: list[str],
    scales: list[float] | None,
    output_size: list[int],
    sampling_ratio: int,
    canonical_scale: float,
    canonical_level: int,
    aligned: bool,
) -> Tensor:
    maps: list[Tensor] = []
    for name, features in x.items():
        if name in names:
            maps.append(features)
    heights: list[int] = []
    for shape in image_shapes:
        heights.append(int(shape[0]))
    return torch.ops.roialign.torchvision_multiscale_roi_align(
        maps, boxes, heights, scales, output_size, sampling_ratio, canonical_scale,
        canonical_level, aligned,
    )  # fmt: skip


def _run_operator(
    maps: list[Tensor],
    boxes: list[Tensor],
    heights: list[int],
    scales: list[float] | None,
    output_size: list[int],
    sampling_ratio: int,
    canonical_scale: float,
    canonical_level: int,
    aligned: bool,
) -> Tensor:
    if not maps:
        raise ValueError("`x` must have a map of `featmap_names`, got none")
    levels, scales = _placed(maps, heights, scales)
    mapper = LevelMapper(levels[0], levels[-1], canonical_scale, canonical_level)
    return _pool(maps, boxes, scales, mapper, output_size, sampling_ratio, aligned)


register(
    "torchvision_multiscale_roi_align",
    "(Tensor[] maps, Tensor[] boxes, int[] heights, float[]? scales, "
    "int[] output_size, int sampling_ratio, float canonical_scale, int canonical_level, "
    "bool aligned) -> Tensor",
    _run_operator,
)


def _placed(
    maps: list[Tensor], heights: list[int], scales: list[float] | None
) -> tuple[list[int], list[float]]:
    """Of each map how often the images, of these heights, were halved to give it; and its scale."""
    if scales is None:
        image: float = max([0, *heights])
        sides = [features.shape[-2] for features in maps]
        if not (min(image, *sides) >= 1 and image < math.inf):
            raise ValueError(
                "`image_shapes` and the maps of `x` must have a height, "
                f"got heights {heights} and {sides}"
            )
        levels = _levels_of(sides, image)
        scales = [2.0**-level for level in levels]
    elif len(scales) != len(maps):
        raise ValueError(f"`scales` must be {len(maps)}, one for each map, got {len(scales)}")
    else:
        image, sides = math.inf, [0 for _ in maps]
        levels = [-round(math.log2(scale)) for scale in scales]
    for fine, coarse, side in zip(levels, levels[1:], sides[1:]):
        if coarse < fine:
            raise ValueError(f"the maps of `x` must go from fine to coarse, got scales {scales}")
        # a map of few pixels may be of the next level, rounded down
        if coarse > fine + 1 and (side + 1) * 2 ** (fine + 1) <= image:
            raise ValueError(
                "the maps of `x` must have no level between them, because its boxes would have no "
                f"map, got scales {scales}"
            )
    return levels, scales


def _heights(image_shapes: Sequence[tuple[int, int]]) -> list[int]:
    _checks.sequence("image_shapes", "or list of (height, width)", image_shapes)
    for i, size in enumerate(image_shapes):
        _checks.sequence(f"image_shapes[{i}]", "(height, width)", size)
        if len(size) != 2:
            raise ValueError(f"`image_shapes[{i}]` must be (height, width), got {size}")
    return [height for height, _ in image_shapes]


def _levels_of(sides: list[int], image: float) -> list[int]:
    """By the nearest powers of 2. With integers alone: a compiler need not know their values."""
    level, levels = 0, []
    for side in sides:
        while 2 * side**2 * 4**level < image**2:
            level += 1
        while side**2 * 4**level > 2 * image**2:
            level -= 1
        levels.append(level)
    return levels


def _pool(
    maps: list[Tensor],
    boxes: list[Tensor],
    scales: list[float],
    mapper: LevelMapper,
    output_size: Any,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    adapter: Any = roialign.torch
    rois = _joined(boxes)
    dtypes = [_checks.pooled_dtype(adapter, "x", features) for features in maps]
    if any([features.dtype != maps[0].dtype for features in maps]):
        widest = functools.reduce(torch.promote_types, dtypes)
        maps = [features.to(widest) for features in maps]
    output = roialign.multiscale_roi_align(
        maps,
        rois,
        output_size,
        spatial_scales=scales,
        levels=mapper.assign(rois).clamp(max=len(maps) - 1) if len(maps) > 1 else None,
        sampling_ratio=sampling_ratio,
        convention=_convention(aligned),
    )
    return output.to(dtypes[0]).contiguous()


# In models of torchvision


def patch(model: nn.Module) -> list[str]:
    """Makes torchvision's pooling layers in a model those of this module, in place.

    Args:
        model: any module that has layers of ``torchvision.ops.RoIAlign`` or ``MultiScaleRoIAlign``.
            Subclasses of these with a ``forward`` of their own are left alone.

    Returns:
        The names of the layers that it changed, as of ``model.named_modules()``: a second call has
        none. Hooks, the training mode and references to the layers stay. Mask targets are no layer:
        see :func:`replaced`.

    Raises:
        TypeError: ``model`` is no module.
        ImportError: torchvision cannot be imported.

    >>> from roialign.compat.torchvision import patch
    >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn()  # doctest: +SKIP
    >>> patch(model)  # doctest: +SKIP
    ['roi_heads.box_roi_pool', 'roi_heads.mask_roi_pool']
    """
    return _changed(model, _become_ours)


def unpatch(model: nn.Module) -> list[str]:
    """Undoes :func:`patch`: layers that it changed are torchvision's again, as they were.

    Args, Returns, Raises: as :func:`patch`. Layers that were built of this module's classes stay.
    A copy of a model that was patched, or what a file had of it, can be undone too.

    >>> from roialign.compat.torchvision import unpatch
    >>> unpatch(model)  # doctest: +SKIP
    ['roi_heads.box_roi_pool', 'roi_heads.mask_roi_pool']
    """
    return _changed(model, _become_theirs)


def _changed(model: nn.Module, change: Callable[[Any], bool]) -> list[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {_checks.type_name(model)}")
    _require_theirs()
    return [name for name, layer in model.named_modules() if change(layer)]


def _require_theirs() -> None:
    if _theirs is None:
        raise ImportError(f"torchvision cannot be imported: {_missing}")


def _become_ours(layer: Any) -> bool:
    for ours in (RoIAlign, MultiScaleRoIAlign):
        if type(layer) is ours.__base__:
            layer.before_patch = {n: value for n, value in vars(layer).items() if n in _FIRST}
            layer.__class__ = ours
            layer.__setstate__(dict(vars(layer)))
            return True
    return False


def _become_theirs(layer: Any) -> bool:
    before = vars(layer).pop("before_patch", None)
    if before is None:
        return False
    for name in _FIRST:
        vars(layer).pop(name, None)
    vars(layer).update(before)
    layer.__class__ = type(layer).__base__
    return True


_lock, _inside = threading.Lock(), 0


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """Within this context torchvision's own modules call :func:`roi_align` instead of theirs.

    That is the name ``roi_align`` in every module of torchvision: its layers call it, and its
    models for the targets of masks. It is global: for all threads, until the last of those that are
    inside leaves. What another library has taken from torchvision stays what it was.

    Raises:
        ImportError: torchvision cannot be imported.

    >>> from roialign.compat.torchvision import replaced
    >>> with replaced():  # doctest: +SKIP
    ...     losses = model(images, targets)
    """
    global _inside
    _require_theirs()
    with _lock:
        _inside += 1
        _rename(_their_roi_align, roi_align)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _rename(roi_align, _their_roi_align)


_their_roi_align = _theirs and _theirs.roi_align


def _rename(old: Any, new: Any) -> None:
    """Also what was imported since."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torchvision" and vars(module).get("roi_align") is old:
            module.roi_align = new  # type: ignore[attr-defined]
