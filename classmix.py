"""ClassMix (Olsson, Tranheden, Pinto, Svensson; WACV 2021, arXiv:2007.07936).

A mean teacher labels two unlabeled images. Half of the classes that it finds in the first image
are pasted onto the second image, and so are their labels. The student learns from the mixed image,
and the loss is weighted by the share of pixels of which the teacher is confident.

    class_mask          algorithm 1, lines 4-6
    mix                 algorithm 1, lines 7-8
    unlabeled_weight    lambda of equation 1 (section 3.3; alternatives: section 4.3)
    cross_entropy       equation 2, labeled term of equation 1
    consistency         equation 2, unlabeled term of equation 1 (alternatives: table 3)
    classmix_loss       algorithm 1 and the second term of equation 1
    cow_mask, cut_mask  the other masks of table 3

    choice             paper         published code    here         flag
    classifiers        4 branches    sums 2 of them    4            --aspp-rates 6 12
    lambda: share of   an image      a batch           a batch      --weight-scope sample
    Nesterov momentum  yes           no                no           --nesterov
    jitter and blur    table 3       on; kornia's      off (4)      --extra-augmentations
    VOC: scale, mirror 0.5-1.5, yes  (1)               0.5-1.5, yes --scale-range, --no-flip
    subtracted mean    -             off by 0.8 (2)    of weights   --mean 72.39 82.91 73.16
    squared error      sum over K    mean over K       sum over K
    per-pixel lambda   "ignored"     divides by all    by all       --weighting pixel
    unlabeled images   uniform       without repeats   as the code
    teacher statistics -             initial ones (3)  student's
    backbone steps     1             3 (listed thrice) 1            --lr 7.5e-4 --head-factor 3.33
    initial weights    COCO          COCO (offline)    ImageNet     --weights FILE

(1) Not mirrored; one of 12 scales of 0.5-1.6, not antialiased; padded right and below; shown as RGB
to weights that expect BGR; scored on images padded to 505x505. (2) On Cityscapes, the means of RGB
are subtracted from BGR: use the flag with the authors' weights. (3) Only the teacher's score
differs. (4) torchvision's. On Cityscapes the code reports a run's best score, ours the last one.

    python classmix.py --dataset cityscapes --data-dir data/cityscapes --labeled 0.125

The paper reports 61.35 +- 0.62% mIoU for this command (1/30: 54.07, 1/4: 63.63, 1/2: 66.29).
Measured on streets, student: 56.1% with 32 labels, supervised 52.1% (3 seeds; README.md, results/).
"""

from common import InputError, ranks, run  # first: handles Ctrl-C during the other imports

# isort: split
import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torchvision.transforms import v2

from common.augment import scale_crop_flip, seeded, without_label
from common.datasets import open_dataset, select
from common.deeplab import DeepLabV2, load_weights
from common.ema import make_teacher, update_teacher
from common.flags import Count, Positive, Share

