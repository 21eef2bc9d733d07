"""CowMix (French et al.; ICLR 2020 submission; arXiv:1906.01916, before it became the BMVC paper).

A mean teacher labels two unlabeled images. The student sees a mix of the two and learns to predict
the same mix of the teacher's probabilities. The mask is smooth noise, thresholded, with spots like
those of a Friesian cow.

    cow_mask                 section 3.4, listing 1 (M = 1 is True)
    box_mask                 the rectangle of section 3.3
    mix                      mix(a, b, M) of section 3.3 is mix(M, b, a) here
    cross_entropy            supervised loss (section 4.1)
    consistency_loss         squared distance (3.3), weighted by confident_fraction (D.3.4)
    mixing_loss              CowMix, CutMix: equation 2, listing 3; ICT: section 2.2
    cutout_loss              CowOut, CutOut: section 3.3, listing 2
    random_affine, recolor   standard augmentation (D.1)
    aug_loss                 A B^-1 aligns the two predictions (D.1.1)
    UNet                     figure 7, table 4

    choice              paper            published code (1)   here          flag
    squared distance    listings: mean   sum over K, weight 1 mean          --consistency-weight K
    confident pixel     > 0.97           >= 0.97              > 0.97
    masked out          0                the mean colour      the mean colour
    boxes               any area (3.3)   CutMix: half         any area      --p-range 0.5 0.5
    student's colours   as the teacher's jittered             as teacher's  --color-jitter
    learning rate       one              two (2)              one           --lr --head-factor
    classifiers         four branches    sums two of them     four          --aspp-rates 6 12
    mirror and scale    -                yes                  no (4)        --flip --scale-range
    Cityscapes          DeepLab: whole   crops, 4 a batch     whole images  --crop 256 512
    epochs of CowOut    300 (D.3.3: 100) -                    300           --iterations 36700
    confidence of ICT   -                blended maxima       maximum of blend
    blend of ICT        -                Beta(0.1, 0.1)       Beta          --ict-alpha
    teacher             -                in train mode (3)    in train mode
    evaluated           -                teacher              both; the teacher is the headline
    aug                 warps (D.1.1)    crops 16 pixels off  warps         --translation
    labeled under aug   warped (D.1.1)   unchanged            recolored and warped
    recolored by aug    + b, times C     -                    C x + b, kept in [0,1]
    scales of aug       a range (D.1)    -                    log-uniform
    0.1 in N(0, 0.1)    -                -                    standard deviation
    padding of crops    -                counts               loss 0, not in the confident share
    U-Net on VOC        batch size 1     -                    as DeepLab    --batch-size
    U-Net's decoder     -                another network      ReLU, no batch norm
    DeepLab's bn        -                frozen               frozen
    weights of DeepLab  COCO             COCO or ImageNet     ImageNet      --weights FILE

(1) Written for a later paper: no cow masks, another U-Net. (2) 3e-6 for the backbone, 3e-5 for the
classifiers. The optimizer steps most of the backbone three times: --lr 9e-6 --head-factor 3.3 comes
close. (3) This matters only with --weights none, as loaded batch norm is frozen. The teacher then
averages the statistics, too. (4) streets: mirrored; --preset small: both. We corrected slips of
the listings: names (yb for xb in listing 3) and max(dim=1) without .values.

    python cowmix.py --dataset camvid --data-dir CamVid --labeled 30
    python cowmix.py --dataset cityscapes --network deeplab --labeled 0.125 --perturbation cutmix

The paper reports 55.06 +- 1.74% mIoU on the test images for the first command (10 subsets).
Measured on streets, teacher: 52.3% with 32 labels, supervised 51.2% (3 seeds; README.md, results/).
"""

from common import InputError, ranks, run  # first: handles Ctrl-C during the other imports

# isort: split
import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torchvision
from torchvision.transforms import v2

