"""Who computes: one record for each library and way of running it.

A test that takes the fixture `backend` is one body for all of them. It writes a function of arrays
as any user would, on the public functions; `run` calls it, `grad`, `jvp` and `vmap` transform it.
What such a function takes and closes over is the backend's own: `array` and `numpy` convert, in
tuples and lists too. A test of what not every backend has says so: `@pytest.mark.backends("grad")`.
"""

import importlib.util
import os
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np

import oracle
import roialign
import tolerance
from roialign import _core


class Foreign(Exception):
    """An array that the library has not."""


class Backend:
    name = ""
    needs = ()  # modules
    kind = np.ndarray  # of its arrays
    integers = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    traits = frozenset()  # of what tests ask for
    # "values"  a way of its own to results, not to derivatives alone
    # "exact"   the bits of NumPy's results
    # "fast"    takes hundreds of cases, compiles and interprets nothing; "slow" takes a few, and of
    #           many RoIs not those that "interprets"
    # "out"     takes `out`
    # "strided" an array keeps its strides
    # "bfloat16"; "bytes"  takes features of bytes
    # "maps"    takes several maps; "pyramids": by the public functions
    # "nhwc"    takes layout="NHWC"
    # "batched" takes boxes (N, M, 4)
    # "mixed index"  takes an integer index of NumPy beside boxes of its own
    # "raises"  on a bad image index; the others make that row zero: "zeroes"
    # "grad"    has derivatives; "twice": of them too, "mixed": of the boxes' too; "jvp"; "vmap";
    #           "func": all of JAX's names
    # "ways"    to run a function, other than its own
    # "kernels" Triton's, called by torch
    # "reductions"  other than the mean; "rotated" boxes
    # "narrow"  sums weights in float32, has no float64; else it is another backend of its library

    @property
    def family(self):
        """What CI installs for it."""
        return self.name.partition(".")[0]

    def missing(self):
        """Why it cannot run here, or None."""
        names = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(names)}" if names else None

    def start(self, monkeypatch):
        """Called before each test."""

    def stop(self):
        """Called after it."""

    @property
    def holds(self):
        """The dtypes of its arrays."""
        floats = "float16", "float32", "float64", "complex64", "complex128"
        return {"bool", *self.integers, *floats, *self.traits & {"bfloat16"}}

    @property
    def layouts(self):
        """Of arrays that it is given."""
        return ("contiguous", "channels_last") if "strided" in self.traits else ("contiguous",)

    def array(self, values):
        return _mapped(self._array, values)

    def numpy(self, values):
        return _mapped(self._numpy, values)

    def own(self, value):
        """What a user of the library would give: its own arrays, in the place of NumPy's."""
        if type(value) in (list, tuple):
            return type(value)(map(self.own, value))
        if type(value) is not np.ndarray or self.name == "numpy":
            return value
        if value.dtype.name not in self.holds or not value.dtype.isnative:
            raise Foreign
        return self.array(value)

    gone = ()  # functions that give a copy of an array, whose memory is gone

    def way(self, function):
        """How functions are run."""
        return function

    def run(self, function, *values):
        """The function of NumPy arrays, and its results as such."""
        return self.numpy(self.way(function)(*self.array(values)))

    def roi_align(self, features, rois, size, **options):
        """The public function, of NumPy arrays: `run`, where nothing else is to be done."""
        return self._run(roialign.roi_align, features, rois, size, options)

    def roi_align_adjoint(self, d_output, rois, shape, **options):
        return self._run(roialign.roi_align_adjoint, d_output, rois, shape, options)

    def _run(self, function, array, rois, number, options):
        form, rois = taken_apart(rois)
        features = [options.pop("features")] if "features" in options else []

        def call(array, *rest):
            given = {"features": rest[0]} if features else {}
            return function(array, form(*rest[len(given) :]), number, **given, **options)

        return self.run(call, array, *features, *rois)

    @contextmanager
    def threads(self, count):
        """Its calls have so many."""
        before = roialign.get_num_threads()
        roialign.set_num_threads(count)
        try:
            yield
        finally:
            roialign.set_num_threads(before)

    @property
    def layer_kinds(self):
        """`ROIAlign`, and the framework's own."""
        return [roialign.ROIAlign]

    def backward(self, function, argnums):
        """`grad`, but as most users have it."""
        return self.grad(function, argnums)

    def layers(self, *arguments):
        return [kind(*arguments) for kind in self.layer_kinds]

    def takes(self, maps=1, dtype=None, **others):
        """Whether a case with these parameters is for it; interpreted kernels take their time."""
        return (
            (maps == 1 or ("maps" in self.traits and "interprets" not in self.traits))
            and ("bytes" in self.traits or dtype not in tolerance.BYTES)
            and ("narrow" not in self.traits or dtype != np.float64)
            and ("bfloat16" in self.traits or dtype != tolerance.BFLOAT16)
        )

    def fair(self, problem):
        """Without the RoIs of which the oracle does not know its results."""
        return problem

    def check(self, problem, g, output, d_features, d_boxes):
        """Against the oracle, within the error bounds."""
        narrow = "narrow" in self.traits
        size = np.abs(problem.features.astype(np.float64)).max(initial=0)
        expected = oracle.forward(problem)
        bound = tolerance.forward(problem, expected, narrow=narrow)
        bound = self.bound(problem, bound, size)
        tolerance.check(output, expected, bound)
        expected, sums = oracle.adjoint(problem, g), np.abs(g.astype(np.float64))
        bound = tolerance.adjoint(problem, g, expected, narrow=narrow)
        bound = self.bound(problem, bound, sums.sum((0, 2, 3)).max(initial=0))
        tolerance.check(d_features, expected, bound)
        expected = oracle.box_gradient(problem, g)
        bound = tolerance.box_gradient(problem, g, expected, narrow=narrow)
        steps = size * sums.sum((1, 2, 3)).max(initial=0) * max(problem.scale)
        tolerance.check(d_boxes, expected, self.bound(problem, bound, steps))

    def bound(self, problem, bound, step):
        """Of a result that changes by `step` where a position changes by a pixel."""
        return bound

    no_second_derivative = NotImplementedError, "second derivative in the boxes"

    _array = _numpy = staticmethod(lambda array: array)


