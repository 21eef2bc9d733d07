"""The method of c3semiseg.py against naive loops, closed forms and the laws of its random parts."""

import ast
import copy
import itertools
import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import c3semiseg
import classmix
from common import augment, run
from common.augment import randaugment, scale_crop_flip

TAU = 0.15


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=generator(seed))


# ---- Cross-set CutMix (equation 4) ----


@pytest.mark.parametrize("size", [(256, 512), (64, 128)])
def test_box_is_one_rectangle_of_half_the_area(size):
    box = c3semiseg.box_mask(200, size, generator=generator())
    assert box.dtype == torch.bool and box.shape == (200, *size)
    rows, columns = box.any(2), box.any(1)
    assert torch.equal(box, rows[:, :, None] & columns[:, None, :])
    for side, length in ((rows, size[0]), (columns, size[1])):  # in one piece
        assert (F.pad(side.long(), (1, 1)).diff(dim=1).abs().sum(1) == 2).all()
        share = side.sum(1) / length
        assert share.min() >= 0.5 and share.max() <= 1
        assert share.min() < 0.53 and share.max() > 0.97
    tolerance = 0.003 if size == (256, 512) else 0.01
    assert (box.double().mean((1, 2)) - 0.5).abs().max() < tolerance
    assert box[:, size[0] // 2, size[1] // 2].all()  # the centre
    assert torch.equal(box, c3semiseg.box_mask(200, size, generator=generator()))


def test_box_heights_are_log_uniform_and_places_uniform():
    box = c3semiseg.box_mask(4000, (64, 64), generator=generator())
    height = box.any(2).sum(1)
    assert abs((height <= 64 * 0.5**0.5).float().mean() - 0.5) < 0.04
    half = box[(height > 40) & (height < 56)]
    top = half.any(2).long().argmax(1) / (64 - half.any(2).sum(1))
    assert abs(top.mean() - 0.5) < 0.03 and (top == 0).any() and (top == 1).any()
    left = half.any(1).long().argmax(1) / (64 - half.any(1).sum(1))
    assert abs(torch.stack([top, left]).corrcoef()[0, 1]) < 0.08


def test_mix_is_classmix_s():
    one, other = (ast.parse(Path(module.__file__).read_text()) for module in (c3semiseg, classmix))
    for name in ("mix", "sigmoid_ramp"):
        texts = []
        for tree in (one, other):
            (function,) = [n for n in tree.body if getattr(n, "name", "") == name]
            texts.append(ast.dump(function.args) + "".join(map(ast.dump, function.body[1:])))
        assert texts[0] == texts[1]


def test_cut_mix_by_hand():
    """Outside the box m = 1: image a; inside b. The second image is the complement."""
    box = torch.tensor([[[False, True, True], [False, True, True]]])
    a, b = torch.arange(1, 7).view(1, 1, 2, 3), -torch.arange(1, 7).view(1, 1, 2, 3)
    first, second = c3semiseg.cut_mix(box, torch.cat([a, b]))
    assert first.tolist() == [[[1, -2, -3], [4, -5, -6]]]
    assert second.tolist() == [[[-1, 2, 3], [-4, 5, 6]]]


@pytest.mark.parametrize("mixing", ["cross", "intra", "none"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_cut_mix_undoes_itself_and_keeps_every_pixel(mixing, n):
    batch = randint(256, 2 * n, 3, 8, 16).float()
    order, box = c3semiseg.draw_pairs(mixing, n, (8, 16), generator=generator(1))
    shuffled = batch[order]
    mixed = c3semiseg.cut_mix(box, shuffled)
    assert torch.equal(sum(mixed.chunk(2)), sum(shuffled.chunk(2)))  # (a)
    assert torch.equal(c3semiseg.cut_mix(box, mixed)[order.argsort()], batch)  # (b), (f)
    assert torch.equal(mixed, shuffled) == (mixing == "none")
    model = nn.Conv2d(3, 5, 1)  # (c)
    undone = c3semiseg.cut_mix(box, model(mixed))[order.argsort()]
    torch.testing.assert_close(undone, model(batch))


def pairs(mixing, n, seed=0):
    order, _ = c3semiseg.draw_pairs(mixing, n, (4, 4), generator=generator(seed))
    return list(zip(*order.view(2, n).tolist(), strict=True))


def test_pairs_of_both_sets_or_of_one():
    """(g): 4 of 7 partners are of the other set."""
    crossing = [(a < 4) != (b < 4) for seed in range(1000) for a, b in pairs("cross", 4, seed)]
    assert abs(sum(crossing) / 4000 - 4 / 7) < 0.03
    assert all((a < 4) == (b < 4) for a, b in pairs("intra", 4))
    assert sum((a < 3) != (b < 3) for a, b in pairs("intra", 3)) == 1
    for mixing in ("cross", "intra"):
        assert sorted(itertools.chain(*pairs(mixing, 4))) == list(range(8))


# ---- Asymmetric augmentation (section 3.2) ----


def test_weak_view_is_bit_exact():
    image = randint(256, 3, 3, 16, 24).float() / 255
    for view, jitter, probability in (("weak", 0.5, 1), ("jitter", 0.0, 1), ("strong", 0.0, 0)):
        off = randaugment(view, jitter, jitter / 2, 2, probability, 10.0)
        assert torch.equal(off(3, image), image)  # (h)


def test_strong_view_changes_colour_alone():
    """(i): what has one colour keeps one, and a mirrored image gives the mirrored result."""
    color = (randint(256, 8, 3, 1, 1) / 255).expand(-1, -1, 12, 20)
    strong = randaugment("strong", 0.5, 0.25, 2, 1.0, 10.0)
    for seed in range(6):
        changed = strong(seed, color)
        assert changed.shape == color.shape and changed.min() >= 0 and changed.max() <= 1
        assert torch.equal(changed, changed[:, :, :1, :1].expand_as(changed))
    image = randint(256, 8, 3, 12, 20) / 255
    changed = strong(1, image)
    assert torch.equal(strong(1, image.flip(-1)), changed.flip(-1))
    assert torch.equal(strong(1, image), changed) and not torch.equal(strong(2, image), changed)
    state = torch.get_rng_state()
    strong(5, image)
    assert torch.equal(state, torch.get_rng_state())


def test_images_are_augmented_one_by_one():
    image = (randint(256, 1, 3, 12, 20) / 255).expand(24, -1, -1, -1)
    changed = randaugment("strong", 0.0, 0.0, 2, 0.5, 10.0)(0, image)
    same = (changed == image).flatten(1).all(1)
    assert 1 <= same.sum() <= 16 and len(changed.unique(dim=0)) > 6


def test_laws_of_the_drawn_operations():
    """(j): P(none) = 1/4, one on average; (k): half at magnitude 10, mean 9.80; uniform names."""
    torch.manual_seed(0)
    drawn = [augment._draw_operations(2, 0.5, 10.0) for _ in range(8000)]
    fired = [[operation for operation in image if operation] for image in drawn]
    counts = [len(image) for image in fired]
    assert counts.count(0) / len(drawn) == pytest.approx(0.25, abs=0.02)
    assert sum(counts) / len(drawn) == pytest.approx(1, abs=0.03)
    operations = list(itertools.chain(*fired))
    levels = [10 * level for _, level in operations if level]
    assert sum(level == 10 for level in levels) / len(levels) == pytest.approx(0.5, abs=0.03)
    assert sum(levels) / len(levels) == pytest.approx(9.80, abs=0.02)
    names = [name for name, _ in operations]
    assert len(augment.OPERATIONS) == 10
    for name in augment.OPERATIONS:
        assert names.count(name) / len(names) == pytest.approx(0.1, abs=0.015)


def test_operations_by_hand():
    image = torch.tensor([0, 100, 127, 128, 200, 255], dtype=torch.uint8).expand(1, 3, 1, 6)

    def values(name, level):
        return augment.OPERATIONS[name](image, level)[0, 0, 0].tolist()

    assert values("invert", 0) == [255, 155, 128, 127, 55, 0]
    assert values("posterize", 1.0) == [0, 96, 112, 128, 192, 240]  # 4 bits
    assert values("posterize", 0.95) == [0, 96, 96, 128, 192, 224]  # 3 bits
    assert values("solarize", 1.0) == image[0, 0, 0].tolist()
    assert values("solarize", 0.5) == [0, 100, 127, 127, 55, 0]
    assert values("solarize-add", 1.0) == [110, 210, 237, 128, 200, 255]
    assert values("brightness", 1.0)[:3] == [0, 190, 241]
    assert values("color", 1.0) == image[0, 0, 0].tolist()  # grey stays
    assert values("auto-contrast", 0) == image[0, 0, 0].tolist()


def test_operations_equal_pillow_s():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture, image = Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)
    for r in (0.6, 1.0):
        others = {
            "color": ImageEnhance.Color(picture).enhance(1.8 * r + 0.1),
            "contrast": ImageEnhance.Contrast(picture).enhance(1.8 * r + 0.1),
            "brightness": ImageEnhance.Brightness(picture).enhance(1.8 * r + 0.1),
            "sharpness": ImageEnhance.Sharpness(picture).enhance(1.8 * r + 0.1),
            "equalize": ImageOps.equalize(picture),
            "auto-contrast": ImageOps.autocontrast(picture),
        }
        for name, expected in others.items():
            ours = augment.OPERATIONS[name](image, r).permute(1, 2, 0).numpy()
            gap = np.abs(ours.astype(int) - np.asarray(expected).astype(int))
            assert gap[1:-1, 1:-1].max() <= 2, name  # sharpness has its own edges
            assert name == "auto-contrast" or (ours != pixels).mean() > 0.5, name


def test_the_jitter_view_changes_every_property():
    image = torch.from_numpy(np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32))
    nothing = (0, 0.0, 0.0)  # of RandAugment
    hue = randaugment("jitter", 0.0, 0.25, *nothing)(3, image)
    torch.testing.assert_close(hue.amax(1), image.amax(1), atol=0.02, rtol=0)  # same value
    assert (hue - image).abs().amax((1, 2, 3)).min() > 0.1
    jitter = randaugment("jitter", 0.5, 0.0, *nothing)(3, image)
    assert (jitter.amax(1) - image.amax(1)).abs().amax((1, 2)).min() > 0.02
    # Each image anew: brightness scales, contrast moves to the mean, saturation to the grey.
    same = image[:1].expand(40, -1, -1, -1)
    changed = randaugment("jitter", 0.5, 0.0, *nothing)(3, same)
    assert len(changed.unique(dim=0)) == 40
    dark = torch.full((40, 3, 8, 8), 0.2)  # brightness alone changes grey images of one value
    brightness = randaugment("jitter", 0.5, 0.0, *nothing)(3, dark)[:, 0, 0, 0] / 0.2
    grey = dark.clone()
    grey[..., 4:] = 0.6  # not saturation
    spread = randaugment("jitter", 0.5, 0.0, *nothing)(3, grey)[:, 0, 0, [0, 7]].diff()[:, 0] / 0.4
    contrast = spread / brightness
    assert contrast.min() < 0.75 and contrast.max() > 1.25
    red = dark.clone()
    red[:, 0] = 0.4
    red = randaugment("jitter", 0.5, 0.0, *nothing)(3, red)[:, [0, 1], 0, 0].diff()[:, 0] / -0.2
    saturation = red / spread
    assert saturation.min() < 0.75 and saturation.max() > 1.25


@pytest.mark.parametrize("order", ["wide", "high"])
def test_rotation_leaves_void_where_it_fills(order):
    """(l), for whole degrees from -10 to 10; the mean filled share is that of a 1:2 rectangle."""
    size = (60, 120) if order == "wide" else (120, 60)
    geometry = scale_crop_flip(rotation=10, crop=None, flip=False, mean=torch.zeros(3, 1, 1))
    image, label = torch.full((3, *size), 255, dtype=torch.uint8), torch.zeros(size).byte()
    shares = []
    for seed in range(120):
        turned, void = geometry(seed, image, label)
        assert turned.shape == image.shape and set(void.unique().tolist()) <= {0, 255}
        assert (void[(turned == 0).all(0)] == 255).all()
        assert (void[(turned == 255).all(0)] == 0).all()
        shares.append((void == 255).float().mean().item())
    assert len({round(share, 4) for share in shares}) <= 21 and min(shares) == 0
    assert sum(shares) / 120 == pytest.approx(0.052, abs=0.012)
    assert 0.085 < max(shares) < 0.11


def test_rotation_at_the_end_has_its_corners_in_the_crop():
    how = {"rotation": 10, "crop": (40, 80), "flip": True, "mean": torch.zeros(3, 1, 1)}
    image, label = torch.full((3, 80, 160), 255, dtype=torch.uint8), torch.zeros(80, 160).byte()
    shares = {True: [], False: []}
    for last, seed in itertools.product(shares, range(120)):
        turned, void = scale_crop_flip(**how, rotate_last=last)(seed, image, label)
        assert turned.shape == (3, 40, 80) and void.shape == (40, 80)
        assert (void[(turned == 0).all(0)] == 255).all()
        shares[last].append((void == 255).float().mean().item())
    assert sum(shares[True]) / 120 == pytest.approx(0.052, abs=0.012)
    assert sum(share == 0 for share in shares[True]) < 15  # no angle, of 21
    assert sum(share == 0 for share in shares[False]) > 40  # in the middle
    image = randint(256, 3, 20, 30).byte()
    alone = [
        scale_crop_flip(**{**how, "crop": None, "flip": False}, rotate_last=last)
        for last in (True, False)
    ]
    for seed in range(8):  # turned once
        last, first = (geometry(seed, image, label[:20, :30]) for geometry in alone)
        assert torch.equal(last[0], first[0]) and torch.equal(last[1], first[1])


def test_image_and_label_turn_alike():
    label = (torch.arange(64).view(-1, 1) // 16 + 4 * (torch.arange(96) // 24)).byte()
    image = label.mul(15).expand(3, -1, -1).contiguous()
    how = {"rotation": 10, "scales": (0.75, 1.0, 1.25), "crop": (40, 48), "flip": True}
    geometry = scale_crop_flip(**how, mean=torch.zeros(3, 1, 1))
    for seed in range(20):
        turned, moved = geometry(seed, image, label)
        assert turned.shape == (3, 40, 48) and moved.shape == (40, 48)
        inner = moved != 255
        close = (turned[0].float() / 15 - moved.float()).abs() < 0.5
        assert close[inner].float().mean() > 0.8


def test_one_of_the_scales():
    label = torch.zeros(40, 80).byte()
    image = torch.zeros(3, 40, 80).byte()
    how = {"scales": (0.75, 1.0, 1.25), "crop": (60, 120), "flip": False}
    geometry = scale_crop_flip(**how, mean=torch.zeros(3, 1, 1))
    sizes = [(geometry(seed, image, label)[1] == 0).sum().item() for seed in range(90)]
    assert set(sizes) == {30 * 60, 40 * 80, 50 * 100}
    assert min(map(sizes.count, set(sizes))) > 15


# ---- Losses (equations 1 and 2) ----


def test_supervised_loss_by_hand():
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).repeat(2, 1, 1, 3).requires_grad_()
    label = torch.tensor([[[0, 1, 255]], [[1, 255, 255]]])  # probabilities 1/4 and 3/4
    zero, one = math.log(4), math.log(4 / 3)
    pooled, by_image = (c3semiseg.supervised_loss(logits, label, a) for a in ("pixel", "image"))
    assert pooled.item() == pytest.approx((zero + 2 * one) / 3)
    assert by_image.item() == pytest.approx(((zero + one) / 2 + one) / 2)
    (gradient,) = torch.autograd.grad(pooled, logits)
    assert (gradient.abs().sum(1) > 0).equal(label != 255)
    void = c3semiseg.supervised_loss(logits, torch.full_like(label, 255))
    assert void == 0 and torch.autograd.grad(void, logits)[0].eq(0).all()


def test_consistency_loss_values():
    """(m): the entropy over K where student and teacher agree; ln 19 / 19 for uniform ones."""
    z, keep = randn(2, 19, 4, 5).requires_grad_(), torch.ones(2, 4, 5).bool()
    prob = z.detach().softmax(1)
    loss = c3semiseg.consistency_loss(z, prob, keep)
    entropy = -(prob * prob.log()).sum(1).mean() / 19
    torch.testing.assert_close(loss, entropy)
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-8
    flat = torch.full((2, 19, 4, 5), 1 / 19)
    value = c3semiseg.consistency_loss(torch.zeros(2, 19, 4, 5), flat, keep).item()
    assert value == pytest.approx(0.15497, abs=1e-5) and 50 * value == pytest.approx(
        7.748, abs=1e-3
    )


@pytest.mark.parametrize("average", ["pixel", "image"])
def test_consistency_gradient(average):
    """(n), (o): mask (softmax z - p) / (19 #kept), exactly 0 elsewhere."""
    z, prob = randn(3, 19, 4, 5).requires_grad_(), (2 * randn(3, 19, 4, 5, seed=1)).softmax(1)
    mask = rand(3, 4, 5, seed=2) < 0.4
    mask[2] = False
    loss = c3semiseg.consistency_loss(z, prob, mask, average)
    (gradient,) = torch.autograd.grad(loss, z)
    count = mask.sum() if average == "pixel" else 3 * mask.sum((1, 2)).clamp(min=1).view(3, 1, 1, 1)
    expected = mask[:, None] * (z.softmax(1) - prob) / (19 * count)
    torch.testing.assert_close(gradient, expected)
    assert gradient.movedim(1, 3)[~mask].eq(0).all()


def test_consistency_counts_kept_pixels_alone():
    """(q): more masked pixels, same value; (p): keep = 1 masks nothing; nothing kept: 0."""
    z, prob = randn(2, 5, 4, 6), (2 * randn(2, 5, 4, 6, seed=1)).softmax(1)
    left = torch.zeros(2, 4, 6).bool()
    left[:, :, :3] = True
    half = c3semiseg.consistency_loss(z[..., :3], prob[..., :3], left[..., :3])
    torch.testing.assert_close(c3semiseg.consistency_loss(z, prob, left), half)
    everything = c3semiseg.ConfidentRegions(5, keep=1.0).update(*prob.max(1))
    assert everything.all() and everything.dtype == torch.bool
    assert c3semiseg.consistency_loss(z, prob, ~everything) == 0


# ---- Pixel contrast (equations 3 and 5) ----


def contrast(f, label, g=None, **how):
    return c3semiseg.pixel_contrast_loss(f, label, f if g is None else g, label, TAU, **how)


def naive_contrast(f, f_label, g, g_label, tau, exclude_self):
    f, g = F.normalize(f, dim=1), F.normalize(g, dim=1)
    total, anchors = torch.zeros(()), 0
    for i in range(len(f)):
        if f_label[i] == 255:
            continue
        anchors += 1
        s = (f[i] @ g.T / tau).exp()
        same = [
            j for j in range(len(g)) if g_label[j] == f_label[i] and (j != i or not exclude_self)
        ]
        other = sum((s[k] for k in range(len(g)) if g_label[k] not in (f_label[i], 255)), 0 * s[0])
        if same:
            total = total - sum(torch.log(s[j] / (s[j] + other)) for j in same) / len(same)
    return total / max(anchors, 1)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_contrast_equals_naive_loop(exclude_self):
    f, g = randn(14, 6), randn(14 if exclude_self else 9, 6, seed=1)
    f_label, g_label = randint(3, 14, seed=2), randint(3, len(g), seed=3)
    f_label[[0, 5]], g_label[[2, 5]] = 255, 255
    results = []
    for function in (c3semiseg.pixel_contrast_loss, naive_contrast):
        a, b = f.clone().requires_grad_(), g.clone().requires_grad_()
        loss = function(a, f_label, b, g_label, 0.3, exclude_self=exclude_self)
        results.append((loss, *torch.autograd.grad(loss, (a, b))))
    torch.testing.assert_close(*results)
    assert results[0][1][0].eq(0).all() and results[0][2][2].eq(0).all()  # void


def clusters(classes, each, vectors):
    label = torch.arange(classes).repeat_interleave(each)
    return vectors[label], label


@pytest.mark.parametrize(("c", "expected"), [(480, 0.71516), (2720, 2.24325)])
def test_orthogonal_clusters(c, expected):
    """(r): ln(1 + c exp(-1/tau)); the published loss has a factor of 1.5 = tau / 0.1 before it."""
    f, label = clusters(5, c // 4, torch.eye(5))
    for exclude_self in (False, True):
        value = 1.5 * contrast(f, label, exclude_self=exclude_self).item()
        assert value == pytest.approx(expected, abs=1e-4)
    assert expected == pytest.approx(1.5 * math.log(1 + c * math.exp(-1 / TAU)), abs=1e-4)


@pytest.mark.parametrize(("c", "expected"), [(480, 9.26380), (2720, 11.86313)])
def test_collapsed_embedding(c, expected):
    """(s): ln(1 + c)."""
    f, label = clusters(5, c // 4, torch.ones(5, 8))
    assert 1.5 * contrast(f, label, exclude_self=True).item() == pytest.approx(expected, abs=1e-4)


def test_one_class_and_none():
    """(t): without negatives the loss is 0 and so is its gradient, not NaN."""
    for label in (torch.full((30,), 2), torch.full((30,), 255)):
        f = randn(30, 8).requires_grad_()
        loss = contrast(f, label, exclude_self=True)
        assert loss == 0 and torch.autograd.grad(loss, f)[0].eq(0).all()


def test_antipodal_and_random_vectors():
    """(u), (v)."""
    f, label = clusters(2, 60, torch.tensor([[1.0, 0], [-1, 0]]))
    expected = math.log(1 + 60 * math.exp(-2 / TAU))
    assert contrast(f, label).item() == pytest.approx(expected, rel=1e-3)
    label = torch.arange(10).repeat_interleave(80)
    value = contrast(randn(800, 256), label, exclude_self=True).item()
    assert value == pytest.approx(math.log(720) + 1 / (2 * 256 * TAU**2), abs=0.02)


def test_bounds_of_the_contrast():
    """(w): between 0 and ln(1 + c e^(2/tau))."""
    f, label = randn(40, 3), torch.arange(4).repeat_interleave(10)
    loss = contrast(f, label, exclude_self=True)
    assert 0 <= loss <= math.log(1 + 30 * math.exp(2 / TAU))
    # every anchor at its negatives, opposite to its positives
    f, label = torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    worst = contrast(f, label, g=-f.flip(0).neg()).item()
    assert worst == pytest.approx(math.log(1 + 2 * math.exp(1 / TAU)), rel=1e-4)


def test_symmetries_of_the_contrast():
    """(y): scale, joint rotation, order."""
    f, g, label = randn(30, 6), randn(30, 6, seed=1), randint(3, 30)
    loss = contrast(f, label, g, exclude_self=True)
    scaled = contrast(f * (1 + rand(30, 1)), label, 7 * g, exclude_self=True)
    turn = torch.linalg.qr(randn(6, 6, seed=2)).Q
    turned = contrast(f @ turn, label, g @ turn, exclude_self=True)
    order = torch.randperm(30, generator=generator(3))
    moved = c3semiseg.pixel_contrast_loss(
        f[order], label[order], g[order], label[order], TAU, exclude_self=True
    )
    torch.testing.assert_close(torch.stack([scaled, turned, moved]), loss.expand(3))


def sampled(index, label, per_class, num_classes, batch):
    shape = (batch, num_classes, per_class)
    return index.view(shape), label.view(shape)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("per_class", [20, 7, 1])
def test_sample_pixels(hard, per_class):
    """(z), against counts by hand, over many random maps with rare, absent and void classes."""
    batch, num_classes, size = 6, 5, (9, 16)
    for seed in range(8):
        label = randint(9, batch, *size, seed=seed)
        label = torch.where(label < 5, label, torch.where(label < 7, 0, 255))
        label[:, 0, :3], label[1] = 4, 3  # image 1 has one class
        wrong = rand(batch, *size, seed=seed + 50) < torch.linspace(0, 1, batch).view(-1, 1, 1)
        prediction = torch.where(wrong, (label + 1) % 5, label.clamp(max=4))
        index, drawn = c3semiseg.sample_pixels(
            label, prediction, per_class, num_classes=num_classes, hard=hard, generator=generator()
        )
        assert index.dtype == drawn.dtype == torch.int64
        assert index.shape == drawn.shape == (batch * num_classes * per_class,)
        index, drawn = sampled(index, drawn, per_class, num_classes, batch)
        for b, c in itertools.product(range(batch), range(num_classes)):
            of_class = (label[b] == c).flatten()
            wrongs = (of_class & (prediction[b] != label[b]).flatten()).sum().item()
            rights = of_class.sum().item() - wrongs
            if wrongs + rights <= per_class:
                assert drawn[b, c].eq(255).all()
                continue
            assert drawn[b, c].eq(c).all()
            place = index[b, c] - b * 9 * 16
            assert len(set(place.tolist())) == per_class and of_class[place].all()
            taken = (prediction[b] != label[b]).flatten()[place].sum().item()
            half = per_class // 2
            if hard and wrongs >= half and rights >= per_class - half:
                assert taken == half
            elif hard and wrongs < half:
                assert taken == wrongs
            elif hard:
                assert taken == per_class - rights


def test_sampling_is_uniform_within_the_pools():
    label = torch.zeros(1, 6, 10).long()
    prediction = (torch.arange(60).view(1, 6, 10) < 24).long()  # 24 hard, 36 easy
    rng, counts = generator(), {True: torch.zeros(60), False: torch.zeros(60)}
    for hard, total in counts.items():
        for _ in range(600):
            index, drawn = c3semiseg.sample_pixels(
                label, prediction, 8, num_classes=2, hard=hard, generator=rng
            )
            total[index[drawn == 0]] += 1
    assert (counts[True][:24] / 600 - 4 / 24).abs().max() < 0.07
    assert (counts[True][24:] / 600 - 4 / 36).abs().max() < 0.06
    assert (counts[False] / 600 - 8 / 60).abs().max() < 0.06


def test_an_image_of_fewer_pixels_than_a_sample():
    label = torch.zeros(2, 3, 3).long()
    index, drawn = c3semiseg.sample_pixels(label, label, 20, num_classes=4)
    assert drawn.eq(255).all() and index.shape == (160,) and index.max() < 18


def test_projection_head():
    head = c3semiseg.ProjectionHead(2048)
    assert sum(p.numel() for p in head.parameters()) == 590_336
    for convolution in (head[0], head[2]):
        assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.05)
    head = c3semiseg.ProjectionHead(6, 8)
    out = head(randn(2, 6, 4, 5))
    assert out.shape == (2, 8, 4, 5) and out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2, 4, 5))
    for parameter in head.parameters():
        parameter.data = randn(*parameter.shape)
    features = randn(4, 6, 4, 5)  # un-mixing behind it is un-mixing before it
    box = rand(2, 4, 5) < 0.5
    before, after = head(c3semiseg.cut_mix(box, features)), c3semiseg.cut_mix(box, head(features))
    torch.testing.assert_close(before, after)


