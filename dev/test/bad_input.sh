#!/usr/bin/env bash
# bad_input.sh: what goes wrong outside the program: one line that says what and what to do, the documented exit code, and nothing
# lost. Options, data, folders and disks, damaged checkpoints, resuming something else, a diverging run.
source "$(dirname "$0")/lib.sh"
make_shards data
export ASAN_OPTIONS=${ASAN_OPTIONS:-}:detect_leaks=0     # a run that ends by a message leaves its memory to the system
small=("${SMALL[@]}" --steps 6)

# ---------------------------------------------------------------------------------------------------------------------
# the checks below see an error

train() { echo "train_llama: words" >&2; return 2; }
planted() { ( "$@" ) | grep -q '^FAIL' && return 1; return 0; }      # 1: the check failed, as it should
check_fails "planted: another exit code" planted check_exit x 65 words
check_fails "planted: another message" planted check_exit x 2 "other words"
train() { printf 'train_llama: words\ntrain_llama: more words\n' >&2; return 2; }
check_fails "planted: two lines" planted check_exit x 2 words
train() { printf 'Segmentation fault\n' >&2; return 2; }
check_fails "planted: a line that is not ours" planted check_exit x 2 fault
train() { "$TRAIN" "$@"; }

# ---------------------------------------------------------------------------------------------------------------------
# options

check_exit "unknown option" 2 "unknown option --batch-sise;did you mean --batch-size?" "${small[@]}" --batch-sise 4
check_exit "unknown option, nothing near" 2 "unknown option --qqqqqqqqqqqq;--help" "${small[@]}" --qqqqqqqqqqqq 4
check_exit "not an option" 2 "'steps' is not an option" steps 4
check_exit "malformed count" 2 "--steps is '12Q', which is not a whole number" "${small[@]}" --steps 12Q
check_exit "fractional count" 2 "--steps is '1.5'" "${small[@]}" --steps 1.5
check_exit "negative count" 2 "--steps is -5" "${small[@]}" --steps -5
check_exit "malformed number" 2 "--lr is 'fast', which is not a number" "${small[@]}" --lr fast
check_exit "number with a tail" 2 "--lr is '1e-3x'" "${small[@]}" --lr=1e-3x
check_exit "infinite number" 2 "--lr is 'inf'" "${small[@]}" --lr inf
check_exit "missing value" 2 "--steps needs a value" "${small[@]}" --steps
check_exit "empty value" 2 "--steps is ''" "${small[@]}" --steps=
check_exit "no such choice" 2 "--recipe is 'fp3', but must be one of bf16|fp8|quartet" "${small[@]}" --recipe fp3
check_exit "number out of range" 2 "--beta2 1" "${small[@]}" --beta2 1
check_exit "zero steps" 2 "0 steps" "${small[@]}" --steps 0
check_exit "steps and tokens" 2 "say different lengths" "${small[@]}" --steps 6 --tokens 1M
check_exit "unknown model" 2 "--model;70m;tiny" "${small[@]}" --model 70m
check_exit "a folder without config.json" 2 "config.json" "${small[@]}" --model data
check_exit "heads that do not divide" 2 "heads" "${small[@]}" --heads 3
check_exit "width that FP4 groups do not divide" 2 "32" "${small[@]}" --ffn 100 --channels 64
check_exit "width that MXINT8 groups do not divide" 2 "--saved-int8 ffn;--ffn;96 and 128" "${small[@]}" --recipe bf16 \
    --ffn 100 --channels 64 --saved-int8 ffn
check_exit "channels that MXINT8 groups do not divide" 2 "--saved-int8 all;--channels;32 and 64" "${small[@]}" --recipe bf16 \
    --channels 48 --heads 3 --saved-int8 all
check_exit "no such --saved-int8" 2 "--saved-int8 is 'fp8', but must be one of none|ffn|all" "${small[@]}" --saved-int8 fp8
check_exit "indivisible --batch-tokens" 2 "--batch-tokens 250;224 and 256" "${small[@]}" --batch-tokens 250
check_exit "indivisible --batch-size" 2 "--batch-size 3;these fit: 1, 2, 4, 8" "${small[@]}" --batch-size 3
check_exit "--device cuda" 69 "--device cuda" "${small[@]}" --device cuda
check_exit "--carrier fp8 on the CPU" 2 "--carrier fp8" "${small[@]}" --device cpu --carrier fp8
check_exit "--carrier fp4 on the CPU" 2 "--carrier fp4" "${small[@]}" --device cpu --carrier fp4
check_exit "--bf16-layers of no form" 2 "--bf16-layers is 'first:1,'" "${small[@]}" --bf16-layers first:1,
check_exit "--bf16-layers beyond the model" 2 "names 9 blocks" "${small[@]}" --bf16-layers last:9
check_exit "--keep 1" 2 "--keep 1" "${small[@]}" --keep 1

