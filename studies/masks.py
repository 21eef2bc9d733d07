"""The four methods' masks on one image, and the numbers behind what the papers say of them.

    python studies/masks.py
    python studies/masks.py --dataset camvid --data-dir data/camvid --images 101

True labels take the place of the teacher's predictions, so these are the masks of a perfect
teacher. Means over 100 streets of 512x1024 pixels | over CamVid's 101 validation photographs:

masks              perimeter of 1000 pixels   of it on class boundaries, %   classes cut, %
CutMix             4.1 | 7.0                  0.6 | 1.5                      92 | 77
CowMix             31 | 63                    0.8 | 1.8                      99 | 99
ClassMix           8.3 | 18                   100 | 100                      0 | 0
ComplexMix, p = 4  13 | 26                    66 | 73                        92 | 89
... p = 16         30 | 54                    28 | 34                        99 | 99
... p = 64, 128    99, 191 | 165, 314         8, 4 | 11, 6                   100 | 100

- CowMix (3.4, figure 4): p = 0.5 gives half of the pixels, and twice the sigma about a quarter of
  the variation. Agrees: the share is 0.500 +- 0.011. The regions, 1330 at sigma 2, become 3.8, 3.4,
  2.9, 2.6 and 2.2 times fewer with each doubling; those cut by the border count whole.
- ClassMix (4.2): masks follow the boundaries of objects, and CutMix's cut objects. Agrees.
  CutMix's and CowMix's edges lie on boundaries as rarely as any pair of pixels: 0.7 | 1.8 %.
- ComplexMix (3.1): a larger p is more complex but less correct. Agrees, and is steep: from
  p = 16 on, every class is cut, and most of the edge is the blocks'. Half of all classes is half
  of the pixels for any p; half of the classes present in a block is 39, 21, 7 and 3 % of them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from figures import FONT, parse, save_numbers, save_sheet
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

import cowmix
from c3semiseg import box_mask
from classmix import class_mask, mix
from common.pictures import colorize
from complexmix import RECIPES, complex_mask

OUT = Path(__file__).parents[1] / "results/studies/masks"
SIGMAS, BLOCKS = (2, 4, 8, 16, 32, 64), RECIPES["cityscapes"].blocks  # figure 4; section 3.1
FOLLOWS, PRESENT = "perimeter on class boundaries", ", classes present"
GREEN, RED = (0, 150, 60), (225, 30, 30)


def cow(low: float, high: float, size, generator) -> Tensor:
    """A cow mask whose sigma is log-uniform in low to high: (1,H,W) bool."""
    return cowmix.cow_mask(1, size, sigma_range=(low, high), generator=generator)


def draw_masks(label: Tensor, num_classes: int, sigma_range, generator) -> dict[str, Tensor]:
    """A mask of each kind for one label map, which takes the place of the teacher's prediction."""
    size = label.shape[1:]
    masks = {
        "C3-SemiSeg": box_mask(1, size, generator=generator),
        "CowMix": cow(*sigma_range, size, generator),
        "ClassMix": class_mask(label, num_classes, generator=generator),
    }
    for p in BLOCKS:
        for classes, end in (("all", ""), ("present", PRESENT)):
            mask = complex_mask(label, num_classes, p, classes=classes, generator=generator)
            masks[f"ComplexMix, p = {p}{end}"] = mask
    return masks | {
        f"CowMix, sigma = {sigma}": cow(sigma, sigma, size, generator) for sigma in SIGMAS
    }


