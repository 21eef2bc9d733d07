"""CowMix (French et al.; ICLR 2020 submission; arXiv:1906.01916).

A mean teacher labels two clean images; the student, shown a mix of the two, has to predict the mix
of their labelings. The mask of the mix is thresholded smooth noise, spotted like a Friesian cow.

    cow_mask                   section 3.4, listing 1 (M = 1 is True)
    box_mask                   the rectangle of section 3.3
    mix                        mix(a, b, M) of section 3.3; here mix(M, b, a)
    cross_entropy              supervised loss (4.1)
    consistency_loss           squared distance (3.3), times confidence (D.3.4)
    mixing_loss                CowMix, CutMix: equation 2, listing 3; ICT (2.2)
    cutout_loss                CowOut, CutOut: section 3.3, listing 2
    random_affine, aug_loss    standard augmentation (D.1), predictions aligned by A B^-1 (D.1.1)
    UNet                       figure 7, table 4

Corrected in the listings:
- 1: scipy.ndimage.filter does not exist, and noise_smooth is Ns;
- 2: ym_t, ym_s and m are y_t, y_s and mask;
- 3: the teacher is shown xb, not yb;
- 2 and 3: max(dim=1) is meant without its indices, and a mean of bools as one of floats;
- 2 and 3: squared_diff is not defined, and the teacher takes no gradient.
Where paper and published code (later; without cow masks and this U-Net) differ, as the paper:
- the square is averaged over classes, weight 10 (code: summed, 1; that is --consistency-weight K);
- a box has four random numbers, its area too (3.3); CutMix's code: half (--p-range 0.5 0.5);
- one learning rate; code: 3e-5, the backbone a tenth of it (--lr 3e-6 --head-factor 10);
- four classifier branches as in DeepLab-v2; the code sums two (--aspp-rates 6 12);
- images are not mirrored or scaled (code: --flip --scale-range 0.5 1.5), Cityscapes not cropped
  (code: --crop 256 512 --batch-size 4).
CowOut has 300 epochs by table 1, as here, but 100 by D.3.3 (--iterations 36700). CutOut keeps the
inside of the box, as 3.3 and the code do (--cutout-keeps outside: what others call CutOut). ICT's
confidence is that of the blend, as in listing 3 (code: the blend of confidences).
Not in the paper, from the code: constant learning rate; Beta(0.1, 0.1); teacher evaluated, its
batch-norm statistics averaged too and those of the batch used (--teacher-mode eval), which matters
with --weights none alone: else DeepLab's and the U-Net's encoder's are frozen. In neither: decoder
without batch norm, ReLU, classifier near 0 at first, scales of D.1 log-uniform, b of D.1 in [0,1],
labeled images recolored too; padding of crops is neither scored nor counted as confident. The COCO
weights of the paper (--weights FILE) are hard to find: ImageNet's by default.

    python cowmix.py --dataset camvid --data-dir CamVid --labeled 30
    python cowmix.py --dataset cityscapes --network deeplab --labeled 0.125 --perturbation cutmix

Measured: 52.7% mIoU on streets with 32 labels, supervised 51.3% (3 seeds; README.md, results/).
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from common import run
from common.augment import scale_crop_flip
from common.datasets import open_dataset, select
from common.deeplab import DeepLabV2, SegmentationResNet, load_weights
from common.ema import make_teacher, update_teacher

Perturbation = Literal["cowmix", "cowout", "cutmix", "cutout", "ict", "aug"]
CAMVID = 367  # training images (4.2), and steps of an epoch at batch size 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of section 4 and appendix D for CamVid; "code": not in the paper."""

    network: Literal["unet", "deeplab"] = "unet"  # with ResNet-50, with ResNet-101 (4.1)
    perturbation: Perturbation = "cowmix"  # of the unlabeled images; table 1
    size: tuple[int, int] | None = (360, 480)  # height, width images are resized to
    crop: tuple[int, int] | None = None  # random crop; 321 321 on VOC (D.3.2)
    scale_range: tuple[float, float] = (1.0, 1.0)  # random scale before the crop; not in the paper
    flip: bool = False  # random mirroring; not in the paper
    batch_size: int = 1  # labeled images a step, and as many unlabeled ones or pairs (D.3.1)
    iterations: int = 300 * CAMVID  # steps: 300 epochs; aug 50, cutmix 100 of them (table 1)
    lr: float = 1e-4  # of Adam (D.3.1); 1e-5 for deeplab (D.3.2)
    lr_power: float = 0.0  # lr * (1 - iteration / iterations) ** lr_power; not in the paper
    head_factor: float = 1.0  # decoder or classifiers learn at head_factor * lr; code: 10
    ema_decay: float = 0.99  # alpha of the teacher (D.3.1)
    teacher_mode: Literal["train", "eval"] = "train"  # of the labeling teacher's batch norm (code)
    consistency_weight: float = 10.0  # of the unlabeled loss (4.1); figure 10
    confidence_threshold: float = 0.97  # listings 2 and 3
    sigma_range: tuple[float, float] = (4.0, 16.0)  # of cow masks, pixels (4.2); figure 12
    p_range: tuple[float, float] = (0.5, 0.5)  # share of M = 0, for boxes of M = 1; 0 1 but cowmix
    cutout_keeps: Literal["inside", "outside"] = "inside"  # of a box (3.3)
    ict_alpha: float = 0.1  # blend ~ Beta(alpha, alpha) (code)
    flip_probability: float = 0.5  # of aug (code)
    translation: float = 4.0  # of aug, up to, pixels (D.1)
    scaling: tuple[float, float] = (0.8, 1.25)  # range of aug (D.1)
    rotation: float = 15.0  # of aug, up to, degrees (D.1)
    brightness: float = 0.1  # of aug, deviation of what is added (D.1)
    contrast: float = 1.1  # of aug, one deviation of the log-normal factor (D.1)
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottlenecks a stage (4.1)
    width: int = 64  # channels of the stem; the decoder's follow
    aspp_rates: tuple[int, ...] = (6, 12, 18, 24)  # dilations of deeplab's classifiers; code: 6 12


