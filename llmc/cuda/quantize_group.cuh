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

// ---------------------------------------------------------------------------------------------------------------------
// the same codes, two elements an instruction
//
// Cut off towards zero to f16, a value in CODE_UNITs has the index of the next code towards zero in bits 9 .. 11,
// whether it is normal or subnormal, and its sign in bit 15. Adding half of bit 9 rounds, halves away from zero:
//
//   stochastic  no half is added: it is the sum of x and its random offset that is cut off
//   nearest     of the halves .25 .75 1.25 1.75 2.5 3.5 5 every second one, whose upper code is even, goes up, the
//               others down. The f32 that first reach such a half after the roundings of the definition are reached
//               by other products than those, which round halves up where the definition rounds them to even:
//     quest     two products, by QUEST_FIRST and QUEST_SECOND
//     absmax    the difference of two products, the second one not rounded before; a sum -0 would lose its sign
// Which products do that was searched; quantize_bench.cu host tries every f32 of six octaves.

#define QUEST_FIRST 0x1.80c83ap+0f    // times QUEST_SECOND: 1/sqrt(32)
#define QUEST_SECOND 0x1.e1bcacp-4f
#define ABSMAX_PRODUCT 0x1.0f876ap-3f  // 3/4 / sqrt(32)
#define ABSMAX_FIRST 0x1.09e2ap-2f    // rounded, and together with
#define ABSMAX_SECOND -0x1.043dd4p-3f  // 3/4 / sqrt(32), but for 5 parts in 10^8
#define PAIR_HALF 0x01000100u
#define PAIR_SIX 0x0e000e00u

// Word i has elements PAIR_LOW(i) and, above, PAIR_LOW(i) + 2: four words have eight neighbours, of which the upper
// bytes of the first two words are the even ones in order, those of the others the odd ones.
#define PAIR_LOW(i) (8 * ((i) / 4) + (i) % 4 / 2 + (i) % 2 * 4)

GROUP_INLINE uint32_t f16_cut(float x) {
    uint32_t u = f32_bits(x) & 0x7fffffffu, sign = f32_bits(x) >> 16 & 0x8000u;
    uint32_t subnormal = (uint32_t)(u < 0x38800000u ? f32_from_bits(u) * 0x1p24f : 0.0f);
    uint32_t bits = u >= 0x7f800000u ? 0x7c00u : u >= 0x47800000u ? 0x7bffu : (u >> 13) - 0x1c000u;
    return sign | (u < 0x38800000u ? subnormal : bits);
}

// two f32 as f16, towards zero
GROUP_INLINE uint32_t pair_cut(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return f16_cut(low) | f16_cut(high) << 16;
#endif
}

