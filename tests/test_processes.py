"""Several processes, started by torchrun, on the CPU with gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import write_cityscapes

from common import InputError, processes
from common import run as run_module

ROOT = Path(__file__).parents[1]
TINY = """--dataset camvid --labeled 4 --size 48 64 --weights none --layers 1 1 1 1 --width 4
--lr 1e-3 --batch-size 4 --workers 0 --aspp-rates 1 2 --eval-every 6"""
OWN = {
    "classmix": "--warmup 2 --optimizer adam --head-factor 1 --extra-augmentations",
    "cowmix": "--confidence-threshold 0.1",
    "c3semiseg": "--warmup 2 --per-class 3 --consistency-ramp 2 --initial-threshold 0.15 "
    "--scales 0.7 1 --crop 40 48",
}


def start(processes: int, *argv, restarts=0, method="classmix", script=None, tiny=None):
    """One run, by torchrun where it has several processes: a Popen with pipes."""
    tiny = f"{TINY} {OWN[method]}" if tiny is None else tiny
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}"]
    command += [script or ROOT / f"{method}.py", *tiny.split(), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, command)], text=True, **pipes)


def lines_of_ours(errors: str) -> list[str]:
    """Those on stderr that are neither torchrun's nor about the size of the data set."""
    ours = [line for line in errors.splitlines() if line.startswith(("classmix.py: ", "warning: "))]
    return [line for line in ours if not line.startswith("warning: --data-dir")]


@pytest.mark.parametrize("method", list(OWN))
def test_two_processes_equal_one_that_accumulates_two_shares(camvid, tmp_path, method):
    common = ("--data-dir", camvid, "--iterations", 6)
    runs = [
        start(1, *common, "--accumulate", 2, "--output-dir", tmp_path / "one", method=method),
        start(2, *common, "--output-dir", tmp_path / "two", method=method),
    ]
    printed = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    assert printed[1][0].count("headline") == 1
    logs, states = [], []
    for name in ("one", "two"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs.append([entry for entry in map(json.loads, lines) if "loss_l" in entry])
        states.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["state"])
    assert "loss_u" in logs[0][-1] and len(logs[0]) == len(logs[1])
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6)
    if method == "c3semiseg":
        assert 0 < logs[0][-1]["confident"] < 1
        torch.testing.assert_close(*(state["regions"] for state in states))
    for network in ("student", "teacher"):
        for name, tensor in states[0][network].items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(tensor, states[1][network][name], rtol=1e-3, atol=1e-4)
    if method != "classmix":  # evaluating is the same for all
        return
    run = start(2, "--evaluate", tmp_path / "two/last.pt", tiny="")
    table, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and table.count("mIoU") == 1 and errors.count("warning: ") == 1


def test_a_share_too_small_to_mix_is_refused(camvid, tmp_path):
    run = start(2, "--data-dir", camvid, "--batch-size", 2, "--output-dir", tmp_path / "run")
    _, errors = run.communicate(timeout=120)
    (line,) = lines_of_ours(errors)
    assert run.returncode != 0 and "no other to be mixed with" in line
    assert not (tmp_path / "run").exists()


def kill_one(run: subprocess.Popen, checkpoint: Path) -> None:
    """Kill the last of torchrun's processes as soon as there is a checkpoint."""
    deadline = time.monotonic() + 100
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


STOPPED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import classmix
from common import run
save, log = run.Run._save, run.Run.log
def log_and_stop(self, **values):
    if (self.iteration, self.args.rank) == (12, 1):
        os.kill(os.getpid(), signal.SIGTERM)
    log(self, **values)
def save_slowly(self, done):
    if self.first and done == 13:
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun would repeat it
    save(self, done)
