"""Time and memory of one C3-SemiSeg training step of a recipe, part by part, on generated images.

    python benchmarks/c3semiseg_step.py --dataset cityscapes
    python benchmarks/c3semiseg_step.py --dataset cityscapes --steps 20 --precision bf16

A semi-supervised step as in c3semiseg.train: colours, the teacher's labels and the thresholds of
all images, then forward and backward pass of each group. Prints the median time of each part and
the peak memory up to its end. Loading images is not part of it.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import c3semiseg
from common.augment import randaugment
from common.ema import make_teacher, update_teacher
from common.record import peak_memory


class Clock:
    """Seconds of each part, and the peak memory when it had been done for the first time."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.memory = device, defaultdict(list), {}
        self.last = time.perf_counter()

    def tick(self, part: str) -> None:
        """What was done since the last tick is the part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part].append(now - self.last)
        self.memory.setdefault(part, peak_memory(self.device))
        self.last = time.perf_counter()


def step(recipe, nets, optimizer, batch, options, clock: Clock) -> None:
    """One step; options are the strong view, the thresholds and the contrast."""
    (student, teacher), (image_l, label_l, image_u) = nets, batch
    strong, regions, contrast, autocast = options
    update_teacher(teacher, student, decay=recipe.ema_decay, buffers="keep")
    clock.tick("teacher's update")
    strong_u = strong(0, image_u)
    clock.tick("colours")
    targets = []
    for image in image_u.split(recipe.group_size):
        with autocast():
            targets.append(c3semiseg.label_images(teacher, image))
    clock.tick("teacher's labels")
    prob, confidence, label_u, embedding = (torch.cat(t) for t in zip(*targets, strict=True))
    label_u = label_u.masked_fill(~regions.update(confidence, label_u), 255)
    clock.tick("thresholds")
    weight = c3semiseg.loss_weights(recipe, recipe.iterations)
    tensors = (image_l, label_l, strong_u, prob, label_u, embedding)
    how = {"average": recipe.average, "mixing": recipe.mixing, "sets": recipe.contrast}
    for group in zip(*(tensor.split(recipe.group_size) for tensor in tensors), strict=True):
        labeled, unlabeled = (*group[:2], None), group[2:]
        terms, _ = c3semiseg.c3_loss(student, labeled, unlabeled, contrast=contrast, **how)
        loss = sum(weight[name] * term for name, term in terms.items())
        clock.tick("forward pass of a group")
        loss.backward()
        clock.tick("backward pass of a group")
    optimizer.step()
    optimizer.zero_grad()
    clock.tick("optimizer")


def main() -> None:
    """Run steps of the recipe on random tensors and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=list(c3semiseg.RECIPES), default="cityscapes")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    args = parser.parse_args()
    recipe, device = c3semiseg.RECIPES[args.dataset], torch.device(args.device)
    torch.manual_seed(0)
    student = c3semiseg.network(recipe, args.classes, True).to(device)
    student = student.to(memory_format=torch.channels_last)
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=args.precision == "bf16"
    )
    teacher = make_teacher(student, train_mode=True)
    student.forward = autocast()(student.forward)
    backbone, heads = student.parameter_groups(recipe.lr, 1.0)
    optimizer = torch.optim.Adam([backbone, heads])
    size = (recipe.batch_size, 3, *(recipe.crop or recipe.size))
    image_l, image_u = torch.rand(2, *size, device=device)
    # Patches of one class each, so that classes have enough pixels to be sampled.
    label = torch.randint(args.classes, (size[0], 1, 4, 4), device=device).float()
    label = torch.nn.functional.interpolate(label, size[2:])[:, 0].long()
    colors = (recipe.jitter, recipe.hue, recipe.operations, recipe.operation_probability)
    strong = randaugment(recipe.student_view, *colors, recipe.magnitude)
    regions = c3semiseg.ConfidentRegions(args.classes, recipe.keep).to(device)
    sampling = {"per_class": recipe.per_class, "hard": recipe.hard_sampling}
    contrast = partial(c3semiseg.contrast_loss, temperature=recipe.temperature, **sampling)
    clock, options = Clock(device), (strong, regions, contrast, autocast)
    start = time.perf_counter()
    for _ in range(args.steps):
        step(recipe, (student, teacher), optimizer, (image_l, label, image_u), options, clock)
    print(
        f"{args.dataset}: {size[0]} + {size[0]} images of {size[2]}x{size[3]}, {device},", end=" "
    )
    print(f"{args.precision}, {torch.get_num_threads()} threads, {args.steps} steps")
    for part, seconds in clock.seconds.items():
        times = f"{len(seconds) // args.steps} x {statistics.median(seconds):.3f} s"
        print(f"{part:26}{times:>14}{clock.memory[part]:10.2f} GiB")
    total = (time.perf_counter() - start) / args.steps
    print(f"{'step':26}{total:12.3f} s{peak_memory(device):10.2f} GiB")


if __name__ == "__main__":
    main()
