"""The losses of classmix.py and complexmix.py against naive loops; test_masks.py has the masks."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import generator
from torch import nn

import classmix
import complexmix
import cowmix


@pytest.mark.parametrize("method", [classmix, cowmix])  # complexmix.py has classmix.py's text
def test_cross_entropy_leaves_void_out(method):
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).repeat(1, 1, 2, 3).requires_grad_()
    label = torch.tensor([[[0, 1, 255], [1, 255, 255]]])  # probabilities 1/4 and 3/4
    loss = method.cross_entropy(logits, label)
    assert loss.item() == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.abs().sum(1) > 0).equal(label != 255)
    loss = method.cross_entropy(logits, torch.full_like(label, 255))
    assert loss == 0 and torch.autograd.grad(loss, logits)[0].eq(0).all()


def small_network(seed):
    """A convolution whose predictions are partly confident."""
    network = nn.Conv2d(3, 4, 3, padding=1)
    for parameter in network.parameters():
        parameter.data = 2 * torch.randn(parameter.shape, generator=generator(seed))
    return network


def mirror(image):
    return 1 - image.flip(-1)  # does not commute with mixing


PIXEL_LOSS = {
    "cross-entropy": lambda logits, prob: F.cross_entropy(logits, prob.argmax(1), reduction="none"),
    "soft-cross-entropy": lambda logits, prob: -(prob * logits.log_softmax(1)).sum(1),
    "squared-error": lambda logits, prob: (logits.softmax(1) - prob).pow(2).sum(1),
}
WEIGHT = {
    "fraction": lambda confident: confident.mean(),
    "fraction sample": lambda confident: confident.mean((1, 2), keepdim=True),
    "pixel": lambda confident: confident,
    "ramp": lambda confident: torch.ones(()),
    "constant": lambda confident: torch.ones(()),
}
LOSSES = [("classmix", *kinds) for kinds in itertools.product(PIXEL_LOSS, WEIGHT)]
LOSSES += [("complexmix", "cross-entropy", name) for name in list(WEIGHT)[:3]]


@pytest.mark.parametrize(("method", "kind", "weighting"), LOSSES)
def test_unlabeled_loss_equals_naive_loss(method, kind, weighting):
    """Algorithm 1 of ClassMix pixel by pixel. A pixel at the threshold is confident."""
    student, teacher, labels = small_network(0), small_network(1), []
    image = torch.rand(3, 3, 6, 5, generator=generator(2))
    mask = torch.rand(3, 6, 5, generator=generator(3)) < 0.4
    prob = teacher(image).softmax(1).detach()
    image_mix, prob_mix = image.clone(), prob.clone()
    for i, y, x in itertools.product(*map(range, mask.shape)):
        if not mask[i, y, x]:
            image_mix[i, :, y, x] = image[(i + 1) % len(image), :, y, x]
            prob_mix[i, :, y, x] = prob[(i + 1) % len(image), :, y, x]
    loss_of = complexmix.complexmix_loss
    if method == "classmix":
        image_mix, loss_of = mirror(image_mix), partial(classmix.classmix_loss, augment=mirror)
        loss_of = partial(loss_of, kind=kind)
    threshold = prob_mix.amax(1).median().item()
    weight = 0.3 * WEIGHT[weighting]((prob_mix.amax(1) >= threshold).float())
    logits = student(image_mix)
    expected = (weight * PIXEL_LOSS[kind](logits, prob_mix)).mean()
    gradient = torch.autograd.grad(expected, list(student.parameters()))
    options = dict(zip(("weighting", "scope"), weighting.split(), strict=False))
    options |= {"make_mask": lambda label: labels.append(label) or mask, "factor": 0.3}
    loss, details = loss_of(student, teacher, image, threshold=threshold, **options)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close([p.grad for p in student.parameters()], list(gradient))
    shown = {"other": image.roll(-1, 0), "pseudo_label": prob.argmax(1), "mask": mask}
    shown |= {"mixed_image": image_mix, "prediction": logits.detach(), "lambda": weight.mean()}
    torch.testing.assert_close(details, shown)
    assert torch.equal(labels[0], details["pseudo_label"])
    assert all(p.grad is None for p in teacher.parameters())  # no gradient reaches the teacher
    assert not any(value.requires_grad for value in details.values())


def test_jitter_and_blur_draw_for_each_image_from_the_seed_alone():
    image = torch.rand(1, 3, 24, 24, generator=generator()).expand(6, -1, -1, -1)
    first = classmix.jitter_and_blur(3, image)
    assert torch.equal(first, classmix.jitter_and_blur(3, image))
    assert not torch.equal(first, classmix.jitter_and_blur(4, image))
    assert len({changed.sum().item() for changed in first}) > 3
    assert first.shape == image.shape and first.min() >= 0 and first.max() <= 1
