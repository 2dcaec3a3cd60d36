// cuda/attention_backward.cuh: causal attention backward on tensor cores, deterministic.
//
// Two passes, each of which owns its outputs, so that no sum crosses blocks: no atomics, one order of addition. In both a block keeps
// ROWS rows of two matrices X, Y and walks over tiles of COLS rows of two others A, B (row i of the block, column j of a tile):
//   S = X A^T;  P = exp(scale S - lse);  dP = Y B^T;  dS = P (dP - delta);  acc1 += dS A;  acc2 += P B
//               X  Y    A  B    rows     columns   results
//   PASS_DQ     Q  dO   K  V    queries  keys      dQ = scale acc1
//   PASS_DKV    K  V    Q  dO   keys     queries   dK = scale acc1, dV = acc2, over all query heads of the group
// delta = sum(dO * O) and lse belong to queries: to rows in the first pass, to columns in the second. S and dP are computed twice, 7
// products where an accumulation of dQ across blocks would need 5; but that one writes and reads dQ in f32 for every tile of keys, needs an
// order of blocks to be deterministic, and must hand dS through shared memory, which here stays in registers.
//
// delta and lse log2(e) are laid out by a first kernel as (B, NH, T rounded up to 128) with 0 and +inf past T: P of such a query is 0.
// Other masks: causality, in the tiles that hold the diagonal.
#pragma once
#include "attention_tiles.cuh"
#ifndef PRECISION_FP32

enum BackwardPass { PASS_DQ, PASS_DKV };

#define BACKWARD_ROWS 128
#define STATISTICS_ROWS 128  // T is rounded up to it: a multiple of every COLS
#define DELTA_ROWS 64        // a block of the delta kernel
#define DELTA_THREADS 256

// what the backward kernels read besides matrices; both (B, NH, T_padded)
typedef struct {
    const float *lse_log2, *delta;
    int T_padded;
} BackwardStatistics;

template <int HS>
__global__ void __launch_bounds__(DELTA_THREADS)
attention_delta_kernel(float* lse_log2, float* delta, const floatX* dout, const floatX* out, const float* lse, AttentionShape s, int T_padded) {
    const int LANES = HS / VEC;  // a row
    int tiles = T_padded / DELTA_ROWS, head = blockIdx.x / tiles, lane = threadIdx.x % LANES;
    for (int i = threadIdx.x / LANES; i < DELTA_ROWS; i += DELTA_THREADS / LANES) {
        int t = blockIdx.x % tiles * DELTA_ROWS + i;
        float sum = 0.0f;
        if (t < s.T) {
            size_t at = (((size_t)(head / s.NH) * s.T + t) * s.NH + head % s.NH) * HS + lane * VEC;
            Lanes<VEC> a = lanes_load<VEC>(dout + at), b = lanes_load<VEC>(out + at);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                sum += floatX_to_f32(a.v[j]) * floatX_to_f32(b.v[j]);
            }
        }
#pragma unroll
        for (int offset = LANES / 2; offset; offset /= 2) {
            sum += __shfl_xor_sync(FULL_WARP, sum, offset);
        }
        if (lane == 0) {
            delta[(size_t)head * T_padded + t] = sum;
            lse_log2[(size_t)head * T_padded + t] = t < s.T ? lse[(size_t)head * s.T + t] * LOG2E : INFINITY;
        }
    }
}

// the tile of rows at that place of the order; head: the query head, or (PASS_DKV) the first one of the group
template <int PASS>
__device__ __forceinline__ RowTile backward_work(AttentionShape s, TileOrder order, int index) {
    RowTile work;
    int rank, head, heads = PASS == PASS_DQ ? s.NH : s.NKV;
    tile_decode(order, index, &rank, &head);
    work.b = head / heads;
    work.head = head % heads * (PASS == PASS_DQ ? 1 : s.NH / s.NKV);
    work.row0 = (PASS == PASS_DQ ? order.row_tiles - 1 - rank : rank) * BACKWARD_ROWS;
    return work;
}

