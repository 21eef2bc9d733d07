#!/usr/bin/env bash
# Trains ComplexMix's runs for the README's table of streets: the method with three seeds; with one
# seed each p alone (scenes are 64 pixels high, which makes p = 128 the same as 64) and --classes
# present. Recipe, splits and seeds are those of benchmarks/streets.sh, which trains the baseline.
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/streets
for seed in 0 1 2; do
    python complexmix.py --seed "$seed" --output-dir "$out/complexmix_s$seed"
done
for p in 4 16 64; do
    python complexmix.py --blocks "$p" --output-dir "$out/complexmix_p${p}_s0"
done
python complexmix.py --classes present --output-dir "$out/complexmix_present_s0"
python benchmarks/table.py "$out"
