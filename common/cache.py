"""Decoded and resized images in files, so that large ones are decoded only once.

DIR/KEY/{images,labels}.npy, uint8 (N,3,H,W) and (N,H,W); KEY is a hash of what they were made of.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from common import warn

_VERSION = 1  # of the code that decodes and resizes: to be raised when its pixels change
_NAMES = ("images", "labels")


def key(folder: Path, sources: list[Path], settings) -> str:
    """Another one when settings or the place, size or time of a source have changed."""
    stats = [(os.path.relpath(path, folder), path.stat()) for path in sources]
    made_of = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(repr((_VERSION, settings, made_of)).encode()).hexdigest()[:16]


def build(place: Path, count: int, items: Iterable) -> bool:
    """Have this count of items in DIR/KEY, made by one run at a time; others in DIR are removed.

    False, with a warning, where it cannot be written.
    """
    folder = place.parent
    try:
        if not is_sound(place):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_name(f"{folder.name}.lock")):
                if not is_sound(place):  # else another run has made it meanwhile
                    for old in folder.iterdir():
                        _remove(old)
                    _write(place, items, count)
    except OSError as error:
        if not is_sound(place):
            warn(f"no cache, which slows training down: cannot write {place} ({error})")
    return is_sound(place)


def is_sound(place: Path) -> bool:
    """Whether both files are there and as long as they say."""
    try:
        _arrays(place)
    except Exception:  # np.load raises nearly any type on a damaged file
        return False
    return True


def read(place: Path, index: int) -> tuple[np.ndarray, ...]:
    """One item, from memory-mapped files."""
    return tuple(array[index].copy() for array in _arrays(place)[0])


@functools.cache
def _arrays(place: Path):
    """The arrays and a lock that says, as long as this process and its workers live: in use."""
    lock = (place / "images.npy").open("rb")
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH)
    return [np.load(place / f"{name}.npy", mmap_mode="r") for name in _NAMES], lock


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits while another process is in here; the kernel lets a killed one out."""
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # worker processes have the file open, too


def _try_lock(file) -> None:
    """BlockingIOError where another process reads the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass


def _remove(old: Path) -> None:
    """What is stale, damaged or left by a killed run, unless another run reads it."""
    with suppress(OSError):
        if (old / "images.npy").is_file():
            with (old / "images.npy").open("r+b") as file:
                _try_lock(file)
        shutil.rmtree(old)


def _write(place: Path, items: Iterable, total: int) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent, suffix=".partial") as temporary:
        unfinished = Path(temporary) / place.name
        unfinished.mkdir()
        with (
            (unfinished / "images.npy").open("wb") as images,
            (unfinished / "labels.npy").open("wb") as labels,
        ):
            for done, arrays in enumerate(items, 1):
                for file, array in zip((images, labels), map(np.asarray, arrays), strict=True):
                    if done == 1:
                        header = np.lib.format.header_data_from_array_1_0(array)
                        header["shape"] = (total, *array.shape)
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(array.tobytes())
                if done % 50 == 0 or done == total:
                    end = "\n" if done == total else ""
                    progress = f"\rdecoding, once: {done}/{total} images, to {place}"
                    print(progress, end=end, flush=True)
            for file in (images, labels):  # or a power failure may leave a file of zeros
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, place)