CITYSCAPES = replace(Recipe(), size=(512, 1024), iterations=100_000, sigma_range=(8.0, 32.0))
# D.3.2; for the U-Net on VOC too, for which the paper has no crop and batch size. 40000 steps with
# DeepLab and on VOC are the code's, the paper has no number.
DEEPLAB = {"network": "deeplab", "lr": 1e-5, "layers": (3, 4, 23, 3)}
CROPS = {"size": None, "crop": (321, 321), "batch_size": 10, "iterations": 40_000}
VOC = replace(CITYSCAPES, **CROPS)
SMALL = {"size": (64, 128), "width": 16, "layers": (1, 1, 1, 1), "aspp_rates": (1, 2)}
STREETS = replace(Recipe(), network="deeplab", flip=True, batch_size=4, iterations=1_600, **SMALL)
# Not in the paper: bdd100k (Cityscapes' recipe, other size), folder (VOC's), streets, and DeepLab
# on CamVid.
RECIPES = {
    "camvid": Recipe(),
    "cityscapes": CITYSCAPES,
    "voc": replace(VOC, **DEEPLAB),
    "bdd100k": replace(CITYSCAPES, size=(360, 640)),
    "folder": VOC,
    "streets": replace(STREETS, lr=6e-3, lr_power=0.9),
}
OTHER_NETWORK = {
    "camvid": replace(Recipe(), **DEEPLAB),
    "cityscapes": replace(CITYSCAPES, batch_size=2, iterations=40_000, **DEEPLAB),
    "voc": VOC,
    "bdd100k": replace(CITYSCAPES, size=(360, 640), batch_size=2, iterations=40_000, **DEEPLAB),
    "folder": replace(VOC, **DEEPLAB),
    "streets": replace(RECIPES["streets"], network="unet"),
}
EPOCHS = {"aug": 50, "cutmix": 100}  # of CamVid, where training failed later (table 1)