# ---- Dynamic confident regions (equation 6) ----


def naive_thresholds(thresholds, confidence, pseudo_label, keep, momentum):
    new = thresholds.tolist()
    for c in range(len(new)):
        found = sorted(confidence[pseudo_label == c].tolist(), reverse=True)
        if found:
            delta = found[min(int(keep * len(found)), len(found) - 1)]
            new[c] = momentum * new[c] + (1 - momentum) * delta
    return torch.tensor(new)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8, 0.9, 0.999])
def test_thresholds_equal_naive_ones(keep):
    regions = c3semiseg.ConfidentRegions(19, keep=keep, momentum=0.7)
    thresholds = regions.thresholds.clone()
    for seed in range(5):
        pseudo_label = randint(17, 2, 13, 11, seed=seed) + seed % 3
        confidence = rand(2, 13, 11, seed=seed + 9) * 0.95 + 0.05
        pseudo_label[0, 0, 0], confidence[0, 0, 0] = 18, 1.0
        expected = naive_thresholds(thresholds, confidence, pseudo_label, keep, 0.7)
        mask = regions.update(confidence, pseudo_label)
        torch.testing.assert_close(regions.thresholds, expected, rtol=0, atol=1e-6)
        absent = torch.tensor([c for c in range(19) if not (pseudo_label == c).any()])
        if len(absent):  # bit-exact
            assert torch.equal(regions.thresholds[absent], thresholds[absent])
        thresholds = regions.thresholds.clone()
        assert torch.equal(mask, confidence >= thresholds[pseudo_label])  # inclusive, updated first


