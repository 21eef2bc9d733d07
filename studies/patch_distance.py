"""Are there gaps between classes in an image? CowMix, section 3.1, figures 1, 5 and 6.

    python studies/patch_distance.py --dataset camvid --data-dir data/camvid --images 367
    python studies/patch_distance.py --images 50 --queries 50

CamVid's 367 training photographs | 50 streets of 512x1024 pixels:
- Figures 1, 5: the distance between patches of neighbouring pixels has "effectively no correlation"
  with a class boundary between them. Agrees in part: a pair across a boundary is farther apart than
  a pair of one class in 78 | 72 % of cases at 15x15 pixels, in 66 | 54 % at 225x225 (the AUC; image
  by image 77 +- 5, 65 +- 7 | 84 +- 4, 64 +- 4). Correlations are 0.13, 0.07 | 0.07, 0.01.
- Figure 6: the nearest patch in another image is 3 times as far as the one across a boundary.
  Agrees that it is farther: the median is 1.9 (10-90 %: 1.2-2.4) | 6.1 (3.3-9.4). CamVid is a
  video; --images 40, every ninth photograph, gives 2.2. Its class makes no difference.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from figures import draw_histogram, draw_map, parse, save_numbers, save_sheet
from PIL import Image, ImageOps
from torch import Tensor

from common.layouts import VOID

OUT = Path(__file__).parents[1] / "results/studies/patch_distance"
BINS = 20_000  # of the histograms that replace millions of distances


def box_sum(values: np.ndarray, side: int) -> np.ndarray:
    """Sums over all side x side windows inside the image: (H,W) -> (H-side+1, W-side+1)."""
    integral = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    rows = integral[side:] - integral[:-side]
    return rows[:, side:] - rows[:, :-side]


def neighbor_distances(image: np.ndarray, side: int) -> list[np.ndarray]:
    """L2 distances of each pixel's patch to its right, and to its lower, neighbour's (3.1).

    (H,W,3) uint8 -> (H,W-1), (H-1,W), for values in [0,1]. The image is mirrored at its border.
    The box filter of the squared gradient adds integers, so flat areas have exactly 0.
    """
    half = side // 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), mode="symmetric").astype(np.int64)
    squared = [np.square(np.diff(padded, axis=axis)).sum(2) for axis in (1, 0)]
    return [np.sqrt(box_sum(values, side)) / 255 for values in squared]


def distance_map(image: np.ndarray, side: int) -> np.ndarray:
    """Mean distance to the patches of the four neighbours (figure 1): (H,W,3) -> (H,W)."""
    across, down = neighbor_distances(image, side)
    across = np.pad(across, ((0, 0), (1, 1)), mode="edge")
    down = np.pad(down, ((1, 1), (0, 0)), mode="edge")
    return (across[:, 1:] + across[:, :-1] + down[1:] + down[:-1]) / 4


def neighbors(label: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Classes of pixels and of their right, and their lower, neighbours."""
    return [(label[:, :-1], label[:, 1:]), (label[:-1], label[1:])]


def places(side: int) -> np.ndarray:
    """Distances of the bins, from 0 to the distance of a black and a white patch."""
    return np.linspace(0, 3**0.5 * side, BINS)


def count_pairs(image: np.ndarray, label: np.ndarray, side: int) -> np.ndarray:
    """Counts pairs of one class, and across a boundary, by distance (figure 5): (2,BINS)."""
    counts = np.zeros(2 * BINS, np.int64)
    for (a, b), distance in zip(neighbors(label), neighbor_distances(image, side), strict=True):
        cell = (distance / places(side)[1]).round().astype(np.int64) + BINS * (a != b)
        counts += np.bincount(cell[(a != VOID) & (b != VOID)], minlength=2 * BINS)
    return counts.reshape(2, BINS)


def auc(counts: np.ndarray) -> float:
    """Chance that a boundary pair is farther apart than a pair of one class; ties count half."""
    same, boundary = counts / counts.sum(1, keepdims=True)
    return (boundary * (same.cumsum() - same / 2)).sum()


def correlation(counts: np.ndarray) -> float:
    """Correlation of the distance with crossing a boundary (1) or not (0)."""
    place, share = np.arange(BINS), counts / counts.sum()
    away, boundary = place - (place * share).sum(), share[1].sum()
    variance = (away**2 * share).sum() * boundary * (1 - boundary)
    return (away * share[1]).sum() / variance**0.5


def centered(image: np.ndarray) -> Tensor:
    """(H,W,3) uint8 -> (3,H,W) in [-0.5,0.5]: smaller squares have smaller rounding errors."""
    return torch.from_numpy(image).movedim(2, 0).float() / 255 - 0.5


def inside(label: np.ndarray, side: int) -> np.ndarray:
    """Classes of the pixels whose patch is inside the image."""
    half, (height, width) = side // 2, label.shape
    return label[half : height - half, half : width - half]


