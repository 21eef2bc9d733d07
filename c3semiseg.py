"""C3-SemiSeg (Zhou, Xu, Zhang, Gao, Heng; ICCV 2021, the open-access version).

A mean teacher labels unlabeled images; the student sees them in other colours and cut into labeled
ones, and matches the teacher where that is confident for the class. Embeddings of pixels of both
sets are drawn together within a class and pushed apart between classes.

    supervised_loss, consistency_loss    equations 1 and 2
    pixel_contrast_loss                  equation 3; with the teacher's embeddings equation 5
    box_mask, mix, cut_mix               equation 4 (section 3.2), both complements
    sample_pixels, contrast_loss         section 3.3
    ConfidentRegions                     equation 6 (section 3.4)
    c3_loss, loss_weights                terms of equation 7 and their weights (section 4.1)
    scale_crop_flip, randaugment         section 3.2: A, A-hat

Where the paper is silent or its published code (which cannot run) differs, and the other way:
- L_consist is averaged over the K classes too (code): 50 is 50 / K in equation 2's units, 2.63 for
  19 (paper: --consistency-weight 950). The code multiplies L_contrast by temperature / 0.1: 0.1 is
  0.15 in equation 5's units (paper: --contrast-weight 0.1);
- averages are over the pixels of a group (code; equations 1, 2: --average image);
- equation 5's labeled embeddings are the student's (code, figure 1; to the letter:
  --contrast-labeled teacher); road counts (code: --no-contrast-road);
- the code's optimizer holds the backbone three times over at a tenth of the rate: about that is
  the default 0.3 (meant: --backbone-factor 0.1, the paper has one rate: 1.0);
- four classifier branches as in DeepLab-v2; the code sums two (--aspp-rates 6 12);
- ten epochs of warm-up are 2500 steps (code: --warmup 2250), in which labeled pixels are
  contrasted and lambda_2 ramps up (code; paper: --no-warmup-contrast);
- images are mixed and contrasted in groups of 4 + 4, which was one GPU's (--group-size);
- rotation, by whole degrees, is before the crop (code, labeled images: --rotate-labeled-last); the
  corners that it leaves on unlabeled images count (code; not: --no-corners);
- BDD100K's unlabeled images are scaled and have RandAugment (code: --no-scale-unlabeled
  --operations 0);
- labeled images have no strong colours (figure 1's caption: --labeled-view strong) and are not used
  as unlabeled (code: all are on BDD100K, some on Cityscapes; --unlabeled all);
- no image comes twice an epoch (code: --replacement); alpha is 0.99 at once (code:
  --ema-warm-start); no weight decay (code, though its settings have one: --weight-decay 5e-4);
- --keep 1 is no DCRS (table 7; in the code thresholds stay at 0.9 then: --threshold-momentum 1);
- the last student is scored (code: the best on validation images, "best" in result.json).
Without a flag, as the code: P_i leaves out i; embeddings are detached on one side, but not where
labeled pixels meet labeled ones alone; teacher updated first in a step, batch norm frozen (with
--weights none trained, each batch's statistics in both networks). Not as the code: where a group
has more than 256 pairs of an image and a class to contrast, 256 are drawn.

    python c3semiseg.py --dataset cityscapes --data-dir data/cityscapes --labeled 0.125

Measured: 57.3% mIoU on streets with 32 labels, supervised 54.0% (3 seeds; README.md, results/).
"""

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import run
from common.augment import randaugment, scale_crop_flip
from common.datasets import open_dataset, select
from common.deeplab import DeepLabV2, load_weights
from common.ema import make_teacher, update_teacher
from common.processes import gather


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of section 4.1 for Cityscapes; "code": not in the paper."""

    size: tuple[int, int] | None = (512, 1024)  # height, width images are resized to (4.1)
    scales: tuple[float, ...] = (1.0,)  # one is drawn for each image (4.1)
    scale_unlabeled: bool = True  # unlabeled images too; code: no
    rotation: int = 10  # largest angle, degrees (4.1)
    rotate_labeled_last: bool = False  # labeled ones after crop and flip; code: yes
    crop: tuple[int, int] | None = (256, 512)  # height, width of the random crop (4.1)
    flip: bool = True  # random mirroring (4.1)
    batch_size: int = 16  # labeled images a step, and as many unlabeled (4.1)
    unlabeled: Literal["rest", "all"] = "rest"  # those without labels (4.1), or all images
    replacement: bool = False  # images may come twice in an epoch; code: yes
    group_size: int = 4  # labeled images mixed and contrasted with as many unlabeled (code: a GPU)
    iterations: int = 25_000  # steps (4.1)
    warmup: int = 2_500  # first steps on labeled images only: 10 epochs (4.1) of 250 steps (code)
    lr: float = 1.2e-4  # of classifiers and projection head, by Adam (4.1)
    backbone_factor: float = 0.3  # the backbone learns at backbone_factor * lr (code); paper: 1.0
    weight_decay: float = 0.0  # of all trained weights (code; its settings: 5e-4)
    lr_power: float = 0.9  # lr * (1 - iteration / iterations) ** lr_power (4.1)
    ema_decay: float = 0.99  # alpha (4.1)
    ema_warm_start: bool = False  # up to it, 1 - 1 / (4k + 5) at update k; code: yes
    mixing: Literal["cross", "intra", "none"] = "cross"  # sets mixed by CutMix; table 6
    teacher_view: Literal["weak", "jitter", "strong"] = "weak"  # W, S, S+R of table 5
    student_view: Literal["weak", "jitter", "strong"] = "strong"  # of unlabeled images; table 5
    labeled_view: Literal["weak", "jitter", "strong"] = "weak"  # of labeled ones (4.1)
    jitter: float = 0.5  # brightness, contrast, saturation (code)
    hue: float = 0.25  # of the jitter (code)
    operations: int = 2  # of RandAugment drawn for an image (code)
    operation_probability: float = 0.5  # that a drawn one is done (code)
    magnitude: float = 10.0  # mean magnitude of the operations, 0 to 10 (code)
    average: Literal["pixel", "image"] = "pixel"  # pixels averaged over first; paper: image (eq. 1)
    consistency_weight: float = 50.0  # lambda_1 (4.1) of a mean over classes too (code)
    consistency_ramp: int = 4_000  # steps of its ramp (4.1), from the end of the warm-up (code)
    contrast_weight: float = 0.15  # lambda_2 in units of eq. 5 (code); paper: 0.1 (4.1)
    contrast_ramp: int = 250  # steps of its ramp, from the start (code)
    contrast: Literal["both", "labeled", "unlabeled", "none"] = "both"  # sets; D of table 4
    contrast_labeled: Literal["student", "teacher"] = "student"  # whose embeddings; paper: teacher
    warmup_contrast: bool = True  # of labeled pixels in the warm-up (code); paper: no (4.1)
    contrast_road: bool = True  # class 0 as well; code: no
    per_class: int = 20  # pixels of each image and class (4.1)
    hard_sampling: bool = True  # half of them wrong ones (3.3); S of table 4
    temperature: float = 0.15  # tau (4.1)
    embedding: int = 256  # channels (4.1)
    corners: bool = True  # that rotation leaves on unlabeled images count (code)
    keep: float = 0.8  # s, share of each class that is confident; 1: all (4.1; table 7)
    threshold_momentum: float = 0.9  # beta (4.1)
    initial_threshold: float = 0.9  # of every class (code)
    layers: tuple[int, int, int, int] = (3, 4, 23, 3)  # bottlenecks a stage: ResNet-101 (4.1)
    width: int = 64  # channels of the stem
    aspp_rates: tuple[int, ...] = (6, 12, 18, 24)  # dilations of the classifiers; code: 6 12


BDD100K = replace(Recipe(), size=(720, 1280), scales=(0.75, 1.0, 1.25), crop=(512, 512))
SMALL = replace(Recipe(), size=(64, 128), crop=None, layers=(1, 1, 1, 1), width=16, embedding=64)
ADAM = replace(SMALL, aspp_rates=(1, 2), lr=6e-3, backbone_factor=1.0, contrast_ramp=16)
STREETS = replace(ADAM, consistency_weight=8.0, consistency_ramp=256, per_class=8)
RECIPES = {
    "cityscapes": Recipe(),
    # 16 images a step on 4 GPUs are groups of 2 + 2; ten epochs of 500 steps (code).
    "bdd100k": replace(BDD100K, batch_size=8, group_size=2, iterations=20_000, warmup=5_000),
    "camvid": replace(Recipe(), size=(360, 480), crop=None),  # not in the paper
    "folder": replace(BDD100K, size=None, crop=(320, 320)),  # not in the paper, as streets
    "streets": replace(STREETS, batch_size=4, iterations=1_600, warmup=240),
}


# ---- The method: depends only on torch; copy from here ----


def masked_mean(values: Tensor, mask: Tensor, average: str) -> Tensor:
    """Mean where mask, of the batch's pixels ("pixel") or "image" by image: (B,H,W) -> scalar."""
    dims = (1, 2) if average == "image" else (0, 1, 2)
    return ((values * mask).sum(dims) / mask.sum(dims).clamp(min=1)).mean()


