"""DeepLab-v2 (Chen et al. 2017, arXiv:1606.00915) on a ResNet at output stride 8.

The layout is that of the DeepLab authors' Caffe model, which all four papers train: stride on the
first 1x1 convolution, ceil_mode in the max-pool, dilation 2 and 4 in every block of stages 3 and 4.
torchvision's ImageNet weights fit by name, though its network differs behind layer1 (stride
position, dilation of the first blocks), as in the papers' code.
"""

from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from common import InputError

# Mean and standard deviation that weights expect, RGB: of [0,1]; of 0-255, not divided by a std.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE = (122.67891434, 116.66876762, 104.00698793), (1.0, 1.0, 1.0)


class DeepLabV2(nn.Module):
    """Single-scale DeepLab-v2: RGB in [0,1] (B,3,H,W) -> float32 logits (B,K,H,W).

    layers and width shrink the ResNet (101 layers: (3, 4, 23, 3) and 64). rates are the dilations
    of the summed classifiers; (6, 12) is the network behind the papers' published numbers, whose
    code returns from inside the loop over the four. batch_norm="frozen" keeps running statistics
    in train mode too; train_affine=False freezes the batch-norm weights and biases.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        layers: tuple[int, int, int, int] = (3, 4, 23, 3),
        width: int = 64,
        rates: tuple[int, ...] = (6, 12, 18, 24),
        batch_norm: str = "batch",
        train_affine: bool = False,
    ):
        super().__init__()
        if batch_norm not in ("batch", "frozen"):
            raise ValueError(f"batch_norm is 'batch' or 'frozen', not {batch_norm!r}")
        self.frozen_statistics = batch_norm == "frozen"
        self.feature_channels = 32 * width
        # In the state dict, because they belong to the weights.
        for name, value in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = _stage(width, width, layers[0], stride=1, dilation=1)
        self.layer2 = _stage(4 * width, 2 * width, layers[1], stride=2, dilation=1)
        self.layer3 = _stage(8 * width, 4 * width, layers[2], stride=1, dilation=2)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], stride=1, dilation=4)
        heads = (nn.Conv2d(32 * width, num_classes, 3, padding=r, dilation=r) for r in rates)
        self.classifiers = nn.ModuleList(heads)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(train_affine)
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)  # as the papers' code

    def normalize(self, image: Tensor) -> Tensor:
        """RGB in [0,1] (B,3,H,W) -> what the loaded weights expect, same shape."""
        return (image - self.mean) / self.std

    def features(self, image: Tensor) -> Tensor:
        """RGB in [0,1] (B,3,H,W) -> (B,feature_channels,h,w) at stride 8; normalises first."""
        x = F.relu(self.bn1(self.conv1(self.normalize(image))))
        return self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))

    def classify(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,feature_channels,h,w) -> float32 logits (B,K,*size), bilinear, aligned corners."""
        logits = sum(classifier(features) for classifier in self.classifiers)
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.features(image), image.shape[-2:])

    def train(self, mode: bool = True) -> "DeepLabV2":
        """As nn.Module.train, but frozen batch norm stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if self.frozen_statistics and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def parameter_groups(self, lr: float, head_factor: float) -> list[dict]:
        """Trainable backbone parameters at lr, classifiers at head_factor * lr, each once."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        head = [p for name, p in named if name.startswith("classifiers.")]
        trunk = [p for name, p in named if not name.startswith("classifiers.")]
        return [{"params": trunk, "lr": lr}, {"params": head, "lr": head_factor * lr}]


def _stage(in_channels: int, width: int, blocks: int, *, stride: int, dilation: int):
    shortcut = nn.Sequential(
        nn.Conv2d(in_channels, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width)
    )
    first = Bottleneck(in_channels, width, downsample=shortcut, dilation=dilation)
    first.conv1.stride = (stride, stride)  # torchvision has it on conv2
    rest = (Bottleneck(4 * width, width, dilation=dilation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class Loaded(NamedTuple):
    """What load_weights did: the kind of file and the names of tensors."""

    kind: str
    matched: list[str]
    missing: list[str]  # of the network; they keep their initialisation
    unused: list[str]  # of the file

    def __str__(self) -> str:
        parts = {"kept at initialisation": self.missing, "left out of the file": self.unused}
        texts = [f"; {what}: {_some(names)}" for what, names in parts.items() if names]
        return f"{self.kind}, {len(self.matched)} tensors matched" + "".join(texts)


def load_weights(model: DeepLabV2, source: str | Path) -> Loaded:
    """Fill model from "imagenet" (torchvision), "none" (stays as initialised) or a local file.

    A file is a state dict of a torchvision ResNet, of this class, or with the key names of the
    ClassMix code (Caffe weights: 0-255, BGR; conv1 is turned round, so that images stay RGB). The
    network's mean and std become those of the weights. InputError where the backbone does not fit.
    """
    if str(source) == "none":
        kind = "none (Kaiming initialisation; batch norm: batch statistics, trained affine)"
        return Loaded(kind, [], [], [])
    state = _imagenet_state() if str(source) == "imagenet" else _read_state(Path(source))
    kind, (mean, std) = "torchvision ImageNet", torch.tensor(IMAGENET).view(2, 3, 1, 1)
    if any(key.startswith("layer5.") for key in state):
        kind, (mean, std) = "Caffe-style DeepLab", torch.tensor(CAFFE).view(2, 3, 1, 1) / 255
        state = {k.replace("layer5.conv2d_list.", "classifiers."): v for k, v in state.items()}
        if "conv1.weight" in state:
            state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR -> RGB
    elif "mean" in state and "std" in state:
        kind, mean, std = "this repository's", state["mean"], state["std"]
    state = {k: v for k, v in state.items() if "num_batches" not in k} | {"mean": mean, "std": std}
    own = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    matched = [key for key in own if key in state and state[key].shape == own[key].shape]
    missing = [key for key in own if key not in matched]
    unused = [key for key in state if key not in matched]
    differing = dict.fromkeys(missing + unused)
    if wrong := [key for key in differing if not key.startswith(("classifiers.", "fc."))]:
        raise InputError(
            f"--weights {source}: the backbone does not fit this network (its layers and width, "
            f"and the key names of torchvision or of the ClassMix code): {_some(wrong)}"
        )
    model.load_state_dict({key: state[key] for key in matched}, strict=False)
    return Loaded(kind, [k for k in matched if k not in ("mean", "std")], missing, unused)


def _imagenet_state() -> dict[str, Tensor]:
    weights = torchvision.models.ResNet101_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, HTTPException, RuntimeError) as error:
        raise InputError(
            f"--weights imagenet: cannot download {weights.url} ({error}); fetch it elsewhere and "
            f"put it in {torch.hub.get_dir()}/checkpoints, or pass --weights FILE or --weights none"
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file (or 'imagenet' or 'none')")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly any type on a foreign file
        raise InputError(f"--weights {path}: not a file of tensors as torch.save writes") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    named = state.items() if isinstance(state, dict) else ()
    tensors = {str(k).removeprefix("module."): v for k, v in named if isinstance(v, Tensor)}
    if not tensors:
        raise InputError(f"--weights {path}: holds no state dict")
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
