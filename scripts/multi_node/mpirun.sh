#!/usr/bin/env bash
# mpirun.sh: one run over several hosts, one rank a GPU, started again after what a start can mend.
#
#     HOSTS="node1:8 node2:8" scripts/multi_node/mpirun.sh --model 1.6b --train-data /shared/data --out /shared/runs/1.6b
#
# HOSTS       name:ranks of each host; mpirun must reach them (ssh without a password)
# INTERFACE   network interface of all hosts for MPI and NCCL, where theirs is not the right one (ip addr lists them)
# RETRIES     starts in a row after a lost rank, a hang or an I/O error [3]; after exit 75 (asked to stop) none
#
# This tree (TRAIN names the binary), the shards and --out lie at the same path on all hosts; --out on a file system they share.
# Ctrl-C, or a signal to this script (TERM, HUP, USR1): saves a checkpoint and ends with 75.
set -u
TRAIN=${TRAIN:-$(cd "$(dirname "$0")/../.." && pwd)/train_llama}
HOSTS=${HOSTS:-$(hostname):1}
RETRIES=${RETRIES:-3}
pauses=(5 60 300)            # seconds before the second, third and later starts: a host may have to come back

ranks=0
for host in $HOSTS; do
    [[ $host =~ :[1-9][0-9]*$ ]] || { echo "mpirun.sh: HOSTS has '$host', but must be name:ranks of each host" >&2; exit 2; }
    ranks=$((ranks + ${host##*:}))
done
options=(-np "$ranks" --host "${HOSTS// /,}" --bind-to none)
[ "$(id -u)" -ne 0 ] || options+=(--allow-run-as-root)
if [ -n "${INTERFACE:-}" ]; then
    options+=(--mca btl_tcp_if_include "$INTERFACE" --mca oob_tcp_if_include "$INTERFACE" -x "NCCL_SOCKET_IFNAME=$INTERFACE")
fi
for name in $(compgen -e | grep -E '^(NCCL|OMP)_'); do     # as set here, on all hosts
    [ "$name" = NCCL_SOCKET_IFNAME ] && [ -n "${INTERFACE:-}" ] || options+=(-x "$name")
done

export HWLOC_COMPONENTS=${HWLOC_COMPONENTS:--opencl}      # an OpenCL driver that hwloc loads may take mpirun's signals
# a signal to this script, and Ctrl-C, ask the run to save and end; it is not started again then
stopped='' job=''
trap 'stopped=1; [ -z "$job" ] || kill -USR1 "$job" 2>/dev/null' INT TERM HUP USR1
for ((start = 0; ; start++)); do
    begin=$SECONDS
    setsid mpirun "${options[@]}" "$TRAIN" "$@" </dev/null &
    job=$!
    while wait "$job"; code=$?; kill -0 "$job" 2>/dev/null; do :; done       # a trap ends `wait`, not the job
    job=''
    case $code in
        0 | 2 | 65 | 66 | 70 | 71 | 75 | 76 | 77) exit $code ;;    # done, stopped, or the same again after a start
    esac
    [ $((SECONDS - begin)) -lt 600 ] || start=0                    # RETRIES in a row
    [ -z "$stopped" ] && [ $start -lt "$RETRIES" ] || exit $code
    echo "mpirun.sh: exit code $code; start $((start + 2)) of $((RETRIES + 1)) in $((pauses[start < 2 ? start : 2])) s" >&2
    for ((i = 0; i < pauses[start < 2 ? start : 2] && !${stopped:-0}; i++)); do sleep 1; done
    [ -z "$stopped" ] || exit $code
done
