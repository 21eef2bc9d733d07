"""Decoded and resized images on disk, so that large images are decoded only once.

A cache is one file, DIR/KEY.npy, uint8 (N,4,H,W): red, green, blue and label.
"""

import hashlib
import os
import uuid
from pathlib import Path

import numpy as np


def key(folder: Path, sources: list[Path], settings) -> str:
    """Returns a hash that changes whenever the settings or any source file change."""
    stats = [(os.path.relpath(path, folder), path.stat()) for path in sources]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    version = 2  # raise this when decoding or resizing gives other pixels
    return hashlib.sha256(repr((version, settings, files)).encode()).hexdigest()[:16]


def read(path: Path, index: int) -> np.ndarray:
    """Returns one image and its label, (4,H,W)."""
    return np.load(path, mmap_mode="r")[index].copy()


def is_sound(path: Path) -> bool:
    """Whether the file exists and has the length that its header states."""
    try:
        return read(path, 0) is not None
    except Exception:  # np.load raises nearly any type on a damaged file
        return False


def build(path: Path, count: int, items) -> None:
    """Writes count pairs of image and label to DIR/KEY.npy and removes all else from DIR."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(uuid.uuid4().hex)  # a killed run must not leave half a cache
    try:
        with partial.open("wb") as file:
            for done, (image, label) in enumerate(items, 1):
                if done == 1:
                    shape = (count, 4, *label.shape)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.asarray(image).tobytes() + np.asarray(label).tobytes())
                if done % 50 == 0 or done == count:
                    print(f"\rdecoding, once: {done}/{count} images", end="", flush=True)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure could leave zeros
        print(f", to {path}")
        if not is_sound(path):  # else another run was faster
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    for other in set(path.parent.iterdir()) - {path}:
        other.unlink(missing_ok=True)
