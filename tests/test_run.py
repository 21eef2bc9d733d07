"""The command line from start to finish: runs, resuming, interrupts, evaluation, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import classmix
from common import evaluation, flags, record, run
from common.datasets import open_dataset

ROOT = Path(__file__).parents[1]
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
    for name in ("student", "teacher"):
        scores = {entry["iteration"]: entry[name]["miou"] for entry in evaluations}
        best = result["best"][name]
        assert best["miou"] == max(scores.values()) == scores[best["iteration"]]
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
    "label as JPEG": (
        lambda r: [Image.open(p).save(p, "JPEG") for p in (r / "trainannot").iterdir()],
        "palette PNG",
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
    (("--scale-range", "0.5", "2"), "--scale-range: needs --crop"),
    (("--full-resolution",), "--full-resolution: goes with --evaluate"),
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


def test_networks_are_compiled_where_they_can_be(monkeypatch, capsys):
    monkeypatch.setattr(flags, "_device", lambda _: torch.device("cuda"))
    monkeypatch.delenv("CC", raising=False)
    for compiler in ("/usr/bin/gcc", None):
        monkeypatch.setattr(flags, "which", lambda _, found=compiler: found)
        _, args = flags.parse_args("classmix", "", classmix.RECIPES, argv=[])
        assert args.precision == "bf16" and args.compile == (compiler is not None)
        assert capsys.readouterr().err.startswith("warning: no C compiler") != args.compile


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


def weights_after(command, camvid, out, *flags):
    """The student after 4 steps from the second on with unlabeled data, and the teacher."""
    base = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 4, "--output-dir", out)
    small = ("--weights", "none", "--layers", 1, 1, 1, 1, "--width", 4, "--workers", 0)
    steps = ("--size", 48, 64, "--iterations", 4, "--warmup", 1, "--eval-every", 4, "--lr", 0.05)
    sure = () if "--confidence-threshold" in flags else ("--confidence-threshold", 0.6)
    status, _, errors = command("classmix", *base, *small, *steps, *sure, *flags)
    assert (status, errors) == (0, "")
    state = torch.load(out / "last.pt", weights_only=True)["state"]
    return [torch.cat([v.flatten().float() for v in state[n].values()]) for n in NETWORKS]


NETWORKS = ("student", "teacher")
FLAGS_OF_A_STEP = """
--seed 1 | --split-seed 2 | --supervised | --size 64 64 | --crop 32 48 | --no-flip
--batch-size 4 | --warmup 2 | --optimizer adam | --lr 0.04 | --head-factor 1 | --lr-power 1
--momentum 0.5 | --nesterov | --weight-decay 0.1 | --mask cow | --mask cut
--weighting pixel | --weighting ramp | --weighting constant | --weight-scope sample
--confidence-threshold 0.5 | --unlabeled-loss soft-cross-entropy
--unlabeled-loss squared-error | --extra-augmentations | --scale-range 0.5 1.5 --crop 48 64
"""


@pytest.mark.parametrize("flags", FLAGS_OF_A_STEP.strip().replace("\n", " | ").split(" | "))
def test_every_flag_reaches_the_step(command, camvid, tmp_path, flags):
    plain = weights_after(command, camvid, tmp_path / "plain")[0]
    changed = weights_after(command, camvid, tmp_path / "changed", *flags.split())[0]
    assert not torch.equal(plain, changed)


def test_the_ema_decay_reaches_the_teacher_alone(command, camvid, tmp_path):
    student, teacher = weights_after(command, camvid, tmp_path / "a")
    other_student, other_teacher = weights_after(
        command, camvid, tmp_path / "b", "--ema-decay", 0.1
    )
    assert not torch.equal(teacher, other_teacher) and not torch.equal(student, other_student)
    flags = ("--supervised", "--ema-decay", 0.1)
    student, teacher = weights_after(command, camvid, tmp_path / "c", "--supervised")
    other_student, other_teacher = weights_after(command, camvid, tmp_path / "d", *flags)
    assert not torch.equal(teacher, other_teacher) and torch.equal(student, other_student)


def test_what_the_loop_hands_over(command, camvid, tmp_path, monkeypatch):
    losses, updates, drawn, seeds = [], [], [], []
    loss, update, batches = classmix.classmix_loss, classmix.update_teacher, run.Batches
    step_seed = run.Run.step_seed

    def spy_loss(student, teacher, image, **options):
        losses.append((student.training, teacher.training))
        return loss(student, teacher, image, **options)

    def spy_update(teacher, student, **options):
        updates.append(options)
        update(teacher, student, **options)

    def spy_batches(*what, **options):
        drawn.append(what[1])
        return batches(*what, **options)

    def spy_seed(self, purpose):
        seeds.append(step_seed(self, purpose))
        return seeds[-1]

    monkeypatch.setattr(classmix, "classmix_loss", spy_loss)
    monkeypatch.setattr(classmix, "update_teacher", spy_update)
    monkeypatch.setattr(run, "Batches", spy_batches)
    monkeypatch.setattr(run.Run, "step_seed", spy_seed)
    weights_after(command, camvid, tmp_path / "run")
    assert losses == [(True, True)] * 3
    decays = pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])
    assert [options["decay"] for options in updates] == decays
    assert {options["buffers"] for options in updates} == {"copy"}
    labeled, unlabeled = drawn
    assert len(labeled) == len(unlabeled) == 4 and sorted(labeled + unlabeled) == list(range(8))
    assert len(set(seeds)) == len(seeds) == 6  # masks and colour of three steps


def test_full_resolution_and_the_headline(command, camvid, tmp_path, monkeypatch):
    weights_after(command, camvid, tmp_path / "run", "--size", 24, 32)
    asked, opened = [], evaluation.open_dataset

    def spy_open(*what, **options):
        asked.append(options)
        return opened(*what, **options)

    monkeypatch.setattr(evaluation, "open_dataset", spy_open)
    flags = ("--evaluate", tmp_path / "run/last.pt")
    plain, full = (command("classmix", *flags, *more)[1] for more in ((), ("--full-resolution",)))
    assert [options["full_labels"] for options in asked] == [False, True] and plain != full
    loaded = []
    monkeypatch.setattr(evaluation, "predict", lambda network, *_: loaded.append(network) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        picture = camvid / "train/000.png"
        command("classmix", "--predict", tmp_path / "run/last.pt", picture, "--out", tmp_path)
    student = torch.load(tmp_path / "run/last.pt", weights_only=True)["state"]["student"]
    assert torch.equal(loaded[0].state_dict()["conv1.weight"], student["conv1.weight"])


def test_another_data_set_is_not_looked_for_in_the_folder_of_the_first(
    command, camvid, tmp_path, monkeypatch
):
    weights_after(command, camvid, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    flags = ("--evaluate", tmp_path / "run/last.pt", "--dataset", "bdd100k")
    status, _, errors = command("classmix", *flags)
    assert status == 2 and f"--data-dir {Path('data/bdd100k')}: no such folder" in errors


def test_what_is_written_atomically_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, sync, move = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("sync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("move") or move(*paths))
    record.write_atomically(tmp_path / "file", lambda path: path.write_text("x"))
    assert calls == ["sync", "move"] and (tmp_path / "file").read_text() == "x"


def test_predictions_never_overwrite_a_picture(command, camvid, tmp_path):
    weights_after(command, camvid, tmp_path / "run")
    picture = tmp_path / "own.png"
    picture.write_bytes((camvid / "train/000.png").read_bytes())
    before = picture.read_bytes()
    flags = ("--predict", tmp_path / "run/last.pt")
    status, _, errors = command("classmix", *flags, picture, "--out", tmp_path)
    assert status == 2 and "overwrite" in errors and picture.read_bytes() == before
    (tmp_path / "own_overlay.png").write_bytes(before)
    both = (picture, tmp_path / "own_overlay.png")
    status, _, errors = command("classmix", *flags, *both, "--out", tmp_path / "out")
    assert status == 2 and "overwrite" in errors and not (tmp_path / "out").exists()


def test_resuming_needs_neither_weights_file_nor_list_and_spares_other_runs(
    command, camvid, tmp_path
):
    state = classmix.network(classmix.RECIPES["streets"], 11, False).state_dict()
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "list.txt").write_text("001\n004\n006\n")
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled-list", tmp_path / "list.txt")
    args += (*TINY, "--width", 16, "--weights", tmp_path / "w.pth", "--iterations", 3)
    out, other = tmp_path / "run", tmp_path / "other"
    assert command("classmix", *args, "--output-dir", out)[0] == 0
    assert command("classmix", *args, "--seed", 3, "--output-dir", other)[0] == 0
    (tmp_path / "w.pth").unlink()
    (tmp_path / "list.txt").unlink()
    assert command("classmix", "--resume", out / "last.pt")[0] == 0
    before = (other / "last.pt").read_bytes()
    status, _, errors = command("classmix", "--resume", out / "last.pt", "--output-dir", other)
    assert status == 2 and "holds a run" in errors and (other / "last.pt").read_bytes() == before
    moved = tmp_path / "moved"
    assert command("classmix", "--resume", out / "last.pt", "--output-dir", moved)[0] == 0
    assert (moved / "config.json").exists() and (
        moved / "split.txt"
    ).read_text() == "001\n004\n006\n"


def problems(errors: str) -> list[str]:
    """Lines on stderr but for the warning that this is not the whole of CamVid."""
    return [line for line in errors.splitlines() if not line.startswith("warning: --data-dir")]


@pytest.mark.parametrize("everyone", [False, True])
def test_loader_processes_leave_with_one_line(camvid, tmp_path, everyone):
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *TINY, "--workers", 2)
    args += ("--iterations", 100_000, "--save-every", 90_000, "--eval-every", 90_000)
    command = [sys.executable, ROOT / "classmix.py", *args, "--output-dir", tmp_path / "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, command)], **pipes, start_new_session=True)
    while "loss_u" not in process.stdout.readline() and process.poll() is None:
        pass
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(problems(errors)) == 1 and "--resume" in errors
    assert (tmp_path / "run/last.pt").exists()


def test_bad_data_in_a_loader_process_is_one_line(camvid, tmp_path):
    truncate(camvid / "train/002.png")
    args = ("--dataset", "camvid", "--data-dir", camvid, "--labeled", "1.0", *TINY, "--workers", 2)
    command = [sys.executable, ROOT / "classmix.py", *args, "--output-dir", tmp_path / "run"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(problems(done.stderr)) == 1 and "002.png" in done.stderr
