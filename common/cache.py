"""Decoded and resized images on disk, so that large images are decoded only once.

A cache is DIR/KEY with images.npy, uint8 (N,3,H,W), and labels.npy, uint8 (N,H,W).
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np


def key(folder: Path, sources: list[Path], settings) -> str:
    """Returns a hash that changes whenever the settings or any source file change."""
    stats = [(os.path.relpath(path, folder), path.stat()) for path in sources]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    version = 1  # raise this when decoding or resizing gives other pixels
    return hashlib.sha256(repr((version, settings, files)).encode()).hexdigest()[:16]


def read(place: Path, index: int) -> list[np.ndarray]:
    """Returns one image and its label from DIR/KEY."""
    arrays = [np.load(place / name, mmap_mode="r") for name in ("images.npy", "labels.npy")]
    return [array[index].copy() for array in arrays]


def is_sound(place: Path) -> bool:
    """Whether both files of DIR/KEY exist and have the length that their headers state."""
    try:
        return bool(read(place, 0))
    except Exception:  # np.load raises nearly any type on a damaged file
        return False


def build(place: Path, count: int, items) -> None:
    """Writes count pairs of image and label into DIR/KEY and removes everything else in DIR."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)  # a damaged cache
    with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / place.name  # a killed run must not leave half a cache
        folder.mkdir()
        _write(folder, count, items)
        print(f", to {place}")
        if not is_sound(place):  # else another run was faster
            folder.rename(place)
        for other in set(place.parent.iterdir()) - {Path(temporary), place}:
            shutil.rmtree(other, ignore_errors=True)


def _write(folder: Path, count: int, items) -> None:
    with (folder / "images.npy").open("wb") as images, (folder / "labels.npy").open("wb") as labels:
        for done, pair in enumerate(items, 1):
            for file, array in zip((images, labels), map(np.asarray, pair), strict=True):
                if done == 1:
                    head = {"descr": "|u1", "fortran_order": False, "shape": (count, *array.shape)}
                    np.lib.format.write_array_header_1_0(file, head)
                file.write(array.tobytes())
            if done % 50 == 0 or done == count:
                print(f"\rdecoding, once: {done}/{count} images", end="", flush=True)
        for file in (images, labels):  # otherwise a power failure could leave a file of zeros
            file.flush()
            os.fsync(file.fileno())
