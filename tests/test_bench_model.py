"""`python -m bench.model`: what it times, and that it compares results before."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("bench", reason="the benchmark is in the repository, not in the package")
try:
    import torchvision  # noqa: F401
except Exception as error:
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)

from bench import model  # noqa: E402

SMALL = ["--threads", "1", "--rounds", "1", "--size", "64", "96"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few boxes; the number of threads is that of before."""
    monkeypatch.setitem(model.PYRAMIDS, "W7", replace(model.PYRAMIDS["W7"], per_image=40))
    monkeypatch.setattr(model, "OBJECTS", 3)
    monkeypatch.setattr(model, "NEAR", 2)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_runs_end_to_end(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{model.BEGIN}\nold\n{model.END}\nafter\n")
    model.main([*SMALL, "--results", str(tmp_path), "--readme", str(readme)])
    (path,) = tmp_path.glob("*.jsonl")
    record = json.loads(path.read_text())
    assert record["machine"]["cpu"] and record["versions"]["torch"]
    found = {(row["step"], row["by"]) for row in record["rows"]}
    assert found == {(step, by) for step in model.STEPS for by in model.BY}
    for row in record["rows"]:
        (sample,) = row["samples"]
        trains = row["step"] == "training"
        assert (
            sample["forward"] > 0 and (sample["backward"] > 0) == (sample["targets"] > 0) == trains
        )
        assert sum(sample[part] for part in model.PARTS) < sample["total"]
    text = model.tables([record])
    assert readme.read_text() == f"before\n{model.BEGIN}\n{text}\n{model.END}\nafter\n"
    assert "training, 1 thread" in text and "inference 16 threads" in text


def test_a_wrong_pooler_is_not_timed(monkeypatch):
    right = model.ours.MultiScaleRoIAlign.forward
    wrong = lambda *given: 1.1 * right(*given)  # noqa: E731
    monkeypatch.setattr(model.ours.MultiScaleRoIAlign, "forward", wrong)
    with pytest.raises(SystemExit, match="inference: ours differs from torchvision's by "):
        model.main(SMALL)


class Work(torch.autograd.Function):
    """It takes 2 seconds, and 5 backward, by a clock that it moves itself."""

    seconds = 0

    @staticmethod
    def forward(context, *maps):
        Work.seconds += 2
        return maps[0] + maps[1]

    @staticmethod
    def backward(context, gradient):
        Work.seconds += 5
        return gradient, gradient


class Pooler(torch.nn.Module):
    def forward(self, maps, boxes):
        return Work.apply(*maps.values())


def test_seconds_are_those_of_the_poolers():
    heads = SimpleNamespace(box_roi_pool=Pooler(), mask_roi_pool=Pooler())
    seconds = model.Seconds(SimpleNamespace(roi_heads=heads))
    seconds.clock = lambda: Work.seconds
    leaf = torch.ones(3, requires_grad=True)
    with seconds.of_a_step():
        maps = {"0": Work.apply(leaf, leaf), "1": 2 * leaf}
        first = heads.box_roi_pool(maps, [])
        Work.apply(first, heads.mask_roi_pool(maps, [])).sum().backward()
    assert (seconds["forward"], seconds["backward"], seconds["total"]) == (4, 10, 4 * 7)
    assert leaf.grad.tolist() == [8.0] * 3


def record(theirs, own):
    """Of one step: seconds in whole, of RoIAlign and of targets."""
    names = "total", "forward", "backward", "targets"
    rows = [
        {"threads": 1, "step": "training", "by": by, "samples": [dict(zip(names, s, strict=True))]}
        for by, s in zip(model.BY, (theirs, own), strict=True)
    ]
    return {"settings": {"size": (800, 1088)}, "rows": rows}


def test_tables():
    given = record((10.0, 0.4, 0.6, 0.003), (9.1, 0.03, 0.06, 0.001))
    (line,) = model.table(given).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "training, 1 thread" and cells[1:2] + cells[3:4] == ["1000", "90"]
    assert cells[2].startswith("10.00%") and cells[4].startswith("0.99%")
    assert cells[5] == "3, 1" and cells[6].startswith("1.10 ")
    # 1 + 9 / 4 seconds beside 9.09 / 4
    assert "training 4 threads: 31%, 1.43x" in model.of_more_threads(given)
