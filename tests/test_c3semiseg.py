"""The method of c3semiseg.py against naive loops, closed forms and the laws of its random parts."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.testing import assert_close

import c3semiseg
from common import run
from common.augment import scale_crop_flip

TAU = 0.15
CITYSCAPES, BDD100K = (c3semiseg.RECIPES[name] for name in ("cityscapes", "bdd100k"))


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
    for side, length in ((rows, size[0]), (columns, size[1])):
        assert (F.pad(side.long(), (1, 1)).diff(dim=1).abs().sum(1) == 2).all()  # in one piece
        share = side.sum(1) / length
        assert 0.5 <= share.min() < 0.53 and 0.97 < share.max() <= 1
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


def test_cut_mix_by_hand():
    """Image a outside the box, where m = 1, and b inside. The second image is the complement."""
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
    assert torch.equal(sum(mixed.chunk(2)), sum(shuffled.chunk(2)))
    assert torch.equal(c3semiseg.cut_mix(box, mixed)[order.argsort()], batch)
    assert torch.equal(mixed, shuffled) == (mixing == "none")
    pixelwise = nn.Conv2d(3, 5, 1)  # what such a network returns can be un-mixed
    undone = c3semiseg.cut_mix(box, pixelwise(mixed))[order.argsort()]
    assert_close(undone, pixelwise(batch))


def pairs(mixing, n, seed=0):
    order, _ = c3semiseg.draw_pairs(mixing, n, (4, 4), generator=generator(seed))
    return list(zip(*order.view(2, n).tolist(), strict=True))


def test_pairs_of_both_sets_or_of_one():
    """Random partners: 4 of the 7 other images are in the other set."""
    crossing = [(a < 4) != (b < 4) for seed in range(1000) for a, b in pairs("cross", 4, seed)]
    assert abs(sum(crossing) / 4000 - 4 / 7) < 0.03
    assert all((a < 4) == (b < 4) for a, b in pairs("intra", 4))
    assert sum((a < 3) != (b < 3) for a, b in pairs("intra", 3)) == 1
    for mixing in ("cross", "intra"):
        assert sorted(itertools.chain(*pairs(mixing, 4))) == list(range(8))


# ---- Asymmetric augmentation (section 3.2) ----


def view(name, jitter=0.0, hue=0.0, **changes):
    """The colour view of this name, certain to do each of RandAugment's operations."""
    changes = {"operation_probability": 1.0, **changes}
    return c3semiseg.color_view(replace(CITYSCAPES, jitter=jitter, hue=hue, **changes), name)


def test_views_that_change_nothing_are_bit_exact():
    image = randint(256, 3, 3, 16, 24).float() / 255
    assert torch.equal(view("weak", 0.5, 0.25)(3, image), image)
    assert torch.equal(view("jitter")(3, image), image)
    assert torch.equal(view("strong", operation_probability=0.0)(3, image), image)


def test_strong_view_changes_only_colours():
    """An image of one colour keeps one, and a mirrored image gives the mirrored result."""
    color = (randint(256, 8, 3, 1, 1) / 255).expand(-1, -1, 12, 20)
    strong = view("strong", 0.5, 0.25)
    for seed in range(6):
        changed = strong(seed, color)
        assert changed.shape == color.shape and changed.min() >= 0 and changed.max() <= 1
        assert torch.equal(changed, changed[:, :, :1, :1].expand_as(changed))
    image, state = randint(256, 8, 3, 12, 20) / 255, torch.get_rng_state()
    changed = strong(1, image)
    assert torch.equal(strong(1, image.flip(-1)), changed.flip(-1))
    assert torch.equal(strong(1, image), changed) and not torch.equal(strong(2, image), changed)
    assert torch.equal(state, torch.get_rng_state())


def test_each_image_draws_its_own_operations():
    image = (randint(256, 1, 3, 12, 20) / 255).expand(24, -1, -1, -1)
    changed = view("strong", operation_probability=0.5)(0, image)
    same = (changed == image).flatten(1).all(1)
    assert 1 <= same.sum() <= 16 and len(changed.unique(dim=0)) > 6


def test_laws_of_the_drawn_operations():
    """P(none) = 1/4, one on average; half have magnitude 10, their mean is 9.80; uniform names."""
    torch.manual_seed(0)
    drawn = [c3semiseg.draw_operations(CITYSCAPES) for _ in range(8000)]
    counts = [len(image) for image in drawn]
    assert counts.count(0) / len(drawn) == pytest.approx(0.25, abs=0.02)
    assert sum(counts) / len(drawn) == pytest.approx(1, abs=0.03)
    names, strengths = zip(*itertools.chain(*drawn), strict=True)
    assert strengths.count(1) / len(strengths) == pytest.approx(0.5, abs=0.03)
    assert 10 * sum(strengths) / len(strengths) == pytest.approx(9.80, abs=0.02)
    assert len(c3semiseg.OPERATIONS) == 10
    for name in c3semiseg.OPERATIONS:
        assert names.count(name) / len(names) == pytest.approx(0.1, abs=0.015)
    low = replace(CITYSCAPES, operations=400, magnitude=0.1)
    assert min(strength for _, strength in c3semiseg.draw_operations(low)) == 0


