"""Layouts, label ids, splits and batches."""

import itertools
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

from common import InputError
from common.augment import jitter_and_blur, scale_crop_flip
from common.datasets import Batches, endless, open_dataset, select, split
from common.layouts import voc_palette

REAL_CAMVID = Path(
    os.environ.get("CAMVID", Path(__file__).parents[2] / "shared" / "data" / "camvid")
)
CPU = torch.device("cpu")


def test_camvid_reads_both_formats_and_maps_void(camvid):
    data = open_dataset("camvid", camvid)
    assert (len(data.train), len(data.val), data.test, data.num_classes) == (8, 3, None, 11)
    assert data.train.names == [f"{k:03d}" for k in range(8)]
    image, label = data.train[0]
    raw = np.asarray(Image.open(camvid / "trainannot/000.png"))
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8 and label.dtype == torch.uint8
    assert torch.equal(label, torch.from_numpy(np.where(raw == 11, 255, raw)))
    assert label[0, 0] == 255 and data.class_names[0] == "sky" and len(data.palette) == 11


def test_size_resizes_the_image_antialiased_and_the_label_by_nearest(camvid):
    image, label = open_dataset("camvid", camvid, size=(12, 16)).train[3]
    original = Image.open(camvid / "train/003.png")
    wanted = np.asarray(original.resize((16, 12), Image.Resampling.BILINEAR))
    assert np.array_equal(image.movedim(0, 2).numpy(), wanted)
    full_image, full_label = open_dataset("camvid", camvid, size=(12, 16), full_labels=True).val[0]
    assert full_image.shape == (3, 12, 16) and full_label.shape == (48, 64)
    assert set(label.unique().tolist()) <= {*range(11), 255}


def test_a_photograph_is_turned_no_more_than_its_label(folder):
    path = folder / "images/train/street 2.jpg"
    upright = np.asarray(Image.open(path))
    exif = Image.Exif()
    exif[274] = 6  # orientation: a quarter turn
    Image.open(path).save(path, exif=exif, quality=100, subsampling=0)
    image, label = open_dataset("folder", folder).train[2]
    assert image.shape[1:] == label.shape == upright.shape[:2]
    assert np.abs(image.movedim(0, 2).numpy() - upright.astype(int)).max() < 30


@pytest.mark.skipif(not REAL_CAMVID.is_dir(), reason="the real CamVid is not here")
def test_the_real_camvid():
    data = open_dataset("camvid", REAL_CAMVID)
    assert (len(data.train), len(data.val)) == (367, 101)
    for part in (data.train, data.val):
        image, label = part[5]
        assert image.shape == (3, 360, 480) and label.shape == (360, 480)
        assert set(label.unique().tolist()) <= {*range(11), 255} and (label == 255).any()
    # Sky lies above the road.
    row = torch.arange(360).view(-1, 1).expand(360, 480)
    assert row[label == 0].float().mean() < row[label == 3].float().mean()


def test_folder_pairs_by_stem_and_keeps_images_without_labels(folder):
    data = open_dataset("folder", folder)
    assert data.class_names == ("road", "car", "sky") and data.val.names[0] == "sub/0"
    assert data.train.has_label == [True] * 6 + [False] * 4
    assert (data.train[8][1] == 255).all() and not (data.train[2][1] == 255).all()
    assert data.train[1][0].shape == (3, 44, 64) and not data.train.same_size
    (folder / "labels/train/stray.png").write_bytes((folder / "labels/val/sub/0.png").read_bytes())
    with pytest.raises(InputError, match="stray"):
        open_dataset("folder", folder)


def test_folder_without_class_names(folder):
    (folder / "classes.txt").write_text("\n")
    with pytest.raises(InputError, match="0 classes"):
        open_dataset("folder", folder)
    (folder / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"classes\.txt"):
        open_dataset("folder", folder)


