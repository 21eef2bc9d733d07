"""cowmix.py against scipy, literal listings, exact laws and torchvision's ResNet."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy.ndimage import gaussian_filter
from scipy.special import erfinv
from scipy.stats import kstest
from torch import nn

import cowmix
from common import run
from common.deeplab import load_weights
from cowmix import box_mask, cow_mask, warp, warp_grid, warp_label

HEADS = ("decoder.", "classifier.")  # of the U-Net
KINDS = ("cowmix", "cowout", "cutmix", "cutout", "ict", "aug")
GREY = torch.full((3, 1, 1), 0.5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Masks ----


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


def test_cow_mask_draws_a_log_uniform_sigma_for_each_mask(monkeypatch):
    drawn, matrix = [], cowmix.gaussian_matrix

    def spy(n, sigma, largest):
        drawn.append(sigma)
        return matrix(n, sigma, largest)

    monkeypatch.setattr(cowmix, "gaussian_matrix", spy)
    masks = cow_mask(2000, (5, 6), sigma_range=(4.0, 16.0), generator=generator())
    assert torch.equal(*drawn)  # for rows and columns
    assert kstest(torch.log(drawn[0] / 4) / math.log(4), "uniform").statistic < 0.04
    again = cow_mask(2000, (5, 6), sigma_range=(4.0, 16.0), generator=generator())
    assert torch.equal(masks, again) and not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("sigma", [4.0, 8.0])
def test_cow_mask_neighbours_and_autocorrelation(sigma):
    """arccos(rho(1)) / pi and (2/pi) arcsin(rho(d)), rho(d) = exp(-d^2 / (4 sigma^2))."""
    mask = cow_mask(120, (192, 256), sigma_range=(sigma, sigma), generator=generator())
    edge = 2 * int(sigma)  # mirrored noise is smoother there
    inner = mask[:, edge:-edge, edge:-edge]
    sign = 2 * inner.double() - 1
    expected = math.acos(math.exp(-1 / (4 * sigma**2))) / math.pi
    for turn in (inner[:, 1:] ^ inner[:, :-1], inner[:, :, 1:] ^ inner[:, :, :-1]):
        assert turn.double().mean().item() == pytest.approx(expected, rel=0.03)
    for d in (int(sigma), int(2 * sigma), int(4 * sigma)):
        expected = 2 / math.pi * math.asin(math.exp(-(d**2) / (4 * sigma**2)))
        for product in (sign[:, d:] * sign[:, :-d], sign[:, :, d:] * sign[:, :, :-d]):
            assert product.mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("sigma", "size"), [(4.0, (96, 128)), (8.0, (128, 192))])
def test_each_cow_mask_is_cut_at_its_own_mean(sigma, size):
    """0.421 sigma / sqrt(HW); 3.5 times as much with a mean over the batch."""
    mask = cow_mask(400, size, sigma_range=(sigma, sigma), generator=generator())
    mean = mask.double().mean((1, 2))
    spread = 0.421 * sigma / math.sqrt(size[0] * size[1])
    assert mean.std().item() == pytest.approx(spread, rel=0.15)
    assert abs(mean.mean() - 0.5) < 5 * spread / 20


def test_p_is_the_share_of_false():
    for p in (0.25, 0.5, 0.75):
        mask = cow_mask(
            200, (96, 96), sigma_range=(2.0, 4.0), p_range=(p, p), generator=generator()
        )
        assert (~mask).double().mean().item() == pytest.approx(p, abs=0.01)
    mask = cow_mask(800, (64, 64), sigma_range=(1.0, 1.0), p_range=(0, 1), generator=generator())
    assert kstest((~mask).double().mean((1, 2)).numpy(), "uniform").statistic < 0.07


def sides(mask):
    """Heights and widths of rectangles of True; nothing else is in the masks."""
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):  # in one piece
        assert (F.pad(side.long(), (1, 1)).diff(dim=1).abs().sum(1) <= 2).all()
    return rows.sum(1), columns.sum(1)


@pytest.mark.parametrize("size", [(512, 1024), (321, 321), (360, 480)])
def test_boxes_of_half_the_area(size):
    mask = box_mask(100, size, generator=generator())
    assert mask.dtype == torch.bool and mask.shape == (100, *size)
    height, width = sides(mask)
    area = mask.double().mean((1, 2))
    assert (area - 0.5).abs().max() < 0.003
    assert (2 * height >= size[0] - 1).all() and (2 * width >= size[1] - 1).all()
    center = mask[:, (size[0] - 1) // 2 : size[0] // 2 + 1, (size[1] - 1) // 2 : size[1] // 2 + 1]
    assert center.any(2).any(1).all()  # each touches the central pixels
    share = (height / size[0]).double()  # 0.5^u
    assert kstest(np.log(share.numpy()) / math.log(0.5), "uniform").statistic < 0.16


def test_boxes_of_any_area_anywhere():
    count, size = 4000, (40, 64)
    mask = box_mask(count, size, p_range=(0.0, 1.0), generator=generator())
    height, width = sides(mask)
    assert kstest(mask.double().mean((1, 2)).numpy(), "uniform").statistic < 0.04
    # Where there is room, its use is uniform: half of the boxes are in either half of it.
    for line, n, length in ((mask.any(2), height, size[0]), (mask.any(1), width, size[1])):
        room = length - n
        wide = (room > 10) & (n > 0)
        place = line.long().argmax(1)[wide] / room[wide]
        assert kstest(place.numpy(), "uniform").statistic < 0.06  # places are whole pixels
    other = box_mask(2, size, generator=generator(1))
    assert not torch.equal(other[0], other[1])


def test_mix_takes_a_where_the_mask_is_true():
    mask = torch.tensor([[[True, False, False], [False, True, False]]])
    a, b = torch.arange(1, 7).view(1, 2, 3), -torch.arange(1, 7).view(1, 2, 3)
    expected = torch.tensor([[[1, -2, -3], [-4, 5, -6]]])
    assert torch.equal(cowmix.mix(mask, a, b), expected)
    a, b, expected = (torch.stack([x, 10 * x], 1).float() for x in (a, b, expected))
    assert torch.equal(cowmix.mix(mask, a, b), expected)


# ---- Losses ----


class Stub(nn.Conv2d):
    """A convolution that notes what it is given and whether gradients were recorded."""

    def __init__(self, seed, kernel=3):
        super().__init__(3, 4, kernel, padding=kernel // 2)
        for parameter in self.parameters():
            parameter.data = 3 * torch.randn(parameter.shape, generator=generator(seed))
        self.images, self.with_grad = [], []

    def forward(self, image):
        self.images.append(image)
        self.with_grad.append(torch.is_grad_enabled())
        return super().forward(image)


def images(count=2, size=(9, 12)):
    return torch.rand(count, 2, 3, *size, generator=generator(5)).unbind(0)


ALL = torch.ones(2, 9, 12, dtype=torch.bool)


def naive_listing(student, teacher, kind, image_a, image_b, how, valid):
    """Listings 2 and 3 pixel by pixel: loss, share of confident pixels, the student's image."""
    prob_a, prob_b = (teacher(x).softmax(1).detach() for x in (image_a, image_b))
    image, target, counts = image_a.clone(), prob_a.clone(), valid.float()
    for i, y, x in itertools.product(*map(range, counts.shape)):
        if kind == "cutout":
            m = float(how[i, y, x])
            counts[i, y, x] *= m
            image[i, :, y, x] = m * image_a[i, :, y, x] + (1 - m) * 0.5
        else:
            m = float(how[i, y, x] if kind == "mix" else how[i])
            image[i, :, y, x] = (1 - m) * image_a[i, :, y, x] + m * image_b[i, :, y, x]
            target[i, :, y, x] = (1 - m) * prob_a[i, :, y, x] + m * prob_b[i, :, y, x]
    confident = np.mean([float(max(p) > 0.9) for p in target.permute(0, 2, 3, 1)[valid]])
    square = (target - student(image).softmax(1)) ** 2 * counts[:, None]
    return square.sum() / target.numel() * confident, confident, image


