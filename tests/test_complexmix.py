"""complexmix.py against naive loops, exact laws and classmix.py."""

import difflib
import inspect
import itertools
import math
from dataclasses import asdict

import pytest
import torch
from conftest import record
from torch import nn

import classmix
import complexmix
from common import ranks
from complexmix import complex_mask, draw_blocks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
            mask[b, i, j] = int(label[b, i, j]) in ranked[: math.floor(len(ranked) / 2)]
    return mask


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
def test_mask_equals_naive_loop(batch, num_classes, size, blocks, p, classes):
    label = torch.randint(-1, num_classes + 1, (batch, *size), generator=generator())
    label[label == num_classes] = 255
    scores = torch.rand(batch, p * p, num_classes, generator=generator(1))
    rng = generator(2)
    given = {"classes": classes, "scores": scores, "generator": rng}
    mask = complex_mask(label, num_classes, blocks, **given)
    assert mask.dtype == torch.bool and mask.shape == label.shape
    assert torch.equal(mask, naive_complex_mask(label, num_classes, p, classes, scores))
    assert mask.any() == (num_classes > 1) and not mask[(label < 0) | (label == 255)].any()
    assert torch.equal(rng.get_state(), generator(2).get_state())  # scores given: nothing drawn
    drawn = complex_mask(label, num_classes, blocks, classes=classes, generator=rng)
    scores = torch.rand(batch, p * p, num_classes, generator=generator(2))
    assert torch.equal(drawn, naive_complex_mask(label, num_classes, p, classes, scores))


def test_unknown_classes_value():
    with pytest.raises(ValueError, match="classes must be 'all' or 'present', not 'half'"):
        complex_mask(torch.zeros(1, 2, 2).long(), 3, 2, classes="half")


def test_the_draw_of_p():
    blocks, count = (4, 16, 64, 128), 4000
    drawn, again, other = (
        [draw_blocks(blocks, seed, iteration) for iteration in range(count)] for seed in (0, 0, 1)
    )
    assert drawn == again
    assert all(drawn[k : k + 50] != other[:50] for k in range(8))  # not a shifted copy either
    error = 4 * math.sqrt(3 / 16 / count)
    for p in blocks:
        assert abs(drawn.count(p) / count - 1 / 4) < error
    assert abs(sum(a == b for a, b in itertools.pairwise(drawn)) / count - 1 / 4) < error


def small_network(seed):
    """A convolution whose predictions are partly confident."""
    network = nn.Conv2d(3, 4, 3, padding=1)
    for parameter in network.parameters():
        parameter.data = 2 * torch.randn(parameter.shape, generator=generator(seed))
    return network


@pytest.mark.parametrize("weighting", ["fraction", "fraction sample", "pixel"])
def test_loss_is_classmix_s(weighting):
    """test_classmix.py compares that one with a naive loop."""
    student, teacher, labels, graphs = small_network(0), small_network(1), [], []
    teacher.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    image = torch.rand(3, 3, 6, 5, generator=generator(2))
    mask = torch.rand(3, 6, 5, generator=generator(3)) < 0.4
    weighting, scope = [*weighting.split(), "batch"][:2]
    options = {"weighting": weighting, "scope": scope, "threshold": 0.9, "factor": 0.3}
    options["make_mask"] = lambda label: labels.append(label) or mask
    expected, expected_details = classmix.classmix_loss(student, teacher, image, **options)
    gradient = torch.autograd.grad(expected, list(student.parameters()))
    loss, details = complexmix.complexmix_loss(student, teacher, image, **options)
    loss.backward()
    assert 0 < details["lambda"] < 0.3
    torch.testing.assert_close((loss, details), (expected, expected_details))
    torch.testing.assert_close([p.grad for p in student.parameters()], list(gradient))
    assert not any(graphs) and all(p.grad is None for p in teacher.parameters())
    assert torch.equal(*labels) and not any(value.requires_grad for value in details.values())


# ---- What is shared with classmix.py ----


def test_shared_functions_are_the_same_text():
    for name in ("mix", "cross_entropy", "network", "check"):
        ours, theirs = (inspect.getsource(getattr(m, name)) for m in (complexmix, classmix))
        assert ours == theirs


def test_the_loop_is_nearly_the_same_text():
    loops = [inspect.getsource(method.train).splitlines() for method in (classmix, complexmix)]
    changes = [line for line in difflib.ndiff(*loops) if line[0] in "+-"]
    assert 10 < len(changes) <= 30, "\n".join(changes)


