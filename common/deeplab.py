"""DeepLab-v2 (Chen et al. 2017, arXiv:1606.00915) on a ResNet at output stride 8.

The network is that of the DeepLab authors' Caffe model, which all four papers train: a stage's
stride is on its first 1x1 convolution, the max-pool rounds up, stages 3 and 4 have dilations 2 and
4 in every block. torchvision's ImageNet weights fit by name, although torchvision's own network
places strides and dilations differently.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from common import InputError

# What weights expect of an image: in words, then mean and std of RGB in [0,1].
IMAGENET = ("RGB, ImageNet mean and std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)
CAFFE = ("BGR, 0-255 minus the mean", CAFFE_MEAN, (1 / 255, 1 / 255, 1 / 255))


class SegmentationResNet(nn.Module):
    """A ResNet without its classifier. A subclass adds features() and classify().

    strides and dilations are those of stages 1 to 4. caffe=True puts a stage's stride on its first
    1x1 convolution and rounds the max-pool up. batch_norm="frozen" keeps the running statistics
    in train mode too.
    """

    imagenet: torchvision.models.WeightsEnum  # torchvision's weights of the same ResNet

    def __init__(self, layers, width, *, strides, dilations, caffe: bool, batch_norm: str):
        super().__init__()
        if batch_norm not in ("batch", "frozen"):
            raise ValueError(f"batch_norm must be 'batch' or 'frozen', not {batch_norm!r}")
        self.frozen_statistics = batch_norm == "frozen"
        _, mean, std = IMAGENET
        # In the state dict, because they belong to the weights.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=caffe)
        channels = width
        for k in range(4):
            inner = width * 2**k
            stage = _stage(channels, inner, layers[k], strides[k], dilations[k], caffe)
            self.add_module(f"layer{k + 1}", stage)
            channels = 4 * inner

    def initialize(self, *, train_affine: bool) -> None:
        """Kaiming initialisation of all convolutions; train_affine=False freezes batch norm's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(train_affine)
        self.train()

    def normalize(self, image: Tensor) -> Tensor:
        """RGB in [0,1], (B,3,H,W) -> what the loaded weights expect, same shape."""
        return (image - self.mean) / self.std

    def stages(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of the four stages for a normalised image (B,3,H,W)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        outputs = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            outputs.append(x)
        return outputs

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.features(image), image.shape[-2:])

    def train(self, mode: bool = True):
        """Sets train or eval mode; frozen batch norm always stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if self.frozen_statistics and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def parameter_groups(self, lr: float, head_factor: float) -> list[dict]:
        """The trainable parameters of the ResNet at lr, then all others at head_factor * lr."""
        trunk, head = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (trunk if re.match(BACKBONE, name) else head).append(parameter)
        return [{"params": trunk, "lr": lr}, {"params": head, "lr": head_factor * lr}]


def _stage(in_channels: int, width: int, blocks: int, stride: int, dilation: int, caffe: bool):
    projection = nn.Conv2d(in_channels, 4 * width, 1, stride=stride, bias=False)
    shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * width))
    first = Bottleneck(in_channels, width, stride, downsample=shortcut, dilation=dilation)
    if caffe:
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    rest = [Bottleneck(4 * width, width, dilation=dilation) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class DeepLabV2(SegmentationResNet):
    """Single-scale DeepLab-v2: RGB in [0,1], (B,3,H,W) -> float32 logits (B,K,H,W).

    layers and width shrink the ResNet (ResNet-101: (3, 4, 23, 3) and 64). The classifiers, one for
    each dilation in rates, are summed; the papers' published code sums only (6, 12). batch_norm:
    "batch" or "frozen" statistics; train_affine: whether its weights and biases are trained.
    """

    imagenet = torchvision.models.ResNet101_Weights.IMAGENET1K_V1

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
        placing = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "caffe": True}
        super().__init__(layers, width, **placing, batch_norm=batch_norm)
        self.feature_channels = 32 * width
        self.classifiers = nn.ModuleList()
        for rate in rates:
            head = nn.Conv2d(self.feature_channels, num_classes, 3, padding=rate, dilation=rate)
            self.classifiers.append(head)
        self.initialize(train_affine=train_affine)
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)  # as in the papers' code

    def features(self, image: Tensor) -> Tensor:
        """RGB in [0,1], (B,3,H,W) -> (B,feature_channels,h,w) at stride 8; normalises first."""
        return self.stages(self.normalize(image))[-1]

    def classify(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,feature_channels,h,w) -> float32 logits (B,K,*size), bilinear, aligned corners."""
        logits = sum(classifier(features) for classifier in self.classifiers)
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)


