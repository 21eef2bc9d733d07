"""The command line from start to finish: runs, resuming, interrupts, evaluation, bad input."""

import json
import os
import shutil
import signal
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from common import run
from common.datasets import open_dataset

SMALL = ("--weights", "none", "--layers", 1, 1, 1, 1, "--width", 4, "--optimizer", "adam")
SMALL += ("--lr", 3e-3, "--head-factor", 1, "--batch-size", 2, "--workers", 0, "--aspp-rates", 1, 2)
TINY = (*SMALL, "--size", 48, 64)


def read_log(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def same_state(a, b):
    a, b = (torch.load(path / "last.pt", weights_only=True)["state"] for path in (a, b))
    flat = [torch.utils._pytree.tree_flatten(state) for state in (a, b)]
    assert flat[0][1] == flat[1][1]
    for x, y in zip(flat[0][0], flat[1][0], strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_run_leaves_everything_a_user_needs(command, camvid, tmp_path):
    out = tmp_path / "run"
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY)
    status, printed, errors = command(
        "classmix", *args, "--iterations", 24, "--eval-every", 10, "--output-dir", out
    )
    assert (status, errors) == (0, "")
    assert "3 labeled and 5 unlabeled of 8" in printed
    for word in ("loss_l", "loss_u", "lambda", "steps/s", "left", "GiB", "pedestrian", "student"):
        assert word in printed
    names = (out / "split.txt").read_text().split()
    order = np.random.RandomState(0).permutation(8)[:3]
    assert names == [f"{k:03d}" for k in sorted(order)]
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["size"] == [48, 64] and config["versions"]["torch"]
    evaluations = [entry for entry in read_log(out) if "student" in entry]
    assert [entry["iteration"] for entry in evaluations] == [10, 20, 24]
    result = json.loads((out / "result.json").read_text())
    assert result["student"] == evaluations[-1]["student"]
    assert len(result["teacher"]["iou"]) == 11 and result["steps_per_second"] > 0
    assert {p.name for p in (out / "samples").iterdir()} == {f"{k:06d}.png" for k in (10, 20, 24)}
    status, printed, _ = command("classmix", "--evaluate", out / "last.pt")
    assert status == 0
    assert f"{100 * result['student']['miou']:.2f}" in printed.splitlines()[-1]
    assert f"{100 * result['teacher']['miou']:.2f}" in printed.splitlines()[-1]
    status, printed, _ = command("classmix", "--resume", out / "last.pt")
    assert status == 0 and "finished already" in printed


@pytest.mark.parametrize("flags", [(), ("--supervised",), ("--mask", "cow", "--sigma-range", 2, 4)])
def test_training_lowers_the_loss(command, camvid, tmp_path, flags):
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 4, *TINY)
    command("classmix", *args, "--iterations", 60, "--output-dir", tmp_path / "run", *flags)
    losses = [entry for entry in read_log(tmp_path / "run") if "loss_l" in entry]
    assert losses[-1]["loss_l"] < 0.7 * losses[0]["loss_l"]
    assert all(("loss_u" in entry) == (flags != ("--supervised",)) for entry in losses)


FLAGS = [
    ("--mask", "cut", "--weighting", "pixel"),
    ("--weight-scope", "sample", "--unlabeled-loss", "squared-error"),
    ("--weighting", "ramp", "--unlabeled-loss", "soft-cross-entropy", "--optimizer", "sgd"),
    ("--weighting", "constant", "--extra-augmentations", "--nesterov", "--optimizer", "sgd"),
    ("--crop", 32, 48, "--scale-range", 0.5, 1.5, "--flip", "--warmup", 3),
]


@pytest.mark.parametrize("flags", FLAGS)
def test_every_row_of_table_3_trains(command, camvid, tmp_path, flags):
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY)
    status, _, errors = command(
        "classmix", *args, "--iterations", 5, *flags, "--output-dir", tmp_path / "run"
    )
    assert (status, errors) == (0, "")
    assert any(entry.get("loss_u", -1) >= 0 for entry in read_log(tmp_path / "run"))


