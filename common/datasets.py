"""Data sets of images and label maps, the choice of labeled images, endless batches.

Everywhere here an image is RGB uint8 (3,H,W) and a label uint8 (H,W): 0..K-1, or 255 for void.
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

warnings.filterwarnings("ignore", module="PIL")  # of odd palettes and large photographs
_LARGE = 2**20  # pixels of an image that is worth a cache
_STREETS = {"train": 800, "val": 200}  # scenes
# What the flags --labeled and --weights are where they are not given.
DEFAULTS = {
    "cityscapes": {"labeled": "1/8", "weights": "imagenet"},
    "voc": {"labeled": "1/8", "weights": "imagenet"},
    "streets": {"labeled": "32", "weights": "none"},
    "camvid": {"labeled": "30", "weights": "imagenet"},
    "bdd100k": {"labeled": "1/8", "weights": "imagenet"},
    "folder": {"labeled": "1.0", "weights": "imagenet"},
}


class Images(Dataset):
    """One part of a data set on disk, sorted by name: [i] -> image, label.

    Both are resized to size (height, width) where it is given, the image by PIL's antialiased
    bilinear filter, the label by its nearest; full_labels leaves the label at its own size. An
    image without a label file gets an all-void one. prepare() may make a cache in cache_dir.
    """

    def __init__(
        self,
        files: dict,
        label_table: np.ndarray,
        size: tuple | None,
        full_labels: bool,
        cache_dir: Path,
    ):
        self.names = sorted(files)
        self.files = [files[name] for name in self.names]
        self.has_label = [label is not None for _, label in self.files]
        self.label_table, self.size, self.full_labels = label_table, size, full_labels
        sizes = {_check_pair(image, label) for image, label in self.files}
        # Whether items can be stacked into a batch.
        self.same_size = len(sizes) == 1 or (size is not None and not full_labels)
        resized = size is not None and not full_labels and sizes != {tuple(size[::-1])}
        large = max(width * height for width, height in sizes) >= _LARGE
        self.cache_dir, self.cache = cache_dir if resized and large else None, None

    def prepare(self, *, build: bool = True) -> None:
        """Use the cache; build: decode large images that are to be resized if it is not there."""
        if self.cache_dir is None:
            return
        sources = [path for pair in self.files for path in pair if path is not None]
        settings = (self.size, self.label_table.tolist())
        place = self.cache_dir / cache.key(self.cache_dir, sources, settings)
        # What more have ready does not fit in the 64 MB of shared memory that containers have.
        options = {"num_workers": min(16, os.cpu_count() or 1, len(self)), "prefetch_factor": 1}
        # They end themselves when this process is killed, unlike those of a process pool.
        items = DataLoader(self, None, **options, worker_init_fn=start_worker)
        there = cache.build(place, len(self), items) if build else cache.is_sound(place)
        self.cache = place if there else None
        self.cache_dir = None  # once, even if it cannot be written

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            arrays = cache.read(self.cache, index)
        else:
            arrays = _decode(self.files[index], self.label_table, self.size, self.full_labels)
        return tuple(map(torch.from_numpy, arrays))


class Scenes(Images):
    """The drawn streets, held in memory; otherwise as Images."""

    def __init__(self, part: str, size: tuple[int, int]):
        count, seed = _STREETS[part], list(_STREETS).index(part)
        self.names = [f"{part}_{index:05d}" for index in range(count)]
        self.files = [(Path(name), None) for name in self.names]
        self.has_label, self.same_size, self.cache_dir = [True] * count, True, None
        drawn = [streets.draw(seed, index, size) for index in range(count)]
        images, labels = (torch.from_numpy(np.stack(maps)) for maps in zip(*drawn, strict=True))
        self.images, self.labels = images.movedim(3, 1).contiguous(), labels

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@dataclass(frozen=True)
class Data:
    """A data set: its parts, class names and colours (RGB 0-255), one per class."""

    train: Images
    val: Images
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    test: Images | None = None

    @property
    def num_classes(self) -> int:
        """K, void not counted."""
        return len(self.class_names)

    def scored(self, part: str | None) -> tuple[str, Images]:
        """Name and images of what is evaluated: the part asked for, else test if there is one."""
        part = part or ("val" if self.test is None else "test")
        if getattr(self, part) is None:
            raise InputError(f"--evaluate-split {part}: the data set has no such part here")
        return part, getattr(self, part)


def open_dataset(
    name: str, data_dir: str | Path | None, *, size: tuple | None = None, full_labels: bool = False
) -> Data:
    """Open "streets" or a data set of common/layouts.py; check every file's header.

    size (height, width) is what images and labels are resized to, None leaves them. full_labels
    keeps the labels of val and test at their own size. InputError names the first bad file.
    """
    if name == "streets":
        parts = {part: Scenes(part, size or (64, 128)) for part in _STREETS}
        return Data(**parts, class_names=streets.CLASS_NAMES, palette=streets.PALETTE)
    if name not in layouts.FILES:
        raise InputError(f"--dataset {name}: is none of streets, {', '.join(layouts.FILES)}")
    root = Path(data_dir or Path("data") / name)
    if not root.is_dir():
        raise InputError(f"--data-dir {root}: no such folder")
    files, table, class_names, palette = layouts.FILES[name](root)
    if empty := [part for part in files if not files[part]]:
        raise InputError(f"--data-dir {root}: no {empty[0]} image has a label")
    cache_dir = root / ".cache-{}x{}".format(*(size or (0, 0)))
    parts = {
        part: Images(pairs, table, size, full_labels and part != "train", cache_dir / part)
        for part, pairs in files.items()
    }
    counts = {part: len(images) for part, images in parts.items()}
    published = {p: n for p, n in layouts.COUNTS.get(name, counts).items() if p in counts}
    if counts != published:
        names = [Path(name).name for images in parts.values() for name in images.names]
        groups = layouts.GROUPS.get(name, ())
        absent = [group for group in groups if not any(n.startswith(f"{group}_") for n in names)]
        none = f"; none of {', '.join(absent)}" if absent else ""
        warn(f"--data-dir {root}: images are {counts}, published are {published}{none}")
    return Data(**parts, class_names=tuple(class_names), palette=tuple(palette))


def _decode(files: tuple, label_table: np.ndarray, size: tuple | None, full_labels: bool = False):
    """Image and label, uint8 (3,H,W) and (H,W), of their files, as in Images."""
    image_path, label_path = files
    image = read_image(image_path)  # not turned as its EXIF says: the label has none and would not
    if label_path is None:
        label = Image.new("L", image.size, VOID)
    else:
        label = Image.fromarray(_read_label(label_path, label_table))
    if label.size != image.size:
        raise InputError(f"{label_path}: {label.size} pixels, but its image has {image.size}")
    if size is not None:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        if not full_labels:
            label = label.resize(size[::-1], Image.Resampling.NEAREST)
    return np.array(image).transpose(2, 0, 1).copy(), np.array(label)


def _check_pair(image_path: Path, label_path: Path | None) -> tuple[int, int]:
    """Width and height, from the headers; InputError if these are unreadable or do not fit."""
    size = _open(image_path).size
    if label_path is not None and label_path.suffix == ".mat":
        with label_path.open("rb") as file:  # its size takes too long to read here
            if file.read(10) != b"MATLAB 5.0":
                raise InputError(f"{label_path}: an empty file or not one of MATLAB 5")
    elif label_path is not None:
        label = _open(label_path)
        # Pillow stretches grey values of fewer bits to 0-255; ids must be read as they are.
        stretched = label.mode not in ("L", "P") or label.tile[0][3] in ("L;2", "L;4")
        if label.format != "PNG" or stretched:  # a JPEG has other ids than what it was made of
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
    """An image file as RGB. InputError where it is damaged or has more than 8 bits a channel."""
    image = _open(path, decode=True)
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path}: more than 8 bits a channel; convert it to 8-bit RGB or grey")
    return image.convert("RGB")


def _read_label(path: Path, table: np.ndarray) -> np.ndarray:
    ids = _mat_ids(path) if path.suffix == ".mat" else np.asarray(_open(path, decode=True))
    label = table[ids]
    if (label == INVALID).any():
        wrong = ", ".join(map(str, np.unique(ids[label == INVALID])[:5]))
        known = np.flatnonzero(table != INVALID).tolist()
        raise InputError(f"{path}: label id {wrong} is none of {known}")
    return label


def _mat_ids(path: Path) -> np.ndarray:
    """The classes of SBD's file of an image, uint8 (H,W)."""
    try:
        ids = loadmat(path)["GTcls"][0, 0]["Segmentation"]
        with np.errstate(invalid="raise"):
            label = ids.astype(np.uint8)
        if not np.array_equal(ids, label):  # of another type, they may be more than whole 0-255
            raise ValueError
    except Exception as error:  # loadmat raises nearly any type on a damaged file
        raise InputError(f"{path}: a damaged file or not one of SBD's cls folder") from error
    return label


