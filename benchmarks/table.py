"""Prints Markdown tables of the results that a folder holds.

    python benchmarks/table.py results/streets

One row for the result.json files of runs whose folders have the same name but for the seed: mean
and standard deviation over seeds. For a folder of gpu.sh also its measurements (speed.jsonl), and
how far losses in bf16 are from those in fp32 (precision/).
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

SPEED = ("method", "dataset", "network", "size", "images", "precision", "compile", "ms", "TFLOP")
SPEED += ("TFLOP/s", "share %", "GiB", "kernels", "waits", "data %")


def print_results(folder: Path) -> None:
    """Prints mIoU and speed of the runs below a folder."""
    runs = defaultdict(list)
    for path in sorted(folder.rglob("result.json")):
        runs[re.sub(r"_s\d+", "", path.parent.name)].append(json.loads(path.read_text()))
    print("| run | seeds | student mIoU % | teacher mIoU % | minutes | steps/s |")
    print("|---|---|---|---|---|---|")
    for name, results in runs.items():
        cells = [name, str(len(results))]
        for network in ("student", "teacher"):
            values = [100 * result[network]["miou"] for result in results]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        for value in ("seconds", "steps_per_second"):
            middle = statistics.median(result[value] for result in results)
            cells.append(f"{middle / 60:.1f}" if value == "seconds" else f"{middle:.1f}")
        print(f"| {' | '.join(cells)} |")


def print_speed(path: Path) -> None:
    """Prints the lines that speed.py has written."""
    print(f"\n| {' | '.join(SPEED)} |\n{'|---' * len(SPEED)}|")
    for row in read_lines(path):
        cells = [row[name] for name in SPEED]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {' | '.join(cells).replace('None', '-')} |")


def print_precision(folder: Path) -> None:
    """Prints the mean relative difference of the losses of two runs with the same seed."""
    logs = [read_lines(folder / f"{name}/log.jsonl") for name in ("bf16", "fp32")]
    for name in ("loss_l", "loss_u"):
        pairs = [(a[name], b[name]) for a, b in zip(*logs, strict=False) if b.get(name)]
        if pairs:
            mean = 100 * statistics.mean(abs(a / b - 1) for a, b in pairs)
            print(f"bf16 against fp32, {name}: {mean:.3g}% apart ({len(pairs)} log lines)")


def read_lines(path: Path) -> list[dict]:
    """Reads a file of JSON lines; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="holds run folders, at any depth")
    folder = parser.parse_args().folder
    print_results(folder)
    if (folder / "speed.jsonl").exists():
        print_speed(folder / "speed.jsonl")
    print_precision(folder / "precision")


if __name__ == "__main__":
    main()
