#!/usr/bin/env bash
# slurm.sh: a batch job of one rank a GPU that saves two minutes before its time is up, and queues itself again; also after a
# lost rank, a hang or an I/O error, RETRIES times in a row [10].
#
#     sbatch --nodes=4 scripts/multi_node/slurm.sh --model 1.6b --train-data /shared/data --out /shared/runs/1.6b
#
# sbatch takes other numbers before the script's name: --ntasks-per-node, --gpus-per-node (0 without GPUs), --time; --signal=USR1@SECONDS
# must leave time for a step and a save. Submit from the folder of train_llama, or set TRAIN.
#
#SBATCH --job-name=train_llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# USR1 goes to the ranks (not to this shell): they save, all exit with 75. A node that fails requeues the job by itself, once Slurm
# has noticed (SlurmdTimeout).
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-8}
failures=slurm-$SLURM_JOB_ID.failures           # in a row: a run of more than 10 minutes begins a new count
srun --mpi=pmix --kill-on-bad-exit=1 "${TRAIN:-./train_llama}" "$@"
code=$?
case $code in
    0 | 2 | 65 | 66 | 70 | 71 | 76 | 77) rm -f "$failures"; exit $code ;;    # done, or the same again after a start
    75) rm -f "$failures" ;;
    *)
        [ $SECONDS -lt 600 ] || rm -f "$failures"
        count=$(($(cat "$failures" 2>/dev/null || echo 0) + 1))
        [ $count -le "${RETRIES:-10}" ] || exit $code
        echo $count >"$failures"
        ;;
esac
scontrol requeue "$SLURM_JOB_ID"
exit $code
