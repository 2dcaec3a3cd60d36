// cuda/quantize_saved.cuh: backward operands from packed forward operands, read transposed: wt (C, OC) of w (OC, C), xt
// (C, BT) of x (BT, C); decode, random signs, H, absmax, round.
//
//   saved_mma   bytes of an operand with one base, and nothing else: what training needs
//   saved       all else, and second launches
// 1.5 bytes an element leave some 15 instructions, of which 32 additions in butterflies would take 5, and as many more
// would decode in f32. But decoded MXFP4 has two significant bits: where the scales of the 32 tokens lie within
// 2^SPREAD of each other, every partial sum of H (s * x) is a multiple of half the smallest scale and below
// 2^(SPREAD + 9) of those, so it is exact in f32 in any order, and the tensor cores compute the very sums of the
// definition. Elsewhere (tokens that are zero, scales far apart, NaN) the warp takes the butterflies. H is +-1 and
// comes as the B operand; the tokens' scales relative to the largest, with their signs, are multiplied into A.
//
// A warp has 32 tokens x 128 columns. Lane (g, t) = (lane / 4, lane % 4) loads for each of tokens 8t .. 8t+7 the 8
// bytes with columns 16g .. 16g+15: of mma.m16n8k16's rows g and g + 8 the words of 8 codes each, of which every step
// takes code j; and its four pairs of k. Column n of the j-th result tile is output 8 (n/2) + 2j + n%2, so that the
// lane gets outputs 8t .. 8t+7 of both rows: 8 neighbouring bytes of the operand, a lane's quad one group.
#pragma once
#include "quantize_source.cuh"

#define SAVED_COLUMNS 128  // of a warp
#define SAVED_BLOCKS 4     // of 32 tokens, in a tile of 8 warps
#define SAVED_TILE (GROUP_WARPS / SAVED_BLOCKS * SAVED_COLUMNS)
#define SAVED_SPREAD 12    // octaves: sums then have at most 21 bits

// The sums come times 2^(SAVED_SHIFT - base), so that codes are made in the space of the carrier's bytes. A code's
// power of two is that of its sum, shifted: 3/4 / sqrt(32) is 2^-3 times 1.06, and between 7/8 and 9/8 of a power of
// two both spacings round to it. Adding a number of the sum's binade, between 1 and 1.5 of its powers of two, makes the
// adder round, and there are no ties. Where that number is 1, and the sum negative, the adder rounds finer than it
// should: sums of 1 and 1.5 powers of two, which become the right codes all the same. (Tried: quantize_bench.cu host.)
#define SAVED_SHIFT 19
#define SAVED_PRODUCT (ABSMAX_PRODUCT * 0x1p-19f)
#define SAVED_UNIT 0x00a00000u  // 1.25 units' bits, over those of the group's largest sum / sqrt(32)
#define SAVED_BITS 21  // of the sums: with more, the codes could be others than the definition's

// code * unit of a sum; least is 1.25 units. The result has no negative zero.
GROUP_INLINE float saved_nearest(float sum, float least) {
    float magic = fmaxf(fabsf(sum), least);
    return sub_rn(fma_rn(sum, SAVED_PRODUCT, magic), magic);
}

// of x itself, in the space of the bytes
GROUP_INLINE float saved_stochastic(float x, float unit, uint32_t word, int high) {
    float power = f32_from_bits(f32_bits(max_magnitude(x, unit)) & 0xff800000u);
    float random = f32_from_bits(bytes_pick(word, 0x42800000u, high ? 0x7632 : 0x7610));
    return magic_floor(power, fma_rn(sub_rn(random, 64.0f - 0x1p-18f), power, x));
}

// a warp's tile
typedef struct {
    uint2 codes[8];      // of token 8t + i: 16 columns
    uint32_t scales[2];  // their scale bytes
} SavedTile;

__device__ __forceinline__ uint32_t saved_scale(const SavedTile* tile, int i) {
    return tile->scales[i / 4] >> (8 * (i % 4)) & 255u;
}

