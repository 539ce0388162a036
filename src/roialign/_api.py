"""The public functions: checks, then the adapter of the arrays that came."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from roialign import _checks, _layout, _levels, _rois
from roialign._adapter import Adapter, adapter_of, own, with_own_index
from roialign._graph import IN_GRAPH, graph_adapter
from roialign._rule import Convention
from roialign._threads import get_num_threads, set_num_threads

__all__ = [
    "ROIAlign",
    "assign_levels",
    "get_num_threads",
    "multiscale_roi_align",
    "multiscale_roi_align_adjoint",
    "multiscale_roi_align_box_gradient",
    "roi_align",
    "roi_align_adjoint",
    "roi_align_box_gradient",
    "roi_align_rotated",
    "roi_align_rotated_adjoint",
    "roi_align_rotated_box_gradient",
    "set_num_threads",
]


class _Array(Protocol):
    """What arrays of all libraries have."""

    @property
    def dtype(self) -> Any: ...
    @property
    def ndim(self) -> int: ...
    @property
    def shape(self) -> Any: ...


Array = TypeVar("Array", bound=_Array)
Boxes = TypeVar("Boxes", bound="_Array | list[Any]")
Scale = float | tuple[float, float]


def _adapter(name: str, array: object, *others: Any) -> Adapter:
    if IN_GRAPH:  # @jit.cond: True
        return graph_adapter()
    return adapter_of(name, array, others)


_remembered_rule = functools.lru_cache(_checks.rule)
_USUAL = (float, int, str, str, str)
_USUAL_OF_SEVERAL = (*_USUAL[1:], int)


def _rule_of(
    adapter: Adapter, scale: Any, *given: Any
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`_checks.rule`, remembered for the usual types, which make safe keys.

    Not where torch's compiler reads: it warns of what is remembered.
    """
    if IN_GRAPH:  # @jit.cond: True
        return graph_adapter().rule(scale, *given)
    if adapter.is_compiling():
        return _checks.rule(scale, *given)
    if tuple(map(type, (scale, *given))) == _USUAL:
        return _remembered_rule(scale, *given)
    if tuple(map(type, given)) == _USUAL_OF_SEVERAL and _are_floats(scale):
        return _remembered_rule(tuple(scale), *given)
    return _checks.rule(scale, *given)


