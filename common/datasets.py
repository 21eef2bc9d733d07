"""Data sets of images and label maps, the choice of labeled images, endless batches.

Everywhere here an image is RGB uint8 (3,H,W) and a label uint8 (H,W): 0..K-1, or 255 for void.
"""

import itertools
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import InputError, streets

VOID = 255
_INVALID = 254  # in a table of label ids: an id that the data set does not have
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

# Names and colours of the SegNet version of CamVid; id 11 is void.
_CAMVID = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
_STREETS = {"train": 800, "val": 200}  # scenes
# What the flags --labeled and --weights are where they are not given.
DEFAULTS = {
    "cityscapes": {"labeled": "1/8", "weights": "imagenet"},
    "voc": {"labeled": "1/8", "weights": "imagenet"},
    "streets": {"labeled": "16", "weights": "none"},
    "camvid": {"labeled": "30", "weights": "imagenet"},
    "folder": {"labeled": "1.0", "weights": "imagenet"},
}


class Images(Dataset):
    """One part of a data set on disk, sorted by name: [i] -> image, label.

    Both are resized to size (height, width) where it is given, the image by PIL's antialiased
    bilinear filter, the label by its nearest; full_labels leaves the label at its own size. An
    image without a label file gets an all-void one.
    """

    def __init__(
        self,
        files: dict[str, tuple[Path, Path | None]],
        label_table: np.ndarray,
        size: tuple[int, int] | None = None,
        full_labels: bool = False,
    ):
        self.names = sorted(files)
        self.files = [files[name] for name in self.names]
        self.label_table = label_table
        self.size = size
        self.full_labels = full_labels
        sizes = {_check_pair(image, label) for image, label in self.files}
        # Whether items can be stacked into a batch.
        self.same_size = len(sizes) == 1 or (size is not None and not full_labels)

    def __len__(self) -> int:
        return len(self.names)

    def has_label(self, index: int) -> bool:
        """Whether the image has a label file."""
        return self.files[index][1] is not None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, label_path = self.files[index]
        image = read_image(image_path)
        if label_path is None:
            label = Image.new("L", image.size, VOID)
        else:
            label = Image.fromarray(_read_label(label_path, self.label_table))
        if self.size is not None:
            width_height = self.size[::-1]
            image = image.resize(width_height, Image.Resampling.BILINEAR)
            if not self.full_labels:
                label = label.resize(width_height, Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels, torch.from_numpy(np.array(label))


class Scenes(Dataset):
    """The drawn streets, held in memory; otherwise as Images."""

    def __init__(self, part: str, size: tuple[int, int]):
        self.names = [f"{part}_{index:05d}" for index in range(_STREETS[part])]
        self.same_size = True
        seed = list(_STREETS).index(part)
        drawn = [streets.draw(seed, index, size) for index in range(len(self.names))]
        self.images = torch.from_numpy(np.stack([image for image, _ in drawn])).movedim(3, 1)
        self.images = self.images.contiguous()
        self.labels = torch.from_numpy(np.stack([label for _, label in drawn]))

    def __len__(self) -> int:
        return len(self.names)

    def has_label(self, index: int) -> bool:
        """Every scene has one."""
        return True

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@dataclass(frozen=True)
class Data:
    """A data set: its parts, class names and colours (RGB 0-255), one per class."""

    train: Images | Scenes
    val: Images | Scenes
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    test: Images | Scenes | None = None

    @property
    def num_classes(self) -> int:
        """K, void not counted."""
        return len(self.class_names)


def open_dataset(
    name: str,
    data_dir: str | Path | None,
    *,
    size: tuple[int, int] | None = None,
    full_labels: bool = False,
) -> Data:
    """Open "streets", "camvid" or "folder"; check every file's header.

    size (height, width) is what images and labels are resized to, None leaves them. full_labels
    keeps the labels of val and test at their own size. InputError names the first bad file.
    """
    if name == "streets":
        size = size or (64, 128)
        parts = {part: Scenes(part, size) for part in _STREETS}
        return Data(**parts, class_names=streets.CLASS_NAMES, palette=streets.PALETTE)
    openers = {"camvid": _camvid_files, "folder": _folder_files}
    if name not in openers:
        raise InputError(f"--dataset {name}: can be read so far: streets, {', '.join(openers)}")
    root = Path(data_dir or Path("data") / name)
    if not root.is_dir():
        raise InputError(f"--data-dir {root}: no such folder")
    files, table, class_names, palette = openers[name](root)
    parts = {
        part: Images(pairs, table, size, full_labels and part != "train")
        for part, pairs in files.items()
    }
    return Data(**parts, class_names=tuple(class_names), palette=tuple(palette))


def _camvid_files(root: Path):
    """SegNet's layout: {train,val,test}/NAME.png (or JPEG), {train,val,test}annot/NAME.png."""
    root = root / "CamVid" if (root / "CamVid" / "train").is_dir() else root
    parts = ["train", "val"] + ["test"] * (root / "test").is_dir()
    files = {part: _pairs(root / part, root / f"{part}annot") for part in parts}
    table = _table({**{i: i for i in range(len(_CAMVID))}, 11: VOID})
    return files, table, _CAMVID.keys(), _CAMVID.values()


def _folder_files(root: Path):
    """images/{train,val}, labels/{train,val} paired by stem (sub-folders too), classes.txt."""
    listed = root / "classes.txt"
    if not listed.is_file():
        raise InputError(f"{listed}: missing; it lists the class names, one a line, id 0 first")
    class_names = list(filter(None, map(str.strip, listed.read_text("utf-8").splitlines())))
    if not 2 <= len(class_names) < _INVALID:
        raise InputError(f"{listed}: {len(class_names)} classes; 2 to {_INVALID - 1} are possible")
    files = {
        part: _pairs(root / "images" / part, root / "labels" / part, unlabeled=part == "train")
        for part in ("train", "val")
    }
    table = _table({i: i for i in range(len(class_names))})
    return files, table, class_names, voc_palette(len(class_names))


def _pairs(images: Path, labels: Path, *, unlabeled: bool = False) -> dict:
    """Name (path without suffix) -> image and label path; unlabeled: or None for the label."""
    image_of, label_of = _by_stem(images, _IMAGE_SUFFIXES), _by_stem(labels, (".png",))
    for name in sorted(label_of.keys() ^ image_of.keys()):
        if name in label_of or not unlabeled:
            alone, other = (label_of, images) if name in label_of else (image_of, labels)
            raise InputError(f"{alone[name]}: no file of the same name in {other}")
    return {name: (image_of[name], label_of.get(name)) for name in image_of}


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files below folder with one of the suffixes, by their path without it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise InputError(f"{path}: {found[stem].name} beside it has the same name")
            found[stem] = path
    if not found:
        state = f"holds no {', '.join(suffixes)} file" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {state}")
    return found


def _table(train_ids: dict[int, int]) -> np.ndarray:
    """(256,) uint8: id in the file -> training id; 255 is void in every data set."""
    table = np.full(256, _INVALID, np.uint8)
    table[VOID] = VOID
    table[list(train_ids)] = list(train_ids.values())
    return table


def voc_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Pascal VOC's colour for each class id: its bits spread over red, green and blue."""
    return [
        tuple(sum((i >> (3 * bit + c) & 1) << (7 - bit) for bit in range(8)) for c in range(3))
        for i in range(num_classes)
    ]


def _check_pair(image_path: Path, label_path: Path | None) -> tuple[int, int]:
    """Width and height, from the headers; InputError if they cannot be read or differ."""
    size = _open(image_path).size
    if label_path is not None and (label_size := _open(label_path).size) != size:
        raise InputError(f"{label_path}: {label_size} pixels, but {image_path.name} has {size}")
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
    # Pillow stretches grey values of fewer bits to 0-255; ids must be read as they are.
    stretched = _open(path).tile[0][3] in ("L;2", "L;4")
    image = _open(path, decode=True)
    if image.mode not in ("L", "P") or stretched:
        raise InputError(f"{path}: a label is an 8-bit grey or palette PNG of class ids")
    ids = np.asarray(image)
    label = table[ids]
    if (label == _INVALID).any():
        wrong = ", ".join(map(str, np.unique(ids[label == _INVALID])[:5]))
        known = np.flatnonzero(table < _INVALID).tolist()
        raise InputError(f"{path}: label id {wrong} is none of {known} and not void, {VOID}")
    return label


# ---- Labeled and unlabeled ----


def split(
    num_images: int, labeled: str | float | int, seed: int, *, unlabeled: str = "rest"
) -> tuple[list[int], list[int]]:
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
        if "." in text or "/" in text:
            count = math.floor(Fraction(text) * num_images + Fraction(1, 2))
            if num_images == 2975 and Fraction(text) == Fraction(1, 30):
                count = 100  # of Cityscapes, as every paper counts it
        else:
            count = int(text)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"--labeled {text}: give a count, or a fraction as 0.125 or 1/8"
        ) from error
    if not 1 <= count <= num_images:
        raise InputError(f"--labeled {text}: {count}; it must be 1 to {num_images} here")
    return count


