"""ClassMix (Olsson, Tranheden, Pinto, Svensson; WACV 2021, arXiv:2007.07936).

A mean teacher labels two unlabeled images; half of the classes that it sees in one are cut out
and pasted on the other, labels alike. The student learns from the mixed image and its
pseudo-label, weighted by the share of pixels that the teacher is confident of.

    class_mask                 algorithm 1, lines 4-6
    mix                        algorithm 1, lines 7-8
    unlabeled_weight           lambda of equation 1 (section 3.3; other weightings: 4.3)
    cross_entropy              equation 2, labeled term of equation 1
    consistency                equation 2, unlabeled term of equation 1 (other losses: table 3)
    classmix_loss              algorithm 1 and the second term of equation 1
    cow_mask, cut_mask         the other mixes of table 3

Where paper and published code differ; each has a flag:
- four classifier branches as in DeepLab-v2; the code sums two (--aspp-rates 6 12);
- lambda is one share per batch, as in the code; the paper says per image (--weight-scope sample);
- no Nesterov momentum, as in the code; the paper has it (--nesterov);
- no colour jitter and blur, as in the paper; the code's Cityscapes settings have both
  (--extra-augmentations; here each image has its own draw, and jitter is torchvision's);
- VOC images are mirrored and scaled by 0.5 to 1.5, as in the paper (code: never, 0.5 to 1.6);
- the code's optimizer holds the backbone three times over: --lr 7.5e-4 --head-factor 3.33 is near
  what it does; the squared error is summed over classes, as in the paper (code: averaged);
- the paper starts from COCO weights (--weights FILE); they are no longer on line.
As in the code: batch statistics, frozen affine parameters (trained with --weights none), student
evaluated, labeled images not used unlabeled. Not as in the code: file lists are sorted.

    python classmix.py --dataset cityscapes --data-dir data/cityscapes --labeled 0.125

Measured: 56.6% mIoU on streets with 32 labels, supervised 51.5% (3 seeds; README.md, results/).
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import run
from common.augment import jitter_and_blur, scale_crop_flip
from common.datasets import open_dataset, select
from common.deeplab import DeepLabV2, load_weights
from common.ema import make_teacher, update_teacher

UnlabeledLoss = Literal["cross-entropy", "soft-cross-entropy", "squared-error"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of section 4.1 (Cityscapes) and table 3; "code": not in the paper."""

    size: tuple[int, int] | None = (512, 1024)  # height, width images are resized to (4.1)
    crop: tuple[int, int] | None = None  # random crop; 512 512 in table 3
    scale_range: tuple[float, float] = (1.0, 1.0)  # random scale before the crop (4.1)
    flip: bool = False  # random mirroring (4.1)
    batch_size: int = 2  # labeled images a step, and as many unlabeled (4.1)
    iterations: int = 40_000  # steps (4.1); 80000 in table 3
    warmup: int = 0  # first steps on labeled images only; not in the paper
    optimizer: Literal["sgd", "adam"] = "sgd"  # sgd (4.1); adam is not in the paper
    lr: float = 2.5e-4  # of the backbone (4.1)
    head_factor: float = 10.0  # classifiers learn at head_factor * lr (code)
    lr_power: float = 0.9  # lr * (1 - iteration / iterations) ** lr_power (4.1)
    momentum: float = 0.9  # of SGD (4.1)
    nesterov: bool = False  # paper: yes (4.1); code: no
    weight_decay: float = 5e-4  # of all that learns (4.1)
    ema_decay: float = 0.99  # of the teacher, min(1 - 1 / (iteration + 1), ema_decay) (code)
    mask: Literal["class", "cow", "cut"] = "class"  # what is pasted; table 3
    sigma_range: tuple[float, float] = (8.0, 32.0)  # of cow masks, pixels (code)
    weighting: Literal["fraction", "pixel", "ramp", "constant"] = "fraction"  # lambda; table 3
    weight_scope: Literal["batch", "sample"] = "batch"  # fraction of what; paper: sample (3.3)
    confidence_threshold: float = 0.968  # tau (4.3)
    ramp_iterations: int = 10_000  # of weighting ramp (4.3)
    unlabeled_loss: UnlabeledLoss = "cross-entropy"  # of hard labels, else soft ones; table 3
    extra_augmentations: bool = False  # jitter and blur of mixed images; table 3
    jitter: float = 0.25  # brightness, contrast, saturation, hue (code)
    jitter_probability: float = 0.8  # of an image to be jittered (code)
    blur_sigma: tuple[float, float] = (0.15, 1.15)  # range of the blur, pixels (code)
    blur_probability: float = 0.5  # of an image to be blurred (code)
    layers: tuple[int, int, int, int] = (3, 4, 23, 3)  # bottlenecks a stage: ResNet-101 (4.1)
    width: int = 64  # channels of the stem
    aspp_rates: tuple[int, ...] = (6, 12, 18, 24)  # dilations of the classifiers; code: 6 12