@pytest.mark.parametrize("kind", ["mix", "cutout", "ict"])
def test_losses_equal_the_listings(kind):
    (image_a, image_b), student, teacher = images(), Stub(0), Stub(1)
    mask = torch.rand(2, 9, 12, generator=generator(3)) < 0.4
    blend = torch.tensor([0.1, 0.7]).view(-1, 1, 1, 1)
    how = blend.flatten() if kind == "ict" else mask
    valid = torch.rand(2, 9, 12, generator=generator(4)) < 0.8
    expected, confident, image = naive_listing(student, teacher, kind, image_a, image_b, how, valid)
    assert 0 < confident < 1
    gradient = torch.autograd.grad(expected, list(student.parameters()))
    student, teacher = Stub(0), Stub(1)
    if kind == "cutout":
        loss, seen = cowmix.cutout_loss(student, teacher, image_a, mask, GREY, valid, 0.9)
    else:
        combine = {
            "mix": lambda a, b: cowmix.mix(mask, b, a),
            "ict": lambda a, b: torch.lerp(a, b, blend),
        }[kind]
        loss, seen = cowmix.mixing_loss(student, teacher, image_a, image_b, combine, valid, 0.9)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert seen["confident"].item() == pytest.approx(confident)
    torch.testing.assert_close([p.grad for p in student.parameters()], list(gradient))
    torch.testing.assert_close(student.images[0], image)
    clean = [image_a] if kind == "cutout" else [image_a, image_b]
    assert all(map(torch.equal, teacher.images, clean)) and len(teacher.images) == len(clean)
    assert student.with_grad == [True] and not any(teacher.with_grad)
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(x.requires_grad for x in seen.values())


def test_nothing_is_learned_where_a_cutout_is_masked():
    (image, _), student = images(), Stub(0, kernel=1)
    mask = torch.zeros(2, 9, 12, dtype=torch.bool)
    loss, _ = cowmix.cutout_loss(student, Stub(1), image, mask, GREY, ~mask, threshold=0.0)
    loss.backward()
    assert loss == 0 and student.weight.grad.eq(0).all()


