"""What is compared, as data; each module of this folder serves one library.

A module has the functions of its operations. A function takes a worker's `Problem`, does all that a
user does once, and returns another, which computes the result and waits for it. Where that has an
attribute `before`, it takes what `before()` makes, untimed. `given(array, device)` makes a NumPy
array its own kind, `array(result)` does the reverse. Versions of `PACKAGES` are recorded.
"""

from dataclasses import dataclass

ROUNDING = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7}  # of input and output


@dataclass(frozen=True)
class Operation:
    """What a call computes."""

    title: str
    function: str  # of a module
    result: str | None  # the operation of ours that has the same
    reduction: str = "mean"
    rotated: bool = False  # boxes are turned
    dtypes: tuple = tuple(ROUNDING)  # rounded, several samples may be the largest
    beside: str = ""  # ours is divided by the time of that

    @property
    def sampled(self):
        """Whether it is one of the second engine: docs/spec.md, 9 and 10."""
        return self.rotated or self.reduction != "mean"


def _sampled(name, title, **what):
    """Forward and adjoint."""
    what |= {"dtypes": ("float32",)}
    adjoint = f"{name}_adjoint"
    return {
        name: Operation(title, "forward", name, beside="forward", **what),
        adjoint: Operation(f"{title}, adjoint", "adjoint", adjoint, beside=name, **what),
    }


SAMPLED = {
    **_sampled("max", "Max", reduction="max"),
    **_sampled("max_corner", "Max of corners", reduction="max_corner"),
    **_sampled("rotated", "Rotated boxes", rotated=True),
}
OPERATIONS = {
    "forward": Operation("Forward", "forward", "forward"),
    "adjoint": Operation("Adjoint", "adjoint", "adjoint"),
    "box_gradient": Operation("Box gradient", "box_gradient", "box_gradient", beside="adjoint"),
    "gradient": Operation("Forward and backward", "gradient", "adjoint"),
    "backward": Operation("Backward, its forward untimed", "backward", "adjoint"),
    "nothing": Operation("A call of nothing", "nothing", None),
    **SAMPLED,
}
MAIN = ("forward", "adjoint", "box_gradient")
LAYOUTS = ("nchw", "nhwc")
VARIED = ("W1", "W4", "W5")  # on a GPU: in every dtype and layout, the deterministic mode, memory


@dataclass(frozen=True)
class Peer:
    """One way to compute the operations."""

    name: str
    title: str
    operations: tuple = ("forward", "adjoint")
    process: str = ""  # several may share one; its first word is the environment
    way: str = ""  # what the module does otherwise
    ours: bool = False
    conventions: dict | None = None  # the peer's word for each that it has; None: all
    dtypes: tuple = ("float32",)
    layouts: tuple = ("nchw",)
    module: str = ""  # of this folder, where its name is not that of the environment
    only: tuple = ()  # workloads
    pyramids: bool = False  # takes several maps
    beside: tuple = ("ours",)  # its time is divided by that of the first of these that is there
    clipped: tuple = ()  # operations whose results are at least 0

    def __post_init__(self):
        object.__setattr__(self, "process", self.process or self.name)
        object.__setattr__(self, "module", self.module or self.environment)

    @property
    def environment(self):
        return self.process.split()[0]

    def has(self, workload, operation, dtype, layout):
        takes = operation in self.operations and dtype in self.dtypes and layout in self.layouts
        takes &= dtype in OPERATIONS[operation].dtypes
        return takes and workload in (self.only or [workload])

    def right(self, operation, result):
        """What a right result of ours is here."""
        return result.clip(0) if operation in self.clipped else result


ALIGNED = {"asymmetric": False, "half_pixel": True}
ONNX = {"asymmetric": "output_half_pixel", "half_pixel": "half_pixel"}
OPENVINO = {"asymmetric": "asymmetric", "half_pixel": "half_pixel_for_nn"}
FORWARD, GRADIENT = ("forward",), ("forward", "gradient")
VARIANTS = {"dtypes": tuple(ROUNDING), "layouts": LAYOUTS}
JNP = {"conventions": {"asymmetric": ""}, "beside": ("jax",)}
MINDSPORE = {"conventions": {"mindspore": 1}}  # roi_end_mode
TORCHVISION = {"conventions": ALIGNED, "module": "torch"}