// token, column: the lane's first
__device__ __forceinline__ void saved_load(SavedTile* tile, const QuantizeJob& job, uint32_t token, uint32_t column) {
    const uint8_t* codes = job.saved_codes + (size_t)token * (job.rows / 2) + column / 2;
    const uint8_t* scales = job.saved_scales + (size_t)token * (job.rows / GROUP) + column / GROUP;
    tile->scales[0] = tile->scales[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int scale = *scales;
        tile->codes[i] = *(const uint2*)codes;
        tile->scales[i / 4] |= (uint32_t)scale << (8 * (i % 4));
        codes += job.rows / 2;
        scales += job.rows / GROUP;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// butterflies: the definition

// outputs 8t .. 8t+7 of code j of word h, without the last product: decode, signs, butterflies in the lane, then
// between the lanes of the quad. signs: bit i of token 8t + i
__device__ __forceinline__ void saved_butterflies(float* x, const SavedTile* tile, uint32_t signs, int h, int j,
                                                  int rotate) {
    int lane = threadIdx.x % WARP_LANES;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t word = h ? tile->codes[i].y : tile->codes[i].x;
        float value = mul_rn(e2m1_to_f32(word >> (4 * j) & 15u), ue8m0_to_f32(saved_scale(tile, i)));
        x[i] = f32_from_bits(f32_bits(value) ^ (signs >> i & 1u) << 31);
    }
    if (!rotate) {
        return;
    }
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (!(k & distance)) {
                float a = x[k], b = x[k + distance];
                x[k] = add_rn(a, b);
                x[k + distance] = sub_rn(a, b);
            }
        }
    }
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float other = __shfl_xor_sync(FULL_WARP, x[k], offset);
            x[k] = lane & offset ? sub_rn(other, x[k]) : add_rn(x[k], other);
        }
    }
}

// stats of the slow variant, by lanes
__device__ __forceinline__ void saved_stats(const QuantizeJob& job, const float* q, const float* rotated,
                                            uint32_t scale, int valid) {
    double error_sq = 0, input_sq = 0, zero = 0;
    for (int k = 0; valid && k < 8; k++) {
        float code = scale == UE8M0_NAN ? 0.0f : mul_rn(q[k], 1.0f / CODE_UNIT);
        float error = sub_rn(mul_rn(mul_rn(code, ue8m0_to_f32(scale)), job.owed), rotated[k]);
        error_sq += (double)error * error;
        input_sq += (double)rotated[k] * rotated[k];
        zero += code == 0.0f;
    }
    if (valid) {
        atomicAdd(&job.stats->error_sq, error_sq);
        atomicAdd(&job.stats->input_sq, input_sq);
        atomicAdd(&job.stats->zero, zero);
        atomicAdd(&job.stats->count, 8.0);
    }
}

// x: the lane's eight codes in units, which begin at element `at` of the operand. E4M3_ONLY: only bytes are wanted
template <int E4M3_ONLY>
__device__ __forceinline__ void saved_store(const QuantizeJob& job, float* x, size_t at, uint32_t scale, int base) {
    if (!E4M3_ONLY && job.codes) {
        uint32_t codes = codes_pack(x);
        *(uint32_t*)(job.codes + at / 2) = scale == UE8M0_NAN ? 0u : codes;
    }
    if (!E4M3_ONLY && job.scales && at % GROUP == 0) {
        job.scales[at / GROUP] = (uint8_t)scale;
    }
    if (E4M3_ONLY || (job.operand && job.carrier != FORMAT_FLOATX)) {
        uint32_t bytes[2];
        Format carrier = E4M3_ONLY ? FORMAT_E4M3 : job.carrier;
        carrier_pack<8>(bytes, x, carrier_factor(scale, base, CODE_UNIT_LOG2), carrier);
        *(uint2*)((uint8_t*)job.operand + at) = make_uint2(bytes[0], bytes[1]);
    } else if (job.operand) {
        values_decode<8>(x, scale);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            ((floatX*)job.operand)[at + k] = to_floatX(x[k]);
        }
    }
}

