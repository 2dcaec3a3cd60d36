#!/usr/bin/env bash
# gpu_ranks.sh: what several GPUs of one machine do together, measured and checked; built before, for instance by dev/gpu.sh build.
#
#     dev/gpu_ranks.sh --data DIR                        all parts: losses elastic scaling saves stops kills faults
#     TRAIN=build/BF16-cuda/train_llama dev/gpu_ranks.sh --data DIR losses scaling
#
#   losses    150 steps of 30m on one GPU, then 50 at a lower rate on 1, 2 and 4 GPUs, bf16 and quartet: how far apart the losses
#             are, beside a run on one GPU with half the micro-batch, whose sums are only ordered otherwise; 4 GPUs twice give
#             the same bits
#   elastic   4 -> 2 -> 1 -> 4 GPUs (2 -> 2 -> 1 -> 2): what is loaded is what was saved, to the bit; the same samples, losses as without a stop
#   scaling   MODELS on 1 GPU and on all (SIZES=1: only that; FIRST: its GPU), the same work a GPU: tokens/s, ratio, memory against --plan
#   saves     tinyllama-1.1b on all GPUs: what asynchronous saves cost the steps
#   stops     the same model: time from SIGUSR1 to exit code 75, saving to the disk and to memory (/dev/shm)
#   kills     dev/test/kill.sh with 2 ranks, KILLS kills in all, on two pairs of GPUs at once
#   faults    dev/test/ranks.sh and dev/test/ranks_faults.sh; on 2 GPUs only the second, with jobs of 2 ranks
#
# --data DIR: token shards of a vocabulary of at most 32,000. Needs numpy and 4 GPUs, or 2, which then are all; logs and metrics stay in build/gpu_ranks.
# shellcheck disable=SC2086  # numbers and fixed paths stand unquoted
parts=() data=""
while [ $# -gt 0 ]; do
    case $1 in
        losses | elastic | scaling | saves | stops | kills | faults) parts+=("$1") ;;
        --data) data=$(realpath -m "${2:-}"); shift
                [ -d "$data" ] || { echo "gpu_ranks.sh: --data: there is no folder '$data'" >&2; exit 66; } ;;
        -h | --help) awk '/^# shellcheck/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "gpu_ranks.sh: unknown part '$1'; there are losses elastic scaling saves stops kills faults" >&2; exit 2 ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(losses elastic scaling saves stops kills faults)
[ -n "$data" ] || { echo "gpu_ranks.sh: --data DIR says where the token shards are" >&2; exit 2; }
source "$(dirname "$0")/test/lib.sh"
need_mpirun
MODELS=${MODELS:-"tinyllama-1.1b llama2-7b"} KILLS=${KILLS:-50}
LOGS=$ROOT/build/gpu_ranks
OUT=${OUT_DIR:-$LOGS}              # checkpoints; those of the 1.1B take 50 GB
mkdir -p "$LOGS" "$OUT"
N=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
[ "$N" -ge 2 ] || { echo "gpu_ranks.sh: fewer than 2 GPUs here" >&2; exit 69; }
if [ "$N" -ge 4 ]; then N=4 ALL=0,1,2,3 OTHERS=2,3 SIZES=${SIZES:-1 4}; else N=2 ALL=0,1 OTHERS=0,1 SIZES=${SIZES:-1 2}; fi
cd "$OUT" || exit 1

# on GPUS NAME ARGUMENTS...: trains on the GPUs of the list (0,1) into folder NAME; its output goes to NAME.log. PLAN of launch
on() {
    local gpus=$1 name=$2 n launch=(); shift 2
    n=$(tr -cd , <<<"$gpus" | wc -c)
    [ "$n" -eq 0 ] || launch=(${LIMIT-timeout 300} "${LAUNCH[@]}" -np $((n + 1)))
    CUDA_VISIBLE_DEVICES=$gpus "${launch[@]}" "$TRAIN" --device cuda --train-data "$data/*train*.bin" --val-every 0 --out "$name" \
        "$@" >"$LOGS/${name##*/}.log" 2>&1
}
# again NAME...: without what an earlier start of this script left
again() { for name in "$@"; do rm -rf "${OUT:?}/$name"; done; }
kept() { cp "$1/metrics.jsonl" "$LOGS/$1.jsonl" 2>/dev/null; }

