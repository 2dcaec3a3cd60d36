#!/usr/bin/env bash
# slurm.sh: a batch job of one rank a GPU that saves two minutes before its time is up, and queues itself again.
#
#     sbatch --nodes=4 scripts/multi_node/slurm.sh --model 1.6b --train-data /shared/data --out /shared/runs/1.6b
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
# USR1 goes to the ranks (not to this shell): they save, all exit with 75. A node that fails requeues the job by itself.
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-8}
srun --mpi=pmix ./train_llama "$@"
code=$?
if [ $code -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