Kind = Literal["cross-entropy", "soft-cross-entropy", "squared-error"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of sections 4.1 and 4.3 for Cityscapes, or as noted; "code" is not in the paper."""

    size: tuple[Count, Count] | None = (512, 1024)  # height and width of resized images, pixels
    crop: tuple[Count, Count] | None = None  # height and width of random crops, pixels
    scale_range: tuple[Positive, Positive] = (1.0, 1.0)  # random scale before the crop
    flip: bool = False  # mirror images at random
    batch_size: Count = 2  # labeled images in a step, and as many unlabeled ones
    iterations: Count = 40_000  # training steps
    warmup: int = 0  # first steps, on labeled images only (ours)
    optimizer: Literal["sgd", "adam"] = "sgd"  # the paper's is SGD
    lr: float = 2.5e-4  # learning rate of the backbone
    head_factor: float = 10.0  # the classifiers' learning rate, as a multiple of lr (code)
    lr_power: float = 0.9  # lr is multiplied by (1 - iteration / iterations) ** lr_power
    momentum: Share = 0.9  # momentum of SGD
    nesterov: bool = False  # use Nesterov momentum with SGD
    weight_decay: float = 5e-4  # weight decay of all trained parameters
    ema_decay: Share = 0.99  # decay of the teacher, reached from 0 in 100 steps (code)
    weight_scope: Literal["batch", "sample"] = "batch"  # average lambda over a batch or an image
    mask: Literal["class", "cow", "cut"] = "class"  # what is pasted (table 3)
    sigma_range: tuple[Positive, Positive] = (8.0, 32.0)  # blur of cow masks, pixels (code)
    weighting: Literal["fraction", "pixel", "ramp", "constant"] = "fraction"  # weight of loss_u
    confidence_threshold: Share = 0.968  # tau: least confidence of a confident pixel
    ramp_iterations: Count = 10_000  # length of the ramp of --weighting ramp, steps (4.3)
    unlabeled_loss: Kind = "cross-entropy"  # loss between student and teacher (table 3)
    extra_augmentations: bool = False  # jitter and blur mixed images (table 3)
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

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cow_mask(batch: int, size: tuple, *, sigma_range: tuple, generator=None, device=None) -> Tensor:
    """Spots of blurred noise above its mean (table 3), sigma log-uniform: (B,*size) bool."""
    low, high = math.log(sigma_range[0]), math.log(sigma_range[1])
    uniform = torch.rand(batch, 1, 1, generator=generator, device=device)
    sigma = (low + (high - low) * uniform).exp()
    waves = [min(n, math.ceil(2 * n / sigma_range[0])) for n in size]  # a blur removes shorter ones
    smooth = torch.randn(batch, *waves, generator=generator, device=device)  # as transformed noise
    for n, count in zip(size, waves, strict=True):  # inverse cosine transform: height, then width
        frequency = math.pi / n * torch.arange(count, device=device).view(-1, 1)
        cosine = torch.cos(frequency * (torch.arange(n, device=device) + 0.5)) * (2 / n) ** 0.5
        cosine[0] /= 2**0.5
        damping = torch.exp(-0.5 * (frequency * sigma) ** 2)
        smooth = (cosine.T @ (damping * smooth)).transpose(1, 2)
    return smooth > smooth.mean((1, 2), keepdim=True)


def cut_mask(batch: int, size: tuple, *, generator=None, device=None) -> Tensor:
    """CutMix (table 3): (B,*size) bool, False in a box of half of the area, of uniform width."""
    height, width = size
    uniform = torch.rand(3, batch, 1, 1, generator=generator, device=device)
    narrowest = (width + 1) // 2
    box_width = (narrowest + uniform[0] * (width - narrowest + 1)).floor().clamp(max=width)
    box_height = (height * width / 2 / box_width).round().clamp(max=height)
    left = (uniform[1] * (width - box_width + 1)).floor()
    top = (uniform[2] * (height - box_height + 1)).floor()
    row = torch.arange(height, device=device).view(-1, 1)
    column = torch.arange(width, device=device)
    inside_rows = (row >= top) & (row < top + box_height)
    return ~(inside_rows & (column >= left) & (column < left + box_width))


def class_mask(pseudo_label, num_classes: int, *, scores=None, generator=None) -> Tensor:
    """Pixels of a random half of the classes present in each image (algorithm 1, lines 4-6).

    (B,H,W) int64 -> (B,H,W) bool. Of n classes present, the floor(n/2) with the lowest scores are
    chosen. scores (B,K) are uniform noise unless given. Ids outside 0..K-1 are never chosen.
    """
    (batch, *_), device = pseudo_label.shape, pseudo_label.device
    if scores is None:
        scores = torch.rand(batch, num_classes, generator=generator, device=device)
    in_range = (pseudo_label >= 0) & (pseudo_label < num_classes)
    index = torch.where(in_range, pseudo_label, num_classes).flatten(1)  # K: out of range
    table = torch.zeros(batch, num_classes + 1, dtype=torch.bool, device=device)
    present = table.scatter(1, index, True)[..., :num_classes]
    scores = scores.masked_fill(~present, torch.inf)
    n = present.sum(-1, keepdim=True)
    order = scores.argsort(-1)
    lowest = (torch.arange(num_classes, device=device) < n // 2).expand_as(order)
    chosen = table.scatter(-1, order, lowest)
    return chosen.flatten(1).gather(1, index).view_as(pseudo_label)


def mix(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the mask is True, else b: (B,H,W) bool, (B,H,W) or (B,C,H,W) twice -> same."""
    return torch.where(mask if a.dim() == mask.dim() else mask.unsqueeze(1), a, b)


def sigmoid_ramp(iteration: int, length: int) -> float:
    """exp(-5 (1 - t)^2), where t = iteration / length grows to 1 (code; "ramp up" in 4.3)."""
    return math.exp(-5 * (1 - min(1.0, iteration / length)) ** 2)


def unlabeled_weight(confidence: Tensor, threshold: float, weighting: str, scope: str, factor=1.0):
    """lambda (equation 1): (B,H,W) confidence of mixed images -> (B,H,W), (B,1,1) or (1,1,1).

    "fraction": the share of confident pixels in the "batch" or in each "sample"; "pixel": 1 for a
    confident pixel, else 0; "ramp", "constant": 1. All are multiplied by factor.
    """
    confident = (confidence >= threshold).float()
    if weighting == "pixel":
        return factor * confident
    if weighting in ("ramp", "constant"):
        return torch.full_like(confident[:1, :1, :1], factor)
    return factor * confident.mean((1, 2) if scope == "sample" else (0, 1, 2), keepdim=True)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over labeled pixels (equation 2), 0 if all are void: (B,K,H,W), (B,H,W) -> scalar."""
    total = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return total / (label != ignore_index).sum().clamp(min=1)


def consistency(logits: Tensor, pseudo_label: Tensor, prob: Tensor, kind: str) -> Tensor:
    """Loss of each pixel (equation 2, table 3): (B,K,H,W), (B,H,W), (B,K,H,W) -> (B,H,W)."""
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
    threshold: float,
    weighting: str = "fraction",
    scope: str = "batch",
    factor: float = 1.0,
    augment: Callable[[Tensor], Tensor] = lambda image: image,
    kind: str = "cross-entropy",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Second term of equation 1 for unlabeled images (B,3,H,W) -> scalar, and its details.

    Each image is pasted onto the next one, so B is at least 2. prob is S (lines 1-2). make_mask
    turns pseudo-labels (line 3) into masks M (lines 4-6). augment changes the mixed images.
    """
    with torch.no_grad():
        prob = teacher(image).float().softmax(1)
        confidence, pseudo_label = prob.max(1)
        mask = make_mask(pseudo_label)
        image_mix = augment(mix(mask, image, image.roll(-1, 0)))  # M * A + (1 - M) * B (line 7)
        label_mix = mix(mask, pseudo_label, pseudo_label.roll(-1, 0))  # (line 8)
        prob_mix = mix(mask, prob, prob.roll(-1, 0)) if kind != "cross-entropy" else None
        confidence_mix = mix(mask, confidence, confidence.roll(-1, 0))
        weight = unlabeled_weight(confidence_mix, threshold, weighting, scope, factor)
    logits = student(image_mix)
    loss = (weight * consistency(logits, label_mix, prob_mix, kind)).mean()
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


def make_mask(recipe: Recipe, num_classes: int, generator, pseudo_label: Tensor) -> Tensor:
    """Draws masks of the recipe's kind for pseudo-labels (B,H,W)."""
    if recipe.mask == "class":
        return class_mask(pseudo_label, num_classes, generator=generator)
    batch, *size = pseudo_label.shape
    draw = cut_mask if recipe.mask == "cut" else partial(cow_mask, sigma_range=recipe.sigma_range)
    return draw(batch, size, generator=generator, device=pseudo_label.device)


def jitter_and_blur(seed: int, image: Tensor) -> Tensor:
    """Jitters and blurs images one by one (table 3): float (B,3,H,W) in [0,1] -> same."""
    jitter = v2.RandomApply([v2.ColorJitter(0.25, 0.25, 0.25, 0.25)], 0.8)
    change = v2.Compose([jitter, v2.RandomApply([v2.GaussianBlur(11, (0.15, 1.15))], 0.5)])
    return seeded(lambda: torch.stack([change(single) for single in image]), seed)


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
    augment = jitter_and_blur if recipe.extra_augmentations else lambda _, image: image
    student = run.prepare(student, args, train=True)
    teacher = run.prepare(teacher, args, train=False)
    for iteration in range(start, recipe.iterations):
        mixing = not args.supervised and iteration >= recipe.warmup
        ramp = sigmoid_ramp(iteration, recipe.ramp_iterations)
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
            loss_u, details = classmix_loss(
                student,
                teacher,
                image_u,
                make_mask=partial(make_mask, recipe, data.num_classes, generator),
                threshold=recipe.confidence_threshold,
                weighting=recipe.weighting,
                scope=recipe.weight_scope,
                factor=ramp if recipe.weighting == "ramp" else 1.0,
                augment=partial(augment, seed("augment")),
                kind=recipe.unlabeled_loss,
            )
            (loss_u / args.accumulate).backward()
            session.log({"loss_u": loss_u, "lambda": details.pop("lambda")})
            pictures = {"labeled": image_l, "truth": label_l, "unlabeled": image_u, **details}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(1 - 1 / (iteration + 1), recipe.ema_decay)  # the first step copies the student
        update_teacher(teacher, student, decay=decay, buffers="copy")
        session.end_step(iteration, pictures)


def main() -> None:
    """Flags -> recipe -> train, evaluate or predict."""
    run.main("classmix", __doc__, RECIPES, network, train)


if __name__ == "__main__":
    main()
