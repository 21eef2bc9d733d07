"""A picture of ComplexMix's masks on one street: results/complexmix/masks.png.

    python benchmarks/masks.py

The street and its label, which stands for the teacher's prediction; then, for each p, the mask
(white: from the street), the street pasted on another one, and the mask when half of the classes
present in a block are drawn instead of half of all. Prints the masks' share of white pixels.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import streets
from common.evaluation import save_samples
from complexmix import RECIPES, complex_mask, mix

OUT = Path(__file__).parents[1] / "results/complexmix/masks.png"


def street(index: int, size: tuple[int, int]):
    """(1,3,H,W) float in [0,1] and (1,H,W) int64 of a validation scene."""
    image, label = map(torch.from_numpy, streets.draw(1, index, size))
    return image.permute(2, 0, 1)[None] / 255, label[None].long()


def main() -> None:
    """Draw the masks and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scene", type=int, default=0)
    parser.add_argument("--other", type=int, default=1, help="the scene pasted upon")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    image, label = street(args.scene, tuple(args.size))
    other, _ = street(args.other, tuple(args.size))
    columns = {"street, prediction, other street": [image[0], label[0], other[0]]}
    for p in RECIPES["cityscapes"].blocks:
        masks = {}
        for classes in ("all", "present"):
            generator = torch.Generator().manual_seed(0)
            how = {"classes": classes, "generator": generator}
            masks[classes] = complex_mask(label, len(streets.CLASS_NAMES), p, **how)
            print(f"p = {p}, {classes}: {masks[classes].float().mean():.3f} from the street")
        rows = [masks["all"][0], mix(masks["all"], image, other)[0], masks["present"][0]]
        columns[f"p = {p}: mask, mixed, mask of present classes"] = rows
    save_samples(args.out, columns, streets.PALETTE)


if __name__ == "__main__":
    main()
