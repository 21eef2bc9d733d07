"""Where each data set keeps its images and labels, and what the ids in its labels mean.

FILES[name](folder) -> {part: {name: (image path, label path or None)}}, a table (256,) uint8 from
the id in the file to the training id, class names, colours (RGB 0-255).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import InputError, warn

VOID = 255
INVALID = 254  # in a table of label ids: an id that the data set does not have
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_VOC_MASKS = 2913  # official ones; a folder of more holds the augmented set
# Images of each part, as published.
COUNTS = {
    "cityscapes": {"train": 2975, "val": 500},
    "voc": {"train": 10582, "val": 1449},
    "camvid": {"train": 367, "val": 101, "test": 233},
    "bdd100k": {"train": 7000, "val": 1000},
}
# Names and colours (hexadecimal RGB) by class id; CamVid's are those of its SegNet version.
_CAMVID = """sky 808080, building 800000, pole c0c080, road 804080, pavement 3c28de, tree 808000,
sign c08080, fence 404080, car 400080, pedestrian 404000, bicyclist 0080c0"""
_CITYSCAPES = """road 804080, sidewalk f423e8, building 464646, wall 66669c, fence be9999,
pole 999999, traffic light faaa1e, traffic sign dcdc00, vegetation 6b8e23, terrain 98fb98,
sky 4682b4, person dc143c, rider ff0000, car 00008e, truck 000046, bus 003c64, train 005064,
motorcycle 0000e6, bicycle 770b20"""
_CITIES = """aachen bochum bremen cologne darmstadt dusseldorf erfurt hamburg hanover jena krefeld
monchengladbach strasbourg stuttgart tubingen ulm weimar zurich frankfurt lindau munster"""
GROUPS = {"cityscapes": _CITIES.split()}  # with what the names of images begin, each of them
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)  # of 0-33 in labelIds.png
_VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor"""


def _cityscapes_files(root: Path):
    """leftImg8bit/PART/CITY/*.png, gtFine/PART/CITY/*_gtFine_label{TrainIds,Ids}.png.

    Or images/PART/*.png and segmentation/PART/*_gtFine.png, which are training ids. Of the others
    those ids are read that more images have, TrainIds where all have both. Test has no real labels
    and is left out.
    """

    def places(kind):
        above = [f"{a}{b}" for b in ("", f"{kind}_trainvaltest/") for a in ("", "cityscapes/")]
        return [f"{folder}{kind}/train" for folder in above]

    flat = ("images/train", "cityscapes/images/train")
    images = _found(root, *places("leftImg8bit"), *flat).parent
    endings, kinds, parts = ("_leftImg8bit.png",), ("_labelTrainIds", "_labelIds"), ("train", "val")
    if images.name == "images":
        labels, endings, kinds = images.with_name("segmentation"), (*endings, ".png"), ("",)
    else:
        labels = _found(root, *places("gtFine")).parent
    stems = [f"{part}/{name}_gtFine" for part in parts for name in _by_stem(images / part, endings)]
    kind = max(kinds, key=lambda kind: sum((labels / f"{s}{kind}.png").is_file() for s in stems))
    endings = (endings, (f"_gtFine{kind}.png",))
    files = {part: _pairs(images / part, labels / part, endings=endings) for part in parts}
    mapped = [_CITYSCAPES_IDS.index(i) if i in _CITYSCAPES_IDS else VOID for i in range(34)]
    table = _table(mapped if kind == "_labelIds" else range(19))
    if kind == "_labelIds":
        table[VOID] = INVALID  # it tells training ids under that name, which would be read wrong
    return files, table, *_classes(_CITYSCAPES)


def _voc_files(root: Path):
    """VOC 2012 with the labels of SBD: SegmentationClassAug, or the .mat files of SBD's archive.

    Training images are those that a train_aug list names, or all that have a label; never
    validation images. Official masks win over others.
    """
    places = ("JPEGImages", "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages")
    voc = _found(root, *places).parent
    official, augmented = voc / "SegmentationClass", voc / "SegmentationClassAug"
    above = dict.fromkeys((root.absolute(), *voc.absolute().parents[:2]))
    sbd = [folder / "benchmark_RELEASE" / "dataset" / "cls" for folder in above]
    mats = next((_by_stem(folder, (".mat",)) for folder in sbd if folder.is_dir()), {})
    masks, others = (
        _by_stem(folder, (".png",)) if folder.is_dir() else {} for folder in (official, augmented)
    )
    if not mats and not others and len(masks) <= _VOC_MASKS:
        tried = ", ".join(map(str, (augmented, *sbd)))
        raise InputError(f"{official}: {len(masks)} masks, but none of SBD's; tried {tried}")
    image_of, png_of = _by_stem(voc / "JPEGImages", _IMAGES), others | masks
    lists = voc / "ImageSets"
    val = _listed(lists, "val")
    if val is None:
        raise InputError(f"{lists / 'Segmentation' / 'val.txt'}: no such file")
    train = _listed(lists, "train_aug", "trainaug")
    train = mats.keys() | png_of.keys() if train is None else train
    wanted = {"train": (train - val, mats | png_of), "val": (val, png_of)}
    for names, label_of in wanted.values():
        if alone := sorted(names - (image_of.keys() & label_of.keys())):
            kind = "label" if alone[0] in image_of else "image"
            raise InputError(f"{voc}: {alone[0]} has no {kind}")
    files = {p: {k: (image_of[k], of[k]) for k in names} for p, (names, of) in wanted.items()}
    return files, _table(range(21)), _VOC.split(), voc_palette(21)


