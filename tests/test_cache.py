"""The decoded cache, on generated files of Cityscapes' size."""

import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import problems, publish, same_state, write_cityscapes
from PIL import Image

from common import cache
from common.datasets import open_dataset

SIZE = (64, 128)
SMALL = """--dataset cityscapes --labeled 1 --size 64 128 --weights none --layers 1 1 1 1 --width 4
--batch-size 2 --aspp-rates 1 2 --data-dir"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    return write_cityscapes(root, train=3, val=1, size=(1024, 2048), parents=False)


@pytest.fixture
def tree(written, tmp_path, monkeypatch):
    publish(monkeypatch, "cityscapes", train=3, val=1)
    return shutil.copytree(written, tmp_path / "data")


def prepared(tree, size=SIZE, prepare=True):
    train = open_dataset("cityscapes", tree, size=size).train
    if prepare:
        train.prepare()
    return train


def made(tree):
    return sorted(tree.glob(".cache-*/train/*"))


def test_the_cache_holds_what_direct_reading_gives(tree, capsys):
    train, direct = prepared(tree), prepared(tree, prepare=False)
    printed = capsys.readouterr().out
    assert "3/3 images" in printed and printed.endswith("\n") and printed.count("\n") == 1
    assert made(tree) == [train.cache] and direct.cache is None
    torch.testing.assert_close([*train], [*direct])
    image = Image.open(direct.files[1][0])
    wanted = np.asarray(image.resize(SIZE[::-1], Image.Resampling.BILINEAR))
    assert image.size == (2048, 1024) and np.array_equal(train[1][0].movedim(0, 2), wanted)
    label = Image.fromarray(direct.label_table[np.asarray(Image.open(direct.files[1][1]))])
    wanted = np.asarray(label.resize(SIZE[::-1], Image.Resampling.NEAREST))
    assert np.array_equal(train[1][1], wanted)


def test_a_cache_is_used_until_a_file_a_label_table_or_the_size_changes(tree):
    first = prepared(tree).cache
    stamp = first.stat().st_mtime_ns
    assert prepared(tree).cache == first and first.stat().st_mtime_ns == stamp
    moved = tree.rename(tree.with_name("moved"))
    assert prepared(moved).cache.name == first.name
    path = next(moved.rglob("train?_000002*_leftImg8bit.png"))
    Image.new("RGB", (2048, 1024), (9, 8, 7)).save(path)
    train = prepared(moved)
    second, index = train.cache, [image for image, _ in train.files].index(path)
    assert [plane.unique().tolist() for plane in train[index][0]] == [[9], [8], [7]]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    third, train = prepared(moved).cache, prepared(moved, prepare=False)
    train.label_table = np.where(train.label_table == 0, 1, train.label_table)
    train.prepare()
    assert len({place.name for place in (first, second, third, train.cache)}) == 4
    assert not (torch.stack([train[k][1] for k in range(3)]) == 0).any()
    assert made(moved) == [train.cache]  # the others are gone
    assert prepared(moved, (32, 64))[0][0].shape == (3, 32, 64)


def test_only_large_images_that_are_resized_are_cached(tree, tmp_path):
    small = write_cityscapes(tmp_path / "small", size=(512, 1024))
    cases = ((small, SIZE, False), (tree, None, False), (tree, (1024, 2048), False))
    for root, size, full_labels in (*cases, (tree, SIZE, True)):
        data = open_dataset("cityscapes", root, size=size, full_labels=full_labels)
        data.val.prepare()
        assert data.val.cache is None and made(root) == []
    image, label = data.val[0]
    assert image.shape == (3, *SIZE) and label.shape == (1024, 2048)


def test_where_a_cache_cannot_be_written_files_are_read_directly(tree, capsys):
    (tree / ".cache-64x128").write_text("a file")
    train = prepared(tree)
    errors = capsys.readouterr().err
    assert errors.startswith("warning: no cache") and errors.count("\n") == 1
    assert train.cache is None
    torch.testing.assert_close([*train], [*prepared(tree, prepare=False)])
    train.prepare()  # tried once
    assert capsys.readouterr().err == ""


def items(before=lambda: None):
    """Yields three pairs of image and label, and calls before() first each time."""
    for k in range(3):
        before()
        yield np.full((3, 4, 6), k + 1, np.uint8), np.full((4, 6), 2 * k + 2, np.uint8)


def holds_items(place):
    wanted = [np.concatenate((image, label[None])) for image, label in items()]
    np.testing.assert_equal([cache.read(place, k) for k in range(3)], wanted)


@pytest.mark.parametrize("length", [0, 60, 150, 415])  # 128 bytes of header, 288 of pixels
def test_a_damaged_cache_is_told_and_replaced(tmp_path, length):
    place = tmp_path / "cache/key.npy"
    assert not cache.is_sound(place)
    cache.build(place, 3, items())
    assert place.stat().st_size == 416
    os.truncate(place, length)
    assert not cache.is_sound(place)
    cache.build(place, 3, items())
    assert cache.is_sound(place) and list(place.parent.iterdir()) == [place]
    holds_items(place)


def test_a_build_that_is_stopped_leaves_nothing(tmp_path):
    stop = mock.Mock(side_effect=[None, None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        cache.build(tmp_path / "cache/key.npy", 3, items(stop))
    assert list(tmp_path.glob("cache/*")) == []


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_two_builders_at_once_both_end_with_a_sound_cache(tmp_path, moment):
    """The second one builds the whole cache while the first one decodes this image."""

    def build_too():
        assert place.exists() == (len(began) >= moment)
        began.append(None)
        if len(began) == moment:
            cache.build(place, 3, items())
            holds_items(place)

    began, place = [], tmp_path / "cache/key.npy"
    cache.build(place, 3, items(build_too))
    holds_items(place)
    assert list(place.parent.iterdir()) == [place]


def test_a_run_decodes_each_image_once_on_a_machine(command, tree, tmp_path, monkeypatch):
    args = (*SMALL.split(), tree, "--iterations", 2, "--workers", 1, "--output-dir")
    (tree / ".cache-64x128").write_text("a file")  # the first run has to decode in each step
    for local_rank, decoded in ((0, 0), (0, 2), (1, 0)):  # training and validation images
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        out = tmp_path / f"{local_rank}{decoded}"
        status, printed, _ = command("classmix", *args, out)
        assert status == 0 and printed.count("decoding") == decoded
        if not decoded and not local_rank:
            (tree / ".cache-64x128").unlink()
    same_state(tmp_path / "00", tmp_path / "02")
    same_state(tmp_path / "00", tmp_path / "10")


def test_a_damaged_source_leaves_no_cache(command, tree, tmp_path):
    path = next(tree.rglob("train?_000001*_leftImg8bit.png"))
    path.write_bytes(path.read_bytes()[:9000])
    status, _, errors = command("classmix", *SMALL.split(), tree, "--output-dir", tmp_path)
    (line,) = problems(errors)
    assert status == 2 and line.startswith(f"classmix.py: {path}: a damaged file")
    assert made(tree) == []
