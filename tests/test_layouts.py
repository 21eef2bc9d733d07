"""The official layouts of Cityscapes, Pascal VOC 2012 with SBD, and BDD100K, as tiny trees."""

import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import publish, write_bdd100k, write_cityscapes, write_sbd, write_voc
from PIL import Image
from scipy.io import savemat
from test_run import SMALL

from common import InputError, layouts
from common.datasets import open_dataset, select

TRAIN_ID = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11}
TRAIN_ID |= {25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def raw(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("parents", [True, False])
def test_cityscapes_maps_label_ids(tmp_path, parents, capsys):
    root = write_cityscapes(tmp_path, parents=parents)
    data = open_dataset("cityscapes", root)
    assert data.train.names == [
        "traina/traina_000001_000019",
        "traina/traina_000003_000019",
        "trainb/trainb_000000_000019",
        "trainb/trainb_000002_000019",
    ]
    assert (len(data.val), data.test, data.num_classes) == (2, None, 19)
    assert data.class_names[11:13] == ("person", "rider") and data.palette[13] == (0, 0, 142)
    seen = set()
    for k, name in enumerate(data.train.names):
        image, label = data.train[k]
        (path,) = root.rglob(f"{name}_gtFine_labelIds.png")
        mapped = [[TRAIN_ID.get(i, 255) for i in row] for row in raw(path).tolist()]
        assert label.tolist() == mapped
        (path,) = root.rglob(f"{name}_leftImg8bit.png")
        assert np.array_equal(image.movedim(0, 2), raw(path))
        seen |= set(np.unique(label).tolist())
    assert len(seen) > 12 and 255 in seen
    errors = capsys.readouterr().err
    assert errors.startswith("warning: ") and errors.count("\n") == 1
    assert "'train': 4, 'val': 2" in errors and "'train': 2975, 'val': 500" in errors


def test_cityscapes_prefers_train_ids_where_every_image_has_them(tmp_path):
    root = write_cityscapes(tmp_path, kinds=("labelIds", "labelTrainIds"))
    (path,) = root.rglob("*vala/*_labelTrainIds.png")
    for file in root.rglob("*_labelTrainIds.png"):
        Image.fromarray(np.minimum(raw(file), 17) + 1).save(file)
    label = open_dataset("cityscapes", root).val[0][1]
    assert np.array_equal(label, raw(path)) and 18 in label
    path.unlink()
    label = open_dataset("cityscapes", root).val[0][1]
    path = path.with_name(path.name.replace("TrainIds", "Ids"))
    assert label.tolist() == [[TRAIN_ID.get(i, 255) for i in row] for row in raw(path).tolist()]


def test_a_missing_label_of_cityscapes_is_named(tmp_path):
    root = write_cityscapes(tmp_path, kinds=("labelTrainIds",))
    path = one(root, "trainb*_labelTrainIds.png")
    path.unlink()
    with pytest.raises(InputError, match=f"no label {path}"):
        open_dataset("cityscapes", root)


def test_absent_cities_are_named(tmp_path, capsys):
    root = write_cityscapes(tmp_path)
    for old, new in (("traina", "aachen"), ("trainb", "zurich"), ("vala", "munster")):
        for path in sorted(root.rglob(f"*{old}*"), reverse=True):
            path.rename(path.with_name(path.name.replace(old, new)))
    open_dataset("cityscapes", root)
    _, absent = capsys.readouterr().err.split("none of ")
    assert absent.startswith("bochum, ") and absent.count(",") == 17 and "zurich" not in absent


@pytest.mark.parametrize("ending", ["_leftImg8bit", ""])
def test_cityscapes_one_level_up_and_flat_with_train_ids(tmp_path, ending):
    write_cityscapes(tmp_path / "official/cityscapes", parents=False)
    official = open_dataset("cityscapes", tmp_path / "official")
    assert len(official.train) == 4
    for part in (official.train, official.val):
        for name, (image, label) in zip(part.names, part.files, strict=True):
            split, stem = image.parts[-3], Path(name).name
            for kind, source, end in (
                ("images", image, ending),
                ("segmentation", label, "_gtFine"),
            ):
                place = tmp_path / f"flat/{kind}/{split}/{stem}{end}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
    with pytest.raises(InputError, match="label id"):  # labelIds there
        open_dataset("cityscapes", tmp_path / "flat").train[0]
    for path in (tmp_path / "flat/segmentation").rglob("*.png"):
        Image.fromarray(np.minimum(raw(path), 18)).save(path)
    above = tmp_path / "above"
    for root in (tmp_path / "flat", above):
        if root == above:
            above.mkdir()
            (tmp_path / "flat").rename(above / "cityscapes")
        data = open_dataset("cityscapes", root)
        assert data.train.names[0] == "traina_000001_000019" and len(data.val) == 2
        label = one(root, "segmentation/train/*")
        assert np.array_equal(data.train[0][1], raw(label))


@pytest.mark.parametrize(
    "line",
    [
        "traina/traina_000003_000019",
        "traina_000003_000019",
        "leftImg8bit/train/traina/traina_000003_000019_leftImg8bit.png gtFine/train/x.png",
        "images/train/traina_000003_000019_leftImg8bit.png",
        "traina_000003_000019_leftImg8bit",
    ],
)
def test_published_lists_of_cityscapes_resolve(tmp_path, line):
    train = open_dataset("cityscapes", write_cityscapes(tmp_path)).train
    (tmp_path / "list.txt").write_text(line)
    args = Namespace(labeled_list=tmp_path / "list.txt", supervised=False, checkpoint=None)
    assert select(train, args, batch_size=2) == ([1], [0, 2, 3])


def names(numbers):
    return [f"2007_{k:06d}" for k in sorted(numbers)]


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_with_an_augmented_folder_leaves_validation_images_out(tmp_path, below, capsys):
    voc, val = tmp_path / below, range(5, 9)
    write_voc(voc, range(9), val, folder="SegmentationClassAug")
    data = open_dataset("voc", tmp_path)
    assert data.train.names == names(range(5)) and data.val.names == names(val)
    assert data.num_classes == 21 and data.class_names[15] == "person" and data.test is None
    assert not data.train.same_size and "'train': 10582, 'val': 1449" in capsys.readouterr().err
    lists = voc / "ImageSets/SegmentationAug"
    lists.mkdir()
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in names(range(7))]
    (lists / "train_aug.txt").write_text("\n".join(lines[2:]))
    assert open_dataset("voc", tmp_path).train.names == names([2, 3, 4])
    (lists / "train_aug.txt").unlink()
    (lists.parent / "Segmentation/trainaug.txt").write_text("\n".join(names([1, 3, 6, 7])))
    data = open_dataset("voc", tmp_path)
    assert (data.train.names, data.val.names) == (names([1, 3]), names(val))


def test_voc_palette_and_grey_masks_are_indices(tmp_path):
    write_voc(tmp_path, range(3), [3], folder="SegmentationClassAug")
    mask = tmp_path / "SegmentationClassAug/2007_000001.png"
    ids = raw(mask)
    assert Image.open(mask).mode == "P" and len(np.unique(ids)) > 5
    data = open_dataset("voc", tmp_path)
    assert np.array_equal(data.train[1][1], ids) and data.train[1][1][0, 0] == 255
    Image.fromarray(ids).save(mask)
    assert Image.open(mask).mode == "L" and np.array_equal(data.train[1][1], ids)


@pytest.mark.parametrize("given", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_with_sbd_counts_each_image_once(tmp_path, given, capsys):
    train, val, sbd = range(10), range(10, 16), range(4, 13)
    sbd = [*sbd, *range(20, 30)]
    voc = write_voc(tmp_path / "VOCdevkit/VOC2012", train, val)
    write_sbd(voc, tmp_path / "benchmark_RELEASE/dataset/cls", sbd)
    data = open_dataset("voc", tmp_path / given)
    wanted = ({*train} | {*sbd}) - {*val}
    assert data.train.names == names(wanted) and len(data.train) == 20
    assert data.val.names == names(val)
    assert data.val[0][1].max() == 255  # the official mask, not SBD's
    for k, number in enumerate(sorted(wanted)):
        label = data.train[k][1]
        if number in train:
            official = raw(voc / f"SegmentationClass/2007_{number:06d}.png")
            assert np.array_equal(label, official) and len(np.unique(label)) > 1
        else:
            assert (label == number % 21).all() and label.shape == (40, 60)
    assert capsys.readouterr().err.count("\n") == 1


def test_sbd_s_classes_of_any_number_type(tmp_path):
    write_voc(tmp_path, [1], [3])
    write_sbd(tmp_path, tmp_path / "benchmark_RELEASE/dataset/cls", [5])
    path = one(tmp_path, "*.mat")
    label = np.arange(2400).reshape(40, 60) % 21
    for kind in (np.float64, np.int16):
        savemat(path, {"GTcls": {"Segmentation": label.astype(kind), "Boundaries": [1]}})
        assert np.array_equal(open_dataset("voc", tmp_path).train[1][1], label)
    for wrong in (label + 0.5, label - 300, label * np.nan):
        savemat(path, {"GTcls": {"Segmentation": wrong, "Boundaries": [1]}})
        with pytest.raises(InputError, match=path.name):
            open_dataset("voc", tmp_path).train[1]


def test_voc_detects_the_augmented_set_by_count(tmp_path, monkeypatch):
    write_voc(tmp_path, range(6), range(6, 9))
    with pytest.raises(InputError, match="9 masks, but none of SBD's") as caught:
        open_dataset("voc", tmp_path)
    for tried in ("SegmentationClassAug", "benchmark_RELEASE/dataset/cls"):
        assert str(tmp_path / tried) in str(caught.value)
    for count, found in ((9, False), (8, True)):
        monkeypatch.setattr(layouts, "_VOC_MASKS", count)
        if found:
            assert open_dataset("voc", tmp_path).train.names == names(range(6))
        else:
            with pytest.raises(InputError, match="9 masks"):
                open_dataset("voc", tmp_path)


def test_official_masks_win_over_augmented_ones(tmp_path):
    write_voc(tmp_path, range(4), [4, 5], folder="SegmentationClassAug")
    write_voc(tmp_path, [1], [4, 5])
    for k in (1, 4):
        mask = tmp_path / f"SegmentationClass/2007_{k:06d}.png"
        Image.fromarray(np.full_like(raw(mask), 20)).save(mask)
    data = open_dataset("voc", tmp_path)
    assert (data.train[1][1] == 20).all() and (data.val[0][1] == 20).all()
    assert not (data.train[0][1] == 20).all() and len(data.train) == 4


def test_bdd100k_s_old_masks_may_be_named_as_their_images(tmp_path):
    root = write_bdd100k(tmp_path, old=True)
    for path in list(root.rglob("*_train_id.png"))[::2]:
        path.rename(path.with_name(path.name.replace("_train_id", "")))
    data = open_dataset("bdd100k", root)
    assert (len(data.train), len(data.val)) == (4, 2)
    assert all(label.stem.startswith(image.stem) for image, label in data.train.files)


BDD100K = [("", False), ("bdd100k", False), ("", True), ("seg", True), ("bdd100k/seg", True)]


@pytest.mark.parametrize(("below", "old"), BDD100K)
def test_bdd100k_leaves_out_what_has_no_pair(tmp_path, below, old, monkeypatch, capsys):
    publish(monkeypatch, "bdd100k", train=3, val=2)
    root = write_bdd100k(tmp_path / below, 5, 2, old=old)
    (mask,) = root.rglob("labels/**/train/train-1*")
    mask.unlink()
    next(root.rglob("images/**/train/train-4.jpg")).unlink()
    data = open_dataset("bdd100k", tmp_path)
    assert data.train.names == ["train-0", "train-2", "train-3"] and len(data.val) == 2
    (path,) = root.rglob("labels/**/train/train-2*")
    assert np.array_equal(data.train[1][1], raw(path)) and data.class_names[0] == "road"
    image_line, mask_line = capsys.readouterr().err.splitlines()
    assert "images without a mask: 1 left out, as train-1.jpg" in image_line
    assert "masks without an image: 1 left out, as train-4" in mask_line
    for path in root.rglob("labels/**/val/*.png"):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(InputError, match="no val image has a label"):
        open_dataset("bdd100k", tmp_path)


WRITE = {
    "cityscapes": lambda root: write_cityscapes(root, parents=False),
    "voc": lambda root: write_voc(root, range(6), [6, 7], folder="SegmentationClassAug"),
    "bdd100k": write_bdd100k,
}


def one(root, pattern):
    return sorted(root.rglob(pattern))[0]


def write_over(pattern, array):
    return lambda root: Image.fromarray(array).save(one(root, pattern))


def swap_for_mat(content=None):
    """Each mask a .mat; one of them of another size, or with other content."""

    def change(root):
        cls = root / "benchmark_RELEASE/dataset/cls"
        write_sbd(root, cls, range(9, 12), (40, 60))
        path = cls / "2007_000010.mat"
        if content is None:
            shutil.copy(path, cls / "2007_000001.mat")
            (root / "SegmentationClassAug/2007_000001.png").unlink()
        else:
            path.write_bytes(content or path.read_bytes()[:200])

    return change


WRONG_ID, COLOUR = np.full((48, 96), 77, np.uint8), np.zeros((36, 64, 3), np.uint8)
BAD_TREES = [
    ("cityscapes", lambda r: shutil.rmtree(r / "gtFine"), "gtFine_trainvaltest/gtFine/train"),
    ("cityscapes", lambda r: shutil.rmtree(r / "leftImg8bit"), "leftImg8bit/train, "),
    ("cityscapes", lambda r: shutil.rmtree(r / "gtFine/val"), "gtFine/val: "),
    ("cityscapes", lambda r: one(r, "trainb*Ids.png").unlink(), "trainb_000000_000019_left"),
    ("cityscapes", lambda r: one(r, "valb*8bit.png").unlink(), "valb_000000_000019_gtFine"),
    ("cityscapes", write_over("traina*Ids.png", WRONG_ID), "label id 77"),
    ("cityscapes", write_over("traina*Ids.png", WRONG_ID[:8]), "(96, 8) pixels"),
    ("cityscapes", lambda r: one(r, "valb*Ids.png").write_bytes(b""), "an empty file"),
    ("voc", lambda r: shutil.rmtree(r / "JPEGImages"), "VOCdevkit/VOC2012/JPEGImages"),
    ("voc", lambda r: shutil.rmtree(r / "SegmentationClassAug"), "none of SBD's; tried"),
    ("voc", lambda r: one(r, "val.txt").unlink(), "val.txt: no such file"),
    ("voc", lambda r: one(r, "val.txt").write_text("nobody"), "nobody has no image"),
    (
        "voc",
        lambda r: one(r, "val.txt").with_name("train_aug.txt").write_text("\n"),
        "aug.txt: lists",
    ),
    ("voc", lambda r: one(r, "2007_000007.png").unlink(), "2007_000007 has no label"),
    ("voc", lambda r: one(r, "2007_000002.jpg").unlink(), "2007_000002 has no image"),
    ("voc", swap_for_mat(b"MAT"), "2007_000010.mat: an empty file or not one of MATLAB"),
    ("voc", swap_for_mat(b""), "2007_000010.mat: a damaged file"),
    ("voc", swap_for_mat(), "2007_000001.mat: (60, 40) pixels"),
    ("bdd100k", lambda r: shutil.rmtree(r / "images"), "bdd100k/seg/images/train"),
    ("bdd100k", lambda r: shutil.rmtree(r / "labels"), "sem_seg/masks/train: no such folder"),
    ("bdd100k", write_over("train/train-1.png", COLOUR), "8-bit grey or palette"),
]


@pytest.mark.parametrize(("name", "damage", "expected"), BAD_TREES)
def test_bad_trees_are_one_line(tmp_path, name, damage, expected):
    root = WRITE[name](tmp_path / "mine")
    damage(root)
    with pytest.raises(InputError) as caught:
        data = open_dataset(name, root)
        for part in (data.train, data.val):
            for k in range(len(part)):
                part[k]
    assert expected in str(caught.value) and "\n" not in str(caught.value)


RUNS = [
    ("cityscapes", ("--size", 48, 64), {"train": 4, "val": 2}, "motorcycle"),
    ("voc", ("--crop", 32, 32), {"train": 6, "val": 2}, "diningtable"),
    ("bdd100k", ("--size", 32, 64), {"train": 4, "val": 2}, "motorcycle"),
]


@pytest.mark.parametrize(("name", "flags", "counts", "class_name"), RUNS)
def test_each_layout_trains_and_is_evaluated(
    command, tmp_path, monkeypatch, name, flags, counts, class_name
):
    publish(monkeypatch, name, **counts)
    out, data = tmp_path / "run", WRITE[name](tmp_path / "data")
    args = ("--dataset", name, "--data-dir", data, "--labeled", 2, *SMALL, *flags)
    status, printed, errors = command("classmix", *args, "--iterations", 2, "--output-dir", out)
    assert (status, errors) == (0, "")
    assert f"2 labeled and {counts['train'] - 2} unlabeled of {counts['train']}" in printed
    for flag in ((), ("--full-resolution",)):
        status, printed, errors = command("classmix", "--evaluate", out / "last.pt", *flag)
        assert (status, errors) == (0, "") and class_name in printed and "mIoU" in printed
    assert "2 val images, labels at their own size" in printed
    shutil.rmtree(sorted(data.iterdir())[0])
    status, _, errors = command("classmix", *args, "--iterations", 2, "--output-dir", out / "b")
    assert status == 2 and errors.count("\n") == 1 and errors.startswith("classmix.py: ")


def test_training_ids_under_the_name_of_label_ids_are_refused(tmp_path):
    root = write_cityscapes(tmp_path, kinds=("labelTrainIds",))
    for path in root.rglob("*_labelTrainIds.png"):
        path.rename(str(path).replace("labelTrainIds", "labelIds"))
    data = open_dataset("cityscapes", root)
    with pytest.raises(InputError, match="label id 255 is none of"):
        data.train[0]
