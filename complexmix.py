"""ComplexMix (Chen, Ouyang, Zhu, Agam; ICIP 2021, arXiv:2101.10156).

As in ClassMix, a mean teacher labels two unlabeled images, and classes of the first image are
pasted onto the second. But the images are split into p x p blocks, and half of the classes are
drawn anew in each block. p, which sets the complexity, is drawn in each iteration.

    draw_blocks         section 3.1, mixing strategy: p of an iteration
    complex_mask        section 3.1, mixing strategy: M
    mix                 section 3.1, mixing strategy: u_ab = M u_a + (1 - M) u_b
    unlabeled_weight    lambda of equation 1; section 3.1, algorithm: confidence
    cross_entropy       equation 2, labeled term of equation 1
    complexmix_loss     equation 3, unlabeled term of equation 1

    choice             paper                 here                             flag
    half of which      all (section 3.1),    all (else nothing is pasted of   --classes present
      classes          a block's (section 1) a block with one class)
    p                  "each iteration"      uniform, one for a batch         --blocks
    confidence         "sufficiently high"   lambda: share of such pixels     --weighting pixel
    warm-up            "initial training"    1000 of the 40000 steps          --warmup
    teacher            starts as a copy      a copy in the first two mixed steps
    1/N (eq. 2, 3)     labeled examples      mean over images and pixels

No code was published. What is not in the table is as in classmix.py.

    python complexmix.py --dataset cityscapes --data-dir data/cityscapes --labeled 0.125

The paper reports 62.25 +- 1.22% mIoU for this command (1/30: 53.88, 1/4: 64.07, 1/2: 66.77).
Measured on streets, student: 56.2% with 32 labels, supervised 52.1% (3 seeds; README.md, results/).
"""

from common import InputError, ranks, run  # first: handles Ctrl-C during the other imports

# isort: split
import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from common.augment import scale_crop_flip, without_label
from common.datasets import open_dataset, select
from common.deeplab import DeepLabV2, load_weights
from common.ema import make_teacher, update_teacher
from common.flags import Count, Positive, Share


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of sections 3.2 and 4 for Cityscapes, or as noted; "code" is that of ClassMix."""

    size: tuple[Count, Count] | None = (512, 1024)  # height and width of resized images, pixels
    crop: tuple[Count, Count] | None = None  # height and width of random crops, pixels
    scale_range: tuple[Positive, Positive] = (1.0, 1.0)  # random scale before the crop
    flip: bool = False  # mirror images at random
    batch_size: Count = 2  # labeled images in a step, and as many unlabeled ones
    iterations: Count = 40_000  # training steps
    warmup: int = 1_000  # first steps, on labeled images only (3.1; length ours)
    optimizer: Literal["sgd", "adam"] = "sgd"  # the paper's is SGD
    lr: float = 2.5e-4  # learning rate of the backbone
    head_factor: float = 10.0  # the classifiers' learning rate, as a multiple of lr (code)
    lr_power: float = 0.9  # lr is multiplied by (1 - iteration / iterations) ** lr_power
    momentum: Share = 0.9  # momentum of SGD
    nesterov: bool = False  # use Nesterov momentum with SGD
    weight_decay: float = 5e-4  # weight decay of all trained parameters
    ema_decay: Share = 0.99  # decay of the teacher, reached from 0 in 100 steps (code)
    weight_scope: Literal["batch", "sample"] = "batch"  # average lambda over a batch or an image
    blocks: tuple[Count, ...] = (4, 16, 64, 128)  # choices of p, the number of blocks a side (3.1)
    classes: Literal["all", "present"] = "all"  # half of all (3.1), or of a block's
    weighting: Literal["fraction", "pixel"] = "fraction"  # weight of loss_u (ours)
    unlabeled_weight: float = 1.0  # factor of lambda (ours)
    confidence_threshold: Share = 0.968  # least confidence of a confident pixel (ClassMix)
    layers: tuple[Count, Count, Count, Count] = (3, 4, 23, 3)  # blocks in a stage: ResNet-101
    width: Count = 64  # channels of the first convolution
    aspp_rates: tuple[Count, ...] = (6, 12, 18, 24)  # dilations of the classifiers
    mean: tuple[float, float, float] | None = None  # RGB to subtract, 0-255 (default: the weights')


VOC = Recipe(size=None, crop=(321, 321), scale_range=(0.5, 1.5), flip=True, batch_size=10)
SMALL = Recipe(flip=True, batch_size=4, layers=(1, 1, 1, 1), width=16, aspp_rates=(1, 2))
ADAM = replace(SMALL, optimizer="adam", lr=6e-3, head_factor=1.0, weight_decay=0.0)
CROPS = {"size": (180, 240), "crop": (120, 160), "scale_range": (0.75, 1.5)}
# camvid and bdd100k are nearly as cityscapes. The numbers of streets and small are ours.
RECIPES = {
    "cityscapes": Recipe(),
    "voc": VOC,
    "camvid": replace(Recipe(), size=(360, 480), flip=True),
    "bdd100k": replace(Recipe(), size=(360, 640)),
    "folder": VOC,
    "streets": replace(ADAM, size=(64, 128), iterations=2_000, warmup=300),
    "small": replace(ADAM, iterations=4_000, warmup=500, **CROPS),  # --preset small
}


# ---- The method: depends only on torch; copy from here ----

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def draw_blocks(blocks: tuple[int, ...], seed: int, iteration: int) -> int:
    """p of an iteration, uniform over blocks, one for the whole batch (section 3.1)."""
    return random.Random(f"blocks/{seed}/{iteration}").choice(blocks)


def complex_mask(
    pseudo_label, num_classes: int, blocks: int, *, classes="all", scores=None, generator=None
) -> Tensor:
    """Pixels of a random half of the classes, drawn anew in each of p x p blocks (section 3.1).

    (B,H,W) int64 -> (B,H,W) bool. p = min(blocks, H, W). Pixel (i, j) is in the block of row
    floor(i p / H) and column floor(j p / W). Of n classes there, the floor(n/2) with the lowest
    scores are chosen; n counts "all" K classes, or those "present". scores (B,p*p,K) are uniform
    noise unless given. Ids outside 0..K-1 are never chosen.
    """
    (batch, height, width), device = pseudo_label.shape, pseudo_label.device
    p = min(blocks, height, width)
    if scores is None:
        scores = torch.rand(batch, p * p, num_classes, generator=generator, device=device)
    row = torch.arange(height, device=device).view(-1, 1) * p // height
    column = torch.arange(width, device=device) * p // width
    in_range = (pseudo_label >= 0) & (pseudo_label < num_classes)
    label = torch.where(in_range, pseudo_label, num_classes)  # K: out of range
    index = ((row * p + column) * (num_classes + 1) + label).flatten(1)
    table = torch.zeros(batch, p * p, num_classes + 1, dtype=torch.bool, device=device)
    present = table.flatten(1).scatter(1, index, True).view_as(table)[..., :num_classes]
    if classes == "all":
        present = torch.ones_like(present)
    scores = scores.masked_fill(~present, torch.inf)
    n = present.sum(-1, keepdim=True)
    order = scores.argsort(-1)
    lowest = (torch.arange(num_classes, device=device) < n // 2).expand_as(order)
    chosen = table.scatter(-1, order, lowest)
    return chosen.flatten(1).gather(1, index).view_as(pseudo_label)


def mix(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the mask is True, else b: (B,H,W) bool, (B,H,W) or (B,C,H,W) twice -> same."""
    return torch.where(mask if a.dim() == mask.dim() else mask.unsqueeze(1), a, b)