cat >"$WORK/figures.py" <<'PYTHON'
import json, statistics, struct, sys
import numpy
import runner

def steps(folder):
    return [r for r in map(json.loads, open(f"{folder}/metrics.jsonl")) if r["type"] == "step"]

def apart(a, *others):
    """Largest and last difference of the losses of each run to those of the first; exit code 1 where one is more than
    3 times as far as the first of the others."""
    x, limit = {r["step"]: r["loss"] for r in steps(a)}, None
    for other in others:
        y = {r["step"]: r["loss"] for r in steps(other) if r["step"] in x}
        assert sorted(y) == sorted(x), f"{other}: steps {min(y)} to {max(y)}, {a}: {min(x)} to {max(x)}"
        d = {s: abs(x[s] - y[s]) for s in y}
        at = max(d, key=d.get)
        print(f"{other} from {a}: at most {d[at]:.5f} nats, at step {at}; {d[max(d)]:.5f} at step {max(d)}")
        limit = 3 * d[at] if limit is None else limit
        assert d[at] <= limit, f"{other} is farther than {limit:.5f}"

def state(checkpoint):
    """master, m, v of the whole model, put together from all optimizer files"""
    with open(f"{checkpoint}/state.json") as file:
        description = json.load(file)
    whole = {}
    for piece in description["slices"]:
        data = open(f"{checkpoint}/{piece['file']}", "rb").read()
        length, = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8:8 + length]).items():
            if name == "__metadata__":
                continue
            kind = {"F32": "<u4", "BF16": "<u2"}[entry["dtype"]]
            flat = whole.setdefault(name, numpy.full(description["elements"], 0xffff if kind == "<u2" else 0xffffffff, kind))
            values = numpy.frombuffer(data, kind, offset=8 + length + entry["data_offsets"][0],
                                      count=sum(end - begin for begin, end in piece["ranges"]))
            at = 0
            for begin, end in piece["ranges"]:
                flat[begin:end] = values[at:at + end - begin]
                at += end - begin
    return whole

def loaded(a, b):
    """b was saved after a step that was skipped, so it holds what was loaded from a."""
    x, y = state(a), state(b)
    assert x.keys() == y.keys() and len(x) == 3, f"{list(x)} in {a}, {list(y)} in {b}"
    for name in x:
        differ = int((x[name] != y[name]).sum())
        assert differ == 0, f"{name}: {differ} of {x[name].size} elements differ"
    assert open(f"{a}/model.safetensors", "rb").read() == open(f"{b}/model.safetensors", "rb").read(), "the weights differ"
    print(f"{b} holds {a}: {sum(v.size for v in x.values())} values of optimizer state and the weights, to the bit")

def position(a, b):
    x, y = (json.load(open(f"{c}/state.json")) for c in (a, b))
    same = [k for k in x if k not in ("files", "slices", "ranks") and x[k] == y.get(k)]
    differ = [k for k in x if k not in ("files", "slices", "ranks") and x[k] != y.get(k)]
    print(f"the same in {a} and {b}: {' '.join(same)}; not: {' '.join(differ)}")
    assert "tokens" in same and "step" in same

def speed(*folders):
    """median tokens/s without the first two steps, and the ratio to the first folder's times the number of ranks"""
    first = None
    for folder in folders:
        ranks = int(folder.rsplit("-", 1)[1])
        rate = statistics.median(r["tok_s"] for r in steps(folder)[2:])
        first = first or rate / ranks
        print(f"{folder}: {rate:.0f} tokens/s, {rate / (first * ranks):.3f} of {ranks} times one GPU's")

def saved(folder):
    for r in map(json.loads, open(f"{folder}/metrics.jsonl")):
        if r["type"] == "save":
            print(f"save of step {r['step']}: {json.dumps({k: v for k, v in r.items() if k not in ('type', 'path')})}")