// What those rows walk over: `heads` query heads (1 in PASS_DQ), in each the tiles first .. end - 1
typedef struct { int heads, first, end; } BackwardWalk;

template <int PASS, int COLS>
__device__ __forceinline__ BackwardWalk backward_walk(AttentionShape s, int row0) {
    BackwardWalk w;
    w.heads = PASS == PASS_DQ ? 1 : s.NH / s.NKV;
    w.first = PASS == PASS_DQ ? 0 : row0 / COLS;
    w.end = ((PASS == PASS_DQ ? min(row0 + BACKWARD_ROWS, s.T) : s.T) + COLS - 1) / COLS;
    return w;
}

// Is any (row, column) of this tile visible to the 16 or 64 rows from `row`? Are all?
template <int PASS>
__device__ __forceinline__ int tile_is_visible(int row, int rows, int col, int cols) {
    return PASS == PASS_DQ ? col <= row + rows - 1 : col + cols - 1 >= row;
}
template <int PASS>
__device__ __forceinline__ int tile_is_full(int row, int rows, int col, int cols) {
    return PASS == PASS_DQ ? col + cols - 1 <= row : col >= row + rows - 1;
}

// s = P: exp2(s scale_log2 - lse), 0 where the key comes after the query; row, col: position of s[0]. lse: of the two rows (PASS_DQ),
// or of the columns, in shared memory
template <int PASS, int N>
__device__ __forceinline__ void probabilities(float* s, const float* row_lse, const float* column_lse, float scale_log2, int masked, int row,
                                              int col) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        float2 column = PASS == PASS_DKV ? *(const float2*)(column_lse + i * 2) : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float lse = PASS == PASS_DQ ? row_lse[j / 2] : j % 2 ? column.y : column.x;
            s[i + j] = exp2_fast(fmaf(s[i + j], scale_log2, -lse));
        }
    }
    if (masked) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            int r = row + (i & 2) * 4, c = col + i / 4 * 8 + i % 2;
            s[i] = (PASS == PASS_DQ ? c > r : r > c) ? 0.0f : s[i];
        }
    }
}

// dp = dS = P (dP - delta), with delta like lse above
template <int PASS, int N>
__device__ __forceinline__ void score_gradients(float* dp, const float* p, const float* row_delta, const float* column_delta) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        float2 column = PASS == PASS_DKV ? *(const float2*)(column_delta + i * 2) : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float delta = PASS == PASS_DQ ? row_delta[j / 2] : j % 2 ? column.y : column.x;
            dp[i + j] = p[i + j] * (dp[i + j] - delta);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// mma.sync: 8 warps x 16 rows, A and B double-buffered by cp.async, at most 98 KB

template <int HS>
struct BackwardMma {
    static constexpr int COLS = HS == 64 ? 64 : 32, THREADS = 256;
    static constexpr int ROW_BYTES = BACKWARD_ROWS * HS * 2, COL_BYTES = COLS * HS * 2;
    static constexpr int BYTES = 2 * ROW_BYTES + 4 * COL_BYTES + 4 * COLS * 4;  // X, Y, 2 x (A, B), 2 x (lse, delta)
};

