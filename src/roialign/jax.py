"""The JAX adapter: which arrays are accepted, one primitive, its derivatives, transforms and sharding.

In reading order: checks; the operations on the core, a custom call of XLA on the CPU; in Triton, on GPUs;
in plain JAX, for all else; the cut over devices; the primitive; the operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

if jax.__version_info__ < (0, 4, 38):
    raise ImportError(f"roialign.jax needs jax >= 0.4.38, got {jax.__version__}")

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from roialign import _checks, _core, _threads
from roialign._conventions import Rule

try:
    from jax import ffi
except ImportError:  # jax < 0.5
    from jax.extend import ffi

_FLOATS = frozenset(map(np.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)))


# Types


def are_ordinary(features: object, rois: object) -> bool:
    """No call has fewer checks here: under `jit` they cost nothing."""
    return False


def check_array(name: str, value: object) -> None:
    if not isinstance(value, Array):
        raise TypeError(f"`{name}` must be a jax.Array, got {_checks.type_name(value)}")
    if not isinstance(value, jax.core.Tracer) and value.is_deleted():
        raise TypeError(f"`{name}` must be in memory, got an array that was deleted or donated")


def check_features(name: str, value: object) -> None:
    check_array(name, value)
    _checks.features_dtype(name, value.dtype, value.dtype in _FLOATS)


def _is_integer(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "iu"


def _check_boxes(name: str, value: object, integers: bool) -> None:
    check_array(name, value)
    ok = value.dtype in _FLOATS or (integers and _is_integer(value.dtype))
    _checks.boxes_dtype(name, value.dtype, ok, integers)


def _check_index(name: str, value: Array) -> None:
    _checks.index_dtype(name, value.dtype, _is_integer(value.dtype))


def check_rois(rois: object, integers: bool = True) -> None:
    _checks.rois(
        rois, check_array, lambda name, value: _check_boxes(name, value, integers), _check_index
    )


def check_out(name: str, out: object, dtype: np.dtype) -> None:
    raise TypeError(
        f"`{name}` must be None: arrays of JAX are not written to, got {_checks.type_name(out)}"
    )


# Values


class Rois(NamedTuple):
    """The three forms as one: boxes (K, 4) and an image index (K,)."""

    boxes: Array
    image_index: Array
    given: object

    def like_given(self, d_boxes: Array) -> Any:
        """A gradient (K, 4) in the form and dtype in which the rois came."""
        if isinstance(self.given, list):
            ends = np.cumsum([len(boxes) for boxes in self.given])[:-1]
            pieces = jnp.split(d_boxes, ends) if self.given else []
            return [p.astype(gradient_dtype(b.dtype)) for p, b in zip(pieces, self.given)]
        if isinstance(self.given, tuple):
            return d_boxes.astype(gradient_dtype(self.boxes.dtype))
        return jnp.pad(d_boxes.astype(gradient_dtype(self.given.dtype)), ((0, 0), (1, 0)))


def gradient_dtype(dtype: np.dtype) -> np.dtype:
    """Of a gradient in boxes of ``dtype``: float32 for integers."""
    return dtype if dtype in _FLOATS else np.dtype(np.float32)


def parse_rois(rois: Any, images: int) -> Rois:
    _checks.roi_shapes(rois, images)
    if isinstance(rois, tuple):
        return Rois(*rois, rois)
    if isinstance(rois, list):
        index = np.repeat(np.arange(images, dtype=np.int32), [len(boxes) for boxes in rois])
        # Boxes of different dtypes meet in the widest float that JAX has been allowed.
        dtypes = {boxes.dtype for boxes in rois}
        pieces = rois if len(dtypes) == 1 else [boxes.astype(float) for boxes in rois]
        boxes = jnp.concatenate(pieces) if pieces else jnp.zeros((0, 4), jnp.float32)
        return Rois(boxes, jnp.asarray(index), rois)
    if isinstance(rois, jax.core.Tracer):
        return Rois(rois[:, 1:], rois[:, 0], rois)
    with jax.ensure_compile_time_eval():  # the index has values, in a traced function too
        return Rois(rois[:, 1:], rois[:, 0], rois)


def _check_images(index: Array, images: int) -> None:
    """Raises where an index is bad, if its values are at hand: not traced, and on the CPU."""
    if isinstance(index, jax.core.Tracer) or not index.is_fully_addressable:
        return
    if any(device.platform != "cpu" for device in index.devices()):
        return
    values = np.asarray(index)
    whole = values.astype(np.int64 if _is_integer(index.dtype) else np.float64)
    bad = ~((whole >= 0) & (whole < images) & (whole == np.floor(whole)))
    if bad.any():
        roi = int(bad.argmax())
        raise IndexError(
            f"`image_index` of RoI {roi} must be an integer in [0, {images}), got {values[roi]}"
        )


def _int32(index: Array, images: int) -> Array:
    """The image index as the primitive takes it; -1 where it is not an integer in [0, images)."""
    if _is_integer(index.dtype):
        if index.dtype.itemsize < 4 or index.dtype == np.int32:
            return index.astype(np.int32)
    elif index.dtype.itemsize < 4:
        index = index.astype(np.float32)
    images = min(images, 2**31 - 1) if isinstance(images, int) else images
    good = (index >= 0) & (index < images) & (index == jnp.floor(index))
    return jnp.where(good, index, -1).astype(np.int32)


# What the primitive computes. <d_output, forward> is linear in the features, and its derivative along a
# tangent of the boxes in that too: an operation takes all but one of the three, and gives the one. The
# boxes have the coordinate type, the image index is int32. The dimensions of each array by name: RoIs k,
# images n and channels c may be cut over devices.

_DIMENSIONS = {
    "boxes": ("k", "xy"),
    "image_index": ("k",),
    "features": ("n", "c", "h", "w"),
    "d_output": ("k", "c", "p", "q"),
    "tangent": ("k", "xy"),
}
_TAKES = {
    "forward": ("features", "tangent"),  # without the tangent: pooling itself
    "adjoint": ("d_output", "tangent"),
    "box_gradient": ("d_output", "features"),
}
_GIVES = {"forward": "d_output", "adjoint": "features", "box_gradient": "tangent"}


class _Call(NamedTuple):
    """All that is no array."""

    operation: str
    bins: tuple[int, int]  # P, Q
    map_shape: tuple[int, int, int]  # N, H, W
    rule: tuple[float | int | None, ...]  # `Rule.numbers`
    dense: bool = False  # plain JAX on the CPU too

    def result(self, boxes: Any, arrays: Iterable[Any]) -> jax.ShapeDtypeStruct:
        first, *_ = arrays
        images, *pixels = self.map_shape
        if self.operation == "forward":
            return jax.ShapeDtypeStruct((boxes.shape[0], first.shape[1], *self.bins), first.dtype)
        if self.operation == "adjoint":
            return jax.ShapeDtypeStruct((images, first.shape[1], *pixels), first.dtype)
        return jax.ShapeDtypeStruct(boxes.shape, boxes.dtype)


# On the CPU: the core

for _name, _handler in _core.xla_handlers.items():
    ffi.register_ffi_target(f"roialign_{_name}", _handler, platform="cpu")
_core.set_xla_threads(_threads.get_num_threads())


# The attributes of the custom call, in the order of `Rule.numbers`; no `min_size` is -1. Scalars alone can be
# exported by every version.
_NUMBERS = (
    "scale_y", "scale_x", "sampling_ratio", "pixel_offset", "input_offset", "end_offset", "min_size",
    "adaptive_floor",
)  # fmt: skip


def _native(call: _Call, boxes: Array, index: Array, *arrays: Array) -> Array:
    numbers = [np.float64(-1 if number is None else number) for number in call.rule]
    run = ffi.ffi_call(f"roialign_{call.operation}", call.result(boxes, arrays))
    return run(boxes, index, *arrays, **dict(zip(_NUMBERS, numbers)))


# On GPUs: the kernels in Triton


def _triton_call() -> Callable | None:
    """jax-triton's call, for the GPU at hand; None without these."""
    try:
        import jax_triton

        if jax_triton.__version_info__[:2] != (0, 3):  # 0.4 rounds numbers to float32
            return None
        capability = jax_triton.get_compute_capability(0)
    except (ImportError, RuntimeError):
        return None
    return functools.partial(jax_triton.triton_call, compute_capability=capability)