printf 'steps = 6\n# a comment\n\nstepps = 7\n' >file.cfg
check_exit "--config, unknown option" 2 "file.cfg:4: ;stepps;did you mean --steps?" --config file.cfg
printf 'steps = 6\nlr = fast # soon\n' >file.cfg
check_exit "--config, malformed number" 2 "file.cfg:2: ;'fast'" --config file.cfg
printf 'steps 6\n' >file.cfg
check_exit "--config, no =" 2 "file.cfg:1: ;name = value" --config file.cfg
printf 'config = other.cfg\n' >file.cfg
check_exit "--config inside --config" 2 "file.cfg:1: " --config file.cfg
check_exit "--config, missing file" 66 "nope.cfg" --config nope.cfg
printf 'steps = 9\nlr = 1e-3\n' >file.cfg
train "${small[@]}" --config file.cfg --print-config >out.txt
check "command line over file over preset" test "$(awk '$1 == "steps" || $1 == "lr" { print $3 }' out.txt | xargs)" = "6 0.001"

values() { sed 's/ *#[^#]*$//' "$1"; }
train "${small[@]}" --recipe bf16 --lr 1e-3 --prompt "a b" --print-config >given.cfg
check_exit "--print-config output is read back" 0 "" --config given.cfg --print-config
check "and gives the same values" diff <(values given.cfg) <(values out.txt)
check_exit "--plan" 0 "" --plan --model 7b --seq-len 128
for case in "ffn norm" "all ffn"; do
    train --plan --model 30m --saved-int8 "${case% *}" --recompute "${case#* }" --batch-size 4 >out.txt
    check "--plan says where --saved-int8 ${case% *} has an effect" grep -q -- "--saved-int8 ${case% *}, --adam" out.txt
done
for case in "ffn ffn" "all block"; do
    train --plan --model 30m --saved-int8 "${case% *}" --recompute "${case#* }" --batch-size 4 >out.txt
    check "and where ${case% *} has none" grep -q -- "--saved-int8 ${case% *} (of no effect), --adam" out.txt
done
check_exit "--help" 0 "" --help
check "--help names every option of --print-config" awk 'NR == FNR { help = help $0; next }
    { gsub("_", "-", $1); if (!index(help, "--" $1 " ")) { print $1; exit 1 } }' <("$TRAIN" --help) given.cfg
check_exit "--version" 0 "" --version
check_exit "--self-test" 0 "" --self-test
check_exit "no arguments: the help" 0 ""
check_exit "--prompt without a checkpoint named" 2 "--resume PATH" --prompt "In the"
check_exit "--prompt, no checkpoint there" 66 "data" --prompt "In the" --resume data

export OMPI_COMM_WORLD_SIZE=2
check_exit "several processes are refused" 2 "started as 2 processes" "${small[@]}" --out mpi
unset OMPI_COMM_WORLD_SIZE
check "and no folder is made" test ! -e mpi

# ---------------------------------------------------------------------------------------------------------------------
# data

without=("${MODEL[@]}" --batch-tokens 256 --steps 6 --out bad)
check_exit "no --train-data" 2 "--train-data is missing" "${without[@]}"
check_exit "missing shard" 66 "nope.bin" "${without[@]}" --train-data nope.bin
check_exit "pattern that matches nothing" 66 "no*pe.bin" "${without[@]}" --train-data 'no*pe.bin'
mkdir empty
check_exit "folder without shards" 66 "empty" "${without[@]}" --train-data empty
check_exit "missing validation data" 66 "nope.bin" "${without[@]}" --train-data data --val-data nope.bin
cp -r data bad-data
poke() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }
shard=bad-data/train_000001.bin
poke $shard 0 '\001'
check_exit "wrong magic" 65 "train_000001.bin;magic" "${without[@]}" --train-data bad-data
cp data/train_000001.bin bad-data/; poke $shard 4 '\011'
check_exit "wrong version" 65 "train_000001.bin;version 9" "${without[@]}" --train-data bad-data
cp data/train_000001.bin bad-data/; truncate -s -1 $shard
check_exit "truncated shard" 65 "train_000001.bin;truncated" "${without[@]}" --train-data bad-data
truncate -s 500 $shard
check_exit "truncated header" 65 "train_000001.bin;truncated" "${without[@]}" --train-data bad-data
: >$shard
check_exit "empty shard" 65 "train_000001.bin" "${without[@]}" --train-data bad-data
cp data/train_000001.bin bad-data/; printf xx >>$shard
check_exit "shard with a tail" 65 "train_000001.bin;too long" "${without[@]}" --train-data bad-data
cp data/train_000001.bin bad-data/; poke $shard 2000 '\377\377'
check_exit "token id beyond the vocabulary" 65 "train_000001.bin;65535;position 488;288" "${without[@]}" --train-data bad-data
check_exit "a vocabulary too small for the data" 65 "256;--vocab-size" "${without[@]}" --train-data data --vocab-size 256
check_exit "text instead of shards" 65 "train.txt;data/prepare.py" "${without[@]}" --train-data train.txt
check_exit "shards shorter than a sample" 65 "--seq-len" "${without[@]}" --train-data data --seq-len 1024 --batch-tokens 1024
check "no run left a checkpoint" test "$(compare newest bad)" = -1