def supervised_loss(logits: Tensor, label: Tensor, average: str = "pixel") -> Tensor:
    """Cross entropy (eq. 1): (B,K,H,W), (B,H,W) int64 -> scalar. 255 does not count."""
    loss = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    return masked_mean(loss, label != 255, average)


def consistency_loss(logits: Tensor, prob: Tensor, mask: Tensor, average="pixel") -> Tensor:
    """Soft cross entropy over K (eq. 2): (B,K,H,W) twice, (B,H,W) bool -> scalar."""
    loss = F.cross_entropy(logits, prob, reduction="none") / logits.shape[1]
    return masked_mean(loss, mask, average)


def pixel_contrast_loss(
    anchor, anchor_label, contrast, contrast_label, temperature=0.15, *, exclude_self=False
) -> Tensor:
    """Pull same classes, push others (eq. 5), normalising: (N,D), (N,), (M,D), (M,) -> scalar.

    Pixels labeled 255 do not count; exclude_self: nor does a pair of equal indices. No detaching.
    """
    similarity = F.normalize(anchor, dim=1) @ F.normalize(contrast, dim=1).T / temperature
    same = anchor_label[:, None] == contrast_label
    counts = (anchor_label != 255)[:, None] & (contrast_label != 255)
    positive, negative = counts & same, counts & ~same  # P_i, N_i
    if exclude_self:
        positive = positive & ~torch.eye(*positive.shape, dtype=torch.bool, device=anchor.device)
    # -log(e^p / (e^p + sum e^n)) = log(1 + e^(log sum e^n - p)); no negative: 0.
    others = similarity.masked_fill(~negative, -1e9).logsumexp(1, keepdim=True)
    loss = (F.softplus(others - similarity) * positive).sum(1) / positive.sum(1).clamp(min=1)
    return loss.sum() / (anchor_label != 255).sum().clamp(min=1)


