"""Speed of a method's training steps: time, FLOP, memory, kernels and waits.

    python benchmarks/speed.py classmix --dataset cityscapes --steps 3
    python benchmarks/speed.py c3semiseg --dataset bdd100k --precision fp32 --no-compile
    python benchmarks/speed.py cowmix --dataset camvid --data-dir CamVid --data

Calls the train function of a method with the recipe of a data set. All flags of the method work.
Steps use unlabeled images unless --supervised is given, and initial weights are random. Without
--data the data set need not be here: images are generated and on the device before a step begins.
With --data the method's own loaders read it, and the time spent waiting for them is measured.

The first step counts FLOP (of convolutions and matrix products, uncompiled), two more compile and
warm up, --steps steps are timed without a wait between them, and a last one is profiled. "share" is
the step's FLOP/s as a share of a large matrix product's in the same process and number format;
fp32 allows TF32 in the product where cuDNN allows it in convolutions. "busy ms" is the time that
kernels and copies take in the profiled step: where it is far below "ms", the GPU waits for
launches. Those that take longest are printed. On a CPU, GiB is the peak of the process, and
operators are counted instead of kernels. --inductor turns on an option of torch's compiler, such
as combo_kernels, and can be repeated.
"""

import argparse
import fcntl
import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import run
from common.datasets import Data, loader

CLASSES, UNTIMED = 19, 3
METHODS = ("classmix", "complexmix", "cowmix", "c3semiseg")
END = "end of the step"
WAITS = {f"cuda{name}Synchronize" for name in ("Stream", "Device", "Event")} | {"cudaMemcpy"}


class TimedSession(run.Session):
    """A session that measures steps and writes no run folder."""

    def __init__(self, options: argparse.Namespace, *rest, **named):
        super().__init__(*rest, **named)
        self.options, self.cuda = options, self.args.device.type == "cuda"
        self.times, self.drawn, self.waited = [], 0, 0.0
        self.turn = options.turn and os.open(options.turn, os.O_CREAT | os.O_WRONLY)

    def restore(self) -> int:
        """Starts after the recipe's warm-up, where steps begin to use unlabeled images."""
        if self.turn:
            fcntl.flock(self.turn, fcntl.LOCK_SH)
        if self.options.data:
            for _ in loader(self.data.train, os.cpu_count() or 1, batch_size=None):
                pass  # decodes large images
        self.counter = FlopCounterMode(display=False).__enter__()
        if self.args.compile:  # compiled code hides its products from the counter
            torch.compiler.set_stance("force_eager")
        self.begin = getattr(self.recipe, "warmup", 0)
        return self.begin

    def batches(self, indices, transform, *, stream: int, start: int):
        """Yields micro-batches of the data set, or one generated micro-batch again and again."""
        real = super().batches(indices, transform, stream=stream, start=start)
        batches = real if self.options.data else self._generated()
        while True:
            before = time.perf_counter()
            image, label = next(batches)
            self.waited += time.perf_counter() - before
            self.drawn += len(image)
            yield image, label

    def _generated(self):
        recipe, device = self.recipe, self.args.device
        count = recipe.batch_size // (self.args.ranks * len(self.micro_batches))
        size = recipe.crop or recipe.size
        image = torch.rand(count, 3, *size, device=device)
        if self.cuda:
            image = image.contiguous(memory_format=torch.channels_last)
        # In patches of one class, C3-SemiSeg finds enough pixels of each class to sample.
        patches = torch.randint(CLASSES, (count, 1, 4, 4), device=device)
        label = F.interpolate(patches.float(), size)[:, 0].long()
        while True:
            yield image, label

    def end_step(self, iteration: int, pictures: dict) -> None:
        """Goes on to the next phase, or takes the time; prints the result after the last step."""
        step, last_timed = iteration - self.begin, UNTIMED - 1 + self.options.steps
        if step == 0:
            self.counter.__exit__(None, None, None)
            if self.args.compile:
                torch.compiler.set_stance("default")
        if step == UNTIMED - 1:
            self._start_timing()
        if UNTIMED - 1 <= step <= last_timed:
            self.times.append(
                torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
            )
            if self.cuda:
                self.times[-1].record()
        if step == last_timed:
            self._synchronize()
            seconds = time.perf_counter() - self.clock
            self.percent_waited = 100 * self.waited / seconds if self.options.data else None
            self.gib = torch.cuda.max_memory_allocated() / 2**30
            if not self.cuda:  # Linux counts in KiB
                self.gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            self.profile = torch.profiler.profile().__enter__()
        if step > last_timed:
            with torch.profiler.record_function(END):
                self._synchronize()
            self.profile.__exit__(None, None, None)
            if self.first:
                self._report()
        torch.compiler.cudagraph_mark_step_begin()  # a CUDA graph may overwrite its last outputs

    def _start_timing(self) -> None:
        """Waits until no process that shares --turn prepares or times its steps."""
        self._synchronize()
        if self.turn:
            fcntl.flock(self.turn, fcntl.LOCK_EX)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.drawn, self.waited, self.clock = 0, 0.0, time.perf_counter()

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _profiled(self) -> dict:
        """Counts kernels (on a CPU operators) and waits for the device in the profiled step."""
        events = self.profile.events()
        end = next(event.time_range.start for event in events if event.name == END)
        names = [event.name for event in events if event.time_range.start < end]
        if not self.cuda:
            return {"kernels": sum(name.startswith("aten::") for name in names), "waits": None}
        on_device = [event for event in events if event.device_type == DeviceType.CUDA]
        kernels, ms = 0, defaultdict(list)
        for event in on_device:
            if not event.is_user_annotation:
                ms[event.name].append(event.time_range.elapsed_us() / 1000)
                kernels += not event.name.startswith(("Memcpy", "Memset"))
        longest = sorted(ms.items(), key=lambda item: -sum(item[1]))[:25]
        lines = (f"{sum(times):9.3f} ms {len(times):5} x {name[:120]}" for name, times in longest)
        print("\n".join(lines))
        busy = sum(map(sum, ms.values()))
        return {"kernels": kernels, "busy ms": busy, "waits": sum(name in WAITS for name in names)}

    def _report(self) -> None:
        args, recipe, steps = self.args, self.recipe, self.options.steps
        pairs = zip(self.times, self.times[1:], strict=False)
        ms = [a.elapsed_time(b) if self.cuda else 1000 * (b - a) for a, b in pairs]
        middle, tflop = statistics.median(ms), self.counter.get_total_flops() / 1e12
        speed, product = 1000 * tflop / middle, product_speed(args.device, args.precision)
        result = {
            **{name: vars(args)[name] for name in ("method", "dataset", "precision", "compile")},
            "inductor": " ".join(self.options.inductor) if args.compile else "",
            "network": getattr(recipe, "network", "deeplab"),
            "group": getattr(recipe, "group_size", None),
            "images": args.ranks * self.drawn // (steps + 1),  # the profiled step draws, too
            "size": "{}x{}".format(*(recipe.crop or recipe.size)),
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            **{"ranks": args.ranks, "threads": torch.get_num_threads(), "steps": steps},
            **{"ms": middle, "ms_least": min(ms), "ms_most": max(ms)},
            **{"TFLOP": tflop, "TFLOP/s": speed, "product TFLOP/s": product},
            **{"share %": 100 * speed / product, "GiB": self.gib},
            **self._profiled(),
            "data %": self.percent_waited,
        }
        print(", ".join(f"{name} {_text(value)}" for name, value in result.items()), flush=True)
        if self.options.json:
            with open(self.options.json, "a") as file:
                file.write(json.dumps(result) + "\n")


