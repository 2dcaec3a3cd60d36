// cuda/mxint8.cuh: what backward may keep as MXINT8 (quant.h), written and read by the threads that have its vectors: a
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

// x times a power of two, or NaN. In bf16 as in f32 it is exact but far below half a step; and x is not widened here,
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

// f32_to_int8 in the lowest byte
__device__ __forceinline__ uint32_t int8_bits(float x) {
    return f32_bits(add_rn(fmaxf(fminf(x, 127.0f), -127.0f), 12582912.0f));
}

// x's codes, and the scale of its group; all lanes of the warp, a group in neighbouring ones
__device__ __forceinline__ Codes vector_codes(const Vector& x, uint32_t* scale) {
    *scale = mxint8_scale(vector_largest(x));
    Vector y = vector_scaled(x, mxint8_inverse_step(*scale));
    Codes codes;
#pragma unroll
    for (int k = 0; k < VEC; k += 4) {
        uint32_t low = __byte_perm(int8_bits(reals_get(y, k)), int8_bits(reals_get(y, k + 1)), 0x0040);
        uint32_t high = __byte_perm(int8_bits(reals_get(y, k + 2)), int8_bits(reals_get(y, k + 3)), 0x0040);
        codes.w[k / 4] = __byte_perm(low, high, 0x5410);
    }
    return codes;
}

// vector number i of the tensor to kept, where it is valid; all lanes of the warp. The lanes' numbers modulo PART_LANES
// are those of their vectors.
__device__ __forceinline__ void vector_keep(Mxint8 kept, size_t i, const Vector& x, int valid) {
    uint32_t scale;
    Codes codes = vector_codes(x, &scale);
    if (valid) {
        reals_store(kept.codes + i * VEC, codes);
        if (i % PART_LANES == 0) {
            kept.scales[i / PART_LANES] = (uint8_t)scale;
        }
    }
}

// a vector of kept; its values are its integers times step
typedef struct { Codes codes; float step; } KeptVector;

__device__ __forceinline__ KeptVector kept_load(Mxint8 kept, size_t i) {
    return KeptVector{reals_load<VEC>(kept.codes + i * VEC), mxint8_step(kept.scales[i / PART_LANES])};
}

// the integer + 128 below the exponent of 2^23 is an f32 of 2^23 + 128 more
__device__ __forceinline__ float kept_get(const KeptVector& x, int i) {
    uint32_t bits = __byte_perm(x.codes.w[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7540 + i % 4);
    return mul_rn(sub_rn(f32_from_bits(bits), 8388736.0f), x.step);
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

__global__ void __launch_bounds__(PACK_THREADS) mxint8_pack_kernel(Mxint8 out, const floatX* x, size_t vectors) {
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

__global__ void __launch_bounds__(PACK_THREADS) mxint8_unpack_kernel(floatX* out, Mxint8 packed, size_t vectors) {
    size_t first = pack_first(), lane = threadIdx.x % WARP_LANES, group = first / PART_LANES + lane;
    Codes codes[PART_LANES];
    float step = mxint8_step(group < vectors / PART_LANES ? packed.scales[group] : UE8M0_NAN);
#pragma unroll
    for (int k = 0; k < PART_LANES; k++) {
        size_t i = first + k * WARP_LANES + lane;
        codes[k] = i < vectors ? reals_load<VEC>(packed.codes + i * VEC) : Codes{};
    }
#pragma unroll
    for (int k = 0; k < PART_LANES; k++) {
        size_t i = first + k * WARP_LANES + lane;
        KeptVector kept = {codes[k], __shfl_sync(FULL_WARP, step, k * PACK_GROUPS + lane / PART_LANES)};
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

static void pack_check(Mxint8 packed, const floatX* x, int cols) {
    check(cols % GROUP == 0 && (uintptr_t)packed.codes % VEC == 0 && (uintptr_t)x % sizeof(Vector) == 0,
          "internal: no MXINT8 of rows of %d at %p, %p", cols, (void*)packed.codes, (const void*)x);
}

static void cuda_mxint8_pack(Mxint8 out, const floatX* x, int rows, int cols) {
    size_t vectors = (size_t)rows * cols / VEC;
    pack_check(out, x, cols);
    mxint8_pack_kernel<<<pack_blocks(vectors), PACK_THREADS, 0, gpu.stream>>>(out, x, vectors);
    cuda_check_launch();
}

static void cuda_mxint8_unpack(floatX* out, Mxint8 packed, int rows, int cols) {
    size_t vectors = (size_t)rows * cols / VEC;
    pack_check(packed, out, cols);
    mxint8_unpack_kernel<<<pack_blocks(vectors), PACK_THREADS, 0, gpu.stream>>>(out, packed, vectors);
    cuda_check_launch();
}
