// cuda/quantize_source.cuh: what the quantizing kernels share (job, base of a tensor), and the two that read floatX for
// an operand with one base.
//
//   rows      floatX (rows, K), a lane has one group: x and w of Quartet
//   columns   floatX (K, rows), a lane has two columns of 32 tokens: dyt
// The other kernels: quantize_saved.cuh (wt, xt), quantize.cuh (dy).
//
// An operand with one base for the tensor is written with the base of its last use; a second launch of the same kernel
// (`check`) compares that with what the first one found and writes everything again where it was wrong. It leaves
// base->base alone, which its other blocks still read: carrier_bases_advance moves on, before the next use.
#pragma once
#include "../recipe.h"
#include "quantize_group.cuh"

// what the kernels see of a QuantizeArgs
typedef struct {
    Rotation rotation;
    Format carrier;
    int check;                       // second launch
    uint32_t rows, cols;             // of the operand
    const floatX* tensor;
    Mxint8 kept;                     // where swiglu_quantize_kernel keeps its tensor, too, or none
    const uint8_t *saved_codes, *saved_scales;
    uint8_t *codes, *scales;         // each may be NULL
    uint32_t* mask;
    void* operand;
    CarrierBase* base;
    float* row_scale;
    int32_t* row_under;              // with row_scale, or NULL
    int again;                       // groups under the window were counted before
    uint64_t seed, sign_stream, sign_index, round_stream, round_index;
    const uint64_t* position;
    float owed;
    QuantStats* stats;
    PhiloxKeys keys;                 // of the seed, where rounding is stochastic
} QuantizeJob;

// the streams of this launch
typedef struct { uint64_t sign, round; } Streams;
__device__ __forceinline__ Streams job_streams(const QuantizeJob& job) {
    uint64_t position = job.position ? *job.position : 0;
    return Streams{job.sign_stream | position, job.round_stream | position};
}

__device__ __forceinline__ uint32_t job_sign_word(const QuantizeJob& job, uint64_t stream, uint32_t block) {
    Philox p = philox(job.seed, job.sign_index + block / 4, stream);
    uint32_t low = block & 1 ? p.w[1] : p.w[0], high = block & 1 ? p.w[3] : p.w[2];
    return block & 2 ? high : low;
}

// ---------------------------------------------------------------------------------------------------------------------
// the base of a tensor

// of one thread; before is the base of the first launch where this is the second
typedef struct { int base, before, largest, under; } BaseUse;

// A second launch may begin before the first one ends (job_launch) and waits here until it has.
__device__ __forceinline__ void launch_order(int second) {
#if __CUDA_ARCH__ >= 900
    if (second) {
        cudaGridDependencySynchronize();
    } else {
        cudaTriggerProgrammaticLaunchCompletion();
    }
#endif
}

// of a first launch
__device__ __forceinline__ void base_first(const QuantizeJob& job, BaseUse* use) {
    launch_order(0);
    use->base = use->before = job.base ? job.base->base : 0;
    use->largest = CARRIER_NONE;
    use->under = 0;
}

// 0 where this launch has nothing to do
__device__ __forceinline__ int base_begin(const QuantizeJob& job, BaseUse* use) {
    if (!job.check) {
        base_first(job, use);
        return 1;
    }
    launch_order(1);
    use->before = job.base->base;
    use->largest = CARRIER_NONE;
    use->under = 0;
    use->base = carrier_base(job.carrier, job.base->largest);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        job.base->scale = power_of_two(use->base);
    }
    return use->base != use->before;
}

// one group with a code that is not zero
__device__ __forceinline__ void base_count(BaseUse* use, const QuantizeJob& job, uint32_t scale) {
    int e = (int)scale - 127, bottom = carrier_bottom(job.carrier);
    use->largest = max(use->largest, e);
    use->under += e - use->base < bottom;
    if (job.check) {
        use->under -= e - use->before < bottom;  // counted by the first launch
    }
}