def test_operations_by_hand():
    image = torch.tensor([0, 100, 127, 128, 200, 255], dtype=torch.uint8).expand(1, 3, 1, 6)

    def values(name, strength):
        return c3semiseg.OPERATIONS[name](image, strength)[0, 0, 0].tolist()

    assert values("invert", 0) == [255, 155, 128, 127, 55, 0]
    assert values("posterize", 1.0) == [0, 96, 112, 128, 192, 240]  # 4 bits
    assert values("posterize", 0.95) == [0, 96, 96, 128, 192, 224]  # 3 bits
    assert values("solarize", 1.0) == image[0, 0, 0].tolist()
    assert values("solarize", 0.5) == [0, 100, 127, 127, 55, 0]
    assert values("solarize-add", 1.0) == [110, 210, 237, 128, 200, 255]
    assert values("brightness", 1.0)[:3] == [0, 190, 241]
    assert values("color", 1.0) == image[0, 0, 0].tolist()  # grey stays
    assert values("auto-contrast", 0) == image[0, 0, 0].tolist()


@pytest.mark.parametrize("r", [0.6, 1.0])
def test_operations_equal_pillow_s(r):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture, image = Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)
    pillow = {
        name.lower(): getattr(ImageEnhance, name)(picture).enhance(1.8 * r + 0.1)
        for name in ("Color", "Contrast", "Brightness", "Sharpness")
    }
    pillow["equalize"] = ImageOps.equalize(picture)
    pillow["auto-contrast"] = ImageOps.autocontrast(picture)
    for name, expected in pillow.items():
        ours = c3semiseg.OPERATIONS[name](image, r).permute(1, 2, 0).numpy()
        gap = np.abs(ours.astype(int) - np.asarray(expected).astype(int))
        assert gap[1:-1, 1:-1].max() <= 2, name  # sharpness treats edges in its own way
        assert name == "auto-contrast" or (ours != pixels).mean() > 0.5, name


def test_the_jitter_view_changes_every_property():
    image = torch.from_numpy(np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32))
    hue, jitter = view("jitter", hue=0.25), view("jitter", 0.5)
    assert_close(hue(3, image).amax(1), image.amax(1), atol=0.02, rtol=0)  # same value
    assert (hue(3, image) - image).abs().amax((1, 2, 3)).min() > 0.1
    assert (jitter(3, image).amax(1) - image.amax(1)).abs().amax((1, 2)).min() > 0.02
    same = image[:1].expand(40, -1, -1, -1)
    assert len(jitter(3, same).unique(dim=0)) == 40  # each image draws anew
    # Brightness scales, contrast moves to the mean, saturation to the grey.
    dark = torch.full((40, 3, 8, 8), 0.2)  # grey images of one value: only brightness matters
    brightness = jitter(3, dark)[:, 0, 0, 0] / 0.2
    grey = dark.clone()
    grey[..., 4:] = 0.6  # contrast matters, too
    spread = jitter(3, grey)[:, 0, 0, [0, 7]].diff()[:, 0] / 0.4
    contrast = spread / brightness
    assert contrast.min() < 0.75 and contrast.max() > 1.25
    red = dark.clone()
    red[:, 0] = 0.4
    saturation = jitter(3, red)[:, [0, 1], 0, 0].diff()[:, 0] / -0.2 / spread
    assert saturation.min() < 0.75 and saturation.max() > 1.25


@pytest.mark.parametrize("size", [(60, 120), (120, 60)])
def test_rotation_leaves_void_where_it_fills(size):
    """Whole degrees from -10 to 10; the mean filled share is that of a 1:2 rectangle."""
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


def test_the_crop_comes_after_the_rotation():
    """A crop of half the size misses the corners more often than not."""
    how = {"rotation": 10, "crop": (40, 80), "flip": True, "mean": torch.zeros(3, 1, 1)}
    image, label = torch.full((3, 80, 160), 255, dtype=torch.uint8), torch.zeros(80, 160).byte()
    voids = [scale_crop_flip(**how)(seed, image, label)[1] == 255 for seed in range(120)]
    assert voids[0].shape == (40, 80)
    assert 40 < sum(not void.any() for void in voids) < 120


def test_image_and_label_turn_alike():
    label = (torch.arange(64).view(-1, 1) // 16 + 4 * (torch.arange(96) // 24)).byte()
    image = label.mul(15).expand(3, -1, -1).contiguous()
    how = {"rotation": 10, "scales": (0.75, 1.0, 1.25), "crop": (40, 48), "flip": True}
    geometry = scale_crop_flip(**how, mean=torch.zeros(3, 1, 1))
    for seed in range(20):
        turned, moved = geometry(seed, image, label)
        assert turned.shape == (3, 40, 48) and moved.shape == (40, 48)
        close = (turned[0].float() / 15 - moved.float()).abs() < 0.5
        assert close[moved != 255].float().mean() > 0.8


def test_one_of_the_scales():
    image, label = torch.zeros(3, 40, 80).byte(), torch.zeros(40, 80).byte()
    how = {"scales": (0.75, 1.0, 1.25), "crop": (60, 120), "flip": False}
    geometry = scale_crop_flip(**how, mean=torch.zeros(3, 1, 1))
    sizes = [(geometry(seed, image, label)[1] == 0).sum().item() for seed in range(90)]
    assert set(sizes) == {30 * 60, 40 * 80, 50 * 100}
    assert min(map(sizes.count, set(sizes))) > 15


# ---- Losses (equations 1 and 2) ----


def test_supervised_loss_by_hand():
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).repeat(2, 1, 1, 3).requires_grad_()
    label = torch.tensor([[[0, 1, 255]], [[1, 255, 255]]])  # probabilities 1/4 and 3/4
    loss = c3semiseg.supervised_loss(logits, label)
    assert loss.item() == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.abs().sum(1) > 0).equal(label != 255)
    void = c3semiseg.supervised_loss(logits, torch.full_like(label, 255))
    assert void == 0 and torch.autograd.grad(void, logits)[0].eq(0).all()


