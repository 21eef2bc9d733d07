"""A Markdown table of the weight formats that --weights reads.

    python benchmarks/weight_formats.py

One small file of random numbers for each format is written into a temporary folder and loaded.
"""

import re
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import InputError
from common.deeplab import DeepLabV2, load_weights

SHAPE = {"layers": (2, 1, 11, 1), "width": 4}  # more than nine blocks: two digits
HEAD = "layer5.conv2d_list"
State = dict[str, Tensor]


def randomize(state: State) -> State:
    """Normal weights scaled to keep the activations' size; positive variances."""
    for name, value in state.items():
        if value.is_floating_point():
            value.normal_(std=max(1, value[0].numel()) ** -0.5)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return state


def rename(state: State, beginnings: dict[str, str]) -> State:
    """Keys with other beginnings, of the first that fits."""
    renamed = {}
    for key, value in state.items():
        old = next((old for old in beginnings if key.startswith(old)), "")
        renamed[beginnings.get(old, "") + key.removeprefix(old)] = value
    return renamed


def published(num_classes: int, seed: int = 0) -> State:
    """As resnet101COCO-41f33a49.pth, smaller: its key names, no num_batches_tracked."""
    torch.manual_seed(seed)
    state = DeepLabV2(num_classes, **SHAPE).state_dict()
    left_out = [name for name in state if name in ("mean", "std") or "num_batches" in name]
    kept = {name: value for name, value in state.items() if name not in left_out}
    return randomize(rename(kept, {"classifiers": HEAD}))


def kazuto(state: State, prefix: str) -> State:
    """The key names of kazuto1011/deeplab-pytorch."""
    units = {"conv1": "reduce.conv", "conv2": "conv3x3.conv", "conv3": "increase.conv"}
    units |= {"bn1": "reduce.bn", "bn2": "conv3x3.bn", "bn3": "increase.bn"}
    units |= {"downsample.0": "shortcut.conv", "downsample.1": "shortcut.bn"}
    renamed = {}
    for key, value in state.items():
        name, part = key.rsplit(".", 1)
        if match := re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", name):
            stage, block, unit = match.groups()
            name = f"layer{int(stage) + 1}.block{int(block) + 1}.{units[unit]}"
        elif name.startswith(HEAD):
            name = f"aspp.c{name[-1]}"
        else:
            name = f"layer1.conv1.{name.removesuffix('1')}"
        renamed[f"{prefix}{name}.{part}"] = value
    return renamed


def contents(num_classes: int) -> dict[str, object]:
    """What the files hold, all of it made from published(num_classes); the last are refused."""
    state, other = published(num_classes), published(2, seed=1)
    trunk = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    fc = {"fc.weight": torch.rand(1000, 128), "fc.bias": torch.rand(1000)}
    heads = {"classifier": DeepLabHead(128, num_classes), "aux_classifier": FCNHead(64, 2)}
    own = DeepLabV2(num_classes, **SHAPE)
    own.load_state_dict(rename(state, {HEAD: "classifiers"}), strict=False)
    own.mean.fill_(0.25)
    networks = {"student": own.state_dict(), "teacher": DeepLabV2(2, **SHAPE).state_dict()}
    c3 = rename(state, {HEAD: "module.decoder.conv2d_list", "": "module.body."})
    stem = torch.rand(4, 3, 3, 3)
    return {
        "AdvSemiSeg": state,
        "ClassMix": {"model": state, "ema_model": other, "iteration": 1},
        "Pytorch-Deeplab": rename(state, {"": "Scale."}),
        "torchvision classification": trunk | fc,
        "torchvision segmentation": rename(trunk, {"": "backbone."})
        | nn.ModuleDict(heads).state_dict(),
        "DST-CBC": {"model": rename(state, {HEAD: "classifier.0.convs", "": "backbone."})},
        "ST++": rename(state, {HEAD: "classifier", "": "backbone."}),
        "C3-SemiSeg": {"state_dict": c3, "epoch": 1},
        "kazuto1011": kazuto(state, "base."),
        "kazuto1011, COCO init": kazuto(trunk, "") | {"fc.weight": torch.rand(91, 128, 1, 1)},
        "this repository": own.state_dict(),
        "this repository, last.pt": {"headline": "student", "state": networks, "iteration": 1},
        "deep stem (v1c)": {"conv1.0.weight": stem, "bn1.weight": torch.rand(4)},
        "whole pickled module": nn.Conv2d(1, 1, 1),
        "foreign": {"encoder.weight": stem},
    }


def summary(names: list[str]) -> str:
    """How many, and what the names begin with."""
    beginnings = ", ".join(dict.fromkeys(f"{name.split('.')[0]}.*" for name in names))
    return f"{len(names)}: {beginnings}" if names else "0"


def main() -> None:
    """Write, load, print."""
    print("| file | read as | matched | kept at initialisation | left out | input convention |")
    print("|---|---|---|---|---|---|")
    for name, content in contents(num_classes=19).items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "weights.pth")
            torch.save(content, path)
            try:
                loaded = load_weights(DeepLabV2(19, **SHAPE), path)
            except InputError as error:
                print(f"| {name} | refused: {str(error).split(': ', 1)[1]} | | | | |")
                continue
        kind, convention = loaded.kind.removesuffix(")").split(" (")
        counts = len(loaded.matched), summary(loaded.missing), summary(loaded.unused)
        print(f"| {name} | {kind} | {' | '.join(map(str, counts))} | {convention} |")


if __name__ == "__main__":
    main()