// all threads of the block
__device__ __forceinline__ void base_end(const QuantizeJob& job, BaseUse* use) {
    if (!job.base) {
        return;
    }
    __shared__ int largest, under;
    if (threadIdx.x == 0) {
        largest = CARRIER_NONE;
        under = 0;
    }
    __syncthreads();
    int top = __reduce_max_sync(FULL_WARP, use->largest), sum = __reduce_add_sync(FULL_WARP, use->under);
    if (threadIdx.x % WARP_LANES == 0) {
        atomicMax(&largest, top);
        atomicAdd(&under, sum);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (!job.check) {
            atomicMax(&job.base->largest, largest);
        }
        if (under && !job.again) {
            atomicAdd(&job.base->under, under);
        }
    }
}

__global__ void carrier_advance_kernel(CarrierBase* bases, int count, const __grid_constant__ Carrier carrier) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && bases[i].largest != CARRIER_NONE) {
        bases[i].base = carrier_base(carrier.format[i % OPERANDS], bases[i].largest);
        bases[i].largest = CARRIER_NONE;
    }
}

// before every use of these bases, the first (of zeroed memory) included: the next one is expected where the last one
// was found. A base that was not used since is left alone. Base i is of an operand i % OPERANDS. A base that is used
// twice without this is that of both operands.
static void carrier_bases_advance(CarrierBase* bases, int count, const Carrier* carrier) {
    if (count > 0) {
        carrier_advance_kernel<<<(int)ceil_div(count, 128), 128, 0, gpu.stream>>>(bases, count, *carrier);
        cuda_check_launch();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// what a thread with a whole group shares between the kernels

// sums of a warp's groups into job.stats. v: codes in units; rotated: what was quantized
__device__ __forceinline__ void stats_add(const QuantizeJob& job, const float* v, const float* rotated, uint32_t scale,
                                          uint32_t mask, int valid) {
    double sums[5] = {0, 0, 0, 0, 0};
    float s = ue8m0_to_f32(scale);
    for (int k = 0; valid && k < GROUP; k++) {
        float q = scale == UE8M0_NAN ? 0.0f : mul_rn(v[k], 1.0f / CODE_UNIT);
        float error = sub_rn(mul_rn(mul_rn(q, s), job.owed), rotated[k]);
        sums[0] += (double)error * error;
        sums[1] += (double)rotated[k] * rotated[k];
        sums[2] += !(mask >> k & 1u);
        sums[3] += q == 0.0f;
        sums[4] += 1;
    }
    for (int i = 0; i < 5; i++) {
        for (int offset = WARP_LANES / 2; offset; offset /= 2) {
            sums[i] += __shfl_xor_sync(FULL_WARP, sums[i], offset);
        }
    }
    if (threadIdx.x % WARP_LANES == 0) {
        double* to[5] = {&job.stats->error_sq, &job.stats->input_sq, &job.stats->clipped, &job.stats->zero,
                         &job.stats->count};
        for (int i = 0; i < 5; i++) {
            atomicAdd(to[i], sums[i]);
        }
    }
}

// v = codes of the group in `unit`s, from its elements with their signs turned; element: its place in the operand.
// Returns the scale's byte. all: the rule has no mask
template <ScaleRule RULE, Rounding ROUND, int STATS>
__device__ __forceinline__ uint32_t group_quantize(const QuantizeJob& job, float* v, uint32_t* mask, float unit,
                                                   uint64_t round_stream, uint64_t element, int valid) {
    uint32_t scale;
    float rotated[GROUP];
    float largest = job.rotation == ROTATE_NONE ? group_largest(v) : group_hadamard(v);
    if (STATS) {
        memcpy(rotated, v, sizeof rotated);
    }
    *mask = ~0u;
    if (RULE == SCALE_QUEST) {
        scale = quest_scale(v);
        *mask = quest_round(v, scale, unit);
    } else {
        scale = absmax_scale(largest);
        if (ROUND == ROUND_STOCHASTIC) {
            absmax_round_stochastic(v, scale, unit, job.seed, job.round_index + element / 8, round_stream);
        } else {
            absmax_round_nearest(v, scale, unit);
        }
    }
    if (STATS) {
        stats_add(job, v, rotated, scale, *mask, valid);
    }
    return scale;
}

// every group of a nonzero scale byte has a code that is not zero under absmax: the largest is at least 3
template <ScaleRule RULE> __device__ __forceinline__ int group_counts(const float* v, uint32_t scale) {
    if (scale == UE8M0_NAN) {
        return 0;
    }
    return RULE == SCALE_ABSMAX && scale > 0 ? 1 : values_any<GROUP>(v);
}

// codes (where kept), scale and mask of group `group`
__device__ __forceinline__ void codes_store(const QuantizeJob& job, uint4 codes, size_t group, uint32_t scale,
                                            uint32_t mask) {
    if (job.codes) {
        if ((uintptr_t)job.codes % 16 == 0) {
            ((uint4*)job.codes)[group] = codes;
        } else {  // behind the masks of an odd number of groups
            uint32_t* words = (uint32_t*)job.codes + 4 * group;
            words[0] = codes.x, words[1] = codes.y, words[2] = codes.z, words[3] = codes.w;
        }
    }
    if (job.scales) {
        job.scales[group] = (uint8_t)scale;
    }
    if (job.mask) {
        job.mask[group] = mask;
    }
}

// the same of values in CODE_UNITs
__device__ __forceinline__ void group_store(const QuantizeJob& job, const float* v, size_t group, uint32_t scale,
                                            uint32_t mask) {
    uint4 codes = make_uint4(codes_pack(v), codes_pack(v + 8), codes_pack(v + 16), codes_pack(v + 24));
    codes_store(job, scale == UE8M0_NAN ? make_uint4(0, 0, 0, 0) : codes, group, scale, mask);
}

__device__ __forceinline__ void tops_store(const QuantizeJob& job, const GroupTops* tops, size_t group, uint32_t scale,
                                           uint32_t mask) {
    uint4 codes = make_uint4(0, 0, 0, 0);
    if (job.codes) {
        codes = make_uint4(tops_codes(tops, 0), tops_codes(tops, 1), tops_codes(tops, 2), tops_codes(tops, 3));
    }
    codes_store(job, codes, group, scale, mask);
}

// as group_counts
template <ScaleRule RULE> __device__ __forceinline__ int tops_counts(const GroupTops* tops, uint32_t scale) {
    return RULE == SCALE_ABSMAX && scale > 0 ? scale != UE8M0_NAN : tops_any(tops);
}

// decoded values as words of floatX
__device__ __forceinline__ void tops_decode(uint32_t* words, const GroupTops* tops, uint32_t scale) {
    float v[GROUP];
    tops_values(v, tops);
    values_decode<GROUP>(v, scale);
    group_pack<floatX>(words, v);
}

// ---------------------------------------------------------------------------------------------------------------------
// rows: floatX (rows, K), 32 neighbouring groups a warp
//
// STAGES 2: the warp's next tile is on its way into one staging area while this one, from the other, is worked on.

#define SOURCE_STAGES (sizeof(floatX) == 2 ? 2 : 1)  // f32 tiles would take too much shared memory

// words: the lane's group of the tile at `first`. next: the tile after it
template <int STAGES>
__device__ __forceinline__ void rows_read(uint32_t* words, const QuantizeJob& job, uint32_t first, uint32_t next,
                                          uint32_t groups, uint4* stage, uint4* other) {
    const int N = GROUP_CHUNKS(floatX);
    if (STAGES == 1) {
        int count = (int)min(groups - first, (uint32_t)WARP_LANES);
        stage_read<N>(words, job.tensor + (size_t)first * GROUP, count * N, stage);
        return;
    }
    if (next < groups) {
        int count = (int)min(groups - next, (uint32_t)WARP_LANES);
        stage_prefetch<N>(other, job.tensor + (size_t)next * GROUP, count * N);
    }
    stage_commit();
    stage_wait<1>();
    stage_take<N>(words, stage);
}

template <ScaleRule RULE, Rounding ROUND, int STATS, int STAGES>
__global__ void __launch_bounds__(GROUP_THREADS, STATS ? 1 : 3)
    quantize_rows_kernel(const __grid_constant__ QuantizeJob job) {
    __shared__ uint4 stages[GROUP_WARPS][STAGES][STAGE_CHUNKS(floatX)];
    const int N = GROUP_CHUNKS(floatX);
    BaseUse use;
    if (!base_begin(job, &use)) {
        return;
    }
    Streams streams = job_streams(job);
    uint4 *stage = stages[threadIdx.x / WARP_LANES][0], *other = stages[threadIdx.x / WARP_LANES][STAGES - 1];
    uint32_t row_groups = job.cols / GROUP, groups = job.rows * row_groups, lane = threadIdx.x % WARP_LANES;
    uint32_t first = (blockIdx.x * GROUP_THREADS + threadIdx.x) / WARP_LANES * WARP_LANES;
    if (STAGES > 1 && first < groups) {
        int count = (int)min(groups - first, (uint32_t)WARP_LANES);
        stage_prefetch<N>(stage, job.tensor + (size_t)first * GROUP, count * N);
        stage_commit();
    }
    for (; first < groups; first += gridDim.x * GROUP_THREADS) {
        uint32_t words[GROUP_WORDS(floatX)], group = first + lane, mask;
        int count = (int)min(groups - first, (uint32_t)WARP_LANES);
        float v[GROUP];
        rows_read<STAGES>(words, job, first, first + gridDim.x * GROUP_THREADS, groups, stage, other);
        if (job.rotation == ROTATE_SIGNED) {
            uint32_t word = job_sign_word(job, streams.sign, group % row_groups);
            group_flip_signs<floatX>(words, signs_spread<floatX>(word));
        }
        group_unpack<floatX>(v, words);
        if (STATS) {
            group_quantize<RULE, ROUND, STATS>(job, v, &mask, CODE_UNIT, streams.round, (uint64_t)group * GROUP,
                                               group < groups);
            continue;
        }
        GroupTops tops;
        uint32_t scale = group_tops_where<RULE, ROUND>(
            group < groups, &tops, &mask, v, job.rotation, &job.keys, job.round_index + (uint64_t)group * (GROUP / 8),
            streams.round);
        if (group < groups) {
            tops_store(job, &tops, group, scale, mask);
            if (job.base && tops_counts<RULE>(&tops, scale)) {
                base_count(&use, job, scale);
            }
        }
        if (job.operand && job.carrier != FORMAT_FLOATX) {
            uint32_t bytes[GROUP / 4];
            tops_carry(bytes, &tops, scale, use.base, job.carrier);
            stage_write<2>((uint8_t*)job.operand + (size_t)first * GROUP, bytes, count * 2, stage);
        } else if (job.operand) {
            tops_decode(words, &tops, scale);
            stage_write<N>((floatX*)job.operand + (size_t)first * GROUP, words, count * N, stage);
        }
        uint4* taken = stage;
        stage = other;
        other = taken;
    }
    base_end(job, &use);
}

// ---------------------------------------------------------------------------------------------------------------------
// columns: floatX (K, rows), the operand's row is the source's column. A warp has 32 tokens and, with 4 bytes a lane
// and token, 64 columns (bf16), each lane two neighbours; the 4 warps of a block have successive blocks of tokens, so
// that the lines of the operand become full. STAGES 2, for widths in whole chunks: as of the rows.

#define COLUMN_LANE (4 / (int)sizeof(floatX))  // columns of a lane
#define COLUMN_WARP (WARP_LANES * COLUMN_LANE)
#define COLUMN_BLOCKS 4  // of 32 tokens: the warps of a block
#define COLUMN_THREADS (COLUMN_BLOCKS * WARP_LANES)
#define COLUMN_CHUNKS (WARP_LANES * 4 / 16)  // of a token

// word k: the lane's columns of token k, missing ones zero. Odd widths have no 4-byte alignment.
__device__ __forceinline__ void columns_load(uint32_t* words, const floatX* at, uint32_t width, int valid) {
    if (valid == COLUMN_LANE && width % COLUMN_LANE == 0) {
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            words[k] = *(const uint32_t*)at;
            at += width;
        }
    } else {
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            const floatX* token = at + (size_t)k * width;
            uint32_t first = valid > 0 ? f32_bits(floatX_to_f32(token[0])) : 0;
            uint32_t second = valid > 1 ? f32_bits(floatX_to_f32(token[COLUMN_LANE - 1])) : 0;
            words[k] = COLUMN_LANE == 1 ? first : first >> 16 | second;
        }
    }
}

