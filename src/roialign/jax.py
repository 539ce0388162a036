"""The JAX adapter: its arrays, one primitive, its derivatives, transforms and sharding.

In reading order: arrays; the operations on the core, a custom call of XLA on the CPU; in Triton, on
GPUs; in plain JAX, for all else; the cut over devices; the primitive; the operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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

from roialign import _checks, _core, _dense, _layout, _rule, _threads
from roialign._operations import BESIDE, DIMENSIONS, GIVES, ROIS, TAKES, folded, giving, terms
from roialign._rois import Rois

try:
    from jax import ffi
except ImportError:  # jax < 0.5
    from jax.extend import ffi

_FLOATS = frozenset(map(np.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)))


# Arrays

float32, int32 = np.dtype(np.float32), np.dtype(np.int32)
byte_types = frozenset(map(np.dtype, (np.uint8, np.bool_)))
takes_any_form = takes_numpy = True


def kind(dtype: Any) -> str:
    if dtype in _FLOATS:
        return "float"
    return "integer" if isinstance(dtype, np.dtype) and dtype.kind in "iu" else "other"


def check_array(name: str, value: object) -> None:
    if not isinstance(value, Array):
        _checks.refuse_array(name, "jax.Array", value)
    if not isinstance(value, jax.core.Tracer) and value.is_deleted():
        raise TypeError(f"`{name}` must be in memory, got an array that was deleted or donated")


def check_out(name: str, out: object, dtype: np.dtype) -> None:
    raise TypeError(
        f"`{name}` must be None: arrays of JAX are not written to, got {_checks.type_name(out)}"
    )


def check_out_values(name: str, out: object, shape: tuple[int, ...], inputs: list) -> None:
    """There is none: `check_out` refuses all."""


def is_view(reshaped: Array, array: Array) -> bool:
    """Asked of `out` alone."""
    return False


def is_compiling() -> bool:
    return False


def takes_rows(features: object, rois: object) -> bool:
    """No call has fewer checks here: under `jit` they cost nothing."""
    return False


def columns(rows: Array) -> tuple[Array, Array]:
    if isinstance(rows, jax.core.Tracer):
        return rows[:, 1:], rows[:, 0]
    with jax.ensure_compile_time_eval():  # the index has values, in a traced function too
        return rows[:, 1:], rows[:, 0]


def joined(boxes: list[Array]) -> Array:
    if not boxes:
        return jnp.zeros((0, 4), jnp.float32)
    if len({array.dtype for array in boxes}) > 1:  # the widest float that JAX has been allowed
        boxes = [array.astype(float) for array in boxes]
    # Not concatenate: XLA of JAX 0.6 and before ends the process where that feeds a custom call.
    whole, at = jnp.zeros((sum(map(len, boxes)), boxes[0].shape[1]), boxes[0].dtype), 0
    for array in boxes:
        whole = jax.lax.dynamic_update_slice(whole, array, (at, 0))
        at += len(array)
    return whole


def repeated(counts: list[int], like: Array) -> Array:
    return jnp.asarray(np.repeat(np.arange(len(counts), dtype=np.int32), counts))


def from_numpy(array: np.ndarray, like: Array | None) -> Array:
    """Of 64 bits if JAX has been allowed them; an index that does not fit then is still bad."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype != array.dtype and array.dtype.kind in "iu":
        array = array.clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    return jnp.asarray(array)


def as_numpy(boxes: Array) -> np.ndarray | None:
    return np.asarray(boxes) if _is_at_hand(boxes) else None


def split(array: Array, counts: list[int]) -> list[Array]:
    return jnp.split(array, np.cumsum(counts)[:-1]) if counts else []


def cast(array: Array, dtype: np.dtype) -> Array:
    return array if array.dtype == dtype else array.astype(dtype)  # which would take 5 us


def with_index_column(d_boxes: Array) -> Array:
    return jnp.pad(d_boxes, ((0, 0), (1, 0)))


def _is_at_hand(array: Array) -> bool:
    """Not traced, and on the CPU."""
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in array.devices())


