"""PyTorch over processes: DTensors, DDP and FSDP give what one process gives."""

import copy
import os
import re
import sys
import time
from pathlib import Path

import pytest

import roialign
from isolation import HANG, printed

torch = pytest.importorskip("torch", reason="the tests of distributed PyTorch need torch")
import torch.distributed as dist  # noqa: E402

import roialign.torch  # noqa: E402

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("the tests of distributed PyTorch need gloo", allow_module_level=True)

import torch.multiprocessing as mp  # noqa: E402

EXAMPLE = Path(__file__).parent.parent / "examples" / "torch_distributed.py"
OPTIONS = {"spatial_scale": 0.5, "sampling_ratio": 2}


# Processes


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def spawn(body, processes, tmp_path):
    """`body()` in each of the processes; an assertion that fails in one fails here."""
    arguments = (body, processes, str(tmp_path / "store"))
    context = mp.start_processes(_process, arguments, processes, join=False, start_method="spawn")
    end = time.monotonic() + HANG  # for one that failed, others would wait for ever
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"not done after {HANG} s"
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _process(rank, body, processes, store):
    torch.set_num_threads(1)
    store = dist.FileStore(store, processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    body()
    dist.destroy_process_group()
    # A thread of gloo that lets go of a tensor while Python ends aborts the process.
    os._exit(0)


# DTensors


def draw(images=4, channels=8, count=11, dtype=torch.float32):
    """The same in all processes: features, boxes, image index, d_output."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(images, channels, 12, 10, generator=random).to(dtype)
    start = torch.rand(count, 2, generator=random) * 12
    boxes = torch.cat([start, start + 10 * torch.rand(count, 2, generator=random)], 1)
    image_index = torch.randint(images, (count,), generator=random)
    d_output = torch.randn(count, channels, 3, 3, generator=random).to(dtype)
    return features, boxes, image_index, d_output


def pool(features, rois):
    return roialign.roi_align(features, rois, 3, **OPTIONS)


def differentiated(pool, form, features, boxes, image_index, d_output):
    """Output, d_features and d_boxes, with rois in one of their forms."""
    features, moving = features.detach().requires_grad_(), boxes.detach()
    if form == "array":
        moving = torch.cat([image_index[:, None].to(boxes.dtype), moving], 1)
    moving.requires_grad_()
    output = pool(features, moving if form == "array" else (moving, image_index))
    return output.detach(), *torch.autograd.grad(output, [features, moving], d_output)


def shards(mesh, tensors, placements):
    from torch.distributed.tensor import distribute_tensor

    return [distribute_tensor(t, mesh, p) for t, p in zip(tensors, placements, strict=True)]


def check_results(results, expected, placements=None, outputs=1):
    """The outputs, which come first, have the same bits; gradients add in another order."""
    if placements is not None:
        assert [r.placements for r in results] == [tuple(p) for p in placements]
    for i, (result, right) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == right.shape and result.dtype == right.dtype
        full, bound = result.full_tensor(), 16 * torch.finfo(right.dtype).eps
        if i < outputs:
            assert torch.equal(full, right)
        else:
            largest = float(right.abs().amax()) if right.numel() else 0.0
            torch.testing.assert_close(full, right, rtol=bound, atol=bound * largest)


KINDS = (
    {"count": 1}, {"count": 0}, {"channels": 5},
    *({"dtype": dtype} for dtype in (torch.float64, torch.float16, torch.bfloat16)),
)  # fmt: skip


def check_dtensors(compiled=("replicated", "RoIs", "channels", "images"), kinds=KINDS):
    from torch.distributed.tensor import Partial, Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole, rows, channels, terms = [Replicate()], [Shard(0)], [Shard(1)], [Partial()]
    # features, boxes, image_index, d_output: output, d_features, d_boxes
    table = {
        "replicated": ((whole, whole, whole, whole), (whole, whole, whole)),
        "RoIs": ((whole, rows, rows, rows), (rows, terms, rows)),
        "channels": ((channels, whole, whole, channels), (channels, channels, terms)),
        "images": ((rows, whole, whole, whole), None),
        "height": (([Shard(2)], whole, whole, whole), None),
        "mixed": ((channels, rows, whole, [Shard(3)]), None),
    }
    tensors = draw()
    # The compiler comes first: it has to find the rules too.
    for way in ("compiled", "eager"):
        for form in ("pair", "array"):
            expected = differentiated(pool, form, *tensors)
            for name, (given, wanted) in table.items():
                by = pool
                if way == "compiled":
                    if name not in compiled:
                        continue
                    torch.compiler.reset()
                    by = torch.compile(pool, backend="aot_eager", fullgraph=True)
                results = differentiated(by, form, *shards(mesh, tensors, given))
                check_results(results, expected, wanted)

    # other dtypes; fewer RoIs than processes, none; channels that do not divide
    for kind in kinds:
        tensors = draw(**kind)
        expected = differentiated(pool, "pair", *tensors)
        for given, _ in table.values():
            check_results(differentiated(pool, "pair", *shards(mesh, tensors, given)), expected)

    # sizes are no part of what DTensor remembers, if it is not told
    features, boxes, image_index, _ = draw()
    d_features, d_boxes, d_index = shards(mesh, (features, boxes, image_index), (whole, rows, rows))
    rois, d_rois = (boxes, image_index), (d_boxes, d_index)
    for size in (3, (2, 4), (4, 2), 3):
        right = roialign.roi_align(features, rois, size, **OPTIONS)
        output = roialign.roi_align(d_features, d_rois, size, **OPTIONS)
        check_results([output], [right], [rows])
        for height in (12, 20):
            d_maps = [
                roialign.roi_align_adjoint(g, own, (4, 8, height, 10), **OPTIONS)
                for g, own in ((output, d_rois), (right, rois))
            ]
            check_results(d_maps[:1], d_maps[1:], [terms], outputs=0)
    d_boxes = roialign.roi_align_box_gradient(output, d_features, d_rois, **OPTIONS)
    right = roialign.roi_align_box_gradient(right, features, rois, **OPTIONS)
    check_results([d_boxes], [right], [rows], outputs=0)

    check_second_derivatives(mesh, table)
    check_maps(mesh, table)


def check_maps(mesh, table):
    """Two maps: all shards are cut alike, and one decision is remembered for as many maps."""

    options = {"spatial_scales": (0.5, 0.25), "sampling_ratio": 2}

    def gradients(fine, coarse, boxes, index, levels, d_output):
        leaves = [t.detach().requires_grad_() for t in (fine, coarse, boxes)]
        rois = leaves[2], index
        output = roialign.multiscale_roi_align(leaves[:2], rois, 3, levels=levels, **options)
        return output.detach(), *torch.autograd.grad(output, leaves, d_output)

    def by_the_scales(fine, coarse, boxes, index, levels, d_output):
        """And boxes of all images, channels last."""
        maps = [features[:1].movedim(1, -1) for features in (fine, coarse)]
        return [roialign.multiscale_roi_align(maps, boxes[None], 3, layout="NHWC", **options)]

    features, boxes, index, d_output = draw()
    tensors = features, features[..., ::2, ::2].clone(), boxes, index, index % 3 - 1, d_output
    expected = gradients(*tensors)
    for given, wanted in table.values():
        of_maps, of_boxes, of_index, of_output = given
        placements = of_maps, of_maps, of_boxes, of_index, of_index, of_output
        if wanted is not None:
            wanted = wanted[0], wanted[1], wanted[1], wanted[2]
        given = shards(mesh, tensors, placements)
        check_results(gradients(*given), expected, wanted)
        check_results(by_the_scales(*given), by_the_scales(*tensors))


def check_second_derivatives(mesh, table):
    """The gradient in the boxes, differentiated in features and d_output: with a tangent."""

    def twice(features, boxes, image_index, d_output):
        features, d_output = (t.detach().requires_grad_() for t in (features, d_output))
        rois = boxes.detach(), image_index
        d_boxes = roialign.roi_align_box_gradient(d_output, features, rois, **OPTIONS)
        return torch.autograd.grad(d_boxes.sum(), [features, d_output])

    tensors = draw(dtype=torch.float64)
    expected = twice(*tensors)
    for given, _ in table.values():
        check_results(twice(*shards(mesh, tensors, given)), expected, outputs=0)


def check_mesh_of_two_axes():
    from torch.distributed.tensor import Partial, Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    tensors = draw()
    expected = differentiated(pool, "pair", *tensors)
    rois = [Shard(0), Replicate()]
    given = [Replicate(), Shard(1)], rois, rois, [Shard(0), Shard(1)]
    wanted = [Shard(0), Shard(1)], [Partial(), Shard(1)], [Shard(0), Partial()]
    results = differentiated(pool, "pair", *shards(mesh, tensors, given))
    check_results(results, expected, wanted)


def check_dtensors_of_four():
    check_dtensors(compiled=["RoIs"], kinds=KINDS[:2])
    check_mesh_of_two_axes()


# Data parallel: DDP is in the example


def check_fsdp():
    """Gradients, which it averages, are those of the whole batch; each process has its image."""
    sys.path.insert(0, str(EXAMPLE.parent))
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch_distributed import Head

    torch.manual_seed(0)
    alone, (images, boxes, index, _) = Head(), draw(images=dist.get_world_size())
    sharded, mesh = copy.deepcopy(alone), init_device_mesh("cpu", (len(images),))
    fully_shard(sharded.conv, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    rank = dist.get_rank()
    alone(images, torch.cat([index[:, None], boxes], 1)).square().sum().backward()
    own = torch.nn.functional.pad(boxes[index == rank], (1, 0))  # their image is the first here
    sharded(images[rank : rank + 1], own).square().sum().backward()
    for right, parameter in zip(alone.parameters(), sharded.parameters(), strict=True):
        found = parameter.grad.full_tensor() * len(images)
        torch.testing.assert_close(found, right.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "check, processes",
    [(check_dtensors, 2), (check_dtensors_of_four, 4), (check_fsdp, 2)],
)
def test_over_processes(check, processes, tmp_path):
    spawn(check, processes, tmp_path)


# The example


def test_example(tmp_path):
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node", 2, "--log-dir", tmp_path
    local = "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost"
    shown = printed(*torchrun, *local, EXAMPLE)
    for line in (
        r"RoIs sharded: \(6, 8, 7, 7\) of \(12, 8, 7, 7\) here",
        r"channels sharded: \(12, 4, 7, 7\) of \(12, 8, 7, 7\) here",
        r"data parallel: the gradients are those of the whole batch",
    ):
        assert re.search(line, shown), shown
