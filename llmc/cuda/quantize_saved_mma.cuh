// cuda/quantize_saved_mma.cuh: wt and xt as bytes of e4m3 with one base, by the tensor cores.
//
// 1.5 bytes an element leave some 15 instructions, of which 32 additions in butterflies would take 5, and as many more
// would decode in f32. But decoded MXFP4 has two significant bits: where the scales of the 32 tokens lie within
// 2^SPREAD of each other, every partial sum of H (s * x) is a multiple of half the smallest scale and below
// 2^(SPREAD + 9) of those, so it is exact in f32 in any order, and the tensor cores compute the very sums of the
// definition. Elsewhere (tokens that are zero, scales far apart, NaN) the warp takes the butterflies. H is +-1 and
// comes as the B operand; the tokens' scales relative to the largest, with their signs, are multiplied into A.
//
// A warp has 32 tokens x 128 columns. Lane (g, t) = (lane / 4, lane % 4) takes of each of tokens 8t .. 8t+7 the 8
// bytes with columns 16g .. 16g+15: of mma.m16n8k16's rows g and g + 8 the words of 8 codes each, of which every step
// takes code j; and its four pairs of k. Column n of the j-th result tile is output 8 (n/2) + 2j + n%2, so that the
// lane gets outputs 8t .. 8t+7 of both rows: 8 neighbouring bytes of the operand, a lane's quad one group. Codes of the
// next tile are on their way (cp.async) while one is computed.
#pragma once
#include "quantize_saved.cuh"

__device__ __forceinline__ void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// h: the B operand of result tile j and its second half of k, of +-`one`. Token 8t + 4s + 2u + i against output o has a
// minus where t & o/8, s & (o/4 & 1), u & (o/2 & 1), i & o have an odd number of ones together; o/8 and o's lowest bit
// are the lane's, (o/4 & 1, o/2 & 1) = (j/2, j%2). The first half of k, s = 0, has h[j % 2]. Read from memory, lest the
// compiler see that the eight registers repeat each other: it would keep two and copy them into pairs again and again.
#define SAVED_ONES 0x5d805d80u  // bf16 2^60: the factors of codes * 2^-126 would not reach the space of the sums
#define SAVED_HALF_ONES 0x3c003c00u
typedef volatile uint32_t (*SavedSigns)[2][GROUP_THREADS];  // bf16, then f16

__device__ __forceinline__ void saved_signs(SavedSigns signs) {
    uint32_t g = threadIdx.x % WARP_LANES / 4, t = threadIdx.x % 4;
    uint32_t minus = (__popc(t & g / 2) & 1 ? 0x80008000u : 0u) ^ (g & 1) << 31;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t one = i / 2 ? SAVED_HALF_ONES : SAVED_ONES;
        signs[i / 2][i % 2][threadIdx.x] = one ^ minus ^ (i % 2 ? 0x80008000u : 0u);
    }
}

__device__ __forceinline__ void saved_hadamard(uint32_t (*h)[2], SavedSigns signs, int half) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        h[j][0] = signs[half][j / 2][threadIdx.x];
        h[j][1] = signs[half][j / 2 ^ j % 2][threadIdx.x];
    }
}

// e2m1 codes of two tokens, 16 bits apart, as a bf16 pair: the bits s and iii of a code at 15 and 8 .. 6 are code *
// 2^-126, index 1 being bf16's subnormal as it is e2m1's. One product puts the code at both places.
template <int ODD> __device__ __forceinline__ uint32_t codes_bf16(uint32_t pair) {
    uint32_t code = pair & (ODD ? 0x00f000f0u : 0x000f000fu);
    return (code * (ODD ? 0x104u : 0x1040u)) & 0x81c081c0u;
}

// x[h] = sums of code 2 * byte + ODD of word h
template <int ODD>
__device__ __forceinline__ void saved_product(float (*x)[8], const SavedTile* tile, const uint32_t* factors, int byte,
                                              const uint32_t (*h)[2]) {
    uint32_t selector = 0x0400u + 0x0101u * (uint32_t)byte;  // that byte of two words
    uint32_t a[2][4];
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        uint2 even = tile->codes[2 * pair], odd = tile->codes[2 * pair + 1];
        uint32_t codes[2] = {codes_bf16<ODD>(__byte_perm(even.x, odd.x, selector)),
                             codes_bf16<ODD>(__byte_perm(even.y, odd.y, selector))};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            __nv_bfloat162 product = __hmul2(*(const __nv_bfloat162*)&codes[i], *(const __nv_bfloat162*)&factors[pair]);
            a[pair / 2][pair % 2 * 2 + i] = *(uint32_t*)&product;
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float d[4] = {0, 0, 0, 0};
        mma_bf16(d, a[0], h[j & 1]);
        mma_bf16(d, a[1], h[j]);
        x[0][2 * j] = d[0], x[0][2 * j + 1] = d[1];
        x[1][2 * j] = d[2], x[1][2 * j + 1] = d[3];
    }
}

