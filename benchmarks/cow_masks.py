"""Times cow masks against SciPy's filter.

    python benchmarks/cow_masks.py --repeats 20 --threads 2

Draws two masks of 512x1024 pixels, once with cow_mask and once with listing 1 of the paper.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import erfinv

sys.path.insert(0, str(Path(__file__).parents[1]))
from cowmix import cow_mask


def listing_1(size: tuple, sigma: float, p: float) -> np.ndarray:
    """Listing 1 of the paper, corrected: a mask of one size and one sigma."""
    noise = np.random.normal(size=size)
    smooth = gaussian_filter(noise, sigma)
    return smooth > erfinv(p * 2 - 1) * 2**0.5 * smooth.std() + smooth.mean()


def compare(repeats: int, threads: int) -> None:
    """Times two masks of 512x1024 with sigma log-uniform in 8 to 32, drawn noise included."""
    torch.set_num_threads(threads)
    rng, ours, theirs = np.random.default_rng(0), [], []
    for repeat in range(-1, repeats):
        sigmas = np.exp(rng.uniform(np.log(8), np.log(32), 2))
        began = time.perf_counter()
        sigma = torch.tensor(sigmas, dtype=torch.float32)
        cow_mask(2, (512, 1024), sigma_range=(8.0, 32.0), sigma=sigma)
        middle = time.perf_counter()
        for s in sigmas:
            listing_1((512, 1024), s, 0.5)
        if repeat >= 0:  # -1 is a warm-up
            ours.append(1e3 * (middle - began))
            theirs.append(1e3 * (time.perf_counter() - middle))
    for name, times in (("cow_mask", ours), ("listing 1, SciPy", theirs)):
        low, middle, high = np.percentile(times, (10, 50, 90))
        print(f"{name:18} median {middle:6.1f} ms, 10-90%: {low:.1f}-{high:.1f}")
    ratio = np.array(ours) / np.array(theirs)
    print(
        f"cow_mask / SciPy: median {np.median(ratio):.3f}, largest {ratio.max():.3f}, n {repeats}"
    )


def main() -> None:
    """Reads the flags and times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    compare(args.repeats, args.threads)


if __name__ == "__main__":
    main()
