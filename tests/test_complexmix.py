"""complexmix.py against naive loops and exact laws; what it shares with classmix.py."""

import ast
import difflib
import inspect
import itertools
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import classmix
import complexmix
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


@pytest.mark.parametrize(("size", "p"), [((321, 321), 128), ((360, 640), 64), ((45, 60), 16)])
def test_blocks_of_sides_that_p_does_not_divide(size, p):
    """A chessboard of blocks: p on each side, their lengths differ by one pixel at most."""
    scores = torch.tensor([[0.0, 1], [1, 0]])[torch.arange(p)[:, None].add(torch.arange(p)) % 2]
    mask = complex_mask(torch.zeros(1, *size).long(), 2, p, scores=scores.view(1, p * p, 2))[0]
    assert mask[0, 0]
    for line, side in ((mask[0], size[1]), (mask[:, 0], size[0])):
        _, lengths = line.unique_consecutive(return_counts=True)
        assert len(lengths) == p and set(lengths.tolist()) <= {side // p, -(-side // p)}
    assert torch.equal(mask, ~(mask[:, :1] ^ mask[:1]))


def split_in_blocks(mask, p):
    """(B,H,W) -> (B,p*p,pixels of a block)."""
    height, width = mask.shape[1] // p, mask.shape[2] // p
    return F.unfold(mask[:, None].float(), (height, width), stride=(height, width)).transpose(1, 2)


@pytest.mark.parametrize("num_classes", [2, 12, 19, 21])
def test_every_block_selects_half_of_the_classes(num_classes):
    p, n = 8, num_classes // 3 + 1  # n of the ids are present in each block, once
    for ids, classes in ((num_classes, "all"), (n, "present")):
        label = torch.arange(ids).repeat(p).expand(50, p, -1)
        mask = complex_mask(label, num_classes, p, classes=classes, generator=generator())
        chosen = split_in_blocks(mask, p)
        assert (chosen.sum(2) == ids // 2).all()
        share = ids // 2 / ids  # of the draws in which an id is chosen
        error = (chosen.mean((0, 1)) - share).abs().max()
        assert error <= 4.5 * math.sqrt(share * (1 - share) / (50 * p * p))


@pytest.mark.parametrize(
    ("p", "std", "count"), [(4, 0.125, 2000), (16, 0.031, 1000), (64, 0.0078, 200)]
)
def test_mean_and_spread_on_a_constant_map(p, std, count):
    """Bernoulli(9/19) blocks: the spread of a mask's mean falls as 1/p."""
    masks = complex_mask(torch.full((count, p, 2 * p), 7), 19, p, generator=generator())
    mean = masks.double().mean((1, 2))
    assert abs(mean.mean() - 9 / 19) < 4 * std / math.sqrt(count)
    assert mean.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * count) + 0.01)
    assert not complex_mask(torch.full((2, p, p), 7), 19, p, classes="present").any()


def test_mean_and_spread_at_p_128():
    label, rng = torch.full((20, 128, 128), 18), generator()
    parts = [complex_mask(label, 19, 128, generator=rng).double() for _ in range(15)]
    mean = torch.cat(parts).mean((1, 2))
    assert abs(mean.mean() - 9 / 19) < 4 * 0.0039 / math.sqrt(300)
    assert mean.std().item() == pytest.approx(0.0039, rel=0.17)  # four standard errors


@pytest.mark.parametrize("p", [1, 4, 16])
def test_mean_on_any_map(p):
    label = torch.randint(19, (3, 5), generator=generator()).repeat_interleave(16, 0)
    label = label.repeat_interleave(9, 1).expand(1500, -1, -1)
    mean = complex_mask(label, 19, p, generator=generator(1)).double().mean((1, 2))
    assert abs(mean.mean() - 9 / 19) < 4 * mean.std() / math.sqrt(1500)


def test_blocks_and_images_are_independent():
    p, count = 4, 4000
    mask = complex_mask(torch.zeros(2 * count, p, p).long(), 2, p, generator=generator())
    bits = mask.view(count, 2 * p * p).double()  # of pairs of images
    correlation = torch.corrcoef(bits.T) - torch.eye(2 * p * p)
    assert correlation.abs().max() < 5 / math.sqrt(count)


def test_one_block_of_present_classes_is_classmix():
    label = torch.randint(-1, 9, (64, 6, 7), generator=generator())
    scores = torch.rand(64, 9, generator=generator(1))
    one = complex_mask(label, 9, 1, classes="present", scores=scores[:, None])
    assert torch.equal(one, classmix.class_mask(label, 9, scores=scores))