def _mapped(function, values):
    if isinstance(values, (tuple, list)):
        return type(values)(_mapped(function, each) for each in values)
    return function(values)


SAMPLED = {"reductions", "rotated"}
PYRAMIDS = {"pyramids", "nhwc", "batched", "mixed index"}


class Numpy(Backend):
    name = "numpy"
    traits = frozenset(
        {"values", "exact", "fast", "out", "strided", "bfloat16", "bytes", "maps", "raises"}
        | SAMPLED
        | PYRAMIDS
    )


class Packed(Numpy):
    """Every map packed into lines, which ever way would cost less."""

    name = "numpy.packed"
    forced = 1

    def start(self, monkeypatch):
        _core.force_way(self.forced)

    def stop(self):
        _core.force_way(0)


class ByRows(Packed):
    """Every map read and written in place, but for an adjoint in 16 bits."""

    name = "numpy.rows"
    forced = 2


class ByBins(Packed):
    """Every map whose channels are innermost read in place, bin by bin, in the forward."""

    name = "numpy.bins"
    forced = 3


class BySamples(Packed):
    """The forward and the adjoint of 1 or 2 samples add them up where they are."""

    name = "numpy.samples"
    forced = 4


class Torch(Backend):
    name, needs = "torch", ("torch",)
    traits = Numpy.traits | {"grad", "twice", "jvp", "ways"}
    device = "cpu"
    integers = Numpy.integers[:5]

    def start(self, monkeypatch):
        import torch

        self.torch, self.kind = torch, torch.Tensor

    def _array(self, array):
        if array.dtype == tolerance.BFLOAT16:
            whole = self.torch.from_numpy(np.array(array.view(np.int16))).view(self.torch.bfloat16)
        else:
            # a copy, but of what lies unaligned
            whole = self.torch.from_numpy(np.array(array) if array.flags.aligned else array)
        return whole.to(self.device)

    def _numpy(self, tensor):
        tensor = tensor.detach().cpu()
        if tensor.dtype is self.torch.bfloat16:
            return tensor.view(self.torch.int16).numpy().view(tolerance.BFLOAT16)
        return tensor.numpy()

    @property
    def gone(self):
        def emptied(tensor, before=0):
            """Where there is something before it, its address is not 0."""
            tensor = tensor.new_zeros(before + tensor.numel())[before:].view(tensor.shape)
            tensor.untyped_storage().resize_(0)
            return tensor

        return [emptied, lambda tensor: emptied(tensor, 1)]

    @contextmanager
    def threads(self, count):
        before = self.torch.get_num_threads()
        self.torch.set_num_threads(count)
        try:
            with super().threads(count):
                yield
        finally:
            self.torch.set_num_threads(before)

    @property
    def layouts(self):
        return (*super().layouts, "unaligned") if "strided" in self.traits else super().layouts

    @property
    def layer_kinds(self):
        return [roialign.ROIAlign, roialign.torch.ROIAlign]

    def grad(self, function, argnums=0):
        """By autograd: of a function that gives a number."""
        several = argnums if isinstance(argnums, tuple) else (argnums,)

        def gradients(*arrays):
            arrays = list(arrays)
            for i in several:
                if not arrays[i].requires_grad:
                    arrays[i] = arrays[i].detach().requires_grad_()
            leaves = [arrays[i] for i in several]
            number = self.way(function)(*arrays)
            found = self.torch.autograd.grad(number, leaves, create_graph="twice" in self.traits)
            return found if isinstance(argnums, tuple) else found[0]

        return gradients

    def jvp(self, function, primals, tangents):
        """By dual numbers."""
        forward_ad = self.torch.autograd.forward_ad
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, primals, tangents)
            return tuple(forward_ad.unpack_dual(function(*duals)))

    def ways(self, pool, given):
        """Functions that pool features and any number of RoIs, and where they are called."""

        class Module(self.torch.nn.Module):
            def forward(self, *given):
                return pool(*given)

        @contextmanager
        def deterministic():
            self.torch.use_deterministic_algorithms(True)
            try:
                yield
            finally:
                self.torch.use_deterministic_algorithms(False)

        checkpoint = self.torch.utils.checkpoint.checkpoint
        yield lambda *given: checkpoint(pool, *given, use_reentrant=False), nullcontext
        yield pool, deterministic
        yield self.torch.compile(pool, fullgraph=True, dynamic=True), nullcontext
        yield self.torch.jit.trace(pool, given), nullcontext
        yield pool, lambda: self.torch.autocast(self.device, self.torch.bfloat16)
        dynamic = None, *[{0: self.torch.export.Dim.DYNAMIC}] * (len(given) - 1)
        exported = self.torch.export.export(Module(), given, dynamic_shapes=(dynamic,))
        yield exported.module(), nullcontext


