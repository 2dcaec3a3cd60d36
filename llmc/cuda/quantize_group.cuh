// cuda/quantize_group.cuh: the arithmetic of MXFP4 quantization on one group of 32 in the registers of one thread,
// equal bit for bit to cpu/quantize.h, and the carrier's bytes. Runs on the host, too (see hadamard.cuh).
//
//   quest    s = 2^floor(log2(std * 2.92247856/6 + 1e-8)), q = rtn(xh/s) saturating at 6, mask = |xh/s| < 6
//   absmax   s = 2^(floor(log2 max|x|) - 2), q = round(3/4 x/s); the value is owed 4/3
// A rounded element stays a float q * unit, unit a power of two, until it is packed.
//
// Rounding to e2m1 without branches or tables: with p the power of two at or below max(|x|, 1), neighbours are p/2
// apart. Adding 1.5 * 2^22 p makes the adder round to a multiple of p/2, ties to even as e2m1's codes have them (every
// even code is an even multiple); subtracting it again is exact. Three quarters of a power of two keep the sum in one
// binade whatever the sign of x. Stochastic: the same with the sum rounded towards zero after the offset was added.
// Four instructions an element, and one for the sign, which codes keep for zero.
//
// Packing codes: with unit 2^-14 the value q * unit has in f16 the bits s 000 iii 0 above eight zeros, iii the index of
// the code: 0.5 is the subnormal 2^-15, 1 the smallest normal.
#pragma once
#include "hadamard.cuh"

#define CODE_UNIT 0x1p-14f
#define CODE_UNIT_LOG2 (-14)
#define ROUND_MAGIC 6291456.0f  // 1.5 * 2^22

// |x| at most 6 units; the result has no negative zero
GROUP_INLINE float e2m1_nearest_unsigned_zero(float x, float unit) {
    float p = f32_from_bits(f32_bits(fmaxf(fabsf(x), unit)) & 0x7f800000u);
    return fma_rn(p, -ROUND_MAGIC, fma_rn(p, ROUND_MAGIC, x));
}

// magnitudes beyond 6 units only where `saturate`
GROUP_INLINE float e2m1_nearest(float x, float unit, int saturate) {
    float q = e2m1_nearest_unsigned_zero(saturate ? fminf(fabsf(x), 6.0f * unit) : x, unit);
    return f32_from_bits(f32_bits(q) | (f32_bits(x) & 0x80000000u));
}

// floor of a positive sum to a multiple of p/2
GROUP_INLINE float magic_floor(float p, float a) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(p, -ROUND_MAGIC, __fmaf_rz(p, ROUND_MAGIC, a));
#else
    double step = 0.5 * p;
    return (float)(floor((double)a / step) * step);
#endif
}

// word: two 16-bit random numbers. The offset (r + 1/2) / 2^16 steps: r below the exponent of 2^23 is 2^23 + r.
GROUP_INLINE float e2m1_stochastic(float x, float unit, uint32_t word, int high) {
    float a = fabsf(x);
    float p = f32_from_bits(f32_bits(fmaxf(a, unit)) & 0x7f800000u);
    uint32_t bits = 0x4b000000u | (high ? word >> 16 : word & 0xffffu);
    float offset = sub_rn(f32_from_bits(bits), 8388607.5f);
    float q = magic_floor(p, fma_rn(offset, mul_rn(p, 0x1p-17f), a));
    return f32_from_bits(f32_bits(q) | (f32_bits(x) & 0x80000000u));
}

// ---------------------------------------------------------------------------------------------------------------------
// quest

// sum by adjacent pairs, five levels; v is overwritten
GROUP_INLINE float group_sum(float* v) {
GROUP_UNROLL
    for (int h = 1; h < GROUP; h *= 2) {
GROUP_UNROLL
        for (int k = 0; k < GROUP; k += 2 * h) {
            v[k] = add_rn(v[k], v[k + h]);
        }
    }
    return v[0];
}

