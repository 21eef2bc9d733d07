"""Prints tables of results, or what a folder of gpu.sh holds, as Markdown.

    python benchmarks/table.py camvid          photographs
    python benchmarks/table.py camvid_classes  IoU of each class, mean of the seeds
    python benchmarks/table.py streets         rendered streets: the four methods
    python benchmarks/table.py streets_rows    and the rows of the papers' tables
    python benchmarks/table.py gpu             milliseconds, kernels and memory of a step
    python benchmarks/table.py FOLDER          what gpu.sh has written

A run is scored by the network that its paper reports. Cells with (n) are means over n seeds with
standard deviations; a gain is the mean of the differences to the baseline of the same seed.
"""

import argparse
import json
import os
import re
import statistics
from pathlib import Path

# Name of the row, its folder, the folder of its baseline, the gain that its paper reports.
CAMVID = (
    ("supervised", "supervised", None, ""),
    ("supervised, 367 labels", "supervised_all", None, ""),
    ("CowMix", "cowmix", "supervised", "6.4"),
    ("CutMix", "cutmix", "supervised", "2.3"),
    ("ClassMix", "classmix", "supervised", "6.5"),
    ("ComplexMix", "complexmix", "supervised", "7.4"),
    ("supervised, 12,000 steps", "supervised_long", None, ""),
    ("ClassMix, 12,000 steps", "classmix_long", "supervised_long", "6.5"),
    ("ComplexMix, 12,000 steps", "complexmix_long", "supervised_long", "7.4"),
    ("supervised, U-Net", "cowmix_unet_supervised", None, ""),
    ("CowMix, U-Net", "cowmix_unet", "cowmix_unet_supervised", "6.4"),
    ("supervised (`c3semiseg.py`)", "c3semiseg_supervised", None, ""),
    ("C3-SemiSeg", "c3semiseg", "c3semiseg_supervised", "8.0"),
)
STREETS = (
    ("supervised", "supervised", None, ""),
    ("supervised, 800 labels", "supervised_800", None, ""),
    ("ClassMix", "classmix", "supervised", "6.5"),
    ("CowMix's mask", "classmix_cow", "supervised", "5.5"),
    ("CutMix's mask", "classmix_cut", "supervised", "4.3"),
    ("pixel-wise threshold", "classmix_pixel", "supervised", "3.8"),
    ("sigmoid ramp up", "classmix_ramp", "supervised", "5.7"),
    ("constant weight", "classmix_constant", "supervised", "5.7"),
    ("squared error", "classmix_squared-error", "supervised", "3.9"),
    ("no pseudo-label", "classmix_soft", "supervised", "5.3"),
    ("random crop", "classmix_crop", "supervised", "7.3"),
    ("extra augmentations", "classmix_extra", "supervised", "7.0"),
    ("twice as long", "classmix_long", "supervised", "8.1"),
    ("ComplexMix", "complexmix", "supervised", "7.4"),
    ("p = 4", "complexmix_p4", "supervised", ""),
    ("p = 16", "complexmix_p16", "supervised", ""),
    ("p = 64", "complexmix_p64", "supervised", ""),
    ("half of a block's classes", "complexmix_present", "supervised", ""),
    ("supervised (`cowmix.py`)", "cowmix_supervised", None, ""),
    ("CowMix", "cowmix", "cowmix_supervised", "6.4"),
    ("CowOut", "cowmix_cowout", "cowmix_supervised", "4.3"),
    ("CutMix", "cowmix_cutmix", "cowmix_supervised", "2.3"),
    ("CutOut", "cowmix_cutout", "cowmix_supervised", "4.4"),
    ("ICT", "cowmix_ict", "cowmix_supervised", "-0.4"),
    ("standard augmentation", "cowmix_aug", "cowmix_aug_supervised", "-2.4"),
    ("its baseline", "cowmix_aug_supervised", None, ""),
    ("supervised (`c3semiseg.py`)", "c3semiseg_supervised", None, ""),
    ("C3-SemiSeg", "c3semiseg", "c3semiseg_supervised", "8.0"),
    ("without consistency", "c3semiseg_no-consistency", "c3semiseg_supervised", "4.5"),
    ("without contrast", "c3semiseg_no-contrast", "c3semiseg_supervised", "7.6"),
    ("contrast of labeled pixels", "c3semiseg_labeled", "c3semiseg_supervised", "6.2"),
    ("contrast of unlabeled pixels", "c3semiseg_unlabeled", "c3semiseg_supervised", "7.8"),
    ("random sampling", "c3semiseg_random", "c3semiseg_supervised", "8.5"),
    ("without contrast and mixing", "c3semiseg_no-mixing", "c3semiseg_supervised", "5.0"),
    ("without contrast, intra-set", "c3semiseg_intra", "c3semiseg_supervised", "6.7"),
)
GPU = (
    ("ClassMix, Cityscapes", "classmix", "cityscapes"),
    ("ClassMix, VOC", "classmix", "voc"),
    ("CowMix, CamVid, U-Net", "cowmix", "camvid"),
    ("CowMix, VOC, DeepLab", "cowmix", "voc"),
    ("C3-SemiSeg, Cityscapes", "c3semiseg", "cityscapes"),
)
METHODS = ("classmix", "complexmix", "cowmix", "c3semiseg")
SHORT = [row for row in STREETS if row[1] in METHODS or row[0].startswith("supervised")]
TABLES = {"camvid": CAMVID, "streets": SHORT, "streets_rows": STREETS}
RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parents[1] / "results"))
SPEED = ("method", "dataset", "network", "size", "images", "group", "precision", "compile")
SPEED += ("inductor", "ms", "busy ms", "TFLOP", "TFLOP/s", "share %", "GiB", "kernels", "waits")
SPEED += ("data %",)