def test_unknown_classes_value():
    with pytest.raises(ValueError, match="classes is 'all' or 'present', not 'half'"):
        complex_mask(torch.zeros(1, 2, 2).long(), 3, 2, classes="half")


def test_the_draw_of_p():
    blocks, count = (4, 16, 64, 128), 4000
    drawn = [draw_blocks(blocks, 0, iteration) for iteration in range(count)]
    assert drawn == [draw_blocks(blocks, 0, iteration) for iteration in range(count)]
    assert drawn != [draw_blocks(blocks, 1, iteration) for iteration in range(count)]
    for p in blocks:
        assert abs(drawn.count(p) / count - 1 / 4) < 4 * math.sqrt(3 / 16 / count)
    twice = sum(a == b for a, b in itertools.pairwise(drawn)) / count
    assert abs(twice - 1 / 4) < 4 * math.sqrt(3 / 16 / count)
    assert draw_blocks((64,), 0, 5) == 64


class Stub(nn.Conv2d):
    """A 3x3 convolution that notes what it is given and whether gradients were recorded."""

    def __init__(self, seed):
        super().__init__(3, 4, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = 2 * torch.randn(parameter.shape, generator=generator(seed))

    def forward(self, image):
        self.image, self.with_grad = image, torch.is_grad_enabled()
        return super().forward(image)


def naive_loss(student, teacher, image, mask, threshold, weighting, scope, factor):
    prob = teacher(image).softmax(1).detach()
    image_mix, target = image.clone(), prob.clone()
    for i, y, x in itertools.product(*map(range, mask.shape)):
        if not mask[i, y, x]:
            image_mix[i, :, y, x] = image[(i + 1) % len(image), :, y, x]
            target[i, :, y, x] = prob[(i + 1) % len(image), :, y, x]
    hard = F.one_hot(target.argmax(1), prob.shape[1]).permute(0, 3, 1, 2)
    pixel_loss = -(hard * student(image_mix).softmax(1).log()).sum(1)
    weight = (target.amax(1) >= threshold).float()
    if weighting == "fraction":
        weight = torch.stack([w.mean() for w in weight]) if scope == "sample" else weight.mean()
        weight = weight.view(-1, 1, 1)
    return (factor * weight * pixel_loss).mean(), factor * weight.mean(), image_mix


@pytest.mark.parametrize("weighting", ["fraction", "fraction sample", "pixel"])
def test_loss_equals_naive_loss(weighting):
    student, teacher, labels = Stub(0), Stub(1), []
    image = torch.rand(3, 3, 6, 5, generator=generator(2))
    mask = torch.rand(3, 6, 5, generator=generator(3)) < 0.4
    weighting, scope = [*weighting.split(), "batch"][:2]
    how = {"threshold": 0.9, "weighting": weighting, "scope": scope, "factor": 0.3}
    expected, weight, image_mix = naive_loss(student, teacher, image, mask, **how)
    assert 0 < weight < 0.3
    gradient = torch.autograd.grad(expected, list(student.parameters()))
    how["make_mask"] = lambda pseudo_label: labels.append(pseudo_label) or mask
    loss, seen = complexmix.complexmix_loss(student, teacher, image, **how)
    loss.backward()
    torch.testing.assert_close([loss, seen["lambda"]], [expected, weight])
    torch.testing.assert_close([p.grad for p in student.parameters()], list(gradient))
    assert torch.equal(student.image, image_mix) and torch.equal(teacher.image, image)
    assert student.with_grad and not teacher.with_grad
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(labels[0], teacher(image).argmax(1)) and seen["pseudo_label"] is labels[0]
    assert not any(x.requires_grad for x in seen.values())


@pytest.mark.parametrize("classes", ["all", "present"])
def test_core_never_waits_for_the_device(classes):
    """On the meta device .item(), nonzero, unique and branches on tensors raise."""
    with torch.device("meta"):
        image, label, net = torch.empty(2, 3, 9, 8), torch.empty(2, 9, 8).long(), nn.Conv2d(3, 4, 1)

    def make_mask(label):
        return complex_mask(label, 4, 16, classes=classes)

    for weighting in ("fraction", "pixel"):
        how = {"make_mask": make_mask, "weighting": weighting}
        loss, _ = complexmix.complexmix_loss(net, net, image, **how)
        (loss + complexmix.cross_entropy(net(image), label)).backward()


# ---- What is shared with classmix.py ----


def test_shared_functions_are_the_same_text():
    def functions(module):
        own = inspect.getmembers(module, inspect.isfunction)
        own = [(name, f) for name, f in own if f.__module__ == module.__name__]
        return {name: inspect.getsource(f) for name, f in own}

    ours, theirs = functions(complexmix), functions(classmix)
    same = {name for name in ours if ours[name] == theirs.get(name)}
    assert same == {"mix", "cross_entropy", "network"}
    assert ours.keys() & theirs.keys() - same == {"unlabeled_weight", "make_mask", "train", "main"}


def outside_docstring_recipe_and_mask(module) -> list[str]:
    """The lines of a method file that are not empty, nor of these parts."""
    text = Path(module.__file__).read_text()
    recipe = {"Recipe", "VOC", "SMALL", "ADAM", "RECIPES", "UnlabeledLoss"}
    left_out, body = set(), ast.parse(text).body
    for node in body:
        target = node.targets[0].id if isinstance(node, ast.Assign) else ""
        name = getattr(node, "name", target)
        if node is body[0] or name in recipe or name.endswith("_mask") or name == "draw_blocks":
            above = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
            left_out |= set(range(min(above, default=node.lineno), node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return [line for k, line in lines if k not in left_out and line and not line.startswith("# ")]


def test_the_difference_to_classmix_is_small():
    texts = map(outside_docstring_recipe_and_mask, (classmix, complexmix))
    changes = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert 20 < len(changes) <= 60, "\n".join(changes)


def test_recipes():
    ours, theirs = complexmix.RECIPES, classmix.RECIPES
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = asdict(ours[name]), asdict(theirs[name])
        different = {key for key in a.keys() & b.keys() if a[key] != b[key]}
        # With streets' recipe the supervised run of one file is that of the other.
        assert different == (set() if name == "streets" else {"warmup"})
    paper = asdict(ours["cityscapes"])
    assert paper["blocks"] == (4, 16, 64, 128) and paper["classes"] == "all"
    assert (paper["size"], paper["crop"], paper["batch_size"]) == ((512, 1024), None, 2)
    assert (paper["lr"], paper["momentum"], paper["weight_decay"]) == (2.5e-4, 0.9, 5e-4)
    assert (paper["iterations"], paper["warmup"], paper["unlabeled_weight"]) == (40_000, 1_000, 1)


# ---- Training ----

TINY = "--labeled 4 --weights none --layers 1 1 1 1 --width 4 --workers 0 --size 48 64 --lr 0.05"
TINY += " --aspp-rates 1 2 --iterations 6 --warmup 2 --eval-every 6 --confidence-threshold 0.6"


def weights_after(command, camvid, out, *flags, method="complexmix"):
    """Student and teacher after 6 steps, of which the last 4 with unlabeled data."""
    where = ("--dataset", "camvid", "--data-dir", camvid, "--output-dir", out)
    status, _, errors = command(method, *where, *TINY.split(), *flags)
    assert (status, errors) == (0, "")
    state = torch.load(out / "last.pt", weights_only=True)["state"]
    return [
        torch.cat([v.flatten().float() for v in state[n].values()]) for n in ("student", "teacher")
    ]


FLAGS = """--blocks 16 | --classes present | --weighting pixel | --weight-scope sample
--unlabeled-weight 0.5 | --confidence-threshold 0.5 | --warmup 1 | --unlabeled all | --nesterov
--ema-decay 0.1 | --seed 1 | --supervised"""


def test_every_flag_reaches_the_step(command, camvid, tmp_path):
    plain = weights_after(command, camvid, tmp_path / "plain", "--blocks", 4)[0]
    again = weights_after(command, camvid, tmp_path / "again", "--blocks", 4)[0]
    assert torch.equal(plain, again)
    for k, flags in enumerate(FLAGS.replace("\n", " | ").split(" | ")):
        changed = weights_after(command, camvid, tmp_path / f"{k}", "--blocks", 4, *flags.split())[
            0
        ]
        assert not torch.equal(plain, changed), flags


def test_supervised_is_classmix_s_baseline(command, camvid, tmp_path):
    for name in ("classmix", "complexmix"):
        weights_after(command, camvid, tmp_path / name, "--supervised", method=name)
    ours, theirs = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["state"]["student"]
        for name in ("classmix", "complexmix")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_the_loop_hands_over(command, camvid, tmp_path, monkeypatch):
    masks, losses, updates = [], [], []
    mask, loss, update = complex_mask, complexmix.complexmix_loss, complexmix.update_teacher

    def spy_mask(pseudo_label, num_classes, blocks, **options):
        masks.append((blocks, options["generator"].initial_seed()))
        assert num_classes == 11 and options["classes"] == "all"
        return mask(pseudo_label, num_classes, blocks, **options)

    def spy_loss(student, teacher, image, **options):
        losses.append(len(updates))
        assert student.training and teacher.training and student is not teacher
        return loss(student, teacher, image, **options)

    def spy_update(teacher, student, **options):
        before = [t.clone() for t in teacher.state_dict().values()]
        update(teacher, student, **options)
        states = [list(network.state_dict().values()) for network in (teacher, student)]
        same = [torch.equal(a, b) for a, b in zip(*states, strict=True)]
        changed = [not torch.equal(a, b) for a, b in zip(before, states[0], strict=True)]
        assert sum(changed) > len(changed) / 2  # the student moves, statistics too
        assert options["buffers"] == "copy"
        updates.append((options["decay"], all(same)))

    monkeypatch.setattr(complexmix, "complex_mask", spy_mask)
    monkeypatch.setattr(complexmix, "complexmix_loss", spy_loss)
    monkeypatch.setattr(complexmix, "update_teacher", spy_update)
    flags = ("--accumulate", 2, "--batch-size", 4, "--seed", 5, "--split-seed", 0)
    weights_after(command, camvid, tmp_path / "run", *flags)
    # Two steps of warm-up, where the teacher becomes the student and labels nothing; t = 0, 1, 2, 3
    assert losses == [2, 2, 3, 3, 4, 4, 5, 5]
    decays = [decay for decay, _ in updates]
    assert decays == pytest.approx([0, 0, 0, 1 / 2, 2 / 3, 3 / 4])
    assert [same for _, same in updates] == [True] * 3 + [False] * 3
    # One p a step, the same in both shares; each share its own scores.
    drawn = [draw_blocks((4, 16, 64, 128), 5, iteration) for iteration in range(2, 6)]
    assert [p for p, _ in masks] == [p for p in drawn for _ in range(2)] and len(set(drawn)) > 1
    assert len({seed for _, seed in masks}) == 8


def test_a_resumed_run_is_the_same(command, camvid, tmp_path):
    whole = weights_after(command, camvid, tmp_path / "whole", "--save-every", 3)
    monkey = pytest.MonkeyPatch()
    steps = complexmix.run.Run.steps

    def stop_early(self):
        for iteration in steps(self):
            if iteration == 4 and self.start == 0:
                return
            yield iteration

    monkey.setattr(complexmix.run.Run, "steps", stop_early)
    where = ("--dataset", "camvid", "--data-dir", camvid, "--output-dir", tmp_path / "parts")
    command("complexmix", *where, *TINY.split(), "--save-every", 3)
    monkey.undo()
    parts = weights_after(command, camvid, tmp_path / "parts", "--resume", "auto")
    assert all(map(torch.equal, whole, parts))


SAME = """| --accumulate 2 --batch-size 4
| --momentum 0.5 --weight-decay 0.1 --head-factor 3 --lr-power 2
| --flip --crop 32 48 --scale-range 0.5 1.5 | --optimizer adam --lr 0.001 --weighting pixel
| --weight-scope sample --ema-decay 0.5 --confidence-threshold 0.5 | --width 6 --aspp-rates 1 3"""


@pytest.mark.parametrize("flags", SAME.replace("\n", " ").split("|"))
def test_one_block_of_present_classes_trains_as_classmix(command, camvid, tmp_path, flags):
    flags = (*flags.split(), "--warmup", 0)
    block = ("--blocks", 1, "--classes", "present")
    ours = weights_after(command, camvid, tmp_path / "ours", *block, *flags)
    theirs = weights_after(command, camvid, tmp_path / "theirs", *flags, method="classmix")
    assert all(map(torch.equal, ours, theirs))


def test_all_void_and_the_edge_of_confidence():
    label = torch.full((1, 2, 3), 255)
    assert complexmix.cross_entropy(torch.zeros(1, 2, 2, 3), label) == 0
    how = {"weighting": "pixel", "scope": "batch", "factor": 2.0}
    weight = complexmix.unlabeled_weight(torch.tensor([[[0.5, 0.75, 0.7]]]), 0.75, **how)
    assert weight.tolist() == [[[0, 2, 0]]]


def test_draws_of_two_seeds_are_not_shifted_copies():
    first, second = ([draw_blocks((4, 16), seed, i) for i in range(64)] for seed in (0, 1))
    assert all(first[k:-8] != second[: 56 - k] for k in range(8))