def test_consistency_loss_values():
    """The entropy over K where student and teacher agree; ln 19 / 19 for uniform ones."""
    z, everywhere = randn(2, 19, 4, 5).requires_grad_(), torch.ones(2, 4, 5).bool()
    prob = z.detach().softmax(1)
    loss = c3semiseg.consistency_loss(z, prob, everywhere)
    assert_close(loss, -(prob * prob.log()).sum(1).mean() / 19)
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-8
    flat = torch.full((2, 19, 4, 5), 1 / 19)
    value = c3semiseg.consistency_loss(torch.zeros(2, 19, 4, 5), flat, everywhere).item()
    assert value == pytest.approx(0.15497, abs=1e-5)
    assert 50 * value == pytest.approx(7.748, abs=1e-3)


def test_consistency_gradient():
    """mask (softmax z - p) / (19 #kept), exactly 0 elsewhere."""
    z, prob = randn(3, 19, 4, 5).requires_grad_(), (2 * randn(3, 19, 4, 5, seed=1)).softmax(1)
    mask = rand(3, 4, 5, seed=2) < 0.4
    mask[2] = False
    (gradient,) = torch.autograd.grad(c3semiseg.consistency_loss(z, prob, mask), z)
    assert_close(gradient, mask[:, None] * (z.softmax(1) - prob) / (19 * mask.sum()))
    assert gradient.movedim(1, 3)[~mask].eq(0).all()


def test_consistency_counts_only_kept_pixels():
    """More masked pixels, same value; keep = 1 masks nothing; no kept pixel: 0."""
    z, prob = randn(2, 5, 4, 6), (2 * randn(2, 5, 4, 6, seed=1)).softmax(1)
    left = torch.zeros(2, 4, 6).bool()
    left[:, :, :3] = True
    half = c3semiseg.consistency_loss(z[..., :3], prob[..., :3], left[..., :3])
    assert_close(c3semiseg.consistency_loss(z, prob, left), half)
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
    assert_close(*results)
    assert results[0][1][0].eq(0).all() and results[0][2][2].eq(0).all()  # void


@pytest.mark.parametrize(
    ("vectors", "c", "expected"),
    [
        (torch.eye(5), 480, 0.71516),  # orthogonal clusters: ln(1 + c exp(-1 / tau))
        (torch.eye(5), 2720, 2.24325),
        (torch.ones(5, 8), 480, 9.26380),  # a collapsed embedding: ln(1 + c)
        (torch.ones(5, 8), 2720, 11.86313),
    ],
)
def test_contrast_of_clusters(vectors, c, expected):
    """The published loss has a factor of 1.5 = tau / 0.1 before it; c is the negatives' number."""
    label = torch.arange(5).repeat_interleave(c // 4)
    for exclude_self in (False, True):
        value = contrast(vectors[label], label, exclude_self=exclude_self).item()
        assert 1.5 * value == pytest.approx(expected, abs=1e-4)


def test_contrast_of_one_class_or_none_is_0():
    for label in (torch.full((30,), 2), torch.full((30,), 255)):
        f = randn(30, 8).requires_grad_()
        loss = contrast(f, label, exclude_self=True)
        assert loss == 0 and torch.autograd.grad(loss, f)[0].eq(0).all()  # not NaN


def test_contrast_of_antipodal_and_random_vectors():
    label = torch.arange(2).repeat_interleave(60)
    value = contrast(torch.tensor([[1.0, 0], [-1, 0]])[label], label).item()
    assert value == pytest.approx(math.log(1 + 60 * math.exp(-2 / TAU)), rel=1e-3)
    label = torch.arange(10).repeat_interleave(80)
    value = contrast(randn(800, 256), label, exclude_self=True).item()
    assert value == pytest.approx(math.log(720) + 1 / (2 * 256 * TAU**2), abs=0.02)


def test_bounds_of_the_contrast():
    """Between 0 and ln(1 + c e^(2/tau))."""
    loss = contrast(randn(40, 3), torch.arange(4).repeat_interleave(10), exclude_self=True)
    assert 0 <= loss <= math.log(1 + 30 * math.exp(2 / TAU))
    # every anchor lies on its negatives
    f, label = torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    worst = contrast(f, label, g=f.flip(0)).item()
    assert worst == pytest.approx(math.log(1 + 2 * math.exp(1 / TAU)), rel=1e-4)


def test_symmetries_of_the_contrast():
    """Scale, joint rotation and order do not matter."""
    f, g, label = randn(30, 6), randn(30, 6, seed=1), randint(3, 30)
    turn, order = torch.linalg.qr(randn(6, 6, seed=2)).Q, torch.randperm(30, generator=generator(3))
    loss = partial(contrast, exclude_self=True)
    scaled = loss(f * (1 + rand(30, 1)), label, 7 * g)
    turned, moved = loss(f @ turn, label, g @ turn), loss(f[order], label[order], g[order])
    assert_close(torch.stack([scaled, turned, moved]), loss(f, label, g).expand(3))


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("per_class", [20, 7, 1])
def test_sample_pixels(hard, per_class):
    """Against counts by hand, over many random maps with rare, absent and void classes."""
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
        index, drawn = (x.view(batch, num_classes, per_class) for x in (index, drawn))
        for b, c in itertools.product(range(batch), range(num_classes)):
            of_class = (label[b] == c).flatten()
            wrong = (prediction[b] != label[b]).flatten()
            n_wrong = (of_class & wrong).sum().item()
            n_right = of_class.sum().item() - n_wrong
            if n_wrong + n_right <= per_class:
                assert drawn[b, c].eq(255).all()
                continue
            assert drawn[b, c].eq(c).all()
            place = index[b, c] - b * 9 * 16
            assert len(set(place.tolist())) == per_class and of_class[place].all()
            half = per_class // 2
            if hard and n_wrong >= half and n_right >= per_class - half:
                assert wrong[place].sum() == half
            elif hard:
                assert wrong[place].sum() == (n_wrong if n_wrong < half else per_class - n_right)


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


def test_an_image_with_fewer_pixels_than_a_sample():
    label = torch.zeros(2, 3, 3).long()
    index, drawn = c3semiseg.sample_pixels(label, label, 20, num_classes=4)
    assert drawn.eq(255).all() and index.shape == (160,) and index.max() < 18


def test_projection_head():
    head = c3semiseg.ProjectionHead(2048)
    assert sum(p.numel() for p in head.parameters()) == 590_336
    for convolution in (head[0], head[2]):
        assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.05)
    head = c3semiseg.ProjectionHead(6, 8)
    for parameter in head.parameters():
        parameter.data = randn(*parameter.shape)
    features, box = randn(4, 6, 4, 5), rand(2, 4, 5) < 0.5
    out = head(features)
    assert out.shape == (4, 8, 4, 5) and out.dtype == torch.float32
    assert_close(out.norm(dim=1), torch.ones(4, 4, 5))
    assert_close(c3semiseg.cut_mix(box, out), head(c3semiseg.cut_mix(box, features)))


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
        assert_close(regions.thresholds, expected, rtol=0, atol=1e-6)
        absent = torch.tensor([c for c in range(19) if not (pseudo_label == c).any()])
        if len(absent):  # bit-exact
            assert torch.equal(regions.thresholds[absent], thresholds[absent])
        thresholds = regions.thresholds.clone()
        assert torch.equal(mask, confidence >= thresholds[pseudo_label])  # inclusive, updated first
        assert torch.equal(mask, regions.confident(confidence, pseudo_label))