// magnitudes at most 6
GROUP_INLINE uint32_t pair_saturate(uint32_t pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
    uint32_t least;
    asm("min.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(least) : "r"(pair), "r"(PAIR_SIX));
    return least;
#else
    uint32_t low = pair & 0x7fffu, high = pair >> 16 & 0x7fffu;
    return (pair & 0x80008000u) | min(low, PAIR_SIX & 0xffffu) | min(high, PAIR_SIX & 0xffffu) << 16;
#endif
}

// all ones where the magnitude is below 6
GROUP_INLINE uint32_t pair_inside(uint32_t pair) {
#ifdef __CUDA_ARCH__
    uint32_t six = PAIR_SIX;
    return __hlt2_mask(__habs2(*(const __half2*)&pair), *(const __half2*)&six);
#else
    uint32_t low = pair & 0x7fffu, high = pair >> 16 & 0x7fffu;
    return (low < (PAIR_SIX & 0xffffu) ? 0xffffu : 0u) | (high < (PAIR_SIX & 0xffffu) ? 0xffff0000u : 0u);
#endif
}

// The bytes of a and b, b above a, that the selector's four lower digits name, 0 to 7. (__byte_perm masks each digit.)
GROUP_INLINE uint32_t bytes_pick(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
#else
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t bytes = 0;
    for (int i = 0; i < 4; i++) {
        bytes |= (uint32_t)(both >> (8 * (selector >> (4 * i) & 7u)) & 255u) << (8 * i);
    }
    return bytes;
#endif
}

// max(|x|, |y|), y positive, with the sign of x
GROUP_INLINE float max_magnitude(float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
    float largest;
    asm("max.xorsign.abs.f32 %0, %1, %2;" : "=f"(largest) : "f"(x), "f"(y));
    return largest;
#else
    return f32_from_bits(f32_bits(fmaxf(fabsf(x), y)) | (f32_bits(x) & 0x80000000u));
#endif
}

// x in CODE_UNITs, |x| < 6, plus the offset (r + 1/2) / 2^16 steps, away from zero, as magic_floor's argument. 64 and
// r below it are 64 + r / 2^17; a step is half of x's power of two.
GROUP_INLINE float stochastic_sum(float x, uint32_t word, int high) {
    float power = f32_from_bits(f32_bits(max_magnitude(x, CODE_UNIT)) & 0xff800000u);
    float random = f32_from_bits(bytes_pick(word, 0x42800000u, high ? 0x7632 : 0x7610));
    return fma_rn(sub_rn(random, 64.0f - 0x1p-18f), power, x);
}

// What a group becomes: the upper bytes s000iii? of its f16s, of elements 8b, 8b + 2, 8b + 4, 8b + 6 in word 2b and of
// the odd ones in word 2b + 1.
typedef struct { uint32_t words[GROUP / 4]; } GroupTops;

GROUP_INLINE void tops_gather(GroupTops* tops, const uint32_t* pairs, int b) {
    tops->words[2 * b] = bytes_pick(pairs[0], pairs[1], 0x7531);
    tops->words[2 * b + 1] = bytes_pick(pairs[2], pairs[3], 0x7531);
}

// from codes in CODE_UNITs
GROUP_INLINE void tops_from_values(GroupTops* tops, const float* v) {
GROUP_UNROLL
    for (int b = 0; b < GROUP / 8; b++) {
        uint32_t pairs[4];
GROUP_UNROLL
        for (int i = 0; i < 4; i++) {
            pairs[i] = pair_cut(v[PAIR_LOW(4 * b + i)], v[PAIR_LOW(4 * b + i) + 2]);
        }
        tops_gather(tops, pairs, b);
    }
}

// Of group_butterfly_sums; returns the trust mask. The bits of a mask gather with bits 1 and 4 of the element swapped.
GROUP_INLINE uint32_t tops_quest(GroupTops* tops, const float* sums, uint32_t scale) {
    float second = mul_rn(f32_from_bits((254u - scale) << 23), QUEST_SECOND * CODE_UNIT);
    uint32_t mask = 0;
GROUP_UNROLL
    for (int b = 0; b < GROUP / 8; b++) {
        uint32_t pairs[4];
GROUP_UNROLL
        for (int i = 0; i < 4; i++) {
            int low = PAIR_LOW(4 * b + i), bit = (low & 13) | (low & 16) >> 3;
            uint32_t pair = pair_cut(mul_rn(mul_rn(sums[low], QUEST_FIRST), second),
                                     mul_rn(mul_rn(sums[low + 2], QUEST_FIRST), second));
            mask |= pair_inside(pair) & 0x00010001u << bit;
            pairs[i] = pair_saturate(pair) + PAIR_HALF;
        }
        tops_gather(tops, pairs, b);
    }
    uint32_t swap = (mask >> 14 ^ mask) & 0x0000ccccu;
    return mask ^ swap ^ swap << 14;
}

GROUP_INLINE void tops_absmax_nearest(GroupTops* tops, const float* sums, uint32_t scale) {
    float power = mul_rn(f32_from_bits((254u - scale) << 23), CODE_UNIT);
    float first = mul_rn(power, ABSMAX_FIRST), second = mul_rn(power, ABSMAX_SECOND);
GROUP_UNROLL
    for (int b = 0; b < GROUP / 8; b++) {
        uint32_t pairs[4];
GROUP_UNROLL
        for (int i = 0; i < 4; i++) {
            float low = sums[PAIR_LOW(4 * b + i)], high = sums[PAIR_LOW(4 * b + i) + 2];
            pairs[i] = pair_cut(fma_rn(low, second, mul_rn(low, first)), fma_rn(high, second, mul_rn(high, first))) +
                       PAIR_HALF;
        }
        tops_gather(tops, pairs, b);
    }
}

// The keys of the ten rounds of Philox under a seed, made once: adding them up again for every call takes as many
// instructions as the calls' exclusive ors.
#define PHILOX_ROUNDS 10
typedef struct { uint32_t words[PHILOX_ROUNDS][2]; } PhiloxKeys;

GROUP_INLINE PhiloxKeys philox_keys(uint64_t seed) {
    PhiloxKeys keys;
    for (uint32_t round = 0; round < PHILOX_ROUNDS; round++) {
        keys.words[round][0] = (uint32_t)seed + round * 0x9E3779B9u;
        keys.words[round][1] = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;
    }
    return keys;
}

// philox of rand.h
GROUP_INLINE Philox philox_keyed(const PhiloxKeys* keys, uint64_t index, uint64_t stream) {
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
GROUP_UNROLL
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53u * c0, product1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(product1 >> 32) ^ c1 ^ keys->words[round][0];
        c1 = (uint32_t)product1;
        c2 = (uint32_t)(product0 >> 32) ^ c3 ^ keys->words[round][1];
        c3 = (uint32_t)product0;
    }
    return Philox{{c0, c1, c2, c3}};
}

