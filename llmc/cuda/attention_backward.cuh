// cuda/attention_backward.cuh: causal attention backward on tensor cores, deterministic.
//
// Two passes, each of which owns its outputs, so that no sum crosses blocks: no atomics, one order of addition. In both
// a block keeps ROWS rows of two matrices X, Y and walks over tiles of COLS rows of two others A, B (row i of the
// block, column j of a tile):
//   S = X A^T;  P = exp(scale S - lse);  dP = Y B^T;  dS = P (dP - delta);  acc1 += dS A;  acc2 += P B
//               X  Y    A  B    rows     columns   results
//   PASS_DQ     Q  dO   K  V    queries  keys      dQ = scale acc1
//   PASS_DKV    K  V    Q  dO   keys     queries   dK = scale acc1, dV = acc2, over all query heads of the group
// delta = sum(dO * O) and lse belong to queries: to rows in the first pass, to columns in the second. S and dP are
// computed twice, 7 products where an accumulation of dQ across blocks would need 5; but that one writes and reads dQ
// in f32 for every tile of keys, needs an order of blocks to be deterministic, and must hand dS through shared memory,
// which here stays in registers.
//
// -delta and lse log2(e) are laid out by a first kernel as (B, NH, T rounded up to 128) with 0 and +inf past T: P of
// such a query is 0. The sum for dP - delta starts from -delta. The only other mask is causality, in the tiles that
// hold the diagonal. This file has what both generations share and the mma.sync kernel: 8 warps x 16 rows, A and B
// double-buffered by cp.async, at most 98 KB. attention_backward_wgmma.cuh is for sm_90a.
#pragma once
#include "attention_tiles.cuh"
#ifndef PRECISION_FP32

enum BackwardPass { PASS_DQ, PASS_DKV };

#define STATISTICS_ROWS 128  // T is rounded up to it: a multiple of every ROWS and COLS
#define DELTA_ROWS 64        // a block of the delta kernel
#define DELTA_THREADS 256

// what the backward kernels read besides matrices; both (B, NH, T_padded)
typedef struct {
    const float *lse_log2, *minus_delta;
    int T_padded;
} BackwardStatistics;

template <int HS>
__global__ void __launch_bounds__(DELTA_THREADS)
    attention_delta_kernel(float* lse_log2, float* minus_delta, const floatX* dout, const floatX* out, const float* lse,
                           AttentionShape s, int T_padded) {
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
            minus_delta[(size_t)head * T_padded + t] = -sum;
            lse_log2[(size_t)head * T_padded + t] = t < s.T ? lse[(size_t)head * s.T + t] * LOG2E : INFINITY;
        }
    }
}

// the tile of rows at that place of the order; head: the query head, or (PASS_DKV) the first one of the group
template <int PASS, int ROWS>
__device__ __forceinline__ RowTile backward_work(AttentionShape s, TileOrder order, int index) {
    RowTile work;
    int rank, head, heads = PASS == PASS_DQ ? s.NH : s.NKV;
    tile_decode(order, index, &rank, &head);
    work.b = head / heads;
    work.head = head % heads * (PASS == PASS_DQ ? 1 : s.NH / s.NKV);
    work.row0 = (PASS == PASS_DQ ? order.row_tiles - 1 - rank : rank) * ROWS;
    return work;
}

// What those rows walk over: `heads` query heads (1 in PASS_DQ), in each the tiles first .. end - 1
typedef struct { int heads, first, end; } BackwardWalk;

