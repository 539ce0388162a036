"""`roialign demo`: four regions of a photograph, pooled with `ROIAlign` and drawn; the figures."""

import statistics
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from roialign import ROIAlign, get_num_threads, sampling_grid

DOCUMENTED = [[[[1.775, 2.025], [2.275, 2.525]]]]  # by MindSpore, for its example
REPEATS = 50
STEP = 4  # photograph pixels per feature, so spatial_scale = 1 / STEP
BINS = 7
SAMPLE_NUM = 2
ROI_END_MODE = 1  # x2 and y2 are the last pixel inside the box
CONVENTION = "mindspore:roi_end_mode=1"

CREDIT = "photograph: Chelsea, by Stefan van der Walt, CC0"

# name, box (x1, y1, x2, y2) in pixels of the photograph, colour
REGIONS = (
    ("left eye", (134, 79, 213, 152), "#19a7e0"),
    ("right eye", (288, 103, 347, 168), "#7d5fe8"),
    ("nose", (226, 214, 297, 271), "#12a06a"),
    ("ear", (314, 4, 403, 75), "#e0447c"),
)
BIN, SAMPLE = (4, 2), (1, 1)  # the bin, and the sample in it, that are followed, y before x

INK, FAINT, PAPER, MARK = "#22262b", "#6b7280", "#fbfaf7", "#ffd400"
FINE = 2  # drawn this much larger, then reduced: smooth edges
ZOOM = 2  # of the photograph
MARGIN, GAP, LINE = 48, 36, 3
HEADER, FOOTER, ROW = 76, 60, 600  # ROW: height of the photograph
SMALL = 294  # side of the pictures in the second row


