# lib.sh: what the shell tests share: counting, a folder to work in, a small model, small data, comparisons. Not a test itself.
#
#     source "$(dirname "$0")/lib.sh"       then, in the folder WORK:  ... ok NAME / fail NAME WHY ...;  finish
#
# TRAIN names the binary (default: ./train_llama of this tree). Seconds and speeds never decide whether a test passes.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
TRAIN=$(realpath -m "${TRAIN:-$ROOT/train_llama}")
export PYTHONDONTWRITEBYTECODE=1 LC_ALL=C
export OMP_WAIT_POLICY=passive       # tests share their cores with other work: idle threads should not spin
unset OMPI_COMM_WORLD_SIZE PMI_SIZE PMI_RANK PMIX_RANK SLURM_STEP_NUM_TASKS
WORK=$(mktemp -d)
background=()                        # ids of processes that must not outlive the test
cleanup() {
    for pid in "${background[@]}"; do kill -9 "$pid" 2>/dev/null; done
    rm -rf "$WORK"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
cd "$WORK" || exit 1
[ -x "$TRAIN" ] || { echo "FAIL no binary '$TRAIN': build it with make"; echo "0 passed, 1 failed"; exit 1; }

passed=0 failed=0 skipped=0
ok()   { echo "ok $1"; passed=$((passed + 1)); }
fail() { echo "FAIL $1: $2"; failed=$((failed + 1)); }
skip() { echo "skip $1: $2"; skipped=$((skipped + 1)); }
finish() {
    if [ $skipped -eq 0 ]; then echo "$passed passed, $failed failed"
    else echo "$passed passed, $failed failed, $skipped skipped"; fi
    [ $failed -eq 0 ]; exit
}

# check NAME COMMAND...: the command must succeed.  check_fails: it must find a difference, exit code 1 (a planted error must be
# seen; a comparison that breaks down has seen nothing).
check() {
    local name=$1; shift
    if "$@" >check.txt 2>&1; then ok "$name"; else fail "$name" "$(tail -n 1 check.txt)"; fi
}
check_fails() {
    local name=$1; shift
    "$@" >check.txt 2>&1
    case $? in
        1) ok "$name" ;;
        0) fail "$name" "the planted error was not seen" ;;
        *) fail "$name" "the comparison broke down: $(tail -n 1 check.txt)" ;;
    esac
}

# check_exit NAME CODE WORDS ARGUMENTS...: `train ARGUMENTS` ends with this exit code; where it is not 0, stderr is one line, by
# train_llama, that holds WORDS. `;` separates several WORDS. stdout is in out.txt, stderr in err.txt.
check_exit() {
    local name=$1 code=$2 words=$3 got; shift 3
    train "$@" >out.txt 2>err.txt; got=$?
    expect_exit "$name" "$code" $got "$words" 1
}
# the same where more lines on stderr are right
check_exit_lines() {
    local name=$1 code=$2 words=$3 got; shift 3
    train "$@" >out.txt 2>err.txt; got=$?
    expect_exit "$name" "$code" $got "$words" 99
}
expect_exit() {
    local name=$1 code=$2 got=$3 words=$4 lines=$5 word
    if [ "$got" -ne "$code" ]; then
        fail "$name" "exit code $got, not $code: $(tail -n 1 err.txt)"
        return
    fi
    while read -r -d ';' word; do
        if [ -n "$word" ] && ! grep -qF -- "$word" err.txt; then
            fail "$name" "no '$word' in: $(head -c 400 err.txt)"
            return
        fi
    done <<<"$words;"
    if grep -qv '^train_llama: ' err.txt; then fail "$name" "stderr has other lines: $(grep -v '^train_llama: ' err.txt | head -n 1)"
    elif [ "$(wc -l <err.txt)" -gt "$lines" ]; then fail "$name" "$(wc -l <err.txt) lines on stderr"
    elif [ "$lines" -eq 1 ] && [ "$code" -ne 0 ] && [ ! -s err.txt ]; then fail "$name" "no message"
    else ok "$name"; fi
}