template <int PASS, int ROWS, int COLS>
__device__ __forceinline__ BackwardWalk backward_walk(AttentionShape s, int row0) {
    BackwardWalk w;
    w.heads = PASS == PASS_DQ ? 1 : s.NH / s.NKV;
    w.first = PASS == PASS_DQ ? 0 : row0 / COLS;
    w.end = ((PASS == PASS_DQ ? min(row0 + ROWS, s.T) : s.T) + COLS - 1) / COLS;
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

// s (16 rows, N): every element = the statistic of its row (PASS_DQ) or of its column, which lies in shared memory
template <int PASS, int N>
__device__ __forceinline__ void statistic_spread(float* s, const float* of_rows, const float* of_columns) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        float2 pair = PASS == PASS_DKV ? *(const float2*)(of_columns + i * 2) : make_float2(0.0f, 0.0f);
        s[i] = PASS == PASS_DQ ? of_rows[0] : pair.x;
        s[i + 1] = PASS == PASS_DQ ? of_rows[0] : pair.y;
        s[i + 2] = PASS == PASS_DQ ? of_rows[1] : pair.x;
        s[i + 3] = PASS == PASS_DQ ? of_rows[1] : pair.y;
    }
}

// s = P: exp2(s scale_log2 - lse), 0 where the key comes after the query; row, col: position of s[0]. lse: of the two
// rows (PASS_DQ), or of this thread's pairs of columns
template <int PASS, int N>
__device__ __forceinline__ void probabilities(float* s, const float* row_lse, const float2* column_lse,
                                              float scale_log2, int masked, int row, int col) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float lse = PASS == PASS_DQ ? row_lse[i / 2 % 2] : i % 2 ? column_lse[i / 4].y : column_lse[i / 4].x;
        s[i] = exp2_fast(fmaf(s[i], scale_log2, -lse));
    }
    if (masked) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            int r = row + (i & 2) * 4, c = col + i / 4 * 8 + i % 2;
            s[i] = (PASS == PASS_DQ ? c > r : r > c) ? 0.0f : s[i];
        }
    }
}

// this thread's pairs of columns out of shared memory, now: not where they are first used, behind a product
template <int N>
__device__ __forceinline__ void columns_load(float2* pairs, const float* columns) {
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        pairs[i] = *(const float2*)(columns + i * 8);
        asm volatile("" : "+f"(pairs[i].x), "+f"(pairs[i].y)::"memory");
    }
}

// dp = dS = P (dP - delta)
template <int N>
__device__ __forceinline__ void score_gradients(float* dp, const float* p) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        dp[i] *= p[i];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// mma.sync

template <int HS>
struct BackwardMma {
    static constexpr int ROWS = 128, COLS = HS == 64 ? 64 : 32, THREADS = 256;
    static constexpr int ROW_BYTES = ROWS * HS * 2, COL_BYTES = COLS * HS * 2;
    static constexpr int BYTES = 2 * ROW_BYTES + 4 * COL_BYTES + 4 * COLS * 4;  // X, Y, 2 x (A, B), 2 x (lse, delta)
};

// A head of queries (the first of a group in PASS_DKV), its key and value head and its part of dout, at t = 0
typedef struct {
    const floatX *q, *k, *v, *dout;
    size_t statistics;  // of that query head
    int width, out_width;  // strides
} BackwardHead;

__device__ __forceinline__ BackwardHead backward_head(const floatX* qkv, const floatX* dout, AttentionShape s,
                                                      int T_padded, RowTile work) {
    BackwardHead h;
    h.width = (s.NH + 2 * s.NKV) * s.HS;
    h.out_width = s.NH * s.HS;
    h.q = qkv + (size_t)work.b * s.T * h.width + (size_t)work.head * s.HS;
    h.k = qkv + (size_t)work.b * s.T * h.width + (size_t)(s.NH + work.head / (s.NH / s.NKV)) * s.HS;
    h.v = h.k + (size_t)s.NKV * s.HS;
    h.dout = dout + (size_t)work.b * s.T * h.out_width + (size_t)work.head * s.HS;
    h.statistics = ((size_t)work.b * s.NH + work.head) * T_padded;
    return h;
}

