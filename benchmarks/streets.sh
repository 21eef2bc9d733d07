#!/usr/bin/env bash
# Trains ClassMix and its baseline for the README's table of streets, with three seeds, and the
# baseline with all labels. A seed chooses the labeled scenes, initial weights, batches and masks.
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/streets
for seed in 0 1 2; do
    python classmix.py --seed "$seed" --supervised --output-dir "$out/supervised_s$seed"
    python classmix.py --seed "$seed" --output-dir "$out/classmix_s$seed"
done
python classmix.py --labeled 1.0 --supervised --output-dir "$out/supervised_all_s0"
python benchmarks/table.py "$out"
