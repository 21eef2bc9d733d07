"""Prints a Markdown table of the weight formats that --weights reads.

    python benchmarks/weight_formats.py

Writes a small file of random numbers in each format and loads it. Tests use these files too.
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
KAZUTO = (  # key names of kazuto1011/deeplab-pytorch
    (r"^layer5\.conv2d_list\.", "aspp.c"),
    (r"^layer(\d)\.(\d+)", lambda m: f"layer{int(m[1]) + 1}.block{int(m[2]) + 1}"),
    (r"\.(conv|bn)1\.", r".reduce.\1."),
    (r"\.(conv|bn)2\.", r".conv3x3.\1."),
    (r"\.(conv|bn)3\.", r".increase.\1."),
    (r"downsample\.0", "shortcut.conv"),
    (r"downsample\.1", "shortcut.bn"),
    (r"^(conv|bn)1\.", r"layer1.conv1.\1."),
)


def randomize(state: State) -> State:
    """Fills a state dict with normal weights that keep the size of activations."""
    for name, value in state.items():
        if value.is_floating_point():
            value.normal_(std=max(1, value[0].numel()) ** -0.5)
            if name.endswith(("running_var", "std")):
                value.abs_().add_(0.5)
    return state


def rename(state: State, beginnings: dict[str, str]) -> State:
    """Replaces the first of the beginnings that a key has."""
    renamed = {}
    for key, value in state.items():
        old = next((old for old in beginnings if key.startswith(old)), "")
        renamed[beginnings.get(old, "") + key.removeprefix(old)] = value
    return renamed


def published(num_classes: int, seed: int = 0) -> State:
    """A small resnet101COCO-41f33a49.pth: its key names."""
    torch.manual_seed(seed)
    state = DeepLabV2(num_classes, **SHAPE).state_dict()
    kept = {name: value for name, value in state.items() if name not in ("mean", "std")}
    return randomize(rename(kept, {"classifiers": HEAD}))


def kazuto(state: State, prefix: str) -> State:
    """Returns the tensors of published() with the key names of kazuto1011/deeplab-pytorch."""
    for old, new in KAZUTO:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return rename(state, {"": prefix})


def contents(num_classes: int) -> dict[str, object]:
    """Returns what a file of each format holds. The last three files are refused."""
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
    """The number of names and what they begin with."""
    beginnings = ", ".join(dict.fromkeys(f"{name.split('.')[0]}.*" for name in names))
    return f"{len(names)}: {beginnings}" if names else "0"


def main() -> None:
    """Prints a row for each format."""
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
        read_as, convention, network = re.fullmatch(r"(.+) \((.+)\)(.*)", loaded.format).groups()
        counts = f"{len(loaded.matched)} | {summary(loaded.missing)} | {summary(loaded.unused)}"
        print(f"| {name} | {read_as}{network} | {counts} | {convention} |")


if __name__ == "__main__":
    main()