// start copying A and B, and in PASS_DKV their statistics, which are there after the next barrier
template <int HS, int PASS>
__device__ __forceinline__ void backward_mma_load(uint32_t a_tile, float* columns, BackwardHead h,
                                                  BackwardStatistics statistics, int head, int col0, int T) {
    typedef BackwardMma<HS> Tile;
    uint32_t b_tile = a_tile + Tile::COL_BYTES;
    if (PASS == PASS_DQ) {
        tile_copy<HS, Tile::COLS, Tile::THREADS>(a_tile, h.k, h.width, col0, T);
        tile_copy<HS, Tile::COLS, Tile::THREADS>(b_tile, h.v, h.width, col0, T);
    } else {
        tile_copy<HS, Tile::COLS, Tile::THREADS>(a_tile, h.q + (size_t)head * HS, h.width, col0, T);
        tile_copy<HS, Tile::COLS, Tile::THREADS>(b_tile, h.dout + (size_t)head * HS, h.out_width, col0, T);
        if (threadIdx.x < 2 * Tile::COLS) {
            const float* from = threadIdx.x < Tile::COLS ? statistics.lse_log2 : statistics.minus_delta;
            columns[threadIdx.x] =
                from[h.statistics + (size_t)head * statistics.T_padded + col0 + threadIdx.x % Tile::COLS];
        }
    }
}

