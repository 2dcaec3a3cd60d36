#!/usr/bin/env bash
# gpu.sh: everything that a machine with an NVIDIA GPU can say about this tree, in one command.
#
#     dev/gpu.sh                                          all parts: build test sanitize repro speed bench busy
#     dev/gpu.sh build speed                              some of them
#     RECIPES="bf16 quartet" MODELS="200m llama2-7b" dev/gpu.sh build speed busy --data data/books
#
#   build      train_llama and test_llama in BF16, test_llama in FP32
#   test       test_llama, the sections TESTS, in both builds
#   sanitize   compute-sanitizer: memcheck and racecheck, SANITIZE_SECONDS each
#   repro      two short runs with one seed end in the same bits
#   speed      training runs; tokens/s, MFU and memory of the steady steps (the first third is left out)
#   bench      train_llama --bench of the same configurations
#   busy       the same runs under dev/cuda/busy.sh: share of the time in which the GPU was busy
#
# --data DIR: token shards (*train*.bin) of a vocabulary of 32,000 instead of random (Zipf) tokens, which need numpy. A
# part that fails is reported and the next one begins; exit code 1 if any failed. What ran out of its time is "not
# finished", neither ok nor failed. Logs stay in build/gpu, the figures go to OUT_JSON.
#
# shellcheck disable=SC2086,SC2317  # numbers and fixed paths stand unquoted; the parts are called by name
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

MODELS=${MODELS:-"200m tinyllama-1.1b"}      # llama2-7b is known, too
RECIPES=${RECIPES:-bf16}
TESTS=${TESTS:-"cuda cuda_model cuda_quant cuda_fp8"}
OUT_JSON=${OUT_JSON:-gpu.json}
SANITIZE_SECONDS=${SANITIZE_SECONDS:-300}
RUN_SECONDS=${RUN_SECONDS:-400}              # limit of a test, a training run or a bench
declare -A STEPS=([200m]=14 [tinyllama-1.1b]=4 [llama2-7b]=4)
declare -A OPTIONS=(
    [200m]="--batch-size 64 --warmup-steps 10"
    [tinyllama-1.1b]="--batch-size 16 --batch-tokens 524288"
    [llama2-7b]="--seq-len 2048 --batch-size 8 --batch-tokens 131072 --adam-dtype bf16"
)
RACECHECK_HEADS=(128 64)                     # sizes of a head; the models are small, because racecheck is slow

WORK=$PWD/build/gpu
BF16=build/BF16-cuda FP32=build/FP32-cuda
export MAKEFLAGS='' PYTHONDONTWRITEBYTECODE=1 LC_ALL=C

fail() { echo "gpu.sh: $1" >&2; exit "${2:-1}"; }

# ---------------------------------------------------------------------------------------------------------------------
# arguments

parts=() data=""
while [ $# -gt 0 ]; do
    case $1 in
        build | test | sanitize | repro | speed | bench | busy) parts+=("$1") ;;
        --data) [ $# -gt 1 ] || fail "--data needs a folder" 2
                data=$(realpath -m "$2"); shift
                [ -d "$data" ] || fail "--data: there is no folder '$data'" 66 ;;
        -h | --help) awk '/^# shellcheck/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown part '$1'; there are build test sanitize repro speed bench busy" 2 ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(build test sanitize repro speed bench busy)

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$gpu" ] || fail "nvidia-smi shows no GPU here" 69
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
sanitizer=$(command -v compute-sanitizer || ls "${nvcc%/*}/compute-sanitizer" 2>/dev/null)
mkdir -p "$WORK" || exit 74
: >"$WORK/parts.tsv"
echo "GPU $gpu; parts: ${parts[*]}; logs in $WORK"

# ---------------------------------------------------------------------------------------------------------------------
# one part: its output goes to a log, one line to the screen

