#!/usr/bin/env bash
# Every GPU measurement, in pieces that each end within nine minutes; nothing needs to be installed.
#   benchmarks/gpu_all.sh                 everything
#   benchmarks/gpu_all.sh PIECE...        first: in eight minutes, whether everything works, and the most telling numbers
#                                         second: tune, Nsight Compute on the heaviest kernels, sanitizer
#                                         smoke (every op on every backend against float64), profile (PyTorch's tables), ncu,
#                                         tests, large (tensors above 2^31 elements), sanitizer, ceilings, ops, memory,
#                                         tune (records the fastest configuration of each kernel),
#                                         {train,infer}-MODEL-BATCH: eager and compiled plain modules, ours, ours as a CUDA graph
#                                         {train,infer}-MODEL-BATCH-{autotune,timm}: beside max-autotune, beside timm's network
#                                         networks-train, networks-infer: these for every model and batch
#                                         dense: training steps of deeplabv3 at 512x512 and ssdlite at 320x320
# Nothing is measured where Triton, the CUDA extension or the GPU is missing: that is said first, with exit status 3.
# Results: benchmarks/results/gpu_*.json, written row by row, and output of tests in gpu_tests_*.txt; copied to $OUT where that is set.
# All of them in one archive, gpu_results.tar.gz, and on one screen at the end; what failed or did not run is said, and is failure.
# $TRITON_CACHE: an archive of compiled kernels (benchmarks/triton_cache.py), so that the first minutes are not the compiler's.
# ARGUMENTS="--device cpu --tiny" tries the script without a GPU; further flags of gpu_baselines.py go the same way.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

models=(mobilevitv3_s mobilevitv3_100 mobilevitv3_xxs mobilevitv3_050 mobilevitv2_100 mobilevit_s)
timm=(mobilevitv2_100 mobilevit_s)
# by benchmarks/gpu_model: the ops, and the kernels, that a training step spends its time in
heaviest=(inverted_residual patch_attention feed_forward norm_linear pointwise_conv batch_norm_act)
kernels='Backward|Filter|attention|feed_forward|input_bwd|pointwise'
logs=${OUT:-benchmarks/results}
results=$logs
[[ "${ARGUMENTS:-}" =~ --out\ ([^ ]+) ]] && results=${BASH_REMATCH[1]}
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

shard() { # name pytest-arguments...: in the background, output to a file
    local name=$1
    shift
    # pytest ends by itself, with a verdict; `timeout` is for a test that hangs
    MVIT3_TEST_SECONDS=$((${LIMIT:-530} - 20)) timeout --kill-after=10 "${LIMIT:-530}" \
        python3 -m pytest -v --no-header --tb=short -p no:cacheprovider "$@" >"$logs/gpu_tests_$name.txt" 2>&1
    echo "$? $name" >>"$logs/gpu_tests_shards.txt"
}

run_tests() { # the GPU tests side by side, for most of their time is the compiler's, on the CPU
    mkdir -p "$logs"
    : >"$logs/gpu_tests_shards.txt"
    local start=$SECONDS file class status name functions
    echo "== tests"
    for file in tests/gpu/test_*_gpu.py; do
        name=$(basename "$file" .py)
        if [ "$name" = test_kernels_gpu ]; then
            for class in $(grep -oP '^class \KTest\w+' "$file"); do shard "$class" "$file::$class" & done
            mapfile -t functions < <(grep -oP '^def \Ktest_\w+' "$file")
            shard functions "${functions[@]/#/$file::}" &
        else
            shard "$name" "$file" -k "not 2_to_the_31" -m "not slow" &
        fi
    done
    wait
    while read -r status name; do
        echo "-- $name: $(tail -n 1 "$logs/gpu_tests_$name.txt")"
        # pytest's 5: nothing left after the selection
        if [ "$status" != 0 ] && [ "$status" != 5 ]; then
            failed+=("$name (exit $status)")
            grep -E ' (FAILED|ERROR) ' "$logs/gpu_tests_$name.txt" | cut -c 1-300 | head -20
        fi
    done <"$logs/gpu_tests_shards.txt"
    echo "== tests took $((SECONDS - start)) s"
}