from common.augment import scale_crop_flip, seeded, without_label
from common.datasets import open_dataset, select
from common.deeplab import DeepLabV2, SegmentationResNet, load_weights
from common.ema import make_teacher, update_teacher
from common.flags import Count, Positive, Share

Perturbation = Literal["cowmix", "cowout", "cutmix", "cutout", "ict", "aug"]
MIXING = ("cowmix", "cutmix", "ict")  # the perturbations that mix two images
CAMVID = 367  # training images (4.2); one epoch at batch size 1
# On CamVid (table 1); aug and cutmix failed to converge later.
EPOCHS = {"cowmix": 300, "cowout": 300, "cutout": 300, "ict": 300, "aug": 50, "cutmix": 100}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of section 4 and appendix D for CamVid; "code": not in the paper."""

    network: Literal["unet", "deeplab"] = "unet"  # U-Net on ResNet-50, DeepLab on ResNet-101 (4.1)
    perturbation: Perturbation = "cowmix"  # how unlabeled images are changed (table 1)
    size: tuple[Count, Count] | None = (360, 480)  # height and width of resized images, pixels
    crop: tuple[Count, Count] | None = None  # height and width of random crops, pixels (D.3.2)
    scale_range: tuple[Positive, Positive] = (1.0, 1.0)  # random scale before the crop (code)
    flip: bool = False  # mirror images at random (code)
    batch_size: Count = 1  # labeled images in a step, and as many unlabeled ones or pairs (D.3.1)
    iterations: Count = EPOCHS["cowmix"] * CAMVID  # training steps
    lr: float = 1e-4  # learning rate of Adam (D.3.1); the paper's deeplab: 1e-5 (D.3.2)
    lr_power: float = 0.0  # lr is multiplied by (1 - iteration / iterations) ** lr_power (ours)
    head_factor: float = 1.0  # learning rate of decoder or classifiers, as a multiple of lr (code)
    ema_decay: Share = 0.99  # alpha, decay of the teacher (D.3.1)
    consistency_weight: float = 10.0  # factor of the unlabeled loss (4.1, figure 10)
    confidence_threshold: Share = 0.97  # a pixel above this confidence counts (listings 2, 3)
    sigma_range: tuple[Positive, Positive] = (4.0, 16.0)  # blur of cow masks, pixels (4.2)
    p_range: tuple[Share, Share] = (0.5, 0.5)  # p (4.2): share of 0 in cow masks, area of boxes
    ict_alpha: Positive = 0.1  # ICT blends by Beta(alpha, alpha) (code)
    color_jitter: bool = False  # jitter colours of the student's unlabeled images (code: yes)
    flip_probability: Share = 0.5  # share of mirrored images in aug (code)
    translation: float = 4.0  # largest shift in aug, pixels (D.1)
    scaling: tuple[Positive, Positive] = (0.8, 1.25)  # range of scales in aug (D.1)
    rotation: float = 15.0  # largest rotation in aug, degrees (D.1)
    brightness: float = 0.1  # standard deviation of the brightness that aug adds (D.1)
    contrast: Positive = 1.1  # aug multiplies by this to the power of N(0, 1) (D.1)
    layers: tuple[Count, Count, Count, Count] = (3, 4, 6, 3)  # blocks in a stage (4.1)
    width: Count = 64  # channels of the first convolution; the decoder's follow
    aspp_rates: tuple[Count, ...] = (6, 12, 18, 24)  # dilations of deeplab's classifiers


CITYSCAPES = Recipe(size=(512, 1024), iterations=100_000, sigma_range=(8.0, 32.0))
DEEPLAB = {"network": "deeplab", "lr": 1e-5, "layers": (3, 4, 23, 3)}  # (D.3.2)
# Crop and batch size of DeepLab on VOC (D.3.2); steps of the published code.
CROPS = {"size": None, "crop": (321, 321), "batch_size": 10, "iterations": 40_000}
VOC = replace(CITYSCAPES, **CROPS)
SMALL = {"size": (64, 128), "width": 16, "layers": (1, 1, 1, 1), "aspp_rates": (1, 2)}
STREETS = Recipe(network="deeplab", flip=True, batch_size=4, lr=6e-3, lr_power=0.9, **SMALL)
SCALED = {"size": (180, 240), "crop": (120, 160), "scale_range": (0.75, 1.5)}
# The paper trains on camvid (U-Net), cityscapes and voc. bdd100k is as cityscapes but for its size,
# and folder as voc with the U-Net. The numbers of streets and small are ours.
RECIPES = {
    "camvid": Recipe(),
    "cityscapes": CITYSCAPES,
    "voc": replace(VOC, **DEEPLAB),
    "bdd100k": replace(CITYSCAPES, size=(360, 640)),
    "folder": VOC,
    "streets": replace(STREETS, iterations=1_600),
    "small": replace(STREETS, iterations=4_000, **SCALED),  # --preset small
}
CITYSCAPES_DEEPLAB = {"batch_size": 2, "iterations": 40_000, **DEEPLAB}  # (D.3.2; steps: code)
UNET = {"network": "unet", "lr": 1e-4, "layers": (3, 4, 6, 3)}  # (D.3.1)
# Changes to a data set's recipe if --network names the other network.
OTHER_NETWORK = {"camvid": DEEPLAB, "folder": DEEPLAB, "voc": UNET}
OTHER_NETWORK |= {"cityscapes": CITYSCAPES_DEEPLAB, "bdd100k": CITYSCAPES_DEEPLAB}
OTHER_NETWORK |= {"streets": {"network": "unet"}, "small": {"network": "unet"}}


def preset(name: str, given: dict) -> Recipe:
    """Returns the named recipe, changed for --network and --perturbation if given."""
    recipe = RECIPES[name]
    if given.get("network", recipe.network) != recipe.network:
        recipe = replace(recipe, **OTHER_NETWORK[name])
    perturbation = given.get("perturbation", "cowmix")
    if perturbation != "cowmix":
        # Any share p: CowOut (4.2), boxes (3.3).
        recipe = replace(recipe, perturbation=perturbation, p_range=(0.0, 1.0))
        if name == "camvid":
            recipe = replace(recipe, iterations=EPOCHS[perturbation] * CAMVID)
    return recipe


# ---- The method: depends only on torch; copy from here ----

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def log_uniform(bounds: tuple, uniform: Tensor) -> Tensor:
    """Uniform numbers in [0,1] -> log-uniform numbers between the bounds."""
    low, high = math.log(bounds[0]), math.log(bounds[1])
    return (low + (high - low) * uniform).exp()


def gaussian_matrix(n: int, sigma: Tensor, largest: float) -> Tensor:
    """A Gaussian blur of n values as a matrix: sigma (B,), at most largest -> (B,n,n).

    As scipy's gaussian_filter1d: the kernel ends at 4 sigma; edges are mirrored.
    """
    sigma = sigma.view(-1, 1, 1)
    period = 2 * n  # values mirrored at both ends repeat after 2n
    repeats = 1 + int(4 * largest + 0.5) // period
    offset = torch.arange(1 - n, period, device=sigma.device).view(-1, 1)
    repeated = offset + period * torch.arange(-repeats, repeats + 1, device=sigma.device)
    inside = repeated.abs() <= (4 * sigma + 0.5).floor()
    kernel = (torch.exp(-0.5 * (repeated / sigma) ** 2) * inside).sum(-1)
    kernel = kernel / kernel[:, :period].sum(1, keepdim=True)
    j = torch.arange(n, device=sigma.device)
    i = j.view(-1, 1)
    # kernel[:, d + n - 1] has offset d. Value j is at j - i and, mirrored, at j + i + 1.
    return kernel[:, j - i + n - 1] + kernel[:, j + i + n]


def cow_mask(
    batch: int,
    size: tuple,
    *,
    sigma_range: tuple,
    p_range=(0.5, 0.5),
    noise=None,
    sigma=None,
    generator=None,
    device=None,
) -> Tensor:
    """Smoothed noise above T = sqrt(2) erfinv(2p - 1) S_sigma + S_mu (3.4, listing 1).

    Returns bool (batch,*size). p, uniform in p_range, is the expected share of False. Unless given,
    noise (batch,*size) is normal. sigma (batch,), pixels, is log-uniform in sigma_range, or given
    and at most sigma_range[1].
    """
    if sigma is None:
        uniform = torch.rand(batch, generator=generator, device=device)
        sigma = log_uniform(sigma_range, uniform)
    uniform = torch.rand(batch, 1, 1, generator=generator, device=device)
    p = p_range[0] + (p_range[1] - p_range[0]) * uniform
    if noise is None:
        noise = torch.randn(batch, *size, generator=generator, device=device)
    rows = gaussian_matrix(size[0], sigma, sigma_range[1])
    columns = gaussian_matrix(size[1], sigma, sigma_range[1])
    smooth = rows @ noise @ columns  # Ns of the listing; the matrices are symmetric
    mean = smooth.mean((1, 2), keepdim=True)
    deviation = (smooth - mean).square().mean((1, 2), keepdim=True).sqrt()  # std is slow on a CPU
    return smooth > torch.erfinv(2 * p - 1) * 2**0.5 * deviation + mean  # Ns > t


def box_mask(batch: int, size, *, p_range=(0.5, 0.5), generator=None, device=None) -> Tensor:
    """One rectangle in each mask, anywhere in the image (3.3): (B,*size) bool, True inside.

    Its share p of the area is uniform in p_range. Its height is p^u of the image's and its width
    p^(1-u), u uniform in [0,1]. Sizes and places are rounded, as in the published code. The paper
    draws all four numbers of the box and does not say how.
    """
    height, width = size
    uniform = torch.rand(4, batch, 1, 1, generator=generator, device=device)
    p = p_range[0] + (p_range[1] - p_range[0]) * uniform[0]
    box_height = (height * p ** uniform[1]).round()
    box_width = (width * p ** (1 - uniform[1])).round()
    top = ((height - box_height) * uniform[2]).round()
    left = ((width - box_width) * uniform[3]).round()
    row = torch.arange(height, device=device).view(-1, 1)
    column = torch.arange(width, device=device)
    inside_rows = (row >= top) & (row < top + box_height)
    return inside_rows & (column >= left) & (column < left + box_width)


def mix(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the mask is True, else b: (B,H,W) bool, (B,H,W) or (B,C,H,W) twice -> same."""
    return torch.where(mask if a.dim() == mask.dim() else mask.unsqueeze(1), a, b)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over labeled pixels (4.1), 0 if all are void: (B,K,H,W), (B,H,W) -> scalar."""
    total = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return total / (label != ignore_index).sum().clamp(min=1)


def consistency_loss(logits: Tensor, prob: Tensor, fraction: Tensor, valid: Tensor) -> Tensor:
    """Squared distance (3.3) times fraction: float (B,K,H,W) twice, (), bool (B,H,W) -> scalar.

    The mean is over batch, classes and pixels, as in the listings; where valid is False the square
    is 0. fraction, the teacher's confident share, replaces a ramp-up (D.3.4).
    """
    square = (prob - logits.float().softmax(1)).square() * valid.unsqueeze(1)
    return square.mean() * fraction


def confident_fraction(prob: Tensor, threshold: float, valid: Tensor) -> Tensor:
    """Share of the valid pixels with high confidence (D.3.4): (B,K,H,W), (B,H,W) bool -> scalar."""
    return ((prob.amax(1) > threshold) & valid).sum() / valid.sum().clamp(min=1)


def mixing_loss(student, teacher, image_a, image_b, combine, valid, *, threshold, shown=None):
    """Equation 2 as in listing 3: (B,3,H,W) twice, bool (B,H,W) -> scalar, details.

    combine(a, b) is the paper's mix(a, b, M), for images and probabilities. valid is False in
    padding. shown is the pair that the student gets instead, for example recolored.
    """
    with torch.no_grad():
        prob_a = teacher(image_a).float().softmax(1)  # (line 4)
        prob_b = teacher(image_b).float().softmax(1)  # (line 5)
        image_mix = combine(*(shown or (image_a, image_b)))  # (line 7)
        prob_mix = combine(prob_a, prob_b)  # (line 8)
        fraction = confident_fraction(prob_mix, threshold, valid)  # (lines 12, 13)
    logits = student(image_mix)  # (line 10)
    loss = consistency_loss(logits, prob_mix, fraction, valid)  # (line 15)
    details = {"other": image_b, "seen": image_mix, "pseudo_label": prob_mix.argmax(1)}
    return loss, {**details, "prediction": logits.detach(), "confident": fraction}


def cutout_loss(student, teacher, image, mask, fill, valid, *, threshold, shown=None):
    """Section 3.3 as in listing 2: (B,3,H,W), bool (B,H,W) twice -> scalar, details.

    Where the mask is False the student sees fill (3,1,1), the mean colour, which normalises to 0.
    shown is the image that the student gets instead, for example recolored.
    """
    with torch.no_grad():
        prob = teacher(image).float().softmax(1)  # (line 4)
        image_cut = mix(mask, image if shown is None else shown, fill)  # x M (line 6)
        fraction = confident_fraction(prob, threshold, valid)  # (lines 8, 9)
    logits = student(image_cut)  # (line 6)
    loss = consistency_loss(logits, prob, fraction, mask & valid)  # (line 11)
    details = {"seen": image_cut, "pseudo_label": prob.argmax(1), "prediction": logits.detach()}
    return loss, {**details, "confident": fraction}


def random_affine(
    batch: int, *, flip: float, translation, scaling, rotation, generator=None, device=None
) -> Tensor:
    """Mirroring (with probability flip), scaling, rotation and translation of D.1: (B,3,3).

    The matrices map points (x, y, 1), in pixels from the image's centre. translation, in pixels,
    and rotation, in degrees, are the largest ones either way.
    """
    uniform = torch.rand(5, batch, generator=generator, device=device)
    mirror = 1 - 2 * (uniform[0] < flip).float()
    scale = log_uniform(scaling, uniform[1])
    angle = math.radians(rotation) * (2 * uniform[2] - 1)
    x, y = translation * (2 * uniform[3:] - 1)
    zero, cosine, sine = torch.zeros_like(x), scale * angle.cos(), scale * angle.sin()
    entries = (cosine * mirror, -sine, x, sine * mirror, cosine, y, zero, zero, zero + 1)
    return torch.stack(entries, 1).view(batch, 3, 3)  # row by row


def warp_grid(matrix: Tensor, size: tuple) -> Tensor:
    """Where each pixel of a warped image comes from: (B,3,3) of random_affine -> (B,*size,2), x, y.

    The coordinates are grid_sample's (align_corners=False): outside [-1, 1] is outside the image.
    """
    inverse = torch.linalg.inv_ex(matrix)[0]  # inv would wait for the device
    rows, columns = (torch.arange(n, device=matrix.device) + 0.5 - n / 2 for n in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")  # pixels from the centre
    points = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1)  # (H*W,3)
    source = (points @ inverse.transpose(1, 2)).unflatten(1, tuple(size))  # (B,H,W,3)
    return torch.stack([source[..., 0] * 2 / size[1], source[..., 1] * 2 / size[0]], -1)


def warp(image: Tensor, grid: Tensor, fill: Tensor) -> Tensor:
    """Samples an image (B,3,H,W) at a grid (B,H,W,2); outside of it is fill (3,1,1)."""
    return F.grid_sample(image - fill, grid, align_corners=False) + fill


def warp_label(label: Tensor, grid: Tensor) -> Tensor:
    """Samples a label int64 (B,H,W) at a grid (B,H,W,2); outside of it is void (255)."""
    shifted = (label.unsqueeze(1) - 255).float()  # grid_sample puts 0 outside: void
    warped = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)
    return warped.squeeze(1).long() + 255


def recolor(image: Tensor, *, brightness: float, contrast: float, generator=None) -> Tensor:
    """c x + b, clamped to [0,1]; b ~ N(0, brightness), c ~ contrast^N(0, 1) (D.1): (B,3,H,W)."""
    normal = torch.randn(2, len(image), 1, 1, 1, generator=generator, device=image.device)
    return (image * contrast ** normal[0] + brightness * normal[1]).clamp(0, 1)


def aug_loss(student, teacher, image, matrix_a, matrix_b, color, *, fill, valid, threshold):
    """Section D.1.1: (B,3,H,W), (B,3,3) twice, (3,1,1), bool (B,H,W) -> scalar, details.

    color(image) recolors anew at each call. The student sees the image warped by A, the teacher by
    B. A B^-1 brings the teacher's predictions into the student's frame. Only pixels that both see
    count.
    """
    size = image.shape[-2:]
    with torch.no_grad():
        grid_a, grid_b = warp_grid(matrix_a, size), warp_grid(matrix_b, size)
        prob_b = teacher(warp(color(image), grid_b, fill)).float().softmax(1)
        grid = warp_grid(matrix_a @ torch.linalg.inv_ex(matrix_b)[0], size)
        prob = F.grid_sample(prob_b, grid, padding_mode="border", align_corners=False)
        image_a = warp(color(image), grid_a, fill)
        mask = (grid.abs() <= 1).all(-1) & (warp_label(torch.where(valid, 0, 255), grid_a) == 0)
        fraction = confident_fraction(prob, threshold, mask)
    logits = student(image_a)
    details = {"seen": image_a, "pseudo_label": prob.argmax(1), "prediction": logits.detach()}
    loss = consistency_loss(logits, prob, fraction, mask)
    return loss, {**details, "confident": fraction}


# ---- to here ----


class UNet(SegmentationResNet):
    """U-Net of figure 7 and table 4: RGB in [0,1], (B,3,H,W) -> float32 logits (B,K,H,W).

    The interface is DeepLabV2's. layers and width shrink the ResNet (ResNet-50: (3, 4, 6, 3), 64)
    and the decoder. Images are padded with the mean colour to multiples of 32, and cut back.
    """

    imagenet = torchvision.models.ResNet50_Weights.IMAGENET1K_V1

    def __init__(self, num_classes: int, *, layers=(3, 4, 6, 3), width=64, batch_norm="frozen"):
        super().__init__(layers, width, batch_norm, (1, 2, 2, 2), (1, 1, 1, 1), caffe=False)
        channels = [max(1, c * width // 64) for c in (192, 128, 96, 64, 48, 32)]
        joined = (16 * width, 8 * width, 4 * width, 0, 0)  # channels of conv4_x, conv3_x, conv2_x
        self.decoder = nn.ModuleList([nn.Conv2d(32 * width, channels[0], 3, padding=1)])
        for skip, wide, narrow in zip(joined, channels[:-1], channels[1:], strict=True):
            self.decoder.append(nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
            self.decoder.append(nn.Conv2d(narrow + skip, narrow, 3, padding=1))
        self.feature_channels = channels[-1]
        self.classifier = nn.Conv2d(self.feature_channels, num_classes, 1)
        self.initialize(train_affine=True)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as in DeepLabV2

    def features(self, image: Tensor) -> Tensor:
        """RGB in [0,1], (B,3,H,W) -> (B,feature_channels,H,W); normalises first."""
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


def network(recipe: Recipe, num_classes: int, *, pretrained: bool) -> SegmentationResNet:
    """Builds the recipe's network. Pretrained batch norm keeps its statistics (D.3.1)."""
    batch_norm = "frozen" if pretrained else "batch"
    shape = {"layers": recipe.layers, "width": recipe.width, "batch_norm": batch_norm}
    if recipe.network == "unet":
        return UNet(num_classes, **shape)
    return DeepLabV2(num_classes, **shape, rates=recipe.aspp_rates, train_affine=not pretrained)


