"""The layouts of Cityscapes, Pascal VOC 2012 with SBD, CamVid and BDD100K, as tiny trees."""

import os
import shutil

import numpy as np
import pytest
from conftest import publish, write_bdd100k, write_cityscapes, write_sbd, write_voc
from PIL import Image
from scipy.io import savemat

from common import InputError
from common.datasets import open_dataset

IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
WRITE = {
    "cityscapes": lambda root: write_cityscapes(root, parents=False),
    "cityscapes, parents": write_cityscapes,
    "voc": lambda root: write_voc(root, range(6), [6, 7], folder="SegmentationClassAug"),
    "bdd100k": write_bdd100k,
    "bdd100k, old": lambda root: write_bdd100k(root, old=True),
}


def raw(path):
    return np.asarray(Image.open(path))


def one(root, pattern):
    return sorted(root.rglob(pattern))[0]


def train_ids(path):
    return [[IDS.index(i) if i in IDS else 255 for i in row] for row in raw(path).tolist()]


LAYOUTS = [(name, below) for name in WRITE for below in ("", "cityscapes") if "city" in name]
LAYOUTS += [("voc", below) for below in ("", "VOC2012", "VOCdevkit/VOC2012")]
LAYOUTS += [("bdd100k", below) for below in ("", "bdd100k")]
LAYOUTS += [("bdd100k, old", below) for below in ("", "seg", "bdd100k", "bdd100k/seg")]


@pytest.mark.parametrize(("layout", "below"), LAYOUTS)
def test_accepted_layouts(tmp_path, layout, below):
    """Each image has its own label, wherever the folders of the data set begin."""
    WRITE[layout](tmp_path / below)
    name = layout.split(",")[0]
    data = open_dataset(name, tmp_path)
    assert (len(data.train), len(data.val), data.test) == (6 if name == "voc" else 4, 2, None)
    for part in (data.train, data.val):
        for k, (image, label) in enumerate(part.files):
            assert label.stem.startswith(image.stem.removesuffix("_leftImg8bit"))
            wanted = train_ids(label) if name == "cityscapes" else raw(label).tolist()
            assert part[k][1].tolist() == wanted and 255 in part[k][1]
            assert part[k][0].movedim(0, 2).tolist() == raw(image).tolist()


def test_cityscapes_classes_names_and_counts(tmp_path, capsys):
    data = open_dataset("cityscapes", write_cityscapes(tmp_path))
    numbers = ("a_000001", "a_000003", "b_000000", "b_000002")
    assert data.train.names == [f"train{n[0]}/train{n}_000019" for n in numbers]
    assert data.num_classes == 19 and data.class_names[11:13] == ("person", "rider")
    assert data.palette[13] == (0, 0, 142) and data.palette[18] == (119, 11, 32)
    (line,) = capsys.readouterr().err.splitlines()
    assert "'train': 4, 'val': 2" in line and "'train': 2975, 'val': 500" in line


def test_cityscapes_prefers_train_ids_if_every_image_has_them(tmp_path):
    root = write_cityscapes(tmp_path, kinds=("labelIds", "labelTrainIds"))
    path = one(root, "vala*_labelTrainIds.png")
    for file in root.rglob("*_labelTrainIds.png"):
        Image.fromarray(np.minimum(raw(file), 17) + 1).save(file)
    label = open_dataset("cityscapes", root).val[0][1]
    assert np.array_equal(label, raw(path)) and 18 in label
    path.unlink()
    label = open_dataset("cityscapes", root).val[0][1]
    assert label.tolist() == train_ids(str(path).replace("TrainIds", "Ids"))


