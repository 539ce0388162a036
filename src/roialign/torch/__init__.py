"""The PyTorch adapter.

In reading order: `adapter`, which tensors are accepted and the operations; `routes`, the ways that
a call goes; `kernels`, on memory; `operators`, ``torch.ops.roialign``; `transforms`, derivatives
and batching of both; `sharding` and `onnx`; `script`, for TorchScript; `layer`; `former`, what 0.1
had. A call is written as in `calls`.
"""

from . import former as former
from .adapter import (
    adjoint as adjoint,
    as_numpy as as_numpy,
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
    from_numpy as from_numpy,
    is_compiling as is_compiling,
    is_view as is_view,
    joined as joined,
    numbered as numbered,
    repeated as repeated,
    split as split,
    takes_any_form as takes_any_form,
    takes_numpy as takes_numpy,
    takes_rows as takes_rows,
    with_index_column as with_index_column,
)
from .kernels import kind as kind
from .layer import ROIAlign
from .script import (
    is_recorded as is_recorded,
    is_traced as is_traced,
    refuse as refuse,
    register as register,
)

__all__ = ["ROIAlign"]
