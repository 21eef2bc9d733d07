"""Changes of colours, each with its own numbers for each image, for all images at once.

A change takes whole colours 0-255, float (B,3,H,W), and numbers (B,N,1,1). Up to rounding it is
torchvision's change of 8-bit colours. None waits for the device.
"""

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor


def blend(image: Tensor, row: Tensor) -> Tensor:
    """Mixes image and grey: row[:, 0] is the image's weight, row[:, 2:] are those of RGB in grey.

    Where row[:, 1] is 1, grey is that of each pixel, else the mean. Three weights of 0: black.
    """
    grey = (row[:, None, 2:, 0, 0] @ image.flatten(2)).view_as(image[:, :1]).floor_()
    target = torch.lerp(grey.mean((2, 3), keepdim=True), grey, row[:, 1:2])
    return target.lerp(image, row[:, :1]).clamp_(0, 255).floor_()


def turn_hue(image: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue, an angle: red is at 0, green at 2, blue at 4 sixths of a turn.

    A channel is largest within a sixth of its own angle and smallest opposite to it. shift: the
    turn plus the angle between red and the point opposite to red, green and blue.
    """
    red, green, blue = image.split(1, 1)
    low, high = image.aminmax(dim=1, keepdim=True)
    spread = (high - low).clamp_(min=1e-4)  # grey has none
    angle = (green + blue).sub_(red).sub_(low).div_(spread).add_(1)  # sixths of a turn from red
    angle.copysign_(green - blue)  # to green or to blue
    share = (angle + shift).remainder_(6).sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(low - spread, spread, share).mul_(255.999 / 255).floor_()


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
    """TF.equalize, which neither waits nor has numbers."""
    return TF.equalize(image.byte()).float()


GREY = (0.2989, 0.587, 0.114)
JITTER = {
    "brightness": lambda factor: (blend, (factor, 0, 0, 0, 0)),
    "contrast": lambda factor: (blend, (factor, 0, *GREY)),
    "saturation": lambda factor: (blend, (factor, 1, *GREY)),
    "hue": lambda turn: (turn_hue, (6 * turn, 6 * turn + 4, 6 * turn + 2)),
}
# Three blends before or after the hue make room for each order of the jitter.
ORDER = 3 * [blend] + [turn_hue] + 3 * [blend] + [look_up, sharpen, stretch, equalize]


def recolor(image: Tensor, changes: list[list[tuple]]) -> Tensor:
    """Does the changes of each image in their order: float (B,3,H,W), 0-255 -> same."""
    left, rounds, images = [list(own) for own in changes], [], dict(enumerate(image))
    while any(left):
        for change in ORDER:  # images for which it is the next one do it together
            chosen = [k for k, own in enumerate(left) if own and own[0][0] is change]
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