// the scale's byte; UE8M0_NAN where the group has a NaN or an infinity or its squares overflow
GROUP_INLINE uint32_t quest_scale(const float* v) {
    float values[GROUP], squares[GROUP];
GROUP_UNROLL
    for (int k = 0; k < GROUP; k++) {
        values[k] = v[k];
        squares[k] = mul_rn(v[k], v[k]);
    }
    float s1 = group_sum(values), s2 = group_sum(squares);
    float mean = mul_rn(s1, 0.03125f);
    float variance = sub_rn(mul_rn(s2, 0.03125f), mul_rn(mean, mean));
    variance = variance < 0.0f ? 0.0f : variance;
    float s = add_rn(mul_rn(sqrt_rn(variance), QUEST_SCALE), QUEST_EPSILON);
    return f32_bits(s) >> 23 & 255u;
}

// v = codes in units; returns the trust mask
GROUP_INLINE uint32_t quest_round(float* v, uint32_t scale, float unit) {
    float factor = mul_rn(f32_from_bits((254u - min(scale, 254u)) << 23), unit);
    uint32_t mask = 0;
GROUP_UNROLL
    for (int k = GROUP - 1; k >= 0; k--) {
        float x = mul_rn(v[k], factor);
        mask = mask << 1 | f32_bits(sub_rn(fabsf(x), 6.0f * unit)) >> 31;  // the sign of |x| - 6
        v[k] = e2m1_nearest(x, unit, 1);
    }
    return scale == UE8M0_NAN ? 0u : mask;
}

// ---------------------------------------------------------------------------------------------------------------------
// absmax

GROUP_INLINE uint32_t absmax_scale(float largest) {
    uint32_t bits = f32_bits(largest) & 0x7fffffffu;
    int exponent = f32_biased_exponent(f32_from_bits(bits)) - 2;
    uint32_t byte = bits == 0 || exponent < 0 ? 0u : (uint32_t)exponent;
    return bits >= 0x7f800000u ? UE8M0_NAN : byte;
}

// 3/4 / s in units: x * it is rounded once, like (x / s) * 3/4 with its exact quotient
GROUP_INLINE float absmax_factor(uint32_t scale, float unit) {
    return mul_rn(f32_from_bits((254u - min(scale, 253u)) << 23), 0.75f * unit);
}

GROUP_INLINE void absmax_round_nearest(float* v, uint32_t scale, float unit) {
    float factor = absmax_factor(scale, unit);
GROUP_UNROLL
    for (int k = 0; k < GROUP; k++) {
        v[k] = e2m1_nearest(mul_rn(v[k], factor), unit, 0);
    }
}

