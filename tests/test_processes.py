"""Several processes, started by torchrun, on the CPU with gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = """--dataset camvid --labeled 4 --size 48 64 --weights none --layers 1 1 1 1 --width 4
--optimizer adam --lr 1e-3 --head-factor 1 --batch-size 4 --workers 0 --aspp-rates 1 2
--warmup 2 --extra-augmentations --eval-every 6"""


def start(processes: int, *argv, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}"]
    command += [ROOT / "classmix.py", *TINY.split(), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, command)], env=env, text=True, **pipes)


def test_two_processes_equal_one_that_accumulates_two_shares(camvid, tmp_path):
    common = ("--data-dir", camvid, "--iterations", 6)
    runs = [
        start(1, *common, "--accumulate", 2, "--output-dir", tmp_path / "one"),
        start(2, *common, "--output-dir", tmp_path / "two"),
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
        for name in ("loss_l", "loss_u", "lambda"):
            assert one.get(name) == pytest.approx(two.get(name), rel=1e-4, abs=1e-6)
    for network in ("student", "teacher"):
        for name, tensor in states[0][network].items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(tensor, states[1][network][name], rtol=1e-3, atol=1e-4)


def test_a_share_too_small_to_mix_is_refused(camvid, tmp_path):
    run = start(2, "--data-dir", camvid, "--batch-size", 2, "--output-dir", tmp_path / "run")
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0 and "no other to be mixed with" in errors
    assert not (tmp_path / "run").exists()


def kill_one(run: subprocess.Popen, checkpoint: Path) -> None:
    """Kill the last of torchrun's processes as soon as there is a checkpoint."""
    deadline = time.monotonic() + 100
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


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
    assert run.returncode != 0 and "--resume auto" in errors
    stopped = torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"]
    again = start(2, *argv)
    line = ""
    while "resumed at" not in line and again.poll() is None:
        line = again.stdout.readline()
    assert f"resumed at iteration {stopped}" in line
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"] >= stopped
