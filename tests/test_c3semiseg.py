"""The method of c3semiseg.py against naive loops, closed forms and the laws of its random parts."""

import itertools
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from conftest import generator, read_state, record, stopping_train, tiny
from torch import nn
from torch.testing import assert_close
from torchvision.transforms import v2

import c3semiseg
from common.augment import seeded
from common.colors import recolor

CITYSCAPES, BDD100K = (c3semiseg.RECIPES[name] for name in ("cityscapes", "bdd100k"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- Cross-set CutMix (equation 4) ----


@pytest.mark.parametrize("mixing", ["cross", "intra", "none"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_cut_mix_is_equation_4_and_undoes_itself(mixing, n):
    batch = torch.randint(256, (2 * n, 3, 8, 16)).float()
    order, box = c3semiseg.draw_pairs(mixing, n, (8, 16), generator())
    mixed, (a, b) = c3semiseg.cut_mix(box, batch[order]), batch[order].chunk(2)
    m = 1 - box[:, None].float()
    assert torch.equal(mixed, torch.cat([m * a + (1 - m) * b, m * b + (1 - m) * a]))
    assert torch.equal(c3semiseg.cut_mix(box, mixed)[order.argsort()], batch)
    assert torch.equal(c3semiseg.un_mix(box, order, mixed), batch)
    assert box.any() == (mixing != "none")


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
    ours = recolor(image.float(), [[c3semiseg.OPERATIONS[name](r)] for r in strengths])
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
    assert torch.equal(c3semiseg.color_view(recipe, "weak", [5, 6], image / 255), image / 255)
    still = replace(recipe, jitter=0.0, hue=0.0, operation_probability=0.0)
    assert torch.equal(c3semiseg.color_view(still, "strong", [5, 6], image / 255), image / 255)


def test_each_view_of_each_group_has_colours_of_its_own():
    recipe, seen = replace(CITYSCAPES, teacher_view="jitter", student_view="jitter"), []

    def teacher(image):
        seen.append(image)
        return torch.randn(len(image), 5, 8, 8), image

    image = torch.rand(2, 3, 8, 8)

    def seed(group, network):
        return 10 * group + len({"student", network})

    regions = c3semiseg.ConfidentRegions(5)
    targets = c3semiseg.label_groups(recipe, teacher, regions, {0: image, 3: image}, seed)
    views = torch.stack([*seen, targets[0][0], targets[3][0]])
    assert (views[:, None] - views).abs().amax((3, 4, 5)).eq(0).sum() == 8  # each equals itself
    colors = c3semiseg.color_view(recipe, "jitter", [seed(0, "student")], image)
    assert torch.equal(targets[0][0], colors) and (targets[0][2] == 255).any()


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


@pytest.mark.parametrize(("wrong", "hard"), [(24, 3), (2, 2), (57, 4), (0, 0), (60, 7)])
def test_half_of_a_sample_is_hard_if_there_are_enough_of_both(wrong, hard):
    prediction = (torch.arange(60) < wrong).long().view(1, 6, 10)
    given = (torch.zeros_like(prediction), prediction, 7)
    index, drawn = c3semiseg.sample_pixels(*given, num_classes=2)
    pixels = index[drawn == 0]
    assert len(set(pixels.tolist())) == 7 and (pixels < wrong).sum() == hard


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
    for c in set(pseudo_label.unique().tolist()) - {255}:
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
        pseudo_label[0, 5, 0], confidence[0, 5, 0] = 18, 1.0
        pseudo_label[:, :2], confidence[:, :2] = 255, 1.0  # void
        expected = naive_thresholds(thresholds, confidence, pseudo_label, keep, momentum)
        mask = regions.update(confidence, pseudo_label)
        assert_close(regions.thresholds, expected, rtol=0, atol=1e-6)
        thresholds = regions.thresholds.clone()
        counts = pseudo_label != 255
        passes = confidence >= thresholds[pseudo_label.clamp(max=18)]  # inclusive, updated first
        assert torch.equal(mask[counts], passes[counts])
        assert torch.equal(mask, regions.confident(confidence, pseudo_label))
        assert not mask[pseudo_label == 255].any()


def test_thresholds_are_exact_quantiles():
    """Of close confidences, and of 255 classes: with void, ids are all values of a byte."""
    confidence, label = 1 - torch.rand(2, 40, 50) * 1e-5, torch.arange(4000).view(2, 40, 50) % 256
    regions = c3semiseg.ConfidentRegions(255, momentum=0.0)
    regions.update(confidence, label)
    for c in range(255):
        assert regions.thresholds[c] == confidence[label == c].sort(descending=True).values[12]


# ---- The terms of equation 7 ----


class Pixels(nn.Module):
    """Logits and embeddings of single pixels: what is mixed and un-mixed again is the same."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.classifier, self.projection = nn.Conv2d(3, 4, 1), c3semiseg.ProjectionHead(3, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=2)

    def forward(self, image):
        return self.classifier(image), self.projection(image[..., ::2, ::2])


def sampled_contrast(**changes):
    return partial(c3semiseg.contrast_loss, **{"per_class": 3, "generator": generator(), **changes})


def naive_sampled_contrast(f, g, label, logits):
    label, prediction = label[:, ::2, ::2], F.avg_pool2d(logits, 2).argmax(1)
    how = {"num_classes": 4, "generator": generator()}
    index, drawn = c3semiseg.sample_pixels(label, prediction, 3, **how)
    assert (drawn != 255).sum() > 10
    f, g = (e.permute(0, 2, 3, 1).reshape(-1, 5)[index] for e in (f, g))
    return naive_contrast(f, drawn, g, drawn, 0.15, True)


@pytest.mark.parametrize("sets", ["both", "labeled", "unlabeled"])
def test_terms_of_equation_7(sets):
    """Also in their gradients: they reach only anchors, or both sides if sets is "labeled"."""
    student, n = Pixels(1), 3
    image_l, image_u, strong = torch.rand(3, n, 3, 12, 16)
    label_l = torch.randint(5, (n, 12, 16))
    label_l[label_l == 4] = 255
    prob, confidence, pseudo_label, g_u = c3semiseg.label_images(Pixels(2), image_u)
    assert torch.equal(pseudo_label, prob.argmax(1)) and torch.equal(confidence, prob.amax(1))
    label_u = pseudo_label.masked_fill(confidence < 0.5, 255)
    pairs = c3semiseg.draw_pairs("cross", n, (12, 16), generator())
    given = (student, (image_l, label_l), (strong, prob, label_u, g_u), *pairs)
    terms, details = c3semiseg.c3_loss(*given, contrast_fn=sampled_contrast(), sets=sets)
    logits, f = student(torch.cat([image_l, strong]))
    log_u = logits[n:].log_softmax(1)
    keys = torch.cat([f[:n] if sets == "labeled" else f[:n].detach(), g_u])
    part = {"labeled": slice(0, n), "unlabeled": slice(n, 2 * n), "both": slice(0, 2 * n)}[sets]
    of_part = (x[part] for x in (f, keys, torch.cat([label_l, label_u]), logits))
    expected = {
        "loss_l": F.cross_entropy(logits[:n], label_l, ignore_index=255),
        "loss_u": -(prob / 4 * log_u).sum(1)[label_u != 255].mean(),
        "loss_c": naive_sampled_contrast(*of_part),
    }
    assert_close(terms, expected)
    gradient = partial(torch.autograd.grad, inputs=[*student.parameters()], retain_graph=True)
    assert_close(*(gradient(sum(losses.values())) for losses in (terms, expected)))
    assert torch.equal(details["pseudo_label"], label_u)
    other, mask = details["other"], details["mask_b"].unsqueeze(1)
    assert torch.equal(torch.where(mask, other, image_l), details["mixed_image"]) and mask.any()
    assert not any(map(torch.equal, other, image_l))
    assert not any(value.requires_grad for value in (*details.values(), prob, g_u))


@pytest.mark.parametrize(
    ("batch", "num_classes", "present", "first_class", "groups"),
    [
        (4, 3, 3, 0, 12),
        (4, 3, 3, 1, 8),  # without road
        (4, 150, 3, 0, 12),  # groups of an image and a class that is not there do not count
        (32, 19, 19, 0, 256),  # at most so many
    ],
)
def test_pixels_that_are_contrasted(batch, num_classes, present, first_class, groups):
    """Only anchors have a gradient. They are 4 pixels of a class in an image."""
    label, logits = torch.randint(present, (batch, 24, 24)), torch.randn(batch, num_classes, 24, 24)
    f = torch.randn(batch, 8, 24, 24).requires_grad_()
    contrast = sampled_contrast(per_class=4, first_class=first_class)
    contrast(f, f.detach(), label, logits).backward()
    anchors = f.grad.abs().sum(1) > 0
    assert anchors.sum() == 4 * groups and label[anchors].min() == first_class
    share = anchors[: batch // 2].sum() / anchors.sum()  # of the first half of the images
    assert abs(share - 0.5) < 0.1


def test_weights_of_equation_7():
    """test_parity.py has the ramps; here are the numbers of the paper and its warm-up."""
    weights = [c3semiseg.loss_weights(CITYSCAPES, 2500 + t) for t in (0, 2000, 4000, 22_499)]
    assert [w["loss_u"] for w in weights] == pytest.approx([0.3369, 14.3252, 50, 50], rel=2e-4)
    assert all(w["loss_l"] == 1 and w["loss_c"] == pytest.approx(0.15) for w in weights)
    paper = replace(CITYSCAPES, warmup_contrast=False, contrast_ramp=5000)
    late = [c3semiseg.loss_weights(paper, t)["loss_c"] for t in (0, 2499, 2500, 25_000)]
    assert late == pytest.approx([0, 0, 0.15 * 0.2865048, 0.15], rel=1e-4)


# ---- Network and recipes ----


def test_network_of_the_paper():
    net = c3semiseg.network(CITYSCAPES, 19, pretrained=True)
    assert sum(p.numel() for p in net.projection.parameters()) == 590_336
    for convolution in (net.projection[0], net.projection[2]):
        assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.05)
    embedding = net.projection.bfloat16()(torch.randn(2, 2048, 3, 4).bfloat16())
    assert embedding.dtype == torch.float32 and embedding.shape == (2, 256, 3, 4)
    assert_close(embedding.norm(dim=1), torch.ones(2, 3, 4))
    backbone, heads = net.parameter_groups(1.2e-4, 1.0)
    assert len(backbone["params"]) == 104 and len(heads["params"]) == 12
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)


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


def train(camvid, *flags):
    """Returns the session of a tiny run of six steps."""
    flags = ("--size", 48, 64, "--iterations", 6, *flags)
    return record("c3semiseg", *tiny("c3semiseg", camvid), *flags)


def test_rows_of_tables_3_and_7(camvid):
    assert set(train(camvid, "--supervised").logged) == {"loss_l"}
    logged = {"loss_l", "loss_u", "confident"}
    assert set(train(camvid, "--contrast", "none").logged) == logged
    assert set(train(camvid, "--consistency-weight", 0).logged) == logged | {"loss_c"}
    assert set(train(camvid, "--keep", 1).logged["confident"]) == {1}  # black corners, too


def test_once_the_teacher_labels_images_its_statistics_are_its_own(camvid):
    """With a rate of 0 the weights stay. Before, it takes the statistics of the student."""
    session = train(camvid, "--lr", 0)
    teacher, norm = session.state["teacher"], nn.BatchNorm2d(4)
    for image, _ in session.drawn[0][:2] + session.drawn[1]:
        norm(teacher.conv1(teacher.normalize(image)))
    assert_close(teacher.bn1.running_mean, norm.running_mean)
    assert_close(teacher.bn1.running_var, norm.running_var)


def test_the_gradients_of_groups_are_averaged(camvid):
    """They differ a little by batch norm. Adam hides their scale; its first moments show it."""
    norms = []
    for size in (1, 4):
        session = train(camvid, "--supervised", "--iterations", 1, "--group-size", size)
        state = session.state["optimizer"].state_dict()["state"]
        norms.append(torch.cat([x["exp_avg"].flatten() for x in state.values()]).norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.5)  # 4 times as large if they were added


def test_checkpoints_with_and_without_a_head(command, camvid, tmp_path, monkeypatch):
    """The projection head is dropped at the end (section 3.5)."""
    last, args = tmp_path / "run/last.pt", (*tiny("c3semiseg", camvid), "--iterations", 4)
    with monkeypatch.context() as patch:
        patch.setattr(c3semiseg, "train", stopping_train("c3semiseg", 3, signal.SIGTERM))
        status = command("c3semiseg", *args, "--group-size", 2, "--output-dir", last.parent)[0]
        assert status == 143
    for with_head in (True, False):
        for network in ("student", "teacher"):
            names = read_state(last.parent)[network]
            assert any(name.startswith("projection") for name in names) == with_head
        assert torch.load(last)["args"]["accumulate"] == 1  # so that more ranks can resume
        assert command("c3semiseg", "--evaluate", last)[::2] == (0, "")
        argv = ("--predict", last, camvid / "train/000.png", "--out", tmp_path / f"{with_head}")
        assert command("c3semiseg", *argv)[0] == 0
        status, printed, _ = command("c3semiseg", "--resume", last)
        said = "in the paper: student" if with_head else "resumed after"
        assert status == 0 and said in printed
    train(camvid, "--weights", last)  # the new head stays as initialised
