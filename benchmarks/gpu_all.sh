#!/usr/bin/env bash
# Every GPU measurement, in pieces that each end within nine minutes; nothing needs to be installed or built.
#   benchmarks/gpu_all.sh                 everything
#   benchmarks/gpu_all.sh PIECE...        tests, ceilings, ops, sweep (ops and variants of their configuration),
#                                         train-MODEL-BATCH, infer-MODEL-BATCH,
#                                         baselines-train, baselines-infer (such a piece for each model and batch)
# Results: benchmarks/results/gpu_*.json, written row by row, and copied to $OUT where that is set.
# ARGUMENTS="--device cpu --tiny" tries the script without a GPU; further flags of gpu_baselines.py go the same way.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

models=(mobilevitv3_s mobilevitv3_100 mobilevitv3_xxs mobilevit_s)
failed=()

limited() { # name command...
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    timeout --kill-after=10 "${LIMIT:-530}" "$@" || failed+=("$name (exit $?)")
    echo "== $name took $((SECONDS - start)) s"
}

baseline() { # piece flags...
    # shellcheck disable=SC2086
    limited "$*" python3 benchmarks/gpu_baselines.py "$@" ${ARGUMENTS:-}
}

run() {
    case $1 in
        tests) limited tests python3 -m pytest -q -p no:cacheprovider tests/gpu ;;
        ceilings | ops) baseline "$1" ;;
        sweep) baseline ops --sweep ;;
        train-*-* | infer-*-*)
            local piece=${1%%-*} batch=${1##*-} model=${1#*-}
            baseline "$piece" --model "${model%-*}" --batches "$batch"
            ;;
        baselines-train) for name in "${models[@]}"; do for size in 128 256; do run "train-$name-$size"; done; done ;;
        baselines-infer) for name in "${models[@]}"; do for size in 1 32 256; do run "infer-$name-$size"; done; done ;;
        *)
            echo "unknown piece $1" >&2
            exit 2
            ;;
    esac
}

[ $# -gt 0 ] || set -- tests sweep baselines-infer baselines-train
for piece; do run "$piece"; done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