failed=0 shards=()
# part NAME COMMAND...: 0 is ok, 124 not finished, 77 skipped, all else failed; the last line of the output is shown
part() {
    local name=$1 begin=$SECONDS code=0 state log note; shift
    log=$WORK/${name//[^A-Za-z0-9.-]/-}.log
    "$@" >"$log" 2>&1 </dev/null || code=$?
    case $code in
        0) state=ok ;;
        77) state=skipped ;;
        124) state="not finished" ;;
        *) state=FAILED failed=1 ;;
    esac
    note=$(tail -n 1 "$log" | cut -c 1-140)
    printf '%-44s %-12s %4d s   %s\n' "$name" "$state" $((SECONDS - begin)) "$note"
    printf '%s\t%s\t%d\t%s\n' "$name" "$state" $((SECONDS - begin)) "${note//$'\t'/ }" >>"$WORK/parts.tsv"
    [ "$state" != FAILED ] || tail -n 20 "$log" | sed 's/^/    /'
}
# limited SECONDS COMMAND...: exit code 124 where the time did not suffice
limited() {
    local code=0
    timeout --kill-after=15 "$@" || code=$?
    [ $code -ne 137 ] || code=124
    return $code
}

# ---------------------------------------------------------------------------------------------------------------------
# build, test, sanitize

build() {
    local one=0 two=0 bf16 fp32
    make -s --no-print-directory found CUDA=1
    make -s --no-print-directory -j2 CUDA=1 BUILD=$BF16 $BF16/train_llama $BF16/test_llama & bf16=$!
    make -s --no-print-directory CUDA=1 PRECISION=FP32 BUILD=$FP32 $FP32/test_llama & fp32=$!
    wait $bf16 || one=1
    wait $fp32 || two=1
    [ $one -eq 0 ] && [ $two -eq 0 ]
}

run_tests() {
    local sections
    read -r -a sections <<<"$TESTS"
    limited "$RUN_SECONDS" "$1/test_llama" "${sections[@]}" || return
    # a section that was skipped has tested nothing
    tail -n 1 "$log" | grep -qE '^[1-9][0-9]* passed, 0 failed$' && ! grep -q '^skip' "$log"
}

# sanitize TOOL COMMAND...: clean only where the tool's own summary says so
sanitize() {
    local tool=$1 code=0 summary hazards ours filter=(); shift
    [ -n "$sanitizer" ] || { echo "compute-sanitizer is not here"; return 77; }
    [ "$tool" != racecheck ] || filter=(--racecheck-report analysis --print-limit 1000000)
    limited "$SANITIZE_SECONDS" "$sanitizer" --tool "$tool" "${filter[@]}" "$@" || code=$?
    summary=$(grep -E '(ERROR|RACECHECK) SUMMARY' "$log" | tail -n 1)
    if [ $code -eq 124 ]; then
        echo "stopped after $SANITIZE_SECONDS s; reports so far: $(grep -cE '^=+ (Error|Warning|Invalid|Race)' "$log")"
        return 124
    fi
    if [ "$tool" = racecheck ]; then    # it reports cuBLASLt's own kernels, too: those do not count
        hazards=$(grep -cE '(Race reported between|hazard detected)' "$log")
        ours=$(grep -E '(Race reported between|hazard detected|and (Read|Write) access)' "$log" | grep -vcE 'nvjet|cutlass|cublas')
        echo "exit code $code; ${summary:-no summary}; $hazards reports, $ours of kernels of this tree"
        [ $code -eq 0 ] && [ -n "$summary" ] && [ "$ours" -eq 0 ]
        return
    fi
    echo "exit code $code; ${summary:-no summary}"
    [ $code -eq 0 ] && [[ $summary =~ SUMMARY:\ 0\ (errors|hazards) ]]
}

sanitize_all() {
    local size
    part "memcheck test_llama cuda_model" sanitize memcheck $BF16/test_llama cuda_model
    for size in "${RACECHECK_HEADS[@]}"; do
        rm -rf "$WORK/racecheck"
        part "racecheck train_llama, head size $size" sanitize racecheck $BF16/train_llama --model tiny --layers 2 \
            --channels $((2 * size)) --heads 2 --kv-heads 1 --recipe bf16 --device cuda --graphs off "${shards[@]}" \
            --vocab-size 32000 --seq-len 256 --batch-size 2 --batch-tokens 1024 --steps 2 --save-every 0 \
            --out "$WORK/racecheck"
    done
}