def test_a_stopped_run_resumes_exactly(command, camvid, tmp_path, monkeypatch):
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY, "--flip")
    args += ("--iterations", 24, "--eval-every", 8, "--warmup", 4, "--extra-augmentations")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command("classmix", *args, "--output-dir", whole)
    log = run.Run.log

    def log_and_kill(self, **values):
        if self.iteration == 12 and self.start == 0 and "loss_l" in values:
            os.kill(os.getpid(), signal.SIGTERM)
        log(self, **values)

    monkeypatch.setattr(run.Run, "log", log_and_kill)
    status, _, errors = command("classmix", *args, "--output-dir", parts)
    assert status == 128 + signal.SIGTERM
    assert errors.count("\n") == 1 and "--resume" in errors and "iteration 13" in errors
    assert not (parts / "result.json").exists()
    status, printed, _ = command("classmix", *args, "--resume", "auto", "--output-dir", parts)
    assert status == 0 and "resumed at iteration 13" in printed
    same_state(whole, parts)
    assert read_log(whole) == read_log(parts)


def test_resume_auto_starts_and_then_finds_the_newest_run(command, camvid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY, "--iterations", 2)
    assert command("classmix", *args, "--resume", "auto")[0] == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("classmix_camvid_3_s0_weights-none") and "width-4" in made.name
    assert "finished already" in command("classmix", *args, "--resume", "auto")[1]
    assert command("classmix", *args)[0] == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {made.name, f"{made.name}-2"}


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(command, camvid, tmp_path):
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY)
    args += (
        "--optimizer",
        "sgd",
        "--lr",
        1e30,
        "--save-every",
        1,
        "--output-dir",
        tmp_path / "run",
    )
    status, _, errors = command("classmix", *args, "--iterations", 20)
    assert status == 2 and errors.count("\n") == 1 and "not finite" in errors
    if (tmp_path / "run/last.pt").exists():
        state = torch.load(tmp_path / "run/last.pt", weights_only=True)["state"]["student"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_folder_trains_and_predicts_pictures_of_any_size(command, folder, tmp_path):
    out = tmp_path / "run"
    args = ("--dataset", "folder", "--data-dir", folder, "--crop", 32, 32, *SMALL)
    status, printed, errors = command("classmix", *args, "--iterations", 4, "--output-dir", out)
    assert (status, errors) == (0, "") and "6 labeled and 4 unlabeled of 10" in printed
    picture = tmp_path / "mine.png"
    Image.fromarray(np.full((51, 37), 90, np.uint8)).save(picture)  # grey: becomes RGB
    status, _, _ = command(
        "classmix", "--predict", out / "last.pt", picture, "--out", tmp_path / "p"
    )
    assert status == 0
    prediction = Image.open(tmp_path / "p/mine.png")
    assert prediction.mode == "P" and prediction.size == (37, 51)
    assert np.asarray(prediction).max() < 3
    assert Image.open(tmp_path / "p/mine_overlay.png").size == (37, 51)
    status, printed, _ = command("classmix", "--evaluate", out / "last.pt", "--full-resolution")
    assert status == 0 and "sky" in printed


def test_tensorboard_gets_what_the_log_gets(command, camvid, tmp_path, monkeypatch):
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY, "--tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, errors = command("classmix", *args, "--output-dir", tmp_path / "no")
    assert status == 2 and "--tensorboard" in errors and not (tmp_path / "no").exists()
    board = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    command("classmix", *args, "--iterations", 2, "--output-dir", tmp_path / "run")
    board.SummaryWriter.assert_called_once_with(tmp_path / "run")
    calls = [call.args for call in board.SummaryWriter.return_value.add_scalar.call_args_list]
    last = read_log(tmp_path / "run")[-1]
    assert ("student", last["student"]["miou"], 2) in calls
    assert {"loss_l", "loss_u", "lambda", "lr", "teacher"} <= {name for name, *_ in calls}


def test_streets_is_the_default(command, tmp_path):
    status, printed, _ = command(
        "classmix",
        "--iterations",
        2,
        "--warmup",
        0,
        "--size",
        32,
        64,
        "--output-dir",
        tmp_path / "run",
    )
    assert status == 0 and "classmix on streets" in printed
    data = open_dataset("streets", None, size=(32, 64))
    assert data.val[0][0].shape == (3, 32, 64) and data.val[0][1].shape == (32, 64)


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def relabel(path, value=77):
    label = np.asarray(Image.open(path)).copy()
    label[5, 5] = value
    Image.fromarray(label).save(path)


BAD_TREES = {
    "no labels": (lambda r: shutil.rmtree(r / "trainannot"), "trainannot"),
    "no pair": (lambda r: (r / "trainannot/004.png").unlink(), "004.png"),
    "no image": (lambda r: (r / "val/001.jpg").unlink(), "001.png"),
    "truncated": (lambda r: truncate(r / "train/002.png"), "002.png"),
    "truncated val": (lambda r: truncate(r / "valannot/002.png"), "valannot/002.png"),
    "empty": (lambda r: (r / "train/002.png").write_bytes(b""), "empty"),
    "id": (lambda r: [relabel(p) for p in (r / "trainannot").iterdir()], "label id 77"),
    "other size": (
        lambda r: Image.new("L", (64, 47)).save(r / "trainannot/001.png"),
        "(64, 47)",
    ),
    "colour label": (
        lambda r: [Image.new("RGB", (64, 48)).save(p) for p in (r / "trainannot").iterdir()],
        "8-bit grey or palette",
    ),
    "16 bit": (
        lambda r: Image.fromarray(np.zeros((48, 64), np.uint16)).save(r / "train/002.png"),
        "002.png",
    ),
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in BAD_TREES), ("truncated", 1), ("id", 1)]
)
def test_bad_data_is_one_line_that_names_the_file(command, camvid, tmp_path, name, workers):
    damage, expected = BAD_TREES[name]
    damage(camvid)
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY)
    args += ("--workers", workers, "--iterations", 6, "--output-dir", tmp_path / "run")
    status, _, errors = command("classmix", *args)
    assert status == 2
    assert errors.startswith("classmix.py: ") and errors.count("\n") == 1 and expected in errors


