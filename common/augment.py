"""Geometry for the loader's single images, colour for batches on the device."""

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode


def scale_crop_flip(
    image: Tensor,
    label: Tensor,
    rng: np.random.Generator,
    *,
    scale_range: tuple[float, float],
    crop: tuple[int, int] | None,
    flip: bool,
    fill: list[int],
) -> tuple[Tensor, Tensor]:
    """Random scale, crop and mirror image, jointly: (3,H,W) and (H,W) uint8 -> the same.

    The scale is uniform in scale_range; images smaller than crop (height, width; None: the image's
    own size) are padded right and below with fill (the network's mean colour) and void (255); the
    crop's place is uniform.
    """
    crop = crop or label.shape
    if scale_range != (1.0, 1.0):
        scale = rng.uniform(*scale_range)
        size = [max(1, round(n * scale)) for n in label.shape]
        image = TF.resize(image, size, InterpolationMode.BILINEAR, antialias=True)
        label = TF.resize(label[None], size, InterpolationMode.NEAREST_EXACT)[0]
    image, label = _crop(image, label, crop, fill, rng)
    if flip and rng.random() < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    return image, label


def _crop(image, label, crop, fill, rng):
    padded = [max(n, c) for n, c in zip(label.shape, crop, strict=True)]
    if padded != list(label.shape):
        canvas = torch.tensor(fill, dtype=image.dtype).view(3, 1, 1).repeat(1, *padded)
        canvas[:, : label.shape[0], : label.shape[1]] = image
        void = torch.full(padded, 255, dtype=label.dtype)
        void[: label.shape[0], : label.shape[1]] = label
        image, label = canvas, void
    top, left = (int(rng.integers(p - c + 1)) for p, c in zip(padded, crop, strict=True))
    window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
    return image[window], label[window]


def color_jitter(
    image: Tensor, strength: float, probability: float, rng: np.random.Generator
) -> Tensor:
    """Brightness, contrast, saturation and hue in random order, (B,3,H,W) in [0,1] -> the same.

    As torchvision's ColorJitter with one strength for all four (hue: share of a turn), each image
    with its own draw, and left alone with 1 - probability. The draws are on the host, because
    torchvision's functions take one factor for all that they are given.
    """
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    jittered = []
    for single in image:
        if rng.random() < probability:
            factors = rng.uniform(max(0, 1 - strength), 1 + strength, size=4)
            factors[3] = rng.uniform(-min(strength, 0.5), min(strength, 0.5))
            for k in rng.permutation(4):
                single = changes[k](single, float(factors[k]))
        jittered.append(single)
    return torch.stack(jittered)


def gaussian_blur(
    image: Tensor,
    sigma_range: tuple[float, float],
    probability: float,
    rng: np.random.Generator,
) -> Tensor:
    """Blur each image with a sigma (pixels) uniform in sigma_range: (B,3,H,W) -> the same.

    An image is left alone with 1 - probability. The kernel reaches four sigma.
    """
    kernel = 2 * int(np.ceil(4 * sigma_range[1])) + 1
    blurred = []
    for single in image:
        if rng.random() < probability:
            single = TF.gaussian_blur(single, [kernel] * 2, [float(rng.uniform(*sigma_range))] * 2)
        blurred.append(single)
    return torch.stack(blurred)
