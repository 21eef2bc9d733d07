"""Times ComplexMix's masks on the CPU against loops over the blocks.

    python benchmarks/complexmix_mask.py --threads 2

Labels are two 512x1024 maps of 19 classes in patches of 16x16 pixels. One loop ranks the classes of
each block inside the loop; the other ranks all blocks at once and only looks up block by block.
The times include drawing the scores. All three must give equal masks.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from complexmix import complex_mask

CLASSES = 19


def loop_mask(label: Tensor, p: int, generator: torch.Generator, *, rank_at_once: bool) -> Tensor:
    """complex_mask block by block, for heights and widths that p divides."""
    batch, height, width = label.shape
    rows, columns = height // p, width // p
    scores = torch.rand(batch, p * p, CLASSES, generator=generator)
    chosen = scores.argsort(2).argsort(2) < CLASSES // 2 if rank_at_once else None
    mask = torch.zeros(label.shape, dtype=torch.bool)
    for b in range(batch):
        for k in range(p * p):
            y, x = rows * (k // p), columns * (k % p)
            block = (b, slice(y, y + rows), slice(x, x + columns))
            if rank_at_once:
                mask[block] = chosen[b, k][label[block]]
            else:
                lowest = scores[b, k].argsort()[: CLASSES // 2]
                mask[block] = torch.isin(label[block], lowest)
    return mask


def main() -> None:
    """Compares the masks, then times the three ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=128, help="p (default: 128)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    label = torch.randint(CLASSES, (2, 32, 64))
    label = label.repeat_interleave(16, 1).repeat_interleave(16, 2)
    ways = {
        "complex_mask": lambda g: complex_mask(label, CLASSES, args.blocks, generator=g),
        "loop": lambda g: loop_mask(label, args.blocks, g, rank_at_once=False),
        "loop of lookups": lambda g: loop_mask(label, args.blocks, g, rank_at_once=True),
    }
    masks = [way(torch.Generator().manual_seed(0)) for way in ways.values()]
    assert all(torch.equal(masks[0], mask) for mask in masks)
    seconds = {name: [] for name in ways}
    for seed in range(args.repeats):
        for name, way in ways.items():
            generator = torch.Generator().manual_seed(seed)
            began = time.perf_counter()
            way(generator)
            seconds[name].append(time.perf_counter() - began)
    print(f"{tuple(label.shape)}, p = {args.blocks}, {args.threads} threads")
    for name, values in seconds.items():
        middle, low, high = (1000 * f(values) for f in (statistics.median, min, max))
        ratio = middle / 1000 / statistics.median(seconds["complex_mask"])
        print(
            f"{name}: median {middle:.1f} ms ({low:.1f} to {high:.1f}, n = {len(values)}), "
            f"{ratio:.1f} times complex_mask"
        )


if __name__ == "__main__":
    main()
