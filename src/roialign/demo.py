"""`roialign demo`: four regions of a photograph, pooled with `ROIAlign` and drawn; the figures."""

import statistics
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from roialign import ROIAlign, get_num_threads

DOCUMENTED = [[[[1.775, 2.025], [2.275, 2.525]]]]  # by MindSpore, for its example
REPEATS = 50
STEP = 4  # photograph pixels per feature, so spatial_scale = 1 / STEP
BINS = 14
SAMPLE_NUM = 2
ROI_END_MODE = 1  # x2 and y2 are the last pixel inside the box

CREDIT = "photograph: Chelsea, by Stefan van der Walt, CC0"

# name, box (x1, y1, x2, y2) in pixels of the photograph, colour
REGIONS = (
    ("left eye", (134, 79, 213, 152), "#19a7e0"),
    ("right eye", (288, 103, 347, 168), "#7d5fe8"),
    ("nose", (226, 214, 297, 271), "#12a06a"),
    ("ear", (314, 4, 403, 75), "#e0447c"),
)

INK, FAINT, PAPER = "#22262b", "#6b7280", "#fbfaf7"
FINE = 2  # drawn this much larger, then reduced: smooth edges
ZOOM = 2.5  # of the photograph
CELL = 22  # one bin, enlarged
MARGIN, GAP, LINE = 48, 36, 3
HEADER, CAPTION, FOOTER = 84, 36, 84


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


def sample_positions(lo, extent):
    """Where one axis of a box is sampled, in photograph pixels: [BINS * SAMPLE_NUM]."""
    count = BINS * SAMPLE_NUM
    return lo + (np.arange(count) + 0.5) * extent / count


def median_milliseconds(call):
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


class Sheet:
    """A page in final pixels, drawn FINE times larger."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * FINE, height * FINE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.size = (width, height)

    def paste(self, picture, x, y, width, height, resample):
        size = (round(width * FINE), round(height * FINE))
        self.image.paste(picture.resize(size, resample), (round(x * FINE), round(y * FINE)))

    def text(self, x, y, string, size, colour=INK, anchor="la"):
        font = ImageFont.load_default(size * FINE)
        self.draw.text((x * FINE, y * FINE), string, colour, font, anchor)

    def frame(self, x0, y0, x1, y1, colour):
        """A line of width LINE inside the rectangle."""
        corners = (x0 * FINE, y0 * FINE, x1 * FINE - 1, y1 * FINE - 1)
        self.draw.rectangle(corners, None, colour, LINE * FINE)

    def dot(self, x, y, radius, colour):
        corners = (x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse([FINE * v for v in corners], colour)

    def tag(self, x, y, string, colour, size=19):
        """A filled label with its top-left corner at (x, y)."""
        font = ImageFont.load_default(size * FINE)
        width = self.draw.textlength(string, font) / FINE
        box = [FINE * v for v in (x, y, x + width + 16, y + size + 9)]
        self.draw.rectangle(box, colour)
        self.text(x + 8, y + (size + 9) / 2, string, size, "white", "lm")

    def save(self, path):
        self.image.resize(self.size, Image.Resampling.BOX).save(path, "PNG", optimize=True)


def draw_sheet(photograph, pooled):
    """The photograph with boxes and sample points; beside it the pooled regions [K, 3, P, Q]."""
    height, width = (round(ZOOM * size) for size in photograph.shape[:2])
    side = BINS * CELL + 2 * LINE  # a pooled region in its frame
    column = MARGIN + width + GAP
    sheet = Sheet(column + 2 * side + GAP + MARGIN, HEADER + height + FOOTER)

    sheet.text(MARGIN, 34, f"ROIAlign({BINS}, {BINS}, {1 / STEP})", 30)
    sheet.text(column, 34, f"{BINS} x {BINS} bins from each box", 30)
    sheet.paste(
        Image.fromarray(photograph), MARGIN, HEADER, width, height, Image.Resampling.BICUBIC
    )
    for name, box, colour in REGIONS:
        x0, y0 = MARGIN + ZOOM * box[0], HEADER + ZOOM * box[1]
        box_width, box_height = (ZOOM * extent for extent in extents(box))
        for y in sample_positions(y0, box_height):
            for x in sample_positions(x0, box_width):
                sheet.dot(x, y, 1, "white")
        sheet.frame(x0, y0, x0 + box_width, y0 + box_height, colour)
        sheet.tag(x0, y0 + box_height, name, colour)

    for k, (name, box, colour) in enumerate(REGIONS):
        x = column + k % 2 * (side + GAP)
        y = HEADER + k // 2 * (height - side - CAPTION)
        pixels = np.rint(255 * pooled[k].transpose(1, 2, 0)).astype(np.uint8)  # [P, Q, 3]
        sheet.frame(x, y, x + side, y + side, colour)
        sheet.paste(
            Image.fromarray(pixels),
            *(x + LINE, y + LINE, side - 2 * LINE, side - 2 * LINE),
            Image.Resampling.NEAREST,
        )
        sheet.text(x, y + side + CAPTION, name, 24, anchor="ls")
        size = "{} x {} pixels".format(*extents(box))
        sheet.text(x + side, y + side + CAPTION, size, 20, FAINT, "rs")

    bottom = HEADER + height + FOOTER / 2
    samples = f"white: the {SAMPLE_NUM} x {SAMPLE_NUM} samples of each bin"
    sheet.text(MARGIN, bottom, samples, 20, FAINT, "lm")
    sheet.text(column + 2 * side + GAP, bottom, CREDIT, 20, FAINT, "rm")
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
    draw_sheet(photograph, pooled).save(output)

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
