"""What is compared, as data; each module of this folder serves one library.

A module has a function for each operation: it takes a worker's `Problem`, does all that a user does
once, and returns a function that computes the result and waits for it. Where that has an attribute
`before`, it takes what `before()` makes, untimed. `given(array, device)` makes a NumPy array its
own kind, `array(result)` does the reverse; `PACKAGES` are those whose versions are recorded.
"""

from dataclasses import dataclass

MAIN = ("forward", "adjoint", "box_gradient")
OPERATIONS = {  # title, and the one of the three that has the same result
    "forward": ("Forward", "forward"),
    "adjoint": ("Adjoint", "adjoint"),
    "box_gradient": ("Box gradient", "box_gradient"),
    "gradient": ("Forward and backward", "adjoint"),
    "backward": ("Backward, its forward untimed", "adjoint"),
    "nothing": ("A call of nothing", None),
}
ROUNDING = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7}  # of input and output
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

    def __post_init__(self):
        object.__setattr__(self, "process", self.process or self.name)
        object.__setattr__(self, "module", self.module or self.environment)

    @property
    def environment(self):
        return self.process.split()[0]

    def has(self, workload, operation, dtype, layout):
        takes = operation in self.operations and dtype in self.dtypes and layout in self.layouts
        return takes and workload in (self.only or [workload])


ALIGNED = {"asymmetric": False, "half_pixel": True}
ONNX = {"asymmetric": "output_half_pixel", "half_pixel": "half_pixel"}
OPENVINO = {"asymmetric": "asymmetric", "half_pixel": "half_pixel_for_nn"}
FORWARD, GRADIENT = ("forward",), ("forward", "gradient")
VARIANTS = {"dtypes": tuple(ROUNDING), "layouts": LAYOUTS}
JNP = {"conventions": {"asymmetric": ""}, "beside": ("jax",)}
MINDSPORE = {"conventions": {"mindspore": 1}}  # roi_end_mode
TORCHVISION = {"conventions": ALIGNED, "module": "torch"}

CPU = (
    Peer("ours", "roialign", MAIN, ours=True, pyramids=True, **VARIANTS),
    Peer("onnxruntime", "ONNX Runtime", FORWARD, conventions=ONNX, pyramids=True),
    Peer("paddle", "Paddle", conventions=ALIGNED),
    Peer("openvino", "OpenVINO", FORWARD, conventions=OPENVINO),
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
# what names a row of a record
CONTESTANT = ("workload", "by", "operation", "convention", "dtype", "layout", "out", "build")
