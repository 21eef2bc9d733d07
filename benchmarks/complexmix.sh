#!/usr/bin/env bash
# ComplexMix's rows of the README's table of streets, beside those of benchmarks/streets.sh: the same
# recipe, splits and seeds, so that supervised and ClassMix runs need not be made again. With one
# seed: each p alone (streets are 64 pixels high, so that 128 is 64), and half of the classes present
# in a block.
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