def test_a_batch_s_own_threshold_keeps_floor_s_n_plus_one():
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
    assert (torch.stack(shares).mean(0) - keep).abs().max() < 0.012  # in both classes


def test_void_leaves_the_thresholds_alone():
    confidence, label = rand(2, 20, 30), randint(3, 2, 20, 30, seed=1)
    void = rand(2, 20, 30, seed=2) < 0.4
    regions, other = (c3semiseg.ConfidentRegions(3, momentum=0.0) for _ in range(2))
    mask = regions.update(confidence, label.masked_fill(void, 255))
    other.update(confidence[~void][None, None], label[~void][None, None])
    assert torch.equal(regions.thresholds, other.thresholds)
    assert 0.79 < mask[~void].float().mean() < 0.81


def test_a_constant_threshold_is_reached_as_a_geometric_series():
    regions = c3semiseg.ConfidentRegions(2)
    for t in range(1, 40):
        regions.update(torch.full((1, 2, 3), 0.5), torch.zeros(1, 2, 3).long())
        assert regions.thresholds[0].item() == pytest.approx(0.5 + 0.4 * 0.9**t, abs=1e-5)
    assert regions.thresholds[1].item() == pytest.approx(0.9)


# ---- The terms of equation 7 ----


class Stub(nn.Module):
    """Logits and embeddings of a small convolution."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Conv2d(3, 8, 3, padding=1)
        self.classifier, self.projection = nn.Conv2d(8, 4, 1), c3semiseg.ProjectionHead(8, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.8)

    def forward(self, image):
        features = F.avg_pool2d(self.trunk(image).relu(), 2)
        logits = F.interpolate(self.classifier(features), image.shape[2:], mode="nearest")
        return logits, self.projection(features)


def sampled_contrast(seed=None, **changes):
    rng = None if seed is None else generator(seed)
    return partial(c3semiseg.contrast_loss, **{"per_class": 3, "generator": rng, **changes})


def group(n=2, size=(12, 16)):
    """Labeled and unlabeled part of a group, with a teacher's labels."""
    image_l, image_u, strong = (rand(n, 3, *size, seed=seed) for seed in range(3))
    label_l = randint(5, n, *size, seed=3)
    label_l[label_l == 4] = 255
    prob, confidence, pseudo_label, embedding = c3semiseg.label_images(Stub(21), image_u)
    assert torch.equal(pseudo_label, prob.argmax(1)) and torch.equal(confidence, prob.amax(1))
    assert not prob.requires_grad and not embedding.requires_grad
    label_u = pseudo_label.masked_fill(confidence < 0.5, 255)
    assert 0.1 < (label_u == 255).float().mean() < 0.9
    return (image_l, label_l), (strong, prob, label_u, embedding)


def naive_sampled_contrast(f, g, label, logits, seed):
    prediction = F.avg_pool2d(logits, 2).argmax(1)
    index, drawn = c3semiseg.sample_pixels(
        label[:, ::2, ::2], prediction, 3, num_classes=4, generator=generator(seed)
    )
    assert (drawn != 255).sum() > 10
    f, g = (e.permute(0, 2, 3, 1).reshape(-1, 5)[index] for e in (f, g))
    return naive_contrast(f, drawn, g, drawn, TAU, True)


