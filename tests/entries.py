"""The core's entries for XLA and MindSpore, called from here as those libraries call them."""

import ctypes as ct
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import tolerance
from roialign import _core, _rule

OPERATIONS = {"forward": "output", "adjoint": "map", "box_gradient": "d_boxes"}  # its result


def arrays_of(problem, operation, tangent=None, maps=None, levels=None, selectors=()):
    """The arrays of a call by name, in their order; results hold NaN."""
    maps = {f"map {i}": a for i, a in enumerate(maps or [problem.features])}
    rois = {"boxes": problem.boxes, "index": problem.index.astype(np.int32)}
    rois |= {} if levels is None else {"levels": levels}
    rois |= {f"selector {i}": a for i, a in enumerate(selectors)}
    g = {"d_output": problem.draw_output()}
    if operation == "forward":
        return rois | maps | {"tangent": tangent, "output": np.full_like(*g.values(), np.nan)}
    if operation == "adjoint":
        results = {name: np.full_like(a, np.nan) for name, a in maps.items()}
        return rois | g | {"tangent": tangent} | results
    return rois | g | maps | {"d_boxes": np.full_like(problem.boxes, np.nan)}


def results_of(operation, arrays):
    return [array for name, array in arrays.items() if name.startswith(OPERATIONS[operation])]


def rule_of(problem):
    numbers = _rule.vector(problem.convention, problem.sampling)
    return dict(zip(_core.rule_names, numbers, strict=True))


# MindSpore's

LIBRARY = ct.CDLL(_core.__file__)
DONE, REFUSED, FAILED, NO_DERIVATIVE = range(4)


def c_code(name, *arrays, claimed=None):
    """The code that an entry returns. `claimed`: the shapes that it is told."""
    count = len(arrays)
    names = [{tolerance.BFLOAT16: "bfloat16"}.get(a.dtype, a.dtype.name).encode() for a in arrays]
    shapes = claimed or [a.shape for a in arrays]
    shapes = [(ct.c_int64 * max(len(shape), 1))(*shape) for shape in shapes]
    return getattr(LIBRARY, f"roialign_{name}")(
        count,
        (ct.c_void_p * count)(*(a.ctypes.data for a in arrays)),
        (ct.c_int * count)(*(a.ndim for a in arrays)),
        (ct.POINTER(ct.c_int64) * count)(*shapes),
        (ct.c_char_p * count)(*names),
        None,
        None,
    )


def numbers_of(scales, rule, threads=1.0):
    return np.array([threads, len(scales) / 2, *scales, *rule.values()])


def mindspore(operation, arrays, scales, rule, claimed=None):
    """Whether the call was done."""
    arrays = {"numbers": numbers_of(scales, rule), **arrays}
    given = [np.zeros(1, np.float32) if a is None else a for a in arrays.values()]
    if claimed:
        claimed = [claimed.get(name, a.shape) for name, a in zip(arrays, given, strict=True)]
    code = c_code(operation, *given, claimed=claimed)
    assert code in (DONE, REFUSED, FAILED)
    return code == DONE


# XLA's: the structures that the core declares

HEADER = Path(__file__).parent.parent / "csrc" / "bindings" / "xla.hpp"
INTS = "int", "int32_t", "uint32_t", "DataType", "ErrorCode"
KINDS = {"size_t": ct.c_size_t, "int64_t": ct.c_int64, "char*": ct.c_char_p}
KINDS |= dict.fromkeys(INTS, ct.c_int32)
KINDS |= dict.fromkeys(("void*", "Extension*", "Handler*"), ct.c_void_p)


def structures():
    """Name -> class."""
    found = {}

    def kind_of(text):
        if text == "Error*":  # the function that makes it
            return ct.CFUNCTYPE(ct.c_void_p, ct.POINTER(found["ErrorArguments"]))
        return (KINDS | found).get(text) or ct.POINTER(kind_of(text[:-1]))

    text = HEADER.read_text(encoding="utf-8")
    for name, body in re.findall(r"^struct (\w+) \{[^\n]*\n(.*?)^\};", text, re.M | re.S):
        lines = re.findall(r"^  (?:const )?([\w*]+) (.+);", body, re.M)
        words = [(kind_of(kind), re.findall(r"\b[a-z]\w*", names)) for kind, names in lines]
        fields = [(each, kind) for kind, names in words for each in names]
        found[name] = type(name, (ct.Structure,), {"_fields_": fields})
    return found


