"""Where each data set keeps its images and labels, and what the ids in its labels mean.

FILES[name](folder) returns
- the files, {part: {name: (image path, label path or None)}};
- a table, (256,) uint8, from the id in a label file to the training id;
- the class names and their colours (RGB 0-255).
"""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets import Cityscapes

from common import InputError, warn

VOID = 255
INVALID = 254  # in a table: an id that the data set does not have
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
VOC_MASKS = 2913  # official masks of VOC 2012; a folder with more holds the augmented set
# Published number of images in each part.
COUNTS = {
    "cityscapes": {"train": 2975, "val": 500},
    "voc": {"train": 10582, "val": 1449},
    "camvid": {"train": 367, "val": 101, "test": 233},
    "bdd100k": {"train": 7000, "val": 1000},
}
CITYSCAPES = [c for c in Cityscapes.classes if c.train_id not in (-1, 255)]
CITYSCAPES_NAMES = [c.name for c in CITYSCAPES]
CITYSCAPES_COLORS = [c.color for c in CITYSCAPES]
CAMVID = {  # SegNet's version
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
VOC = """background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable,
dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor""".replace("\n", " ")


def _cityscapes_files(root: Path):
    """The official folders, with or without the archives' own, or images/ and segmentation/.

    Labels are *_labelIds.png, or *_labelTrainIds.png where more images have one. Those in
    segmentation/ are training ids. The test images have no public labels and are left out.
    """
    above = ["", "{}_trainvaltest/", "cityscapes/", "cityscapes/{}_trainvaltest/"]
    official = [folder.format("leftImg8bit") + "leftImg8bit/train" for folder in above]
    images = _first_folder(root, *official, "images/train", "cityscapes/images/train").parent
    if images.name == "images":
        labels, kinds = images.with_name("segmentation"), [""]
    else:
        places = [folder.format("gtFine") + "gtFine/train" for folder in above]
        labels, kinds = _first_folder(root, *places).parent, ["_labelTrainIds", "_labelIds"]
    counts = {kind: len(list(labels.rglob(f"*_gtFine{kind}.png"))) for kind in kinds}
    kind = max(kinds, key=counts.get)
    endings = ("_leftImg8bit.png", ".png"), (f"_gtFine{kind}.png",)
    files = {part: _pairs(images / part, labels / part, *endings) for part in ("train", "val")}
    if kind != "_labelIds":
        return files, _table(range(19)), CITYSCAPES_NAMES, CITYSCAPES_COLORS
    train_id = {c.id: c.train_id for c in CITYSCAPES}
    table = _table([train_id.get(label_id, VOID) for label_id in range(34)])
    table[VOID] = INVALID  # 255 does not occur in label ids; it shows training ids, misnamed
    return files, table, CITYSCAPES_NAMES, CITYSCAPES_COLORS


def _voc_files(root: Path):
    """VOC 2012 with SBD's labels: SegmentationClassAug, or the .mat files of SBD's archive.

    The training images are those of a train_aug list, or all that have a label, without the
    validation images. An official mask is preferred to SBD's.
    """
    places = ("JPEGImages", "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages")
    voc = _first_folder(root, *places).parent
    official = _by_stem(voc / "SegmentationClass", (".png",), required=False)
    augmented = _by_stem(voc / "SegmentationClassAug", (".png",), required=False)
    beside = [root.absolute(), *voc.absolute().parents[:2]]
    sbd = [folder / "benchmark_RELEASE" / "dataset" / "cls" for folder in beside]
    mats = {}
    for folder in filter(Path.is_dir, sbd):
        mats = _by_stem(folder, (".mat",))
    if not mats and not augmented and len(official) <= VOC_MASKS:
        tried = ", ".join(map(str, [voc / "SegmentationClassAug", *dict.fromkeys(sbd)]))
        raise InputError(f"{voc}: {len(official)} masks, but none of SBD's; tried {tried}")
    label_of = mats | augmented | official
    val = _listed(voc, "val")
    if val is None:
        raise InputError(f"{voc / 'ImageSets' / 'Segmentation' / 'val.txt'}: no such file")
    train = _listed(voc, "train_aug", "trainaug") or set(label_of)
    image_of = _by_stem(voc / "JPEGImages", IMAGE_SUFFIXES)
    for name in sorted(train | val):
        for kind, known in (("image", image_of), ("label", label_of)):
            if name not in known:
                raise InputError(f"{voc}: {name} has no {kind}")
    files = {
        "train": {name: (image_of[name], label_of[name]) for name in train - val},
        "val": {name: (image_of[name], label_of[name]) for name in val},
    }
    return files, _table(range(21)), VOC.split(", "), voc_palette(21)


def _listed(voc: Path, *names: str) -> set[str] | None:
    """Image ids of the first of these lists that exists; a line may hold paths instead of ids."""
    for name in names:
        for folder in ("Segmentation", "SegmentationAug"):
            path = voc / "ImageSets" / folder / f"{name}.txt"
            if path.is_file():
                ids = {Path(line.split()[0]).stem for line in read_lines(path)}
                if not ids:
                    raise InputError(f"{path}: lists no image")
                return ids
    return None


def _bdd100k_files(root: Path):
    """images/10k and labels/sem_seg/masks, or the older images and labels (*_train_id.png).

    Images without a mask and masks without an image are left out with a warning.
    """
    places = ["images/10k", "seg/images", "images"]
    places += [f"bdd100k/{place}" for place in places]
    images = _first_folder(root, *[f"{place}/train" for place in places]).parent
    labels = images.parent / "labels"
    if images.name == "10k":
        labels = images.parents[1] / "labels" / "sem_seg" / "masks"
    files = {}
    for part in ("train", "val"):
        image_of = _by_stem(images / part, IMAGE_SUFFIXES)
        label_of = _by_stem(labels / part, ("_train_id.png", ".png"))
        _warn_unpaired(image_of, label_of, "images without a mask")
        _warn_unpaired(label_of, image_of, "masks without an image")
        both = image_of.keys() & label_of.keys()
        files[part] = {name: (image_of[name], label_of[name]) for name in both}
    return files, _table(range(19)), CITYSCAPES_NAMES, CITYSCAPES_COLORS


def _warn_unpaired(path_of: dict, other: dict, problem: str) -> None:
    alone = sorted(path_of.keys() - other.keys())
    if alone:
        example = path_of[alone[0]]
        warn(f"{example.parent}: {problem}: {len(alone)} left out, for example {example.name}")


def _camvid_files(root: Path):
    """SegNet's layout: train, val and test, with the labels in trainannot, valannot, testannot."""
    root = _first_folder(root, "train", "CamVid/train").parent
    parts = [part for part in ("train", "val", "test") if (root / part).is_dir() or part != "test"]
    endings = IMAGE_SUFFIXES, (".png",)
    files = {part: _pairs(root / part, root / f"{part}annot", *endings) for part in parts}
    return files, _table([*range(11), VOID]), list(CAMVID), list(CAMVID.values())


def _folder_files(root: Path):
    """images/train, images/val, labels/train, labels/val (paired by name) and classes.txt."""
    listed = root / "classes.txt"
    if not listed.is_file():
        raise InputError(f"{listed}: missing; it lists the class names, one a line, id 0 first")
    names = read_lines(listed)
    if not 2 <= len(names) < INVALID:
        raise InputError(f"{listed}: {len(names)} classes; 2 to {INVALID - 1} are possible")
    files = {}
    for part in ("train", "val"):
        endings = IMAGE_SUFFIXES, (".png",)
        images, labels = root / "images" / part, root / "labels" / part
        files[part] = _pairs(images, labels, *endings, unlabeled=part == "train")
    return files, _table(range(len(names))), names, voc_palette(len(names) + 1)[1:]


FILES = {
    "cityscapes": _cityscapes_files,
    "voc": _voc_files,
    "camvid": _camvid_files,
    "bdd100k": _bdd100k_files,
    "folder": _folder_files,
}


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file, stripped, without the blank ones."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _first_folder(root: Path, *places: str) -> Path:
    """The first of these folders below root that exists."""
    for place in places:
        if (root / place).is_dir():
            return root / place
    raise InputError(f"no such folder; tried {', '.join(str(root / place) for place in places)}")


def _pairs(images: Path, labels: Path, image_endings, label_endings, *, unlabeled=False) -> dict:
    """Name without ending -> (image, label); with unlabeled=True the label may be None."""
    image_of = _by_stem(images, image_endings)
    label_of = _by_stem(labels, label_endings)
    for name in sorted(label_of.keys() - image_of.keys()):
        raise InputError(f"{label_of[name]}: no image of the same name in {images}")
    for name in sorted(image_of.keys() - label_of.keys()):
        if not unlabeled:
            raise InputError(f"{image_of[name]}: no label {labels / name}{label_endings[0]}")
    return {name: (path, label_of.get(name)) for name, path in image_of.items()}


def _by_stem(folder: Path, endings: tuple[str, ...], *, required: bool = True) -> dict[str, Path]:
    """Files below folder that have one of the endings, by their path without it."""
    found = {}
    for place, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            path = Path(place) / name
            relative = path.relative_to(folder).as_posix()
            ending = next((e for e in endings if name.lower().endswith(e.lower())), None)
            if ending is None or "/." in f"/{relative}":  # skips hidden files and folders
                continue
            stem = relative.removesuffix(relative[-len(ending) :])
            if stem in found:
                raise InputError(f"{path}: {found[stem].name} beside it has the same name")
            found[stem] = path
    if required and not found:
        state = f"holds no {', '.join(endings)} file" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {state}")
    return found


def _table(train_ids) -> np.ndarray:
    """(256,) uint8: id in the file -> training id, given for ids 0, 1, ...; 255 stays void."""
    table = np.full(256, INVALID, np.uint8)
    table[VOID] = VOID
    table[: len(train_ids)] = train_ids
    return table


def voc_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Pascal VOC's colours: the bits of a class id go in turn to red, green and blue."""
    palette = []
    for class_id in range(num_classes):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (class_id >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append(tuple(color))
    return palette
