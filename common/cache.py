"""Decoded and resized images on disk, so that large images are decoded only once.

A cache is DIR/KEY with images.npy, uint8 (N,3,H,W), and labels.npy, uint8 (N,H,W).
"""

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_VERSION = 1  # raise this when decoding or resizing gives other pixels
_NAMES = ("images.npy", "labels.npy")


def key(folder: Path, sources: list[Path], settings) -> str:
    """Returns a hash that changes whenever the settings or any source file change."""
    files = []
    for path in sources:
        stat = path.stat()
        files.append((os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr((_VERSION, settings, files)).encode()).hexdigest()[:16]


def is_sound(place: Path) -> bool:
    """Whether both files of DIR/KEY exist and have the length that their headers state."""
    try:
        _arrays(place)
    except Exception:  # np.load raises nearly any type on a damaged file
        return False
    return True


def read(place: Path, index: int) -> list[np.ndarray]:
    """Returns one image and its label."""
    return [array[index].copy() for array in _arrays(place)]


@functools.cache
def _arrays(place: Path) -> list[np.ndarray]:
    return [np.load(place / name, mmap_mode="r") for name in _NAMES]


def build(place: Path, count: int, items: Iterable) -> None:
    """Writes count pairs of image and label into DIR/KEY and removes everything else in DIR.

    The pairs go into a temporary folder first, because a killed run must not leave half a cache.
    When two runs build the same cache at once, the first to finish wins.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / place.name
        folder.mkdir()
        _write(folder, count, items, place)
        if is_sound(place):
            return
        for other in place.parent.iterdir():
            if other != Path(temporary):
                shutil.rmtree(other, ignore_errors=True)
        os.rename(folder, place)


def _write(folder: Path, count: int, items: Iterable, place: Path) -> None:
    with (folder / _NAMES[0]).open("wb") as images, (folder / _NAMES[1]).open("wb") as labels:
        for done, pair in enumerate(items, 1):
            for file, array in zip((images, labels), map(np.asarray, pair), strict=True):
                if done == 1:
                    header = np.lib.format.header_data_from_array_1_0(array)
                    header["shape"] = (count, *array.shape)
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(array.tobytes())
            if done % 50 == 0 or done == count:
                end = "\n" if done == count else ""
                print(f"\rdecoding, once: {done}/{count} images, to {place}", end=end, flush=True)
        for file in (images, labels):  # otherwise a power failure could leave a file of zeros
            file.flush()
            os.fsync(file.fileno())
