"""`explain` and `roialign show`: what is drawn is what `sampling_grid` and the operation have."""

import io
import runpy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import roialign
from roialign import cli

pytest.importorskip("matplotlib", reason="needs Matplotlib (roialign[plot])")

BOX, SIZE, SCALE = [10, 20, 60, 50], (32, 48), {"spatial_scale": 0.25}
TURNED = {"angle": "degrees", **SCALE}
PICTURES = Path(__file__).parent.parent / "docs" / "images"


def panels(figure):
    """The axes of each convention: the map, the sample, the pooled values."""
    return [part.axes for part in figure.subfigs]


def words(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


def points(axes, *labels):
    """(y, x) of all lines of these labels."""
    found = [line.get_xydata()[:, ::-1] for line in axes.lines if line.get_label() in labels]
    return np.concatenate(found) if found else np.empty((0, 2))


def draw(figure):
    """All of it, but for the time that its layout takes."""
    figure.set_layout_engine("none")
    figure.savefig(io.BytesIO(), dpi=20)


@pytest.mark.parametrize(
    "box, options",
    [
        (BOX, SCALE),
        (BOX, {"convention": "mindspore", "spatial_scale": (0.25, 0.5), "sampling_ratio": 1}),
        ([-8, 100, 60, 150], SCALE),
        ([60, 50, 50, 24, 30], {"angle": "degrees", **SCALE}),
        ([60, 50, 50, 24, 0.4], {"angle": "radians", "clockwise": True, **SCALE}),
    ],
    ids=["box", "mindspore", "beyond", "turned", "clockwise"],
)
def test_bins_and_samples_are_those_of_the_grid(box, options):
    grid = roialign.sampling_grid(box, SIZE, (2, 3), **options)
    map_, _, pooled = panels(roialign.explain(box, SIZE, (2, 3), **options))[0]
    ends, at = (grid.edges_y, grid.edges_x), (grid.samples_y, grid.samples_x)
    inside = grid.inside_y, grid.inside_x
    if "angle" not in options:
        ends = np.meshgrid(*ends, indexing="ij")
        at, inside = ((y[:, None, :, None], x[None, :, None]) for y, x in (at, inside))
    at, inside = np.broadcast_arrays(*at), inside[0] & inside[1]
    assert not inside.all() or box[0] > 0
    for label, kept in (("samples", inside), ("samples off the map: 0", ~inside)):
        np.testing.assert_array_equal(points(map_, label), np.transpose([a[kept] for a in at]))
    first = [line.get_label() for line in map_.lines].index("bins")
    bins = np.concatenate([line.get_xydata() for line in map_.lines[first : first + 7]])
    corners = np.transpose(ends[::-1]).reshape(-1, 2)  # [4 * 3, 2] of 2 x 3 bins
    np.testing.assert_array_equal(np.unique(bins, axis=0), np.unique(corners, axis=0))
    (image,) = pooled.images
    assert image.get_array().shape == (2, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_sample_is_followed_to_its_pixels(dtype):
    features = np.random.default_rng(0).standard_normal(SIZE).astype(dtype)
    figure = roialign.explain(BOX, SIZE, 3, features=features, sampling_ratio=2, **SCALE)
    map_, sample, pooled = panels(figure)[0]
    ((y, x),) = points(map_, "one sample, followed below")
    grid = roialign.sampling_grid(BOX, SIZE, 3, sampling_ratio=2, dtype=dtype, **SCALE)
    assert y in grid.samples_y and x in grid.samples_x
    rows, columns = int(y) + np.array([0, 0, 1, 1]), int(x) + np.array([0, 1, 0, 1])
    weights = (1 - abs(rows - y)) * (1 - abs(columns - x))
    shown = [text.get_text() for text in sample.texts]
    for weight, value in zip(weights, features[rows, columns], strict=True):
        assert f"weight {weight:.3f}\nx pixel {value:.3f}" in shown
    total = weights @ features[rows, columns]
    assert float(sample.get_xlabel().split("=")[1]) == pytest.approx(total, abs=6e-4)
    rois = np.array([[0, *BOX]], dtype)
    want = roialign.roi_align(features[None, None], rois, 3, sampling_ratio=2, **SCALE)[0, 0]
    np.testing.assert_array_equal(pooled.images[0].get_array(), want)
    p, q = (int(np.where(at == k)[0][0]) for at, k in ((grid.samples_y, y), (grid.samples_x, x)))
    assert f"{want[p, q]:.3f}" in pooled.get_xlabel()


CASES = {  # name: box, options, words
    "half a pixel": (
        BOX,
        {"convention": ["asymmetric", "half_pixel"]},
        "half_pixel lies half a feature pixel further left and up than asymmetric: half_pixel "
        "subtracts half a feature pixel from both ends.",
    ),
    "half an image pixel": (
        BOX,
        {"convention": ["onnx:half_pixel", "openvino:half_pixel"]},
        "openvino:half_pixel lies 0.125 feature pixels further right and down than "
        "onnx:half_pixel: openvino:half_pixel adds half an image pixel to both ends.",
    ),
    "two scales": (
        BOX,
        {"convention": ["half_pixel", "openvino_half_pixel"], "spatial_scale": (0.5, 0.25)},
        "lies 0.125 feature pixels further right and 0.25 feature pixels further down than",
    ),
    "one pixel added": (
        BOX,
        {"convention": ["mindspore_legacy", "mindspore"]},
        "mindspore takes the box as 12.75 wide and 7.75 high in feature pixels, mindspore_legacy "
        "as 12.5 wide and 7.5 high: mindspore adds one image pixel at the end.",
    ),
    "clamped": (
        [30, 30, 31, 38],
        {"convention": ["half_pixel", "asymmetric"], "sampling_ratio": 2},
        "asymmetric takes the box as 1 wide and 2 high in feature pixels, half_pixel as 0.25 wide "
        "and 2 high: asymmetric clamps it to one feature pixel at least.",
    ),
    "clamped to nothing": (
        [30, 30, 20, 38],
        {"convention": ["mindspore", "mmdet_legacy"], "sampling_ratio": 2},
        "mmdet_legacy takes the box as 0 wide and 2.25 high in feature pixels, mindspore as -2.25 "
        "wide and 2.25 high: mmdet_legacy clamps it to 0 feature pixels at least.",
    ),
    "rounding": (
        BOX,
        {"convention": ["mindspore", "mmdet_legacy"]},
        "mmdet_legacy has 2 x 2 samples in a bin, mindspore 1 x 1: mindspore rounds the length "
        "of a bin down, mmdet_legacy rounds the length of a bin up. The pooled values differ",
    ),
    "sampling_ratio": (
        BOX,
        {"sampling_ratio": [2, 1]},
        "half_pixel (sampling_ratio 1) has 1 x 1 samples in a bin, half_pixel (sampling_ratio 2) "
        "2 x 2. The pooled values differ",
    ),
    "no difference": (
        BOX,
        {"convention": ["asymmetric", "mindspore_legacy"], "sampling_ratio": 2},
        "mindspore_legacy has the bins and samples of asymmetric for this box, to the last bit. "
        "The pooled values are equal.",
    ),
    "rounding of numbers": (
        [0.123, 0.37, 60.77, 50.3],
        {
            "convention": [
                roialign.Convention(),
                roialign.Convention(pixel_offset=0.21, input_offset=0.7),
            ],
            "spatial_scale": 0.3,
        },
        "your convention has the bins and samples of your convention for this box, up to rounding.",
    ),
    "turned": (
        [60, 50, 2, 24, 30],
        {"convention": ["half_pixel", "asymmetric"], "angle": "degrees", "sampling_ratio": 2},
        "asymmetric takes the box as 1 wide and 6 high in feature pixels, half_pixel as 0.5 wide",
    ),
}


@pytest.mark.parametrize("box, options, said", CASES.values(), ids=CASES)
def test_the_difference_in_words(box, options, said):
    assert said in words(roialign.explain(box, SIZE, **SCALE | options))


def test_each_convention_is_compared_with_the_first():
    names = ["half_pixel", "asymmetric", replace(roialign.conventions["mindspore"])]
    figure = roialign.explain(BOX, SIZE, convention=names, sampling_ratio=2, **SCALE)
    assert len(panels(figure)) == 3
    assert "asymmetric lies half" in words(figure) and "mindspore lies half" in words(figure)
    views = {(axes[0].get_xlim(), axes[0].get_ylim()) for axes in panels(figure)}
    assert len(views) == 1  # a shift can be seen


HOSTILE = {
    "NaN": ([np.nan, 20, 60, 50], {}),
    "infinite": ([-np.inf, 20, np.inf, 50], {"sampling_ratio": 2}),
    "beyond": ([500, 500, 600, 600], {}),
    "far beyond": ([1e30, 20, 2e30, 50], {"sampling_ratio": 1}),
    "too large for float32": ([-1e300, 20, 1e300, 50], {"sampling_ratio": 1}),
    "size 0": ([20, 20, 20, 20], {}),
    "inverted": ([60, 50, 10, 20], {}),
    "NaN, turned": ([np.nan, 20, 60, 50, 30], {"angle": "degrees"}),
}


@pytest.mark.parametrize("box, options", HOSTILE.values(), ids=HOSTILE)
def test_without_samples_on_the_map_it_says_so(box, options):
    figure = roialign.explain(box, SIZE, 3, **SCALE | options)
    map_, sample, pooled = panels(figure)[0]
    assert "no sample is on the map" in sample.texts[0].get_text()
    assert not pooled.images[0].get_array().any()
    assert not points(map_, "samples", "one sample, followed below").size
    (x0, x1), (y1, y0) = map_.get_xlim(), map_.get_ylim()
    assert x0 < 0 and y0 < 0 and SIZE[1] < x1 < 200 and SIZE[0] < y1 < 200  # all of the map
    draw(figure)


@pytest.mark.parametrize(
    "box, size, options",
    [
        ([0, 0, 2000, 1200], (300, 500), {}),  # large: of 7 x 7 x 43 x 72 samples those of a bin
        ([30, 30, 30.01, 30.02], SIZE, {"sampling_ratio": 2}),  # tiny
        ([-4e8, -4e8, 4e8, 4e8], SIZE, {"sampling_ratio": 3}),
        ([0, 0, 4, 4], (1, 1), {"convention": "mindspore"}),
        ([60, 50, 20, 24], SIZE, {"sampling_ratio": 2}),  # inverted
        ([-3, -3, 2, 2], SIZE, {"features": np.full(SIZE, np.nan)}),
        ([-3, -3, 2, 2], SIZE, {"features": np.zeros(SIZE, np.uint8)}),
    ],
    ids=["large", "tiny", "huge", "one pixel", "inverted", "NaN features", "flat"],
)
def test_what_is_in_view(box, size, options):
    figure = roialign.explain(box, size, **SCALE | options)
    map_ = panels(figure)[0][0]
    ((y, x),) = points(map_, "one sample, followed below")
    (x0, x1), (y1, y0) = map_.get_xlim(), map_.get_ylim()
    assert x0 < x < x1 and y0 < y < y1
    assert x1 - x0 <= 2 * size[1] + 6 and y1 - y0 <= 2 * size[0] + 6
    assert len(points(map_, "samples", "samples of one bin", "samples off the map: 0")) <= 600
    draw(figure)


@pytest.mark.parametrize(
    "said, box, size, options",
    [
        ("`box` must have 4 numbers", [1, 2, 3], SIZE, {}),
        ("`map_size` must be", BOX, (0, 4), {}),
        ("at most 16777216 pixels", BOX, (2**13, 2**13), {}),
        ("`output_size` must be at most 32", BOX, SIZE, {"output_size": (33, 2)}),
        ("at most 4194304 samples", [0, 0, 4e4, 4e4], SIZE, {}),
        ("`convention` 'onnx' is unknown", BOX, SIZE, {"convention": ["half_pixel", "onnx"]}),
        ("one value or equally many, got 2 and 3", BOX, SIZE, {"sampling_ratio": [1, 2, 3]}),
        ("one value or equally many, got 0 and 1", BOX, SIZE, {"convention": []}),
        (r"shape \(32, 48\), got float64 \(3, 4\)", BOX, SIZE, {"features": np.ones((3, 4))}),
        ("real numbers", BOX, SIZE, {"features": np.ones(SIZE, complex)}),
    ],
)
def test_errors(said, box, size, options):
    options = {"convention": ["half_pixel", "asymmetric"], **SCALE} | options
    with pytest.raises(ValueError, match=said):
        roialign.explain(box, size, **options)


def show(*arguments):
    try:
        return cli.main(["show", "--box", "10,20,60,50", "--map", "32x48", *map(str, arguments)])
    except SystemExit as ended:
        return ended.code


def test_show(tmp_path, capsys):
    picture = tmp_path / "why.png"
    names = "onnx:half_pixel", "openvino:half_pixel"
    assert show("--scale", "1/4", "--convention", *names, "-o", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    said, path = capsys.readouterr().out.rsplit("\n", 2)[:2]
    figure = roialign.explain(BOX, SIZE, convention=names, **SCALE)
    assert said == figure.texts[0].get_text() and path == str(picture)


def test_show_takes_every_option(tmp_path, capsys):
    options = "--box=-1,20,60,50,30 --bins 3x5 --scale 0.5 --sampling-ratio 1 2 --angle degrees"
    assert show(*options.split(), "--clockwise", "-o", tmp_path / "why.svg") == 0
    assert "(sampling_ratio 2) has 2 x 2 samples" in capsys.readouterr().out.replace("\n", " ")
    assert "<svg" in (tmp_path / "why.svg").read_text()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--box", "1,2,x,4"], "argument --box: '1,2,x,4' is not like 10,20,60,50"),
        (["--box", "1,2,3"], "`box` must have 4 numbers"),
        (["--map", "32"], "`map_size` must be"),
        (["--map", "32x48x2"], "`map_size` must be"),
        (["--scale", "1/0"], "argument --scale: '1/0' is not like 1/4"),
        (["--scale", "-1"], "`spatial_scale` must be"),
        (["--bins", "2x3x4"], "`output_size` must be"),
        (["--convention", "torchvision"], "`convention` 'torchvision' is unknown"),
        (["--angle", "turns"], "argument --angle: invalid choice: 'turns'"),
        (["-o", "why.xyz"], "Format 'xyz' is not supported"),
    ],
)
def test_show_refuses(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert show(*arguments) == 2
    out, error = capsys.readouterr()
    assert said in error.splitlines()[-1] and "roialign show:" in error and not out
    assert not list(tmp_path.iterdir())


def test_show_into_a_folder_that_is_not_there(tmp_path):
    assert "missing" in show("-o", tmp_path / "missing" / "why.png")


def test_the_picture_of_the_docs(tmp_path):
    script = runpy.run_path(str(PICTURES / "draw_roialign.py"))
    script["main"](tmp_path / "picture.png")
    drawn = (tmp_path / "picture.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert (PICTURES / "roialign.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
def test_roi_pool_of_the_picture_is_torchvisions():
    import torch
    import torchvision

    roi_pool = runpy.run_path(str(PICTURES / "draw_roialign.py"))["roi_pool"]
    random = np.random.default_rng(0)
    features = random.standard_normal((16, 20))
    for box in random.uniform(0, 14, (50, 4)):
        box = np.concatenate([np.sort(box[[0, 2]])[:1], np.sort(box[[1, 3]])[:1], box[2:] + 1])
        rois = torch.tensor([[0.0, *box]], dtype=torch.float64)
        want = torchvision.ops.roi_pool(torch.tensor(features)[None, None], rois, (2, 3))
        np.testing.assert_array_equal(roi_pool(features, box), want[0, 0])
