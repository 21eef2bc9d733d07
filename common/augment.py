"""Random scaling, rotation, cropping and mirroring of an image together with its label."""

from collections.abc import Callable
from functools import partial

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2


def seeded(transform: Callable, seed: int, *inputs):
    """Returns transform(*inputs) with torch's CPU generator seeded; its state is then restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(*inputs)


def scale_crop_flip(
    *,
    scale_range: tuple[float, float] = (1.0, 1.0),
    scales: tuple[float, ...] = (1.0,),
    rotation: int = 0,
    crop: tuple[int, int] | None,
    flip: bool,
    mean: Tensor,
) -> Callable:
    """Returns transform(seed, image, label): uint8 (3,H,W) and uint8 (H,W) -> the same, cropped.

    The scale is uniform in scale_range, or one of scales. The rotation is a whole number of
    degrees, at most rotation either way; its corners become black, and void in the label. Images
    smaller than the crop (height, width) are padded with mean, (3,1,1) in [0,1], and void.
    """
    color = [round(255 * value) for value in mean.flatten().tolist()]
    steps: list[Callable] = [_as_tv_tensors]
    if scale_range != (1.0, 1.0):
        steps.append(partial(_scale_uniformly, scale_range=scale_range))
    if scales != (1.0,):
        steps.append(partial(_scale_to_one_of, scales=scales))
    if rotation > 0:
        steps.append(partial(_rotate, degrees=rotation))
    if crop is not None:
        fill = {tv_tensors.Image: color, tv_tensors.Mask: 255}
        steps.append(v2.RandomCrop(crop, pad_if_needed=True, fill=fill))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return partial(seeded, v2.Compose(steps))


def without_label(transform: Callable) -> Callable:
    """The same transform with a padding mask for a label: 255 where it pads, 0 elsewhere."""
    return partial(_hide_label, transform)


def _hide_label(transform: Callable, seed: int, image: Tensor, label: Tensor):
    return transform(seed, image, torch.zeros_like(label))


def _as_tv_tensors(image: Tensor, label: Tensor):
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def _scale_uniformly(image: Tensor, label: Tensor, scale_range: tuple[float, float]):
    return _resize(image, label, torch.empty(()).uniform_(*scale_range).item())


def _scale_to_one_of(image: Tensor, label: Tensor, scales: tuple[float, ...]):
    return _resize(image, label, scales[torch.randint(len(scales), ()).item()])


def _resize(image: Tensor, label: Tensor, scale: float):
    size = [max(1, round(scale * n)) for n in label.shape[-2:]]
    return TF.resize(image, size, antialias=True), TF.resize(label, size)


def _rotate(image: Tensor, label: Tensor, degrees: int):
    angle = torch.randint(-degrees, degrees + 1, ()).item()
    if angle == 0:
        return image, label
    return TF.rotate(image, angle, InterpolationMode.BILINEAR), TF.rotate(label, angle, fill=[255])
