"""Independent PyTorch reference of the Llama model and of ten AdamW steps -> golden/llama.safetensors.

Plain float32 on the CPU, written from the equations below without a look at llmc/. The script asserts that the updates
equal those of torch.optim.AdamW and, where `transformers` is installed, logits and gradients its LlamaForCausalLM's.

  rmsnorm(x)  = x / sqrt(mean(x^2) + eps) * weight
  rope        half-split (HF): pair (j, j + HS/2), angle = t * f_j, f_j = theta^(-2j/HS)
              Llama-3 scaling: wavelength w = 2 pi / f. w > orig/low: f/factor. w < orig/high: f. Between them
              (1 - s) f/factor + s f with s = (orig/w - low) / (high - low)
  attention   head h of NH reads key-value head h // (NH/NKV); softmax(q.k / sqrt(HS)) over the past and itself
  block       x += o(attention(rope q, rope k, v)) of rmsnorm(x);  x += down(silu(gate) * up) of rmsnorm(x)
  loss        mean cross-entropy of the next token over B*T

  step s = 0..9: loss, gradient, n = global norm; gradient *= min(1, 1/n)
              m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr (mhat / (sqrt(vhat) + eps) + wd w), bias-corrected,
              wd 0.1 on the 2-D weights of the blocks only (not embedding, lm_head, norms)
              lr = peak (s+1)/3 for s < 3, then min + (1 + cos(pi (s-3)/7))/2 (peak - min), min = peak/10

Two runs from the same weights and tokens: peak 1e-2, and "gentle", peak 3e-3. The first is chaotic: the same code in
f64 drifts 2e-4 from it in loss, so it cannot tell beta2 .95 from .951. The gentle one drifts 2e-6 and can.

Regenerate (about 10 s):   python dev/ref/llama_ref.py        Tensors: dev/ref/README.md
"""
import math
import os

import numpy as np
import torch
from safetensors.torch import save_file

try:
    import transformers
except ImportError:
    transformers = None

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "llama.safetensors")
BASE = dict(V=64, C=64, L=2, NH=4, NKV=2, HS=16, F=96, T=32, B=2, theta=10000., eps=1e-5, tied=False, scaling=None)
ROPE = dict(BASE, B=1, theta=500000., tied=True, scaling=dict(factor=8., low=1., high=4., orig=16))
STEPS, WARMUP = 10, 3
BETA1, BETA2, EPS, DECAY, CLIP = .9, .95, 1e-8, .1, 1.

# ---- model ----

def param_shapes(c):
    shapes = {"model.embed_tokens.weight": (c["V"], c["C"])}
    for l in range(c["L"]):
        p = f"model.layers.{l}."
        shapes[p + "input_layernorm.weight"] = (c["C"],)
        shapes[p + "self_attn.q_proj.weight"] = (c["NH"] * c["HS"], c["C"])
        shapes[p + "self_attn.k_proj.weight"] = (c["NKV"] * c["HS"], c["C"])
        shapes[p + "self_attn.v_proj.weight"] = (c["NKV"] * c["HS"], c["C"])
        shapes[p + "self_attn.o_proj.weight"] = (c["C"], c["NH"] * c["HS"])
        shapes[p + "post_attention_layernorm.weight"] = (c["C"],)
        shapes[p + "mlp.gate_proj.weight"] = (c["F"], c["C"])
        shapes[p + "mlp.up_proj.weight"] = (c["F"], c["C"])
        shapes[p + "mlp.down_proj.weight"] = (c["C"], c["F"])
    shapes["model.norm.weight"] = (c["C"],)
    if not c["tied"]:
        shapes["lm_head.weight"] = (c["V"], c["C"])
    return shapes

def init_params(c, seed):
    """N(0, 0.02); norm weights 1 + 0.1 N(0, 1), so that a forgotten or exchanged norm weight shows"""
    rs = np.random.RandomState(seed)
    params = {}
    for name, shape in param_shapes(c).items():
        n = rs.standard_normal(shape)
        params[name] = torch.tensor(1 + .1 * n if len(shape) == 1 else .02 * n, dtype=torch.float32)
    return params

def rmsnorm(x, weight, eps):
    return x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps) * weight