def preset(dataset: str, network: str | None = None, perturbation: str = "cowmix") -> Recipe:
    """The recipe for a data set, a network (None: the data set's usual one), a perturbation."""
    recipe = RECIPES[dataset]
    if network not in (None, recipe.network):
        recipe = OTHER_NETWORK[dataset]
    if perturbation == "cowmix":
        return recipe
    changes = {"perturbation": perturbation, "p_range": (0.0, 1.0)}  # (4.2, 3.3)
    if dataset == "camvid":
        changes["iterations"] = EPOCHS.get(perturbation, 300) * CAMVID
    return replace(recipe, **changes)


# ---- The method: depends only on torch; copy from here ----


def gaussian_matrix(n: int, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian smoothing of n values as a matrix: sigma (B,), at most largest -> (B,n,n).

    As scipy's gaussian_filter1d: cut off at 4 sigma, edges mirrored with the edge value repeated.
    """
    sigma, period = sigma.view(-1, 1, 1), 2 * n  # a mirrored line repeats with that period
    repeats = 1 + int(4 * largest + 0.5) // period
    offset = torch.arange(1 - n, period, device=sigma.device).view(-1, 1)
    offset = offset + period * torch.arange(-repeats, repeats + 1, device=sigma.device)
    inside = offset.abs() <= (4 * sigma + 0.5).floor()
    kernel = (torch.exp(-0.5 * (offset / sigma) ** 2) * inside).sum(-1)
    kernel = kernel / kernel[:, :period].sum(1, keepdim=True)
    # Row s holds the kernel at offsets s + 1 - n to s: below n those of j - i, above of i + j + 1.
    rows = kernel.unfold(1, n, 1)
    return rows[:, :n].flip(1).add_(rows[:, n:])


def cow_mask(
    batch,
    size,
    *,
    sigma_range,
    p_range=(0.5, 0.5),
    noise=None,
    sigma=None,
    generator=None,
    device=None,
) -> Tensor:
    """Smoothed noise above T = sqrt(2) erfinv(2p - 1) S_sigma + S_mu (3.4, listing 1).

    -> (B,*size) bool. p, uniform in p_range, is the expected share of False; sigma (B,), pixels,
    is log-uniform in sigma_range, noise (B,*size) normal, unless given (sigma within that range).
    """
    draw = {"generator": generator, "device": device}
    if sigma is None:
        low, high = map(math.log, sigma_range)
        sigma = (low + (high - low) * torch.rand(batch, **draw)).exp()
    p = p_range[0] + (p_range[1] - p_range[0]) * torch.rand(batch, 1, 1, **draw)
    noise = torch.randn(batch, *size, **draw) if noise is None else noise
    rows, columns = (gaussian_matrix(n, sigma, sigma_range[1]) for n in size)
    smooth = rows @ noise @ columns  # symmetric
    mean = smooth.mean((1, 2), keepdim=True)
    deviation = (smooth - mean).square().mean((1, 2), keepdim=True).sqrt()  # std is slow on a CPU
    return smooth > torch.erfinv(2 * p - 1) * 2**0.5 * deviation + mean


def box_mask(batch: int, size, *, p_range=(0.5, 0.5), generator=None, device=None) -> Tensor:
    """One rectangle in each mask (3.3): (B,*size) bool, True inside, somewhere in the image.

    Its share p of the area is uniform in p_range, its sides are p^u and p^(1-u) of the image's,
    u uniform in [0,1] (the code's law; the paper calls all four numbers random).
    """
    height, width = size
    draw = torch.rand(4, batch, 1, 1, generator=generator, device=device)
    p = p_range[0] + (p_range[1] - p_range[0]) * draw[0]
    box_height, box_width = (height * p ** draw[1]).round(), (width * p ** (1 - draw[1])).round()
    top, left = ((height - box_height) * draw[2]).round(), ((width - box_width) * draw[3]).round()
    row = torch.arange(height, device=device).view(-1, 1)
    column = torch.arange(width, device=device)
    inside_rows = (row >= top) & (row < top + box_height)
    return inside_rows & (column >= left) & (column < left + box_width)


def mix(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where mask, else b: (B,H,W) bool, (B,H,W) or (B,C,H,W) twice -> same."""
    return torch.where(mask if a.dim() == mask.dim() else mask.unsqueeze(1), a, b)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over the batch's labeled pixels (4.1): (B,K,H,W), (B,H,W) int64 -> scalar.

    Void pixels do not count; 0 where all are void.
    """
    total = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return total / (label != ignore_index).sum().clamp(min=1)


def consistency_loss(student: nn.Module, image: Tensor, prob: Tensor, fraction, mask=None):
    """Squared distance of the student's probabilities for image (B,3,H,W) to prob (B,K,H,W).

    -> scalar, what it was made of. The mean is over batch, classes and pixels, as in the listings;
    where mask (B,H,W) is False the square is 0. fraction, the share of pixels that the teacher is
    confident of, weights it in place of a ramp-up (D.3.4).
    """
    logits = student(image)
    square = (prob - logits.float().softmax(1)).square()
    square = square if mask is None else square * mask.unsqueeze(1)
    seen = {"image_mix": image, "pseudo_label": prob.argmax(1), "logits": logits.detach()}
    return square.mean() * fraction, {**seen, "confident": fraction}


def confident_fraction(prob: Tensor, threshold: float, valid: Tensor) -> Tensor:
    """Of the valid pixels (D.3.4): (B,K,H,W), (B,H,W) bool -> scalar."""
    return ((prob.amax(1) > threshold) & valid).sum() / valid.sum().clamp(min=1)


def mixing_loss(student, teacher, image_a, image_b, combine: Callable, valid, threshold=0.97):
    """Equation 2 as listing 3: (B,3,H,W) twice, (B,H,W) bool -> scalar, what it was made of.

    combine is the paper's mix(a, b, M), of images and probabilities alike; not valid is padding.
    """
    with torch.no_grad():
        prob_a, prob_b = (teacher(x).float().softmax(1) for x in (image_a, image_b))  # (l. 4-5)
        image_mix = combine(image_a, image_b)  # (l. 7)
        prob_mix = combine(prob_a, prob_b)  # (l. 8)
        fraction = confident_fraction(prob_mix, threshold, valid)  # (l. 13)
    return consistency_loss(student, image_mix, prob_mix, fraction, valid)  # (l. 10, 15)


def cutout_loss(student, teacher, image, mask, fill: Tensor, valid: Tensor, threshold=0.97):
    """Section 3.3 as listing 2: (B,3,H,W), (B,H,W) bool twice -> scalar, what it was made of.

    The student sees fill (3,1,1), the mean colour, where the mask is False: 0 if normalised.
    """
    with torch.no_grad():
        prob = teacher(image).float().softmax(1)  # (l. 4)
        image_cut = mix(mask, image, fill)  # x M (l. 6)
        fraction = confident_fraction(prob, threshold, valid)  # (l. 9)
    return consistency_loss(student, image_cut, prob, fraction, mask & valid)  # (l. 6, 11)


def random_affine(
    batch: int, *, flip: float, translation, scaling, rotation, generator=None, device=None
) -> Tensor:
    """Mirroring (with probability flip), scaling, rotation, translation of D.1: (B,3,3).

    The matrices map points (x, y, 1), in pixels from an image's centre; rotation is in degrees.
    """
    draw = torch.rand(5, batch, generator=generator, device=device)
    mirror = 1 - 2 * (draw[0] < flip).float()
    low, high = map(math.log, scaling)
    scale, angle = (low + (high - low) * draw[1]).exp(), math.radians(rotation) * (2 * draw[2] - 1)
    x, y = translation * (2 * draw[3:] - 1)
    zero, cosine, sine = torch.zeros_like(x), scale * angle.cos(), scale * angle.sin()
    rows = (cosine * mirror, -sine, x, sine * mirror, cosine, y, zero, zero, zero + 1)
    return torch.stack(rows, 1).view(batch, 3, 3)


def warp_grid(matrix: Tensor, size: tuple) -> Tensor:
    """Where each pixel of a warped image comes from: (B,3,3) as random_affine's -> (B,*size,2).

    In grid_sample's coordinates (align_corners=False): what is beyond -1 or 1 is not in the image.
    """
    inverse = torch.linalg.inv_ex(matrix)[0]  # inv would wait for the device
    y, x = (torch.arange(n, device=matrix.device) + 0.5 - n / 2 for n in size)
    y, x = torch.meshgrid(y, x, indexing="ij")
    place = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1)
    x, y, _ = (place @ inverse.transpose(1, 2)).unflatten(1, tuple(size)).unbind(-1)
    return torch.stack([x * 2 / size[1], y * 2 / size[0]], -1)


def warp(image: Tensor, grid: Tensor, fill: Tensor) -> Tensor:
    """An image (B,3,H,W) seen through a grid (B,H,W,2), with fill (3,1,1) around it."""
    return F.grid_sample(image - fill, grid, align_corners=False) + fill


def warp_label(label: Tensor, grid: Tensor) -> Tensor:
    """A label int64 (B,H,W) seen through a grid (B,H,W,2), void (255) around it."""
    shifted = (label.unsqueeze(1) - 255).float()  # so that the zeros around it are void
    warped = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)
    return warped.squeeze(1).long() + 255


def recolor(image: Tensor, *, brightness: float, contrast: float, generator=None) -> Tensor:
    """c x + b within [0,1], b ~ N(0, brightness), c ~ e^N(0, ln contrast) (D.1): (B,3,H,W)."""
    normal = torch.randn(2, len(image), 1, 1, 1, generator=generator, device=image.device)
    return (image * contrast ** normal[0] + brightness * normal[1]).clamp(0, 1)


def aug_loss(student, teacher, image, matrix_a, matrix_b, color, fill, valid, threshold=0.97):
    """Section D.1.1: (B,3,H,W), (B,3,3) twice, (B,H,W) bool -> scalar, what it was made of.

    The student sees the image changed by A, the teacher by B; the teacher's predictions are brought
    into the student's frame by A B^-1. Pixels that either does not see do not count.
    """
    size = image.shape[-2:]
    with torch.no_grad():
        grid_a, grid_b = warp_grid(matrix_a, size), warp_grid(matrix_b, size)
        prob_b = teacher(warp(color(image), grid_b, fill)).float().softmax(1)
        grid = warp_grid(matrix_a @ torch.linalg.inv_ex(matrix_b)[0], size)
        prob = F.grid_sample(prob_b, grid, padding_mode="border", align_corners=False)
        image_a = warp(color(image), grid_a, fill)
        mask = (grid.abs() <= 1).all(-1) & (warp_label(255 * (~valid).long(), grid_a) == 0)
        fraction = confident_fraction(prob, threshold, mask)
    return consistency_loss(student, image_a, prob, fraction, mask)


# ---- to here ----


class UNet(SegmentationResNet):
    """The decoder of figure 7, table 4: RGB in [0,1] (B,3,H,W) -> float32 logits (B,K,H,W).

    The interface is DeepLabV2's. layers and width shrink the ResNet (50 layers: (3, 4, 6, 3)) and
    the decoder with it. Images of any size are padded inside to multiples of 32 by mean colour.
    """

    imagenet = torchvision.models.ResNet50_Weights.IMAGENET1K_V1

    def __init__(self, num_classes: int, *, layers=(3, 4, 6, 3), width=64, batch_norm="frozen"):
        shape = {"strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1), "caffe": False}
        super().__init__(layers, width, **shape, batch_norm=batch_norm)
        channels = [max(1, c * width // 64) for c in (192, 128, 96, 64, 48, 32)]
        skips = (16 * width, 8 * width, 4 * width, 0, 0)  # conv4_x, conv3_x, conv2_x
        self.decoder = nn.ModuleList([nn.Conv2d(32 * width, channels[0], 3, padding=1)])
        for skip, wide, narrow in zip(skips, channels[:-1], channels[1:], strict=True):
            self.decoder.append(nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
            self.decoder.append(nn.Conv2d(narrow + skip, narrow, 3, padding=1))
        self.feature_channels = channels[-1]
        self.classifier = nn.Conv2d(self.feature_channels, num_classes, 1)
        self.initialize(train_affine=True)
        nn.init.normal_(self.classifier.weight, std=0.01)  # sure of nothing yet, as DeepLabV2's

    def features(self, image: Tensor) -> Tensor:
        """RGB in [0,1] (B,3,H,W) -> (B,feature_channels,H,W); normalises first."""
        height, width = image.shape[-2:]
        rows, columns = -height % 32, -width % 32
        top, left = rows // 2, columns // 2
        padding = (left, columns - left, top, rows - top)
        *skips, x = self.stages(F.pad(self.normalize(image), padding))  # 0 is the mean colour
        x = F.relu(self.decoder[0](x))
        for up, convolution in zip(self.decoder[1::2], self.decoder[2::2], strict=True):
            x = F.relu(up(x))
            x = F.relu(convolution(torch.cat([x, skips.pop()], 1) if skips else x))
        return x[..., top : top + height, left : left + width]

    def classify(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,feature_channels,H,W) -> float32 logits (B,K,*size), bilinear where sizes differ."""
        logits = self.classifier(features).float()
        return F.interpolate(logits, size, mode="bilinear") if logits.shape[2:] != size else logits


def network(recipe: Recipe, num_classes: int, pretrained: bool) -> SegmentationResNet:
    """The recipe's network; batch norm keeps its statistics where they were pretrained (D.3.1)."""
    shape = {"layers": recipe.layers, "width": recipe.width}
    shape["batch_norm"] = "frozen" if pretrained else "batch"
    if recipe.network == "unet":
        return UNet(num_classes, **shape)
    return DeepLabV2(num_classes, **shape, rates=recipe.aspp_rates, train_affine=not pretrained)


def draw_aug(recipe: Recipe, batch: int, generator: torch.Generator) -> tuple[Tensor, Callable]:
    """Of the recipe's standard augmentation: a matrix for each image (B,3,3), changes of colour."""
    how = {name: getattr(recipe, name) for name in ("translation", "scaling", "rotation")}
    how |= {"flip": recipe.flip_probability, "generator": generator, "device": generator.device}
    color = {"brightness": recipe.brightness, "contrast": recipe.contrast, "generator": generator}
    return random_affine(batch, **how), partial(recolor, **color)


def unlabeled_loss(recipe: Recipe, student, teacher, fill, a: tuple, b: tuple, *, seed: int):
    """The recipe's perturbation of images (B,3,H,W) with labels (255: padding) -> loss, parts."""
    (image_a, label_a), (image_b, label_b) = a, b
    valid_a, valid_b = label_a != 255, label_b != 255
    kind, (batch, _, *size) = recipe.perturbation, image_a.shape
    generator = torch.Generator(image_a.device).manual_seed(seed)
    networks, threshold = (student, teacher), recipe.confidence_threshold
    if kind == "aug":
        (a, color), (b, _) = (draw_aug(recipe, batch, generator) for _ in "AB")
        return aug_loss(*networks, image_a, a, b, color, fill, valid_a, threshold)
    if kind == "ict":
        beta = np.random.default_rng(seed).beta(recipe.ict_alpha, recipe.ict_alpha, batch)
        blend = torch.tensor(beta, dtype=torch.float32).view(-1, 1, 1, 1)
        blend = blend.to(image_a.device, non_blocking=True)
        combine = partial(torch.lerp, weight=blend)
        return mixing_loss(*networks, image_a, image_b, combine, valid_a & valid_b, threshold)
    draw = {"p_range": recipe.p_range, "generator": generator, "device": image_a.device}
    if kind.startswith("cow"):
        mask = cow_mask(batch, size, sigma_range=recipe.sigma_range, **draw)
    else:
        mask = box_mask(batch, size, **draw)
    if kind.endswith("mix"):
        # The paper's mix(a, b, M) is (1 - M) a + M b (3.3).
        combined = image_a, image_b, lambda a, b: mix(mask, b, a), mix(mask, valid_b, valid_a)
        loss, seen = mixing_loss(*networks, *combined, threshold)
    else:
        mask = ~mask if (kind, recipe.cutout_keeps) == ("cutout", "outside") else mask
        loss, seen = cutout_loss(*networks, image_a, mask, fill, valid_a, threshold)
    return loss, {**seen, "mask": mask}


def train(recipe: Recipe, args: argparse.Namespace) -> None:
    """Labeled loss, weighted consistency loss, step, teacher (4.1, D.3.1)."""
    run.check_recipe(recipe, args, smallest_share=1)
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size)
    split = select(data.train, args, batch_size=recipe.batch_size, unlabeled="all")
    torch.manual_seed(args.seed)
    student = network(recipe, data.num_classes, args.weights != "none").to(args.device)
    weights = "of the checkpoint" if args.checkpoint else load_weights(student, args.weights)
    teacher = make_teacher(student, train_mode=recipe.teacher_mode == "train")
    optimizer = torch.optim.Adam(student.parameter_groups(recipe.lr, recipe.head_factor))
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, recipe.iterations, recipe.lr_power)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "schedule": schedule}
    session = run.Run(recipe, args, data, split, state, weights=weights, headline="teacher")
    weak = {"scale_range": recipe.scale_range, "crop": recipe.crop, "flip": recipe.flip}
    transform = scale_crop_flip(**weak, mean=student.mean)
    perturb = partial(unlabeled_loss, recipe, session.student, teacher, student.mean)
    mixes = recipe.perturbation in ("cowmix", "cutmix", "ict")
    batches_l, *batches_u = session.batches(recipe.batch_size, transform, streams=1 + mixes)
    for _ in session.steps():
        sources = (batches_l,) if args.supervised else (batches_l, *batches_u)
        for image_l, label_l, *unlabeled in session.shares(*sources):
            if recipe.perturbation == "aug":  # of labeled images too (D.1.1)
                matrix, color = draw_aug(recipe, len(image_l), session.generator("labeled"))
                grid = warp_grid(matrix, image_l.shape[2:])
                image_l = warp(color(image_l), grid, student.mean)
                label_l = warp_label(label_l, grid)
            with session.forward(last=args.supervised):
                logits_l = session.student(image_l)
            loss_l = cross_entropy(logits_l, label_l)
            (loss_l / args.accumulate).backward()
            session.log(loss_l=loss_l)
            samples = {"labeled": image_l, "truth": label_l, "logits": logits_l.detach()}
            if args.supervised:
                continue
            a, b = unlabeled[:2], unlabeled[-2:]  # two batches, or one
            with session.forward(last=True):
                loss_u, seen = perturb(a, b, seed=session.step_seed("perturbation"))
            (recipe.consistency_weight * loss_u / args.accumulate).backward()
            session.log(loss_u=loss_u, confident=seen.pop("confident"))
            samples.update(unlabeled=a[0], **seen)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, decay=recipe.ema_decay, buffers="average")
        session.evaluate_if_due(samples)


def main() -> None:
    """Flags -> recipe -> train, evaluate or predict."""
    run.main("cowmix", __doc__, RECIPES, network, train, preset)


if __name__ == "__main__":
    main()
