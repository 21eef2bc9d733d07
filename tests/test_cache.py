"""The decoded cache, on generated files of Cityscapes' size."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import publish, write_cityscapes
from PIL import Image
from test_run import ROOT, SMALL, problems, same_state

from common import InputError, cache, layouts
from common.datasets import open_dataset

SIZE = (64, 128)


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


def prepared(tree, size=SIZE):
    cache._arrays.cache_clear()  # as another process would find it
    train = open_train(tree, size)
    train.prepare()
    return train


def made(tree, size=SIZE):
    return sorted((tree / ".cache-{}x{}".format(*size) / "train").iterdir())


def same(a, b):
    return all(torch.equal(x, y) for k in range(len(a)) for x, y in zip(a[k], b[k], strict=True))


def test_the_cache_holds_what_direct_reading_gives(tree, capsys):
    train, direct = prepared(tree), open_train(tree)
    printed = capsys.readouterr().out
    assert "3/3 images" in printed and printed.endswith("\n") and printed.count("\n") == 1
    (place,) = made(tree)
    assert train.cache == place and direct.cache is None and same(train, direct)
    image = Image.open(direct.files[1][0])
    wanted = np.asarray(image.resize(SIZE[::-1], Image.Resampling.BILINEAR))
    assert image.size == (2048, 1024) and np.array_equal(train[1][0].movedim(0, 2), wanted)
    label = Image.fromarray(direct.label_table[np.asarray(Image.open(direct.files[1][1]))])
    wanted = np.asarray(label.resize(SIZE[::-1], Image.Resampling.NEAREST))
    assert np.array_equal(train[1][1], wanted)
    arrays = [np.load(place / f"{name}.npy", mmap_mode="r") for name in ("images", "labels")]
    assert [a.shape for a in arrays] == [(3, 3, *SIZE), (3, *SIZE)]
    assert {a.dtype for a in arrays} == {np.dtype(np.uint8)}


def test_a_fresh_cache_is_used_and_a_stale_one_is_made_anew(tree, monkeypatch):
    prepared(tree)
    (first,) = made(tree)
    stamp = first.stat().st_mtime_ns
    assert prepared(tree).cache == first and first.stat().st_mtime_ns == stamp
    moved = tree.rename(tree.with_name("moved"))
    assert prepared(moved).cache.name == first.name
    path = next(moved.rglob("trainb_000002*_leftImg8bit.png"))
    before = path.stat()
    Image.new("RGB", (2048, 1024), (9, 8, 7)).save(path)
    train = prepared(moved)
    (second,) = made(moved)
    assert [plane.unique().tolist() for plane in train[2][0]] == [[9], [8], [7]]
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    prepared(moved)
    (third,) = made(moved)
    monkeypatch.setattr(cache, "_VERSION", 0)
    prepared(moved)
    (fourth,) = made(moved)
    assert len({first.name, second.name, third.name, fourth.name}) == 4
    assert prepared(moved, (32, 64))[0][0].shape == (3, 32, 64)
    assert made(moved) == [fourth]
    monkeypatch.setattr(layouts, "_CITYSCAPES_IDS", tuple(range(19)))
    assert same(prepared(moved), open_train(moved)) and made(moved) != [fourth]


def test_only_large_images_that_are_resized_are_cached(tree, tmp_path):
    small = write_cityscapes(tmp_path / "small", size=(512, 1024))
    for root, options in (
        (small, {"size": SIZE}),
        (tree, {"size": None}),
        (tree, {"size": (1024, 2048)}),
        (tree, {"size": SIZE, "full_labels": True}),
    ):
        data = open_dataset("cityscapes", root, **options)
        data.val.prepare()
        assert data.val.cache is None and not list(root.glob(".cache*"))
    image, label = data.val[0]
    assert image.shape == (3, *SIZE) and label.shape == (1024, 2048)


def test_a_damaged_source_leaves_no_cache(tree):
    path = next(tree.rglob("trainb_000002*_leftImg8bit.png"))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(InputError, match=path.name):
        prepared(tree)
    assert made(tree) == []


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("damage", [0, 60, 1000, None])
def test_a_damaged_cache_is_made_anew(tree, name, damage):
    prepared(tree)
    (place,) = made(tree)
    path = place / name
    path.unlink() if damage is None else os.truncate(path, damage)
    assert same(prepared(tree), open_train(tree)) and made(tree) == [place]


def test_where_it_cannot_be_written_files_are_read_as_they_are(tree, capsys):
    (tree / ".cache-64x128").write_text("a file")
    train = prepared(tree)
    errors = capsys.readouterr().err
    assert errors.startswith("warning: no cache") and errors.count("\n") == 1
    assert train.cache is None and train[0][0].shape == (3, *SIZE)
    train.prepare()
    assert capsys.readouterr().err == ""


def items(look, value=1):
    """Three pairs of image and label; before each of them a look at the folder."""
    for _ in range(3):
        look()
        yield np.full((3, 4, 6), value, np.uint8), np.full((4, 6), 2 * value, np.uint8)


def nothing():
    pass


def test_nothing_half_written_is_ever_in_place(tmp_path, monkeypatch):
    def look():
        seen.append([path.suffix for path in folder.iterdir()])

    def interrupt():
        look()
        if len(seen) == 2:
            raise KeyboardInterrupt

    seen, folder = [], tmp_path / "cache"
    place = folder / "key"
    with pytest.raises(KeyboardInterrupt):
        cache.build(place, 3, items(interrupt))
    assert seen == [[".partial"]] * 2 and not list(folder.iterdir())
    calls, sync, move = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("sync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("move") or move(*paths))
    assert cache.build(place, 3, items(look))
    assert seen == [[".partial"]] * 5 and list(folder.iterdir()) == [place]
    assert calls == ["sync", "sync", "move"]
    assert sorted(path.name for path in place.iterdir()) == ["images.npy", "labels.npy"]
    image, label = cache.read(place, 2)
    assert (image == 1).all() and image.shape == (3, 4, 6) and (label == 2).all()


def test_one_run_builds_and_the_others_wait_for_it(tmp_path):
    def begin():
        began.append(None)
        second.submit(lambda: None)  # there is a second thread by now

    began, place = [], tmp_path / "cache" / "key"
    with ThreadPoolExecutor(2) as second:
        results = list(second.map(lambda _: cache.build(place, 3, items(begin)), range(2)))
    assert results == [True, True] and len(began) == 3 and list(place.parent.iterdir()) == [place]
    assert [cache.read(place, k)[1].mean() for k in range(3)] == [2, 2, 2]


READ = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from common import cache
assert cache.is_sound(Path(sys.argv[2]))
print("open", flush=True)
sys.stdin.read()
"""


