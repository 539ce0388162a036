"""The public functions: checks, then the adapter of the arrays that came."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from roialign import _checks, _rois
from roialign._adapter import Adapter, adapter_of
from roialign._rule import Convention
from roialign._threads import get_num_threads, set_num_threads

__all__ = [
    "ROIAlign",
    "get_num_threads",
    "roi_align",
    "roi_align_adjoint",
    "roi_align_box_gradient",
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

# MindSpore's compiler reads the source of what runs in a graph, and does not know all of Python. It
# takes the comment beside this condition for its value, and reads only that branch.
_IN_GRAPH = False


def _adapter(name: str, array: object) -> Adapter:
    if _IN_GRAPH:  # @jit.cond: True
        return importlib.import_module("roialign.mindspore")
    return adapter_of(name, array)


_remembered_rule = functools.lru_cache(_checks.rule)


def _rule_of(adapter: Adapter, *given: Any) -> tuple[tuple[float, float], tuple[float, ...]]:
    """`_checks.rule`, remembered for the usual types, which make safe keys.

    Not where torch's compiler reads: it warns of what is remembered.
    """
    usual = not adapter.is_compiling() and tuple(map(type, given)) == (float, int, str, str)
    return _remembered_rule(*given) if usual else _checks.rule(*given)


def roi_align(
    features: Array,
    rois: Any,
    output_size: int | Sequence[int],
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    out: Array | None = None,
) -> Array:
    """Pools every region of interest to a fixed grid by averaging bilinear samples.

    No coordinate is rounded. docs/spec.md defines the operator; it comes from Mask R-CNN
    (arXiv:1703.06870). It takes arrays of NumPy, PyTorch, JAX, MindSpore or CuPy, all of one
    library, and gives an array of that library on the same device. With PyTorch, JAX and MindSpore
    it has derivatives (docs/pytorch.md, docs/jax.md, docs/mindspore.md). For GPUs see docs/gpu.md.

    Args:
        features: (N, C, H, W), float16, bfloat16, float32 or float64, any strides; with NumPy,
            PyTorch and CuPy also uint8 or bool, which have no gradient.
        rois: an array (K, 5) of rows ``(image_index, x1, y1, x2, y2)``; or a tuple
            ``(boxes (K, 4), image_index (K,))`` with an integer index; or a list of N arrays
            (K_i, 4). Boxes are in image pixels, of any float or integer dtype, read as float32
            (float64 if the features are float64).
        output_size: bins (P, Q), or an int for both.
        spatial_scale: feature pixels per image pixel, or a pair (scale_y, scale_x).
        sampling_ratio: samples per bin and axis, at most 4096; <= 0 adapts their number to the box.
        convention: the coordinate convention: a name or an alias in :data:`roialign.conventions`,
            or a :class:`Convention`.
        reduction: "mean".
        out: an array for the result, of its shape and dtype. It must be writeable and overlap no
            input. JAX and MindSpore do not take it, nor PyTorch where a gradient is needed.

    Returns:
        (K, C, P, Q) in the features' dtype, float32 for uint8 and bool. Sums are float32 (float64
        for float64 features) and are rounded once. If the features are channels_last in memory, so
        is the result.

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
    adapter = _adapter("features", features)
    if _IN_GRAPH:  # @jit.cond: True
        given = spatial_scale, sampling_ratio, convention, reduction
        return adapter.roi_align_in_graph(features, rois, output_size, given, out)
    rows = adapter.takes_rows(features, rois)
    dtype = features.dtype if rows else _checks.pooled_dtype(adapter, features)
    if not rows:
        _rois.check(adapter, rois)
    bins = _checks.integers("output_size", output_size)
    if out is not None:
        adapter.check_out("out", out, dtype)
    scales, rule = _rule_of(adapter, spatial_scale, sampling_ratio, convention, reduction)
    bins = _checks.bins("output_size", bins)
    return _forward(adapter, features, rois, rows, bins, scales, rule, out)