// What a lane's groups leave behind: exponents as bf16, of the rows g below and of the rows g + 8 above
typedef struct { uint32_t top; int count; } SavedUse;

__device__ __forceinline__ uint32_t bf16_max(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

__device__ __forceinline__ uint32_t bf16_min(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// bf16 2^exponent at or below the largest of two groups' results: of row g below, of row g + 8 above
__device__ __forceinline__ uint32_t saved_exponents(const float (*x)[8]) {
    float largest[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        largest[h] = fabsf(x[h][0]);
#pragma unroll
        for (int k = 1; k < 8; k++) {
            largest[h] = fmaxf(largest[h], fabsf(x[h][k]));
        }
        largest[h] = mul_rn(largest[h], HADAMARD_SCALE);
    }
    uint32_t pair = bytes_pick(f32_bits(largest[0]), f32_bits(largest[1]), 0x7632);
    pair = bf16_max(pair, __shfl_xor_sync(FULL_WARP, pair, 1));
    pair = bf16_max(pair, __shfl_xor_sync(FULL_WARP, pair, 2));
    return pair & 0x7f807f80u;
}

// Groups of zeros only have zeros of any sign here. Unit and scale are 2 + SAVED_SHIFT octaves under the exponent in
// the upper half of `bits`, whose lower half does not matter. index: of the lane's Philox call
template <Rounding ROUND>
__device__ __forceinline__ uint2 saved_bytes(const QuantizeJob& job, float* x, uint32_t bits, uint64_t index,
                                             uint64_t round_stream) {
    if (ROUND == ROUND_STOCHASTIC) {
        Philox random = philox_keyed(&job.keys, index, round_stream);
        bits &= 0x7f800000u;
        float unit = f32_from_bits((uint32_t)max((int)bits - ((2 + SAVED_SHIFT) << 23), 1 << 23));
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float value = mul_rn(mul_rn(x[k], HADAMARD_SCALE), 0.75f / (1 << SAVED_SHIFT));
            x[k] = saved_stochastic(value, unit, random.w[k / 2], k % 2);
        }
    } else {
        float least = f32_from_bits(bits + SAVED_UNIT);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            x[k] = saved_nearest(x[k], least);
        }
    }
    return make_uint2(fp8_pack(x[0], x[1], x[2], x[3], FORMAT_E4M3), fp8_pack(x[4], x[5], x[6], x[7], FORMAT_E4M3));
}

