"""Random scaling, rotation, cropping and mirroring of an image together with its label."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


def seeded(transform: Callable, seed: int, *inputs):
    """Returns transform(*inputs) with torch's CPU generator seeded; its state is then restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(*inputs)


def scale_crop_flip(
    *, scale_range=(1.0, 1.0), scales=(1.0,), rotation=0, crop, flip: bool, mean: Tensor
) -> Callable:
    """Returns transform(seed, image, label): uint8 (3,H,W) and uint8 (H,W) -> the same, cropped.

    The scale is uniform in scale_range, or one of scales. The rotation is a whole number of
    degrees, at most rotation either way; its corners become black, and void in the label. Images
    smaller than the crop (height, width) are padded with mean, (3,1,1) in [0,1], and void.
    """
    steps: list[Callable] = [_as_tv_tensors]
    if scale_range != (1.0, 1.0) or scales != (1.0,):
        steps.append(partial(_scale, scale_range, scales))
    color = mean.cpu().double().mul(255).round().byte()  # images are loaded on the host
    if rotation > 0:
        steps.append(partial(_rotate_crop, rotation, crop, color))
    elif crop is not None:
        fill = {tv_tensors.Image: color.flatten().tolist(), tv_tensors.Mask: 255}
        steps.append(v2.RandomCrop(crop, pad_if_needed=True, fill=fill))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return partial(seeded, v2.Compose(steps))


def without_label(transform: Callable, seed: int, image: Tensor, label: Tensor):
    """Transforms an image. Its label becomes a padding mask: 255 where it is padded, else 0."""
    return transform(seed, image, torch.zeros_like(label))


def _as_tv_tensors(image: Tensor, label: Tensor):
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def _scale(scale_range, scales, image: Tensor, label: Tensor):
    if scales == (1.0,):
        scale = torch.empty(()).uniform_(*scale_range).item()
    else:
        scale = scales[torch.randint(len(scales), ()).item()]
    size = [max(1, round(scale * n)) for n in label.shape]
    return TF.resize(image, size), TF.resize(label, size)


def _rotate_crop(degrees: int, crop, color: Tensor, image: Tensor, label: Tensor):
    """Gives the pixels of torchvision's rotate and then RandomCrop, but rotates only the crop."""
    angle = math.radians(torch.randint(-degrees, degrees + 1, ()).item())
    height, width = label.shape
    y, x = (torch.arange(n) - (n - 1) / 2 for n in label.shape)  # from the centre
    source = [tv_tensors.Image(v.unsqueeze(0)) for v in torch.meshgrid(x, y, indexing="xy")]
    far = height + width  # outside of the image: in padding
    if crop is not None:
        source = v2.RandomCrop(crop, pad_if_needed=True, fill=far)(source)
    matrix = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    matrix = matrix / torch.tensor([width / 2, height / 2])
    grid = torch.cat(source).movedim(0, -1).unsqueeze(0) @ matrix  # as grid_sample has it
    image = F.grid_sample(image.unsqueeze(0).float(), grid, align_corners=False)[0]
    image = torch.where(source[0] == far, color, image.round().byte())
    shifted = label.view(1, 1, height, width).float() - 255  # grid_sample puts 0 outside: void
    label = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)[0, 0] + 255
    return _as_tv_tensors(image, label.byte())
