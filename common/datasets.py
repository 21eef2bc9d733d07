"""Data sets of images and labels, the choice of labeled images, endless batches.

In this file an image is RGB uint8 (3,H,W) and a label uint8 (H,W): 0..K-1, or 255 for void.
"""

import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from common import InputError, cache, layouts, streets, warn
from common.layouts import VOID, check_pair, check_palettes, read_image, read_label, read_lines

SILENCE = 60  # seconds without data after which a run stops waiting for its loader processes
waiting: list[float] = []  # holds the start of the current wait for data; else empty
# Defaults of the flags --labeled and --weights.
DEFAULTS = {name: {"labeled": "1/8", "weights": "imagenet"} for name in layouts.FILES}
DEFAULTS["camvid"]["labeled"], DEFAULTS["folder"]["labeled"] = "30", "1.0"
DEFAULTS["streets"] = {"labeled": "32", "weights": "none"}


class Images(Dataset):
    """One part of a data set on disk, sorted by name: images[i] -> image, label.

    files maps a name to the paths of image and label; without a label, all pixels are void. With a
    size (height, width), images are resized (antialiased), and labels too (nearest pixel) unless
    full_labels is set.
    """

    def __init__(self, files: dict, label_table: np.ndarray, size, full_labels, cache_dir: Path):
        self.names = sorted(files)
        self.files = [files[name] for name in self.names]
        self.has_label = [label is not None for _, label in self.files]
        self.label_table = label_table
        self.size = None if size is None else size[::-1]  # as PIL has it: width, height
        self.label_size = None if full_labels else self.size
        checked = [check_pair(image, label) for image, label in self.files]
        check_palettes(self.files, [palette for _, palette in checked], label_table)
        sizes = {size for size, _ in checked}
        self.same_size = self.label_size is not None or len(sizes) == 1  # as a batch needs it
        large = self.label_size is not None and max(w * h for w, h in sizes) >= 2**20
        self.cache: Path | None = None  # folder of decoded images
        if large and sizes != {self.size}:
            sources = [path for pair in self.files for path in pair if path is not None]
            self.cache = cache.folder(cache_dir, sources, (self.size, label_table.tolist()))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.cache is None:
            return self._decode(index)
        path = self.cache / f"{index}.npy"
        try:
            pixels = torch.from_numpy(np.load(path))
        except Exception:  # not there yet, or damaged, for which np.load raises nearly any type
            image, label = self._decode(index)
            pixels = torch.cat([image, label[None]])
            try:
                cache.write(path, partial(np.save, arr=pixels.numpy()), f".{os.getpid()}.partial")
            except (InputError, OSError) as error:
                self.cache = None
                warn(f"no cache of decoded images, which makes training slower: {error}")
        return pixels[:3], pixels[3]

    def _decode(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, label_path = self.files[index]
        image = read_image(image_path)
        if label_path is None:
            image = ImageOps.exif_transpose(image)
            label = Image.new("L", image.size, VOID)
        else:
            label = read_label(label_path, self.label_table)
            image = image if image.size == label.size else ImageOps.exif_transpose(image)
        if label.size != image.size:
            raise InputError(f"{label_path}: {label.size} pixels, but its image has {image.size}")
        image = image.resize(self.size or image.size, Image.Resampling.BILINEAR)
        label = label.resize(self.label_size or label.size, Image.Resampling.NEAREST)
        return TF.pil_to_tensor(image).contiguous(), TF.pil_to_tensor(label)[0]


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
        if getattr(self, part) is None:
            raise InputError(f"--evaluate-split {part}: the data set has no such part here")
        return part, getattr(self, part)


def open_dataset(name: str, data_dir, *, size=None, full_labels: bool = False) -> Data:
    """Opens "streets" or a data set of common/layouts.py, whose files' headers it checks.

    Images get this size (height, width). full_labels keeps the labels of val and test as they are.
    """
    if name == "streets":
        if data_dir is not None:
            raise InputError("--data-dir: streets are rendered, not read; add --dataset folder?")
        train, val = (streets.Scenes(part, size or (64, 128)) for part in ("train", "val"))
        return Data(train, val, streets.CLASS_NAMES, streets.PALETTE)
    root = Path(data_dir or f"data/{name}")
    if not root.is_dir():
        raise InputError(f"--data-dir {root}: no such folder")
    files, table, class_names, palette = layouts.FILES[name](root)
    parts = {}
    for part, pairs in files.items():
        if not pairs:
            raise InputError(f"--data-dir {root}: no {part} image has a label; move some there?")
        cache_dir = root / ".cache-{}x{}".format(*(size or (0, 0))) / part
        parts[part] = Images(pairs, table, size, full_labels and part != "train", cache_dir)
    counts = {part: len(images) for part, images in parts.items()}
    if not counts.items() <= layouts.COUNTS.get(name, counts).items():
        warn(f"--data-dir {root}: images are {counts}, published are {layouts.COUNTS[name]}")
    return Data(**parts, class_names=tuple(class_names), palette=tuple(palette))


def split(num_images: int, labeled, seed: int, *, unlabeled: str = "rest") -> tuple[list, list]:
    """Returns the sorted indices of the labeled and of the unlabeled images.

    labeled is a count (32, "32") or a fraction (0.125, "1/8") of num_images, rounded half up. The
    subsets of a seed are nested. unlabeled is "rest" or "all". If all are labeled, it is "all".
    """
    text = str(labeled)
    try:
        share = Fraction(text) if "." in text or "/" in text else Fraction(int(text), num_images)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    count = int(share * num_images + Fraction(1, 2))
    if num_images == 2975 and share == Fraction(1, 30):
        count = 100  # as C3-SemiSeg and the published split count this share of Cityscapes
    if not 1 <= count <= num_images:
        raise InputError(f"--labeled {text}: give a count up to {num_images}, or a share like 1/8")
    order = np.random.RandomState(seed).permutation(num_images).tolist()
    rest = order if unlabeled == "all" or count == num_images else order[count:]
    return sorted(order[:count]), sorted(rest)


def select(train: Images, args, *, batch_size: int, unlabeled: str = "rest") -> tuple[list, list]:
    """Returns the indices of the labeled images, which the flags choose, and of the unlabeled ones.

    unlabeled: "rest", or "all" training images (CowMix).
    """
    if args.checkpoint is not None:
        labeled = _find(train, args.checkpoint["labeled_names"], "--resume")
        if changed := sorted(set(args.checkpoint["training_names"]) ^ set(train.names)):
            kind = f"{len(changed)} unlabeled images are new or gone, for example {changed[0]}"
            warn(f"--resume: {kind}: the run will not equal one without an interruption")
    elif args.labeled_list is not None:
        labeled = _find(train, read_lines(Path(args.labeled_list)), "--labeled-list")
    else:
        candidates = np.flatnonzero(train.has_label)
        chosen, _ = split(len(candidates), args.labeled, args.split_seed)
        labeled = candidates[chosen].tolist()
    rest = sorted(set(range(len(train))) - set(labeled))
    if unlabeled == "all" or not rest:
        rest = list(range(len(train)))
    if not args.supervised and len(rest) < batch_size:
        raise InputError(f"--batch-size {batch_size}: there are only {len(rest)} unlabeled images")
    return labeled, rest


def check_classes(train, labeled: list[int], class_names: tuple) -> None:
    """Warns of classes that the labeled images lack, and refuses fewer than two classes."""
    labels = (train[i][1] for i in labeled[:: len(labeled) // 1000 + 1])  # 1000 are enough
    count = sum(np.bincount(label.flatten(), minlength=256) for label in labels)
    lacking = [name for k, name in enumerate(class_names) if count[k] == 0]
    if len(lacking) > len(class_names) - 2:
        text = f"the labeled images hold only the ids {np.flatnonzero(count).tolist()}"
        raise InputError(f"{text} (255 is void): class ids begin with 0; is 255 your class 1?")
    if lacking:
        void = f"{100 * count[VOID] / count.sum():.1f}% of their pixels are void"
        warn(f"the labeled images have no pixel of {', '.join(lacking)}; {void}")


def _find(train: Images, lines: list[str], flag: str) -> list[int]:
    """Finds images by id or file name, with or without folders, suffix and a second column."""
    exact, short = {}, defaultdict(set)
    for index, (image, _) in enumerate(train.files):
        name = train.names[index]
        exact[name] = exact[name + image.suffix] = {index}
        for short_name in (image.stem, Path(name).name):
            short[short_name].add(index)
    known, labeled = short | exact, set()
    for line in lines:
        columns = (line, line.split()[0])  # a name may hold a blank
        names = (*columns, *(Path(text).stem for text in columns))
        found = next((known[name] for name in names if name in known), set())
        if len(found) != 1 or not train.has_label[min(found)]:
            raise InputError(f"{flag}: {line}: must name one training image that has a label")
        labeled |= found
    if not labeled:
        raise InputError(f"{flag}: lists no image")
    return sorted(labeled)


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """[m] -> the m-th micro-batch of this rank: image uint8 (B,3,H,W), label uint8 (B,H,W).

    A batch has `count` micro-batches; micro_batches are this rank's. Batch t depends only on (seed,
    stream, t). An epoch is a permutation of the indices, without its last incomplete batch. Fewer
    images than a batch are repeated.
    """

    images: Images
    indices: list[int]
    transform: Callable  # transform(seed, image, label), with a new seed for each image
    batch_size: int
    micro_batches: range
    count: int
    seed: int
    stream: int

    def __getitem__(self, m: int) -> list[Tensor]:
        t, k = divmod(m, len(self.micro_batches))
        epoch, place = divmod(t, max(len(self.indices) // self.batch_size, 1))
        order = np.random.default_rng((self.seed, self.stream, epoch)).permutation(self.indices)
        batch = np.resize(order[place * self.batch_size :][: self.batch_size], self.batch_size)
        seeds = np.random.SeedSequence((self.seed, self.stream, t)).generate_state(self.batch_size)
        places = np.arange(self.batch_size).reshape(self.count, -1)[self.micro_batches[k]]
        try:
            pairs = [self.transform(int(seeds[i]), *self.images[int(batch[i])]) for i in places]
        except InputError as error:
            raise InputError(f"{error} at step {t + 1}") from error
        return default_collate(pairs)


def endless(drawn: MicroBatches, start: int, workers: int, device: torch.device) -> Iterator:
    """Yields micro-batches from batch `start` on: image, RGB float in [0,1], and label, int64."""
    cuda = device.type == "cuda"
    numbers = itertools.count(start * len(drawn.micro_batches))
    for image, label in loader(drawn, workers, batch_size=None, sampler=numbers, pin_memory=cuda):
        image = image.to(device, non_blocking=True)
        image = image.to(torch.float32, memory_format=torch.channels_last).div_(255)
        yield image, label.to(device, non_blocking=True).long()


def loader(dataset: Dataset, workers: int, **options) -> Iterator:
    """Yields the batches of a DataLoader. Its processes leave signals to the main process.

    Batches loaded ahead take at most a quarter of this rank's shared memory (containers: 64 MB).
    """
    shared = shutil.disk_usage("/dev/shm").free if workers and Path("/dev/shm").exists() else 2**40
    shared //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if shared < 2**30:
        batch = sum(tensor.nbytes for tensor in dataset[0]) * (options["batch_size"] or 1)
        if (fitting := shared // 4 // batch) < 2 * workers:
            workers = min(workers, fitting)
            warn(f"{shared / 2**20:.0f} MB of shared memory allow {workers} loader processes")
            options |= {"prefetch_factor": 1 if workers else None}
    options |= {"worker_init_fn": _start_worker, "timeout": SILENCE if workers else 0}
    try:
        waiting[:], stall = [time.monotonic()], _say_stall(workers)
        for batch in DataLoader(dataset, num_workers=workers, **options):
            stall.cancel()
            waiting.clear()
            yield batch
            waiting[:], stall = [time.monotonic()], _say_stall(workers)
        waiting.clear()
    except (KeyboardInterrupt, RuntimeError) as error:
        for process in multiprocessing.active_children():
            process.terminate()  # torch would wait 5 seconds for each that hangs
        if isinstance(error, KeyboardInterrupt):
            raise
        # A process died or was silent for a minute. The last line is the error that it raised.
        lines = str(error).strip().splitlines()
        reason = " ".join(dict.fromkeys((lines[0], lines[-1])))  # torch says it once or twice
        raise InputError(f"loading images: {reason} (fewer --workers?)") from error
    finally:
        stall.cancel()


def _say_stall(workers: int) -> threading.Timer:
    """Returns a clock that warns of a long wait for data. With workers, the wait ends instead."""
    timer = threading.Timer(SILENCE, warn, [f"waiting for data for {SILENCE} s"])
    timer.daemon = True  # does not keep a program from ending
    if not workers:  # a thread should not run while a process forks
        timer.start()
    return timer


def _start_worker(_: int) -> None:
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()  # a signal to the process group does not reach this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # so that the main process can end it