VOC = Recipe(size=None, crop=(321, 321), scale_range=(0.5, 1.5), flip=True, batch_size=10)
SMALL = replace(Recipe(), size=(64, 128), layers=(1, 1, 1, 1), width=16, aspp_rates=(1, 2))
ADAM = replace(SMALL, optimizer="adam", lr=6e-3, head_factor=1.0, weight_decay=0.0)
# Not in the paper: camvid and bdd100k (Cityscapes' recipe, other sizes), folder (VOC's), streets.
RECIPES = {
    "cityscapes": Recipe(),
    "voc": VOC,  # section 4.1
    "camvid": replace(Recipe(), size=(360, 480), flip=True),
    "bdd100k": replace(Recipe(), size=(360, 640)),
    "folder": VOC,
    "streets": replace(ADAM, flip=True, batch_size=4, iterations=2_000, warmup=300),
}


# ---- The method: depends only on torch; copy from here ----


def class_mask(pseudo_label: Tensor, num_classes: int, *, scores=None, generator=None) -> Tensor:
    """Pixels of a random half of the classes present in each image (alg. 1, l. 4-6).

    (B,H,W) int64 -> (B,H,W) bool. Of n classes the floor(n/2) with the lowest scores (B,K) are
    chosen, uniform noise unless given. Ids outside 0..K-1 are never chosen.
    """
    if scores is None:
        shape, device = (len(pseudo_label), num_classes), pseudo_label.device
        scores = torch.rand(shape, generator=generator, device=device)
    in_range = (pseudo_label >= 0) & (pseudo_label < num_classes)
    index = torch.where(in_range, pseudo_label, num_classes).flatten(1)
    present = F.pad(torch.zeros_like(scores, dtype=torch.bool), (0, 1))
    present = present.scatter(1, index, True)[:, :num_classes]
    rank = scores.masked_fill(~present, torch.inf).argsort(1).argsort(1)
    chosen = rank < present.sum(1, keepdim=True) // 2
    return F.pad(chosen, (0, 1)).gather(1, index).view_as(pseudo_label)


def cow_mask(batch: int, size: tuple, *, sigma_range: tuple, generator=None, device=None) -> Tensor:
    """Spots of blurred noise above its mean (table 3; French et al. 2020): (B,*size) bool.

    One Gaussian per mask, its sigma (pixels) log-uniform in sigma_range. Noise mirrored at the
    edges is blurred by scaling its cosine transform.
    """
    low, high = map(math.log, sigma_range)
    draw = {"generator": generator, "device": device}
    sigma = (low + (high - low) * torch.rand(batch, 1, 1, **draw)).exp()
    smooth = torch.randn(batch, *size, **draw)
    for n in size:  # along dimension 1, which the transpose makes the height, then the width
        k = torch.arange(n, device=device)
        cosine = torch.cos(math.pi / n * k[:, None] * (k + 0.5)) * (2 / n) ** 0.5
        cosine[0] /= 2**0.5
        damping = torch.exp(-0.5 * (math.pi / n * k[:, None] * sigma) ** 2)
        smooth = (cosine.T @ (damping * (cosine @ smooth))).transpose(1, 2)
    return smooth > smooth.mean((1, 2), keepdim=True)