def unlabeled_weight(confidence: Tensor, threshold: float, weighting: str, scope: str, factor=1.0):
    """lambda (equation 1): (B,H,W) confidence of mixed images -> (B,H,W), (B,1,1) or (1,1,1).

    "fraction": the share of confident pixels in the "batch" or in each "sample"; "pixel": 1 for a
    confident pixel, else 0; all multiplied by factor.
    """
    confident = (confidence >= threshold).float()
    if weighting == "pixel":
        return factor * confident
    return factor * confident.mean((1, 2) if scope == "sample" else (0, 1, 2), keepdim=True)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over labeled pixels (equation 2), 0 if all are void: (B,K,H,W), (B,H,W) -> scalar."""
    total = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return total / (label != ignore_index).sum().clamp(min=1)


def complexmix_loss(
    student: nn.Module,
    teacher: nn.Module,
    image: Tensor,
    *,
    make_mask: Callable[[Tensor], Tensor],
    threshold: float,
    weighting: str = "fraction",
    scope: str = "batch",
    factor: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Second term of equation 1 for unlabeled images (B,3,H,W) -> scalar, and its details.

    Each image is pasted onto the next one, so B is at least 2. prob is g(u). make_mask
    turns pseudo-labels y into masks M (section 3.1).
    """
    with torch.no_grad():
        prob = teacher(image).float().softmax(1)
        confidence, pseudo_label = prob.max(1)
        mask = make_mask(pseudo_label)
        image_mix = mix(mask, image, image.roll(-1, 0))  # u_ab = M * u_a + (1 - M) * u_b
        label_mix = mix(mask, pseudo_label, pseudo_label.roll(-1, 0))  # y_ab
        confidence_mix = mix(mask, confidence, confidence.roll(-1, 0))
        weight = unlabeled_weight(confidence_mix, threshold, weighting, scope, factor)
    logits = student(image_mix)
    loss = (weight * F.cross_entropy(logits, label_mix, reduction="none")).mean()  # equation 3
    details = {"other": image.roll(-1, 0), "pseudo_label": pseudo_label, "mask": mask}
    details |= {"mixed_image": image_mix, "prediction": logits.detach()}
    return loss, {**details, "lambda": weight.mean()}