def _kernels(call: _Call, boxes: Array, index: Array, *arrays: Array) -> Array:
    from roialign._triton import launch

    triton_call = _triton_call()

    def run(kernel: Any, grid: tuple, inputs: tuple, outputs: tuple, **constants: Any) -> list:
        shapes = [jax.ShapeDtypeStruct(*new) for new in outputs]
        return triton_call(*inputs, kernel=kernel, grid=grid, out_shape=shapes, **constants)

    result = call.result(boxes, arrays)
    if call.operation == "box_gradient":
        return _pairwise_sum(launch.box_gradient(run, *arrays, boxes, index, call.rule))
    array, tangent = (*arrays, None)[:2]
    operation = getattr(launch, call.operation)
    output = launch.New(result.shape, str(result.dtype))
    return operation(run, array, boxes, index, tangent, call.rule, output)


def _pairwise_sum(parts: Array) -> Array:
    """Over the first axis, in an order that is no compiler's."""
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        rest = parts[half:]
        parts = jnp.concatenate([parts[: len(rest)] + rest, parts[len(rest) : half]])
    return parts[0]


# Elsewhere: products of dense matrices, one RoI after another


def axis_taps(
    lo: Array,
    hi: Array,
    convention: tuple[float, float, float, float | None, bool],
    bins: int,
    sampling_ratio: int,
    size: int,
    scale: float,
) -> tuple[Array, Array]:
    """The rule of coordinates: docs/spec.md, equations (1) to (3) and (6), for one box on one axis.

    The row matrix (P, L) that averages the samples, and its derivatives in ``lo`` and ``hi``
    (2, P, L). Every pixel looks at the few samples that can touch it.
    """
    real, whole = lo.dtype.type, np.int64 if lo.dtype == np.float64 else np.int32
    pixel_offset, input_offset, end_offset, min_size, floor = convention
    scale = real(scale)
    most = 2**31 if real is np.float64 else 2**22  # samples: positions of more need float64

    start = (lo + real(input_offset)) * scale - real(pixel_offset)
    end = (hi + real(input_offset) + real(end_offset)) * scale - real(pixel_offset)
    extent = end - start
    clamped = extent < (-jnp.inf if min_size is None else real(min_size))
    extent = jnp.where(clamped, real(min_size or 0), extent)
    length = extent / real(bins)  # XLA may multiply by 1 / bins: a whole quotient shall be whole
    length = jnp.where(jnp.round(length) * real(bins) == extent, jnp.round(length), length)
    if sampling_ratio > 0:
        wanted, touching = real(sampling_ratio), sampling_ratio
    else:
        wanted, touching = jnp.maximum(jnp.floor(length), 1) if floor else jnp.ceil(length), 8
        wanted = jnp.where(extent > 0, wanted, 0)
    n = jnp.where(jnp.isfinite(extent) & (wanted <= most), wanted, 0)

    k = jnp.arange(bins, dtype=lo.dtype)[:, None, None]  # [P, L, samples]
    pixel = jnp.arange(size, dtype=lo.dtype)[:, None]
    first = start + k * length
    i = jnp.arange(touching, dtype=whole)
    if sampling_ratio <= 0:  # samples are more than half a pixel apart: 4 are within 1 of a pixel
        before = jnp.floor((pixel - 1 - first) / (length / n) - real(0.5)) - 1
        i += jnp.where(n > touching, jnp.clip(before, 0, n - touching), 0).astype(whole)
    along = i.astype(lo.dtype) + real(0.5)
    position = first + (along * length) / n
    inside = (i < n) & (position >= -1) & (position <= size)
    p = jnp.where(inside, jnp.maximum(position, 0), 0)
    lower = jnp.minimum(jnp.floor(p), size - 1)
    fraction = jnp.where(lower < size - 1, p - lower, 0)
    is_lower, is_upper = inside & (lower == pixel), inside & (lower + 1 == pixel)
    one_over_n = 1 / jnp.maximum(n, 1)
    values = jnp.where(is_lower, 1 - fraction, 0) + jnp.where(is_upper, fraction, 0)
    values = values.sum(2) * one_over_n

    moves = (position >= 0) & (lower < size - 1)
    slope = jnp.where(is_upper & moves, 1, 0) - jnp.where(is_lower & moves, 1, 0)
    t = (k + along / jnp.maximum(n, 1)) / real(bins)
    in_lo, in_hi = jnp.where(clamped, 1, 1 - t), jnp.where(clamped, 0, t)
    slopes = jnp.stack([(slope * in_lo).sum(2), (slope * in_hi).sum(2)]) * (scale * one_over_n)
    return values, slopes