def draw_mask(recipe: Recipe, batch: int, size: tuple, generator: torch.Generator) -> Tensor:
    """Masks of the recipe's perturbation, cow spots or boxes: bool (batch,*size)."""
    draw = box_mask
    if recipe.perturbation in ("cowmix", "cowout"):
        draw = partial(cow_mask, sigma_range=recipe.sigma_range)
    device = generator.device
    return draw(batch, size, p_range=recipe.p_range, generator=generator, device=device)


def draw_aug(recipe: Recipe, batch: int, generator: torch.Generator) -> tuple[Tensor, Callable]:
    """Standard augmentation (D.1): matrices (batch,3,3), and recolor, which draws at each call."""
    matrix = random_affine(
        batch,
        flip=recipe.flip_probability,
        translation=recipe.translation,
        scaling=recipe.scaling,
        rotation=recipe.rotation,
        generator=generator,
        device=generator.device,
    )
    colors = {"brightness": recipe.brightness, "contrast": recipe.contrast}
    return matrix, partial(recolor, **colors, generator=generator)


def jitter(seed: int, image: Tensor) -> Tensor:
    """Jitters each image with the published code's numbers: float (B,3,H,W) in [0,1] -> same."""
    colors = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    change = v2.Compose([colors, v2.RandomGrayscale(0.2)])
    return seeded(lambda: torch.stack([change(single) for single in image]), seed)


