"""Random changes of images, on top of torchvision.transforms.v2, repeatable for a seed."""

from collections.abc import Callable
from functools import partial

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from common import InputError


def _seeded(transform: Callable, seed: int, *inputs):
    """transform(*inputs) with torch's host randomness started from seed, and left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(*inputs)


def scale_crop_flip(
    *, scale_range: tuple, crop: tuple | None, flip: bool, mean: Tensor
) -> Callable:
    """A loader's transform(seed, image, label): uint8 (3,H,W), (H,W) -> the same, changed alike.

    The scale is uniform in scale_range, the place of the crop (height, width) too; where an image
    is smaller than the crop, it is padded with mean, (3,1,1) in [0,1], and void (255).
    """
    color = [round(255 * value) for value in mean.flatten().tolist()]
    fill = {tv_tensors.Image: color, tv_tensors.Mask: 255}
    steps = [_typed]
    if scale_range != (1.0, 1.0) and crop is None:
        raise InputError("--scale-range: needs --crop, as scaled images differ in size")
    if scale_range != (1.0, 1.0):
        steps.append(partial(_scale, scale_range=scale_range))
    if crop is not None:
        steps.append(v2.RandomCrop(crop, pad_if_needed=True, fill=fill))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return partial(_seeded, v2.Compose(steps))


def _typed(image: Tensor, label: Tensor):
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def _scale(image: Tensor, label: Tensor, scale_range: tuple[float, float]):
    scale = torch.empty(()).uniform_(*scale_range).item()
    size = [max(1, round(scale * n)) for n in label.shape[-2:]]
    return TF.resize(image, size, antialias=True), TF.resize(label, size)


def jitter_and_blur(
    jitter: float, jitter_probability: float, sigma: tuple[float, float], blur_probability: float
) -> Callable:
    """augment(seed, image), float (B,3,H,W) in [0,1] -> the same: jitter, then blur, each anew.

    jitter is torchvision's strength of brightness, contrast, saturation, hue (0.5 at most);
    sigma (pixels) is a range, whose upper end the blur's kernel exceeds fourfold.
    """
    kernel = 2 * int(4 * sigma[1] + 1) + 1
    color = v2.RandomApply([v2.ColorJitter(*[jitter] * 3, min(jitter, 0.5))], jitter_probability)
    change = v2.Compose([color, v2.RandomApply([v2.GaussianBlur(kernel, sigma)], blur_probability)])
    return partial(_seeded, lambda image: torch.stack([change(single) for single in image]))
