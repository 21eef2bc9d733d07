"""DeepLab-v2 (Chen et al. 2017, arXiv:1606.00915) on a ResNet at output stride 8.

The layout is that of the DeepLab authors' Caffe model, which all four papers train: stride on the
first 1x1 convolution, ceil_mode in the max-pool, dilation 2 and 4 in every block of stages 3 and 4.
torchvision's ImageNet weights fit by name, though its network differs behind layer1 (stride
position, dilation of the first blocks), as in the papers' code.
"""

import hashlib
import os
import re
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from common import InputError

# What weights expect of an image: in words, then mean and std for RGB in [0,1].
IMAGENET = "RGB, ImageNet mean and std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)
CAFFE = "BGR, 0-255 minus the mean", CAFFE_MEAN, (1 / 255, 1 / 255, 1 / 255)


class SegmentationResNet(nn.Module):
    """A ResNet under whatever classifies its pixels; a subclass has features() and classify().

    strides and dilations are those of stages 1 to 4. caffe=True puts a stage's stride on the first
    1x1 convolution and rounds the max-pool up. batch_norm="frozen" keeps running statistics in
    train mode too; train_affine=False freezes the batch-norm weights and biases.
    """

    imagenet: torchvision.models.WeightsEnum  # torchvision's weights of the same ResNet

    def __init__(self, layers, width, *, strides, dilations, caffe: bool, batch_norm: str):
        super().__init__()
        if batch_norm not in ("batch", "frozen"):
            raise ValueError(f"batch_norm is 'batch' or 'frozen', not {batch_norm!r}")
        self.frozen_statistics = batch_norm == "frozen"
        # In the state dict, because they belong to the weights.
        for name, value in zip(("mean", "std"), IMAGENET[1:], strict=True):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=caffe)
        channels = width
        for k, (blocks, stride, dilation) in enumerate(
            zip(layers, strides, dilations, strict=True)
        ):
            inner = width * 2**k
            self.add_module(
                f"layer{k + 1}", _stage(channels, inner, blocks, stride, dilation, caffe)
            )
            channels = 4 * inner

    def initialize(self, *, train_affine: bool) -> None:
        """Kaiming's normal distribution for all convolutions; a subclass calls it when built."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(train_affine)
        self.train()

    def normalize(self, image: Tensor) -> Tensor:
        """RGB in [0,1] (B,3,H,W) -> what the loaded weights expect, same shape."""
        return (image - self.mean) / self.std

    def stages(self, x: Tensor) -> list[Tensor]:
        """Outputs of the four stages for a normalised image (B,3,H,W)."""
        outputs = [self.maxpool(F.relu(self.bn1(self.conv1(x))))]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            outputs.append(layer(outputs[-1]))
        return outputs[1:]

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.features(image), image.shape[-2:])

    def train(self, mode: bool = True):
        """As nn.Module.train, but frozen batch norm stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if self.frozen_statistics and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def parameter_groups(self, lr: float, head_factor: float) -> list[dict]:
        """Trainable ResNet parameters at lr, all others at head_factor * lr, each once."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        head = [p for name, p in named if not re.match(BACKBONE, name)]
        trunk = [p for name, p in named if re.match(BACKBONE, name)]
        return [{"params": trunk, "lr": lr}, {"params": head, "lr": head_factor * lr}]


def _stage(in_channels: int, width: int, blocks: int, stride: int, dilation: int, caffe: bool):
    shortcut = nn.Sequential(
        nn.Conv2d(in_channels, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width)
    )
    first = Bottleneck(in_channels, width, stride, downsample=shortcut, dilation=dilation)
    if caffe:
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    rest = (Bottleneck(4 * width, width, dilation=dilation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class DeepLabV2(SegmentationResNet):
    """Single-scale DeepLab-v2: RGB in [0,1] (B,3,H,W) -> float32 logits (B,K,H,W).

    layers and width shrink the ResNet (101 layers: (3, 4, 23, 3) and 64). rates are the dilations
    of the summed classifiers; (6, 12) is the network behind the papers' published numbers, whose
    code returns from inside the loop over the four. batch_norm and train_affine: see above.
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
        shape = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "caffe": True}
        super().__init__(layers, width, **shape, batch_norm=batch_norm)
        self.feature_channels = 32 * width
        heads = (nn.Conv2d(32 * width, num_classes, 3, padding=r, dilation=r) for r in rates)
        self.classifiers = nn.ModuleList(heads)
        self.initialize(train_affine=train_affine)
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)  # as the papers' code
        self.train()  # frozen statistics from the first step on

    def features(self, image: Tensor) -> Tensor:
        """RGB in [0,1] (B,3,H,W) -> (B,feature_channels,h,w) at stride 8; normalises first."""
        return self.stages(self.normalize(image))[-1]

    def classify(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,feature_channels,h,w) -> float32 logits (B,K,*size), bilinear, aligned corners."""
        logits = sum(classifier(features) for classifier in self.classifiers)
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)


# Kinds of weights file: name, pattern of a key that tells it, beginning of its classifiers' keys
# ("-": unlike ours), input (None: stored in the file). The first that fits counts.
FORMATS = (
    ("this repository", r"mean", "-", None),
    ("kazuto1011 DeepLab", r"(base\.)?layer1\.conv1\.conv\.weight", r"aspp\.c", CAFFE),
    ("AdvSemiSeg/ClassMix", r"Scale\..*|layer5\..*", r"layer5\.conv2d_list\.", CAFFE),
    # ST++ trains on ImageNet mean and std; the file that people have is the converted Caffe one.
    ("DST-CBC/ST++", r"classifier\.(0\.convs\.)?3\.weight", r"classifier\.(0\.convs\.)?", CAFFE),
    ("C3-SemiSeg", r"body\.conv1\.weight", r"decoder\.conv2d_list\.", IMAGENET),
    ("torchvision", r"(backbone\.)?conv1\.weight", "-", IMAGENET),
)
RENAMES = (  # in this order; all but the first are kazuto1011's, who counts from 1 and the stem
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
STEM = r"(.+\.)?(conv1|stem)\.0\.weight|([a-z_]+\.)*conv1\.weight"
# What networks are stored under, students before teachers.
WRAPPERS = "student", "model", "state_dict", "model_state", "teacher", "ema_model", "teacher_state"


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


def load_weights(model: SegmentationResNet, source: str | Path) -> Loaded:
    """Fill model from "imagenet" (torchvision), "none" (stays as initialised) or a local file.

    A file is of one of FORMATS. The network's mean and std become those of the weights, conv1 of
    BGR weights is turned round, so that images stay RGB. Classifiers load where they fit;
    InputError where the backbone does not.
    """
    if str(source) == "none":
        return Loaded("none (Kaiming initialisation; batch statistics, trained affine)", [], [], [])
    read = (
        _imagenet_state(model.imagenet) if str(source) == "imagenet" else _read_state(Path(source))
    )
    kind, state = _translate(*read, source)
    own = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    matched = [key for key in own if key in state and state[key].shape == own[key].shape]
    missing = [key for key in own if key not in matched]
    unused = [key for key in state if key not in matched and "num_batches" not in key]
    if wrong := [k for k in dict.fromkeys(missing + unused) if re.match(BACKBONE, k)]:
        why = f"the backbone does not fit this network ({kind}; are layers and width the same?)"
        raise InputError(f"--weights {source}: {why}: {_some(wrong)}")
    model.load_state_dict({key: state[key] for key in matched}, strict=False)
    return Loaded(kind, [k for k in matched if k not in ("mean", "std")], missing, unused)


def _translate(state: dict[str, Tensor], taken: str, source) -> tuple[str, dict[str, Tensor]]:
    """What the keys show the file to be; its tensors as DeepLabV2's: keys, RGB, mean and std."""
    deep = (k for k, v in state.items() if re.fullmatch(STEM, k) and v.shape[2:] == (3, 3))
    if stem := next(deep, None):
        why = f"a deep-stem ResNet (v1c: {stem} is 3x3); this network's conv1 is 7x7"
        raise InputError(f"--weights {source}: {why}, as torchvision's")
    fitting = [f for f in FORMATS if any(re.fullmatch(f[1], key) for key in state)]
    if not fitting:
        keys, known = _some(list(state)), ", ".join(name for name, *_ in FORMATS)
        raise InputError(f"--weights {source}: no known key names ({keys}); known: {known}")
    name, _, head, expects = fitting[0]
    for pattern, new in (*RENAMES, (f"^{head}", "classifiers.")):
        state = {re.sub(pattern, new, key): value for key, value in state.items()}
    if expects is None:
        return f"{name}{taken} (input as stored)", state
    state["mean"], state["std"] = torch.tensor(expects[1:]).view(2, 3, 1, 1)
    if expects is CAFFE and "conv1.weight" in state:
        state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR -> RGB
    return f"{name}{taken} ({expects[0]})", state


