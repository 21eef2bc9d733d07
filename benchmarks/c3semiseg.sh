#!/usr/bin/env bash
# Trains C3-SemiSeg's runs for the README, table 3 of the paper on streets: the baseline and the full
# method with three seeds, and the method without each of its losses with one seed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/c3semiseg
for seed in 0 1 2; do
    python c3semiseg.py --seed "$seed" --supervised --output-dir "$out/supervised_s$seed"
    python c3semiseg.py --seed "$seed" --output-dir "$out/full_s$seed"
done
python c3semiseg.py --contrast none --output-dir "$out/without-contrast_s0"
python c3semiseg.py --consistency-weight 0 --output-dir "$out/without-consistency_s0"
cp "$out/full_s0/samples/001600.png" "$out/sample.png"
python benchmarks/table.py "$out"
