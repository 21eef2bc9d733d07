"""Images and labels, the choice of labeled images, batches."""

import os
import struct
import zlib
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pair
from PIL import Image

from common import InputError, streets
from common.augment import scale_crop_flip
from common.datasets import MicroBatches, endless, open_dataset, select, split
from common.layouts import read_image


def test_camvid_reads_both_formats_and_maps_void(camvid):
    data = open_dataset("camvid", camvid)
    assert (len(data.train), len(data.val), data.test, data.num_classes) == (8, 3, None, 11)
    assert data.train.names == [f"{k:03d}" for k in range(8)]
    image, label = data.train[0]
    ids = np.asarray(Image.open(camvid / "trainannot/000.png"))
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8 and label.dtype == torch.uint8
    assert torch.equal(label, torch.from_numpy(np.where(ids == 11, 255, ids)))
    assert label[0, 0] == 255 and data.class_names[0] == "sky" and len(data.palette) == 11
    camvid.rename(camvid.with_name("CamVid"))  # may lie one level down
    assert open_dataset("camvid", camvid.parent).train.names == data.train.names


def test_folder_pairs_by_stem_and_keeps_images_without_labels(folder):
    data, stray = open_dataset("folder", folder), folder / "labels/train/stray.png"
    assert data.class_names == ("road", "car", "sky") and data.val.names[0] == "sub/0"
    assert data.train.has_label == [True] * 6 + [False] * 4
    assert (data.train[8][1] == 255).all() and not (data.train[2][1] == 255).all()
    assert data.train[1][0].shape == (3, 44, 64) and not data.train.same_size
    stray.write_bytes((folder / "labels/val/sub/0.png").read_bytes())
    with pytest.raises(InputError, match="stray"):
        open_dataset("folder", folder)
    (folder / "classes.txt").write_text("\n")
    with pytest.raises(InputError, match=r"classes\.txt: 0 classes"):
        open_dataset("folder", folder)
    (folder / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"classes\.txt: no such file; list the class names"):
        open_dataset("folder", folder)


def test_colors_of_a_folder_s_classes_differ(folder):
    (folder / "classes.txt").write_text("\n".join(f"class {k}" for k in range(253)))
    palette = torch.tensor(open_dataset("folder", folder).palette).float()
    assert len(palette.unique(dim=0)) == 253
    assert torch.nn.functional.pdist(palette[:20]).min() > 50


def test_class_names_are_text_without_control_characters(folder):
    path = folder / "classes.txt"
    for code in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("röad\r\n\r\n car x\nsky".encode(code))
        assert open_dataset("folder", folder).class_names == ("röad", "car x", "sky")
    names = ("ro\x0cad\ncar", "ro\u2028ad\ncar", "ro\x85ad\ncar", "car\nroad\ncar")
    for content in (*map(str.encode, names), "a\nb".encode("utf-16-le"), b"r\xf6ad\ncar"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"classes\.txt: .*(control|car is listed twice)"):
            open_dataset("folder", folder)


def test_every_error_of_an_image_names_the_file(folder):
    image, label = folder / "images/train/street 0.jpg", folder / "labels/train/street 0.png"
    with pytest.raises(InputError, match=r"street 0\.jpg: .*division"):
        read_image(image, lambda _: 1 / 0)  # predict() turns a picture
    data = label.read_bytes()
    label.write_bytes(data[: data.index(b"IDAT") - 4])
    with pytest.raises(InputError, match=r"street 0\.png"):  # a label without image data
        open_dataset("folder", folder)
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(InputError, match=r"street 0\.jpg: not a file"):
        open_dataset("folder", folder)


def turn_grey(path: Path) -> None:
    """Makes a palette PNG a grey one of as few bits. Pillow reads such files but writes none."""
    data = bytearray(path.read_bytes())
    data[25] = 0  # the color type
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def test_labels_are_read_right_or_refused(folder):
    path = folder / "labels/train/street 0.png"
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (40, 64)).astype(np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.ravel())
    for bits in (2, 4, 8):
        palette.putpalette(rng.bytes(3 * 2**bits))
        palette.save(path)
        assert path.read_bytes()[24] == bits
        assert np.array_equal(open_dataset("folder", folder).train[0][1], ids)
        turn_grey(path)
        if bits < 8:
            with pytest.raises(InputError, match=r"8-bit (RGB or )?grey"):
                open_dataset("folder", folder)
    assert np.array_equal(open_dataset("folder", folder).train[0][1], ids)
    for mode in ("RGB", "RGBA", "LA", "1", "I;16"):
        Image.new(mode, (64, 40)).save(path)
        with pytest.raises(InputError, match=r"8-bit (RGB or )?grey"):
            open_dataset("folder", folder)


