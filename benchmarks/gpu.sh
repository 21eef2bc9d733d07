#!/usr/bin/env bash
# Measures all that needs a GPU, within 9 minutes on one card with 16 cores, and prints tables.
#     benchmarks/gpu.sh OUT [--dry] [PART...]
# OUT gets each part's output (PART.txt), run folders, speed.jsonl, and limit, exit status and seconds
# of the parts (parts.tsv). A part that fails or takes too long does not stop the next. --dry runs
# tiny sizes, on a CPU too. The parts, in order of worth (default: these):
#     compiled   speed of the recipes in bf16, compiled; it compiles while the next two parts run
#     tests      the tests marked cuda
#     cli        each file from the command line: stopped by SIGTERM, then resumed
#     bf16, fp32 speed of the recipes, not compiled; precision: losses of ClassMix in both
#     camvid     the runs of camvid.sh that end in time, from data/camvid; streets: those of streets.sh
# and, only when they are named, experiments:
#     graphs, combo, cpp  as compiled, with CUDA graphs, merged kernels, or launches from C++
#     one_group  C3-SemiSeg with all images in one group: fewer kernels, but another loss
# Environment: PYTHON (default python), CAMVID (folder of CamVid, default data/camvid), ONLY (a pattern
# of the recipes to be timed).
set -uo pipefail
out=$(mkdir -p "$1" && realpath "$1") && shift
camvid=$(realpath -m "${CAMVID:-data/camvid}") all="compiled tests cli bf16 fp32"
export out camvid PYTHON=${PYTHON:-python} jobs='' tiny='' crop='' short='' steps=10 stopped=400 patience=1
if [ "${1:-}" = --dry ]; then
    shift && all="tests cli fp32" patience=20 jobs=2 short="--iterations 10 --warmup 2 --eval-every 10" steps=1 stopped=8
    tiny="--layers 1 1 1 1 --width 4 --size 32 64" crop="--layers 1 1 1 1 --width 4 --crop 32 32 --batch-size 2"
fi
parts=" ${*:-$all precision streets camvid} "
cd "$(dirname "$0")/.." || exit
"$PYTHON" -c "import torch" || { echo "set PYTHON to one with requirements-dev.txt" >&2 && exit 2; }

at_once() { sed 's/^ *//' | xargs -P "${jobs:-$1}" -L 1 "$PYTHON"; } # Python with each line's words, $1 at once
recipes() { # prepares all recipes at once; then they take turns to be timed
    speed="benchmarks/speed.py --json '$out/speed.jsonl' --turn '$out/turn' --steps $steps"
    lines="$speed classmix $* $tiny --dataset cityscapes
        $speed classmix $* $crop --dataset voc
        $speed cowmix $* $tiny --dataset camvid
        $speed cowmix $* $crop --dataset voc
        $speed c3semiseg $* $tiny ${jobs:+--crop 32 64 --batch-size 4 --per-class 4} --dataset cityscapes
        $speed --data classmix $* $tiny --dataset streets"
    [ -d "$camvid" ] && lines+=$'\n'"$speed --data classmix $* $tiny --dataset camvid --data-dir '$camvid'"
    grep -E "${ONLY:-.}" <<< "$lines" | at_once 7
}
untimed() { exec 9> "$out/turn" && flock --shared 9; } # until this part ends, nothing is timed
tests() {
    parallel=$([ -n "$jobs" ] || "$PYTHON" -c "import xdist; print('-n 4')")
    untimed && "$PYTHON" -m pytest -q -rs -m cuda $parallel $(grep -l mark.cuda tests/*.py)
}
cli() { untimed && printf '%s\n' classmix complexmix cowmix c3semiseg | xargs -P "${jobs:-4}" -I{} bash -c 'resumed {}'; }
resumed() {
    last="$out/cli/$1/last.pt" flags="$tiny --iterations $stopped --eval-every 400 --save-every 2"
    "$PYTHON" "$1.py" $flags $([ "$1" = cowmix ] || echo --warmup 2) --output-dir "$out/cli/$1" &
    until [ -e "$last" ] || ! kill -0 $!; do sleep 0.1; done
    kill -TERM $! && ! wait $! && "$PYTHON" "$1.py" --resume "$last" --save-every 400
}
compiled() { recipes; }
graphs() { recipes --compile --inductor triton.cudagraphs; }
combo() { recipes --compile --inductor combo_kernels; }
cpp() { recipes --compile --inductor cpp_wrapper; }
one_group() { ONLY=c3semiseg recipes --group-size 16; }
bf16() { recipes --precision bf16 --no-compile; }
fp32() { recipes --precision fp32 --no-compile; }
precision() {
    flags="$tiny --iterations 50 --warmup 10 --eval-every 50 --no-compile $short --output-dir '$out/precision"
    printf '%s\n' "classmix.py --precision bf16 $flags/bf16'" "classmix.py --precision fp32 $flags/fp32'" | at_once 2
}
streets() { RESULTS="$out" benchmarks/streets.sh 12; } # runs that end in time
camvid() { RESULTS="$out" benchmarks/camvid.sh 12; }
part() { # runs part $1 for at most $2 seconds
    [[ $parts == *" $1 "* ]] || return
    rm -rf "${out:?}/$1" && local start=$SECONDS
    timeout -k 5 $(($2 * patience)) bash -c "$1" > "$out/$1.txt" 2>&1
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" $? $((SECONDS - start)) | tee -a "$out/parts.tsv"
}
export -f at_once recipes untimed compiled graphs combo cpp one_group tests cli resumed bf16 fp32 precision streets camvid
printf 'part\tlimit\tstatus\tseconds\n' > "$out/parts.tsv"
part compiled 240 & part tests 100; part cli 90; wait # at most 240 s; the others 290 s
part bf16 50; part fp32 50; part precision 25; part camvid 90; part streets 75; part graphs 240
part combo 240; part cpp 240; part one_group 120
"$PYTHON" benchmarks/table.py "$out" | tee "$out/tables.md"
awk -F '\t' 'NR > 1 && $3 { exit 1 }' "$out/parts.tsv"