_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _dense(call: _Call, boxes: Array, index: Array, *arrays: Array) -> Array:
    result = call.result(boxes, arrays)
    if 0 in (boxes.shape[0], *result.shape):
        return jnp.zeros(result.shape, result.dtype)
    images, *sizes = call.map_shape
    given = dict(zip(_TAKES[call.operation], arrays))
    features = given.pop("features", None)
    scale_y, scale_x, sampling_ratio, *convention = call.rule

    def matrices(box: Array) -> list[tuple[Array, Array]]:
        x1, y1, x2, y2 = box
        axes = zip((y1, x1), (y2, x2), call.bins, sizes, (scale_y, scale_x))
        taps = [
            axis_taps(lo, hi, convention, bins, sampling_ratio, size, scale)
            for lo, hi, bins, size, scale in axes
        ]
        return [(a, jnp.where(jnp.isfinite(box).all(), d, 0)) for a, d in taps]

    def terms(box: Array, roi: Mapping[str, Array]) -> list[tuple[Array, Array]]:
        """The pairs Ay, Ax of the sum over Ay . F . Ax^T."""
        (y, y_slopes), (x, x_slopes) = matrices(box)
        if "tangent" not in roi:
            return [(y, x)]
        x1, y1, x2, y2 = roi["tangent"]
        return [
            (y1 * y_slopes[0] + y2 * y_slopes[1], x),
            (y, x1 * x_slopes[0] + x2 * x_slopes[1]),
        ]

    def image_of(image: Array) -> Array:
        return features[image].astype(boxes.dtype)

    def forward(box: Array, image: Array, roi: Mapping[str, Array]) -> Array:
        map_ = image_of(image)
        return sum(_product("ph,chw,qw->cpq", y, map_, x) for y, x in terms(box, roi))

    def adjoint(box: Array, image: Array, roi: Mapping[str, Array]) -> Array:
        d_output = roi["d_output"].astype(boxes.dtype)
        return sum(_product("ph,cpq,qw->chw", y, d_output, x) for y, x in terms(box, roi))

    def box_gradient(box: Array, image: Array, roi: Mapping[str, Array]) -> Array:
        d_output, map_ = roi["d_output"].astype(boxes.dtype), image_of(image)
        (y, y_slopes), (x, x_slopes) = matrices(box)
        y1, y2 = _product("eph,cpq,chw,qw->e", y_slopes, d_output, map_, x)
        x1, x2 = _product("ph,cpq,chw,eqw->e", y, d_output, map_, x_slopes)
        return jnp.stack([x1, y1, x2, y2])

    body = {"forward": forward, "adjoint": adjoint, "box_gradient": box_gradient}[call.operation]

    def one(roi: tuple) -> tuple[Array, Array]:
        box, image, others = roi
        good = (image >= 0) & (image < images)
        image = jnp.where(good, image, 0)
        return image, jnp.where(good, body(box, image, others), 0)

    rois = boxes, index, given
    if call.operation != "adjoint":
        return lax.map(lambda roi: one(roi)[1].astype(result.dtype), rois)

    def add(d_features: Array, roi: tuple) -> tuple[Array, None]:
        image, d_map = one(roi)
        return d_features.at[image].add(d_map), None

    zeros = _varying(jnp.zeros(result.shape, boxes.dtype), _manual_axes(boxes))
    return lax.scan(add, zeros, rois)[0].astype(result.dtype)