def features_of(photograph):
    """uint8 (height, width, 3) -> float32 (1, 3, H, W) in [0, 1]: means of STEP x STEP pixels.

    Feature i is the mean around i * STEP, where the layer (no half-pixel offset) looks for it.
    """
    before = STEP // 2
    after = [before + -size % STEP for size in photograph.shape[:2]]
    padded = np.pad(photograph, [(before, after[0]), (before, after[1]), (0, 0)], mode="edge")
    height, width = (size // STEP for size in padded.shape[:2])
    means = padded.reshape(height, STEP, width, STEP, 3).mean(axis=(1, 3)) / 255  # [H, W, 3]
    return means.transpose(2, 0, 1)[None].astype(np.float32)


def extents(box):
    """Width and height of a box in photograph pixels, as the layer measures them."""
    x1, y1, x2, y2 = box
    return x2 - x1 + ROI_END_MODE, y2 - y1 + ROI_END_MODE


def median_milliseconds(call):
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def picture_of(values):
    """Of float (3, height, width) in [0, 1]."""
    return Image.fromarray(np.rint(255 * values.transpose(1, 2, 0)).astype(np.uint8))


class Sheet:
    """A page in final pixels, drawn FINE times larger."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * FINE, height * FINE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.size = (width, height)

    def paste(self, picture, x, y, width, height, resample=Image.Resampling.NEAREST):
        size = (round(width * FINE), round(height * FINE))
        self.image.paste(picture.resize(size, resample), (round(x * FINE), round(y * FINE)))

    def text(self, x, y, string, size, colour=INK, anchor="la"):
        font = ImageFont.load_default(size * FINE)
        self.draw.text((x * FINE, y * FINE), string, colour, font, anchor)

    def frame(self, x0, y0, x1, y1, colour, width=LINE):
        """A line of this width inside the rectangle."""
        corners = (x0 * FINE, y0 * FINE, x1 * FINE - 1, y1 * FINE - 1)
        self.draw.rectangle(corners, None, colour, round(width * FINE))

    def line(self, x0, y0, x1, y1, colour, width):
        self.draw.line([FINE * v for v in (x0, y0, x1, y1)], colour, round(width * FINE))

    def bins(self, ys, xs, colour, width):
        """The lines between and around bins that end at these places."""
        for y in ys:
            self.line(xs[0], y, xs[-1], y, colour, width)
        for x in xs:
            self.line(x, ys[0], x, ys[-1], colour, width)

    def dot(self, x, y, radius, colour):
        corners = (x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse([FINE * v for v in corners], colour, "black", FINE)

    def tag(self, x, y, string, colour, size=17, ink="white", anchor="la"):
        """A filled label with its top-left corner at (x, y); "mm": its middle."""
        font = ImageFont.load_default(size * FINE)
        width, height = self.draw.textlength(string, font) / FINE + 14, size + 8
        if anchor == "mm":
            x, y = x - width / 2, y - height / 2
        self.draw.rectangle([FINE * v for v in (x, y, x + width, y + height)], colour)
        self.text(x + 7, y + height / 2, string, size, ink, "lm")

    def save(self, path):
        self.image.resize(self.size, Image.Resampling.BOX).save(path, "PNG", optimize=True)


def draw_photograph(sheet, photograph, grids, x, y):
    """With the bins of each box."""
    height, width = (ZOOM * size for size in photograph.shape[:2])
    sheet.text(x, y - 14, f"1  Four boxes, each cut into {BINS} x {BINS} bins", 24, anchor="ls")
    picture = Image.fromarray(photograph)
    sheet.paste(picture, x, y, width, height, Image.Resampling.BICUBIC)
    for (name, _, colour), grid in zip(REGIONS, grids, strict=True):
        ys, xs = y + ZOOM * grid.image_edges_y, x + ZOOM * grid.image_edges_x
        sheet.bins(ys, xs, "white", 1)
        sheet.frame(xs[0] - LINE, ys[0] - LINE, xs[-1] + LINE, ys[-1] + LINE, colour)
        sheet.tag(xs[0] - LINE, ys[-1] + LINE, name, colour)
    return width


def draw_grid(sheet, features, grid, x, y):
    """The first box on the features around it; the samples of one bin; the pixels of one sample."""
    name, _, colour = REGIONS[0]
    sheet.text(x, y - 14, f"2  The {name} on the features; yellow: one sample", 24, anchor="ls")
    left, top = (int(edges[0]) - 1 for edges in (grid.edges_x, grid.edges_y))
    side = int(max(grid.edges_x[-1] - left, grid.edges_y[-1] - top)) + 3
    cell = ROW / side

    def place(xs, ys):
        return x + (xs - left + 0.5) * cell, y + (ys - top + 0.5) * cell

    sheet.paste(picture_of(features[:, top : top + side, left : left + side]), x, y, ROW, ROW)
    for k in range(1, side):
        sheet.line(x + k * cell, y, x + k * cell, y + ROW, FAINT, 0.5)
        sheet.line(x, y + k * cell, x + ROW, y + k * cell, FAINT, 0.5)
    xs, ys = place(grid.edges_x, grid.edges_y)
    sheet.bins(ys, xs, "white", 2.5)
    sheet.frame(xs[0] - LINE, ys[0] - LINE, xs[-1] + LINE, ys[-1] + LINE, colour)
    for row in grid.samples_y[BIN[0]]:
        for column in grid.samples_x[BIN[1]]:
            sheet.dot(*place(column, row), 3.5, "white")
    row, column = grid.samples_y[BIN[0], SAMPLE[0]], grid.samples_x[BIN[1], SAMPLE[1]]
    x0, y0 = place(int(column) - 0.5, int(row) - 0.5)
    sheet.frame(x0 - 2, y0 - 2, x0 + 2 * cell + 2, y0 + 2 * cell + 2, MARK)
    sheet.dot(*place(column, row), 6, MARK)


def draw_sample(sheet, features, grid, x, y):
    """That sample: its four pixels, their weights, and the colour that they make."""
    sheet.text(x, y - 14, "3  Its four pixels, weighted", 24, anchor="ls")
    row, column = grid.samples_y[BIN[0], SAMPLE[0]], grid.samples_x[BIN[1], SAMPLE[1]]
    top, left = int(row), int(column)
    four = features[:, top : top + 2, left : left + 2]
    down, right = row - top, column - left
    weights = np.outer([1 - down, down], [1 - right, right])
    sheet.paste(picture_of(four), x, y, SMALL, SMALL)
    sheet.frame(x, y, x + SMALL, y + SMALL, MARK)
    half = SMALL / 2
    for (i, j), weight in np.ndenumerate(weights):
        corner = x + (j + 0.5) * half, y + (0.16 + 0.68 * i) * SMALL
        sheet.tag(*corner, f"{weight:.2f}", PAPER, 20, INK, "mm")
    sheet.dot(x + (right + 0.5) * half, y + (down + 0.5) * half, 8, MARK)


def draw_sheet(photograph, features, pooled):
    """The photograph, one box on the features, one sample; the pooled regions [K, 3, P, Q]."""
    size = features.shape[2:]
    rule = {"spatial_scale": 1 / STEP, "sampling_ratio": SAMPLE_NUM, "convention": CONVENTION}
    grids = [sampling_grid(box, size, BINS, **rule) for _, box, _ in REGIONS]
    width = 2 * MARGIN + ZOOM * photograph.shape[1] + GAP + ROW
    second = HEADER + ROW + HEADER
    sheet = Sheet(width, second + SMALL + FOOTER)
    right = MARGIN + draw_photograph(sheet, photograph, grids, MARGIN, HEADER) + GAP
    draw_grid(sheet, features[0], grids[0], right, HEADER)
    draw_sample(sheet, features[0], grids[0], MARGIN, second)
    step = (width - 2 * MARGIN - SMALL) / len(REGIONS)
    for k, (name, _, colour) in enumerate(REGIONS):
        x = MARGIN + (k + 1) * step
        sheet.text(x, second - 14, f"{'4  Pooled: ' * (k == 0)}{name}", 24, anchor="ls")
        sheet.paste(picture_of(pooled[k]), x, second, SMALL, SMALL)
        sheet.frame(x, second, x + SMALL, second + SMALL, colour)
    bottom = second + SMALL + FOOTER / 2
    means = (
        f"A bin is the mean of its {SAMPLE_NUM} x {SAMPLE_NUM} samples (white); a sample is the "
    )
    sheet.text(MARGIN, bottom, means + "weighted mean of four pixels.", 20, FAINT, "lm")
    sheet.text(width - MARGIN, bottom, CREDIT, 20, FAINT, "rm")
    return sheet


def documentation_example():
    """The output of the example in MindSpore's documentation of ROIAlign."""
    features = np.array([[[[1.0, 2.0], [3.0, 4.0]]]], np.float32)
    rois = np.array([[0, 0.2, 0.3, 0.2, 0.3]], np.float32)
    return ROIAlign(2, 2, 0.5)(features, rois).astype(np.float64).round(6)


def run(output):
    """Write the picture to `output` and print the figures."""
    with (files("roialign") / "data" / "chelsea.jpg").open("rb") as file:
        photograph = np.asarray(Image.open(file).convert("RGB"))
    features = features_of(photograph)  # [1, 3, H, W]
    rois = np.array([(0, *box) for _, box, _ in REGIONS], np.float32)  # [K, 5]
    layer = ROIAlign(BINS, BINS, 1 / STEP, SAMPLE_NUM, ROI_END_MODE)
    pooled = layer(features, rois)  # [K, 3, BINS, BINS]
    milliseconds = median_milliseconds(lambda: layer(features, rois))
    draw_sheet(photograph, features, pooled).save(output)

    print(f"photograph  {photograph.shape} {photograph.dtype}; {CREDIT.partition(': ')[2]}")
    print(f"features    {features.shape} {features.dtype}, means of {STEP} x {STEP} pixels")
    print(f"rois        {rois.shape} {rois.dtype}: image, x1, y1, x2, y2 in pixels")
    print(f"layer       ROIAlign({BINS}, {BINS}, {1 / STEP}, {SAMPLE_NUM}, {ROI_END_MODE})")
    print(f"output      {pooled.shape} {pooled.dtype}")
    print(f"            {'region':10} {'pixels':>8} {'min':>6} {'mean':>6} {'max':>6}")
    for (name, box, _), values in zip(REGIONS, pooled, strict=True):
        size = "{}x{}".format(*extents(box))
        low, mean, high = values.min(), values.mean(), values.max()
        print(f"            {name:10} {size:>8} {low:6.3f} {mean:6.3f} {high:6.3f}")
    threads = f"{get_num_threads()} thread(s)"
    print(f"time        {milliseconds:.3f} ms a call (median of {REPEATS}, {threads})")
    print(f"example     {documentation_example().tolist()}")
    print(f"documented  {DOCUMENTED}")
    print(f"picture     {Path(output).resolve()}")
