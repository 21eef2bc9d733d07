"""Draws ComplexMix's masks for one street: results/complexmix/masks.png.

    python benchmarks/masks.py

The first column has the street, its label in place of the teacher's prediction, and another street.
Each other column has, for one p, the mask (white: from the street), the mixed image, and the mask
that draws half of the classes present in a block (--classes present). Also prints the share of
white pixels in each mask.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import streets
from common.evaluation import save_samples
from complexmix import RECIPES, complex_mask, mix

OUT = Path(__file__).parents[1] / "results/complexmix/masks.png"


def street(index: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A validation scene: image, float (1,3,H,W) in [0,1], and label, int64 (1,H,W)."""
    image, label = map(torch.from_numpy, streets.draw(1, index, size))
    return image.permute(2, 0, 1)[None] / 255, label[None].long()


def picture(mask: Tensor) -> Tensor:
    """bool (1,H,W) -> black and white (1,3,H,W)."""
    return mask[:, None].expand(-1, 3, -1, -1).float()


def main() -> None:
    """Draws the masks and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scene", type=int, default=0, help="number of the street")
    parser.add_argument("--other", type=int, default=1, help="number of the other street")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256), help="height and width")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    image, label = street(args.scene, tuple(args.size))
    other, _ = street(args.other, tuple(args.size))
    colors = torch.zeros(256, 3)  # void is black
    colors[: len(streets.PALETTE)] = torch.tensor(streets.PALETTE) / 255
    columns = {"street, prediction, other street": [image, colors[label].movedim(3, 1), other]}
    for p in RECIPES["cityscapes"].blocks:
        masks = {}
        for classes in ("all", "present"):
            generator = torch.Generator().manual_seed(0)
            masks[classes] = complex_mask(
                label, len(streets.CLASS_NAMES), p, classes=classes, generator=generator
            )
            print(f"p = {p}, {classes}: {masks[classes].float().mean():.3f} from the street")
        mixed = mix(masks["all"], image, other)
        rows = [picture(masks["all"]), mixed, picture(masks["present"])]
        columns[f"p = {p}: mask, mixed, mask of present classes"] = rows
    save_samples(args.out, {name: torch.cat(rows) for name, rows in columns.items()}, [])


if __name__ == "__main__":
    main()