template <int HS, int PASS>
__global__ void __launch_bounds__(BackwardMma<HS>::THREADS, 1)
    attention_backward_mma_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, BackwardStatistics statistics,
                                  AttentionShape s, TileOrder order, float scale) {
    typedef BackwardMma<HS> Tile;
    const int COLS = Tile::COLS;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    float* column_statistics =
        (float*)(attention_memory + 2 * Tile::ROW_BYTES + 4 * Tile::COL_BYTES);  // (stage, lse or delta, COLS)
    uint32_t x_tile = shared_address(attention_memory), y_tile = x_tile + Tile::ROW_BYTES;
    uint32_t stages = y_tile + Tile::ROW_BYTES;
    RowTile work = backward_work<PASS, Tile::ROWS>(s, order, blockIdx.x);
    BackwardWalk w = backward_walk<PASS, Tile::ROWS, COLS>(s, work.row0);
    BackwardHead h = backward_head(qkv, dout, s, statistics.T_padded, work);
    int lane = threadIdx.x % WARP_LANES, warp = threadIdx.x / WARP_LANES, row = work.row0 + warp * 16;
    int count = w.end - w.first, steps = w.heads * count;

    tile_copy<HS, Tile::ROWS, Tile::THREADS>(x_tile, PASS == PASS_DQ ? h.q : h.k, h.width, work.row0, s.T);
    tile_copy<HS, Tile::ROWS, Tile::THREADS>(y_tile, PASS == PASS_DQ ? h.dout : h.v,
                                             PASS == PASS_DQ ? h.out_width : h.width, work.row0, s.T);
    float acc1[HS / 2], acc2[PASS == PASS_DKV ? HS / 2 : 2], scores[COLS / 2], dp[COLS / 2],
        row_lse[2] = {0, 0}, row_minus_delta[2] = {0, 0};
    float2 column_lse[PASS == PASS_DKV ? COLS / 8 : 1];
    uint32_t packed[COLS / 4];
    fragment_zero<HS>(acc1);
    if constexpr (PASS == PASS_DKV) {
        fragment_zero<HS>(acc2);
    }
    for (int r = 0; PASS == PASS_DQ && r < 2; r++) {
        row_lse[r] = statistics.lse_log2[h.statistics + row + lane / 4 + 8 * r];
        row_minus_delta[r] = statistics.minus_delta[h.statistics + row + lane / 4 + 8 * r];
    }
    // the first iteration only loads: what step i loads, step i + 1 reads
    for (int step = -1; step < steps; step++) {
        int next = step + 1, stage = step & 1, col0 = (w.first + (step < 0 ? 0 : step % count)) * COLS;
        copies_wait<0>();
        __syncthreads();  // this step's tiles are here, and nobody reads the other stage any more
        if (next < steps) {
            backward_mma_load<HS, PASS>(stages + (next & 1) * 2 * Tile::COL_BYTES,
                                        column_statistics + (next & 1) * 2 * COLS, h, statistics, next / count,
                                        (w.first + next % count) * COLS, s.T);
        }
        copies_commit();
        if (step < 0 || !tile_is_visible<PASS>(row, 16, col0, COLS)) {
            continue;
        }
        uint32_t a_tile = stages + stage * 2 * Tile::COL_BYTES, b_tile = a_tile + Tile::COL_BYTES;
        const float* columns = column_statistics + stage * 2 * COLS + lane % 4 * 2;
        if constexpr (PASS == PASS_DKV) {
            columns_load<COLS>(column_lse, columns);
        }
        fragment_zero<COLS>(scores);
        warp_product_transposed<COLS, HS>(scores, x_tile, warp * 16, a_tile);
        statistic_spread<PASS, COLS>(dp, row_minus_delta, columns + COLS);
        warp_product_transposed<COLS, HS>(dp, y_tile, warp * 16, b_tile);
        probabilities<PASS, COLS>(scores, row_lse, column_lse, scale * LOG2E, !tile_is_full<PASS>(row, 16, col0, COLS),
                                  row + lane / 4, col0 + lane % 4 * 2);
        if constexpr (PASS == PASS_DKV) {
            fragment_pack<COLS>(packed, scores);
            warp_product<COLS, HS>(acc2, packed, b_tile);
        }
        score_gradients<COLS>(dp, scores);
        fragment_pack<COLS>(packed, dp);
        warp_product<COLS, HS>(acc1, packed, a_tile);
    }
    fragment_store<HS>(dqkv + ((PASS == PASS_DQ ? h.q : h.k) - qkv), h.width, acc1, scale, scale, row + lane / 4, s.T);
    if constexpr (PASS == PASS_DKV) {
        fragment_store<HS>(dqkv + (h.v - qkv), h.width, acc2, 1.0f, 1.0f, row + lane / 4, s.T);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// launches

template <int HS>
static BackwardStatistics attention_delta(float* scratch, const floatX* dout, const floatX* out, const float* lse,
                                          AttentionShape s) {
    int T_padded = (int)round_up(s.T, STATISTICS_ROWS);
    float *lse_log2 = scratch, *minus_delta = scratch + (size_t)s.B * s.NH * T_padded;
    attention_delta_kernel<HS><<<s.B * s.NH*(T_padded / DELTA_ROWS), DELTA_THREADS, 0, gpu.stream>>>(
        lse_log2, minus_delta, dout, out, lse, s, T_padded);
    cuda_check_launch();
    BackwardStatistics statistics = {lse_log2, minus_delta, T_padded};
    return statistics;
}

// heads are those of queries in PASS_DQ, of keys in PASS_DKV; what is streamed is a K and V of a head, or all Q and dO
// of a group
template <int HS, int PASS>
static TileOrder backward_order(AttentionShape s, int rows) {
    size_t pair = (size_t)s.T * HS * 2 * sizeof(floatX);
    return PASS == PASS_DQ ? tile_order(s.T, rows, s.B * s.NH, pair * s.NKV / s.NH)
                           : tile_order(s.T, rows, s.B * s.NKV, pair * s.NH / s.NKV);
}

template <int HS, int PASS>
static void attention_backward_mma(floatX* dqkv, const floatX* dout, const floatX* qkv, BackwardStatistics statistics,
                                   AttentionShape s) {
    typedef BackwardMma<HS> Tile;
    TileOrder order = backward_order<HS, PASS>(s, Tile::ROWS);
    attention_backward_mma_kernel<HS, PASS><<<order.total, Tile::THREADS, Tile::BYTES, gpu.stream>>>(
        dqkv, dout, qkv, statistics, s, order, 1.0f / sqrtf((float)HS));
    cuda_check_launch();
}

template <int HS, int PASS>
static void attention_backward_mma_prepare(void) {
    cuda_check(cudaFuncSetAttribute(attention_backward_mma_kernel<HS, PASS>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, BackwardMma<HS>::BYTES));
}
#endif
