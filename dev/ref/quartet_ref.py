"""Independent NumPy reference of Quartet's MXFP4 numerics -> golden/quartet.safetensors.

Written from the paper (arXiv 2505.14669 v4, Algorithm 1) and the rules below, without a look at llmc/. The C oracle and
the kernels must reproduce codes, scales and masks bit for bit, so every f32 operation here is rounded once: no FMA, no
float64 detour. NumPy float32 arrays do exactly that (IEEE, denormals kept).

MXFP4: 32 consecutive elements share one scale byte e + 127 (2^e). A code is signbit << 3 | index into
(0 .5 1 1.5 2 3 4 6); the sign bit of a zero is kept. Even column in the low nibble.

  H x        32-point Sylvester Hadamard: butterflies a+b, a-b at distance 1 2 4 8 16, then all values * f32(1/sqrt 32)
  R x        = H (s * x), s = +-1: the signs multiply FIRST. Bit j of the block's sign word set = element j is negated
  tree(x)    adjacent pairs, then pairs of those, ..., 5 levels
  RTN        nearest of the 15 values, ties to the even index, saturating at 6
  quest(x)   xh = H x; mean = tree(xh) * 1/32; var = max(tree(xh*xh) * 1/32 - mean*mean, 0); std = sqrt(var)
             v = std * f32(2.92247856/6) + f32(1e-8); e = floor(log2 v)
             q = RTN(xh * 2^-e); mask = |xh * 2^-e| < 6.   v not finite: scale 255, codes 0, mask 0
             (max keeps a NaN: var = inf - inf is a NaN and gives scale 255. C's fmaxf would turn it into 0.)
  absmax(x)  m = max|x|; e = max(floor(log2 m) - 2, -127) (-127 where m = 0); t = f32(0.75 * f32(x * 2^-e)); q = RTN(t)
             or stochastic, with a 16-bit integer r per element: a = |t|, step = .5 | 1 | 2 for a < 2 | < 4 | else,
             k = floor(f32(a/step + (r + .5) * 2^-16)), |q| = min(k * step, 6).   m not finite: scale 255, codes 0
             The caller owes 4/3 an operand, so 16/9 a product.

Regenerate (about 5 s):   python dev/ref/quartet_ref.py        Tensors: dev/ref/README.md
"""
import json
import os
import struct
import sys
import zlib
from fractions import Fraction

import numpy as np

f32 = np.float32
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6], dtype=f32)
INV_SQRT32 = f32(0.17677669529663687)
QUEST_FACTOR = f32(2.92247856 / 6)   # quotient in double, then rounded
GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "quartet.safetensors")

# ---- the pinned arithmetic; x is always (..., 32) f32 ----

def hadamard(x):
    assert x.dtype == f32 and x.shape[-1] == 32
    y = x
    for h in (1, 2, 4, 8, 16):
        y = y.reshape(*x.shape[:-1], 16 // h, 2, h)   # [..., 0, j] and [..., 1, j] are h apart
        a, b = y[..., 0, :], y[..., 1, :]
        y = np.stack([a + b, a - b], axis=-2)
    return y.reshape(x.shape) * INV_SQRT32

def rotate(x, negative):
    """negative (..., 32) bool, True = minus"""
    return hadamard(np.where(negative, -x, x))

def tree(x):
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]

def floor_log2(v):
    """exact, denormals included: frexp gives v = m * 2^k with m in [.5, 1)"""
    return np.frexp(v)[1] - 1

def pow2(e):
    return np.ldexp(f32(1), e).astype(f32)   # exact for every e used here (-125 .. 127)

def rtn_index(a):
    """index of the nearest E2M1 magnitude; on a tie the even index, hence > or >= in turn"""
    assert a.dtype == f32
    return ((a > .25).astype(np.uint8) + (a >= .75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5.))

def sr_index(a, r):
    step = np.where(a < 2, f32(.5), np.where(a < 4, f32(1), f32(2)))
    k = np.floor(a / step + (r.astype(f32) + f32(.5)) * f32(2.**-16))   # one rounded sum, the rest is exact
    value = np.minimum(k * step, f32(6))
    index = np.searchsorted(E2M1, value)
    assert np.array_equal(E2M1[index], value)
    return index.astype(np.uint8)