def grey_png(path: Path, ids: np.ndarray, bits: int) -> None:
    """A grey PNG of few bits a pixel, which Pillow reads but does not write."""
    weights = 1 << np.arange(bits - 1, -1, -1)
    packed = np.packbits((ids[..., None] & weights) > 0, axis=None).reshape(len(ids), -1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in chunks:
            file.write(struct.pack(">I", len(body)) + name + body)
            file.write(struct.pack(">I", zlib.crc32(name + body)))


def test_labels_are_read_right_or_refused(folder):
    path = folder / "labels/train/street 0.png"
    ids = np.random.default_rng(0).integers(0, 3, (40, 64)).astype(np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.ravel())
    palette.putpalette([250, 3, 9, 1, 1, 1, 77, 0, 5])
    for bits in (8, 4, 2):
        palette.save(path, bits=bits)
        assert np.array_equal(open_dataset("folder", folder).train[0][1].numpy(), ids)
    for bits in (8, 4, 2, 1):
        grey_png(path, ids if bits > 1 else ids % 2, bits)
        if bits == 8:
            assert np.array_equal(open_dataset("folder", folder).train[0][1].numpy(), ids)
        else:
            with pytest.raises(InputError, match="8-bit grey"):
                open_dataset("folder", folder).train[0]
    for mode in ("RGB", "RGBA", "LA", "1", "I;16"):
        Image.new(mode, (64, 40)).save(path)
        with pytest.raises(InputError, match="8-bit grey"):
            open_dataset("folder", folder).train[0]


def test_streets_are_the_same_every_time():
    one, other = (open_dataset("streets", None, size=(32, 64)) for _ in range(2))
    assert (len(one.train), len(one.val)) == (800, 200)
    assert all(torch.equal(a, b) for a, b in zip(one.train[7], other.train[7], strict=True))
    assert not torch.equal(one.train[7][0], one.val[7][0])
    counts = torch.bincount(one.train.labels.flatten().long(), minlength=256)
    assert (counts[: one.num_classes] > 0).all()
    assert counts[one.num_classes : 255].sum() == 0


@pytest.mark.parametrize(
    ("num_images", "labeled", "count"),
    [
        (2975, 0.125, 372),
        (2975, "0.125", 372),
        (2975, "1/8", 372),
        (2975, "1/30", 100),
        (2975, "1/4", 744),
        (2975, "1/2", 1488),
        (2975, "1/16", 186),
        (10582, "1/20", 529),
        (10582, Fraction(1, 8), 1323),
        (367, "30", 30),
        (367, 30, 30),
        (367, 1.0, 367),
        (367, 1, 1),
    ],
)
def test_split_counts(num_images, labeled, count):
    assert len(split(num_images, labeled, 0)[0]) == count


def test_splits_are_nested_disjoint_and_numpy_s():
    small, rest = split(100, 10, 3)
    large, _ = split(100, 40, 3)
    assert small == sorted(np.random.RandomState(3).permutation(100)[:10])
    assert set(small) < set(large) and sorted(small + rest) == list(range(100))
    assert split(100, 10, 3, unlabeled="all")[1] == list(range(100))
    assert split(100, 100, 3)[1] == list(range(100))
    assert split(100, 10, 4)[0] != small


@pytest.mark.parametrize("labeled", ["0", "101", "0.001", "-3", "many", "1/0", "nan.0"])
def test_impossible_splits(labeled):
    with pytest.raises(InputError, match="--labeled"):
        split(100, labeled, 0)


def test_select_by_list_accepts_names_paths_and_columns(camvid, tmp_path):
    train = open_dataset("camvid", camvid).train
    listed = tmp_path / "list.txt"
    args = Namespace(
        labeled="3", labeled_list=listed, split_seed=0, supervised=False, checkpoint=None
    )
    listed.write_text(
        "002\n/SegNet/CamVid/train/005.png /SegNet/CamVid/trainannot/005.png\n\n000.png\n"
    )
    assert select(train, args, batch_size=2) == ([0, 2, 5], [1, 3, 4, 6, 7])
    listed.write_text("nobody\n")
    with pytest.raises(InputError, match="nobody"):
        select(train, args, batch_size=2)
    listed.write_text("\n".join(train.names[:7]))
    with pytest.raises(InputError, match="only 1 unlabeled"):
        select(train, args, batch_size=2)


def test_select_by_list_tells_images_of_one_name_apart(folder, tmp_path):
    for k in range(2):
        write_pair(folder / f"images/train/{k}/a.png", folder / f"labels/train/{k}/a.png", (40, 64))
    train, listed = open_dataset("folder", folder).train, tmp_path / "list.txt"
    args = Namespace(
        labeled="3", labeled_list=listed, split_seed=0, supervised=False, checkpoint=None
    )
    for name in ("1/a", "1/a.png", "\ufeff1/a.png 1/a.png"):
        listed.write_text(name, encoding="utf-8")
        assert [train.names[k] for k in select(train, args, batch_size=2)[0]] == ["1/a"]
    for name in ("a", "elsewhere/a.png"):
        listed.write_text(name)
        with pytest.raises(InputError, match="several training images"):
            select(train, args, batch_size=2)


def test_select_takes_labels_only_from_labeled_images(folder):
    train = open_dataset("folder", folder).train
    args = Namespace(
        labeled="1.0", labeled_list=None, split_seed=0, supervised=False, checkpoint=None
    )
    assert select(train, args, batch_size=2) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    args.labeled = "2"
    chosen, rest = select(train, args, batch_size=2)
    assert set(chosen) < set(range(6)) and sorted(chosen + rest) == list(range(10))


def identity(seed, image, label):
    return image, label


def batches(
    images, transform=identity, *, start=0, workers=0, count=7, size=3, indices=None, **how
):
    indices = indices if indices is not None else list(range(len(images)))
    drawn = Batches(images, indices, size, transform, **{"seed": 5, "stream": 1, **how})
    stream = endless(drawn, start, workers, CPU)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_t_depends_on_the_seed_and_t_alone(camvid, workers):
    images = open_dataset("camvid", camvid).train
    mean = torch.full((3, 1, 1), 0.5)
    transform = scale_crop_flip(scale_range=(0.5, 1.5), crop=(40, 40), flip=True, mean=mean)
    torch.manual_seed(0)
    whole = batches(images, transform)
    torch.manual_seed(1)
    resumed = batches(images, transform, start=4, count=3, workers=workers)
    for (image, label), (again, label_again) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(image, again) and torch.equal(label, label_again)
    assert image.dtype == torch.float32 and 0.5 < image.max() <= 1 and label.dtype == torch.int64
    assert image.shape == (3, 3, 40, 40) and label.shape == (3, 40, 40)


def test_an_epoch_shows_every_image_but_the_ragged_rest(camvid):
    images = open_dataset("camvid", camvid).train
    originals = [image.float().div(255) for image, _ in images]

    def seen(batch):
        return [next(k for k, o in enumerate(originals) if torch.equal(o, i)) for i in batch[0]]

    order = [seen(batch) for batch in batches(images, count=4)]
    assert len({*order[0], *order[1]}) == 6 and len({*order[2], *order[3]}) == 6
    assert order[:2] != order[2:]
    assert sorted(seen(batches(images, size=5, indices=[2, 4], count=1)[0])) in (
        [2, 2, 2, 4, 4],
        [2, 2, 4, 4, 4],
    )


def test_with_replacement_every_index_is_drawn_from_all():
    class Numbers(list):
        def prepare(self):
            pass

    images = Numbers((torch.full((3, 1, 1), k).byte(), torch.zeros(1, 1).byte()) for k in range(20))
    how = {"indices": list(range(5, 15)), "size": 4, "replacement": True}
    drawn = [
        (255 * image[:, 0, 0, 0]).round().int() for image, _ in batches(images, **how, count=500)
    ]
    count = torch.bincount(torch.cat(drawn), minlength=20)
    assert count[:5].sum() == count[15:].sum() == 0
    assert count[5:15].min() > 150 and count[5:15].max() < 250  # 200 each
    unlike = sum(len(batch.unique()) == 4 for batch in drawn) / 500
    assert abs(unlike - 0.9 * 0.8 * 0.7) < 0.07
    assert sum(torch.equal(*pair) for pair in itertools.pairwise(drawn)) < 3
    later = batches(images, **how, start=498, count=2)
    assert torch.equal(later[1][0][:, 0, 0, 0], drawn[499] / 255)
    parts = [batches(images, **how, part=part, parts=2, count=40) for part in (0, 1)]
    for whole, *halves in zip(drawn, *parts, strict=False):
        assert torch.equal(whole / 255, torch.cat([image[:, 0, 0, 0] for image, _ in halves]))
    for other in ({"seed": 6}, {"stream": 0}):
        (again, _), *_ = batches(images, **{**how, **other, "size": 50})
        (once, _), *_ = batches(images, **{**how, "size": 50})
        assert not torch.equal(again, once)


def test_crop_pads_with_mean_and_void_and_moves_both_alike():
    label = torch.arange(20, dtype=torch.uint8).view(4, 5)
    image = label.expand(3, 4, 5)
    mean = torch.tensor([0.1, 0.5, 0.8]).view(3, 1, 1)
    transform = scale_crop_flip(scale_range=(1.0, 1.0), crop=(6, 3), flip=True, mean=mean)
    flipped = 0
    for seed in range(40):
        out, ids = transform(seed, image, label)
        assert out.shape == (3, 6, 3) and ids.shape == (6, 3)
        void = ids == 255
        assert void.sum() == 6 and torch.equal(out[:, ~void], ids[~void].expand(3, -1))
        assert out[:, void].unique(dim=1).tolist() == [[26], [128], [204]]
        inner = ids[~void].view(4, 3).long()
        flipped += int(inner[0, 0] > inner[0, 1])
    assert 10 < flipped < 30
    same, _ = scale_crop_flip(scale_range=(1.0, 1.0), crop=None, flip=False, mean=mean)(
        0, image, label
    )
    assert torch.equal(same, image)


def test_scale_stays_in_its_range():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    label = torch.zeros(40, 60, dtype=torch.uint8)
    weak = {"scale_range": (0.5, 1.5), "flip": False, "mean": torch.zeros(3, 1, 1)}
    transform = scale_crop_flip(**weak, crop=(64, 96))
    labels = [transform(seed, image, label)[1] for seed in range(60)]
    heights = [int((ids != 255).any(1).sum()) for ids in labels]
    assert 20 <= min(heights) < 26 and 54 < max(heights) <= 60


def test_jitter_and_blur_draw_for_each_image_from_the_seed_alone():
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).expand(
        6, -1, -1, -1
    )
    change = jitter_and_blur(0.25, 0.8, (0.15, 1.15), 0.5)
    state = torch.random.get_rng_state()
    first = change(3, image)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, change(3, image)) and not torch.equal(first, change(4, image))
    assert len({tensor.sum().item() for tensor in first}) > 3
    assert first.shape == image.shape and first.min() >= 0 and first.max() <= 1
    assert torch.equal(jitter_and_blur(0.25, 0.0, (0.15, 1.15), 0.0)(3, image), image)


def test_voc_palette():
    palette = voc_palette(21)
    assert palette[0] == (0, 0, 0) and palette[1] == (128, 0, 0) and palette[15] == (192, 128, 128)
    assert len(set(palette)) == 21
