"""IoU of networks, predictions for any picture, and pictures of both."""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

from common import InputError
from common.datasets import Images, loader, open_dataset, read_image


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Counts pixels by true class (row) and predicted class (column).

    int64 (...) twice -> int64 (K,K). Labels outside 0..K-1 (void) are left out.
    """
    valid = (label >= 0) & (label < num_classes)
    cell = torch.where(valid, label * num_classes + prediction, num_classes**2)
    counts = torch.bincount(cell.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class: (K,K) -> float64 (K,).

    It is NaN for a class that neither occurs nor is predicted. The mean IoU leaves NaN out.
    """
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


@torch.no_grad()
def evaluate(networks: dict, images: Images, num_classes: int, args: Namespace) -> dict[str, dict]:
    """Returns {"miou": ..., "iou": [...]} of each network in eval mode; the IoU of NaN is None.

    Images are predicted whole, at their resolution, and compared at that of the labels. The
    networks are then put back into the mode that they were in. args: device, workers, precision.
    """
    images.prepare()
    batches = loader(images, args.workers, batch_size=8 if images.same_size else 1)
    modes = {name: network.training for name, network in networks.items()}
    matrices = {name: torch.zeros(num_classes, num_classes).long() for name in networks}
    # With benchmark=True, cuDNN would time its algorithms again for each image size.
    with autocast(args), torch.backends.cudnn.flags(enabled=True, benchmark=images.same_size):
        for image, label in batches:
            image = image.to(args.device).float().div_(255)
            label = label.to(args.device).long()
            for name, network in networks.items():
                network.eval()
                logits = network.classify(network.features(image), label.shape[-2:])
                matrices[name] += confusion_matrix(logits.argmax(1), label, num_classes).cpu()
    if not any(matrix.any() for matrix in matrices.values()):
        raise InputError("--data-dir: the images to evaluate have no labeled pixel")
    scores = {}
    for name, network in networks.items():
        network.train(modes[name])
        iou = class_iou(matrices[name])
        values = [None if math.isnan(value) else value for value in iou.tolist()]
        scores[name] = {"miou": iou.nanmean().item(), "iou": values}
    return scores


def iou_table(scores: dict[str, dict], class_names: Sequence[str]) -> str:
    """Formats the IoU of each class in %, with a column for each network and the mean last."""
    width = max(map(len, (*class_names, "mIoU"))) + 2
    lines = [" " * width + "".join(f"{name:>10}" for name in scores)]
    for k, class_name in enumerate((*class_names, "mIoU")):
        line = f"{class_name:<{width}}"
        for score in scores.values():
            value = (*score["iou"], score["miou"])[k]
            line += f"{'-' if value is None else f'{100 * value:.2f}':>10}"
        lines.append(line)
    return "\n".join(lines)


@torch.no_grad()
def predict(network: nn.Module, path: Path, size, device) -> tuple[Image.Image, np.ndarray]:
    """Returns a picture, turned as its EXIF says, and its predicted classes, (H,W) uint8.

    The network sees the picture with as many pixels as size (height, width) has, in its own
    aspect ratio, or as it is if size is None. The prediction has the picture's own size.
    """
    picture = ImageOps.exif_transpose(read_image(path))
    own = seen = (picture.height, picture.width)
    if size is not None:
        scale = (size[0] * size[1] / (own[0] * own[1])) ** 0.5
        seen = tuple(max(8, round(n * scale)) for n in own)
    resized = picture.resize(seen[::-1], Image.Resampling.BILINEAR)
    image = TF.pil_to_tensor(resized)[None].to(device).float().div_(255)
    network.eval()
    logits = network.classify(network.features(image), seen)
    logits = F.interpolate(logits, own, mode="bilinear", align_corners=True)
    return picture, logits.argmax(1)[0].byte().cpu().numpy()


# ---- Pictures ----