# ---------------------------------------------------------------------------------------------------------------------
# folders and disks

: >file
check_exit "--out below a file" 74 "'file'" "${small[@]}" --out file/out
check_exit "--out is a file" 74 "file" "${small[@]}" --out file
if [ "$(id -u)" -ne 0 ]; then
    mkdir -m 555 locked
    check_exit "--out without permission" 74 "locked" "${small[@]}" --out locked/out
else
    skip "--out without permission" "root may write everywhere"
fi

mkdir once; : >once/step_00000002.tmp          # the folder of this checkpoint cannot be made
check_exit_lines "a failed save does not end the run" 0 "checkpoint of step 2 not saved;earlier checkpoints stand" \
    "${small[@]}" --out once --save-every 2
check "which trains on and saves later" test "$(ls -d once/step_* | xargs)" = \
    "once/step_00000002.tmp once/step_00000004 once/step_00000006"
train "${small[@]}" --out steady --save-every 2 >/dev/null
check "with the weights of an undisturbed run" compare same_run steady once

# no file above 500 KiB: as on a full disk, every checkpoint of 1.4 MB fails
train() { (ulimit -f 500; "$TRAIN" "$@"); }
check_exit_lines "no room at the last save" 74 "step 6 not saved;cannot write;File too large" "${small[@]}" --out limited
train() { "$TRAIN" "$@"; }
check "nothing half-written is left" test -z "$(ls -d limited/step_* 2>/dev/null)"
train "${small[@]}" --out limited >/dev/null
check "with room the same command trains" compare same_run steady limited

# which shards validate: those of a folder that are named so, as llm.c names them, too; never what is trained on
mkdir named; for file in data/*.bin; do cp $file named/fineweb_${file##*/}; done; cp data/tokenizer.json named/
train "${small[@]}" --train-data named --out named-run >out.txt 2>err.txt
check "fineweb_val_000000.bin validates" grep -q "^data .* validation named" out.txt
train "${small[@]}" --out other-names >/dev/null 2>err.txt
check "the same run as by the other names" compare same_run other-names named-run
check_exit "a pattern of both kinds" 2 "matches shards of both kinds;val_00000" "${small[@]}" --train-data 'data/*.bin' --out both

# one file of a checkpoint cannot be flushed: rank 0 writes its two large ones in two threads, either may fail
if need_faults; then
    for file in model.safetensors optim-00000-of-00001.safetensors config.json state.json; do
        train() { NO_FLUSH=$file ./faulty.sh "$@"; }
        check_exit_lines "$file cannot be flushed" 74 "step 6 not saved;$file;No space left" "${small[@]}" --out unflushed
        train() { "$TRAIN" "$@"; }
        check "nothing half-written is left of $file" test -z "$(ls -d unflushed/step_* 2>/dev/null)"
    done
    train "${small[@]}" --out unflushed >/dev/null
    check "then the same command trains" compare same_run steady unflushed
    FLUSHED=$WORK/flushed.txt ./faulty.sh "${small[@]}" --save-every 2 --out flushed >/dev/null
    check "records reach the disk with a checkpoint" test "$(grep -c /flushed/metrics.jsonl flushed.txt)" = 3
    cp -r flushed listed
    train() { BAD_DIR=listed ./faulty.sh "$@"; }
    check_exit "a folder that cannot be listed is not taken for empty" 74 "cannot list 'listed': Input/output error" \
        "${small[@]}" --steps 8 --out listed
    train() { NO_LOCK=1 ./faulty.sh "$@"; }
    check_exit "a file system without locks" 74 "cannot lock 'unlocked/lock';No locks available" "${small[@]}" --out unlocked
    train() { "$TRAIN" "$@"; }
    check "and left as it was" diff -r flushed listed