def _imagenet_state(weights: torchvision.models.WeightsEnum) -> tuple[dict[str, Tensor], str]:
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if cached.is_file():
        _check_hash(cached)  # torch.hub checks only what it downloads
    try:
        return weights.get_state_dict(progress=True, check_hash=True), " ImageNet"
    except (OSError, HTTPException, RuntimeError) as error:
        raise InputError(
            f"--weights imagenet: cannot download {weights.url} ({error}); fetch it elsewhere and "
            f"put it in {cached.parent}, or pass --weights FILE or --weights none"
        ) from error


def _read_state(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file by name, and which one of several networks in it they are."""
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"--weights {path}: no such file, or unreadable (or 'imagenet' or 'none')")
    _check_hash(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly any type on a foreign file
        why = "not a file of tensors as torch.save writes"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"holds a pickled {found[1]}, not only tensors: save the state_dict() alone"
        raise InputError(f"--weights {path}: {why}") from error
    content = content if isinstance(content, dict) else {}
    names = dict.fromkeys((content.get("headline"), *WRAPPERS))
    content = content["state"] if isinstance(content.get("state"), dict) else content  # last.pt
    held = [name for name in names if isinstance(content.get(name), dict)]
    content, strip = content[held[0]] if held else content, r"(^|\.)((module|_orig_mod)\.)+"
    state = {re.sub(strip, r"\1", str(k)): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise InputError(f"--weights {path}: holds no state dict")
    return state, ": its " + ", not its ".join(held[:2]) if held else ""


def _check_hash(path: Path) -> None:
    """torch.hub's file names end in the first digits of the sha256: name-41f33a49.pth."""
    # -20210507. is a date, -00040000. a number of steps
    named = re.search(r"-(?!(20|00)\d{6}\.)([0-9a-f]{8,64})\.", path.name)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while named and (chunk := file.read(2**20)):
            digest.update(chunk)
    if named and not digest.hexdigest().startswith(named[2]):
        raise InputError(f"--weights {path}: sha256 is not {named[2]}...: damaged or another file")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
