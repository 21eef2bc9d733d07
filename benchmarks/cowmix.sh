#!/usr/bin/env bash
# Trains CowMix's runs for the README's table of streets: the baseline and CowMix with three seeds,
# the other perturbations of table 1 with one. If CamVid's folder is given, it also trains CowMix and
# its baseline there: 30 labels, a small U-Net without pretrained weights, a third of the size.
#     benchmarks/cowmix.sh [path/to/CamVid]
set -euo pipefail
data=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
out=results/streets
for seed in 0 1 2; do
    python cowmix.py --seed "$seed" --supervised --output-dir "$out/cowmix_supervised_s$seed"
    python cowmix.py --seed "$seed" --output-dir "$out/cowmix_s$seed"
done
for kind in cowout cutmix cutout ict aug; do
    python cowmix.py --perturbation "$kind" --output-dir "$out/cowmix_${kind}_s0"
done
# Standard augmentation changes labeled scenes too, therefore it has its own baseline.
python cowmix.py --perturbation aug --supervised --output-dir "$out/cowmix_aug_supervised_s0"
python benchmarks/table.py "$out"
if [ -n "$data" ]; then
    small="--size 120 160 --width 16 --layers 1 1 1 1 --weights none --sigma-range 1.33 5.33"
    length="--batch-size 4 --iterations 2000 --lr 1e-3 --lr-power 0.9"
    for run in supervised cowmix; do
        flag=$([ "$run" = supervised ] && echo --supervised || true)
        # shellcheck disable=SC2086
        python cowmix.py --dataset camvid --data-dir "$data" --labeled 30 --evaluate-split val $small $length $flag \
            --output-dir "results/camvid/unet_${run}_s0"
    done
    python benchmarks/table.py results/camvid
fi