def cut_mask(batch: int, size: tuple, *, generator=None, device=None) -> Tensor:
    """CutMix with half of the area (table 3): (B,*size) bool, False inside one box per mask.

    The width is uniform in [W/2, W], the height HW/2 over it, the place uniform.
    """
    height, width = size
    draw = torch.rand(3, batch, 1, 1, generator=generator, device=device)
    narrowest = (width + 1) // 2
    box_width = (narrowest + draw[0] * (width - narrowest + 1)).floor().clamp(max=width)
    box_height = (height * width / 2 / box_width).round().clamp(max=height)
    left = (draw[1] * (width - box_width + 1)).floor()
    top = (draw[2] * (height - box_height + 1)).floor()
    row = torch.arange(height, device=device).view(-1, 1)
    column = torch.arange(width, device=device)
    inside_rows = (row >= top) & (row < top + box_height)
    return ~(inside_rows & (column >= left) & (column < left + box_width))


def mix(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where mask, else b: (B,H,W) bool, (B,H,W) or (B,C,H,W) twice -> same."""
    return torch.where(mask if a.dim() == mask.dim() else mask.unsqueeze(1), a, b)


def sigmoid_ramp(iteration: int, length: int) -> float:
    """exp(-5 (1 - t)^2), t = iteration / length up to 1 (sec. 4.3, "sigmoid ramp up")."""
    return math.exp(-5 * (1 - min(1.0, iteration / length)) ** 2)


def unlabeled_weight(
    confidence: Tensor, threshold: float, *, weighting: str, scope: str, ramp: float
) -> Tensor:
    """lambda (eq. 1): (B,H,W) mixed confidence -> (B,H,W), (B,1,1) or (1,1,1).

    "fraction" of confident pixels in the "batch" or in each "sample"; "pixel": 1 where confident,
    else 0; "ramp": the value given; "constant": 1.
    """
    confident = (confidence >= threshold).float()
    if weighting == "pixel":
        return confident
    if weighting != "fraction":
        return torch.full_like(confident[:1, :1, :1], ramp if weighting == "ramp" else 1.0)
    return confident.mean((1, 2) if scope == "sample" else (0, 1, 2), keepdim=True)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over the batch's labeled pixels (eq. 2): (B,K,H,W), (B,H,W) int64 -> scalar.

    Void pixels do not count; 0 where all are void.
    """
    total = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return total / (label != ignore_index).sum().clamp(min=1)


def consistency(logits: Tensor, pseudo_label: Tensor, prob: Tensor, kind: str) -> Tensor:
    """Loss of each pixel (eq. 2; sec. 4.3): (B,K,H,W), (B,H,W) int64, (B,K,H,W) -> (B,H,W)."""
    if kind == "squared-error":
        return (logits.softmax(1) - prob).square().sum(1)
    target = pseudo_label if kind == "cross-entropy" else prob
    return F.cross_entropy(logits, target, reduction="none")


def classmix_loss(
    student: nn.Module,
    teacher: nn.Module,
    image: Tensor,
    *,
    make_mask: Callable[[Tensor], Tensor],
    augment: Callable[[Tensor], Tensor],  # of the mixed images
    threshold: float = 0.968,
    weighting: str = "fraction",
    scope: str = "batch",
    ramp: float = 1.0,
    kind: str = "cross-entropy",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Second term of eq. 1 on one unlabeled batch: (B,3,H,W) -> scalar, what it was made of.

    Each image is pasted on the next one of the batch, the last on the first. make_mask turns
    pseudo-labels (B,H,W) into masks.
    """
    with torch.no_grad():
        prob = teacher(image).float().softmax(1)  # S_A, S_B (l. 1-2), argmax (l. 3)
        confidence, pseudo_label = prob.max(1)
        mask = make_mask(pseudo_label)  # M
        image_mix = augment(mix(mask, image, image.roll(-1, 0)))  # M * A + (1 - M) * B (l. 7)
        label_mix = mix(mask, pseudo_label, pseudo_label.roll(-1, 0))  # (l. 8; argmax first: same)
        prob_mix = mix(mask, prob, prob.roll(-1, 0)) if kind != "cross-entropy" else None
        confidence_mix = mix(mask, confidence, confidence.roll(-1, 0))
        weight = unlabeled_weight(
            confidence_mix, threshold, weighting=weighting, scope=scope, ramp=ramp
        )
    logits = student(image_mix)
    loss = (weight * consistency(logits, label_mix, prob_mix, kind)).mean()
    seen = {"pseudo_label": pseudo_label, "mask": mask, "image_mix": image_mix}
    return loss, {**seen, "logits": logits.detach(), "lambda": weight.mean()}


# ---- to here ----


def network(recipe: Recipe, num_classes: int, pretrained: bool) -> DeepLabV2:
    """The paper's network; batch-norm affine parameters stay as they were pretrained."""
    shape = {"layers": recipe.layers, "width": recipe.width, "rates": recipe.aspp_rates}
    return DeepLabV2(num_classes, **shape, batch_norm="batch", train_affine=not pretrained)


def make_mask(recipe: Recipe, num_classes: int, generator, pseudo_label: Tensor) -> Tensor:
    """The recipe's kind of mask for a batch of pseudo-labels (B,H,W)."""
    if recipe.mask == "class":
        return class_mask(pseudo_label, num_classes, generator=generator)
    batch, *size = pseudo_label.shape
    draw = {"generator": generator, "device": pseudo_label.device}
    if recipe.mask == "cow":
        return cow_mask(batch, size, sigma_range=recipe.sigma_range, **draw)
    return cut_mask(batch, size, **draw)


def train(recipe: Recipe, args: argparse.Namespace) -> None:
    """Equation 1: labeled loss, unlabeled loss, step, teacher."""
    run.check_recipe(recipe, args)
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size)
    split = select(data.train, args, batch_size=recipe.batch_size)
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
    strong = jitter_and_blur(
        recipe.jitter, recipe.jitter_probability, recipe.blur_sigma, recipe.blur_probability
    )
    session = run.Run(recipe, args, data, split, state, weights=weights, headline="student")
    weak = {"scale_range": recipe.scale_range, "crop": recipe.crop, "flip": recipe.flip}
    transform = scale_crop_flip(**weak, mean=student.mean)
    batches_l, batches_u = session.batches(recipe.batch_size, transform, warmup=recipe.warmup)
    for iteration in session.steps():
        mixing = not args.supervised and iteration >= recipe.warmup
        sources = (batches_l, batches_u) if mixing else (batches_l,)
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
            change = partial(strong, session.step_seed("augment"))
            with session.forward(last=True):
                loss_u, seen = classmix_loss(
                    session.student,
                    teacher,
                    image_u,
                    make_mask=partial(make_mask, recipe, data.num_classes, generator),
                    augment=change if recipe.extra_augmentations else nn.Identity(),
                    threshold=recipe.confidence_threshold,
                    weighting=recipe.weighting,
                    scope=recipe.weight_scope,
                    ramp=sigmoid_ramp(iteration, recipe.ramp_iterations),
                    kind=recipe.unlabeled_loss,
                )
            (loss_u / args.accumulate).backward()
            session.log(loss_u=loss_u, **{"lambda": seen.pop("lambda")})
            samples.update(unlabeled=image_u, **seen)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        # The code's warm-up of the decay (its line 120): the first step copies the student.
        decay = min(1 - 1 / (iteration + 1), recipe.ema_decay)
        update_teacher(teacher, student, decay=decay, buffers="copy")
        session.evaluate_if_due(samples)


def main() -> None:
    """Flags -> recipe -> train, evaluate or predict."""
    run.main("classmix", __doc__, RECIPES, network, train)


if __name__ == "__main__":
    main()