class TorchFunc(Torch):
    name = "torch.func"
    traits = frozenset({"bytes", "maps", "grad", "twice", "mixed", "jvp", "vmap", "func", *SAMPLED})

    @property
    def func(self):
        return self.torch.func

    def grad(self, function, argnums=0):
        return self.torch.func.grad(function, argnums)

    def jvp(self, function, primals, tangents):
        return self.torch.func.jvp(function, tuple(primals), tuple(tangents))

    def vmap(self, function, in_axes=0):
        return self.torch.func.vmap(function, in_axes)


class TorchCompile(Torch):
    name = "torch.compile"
    traits = Torch.traits - {"fast", "out", "strided", "twice", "jvp", "ways"} | {"slow"}

    def way(self, function):
        self.torch.compiler.reset()
        return self.torch.compile(function, fullgraph=True, backend="aot_eager")

    def stop(self):
        self.torch.compiler.reset()


class Triton(TorchFunc):
    """The GPU's kernels: in Triton's interpreter, on tensors of the CPU that pass for a GPU's; with
    TRITON_INTERPRET=0 on the GPU that is there."""

    name, needs = "triton", ("torch", "triton")
    traits = (Torch.traits | TorchFunc.traits) - SAMPLED - {"exact", "fast", "raises"}
    traits |= {"slow", "interprets", "zeroes", "kernels"}
    backward = Torch.grad
    interpreted = os.environ.get("TRITON_INTERPRET", "1") == "1"
    device = "cpu" if interpreted else "cuda"
    folder = "_triton"

    def missing(self):
        if not super().missing() and not self.interpreted:
            import torch

            return None if torch.cuda.is_available() else "needs a GPU, or TRITON_INTERPRET=1"
        return super().missing()

    def start(self, monkeypatch):
        super().start(monkeypatch)
        if self.interpreted:
            import triton_interpreter

            triton_interpreter.hasten()
            home = lambda tensor: None if tensor.is_meta else self.folder  # noqa: E731
            monkeypatch.setattr(roialign.torch.kernels, "home", home)
            self.torch.use_deterministic_algorithms(True)  # and so new memory holds NaN
        self.errors = np.seterr(all="ignore")  # silent on a GPU

    def stop(self):
        self.torch.use_deterministic_algorithms(False)
        np.seterr(**self.errors)


