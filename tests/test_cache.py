"""Decoded images on disk, on generated files of Cityscapes' size."""

import os
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import publish, same_state, write_cityscapes
from PIL import Image

from common import InputError
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


def open_train(tree, size=SIZE):
    return open_dataset("cityscapes", tree, size=size).train


def made(tree):
    return sorted((tree / ".cache-64x128/train").glob("*/*"))


def stamps(tree):
    return [path.stat().st_mtime_ns for path in made(tree)]


def test_decoded_images_are_what_direct_reading_gives(tree):
    train = open_train(tree)
    assert made(tree) == []
    decoded = [*train]
    assert [path.name for path in made(tree)] == ["0.npy", "1.npy", "2.npy"]
    before = stamps(tree)
    torch.testing.assert_close([*open_train(tree)], decoded)
    assert stamps(tree) == before
    image = Image.open(train.files[1][0])
    wanted = np.asarray(image.resize(SIZE[::-1], Image.Resampling.BILINEAR))
    assert image.size == (2048, 1024) and np.array_equal(train[1][0].movedim(0, 2), wanted)
    label = Image.fromarray(train.label_table[np.asarray(Image.open(train.files[1][1]))])
    wanted = np.asarray(label.resize(SIZE[::-1], Image.Resampling.NEAREST))
    assert np.array_equal(train[1][1], wanted)


def test_what_is_stale_is_removed(tree):
    first = made(tree) or ([*open_train(tree)] and made(tree))
    moved = tree.rename(tree.with_name("moved"))
    train = open_train(moved)
    assert [path.name for path in made(moved)] == [path.name for path in first]
    assert train.cache.name == first[0].parent.name
    path = train.files[2][0]
    before = path.stat()
    Image.new("RGB", (2048, 1024), (9, 8, 7)).save(path)
    train = open_train(moved)
    assert made(moved) == [] and [p.unique().tolist() for p in train[2][0]] == [[9], [8], [7]]
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert open_train(moved).cache != train.cache
    assert open_train(moved, (32, 64))[0][0].shape == (3, 32, 64)


def test_only_large_images_that_are_resized_are_kept(tree, tmp_path):
    small = write_cityscapes(tmp_path / "small", size=(512, 1024))
    cases = ((small, SIZE, False), (tree, None, False), (tree, (1024, 2048), False))
    for root, size, full_labels in (*cases, (tree, SIZE, True)):
        data = open_dataset("cityscapes", root, size=size, full_labels=full_labels)
        image, label = data.val[0]
        assert data.val.cache is None and not list(root.glob(".cache*"))
    assert image.shape == (3, *SIZE) and label.shape == (1024, 2048)


@pytest.mark.parametrize("full", [False, True])
def test_where_they_cannot_be_written_files_are_read_directly(tree, capsys, full):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:  # no file may grow beyond 20 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    else:
        (tree / ".cache-64x128").write_text("a file")
    try:
        decoded = [*open_train(tree)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capsys.readouterr().err
    assert errors.startswith("warning: no cache") and errors.count("\n") == 1
    assert (".npy: cannot be written" if full else ".cache-64x128") in errors and made(tree) == []
    if full:
        torch.testing.assert_close([*open_train(tree)], decoded)


@pytest.mark.parametrize("length", [0, 60, 150, 32_000])  # 128 bytes of header, 32 kB of pixels
def test_a_damaged_one_is_decoded_again(tree, length):
    decoded = [*open_train(tree)]
    os.truncate(made(tree)[1], length)
    torch.testing.assert_close([*open_train(tree)], decoded)
    assert made(tree)[1].stat().st_size == made(tree)[0].stat().st_size > 32_000
    os.truncate(open_train(tree).files[0][0], 9_000)
    with pytest.raises(InputError, match=r"_000001_000019_leftImg8bit\.png: damaged"):
        open_train(tree)[0]


def test_a_run_decodes_each_image_once(command, tree, tmp_path):
    flags = (*SMALL.split(), tree, "--iterations", 4, "--workers", 1, "--output-dir")
    assert command("classmix", *flags, tmp_path / "first")[0] == 0
    before = stamps(tree)
    assert command("classmix", *flags, tmp_path / "second")[0] == 0
    assert len(made(tree)) == 3 and stamps(tree) == before
    same_state(tmp_path / "first", tmp_path / "second")
