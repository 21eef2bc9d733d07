"""Other people's data: nothing is silently wrong, left out or stuck. Each test makes its own."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import problems
from PIL import Image

import common.run
from common import InputError, datasets, evaluation
from common.datasets import loader, open_dataset

TINY = """--dataset folder --labeled 1.0 --size 40 64 --weights none --layers 1 1 1 1 --width 4
--batch-size 2 --workers 0 --aspp-rates 1 2 --crop 32 32 --iterations 2 --warmup 0"""


@pytest.fixture
def run(command, folder, tmp_path):
    """run(*flags) trains ClassMix on the folder for two steps -> (exit status, stdout, stderr)."""
    flags = (*TINY.split(), "--data-dir", folder, "--output-dir", tmp_path / "run")
    return lambda *more: command("classmix", *flags, *more)


def turn(path: Path, orientation: int):
    """Gives a JPEG the EXIF tag that asks a viewer to turn it."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.open(path).save(path, exif=exif, quality=100, subsampling=0)


# ---- Classes ----


@pytest.mark.parametrize(("other", "found"), [(0, "[0, 255]"), (255, "[255]")])
def test_fewer_than_two_classes_are_refused(run, folder, tmp_path, other, found):
    for path in folder.glob("labels/**/*.png"):
        ids = np.where(np.asarray(Image.open(path)) == 1, 255, other)  # foreground is 255
        Image.fromarray(ids.astype(np.uint8)).save(path)
    status, _, errors = run()
    assert status == 2 and f"only the ids {found}" in errors
    assert not (tmp_path / "run/last.pt").exists()


def test_classes_that_no_labeled_pixel_has_are_named(run, folder):
    (folder / "classes.txt").write_text("void\nroad\ncar\nsky\n")  # shifted by one
    status, printed, errors = run()
    (line,) = problems(errors)
    assert status == 0 and line.startswith("warning: the labeled images have no pixel of sky; ")
    assert "% of their pixels are void" in line
    lines = printed.splitlines()
    row = next(line.split()[1:] for line in lines if line.startswith("sky "))
    assert ("-" in row) == any("the mean leaves it out" in line for line in lines)


