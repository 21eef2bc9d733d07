"""ComplexMix (Chen, Ouyang, Zhu, Agam; ICIP 2021, arXiv:2101.10156).

As in ClassMix, a mean teacher labels two unlabeled images, and classes that it sees in one are
pasted on the other. But the image is split into p x p blocks and half of the classes are drawn in
each block anew; p, which sets the complexity, is drawn each iteration.

    draw_blocks                section 3.1, mixing strategy: p of an iteration
    complex_mask               section 3.1, mixing strategy: M
    mix                        section 3.1, mixing strategy: u_ab = M u_a + (1 - M) u_b
    unlabeled_weight           lambda of equation 1; section 3.1, algorithm: confidence
    cross_entropy              equation 2, first term of equation 1
    complexmix_loss            equation 3, second term of equation 1

No code was published: this file is the reference. Where the paper is silent or unclear:
- half of which classes: C/2 "where C is the total number of classes", as section 3.1 has it, not
  of those in the block (section 1), since a large p leaves mostly blocks of one class, of which
  half is none, and hardly anything would be mixed (--classes present);
- p, "for each iteration", is one for the batch, and uniform, as nothing favours a value (--blocks;
  a value given twice is drawn twice as often);
- "only when the confidence is sufficiently high": the loss is weighted by the share of confident
  pixels, as in ClassMix, whose ablation finds a filter of pixels worse (--weighting pixel,
  --weight-scope, --confidence-threshold); lambda is that share times 1 (--unlabeled-weight); masks
  are made of all pseudo-labels, the unsure ones too, or most early masks would be empty;
- initial training on labels: 1000 of the 40000 steps, a short stage that keeps the rest near
  ClassMix, without a new start of the learning rate (--warmup; 0 is ClassMix's start);
- the teacher's decay grows to 0.99, ClassMix's, from the end of that stage on, when it is the
  student's copy, batch-norm statistics too (--ema-decay); these stay the student's, as in ClassMix;
- whether the five runs had different labeled images: here they have (--split-seed N: the same);
- pretraining of the network: ImageNet, which can be downloaded (--weights FILE for COCO);
- no Nesterov momentum (--nesterov), power 0.9 as in the cited DeepLab (--lr-power), classifiers at
  10 times the learning rate as in ClassMix's code (--head-factor);
- the labeled images are not used as unlabeled ones too, as in ClassMix's code (--unlabeled all).
Without a flag: floor(C/2) for odd C, as ClassMix has it, 9 of Cityscapes' 19; blocks differ by a
pixel where p does not divide a side, p is at most the shorter one, as each block needs pixels; the
1/N of equations 2 and 3, "labeled examples" in both, is the mean over images and pixels, otherwise
the loss would be 524288 times ClassMix's at its learning rate. And, as in classmix.py, so that the
two differ in the mask and in the teacher's start alone: each image is pasted on the next one of the
batch; pseudo-labels are hard, with which equation 3 is the cross-entropy; the
teacher makes them (the paper writes the student's parameters for the teacher's twice); images are
resized bilinearly, labels by the nearest pixel; batch statistics, frozen affine parameters
(trained with --weights none); the student's last iterate is reported, beside it the teacher's.

    python complexmix.py --dataset cityscapes --data-dir data/cityscapes --labeled 0.125 --seed 0

With --seed 0 to 4 that makes the paper's five runs, for which it reports 62.25 +- 1.22% mIoU
(1/30: 53.88, 1/4: 64.07, 1/2: 66.77); not rerun. Measured: 55.9% mIoU on streets with 32 labels,
ClassMix 56.6%, supervised 51.5% (3 seeds; README.md, results/).
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import run
from common.augment import scale_crop_flip
from common.datasets import open_dataset, select
from common.deeplab import DeepLabV2, load_weights
from common.ema import make_teacher, update_teacher


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of sections 3 and 4 (Cityscapes); "silent": not in the paper, see above."""

    size: tuple[int, int] | None = (512, 1024)  # height, width images are resized to (4)
    crop: tuple[int, int] | None = None  # random crop; none in the paper (4)
    scale_range: tuple[float, float] = (1.0, 1.0)  # random scale before the crop; none (4)
    flip: bool = False  # random mirroring; none (4)
    batch_size: int = 2  # labeled images a step, and as many unlabeled (4)
    unlabeled: Literal["rest", "all"] = "rest"  # the rest of the images, or all (silent)
    iterations: int = 40_000  # steps (4), warm-up among them (silent)
    warmup: int = 1_000  # first steps on labeled images only (3.1; silent)
    optimizer: Literal["sgd", "adam"] = "sgd"  # sgd (3.2); adam is not in the paper
    lr: float = 2.5e-4  # of the backbone (3.2)
    head_factor: float = 10.0  # classifiers learn at head_factor * lr (silent)
    lr_power: float = 0.9  # lr * (1 - iteration / iterations) ** lr_power (3.2; silent)
    momentum: float = 0.9  # of SGD (3.2)
    nesterov: bool = False  # momentum (silent)
    weight_decay: float = 5e-4  # of all that learns (3.2)
    ema_decay: float = 0.99  # of the teacher, min(1 - 1 / (t + 1), ema_decay) (silent)
    blocks: tuple[int, ...] = (4, 16, 64, 128)  # blocks a side, p is one of them (3.1)
    classes: Literal["all", "present"] = "all"  # half of all, or of those in the block (3.1)
    weighting: Literal["fraction", "pixel"] = "fraction"  # of confident pixels (silent)
    weight_scope: Literal["batch", "sample"] = "batch"  # fraction of what (silent)
    unlabeled_weight: float = 1.0  # factor of lambda (silent)
    confidence_threshold: float = 0.968  # least confidence (silent)
    layers: tuple[int, int, int, int] = (3, 4, 23, 3)  # bottlenecks a stage: ResNet-101 (3.2)
    width: int = 64  # channels of the stem
    aspp_rates: tuple[int, ...] = (6, 12, 18, 24)  # dilations of DeepLab-v2's classifiers


