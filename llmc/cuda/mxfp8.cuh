// cuda/mxfp8.cuh: what backward may keep as MXFP8 (quant.h), written and read by the threads that have its vectors: a
// group of 32 is in PART_LANES neighbouring lanes. SwiGLU packs and reads gate_up on its way; the other tensors have
// passes of their own here. Codes and scales are bit for bit those of cpu/layers.h.
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

// x's codes, and the scale of its group, at most 246 or NaN; all lanes of the warp, a group in neighbouring ones
__device__ __forceinline__ Codes vector_codes(const Vector& x, uint32_t* scale) {
    *scale = mxfp8_scale(vector_largest(x));
    Vector y = vector_scaled(x, f32_from_bits(*scale == UE8M0_NAN ? 0x7fc00000u : (254u - *scale) << 23));
    Codes codes;
#pragma unroll
    for (int k = 0; k < VEC; k += 4) {
        codes.w[k / 4] = fp8_pack(reals_get(y, k), reals_get(y, k + 1), reals_get(y, k + 2), reals_get(y, k + 3),
                                  FORMAT_E4M3);
    }
    return codes;
}

// vector number i of the tensor to kept, where it is valid; all lanes of the warp. The lanes' numbers modulo PART_LANES
// are those of their vectors.
__device__ __forceinline__ void vector_keep(Mxfp8 kept, size_t i, const Vector& x, int valid) {
    uint32_t scale;
    Codes codes = vector_codes(x, &scale);
    if (valid) {
        reals_store(kept.codes + i * VEC, codes);
        if (i % PART_LANES == 0) {
            kept.scales[i / PART_LANES] = (uint8_t)scale;
        }
    }
}

// a vector of kept; its values are f16 numbers made of the codes, times factor
typedef struct { Codes codes; float factor; } KeptVector;

// of a scale, at most 246 or NaN
__device__ __forceinline__ float kept_factor(uint32_t scale) {
    return f32_from_bits(scale == UE8M0_NAN ? 0x7fc00000u : (scale + 8) << 23);
}

__device__ __forceinline__ KeptVector kept_load(Mxfp8 kept, size_t i) {
    return KeptVector{reals_load<VEC>(kept.codes + i * VEC), kept_factor(kept.scales[i / PART_LANES])};
}

// f16 with the code's sign, exponent and mantissa is code * 2^-8, subnormals included
__device__ __forceinline__ float kept_get(const KeptVector& x, int i) {
    uint32_t word = x.codes.w[i / 4] << (i % 2 ? 0 : 8);
    uint32_t pair = (word & 0x80008000u) | (word >> 1 & 0x3f803f80u);  // codes i % 2 and 2 + i % 2
    uint16_t half = (uint16_t)(i % 4 / 2 ? pair >> 16 : pair);
    return mul_rn(__half2float(__ushort_as_half(half)), x.factor);
}

// ---------------------------------------------------------------------------------------------------------------------
// A warp takes 32 groups in PART_LANES rounds of 32 vectors, whose loads are under way together; its 32 scales are one
// access: in round k a lane has the scale of group k * PACK_GROUPS + lane / PART_LANES.

#define PACK_THREADS 256
#define PACK_GROUPS (WARP_LANES / PART_LANES)  // of a round

// number of the warp's first vector
__device__ __forceinline__ size_t pack_first(void) {
    return ((size_t)blockIdx.x * PACK_THREADS + threadIdx.x) / WARP_LANES * (WARP_LANES * PART_LANES);
}

__global__ void __launch_bounds__(PACK_THREADS) mxfp8_pack_kernel(Mxfp8 out, const floatX* x, size_t vectors) {
    size_t first = pack_first(), lane = threadIdx.x % WARP_LANES, turn = lane % PART_LANES;
    Vector v[PART_LANES];
    uint32_t mine = 0;
#pragma unroll
    for (int k = 0; k < PART_LANES; k++) {
        size_t i = first + k * WARP_LANES + lane;
        v[k] = i < vectors ? reals_load<VEC>(x + i * VEC) : Vector{};
    }
#pragma unroll
    for (int k = 0; k < PART_LANES; k++) {
        size_t i = first + k * WARP_LANES + lane;
        uint32_t scale;
        Codes codes = vector_codes(v[k], &scale);
        mine = turn == k ? scale : mine;
        if (i < vectors) {
            reals_store(out.codes + i * VEC, codes);
        }
    }
    size_t group = first / PART_LANES + turn * PACK_GROUPS + lane / PART_LANES;
    if (group < vectors / PART_LANES) {
        out.scales[group] = (uint8_t)mine;
    }
}

__global__ void __launch_bounds__(PACK_THREADS) mxfp8_unpack_kernel(floatX* out, Mxfp8 packed, size_t vectors) {
    size_t first = pack_first(), lane = threadIdx.x % WARP_LANES, group = first / PART_LANES + lane;
    Codes codes[PART_LANES];
    float factor = kept_factor(group < vectors / PART_LANES ? packed.scales[group] : 0);
#pragma unroll
    for (int k = 0; k < PART_LANES; k++) {
        size_t i = first + k * WARP_LANES + lane;
        codes[k] = i < vectors ? reals_load<VEC>(packed.codes + i * VEC) : Codes{};
    }
#pragma unroll
    for (int k = 0; k < PART_LANES; k++) {
        size_t i = first + k * WARP_LANES + lane;
        KeptVector kept = {codes[k], __shfl_sync(FULL_WARP, factor, k * PACK_GROUPS + lane / PART_LANES)};
        float values[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            values[j] = kept_get(kept, j);
        }
        if (i < vectors) {
            reals_store(out + i * VEC, reals_of<VEC, floatX>(values));
        }
    }
}

static int pack_blocks(size_t vectors) { return (int)ceil_div((int64_t)vectors, PACK_THREADS * PART_LANES); }

static void pack_check(Mxfp8 packed, const floatX* x, int cols) {
    check(cols % GROUP == 0 && (uintptr_t)packed.codes % VEC == 0 && (uintptr_t)x % sizeof(Vector) == 0,
          "internal: no MXFP8 of rows of %d at %p, %p", cols, (void*)packed.codes, (const void*)x);
}

static void cuda_mxfp8_pack(Mxfp8 out, const floatX* x, int rows, int cols) {
    size_t vectors = (size_t)rows * cols / VEC;
    pack_check(out, x, cols);
    mxfp8_pack_kernel<<<pack_blocks(vectors), PACK_THREADS, 0, gpu.stream>>>(out, x, vectors);
    cuda_check_launch();
}

static void cuda_mxfp8_unpack(floatX* out, Mxfp8 packed, int rows, int cols) {
    size_t vectors = (size_t)rows * cols / VEC;
    pack_check(packed, out, cols);
    mxfp8_unpack_kernel<<<pack_blocks(vectors), PACK_THREADS, 0, gpu.stream>>>(out, packed, vectors);
    cuda_check_launch();
}