def unlabeled_loss(recipe: Recipe, student, teacher, fill, a: tuple, b: tuple, *, seed: Callable):
    """Loss and details of the recipe's perturbation. seed(purpose) is the seed of a draw.

    a and b hold an image (B,3,H,W) and a padding mask, int64 (B,H,W): 255 where padded, else 0.
    """
    (image_a, padding_a), (image_b, padding_b) = a, b
    valid_a, valid_b = padding_a != 255, padding_b != 255
    kind, threshold = recipe.perturbation, recipe.confidence_threshold
    batch, _, *size = image_a.shape
    generator = torch.Generator(image_a.device).manual_seed(seed("perturbation"))
    if kind == "aug":
        matrix_a, color = draw_aug(recipe, batch, generator)
        matrix_b, _ = draw_aug(recipe, batch, generator)  # color draws anew at each call
        given = image_a, matrix_a, matrix_b, color
        return aug_loss(student, teacher, *given, fill=fill, valid=valid_a, threshold=threshold)
    shown = image_a, image_b
    if recipe.color_jitter:
        shown = jitter(seed("color"), torch.cat(shown)).chunk(2)
    if kind in ("cowout", "cutout"):
        mask = draw_mask(recipe, batch, size, generator)
        given = image_a, mask, fill, valid_a
        loss, details = cutout_loss(student, teacher, *given, threshold=threshold, shown=shown[0])
        return loss, {"mask": mask, **details}
    if kind == "ict":
        beta = np.random.default_rng(seed("perturbation")).beta
        weight = torch.tensor(beta(recipe.ict_alpha, recipe.ict_alpha, batch)).float()
        weight = weight.view(-1, 1, 1, 1).to(image_a.device, non_blocking=True)
        drawn, valid, combine = {}, valid_a & valid_b, partial(torch.lerp, weight=weight)
    else:
        mask = draw_mask(recipe, batch, size, generator)
        drawn, valid = {"mask_b": mask}, mix(mask, valid_b, valid_a)

        def combine(x: Tensor, y: Tensor) -> Tensor:
            """The paper's mix(x, y, M) = (1 - M) x + M y (3.3)."""
            return mix(mask, y, x)

    given = image_a, image_b, combine, valid
    loss, details = mixing_loss(student, teacher, *given, threshold=threshold, shown=shown)
    return loss, {**drawn, **details}