# Over devices: each computes on its part of the images, channels and RoIs, and what the result sums over
# is summed over devices. An image elsewhere is a bad index, so its RoIs add 0.


@functools.cache
def _partitioned(run: Callable, call: _Call, count: int) -> custom_partitioning:
    """`run` on `count` arrays, with the rule by which it is cut."""
    names = ("boxes", "image_index", *_TAKES[call.operation][:count])
    gives = _GIVES[call.operation]

    def infer(mesh: Mesh, arguments: tuple, _result: Any) -> NamedSharding:
        return _sharding(mesh, gives, _cut(mesh, zip(names, arguments)))

    def partition(mesh: Mesh, arguments: tuple, result: Any) -> tuple:
        cut = _cut(mesh, [*zip(names, arguments), (gives, result)])
        if mesh.empty:  # the arrays have no named axes: everything is everywhere
            mesh = Mesh(np.array(sorted(result.sharding.device_set, key=lambda d: d.id)), "all")
        images, *pixels = call.map_shape
        images //= math.prod(mesh.shape[axis] for axis in cut.get("n", ()))
        local = call._replace(map_shape=(images, *pixels))
        summed = [axis for d, axes in cut.items() if d not in _DIMENSIONS[gives] for axis in axes]

        def run_local(boxes: Array, index: Array, *arrays: Array) -> Array:
            if "n" in cut:
                index = index - images * lax.axis_index(cut["n"])
            part = run(local, boxes, index, *arrays)
            return lax.psum(part, tuple(summed)) if summed else part

        shardings = tuple(_sharding(mesh, name, cut) for name in names)
        return mesh, run_local, _sharding(mesh, gives, cut), shardings

    function = custom_partitioning(functools.partial(run, call))
    rule = ", ".join(" ".join(_DIMENSIONS[name]) for name in names)
    options = {"sharding_rule": f"{rule} -> {' '.join(_DIMENSIONS[gives])}"}
    if jax.__version_info__ < (0, 5):
        options = {}
    function.def_partition(partition, infer_sharding_from_operands=infer, **options)
    return function