// a warp's place: block of 32 tokens, first column, columns from there on, 0 where there is nothing to do
typedef struct { uint32_t block, row0; int count; } ColumnTile;

// tokens, across: the block's tile
__device__ __forceinline__ ColumnTile column_tile(const QuantizeJob& job, uint32_t tokens, uint32_t across) {
    uint32_t block = tokens * COLUMN_BLOCKS + threadIdx.x / WARP_LANES, row0 = across * COLUMN_WARP;
    return ColumnTile{block, row0, block < job.cols / GROUP ? (int)min(job.rows - row0, (uint32_t)COLUMN_WARP) : 0};
}

__device__ __forceinline__ void columns_prefetch(uint4* stage, const QuantizeJob& job, ColumnTile tile) {
    uint32_t lane = threadIdx.x % WARP_LANES, token = lane / COLUMN_CHUNKS, column = lane % COLUMN_CHUNKS * VEC;
    const floatX* from = job.tensor + ((size_t)tile.block * GROUP + token) * job.rows + tile.row0 + column;
    if ((int)column < tile.count) {
#pragma unroll
        for (int i = 0; i < COLUMN_CHUNKS; i++) {
            chunk_copy(&stage[lane + WARP_LANES * i], from);
            from += (size_t)(WARP_LANES / COLUMN_CHUNKS) * job.rows;
        }
    }
}