// index: of the Philox call of the group's first eight elements, a multiple of 4
GROUP_INLINE void tops_absmax_stochastic(GroupTops* tops, const float* sums, uint32_t scale, const PhiloxKeys* keys,
                                         uint64_t index, uint64_t stream) {
    float factor = absmax_factor(scale, CODE_UNIT);
GROUP_UNROLL
    for (int b = 0; b < GROUP / 8; b++) {
        Philox random = philox_keyed(keys, index | (uint64_t)b, stream);
        uint32_t pairs[4];
GROUP_UNROLL
        for (int i = 0; i < 4; i++) {
            int low = PAIR_LOW(i);
            float x = mul_rn(mul_rn(sums[8 * b + low], HADAMARD_SCALE), factor);
            float y = mul_rn(mul_rn(sums[8 * b + low + 2], HADAMARD_SCALE), factor);
            pairs[i] = pair_cut(stochastic_sum(x, random.w[low / 2], low % 2),
                                stochastic_sum(y, random.w[low / 2 + 1], low % 2));
        }
        tops_gather(tops, pairs, b);
    }
}

// a where the mask has ones, else b
GROUP_INLINE uint32_t bits_select(uint32_t a, uint32_t b, uint32_t mask) {
#ifdef __CUDA_ARCH__
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(bits) : "r"(a), "r"(b), "r"(mask));
    return bits;
#else
    return (a & mask) | (b & ~mask);
#endif
}

// eight codes without their signs
GROUP_INLINE uint32_t tops_indices(const GroupTops* tops, int b) {
    return bits_select(tops->words[2 * b] >> 1, tops->words[2 * b + 1] << 3, 0x0f0f0f0fu);
}

GROUP_INLINE uint32_t tops_codes(const GroupTops* tops, int b) {
    uint32_t signs = bits_select(tops->words[2 * b] >> 4, tops->words[2 * b + 1], 0x0f0f0f0fu);
    return bits_select(signs, tops_indices(tops, b), 0x88888888u);
}

GROUP_INLINE int tops_any(const GroupTops* tops) {
    uint32_t bits = 0;
GROUP_UNROLL
    for (int i = 0; i < GROUP / 4; i++) {
        bits |= tops->words[i];
    }
    return (bits & 0x0e0e0e0eu) != 0;
}

// The carrier's bytes of the eight magnitudes times 2^(e - base), e the exponent of the scale. Where 0.5 times it is
// normal and 6 times it finite, all but zero's change by as many units of the exponent.
GROUP_INLINE void carrier_table(uint32_t* table, uint32_t scale, int base, Format carrier) {
    const float magnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    int e4m3 = carrier == FORMAT_E4M3, k = (int)scale - 127 - base, lowest = e4m3 ? -5 : -13;
    uint32_t unit = (uint32_t)k << (e4m3 ? 3 : 2);
    table[0] = (e4m3 ? 0x3c383000u : 0x3e3c3800u) + unit * 0x01010100u;
    table[1] = (e4m3 ? 0x4c484440u : 0x46444240u) + unit * 0x01010101u;
    if ((uint32_t)(k - lowest) > (uint32_t)(carrier_top(carrier) - lowest) || scale == UE8M0_NAN) {
        carrier_pack<8>(table, magnitudes, carrier_factor(scale, base, 0), carrier);
    }
}

// the carrier's bytes of the group, from a table of those of the eight magnitudes
GROUP_INLINE void tops_carry(uint32_t* bytes, const GroupTops* tops, uint32_t scale, int base, Format carrier) {
    uint32_t table[2];
    carrier_table(table, scale, base, carrier);
GROUP_UNROLL
    for (int b = 0; b < GROUP / 8; b++) {
        uint32_t even = tops->words[2 * b], odd = tops->words[2 * b + 1], indices = tops_indices(tops, b);
        bytes[2 * b] = bytes_pick(table[0], table[1], indices) | (bytes_pick(even, odd, 0x5140) & 0x80808080u);
        bytes[2 * b + 1] = bytes_pick(table[0], table[1], indices >> 16) |
                           (bytes_pick(even, odd, 0x7362) & 0x80808080u);
    }
}