run() {
    local piece model batch extra
    case $1 in
        first)
            LIMIT=60 baseline smoke
            LIMIT=110 baseline profile --model mobilevitv3_s
            LIMIT=60 baseline ops --ops "${heaviest[@]}"
            local telling=(--candidates eager_channels_last ours ours_graph compile compile_graph --host plain --rounds 7 --name first)
            LIMIT=120 baseline train --model mobilevitv3_s --batches 256 "${telling[@]}"
            LIMIT=70 baseline infer --model mobilevitv3_s --batches 256 "${telling[@]}"
            LIMIT=60 baseline infer --model mobilevitv3_s --batches 1 "${telling[@]}"
            ;;
        second)
            run tune
            LIMIT=240 run ncu
            run sanitizer
            ;;
        tests) run_tests ;;
        smoke) baseline smoke ;;
        profile) baseline profile --model mobilevitv3_s ;;
        ncu) # what the six heaviest kernels of a step wait for
            limited ncu ncu --set full --target-processes all --launch-skip 600 --launch-count 120 \
                --kernel-name "regex:$kernels" --export "$results/gpu_ncu" --force-overwrite \
                python3 benchmarks/gpu_baselines.py train --model mobilevitv3_s --batches 256 --candidates ours \
                --host plain --rounds 1 --name ncu ${ARGUMENTS:-}
            ;;
        large) limited large python3 -m pytest -q -p no:cacheprovider tests/gpu -k 2_to_the_31 ;;
        sanitizer) limited sanitizer python3 -m pytest -q -p no:cacheprovider tests/gpu -m slow ;;
        tune) limited tune python3 benchmarks/tune.py ;;
        ceilings | ops) baseline "$1" ;;
        memory) for model in "${models[@]}"; do baseline memory --model "$model"; done ;;
        train-*-* | infer-*-*)
            IFS=- read -r piece model batch extra <<<"$1"
            case ${extra:-} in
                autotune) extra=(--host plain --candidates eager_channels_last ours ours_graph max_autotune --name autotune) ;;
                timm) extra=(--host timm --candidates eager_channels_last compile compile_graph ours ours_graph --name timm) ;;
                *) extra=(--host plain --candidates eager_nchw eager_channels_last ours ours_graph compile ours_compile eager_graph compile_graph) ;;
            esac
            baseline "$piece" --model "$model" --batches "$batch" "${extra[@]}"
            ;;
        networks-train) for model in "${models[@]}"; do for batch in 128 256; do network train "$model" "$batch"; done; done ;;
        dense)
            run train-deeplabv3_mobilevitv3_s-16
            run train-ssdlite_mobilevitv3_s-32
            ;;
        networks-infer) for model in "${models[@]}"; do for batch in 1 32 256; do network infer "$model" "$batch"; done; done ;;
        *)
            echo "unknown piece $1" >&2
            exit 2
            ;;
    esac
}

network() { # piece model batch: every candidate
    run "$1-$2-$3"
    run "$1-$2-$3-autotune"
    case " ${timm[*]} " in *" $2 "*) run "$1-$2-$3-timm" ;; esac
}

summarize() { # one archive, one screen
    tar -czf "$results/gpu_results.tar.gz" -C "$results" $(cd "$results" && ls gpu_*.json gpu_tests_*.txt gpu_profile_*.txt gpu_ncu* 2>/dev/null)
    echo "== everything is in $results/gpu_results.tar.gz"
    python3 benchmarks/gpu_summary.py "$results" || failed+=("results (see above)")
}

if [[ ! "${ARGUMENTS:-}" =~ "--device cpu" ]]; then
    python3 -m benchmarks.gpu_check || exit 3
fi
if [ -n "${TRITON_CACHE:-}" ]; then python3 -m benchmarks.triton_cache unpack "$TRITON_CACHE"; fi

[ $# -gt 0 ] || set -- tests large sanitizer tune ops memory networks-infer networks-train dense
for piece; do run "$piece"; done
summarize
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
