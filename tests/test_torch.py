"""PyTorch: the same numbers as NumPy's, in every mode and under every transform."""

import copy
import io
import pickle

import numpy as np
import pytest

import roialign
import tolerance

torch = pytest.importorskip("torch", reason="the PyTorch adapter's tests need torch")

import roialign.torch  # noqa: E402
from backends import named  # noqa: E402
from isolation import isolated  # noqa: E402
from roialign import _rule  # noqa: E402
from test_transforms import check_without  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*deprecated:FutureWarning"
)  # torch's own

RULE = _rule.vector(roialign.conventions["half_pixel"], 2)
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


TORCH = named("torch")
TORCH.start(None)
tensor, array = TORCH.array, TORCH.numpy
_, freed = TORCH.gone


def torch_rois(problem):
    return tensor(problem.boxes), tensor(problem.index)


def pool(problem, features=None, boxes=None):
    features = tensor(problem.features) if features is None else features
    own_boxes, index = torch_rois(problem)
    rois = own_boxes if boxes is None else boxes, index
    return roialign.roi_align(features, rois, problem.size, **problem.options)


# Values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", tolerance.DTYPES + tolerance.BYTES, ids=str)
def test_bits_are_those_of_numpy(make_problem, dtype, layout):
    problem = make_problem(dtype=dtype, shape=(2, 19, 9, 7))
    features = LAYOUTS[layout](tensor(problem.features))
    in_numpy = roialign.roi_align(array(features), problem.rois, problem.size, **problem.options)
    output = pool(problem, features)
    assert array(output).dtype == in_numpy.dtype and np.array_equal(array(output), in_numpy)
    assert output.stride() == tuple(s // in_numpy.itemsize for s in in_numpy.strides)


# The forms of rois, and out=


def test_out_is_refused_where_a_gradient_is_needed(make_problem):
    problem = make_problem()
    features, rois = tensor(problem.features).requires_grad_(), torch_rois(problem)
    out = torch.empty(problem.output_shape)
    with pytest.raises(RuntimeError, match="`out`.*gradient"):
        roialign.roi_align(features, rois, problem.size, out=out)
    with torch.no_grad():
        assert roialign.roi_align(features, rois, problem.size, out=out) is out


# Errors

FEATURES, ROIS = torch.zeros(2, 3, 8, 9), torch.tensor([[0, 1, 1, 6, 5], [1, 0, 2, 7, 6.0]])


def test_sparse_features():
    with pytest.raises(TypeError, match="`features` .*sparse"):
        roialign.roi_align(FEATURES.to_sparse(), ROIS, 2)


@pytest.mark.parametrize("name", ["_len_torch_dispatch_stack", "_are_functorch_transforms_active"])
def test_without_what_is_private_to_torch(name):
    """It only makes calls shorter."""
    isolated(check_without, "torch", "torch._C", name)


# Derivatives


def test_out_that_overlaps_itself():
    with pytest.raises(ValueError, match="`out` .*overlap itself"):
        roialign.roi_align(FEATURES, ROIS, 2, out=torch.zeros(1, 3, 2, 2).expand(2, 3, 2, 2))


def test_memory_of_the_graph(problem):
    """Without a gradient in the boxes the features are not kept for the backward."""
    features, (boxes, _) = tensor(problem.features).requires_grad_(), torch_rois(problem)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        pool(problem, features, boxes)
    assert features.shape not in kept and boxes.shape in kept


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_large_results_are_in_memory_that_is_kept(layout):
    """Of 8 MiB, as NumPy's. A view of one that is gone keeps its memory."""
    maps = [torch.rand(2, 32, 32, 32)] * 2
    rois, options = ROIS.repeat(512, 1), {"spatial_scales": (1, 1 / 2), "layout": layout}

    def pool():
        return roialign.multiscale_roi_align(maps, rois, 8, **options)

    view = pool()[3:5].requires_grad_()
    address, other = view.untyped_storage().data_ptr(), pool()
    assert other.data_ptr() != address
    del view
    again = pool()
    assert again.data_ptr() == address
    copies = copy.deepcopy(again), pickle.loads(pickle.dumps(again))
    assert all(torch.equal(each, other) for each in copies)


# The compiler


def assert_operator(name, *args):
    result = torch.library.opcheck(getattr(torch.ops.roialign, name).maps, args)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the tool's own, torch 2.14
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_opcheck(dtype, layout, maps):
    def draw(*shape):
        return LAYOUTS[layout](torch.rand(shape)).to(dtype).requires_grad_()

    shapes = [(2, 3, 6, 7), (2, 3, 3, 4)][:maps]
    features, g = [draw(*shape) for shape in shapes], draw(2, 3, 4, 4)
    boxes = torch.tensor([[1, 1, 4.3, 5], [0.4, 2, 3, 6]]).requires_grad_()
    index, levels = torch.tensor([0, 1]), None if maps == 1 else torch.tensor([1, 0])
    rest = [0.9, 0.8, 0.5, 0.4][: 2 * maps], RULE
    fixed = boxes.detach()  # where the boxes' second order would be asked for
    for rois, tangent in ((boxes, None), (fixed, torch.ones(2, 4, requires_grad=True))):
        given = rois, index, levels, tangent
        assert_operator("forward", features, *given, [4, 4], *rest)
        assert_operator("adjoint", g, *given, [n for shape in shapes for n in shape], *rest)
    assert_operator("box_gradient", g, features, fixed, index, levels, *rest)


# Modes


def test_inference_mode(problem):
    with torch.inference_mode():
        output = pool(problem)
    assert output.is_inference() and torch.equal(output, pool(problem))


def test_data_loader_workers(make_problem):
    """Forked workers pool, with features in shared memory."""
    problem = make_problem(shape=(2, 32, 20, 20))
    expected = pool(problem)  # the pool of threads exists before the fork
    features = tensor(problem.features).share_memory_()

    class Crops(torch.utils.data.Dataset):
        def __len__(self):
            return len(problem.boxes)

        def __getitem__(self, i):
            boxes, index = torch_rois(problem)
            rois = boxes[i : i + 1], index[i : i + 1]
            return roialign.roi_align(features, rois, problem.size, **problem.options)[0]

    loader = torch.utils.data.DataLoader(Crops(), 2, num_workers=2)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


# What tensors can be, other than memory


def rows_and_pair():
    yield ROIS
    yield ROIS[:, 1:], ROIS[:, 0].long()


def test_a_tensor_without_memory_does_not_crash():
    features = torch.rand(2, 3, 8, 9)
    for rois in rows_and_pair():
        zeros = torch._efficientzerotensor(features.shape)  # a wrapper: values without memory
        assert not roialign.roi_align(zeros, rois, 2).any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("operation", ["forward", "adjoint", "box_gradient"])
def test_operators_are_called_with_anything(operation, device):
    """By their names, by exported programs, by compilers: an error says which operator it was."""
    operator = getattr(torch.ops.roialign, operation).maps
    features, d_output = FEATURES.to(device), torch.ones(2, 3, 2, 2, device=device)
    boxes, index = ROIS[:, 1:].to(device), ROIS[:, 0].to(device).long()
    given = {
        "forward": {"features": [features], "output_size": [2, 2]},
        "adjoint": {"d_output": d_output, "feature_shapes": [2, 3, 8, 9]},
        "box_gradient": {"d_output": d_output, "features": [features]},
    }[operation]
    given |= {"boxes": boxes, "image_index": index, "levels": None, "scales": [1.0, 1.0]}
    if operation != "box_gradient":
        given["tangent"] = None
    operator(**given, rule=RULE)
    operator(**given, rule=RULE[:2])  # of another version
    for name, good in given.items():
        if isinstance(good, list):
            wrong = [[], [*good, good[0]]]
            if name == "features":
                wrong.append([features[0]])
        elif good is None:
            wrong = [boxes[0, 0]]
        else:
            wrong = [None, good[0]]
        for bad in wrong:
            with pytest.raises(ValueError, match=f"^roialign::{operation}: .* do not fit"):
                operator(**given | {name: bad}, rule=RULE)
    if device == "cpu":  # meta tensors may be of sizes that are not known
        for name in ("boxes", "image_index"):
            with pytest.raises(ValueError, match=f"^roialign::{operation}: "):
                operator(**given | {name: given[name][:1]}, rule=RULE)
            with pytest.raises(TypeError, match=f"^roialign::{operation}: "):
                operator(**given | {name: given[name].to(torch.complex64)}, rule=RULE)


def test_a_tensor_that_was_freed_is_named_wherever_it_comes_in():
    features, boxes, index = FEATURES, ROIS[:, 1:], ROIS[:, 0].long()
    rest = [2, 2], (1.0, 1.0), RULE
    operator = torch.ops.roialign.forward.maps

    def backward():
        x, rois = features.clone().requires_grad_(), ROIS.clone().requires_grad_()
        output = roialign.roi_align(x, rois, 2)
        x.untyped_storage().resize_(0)
        output.sum().backward()

    pool = torch.compile(lambda f: roialign.roi_align(f, ROIS, 2), backend="aot_eager")
    over_boxes = torch.func.vmap(
        lambda boxes: roialign.roi_align(features, (boxes, freed(index)), 2)
    )
    for call, name in (
        (
            lambda: roialign.roi_align(features, ROIS, 2, out=freed(torch.rand(2, 3, 2, 2))),
            "out",
        ),
        (lambda: operator([freed(features)], boxes, index, None, None, *rest), "features"),
        (lambda: operator([features], boxes, index, None, freed(boxes), *rest), "tangent"),
        (backward, "features"),
        (lambda: pool(freed(features)), "features"),
        (lambda: over_boxes(boxes[None]), "image_index"),
    ):
        with pytest.raises(TypeError, match=f"^`{name}` must be in memory"):
            call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_devices_are_not_mixed():
    features, d_output = torch.rand(2, 3, 8, 9), torch.rand(len(ROIS), 3, 2, 2)
    boxes, index = ROIS[:, 1:], ROIS[:, 0].long()
    for call, name in (
        (lambda: roialign.roi_align(features, ROIS.to("meta"), 2), "rois"),
        (lambda: roialign.roi_align(features.to("meta"), ROIS, 2), "rois"),
        (lambda: roialign.roi_align(features, (boxes, index.to("meta")), 2), "image_index"),
        (lambda: roialign.roi_align_adjoint(d_output, ROIS.to("meta"), features.shape), "rois"),
        (lambda: roialign.roi_align_box_gradient(d_output, features.to("meta"), ROIS), "features"),
    ):
        with pytest.raises(TypeError, match=f"`{name}` must be on the device of"):
            call()
    given = boxes.to("meta"), index, None, None, [2, 2], [1.0, 1.0], RULE
    with pytest.raises(TypeError, match="^roialign::forward: tensors must be on one device"):
        roialign.torch.operators._kernel("forward", [features], *given)
    nested = torch.nested.nested_tensor([torch.rand(3, 8, 9)])
    with pytest.raises(TypeError, match="`features` must be a dense tensor, got a nested one"):
        roialign.roi_align(nested, ROIS, 2)


def test_out_is_a_change_that_autograd_sees():
    features, weights = torch.rand(2, 3, 8, 9), torch.ones(len(ROIS), 3, 2, 2, requires_grad=True)
    for rois in rows_and_pair():
        out = torch.zeros(len(ROIS), 3, 2, 2)
        loss = (out * weights).sum()
        roialign.roi_align(features, rois, 2, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_another_default_device():
    features, d_output = torch.rand(2, 3, 8, 9), torch.rand(len(ROIS), 3, 2, 2)
    boxes = [ROIS[:2, 1:], ROIS[2:, 1:]]

    def calls():
        yield roialign.roi_align(features, ROIS, 2)
        yield roialign.roi_align(features, boxes, 2)
        yield roialign.roi_align_box_gradient(d_output, features, ROIS)

    expected = list(calls())
    with torch.device("meta"):
        assert all(map(torch.equal, calls(), expected))


def test_gradients_of_a_batch():
    """What torch batches without torch.func."""
    features = torch.rand(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    rois = ROIS.double().requires_grad_()
    output = roialign.roi_align(features, rois, 2, sampling_ratio=2)
    g = torch.rand(3, *output.shape, dtype=torch.float64)
    leaves = features, rois
    batched = torch.autograd.grad(output, leaves, g, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, leaves, each, retain_graph=True) for each in g]
    for actual, expected in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=1e-12)


# Several maps


class PoolOfMaps(torch.nn.Module):
    """By levels that are given, and by those of the scales."""

    def forward(self, fine, coarse, boxes, index, levels):
        options = {"spatial_scales": (1 / 2, 1 / 4), "sampling_ratio": 2}
        maps, rois = (fine * 2, coarse), (boxes, index)
        output = roialign.multiscale_roi_align(maps, rois, (3, 2), levels=levels, **options)
        maps = [features.movedim(1, -1) for features in maps]
        last = roialign.multiscale_roi_align(maps, boxes[None], 2, layout="NHWC", **options)
        return output, last


def draw_maps(count, *size):
    """As `PoolOfMaps` takes them."""
    random = torch.Generator().manual_seed(0)
    sizes = size, [side // 2 for side in size]
    maps = [torch.randn(1, 3, *each, generator=random) for each in sizes]
    boxes = 80 * torch.rand(count, 4, generator=random)
    return *maps, boxes.sort(1).values, torch.zeros(count).long(), torch.arange(count) % 3 - 1


SIZES = (7, 48, 62), (9, 36, 54), (3, 40, 80)
MAP, ROWS = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC), {0: torch.export.Dim.DYNAMIC}


def check_maps(pool, sizes=SIZES):
    for size in sizes:
        given = draw_maps(*size)
        for actual, expected in zip(pool(*given), PoolOfMaps()(*given), strict=True):
            assert torch.equal(actual, expected) and expected.any()
            assert actual.stride() == expected.stride()


def test_one_program_for_pyramids_of_any_size():
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    check_maps(torch.compile(PoolOfMaps(), fullgraph=True, dynamic=True, backend=compiler))
    assert len(graphs) == 1


def test_exported(tmp_path):
    pool, inputs = PoolOfMaps(), draw_maps(*SIZES[0])
    program = torch.export.export(pool, inputs, dynamic_shapes=(MAP, MAP, ROWS, ROWS, ROWS))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    check_maps(torch.export.load(stored).module())
    program = torch.export.export(pool, inputs)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "p.pt2"))
    check_maps(torch._inductor.aoti_load_package(path), SIZES[:1])
