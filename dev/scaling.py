#!/usr/bin/env python3
"""scaling.py: what data parallelism costs on more GPUs than were at hand (dev/SCALING.md).

    torchrun --nproc-per-node 4 dev/scaling.py measure      reduce-scatter and all-gather on the GPUs of this machine
    python3 dev/scaling.py predict                          the tables of dev/SCALING.md

measure fits seconds = latency + bytes (n - 1) / n / bandwidth to medians over sizes, both collectives as training issues
them (gradients f32, parameters bf16, in place, NCCL). predict takes the measured step of one GPU and, for all that moves
between GPUs, what stands in ASSUMED.
"""
import argparse
import os

# llama2-7b, quartet, T 2048, micro-batch 8, one H200 (README, dev/LOG.md)
PARAMETERS = 6.738e9
SEGMENTS = 34                 # collectives of a kind a step: embedding, 32 blocks, the rest
MICRO_TOKENS = 8 * 2048
MEASURED = {
    "micro_batch": 0.684,     # s, forward and backward of a micro-batch
    "backward_share": 0.67,   # of it backward, behind which the reduction hides
    "quantize_w": 0.021,      # s a step: weights quantized, dW out of the rotated space
    "update": 0.0315,         # s a step: norm and AdamW over all parameters on one GPU
    "nvlink_bandwidth": 305e9,      # bytes/s of a GPU's share in a ring: `measure` on 2 H200 of one machine
    "nvlink_latency": 49e-6,        # s a collective inside a machine: the same
}
# NOT measured: machines of 8 GPUs with a 400 Gb/s port each, over which NCCL lays as many rings
ASSUMED = {
    "gpus_a_machine": 8,
    "network_bandwidth": 8 * 45e9,  # bytes/s between machines
    "nvlink_hop": 1.5e-6,           # s
    "network_hop": 5e-6,
}


def measure():
    import statistics

    import torch
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    n = dist.get_world_size()
    points = {"reduce-scatter": [], "all-gather": []}
    for power in range(14, 31, 2):
        count = (1 << power) // n * n
        gradients = torch.zeros(count, device="cuda")
        parameters = torch.zeros(count, device="cuda", dtype=torch.bfloat16)
        mine = slice(rank * (count // n), (rank + 1) * (count // n))
        calls = {"reduce-scatter": (lambda: dist.reduce_scatter_tensor(gradients[mine], gradients), 4 * count),
                 "all-gather": (lambda: dist.all_gather_into_tensor(parameters, parameters[mine]), 2 * count)}
        for name, (call, size) in calls.items():
            times = []
            for i in range(25):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                end.synchronize()
                if i >= 5:
                    times.append(begin.elapsed_time(end) * 1e-3)
            points[name].append((size, statistics.median(times)))
    if rank == 0:
        print(f"{n} x {torch.cuda.get_device_name()}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
        for name, list_of in points.items():
            for size, seconds in list_of:
                print(f"{name:16} {size / 2**20:10.2f} MiB {seconds * 1e6:10.1f} us "
                      f"{size * (n - 1) / n / seconds * 1e-9:8.1f} GB/s of a GPU's share")
            (small, latency), (large, seconds) = list_of[0], list_of[-1]
            rate = (large - small) * (n - 1) / n / (seconds - latency)
            print(f"{name:16} fit: {latency * 1e6:.1f} us + bytes (n - 1) / n / {rate * 1e-9:.1f} GB/s")
    dist.destroy_process_group()


def collective(size, n):
    """Seconds of a reduce-scatter or all-gather of `size` bytes over n GPUs in rings: every GPU, and every machine, passes
    on (n - 1) / n of it; n - 1 hops of latency."""
    a, m = ASSUMED, MEASURED
    if n == 1:
        return 0.0
    share = size * (n - 1) / n
    if n <= a["gpus_a_machine"]:
        return m["nvlink_latency"] + share / m["nvlink_bandwidth"]
    machines = n // a["gpus_a_machine"]
    hops = (n - machines) * a["nvlink_hop"] + machines * a["network_hop"]
    return hops + share / min(a["network_bandwidth"], m["nvlink_bandwidth"])


def step(n, tokens, reduce_bytes=4):
    """Seconds of a step of n GPUs with `tokens` a GPU, and the parts of it that one GPU alone would not need."""
    m = MEASURED
    micro = m["micro_batch"] * min(1.0, tokens / MICRO_TOKENS)
    compute = m["micro_batch"] * tokens / MICRO_TOKENS
    part = PARAMETERS / SEGMENTS
    reduce = SEGMENTS * collective(reduce_bytes * part, n)
    gather = SEGMENTS * collective(2 * part, n)
    # the reduction of a segment runs beside the backward of the next one; the last segment has nothing to hide behind
    reduce_shown = max(collective(reduce_bytes * part, n), reduce - micro * m["backward_share"] * (1 - 1 / SEGMENTS))
    update = m["update"] / n
    # the gather of a segment runs beside the update of the next one
    gather_shown = max(0.0, gather - update * (1 - 1 / SEGMENTS))
    shown = (reduce_shown if n > 1 else 0.0) + gather_shown
    return compute + m["quantize_w"] + update + shown, shown, reduce, gather


def table(title, tokens_of, reduce_bytes=4):
    print(f"\n{title}\n")
    print("| GPUs | tokens a step | s a step | collectives not hidden | tokens/s | efficiency |")
    print("| --- | --- | --- | --- | --- | --- |")
    base = None
    for n in (1, 4, 8, 16, 64, 256, 512, 1024, 2048, 4096):
        tokens = tokens_of(n)
        if tokens < 2048:
            print(f"| {n:,} | less than one row of 2048 tokens a GPU | | | | |")
            continue
        seconds, shown, _, _ = step(n, tokens, reduce_bytes)
        rate = tokens * n / seconds
        base = base or rate / n
        print(f"| {n:,} | {tokens * n / 1e6:,.2f} M | {seconds:.2f} | {shown:.3f} s | {rate / 1e6:,.2f} M | "
              f"{rate / n / base:.2f} |")


def predict():
    table("The same work a GPU, 131,072 tokens", lambda n: 131072)
    table("One step of 4.19 M tokens, divided", lambda n: 4194304 // n)
    table("The same with --reduce-dtype bf16", lambda n: 4194304 // n, reduce_bytes=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "predict"])
    {"measure": measure, "predict": predict}[parser.parse_args().what]()
