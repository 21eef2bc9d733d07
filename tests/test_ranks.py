"""Several ranks, started by torchrun, on the CPU with gloo."""

import os
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT, children, finish, problems, read_log, read_state, start, tiny

import classmix
from common import InputError, flags, ranks


def losses(folder: Path) -> list[dict]:
    """Entries of the log that hold means of losses."""
    return [entry for entry in read_log(folder) if "loss_l" in entry]


def equal_to_float_tolerance(one: Path, two: Path) -> None:
    """Asserts that logged means and weights agree. Batch-norm statistics differ a little."""
    assert "loss_u" in losses(one)[-1] and len(losses(one)) == len(losses(two))
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    a, b = read_state(one), read_state(two)
    for network in ("student", "teacher"):
        names = [n for n in a[network] if "running" not in n]
        for name in names:
            torch.testing.assert_close(a[network][name], b[network][name], rtol=1e-3, atol=1e-4)
    if "regions" in a:
        torch.testing.assert_close(a["regions"], b["regions"])


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_that_accumulates_two_micro_batches(method, command, camvid, tmp_path):
    flags = (*tiny(method, camvid), "--iterations", 6, "--eval-every", 6, "--output-dir")
    one, two = tmp_path / "one", tmp_path / "two"
    process = start(f"{method}.py", *flags, two, ranks=2)
    assert command(method, *flags, one, "--accumulate", 2)[0] == 0
    status, printed, errors = finish(process)
    assert status == 0 and printed.count("in the paper") == errors.count("warning: ") == 1, errors
    equal_to_float_tolerance(one, two)


AVERAGED = f"""
import os, sys
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
import torch
from common import ranks
ranks.join(SimpleNamespace(device=torch.device("cpu"), rank=int(os.environ["RANK"])))
network = torch.nn.BatchNorm2d(3)
network.running_mean.fill_(float(os.environ["RANK"]))
network.running_var.mul_(1 + 2 * float(os.environ["RANK"]))
ranks.average_statistics([network])
values = network.running_mean.tolist(), network.running_var.tolist()
os.write(2, "{{}} {{}}\\n".format(*values).encode())  # the ranks write at once
ranks.leave()
"""


def test_batch_norm_statistics_are_averaged_over_ranks(tmp_path):
    (tmp_path / "averaged.py").write_text(AVERAGED)
    status, _, errors = finish(start(tmp_path / "averaged.py", ranks=2))
    assert status == 0 and errors.count("[0.5, 0.5, 0.5] [2.0, 2.0, 2.0]") == 2


def test_statistics_are_averaged_whenever_they_are_used(command, camvid, tmp_path, monkeypatch):
    averaged = []  # losses, too, which are single numbers
    monkeypatch.setattr(ranks, "all_mean", lambda tensor: averaged.append(tensor.clone()))
    flags = ("--iterations", 4, "--eval-every", 4, "--save-every", 2, "--output-dir", tmp_path)
    command("classmix", *tiny("classmix", camvid), *flags)
    networks = read_state(tmp_path)["student"], read_state(tmp_path)["teacher"]
    last = [tensor for network in networks for name, tensor in network.items() if "running" in name]
    found = [tensor for tensor in averaged if tensor.dim() > 0]
    assert len(found) == 2 * len(last) and all(map(torch.equal, found[len(last) :], last))


STOPPED = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import classmix, conftest
classmix.train = conftest.stopping_train("classmix", 13, {signal.SIGTERM}, rank=1)
classmix.main()
"""


def test_a_signal_to_one_rank_stops_all_at_the_same_step(command, camvid, tmp_path):
    script, whole, parts = tmp_path / "stopped.py", tmp_path / "whole", tmp_path / "a run"
    script.write_text(STOPPED)
    flags = (*tiny("classmix", camvid), "--iterations", 20, "--eval-every", 20)
    flags += ("--save-every", 20, "--output-dir")
    process = start(script, *flags, parts, ranks=2)
    assert command("classmix", *flags, whole, "--accumulate", 2)[0] == 0
    status, _, errors = finish(process)
    (line,) = [line for line in problems(errors) if line.startswith("classmix.py: ")]
    resume = f"--resume '{parts}/last.pt'"
    assert line == f"classmix.py: stopped by SIGTERM after iteration 13; continue with {resume}"
    assert status != 0 and not (parts / "result.json").exists()
    status, printed, errors = finish(start("classmix.py", *shlex.split(resume), ranks=2))
    assert status == 0 and "resumed after iteration 13" in printed, errors
    assert [entry["iteration"] for entry in losses(parts)] == [10, 20]
    equal_to_float_tolerance(whole, parts)


def test_torchrun_s_restart_goes_on_from_the_last_checkpoint(camvid, tmp_path):
    folder = tmp_path / "run"
    flags = (*tiny("classmix", camvid), "--iterations", 80, "--save-every", 5)
    flags += ("--eval-every", 80, "--output-dir", folder, "--resume", "auto")
    options = ("--max-restarts=1", "--monitor-interval=0.1")
    process = start("classmix.py", *flags, ranks=2, options=options)
    deadline = time.monotonic() + 120
    while not (folder / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(children(process)[-1], signal.SIGKILL)
    status, printed, errors = finish(process)
    assert status == 0 and "resumed after iteration" in printed, errors
    assert (folder / "result.json").exists()
    assert [entry["iteration"] for entry in losses(folder)] == list(range(10, 81, 10))


def test_micro_batches_of_all_ranks_share_a_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the README's first command leaves a run in the repository
    monkeypatch.setenv("WORLD_SIZE", "2")

    def check(*argv):
        classmix.check(*flags.parse_args("classmix", "", classmix.RECIPES, argv=argv))

    check("--batch-size", "4")
    check("--batch-size", "2", "--supervised")
    for argv in (("--batch-size", "2"), ("--batch-size", "6", "--accumulate", "2")):
        with pytest.raises(InputError, match="--batch-size"):
            check(*argv)


def test_one_line_where_torchrun_s_variables_are_missing(command, camvid, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, errors = command("classmix", *tiny("classmix", camvid), "--output-dir", tmp_path)
    assert status == 2 and errors.count("\n") == 1 and "WORLD_SIZE is set, but not" in errors


def test_ranks_that_found_different_checkpoints_are_refused(command, camvid, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "all_max", lambda number: 3)  # another rank's first iteration
    status, _, errors = command("classmix", *tiny("classmix", camvid), "--output-dir", tmp_path)
    assert status == 2 and errors.count("\n") == 1 and "ranks found different checkpoints" in errors