// words of the tile, from its staging area or from memory
template <int STAGES>
__device__ __forceinline__ void columns_read(uint32_t* words, const QuantizeJob& job, ColumnTile tile, int valid,
                                             const uint4* stage) {
    uint32_t lane = threadIdx.x % WARP_LANES;
    if (STAGES > 1) {
        __syncwarp();
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            words[k] = ((const uint32_t*)stage)[k * WARP_LANES + lane];
        }
        __syncwarp();
    } else {
        size_t at = (size_t)tile.block * GROUP * job.rows + tile.row0 + lane * COLUMN_LANE;
        columns_load(words, job.tensor + at, job.rows, valid);
    }
}

// the sign bits of the tile's 4 * 32 tokens, as masks of a word
__device__ __forceinline__ void columns_signs(uint32_t* masks, const QuantizeJob& job, uint64_t stream,
                                              uint32_t first_block) {
    __syncthreads();
    uint32_t word = 0, minus = COLUMN_LANE == 2 ? 0x80008000u : 0x80000000u;
    if (job.rotation == ROTATE_SIGNED) {
        word = job_sign_word(job, stream, first_block + threadIdx.x / GROUP);
    }
    masks[threadIdx.x] = word >> threadIdx.x % GROUP & 1u ? minus : 0u;
    __syncthreads();
}