def test_what_another_run_reads_is_not_removed(tmp_path):
    first, second, third = (tmp_path / "cache" / name for name in ("first", "second", "third"))
    cache.build(first, 3, items(nothing))
    cache._arrays.cache_clear()
    argv, pipe = [sys.executable, "-c", READ, ROOT, first], subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdout.readline() == "open\n"
        cache.build(second, 3, items(nothing))
        assert sorted(first.parent.iterdir()) == [first, second]
        reader.stdin.close()
        reader.wait()
    cache._arrays.cache_clear()
    cache.build(third, 3, items(nothing))
    assert list(first.parent.iterdir()) == [third]


def test_without_locks_what_is_stale_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "none")))
    first, second = (tmp_path / "cache" / name for name in ("first", "second"))
    assert cache.build(first, 3, items(nothing))
    cache._arrays.cache_clear()
    assert cache.build(second, 3, items(nothing)) and cache.read(second, 0)[0].mean() == 1
    assert list(first.parent.iterdir()) == [second]


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
import classmix
from common import datasets
decode = datasets._decode
datasets._decode = lambda *what: time.sleep(0.3) or decode(*what)
sys.argv[1:] = sys.argv[2:]
classmix.main()
"""


def slow_build(tree, number):
    """Sends this signal to a run that is making the cache; returns it and its workers."""
    flags = ("--dataset", "cityscapes", "--data-dir", tree, "--labeled", 1, *SMALL)
    flags = (ROOT, *flags, "--size", *SIZE, "--output-dir", tree / "run")
    argv = [sys.executable, "-c", SLOW, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(argv, **pipes)
    workers = []
    while not workers and run.poll() is None:
        time.sleep(0.05)
        if any(path.stat().st_size for path in tree.rglob("*.partial/*/images.npy")):
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            workers = [Path("/proc") / child for child in children]
    run.send_signal(number)
    return run, workers


def left(workers):
    """Those of the processes that live on."""
    return [w for w in workers if w.exists() and "State:\tZ" not in (w / "status").read_text()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_leaves_nothing(tree, number):
    run, workers = slow_build(tree, number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert problems(errors) == [f"classmix.py: stopped by {number.name}"]
    assert made(tree) == [] and not left(workers)


def test_what_a_killed_build_leaves_is_removed(tree):
    run, workers = slow_build(tree, signal.SIGKILL)
    run.communicate(timeout=60)
    assert [path.suffix for path in made(tree)] == [".partial"]
    deadline = time.monotonic() + 60
    while left(workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left(workers)
    train = prepared(tree)
    assert made(tree) == [train.cache]


def test_a_run_decodes_once_a_machine(command, tree, tmp_path, monkeypatch):
    args = ("--dataset", "cityscapes", "--data-dir", tree, "--labeled", 1, *SMALL)
    args += ("--size", *SIZE, "--iterations", 2, "--workers", 1)
    # The first process of all decodes the validation images, of its machine the training images.
    for k, (local_rank, decoded) in enumerate([(1, 1), (0, 1), (1, 0)]):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        status, printed, errors = command("classmix", *args, "--output-dir", tmp_path / f"{k}")
        assert (status, errors) == (0, "") and printed.count("decoding") == decoded
    same_state(tmp_path / "0", tmp_path / "2")
    path = next(tree.rglob("traina_000001*_leftImg8bit.png"))
    path.write_bytes(path.read_bytes()[:9000])
    status, _, errors = command("classmix", *args, "--output-dir", tmp_path / "bad")
    assert status == 2 and errors.count("\n") == 1 and path.name in errors
    assert errors.startswith(f"classmix.py: {tree}")
