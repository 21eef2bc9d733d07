"""DeepLab-v2 (Chen et al. 2017, arXiv:1606.00915) on a ResNet at output stride 8.

The layout is that of the DeepLab authors' Caffe model, which all four papers train: stride on the
first 1x1 convolution, ceil_mode in the max-pool, dilation 2 and 4 in every block of stages 3 and 4.
ImageNet weights from torchvision fit by name; up to layer1 the network is then torchvision's, after
it (stride position, dilation of the first blocks) it is not, as in the papers' code.
"""

from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from common import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB, of [0,1]
CAFFE_MEAN = (122.67891434, 116.66876762, 104.00698793)  # RGB, of 0-255; no division by a std


class Bottleneck(nn.Module):
    """1x1, dilated 3x3, 1x1 with a shortcut; the stride is on the first 1x1 (Caffe layout)."""

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(
            channels, channels, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


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
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = _stage(width, width, layers[0], stride=1, dilation=1)
        self.layer2 = _stage(4 * width, 2 * width, layers[1], stride=2, dilation=1)
        self.layer3 = _stage(8 * width, 4 * width, layers[2], stride=1, dilation=2)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], stride=1, dilation=4)
        self.classifiers = nn.ModuleList(
            nn.Conv2d(self.feature_channels, num_classes, 3, padding=rate, dilation=rate)
            for rate in rates
        )
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
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def parameter_groups(self, lr: float, head_factor: float) -> list[dict]:
        """Trainable backbone parameters at lr, classifiers at head_factor * lr, each once."""
        head = list(self.classifiers.parameters())
        in_head = set(map(id, head))
        trunk = [p for p in self.parameters() if p.requires_grad and id(p) not in in_head]
        return [{"params": trunk, "lr": lr}, {"params": head, "lr": head_factor * lr}]


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int, dilation: int):
    first = Bottleneck(in_channels, channels, stride, dilation)
    rest = (Bottleneck(4 * channels, channels, 1, dilation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


@dataclass(frozen=True)
class Loaded:
    """What load_weights did: the kind of file, and the tensors that fitted, lacked, were left."""

    kind: str
    matched: list[str]
    missing: list[str]  # of the network; keep their initialisation
    unused: list[str]  # of the file

    def __str__(self) -> str:
        parts = [f"{self.kind}, {len(self.matched)} tensors matched"]
        parts += [f"kept at initialisation: {_some(self.missing)}"] if self.missing else []
        parts += [f"left out of the file: {_some(self.unused)}"] if self.unused else []
        return "; ".join(parts)


def load_weights(model: DeepLabV2, source: str | Path) -> Loaded:
    """Fill model from "imagenet" (torchvision), "none" (stays as initialised) or a local file.

    A file is a torchvision ResNet state dict or has the key names of the ClassMix code (Caffe
    weights: 0-255, BGR; conv1 is turned round here so that images stay RGB). The network's mean
    and std become those of the weights. InputError where the backbone does not fit.
    """
    if str(source) == "none":
        return Loaded("none (Kaiming initialisation)", [], [], [])
    state = _imagenet_state() if str(source) == "imagenet" else _read_state(Path(source))
    state = dict(state)
    kind = "torchvision ImageNet"
    if any(key.startswith("layer5.") for key in state):
        kind = "Caffe-style DeepLab"
        state = {k.replace("layer5.conv2d_list.", "classifiers."): v for k, v in state.items()}
        state["mean"] = torch.tensor(CAFFE_MEAN).view(3, 1, 1) / 255
        state["std"] = torch.full((3, 1, 1), 1 / 255)
        if "conv1.weight" in state:
            state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR -> RGB
    elif "mean" in state and "std" in state:
        kind = "this repository's"
    else:
        state["mean"] = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        state["std"] = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    own = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    matched = [key for key in own if key in state and state[key].shape == own[key].shape]
    missing = [key for key in own if key not in matched]
    unused = [k for k in state if k not in matched and "num_batches_tracked" not in k]
    head = ("classifiers.", "fc.")
    if wrong := [key for key in dict.fromkeys(missing + unused) if not key.startswith(head)]:
        raise InputError(
            f"--weights {source}: the backbone does not fit this network (its layers and width, "
            f"and the key names of torchvision or of the ClassMix code): {_some(wrong)}"
        )
    model.load_state_dict({key: state[key] for key in matched}, strict=False)
    from_file = [key for key in matched if key not in ("mean", "std")]
    return Loaded(kind, from_file, missing, unused)


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
    tensors = state.items() if isinstance(state, dict) else ()
    tensors = {str(k).removeprefix("module."): v for k, v in tensors if isinstance(v, Tensor)}
    if not tensors:
        raise InputError(f"--weights {path}: holds no state dict")
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
