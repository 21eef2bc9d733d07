"""The method of c3semiseg.py against naive loops, closed forms and the laws of its random parts."""

import copy
import itertools
import math
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from conftest import read_log, read_state, stopping_train, tiny
from torch import nn
from torch.testing import assert_close
from torchvision.transforms import v2

import c3semiseg
from common import ranks, run
from common.augment import scale_crop_flip, seeded

CITYSCAPES, BDD100K = (c3semiseg.RECIPES[name] for name in ("cityscapes", "bdd100k"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- Cross-set CutMix (equation 4) ----


def test_box_is_one_rectangle_of_half_the_area():
    size = 256, 512
    box, again = (c3semiseg.box_mask(200, size, generator=generator()) for _ in range(2))
    assert box.dtype == torch.bool and box.shape == (200, *size) and torch.equal(box, again)
    rows, columns = box.any(2), box.any(1)
    assert torch.equal(box, rows[:, :, None] & columns[:, None, :])
    for side, length in ((rows, size[0]), (columns, size[1])):
        assert (F.pad(side.long(), (1, 1)).diff(dim=1).abs().sum(1) == 2).all()  # in one piece
        share = side.sum(1) / length
        assert 0.5 <= share.min() < 0.53 and 0.97 < share.max() <= 1
    assert (box.double().mean((1, 2)) - 0.5).abs().max() < 0.003


def test_box_heights_are_log_uniform_and_places_uniform():
    box = c3semiseg.box_mask(4000, (64, 64))
    height = box.any(2).sum(1)
    assert abs((height <= 64 * 0.5**0.5).float().mean() - 0.5) < 0.04
    half = box[(height > 40) & (height < 56)]
    top, left = (half.any(d).long().argmax(1) / (64 - half.any(d).sum(1)) for d in (2, 1))
    for place in (top, left):
        assert abs(place.mean() - 0.5) < 0.03 and place.min() == 0 and place.max() == 1
    assert abs(torch.stack([top, left]).corrcoef()[0, 1]) < 0.08


@pytest.mark.parametrize("mixing", ["cross", "intra", "none"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_cut_mix_undoes_itself(mixing, n):
    batch = torch.randint(256, (2 * n, 3, 8, 16)).float()
    order, box = c3semiseg.draw_pairs(mixing, n, (8, 16), generator())
    shuffled = batch[order]
    mixed = c3semiseg.cut_mix(box, shuffled)
    assert torch.equal(c3semiseg.cut_mix(box, mixed)[order.argsort()], batch)
    assert torch.equal(c3semiseg.un_mix(box, order, mixed), batch)
    assert torch.equal(mixed, shuffled) == (mixing == "none")


def pairs(mixing, n, seed=0):
    order, _ = c3semiseg.draw_pairs(mixing, n, (4, 4), generator(seed))
    return list(zip(*order.view(2, n).tolist(), strict=True))


def test_pairs_of_both_sets_or_of_one():
    """Random partners: 4 of the 7 other images are in the other set."""
    crossing = [(a < 4) != (b < 4) for seed in range(1000) for a, b in pairs("cross", 4, seed)]
    assert abs(sum(crossing) / 4000 - 4 / 7) < 0.03
    assert all((a < 4) == (b < 4) for a, b in pairs("intra", 4))
    assert sum((a < 3) != (b < 3) for a, b in pairs("intra", 3)) == 1


# ---- Asymmetric augmentation (section 3.2) ----


def view(name, jitter=0.0, hue=0.0, **changes):
    """The colour view of this name, certain to do each of RandAugment's operations."""
    changes = {"operation_probability": 1.0, **changes}
    recipe = replace(CITYSCAPES, jitter=jitter, hue=hue, **changes)
    return lambda seed, image: c3semiseg.color_view(recipe, name, [seed], image)


def test_views_that_change_nothing_are_bit_exact():
    image = torch.randint(256, (3, 3, 16, 24)).float() / 255
    assert torch.equal(view("weak", 0.5, 0.25)(3, image), image)
    assert torch.equal(view("jitter")(3, image), image)
    assert torch.equal(view("strong", operation_probability=0.0)(3, image), image)


def test_strong_view_changes_only_colours():
    """An image of one colour keeps one, and a mirrored image gives the mirrored result."""
    color = (torch.randint(256, (8, 3, 1, 1)) / 255).expand(-1, -1, 12, 20)
    strong = view("strong", 0.5, 0.25)
    for seed in range(6):
        changed = strong(seed, color)
        assert changed.shape == color.shape and changed.min() >= 0 and changed.max() <= 1
        assert torch.equal(changed, changed[:, :, :1, :1].expand_as(changed))
    image, state = torch.randint(256, (8, 3, 12, 20)) / 255, torch.get_rng_state()
    changed = strong(1, image)
    assert torch.equal(strong(1, image.flip(-1)), changed.flip(-1))
    assert torch.equal(strong(1, image), changed) and not torch.equal(strong(2, image), changed)
    assert torch.equal(state, torch.get_rng_state())


def test_each_image_draws_its_own_operations():
    image = (torch.randint(256, (1, 3, 12, 20)) / 255).expand(24, -1, -1, -1)
    changed = view("strong", operation_probability=0.5)(0, image)
    same = (changed == image).flatten(1).all(1)
    assert 1 <= same.sum() <= 16 and len(changed.unique(dim=0)) > 6


def test_laws_of_the_drawn_operations():
    """P(none) = 1/4; half have magnitude 10, their mean is 9.80; uniform names."""
    drawn = [c3semiseg.draw_operations(CITYSCAPES) for _ in range(8000)]
    assert drawn.count([]) / len(drawn) == pytest.approx(0.25, abs=0.02)
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
        operation = c3semiseg.OPERATIONS[name](strength)
        return c3semiseg.recolor(image.float(), [[operation]])[0, 0, 0].tolist()

    assert values("invert", 0) == [255, 155, 128, 127, 55, 0]
    assert values("posterize", 1.0) == [0, 96, 112, 128, 192, 240]  # 4 bits
    assert values("posterize", 0.95) == [0, 96, 96, 128, 192, 224]  # 3 bits
    assert values("solarize", 1.0) == image[0, 0, 0].tolist()
    assert values("solarize", 0.5) == [0, 100, 127, 127, 55, 0]
    assert values("solarize-add", 1.0) == [110, 210, 237, 128, 200, 255]


TORCHVISION = {
    "auto-contrast": lambda image, _: TF.autocontrast(image),
    "equalize": lambda image, _: TF.equalize(image),
    "invert": lambda image, _: TF.invert(image),
    "posterize": lambda image, r: TF.posterize(image, int(4 * r)),
    "solarize": lambda image, r: torch.where(image.int() >= int(256 * r), 255 - image, image),
    "solarize-add": lambda image, r: torch.where(image < 128, image + int(110 * r), image),
    "color": lambda image, r: TF.adjust_saturation(image, 1.8 * r + 0.1),
    "contrast": lambda image, r: TF.adjust_contrast(image, 1.8 * r + 0.1),
    "brightness": lambda image, r: TF.adjust_brightness(image, 1.8 * r + 0.1),
    "sharpness": lambda image, r: TF.adjust_sharpness(image, 1.8 * r + 0.1),
}


def photo(batch):
    """Smooth colours, some of them grey, and pure ones: uint8 (B,3,24,32)."""
    image = TF.resize(torch.rand(batch, 3, 5, 6), [24, 32]).mul(255).byte()
    image[:, :, :3] = image[:, :1, :3]
    image[:, :, -1] = 240 * torch.randint(2, (3, 32)).byte()
    return image


@pytest.mark.parametrize("name", list(TORCHVISION))
def test_an_operation_is_torchvision_s_image_by_image(name):
    """Each image has its strength. Where rounding differs, a colour of 8 bits may differ by 1."""
    image, strengths = photo(9), torch.linspace(0, 1, 9).tolist()
    ours = c3semiseg.recolor(image.float(), [[c3semiseg.OPERATIONS[name](r)] for r in strengths])
    theirs = [TORCHVISION[name](one, r) for one, r in zip(image, strengths, strict=True)]
    gap = (ours - torch.stack(theirs)).abs()
    assert gap.max() <= 1 and (gap > 0).float().mean() < 0.02 and not torch.equal(ours, image)


@pytest.mark.parametrize(("strength", "hue"), [(0.5, 0.25), (1.0, 0.5), (0.4, 0.0), (0.0, 0.5)])
def test_views_are_torchvision_s_image_by_image(strength, hue):
    """Also their random numbers; each seed is that of a share of the images."""
    recipe, image = replace(CITYSCAPES, jitter=strength, hue=hue), photo(64)
    jitter = v2.ColorJitter(strength, strength, strength, hue)

    def change(name, image):
        """The published code, image by image."""
        images = [jitter(one) for one in image]
        for k in range(len(images) if name == "strong" else 0):
            for operation, r in c3semiseg.draw_operations(recipe):
                images[k] = TORCHVISION[operation](images[k], r)
        return torch.stack(images)

    for name in ("jitter", "strong"):
        theirs = [seeded(change, 5 + k, name, part) for k, part in enumerate(image.chunk(2))]
        ours = c3semiseg.color_view(recipe, name, [5, 6], image / 255) * 255
        gap = (ours.round() - torch.cat(theirs)).abs()  # equalize makes a difference of 1 larger
        assert (gap > 0).float().mean() < 0.02 and (gap > 1).float().mean() < 0.003, name
        assert (ours.round() != image).float().mean() > 0.6


def test_the_jitter_view_changes_every_property():
    """Brightness scales, contrast moves to the mean, saturation moves to the grey."""
    image, hue, jitter = torch.rand(2, 3, 8, 8), view("jitter", hue=0.25), view("jitter", 0.5)
    assert_close(hue(3, image).amax(1), image.amax(1), atol=0.02, rtol=0)  # same value
    assert (hue(3, image) - image).abs().amax((1, 2, 3)).min() > 0.1
    assert (jitter(3, image).amax(1) - image.amax(1)).abs().amax((1, 2)).min() > 0.02
    dark = torch.full((40, 3, 8, 8), 0.2)
    brightness = jitter(3, dark)[:, 0, 0, 0] / 0.2
    assert len(brightness.unique()) > 20  # each image draws anew
    grey, red = dark.clone(), dark.clone()
    grey[..., 4:], red[:, 0] = 0.6, 0.4
    spread = jitter(3, grey)[:, 0, 0, [0, 7]].diff()[:, 0] / 0.4
    saturation = jitter(3, red)[:, [0, 1], 0, 0].diff()[:, 0] / -0.2 / spread
    for factor in (brightness, spread / brightness, saturation):
        assert factor.min() < 0.75 and factor.max() > 1.25


@pytest.mark.parametrize("size", [(60, 120), (120, 60)])
def test_rotation_leaves_void_where_it_fills(size):
    """Whole degrees from -10 to 10; the mean filled share is that of a 1:2 rectangle."""
    geometry = scale_crop_flip(rotation=10, crop=None, flip=False, mean=torch.zeros(3, 1, 1))
    image, label = torch.full((3, *size), 255, dtype=torch.uint8), torch.zeros(size).byte()
    shares, sides = [], set()
    for seed in range(120):
        turned, void = geometry(seed, image, label)
        assert turned.shape == image.shape and set(void.unique().tolist()) <= {0, 255}
        assert (void[(turned == 0).all(0)] == 255).all()
        assert (void[(turned == 255).all(0)] == 0).all()
        shares.append((void == 255).float().mean().item())
        sides.add((void[0, size[1] // 4].item(), void[0, -size[1] // 4].item()))
    assert len({round(share, 4) for share in shares}) <= 21 and min(shares) == 0
    assert sum(shares) / 120 == pytest.approx(0.052, abs=0.012)
    assert 0.085 < max(shares) < 0.11 and sides >= {(0, 255), (255, 0)}
    # A crop that comes afterwards misses the corners more often than not.
    crop = (size[0] // 2, size[1] // 2)
    geometry = scale_crop_flip(rotation=10, crop=crop, flip=True, mean=torch.zeros(3, 1, 1))
    voids = [geometry(seed, image, label)[1] == 255 for seed in range(120)]
    assert voids[0].shape == crop and 40 < sum(not void.any() for void in voids) < 120


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


# ---- Losses (equations 1, 2, 3 and 5) ----


def naive_contrast(f, f_label, g, g_label, tau, exclude_self):
    s = (F.normalize(f, dim=1) @ F.normalize(g, dim=1).T / tau).exp()
    losses = []
    for i in (f_label != 255).nonzero().flatten():
        other = s[i, (g_label != f_label[i]) & (g_label != 255)].sum()
        equal = g_label == f_label[i]
        if exclude_self:
            equal[i] = False
        same = s[i, equal]
        losses.append(-torch.log(same / (same + other)).sum() / max(len(same), 1))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_contrast_equals_naive_loop(exclude_self):
    f, g = torch.randn(14, 6), torch.randn(14 if exclude_self else 9, 6)
    f_label, g_label = torch.randint(3, (14,)), torch.randint(3, (len(g),))
    f_label[[0, 5]], g_label[[2, 5]] = 255, 255
    results = []
    for function in (c3semiseg.pixel_contrast_loss, naive_contrast):
        a, b = f.clone().requires_grad_(), g.clone().requires_grad_()
        loss = function(a, f_label, b, g_label, 0.3, exclude_self=exclude_self)
        results.append((loss, *torch.autograd.grad(loss, (a, b))))
    assert_close(*results)


def test_losses_without_pixels_or_pairs_are_0():
    z, void = torch.randn(30, 4).requires_grad_(), torch.full((30,), 255)
    losses = [c3semiseg.supervised_loss(z, void)]
    losses.append(c3semiseg.consistency_loss(z, z.detach().softmax(1), void != 255))
    for label in (void, torch.zeros_like(void), torch.arange(30)):  # no negatives; no positives
        losses.append(c3semiseg.pixel_contrast_loss(z, label, z, label, exclude_self=True))
    for loss in losses:
        assert loss == 0 and torch.autograd.grad(loss, z)[0].eq(0).all()


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("per_class", [20, 7, 1])
def test_sample_pixels(hard, per_class):
    """Against counts by hand, over many random maps with rare, absent and void classes."""
    batch, num_classes, size, half = 6, 5, (9, 16), per_class // 2
    for _ in range(8):
        label = torch.randint(9, (batch, *size))
        label = torch.where(label < 5, label, torch.where(label < 7, 0, 255))
        label[:, 0, :3], label[1] = 4, 3  # image 1 has one class
        wrong = torch.rand(batch, *size) < torch.linspace(0, 1, batch).view(-1, 1, 1)
        prediction = torch.where(wrong, (label + 1) % 5, label.clamp(max=4))
        wrong = (prediction != label).flatten()
        index, drawn = c3semiseg.sample_pixels(
            label, prediction, per_class, num_classes=num_classes, hard=hard, generator=generator()
        )
        index, drawn = (x.view(batch, num_classes, per_class) for x in (index, drawn))
        for b, c in itertools.product(range(batch), range(num_classes)):
            of_class = (label == c) & (torch.arange(batch) == b).view(-1, 1, 1)
            n_wrong = (of_class.flatten() & wrong).sum().item()
            n_right = of_class.sum().item() - n_wrong
            if n_wrong + n_right <= per_class:
                assert drawn[b, c].eq(255).all()
                continue
            assert drawn[b, c].eq(c).all() and of_class.flatten()[index[b, c]].all()
            assert len(set(index[b, c].tolist())) == per_class
            n_hard = half if n_right >= per_class - half else per_class - n_right
            if hard:
                assert wrong[index[b, c]].sum() == min(n_hard, n_wrong)


def test_sampling_is_uniform_within_the_pools():
    label = torch.zeros(1, 6, 10).long()
    prediction = (torch.arange(60).view(1, 6, 10) < 24).long()  # 24 hard, 36 easy
    for hard, shares in ((True, (4 / 24, 4 / 36)), (False, (8 / 60, 8 / 60))):
        count = torch.zeros(60)
        for _ in range(600):
            index, drawn = c3semiseg.sample_pixels(label, prediction, 8, num_classes=2, hard=hard)
            count[index[drawn == 0]] += 1
        expected = torch.where(prediction.flatten() == 1, *shares)
        assert (count / 600 - expected).abs().max() < 0.065


def test_an_image_with_fewer_pixels_than_a_sample():
    label = torch.zeros(2, 3, 3).long()
    index, drawn = c3semiseg.sample_pixels(label, label, 20, num_classes=4)
    assert drawn.eq(255).all() and index.shape == (160,) and index.max() < 18


# ---- Dynamic confident regions (equation 6) ----


def naive_thresholds(thresholds, confidence, pseudo_label, keep, momentum):
    new = thresholds.tolist()
    for c in pseudo_label.unique().tolist():
        found = sorted(confidence[pseudo_label == c].tolist(), reverse=True)
        delta = found[min(int(keep * len(found)), len(found) - 1)]
        new[c] = momentum * new[c] + (1 - momentum) * delta
    return torch.tensor(new)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8, 0.9, 0.999])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_thresholds_equal_naive_ones(keep, momentum):
    regions = c3semiseg.ConfidentRegions(19, keep=keep, momentum=momentum)
    assert regions.thresholds.eq(0.9).all()
    thresholds = regions.thresholds.clone()
    for seed in range(5):
        pseudo_label = torch.randint(17, (2, 13, 11)) + seed % 3
        confidence = torch.rand(2, 13, 11) * 0.95 + 0.05
        pseudo_label[0, 0, 0], confidence[0, 0, 0] = 18, 1.0
        expected = naive_thresholds(thresholds, confidence, pseudo_label, keep, momentum)
        mask = regions.update(confidence, pseudo_label)
        assert_close(regions.thresholds, expected, rtol=0, atol=1e-6)
        thresholds = regions.thresholds.clone()
        assert torch.equal(mask, confidence >= thresholds[pseudo_label])  # inclusive, updated first
        assert torch.equal(mask, regions.confident(confidence, pseudo_label))


def test_thresholds_are_exact_quantiles():
    """Of close confidences, and of 255 classes: with void, ids are all values of a byte."""
    confidence, label = 1 - torch.rand(2, 40, 50) * 1e-5, torch.arange(4000).view(2, 40, 50) % 256
    regions = c3semiseg.ConfidentRegions(255, momentum=0.0)
    regions.update(confidence, label)
    for c in range(255):
        assert regions.thresholds[c] == confidence[label == c].sort(descending=True).values[12]


def test_void_leaves_the_thresholds_alone():
    confidence, label = torch.rand(2, 20, 30), torch.randint(3, (2, 20, 30))
    void = torch.rand(2, 20, 30) < 0.4
    regions, other = (c3semiseg.ConfidentRegions(3, momentum=0.0) for _ in range(2))
    regions.update(confidence, label.masked_fill(void, 255))
    other.update(confidence[~void][None, None], label[~void][None, None])
    assert torch.equal(regions.thresholds, other.thresholds)
    everything = c3semiseg.ConfidentRegions(3, keep=1.0).update(confidence, label)
    assert everything.all() and everything.dtype == torch.bool


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


def sampled_contrast(**changes):
    how = {"per_class": 3, "generator": generator(), **changes}
    return partial(c3semiseg.contrast_loss, **how)


def group(n=3, size=(12, 16)):
    """Labeled and unlabeled part of a group, with a teacher's labels."""
    image_l, image_u, strong = (torch.rand(n, 3, *size) for _ in range(3))
    label_l = torch.randint(5, (n, *size))
    label_l[label_l == 4] = 255
    prob, confidence, pseudo_label, embedding = c3semiseg.label_images(Stub(21), image_u)
    assert torch.equal(pseudo_label, prob.argmax(1)) and torch.equal(confidence, prob.amax(1))
    assert not prob.requires_grad and not embedding.requires_grad
    label_u = pseudo_label.masked_fill(confidence < 0.5, 255)
    assert 0.1 < (label_u == 255).float().mean() < 0.9
    return (image_l, label_l), (strong, prob, label_u, embedding)


def naive_sampled_contrast(f, g, label, logits):
    label, prediction = label[:, ::2, ::2], F.avg_pool2d(logits, 2).argmax(1)
    how = {"num_classes": 4, "generator": generator()}
    index, drawn = c3semiseg.sample_pixels(label, prediction, 3, **how)
    assert (drawn != 255).sum() > 10
    f, g = (e.permute(0, 2, 3, 1).reshape(-1, 5)[index] for e in (f, g))
    return naive_contrast(f, drawn, g, drawn, 0.15, True)


def equation_4(maps, box):
    m, (a, b) = 1 - box[:, None].float(), maps.chunk(2)
    return torch.cat([m * a + (1 - m) * b, m * b + (1 - m) * a])


def naive_c3(student, labeled, unlabeled, order, box, sets):
    """The terms of equation 7, and the mixed images in the places of the labeled ones."""
    (image_l, label_l), (strong, prob, label_u, g_u) = labeled, unlabeled
    mixed = equation_4(torch.cat([image_l, strong])[order], box)
    logits_mix, f_mix = student(mixed)
    image, logits, f = (torch.empty_like(maps) for maps in (mixed, logits_mix, f_mix))
    image[order], logits[order] = mixed, equation_4(logits_mix, box)
    f[order] = equation_4(f_mix, box[:, ::2, ::2])
    log_l, log_u = logits.log_softmax(1).chunk(2)
    log_l = log_l.gather(1, label_l.clamp(max=3)[:, None]).squeeze(1)
    terms = {"loss_l": -log_l[label_l != 255].mean()}
    terms["loss_u"] = -(prob / 4 * log_u).sum(1)[label_u != 255].mean()
    g = torch.cat([f[:3] if sets == "labeled" else f[:3].detach(), g_u])
    part = {"labeled": slice(0, 3), "unlabeled": slice(3, 6), "both": slice(0, 6)}[sets]
    label = torch.cat([label_l, label_u])
    terms["loss_c"] = naive_sampled_contrast(f[part], g[part], label[part], logits[part])
    return terms, image[:3]


@pytest.mark.parametrize("sets", ["both", "labeled", "unlabeled"])
def test_c3_loss_equals_naive_loss(sets):
    """Also in its gradients: they reach only anchors, or both sides if sets is "labeled"."""
    labeled, unlabeled = group()
    pairs = c3semiseg.draw_pairs("cross", 3, (12, 16), generator())
    assert not torch.equal(pairs[0], pairs[0].argsort())
    student, twin = Stub(1), Stub(1)
    how = {"contrast": sampled_contrast(), "sets": sets}
    terms, details = c3semiseg.c3_loss(student, labeled, unlabeled, *pairs, **how)
    expected, mixed = naive_c3(twin, labeled, unlabeled, *pairs, sets)
    assert_close(terms, expected)
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    assert_close([p.grad for p in student.parameters()], [p.grad for p in twin.parameters()])
    assert_close([details["mixed_image"], details["pseudo_label"]], [mixed, unlabeled[2]])
    assert not any(value.requires_grad for value in details.values())
    terms, _ = c3semiseg.c3_loss(student, labeled, unlabeled, *pairs)
    assert list(terms) == ["loss_l", "loss_u"]


def test_warmup_loss_contrasts_student_with_student():
    (image, label), student = group()[0], Stub(2)
    terms, details = c3semiseg.warmup_loss(student, image, label, contrast=sampled_contrast())
    logits, embedding = student(image)
    expected = naive_sampled_contrast(embedding, embedding, label, logits)
    assert_close(terms, {"loss_l": c3semiseg.supervised_loss(logits, label), "loss_c": expected})
    head = list(student.projection.parameters())  # the gradient reaches both sides
    assert_close(*(torch.autograd.grad(loss, head) for loss in (terms["loss_c"], expected)))
    assert torch.equal(details["prediction"], logits)
    assert list(c3semiseg.warmup_loss(student, image, label)[0]) == ["loss_l"]


@pytest.mark.parametrize(("first_class", "used"), [(0, 12), (1, 8)])
def test_road_can_be_left_out(first_class, used):
    """Only anchors have a gradient. They are 10 pixels of each class in each of 4 images."""
    label, logits = torch.randint(3, (4, 12, 16)), torch.randn(4, 3, 12, 16)
    f = torch.randn(4, 8, 12, 16).requires_grad_()
    sampled_contrast(per_class=10, first_class=first_class)(f, f.detach(), label, logits).backward()
    anchors = f.grad.abs().sum(1) > 0
    assert anchors.sum() == 10 * used and label[anchors].min() == first_class


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


# ---- Network and recipes ----


def test_network_of_the_paper():
    net = c3semiseg.network(CITYSCAPES, 19, pretrained=True)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert count["classifiers"] == 1_400_908 and count["projection"] == 590_336
    trained = [p.numel() for p in net.parameters() if p.requires_grad]
    fixed = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert fixed == 105_344 and len(trained) == 104 + 8 + 4
    assert sum(trained) == 42_500_160 - 105_344 + 1_400_908 + 590_336
    for convolution in (net.projection[0], net.projection[2]):
        assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.05)
    backbone, heads = net.parameter_groups(1.2e-4, 1.0)
    assert len(backbone["params"]) == 104 and len(heads["params"]) == 12
    for mode in (net, net.train()):  # from the first step on
        assert not any(m.training for m in mode.modules() if isinstance(m, nn.BatchNorm2d))


def tiny_network(num_classes, pretrained=True, **changes):
    small = {"layers": (1, 1, 1, 1), "width": 4, "embedding": 6, "aspp_rates": (1, 2)}
    recipe = replace(CITYSCAPES, **small, **changes)
    return c3semiseg.network(recipe, num_classes, pretrained=pretrained)


def test_forward_gives_what_both_heads_give():
    net, image = tiny_network(5), torch.rand(2, 3, 256, 512)
    logits, embedding = net(image)
    assert logits.shape == (2, 5, 256, 512) and embedding.shape == (2, 6, 33, 65)
    features = net.features(image)
    assert_close(logits, net.classify(features, (256, 512)))
    first, _, second = net.projection
    assert_close(embedding, F.normalize(second(first(features).relu()), dim=1))
    (gradient,) = torch.autograd.grad(embedding[:, 0].sum(), net.conv1.weight)
    assert gradient.abs().sum() > 0  # the contrast trains the backbone, too
    assert tiny_network(5, contrast="none").projection is None


PAPER = {
    "keep": 0.8, "threshold_momentum": 0.9, "initial_threshold": 0.9, "lr": 1.2e-4, "lr_power": 0.9,
    "ema_decay": 0.99, "temperature": 0.15, "per_class": 20, "embedding": 256,
    "consistency_weight": 50, "consistency_ramp": 4_000, "contrast_weight": 0.15,
    "contrast_ramp": 250, "jitter": 0.5, "hue": 0.25, "rotation": 10, "flip": True,
    "operations": 2, "operation_probability": 0.5, "magnitude": 10,
}  # fmt: skip


def test_recipes_have_the_paper_s_numbers():
    names = ("size", "crop", "scales", "batch_size", "group_size", "iterations", "warmup")
    own = {
        CITYSCAPES: ((512, 1024), (256, 512), (1,), 16, 4, 25_000, 2_500),
        BDD100K: ((720, 1280), (512, 512), (0.75, 1, 1.25), 8, 2, 20_000, 5_000),
    }
    for recipe, values in own.items():
        assert tuple(getattr(recipe, name) for name in names) == values
        assert {name: getattr(recipe, name) for name in PAPER} == PAPER


# ---- Training ----


STEPS = ("--size", 48, 64, "--iterations", 5, "--eval-every", 9, "--save-every", 9)


@pytest.fixture
def trained(command, camvid, tmp_path):
    """trained(name, flag, value, ...) trains, 5 steps if no flag says so, and returns the log."""

    def call(name, *flags):
        args = (*tiny("c3semiseg", camvid), *STEPS, "--output-dir", tmp_path / name, *flags)
        status, _, errors = command("c3semiseg", *args)
        assert (status, errors) == (0, "")
        return [entry for entry in read_log(tmp_path / name) if "loss_l" in entry]

    return call


def test_checkpoints_with_and_without_a_head(trained, command, camvid, tmp_path, monkeypatch):
    """The projection head is dropped at the end (section 3.5)."""
    last = tmp_path / "run/last.pt"
    args = (*tiny("c3semiseg", camvid), "--iterations", 4, "--group-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(c3semiseg, "train", stopping_train("c3semiseg", 3, signal.SIGTERM))
        assert command("c3semiseg", *args, "--output-dir", last.parent)[0] == 143
    for with_head in (True, False):
        for network in ("student", "teacher"):
            names = read_state(last.parent)[network]
            assert any(name.startswith("projection") for name in names) == with_head
        assert torch.load(last)["args"]["accumulate"] == 1  # so that more ranks can resume
        status, printed, errors = command("c3semiseg", "--evaluate", last)
        assert (status, errors) == (0, "") and "mIoU" in printed
        argv = ("--predict", last, camvid / "train/000.png", "--out", tmp_path / f"{with_head}")
        assert command("c3semiseg", *argv)[0] == 0
        status, printed, _ = command("c3semiseg", "--resume", last)
        assert status == 0 and ("headline: student" if with_head else "resumed after") in printed
    trained("next", "--weights", last)  # the new head stays as initialised


CHANGES = """--mixing intra | --mixing none | --teacher-view strong | --student-view weak
--student-view jitter | --jitter 0.1 | --hue 0 | --operations 1 | --operation-probability 0.9
--magnitude 1 | --consistency-weight 5 | --consistency-ramp 9 | --contrast-weight 3
--contrast-ramp 60 | --contrast labeled | --contrast unlabeled | --no-contrast-road
--per-class 5 | --no-hard-sampling | --temperature 0.5 | --embedding 5 | --keep 0.3 | --keep 1
--threshold-momentum 0.1 | --initial-threshold 0.25 | --rotation 0 | --no-flip | --crop 32 48
--group-size 2 | --scales 0.75 1.25 --crop 48 64 | --ema-decay 0.1 | --ema-warm-start | --warmup 1
--backbone-factor 0.1 | --no-warmup-contrast"""
USUAL = {}  # what a run without these flags logs


@pytest.mark.parametrize("flags", CHANGES.replace("\n", " | ").split(" | "))
def test_every_flag_reaches_the_step(trained, flags):
    if not USUAL:
        USUAL.update(trained("usual")[-1])
    changed = trained("run", *flags.split())[-1]
    names = ("loss_l", "loss_u", "loss_c", "confident")
    assert all(math.isfinite(changed[name]) for name in names)
    assert any(changed[name] != USUAL[name] for name in names)
    if flags == "--keep 1":  # the corners of rotated images count, too
        assert changed["confident"] == 1


def test_rows_of_table_3(trained):
    log = {"loss_l", "iteration", "lr"}
    assert set(trained("base", "--supervised")[-1]) == log
    log |= {"loss_u", "confident"}
    assert set(trained("no_c", "--contrast", "none")[-1]) == log
    log |= {"loss_c"}
    assert set(trained("no_u", "--consistency-weight", 0)[-1]) == log


class Watch(run.Session):
    """Keeps the batches that it hands out, and pictures and state of each step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.handed_out, self.steps = ([], []), []
        self.keep({})
        Watch.last = self

    def keep(self, pictures):
        state = {name: copy.deepcopy(part.state_dict()) for name, part in self.state.items()}
        self.steps.append({**state, "pictures": pictures})

    def batches(self, indices, transform, *, stream, start):
        assert indices == self.split[stream]
        for batch in super().batches(indices, transform, stream=stream, start=start):
            self.handed_out[stream].append(batch)
            yield batch

    def end_step(self, iteration, pictures):
        self.keep(pictures)
        super().end_step(iteration, pictures)


@pytest.mark.parametrize("supervised", [False, True])
def test_each_step_is_that_of_a_plain_loop(trained, monkeypatch, supervised):
    """Two groups of two images a step. Without mixing and colours, random numbers do not matter."""
    seeds, step_seed = [], ranks.step_seed
    monkeypatch.setattr(ranks, "step_seed", lambda *of: seeds.append(step_seed(*of)) or seeds[-1])
    monkeypatch.setattr(c3semiseg, "train", partial(c3semiseg.train, make_session=Watch))
    flags = "--group-size 2 --ema-decay 0.6 --mixing none --contrast none --student-view weak"
    flags += " --iterations 6 --backbone-factor 0.3" + " --supervised" * supervised
    log, (batches_l, batches_u) = trained("run", *flags.split()), Watch.last.handed_out
    assert len(set(seeds)) == len(seeds) == 6 * 2 + (0 if supervised else 4 * 2 * 2)
    student, teacher = (tiny_network(11, False, contrast="none") for _ in range(2))
    student.load_state_dict(Watch.last.steps[0]["student"])
    heads, confident = list(student.classifiers.parameters()), []
    backbone = list(student.parameters())[: -len(heads)]
    adam = torch.optim.Adam([{"params": backbone}, {"params": heads}])
    for t, alpha in enumerate([0, 0, 0, 0.6, 0.6, 0.6]):
        before, after = Watch.last.steps[t : t + 2]
        semi = not supervised and t >= 2
        # The teacher comes first. Once it labels images, its batch-norm statistics are its own.
        new = dict(before["teacher" if semi and t > 2 else "student"])
        for name, _ in teacher.named_parameters():
            new[name] = alpha * before["teacher"][name] + (1 - alpha) * before["student"][name]
        teacher.load_state_dict(new)
        if semi:
            images_u = [image for image, _ in batches_u[2 * t - 4 : 2 * t - 2]]
            labels = [c3semiseg.label_images(teacher, image) for image in images_u]
            confidence, label_u = (torch.cat([label[i] for label in labels]) for i in (1, 2))
            thresholds = before["regions"]["thresholds"]
            thresholds = naive_thresholds(thresholds, confidence, label_u, 0.8, 0.9)
            assert_close(after["regions"]["thresholds"], thresholds)
            label_u[confidence < thresholds[label_u]] = 255
            confident.append((label_u != 255).float().mean().item())
            assert torch.equal(after["pictures"]["pseudo_label"], label_u[2:])
        assert_close(after["teacher"], teacher.state_dict())
        for k, (image_l, label_l) in enumerate(batches_l[2 * t : 2 * t + 2]):
            logits, loss = student(torch.cat([image_l, images_u[k]]) if semi else image_l)[0], 0.0
            if semi:
                kept, ramp = label_u[2 * k : 2 * k + 2] != 255, min(1, (t - 2) / 2)
                loss = c3semiseg.consistency_loss(logits[2:], labels[k][0], kept)
                loss = 50 * math.exp(-5 * (1 - ramp) ** 2) * loss
            loss = loss + F.cross_entropy(logits[:2], label_l, ignore_index=255)
            (loss / 2).backward()
        for group, factor in zip(adam.param_groups, (0.3, 1), strict=True):
            group["lr"] = factor * 1e-3 * (1 - t / 6) ** 0.9
        adam.step()
        adam.zero_grad()
        assert_close(after["student"], student.state_dict(), rtol=1e-4, atol=1e-5)
        assert_close(after["optimizer"]["state"], adam.state_dict()["state"], rtol=1e-3, atol=1e-5)
        assert [group["weight_decay"] for group in after["optimizer"]["param_groups"]] == [0, 0]
        # The colours of labeled images stay.
        assert torch.equal(after["pictures"].get("mixed_image", image_l), image_l)
    if not supervised:
        assert 0 < min(confident) <= max(confident) < 1
        assert log[-1]["confident"] == pytest.approx(sum(confident) / 4)


def test_frozen_batch_norm_stays_as_loaded(trained, tmp_path):
    net = tiny_network(11, pretrained=False)
    for name, value in net.named_parameters():
        if "bn" in name or "downsample.1" in name:
            value.data.add_(0.3 * torch.randn(value.shape))
    torch.save(net.state_dict(), tmp_path / "w.pth")
    trained("run", "--weights", tmp_path / "w.pth")
    states = read_state(tmp_path / "run")
    for state in (states["student"], states["teacher"]):
        for name, value in net.state_dict().items():
            if "bn" in name or "downsample.1" in name:
                assert torch.equal(state[name], value), name
            elif name == "conv1.weight":
                assert not torch.equal(state[name], value)


@pytest.mark.parametrize(("batch", "num_classes", "present"), [(4, 150, 3), (32, 19, 19)])
def test_contrast_of_many_groups_has_bounded_memory(monkeypatch, batch, num_classes, present):
    """At most 256 groups of an image and a class, drawn from all images; all if few are present."""
    label = torch.randint(present, (batch, 24, 24))
    logits = torch.randn(batch, num_classes, 24, 24)
    embedding = F.normalize(torch.randn(batch, 4, 24, 24), dim=1)
    calls, loss = [], c3semiseg.pixel_contrast_loss
    monkeypatch.setattr(
        c3semiseg, "pixel_contrast_loss", lambda *a, **k: calls.append(a) or loss(*a, **k)
    )
    how = {"per_class": 4, "generator": generator()}
    value = c3semiseg.contrast_loss(embedding, embedding, label, logits, **how)
    ((f, drawn, *_),) = calls
    assert len(f) == 4 * 256
    if present == 3:  # the same as without a bound
        how = {"num_classes": num_classes, "generator": generator()}
        index, chosen = c3semiseg.sample_pixels(label, logits.argmax(1), 4, **how)
        g = embedding.movedim(1, 3).flatten(0, 2)[index]
        torch.testing.assert_close(value, loss(g, chosen, g, chosen, exclude_self=True))
    else:
        pixels = embedding.movedim(1, 3).flatten(0, 2)
        image = (pixels @ f[drawn != 255].T).argmax(0) // 24**2
        count = torch.bincount(image, minlength=batch)
        assert count.sum() == 4 * 256 and count.min() > 0 and abs(count[:16].sum() - 512) < 100


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
    folder = tmp_path / "run"
    args = (*tiny("c3semiseg", camvid), *STEPS, "--labeled", 3, *flags.split())
    status, _, errors = command("c3semiseg", *args, "--output-dir", folder)
    assert status == 2 and errors.count("\n") == 1 and expected in errors
    assert not folder.exists()
