"""Data sets of images and labels, the choice of labeled images, endless batches.

In this file an image is RGB uint8 (3,H,W) and a label uint8 (H,W): 0..K-1, or 255 for void.
"""

import itertools
import math
import os
import signal
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import InputError, cache, layouts, streets, warn
from common.layouts import INVALID, VOID, read_lines

warnings.filterwarnings("ignore", module="PIL")  # about odd palettes and large photographs
LARGE = 2**20  # an image of this many pixels is worth caching
# Defaults of the flags --labeled and --weights.
DEFAULTS = {
    "cityscapes": {"labeled": "1/8", "weights": "imagenet"},
    "voc": {"labeled": "1/8", "weights": "imagenet"},
    "streets": {"labeled": "32", "weights": "none"},
    "camvid": {"labeled": "30", "weights": "imagenet"},
    "bdd100k": {"labeled": "1/8", "weights": "imagenet"},
    "folder": {"labeled": "1.0", "weights": "imagenet"},
}


class Images(Dataset):
    """One part of a data set on disk, sorted by name: images[i] -> image, label.

    files maps a name to the paths of image and label. With a size (height, width), images are
    resized by PIL's antialiased bilinear filter and labels by the nearest pixel; full_labels
    leaves the labels at their own size. An image without a label file gets a void label.
    """

    def __init__(self, files: dict, label_table: np.ndarray, size, full_labels, cache_dir: Path):
        self.names = sorted(files)
        self.files = [files[name] for name in self.names]
        self.has_label = [label is not None for _, label in self.files]
        self.label_table, self.size, self.full_labels = label_table, size, full_labels
        sizes = {_check_pair(image, label) for image, label in self.files}
        resized = size is not None and not full_labels
        self.same_size = resized or len(sizes) == 1  # whether items can be stacked into a batch
        large = max(width * height for width, height in sizes) >= LARGE
        worth_caching = resized and large and sizes != {(size[1], size[0])}
        self.cache_dir = cache_dir if worth_caching else None
        self.cache: Path | None = None

    def prepare(self) -> None:
        """Decodes large images into the cache, unless it is there. A full disk gives a warning."""
        if self.cache_dir is None:
            return
        sources = [path for pair in self.files for path in pair if path is not None]
        settings = (self.size, self.label_table.tolist())
        place = self.cache_dir / cache.key(self.cache_dir, sources, settings)
        self.cache_dir = None  # tried once
        if not cache.is_sound(place):
            # More prefetching overflows the 64 MB of shared memory in a default container.
            workers = min(16, os.cpu_count() or 1, len(self))
            items = loader(self, workers, batch_size=None, prefetch_factor=1)
            try:
                cache.build(place, len(self), items)
            except OSError as error:
                warn(f"no cache, training will be slower: cannot write {place} ({error})")
                return
        self.cache = place

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            image, label = cache.read(self.cache, index)
        else:
            image, label = self._decode(*self.files[index])
        return torch.from_numpy(image), torch.from_numpy(label)

    def _decode(self, image_path: Path, label_path: Path | None) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(image_path)  # not turned as its EXIF says, because its label is not
        if label_path is None:
            label = Image.new("L", image.size, VOID)
        else:
            label = Image.fromarray(_read_label(label_path, self.label_table))
        if label.size != image.size:
            raise InputError(f"{label_path}: {label.size} pixels, but its image has {image.size}")
        if self.size is not None:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        if self.size is not None and not self.full_labels:
            label = label.resize(self.size[::-1], Image.Resampling.NEAREST)
        return np.array(image).transpose(2, 0, 1).copy(), np.array(label)


@dataclass(frozen=True)
class Data:
    """A data set: its parts, its class names and their colours (RGB 0-255)."""

    train: Images
    val: Images
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    test: Images | None = None

    @property
    def num_classes(self) -> int:
        """K, without void."""
        return len(self.class_names)

    def scored(self, part: str | None) -> tuple[str, Images]:
        """Name and images of the part to evaluate; by default test, or val if there is no test."""
        part = part or ("val" if self.test is None else "test")
        images = getattr(self, part)
        if images is None:
            raise InputError(f"--evaluate-split {part}: the data set has no such part here")
        return part, images