def colorize(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Returns a palette image of class ids, uint8 (H,W); void is black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    image = Image.fromarray(label)
    image.putpalette(colors.tobytes())
    return image


def save_samples(path: Path, columns: dict[str, Tensor], palette: Sequence, rows: int = 4) -> None:
    """Writes a PNG with a column for each named batch and a row for each of its first images.

    Images are float (B,3,H,W) in [0,1], labels int64 (B,H,W), masks bool (B,H,W).
    """
    height, width = next(iter(columns.values())).shape[-2:]
    zoom, title, gap = max(1, 256 // width), 14, 4
    rows = min(rows, *map(len, columns.values()))
    size = (len(columns) * (zoom * width + gap), title + rows * (zoom * height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, batch) in enumerate(columns.items()):
        left = column * (zoom * width + gap)
        draw.text((left, 1), name.replace("_", " "), fill="black")
        for row in range(rows):
            tile = _tile(batch[row].cpu(), palette)
            tile = tile.resize((zoom * width, zoom * height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, title + row * (zoom * height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _tile(values: Tensor, palette: Sequence) -> Image.Image:
    if values.dtype == torch.bool:
        return TF.to_pil_image(255 * values.byte()).convert("RGB")
    if values.is_floating_point():
        return TF.to_pil_image((255 * values.clamp(0, 1)).round().byte())
    return colorize(values.byte().numpy(), palette).convert("RGB")


# ---- Evaluating and predicting with a checkpoint ----


def autocast(args: Namespace) -> torch.autocast:
    """bfloat16 if --precision is bf16, else float32."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def _load_network(recipe, args: Namespace, network: Callable, name: str) -> nn.Module:
    checkpoint = args.checkpoint
    pretrained = args.weights != "none"
    loaded = network(recipe, len(checkpoint["class_names"]), pretrained=pretrained)
    try:
        loaded.load_state_dict(checkpoint["state"][name])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:160]
        raise InputError(f"the checkpoint does not fit the network: {reason}") from error
    return loaded.to(args.device).eval()


def evaluate_checkpoint(recipe, args: Namespace, network: Callable) -> None:
    """Prints the IoU of a checkpoint's student and teacher (--evaluate)."""
    known, full = args.checkpoint["class_names"], args.full_resolution
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size, full_labels=full)
    if known != list(data.class_names):
        raise InputError(
            f"--evaluate: trained on {len(known)} classes ({', '.join(known)}), but "
            f"{args.dataset} has {data.num_classes} ({', '.join(data.class_names)})"
        )
    names = ("student", "teacher")
    networks = {name: _load_network(recipe, args, network, name) for name in names}
    part, images = data.scored(args.evaluate_split)
    scores = evaluate(networks, images, data.num_classes, args)
    size = "their own size" if full or recipe.size is None else "{}x{}".format(*recipe.size)
    print(f"{len(images)} {part} images, labels at {size}")
    print(iou_table(scores, data.class_names))


def predict_pictures(recipe, args: Namespace, network: Callable) -> None:
    """Writes the classes that a checkpoint's headline network predicts (--predict).

    NAME.png holds the class ids with the palette, NAME_overlay.png the picture under them.
    """
    paths, folder = [Path(name) for name in args.predict[1:]], Path(args.out)
    if not paths:
        raise InputError("--predict: give a checkpoint and at least one image")
    taken = {path.resolve() for path in paths}
    for path in paths:
        if not path.is_file():
            raise InputError(f"--predict: {path}: no such image")
        files = {(folder / f"{path.stem}{end}.png").resolve() for end in ("", "_overlay")}
        if files & taken:
            raise InputError(f"--predict: {path}: its results would overwrite another file")
        taken |= files
    headline = _load_network(recipe, args, network, args.checkpoint["headline"])
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        picture, prediction = predict(headline, path, recipe.size, args.device)
        indexed = colorize(prediction, args.checkpoint["palette"])
        indexed.save(folder / f"{path.stem}.png")
        overlay = Image.blend(picture, indexed.convert("RGB"), 0.5)
        overlay.save(folder / f"{path.stem}_overlay.png")
        print(f"{path} -> {folder / path.stem}.png and {folder / path.stem}_overlay.png")
