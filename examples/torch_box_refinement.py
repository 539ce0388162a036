"""Boxes that are learned through RoIAlign: a detection head whose boxes need no loss of their own.

Each image has two shapes on noise, and rough boxes around them. A small network looks twice:

    crops = roi_align(features, rough)     # the rough boxes
    refined = move(rough, refine(crops))   # a first head moves them
    crops = roi_align(features, refined)   # the network looks again
    output = judge(crops)                  # a second head: what is it, how well does the box fit?

`judge` learns the class and the IoU of any box, from the true ones. `refine` learns only from what
`judge` thinks of the refined boxes: it wants to hear "the right class, a perfect fit". That reaches
`refine` in one way alone: the gradient of the second `roi_align` in its boxes, which torchvision's
does not have.

    pip install '.[plot]' torch
    python examples/torch_box_refinement.py                # well under a minute on two cores
    python examples/torch_box_refinement.py --detach       # without that gradient: no box moves
    python examples/torch_box_refinement.py --box-loss 1   # with the usual loss on the corners too

It prints the norm of the gradient that came through the boxes, and the mean IoU of held-out boxes
before and after; it draws both losses, that norm, and some held-out images. Where true boxes are at
hand the usual loss alone (`--detach --box-loss 1`) gets closer to them: what is shown is that boxes
also learn from a loss on what is inside them.
"""

import argparse

import torch
from refinement_figure import report
from torch import nn
from torch.nn import functional as F

from roialign import roi_align

HEIGHT, WIDTH, STRIDE, CHANNELS, BINS = 64, 96, 4, 24, 6
CLASSES = ("disc", "rectangle", "triangle")


def draw_images(count, random):
    """Images (N, 3, H, W) of a left and a right shape, their boxes (N, 2, 4) and classes (N, 2)."""
    images = 0.25 * torch.randn(count, 3, HEIGHT, WIDTH, generator=random)
    boxes = torch.empty(count, 2, 4)
    classes = torch.randint(len(CLASSES), (count, 2), generator=random)
    y = torch.arange(HEIGHT)[:, None] + 0.5
    x = torch.arange(WIDTH) + 0.5
    for side in range(2):
        size = 18 + 20 * torch.rand(count, 2, generator=random)
        room = torch.tensor([WIDTH / 2, HEIGHT]) - size
        start = torch.rand(count, 2, generator=random) * room + torch.tensor([side * WIDTH / 2, 0])
        boxes[:, side] = torch.cat([start, start + size], 1)
        u = (x - start[:, :1, None]) / size[:, :1, None] * 2 - 1  # -1 to 1 across the box
        v = (y - start[:, 1:, None]) / size[:, 1:, None] * 2 - 1
        inside = (u.abs() <= 1) & (v.abs() <= 1)
        masks = [u**2 + v**2 <= 1, inside, inside & (u.abs() <= (v + 1) / 2)]
        mask = torch.stack(masks, 1)[torch.arange(count), classes[:, side]]
        stripes = 1 + 0.3 * torch.sin(0.8 * (x + y))
        colour = 0.6 + 0.9 * torch.rand(count, 3, 1, 1, generator=random)
        noise = 0.15 * torch.randn(images.shape, generator=random)
        images = torch.where(mask[:, None], colour * stripes - 0.3 + noise, images)
    return images, boxes, classes


def propose(boxes, classes, each, random):
    """Rough boxes, `each` per shape: (K, 4), image index (K,), true boxes (K, 4), classes (K,)."""
    image_index = torch.arange(len(boxes)).repeat_interleave(2 * each)
    true = boxes.flatten(0, 1).repeat_interleave(each, 0)
    jitter = torch.rand(len(true), 4, generator=random) * 2 - 1
    rough = move(true, jitter * torch.tensor([0.3, 0.3, 0.4, 0.4]))
    return rough, image_index, true, classes.flatten().repeat_interleave(each)