def test_classes_are_found_wherever_their_images_are(capsys):
    images = [(None, np.full((2, 2), k // 1500)) for k in range(3000)]  # sorted by class
    datasets.check_classes(images, list(range(3000)), ("healthy", "lesion"))
    assert capsys.readouterr().err == ""


def test_an_image_without_a_labeled_pixel_counts_nowhere(run, command, folder, tmp_path):
    assert run()[0] == 0
    label = folder / "labels/val/sub/0.png"
    Image.new("L", Image.open(label).size, 255).save(label)
    evaluate = ("classmix", "--evaluate", tmp_path / "run/last.pt")
    with_it = command(*evaluate)[1].splitlines()[1:]
    label.unlink()
    (folder / "images/val/sub/0.png").unlink()
    assert command(*evaluate)[1].splitlines()[1:] == with_it


# ---- What is predicted is what was scored ----


def test_predictions_agree_with_the_score(run, command, folder, tmp_path):
    for path in folder.glob("*/val/sub/*.png"):  # all of another shape than --size
        Image.open(path).resize((64, 160), Image.Resampling.NEAREST).save(path)
    assert run("--iterations", 30, "--lr", 3e-3, "--optimizer", "adam")[0] == 0
    last, out = tmp_path / "run/last.pt", tmp_path / "out"
    printed = command("classmix", "--evaluate", last, "--full-resolution")[1]
    score = float(printed.splitlines()[-1].split()[1])
    matrices = {}
    for flags in ((), ("--keep-aspect",)):
        folders = ("--predict", last, folder / "images/val", "--out", out)
        assert command("classmix", *folders, *flags)[0] == 0  # a folder: all its images
        pairs = [(out / f"{k}.png", folder / f"labels/val/sub/{k}.png") for k in range(3)]
        pairs = [[torch.from_numpy(np.array(Image.open(p))).long() for p in pair] for pair in pairs]
        matrices[flags] = sum(evaluation.confusion_matrix(*pair, 3) for pair in pairs)
    scores = [100 * evaluation.class_iou(m).nanmean().item() for m in matrices.values()]
    assert scores[0] == pytest.approx(score, abs=0.3) and scores[0] != pytest.approx(scores[1])


def test_a_bad_picture_among_many(run, command, folder, tmp_path):
    assert run()[0] == 0
    path = folder / "images/val/sub/1.png"
    path.write_bytes(path.read_bytes()[:60])
    out = tmp_path / "out"
    flags = ("--predict", tmp_path / "run/last.pt", folder / "images/val", "--out", out)
    status, _, errors = command("classmix", *flags)
    assert status == 1 and errors.startswith(f"classmix.py: {path}: ")
    good = {f"{k}{end}.png" for k in "02" for end in ("", "_overlay")}
    assert {p.name for p in out.iterdir()} == {"legend.png", *good}


# ---- Files ----


def test_palettes_that_differ_are_refused(folder):
    for k, path in enumerate(sorted(folder.glob("labels/train/*.png"))):
        label = Image.open(path)
        colors = [250, 0, 0, 0, 250, 0] if k < 3 else [0, 250, 0, 250, 0, 0]
        label.putpalette([0, 0, 0, *colors])
        label.save(path)
    with pytest.raises(InputError, match=r"street 3.png: its palette .* of .*street 0.png"):
        open_dataset("folder", folder)


@pytest.mark.parametrize("orientation", [3, 6])
def test_unlabeled_photographs_are_turned(folder, orientation):
    path = folder / "images/train/street 8.jpg"
    before = np.asarray(Image.open(path))
    turn(path, orientation)
    data = open_dataset("folder", folder)
    image, label = data.train[8]
    expected = np.rot90(before, 2 if orientation == 3 else -1)
    assert image.shape[1:] == label.shape == expected.shape[:2]
    assert np.abs(image.movedim(0, 2).numpy() - expected.astype(int)).max() < 30


def test_a_labeled_photograph_is_turned_where_its_label_is(folder):
    path, label_path = folder / "images/train/street 2.jpg", folder / "labels/train/street 2.png"
    before, label = np.asarray(Image.open(path)), np.asarray(Image.open(label_path))
    turn(path, 6)
    image, _ = open_dataset("folder", folder).train[2]
    assert image.shape[1:] == before.shape[:2]  # the label fits the stored pixels only
    Image.fromarray(np.rot90(label, -1)).save(label_path)
    image, _ = open_dataset("folder", folder).train[2]
    assert np.abs(image.movedim(0, 2).numpy() - np.rot90(before, -1).astype(int)).max() < 30
    turn(path, 3)
    Image.fromarray(label).save(label_path)
    with pytest.raises(InputError, match=r"street 2.jpg: EXIF turns it"):
        open_dataset("folder", folder)


@pytest.mark.parametrize("orientation", [1, 3])
def test_a_tiff_that_is_turned_is_refused(folder, orientation):
    """Pillow turns its pixels when it opens it; nothing tells whether its label is turned."""
    path = folder / "images/train/street 2.jpg"
    image = Image.open(path)
    image.save(path.with_suffix(".tif"), tiffinfo={274: orientation})
    path.unlink()
    if orientation == 1:
        assert open_dataset("folder", folder).train[2][0].shape[1:] == image.size[::-1]
    else:
        with pytest.raises(InputError, match=r"street 2.tif: EXIF turns it"):
            open_dataset("folder", folder)


def test_files_that_are_left_out_are_told(folder, capsys):
    (folder / "images/train/photo.heic").write_bytes(b"heic")
    (folder / "images/train/notes.txt").write_text("notes")
    open_dataset("folder", folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "images/train: 2 files are left out (.heic, .txt), for example notes.txt" in line


@pytest.mark.parametrize("suffix", ["bmp", "tif", "jpg"])
def test_labels_in_other_formats(folder, suffix):
    path = folder / "labels/train/street 1.png"
    ids = np.asarray(Image.open(path))
    Image.open(path).save(path.with_suffix(f".{suffix}"))
    path.unlink()
    if suffix == "jpg":
        with pytest.raises(InputError, match=r"street 1.jpg: a label is an 8-bit"):
            open_dataset("folder", folder)
    else:
        assert np.array_equal(open_dataset("folder", folder).train[1][1], ids)


def test_a_16_bit_image_is_refused_at_the_start(folder):
    Image.fromarray(np.zeros((60, 64), np.uint16)).save(folder / "images/train/deep.png")
    with pytest.raises(InputError, match=r"deep.png: more than 8 bits a channel"):
        open_dataset("folder", folder)


def test_a_very_large_photograph_is_read(monkeypatch, tmp_path):
    assert Image.MAX_IMAGE_PIXELS is None
    Image.new("L", (20_000, 10_000)).save(tmp_path / "large.png")  # Pillow's limit is 179 million
    assert datasets.read_image(tmp_path / "large.png").size == (20_000, 10_000)


def test_resuming_without_an_unlabeled_image(run, command, folder, tmp_path):
    assert run("--save-every", 1)[0] == 0
    (folder / "images/train/street 9.jpg").unlink()
    status, _, errors = command("classmix", "--resume", tmp_path / "run/last.pt")
    assert status == 0 and "1 unlabeled images are new or gone, for example street 9" in errors
    shutil.move(folder / "images/train/street 0.jpg", folder / "images/train/moved.jpg")
    shutil.move(folder / "labels/train/street 0.png", folder / "labels/train/moved.png")
    status, _, errors = command("classmix", "--resume", tmp_path / "run/last.pt")
    assert status == 2 and "street 0" in errors


# ---- Loading ----


class Slow(torch.utils.data.Dataset):
    """Items of one megabyte; the second one takes long or its process dies."""

    def __init__(self, act=lambda: None):
        self.act = act

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            self.act()
        return torch.zeros(2**20, dtype=torch.uint8), torch.tensor(index)


def test_loaders_stay_within_shared_memory(monkeypatch, capsys):
    usage, made = namedtuple("usage", "free"), []
    real = datasets.DataLoader
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def make(*args, **options):
        made.append((options["num_workers"], options.get("prefetch_factor", 2)))
        return real(*args, **options)

    monkeypatch.setattr(datasets, "DataLoader", make)
    for free, expected in ((2**40, (4, 2)), (64, (4, 2)), (14, (3, 1)), (1, (0, None))):
        both = usage(2 * free * 2**20)  # for the two ranks of this machine
        monkeypatch.setattr(datasets.shutil, "disk_usage", lambda _, both=both: both)
        assert len(list(loader(Slow(), 4, batch_size=None))) == 4
        assert made[-1] == expected
        assert ("MB of shared memory" in capsys.readouterr().err) == (free < 16)


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_is_obeyed_while_data_do_not_come(run, tmp_path, monkeypatch, workers, number):
    """One process asks for the end and then reads for ever; the others only do that."""
    main, last, read = os.getpid(), tmp_path / "run/last.pt", datasets.read_image

    def hang(path, *more):
        if last.exists():
            with contextlib.suppress(FileExistsError):
                (tmp_path / "asked").touch(exist_ok=False)
                time.sleep(1)  # the run uses what the others have read before
                os.kill(main, number)
            time.sleep(60)
        return read(path, *more)

    monkeypatch.setattr(datasets, "read_image", hang)
    monkeypatch.setattr(common.run, "PATIENCE", 1)
    began = time.monotonic()
    status, _, errors = run("--save-every", 1, "--iterations", 90, "--workers", workers)
    stopped = f"stopped by {number.name}; continue with --resume {last}"
    assert (status, problems(errors)) == (128 + number, [f"classmix.py: {stopped}"])
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_goes_bad_is_named_with_its_step(run, folder, monkeypatch, workers):
    bad = folder / "images/train/street 7.jpg"
    bad.write_bytes(bad.read_bytes()[:-200])  # its header is sound
    status, _, errors = run("--iterations", 9, "--workers", workers)
    (line,) = problems(errors)
    assert status == 2 and re.match(rf"classmix.py: {bad}: damaged, .* at step \d$", line)


@pytest.mark.parametrize("act", [lambda: os._exit(1), lambda: time.sleep(9)])
def test_a_loader_that_dies_or_is_silent_ends_the_run_with_one_line(monkeypatch, act):
    monkeypatch.setattr(datasets, "SILENCE", 2)
    with pytest.raises(InputError, match="loading images: DataLoader") as caught:
        list(loader(Slow(act), 1, batch_size=None))
    assert "\n" not in str(caught.value) and str(caught.value).count("DataLoader") == 1


def test_a_stall_without_loader_processes_is_said(monkeypatch, capsys):
    monkeypatch.setattr(datasets, "SILENCE", 0.2)
    said = []

    def act():
        time.sleep(0.5)
        said.append(capsys.readouterr().err)

    list(loader(Slow(act), 0, batch_size=None))
    assert said == ["warning: waiting for data for 0.2 s\n"]  # while it waits
    time.sleep(0.5)
    assert capsys.readouterr().err == ""