# Formats of weight files: name, pattern of a key that only it has, start of its classifiers' keys
# ("-": not ours), input (None: stored in the file). The first format that fits is taken.
FORMATS = (
    ("this repository", r"mean", "-", None),
    ("kazuto1011 DeepLab", r"(base\.)?layer1\.conv1\.conv\.weight", r"aspp\.c", CAFFE),
    ("AdvSemiSeg/ClassMix", r"Scale\..*|layer5\..*", r"layer5\.conv2d_list\.", CAFFE),
    # ST++ trains with ImageNet's mean and std, but the file in circulation is the Caffe model.
    ("DST-CBC/ST++", r"classifier\.(0\.convs\.)?3\.weight", r"classifier\.(0\.convs\.)?", CAFFE),
    ("C3-SemiSeg", r"body\.conv1\.weight", r"decoder\.conv2d_list\.", IMAGENET),
    ("torchvision", r"(backbone\.)?conv1\.weight", "-", IMAGENET),
)
RENAMES = (  # applied in this order; all but the first are for kazuto1011, which counts from 1
    (r"^(Scale|backbone|body|base)\.", ""),
    (r"^layer1\.conv1\.(conv|bn)\.", r"\g<1>1."),
    (r"^layer(\d)\.block(\d+)", lambda m: f"layer{int(m[1]) - 1}.{int(m[2]) - 1}"),
    (r"\.reduce\.(conv|bn)\.", r".\g<1>1."),
    (r"\.conv3x3\.(conv|bn)\.", r".\g<1>2."),
    (r"\.increase\.(conv|bn)\.", r".\g<1>3."),
    (r"\.shortcut\.conv\.", ".downsample.0."),
    (r"\.shortcut\.bn\.", ".downsample.1."),
)
BACKBONE = r"(conv1|bn1|layer\d|mean|std)\b"
DEEP_STEM = r"(.+\.)?(conv1|stem)\.0\.weight|([a-z_]+\.)*conv1\.weight"
# Keys under which a file may hold a network, in order of preference.
WRAPPERS = (
    "student",
    "model",
    "state_dict",
    "model_state",
    "teacher",
    "ema_model",
    "teacher_state",
)


class Loaded(NamedTuple):
    """What load_weights did: the format of the file and the names of tensors."""

    format: str
    matched: list[str]
    missing: list[str]  # of the network, not in the file: they keep their initialisation
    unused: list[str]  # of the file, not in the network

    def __str__(self) -> str:
        text = f"{self.format}, {len(self.matched)} tensors matched"
        if self.missing:
            text += f"; kept at initialisation: {_some(self.missing)}"
        if self.unused:
            text += f"; left out of the file: {_some(self.unused)}"
        return text


def load_weights(model: SegmentationResNet, source: str | Path) -> Loaded:
    """Loads "imagenet" (torchvision) or a local file of one of FORMATS; "none" loads nothing.

    The network's mean and std become those of the weights. conv1 of BGR weights is reversed, so
    images stay RGB. Classifiers load where they fit. InputError if the backbone does not fit.
    """
    source = str(source)
    if source == "none":
        return Loaded("none (Kaiming initialisation; batch statistics, trained affine)", [], [], [])
    state, origin = _imagenet(model.imagenet) if source == "imagenet" else _read(Path(source))
    name, state = _translate(state, source)
    own = {key: v for key, v in model.state_dict().items() if "num_batches" not in key}
    matched = [key for key in own if key in state and state[key].shape == own[key].shape]
    missing = [key for key in own if key not in matched]
    unused = [key for key in state if key not in matched and "num_batches" not in key]
    wrong = [key for key in dict.fromkeys(missing + unused) if re.match(BACKBONE, key)]
    if wrong:
        why = f"the backbone does not fit this network ({name}; are layers and width the same?)"
        raise InputError(f"--weights {source}: {why}: {_some(wrong)}")
    model.load_state_dict({key: state[key] for key in matched}, strict=False)
    matched = [key for key in matched if key not in ("mean", "std")]
    return Loaded(f"{name}{origin}", matched, missing, unused)


def _translate(state: dict[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """Returns the format's name and the tensors as DeepLabV2 has them: keys, RGB, mean and std."""
    for key, value in state.items():
        if re.fullmatch(DEEP_STEM, key) and value.shape[2:] == (3, 3):
            why = f"a deep-stem ResNet (v1c: {key} is 3x3); this network's conv1 is 7x7"
            raise InputError(f"--weights {source}: {why}, as torchvision's")
    fitting = [f for f in FORMATS if any(re.fullmatch(f[1], key) for key in state)]
    if not fitting:
        known = ", ".join(name for name, *_ in FORMATS)
        raise InputError(f"--weights {source}: unknown keys ({_some(list(state))}); known: {known}")
    name, _, head, expects = fitting[0]
    for old, new in (*RENAMES, (f"^{head}", "classifiers.")):
        state = {re.sub(old, new, key): value for key, value in state.items()}
    if expects is None:
        return f"{name} (input as stored)", state
    description, mean, std = expects
    state["mean"], state["std"] = torch.tensor([mean, std]).view(2, 3, 1, 1)
    if expects is CAFFE and "conv1.weight" in state:
        state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR -> RGB
    return f"{name} ({description})", state


def _imagenet(weights: torchvision.models.WeightsEnum) -> tuple[dict[str, Tensor], str]:
    try:
        return weights.get_state_dict(progress=True, check_hash=True), ""
    except Exception as error:  # many types: no network, a damaged file, no space left
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise InputError(
            f"--weights imagenet: cannot load {weights.url} ({error}); download it elsewhere to "
            f"{folder}, or pass --weights FILE or --weights none"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Returns the tensors of a file by name, and which of several networks in it they are."""
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"--weights {path}: no such file, or unreadable (or 'imagenet' or 'none')")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly any type on a foreign file
        why = "not a file of tensors as torch.save writes"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"holds a pickled {found[1]}, not only tensors: save the state_dict() alone"
        raise InputError(f"--weights {path}: {why}") from error
    content = content if isinstance(content, dict) else {}
    names = dict.fromkeys((content.get("headline"), *WRAPPERS))
    if isinstance(content.get("state"), dict):  # a last.pt of this repository
        content = content["state"]
    held = [name for name in names if isinstance(content.get(name), dict)]
    if held:
        content = content[held[0]]
    state = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            state[re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", str(key))] = value
    if not state:
        raise InputError(f"--weights {path}: holds no state dict")
    return state, ", its " + ", not its ".join(held[:2]) if held else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
