#!/usr/bin/env bash
# Trains ClassMix and its baseline for the README's CamVid row: 30 labels, small images, a small
# network without pretrained weights, on a CPU.
#     benchmarks/camvid.sh path/to/CamVid
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "$0")/.."
small="--size 120 160 --width 16 --layers 1 1 1 1 --aspp-rates 1 2 --weights none"
adam="--optimizer adam --lr 6e-3 --head-factor 1 --weight-decay 0"
length="--batch-size 4 --iterations 2000 --warmup 300"
for run in supervised classmix; do
    flag=$([ "$run" = supervised ] && echo --supervised || true)
    # shellcheck disable=SC2086
    python classmix.py --dataset camvid --data-dir "$data" --labeled 30 --evaluate-split val $small $adam $length $flag \
        --output-dir "results/camvid/${run}_s0"
done
python benchmarks/table.py results/camvid