def open_dataset(name: str, data_dir, *, size=None, full_labels: bool = False) -> Data:
    """Opens "streets" or a data set of common/layouts.py and checks the header of every file.

    Images and labels are resized to size (height, width), or left as they are. full_labels keeps
    the labels of val and test at their own size. InputError names the first bad file.
    """
    if name == "streets":
        parts = {part: streets.Scenes(part, size or (64, 128)) for part in ("train", "val")}
        return Data(**parts, class_names=streets.CLASS_NAMES, palette=streets.PALETTE)
    if name not in layouts.FILES:
        raise InputError(f"--dataset {name}: is none of streets, {', '.join(layouts.FILES)}")
    root = Path(data_dir or Path("data") / name)
    if not root.is_dir():
        raise InputError(f"--data-dir {root}: no such folder")
    files, table, class_names, palette = layouts.FILES[name](root)
    parts = {}
    for part, pairs in files.items():
        if not pairs:
            raise InputError(f"--data-dir {root}: no {part} image has a label")
        cache_dir = root / ".cache-{}x{}".format(*(size or (0, 0))) / part
        parts[part] = Images(pairs, table, size, full_labels and part != "train", cache_dir)
    counts = {part: len(images) for part, images in parts.items()}
    published = layouts.COUNTS.get(name, {})
    if any(published.get(part, count) != count for part, count in counts.items()):
        warn(f"--data-dir {root}: images are {counts}, published are {published}")
    return Data(**parts, class_names=tuple(class_names), palette=tuple(palette))


def _check_pair(image_path: Path, label_path: Path | None) -> tuple[int, int]:
    """Reads the headers and returns the width and height that both files have."""
    size = _open(image_path).size
    if label_path is not None and label_path.suffix == ".mat":
        with label_path.open("rb") as file:  # reading its size would take too long
            if file.read(10) != b"MATLAB 5.0":
                raise InputError(f"{label_path}: an empty file, or not a MATLAB 5 file")
    elif label_path is not None:
        label = _open(label_path)
        # Pillow stretches grey values of fewer than 8 bits to 0-255, which changes the ids.
        stretched = label.mode not in ("L", "P") or label.tile[0][3] in ("L;2", "L;4")
        if label.format != "PNG" or stretched:
            raise InputError(f"{label_path}: a label is an 8-bit grey or palette PNG of class ids")
        if label.size != size:
            raise InputError(f"{label_path}: {label.size} pixels, but {image_path.name} has {size}")
    return size


def _open(path: Path, *, decode: bool = False) -> Image.Image:
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        empty = path.is_file() and path.stat().st_size == 0
        reason = "an empty file" if empty else f"a damaged file or not an image ({error})"
        raise InputError(f"{path}: {reason}") from error


def read_image(path: Path) -> Image.Image:
    """Reads an image as RGB. InputError if it is damaged or has more than 8 bits a channel."""
    image = _open(path, decode=True)
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path}: more than 8 bits a channel; convert it to 8-bit RGB or grey")
    return image.convert("RGB")


def _read_label(path: Path, table: np.ndarray) -> np.ndarray:
    ids = _read_mat(path) if path.suffix == ".mat" else np.asarray(_open(path, decode=True))
    label = table[ids]
    if (label == INVALID).any():
        wrong = ", ".join(map(str, np.unique(ids[label == INVALID])[:5]))
        known = np.flatnonzero(table != INVALID).tolist()
        raise InputError(f"{path}: label id {wrong} is none of {known}")
    return label


def _read_mat(path: Path) -> np.ndarray:
    """The class ids, uint8 (H,W), in a .mat file of SBD's cls folder."""
    try:
        ids = loadmat(path)["GTcls"][0, 0]["Segmentation"]
        label = ids.astype(np.uint8)
        if not np.array_equal(ids, label):
            raise ValueError("not whole numbers from 0 to 255")
    except Exception as error:  # loadmat raises nearly any type on a damaged file
        raise InputError(f"{path}: a damaged file or not one of SBD's cls folder") from error
    return label


# ---- Labeled and unlabeled ----


def split(num_images: int, labeled, seed: int, *, unlabeled: str = "rest") -> tuple[list, list]:
    """Returns the indices (into sorted names) of the labeled and of the unlabeled images.

    labeled is a count (32, "32") or a fraction (0.125, "1/8") of num_images, rounded half up. The
    labeled images are the first ones of numpy's legacy permutation for the seed: a smaller subset
    is part of a larger one, and all machines agree. The unlabeled images are the rest, or all
    images with unlabeled="all" and where every image is labeled.
    """
    text = str(labeled)
    try:
        share = Fraction(text) if "." in text or "/" in text else Fraction(int(text), num_images)
    except (ValueError, ZeroDivisionError) as error:
        hint = "give a count, or a fraction such as 0.125 or 1/8"
        raise InputError(f"--labeled {text}: {hint}") from error
    count = math.floor(share * num_images + Fraction(1, 2))
    if num_images == 2975 and share == Fraction(1, 30):
        count = 100  # all papers count this share of Cityscapes as 100
    if not 1 <= count <= num_images:
        raise InputError(f"--labeled {text}: {count}; it must be 1 to {num_images} here")
    order = np.random.RandomState(seed).permutation(num_images).tolist()
    rest = order if unlabeled == "all" or count == num_images else order[count:]
    return sorted(order[:count]), sorted(rest)


