"""cowmix.py against scipy, the paper's listings, exact laws and torchvision's ResNet."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import record
from scipy.stats import kstest
from torch import nn

import cowmix
from common import InputError, ranks
from common.deeplab import DeepLabV2, load_weights
from common.flags import parse_args
from cowmix import warp, warp_grid, warp_label

SMALL = {"layers": (1, 1, 1, 1), "width": 16}
KINDS = ("cowmix", "cowout", "cutmix", "cutout", "ict", "aug")
GREY = torch.full((3, 1, 1), 0.5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Masks ----


# ---- Losses ----


def small_network(seed, kernel=3):
    """A convolution whose predictions are partly confident; a kernel of 1 sees single pixels."""
    network = nn.Conv2d(3, 4, kernel, padding=kernel // 2)
    for parameter in network.parameters():
        parameter.data = 3 * torch.randn(parameter.shape, generator=generator(seed))
    return network


IMAGE_A, IMAGE_B = torch.rand(2, 2, 3, 9, 12, generator=generator(5))
ALL = torch.ones(2, 9, 12, dtype=torch.bool)


def naive_listing(student, teacher, kind, image_a, image_b, m, valid, threshold):
    """Listings 2 and 3 pixel by pixel: the loss, the share of confident pixels, the mixed image."""
    prob_a, prob_b = (teacher(x).softmax(1).detach() for x in (image_a, image_b))
    image, target, counts = image_a.clone(), prob_a.clone(), valid.float()
    for i, y, x in itertools.product(*map(range, counts.shape)):
        share = float(m[i, y, x])
        if kind == "cutout":
            counts[i, y, x] *= share
            image[i, :, y, x] = share * image_a[i, :, y, x] + (1 - share) * 0.5
        else:
            image[i, :, y, x] = (1 - share) * image_a[i, :, y, x] + share * image_b[i, :, y, x]
            target[i, :, y, x] = (1 - share) * prob_a[i, :, y, x] + share * prob_b[i, :, y, x]
    confident = (target.amax(1) > threshold)[valid].float().mean()
    square = (target - student(image).softmax(1)) ** 2 * counts[:, None]
    return square.sum() / target.numel() * confident, confident, image


@pytest.mark.parametrize("threshold", [0.9, 1.0])  # nobody is more than certain
@pytest.mark.parametrize("kind", ["mix", "cutout", "ict"])
def test_losses_equal_the_listings(kind, threshold):
    student, teacher = small_network(0), small_network(1)
    mask = torch.rand(2, 9, 12, generator=generator(3)) < 0.4
    blend = torch.tensor([0.1, 0.7]).view(-1, 1, 1, 1)
    m = blend.expand(2, 1, 9, 12)[:, 0] if kind == "ict" else mask
    valid = torch.rand(2, 9, 12, generator=generator(4)) < 0.8
    given = (student, teacher, kind, IMAGE_A, IMAGE_B, m, valid, threshold)
    expected, confident, image = naive_listing(*given)
    assert confident < 1 and (confident > 0) == (threshold < 1)
    gradient = torch.autograd.grad(expected, list(student.parameters()))
    if kind == "cutout":
        given = (student, teacher, IMAGE_A, mask, GREY, valid, threshold)
        loss, details = cowmix.cutout_loss(*given)
    else:
        blended = partial(torch.lerp, weight=blend)
        combine = blended if kind == "ict" else partial(cowmix.mix, ~mask)
        given = (student, teacher, IMAGE_A, IMAGE_B, combine, valid, threshold)
        loss, details = cowmix.mixing_loss(*given)
    loss.backward()
    torch.testing.assert_close((loss, details["confident"]), (expected, confident))
    torch.testing.assert_close([p.grad for p in student.parameters()], list(gradient))
    torch.testing.assert_close(details["mixed_image"], image)
    torch.testing.assert_close(details["prediction"], student(image).detach())
    assert all(p.grad is None for p in teacher.parameters())  # no gradient reaches the teacher
    assert not any(value.requires_grad for value in details.values())


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
    square = image[:1, :, :, :6]
    clockwise = warp(square, warp_grid(turned, (6, 6)), GREY)
    torch.testing.assert_close(clockwise, square.rot90(-1, (2, 3)))


AFFINE = {"flip": 0.5, "translation": 4.0, "scaling": (0.8, 1.25), "rotation": 15.0}


def test_random_affine_has_the_ranges_of_d_1():
    matrix = cowmix.random_affine(4000, **AFFINE, generator=generator()).double().numpy()
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
    def grey(brightness, contrast):
        strength = {"brightness": brightness, "contrast": contrast}
        image = torch.full((20_000, 1, 1, 1), 0.5)
        return cowmix.recolor(image, **strength, generator=generator()).flatten()

    shifted, factor, both = grey(0.1, 1.0), grey(0.0, 1.1) / 0.5, grey(0.1, 1.1)
    assert shifted.std().item() == pytest.approx(0.1, rel=0.05)
    assert factor.log().std().item() == pytest.approx(math.log(1.1), rel=0.05)
    assert factor.log().mean().item() == pytest.approx(0, abs=0.005)
    assert grey(9.0, 1.1).max() == 1
    torch.testing.assert_close(both, (0.5 * factor + shifted - 0.5).clamp(0, 1))  # c x + b


@pytest.mark.parametrize("a", [moved(), moved(x=3, y=1), moved(x=1, mirror=-1.0)])
@pytest.mark.parametrize("b", [moved(), moved(x=3), moved(x=-2, y=3)])
def test_predictions_are_aligned(a, b):
    """A network of single pixels is consistent wherever both see the same place."""
    network = small_network(0, kernel=1)
    loss, details = cowmix.aug_loss(network, network, IMAGE_A, a, b, nn.Identity(), GREY, ALL, 0.9)
    assert loss < 1e-10 and 0.1 < details["confident"] < 0.9
    inside = torch.zeros(2, 9, 12)
    for y, x in itertools.product(range(9), range(12)):  # of the student's picture
        place = torch.tensor([x - 5.5, y - 4, 1.0])
        source = torch.linalg.inv(a[0]) @ place
        both = torch.stack([source, b[0] @ source])[:, :2].abs()
        inside[:, y, x] = (both <= torch.tensor([6, 4.5])).all()
    expected = (network(details["mixed_image"]).softmax(1).amax(1) > 0.9).float()
    torch.testing.assert_close(details["confident"], (expected * inside).sum() / inside.sum())


def test_pixels_out_of_sight_do_not_count():
    student, teacher = small_network(0, kernel=1), small_network(1, kernel=1)
    others = nn.Identity(), GREY, ALL, 0.0
    loss, _ = cowmix.aug_loss(student, teacher, IMAGE_A, moved(), moved(x=5), *others)
    seen_by_both = IMAGE_A[..., :7]  # of 12 columns
    square = (teacher(seen_by_both).softmax(1) - student(seen_by_both).softmax(1)).square()
    assert loss.item() == pytest.approx(square.sum().item() / (2 * 4 * 9 * 12), rel=1e-5)
    loss.backward()
    assert teacher.weight.grad is None  # no gradient reaches the teacher
    loss, details = cowmix.aug_loss(student, teacher, IMAGE_A, moved(), moved(x=50), *others)
    assert loss == 0 and details["confident"] == 0


# ---- U-Net ----


def encoder(state: dict) -> dict:
    """The part of a U-Net's or ResNet's state that both have."""
    own = ("decoder.", "classifier.", "fc.", "mean", "std")
    return {name: value for name, value in state.items() if not name.startswith(own)}


@pytest.mark.parametrize(("num_classes", "decoder"), [(11, 6_368_779), (21, 6_369_109)])
def test_unet_has_table_4_s_parameters(num_classes, decoder):
    with torch.device("meta"):
        network, resnet = cowmix.UNet(num_classes), torchvision.models.resnet50()
    ours, theirs = encoder(network.state_dict()), encoder(resnet.state_dict())
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    trunk, head = network.parameter_groups(0.5, 3.0)
    assert (trunk["lr"], head["lr"]) == (0.5, 1.5)
    assert [sum(p.numel() for p in g["params"]) for g in (trunk, head)] == [23_508_032, decoder]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 23_508_032 + decoder


def test_unet_s_encoder_is_torchvision_s():
    resnet = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, (1, 2, 1, 1)).eval()
    network = cowmix.UNet(3, layers=(1, 2, 1, 1)).train()  # its encoder stays in eval mode
    network.load_state_dict(encoder(resnet.state_dict()), strict=False)
    image, expected = torch.rand(1, 3, 64, 96, generator=generator()), []
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        layer.register_forward_hook(lambda module, given, output: expected.append(output))
    with torch.no_grad():
        resnet(network.normalize(image))
        torch.testing.assert_close(list(network.stages(network.normalize(image))), expected)
    assert [tuple(x.shape[2:]) for x in expected] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return cowmix.UNet(5, **SMALL)


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
    network = cowmix.UNet(11, **SMALL, batch_norm="batch")
    with torch.no_grad():
        prob = network(torch.rand(2, 3, 64, 64, generator=generator())).softmax(1)
    assert prob.amax(1).max() < 0.5


def test_unet_loads_weights_by_torchvision_s_names(unet, tmp_path, monkeypatch):
    torch.manual_seed(1)
    state = encoder(cowmix.UNet(7, **SMALL).state_dict())
    torch.save({**state, "fc.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pth")
    loaded = load_weights(unet, tmp_path / "resnet.pth")
    assert "torchvision" in str(loaded) and loaded.unused == ["fc.weight"]
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in state.items())
    assert loaded.missing and not encoder(dict.fromkeys(loaded.missing))
    asked = []
    weights = type(cowmix.UNet.imagenet)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: asked.append(self) or state)
    load_weights(unet, "imagenet")
    assert asked == [torchvision.models.ResNet50_Weights.IMAGENET1K_V1]


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(("name", "kind"), [("unet", cowmix.UNet), ("deeplab", DeepLabV2)])
def test_pretrained_networks_keep_their_statistics(name, kind, pretrained):
    recipe = cowmix.Recipe(network=name, **SMALL)
    network = cowmix.network(recipe, 3, pretrained=pretrained)
    assert type(network) is kind and network.bn1.training is not pretrained
    assert network.bn1.weight.requires_grad is (name == "unet" or not pretrained)


# ---- Recipes and the loop ----


def test_presets_of_network_and_perturbation():
    camvid = {kind: cowmix.preset("camvid", {"perturbation": kind}) for kind in KINDS}
    epochs = {kind: recipe.iterations / 367 for kind, recipe in camvid.items()}
    assert epochs == dict.fromkeys(KINDS, 300) | {"cutmix": 100, "aug": 50}
    assert all(recipe.perturbation == kind for kind, recipe in camvid.items())
    shares = {kind: recipe.p_range for kind, recipe in camvid.items()}
    assert shares == dict.fromkeys(KINDS, (0, 1)) | {"cowmix": (0.5, 0.5)}
    for dataset, name in itertools.product(cowmix.RECIPES, ("unet", "deeplab")):
        recipe = cowmix.preset(dataset, {"network": name})
        assert recipe.network == name
        if dataset != "streets":
            assert recipe.lr == {"unet": 1e-4, "deeplab": 1e-5}[name]
            assert recipe.layers[2] == {"unet": 6, "deeplab": 23}[name]
            assert recipe.sigma_range == ((4, 16) if dataset == "camvid" else (8, 32))


@pytest.mark.parametrize(
    ("dataset", "network", "numbers"),  # size, crop, batch size, steps (section 4, D.3)
    [
        ("camvid", "unet", ((360, 480), None, 1, 110_100)),
        ("cityscapes", "unet", ((512, 1024), None, 1, 100_000)),
        ("cityscapes", "deeplab", ((512, 1024), None, 2, 40_000)),
        ("voc", "unet", (None, (321, 321), 10, 40_000)),
        ("voc", "deeplab", (None, (321, 321), 10, 40_000)),
    ],
)
def test_recipes_have_the_paper_s_numbers(dataset, network, numbers):
    recipe = cowmix.preset(dataset, {"network": network})
    assert (recipe.size, recipe.crop, recipe.batch_size, recipe.iterations) == numbers
    same = (recipe.consistency_weight, recipe.confidence_threshold, recipe.ema_decay)
    assert same == (10, 0.97, 0.99) and (recipe.lr_power, recipe.head_factor) == (0, 1)
    assert (recipe.scale_range, recipe.flip) == ((1, 1), False)  # D.1 is a perturbation
    aug = (recipe.translation, recipe.scaling, recipe.rotation, recipe.brightness, recipe.contrast)
    assert aug == (4, (0.8, 1.25), 15, 0.1, 1.1) and recipe.ict_alpha == 0.1


SEED = {"perturbation": 3, "color": 4}.get
STILL = {"translation": 0.0, "rotation": 0.0, "scaling": (1.0, 1.0), "sigma_range": (1.0, 2.0)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "aug"])
def test_color_jitter_changes_the_student_s_images_alone(kind):
    image, seen, mixed = torch.rand(8, 3, 12, 16, generator=generator(4)), [], []
    image[:4], teacher = image[4:].clone(), small_network(1)  # equal images get other colours
    pair = (image, torch.zeros(8, 12, 16).long())
    teacher.register_forward_pre_hook(lambda network, given: seen.append(given[0]))
    for jitter in (False, True):
        recipe = cowmix.Recipe(perturbation=kind, p_range=(1, 1), color_jitter=jitter, **STILL)
        given = (recipe, small_network(0), teacher, GREY, pair, pair)
        mixed.append(cowmix.unlabeled_loss(*given, seed=SEED)[1]["mixed_image"])
    assert all(torch.equal(x, image) for x in seen)
    if kind == "cowout":  # p = 1 hides all of it
        assert torch.equal(*mixed)
        return
    plain, colored = mixed
    assert sum(map(torch.equal, plain, colored)) < 4
    assert sum(map(torch.equal, colored[:4], colored[4:])) < 3
    assert colored.min() >= 0 and colored.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind):
    """Networks of single pixels have the same loss, whatever the padding looks like."""
    others = {"p_range": (0.4, 0.4), "flip_probability": 0.0, "ict_alpha": 1.0}
    recipe = cowmix.Recipe(perturbation=kind, **others, **STILL)
    networks = small_network(0, kernel=1), small_network(1, kernel=1)
    padded = torch.zeros(2, 4, 9, 12, dtype=torch.bool)
    padded[0, :, :, :4], padded[1, :, 6:] = True, True

    def values(color, label=255, threshold=0.97):
        images = torch.rand(2, 4, 3, 9, 12, generator=generator(4))
        images.movedim(2, 4)[padded] = color
        changed = replace(recipe, confidence_threshold=threshold)
        pairs = zip(images, label * padded.long(), strict=True)
        loss, details = cowmix.unlabeled_loss(changed, *networks, GREY, *pairs, seed=SEED)
        return loss.item(), details["confident"].item()

    dark, bright, counted = values(0.1), values(0.9), values(0.9, label=0)
    assert dark == pytest.approx(bright, rel=1e-5) and min(dark) > 0 and dark[1] < 1
    assert counted != pytest.approx(bright, rel=1e-3)
    assert values(0.9, threshold=0.0)[1] == 1


def shown_by_aug(**changes):
    """Returns eight images, what the teacher sees of them and what the student sees."""
    recipe = cowmix.Recipe(perturbation="aug", **{**STILL, **changes})
    image, seen = torch.rand(8, 3, 12, 16, generator=generator(4)), []
    pair, teacher = (image, torch.zeros(8, 12, 16).long()), small_network(1)
    teacher.register_forward_pre_hook(lambda network, given: seen.append(given[0]))
    given = (recipe, small_network(0), teacher, GREY, pair, pair)
    _, details = cowmix.unlabeled_loss(*given, seed=SEED)
    return image, *seen, details["mixed_image"]


def test_aug_changes_places_and_colours_of_both():
    image, *both = shown_by_aug(brightness=0.0, contrast=1.0)
    mirrored = [(x - image.flip(-1)).abs().amax((1, 2, 3)) < 1e-5 for x in both]
    assert not torch.equal(*mirrored) and all(m.any() and not m.all() for m in mirrored)
    for x, y in itertools.combinations(shown_by_aug(flip_probability=0.0), 2):
        assert (x - y).abs().amax((1, 2, 3)).min() > 0.01  # each image has its own colours
    for x in shown_by_aug(scaling=(0.5, 0.5))[1:]:
        assert (x[:, :, [0, -1]] - GREY).abs().max() < 1e-6  # the mean colour is around it


TINY = "--dataset camvid --labeled 4 --size 24 64 --weights none --layers 1 1 1 1 --width 4 "
TINY += "--workers 0 --lr 0.02 --iterations 3 --batch-size 2 --confidence-threshold 0.05"


def train(camvid, *flags):
    """Returns the session of a tiny run."""
    return record("cowmix", "--data-dir", camvid, *TINY.split(), *flags)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_student_is_shown(camvid, kind):
    flags = "--labeled 3 --batch-size 4 --sigma-range 1 2 --p-range 0.3 0.3 --ict-alpha 1"
    session = train(camvid, "--perturbation", kind, *flags.split())
    two = kind in ("cowmix", "cutmix", "ict")  # streams of unlabeled images: two make pairs
    assert list(map(len, session.indices.values())) == [3, 8, 8][: 2 + two]  # all are unlabeled
    image_a, image_b = (torch.cat([x for x, _ in session.drawn[k]]) for k in (1, 1 + two))
    assert not two or not any(map(torch.equal, image_a, image_b))
    image = torch.cat([pictures["mixed_image"] for pictures in session.pictures])
    if kind == "ict":  # each pair has its own share
        share = ((image - image_a) / (image_b - image_a)).flatten(1).nanmedian(1).values
        assert len({round(value, 3) for value in share.tolist()}) == 12
        expected = torch.lerp(image_a, image_b, share.view(-1, 1, 1, 1))
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
    elif kind != "aug":
        mask = torch.cat([pictures["mask"] for pictures in session.pictures])
        fill = session.state["student"].mean
        pair = (image_b, image_a) if two else (image_a, fill)  # where M = 1, where M = 0
        assert torch.equal(image, torch.where(mask.unsqueeze(1), *pair))
        is_box = all(torch.equal(m, m.any(1)[:, None] & m.any(0)) for m in mask)
        assert is_box == kind.startswith("cut")
        share = mask.float().mean().item()  # p is that of False in cow masks, of True in boxes
        assert share == pytest.approx(0.7 if kind.startswith("cow") else 0.3, abs=0.05)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(mask, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_logs_the_loss_of_its_batches(camvid, kind):
    """The first loss depends only on the seed, the flags and the batches with their padding."""
    session = train(camvid, "--perturbation", kind, "--crop", 28, 72, "--iterations", 1)
    pairs = [session.drawn[k][0] for k in (1, max(session.drawn))]
    torch.manual_seed(0)
    network = cowmix.network(session.recipe, 11, pretrained=False)
    given = (session.recipe, network, network, network.mean, *pairs)  # a teacher like the student
    loss, details = cowmix.unlabeled_loss(*given, seed=partial(ranks.step_seed, 0, 0, 0))
    logged = session.logged["loss_u"], session.logged["confident"]
    assert logged == ([loss.item()], [details["confident"].item()])


def test_networks_and_optimizer_of_the_loop(camvid):
    session = train(camvid)
    student, teacher = session.state["student"], session.state["teacher"]
    assert student.training and teacher.training and session.headline == "teacher"
    assert {group["weight_decay"] for group in session.state["optimizer"].param_groups} == {0}
    supervised = train(camvid, "--supervised", "--ema-decay", 0.5, "--iterations", 1)
    student, teacher = supervised.state["student"], supervised.state["teacher"]
    torch.testing.assert_close(teacher.bn1.running_mean, 0.5 * student.bn1.running_mean)


def test_unlabeled_batches_have_padding_in_place_of_labels(camvid):
    session = train(camvid, "--crop", 28, 72)
    for image, label in session.drawn[1] + session.drawn[2]:
        padded = (image - session.state["student"].mean).abs().amax(1) < 1 / 255
        assert torch.equal(label, 255 * padded.long())
        assert padded.double().mean().item() == pytest.approx(1 - 24 * 64 / 28 / 72)


def test_standard_augmentation_warps_labels_with_their_images(camvid):
    flags = "--perturbation aug --scaling 0.5 0.5 --rotation 0 --brightness 0 --supervised"
    for pictures in train(camvid, *flags.split()).pictures:
        image, label = pictures["labeled"], pictures["truth"]
        assert label[:, [0, -1]].eq(255).all() and not label.eq(255).all()
        # The colours of the data set tell the class: images have been moved with their labels.
        red = [image[:, 0][label == k].mean().item() for k in range(3) if (label == k).any()]
        assert len(red) > 1 and red == sorted(red) and red[-1] - red[0] > 0.02


def test_the_test_part_is_evaluated_if_there_is_one(command, camvid, tmp_path):
    argv = ("--data-dir", camvid, *TINY.split(), "--output-dir", tmp_path / "run")
    assert "mIoU on 3 val images" in command("cowmix", *argv)[1]
    (camvid / "test").symlink_to(camvid / "train")
    (camvid / "testannot").symlink_to(camvid / "trainannot")
    args = ("--evaluate", tmp_path / "run/last.pt", "--evaluate-split")
    assert command("cowmix", *args[:2])[1].startswith("8 test images")
    assert command("cowmix", *args, "val")[1].startswith("3 val images")
    (camvid / "test").unlink()
    status, _, errors = command("cowmix", *args, "test")
    assert status == 2 and "--evaluate-split test" in errors


def test_the_folder_names_what_differs_from_the_data_set_s_recipe():
    flags = ["--dataset", "camvid", "--perturbation", "cutmix", "--network", "deeplab"]
    _, args = parse_args("cowmix", cowmix.__doc__, cowmix.RECIPES, cowmix.preset, flags)
    name = str(args.output_dir).removeprefix("runs/cowmix_camvid_30_s0_")
    assert {*name.split("_")} == {"perturbation-cutmix", "network-deeplab"}


def test_flags_that_do_not_go_together(camvid):
    with pytest.raises(InputError, match="--batch-size 2: cannot be split into 4 micro-batches"):
        train(camvid, "--accumulate", 4)
    with pytest.raises(InputError, match="--scale-range: needs --crop"):
        train(camvid, "--scale-range", 0.5, 1.5)