class Ascend(Triton):
    """The matrix products for Ascend, in the same interpreter; it has the family's environment."""

    name, folder = "triton.ascend", "_ascend"
    traits = Triton.traits - TorchFunc.traits - {"out", "strided", "ways"} | {"maps", "narrow"}

    def missing(self):
        return super().missing() if self.interpreted else "is played by the interpreter"

    def start(self, monkeypatch):
        super().start(monkeypatch)
        monkeypatch.setenv("ROIALIGN_NPU", "1")


class Jax(Backend):
    name, needs = "jax", ("jax",)
    traits = (Numpy.traits | TorchFunc.traits) - {"out", "strided"} | {"ways"}

    def start(self, monkeypatch):
        import jax

        jax.config.update("jax_enable_x64", True)
        self.jax = self.func = jax
        self.kind = jax.Array

    def _array(self, array):
        return self.jax.numpy.asarray(array)

    _numpy = staticmethod(np.asarray)

    @property
    def gone(self):
        def deleted(array):
            copy = array.copy()
            copy.delete()  # as where it was donated
            return copy

        return [deleted]

    def grad(self, function, argnums=0):
        return self.way(self.jax.grad(function, argnums))

    def jvp(self, function, primals, tangents):
        along = lambda primals, tangents: self.jax.jvp(function, primals, tangents)  # noqa: E731
        return self.way(along)(tuple(primals), tuple(tangents))

    def vmap(self, function, in_axes=0):
        return self.way(self.jax.vmap(function, in_axes))

    def ways(self, pool, given):
        jit, cond, scan = self.jax.jit, self.jax.lax.cond, self.jax.lax.scan
        other = lambda *given: 2 * pool(*given)  # noqa: E731
        yield pool, self.jax.disable_jit
        for function in (
            self.jax.checkpoint(pool),
            jit(lambda features, *rois: cond(features.sum() < 1e9, pool, other, features, *rois)),
            lambda *given: scan(lambda carry, _: (carry, pool(*given)), 0, None, length=1)[1][0],
            lambda features, *rois: jit(lambda features: pool(features, *rois))(features),
            lambda features, *rois: jit(lambda *rois: pool(features, *rois))(*rois),
            lambda *given: jit(lambda: pool(*given))(),
        ):
            yield function, nullcontext


class JaxJit(Jax):
    name = "jax.jit"
    traits = Jax.traits - {"fast", "raises", "ways"} | {"zeroes"}

    def way(self, function):
        return self.jax.jit(function)


class JaxDense(JaxJit):
    """The way of platforms without a kernel, on the CPU."""

    name = "jax.dense"
    traits = JaxJit.traits - {"exact"} | {"slow"}

    def start(self, monkeypatch):
        super().start(monkeypatch)
        monkeypatch.setattr(roialign.jax, "_dense_everywhere", True)

    def fair(self, problem):
        """Its positions differ by roundings: no sample may be so near a jump, nor so far away."""
        far = np.isfinite(problem.boxes) & (np.abs(problem.boxes) > 1e5)
        problem = chosen(problem, ~far.any(1))
        fixed = oracle.smooth(problem, moved(problem) / np.tile(problem.scale[::-1], 2))
        assert fixed.mean() > 0.7
        return chosen(problem, fixed)

    def bound(self, problem, bound, step):
        return 2 * bound + 8 * moved(problem) * step