def read_scores(folder: Path) -> dict:
    """Returns % mIoU of student and teacher of a finished run, and which one its paper reports."""
    result = json.loads((folder / "result.json").read_text())
    scores = {name: 100 * result[name]["miou"] for name in ("student", "teacher")}
    if (folder / "test.txt").exists():  # what --evaluate has printed
        line = (folder / "test.txt").read_text().splitlines()[-1]
        scores = dict(zip(scores, map(float, line.split()[1:]), strict=True))
    return {**scores, "headline": result["headline"]}


def read_runs(name: str, folder: str | None) -> dict[int, dict]:
    """Returns the scores of a row's runs, by seed."""
    folders = {seed: RESULTS / name / f"{folder}_s{seed}" for seed in range(10)}
    done = {seed: path for seed, path in folders.items() if (path / "result.json").exists()}
    return {seed: read_scores(path) for seed, path in done.items()}


def spread(values: list[float], sign: str = "") -> str:
    """mean ± standard deviation (number of values), or nothing for less than two values."""
    if len(values) < 2:
        return ""
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values):.1f} ({len(values)})"


def print_results(name: str) -> None:
    """Prints one row for each name of a table; rows without a run are left out."""
    data = name.removesuffix("_rows")
    print("| | student mIoU % | teacher mIoU % | gain | seed 0 | gain in its paper |")
    print("|---|---|---|---|---|---|")
    for title, folder, baseline, paper in TABLES[name]:
        runs, others = read_runs(data, folder), read_runs(data, baseline)
        network = runs[min(runs)]["headline"] if runs else "student"
        gains = [runs[seed][network] - others[seed][network] for seed in runs if seed in others]
        cells = [spread([run[net] for run in runs.values()]) for net in ("student", "teacher")]
        cells += [spread(gains, "+"), f"{runs[0][network]:.1f}" if 0 in runs else "", paper]
        if runs:
            print(f"| {title} | {' | '.join(cells)} |")


def print_classes() -> None:
    """Prints the mean IoU of each class on CamVid's test images, of the network of each paper."""
    columns = {}
    for title, folder, *_ in CAMVID:
        runs = read_runs("camvid", folder)
        for seed in runs:
            text = (RESULTS / f"camvid/{folder}_s{seed}/test.txt").read_text()
            found = re.findall(r"^(\w+) +([\d.]+) +([\d.]+)$", text, re.M)
            k = 1 + (runs[seed]["headline"] == "teacher")
            columns.setdefault(title, []).append({row[0]: float(row[k]) for row in found})
    print(f"| | {' | '.join(columns)} |\n{'|---' * (1 + len(columns))}|")
    for name in next(iter(columns.values()))[0]:
        cells = [f"{statistics.mean(run[name] for run in runs):.1f}" for runs in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def print_gpu() -> None:
    """Prints the milliseconds of a step; kernels and GiB are those of the compiled one."""
    print("| recipe | floor (computed) | float32 | bfloat16 | compiled | kernels | GiB |")
    print("|---|---|---|---|---|---|---|")
    rows = read_lines(RESULTS / "gpu/speed.jsonl")
    for title, *names in GPU:
        found = [row for row in rows if [row[key] for key in ("method", "dataset")] == names]
        found = [row for row in found if not row.get("inductor") and row.get("group") in (None, 4)]
        steps = {(row["precision"], row["compile"]): row for row in found}
        compiled, others = steps["bf16", True], (steps["fp32", False], steps["bf16", False])
        floor = 1000 * compiled["TFLOP"] / 700  # at 700 TFLOP/s
        cells = [f"{floor:.2g}", *(f"{step['ms']:.0f}" for step in (*others, compiled))]
        cells += [f"{compiled['kernels']:,}", f"{compiled['GiB']:.1f}"]
        print(f"| {title} | {' | '.join(cells)} |")


def print_speed(path: Path) -> None:
    """Prints the lines that speed.py has written."""
    print(f"\n| {' | '.join(SPEED)} |\n{'|---' * len(SPEED)}|")
    for row in read_lines(path):
        cells = [row.get(name) for name in SPEED]
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
    parser.add_argument(
        "what", help="camvid, camvid_classes, streets, streets_rows, gpu or a folder of gpu.sh"
    )
    what = parser.parse_args().what
    if what == "camvid_classes":
        print_classes()
    elif what == "gpu":
        print_gpu()
    elif what in TABLES:
        print_results(what)
    elif (Path(what) / "speed.jsonl").exists():
        print_speed(Path(what) / "speed.jsonl")
        print_precision(Path(what) / "precision")
    else:
        parser.error(f"{what}: neither a table nor a folder of gpu.sh")


if __name__ == "__main__":
    main()
