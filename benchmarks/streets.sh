#!/usr/bin/env bash
# The runs behind the README's table of streets: each method and the matched baseline, three seeds.
# Seeds draw the labeled scenes, the initialisation, the batches and the masks.
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/streets
for seed in 0 1 2; do
    python classmix.py --seed "$seed" --supervised --output-dir "$out/supervised_s$seed"
    python classmix.py --seed "$seed" --output-dir "$out/classmix_s$seed"
done
python classmix.py --labeled 1.0 --supervised --output-dir "$out/supervised_all_s0"
python benchmarks/table.py "$out"
