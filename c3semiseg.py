"""C3-SemiSeg (Zhou, Xu, Zhang, Gao, Heng; ICCV 2021, the open-access version).

A mean teacher labels unlabeled images. The student sees them with other colours and mixed with
labeled images, and it matches the teacher where the teacher is confident for the class. Embeddings
of pixels of both sets are pulled together within a class and pushed apart between classes.

    supervised_loss, consistency_loss  equations 1 and 2
    pixel_contrast_loss                equation 3; with the teacher's embeddings, equation 5
    draw_pairs, box_mask, cut_mix      equation 4 (section 3.2), both complements; un_mix inverts it
    ProjectionHead, sample_pixels      sections 3.3 and 4.1
    contrast_loss                      section 3.3
    ConfidentRegions                   equation 6 (section 3.4)
    label_images                       the teacher's part of equations 2 and 5
    c3_loss, warmup_loss, loss_weights terms of equation 7 and their weights (section 4.1)
    teacher_decay, update_teacher      the moving average of section 3.1
    scale_crop_flip, color_view        A (sections 3.1, 4.1), the colours of A-hat (3.2; OPERATIONS)

    choice              paper               published code (1)  here            flag
    lambda_1 times      sum over K          mean over K         mean over K     --consistency-weight
    lambda_1 ramps from "the beginning"     end of warm-up      end of warm-up
    lambda_1 = 0        no L_consist (t. 3) no unlabeled images mixes both sets --consistency-weight
    lambda_2            0.1                 0.1, loss times 1.5 0.15            --contrast-weight
    lambda_2 ramps up   no                  in 250 steps        in 250 steps    --contrast-ramp
    learning rate of t  (1 - t/T)^0.9       that of t + 1       that of t
    mean (eq. 1, 2)     over each image     over a group        over a group
    labeled keys, eq. 5 the teacher's       the student's       the student's
    keys are detached   -                   unless labeled only as the code
    logits, D_U alone   -                   nearest pixel       bilinear
    i is in P_i         -                   no                  no
    mixed, contrasted   the batch           a GPU's 4 + 4       a group (4)     --group-size
    few of a class      -                   20 or fewer: none   as the code
    road in eq. 5       yes                 no                  yes             --no-contrast-road
    backbone's rate     lr                  0.1 lr, thrice (2)  0.3 lr          --backbone-factor
    classifiers         four branches       sums two of them    four            --aspp-rates 6 12
    warm-up             10 epochs           2250 steps          2500 steps      --warmup
      contrast in it    no                  labeled pixels      labeled pixels  --no-warmup-contrast
    height of boxes     -                   log-uniform         log-uniform
    places of boxes     -                   rounded (5)         uniform
    alpha               0.99                rises to 0.99       0.99            --ema-warm-start
    table 7, s = 1      no thresholds       stay at 0.9         no thresholds
    unlabeled images    the rest            some labeled ones   the rest
    teacher's update    -                   first in a step     first in a step
    batch norm          -                   frozen              frozen (3)
    rotation            -                   labeled: last       before the crop
    black corners       -                   count (unlabeled)   count (unlabeled)
    labeled colours     weak; fig. 1 strong weak                weak
    BDD100K, unlabeled  scaled, RandAugment neither             as the paper
    images are drawn    -                   with repetition     without
    scored              -                   best student        last student

(1) It cannot run as published. (2) Its optimizer steps most of the backbone three times. (3) With
--weights none it is trained, and both networks use the statistics of each batch. (4) At most 256
pools of an image and a class: 4 + 4 images have more with over 32 classes, 16 + 16 with over 8.
(5) The first and the last place are half as likely as the others.

    python c3semiseg.py --dataset cityscapes --data-dir data/cityscapes --labeled 0.125

The paper reports 63.23 +- 0.45% mIoU for this command (1/30: 55.17, 1/4: 65.50, full: 69.53).
Measured on streets, student: 58.0% with 32 labels, supervised 54.3% (3 seeds; README.md, results/).
"""

from common import InputError, ranks, run  # first: handles Ctrl-C during the other imports

# isort: split
import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

from torchvision.transforms import v2

from common.augment import scale_crop_flip, seeded
from common.colors import JITTER, equalize, look_up, recolor, sharpen, stretch
from common.datasets import open_dataset, select
from common.deeplab import DeepLabV2, load_weights
from common.ema import make_teacher, update_teacher
from common.flags import Count, Positive, Share