def _sharding(mesh: Mesh, name: str, cut: Mapping[str, tuple]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[cut.get(d) for d in _DIMENSIONS[name]]))


def _cut(mesh: Mesh, arrays: Iterable[tuple[str, Any]]) -> dict[str, tuple]:
    """The mesh axes of images, channels and RoIs. An axis cuts one of them, into equal parts; the
    features stay where they are if that is possible."""
    cut: dict[str, tuple] = {}
    arrays = [(name, a) for name, a in arrays if isinstance(a.sharding, NamedSharding)]
    for dimension in "nck":
        for name, array in arrays:
            if dimension not in _DIMENSIONS[name] or dimension in cut:
                continue
            i = _DIMENSIONS[name].index(dimension)
            axes = (*array.sharding.spec, *[None] * 4)[i] or ()
            axes = axes if isinstance(axes, tuple) else (axes,)
            free = not any(axis in used for used in cut.values() for axis in axes)
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if axes and free and array.shape[i] % parts == 0:
                cut[dimension] = axes
    return cut


# The primitive

_roi_align_p = Primitive("roi_align")
try:  # private: custom_partitioning asks for its caller's devices
    from jax._src.dispatch import prim_requires_devices_during_lowering

    prim_requires_devices_during_lowering.add(_roi_align_p)
    _is_cut = True
except (
    ImportError
):  # another JAX: the operations are not cut over devices, their arrays are gathered
    _is_cut = False
_dense_everywhere = False  # for tests


def _bind(call: _Call, boxes: Array, index: Array, arrays: Mapping[str, Array]) -> Array:
    """The operation on those of `arrays` that it takes."""
    arrays = [arrays[name] for name in _TAKES[call.operation] if name in arrays]
    operands = boxes, index, *arrays
    axes = frozenset().union(*map(_manual_axes, operands))
    return _roi_align_p.bind(*[_varying(x, axes) for x in operands], call=call)