@pytest.mark.parametrize("ending", ["_leftImg8bit", ""])
def test_flat_cityscapes_holds_train_ids(tmp_path, ending):
    official = open_dataset("cityscapes", write_cityscapes(tmp_path / "official"))
    root = tmp_path / "flat"
    for image, label in (*official.train.files, *official.val.files):
        part, stem = image.parts[-3], image.name.removesuffix("_leftImg8bit.png")
        for kind, path, end in (("images", image, ending), ("segmentation", label, "_gtFine")):
            place = root / "cityscapes" / kind / part / f"{stem}{end}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    with pytest.raises(InputError, match="label id"):  # these are label ids
        open_dataset("cityscapes", root).train[0]
    for path in root.rglob("*_gtFine.png"):
        Image.fromarray(np.minimum(raw(path), 18)).save(path)
    data = open_dataset("cityscapes", root)
    assert data.train.names[0] == "traina_000001_000019" and len(data.val) == 2
    assert np.array_equal(data.train[0][1], raw(one(root, "segmentation/train/*")))


@pytest.mark.parametrize("given", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_with_sbd_counts_each_image_once(tmp_path, given, capsys):
    train, val, sbd = range(10), range(10, 16), [*range(4, 13), *range(20, 30)]
    voc = write_voc(tmp_path / "VOCdevkit/VOC2012", train, val)
    write_sbd(voc, tmp_path / "benchmark_RELEASE/dataset/cls", sbd)
    data = open_dataset("voc", tmp_path / given)
    wanted = sorted({*train, *sbd} - {*val})
    for part, numbers, count in ((data.train, wanted, 20), (data.val, val, 6)):
        assert part.names == [f"2007_{k:06d}" for k in numbers] and len(part) == count
    assert data.val[0][1].max() == 255  # the official mask, not SBD's
    for number, (_, label) in zip(wanted, data.train, strict=True):
        official = voc / f"SegmentationClass/2007_{number:06d}.png"
        ids = raw(official) if number in train else np.full((40, 60), number % 21)
        assert np.array_equal(label, ids)
    assert data.num_classes == len(set(data.palette)) == 21 and data.class_names[15] == "person"
    assert data.palette[:2] == ((0, 0, 0), (128, 0, 0)) and data.palette[15] == (192, 128, 128)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "'train': 10582, 'val': 1449" in errors


def test_class_ids_of_sbd_are_whole_numbers_of_any_type(tmp_path, recwarn):
    write_voc(tmp_path, [1], [3])
    write_sbd(tmp_path, tmp_path / "benchmark_RELEASE/dataset/cls", [5])
    label, path = np.arange(2400).reshape(40, 60) % 21, one(tmp_path, "*.mat")
    kinds = (label.astype(np.float64), label.astype(np.int16))
    for given in (*kinds, label + 0.5, label - 300, label * np.nan):
        savemat(path, {"GTcls": {"Segmentation": given, "Boundaries": [1]}})
        train = open_dataset("voc", tmp_path).train
        if (given == label).all():
            assert np.array_equal(train[1][1], label)
        else:
            with pytest.raises(InputError, match=path.name):
                train[1]
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def test_official_masks_win_over_augmented_ones(tmp_path):
    write_voc(tmp_path, range(4), [4, 5], folder="SegmentationClassAug")
    write_voc(tmp_path, [1], [4, 5])
    for mask in tmp_path.glob("SegmentationClass/*.png"):
        Image.fromarray(np.full_like(raw(mask), 20)).save(mask)
    data = open_dataset("voc", tmp_path)
    official = [(label == 20).all() for part in (data.train, data.val) for _, label in part]
    assert official == [False, True, False, False, True, True]


@pytest.mark.parametrize("old", [False, True])
def test_bdd100k_leaves_out_what_has_no_pair(tmp_path, old, monkeypatch, capsys):
    publish(monkeypatch, "bdd100k", train=3, val=2)
    root = write_bdd100k(tmp_path, 5, 2, old=old)
    for path in list(root.rglob("*_train_id.png"))[::2]:  # old masks may lack the ending
        path.rename(path.with_name(path.name.replace("_train_id", "")))
    one(root, "labels/**/train/train-1*").unlink()
    one(root, "images/**/train/train-4.jpg").unlink()
    data = open_dataset("bdd100k", tmp_path)
    assert data.train.names == ["train-0", "train-2", "train-3"] and len(data.val) == 2
    assert np.array_equal(data.train[1][1], raw(one(root, "labels/**/train/train-2*")))
    assert data.class_names[0] == "road"
    lines = capsys.readouterr().err.splitlines()
    for line, kind, name in zip(lines, ("label", "image"), ("train-1.jpg", "train-4"), strict=True):
        assert line.startswith("warning: ") and "(1 in all" in line
        assert kind in line and name in line
    for path in root.rglob("labels/**/val/*.png"):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(InputError, match="no val image has a label"):
        open_dataset("bdd100k", tmp_path)


def write_over(pattern, array):
    return lambda root: Image.fromarray(array).save(one(root, pattern))


def use_mat(number, content=None):
    """Gives an image SBD's label alone, of 40x60 pixels or with this content (b"": damaged)."""

    def change(root):
        path = root / f"benchmark_RELEASE/dataset/cls/2007_{number:06d}.mat"
        path.parent.mkdir(parents=True)
        savemat(path, {"GTcls": {"Segmentation": np.zeros((40, 60)), "Boundaries": [1]}})
        if content is not None:
            path.write_bytes(content or path.read_bytes()[:200])
        (root / f"SegmentationClassAug/2007_{number:06d}.png").unlink()

    return change


GREY, COLOR = np.full((48, 96), 77, np.uint8), np.zeros((36, 64, 3), np.uint8)
ALONE = "trainb/trainb_000000_000019_leftImg8bit.png: no label in "
BAD_TREES = [
    ("cityscapes", lambda r: shutil.rmtree(r / "gtFine"), "gtFine_trainvaltest/gtFine/train"),
    ("cityscapes", lambda r: one(r, "trainb*Ids.png").unlink(), ALONE),
    ("cityscapes", write_over("traina*Ids.png", GREY), "label id 77"),
    ("cityscapes", write_over("traina*Ids.png", GREY | 255), "label id 255"),  # train ids have it
    ("cityscapes", write_over("traina*Ids.png", GREY[:8]), "(96, 8) pixels"),
    ("cityscapes", lambda r: one(r, "valb*Ids.png").write_bytes(b""), "damaged, empty"),
    ("cityscapes", lambda r: os.truncate(one(r, "traina*8bit.png"), 60), "8bit.png: damaged"),
    ("cityscapes", lambda r: one(r, "vala*8bit.png").unlink(), "Ids.png: no image in "),
    ("voc", lambda r: shutil.rmtree(r / "JPEGImages"), "VOCdevkit/VOC2012/JPEGImages"),
    ("voc", lambda r: shutil.rmtree(r / "SegmentationClassAug"), " has no label"),
    ("voc", lambda r: one(r, "val.txt").unlink(), "val.txt: no such file"),
    ("voc", lambda r: one(r, "val.txt").write_text("nobody"), "nobody has no image"),
    ("voc", lambda r: one(r, "2007_000007.png").unlink(), "2007_000007 has no label"),
    ("voc", use_mat(0, b"MAT"), "2007_000000.mat: damaged, empty"),
    ("voc", use_mat(0, b""), "2007_000000.mat: damaged"),
    ("voc", use_mat(1), "2007_000001.mat: (60, 40) pixels"),
    ("voc", use_mat(6), "2007_000006 has no label"),  # only PNG masks serve for validation
    ("bdd100k", lambda r: shutil.rmtree(r / "images"), "bdd100k/seg/images/train"),
    ("bdd100k", lambda r: shutil.rmtree(r / "labels"), "sem_seg/masks/train: no such folder"),
    ("bdd100k", write_over("train/train-1.png", COLOR), "8-bit grey or palette"),
]


@pytest.mark.parametrize(("name", "damage", "expected"), BAD_TREES)
def test_bad_trees_are_one_line(tmp_path, name, damage, expected):
    root = WRITE[name](tmp_path / "mine")
    damage(root)
    with pytest.raises(InputError) as caught:
        data = open_dataset(name, root)
        for part in (data.train, data.val):
            list(part)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
