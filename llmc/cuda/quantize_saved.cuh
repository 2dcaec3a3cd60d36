// cuda/quantize_saved.cuh: backward operands from packed forward operands, read transposed: wt (C, OC) of w (OC, C), xt
// (C, BT) of x (BT, C); decode, random signs, H, absmax, round.
//
//   saved_mma   bytes of an operand with one base, and nothing else: what training needs (quantize_saved_mma.cuh)
//   saved       all else, and second launches
#pragma once
#include "quantize_source.cuh"

#define SAVED_COLUMNS 128  // of a warp
#define SAVED_BLOCKS 4     // of 32 tokens, in a tile of 8 warps
#define SAVED_TILE (GROUP_WARPS / SAVED_BLOCKS * SAVED_COLUMNS)
#define SAVED_SPREAD 12    // octaves: sums then have at most 21 bits

// The sums come times 2^(SAVED_SHIFT - base), so that codes are made in the space of the carrier's bytes. A code's
// power of two is that of its sum, shifted: 3/4 / sqrt(32) is 2^-3 times 1.06, and between 7/8 and 9/8 of a power of
// two both spacings round to it. Adding the magnitude of the sum itself, which lies between its power of two and twice
// that, makes the adder round; SAVED_BITS says up to which sums that gives the definition's codes (quantize_bench.cu
// host tries every one).
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