def test_streets_are_the_same_every_time(monkeypatch):
    with pytest.raises(InputError, match="--dataset folder"):
        open_dataset("streets", "a folder")
    assert streets.COUNTS == {"train": 800, "val": 200}
    monkeypatch.setattr(streets, "COUNTS", {"train": 40, "val": 10})
    one, other = (open_dataset("streets", None, size=(32, 64)) for _ in range(2))
    assert (len(one.train), len(one.val)) == (40, 10)
    assert all(torch.equal(a, b) for a, b in zip(one.train[7], other.train[7], strict=True))
    assert not torch.equal(one.train[7][0], one.val[7][0])
    counts = torch.bincount(one.train.labels.flatten().long(), minlength=256)
    assert (counts[: one.num_classes] > 0).all() and counts[one.num_classes : 255].sum() == 0


def test_scenes_and_images_have_the_same_interface(folder, monkeypatch, tmp_path):
    """The rest of the program uses either of them without asking which one it is."""
    monkeypatch.setattr(streets, "COUNTS", {"train": 3, "val": 2})
    scenes = open_dataset("streets", None, size=(32, 64)).train
    images = open_dataset("folder", folder, size=(32, 64)).train
    shared = {name for name in dir(scenes) if not name.startswith("_")} - {"images", "labels"}
    assert shared == {"names", "files", "has_label", "same_size"}
    for part in (scenes, images):
        assert len(part) == len(part.names) == len(part.files) == len(part.has_label)
        assert part.names == sorted(set(part.names)) and part.same_size
        for image, label in (part[0], part[len(part) - 1]):
            assert (image.dtype, image.shape) == (torch.uint8, (3, 32, 64))
            assert (label.dtype, label.shape) == (torch.uint8, (32, 64))
        (tmp_path / "list.txt").write_text(part.names[1])
        assert choose(part, labeled_list=tmp_path / "list.txt")[0] == [1]


COUNTS = [  # images, labeled, their number
    *((2975, share, 372) for share in (0.125, "0.125", "1/8")),
    *((2975, "1/30", 100), (2975, "1/4", 744), (2975, "1/16", 186), (2975, 1.0, 2975)),
    *((10582, "1/20", 529), (10582, Fraction(1, 8), 1323), (100, "1/8", 13)),
    *((367, "30", 30), (367, 30, 30), (367, 1, 1)),
]


def test_split_counts():
    for num_images, labeled, count in COUNTS:
        assert len(split(num_images, labeled, 0)[0]) == count, (num_images, labeled)


def test_splits_are_nested_disjoint_and_numpy_s():
    small, rest = split(100, 10, 3)
    large, _ = split(100, 40, 3)
    assert small == sorted(np.random.RandomState(3).permutation(100)[:10])
    assert set(small) < set(large) and sorted(small + rest) == list(range(100))
    assert split(100, 10, 3, unlabeled="all") == (small, list(range(100)))
    assert split(100, 100, 3)[1] == list(range(100))
    assert split(100, 10, 4)[0] != small


@pytest.mark.parametrize("labeled", ["0", "101", "0.001", "-3", "many", "1/0", "nan.0"])
def test_impossible_splits(labeled):
    with pytest.raises(InputError, match="--labeled"):
        split(100, labeled, 0)


def choose(train, unlabeled="rest", **flags):
    args = {"labeled": "3", "labeled_list": None, "split_seed": 0, "supervised": False}
    args = Namespace(**{**args, "checkpoint": None, **flags})
    return select(train, args, batch_size=2, unlabeled=unlabeled)


def test_a_list_names_images_by_id_path_or_column(camvid, tmp_path):
    train, listed = open_dataset("camvid", camvid).train, tmp_path / "list.txt"
    two_columns = "/SegNet/CamVid/train/005.png /SegNet/CamVid/trainannot/005.png"
    listed.write_text(f"002\n{two_columns}\n\n000.png\n")
    assert choose(train, labeled_list=listed) == ([0, 2, 5], [1, 3, 4, 6, 7])
    assert choose(train, "all", labeled_list=listed) == ([0, 2, 5], list(range(8)))
    listed.write_text("\n".join(train.names[:7]))
    with pytest.raises(InputError, match="only 1 unlabeled"):
        choose(train, labeled_list=listed)
    assert choose(train, labeled_list=listed, supervised=True)[0] == list(range(7))