def _forward(
    adapter: Adapter,
    features: Any,
    rois: Any,
    rows: bool,
    bins: tuple[int, int],
    scales: tuple[float, float],
    rule: tuple[float, ...],
    out: Any,
) -> Any:
    """The values that `roi_align` and `ROIAlign` check alike, and the call."""
    if not rows:
        _checks.shape("features", "(N, C, H, W)", features.shape, features.ndim == 4)
        parsed = _rois.parse(adapter, rois, features.shape[0])
        count = parsed.boxes.shape[0]
        _checks.pixels("features", features.shape, count)
        _checks.size("output", (count, features.shape[1], *bins))
    if out is not None:
        count = (rois if rows else parsed.boxes).shape[0]
        inputs = [features, *_rois.arrays(rois)]
        adapter.check_out_values("out", out, (count, features.shape[1], *bins), inputs)
    if rows:
        return adapter.forward_rows(features, rois, bins, scales, rule, out)
    return adapter.forward((features,), parsed, bins, scales, rule, out=out)


def roi_align_adjoint(
    d_output: Array,
    rois: Any,
    feature_shape: Sequence[int],
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    features: Array | None = None,
    out: Array | None = None,
) -> Array:
    """The adjoint of :func:`roi_align`: from a gradient in the output, the one in the features.

    For all ``features`` and ``d_output``, up to rounding::

        d_features = roi_align_adjoint(d_output, ...)
        (roi_align(features, ...) * d_output).sum() == (features * d_features).sum()

    Deterministic: the same bits for any number of threads.

    Args:
        d_output: (K, C, P, Q), float16, bfloat16, float32 or float64, any strides.
        rois: as in :func:`roi_align`, in image pixels; read as float64 if ``d_output`` is float64.
        feature_shape: (N, C, H, W) of the features.
        spatial_scale, sampling_ratio, convention, reduction: as in :func:`roi_align`.
        features: for reductions other than "mean". "mean" checks its shape and dtype and does not
            read it. Those of uint8 and bool have no gradient: a TypeError.
        out: an array for the result, as in :func:`roi_align`.

    Returns:
        (N, C, H, W) in the dtype of ``d_output``. Sums are float32 (float64 for float64
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
    adapter = _adapter("d_output", d_output)
    if _IN_GRAPH:  # @jit.cond: True
        given = spatial_scale, sampling_ratio, convention, reduction
        return adapter.roi_align_adjoint_in_graph(
            d_output, rois, feature_shape, given, features, out
        )
    _checks.features(adapter, "d_output", d_output)
    if features is not None:
        _checks.features(adapter, "features", features, f"{_checks.FLOATS} to have a gradient")
        _checks.same_dtype("features", features.dtype, "d_output", d_output.dtype)
    _rois.check(adapter, rois)
    _checks.sequence("feature_shape", "(N, C, H, W)", feature_shape)
    shape = _checks.integers("feature_shape", feature_shape)
    if out is not None:
        adapter.check_out("out", out, d_output.dtype)

    scales, rule = _rule_of(adapter, spatial_scale, sampling_ratio, convention, reduction)
    _checks.feature_shape(shape)
    parsed = _rois.parse(adapter, rois, shape[0])
    _checks.d_output(d_output.shape, parsed.boxes.shape[0], shape[1])
    _checks.pixels("feature_shape", shape, parsed.boxes.shape[0])
    if features is not None:
        _checks.shape("features", str(shape), features.shape, features.shape == shape)
    outs = None
    if out is not None:
        adapter.check_out_values("out", out, shape, [d_output, *_rois.arrays(rois)])
        outs = (out,)
    (d_features,) = adapter.adjoint(d_output, parsed, (shape,), scales, rule, out=outs)
    return d_features


def roi_align_box_gradient(
    d_output: Array,
    features: Array,
    rois: Boxes | tuple[Boxes, Any],
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    reduction: str = "mean",
    out: Any = None,
) -> Boxes:
    """The gradient of ``(roi_align(features, rois, ...) * d_output).sum()`` in the boxes.

    This is the exact derivative of the bilinear samples as the box moves (docs/spec.md, equations 6
    and 7). The number of samples counts as constant. At an integer position it is the derivative to
    the right. The jumps where samples leave the map add nothing. Where ``min_size`` decides the
    size of a box, the whole derivative goes to the start of the box. A box that is not finite has
    gradient 0.

    Args:
        d_output: (K, C, P, Q), of the features' dtype, float32 for uint8 and bool.
        features: as in :func:`roi_align`.
        rois, spatial_scale, sampling_ratio, convention, reduction: as in :func:`roi_align`.
        out: an array for the result, as in :func:`roi_align`. Not if ``rois`` is a list.

    Returns:
        The gradient per image pixel, in the boxes' dtype (float32 for integer boxes) and in the
        form of ``rois``: (K, 5) with zeros in column 0, (K, 4) for a tuple, a list of (K_i, 4) for
        a list.

    Raises:
        TypeError, ValueError, IndexError: as :func:`roi_align`.

    >>> import numpy as np, roialign
    >>> ramp = np.tile(np.arange(8, dtype=np.float32), (1, 1, 8, 1))  # f(y, x) = x
    >>> rois = np.array([[0, 2, 2, 5, 5]], np.float32)
    >>> d_output = np.ones((1, 1, 1, 1), np.float32)
    >>> roialign.roi_align_box_gradient(d_output, ramp, rois, sampling_ratio=2)
    array([[0. , 0.5, 0. , 0.5, 0. ]], dtype=float32)
    """
    adapter = _adapter("d_output", d_output)
    if _IN_GRAPH:  # @jit.cond: True
        given = spatial_scale, sampling_ratio, convention, reduction
        return adapter.roi_align_box_gradient_in_graph(d_output, features, rois, given, out)
    _checks.features(adapter, "d_output", d_output)
    dtype = _checks.pooled_dtype(adapter, features)
    _checks.same_dtype("d_output", d_output.dtype, "features", dtype)
    _rois.check(adapter, rois)
    if out is not None:
        if isinstance(rois, list):
            raise TypeError("`out` must be None where `rois` is a list, got an array")
        boxes, *_ = _rois.arrays(rois)
        adapter.check_out("out", out, _rois.gradient_dtype(adapter, boxes.dtype))

    scales, rule = _rule_of(adapter, spatial_scale, sampling_ratio, convention, reduction)
    _checks.shape("features", "(N, C, H, W)", features.shape, features.ndim == 4)
    parsed = _rois.parse(adapter, rois, features.shape[0])
    count = parsed.boxes.shape[0]
    _checks.d_output(d_output.shape, count, features.shape[1])
    _checks.pixels("features", features.shape, count)
    if out is not None:
        inputs = [d_output, features, *_rois.arrays(rois)]
        adapter.check_out_values("out", out, (count, 4 if isinstance(rois, tuple) else 5), inputs)
    d_boxes = adapter.box_gradient(d_output, (features,), parsed, scales, rule)
    d_rois = _rois.like_given(adapter, rois, d_boxes)
    if out is None:
        return d_rois
    out[...] = d_rois
    return out


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

    def __call__(self, features: Array, rois: Any) -> Array:
        adapter = _adapter("features", features)
        name = "mindspore" if self.roi_end_mode else "mindspore_legacy"
        bins = self.pooled_height, self.pooled_width
        if _IN_GRAPH:  # @jit.cond: True
            given = self.spatial_scale, self.sample_num, name, "mean"
            return adapter.layer_in_graph(features, rois, bins, given)
        rows = adapter.takes_rows(features, rois)
        if not rows:
            _checks.features(adapter, "features", features)
            adapter.check_array("rois", rois)
            _rois.check(adapter, rois, integers=False)
        given = float(self.spatial_scale), int(self.sample_num), name, "mean"
        scales, rule = _rule_of(adapter, *given)
        return _forward(adapter, features, rois, rows, bins, scales, rule, None)

    def __repr__(self) -> str:
        return (
            f"ROIAlign(pooled_height={self.pooled_height}, pooled_width={self.pooled_width}, "
            f"spatial_scale={self.spatial_scale}, sample_num={self.sample_num}, "
            f"roi_end_mode={self.roi_end_mode})"
        )