def select(
    train: Images | Scenes, args, *, batch_size: int, unlabeled: str = "rest"
) -> tuple[list[int], list[int]]:
    """Indices of the labeled and of the unlabeled training images that the flags ask for.

    By args.labeled and args.split_seed as split does it, over the images that have labels, or by
    args.labeled_list, each of whose lines is a name or path with or without folders and suffix (of
    two columns, the first). Images without a label are always unlabeled.
    """
    able = [index for index in range(len(train)) if train.has_label(index)]
    if not able:
        raise InputError("--data-dir: no training image has a label")
    if args.labeled_list is None:
        chosen = [able[k] for k in split(len(able), args.labeled, args.split_seed)[0]]
    else:
        chosen = _listed(train, Path(args.labeled_list), set(able))
    rest = sorted(set(range(len(train))) - set(chosen))
    rest = rest if rest and unlabeled == "rest" else list(range(len(train)))
    if not args.supervised and len(rest) < batch_size:
        raise InputError(f"--batch-size {batch_size}: there are only {len(rest)} unlabeled images")
    return chosen, rest


def _listed(train: Images | Scenes, path: Path, able: set[int]) -> list[int]:
    if not path.is_file():
        raise InputError(f"--labeled-list {path}: no such file")
    by_name = {name: index for index, name in enumerate(train.names)}
    by_name.update({Path(name).name: index for name, index in by_name.items()})
    chosen = set()
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
        candidates = [w for text in (line, line.split()[0]) for w in (text, Path(text).stem)]
        index = next((by_name[name] for name in candidates if name in by_name), None)
        if index is None or index not in able:
            problem = "not a training image" if index is None else "an image without a label"
            raise InputError(f"--labeled-list {path}: {line}: {problem}")
        chosen.add(index)
    if not chosen:
        raise InputError(f"--labeled-list {path}: lists no image")
    return sorted(chosen)


