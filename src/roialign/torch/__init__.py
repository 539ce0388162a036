"""The PyTorch adapter.

In reading order: `adapter`, which tensors are accepted and the operations; `routes`, the ways that
a call goes; `kernels`, on memory; `operators`, ``torch.ops.roialign``; `transforms`, derivatives
and batching of both; `sharding` and `onnx`; `layer`; `former`, what 0.1 had. A call is written as
in `calls`.
"""

from . import former as former
from .adapter import (
    adjoint as adjoint,
    box_gradient as box_gradient,
    byte_types as byte_types,
    cast as cast,
    check_array as check_array,
    check_out as check_out,
    check_out_values as check_out_values,
    columns as columns,
    float32 as float32,
    forward as forward,
    forward_rows as forward_rows,
    is_compiling as is_compiling,
    joined as joined,
    repeated as repeated,
    split as split,
    takes_rows as takes_rows,
    with_index_column as with_index_column,
)
from .kernels import kind as kind
from .layer import ROIAlign

__all__ = ["ROIAlign"]
