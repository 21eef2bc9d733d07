"""The programs in benchmarks/ on tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
SMALL = ("--size", 64, 128, "--layers", 1, 1, 1, 1, "--width", 4)


@pytest.mark.parametrize("method", ["classmix", "complexmix", "cowmix", "c3semiseg"])
def test_step_times_a_method_without_its_data(command, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    crop = ("--crop", 64, 128, "--batch-size", 2) if method == "c3semiseg" else ()
    flags = ("--dataset", "cityscapes", "--steps", 2, *SMALL, *crop)
    status, out, err = command("step", method, *flags)
    assert (status, err) == (0, "")
    images = {"classmix": 4, "complexmix": 4, "cowmix": 3, "c3semiseg": 4}[method]
    assert f"{method}, cityscapes: {images} images of 64x128 a step" in out
    assert "n = 2" in out and "GiB" in out
    assert list(tmp_path.iterdir()) == []


def test_first_step_counts_each_method(command):
    status, out, _ = command("first_step")
    header, *rows = map(str.split, out.splitlines())
    assert status == 0 and [row[0] for row in rows] == [
        "classmix",
        "complexmix",
        "cowmix",
        "c3semiseg",
    ]
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
