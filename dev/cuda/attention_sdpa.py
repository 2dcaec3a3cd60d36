"""Times PyTorch's SDPA (cuDNN and flash) on the shapes of attention_bench and prints both side by side.

    python3 dev/cuda/attention_sdpa.py ./attention_bench

Causal, bf16; q, k, v are views of one (B, T, (NH + 2 NKV) * HS) tensor, as a fused projection gives them. Grouped heads go
through enable_gqa and also through keys and values expanded beforehand (not timed); the faster counts. Median of 20 over 3
buffers, CUDA events, the GPU kept busy while the host queues the work, so that Python's time does not count.
"""
import re
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

RUNS, WARM_UP, BUFFERS = 20, 5, 3
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def median_ms(call):
    for i in range(WARM_UP):
        call(i % BUFFERS)
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
    torch.cuda._sleep(60_000_000)  # some 30 ms: the queue fills behind it
    for i, (begin, end) in enumerate(events):
        begin.record()
        call(i % BUFFERS)
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[RUNS // 2]


def time_sdpa(backend, b, t, nh, nkv, hs, expand):
    buffers = []
    for _ in range(BUFFERS):
        qkv = torch.randn(b, t, nh + 2 * nkv, hs, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        q, k, v = (x.detach().requires_grad_() for x in qkv.split([nh, nkv, nkv], dim=1))
        if expand and nkv != nh:
            k, v = (x.detach().repeat_interleave(nh // nkv, dim=1).requires_grad_() for x in (k, v))
        buffers.append((q, k, v, torch.randn(b, t, nh, hs, device="cuda", dtype=torch.bfloat16).transpose(1, 2)))
    gqa = not expand and nkv != nh

    with sdpa_kernel(backend):
        def forward(i):
            q, k, v, _ = buffers[i]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        with torch.no_grad():
            forward_ms = median_ms(forward)
        outs = [forward(i) for i in range(BUFFERS)]
        backward_ms = median_ms(
            lambda i: torch.autograd.grad(outs[i], buffers[i][:3], buffers[i][3], retain_graph=True))
    return forward_ms, backward_ms


def main():
    ours = {}
    if len(sys.argv) > 1:
        text = subprocess.run([sys.argv[1], "time"], capture_output=True, text=True, check=True).stdout
        print(text)
        for path, shape, what, ms in re.findall(r"time (\S+)\s+(\S+)\s+(forward|backward)\s+([\d.]+) ms", text):
            ours[path, shape, what] = float(ms)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cudnn", torch.backends.cudnn.version())
    for b, t, nh, nkv, hs in ((16, 2048, 32, 4, 64), (4, 2048, 32, 32, 128), (64, 512, 10, 10, 128)):
        name = f"B{b}_T{t}_NH{nh}_NKV{nkv}_HS{hs}"
        best = {"forward": float("inf"), "backward": float("inf")}
        flop = 2.0 * b * nh * t * t * hs
        for label, backend in BACKENDS.items():
            for expand in (False, True):
                try:
                    forward_ms, backward_ms = time_sdpa(backend, b, t, nh, nkv, hs, expand)
                except RuntimeError as error:
                    reason = str(error).splitlines()[0][:100]
                    print(f"sdpa {label} {name} {'expanded' if expand else 'enable_gqa'}: refused: {reason}")
                    continue
                note = "" if nh == nkv else " expanded" if expand else " enable_gqa"
                print(f"sdpa {label:5} {name:28} forward {forward_ms:8.4f} ms"
                      f" {flop / forward_ms * 1e-9:6.1f} TFLOP/s   backward {backward_ms:8.4f} ms"
                      f" {2.5 * flop / backward_ms * 1e-9:6.1f} TFLOP/s{note}")
                best["forward"] = min(best["forward"], forward_ms)
                best["backward"] = min(best["backward"], backward_ms)
                if nh == nkv:
                    break
        for (path, shape, what), ms in ours.items():
            if shape == name:
                print(f"ratio {path:8} {name:28} {what:8} {ms:8.4f} / {best[what]:8.4f} ms = {ms / best[what]:.2f}")


main()