def check(recipe: Recipe, args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together."""
    ranks.check_batch_size(recipe.batch_size, args, accumulate=args.accumulate, least=1)
    if recipe.scale_range != (1.0, 1.0) and recipe.crop is None:
        raise InputError("--scale-range: needs --crop, because scaled images differ in size")
    if recipe.color_jitter and recipe.perturbation == "aug":
        raise InputError("--color-jitter: aug changes colours by --brightness and --contrast")


def train(recipe: Recipe, args: argparse.Namespace, make_session=run.Session) -> None:
    """Minimises both losses (4.1); tests and benchmarks pass a make_session of their own."""
    check(recipe, args)
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size)
    labeled, unlabeled = select(data.train, args, batch_size=recipe.batch_size, unlabeled="all")
    torch.manual_seed(args.seed)
    student = network(recipe, data.num_classes, pretrained=args.weights != "none").to(args.device)
    if args.checkpoint is None:
        print(f"weights: {load_weights(student, args.weights)}")
    teacher = make_teacher(student, train_mode=True)
    groups = student.parameter_groups(recipe.lr, recipe.head_factor)
    optimizer = torch.optim.Adam(groups, fused=student.mean.is_cuda)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, recipe.iterations, recipe.lr_power)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "schedule": schedule}
    session = make_session(recipe, args, data, (labeled, unlabeled), state, headline="teacher")
    start = session.restore()
    fill, scales = student.mean, recipe.scale_range
    transform = scale_crop_flip(scale_range=scales, crop=recipe.crop, flip=recipe.flip, mean=fill)
    batches_l = session.batches(labeled, transform, stream=0, start=start)
    batches_a = session.batches(unlabeled, partial(without_label, transform), stream=1, start=start)
    batches_b = session.batches(unlabeled, partial(without_label, transform), stream=2, start=start)
    student = run.prepare(student, args, train=True)
    teacher = run.prepare(teacher, args, train=False)
    for iteration in range(start, recipe.iterations):
        for micro_batch in session.micro_batches:  # their gradients add up
            seed = partial(ranks.step_seed, args.seed, iteration, micro_batch)
            image_l, label_l = next(batches_l)
            if recipe.perturbation == "aug":  # labeled images too (D.1.1)
                generator = torch.Generator(args.device).manual_seed(seed("labeled"))
                matrix, color = draw_aug(recipe, len(image_l), generator)
                grid = warp_grid(matrix, image_l.shape[2:])
                image_l, label_l = warp(color(image_l), grid, fill), warp_label(label_l, grid)
            logits_l = student(image_l)
            loss_l = cross_entropy(logits_l, label_l)
            (loss_l / args.accumulate).backward()
            session.log({"loss_l": loss_l})
            pictures = {"labeled": image_l, "truth": label_l, "prediction_l": logits_l.detach()}
            if args.supervised:
                continue
            a = next(batches_a)
            b = next(batches_b) if recipe.perturbation in MIXING else a  # the others ignore b
            loss_u, details = unlabeled_loss(recipe, student, teacher, fill, a, b, seed=seed)
            (recipe.consistency_weight * loss_u / args.accumulate).backward()
            session.log({"loss_u": loss_u, "confident": details.pop("confident")})
            pictures = {"labeled": image_l, "truth": label_l, "unlabeled": a[0], **details}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, decay=recipe.ema_decay, buffers="average")
        session.end_step(iteration, pictures)


def main() -> None:
    """Flags -> recipe -> train, evaluate or predict."""
    run.main("cowmix", __doc__, RECIPES, network, train, preset)


if __name__ == "__main__":
    main()