else
    skip "a disk that fails" "no C compiler, or this build has its own runtime"
fi

# a real file system of 5 MB (two checkpoints and some) that fills up; it vanishes with its private mount namespace
mkdir disk
if unshare -m mount -t tmpfs none disk 2>/dev/null; then
    full() {        # full SCRIPT: runs it in disk/, which has 5 MB; exit code in got, the checkpoints left in listing.txt
        export TRAIN
        unshare -m bash -c 'mount -t tmpfs -o size=5m none disk && ('"$1"'); got=$?; ls disk/out >listing.txt; exit $got' \
            full "${SMALL[@]}" >out.txt 2>err.txt
        got=$?
    }
    full '"$TRAIN" "$@" --steps 8 --save-every 2 --out disk/out'
    expect_exit "full disk: the last save fails" 74 $got "not saved;No space left on device" 99
    check "full disk: an earlier checkpoint stands, no half one" grep -qx 'step_0000000[24]' listing.txt
    check "full disk: nothing half-written" test -z "$(grep tmp listing.txt)"
    full 'head -c 4500000 /dev/zero >disk/other; "$TRAIN" "$@" --steps 60 --save-every 5 --keep 2 --out disk/out | while read -r line; do
        [[ $line != "step     11/"* ]] || rm -f disk/other; done; exit ${PIPESTATUS[0]}'
    expect_exit "full disk: training outlasts it" 0 $got "step 5 not saved;No space left" 99
    check "full disk: and saves once there is room" grep -qx 'step_00000060' listing.txt
else
    skip "full disk" "no permission to mount one"
fi

# ---------------------------------------------------------------------------------------------------------------------
# resuming

train "${small[@]}" --out run --save-every 2 --keep 9 >/dev/null
check_exit "--resume must, nothing there" 66 "--resume must" "${small[@]}" --out fresh --resume must
check_exit "--resume never, checkpoints there" 2 "--resume never" "${small[@]}" --out run --resume never
check_exit "--resume PATH, no folder" 66 "nope" "${small[@]}" --out fresh --resume nope
check_exit "--resume PATH, no checkpoint in it" 66 "empty" "${small[@]}" --out fresh --resume empty
longer=("${SMALL[@]}" --steps 9 --out run)
check_exit "another --batch-tokens" 2 "--batch-tokens 256;512" "${longer[@]}" --batch-tokens 512
check_exit "another --seed" 2 "--seed 1337;--seed;7" "${longer[@]}" --seed 7
check_exit "another --seq-len" 2 "--seq-len 32;64" "${longer[@]}" --seq-len 64
check_exit "another model" 2 "layers 2;asks for 3" "${longer[@]}" --layers 3
cp -r data changed; poke changed/train_000000.bin 1100 'x'
check_exit "other training data" 65 "training data;--allow-data-change" "${longer[@]}" --train-data changed
check "all this left the run alone" compare same_run run steady
cp -r run accepted
check_exit "--allow-data-change 1" 0 "" "${SMALL[@]}" --steps 9 --out accepted --train-data changed --allow-data-change 1
cp -r run quieter
check_exit "another --lr is allowed" 0 "" "${SMALL[@]}" --steps 9 --out quieter --lr 1e-3
check "and reported" grep -q -- "--lr was 0.004, is now 0.001" out.txt
cp -r run eighth
check_exit "another --saved-int8 is allowed" 0 "" "${SMALL[@]}" --steps 9 --out eighth --saved-int8 all
check "and reported" grep -q -- "--saved-int8 was none, is now all" out.txt

# back to an earlier step with other options: either refused, or what is saved is what was trained
train "${SMALL[@]}" --steps 6 --out elsewhere --resume run/step_00000002 --lr 1e-3 --save-every 2 --keep 9 >/dev/null
cp -r run rerun
train "${SMALL[@]}" --steps 6 --out rerun --resume rerun/step_00000002 --lr 1e-3 --save-every 2 --keep 9 >out.txt 2>err.txt; got=$?
if [ $got -eq 2 ]; then ok "an earlier step resumed in its own folder is refused"
else check "an earlier step resumed in its own folder saves its own weights" compare same_files elsewhere rerun; fi