VOC = Recipe(size=None, crop=(321, 321), scale_range=(0.5, 1.5), flip=True, batch_size=10)
SMALL = replace(Recipe(), size=(64, 128), layers=(1, 1, 1, 1), width=16, aspp_rates=(1, 2))
ADAM = replace(SMALL, optimizer="adam", lr=6e-3, head_factor=1.0, weight_decay=0.0)
# The paper has Cityscapes alone; the others are not in it: classmix.py's numbers but for warmup.
RECIPES = {
    "cityscapes": Recipe(),
    "voc": VOC,
    "camvid": replace(Recipe(), size=(360, 480), flip=True),
    "bdd100k": replace(Recipe(), size=(360, 640)),
    "folder": VOC,
    "streets": replace(ADAM, flip=True, batch_size=4, iterations=2_000, warmup=300),
}


# ---- The method: depends only on torch; copy from here ----


def draw_blocks(blocks: tuple[int, ...], seed: int, iteration: int) -> int:
    """p of an iteration, one of blocks (sec. 3.1), the same in every process.

    Drawn on the host: a number on the device would have to be waited for.
    """
    return random.Random(f"blocks/{seed}/{iteration}").choice(blocks)


def complex_mask(
    pseudo_label: Tensor,
    num_classes: int,
    blocks: int,
    *,
    classes: Literal["all", "present"] = "all",
    scores=None,
    generator=None,
) -> Tensor:
    """Pixels of a random half of the classes, drawn anew in each of p x p blocks (sec. 3.1).

    (B,H,W) int64 -> (B,H,W) bool. p = min(blocks, H, W); pixel i,j is in row floor(i p/H) and
    column floor(j p/W) of blocks. There the floor(n/2) of n classes with the lowest scores
    (B,p*p,K) are chosen, uniform noise unless given: of all K classes, or of those present in the
    block. Ids outside 0..K-1 are never chosen.
    """
    if classes not in ("all", "present"):
        raise ValueError(f"classes is 'all' or 'present', not {classes!r}")
    batch, height, width = pseudo_label.shape
    p, device = min(blocks, height, width), pseudo_label.device
    if scores is None:
        shape = (batch, p * p, num_classes)
        scores = torch.rand(shape, generator=generator, device=device)
    row = torch.arange(height, device=device) * p // height
    column = torch.arange(width, device=device) * p // width
    block = row[:, None] * p + column
    in_range = (pseudo_label >= 0) & (pseudo_label < num_classes)
    label = torch.where(in_range, pseudo_label, num_classes)
    table = torch.zeros(batch, p * p, num_classes + 1, dtype=torch.bool, device=device)
    index = (block * (num_classes + 1) + label).flatten(1)  # of pixels in the table
    number = num_classes
    if classes == "present":
        present = table.flatten(1).scatter(1, index, True).view_as(table)[..., :num_classes]
        scores = scores.masked_fill(~present, torch.inf)
        number = present.sum(2, keepdim=True)
    order = scores.expand(batch, p * p, num_classes).argsort(2)
    half = (torch.arange(num_classes, device=device) < number // 2).expand_as(order)
    chosen = table.scatter(2, order, half)
    return chosen.flatten(1).gather(1, index).view_as(pseudo_label)


def mix(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where mask, else b: (B,H,W) bool, (B,H,W) or (B,C,H,W) twice -> same."""
    return torch.where(mask if a.dim() == mask.dim() else mask.unsqueeze(1), a, b)


def unlabeled_weight(
    confidence: Tensor, threshold: float, *, weighting: str, scope: str, factor: float
) -> Tensor:
    """lambda (eq. 1): (B,H,W) mixed confidence -> (B,H,W), (B,1,1) or (1,1,1).

    "fraction" of confident pixels in the "batch" or in each "sample"; "pixel": 1 where confident,
    else 0; both times factor.
    """
    confident = factor * (confidence >= threshold).float()
    if weighting == "pixel":
        return confident
    return confident.mean((1, 2) if scope == "sample" else (0, 1, 2), keepdim=True)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over the batch's labeled pixels (eq. 2): (B,K,H,W), (B,H,W) int64 -> scalar.

    Void pixels do not count; 0 where all are void.
    """
    total = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return total / (label != ignore_index).sum().clamp(min=1)


def complexmix_loss(
    student: nn.Module,
    teacher: nn.Module,
    image: Tensor,
    *,
    make_mask: Callable[[Tensor], Tensor],
    threshold: float = 0.968,
    weighting: str = "fraction",
    scope: str = "batch",
    factor: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Second term of eq. 1 on one unlabeled batch: (B,3,H,W) -> scalar, what it was made of.

    Each image is pasted on the next one of the batch, the last on the first. make_mask turns
    pseudo-labels (B,H,W) into masks.
    """
    with torch.no_grad():
        prob = teacher(image).float().softmax(1)  # g(u_a), g(u_b), argmax: y_a, y_b
        confidence, pseudo_label = prob.max(1)
        mask = make_mask(pseudo_label)  # M
        image_mix = mix(mask, image, image.roll(-1, 0))  # u_ab = M * u_a + (1 - M) * u_b
        label_mix = mix(mask, pseudo_label, pseudo_label.roll(-1, 0))  # y_ab
        confidence_mix = mix(mask, confidence, confidence.roll(-1, 0))
        weight = unlabeled_weight(
            confidence_mix, threshold, weighting=weighting, scope=scope, factor=factor
        )
    logits = student(image_mix)
    loss = (weight * F.cross_entropy(logits, label_mix, reduction="none")).mean()  # eq. 3
    seen = {"pseudo_label": pseudo_label, "mask": mask, "image_mix": image_mix}
    return loss, {**seen, "logits": logits.detach(), "lambda": weight.mean()}


# ---- to here ----


def network(recipe: Recipe, num_classes: int, pretrained: bool) -> DeepLabV2:
    """The paper's network; batch-norm affine parameters stay as they were pretrained."""
    shape = {"layers": recipe.layers, "width": recipe.width, "rates": recipe.aspp_rates}
    return DeepLabV2(num_classes, **shape, batch_norm="batch", train_affine=not pretrained)


def make_mask(recipe: Recipe, num_classes: int, p: int, generator, pseudo_label: Tensor) -> Tensor:
    """The recipe's mask of p x p blocks for a batch of pseudo-labels (B,H,W)."""
    how = {"classes": recipe.classes, "generator": generator}
    return complex_mask(pseudo_label, num_classes, p, **how)


def train(recipe: Recipe, args: argparse.Namespace) -> None:
    """Equation 1: labeled loss, unlabeled loss, step, teacher."""
    run.check_recipe(recipe, args)
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size)
    split = select(data.train, args, batch_size=recipe.batch_size, unlabeled=recipe.unlabeled)
    torch.manual_seed(args.seed)
    student = network(recipe, data.num_classes, args.weights != "none").to(args.device)
    weights = "of the checkpoint" if args.checkpoint else load_weights(student, args.weights)
    teacher = make_teacher(student, train_mode=True)
    groups = student.parameter_groups(recipe.lr, recipe.head_factor)
    sgd = partial(
        torch.optim.SGD, momentum=recipe.momentum, nesterov=recipe.nesterov and recipe.momentum > 0
    )
    make_optimizer = sgd if recipe.optimizer == "sgd" else torch.optim.Adam
    optimizer = make_optimizer(groups, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, recipe.iterations, recipe.lr_power)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "schedule": schedule}
    session = run.Run(recipe, args, data, split, state, weights=weights, headline="student")
    weak = {"scale_range": recipe.scale_range, "crop": recipe.crop, "flip": recipe.flip}
    transform = scale_crop_flip(**weak, mean=student.mean)
    batches_l, batches_u = session.batches(recipe.batch_size, transform, warmup=recipe.warmup)
    for iteration in session.steps():
        mixing = not args.supervised and iteration >= recipe.warmup
        sources = (batches_l, batches_u) if mixing else (batches_l,)
        p = draw_blocks(recipe.blocks, args.seed, iteration)
        for image_l, label_l, *unlabeled in session.shares(*sources):
            with session.forward(last=not mixing):
                logits_l = session.student(image_l)
            loss_l = cross_entropy(logits_l, label_l)
            (loss_l / args.accumulate).backward()
            session.log(loss_l=loss_l)
            samples = {"labeled": image_l, "truth": label_l, "logits": logits_l.detach()}
            if not mixing:
                continue
            image_u, generator = unlabeled[0], session.generator("mask")
            with session.forward(last=True):
                loss_u, seen = complexmix_loss(
                    session.student,
                    teacher,
                    image_u,
                    make_mask=partial(make_mask, recipe, data.num_classes, p, generator),
                    threshold=recipe.confidence_threshold,
                    weighting=recipe.weighting,
                    scope=recipe.weight_scope,
                    factor=recipe.unlabeled_weight,
                )
            (loss_u / args.accumulate).backward()
            session.log(loss_u=loss_u, **{"lambda": seen.pop("lambda")})
            samples.update(unlabeled=image_u, **seen)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        # Section 3.1: the student's copy up to the end of the warm-up and its first step, t = 0.
        decay = min(1 - 1 / (max(0, iteration - recipe.warmup) + 1), recipe.ema_decay)
        update_teacher(teacher, student, decay=decay, buffers="copy")
        session.evaluate_if_due(samples)


def main() -> None:
    """Flags -> recipe -> train, evaluate or predict."""
    run.main("complexmix", __doc__, RECIPES, network, train)


if __name__ == "__main__":
    main()