// column h of the lane, `row` of the operand: quantized and stored, but for bytes, which go to the staging area
template <ScaleRule RULE, Rounding ROUND, int STATS>
__device__ __forceinline__ void column_quantize(const QuantizeJob& job, BaseUse* use, float* v, uint32_t row, int h,
                                                uint32_t block, uint64_t round_stream, int valid, uint4* stage) {
    size_t element = (size_t)row * job.cols + (size_t)block * GROUP;
    uint32_t mask;
    GroupTops tops;
    if (STATS) {
        group_quantize<RULE, ROUND, STATS>(job, v, &mask, CODE_UNIT, round_stream, element, valid);
        return;
    }
    uint32_t scale = group_tops_where<RULE, ROUND>(valid, &tops, &mask, v, job.rotation, &job.keys,
                                                   job.round_index + element / 8, round_stream);
    if (valid) {
        tops_store(job, &tops, element / GROUP, scale, mask);
        if (job.base && tops_counts<RULE>(&tops, scale)) {
            base_count(use, job, scale);
        }
    }
    if (job.carrier != FORMAT_FLOATX) {
        uint32_t bytes[GROUP / 4];
        int at = 2 * (COLUMN_LANE * (threadIdx.x % WARP_LANES) + h);
        tops_carry(bytes, &tops, scale, use->base, job.carrier);
        stage[stage_index(at)] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
        stage[stage_index(at + 1)] = make_uint4(bytes[4], bytes[5], bytes[6], bytes[7]);
    } else if (job.operand && valid) {
        uint32_t words[GROUP_WORDS(floatX)];
        tops_decode(words, &tops, scale);
        uint4* to = (uint4*)((floatX*)job.operand + element);
#pragma unroll
        for (int i = 0; i < GROUP_CHUNKS(floatX); i++) {
            to[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
        }
    }
}

// the rows of the tile in the operand, 32 bytes each, from the staging area
__device__ __forceinline__ void columns_store(const QuantizeJob& job, ColumnTile tile, const uint4* stage) {
    int lane = threadIdx.x % WARP_LANES;
    uint8_t* to = (uint8_t*)job.operand + (size_t)(tile.row0 + lane / 2) * job.cols + (size_t)tile.block * GROUP +
                  lane % 2 * 16;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2 * COLUMN_LANE; i++) {
        int q = lane + WARP_LANES * i;
        if (q < 2 * tile.count) {
            *(uint4*)to = stage[stage_index(q)];
        }
        to += (size_t)(WARP_LANES / 2) * job.cols;
    }
    __syncwarp();
}

