"""XLA's C interface: its layouts as declared here, and handlers that no call can harm."""

import ctypes
import os
import shutil
import subprocess
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path

import numpy as np
import pytest

import oracle
import tolerance
from roialign import _core, _rule

CSRC = Path(__file__).parent.parent / "csrc"

# ours: XLA's name, and the fields of both
LAYOUTS = {
    "Extension": (
        "XLA_FFI_Extension_Base",
        {"size": "struct_size", "type": "type", "next": "next"},
    ),
    "ApiVersion": (
        "XLA_FFI_Api_Version",
        {"size": "struct_size", "extensions": "extension_start", "major": "major_version",
         "minor": "minor_version"},
    ),
    "Metadata": (
        "XLA_FFI_Metadata",
        {"size": "struct_size", "api_version": "api_version", "traits": "traits"},
    ),
    "MetadataExtension": (
        "XLA_FFI_Metadata_Extension",
        {"base": "extension_base", "metadata": "metadata"},
    ),
    "Buffer": (
        "XLA_FFI_Buffer",
        {"size": "struct_size", "extensions": "extension_start", "dtype": "dtype", "data": "data",
         "rank": "rank", "dims": "dims"},
    ),
    "Text": ("XLA_FFI_ByteSpan", {"begin": "ptr", "size": "len"}),
    "Scalar": ("XLA_FFI_Scalar", {"dtype": "dtype", "value": "value"}),
    "Attributes": (
        "XLA_FFI_Attrs",
        {"size": "struct_size", "extensions": "extension_start", "count": "size", "types": "types",
         "names": "names", "items": "attrs"},
    ),
    "ErrorArguments": (
        "XLA_FFI_Error_Create_Args",
        {"size": "struct_size", "extensions": "extension_start", "message": "message",
         "code": "errc"},
    ),
    "Api": (
        "XLA_FFI_Api",
        {"size": "struct_size", "api_version": "api_version", "internal": "internal_api",
         "create_error": "XLA_FFI_Error_Create"},
    ),
    "CallFrame": (
        "XLA_FFI_CallFrame",
        {"size": "struct_size", "extensions": "extension_start", "api": "api", "context": "ctx",
         "stage": "stage", "arguments": "args", "results": "rets", "attributes": "attrs"},
    ),
}  # fmt: skip
BUFFERS = {"XLA_FFI_Args": "args", "XLA_FFI_Rets": "rets"}
CONSTANTS = {
    "kMetadataExtension": "XLA_FFI_Extension_Metadata",
    "kBuffer": "XLA_FFI_ArgType_BUFFER",
    "kScalar": "XLA_FFI_AttrType_SCALAR",
    "kExecute": "XLA_FFI_ExecutionStage_EXECUTE",
    "DataType::s32": "XLA_FFI_DataType_S32",
    "DataType::f16": "XLA_FFI_DataType_F16",
    "DataType::f32": "XLA_FFI_DataType_F32",
    "DataType::f64": "XLA_FFI_DataType_F64",
    "DataType::bf16": "XLA_FFI_DataType_BF16",
    "ErrorCode::invalid_argument": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "ErrorCode::resource_exhausted": "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED",
    "ErrorCode::internal": "XLA_FFI_Error_Code_INTERNAL",
    "kApiMajor": "XLA_FFI_API_MAJOR",
}


def assertions():
    layouts = dict(LAYOUTS)
    for theirs, items in BUFFERS.items():
        fields = {"size": "struct_size", "count": "size", "types": "types", "items": items}
        layouts[theirs] = (theirs, fields)
    for ours, (theirs, fields) in layouts.items():
        ours = "Buffers" if ours == theirs else ours
        for a, b in fields.items():
            yield f"offsetof({ours}, {a}) == offsetof({theirs}, {b})"
            yield f"sizeof({ours}::{a}) == sizeof({theirs}::{b})"
    for ours, theirs in CONSTANTS.items():
        yield f"int({ours}) == int({theirs})"
    # the sizes that XLA writes are those of the fields which 0.1 has
    yield "sizeof(CallFrame) <= XLA_FFI_CallFrame_STRUCT_SIZE"
    yield "sizeof(Buffer) == XLA_FFI_Buffer_STRUCT_SIZE"
    yield "sizeof(Buffers) == XLA_FFI_Args_STRUCT_SIZE"
    yield "sizeof(Buffers) == XLA_FFI_Rets_STRUCT_SIZE"
    yield "sizeof(Attributes) == XLA_FFI_Attrs_STRUCT_SIZE"
    yield "sizeof(ErrorArguments) >= XLA_FFI_Error_Create_Args_STRUCT_SIZE"
    yield "kApiMinor <= XLA_FFI_API_MINOR"


