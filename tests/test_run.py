"""The command line of a run: what it leaves, signals, resuming, evaluation, bad input."""

import json
import os
import re
import resource
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, finish, problems, read_log, read_state, start, stopping_train
from PIL import Image

import classmix
from common import flags, run
from common.datasets import DEFAULTS

SMALL = """--weights none --layers 1 1 1 1 --width 4 --optimizer adam --lr 3e-3 --head-factor 1
--batch-size 2 --workers 0 --aspp-rates 1 2"""
NETWORKS = ("student", "teacher")


@pytest.fixture
def args(camvid):
    """Flags of a small run of ClassMix; the last two choose the labeled images."""
    data = ("--dataset", "camvid", "--data-dir", camvid, "--size", 24, 32)
    return (*data, *SMALL.split(), "--labeled", 3)


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


def parse(*argv):
    """The recipe and the other settings of a ClassMix command."""
    return flags.parse_args("classmix", "", classmix.RECIPES, argv=list(map(str, argv)))


# ---- What a run leaves ----


def test_a_run_leaves_everything_a_user_needs(command, args, tmp_path, monkeypatch):
    out = tmp_path / "run"
    steps = ("--iterations", 60, "--eval-every", 25, "--save-every", 99, "--output-dir", out)
    status, printed, errors = command("classmix", *args, *steps)
    assert (status, errors) == (0, "") and "3 labeled and 5 unlabeled of 8" in printed
    assert "lambda" in printed and "steps/s" in printed and "pedestrian" in printed
    names = (out / "split.txt").read_text().split()
    assert names == [f"{k:03d}" for k in sorted(np.random.RandomState(0).permutation(8)[:3])]
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["size"] == [24, 32] and config["versions"]["torch"]
    losses = [entry["loss_l"] for entry in read_log(out) if "loss_l" in entry]
    assert losses[-1] < 0.7 * losses[0]
    evaluations = [entry for entry in read_log(out) if "student" in entry]
    assert [entry["iteration"] for entry in evaluations] == [25, 50, 60]
    assert {p.name for p in (out / "samples").iterdir()} == {f"{k:06d}.png" for k in (25, 50, 60)}
    result = json.loads((out / "result.json").read_text())
    assert len(result["teacher"]["iou"]) == 11 and result["steps_per_second"] > 0
    for name in NETWORKS:
        assert result[name] == evaluations[-1][name]
    printed = command("classmix", "--evaluate", out / "last.pt")[1]
    means = [float(text) for text in printed.splitlines()[-1].split()[1:]]
    assert means == [round(100 * result[name]["miou"], 2) for name in NETWORKS]
    status, printed, _ = command("classmix", "--resume", out / "last.pt")
    assert status == 0 and "resumed after iteration 60" in printed


def test_tensorboard_gets_what_the_log_gets(command, args, refused, tmp_path, monkeypatch):
    args = (*args, "--tensorboard", "--iterations", 2, "--output-dir", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert "tensorboard" in refused(*args) and not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board := mock.MagicMock())
    command("classmix", *args)
    calls = [call.args for call in board.SummaryWriter.return_value.add_scalar.call_args_list]
    assert ("student", 100 * read_log(tmp_path / "run")[-1]["student"]["miou"], 2) in calls
    assert {"loss_l", "loss_u", "lambda", "lr", "teacher"} <= {name for name, *_ in calls}


# ---- Signals and errors ----


def test_a_second_signal_does_not_wait_for_the_step(command, args, tmp_path, monkeypatch):
    train = stopping_train("classmix", 3, signal.SIGINT, signal.SIGTERM)
    monkeypatch.setattr(classmix, "train", train)
    end, last = command("classmix", *args, "--save-every", 2, "--output-dir", tmp_path), "last.pt"
    resume = f"continue with --resume {tmp_path / last}"
    assert end[::2] == (143, f"classmix.py: stopped by SIGTERM; {resume}\n")
    assert torch.load(tmp_path / last, weights_only=True)["iteration"] == 2