# ---------------------------------------------------------------------------------------------------------------------
# a small run: 120 thousand parameters, 8 samples of 32 tokens a step; 80 samples in 4 shards make an epoch of exactly 10 steps

MODEL=(--model tiny --layers 2 --channels 64 --heads 2 --ffn 128 --vocab-size 288 --seq-len 32)
SMALL=("${MODEL[@]}" --batch-tokens 256 --log-every 5 --val-every 7 --val-batches 2 --train-data "$WORK/data")

train() { "$TRAIN" "$@"; }

# make_text BYTES [SEED]: lines of words, always the same
make_text() {
    awk -v bytes="$1" -v seed="${2:-1}" 'BEGIN {
        split("the and of that he shall unto lord in his a for which all be they is not them it", word, " ")
        while (written < bytes + 0) {
            line = ""
            for (i = 0; i < 9; i++) { seed = (seed * 16807) % 2147483647; line = line word[seed % 20 + 1] " " }
            print line seed % 100; written += length(line) + 1 } }' | head -c "$1"
}
# make_shards FOLDER: 4 training shards of 641 tokens (20 samples each), one for validation
make_shards() {
    make_text 2563 >train.txt
    make_text 700 7 >val.txt
    python3 "$ROOT/data/prepare.py" --tokenizer byte --document file --shard-tokens 641 --out "$1" train.txt --val val.txt >/dev/null ||
        { fail "make shards" "data/prepare.py failed"; finish; }
}

# run_until WORDS SIGNAL ARGUMENTS...: starts training and sends the signal as soon as stdout shows WORDS. Exit code in got,
# stdout in out.txt, stderr in err.txt.
run_until() {
    local words=$1 signal=$2 line sent=0 pid; shift 2
    rm -f pipe; mkfifo pipe
    "$TRAIN" "$@" >pipe 2>err.txt &
    pid=$!
    background+=($pid)
    while IFS= read -r line; do
        printf '%s\n' "$line"
        if [ $sent -eq 0 ] && [[ $line == *"$words"* ]]; then kill -"$signal" $pid; sent=1; fi
    done <pipe >out.txt
    wait $pid 2>/dev/null; got=$?
    unset 'background[-1]'
}

# need_faults: faulty.sh, which runs the binary over faults.c (faulty.sh ARGUMENTS..., with a fault's variable set). 1: not here
need_faults() {
    ! ldd "$TRAIN" | grep -q libasan && cc -shared -fPIC -o faults.so "$ROOT/dev/test/faults.c" -ldl 2>/dev/null || return 1
    printf '#!/bin/sh\nLD_PRELOAD="%s" exec "%s" "$@"\n' "$WORK/faults.so" "$TRAIN" >faulty.sh
    chmod +x faulty.sh
}

# need_mpirun: for tests of several ranks; ends the test where they cannot run.  ranks N ARGUMENTS...: train on N ranks
need_mpirun() {
    export ASAN_OPTIONS=${ASAN_OPTIONS:-}:detect_leaks=0     # MPI's own
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl_vader_single_copy_mechanism=none
    mpirun --version 2>/dev/null | grep -q "Open MPI" || { skip "several ranks" "no mpirun of Open MPI here"; finish; }
    ldd "$TRAIN" | grep -q libmpi || { skip "several ranks" "this binary was built without MPI"; finish; }
    # mpirun hears SIGUSR1 only where no parent blocks it and no OpenCL driver (with LLVM), which hwloc loads, takes it
    LAUNCH=(env --default-signal=USR1 HWLOC_COMPONENTS=-opencl mpirun --oversubscribe --bind-to none)
    MPIRUN=(timeout --foreground 60 "${LAUNCH[@]}")
    SMALL+=(--batch-tokens 384)
}
ranks() { local n=$1; shift; "${MPIRUN[@]}" -np "$n" "$TRAIN" "$@"; }