# ---- to here ----


def network(recipe: Recipe, num_classes: int, *, pretrained: bool) -> DeepLabV2:
    """Builds the paper's network. Pretrained batch-norm weights and biases stay as they are."""
    shape = {"layers": recipe.layers, "width": recipe.width, "rates": recipe.aspp_rates}
    return DeepLabV2(num_classes, **shape, batch_norm="batch", train_affine=not pretrained)


def make_optimizer(recipe: Recipe, student: nn.Module):
    """Returns the optimizer and the schedule of its learning rate."""
    groups = student.parameter_groups(recipe.lr, recipe.head_factor)
    options = {"weight_decay": recipe.weight_decay, "fused": student.mean.is_cuda}
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, **options)
    else:
        options |= {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
        optimizer = torch.optim.SGD(groups, **options)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, recipe.iterations, recipe.lr_power)
    return optimizer, schedule


def check(recipe: Recipe, args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together."""
    ranks.check_batch_size(recipe.batch_size, args, accumulate=args.accumulate, least=2)
    if recipe.scale_range != (1.0, 1.0) and recipe.crop is None:
        raise InputError("--scale-range: needs --crop, because scaled images differ in size")
    if recipe.nesterov and (recipe.momentum == 0 or recipe.optimizer != "sgd"):
        raise InputError("--nesterov: needs --optimizer sgd and --momentum above 0")
    if recipe.warmup >= recipe.iterations and not args.supervised:
        reason = f"{recipe.iterations} iterations, but {recipe.warmup} of them are warm-up"
        raise InputError(f"{reason}: raise --iterations or lower --warmup")


def train(recipe: Recipe, args: argparse.Namespace, make_session=run.Session) -> None:
    """Minimises equation 1; tests and benchmarks pass a make_session of their own."""
    check(recipe, args)
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size)
    labeled, unlabeled = select(data.train, args, batch_size=recipe.batch_size)
    torch.manual_seed(args.seed)
    student = network(recipe, data.num_classes, pretrained=args.weights != "none").to(args.device)
    if args.checkpoint is None:
        print(f"weights: {load_weights(student, args.weights)}")
        if recipe.mean is not None:
            student.mean.copy_(torch.tensor(recipe.mean).view(3, 1, 1) / 255)
    teacher = make_teacher(student, train_mode=True)
    optimizer, schedule = make_optimizer(recipe, student)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "schedule": schedule}
    session = make_session(recipe, args, data, (labeled, unlabeled), state, headline="student")
    start = session.restore()
    scales, mean = recipe.scale_range, student.mean
    transform = scale_crop_flip(scale_range=scales, crop=recipe.crop, flip=recipe.flip, mean=mean)
    batches_l = session.batches(labeled, transform, stream=0, start=start)
    first = max(start, recipe.warmup)
    batches_u = session.batches(unlabeled, partial(without_label, transform), stream=1, start=first)
    student = run.prepare(student, args, train=True)
    teacher = run.prepare(teacher, args, train=False)
    for iteration in range(start, recipe.iterations):
        mixing = not args.supervised and iteration >= recipe.warmup
        p = draw_blocks(recipe.blocks, args.seed, iteration)
        make_mask = partial(complex_mask, num_classes=data.num_classes, blocks=p)
        for micro_batch in session.micro_batches:  # their gradients add up
            image_l, label_l = next(batches_l)
            logits_l = student(image_l)
            loss_l = cross_entropy(logits_l, label_l)
            (loss_l / args.accumulate).backward()
            session.log({"loss_l": loss_l})
            pictures = {"labeled": image_l, "truth": label_l, "prediction_l": logits_l.detach()}
            if not mixing:
                continue
            image_u, _ = next(batches_u)
            seed = partial(ranks.step_seed, args.seed, iteration, micro_batch)
            generator = torch.Generator(args.device).manual_seed(seed("mask"))
            loss_u, details = complexmix_loss(
                student,
                teacher,
                image_u,
                make_mask=partial(make_mask, classes=recipe.classes, generator=generator),
                threshold=recipe.confidence_threshold,
                weighting=recipe.weighting,
                scope=recipe.weight_scope,
                factor=recipe.unlabeled_weight,
            )
            (loss_u / args.accumulate).backward()
            session.log({"loss_u": loss_u, "lambda": details.pop("lambda")})
            pictures = {"labeled": image_l, "truth": label_l, "unlabeled": image_u, **details}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(1 - 1 / (max(0, iteration - recipe.warmup) + 1), recipe.ema_decay)
        update_teacher(teacher, student, decay=decay, buffers="copy")
        session.end_step(iteration, pictures)


def main() -> None:
    """Flags -> recipe -> train, evaluate or predict."""
    run.main("complexmix", __doc__, RECIPES, network, train)


if __name__ == "__main__":
    main()
