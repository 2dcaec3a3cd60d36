#!/usr/bin/env bash
# resume.sh: a run that was stopped and resumed is the run that was not, to the bit: losses, gradient norms, learning rates,
# validation losses, weights and optimizer state.
#
# The data (lib.sh) makes an epoch of exactly 10 steps over 4 shards, each crossed every 2.5 steps; runs have 24 steps, the first
# 6 of them warm-up, with accumulation 2.
source "$(dirname "$0")/lib.sh"
make_shards data
STEPS=24

for variant in "bf16" "quartet --bwd-rounding rtn" "quartet --bwd-rounding sr" "quartet --saved-int8 all"; do
    read -r -a recipe <<<"--recipe $variant"
    name="${variant/--bwd-rounding /}"; name=${name// /-}
    run=("${SMALL[@]}" "${recipe[@]}" --steps $STEPS --warmup-steps 6 --batch-size 4)
    ref=$name-ref
    train "${run[@]}" --out $ref --save-every 1 --keep 99 >/dev/null
    check "$name: the undisturbed run is whole" compare whole $ref

    # each comparison sees a planted error
    if [ "$variant" = bf16 ]; then
        train "${run[@]}" --out other --save-every 0 --seed 1338 >/dev/null
        check_fails "planted: another seed" compare same_run $ref other
        train "${run[@]}" --out again --save-every 0 >/dev/null
        check "the same command gives the same run" compare same_run $ref again
        compare flip again/step_000000$STEPS/model.safetensors -1
        check_fails "planted: one bit of the last weight" compare same_run $ref again
        compare flip again/step_000000$STEPS/model.safetensors -1
        compare flip again/step_000000$STEPS/optim-00000-of-00001.safetensors -1
        check_fails "planted: one bit of the optimizer state" compare same_run $ref again
        compare flip again/step_000000$STEPS/optim-00000-of-00001.safetensors -1
        check "and restored they compare equal" compare same_run $ref again
        sed -i '/"type":"step","step":9,/p' again/metrics.jsonl
        check_fails "planted: a step that stands twice" compare same_run $ref again
    fi

    # from each kind of place: warm-up, end of warm-up, inside a shard, at and around the epoch border, before the last step
    for k in 1 6 9 10 11 17 23; do
        train "${run[@]}" --out $name-from --save-every 0 --resume $ref/step_000000"$(printf %02d $k)" >/dev/null 2>err.txt
        check "$name: from the checkpoint of step $k" compare same_tail $ref $name-from $((k + 1))
        rm -rf $name-from
    done

    # asked to stop: signals during warm-up, inside the second epoch; time limit
    rm -rf stopped
    for words_signal in "step      2/:USR1" "step     12/:TERM" "step     17/:INT"; do
        run_until "${words_signal%:*}" "${words_signal#*:}" "${run[@]}" --out stopped --save-every 0
        step=$(compare newest stopped)
        if [ $got -eq 75 ] && grep -q "stopped .* step $step of $STEPS" out.txt; then ok "$name: SIG${words_signal#*:} stops at step $step"
        elif [ $got -eq 0 ] && [ "$step" = $STEPS ]; then skip "$name: SIG${words_signal#*:}" "the run was over before the signal came"
        else fail "$name: SIG${words_signal#*:}" "exit code $got, checkpoint $step: $(tail -n 1 err.txt)"; fi
    done
    if env --block-signal=USR1 true 2>/dev/null; then           # as `timeout` of some systems hands it on
        printf '#!/bin/sh\nexec env --block-signal=USR1 "%s" "$@"\n' "$TRAIN" >blocked.sh; chmod +x blocked.sh
        TRAIN=./blocked.sh run_until "step      2/" USR1 "${run[@]}" --out blocked --save-every 0
        if [ $got -eq 0 ]; then skip "$name: SIGUSR1, blocked by whoever started it" "the run was over before the signal came"
        else check "$name: SIGUSR1, blocked by whoever started it" test $got -eq 75; fi
        rm -rf blocked
    else
        skip "$name: SIGUSR1, blocked by whoever started it" "no env --block-signal here"
    fi
    train "${run[@]}" --out stopped --save-every 0 >/dev/null
    check "$name: three stops, then to the end" compare same_run $ref stopped
    rm -rf killed
    run_until "step     14/" KILL "${run[@]}" --out killed --save-every 4
    check "$name: kill -9 ends it" test $got -eq 137
    train "${run[@]}" --out killed --save-every 5 >/dev/null
    check "$name: kill -9, then to the end" compare same_run $ref killed
done

# stop after every single step
run=("${SMALL[@]}" --recipe quartet --bwd-rounding sr --steps $STEPS --warmup-steps 6 --batch-size 4)
starts=0 codes=
while [ $starts -lt $((STEPS + 3)) ]; do
    train "${run[@]}" --out every --save-every 0 --max-minutes 1e-9 >out.txt 2>err.txt; got=$?
    starts=$((starts + 1)) codes="$codes $got"
    [ $got -eq 75 ] || break
done
check "--max-minutes: one step a start, $STEPS starts, 75 each but the last" \
    test "$starts $codes" = "$STEPS $(printf ' 75%.0s' $(seq $((STEPS - 1)))) 0"
check "stopped at every step" compare same_run quartet-sr-ref every

# micro-batches: 8 rows a step as 1 x 8, 4 x 2, 8 x 1
for rows in 8 2 1; do
    run=("${SMALL[@]}" --recipe quartet --bwd-rounding sr --steps 14 --batch-size $rows)
    train "${run[@]}" --out rows-$rows --save-every 0 >/dev/null
    run_until "step      5/" TERM "${run[@]}" --out rows-$rows-stopped --save-every 0
    train "${run[@]}" --out rows-$rows-stopped --save-every 0 >/dev/null
    check "micro-batches of $rows rows: stopped and resumed" compare same_run rows-$rows rows-$rows-stopped
done

# skipped validation or samples between change nothing: they only read
run=("${SMALL[@]}" --recipe quartet --bwd-rounding sr --steps $STEPS --warmup-steps 6 --batch-size 4)
train "${run[@]}" --out sampled --save-every 0 --sample-every 5 --sample-tokens 20 --val-every 3 >/dev/null
check "samples and validations leave no trace in the weights" compare same_files quartet-sr-ref sampled

# a longer run goes on from a finished one; its steps stand once
train "${SMALL[@]}" --steps 8 --out longer >/dev/null
train "${SMALL[@]}" --steps 12 --out longer >out.txt
check "a larger --steps goes on" grep -q "step      9/12" out.txt
check "with steps 1 to 12 once each" compare steps longer
train "${SMALL[@]}" --steps 12 --out longer >out.txt; got=$?
check "done: says so, exit 0" test $got = 0 -a -n "$(grep '^done ' out.txt)"

# --resume PATH with another --out: started again, the same command goes on in --out; another PATH begins anew, and keeps what was
branch=("${SMALL[@]}" --steps 12 --out branch --resume longer/step_00000008 --keep 9)
train "${branch[@]}" --max-minutes 1e-9 >/dev/null; got=$?
train "${branch[@]}" >out.txt 2>err.txt
check "--resume PATH: the same command goes on" test $got -eq 75 -a -n "$(grep '^resume .*branch/step_00000009: step 9 of 12' out.txt)"
check "and ends as the run that it left" compare same_tail longer branch 9
train "${SMALL[@]}" --steps 12 --out branch --resume longer/step_00000012 --keep 9 >out.txt 2>err.txt
check "another PATH begins there" test -n "$(grep '^resume .*longer/step_00000012: step 12 of 12' out.txt)" -o -n "$(grep '^done' out.txt)"

# a sample that takes longer than --hang-seconds is no hang
train --train-data data --model llama3-8b --layers 2 --channels 64 --heads 2 --kv-heads 2 --ffn 128 --vocab-size 288 --seq-len 32 \
    --batch-tokens 256 --recipe bf16 --steps 2 --val-every 0 --save-every 0 --sample-every 1 --sample-tokens 2500 --hang-seconds 1 \
    --out talking >out.txt 2>err.txt
check "a long sample is no hang" test $? -eq 0

# the tokenizer that a resumed run found in a checkpoint outlives that checkpoint
mv data/tokenizer.json words.json  # beside the shards it would be found there
train "${SMALL[@]}" --steps 2 --out words --save-every 1 --keep 2 --tokenizer words.json >/dev/null 2>err.txt
train "${SMALL[@]}" --steps 7 --out words --save-every 1 --keep 2 >/dev/null 2>err.txt; got=$?
check "saves go on when the checkpoint with the tokenizer is gone" \
    test $got = 0 -a -f words/step_00000007/tokenizer.json -a ! -d words/step_00000002
mv words.json data/tokenizer.json

# a process that stood still for longer than --hang-seconds did not hang
"$TRAIN" "${SMALL[@]}" --recipe bf16 --steps 100000 --max-minutes 0.2 --save-every 0 --out paused --hang-seconds 2 >out.txt 2>err.txt &
for _ in $(seq 400); do grep -qs '^step ' out.txt && break; sleep 0.05; done
kill -STOP $!; sleep 4; kill -CONT $!
wait $!; got=$?
check "suspended and continued: goes on" test $got = 75

# blocks that do not quantize have no telemetry, and every line stays JSON
train "${SMALL[@]}" --recipe quartet --bf16-layers first:1,last:1 --steps 4 --out dense --log-every 1 >/dev/null 2>err.txt
train "${SMALL[@]}" --recipe quartet --bf16-layers first:1 --steps 4 --out half --log-every 1 >/dev/null 2>err.txt
for run in dense half; do
    check "metrics of --bf16-layers, $run" python3 -c "
import json, sys
steps = [r for r in map(json.loads, open('$run/metrics.jsonl')) if r['type'] == 'step']
assert len(steps) == 4 and ('qkv' in steps[3]['fp4']) == ('$run' == 'half'), steps"
done
finish
