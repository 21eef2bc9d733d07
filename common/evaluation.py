"""Scores of a network on labeled images, its predictions on any picture, and pictures of both."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.datasets import Images, Scenes, read_image

Palette = Sequence[tuple[int, int, int]]


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Pixel counts, rows = truth, columns = prediction: int64 (...) twice -> int64 (K,K).

    Labels outside 0..K-1 (void) are left out.
    """
    valid = (label >= 0) & (label < num_classes)
    cell = torch.where(valid, label * num_classes + prediction, num_classes**2)
    counts = torch.bincount(cell.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class: (K,K) -> float64 (K,).

    NaN where a class neither occurs nor is predicted; the mean IoU leaves it out (nanmean).
    """
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


@torch.no_grad()
def evaluate(
    networks: dict[str, nn.Module],
    images: Images | Scenes,
    num_classes: int,
    *,
    device: torch.device,
    workers: int,
    autocast=nullcontext,
) -> dict[str, dict]:
    """Mean IoU "miou" and per-class "iou" (None for NaN), in [0,1], of each network in eval mode.

    Whole images; predicted at the resolution of the images, compared at that of the labels. Train
    or eval mode is as before when it returns.
    """
    loader = DataLoader(images, batch_size=8 if images.same_size else 1, num_workers=workers)
    modes = {name: network.training for name, network in networks.items()}
    matrices = {name: torch.zeros(num_classes, num_classes).long() for name in networks}
    for image, label in loader:
        image = image.to(device).float().div_(255)
        label = label.to(device).long()
        for name, network in networks.items():
            network.eval()
            with autocast():
                logits = network.classify(network.features(image), label.shape[-2:])
            matrices[name] += confusion_matrix(logits.argmax(1), label, num_classes).cpu()
    for name, network in networks.items():
        network.train(modes[name])
    scores = {name: class_iou(matrix) for name, matrix in matrices.items()}
    return {
        name: {
            "miou": iou.nanmean().item(),
            "iou": [None if math.isnan(value) else value for value in iou.tolist()],
        }
        for name, iou in scores.items()
    }


def iou_table(scores: dict[str, dict], class_names: Sequence[str]) -> str:
    """Per-class IoU in %, one column for each network that evaluate scored, the mean last."""
    width = max(map(len, (*class_names, "mIoU"))) + 2
    lines = [" " * width + "".join(f"{name:>10}" for name in scores)]
    for k, class_name in enumerate((*class_names, "mIoU")):
        values = [(*s["iou"], s["miou"])[k] for s in scores.values()]
        cells = ("-" if value is None else f"{100 * value:.2f}" for value in values)
        lines.append(f"{class_name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


@torch.no_grad()
def predict(
    network: nn.Module, path: Path, size: tuple[int, int] | None, device: torch.device
) -> tuple[Image.Image, np.ndarray]:
    """A picture (upright, as its EXIF says) and the class of each of its pixels, (H,W) uint8.

    size is what the network was trained on: the picture goes in with as many pixels and its own
    aspect ratio; None: as it is. The prediction has the picture's own size.
    """
    picture = ImageOps.exif_transpose(read_image(path))
    own = (picture.height, picture.width)
    inside = own
    if size is not None:
        scale = (size[0] * size[1] / (own[0] * own[1])) ** 0.5
        inside = tuple(max(8, round(n * scale)) for n in own)
    resized = picture.resize(inside[::-1], Image.Resampling.BILINEAR)
    image = TF.pil_to_tensor(resized)[None].to(device).float().div_(255)
    network.eval()
    features = network.features(image)
    # The classes are found in bands: all logits of a large photograph would not fit in memory.
    logits = network.classify(features, inside)
    return picture, _upsampled_argmax(logits, own)


def _upsampled_argmax(logits: Tensor, size: tuple[int, int], rows: int = 256) -> np.ndarray:
    wide = F.interpolate(logits, (logits.shape[2], size[1]), mode="bilinear", align_corners=True)
    position = torch.linspace(0, logits.shape[2] - 1, size[0], device=logits.device)
    bands = []
    for band in position.split(rows):
        low = band.floor().long().clamp(max=logits.shape[2] - 1)
        high = (low + 1).clamp(max=logits.shape[2] - 1)
        bands.append(wide[0, :, low].lerp(wide[0, :, high], (band - low)[:, None]).argmax(0))
    return torch.cat(bands).to(torch.uint8).cpu().numpy()


# ---- Pictures ----


def colorize(label: Tensor | np.ndarray, palette: Palette) -> np.ndarray:
    """(H,W) class ids -> (H,W,3) uint8; void is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[np.asarray(label).astype(np.uint8)]


def save_prediction(
    folder: Path, stem: str, picture: Image.Image, prediction: np.ndarray, palette: Palette
) -> None:
    """Write STEM.png, the class ids with the palette, and STEM_overlay.png, both (H,W)."""
    indexed = Image.fromarray(prediction).convert("P")
    indexed.putpalette(np.asarray(palette, np.uint8).tobytes())
    indexed.putdata(prediction.ravel())
    indexed.save(folder / f"{stem}.png")
    overlay = Image.blend(picture, Image.fromarray(colorize(prediction, palette)), 0.5)
    overlay.save(folder / f"{stem}_overlay.png")


def save_samples(path: Path, columns: dict[str, Tensor], palette: Palette, rows: int = 4) -> None:
    """Write one PNG: a column for each named batch, a row for each of its first images.

    Images are float (B,3,H,W) in [0,1], labels int64 (B,H,W), masks bool (B,H,W), other float
    tensors logits (B,K,H,W).
    """
    gap, caption = 4, 14
    first = next(iter(columns.values()))
    rows, (height, width) = min(rows, len(first)), first.shape[-2:]
    zoom = max(1, 256 // width)
    cell = (zoom * height + gap, zoom * width + gap)
    size = (len(columns) * cell[1] + gap, rows * cell[0] + caption + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, batch) in enumerate(columns.items()):
        draw.text((column * cell[1] + gap, 1), name.replace("_", " "), fill="black")
        for row, tile in enumerate(batch[:rows].cpu()):
            if tile.is_floating_point() and len(tile) > 3:  # logits
                tile = tile.argmax(0)
            if tile.is_floating_point():
                pixels = (tile.clamp(0, 1) * 255).round().byte().movedim(0, 2).numpy()
            elif tile.dtype == torch.bool:
                pixels = np.where(tile.numpy(), 255, 0).astype(np.uint8)
            else:
                pixels = colorize(tile, palette)
            picture = Image.fromarray(pixels).convert("RGB")
            picture = picture.resize((zoom * tile.shape[-1], zoom * tile.shape[-2]), 0)
            sheet.paste(picture, (column * cell[1] + gap, row * cell[0] + caption + gap))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