def _rotated_rule_of(*given: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if IN_GRAPH:  # @jit.cond: True
        return graph_adapter().rotated_rule(*given)
    return _checks.rotated_rule(*given)


def _are_floats(scales: Any) -> bool:
    return type(scales) in (tuple, list) and {*map(type, scales)} == {float}


def roi_align(
    features: Array,
    rois: Any,
    output_size: int | Sequence[int],
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    layout: str = "NCHW",
    out: Array | None = None,
) -> Array:
    """Pools every region of interest to a fixed grid by averaging bilinear samples.

    No coordinate is rounded. docs/spec.md defines the operator; it comes from Mask R-CNN
    (arXiv:1703.06870). It takes arrays of NumPy, PyTorch, JAX, MindSpore or CuPy, all of one
    library (JAX takes NumPy's beside its own), and gives an array of that library on the same
    device. With PyTorch, JAX and MindSpore it has derivatives (docs/pytorch.md, docs/jax.md,
    docs/mindspore.md). For GPUs see docs/gpu.md.

    Args:
        features: (N, C, H, W), float16, bfloat16, float32, float64, or uint8 and bool, which have
            no gradient; any strides.
        rois: an array (K, 5) of rows ``(image_index, x1, y1, x2, y2)``; or a tuple
            ``(boxes (K, 4), image_index (K,))`` with an integer index; or a list of N arrays
            (K_i, 4); or an array (N, M, 4) with M boxes for each image. Boxes are in image pixels,
            of any float or integer dtype, read as float32 (float64 if the features are float64). A
            box of NaNs gives 0, and so do its gradients.
        output_size: bins (P, Q), or an int for both.
        spatial_scale: feature pixels per image pixel, or a pair (scale_y, scale_x).
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        convention: the coordinate convention: a name or an alias in :data:`roialign.conventions`,
            or a :class:`Convention`.
        reduction: what a bin is of its samples: their "mean"; "max", the largest; or "max_corner",
            the largest pixel of any sample times its weight, as ONNX Runtime and TensorRT have it.
            In a maximum a sample that is not inside counts as 0. On the CPU; docs/gpu.md says what
            GPUs have of them (else NotImplementedError).
        layout: "NCHW", or "NHWC" for features (N, H, W, C) and a result (K, P, Q, C).
        out: an array for the result, of its shape and dtype. It must be writeable and overlap no
            input. JAX and MindSpore do not take it, nor PyTorch where a gradient is needed.

    Returns:
        (K, C, P, Q), or (N, M, C, P, Q) for boxes (N, M, 4), in the features' dtype, float32 for
        uint8 and bool. Sums are float32 (float64 for float64 features) and are rounded once. If
        the features are channels_last in memory, so is the result.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, size, scale, name or ``out`` is wrong.
        IndexError: an image index is not an integer in [0, N). On a GPU, in traced JAX and in
            MindSpore's Graph mode there is no error: the result of that RoI is 0, and so are its
            gradients.
        RuntimeError: ``out`` was given where PyTorch needs a gradient.

    The gradient in the features is :func:`roi_align_adjoint`, the gradient in the boxes
    :func:`roi_align_box_gradient`.

    >>> import numpy as np, roialign
    >>> features = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> rois = np.array([[0, 0, 0, 4, 4]], np.float32)
    >>> roialign.roi_align(features, rois, 2, sampling_ratio=2)
    array([[[[ 2.5,  4.5],
             [10.5, 12.5]]]], dtype=float32)
    """
    adapter = _adapter("features", features, rois)
    rows = adapter.takes_rows(features, rois)
    features = features if rows else own(adapter, features)
    dtype = features.dtype if rows else _checks.pooled_dtype(adapter, "features", features)
    if not rows:
        rois = _own_rois(adapter, rois, features)
    bins = _checks.integers("output_size", output_size)
    if out is not None:
        adapter.check_out("out", out, dtype)
    given = spatial_scale, sampling_ratio, convention, reduction, layout
    scales, rule = _rule_of(adapter, *given)
    bins = _checks.bins("output_size", bins)
    if rows and layout == "NCHW":
        output = adapter.forward_rows(features, rois, bins, scales, rule, out)
        if output is not None:
            return output
    names, maps = ("features",), (features,)
    return _forward(adapter, names, maps, rois, None, bins, scales, rule, layout, out)


def _own_rois(adapter: Adapter, rois: Any, like: Any) -> Any:
    """RoIs whose types have been checked, with an index of the library's own."""
    rois = own(adapter, rois)
    if isinstance(rois, tuple) and len(rois) == 2:
        rois = rois[0], with_own_index(adapter, rois[1], like)
    _rois.check(adapter, rois)
    return rois


def _forward(
    adapter: Adapter,
    names: tuple[str, ...],
    maps: tuple[Any, ...],
    rois: Any,
    levels: Any,
    bins: tuple[int, int],
    scales: tuple[float, ...],
    rule: tuple[float, ...],
    layout: str,
    out: Any,
    numbers: int = 4,
) -> Any:
    """The values that all functions of features check alike, and the call."""
    shapes = [_checks.map_shape(name, array.shape, layout) for name, array in zip(names, maps)]
    parsed, counts = _parsed(adapter, names, shapes, rois, levels, scales, layout, numbers)
    pooled = shapes[0][1], *bins
    _checks.size("output", (*counts, *pooled))
    flat = None
    if out is not None:
        shape = (*counts, *_layout.shape_as_given(pooled, layout))
        adapter.check_out_values("out", out, shape, [*maps, *_rois.arrays(rois, levels)])
        flat = _flat(adapter, out, layout)
    maps = _moved(adapter, _layout.channels_first, maps, layout)
    output = adapter.forward(maps, parsed, bins, scales, rule, layout=layout, out=flat)
    (output,) = _moved(adapter, _layout.as_given, (output,), layout)
    if len(counts) == 2:
        output = output.reshape((*counts, *output.shape[-3:]))
    if out is None:
        return output
    if not adapter.is_view(flat, out):
        out[...] = output
    return out


def _parsed(
    adapter: Adapter,
    names: tuple[str, ...],
    shapes: Sequence[tuple[int, ...]],
    rois: Any,
    levels: Any,
    scales: tuple[float, ...],
    layout: str,
    numbers: int,
) -> tuple[Any, tuple[int, ...]]:
    """The RoIs for these maps, which fit together, with levels if those are several; and (K,) or
    (N, M).
    """
    if len(shapes) > 1:
        _checks.maps_fit(names, shapes, layout)
    boxes, index, levels = _rois.parse(adapter, rois, shapes[0][0], levels, numbers)
    counts = _rois.counts(rois, boxes)
    for name, shape in zip(names, shapes):
        _checks.pixels(name, shape, math.prod(counts), layout)
    if levels is None and len(shapes) > 1:
        levels = _levels.by_scales(adapter, boxes, scales)
    if IN_GRAPH:  # @jit.cond: True
        return (boxes, index, levels), counts  # records have no fields there
    return _rois.Rois(boxes, index, levels), counts


def _moved(
    adapter: Adapter, move: Callable[..., Any], arrays: tuple[Any, ...], layout: str
) -> tuple[Any, ...]:
    """The arrays after a function of `_layout`, if the adapter wants channels first."""
    if layout == "NCHW" or adapter.takes_any_form:
        return arrays
    return tuple([move(array, layout) for array in arrays])


def _flat(adapter: Adapter, pooled: Any, layout: str) -> Any:
    """Of an array (K, ...) or (N, M, ...) what the adapter takes: a view where strides allow."""
    if pooled.ndim == 5 and not adapter.takes_any_form:
        pooled = pooled.reshape((pooled.shape[0] * pooled.shape[1], *pooled.shape[2:]))
    (pooled,) = _moved(adapter, _layout.channels_first, (pooled,), layout)
    return pooled


def roi_align_adjoint(
    d_output: Array,
    rois: Any,
    feature_shape: Sequence[int],
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    layout: str = "NCHW",
    features: Array | None = None,
    out: Array | None = None,
) -> Array:
    """The adjoint of :func:`roi_align`: from a gradient in the output, the one in the features.

    For all ``features`` and ``d_output``, up to rounding::

        d_features = roi_align_adjoint(d_output, ...)
        (roi_align(features, ...) * d_output).sum() == (features * d_features).sum()

    Deterministic: the same bits for any number of threads.

    Args:
        d_output: of the shape of the output, (K, C, P, Q) or as :func:`roi_align` says; float16,
            bfloat16, float32 or float64, any strides.
        rois: as in :func:`roi_align`, in image pixels; read as float64 if ``d_output`` is float64.
        feature_shape: (N, C, H, W) of the features; with "NHWC" (N, H, W, C).
        spatial_scale, sampling_ratio, convention, reduction, layout: as in :func:`roi_align`.
        features: for "max" and "max_corner", which give each gradient to the sample that won: the
            first of the largest. "mean" checks their shape and dtype and does not read them. Those
            of uint8 and bool have no gradient: a TypeError.
        out: an array for the result, as in :func:`roi_align`.

    Returns:
        ``feature_shape`` in the dtype of ``d_output``. Sums are float32 (float64 for float64
        ``d_output``) and are rounded once. If ``d_output`` is channels_last in memory, so is the
        result. The gradient of this function in ``d_output`` is :func:`roi_align`.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roi_align`.

    >>> import numpy as np, roialign
    >>> d_output = np.ones((1, 1, 1, 1), np.float32)
    >>> rois = np.array([[0, 0, 0, 2, 2]], np.float32)
    >>> roialign.roi_align_adjoint(d_output, rois, (1, 1, 2, 3), sampling_ratio=2)
    array([[[[0.25, 0.25, 0.  ],
             [0.25, 0.25, 0.  ]]]], dtype=float32)
    """
    adapter = _adapter("d_output", d_output, rois, features)
    if features is not None or not adapter.takes_rows(d_output, rois):
        d_output, features = own(adapter, (d_output, features))
        _checks.features(adapter, "d_output", d_output)
        if features is not None:
            _checks.features(adapter, "features", features, f"{_checks.FLOATS} to have a gradient")
            _checks.same_dtype("features", features.dtype, "d_output", d_output.dtype)
        rois = _own_rois(adapter, rois, d_output)
    _checks.sequence("feature_shape", "(N, C, H, W)", feature_shape)
    shape = _checks.integers("feature_shape", feature_shape)
    if out is not None:
        adapter.check_out("out", out, d_output.dtype)

    given = spatial_scale, sampling_ratio, convention, reduction, layout
    scales, rule = _rule_of(adapter, *given)
    if features is not None and features.shape != shape:
        _checks.refuse_shape("features", str(shape), features.shape)
    selectors = _selectors("features", features, reduction)
    names, outs = {"feature_shape": shape}, {} if out is None else {"out": out}
    (d_features,) = _adjoint(
        adapter, d_output, rois, names, None, scales, rule, layout, outs, selectors
    )
    return d_features


def _selectors(name: str, features: Any, reduction: str) -> tuple[Any, ...]:
    """The maps of an adjoint whose samples decide where gradients go; none for a mean."""
    if reduction == "mean":
        return ()
    if features is None:
        raise TypeError(f"`{name}` must be given for reduction {reduction!r}, got None")
    return features if isinstance(features, tuple) else (features,)


def _adjoint(
    adapter: Adapter,
    d_output: Any,
    rois: Any,
    feature_shapes: Mapping[str, tuple[int, ...]],
    levels: Any,
    scales: tuple[float, ...],
    rule: tuple[float, ...],
    layout: str,
    outs: Mapping[str, Any],
    selectors: tuple[Any, ...] = (),
    numbers: int = 4,
) -> tuple[Any, ...]:
    """The values that all adjoints check alike, and the call."""
    names, into = tuple(feature_shapes), None
    shapes = tuple([_checks.feature_shape(s, name, layout) for name, s in feature_shapes.items()])
    parsed, counts = _parsed(adapter, names, shapes, rois, levels, scales, layout, numbers)
    _checks.d_output(d_output.shape, counts, shapes[0][1], layout)
    if outs:
        taken = [d_output, *selectors, *_rois.arrays(rois, levels)]
        for (name, array), shape in zip(outs.items(), feature_shapes.values()):
            adapter.check_out_values(name, array, shape, taken)
            taken.append(array)
        into = _moved(adapter, _layout.channels_first, tuple(outs.values()), layout)
    flat = _flat(adapter, d_output, layout)
    options: dict[str, Any] = {"layout": layout, "out": into}
    if selectors:
        options["selectors"] = _moved(adapter, _layout.channels_first, selectors, layout)
    results = adapter.adjoint(flat, parsed, shapes, scales, rule, **options)
    if outs:
        return tuple(outs.values())
    return _moved(adapter, _layout.as_given, results, layout)


def roi_align_box_gradient(
    d_output: Array,
    features: Array,
    rois: Boxes | tuple[Boxes, Any],
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    layout: str = "NCHW",
    out: Any = None,
) -> Boxes:
    """The gradient of ``(roi_align(features, rois, ...) * d_output).sum()`` in the boxes.

    This is the exact derivative of the bilinear samples as the box moves (docs/spec.md, equations 6
    and 7). The number of samples counts as constant. At an integer position it is the derivative to
    the right. The jumps where samples leave the map add nothing. Where ``min_size`` decides the
    size of a box, the whole derivative goes to the start of the box. A box that is not finite has
    gradient 0.

    Args:
        d_output: of the shape of the output, (K, C, P, Q) or as :func:`roi_align` says; of the
            features' dtype, float32 for uint8 and bool.
        features: as in :func:`roi_align`.
        rois, spatial_scale, sampling_ratio, convention, reduction, layout: as in :func:`roi_align`.
        out: an array for the result, as in :func:`roi_align`. Not if ``rois`` is a list.

    Returns:
        The gradient per image pixel, in the boxes' dtype (float32 for integer boxes) and in the
        form of ``rois``: (K, 5) with zeros in column 0, (K, 4) for a tuple, a list of (K_i, 4) for
        a list, (N, M, 4).

    Raises:
        TypeError, ValueError, IndexError: as :func:`roi_align`.

    >>> import numpy as np, roialign
    >>> ramp = np.tile(np.arange(8, dtype=np.float32), (1, 1, 8, 1))  # f(y, x) = x
    >>> rois = np.array([[0, 2, 2, 5, 5]], np.float32)
    >>> d_output = np.ones((1, 1, 1, 1), np.float32)
    >>> roialign.roi_align_box_gradient(d_output, ramp, rois, sampling_ratio=2)
    array([[0. , 0.5, 0. , 0.5, 0. ]], dtype=float32)
    """
    adapter = _adapter("d_output", d_output, features, rois)
    d_output, features = own(adapter, (d_output, features))
    _checks.features(adapter, "d_output", d_output)
    dtype = _checks.pooled_dtype(adapter, "features", features)
    _checks.same_dtype("d_output", d_output.dtype, "features", dtype)
    rois = _own_rois(adapter, rois, d_output)
    _check_box_out(adapter, rois, out)
    given = spatial_scale, sampling_ratio, convention, reduction, layout
    scales, rule = _rule_of(adapter, *given)
    _checks.has_box_gradient(reduction)
    names, maps = ("features",), (features,)
    return _box_gradient(adapter, d_output, names, maps, rois, None, scales, rule, layout, out)


def _check_box_out(adapter: Adapter, rois: Any, out: Any) -> None:
    if out is not None:
        if isinstance(rois, list):
            raise TypeError("`out` must be None where `rois` is a list, got an array")
        boxes, *_ = _rois.arrays(rois)
        adapter.check_out("out", out, _rois.gradient_dtype(adapter, boxes.dtype))


def _box_gradient(
    adapter: Adapter,
    d_output: Any,
    names: tuple[str, ...],
    maps: tuple[Any, ...],
    rois: Any,
    levels: Any,
    scales: tuple[float, ...],
    rule: tuple[float, ...],
    layout: str,
    out: Any,
    numbers: int = 4,
) -> Any:
    """The values that all box gradients check alike, and the call."""
    shapes = [_checks.map_shape(name, array.shape, layout) for name, array in zip(names, maps)]
    parsed, counts = _parsed(adapter, names, shapes, rois, levels, scales, layout, numbers)
    _checks.d_output(d_output.shape, counts, shapes[0][1], layout)
    if out is not None:
        boxes, *_ = given = _rois.arrays(rois, levels)
        adapter.check_out_values("out", out, tuple(boxes.shape), [d_output, *maps, *given])
    maps = _moved(adapter, _layout.channels_first, maps, layout)
    flat = _flat(adapter, d_output, layout)
    d_boxes = adapter.box_gradient(flat, maps, parsed, scales, rule, layout=layout)
    d_rois = _rois.like_given(adapter, rois, d_boxes)
    if out is None:
        return d_rois
    out[...] = d_rois
    return out


def roi_align_rotated(
    features: Array,
    rois: Any,
    output_size: int | Sequence[int],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    angle: str = "degrees",
    clockwise: bool = False,
    layout: str = "NCHW",
    out: Array | None = None,
) -> Array:
    """RoIAlign of boxes that are turned about their centre: docs/spec.md, equation 10.

    On the CPU; docs/gpu.md says what GPUs have of it (else NotImplementedError).

    Args:
        features: as in :func:`roi_align`.
        rois: a box is (x, y, width, height, angle), its centre and sides in image pixels. An array
            (K, 6) with the image index first; a tuple of boxes (K, 5) and an image index (K,); or a
            list with an array (K_i, 5) for each image. Any angle is legal.
        output_size: as in :func:`roi_align`. Rows and columns of bins follow the box: at angle 0
            they are those of the box that is not turned.
        spatial_scale: one number.
        sampling_ratio, layout, out: as in :func:`roi_align`.
        convention: "half_pixel" (detectron2, mmcv with aligned=True, OpenVINO), "asymmetric" (mmcv
            with aligned=False), or any that adds nothing to the ends of a box in image pixels. The
            ``pixel_offset`` moves the centre, and a box grows to ``min_size`` about it.
        angle: the unit, "degrees" (detectron2) or "radians" (mmcv, OpenVINO).
        clockwise: how boxes turn on the screen, where y points down.

    Returns:
        As :func:`roi_align`: means over the samples of each bin.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roi_align`.

    The gradient in the features is :func:`roi_align_rotated_adjoint`, the gradient in the boxes
    :func:`roi_align_rotated_box_gradient`.

    >>> import numpy as np, roialign
    >>> ramp = np.tile(np.arange(8, dtype=np.float32), (1, 1, 8, 1))  # f(y, x) = x
    >>> rois = np.array([[0, 4, 4, 4, 2, 0], [0, 4, 4, 4, 2, 90]], np.float32)
    >>> roialign.roi_align_rotated(ramp, rois, (1, 2)).round(4)
    array([[[[2.5, 4.5]]],
    <BLANKLINE>
    <BLANKLINE>
           [[[3.5, 3.5]]]], dtype=float32)
    """
    given = spatial_scale, sampling_ratio, convention, angle, clockwise, layout
    adapter = _adapter("features", features, rois)
    features = own(adapter, features)
    dtype = _checks.pooled_dtype(adapter, "features", features)
    rois = _own_rois(adapter, rois, features)
    bins = _checks.integers("output_size", output_size)
    if out is not None:
        adapter.check_out("out", out, dtype)
    scales, rule = _rotated_rule_of(*given)
    bins = _checks.bins("output_size", bins)
    return _forward(
        adapter, ("features",), (features,), rois, None, bins, scales, rule, layout, out, 5
    )


def roi_align_rotated_adjoint(
    d_output: Array,
    rois: Any,
    feature_shape: Sequence[int],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    angle: str = "degrees",
    clockwise: bool = False,
    layout: str = "NCHW",
    out: Array | None = None,
) -> Array:
    """The adjoint of :func:`roi_align_rotated`: its gradient in the features.

    Args:
        d_output, feature_shape: as in :func:`roi_align_adjoint`.
        rois, spatial_scale, sampling_ratio, convention, angle, clockwise, layout: as in
            :func:`roi_align_rotated`.
        out: as in :func:`roi_align_adjoint`.

    Returns, Raises: as :func:`roi_align_adjoint`.

    >>> import numpy as np, roialign
    >>> d_output = np.ones((1, 1, 1, 1), np.float32)
    >>> rois = np.array([[0, 1, 1, 1, 1, 45]], np.float32)
    >>> roialign.roi_align_rotated_adjoint(d_output, rois, (1, 1, 2, 2))
    array([[[[0.25, 0.25],
             [0.25, 0.25]]]], dtype=float32)
    """
    given = spatial_scale, sampling_ratio, convention, angle, clockwise, layout
    adapter = _adapter("d_output", d_output, rois)
    d_output = own(adapter, d_output)
    _checks.features(adapter, "d_output", d_output)
    rois = _own_rois(adapter, rois, d_output)
    _checks.sequence("feature_shape", "(N, C, H, W)", feature_shape)
    names = {"feature_shape": _checks.integers("feature_shape", feature_shape)}
    if out is not None:
        adapter.check_out("out", out, d_output.dtype)
    scales, rule = _rotated_rule_of(*given)
    outs = {} if out is None else {"out": out}
    (d_features,) = _adjoint(
        adapter, d_output, rois, names, None, scales, rule, layout, outs, numbers=5
    )
    return d_features


def roi_align_rotated_box_gradient(
    d_output: Array,
    features: Array,
    rois: Boxes | tuple[Boxes, Any],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    angle: str = "degrees",
    clockwise: bool = False,
    layout: str = "NCHW",
    out: Any = None,
) -> Boxes:
    """The gradient of ``(roi_align_rotated(...) * d_output).sum()`` in the boxes.

    It has five numbers for each box, in the order of the box: in the centre and the sides per image
    pixel, in the angle per its unit. What counts as constant is as in
    :func:`roi_align_box_gradient`. A side that ``min_size`` decides has gradient 0.

    Args:
        d_output, features: as in :func:`roi_align_box_gradient`.
        rois, spatial_scale, sampling_ratio, convention, angle, clockwise, layout: as in
            :func:`roi_align_rotated`.
        out: as in :func:`roi_align_box_gradient`.

    Returns, Raises: as :func:`roi_align_box_gradient`, in the form of ``rois``.

    >>> import numpy as np, roialign
    >>> ramp = np.tile(np.arange(8, dtype=np.float32), (1, 1, 8, 1))  # f(y, x) = x
    >>> d_output = np.array([[[[0, 1]]]], np.float32)  # of the right half
    >>> rois = np.array([[0, 4, 4, 4, 2, 0]], np.float32)
    >>> roialign.roi_align_rotated_box_gradient(d_output, ramp, rois, angle="radians")
    array([[0.  , 1.  , 0.  , 0.25, 0.  , 0.  ]], dtype=float32)
    """
    given = spatial_scale, sampling_ratio, convention, angle, clockwise, layout
    adapter = _adapter("d_output", d_output, features, rois)
    d_output, features = own(adapter, (d_output, features))
    _checks.features(adapter, "d_output", d_output)
    dtype = _checks.pooled_dtype(adapter, "features", features)
    _checks.same_dtype("d_output", d_output.dtype, "features", dtype)
    rois = _own_rois(adapter, rois, d_output)
    _check_box_out(adapter, rois, out)
    scales, rule = _rotated_rule_of(*given)
    return _box_gradient(
        adapter, d_output, ("features",), (features,), rois, None, scales, rule, layout, out, 5
    )


def multiscale_roi_align(
    feature_maps: Sequence[Array] | Mapping[Any, Array],
    rois: Any,
    output_size: int | Sequence[int],
    *,
    spatial_scales: Sequence[Scale],
    levels: Any = None,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    layout: str = "NCHW",
    out: Array | None = None,
) -> Array:
    """:func:`roi_align` from several maps, such as a feature pyramid: each RoI from one of them.

    It is one pass over all maps. The results are in the order of the RoIs.

    Args:
        feature_maps: a tuple, a list or a dict of maps (N, C, H, W), from fine to coarse, of one
            dtype, with the same images and channels.
        rois, output_size: as in :func:`roi_align`.
        spatial_scales: for each map its feature pixels per image pixel, or a pair
            (scale_y, scale_x).
        levels: which map each RoI is pooled from, integers (K,), or (N, M) for boxes (N, M, 4): 0
            is the first map, -1 means no map. None: with one map all are 0; with several they are
            those of :func:`assign_levels` for the scales, which must be powers of 2, each half of
            the one before.
        sampling_ratio, convention, reduction, layout, out: as in :func:`roi_align`.

    Returns:
        As :func:`roi_align`. The result of a RoI whose level is -1 is 0, and so are its gradients.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roi_align`. A level that is not in
            [-1, number of maps) is an error where a bad image index is one.

    The gradient in the maps is :func:`multiscale_roi_align_adjoint`, the gradient in the boxes
    :func:`multiscale_roi_align_box_gradient`.

    >>> import numpy as np, roialign
    >>> fine, coarse = np.ones((1, 1, 64, 64), np.float32), np.full((1, 1, 32, 32), 2, np.float32)
    >>> rois = np.array([[0, 0, 0, 40, 40], [0, 0, 0, 250, 250]], np.float32)
    >>> roialign.multiscale_roi_align((fine, coarse), rois, 1, spatial_scales=(1 / 8, 1 / 16))
    array([[[[1.]]],
    <BLANKLINE>
    <BLANKLINE>
           [[[2.]]]], dtype=float32)
    """
    names, maps = _checks.several("feature_maps", feature_maps, "an array")
    adapter = _adapter(names[0], maps[0], maps, rois, levels)
    maps = own(adapter, maps)
    dtype = _maps_dtype(adapter, names, maps)
    rois = _own_rois(adapter, rois, maps[0])
    levels = _own_levels(adapter, levels, maps[0])
    bins = _checks.integers("output_size", output_size)
    if out is not None:
        adapter.check_out("out", out, dtype)
    given = spatial_scales, sampling_ratio, convention, reduction, layout
    scales, rule = _rule_of(adapter, *given, len(maps))
    bins = _checks.bins("output_size", bins)
    return _forward(adapter, names, maps, rois, levels, bins, scales, rule, layout, out)


def _maps_dtype(adapter: Adapter, names: tuple[str, ...], maps: tuple[Any, ...]) -> Any:
    """Of pooled RoIs. The maps have one dtype."""
    dtypes = [_checks.pooled_dtype(adapter, name, array) for name, array in zip(names, maps)]
    for name, array in zip(names, maps):
        _checks.same_dtype(name, array.dtype, names[0], maps[0].dtype)
    return dtypes[0]


def _own_levels(adapter: Adapter, levels: Any, like: Any) -> Any:
    """Levels whose types have been checked, as an array of the library's own."""
    if levels is not None:
        levels = with_own_index(adapter, levels, like)
        _rois.check_integers(adapter, "levels", levels)
    return levels


def multiscale_roi_align_adjoint(
    d_output: Array,
    rois: Any,
    feature_shapes: Sequence[Sequence[int]] | Mapping[Any, Sequence[int]],
    *,
    spatial_scales: Sequence[Scale],
    levels: Any = None,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    layout: str = "NCHW",
    feature_maps: Sequence[Array] | Mapping[Any, Array] | None = None,
    out: Sequence[Array] | Mapping[Any, Array] | None = None,
) -> Any:
    """The adjoint of :func:`multiscale_roi_align`: the gradients in the maps.

    Args:
        d_output: as in :func:`roi_align_adjoint`.
        rois: as in :func:`roi_align`.
        feature_shapes: a tuple, a list or a dict with the shape (N, C, H, W) of each map.
        spatial_scales, levels: as in :func:`multiscale_roi_align`.
        sampling_ratio, convention, reduction, layout: as in :func:`roi_align`.
        feature_maps: for reductions other than "mean", in the form of ``feature_shapes``: as
            ``features`` in :func:`roi_align_adjoint`.
        out: arrays for the results, in the form of ``feature_shapes``.

    Returns:
        A gradient (N, C, H, W) for each map, in a tuple, list or dict as ``feature_shapes``, in the
        dtype of ``d_output``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`multiscale_roi_align`.

    >>> import numpy as np, roialign
    >>> d_output = np.ones((1, 1, 1, 1), np.float32)
    >>> rois = np.array([[0, 0, 0, 2, 2]], np.float32)
    >>> gradients = roialign.multiscale_roi_align_adjoint(
    ...     d_output,
    ...     rois,
    ...     {"p2": (1, 1, 2, 2), "p3": (1, 1, 1, 1)},
    ...     spatial_scales=(1 / 4, 1 / 8),
    ... )
    >>> gradients["p2"]
    array([[[[1., 0.],
             [0., 0.]]]], dtype=float32)
    """
    names, given = _checks.several("feature_shapes", feature_shapes, "a shape")
    adapter = _adapter("d_output", d_output, rois, levels, feature_maps)
    d_output = own(adapter, d_output)
    _checks.features(adapter, "d_output", d_output)
    rois = _own_rois(adapter, rois, d_output)
    levels = _own_levels(adapter, levels, d_output)
    for name, shape in zip(names, given):
        _checks.sequence(name, "(N, C, H, W)", shape)
    shapes = {name: _checks.integers(name, shape) for name, shape in zip(names, given)}
    map_names: tuple[str, ...] = ()
    maps: tuple[Any, ...] | None = None
    if feature_maps is not None:
        map_names, maps = _checks.several("feature_maps", feature_maps, "an array")
        maps = own(adapter, maps)
        for name, array in zip(map_names, maps):
            _checks.features(adapter, name, array, f"{_checks.FLOATS} to have a gradient")
            _checks.same_dtype(name, array.dtype, "d_output", d_output.dtype)
    outs = {}
    if out is not None:
        outs = dict(zip(*_checks.several("out", out, "an array")))
        for name, array in outs.items():
            adapter.check_out(name, array, d_output.dtype)
    options = spatial_scales, sampling_ratio, convention, reduction, layout
    scales, rule = _rule_of(adapter, *options, len(names))
    if out is not None:
        _checks.alike("out", out, "feature_shapes", feature_shapes)
    selectors = _selectors("feature_maps", maps, reduction)
    if maps is not None:
        _checks.alike("feature_maps", feature_maps, "feature_shapes", feature_shapes)
        for name, array, shape in zip(map_names, maps, shapes.values()):
            if array.shape != shape:
                _checks.refuse_shape(name, str(shape), array.shape)
    results = _adjoint(
        adapter, d_output, rois, shapes, levels, scales, rule, layout, outs, selectors
    )
    if out is not None:
        return out
    if isinstance(feature_shapes, Mapping):
        return dict(zip(feature_shapes, results))
    return list(results) if isinstance(feature_shapes, list) else results


def multiscale_roi_align_box_gradient(
    d_output: Array,
    feature_maps: Sequence[Array] | Mapping[Any, Array],
    rois: Boxes | tuple[Boxes, Any],
    *,
    spatial_scales: Sequence[Scale],
    levels: Any = None,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    layout: str = "NCHW",
    out: Any = None,
) -> Boxes:
    """The gradient of ``(multiscale_roi_align(...) * d_output).sum()`` in the boxes.

    Levels count as constant.

    Args:
        d_output: as in :func:`roi_align_box_gradient`.
        feature_maps, rois, spatial_scales, levels: as in :func:`multiscale_roi_align`.
        sampling_ratio, convention, reduction, layout: as in :func:`roi_align`.
        out: as in :func:`roi_align_box_gradient`.

    Returns:
        As :func:`roi_align_box_gradient`.

    Raises:
        TypeError, ValueError, IndexError: as :func:`multiscale_roi_align`.

    >>> import numpy as np, roialign
    >>> ramp = np.tile(np.arange(8, dtype=np.float32), (1, 1, 8, 1))  # f(y, x) = x
    >>> roialign.multiscale_roi_align_box_gradient(
    ...     np.ones((1, 1, 1, 1), np.float32),
    ...     [ramp, ramp[..., ::2, ::2]],
    ...     np.array([[0, 2, 2, 5, 5]], np.float32),
    ...     spatial_scales=[1, 1 / 2],
    ...     sampling_ratio=2,
    ... )
    array([[0. , 0.5, 0. , 0.5, 0. ]], dtype=float32)
    """
    names, maps = _checks.several("feature_maps", feature_maps, "an array")
    adapter = _adapter("d_output", d_output, maps, rois, levels)
    d_output, maps = own(adapter, (d_output, maps))
    _checks.features(adapter, "d_output", d_output)
    dtype = _maps_dtype(adapter, names, maps)
    _checks.same_dtype("d_output", d_output.dtype, names[0], dtype)
    rois = _own_rois(adapter, rois, d_output)
    levels = _own_levels(adapter, levels, d_output)
    _check_box_out(adapter, rois, out)
    given = spatial_scales, sampling_ratio, convention, reduction, layout
    scales, rule = _rule_of(adapter, *given, len(maps))
    _checks.has_box_gradient(reduction)
    return _box_gradient(adapter, d_output, names, maps, rois, levels, scales, rule, layout, out)


def assign_levels(
    rois: Any,
    level_range: Sequence[int],
    *,
    rule: str = "torchvision",
    canonical_size: float = 224,
    canonical_level: int = 4,
) -> Any:
    """Which map of a feature pyramid each RoI belongs to, by its size: the rules of FPN.

    A box whose area is the square of ``canonical_size`` has the ``canonical_level``, a box with
    half its sides the level below. docs/spec.md has the rules to the last bit.

    Args:
        rois: as in :func:`roi_align`.
        level_range: the levels (finest, coarsest) of the maps, as FPN counts them: (2, 5) for P2 to
            P5. Smaller boxes have the finest level, larger ones the coarsest.
        rule: "torchvision" (MultiScaleRoIAlign), "detectron2" (ROIPooler) or "mmdet"
            (SingleRoIExtractor): they differ by a few last bits next to the borders. mmdet's own
            numbers are ``level_range=(0, 3), canonical_size=56, canonical_level=0``.
        canonical_size: in image pixels, > 0.
        canonical_level: an int.

    Returns:
        Integers (K,), or (N, M) for boxes (N, M, 4), of the RoIs' library: 0 is the finest map. It
        is -1 where the area is negative or NaN: such a box has no map.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, number or name is wrong.

    >>> import numpy as np, roialign
    >>> boxes = np.array([[0, 0, 50, 50], [0, 0, 224, 224], [0, 0, 900, 900]], np.float32)
    >>> roialign.assign_levels([boxes], (2, 5))
    array([0, 2, 3])
    """
    arrays = _rois.arrays(rois)
    first = arrays[0] if arrays else None
    adapter = _adapter("rois", first, rois)
    rois = _own_rois(adapter, rois, first)
    setting = _levels.setting
    if IN_GRAPH:  # @jit.cond: True
        setting = graph_adapter().level_setting
    arguments = setting(level_range, rule, canonical_size, canonical_level)
    images = len(rois) if isinstance(rois, (tuple, list)) else (rois.shape[0] if rois.ndim else 0)
    boxes, _ = _rois.boxes_and_index(adapter, rois, images)
    found = _levels.assign(adapter, boxes, *arguments)
    return found.reshape(_rois.counts(rois, boxes))


class ROIAlign:
    """MindSpore's RoIAlign operator, on the arrays of any supported library.

    It has the signature, defaults, errors and numbers of ``mindspore.ops.ROIAlign``.
    docs/mindspore.md lists what differs.

    Args:
        pooled_height: height of the output in bins, an int >= 1.
        pooled_width: width of the output in bins, an int >= 1.
        spatial_scale: feature pixels per image pixel, a float > 0.
        sample_num: samples per bin and axis, an int <= 4096; <= 0 adapts their number to the box.
        roi_end_mode: 1: the last pixel of a box is inside it (the convention "mindspore"). 0: it is
            not, and a box is at least one feature pixel wide and high ("mindspore_legacy").

    Raises:
        TypeError: a size, ``sample_num`` or ``roi_end_mode`` is not an int, or ``spatial_scale``
            not a float.
        ValueError: a size is < 1, the scale is not finite or not > 0, ``sample_num`` is > 4096, or
            ``roi_end_mode`` is neither 0 nor 1.

    Called with ``features`` (N, C, H, W) and ``rois`` (K, 5), whose rows are
    ``(image_index, x1, y1, x2, y2)`` in image pixels, it gives (K, C, pooled_height, pooled_width)
    in the features' dtype. The call raises TypeError, ValueError and IndexError as
    :func:`roi_align`. It takes no lists, no tuples and no integer rois. Its gradients are
    :func:`roi_align_adjoint` and :func:`roi_align_box_gradient` in the same convention.

    >>> import numpy as np, roialign
    >>> features = np.array([[[[1, 2], [3, 4]]]], np.float32)
    >>> rois = np.array([[0, 0.2, 0.3, 0.2, 0.3]], np.float32)
    >>> roialign.ROIAlign(2, 2, 0.5, 2)(features, rois).round(3)
    array([[[[1.775, 2.025],
             [2.275, 2.525]]]], dtype=float32)
    """

    __ms_class__ = True  # MindSpore's compiler may read it

    def __init__(
        self,
        pooled_height: int,
        pooled_width: int,
        spatial_scale: float,
        sample_num: int = 2,
        roi_end_mode: int = 1,
    ) -> None:
        _checks.exactly("pooled_height", pooled_height, int)
        _checks.exactly("pooled_width", pooled_width, int)
        _checks.exactly("spatial_scale", spatial_scale, float)
        _checks.exactly("sample_num", sample_num, int)
        _checks.exactly("roi_end_mode", roi_end_mode, int)
        _checks.bin_count("pooled_height", pooled_height)
        _checks.bin_count("pooled_width", pooled_width)
        _checks.bins("(pooled_height, pooled_width)", (pooled_height, pooled_width))
        _checks.scales("spatial_scale", (spatial_scale,) * 2)
        _checks.samples("sample_num", sample_num)
        if roi_end_mode not in (0, 1):
            raise ValueError(f"`roi_end_mode` must be 0 or 1, got {_checks.shown(roi_end_mode)}")
        self.pooled_height = pooled_height
        self.pooled_width = pooled_width
        self.spatial_scale = spatial_scale
        self.sample_num = sample_num
        self.roi_end_mode = roi_end_mode

    def __prepare_scriptable__(self) -> NoReturn:
        _checks.refuse_script("roialign.ROIAlign")

    def __call__(self, features: Array, rois: Any) -> Array:
        adapter = _adapter("features", features, rois)
        name = "mindspore" if self.roi_end_mode else "mindspore_legacy"
        bins = self.pooled_height, self.pooled_width
        rows = adapter.takes_rows(features, rois)
        if not rows:
            features, rois = own(adapter, (features, rois))
            _checks.features(adapter, "features", features)
            adapter.check_array("rois", rois)
            _rois.check(adapter, rois, integers=False)
        given = float(self.spatial_scale), int(self.sample_num), name, "mean", "NCHW"
        scales, rule = _rule_of(adapter, *given)
        if rows:
            return adapter.forward_rows(features, rois, bins, scales, rule, None)
        if rois.ndim != 2:
            _checks.refuse_shape("rois", "(K, 5)", rois.shape)
        names, maps = ("features",), (features,)
        return _forward(adapter, names, maps, rois, None, bins, scales, rule, "NCHW", None)

    def __repr__(self) -> str:
        return (
            f"ROIAlign(pooled_height={self.pooled_height}, pooled_width={self.pooled_width}, "
            f"spatial_scale={self.spatial_scale}, sample_num={self.sample_num}, "
            f"roi_end_mode={self.roi_end_mode})"
        )


for _name in __all__:  # what torch.jit.script asks of them
    if _name != "ROIAlign":
        globals()[_name].__prepare_scriptable__ = functools.partial(
            _checks.refuse_script, f"roialign.{_name}"
        )