# ---- Labeled and unlabeled ----


def split(num_images: int, labeled, seed: int, *, unlabeled: str = "rest") -> tuple[list, list]:
    """Indices (into sorted names) of the labeled and of the unlabeled images.

    labeled is a count (int, or text without "." and "/") or a fraction of num_images (float,
    Fraction, "0.125", "1/8"), rounded half up. The labeled images are the first of the legacy
    numpy permutation of seed, so subsets are nested and the same on every machine. The unlabeled
    ones are the rest, or all images with unlabeled="all" and where all are labeled.
    """
    count = _count(num_images, labeled)
    order = np.random.RandomState(seed).permutation(num_images).tolist()
    everything = unlabeled == "all" or count == num_images
    return sorted(order[:count]), sorted(order if everything else order[count:])


def _count(num_images: int, labeled: str | float | int) -> int:
    text = str(labeled)
    try:
        share = Fraction(text) if "." in text or "/" in text else Fraction(int(text), num_images)
    except (ValueError, ZeroDivisionError) as error:
        hint = "give a count, or a fraction as 0.125 or 1/8"
        raise InputError(f"--labeled {text}: {hint}") from error
    count = math.floor(share * num_images + Fraction(1, 2))
    if num_images == 2975 and share == Fraction(1, 30):
        count = 100  # of Cityscapes, as every paper counts it
    if not 1 <= count <= num_images:
        raise InputError(f"--labeled {text}: {count}; it must be 1 to {num_images} here")
    return count