def test_the_batch_s_own_threshold_keeps_floor_s_n_plus_one():
    for n, keep in itertools.product((1, 2, 5, 10, 997), (0.2, 0.6, 0.8)):
        regions = c3semiseg.ConfidentRegions(3, keep=keep, momentum=0.0)
        confidence = (torch.randperm(n, generator=generator()).float() + 1).view(1, 1, n) / n
        mask = regions.update(confidence, torch.ones(1, 1, n).long())
        assert mask.sum() == min(int(keep * n) + 1, n)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8, 0.9])
def test_a_stationary_stream_settles_at_s(keep):
    regions, rng, shares = c3semiseg.ConfidentRegions(2, keep=keep), generator(), []
    for step in range(150):
        confidence = torch.rand(2, 20, 25, generator=rng) ** torch.tensor([0.3, 1]).view(2, 1, 1)
        pseudo_label = torch.tensor([0, 1]).view(2, 1, 1).expand(-1, 20, 25)
        mask = regions.update(confidence, pseudo_label)
        if step >= 60:
            shares.append(mask.float().mean((1, 2)))
    settled = torch.stack(shares).mean(0)
    assert (settled - keep).abs().max() < 0.012  # of either class


def test_void_leaves_the_thresholds_alone():
    confidence, label = rand(2, 20, 30), randint(3, 2, 20, 30, seed=1)
    void = rand(2, 20, 30, seed=2) < 0.4
    regions, other = (c3semiseg.ConfidentRegions(3, momentum=0.0) for _ in range(2))
    mask = regions.update(confidence, label.masked_fill(void, 255))
    other.update(confidence[~void][None, None], label[~void][None, None])
    assert torch.equal(regions.thresholds, other.thresholds)
    assert 0.79 < mask[~void].float().mean() < 0.81