def test_nobody_confident():
    (image_a, image_b), student = images(), Stub(0)
    loss, seen = cowmix.mixing_loss(student, Stub(1), image_a, image_b, torch.maximum, ALL, 1.0)
    loss.backward()
    assert loss == 0 and seen["confident"] == 0 and student.weight.grad.eq(0).all()


def moved(x=0.0, y=0.0, mirror=1.0):
    return torch.tensor([[[mirror, 0, x], [0, 1, y], [0, 0, 1]]]).repeat(2, 1, 1)


def test_warping_by_hand():
    image = torch.rand(2, 3, 6, 9, generator=generator())
    label = torch.randint(0, 5, (2, 6, 9), generator=generator())
    label[0, 0, 0] = 255
    grid = warp_grid(moved(x=2, y=-1), (6, 9))
    expected = GREY.expand_as(image).clone()
    expected[:, :, :-1, 2:] = image[:, :, 1:, :-2]  # to the right by 2, up by 1
    torch.testing.assert_close(warp(image, grid, GREY), expected)
    expected = torch.full_like(label, 255)
    expected[:, :-1, 2:] = label[:, 1:, :-2]
    assert torch.equal(warp_label(label, grid), expected)
    grid = warp_grid(moved(mirror=-1.0), (6, 9))
    torch.testing.assert_close(warp(image, grid, GREY), image.flip(-1))
    assert torch.equal(warp_label(label, grid), label.flip(-1))
    turned = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])  # (1, 0) -> (0, 1): clockwise
    torch.testing.assert_close(
        warp(image[:1, :, :, :6], warp_grid(turned, (6, 6)), GREY),
        image[:1, :, :, :6].rot90(-1, (2, 3)),
    )


def test_random_affine_has_the_ranges_of_d_1():
    how = {"flip": 0.5, "translation": 4.0, "scaling": (0.8, 1.25), "rotation": 15.0}
    matrix = cowmix.random_affine(4000, **how, generator=generator()).double().numpy()
    assert (matrix[:, 2] == (0, 0, 1)).all()
    determinant = np.linalg.det(matrix[:, :2, :2])
    assert (determinant < 0).mean() == pytest.approx(0.5, abs=0.03)
    scale = np.abs(determinant) ** 0.5
    angle = np.degrees(np.arctan2(matrix[:, 0, 1] * -1, matrix[:, 1, 1]))
    for values, low, high in (
        (np.log(scale), math.log(0.8), math.log(1.25)),
        (angle, -15, 15),
        (matrix[:, 0, 2], -4, 4),
        (matrix[:, 1, 2], -4, 4),
    ):
        assert kstest(values, "uniform", args=(low, high - low)).statistic < 0.03
    assert abs(np.corrcoef(matrix[:, 0, 2], matrix[:, 1, 2])[0, 1]) < 0.06
    np.testing.assert_allclose(matrix[:, 1, 0], -matrix[:, 0, 1] * np.sign(determinant), atol=1e-6)
    still = cowmix.random_affine(3, flip=0.0, translation=0.0, scaling=(1.0, 1.0), rotation=0.0)
    assert torch.equal(still, torch.eye(3).expand(3, 3, 3))


def test_recolor():
    image = torch.full((20_000, 1, 1, 1), 0.5)
    how = {"brightness": 0.1, "contrast": 1.0}
    shifted = cowmix.recolor(image, **how, generator=generator()).flatten()
    assert shifted.std().item() == pytest.approx(0.1, rel=0.05)
    how = {"brightness": 0.0, "contrast": 1.1}
    factor = cowmix.recolor(image, **how, generator=generator()).flatten() / 0.5
    assert factor.log().std().item() == pytest.approx(math.log(1.1), rel=0.05)
    assert factor.log().mean().item() == pytest.approx(0, abs=0.005)
    assert cowmix.recolor(image, brightness=9.0, contrast=1.1).max() == 1
    how = {"brightness": 0.1, "contrast": 1.1}
    both = cowmix.recolor(image, **how, generator=generator()).flatten()
    torch.testing.assert_close(both, (0.5 * factor + shifted - 0.5).clamp(0, 1))  # c x + b


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (moved(mirror=-1.0), moved()),
        (moved(x=3, y=1), moved()),
        (moved(x=3), moved(x=3)),  # out of the picture for both
        (moved(), moved(x=-2, y=3)),
        (moved(x=1, mirror=-1.0), moved(x=-2, y=3)),
    ],
)
def test_predictions_are_aligned(a, b):
    """A network of single pixels is consistent wherever both see the same place."""
    image, network = images(1)[0], Stub(0, kernel=1)
    loss, seen = cowmix.aug_loss(network, network, image, a, b, nn.Identity(), GREY, ALL, 0.9)
    assert loss < 1e-10 and 0.1 < seen["confident"] < 0.9
    inside = torch.zeros(2, 9, 12)
    for y, x in itertools.product(range(9), range(12)):  # of the student's picture
        place = torch.tensor([x - 5.5, y - 4, 1.0])
        source = torch.linalg.inv(a[0]) @ place
        both = torch.stack([source, b[0] @ source])[:, :2].abs()
        inside[:, y, x] = (both <= torch.tensor([6, 4.5])).all()
    expected = (network(seen["image_mix"]).softmax(1).amax(1) > 0.9).float()
    assert seen["confident"].item() == pytest.approx(
        ((expected * inside).sum() / inside.sum()).item()
    )
    assert inside.mean() < 1 or torch.equal(a[:, :, 2], b[:, :, 2])


