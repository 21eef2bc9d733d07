"""Masks, losses, thresholds and the teacher's update stay on the device and never wait for it.

The tensors are fake CUDA tensors, which need no GPU. A copy to the host raises, and so do .item(),
nonzero, unique, boolean indices and branches on tensors.
"""

from contextlib import ExitStack
from functools import partial
from itertools import cycle, permutations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import c3semiseg
import classmix
import complexmix
import cowmix
from common.ema import update_teacher

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
SIZE, CLASSES = (32, 48), 5
TINY = {"layers": (1, 1, 1, 1), "width": 4}


class OnCuda(TorchDispatchMode):
    """Refuses operations that take or return a tensor elsewhere. Networks are built outside.

    It counts the operations that return no view.
    """

    kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        aliases = [value.alias_info for value in func._schema.returns]
        own = all(alias is None or alias.is_write for alias in aliases)
        self.kernels += own and func.name().startswith("aten")
        for value in tree_leaves((args, kwargs, result)):
            if func.name() in ("aten::lift_fresh", "prim::device"):
                continue  # torch.tensor: numbers of the host; what takes them from there is refused
            if isinstance(value, torch.Tensor) and value.device.type != "cuda":
                raise RuntimeError(f"{func} with a tensor on {value.device}")
        return result


@pytest.fixture(autouse=True)
def fake_cuda():
    with ExitStack() as stack:
        for context in (FakeTensorMode(), torch.device("cuda")):
            stack.enter_context(context)
        try:
            torch.zeros(2, 2)[:, 0]
        except RuntimeError:
            pytest.skip("in torch 2.5 an index of a fake tensor needs a driver")
        yield


def networks(method, **changes):
    """A student and a teacher of a method. make_teacher would copy fake tensors, which fails."""
    recipe = method.RECIPES["streets"].__class__(**TINY, **changes)
    student, teacher = (method.network(recipe, CLASSES, pretrained=False) for _ in range(2))
    return student, teacher.requires_grad_(False)


def images(count=4):
    return torch.rand(count, 3, *SIZE), torch.randint(CLASSES, (count, *SIZE))


def on_device(*tensors):
    assert {tensor.device for tensor in tensors} == {torch.device("cuda:0")}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda image: image + torch.zeros(SIZE, device="cpu"),
        lambda image: image.cpu(),
        lambda image: image.sum().item(),
        lambda image: image[image > 0.5],
        lambda image: image.unique(),
        lambda image: bool((image > 1).any()),
    ],
)
def test_an_operation_on_two_devices_or_a_value_read_back_fails(wrong):
    image, _ = images()
    with OnCuda(), pytest.raises(RuntimeError):  # FakeTensor's exceptions are RuntimeErrors
        wrong(image)


def test_the_teacher_s_update():
    student, teacher = networks(classmix)
    with OnCuda():
        for buffers in ("copy", "average", "keep"):
            update_teacher(teacher, student, decay=0.9, buffers=buffers)
        on_device(*teacher.state_dict().values())


@pytest.mark.parametrize("mask", ["class", "cow", "cut"])
@pytest.mark.parametrize("kind", ["cross-entropy", "soft-cross-entropy", "squared-error"])
@pytest.mark.parametrize("weighting", ["fraction", "pixel", "ramp"])
def test_classmix(mask, kind, weighting):
    (student, teacher), (image, label) = networks(classmix), images()
    make_mask = partial(classmix.make_mask, classmix.Recipe(mask=mask), CLASSES, None)
    options = {"make_mask": make_mask, "threshold": 0.9, "kind": kind, "weighting": weighting}
    with OnCuda():
        loss, details = classmix.classmix_loss(student, teacher, image, **options)
        on_device(loss, *details.values(), classmix.cross_entropy(student(image), label))


@pytest.mark.parametrize(("blocks", "classes"), [(1, "all"), (16, "present")])
def test_complexmix(blocks, classes):
    (student, teacher), (image, _) = networks(complexmix), images()
    options = {"num_classes": CLASSES, "blocks": blocks, "classes": classes}
    options = {"make_mask": partial(complexmix.complex_mask, **options), "threshold": 0.9}
    with OnCuda():
        loss, details = complexmix.complexmix_loss(student, teacher, image, **options)
        on_device(loss, *details.values())


@pytest.mark.parametrize("network", ["unet", "deeplab"])
def test_cowmix(network):
    student, teacher = networks(cowmix, network=network)
    image, label = images(2)
    with OnCuda():
        fill, valid = student.mean, label != 255
        shape = {"flip": 0.5, "translation": 4.0, "scaling": (0.8, 1.25), "rotation": 15.0}
        a, b = (cowmix.random_affine(2, **shape, device="cuda") for _ in range(2))
        color = partial(cowmix.recolor, brightness=0.1, contrast=1.1)
        networks_and_image, threshold = (student, teacher, image), {"threshold": 0.9}
        views = {"matrix_a": a, "matrix_b": b, "color": color, "fill": fill, "valid": valid}
        results = [cowmix.aug_loss(*networks_and_image, **views, **threshold)]
        for mask in (
            cowmix.cow_mask(2, SIZE, sigma_range=(2.0, 4.0), device="cuda"),
            cowmix.box_mask(2, SIZE, p_range=(0, 1), device="cuda"),
        ):
            combine = partial(cowmix.mix, mask)
            for loss, *how in (
                (cowmix.mixing_loss, image, combine, valid),
                (cowmix.cutout_loss, mask, fill, valid),
            ):
                results.append(loss(*networks_and_image, *how, **threshold))
        for loss, details in results:
            on_device(loss, *details.values())
        warped = cowmix.warp_label(label, cowmix.warp_grid(a, SIZE))
        on_device(warped, cowmix.cross_entropy(student(image), warped))


def test_c3semiseg():
    (student, teacher), (image, label) = networks(c3semiseg, embedding=8), images()
    with OnCuda():
        contrast = c3semiseg.make_contrast(c3semiseg.Recipe(), None)
        regions = c3semiseg.ConfidentRegions(CLASSES)
        prob, confidence, pseudo_label, embedding = c3semiseg.label_images(teacher, image)
        confident = regions.update(confidence, pseudo_label)
        unlabeled = image, prob, pseudo_label.masked_fill(~confident, 255), embedding
        pairs = torch.randperm(8), c3semiseg.box_mask(4, SIZE)
        given = (student, (image, label), unlabeled, *pairs)
        for sets in ("both", "labeled", "unlabeled"):
            terms, details = c3semiseg.c3_loss(*given, contrast_fn=contrast, sets=sets)
            on_device(*terms.values(), *details.values())
        terms, details = c3semiseg.warmup_loss(student, image, label, contrast_fn=contrast)
        on_device(*terms.values(), *details.values())


def test_c3semiseg_s_colours(monkeypatch):
    """Few kernels, whatever the number of images: each order of the jitter, then an operation."""
    # only what is pinned may go to the device
    copy = partial(torch.empty, device="cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copy(tensor.shape))
    jitter = permutations(change(0.2) for change in c3semiseg.JITTER.values())
    operations = cycle(change(0.7) for change in c3semiseg.OPERATIONS.values())
    changes = [[*order, next(operations)] for order in jitter]
    image, _ = images(len(changes))
    with torch.device("cpu"), OnCuda() as counter:
        on_device(c3semiseg.recolor(image, changes))
    assert counter.kernels < 150
