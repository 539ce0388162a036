"""The kernels of matrix products, lowered by triton-ascend: all but Ascend's own compiler.

In an environment of its own, because triton-ascend takes the place of Triton, and with
``TRITON_INTERPRET=0``: what is interpreted is not compiled.
"""

import inspect
import math
import re
import subprocess
from collections import Counter

import pytest

pytest.importorskip("triton.backends.ascend.compiler", reason="needs triton-ascend")

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from roialign._ascend import launch, products
from roialign._triton import kernels

TARGET = GPUTarget("npu", "Ascend910B3", 0)
RULE = (0.0, 0.5, 0.0, 1.0, -math.inf, 0.0)
ARGUMENTS = {
    **dict.fromkeys(("image_of", "bits", "levels"), "*i64"),
    "extents": "*i32",
    "source": "*i32",
    "target": "*i32",
    **dict.fromkeys(("boxes", "tangent", "weights", "partial", "d_boxes"), "*fp32"),
    **dict.fromkeys(("scale_y", "scale_x"), "fp32"),
}
FORWARD = {"features_w": 1, "output_q": 1}
ADJOINT = {"d_output_q": 1, "d_features_w": 1}
BOX_GRADIENT = {"d_output_q": 1, "features_w": 1, "BLOCK_C": launch.BLOCK_C}


@pytest.fixture(scope="module", autouse=True)
def memory_is_kept(tmp_path_factory):
    """triton-ascend's own compiler reads memory that it has freed, and dies of it in one call of
    fifty. So the processes that it runs free nothing: then none of 1800 died.
    """
    folder = tmp_path_factory.mktemp("kept")
    (folder / "kept.c").write_text("void free(void *memory) { (void)memory; }")
    library = str(folder / "kept.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "kept.c"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", library)
        yield


@triton.jit
def gather(source, target):
    i = tl.arange(0, 16)
    tl.store(target + i, tl.load(source + tl.load(source + i)))


@triton.jit
def scatter(source, target):
    i = tl.arange(0, 16)
    tl.store(target + tl.load(source + i), i)


def lower(kernel, values="fp32", index="i64", **constants):
    """The text of the linalg IR of a kernel, where `values` are the dtype of maps and outputs."""
    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in ("features", "before", "output", "d_features", "d_output"):
            signature[name] = f"*{values}"
        elif name == "image_index":
            signature[name] = f"*{index}"
        elif name not in constants:
            signature[name] = ARGUMENTS.get(name, "i32")
    backend = make_backend(TARGET)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    source = ASTSource(kernel, signature=signature, constants=constants)
    functions = backend.get_codegen_implementation(), backend.get_module_map()
    module = source.make_ir(options, *functions, context)
    stages, metadata = {}, {"hash": kernel.cache_key, "target": TARGET, **options.__dict__}
    backend.add_stages(stages, options)
    for stage in ("ttir", "ttadapter"):
        module = stages[stage](module, metadata)
    return module


def accesses(text):
    """What a kernel does with memory and with matrices."""
    found = Counter(re.findall(r"= (memref\.load|linalg\.matmul)|\b(memref\.copy)", text))
    return {"".join(names): count for names, count in found.items()}


def is_discrete(text):
    """Whether there is an access element by element, in a loop that triton-ascend adds."""
    return "DiscreteMemAccess" in text or "ExtractedLoadOrStore" in text


def check(text):
    assert not is_discrete(text)
    assert not re.search(r"\bf64\b", text)  # the vector units have no such numbers


@pytest.mark.parametrize("kernel", [gather, scatter], ids=lambda kernel: kernel.fn.__name__)
def test_what_is_discrete_is_seen(kernel):
    assert is_discrete(lower(kernel))


# loads of one number: an image (or a word of bits), a window's four ends; copies of a tile: of the
# map or output, of the matrices (with their slopes)
@pytest.mark.parametrize("values", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(
    "kernel, constants, expected",
    [
        (products.forward, {"TABLES": 1, **FORWARD}, (5, 3, 2)),
        (products.forward, {"TABLES": 2, **FORWARD}, (5, 5, 4)),
        (products.adjoint, {"TABLES": 1, **ADJOINT}, (5, 3, 2)),
        (products.adjoint, {"TABLES": 2, **ADJOINT}, (5, 5, 4)),
        (products.box_gradient, BOX_GRADIENT, (5, 8, 7)),
    ],
    ids=["forward", "forward-tangent", "adjoint", "adjoint-tangent", "box_gradient"],
)
def test_products(kernel, constants, expected, values, block):
    text = lower(kernel, values, BLOCK_P=block, SIDE=launch.SIDE, **constants)
    check(text)
    loads, copies, products = expected
    assert accesses(text) == {
        "memref.load": loads, "memref.copy": copies, "linalg.matmul": products
    }  # fmt: skip
    assert text.count('input_precison = "ieee"') == products
    rows = re.findall(
        r"memref\.copy .*: memref<\?x\?x\w+, strided<\[\?, 1\], offset: \?>> to", text
    )
    assert len(rows) == copies  # contiguous in memory


def lower_weights(index="i64", rule=RULE, tables=1, levels=False, block=16, **constants):
    constants |= {"RULE": rule, "TABLES": tables, "LEVELS": levels, "BLOCK_P": block}
    return lower(
        products.axis_weights, index=index, SIDE=max(1, launch.LANES // block), **constants
    )


@pytest.mark.parametrize("tables, loads", [(1, 3), (2, 7), (3, 5)])
def test_weights(tables, loads):
    # of one number: the image, and the ends of the box (all four with slopes) and of its tangent
    text = lower_weights(tables=tables, boxes_step=1)
    check(text)
    assert accesses(text) == {"memref.load": loads}


@pytest.mark.parametrize(
    "options",
    [
        *({"index": index} for index in ("i32", "fp16", "fp32")),
        *({"block": block} for block in (32, 512)),
        {"levels": True},
        {"rule": (0.0, 0.0, 0.5, 1.0, 1.0, 1.0), "tables": 3},
        {"rule": (2.0, 0.0, 0.0, 1.0, 0.0, 1.0)},
    ],
    ids=str,
)
def test_weights_of_another_kind(options):
    check(lower_weights(**options))


@pytest.mark.parametrize(
    "kernel, constants",
    [
        (products.forward, {"TABLES": 1}),
        (products.adjoint, {"TABLES": 1}),
        (products.box_gradient, {"BLOCK_C": launch.BLOCK_C}),
    ],
    ids=["forward", "adjoint", "box_gradient"],
)
def test_other_strides(kernel, constants):
    check(lower(kernel, BLOCK_P=16, SIDE=launch.SIDE, **constants))


def test_the_kernels_that_are_shared():
    check(lower(kernels.touched, TILE_Y=launch.SIDE, TILE_X=launch.SIDE, BLOCK_W=8))
    text = lower(kernels.sum_blocks, "fp32", REAL=tl.float32, BLOCK_K=128)
    check(text)
    assert accesses(text) == {"memref.copy": 3}