def rope_frequencies(HS, theta, scaling):
    f = theta ** (-2 * torch.arange(HS // 2, dtype=torch.float64) / HS)
    if scaling is None:
        return f
    wavelength = 2 * math.pi / f
    s = (scaling["orig"] / wavelength - scaling["low"]) / (scaling["high"] - scaling["low"])
    between = (1 - s) * f / scaling["factor"] + s * f
    f = torch.where(wavelength > scaling["orig"] / scaling["low"], f / scaling["factor"],
                    torch.where(wavelength < scaling["orig"] / scaling["high"], f, between))
    return f

def rope(x, f):
    """x (B, heads, T, HS)"""
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * f    # (T, HS/2)
    cos, sin = torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

def attention(q, k, v, c, f):
    """q (B, T, NH*HS), k v (B, T, NKV*HS) -> (B, T, NH*HS)"""
    B, T = q.shape[:2]
    q = rope(q.view(B, T, c["NH"], c["HS"]).transpose(1, 2), f)
    k = rope(k.view(B, T, c["NKV"], c["HS"]).transpose(1, 2), f)
    v = v.view(B, T, c["NKV"], c["HS"]).transpose(1, 2)
    k, v = (a.repeat_interleave(c["NH"] // c["NKV"], dim=1) for a in (k, v))
    score = q @ k.transpose(2, 3) / math.sqrt(c["HS"])
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    att = torch.softmax(score.masked_fill(future, -math.inf), dim=-1)
    return (att @ v).transpose(1, 2).reshape(B, T, c["NH"] * c["HS"])

def forward(w, tokens, c):
    """tokens (B, T) -> logits (B, T, V)"""
    f = rope_frequencies(c["HS"], c["theta"], c["scaling"])
    x = w["model.embed_tokens.weight"][tokens]
    for l in range(c["L"]):
        p = f"model.layers.{l}."
        h = rmsnorm(x, w[p + "input_layernorm.weight"], c["eps"])
        q, k, v = (h @ w[p + f"self_attn.{n}_proj.weight"].T for n in "qkv")
        x = x + attention(q, k, v, c, f) @ w[p + "self_attn.o_proj.weight"].T
        h = rmsnorm(x, w[p + "post_attention_layernorm.weight"], c["eps"])
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    x = rmsnorm(x, w["model.norm.weight"], c["eps"])
    return x @ w["model.embed_tokens.weight" if c["tied"] else "lm_head.weight"].T

def loss_of(logits, targets):
    logp = torch.log_softmax(logits, dim=-1)
    return -logp.gather(-1, targets[..., None]).mean()

# ---- training ----

def lr_at(s, peak):
    if s < WARMUP:
        return peak * (s + 1) / WARMUP
    lowest = .1 * peak
    return lowest + .5 * (1 + math.cos(math.pi * (s - WARMUP) / (STEPS - WARMUP))) * (peak - lowest)

def decays(name):
    return ".layers." in name and "norm" not in name

def train(init, tokens, c, peak, dtype=torch.float32, torch_adamw=False):
    """-> losses, norms, first gradients, final weights"""
    w = {k: p.to(dtype, copy=True).requires_grad_() for k, p in init.items()}
    m, v = ({k: torch.zeros_like(p) for k, p in w.items()} for _ in "mv")
    adamw = torch.optim.AdamW([dict(params=[p], weight_decay=DECAY if decays(k) else 0.) for k, p in w.items()],
                              lr=peak, betas=(BETA1, BETA2), eps=EPS)
    losses, norms, first = [], [], None
    for s in range(STEPS):
        for p in w.values():
            p.grad = None
        loss = loss_of(forward(w, tokens[s, :, :-1], c), tokens[s, :, 1:])
        loss.backward()
        norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in w.values()))
        losses.append(loss.item())
        norms.append(norm)
        first = first or {k: p.grad.clone() for k, p in w.items()}
        lr, scale = lr_at(s, peak), min(1., CLIP / norm)
        with torch.no_grad():
            for p in w.values():
                p.grad.mul_(scale)
            if torch_adamw:
                for group in adamw.param_groups:
                    group["lr"] = lr
                adamw.step()
                continue
            for k, p in w.items():
                m[k] = BETA1 * m[k] + (1 - BETA1) * p.grad
                v[k] = BETA2 * v[k] + (1 - BETA2) * p.grad * p.grad
                mhat, vhat = m[k] / (1 - BETA1 ** (s + 1)), v[k] / (1 - BETA2 ** (s + 1))
                p -= lr * (mhat / (torch.sqrt(vhat) + EPS) + (DECAY if decays(k) else 0.) * p)
    return losses, norms, first, {k: p.detach() for k, p in w.items()}

def make_tokens(c, shape, seed):
    """a chain that can be learnt: next = 5 * token + (7 .. 9) mod V"""
    rs = np.random.RandomState(seed)
    tokens = np.zeros(shape, dtype=np.int64)
    tokens[..., 0] = rs.randint(0, c["V"], shape[:-1])
    for t in range(1, shape[-1]):
        tokens[..., t] = (5 * tokens[..., t - 1] + 7 + rs.randint(0, 3, shape[:-1])) % c["V"]
    return torch.tensor(tokens)

# ---- against transformers ----

def hf_config(c):
    rope_parameters = dict(rope_type="default", rope_theta=c["theta"])
    if c["scaling"]:
        s = c["scaling"]
        rope_parameters.update(rope_type="llama3", factor=s["factor"], low_freq_factor=s["low"],
                               high_freq_factor=s["high"], original_max_position_embeddings=s["orig"])
    common = dict(vocab_size=c["V"], hidden_size=c["C"], intermediate_size=c["F"], num_hidden_layers=c["L"],
                  num_attention_heads=c["NH"], num_key_value_heads=c["NKV"], head_dim=c["HS"], rms_norm_eps=c["eps"],
                  max_position_embeddings=128, tie_word_embeddings=c["tied"], attn_implementation="eager")
    if int(transformers.__version__.split(".")[0]) >= 5:
        config = transformers.LlamaConfig(rope_parameters=rope_parameters, **common)
    else:
        scaling = rope_parameters if c["scaling"] else None
        config = transformers.LlamaConfig(rope_theta=c["theta"], rope_scaling=scaling, **common)
    return config

def hf_model(params, c):
    config = hf_config(c)
    model = transformers.LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(params, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if c["tied"] else set()), (missing, unexpected)
    return model

def check_hf(name, params, tokens, c):
    """tokens (B, T+1): logits within 1e-5, gradients within 1e-5 of the tensor's largest"""
    if transformers is None:
        print(f"{name}: transformers is not installed: skip")
        return
    model = hf_model(params, c)
    theirs = model(tokens[:, :-1]).logits
    w = {k: p.clone().requires_grad_() for k, p in params.items()}
    ours = forward(w, tokens[:, :-1], c)
    d_logits = (ours - theirs).abs().max().item()
    loss_of(ours, tokens[:, 1:]).backward()
    loss_of(theirs, tokens[:, 1:]).backward()
    theirs = dict(model.named_parameters())
    d_grad = max(((p.grad - theirs[k].grad).abs().max() / theirs[k].grad.abs().max()).item() for k, p in w.items())
    print(f"{name}: against transformers {transformers.__version__}: logits {d_logits:.1e} "
          f"(largest {ours.abs().max():.3f}), gradients {d_grad:.1e} relative")
    assert d_logits < 1e-5 and d_grad < 1e-5

def check_hf_frequencies(name, ours, c):
    if transformers is not None:
        theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config(c)).inv_freq
        d = ((ours - theirs) / theirs).abs().max().item()
        print(f"{name}: rope frequencies against transformers: {d:.1e} relative")
        assert d < 1e-6

def config_tensors(prefix, c):
    """one (1)-element tensor a number"""
    i32 = dict(vocab_size=c["V"], hidden_size=c["C"], num_hidden_layers=c["L"], num_attention_heads=c["NH"],
               num_key_value_heads=c["NKV"], head_dim=c["HS"], intermediate_size=c["F"], T=c["T"], B=c["B"],
               tie_word_embeddings=int(c["tied"]))
    flt = dict(rope_theta=c["theta"], rms_norm_eps=c["eps"])
    if c["scaling"]:
        s = c["scaling"]
        flt.update(factor=s["factor"], low_freq_factor=s["low"], high_freq_factor=s["high"])
        i32.update(original_max_position_embeddings=s["orig"])
    out = {f"{prefix}config.{k}": torch.tensor([v], dtype=torch.int32) for k, v in i32.items()}
    out.update({f"{prefix}config.{k}": torch.tensor([v], dtype=torch.float32) for k, v in flt.items()})
    return out

def golden_training(out, prefix, peak, max_drift, init, tokens):
    """-> gradients of step 0"""
    losses, norms, grads, final = train(init, tokens, BASE, peak)
    lrs = [lr_at(s, peak) for s in range(STEPS)]
    for s in range(STEPS):
        clipped = "  clipped" if norms[s] > CLIP else ""
        print(f"{prefix}step {s}  lr {lrs[s]:.6f}  loss {losses[s]:.6f}  norm {norms[s]:.6f}{clipped}")
    # how far another order of the same f32 operations may drift: a float64 run says
    losses64, norms64, _, final64 = train(init, tokens, BASE, peak, dtype=torch.float64)
    d_loss = max(abs(a - b) for a, b in zip(losses, losses64))
    d_norm = max(abs(a - b) / b for a, b in zip(norms, norms64))
    d_final = max(abs(final[k].norm().item() / final64[k].norm().item() - 1) for k in final)
    print(f"f32 against f64: loss {d_loss:.1e}, grad_norm {d_norm:.1e} relative, final_norm {d_final:.1e} relative")
    assert d_loss < max_drift and d_norm < max_drift and d_final < max_drift
    losses_t, _, _, final_t = train(init, tokens, BASE, peak, torch_adamw=True)
    d_weight = max((final[k] - final_t[k]).abs().max().item() for k in final)
    d_loss = max(abs(a - b) for a, b in zip(losses, losses_t))
    print(f"against torch.optim.AdamW: losses {d_loss:.1e}, weights {d_weight:.1e}")
    assert d_weight < max_drift
    out.update({f"{prefix}final_norm.{k}": p.norm().reshape(1) for k, p in final.items()})
    for name, a in (("losses", losses), ("grad_norms", norms), ("lrs", lrs)):
        out[prefix + name] = torch.tensor(a, dtype=torch.float32)
    return grads

def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out = config_tensors("", BASE)

    init = init_params(BASE, seed=1)
    tokens = make_tokens(BASE, (STEPS, BASE["B"], BASE["T"] + 1), seed=2)
    check_hf("base", init, tokens[0], BASE)
    for prefix, peak, max_drift in (("", 1e-2, 1e-3), ("gentle.", 3e-3, 1e-5)):
        grads = golden_training(out, prefix, peak, max_drift, init, tokens)
    out.update({f"init.{k}": p for k, p in init.items()})
    out.update({f"grad.{k}": g for k, g in grads.items()})    # of step 0, so the same in both runs
    out["tokens"] = tokens.int()

    params = init_params(ROPE, seed=3)
    for k in params:    # sharp attention, so that an error in an angle shows in the logits
        if "q_proj" in k or "k_proj" in k:
            params[k] *= 10
    tokens = make_tokens(ROPE, (1, ROPE["T"] + 1), seed=4)
    check_hf("rope", params, tokens, ROPE)
    with torch.no_grad():
        out["rope.logits"] = forward(params, tokens[:, :-1], ROPE)
        plain = forward(params, tokens[:, :-1], dict(ROPE, scaling=None))
    print(f"rope: without the scaling the logits would differ by {(plain - out['rope.logits']).abs().max():.1e}")
    out["rope.tokens"] = tokens[:, :-1].int()
    out["rope.inv_freq"] = rope_frequencies(ROPE["HS"], ROPE["theta"], ROPE["scaling"]).float()
    # published configurations, whose wavelengths meet all three branches of the scaling
    for name, HS, factor in (("llama3.1-8b", 128, 8.), ("llama3.2-1b", 64, 32.)):
        scaling = dict(factor=factor, low=1., high=4., orig=8192)
        out[f"rope.inv_freq.{name}"] = rope_frequencies(HS, 500000., scaling).float()
        check_hf_frequencies(name, out[f"rope.inv_freq.{name}"], dict(ROPE, HS=HS, scaling=scaling))
    out.update(config_tensors("rope.", ROPE))
    out.update({f"rope.{k}": p for k, p in params.items()})

    os.makedirs(os.path.dirname(GOLDEN), exist_ok=True)
    save_file({k: a.contiguous() for k, a in out.items()}, GOLDEN)
    for k in sorted(out):
        print(f"{k:58s} {str(out[k].dtype):14s} {tuple(out[k].shape)}")
    size = os.path.getsize(GOLDEN)
    print(f"wrote {GOLDEN}, {size} bytes")
    assert size < 900 * 1000

if __name__ == "__main__":
    main()