def draw_query(image: np.ndarray, label: np.ndarray, side: int, rng) -> tuple | None:
    """Draws patches Q and P on both sides of a class boundary, if there are any in the image.

    -> class of Q, b = |Q - P|, Q . Q, conjugate spectrum of Q.
    """
    pixels, inner, places = centered(image), inside(label, side), []
    for down, (a, b) in enumerate(neighbors(inner)):
        found = np.argwhere((a != b) & (a != VOID) & (b != VOID)).tolist()
        places += [((y, x), (y + down, x + 1 - down)) for y, x in found]
    if not places:
        return None
    place, other = places[rng.integers(len(places))]
    patch, across = (pixels[:, y : y + side, x : x + side] for y, x in (place, other))
    distance, square = (patch - across).norm().item(), patch.square().sum().item()
    spectrum = torch.fft.rfft2(patch, s=label.shape).conj()
    return (inner[place], distance, square, spectrum) if distance else None


def nearest(queries: list, image: np.ndarray, label: np.ndarray, side: int) -> np.ndarray:
    """Distances to the image's nearest patch of the query's class, and of another class: (N,2).

    |A - Q|^2 = A . A + Q . Q - 2 Q . A. Q . A is a correlation, by FFT (B.1).
    """
    pixels, inner = centered(image), inside(label, side)
    squares = box_sum(pixels.double().square().sum(0).numpy(), side)
    spectrum, distances = torch.fft.rfft2(pixels), np.empty((len(queries), 2))
    for row, (_, query_class, _, square, query) in zip(distances, queries, strict=True):
        product = torch.fft.irfft2((spectrum * query).sum(0), s=label.shape).numpy()
        product = product[: inner.shape[0], : inner.shape[1]]  # where no patch wraps around
        squared = (squares + square - 2 * product).clip(0)  # rounding can go below 0
        for k, chosen in enumerate((inner == query_class, inner != query_class)):
            row[k] = np.sqrt(squared[chosen & (inner != VOID)].min(initial=np.inf))
    return distances


def measure(images: list, sides: list[int], count: int) -> tuple[dict, dict, np.ndarray]:
    """Numbers, counts of pairs by patch size, and ratios n / b (N,2): same class, another one."""
    rng, queries, counts = np.random.default_rng(0), [], {side: [] for side in sides}
    for number in rng.integers(len(images), size=10 * count).tolist():
        if len(queries) < count and (query := draw_query(*images[number], sides[-1], rng)):
            queries.append((number, *query))
    closest = np.full((len(queries), 2), np.inf)
    for number, (image, label) in enumerate(images):
        for side in sides:
            counts[side].append(count_pairs(image, label, side))
        others = [k for k, query in enumerate(queries) if query[0] != number]
        found = nearest([queries[k] for k in others], image, label, sides[-1])
        closest[others] = np.minimum(closest[others], found)
    ratio = closest / np.array([[across] for _, _, across, *_ in queries])
    ratio = ratio[np.isfinite(ratio).all(1)]  # both classes were found in other images
    numbers = {"images": len(images), "patches Q": len(ratio)}
    for side, each in counts.items():
        aucs, total = [auc(c) for c in each if c.any(1).all()], np.sum(each, 0)
        numbers |= {
            f"AUC, {side} pixels": auc(total),
            f"AUC by image, {side} pixels, mean and deviation": [np.mean(aucs), np.std(aucs)],
            f"correlation, {side} pixels": correlation(total),
        }
    kinds = {"any class": ratio.min(1), "same class": ratio[:, 0], "another class": ratio[:, 1]}
    for name, values in kinds.items():
        numbers[f"n / b, {name}, 10, 50, 90 %"] = np.percentile(values, (10, 50, 90)).tolist()
    return numbers, {side: np.sum(each, 0) for side, each in counts.items()}, ratio


def draw(folder: Path, name: str, image, label, counts: dict, ratio: np.ndarray) -> None:
    """Figure 1 for one image; figures 5 and 6."""
    maps, charts = [("image", ImageOps.contain(Image.fromarray(image), (400, 400)))], []
    for side, pairs in counts.items():
        title = f"neighbouring patches, {side}x{side}"
        maps.append((f"distance of {title}", draw_map(distance_map(image, side), label)))
        series = {"of one class": (places(side), pairs[0])}
        series["across a boundary"] = places(side), pairs[1]
        charts.append((f"{title}: AUC {auc(pairs):.2f}", draw_histogram(series, "distance")))
    kinds, one = ("of the same class", "of another class"), np.ones(len(ratio))
    series = {name: (ratio[:, k], one) for k, name in enumerate(kinds)}
    title = f"nearest patch in other images: median {np.median(ratio.min(1)):.1f}"
    charts.append((title, draw_histogram(series, "distance / distance across a boundary")))
    save_sheet(folder / f"{name}_maps.png", [maps])
    save_sheet(folder / f"{name}_histograms.png", [charts])


def main() -> None:
    """Measures, draws, and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--patches", type=int, nargs=2, default=(15, 225), help="two odd sides")
    parser.add_argument("--queries", type=int, default=100, help="patches Q of figure 6")
    parser.add_argument("--out", type=Path, default=OUT)
    args, images, _ = parse(parser, "train")
    if min(images[0][1].shape) < max(args.patches):
        parser.error(f"--patches {max(args.patches)}: larger than the images")
    numbers, counts, ratio = measure(images, sorted(args.patches), args.queries)
    draw(args.out, args.dataset, *images[len(images) // 2], counts, ratio)
    save_numbers(args.out / f"{args.dataset}.json", numbers)


if __name__ == "__main__":
    main()
