"""Our operators beside the real ones of torchvision, and what its tests ask of these."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
try:
    from torchvision import ops as theirs
except Exception as error:
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)

import tolerance  # noqa: E402
from roialign.compat import torchvision as ours  # noqa: E402

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}
BATCHES = pytest.mark.parametrize("counts", [(3, 2), (0, 4), (3, 0), (0, 0)], ids=str)
STRIDES = pytest.mark.parametrize("layout", LAYOUTS)


def drawn(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)


def boxes_of(counts, dtype):
    """Of each image: in the map and beyond it, of 1 to 80 pixels."""
    corners = [(80 * drawn(i, n, 2) - 10, 80 ** drawn(i + 9, n, 2)) for i, n in enumerate(counts)]
    return [torch.cat([start, start + extent], 1).to(dtype) for start, extent in corners]


def rows_of(boxes):
    return torch.cat([torch.nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])


def results(pool, maps, *given):
    """What it gives, and the gradient of its square in each map."""
    leaves = [each.detach().requires_grad_() for each in maps]
    output = pool(leaves, *given)
    loss = output.square().sum() + sum(0 * each.sum() for each in leaves)
    return [output.detach(), *torch.autograd.grad(loss, leaves)]


def assert_like(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        own_rounding = tolerance.PEERS[np.dtype(str(one.dtype).partition(".")[2])][0]
        scale = max(1.0, other.abs().max().item() if other.numel() else 0)
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=own_rounding * scale)
    assert actual[0].is_contiguous()


@STRIDES
@BATCHES
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_roi_align(dtype, aligned, counts, layout):
    maps, boxes = [LAYOUTS[layout](drawn(0, 2, 5, 20, 24, dtype=dtype))], boxes_of(counts, dtype)
    for sampling in (-1, 2):
        options = (3, 2), 0.25, sampling, aligned
        expected = results(lambda x, b: theirs.roi_align(x[0], b, *options), maps, boxes)
        layer = ours.RoIAlign(*options)
        assert_like(results(lambda x, b: layer(x[0], b), maps, boxes), expected)
        assert_like(results(lambda x, b: layer(x[0], b), maps, rows_of(boxes)), expected)


def pyramid(layout, dtype):
    return [LAYOUTS[layout](drawn(i, 2, 5, 24 >> i, 28 >> i, dtype=dtype)) for i in range(3)]


def poolers():
    """Theirs and ours, of a new pyramid each: theirs keeps the scales of its first call."""
    for library in (theirs, ours):
        layer = library.MultiScaleRoIAlign(list("abc"), (3, 2), 2, canonical_scale=28)
        yield lambda x, b, pool=layer: pool(dict(zip("abc", x, strict=True)), b, [(96, 112)] * 2)


@STRIDES
@BATCHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pyramid(dtype, counts, layout):
    given = pyramid(layout, dtype), boxes_of(counts, dtype)
    expected, actual = (results(pool, *given) for pool in poolers())
    assert_like(actual, expected)


@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, boxes_dtype):
    """The result has the dtype of the maps; of low precision both round a sum in float32 once."""
    maps, boxes = pyramid("contiguous", dtype), boxes_of((3, 2), boxes_dtype)
    one = [lambda x, b, f=library.roi_align: f(x[0], b, 3, 0.25) for library in (theirs, ours)]
    for pools in (one, poolers()):
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = (pool(maps, boxes) for pool in pools)
        assert actual.dtype is expected.dtype is dtype
        bound = max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def test_gradcheck():
    """Of features and of boxes, which are away from kinks."""
    boxes = [
        torch.tensor([[9.1, 8.3, 40.7, 51.9]]).double(),
        torch.tensor([[4.3, 7, 80, 70.0]]).double(),
    ]
    leaves = [each.requires_grad_() for each in (*pyramid("transposed", torch.float64), *boxes)]
    _, pyramid_pool = poolers()
    pool = ours.RoIAlign(2, 0.25, 1, aligned=True)
    for call in (lambda *x: pool(x[0], list(x[3:])), lambda *x: pyramid_pool(x[:3], list(x[3:]))):
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_features_are_refused():
    """torchvision pools them; torch is about to remove them."""
    features = torch.quantize_per_tensor(torch.rand(1, 2, 8, 8), 1 / 64, 0, torch.quint8)
    with pytest.raises(TypeError, match="`features` must be .* got torch.quint8: cast it"):
        ours.roi_align(features, torch.zeros(1, 5), 2)