def _manual_axes(array: Array) -> frozenset:
    """The axes of a shard_map over which a value varies, where its type says."""
    kind = jax.typeof(array) if hasattr(jax, "typeof") else None
    kind = getattr(kind, "mat", kind)
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def _varying(array: Array, axes: frozenset) -> Array:
    """The same value, as one of each device along `axes`; the transpose sums over them."""
    axes = tuple(axes - _manual_axes(array))
    if not axes:
        return array
    if hasattr(lax, "pcast"):
        return lax.pcast(array, axes, to="varying")
    return lax.pvary(array, axes)


@_roi_align_p.def_abstract_eval
def _abstract(boxes, index, *arrays, call):
    result = call.result(boxes, arrays)
    if not hasattr(jax, "typeof"):
        return jax.core.ShapedArray(result.shape, result.dtype)
    meshes = [
        x.sharding.mesh for x in (boxes, index, *arrays)
    ]  # a type's, where its axes are explicit
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    names = ("boxes", "image_index", *_TAKES[call.operation])
    cut = _cut(mesh, zip(names, (boxes, index, *arrays)))
    sharding = _sharding(mesh, _GIVES[call.operation], cut)
    return boxes.update(shape=result.shape, dtype=result.dtype, weak_type=False, sharding=sharding)


_jitted = jax.jit(_roi_align_p.bind, static_argnames="call")


@_roi_align_p.def_impl
def _impl(*operands, call):
    with jax.disable_jit(False):  # else it would be asked again
        return _jitted(*operands, call=call)


def _over_devices(run, call, boxes, index, *arrays):
    if _is_cut:
        return _partitioned(run, call, len(arrays))(boxes, index, *arrays)
    return run(call, boxes, index, *arrays)


def _on_cpu(*operands, call):
    return _dense(call, *operands) if call.dense else _over_devices(_native, call, *operands)


def _on_gpu(boxes, index, *arrays, call):
    shapes = [x.shape for x in (boxes, *arrays, call.result(boxes, arrays))]
    known = all(isinstance(n, int) and n > 0 for shape in shapes for n in shape)
    if not known or _triton_call() is None:
        return _dense(call, boxes, index, *arrays)
    return _over_devices(_kernels, call, boxes, index, *arrays)


def _elsewhere(*operands, call):
    return _dense(call, *operands)


_WAYS = {None: _elsewhere, "cpu": _on_cpu, "cuda": _on_gpu, "rocm": _on_gpu}
for _platform, _way in _WAYS.items():
    _lowering = mlir.lower_fun(_way, multiple_results=False)
    mlir.register_lowering(_roi_align_p, _lowering, platform=_platform)


def _second_order() -> None:
    raise NotImplementedError(
        "roialign has no second derivative in the boxes: use jax.lax.stop_gradient on them where a "
        "gradient is differentiated again"
    )


def _jvp(primals, tangents, *, call):
    boxes, index, *arrays = primals
    d_boxes, _, *d_arrays = tangents
    given = dict(zip(_TAKES[call.operation], arrays))
    moved = {name: d for name, d in zip(given, d_arrays) if type(d) is not ad.Zero}
    if type(d_boxes) is not ad.Zero:
        if len(given) > 1:  # the slopes would have to be differentiated
            _second_order()
        moved["tangent"] = d_boxes
    output = _bind(call, boxes, index, given)
    terms = [_bind(call, boxes, index, given | {name: d}) for name, d in moved.items()]
    return output, functools.reduce(ad.add_tangents, terms)


def _transpose(d_result, boxes, index, *arrays, call):
    given = dict(zip(_TAKES[call.operation], arrays))
    (wanted,) = (name for name, x in given.items() if ad.is_undefined_primal(x))
    if type(d_result) is ad.Zero:
        result = ad.Zero(given[wanted].aval)
    else:
        (operation,) = (name for name, gives in _GIVES.items() if gives == wanted)
        known = given | {_GIVES[call.operation]: d_result}
        del known[wanted]
        result = _bind(call._replace(operation=operation), boxes, index, known)
        if hasattr(jax.sharding, "reshard"):  # a sharding is part of the type, if axes are explicit
            primal = given[wanted].aval.sharding
            if not primal.mesh.empty and jax.typeof(result).sharding != primal:
                result = jax.sharding.reshard(result, primal)
    return [None, None, *[result if name == wanted else None for name in given]]