def product_speed(device: torch.device, precision: str) -> float:
    """TFLOP/s of a product of two large square matrices in a number format."""
    n = 8192 if device.type == "cuda" else 512
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    matrix = torch.randn(n, n, device=device)
    matrix = matrix.bfloat16() if precision == "bf16" else matrix
    seconds = []
    for _ in range(10):  # the first ones choose an algorithm and raise the clock
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e12


def _text(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Trains for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--steps", type=int, default=3, help="number of timed steps (default: 3)")
    parser.add_argument("--data", action="store_true", help="read the data set")
    more = {"action": "append", "default": [], "metavar": "OPTION"}
    parser.add_argument("--inductor", **more, help="turn on an option of the compiler")
    parser.add_argument("--json", help="add the result to this file, as one line")
    parser.add_argument("--turn", help="processes that share this file take turns at timed steps")
    options, flags = parser.parse_known_args()
    method = importlib.import_module(options.method)
    stubs = {"load_weights": lambda *_: "random"}
    if not options.data:
        names = tuple(map(str, range(CLASSES)))
        data = Data(train=[], val=[], class_names=names, palette=((0, 0, 0),) * CLASSES)
        stubs["open_dataset"] = lambda *_, **named: data
        stubs["select"] = lambda *_, **named: ([], [])

    def train(recipe, args) -> None:
        iterations = getattr(recipe, "warmup", 0) + UNTIMED + options.steps + 1
        recipe = replace(recipe, iterations=iterations)
        method.train(recipe, args, make_session=partial(TimedSession, options))

    preset = getattr(method, "preset", None)
    inductor = partialmethod(nn.Module.compile, options=dict.fromkeys(options.inductor, True))
    with (
        patch.multiple(method, **stubs),
        patch.object(nn.Module, "compile", inductor),
        patch.object(sys, "argv", [method.__file__, *flags]),
    ):
        run.main(options.method, method.__doc__, method.RECIPES, method.network, train, preset)


if __name__ == "__main__":
    main()
