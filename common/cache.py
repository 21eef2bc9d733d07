"""Decoded and resized images in files, so that large ones are decoded only once.

DIR/KEY/{images,labels}.npy, uint8 (N,3,H,W) and (N,H,W); KEY is a hash of what they were made of.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common import warn

_VERSION = 1  # of the code that decodes and resizes: to be raised when its pixels change
_NAMES = ("images", "labels")


def build(folder: Path, sources: list[Path], settings, count: int, items: Iterable) -> Path | None:
    """The folder below this one that holds the items, made of this count of them if not there.

    It is stale when settings or the place, size or time of a source have changed. None, with a
    warning, where it cannot be written.
    """
    stats = [(os.path.relpath(path, folder), path.stat()) for path in sources]
    made_of = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = hashlib.sha256(repr((_VERSION, settings, made_of)).encode()).hexdigest()[:16]
    place = folder / key
    if place.is_dir():
        if _sound(place):
            return place
        shutil.rmtree(place, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as temporary:
            unfinished = Path(temporary) / key
            _write(unfinished, items, count, place)
            if not place.is_dir():  # else another run was faster
                os.replace(unfinished, place)
    except OSError as error:
        if not place.is_dir():
            warn(f"no cache, which slows training down: cannot write {place} ({error})")
            return None
    for stale in folder.iterdir():
        if stale != place and stale.suffix != ".partial":
            shutil.rmtree(stale, ignore_errors=True)
    return place


def _write(folder: Path, items: Iterable, total: int, place: Path) -> None:
    folder.mkdir()
    for done, arrays in enumerate(items, 1):
        for name, array in zip(_NAMES, arrays, strict=True):
            with (folder / f"{name}.npy").open("ab") as file:
                if done == 1:
                    header = np.lib.format.header_data_from_array_1_0(array)
                    header["shape"] = (total, *array.shape)
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(array.tobytes())
        if done % 50 == 0 or done == total:
            end = "\n" if done == total else ""
            print(f"\rdecoding, once: {done}/{total} images, to {place}", end=end, flush=True)


def _sound(place: Path) -> bool:
    """Whether both files are there and as long as they say."""
    try:
        _arrays.__wrapped__(place)
    except (OSError, ValueError):
        return False
    return True


@functools.cache  # what is open stays readable when another run replaces the cache
def _arrays(place: Path) -> tuple[np.ndarray, ...]:
    return tuple(np.load(place / f"{name}.npy", mmap_mode="r") for name in _NAMES)


def read(place: Path, index: int) -> tuple[np.ndarray, ...]:
    """One item, from memory-mapped files."""
    return tuple(array[index].copy() for array in _arrays(place))
