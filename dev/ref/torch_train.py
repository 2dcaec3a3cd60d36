#!/usr/bin/env python3
"""torch_train.py: the training run of train_llama, written a second time in PyTorch, to compare loss curves.

    ./train_llama --model 30m --recipe bf16 ... --lr 1e-30 --steps 1 --out runs/init      # for its initial weights
    ./train_llama --model 30m --recipe bf16 ... --steps 100 --out runs/ours               # the run to compare with
    dev/ref/torch_train.py --init runs/init/step_00000001 --train 'books/train_*.bin' --val 'books/val_*.bin' \\
        --steps 100 --warmup-steps 10 --batch-tokens 262144 --micro-batch 64 --seq-len 512 --lr 1.2e-3 \\
        --out torch.jsonl --compare runs/ours/metrics.jsonl

Written from the documents (data/README.md, the headers' descriptions), shares no code with llmc/: model, order of the
samples, schedule, clipping and AdamW. It starts from the f32 master weights of a checkpoint folder and writes one JSON
object a line: {"type":"step","step":N,"loss":x,...} and, at the end, {"type":"val",...} over the same evenly spaced
validation samples. --compare alone (with --out) only prints the table of two finished runs.

Arithmetic of bf16: f32 master weights, cast to bf16 where they multiply; activations and residual stream bf16; norm
statistics, rotation, SwiGLU and cross-entropy in f32 inside; the gradient of a weight is bf16 a micro-batch (f32 in
train_llama) and is summed in f32. Arithmetic of quartet: fake quantization, the values of MXFP4 held in bf16 (exact),
products in bf16 with f32 sums; backward to nearest; the signs of the backward rotation are all +1 (train_llama draws
them each step).
Needs torch 2.5 or newer and numpy.
"""
import argparse
import glob
import json
import math
import os
import struct
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# order of the samples: a permutation of 0 .. n-1 an epoch, from Philox4x32-10 under the key `seed`

RAND_SHUFFLE = 1
U32 = np.uint64(0xFFFFFFFF)