// v = the codes in CODE_UNITs
GROUP_INLINE void tops_values(float* v, const GroupTops* tops) {
GROUP_UNROLL
    for (int i = 0; i < GROUP; i++) {
        uint32_t top = tops->words[2 * (i / 8) + i % 2] >> (8 * (i % 8 / 2)) & 0x8eu;
#ifdef __CUDA_ARCH__
        v[i] = __half2float(__ushort_as_half((unsigned short)(top << 8)));
#else
        v[i] = e2m1_to_f32(top >> 4 | (top >> 1 & 7u)) * CODE_UNIT;
#endif
    }
}

// x, but what was made of it before is to be made again, not kept in registers
GROUP_INLINE float value_again(float x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+f"(x));
#endif
    return x;
}

#define FAST_SMALLEST 0x1p-60f  // largest magnitudes of groups that the products above serve, and zero
#define FAST_LARGEST 0x1p60f

// The group, its elements in v with their signs turned: scale's byte and trust mask, all ones where the rule has none.
// v is overwritten. index: of the Philox call of its first eight elements, a multiple of 4. valid 0: nobody asks what
// becomes of the group.
template <ScaleRule RULE, Rounding ROUND>
GROUP_INLINE uint32_t group_tops_where(int valid, GroupTops* tops, uint32_t* mask, float* v, Rotation rotation,
                                       const PhiloxKeys* keys, uint64_t index, uint64_t stream) {
    int fast = rotation != ROTATE_NONE;
    float hadamard = fast ? HADAMARD_SCALE : 1.0f;  // a product with 1 is exact
    float largest = 0.0f;
    uint32_t scale, least = 0;
    if (fast) {
        largest = group_butterfly_sums(v, &least);
    }
    *mask = ~0u;
    if (RULE == SCALE_QUEST) {
        float rotated[GROUP];
GROUP_UNROLL
        for (int k = 0; k < GROUP; k++) {
            rotated[k] = mul_rn(v[k], hadamard);
        }
        scale = quest_scale(rotated);
        if ((fast && scale - 40u < 160u) || !valid) {
            *mask = tops_quest(tops, v, scale);
            return scale;
        }
    } else {
        largest = mul_rn(largest, hadamard);
        uint32_t bits = f32_bits(largest) & 0x7fffffffu, smallest = f32_bits(FAST_SMALLEST);
        int zeros = ROUND == ROUND_STOCHASTIC ? bits == 0 : 0;
        int signs = ROUND == ROUND_STOCHASTIC || least != 0;  // of sums that are zero matter
        if ((fast && signs && (bits - smallest < f32_bits(FAST_LARGEST) - smallest || zeros)) || !valid) {
            scale = (uint32_t)max((int)(bits >> 23) - 2, 0);
            if (ROUND == ROUND_STOCHASTIC) {
                tops_absmax_stochastic(tops, v, scale, keys, index, stream);
            } else {
                tops_absmax_nearest(tops, v, scale);
            }
            return scale;
        }
        if (!fast) {  // not above, where the compiler would look for the largest before it knows
            largest = group_largest(v);
        }
        scale = absmax_scale(largest);
    }
    hadamard = value_again(hadamard);
GROUP_UNROLL
    for (int k = 0; k < GROUP; k++) {
        v[k] = mul_rn(v[k], hadamard);
    }
    if (RULE == SCALE_QUEST) {
        *mask = quest_round(v, scale, CODE_UNIT);
    } else if (ROUND == ROUND_STOCHASTIC) {
        float factor = absmax_factor(scale, CODE_UNIT);
GROUP_UNROLL
        for (int b = 0; b < GROUP / 8; b++) {
            Philox random = philox_keyed(keys, index | (uint64_t)b, stream);
GROUP_UNROLL
            for (int j = 0; j < 8; j++) {
                float x = mul_rn(v[8 * b + j], factor);
                v[8 * b + j] = e2m1_stochastic(x, CODE_UNIT, random.w[j / 2], j % 2);
            }
        }
    } else {
        absmax_round_nearest(v, scale, CODE_UNIT);
    }
GROUP_UNROLL
    for (int k = 0; k < GROUP; k++) {
        v[k] = scale == UE8M0_NAN ? 0.0f : v[k];
    }
    tops_from_values(tops, v);
    return scale;
}

template <ScaleRule RULE, Rounding ROUND>
GROUP_INLINE uint32_t group_tops(GroupTops* tops, uint32_t* mask, float* v, Rotation rotation, const PhiloxKeys* keys,
                                 uint64_t index, uint64_t stream) {
    return group_tops_where<RULE, ROUND>(1, tops, mask, v, rotation, keys, index, stream);
}