def box_mask(batch: int, size: tuple, *, generator=None, device=None) -> Tensor:
    """A box of half of the area, its height's share log-uniform: (B,*size) bool, True inside."""
    height, width = size
    draw = torch.rand(3, batch, 1, 1, generator=generator, device=device)
    share = 0.5 ** draw[0]
    box_height, box_width = (height * share).round(), (width * 0.5 / share).round()
    top = (draw[1] * (height - box_height + 1)).floor()
    left = (draw[2] * (width - box_width + 1)).floor()
    row, column = (torch.arange(n, device=device) for n in size)
    inside_rows = (row[:, None] >= top) & (row[:, None] < top + box_height)
    return inside_rows & (column >= left) & (column < left + box_width)


def mix(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where mask, else b: (B,H,W) bool, (B,H,W) or (B,C,H,W) twice -> same."""
    return torch.where(mask if a.dim() == mask.dim() else mask.unsqueeze(1), a, b)


def cut_mix(box: Tensor, batch: Tensor) -> Tensor:
    """Swap the boxes of images i and n + i (eq. 4); undoes itself: (n,H,W), (2n,C,H,W) -> same."""
    a, b = batch.chunk(2)
    # m * a + (1 - m) * b and m * b + (1 - m) * a, where m is 0 inside the box
    return torch.cat([mix(box, b, a), mix(box, a, b)])


def resize_nearest(values: Tensor, size: tuple) -> Tensor:
    """Labels or masks (B,H,W) -> (B,*size), same type."""
    return F.interpolate(values.unsqueeze(1).float(), size).squeeze(1).to(values.dtype)


class ProjectionHead(nn.Sequential):
    """Conv-ReLU-Conv (sec. 4.1), normalised (sec. 3.3): (B,C,h,w) -> float32 (B,D,h,w)."""

    def __init__(self, in_channels: int, out_channels: int = 256):
        first, second = (nn.Conv2d(n, out_channels, 1) for n in (in_channels, out_channels))
        super().__init__(first, nn.ReLU(), second)
        nn.init.normal_(first.weight, std=0.01)  # as the code
        nn.init.normal_(second.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """The embedding of each pixel, of length 1."""
        return F.normalize(super().forward(features).float(), dim=1)


def sample_pixels(label, prediction, per_class=20, *, num_classes, hard=True, generator=None):
    """per_class random pixels of each image and class, half of them hard (sec. 3.3).

    (B,h,w) int64 twice -> index into the flattened grid, label, both (B*K*per_class,). Hard ones
    are predicted otherwise than labeled; where these or the others are too few for their half, the
    rest fills up. Classes with per_class pixels or fewer in an image are left out: label 255.
    """
    pixels = label[0].numel()
    room = (0, max(0, per_class - pixels))  # in images of fewer pixels nothing is sampled
    label, prediction = (F.pad(x.flatten(1), room, value=255) for x in (label, prediction))
    score = torch.rand(label.shape, generator=generator, device=label.device).unsqueeze(1)
    classes = torch.arange(num_classes, device=label.device)
    of_class = label.unsqueeze(1) == classes.view(-1, 1)  # (B,K,h*w)
    wrong = (label != prediction).unsqueeze(1) | (not hard)  # all alike, if not hard
    pools = of_class & wrong, of_class & ~wrong
    wrongs, rights = (pool.sum(2, keepdim=True) for pool in pools)
    hards = torch.minimum(wrongs, (per_class - rights).clamp(min=per_class // 2))
    slot = torch.arange(per_class, device=label.device).expand(*of_class.shape[:2], -1)
    first, second = (score.masked_fill(~pool, -1).topk(per_class).indices for pool in pools)
    place = torch.where(slot < hards, first, second.gather(2, (slot - hards).clamp(min=0)))
    kept = wrongs + rights > per_class
    image = torch.arange(len(label), device=label.device).view(-1, 1, 1)
    index = torch.where(kept, image * pixels + place, 0)
    return index.flatten(), torch.where(kept, classes.view(-1, 1), 255).expand_as(slot).flatten()


def contrast_loss(embedding, contrast, label, logits, *, temperature, first_class=0, **sampling):
    """Eq. 5 at sampled pixels: (B,D,h,w) twice, (B,H,W) int64, (B,K,H,W) -> scalar."""
    size, num_classes = embedding.shape[2:], logits.shape[1]
    label = resize_nearest(label, size)
    label = label.masked_fill(label < first_class, 255)
    prediction = F.interpolate(logits.detach(), size, mode="bilinear").argmax(1)
    index, label = sample_pixels(label, prediction, num_classes=num_classes, **sampling)
    if (groups := len(embedding) * num_classes) > 256:  # some of those with pixels: little memory
        index, label = index.view(groups, -1), label.view(groups, -1)
        score = torch.rand(groups, generator=sampling.get("generator"), device=label.device)
        first = (score + (label[:, 0] == 255)).argsort()[:256]
        index, label = index[first].flatten(), label[first].flatten()
    f, g = (e.movedim(1, 3).flatten(0, 2)[index] for e in (embedding, contrast))
    return pixel_contrast_loss(f, label, g, label, temperature, exclude_self=True)


class ConfidentRegions(nn.Module):
    """A confidence threshold for each class (sec. 3.4), which about a share keep passes."""

    def __init__(self, num_classes: int, keep=0.8, momentum=0.9, initial=0.9):
        super().__init__()
        self.keep, self.momentum = keep, momentum
        self.register_buffer("thresholds", torch.full((num_classes,), initial))

    @torch.no_grad()
    def update(self, confidence: Tensor, pseudo_label: Tensor) -> Tensor:
        """Eq. 6 without label 255; then which are confident: (B,H,W), int64 (B,H,W) -> bool."""
        if self.keep >= 1:
            return torch.ones_like(confidence, dtype=torch.bool)
        classes = torch.arange(len(self.thresholds) + 1, device=confidence.device).double()
        # Sorted by class, then descending: class c is in [2c - 1, 2c]. Exact in float64.
        key = (2 * pseudo_label.double() - confidence).flatten().sort().values
        start = torch.searchsorted(key, 2 * classes - 1.5)
        count = start.diff()
        place = torch.minimum((self.keep * count.double()).long(), count - 1)
        current = 2 * classes[:-1] - key[(start[:-1] + place).clamp(min=0)]  # delta_t
        average = self.momentum * self.thresholds + (1 - self.momentum) * current
        self.thresholds.copy_(torch.where(count > 0, average, self.thresholds))
        return confidence >= self.thresholds[pseudo_label.clamp(max=len(self.thresholds) - 1)]


@torch.no_grad()
def label_images(teacher: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """(B,3,H,W) -> probabilities (B,K,H,W), confidence and pseudo-label (B,H,W), embedding."""
    logits, embedding = teacher(image)
    prob = logits.softmax(1)
    return prob, *prob.max(1), embedding


def draw_pairs(mixing: str, n: int, size: tuple, *, generator=None, device=None):
    """Order of n labeled, n unlabeled images where i meets n + i, boxes (n,*size) (table 6)."""
    order = torch.randperm(2 * n, generator=generator, device=device)
    if mixing == "intra":  # neighbours meet; of an odd n, the last labeled and the first unlabeled
        order = torch.arange(2 * n, device=device).view(n, 2).T.flatten()
    return order, box_mask(n, size, generator=generator, device=device) & (mixing != "none")


def warmup_loss(student: nn.Module, labeled: tuple, *, contrast, average, generator=None):
    """c3_loss of labeled images alone (sec. 4.1), both sides of equation 3 the student's."""
    image, label, _ = labeled
    logits, embedding = student(image)
    terms = {"loss_l": supervised_loss(logits, label, average)}
    if contrast is not None:
        terms["loss_c"] = contrast(embedding, embedding, label, logits, generator=generator)
    return terms, {"logits": logits.detach()}


def c3_loss(student, labeled, unlabeled, *, contrast, average, mixing, sets, generator=None):
    """Terms of eq. 7 for n labeled and n unlabeled images, and what they were made of.

    labeled: image (n,3,H,W), label (n,H,W) int64, the teacher's embedding (n,D,h,w) or None for the
    student's; unlabeled: strongly augmented image and, from the teacher, prob (n,K,H,W),
    pseudo-label, 255 where not confident, and embedding. contrast is contrast_loss with options.
    """
    (image_l, label_l, g_l), (image_u, prob, label_u, g_u) = labeled, unlabeled
    how = {"generator": generator, "device": image_l.device}
    order, box = draw_pairs(mixing, len(image_l), image_l.shape[2:], **how)
    image_mix = cut_mix(box, torch.cat([image_l, image_u])[order])
    logits, embedding = student(image_mix)
    undo = order.argsort()
    logits = cut_mix(box, logits)[undo]
    logits_l, logits_u = logits.chunk(2)
    terms = {"loss_l": supervised_loss(logits_l, label_l, average)}
    terms["loss_u"] = consistency_loss(logits_u, prob, label_u != 255, average)
    if contrast is not None:
        # The published code un-mixes features; behind a head of 1x1 convolutions it is the same.
        embedding = cut_mix(resize_nearest(box, embedding.shape[2:]), embedding)[undo]
        f_l, f_u = embedding.chunk(2)
        g_l = f_l if g_l is None else g_l
        both = torch.cat([g_l.detach(), g_u]), torch.cat([label_l, label_u]), logits
        chosen = {"labeled": (f_l, g_l, label_l, logits_l), "both": (embedding, *both)}
        chosen["unlabeled"] = f_u, g_u, label_u, logits_u
        terms["loss_c"] = contrast(*chosen[sets], generator=generator)
    seen = {"mixed": image_mix[undo].chunk(2)[0], "prediction_l": logits_l.argmax(1)}
    return terms, {**seen, "strong": image_u, "pseudo_label": label_u, "logits": logits_u.detach()}


def sigmoid_ramp(iteration: int, length: int) -> float:
    """exp(-5 (1 - t)^2), t = iteration / length up to 1 (sec. 4.1)."""
    return math.exp(-5 * (1 - min(1.0, iteration / length)) ** 2)


# ---- to here ----


class Network(DeepLabV2):
    """DeepLab-v2 with a projection head beside the classifiers; forward gives what both give."""

    def __init__(self, num_classes: int, embedding: int | None, **options):
        super().__init__(num_classes, **options)
        self.projection = ProjectionHead(self.feature_channels, embedding) if embedding else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B,3,H,W) -> logits (B,K,H,W), embedding (B,D,h,w) or None without a head."""
        features = self.features(image)
        embedding = None if self.projection is None else self.projection(features)
        return self.classify(features, image.shape[2:]), embedding

    def load_state_dict(self, state_dict: dict, strict: bool = True, **options):
        """Also that of a finished run, which has no projection head any more."""
        if strict and not any(name.startswith("projection.") for name in state_dict):
            self.projection = None
        return super().load_state_dict(state_dict, strict, **options)


def network(recipe: Recipe, num_classes: int, pretrained: bool) -> Network:
    """The network of section 4.1; batch norm stays as it was pretrained."""
    shape = {"layers": recipe.layers, "width": recipe.width, "rates": recipe.aspp_rates}
    batch_norm = {"batch_norm": "frozen" if pretrained else "batch", "train_affine": not pretrained}
    embedding = None if recipe.contrast == "none" else recipe.embedding
    return Network(num_classes, embedding, **shape, **batch_norm)


def loss_weights(recipe: Recipe, iteration: int) -> dict[str, float]:
    """1, lambda_1, lambda_2 of equation 7 (sec. 4.1)."""
    ramp_u = sigmoid_ramp(iteration - recipe.warmup, recipe.consistency_ramp)
    weight_c = recipe.contrast_weight * sigmoid_ramp(iteration, recipe.contrast_ramp)
    weight_c *= recipe.warmup_contrast or iteration >= recipe.warmup
    return {"loss_l": 1.0, "loss_u": recipe.consistency_weight * ramp_u, "loss_c": weight_c}


def teacher_decay(recipe: Recipe, iteration: int) -> float:
    """Alpha (4.1); 0 up to the first unlabeled images, where the teacher begins as the student."""
    if (update := iteration - recipe.warmup) <= 0:
        return 0.0
    return min(recipe.ema_decay, 1 - recipe.ema_warm_start / (4 * update + 5))


def label_groups(session: run.Run, teacher, regions, views, groups: list) -> list[tuple]:
    """c3_loss's unlabeled of each group; the thresholds are updated once, with all groups'."""
    images, labels = zip(*groups, strict=True)  # 255 in a label: a corner
    strong, targets, args = [], [], session.args
    for session.share, image in enumerate(images):
        targets.append(label_images(teacher, views[0](session.step_seed("teacher"), image)))
        strong.append(views[1](session.step_seed("student"), image))
    prob, confidence, pseudo_label, embedding = zip(*targets, strict=True)
    ignored = (torch.cat(labels) == 255) & (not session.recipe.corners)
    own = torch.cat(confidence), torch.cat(pseudo_label).masked_fill(ignored, 255)
    confident = regions.update(*map(gather, own)).chunk(args.processes)[args.rank]
    session.log(confident=confident.float().mean())
    label = own[1].masked_fill(~confident, 255).chunk(len(images))
    return list(zip(strong, prob, label, embedding, strict=True))


def train(recipe: Recipe, args: argparse.Namespace) -> None:
    """Teacher, its labels of all groups, thresholds; equation 7 group by group, step."""
    groups = -(-recipe.batch_size // (args.processes * recipe.group_size))  # of a process
    accumulate = max(args.accumulate, groups)  # a share of the batch is a group
    run.check_recipe(recipe, args, smallest_share=1, accumulate=accumulate)
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size)
    split = select(data.train, args, batch_size=recipe.batch_size, unlabeled=recipe.unlabeled)
    torch.manual_seed(args.seed)
    student = network(recipe, data.num_classes, args.weights != "none").to(args.device)
    if args.supervised:
        student.projection = None
    weights = "of the checkpoint" if args.checkpoint else load_weights(student, args.weights)
    teacher = make_teacher(student, train_mode=True)
    thresholds = recipe.keep, recipe.threshold_momentum, recipe.initial_threshold
    regions = ConfidentRegions(data.num_classes, *thresholds).to(args.device)
    backbone, heads = student.parameter_groups(recipe.lr, 1.0)
    backbone["lr"] *= recipe.backbone_factor
    optimizer = torch.optim.Adam([backbone, heads], weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, recipe.iterations, recipe.lr_power)
    state = {"student": student, "teacher": teacher, "regions": regions}
    state |= {"optimizer": optimizer, "schedule": schedule}
    colors = recipe.jitter, recipe.hue
    colors += recipe.operations, recipe.operation_probability, recipe.magnitude
    kinds = recipe.teacher_view, recipe.student_view, recipe.labeled_view
    *views, view_l = [randaugment(kind, *colors) for kind in kinds]
    sampling = {"per_class": recipe.per_class, "hard": recipe.hard_sampling}
    sampling |= {"temperature": recipe.temperature, "first_class": 0 if recipe.contrast_road else 1}
    contrast = None if student.projection is None else partial(contrast_loss, **sampling)
    own = {"weights": weights, "headline": "student", "accumulate": accumulate}
    session = run.Run(recipe, args, data, split, state, **own)
    weak = {"rotation": recipe.rotation, "crop": recipe.crop, "flip": recipe.flip}
    weak |= {"mean": student.mean}
    scales_u = recipe.scales if recipe.scale_unlabeled else (1.0,)
    last = recipe.rotate_labeled_last
    weak_l = scale_crop_flip(**weak, scales=recipe.scales, rotate_last=last)
    weak_u = scale_crop_flip(**weak, scales=scales_u)
    draw = {"warmup": recipe.warmup, "replacement": recipe.replacement}
    batches_l, batches_u = session.batches(recipe.batch_size, weak_l, weak_u, **draw)
    for iteration in session.steps():
        semi = not args.supervised and iteration >= recipe.warmup
        decay = teacher_decay(recipe, iteration)
        # Batch-norm statistics are its own once it has labeled images.
        buffers = "keep" if semi and iteration > recipe.warmup else "copy"
        update_teacher(teacher, student, decay=decay, buffers=buffers)
        groups = list(session.shares(batches_l, *[batches_u] * semi))
        if semi:
            unlabeled = label_groups(session, teacher, regions, views, [g[2:] for g in groups])
        weight = loss_weights(recipe, iteration)
        for session.share, (image_l, label_l, *_) in enumerate(groups):
            by_teacher = semi and contrast and recipe.contrast_labeled == "teacher"
            embedding_l = label_images(teacher, image_l)[3] if by_teacher else None
            labeled = view_l(session.step_seed("labeled"), image_l), label_l, embedding_l
            how = {"contrast": contrast, "average": recipe.average}
            how["generator"] = session.generator("boxes, pixels")
            with session.forward(last=True):
                if semi:
                    how |= {"mixing": recipe.mixing, "sets": recipe.contrast}
                    terms, seen = c3_loss(session.student, labeled, unlabeled[session.share], **how)
                else:
                    terms, seen = warmup_loss(session.student, labeled, **how)
            loss = sum(weight[name] * term for name, term in terms.items())  # equation 7
            (loss / accumulate).backward()
            session.log(**terms)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if iteration + 1 == recipe.iterations:
            student.projection = teacher.projection = None  # section 3.5
        session.evaluate_if_due({"labeled": image_l, "truth": label_l, **seen})


def main() -> None:
    """Flags -> recipe -> train, evaluate or predict."""
    run.main("c3semiseg", __doc__, RECIPES, network, train)


if __name__ == "__main__":
    main()