# ---------------------------------------------------------------------------------------------------------------------
# data, reproducibility

# token frequencies like those of text: p(rank) ~ 1/rank, independent draws
make_shards() {
    [ -s "$1/train_000000.bin" ] && { echo "here already"; return; }
    mkdir -p "$1" && python3 - "$1" <<'END'
import sys
import numpy as np
V, rng = 32000, np.random.default_rng(1)
share = np.cumsum(1 / np.arange(1, V + 1))
ids = rng.permutation(V).astype("<u2")
count = 10_000_000
ranks = np.searchsorted(share, rng.random(count) * share[-1])
header = np.zeros(256, "<i4")
header[:3] = 20240520, 1, count
with open(f"{sys.argv[1]}/train_000000.bin", "wb") as file:
    file.write(header.tobytes() + ids[np.minimum(ranks, V - 1)].tobytes())
print(f"{count} tokens")
END
}

repro() {
    local recipe=$1 run name
    for run in a b; do
        rm -rf "$WORK/repro-$run"
        limited "$RUN_SECONDS" $BF16/train_llama --model tiny --heads 2 --recipe "$recipe" --device cuda --seed 42 \
            --vocab-size 32000 "${shards[@]}" --steps 20 --save-every 0 --out "$WORK/repro-$run" || return
    done
    for name in model.safetensors optim-00000-of-00001.safetensors; do
        cmp "$WORK"/repro-{a,b}/step_00000020/$name || return
    done
    echo "20 steps of tiny, twice: weights, master copy and moments are the same bits"
}

# ---------------------------------------------------------------------------------------------------------------------
# training runs

# unsaved OUT STEPS COMMAND...: a run without its final checkpoint, which for a 7B model is 94 GB: a folder of that
# name, made while the run is under way, counts as already saved.
unsaved() {
    local out=$1 steps=$2 pid; shift 2
    rm -rf "$out"
    limited "$RUN_SECONDS" "$@" --steps "$steps" --out "$out" &
    pid=$!
    until [ -s "$out/metrics.jsonl" ] || ! kill -0 $pid 2>/dev/null; do sleep 0.1; done
    mkdir -p "$out/$(printf 'step_%08d' "$steps")"
    wait $pid
}

# configuration MODEL RECIPE: fills the array `command` and `steps`
configuration() {
    local extra
    read -r -a extra <<<"${OPTIONS[$1]:-}"
    steps=${STEPS[$1]:-6}
    command=("$BF16/train_llama" --model "$1" --recipe "$2" --device cuda "${extra[@]}")
}

speed() {
    local command steps
    configuration "$1" "$2"
    unsaved "$WORK/speed-$1-$2" "$steps" "${command[@]}" "${shards[@]}" --save-every 0 --log-every 0 || return
    grep '^step ' "$log" | tail -n 1
}
bench() {
    local command steps
    configuration "$1" "$2"
    limited "$RUN_SECONDS" "${command[@]}" --bench || return
    grep '^step ' "$log" | tail -n 1
}
busy() {
    local command steps json=$WORK/busy-$1-$2.json
    configuration "$1" "$2"
    rm -f "$json"
    export BUSY_JSON=$json BUSY_SKIP=$(((steps + 2) / 3))
    unsaved "$WORK/busy-$1-$2" "$steps" dev/cuda/busy.sh "${command[@]}" "${shards[@]}" --save-every 0 \
        --log-every 0 || return
    grep '^busy: GPU busy' "$log" | tail -n 1
    [ -s "$json" ]
}

# ---------------------------------------------------------------------------------------------------------------------
# the parts in order