def test_corners_may_be_left_out(command, camvid, tmp_path, monkeypatch):
    labels, loss = [], c3semiseg.c3_loss
    monkeypatch.setattr(
        c3semiseg, "c3_loss", lambda *a, **k: (labels.append(a[2][0:3:2]), loss(*a, **k))[1]
    )
    flags = ("--keep", 1, "--rotation", 10, "--student-view", "weak")
    for k, corners in enumerate(("--corners", "--no-corners")):
        step_log(command, camvid, tmp_path / str(k), *flags, corners)
    counted, left_out = labels[:3], labels[3:]
    assert not any((label == 255).any() for _, label in counted)
    for image, label in left_out:  # black is a corner
        black = image.amax(1) == 0
        assert black.any() and (label == 255)[black].all()
        assert (label == 255).float().mean() < 0.2


def test_a_constant_threshold_is_reached_as_a_geometric_series():
    regions = c3semiseg.ConfidentRegions(2)
    for t in range(1, 40):
        regions.update(torch.full((1, 2, 3), 0.5), torch.zeros(1, 2, 3).long())
        assert regions.thresholds[0].item() == pytest.approx(0.5 + 0.4 * 0.9**t, abs=1e-5)
    assert regions.thresholds[1].item() == pytest.approx(0.9)
    assert set(regions.state_dict()) == {"thresholds"}  # what a checkpoint keeps


# ---- The whole of equation 7 ----


class Stub(nn.Module):
    """Logits and embeddings of a small convolution; notes what it is given."""

    def __init__(self, seed, kernel=3, dim=5):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Conv2d(3, 8, kernel, padding=kernel // 2)
        self.classifier, self.projection = nn.Conv2d(8, 4, 1), c3semiseg.ProjectionHead(8, dim)
        self.seen = []
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.8)

    def forward(self, image):
        self.seen.append((image, torch.is_grad_enabled()))
        features = F.avg_pool2d(self.trunk(image).relu(), 2)
        logits = F.interpolate(self.classifier(features), image.shape[2:], mode="nearest")
        return logits, self.projection(features)


SAMPLING = {"per_class": 3, "hard": True, "temperature": TAU}


def group(seed=0, n=2, size=(12, 16)):
    """Labeled part, unlabeled part and weak unlabeled image of a group, with a teacher's labels."""
    image_l, image_u, strong = (rand(n, 3, *size, seed=seed + k) for k in range(3))
    label_l = randint(5, n, *size, seed=seed + 3)
    label_l[label_l == 4] = 255
    teacher = Stub(21)
    prob, confidence, pseudo_label, embedding = c3semiseg.label_images(teacher, image_u)
    label_u = pseudo_label.masked_fill(confidence < 0.5, 255)
    assert 0.1 < (label_u == 255).float().mean() < 0.9
    unlabeled = strong, prob, label_u, embedding
    return (image_l, label_l, None), unlabeled, teacher, image_u


def naive_c3(student, labeled, unlabeled, mixing, sets, average, seed):
    """Equation 7's terms pixel by pixel, with the draws of c3_loss."""
    (image_l, label_l, g_l), (strong, prob, label_u, g_u) = labeled, unlabeled
    n, rng = len(image_l), generator(seed)
    order, box = c3semiseg.draw_pairs(mixing, n, image_l.shape[2:], generator=rng)
    batch = torch.cat([image_l, strong])
    place = {int(image): k for k, image in enumerate(order)}
    mixed = torch.empty_like(batch)
    for k, y, x in itertools.product(range(2 * n), *map(range, batch.shape[2:])):
        source = (k + n * int(box[k % n, y, x])) % (2 * n)  # the partner inside the box
        mixed[k, :, y, x] = batch[order[source], :, y, x]
    logits, embedding = student(mixed)

    def unmixed(maps, step):
        out = torch.empty_like(maps)
        for image, y, x in itertools.product(range(2 * n), *map(range, maps.shape[2:])):
            k = place[image]
            k = (k + n * int(box[k % n, y * step, x * step])) % (2 * n)
            out[image, :, y, x] = maps[k, :, y, x]
        return out

    logits, f = unmixed(logits, 1), unmixed(embedding, 2)
    g = torch.cat([f[:n] if g_l is None else g_l, g_u])
    log_prob = logits.log_softmax(1)
    label = torch.cat([label_l, label_u])
    losses = torch.zeros(2 * n, *label.shape[1:])
    for k, y, x in itertools.product(*map(range, label.shape)):
        if label[k, y, x] == 255:
            continue
        target = F.one_hot(label[k, y, x], 4) if k < n else prob[k - n, :, y, x] / 4
        losses[k, y, x] = -(target * log_prob[k, :, y, x]).sum()
    sums, counts = losses.sum((1, 2)), (label != 255).sum((1, 2))
    terms = []
    for part in (slice(0, n), slice(n, 2 * n)):
        pooled = sums[part].sum() / counts[part].sum()
        terms.append(pooled if average == "pixel" else (sums[part] / counts[part]).mean())
    part = {"labeled": slice(0, n), "unlabeled": slice(n, 2 * n), "both": slice(0, 2 * n)}[sets]
    g = torch.cat([g[:n].detach(), g[n:]]) if sets == "both" else g
    small, prediction = label[part, ::2, ::2], F.avg_pool2d(logits[part], 2).argmax(1)
    index, drawn = c3semiseg.sample_pixels(small, prediction, 3, num_classes=4, generator=rng)
    assert (drawn != 255).sum() > 10
    f, g = (e[part].permute(0, 2, 3, 1).reshape(-1, 5)[index] for e in (f, g))
    return (*terms, naive_contrast(f, drawn, g, drawn, TAU, True))


