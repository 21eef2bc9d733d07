"""common/augment.py: the geometry of an image and its label."""

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from common.augment import scale_crop_flip, seeded, without_label

MEAN = torch.tensor([0.1, 0.5, 0.8]).view(3, 1, 1)
CASES = [  # height and width of the image, the crop, other options
    ((64, 128), (32, 64), {"rotation": 10}),
    ((60, 97), (64, 80), {"rotation": 10, "scales": (0.75, 1.0, 1.25)}),  # with padding
    ((48, 64), (60, 40), {"rotation": 10, "scales": (0.5, 1.6)}),
    ((75, 110), None, {"rotation": 10}),
    ((40, 60), (64, 48), {"scale_range": (0.5, 1.5)}),
    ((40, 50), (60, 30), {"flip": False}),
    ((40, 50), None, {"flip": False}),
]


@pytest.mark.parametrize(("size", "crop", "options"), CASES)
def test_pixels_are_those_of_torchvision(size, crop, options):
    """Of the whole image, scaled and rotated by torchvision and cropped afterwards, by seed."""
    fill = {tv_tensors.Image: [26, 128, 204], tv_tensors.Mask: 255}
    options = {"flip": True, **options}

    def expected(image, label):
        if scales := options.get("scales"):
            scale = scales[torch.randint(len(scales), ()).item()]
        elif "scale_range" in options:
            scale = torch.empty(()).uniform_(*options["scale_range"]).item()
        else:
            scale = 1
        new = [round(scale * n) for n in size]
        image, label = TF.resize(image, new), TF.resize(label, new)
        if "rotation" in options:
            angle = torch.randint(-10, 11, ()).item()
            image = TF.rotate(image, angle, InterpolationMode.BILINEAR)
            label = TF.rotate(label, angle, fill=[255])
        steps = [] if crop is None else [v2.RandomCrop(crop, pad_if_needed=True, fill=fill)]
        return v2.Compose([*steps, v2.RandomHorizontalFlip(options["flip"] / 2)])(image, label)

    transform = scale_crop_flip(crop=crop, mean=MEAN, **options)
    image, label = torch.randint(256, (3, *size)).byte(), torch.randint(255, size).byte()
    pair, state = (tv_tensors.Image(image), tv_tensors.Mask(label)), torch.random.get_rng_state()
    for seed in range(200):
        results = transform(seed, image, label), seeded(expected, seed, *pair)
        for ours, theirs in zip(*results, strict=True):
            assert type(ours) is type(theirs) and torch.equal(ours, theirs)
        hidden, padding = without_label(transform, seed, image, label)
        found, moved = results[0]
        assert torch.equal(hidden, found) and torch.equal(padding, 255 * (moved == 255).byte())
    assert torch.equal(torch.random.get_rng_state(), state)
