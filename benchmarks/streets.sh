#!/usr/bin/env bash
# Trains the runs of the README's tables and plots of streets: at 32 labels the rows of ClassMix's
# table 3, CowMix's table 1 and C3-SemiSeg's table 3 with three seeds, and ComplexMix; with seed 0 other
# numbers of labels, ComplexMix's choices and C3-SemiSeg's tables 4 and 6. A seed chooses the labeled
# scenes, initial weights, batches and masks.
#     benchmarks/streets.sh [PROCESSES]
# PROCESSES runs (default 2) are trained at once, with one thread each. Runs that have ended are left
# out. Environment: PYTHON (default python), RESULTS (folder of the results, default results).
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # seed, folder, method and its flags
    set -euo pipefail # bash -c does not inherit it
    local out=${RESULTS:-results}/streets/$2_s$1 python=${PYTHON:-python} seed=$1 file=$3
    if [ -e "$out/result.json" ]; then return; fi
    shift 3
    $python "$file.py" "$@" --precision bf16 --seed "$seed" --output-dir "$out" --resume auto \
        > "$out.log"
    rm "$out.log"
}
export -f run
export OMP_NUM_THREADS=1
mkdir -p "${RESULTS:-results}/streets"
methods="supervised classmix --supervised
classmix classmix
complexmix complexmix
cowmix_supervised cowmix --supervised
cowmix cowmix
c3semiseg_supervised c3semiseg --supervised
c3semiseg c3semiseg"
{
    for seed in 0 1 2; do
        sed "s/^/$seed /" <<END
$methods
cowmix_cowout cowmix --perturbation cowout
cowmix_cutmix cowmix --perturbation cutmix
cowmix_cutout cowmix --perturbation cutout
cowmix_ict cowmix --perturbation ict
cowmix_aug cowmix --perturbation aug
cowmix_aug_supervised cowmix --perturbation aug --supervised
classmix_cow classmix --mask cow
classmix_cut classmix --mask cut
classmix_pixel classmix --weighting pixel
classmix_ramp classmix --weighting ramp --ramp-iterations 500
classmix_constant classmix --weighting constant
classmix_squared-error classmix --unlabeled-loss squared-error
classmix_soft classmix --unlabeled-loss soft-cross-entropy
classmix_crop classmix --crop 64 64
classmix_extra classmix --extra-augmentations
classmix_long classmix --iterations 4000
c3semiseg_no-consistency c3semiseg --consistency-weight 0
c3semiseg_no-contrast c3semiseg --contrast none
END
    done
    for labels in 8 100 800; do
        sed "s/^\([^ ]*\)/0 \1_$labels/; s/$/ --labeled $labels/" <<< "$methods"
    done
    sed "s/^/0 /" <<END
complexmix_p4 complexmix --blocks 4
complexmix_p16 complexmix --blocks 16
complexmix_p64 complexmix --blocks 64
complexmix_present complexmix --classes present
c3semiseg_labeled c3semiseg --contrast labeled
c3semiseg_unlabeled c3semiseg --contrast unlabeled
c3semiseg_random c3semiseg --no-hard-sampling
c3semiseg_no-mixing c3semiseg --contrast none --mixing none
c3semiseg_intra c3semiseg --contrast none --mixing intra
END
} | xargs -P "${1:-2}" -L 1 bash -c 'run "$@"' run
"${PYTHON:-python}" benchmarks/table.py streets_rows
