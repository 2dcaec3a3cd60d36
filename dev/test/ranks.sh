#!/usr/bin/env bash
# ranks.sh: several CPU ranks over MPI: the same run as one rank, resumed on any number of ranks, and what clusters do to jobs.
#
# 12 samples of 32 tokens a step, 1 a micro-batch, so 1, 2, 3 and 4 ranks have the same micro-batches. The vocabulary of 257 makes
# sizes that do not divide by any of them.
source "$(dirname "$0")/lib.sh"
need_mpirun
make_shards data
MODEL=(--model tiny --layers 2 --channels 64 --heads 2 --ffn 128 --vocab-size 257 --seq-len 32)
SMALL+=("${MODEL[@]}" --batch-size 1)
run=("${SMALL[@]}" --recipe bf16 --schedule constant --warmup-steps 0 --lr 2e-3 --steps 12)

for n in 2 3 4; do
    "${MPIRUN[@]}" -np $n "$(dirname "$TRAIN")/test_llama" comm >out.txt 2>err.txt; got=$?
    check "$n ranks: collectives" test $got -eq 0 -a -n "$(grep -E '^[1-9][0-9]* passed, 0 failed' out.txt)"
done

# ---------------------------------------------------------------------------------------------------------------------
# the same run

train "${run[@]}" --out r1 >/dev/null
for n in 2 3 4; do
    ranks $n "${run[@]}" --out r$n >out.txt 2>err.txt
    check "$n ranks: the curve of one rank" compare close_run r1 r$n 0.005
    check "$n ranks: the checkpoint is whole" compare whole r$n
    check "$n ranks: optimizer state as of one rank" compare close_state r1/step_00000012 r$n/step_00000012 0.05
done
check "a table of ranks" grep -q "^  rank 3 .*$(hostname)" out.txt
train "${run[@]}" --out other --seed 1338 >/dev/null
check_fails "planted: another seed" compare close_run r1 other 0.005
train "${run[@]}" --out faster --lr 2.2e-3 >/dev/null
check_fails "planted: a learning rate 10 % higher" compare close_run r1 faster 0.005
ranks 3 "${run[@]}" --out again >/dev/null 2>&1
check "the same number of ranks: the same bits" compare same_run r3 again
ranks 3 "${run[@]}" --out zero --zero 0 >/dev/null 2>&1
check "--zero 0 is the same training" compare close_run r3 zero 0.005
ranks 3 "${run[@]}" --out narrow --reduce-dtype bf16 >/dev/null 2>&1
check "--reduce-dtype bf16 is near" compare close_run r1 narrow 0.02
check_fails "and not the same" compare same_run r3 narrow
quartet=("${SMALL[@]}" --recipe quartet --bwd-rounding sr --steps 4)
train "${quartet[@]}" --out q1 >/dev/null
ranks 4 "${quartet[@]}" --out q4 >/dev/null 2>&1
check "quartet: random numbers do not depend on ranks" compare close_run q1 q4 0.001
train "${quartet[@]}" --bwd-rounding rtn --out q1n >/dev/null
check_fails "planted: other random numbers" compare close_run q1 q1n 0.001

# ---------------------------------------------------------------------------------------------------------------------
# any number of ranks loads what any other saved

train "${run[@]}" --steps 2 --out chain --keep 99 >/dev/null
before=1
for ranks_steps in 2:4 4:6 3:8 1:10; do
    n=${ranks_steps%:*} to=${ranks_steps#*:}
    if [ $n -eq 1 ]; then train "${run[@]}" --steps $to --out chain --keep 99 >out.txt 2>err.txt
    else ranks $n "${run[@]}" --steps $to --out chain --keep 99 >out.txt 2>err.txt; fi
    check "$before -> $n ranks: goes on" grep -q "^saved .*step_000000$(printf %02d $to)" out.txt
    before=$n
done
train "${run[@]}" --steps $to --out straight >/dev/null
for folder in chain straight; do sed -i '/"type":"val"/d' $folder/metrics.jsonl; done     # each stop validates
check "1 -> 2 -> 4 -> 3 -> 1 ranks is the run of one" compare close_run straight chain 0.005
# one step from the checkpoint of 4 ranks: m, v and weights as from the same files on one rank
one_step=("${run[@]}" --steps 7 --resume chain/step_00000006)
train "${one_step[@]}" --out step1 >/dev/null
for n in 2 3 4; do
    ranks $n "${one_step[@]}" --out step$n >/dev/null 2>&1
    check "4 -> $n ranks: state after one step" compare close_state step1/step_00000007 step$n/step_00000007 1e-5
done
check_fails "planted: the state of the step before" compare close_state step1/step_00000007 chain/step_00000006 1e-5
finish
