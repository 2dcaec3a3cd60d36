#!/usr/bin/env bash
# mpirun.sh: one run over several hosts, one rank a GPU, started again after what a start can mend.
#
#     HOSTS="node1:8 node2:8" scripts/multi_node/mpirun.sh --model 1.6b --train-data /shared/data --out /shared/runs/1.6b
#
# HOSTS       name:ranks of each host; mpirun must reach them (ssh without a password)
# INTERFACE   network interface of all hosts for MPI and NCCL, where theirs is not the right one (ip addr lists them)
# RETRIES     starts after a lost rank, a hang or an I/O error [3]; after exit 75 (asked to stop) none
#
# This tree (TRAIN names the binary), the shards and --out lie at the same path on all hosts; --out on a file system they share.
# kill -USR1 of this script's mpirun saves a checkpoint and ends with 75.
set -u
TRAIN=${TRAIN:-$(cd "$(dirname "$0")/../.." && pwd)/train_llama}
HOSTS=${HOSTS:-$(hostname):1}
RETRIES=${RETRIES:-3}

ranks=0
for host in $HOSTS; do ranks=$((ranks + ${host##*:})); done
options=(-np "$ranks" --host "${HOSTS// /,}" --bind-to none)
[ "$(id -u)" -ne 0 ] || options+=(--allow-run-as-root)
if [ -n "${INTERFACE:-}" ]; then
    options+=(--mca btl_tcp_if_include "$INTERFACE" --mca oob_tcp_if_include "$INTERFACE" -x "NCCL_SOCKET_IFNAME=$INTERFACE")
fi
for name in $(compgen -e | grep -E '^(NCCL|OMP)_'); do     # as set here, on all hosts
    [ "$name" = NCCL_SOCKET_IFNAME ] && [ -n "${INTERFACE:-}" ] || options+=(-x "$name")
done

export HWLOC_COMPONENTS=${HWLOC_COMPONENTS:--opencl}      # an OpenCL driver that hwloc loads may take mpirun's signals
# Ctrl-C reaches mpirun, too; the run is not to start again then
stopped=
trap 'stopped=1' INT TERM
for ((start = 0; ; start++)); do
    mpirun "${options[@]}" "$TRAIN" "$@"
    code=$?
    case $code in
        0 | 2 | 65 | 66 | 70 | 71 | 75 | 76 | 77) exit $code ;;    # done, stopped, or the same again after a start
    esac
    [ -z "$stopped" ] && [ $start -lt "$RETRIES" ] || exit $code
    echo "mpirun.sh: exit code $code; start $((start + 2)) of $((RETRIES + 1)) from the last checkpoint" >&2
    sleep 5
    [ -z "$stopped" ] || exit $code
done
