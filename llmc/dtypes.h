// dtypes.h: every number format of the program and its rounding. No other file rounds to a format.
//
// Small floats follow the OCP MX specification 1.0: value = (-1)^s 2^(e-bias) (1 + m/2^M), or m 2^(1-bias-M) where e =
// 0.
//   format  bits s e m   bias   largest    not a number     used for
//   bf16    1 8 7        127    3.39e38    yes              parameters, activations (floatX)
//   e4m3    1 4 3        7      448        S.1111.111       fp8 operands, forward
//   e5m2    1 5 2        15     57344      S.11111.{01..11} fp8 operands, gradients (and infinities)
//   e2m1    1 2 1        1      6          none             FP4 codes: 0 .5 1 1.5 2 3 4 6
//   ue8m0   0 8 0        127    2^127      255              MXFP4 and MXINT8 scales: the byte e+127 is 2^e
//   ue4m3   0 4 3        7      448        127              NVFP4 scales
//   int8    integers     -      127        none             MXINT8: what backward may keep of forward
// Rounding is to nearest, ties to even, as the hardware's cvt.rn.satfinite does, unless a function says stochastic.
// floatX is the type of parameters and activations: bf16, or f32 in the PRECISION=FP32 build.
#pragma once
#include "common.h"

static HOST_DEVICE inline uint32_t f32_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
static HOST_DEVICE inline float f32_from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// ---------------------------------------------------------------------------------------------------------------------
// bf16

typedef struct { uint16_t bits; } bf16;

static HOST_DEVICE inline float bf16_to_f32(bf16 x) { return f32_from_bits((uint32_t)x.bits << 16); }

