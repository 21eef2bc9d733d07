"""The method of classmix.py against naive loops, hand-worked examples and exact laws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.fft import idctn
from scipy.ndimage import gaussian_filter
from torch import nn

import classmix
import complexmix
import cowmix

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


def test_cow_mask_equals_scipy_on_the_same_draws():
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
        ("fraction", "batch", [[[0.3 * 4 / 12]]]),
        ("fraction", "sample", [[[0.3 * 3 / 6]], [[0.3 * 1 / 6]]]),
        ("pixel", "batch", [[[0.3, 0, 0.3], [0, 0.3, 0]], [[0, 0, 0], [0, 0, 0.3]]]),
        ("ramp", "batch", [[[0.3]]]),
        ("constant", "batch", [[[0.3]]]),
    ],
)
@pytest.mark.parametrize("method", [classmix, complexmix])
def test_unlabeled_weight_by_hand(method, weighting, scope, expected):
    confidence = torch.tensor([[[0.75, 0.5, 1], [0.25, 0.9, 0.1]], [[0.1] * 3, [0.2, 0.7, 0.8]]])
    if method is classmix or weighting in ("fraction", "pixel"):  # ComplexMix has no others
        weight = method.unlabeled_weight(confidence, 0.75, weighting, scope, factor=0.3)
        torch.testing.assert_close(weight, torch.tensor(expected))


def test_sigmoid_ramp():
    values = [classmix.sigmoid_ramp(i, 10_000) for i in (0, 5_000, 10_000, 40_000)]
    assert values == pytest.approx([0.0067, 0.2865, 1, 1], abs=5e-5)


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


def mask_classes(pseudo_label):
    scores = torch.rand(len(pseudo_label), 4, generator=generator()).to(pseudo_label.device)
    return classmix.class_mask(pseudo_label, 4, scores=scores)


def naive_loss(student, teacher, image, mask, threshold, weighting, scope, factor, kind):
    """Algorithm 1 pixel by pixel: the loss and the details of classmix_loss."""
    prob = teacher(image).softmax(1).detach()
    image_mix, target = image.clone(), prob.clone()
    for i, y, x in itertools.product(*map(range, mask.shape)):
        if not mask[i, y, x]:
            image_mix[i, :, y, x] = image[(i + 1) % len(image), :, y, x]
            target[i, :, y, x] = prob[(i + 1) % len(image), :, y, x]
    image_mix = mirror(image_mix)
    logits = student(image_mix)
    hard = F.one_hot(target.argmax(1), 4).permute(0, 3, 1, 2)
    pixel_loss = {
        "cross-entropy": -(hard * logits.log_softmax(1)).sum(1),
        "soft-cross-entropy": -(target * logits.log_softmax(1)).sum(1),
        "squared-error": (logits.softmax(1) - target).pow(2).sum(1),
    }[kind]
    weight = (target.amax(1) >= threshold).float()
    assert 0 < weight.mean() < 1
    if weighting == "fraction":
        weight = torch.stack([w.mean() for w in weight]) if scope == "sample" else weight.mean()
        weight = weight.view(-1, 1, 1)
    elif weighting != "pixel":
        weight = torch.ones(())
    weight = factor * weight
    details = {"pseudo_label": prob.argmax(1), "mask": mask, "mixed_image": image_mix}
    details |= {"other": image.roll(-1, 0), "prediction": logits.detach(), "lambda": weight.mean()}
    return (weight * pixel_loss).mean(), details


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["fraction", "fraction sample", "pixel", "ramp", "constant"])
def test_classmix_loss_equals_naive_loss(kind, weighting):
    student, teacher, labels = small_network(0), small_network(1), []
    image = torch.rand(3, 3, 6, 5, generator=generator(2))
    mask = torch.rand(3, 6, 5, generator=generator(3)) < 0.4
    weighting, scope = [*weighting.split(), "batch"][:2]
    options = {"threshold": 0.9, "weighting": weighting, "scope": scope, "factor": 0.3}
    options["kind"] = kind
    expected, expected_details = naive_loss(student, teacher, image, mask, **options)
    gradient = torch.autograd.grad(expected, list(student.parameters()))
    options |= {"make_mask": lambda label: labels.append(label) or mask, "augment": mirror}
    loss, details = classmix.classmix_loss(student, teacher, image, **options)
    loss.backward()
    torch.testing.assert_close((loss, details), (expected, expected_details))
    torch.testing.assert_close([p.grad for p in student.parameters()], list(gradient))
    assert all(p.grad is None for p in teacher.parameters())  # no gradient reaches the teacher
    assert torch.equal(labels[0], details["pseudo_label"])
    assert not any(value.requires_grad for value in details.values())


def test_jitter_and_blur_draw_for_each_image_from_the_seed_alone():
    image = torch.rand(1, 3, 24, 24, generator=generator()).expand(6, -1, -1, -1)
    state = torch.random.get_rng_state()
    augment = classmix.jitter_and_blur
    first = augment(3, image)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, augment(3, image)) and not torch.equal(first, augment(4, image))
    assert len({changed.sum().item() for changed in first}) > 3
    assert first.shape == image.shape and first.min() >= 0 and first.max() <= 1


@pytest.mark.parametrize("batch", [1, 3])
def test_one_class_and_nobody_confident(batch):
    student, teacher = small_network(0), small_network(1)
    image = torch.rand(batch, 3, 4, 4, generator=generator())
    teacher.bias.data[2] += 1e3  # n = 1: the mask is empty, each image is exactly the next one
    options = {"make_mask": mask_classes, "threshold": 1.01}
    loss, details = classmix.classmix_loss(student, teacher, image, **options)
    loss.backward()
    assert details["pseudo_label"].eq(2).all() and not details["mask"].any()
    assert torch.equal(details["mixed_image"], image[[*range(1, batch), 0]])
    assert loss == 0 and details["lambda"] == 0 and student.weight.grad.eq(0).all()