def make_codes(t, index, bad):
    code = np.signbit(t).astype(np.uint8) << 3 | index.astype(np.uint8)
    return np.where(bad[..., None], np.uint8(0), code)

def quest(x):
    """x (..., 32) -> codes (..., 32) U8, scale bytes (...) U8, mask (..., 32) bool"""
    with np.errstate(all="ignore"):
        xh = hadamard(x)
        mean = tree(xh) * f32(1 / 32)
        var = np.maximum(tree(xh * xh) * f32(1 / 32) - mean * mean, f32(0))
        v = np.sqrt(var) * QUEST_FACTOR + f32(1e-8)
        assert xh.dtype == mean.dtype == var.dtype == v.dtype == f32
        bad = ~np.isfinite(v)
        e = np.where(bad, 0, floor_log2(np.where(bad, f32(1), v)))
        t = xh * pow2(-e)[..., None]
        mask = (np.abs(t) < 6) & ~bad[..., None]
        codes = make_codes(t, rtn_index(np.abs(t)), bad)
    return codes, np.where(bad, 255, e + 127).astype(np.uint8), mask

def absmax(x, r=None):
    """x (..., 32), r (..., 32) 16-bit integers for stochastic rounding -> codes (..., 32) U8, scale bytes (...) U8"""
    with np.errstate(all="ignore"):
        m = np.max(np.abs(x), axis=-1)    # keeps a NaN
        bad, zero = ~np.isfinite(m), m == 0
        e = np.maximum(floor_log2(np.where(bad | zero, f32(1), m)) - 2, -127)
        e = np.where(zero, -127, e)
        t = f32(.75) * (x * pow2(-e)[..., None])
        assert t.dtype == f32
        t = np.where(bad[..., None], f32(0), t)
        index = rtn_index(np.abs(t)) if r is None else sr_index(np.abs(t), r)
    return make_codes(t, index, bad), np.where(bad, 255, e + 127).astype(np.uint8)

# ---- matrices: groups of 32 along the columns of a row-major (rows, cols) ----

def groups(x):
    return np.ascontiguousarray(x).reshape(x.shape[0], -1, 32)

def pack(codes):
    """(..., 32) codes -> (..., 16) bytes, even column in the low nibble"""
    return codes[..., 0::2] | codes[..., 1::2] << 4

def mask_words(mask):
    """(..., 32) bool -> (...) u32, bit j = element j"""
    return np.sum(mask.astype(np.uint64) << np.arange(32, dtype=np.uint64), axis=-1).astype(np.uint32)

def word_bits(words):
    """(n) u32 -> (n, 32) bool"""
    return (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool)

def decode(codes, scales):
    """-> f64 (rows, cols)"""
    sign = np.where(codes & 8, -1., 1.)
    value = sign * E2M1[codes & 7] * np.ldexp(1., scales.astype(int) - 127)[..., None]
    return value.reshape(codes.shape[0], -1)

def hadamard_f64(x):
    """H^T = H along the columns, in f64, by the explicit matrix H[i][j] = (-1)^popcount(i & j) / sqrt(32)"""
    return (groups(x) @ (sylvester() / np.sqrt(32.))).reshape(x.shape)

def sylvester():
    return np.array([[(-1.)**bin(i & j).count("1") for j in range(32)] for i in range(32)])

# ---- the deterministic million ----

def splitmix64(n):
    """outputs for states 1 .. n"""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)

