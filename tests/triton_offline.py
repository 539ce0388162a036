"""The Triton kernels where there is no GPU: compiled as `launch` runs them, and what they need.

    TRITON_INTERPRET=0 python tests/triton_offline.py

writes the table of docs/kernels.md, with the Triton that is installed.
"""

import math
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from roialign._rois import Rois
from roialign._triton import compiled, launch

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
GATED = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TARGETS = GATED | {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
}
DTYPES = ("float16", "bfloat16", "float32", "float64")
OPERATIONS = ("forward", "adjoint", "box_gradient")


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    arguments: dict  # by the names of the kernel's parameters
    made: list  # those of its arrays that are new
    constants: dict


class Device:
    """Triton's driver of no device: it keeps what is compiled, and runs nothing.

    Its arrays are torch's meta tensors.
    """

    def __init__(self, target: GPUTarget):
        self.target = target
        self.compiled = {}  # hash -> what Triton compiled
        self.utils = self

    def call(self, kernel, grid, inputs, outputs, **constants):
        """That of `launch`."""
        driver.set_active(self)
        results = arrays_of(outputs)
        compiled = kernel[grid](*inputs, *results, **constants)
        self.compiled[compiled.hash] = compiled
        return results

    # what Triton asks a driver for, and its `utils`

    def get_current_device(self):
        return self  # so that no two share compiled kernels

    def get_current_target(self):
        return self.target

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 48 << 10}  # what every one has

    def load_binary(self, name, binary, shared, device):
        module, function, registers, spills, threads = None, None, 0, 0, 1024
        return module, function, registers, spills, threads

    def launcher_cls(self, source, metadata):
        return lambda *launch: None


def empty(shape, dtype):
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.empty(shape, dtype=dtype, device="meta")


def arrays_of(outputs):
    return [empty(o.shape, o.dtype) if isinstance(o, launch.New) else o for o in outputs]


@dataclass(frozen=True)
class Problem:
    """The arrays of a call, of one map or the same one several times."""

    dtype: str = "float32"
    boxes: str | None = None  # a dtype: boxes and image indices are columns of one array
    last: bool = False  # channels
    images: int = 2
    channels: int = 256
    size: tuple[int, int] = (50, 76)
    bins: tuple[int, int] = (7, 7)
    count: int = 50
    maps: int = 1
    scales: tuple[float, float] = (0.25, 0.5)
    rule: tuple[float, ...] = (2.0, 0.5, 0.0, 1.0, -math.inf, 0.0)

    def arrays(self):
        """features, output, RoIs, tangent"""
        order = torch.channels_last if self.last else torch.contiguous_format
        features = empty((self.images, self.channels, *self.size), self.dtype)
        output = empty((self.count, self.channels, *self.bins), self.dtype)
        coordinate = "float64" if self.dtype == "float64" else "float32"
        if self.boxes is None:
            boxes, index = empty((self.count, 4), coordinate), empty((self.count,), "int64")
        else:
            rois = empty((self.count, 5), self.boxes)
            boxes, index = rois[:, 1:], rois[:, 0]
        levels = None if self.maps == 1 else empty((self.count,), "int8")
        features, output = (array.to(memory_format=order) for array in (features, output))
        return features, output, Rois(boxes, index, levels), empty((self.count, 4), coordinate)

    def launch(self, operation, call, along=False):
        """An operation; with a tangent too."""
        features, output, rois, tangent = self.arrays()
        maps, d_boxes = [features] * self.maps, empty(tangent.shape, tangent.dtype)
        numbers = self.scales * self.maps, self.rule
        tangent = tangent if along else None
        arguments = {
            "forward": (maps, rois, tangent, *numbers, output),
            "adjoint": (output, rois, tangent, *numbers, maps),
            "box_gradient": (output, maps, rois, *numbers, d_boxes),
        }
        getattr(launch, operation)(call, *arguments[operation])

    def run(self, call):
        for operation in OPERATIONS:
            self.launch(operation, call)
        for operation in OPERATIONS[:2]:
            self.launch(operation, call, along=True)

    def launches(self, *operations):
        """What is launched, of all operations or of these."""
        found = []

        def call(kernel, grid, inputs, outputs, **constants):
            made = [output for output in outputs if isinstance(output, launch.New)]
            outputs = arrays_of(outputs)
            named = dict(zip(kernel.arg_names, [*inputs, *outputs], strict=False))
            found.append(Launch(kernel.fn.__name__, grid, named, made, constants))
            return outputs

        if not operations:
            self.run(call)
        for operation in operations:
            self.launch(operation, call)
        return found

    def kept(self, operation):
        """What `compiled` keeps of an operation, and the arrays of a call, in their order."""
        features, output, rois, d_boxes = self.arrays()
        maps = [features] * self.maps
        d_output, results = (None, [output]) if operation == "forward" else (output, [d_boxes])
        if operation == "adjoint":
            results, maps = maps, []
        arrays = [d_output, *rois, None, *results, *maps]
        kinds = tuple([x if x is None else (x.shape, x.stride(), x.dtype) for x in arrays])
        numbers = len(results), kinds, self.scales * self.maps, self.rule
        return compiled.operation_of(launch, operation, *numbers), arrays