# ---- Batches ----


@dataclass(frozen=True)
class _Transformed(Dataset):
    """(index, seed) -> image and label through a random transform."""

    images: Images | Scenes
    transform: Callable

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = key
        return self.transform(seed, *self.images[index])


@dataclass(frozen=True)
class _Keys:
    """The batch sampler of endless: lists of (index, seed)."""

    indices: list[int]
    batch_size: int
    seed: int
    stream: int
    start: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = max(len(self.indices) // self.batch_size, 1)
        for t in itertools.count(self.start):
            epoch, k = divmod(t, per_epoch)
            order = np.random.default_rng((self.seed, self.stream, epoch)).permutation(self.indices)
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
            batch = np.resize(batch, self.batch_size).tolist()  # repeats what is too short
            seeds = np.random.SeedSequence((self.seed, self.stream, t)).generate_state(len(batch))
            yield list(zip(batch, seeds.tolist(), strict=True))


def endless(
    images: Images | Scenes,
    indices: list[int],
    batch_size: int,
    transform: Callable,
    *,
    seed: int,
    stream: int,
    start: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches start, start + 1, ... for ever: RGB float in [0,1] (B,3,H,W), int64 (B,H,W).

    transform(seed, image, label) runs in the loader. Batch t depends on (seed, stream, t) alone.
    Each epoch is a new permutation without its ragged last batch; fewer images than a batch repeat
    within it.
    """
    loader = DataLoader(
        _Transformed(images, transform),
        batch_sampler=_Keys(indices, batch_size, seed, stream, start),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    for image, label in loader:
        image = image.to(device, non_blocking=True).float().div_(255)
        if device.type == "cuda":
            image = image.contiguous(memory_format=torch.channels_last)
        yield image, label.to(device, non_blocking=True).long()


def _start_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: the main process saves, workers must live on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