CPU = (
    Peer("ours", "roialign", (*MAIN, *SAMPLED), ours=True, pyramids=True, **VARIANTS),
    Peer(
        "onnxruntime", "ONNX Runtime", (*FORWARD, "max_corner"), conventions=ONNX, pyramids=True
    ),
    Peer("paddle", "Paddle", conventions=ALIGNED),
    Peer(
        "openvino", "OpenVINO", (*FORWARD, "max", "rotated"), conventions=OPENVINO,
        clipped=("max",),  # which starts at 0
    ),
    Peer(
        "mindspore", "MindSpore", ("forward", "adjoint", "gradient"), **MINDSPORE,
        dtypes=("float32", "float16"), beside=("ours", "mindspore_ours"),
    ),
    Peer("torchvision", "torchvision", layouts=LAYOUTS, pyramids=True, **TORCHVISION),
    # what a call costs, and ours in frameworks beside their own
    Peer("core", "the core alone", FORWARD, "ours", "core", ours=True),
    Peer("torch", "torch", (*MAIN, "gradient"), ours=True, pyramids=True),
    Peer("torch_recorded", "torch, a gradient needed", FORWARD, "torch", "recorded", ours=True),
    Peer("torch_compiled", "torch.compile", ("forward", "nothing"), "torch", "compiled", ours=True),
    Peer("jax", "JAX, jitted", (*GRADIENT, "nothing"), ours=True),
    Peer("jax_rows", "JAX, jitted, rois (K, 5)", FORWARD, "jax", "rows", ours=True),
    Peer("jax_eager", "JAX, eager", FORWARD, "jax", "eager", ours=True),
    Peer("jnp_gathers", "jnp, gathers", FORWARD, "jax", "gathers", **JNP),
    Peer("jnp_products", "jnp, products", FORWARD, "jax", "products", **JNP),
    Peer("mindspore_ours", "roialign in MindSpore", GRADIENT, "mindspore", ours=True, **MINDSPORE),
    Peer(
        "graph", "MindSpore, Graph", GRADIENT, "mindspore graph", beside=("graph_ours",),
        **MINDSPORE,
    ),
    Peer(
        "graph_ours", "roialign in MindSpore, Graph", GRADIENT, "mindspore graph", ours=True,
        **MINDSPORE,
    ),
)  # fmt: skip
BACKWARD = ("forward", "adjoint", "gradient", "backward")
CUDA = (
    Peer("ours", "roialign", (*MAIN, *BACKWARD[2:]), "torch", ours=True, **VARIANTS),
    Peer("ours_captured", "roialign, CUDA graph", FORWARD, "torch", "captured", ours=True),
    Peer("torchvision", "torchvision", BACKWARD, **TORCHVISION, **VARIANTS),
    Peer(
        "torchvision_captured", "torchvision, CUDA graph", FORWARD, "torchvision", "captured",
        beside=("ours_captured",), **TORCHVISION,
    ),
    Peer(
        "torchvision_deterministic", "torchvision, deterministic", BACKWARD[1::2],
        "torchvision deterministic", "deterministic", only=VARIED, **TORCHVISION,
    ),
)  # fmt: skip
PEERS = {
    device: {peer.name: peer for peer in peers} for device, peers in (("cpu", CPU), ("cuda", CUDA))
}
TITLES = {name: peer.title for peers in PEERS.values() for name, peer in peers.items()}
# beside ours, where the command names none
USUAL = {
    "cpu": ("onnxruntime", "paddle", "openvino", "mindspore", "torchvision"),
    "cuda": ("torchvision", "torchvision_deterministic"),
}
CALLED = ("core", "torch", "torch_recorded", "torch_compiled", "jax", "jax_rows", "jax_eager")
OVERHEAD = {  # what a call costs
    device: {"workloads": (workload,), "peers": peers, "operations": (*GRADIENT, "nothing")}
    for device, workload, peers in (
        ("cpu", "W0", CALLED),
        ("cuda", "W6", ("ours_captured", "torchvision", "torchvision_captured")),
    )
}
# max, max_corner and rotated boxes, beside the mean; the peers have one convention in common
SAMPLED_RUN = {
    "workloads": ("W1", "W3", "W4s"),
    "operations": ("forward", "adjoint", *SAMPLED),
    "peers": ("onnxruntime", "openvino"),
    "dtypes": ("float32",),
    "convention": "half_pixel",
}
# what names a row of a record
CONTESTANT = ("workload", "by", "operation", "convention", "dtype", "layout", "out", "build")