class JaxGpu(JaxJit):
    """The way of GPUs, on the CPU: the kernels in Triton's interpreter. What has none is that of
    `JaxDense`."""

    name, needs = "jax_triton", ("jax", "triton")
    traits = JaxJit.traits - SAMPLED - {"exact"} | {"slow", "interprets"}

    def start(self, monkeypatch):
        import jax_triton_stand_in

        super().start(monkeypatch)
        jax_triton_stand_in.install(monkeypatch)


def chosen(problem, rows):
    return replace(problem, boxes=problem.boxes[rows], index=problem.index[rows])


def moved(problem, ulps=4):
    """What so many ulp in every position may change: at most the steps between pixels."""
    eps = np.finfo(problem.boxes.dtype if problem.features.dtype == np.float64 else np.float32).eps
    scale = np.tile(problem.scale[::-1], 2)
    coordinates = np.abs(problem.boxes[np.isfinite(problem.boxes).all(1)] * scale)
    return ulps * eps * (2 + coordinates.max(initial=1))


class MindSpore(Backend):
    name, needs = "mindspore", ("mindspore",)
    traits = Jax.traits - {"func", "mixed"}
    no_second_derivative = RuntimeError, "no.second.derivative.in.the.boxes"

    def load(self):
        import mindspore

        class Net(mindspore.nn.Cell):
            """A function as a network: Graph mode compiles it."""

            def __init__(self, function):
                super().__init__()
                self.function = function

            def construct(self, *inputs):
                return self.function(*inputs)

        self.mindspore, self.kind, self.way = mindspore, mindspore.Tensor, Net

    def start(self, monkeypatch):
        self.load()
        self.folder = getattr(self, "folder", None) or tempfile.TemporaryDirectory()
        monkeypatch.chdir(self.folder.name)  # the compiler writes a file where it fails

    def _array(self, array):
        if array.dtype == tolerance.BFLOAT16:
            return self.mindspore.Tensor(array.astype(np.float32)).astype(self.mindspore.bfloat16)
        return self.mindspore.Tensor(np.array(array, order="C"))

    def _numpy(self, tensor):
        if tensor.dtype == self.mindspore.bfloat16:
            return tensor.astype(self.mindspore.float32).asnumpy().astype(tolerance.BFLOAT16)
        return tensor.asnumpy()

    @property
    def layer_kinds(self):
        return [roialign.ROIAlign, roialign.mindspore.ROIAlign]

    def grad(self, function, argnums=0):
        return self.mindspore.grad(self.way(function), argnums)

    def jvp(self, function, primals, tangents):
        one = len(primals) == 1
        primals, tangents = (each[0] if one else tuple(each) for each in (primals, tangents))
        return self.mindspore.jvp(function, primals, tangents)

    def vmap(self, function, in_axes=0):
        return self.mindspore.vmap(function, in_axes)

    def ways(self, pool, given):
        for mode in ("ast", "bytecode"):
            yield self.mindspore.jit(pool, capture_mode=mode), nullcontext


class MindSporeGraph(MindSpore):
    name = "mindspore.graph"
    traits = MindSpore.traits - {"fast", "raises", "ways"} | {"slow", "zeroes", "mixed"}

    def start(self, monkeypatch):
        super().start(monkeypatch)
        self.mindspore.set_context(mode=self.mindspore.GRAPH_MODE)

    def stop(self):
        self.mindspore.set_context(mode=self.mindspore.PYNATIVE_MODE)


class Cupy(Backend):
    """A stand-in: CuPy makes no array without a GPU."""

    name, needs = "cupy", ("torch",)
    traits = Numpy.traits - {"strided", "bfloat16"}

    def start(self, monkeypatch):
        import cupy_stand_in

        cupy_stand_in.install(monkeypatch)
        self.kind = self._array = cupy_stand_in.Array
        self._numpy = lambda array: array.values

    def stop(self):
        sys.modules.pop("roialign.cupy", None)