def select(train: Images, args, *, batch_size: int, unlabeled: str = "rest") -> tuple[list, list]:
    """Returns the indices of the labeled and of the unlabeled training images.

    --labeled and --split-seed choose among the images that have a label as split() does, or
    --labeled-list names them. Images without a label file are always unlabeled.
    """
    candidates = [index for index, has_label in enumerate(train.has_label) if has_label]
    if not candidates:
        raise InputError("--data-dir: no training image has a label")
    if args.checkpoint is not None:
        names = args.checkpoint["labeled_names"]
        if args.checkpoint["training_images"] != len(train) or not set(names) <= set(train.names):
            raise InputError("--resume: the training images are not those of the checkpoint")
        labeled = sorted(map(train.names.index, names))
    elif args.labeled_list is not None:
        labeled = _read_labeled_list(train, Path(args.labeled_list))
    else:
        chosen, _ = split(len(candidates), args.labeled, args.split_seed)
        labeled = [candidates[k] for k in chosen]
    rest = sorted(set(range(len(train))) - set(labeled))
    if unlabeled == "all" or not rest:
        rest = list(range(len(train)))
    if not args.supervised and len(rest) < batch_size:
        raise InputError(f"--batch-size {batch_size}: there are only {len(rest)} unlabeled images")
    return labeled, rest


def _read_labeled_list(train: Images, path: Path) -> list[int]:
    """Reads one image a line: its id or file name, with or without folders and suffix.

    A second column, as published lists have it, does not count.
    """
    if not path.is_file():
        raise InputError(f"--labeled-list {path}: no such file")
    by_name = defaultdict(set)
    for index, (image, _) in enumerate(train.files):
        for known in (Path(train.names[index]).name, image.name, image.stem):
            by_name[known].add(index)
    by_name |= {name: {index} for index, name in enumerate(train.names)}
    labeled = set()
    for line in read_lines(path):
        texts = (line, line.split()[0])  # a name may hold a blank
        keys = [key for text in texts for key in (text, Path(text).name, Path(text).stem)]
        found = next((by_name[key] for key in keys if key in by_name), set())
        if len(found) != 1:
            problem = "the name of several training images" if found else "not a training image"
            raise InputError(f"--labeled-list {path}: {line}: {problem}")
        if not train.has_label[min(found)]:
            raise InputError(f"--labeled-list {path}: {line}: an image without a label")
        labeled |= found
    if not labeled:
        raise InputError(f"--labeled-list {path}: lists no image")
    return sorted(labeled)


# ---- Batches ----


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """[m] -> the m-th micro-batch of this rank: image uint8 (B,3,H,W), label uint8 (B,H,W).

    micro_batches are this rank's among the `count` of each batch. Batch t depends only on (seed,
    stream, t). Each epoch is a new permutation of the indices, without the rest that does not fill
    a batch; if there are fewer indices than a batch has images, they repeat.
    """

    images: Images
    indices: list[int]
    transform: Callable  # transform(seed, image, label), with a new seed for each image
    batch_size: int
    micro_batches: range
    count: int
    seed: int
    stream: int

    def __getitem__(self, m: int) -> tuple[Tensor, Tensor]:
        t, k = divmod(m, len(self.micro_batches))
        epoch, place = divmod(t, max(len(self.indices) // self.batch_size, 1))
        order = np.random.default_rng((self.seed, self.stream, epoch)).permutation(self.indices)
        batch = order[place * self.batch_size :][: self.batch_size]
        batch = np.resize(batch, self.batch_size)
        seeds = np.random.SeedSequence((self.seed, self.stream, t)).generate_state(self.batch_size)
        size = self.batch_size // self.count
        images, labels = [], []
        for place in range(self.micro_batches[k] * size, (self.micro_batches[k] + 1) * size):
            image, label = self.transform(int(seeds[place]), *self.images[int(batch[place])])
            images.append(image)
            labels.append(label)
        return torch.stack(images), torch.stack(labels)


def endless(drawn: MicroBatches, start: int, workers: int, device: torch.device) -> Iterator:
    """Yields micro-batches from batch `start` on: image, RGB float in [0,1], and label, int64."""
    cuda = device.type == "cuda"
    numbers = itertools.count(start * len(drawn.micro_batches))
    for image, label in loader(drawn, workers, batch_size=None, sampler=numbers, pin_memory=cuda):
        image = image.to(device, non_blocking=True).float().div_(255)
        if cuda:
            image = image.contiguous(memory_format=torch.channels_last)
        yield image, label.to(device, non_blocking=True).long()


def loader(dataset: Dataset, workers: int, **options) -> DataLoader:
    """A DataLoader whose processes ignore signals: the main process decides when to stop."""
    return DataLoader(dataset, num_workers=workers, worker_init_fn=_ignore_signals, **options)


def _ignore_signals(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
