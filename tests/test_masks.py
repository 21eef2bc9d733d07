"""The masks of all methods against naive loops, scipy and the laws of what they draw."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import generator
from scipy.fft import idctn
from scipy.ndimage import gaussian_filter
from scipy.special import erfinv
from scipy.stats import kstest

import c3semiseg
import classmix
import cowmix
from complexmix import complex_mask
from cowmix import box_mask, cow_mask


def naive_complex_mask(label, num_classes, p, classes, scores):
    """Block by block and pixel by pixel, with blocks cut at exact fractions of the sides."""
    mask = torch.zeros(label.shape, dtype=torch.bool)
    batch, height, width = label.shape
    for b, y, x in itertools.product(range(batch), range(p), range(p)):
        rows = [i for i in range(height) if y <= i * p / height < y + 1]
        columns = [j for j in range(width) if x <= j * p / width < x + 1]
        ids = {int(label[b, i, j]) for i in rows for j in columns} & set(range(num_classes))
        candidates = ids if classes == "present" else range(num_classes)
        ranked = sorted(candidates, key=lambda c: scores[b, y * p + x, c])
        for i, j in itertools.product(rows, columns):
            mask[b, i, j] = int(label[b, i, j]) in ranked[: len(ranked) // 2]
    return mask


def any_label(batch, num_classes, size):
    """Random classes, void and ids that are no class."""
    label = torch.randint(-1, num_classes + 2, (batch, *size), generator=generator())
    return label.masked_fill(label == num_classes + 1, 255)


@pytest.mark.parametrize("classes", ["all", "present"])
@pytest.mark.parametrize(
    ("batch", "num_classes", "size", "blocks", "p"),
    [
        (2, 19, (16, 32), 4, 4),
        (3, 7, (13, 22), 5, 5),
        (2, 4, (5, 9), 8, 5),  # p at most the shorter side
        (2, 2, (9, 3), 128, 3),
        (4, 5, (6, 8), 1, 1),
        (1, 3, (16, 28), 14, 14),  # float32 would round 8 / (16 / 14) down
        (1, 1, (4, 4), 2, 2),
    ],
)
def test_complex_mask_equals_naive_loop(batch, num_classes, size, blocks, p, classes):
    label = any_label(batch, num_classes, size)
    scores = torch.rand(batch, p * p, num_classes, generator=generator(1))
    expected = naive_complex_mask(label, num_classes, p, classes, scores)
    given = partial(complex_mask, label, num_classes, blocks, classes=classes)
    rng = generator(2)
    assert torch.equal(given(scores=scores, generator=rng), expected)
    assert torch.equal(rng.get_state(), generator(2).get_state())  # nothing is drawn
    assert torch.equal(given(generator=generator(1)), expected)  # these scores are drawn
    assert expected.any() == (num_classes > 1) and not expected[(label < 0) | (label == 255)].any()


@pytest.mark.parametrize("num_classes", [1, 2, 7, 19])
def test_class_mask_is_complex_mask_of_one_block(num_classes):
    label = any_label(16, num_classes, (3, 5))
    label[0], label[1] = 255, 0  # no class, and a single one
    scores = torch.rand(16, num_classes, generator=generator(1))
    expected = complex_mask(label, num_classes, 1, classes="present", scores=scores.unsqueeze(1))
    given = partial(classmix.class_mask, label, num_classes)
    rng = generator(2)
    assert torch.equal(given(scores=scores, generator=rng), expected)
    assert torch.equal(rng.get_state(), generator(2).get_state())  # nothing is drawn
    assert torch.equal(given(generator=generator(1)), expected)  # these scores are drawn


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [(48, 80), (7, 33)])  # the second is smaller than the kernels
def test_cow_mask_equals_listing_1_on_the_same_noise(size, p):
    noise, sigma = torch.randn(4, *size, generator=generator()), torch.tensor([1.0, 2.3, 7.9, 16])
    given = {"noise": noise, "sigma": sigma, "sigma_range": (1.0, 16.0), "p_range": (p, p)}
    mask = cow_mask(4, size, **given, generator=generator(1))
    assert mask.dtype == torch.bool and mask.shape == (4, *size)
    for single, n, s in zip(mask.numpy(), noise.double().numpy(), sigma.tolist(), strict=True):
        smooth = gaussian_filter(n, s)
        threshold = erfinv(p * 2 - 1) * 2**0.5 * smooth.std() + smooth.mean()
        sure = np.abs(smooth - threshold) > 1e-5 * smooth.std()  # beyond float32's rounding
        assert (single == (smooth > threshold))[sure].all() and sure.mean() > 0.999


def test_cow_mask_draws_a_log_uniform_sigma_and_noise_for_each_mask():
    rng, options = generator(), {"sigma_range": (4.0, 16.0)}
    sigma, _ = 4 * 4 ** torch.rand(50, generator=rng), torch.rand(50, generator=rng)  # p is second
    noise = torch.randn(50, 32, 40, generator=rng)
    expected = cow_mask(50, (32, 40), sigma=sigma, noise=noise, **options)
    mask = cow_mask(50, (32, 40), generator=generator(), **options)
    assert (mask ^ expected).double().mean() < 1e-4


def test_classmix_s_cow_mask_equals_scipy_on_the_same_draws():
    """The cosine transform of white noise is white noise. The mask draws only its long waves."""
    size, low, high, rng = (40, 56), 3.0, 6.0, generator()
    mask = classmix.cow_mask(6, size, sigma_range=(low, high), generator=generator())
    assert mask.dtype == torch.bool and mask.shape == (6, *size)
    sigma = low * (high / low) ** torch.rand(6, generator=rng)  # drawn before the noise
    drawn, waves = torch.randn(6, 27, 38, generator=rng), torch.randn(6, *size)
    waves[:, :27, :38] = drawn
    for single, wave, s in zip(mask, waves.numpy(), sigma, strict=True):
        smooth = gaussian_filter(idctn(wave, norm="ortho"), float(s), mode="reflect")
        assert (single ^ torch.from_numpy(smooth > smooth.mean())).double().mean() < 0.003


def test_p_is_the_share_of_false_in_cow_masks_and_of_true_in_boxes():
    cow = partial(cow_mask, sigma_range=(1.0, 1.0))
    for draw, wanted in ((cow, False), (box_mask, True)):
        mask = draw(800, (64, 64), p_range=(0.2, 0.6), generator=generator())
        share = (mask == wanted).double().mean((1, 2)).numpy()
        assert kstest(share, "uniform", args=(0.2, 0.4)).statistic < 0.07


def cut_box(*shape, generator):
    return ~classmix.cut_mask(*shape, generator=generator)  # False inside


BOXES = {  # what draws a box, and what is uniform in it, by its shares of height and width
    "cowmix": (cowmix.box_mask, lambda height, width: -torch.log2(height)),
    "classmix": (cut_box, lambda height, width: 2 * width - 1),
    "c3semiseg": (c3semiseg.box_mask, lambda height, width: -torch.log2(height)),
}


@pytest.mark.parametrize("method", BOXES)
def test_a_box_is_a_rectangle_of_half_of_the_area_anywhere(method):
    draw, uniform = BOXES[method]
    box, again = (draw(2000, (128, 192), generator=generator()) for _ in range(2))
    assert box.dtype == torch.bool and torch.equal(box, again)
    sides = box.any(2), box.any(1)
    assert torch.equal(box, sides[0].unsqueeze(2) & sides[1].unsqueeze(1))
    assert (box.double().mean((1, 2)) - 0.5).abs().max() < 0.006
    places, lengths = [], [side.sum(1) for side in sides]
    for side, length in zip(sides, lengths, strict=True):
        assert (F.pad(side.long(), (1, 1)).diff(dim=1).abs().sum(1) == 2).all()  # in one piece
        places.append(side.long().argmax(1) / (side.shape[1] - length))
        wide = side.shape[1] - length > 16  # pixels of freedom
        assert kstest(places[-1][wide].numpy(), "uniform").statistic < 0.07
    assert abs(torch.stack(places).nan_to_num(0.5).corrcoef()[0, 1]) < 0.08
    assert kstest(uniform(lengths[0] / 128, lengths[1] / 192).numpy(), "uniform").statistic < 0.05
