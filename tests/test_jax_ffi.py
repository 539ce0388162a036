"""XLA's C interface: its layouts as declared here, and handlers that no call can harm."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from entries import (
    HEADER,
    OPERATIONS,
    XLA,
    Frame,
    arrays_of,
    attributes_of,
    frame,
    results_of,
    rule_of,
)

SIZE = "size=struct_size"
HEAD = f"{SIZE} extensions=extension_start"
LAYOUTS = [  # a structure, XLA's name of it; its fields, and where it is another, XLA's name
    ("Extension", "XLA_FFI_Extension_Base", f"{SIZE} type next"),
    ("ApiVersion", "XLA_FFI_Api_Version", f"{HEAD} major=major_version minor=minor_version"),
    ("Metadata", "XLA_FFI_Metadata", f"{SIZE} api_version traits"),
    ("MetadataExtension", "XLA_FFI_Metadata_Extension", "base=extension_base metadata"),
    ("Buffer", "XLA_FFI_Buffer", f"{HEAD} dtype data rank dims"),
    ("Buffers", "XLA_FFI_Args", f"{HEAD} count=size types items=args"),
    ("Buffers", "XLA_FFI_Rets", f"{HEAD} count=size types items=rets"),
    ("Text", "XLA_FFI_ByteSpan", "begin=ptr size=len"),
    ("Scalar", "XLA_FFI_Scalar", "dtype value"),
    ("Attributes", "XLA_FFI_Attrs", f"{HEAD} count=size types names items=attrs"),
    ("ErrorArguments", "XLA_FFI_Error_Create_Args", f"{HEAD} message code=errc"),
    ("Api", "XLA_FFI_Api",
     f"{HEAD} api_version internal=internal_api create_error=XLA_FFI_Error_Create"),
    ("CallFrame", "XLA_FFI_CallFrame",
     f"{HEAD} api context=ctx stage arguments=args results=rets attributes=attrs"),
]  # fmt: skip
CONSTANTS = {
    "kMetadataExtension": "XLA_FFI_Extension_Metadata",
    "kBuffer": "XLA_FFI_ArgType_BUFFER",
    "kScalar": "XLA_FFI_AttrType_SCALAR",
    "kExecute": "XLA_FFI_ExecutionStage_EXECUTE",
    "DataType::pred": "XLA_FFI_DataType_PRED",
    "DataType::u8": "XLA_FFI_DataType_U8",
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
    for ours, theirs, fields in LAYOUTS:
        pairs = dict(word.split("=") if "=" in word else (word, word) for word in fields.split())
        assert list(pairs) == [name for name, _ in getattr(XLA, ours)._fields_]
        for a, b in pairs.items():
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
    lines = ['#include "xla/ffi/api/c_api.h"', f'#include "{HEADER}"',
             "using namespace roialign::xla;"]  # fmt: skip
    lines += [f'static_assert({a}, "{a}");' for a in assertions()]
    source.write_text("\n".join(lines) + "\n")
    include = Path(jaxlib.__file__).parent / "include"
    options = ["-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", "-I"]
    command = [*compiler.split(), *options, include, source]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# The handlers, called as XLA calls them


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return request.param


@pytest.fixture
def arrays(make_problem, operation):
    return arrays_of(make_problem(), operation)


@pytest.fixture
def numbers(make_problem):
    problem = make_problem()
    return attributes_of(problem.scale, rule_of(problem))


def refused(operation, arrays, made):
    ((code, message),) = made.call(f"{operation}_maps")
    assert code == 3 and message.startswith("roialign: ")
    assert all(np.isnan(result).all() for result in results_of(operation, arrays))
    return message


def test_metadata():
    class Newer(XLA.Metadata):
        _fields_ = (("state", ctypes.c_int64),)

    metadata = Newer(ctypes.sizeof(Newer), state=7)
    base = XLA.Extension(ctypes.sizeof(XLA.MetadataExtension), 1, None)
    pointer = ctypes.cast(ctypes.byref(metadata), ctypes.POINTER(XLA.Metadata))
    extension = XLA.MetadataExtension(base, pointer)
    call = Frame()
    call.frame.extensions = ctypes.addressof(extension)
    assert not call.call("forward_maps")
    assert (metadata.api_version.major, metadata.api_version.minor) == (0, 1)
    assert metadata.traits == 0 and metadata.state == 7
    metadata.size = 8
    assert "older interface" in call.call("forward_maps")[0][1]


SPOILT = {  # arrays and numbers
    "no maps": lambda a, n: n.pop("maps"),
    "zero maps": lambda a, n: n.update(maps=0),
    "too many maps": lambda a, n: n.update(maps=1e18),
    "maps that are not a number": lambda a, n: n.update(maps=np.nan),
    "no scale": lambda a, n: n.pop("scale_x_0"),
    "another scale": lambda a, n: n.update(scale_y_1=1.0),
    "a number of a later version": lambda a, n: n.update(of_tomorrow=0.0),
    "no numbers": lambda a, n: n.clear(),
    "an index of int64": lambda a, n: a.update(index=a["index"].astype(np.int64)),
}


@pytest.mark.parametrize("name", SPOILT)
def test_numbers_and_arrays_that_do_not_fit(operation, arrays, numbers, name):
    SPOILT[name](arrays, numbers)
    refused(operation, arrays, frame(operation, arrays, numbers))


def shrink(structure):
    structure.size -= 8


STRUCTURES = [  # what is spoilt, the error
    *((lambda call, part=part: shrink(getattr(call.frame, part)), "XLA has an older interface")
      for part in ("arguments", "results", "attributes")),
    (lambda call: shrink(call.frame), "XLA has an older interface"),
    (lambda call: setattr(call.frame, "stage", 0), "not a call"),
    (lambda call: call.frame.attributes.types.__setitem__(0, 1), "a number is not a float64"),
    (lambda call: setattr(call.names[1], "begin", b"scale_z_0"), "a number is missing"),
    (lambda call: setattr(call.names[-1], "begin", b"adoptive"), "exported by a later version"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, message", STRUCTURES)
def test_structures_that_do_not_fit(operation, arrays, numbers, spoil, message):
    call = frame(operation, arrays, numbers)
    spoil(call)
    assert refused(operation, arrays, call) == f"roialign: {message}"


def test_calls_of_roialign_0_1(operation):
    message = "roialign: exported by roialign 0.1: export it again"
    assert Frame().call(operation) == [(3, message)]