run.Run.log, run.Run._save = log_and_stop, save_slowly
classmix.main()
"""


def test_a_signal_to_one_process_stops_all_at_the_same_step(camvid, tmp_path):
    script, folder = tmp_path / "stopped.py", tmp_path / "a run"
    script.write_text(STOPPED)
    argv = ("--data-dir", camvid, "--iterations", 20, "--eval-every", 20, "--save-every", 20)
    runs = [
        start(2, *argv, "--output-dir", tmp_path / "whole"),
        start(2, *argv, "--output-dir", folder, script=script),
    ]
    _, (_, errors) = [run.communicate(timeout=120) for run in runs]
    assert runs[0].returncode == 0 and runs[1].returncode != 0
    (line,) = lines_of_ours(errors)
    command = f"torchrun --nproc-per-node 2 classmix.py --resume '{folder}/last.pt'"
    assert line == f"classmix.py: stopped by SIGTERM after iteration 13; go on with {command}"
    run = start(2, "--resume", folder / "last.pt", tiny="")
    printed, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and "resumed at iteration 13" in printed, errors
    logs = []
    for place in (tmp_path / "whole", folder):
        lines = map(json.loads, (place / "log.jsonl").read_text().splitlines())
        logs.append([entry for entry in lines if "loss_l" in entry])
    assert [entry["iteration"] for entry in logs[0]] == [10, 20] and len(logs[1]) == 2
    for one, two in zip(*logs, strict=True):
        for name in ("loss_l", "loss_u", "lambda"):
            assert one[name] == pytest.approx(two[name], rel=1e-6)


def test_several_processes_warn_once_and_fail_once(tmp_path):
    write_cityscapes(tmp_path, train=4, val=1, size=(1024, 1024), parents=False)
    (tmp_path / ".cache-48x64").write_text("a file")
    for path in tmp_path.rglob("traina*_leftImg8bit.png"):
        path.write_bytes(path.read_bytes()[:9000])
    argv = ("--dataset", "cityscapes", "--data-dir", tmp_path, "--labeled", "1.0")
    run = start(2, *argv, "--output-dir", tmp_path / "run")
    _, errors = run.communicate(timeout=120)
    warning, line = lines_of_ours(errors)
    assert warning.startswith("warning: no cache") and errors.count("warning: --data-dir") == 1
    assert line.startswith("classmix.py: ") and "_leftImg8bit.png: a damaged file" in line


def test_what_hinders_the_processes_from_meeting_is_one_line(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, printed, errors = command("classmix")
    assert (status, printed) == (2, "") and errors.count("\n") == 1 and "RANK" in errors


def test_an_error_of_the_first_common_operation_is_one_line(monkeypatch):
    dist = mock.MagicMock()
    dist.all_reduce.side_effect = RuntimeError("NCCL: two processes on one GPU\nmore")
    monkeypatch.setattr(processes, "dist", dist)
    args = Namespace(device=torch.device("cpu"), rank=0, processes=2)
    with pytest.raises(InputError, match=r"^cannot meet the other processes: NCCL.* GPU$"):
        processes.join(args)


def test_processes_that_found_other_checkpoints_are_refused(command, camvid, tmp_path, monkeypatch):
    others = iter([3, -3])  # its iteration, then its negative
    monkeypatch.setattr(run_module, "agree", lambda number=0: max(number, next(others)))
    argv = ("--data-dir", camvid, "--output-dir", tmp_path / "run", "--resume", "auto")
    status, _, errors = command("classmix", *TINY.split(), *OWN["classmix"].split(), *argv)
    assert status == 2 and errors.count("\n") == 1 and "not the same checkpoint" in errors
    assert not (tmp_path / "run").exists()


def test_what_is_evaluated_is_saved_before(command, camvid, tmp_path, monkeypatch):
    saved, score = [], run_module.score

    def spy_score(*what):
        saved.append(torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"])
        return score(*what)

    monkeypatch.setattr(run_module, "score", spy_score)
    argv = ("--data-dir", camvid, "--output-dir", tmp_path / "run", "--save-every", 99)
    argv += ("--iterations", 7, "--eval-every", 2)
    assert command("cowmix", *TINY.split()[:-2], *argv)[0] == 0
    assert saved == [2, 4, 6, 6]  # after the last one the run's own end saves


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (None, ""),
        (InputError("file: bad"), "cowmix.py: file: bad\n"),
        (InputError("Traceback\n in a worker\ncommon.InputError: bad"), "cowmix.py: bad\n"),
        (OSError(28, "No space left"), "cowmix.py: [Errno 28] No space left\n"),
        (KeyboardInterrupt(signal.SIGTERM), "cowmix.py: stopped by SIGTERM\n"),
    ],
)
def test_ends_in_one_line_and_with_the_caller_s_signals(capsys, error, line):
    handlers = [signal.getsignal(number) for number in processes.SIGNALS]
    try:
        with processes.ending("cowmix"):
            if error is not None:
                raise error
    except SystemExit as end:
        assert end.code == (143 if "SIGTERM" in line else 2) and line
    else:
        assert line == ""
    assert capsys.readouterr().err == line
    assert [signal.getsignal(number) for number in processes.SIGNALS] == handlers


@pytest.mark.parametrize("initialized", [False, True])
@pytest.mark.parametrize(
    ("message", "lost"),
    [("[gloo] Connection closed by peer [10.0.0.1]\nstack", True), ("shape mismatch", False)],
)
def test_a_lost_process_is_told_from_a_bug(capsys, monkeypatch, initialized, message, lost):
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: initialized)
    monkeypatch.setattr(processes.os, "_exit", sys.exit)
    handlers = {number: signal.getsignal(number) for number in processes.SIGNALS}
    try:
        with (
            pytest.raises(SystemExit if lost and initialized else RuntimeError),
            processes.ending("cowmix"),
        ):
            raise RuntimeError(message)
    finally:
        processes._restore(handlers)
    errors = capsys.readouterr().err
    if lost and initialized:
        cause = "[gloo] Connection closed by peer [10.0.0.1]"
        assert errors == f"cowmix.py: another process is gone ({cause}); --resume auto goes on\n"
    else:
        assert errors == ""


class Swallows:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_swallows_comes_again(command, monkeypatch, capsys):
    def parse(*_):
        Swallows()
        time.sleep(60)

    monkeypatch.setattr(processes, "_AGAIN", 0.1)
    monkeypatch.setattr(run_module, "parse_args", parse)
    status, _, errors = command("classmix")
    assert status == 128 + signal.SIGTERM and errors == "classmix.py: stopped by SIGTERM\n"


def test_torchrun_s_restart_goes_on_from_the_last_checkpoint(camvid, tmp_path):
    argv = ("--data-dir", camvid, "--iterations", 200, "--save-every", 2, "--eval-every", 200)
    run = start(2, *argv, "--output-dir", tmp_path / "run", "--resume", "auto", restarts=1)
    kill_one(run, tmp_path / "run/last.pt")
    printed, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "resumed at iteration" in printed and (tmp_path / "run/result.json").exists()
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    steps = [e["iteration"] for e in map(json.loads, lines) if "loss_l" in e]
    assert steps == list(range(10, 201, 10))


def test_a_killed_process_ends_the_others_and_auto_resumes(camvid, tmp_path):
    argv = ("--data-dir", camvid, "--iterations", 4000, "--save-every", 5, "--eval-every", 4000)
    argv += ("--output-dir", tmp_path / "run", "--resume", "auto")
    run = start(2, *argv)
    kill_one(run, tmp_path / "run/last.pt")
    _, errors = run.communicate(timeout=60)
    (line,) = lines_of_ours(errors)
    assert run.returncode != 0 and "--resume auto" in line
    stopped = torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"]
    again = start(2, *argv)
    line = ""
    while "resumed at" not in line and again.poll() is None:
        line = again.stdout.readline()
    assert f"resumed at iteration {stopped}" in line
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"] >= stopped