def naive_c3(student, labeled, unlabeled, order, box, sets, seed):
    """The terms pixel by pixel, and the mixed images in the places of the labeled ones."""
    (image_l, label_l), (strong, prob, label_u, g_u) = labeled, unlabeled
    n, batch = len(image_l), torch.cat([image_l, strong])
    place = order.argsort().tolist()

    def source(k, y, x):  # the partner inside the box
        return (k + n * int(box[k % n, y, x])) % (2 * n)

    mixed = torch.empty_like(batch)
    for k, y, x in itertools.product(range(2 * n), *map(range, batch.shape[2:])):
        mixed[k, :, y, x] = batch[order[source(k, y, x)], :, y, x]
    logits, embedding = student(mixed)

    def unmixed(maps, step):
        out = torch.empty_like(maps)
        for image, y, x in itertools.product(range(2 * n), *map(range, maps.shape[2:])):
            out[image, :, y, x] = maps[source(place[image], y * step, x * step), :, y, x]
        return out

    logits, f = unmixed(logits, 1), unmixed(embedding, 2)
    log_prob, label = logits.log_softmax(1), torch.cat([label_l, label_u])
    losses = torch.zeros(2 * n, *label.shape[1:])
    for k, y, x in itertools.product(*map(range, label.shape)):
        if label[k, y, x] != 255:
            target = F.one_hot(label[k, y, x], 4) if k < n else prob[k - n, :, y, x] / 4
            losses[k, y, x] = -(target * log_prob[k, :, y, x]).sum()
    of_l, of_u, of_both = slice(0, n), slice(n, 2 * n), slice(0, 2 * n)
    g = torch.cat([f[:n] if sets == "labeled" else f[:n].detach(), g_u])
    terms = {"loss_l": losses[of_l].sum() / (label_l != 255).sum()}
    terms["loss_u"] = losses[of_u].sum() / (label_u != 255).sum()
    part = {"labeled": of_l, "unlabeled": of_u, "both": of_both}[sets]
    terms["loss_c"] = naive_sampled_contrast(f[part], g[part], label[part], logits[part], seed)
    return terms, mixed[place[:n]]


@pytest.mark.parametrize("mixing", ["cross", "intra"])
@pytest.mark.parametrize("sets", ["both", "labeled", "unlabeled"])
def test_c3_loss_equals_naive_loss(mixing, sets):
    """Also in its gradients: nothing reaches the teacher, or labeled pixels as others' contrast."""
    labeled, unlabeled = group()
    pair = c3semiseg.draw_pairs(mixing, 2, (12, 16), generator=generator(5))
    student, twin = Stub(1), Stub(1)
    how = {"contrast": sampled_contrast(7), "sets": sets}
    terms, details = c3semiseg.c3_loss(student, labeled, unlabeled, *pair, **how)
    expected, mixed = naive_c3(twin, labeled, unlabeled, *pair, sets, 7)
    assert_close(terms, expected)
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    assert_close([p.grad for p in student.parameters()], [p.grad for p in twin.parameters()])
    assert torch.equal(details["mixed_image"], mixed)
    assert torch.equal(details["pseudo_label"], unlabeled[2])
    assert not any(value.requires_grad for value in details.values())
    terms, _ = c3semiseg.c3_loss(student, labeled, unlabeled, *pair)
    assert list(terms) == ["loss_l", "loss_u"]


def test_warmup_loss_contrasts_student_with_student():
    (image, label), student = group()[0], Stub(2)
    terms, details = c3semiseg.warmup_loss(student, image, label, contrast=sampled_contrast(1))
    logits, embedding = student(image)
    expected = naive_sampled_contrast(embedding, embedding, label, logits, 1)
    assert_close(terms, {"loss_l": c3semiseg.supervised_loss(logits, label), "loss_c": expected})
    head = list(student.projection.parameters())  # the gradient reaches both sides
    losses = (terms["loss_c"], expected)
    assert_close(*(torch.autograd.grad(loss, head) for loss in losses))
    assert torch.equal(details["prediction"], logits)
    assert list(c3semiseg.warmup_loss(student, image, label)[0]) == ["loss_l"]


def test_road_can_be_left_out():
    f, label, logits = randn(2, 5, 4, 4), randint(2, 2, 8, 8), randn(2, 2, 8, 8)
    assert sampled_contrast()(f, f, label, logits) > 0
    assert sampled_contrast(first_class=1)(f, f, label, logits) == 0  # one class left


def test_contrast_where_most_classes_are_absent():
    """The loss of 4 images with 3 of 150 classes does not depend on the limit to 256 groups."""
    label = randint(3, 4, 12, 16) * 70
    logits, f = randn(4, 150, 12, 16), randn(4, 8, 12, 16, seed=1)
    value = sampled_contrast(0, per_class=10)(f, f, label, logits)
    index, chosen = c3semiseg.sample_pixels(
        label, logits.argmax(1), 10, num_classes=150, generator=generator()
    )
    assert (chosen != 255).sum() == 4 * 3 * 10
    f = f.movedim(1, 3).flatten(0, 2)[index]
    assert_close(value, contrast(f, chosen, exclude_self=True))


def test_a_contrast_of_too_many_groups_uses_pixels_of_all_images():
    """32 images with 19 classes make 608 groups. The gradient shows the anchors of 256."""
    label, logits = randint(19, 32, 24, 24), randn(32, 19, 24, 24)
    f, g = randn(32, 4, 24, 24).requires_grad_(), randn(32, 4, 24, 24)
    sampled_contrast(0, per_class=4)(f, g, label, logits).backward()
    count = f.grad.abs().sum(1).ne(0).sum((1, 2))
    assert count.sum() == 4 * 256 and count.min() > 0 and abs(count[:16].sum() - 512) < 100


