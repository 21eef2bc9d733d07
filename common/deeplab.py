"""DeepLab-v2 (Chen et al. 2017, arXiv:1606.00915) on a ResNet at output stride 8.

The network is the DeepLab authors' Caffe model, as in the published programs. Its max-pool rounds
up. The first 1x1 convolution of a stage has the stage's stride. Tensors have torchvision's names.
"""

import re
import zipfile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet101_Weights

from common import InputError

# What weights expect of an image: in words, then mean and std of RGB in [0,1].
IMAGENET = ("RGB, ImageNet mean and std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)
CAFFE = ("BGR, 0-255 minus the mean", CAFFE_MEAN, (1 / 255, 1 / 255, 1 / 255))
BACKBONE = r"(conv1|bn1|layer\d|mean|std)\b"  # how the names of a ResNet's tensors begin


class SegmentationResNet(nn.Module):
    """A ResNet without its classifier. A subclass adds imagenet, features() and classify().

    caffe=True puts a stage's stride on its first 1x1 convolution and rounds the max-pool up.
    batch_norm is "batch", or "frozen" to keep the running statistics in train mode too.
    """

    def __init__(self, layers, width, batch_norm: str, strides, dilations, *, caffe: bool):
        super().__init__()
        self.frozen_statistics = {"batch": False, "frozen": True}[batch_norm]
        self.register_buffer("mean", torch.tensor(IMAGENET[1]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET[2]).view(3, 1, 1))
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=caffe)
        self.layer1 = _stage(width, width, layers[0], strides[0], dilations[0], caffe)
        self.layer2 = _stage(4 * width, 2 * width, layers[1], strides[1], dilations[1], caffe)
        self.layer3 = _stage(8 * width, 4 * width, layers[2], strides[2], dilations[2], caffe)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], strides[3], dilations[3], caffe)

    def initialize(self, *, train_affine: bool) -> None:
        """Kaiming initialisation; train_affine=False freezes batch norm's weights and biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(train_affine)
                module.num_batches_tracked = None  # nothing uses it; each is a CUDA kernel
        self.register_load_state_dict_post_hook(_ignore_counts)
        self.train()

    def normalize(self, image: Tensor) -> Tensor:
        """RGB in [0,1], (B,3,H,W) -> what the loaded weights expect, same shape."""
        return (image - self.mean) / self.std

    def stages(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the outputs of the four stages for a normalised image (B,3,H,W)."""
        x1 = self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(image)))))
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        return x1, x2, x3, self.layer4(x3)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.features(image), image.shape[-2:])

    def train(self, mode: bool = True):
        """Sets train or eval mode. Frozen batch norm stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if self.frozen_statistics and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def parameter_groups(self, lr: float, head_factor: float) -> list[dict]:
        """Returns the ResNet's trainable parameters at lr, then all others at head_factor * lr."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        backbone = [p for name, p in trained if re.match(BACKBONE, name)]
        head = [p for name, p in trained if not re.match(BACKBONE, name)]
        return [{"params": backbone, "lr": lr}, {"params": head, "lr": head_factor * lr}]