@pytest.mark.parametrize("mixing", ["cross", "intra", "none"])
@pytest.mark.parametrize("sets", ["both", "labeled", "unlabeled"])
@pytest.mark.parametrize("average", ["pixel", "image"])
def test_c3_loss_equals_naive_loss(mixing, sets, average):
    labeled, unlabeled, teacher, image_u = group()
    if mixing == "intra":  # equation 5 to the letter
        labeled = *labeled[:2], c3semiseg.label_images(teacher, labeled[0])[3]
    student = Stub(1)
    what = {"mixing": mixing, "sets": sets, "average": average}
    how = {"contrast": partial(c3semiseg.contrast_loss, **SAMPLING), "generator": generator(5)}
    terms, seen = c3semiseg.c3_loss(student, labeled, unlabeled, **what, **how)
    expected = naive_c3(copy.deepcopy(student), labeled, unlabeled, **what, seed=5)
    for term, other in zip(terms.values(), expected, strict=True):
        torch.testing.assert_close(term, other)
    assert list(terms) == ["loss_l", "loss_u", "loss_c"]
    weights = [p for p in student.parameters()]
    twin = Stub(1)
    sum(naive_c3(twin, labeled, unlabeled, **what, seed=5)).backward()
    sum(terms.values()).backward()
    for mine, theirs in zip(weights, twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert all(p.grad is None for p in teacher.parameters())
    assert len(student.seen) == 1  # one forward pass
    assert all(any(torch.equal(m, s) for s in student.seen[0][0]) for m in seen["mixed"])
    assert [with_grad for _, with_grad in teacher.seen] == [False] * len(teacher.seen)
    assert teacher.seen[0][0] is image_u
    assert not any(value.requires_grad for value in seen.values())


def test_gradients_of_the_contrast_reach_anchors_alone():
    """(x): both sets: nothing to g; labeled alone and warm-up: both sides of the student's."""
    label, logits = randint(3, 2, 8, 8), randn(2, 3, 8, 8).requires_grad_()
    f, g = randn(2, 5, 4, 4).requires_grad_(), randn(2, 5, 4, 4, seed=1)
    how = {**SAMPLING, "per_class": 2, "generator": generator()}
    c3semiseg.contrast_loss(f, g, label, logits, **how).backward()
    one_side = f.grad.clone()
    assert logits.grad is None and one_side.abs().sum() > 0
    labeled, unlabeled, _, _ = group()
    contrast = partial(c3semiseg.contrast_loss, **SAMPLING)
    for sets in ("both", "labeled", "unlabeled"):
        captured = {}

        def spy(f, g, label, logits, generator, captured=captured):
            captured.update(f=f, g=g)
            return contrast(f, g, label, logits, generator=generator)

        how = {"average": "pixel", "mixing": "cross", "sets": sets, "generator": generator()}
        c3semiseg.c3_loss(Stub(0), labeled, unlabeled, contrast=spy, **how)
        assert captured["f"].requires_grad and captured["g"].requires_grad == (sets == "labeled")
        if sets == "both":
            assert torch.equal(captured["g"][:2], captured["f"][:2])
            assert torch.equal(captured["g"][2:], unlabeled[3])


def test_warmup_loss_contrasts_student_with_student():
    labeled, student = group()[0], Stub(2)
    how = {"contrast": partial(c3semiseg.contrast_loss, **SAMPLING), "generator": generator(1)}
    terms, seen = c3semiseg.warmup_loss(student, labeled, average="pixel", **how)
    logits, embedding = student(labeled[0])
    torch.testing.assert_close(terms["loss_l"], c3semiseg.supervised_loss(logits, labeled[1]))
    label, prediction = labeled[1][:, ::2, ::2], logits[:, :, ::2, ::2].argmax(1)
    index, drawn = c3semiseg.sample_pixels(
        label, prediction, 3, num_classes=4, generator=generator(1)
    )
    f = embedding.permute(0, 2, 3, 1).reshape(-1, 5)[index]
    expected = naive_contrast(f, drawn, f, drawn, TAU, True)
    torch.testing.assert_close(terms["loss_c"], expected)
    gradients = (
        torch.autograd.grad(loss, list(student.projection.parameters()))
        for loss in (terms["loss_c"], expected)
    )
    torch.testing.assert_close(*gradients)
    assert torch.equal(seen["logits"], logits)
    terms, _ = c3semiseg.warmup_loss(student, labeled, average="pixel", contrast=None)
    assert list(terms) == ["loss_l"]


def test_road_can_be_left_out():
    f, label, logits = randn(2, 5, 4, 4), randint(2, 2, 8, 8), randn(2, 2, 8, 8)
    how = {**SAMPLING, "generator": None}
    assert c3semiseg.contrast_loss(f, f, label, logits, **how) > 0
    assert c3semiseg.contrast_loss(f, f, label, logits, first_class=1, **how) == 0  # one class left


def test_labels_at_another_size():
    label = randint(19, 2, 256, 512)
    small = c3semiseg.resize_nearest(label, (33, 65))
    row, column = (torch.arange(n) * size // n for n, size in ((33, 256), (65, 512)))
    assert small.dtype == torch.int64 and torch.equal(small, label[:, row][:, :, column])
    box = c3semiseg.box_mask(2, (256, 512))
    assert torch.equal(c3semiseg.resize_nearest(box, (33, 65)), box[:, row][:, :, column])


def test_weights_of_equation_7():
    recipe = c3semiseg.RECIPES["cityscapes"]
    steps = (0, 500, 1000, 2000, 3000, 4000, 22_499)
    weights = [c3semiseg.loss_weights(recipe, 2500 + t) for t in steps]
    expected = [0.3369, 1.0875, 3.0027, 14.3252, 36.5808, 50, 50]
    assert [w["loss_u"] for w in weights] == pytest.approx(expected, rel=2e-4)
    assert all(w["loss_l"] == 1 and w["loss_c"] == pytest.approx(0.15) for w in weights)
    early = [c3semiseg.loss_weights(recipe, t)["loss_c"] for t in (0, 125, 250)]
    ramp = [0.0067379, 0.2865048, 1]
    assert early == pytest.approx([0.15 * r for r in ramp], rel=1e-4)
    paper = replace(recipe, warmup_contrast=False, contrast_ramp=5000)
    contrast = [c3semiseg.loss_weights(paper, t)["loss_c"] for t in (0, 2499, 2500, 25_000)]
    assert contrast == pytest.approx([0, 0, 0.15 * ramp[1], 0.15], rel=1e-4)
    assert round(50 / 19, 2) == 2.63


def test_alpha_of_each_step():
    recipe = c3semiseg.RECIPES["cityscapes"]
    steps = (0, 2499, 2500, 2501, 2502, 2523, 2524, 25_000)
    alpha = [c3semiseg.teacher_decay(recipe, step) for step in steps]
    assert alpha == [0, 0, 0, 0.99, 0.99, 0.99, 0.99, 0.99]
    warm = replace(recipe, ema_warm_start=True)
    alpha = [c3semiseg.teacher_decay(warm, step) for step in steps]
    assert alpha == pytest.approx([0, 0, 0, 8 / 9, 12 / 13, 96 / 97, 0.99, 0.99])
    assert c3semiseg.teacher_decay(replace(warm, ema_decay=0.9999), 25_000) == 0.9999


def test_core_never_waits_for_the_device():
    """On the meta device .item(), nonzero, unique and branches on tensors raise."""
    student, teacher = Stub(0).to("meta"), Stub(1).to("meta")
    with torch.device("meta"):
        image, label = torch.empty(2, 3, 8, 8), torch.empty(2, 8, 8).long()
        regions = c3semiseg.ConfidentRegions(4)
    prob, confidence, pseudo_label, embedding = c3semiseg.label_images(teacher, image)
    confident = regions.update(confidence, pseudo_label)
    unlabeled = image, prob, pseudo_label.masked_fill(~confident, 255), embedding
    contrast = partial(c3semiseg.contrast_loss, **SAMPLING)
    for mixing, sets in itertools.product(("cross", "intra"), ("both", "labeled", "unlabeled")):
        how = {"mixing": mixing, "sets": sets, "average": "pixel", "contrast": contrast}
        terms, _ = c3semiseg.c3_loss(student, (image, label, None), unlabeled, **how)
        sum(terms.values()).backward()
    how = {"average": "image", "contrast": contrast}
    terms, _ = c3semiseg.warmup_loss(student, (image, label, None), **how)
    sum(terms.values()).backward()


# ---- Network and training ----


def test_network_of_the_paper():
    net = c3semiseg.network(c3semiseg.RECIPES["cityscapes"], 19, True)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert count["classifiers"] == 1_400_908 and count["projection"] == 590_336
    learns = {name: p.numel() for name, p in net.named_parameters() if p.requires_grad}
    fixed = {name: p.numel() for name, p in net.named_parameters() if not p.requires_grad}
    assert sum(fixed.values()) == 105_344 and len(learns) == 104 + 8 + 4
    assert sum(learns.values()) == 42_500_160 - 105_344 + 1_400_908 + 590_336
    backbone, heads = net.parameter_groups(1.2e-4, 1.0)
    assert len(backbone["params"]) == 104 and len(heads["params"]) == 12
    for mode in (net, net.train()):  # from the first step on
        assert not any(m.training for m in mode.modules() if isinstance(m, nn.BatchNorm2d))


def tiny_recipe(**changes):
    small = {"layers": (1, 1, 1, 1), "width": 4, "embedding": 6, "aspp_rates": (1, 2)}
    return c3semiseg.replace(c3semiseg.RECIPES["cityscapes"], **small, **changes)


def test_forward_gives_what_both_heads_give():
    net = c3semiseg.network(tiny_recipe(), 5, True)
    image = rand(2, 3, 256, 512)
    logits, embedding = net(image)
    assert logits.shape == (2, 5, 256, 512) and embedding.shape == (2, 6, 33, 65)
    features = net.features(image)
    torch.testing.assert_close(logits, net.classify(features, (256, 512)))
    first, relu, second = net.projection
    expected = F.normalize(second(first(features).relu()), dim=1)
    torch.testing.assert_close(embedding, expected)
    assert isinstance(relu, nn.ReLU)
    (gradient,) = torch.autograd.grad((embedding * randn(*embedding.shape)).sum(), net.conv1.weight)
    assert gradient.abs().sum() > 0  # the contrast trains the backbone, too
    assert c3semiseg.network(tiny_recipe(contrast="none"), 5, True).projection is None


ARGS = ("--weights", "none", "--layers", 1, 1, 1, 1, "--width", 4, "--aspp-rates", 1, 2)
ARGS += ("--dataset", "camvid", "--labeled", 4, "--size", 48, 64, "--workers", 0, "--lr", 3e-3)
ARGS += ("--backbone-factor", 1, "--embedding", 8, "--per-class", 3, "--batch-size", 4)
ARGS += ("--warmup", 2, "--consistency-ramp", 2, "--contrast-ramp", 1)
ARGS += ("--initial-threshold", 0.2, "--threshold-momentum", 0.3)


def read_log(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)["state"]


def step_log(command, data, folder, *flags):
    """The last logged step of a short run."""
    args = (*ARGS, "--data-dir", data, "--iterations", 5, "--output-dir", folder, *flags)
    status, _, errors = command("c3semiseg", *args)
    assert (status, errors) == (0, "")
    return [entry for entry in read_log(folder) if "loss_l" in entry][-1]


def test_run_and_its_checkpoint_without_a_head(command, camvid, tmp_path, monkeypatch):
    out = tmp_path / "run"
    args = (*ARGS, "--data-dir", camvid, "--iterations", 20, "--eval-every", 10)
    kept, save = [], run.Run._save
    monkeypatch.setattr(run.Run, "_save", lambda self, done: (save(self, done), keep(done)))

    def keep(done):
        if done == 10:
            kept.append((out / "last.pt").read_bytes())

    status, printed, errors = command("c3semiseg", *args, "--save-every", 10, "--output-dir", out)
    assert (status, errors) == (0, "") and "headline: student" in printed
    steps = [entry for entry in read_log(out) if "loss_l" in entry]
    assert {"loss_u", "loss_c", "confident", "lr"} <= set(steps[-1])
    assert steps[-1]["loss_l"] < steps[0]["loss_l"]
    assert {p.name for p in (out / "samples").iterdir()} == {"000010.png", "000020.png"}
    (tmp_path / "half").mkdir()
    (tmp_path / "half/last.pt").write_bytes(kept[0])
    for folder, with_head in ((out, False), (tmp_path / "half", True)):
        for network in ("student", "teacher"):
            names = state_of(folder)[network]
            assert any(name.startswith("projection") for name in names) == with_head
        status, printed, errors = command("c3semiseg", "--evaluate", folder / "last.pt")
        assert (status, errors) == (0, "") and "mIoU" in printed
        picture = tmp_path / "photo.png"
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(picture)
        argv = ("--predict", folder / "last.pt", picture, "--out", tmp_path / f"p{with_head}")
        assert command("c3semiseg", *argv)[0] == 0
    status, printed, _ = command("c3semiseg", "--resume", out / "last.pt")
    assert status == 0 and "finished already" in printed
    argv = (*ARGS, "--data-dir", camvid, "--weights", out / "last.pt", "--iterations", 3)
    status, printed, errors = command("c3semiseg", *argv, "--output-dir", tmp_path / "next")
    assert (status, errors) == (0, "") and "projection" in printed  # kept at initialisation


def test_a_stopped_run_resumes_exactly(command, camvid, tmp_path, monkeypatch):
    args = (*ARGS, "--data-dir", camvid, "--iterations", 9, "--eval-every", 9, "--accumulate", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command("c3semiseg", *args, "--output-dir", whole)
    log = run.Run.log

    def log_and_kill(self, **values):
        if self.iteration == 5 and self.start == 0 and "loss_l" in values:
            os.kill(os.getpid(), signal.SIGTERM)
        log(self, **values)

    monkeypatch.setattr(run.Run, "log", log_and_kill)
    assert command("c3semiseg", *args, "--output-dir", parts)[0] == 128 + signal.SIGTERM
    assert command("c3semiseg", *args, "--resume", "auto", "--output-dir", parts)[0] == 0
    one, two = (torch.utils._pytree.tree_flatten(state_of(folder)) for folder in (whole, parts))
    assert one[1] == two[1]
    for x, y in zip(one[0], two[0], strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    assert read_log(whole) == read_log(parts)


CHANGES = """--mixing intra | --mixing none | --teacher-view strong | --student-view weak
--student-view jitter | --jitter 0.1 --hue 0 | --operations 1 | --operation-probability 0.9
--magnitude 1 | --average image | --consistency-weight 5 | --consistency-ramp 9
--contrast-weight 3 | --contrast-ramp 60 | --contrast labeled | --contrast unlabeled
--contrast-labeled teacher | --no-contrast-road | --per-class 5 | --no-hard-sampling
--temperature 0.5 | --embedding 5 | --keep 0.3 | --keep 1 | --threshold-momentum 0.1
--initial-threshold 0.4 | --rotation 0 | --no-flip | --crop 32 48 | --group-size 2
--scales 0.75 1.25 --crop 32 48 | --ema-decay 0.1 | --warmup 1 | --backbone-factor 0.1
--no-warmup-contrast | --no-corners | --rotate-labeled-last | --labeled-view strong
--unlabeled all | --replacement | --weight-decay 0.1 | --ema-warm-start"""


@pytest.fixture(scope="module")
def usual():
    return {}


@pytest.mark.parametrize("flags", CHANGES.replace("\n", " | ").split(" | "))
def test_every_flag_reaches_the_step(command, camvid, tmp_path, usual, flags):
    if not usual:
        usual.update(step_log(command, camvid, tmp_path / "usual"))
    changed = step_log(command, camvid, tmp_path / "run", *flags.split())
    names = ("loss_l", "loss_u", "loss_c", "confident")
    assert all(math.isfinite(changed[name]) for name in names)
    assert any(changed[name] != usual[name] for name in names)


def test_rows_of_table_3(command, camvid, tmp_path):
    log = {"loss_l", "iteration", "lr"}
    assert set(step_log(command, camvid, tmp_path / "base", "--supervised")) == log
    assert not any(name.startswith("projection") for name in state_of(tmp_path / "base")["student"])
    log |= {"loss_u", "confident"}
    assert set(step_log(command, camvid, tmp_path / "no_c", "--contrast", "none")) == log
    log |= {"loss_c"}
    assert set(step_log(command, camvid, tmp_path / "no_u", "--consistency-weight", 0)) == log
    status, printed, _ = command(
        "c3semiseg", *ARGS, "--labeled", "1.0", "--data-dir", camvid, "--iterations", 3,
        "--output-dir", tmp_path / "full",
    )  # fmt: skip
    assert status == 0 and "8 labeled and 8 unlabeled of 8" in printed  # "Full" of table 1


def test_the_loop_hands_over_what_the_paper_says(command, camvid, tmp_path, monkeypatch):
    """Two groups a step: the teacher first, on unlabeled images; thresholds once, with both."""
    calls = []

    def spy(owner, name, note):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append(note(args, kwargs, result))
            return result

        monkeypatch.setattr(owner, name, wrapped)

    def weights(net):
        return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()

    buffers, seeds = [], []

    def updated(args, kwargs, _):
        buffers.append(kwargs["buffers"])
        return "ema", kwargs["decay"], weights(args[0]), weights(args[1])

    spy(c3semiseg, "update_teacher", updated)

    def darken(view, *_):
        return lambda seed, image: seeds.append(seed) or image * {"weak": 1.0, "strong": 0.5}[view]

    monkeypatch.setattr(c3semiseg, "randaugment", darken)
    draws = []
    spy(c3semiseg, "draw_pairs", lambda a, k, r: draws.append(r) or ("pairs",))
    init, made, splits, kinds = run.Run.__init__, [], [], []
    make_teacher = c3semiseg.make_teacher
    monkeypatch.setattr(
        c3semiseg, "make_teacher", lambda *a, **k: made.append(make_teacher(*a, **k)) or made[-1]
    )

    def spy_init(session, recipe, args, data, split, state, **own):
        splits.append(split), kinds.append(type(state["optimizer"]))
        init(session, recipe, args, data, split, state, **own)

    monkeypatch.setattr(run.Run, "__init__", spy_init)
    spy(c3semiseg, "label_images", lambda a, k, r: ("teacher", a[1], r[1]))
    spy(c3semiseg.ConfidentRegions, "update", lambda a, k, r: ("thresholds", *a[1:], r))
    spy(c3semiseg, "c3_loss", lambda a, k, r: ("c3", *a[1:], r))
    spy(c3semiseg, "warmup_loss", lambda a, k, r: ("warmup", len(a[1][0])))
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: (losses.append(loss.item()), backward(loss))
    )
    step_log(command, camvid, tmp_path / "run", "--group-size", 2, "--ema-decay", 0.6)
    calls = [call for call in calls if call != ("pairs",)]
    assert len({(*order.tolist(), *box.flatten().tolist()) for order, box in draws}) == 3 * 2
    assert made[0].training and not set(splits[0][0]) & set(splits[0][1])
    optimizer = state_of(tmp_path / "run")["optimizer"]["state"]
    assert all("exp_avg_sq" in moments for moments in optimizer.values())
    assert kinds == [torch.optim.Adam]  # a weight decay is part of its gradient, not as in AdamW
    names = [call[0] for call in calls]
    warm, semi = (
        ["ema", "warmup", "warmup"],
        ["ema", "teacher", "teacher", "thresholds", "c3", "c3"],
    )
    assert names == [*warm, *warm, *semi, *semi, *semi]
    updates = [call for call in calls if call[0] == "ema"]
    assert [decay for _, decay, *_ in updates] == [0, 0, 0, 0.6, 0.6]
    assert buffers == ["copy"] * 3 + ["keep"] * 2
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 2 + 5 * 2  # of steps, groups and views
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["args"]["accumulate"] == 1  # more processes may go on with fewer groups each
    teacher, student = updates[2][2:]
    assert torch.equal(teacher, student)  # at the first semi-supervised step
    expected = 0.6 * teacher + 0.4 * updates[3][3]  # of the previous step
    torch.testing.assert_close(updates[3][2], expected)
    assert not torch.equal(updates[3][3], student)
    seen = {name: [call for call in calls[-6:] if call[0] == name] for name in semi}
    ((_, confidence, pseudo_label, mask),) = seen["thresholds"]
    assert torch.equal(confidence, torch.cat([labels for _, _, labels in seen["teacher"]]))
    # equation 7, of half of the batch each; both ramps have ended
    for loss, (*_, (terms, _)) in zip(losses[-2:], seen["c3"], strict=True):
        loss_l, loss_u, loss_c = (term.item() for term in terms.values())
        assert 2 * loss == pytest.approx(loss_l + 50 * loss_u + 0.15 * loss_c, rel=1e-5)
    for k, (_, labeled, unlabeled, _) in enumerate(seen["c3"]):
        part = slice(2 * k, 2 * k + 2)
        assert len(labeled[0]) == 2 and labeled[2] is None
        assert torch.equal(unlabeled[2], pseudo_label[part].masked_fill(~mask[part], 255))
        assert torch.equal(unlabeled[1].amax(1), confidence[part])
        assert torch.equal(unlabeled[0], 0.5 * seen["teacher"][k][1])  # the same geometry
        assert unlabeled[0].shape == labeled[0].shape and not unlabeled[3].requires_grad


def test_frozen_batch_norm_stays_as_loaded(command, camvid, tmp_path):
    net = c3semiseg.network(tiny_recipe(), 11, False)
    for name, value in net.named_parameters():
        if "bn" in name or "downsample.1" in name:
            value.data.add_(0.3 * torch.randn(value.shape))
    torch.save(net.state_dict(), tmp_path / "w.pth")
    step_log(command, camvid, tmp_path / "run", "--weights", tmp_path / "w.pth")
    for state in (state_of(tmp_path / "run")[name] for name in ("student", "teacher")):
        for name, value in net.state_dict().items():
            if "bn" in name or "downsample.1" in name:
                assert torch.equal(state[name], value), name
            elif name == "conv1.weight":
                assert not torch.equal(state[name], value)


def test_rates_and_schedule(command, camvid, tmp_path):
    step_log(command, camvid, tmp_path / "run", "--backbone-factor", 0.3, "--iterations", 5)
    backbone, heads = state_of(tmp_path / "run")["optimizer"]["param_groups"]
    assert backbone["initial_lr"] == pytest.approx(9e-4) and heads["initial_lr"] == 3e-3
    assert backbone["weight_decay"] == 0 and backbone["lr"] == heads["lr"] == 0  # at the end
    step_log(command, camvid, tmp_path / "decay", "--weight-decay", 0.02)
    step_log(command, camvid, tmp_path / "base", "--weight-decay", 0.03, "--supervised")
    for name, penalty in (("decay", 0.02), ("base", 0.03)):
        groups = state_of(tmp_path / name)["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [penalty, penalty]
    step_log(command, camvid, tmp_path / "stop", "--iterations", 10)
    rates = [entry["lr"] for entry in read_log(tmp_path / "stop") if "lr" in entry]
    assert rates[-1] == 0 and len(rates) > 1
    for entry in read_log(tmp_path / "stop"):
        if "lr" in entry:
            factor = (1 - entry["iteration"] / 10) ** c3semiseg.Recipe.lr_power
            assert entry["lr"] == pytest.approx(3e-3 * factor, rel=1e-6)


def test_recipes_have_the_paper_s_numbers():
    cityscapes, bdd = c3semiseg.RECIPES["cityscapes"], c3semiseg.RECIPES["bdd100k"]
    assert (cityscapes.size, cityscapes.crop, cityscapes.scales) == ((512, 1024), (256, 512), (1,))
    assert (cityscapes.batch_size, cityscapes.group_size, cityscapes.warmup) == (16, 4, 2_500)
    assert (bdd.size, bdd.crop, bdd.scales) == ((720, 1280), (512, 512), (0.75, 1, 1.25))
    assert (bdd.batch_size, bdd.group_size, bdd.iterations, bdd.warmup) == (8, 2, 20_000, 5_000)
    assert cityscapes.iterations == 25_000
    for recipe in (cityscapes, bdd):
        assert (recipe.keep, recipe.threshold_momentum, recipe.initial_threshold) == (0.8, 0.9, 0.9)
        assert (recipe.lr, recipe.lr_power, recipe.ema_decay) == (1.2e-4, 0.9, 0.99)
        assert (recipe.temperature, recipe.per_class, recipe.embedding) == (0.15, 20, 256)
        assert (recipe.consistency_weight, recipe.consistency_ramp) == (50, 4_000)
        assert (recipe.contrast_weight, recipe.contrast_ramp) == (0.15, 250)
        assert (recipe.jitter, recipe.hue, recipe.rotation, recipe.flip) == (0.5, 0.25, 10, True)
        assert (recipe.operations, recipe.operation_probability, recipe.magnitude) == (2, 0.5, 10)


def test_the_teacher_embeds_the_labeled_images_of_the_group(command, camvid, tmp_path, monkeypatch):
    embedded, label_images, loss, groups = {}, c3semiseg.label_images, c3semiseg.c3_loss, []

    def spy_teacher(teacher, image):
        result = label_images(teacher, image)
        embedded[result[3].data_ptr()] = (image, result[3])  # kept: no other has its place
        return result

    def spy_loss(student, labeled, *others, **how):
        groups.append(labeled)
        return loss(student, labeled, *others, **how)

    monkeypatch.setattr(c3semiseg, "label_images", spy_teacher)
    monkeypatch.setattr(c3semiseg, "c3_loss", spy_loss)
    step_log(command, camvid, tmp_path / "run", "--group-size", 2, "--contrast-labeled", "teacher")
    assert groups
    for image, _, embedding in groups:
        assert torch.equal(embedded[embedding.data_ptr()][0], image)


@pytest.mark.parametrize("supervised", [False, True])
def test_labeled_views_are_the_student_s(command, camvid, tmp_path, monkeypatch, supervised):
    """The teacher's embeddings of the labeled images are those of their weak views."""
    seen, embedded, label_images = [], [], c3semiseg.label_images

    def darken(view, *_):
        return lambda seed, image: image * {"weak": 1.0, "jitter": 0.5, "strong": 0.25}[view]

    def spy(loss):
        return lambda student, labeled, *a, **k: (
            seen.append(labeled),
            loss(student, labeled, *a, **k),
        )[1]

    monkeypatch.setattr(c3semiseg, "randaugment", darken)
    for name in ("c3_loss", "warmup_loss"):
        monkeypatch.setattr(c3semiseg, name, spy(getattr(c3semiseg, name)))
    monkeypatch.setattr(
        c3semiseg,
        "label_images",
        lambda teacher, image: (embedded.append(image), label_images(teacher, image))[1],
    )
    flags = ("--contrast-labeled", "teacher", *["--supervised"] * supervised)
    step_log(command, camvid, tmp_path / "weak", *flags)
    steps = len(seen)
    embedded.clear()
    step_log(command, camvid, tmp_path / "half", *flags, "--labeled-view", "jitter")
    assert len(seen) == 2 * steps == 10
    for (weak, label, _), (dark, same, _) in zip(seen[:steps], seen[steps:], strict=True):
        assert torch.equal(dark, 0.5 * weak) and torch.equal(label, same)
    of_labeled = embedded[1::2]  # after those of the unlabeled ones
    assert len(of_labeled) == (0 if supervised else 3)  # steps after the warm-up
    for image, (weak, *_) in zip(of_labeled, seen[2:5], strict=not supervised):
        assert torch.equal(image, weak)


def test_labeled_images_alone_turn_last(command, camvid, tmp_path, monkeypatch):
    seen, loss = [], c3semiseg.c3_loss
    monkeypatch.setattr(
        c3semiseg, "c3_loss", lambda *a, **k: (seen.append([a[1][0], a[2][0]]), loss(*a, **k))[1]
    )
    flags = ("--student-view", "weak", "--crop", 32, 48)
    step_log(command, camvid, tmp_path / "first", *flags)
    step_log(command, camvid, tmp_path / "last", *flags, "--rotate-labeled-last")
    for (labeled, unlabeled), (turned, same) in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(unlabeled, same) and not torch.equal(labeled, turned)
    flags += ("--rotation", 0, "--scales", 0.75, 1.25)
    for name in ("--no-rotate-labeled-last", "--rotate-labeled-last"):  # flip and scale as before
        step_log(command, camvid, tmp_path / f"upright{name}", *flags, name)
    for one, other in zip(seen[6:9], seen[9:], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_unlabeled_images_may_keep_their_scale(command, camvid, tmp_path, monkeypatch):
    made, geometry = [], c3semiseg.scale_crop_flip
    monkeypatch.setattr(
        c3semiseg, "scale_crop_flip", lambda **how: (made.append(how), geometry(**how))[1]
    )
    flags = ("--scales", 0.75, 1.25, "--crop", 32, 48)
    step_log(command, camvid, tmp_path / "both", *flags)
    step_log(command, camvid, tmp_path / "labeled", *flags, "--no-scale-unlabeled")
    scales = [how["scales"] for how in made]  # of labeled and of unlabeled images
    assert scales == [(0.75, 1.25), (0.75, 1.25), (0.75, 1.25), (1.0,)]


@pytest.mark.parametrize("flags", [(), ("--supervised",)])
def test_replacement_is_for_both_sets(command, camvid, tmp_path, monkeypatch, flags):
    made, batches = [], run.Batches
    monkeypatch.setattr(run, "Batches", lambda *a, **k: made.append(batches(*a, **k)) or made[-1])
    step_log(command, camvid, tmp_path / "run", *flags, "--seed", 7, "--replacement")
    step_log(command, camvid, tmp_path / "usual", *flags)
    drawn = [(batch.seed, batch.stream, batch.replacement) for batch in made]
    assert drawn == [(7, 0, True), (7, 1, True), (0, 0, False), (0, 1, False)]


@pytest.mark.parametrize("supervised", [False, True])
def test_the_teacher_s_updates(command, camvid, tmp_path, monkeypatch, supervised):
    updates, update = [], c3semiseg.update_teacher
    monkeypatch.setattr(
        c3semiseg, "update_teacher", lambda *a, **k: (updates.append(k), update(*a, **k))[1]
    )
    flags = ["--supervised"] * supervised
    step_log(command, camvid, tmp_path / "run", "--ema-decay", 0.6, *flags)
    assert [how["decay"] for how in updates] == [0, 0, 0, 0.6, 0.6]
    last = "copy" if supervised else "keep"
    assert [how["buffers"] for how in updates] == ["copy"] * 3 + [last] * 2


def test_labeled_images_may_be_unlabeled_ones_too(command, camvid, tmp_path):
    args = (*ARGS, "--data-dir", camvid, "--iterations", 3, "--unlabeled")
    for which, unlabeled in (("rest", 4), ("all", 8)):
        status, printed, _ = command("c3semiseg", *args, which, "--output-dir", tmp_path / which)
        assert status == 0 and f"and {unlabeled} unlabeled of 8" in printed
    status, printed, _ = command("c3semiseg", "--resume", tmp_path / "all/last.pt")
    assert status == 0 and "and 8 unlabeled of 8" in printed


def test_contrast_of_many_classes_in_bounded_memory(monkeypatch):
    """150 classes of 4 images, few of them there: as with a slot for each."""
    label = randint(3, 4, 12, 16) * 70
    logits, embedding = randn(4, 150, 12, 16), randn(4, 8, 12, 16, seed=1)
    sizes, loss = [], c3semiseg.pixel_contrast_loss
    how = {"per_class": 10, "hard": True}
    monkeypatch.setattr(
        c3semiseg, "pixel_contrast_loss", lambda *a, **k: sizes.append(len(a[0])) or loss(*a, **k)
    )
    value = c3semiseg.contrast_loss(
        embedding, embedding, label, logits, temperature=0.15, generator=generator(), **how
    )
    index, chosen = c3semiseg.sample_pixels(
        label, logits.argmax(1), num_classes=150, generator=generator(), **how
    )
    f = embedding.movedim(1, 3).flatten(0, 2)[index]
    torch.testing.assert_close(value, loss(f, chosen, f, chosen, 0.15, exclude_self=True))
    assert sizes == [2560] and (chosen != 255).sum() == 4 * 3 * 10


def test_what_the_memory_has_no_room_for_is_drawn_from_all_images(monkeypatch):
    label, embedding = randint(19, 32, 24, 24), randn(32, 4, 24, 24)
    logits, counts, loss = randn(32, 19, 24, 24), [], c3semiseg.pixel_contrast_loss

    def spy(f, label, g, *others, **how):
        image = (embedding.movedim(1, 3).flatten(0, 2) @ f[label != 255].T).argmax(0) // 24**2
        counts.append(torch.bincount(image, minlength=32))
        return loss(f, label, g, *others, **how)

    monkeypatch.setattr(c3semiseg, "pixel_contrast_loss", spy)
    embedding = F.normalize(embedding, dim=1)
    how = {"temperature": 0.15, "per_class": 4, "generator": generator()}
    c3semiseg.contrast_loss(embedding, embedding, label, logits, **how)
    (count,) = counts
    assert count.sum() == 4 * 256 and count.min() > 0 and abs(count[:16].sum() - 512) < 100


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--batch-size", 4, "--group-size", 3, "--accumulate", 3), "cannot be split into 3"),
        (("--batch-size", 5, "--group-size", 4), "(--group-size)"),
        (("--scales", 0.5, 1.0), "--scales: needs --crop"),
        (("--warmup", 4), "--warmup 4"),
    ],
)
def test_bad_flags_are_one_line(command, camvid, tmp_path, flags, expected):
    args = (*ARGS, "--data-dir", camvid, "--iterations", 4, "--output-dir", tmp_path / "run")
    status, _, errors = command("c3semiseg", *args, *flags)
    assert status == 2 and errors.count("\n") == 1 and expected in errors
    assert not (tmp_path / "run").exists()