// index: of the Philox call of the group's first eight elements
GROUP_INLINE void absmax_round_stochastic(float* v, uint32_t scale, float unit, uint64_t seed, uint64_t index,
                                          uint64_t stream) {
    float factor = absmax_factor(scale, unit);
GROUP_UNROLL
    for (int k = 0; k < GROUP; k += 8) {
        Philox random = philox(seed, index + (uint64_t)(k / 8), stream);
GROUP_UNROLL
        for (int j = 0; j < 8; j++) {
            v[k + j] = e2m1_stochastic(mul_rn(v[k + j], factor), unit, random.w[j / 2], j % 2);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// packing

// 8 codes of values in CODE_UNITs
GROUP_INLINE uint32_t codes_pack(const float* v) {
    uint32_t even, odd;  // bytes s000iii0
#ifdef __CUDA_ARCH__
    __half2 h[4] = {__floats2half2_rn(v[0], v[2]), __floats2half2_rn(v[4], v[6]), __floats2half2_rn(v[1], v[3]),
                    __floats2half2_rn(v[5], v[7])};
    const uint32_t* bits = (const uint32_t*)h;
    even = __byte_perm(bits[0], bits[1], 0x7531);
    odd = __byte_perm(bits[2], bits[3], 0x7531);
#else
    even = f32_to_e5m2(v[0]) | f32_to_e5m2(v[2]) << 8 | f32_to_e5m2(v[4]) << 16 | (uint32_t)f32_to_e5m2(v[6]) << 24;
    odd = f32_to_e5m2(v[1]) | f32_to_e5m2(v[3]) << 8 | f32_to_e5m2(v[5]) << 16 | (uint32_t)f32_to_e5m2(v[7]) << 24;
#endif
    uint32_t index = (even >> 1 & 0x0f0f0f0fu) | (odd << 3 & 0xf0f0f0f0u);
    uint32_t sign = (even >> 4 & 0x0f0f0f0fu) | (odd & 0xf0f0f0f0u);
    return (index & 0x77777777u) | (sign & 0x88888888u);
}

// four values to the nearest of e4m3 or e5m2, saturating; NaN is 0x7f
GROUP_INLINE uint32_t fp8_pack(float a, float b, float c, float d, Format carrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t low, high;
    if (carrier == FORMAT_E4M3) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    } else {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    }
    return (uint32_t)low | (uint32_t)high << 16;
#else
    const float v[4] = {a, b, c, d};
    uint32_t bytes = 0;
GROUP_UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t byte = carrier == FORMAT_E4M3 ? f32_to_e4m3(v[i]) : f32_to_e5m2(v[i]);
        bytes |= (v[i] != v[i] ? 0x7fu : byte) << (8 * i);
    }
    return bytes;
#endif
}

// 2^e, subnormal where it must be, clamped at the ends of f32
GROUP_INLINE float power_of_two(int e) {
    int normal = e > 127 ? 254 : e + 127;
    uint32_t subnormal = e < -149 ? 0u : 1u << (149 + e);
    return f32_from_bits(e >= -126 ? (uint32_t)normal << 23 : subnormal);
}

// what turns q in units of 2^unit_log2 into q * 2^(e - base), e the exponent of the scale. Far below the window, where
// everything becomes zero, it stays normal; of a base that proves wrong only that it is some number matters.
GROUP_INLINE float carrier_factor(uint32_t scale, int base, int unit_log2) {
    int field = (int)scale - base - unit_log2;
    field = field < 1 ? 1 : field > 254 ? 254 : field;
    return f32_from_bits(scale == UE8M0_NAN ? 0x7fc00000u : (uint32_t)field << 23);
}

// N values, N a multiple of 4
template <int N> GROUP_INLINE void carrier_pack(uint32_t* bytes, const float* v, float factor, Format carrier) {
    if (carrier == FORMAT_E4M3) {
GROUP_UNROLL
        for (int i = 0; i < N / 4; i++) {
            bytes[i] = fp8_pack(mul_rn(v[4 * i], factor), mul_rn(v[4 * i + 1], factor), mul_rn(v[4 * i + 2], factor),
                                mul_rn(v[4 * i + 3], factor), FORMAT_E4M3);
        }
    } else {
GROUP_UNROLL
        for (int i = 0; i < N / 4; i++) {
            bytes[i] = fp8_pack(mul_rn(v[4 * i], factor), mul_rn(v[4 * i + 1], factor), mul_rn(v[4 * i + 2], factor),
                                mul_rn(v[4 * i + 3], factor), FORMAT_E5M2);
        }
    }
}

// decoded values of q in CODE_UNITs: both products are exact, subnormals included
template <int N> GROUP_INLINE void values_decode(float* v, uint32_t scale) {
    float s = ue8m0_to_f32(scale);
GROUP_UNROLL
    for (int k = 0; k < N; k++) {
        v[k] = mul_rn(mul_rn(v[k], 1.0f / CODE_UNIT), s);
    }
}

// is any code other than zero? v in any unit
template <int N> GROUP_INLINE int values_any(const float* v) {
    uint32_t bits = 0;
GROUP_UNROLL
    for (int k = 0; k < N; k++) {
        bits |= f32_bits(v[k]);
    }
    return (bits & 0x7fffffffu) != 0;
}