def test_layouts(tmp_path):
    jaxlib = pytest.importorskip("jaxlib", reason="the layouts are compared with jaxlib's headers")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "layouts.cpp"
    lines = ['#include "xla/ffi/api/c_api.h"', f'#include "{CSRC / "bindings" / "xla.hpp"}"',
             "using namespace roialign::xla;"]  # fmt: skip
    lines += [f'static_assert({a}, "{a}");' for a in assertions()]
    source.write_text("\n".join(lines) + "\n")
    include = Path(jaxlib.__file__).parent / "include"
    ran = subprocess.run(
        [
            *compiler.split(),
            "-std=c++17",
            "-fsyntax-only",
            "-Wno-invalid-offsetof",
            "-I",
            include,
            source,
        ],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


# The handlers, called as XLA calls them


def structure(name, *fields):
    return type(name, (Structure,), {"_fields_": list(fields)})


HEAD = (("size", c_size_t), ("extensions", c_void_p))
Extension = structure("Extension", ("size", c_size_t), ("type", c_int32), ("next", c_void_p))
ApiVersion = structure("ApiVersion", *HEAD, ("major", c_int32), ("minor", c_int32))
Metadata = structure(
    "Metadata",
    ("size", c_size_t),
    ("api_version", ApiVersion),
    ("traits", c_int32),
    ("state", c_int64),
)
MetadataExtension = structure(
    "MetadataExtension", ("base", Extension), ("metadata", POINTER(Metadata))
)
Buffer = structure(
    "Buffer",
    *HEAD,
    ("dtype", c_int32),
    ("data", c_void_p),
    ("rank", c_int64),
    ("dims", POINTER(c_int64)),
)
Buffers = structure(
    "Buffers", *HEAD, ("count", c_int64), ("types", POINTER(c_int32)), ("items", POINTER(c_void_p))
)
Text = structure("Text", ("begin", c_char_p), ("size", c_size_t))
Scalar = structure("Scalar", ("dtype", c_int32), ("value", POINTER(c_double)))
Attributes = structure(
    "Attributes", *HEAD, ("count", c_int64), ("types", POINTER(c_int32)),
    ("names", POINTER(POINTER(Text))), ("items", POINTER(c_void_p)),
)  # fmt: skip
ErrorArguments = structure("ErrorArguments", *HEAD, ("message", c_char_p), ("code", c_int32))
CreateError = ctypes.CFUNCTYPE(c_void_p, POINTER(ErrorArguments))
Api = structure(
    "Api", *HEAD, ("api_version", ApiVersion), ("internal", c_void_p), ("create_error", CreateError)
)
CallFrame = structure(
    "CallFrame", *HEAD, ("api", POINTER(Api)), ("context", c_void_p), ("stage", c_int32),
    ("arguments", Buffers), ("results", Buffers), ("attributes", Attributes), ("future", c_void_p),
)  # fmt: skip

DTYPES = {"int32": 4, "int64": 5, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}
EXECUTE = 3


def handler(name):
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return ctypes.CFUNCTYPE(c_void_p, POINTER(CallFrame))(pointer(_core.xla_handlers[name], None))


class Call:
    """One call of a handler: arrays and attributes as a frame, which can then be spoilt."""

    def __init__(self, arguments, results, numbers):
        self.kept, self.errors = [], []

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
        names = [Text(name.encode(), len(name)) for name in numbers]
        scalars = [Scalar(12, ctypes.pointer(c_double(number))) for number in numbers.values()]
        self.frame.attributes = Attributes(
            ctypes.sizeof(Attributes), None, count, (c_int32 * count)(*[3] * count),
            (POINTER(Text) * count)(*map(ctypes.pointer, names)),
            (c_void_p * count)(*map(ctypes.addressof, scalars)),
        )  # fmt: skip
        self.names = names
        self.kept += [scalars]

    def buffers(self, arrays):
        items = []
        for array in arrays:
            dims = (c_int64 * max(1, array.ndim))(*array.shape)
            items.append(
                Buffer(
                    ctypes.sizeof(Buffer),
                    None,
                    DTYPES[array.dtype.name],
                    array.ctypes.data,
                    array.ndim,
                    dims,
                )
            )
        self.kept += [arrays, items]
        pointers = (c_void_p * max(1, len(items)))(*[ctypes.addressof(b) for b in items])
        types = (c_int32 * max(1, len(items)))(*[1] * len(items))
        return Buffers(ctypes.sizeof(Buffers), None, len(items), types, pointers)

    def run(self, operation):
        return self.call(f"{operation}_maps")

    def call(self, name):
        failed = handler(name)(byref(self.frame))
        assert bool(failed) == bool(self.errors)
        return self.errors


def drawn(make_problem, operation, dtype=np.float32, tangent=False):
    """(problem, arguments, result, numbers) of a call that is right."""
    problem = make_problem(dtype=dtype)
    g, index = problem.draw_output(), problem.index.astype(np.int32)
    arrays = {"forward": [problem.features], "adjoint": [g], "box_gradient": [g, problem.features]}
    like = {"forward": g, "adjoint": problem.features, "box_gradient": problem.boxes}
    arguments = [problem.boxes, index, *arrays[operation]]
    if tangent:
        arguments.append(np.ones_like(problem.boxes))
    result = np.full_like(like[operation], np.nan)
    return problem, arguments, result, numbers_of(problem, [problem.scale])


def numbers_of(problem, scales):
    """The attributes of a call on maps with these scales."""
    rule = _rule.vector(problem.convention, problem.sampling)
    names = [f"scale_{axis}_{i}" for i in range(len(scales)) for axis in "yx"]
    numbers = dict(zip([*names, *_core.rule_names], [*np.ravel(scales), *rule], strict=True))
    return {"maps": len(scales), **numbers}


OPERATIONS = ("forward", "adjoint", "box_gradient")


@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
def test_forward(make_problem, dtype):
    problem, arguments, result, numbers = drawn(make_problem, "forward", dtype)
    assert not Call(arguments, [result], numbers).run("forward")
    expected = oracle.forward(problem)
    tolerance.check(result, expected, tolerance.forward(problem, expected))


def test_metadata():
    metadata = Metadata(ctypes.sizeof(Metadata), state=7)
    extension = MetadataExtension(
        Extension(ctypes.sizeof(MetadataExtension), 1, None), ctypes.pointer(metadata)
    )
    call = Call([], [], {})
    call.frame.extensions = ctypes.addressof(extension)
    assert not call.run("forward")
    assert (metadata.api_version.major, metadata.api_version.minor) == (0, 1)
    assert metadata.traits == 0 and metadata.state == 7
    metadata.size = 8
    assert "older interface" in call.run("forward")[0][1]


SPOILT = {
    "no arguments": lambda a, r, n: a.clear(),
    "no image index": lambda a, r, n: a.__delitem__(slice(1, None)),
    "no array": lambda a, r, n: a.__delitem__(slice(2, None)),
    "boxes of rank 1": lambda a, r, n: a.__setitem__(0, a[0][0]),
    "boxes of rank 3": lambda a, r, n: a.__setitem__(0, a[0][None]),
    "boxes (K, 5)": lambda a, r, n: a.__setitem__(0, np.zeros((7, 5), np.float32)),
    "fewer boxes": lambda a, r, n: a.__setitem__(0, a[0][:3].copy()),
    "more boxes": lambda a, r, n: a.__setitem__(
        slice(2), [np.tile(a[0], (9, 1)), np.tile(a[1], 9)]
    ),
    "integer boxes": lambda a, r, n: a.__setitem__(0, a[0].astype(np.int32)),
    "int64 image index": lambda a, r, n: a.__setitem__(1, a[1].astype(np.int64)),
    "float image index": lambda a, r, n: a.__setitem__(1, a[1].astype(np.float32)),
    "an array of rank 3": lambda a, r, n: a.__setitem__(2, a[2][0]),
    "another dtype": lambda a, r, n: a.__setitem__(2, a[2].astype(np.float16)),
    "an integer array": lambda a, r, n: a.__setitem__(2, a[2].astype(np.int32)),
    "fewer channels": lambda a, r, n: a.__setitem__(2, a[2][:, :2].copy()),
    "no result": lambda a, r, n: r.clear(),
    "a result of rank 1": lambda a, r, n: r.__setitem__(0, r[0].reshape(-1)),
    "a result of another dtype": lambda a, r, n: r.__setitem__(0, r[0].astype(np.float64)),
    "a result for fewer": lambda a, r, n: r.__setitem__(0, r[0][:, :3].copy()),
    "no maps": lambda a, r, n: n.pop("maps"),
    "zero maps": lambda a, r, n: n.update(maps=0),
    "too many maps": lambda a, r, n: n.update(maps=1e18),
    "maps that are not a number": lambda a, r, n: n.update(maps=np.nan),
    "no scale": lambda a, r, n: n.pop("scale_x_0"),
    "another scale": lambda a, r, n: n.update(scale_y_1=1.0),
    "a number of a later version": lambda a, r, n: n.update(of_tomorrow=0.0),
    "no numbers": lambda a, r, n: n.clear(),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_does_not_fit_is_an_error(make_problem, operation, name):
    _, arguments, result, numbers = drawn(make_problem, operation)
    results = [result]
    SPOILT[name](arguments, results, numbers)
    ((code, message),) = Call(arguments, results, numbers).run(operation)
    assert code == 3 and message.startswith("roialign: ")
    assert all(np.isnan(r.astype(np.float64)).all() for r in results)  # nothing was written


@pytest.mark.parametrize("side", [-1, 2**62])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_shapes_that_no_array_has(make_problem, operation, side):
    _, arguments, result, rule = drawn(make_problem, operation)
    for i, array in enumerate([*arguments, result]):
        for axis in range(array.ndim):
            call = Call(arguments, [result], rule)
            items = call.frame.arguments.items if i < len(arguments) else call.frame.results.items
            buffer = Buffer.from_address(items[i if i < len(arguments) else 0])
            buffer.dims[axis] = side
            assert [code for code, _ in call.run(operation)] == [3], (i, axis)
    assert np.isnan(result.astype(np.float64)).all()


@pytest.mark.parametrize("operation", ["forward", "adjoint"])
def test_a_tangent_that_does_not_fit(make_problem, operation):
    _, arguments, result, numbers = drawn(make_problem, operation, tangent=True)
    assert not Call(arguments, [result], numbers).run(operation) and np.isfinite(result).all()
    for wrong in (arguments[-1][:2].copy(), arguments[-1].astype(np.float64), arguments[-1][0]):
        assert Call([*arguments[:-1], wrong], [result], numbers).run(operation)[0][0] == 3


def test_bad_indices_give_zeros(make_problem):
    _, arguments, result, numbers = drawn(make_problem, "forward")
    arguments[1][:3] = 2, -1, 2**31 - 1
    assert not Call(arguments, [result], numbers).run("forward")
    assert not result[:3].any() and result[3:].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_structures_of_an_older_interface(make_problem, operation):
    _, arguments, result, numbers = drawn(make_problem, operation)
    for part in (None, "arguments", "results", "attributes"):
        call = Call(arguments, [result], numbers)
        whole = call.frame if part is None else getattr(call.frame, part)
        whole.size -= 8
        assert call.run(operation) == [(3, "roialign: XLA has an older interface")]
    call = Call(arguments, [result], numbers)
    call.frame.stage = 0
    assert call.run(operation) == [(3, "roialign: not a call")]
    call = Call(arguments, [result], numbers)
    call.frame.attributes.types[0] = 1
    assert call.run(operation)[0][0] == 3
    call = Call(arguments, [result], numbers)
    call.names[1].begin = b"scale_z_0"
    assert call.run(operation) == [(3, "roialign: a number is missing")]
    call = Call(arguments, [result], numbers)
    call.names[-1].begin = b"adoptive"
    assert call.run(operation) == [(3, "roialign: exported by a later version")]
    assert np.isnan(result).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_numbers_of_an_earlier_version(make_problem, operation):
    """What it did not know has its default."""
    _, arguments, expected, numbers = drawn(make_problem, operation)
    default = {"pixel_offset": 0, "input_offset": 0, "end_offset": 0, "min_size": -np.inf,
               "adaptive": 0}  # fmt: skip
    result = np.full_like(expected, np.nan)
    assert not Call(arguments, [expected], numbers | default).run(operation)
    fewer = {name: number for name, number in numbers.items() if name not in default}
    assert not Call(arguments, [result], fewer).run(operation)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_calls_of_roialign_0_1(operation):
    message = "roialign: exported by roialign 0.1: export it again"
    assert Call([], [], {}).call(operation) == [(3, message)]


# Several maps


@pytest.mark.parametrize("operation, tangent", [
    ("forward", False), ("forward", True), ("adjoint", False), ("adjoint", True),
    ("box_gradient", False),
])  # fmt: skip
def test_maps(make_problem, operation, tangent):
    """Each RoI on the map of its level: the bits of a call for each map."""
    problem, (boxes, index, *others), result, _ = drawn(make_problem, operation, tangent=tangent)
    maps, scales = (
        [problem.features, problem.features[:, :, 2:, 1:].copy()],
        [problem.scale, (0.25, 0.3)],
    )
    levels = (np.arange(len(boxes)) % 4 - 1).astype(np.int32)  # -1: none; 2: no level, and so none

    def call(maps, scales, *indices):
        """The results of one call."""
        rest = {
            "forward": [*maps, *others[1:]],
            "adjoint": others,
            "box_gradient": [others[0], *maps],
        }
        results = [np.full_like(x, np.nan) for x in (maps if operation == "adjoint" else [result])]
        numbers = numbers_of(problem, scales)
        assert not Call([boxes, *indices, *rest[operation]], results, numbers).run(operation)
        return results

    together, on_map = call(maps, scales, index, levels), 0
    for i, alone in enumerate(zip(maps, scales, strict=True)):
        (expected,) = call(*[[x] for x in alone], np.where(levels == i, index, -1).astype(np.int32))
        if operation == "adjoint":
            np.testing.assert_array_equal(together[i], expected)
        else:
            on_map = on_map + expected
        assert expected.any()
    if operation != "adjoint":
        np.testing.assert_array_equal(together[0], on_map)


WRONG = {
    "no levels": lambda a, r: a.pop(2),
    "fewer levels": lambda a, r: a.__setitem__(2, a[2][:3].copy()),
    "int64 levels": lambda a, r: a.__setitem__(2, a[2].astype(np.int64)),
    "float levels": lambda a, r: a.__setitem__(2, a[2].astype(np.float32)),
    "one map": lambda a, r: a.pop(),
    "another dtype": lambda a, r: a.__setitem__(-1, a[-1].astype(np.float64)),
    "fewer images": lambda a, r: a.__setitem__(-1, a[-1][:1].copy()),
    "fewer channels": lambda a, r: a.__setitem__(-1, a[-1][:, :1].copy()),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("operation", ["forward", "box_gradient"])
def test_maps_that_do_not_fit(make_problem, operation, name):
    problem, arguments, result, _ = drawn(make_problem, operation)
    arguments.insert(2, np.zeros(len(problem.boxes), np.int32))
    arguments.append(problem.features)
    WRONG[name](arguments, [result])
    numbers = numbers_of(problem, [problem.scale] * 2)
    assert Call(arguments, [result], numbers).run(operation)[0][0] == 3
    assert np.isnan(result).all()
