"""What the studies share: flags, images, sheets of pictures with captions."""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import InputError, streets
from common.datasets import DEFAULTS, open_dataset

FONT, BLUE, ORANGE = ImageFont.load_default(15), (31, 119, 180), (255, 127, 14)


def parse(parser: argparse.ArgumentParser, part: str) -> tuple[argparse.Namespace, list, tuple]:
    """Parses the flags. Returns them, some images and labels of a part, and the class colours.

    An image is uint8 (H,W,3), a label uint8 (H,W). Streets have the papers' size of Cityscapes.
    """
    parser.add_argument("--dataset", choices=DEFAULTS, default="streets")
    parser.add_argument("--data-dir", help="default: data/DATASET")
    parser.add_argument("--size", type=int, nargs=2, help="resize to this height and width")
    parser.add_argument("--images", type=int, default=100, help="so many images, evenly spaced")
    args = parser.parse_args()
    size = args.size or ((512, 1024) if args.dataset in ("streets", "cityscapes") else None)
    if args.dataset == "streets":
        seed = ["train", "val"].index(part)
        return args, [streets.draw(seed, k, size) for k in range(args.images)], streets.PALETTE
    try:
        data = open_dataset(args.dataset, args.data_dir, size=size)
    except InputError as error:
        parser.error(str(error))
    images = getattr(data, part)
    if not images.same_size:
        parser.error("the images differ in size: give --size")
    chosen = np.linspace(0, len(images) - 1, min(args.images, len(images))).round().astype(int)
    pairs = [images[k] for k in chosen.tolist()]
    arrays = [(np.moveaxis(image.numpy(), 0, 2).copy(), label.numpy()) for image, label in pairs]
    return args, arrays, data.palette


def save_sheet(path: Path, rows: list[list[tuple[str, Image.Image]]], gap: int = 12) -> None:
    """Writes a PNG with rows of (caption, picture); all pictures of a column have one width."""
    width = gap + sum(picture.width + gap for _, picture in rows[0])
    height = gap + sum(max(picture.height for _, picture in row) + 20 + gap for row in rows)
    sheet, y = Image.new("RGB", (width, height), "white"), gap
    for row in rows:
        x = gap
        for caption, picture in row:
            ImageDraw.Draw(sheet).text((x, y), caption, "black", FONT)
            sheet.paste(picture, (x, y + 20))
            x += picture.width + gap
        y += max(picture.height for _, picture in row) + 20 + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    print(path)


def save_numbers(path: Path, numbers: dict) -> None:
    """Writes and prints JSON, with a list of numbers on one line."""
    lines = json.dumps(numbers, indent=1, default=float)
    text = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), lines)
    path.write_text(text + "\n")
    print(text)


def draw_map(values: np.ndarray, label: np.ndarray) -> Image.Image:
    """Draws 0 white, the largest value dark blue and the class boundaries red (H,W), (H,W)."""
    share = (values / values.max())[..., None]
    pixels = 255 + share * (np.array([8, 29, 88]) - 255)
    pixels[:, 1:][label[:, 1:] != label[:, :-1]] = 255, 0, 0
    pixels[1:][label[1:] != label[:-1]] = 255, 0, 0
    return ImageOps.contain(Image.fromarray(pixels.round().astype(np.uint8)), (400, 400))


def draw_histogram(series: dict, xlabel: str, size=(400, 270)) -> Image.Image:
    """Draws shares of values in 40 bins for two series: name -> (values, their weights).

    The axis ends at the 99th percentile.
    """
    left, right, top, bottom = 12, size[0] - 12, 8, size[1] - 44
    ends = []
    for values, weights in series.values():
        order = values.argsort()
        last = np.searchsorted(weights[order].cumsum(), 0.99 * weights.sum())
        ends.append(values[order][last])
    edges, scale = np.linspace(0, max(ends), 41), (right - left) / max(ends)
    bars = {name: np.histogram(v, edges, weights=w)[0] / w.sum() for name, (v, w) in series.items()}
    chart = Image.new("RGB", size, "white")
    for k, (name, heights) in enumerate(bars.items()):
        x = np.repeat(left + edges * scale, 2)[1:-1]
        y = np.repeat(bottom - (bottom - top) * heights / np.max(list(bars.values())), 2)
        outline, filled = np.stack([x, y], 1).ravel().tolist(), chart.copy()
        area = [left, bottom, *outline, right, bottom]
        ImageDraw.Draw(filled).polygon(area, (BLUE, ORANGE)[k])
        chart = Image.blend(chart, filled, 0.4)
        draw = ImageDraw.Draw(chart)
        draw.line(outline, (BLUE, ORANGE)[k], 2)
        draw.text((right, top + 20 * k), name, (BLUE, ORANGE)[k], FONT, anchor="ra")
    draw.line([(left, bottom), (right, bottom)], "black")
    step = next(s for s in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if s >= max(ends) / 7)
    for value in np.arange(0, max(ends), step):
        draw.line([(left + value * scale, bottom), (left + value * scale, bottom + 4)], "black")
        draw.text((left + value * scale, bottom + 5), f"{value:g}", "black", FONT, anchor="ma")
    draw.text((size[0] / 2, size[1] - 20), xlabel, "black", FONT, anchor="ma")
    return chart
