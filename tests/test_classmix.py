"""The method of classmix.py against naive loops, hand-worked examples and exact laws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

import classmix

KINDS = ("cross-entropy", "soft-cross-entropy", "squared-error")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_class_mask(label, num_classes, scores):
    mask = torch.zeros(label.shape, dtype=torch.bool)
    for b, y, x in itertools.product(*map(range, label.shape)):
        present = {int(c) for c in label[b].flatten() if 0 <= c < num_classes}
        ranked = sorted(present, key=lambda c: scores[b, c])
        mask[b, y, x] = int(label[b, y, x]) in ranked[: math.floor(len(present) / 2)]
    return mask


@pytest.mark.parametrize(
    ("batch", "num_classes", "size"),
    [(1, 2, (3, 5)), (64, 7, (2, 4)), (16, 19, (5, 4)), (4, 1, (2, 2))],
)
def test_class_mask_equals_naive_loop(batch, num_classes, size):
    label = torch.randint(-1, num_classes + 1, (batch, *size), generator=generator())
    label[label == num_classes] = 255
    label[-1, 0] = 255
    scores = torch.rand(batch, num_classes, generator=generator(1))
    rng = generator(2)
    mask = classmix.class_mask(label, num_classes, scores=scores, generator=rng)
    assert mask.dtype == torch.bool and mask.shape == label.shape
    assert torch.equal(mask, naive_class_mask(label, num_classes, scores))
    assert not mask[(label < 0) | (label == 255)].any()
    assert torch.equal(rng.get_state(), generator(2).get_state())  # scores given: nothing drawn


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 19])
def test_class_mask_chooses_half_of_the_classes(n):
    count, share = 5_000, (n // 2) / n
    label = torch.arange(24)[-n:].expand(count, 1, -1)
    mask, again, other = (
        classmix.class_mask(label, 24, generator=generator(seed)).squeeze(1) for seed in (0, 0, 1)
    )
    assert (mask.sum(1) == n // 2).all()
    error = (mask.double().mean(0) - share).abs().max()
    assert error <= 4.5 * math.sqrt(share * (1 - share) / count)
    assert torch.equal(mask, again) and torch.equal(mask, other) == (n == 1)


@pytest.mark.parametrize("area", [(1, 9), (1, 2, 12), (1, 1, 3, 20), (2, 3, 5, 7, 30)])
def test_class_mask_mean_and_variance(area):
    """Exact over all orders of the scores: q and q(1-q)(n sum a_c^2 - 1)/(n-1)."""
    n, q = len(area), len(area) // 2 / len(area)
    scores = torch.tensor(list(itertools.permutations(range(n)))).double()
    label = torch.arange(n).repeat_interleave(torch.tensor(area)).expand(len(scores), 1, -1)
    mean = classmix.class_mask(label, n, scores=scores).double().mean((1, 2))
    square = sum((a / sum(area)) ** 2 for a in area)
    assert mean.mean().item() == pytest.approx(q)
    assert mean.var(correction=0).item() == pytest.approx(q * (1 - q) * (n * square - 1) / (n - 1))


def test_class_masks_of_a_batch_are_independent():
    rng, label, count = generator(), torch.tensor([[[0, 1]], [[0, 1]]]), 800
    masks = [classmix.class_mask(label, 2, generator=rng)[:, 0, 0] for _ in range(count)]
    joint = torch.stack(masks).long() @ torch.tensor([2, 1])
    error = torch.bincount(joint, minlength=4) / count - 1 / 4
    assert error.abs().max() < 4 * math.sqrt(3 / 16 / count)


def test_mix_takes_a_where_the_mask_is_true():
    mask = torch.tensor([[[True, False, False], [False, True, False]]])
    a, b = torch.arange(1, 7).view(1, 2, 3), -torch.arange(1, 7).view(1, 2, 3)
    expected = torch.tensor([[[1, -2, -3], [-4, 5, -6]]])
    assert torch.equal(classmix.mix(mask, a, b), expected)
    a, b, expected = (torch.stack([x, 10 * x], 1).float() for x in (a, b, expected))
    assert torch.equal(classmix.mix(mask, a, b), expected)
    assert torch.equal(classmix.mix(torch.ones_like(mask), a, b), a)


@pytest.mark.parametrize("sigma", [2.0, 4.0])
def test_cow_mask_statistics(sigma):
    mask = classmix.cow_mask(48, (96, 160), sigma_range=(sigma, sigma), generator=generator())
    assert mask.dtype == torch.bool and mask.shape == (48, 96, 160)
    assert abs(mask.double().mean() - 0.5) < 0.01
    expected = math.acos(math.exp(-1 / (4 * sigma**2))) / math.pi  # of blurred white noise
    inner = mask[:, 16:-16, 16:-16]
    for turn in (inner[:, 1:] ^ inner[:, :-1], inner[:, :, 1:] ^ inner[:, :, :-1]):
        assert turn.double().mean().item() == pytest.approx(expected, rel=0.05)


def test_cow_mask_equals_scipy_on_the_same_draws():
    size, low, high, rng = (40, 56), 2.0, 6.0, generator()
    mask = classmix.cow_mask(6, size, sigma_range=(low, high), generator=generator())
    sigma = low * (high / low) ** torch.rand(6, generator=rng)  # drawn before the noise
    for single, noise, s in zip(mask, torch.randn(6, *size, generator=rng), sigma, strict=True):
        smooth = torch.from_numpy(gaussian_filter(noise.numpy(), float(s), mode="reflect"))
        assert (single ^ (smooth > smooth.mean())).double().mean() < 0.003


@pytest.mark.parametrize(("size", "tolerance"), [((512, 1024), 0.001), ((321, 321), 0.002)])
def test_cut_mask_is_one_box_of_half_the_area(size, tolerance):
    mask = classmix.cut_mask(64, size, generator=generator())
    assert mask.dtype == torch.bool and mask.shape == (64, *size)
    assert (mask.double().mean((1, 2)) - 0.5).abs().max() <= tolerance
    rows, columns = (~mask).any(2), (~mask).any(1)  # False inside
    assert torch.equal(~mask, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):  # in one piece
        assert (F.pad(side.long(), (1, 1)).diff(dim=1).abs().sum(1) == 2).all()
    assert size[1] // 2 <= columns.sum(1).min() and columns.sum(1).max() <= size[1]


def test_cut_mask_draws_width_and_place_uniformly():
    count, height, width = 40_000, 12, 8
    inside = ~classmix.cut_mask(count, (height, width), generator=generator())
    for w in range(width // 2, width + 1):
        box = inside[inside.any(1).sum(1) == w]
        lefts, tops = width - w + 1, height - round(height * width / 2 / w) + 1
        place = box.any(1).long().argmax(1) * tops + box.any(2).long().argmax(1)
        counts, expected = torch.bincount(place), count / 5 / (lefts * tops)  # of 5 widths
        assert len(counts) == lefts * tops
        assert (counts - expected).abs().max() < 4.5 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("weighting", "scope", "expected"),
    [
        ("fraction", "batch", [[[4 / 12]]]),
        ("fraction", "sample", [[[3 / 6]], [[1 / 6]]]),
        ("pixel", "batch", [[[1.0, 0, 1], [0, 1, 0]], [[0, 0, 0], [0, 0, 1]]]),
        ("ramp", "batch", [[[0.3]]]),
        ("constant", "batch", [[[1.0]]]),
    ],
)
def test_unlabeled_weight_by_hand(weighting, scope, expected):
    confidence = torch.tensor([[[0.75, 0.5, 1], [0.25, 0.9, 0.1]], [[0.1] * 3, [0.2, 0.7, 0.8]]])
    how = {"weighting": weighting, "ramp": 0.3}
    weight = classmix.unlabeled_weight(confidence, 0.75, scope=scope, **how)
    torch.testing.assert_close(weight, torch.tensor(expected))
    scopes = ({"scope": s, **how} for s in ("batch", "sample"))
    assert torch.equal(*(classmix.unlabeled_weight(confidence[:1], 0.75, **how) for how in scopes))


def test_sigmoid_ramp():
    values = [classmix.sigmoid_ramp(i, 10_000) for i in (0, 5_000, 10_000, 40_000)]
    assert values == pytest.approx([0.0067, 0.2865, 1, 1], abs=5e-5)


def test_cross_entropy_leaves_void_out():
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).repeat(1, 1, 2, 3).requires_grad_()
    label = torch.tensor([[[0, 1, 255], [1, 255, 255]]])  # probabilities 1/4 and 3/4
    loss = classmix.cross_entropy(logits, label)
    assert loss.item() == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.abs().sum(1) > 0).equal(label != 255)
    loss = classmix.cross_entropy(logits, torch.full_like(label, 255))
    assert loss == 0 and torch.autograd.grad(loss, logits)[0].eq(0).all()


class Stub(nn.Conv2d):
    """A 3x3 convolution that notes what it is given and whether gradients were recorded."""

    def __init__(self, seed):
        super().__init__(3, 4, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = 2 * torch.randn(parameter.shape, generator=generator(seed))

    def forward(self, image):
        self.image, self.with_grad = image, torch.is_grad_enabled()
        return super().forward(image)


def mirror(image):
    return 1 - image.flip(-1)  # does not commute with mixing


def mask_classes(pseudo_label):
    scores = torch.rand(len(pseudo_label), 4, generator=generator()).to(pseudo_label.device)
    return classmix.class_mask(pseudo_label, 4, scores=scores)


def naive_loss(student, teacher, image, mask, threshold, weighting, scope, ramp, kind):
    prob = teacher(image).softmax(1).detach()
    image_mix, target = image.clone(), prob.clone()
    for i, y, x in itertools.product(*map(range, mask.shape)):
        if not mask[i, y, x]:
            image_mix[i, :, y, x] = image[(i + 1) % len(image), :, y, x]
            target[i, :, y, x] = prob[(i + 1) % len(image), :, y, x]
    image_mix = mirror(image_mix)
    q = student(image_mix).softmax(1)
    hard = F.one_hot(target.argmax(1), q.shape[1]).permute(0, 3, 1, 2)
    pixel_loss = {
        "cross-entropy": -(hard * q.log()).sum(1),
        "soft-cross-entropy": -(target * q.log()).sum(1),
        "squared-error": (q - target).pow(2).sum(1),
    }[kind]
    weight = (target.amax(1) >= threshold).float()
    if weighting == "fraction":
        weight = torch.stack([w.mean() for w in weight]) if scope == "sample" else weight.mean()
        weight = weight.view(-1, 1, 1)
    elif weighting != "pixel":
        weight = torch.tensor(ramp if weighting == "ramp" else 1.0)
    return (weight * pixel_loss).mean(), weight.mean(), image_mix, target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["fraction", "fraction sample", "pixel", "ramp", "constant"])
def test_classmix_loss_equals_naive_loss(kind, weighting):
    student, teacher = Stub(0), Stub(1)
    image, labels = torch.rand(3, 3, 6, 5, generator=generator(2)), []
    mask = torch.rand(3, 6, 5, generator=generator(3)) < 0.4
    weighting, scope = [*weighting.split(), "batch"][:2]
    how = {"threshold": 0.9, "weighting": weighting, "scope": scope, "ramp": 0.3, "kind": kind}
    expected, weight, image_mix, target = naive_loss(student, teacher, image, mask, **how)
    assert 0 < (target.amax(1) >= 0.9).float().mean() < 1
    gradient = torch.autograd.grad(expected, list(student.parameters()))
    how |= {"make_mask": lambda p: labels.append(p) or mask, "augment": mirror}
    loss, seen = classmix.classmix_loss(student, teacher, image, **how)
    loss.backward()
    torch.testing.assert_close([loss, seen["lambda"]], [expected, weight])
    torch.testing.assert_close([p.grad for p in student.parameters()], list(gradient))
    assert torch.equal(student.image, image_mix) and torch.equal(teacher.image, image)
    assert student.with_grad and not teacher.with_grad
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(labels[0], teacher(image).argmax(1)) and seen["pseudo_label"] is labels[0]
    assert not any(x.requires_grad for x in seen.values())


@pytest.mark.parametrize("batch", [1, 3])
def test_one_class_and_nobody_confident(batch):
    student, teacher, image = Stub(0), Stub(1), torch.rand(batch, 3, 4, 4, generator=generator())
    teacher.bias.data[2] += 1e3  # n = 1: the mask is empty, each image is exactly the next one
    how = {"make_mask": mask_classes, "augment": lambda x: x, "threshold": 1.01}
    loss, seen = classmix.classmix_loss(student, teacher, image, **how)
    loss.backward()
    assert seen["pseudo_label"].eq(2).all() and not seen["mask"].any()
    assert torch.equal(student.image, image[[*range(1, batch), 0]])
    assert loss == 0 and seen["lambda"] == 0 and student.weight.grad.eq(0).all()


def test_core_never_waits_for_the_device():
    """On the meta device .item(), nonzero, unique and branches on tensors raise."""
    with torch.device("meta"):
        image, label = torch.empty(2, 3, 8, 8), torch.empty(2, 8, 8).long()
        net = nn.Conv2d(3, 4, 1)
    draw = {"size": (8, 8), "device": image.device}
    masks = (
        mask_classes,
        lambda _: classmix.cow_mask(2, sigma_range=(2.0, 4.0), **draw),
        lambda _: classmix.cut_mask(2, **draw),
    )
    for make_mask, kind in itertools.product(masks, KINDS):
        how = {"make_mask": make_mask, "augment": mirror, "kind": kind}
        loss, _ = classmix.classmix_loss(net, net, image, **how)
        (loss + classmix.cross_entropy(net(image), label)).backward()
