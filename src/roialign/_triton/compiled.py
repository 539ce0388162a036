"""Launches at little cost to the host: what does not change from call to call is kept.

That is, for arrays of one kind: which kernels an operation launches, where in one buffer what they
make has its place, and what Triton compiled. Its JIT takes longer to find that than all else in a
call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime.driver import driver

from roialign._rois import Rois

from . import kernels, launch, sampled, turned

INTERFACE = "run", "function", "packed_metadata"  # of what is compiled: Triton's JIT uses it so
STREAM = 3  # where it is among the arguments of `run`
KINDS = 1024  # of calls, whose launches are kept
APART = 512  # bytes, of what is made in one buffer: all of it is aligned
RUNTIME = getattr(getattr(triton, "knobs", None), "runtime", None)  # Triton before 3.4 has none


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
    """A launch. Of its arguments those at some positions are arrays, which have places."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    arrays: tuple[tuple[int, int], ...]  # position, place
    made: tuple[launch.New, ...]  # they have the next places
    constants: dict[str, Any]
    last: tuple[int, ...] = ()  # places of what was made, and is not used after this step


class Operation(NamedTuple):
    """What an operation launches on arrays of one kind."""

    steps: list[Step]
    offsets: list[int]  # of what is made, in one buffer, in bytes
    size: int  # of that
    compiled: dict[tuple, list[tuple]]  # on a device, for arrays that are aligned so: its launches


@functools.lru_cache(KINDS)
def operation_of(
    launches: ModuleType, name: str, results: int, kinds: tuple, scales: tuple, rule: tuple
) -> Operation:
    """The operation of this name on arrays of these kinds: shape, strides and dtype, or None.

    In the order of a call's tensors, with its results before the maps. What a launch makes has the
    next place. No steps: there is nothing to add, and results are 0.
    """
    given = [kind and Given(*kind, place) for place, kind in enumerate(kinds)]
    d_output, boxes, index, levels, tangent, *rest = given
    out, maps = rest[:results], rest[results:]
    found: list[Step] = []

    def call(kernel: Any, grid: tuple, inputs: tuple, outputs: tuple, **constants: Any) -> list:
        results, made = [], []
        for output in outputs:
            if isinstance(output, launch.New):
                made.append(output)
                output = Given(output.shape, launch.strides(output), output.dtype, len(given))
                given.append(output)
            results.append(output)
        arguments = (*inputs, *results)
        arrays = tuple((i, x.place) for i, x in enumerate(arguments) if isinstance(x, Given))
        numbers = tuple(None if isinstance(x, Given) else x for x in arguments)
        found.append(Step(kernel, grid, numbers, arrays, tuple(made), constants))
        return results

    rois, count = Rois(boxes, index, levels), len(scales) // 2
    if any(rule[sampled.REDUCTION : sampled.REDUCTION + 1]):  # not there: a mean
        if name == "forward":
            sampled.forward(call, maps[:count], maps[count:], rois, tangent, scales, rule, out[0])
        elif name == "adjoint":
            sampled.adjoint(call, d_output, maps, rois, tangent, scales, rule, out)
        else:
            sampled.box_gradient()
    else:
        function = getattr(turned if any(rule[launch.TURN :]) else launches, name)
        if name == "forward":
            function(call, maps, rois, tangent, scales, rule, out[0])
        elif name == "adjoint":
            function(call, d_output, rois, tangent, scales, rule, out)
        else:
            function(call, d_output, maps, rois, scales, rule, out[0])
    steps = _with_last_uses(found, set(range(len(kinds), len(given))))
    return Operation(steps, *_room(steps, len(kinds)), {})


def _with_last_uses(steps: list[Step], made: set[int]) -> list[Step]:
    """`made`: the places of what the steps make."""
    unused, kept = set(made), []
    for step in reversed(steps):
        last = unused.intersection([place for _, place in step.arrays])
        kept.append(step._replace(last=tuple(last)))
        unused -= last
    return kept[::-1]


def _room(steps: list[Step], place: int) -> tuple[list[int], int]:
    """Where in one buffer what is made begins, from this place on, and the bytes of the buffer.

    Each takes the first room that is free, or is free again: launches run one after another.
    """
    offsets: list[int] = []
    used: dict[int, tuple[int, int]] = {}  # place: from where, to where
    size = 0
    for step in steps:
        for new in step.made:
            bits = math.prod(new.shape) * getattr(tl, new.dtype).primitive_bitwidth
            room, begin = launch.quotient(bits, 8 * APART) * APART, 0
            for low, high in sorted(used.values()):
                if begin + room <= low:
                    break
                begin = high
            used[place + len(offsets)] = begin, begin + room
            offsets.append(begin)
            size = max(size, begin + room)
        for last in step.last:
            del used[last]
    return offsets, size


def run(operation: Operation, arrays: list, make: Callable[[tuple[int, ...], str], Any]) -> None:
    """Launches the steps on arrays in the order of their places; what Triton compiled is kept.

    `make` gives a new array of a shape and a dtype.
    """
    # the JIT tells a hook of each launch
    if kernels.INTERPRETED.value or RUNTIME is None or _has_hooks():
        _run_by_jit(operation.steps, arrays, make)
        return
    active = driver.active
    device = active.get_current_device()
    addresses = [0 if array is None else array.data_ptr() for array in arrays]
    # what Triton specialises, and a kind does not tell
    key = device, *[address % 16 == 0 for address in addresses]
    if key not in operation.compiled:
        compiled = _run_by_jit(operation.steps, arrays, make)
        if all(
            each.metadata.target.backend == "cuda" and all(hasattr(each, n) for n in INTERFACE)
            for each in compiled
        ):
            operation.compiled[key] = list(map(_launch_of, operation.steps, compiled))
        return
    if operation.size:
        buffer = make((operation.size,), "uint8")
        begin = buffer.data_ptr()
        addresses += [begin + offset for offset in operation.offsets]
    stream = active.get_current_stream(device)
    for start, arguments, places in operation.compiled[key]:
        given = arguments.copy()
        given[STREAM] = stream
        for position, place in places:
            given[position] = addresses[place]
        start(*given)


def _has_hooks() -> bool:
    return bool(RUNTIME.launch_enter_hook.calls or RUNTIME.launch_exit_hook.calls)


def _run_by_jit(steps: list[Step], arrays: list, make: Callable) -> list:
    """What it compiled for each of the steps."""
    compiled = []
    for step in steps:
        arrays.extend([make(*new) for new in step.made])
        arguments = list(step.arguments)
        for position, place in step.arrays:
            arguments[position] = arrays[place]
        compiled.append(by_jit(step.kernel, step.grid, arguments, step.constants))
        for place in step.last:
            arrays[place] = None
    return compiled


def by_jit(kernel: Any, grid: tuple[int, ...], arguments: list, constants: dict[str, Any]) -> Any:
    return kernel[grid](*arguments, **constants)


def _launch_of(step: Step, compiled: Any) -> tuple:
    """A step without the JIT: what starts it, with what, and where arrays belong in that."""
    names = step.kernel.arg_names[len(step.arguments) :]
    of_kernel = *step.arguments, *[step.constants[name] for name in names]
    hooks = None, None, None  # what they are told, before and after
    given = [*step.grid, 1, 1, None, compiled.function, compiled.packed_metadata, *hooks]
    places = [(len(given) + position, place) for position, place in step.arrays]
    return compiled.run, [*given, *of_kernel], places
