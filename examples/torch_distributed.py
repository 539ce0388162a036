"""RoIAlign over processes: sharded RoIs, sharded channels, and a data parallel step.

    pip install torch
    torchrun --nproc-per-node 2 examples/torch_distributed.py

Each part is checked against the same computed by one process alone. docs/distributed.md explains.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import roialign.torch
from roialign import roi_align

PER_IMAGE = 6


def pool(features, boxes, image_index):
    return roi_align(features, (boxes, image_index), 7, spatial_scale=0.25, sampling_ratio=2)


def gradients(output, features, boxes):
    """Of a loss that weighs every value differently."""
    return torch.autograd.grad(output.square().sum(), [features, boxes])


def show(*line):
    if dist.get_rank() == 0:
        print(*line)


def shard(mesh, features, boxes, image_index):
    """One call, all processes: the same lines for any placements."""
    output = pool(features, boxes, image_index)
    expected = output, *gradients(output, features, boxes)
    for what, of_features, of_rois in [
        ("RoIs", Replicate(), Shard(0)),
        ("channels", Shard(1), Replicate()),
    ]:
        d_tensors = [
            distribute_tensor(t.detach(), mesh, [placement]).requires_grad_(t.requires_grad)
            for t, placement in [
                (features, of_features),
                (boxes, of_rois),
                (image_index, of_rois),
            ]
        ]
        output = pool(*d_tensors)
        results = output, *gradients(output, *d_tensors[:2])
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result.full_tensor(), right, rtol=1e-5, atol=1e-5)
        show(f"{what} sharded: {tuple(output.to_local().shape)} of {tuple(output.shape)} here")
        for name, result in zip(("output", "d_features", "d_boxes"), results, strict=True):
            show(f"    {name:10}", result.placements[0])


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = roialign.torch.ROIAlign(7, 7, 0.25)
        self.linear = nn.Linear(8 * 7 * 7, 3)

    def forward(self, images, rois):
        return self.linear(self.pool(self.conv(images).relu(), rois).flatten(1))


def train(images, boxes, image_index, classes):
    """A step on own images: their RoIs count them from 0."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    alone = Head()
    parallel = DistributedDataParallel(copy.deepcopy(alone))

    rois = torch.cat([image_index[:, None].float(), boxes.detach()], 1)
    nn.functional.cross_entropy(alone(images, rois), classes).backward()

    own = image_index == rank
    rois, classes = rois[own], classes[own]
    rois[:, 0] = 0  # the first image here
    loss = nn.functional.cross_entropy(parallel(images[rank : rank + 1], rois), classes)
    loss.backward()
    for a, b in zip(alone.parameters(), parallel.module.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
    show("data parallel: the gradients are those of the whole batch")


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # every process draws the same
    images = dist.get_world_size()
    features = torch.randn(images, 8, 40, 60, requires_grad=True)
    start = torch.rand(images * PER_IMAGE, 2) * 100
    boxes = torch.cat([start, start + 20 + torch.rand_like(start) * 60], 1).requires_grad_()
    image_index = torch.arange(images).repeat_interleave(PER_IMAGE)
    shard(mesh, features, boxes, image_index)
    train(features.detach(), boxes, image_index, torch.randint(3, image_index.shape))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # torch 2.13: a thread of gloo that lets go of a tensor while Python ends aborts it.
    sys.stdout.flush()
    os._exit(0)
