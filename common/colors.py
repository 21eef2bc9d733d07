"""Colour operations on a whole batch; each image has its own parameters.

An operation takes images, float (B,3,H,W) of whole numbers 0-255, and parameters (B,N,1,1). It
equals torchvision's 8-bit operation up to rounding. None makes the CPU wait for the GPU.
"""

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor


def blend(image: Tensor, row: Tensor) -> Tensor:
    """Mixes image and grey: row[:, 0] is the image's weight, row[:, 2:] are those of RGB in grey.

    If row[:, 1] is 1, each pixel has its own grey; if 0, all have the image's mean grey. Three
    weights of 0 give black.
    """
    grey = (row[:, None, 2:, 0, 0] @ image.flatten(2)).view_as(image[:, :1]).floor_()
    target = torch.lerp(grey.mean((2, 3), keepdim=True), grey, row[:, 1:2])
    return target.lerp(image, row[:, :1]).clamp_(0, 255).floor_()


def turn_hue(image: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue, an angle in sixths of a turn: red is 0, green 2, blue 4.

    shift (B,3,1,1) is the turn, plus the angle that moves red, green and blue to 0: 0, 4, 2.
    """
    red, green, blue = image.split(1, 1)
    low, high = image.aminmax(dim=1, keepdim=True)
    spread = (high - low).clamp_(min=1e-4)  # grey has none
    hue = torch.where(high == green, 2 + (blue - red) / spread, 4 + (red - green) / spread)
    hue = torch.where(high == red, (green - blue) / spread, hue)
    distance = ((hue + shift + 3).remainder(6) - 3).abs()  # 0 at a channel's own hue, 3 opposite
    return torch.addcmul(low, spread, (2 - distance).clamp(0, 1)).mul_(255.999 / 255).floor_()


def sharpen(image: Tensor, weight: Tensor) -> Tensor:
    """Mixes all but the border with smooth colours: 5/13 of a pixel and 1/13 of each neighbour."""
    inner = image[..., 1:-1, 1:-1]
    smooth = F.avg_pool2d(image, 3, stride=1).lerp_(inner, 4 / 13).round_()
    inner.copy_(smooth.lerp_(inner, weight).clamp_(0, 255).floor_())
    return image


def look_up(image: Tensor, table: Tensor) -> Tensor:
    """Replaces each colour by the number that the image's table, (B,256,1,1), has for it."""
    return table.flatten(1).gather(1, image.flatten(1).long()).view_as(image)


def stretch(image: Tensor, _) -> Tensor:
    """Stretches the colours of each channel to 0-255, unless all are equal."""
    low, high = (bound[..., None] for bound in image.flatten(2).aminmax(dim=2, keepdim=True))
    spread = (high - low).mul_(1 / 255)
    return torch.where(spread > 0, (image - low).div_(spread).floor_(), image)


def equalize(image: Tensor, _) -> Tensor:
    """TF.equalize. It takes no parameter and does not make the CPU wait for the GPU."""
    return TF.equalize(image.byte()).float()


GREY = (0.2989, 0.587, 0.114)
JITTER = {
    "brightness": lambda factor: (blend, (factor, 0, 0, 0, 0)),
    "contrast": lambda factor: (blend, (factor, 0, *GREY)),
    "saturation": lambda factor: (blend, (factor, 1, *GREY)),
    "hue": lambda turn: (turn_hue, (6 * turn, 6 * turn + 4, 6 * turn + 2)),
}
# One pass allows any order of the jitter: three blends before the hue and three after it.
ORDER = 3 * [blend] + [turn_hue] + 3 * [blend] + [look_up, sharpen, stretch, equalize]


def recolor(image: Tensor, changes: list[list[tuple]]) -> Tensor:
    """Does the changes of each image in their order: float (B,3,H,W), 0-255 -> same."""
    left, rounds, images = [list(todo) for todo in changes], [], dict(enumerate(image))
    while any(left):
        for change in ORDER:  # take all images whose next operation is this one
            chosen = [k for k, todo in enumerate(left) if todo and todo[0][0] is change]
            if chosen:
                rounds.append((change, chosen, [left[k].pop(0)[1] for k in chosen]))
    table = torch.tensor([x for *_, rows in rounds for row in rows for x in row]).float()
    table = table.pin_memory() if image.is_cuda else table  # so that the copy does not wait
    sizes = [len(rows) * len(rows[0]) for *_, rows in rounds]
    table = table.to(image.device, non_blocking=True).split(sizes)
    for (change, chosen, rows), numbers in zip(rounds, table, strict=True):
        batch = torch.stack([images[k] for k in chosen])
        batch = change(batch, numbers.view(len(rows), -1, 1, 1))
        images |= zip(chosen, batch, strict=True)
    return torch.stack(list(images.values()))