XLA = SimpleNamespace(**structures())
CreateError = dict(XLA.Api._fields_)["create_error"]

DTYPES = {"complex64": 15, "int32": 4, "int64": 5, "float16": 10, "float32": 11, "float64": 12,
          "bfloat16": 16}  # fmt: skip
EXECUTE = 3


def handler(name):
    pointer = ct.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ct.c_void_p, [ct.py_object, ct.c_char_p]
    return ct.CFUNCTYPE(ct.c_void_p, ct.POINTER(XLA.CallFrame))(
        pointer(_core.xla_handlers[name], None)
    )


class Frame:
    """One call of a handler: arrays and attributes as a frame, which can then be spoilt."""

    def __init__(self, arguments=(), results=(), numbers=None):
        self.kept, self.errors, numbers = [], [], numbers or {}

        @CreateError
        def create_error(arguments):
            self.errors.append((arguments.contents.code, arguments.contents.message.decode()))
            return 1

        self.api = XLA.Api(ct.sizeof(XLA.Api), None, XLA.ApiVersion(), None, create_error)
        head = ct.sizeof(XLA.CallFrame), None, ct.pointer(self.api), None, EXECUTE
        self.frame = XLA.CallFrame(*head)
        self.frame.arguments = self.buffers(arguments)
        self.frame.results = self.buffers(results)
        count = len(numbers)
        self.names = [XLA.Text(name.encode(), len(name)) for name in numbers]
        values = (ct.c_double * count)(*numbers.values())
        scalars = [XLA.Scalar(12, ct.addressof(values) + 8 * i) for i in range(count)]
        self.frame.attributes = XLA.Attributes(
            ct.sizeof(XLA.Attributes), None, count, (ct.c_int32 * count)(*[3] * count),
            (ct.POINTER(XLA.Text) * count)(*map(ct.pointer, self.names)),
            (ct.c_void_p * count)(*map(ct.addressof, scalars)),
        )  # fmt: skip
        self.kept += [values, scalars]

    def buffers(self, arrays):
        """Of (array, the shape that is told) pairs."""
        items = []
        for array, shape in arrays:
            dims = (ct.c_int64 * max(1, array.ndim))(*shape)
            head = ct.sizeof(XLA.Buffer), None, DTYPES[array.dtype.name]
            items.append(XLA.Buffer(*head, array.ctypes.data, array.ndim, dims))
        self.kept += [arrays, items]
        pointers = (ct.c_void_p * max(1, len(items)))(*[ct.addressof(b) for b in items])
        types = (ct.c_int32 * max(1, len(items)))(*[1] * len(items))
        return XLA.Buffers(ct.sizeof(XLA.Buffers), None, len(items), types, pointers)

    def call(self, name):
        """The errors: (code, message)."""
        failed = handler(name)(ct.byref(self.frame))
        assert bool(failed) == bool(self.errors)
        return self.errors


def attributes_of(scales, rule):
    names = [f"scale_{axis}_{i}" for i in range(len(scales) // 2) for axis in "yx"]
    return {"maps": len(scales) / 2, **dict(zip(names, scales, strict=True)), **rule}


def frame(operation, arrays, numbers, claimed=None):
    told = {n: (a, (claimed or {}).get(n, a.shape)) for n, a in arrays.items() if a is not None}
    results = [told.pop(name) for name in list(told) if name.startswith(OPERATIONS[operation])]
    return Frame(list(told.values()), results, numbers)


def xla(operation, arrays, scales, rule, claimed=None):
    """Whether the call was done."""
    called = frame(operation, arrays, attributes_of(scales, rule), claimed)
    errors = called.call(f"{operation}_maps")
    assert all(code == 3 and message.startswith("roialign: ") for code, message in errors)
    return not errors
