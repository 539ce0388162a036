"""`python -m bench.model`: Mask R-CNN of torchvision with its own RoIAlign and with ours.

An inference and a training step of one image, theirs and ours in turn in one process: the whole,
and in it the RoIAlign of both heads, forward and backward, and the targets of masks. See
bench/README.md.
"""

import argparse
import contextlib
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision
from torchvision.models.detection import MaskRCNN, backbone_utils, roi_heads

from bench import report, run
from bench.devices import Cpu
from bench.environments import ROOT
from bench.worker import version
from roialign.compat import torchvision as ours

from cases import PYRAMIDS  # isort: skip (found by bench.run)

BEGIN, END = "<!-- model:begin -->", "<!-- model:end -->"
SIZE = 800, 1088
STEPS = "inference", "training"
PARTS = "forward", "backward", "targets"
BY = "torchvision", "roialign"
OBJECTS, NEAR = 10, 12  # in the image; proposals that overlap each of them
MORE = 4, 8, 16  # threads of the table that is computed
KEPT = "256"  # MiB of memory for results that ours keeps, by default
ALLOWED = 1e-4  # between results of both


class Seconds(dict):
    """Of the parts of a step, by hooks on a model that stay while its poolers change.

    With one thread they are CPU time: others on the machine cannot make it longer by their turns.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, model):
        for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
            pool.register_forward_pre_hook(self.enter)
            pool.register_forward_hook(self.leave)

    def enter(self, pool, arguments):
        maps, *rest = arguments
        maps = {name: features.view_as(features) for name, features in maps.items()}
        for features in maps.values():
            if features.requires_grad:
                features.register_hook(self.backward)
        self.since = self.clock()
        return maps, *rest

    def leave(self, pool, arguments, output):
        self["forward"] += self.clock() - self.since
        if output.requires_grad:
            output.register_hook(self.begin)

    def begin(self, gradient):
        """The gradient of what was pooled is there; next that of the maps is computed."""
        self.since = self.clock()

    def backward(self, gradient):
        now = self.clock()
        self["backward"] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def of_a_step(self):
        """Sets `total` and the parts."""
        self.update(dict.fromkeys(PARTS, 0.0))
        project = roi_heads.project_masks_on_boxes

        def targets(*arguments):
            start = self.clock()
            result = project(*arguments)
            self["targets"] += self.clock() - start
            return result

        roi_heads.project_masks_on_boxes = targets
        start = self.clock()
        try:
            yield
        finally:
            self["total"] = self.clock() - start
            roi_heads.project_masks_on_boxes = project


class Model:
    """Mask R-CNN, ResNet-50 and FPN, with random weights; proposals are those of workload W7.

    Random weights propose boxes of one size, so the proposals are exchanged for others.
    """

    def __init__(self, size):
        torch.manual_seed(0)
        self.size = height, width = size
        norm = torchvision.ops.FrozenBatchNorm2d
        backbone = backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=3
        )
        for module in backbone.body.modules():
            if hasattr(module, "bn3"):
                module.bn3.weight.fill_(0.2)  # or numbers would grow from block to block
        self.module = model = MaskRCNN(backbone, 91, min_size=height, max_size=2 * max(size))
        with torch.no_grad():  # some hundred scores above the threshold, as after a training
            model.roi_heads.box_predictor.cls_score.weight *= 100
            model.roi_heads.box_predictor.cls_score.bias[0] += 6
        boxes = PYRAMIDS["W7"].rois()[:, 1:] * (height / 800)
        boxes = torch.from_numpy(boxes).clamp(max=torch.tensor([width, height] * 2) - 1)
        objects = boxes[(boxes[:, 2:] - boxes[:, :2]).amin(1) > height / 20][:OBJECTS]
        near = objects.repeat(NEAR, 1) + height / 400 * torch.randn(NEAR * OBJECTS, 4)
        self.proposals = {"inference": [boxes], "training": [torch.cat([boxes, near])]}
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, objects.long().tolist(), strict=True):
            mask[y1 : (y1 + 3 * y2) // 4, x1:x2] = 1
        labels = torch.arange(1, OBJECTS + 1)
        self.target = {"boxes": objects, "labels": labels, "masks": masks}
        self.image = torch.rand(3, height, width)
        trained = [each for each in model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)  # each step is the same
        model.rpn.register_forward_hook(lambda *given: (self.proposals[self.step], given[2][1]))
        self.seconds = Seconds(model)

    def run(self, step):
        """The numbers that a step gives, to be compared, and its seconds."""
        self.step = step
        self.module.train(step == "training")
        torch.manual_seed(0)
        with torch.set_grad_enabled(step == "training"), self.seconds.of_a_step():
            if step == "inference":
                (found,) = self.module([self.image])
                result = found["scores"]
            else:
                losses = self.module([self.image], [dict(self.target)])
                self.optimizer.zero_grad()
                sum(losses.values()).backward()
                self.optimizer.step()
                result = torch.stack([loss.detach() for loss in losses.values()])
        return result, dict(self.seconds)

    @contextlib.contextmanager
    def by(self, name):
        if name == "torchvision":
            yield
            return
        ours.patch(self.module)
        try:
            with ours.replaced():
                yield
        finally:
            ours.unpatch(self.module)


def compare(step, theirs, own):
    error = (own - theirs).abs().max() if own.shape == theirs.shape else float("inf")
    if not error <= ALLOWED * theirs.abs().max():
        raise SystemExit(f"{step}: ours differs from torchvision's by {error:.2g}")


def measure(settings, say=print):
    """Rows with samples, seconds of each round; their results are compared before."""
    model, rows = Model(settings.size), []
    for threads in settings.threads:
        torch.set_num_threads(threads)
        model.seconds.clock = time.process_time if threads == 1 else time.perf_counter
        for step in STEPS:
            timed = {name: [] for name in BY}
            for round_ in range(settings.rounds + 1):
                results = {}
                for name in BY:
                    with model.by(name):
                        results[name], seconds = model.run(step)
                    if round_:
                        timed[name].append({k: float(f"{v:.5g}") for k, v in seconds.items()})
                compare(step, *results.values())
                say(f"{threads} thread(s), {step}, round {round_}", flush=True)
            rows += [
                {"threads": threads, "step": step, "by": name, "samples": timed[name]}
                for name in BY
            ]
    return rows


# What a record says


def pooled(sample):
    return sample["forward"] + sample["backward"]


def spread(row, of, form):
    return report.spread([of(sample) for sample in row["samples"]], form=form)


def share(row):
    """Of RoIAlign in a step."""
    return spread(row, lambda sample: pooled(sample) / sample["total"], "{:.2%}".format)


def least(row, of):
    """What others on the machine do only adds to it."""
    return min(of(sample) for sample in row["samples"])


def pairs(record):
    """For threads and step the rows of torchvision and of ours."""
    found = {(row["threads"], row["step"], row["by"]): row for row in record["rows"]}
    for threads, step in dict.fromkeys(key[:2] for key in found):
        yield threads, step, *[found[threads, step, name] for name in BY]


def table(record):
    height, width = record["settings"]["size"]
    kept = record["settings"].get("cache_mb", "64")  # the default of records that do not say it
    header = [f"Mask R-CNN, 1 image of {height} x {width}, `ROIALIGN_CACHE_MB={kept}`"]
    header += ["torchvision: RoIAlign, ms", "of the whole", "roialign: RoIAlign, ms"]
    header += ["of the whole", "mask targets, ms", "whole: torchvision / roialign"]
    lines = []
    for threads, step, theirs, own in pairs(record):
        cells = [f"{step}, {threads} thread{'s' * (threads > 1)}"]
        for row in (theirs, own):
            cells += [report.milliseconds(least(row, pooled)), share(row)]
        targets = [least(row, lambda sample: sample["targets"]) for row in (theirs, own)]
        cells.append(", ".join(map(report.milliseconds, targets)) if any(targets) else "-")
        both = zip(theirs["samples"], own["samples"], strict=True)
        cells.append(report.spread([one["total"] / two["total"] for one, two in both]))
        lines.append(cells)
    return report.markdown(header, lines)


def of_more_threads(record):
    """By arithmetic, from one thread: an upper bound, because nothing scales so well.

    torchvision's RoIAlign runs on one thread; all the rest is divided by the threads.
    """
    words = []
    for threads, step, theirs, own in pairs(record):
        if threads == 1:
            alone, ours_alone = least(theirs, pooled), least(own, pooled)
            rest = least(theirs, lambda sample: sample["total"] - pooled(sample))
            for more in MORE:
                before, after = alone + rest / more, (ours_alone + rest) / more
                words.append(f"{step} {more} threads: {alone / before:.0%}, {before / after:.2f}x")
    return (
        "Not measured but computed from one thread, if all but torchvision's RoIAlign, which runs "
        "on one, were divided by the threads: its share of a step, and how much faster ours is at "
        f"most. {'; '.join(words)}."
    )


def tables(records):
    """Of several runs; what is said below is of the last."""
    record = records[-1]
    machine, settings = record["machine"], record["settings"]
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items() if found)
    about = (
        f"{machine['cpu']}, load {machine['load']:.1f}, {settings['rounds']} rounds in turn, CPU "
        "time with one thread and wall time with more: milliseconds are the least, shares and "
        "ratios the median of the rounds (least..largest). "
        f"{record['date'][:10]}, {versions}."
    )
    return "\n\n".join([*map(table, records), of_more_threads(record), about])


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m bench.model", description=__doc__)
    add = parser.add_argument
    add("--threads", nargs="+", type=int, default=[1, 2])
    add("--rounds", type=int, default=5)
    add("--size", nargs=2, type=int, default=SIZE, metavar=("HEIGHT", "WIDTH"), help="of the image")
    add("--results", type=Path, default=ROOT / "bench" / "results" / "model")
    add("--readme", metavar="FILE", help="rewrite the part of this file between the markers")
    given = parser.parse_args(arguments)
    kept = os.environ.get("ROIALIGN_CACHE_MB", KEPT)
    settings = SimpleNamespace(**vars(given), device="cpu", cache_mb=kept)
    versions = {name: version(name) for name in ("roialign", "torch", "torchvision")}
    record = run.heading(settings, versions, SimpleNamespace(ask=lambda _: Cpu().machine()))
    record["rows"] = measure(settings)
    path = run.write(record, given.results)
    print(path, tables([record]), sep="\n")
    if given.readme:  # with the runs before, of that day
        report.rewrite(given.readme, tables(report.records(path)), BEGIN, END)


if __name__ == "__main__":
    main()