// the 16 columns of the lane
template <Rounding ROUND>
__device__ __forceinline__ void saved_columns_mma(const QuantizeJob& job, BaseUse* use, const SavedTile* tile,
                                                  const uint32_t* factors, const uint32_t (*h)[2], size_t at,
                                                  uint64_t round_stream, int valid) {
    const uint32_t under = (uint32_t)(carrier_bottom(FORMAT_E4M3) + 127 + 2 + SAVED_SHIFT) << 7;
    SavedUse groups = {0, 0};
    uint8_t* to = (uint8_t*)job.operand + at;
    uint64_t index = job.round_index + at / 8;
    uint32_t cols = job.cols;
#pragma unroll 1
    for (int byte = 0; byte < 4; byte++) {
        uint32_t exponents[2];
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            float x[2][8];
            odd ? saved_product<1>(x, tile, factors, byte, h) : saved_product<0>(x, tile, factors, byte, h);
            exponents[odd] = saved_exponents(x);
            uint2 low = saved_bytes<ROUND>(job, x[0], exponents[odd] << 16, index, round_stream);
            uint2 high = saved_bytes<ROUND>(job, x[1], exponents[odd], index + cols, round_stream);
            if (valid) {
                *(uint2*)to = low;
                *(uint2*)(to + (size_t)8 * cols) = high;
            }
            to += cols;
            index += cols / 8;
        }
        groups.top = bf16_max(groups.top, bf16_max(exponents[0], exponents[1]));
        uint32_t least = bf16_min(exponents[0], exponents[1]);
        if (!__all_sync(FULL_WARP, (least & 0xffffu) >= under && least >> 16 >= under)) {  // seldom
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t bits = exponents[i / 2] >> (i % 2 * 16) & 0xffffu;
                groups.count += bits - 1u < under - 1u;
            }
        }
    }
    uint32_t top = max(groups.top & 0xffffu, groups.top >> 16);
    if (valid && top) {
        use->largest = max(use->largest, (int)(top >> 7) - 127 - 2 - SAVED_SHIFT + use->base);
        use->under += threadIdx.x % 4 == 0 ? groups.count : 0;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// half: where the scales of each column's 32 tokens lie within 4 times of each other, the sums are below 2^11 units,
// exact in f16, and come two to a register. In f16, too, one product makes a code of a sum, if its constant is right:
// with HALF_PRODUCT it is for sums up to HALF_LARGEST units (quantize_bench.cu host tries them all), which is looked at
// when the tile is done. HALF_HADAMARD finds the exponent of the largest sum / sqrt(32).
//
// Sums come times 2^(-9 - base). The code's index is that of group_tops: in CODE_UNITs, half of bit 9 added, cut off.

#define HALF_SPREAD 2
#define HALF_LOG2 (-9)
#define HALF_LOWEST (-1)   // of scale / 2^base: below, group exponents could leave f16
#define HALF_HIGHEST 10
#define HALF_PRODUCT 0x3c3d3c3du
#define HALF_HADAMARD 0x31a731a7u
#define HALF_LARGEST 844u

__device__ __forceinline__ uint32_t half_mul(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// the larger magnitudes, of any sign
__device__ __forceinline__ uint32_t half_max(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
    uint32_t c;
    asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
#else
    return __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu);
#endif
}

__device__ __forceinline__ void mma_half(uint32_t* d, const uint32_t* a, const uint32_t* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// As codes_bf16, code * 2^-14. The product's two places share bit 12, which would overflow into the sign of code 15;
// less 2^12, it overflows where the code is 0, whose sign may go. Half of bit 9 keeps the halves apart.
template <int ODD> GROUP_INLINE uint32_t codes_half(uint32_t pair) {
    uint32_t code = pair & (ODD ? 0x00f000f0u : 0x000f000fu);
    return (code * (ODD ? 0x120u : 0x1200u) - 0x0f000f00u) & 0x8e008e00u;
}

// d[h][j]: sums of code 2 * byte + ODD of word h, outputs 2j and 2j + 1
template <int ODD>
__device__ __forceinline__ void half_product(uint32_t (*d)[4], const SavedTile* tile, const uint32_t* factors, int byte,
                                             const uint32_t (*h)[2]) {
    uint32_t selector = 0x0400u + 0x0101u * (uint32_t)byte;
    uint32_t a[2][4];
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        uint2 even = tile->codes[2 * pair], odd = tile->codes[2 * pair + 1];
        a[pair / 2][pair % 2 * 2] = half_mul(codes_half<ODD>(__byte_perm(even.x, odd.x, selector)), factors[pair]);
        a[pair / 2][pair % 2 * 2 + 1] = half_mul(codes_half<ODD>(__byte_perm(even.y, odd.y, selector)), factors[pair]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t sums[2] = {0, 0};
        mma_half(sums, a[0], h[j & 1]);
        mma_half(sums, a[1], h[j]);
        d[0][j] = sums[0], d[1][j] = sums[1];
    }
}

// the largest magnitudes of the rows, g's below, g + 8's above
__device__ __forceinline__ uint32_t half_largest(const uint32_t (*d)[4]) {
    uint32_t row[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        row[h] = half_max(half_max(d[h][0], d[h][1]), half_max(d[h][2], d[h][3]));
    }
    uint32_t pair = half_max(bytes_pick(row[0], row[1], 0x5410), bytes_pick(row[0], row[1], 0x7632));
    pair = half_max(pair, __shfl_xor_sync(FULL_WARP, pair, 1));
    return half_max(pair, __shfl_xor_sync(FULL_WARP, pair, 2));
}

// a times half `i` of b: the instruction picks it
__device__ __forceinline__ uint32_t half_scale(uint32_t a, uint32_t b, int i) {
    __half2 pair = *(const __half2*)&b;
    __half2 c = __hmul2_rn(*(const __half2*)&a, i ? __high2half2(pair) : __low2half2(pair));
    return *(const uint32_t*)&c;
}

__device__ __forceinline__ uint32_t half_code(uint32_t sums, uint32_t products, uint32_t powers, int i) {
    uint32_t code = (half_scale(sums, products, i) + PAIR_HALF) & 0xfe00fe00u;
    return half_scale(half_mul(code, 0x78007800u), powers, i);
}

// four values as e4m3
__device__ __forceinline__ uint32_t half_pack(uint32_t low, uint32_t high) {
#if __CUDA_ARCH__ >= 890
    uint16_t a, b;
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(a) : "r"(low));
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(b) : "r"(high));
    return (uint32_t)a | (uint32_t)b << 16;
#else
    float2 a = __half22float2(*(const __half2*)&low), b = __half22float2(*(const __half2*)&high);
    return fp8_pack(a.x, a.y, b.x, b.y, FORMAT_E4M3);
#endif
}