def philox_word0(key, index, stream):
    """First output word of Philox4x32-10 for counters (index, stream), each a u64 array."""
    index, stream = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(stream, np.uint64))
    c = [index & U32, index >> np.uint64(32), stream & U32, stream >> np.uint64(32)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [p1 >> np.uint64(32) ^ c[1] ^ np.uint64(k0), p1 & U32, p0 >> np.uint64(32) ^ c[3] ^ np.uint64(k1), p0 & U32]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c[0]


def permute(key, stream, index, n):
    """Where index (array, below n) goes: 8 Feistel rounds on two halves of h bits, 4^h >= n, walked until below n."""
    at = np.array(index, np.uint64)
    if n == 1:
        return at
    bits = 1
    while 4**bits < n:
        bits += 1
    mask, bits = np.uint64((1 << bits) - 1), np.uint64(bits)
    stream = np.broadcast_to(np.asarray(stream, np.uint64), at.shape)
    outside = np.ones(at.shape, bool)
    while outside.any():
        left, right, s = at[outside] >> bits, at[outside] & mask, stream[outside]
        for r in range(8):
            left, right = right, left ^ philox_word0(key, np.uint64(r << 32) | right, s) & mask
        at[outside] = left << bits | right
        outside = at >= np.uint64(n)
    return at


class Shards:
    """Token shards; sample i is T+1 consecutive tokens at stride T, numbered through all shards in order of name."""

    def __init__(self, pattern, split, T):
        paths = []
        for item in pattern.split(","):
            inside = sorted(glob.glob(os.path.join(item, "*.bin"))) if os.path.isdir(item) else sorted(glob.glob(item))
            named = [path for path in inside if split in os.path.basename(path)]
            paths += named if os.path.isdir(item) and named else inside
        assert paths, f"no token shards for '{pattern}'"
        paths.sort(key=lambda path: (os.path.basename(path), path))
        self.T, self.tokens = T, []
        for path in paths:
            header = np.fromfile(path, "<i4", 256)
            assert header[0] == 20240520 and header[1] == 1, f"{path} is not a shard of 16-bit tokens"
            tokens = np.memmap(path, "<u2", "r", offset=1024)
            assert header[2] == len(tokens), f"{path}: {len(tokens)} tokens, its header says {header[2]}"
            self.tokens.append(tokens)
        counts = [max(len(tokens) - 1, 0) // T for tokens in self.tokens]
        self.first = np.cumsum([0] + counts)
        self.samples = int(self.first[-1])
        assert self.samples > 0, f"'{pattern}' holds no sample of {T + 1} tokens"

    def read(self, numbers):
        """(len(numbers), T+1) int64"""
        rows = []
        for number in map(int, numbers):
            shard = int(np.searchsorted(self.first, number, side="right")) - 1
            begin = (number - int(self.first[shard])) * self.T
            rows.append(self.tokens[shard][begin:begin + self.T + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    def visits(self, seed, g0, count):
        """Sample numbers of visits g0 .. g0+count-1 of a run."""
        g = np.arange(g0, g0 + count, dtype=np.uint64)
        stream = np.uint64(RAND_SHUFFLE << 60) | g // np.uint64(self.samples)
        return permute(seed, stream, g % np.uint64(self.samples), self.samples)

    def spaced(self, rows):
        return np.arange(rows, dtype=np.int64) * self.samples // rows


# ---------------------------------------------------------------------------------------------------------------------
# linear layers

def exponent(x):
    """floor(log2 x) of positive normal f32; -127 for 0 and below"""
    return (x.view(torch.int32) >> 23) - 127


def power_of_two(e):
    return ((e + 127) << 23).view(torch.float32)


def round_e2m1(t):
    """nearest of 0 .5 1 1.5 2 3 4 6 with sign, ties to the even code, saturating"""
    a = t.abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign(torch.clamp(torch.round(a / step) * step, max=6.0), t)


def hadamard_matrix(device):
    parity = [[bin(i & j).count("1") & 1 for j in range(32)] for i in range(32)]
    return (1.0 - 2.0 * torch.tensor(parity, dtype=torch.float32, device=device)) / math.sqrt(32)


def rotate(x, h):
    """blocks of 32 along the last dimension times H, in f32; h is H, which equals its transpose"""
    return (x.float().reshape(-1, 32) @ h).reshape(x.shape)


def quest(x, h):
    """x (rows, K) -> its MXFP4 values after rotation as bf16, trust mask: scale from the spread of each group of 32"""
    groups = rotate(x, h).view(x.shape[0], -1, 32)
    mean = groups.mean(-1, keepdim=True)
    std = torch.sqrt(torch.clamp((groups * groups).mean(-1, keepdim=True) - mean * mean, min=0))
    e = exponent(std * (2.92247856 / 6) + 1e-8)
    t = groups * power_of_two(-e)
    return (round_e2m1(t) * power_of_two(e)).to(torch.bfloat16).view(x.shape), (t.abs() < 6).view(x.shape)


def absmax(x, h):
    """x (rows, K) -> 3/4 of its rotated values in MXFP4 as bf16: no element is clipped; the caller owes 4/3"""
    groups = rotate(x, h).view(x.shape[0], -1, 32)
    e = torch.clamp(exponent(groups.abs().amax(-1, keepdim=True)) - 2, min=-126)
    return (round_e2m1(0.75 * (groups * power_of_two(-e))) * power_of_two(e)).to(torch.bfloat16).view(x.shape)


class QuartetProduct(torch.autograd.Function):
    """y = x w^T with Quartet's operands (arXiv 2505.14669 v4, Algorithm 1)"""

    @staticmethod
    def forward(ctx, x, w, h):
        (xq, x_mask), (wq, w_mask) = quest(x, h), quest(w, h)
        ctx.save_for_backward(xq, x_mask, wq, w_mask, h)
        return xq @ wq.T

    @staticmethod
    def backward(ctx, dy):
        xq, x_mask, wq, w_mask, h = ctx.saved_tensors
        dxq = absmax(dy, h) @ absmax(wq.T.contiguous(), h).T
        dyt = dy.T.contiguous()
        dwq = absmax(dyt, h) @ absmax(xq.T.contiguous(), h).T
        dx = rotate(torch.where(x_mask, dxq, 0.0), h) * (16 / 9)
        dw = rotate(torch.where(w_mask, dwq, 0.0), h) * (16 / 9)
        return dx.to(torch.bfloat16), dw.to(torch.bfloat16), None


class QLinear(nn.Module):
    """A linear layer; what it computes is the recipe's business."""

    def __init__(self, rows, cols, recipe):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols))
        self.recipe = recipe
        if recipe == "quartet":
            self.register_buffer("h", hadamard_matrix("cpu"), persistent=False)

    def forward(self, x):
        w = self.weight.to(torch.bfloat16)
        if self.recipe == "bf16":
            return F.linear(x, w)
        y = QuartetProduct.apply(x.reshape(-1, x.shape[-1]), w, self.h)
        return y.view(*x.shape[:-1], y.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# the model. Parameters are registered in the order in which they lie in a checkpoint; q, k, v and gate, up lie one
# behind the other there, so that each is one matrix here.

class RMSNorm(nn.Module):
    def __init__(self, channels, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * rstd * self.weight.to(torch.bfloat16).float()).to(torch.bfloat16)


def rope(x, cos, sin):
    """x (B, T, heads, HS): pairs (j, j + HS/2)"""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(torch.bfloat16)


class Block(nn.Module):
    def __init__(self, c, recipe):
        super().__init__()
        self.heads, self.kv, self.size = c["heads"], c["kv_heads"], c["head_size"]
        C, A, F_ = c["channels"], self.heads * self.size, c["ffn"]
        self.norm1 = RMSNorm(C, c["eps"])
        self.qkv = QLinear(A + 2 * self.kv * self.size, C, recipe)
        self.o = QLinear(C, A, recipe)
        self.norm2 = RMSNorm(C, c["eps"])
        self.gate_up = QLinear(2 * F_, C, recipe)
        self.down = QLinear(C, F_, recipe)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, self.heads + 2 * self.kv, self.size)
        q, k, v = qkv.split([self.heads, self.kv, self.kv], dim=2)
        q, k, v = (y.transpose(1, 2) for y in (rope(q, cos, sin), rope(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != self.heads)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, self.heads * self.size))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down((F.silu(gate.float()) * up.float()).to(torch.bfloat16))


class Llama(nn.Module):
    def __init__(self, c, recipe, T):
        super().__init__()
        self.embed = nn.Parameter(torch.empty(c["vocab"], c["channels"]))
        self.blocks = nn.ModuleList(Block(c, recipe) for _ in range(c["layers"]))
        self.norm = RMSNorm(c["channels"], c["eps"])
        self.head = None if c["tied"] else nn.Parameter(torch.empty(c["vocab"], c["channels"]))
        angle = torch.arange(T, dtype=torch.float64)[:, None] * c["frequencies"]
        self.register_buffer("cos", angle.cos().float()[:, None, :], persistent=False)    # (T, 1, HS/2)
        self.register_buffer("sin", angle.sin().float()[:, None, :], persistent=False)

    def forward(self, tokens):
        """tokens (B, T+1) -> sum of the losses of T targets a row"""
        x = F.embedding(tokens[:, :-1], self.embed).to(torch.bfloat16)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        head = self.embed if self.head is None else self.head
        logits = F.linear(self.norm(x), head.to(torch.bfloat16))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    def in_checkpoint_order(self):
        params = [self.embed]
        for b in self.blocks:
            params += [b.norm1.weight, b.qkv.weight, b.o.weight, b.norm2.weight, b.gate_up.weight, b.down.weight]
        return params + [self.norm.weight] + ([] if self.head is None else [self.head])


def frequencies(theta, size, scaling):
    f = theta ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    if not scaling or scaling.get("rope_type", "default") == "default":
        return f
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    blend = torch.clamp((turns - low) / (high - low), 0, 1)
    return (1 - blend) * f / scaling["factor"] + blend * f


def read_config(folder):
    with open(os.path.join(folder, "config.json")) as file:
        c = json.load(file)
    return {"layers": c["num_hidden_layers"], "channels": c["hidden_size"], "heads": c["num_attention_heads"],
            "kv_heads": c["num_key_value_heads"], "head_size": c["head_dim"], "ffn": c["intermediate_size"],
            "vocab": c["vocab_size"], "eps": c["rms_norm_eps"], "tied": c["tie_word_embeddings"],
            "frequencies": frequencies(c["rope_theta"], c["head_dim"], c["rope_scaling"])}


def read_master(folder):
    """the f32 master weights of a checkpoint, flat"""
    path = os.path.join(folder, "optim-00000-of-00001.safetensors")
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))["master"]
    assert entry["dtype"] == "F32", f"{path}: master is {entry['dtype']}"
    return torch.from_numpy(np.fromfile(path, "<f4", entry["shape"][0], offset=8 + length + entry["data_offsets"][0]))


