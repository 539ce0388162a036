"""What the module of an array library owes, and which module it is for the arrays that came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from roialign import _checks, numpy as _numpy
from roialign._graph import IN_GRAPH, graph_adapter
from roialign._rois import Rois, arrays as arrays_in

Maps = tuple[Any, ...]
Numbers = tuple[float, ...]
Size = tuple[int, int]


class Adapter(Protocol):
    """An array library. Arrays are its own; `K` is the number of RoIs.

    The operations get arguments that have been checked, but for devices and the values of indices.
    `maps` and `feature_shapes` have one entry for each map, `scales` two: y and x, one map after
    another. `rule` is the vector of `_rule.vector`. Maps and their pooled RoIs come and go with
    channels first. `layout` says how the caller has them: with "NHWC" they are views of arrays
    whose channels are last. An adapter that `takes_any_form` gets and gives arrays as the caller
    has them: in the `layout`, and for boxes (N, M, 4), which come without an image index, with N
    and M in the place of K.
    """

    float32: Any  # the dtype
    byte_types: Any  # the dtypes of features beside floats: they are pooled to float32
    takes_any_form: bool
    takes_numpy: bool  # arrays of NumPy beside its own

    def check_array(self, name: str, value: object) -> None:
        """Raises TypeError if it is no array that the operations can take."""

    def kind(self, dtype: Any) -> str:
        """ "float": of maps and boxes; "wide float": of boxes only; "integer"; "other"."""

    def check_out(self, name: str, out: object, dtype: Any) -> None:
        """Raises TypeError if ``out`` is no array of this dtype that can be written to."""

    def check_out_values(
        self, name: str, out: Any, shape: tuple[int, ...], inputs: list[Any]
    ) -> None:
        """Raises ValueError: another shape, read-only, or an overlap with itself or an input."""

    def is_view(self, reshaped: Any, array: Any) -> bool:
        """Whether an array that was reshaped has the memory of the one from which it came."""

    def columns(self, rows: Any) -> tuple[Any, Any]:
        """Boxes (K, 4) and image index (K,) of rows (K, 5)."""

    def joined(self, boxes: list[Any]) -> Any:
        """(K, 4) from arrays (K_i, 4); those of different dtypes meet in one that holds all."""

    def repeated(self, counts: list[int], like: Any) -> Any:
        """Each image's number as often as it has boxes: (K,), where the boxes `like` are."""

    def numbered(self, images: int, each: int, like: Any) -> Any:
        """The number of each image `each` times: (images * each,), where the boxes `like` are."""

    def from_numpy(self, array: Any, like: Any) -> Any:
        """An array of NumPy as the library's own, where the array `like` is: at least integers."""

    def as_numpy(self, boxes: Any) -> Any:
        """The memory of floats of NumPy's types as its array; None where that may not be read."""

    def split(self, array: Any, counts: list[int]) -> Sequence[Any]:
        """The rows of an array as arrays of so many."""

    def cast(self, array: Any, dtype: Any) -> Any:
        """Rounded to a dtype; infinite where it is too large for that."""

    def with_index_column(self, d_boxes: Any) -> Any:
        """(K, 5) from (K, 4), with zeros in front."""

    def is_compiling(self) -> bool:
        """Whether a compiler reads the Python code of the public functions."""

    def takes_rows(self, features: object, rois: object) -> bool:
        """Whether no check of the type and the shape of either can fail: of features, or a gradient
        in the output, and of rows (K, 5). `forward_rows` takes them as they are.
        """

    def forward_rows(
        self, features: Any, rows: Any, output_size: Size, scales: Numbers, rule: Numbers, out: Any
    ) -> Any:
        """`forward` of one map and rows (K, 5): the short way of most calls.

        `out` has the right type; None if it, or its device, needs another look.
        """

    def forward(
        self,
        maps: Maps,
        rois: Rois,
        output_size: Size,
        scales: Numbers,
        rule: Numbers,
        *,
        layout: str = "NCHW",
        out: Any = None,
    ) -> Any:
        """Pooled features (K, C, P, Q)."""

    def adjoint(
        self,
        d_output: Any,
        rois: Rois,
        feature_shapes: tuple[tuple[int, ...], ...],
        scales: Numbers,
        rule: Numbers,
        *,
        layout: str = "NCHW",
        out: Any = None,
    ) -> Maps:
        """The gradient in each map (N, C, H, W); `out` is a tuple of as many arrays.

        For reductions other than "mean" it takes, as `selectors`, the maps whose samples were
        compared.
        """

    def box_gradient(
        self,
        d_output: Any,
        maps: Maps,
        rois: Rois,
        scales: Numbers,
        rule: Numbers,
        *,
        layout: str = "NCHW",
    ) -> Any:
        """The gradient in the boxes (K, 4), x1 y1 x2 y2."""


def own(adapter: Adapter, value: Any) -> Any:
    """With the library's own arrays in the place of NumPy's, where it takes those."""
    if not adapter.takes_numpy:
        return value
    if isinstance(value, (tuple, list)):
        each = [own(adapter, item) for item in value]
        return tuple(each) if isinstance(value, tuple) else each
    return adapter.from_numpy(value, None) if _is_common(value) else value


def _is_common(value: Any) -> bool:
    """Whether it is an array of NumPy whose dtype other libraries have."""
    if not _numpy.is_array(value) or not value.dtype.isnative:
        return False
    kind = _numpy.kind(value.dtype)
    return kind in ("float", "integer") or value.dtype in _numpy.byte_types


def with_own_index(adapter: Adapter, index: Any, like: Any) -> Any:
    """An image index or levels; integers of NumPy as the library's own array."""
    if IN_GRAPH:  # @jit.cond: True
        return graph_adapter().own_index(index)
    if adapter is _numpy or not _numpy.is_array(index):
        return index
    if adapter.is_compiling():  # torch knows its dtype only once it is a tensor
        return adapter.from_numpy(index, like)
    integers = _is_common(index) and _numpy.kind(index.dtype) == "integer"
    return adapter.from_numpy(index, like) if integers else index


def adapter_of(name: str, array: object, others: Sequence[Any] = ()) -> Adapter:
    """The module for the kind of array that came; imports nothing that the user has not.

    JAX takes arrays of NumPy beside its own: there the others decide, which are arrays, RoIs in any
    form, or anything else.
    """
    if _numpy.is_array(array):
        if "jax" not in sys.modules:
            return _numpy
        arrays = [each for other in others for each in arrays_in(other)]
        array = next((each for each in arrays if _is_a(each, "jax", "Array")), array)
        if _numpy.is_array(array):
            return _numpy
    module: Any  # by statements: torch's compiler reads them, and no importlib
    if _is_a(array, "torch", "Tensor"):
        import roialign.torch as module
    elif _is_a(array, "jax", "Array"):
        import roialign.jax as module
    elif _is_a(array, "mindspore", "Tensor"):
        import roialign.mindspore as module
    elif _is_a(array, "cupy", "ndarray"):
        import roialign.cupy as module
    else:
        kinds = "numpy.ndarray, torch.Tensor, jax.Array, mindspore.Tensor or cupy.ndarray"
        _checks.refuse_array(name, kinds, array)
    return module


def _is_a(array: object, library: str, kind: str) -> bool:
    module = sys.modules.get(library)
    return module is not None and isinstance(array, getattr(module, kind, ()))