# ---------------------------------------------------------------------------------------------------------------------
# comparisons, in Python, sharing nothing with the trainer

cat >runner.py <<'PYTHON'
import sys

def run(functions, arguments):
    """Calls one by name. Exit code 1: an assertion does not hold, its text is printed. 3: something else went wrong."""
    try:
        functions[arguments[0]](*arguments[1:])
    except AssertionError as difference:
        print(difference)
        sys.exit(1)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(3)
PYTHON
cat >compare.py <<'PYTHON'
import glob, json, os, struct, sys
import runner

def records(folder):
    """Complete lines of metrics.jsonl; numbers stay text."""
    return [json.loads(line, parse_float=str, parse_int=str) for line in open(f"{folder}/metrics.jsonl")]

def steps(folder):
    """step -> (loss, grad_norm, lr) as text. Steps are 1, 2, 3, ... and none stands twice."""
    found = [r for r in records(folder) if r["type"] in ("step", "skip")]
    numbers = [int(r["step"]) for r in found]
    assert numbers == list(range(1, len(numbers) + 1)), f"{folder}: steps in metrics.jsonl are {numbers}"
    return {int(r["step"]): (r["type"], r["tokens"], r["loss"], r["grad_norm"], r["lr"], r.get("fp4")) for r in found}

def validations(folder):
    found = [r for r in records(folder) if r["type"] == "val"]
    numbers = [r["step"] for r in found]
    assert len(set(numbers)) == len(numbers), f"{folder}: validations at {numbers}"
    return {r["step"]: r["loss"] for r in found}

def checkpoints(folder):
    return sorted(glob.glob(f"{folder}/step_" + "[0-9]" * 8))

def same_files(a, b):
    """Final checkpoints: weights and optimizer state to the bit, after whole safetensors files of the same layout."""
    a, b = checkpoints(a)[-1], checkpoints(b)[-1]
    assert os.path.basename(a) == os.path.basename(b), f"{a} and {b} are of different steps"
    names = sorted(os.path.basename(f) for f in glob.glob(f"{a}/*.safetensors"))
    assert "model.safetensors" in names and len(names) >= 2, f"{a} holds {names}"
    for name in names:
        x, y = open(f"{a}/{name}", "rb").read(), open(f"{b}/{name}", "rb").read()
        differ = sum(p != q for p, q in zip(x, y))
        assert x == y, f"{name} of {b} differs from {a} in {differ} bytes"

def same_run(a, b):
    """Losses, norms and rates of every step, validation losses, final files."""
    x, y = steps(a), steps(b)
    for step in x:
        assert x[step] == y.get(step), f"step {step}: {x[step]} in {a}, {y.get(step)} in {b}"
    assert len(x) == len(y), f"{len(x)} steps in {a}, {len(y)} in {b}"
    x, y = validations(a), validations(b)     # a stop that falls on a validation leaves it out, to be quick
    assert list(y)[-1:] == list(x)[-1:] and all(x.get(step) == y[step] for step in y), f"validations {x} in {a}, {y} in {b}"
    same_files(a, b)

def same_tail(a, b, first):
    """b was started from a checkpoint of a: steps from `first` on, final files."""
    x = steps(a)
    y = {int(r["step"]): r for r in records(b) if r["type"] == "step"}
    for step in range(int(first), max(x) + 1):
        assert step in y, f"step {step} is not in {b}"
        assert x[step][2:4] == (y[step]["loss"], y[step]["grad_norm"]), f"step {step}: {x[step]} in {a}, {y[step]} in {b}"
    assert min(y) == int(first), f"{b} begins with step {min(y)}, not {first}"
    same_files(a, b)