def edges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a pixel differs from its right, and from its lower, neighbour."""
    return values[:, 1:] != values[:, :-1], values[1:] != values[:-1]


def measure(mask: np.ndarray, label: np.ndarray, num_classes: int) -> dict[str, float]:
    """Size, complexity and correctness of a mask: (H,W) bool, (H,W) -> numbers."""
    pairs = list(zip(edges(mask), edges(label), strict=True))
    perimeter = sum(edge.sum() for edge, _ in pairs)
    followed = sum((edge & boundary).sum() for edge, boundary in pairs)
    white, black = (np.bincount(label[m], minlength=256)[:num_classes] for m in (mask, ~mask))
    return {
        "share of pixels": mask.mean(),
        "perimeter, of 1000 pixels": 1000 * perimeter / mask.size,
        "regions": ndimage.label(mask)[1] + ndimage.label(~mask)[1],
        FOLLOWS: followed / perimeter if perimeter else np.nan,
        "classes cut": ((white > 0) & (black > 0)).sum() / ((white > 0) | (black > 0)).sum(),
    }


def picture(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """Image, float (1,3,H,W) in [0,1], or mask, bool (1,H,W)."""
    values = values.float().mul(255).round().byte()[0]
    values = values.movedim(0, 2) if values.ndim == 3 else values
    return Image.fromarray(values.numpy()).resize(size, Image.Resampling.BOX)


def draw_edges(mask: np.ndarray, label: np.ndarray, image: Tensor, size) -> Image.Image:
    """Draws the edges of a mask over a pale image: green on class boundaries, red elsewhere."""
    pale = (255 - 80 * (1 - image[0].movedim(0, 2).numpy())).astype(np.uint8)
    lines = np.zeros((2, *label.shape), bool)  # on boundaries, elsewhere
    for k, place in enumerate(((slice(None), slice(1, None)), (slice(1, None), slice(None)))):
        edge, boundary = edges(mask)[k], edges(label)[k]
        lines[0][place] |= edge & boundary
        lines[1][place] |= edge & ~boundary
    thick = -(-label.shape[1] // size[0]) + 1  # so that the reduced picture keeps the lines
    for line, color in zip(lines, (GREEN, RED), strict=True):
        pale[ndimage.maximum_filter(line, thick)] = color
    return Image.fromarray(pale).resize(size, Image.Resampling.BOX)


def draw_sheets(folder: Path, name: str, scenes: list, palette, masks: dict) -> None:
    """Draws all four methods on two images, and ComplexMix with each p."""
    (image, label), (other, _) = scenes[0], scenes[len(scenes) // 2]
    size = (300, round(300 * label.shape[1] / label.shape[2]))
    classes = colorize(label[0].byte().numpy(), palette).convert("RGB").resize(size)
    legend = Image.new("RGB", size, "white")
    text = "White pixels of a mask come from image A.\n\nEdges of a mask that follow a boundary"
    text += "\nof classes in A are green. The others, red,\ncut through an area of one class."
    ImageDraw.Draw(legend).text((0, 10), text, "black", FONT)
    first = [("image A", picture(image, size)), ("image B", picture(other, size))]
    rows = [[*first, ("classes of A, as if predicted", classes), ("", legend)], [], [], []]
    captions = {
        "C3-SemiSeg": "C3-SemiSeg: the box of CutMix",
        "CowMix": "CowMix: smoothed noise",
        "ClassMix": "ClassMix: half of the classes of A",
        "ComplexMix, p = 16": "ComplexMix: half in each of 16x16 blocks",
    }
    for method, caption in captions.items():
        mask = masks[method]
        follows = measure(mask[0].numpy(), label[0].numpy(), len(palette))[FOLLOWS]
        rows[1].append((caption, picture(mask, size)))
        rows[2].append(("mixed", picture(mix(mask, image, other), size)))
        lines = draw_edges(mask[0].numpy(), label[0].numpy(), image, size)
        rows[3].append((f"{follows:.0%} of the edge on class boundaries", lines))
    save_sheet(folder / f"{name}.png", rows)
    rows = [[], [], []]
    for p in BLOCKS:
        mask, present = (masks[f"ComplexMix, p = {p}{end}"] for end in ("", PRESENT))
        rows[0].append((f"p = {p}: half of all classes in a block", picture(mask, size)))
        rows[1].append(("mixed", picture(mix(mask, image, other), size)))
        rows[2].append(("half of the classes present in a block", picture(present, size)))
    save_sheet(folder / f"{name}_blocks.png", rows)


def draw_figure_4(path: Path) -> None:
    """Draws a cow mask of 384x384 pixels with each sigma (CowMix, figure 4)."""
    generator = torch.Generator().manual_seed(0)
    masks = [(f"sigma = {sigma}", cow(sigma, sigma, (384, 384), generator)) for sigma in SIGMAS]
    save_sheet(path, [[(name, picture(mask, (192, 192))) for name, mask in masks]])


def main() -> None:
    """Draws the pictures, measures the masks of all images and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    args, pairs, palette = parse(parser, "val")
    num_classes = len(palette)
    scenes = [
        (torch.from_numpy(image)[None].movedim(3, 1) / 255, torch.from_numpy(label)[None].long())
        for image, label in pairs
    ]
    recipe = cowmix.RECIPES["cityscapes" if args.dataset == "streets" else args.dataset]
    generator, rows = torch.Generator().manual_seed(0), {}
    for number, (_, label) in enumerate(scenes):
        masks = draw_masks(label, num_classes, recipe.sigma_range, generator)
        if number == 0:
            draw_sheets(args.out, args.dataset, scenes, palette, masks)
        for name, mask in masks.items():
            values = measure(mask[0].numpy(), label[0].numpy(), num_classes)
            rows.setdefault(name, []).append(list(values.values()))
    draw_figure_4(args.out / "figure_4.png")
    boundaries = np.mean([np.mean([e.mean() for e in edges(y[0].numpy())]) for _, y in scenes])
    numbers = {
        "images": len(scenes),
        "share of all pairs of pixels on class boundaries": boundaries,
    }
    for name, row in rows.items():
        mean, deviation = np.nanmean(row, 0), np.nanstd(row, 0)
        pairs = zip(values, mean.tolist(), deviation.tolist(), strict=True)
        numbers[name] = {f"{key}, mean and deviation": pair for key, *pair in pairs}
    save_numbers(args.out / f"{args.dataset}.json", numbers)


if __name__ == "__main__":
    main()