// The 16 columns of the lane. bottom: scale / 2^base of its lowest token. 0: a sum was too large
__device__ __forceinline__ int half_columns(const QuantizeJob& job, BaseUse* use, const SavedTile* tile,
                                            const uint32_t* factors, const uint32_t (*h)[2], int bottom, size_t at,
                                            int valid) {
    uint32_t top = 0, cols = job.cols;
    uint8_t* to = (uint8_t*)job.operand + at;
#pragma unroll 1
    for (int byte = 0; byte < 4; byte++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            uint32_t d[2][4];
            odd ? half_product<1>(d, tile, factors, byte, h) : half_product<0>(d, tile, factors, byte, h);
            uint32_t largest = half_largest(d);
            top = half_max(top, largest);
            uint32_t exponents = half_mul(largest, HALF_HADAMARD) & 0x7c007c00u;
            uint32_t products = HALF_PRODUCT - exponents, powers = exponents + 0x18001800u;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t codes[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    codes[j] = half_code(d[i][j], products, powers, i);
                }
                uint2 bytes = make_uint2(half_pack(codes[0], codes[1]), half_pack(codes[2], codes[3]));
                if (valid) {
                    *(uint2*)(to + (size_t)(8 * i) * cols) = bytes;
                }
            }
            to += cols;
        }
    }
    top = __vmaxu2(top & 0x7fff7fffu, top >> 16 & 0x7fffu) & 0xffffu;
    // HALF_LARGEST = 0x1.a6p9 units of half the lowest scale
    if (!__all_sync(FULL_WARP, !valid || top <= ((uint32_t)(bottom - 1 + HALF_LOG2 + 9 + 15) << 10 | 0x298u))) {
        return 0;
    }
    uint32_t exponent = half_mul(top, HALF_HADAMARD) >> 10 & 31u;
    if (valid && top) {
        use->largest = max(use->largest, (int)exponent - 8 + use->base);
    }
    return 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// the way of a warp's tile to the lanes: while one is worked on, the next one's codes are on their way into the other
// half of the staging area, and its scales into a register, those of token `lane`
//
// Chunk c of token k lies at 4k + c ^ 2 (k/8), so that lanes that read two chunks of tokens 8t + i touch all banks.

typedef struct {
    uint4 codes[2][GROUP * SAVED_COLUMNS / 2 / 16];
    uint16_t factors[SAVED_COLUMNS / GROUP][GROUP];
} SavedStage;

// a warp's place; out of range, the last one, and nothing is stored
typedef struct { uint32_t block, column; int valid; } SavedPlace;

__device__ __forceinline__ SavedPlace saved_place(const QuantizeJob& job, uint32_t tokens, uint32_t across) {
    uint32_t warp = threadIdx.x / WARP_LANES, blocks = job.cols / GROUP;
    uint32_t block = tokens * SAVED_BLOCKS + warp % SAVED_BLOCKS;
    uint32_t column = across * SAVED_TILE + warp / SAVED_BLOCKS * SAVED_COLUMNS;
    int valid = block < blocks && column < job.rows;
    return SavedPlace{valid ? block : 0, valid ? column : 0, valid};
}