for name in "${parts[@]}"; do
    case $name in
        sanitize | repro | speed | busy)
            if [ -z "$data" ]; then
                data=$WORK/zipf
                part "random tokens" make_shards "$data"
            fi
            shards=(--train-data "$data/*train*.bin") ;;    # without validation
    esac
    case $name in
        build) part "build" build ;;
        test)
            part "BF16 test_llama $TESTS" run_tests $BF16
            part "FP32 test_llama $TESTS" run_tests $FP32 ;;
        sanitize) sanitize_all ;;
        repro) for recipe in $RECIPES; do part "repro $recipe" repro "$recipe"; done ;;
        *)
            for model in $MODELS; do
                for recipe in $RECIPES; do part "$name $model $recipe" "$name" "$model" "$recipe"; done
            done ;;
    esac
done

# ---------------------------------------------------------------------------------------------------------------------
# the table, and everything as JSON

commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
[ "$commit" = unknown ] || [ -n "${COMMIT:-}" ] || git diff --quiet HEAD || commit="$commit, changed"
python3 - "$WORK" "$OUT_JSON" "$gpu" "$commit" "$MODELS" "$RECIPES" <<'END' || failed=1
import json, math, os, statistics, sys
work, out, gpu, commit, models, recipes = sys.argv[1:]
with open(f"{work}/parts.tsv") as file:
    parts = [dict(zip(("part", "state", "seconds", "note"), line.rstrip("\n").split("\t"))) for line in file]
ran = {part["part"] for part in parts}


def text(path):
    with open(path, errors="replace") as file:
        return file.read()


def training(folder):
    """median of the steady steps, memory, losses"""
    records = [json.loads(line) for line in text(f"{folder}/metrics.jsonl").splitlines()]
    steps = [r for r in records if r["type"] == "step"]
    steady = steps[math.ceil(len(steps) / 3):]
    if not steady:
        return {}
    result = {key: statistics.median(s[key] for s in steady) for key in ("tok_s", "dt_ms", "mfu") if key in steady[0]}
    memory = [r["bytes"] for r in records if r["type"] == "memory"]
    result.update(steady_steps=len(steady), memory_gib=memory[-1] / 2**30 if memory else None,
                  losses=[s["loss"] for s in steps], dt_ms_all=[s["dt_ms"] for s in steps],
                  options=records[0].get("options"))
    return result


runs = []
for model in models.split():
    for recipe in recipes.split():
        run, name = {"model": model, "recipe": recipe}, f"{model} {recipe}"
        if f"speed {name}" in ran and os.path.exists(f"{work}/speed-{model}-{recipe}/metrics.jsonl"):
            run.update(training(f"{work}/speed-{model}-{recipe}"))
        if f"busy {name}" in ran and os.path.exists(f"{work}/busy-{model}-{recipe}.json"):
            run["busy"] = json.loads(text(f"{work}/busy-{model}-{recipe}.json"))
        if f"bench {name}" in ran:
            run["bench"] = text(f"{work}/bench-{model}-{recipe}.log").splitlines()
        if len(run) > 2:
            runs.append(run)
with open(out, "w") as file:
    json.dump({"gpu": gpu, "commit": commit, "parts": parts, "runs": runs}, file, indent=1)
    file.write("\n")


def cell(value, form):
    return form.format(value) if value is not None else "-"


if runs:
    print(f"\n{'configuration':28} {'tokens/s':>10} {'MFU':>7} {'memory':>10} {'busy':>7}")
for run in runs:
    busy = run["busy"]["busy_share"] if "busy" in run else None
    print(f"{run['model'] + ' ' + run['recipe']:28} {cell(run.get('tok_s'), '{:,.0f}'):>10} "
          f"{cell(run.get('mfu'), '{:.1%}'):>7} {cell(run.get('memory_gib'), '{:.1f} GiB'):>10} "
          f"{cell(busy, '{:.1%}'):>7}")
count = {state: sum(p["state"] == state for p in parts) for state in ("ok", "FAILED", "not finished", "skipped")}
print("\n" + ", ".join(f"{n} {state}" for state, n in count.items() if n)
      + f"; {sum(int(p['seconds']) for p in parts)} s; commit {commit}; written to {out}")
END
exit $failed
