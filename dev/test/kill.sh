#!/usr/bin/env bash
# kill.sh: kill -9 at random instants of a run that saves every step.
#
#     dev/test/kill.sh              20 kills
#     KILLS=200 dev/test/kill.sh    200; SEED=n picks other instants
#     RANKS=2 dev/test/kill.sh      of one of two ranks, picked at random
#
# Every second kill waits for a save to be under way, the others come at any time from the start of the processes on.
# After each kill: every committed checkpoint is whole; the next start names none as damaged, resumes from the newest of them, and
# that is not older than the last step that the killed run said was saved. When a run is through, all of it equals an undisturbed
# run, to the bit.
source "$(dirname "$0")/lib.sh"
KILLS=${KILLS:-20} SEED=${SEED:-$$} RANKS=${RANKS:-1}
RANDOM=$SEED
launch=()
if [ "$RANKS" -gt 1 ]; then
    need_mpirun
    launch=("${LAUNCH[@]}" -np "$RANKS")
    train() { "${launch[@]}" "$TRAIN" "$@" 2>mpi.txt; }
fi
make_shards data
STEPS=${STEPS:-80}
run=("${SMALL[@]}" --recipe quartet --bwd-rounding sr --steps $STEPS --save-every 1)
train "${run[@]}" --out ref --keep 2 >/dev/null
check "the undisturbed run is whole" compare whole ref

# how long a start and how long a whole run take here, in ms: kills fall between 0 and about a third of a run after the start
milliseconds() { local begin=${EPOCHREALTIME/./}; "$@" >/dev/null 2>&1; echo $(((${EPOCHREALTIME/./} - begin) / 1000)); }
start_ms=$(milliseconds train "${run[@]}" --out ref)
run_ms=$(milliseconds train "${run[@]}" --out timed)
span_ms=$((start_ms + run_ms / 3 + 1))
echo "seed $SEED: $KILLS kills, in a save or 0 to $span_ms ms after a start (a start takes $start_ms ms, a run $run_ms ms)"

wait_ms() { sleep "$(printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)))"; }

# one more start of the run in folder $out, killed after a random time unless $1 is `end`
starts=0 kills=0 ends=0 bad=0 during_save=0
declare -A resumed_from
problem() { bad=$((bad + 1)); echo "  kill $kills, start $starts, $out: $1"; }
one_start() {
    local before saved after pid pids=()
    before=$(compare newest "$out")
    starts=$((starts + 1))
    "${launch[@]}" "$TRAIN" "${run[@]}" --out "$out" >out.txt 2>err.txt &
    pid=$!
    background=($pid)
    if [ "$1" = kill ]; then
        if [ $((kills % 2)) -eq 0 ]; then wait_ms $((RANDOM % span_ms))
        else
            until grep -qs '^step' out.txt || ! kill -0 $pid 2>/dev/null; do sleep 0.02; done
            wait_ms $((RANDOM % 200))
        fi
        pids=($pid)
        [ "$RANKS" -eq 1 ] || mapfile -t pids < <(pgrep -P $pid)
        if [ $((kills % 2)) -eq 1 ]; then
            until compgen -G "$out/step_*.tmp" >/dev/null || ! kill -0 $pid 2>/dev/null; do sleep 0.002; done
        fi
        kill -0 $pid 2>/dev/null || pids=()
        [ ${#pids[@]} -eq 0 ] || kill -9 "${pids[RANDOM % ${#pids[@]}]}" 2>/dev/null
    fi
    wait $pid 2>/dev/null; got=$?
    background=()
    if [ "$RANKS" -eq 1 ]; then
        [ $got -eq 0 ] || [ "$got$1" = 137kill ] || problem "exit code $got: $(tail -n 1 err.txt)"
        [ ! -s err.txt ] || problem "stderr: $(head -n 1 err.txt)"
    else
        [ $got -eq 0 ] || [ ${#pids[@]} -gt 0 ] || problem "exit code $got: $(grep train_llama: err.txt | tail -n 1)"
        ! grep -q 'not usable' err.txt || problem "stderr: $(grep 'not usable' err.txt)"
    fi
    if grep -q '^step\|^done' out.txt; then                 # it came so far as to say where it begins
        saved=$(sed -n 's/^resume .*: step \([0-9]*\) of .*/\1/p' out.txt)
        [ "${saved:--1}" = "$before" ] || problem "resumed from step '${saved:-none}', the newest checkpoint was $before"
        [ -z "$saved" ] || resumed_from[$saved]=1
    fi
    saved=$(sed -n 's/^saved .*step_0*\([0-9]*\) .*/\1/p' out.txt | tail -n 1)
    after=$(compare newest "$out")
    [ "$after" -ge "${saved:--1}" ] && [ "$after" -ge "$before" ] || problem "newest checkpoint $after, was $before, saved $saved"
    [ "$after" -lt 0 ] || compare whole "$out" >whole.txt || problem "$(cat whole.txt)"
    ! compgen -G "$out/step_*.tmp" >/dev/null || during_save=$((during_save + 1))
}
next_run() { runs=$((runs + 1)); out=run-$runs; }
compare_run() { if compare same_run ref $out >check.txt; then ends=$((ends + 1)); else problem "$(cat check.txt)"; fi; }

runs=0
next_run
while [ $kills -lt "$KILLS" ]; do
    one_start kill
    if [ $got -eq 0 ]; then
        compare_run
        rm -rf "$out"
        next_run
    else
        kills=$((kills + 1))
    fi
done
one_start end
compare_run
if [ $bad -eq 0 ]; then
    ok "$kills kills ($during_save left a half-written checkpoint): $ends runs end with the bits of the undisturbed one"
else
    fail "kills" "$bad problems in $kills kills"
fi
check "starts resumed from different steps" test ${#resumed_from[@]} -ge $((KILLS < 8 ? 1 : 3))

# each comparison sees a planted error
newest=$out/step_000000$STEPS
compare flip $newest/model.safetensors -1
check_fails "planted: a bit of the final weights" compare same_run ref $out
head -c 1000 $newest/model.safetensors >cut && cp cut $newest/model.safetensors
check_fails "planted: a half-written checkpoint" compare whole $out
finish