def whole(folder):
    """Every committed checkpoint holds its files, with the sizes that state.json and the safetensors headers say."""
    assert checkpoints(folder), f"{folder} holds no checkpoint"
    for checkpoint in checkpoints(folder):
        state = json.load(open(f"{checkpoint}/state.json"))
        names = [f["name"] for f in state["files"]]
        assert {"model.safetensors", "config.json"} <= set(names), f"{checkpoint}: {names}"
        assert sorted(names + ["state.json"]) == sorted(os.listdir(checkpoint)), f"{checkpoint}: {os.listdir(checkpoint)}"
        assert int(state["step"]) == int(checkpoint[-8:]), f"{checkpoint} says step {state['step']}"
        for file in state["files"]:
            path = f"{checkpoint}/{file['name']}"
            size = os.path.getsize(path)
            assert size == file["bytes"], f"{path} has {size} bytes, state.json says {file['bytes']}"
            if path.endswith(".safetensors"):
                with open(path, "rb") as f:
                    length, = struct.unpack("<Q", f.read(8))
                    header = json.loads(f.read(length))
                end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
                assert size == 8 + length + end, f"{path} has {size} bytes, its header says {8 + length + end}"

def close_run(a, b, tolerance):
    """Two runs that differ in the number of ranks: same samples, weights and rates, so the first loss is the same to the
    bit; later ones are apart by what the order of sums does, at most `tolerance` nats."""
    x, y = steps(a), steps(b)
    assert list(x) == list(y), f"{len(x)} steps in {a}, {len(y)} in {b}"
    assert x[1][2] == y[1][2], f"the first loss is {x[1][2]} in {a}, {y[1][2]} in {b}"
    for step in x:
        assert x[step][1] == y[step][1] and x[step][4] == y[step][4], f"step {step}: {x[step]} in {a}, {y[step]} in {b}"
        apart = abs(float(x[step][2]) - float(y[step][2]))
        assert apart <= float(tolerance), f"step {step}: losses {x[step][2]} in {a}, {y[step][2]} in {b}"
    x, y = validations(a), validations(b)
    assert list(x) == list(y), f"validations at {list(x)} in {a}, {list(y)} in {b}"
    for step in x:
        apart = abs(float(x[step]) - float(y[step]))
        assert apart <= float(tolerance), f"validation at step {step}: {x[step]} in {a}, {y[step]} in {b}"

def optimizer(checkpoint):
    """master, m, v as lists over the whole flat buffer, put together from the ranges of all optimizer files."""
    state = json.load(open(f"{checkpoint}/state.json"))
    whole = {}
    for piece in state["slices"]:
        data = open(f"{checkpoint}/{piece['file']}", "rb").read()
        length, = struct.unpack("<Q", data[:8])
        header = json.loads(data[8:8 + length])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            at = 8 + length + entry["data_offsets"][0]
            flat = whole.setdefault(name, [None] * state["elements"])
            for begin, end in piece["ranges"]:
                assert flat[begin:end] == [None] * (end - begin), f"{checkpoint}: {name} {begin} to {end} stands twice"
                flat[begin:end] = struct.unpack(f"<{end - begin}f", data[at:at + 4 * (end - begin)])
                at += 4 * (end - begin)
    for name, flat in whole.items():
        assert None not in flat, f"{checkpoint}: {name} has holes"
    return whole

def close_state(a, b, tolerance):
    """Optimizer state of two checkpoints: relative distance of master, m, v."""
    x, y = optimizer(a), optimizer(b)
    assert x.keys() == y.keys(), f"{list(x)} in {a}, {list(y)} in {b}"
    for name in x:
        apart = sum((p - q) ** 2 for p, q in zip(x[name], y[name])) ** 0.5 / sum(p * p for p in x[name]) ** 0.5
        assert apart <= float(tolerance), f"{name} of {b} is {apart:.2g} from {a}"

def newest(folder):
    found = checkpoints(folder)
    print(int(found[-1][-8:]) if found else -1)

def flip(path, offset):
    """Inverts the lowest bit of one byte; a negative offset counts from the end."""
    data = bytearray(open(path, "rb").read())
    data[int(offset)] ^= 1
    open(path, "wb").write(data)

runner.run(globals(), sys.argv[1:])
PYTHON
compare() { python3 "$WORK/compare.py" "$@"; }
