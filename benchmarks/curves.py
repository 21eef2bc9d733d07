"""Draws the mIoU of several runs into one picture, over steps or over the number of labels.

    python benchmarks/curves.py results/camvid/{supervised,c*mix,c3semiseg}_s? \\
        --out results/camvid/curves.png
    python benchmarks/curves.py results/streets/*_s0 --labels --out results/streets/labels.png

Runs whose folders differ only in the seed (_s0, _s1, ...) make one line: the mean, with a band of
one standard deviation. --labels also joins runs that differ in their number of labels (_8). The
score is that of the network that the run reports.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.pictures import draw_chart


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--labels", action="store_true", help="final mIoU over numbers of labels")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a PNG")
    args = parser.parse_args()
    points = defaultdict(lambda: defaultdict(list))  # line -> x -> values of the seeds
    for run in args.runs:
        result = json.loads((run / "result.json").read_text())
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        network, name = result["headline"], re.sub(r"_s\d+$", "", run.name)
        curve = {entry["iteration"]: entry[network] for entry in log if network in entry}
        if args.labels:
            name, curve = re.sub(r"_\d+$", "", name), {result["labeled"]: result[network]}
        for x, score in curve.items():
            points[name][x].append(100 * score["miou"])
    lines = {}
    for name, values in points.items():
        x = sorted(values)
        lines[name] = (
            x,
            [np.mean(values[k]) for k in x],
            [np.std(values[k], ddof=len(values[k]) > 1) for k in x],
        )
    xlabel = "labeled images" if args.labels else "step"
    draw_chart(lines, "% mIoU", xlabel, log=(args.labels, False), height=400).save(
        args.out, optimize=True
    )


if __name__ == "__main__":
    main()
