"""Prints a Markdown table of the result.json files of runs: mean and standard deviation over seeds.

    python benchmarks/table.py results/streets

Runs whose folders have the same name but for the seed make one row.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="holds run folders, at any depth")
    runs = defaultdict(list)
    for path in sorted(parser.parse_args().folder.rglob("result.json")):
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


if __name__ == "__main__":
    main()
