"""Images and labels in files. Every error names the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from scipy.io import loadmat

from common import InputError
from common.layouts import INVALID

Image.MAX_IMAGE_PIXELS = None  # Pillow takes very large photographs for attacks


def check_pair(image_path: Path, label_path: Path | None) -> tuple[tuple, bytes | None]:
    """Reads the headers. Returns the width and height of both files, and the label's palette."""
    mode, size, orientation = _read(image_path, _describe)
    _check_mode(image_path, mode)
    turned = size[::-1] if orientation >= 5 else size
    if label_path is None:
        return turned, None
    if label_path.suffix == ".mat":
        with label_path.open("rb") as file:  # reading its size would take too long
            if file.read(10) != b"MATLAB 5.0":
                raise InputError(f"{label_path}: an empty file, or not a MATLAB 5 file")
        return size, None
    kind, tile, label_size, palette = _read(
        label_path, lambda label: (label.format, label.tile[0][3], label.size, label.palette)
    )
    # Pillow stretches grey values of fewer than 8 bits to 0-255, which changes the ids.
    mode = tile[0] if isinstance(tile, tuple) else tile
    if kind not in ("PNG", "BMP", "TIFF") or mode not in ("L", "P", "P;1", "P;2", "P;4"):
        raise InputError(f"{label_path}: a label is an 8-bit grey or palette PNG of class ids")
    if label_size not in (size, turned):
        raise InputError(f"{label_path}: {label_size} pixels, but {image_path.name} has {size}")
    if orientation > 1 and size == turned:
        raise InputError(f"{image_path}: EXIF turns it; turn its label too, and remove the tag")
    return label_size, palette and palette.palette


def _describe(image: Image.Image) -> tuple:
    """Returns mode, size and EXIF orientation. PNG would be decoded if it had to look for EXIF."""
    exif = image.getexif() if "exif" in image.info else {}
    return image.mode, image.size, exif.get(ExifTags.Base.Orientation, 1)


def check_palettes(files: list, palettes: list, table: np.ndarray) -> None:
    """Refuses palettes that give a class id different colours, because ids then differ, too."""
    used = 3 * np.count_nonzero(table < INVALID)
    given = [(files[k][1], palette[:used]) for k, palette in enumerate(palettes) if palette]
    for path, palette in given:
        if any(a != b for a, b in zip(palette, given[0][1], strict=False)):
            raise InputError(f"{path}: its palette is not that of {given[0][0]}; are ids the same?")


def read_image(path: Path, turn: Callable = lambda image: image) -> Image.Image:
    """Reads an image as RGB and turns it. InputError if it has more than 8 bits a channel."""
    mode, image = _read(path, lambda image: (image.mode, turn(image.convert("RGB"))))
    _check_mode(path, mode)
    return image


def _check_mode(path: Path, mode: str) -> None:
    if mode.startswith(("I", "F")):
        raise InputError(f"{path}: more than 8 bits a channel; convert it to 8-bit RGB or grey")


def read_label(path: Path, table: np.ndarray) -> Image.Image:
    known = np.flatnonzero(table != INVALID)
    ids, wrong = _read(path, lambda ids: (np.asarray(ids), np.setdiff1d(ids, known)))
    if len(wrong) > 0:
        raise InputError(f"{path}: label id {wrong[0]} is none of {known.tolist()}")
    return Image.fromarray(table[ids.astype(np.uint8)])


def _read(path: Path, use: Callable):
    """Returns use(image), or use(class ids) of a .mat file of SBD. Every error names the file."""
    try:
        if path.suffix == ".mat":
            return use(loadmat(path)["GTcls"][0, 0]["Segmentation"])
        with Image.open(path) as image:
            return use(image)
    except Exception as error:  # a damaged file raises nearly any type
        raise InputError(f"{path}: a damaged file, an empty file, no image ({error!r})") from error