// the lane's eight elements of one group, `at` the first
template <Rounding ROUND, int STATS, int E4M3_ONLY>
__device__ __forceinline__ void saved_group(const QuantizeJob& job, BaseUse* use, float* x, size_t at,
                                            uint64_t round_stream, int valid) {
    float largest = 0.0f, rotated[8], hadamard = job.rotation != ROTATE_NONE ? HADAMARD_SCALE : 1.0f;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        rotated[k] = mul_rn(x[k], hadamard);
        largest = max_nan(largest, fabsf(rotated[k]));
    }
    largest = max_nan(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
    largest = max_nan(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
    uint32_t scale = absmax_scale(largest);
    float factor = absmax_factor(scale, CODE_UNIT);
    Philox random = {{0, 0, 0, 0}};
    if (ROUND == ROUND_STOCHASTIC) {
        random = philox(job.seed, job.round_index + at / 8, round_stream);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) {
        float value = mul_rn(rotated[k], factor);
        x[k] = ROUND == ROUND_STOCHASTIC ? e2m1_stochastic(value, CODE_UNIT, random.w[k / 2], k % 2)
                                         : e2m1_nearest(value, CODE_UNIT, 0);
    }
    if (STATS) {
        saved_stats(job, x, rotated, scale, valid);
        return;
    }
    int any = values_any<8>(x);
    any |= __shfl_xor_sync(FULL_WARP, any, 1);
    any |= __shfl_xor_sync(FULL_WARP, any, 2);
    if (job.base && any && valid && scale != UE8M0_NAN && threadIdx.x % 4 == 0) {
        base_count(use, job, scale);
    }
    if (valid) {
        saved_store<E4M3_ONLY>(job, x, at, scale, use->base);
    }
}

// the 16 columns of the lane; at: of its first element in the operand
template <Rounding ROUND, int STATS, int E4M3_ONLY>
__device__ __forceinline__ void saved_columns(const QuantizeJob& job, BaseUse* use, const SavedTile* tile,
                                              uint32_t signs, size_t at, uint64_t round_stream, int valid) {
#pragma unroll 1
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float x[8];
            saved_butterflies(x, tile, signs, h, j, job.rotation != ROTATE_NONE);
            saved_group<ROUND, STATS, E4M3_ONLY>(job, use, x, at + (size_t)(8 * h + j) * job.cols, round_stream,
                                                 valid);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// tensor cores

__device__ __forceinline__ void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// h: the B operand of result tile j and its second half of k, times 2^60. Token 8t + 4s + 2u + i against output o has a
// minus where t & o/8, s & (o/4 & 1), u & (o/2 & 1), i & o have an odd number of ones together; o/8 and o's lowest bit
// are the lane's, (o/4 & 1, o/2 & 1) = (j/2, j%2). The first half of k, s = 0, has h[j % 2]. Read from memory, lest the
// compiler see that the eight registers repeat each other: it would keep two and copy them into pairs again and again.
#define SAVED_ONES 0x5d805d80u  // bf16 2^60: the factors of codes * 2^-126 would not reach the space of the sums
__device__ __forceinline__ void saved_hadamard(uint32_t (*h)[2]) {
    __shared__ volatile uint32_t signs[2][GROUP_THREADS];
    uint32_t g = threadIdx.x % WARP_LANES / 4, t = threadIdx.x % 4;
    uint32_t pair = SAVED_ONES ^ (__popc(t & g / 2) & 1 ? 0x80008000u : 0u) ^ (g & 1) << 31;
    signs[0][threadIdx.x] = pair;
    signs[1][threadIdx.x] = pair ^ 0x80008000u;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        h[j][0] = signs[j / 2][threadIdx.x];
        h[j][1] = signs[j / 2 ^ j % 2][threadIdx.x];
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

// Groups of zeros only have zeros of any sign here. Unit and scale are 2 + SAVED_SHIFT octaves under the exponent in the
// upper half of `bits`, whose lower half does not matter. index: of the lane's Philox call
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

// bf16 pairs for tokens 8t + 2i, + 1 of the lane's columns: sign * scale * 2^(126 - 60 + SAVED_SHIFT - base)
__device__ __forceinline__ void saved_factors(uint32_t* factors, SavedStage* stage, uint32_t scales, uint32_t signs,
                                              int base, uint32_t g) {
    uint32_t lane = threadIdx.x % WARP_LANES;
    uint32_t least = (uint32_t)((126 - 60 + SAVED_SHIFT - base) << 7) + ((signs >> lane & 1u) << 15);
#pragma unroll
    for (int c = 0; c < 4; c++) {
        uint32_t scale = c ? scales >> (8 * c - 7) : scales << 7;
        stage->factors[c][lane] = (uint16_t)((scale & 0x7f80u) + least);
    }
    __syncwarp();
    uint4 words = ((const uint4*)stage->factors[g / 2])[lane % 4];
    factors[0] = words.x, factors[1] = words.y, factors[2] = words.z, factors[3] = words.w;
}

// are all sums of the tile exact, and nothing near the ends of f32?
__device__ __forceinline__ int saved_exact(uint32_t scales, int base) {
    uint32_t even = scales & 0x00ff00ffu, odd = scales >> 8 & 0x00ff00ffu;
    uint32_t most = __vmaxu2(even, odd), least = __vminu2(even, odd);
    int top = (int)__reduce_max_sync(FULL_WARP, max(most & 255u, most >> 16));
    int bottom = (int)__reduce_min_sync(FULL_WARP, min(least & 255u, least >> 16));
    int distance = top - 127 - base;
    return top - bottom <= SAVED_SPREAD && bottom >= 40 && top <= 214 && distance >= -60 && distance <= 40;
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

#ifndef SAVED_RESIDENT
#define SAVED_RESIDENT 3
#endif

// bytes of e4m3 with one base, nothing else, first launch
template <Rounding ROUND>
__global__ void __launch_bounds__(GROUP_THREADS, ROUND == ROUND_NEAREST ? SAVED_RESIDENT : 2)
    quantize_saved_mma_kernel(const __grid_constant__ QuantizeJob job) {
    __shared__ __align__(16) SavedStage stages[GROUP_WARPS];
    BaseUse use;
    base_first(job, &use);  // no branch that the compiler cannot see to be one for the whole warp
    Streams streams = job_streams(job);
    SavedStage* stage = &stages[threadIdx.x / WARP_LANES];
    uint32_t g = threadIdx.x % WARP_LANES / 4, t = threadIdx.x % 4;
    uint32_t blocks = job.cols / GROUP, tiles_across = (job.rows + SAVED_TILE - 1) / SAVED_TILE;
    uint64_t tiles = (uint64_t)((blocks + SAVED_BLOCKS - 1) / SAVED_BLOCKS) * tiles_across;
    uint32_t begin = (uint32_t)(tiles * blockIdx.x / gridDim.x), end = (uint32_t)(tiles * (blockIdx.x + 1) / gridDim.x);
    uint32_t tokens = begin / tiles_across, across = begin % tiles_across;
    uint32_t h[4][2], signs_of = ~0u, word = 0, scales = 0;
    saved_hadamard(h);
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
        int valid = place.valid && place.column + 16 * g < job.rows;
        uint32_t lane_g = valid ? g : 0;  // others work on the warp's first columns and store nothing
        size_t at = (size_t)(place.column + 16 * lane_g) * job.cols + (size_t)place.block * GROUP + 8 * t;
        SavedTile tile;
        stage_wait<1>();
        __syncwarp();
        saved_take(&tile, stage->codes[left % 2], lane_g);
        if (saved_exact(scales, use.base)) {
            uint32_t factors[4];
            saved_factors(factors, stage, scales, word, use.base, lane_g);
            saved_columns_mma<ROUND>(job, &use, &tile, factors, h, at, streams.round, valid);
        } else {
            saved_scales_of_lane(&tile, scales, lane_g);
            saved_columns<ROUND, 0, 1>(job, &use, &tile, word >> (8 * t) & 255u, at, streams.round, valid);
        }
        __syncwarp();
        scales = next;
    }
    base_end(job, &use);
}

// ---------------------------------------------------------------------------------------------------------------------

// all else, and second launches
template <Rounding ROUND, int STATS>
__global__ void __launch_bounds__(GROUP_THREADS, 2)
    quantize_saved_kernel(const __grid_constant__ QuantizeJob job) {
    BaseUse use;
    if (!base_begin(job, &use)) {
        return;
    }
    Streams streams = job_streams(job);
    uint32_t warp = threadIdx.x / WARP_LANES, g = threadIdx.x % WARP_LANES / 4, t = threadIdx.x % 4;
    uint32_t blocks = job.cols / GROUP, tiles_across = (job.rows + SAVED_TILE - 1) / SAVED_TILE;
    uint64_t tiles = (uint64_t)((blocks + SAVED_BLOCKS - 1) / SAVED_BLOCKS) * tiles_across;
    uint32_t begin = (uint32_t)(tiles * blockIdx.x / gridDim.x), end = (uint32_t)(tiles * (blockIdx.x + 1) / gridDim.x);
    uint32_t tokens = begin / tiles_across, across = begin % tiles_across;
    uint32_t signs_of = ~0u, word = 0;
    for (uint32_t left = end - begin; left > 0; left--) {
        uint32_t block = tokens * SAVED_BLOCKS + warp % SAVED_BLOCKS;
        uint32_t column = across * SAVED_TILE + warp / SAVED_BLOCKS * SAVED_COLUMNS;
        across = across + 1 < tiles_across ? across + 1 : 0;
        tokens += across == 0;
        if (block >= blocks || column >= job.rows) {
            continue;
        }
        SavedTile tile;
        int valid = column + 16 * g < job.rows;  // other lanes work on the warp's first columns and store nothing
        column += valid ? 16 * g : 0;
        saved_load(&tile, job, block * GROUP + 8 * t, column);
        if (job.rotation == ROTATE_SIGNED && block != signs_of) {
            word = job_sign_word(job, streams.sign, block);
            signs_of = block;
        }
        uint32_t signs = word >> (8 * t) & 255u;
        size_t at = (size_t)column * job.cols + (size_t)block * GROUP + 8 * t;
        saved_columns<ROUND, STATS, 0>(job, &use, &tile, signs, at, streams.round, valid);
    }
    base_end(job, &use);
}
