"""Draws what the four methods mix, on two streets and with the predictions of a trained network.

    python studies/overview.py runs/classmix_streets_32_s0/last.pt

The checkpoint is one of classmix.py on streets. Both streets are validation images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from figures import FONT
from PIL import Image, ImageDraw
from torch import Tensor

import c3semiseg
import classmix
import complexmix
import cowmix
from common.datasets import open_dataset
from common.flags import parse_args, read_checkpoint
from common.pictures import colorize, legend

TILE, LEFT = (152, 76), 118  # pixels: width and height of a picture, width of the names
COLUMNS = ("image A", "image B", "label of A", "mask (white: A)", "mixed image", "its label")


def tile(values: Tensor, palette) -> Image.Image:
    """Image, float (3,H,W), mask, bool (H,W), or label, int64 (H,W) -> a picture of size TILE."""
    if values.dtype == torch.int64:
        picture = colorize(values.byte().numpy(), palette).convert("RGB")
    else:
        values = values.float().expand(3, -1, -1).movedim(0, 2)
        picture = Image.fromarray((255 * values).round().byte().numpy())
    smooth = values.is_floating_point() and values.shape[0] == 3
    return picture.resize(TILE, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def draw(rows: dict[str, list[Tensor]], class_names, palette) -> Image.Image:
    """Draws a row of pictures for each method, with titles and a legend."""
    names = legend(class_names, palette, LEFT + 6 * (TILE[0] + 6), 13)
    height = 26 + len(rows) * (TILE[1] + 6)
    sheet = Image.new("RGB", (names.width, height + names.height), "white")
    sheet.paste(names, (0, height))
    pen = ImageDraw.Draw(sheet)
    for x, title in enumerate(COLUMNS):
        pen.text((LEFT + x * (TILE[0] + 6), 4), title, "black", FONT)
    for y, (name, pictures) in enumerate(rows.items()):
        top = 26 + y * (TILE[1] + 6)
        pen.text((4, top + 4), name, "black", FONT)
        for x, values in enumerate(pictures):
            sheet.paste(tile(values, palette), (LEFT + x * (TILE[0] + 6), top))
    return sheet


def main() -> None:
    """Predicts, mixes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/studies/overview.png"))
    parser.add_argument("--images", type=int, nargs=2, default=(3, 11), help="A and B")
    args = parser.parse_args()
    argv = ["--evaluate", str(args.checkpoint)]
    recipe, _ = parse_args("classmix", "", classmix.RECIPES, argv=argv)
    data = open_dataset("streets", None, size=recipe.size)
    network = classmix.network(recipe, data.num_classes, pretrained=False).eval()
    network.load_state_dict(read_checkpoint(args.checkpoint, "classmix")["state"]["student"])
    pairs = [data.val[index] for index in args.images]
    image_a, image_b = (image[None].float() / 255 for image, _ in pairs)
    truth = pairs[0][1][None].long()
    with torch.no_grad():
        label_a, label_b = (network(image).argmax(1) for image in (image_a, image_b))
    generator, size = torch.Generator().manual_seed(0), recipe.size
    spots = cowmix.cow_mask(1, size, sigma_range=(8, 8), generator=generator)
    box = c3semiseg.box_mask(1, size, generator=generator)
    masks = {
        "CowMix:\nspots": (~spots, label_a),
        "ClassMix:\nhalf of the\nclasses of A": (
            classmix.class_mask(label_a, data.num_classes, generator=generator),
            label_a,
        ),
        "ComplexMix:\nthe same in\neach block": (
            complexmix.complex_mask(label_a, data.num_classes, 4, generator=generator),
            label_a,
        ),
        "C3-SemiSeg:\na box; A has\na true label": (~box, truth),
    }
    rows = {}
    for name, (mask, label) in masks.items():
        mixed = classmix.mix(mask, image_a, image_b), classmix.mix(mask, label, label_b)
        rows[name] = [x[0] for x in (image_a, image_b, label, mask, *mixed)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, data.class_names, np.array(data.palette)).save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()