def test_pixels_out_of_sight_do_not_count():
    image, student, teacher = images(1)[0], Stub(0, kernel=1), Stub(1, kernel=1)
    how = nn.Identity(), GREY, ALL, 0.0
    loss, _ = cowmix.aug_loss(student, teacher, image, moved(), moved(x=5), *how)
    seen_by_both = image[..., :7]  # of 12 columns
    square = (teacher(seen_by_both).softmax(1) - student(seen_by_both).softmax(1)).square()
    assert loss.item() == pytest.approx(square.sum().item() / (2 * 4 * 9 * 12), rel=1e-5)
    loss.backward()
    assert teacher.weight.grad is None and teacher.with_grad[0] is False
    loss, seen = cowmix.aug_loss(student, teacher, image, moved(), moved(x=50), *how)
    assert loss == 0 and seen["confident"] == 0


def test_losses_never_wait_for_the_device():
    """On the meta device .item(), nonzero, unique and branches on tensors raise."""
    with torch.device("meta"):
        image, net, fill = torch.empty(2, 3, 8, 8), nn.Conv2d(3, 4, 1), torch.empty(3, 1, 1)
    device = image.device
    valid = torch.empty(2, 8, 8, dtype=torch.bool, device=device)
    how = {"flip": 0.5, "translation": 4.0, "scaling": (0.8, 1.25), "rotation": 15.0}
    matrix = cowmix.random_affine(2, **how, device=device)
    masks = (
        cow_mask(2, (8, 8), sigma_range=(2.0, 4.0), device=device),
        box_mask(2, (8, 8), p_range=(0, 1), device=device),
    )
    color = cowmix.partial(cowmix.recolor, brightness=0.1, contrast=1.1)
    losses = [cowmix.aug_loss(net, net, image, matrix, matrix, color, fill, valid)]
    for mask in masks:
        combine = cowmix.partial(cowmix.mix, mask)
        losses.append(cowmix.mixing_loss(net, net, image, image, combine, valid))
        losses.append(cowmix.cutout_loss(net, net, image, mask, fill, valid))
    label = warp_label(
        torch.empty(2, 8, 8, dtype=torch.long, device=device), warp_grid(matrix, (8, 8))
    )
    (sum(loss for loss, _ in losses) + cowmix.cross_entropy(net(image), label)).backward()


def test_cross_entropy_leaves_void_out():
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).repeat(1, 1, 2, 3).requires_grad_()
    label = torch.tensor([[[0, 1, 255], [1, 255, 255]]])  # probabilities 1/4 and 3/4
    loss = cowmix.cross_entropy(logits, label)
    assert loss.item() == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.abs().sum(1) > 0).equal(label != 255)


# ---- U-Net ----


@pytest.mark.parametrize(
    ("num_classes", "decoder"), [(11, 6_368_779), (19, 6_369_043), (21, 6_369_109)]
)
def test_unet_has_table_4_s_parameters(num_classes, decoder):
    with torch.device("meta"):
        network = cowmix.UNet(num_classes)
        resnet = torchvision.models.resnet50()
    counts = {True: 0, False: 0}
    for name, parameter in network.named_parameters():
        counts[name.startswith(HEADS)] += parameter.numel()
        assert parameter.requires_grad
    assert counts == {True: decoder, False: 23_508_032}
    shapes = {k: v.shape for k, v in network.state_dict().items() if not k.startswith(HEADS)}
    expected = {k: v.shape for k, v in resnet.state_dict().items() if not k.startswith("fc.")}
    assert {k: v for k, v in shapes.items() if k not in ("mean", "std")} == expected
    trunk, head = network.parameter_groups(0.5, 3.0)
    assert (trunk["lr"], head["lr"]) == (0.5, 1.5)
    assert [sum(p.numel() for p in g["params"]) for g in (trunk, head)] == [23_508_032, decoder]