def test_recipes():
    ours, theirs = complexmix.RECIPES, classmix.RECIPES
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = asdict(ours[name]), asdict(theirs[name])
        different = {key for key in a.keys() & b.keys() if a[key] != b[key]}
        # With the recipe of streets the supervised runs of both files are the same.
        assert different == (set() if name == "streets" else {"warmup"})
    paper = ours["cityscapes"]
    assert (paper.blocks, paper.classes) == ((4, 16, 64, 128), "all")
    assert (paper.size, paper.crop, paper.batch_size) == ((512, 1024), None, 2)
    assert (paper.lr, paper.momentum, paper.weight_decay) == (2.5e-4, 0.9, 5e-4)
    assert (paper.iterations, paper.warmup, paper.unlabeled_weight) == (40_000, 1_000, 1)


# ---- Training ----

TINY = "--dataset camvid --labeled 4 --size 24 32 --weights none --layers 1 1 1 1 --width 4 "
TINY += "--workers 0 --aspp-rates 1 2 --lr 0.05 --iterations 4 --confidence-threshold 0.6"


def train(camvid, *flags, method="complexmix"):
    """Returns the session of a tiny run."""
    return record(method, "--data-dir", camvid, *TINY.split(), *flags)


def weights(session, *networks):
    """All numbers of the networks in one vector, batch-norm statistics too."""
    states = [session.state[name].state_dict() for name in networks or ("student",)]
    return torch.cat([v.flatten().float() for state in states for v in state.values()])


def test_each_step_has_its_own_p_and_each_micro_batch_its_own_scores(camvid):
    flags = ("--accumulate", 2, "--batch-size", 4, "--seed", 5, "--warmup", 2, "--iterations", 8)
    session = train(camvid, *flags, "--blocks", 2, 3, 7)
    assert ["mask" in pictures for pictures in session.pictures] == [False] * 2 + [True] * 6
    blocks = [draw_blocks((2, 3, 7), 5, iteration) for iteration in range(8)]
    assert set(blocks[2:]) == {2, 3, 7}
    for iteration, pictures in list(enumerate(session.pictures))[2:]:
        same = []
        for micro_batch in (0, 1):  # the pictures are those of the last one
            seed = ranks.step_seed(5, iteration, micro_batch, "mask")
            rng = torch.Generator().manual_seed(seed)
            mask = complex_mask(pictures["pseudo_label"], 11, blocks[iteration], generator=rng)
            same.append(torch.equal(mask, pictures["mask"]))
        assert same == [False, True]


def test_the_teacher_labels_in_train_mode_and_copies_the_statistics(camvid):
    session = train(camvid, "--warmup", 1)
    student, teacher = session.state["student"], session.state["teacher"]
    assert student.training and teacher.training and session.headline == "student"
    assert all(map(torch.equal, student.buffers(), teacher.buffers()))
    assert not torch.equal(student.conv1.weight, teacher.conv1.weight)


@pytest.mark.parametrize("method", ["classmix", "complexmix"])
def test_mean_is_subtracted_from_red_green_and_blue(camvid, method):
    session = train(camvid, "--warmup", 0, "--mean", 51, 102, 204, method=method)
    for name in ("student", "teacher"):
        mean = session.state[name].mean.flatten().tolist()
        assert mean == pytest.approx([0.2, 0.4, 0.8])


SAME = """| --accumulate 2 --batch-size 4 | --supervised
| --momentum 0.5 --weight-decay 0.1 --head-factor 3 --lr-power 2
| --flip --crop 32 48 --scale-range 0.5 1.5 | --optimizer adam --lr 0.001 --weighting pixel
| --weight-scope sample --ema-decay 0.5 --confidence-threshold 0.5 | --width 6 --aspp-rates 1 3"""


@pytest.mark.parametrize("flags", SAME.replace("\n", " ").split("|"))
def test_one_block_of_present_classes_trains_as_classmix(camvid, flags):
    flags = (*flags.split(), "--warmup", 0)
    ours = train(camvid, "--blocks", 1, "--classes", "present", *flags)
    theirs = train(camvid, *flags, method="classmix")
    both = ("student", "teacher")
    assert torch.equal(weights(ours, *both), weights(theirs, *both))
