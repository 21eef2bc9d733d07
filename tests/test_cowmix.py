"""cowmix.py against scipy, the paper's listings, exact laws and torchvision's ResNet."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from conftest import generator, record
from scipy.stats import kstest
from torch import nn

import cowmix
from common.deeplab import DeepLabV2, load_weights
from common.flags import parse_args

SMALL = {"layers": (1, 1, 1, 1), "width": 16}
KINDS = ("cowmix", "cowout", "cutmix", "cutout", "ict", "aug")
GREY = torch.full((3, 1, 1), 0.5)


# ---- Losses ----


def small_network(seed):
    """A network of single pixels whose predictions are partly confident."""
    network = nn.Conv2d(3, 4, 1)
    for parameter in network.parameters():
        parameter.data = 3 * torch.randn(parameter.shape, generator=generator(seed))
    return network


def test_pixels_above_the_threshold_are_confident():
    prob, valid = torch.tensor([0.5, 0.9, 1.0, 1.0]).view(1, 1, 1, 4), torch.ones(1, 1, 4).bool()
    valid[..., 3] = False
    shares = [cowmix.confident_fraction(prob, value, valid).item() for value in (0.4, 0.9, 1.0)]
    assert shares == pytest.approx([1, 1 / 3, 0])


def test_random_affine_has_the_ranges_of_d_1():
    ranges = {"flip": 0.5, "translation": 4.0, "scaling": (0.8, 1.25), "rotation": 15.0}
    matrix = cowmix.random_affine(4000, **ranges, generator=generator()).double().numpy()
    assert (matrix[:, 2] == (0, 0, 1)).all()
    determinant = np.linalg.det(matrix[:, :2, :2])
    assert (determinant < 0).mean() == pytest.approx(0.5, abs=0.03)
    scale = np.abs(determinant) ** 0.5
    angle = np.degrees(np.arctan2(matrix[:, 0, 1] * -1, matrix[:, 1, 1]))
    x, y = matrix[:, :2, 2].T
    for values, high in ((np.log(scale), math.log(1.25)), (angle, 15), (x, 4), (y, 4)):
        assert kstest(values, "uniform", args=(-high, 2 * high)).statistic < 0.03
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.06
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


# ---- U-Net ----


def test_unet_has_table_4_s_parameters():
    with torch.device("meta"):
        network = cowmix.UNet(11)
    trunk, head = network.parameter_groups(0.5, 3.0)
    assert (trunk["lr"], head["lr"]) == (0.5, 1.5)
    assert [sum(p.numel() for p in g["params"]) for g in (trunk, head)] == [23_508_032, 6_368_779]


def test_unet_s_encoder_is_torchvision_s(monkeypatch):
    resnet = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, (1, 2, 1, 1)).eval()
    network = cowmix.UNet(3, layers=(1, 2, 1, 1)).train()  # its encoder stays in eval mode
    weights = type(network.imagenet)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: resnet.state_dict())
    loaded = load_weights(network, "imagenet")
    own = ("decoder.", "classifier.")  # which a ResNet has not
    assert loaded.unused == ["fc.weight", "fc.bias"]
    assert all(name.startswith(own) for name in loaded.missing)
    image, expected = torch.rand(1, 3, 64, 96, generator=generator()), []
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        layer.register_forward_hook(lambda module, given, output: expected.append(output))
    with torch.no_grad():
        resnet(network.normalize(image))
        torch.testing.assert_close(list(network.stages(network.normalize(image))), expected)
    assert [tuple(x.shape[2:]) for x in expected] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("size", [(64, 96), (45, 70), (33, 32), (16, 16)])
def test_unet_pads_with_the_mean_colour_and_cuts_it_off(size):
    torch.manual_seed(0)
    unet = cowmix.UNet(5, **SMALL)
    image = torch.rand(2, 3, *size, generator=generator())
    rows, columns = -size[0] % 32, -size[1] % 32
    top, left = rows // 2, columns // 2
    padded = unet.mean.expand(2, 3, size[0] + rows, size[1] + columns).clone()
    inside = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    padded[inside] = image
    with torch.no_grad():
        logits, features = unet(image), unet.features(image)
        torch.testing.assert_close(logits, unet(padded)[inside])
        assert torch.equal(unet.classify(features, size), logits)
        assert unet.classify(features, (90, 80)).shape == (2, 5, 90, 80)
        assert logits.softmax(1).max() < 0.5  # unsure at first


def test_unet_s_decoder_is_figure_7():
    unet = cowmix.UNet(5, **SMALL)
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


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(("name", "kind"), [("unet", cowmix.UNet), ("deeplab", DeepLabV2)])
def test_pretrained_networks_keep_their_statistics(name, kind, pretrained):
    network = cowmix.network(cowmix.Recipe(network=name, **SMALL), 3, pretrained=pretrained)
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
        if dataset not in ("streets", "small"):
            assert recipe.lr == {"unet": 1e-4, "deeplab": 1e-5}[name]
            assert recipe.layers[2] == {"unet": 6, "deeplab": 23}[name]
            assert recipe.sigma_range == ((4, 16) if dataset == "camvid" else (8, 32))


NUMBERS = {  # size, crop, batch size, steps (section 4, D.3; 40000 steps: code)
    ("camvid", "unet"): ((360, 480), None, 1, 110_100),
    ("cityscapes", "unet"): ((512, 1024), None, 1, 100_000),
    ("cityscapes", "deeplab"): ((512, 1024), None, 2, 40_000),
    ("voc", "unet"): (None, (321, 321), 10, 40_000),
    ("voc", "deeplab"): (None, (321, 321), 10, 40_000),
}


@pytest.mark.parametrize(("dataset", "network"), NUMBERS)
def test_recipes_have_the_paper_s_numbers(dataset, network):
    r = cowmix.preset(dataset, {"network": network})
    assert (r.size, r.crop, r.batch_size, r.iterations) == NUMBERS[dataset, network]
    assert (r.consistency_weight, r.confidence_threshold, r.ema_decay) == (10, 0.97, 0.99)
    assert (r.lr_power, r.head_factor, r.scale_range, r.flip) == (0, 1, (1, 1), False)
    aug = (r.translation, r.scaling, r.rotation, r.brightness, r.contrast)
    assert aug == (4, (0.8, 1.25), 15, 0.1, 1.1) and r.ict_alpha == 0.1


SEED = {"perturbation": 3, "color": 4}.get
STILL = {"translation": 0.0, "rotation": 0.0, "scaling": (1.0, 1.0), "sigma_range": (1.0, 2.0)}


def shown(kind, image, **changes):
    """What the teacher and what the student sees of images that are all pairs with themselves."""
    recipe = cowmix.Recipe(perturbation=kind, **{**STILL, "p_range": (1, 1), **changes})
    teacher, seen, pair = small_network(1), [], (image, torch.zeros(8, 12, 16).long())
    teacher.register_forward_pre_hook(lambda network, given: seen.append(given[0]))
    given = (recipe, small_network(0), teacher, GREY, pair, pair)
    _, details = cowmix.unlabeled_loss(*given, seed=SEED)
    return *seen, details["seen"]


@pytest.mark.parametrize("kind", ["cowmix", "cutmix", "cutout", "ict"])  # p = 1 hides all of cowout
def test_color_jitter_changes_the_student_s_images_alone(kind):
    image = torch.rand(4, 3, 12, 16, generator=generator(4)).repeat(2, 1, 1, 1)
    (*seen, plain), (*again, colored) = (shown(kind, image, color_jitter=j) for j in (False, True))
    assert all(torch.equal(x, image) for x in seen + again)
    assert sum(map(torch.equal, plain, colored)) < 4
    assert sum(map(torch.equal, colored[:4], colored[4:])) < 3  # equal images get other colours
    assert colored.min() >= 0 and colored.max() <= 1


def test_aug_changes_places_and_colours_of_both():
    image = torch.rand(8, 3, 12, 16, generator=generator(4))
    both = shown("aug", image, brightness=0.0, contrast=1.0)
    mirrored = [(x - image.flip(-1)).abs().amax((1, 2, 3)) < 1e-5 for x in both]
    assert not torch.equal(*mirrored) and all(m.any() and not m.all() for m in mirrored)
    three = (image, *shown("aug", image, flip_probability=0.0))
    for x, y in itertools.combinations(three, 2):
        assert (x - y).abs().amax((1, 2, 3)).min() > 0.01  # each image has its own colours
    for x in shown("aug", image, scaling=(0.5, 0.5)):
        assert (x[:, :, [0, -1]] - GREY).abs().max() < 1e-6  # the mean colour is around it


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind):
    """Networks of single pixels have the same loss, whatever the padding looks like."""
    others = {"p_range": (0.4, 0.4), "flip_probability": 0.0, "ict_alpha": 1.0}
    recipe = cowmix.Recipe(perturbation=kind, **others, **STILL)
    networks = small_network(0), small_network(1)
    padded = torch.zeros(2, 4, 9, 12, dtype=torch.bool)
    padded[0, :, :, :4], padded[1, :, 6:] = True, True

    def values(color, label=255, threshold=0.97):
        images = torch.rand(2, 4, 3, 9, 12, generator=generator(4))
        images.movedim(2, 4)[padded] = color
        changed = replace(recipe, confidence_threshold=threshold)
        pairs = zip(images, label * padded.long(), strict=True)
        loss, details = cowmix.unlabeled_loss(changed, *networks, GREY, *pairs, seed=SEED)
        assert not any(value.requires_grad for value in details.values())
        loss.backward()
        assert all(parameter.grad is None for parameter in networks[1].parameters())
        return loss.item(), details["confident"].item()

    dark, bright, counted = values(0.1), values(0.9), values(0.9, label=0)
    assert dark == pytest.approx(bright, rel=1e-5) and min(dark) > 0 and dark[1] < 1
    assert counted != pytest.approx(bright, rel=1e-3)
    assert values(0.9, threshold=0.0)[1] == 1


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
    image = torch.cat([pictures["seen"] for pictures in session.pictures])
    if kind == "ict":  # each pair has its own share
        share = ((image - image_a) / (image_b - image_a)).flatten(1).nanmedian(1).values
        assert len({round(value, 3) for value in share.tolist()}) == 12
        expected = torch.lerp(image_a, image_b, share.view(-1, 1, 1, 1))
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
    elif kind != "aug":
        name = "mask_b" if two else "mask"
        mask = torch.cat([pictures[name] for pictures in session.pictures])
        fill = session.state["student"].mean
        pair = (image_b, image_a) if two else (image_a, fill)  # where M = 1, where M = 0
        assert torch.equal(image, torch.where(mask.unsqueeze(1), *pair))
        shown = [pictures["other"] for pictures in session.pictures if two]
        assert not two or torch.equal(torch.cat(shown), image_b)
        is_box = all(torch.equal(m, m.any(1)[:, None] & m.any(0)) for m in mask)
        assert is_box == kind.startswith("cut")
        share = mask.float().mean().item()  # p is that of False in cow masks, of True in boxes
        assert share == pytest.approx(0.7 if kind.startswith("cow") else 0.3, abs=0.05)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(mask, 2))


def test_the_teacher_s_statistics_are_averages(camvid):
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
    evaluate = ("--evaluate", tmp_path / "run/last.pt", "--evaluate-split")
    assert "mIoU on 3 val images" in command("cowmix", *argv)[1]
    assert "--evaluate-split test" in command("cowmix", *evaluate, "test")[2]
    for end in ("", "annot"):
        (camvid / f"test{end}").symlink_to(camvid / f"train{end}")
    assert command("cowmix", *evaluate[:2])[1].startswith("8 test images")
    assert command("cowmix", *evaluate, "val")[1].startswith("3 val images")


def test_the_folder_names_what_differs_from_the_data_set_s_recipe():
    flags = ["--dataset", "camvid", "--perturbation", "cutmix", "--network", "deeplab"]
    _, args = parse_args("cowmix", cowmix.__doc__, cowmix.RECIPES, cowmix.preset, flags)
    name = str(args.output_dir).removeprefix("runs/cowmix_camvid_30_s0_")
    assert {*name.split("_")} == {"perturbation-cutmix", "network-deeplab"}