def test_labels_at_another_size():
    label, box = randint(19, 2, 256, 512), c3semiseg.box_mask(2, (256, 512))
    row, column = (torch.arange(n) * size // n for n, size in ((33, 256), (65, 512)))
    for values in (label, box):
        small = c3semiseg.resize_nearest(values, (33, 65))
        assert small.dtype == values.dtype and torch.equal(small, values[:, row][:, :, column])


def test_weights_of_equation_7():
    steps = (0, 500, 1000, 2000, 3000, 4000, 22_499)
    weights = [c3semiseg.loss_weights(CITYSCAPES, 2500 + t) for t in steps]
    expected = [0.3369, 1.0875, 3.0027, 14.3252, 36.5808, 50, 50]
    assert [w["loss_u"] for w in weights] == pytest.approx(expected, rel=2e-4)
    assert all(w["loss_l"] == 1 and w["loss_c"] == pytest.approx(0.15) for w in weights)
    early = [c3semiseg.loss_weights(CITYSCAPES, t)["loss_c"] for t in (0, 125, 250)]
    ramp = [0.0067379, 0.2865048, 1]
    assert early == pytest.approx([0.15 * r for r in ramp], rel=1e-4)
    paper = replace(CITYSCAPES, warmup_contrast=False, contrast_ramp=5000)
    late = [c3semiseg.loss_weights(paper, t)["loss_c"] for t in (0, 2499, 2500, 25_000)]
    assert late == pytest.approx([0, 0, 0.15 * ramp[1], 0.15], rel=1e-4)


def test_alpha_of_each_step():
    steps = (0, 2499, 2500, 2501, 2502, 2523, 2524, 25_000)
    alpha = [c3semiseg.teacher_decay(CITYSCAPES, step) for step in steps]
    assert alpha == [0, 0, 0, 0.99, 0.99, 0.99, 0.99, 0.99]
    warm = replace(CITYSCAPES, ema_warm_start=True)
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
    contrast = sampled_contrast()
    for mixing, sets in itertools.product(("cross", "intra"), ("both", "labeled", "unlabeled")):
        pair = c3semiseg.draw_pairs(mixing, 2, (8, 8), device=image.device)
        how = {"contrast": contrast, "sets": sets}
        terms, _ = c3semiseg.c3_loss(student, (image, label), unlabeled, *pair, **how)
        sum(terms.values()).backward()
    terms, _ = c3semiseg.warmup_loss(student, image, label, contrast=contrast)
    sum(terms.values()).backward()


# ---- Network and recipes ----


def test_network_of_the_paper():
    net = c3semiseg.network(CITYSCAPES, 19, pretrained=True)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert count["classifiers"] == 1_400_908 and count["projection"] == 590_336
    trained = [p.numel() for p in net.parameters() if p.requires_grad]
    fixed = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert fixed == 105_344 and len(trained) == 104 + 8 + 4
    assert sum(trained) == 42_500_160 - 105_344 + 1_400_908 + 590_336
    backbone, heads = net.parameter_groups(1.2e-4, 1.0)
    assert len(backbone["params"]) == 104 and len(heads["params"]) == 12
    for mode in (net, net.train()):  # from the first step on
        assert not any(m.training for m in mode.modules() if isinstance(m, nn.BatchNorm2d))


def tiny_network(num_classes, pretrained=True, **changes):
    small = {"layers": (1, 1, 1, 1), "width": 4, "embedding": 6, "aspp_rates": (1, 2)}
    recipe = replace(CITYSCAPES, **small, **changes)
    return c3semiseg.network(recipe, num_classes, pretrained=pretrained)


def test_forward_gives_what_both_heads_give():
    net, image = tiny_network(5), rand(2, 3, 256, 512)
    logits, embedding = net(image)
    assert logits.shape == (2, 5, 256, 512) and embedding.shape == (2, 6, 33, 65)
    features = net.features(image)
    assert_close(logits, net.classify(features, (256, 512)))
    first, relu, second = net.projection
    assert isinstance(relu, nn.ReLU)
    assert_close(embedding, F.normalize(second(first(features).relu()), dim=1))
    (gradient,) = torch.autograd.grad((embedding * randn(*embedding.shape)).sum(), net.conv1.weight)
    assert gradient.abs().sum() > 0  # the contrast trains the backbone, too
    assert tiny_network(5, contrast="none").projection is None


PAPER = {
    "keep": 0.8, "threshold_momentum": 0.9, "initial_threshold": 0.9, "lr": 1.2e-4, "lr_power": 0.9,
    "ema_decay": 0.99, "temperature": 0.15, "per_class": 20, "embedding": 256,
    "consistency_weight": 50, "consistency_ramp": 4_000, "contrast_weight": 0.15,
    "contrast_ramp": 250, "jitter": 0.5, "hue": 0.25, "rotation": 10, "flip": True,
    "operations": 2, "operation_probability": 0.5, "magnitude": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "own"),
    [
        (CITYSCAPES, ((512, 1024), (256, 512), (1,), 16, 4, 25_000, 2_500)),
        (BDD100K, ((720, 1280), (512, 512), (0.75, 1, 1.25), 8, 2, 20_000, 5_000)),
    ],
)
def test_recipes_have_the_paper_s_numbers(recipe, own):
    names = ("size", "crop", "scales", "batch_size", "group_size", "iterations", "warmup")
    assert tuple(getattr(recipe, name) for name in names) == own
    assert {name: getattr(recipe, name) for name in PAPER} == PAPER


# ---- Training ----


ARGS = ("--weights", "none", "--layers", 1, 1, 1, 1, "--width", 4, "--aspp-rates", 1, 2)
ARGS += ("--dataset", "camvid", "--labeled", 4, "--size", 48, 64, "--workers", 0, "--lr", 3e-3)
ARGS += ("--backbone-factor", 1, "--embedding", 8, "--per-class", 3, "--batch-size", 4)
ARGS += ("--warmup", 2, "--consistency-ramp", 2, "--contrast-ramp", 1, "--iterations", 5)
ARGS += ("--initial-threshold", 0.2, "--threshold-momentum", 0.3)


