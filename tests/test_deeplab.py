"""common/deeplab.py: the shape of the network, its modes and the files of its weights."""

import re
import urllib.error
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import ResNet, ResNet101_Weights
from torchvision.models.resnet import Bottleneck
from weight_formats import SHAPE, contents, published, randomize, rename

from common import InputError
from common.deeplab import DeepLabV2, load_weights

BGR_MEAN = (104.00698793, 116.66876762, 122.67891434)  # of the published weights, 0-255
LAYERS = SHAPE["layers"]
STATISTICS = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)  # RGB

CONTENTS = contents(5)
CONTENTS["compiled"] = rename(CONTENTS["AdvSemiSeg"], {"layer1": "layer1._orig_mod"})
CONTENTS["compiled"]["bn1.num_batches_tracked"] = torch.tensor(7)
CONTENTS["compiled"] = rename(CONTENTS["compiled"], {"": "_orig_mod.module."})
OTHER_HEAD = {key: value for key, value in published(21).items() if key.startswith("layer5")}
CONTENTS["21 classes"] = CONTENTS["AdvSemiSeg"] | OTHER_HEAD
HEAD = [f"classifiers.{k}.{part}" for k in range(4) for part in ("weight", "bias")]
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def small(num_classes=5, **options):
    torch.manual_seed(0)
    return DeepLabV2(num_classes, **SHAPE | options)


def test_shapes_and_parameters_of_the_paper_s_network():
    with torch.device("meta"):
        net, affine = DeepLabV2(19), DeepLabV2(19, rates=(6, 12), train_affine=True)
        image = torch.empty(2, 3, 321, 513)
    assert net.features(image).shape == (2, 2048, 41, 65) and net.feature_channels == 2048
    assert net(image).shape == (2, 19, 321, 513)
    trained = [p.numel() for p in net.parameters() if p.requires_grad]
    assert (sum(trained), len(trained)) == (43_795_724, 104 + 8)
    assert sum(p.numel() for p in affine.classifiers.parameters()) == 700_454
    assert all(p.requires_grad for p in affine.parameters())


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_batch_norm_modes(batch_norm):
    net = small(batch_norm=batch_norm, rates=(1,)).eval().train()
    before = {name: b.clone() for name, b in net.named_buffers()}
    assert all(b.is_floating_point() for b in before.values())  # counts would cost kernels
    net(torch.rand(2, 3, 33, 33))
    moved = {name for name, b in net.named_buffers() if not torch.equal(b, before[name])}
    assert moved == (before.keys() - {"mean", "std"} if batch_norm == "batch" else set())


def test_networks_that_count_batches_are_loaded():
    """Other networks and older versions do, and torch adds counts to a dict without metadata."""
    net, state = small(), small().state_dict()
    for counted in (state | {"bn1.num_batches_tracked": torch.tensor(7)}, dict(state)):
        net.load_state_dict(counted)
    with pytest.raises(RuntimeError, match="Unexpected"):
        net.load_state_dict(state | {"bn1.other": torch.tensor(7)})


def test_logits_are_float32():
    net, image = small(), torch.rand(1, 3, 17, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.features(image).dtype == torch.bfloat16 and net(image).dtype == torch.float32


@pytest.mark.parametrize("train_affine", [True, False])
def test_parameter_groups(train_affine):
    net = small(train_affine=train_affine)
    trunk, head = net.parameter_groups(0.1, 10)
    assert (trunk["lr"], head["lr"]) == (0.1, 1.0)
    assert head["params"] == [*net.classifiers.parameters()]
    assert trunk["params"] + head["params"] == [p for p in net.parameters() if p.requires_grad]


def test_imagenet_weights_are_torchvision_s(monkeypatch):
    state = ResNet(Bottleneck, list(LAYERS)).state_dict()
    api = mock.Mock(return_value=state)
    monkeypatch.setattr(ResNet101_Weights, "get_state_dict", api)
    report = load_weights(small(width=64), "imagenet")
    assert api.call_args.kwargs["check_hash"] and report.missing == HEAD
    assert "classifiers.0.weight" in str(report) and "fc.weight" in str(report)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("hash")])
def test_imagenet_weights_without_network(error, monkeypatch):
    monkeypatch.setattr(ResNet101_Weights, "get_state_dict", mock.Mock(side_effect=error))
    model = small()
    with pytest.raises(InputError, match=r"--weights imagenet: .*resnet101.*\.pth.*--weights none"):
        load_weights(model, "imagenet")
    assert load_weights(model, "none").matched == []
    assert_same(model.state_dict(), small().state_dict())


def load(content, path, **options):
    """A small network with these weights, and the report."""
    torch.save(content, path)
    model = small(**options)
    return model, load_weights(model, path)


