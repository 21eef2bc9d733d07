"""Time and memory of ClassMix training steps of a recipe, on generated images.

    python benchmarks/classmix_step.py --dataset cityscapes --steps 3
    python benchmarks/classmix_step.py --dataset cityscapes --steps 300 --precision bf16 --compile

Prints the median and the range of the step time after two warm-up steps (which hold compilation),
steps and images per second, and the peak memory. Loading images is not part of it.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import classmix
from common.ema import make_teacher, update_teacher
from common.record import peak_memory


def main() -> None:
    """Run the loop body of classmix.train on random tensors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=list(classmix.RECIPES), default="cityscapes")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    recipe, device = classmix.RECIPES[args.dataset], torch.device(args.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    student = classmix.network(recipe, args.classes, True).to(device)
    student = student.to(memory_format=torch.channels_last)
    teacher = make_teacher(student, train_mode=True)
    if args.compile:
        student.compile()
        teacher.compile()
    optimizer = torch.optim.SGD(
        student.parameter_groups(recipe.lr, recipe.head_factor), momentum=0.9
    )
    size = (recipe.batch_size, 3, *(recipe.crop or recipe.size))
    image = torch.rand(2, *size, device=device)
    label = torch.randint(args.classes, (size[0], *size[2:]), device=device)
    generator = torch.Generator(device).manual_seed(0)
    seconds = []
    for _ in range(args.steps + 2):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss_l = classmix.cross_entropy(student(image[0]), label)
        loss_l.backward()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss_u, _ = classmix.classmix_loss(
                student,
                teacher,
                image[1],
                make_mask=partial(classmix.make_mask, recipe, args.classes, generator),
                augment=nn.Identity(),
            )
        loss_u.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, decay=0.99, buffers="copy")
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    timed = sorted(seconds[2:])
    middle = statistics.median(timed)
    print(
        f"{args.dataset} {size} on {device}, {args.precision}, {'' if args.compile else 'not '}"
        f"compiled: {middle:.3f} s a step ({timed[0]:.3f} to {timed[-1]:.3f}, n = {len(timed)}), "
        f"{1 / middle:.3f} steps/s, {2 * size[0] / middle:.2f} images/s, "
        f"{peak_memory(device):.2f} GiB peak"
    )


if __name__ == "__main__":
    main()