template <ScaleRule RULE, Rounding ROUND, int STATS, int STAGES>
__global__ void __launch_bounds__(COLUMN_THREADS, STATS ? 1 : ROUND == ROUND_STOCHASTIC || STAGES == 1 ? 4 : 5)
    quantize_columns_kernel(const __grid_constant__ QuantizeJob job) {
    __shared__ uint4 stages[COLUMN_BLOCKS][STAGES][STAGES > 1 ? GROUP * COLUMN_CHUNKS : 2 * COLUMN_WARP];
    __shared__ __align__(16) uint32_t masks[COLUMN_BLOCKS][GROUP];
    BaseUse use;
    if (!base_begin(job, &use)) {
        return;
    }
    Streams streams = job_streams(job);
    uint32_t warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES, blocks = job.cols / GROUP;
    uint32_t tiles_across = (job.rows + COLUMN_WARP - 1) / COLUMN_WARP;
    uint64_t tiles = (uint64_t)((blocks + COLUMN_BLOCKS - 1) / COLUMN_BLOCKS) * tiles_across;
    uint32_t begin = (uint32_t)(tiles * blockIdx.x / gridDim.x), end = (uint32_t)(tiles * (blockIdx.x + 1) / gridDim.x);
    uint32_t tokens = begin / tiles_across, across = begin % tiles_across;
    uint32_t signs_of = ~0u;  // of neighbouring tiles: they share the tokens
    if (STAGES > 1 && begin < end) {
        columns_prefetch(stages[warp][(end - begin) % STAGES], job, column_tile(job, tokens, across));
        stage_commit();
    }
    for (uint32_t left = end - begin; left > 0; left--) {
        uint4 *stage = stages[warp][left % STAGES], *other = stages[warp][(left - 1) % STAGES];
        ColumnTile tile = column_tile(job, tokens, across);
        if (tokens != signs_of) {
            columns_signs(masks[0], job, streams.sign, tokens * COLUMN_BLOCKS);
            signs_of = tokens;
        }
        across = across + 1 < tiles_across ? across + 1 : 0;
        tokens += across == 0;
        if (STAGES > 1) {
            if (left > 1) {
                columns_prefetch(other, job, column_tile(job, tokens, across));
            }
            stage_commit();
            stage_wait<1>();
        }
        if (tile.count == 0) {  // for the whole warp
            continue;
        }
        int valid = max(0, min(COLUMN_LANE, tile.count - (int)lane * COLUMN_LANE));
        uint32_t words[GROUP];
        columns_read<STAGES>(words, job, tile, valid, stage);
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            words[k] ^= masks[warp][k];
        }
#pragma unroll
        for (int h = 0; h < COLUMN_LANE; h++) {
            float v[GROUP];
#pragma unroll
            for (int k = 0; k < GROUP; k++) {
                v[k] = f32_from_bits(h + 1 < COLUMN_LANE ? words[k] << 16
                                     : COLUMN_LANE == 2  ? words[k] & 0xffff0000u
                                                         : words[k]);
            }
            column_quantize<RULE, ROUND, STATS>(job, &use, v, tile.row0 + lane * COLUMN_LANE + h, h, tile.block,
                                                streams.round, h < valid, stage);
        }
        if (!STATS && job.operand && job.carrier != FORMAT_FLOATX) {
            columns_store(job, tile, stage);
        }
    }
    base_end(job, &use);
}
