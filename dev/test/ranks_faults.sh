#!/usr/bin/env bash
# ranks_faults.sh: what clusters do to jobs of several ranks: kills, signals, hangs, full disks, damaged files, hosts that differ.
# Each ends as the README's table says, names the rank, and loses nothing that was committed. Most jobs have RANKS ranks, 2 or more.
source "$(dirname "$0")/lib.sh"
need_mpirun
make_shards data
RANKS=${RANKS:-3} LAST=$((${RANKS:-3} - 1))
run=("${SMALL[@]}" --batch-size 2 --recipe quartet --bwd-rounding sr --steps 24)
longer=("${SMALL[@]}" --batch-size 2 --recipe quartet --bwd-rounding sr --steps ${LONG:-150})       # on GPUs they take no time
forever=("${SMALL[@]}" --batch-size 2 --recipe bf16 --schedule constant --steps 100000 --max-minutes 0.5)

# expect_words NAME CODE GOT WORDS: exit code, and words of a line of err.txt of ours; mpirun adds lines of its own
expect_words() {
    if [ "$3" -ne "$2" ]; then fail "$1" "exit code $3, not $2: $(grep -m 1 '^train_llama:' err.txt)"
    elif ! grep '^train_llama:' err.txt | grep -q -e "$4"; then fail "$1" "no '$4' in: $(grep '^train_llama:' err.txt | head -c 300)"
    else ok "$1"; fi
}
# start N ARGUMENTS...: in the background, until its first step is through (BEGUN: that line shows); mpirun in $job, its ranks in ${pids[@]}
start() {
    local n=$1; shift
    rm -f out.txt
    "${LAUNCH[@]}" -np "$n" "$TRAIN" "$@" >out.txt 2>err.txt &
    job=$!
    background+=($job)
    for _ in $(seq 1200); do grep -qs "${BEGUN:-^step }" out.txt && break; kill -0 $job 2>/dev/null || break; sleep 0.05; done
    mapfile -t pids < <(pgrep -P "$job")
}
# signal_rank SIGNAL N: to rank N of the job, unless it is over
signal_rank() { [ ${#pids[@]} -le "$2" ] || kill -"$1" "${pids[$2]}"; }
# finish_job: its exit code in got, seconds it took in took
finish_job() {
    local begin=${EPOCHREALTIME/./}
    wait "$job" 2>/dev/null; got=$?
    took=$(((${EPOCHREALTIME/./} - begin) / 1000000))
    unset 'background[-1]'
}

# ---------------------------------------------------------------------------------------------------------------------
# kills and signals: what is saved is the run that was not disturbed, to the bit

ranks 2 "${longer[@]}" --out ref >/dev/null 2>&1
check "the undisturbed run is whole" compare whole ref
start $RANKS "${forever[@]}" --out killed --save-every 0
signal_rank 9 1; finish_job
check "kill -9 of a rank ends the job" test $got -ne 0 -a $got -ne 75
check "within 5 s" test "$took" -le 5
check "and names it" grep -q "rank 1 .*is lost: its process ended" err.txt
start $RANKS "${forever[@]}" --out killed --save-every 0
signal_rank 9 0; finish_job
check "kill -9 of rank 0 ends the job within 5 s" test $got -ne 0 -a "$took" -le 5
check "and names it" grep -q "rank 0 .*is lost" err.txt

# one signal to mpirun, which hands it on; one to a single rank; a time limit; kills in the middle
ranks 2 "${longer[@]}" --out stopped --save-every 0 --max-minutes 1e-9 >out.txt 2>err.txt
check "--max-minutes: exit 75" test $? -eq 75
check "after one step" test "$(compare newest stopped)" = 1
for words in "USR1 to mpirun" "TERM to one rank" "KILL to one rank"; do
    start 2 "${longer[@]}" --out stopped --save-every 5
    case $words in *mpirun) kill -USR1 "$job" ;; *) signal_rank "${words%% *}" 1 ;; esac
    finish_job
    step=$(compare newest stopped)
    if [ $got -eq 0 ]; then skip "SIG$words" "the run was over before the signal came"
    elif [[ $words == KILL* ]]; then check "SIG$words: a checkpoint stands" test "$step" -ge 1 -a $got -ne 75
    else check "SIG$words: saves and exits 75" test $got -eq 75 -a -n "$(grep "stopped .* step $step of" out.txt)"; fi
done
# what MPI loads may take the signals for itself; one that comes before the first step counts, too
if need_faults; then
    export TAKE_SIGNALS=1
    for name in USR1 TERM; do
        TRAIN=$WORK/faulty.sh start 2 "${forever[@]}" --max-minutes 2 --out taken --save-every 0
        signal_rank $name 1; finish_job
        check "SIG$name that a library took" test $got -eq 75 -a "$took" -le 60
    done
    TRAIN=$WORK/faulty.sh BEGUN='^ranks ' start 2 "${forever[@]}" --layers 16 --channels 512 --heads 8 --ffn 1536 --max-minutes 2 \
        --out early --save-every 0
    signal_rank TERM 1; finish_job
    check "SIGTERM while weights are made" test $got -eq 75 -a "$took" -le 60
    unset TAKE_SIGNALS
    LATE_ACCEPT=1 timeout 60 "${LAUNCH[@]}" -np 2 ./faulty.sh "${run[@]}" --out late >out.txt 2>err.txt
    check "rank 0 is slow to take a connection" test $? -eq 0
else
    skip "signals that a library took, a slow rank 0" "no C compiler, or this build has its own runtime"
fi
ranks 2 "${longer[@]}" --out stopped >/dev/null 2>&1
check "and to the end: the bits of the undisturbed run" compare same_files ref stopped

# ---------------------------------------------------------------------------------------------------------------------
# numbers, hangs

ranks $RANKS "${run[@]}" --out nan --plant nan:1:5 >out.txt 2>err.txt; got=$?
check "NaN on one rank: the run goes on" test $got -eq 0
check "and skips that step on all" test "$(grep SKIPPED out.txt | cut -c 1-14)" = "step      5/24"
ranks $RANKS "${run[@]}" --out skips --plant nan:$LAST:1 --max-skips 1 >out.txt 2>err.txt; got=$?
expect_words "--max-skips" 76 $got "1 steps in a row were not finite"
ranks $RANKS "${run[@]}" --out hang --plant hang:1:5 --hang-seconds 2 >out.txt 2>err.txt; got=$?
expect_words "a hang" 124 $got "rank 1 .*nothing moved for .* after step 4, in: a planted hang"
check "every rank says where it stands" test "$(grep -c 'nothing moved for' err.txt)" -eq $RANKS -a -z "$(grep 'not answer' err.txt)"
start $RANKS "${forever[@]}" --out hang --resume never --hang-seconds 2
signal_rank STOP $LAST; finish_job
expect_words "a stopped process" 124 $got "rank $LAST .*does not answer"

# ---------------------------------------------------------------------------------------------------------------------
# folders and disks

start 2 "${forever[@]}" --out busy --save-every 0
ranks 2 "${forever[@]}" --out busy >second.txt 2>err.txt; got=$?
expect_words "a second run on the folder" 77 $got "another run is using --out 'busy'"
kill -USR1 $job; finish_job
check "did not disturb the first" test $got -eq 75

mkdir disk
if unshare -m mount -t tmpfs none disk 2>/dev/null; then
    unshare -m bash -c 'mount -t tmpfs -o size=5m none disk; head -c 4500000 /dev/zero >disk/other
        "$@" --out disk/out --save-every 5 --keep 2 --async-save on | while read -r line; do
            [[ $line != "step     11/"* ]] || rm -f disk/other; echo "$line"; done >out.txt
        got=${PIPESTATUS[0]}; ls disk/out >listing.txt; exit $got' full "${MPIRUN[@]}" -np 2 "$TRAIN" "${run[@]}" \
        --steps 300 2>err.txt; got=$?
    expect_words "full disk: training outlasts it" 0 $got "checkpoint of step 5 not saved.*No space left"
    check "and saves once there is room" grep -qx step_00000300 listing.txt
else
    skip "full disk" "no permission to mount one"
fi

ranks 2 "${run[@]}" --out run --save-every 8 --keep 9 >/dev/null 2>&1
for file in optim-00001-of-00002.safetensors optim-00000-of-00002.safetensors model.safetensors; do
    for how in flip missing; do
        rm -rf hurt; cp -r run hurt
        if [ $how = flip ]; then compare flip hurt/step_00000024/$file -9; else rm hurt/step_00000024/$file; fi
        ranks 2 "${run[@]}" --out hurt --keep 9 >out.txt 2>err.txt; got=$?
        expect_words "$how $file: it is named" $got 0 "step_00000024.*not usable.*$file"
        check "$how $file: all ranks fall back" grep -q '^resume .*: step 16 of 24' out.txt
        check "$how $file: and end well" compare same_run run hurt
    done
done

# ---------------------------------------------------------------------------------------------------------------------
# ranks that own nothing of a tiny model save with the others
if [ "$RANKS" -gt 2 ]; then
    ranks 20 --train-data "$WORK/data" --model tiny --layers 1 --channels 2 --heads 1 --ffn 2 --vocab-size 288 --seq-len 32 \
        --batch-tokens 640 --batch-size 1 --recipe bf16 --steps 3 --save-every 2 --async-save on --hang-seconds 20 --threads 1 \
        --out many >out.txt 2>err.txt
    check "20 ranks, of which most own nothing" test $? -eq 0 -a -e many/step_00000003/state.json
fi

# ---------------------------------------------------------------------------------------------------------------------
# ranks that do not belong together

if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    "${MPIRUN[@]}" -np 1 "$TRAIN" "${run[@]}" --out bad : -np 1 env CUDA_VISIBLE_DEVICES= "$TRAIN" "${run[@]}" --out bad \
        >out.txt 2>err.txt; got=$?
    expect_words "a rank without a GPU beside one with" 69 $got "rank 1 .*has no GPU, rank 0 .*has one"
fi

ranks 5 "${run[@]}" --out bad >out.txt 2>err.txt; got=$?
expect_words "a batch that does not divide" 2 $got "--batch-tokens 384 is not a multiple of --seq-len 32 x 5 ranks"
check "one line for all ranks" test "$(grep -c '^train_llama:' err.txt)" -eq 1
"${MPIRUN[@]}" -np 1 "$TRAIN" "${run[@]}" --out bad : -np 1 "$TRAIN" "${run[@]}" --out bad --lr 1 >out.txt 2>err.txt; got=$?
expect_words "other options on one rank" 2 $got "rank 1 .*differs.*'--lr 1', not '--lr auto'"
check_exit "a fault that is none" 2 "--plant is 'nun:1:2'" "${run[@]}" --plant nun:1:2
check_exit "no time for NCCL" 2 "--nccl-timeout 0" "${run[@]}" --nccl-timeout 0
mkdir here there; cp -r data here/; cp -r data there/
printf 'x' | dd of=there/data/train_000000.bin bs=1 seek=1100 conv=notrunc status=none
away=("${run[@]}" --train-data data --out "$WORK/bad")
"${MPIRUN[@]}" -np 1 -wdir here "$TRAIN" "${away[@]}" : -np 1 -wdir there "$TRAIN" "${away[@]}" >out.txt 2>err.txt; got=$?
expect_words "other data on one rank" 65 $got "rank 1 .*differs.*training data"
away=("${run[@]}" --train-data data --out bad)
"${MPIRUN[@]}" -np 1 -wdir here "$TRAIN" "${away[@]}" : -np 1 -wdir here/data "$TRAIN" "${away[@]}" --train-data "$WORK/here/data" \
    >out.txt 2>err.txt; got=$?
expect_words "options are compared before anything is opened" 2 $got "rank 1 .*--train-data"
cp there/data/train_000000.bin kept; cp data/train_000000.bin there/data/
rm there/data/val_*.bin
"${MPIRUN[@]}" -np 1 -wdir here "$TRAIN" "${away[@]}" : -np 1 -wdir there "$TRAIN" "${away[@]}" >out.txt 2>err.txt; got=$?
expect_words "no validation data on one rank" 65 $got "rank 1 .*differs.*validation"
cp data/val_*.bin there/data/
"${MPIRUN[@]}" -np 1 -wdir here "$TRAIN" "${away[@]}" : -np 1 -wdir there "$TRAIN" "${away[@]}" >out.txt 2>err.txt; got=$?
expect_words "a folder that one host does not see" 2 $got "rank 1 .*does not see the folder --out 'bad'"

# another host by name: what starts mpirun's daemon there gives this machine that name instead of going elsewhere
cat >agent.sh <<'SH'
#!/bin/sh
host=$1; shift
exec unshare --uts sh -c 'hostname "$0"; exec sh -c "$1"' "$host" "$*"
SH
chmod +x agent.sh
if [ "$(unshare --uts sh -c 'hostname elsewhere && hostname' 2>/dev/null)" = elsewhere ]; then
    two=("${MPIRUN[@]}" --mca plm rsh --mca plm_rsh_agent "$WORK/agent.sh" --host "$(hostname):1,elsewhere:1" -np 2)
    "${two[@]}" "$TRAIN" "${run[@]}" --out hosts >out.txt 2>err.txt
    check "two hosts" grep -q '^  rank 1 .*elsewhere' out.txt
    ranks 2 "${run[@]}" --out host >/dev/null 2>&1
    check "are the run of one host" compare same_run host hosts
    "${two[@]}" "$TRAIN" "${forever[@]}" --out far --plant hang:1:5 --hang-seconds 2 >out.txt 2>err.txt; got=$?
    expect_words "a hang elsewhere" 124 $got "rank 1 (elsewhere): nothing moved"
else
    skip "two hosts" "no permission to name one"
fi

# scripts/multi_node/mpirun.sh starts again after a lost rank, not after Ctrl-C (of all in the foreground, as of a terminal)
export TRAIN HOSTS
HOSTS=$(hostname):2
launcher() {
    rm -f out.txt
    env --default-signal=INT setsid "$ROOT/scripts/multi_node/mpirun.sh" "${forever[@]}" --out launched --save-every 0 >out.txt 2>err.txt &
    job=$!
    background+=($job)
    for _ in $(seq 1200); do grep -qs '^step ' out.txt && break; kill -0 $job 2>/dev/null || break; sleep 0.05; done
}
for name in INT TERM; do                   # Ctrl-C reaches all in the foreground
    launcher
    if [ $name = INT ]; then kill -INT -- -$job; else kill -TERM $job; fi
    finish_job
    check "mpirun.sh: SIG$name saves and ends it" test -z "$(grep 'start 2 of' err.txt)" -a $got -eq 75 -a "$took" -lt 25
done
launcher
pkill -9 -P "$(pgrep -P $job mpirun)" -f -- "--out launched"
for _ in $(seq 1200); do grep -qs 'start 2 of' err.txt && break; kill -0 $job 2>/dev/null || break; sleep 0.05; done
check "a lost rank starts it again" grep -q 'start 2 of' err.txt
kill -INT -- -$job; finish_job

# scripts/multi_node/slurm.sh: which exit codes queue the job again. srun and scontrol are stand-ins.
mkdir slurm
printf '#!/bin/sh\nexit "$CODE"\n' >slurm/srun
printf '#!/bin/sh\necho "$*" >>requeued.txt\n' >slurm/scontrol
chmod +x slurm/srun slurm/scontrol
requeued=''
for CODE in 0 2 77 75 137 124 1 75 1; do
    rm -f requeued.txt
    CODE=$CODE RETRIES=2 SLURM_JOB_ID=7 PATH=$WORK/slurm:$PATH "$ROOT/scripts/multi_node/slurm.sh" --steps 1; got=$?
    [ $got -eq "$CODE" ] || fail "slurm.sh: exit code" "$got, not $CODE"
    requeued+=" $CODE:$(cat requeued.txt 2>/dev/null)"
done
check "slurm.sh: queues again after 75 and failures, two in a row" test \
    "$requeued" = " 0: 2: 77: 75:requeue 7 137:requeue 7 124:requeue 7 1: 75:requeue 7 1:requeue 7"
finish
