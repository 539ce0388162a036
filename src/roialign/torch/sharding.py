"""On which shards of DTensors the operators compute (docs/distributed.md)."""

from __future__ import annotations

import functools
import sys
from typing import Any

from roialign import _operations

from .operators import LENGTHS, OPERATORS, ORDER


def register() -> None:
    """The rules, if there can be a DTensor; its module is slow to import."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


register._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its import


@functools.cache
def _register() -> None:
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

        add = DTensor._op_dispatcher.sharding_propagator.register_op_strategy
    except (ImportError, AttributeError):  # another torch: DTensor says that it has no rule
        return

    for operation, operator in OPERATORS.items():
        # A decision is remembered by the arguments from the first that is no tensor: sizes count.
        remembered = RuntimeSchemaInfo(len(ORDER[operation]), needs_pytree=True)
        add(operator, functools.partial(_strategy, operation), remembered)


def _strategy(operation: str, schema: Any) -> Any:
    """Everything whole, or cut along the RoIs or the channels, on each axis of the mesh.

    `register_sharding`, which is public, takes no list of results.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    def placement(name: str, dimension: str, elsewhere: Any) -> Any:
        dimensions = _operations.DIMENSIONS[name]
        return Shard(dimensions.index(dimension)) if dimension in dimensions else elsewhere

    given = [
        name
        for name, x in [
            *zip(ORDER[operation], schema.args_schema),
            *[("selectors", x) for x in schema.args_schema[LENGTHS[operation] :]],
        ]
        for _ in ([] if x is None else getattr(x, "children", x if isinstance(x, list) else [x]))
    ]
    gives = _operations.GIVES[operation]
    length = LENGTHS[operation]
    *_, scales, _ = schema.args_schema[:length]
    results = len(scales) // 2 if operation == "adjoint" else 1
    choices = [[Replicate()] * (results + len(given))]
    for dimension in "kc":
        result = placement(gives, dimension, Partial())
        choices.append(
            [result] * results + [placement(name, dimension, Replicate()) for name in given]
        )
    mesh = schema.get_mesh_from_args()
    strategy = expand_to_full_mesh_op_strategy(mesh, schema, choices, input_index=results)
    for spec in strategy.strategies:
        if operation == "adjoint" and results == 1:  # a list of one
            spec.output_specs = (spec.output_specs,)
    return strategy


register()
