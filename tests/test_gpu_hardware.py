"""What only a GPU can show: its bits, streams, graphs, several devices, sizes beyond 32 bits.

TRITON_INTERPRET=0 pytest --backend triton tests/test_{gpu_*,oracle,forms,errors,out,transforms}.py
"""

import os

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="the PyTorch adapter's tests need torch")
if os.environ["TRITON_INTERPRET"] == "1" or not torch.cuda.is_available():
    pytest.skip("needs a GPU, and TRITON_INTERPRET=0", allow_module_level=True)
pytest.importorskip("triton", reason="the kernels of the GPU need Triton")

OPTIONS = {"spatial_scale": 0.25, "sampling_ratio": 2}


def rois_of(count, seed=0, size=(400, 300)):
    random = np.random.default_rng(seed)
    start = random.random((count, 2)) * size
    end = start + random.random((count, 2)) * size
    rows = np.concatenate([random.integers(2, size=(count, 1)), start, end], 1)
    return torch.from_numpy(rows.astype(np.float32)).cuda()


@pytest.fixture
def features():
    return torch.randn(2, 32, 75, 100, generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sampling", [0, 2, 3])
def test_weights_are_the_bits_of_the_core(convention, sampling, dtype):
    # on a map of one row y weighs 1, and channel x of this one is 1 at pixel x alone
    rois = rois_of(200).to(dtype)
    rois[:, 0], rois[:, 2], rois[:, 4] = 0, 0, 2
    pixels = torch.eye(100, dtype=dtype).reshape(1, 100, 1, 100)
    options = {"spatial_scale": (0.5, 0.25), "sampling_ratio": sampling, "convention": convention}
    expected = roialign.roi_align(pixels, rois.cpu(), (1, 7), **options)
    assert expected.any()
    output = roialign.roi_align(pixels.cuda(), rois, (1, 7), **options)
    assert torch.equal(output.cpu(), expected)


def test_a_subnormal_size_is_a_size():
    """An adaptive box that is smaller than any normal number has its one sample."""
    features = torch.full((1, 1, 4, 4), 3.0)
    rois = torch.tensor([[0, 0, 0, 1e-39, 1e-39], [0, 0, 0, 1e-44, 1e-44], [0, 0, 0, 0, 0]])
    corner = roialign.Convention(pixel_offset=0, end_offset=0, min_size=None, adaptive="ceil")
    expected = roialign.roi_align(features, rois, 1, convention=corner)
    assert expected.flatten().tolist() == [3, 3, 0]
    output = roialign.roi_align(features.cuda(), rois.cuda(), 1, convention=corner)
    assert torch.equal(output.cpu(), expected)


def test_the_same_bits_in_every_run(features):
    rois = rois_of(500).requires_grad_()
    features = features.requires_grad_()

    def gradients():
        output = roialign.roi_align(features, rois, 7, **OPTIONS)
        return torch.autograd.grad(output.square().sum(), (features, rois))

    first = gradients()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def test_streams(features):
    rois = rois_of(500)
    expected = roialign.roi_align(features, rois, 7, **OPTIONS)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(8):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(roialign.roi_align(features, rois, 7, **OPTIONS))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_nothing_waits_for_the_device(features):
    rois = rois_of(50).requires_grad_()
    roialign.roi_align(features, rois, 7, **OPTIONS).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        roialign.roi_align(features, rois, 7, **OPTIONS).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture(features):
    rois, features = rois_of(100), features.requires_grad_()

    def step():
        output = roialign.roi_align(features, rois, 7, **OPTIONS)
        return output, torch.autograd.grad(output.square().sum(), features)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        rois.copy_(rois_of(100, seed=1))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_devices(features):
    rois = rois_of(100)
    expected = roialign.roi_align(features, rois, 7, **OPTIONS)
    output = roialign.roi_align(features.to("cuda:1"), rois.to("cuda:1"), 7, **OPTIONS)
    assert output.device == torch.device("cuda:1")
    assert torch.equal(output.cpu(), expected.cpu())
    with pytest.raises(TypeError, match="`rois` must be on the device of `features`"):
        roialign.roi_align(features, rois.to("cuda:1"), 7, **OPTIONS)


def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    features = torch.zeros(3, 1, 1 << 15, 1 << 15, dtype=torch.float16, device="cuda")
    features[2, 0, -8:, -8:] = 1
    rois = torch.tensor([[2, 32760, 32760, 32768, 32768]], dtype=torch.float32, device="cuda")
    assert (roialign.roi_align(features, rois, 2, sampling_ratio=2) == 1).all()
    d_output = torch.ones(1, 1, 2, 2, dtype=torch.float16, device="cuda")
    d_features = roialign.roi_align_adjoint(d_output, rois, features.shape, sampling_ratio=2)
    assert d_features[2, 0, -8:, -8:].sum() == 4
    assert not d_features[2, 0, :-8].any()
