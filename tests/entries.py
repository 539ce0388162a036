"""The core's entries for XLA and MindSpore, called from here as those libraries call them."""

import ctypes
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)

import numpy as np

import tolerance
from roialign import _core, _rule

OPERATIONS = {"forward": "output", "adjoint": "map", "box_gradient": "d_boxes"}  # its result


def arrays_of(problem, operation, tangent=None, maps=None, levels=None):
    """The arrays of a call by name, in their order; results hold NaN."""
    maps = {f"map {i}": a for i, a in enumerate(maps or [problem.features])}
    rois = {"boxes": problem.boxes, "index": problem.index.astype(np.int32)}
    rois |= {} if levels is None else {"levels": levels}
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

LIBRARY = ctypes.CDLL(_core.__file__)
DONE, REFUSED, FAILED, SECOND_DERIVATIVE = range(4)


def c_code(name, *arrays, claimed=None):
    """The code that an entry returns. `claimed`: the shapes that it is told."""
    count = len(arrays)
    names = [{tolerance.BFLOAT16: "bfloat16"}.get(a.dtype, a.dtype.name).encode() for a in arrays]
    shapes = claimed or [a.shape for a in arrays]
    shapes = [(c_int64 * max(len(shape), 1))(*shape) for shape in shapes]
    return getattr(LIBRARY, f"roialign_{name}")(
        count,
        (c_void_p * count)(*(a.ctypes.data for a in arrays)),
        (c_int * count)(*(a.ndim for a in arrays)),
        (POINTER(c_int64) * count)(*shapes),
        (c_char_p * count)(*names),
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


# XLA's: its structures, each with XLA's name and, for a field that the core reads, XLA's name of it

LAYOUTS = {}


def layout(ours, theirs, **fields):
    LAYOUTS[ours] = (theirs, {name: their for name, (their, _) in fields.items() if their})
    kinds = [(name, kind) for name, (_, kind) in fields.items()]
    return type(ours, (Structure,), {"_fields_": kinds})


HEAD = {"size": ("struct_size", c_size_t), "extensions": ("extension_start", c_void_p)}
Extension = layout(
    "Extension", "XLA_FFI_Extension_Base",
    size=("struct_size", c_size_t), type=("type", c_int32), next=("next", c_void_p),
)  # fmt: skip
ApiVersion = layout(
    "ApiVersion", "XLA_FFI_Api_Version",
    **HEAD, major=("major_version", c_int32), minor=("minor_version", c_int32),
)  # fmt: skip
Metadata = layout(
    "Metadata", "XLA_FFI_Metadata",
    size=("struct_size", c_size_t), api_version=("api_version", ApiVersion),
    traits=("traits", c_int32), state=(None, c_int64),
)  # fmt: skip
MetadataExtension = layout(
    "MetadataExtension", "XLA_FFI_Metadata_Extension",
    base=("extension_base", Extension), metadata=("metadata", POINTER(Metadata)),
)  # fmt: skip
Buffer = layout(
    "Buffer", "XLA_FFI_Buffer",
    **HEAD, dtype=("dtype", c_int32), data=("data", c_void_p), rank=("rank", c_int64),
    dims=("dims", POINTER(c_int64)),
)  # fmt: skip
Buffers = layout(
    "Buffers", "XLA_FFI_Args",
    **HEAD, count=("size", c_int64), types=("types", POINTER(c_int32)),
    items=("args", POINTER(c_void_p)),
)  # fmt: skip
Text = layout("Text", "XLA_FFI_ByteSpan", begin=("ptr", c_char_p), size=("len", c_size_t))
Scalar = layout(
    "Scalar", "XLA_FFI_Scalar", dtype=("dtype", c_int32), value=("value", POINTER(c_double))
)
Attributes = layout(
    "Attributes", "XLA_FFI_Attrs",
    **HEAD, count=("size", c_int64), types=("types", POINTER(c_int32)),
    names=("names", POINTER(POINTER(Text))), items=("attrs", POINTER(c_void_p)),
)  # fmt: skip
ErrorArguments = layout(
    "ErrorArguments", "XLA_FFI_Error_Create_Args",
    **HEAD, message=("message", c_char_p), code=("errc", c_int32),
)  # fmt: skip
CreateError = ctypes.CFUNCTYPE(c_void_p, POINTER(ErrorArguments))
Api = layout(
    "Api", "XLA_FFI_Api",
    **HEAD, api_version=("api_version", ApiVersion), internal=("internal_api", c_void_p),
    create_error=("XLA_FFI_Error_Create", CreateError),
)  # fmt: skip
CallFrame = layout(
    "CallFrame", "XLA_FFI_CallFrame",
    **HEAD, api=("api", POINTER(Api)), context=("ctx", c_void_p), stage=("stage", c_int32),
    arguments=("args", Buffers), results=("rets", Buffers), attributes=("attrs", Attributes),
    future=(None, c_void_p),
)  # fmt: skip

DTYPES = {"bool": 1, "int32": 4, "int64": 5, "float16": 10, "float32": 11, "float64": 12,
          "bfloat16": 16}  # fmt: skip
EXECUTE = 3


def handler(name):
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return ctypes.CFUNCTYPE(c_void_p, POINTER(CallFrame))(pointer(_core.xla_handlers[name], None))


class Frame:
    """One call of a handler: arrays and attributes as a frame, which can then be spoilt."""

    def __init__(self, arguments=(), results=(), numbers=None):
        self.kept, self.errors, numbers = [], [], numbers or {}

        @CreateError
        def create_error(arguments):
            self.errors.append((arguments.contents.code, arguments.contents.message.decode()))
            return 1

        self.api = Api(ctypes.sizeof(Api), None, ApiVersion(), None, create_error)
        self.frame = CallFrame(
            CallFrame.future.offset, None, ctypes.pointer(self.api), None, EXECUTE
        )
        self.frame.arguments = self.buffers(arguments)
        self.frame.results = self.buffers(results)
        count = len(numbers)
        self.names = [Text(name.encode(), len(name)) for name in numbers]
        scalars = [Scalar(12, ctypes.pointer(c_double(number))) for number in numbers.values()]
        self.frame.attributes = Attributes(
            ctypes.sizeof(Attributes), None, count, (c_int32 * count)(*[3] * count),
            (POINTER(Text) * count)(*map(ctypes.pointer, self.names)),
            (c_void_p * count)(*map(ctypes.addressof, scalars)),
        )  # fmt: skip
        self.kept += [scalars]

    def buffers(self, arrays):
        """Of (array, the shape that is told) pairs."""
        items = []
        for array, shape in arrays:
            dims = (c_int64 * max(1, array.ndim))(*shape)
            head = ctypes.sizeof(Buffer), None, DTYPES[array.dtype.name]
            items.append(Buffer(*head, array.ctypes.data, array.ndim, dims))
        self.kept += [arrays, items]
        pointers = (c_void_p * max(1, len(items)))(*[ctypes.addressof(b) for b in items])
        types = (c_int32 * max(1, len(items)))(*[1] * len(items))
        return Buffers(ctypes.sizeof(Buffers), None, len(items), types, pointers)

    def call(self, name):
        """The errors: (code, message)."""
        failed = handler(name)(byref(self.frame))
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