def move(boxes, deltas):
    """Centres move by a part of the size, sizes change by a power of e."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + size / 2 + size * deltas[:, :2]
    size = size * deltas[:, 2:].exp()
    return torch.cat([centre - size / 2, centre + size / 2], 1)


def box_iou(a, b):
    """IoU of each row with its row, (K,)."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    return common / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()

        def conv(inputs, outputs, stride):
            layer = nn.Conv2d(inputs, outputs, 3, stride, 1)
            return layer, nn.GroupNorm(4, outputs), nn.ReLU()

        def head(outputs):
            hidden = nn.Linear(CHANNELS * BINS * BINS, 96)
            return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(96, outputs))

        self.backbone = nn.Sequential(
            *conv(3, 16, 2), *conv(16, CHANNELS, 2), *conv(CHANNELS, CHANNELS, 1)
        )
        self.judge = head(len(CLASSES) + 1)  # the logits of the classes, and of the IoU
        self.refine = head(4)
        nn.init.zeros_(self.refine[-1].weight)  # at first it moves nothing
        nn.init.zeros_(self.refine[-1].bias)

    def pool(self, features, boxes, image_index):
        rois = boxes, image_index
        return roi_align(features, rois, BINS, spatial_scale=1 / STRIDE, sampling_ratio=2)

    def refined(self, features, boxes, image_index):
        deltas = 0.6 * self.refine(self.pool(features, boxes, image_index)).tanh()
        return move(boxes, deltas)


def judge_loss(output, classes, iou):
    quality = F.binary_cross_entropy_with_logits(output[:, -1], iou)
    return F.cross_entropy(output[:, :-1], classes) + quality


def train(model, options, random):
    """Of each step: the loss of judge, that of the refined boxes, the norm of the box gradient."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    history = []
    for step in range(1, options.steps + 1):
        images, boxes, classes = draw_images(16, random)
        rough, image_index, true, classes = propose(boxes, classes, 2, random)
        features = model.backbone(images)
        refined = model.refined(features, rough, image_index)

        # judge and backbone learn what is in a box: in rough, refined and nearly true ones
        near = move(true, 0.1 * torch.randn(true.shape, generator=random))
        seen = torch.cat([rough, refined.detach(), near])
        output = model.judge(model.pool(features, seen, image_index.repeat(3)))
        learn = judge_loss(output, classes.repeat(3), box_iou(seen, true.repeat(3, 1)))

        # refine learns to please judge, through the boxes: judge and the features are held
        second = refined.detach() if options.detach else refined.clone()
        if second.requires_grad:
            second.retain_grad()  # to print what comes; not needed to learn
        crops = model.pool(features.detach(), second, image_index)
        held = {name: value.detach() for name, value in model.judge.named_parameters()}
        output = torch.func.functional_call(model.judge, held, crops)
        please = judge_loss(output, classes, torch.ones(len(true)))
        trust = min(1, 4 * step / options.steps) ** 2  # judge has to know something first

        size = (rough[:, 2:] - rough[:, :2]).repeat(1, 2)
        corners = F.smooth_l1_loss(refined / size, true / size, beta=0.1)

        optimizer.zero_grad()
        (learn + trust * please + options.box_loss * corners).backward()
        optimizer.step()
        came = 0.0 if second.grad is None else second.grad.norm().item()
        history.append((learn.item(), please.item(), came))
        every = max(1, options.steps // 8)
        if step % every == 0:
            judge, refined, box = torch.tensor(history[-every:]).mean(0)
            print(
                f"step {step:4d}  judge {judge:.3f}  refined {refined:.3f}  box gradient {box:.2e}"
            )
    return torch.tensor(history)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="box_refinement.png", metavar="PATH")
    parser.add_argument("--detach", action="store_true", help="cut the gradient in the boxes")
    parser.add_argument("--box-loss", type=float, default=0.0, metavar="WEIGHT")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    random = torch.Generator().manual_seed(options.seed)
    held_out = torch.Generator().manual_seed(options.seed + 1)
    model = Detector()
    history = train(model, options, random)

    images, boxes, classes = draw_images(200, held_out)
    rough, image_index, true, _ = propose(boxes, classes, 1, held_out)
    with torch.no_grad():
        refined = model.refined(model.backbone(images), rough, image_index)
    arrays = (history, images, image_index, rough, refined, true)
    report(options.output, *(array.numpy() for array in arrays))


if __name__ == "__main__":
    main()
