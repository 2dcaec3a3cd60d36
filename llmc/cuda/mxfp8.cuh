// cuda/mxfp8.cuh: gate_up as backward may keep it (quant.h, Mxfp8), written and read by the threads that have its
// vectors: a group of 32 is in PART_LANES neighbouring lanes. Codes and scales are bit for bit those of cpu/layers.h.
#pragma once
#include "quantize_group.cuh"
#include "vectors.cuh"

#define PART_LANES (GROUP / VEC)  // lanes that share a group

typedef Reals<VEC, uint8_t> Codes;  // of a vector

// bits of the largest magnitude of the lanes' group, as an f32; a NaN is above all. All lanes of the warp.
__device__ __forceinline__ uint32_t vector_largest(const Vector& x) {
    uint32_t largest = 0;
#ifdef PRECISION_FP32
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        largest = max(largest, x.w[i] & 0x7fffffffu);
    }
#pragma unroll
    for (int lanes = 1; lanes < PART_LANES; lanes *= 2) {
        largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, lanes));
    }
    return largest;
#else
#define PAIR_LARGER(pair) asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(largest) : "r"(pair))
#pragma unroll
    for (int i = 0; i < VEC / 2; i++) {
        PAIR_LARGER(x.w[i] & 0x7fff7fffu);
    }
#pragma unroll
    for (int lanes = 1; lanes < PART_LANES; lanes *= 2) {
        PAIR_LARGER(__shfl_xor_sync(FULL_WARP, largest, lanes));
    }
    PAIR_LARGER(largest >> 16);
#undef PAIR_LARGER
    return largest << 16;
#endif
}

// x times a power of two, or NaN. In bf16 as in f32 it is exact but far below what e4m3 has; and x is not widened here,
// which the compiler would do once for all uses and keep, for which registers are short.
__device__ __forceinline__ Vector vector_scaled(Vector x, float factor) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof x.w / sizeof x.w[0]); i++) {
#ifdef PRECISION_FP32
        x.w[i] = f32_bits(mul_rn(f32_from_bits(x.w[i]), factor));
#else
        uint32_t pair = f32_bits(factor) | f32_bits(factor) >> 16;
        __nv_bfloat162 product = __hmul2(*(const __nv_bfloat162*)&x.w[i], *(const __nv_bfloat162*)&pair);
        x.w[i] = *(const uint32_t*)&product;
#endif
    }
    return x;
}

// vector number i of the tensor to kept, where it is valid; all lanes of the warp. The lanes' numbers modulo PART_LANES
// are those of their vectors.
__device__ __forceinline__ void vector_keep(Mxfp8 kept, size_t i, const Vector& x, int valid) {
    uint32_t scale = mxfp8_scale(vector_largest(x));  // at most 246, or NaN
    Vector y = vector_scaled(x, f32_from_bits(scale == UE8M0_NAN ? 0x7fc00000u : (254u - scale) << 23));
    Codes codes;
#pragma unroll
    for (int k = 0; k < VEC; k += 4) {
        codes.w[k / 4] = fp8_pack(reals_get(y, k), reals_get(y, k + 1), reals_get(y, k + 2), reals_get(y, k + 3),
                                  FORMAT_E4M3);
    }
    if (valid) {
        reals_store(kept.codes + i * VEC, codes);
        if (i % PART_LANES == 0) {
            kept.scales[i / PART_LANES] = (uint8_t)scale;
        }
    }
}

// a vector of kept; its values are f16 numbers made of the codes, times factor
typedef struct { Codes codes; float factor; } KeptVector;

__device__ __forceinline__ KeptVector kept_load(Mxfp8 kept, size_t i) {
    uint32_t scale = kept.scales[i / PART_LANES];  // at most 246, or NaN
    return KeptVector{reals_load<VEC>(kept.codes + i * VEC),
                      f32_from_bits(scale == UE8M0_NAN ? 0x7fc00000u : (scale + 8) << 23)};
}

// f16 with the code's sign, exponent and mantissa is code * 2^-8, subnormals included
__device__ __forceinline__ float kept_get(const KeptVector& x, int i) {
    uint32_t word = x.codes.w[i / 4] << (i % 2 ? 0 : 8);
    uint32_t pair = (word & 0x80008000u) | (word >> 1 & 0x3f803f80u);  // codes i % 2 and 2 + i % 2
    uint16_t half = (uint16_t)(i % 4 / 2 ? pair >> 16 : pair);
    return mul_rn(__half2float(__ushort_as_half(half)), x.factor);
}