def memory(launches):
    """Bytes of the arrays that a call makes."""
    return sum(empty(new.shape, new.dtype).nbytes for each in launches for new in each.made)


@dataclass(frozen=True)
class Variant:
    """A compiled kernel."""

    kernel: str
    dtype: str  # Triton's name; of `axis_taps`, that of the coordinates
    constants: dict
    code: str  # PTX, or AMD's assembly
    registers: int
    memory: int  # what is spilled of them, in bytes or registers
    shared: int  # bytes

    @property
    def row(self):
        """The row of the table that it belongs to."""
        values = self.constants
        layout = "-"
        if "COLUMNS" in values:
            layout = "columns" if values["COLUMNS"] else "rows"
        elif "INNERMOST" in values:
            layout = "channels last" if values["INNERMOST"] else "channels first"
            layout += ", 16" if values["ALIGNED"] else ""
        elif "TAPS" in values:
            layout = "few" if values["TAPS"] else "many"
            if self.kernel == "gather":
                layout += ", channels last" if values["LAST"] else ", channels first"
            elif self.kernel == "plan":
                layout += ", slopes" if values["SLOPES"] else ""
                layout += ", packed" if values["PACK"] else ""
        elif "LAST" in values:
            layout = "channels last" if values["LAST"] else "channels first"
        elif "PACK" in values:
            layout = "packed" if values["PACK"] else "-"
        return self.kernel, self.dtype, str(values.get("TABLES", "-")), layout


def problems(dtypes):
    """What takes all paths of all kernels, with the largest blocks that they are given."""
    for dtype in dtypes:
        yield Problem(dtype)
        yield Problem(dtype, last=True)
        yield Problem(dtype, last=True, channels=250)
        for last in (False, True):  # too many for any kernels by rows; 32 bits do not address them
            yield Problem(dtype, last=last, images=20000)
        if dtype in ("float16", "float64"):
            floor = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
            yield Problem(dtype, boxes=dtype, bins=(64, 64), rule=floor)


def others(dtypes):
    """Other paths of what has sorted rows: few RoIs, many bins; adaptive, or of several maps."""
    for dtype in dtypes:
        yield Problem(dtype, count=20)
        yield Problem(dtype, last=True, bins=(7, 65))
        for last in (False, True):
            yield Problem(dtype, last=last, rule=(0.0, *Problem.rule[1:]), maps=1 + last)


def compile_all(name, dtypes):
    """Every kernel for a target: list of `Variant`."""
    device = Device(TARGETS[name])
    for problem in problems(dtypes):
        problem.run(device.call)
    for problem in others(dtypes):
        problem.launch("forward", device.call)
        problem.launch("box_gradient", device.call)
    return [_variant(compiled) for compiled in device.compiled.values()]


def _variant(compiled):
    source, metadata = compiled.src, compiled.metadata
    kernel, names = source.fn.__name__, source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    constants.pop("REAL", None)  # an object of Triton's; `weights` have that type
    typed = ["weights"] if kernel == "axis_taps" else ["d_output", "features", "source"]
    kinds = [source.signature[name] for name in typed if name in source.signature]
    nvidia = metadata.target.backend == "cuda"
    registers, memory = (_nvidia if nvidia else _amd)(compiled.asm)
    return Variant(
        kernel=kernel,
        dtype=kinds[0].lstrip("*") if kinds else "-",
        constants=constants,
        code=compiled.asm["ptx" if nvidia else "amdgcn"],
        registers=registers,
        memory=memory,
        shared=metadata.shared,
    )


def _nvidia(asm):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd(asm):
    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"])[1])

    return number("vgpr_count"), number("vgpr_spill_count")


def pool():
    """Processes that compile; the kernels of this one stay as they are."""
    return ProcessPoolExecutor(mp_context=get_context("spawn"))


def table(variants):
    """Lines of Markdown: target -> its variants, the most that those of a row need."""
    needs = {}
    for target, found in variants.items():
        for variant in found:
            most = needs.setdefault(variant.row, {}).get(target, (0, 0))
            needs[variant.row][target] = (
                max(most[0], variant.registers),
                max(most[1], variant.shared),
            )
    titles = ["kernel", "dtype", "tables", "layout", *variants]
    yield "| " + " | ".join(titles) + " |"
    yield "|---" * len(titles) + "|"
    for row in sorted(needs):
        cells = ["{} / {}".format(*needs[row][target]) for target in variants]
        yield "| " + " | ".join([*row, *cells]) + " |"


def main():
    with pool() as processes:
        jobs = {target: processes.submit(compile_all, target, DTYPES) for target in GATED}
        variants = {target: job.result() for target, job in jobs.items()}
    heading = "## The table\n"
    before, _, _ = PAGE.read_text(encoding="utf-8").partition(heading)
    lines = [f"Triton {triton.__version__}.", "", *table(variants), ""]
    PAGE.write_text(before + heading + "\n" + "\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