def saves(folder, every):
    """what saves cost: training held while they began, and how much longer the steps beside them took"""
    every, records = int(every), [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    dt = {r["step"]: r["dt_ms"] for r in records if r["type"] == "step"}
    usual = statistics.median(ms for s, ms in dt.items() if s > 3 and s % every > 10)
    print(f"a step {usual:.1f} ms, spread of the steps without a save "
          f"{statistics.pstdev([ms for s, ms in dt.items() if s > 3 and s % every > 10]):.1f}")
    for r in records:
        if r["type"] == "save" and r["step"] % every == 0 and r["step"] + 10 in dt:
            longer = sum(dt[r["step"] + i] - usual for i in range(1, 11))
            print(f"save of step {r['step']}: {json.dumps({k: v for k, v in r.items() if k not in ('type', 'path')})}, "
                  f"the next 10 steps together {longer:+.1f} ms")

runner.run(globals(), sys.argv[1:])
PYTHON
figures() { python3 "$WORK/figures.py" "$@" | tee -a "$LOGS/figures.txt"; return ${PIPESTATUS[0]}; }
# a check whose figures are shown
shown() {
    local name=$1; shift
    if figures "$@"; then ok "$name"; else fail "$name" "see above"; fi
}

SMALL30=(--model 30m --batch-tokens 262144 --batch-size 64 --schedule constant --lr 6e-4 --warmup-steps 75 --save-every 0)
base_of() { echo "base-$1/step_00000150"; }
make_bases() {
    [ ! -d "$(base_of quartet)" ] || return 0
    again base-bf16 base-quartet
    on 0 base-bf16 "${SMALL30[@]}" --recipe bf16 --steps 150 &
    on 1 base-quartet "${SMALL30[@]}" --recipe quartet --steps 150
    wait $!
}

# each part of `losses` from the same checkpoint, at a rate at which rounding is not magnified
from_base() { local gpus=$1 name=$2 r=$3; shift 3; again $name; on $gpus $name "${SMALL30[@]}" --recipe $r --lr 1e-4 --steps 200 --resume "$(base_of $r)" "$@"; }
losses() {
    local r n
    make_bases
    from_base 0 bf16-1 bf16 & from_base 1 quartet-1 quartet &
    wait
    from_base 0 bf16-half bf16 --batch-size 32 & from_base 1 quartet-half quartet --batch-size 32 &
    wait
    from_base 0,1 bf16-2 bf16 & from_base $OTHERS quartet-2 quartet &
    wait
    for r in bf16 quartet; do
        [ $N -lt 4 ] || from_base $ALL $r-4 $r
        for n in 1 half 2 4; do kept $r-$n; done
        shown "$r: losses of 1 to $N GPUs" apart $r-1 $r-half $r-2 $([ $N -lt 4 ] || echo $r-4)
    done
    from_base $ALL quartet-again quartet
    check "$N GPUs twice: the same bits" compare same_files quartet-$N quartet-again
    check_fails "and one GPU others" compare same_files quartet-$N quartet-1
}

elastic() {
    local from to gpus
    make_bases
    again chain chain-straight
    local run=("${SMALL30[@]}" --recipe quartet)
    on 0 chain-straight "${run[@]}" --steps 200 --resume "$(base_of quartet)" &
    on $ALL chain "${run[@]}" --steps 160 --resume "$(base_of quartet)"
    from=160
    for to_gpus in 170:0,1 180:0 200:$ALL; do
        to=${to_gpus%:*} gpus=${to_gpus#*:}
        again chain-probe
        on $gpus chain-probe "${run[@]}" --steps $((from + 1)) --resume chain/step_00000$from --plant nan:0:$((from + 1))
        shown "GPUs $gpus load what was saved" loaded chain/step_00000$from chain-probe/step_00000$((from + 1))
        on $gpus chain "${run[@]}" --steps $to
        from=$to
    done
    wait
    kept chain; kept chain-straight
    check_fails "planted: the state of another step" python3 "$WORK/figures.py" loaded chain/step_00000180 chain/step_00000200
    shown "the place in the data" position chain-straight/step_00000200 chain/step_00000200
    figures apart chain-straight chain
}

declare -A WORK_OF=(
    [tinyllama-1.1b]="524288 --model tinyllama-1.1b --batch-size 16 --warmup-steps 10"
    [llama2-7b]="131072 --model llama2-7b --seq-len 2048 --batch-size 8 --adam-dtype bf16 --lr 1e-4 --warmup-steps 10"
)
# a folder of the name of the last checkpoint, made while the run is under way, counts as saved: 94 GB for the 7B
unsaved() {
    local gpus=$1 name=$2 steps=$3 pid; shift 3
    again $name
    on $gpus $name --steps $steps --save-every 0 "$@" &
    pid=$!
    until [ -s $name/metrics.jsonl ] || ! kill -0 $pid 2>/dev/null; do sleep 0.1; done
    mkdir -p $name/"$(printf 'step_%08d' $steps)"
    wait $pid
}
scaling() {
    local model n gpus tokens options planned used
    for model in $MODELS; do
        read -r tokens options <<<"${WORK_OF[$model]}"
        for n in $SIZES; do
            gpus=$ALL
            [ $n -gt 1 ] || gpus=${FIRST:-0}
            unsaved $gpus $model-$n 5 $options --recipe quartet --batch-tokens $((tokens * n))
            kept $model-$n
        done
        [ -s $model-1/metrics.jsonl ] && [ -s $model-$N/metrics.jsonl ] || continue
        shown "$model on $N GPUs" speed $model-1 $model-$N
        on $ALL plan $options --recipe quartet --batch-tokens $((tokens * N)) --plan
        planned=$(awk '/^  total/ { print $2; exit }' "$LOGS/plan.log")
        used=$(python3 -c "import json; print([json.loads(l)['bytes'] for l in open('$model-$N/metrics.jsonl') if '\"memory\"' in l][0] / 2**20)")
        echo "$model on each of $N GPUs: $used MiB in use, --plan said $planned" | tee -a "$LOGS/figures.txt"
        check "$model: memory within 5 % of the plan" python3 -c "assert abs($used / $planned - 1) <= 0.05"
    done
}

# stop_after STEP FOLDER ARGUMENTS...: tinyllama-1.1b on all GPUs; SIGUSR1 once it logged that step; ms until it has saved and ended
stop_after() {
    local step=$1 out=$2 pid begin code ms; shift 2
    rm -rf "$out"
    LIMIT='' on $ALL "$out" --model tinyllama-1.1b --batch-size 16 --warmup-steps 10 --recipe quartet --batch-tokens 524288 --steps 1000 \
        --keep 2 "$@" &
    pid=$!
    until grep -qs "\"type\":\"step\",\"step\":$step," "$out/metrics.jsonl" || ! kill -0 $pid 2>/dev/null; do sleep 0.1; done
    begin=${EPOCHREALTIME/./}
    pkill -USR1 -P $pid                   # mpirun; `timeout` in front of it would end without handing the signal on
    wait $pid; code=$?
    ms=$(((${EPOCHREALTIME/./} - begin) / 1000))
    echo "SIGUSR1 to exit code $code, saving to $(df --output=source,fstype "$out" | tail -n 1 | tr -s ' '): $ms ms" |
        tee -a "$LOGS/figures.txt"
    [ "${out##*/}" = saves ] || figures saved "$out"
    check "SIGUSR1: exit code 75 within 10 s" test $code -eq 75 -a $ms -lt 10000
}
stops() {
    stop_after 3 stops --save-every 0
    [ ! -w /dev/shm ] || stop_after 3 /dev/shm/gpu_ranks_stops --save-every 0
    rm -rf stops /dev/shm/gpu_ranks_stops
}
saves() {
    stop_after 42 saves --save-every 15 --async-save on
    kept saves
    figures saves saves 15
    rm -rf saves
}

kills() {
    local gpus i=0
    for gpus in 0,1 $OTHERS; do
        i=$((i + 1))
        CUDA_VISIBLE_DEVICES=$gpus RANKS=2 KILLS=$(((KILLS + 1) / 2)) "$ROOT/dev/test/kill.sh" >"$LOGS/kills-$i.log" 2>&1 &
    done
    wait
    for i in 1 2; do
        tail -n 12 "$LOGS/kills-$i.log"
        check "kills, $i of 2" grep -qE '^[1-9][0-9]* passed, 0 failed$' "$LOGS/kills-$i.log"
    done
}
faults() {
    local name
    export LONG=4000 RANKS=$((N > 2 ? 3 : 2))
    for name in ranks ranks_faults; do
        [ $name != ranks ] || [ $N -ge 4 ] || { skip ranks.sh "fewer than 4 GPUs here"; continue; }
        "$ROOT/dev/test/$name.sh" >"$LOGS/$name.log" 2>&1
        grep FAIL "$LOGS/$name.log"
        check "$name.sh" grep -qE '^[1-9][0-9]* passed, 0 failed' "$LOGS/$name.log"
    done
}

for part in "${parts[@]}"; do
    begin=$SECONDS
    $part
    echo "-- $part: $((SECONDS - begin)) s"
done
finish
