"""Does a checkpoint of train_llama mean the same to transformers?   python dev/ref/hf_check.py CHECKPOINT_FOLDER

Loads CHECKPOINT_FOLDER (config.json, model.safetensors) with LlamaForCausalLM in float32 and compares with
CHECKPOINT_FOLDER/logits.safetensors, which the test program wrote: `tokens` I32 (B, T), `logits` F32 (B, T, V).
The measure is max|a - b| / max|b|, b = transformers'. Exit 0: at most 1e-4. Exit 1: more, not finite, another shape, or
a weight missing or superfluous in the file. Where the folder has a tokenizer.json, also prints what AutoTokenizer makes
of the first tokens. Nothing to regenerate.
"""
import os
import sys

import torch
import transformers
from safetensors.torch import load_file

TOLERANCE = 1e-4

def load_model(folder):
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **{name: torch.float32})
    c = model.config
    print(f"loaded {folder}: {c.num_hidden_layers} layers, hidden {c.hidden_size}, heads {c.num_attention_heads}/"
          f"{c.num_key_value_heads} of {c.head_dim}, vocab {c.vocab_size}, tied {c.tie_word_embeddings}, "
          f"eps {c.rms_norm_eps}, rope {getattr(c, 'rope_parameters', None) or (c.rope_theta, c.rope_scaling)}")
    wrong = {k: sorted(v) for k, v in info.items() if k in ("missing_keys", "unexpected_keys", "mismatched_keys") and v}
    if wrong:
        print(f"FAIL: the file and the model do not have the same weights: {wrong}")
        sys.exit(1)
    return model.eval()

def check_logits(folder, model):
    saved = load_file(os.path.join(folder, "logits.safetensors"))
    tokens, ours = saved["tokens"].long(), saved["logits"].float()
    with torch.no_grad():
        theirs = model(tokens).logits
    if ours.shape != theirs.shape:
        print(f"FAIL: logits are {tuple(ours.shape)}, transformers gives {tuple(theirs.shape)}")
        sys.exit(1)
    difference = (ours - theirs).abs()
    absolute, relative = difference.max().item(), (difference.max() / theirs.abs().max()).item()
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    b, t, v = where
    print(f"logits {tuple(ours.shape)}: max abs difference {absolute:.3e} at (b {b}, t {t}, v {v}): "
          f"{ours[b, t, v]:.6f} against {theirs[b, t, v]:.6f}; relative to the largest {relative:.3e}")
    if not relative <= TOLERANCE:    # a NaN fails too
        print(f"FAIL: more than {TOLERANCE:.0e}")
        sys.exit(1)
    return tokens

def show_tokenizer(folder, tokens):
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        print("no tokenizer.json: skip")
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in tokens[:4]:
        print(f"decoded: {tokenizer.decode(row[:64].tolist())!r}")

def main():
    if len(sys.argv) != 2:
        print(__doc__)
        sys.exit(2)
    folder = sys.argv[1]
    model = load_model(folder)
    tokens = check_logits(folder, model)
    show_tokenizer(folder, tokens)
    print(f"ok: equal to transformers {transformers.__version__} within {TOLERANCE:.0e}")

if __name__ == "__main__":
    main()