template <int HS, int PASS>
__global__ void __launch_bounds__(BackwardMma<HS>::THREADS, 1)
attention_backward_mma_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, BackwardStatistics statistics, AttentionShape s,
                              TileOrder order, float scale) {
    typedef BackwardMma<HS> Tile;
    const int COLS = Tile::COLS;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    float* column_statistics = (float*)(attention_memory + 2 * Tile::ROW_BYTES + 4 * Tile::COL_BYTES);  // (stage, lse or delta, COLS)
    uint32_t x_tile = shared_address(attention_memory), y_tile = x_tile + Tile::ROW_BYTES, stages = y_tile + Tile::ROW_BYTES;
    RowTile work = backward_work<PASS>(s, order, blockIdx.x);
    BackwardWalk w = backward_walk<PASS, Tile::COLS>(s, work.row0);
    int width = (s.NH + 2 * s.NKV) * HS, out_width = s.NH * HS, lane = threadIdx.x % WARP_LANES, warp = threadIdx.x / WARP_LANES;
    const floatX* q = qkv + (size_t)work.b * s.T * width + (size_t)work.head * HS;
    const floatX* k = qkv + (size_t)work.b * s.T * width + (size_t)(s.NH + work.head / (s.NH / s.NKV)) * HS;
    const floatX* d = dout + (size_t)work.b * s.T * out_width + (size_t)work.head * HS;
    const floatX* v = k + (size_t)s.NKV * HS;
    size_t statistics_at = ((size_t)work.b * s.NH + work.head) * statistics.T_padded;
    int row = work.row0 + warp * 16, count = w.end - w.first, steps = w.heads * count;

    tile_copy<HS, BACKWARD_ROWS, Tile::THREADS>(x_tile, PASS == PASS_DQ ? q : k, width, work.row0, s.T);
    tile_copy<HS, BACKWARD_ROWS, Tile::THREADS>(y_tile, PASS == PASS_DQ ? d : v, PASS == PASS_DQ ? out_width : width, work.row0, s.T);
    float acc1[HS / 2], acc2[PASS == PASS_DKV ? HS / 2 : 2], scores[COLS / 2], dp[COLS / 2], row_lse[2] = {0, 0}, row_delta[2] = {0, 0};
    uint32_t packed[COLS / 4];
    fragment_zero<HS>(acc1);
    if (PASS == PASS_DKV) {
        fragment_zero<HS>(acc2);
    } else {
        for (int r = 0; r < 2; r++) {
            row_lse[r] = statistics.lse_log2[statistics_at + row + lane / 4 + 8 * r];
            row_delta[r] = statistics.delta[statistics_at + row + lane / 4 + 8 * r];
        }
    }
    // the first iteration only loads: what step i loads, step i + 1 reads
    for (int step = -1; step < steps; step++) {
        int next = step + 1, stage = step & 1;
        copies_wait<0>();
        __syncthreads();  // this step's tiles are here, and nobody reads the other stage any more
        if (next < steps) {
            int head = next / count, col0 = (w.first + next % count) * COLS;
            uint32_t a_tile = stages + (next & 1) * 2 * Tile::COL_BYTES, b_tile = a_tile + Tile::COL_BYTES;
            if (PASS == PASS_DQ) {
                tile_copy<HS, Tile::COLS, Tile::THREADS>(a_tile, k, width, col0, s.T);
                tile_copy<HS, Tile::COLS, Tile::THREADS>(b_tile, v, width, col0, s.T);
            } else {
                tile_copy<HS, Tile::COLS, Tile::THREADS>(a_tile, q + (size_t)head * HS, width, col0, s.T);
                tile_copy<HS, Tile::COLS, Tile::THREADS>(b_tile, d + (size_t)head * HS, out_width, col0, s.T);
                if (threadIdx.x < 2 * COLS) {
                    const float* from = threadIdx.x < COLS ? statistics.lse_log2 : statistics.delta;
                    column_statistics[(next & 1) * 2 * COLS + threadIdx.x] =
                        from[statistics_at + (size_t)head * statistics.T_padded + col0 + threadIdx.x % COLS];
                }
            }
        }
        copies_commit();
        int col0 = (w.first + (step < 0 ? 0 : step % count)) * COLS;
        if (step < 0 || !tile_is_visible<PASS>(row, 16, col0, COLS)) {
            continue;
        }
        uint32_t a_tile = stages + stage * 2 * Tile::COL_BYTES, b_tile = a_tile + Tile::COL_BYTES;
        const float* columns = column_statistics + stage * 2 * COLS + lane % 4 * 2;
        warp_product_transposed<Tile::COLS, HS>(scores, x_tile, warp * 16, a_tile);
        warp_product_transposed<Tile::COLS, HS>(dp, y_tile, warp * 16, b_tile);
        probabilities<PASS, Tile::COLS>(scores, row_lse, columns, scale * LOG2E, !tile_is_full<PASS>(row, 16, col0, COLS), row + lane / 4,
                                        col0 + lane % 4 * 2);
        if (PASS == PASS_DKV) {
            fragment_pack<Tile::COLS>(packed, scores);
            warp_product<Tile::COLS, HS>(acc2, packed, b_tile);
        }
        score_gradients<PASS, Tile::COLS>(dp, scores, row_delta, columns + COLS);
        fragment_pack<Tile::COLS>(packed, dp);
        warp_product<Tile::COLS, HS>(acc1, packed, a_tile);
    }
    size_t to = (size_t)(PASS == PASS_DQ ? q - qkv : k - qkv);
    fragment_store<HS>(dqkv + to, width, acc1, scale, scale, row + lane / 4, s.T);
    if (PASS == PASS_DKV) {
        fragment_store<HS>(dqkv + (size_t)(v - qkv), width, acc2, 1.0f, 1.0f, row + lane / 4, s.T);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: one warpgroup feeds X, Y and a ring of (A, B) through the copy engine; two compute 64 rows each. Blocks stay on their SM.

template <int HS, int PASS>
struct BackwardTile {
    // registers: acc1, acc2 (HS/2 each), S and dP (COLS/2 each), packed P and dS (COLS/4 each) must leave some 20 of 240
    static constexpr int GROUPS = 2, COLS = PASS == PASS_DKV ? 64 : 128, STAGES = PASS == PASS_DKV ? (HS == 64 ? 4 : 3) : (HS == 64 ? 3 : 2);
    static constexpr int OUTPUTS = PASS == PASS_DKV ? 2 : 1, THREADS = WARPGROUP * (GROUPS + 1);
    static constexpr int ROW_BYTES = BACKWARD_ROWS * HS * 2, COL_BYTES = COLS * HS * 2;
    // lse and delta: of each warpgroup's rows, or of each stage's columns
    static constexpr int STATISTICS = PASS == PASS_DKV ? COLS : 64, STATISTICS_SETS = PASS == PASS_DKV ? STAGES : GROUPS;
    static constexpr int BARRIERS = 2 * GROUPS + 2 * STAGES;
    // X, Y, ring of (A, B), staging of the outputs; 1024: to align
    static constexpr int BYTES = (2 + OUTPUTS) * ROW_BYTES + STAGES * 2 * COL_BYTES + STATISTICS_SETS * STATISTICS * 8 + GROUPS * (int)sizeof(RowTile) +
                                 BARRIERS * 8 + 1024;
    // a stage is held while a later one is skipped
    static_assert(COLS == 128 || STAGES >= 3, "");
};

// rows_full, rows_empty: one barrier a warpgroup, so that one may end a tile while the other begins the next
typedef struct {
    uint32_t x, y, staging, ring, statistics, work;
    uint32_t rows_full, rows_empty, ring_full, ring_empty;
} BackwardMemory;

template <int HS, int PASS>
__device__ __forceinline__ BackwardMemory backward_memory(unsigned char* memory) {
    typedef BackwardTile<HS, PASS> Tile;
    BackwardMemory m;
    m.x = (shared_address(memory) + 1023u) & ~1023u;
    m.y = m.x + Tile::ROW_BYTES;
    m.staging = m.y + Tile::ROW_BYTES;
    m.ring = m.staging + Tile::OUTPUTS * Tile::ROW_BYTES;
    m.statistics = m.ring + Tile::STAGES * 2 * Tile::COL_BYTES;
    m.work = m.statistics + Tile::STATISTICS_SETS * Tile::STATISTICS * 8;
    m.rows_full = m.work + Tile::GROUPS * sizeof(RowTile);
    m.rows_empty = m.rows_full + 8 * Tile::GROUPS;
    m.ring_full = m.rows_empty + 8 * Tile::GROUPS;
    m.ring_empty = m.ring_full + 8 * Tile::STAGES;
    return m;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// one thread: X and Y
template <int HS, int PASS>
__device__ __forceinline__ void backward_produce_rows(const CUtensorMap* qkv_map, const CUtensorMap* dout_map, BackwardMemory m,
                                                      BackwardStatistics statistics, AttentionShape s, TileOrder order) {
    typedef BackwardTile<HS, PASS> Tile;
    for (int wave = 0; tile_of_wave(wave) < order.total; wave++) {
        RowTile work = backward_work<PASS>(s, order, tile_of_wave(wave));
        int kv = work.head / (s.NH / s.NKV), k_column = (s.NH + kv) * HS, v_column = k_column + s.NKV * HS, q_column = work.head * HS;
        size_t from = ((size_t)work.b * s.NH + work.head) * statistics.T_padded + work.row0;
        for (int group = 0; group < Tile::GROUPS; group++) {
            uint32_t full = m.rows_full + group * 8, part = group * 64 * SLAB_ROW_BYTES, to = m.statistics + group * Tile::STATISTICS * 8;
            barrier_wait(m.rows_empty + group * 8, ~wave & 1);
            row_tile_pass(m.work + group * sizeof(RowTile), work);
            barrier_expect(full, 2 * 64 * HS * 2 + (PASS == PASS_DQ ? 64 * 8 : 0));
            for (int slab = 0; slab < HS / SLAB; slab++) {
                uint32_t at = part + slab * BACKWARD_ROWS * SLAB_ROW_BYTES;
                int row = work.row0 + group * 64, column = slab * SLAB;
                box_load(m.x + at, qkv_map, full, (PASS == PASS_DQ ? q_column : k_column) + column, row, work.b);
                box_load(m.y + at, PASS == PASS_DQ ? dout_map : qkv_map, full, (PASS == PASS_DQ ? q_column : v_column) + column, row, work.b);
            }
            if (PASS == PASS_DQ) {
                run_load(to, statistics.lse_log2 + from + group * 64, 64 * 4, full);
                run_load(to + 64 * 4, statistics.delta + from + group * 64, 64 * 4, full);
            }
        }
    }
}

// one thread: A and B
template <int HS, int PASS>
__device__ __forceinline__ void backward_produce_columns(const CUtensorMap* qkv_map, const CUtensorMap* dout_map, BackwardMemory m,
                                                         BackwardStatistics statistics, AttentionShape s, TileOrder order) {
    typedef BackwardTile<HS, PASS> Tile;
    RingPosition ring = {0, 0};
    for (int wave = 0; tile_of_wave(wave) < order.total; wave++) {
        RowTile work = backward_work<PASS>(s, order, tile_of_wave(wave));
        BackwardWalk w = backward_walk<PASS, Tile::COLS>(s, work.row0);
        int k_column = (s.NH + work.head / (s.NH / s.NKV)) * HS, v_column = k_column + s.NKV * HS;
#pragma unroll 1
        for (int head = work.head; head < work.head + w.heads; head++) {
            size_t from = ((size_t)work.b * s.NH + head) * statistics.T_padded;
#pragma unroll 1
            for (int tile = w.first; tile < w.end; tile++) {
                uint32_t full = m.ring_full + ring.stage * 8, a = m.ring + ring.stage * 2 * Tile::COL_BYTES, b = a + Tile::COL_BYTES;
                barrier_wait(m.ring_empty + ring.stage * 8, ring.phase ^ 1);
                barrier_expect(full, 2 * Tile::COL_BYTES + (PASS == PASS_DKV ? Tile::COLS * 8 : 0));
                tile_copy_boxes<Tile::COLS, HS>(a, qkv_map, full, PASS == PASS_DQ ? k_column : head * HS, tile * Tile::COLS, work.b);
                tile_copy_boxes<Tile::COLS, HS>(b, PASS == PASS_DQ ? qkv_map : dout_map, full, PASS == PASS_DQ ? v_column : head * HS,
                                                tile * Tile::COLS, work.b);
                if (PASS == PASS_DKV) {
                    uint32_t to = m.statistics + ring.stage * Tile::STATISTICS * 8;
                    run_load(to, statistics.lse_log2 + from + tile * Tile::COLS, Tile::COLS * 4, full);
                    run_load(to + Tile::COLS * 4, statistics.delta + from + tile * Tile::COLS, Tile::COLS * 4, full);
                }
                ring_next<Tile::STAGES>(&ring);
            }
        }
    }
}

// where a warpgroup stands: 64 rows from `row` against a tile of columns
typedef struct {
    int head, tile, row, group;
    BackwardWalk walk;
    RingPosition ring;
} BackwardStep;

// From the step before on to the next one that these rows see, and wait for its A, B; 0 if there is none. ring stays behind the last one read.
template <int HS, int PASS>
__device__ __forceinline__ int backward_advance(BackwardStep* step, BackwardMemory m) {
    typedef BackwardTile<HS, PASS> Tile;
#pragma unroll 1
    for (;;) {
        if (++step->tile >= step->walk.end) {
            step->tile = step->walk.first;
            step->head++;
        }
        if (step->head >= step->walk.heads) {
            return 0;
        }
        ring_next<Tile::STAGES>(&step->ring);
        barrier_wait(m.ring_full + step->ring.stage * 8, step->ring.phase);
        if (tile_is_visible<PASS>(step->row, 64, step->tile * Tile::COLS, Tile::COLS)) {
            return 1;
        }
        if (threadIdx.x % WARP_LANES == 0) {
            barrier_arrive(m.ring_empty + step->ring.stage * 8);
        }
    }
}

// start s (64, COLS) = 64 rows of x . A^T or y . B^T
template <int HS, int PASS>
__device__ __forceinline__ void backward_scores(float* s, uint32_t rows, uint32_t columns, int group) {
    typedef BackwardTile<HS, PASS> Tile;
    products_begin();
    group_product_transposed<Tile::COLS, HS, BACKWARD_ROWS>(s, tile_descriptor(rows + group * 64 * SLAB_ROW_BYTES, BACKWARD_ROWS * SLAB_ROW_BYTES),
                                                            tile_descriptor(columns, Tile::COLS * SLAB_ROW_BYTES));
    products_commit();
}

// All steps of a tile of rows of a warpgroup, whose X and Y have come. The last products of a step still run while the next one's begin, so
// a stage is given back one step late.
template <int HS, int PASS>
__device__ __forceinline__ void backward_consume(float* acc1, float* acc2, BackwardStep* step, BackwardMemory m, const float* statistics,
                                                 float scale_log2) {
    typedef BackwardTile<HS, PASS> Tile;
    const int COLS = Tile::COLS;
    int lane = threadIdx.x % WARP_LANES, leader = lane == 0, warp_row = threadIdx.x % WARPGROUP / WARP_LANES * 16 + lane / 4, reading = -1;
    float scores[COLS / 2], dp[COLS / 2], row_lse[2] = {0, 0}, row_delta[2] = {0, 0};
    uint32_t packed_p[PASS == PASS_DKV ? COLS / 4 : 1], packed_ds[COLS / 4];
    for (int r = 0; PASS == PASS_DQ && r < 2; r++) {
        row_lse[r] = statistics[step->group * 2 * 64 + warp_row + 8 * r];
        row_delta[r] = statistics[step->group * 2 * 64 + 64 + warp_row + 8 * r];
    }
    step->head = 0;
    step->tile = step->walk.first - 1;
#pragma unroll 1
    while (backward_advance<HS, PASS>(step, m)) {
        int stage = step->ring.stage, col0 = step->tile * COLS;
        uint32_t a = m.ring + 2 * stage * Tile::COL_BYTES, b = a + Tile::COL_BYTES;
        const float* columns = statistics + (PASS == PASS_DKV ? stage * 2 * COLS + lane % 4 * 2 : 0);
        backward_scores<HS, PASS>(scores, m.x, a, step->group);
        products_wait<1>();  // all of the step before is done: its packed P and dS make room for dP
        registers_settle<COLS / 4>(packed_ds);
        if (leader && reading >= 0) {
            barrier_arrive(m.ring_empty + reading * 8);
        }
        reading = stage;
        backward_scores<HS, PASS>(dp, m.y, b, step->group);
        products_wait<1>();
        registers_settle<COLS / 2>(scores);
        probabilities<PASS, COLS>(scores, row_lse, columns, scale_log2, !tile_is_full<PASS>(step->row, 64, col0, COLS), step->row + warp_row,
                                  col0 + lane % 4 * 2);
        if constexpr (PASS == PASS_DKV) {
            registers_settle<COLS / 4>(packed_p);
            fragment_pack<COLS>(packed_p, scores);
            products_begin();
            group_product<COLS, HS>(acc2, packed_p, tile_descriptor(b, COLS * SLAB_ROW_BYTES));
            products_commit();
        }
        products_wait<PASS == PASS_DKV>();
        registers_settle<COLS / 2>(dp);
        score_gradients<PASS, COLS>(dp, scores, row_delta, columns + COLS);
        fragment_pack<COLS>(packed_ds, dp);
        products_begin();
        group_product<COLS, HS>(acc1, packed_ds, tile_descriptor(a, COLS * SLAB_ROW_BYTES));
        products_commit();
    }
    if (leader) {
        barrier_arrive(m.rows_empty + step->group * 8);
    }
    products_wait<0>();
    registers_settle<HS / 2>(acc1);
    if constexpr (PASS == PASS_DKV) {
        registers_settle<HS / 2>(acc2);
    }
    if (leader && reading >= 0) {
        barrier_arrive(m.ring_empty + reading * 8);
    }
}

template <int HS, int PASS>
__device__ __forceinline__ void backward_consume_all(const CUtensorMap* dqkv_map, BackwardMemory m, const float* statistics, AttentionShape s,
                                                     TileOrder order, int group, float scale) {
    typedef BackwardTile<HS, PASS> Tile;
    uint32_t staging = m.staging + group * 64 * HS * 2;
    float acc1[HS / 2], acc2[PASS == PASS_DKV ? HS / 2 : 2];
    BackwardStep step;
    step.group = group;
    step.ring = {Tile::STAGES - 1, 1};  // one before the first
    for (int wave = 0; tile_of_wave(wave) < order.total; wave++) {
        fragment_zero<HS>(acc1);
        if constexpr (PASS == PASS_DKV) {
            fragment_zero<HS>(acc2);
        }
        barrier_wait(m.rows_full + group * 8, wave & 1);
        RowTile work = row_tile_take(m.work + group * sizeof(RowTile));
        step.row = work.row0 + group * 64;
        step.walk = backward_walk<PASS, Tile::COLS>(s, work.row0);
        backward_consume<HS, PASS>(acc1, acc2, &step, m, statistics, scale * LOG2E);
        int column = PASS == PASS_DQ ? work.head * HS : (s.NH + work.head / (s.NH / s.NKV)) * HS;
        group_store<HS>(dqkv_map, staging, acc1, scale, scale, 1 + group, column, step.row, work.b);
        if constexpr (PASS == PASS_DKV) {
            group_store<HS>(dqkv_map, staging + Tile::ROW_BYTES, acc2, 1.0f, 1.0f, 1 + group, column + s.NKV * HS, step.row, work.b);
        }
    }
    stores_wait();
}
#endif

template <int HS, int PASS>
__global__ void __launch_bounds__(BackwardTile<HS, PASS>::THREADS, 1)
attention_backward_wgmma_kernel(const __grid_constant__ CUtensorMap dqkv_map, const __grid_constant__ CUtensorMap dout_map,
                                const __grid_constant__ CUtensorMap qkv_map, BackwardStatistics statistics, AttentionShape s,
                                TileOrder order, float scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef BackwardTile<HS, PASS> Tile;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    BackwardMemory m = backward_memory<HS, PASS>(attention_memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::GROUPS; i++) {
            barrier_init(m.rows_full + 8 * i, 1);
            barrier_init(m.rows_empty + 8 * i, 4);
        }
        for (int i = 0; i < Tile::STAGES; i++) {
            barrier_init(m.ring_full + 8 * i, 1);
            barrier_init(m.ring_empty + 8 * i, 4 * Tile::GROUPS);
        }
        async_proxy_fence();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            backward_produce_columns<HS, PASS>(&qkv_map, &dout_map, m, statistics, s, order);
        } else if (threadIdx.x == WARP_LANES) {
            backward_produce_rows<HS, PASS>(&qkv_map, &dout_map, m, statistics, s, order);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        int group = __shfl_sync(FULL_WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;  // uniform, for the compiler
        const float* statistics_memory = (const float*)(attention_memory + (m.statistics - shared_address(attention_memory)));
        backward_consume_all<HS, PASS>(&dqkv_map, m, statistics_memory, s, order, group, scale);
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// launches

template <int HS>
static BackwardStatistics attention_delta(float* scratch, const floatX* dout, const floatX* out, const float* lse, AttentionShape s) {
    int T_padded = (int)round_up(s.T, STATISTICS_ROWS);
    float *lse_log2 = scratch, *delta = scratch + (size_t)s.B * s.NH * T_padded;
    attention_delta_kernel<HS><<<s.B * s.NH * (T_padded / DELTA_ROWS), DELTA_THREADS, 0, gpu.stream>>>(lse_log2, delta, dout, out, lse, s, T_padded);
    cuda_check_launch();
    BackwardStatistics statistics = {lse_log2, delta, T_padded};
    return statistics;
}

// heads are those of queries in PASS_DQ, of keys in PASS_DKV; what is streamed is a K and V of a head, or all Q and dO of a group
template <int HS, int PASS>
static TileOrder backward_order(AttentionShape s) {
    size_t pair = (size_t)s.T * HS * 2 * sizeof(floatX);
    return PASS == PASS_DQ ? tile_order(s.T, BACKWARD_ROWS, s.B * s.NH, pair * s.NKV / s.NH)
                           : tile_order(s.T, BACKWARD_ROWS, s.B * s.NKV, pair * s.NH / s.NKV);
}

template <int HS, int PASS>
static void attention_backward_mma(floatX* dqkv, const floatX* dout, const floatX* qkv, BackwardStatistics statistics, AttentionShape s) {
    typedef BackwardMma<HS> Tile;
    TileOrder order = backward_order<HS, PASS>(s);
    attention_backward_mma_kernel<HS, PASS><<<order.total, Tile::THREADS, Tile::BYTES, gpu.stream>>>(dqkv, dout, qkv, statistics, s, order,
                                                                                                       1.0f / sqrtf((float)HS));
    cuda_check_launch();
}

template <int HS, int PASS>
static void attention_backward_wgmma(floatX* dqkv, const floatX* dout, const floatX* qkv, BackwardStatistics statistics, AttentionShape s,
                                     TensorMapEncode encode) {
    typedef BackwardTile<HS, PASS> Tile;
    TileOrder order = backward_order<HS, PASS>(s);
    int width = (s.NH + 2 * s.NKV) * HS;
    CUtensorMap dqkv_map = tensor_map(encode, dqkv, s.B, s.T, width), dout_map = tensor_map(encode, dout, s.B, s.T, s.NH * HS);
    CUtensorMap qkv_map = tensor_map(encode, qkv, s.B, s.T, width);
    attention_backward_wgmma_kernel<HS, PASS><<<min_int(gpu.sm_count, order.total), Tile::THREADS, Tile::BYTES, gpu.stream>>>(
        dqkv_map, dout_map, qkv_map, statistics, s, order, 1.0f / sqrtf((float)HS));
    cuda_check_launch();
}

template <int HS, int PASS>
static void attention_backward_prepare(int wgmma) {
    cuda_check(cudaFuncSetAttribute(attention_backward_mma_kernel<HS, PASS>, cudaFuncAttributeMaxDynamicSharedMemorySize, BackwardMma<HS>::BYTES));
    if (wgmma) {
        cuda_check(cudaFuncSetAttribute(attention_backward_wgmma_kernel<HS, PASS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        BackwardTile<HS, PASS>::BYTES));
    }
}
#endif
