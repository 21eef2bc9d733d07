"""Pictures: classes in colours, sheets of samples, and line charts, drawn with Pillow."""

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

TITLES = {
    "labeled": "labeled image",
    "unlabeled": "unlabeled image",
    "other": "other image",
    "pseudo_label": "pseudo-label",
    "strong_view": "recolored unlabeled image",
    "mask": "mask (white: this image)",
    "mask_b": "mask (white: other image)",
    "seen": "image that the student sees",
    "prediction": "student's prediction",
    "prediction_l": "prediction for labeled image",
    "prediction_u": "prediction for unlabeled image",
}
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def colorize(label: np.ndarray, palette: Sequence) -> Image.Image:
    """Returns a palette image of class ids, uint8 (H,W); void is black."""
    image = Image.fromarray(label)
    image.putpalette(np.uint8(palette).tobytes().ljust(768, b"\0"))
    return image


def overlay(picture: Image.Image, classes: Image.Image) -> Image.Image:
    """Tints a picture by its classes, with black lines between them."""
    tinted = Image.blend(picture, classes.convert("RGB"), 0.4)
    ids, pixels = np.asarray(classes), np.array(tinted)
    pixels[:, 1:][ids[:, 1:] != ids[:, :-1]] = 0
    pixels[1:][ids[1:] != ids[:-1]] = 0
    return Image.fromarray(pixels)