def _ignore_counts(_, keys) -> None:
    """Lets state dicts of other networks, and of older versions, hold num_batches_tracked."""
    keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if "num_batches" not in key]


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

    layers and width shrink the ResNet-101. Each dilation in rates has a classifier, and the logits
    are their sum. The papers' published code sums only (6, 12).
    """

    imagenet = ResNet101_Weights.IMAGENET1K_V1

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
        strides, dilations = (1, 2, 1, 1), (1, 1, 2, 4)
        super().__init__(layers, width, batch_norm, strides, dilations, caffe=True)
        self.feature_channels = 32 * width
        heads = [nn.Conv2d(32 * width, num_classes, 3, padding=r, dilation=r) for r in rates]
        self.classifiers = nn.ModuleList(heads)
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
# ("-": nothing to rename), its input. The first format that fits is taken.
FORMATS = (
    ("this repository", r"mean", "-", ("input as stored",)),
    ("kazuto1011 DeepLab", r"(base\.)?layer1\.conv1\.conv\.weight", r"aspp\.c", CAFFE),
    ("AdvSemiSeg/ClassMix", r"(Scale|layer5)\..*", r"layer5\.conv2d_list\.", CAFFE),
    # ST++ trains with ImageNet's mean and std, but the file in circulation is the Caffe model.
    ("DST-CBC/ST++", r"classifier\.(0\.convs\.)?3\.weight", r"classifier\.(0\.convs\.)?", CAFFE),
    ("C3-SemiSeg", r"body\.conv1\.weight", r"decoder\.conv2d_list\.", IMAGENET),
    ("deep-stem ResNet (v1c)", r"(.+\.)?(conv1|stem)\.0\.weight", "-", IMAGENET),
    ("torchvision", r".*", "-", IMAGENET),
)
RENAMES = (  # in this order; all but the first are for kazuto1011, which counts from 1
    (r"^(Scale|backbone|body|base)\.", ""),
    (r"^layer1\.conv1\.(conv|bn)\.", r"\g<1>1."),
    (r"^layer(\d)\.block(\d+)", lambda m: f"layer{int(m[1]) - 1}.{int(m[2]) - 1}"),
    (r"\.reduce\.(conv|bn)\.", r".\g<1>1."),
    (r"\.conv3x3\.(conv|bn)\.", r".\g<1>2."),
    (r"\.increase\.(conv|bn)\.", r".\g<1>3."),
    (r"\.shortcut\.conv\.", ".downsample.0."),
    (r"\.shortcut\.bn\.", ".downsample.1."),
)
# Keys under which a file may hold a network. The first one is taken.
NETWORKS = "student model state_dict model_state teacher ema_model teacher_state"


class Loaded(NamedTuple):
    """What load_weights did: the format of the file and the names of tensors."""

    format: str
    matched: list[str]
    missing: list[str]  # of the network, not in the file: they keep their initialisation
    unused: list[str]  # of the file, not in the network

    def __str__(self) -> str:
        left = {"missing": self.missing, "unused": self.unused}.items()
        left = [f"{len(names)} {kind} ({names[0]}, ...)" for kind, names in left if names]
        matched = f", {len(self.matched)} tensors matched" if self.matched else ""
        return "; ".join([self.format + matched, *left])


def load_weights(model: SegmentationResNet, source) -> Loaded:
    """Loads "imagenet" (torchvision) or a file of one of FORMATS. "none" loads nothing."""
    if str(source) == "none":
        return Loaded("random; batch norm is trained and uses batch statistics", [], [], [])
    state, network = _read(str(source), model.imagenet)
    state = {re.sub(r"\b(module|_orig_mod)\.", "", key): state[key] for key in state}
    fitting = [f for f in FORMATS if any(re.fullmatch(f[1], key) for key in state)]
    name, _, head, expects = fitting[0]
    for old, new in (*RENAMES, (f"^{head}", "classifiers.")):
        state = {re.sub(old, new, key): value for key, value in state.items()}
    if expects in (CAFFE, IMAGENET):
        state["mean"], state["std"] = torch.tensor(expects[1:]).view(2, 3, 1, 1)
    own = model.state_dict()
    matched = [key for key in own if key in state and state[key].shape == own[key].shape]
    missing = [key for key in own if key not in matched]
    unused = [key for key in state if key not in matched and "num_batches" not in key]
    named = [key for key in matched if key not in ("mean", "std")]
    loaded = Loaded(f"{name} ({expects[0]}){network}", named, missing, unused)
    if any(re.match(BACKBONE, key) for key in missing + unused):
        raise InputError(f"--weights {source}: does not fit (other layers or width?): {loaded}")
    if problem := unsound(state := {key: state[key] for key in matched}):
        raise InputError(f"--weights {source}: {problem}")
    if expects is CAFFE:
        state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR -> RGB
    model.load_state_dict(state, strict=False)
    return loaded


def load_file(path) -> object:
    """Reads a file of torch.save onto the CPU. torch.load itself ignores its checksums."""
    if zipfile.is_zipfile(path) and (name := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"the checksum of {name} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def unsound(state: dict) -> str | None:
    """Names the first tensor, in nested dicts too, that no network can use, and says why."""
    for name, value in state.items():
        if isinstance(value, dict) and (inner := unsound(value)):
            return f"{name}.{inner}"
        if isinstance(value, Tensor) and "num_batches" not in name:
            if value.layout != torch.strided or not value.is_floating_point():
                return f"{name} is sparse, or holds no floating-point numbers"
            least = {"running_var": 0, "std": 1e-30}.get(name.rpartition(".")[2], -1e38)
            if not (value.float().clamp(least, 1e38) == value).all():
                return f"{name} is not finite or too low" if least >= 0 else f"{name} is not finite"
    return None


def _read(source: str, imagenet) -> tuple[dict[str, Tensor], str]:
    """Returns tensors by name, and in words which of the file's networks they are."""
    try:
        if source == "imagenet":
            return imagenet.get_state_dict(progress=True, check_hash=True), ""
        content = load_file(source)
    except Exception as error:  # nearly any type: no connection, a full disk, a foreign file
        why = error if isinstance(error, OSError) else "damaged, or more than a state_dict()"
        if source == "imagenet":
            why = f"{imagenet.url}: {error}; or put this file in {torch.hub.get_dir()}/checkpoints"
        raise InputError(f"--weights {source}: {why}; --weights none needs no file") from error
    content, network = content if isinstance(content, dict) else {}, ""
    for name in ("state", content.get("headline"), *NETWORKS.split()):  # state: of a last.pt
        if isinstance(content.get(name), dict):
            content, network = content[name], f", its {name}"
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"--weights {source}: holds no state dict")
    return state, network