static HOST_DEVICE inline bf16 f32_to_bf16(float x) {
    uint32_t u = f32_bits(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    uint32_t nan = (u >> 16) | 0x40u;
    bf16 y = {(uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
    return y;
}

// Stochastic rounding: away from zero with the probability that x lies beyond the neighbour towards zero, in units of
// their distance, to the resolution of the 16 random bits. NaN and infinity as f32_to_bf16.
static HOST_DEVICE inline bf16 f32_to_bf16_stochastic(float x, uint32_t random16) {
    uint32_t u = f32_bits(x);
    bf16 y = {(uint16_t)((u + random16) >> 16)};
    return (u & 0x7f800000u) == 0x7f800000u ? f32_to_bf16(x) : y;
}

#ifdef PRECISION_FP32
typedef float floatX;
#define FLOATX_NAME "F32"
#define FLOATX_EPSILON 5.9604645e-8f  // 2^-24: half a unit in the last place of 1
static HOST_DEVICE inline float floatX_to_f32(floatX x) { return x; }
static HOST_DEVICE inline floatX f32_to_floatX(float x) { return x; }
static HOST_DEVICE inline floatX f32_to_floatX_stochastic(float x, uint32_t) { return x; }
#else
typedef bf16 floatX;
#define FLOATX_NAME "BF16"
#define FLOATX_EPSILON 3.90625e-3f  // 2^-8
static HOST_DEVICE inline float floatX_to_f32(floatX x) { return bf16_to_f32(x); }
static HOST_DEVICE inline floatX f32_to_floatX(float x) { return f32_to_bf16(x); }
static HOST_DEVICE inline floatX f32_to_floatX_stochastic(float x, uint32_t random16) {
    return f32_to_bf16_stochastic(x, random16);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// small floats: one rounding for all of them. M mantissa bits, exponent bias, max_code the code of the largest value.

// |x| to the nearest code without sign. NaN and infinity saturate here; the callers say what they become.
static HOST_DEVICE inline uint32_t minifloat_encode(float x, int M, int bias, uint32_t max_code) {
    uint32_t u = f32_bits(x) & 0x7fffffffu;
    // normal: add half a unit (ties to even) to the f32 bit pattern and drop the surplus mantissa bits
    uint32_t drop = 23u - (uint32_t)M;
    uint32_t normal = ((u + (1u << (drop - 1)) - 1u + ((u >> drop) & 1u)) >> drop) - ((uint32_t)(127 - bias) << M);
    // subnormal: a fixed-point number with unit 2^(1-bias-M); adding 2^23 makes the f32 adder round it
    float fixed = f32_from_bits(u) * f32_from_bits((uint32_t)(127 + bias - 1 + M) << 23) + 8388608.0f;
    uint32_t subnormal = f32_bits(fixed) & 0x7fffffu;
    uint32_t code = u < ((uint32_t)(128 - bias) << 23) ? subnormal : normal;
    return code < max_code ? code : max_code;
}

static HOST_DEVICE inline float minifloat_decode(uint32_t code, int M, int bias) {
    float normal = f32_from_bits((code << (23 - M)) + ((uint32_t)(127 - bias) << 23));
    float subnormal = (float)(int)code * f32_from_bits((uint32_t)(127 + 1 - bias - M) << 23);
    return code < (1u << M) ? subnormal : normal;
}

static HOST_DEVICE inline uint32_t f32_sign(float x) { return f32_bits(x) >> 31; }

static HOST_DEVICE inline uint8_t f32_to_e4m3(float x) {
    uint32_t code = x != x ? 0x7fu : minifloat_encode(x, 3, 7, 0x7eu);
    return (uint8_t)(f32_sign(x) << 7 | code);
}

static HOST_DEVICE inline float e4m3_to_f32(uint8_t code) {
    float magnitude = (code & 0x7f) == 0x7f ? f32_from_bits(0x7fc00000u) : minifloat_decode(code & 0x7fu, 3, 7);
    return code >> 7 ? -magnitude : magnitude;
}

static HOST_DEVICE inline uint8_t f32_to_e5m2(float x) {
    uint32_t code = x != x ? 0x7fu : minifloat_encode(x, 2, 15, 0x7bu);
    return (uint8_t)(f32_sign(x) << 7 | code);
}

static HOST_DEVICE inline float e5m2_to_f32(uint8_t code) {
    uint32_t c = code & 0x7fu;
    float magnitude = c == 0x7c ? f32_from_bits(0x7f800000u) : c > 0x7c ? f32_from_bits(0x7fc00000u)
                                                                        : minifloat_decode(c, 2, 15);
    return code >> 7 ? -magnitude : magnitude;
}

// scales of NVFP4: never negative
static HOST_DEVICE inline uint8_t f32_to_ue4m3(float x) { return f32_to_e4m3(x < 0.0f ? 0.0f : x) & 0x7f; }
static HOST_DEVICE inline float ue4m3_to_f32(uint8_t code) { return e4m3_to_f32(code & 0x7f); }
// the code of 2^k, k in [-9, 8]: all powers of two there are
static HOST_DEVICE inline uint8_t ue4m3_power(int k) { return (uint8_t)(k >= -6 ? (k + 7) << 3 : 1 << (k + 9)); }
#define UE4M3_NAN 127

// e2m1 code = sign << 3 | index; the sign of a zero is kept
static HOST_DEVICE inline uint32_t f32_to_e2m1(float x) { return f32_sign(x) << 3 | minifloat_encode(x, 1, 1, 7u); }

static HOST_DEVICE inline float e2m1_to_f32(uint32_t code) {
    return f32_from_bits(f32_bits(minifloat_decode(code & 7u, 1, 1)) | (code & 8u) << 28);
}

// Stochastic rounding to e2m1: up with probability (distance to the lower neighbour) / (distance of the neighbours), to
// the resolution of the 16 random bits. With step the local spacing: k = floor(|x|/step + (random + 1/2)/2^16).
static HOST_DEVICE inline uint32_t f32_to_e2m1_stochastic(float x, uint32_t random16) {
    float a = f32_from_bits(f32_bits(x) & 0x7fffffffu);
    float inverse_step = a < 2.0f ? 2.0f : a < 4.0f ? 1.0f : 0.5f;
    int first = a < 2.0f ? 0 : a < 4.0f ? 2 : 4;  // code index = first + k
    float offset = ((float)(int)random16 + 0.5f) * 1.52587890625e-5f;
    int k = (int)(a * inverse_step + offset);
    int index = first + k;
    return f32_sign(x) << 3 | (uint32_t)(index < 7 ? index : 7);
}

// ---------------------------------------------------------------------------------------------------------------------
// ue8m0: powers of two

#define UE8M0_NAN 255

static HOST_DEVICE inline float ue8m0_to_f32(uint32_t byte) {
    uint32_t normal = byte << 23;
    return f32_from_bits(byte == 0 ? 0x00400000u : byte == UE8M0_NAN ? 0x7fc00000u : normal);
}

// 1 / 2^(byte-127), exact for every byte but NaN
static HOST_DEVICE inline float ue8m0_inverse(uint32_t byte) {
    return f32_from_bits(byte >= 254 ? (byte == 254 ? 0x00400000u : 0x7fc00000u) : (254u - byte) << 23);
}

// The scale of an MXINT8 group of 32, 2^floor(log2 largest), at least 2^-120, so that a step is a normal number; NaN
// where the group has a NaN or an infinity. largest: bits of its largest magnitude. Elements are f32_to_int8(x / step),
// a step is 2^-6 of the scale (OCP MX 1.0, 5.3.4, 6.3); all of a group without a scale are 127.
static HOST_DEVICE inline uint32_t mxint8_scale(uint32_t largest) {
    uint32_t exponent = largest >> 23;
    return largest >= 0x7f800000u ? UE8M0_NAN : exponent < 7 ? 7u : exponent;
}
static HOST_DEVICE inline float mxint8_step(uint32_t scale) {
    return f32_from_bits(scale == UE8M0_NAN ? 0x7fc00000u : (scale - 6) << 23);
}
static HOST_DEVICE inline float mxint8_inverse_step(uint32_t scale) {
    return f32_from_bits(scale == UE8M0_NAN ? 0x7fc00000u : (260 - scale) << 23);
}

// to nearest, at most 127 either way; 127 of a NaN. Adding 1.5 * 2^23 makes the f32 adder round.
static HOST_DEVICE inline uint8_t f32_to_int8(float x) {
    float below = x < 127.0f ? x : 127.0f;
    return (uint8_t)f32_bits((below > -127.0f ? below : -127.0f) + 12582912.0f);
}

// floor(log2(x)) + 127 of a positive finite f32, exact, denormals included (their result is <= 0)
static HOST_DEVICE inline int f32_biased_exponent(float x) {
    int field = (int)(f32_bits(x) >> 23);
    int scaled = (int)(f32_bits(x * 16777216.0f) >> 23) - 24;  // x * 2^24 is normal where x is denormal
    return field > 0 ? field : scaled;
}