run_until "step      3/" KILL "${SMALL[@]}" --steps 100000 --out busy --save-every 0      # a killed run leaves no lock
"$TRAIN" "${SMALL[@]}" --steps 100000 --out busy --save-every 0 >busy.txt 2>&1 &
background+=($!)
for _ in $(seq 100); do grep -qs '^step' busy.txt && break; sleep 0.1; done
check_exit "a second run in the same folder" 77 "busy" "${SMALL[@]}" --steps 100000 --out busy
kill -TERM "${background[0]}"; wait "${background[0]}"
check "the first one was not disturbed" test $? -eq 75
background=()

# ---------------------------------------------------------------------------------------------------------------------
# damaged checkpoints: run/ holds steps 2, 4 and 6; whatever happens to 6, the run falls back to 4 and ends as if nothing had been

damage() {      # damage HOW FILE
    case $1 in
        "first byte of") compare flip "$2" 0 ;;
        "byte inside") compare flip "$2" $(($(stat -c %s "$2") / 2)) ;;
        "last byte of") compare flip "$2" -1 ;;
        "truncated") truncate -s -9 "$2" ;;
        "empty") : >"$2" ;;
        "missing") rm "$2" ;;
    esac
}
for file in model.safetensors optim-00000-of-00001.safetensors config.json tokenizer.json state.json; do
    for how in "first byte of" "byte inside" "last byte of" truncated empty missing; do
        rm -rf hurt; cp -r run hurt
        damage "$how" hurt/step_00000006/$file
        [ "$how" = "first byte of" ] && check_fails "planted: $file differs" cmp -s {run,hurt}/step_00000006/$file
        train "${small[@]}" --out hurt --keep 9 >out.txt 2>err.txt; got=$?
        train "${small[@]}" --out hurt --keep 9 >again.txt 2>err2.txt
        if [ $got -ne 0 ] || ! grep -q "^train_llama: .*step_00000006.* not usable: .*$file" err.txt || [ "$(wc -l <err.txt)" -ne 1 ]; then
            fail "$how $file" "exit code $got: $(head -n 1 err.txt)"
        elif ! grep -q '^resume .*step 4 of 6' out.txt; then fail "$how $file: falls back" "$(grep ^resume out.txt)"
        elif ! compare same_run run hurt >check.txt; then fail "$how $file: ends well" "$(cat check.txt)"
        elif [ -s err2.txt ] || ! grep -q ^done again.txt; then fail "$how $file: is healed" "$(head -n 1 err2.txt)"
        else ok "$how $file"; fi
    done
done
rm -rf hurt; cp -r run hurt
for step in 2 4 6; do damage "byte inside" hurt/step_0000000$step/model.safetensors; done
check_exit_lines "all checkpoints damaged" 65 "none of the 3 checkpoints in 'hurt' is usable" "${small[@]}" --out hurt
check "none is deleted" test "$(ls -d hurt/step_* | wc -l)" -eq 3
check_exit_lines "--resume must, all damaged" 65 "none of the 3" "${small[@]}" --out hurt --resume must
check_exit "--resume PATH to a damaged one" 65 "step_00000006;not usable" "${small[@]}" --out hurt2 --resume hurt/step_00000006
check_exit_lines "--prompt from damaged ones" 65 "none of the 3" --prompt "In" --resume hurt
rm -rf hurt; cp -r run hurt; mkdir hurt/step_00000008 hurt/step_00000009.tmp hurt/step_7 hurt/step_new
check_exit_lines "an empty folder in place of the newest" 0 "step_00000008;state.json' is missing" "${small[@]}" --out hurt --keep 9
check "left-overs of a save are removed, other folders are not" test ! -e hurt/step_00000009.tmp -a -e hurt/step_new

# ---------------------------------------------------------------------------------------------------------------------
# a run that diverges: steps that are not finite change nothing, too many in a row end the run

check_exit_lines "not finite: exit 76" 76 "3 steps in a row were not finite" \
    "${SMALL[@]}" --recipe bf16 --steps 40 --out run --lr 1e30 --max-skips 3 --save-every 2 --keep 9
check "the skipped steps are marked" test "$(grep -c SKIPPED out.txt)" -eq 3
check "and recorded, without NaN in the JSON" test "$(grep -c '"type":"skip"' run/metrics.jsonl)" -eq 3 -a \
    -z "$(grep -i 'nan\|:-*inf' run/metrics.jsonl)"
rm -rf run/step_0000000[78]     # saved after the step that blew up, while its weights were finite
check_exit "the last good checkpoint still loads" 0 "" "${SMALL[@]}" --recipe bf16 --steps 9 --out run --resume must
check "and is step 6" grep -q '^resume .*step 6 of 9' out.txt
finish