View = Literal["weak", "jitter", "strong"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of section 4.1 for Cityscapes, or as noted; "code" is not in the paper."""

    size: tuple[Count, Count] | None = (512, 1024)  # height and width of resized images, pixels
    scales: tuple[Positive, ...] = (1.0,)  # scale factors, one is drawn for each image
    rotation: int = 10  # largest rotation, degrees
    crop: tuple[Count, Count] | None = (256, 512)  # height and width of random crops, pixels
    flip: bool = True  # mirror images at random
    batch_size: Count = 16  # labeled images in a step, and as many unlabeled ones
    group_size: Count = 4  # labeled images in a group at most, with as many unlabeled ones (code)
    iterations: Count = 25_000  # training steps
    warmup: int = 2_500  # first steps, on labeled images only: 10 epochs (4.1) of 250 steps (code)
    lr: float = 1.2e-4  # learning rate of classifiers and projection head (Adam)
    backbone_factor: float = 0.3  # the backbone's learning rate, as a multiple of lr (code)
    lr_power: float = 0.9  # lr is multiplied by (1 - iteration / iterations) ** lr_power
    ema_decay: Share = 0.99  # alpha, decay of the teacher
    ema_warm_start: bool = False  # at update k the decay is at most 1 - 1 / (4k + 5) (code: yes)
    mixing: Literal["cross", "intra", "none"] = "cross"  # sets that CutMix mixes (table 6)
    teacher_view: View = "weak"  # the teacher's colours (table 5: W weak, S jitter, S+R strong)
    student_view: View = "strong"  # colours of the student's unlabeled images, in the same words
    jitter: float = 0.5  # jitter of brightness, contrast and saturation (code)
    hue: Annotated[float, 0.0, 0.5] = 0.25  # jitter of hue, in turns (code)
    operations: int = 2  # RandAugment's operations drawn for an image (code)
    operation_probability: Share = 0.5  # probability that a drawn operation is done (code)
    magnitude: float = 10.0  # magnitude of the operations, 0 to 10, before noise (code)
    consistency_weight: float = 50.0  # lambda_1 (the code also divides the loss by K, as we do)
    consistency_ramp: Count = 4_000  # steps in which lambda_1 ramps up, from the warm-up's end
    contrast_weight: float = 0.15  # lambda_2: 0.1, times the code's factor of 1.5
    contrast_ramp: Count = 250  # steps in which lambda_2 ramps up, from the start (code)
    contrast: Literal["both", "labeled", "unlabeled", "none"] = "both"  # sets in eq. 5 (table 4)
    warmup_contrast: bool = True  # contrast labeled pixels in the warm-up (code)
    contrast_road: bool = True  # contrast class 0, too (code: no)
    per_class: Count = 20  # sampled pixels of each class in each image
    hard_sampling: bool = True  # sample half of them among wrong ones (3.3; S of table 4)
    temperature: Positive = 0.15  # tau
    embedding: Count = 256  # channels of the projection head
    keep: Share = 0.8  # s, share of a class above its quantile; 1: all pixels (table 7)
    threshold_momentum: Share = 0.9  # beta, momentum of the thresholds
    initial_threshold: Share = 0.9  # threshold of every class at the start (code)
    layers: tuple[Count, Count, Count, Count] = (3, 4, 23, 3)  # blocks in a stage: ResNet-101
    width: Count = 64  # channels of the first convolution
    aspp_rates: tuple[Count, ...] = (6, 12, 18, 24)  # dilations of the classifiers (code: 6 12)


BDD100K = {"size": (720, 1280), "scales": (0.75, 1.0, 1.25), "crop": (512, 512)}
SMALL = {"layers": (1, 1, 1, 1), "width": 16, "aspp_rates": (1, 2), "embedding": 64}
STREETS = Recipe(size=(64, 128), crop=None, batch_size=4, lr=6e-3, backbone_factor=1.0, **SMALL)
STREETS = replace(STREETS, consistency_weight=8.0, per_class=8)
RAMPS = {"iterations": 1_600, "warmup": 240, "consistency_ramp": 256, "contrast_ramp": 16}
LONGER = {"iterations": 4_000, "warmup": 500, "consistency_ramp": 640, "contrast_ramp": 40}
SCALED = {"size": (180, 240), "crop": (120, 160), "scales": (0.75, 1.0, 1.25, 1.5)}
FOLDER = Recipe(size=None, scales=BDD100K["scales"], crop=(320, 320))
# The paper has cityscapes and bdd100k. camvid, voc and folder take the steps of cityscapes; voc and
# folder scale their images as bdd100k.
RECIPES = {
    "cityscapes": Recipe(),
    # 16 images on 4 GPUs (4.1), read as 2 + 2 on each. Warm-up: ten epochs of 500 steps.
    "bdd100k": Recipe(**BDD100K, batch_size=8, group_size=2, iterations=20_000, warmup=5_000),
    "camvid": Recipe(size=(360, 480), crop=None),
    "voc": FOLDER,
    "folder": FOLDER,
    "streets": replace(STREETS, **RAMPS),
    "small": replace(STREETS, rotation=0, **SCALED, **LONGER),  # --preset small
}


# ---- The method: depends only on torch; copy from here ----

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values where the mask is True, 0 if nowhere: float, bool (B,H,W) -> scalar."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def supervised_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy (equation 1): (B,K,H,W), (B,H,W) int64 -> scalar. Label 255 does not count."""
    loss = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    return masked_mean(loss, label != 255)


def consistency_loss(logits: Tensor, prob: Tensor, mask: Tensor) -> Tensor:
    """Equation 2 divided by K: (B,K,H,W) twice, (B,H,W) bool -> scalar."""
    loss = F.cross_entropy(logits, prob, reduction="none") / logits.shape[1]
    return masked_mean(loss, mask)


def pixel_contrast_loss(
    anchor, anchor_label, contrast, contrast_label, temperature=0.15, *, exclude_self=False
) -> Tensor:
    """Pulls equal classes together, pushes others apart (equations 3 and 5): scalar.

    Float (N,D), int64 (N,), float (M,D), int64 (M,). Embeddings are normalised here, not detached.
    Label 255 does not count. exclude_self leaves out pairs of equal index.
    """
    similarity = F.normalize(anchor, dim=1) @ F.normalize(contrast, dim=1).T / temperature
    both_labeled = (anchor_label != 255)[:, None] & (contrast_label != 255)
    same = anchor_label[:, None] == contrast_label
    positive, negative = both_labeled & same, both_labeled & ~same  # P_i, N_i
    if exclude_self:
        positive = positive & ~torch.eye(*positive.shape, dtype=torch.bool, device=anchor.device)
    # -log(e^s / (e^s + sum e^n)) = softplus(log sum e^n - s), n: negatives; without them it is 0
    log_sum = similarity.masked_fill(~negative, -1e9).logsumexp(1, keepdim=True)
    loss = (F.softplus(log_sum - similarity) * positive).sum(1) / positive.sum(1).clamp(min=1)
    return loss.sum() / (anchor_label != 255).sum().clamp(min=1)


def box_mask(batch: int, size: tuple, *, generator=None, device=None) -> Tensor:
    """A box of half of the area, of log-uniform height (code): (B,*size) bool, True inside."""
    height, width = size
    uniform = torch.rand(3, batch, 1, 1, generator=generator, device=device)
    share = 0.5 ** uniform[0]
    box_height, box_width = (height * share).round(), (width * 0.5 / share).round()
    top = (uniform[1] * (height - box_height + 1)).floor()
    left = (uniform[2] * (width - box_width + 1)).floor()
    row = torch.arange(height, device=device).view(-1, 1)
    column = torch.arange(width, device=device)
    inside_rows = (row >= top) & (row < top + box_height)
    return inside_rows & (column >= left) & (column < left + box_width)


def mix(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the mask is True, else b: (B,H,W) bool, (B,H,W) or (B,C,H,W) twice -> same."""
    return torch.where(mask if a.dim() == mask.dim() else mask.unsqueeze(1), a, b)


def cut_mix(box: Tensor, batch: Tensor) -> Tensor:
    """Swaps boxes of images i and n + i (equation 4): bool (n,H,W), (2n,...,H,W) -> same."""
    a, b = batch.chunk(2)
    # m * a + (1 - m) * b and m * b + (1 - m) * a, where m is 0 inside the box
    return torch.cat([mix(box, b, a), mix(box, a, b)])


def un_mix(box: Tensor, order: Tensor, mixed: Tensor) -> Tensor:
    """Inverts cut_mix(box, batch[order]): bool (n,H,W), int64 (2n,), (2n,C,H,W) -> (2n,C,H,W).

    This is cut_mix(box, mixed)[order.argsort()] as one lookup, which moves fewer bytes.
    """
    place = torch.arange(len(order), device=order.device).view(-1, 1, 1)
    origin = cut_mix(box, place.expand(-1, *box.shape[1:]))[order.argsort()]
    return mixed.gather(0, origin.unsqueeze(1).expand_as(mixed))


def resize_nearest(values: Tensor, size: tuple) -> Tensor:
    """Labels or masks (B,H,W) -> (B,*size), same type."""
    return F.interpolate(values.unsqueeze(1).float(), size).squeeze(1).to(values.dtype)


class ProjectionHead(nn.Sequential):
    """Conv-ReLU-Conv (4.1), normalised to length 1 (3.3): (B,C,h,w) -> float32 (B,D,h,w)."""

    def __init__(self, in_channels: int, out_channels: int = 256):
        first = nn.Conv2d(in_channels, out_channels, 1)
        second = nn.Conv2d(out_channels, out_channels, 1)
        super().__init__(first, nn.ReLU(), second)
        nn.init.normal_(first.weight, std=0.01)  # as the published code
        nn.init.normal_(second.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """The embedding of each pixel."""
        return F.normalize(super().forward(features).float(), dim=1)


def sample_pixels(
    label, prediction, per_class=20, *, num_classes, hard=True, score=None, generator=None
) -> tuple[Tensor, Tensor]:
    """Samples per_class pixels of each image and class, half of them hard (3.3, 4.1).

    Int64 (B,h,w) twice -> index into the flattened grid, label, both int64 (B*K*per_class,). A
    pixel is hard if the student's prediction is not its label, which is the teacher's class in
    unlabeled images. If one kind lacks pixels, the other fills up. A class with at most per_class
    pixels in the image is left out: its slots get label 255.
    score (B,h*w), which ranks pixels of a kind, is uniform noise unless given.
    """
    if score is None:
        score = torch.rand(label.flatten(1).shape, generator=generator, device=label.device)
    pixels = label[0].numel()
    missing = max(0, per_class - pixels)  # topk needs per_class pixels; these are void
    label = F.pad(label.flatten(1), (0, missing), value=255)  # (B,N)
    prediction = F.pad(prediction.flatten(1), (0, missing), value=255)  # (B,N)
    score = F.pad(score, (0, missing))[:, None]  # (B,1,N)
    classes = torch.arange(num_classes, device=label.device)[:, None]  # (K,1)
    of_class = label[:, None] == classes  # (B,K,N)
    wrong = (label != prediction)[:, None]  # (B,1,N)
    is_hard = of_class & wrong if hard else of_class  # (B,K,N); else all count as hard
    is_easy = of_class & ~is_hard  # (B,K,N)
    n_hard, n_easy = is_hard.sum(2, keepdim=True), is_easy.sum(2, keepdim=True)  # (B,K,1)
    take_hard = torch.minimum(n_hard, (per_class - n_easy).clamp(min=per_class // 2))  # (B,K,1)
    drawn_hard = score.masked_fill(~is_hard, -1).topk(per_class).indices  # (B,K,per_class)
    drawn_easy = score.masked_fill(~is_easy, -1).topk(per_class).indices  # (B,K,per_class)
    slot = torch.arange(per_class, device=label.device)
    # Slot s holds hard pixel s if s < take_hard, else easy pixel s - take_hard.
    drawn_easy = drawn_easy.gather(2, (slot - take_hard).clamp(min=0))
    chosen = torch.where(slot < take_hard, drawn_hard, drawn_easy)
    enough = n_hard + n_easy > per_class  # (B,K,1)
    start = pixels * torch.arange(len(label), device=label.device).view(-1, 1, 1)
    index = torch.where(enough, start + chosen, 0)
    return index.flatten(), torch.where(enough, classes, 255).expand_as(index).flatten()


def contrast_loss(
    embedding: Tensor,
    keys: Tensor,
    label: Tensor,
    logits: Tensor,
    *,
    temperature: float = 0.15,
    per_class: int = 20,
    hard: bool = True,
    first_class: int = 0,
    generator=None,
) -> Tensor:
    """Equation 5 at sampled pixels: (B,D,h,w) twice, (B,H,W) int64, (B,K,H,W) -> scalar.

    Classes below first_class are left out. Of more than 256 pools, each of an image and a class,
    256 are drawn.
    """
    size, num_classes = embedding.shape[2:], logits.shape[1]
    label = resize_nearest(label, size)
    label = label.masked_fill(label < first_class, 255)
    prediction = F.interpolate(logits.detach(), size, mode="bilinear").argmax(1)
    index, drawn = sample_pixels(
        label, prediction, per_class, num_classes=num_classes, hard=hard, generator=generator
    )
    pools = len(embedding) * num_classes  # of an image and a class
    if pools > 256:  # memory grows with the square of their number
        index, drawn = index.view(pools, -1), drawn.view(pools, -1)
        score = torch.rand(pools, generator=generator, device=drawn.device)
        kept = (score + (drawn[:, 0] == 255)).argsort()[:256]  # scores are below 1: empty ones last
        index, drawn = index[kept].flatten(), drawn[kept].flatten()
    anchor = embedding.movedim(1, 3).flatten(0, 2)[index]
    key = keys.movedim(1, 3).flatten(0, 2)[index]
    return pixel_contrast_loss(anchor, drawn, key, drawn, temperature, exclude_self=True)


class ConfidentRegions(nn.Module):
    """A confidence threshold for each class: a moving average of a quantile (3.4)."""

    def __init__(self, num_classes: int, keep=0.8, momentum=0.9, initial=0.9):
        super().__init__()
        self.keep, self.momentum = keep, momentum
        self.register_buffer("thresholds", torch.full((num_classes,), initial))

    @torch.no_grad()
    def update(self, confidence: Tensor, pseudo_label: Tensor) -> Tensor:
        """Equation 6, without label 255; then confident(): float, int64 (B,H,W) -> bool."""
        num_classes = len(self.thresholds)
        label = pseudo_label.flatten().clamp(max=num_classes)
        falling, order = confidence.flatten().sort(descending=True)
        # Indices into falling, class by class, still falling in each. Bytes sort fast.
        by_class = label.byte()[order].argsort(stable=True)
        count = torch.zeros(num_classes + 1, dtype=torch.int64, device=label.device)
        count = count.scatter_add(0, label, torch.ones_like(label))
        start = (count.cumsum(0) - count)[:-1]  # where each class begins in by_class
        count = count[:-1]
        last_kept = torch.minimum((self.keep * count.double()).long(), count - 1)  # -1: no pixel
        current = falling[by_class[(start + last_kept).clamp(min=0)]].double()  # delta_t
        average = self.momentum * self.thresholds + (1 - self.momentum) * current
        self.thresholds.copy_(torch.where(count > 0, average, self.thresholds))
        return self.confident(confidence, pseudo_label)

    def confident(self, confidence: Tensor, pseudo_label: Tensor) -> Tensor:
        """Pixels that reach their class's threshold: float, int64 (B,H,W) -> bool (B,H,W).

        If keep is 1, all pixels do. Label 255 never does.
        """
        threshold = self.thresholds[pseudo_label.clamp(max=len(self.thresholds) - 1)]
        return (pseudo_label != 255) & ((confidence >= threshold) | (self.keep >= 1))


@torch.no_grad()
def label_images(teacher: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """(B,3,H,W) -> probabilities, confidence (B,H,W), int64 pseudo-label (B,H,W), embedding."""
    logits, embedding = teacher(image)
    prob = logits.softmax(1)
    return prob, *prob.max(1), embedding


def draw_pairs(mixing: str, n: int, size: tuple, generator: torch.Generator):
    """Draws which of n labeled and n unlabeled images meet: int64 (2n,), and boxes (n,*size).

    In image[order], image i meets image n + i. "cross" draws pairs of the union (equation 4),
    "intra" takes pairs within a set (table 6), and "none" leaves the boxes empty.
    """
    order = torch.randperm(2 * n, generator=generator, device=generator.device)
    if mixing == "intra":  # 0 meets 1, 2 meets 3 ...; if n is odd, one pair crosses the sets
        order = torch.arange(2 * n, device=generator.device).view(n, 2).T.flatten()
    box = box_mask(n, size, generator=generator, device=generator.device)
    return order, torch.zeros_like(box) if mixing == "none" else box


def warmup_loss(student: nn.Module, image: Tensor, label: Tensor, *, contrast_fn=None):
    """Terms of equation 7 for labeled images (4.1): (B,3,H,W), int64 (B,H,W); and details."""
    logits, embedding = student(image)
    terms = {"loss_l": supervised_loss(logits, label)}
    if contrast_fn is not None:
        terms["loss_c"] = contrast_fn(embedding, embedding, label, logits)
    return terms, {"prediction_l": logits.detach()}


def c3_loss(student, batch_l, batch_u, order, box, *, contrast_fn=None, sets="both"):
    """Terms of equation 7, scalars by name, for n labeled and n unlabeled images, and details.

    batch_l: image (n,3,H,W), label int64 (n,H,W). batch_u: the student's image and, from the
    teacher, prob (n,K,H,W), label int64 (n,H,W), 255 where not confident, and embedding (n,D,h,w).
    draw_pairs gives order and box. contrast_fn is contrast_loss with its options; sets selects its
    images.
    """
    (image_l, label_l), (image_u, prob, label_u, keys_u) = batch_l, batch_u
    image = torch.cat([image_l, image_u])[order]
    image_mix = cut_mix(box, image)
    logits_mix, embedding_mix = student(image_mix)
    logits = un_mix(box, order, logits_mix)
    logits_l, logits_u = logits.chunk(2)
    terms = {"loss_l": supervised_loss(logits_l, label_l)}  # equation 1
    terms["loss_u"] = consistency_loss(logits_u, prob, label_u != 255)  # equation 2
    if contrast_fn is not None:
        # The published code un-mixes features. As the head has 1x1 convolutions, it is the same.
        small_box = resize_nearest(box, embedding_mix.shape[2:])
        embedding = un_mix(small_box, order, embedding_mix)
        embedding_l, embedding_u = embedding.chunk(2)
        if sets == "labeled":
            terms["loss_c"] = contrast_fn(embedding_l, embedding_l, label_l, logits_l)
        elif sets == "unlabeled":
            terms["loss_c"] = contrast_fn(embedding_u, keys_u, label_u, logits_u)
        else:
            keys, label = torch.cat([embedding_l.detach(), keys_u]), torch.cat([label_l, label_u])
            terms["loss_c"] = contrast_fn(embedding, keys, label, logits)
    n = len(box)
    place_l = order.argsort()[:n]  # where the labeled images are in image and image_mix
    details = {
        "other": image.roll(n, 0)[place_l],  # image i was mixed with image n + i
        "mask_b": box.repeat(2, 1, 1)[place_l],
        "mixed_image": image_mix[place_l],
        "prediction_l": logits_l.detach(),
        "strong_view": image_u,
        "pseudo_label": label_u,
        "prediction_u": logits_u.detach(),
    }
    return terms, details


def sigmoid_ramp(iteration: int, length: int) -> float:
    """exp(-5 (1 - t)^2), where t = iteration / length grows to 1 and stays there (4.1)."""
    return math.exp(-5 * (1 - min(1.0, iteration / length)) ** 2)


# ---- to here ----


# The code's RandAugment: strength r in [0,1] -> function of common/colors.py and its numbers.
OPERATIONS = {
    "auto-contrast": lambda r: (stretch, (r,)),
    "equalize": lambda r: (equalize, (r,)),
    "invert": lambda _: (look_up, range(255, -1, -1)),
    "posterize": lambda r: (look_up, [x - x % 2 ** (8 - int(4 * r)) for x in range(256)]),
    "solarize": lambda r: (look_up, [255 - x if x >= int(256 * r) else x for x in range(256)]),
    "solarize-add": lambda r: (look_up, [x + int(110 * r) if x < 128 else x for x in range(256)]),
    "color": lambda r: JITTER["saturation"](1.8 * r + 0.1),
    "contrast": lambda r: JITTER["contrast"](1.8 * r + 0.1),
    "brightness": lambda r: JITTER["brightness"](1.8 * r + 0.1),
    "sharpness": lambda r: (sharpen, (1.8 * r + 0.1,)),
}


def draw_operations(recipe: Recipe) -> list[tuple[str, float]]:
    """RandAugment for one image: names of operations and their strengths in [0,1]."""
    operations = []
    for _ in range(recipe.operations):
        name = list(OPERATIONS)[torch.randint(len(OPERATIONS), ()).item()]
        magnitude = recipe.magnitude + 0.5 * torch.randn(()).item()  # (code)
        if torch.rand(()).item() < recipe.operation_probability:
            operations.append((name, min(max(magnitude, 0.0), 10.0) / 10))
    return operations


def draw_changes(recipe: Recipe, view: str, count: int) -> list[list[tuple]]:
    """Draws functions and numbers for each image: jitter in random order, then RandAugment."""
    jitter = v2.ColorJitter(recipe.jitter, recipe.jitter, recipe.jitter, recipe.hue)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue  # JITTER's order
    changes = []
    for _ in range(count):
        order, *factors = jitter.get_params(*ranges)
        drawn = list(zip(JITTER.values(), factors, strict=True))
        ordered = [drawn[k] for k in order]
        changes.append([change(factor) for change, factor in ordered if factor is not None])
    if view == "strong":
        for image_changes in changes:
            image_changes += [OPERATIONS[name](r) for name, r in draw_operations(recipe)]
    return changes


def color_view(recipe: Recipe, view: str, seeds: list[int], image: Tensor) -> Tensor:
    """Changes the colours of each image (A-hat of 3.2): float (B,3,H,W) in [0,1] -> same.

    "weak" keeps colours, "jitter" jitters them, "strong" adds RandAugment's operations. Colours
    have 8 bits, as with PIL. seeds has one seed for each group; groups are equal in size.
    """
    if view == "weak":
        return image
    count, changes = len(image) // len(seeds), []
    for seed in seeds:
        changes += seeded(draw_changes, seed, recipe, view, count)
    return recolor(image.mul(255).round_(), changes).div_(255)


class Network(DeepLabV2):
    """DeepLab-v2 with a projection head beside the classifiers."""

    def __init__(self, num_classes: int, embedding: int | None, **options):
        super().__init__(num_classes, **options)
        self.projection = ProjectionHead(self.feature_channels, embedding) if embedding else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B,3,H,W) -> logits (B,K,H,W), embedding (B,D,h,w) or None without a head."""
        features = self.features(image)
        embedding = None if self.projection is None else self.projection(features)
        return self.classify(features, image.shape[2:]), embedding

    def load_state_dict(self, state_dict: dict, strict: bool = True, **options):
        """Drops its projection head if the state has none, as after a finished run (3.5)."""
        if strict and not any(name.startswith("projection.") for name in state_dict):
            self.projection = None
        return super().load_state_dict(state_dict, strict, **options)


def network(recipe: Recipe, num_classes: int, *, pretrained: bool) -> Network:
    """Builds the network of section 4.1. Pretrained batch norm is frozen."""
    return Network(
        num_classes,
        None if recipe.contrast == "none" else recipe.embedding,
        layers=recipe.layers,
        width=recipe.width,
        rates=recipe.aspp_rates,
        batch_norm="frozen" if pretrained else "batch",
        train_affine=not pretrained,
    )


def make_contrast(recipe: Recipe, generator: torch.Generator):
    """Returns contrast_loss with the recipe's options."""
    return partial(
        contrast_loss,
        temperature=recipe.temperature,
        per_class=recipe.per_class,
        hard=recipe.hard_sampling,
        first_class=0 if recipe.contrast_road else 1,
        generator=generator,
    )


def loss_weights(recipe: Recipe, iteration: int) -> dict[str, float]:
    """1, lambda_1 and lambda_2 of equation 7 (section 4.1)."""
    ramp_u = sigmoid_ramp(iteration - recipe.warmup, recipe.consistency_ramp)
    weight_c = recipe.contrast_weight * sigmoid_ramp(iteration, recipe.contrast_ramp)
    if iteration < recipe.warmup and not recipe.warmup_contrast:
        weight_c = 0.0
    return {"loss_l": 1.0, "loss_u": recipe.consistency_weight * ramp_u, "loss_c": weight_c}


def teacher_decay(recipe: Recipe, iteration: int) -> float:
    """alpha (4.1); in the warm-up it is 0, so that the teacher is a copy of the student."""
    k = iteration - recipe.warmup  # updates since the copy
    if k <= 0:
        return 0.0
    if recipe.ema_warm_start:
        return min(recipe.ema_decay, 1 - 1 / (4 * k + 5))
    return recipe.ema_decay


def label_groups(recipe: Recipe, teacher, regions, images: dict[int, Tensor], seed) -> dict:
    """Returns, for each group, the tuple that c3_loss takes as batch_u.

    images maps a group to its unlabeled images. seed(group, network) is the seed of its colours.
    The thresholds are updated once, with the images of all groups and ranks.
    """
    n, batch = len(images), torch.cat(list(images.values()))
    view = color_view(recipe, recipe.student_view, [seed(k, "student") for k in images], batch)
    batch = color_view(recipe, recipe.teacher_view, [seed(k, "teacher") for k in images], batch)
    found = [label_images(teacher, image) for image in batch.chunk(n)]
    _, confidences, labels, _ = zip(*found, strict=True)
    regions.update(ranks.gather(torch.cat(confidences)), ranks.gather(torch.cat(labels)))
    groups_u = {}
    for k, image, (prob, confidence, label, keys) in zip(images, view.chunk(n), found, strict=True):
        label = label.masked_fill(~regions.confident(confidence, label), 255)
        groups_u[k] = image, prob, label, keys
    return groups_u


def check(recipe: Recipe, args: argparse.Namespace) -> int:
    """Returns the number of groups of a rank. InputError for flags that do not go together."""
    groups = math.ceil(recipe.batch_size / (args.ranks * recipe.group_size))
    groups = max(args.accumulate, groups)
    ranks.check_batch_size(recipe.batch_size, args, accumulate=groups, least=1)
    if recipe.scales != (1.0,) and recipe.crop is None:
        raise InputError("--scales: needs --crop, because scaled images differ in size")
    if recipe.warmup >= recipe.iterations and not args.supervised:
        reason = f"{recipe.iterations} iterations, but {recipe.warmup} of them are warm-up"
        raise InputError(f"{reason}: raise --iterations or lower --warmup")
    return groups


def train(recipe: Recipe, args: argparse.Namespace, make_session=run.Session) -> None:
    """Minimises equation 7; tests and benchmarks pass a make_session of their own."""
    groups = check(recipe, args)
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size)
    labeled, unlabeled = split = select(data.train, args, batch_size=recipe.batch_size)
    torch.manual_seed(args.seed)
    student = network(recipe, data.num_classes, pretrained=args.weights != "none").to(args.device)
    if args.supervised:
        student.projection = None
    contrasting = student.projection is not None
    if args.checkpoint is None:
        print(f"weights: {load_weights(student, args.weights)}")
    teacher = make_teacher(student, train_mode=True)
    keep, momentum, initial = recipe.keep, recipe.threshold_momentum, recipe.initial_threshold
    regions = ConfidentRegions(data.num_classes, keep, momentum, initial).to(args.device)
    backbone, heads = student.parameter_groups(recipe.lr, head_factor=1.0)
    backbone["lr"] *= recipe.backbone_factor
    optimizer = torch.optim.Adam([backbone, heads], fused=student.mean.is_cuda)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, recipe.iterations, recipe.lr_power)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "schedule": schedule}
    state["regions"] = regions
    session = make_session(recipe, args, data, split, state, headline="student", accumulate=groups)
    start = session.restore()
    geometry = {"rotation": recipe.rotation, "crop": recipe.crop, "flip": recipe.flip}
    transform = scale_crop_flip(scales=recipe.scales, **geometry, mean=student.mean)
    batches_l = session.batches(labeled, transform, stream=0, start=start)
    first = max(start, recipe.warmup)
    batches_u = session.batches(unlabeled, transform, stream=1, start=first)
    student = run.prepare(student, args, train=True)
    teacher = run.prepare(teacher, args, train=False)
    for iteration in range(start, recipe.iterations):
        semi = not args.supervised and iteration >= recipe.warmup
        # Once the teacher labels images, it keeps its own batch-norm statistics.
        buffers = "copy" if args.supervised or iteration <= recipe.warmup else "keep"
        update_teacher(teacher, student, decay=teacher_decay(recipe, iteration), buffers=buffers)
        seed = partial(ranks.step_seed, args.seed, iteration)
        if semi:
            images_u = {k: next(batches_u)[0] for k in session.micro_batches}
            groups_u = label_groups(recipe, teacher, regions, images_u, seed)
            label_u = torch.cat([label for _, _, label, _ in groups_u.values()])
            session.log({"confident": (label_u != 255).float().mean()})
        weights = loss_weights(recipe, iteration)
        for k in session.micro_batches:  # groups; their gradients are averaged
            image_l, label_l = next(batches_l)
            generator = torch.Generator(args.device).manual_seed(seed(k, "boxes, pixels"))
            contrast_fn = make_contrast(recipe, generator) if contrasting else None
            if semi:
                order, box = draw_pairs(recipe.mixing, len(image_l), image_l.shape[2:], generator)
                terms, details = c3_loss(
                    student,
                    (image_l, label_l),
                    groups_u[k],
                    order,
                    box,
                    contrast_fn=contrast_fn,
                    sets=recipe.contrast,
                )
            else:
                terms, details = warmup_loss(student, image_l, label_l, contrast_fn=contrast_fn)
            loss = sum(weights[name] * term for name, term in terms.items())  # equation 7
            (loss / groups).backward()
            session.log(terms)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if iteration + 1 == recipe.iterations:  # only training needs it (3.5)
            state["student"].projection = state["teacher"].projection = None
        session.end_step(iteration, {"labeled": image_l, "truth": label_l, **details})


def main() -> None:
    """Flags -> recipe -> train, evaluate or predict."""
    run.main("c3semiseg", __doc__, RECIPES, network, train)


if __name__ == "__main__":
    main()