BACKENDS = [
    kind()
    for kind in (
        Numpy, Packed, ByRows, ByBins, BySamples, Torch, TorchFunc, TorchCompile, Triton, Ascend,
        Cupy, Jax, JaxJit, JaxDense, JaxGpu, MindSpore, MindSporeGraph,
    )
]  # fmt: skip


def named(name):
    return next(backend for backend in BACKENDS if backend.name == name)


def choose(*traits):
    """The backends that have all of these traits; "-trait": that have it not."""
    return [
        backend
        for backend in BACKENDS
        if all((t.lstrip("-") in backend.traits) != t.startswith("-") for t in traits)
    ]


# Functions of the backend's arrays


def pair(boxes, image_index):
    return boxes, image_index


def array(rows):
    return rows


def per_image(*boxes):
    return list(boxes)


def batched(boxes):
    """(N, M, 4)"""
    return boxes


def taken_apart(rois):
    """(The form, the arrays of which it makes these rois.)"""
    if isinstance(rois, tuple):
        return pair, rois
    return (per_image, rois) if isinstance(rois, list) else (array, [rois])


def arrays_of(form, boxes, index, images=2):
    """What the form is made of; RoIs of a list are in the order of their images."""
    if form is pair:
        return boxes, index
    if form is array:
        return (np.column_stack([index.astype(boxes.dtype), boxes]),)
    listed = tuple(boxes[index == image] for image in range(images))
    return (np.stack(listed),) if form is batched else listed


def pooling(problem, form=pair):
    """`roi_align` of features and the arrays of which `form` makes rois."""
    size, options = problem.size, problem.options

    def pool(features, *rois):
        return roialign.roi_align(features, form(*rois), size, **options)

    return pool


def summed(function, weights=1):
    """The sum of what a function gives, times weights."""

    def loss(*given):
        return (function(*given) * weights).sum()

    return loss


def operations(problem, form=pair):
    """Forward, adjoint and box gradient, each of features, d_output and the arrays of rois;
    they take more options, too."""
    size, shape, options = problem.size, problem.features.shape, problem.options

    def forward(features, d_output, *rois, **more):
        return roialign.roi_align(features, form(*rois), size, **options, **more)

    def adjoint(features, d_output, *rois, **more):
        return roialign.roi_align_adjoint(d_output, form(*rois), shape, **options, **more)

    def box_gradient(features, d_output, *rois, **more):
        return roialign.roi_align_box_gradient(d_output, features, form(*rois), **options, **more)

    return forward, adjoint, box_gradient


def three(problem, form=pair):
    """All of them at once."""
    forward, adjoint, box_gradient = operations(problem, form)

    def results(*given):
        return forward(*given), adjoint(*given), box_gradient(*given)

    return results


def calls(problems, form=pair):
    """Of the maps of these problems: forward(*maps, *rois); adjoint(d_output, *rois), which gives a
    tuple; box_gradient(d_output, *maps, *rois). With several maps the last of the rois are their
    levels."""
    problem, count = problems[0], len(problems)
    if count == 1:
        pool, (_, adjoint, box_gradient) = pooling(problem, form), operations(problem, form)

        def adjoint_of_one(d_output, *rois):
            return (adjoint(None, d_output, *rois),)

        def box_gradient_of_one(d_output, features, *rois):
            return box_gradient(features, d_output, *rois)

        return pool, adjoint_of_one, box_gradient_of_one
    shapes, size = [p.features.shape for p in problems], problem.size
    options = {"spatial_scales": [p.scale for p in problems], "convention": problem.convention}
    options["sampling_ratio"] = problem.sampling

    def forward_of_several(*given, **more):
        *maps, boxes, index, levels = given
        return roialign.multiscale_roi_align(
            maps, (boxes, index), size, levels=levels, **options, **more
        )

    def adjoint_of_several(d_output, boxes, index, levels, **more):
        d_maps = roialign.multiscale_roi_align_adjoint(
            d_output, (boxes, index), shapes, levels=levels, **options, **more
        )
        return tuple(d_maps)

    def box_gradient_of_several(d_output, *given):
        *maps, boxes, index, levels = given
        return roialign.multiscale_roi_align_box_gradient(
            d_output, maps, (boxes, index), levels=levels, **options
        )

    return forward_of_several, adjoint_of_several, box_gradient_of_several