def test_a_list_tells_images_of_one_name_apart(folder, tmp_path):
    for k in range(2):
        write_pair(folder / f"images/train/{k}/a.png", folder / f"labels/train/{k}/a.png", (40, 64))
    train, listed = open_dataset("folder", folder).train, tmp_path / "list.txt"
    for line in ("1/a", "1/a.png", "\ufeff1/a.png 1/a.png", "street 3.jpg"):  # a blank in a name
        listed.write_text(line, encoding="utf-8")
        name = "street 3" if "street" in line else "1/a"
        assert [train.names[k] for k in choose(train, labeled_list=listed)[0]] == [name]
    for line in ("a", "elsewhere/a.png", "street 8", "nobody", ""):  # street 8 has no label
        listed.write_text(line)
        with pytest.raises(InputError, match=f"--labeled-list: {line}"):
            choose(train, labeled_list=listed)


def test_select_takes_labels_only_from_labeled_images(folder):
    train = open_dataset("folder", folder).train
    assert choose(train, labeled="1.0") == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    chosen, rest = choose(train, labeled="2")
    assert set(chosen) < set(range(6)) and sorted(chosen + rest) == list(range(10))


NUMBERS = [(torch.full((3, 1, 1), k).byte(), torch.full((1, 1), k).byte()) for k in range(20)]
WEAK = scale_crop_flip(scale_range=(0.5, 1.5), crop=(40, 40), flip=True, mean=torch.zeros(3, 1, 1))


def draw(images, transform, number, *, start=0, workers=0, **options):
    """The first micro-batches from batch `start` on."""
    options = {"micro_batches": range(1), "count": 1, "seed": 5, "stream": 1} | options
    options.setdefault("indices", list(range(len(images))))
    drawn = MicroBatches(images, transform=transform, **options)
    batches = endless(drawn, start=start, workers=workers, device=torch.device("cpu"))
    return [next(batches) for _ in range(number)]


def numbers(**options):
    """The indices that the images of each batch have."""
    batches = draw(NUMBERS, lambda seed, image, label: (image, label), **options)
    assert all(torch.equal(image[:, 0], label / 255) for image, label in batches)
    return [label.flatten().tolist() for _, label in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_t_depends_on_seed_stream_and_t_alone(camvid, workers):
    images = open_dataset("camvid", camvid).train
    torch.manual_seed(0)
    whole = draw(images, WEAK, 7, batch_size=3)
    torch.manual_seed(1)
    resumed = draw(images, WEAK, 3, batch_size=3, start=4, workers=workers)
    for (image, label), (image_again, label_again) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(image, image_again) and torch.equal(label, label_again)
    assert image.dtype == torch.float32 and 0.5 < image.max() <= 1 and label.dtype == torch.int64
    assert image.shape == (3, 3, 40, 40) and label.shape == (3, 40, 40)
    for other in ({"seed": 6}, {"stream": 0}):
        assert numbers(number=3, batch_size=6, **other) != numbers(number=3, batch_size=6)
    seeds = draw(NUMBERS, lambda seed, image, _: (image, torch.tensor([[seed]])), 9, batch_size=6)
    assert len({int(seed) for _, batch in seeds for seed in batch}) == 54  # each image has its own


def test_micro_batches_together_are_the_batch(camvid):
    """Two ranks with two micro-batches each see what one process sees, flips and crops included."""
    images = open_dataset("camvid", camvid).train
    whole = draw(images, WEAK, 5, batch_size=8)
    ranks = [range(2), range(2, 4)]
    split = {"batch_size": 8, "count": 4, "start": 1}
    parts = [draw(images, WEAK, 8, micro_batches=rank, **split) for rank in ranks]
    for t, batch in enumerate(whole[1:]):
        micro_batches = [rank[2 * t + k] for rank in parts for k in range(2)]
        for wanted, *pieces in zip(batch, *micro_batches, strict=True):
            assert torch.equal(wanted, torch.cat(pieces)) and len(pieces[0]) == 2


def test_an_epoch_shows_every_image_but_the_ragged_rest():
    indices = list(range(5, 15))
    drawn = numbers(number=300, batch_size=4, indices=indices)
    epochs = [a + b for a, b in zip(drawn[::2], drawn[1::2], strict=True)]  # two batches and a rest
    assert all(len(set(epoch)) == 8 and set(epoch) < set(indices) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 150
    shown = np.bincount(np.ravel(epochs))[5:]
    assert shown.min() > 100 and shown.max() < 140  # 120 each
    small = numbers(number=1, batch_size=5, indices=[2, 4])[0]
    assert sorted(small) in ([2, 2, 2, 4, 4], [2, 2, 4, 4, 4])