__device__ __forceinline__ void saved_prefetch(uint4* stage, const QuantizeJob& job, SavedPlace place) {
    uint32_t lane = threadIdx.x % WARP_LANES, half = job.rows / 2;
    const uint8_t* from = job.saved_codes + (size_t)(place.block * GROUP + lane / 4) * half + place.column / 2 +
                          lane % 4 * 16;
    if (place.column + lane % 4 * 32 < job.rows) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            chunk_copy(&stage[(lane + WARP_LANES * j) ^ (2 * j)], from + (size_t)(8 * j) * half);
        }
    }
}

// the four scales of token `lane`; missing ones are the first
__device__ __forceinline__ uint32_t saved_scales_load(const QuantizeJob& job, SavedPlace place) {
    uint32_t groups = job.rows / GROUP;
    const uint8_t* from = job.saved_scales + (size_t)(place.block * GROUP + threadIdx.x % WARP_LANES) * groups +
                          place.column / GROUP;
    if ((groups | (uint32_t)(uintptr_t)job.saved_scales) % 4 == 0) {
        return *(const uint32_t*)from;
    }
    uint32_t word = from[0];
#pragma unroll
    for (int c = 1; c < 4; c++) {
        word |= (uint32_t)from[place.column / GROUP + c < groups ? c : 0] << (8 * c);
    }
    return word;
}

__device__ __forceinline__ void saved_take(SavedTile* tile, const uint4* stage, uint32_t g) {
    uint32_t t = threadIdx.x % 4, odd = t >> 1;
    const uint2* at = (const uint2*)(stage + ((32 * t + g / 2) ^ (2 * t & 2))) + g % 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        tile->codes[i] = (i % 2 ? at - 8 * odd : at + 8 * odd)[8 * i];
    }
}

// Pairs for tokens 8t + 2i, + 1 of the lane's columns: sign * scale * 2^power of a format with MANTISSA bits. power has
// the format's bias added.
template <int MANTISSA>
__device__ __forceinline__ void saved_factors(uint32_t* factors, SavedStage* stage, uint32_t scales, uint32_t signs,
                                              int power, uint32_t g) {
    uint32_t lane = threadIdx.x % WARP_LANES;
    uint32_t first = ((uint32_t)power << MANTISSA) + ((signs >> lane & 1u) << 15);
#pragma unroll
    for (int c = 0; c < 4; c++) {
        uint32_t scale = 8 * c > MANTISSA ? scales >> (8 * c - MANTISSA) : scales << (MANTISSA - 8 * c);
        stage->factors[c][lane] = (uint16_t)((scale & 255u << MANTISSA) + first);
    }
    __syncwarp();
    uint4 words = ((const uint4*)stage->factors[g / 2])[lane % 4];
    factors[0] = words.x, factors[1] = words.y, factors[2] = words.z, factors[3] = words.w;
}

// of a tile's four groups of columns: lowest scale, and how far the highest lies above it
typedef struct { int bottom[4], spread[4]; } SavedRange;

__device__ __forceinline__ SavedRange saved_range(uint32_t scales) {
    SavedRange range;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        uint32_t scale = scales >> (8 * c) & 255u;
        range.bottom[c] = (int)__reduce_min_sync(FULL_WARP, scale);
        range.spread[c] = (int)__reduce_max_sync(FULL_WARP, scale) - range.bottom[c];
    }
    return range;
}

__device__ __forceinline__ int max4(const int* x) { return max(max(x[0], x[1]), max(x[2], x[3])); }
__device__ __forceinline__ int min4(const int* x) { return min(min(x[0], x[1]), min(x[2], x[3])); }

// are all sums of the tile exact, and nothing near the ends of f32?
__device__ __forceinline__ int saved_exact(SavedRange range, int base) {
    int bottom = min4(range.bottom), top = max4(range.bottom) + SAVED_SPREAD, distance = bottom - 127 - base;
    return max4(range.spread) <= SAVED_SPREAD && bottom >= 40 && top <= 214 && distance >= -60 &&
           top - 127 - base <= 40;
}

__device__ __forceinline__ int half_exact(SavedRange range, int base) {
    return max4(range.spread) <= HALF_SPREAD && min4(range.bottom) - 127 - base >= HALF_LOWEST &&
           max4(range.bottom) + HALF_SPREAD - 127 - base <= HALF_HIGHEST;
}