def test_a_second_signal_waits_for_a_checkpoint(command, args, tmp_path, monkeypatch):
    def save_between_signals(checkpoint, file, save=torch.save):
        for part in (None, checkpoint):
            os.kill(os.getpid(), signal.SIGINT)
            save(part, file)
            file.seek(0)

    monkeypatch.setattr(torch, "save", save_between_signals)
    end = command("classmix", *args, "--save-every", 2, "--output-dir", tmp_path / "run")
    stopped = f"stopped by SIGINT after iteration 3; continue with --resume {tmp_path}/run/last.pt"
    assert end[::2] == (130, f"classmix.py: {stopped}\n")
    assert not list((tmp_path / "run").glob("*.partial")) and read_state(tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_during_imports_is_one_line_of_a_program(method, tmp_path, monkeypatch):
    stop = "import os, signal, time\n"
    stop += "if signal.getsignal(2) == signal.SIG_IGN:  # inherited from a background job\n"
    stop += "    signal.signal(2, signal.default_int_handler)\n"
    stop += "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    for name in ("torch", "numpy", "torchvision"):
        (tmp_path / f"{name}.py").write_text(stop)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
    assert finish(start(f"{method}.py")) == (130, "", "stopped by SIGINT\n")
    errors = finish(start("-c", f"import {method}"))[2]
    assert errors.endswith("\nKeyboardInterrupt\n")  # a notebook keeps its own handling


FAULTY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import classmix
def fail(*_, **__):
    raise RuntimeError("out of memory")
classmix.update_teacher = fail
classmix.main()
"""


@pytest.mark.parametrize("end", ["signal", "signal to all", "damaged images", "bug"])
def test_loader_processes_end_with_the_command(args, camvid, tmp_path, end):
    """A terminal sends its signal to every process of the group, kill only to one."""
    if end == "damaged images":
        for path in (camvid / "train").iterdir():
            path.write_bytes(path.read_bytes()[:60])
    script = ("-c", FAULTY) if end == "bug" else ("classmix.py",)
    long = ("--workers", 2, "--iterations", 100_000, "--save-every", 90_000)
    long += ("--eval-every", 90_000, "--output-dir", tmp_path / "run")
    process = start(*script, *args, *long)
    if end.startswith("signal"):
        while "loss_u" not in process.stdout.readline() and process.poll() is None:
            pass
        (os.killpg if "all" in end else os.kill)(process.pid, signal.SIGTERM)
    status, _, errors = finish(process)
    if end == "bug":
        assert status == 1 and errors.endswith("\nRuntimeError: out of memory\n")
        return
    (line,) = problems(errors)
    if end == "damaged images":
        assert status == 2 and line.startswith(f"classmix.py: {camvid}/train/0")
    else:
        assert status == 143 and "--resume" in line and (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "log.jsonl", "samples/000008.png", "result.json", "last.pt", "0.png"]
)
def test_a_full_disk_names_the_file(command, refused, args, camvid, tmp_path, monkeypatch, name):
    """From the moment when this file is opened (of some, their second version), none may grow."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def opened(path, mode="r", open=Path.open, **options):
        second = name not in ("last.pt", "log.jsonl") or (out / name).exists()
        if path.name.startswith(Path(name).name) and second:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        return open(path, mode, **options)

    flags = (*args, "--save-every", 2, "--eval-every", 8, "--iterations", 8, "--output-dir", out)
    if name == "0.png":
        assert command("classmix", *flags)[0] == 0
        Image.new("RGB", (64, 48)).save(camvid / "0.png")
        flags = ("--predict", out / "last.pt", camvid / "0.png", "--out", out)
    monkeypatch.setattr(Path, "open", opened)
    try:
        line = refused(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"classmix.py: {out}/{name}: cannot be written ([Errno 27] File too large)\n"
    assert not [*out.rglob("*.partial")]
    assert (out / name).exists() == (name in ("last.pt", "log.jsonl"))
    if name == "last.pt":
        assert torch.load(out / "last.pt", weights_only=True)["iteration"] == 2


def test_a_teacher_that_is_not_finite_is_not_saved(refused, args, tmp_path, monkeypatch):
    def update(teacher, *_, **__):
        teacher.bn1.running_mean[1] = torch.nan

    monkeypatch.setattr(classmix, "update_teacher", update)
    line = refused(*args, "--save-every", 1, "--iterations", 1, "--output-dir", tmp_path / "run")
    assert "teacher.bn1.running_mean is not finite at step 1" in line
    assert not [*tmp_path.glob("run/*.pt"), *tmp_path.glob("run/result.json")]


@pytest.mark.parametrize("flags", [("--save-every", 1), ()])
def test_a_loss_that_is_not_finite_is_not_saved(refused, args, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(run, "SAVE_AFTER", 0.0)  # by default, a run saves when so much time is over
    steps = ("--optimizer", "sgd", "--lr", 1e10, "--iterations", 20, "--eval-every", 20)
    line = refused(*args, *steps, *flags, "--output-dir", tmp_path / "run")
    assert "is not finite at step" in line and "lower --lr?" in line
    student = read_state(tmp_path / "run")["student"]
    assert all(tensor.isfinite().all() for tensor in student.values())


HIDING = f"""
import fcntl, os, signal, sys
import numpy, PIL.Image, scipy.io, torch, torchvision
mode, sync = fcntl.fcntl, os.fsync
def windows_sync(file):
    if mode(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    sync(file)
os.fsync = windows_sync
for name in "fcntl resource pwd grp termios".split():
    sys.modules[name] = None
for name in "SIGALRM SIGCHLD SIGHUP SIGKILL SIGUSR1 SIGXFSZ alarm setitimer".split():
    delattr(signal, name)
for name in "fork getpgid getpgrp killpg nice sched_getaffinity setpgid setpgrp setsid".split():
    delattr(os, name)
sys.path.insert(0, {str(ROOT)!r})
import classmix
classmix.main()
"""


def test_one_process_needs_nothing_that_only_posix_has(tmp_path):
    """On streets, which is the default."""
    small = ("--size", 32, 64, "--layers", 1, 1, 1, 1, "--width", 4)
    small += ("--iterations", 2, "--warmup", 0)
    end = finish(start("-c", HIDING, *small, "--output-dir", tmp_path / "run"))
    assert end[::2] == (0, "") and "classmix on streets" in end[1] and "in the paper" in end[1]
    end = finish(start("-c", HIDING, "--evaluate", tmp_path / "run/last.pt"))
    assert end[::2] == (0, "") and "mIoU" in end[1]


# ---- Folders, resuming ----


def test_a_folder_holds_one_run_that_auto_finds(command, refused, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = (*args, "--iterations", 2)
    assert command("classmix", *args, "--resume", "auto")[0] == 0  # nothing there: a new run
    (made,) = Path("runs").iterdir()
    before = (made / "last.pt").stat().st_mtime_ns
    printed = command("classmix", *args, "--resume", "auto")[1]
    assert f"output in {made}, resumed after iteration 2: it had ended\n" in printed
    assert f"{made}/last.pt exists: --resume auto" in refused(*args)
    assert (made / "last.pt").stat().st_mtime_ns == before and [*Path("runs").iterdir()] == [made]
    os.remove(made / "last.pt")  # as if killed before its first checkpoint
    assert f"output in {made}\n" in command("classmix", *args, "--resume", "auto")[1]


NAMES = {
    "": "1-8_s0",
    "--labeled 100 --seed 3": "100_s3",
    "--labeled 1/30 --split-seed 2 --supervised": "1-30_s0_split-seed-2_supervised",
    "--labeled-list lists/one": "one_s0",
    "--weights w/coco --no-flip --lr 2.5e-4 --head-factor 10": "1-8_s0_weights-coco",
    "--flip --size 64 128": "1-8_s0_size-64x128_flip",
    "--workers 3 --save-every 7 --device cpu --eval-every 2": "1-8_s0",
}


@pytest.mark.parametrize("given", NAMES)
def test_folders_name_what_differs_from_the_recipe(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    _, args = parse("--dataset", "cityscapes", *given.split())
    assert args.output_dir == Path(f"runs/classmix_cityscapes_{NAMES[given]}")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_shows_one_rewritten_line(command, args, tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: terminal)
    flags = ("--iterations", 3, "--output-dir", tmp_path / "run")
    status, printed, _ = command("classmix", *args, *flags)
    assert status == 0 and ("\033[K\r" in printed) == terminal
    assert printed.count("steps/s") == 3 and ("\033[K\n" in printed) == terminal


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", DEFAULTS)
def test_small_hardware_needs_one_flag_for_each_data_set(method, dataset):
    module = import_module(method)
    rest = (method, "", module.RECIPES, getattr(module, "preset", None))
    argv = ["--dataset", dataset, "--preset", "small"]
    recipe, args = flags.parse_args(*rest, argv)
    assert recipe == module.RECIPES["streets" if dataset == "streets" else "small"]
    assert recipe.width == 16 and recipe.iterations <= 4_000 and args.weights == "none"
    assert "preset-small" in args.output_dir.name and len(args.output_dir.name) < 60
    assert flags.parse_args(*rest, [*argv, "--width", "4"])[0].width == 4


def test_resized_images_of_any_size_need_no_crop():
    for given, crop, scale_range in (
        ("", (321, 321), (0.5, 1.5)),
        ("--size 64 64", None, (1.0, 1.0)),
        ("--size 64 64 --crop 32 32", (32, 32), (0.5, 1.5)),
    ):
        recipe, _ = parse("--dataset", "voc", *given.split())
        assert (recipe.crop, recipe.scale_range) == (crop, scale_range)


def test_help_names_every_flag(command):
    status, printed, errors = command("classmix", "--help")
    assert (status, errors) == (0, "") and "ClassMix" in printed
    for field in classmix.Recipe.__dataclass_fields__:
        assert re.search(f"--{field.replace('_', '-')}[ ,]", printed)
    printed = re.sub(r"\s+", " ", printed)
    assert "backbone [usual: 0.00025; streets, small: 0.006]" in printed
    assert "(4.3) [default: 10000]" in printed


def test_the_recipe_is_printed_with_stars_at_what_differs(args, command, tmp_path):
    args = (*args, "--iterations", 1, "--aspp-rates", *range(1, 50), "--output-dir", tmp_path / "r")
    recipe, usual = vars(parse(*args)[0]), vars(classmix.RECIPES["camvid"])
    printed = command("classmix", *args)[1]
    table = printed[printed.index("recipe") : printed.index("\ndata:")]
    assert "* aspp_rates 1 2 3 4" in table and "  flip True" in table
    starred = set(re.findall(r"\* (\w+) ", table))
    assert starred == {name for name in recipe if recipe[name] != usual[name]}
    short = run.in_columns({"size": (64, 128), "crop": None, "lr": 0.1}, ["lr"])
    assert short == "  size 64 128   crop None   * lr 0.1"


def test_time_left_counts_evaluations():
    session = run.Session.__new__(run.Session)
    session.recipe, session.eval_every = classmix.Recipe(iterations=25), 10
    session.pace, session.scoring = 2.0, 30.0
    assert [session._left(k) for k in (5, 10, 21)] == ["2 min left", "2 min left", "38 s left"]
    assert session._left(25) == "30 s left"  # the evaluation that follows this log line
    session.pace = 0.0
    assert session._left(5) == ""


def test_resuming_needs_no_list_and_spares_others(command, refused, args, tmp_path, monkeypatch):
    state = classmix.network(classmix.RECIPES["streets"], 11, pretrained=False).state_dict()
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "list.txt").write_text("001\n004\n006\n")
    args = (*args[:-2], "--labeled-list", tmp_path / "list.txt", "--eval-every", 2)
    args += ("--width", 16, "--weights", tmp_path / "w.pth", "--iterations", 3)
    out, other, moved = tmp_path / "run", tmp_path / "other", tmp_path / "moved"
    with monkeypatch.context() as patch:
        patch.setattr(classmix, "train", stopping_train("classmix", 2, signal.SIGINT))
        assert command("classmix", *args, "--output-dir", out)[0] == 130
    assert command("classmix", *args, "--seed", 3, "--output-dir", other)[0] == 0
    (tmp_path / "w.pth").unlink()
    (tmp_path / "list.txt").unlink()
    before = (other / "last.pt").read_bytes()
    resume = ("--resume", out / "last.pt", "--workers", 0, "--output-dir")
    assert "last.pt exists: " in refused(*resume, other)
    assert (other / "last.pt").read_bytes() == before
    moved.mkdir()
    for name in ("log.jsonl", "config.json", "split.txt"):
        (moved / name).write_text("another run\n" * 99)
    assert command("classmix", *resume, moved)[0] == 0
    assert (moved / "split.txt").read_text() == "001\n004\n006\n"
    assert json.loads((moved / "config.json").read_text()) and (moved / "result.json").exists()
    assert {entry["iteration"] for entry in read_log(moved)} == {3}


def test_checkpoints_that_do_not_fit_are_refused(refused, args, trained, folder, tmp_path):
    last, other = trained / "last.pt", tmp_path / "other.pt"
    other_data = ("--dataset", "folder", "--data-dir", folder)
    assert "other classes" in refused("--evaluate", last, *other_data)
    assert "--width" in refused("--resume", last, "--width", 8)
    assert "does not fit" in refused("--evaluate", last, "--width", 8)
    assert "last.pt exists: " in refused(*args, "--output-dir", trained)
    content = torch.load(last, weights_only=True)
    torch.save({**content, "labeled_names": ["x"]}, other)
    assert "training image" in refused("--resume", other)
    torch.save(content["state"]["student"], other)
    assert "not a checkpoint" in refused("--evaluate", other)


REMOVED = object()
BAD_CHECKPOINTS = [
    ("method", "cowmix", "cowmix"),
    ("palette", REMOVED, "'palette'"),
    ("recipe", {"old": 1}, "another version"),
    ("iteration", -1, "damaged"),
    ("args/seed", REMOVED, "damaged"),
    ("args/precision", "fp8", "--precision"),
    ("recipe/mask", "shark", "--mask"),
    ("recipe/ema_decay", 1.5, "--ema-decay"),
    ("state/student", REMOVED, "student"),
    ("state/student/conv1.weight", torch.ones(4), "student does not fit"),
    ("state/student/bn1.bias", torch.tensor([1, torch.nan, 1, 1]), "student.bn1.bias is not f"),
    # Only --resume reads these.
    ("state/optimizer/state", REMOVED, "optimizer does not fit"),
    ("state/optimizer/state/0/exp_avg", torch.ones(3), "optimizer does not fit"),
    ("state/optimizer/state/1/step", REMOVED, "optimizer does not fit"),
    ("state/optimizer/param_groups/0/betas", REMOVED, "optimizer does not fit"),
    ("state/schedule/last_epoch", REMOVED, "schedule does not fit"),
]


def change(path: Path, place: str, value) -> None:
    """Replaces one value in a checkpoint."""
    part = checkpoint = torch.load(path, weights_only=True)
    *above, name = place.split("/")
    for key in above:
        part = part[int(key) if key.isdigit() else key]
    del part[name]
    part |= {} if value is REMOVED else {name: value}
    torch.save(checkpoint, path)


@pytest.mark.parametrize(("place", "value", "expected"), BAD_CHECKPOINTS)
def test_every_use_of_a_checkpoint_checks_it(refused, trained, camvid, place, value, expected):
    last = trained / "last.pt"
    change(last, place, value)
    picture = ("--predict", last, camvid / "train/000.png", "--out", trained / "out")
    uses = (("--resume", last), ("--evaluate", last), picture)
    for use in uses[: 1 if "optimizer" in place or "schedule" in place else 3]:
        line = refused(*use)
        assert line.startswith(f"classmix.py: {last}: ") and expected in line
    assert not (trained / "out").exists()


def test_damage_that_torch_does_not_notice(refused, args, trained):
    """A flipped bit of a weight, which only the checksums show."""
    last, new = trained / "last.pt", ("--output-dir", trained / "new")
    content, data = torch.load(last, weights_only=True), bytearray(last.read_bytes())
    data[data.index(content["state"]["student"]["layer1.0.bn1.running_var"].numpy().tobytes())] ^= 1
    (trained / "bit.pt").write_bytes(data)
    assert "a damaged one" in refused("--evaluate", trained / "bit.pt", *new)
    assert "bit.pt: damaged" in refused(*args, "--weights", trained / "bit.pt", *new)


def test_an_older_checkpoint_gets_the_preset_s_value(trained, capsys):
    last = trained / "last.pt"
    change(last, "recipe/warmup", REMOVED)
    change(last, "args/preset", REMOVED)  # every recipe was the paper's
    assert parse("--resume", last)[0].warmup == classmix.RECIPES["camvid"].warmup == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {last}: ") and "used for them: --warmup 0" in line
    assert parse("--evaluate", last)[1].data_dir is not None
    change(last, "args/dataset", "streets")  # which took a --data-dir and ignored it
    assert parse("--evaluate", last)[1].data_dir is None


def test_a_resume_that_is_killed_before_it_logs(command, trained, monkeypatch):
    log = trained / "log.jsonl"
    before = log.read_bytes()
    log.write_bytes(before + b'{"iteration": 3}\n')  # after the checkpoint
    monkeypatch.setattr(run.Session, "_append", mock.Mock(side_effect=KeyboardInterrupt))
    command("classmix", "--resume", trained / "last.pt")
    assert before and log.read_bytes() == before


# ---- Evaluating and predicting ----


def test_evaluation_at_another_size_and_data_set(command, refused, trained, tmp_path, monkeypatch):
    evaluate = ("--evaluate", trained / "last.pt", "--workers", 0)
    resized, full = (command("classmix", *evaluate, *f)[1] for f in ((), ("--full-resolution",)))
    assert "labels at 24x32" in resized and "labels at their own size" in full
    assert resized.splitlines()[1:] != full.splitlines()[1:]
    monkeypatch.chdir(tmp_path)  # the folder of the first data set is not looked into
    line = refused(*evaluate, "--dataset", "bdd100k")
    assert f"--data-dir {Path('data/bdd100k')}: no such folder" in line


def test_the_headline_network_alone_predicts_pictures_of_any_size(command, folder, tmp_path):
    out, picture, predicted = tmp_path / "run", tmp_path / "mine.png", []
    args = ("--dataset", "folder", "--data-dir", folder, "--crop", 32, 32, *SMALL.split())
    status, printed, errors = command("classmix", *args, "--iterations", 4, "--output-dir", out)
    assert (status, errors) == (0, "") and "6 labeled and 4 unlabeled of 10" in printed
    Image.effect_noise((37, 51), 90).save(picture)  # grey: becomes RGB
    good = torch.load(out / "last.pt", weights_only=True)
    for name in NETWORKS:  # the headline of ClassMix is the student: no teacher is needed
        torch.save({**good, "state": {"student": good["state"][name]}}, tmp_path / "other.pt")
        predict = ("--predict", tmp_path / "other.pt", picture, "--out", tmp_path / name)
        assert command("classmix", *predict)[0] == 0
        predicted.append(np.asarray(Image.open(tmp_path / name / "mine.png")))
    assert predicted[0].shape == (51, 37) and predicted[0].max() < 3
    assert not np.array_equal(*predicted)
    assert Image.open(tmp_path / "student/mine_overlay.png").size == (37, 51)


def test_predictions_never_overwrite_a_picture(refused, camvid, trained, tmp_path):
    picture, overlay, out = tmp_path / "own.png", tmp_path / "own_overlay.png", tmp_path / "out"
    for path in (picture, overlay):
        shutil.copy(camvid / "train/000.png", path)
    predict = ("--predict", trained / "last.pt", picture)
    assert "overwrite" in refused(*predict, "--out", tmp_path)
    assert picture.read_bytes() == overlay.read_bytes()
    assert "overwrite" in refused(*predict, overlay, "--out", out) and not out.exists()


# ---- Bad input ----


BAD_FLAGS = """
--batch-size 1 | --batch-size 1: each micro-batch needs 2 images
--warmup 9 | 1 iterations, but 9 of them are warm-up
--scale-range 1.5 0.5 | --scale-range: 1.5 is above 0.5
--nesterov --momentum 0 | --nesterov: needs
--colour | --colour
--itera 3 | --itera
--data-dir camvdi | camvdi
--resume  | no such checkpoint
--evaluate  | no such checkpoint
--resume a.pt --evaluate b.pt | not allowed with
--device gpu | gpu
--device meta | meta
--output-dir /dev/null/run | /dev/null/run
--batch-size 0 | 0 is not a number from 1
--seed 4294967296 | 4294967296 is not a number from 0 to 4294967295
--lr nan | nan is not a number
--lr inf | inf is not a number
--ema-decay 1.5 | 1.5 is not a number from 0
"""


@pytest.mark.parametrize("line", BAD_FLAGS.strip().split("\n"))
def test_bad_flags_are_one_line(refused, args, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    given, expected = line.split(" | ")
    args = args if "--labeled" not in given else args[:-2]
    assert expected in refused(*args, "--iterations", 1, *given.split(" "))
    assert not Path("runs").exists()


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize(("capability", "bf16"), [((9, 0), True), ((6, 1), False)])
def test_networks_are_compiled_and_bf16_where_they_can_be(monkeypatch, compiler, capability, bf16):
    monkeypatch.setattr(torch, "zeros", mock.MagicMock())
    cuda = {"is_available": True, "is_bf16_supported": bf16, "get_device_capability": capability}
    for name, value in {**cuda, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, mock.Mock(return_value=value))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: compiler)
    _, args = parse("--iterations", "5000")
    assert args.device == torch.device("cuda:0") and args.compile == (compiler and bf16)
    assert not parse("--iterations", "4999")[1].compile  # compiling takes longer than it saves
    assert args.precision == ("bf16" if bf16 else "fp32")