def million():
    """(1024, 1024) f32: nearly normal, integer * 2^-16 * 2^k, k in [-30, 10] per 32 elements; r = top 16 bits"""
    n = 1 << 20
    z = splitmix64(n)
    t = sum((z >> np.uint64(s) & np.uint64(0xFFFF)).astype(np.int64) for s in (0, 16, 32, 48)) - 131070
    k = (np.arange(n) // 32 * 7 % 41) - 30
    x = np.ldexp(t.astype(f32), k - 16).astype(f32)
    assert np.array_equal(x.astype(np.float64), t * 2.**(k - 16))
    return x.reshape(1024, 1024), (z >> np.uint64(48)).astype(np.int64).reshape(1024, 1024)

def row_crc(a):
    """crc32 of each row's bytes"""
    return np.array([zlib.crc32(row.tobytes()) for row in np.ascontiguousarray(a)], dtype=np.int64)

def golden_million(out):
    x, r = million()
    out["million.x_crc"] = row_crc(x.astype("<f4"))    # checks the generator itself
    out["million.r_crc"] = row_crc(r.astype("<u2"))
    plus = np.zeros(32, dtype=bool)
    for name, a in (("quest", x), ("quest_t", x.T)):
        codes, scales, mask = quest(groups(a))
        out[f"million.{name}.mask_crc"] = row_crc(mask_words(mask).astype("<u4"))
        out[f"million.{name}.codes_crc"], out[f"million.{name}.scales_crc"] = row_crc(pack(codes)), row_crc(scales)
    for name, (codes, scales) in {
            "absmax_rtn": absmax(groups(x)),
            "absmax_rtn_h": absmax(rotate(groups(x), plus)),
            "absmax_sr": absmax(groups(x), groups(r)),
            "absmax_rtn_h_t": absmax(rotate(groups(x.T), plus))}.items():
        out[f"million.{name}.codes_crc"], out[f"million.{name}.scales_crc"] = row_crc(pack(codes)), row_crc(scales)

# ---- the intermediate f32 values: the million's codes do not notice another order of the same sums, these bits do ----

def golden_stages(out):
    rs = np.random.RandomState(3)
    x = (rs.standard_normal((64, 32)) * np.exp(2 * rs.standard_normal((64, 32)))).astype(f32)
    xh = hadamard(x)
    s1, s2 = tree(xh), tree(xh * xh)
    mean = s1 * f32(1 / 32)
    var = np.maximum(s2 * f32(1 / 32) - mean * mean, f32(0))
    v = np.sqrt(var) * QUEST_FACTOR + f32(1e-8)
    for name, a in (("x", x), ("h", xh), ("s1", s1), ("s2", s2), ("var", var), ("v", v)):
        assert a.dtype == f32
        out[f"stage.{name}"] = a

# ---- edge cases ----

def one(position, value, rest=0.):
    x = np.full(32, rest, dtype=f32)
    x[position] = value
    return x

def below(v):
    return np.nextafter(f32(v), f32(0))

def neighbours(v, n):
    """v and the n floats on each side"""
    out = [f32(v)]
    for direction in (np.inf, -np.inf):
        u = f32(v)
        for _ in range(n):
            u = np.nextafter(u, f32(direction))
            out.append(u)
    return out

def tie_pair(p, q, t1, t2, e):
    """x with two non-zero values such that every entry of H x is +-t1 * 2^e or +-t2 * 2^e exactly (after rounding)"""
    t1, t2 = f32(t1 * 2.**e), f32(t2 * 2.**e)
    a0 = (np.float64(t1) + np.float64(t2)) / 2 / np.float64(INV_SQRT32)
    b0 = (np.float64(t1) - np.float64(t2)) / 2 / np.float64(INV_SQRT32)
    for a in neighbours(a0, 6):
        for b in neighbours(b0, 12):
            if (a + b) * INV_SQRT32 == t1 and (a - b) * INV_SQRT32 == t2:
                x = one(p, a)
                x[q] = b
                assert set(np.abs(hadamard(x))) == {t1, t2}
                return x
    raise AssertionError(f"no exact tie for {t1} {t2} {e}")

def edges_common(rs):
    n = lambda s: (rs.standard_normal(32) * s).astype(f32)
    alternate = np.where(np.arange(32) % 2, f32(-1), f32(1))
    normal_nan, normal_inf, normal_ninf, both = n(1), n(1), n(1), n(1)
    normal_nan[7], normal_inf[0], normal_ninf[31], both[3], both[4] = np.nan, np.inf, -np.inf, np.nan, np.inf
    zeros_signed = np.where(np.arange(32) % 3 == 0, f32(-0.), f32(0.))
    tiny_mixed = n(1)
    tiny_mixed[1::2] *= f32(1e-42)
    outlier = n(1)
    outlier[11] = 100
    return [
        ("zero", np.zeros(32, f32)), ("minus zero", np.full(32, -0., f32)), ("mixed zeros", zeros_signed),
        ("1e30 at 5", one(5, 1e30)), ("1e30 at 0", one(0, 1e30)),
        ("3e38 at 9", one(9, 3e38)), ("-3e38 at 0", one(0, -3e38)),
        ("all 3e38", np.full(32, 3e38, f32)),
        ("float max among normals", np.where(np.arange(32) == 4, np.finfo(f32).max, n(1))),
        ("1e19 normal", n(1e19)), ("1e20 normal", n(1e20)), ("1e18 normal", n(1e18)),
        ("1e-30 at 0", one(0, 1e-30)), ("-1e-30 at 17", one(17, -1e-30)),
        ("denormals", (rs.randint(-2**22, 2**22, 32) * 2.**-149).astype(f32)),
        ("smallest denormal", one(3, 2.**-149)), ("smallest denormals, signs", alternate * f32(2.**-149)),
        ("around 2^-126", n(2.**-126)), ("around 2^-125", n(2.**-125)), ("around 2^-122", n(2.**-122)),
        ("max 2^-125", one(2, 2.**-125)), ("max just under 2^-125", one(2, below(2.**-125))),
        ("max 2^-126", one(2, 2.**-126)), ("max 2^-124", one(2, -2.**-124, 2.**-126)),
        ("all equal 1", np.full(32, 1, f32)), ("all equal -3.3", np.full(32, -3.3, f32)),
        ("all equal 1e-9", np.full(32, 1e-9, f32)),
        ("alternating 1", alternate), ("alternating -0.7", alternate * f32(-.7)),
        ("NaN at 7", normal_nan), ("inf at 0", normal_inf), ("-inf at 31", normal_ninf), ("NaN and inf", both),
        ("all NaN", np.full(32, np.nan, f32)), ("all inf", np.full(32, np.inf, f32)),
        ("NaN among zeros", one(30, np.nan)), ("-NaN among zeros", one(30, -f32(np.nan))),
        ("max 1", one(8, 1, .3)), ("max just under 1", one(8, below(1), .3)), ("max 8 - ulp", one(8, below(8), -5.)),
        ("-0.1 under 4", one(8, 4, -.1)), ("normal and 1e-42 times normal", tiny_mixed), ("outlier 100", outlier),
        ("ramp", (np.arange(32) - 16).astype(f32)),
        ("powers of two", np.ldexp(f32(1), -np.arange(32)).astype(f32) * alternate),
        ("integers", rs.randint(-6, 7, 32).astype(f32)),
        ("normal", n(1)), ("normal 1e-3", n(1e-3)), ("normal 1e-8", n(1e-8)),
        ("normal 1e-20", n(1e-20)), ("normal 1e4", n(1e4)),
    ]

def edges_quest():
    """ties of xh * 2^-e. With x_0 = a, x_p = b the entries of H x are c(a+b), c(a-b): t1 and t2 times 2^-27 keep
    std < 2^-26.6, so v stays in [2^-27, 2^-26). Two positions but 0 give +-t1, +-t2: std = sqrt((t1^2 + t2^2)/2).
    No f32 times f32(1/sqrt 32) rounds to 1.5 * 2^k, so xh * 2^-e is never exactly .75 nor the mask's 6: those two are
    approached from both sides."""
    assert not [s for s in neighbours(1.5 / np.float64(INV_SQRT32), 9) if s * INV_SQRT32 == f32(1.5)]
    below_6, above_6, below_p75, above_p75 = 6 - 2.**-21, 6 + 2.**-21, .75 - 2.**-23, .75 + 2.**-23
    out = []
    for p, t1, t2 in ((1, .25, 2.5), (2, 1.25, 2.5), (31, 1.25, 3.5), (16, 2.5, 5), (13, above_p75, 1.75),
                      (4, .25, below_p75), (8, 3.5, below_6), (27, 5, above_6), (22, 5, below_6)):
        x = tie_pair(0, p, t1, t2, -27)
        up = x + one(0, 2.**-22 * x[0])
        down = x - one(0, 2.**-22 * x[0])
        assert up[0] > x[0] > down[0]
        out += [(f"ties {t1} {t2} e -27", x), (f"ties -{t1} -{t2} e -27", -x),
                (f"just over {t1} {t2} e -27", up), (f"just under {t1} {t2} e -27", down)]
    k = 0
    for t1, t2 in ((1.25, 3.5), (1.25, 5), (1.75, 5), (2.5, 5), (below_p75, 3.5), (above_p75, 5)):
        e = (0, 10, -20, 1, -3)[k % 5]
        out.append((f"ties +-{t1} +-{t2} e {e}", tie_pair(1 + k, 31 - k, t1, t2, e)))
        k += 1
    # cancellation: H x is nearly constant, so s2/32 - mean^2 is all rounding error: 3 below zero (clamped), 3 above.
    # An FMA anywhere in the variance changes these scales.
    rs, found = np.random.RandomState(7), {True: 0, False: 0}
    while min(found.values()) < 3:
        x = one(0, 1) + (rs.standard_normal(32) * 1e-6).astype(f32)
        xh = hadamard(x)
        mean = tree(xh) * f32(1 / 32)
        negative = bool(tree(xh * xh) * f32(1 / 32) - mean * mean < 0)
        found[negative] += 1
        if found[negative] <= 3:
            out.append((f"cancelling variance, {'below' if negative else 'not below'} zero", x))
    return out

def edges_absmax():
    """ties of f32(.75 * x * 2^-e): x = f32(tie / .75) lands on the tie by rounding; the largest value fixes e"""
    ties = np.array([.25, .75, 1.25, 1.75, 2.5, 3.5, 5], dtype=np.float64)
    out = []
    for e in (0, 1, 10, -20, -100, 120):
        x = (np.resize(ties / .75, 31) * np.where(np.arange(31) % 2, -1, 1)).astype(f32)
        assert np.array_equal(np.abs(f32(.75) * x), np.resize(ties, 31).astype(f32))
        x = np.append(x, f32(7))
        for name, y in (("ties", x), ("just under ties", np.nextafter(x, f32(0))),
                        ("just over ties", np.nextafter(x, np.copysign(f32(99), x)))):
            out.append((f"{name} e {e}", np.ldexp(y, e).astype(f32)))
    return out

def golden_edges(out):
    rs = np.random.RandomState(20250521)
    common = edges_common(rs)
    for name, cases in (("quest", common + edges_quest()), ("absmax", common + edges_absmax())):
        x = np.stack([c[1] for c in cases]).astype(f32)
        out[f"edge.{name}.x"] = x
        out[f"edge.{name}.names"] = np.frombuffer("\n".join(c[0] for c in cases).encode(), dtype=np.uint8)
        if name == "quest":
            codes, scales, mask = quest(x)
            out["edge.quest.mask"] = mask_words(mask).view(np.int32)
        else:
            codes, scales = absmax(x)
            r = rs.randint(0, 65536, x.shape)
            r[:, 0::4], r[:, 1::4] = 0, 65535    # the extremes on half the elements
            sr_codes, sr_scales = absmax(x, r)
            assert np.array_equal(sr_scales, scales)
            out["edge.absmax.r"], out["edge.absmax.sr_codes"] = r.astype(np.int32), pack(sr_codes)
        out[f"edge.{name}.codes"], out[f"edge.{name}.scales"] = pack(codes), scales
        print(f"edge.{name}: {len(cases)} groups, {np.sum(scales == 255)} with a NaN scale")

# ---- one linear layer, forward and backward ----

def round_bf16(x):
    """nearest even on the upper 16 bits of an f32; finite input"""
    u = x.astype(f32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(f32)

def golden_linear(out):
    BT, C, OC = 64, 96, 64
    rs = np.random.RandomState(1337)
    x = round_bf16(rs.standard_normal((BT, C)))
    w = round_bf16(rs.standard_normal((OC, C)) * .1)
    g = rs.standard_normal((BT, OC))
    dy = round_bf16(g * np.exp(rs.standard_normal((BT, OC))))
    dx_signs = rs.randint(0, 2**32, OC // 32, dtype=np.uint64).astype(np.uint32)
    dw_signs = rs.randint(0, 2**32, BT // 32, dtype=np.uint64).astype(np.uint32)

    def put(name, codes, scales):
        out[f"linear.{name}_codes"], out[f"linear.{name}_scales"] = pack(codes).reshape(codes.shape[0], -1), scales
        return decode(codes, scales)

    # forward, along C: Y = Xq . Wq^T
    x_codes, x_scales, x_mask = quest(groups(x))
    w_codes, w_scales, w_mask = quest(groups(w))
    xq, wq = put("xq", x_codes, x_scales), put("wq", w_codes, w_scales)
    y = xq @ wq.T
    out["linear.x_mask"], out["linear.w_mask"] = mask_words(x_mask).view(np.int32), mask_words(w_mask).view(np.int32)

    # backward; decode(Xq), decode(Wq) stay in the rotated space. R cancels inside each product
    xq32, wq32 = xq.astype(f32), wq.astype(f32)   # exact: 2 significant bits
    operand = lambda name, a, signs: put(name, *absmax(rotate(groups(a), word_bits(signs))))
    dxq = operand("dy", dy, dx_signs) @ operand("wt", wq32.T, dx_signs).T       # (BT, C), along OC
    dwq = operand("dyt", dy.T, dw_signs) @ operand("xt", xq32.T, dw_signs).T    # (OC, C), along tokens
    dx = 16 / 9 * hadamard_f64(dxq * x_mask.reshape(BT, C))
    dw = 16 / 9 * hadamard_f64(dwq * w_mask.reshape(OC, C))

    # near the unquantized product: an error in layout, orientation or rotation would leave no correlation. Clipping at
    # 6s, which is 1.5 to 2.9 std, shrinks Xq, Wq; the backward operands are not clipped: 16/9 restores slope 1.
    x64, w64, dy64 = x.astype(np.float64), w.astype(np.float64), dy.astype(np.float64)
    for name, a, b, slope_error in (
            ("y", y, x64 @ w64.T, .2), ("dx", dx, dy64 @ w64, .2), ("dw", dw, dy64.T @ x64, .2),
            ("16/9 dxq", 16 / 9 * dxq, dy64 @ wq, .02), ("16/9 dwq", 16 / 9 * dwq, dy64.T @ xq, .02)):
        cosine = np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
        slope = np.sum(a * b) / np.sum(b * b)
        print(f"linear.{name}: cosine with the product before quantization {cosine:.4f}, slope {slope:.4f}")
        assert cosine > .9 and abs(slope - 1) < slope_error, name
    print(f"linear: masked off {1 - x_mask.mean():.4f} of x, {1 - w_mask.mean():.4f} of w")
    for name, a in (("x", x), ("w", w), ("dy", dy), ("y", y), ("dxq", dxq), ("dwq", dwq), ("dx", dx), ("dw", dw)):
        out[f"linear.{name}"] = a.astype(f32)
    out["linear.dx_signs"], out["linear.dw_signs"] = dx_signs.view(np.int32), dw_signs.view(np.int32)

# ---- self-checks ----

def self_check():
    rs = np.random.RandomState(0)
    # RTN against exact nearest-even by fractions, on the ties, their neighbours and a sweep
    ties = np.array([.25, .75, 1.25, 1.75, 2.5, 3.5, 5, 6], dtype=f32)
    sweep = np.abs(rs.standard_normal(2000) * 3).astype(f32)
    a = np.concatenate([ties, below(ties), np.nextafter(ties, f32(9)), sweep, [f32(1e30)]])
    for v, got in zip(a, rtn_index(a.astype(f32))):
        distance = [abs(Fraction(float(v)) - Fraction(float(g))) for g in E2M1]
        nearest = [i for i in range(8) if distance[i] == min(distance)]
        want = nearest[0] if len(nearest) == 1 else [i for i in nearest if i % 2 == 0][0]
        assert got == want, (v, got, want)
    # butterflies = the Sylvester matrix, signs first, rotation cancels in a product
    x, y = rs.standard_normal((50, 32)).astype(f32), rs.standard_normal((50, 32)).astype(f32)
    assert np.array_equal(sylvester(), sylvester().T)
    assert np.allclose(hadamard(x), x @ (sylvester() / np.sqrt(32)), atol=2e-6)
    assert np.allclose(hadamard(hadamard(x)), x, atol=2e-6)
    negative = rs.randint(0, 2, 32).astype(bool)
    assert np.allclose(rotate(x, negative), (x * np.where(negative, -1, 1)) @ (sylvester() / np.sqrt(32)), atol=2e-6)
    assert np.allclose(np.sum(rotate(x, negative) * rotate(y, negative), -1), np.sum(x * y, -1), atol=2e-5)
    assert not np.allclose(hadamard(np.where(negative, -x, x)), np.where(negative, -hadamard(x), hadamard(x)), atol=.1)
    # floor(log2) of the floats around powers of two
    assert floor_log2(f32(1)) == 0 and floor_log2(below(1)) == -1 and floor_log2(f32(2.**-149)) == -149
    # SR: over all 65536 r the mean is t itself, up to the grid of r
    r = np.arange(65536)
    for t in (0, 1e-5, .1, .25, .5, .77, 1.3, 1.99999, 2, 2.4, 3.5, 3.9999, 4, 4.7, 5.999):
        mean = E2M1[sr_index(np.full(65536, t, f32), r)].astype(np.float64).mean()
        step = .5 if t < 2 else 1 if t < 4 else 2
        assert abs(mean - t) <= step * 2.**-16 + 1e-6, (t, mean)
    # RTN after 3/4 never saturates, so absmax has no bias from clipping; the code of -0.1 under a maximum of 4 is 8
    codes, scales = absmax(one(8, 4, -.1))
    assert scales == 127 and codes[0] == 8 and codes[8] == 5
    # packing
    assert pack(np.arange(32, dtype=np.uint8) & 15)[0] == 0x10
    assert mask_words(one(31, 1).astype(bool)) == 0x80000000
    assert np.array_equal(word_bits(mask_words(negative)[None])[0], negative)
    # a planted error must be seen by the checksums
    x, _ = million()
    bad = x.copy()
    bad[3, 100] *= f32(-1)
    a, b = row_crc(pack(quest(groups(x[:8]))[0])), row_crc(pack(quest(groups(bad[:8]))[0]))
    assert list(np.nonzero(a != b)[0]) == [3]

def safetensors_write(path, tensors):
    names = {np.dtype(f32): "F32", np.dtype(np.int32): "I32", np.dtype(np.uint8): "U8", np.dtype(np.int64): "I64"}
    header, offset = {}, 0
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))   # wide types first keeps all aligned
    for k in order:
        a = tensors[k]
        header[k] = {"dtype": names[a.dtype], "shape": list(a.shape), "data_offsets": [offset, offset + a.nbytes]}
        offset += a.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for k in order:
            f.write(np.ascontiguousarray(tensors[k]).tobytes())

def main():
    assert sys.byteorder == "little"
    self_check()
    out = {}
    golden_million(out)
    golden_stages(out)
    golden_edges(out)
    golden_linear(out)
    os.makedirs(os.path.dirname(GOLDEN), exist_ok=True)
    safetensors_write(GOLDEN, out)
    for k in sorted(out):
        print(f"{k:32s} {str(out[k].dtype):6s} {out[k].shape}")
    print(f"wrote {GOLDEN}, {os.path.getsize(GOLDEN)} bytes")

if __name__ == "__main__":
    main()
