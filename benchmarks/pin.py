"""Pins the numbers of short trainings, so that a redesign can show that it changes none.

    python benchmarks/pin.py record CHECKOUT OUT.jsonl [METHOD ...] [--camvid DIR]
    python benchmarks/pin.py compare A.jsonl B.jsonl

record runs the trainings below with the code of a checkout, whole and resumed in the middle, and
writes losses, scores and hashes of the weights. A quoted METHOD with flags selects the
trainings that begin with it. compare prints a line for each: equal in every bit, or what
differs first.
"""

import argparse
import functools
import hashlib
import importlib
import json
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch

STEPS = "--workers 0 --iterations 40 --eval-every 40 --save-every 20"
CAMVID = "--dataset camvid --labeled 30 --evaluate-split val --weights none"
CAMVID += " --size 48 64 --layers 1 1 1 1 --width 8 --data-dir"
# The first line of a method is common to its trainings, which ";" or a new line separates. Its low
# threshold lets pixels count after few steps; the first training has the paper's.
RUNS = {
    "classmix": """--warmup 8 --confidence-threshold 0.3
        --confidence-threshold 0.968; --supervised; --seed 1; --accumulate 2
        --mask class; --mask cow --sigma-range 2 6; --mask cut
        --weighting pixel; --weighting ramp --ramp-iterations 30; --weighting constant
        --weight-scope sample; --unlabeled-loss squared-error; --unlabeled-loss soft-cross-entropy
        --crop 64 64; --crop 48 96 --scale-range 0.5 1.5; --extra-augmentations
        --optimizer sgd --nesterov --lr 0.01 --head-factor 10 --weight-decay 5e-4 --warmup 0
        --labeled 1/8 --split-seed 7; --labeled 1.0
        CAMVID --batch-size 4 --flip; CAMVID --batch-size 2 --crop 64 80 --scale-range 0.75 1.5""",
    "complexmix": """--warmup 8 --confidence-threshold 0.3
        --confidence-threshold 0.968; --supervised; --accumulate 2
        --blocks 4; --blocks 16; --blocks 64; --blocks 128; --classes all; --classes present
        --weighting pixel; --weight-scope sample --unlabeled-weight 2
        CAMVID --batch-size 4 --optimizer adam --lr 6e-3 --head-factor 1""",
    "cowmix": """--confidence-threshold 0.3
        --confidence-threshold 0.97; --supervised; --accumulate 2; --labeled 1.0
        --perturbation cowmix; --perturbation cowout; --perturbation cutmix; --perturbation cutout
        --perturbation ict; --perturbation aug; --perturbation aug --supervised
        --network unet; --network unet --perturbation cutmix
        --p-range 0.2 0.8 --sigma-range 8 8; --crop 48 96 --scale-range 0.5 1.5
        --consistency-weight 3 --ema-decay 0.9 --head-factor 3 --lr 1e-3
        CAMVID --batch-size 4 --lr 1e-3 --lr-power 0.9
        CAMVID --batch-size 2 --lr 1e-3 --network deeplab --aspp-rates 1 2""",
    "c3semiseg": """--warmup 8 --consistency-ramp 12 --initial-threshold 0.3
        --initial-threshold 0.9; --supervised; --labeled 1.0; --group-size 2; --accumulate 2
        --consistency-weight 0; --no-warmup-contrast; --no-contrast-road --ema-warm-start
        --contrast both; --contrast labeled; --contrast unlabeled; --contrast none
        --no-hard-sampling; --threshold-momentum 1
        --contrast none --teacher-view jitter; --contrast none --teacher-view strong
        --contrast none --student-view jitter; --contrast none --student-view weak
        --contrast none --mixing intra; --contrast none --mixing none
        --contrast none --keep 0.4; --contrast none --keep 1
        --crop 48 96 --scales 0.75 1.0 1.25
        --batch-size 40 --group-size 40 --labeled 48 --iterations 10 --save-every 5 --warmup 2
        CAMVID --batch-size 4 --aspp-rates 1 2 --per-class 8 --lr 6e-3 --backbone-factor 1""",
}


