#!/usr/bin/env bash
# Trains the runs of the README's table of photographs: CamVid (in data/camvid), 30 labels, one small
# network, five seeds (U-Net and 12,000 steps: three). CowMix, CutMix, ClassMix and ComplexMix have
# one supervised baseline. One run has all labels.
#     benchmarks/camvid.sh [PROCESSES]
# PROCESSES runs (default 2) are trained at once, with one thread each. Runs that have ended are left
# out. The test images are scored once, after the training. Environment: PYTHON (default python),
# RESULTS (folder of the results, default results).
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # seed, folder, method and its flags
    set -euo pipefail # bash -c does not inherit it
    local out=${RESULTS:-results}/camvid/$2_s$1 python=${PYTHON:-python} seed=$1 file=$3
    if [ -e "$out/test.txt" ]; then return; fi
    shift 3
    $python "$file.py" --dataset camvid --preset small --labeled 30 --precision bf16 --seed "$seed" \
        --workers 0 --evaluate-split val --output-dir "$out" --resume auto "$@" > "$out.log"
    $python "$file.py" --evaluate "$out/last.pt" --evaluate-split test --full-resolution > "$out.log"
    mv "$out.log" "$out/test.txt"
}
export -f run
export OMP_NUM_THREADS=1
mkdir -p "${RESULTS:-results}/camvid"
{
    echo "0 supervised_all classmix --supervised --labeled 1.0"
    for seed in 0 1 2 3 4; do
        sed "s/^/$seed /" <<END
supervised classmix --supervised
classmix classmix
cowmix cowmix
cutmix cowmix --perturbation cutmix
complexmix complexmix
c3semiseg_supervised c3semiseg --supervised
c3semiseg c3semiseg
END
    done
    for seed in 0 1 2; do
        echo "$seed cowmix_unet_supervised cowmix --network unet --supervised"
        echo "$seed cowmix_unet cowmix --network unet"
        echo "$seed classmix_long classmix --iterations 12000"
        echo "$seed complexmix_long complexmix --iterations 12000"
        echo "$seed supervised_long classmix --supervised --iterations 12000"
    done
} | xargs -P "${1:-2}" -L 1 bash -c 'run "$@"' run
"${PYTHON:-python}" benchmarks/table.py camvid