@pytest.fixture
def trained(command, camvid, tmp_path):
    """trained(name, flag, value, ...) trains and returns a folder; 5 steps if no flag says so."""

    def call(name, *flags):
        args = (*ARGS, "--data-dir", camvid, "--output-dir", tmp_path / name, *flags)
        status, _, errors = command("c3semiseg", *args)
        assert (status, errors) == (0, "")
        return tmp_path / name

    return call


def steps_of(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss_l" in entry]


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)["state"]


def test_checkpoints_with_and_without_a_head(trained, command, tmp_path, monkeypatch):
    """The head is dropped at the end (section 3.5). A run resumed before then ends the same."""
    out, half, save = tmp_path / "run", tmp_path / "half", run.Session._save

    def save_and_copy(session, done):
        save(session, done)
        if session.folder == out and done == 10:
            shutil.copytree(out, half, dirs_exist_ok=True)

    monkeypatch.setattr(run.Session, "_save", save_and_copy)
    flags = ("--iterations", 20, "--eval-every", 10, "--save-every", 10, "--group-size", 2)
    steps = steps_of(trained("run", *flags))
    assert {"loss_u", "loss_c", "confident", "lr"} <= set(steps[-1])
    assert steps[-1]["loss_l"] < steps[0]["loss_l"]
    assert json.loads((out / "result.json").read_text())["headline"] == "student"
    assert {p.name for p in (out / "samples").iterdir()} == {"000010.png", "000020.png"}
    config = json.loads((out / "config.json").read_text())
    assert config["args"]["accumulate"] == 1  # more ranks may continue with fewer groups each
    picture = tmp_path / "photo.png"
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(picture)
    for folder, with_head in ((out, False), (half, True)):
        for network in ("student", "teacher"):
            names = state_of(folder)[network]
            assert any(name.startswith("projection") for name in names) == with_head
        status, printed, errors = command("c3semiseg", "--evaluate", folder / "last.pt")
        assert (status, errors) == (0, "") and "mIoU" in printed
        argv = ("--predict", folder / "last.pt", picture, "--out", tmp_path / f"p{with_head}")
        assert command("c3semiseg", *argv)[0] == 0
    status, printed, _ = command("c3semiseg", "--resume", out / "last.pt")
    assert status == 0 and "finished already" in printed
    assert command("c3semiseg", "--resume", half / "last.pt")[0] == 0
    assert_close(state_of(half), state_of(out), rtol=0, atol=0)
    trained("next", "--weights", out / "last.pt")  # its new head stays as initialised


CHANGES = """--mixing intra | --mixing none | --teacher-view strong | --student-view weak
--student-view jitter | --jitter 0.1 --hue 0 | --operations 1 | --operation-probability 0.9
--magnitude 1 | --consistency-weight 5 | --consistency-ramp 9 | --contrast-weight 3
--contrast-ramp 60 | --contrast labeled | --contrast unlabeled | --no-contrast-road
--per-class 5 | --no-hard-sampling | --temperature 0.5 | --embedding 5 | --keep 0.3 | --keep 1
--threshold-momentum 0.1 | --initial-threshold 0.4 | --rotation 0 | --no-flip | --crop 32 48
--group-size 2 | --scales 0.75 1.25 --crop 32 48 | --ema-decay 0.1 | --ema-warm-start | --warmup 1
--backbone-factor 0.1 | --no-warmup-contrast"""


@pytest.fixture(scope="module")
def usual():
    return {}


@pytest.mark.parametrize("flags", CHANGES.replace("\n", " | ").split(" | "))
def test_every_flag_reaches_the_step(trained, usual, flags):
    if not usual:
        usual.update(steps_of(trained("usual"))[-1])
    changed = steps_of(trained("run", *flags.split()))[-1]
    names = ("loss_l", "loss_u", "loss_c", "confident")
    assert all(math.isfinite(changed[name]) for name in names)
    assert any(changed[name] != usual[name] for name in names)
    if flags == "--keep 1":  # the corners of rotated images count, too
        assert changed["confident"] == 1


def test_rows_of_table_3(trained, command, camvid, tmp_path):
    log = {"loss_l", "iteration", "lr", "seconds"}
    assert set(steps_of(trained("base", "--supervised"))[-1]) == log
    assert not any(name.startswith("projection") for name in state_of(tmp_path / "base")["student"])
    log |= {"loss_u", "confident"}
    assert set(steps_of(trained("no_c", "--contrast", "none"))[-1]) == log
    log |= {"loss_c"}
    assert set(steps_of(trained("no_u", "--consistency-weight", 0))[-1]) == log