def load_weights(model, folder):
    master, at = read_master(folder), 0
    with torch.no_grad():
        for p in model.in_checkpoint_order():
            p.copy_(master[at:at + p.numel()].view_as(p))
            at += p.numel()
    assert at == len(master), f"'{folder}' holds {len(master)} weights, the model of its config.json has {at}"


# ---------------------------------------------------------------------------------------------------------------------
# training

def learning_rate(step, o):
    """of step 0, 1, ...: linear warm-up, then a cosine to a tenth, which the last step reaches"""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    span = o.steps - 1 - o.warmup_steps
    done = min(step - o.warmup_steps, span) / span if span > 0 else 1.0
    return 0.1 * o.lr + 0.45 * o.lr * (1 + math.cos(math.pi * done))


def make_optimizer(model, o):
    blocks = [p for p in model.blocks.parameters() if p.dim() == 2]
    ids = {id(p) for p in blocks}
    groups = [{"params": blocks, "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.95), eps=1e-8, fused=o.device == "cuda")


def validate(model, o):
    shards, B = Shards(o.val, "val", o.seq_len), o.micro_batch
    rows = min(o.val_batches * B, max(B, shards.samples // B * B))
    tokens, total = shards.read(shards.spaced(rows)), 0.0
    with torch.no_grad():
        for row in range(0, rows, B):
            total += model(tokens[row:row + B].to(o.device)).item()
    return total / (rows * o.seq_len)


def train(o):
    model = Llama(read_config(o.init), o.recipe, o.seq_len)
    load_weights(model, o.init)
    model.to(o.device)
    optimizer = make_optimizer(model, o)
    shards = Shards(o.train, "train", o.seq_len)
    rows = o.batch_tokens // o.seq_len
    assert rows * o.seq_len == o.batch_tokens, "--batch-tokens is not a multiple of --seq-len"
    assert rows % o.micro_batch == 0, f"--micro-batch does not divide the {rows} rows of a step"
    compiled = torch.compile(model) if o.device == "cuda" and not o.no_compile else model
    count = sum(p.numel() for p in model.parameters())
    print(f"torch {torch.__version__}, {o.device}, {o.recipe}, {count} parameters, {shards.samples} samples of "
          f"{o.seq_len}, {rows} rows a step in micro-batches of {o.micro_batch}", flush=True)
    with open(o.out, "w") as out:
        def record(kind, **fields):
            out.write(json.dumps({"type": kind, **fields}) + "\n")
            out.flush()

        record("run", program="torch_train.py", torch=torch.__version__, options=vars(o))
        for step in range(o.steps):
            begin = time.perf_counter()
            tokens = shards.read(shards.visits(o.seed, step * rows, rows)).to(o.device)
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), dtype=torch.float64, device=o.device)
            for micro in tokens.split(o.micro_batch):
                loss = compiled(micro)
                (loss / o.batch_tokens).backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            lr = learning_rate(step, o)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            loss, norm = total.item() / o.batch_tokens, norm.item()    # waits for the device
            seconds = time.perf_counter() - begin
            record("step", step=step + 1, loss=loss, grad_norm=norm, lr=lr, dt_ms=1e3 * seconds,
                   tok_s=o.batch_tokens / seconds)
            if step < 3 or (step + 1) % 10 == 0 or step + 1 == o.steps:
                print(f"step {step + 1:6}/{o.steps} | loss {loss:7.4f} | norm {norm:7.3f} | lr {lr:.2e} | "
                      f"{1e3 * seconds:8.1f} ms | {o.batch_tokens / seconds:9.0f} tok/s", flush=True)
        if o.val:
            loss = validate(compiled, o)
            record("val", step=o.steps, loss=loss)
            print(f"validation: step {o.steps}, loss {loss:.4f} nats/token", flush=True)
        if o.device == "cuda":
            print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# comparing

def read_losses(path):
    """step -> loss of the training steps, and of the validations"""
    found = {"step": {}, "val": {}}
    with open(path) as file:
        for line in file:
            r = json.loads(line)
            if r["type"] in found:
                found[r["type"]][r["step"]] = r["loss"]
    return found["step"], found["val"]


def compare(ours_path, torch_path):
    (ours, ours_val), (theirs, theirs_val) = read_losses(ours_path), read_losses(torch_path)
    steps = sorted(set(ours) & set(theirs))
    assert steps, f"{ours_path} and {torch_path} have no step in common"
    last = len(steps)
    rows = [1] + sorted({max(1, last * i // 10) for i in range(1, 11)} - {1})
    print("losses in nats a token, mean of the (up to) 10 steps before and at the step\n"
          "  step      ours     torch   ours - torch")
    for row in rows:
        window = steps[max(0, row - 10):row]
        a, b = (sum(run[s] for s in window) / len(window) for run in (ours, theirs))
        print(f"{steps[row - 1]:6} {a:9.4f} {b:9.4f}   {a - b:+.5f}")
    gaps = [ours[s] - theirs[s] for s in steps]
    print(f"single steps: largest difference {max(map(abs, gaps)):.5f}, mean {sum(gaps) / last:+.5f}")
    for step in sorted(set(ours_val) & set(theirs_val))[-1:]:
        a, b = ours_val[step], theirs_val[step]
        print(f"validation, step {step}: ours {a:.5f}, torch {b:.5f}, difference {a - b:+.5f}")


def parse_options():
    parser = argparse.ArgumentParser(description="train_llama's training run in PyTorch, to compare loss curves.")
    parser.add_argument("--init", metavar="DIR", help="checkpoint folder of train_llama: shape and initial weights")
    parser.add_argument("--train", metavar="FILES", help="token shards: folder, 'glob' or comma-separated list")
    parser.add_argument("--val", metavar="FILES", default="", help="validation shards")
    parser.add_argument("--val-batches", type=int, default=20, help="micro-batches of the validation (default 20)")
    parser.add_argument("--recipe", choices=["bf16", "quartet"], default="bf16")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--micro-batch", type=int, help="rows; what train_llama calls --batch-size")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--warmup-steps", type=int, help="default: a tenth of the steps")
    parser.add_argument("--seed", type=int, default=1337, help="of the order of the samples (default 1337)")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON lines of this run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="do not torch.compile (it is used on cuda only)")
    parser.add_argument("--compare", metavar="METRICS", help="metrics.jsonl of train_llama: print both runs' losses")
    o = parser.parse_args()
    if o.init:
        for name in ("train", "steps", "batch_tokens", "micro_batch", "seq_len", "lr"):
            if getattr(o, name) is None:
                parser.error(f"--{name.replace('_', '-')} is missing")
        o.warmup_steps = o.steps // 10 if o.warmup_steps is None else o.warmup_steps
    elif not o.compare:
        parser.error("--init DIR trains, --compare METRICS compares; give one or both")
    return o


def main():
    o = parse_options()
    if o.init:
        train(o)
    if o.compare:
        compare(o.compare, o.out)


if __name__ == "__main__":
    main()