def numbers(folder: Path) -> dict:
    """What must not change: log, labeled images and weights of a run."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {"log": [{k: v for k, v in entry.items() if k != "seconds"} for entry in log]}
    found["split"] = (folder / "split.txt").read_text()
    for name in ("student", "teacher"):
        state = torch.load(folder / "last.pt", weights_only=True)["state"][name]
        values = [key.encode() + state[key].contiguous().numpy().tobytes() for key in sorted(state)]
        found[name] = hashlib.sha256(b"".join(values)).hexdigest()
    return found


def train(method: str, flags: str) -> dict:
    """The numbers of a training, and whether resuming it in the middle gives the same."""
    torch_save, program = torch.save, f"{method}.py"
    with tempfile.TemporaryDirectory() as folder:
        whole, half = Path(folder, "whole"), Path(folder, "half")

        def save(checkpoint, path):
            torch_save(checkpoint, path)
            if not half.exists():  # the first checkpoint is in the middle
                shutil.copytree(whole, half)
                torch_save(checkpoint, half / "last.pt")

        argv = [program, *flags.split(), "--output-dir", str(whole)]
        resume = [program, "--resume", str(half / "last.pt")]
        for sys.argv in (argv, resume):
            with patch.object(torch, "save", save), redirect_stdout(StringIO()):
                importlib.import_module(method).main()
        found = numbers(whole)
        return found | {"resumed": difference(found, numbers(half)) or "equal"}


def record(checkout: Path, out: Path, chosen: list[str], camvid: str) -> None:
    """Writes a line for each training."""
    sys.path.insert(0, str(checkout.resolve()))
    torch.set_num_threads(1)  # more threads add numbers in another order
    streets, datasets = map(importlib.import_module, ("common.streets", "common.datasets"))
    counts = streets.COUNTS if hasattr(streets, "COUNTS") else datasets._STREETS  # new, old name
    counts.update(train=96, val=8)
    streets.draw = functools.cache(streets.draw)
    out.write_text("")
    for method, text in RUNS.items():
        common, *lines = text.splitlines()
        for flags in ";".join(lines).split(";"):
            name = f"{method} {flags.strip()}"
            if name.startswith(tuple(chosen)) and (camvid or "CAMVID" not in name):
                flags = flags.replace("CAMVID", f"{CAMVID} {camvid}")
                found = train(method, f"{STEPS} {common} {flags}")
                with out.open("a") as file:
                    file.write(json.dumps({"run": name, **found}) + "\n")
                print(f"{name}: recorded, resumed: {found['resumed']}", flush=True)


def difference(a, b, place: str = "") -> str:
    """Where two values that json.loads returns differ first, or nothing."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        found = (difference(a.get(key), b.get(key), f"{place} {key}") for key in {**a, **b})
        return next(filter(None, found), "")
    return "" if a == b else f"{place}: {a} and {b}".strip()


def compare(*paths: Path) -> None:
    """Prints a line for each training of two recordings; exits with 1 if any differs."""
    a, b = ({e["run"]: e for e in map(json.loads, path.open())} for path in paths)
    differs = False
    for run in {**a, **b}:
        text = difference(a[run], b[run]) if run in a and run in b else "only in one recording"
        differs = differs or text != ""
        print(f"{run}: {text or 'equal'}")
    sys.exit(differs)


def main() -> None:
    """Runs the command that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("paths", nargs=2, type=Path)
    parser.add_argument("methods", nargs="*", default=[""])
    parser.add_argument("--camvid", default="", help="folder of CamVid")
    args = parser.parse_args()
    if args.command == "compare":
        compare(*args.paths)
    record(*args.paths, args.methods, args.camvid)


if __name__ == "__main__":
    main()
