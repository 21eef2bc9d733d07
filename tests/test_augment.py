"""common/augment.py: the geometry of an image and its label."""

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from common.augment import scale_crop_flip, seeded, without_label

MEAN = torch.tensor([0.1, 0.5, 0.8]).view(3, 1, 1)
LABEL = torch.arange(20, dtype=torch.uint8).view(4, 5)
IMAGE = LABEL.expand(3, 4, 5)


def test_crop_pads_with_mean_and_void_and_moves_both_alike():
    transform = scale_crop_flip(crop=(6, 3), flip=True, mean=MEAN)
    flipped, state = 0, torch.random.get_rng_state()
    for seed in range(40):
        image, label = transform(seed, IMAGE, LABEL)
        assert image.shape == (3, 6, 3) and label.shape == (6, 3)
        void = label == 255
        assert void.sum() == 6 and torch.equal(image[:, ~void], label[~void].expand(3, -1))
        assert image[:, void].unique(dim=1).tolist() == [[26], [128], [204]]
        inner = label[~void].view(4, 3).long()
        flipped += int(inner[0, 0] > inner[0, 1])
        hidden_image, padding = without_label(transform, seed, IMAGE, LABEL)
        assert torch.equal(hidden_image, image) and torch.equal(padding, 255 * void.byte())
    assert 10 < flipped < 30 and torch.equal(torch.random.get_rng_state(), state)
    same, _ = scale_crop_flip(crop=None, flip=False, mean=MEAN)(0, IMAGE, LABEL)
    assert torch.equal(same, IMAGE)


def test_scale_stays_in_its_range():
    image, label = torch.zeros(3, 40, 60).byte(), torch.zeros(40, 60).byte()
    transform = scale_crop_flip(scale_range=(0.5, 1.5), crop=(64, 96), flip=False, mean=MEAN)
    labels = [transform(seed, image, label)[1] for seed in range(60)]
    heights = [int((ids != 255).any(1).sum()) for ids in labels]
    assert 20 <= min(heights) < 26 and 54 < max(heights) <= 60


@pytest.mark.parametrize(
    ("size", "crop", "scales"),
    [
        ((64, 128), (32, 64), (1.0,)),
        ((60, 97), (64, 80), (0.75, 1.0, 1.25)),  # with padding
        ((48, 64), (60, 40), (0.5, 1.6)),
        ((75, 110), None, (1.0,)),
    ],
)
def test_rotation_gives_the_pixels_of_torchvision(size, crop, scales):
    """Of the whole image, rotated by torchvision and cropped afterwards, for the same seed."""
    fill = {tv_tensors.Image: [26, 128, 204], tv_tensors.Mask: 255}

    def expected(image, label):
        if len(scales) > 1:
            scale = scales[torch.randint(len(scales), ()).item()]
            new = [round(scale * n) for n in size]
            image, label = TF.resize(image, new), TF.resize(label, new)
        angle = torch.randint(-10, 11, ()).item()
        image = TF.rotate(image, angle, InterpolationMode.BILINEAR)
        label = TF.rotate(label, angle, fill=[255])
        steps = [] if crop is None else [v2.RandomCrop(crop, pad_if_needed=True, fill=fill)]
        return v2.Compose([*steps, v2.RandomHorizontalFlip()])(image, label)

    transform = scale_crop_flip(scales=scales, rotation=10, crop=crop, flip=True, mean=MEAN)
    image, label = torch.randint(256, (3, *size)).byte(), torch.randint(256, size).byte()
    pair = tv_tensors.Image(image), tv_tensors.Mask(label)
    for seed in range(200):
        results = transform(seed, image, label), seeded(expected, seed, *pair)
        for ours, theirs in zip(*results, strict=True):
            assert type(ours) is type(theirs) and torch.equal(ours, theirs)