def legend(class_names: Sequence[str], palette: Sequence, width: int, text: int) -> Image.Image:
    """Names class ids and colours in rows. width, and text (height of letters), are in pixels."""
    font, x, y, places = ImageFont.load_default(text), 4, 0, []
    for name in (*(f"{k} {name}" for k, name in enumerate(class_names)), "void"):
        needed = round(font.getlength(name)) + 3 * text
        x, y = (4, y + 2 * text) if 4 < x > width - needed else (x, y)
        places.append((x, y, name))
        x += needed
    picture = Image.new("RGB", (width, y + 2 * text), "white")
    draw = ImageDraw.Draw(picture)
    for (x, y, name), color in zip(places, (*palette, (0, 0, 0)), strict=True):
        draw.rectangle((x, y + text // 2, x + text, y + 3 * text // 2), tuple(color), "black")
        draw.text((x + 1.4 * text, y + text), name, "black", font, anchor="lm")
    return picture


def draw_samples(columns: dict[str, Tensor], palette: Sequence, class_names) -> Image.Image:
    """Draws a column for each named batch, a row for each image, and a legend.

    A batch is images, float (B,3,H,W) in [0,1], masks, bool (B,H,W), or labels, int64 (B,H,W);
    "prediction", "prediction_l" and "prediction_u" are logits (B,K,H,W).
    """
    columns = {k: v.argmax(1) if k.startswith("prediction") else v for k, v in columns.items()}
    rows = zip(*(batch[:4].cpu() for batch in columns.values()), strict=False)
    tiles = [_tile(values, palette) for row in rows for values in row]
    sheet = TF.to_pil_image(make_grid(tiles, nrow=len(columns), pad_value=255))
    scale = max(1, 256 // tiles[0].shape[2])
    sheet = sheet.resize((scale * sheet.width, scale * sheet.height), Image.Resampling.NEAREST)
    text = max(12, sheet.width // 70)  # can be read where the sheet is shown 900 pixels wide
    titles = Image.new("RGB", (sheet.width, 3 * text), "white")
    names = legend(class_names, palette, sheet.width, text)
    whole = Image.fromarray(np.vstack([titles, sheet, names]))
    for k, name in enumerate(columns):
        title = textwrap.fill(
            TITLES.get(name, name.replace("_", " ")), 2 * sheet.width // (len(columns) * text)
        )
        place = (k * sheet.width / len(columns) + 2 * scale, 1)
        ImageDraw.Draw(whole).text(place, title, "black", ImageFont.load_default(text))
    return whole


def _tile(values: Tensor, palette: Sequence) -> Tensor:
    """One image, mask or label -> uint8 (3,H,W)."""
    if values.dtype == torch.bool:
        values = values.float().expand(3, -1, -1)
    if values.is_floating_point():
        return (255 * values.clamp(0, 1)).round().byte()
    return TF.pil_to_tensor(colorize(values.byte().numpy(), palette).convert("RGB"))


def draw_chart(lines: dict, title: str, xlabel: str, *, ends=None, log=(False, False), height=260):
    """Draws name -> (x, y, half height of its band) as a picture.

    ends: first and last x, by default those of the lines. log: whether x and y are logarithmic.
    """
    size, font = (760, max(height, 17 * len(lines) + 72)), ImageFont.load_default(26)
    picture = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")  # reducing it smooths the lines
    draw = ImageDraw.Draw(picture, "RGBA")
    left, right, top, bottom = 100, 2 * size[0] - 330, 60, 2 * size[1] - 84
    lines = {name: np.array(np.broadcast_arrays(*line), float) for name, line in lines.items()}
    x, y, half = np.concatenate(list(lines.values()), axis=1)
    column, values = _axis(ends or x, log[0], left, right)
    for value in values:
        draw.text((column(value), bottom + 8), f"{value:g}", "black", font, anchor="ma")
    row, values = _axis([*(y - half), *(y + half)], log[1], bottom, top)
    for value in values:
        draw.line([(left, row(value)), (right, row(value))], "#dddddd", 2)
        draw.text((left - 10, row(value)), f"{value:g}", "black", font, anchor="rm")
    draw.text((left, 14), title, "black", font)
    draw.text(((left + right) / 2, 2 * size[1] - 36), xlabel, "black", font, anchor="ma")
    order = sorted(lines, key=lambda name: -lines[name][1, -1])  # the best line is named first
    for (name, (x, y, half)), color in zip(lines.items(), itertools.cycle(COLORS), strict=False):
        around = np.concatenate([y - half, (y + half)[::-1]])
        band = np.stack([column(np.concatenate([x, x[::-1]])), row(around)], 1)
        draw.polygon(band.ravel().tolist(), color + "30")
        draw.line(np.stack([column(x), row(y)], 1).ravel().tolist(), color, 4, joint="curve")
        if len(x) == 1:
            at = column(x[0]), row(y[0])
            draw.ellipse((at[0] - 6, at[1] - 6, at[0] + 6, at[1] + 6), color)
        draw.text((right + 20, top + 34 * order.index(name)), name, color, font)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _axis(values, log: bool, first: int, last: int) -> tuple[Callable, list[float]]:
    """Returns a function from values to pixels first to last, and round values between them."""
    low, high, convert = float(min(values)), float(max(values)), np.log if log else np.asarray
    high = high if high > low else low + 1
    span = convert(high) - convert(low)
    unit = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(k * unit for k in (1, 2, 5, 10) if high - low <= 6 * k * unit)
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [t for n in powers for t in (10.0**n, 2 * 10.0**n, 5 * 10.0**n) if low <= t <= high]
    return lambda value: first + (convert(value) - convert(low)) / span * (last - first), ticks


def draw_curve(log: Path) -> Image.Image:
    """Draws a log.jsonl: losses, their weights and mIoU over steps."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    titles = ("losses (logarithmic)", "weights of losses, shares of pixels", "% mIoU")
    panels = {title: {} for title in titles}
    for entry in entries:
        for name, value in entry.items():
            scored = isinstance(value, dict)
            title = titles[2 if scored else not name.startswith("loss")]
            value = 100 * value["miou"] if scored else value
            if name not in ("iteration", "lr", "seconds"):
                x, y, _ = panels[title].setdefault(name, ([], [], 0))
                x.append(entry["iteration"])
                y.append(max(value, 1e-3) if title == titles[0] else value)  # a logarithmic axis
    ends = (0, entries[-1]["iteration"])
    charts = [
        draw_chart(lines, title, "step", ends=ends, log=(False, title == titles[0]))
        for title, lines in panels.items()
        if lines
    ]
    return Image.fromarray(np.vstack(charts))
