"""The programs in benchmarks/ on tiny sizes."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import METHODS, ROOT


@pytest.mark.skipif(
    torch.__version__ < "2.6", reason="torch 2.5 cannot count where images are loaded"
)
def test_the_dry_run_measures_recipes(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CAMVID": str(tmp_path / "none")}
    environment["ONLY"] = "c3semiseg|camvid|streets"
    program = [ROOT / "benchmarks/gpu.sh", tmp_path, "--dry", "fp32"]
    subprocess.run(program, check=True, capture_output=True, env=environment)
    (entry,) = (tmp_path / "parts.tsv").read_text().splitlines()[1:]
    assert entry.startswith("fp32") and entry.split("\t")[2] == "0"
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    names = ["method", "dataset", "network", "images"]
    assert sorted([row[name] for name in names] for row in rows) == [
        ["c3semiseg", "cityscapes", "deeplab", 8],
        ["classmix", "streets", "deeplab", 8],
        ["cowmix", "camvid", "unet", 3],
    ]
    for row in rows:
        numbers = [row[name] for name in ("ms", "TFLOP", "TFLOP/s", "share %", "GiB", "kernels")]
        assert all(0 < number < math.inf for number in numbers)
        assert row["ms_least"] <= row["ms"] <= row["ms_most"] and row["waits"] is None
        assert (row["data %"] is None) == (row["dataset"] != "streets") and row["steps"] == 1
    table = (tmp_path / "tables.md").read_text()
    assert all(f"| {row['method']} | {row['dataset']} |" in table for row in rows)


def test_first_step_counts_each_method(command):
    status, out, _ = command("first_step")
    header, *rows = map(str.split, out.splitlines())
    assert status == 0 and [row[0] for row in rows] == [*METHODS]
    for row in rows:
        values = dict(zip(header, map(float, row[1:]), strict=True))
        assert 0 < values["files"] <= values["functions"] < values["executed"] < values["lines"]


def test_pinned_numbers_are_compared(command, tmp_path):
    a, b, run = tmp_path / "a.jsonl", tmp_path / "b.jsonl", "classmix --supervised"
    program = [sys.executable, str(ROOT / "benchmarks/pin.py"), "record", str(ROOT), str(a), run]
    subprocess.run(program, check=True, capture_output=True)
    (entry,) = map(json.loads, a.read_text().splitlines())
    assert entry["run"] == run and entry["resumed"] == "equal"
    loss = entry["log"][1]["loss_l"]
    entry["log"][1]["loss_l"] = other = loss + 1e-7
    changed = {**entry, "teacher": "another"}  # the loss differs first
    b.write_text("\n".join(map(json.dumps, (changed, {**entry, "run": "another"}))))
    assert command("pin", "compare", a, a)[:2] == (0, f"{run}: equal\n")
    found = f"{run}: log 1 loss_l: {loss} and {other}\nanother: only in one recording\n"
    assert command("pin", "compare", a, b)[:2] == (1, found)
