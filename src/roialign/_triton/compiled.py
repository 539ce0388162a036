"""Launches at little cost to the host: what does not change from call to call is kept.

That is, for arrays of one kind: which kernels an operation launches, and what Triton compiled. Its
JIT takes longer to find that than all else in a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.runtime.driver import driver

from roialign._rois import Rois

from . import kernels, launch, sampled, turned

INTERFACE = "run", "function", "packed_metadata"  # of what is compiled: Triton's JIT uses it so
KINDS = 1024  # of calls, whose launches are kept
RUNTIME = getattr(getattr(triton, "knobs", None), "runtime", None)  # Triton before 3.4 has none

_compiled: dict[tuple, tuple] = {}


class Given(NamedTuple):
    """An array of which this is known: it stands for the one at a place of the call's."""

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    dtype: Any
    place: int

    def stride(self) -> tuple[int, ...]:
        return self.steps

    def zero_(self) -> Given:
        return self


class Step(NamedTuple):
    """A launch. Of its inputs those at some positions are arrays, which have places."""

    kernel: Any
    grid: tuple[int, ...]
    inputs: tuple
    arrays: tuple[tuple[int, int], ...]  # position, place
    outputs: tuple[launch.New | int, ...]  # an int is a place
    constants: dict[str, Any]
    last: tuple[int, ...]  # places of what was made, and is not used after this step


@functools.lru_cache(KINDS)
def steps(
    launches: ModuleType, operation: str, results: int, kinds: tuple, scales: tuple, rule: tuple
) -> list[Step]:
    """The launches of an operation on arrays of these kinds: shape, strides and dtype, or None.

    In the order of a call's tensors, with its results before the maps. What a launch makes has the
    next place. No launch: there is nothing to add, and results are 0.
    """
    given = [kind and Given(*kind, place) for place, kind in enumerate(kinds)]
    d_output, boxes, index, levels, tangent, *rest = given
    out, maps = rest[:results], rest[results:]
    found: list[Step] = []

    def call(kernel: Any, grid: tuple, inputs: tuple, outputs: tuple, **constants: Any) -> list:
        made = []
        for output in outputs:
            if isinstance(output, launch.New):
                output = Given(output.shape, launch.strides(output), output.dtype, len(given))
                given.append(output)
            made.append(output)
        arrays = tuple((i, x.place) for i, x in enumerate(inputs) if isinstance(x, Given))
        numbers = tuple(None if isinstance(x, Given) else x for x in inputs)
        places = tuple(x.place if isinstance(x, Given) else x for x in outputs)
        found.append(Step(kernel, grid, numbers, arrays, places, constants, ()))
        return made

    rois, count = Rois(boxes, index, levels), len(scales) // 2
    if any(rule[sampled.REDUCTION : sampled.REDUCTION + 1]):  # not there: a mean
        if operation == "forward":
            sampled.forward(call, maps[:count], maps[count:], rois, tangent, scales, rule, out[0])
        elif operation == "adjoint":
            sampled.adjoint(call, d_output, maps, rois, tangent, scales, rule, out)
        else:
            sampled.box_gradient()
        return _with_last_uses(found, len(kinds), len(given))
    function = getattr(turned if any(rule[launch.TURN :]) else launches, operation)
    if operation == "forward":
        function(call, maps, rois, tangent, scales, rule, out[0])
    elif operation == "adjoint":
        function(call, d_output, rois, tangent, scales, rule, out)
    else:
        function(call, d_output, maps, rois, scales, rule, out[0])
    return _with_last_uses(found, len(kinds), len(given))


def _with_last_uses(found: list[Step], first: int, end: int) -> list[Step]:
    unused, kept = set(range(first, end)), []
    for step in reversed(found):
        new = sum(isinstance(output, launch.New) for output in step.outputs)
        end -= new
        last = unused & {*range(end, end + new), *(place for _, place in step.arrays)}
        kept.append(step._replace(last=tuple(last)))
        unused -= last
    return kept[::-1]


def run(kept: list[Step], arrays: list, call: Callable) -> None:
    """Launches the steps by `call`, on arrays in the order of their places."""
    for step in kept:
        inputs = list(step.inputs)
        for position, place in step.arrays:
            inputs[position] = arrays[place]
        outputs = [arrays[x] if isinstance(x, int) else x for x in step.outputs]
        made = call(step.kernel, step.grid, inputs, outputs, **step.constants)
        arrays.extend(
            [x for x, o in zip(made, step.outputs, strict=True) if not isinstance(o, int)]
        )
        for place in step.last:
            arrays[place] = None


def start(kernel: Any, grid: tuple[int], arguments: list, constants: dict[str, Any]) -> None:
    """``kernel[grid](*arguments, **constants)``; what was compiled for such arguments is kept."""
    # a hook is told of each launch by the JIT
    if kernels.INTERPRETED.value or RUNTIME is None or RUNTIME.launch_enter_hook.calls:
        kernel[grid](*arguments, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    # what Triton specialises: numbers by their width, arrays by dtype and alignment
    key = [kernel.fn, device, *constants.values()]
    for x in arguments:
        if isinstance(x, int):
            key.append(-(2**31) <= x < 2**31)
        elif not isinstance(x, float):
            key += x.dtype, x.data_ptr() % 16 == 0
    key = tuple(key)
    if key not in _compiled:
        compiled = kernel[grid](*arguments, **constants)
        if compiled.metadata.target.backend == "cuda" and all(
            hasattr(compiled, name) for name in INTERFACE
        ):
            names = kernel.arg_names[len(arguments) :]
            _compiled[key] = compiled, [constants[name] for name in names]
        return
    compiled, rest = _compiled[key]
    compiled.run(
        *grid, 1, 1, active.get_current_stream(device), compiled.function, compiled.packed_metadata,
        None, RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook, *arguments, *rest,
    )  # fmt: skip
