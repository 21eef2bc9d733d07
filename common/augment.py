"""Random changes of images, on top of torchvision.transforms.v2, repeatable for a seed."""

from collections.abc import Callable
from functools import partial

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2


def _seeded(transform: Callable, seed: int, *inputs):
    """transform(*inputs) with torch's host randomness started from seed, and left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(*inputs)


def scale_crop_flip(
    *,
    scale_range: tuple = (1.0, 1.0),
    scales: tuple = (1.0,),
    rotation: int = 0,
    rotate_last: bool = False,
    crop: tuple | None,
    flip: bool,
    mean: Tensor,
) -> Callable:
    """A loader's transform(seed, image, label): uint8 (3,H,W), (H,W) -> the same, changed alike.

    The scale is uniform in scale_range, or one of scales; rotation by whole degrees up to rotation
    either way, before the crop or with rotate_last at the end, leaves black corners, void in the
    label; the place of the crop (height, width) is uniform; where an image is smaller than it, it
    is padded with mean, (3,1,1) in [0,1], and void.
    """
    color = [round(255 * value) for value in mean.flatten().tolist()]
    fill = {tv_tensors.Image: color, tv_tensors.Mask: 255}
    steps = [_typed]
    if scale_range != (1.0, 1.0):
        steps.append(partial(_scale, scale_range=scale_range))
    if scales != (1.0,):
        steps.append(partial(_scale_to_one_of, scales=scales))
    rotate = [partial(_rotate, degrees=rotation)] * (rotation > 0)
    steps += rotate * (not rotate_last)
    if crop is not None:
        steps.append(v2.RandomCrop(crop, pad_if_needed=True, fill=fill))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    steps += rotate * rotate_last
    return partial(_seeded, v2.Compose(steps))


def without_label(transform: Callable) -> Callable:
    """transform with a label that is void where it pads the image, else 0."""
    return partial(_change, transform)


def _change(transform: Callable, seed: int, image: Tensor, label: Tensor):
    return transform(seed, image, torch.zeros_like(label))


def _typed(image: Tensor, label: Tensor):
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def _scale(image: Tensor, label: Tensor, scale_range: tuple[float, float]):
    return _resize(image, label, torch.empty(()).uniform_(*scale_range).item())


def _scale_to_one_of(image: Tensor, label: Tensor, scales: tuple[float, ...]):
    return _resize(image, label, scales[torch.randint(len(scales), ()).item()])


def _resize(image: Tensor, label: Tensor, scale: float):
    size = [max(1, round(scale * n)) for n in label.shape[-2:]]
    return TF.resize(image, size, antialias=True), TF.resize(label, size)


def _rotate(image: Tensor, label: Tensor, degrees: int):
    """About the centre, the image bilinearly; corners become black and void."""
    angle = torch.randint(-degrees, degrees + 1, ()).item()
    if angle == 0:
        return image, label
    return TF.rotate(image, angle, InterpolationMode.BILINEAR), TF.rotate(label, angle, fill=[255])


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


def randaugment(
    view: str, jitter: float, hue: float, operations: int, probability: float, magnitude: float
) -> Callable:
    """augment(seed, image), float (B,3,H,W) in [0,1] -> the same: jitter, RandAugment's colours.

    A "weak" view has neither, "jitter" the first, "strong" both. jitter is torchvision's strength
    of brightness, contrast and saturation, hue that of hue (0.5 at most). Each image draws its
    operations from OPERATIONS, with replacement; each is done with probability, at a magnitude
    normal around the one given (standard deviation 0.5), within 0 and 10. 8-bit, as with PIL.
    """
    if view == "weak":
        return lambda _, image: image
    color = v2.ColorJitter(jitter, jitter, jitter, min(hue, 0.5))
    count = operations if view == "strong" else 0
    draw = partial(_draw_operations, count, probability, magnitude)

    def change(image: Tensor) -> Tensor:
        images = [color(single) for single in image.mul(255).round().byte()]
        # torchvision takes one strength for a whole batch, but each image has drawn its own.
        for row, drawn in enumerate([draw() for _ in images]):
            for name, level in drawn:
                images[row] = OPERATIONS[name](images[row], level)
        return torch.stack(images).float().div(255)

    return partial(_seeded, change)


def _draw_operations(operations: int, probability: float, magnitude: float) -> list:
    """What is done to an image: names of operations and their magnitudes in [0,1]."""
    drawn = []
    for _ in range(operations):
        name = list(OPERATIONS)[torch.randint(len(OPERATIONS), ()).item()]
        level = min(max(magnitude + 0.5 * torch.randn(()).item(), 0.0), 10.0) / 10
        drawn += [(name, level)] * (torch.rand(()).item() < probability)
    return drawn


def _solarize(image: Tensor, level: float) -> Tensor:
    return torch.where(image.int() >= int(256 * level), 255 - image, image)  # 256: none


def _solarize_add(image: Tensor, level: float) -> Tensor:
    return torch.where(image < 128, image + int(110 * level), image)


# Colour operations of RandAugment (Cubuk et al. 2020) by name: uint8 (B,3,H,W), r in [0,1] -> same.
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "auto-contrast": lambda image, _: TF.autocontrast(image),
    "equalize": lambda image, _: TF.equalize(image),
    "invert": lambda image, _: TF.invert(image),
    "posterize": lambda image, r: TF.posterize(image, int(4 * r)),  # bits kept
    "solarize": _solarize,
    "solarize-add": _solarize_add,
    "color": lambda image, r: TF.adjust_saturation(image, 1.8 * r + 0.1),
    "contrast": lambda image, r: TF.adjust_contrast(image, 1.8 * r + 0.1),
    "brightness": lambda image, r: TF.adjust_brightness(image, 1.8 * r + 0.1),
    "sharpness": lambda image, r: TF.adjust_sharpness(image, 1.8 * r + 0.1),
}
