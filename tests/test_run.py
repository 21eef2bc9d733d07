"""The command line of a run: what it leaves, signals, resuming, evaluation, bad input."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, problems, read_log, read_state, same_state, start, stopping_train
from PIL import Image

import classmix
import cowmix
from common import InputError, evaluation, flags, run, warn

SMALL = """--weights none --layers 1 1 1 1 --width 4 --optimizer adam --lr 3e-3 --head-factor 1
--batch-size 2 --workers 0 --aspp-rates 1 2"""
SMALL = tuple(SMALL.split())
NETWORKS = ("student", "teacher")


@pytest.fixture
def args(camvid):
    """Flags of a small run of ClassMix."""
    return ("--dataset", "camvid", "--data-dir", camvid, "--labeled", 3, *SMALL, "--size", 24, 32)


@pytest.fixture
def trained(command, args, tmp_path):
    """The folder of a run of two steps."""
    assert command("classmix", *args, "--iterations", 2, "--output-dir", tmp_path / "run")[0] == 0
    return tmp_path / "run"


@pytest.fixture
def refused(command):
    """refused("--flag", value, ...) -> the one line on stderr with which ClassMix ends."""

    def call(*argv) -> str:
        status, _, errors = command("classmix", *argv)
        assert status == 2 and errors.startswith("classmix.py: ") and errors.count("\n") == 1
        return errors

    return call


# ---- What a run leaves ----


def test_a_run_leaves_everything_a_user_needs(command, args, tmp_path):
    out = tmp_path / "run"
    steps = ("--iterations", 60, "--eval-every", 25, "--output-dir", out)
    status, printed, errors = command("classmix", *args, *steps)
    assert (status, errors) == (0, "") and "3 labeled and 5 unlabeled of 8" in printed
    for word in ("loss_l", "loss_u", "lambda", "steps/s", "left", "GiB", "pedestrian", "student"):
        assert word in printed
    names = (out / "split.txt").read_text().split()
    order = np.random.RandomState(0).permutation(8)[:3]
    assert names == [f"{k:03d}" for k in sorted(order)]
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["size"] == [24, 32] and config["versions"]["torch"]
    losses = [entry["loss_l"] for entry in read_log(out) if "loss_l" in entry]
    assert losses[-1] < 0.7 * losses[0]
    evaluations = [entry for entry in read_log(out) if "student" in entry]
    assert [entry["iteration"] for entry in evaluations] == [25, 50, 60]
    result = json.loads((out / "result.json").read_text())
    assert len(result["teacher"]["iou"]) == 11 and result["steps_per_second"] > 0
    for name in NETWORKS:
        assert result[name] == evaluations[-1][name]
        scores = {entry["iteration"]: entry[name]["miou"] for entry in evaluations}
        best = result["best"][name]
        assert best["miou"] == max(scores.values()) == scores[best["iteration"]]
    assert {p.name for p in (out / "samples").iterdir()} == {f"{k:06d}.png" for k in (25, 50, 60)}
    status, printed, _ = command("classmix", "--evaluate", out / "last.pt")
    means = [float(text) for text in printed.splitlines()[-1].split()[1:]]
    assert means == [round(100 * result[name]["miou"], 2) for name in NETWORKS]
    status, printed, _ = command("classmix", "--resume", out / "last.pt")
    assert status == 0 and "finished already" in printed


def test_streets_is_the_default(command, tmp_path):
    short = ("--iterations", 2, "--warmup", 0, "--size", 32, 64, "--output-dir", tmp_path / "run")
    status, printed, _ = command("classmix", *short)
    assert status == 0 and "classmix on streets" in printed


def test_tensorboard_gets_what_the_log_gets(command, args, refused, tmp_path, monkeypatch):
    args = (*args, "--tensorboard", "--iterations", 2, "--output-dir", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "--tensorboard" in refused(*args) and not (tmp_path / "run").exists()
    board = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    command("classmix", *args)
    board.SummaryWriter.assert_called_once_with(tmp_path / "run")
    calls = [call.args for call in board.SummaryWriter.return_value.add_scalar.call_args_list]
    last = read_log(tmp_path / "run")[-1]
    assert ("student", last["student"]["miou"], 2) in calls
    assert {"loss_l", "loss_u", "lambda", "lr", "teacher"} <= {name for name, *_ in calls}


FLAGS_OF_A_STEP = """
--seed 1 | --split-seed 2 | --supervised | --size 32 32 | --crop 16 24 | --flip
--batch-size 4 | --warmup 2 | --optimizer sgd | --lr 0.04 | --head-factor 2 | --lr-power 1
--optimizer sgd --momentum 0.5 | --optimizer sgd --nesterov | --weight-decay 0.1 | --mask cow
--mask cut | --mask cow --sigma-range 2 3 | --weighting pixel | --weighting ramp
--weighting ramp --ramp-iterations 3 | --weighting constant | --weight-scope sample
--confidence-threshold 0.35 | --unlabeled-loss soft-cross-entropy | --unlabeled-loss squared-error
--extra-augmentations | --extra-augmentations --jitter 0.5
--extra-augmentations --blur-sigma 2 3 --blur-probability 1
--extra-augmentations --jitter-probability 1 | --scale-range 0.5 1.5 --crop 24 32
--ema-decay 0.1 | --supervised --ema-decay 0.1
"""


def test_every_flag_of_classmix_reaches_the_step(command, args, tmp_path):
    """No two of these runs end with the same student, but for the last two."""
    students, teachers = {}, {}
    steps = ("--iterations", 4, "--warmup", 1, "--no-flip", "--confidence-threshold", 0.4)
    texts = ["", *FLAGS_OF_A_STEP.strip().replace("\n", " | ").split(" | ")]
    for text in texts:
        out = tmp_path / (text or "plain").replace(" ", "_")
        status, _, errors = command("classmix", *args, *steps, "--output-dir", out, *text.split())
        assert (status, errors) == (0, ""), text
        for networks, name in ((students, "student"), (teachers, "teacher")):
            parts = [tensor.flatten().double() for tensor in read_state(out)[name].values()]
            networks[text] = torch.cat(parts).numpy().tobytes()
    assert len(set(teachers.values())) == len(texts)
    assert students.pop(texts[-1]) == students["--supervised"]  # the teacher labels nothing
    assert len(set(students.values())) == len(texts) - 1


# ---- Signals, checkpoints and errors ----


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)])
def test_the_second_signal_does_not_wait_for_the_step(command, args, tmp_path, monkeypatch, numbers):
    monkeypatch.setattr(classmix, "train", stopping_train("classmix", 3, *numbers))
    out = tmp_path / "a run"
    status, _, errors = command("classmix", *args, "--save-every", 2, "--output-dir", out)
    saved = torch.load(out / "last.pt", weights_only=True)["iteration"]
    if len(numbers) == 1:
        line = "stopped by SIGINT after iteration 3; go on with python classmix.py"
        assert errors == f"classmix.py: {line} --resume '{out / 'last.pt'}'\n"
        assert (status, saved) == (130, 3)
    else:
        assert errors == "classmix.py: stopped by SIGTERM\n" and (status, saved) == (143, 2)
    assert not (out / "result.json").exists()


@pytest.mark.parametrize("everyone", [False, True])
def test_loader_processes_leave_with_one_line(args, tmp_path, everyone):
    """A terminal sends its signal to every process of the group, kill only to one."""
    long = ("--workers", 2, "--iterations", 100_000, "--save-every", 90_000)
    long += ("--eval-every", 90_000, "--output-dir", tmp_path / "run")
    process = start("classmix.py", *args, *long, start_new_session=True)
    while "loss_u" not in process.stdout.readline() and process.poll() is None:
        pass
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    (line,) = problems(errors)
    assert process.returncode == 143 and "--resume" in line and (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("file: bad"), 2, "file: bad"),
        (InputError("Traceback\n in a worker\ncommon.InputError: bad"), 2, "bad"),
        (OSError(28, "No space left"), 2, "[Errno 28] No space left"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),  # while data or weights are read
    ],
)
def test_a_command_ends_with_one_line(command, monkeypatch, error, status, line):
    def train(*_):
        if isinstance(error, Exception):
            raise error
        signal.raise_signal(error)

    monkeypatch.setattr(cowmix, "train", train)
    assert command("cowmix") == (status, "", f"cowmix.py: {line}\n")


def test_a_full_disk_leaves_the_last_checkpoint(command, args, tmp_path, monkeypatch):
    """Files may not grow beyond 4 kB after the first checkpoint."""

    class Filling(run.Session):
        def end_step(self, iteration, pictures):
            if iteration == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            super().end_step(iteration, pictures)

    out, train, limits = tmp_path / "run", classmix.train, resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(classmix, "train", lambda *what: train(*what, make_session=Filling))
    flags = ("--save-every", 2, "--iterations", 8, "--output-dir", out)
    try:
        status, _, errors = command("classmix", *args, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and errors.startswith(f"classmix.py: {out}/last.pt: cannot be written")
    assert errors.count("\n") == 1 and not list(out.glob("*.partial"))
    assert torch.load(out / "last.pt", weights_only=True)["iteration"] == 2


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(refused, args, tmp_path):
    flags = ("--optimizer", "sgd", "--lr", 1e30, "--iterations", 20, "--save-every", 1)
    line = refused(*args, *flags, "--output-dir", tmp_path / "run")
    assert "is not finite at iteration" in line and "lower --lr?" in line
    if (tmp_path / "run/last.pt").exists():
        student = read_state(tmp_path / "run")["student"]
        assert all(tensor.isfinite().all() for tensor in student.values())


def test_a_checkpoint_is_written_before_it_is_evaluated(command, args, tmp_path, monkeypatch):
    saved, evaluate = [], evaluation.evaluate

    def evaluating(*what):
        saved.append(torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"])
        return evaluate(*what)

    monkeypatch.setattr(evaluation, "evaluate", evaluating)
    flags = ("--save-every", 99, "--iterations", 5, "--eval-every", 2)
    assert command("classmix", *args, *flags, "--output-dir", tmp_path / "run")[0] == 0
    assert saved == [2, 4, 4]  # the end of the run saves after its evaluation


HIDING = """
import os, signal, sys
import fcntl, numpy, PIL.Image, scipy.io, torch, torchvision
access, sync = fcntl.fcntl, os.fsync
def windows_sync(file):
    if access(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    sync(file)
os.fsync = windows_sync
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGXFSZ", "alarm", "setitimer"):
    delattr(signal, name)
for name in ("setpgrp", "getpgrp", "setpgid", "getpgid", "setsid", "killpg", "fork", "statvfs",
             "geteuid", "getuid", "nice", "sched_getaffinity", "uname"):
    delattr(os, name)
sys.path.insert(0, os.getcwd())
import classmix
classmix.main()
"""


def test_one_process_needs_nothing_that_only_posix_has(args, tmp_path):
    run = start("-c", HIDING, *args, "--iterations", 2, "--output-dir", tmp_path / "run")
    printed, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and problems(errors) == [] and "headline" in printed, errors
    run = start("-c", HIDING, "--evaluate", tmp_path / "run/last.pt")
    printed, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and problems(errors) == [] and "mIoU" in printed, errors


def test_ranks_but_the_first_do_not_warn(monkeypatch, capsys):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        warn(f"by {rank}")
    assert capsys.readouterr().err == "warning: by 0\n"


# ---- Folders, resuming ----


def test_numbered_folders_and_resume_auto(command, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = (*args, "--iterations", 2)
    assert command("classmix", *args, "--resume", "auto")[0] == 0  # nothing there: a new run
    (made,) = Path("runs").iterdir()
    assert made.name.startswith("classmix_camvid_3_s0_weights-none_")
    assert "finished already" in command("classmix", *args, "--resume", "auto")[1]
    before = (made / "last.pt").stat().st_mtime_ns
    for name in (f"{made.name}-2", f"{made.name}-3"):
        assert command("classmix", *args)[0] == 0 and (Path("runs") / name / "last.pt").exists()
    last = f"{made}-3/last.pt"
    assert f"output in {made}-3\n" in command("classmix", *args, "--resume", "auto")[1]
    os.remove(last)  # a run that was killed before its first checkpoint
    assert f"output in {made}-2\n" in command("classmix", *args, "--resume", "auto")[1]
    assert (made / "last.pt").stat().st_mtime_ns == before


PARSED = [
    ("", "cityscapes_1-8_s0"),
    ("--labeled 100 --seed 3", "cityscapes_100_s3"),
    ("--labeled 1/30 --split-seed 2 --supervised", "cityscapes_1-30_s0_split-seed-2_supervised"),
    ("--labeled-list lists/one.txt", "cityscapes_one_s0"),
    ("--weights w/coco.pth --no-flip --lr 2.5e-4", "cityscapes_1-8_s0_weights-coco"),
    ("--flip --size 64 128", "cityscapes_1-8_s0_flip_size-64x128"),
    ("--workers 3 --save-every 7 --device cpu --eval-every 2", "cityscapes_1-8_s0"),
]


@pytest.mark.parametrize(("given", "name"), PARSED)
def test_folders_name_what_differs_from_the_recipe(tmp_path, monkeypatch, given, name):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", "cityscapes", *given.split()]
    _, args = flags.parse_args("classmix", "", classmix.RECIPES, argv=argv)
    assert args.output_dir == Path(f"runs/classmix_{name}")


def test_the_size_takes_the_crop_of_images_of_any_size_away():
    def crop(*argv):
        argv = ["--dataset", "voc", *argv]
        recipe, _ = flags.parse_args("classmix", "", classmix.RECIPES, argv=argv)
        return recipe.crop, recipe.scale_range

    assert crop() == ((321, 321), (0.5, 1.5)) and crop("--size", "64", "64") == (None, (1.0, 1.0))
    assert crop("--size", "64", "64", "--crop", "32", "32") == ((32, 32), (0.5, 1.5))


def test_help_names_every_flag_and_the_presets(command):
    status, printed, errors = command("classmix", "--help")
    text = " ".join(printed.split())
    assert (status, errors) == (0, "") and "ClassMix" in text
    for field in classmix.RECIPES["streets"].__dataclass_fields__:
        assert f"--{field.replace('_', '-')} " in text
    assert "learning rate of the backbone [cityscapes, voc, camvid, bdd100k, folder: 0.00025;" in text
    assert "[default: 0.9]" in text and "[default: False]" in text


def test_resuming_needs_neither_weights_nor_list_and_spares_other_runs(
    command, refused, args, tmp_path, monkeypatch
):
    state = classmix.network(classmix.RECIPES["streets"], 11, pretrained=False).state_dict()
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "list.txt").write_text("001\n004\n006\n")
    place = args.index("--labeled")
    args = (*args[:place], "--labeled-list", tmp_path / "list.txt", *args[place + 2 :])
    args += ("--width", 16, "--weights", tmp_path / "w.pth", "--iterations", 3)
    out, other, moved = tmp_path / "run", tmp_path / "other", tmp_path / "moved"
    with monkeypatch.context() as patch:
        patch.setattr(classmix, "train", stopping_train("classmix", 2, signal.SIGINT))
        assert command("classmix", *args, "--eval-every", 2, "--output-dir", out)[0] == 130
    assert command("classmix", *args, "--seed", 3, "--output-dir", other)[0] == 0
    (tmp_path / "w.pth").unlink()
    (tmp_path / "list.txt").unlink()
    before = (other / "last.pt").read_bytes()
    resume = ("--resume", out / "last.pt", "--output-dir")
    assert "holds a run" in refused(*resume, other) and (other / "last.pt").read_bytes() == before
    assert command("classmix", *resume, moved)[0] == 0
    assert (moved / "split.txt").read_text() == "001\n004\n006\n"
    assert (moved / "config.json").exists() and (moved / "result.json").exists()
    assert read_log(moved)[-1]["iteration"] == 3


def test_checkpoints_that_do_not_fit_are_refused(refused, args, trained, folder, tmp_path):
    last, other = trained / "last.pt", tmp_path / "other.pt"
    good = torch.load(last, weights_only=True)
    torch.save({**good, "method": "cowmix"}, other)
    assert "cowmix" in refused("--resume", other)
    flags = ("--dataset", "folder", "--data-dir", folder)
    assert "11 classes" in refused("--evaluate", last, *flags)
    assert "--width" in refused("--resume", last, "--width", 8)
    assert "holds a run" in refused(*args, "--output-dir", trained)
    assert "does not fit" in refused("--evaluate", last, "--width", 8)
    torch.save({**good, "labeled_names": ["x"]}, other)
    assert "training images" in refused("--resume", other)
    torch.save(good["state"]["student"], other)
    assert "not a checkpoint" in refused("--evaluate", other)
    torch.save({**good, "recipe": {**good["recipe"], "old": 1}}, other)
    assert "another version" in refused("--evaluate", other)


# ---- Evaluating and predicting ----


def test_evaluation_at_full_resolution_and_on_another_data_set(
    command, refused, trained, tmp_path, monkeypatch
):
    flags = ("--evaluate", trained / "last.pt")
    resized, full = (command("classmix", *flags, *more)[1] for more in ((), ("--full-resolution",)))
    assert "labels at 24x32" in resized and "labels at their own size" in full
    assert resized.splitlines()[1:] != full.splitlines()[1:]
    monkeypatch.chdir(tmp_path)  # the folder of the first data set is not looked into
    line = refused(*flags, "--dataset", "bdd100k")
    assert f"--data-dir {Path('data/bdd100k')}: no such folder" in line


def test_folder_trains_and_predicts_pictures_of_any_size(command, folder, tmp_path):
    out = tmp_path / "run"
    args = ("--dataset", "folder", "--data-dir", folder, "--crop", 32, 32, *SMALL)
    status, printed, errors = command("classmix", *args, "--iterations", 4, "--output-dir", out)
    assert (status, errors) == (0, "") and "6 labeled and 4 unlabeled of 10" in printed
    picture, predicted = tmp_path / "mine.png", []
    noise = np.random.default_rng(0).integers(0, 256, (51, 37)).astype(np.uint8)
    Image.fromarray(noise).save(picture)  # grey: becomes RGB
    good = torch.load(out / "last.pt", weights_only=True)
    for other in NETWORKS:  # the headline of ClassMix is the student
        state = {name: good["state"][other] for name in NETWORKS} | {"teacher": {}}
        if other == "student":
            state["teacher"] = good["state"]["teacher"]
        torch.save({**good, "state": state}, tmp_path / "other.pt")
        flags = ("--predict", tmp_path / "other.pt", picture, "--out", tmp_path / other)
        assert command("classmix", *flags)[0] == 0
        predicted.append(Image.open(tmp_path / other / "mine.png"))
    assert predicted[0].mode == "P" and predicted[0].size == (37, 51)
    assert np.asarray(predicted[0]).max() < 3
    assert not np.array_equal(*map(np.asarray, predicted))
    assert Image.open(tmp_path / "student/mine_overlay.png").size == (37, 51)
    status, printed, _ = command("classmix", "--evaluate", out / "last.pt", "--full-resolution")
    assert status == 0 and "sky" in printed


def test_predictions_never_overwrite_a_picture(refused, camvid, trained, tmp_path):
    before = (camvid / "train/000.png").read_bytes()
    picture, overlay = tmp_path / "own.png", tmp_path / "own_overlay.png"
    picture.write_bytes(before)
    overlay.write_bytes(before)
    flags = ("--predict", trained / "last.pt")
    assert "overwrite" in refused(*flags, picture, "--out", tmp_path)
    assert picture.read_bytes() == overlay.read_bytes() == before
    out = tmp_path / "out"
    assert "overwrite" in refused(*flags, picture, overlay, "--out", out) and not out.exists()


# ---- Bad input ----


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
def test_bad_data_is_one_line_that_names_the_file(refused, args, camvid, tmp_path, name, workers):
    damage, expected = BAD_TREES[name]
    damage(camvid)
    flags = ("--workers", workers, "--iterations", 6, "--output-dir", tmp_path / "run")
    assert expected in refused(*args, *flags)


BAD_FLAGS = """
--labeled 0 | --labeled 0
--labeled 9 | --labeled 9
--labeled many | --labeled many
--labeled 1/0 | --labeled 1/0
--labeled 7 --batch-size 2 | only 1 unlabeled
--labeled 3 --labeled-list nowhere.txt | not allowed with
--batch-size 1 | --batch-size 1: mixing needs at least 2 unlabeled images
--batch-size 6 --accumulate 4 | --batch-size 6: cannot be split into 4
--batch-size 2 --accumulate 2 | --batch-size 2: mixing needs
--warmup 9 | 1 iterations, but 9 of them are warm-up
--evaluate  | no such checkpoint
--scale-range 0.5 2 | --scale-range: needs --crop
--nesterov --momentum 0 | --nesterov: needs --momentum
--full-resolution | --full-resolution: only goes with --evaluate
--scale-range 1.5 0.5 | --scale-range: 1.5 is above 0.5
--colour | --colour
--out | --out
--itera 3 | --itera
--dataset mars | mars
--data-dir camvdi | camvdi
--weights /etc/hostname | /etc/hostname
--weights nowhere.pth | nowhere.pth
--resume nowhere.pt | nowhere.pt
--evaluate /etc/hostname | /etc/hostname
--resume a.pt --evaluate b.pt | not allowed with
--predict nowhere.pt | nowhere.pt
--device cuda:99 | cuda
--device gpu | gpu
--device meta | meta
--output-dir /dev/null/run | /dev/null/run
--batch-size 0 | 0 is not a number from 1
--batch-size 2.5 | --batch-size
--warmup -1 | -1 is not a number from 0
--seed 4294967296 | 4294967296 is not a number from 0 to 4294967295
--lr -1 | -1 is not a number from 0
--lr nan | nan is not a number
--lr inf | inf is not a number
--ema-decay 1.5 | 1.5 is not a number from 0 to 1
--sigma-range 0 4 | 0 is not a number from 1e-09
--size 24 | --size
--layers 1 1 1 0 | 0 is not a number from 1
--mask box | --mask
"""


@pytest.mark.parametrize("line", BAD_FLAGS.strip().split("\n"))
def test_bad_flags_are_one_line(refused, args, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    given, expected = line.split(" | ")
    given = given.split(" ")
    if "--labeled-list" not in given and "--labeled" not in given:
        given = ["--labeled", "3", *given]
    place = args.index("--labeled")
    args = (*args[:place], *args[place + 2 :], "--iterations", 1)
    assert expected in refused(*args, *given)
    assert not (tmp_path / "runs").exists()


def test_networks_are_compiled_where_they_can_be(monkeypatch, capsys):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    for compiler in ("/usr/bin/gcc", None):
        monkeypatch.setattr(shutil, "which", lambda _, found=compiler: found)
        _, args = flags.parse_args("classmix", "", classmix.RECIPES, argv=[])
        assert args.device == torch.device("cuda:0") and args.precision == "bf16"
        assert args.compile == (compiler is not None)
        assert capsys.readouterr().err.startswith("warning: no C compiler") != args.compile