class Watch(run.Session):
    """Keeps the batches that it hands out, what is logged, and the networks after each step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.handed_out, self.logged, self.pictures = ([], []), [], []
        self.states = [self.copy_state()]
        Watch.last = self

    def copy_state(self):
        names = ("student", "teacher", "regions")
        return {
            name: {key: value.clone() for key, value in self.state[name].state_dict().items()}
            for name in names
        }

    def batches(self, indices, transform, *, stream, start):
        assert indices == self.split[stream]
        for batch in super().batches(indices, transform, stream=stream, start=start):
            self.handed_out[stream].append(batch)
            yield batch

    def log(self, values):
        self.logged.append(values)
        super().log(values)

    def end_step(self, iteration, pictures):
        self.states.append(self.copy_state())
        self.pictures.append(pictures)
        super().end_step(iteration, pictures)


@pytest.mark.parametrize("supervised", [False, True])
def test_each_step_is_that_of_a_plain_loop(trained, monkeypatch, supervised):
    """Two groups of two images a step. Nothing that is drawn matters without mixing and colours."""
    seeds, step_seed = [], run.step_seed
    monkeypatch.setattr(run, "step_seed", lambda *of: seeds.append(step_seed(*of)) or seeds[-1])
    monkeypatch.setattr(c3semiseg, "train", partial(c3semiseg.train, make_session=Watch))
    flags = "--group-size 2 --ema-decay 0.6 --mixing none --contrast none --student-view weak"
    trained("run", *flags.split(), "--iterations", 6, *["--supervised"] * supervised)
    session = Watch.last
    assert not set(session.split[0]) & set(session.split[1]) and len(session.split[1]) == 4
    assert len(set(seeds)) == len(seeds) == 6 * 2 + (0 if supervised else 4 * 2 * 2)
    student, teacher = (tiny_network(11, False, contrast="none") for _ in range(2))
    student.load_state_dict(session.states[0]["student"])
    adam = torch.optim.Adam(student.parameters())
    parameters, confident = dict(student.named_parameters()), []
    for t, alpha in enumerate([0, 0, 0, 0.6, 0.6, 0.6]):
        before, after = session.states[t : t + 2]
        semi = not supervised and t >= 2
        # The teacher comes first; as soon as it labels, its batch-norm statistics are its own.
        statistics = before["teacher" if semi and t > 2 else "student"]
        average = {
            name: alpha * before["teacher"][name] + (1 - alpha) * before["student"][name]
            for name in parameters
        }
        teacher.load_state_dict({**statistics, **average})
        if semi:
            images_u = [image for image, _ in session.handed_out[1][2 * t - 4 : 2 * t - 2]]
            labels = [c3semiseg.label_images(teacher, image) for image in images_u]
            confidence, label_u = (torch.cat([label[i] for label in labels]) for i in (1, 2))
            thresholds = before["regions"]["thresholds"]
            thresholds = naive_thresholds(thresholds, confidence, label_u, 0.8, 0.3)
            assert_close(after["regions"]["thresholds"], thresholds)
            label_u[confidence < thresholds[label_u]] = 255
            confident.append((label_u != 255).float().mean())
            assert 0.5 < confident[-1] < 1
            assert torch.equal(session.pictures[t]["pseudo_label"], label_u[2:])
        assert_close(after["teacher"], teacher.state_dict())
        for k, (image_l, label_l) in enumerate(session.handed_out[0][2 * t : 2 * t + 2]):
            if semi:
                logits, _ = student(torch.cat([image_l, images_u[k]]))
                kept, prob = label_u[2 * k : 2 * k + 2] != 255, labels[k][0]
                ramp = math.exp(-5 * (1 - min(1, (t - 2) / 2)) ** 2)
                loss = 50 * ramp * c3semiseg.consistency_loss(logits[2:], prob, kept)
            else:
                logits, loss = student(image_l)[0], 0.0
            loss = loss + F.cross_entropy(logits[:2], label_l, ignore_index=255)
            (loss / 2).backward()
        adam.param_groups[0]["lr"] = 3e-3 * (1 - t / 6) ** 0.9
        adam.step()
        adam.zero_grad()
        assert_close(after["student"], student.state_dict(), rtol=1e-4, atol=1e-5)
        mixed = session.pictures[t].get("mixed_image", image_l)
        assert torch.equal(mixed, image_l)  # no colours change in labeled images
    logged = [values["confident"] for values in session.logged if "confident" in values]
    assert_close(logged, confident)


def test_frozen_batch_norm_stays_as_loaded(trained, tmp_path):
    net = tiny_network(11, pretrained=False)
    for name, value in net.named_parameters():
        if "bn" in name or "downsample.1" in name:
            value.data.add_(0.3 * torch.randn(value.shape))
    torch.save(net.state_dict(), tmp_path / "w.pth")
    states = state_of(trained("run", "--weights", tmp_path / "w.pth"))
    for state in (states["student"], states["teacher"]):
        for name, value in net.state_dict().items():
            if "bn" in name or "downsample.1" in name:
                assert torch.equal(state[name], value), name
            elif name == "conv1.weight":
                assert not torch.equal(state[name], value)


def test_rates_and_schedule(trained):
    folder = trained("run", "--backbone-factor", 0.3, "--iterations", 20)
    backbone, heads = state_of(folder)["optimizer"]["param_groups"]
    assert backbone["initial_lr"] == pytest.approx(9e-4) and heads["initial_lr"] == 3e-3
    assert backbone["weight_decay"] == heads["weight_decay"] == 0
    rates = {entry["iteration"]: entry["lr"] for entry in steps_of(folder)}
    assert rates[20] == 0 and len(rates) > 1
    for iteration, rate in rates.items():
        assert rate == pytest.approx(9e-4 * (1 - iteration / 20) ** 0.9, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--batch-size 4 --group-size 3 --accumulate 3", "cannot be split into 3"),
        ("--batch-size 5 --group-size 4", "--batch-size 5: cannot be split into 2"),
        ("--scales 0.5 1.0", "--scales: needs --crop"),
        ("--warmup 5", "5 of them are warm-up: raise --iterations or lower --warmup"),
    ],
)
def test_bad_flags_are_one_line(command, camvid, tmp_path, flags, expected):
    args = (*ARGS, "--data-dir", camvid, "--output-dir", tmp_path / "run", "--labeled", 3)
    status, _, errors = command("c3semiseg", *args, *flags.split())
    assert status == 2 and errors.count("\n") == 1 and expected in errors
    assert not (tmp_path / "run").exists()