BAD_FLAGS = [
    (("--labeled", "0"), "--labeled 0"),
    (("--labeled", "9"), "--labeled 9"),
    (("--labeled", "many"), "--labeled many"),
    (("--labeled", "1/0"), "--labeled 1/0"),
    (("--labeled", "7", "--batch-size", "2"), "only 1 unlabeled"),
    (("--batch-size", "1"), "no other to be mixed with"),
    (("--labeled-list", "nowhere.txt"), "--labeled-list"),
    (("--warmup", "9"), "--warmup 9"),
    (("--evaluate", ""), "no such checkpoint"),
    (("--scale-range", "0.5", "2"), "--scale-range"),
    (("--device", "meta"), "meta"),
    (("--batch-size", "-1"), "--batch-size"),
    (("--lr", "nan"), "--lr"),
    (("--ema-decay", "1.5"), "--ema-decay"),
    (("--sigma-range", "0", "4"), "--sigma-range"),
    (("--scale-range", "1.5", "0.5"), "--scale-range: 1.5 is above 0.5"),
    (("--seed", "4294967296"), "--seed"),
    (("--colour",), "--colour"),
    (("--dataset", "mars"), "mars"),
    (("--data-dir", "camvdi"), "camvdi"),
    (("--weights", "/etc/hostname"), "/etc/hostname"),
    (("--weights", "nowhere.pth"), "nowhere.pth"),
    (("--resume", "nowhere.pt"), "nowhere.pt"),
    (("--evaluate", "/etc/hostname"), "/etc/hostname"),
    (("--predict", "nowhere.pt"), "nowhere.pt"),
    (("--device", "cuda:99"), "cuda"),
    (("--device", "gpu"), "gpu"),
    (("--output-dir", "/dev/null/run"), "/dev/null/run"),
]


@pytest.mark.parametrize(("flags", "expected"), BAD_FLAGS)
def test_bad_flags_are_one_line(command, camvid, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY, "--iterations", 1)
    status, printed, errors = command("classmix", *args, *flags)
    assert status == 2 and expected in errors
    assert errors.startswith("classmix.py: ") and errors.count("\n") == 1
    assert not (tmp_path / "runs").exists() and "iteration" not in printed


def test_checkpoints_that_do_not_fit_are_refused(command, camvid, folder, tmp_path):
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY, "--iterations", 1)
    out = tmp_path / "run"
    command("classmix", *args, "--output-dir", out)
    good = torch.load(out / "last.pt", weights_only=True)

    def refused(*flags):
        status, _, errors = command("classmix", *flags)
        assert status == 2 and errors.count("\n") == 1
        return errors

    torch.save({**good, "method": "cowmix"}, tmp_path / "other.pt")
    assert "cowmix" in refused("--resume", tmp_path / "other.pt")
    flags = ("--dataset", "folder", "--data-dir", folder)
    assert "11 classes" in refused("--evaluate", out / "last.pt", *flags)
    assert "--width" in refused("--resume", out / "last.pt", "--width", 8)
    assert "holds a run" in refused(*args, "--output-dir", out)
    torch.save({**good, "labeled_names": ["x"]}, tmp_path / "other.pt")
    assert "training images" in refused("--resume", tmp_path / "other.pt")
    torch.save(good["state"]["student"], tmp_path / "other.pt")
    assert "not a checkpoint" in refused("--evaluate", tmp_path / "other.pt")
