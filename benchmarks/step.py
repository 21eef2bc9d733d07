"""Time and memory of a method's training steps on generated images.

    python benchmarks/step.py classmix --dataset cityscapes --steps 3
    python benchmarks/step.py c3semiseg --dataset bdd100k --precision fp32 --no-compile

Calls the train function of a method with the recipe of a data set, which need not be here. All
flags of the method work. Steps use unlabeled images unless --supervised is given. Weights are
random, and images are on the device before a step begins. The first two steps do not count, because
they compile the networks. Prints median and range of the step time, images per second and peak
memory.
"""

import argparse
import importlib
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import run
from common.datasets import Data

CLASSES, UNTIMED = 19, 2
METHODS = ("classmix", "complexmix", "cowmix", "c3semiseg")


class TimedSession(run.Session):
    """A session that takes the time of each step and writes no files."""

    def restore(self) -> int:
        """Starts after the recipe's warm-up, where steps begin to use unlabeled images."""
        self.times, self.drawn = [], 0
        return getattr(self.recipe, "warmup", 0)

    def batches(self, indices, transform, *, stream: int, start: int):
        """Yields one generated micro-batch again and again."""
        recipe, device = self.recipe, self.args.device
        count = recipe.batch_size // (self.args.ranks * len(self.micro_batches))
        size = recipe.crop or recipe.size
        image = torch.rand(count, 3, *size, device=device)
        if device.type == "cuda":
            image = image.contiguous(memory_format=torch.channels_last)
        # In patches of one class, C3-SemiSeg finds enough pixels of each class to sample.
        patches = torch.randint(CLASSES, (count, 1, 4, 4), device=device)
        label = F.interpolate(patches.float(), size)[:, 0].long()
        while True:
            self.drawn += count
            yield image, label

    def end_step(self, iteration: int, pictures: dict) -> None:
        """Waits for the device and takes the time; prints the result after the last step."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if iteration + 1 == self.recipe.iterations and self.first:
            self._report()

    def _report(self) -> None:
        args, recipe = self.args, self.recipe
        seconds = [b - a for a, b in zip(self.times, self.times[1:], strict=False)][UNTIMED - 1 :]
        middle = statistics.median(seconds)
        images = self.args.ranks * self.drawn / len(self.times)
        height, width = recipe.crop or recipe.size
        print(
            f"{args.method}, {args.dataset}: {images:.0f} images of {height}x{width} a step, "
            f"{args.device}, ranks {args.ranks}, threads {torch.get_num_threads()}, "
            f"{args.precision}, compile {args.compile}\n"
            f"step: median {middle:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}, "
            f"n = {len(seconds)}), {images / middle:.2f} images/s, "
            f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
        )


def main() -> None:
    """Trains for a few steps without a data set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--steps", type=int, default=3, help="number of timed steps (default: 3)")
    args, flags = parser.parse_known_args()
    method = importlib.import_module(args.method)
    names = tuple(map(str, range(CLASSES)))
    data = Data(train=[], val=[], class_names=names, palette=((0, 0, 0),) * CLASSES)
    stubs = {
        "open_dataset": lambda *_, **options: data,
        "select": lambda *_, **options: ([], []),
        "load_weights": lambda *_: "random",
    }

    def train(recipe, settings) -> None:
        iterations = getattr(recipe, "warmup", 0) + UNTIMED + args.steps
        method.train(replace(recipe, iterations=iterations), settings, make_session=TimedSession)

    preset = getattr(method, "preset", None)
    with patch.multiple(method, **stubs), patch.object(sys, "argv", [method.__file__, *flags]):
        run.main(args.method, method.__doc__, method.RECIPES, method.network, train, preset)


if __name__ == "__main__":
    main()