def _batch(operands, dims, *, call):
    """One more axis in front becomes more images and more RoIs."""
    size = next(x.shape[d] for x, d in zip(operands, dims) if d is not None)
    images, *pixels = call.map_shape
    boxes_shape = list(operands[0].shape)
    if dims[0] is not None:
        del boxes_shape[dims[0]]
    count, _ = boxes_shape
    names = "boxes", "image_index", *_TAKES[call.operation]
    batched = dict(zip(names, [d is not None for d in dims]))
    own_images = batched.get("features", call.operation == "adjoint")

    def flat(array: Array, d: int | None) -> Array:
        array = (
            jnp.broadcast_to(array, (size, *array.shape))
            if d is None
            else jnp.moveaxis(array, d, 0)
        )
        return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])

    arrays = {
        name: x if name == "features" and not own_images else flat(x, d)
        for name, x, d in zip(names, operands, dims)
    }
    boxes, index = arrays.pop("boxes"), arrays.pop("image_index")
    if own_images:
        index = index.reshape(size, count)
        offsets = images * jnp.arange(size, dtype=index.dtype)[:, None]
        index = jnp.where((index >= 0) & (index < images), index + offsets, -1).ravel()
        call = call._replace(map_shape=(size * images, *pixels))
    result = _bind(call, boxes, index, arrays)
    return result.reshape(
        size, images if call.operation == "adjoint" else count, *result.shape[1:]
    ), 0


ad.primitive_jvps[_roi_align_p] = _jvp
ad.primitive_transposes[_roi_align_p] = _transpose
batching.primitive_batchers[_roi_align_p] = _batch
if not hasattr(jax, "shard_map"):  # jax < 0.6: there a rule by primitive
    from jax.experimental import shard_map

    shard_map.register_standard_check(_roi_align_p)
    shard_map.register_standard_rewrite(_roi_align_p)


# Operations. Their arguments have been checked, but for the image index.


def _run(
    operation: str,
    arrays: Mapping[str, Array],
    boxes: Array,
    index: Array,
    bins: tuple[int, int],
    map_shape: tuple[int, int, int],
    rule: tuple,
) -> Array:
    images = map_shape[0]
    _check_images(index, images)
    (dtype, *_) = (array.dtype for array in arrays.values())
    coordinate = np.float64 if dtype == np.float64 else np.float32
    call = _Call(operation, bins, map_shape, rule, _dense_everywhere)
    return _bind(call, boxes.astype(coordinate), _int32(index, images), arrays)


def forward(
    features: Array,
    boxes: Array,
    image_index: Array,
    output_size: tuple[int, int],
    rule: Rule,
    *,
    out: None = None,
) -> Array:
    """Pooled features (K, C, P, Q)."""
    images, channels, *pixels = features.shape
    _checks.size("output", (boxes.shape[0], channels, *output_size))
    arrays = {"features": features}
    return _run("forward", arrays, boxes, image_index, output_size, (images, *pixels), rule.numbers)


def adjoint(
    d_output: Array,
    boxes: Array,
    image_index: Array,
    feature_shape: tuple[int, ...],
    rule: Rule,
    *,
    out: None = None,
) -> Array:
    """The gradient in the features (N, C, H, W)."""
    images, _, *pixels = feature_shape
    arrays, bins = {"d_output": d_output}, d_output.shape[2:]
    return _run("adjoint", arrays, boxes, image_index, bins, (images, *pixels), rule.numbers)


def box_gradient(
    d_output: Array,
    features: Array,
    boxes: Array,
    image_index: Array,
    rule: Rule,
) -> Array:
    """The gradient in the boxes (K, 4), x1 y1 x2 y2, of the coordinate type."""
    images, _, *pixels = features.shape
    arrays, bins = {"d_output": d_output, "features": features}, d_output.shape[2:]
    return _run("box_gradient", arrays, boxes, image_index, bins, (images, *pixels), rule.numbers)
