"""IoU of networks, and predictions for any picture."""

import itertools
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import ImageOps
from torch import Tensor, nn

from common import InputError, pictures
from common.cache import write
from common.datasets import Images, loader, open_dataset
from common.layouts import IMAGE, by_stem, read_image


def autocast(args: Namespace) -> torch.autocast:
    """bfloat16 if --precision is bf16, else float32."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Counts pixels by true class (row) and predicted class (column) -> (K,K), without void."""
    valid = (label >= 0) & (label < num_classes)
    cell = num_classes * label[valid] + prediction[valid]
    return torch.bincount(cell, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """IoU of each class, (K,K) -> float64 (K,); NaN if it neither occurs nor is predicted."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


def segment(network: nn.Module, image: Tensor, size, crop=None) -> Tensor:
    """Predicts each pixel's class: (B,3,H,W) -> uint8 (B,*size). crop: in overlapping windows.

    Logits are upsampled one class at a time: all classes of a photograph would take gigabytes.
    """
    if crop is None:
        features = network.features(image)
        logits = network.classify(features, features.shape[-2:])
    else:
        logits = _mean_logits(network, image, *crop)
    best = logits.new_full((len(image), *size), -math.inf)
    label = torch.zeros_like(best, dtype=torch.uint8)
    for k, logit in enumerate(logits.split(1, dim=1)):
        value = F.interpolate(logit, size, mode="bilinear", align_corners=True)[:, 0]
        label.masked_fill_(value > best, k)
        torch.maximum(best, value, out=best)
    return label


def _mean_logits(network: nn.Module, image: Tensor, h: int, w: int) -> Tensor:
    """Means over overlapping windows of at most this size, (B,3,H,W) -> (B,K,H,W)."""
    height, width = image.shape[-2:]
    h, w, total, count = min(height, h), min(width, w), None, image.new_zeros(height, width)
    tops = np.linspace(0, height - h, 1 + math.ceil(1.5 * (height - h) / h), dtype=int).tolist()
    lefts = np.linspace(0, width - w, 1 + math.ceil(1.5 * (width - w) / w), dtype=int).tolist()
    for top, left in itertools.product(tops, lefts):
        window = (..., slice(top, top + h), slice(left, left + w))
        logits = network.classify(network.features(image[window]), (h, w))
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], height, width)
        total[window] += logits
        count[window] += 1
    return total.div_(count)


@torch.no_grad()
def evaluate(networks: dict, images: Images, num_classes: int, args: Namespace) -> dict[str, dict]:
    """Returns {"miou": ..., "iou": [...]} of each network in eval mode; an IoU of NaN is None.

    Predictions are compared at the resolution of the labels. Networks keep their modes.
    """
    pixels = max(tensor.shape[-2:].numel() for tensor in images[0])
    batch_size = max(1, min(8, 2**22 // pixels)) if images.same_size else 1
    batches = loader(images, args.workers, batch_size=batch_size)
    modes = {name: network.training for name, network in networks.items()}
    matrices = dict.fromkeys(networks, 0)
    # With benchmark=True, cuDNN would time its algorithms again for each image size.
    with autocast(args), torch.backends.cudnn.flags(enabled=True, benchmark=images.same_size):
        for image, label in batches:
            image = image.to(args.device).float().div_(255)
            label = label.to(args.device).long()
            for name, network in networks.items():
                network.eval()
                found = segment(network, image, label.shape[-2:], args.eval_crop)
                matrices[name] += confusion_matrix(found, label, num_classes).cpu()
    scores = {}
    for name, matrix in matrices.items():
        networks[name].train(modes[name])
        if not matrix.any():
            raise InputError("--data-dir: the images to evaluate have no labeled pixel")
        iou = class_iou(matrix)
        values = [None if math.isnan(value) else value for value in iou.tolist()]
        scores[name] = {"miou": iou.nanmean().item(), "iou": values}
    return scores


def iou_table(scores: dict[str, dict], class_names: Sequence[str]) -> str:
    """Formats the IoU of each class in %, with a column for each network and the mean last."""
    width = max(map(len, (*class_names, "mIoU"))) + 2
    lines = [" " * width + "".join(f"{name:>10}" for name in scores)]
    for k, class_name in enumerate((*class_names, "mIoU")):
        values = [(*score["iou"], score["miou"])[k] for score in scores.values()]
        texts = ["-" if value is None else f"{100 * value:.2f}" for value in values]
        lines.append(f"{class_name:<{width}}" + "".join(f"{text:>10}" for text in texts))
    if any(None in score["iou"] for score in scores.values()):
        lines.append("-: neither in the images nor predicted; the mean leaves it out")
    return "\n".join(lines)


@torch.no_grad()
def predict(network: nn.Module, path: Path, input_size, args: Namespace):
    """Reads a picture and resizes it to input_size; returns it and its classes, (H,W) uint8."""
    picture = read_image(path, ImageOps.exif_transpose)
    full_size = picture.height, picture.width
    if args.keep_aspect and input_size is not None:
        scale = (math.prod(input_size) / math.prod(full_size)) ** 0.5
        input_size = [max(8, round(scale * n)) for n in full_size]
    image = TF.pil_to_tensor(TF.resize(picture, input_size or full_size))[None]
    image = image.to(args.device).float().div_(255)
    return picture, segment(network.eval(), image, full_size, args.eval_crop)[0].cpu().numpy()


def load_state(parts: dict, checkpoint: dict) -> None:
    """Loads networks, optimizer and the like. InputError for one that does not fit."""
    for name, part in parts.items():
        try:
            saved, fresh = checkpoint["state"][name], part.state_dict()
            part.load_state_dict(saved)
            keys = () if isinstance(part, nn.Module) else fresh  # a network checks its own keys
            lacking = [key for key in keys if key not in saved and key[0] != "_"]
            if lacking or (name == "optimizer" and _steps_fail(part, fresh["param_groups"])):
                raise ValueError(lacking)
        except Exception as error:  # KeyError, RuntimeError, ValueError and more
            raise InputError(f"{checkpoint['path']}: {name} does not fit these flags") from error


def _steps_fail(optimizer: torch.optim.Optimizer, groups: list[dict]) -> bool:
    """Whether a loaded optimizer lacks what its next step needs. groups: those before loading."""
    for parameter, state in optimizer.state.items():
        names = ("exp_avg", "exp_avg_sq") if "step" in state else ("momentum_buffer",)
        if any(state[name].shape != parameter.shape for name in names):
            return True
    pairs = zip(groups, optimizer.param_groups, strict=True)
    return any(old.keys() - new.keys() for old, new in pairs)


def _load_network(recipe, args: Namespace, network: Callable, name: str) -> nn.Module:
    loaded = network(recipe, len(args.checkpoint["class_names"]), pretrained=args.weights != "none")
    load_state({name: loaded}, args.checkpoint)
    return loaded.to(args.device)


def evaluate_checkpoint(recipe, args: Namespace, network: Callable) -> None:
    """Prints the IoU of a checkpoint's student and teacher (--evaluate)."""
    size, full = recipe.size, args.full_resolution
    data = open_dataset(args.dataset, args.data_dir, size=size, full_labels=full)
    if (known := args.checkpoint["class_names"]) != list(data.class_names):
        raise InputError(f"--evaluate: trained on other classes: {', '.join(known)}")
    networks = {n: _load_network(recipe, args, network, n) for n in ("student", "teacher")}
    part, images = data.scored(args.evaluate_split)
    scores = evaluate(networks, images, data.num_classes, args)
    shown = "x".join(map(str, size)) if size and not full else "their own size"
    print(f"{len(images)} {part} images, labels at {shown}")
    print(iou_table(scores, data.class_names))


def predict_pictures(recipe, args: Namespace, network: Callable) -> None:
    """Writes NAME.png (predicted classes), NAME_overlay.png and a legend (--predict)."""
    given, folder = [Path(name) for name in args.predict[1:]], Path(args.out)
    paths = [p for g in given for p in (by_stem(g, IMAGE).values() if g.is_dir() else [g])]
    if not paths:
        raise InputError("--predict: no pictures given after the checkpoint, or none there")
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise InputError(f"--predict: not there: {', '.join(missing)}")
    results = [folder / f"{path.stem}{end}.png" for path in paths for end in ("", "_overlay")]
    files = [path.resolve() for path in (*paths, *results, folder / "legend.png")]
    if len(set(files)) < len(files):
        raise InputError(f"--predict: results in {folder} would overwrite a picture or each other")
    name = args.checkpoint["headline"]
    headline = _load_network(recipe, args, network, name)
    print(f"{name} of {args.predict[0]}, colours in {folder / 'legend.png'}")
    palette, names = args.checkpoint["palette"], args.checkpoint["class_names"]
    legend = pictures.legend(names, palette, 480, 16)
    write(folder / "legend.png", partial(legend.save, format="PNG"))
    failed = False
    for path in paths:
        try:
            picture, prediction = predict(headline, path, recipe.size, args)
        except InputError as error:
            print(f"{args.method}.py: {error}", file=sys.stderr)
            failed = True
            continue
        classes = pictures.colorize(prediction, palette)
        overlay = pictures.overlay(picture, classes)
        for image, end in ((classes, ""), (overlay, "_overlay")):
            write(folder / f"{path.stem}{end}.png", partial(image.save, format="PNG"))
        print(f"{path} -> {folder / path.stem}.png and {folder / path.stem}_overlay.png")
    if failed:
        sys.exit(1)