def test_unet_s_encoder_is_torchvision_s():
    resnet = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, (1, 2, 1, 1)).eval()
    network = cowmix.UNet(3, layers=(1, 2, 1, 1))
    state = {k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(
        k.startswith(("decoder", "classifier", "mean", "std")) for k in missing
    )
    image, wanted = torch.rand(1, 3, 64, 96, generator=generator()), []
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        layer.register_forward_hook(lambda module, given, output: wanted.append(output))
    with torch.no_grad():
        resnet(network.normalize(image))
        for ours, theirs in zip(
            network.train().stages(network.normalize(image)), wanted, strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert [tuple(x.shape[2:]) for x in wanted] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return cowmix.UNet(5, layers=(1, 1, 1, 1), width=16)


def test_unet_s_batch_norm(unet):
    norms = [m for m in unet.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert not any(m.training for m in norms if unet.train())
    assert all(m.weight.requires_grad for m in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in unet.decoder.modules())
    free = cowmix.UNet(5, layers=(1, 1, 1, 1), width=16, batch_norm="batch")
    assert all(m.training for m in free.modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(ValueError, match="batch_norm"):
        cowmix.UNet(5, batch_norm="on")


@pytest.mark.parametrize("size", [(64, 96), (45, 70), (33, 32), (16, 16)])
def test_unet_pads_with_the_mean_colour_and_cuts_it_off(unet, size):
    image = torch.rand(2, 3, *size, generator=generator())
    rows, columns = -size[0] % 32, -size[1] % 32
    top, left = rows // 2, columns // 2
    padded = unet.mean.expand(2, 3, size[0] + rows, size[1] + columns).clone()
    inside = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    padded[inside] = image
    with torch.no_grad():
        logits = unet(image)
        torch.testing.assert_close(logits, unet(padded)[inside])
        assert logits.shape == (2, 5, *size) and logits.dtype == torch.float32
        features = unet.features(image)
        assert features.shape == (2, unet.feature_channels, *size)
        assert torch.equal(unet.classify(features, size), logits)
        assert unet.classify(features, (90, 80)).shape == (2, 5, 90, 80)


def test_unet_s_decoder_is_figure_7(unet):
    image = torch.rand(1, 3, 64, 96, generator=generator())
    with torch.no_grad():
        two, three, four, x = unet.stages(unet.normalize(image))
        first, *others = unet.decoder
        x = first(x).relu()
        for skip in (four, three, two, None, None):
            x = others.pop(0)(x).relu()
            x = x if skip is None else torch.cat([x, skip], 1)
            x = others.pop(0)(x).relu()
        torch.testing.assert_close(unet(image), unet.classifier(x))


def test_unet_is_unsure_at_first():
    torch.manual_seed(0)
    network = cowmix.UNet(11, layers=(1, 1, 1, 1), width=16, batch_norm="batch")
    with torch.no_grad():
        prob = network(torch.rand(2, 3, 64, 64, generator=generator())).softmax(1)
    assert prob.amax(1).max() < 0.5


def test_unet_loads_weights_by_torchvision_s_names(unet, tmp_path, monkeypatch):
    torch.manual_seed(1)
    other = cowmix.UNet(7, layers=(1, 1, 1, 1), width=16)
    heads = ("decoder", "classifier", "mean", "std")
    state = {k: v for k, v in other.state_dict().items() if not k.startswith(heads)}
    torch.save({**state, "fc.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pth")
    loaded = load_weights(unet, tmp_path / "resnet.pth")
    assert "torchvision" in loaded.kind and loaded.unused == ["fc.weight"]
    assert all(torch.equal(unet.state_dict()[k], v) for k, v in state.items())
    assert all(k.startswith(HEADS) for k in loaded.missing)
    asked = []
    weights = type(cowmix.UNet.imagenet)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: asked.append(self) or state)
    load_weights(unet, "imagenet")
    assert asked == [torchvision.models.ResNet50_Weights.IMAGENET1K_V1]


def test_pretrained_networks_keep_their_statistics():
    small = {"layers": (1, 1, 1, 1), "width": 8}
    for name, pretrained in itertools.product(("unet", "deeplab"), (True, False)):
        recipe = cowmix.Recipe(network=name, **small)
        network = cowmix.network(recipe, 3, pretrained)
        assert type(network).__name__ == {"unet": "UNet", "deeplab": "DeepLabV2"}[name]
        assert network.bn1.training is not pretrained
        assert network.bn1.weight.requires_grad is (name == "unet" or not pretrained)


# ---- Recipes and the loop ----


def test_presets_of_network_and_perturbation():
    camvid = {kind: cowmix.preset("camvid", perturbation=kind) for kind in KINDS}
    epochs = {kind: recipe.iterations / 367 for kind, recipe in camvid.items()}
    assert epochs == dict.fromkeys(KINDS, 300) | {"cutmix": 100, "aug": 50}
    shares = {kind: recipe.p_range for kind, recipe in camvid.items()}
    assert shares.pop("cowmix") == (0.5, 0.5) and set(shares.values()) == {(0.0, 1.0)}
    assert {kind: recipe.perturbation for kind, recipe in camvid.items()} == {k: k for k in KINDS}
    for dataset, name in itertools.product(cowmix.RECIPES, ("unet", "deeplab")):
        recipe = cowmix.preset(dataset, name)
        assert recipe.network == name
        if dataset != "streets":
            assert recipe.lr == {"unet": 1e-4, "deeplab": 1e-5}[name]
            assert recipe.layers[2] == {"unet": 6, "deeplab": 23}[name]
            assert recipe.sigma_range == ((4, 16) if dataset == "camvid" else (8, 32))


PAPER = {  # size, crop, batch size, steps; section 4, D.3
    ("camvid", "unet"): ((360, 480), None, 1, 110_100),
    ("cityscapes", "unet"): ((512, 1024), None, 1, 100_000),
    ("cityscapes", "deeplab"): ((512, 1024), None, 2, 40_000),
    ("voc", "unet"): (None, (321, 321), 10, 40_000),
    ("voc", "deeplab"): (None, (321, 321), 10, 40_000),
}


@pytest.mark.parametrize(("of", "numbers"), PAPER.items())
def test_recipes_have_the_paper_s_numbers(of, numbers):
    recipe = cowmix.preset(*of)
    assert (recipe.size, recipe.crop, recipe.batch_size, recipe.iterations) == numbers
    same = (recipe.consistency_weight, recipe.confidence_threshold, recipe.ema_decay)
    assert same == (10, 0.97, 0.99) and (recipe.lr_power, recipe.head_factor) == (0, 1)
    assert (recipe.scale_range, recipe.flip) == ((1, 1), False)  # D.1 is a perturbation
    aug = (recipe.translation, recipe.scaling, recipe.rotation, recipe.brightness, recipe.contrast)
    assert aug == (4, (0.8, 1.25), 15, 0.1, 1.1) and recipe.ict_alpha == 0.1


def perturbed(kind, seed=0, **changes):
    """unlabeled_loss of two batches of four: what it was made of, and the batches."""
    recipe = cowmix.Recipe(perturbation=kind, sigma_range=(1.0, 2.0), **changes)
    image_a, image_b = torch.rand(2, 4, 3, 9, 12, generator=generator(4)).unbind(0)
    student, fill = Stub(0), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    label = torch.zeros(4, 9, 12).long()
    batches = (image_a, label), (image_b, label)
    _, seen = cowmix.unlabeled_loss(recipe, student, Stub(1), fill, *batches, seed=seed)
    return seen, image_a, image_b, fill


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind):
    """Whatever is where a label says padding, networks of single pixels have the same loss."""
    place = {"translation": 0.0, "rotation": 0.0, "scaling": (1.0, 1.0), "flip_probability": 0.0}
    how = {"sigma_range": (1.0, 2.0), "confidence_threshold": 0.97, "ict_alpha": 1.0, **place}
    recipe = cowmix.Recipe(perturbation=kind, p_range=(0.4, 0.4), **how)
    labels, losses = torch.zeros(2, 4, 9, 12).long(), []
    labels[0, :, :, :4], labels[1, :, 6:] = 255, 255
    for padding, label in ((0.1, labels), (0.9, labels), (0.9, 0 * labels)):
        images = torch.rand(2, 4, 3, 9, 12, generator=generator(4))
        images.movedim(2, 4)[labels == 255] = padding
        networks = Stub(0, kernel=1), Stub(1, kernel=1)
        pairs = zip(images, label, strict=True)
        loss, seen = cowmix.unlabeled_loss(recipe, *networks, GREY, *pairs, seed=3)
        losses.append((loss.item(), seen["confident"].item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and min(losses[0]) > 0
    assert losses[0][1] < 1 and losses[2] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["cowmix", "cutmix", "cowout", "cutout"])
def test_what_each_perturbation_shows_the_student(kind):
    seen, image_a, image_b, fill = perturbed(kind, p_range=(0.3, 0.3))
    other = image_b if kind.endswith("mix") else image_a  # where M = 1
    rest = image_a if kind.endswith("mix") else fill.expand_as(image_a)
    mask = seen["mask"].unsqueeze(1)
    assert torch.equal(seen["image_mix"], torch.where(mask, other, rest))
    is_box = all(torch.equal(m, m.any(1)[:, None] & m.any(0)) for m in seen["mask"])
    assert is_box == kind.startswith("cut")
    share = seen["mask"].float().mean().item()  # p is that of False in cow masks, of True in boxes
    assert share == pytest.approx(0.7 if kind.startswith("cow") else 0.3, abs=0.1)
    assert not torch.equal(seen["mask"], perturbed(kind, 1, p_range=(0.3, 0.3))[0]["mask"])
    if kind == "cutout":
        turned = perturbed(kind, p_range=(0.3, 0.3), cutout_keeps="outside")[0]["mask"]
        assert torch.equal(turned, ~seen["mask"])


def test_ict_blends_each_pair_by_its_own_share():
    seen, image_a, image_b, _ = perturbed("ict", ict_alpha=1.0)
    share = (seen["image_mix"] - image_a).flatten(1) / (image_b - image_a).flatten(1)
    assert share.std(1).max() < 1e-3  # one for all pixels
    assert len({round(value, 3) for value in share.mean(1).tolist()}) == 4
    assert "mask" not in seen
    assert not torch.equal(seen["image_mix"], perturbed("ict", 1, ict_alpha=1.0)[0]["image_mix"])


def test_aug_changes_places_and_colours_of_both(monkeypatch):
    handed, loss = [], cowmix.aug_loss
    monkeypatch.setattr(cowmix, "aug_loss", lambda *given: handed.append(given) or loss(*given))
    _, image, _, fill = perturbed("aug", translation=0.0, rotation=0.0, scaling=(1.0, 1.0))
    _, _, given, a, b, color, given_fill, valid, threshold = handed[0]
    assert valid.all()
    assert given is not None and torch.equal(given, image) and torch.equal(given_fill, fill)
    assert threshold == 0.97 and a.shape == b.shape == (4, 3, 3) and not torch.equal(a, b)
    assert not torch.equal(color(image), color(image))
    teacher = handed[0][1]
    for network, matrix in ((handed[0][0], a), (teacher, b)):
        moved_only = warp(image, warp_grid(matrix, (9, 12)), fill)
        assert not torch.allclose(network.images[0], moved_only, atol=0.01)
        # Brighter and of more contrast, no more: a line through the values of each image.
        for x, y in zip(moved_only, network.images[0], strict=True):
            inside = (y > 0.001) & (y < 0.999)
            assert np.corrcoef(x[inside], y[inside])[0, 1] > 0.999


BASE = ("--labeled", 4, "--weights", "none", "--layers", 1, 1, 1, 1, "--width", 4, "--workers", 0)


def weights_after(command, camvid, out, *flags):
    """Student and teacher after 3 steps, and what was printed."""
    base = ("--dataset", "camvid", "--data-dir", camvid, "--output-dir", out, *BASE)
    steps = ("--size", 48, 64, "--iterations", 3, "--eval-every", 3, "--batch-size", 2)
    steps += ("--lr", 0.02, "--confidence-threshold", 0.05)
    status, printed, errors = command("cowmix", *base, *steps, *flags)
    assert (status, errors) == (0, ""), errors
    state = torch.load(out / "last.pt", weights_only=True)["state"]
    both = [torch.cat([v.flatten().float() for v in state[n].values()]) for n in NETWORKS]
    return *both, printed


NETWORKS = ("student", "teacher")
FLAGS = """
--seed 1 | --split-seed 2 | --supervised | --size 64 64 | --crop 32 48 | --flip --seed 3
--batch-size 1 | --lr 0.04 | --lr-power 1 | --head-factor 3 | --ema-decay 0.5
--consistency-weight 3 | --confidence-threshold 0.5 | --sigma-range 8 8 | --p-range 0.1 0.1
--network deeplab | --network deeplab --aspp-rates 2 3 | --scale-range 0.5 1.5 --crop 48 64
--perturbation cowout | --perturbation cutmix | --perturbation cutout | --perturbation ict
--perturbation aug | --perturbation cutout --cutout-keeps outside | --perturbation ict --ict-alpha 5
--perturbation aug --supervised | --perturbation aug --flip-probability 1
--perturbation aug --translation 20 | --perturbation aug --scaling 0.5 0.5
--perturbation aug --rotation 90 | --perturbation aug --brightness 0.5
--perturbation aug --contrast 2 | --teacher-mode eval
"""


def test_every_flag_reaches_the_step(command, camvid, tmp_path):
    runs = {"": weights_after(command, camvid, tmp_path / "plain")[0]}
    for k, flags in enumerate(FLAGS.strip().replace("\n", " | ").split(" | ")):
        runs[flags] = weights_after(command, camvid, tmp_path / str(k), *flags.split())[0]
    for (one, a), (other, b) in itertools.combinations(runs.items(), 2):
        assert not torch.equal(a, b), (one, other)


def test_what_the_loop_hands_over(command, camvid, tmp_path, monkeypatch):
    losses, updates, drawn, seeds = [], [], [], []
    loss, update, batches = cowmix.mixing_loss, cowmix.update_teacher, run.Batches
    perturb = cowmix.unlabeled_loss
    monkeypatch.setattr(cowmix, "unlabeled_loss", lambda *a, **k: spy_perturb(*a, **k))

    def spy_loss(student, teacher, image_a, image_b, *others):
        losses.append((student.training, teacher.training, image_a, image_b, *others[-2:]))
        return loss(student, teacher, image_a, image_b, *others)

    def spy_update(teacher, student, **options):
        # The first one follows the first step: till then they are equal.
        updates.append(options)
        assert len(updates) > 1 or not torch.equal(teacher.conv1.weight, student.conv1.weight)
        update(teacher, student, **options)

    def spy_perturb(recipe, student, teacher, fill, *batches, seed):
        assert seeds or all(map(torch.equal, teacher.parameters(), student.parameters()))
        assert torch.equal(fill, teacher.mean) and fill.min() > 0
        seeds.append(seed)
        return perturb(recipe, student, teacher, fill, *batches, seed=seed)

    def spy_batches(*what, **options):
        made = batches(*what, **options)
        drawn.append((made.indices, made.stream))
        return made

    monkeypatch.setattr(cowmix, "mixing_loss", spy_loss)
    monkeypatch.setattr(cowmix, "update_teacher", spy_update)
    monkeypatch.setattr(run, "Batches", spy_batches)
    printed = weights_after(command, camvid, tmp_path / "run", "--labeled", "1.0")[2]
    assert [entry[:2] for entry in losses] == [(True, True)] * 3
    assert all(entry[5] == 0.05 and entry[4].all() for entry in losses)
    assert len(set(seeds)) == 3
    assert not any(torch.equal(entry[2], entry[3]) for entry in losses)
    assert updates == [{"decay": 0.99, "buffers": "average"}] * 3
    assert [stream for _, stream in drawn] == [0, 1, 2]
    assert [sorted(indices) for indices, _ in drawn] == [list(range(8))] * 3
    assert "headline: teacher" in printed
    optimizer = torch.load(tmp_path / "run/last.pt", weights_only=True)["state"]["optimizer"]
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0}
    loaded = ("--weights", tmp_path / "run/last.pt", "--labeled", 3)
    for kind, batches_u in (("cutout", 1), ("cutmix", 2), ("ict", 2), ("cowout", 1), ("aug", 1)):
        drawn.clear(), losses.clear(), seeds.clear(), updates.clear()
        weights_after(command, camvid, tmp_path / kind, "--perturbation", kind, *loaded)
        assert [len(indices) for indices, _ in drawn] == [3, *[8] * batches_u]
        assert not any(torch.equal(entry[2], entry[3]) for entry in losses)
    losses.clear()
    weights_after(command, camvid, tmp_path / "pad", "--crop", 56, 72)  # of 48x64
    share = [entry[4].float().mean().item() for entry in losses]
    assert all(0.65 < one < 0.87 for one in share)  # 0.76 of each image, at different places


def test_standard_augmentation_warps_labels_with_their_images(
    command, camvid, tmp_path, monkeypatch
):
    seen, loss = [], cowmix.cross_entropy

    def spy(logits, label):
        seen.append(label)
        return loss(logits, label)

    def spy_network(self, image):
        shown.extend([image] if self.training and torch.is_grad_enabled() else [])
        return forward(self, image)

    shown, forward = [], cowmix.UNet.forward
    monkeypatch.setattr(cowmix, "cross_entropy", spy)
    monkeypatch.setattr(cowmix.UNet, "forward", spy_network)
    flags = ("--perturbation", "aug", "--scaling", 0.5, 0.5, "--supervised", "--brightness", 0)
    weights_after(command, camvid, tmp_path / "run", *flags)
    edge = torch.stack(seen)[:, :, [0, -1]]
    assert edge.eq(255).all() and not torch.stack(seen).eq(255).all()
    # The colours of the data set tell the class: images have been moved with their labels.
    for image, label in zip(shown, seen, strict=True):
        red = [image[:, 0][label == k].mean().item() for k in range(3) if (label == k).any()]
        assert len(red) > 1 and red == sorted(red) and red[-1] - red[0] > 0.02


def test_the_part_that_is_evaluated(command, camvid, tmp_path):
    assert "mIoU on 3 val images" in weights_after(command, camvid, tmp_path / "run")[2]
    (camvid / "test").symlink_to(camvid / "train")
    (camvid / "testannot").symlink_to(camvid / "trainannot")
    args = ("--evaluate", tmp_path / "run/last.pt", "--evaluate-split")
    assert command("cowmix", *args[:2])[1].startswith("8 test images")
    assert command("cowmix", *args, "val")[1].startswith("3 val images")
    (camvid / "test").unlink()
    status, _, errors = command("cowmix", *args, "test")
    assert status == 2 and "--evaluate-split test" in errors


def test_the_folder_names_what_was_asked_for(command, camvid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ("--dataset", "camvid", "--data-dir", camvid, *BASE, "--size", 48, 64, "--batch-size", 2)
    names = {}
    for flags in ("cutmix", "cutmix --p-range 0.5 0.5", "cutmix --p-range 0 1", "cutmix --lr 1e-3"):
        before = set(Path("runs").glob("*"))
        run_one = ("--perturbation", *flags.split(), "--iterations", 1)
        assert command("cowmix", *base, *run_one)[::2] == (0, "")
        (folder,) = set(Path("runs").glob("*")) - before
        names[flags] = folder.name.partition("s0_weights-none_")[2]
    small = "perturbation-cutmix_size-48x64_batch-size-2_iterations-1{}_layers-1x1x1x1_width-4"
    assert names["cutmix"] == small.format("")
    assert names["cutmix --p-range 0 1"] == small.format("") + "-2"  # the preset's own
    assert "p-range-0.5x0.5" in names["cutmix --p-range 0.5 0.5"]
    assert names["cutmix --lr 1e-3"] == small.format("_lr-0.001")
    deeplab = ("--network", "deeplab", "--lr", 1e-4, "--iterations", 1)
    assert command("cowmix", *base, *deeplab)[0] == 0
    (folder,) = Path("runs").glob("*network-deeplab*")
    assert "lr-0.0001" in folder.name and "head-factor" not in folder.name