def select(train: Images, args, *, batch_size: int, unlabeled: str = "rest") -> tuple[list, list]:
    """Indices of the labeled and of the unlabeled training images that the flags ask for.

    By args.labeled and args.split_seed as split does it, over the images that have labels, or by
    args.labeled_list, each of whose lines is a name or path with or without folders and suffix (of
    two columns, the first). Images without a label are always unlabeled.
    """
    able = [index for index, has_label in enumerate(train.has_label) if has_label]
    if not able:
        raise InputError("--data-dir: no training image has a label")
    if args.checkpoint is not None:
        chosen = _those_of(args.checkpoint, train)
    elif args.labeled_list is None:
        chosen = [able[k] for k in split(len(able), args.labeled, args.split_seed)[0]]
    else:
        chosen = _listed(train, Path(args.labeled_list))
    rest = sorted(set(range(len(train))) - set(chosen))
    rest = rest if rest and unlabeled == "rest" else list(range(len(train)))
    if not args.supervised and len(rest) < batch_size:
        raise InputError(f"--batch-size {batch_size}: there are only {len(rest)} unlabeled images")
    return chosen, rest


def _those_of(checkpoint: dict, train: Images) -> list[int]:
    names = checkpoint["labeled_names"]
    if checkpoint["training_images"] != len(train) or not set(names) <= set(train.names):
        raise InputError("--resume: the training images are not those of the checkpoint")
    return sorted(map(train.names.index, names))


def _listed(train: Images, path: Path) -> list[int]:
    if not path.is_file():
        raise InputError(f"--labeled-list {path}: no such file")
    by_name = defaultdict(list)
    for index, name in enumerate(train.names):
        for known in {Path(name).name, train.files[index][0].stem}:
            by_name[known].append(index)
    by_name |= {name: [index] for index, name in enumerate(train.names)}
    chosen = set()
    for line in read_lines(path):
        paths = [Path(line), Path(line.split()[0])]
        candidates = paths + [p.parent / p.stem for p in paths] + [p.stem for p in paths]
        found = next((by_name[str(name)] for name in candidates if str(name) in by_name), [])
        if len(found) != 1 or not train.has_label[found[0]]:
            problems = {0: "not a training image", 1: "an image without a label"}
            problem = problems.get(len(found), "the name of several training images")
            raise InputError(f"--labeled-list {path}: {line}: {problem}")
        chosen.update(found)
    if not chosen:
        raise InputError(f"--labeled-list {path}: lists no image")
    return sorted(chosen)


# ---- Batches ----


@dataclass(frozen=True)
class Batches(Dataset):
    """[t] -> batch t: image uint8 (B,3,H,W), label uint8 (B,H,W), by (seed, stream, t) alone.

    Each item goes through transform(seed, image, label). Each epoch is a new permutation of indices
    without its ragged last batch; fewer images than a batch repeat within it. With replacement each
    index is drawn from all. Of several processes each gets its part, as long as the others'.
    """

    images: Images
    indices: list[int]
    batch_size: int
    transform: Callable
    seed: int
    stream: int
    replacement: bool = False
    part: int = 0
    parts: int = 1

    def __post_init__(self):
        self.images.prepare()

    def __getitem__(self, t: int) -> tuple[Tensor, Tensor]:
        draw = np.random.default_rng
        if self.replacement:
            batch = draw((self.seed, self.stream, t)).choice(self.indices, self.batch_size)
        else:
            epoch, k = divmod(t, max(len(self.indices) // self.batch_size, 1))
            order = draw((self.seed, self.stream, epoch)).permutation(self.indices)
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
        batch = np.resize(batch, self.batch_size).tolist()  # repeats what is too short
        seeds = np.random.SeedSequence((self.seed, self.stream, t)).generate_state(len(batch))
        mine = slice(self.part * self.batch_size // self.parts, None)
        pairs = list(zip(batch, seeds.tolist(), strict=True))[mine][: self.batch_size // self.parts]
        items = [self.transform(seed, *self.images[index]) for index, seed in pairs]
        return tuple(torch.stack(tensors) for tensors in zip(*items, strict=True))


def endless(batches: Batches, start: int, workers: int, device: torch.device) -> Iterator:
    """Batches from start on: RGB float in [0,1] (B,3,H,W), label int64 (B,H,W), on the device."""
    cuda = device.type == "cuda"
    options = {"num_workers": workers, "pin_memory": cuda, "worker_init_fn": start_worker}
    loader = DataLoader(batches, batch_size=None, sampler=itertools.count(start), **options)
    for image, label in loader:
        image = image.to(device, non_blocking=True).float().div_(255)
        if cuda:
            image = image.contiguous(memory_format=torch.channels_last)
        yield image, label.to(device, non_blocking=True).long()


def start_worker(_: int) -> None:
    """Signals reach the whole process group: the main process saves, workers must live on."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not what the main process does at one