// the tile as the butterflies want it
__device__ __forceinline__ void saved_scales_of_lane(SavedTile* tile, uint32_t scales, uint32_t g) {
    uint32_t first = threadIdx.x % 4 * 8;
    tile->scales[0] = tile->scales[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t word = __shfl_sync(FULL_WARP, scales, (int)first + i);
        tile->scales[i / 4] |= (word >> (g / 2 * 8) & 255u) << (8 * (i % 4));
    }
}

// bytes of e4m3 with one base, nothing else, first launch
template <Rounding ROUND>
__global__ void __launch_bounds__(GROUP_THREADS, ROUND == ROUND_NEAREST ? 3 : 2)
    quantize_saved_mma_kernel(const __grid_constant__ QuantizeJob job) {
    __shared__ __align__(128) SavedStage stages[GROUP_WARPS];
    __shared__ volatile uint32_t signs[2][2][GROUP_THREADS];
    BaseUse use;
    base_first(job, &use);  // no branch that the compiler cannot see to be one for the whole warp
    Streams streams = job_streams(job);
    SavedStage* stage = &stages[threadIdx.x / WARP_LANES];
    uint32_t g = threadIdx.x % WARP_LANES / 4, t = threadIdx.x % 4;
    uint32_t blocks = job.cols / GROUP, tiles_across = (job.rows + SAVED_TILE - 1) / SAVED_TILE;
    uint64_t tiles = (uint64_t)((blocks + SAVED_BLOCKS - 1) / SAVED_BLOCKS) * tiles_across;
    uint32_t begin = (uint32_t)(tiles * blockIdx.x / gridDim.x), end = (uint32_t)(tiles * (blockIdx.x + 1) / gridDim.x);
    uint32_t tokens = begin / tiles_across, across = begin % tiles_across;
    uint32_t signs_of = ~0u, word = 0, scales = 0;
    saved_signs(signs);
    if (begin < end) {
        SavedPlace place = saved_place(job, tokens, across);
        saved_prefetch(stage->codes[(end - begin) % 2], job, place);
        scales = saved_scales_load(job, place);
    }
    stage_commit();
    for (uint32_t left = end - begin; left > 0; left--) {
        SavedPlace place = saved_place(job, tokens, across);
        uint32_t next = scales;
        across = across + 1 < tiles_across ? across + 1 : 0;
        tokens += across == 0;
        if (left > 1) {
            SavedPlace after = saved_place(job, tokens, across);
            saved_prefetch(stage->codes[(left - 1) % 2], job, after);
            next = saved_scales_load(job, after);
        }
        stage_commit();
        if (job.rotation == ROTATE_SIGNED && place.block != signs_of) {
            word = job_sign_word(job, streams.sign, place.block);
            signs_of = place.block;
        }
        int valid = place.valid && place.column + 16 * g < job.rows;  // others work on anything and store nothing
        size_t at = (size_t)(place.column + 16 * g) * job.cols + (size_t)place.block * GROUP + 8 * t;
        SavedTile tile;
        stage_wait<1>();
        __syncwarp();
        saved_take(&tile, stage->codes[left % 2], g);
        SavedRange range = saved_range(scales);
        int exact = saved_exact(range, use.base), done = 0;
        uint32_t factors[4], h[4][2];
        if (ROUND == ROUND_NEAREST && half_exact(range, use.base)) {
            saved_factors<10>(factors, stage, scales, word, 15 + 14 + HALF_LOG2 - 127 - use.base, g);
            saved_hadamard(h, signs, 1);
            int low = g & 2 ? range.bottom[1] : range.bottom[0], high = g & 2 ? range.bottom[3] : range.bottom[2];
            done = half_columns(job, &use, &tile, factors, h, (g & 4 ? high : low) - 127 - use.base, at, valid);
        }
        if (!done && exact) {
            saved_hadamard(h, signs, 0);
            saved_factors<7>(factors, stage, scales, word, 126 - 60 + SAVED_SHIFT - use.base, g);
            saved_columns_mma<ROUND>(job, &use, &tile, factors, h, at, streams.round, valid);
        } else if (!done) {
            saved_scales_of_lane(&tile, scales, g);
            saved_columns<ROUND, 0, 1>(job, &use, &tile, word >> (8 * t) & 255u, at, streams.round, valid);
        }
        __syncwarp();
        scales = next;
    }
    base_end(job, &use);
}

// ---------------------------------------------------------------------------------------------------------------------