BGR = (torch.tensor(BGR_MEAN).flip(0) / 255, torch.full((3,), 1 / 255))
RGB = tuple(STATISTICS.flatten(1))
STORED = (torch.full((3,), 0.25), RGB[1])
FORMATS = [  # name, what the report begins with and mentions, mean and std, head, unused
    ("AdvSemiSeg", "AdvSemiSeg/ClassMix (BGR", "", BGR, True, 0),
    ("ClassMix", "AdvSemiSeg/ClassMix (BGR", "its model", BGR, True, 0),
    ("Pytorch-Deeplab", "AdvSemiSeg/ClassMix (BGR", "", BGR, True, 0),
    ("compiled", "AdvSemiSeg/ClassMix (BGR", "", BGR, True, 0),
    ("21 classes", "AdvSemiSeg/ClassMix (BGR", "", BGR, False, 8),
    ("torchvision classification", "torchvision (RGB", "", RGB, False, 2),
    ("torchvision segmentation", "torchvision (RGB", "", RGB, False, 44),
    ("DST-CBC", "DST-CBC/ST++ (BGR", "its model", BGR, True, 0),
    ("ST++", "DST-CBC/ST++ (BGR", "", BGR, True, 0),
    ("C3-SemiSeg", "C3-SemiSeg (RGB", "its state_dict", RGB, True, 0),
    ("kazuto1011", "kazuto1011 DeepLab (BGR", "", BGR, True, 0),
    ("kazuto1011, COCO init", "kazuto1011 DeepLab (BGR", "", BGR, False, 1),
    ("this repository", "this repository (input as stored", "", STORED, True, 0),
    ("this repository, last.pt", "this repository (", "its student", STORED, True, 0),
]


@pytest.mark.parametrize(("name", "kind", "network", "statistics", "has_head", "unused"), FORMATS)
def test_formats(name, kind, network, statistics, has_head, unused, tmp_path):
    """Each tensor is in its place, and conv1 is reversed if the input was BGR."""
    model, report = load(CONTENTS[name], tmp_path / "weights.pth")
    assert report.format.startswith(kind) and network in report.format
    assert ("its " in report.format) == bool(network) and len(report.unused) == unused
    assert report.missing == ([] if has_head else HEAD)
    expected = rename(published(5), {"layer5.conv2d_list": "classifiers"})
    if statistics is BGR:
        expected["conv1.weight"] = expected["conv1.weight"].flip(1)
    if not has_head:
        expected |= {key: small().state_dict()[key] for key in HEAD}
    assert_same({key: model.state_dict()[key] for key in expected}, expected)
    assert len(report.matched) == len(expected) - len(report.missing)
    torch.testing.assert_close((model.mean.flatten(), model.std.flatten()), statistics)


@pytest.mark.parametrize("student", ["model", "state_dict", "model_state", None])
@pytest.mark.parametrize("teacher", ["ema_model", "teacher_state"])
def test_student_before_teacher(student, teacher, tmp_path):
    """The order in the file does not matter. The report says which network was taken."""
    states = {teacher: published(5, seed=1)} | ({student: published(5)} if student else {})
    model, report = load(states, tmp_path / "weights.pth")
    assert_same(model.bn1.running_var, published(5, seed=0 if student else 1)["bn1.running_var"])
    assert f"its {student or teacher}" in str(report)


@pytest.mark.parametrize("headline", ["student", "teacher"])
def test_checkpoint_gives_its_headline_network(headline, tmp_path):
    states = {name: small().state_dict() for name in ("student", "teacher")}
    randomize(states[headline])["mean"].fill_(0.3)
    checkpoint = {"state": {"optimizer": {"state": {}}} | states, "headline": headline}
    model, report = load(checkpoint, tmp_path / "last.pt")
    assert report.missing == report.unused == [] and f"its {headline}" in report.format
    assert_same(model.state_dict(), states[headline])


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}


STEM = torch.zeros(4, 3, 3, 3)
WRONG = [
    (None, "[Nn]o such file"),
    (b"<html>moved</html>", "damaged"),
    (nn.Conv2d(1, 1, 1), r"more than a state_dict\(\)"),
    ({"state_dict": {}, "best": np.float64(1)}, r"more than a state_dict\(\)"),
    ({}, "holds no state dict"),
    ([torch.zeros(1)], "holds no state dict"),
    ({"state": {0: {"step": torch.zeros(1)}}}, "holds no state dict"),
    (small(width=8).state_dict(), "does not fit.*conv1.weight"),
    (small(layers=(3, 1, 11, 1)).state_dict(), r"does not fit.*layer1\.2"),
    (without(small().state_dict(), "layer3.10."), r"does not fit.*layer3\.10"),
    (without(small().state_dict(), "std"), "does not fit.*std"),
    (without(published(5), "conv1.weight"), "does not fit.*conv1.weight"),
    (CONTENTS["deep stem (v1c)"], "deep-stem"),
    ({"conv1.weight": torch.zeros(4, 3, 7, 7), "layer1.0.conv1.weight": STEM}, "fit.*bn1.w"),
    (CONTENTS["foreign"], "encoder.weight"),
]


UNUSABLE = {  # tensors of which no network can be made
    "bn1.weight": torch.tensor([1, torch.nan, 1, 1]),
    "layer1.0.bn1.bias": torch.full((4,), -torch.inf),
    "layer1.0.bn2.bias": torch.zeros(4).int(),
    "layer1.0.conv2.weight": torch.zeros(4, 4, 3, 3).to_sparse(),
    "bn1.running_var": torch.tensor([1, -1e-3, 1, 1]),
    "std": torch.tensor([1, 0.0, 1]).view(3, 1, 1),
}
WRONG += [(small().state_dict() | {name: UNUSABLE[name]}, f"{name} ") for name in UNUSABLE]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_wrong_files(content, message, tmp_path):
    path, model = tmp_path / "weights.pth", small()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"--weights {re.escape(str(path))}: .*{message}") as error:
        load_weights(model, path)
    assert "\n" not in str(error.value)
    assert_same(model.state_dict(), small().state_dict())