def _bdd100k_files(root: Path):
    """seg/{images,labels}/PART, or images/10k/PART and labels/sem_seg/masks/PART.

    Masks are ID_train_id.png, as in the former, or ID.png, as in the latter.
    """
    new = [f"{folder}images/10k/train" for folder in ("", "bdd100k/")]
    old = [f"{folder}images/train" for folder in ("", "seg/", "bdd100k/", "bdd100k/seg/")]
    images = _found(root, *new, *old).parent
    labels = images.parent / "labels"
    if images.name == "10k":
        labels = images.parents[1] / "labels" / "sem_seg" / "masks"
    files, endings = {}, ("_train_id.png", ".png")
    for part in ("train", "val"):
        image_of, label_of = _by_stem(images / part, _IMAGES), _by_stem(labels / part, endings)
        files[part] = {k: (image_of[k], label_of[k]) for k in image_of.keys() & label_of.keys()}
        for folder, names in ((images, image_of), (labels, label_of)):
            if alone := sorted(names.keys() - files[part].keys()):
                left = f"{len(alone)} left out, as {names[alone[0]].name}"
                kind = "images without a mask" if folder == images else "masks without an image"
                warn(f"{folder / part}: {kind}: {left}")
    return files, _table(range(19)), *_classes(_CITYSCAPES)


def _camvid_files(root: Path):
    """SegNet's layout: {train,val,test}/NAME.png (or JPEG), {train,val,test}annot/NAME.png."""
    root = root / "CamVid" if (root / "CamVid" / "train").is_dir() else root
    parts = ["train", "val"] + ["test"] * (root / "test").is_dir()
    files = {part: _pairs(root / part, root / f"{part}annot") for part in parts}
    return files, _table([*range(11), VOID]), *_classes(_CAMVID)


def _folder_files(root: Path):
    """images/{train,val}, labels/{train,val} paired by stem (sub-folders too), classes.txt."""
    listed = root / "classes.txt"
    if not listed.is_file():
        raise InputError(f"{listed}: missing; it lists the class names, one a line, id 0 first")
    names = read_lines(listed)
    if not 2 <= len(names) < INVALID:
        raise InputError(f"{listed}: {len(names)} classes; 2 to {INVALID - 1} are possible")
    images, labels = root / "images", root / "labels"
    train = _pairs(images / "train", labels / "train", unlabeled=True)
    files = {"train": train, "val": _pairs(images / "val", labels / "val")}
    return files, _table(range(len(names))), names, voc_palette(len(names) + 1)[1:]  # black is void


FILES = {
    "cityscapes": _cityscapes_files,
    "voc": _voc_files,
    "camvid": _camvid_files,
    "bdd100k": _bdd100k_files,
    "folder": _folder_files,
}


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without blank ones."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _found(root: Path, *candidates: str) -> Path:
    """The first of these folders below root that is there."""
    tried = [root / candidate for candidate in candidates]
    found = next(filter(Path.is_dir, tried), None)
    if found is None:
        raise InputError(f"no such folder; tried {', '.join(map(str, tried))}")
    return found


def _listed(lists: Path, *names: str) -> set[str] | None:
    """Ids of the first of these lists that is there; its lines may be paths of image and label."""
    folders = (lists / "Segmentation", lists / "SegmentationAug")
    paths = [folder / f"{name}.txt" for name in names for folder in folders]
    found = next(filter(Path.is_file, paths), None)
    ids = found and {Path(line.split()[0]).stem for line in read_lines(found)}
    if ids == set():
        raise InputError(f"{found}: lists no image")
    return ids


def _pairs(images: Path, labels: Path, *, unlabeled=False, endings=(_IMAGES, (".png",))) -> dict:
    """Name (path without ending) -> image and label path; unlabeled: or None for the label."""
    image_of, label_of = _by_stem(images, endings[0]), _by_stem(labels, endings[1])
    for name in sorted(label_of.keys() ^ image_of.keys()):
        if name in label_of:
            raise InputError(f"{label_of[name]}: no image of the same name in {images}")
        if not unlabeled:
            raise InputError(f"{image_of[name]}: no label {labels / name}{endings[1][0]}")
    return {name: (image_of[name], label_of.get(name)) for name in image_of}


def _by_stem(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """Files below folder with one of the endings, by their path without it."""
    found = {}
    walk = os.walk(folder, followlinks=True)
    for path in sorted(Path(place) / name for place, _, names in walk for name in names):
        name = path.relative_to(folder).as_posix()
        ending = next((e for e in endings if name.lower().endswith(e.lower())), None)
        if ending and "/." not in f"/{name}":  # nothing hidden
            stem = name[: -len(ending)]
            if stem in found:
                raise InputError(f"{path}: {found[stem].name} beside it has the same name")
            found[stem] = path
    if not found:
        state = f"holds no {', '.join(endings)} file" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {state}")
    return found


def _table(train_ids: Sequence[int]) -> np.ndarray:
    """(256,) uint8: id in the file -> training id, from those of 0, 1, ...; 255 is always void."""
    table = np.full(256, INVALID, np.uint8)
    table[VOID] = VOID
    table[: len(train_ids)] = train_ids
    return table


def _classes(text: str) -> tuple[list, list]:
    """Names and colours of "name rrggbb, ..."."""
    entries = [entry.rsplit(maxsplit=1) for entry in text.split(",")]
    return [name.strip() for name, _ in entries], [tuple(bytes.fromhex(c)) for _, c in entries]


def voc_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Pascal VOC's colour for each class id: its bits spread over red, green and blue."""
    return [
        tuple(sum((i >> (3 * bit + c) & 1) << (7 - bit) for bit in range(8)) for c in range(3))
        for i in range(num_classes)
    ]