def _check_index(name: str, index: Array, end: int, least: int = 0) -> None:
    """Raises where an index is bad, if its values are at hand."""
    if not _is_at_hand(index):
        return
    values = np.asarray(index).ravel()
    if values.itemsize == 2:  # some of these are not types of the core, or of NumPy
        values = values.astype(np.int32 if kind(index.dtype) == "integer" else np.float32)
    _core.check_index(name, values, end, least)


def _int32(index: Array, end: int) -> Array:
    """An index as the primitive takes it; -1 where it is not an integer in [0, end)."""
    if kind(index.dtype) == "integer":
        if index.dtype.itemsize < 4 or index.dtype == int32:
            return cast(index, int32)
    elif index.dtype.itemsize < 4:
        index = index.astype(np.float32)
    end = min(end, 2**31 - 1) if isinstance(end, int) else end
    good = (index >= 0) & (index < end) & (index == jnp.floor(index))
    return jnp.where(good, index, -1).astype(np.int32)


# What the primitive computes: an operation of the table. Its boxes have the coordinate type, its
# image index and levels are int32.


def _numbers(rule: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(_core.rule_names, rule, strict=True))


class _Call(NamedTuple):
    """All that is no array."""

    operation: str
    bins: tuple[int, int]  # P, Q
    images: int  # N
    maps: tuple[tuple[int, int], ...]  # H, W of each
    scales: tuple[float, ...]
    rule: tuple[float, ...]
    layout: str = "NCHW"
    per_image: bool = False  # boxes (N, M, 4); the image index is 0 then, or bad
    dense: bool = False  # plain JAX on the CPU too
    names: tuple[str, ...] = ()  # of the arrays, in their order: "features" once for each map

    @property
    def reduction(self) -> str:
        return _rule.REDUCTIONS[int(_numbers(self.rule)["reduction"])]

    @property
    def is_mean_along_axes(self) -> bool:
        """A product of matrices."""
        return self.reduction == "mean" and not _numbers(self.rule)["turn"]

    def named(self, operands: Sequence[Any]) -> dict[str, list]:
        groups: dict[str, list] = {}
        for name, operand in zip(self.names, operands, strict=True):
            groups.setdefault(name, []).append(operand)
        return groups

    def dimensions(self, name: str) -> tuple[str, ...]:
        """Those of an array. In the table channels are first, and RoIs are in one row."""
        dimensions = DIMENSIONS[name]
        if "c" in dimensions:
            dimensions = _layout.shape_as_given(dimensions, self.layout)
        return ("n", *dimensions) if self.per_image and "k" in dimensions else dimensions

    def results(self, operands: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        gives = GIVES[self.operation]
        first = "boxes" if gives == "tangent" else TAKES[self.operation][0]
        dtype = operands[self.names.index(first)].dtype
        sizes = dict(zip("npq", (self.images, *self.bins), strict=True))
        for name, operand in zip(self.names, operands, strict=True):
            sizes.update(zip(self.dimensions(name), operand.shape, strict=True))
        shapes = [
            tuple([{**sizes, "h": height, "w": width}[d] for d in self.dimensions(gives)])
            for height, width in self.maps[: len(self.maps) if gives == "features" else 1]
        ]
        dtype = float32 if dtype in byte_types else dtype
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def _bind(call: _Call, given: Mapping[str, Sequence[Array]]) -> list[Array]:
    """The operation on those of the arrays that it takes."""
    taken = [(name, x) for name in (*BESIDE, *TAKES[call.operation]) for x in given.get(name, ())]
    names, operands = zip(*taken, strict=True)
    axes = frozenset().union(*map(_dense.manual_axes, operands))
    if axes:
        operands = [_dense.varying(x, axes) for x in operands]
    return _roi_align_p.bind(*operands, call=call._replace(names=names))


def _apply(
    functions: Mapping[str, Callable], call: _Call, operands: Sequence[Array], results: Sequence
) -> list[Array]:
    """By functions with the arguments of those in `_dense`; of these alone `selectors`."""
    given, numbers = call.named(operands), (call.scales, call.rule)
    run, rois = functions[call.operation], Rois(*[given.get(name, (None,))[0] for name in ROIS])
    if "selectors" in given:
        run = functools.partial(run, selectors=given["selectors"])
    if call.operation == "box_gradient":
        return [run(*given["d_output"], given["features"], rois, *numbers, *results)]
    (tangent,) = given.get("tangent", (None,))
    if call.operation == "adjoint":
        return run(*given["d_output"], rois, tangent, *numbers, results)
    return [run(given["features"], rois, tangent, *numbers, *results)]


def _of_rows(layouts: Collection[str] = ("NCHW",)) -> Callable:
    """Makes a function of calls one that takes boxes per image too, and any layout."""

    def decorate(run: Callable) -> Callable:
        @functools.wraps(run)
        def run_any(call: _Call, *operands: Array) -> list[Array]:
            inner = call.layout if call.layout in layouts else "NCHW"
            outer = call.layout if inner != call.layout else "NCHW"
            rows = []
            for name, x in zip(call.names, operands, strict=True):
                if call.per_image and name == "image_index":
                    x = jnp.where(x == 0, lax.broadcasted_iota(x.dtype, x.shape, 0), -1)
                if call.per_image and "k" in DIMENSIONS[name]:
                    x = lax.collapse(x, 0, 2)
                rows.append(_layout.channels_first(x, outer) if "c" in DIMENSIONS[name] else x)
            results = run(call._replace(per_image=False, layout=inner), *rows)
            if "c" in DIMENSIONS[GIVES[call.operation]]:
                results = [_layout.as_given(x, outer) for x in results]
            shapes = [new.shape for new in call.results(operands)]
            return [x.reshape(shape) for x, shape in zip(results, shapes, strict=True)]

        return run_any

    return decorate


# On the CPU: the core

for _name, _handler in _core.xla_handlers.items():
    ffi.register_ffi_target(f"roialign_{_name}", _handler, platform="cpu")
_core.set_xla_threads(_threads.get_num_threads())


@_of_rows(_layout.LAYOUTS)
def _native(call: _Call, *operands: Array) -> list[Array]:
    # Scalars alone can be exported by every version.
    scales = [f"scale_{axis}_{i}" for i in range(len(call.maps)) for axis in "yx"]
    names = "maps", *scales, *_core.rule_names
    numbers = dict(zip(names, (len(call.maps), *call.scales, *call.rule), strict=True))
    if call.layout == "NHWC":
        numbers["channels_last"] = 1
    run = ffi.ffi_call(f"roialign_{call.operation}_maps", call.results(operands))
    return run(*operands, **{name: np.float64(number) for name, number in numbers.items()})


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


@_of_rows()
def _kernels(call: _Call, *operands: Array) -> list[Array]:
    from roialign._triton import launch

    _core.log(f"{call.operation} is compiled to the kernels of roialign._triton")
    triton_call = _triton_call()

    def run(kernel: Any, grid: tuple, inputs: tuple, outputs: tuple, **constants: Any) -> list:
        shapes = [jax.ShapeDtypeStruct(output.shape, output.dtype) for output in outputs]
        if isinstance(outputs[0], Array):  # it is written on: the last of the inputs too
            last = sum(isinstance(x, Array) for x in inputs) - 1
            constants["input_output_aliases"] = {last: 0}
        return triton_call(*inputs, kernel=kernel, grid=grid, out_shape=shapes, **constants)

    operands = tuple([cast(x, float32) if x.dtype in byte_types else x for x in operands])
    functions = {name: functools.partial(getattr(launch, name), run) for name in TAKES}
    results = [launch.New(new.shape, str(new.dtype)) for new in call.results(operands)]
    return _apply(functions, call, operands, results)


# Elsewhere: plain JAX


@_of_rows()
def _plain(call: _Call, *operands: Array) -> list[Array]:
    _core.log(f"{call.operation} is compiled to plain JAX: there is no kernel for this platform")
    return _apply(vars(_dense), call, operands, call.results(operands))


# Over devices: each computes on its part of the images, channels and RoIs, and what the result sums
# over is summed over devices. An image elsewhere is a bad index, so its RoIs add 0.


@functools.cache
def _partitioned(run: Callable, call: _Call) -> custom_partitioning:
    """`run`, with the rule by which it is cut."""
    given = GIVES[call.operation]
    gives = (given,) * (len(call.maps) if given == "features" else 1)

    def infer(mesh: Mesh, arguments: tuple, _results: Any) -> list[NamedSharding]:
        return _shardings(mesh, call, gives, _cut(mesh, call, call.names, arguments))

    def partition(mesh: Mesh, arguments: tuple, results: Any) -> tuple:
        cut = _cut(mesh, call, (*call.names, *gives), (*arguments, *results))
        if mesh.empty:  # the arrays have no named axes: everything is everywhere
            devices = results[0].sharding.device_set
            mesh = Mesh(np.array(sorted(devices, key=lambda d: d.id)), "all")
        images = call.images // math.prod(mesh.shape[axis] for axis in cut.get("n", ()))
        result = call.dimensions(given)
        summed = [axis for d, axes in cut.items() if d not in result for axis in axes]

        def run_local(*operands: Array) -> list[Array]:
            operands, index = list(operands), call.names.index("image_index")
            if "n" in cut and not call.per_image:
                operands[index] -= images * lax.axis_index(cut["n"])
            parts = run(call._replace(images=images), *operands)
            return lax.psum(parts, tuple(summed)) if summed else parts

        return (
            mesh,
            run_local,
            _shardings(mesh, call, gives, cut),
            tuple(_shardings(mesh, call, call.names, cut)),
        )

    function = custom_partitioning(functools.partial(run, call))
    options = {"sharding_rule": f"{_factors(call, call.names)} -> {_factors(call, gives)}"}
    if jax.__version_info__ < (0, 5):
        options = {}
    function.def_partition(partition, infer_sharding_from_operands=infer, **options)
    return function


def _factors(call: _Call, names: Sequence[str]) -> str:
    """The dimensions of these arrays, as Shardy reads them. Height and width are a map's own."""
    own = [names[:i].count(name) for i, name in enumerate(names)]
    arrays = [
        [f"{d}{i}" if d in "hw" else d for d in call.dimensions(n)]
        for n, i in zip(names, own, strict=True)
    ]
    return ", ".join(map(" ".join, arrays))


def _shardings(
    mesh: Mesh, call: _Call, names: Iterable[str], cut: Mapping[str, tuple]
) -> list[NamedSharding]:
    specs = [PartitionSpec(*[cut.get(d) for d in call.dimensions(name)]) for name in names]
    return [NamedSharding(mesh, spec) for spec in specs]


def _cut(
    mesh: Mesh, call: _Call, names: Iterable[str], operands: Iterable[Any]
) -> dict[str, tuple]:
    """The mesh axes of images, channels and RoIs. An axis cuts one of them, into equal parts; the
    features stay where they are if that is possible."""
    cut: dict[str, tuple] = {}
    arrays = [
        (call.dimensions(name), array)
        for name, array in zip(names, operands, strict=True)
        if isinstance(array.sharding, NamedSharding)
    ]
    for dimension in "nck":
        for dimensions, array in arrays:
            if dimension not in dimensions or dimension in cut:
                continue
            i = dimensions.index(dimension)
            axes = (*array.sharding.spec, *[None] * 5)[i] or ()
            axes = axes if isinstance(axes, tuple) else (axes,)
            free = not any(axis in used for used in cut.values() for axis in axes)
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if axes and free and array.shape[i] % parts == 0:
                cut[dimension] = axes
    return cut


# The primitive

_roi_align_p = Primitive("roi_align")
_roi_align_p.multiple_results = True
try:  # private: custom_partitioning asks for its caller's devices
    from jax._src.dispatch import prim_requires_devices_during_lowering

    prim_requires_devices_during_lowering.add(_roi_align_p)
    _is_cut = True
except ImportError:  # another JAX: nothing is cut over devices, arrays are gathered
    _is_cut = False
_dense_everywhere = False  # for tests


@_roi_align_p.def_abstract_eval
def _abstract(*operands, call):
    results = call.results(operands)
    if not hasattr(jax, "typeof"):
        return [jax.core.ShapedArray(new.shape, new.dtype) for new in results]
    meshes = [x.sharding.mesh for x in operands]  # a type's, where its axes are explicit
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    gives = [GIVES[call.operation]] * len(results)
    shardings = _shardings(mesh, call, gives, _cut(mesh, call, call.names, operands))
    return [
        operands[0].update(shape=new.shape, dtype=new.dtype, weak_type=False, sharding=sharding)
        for new, sharding in zip(results, shardings, strict=True)
    ]


_jitted = jax.jit(_roi_align_p.bind, static_argnames="call")


@_roi_align_p.def_impl
def _impl(*operands, call):
    with jax.disable_jit(False):  # else it would be asked again
        return _jitted(*operands, call=call)


def _over_devices(run, call, *operands):
    return (_partitioned(run, call) if _is_cut else functools.partial(run, call))(*operands)


def _on_cpu(*operands, call):
    return _plain(call, *operands) if call.dense else _over_devices(_native, call, *operands)


def _on_gpu(*operands, call):
    shapes = [x.shape for x in (*operands, *call.results(operands))]
    known = all(isinstance(n, int) and n > 0 for shape in shapes for n in shape)
    if not (known and call.is_mean_along_axes) or _triton_call() is None:
        return _plain(call, *operands)
    return _over_devices(_kernels, call, *operands)


def _elsewhere(*operands, call):
    return _plain(call, *operands)


_WAYS = {None: _elsewhere, "cpu": _on_cpu, "cuda": _on_gpu, "rocm": _on_gpu}
for _platform, _way in _WAYS.items():
    _lowering = mlir.lower_fun(_way, multiple_results=True)
    mlir.register_lowering(_roi_align_p, _lowering, platform=_platform)


def _jvp(primals, tangents, *, call):
    given, moved = call.named(primals), {}
    for name, group in call.named(tangents).items():
        if name == "boxes" and all(type(d) is not ad.Zero for d in group):
            _checks.has_box_gradient(call.reduction)
        if any(type(d) is not ad.Zero and d.dtype != jax.dtypes.float0 for d in group):
            moved[name] = [ad.instantiate_zeros(d) for d in group]
    changes = [_bind(call, term) for term in terms(call.operation, given, moved)]
    return _bind(call, given), [
        functools.reduce(ad.add_tangents, each) for each in zip(*changes, strict=True)
    ]


def _transpose(d_results, *operands, call):
    given = call.named(operands)
    (wanted,) = (name for name, group in given.items() if any(map(ad.is_undefined_primal, group)))
    given[GIVES[call.operation]] = [ad.instantiate_zeros(d) for d in d_results]
    group, zero = given.pop(wanted), all(type(d) is ad.Zero for d in d_results)

    def cotangent(x, d):
        if not ad.is_undefined_primal(x):
            return None
        return ad.Zero(x.aval) if zero else _placed(d, x.aval)

    sibling = call._replace(operation=giving(wanted))
    results = [None] * len(group) if zero else _bind(sibling, given)
    results = iter([cotangent(*each) for each in zip(group, results, strict=True)])
    return [next(results) if name == wanted else None for name in call.names]


def _placed(array, aval):
    """As a type says whose axes are explicit: then the sharding is part of it."""
    if not hasattr(jax.sharding, "reshard") or aval.sharding.mesh.empty:
        return array
    return jax.sharding.reshard(array, aval.sharding)


def _batch(operands, dims, *, call):
    """The axis of the batch becomes more channels, or more RoIs, or more images."""
    arrays = list(zip(call.names, operands, dims, strict=True))
    size = next(x.shape[d] for _, x, d in arrays if d is not None)
    shapes = [x.shape if d is None else (*x.shape[:d], *x.shape[d + 1 :]) for _, x, d in arrays]
    into = folded(call.operation, {name for name, _, d in arrays if d is not None})
    maps_differ = into.get("features") == "n"
    per_image = call.per_image or (maps_differ and call.images == 1)
    batched = call._replace(images=size * call.images if maps_differ else call.images)
    if maps_differ and per_image:
        into, batched = dict.fromkeys(into, "n"), batched._replace(per_image=True)

    def fold(name, array, d):
        if into[name] is None:
            return array
        axis = batched.dimensions(name).index(into[name])
        if d is None:
            array, d = jnp.broadcast_to(array, (size, *array.shape)), 0
        array = jnp.moveaxis(array, d, axis)
        whole = array.ndim == len(batched.dimensions(name))
        return array if whole else lax.collapse(array, axis, axis + 2)

    given = call.named([fold(*each) for each in arrays])
    if maps_differ and not per_image:
        (index,) = given["image_index"]
        first = call.images * jnp.arange(size, dtype=index.dtype)
        own = (index >= 0) & (index < call.images)
        (count,) = shapes[call.names.index("image_index")]
        index = jnp.where(own, index + jnp.repeat(first, count), -1)
        given["image_index"] = [index]
    result = GIVES[call.operation]
    axis = batched.dimensions(result).index(into[result])
    one = map(jax.ShapeDtypeStruct, shapes, [x.dtype for x in operands])
    shapes = [(*new.shape[:axis], size, *new.shape[axis:]) for new in call.results(list(one))]
    results = [x.reshape(s) for x, s in zip(_bind(batched, given), shapes, strict=True)]
    return results, [axis] * len(results)


ad.primitive_jvps[_roi_align_p] = _jvp
ad.primitive_transposes[_roi_align_p] = _transpose
batching.primitive_batchers[_roi_align_p] = _batch
if not hasattr(jax, "shard_map"):  # jax < 0.6: there a rule by primitive
    from jax.experimental import shard_map

    shard_map.register_standard_check(_roi_align_p)
    shard_map.register_standard_rewrite(_roi_align_p)


# Operations. Their arguments have been checked, but for the indices.


def _run(operation, arrays, rois, bins, shapes, scales, rule, layout, selectors) -> list[Array]:
    images = shapes[0][0]
    (first, *_), *_ = arrays.values()
    coordinate = first.dtype if first.dtype == np.float64 else float32
    boxes, index, levels = rois
    per_image = index is None
    if per_image:
        index = jnp.zeros(boxes.shape[:2], np.int32)
    else:
        _check_index("image_index", index, images)
        index = _int32(index, images)
    given = {"boxes": [cast(boxes, coordinate)], "image_index": [index], **arrays}
    if selectors is not None and _numbers(rule)["reduction"]:
        given["selectors"] = [lax.stop_gradient(x) for x in selectors]
    if levels is not None:
        _check_index("levels", levels, len(shapes), least=-1)
        levels = _int32(levels, len(shapes))
        if len(shapes) > 1:
            given["levels"] = [levels]
        else:  # the primitive takes levels of several maps alone
            given["image_index"] = [jnp.where(levels == 0, index, -1)]
    maps = tuple([tuple(shape[2:]) for shape in shapes])
    numbers = tuple(bins), images, maps, scales, rule, layout, per_image, _dense_everywhere
    return _bind(_Call(operation, *numbers), given)


def _shapes(arrays: Sequence[Array], layout: str) -> list[tuple[int, ...]]:
    return [_layout.shape_first(array.shape, layout) for array in arrays]


def forward(maps, rois, output_size, scales, rule, *, layout="NCHW", out=None) -> Array:
    given, shapes = {"features": maps}, _shapes(maps, layout)
    (output,) = _run("forward", given, rois, output_size, shapes, scales, rule, layout, maps)
    return output


def adjoint(
    d_output, rois, feature_shapes, scales, rule, *, layout="NCHW", selectors=None, out=None
) -> tuple[Array, ...]:
    ((*_, p, q),) = _shapes([d_output], layout)
    given = {"d_output": [d_output]}
    numbers = (p, q), feature_shapes, scales, rule, layout
    return tuple(_run("adjoint", given, rois, *numbers, selectors))


def box_gradient(d_output, maps, rois, scales, rule, *, layout="NCHW") -> Array:
    (*shapes, (*_, p, q)) = _shapes([*maps, d_output], layout)
    given = {"d_output": [d_output], "features": maps}
    (d_boxes,) = _run("box_gradient", given, rois, (p, q), shapes, scales, rule, layout, maps)
    return d_boxes
