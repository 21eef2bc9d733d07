"""Scores of a network on labeled images, its predictions on any picture, and pictures of both."""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from common import InputError
from common.datasets import Data, Images, open_dataset, read_image, start_worker


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
    networks: dict, images: Images, num_classes: int, *, device, workers: int, autocast=nullcontext
) -> dict[str, dict]:
    """Mean IoU "miou" and per-class "iou" (None for NaN), in [0,1], of each network in eval mode.

    Whole images, predicted at their resolution, compared at that of the labels. Train or eval mode
    is as before when it returns.
    """
    images.prepare()
    options = {"num_workers": workers, "worker_init_fn": start_worker}
    loader = DataLoader(images, batch_size=8 if images.same_size else 1, **options)
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
    # Unlike those of a data set: no label has to fit it.
    picture = ImageOps.exif_transpose(read_image(path))
    own = inside = (picture.height, picture.width)
    if size is not None:
        scale = (size[0] * size[1] / (own[0] * own[1])) ** 0.5
        inside = tuple(max(8, round(n * scale)) for n in own)
    resized = picture.resize(inside[::-1], Image.Resampling.BILINEAR)
    image = TF.pil_to_tensor(resized)[None].to(device).float().div_(255)
    features = network.eval().features(image)
    logits = network.classify(features, inside)[0]
    # One class at a time: all logits of a large photograph would not fit in memory.
    best = torch.full(own, -torch.inf, device=device)
    prediction = torch.zeros(own, dtype=torch.uint8, device=device)
    for k, plane in enumerate(logits):
        plane = F.interpolate(plane[None, None], own, mode="bilinear", align_corners=True)[0, 0]
        prediction[plane > best] = k
        best = best.maximum(plane)
    return picture, prediction.cpu().numpy()


# ---- Pictures ----


def colorize(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Class ids, uint8 (H,W) -> a palette image of them, in which void is black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    image = Image.fromarray(label)
    image.putpalette(colors.tobytes())
    return image


def save_prediction(folder: Path, stem: str, picture: Image.Image, prediction, palette) -> None:
    """Write STEM.png, the class ids with the palette, and STEM_overlay.png, both (H,W)."""
    indexed = colorize(prediction, palette)
    indexed.save(folder / f"{stem}.png")
    Image.blend(picture, indexed.convert("RGB"), 0.5).save(folder / f"{stem}_overlay.png")


def save_samples(path: Path, columns: dict[str, Tensor], palette: Sequence, rows: int = 4) -> None:
    """Write one PNG: a column for each named batch, a row for each of its first images.

    Images are float (B,3,H,W) in [0,1], labels int64 (B,H,W), masks bool (B,H,W).
    """
    rows = min(rows, *map(len, columns.values()))
    tiles = [_tile(batch[row].cpu(), palette) for row in range(rows) for batch in columns.values()]
    gap, caption, width = 2, 14, tiles[0].shape[2]
    zoom = max(1, 256 // width)
    grid = TF.to_pil_image(make_grid(tiles, len(columns), padding=gap, pad_value=255))
    grid = grid.resize((zoom * grid.width, zoom * grid.height), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (grid.width, caption + grid.height), "white")
    sheet.paste(grid, (0, caption))
    for column, name in enumerate(columns):
        place = (zoom * (gap + column * (width + gap)), 1)
        ImageDraw.Draw(sheet).text(place, name.replace("_", " "), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _tile(values: Tensor, palette: Sequence) -> Tensor:
    """A sample as a picture: uint8 (3,H,W)."""
    if values.is_floating_point():
        return (255 * values.clamp(0, 1)).round().byte()
    if values.dtype == torch.bool:
        return (255 * values.byte()).expand(3, -1, -1)
    return TF.pil_to_tensor(colorize(values.byte().numpy(), palette).convert("RGB"))


# ---- Evaluating and predicting with a checkpoint ----


def autocast(args: Namespace) -> torch.autocast:
    """bfloat16 where --precision says so."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def score(networks: dict[str, nn.Module], data: Data, args: Namespace) -> dict[str, dict]:
    """evaluate on --evaluate-split with the command line's device, workers and precision."""
    options = {"device": args.device, "workers": args.workers}
    _, images = data.scored(args.evaluate_split)
    options |= {"autocast": partial(autocast, args)}
    # Images of many sizes would have cuDNN measure its algorithms for each of them.
    with torch.backends.cudnn.flags(enabled=True, benchmark=images.same_size):
        return evaluate(networks, images, data.num_classes, **options)


def _load_network(recipe, args: Namespace, network: Callable, name: str) -> nn.Module:
    checkpoint = args.checkpoint
    loaded = network(recipe, len(checkpoint["class_names"]), args.weights != "none")
    try:
        loaded.load_state_dict(checkpoint["state"][name])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:160]
        raise InputError(f"the checkpoint does not fit the network: {reason}") from error
    return loaded.to(args.device).eval()


def evaluate_checkpoint(recipe, args: Namespace, network: Callable) -> None:
    """Print the IoU of a checkpoint's student and teacher (--evaluate)."""
    known, full = args.checkpoint["class_names"], args.full_resolution
    data = open_dataset(args.dataset, args.data_dir, size=recipe.size, full_labels=full)
    if known != list(data.class_names):
        raise InputError(
            f"--evaluate: trained on {len(known)} classes ({', '.join(known)}), but "
            f"{args.dataset} has {data.num_classes} ({', '.join(data.class_names)})"
        )
    networks = {n: _load_network(recipe, args, network, n) for n in ("student", "teacher")}
    scores = score(networks, data, args)
    size = "their own size" if full or recipe.size is None else "{}x{}".format(*recipe.size)
    part, images = data.scored(args.evaluate_split)
    print(f"{len(images)} {part} images, labels at {size}")
    print(iou_table(scores, data.class_names))


def predict_pictures(recipe, args: Namespace, network: Callable) -> None:
    """Write what a checkpoint's headline network sees in pictures (--predict)."""
    if len(args.predict) < 2:
        raise InputError("--predict: give a checkpoint and at least one image")
    paths = [Path(name) for name in args.predict[1:]]
    folder, written = Path(args.out), set()
    for path in paths:
        if not path.is_file():
            raise InputError(f"--predict: {path}: no such image")
        files = {(folder / f"{path.stem}{end}.png").resolve() for end in ("", "_overlay")}
        if files & (written | {other.resolve() for other in paths}):
            raise InputError(f"--predict: {path}: its results would overwrite others, or a picture")
        written |= files
    best = _load_network(recipe, args, network, args.checkpoint["headline"])
    for path in paths:
        picture, prediction = predict(best, path, recipe.size, args.device)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_prediction(folder, path.stem, picture, prediction, args.checkpoint["palette"])
        except OSError as error:
            raise InputError(f"--out {folder}: cannot write there ({error})") from error
        print(f"{path} -> {folder / path.stem}.png and {folder / path.stem}_overlay.png")
