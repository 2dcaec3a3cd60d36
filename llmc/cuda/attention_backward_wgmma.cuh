// cuda/attention_backward_wgmma.cuh: the two passes of attention_backward.cuh on wgmma and the copy engine (sm_90a).
//
// Blocks stay on their SM and take tile of rows after tile of rows. Two threads feed them: one X and Y of the next
// tile, as soon as a warpgroup has done its last S and dP, and one a ring of (A, B, in PASS_DKV also lse and delta),
// which runs on across tiles. Two warpgroups compute 64 rows each; they take turns at starting S and dP, so that one's
// products run during the other's exponentials. In a step
//   S = X A^T and dP = Y B^T start;  P while dP runs;  acc2 += P B starts;  dS while that runs;  acc1 += dS A starts,
//   and runs into the next step
// What a step reads from shared memory besides matrices is loaded before the products it would otherwise wait behind.
//
// ptxas gives up and runs every product by itself (warning C7510 to C7520) where registers are short (231 of 240 at
// head size 128), where a branch around a product does not look uniform, or where a product that others than products
// read is in flight around a loop.
#pragma once
#include "attention_backward.cuh"
#ifndef PRECISION_FP32

template <int HS, int PASS>
struct BackwardTile {
    // registers: acc1, acc2 (HS/2 each), S and dP (COLS/2 each), packed P and dS (COLS/4 each) must leave some 20 of
    // 240
    static constexpr int GROUPS = 2, ROWS = 64 * GROUPS, COLS = PASS == PASS_DKV ? 64 : 128;
    static constexpr int STAGES = PASS == PASS_DKV ? (HS == 64 ? 4 : 3) : (HS == 64 ? 3 : 2);
    static constexpr int OUTPUTS = PASS == PASS_DKV ? 2 : 1, THREADS = WARPGROUP * (GROUPS + 1);
    static constexpr int ROW_BYTES = ROWS * HS * 2, COL_BYTES = COLS * HS * 2;
    // lse and delta: of each warpgroup's rows, or of each stage's columns
    static constexpr int STATISTICS = PASS == PASS_DKV ? COLS : 64,
                         STATISTICS_SETS = PASS == PASS_DKV ? STAGES : GROUPS;
    static constexpr int BARRIERS = 2 * GROUPS + 2 * STAGES;
    // X, Y, ring of (A, B), staging of the outputs; 1024: to align
    static constexpr int BYTES = (2 + OUTPUTS) * ROW_BYTES + STAGES * 2 * COL_BYTES + STATISTICS_SETS * STATISTICS * 8 +
                                 GROUPS * (int)sizeof(RowTile) + BARRIERS * 8 + 1024;
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
__device__ __forceinline__ void backward_produce_rows(const CUtensorMap* qkv_map, const CUtensorMap* dout_map,
                                                      BackwardMemory m, BackwardStatistics statistics, AttentionShape s,
                                                      TileOrder order) {
    typedef BackwardTile<HS, PASS> Tile;
    for (int wave = 0; tile_of_wave(wave) < order.total; wave++) {
        RowTile work = backward_work<PASS, Tile::ROWS>(s, order, tile_of_wave(wave));
        int k_column = (s.NH + work.head / (s.NH / s.NKV)) * HS, v_column = k_column + s.NKV * HS;
        int q_column = work.head * HS;
        size_t from = ((size_t)work.b * s.NH + work.head) * statistics.T_padded + work.row0;
        for (int group = 0; group < Tile::GROUPS; group++) {
            uint32_t full = m.rows_full + group * 8, part = group * 64 * SLAB_ROW_BYTES;
            uint32_t to = m.statistics + group * Tile::STATISTICS * 8;
            barrier_wait_idle(m.rows_empty + group * 8, ~wave & 1);
            row_tile_pass(m.work + group * sizeof(RowTile), work);
            barrier_expect(full, 2 * 64 * HS * 2 + (PASS == PASS_DQ ? 64 * 8 : 0));
            for (int slab = 0; slab < HS / SLAB; slab++) {
                uint32_t at = part + slab * Tile::ROWS * SLAB_ROW_BYTES;
                int row = work.row0 + group * 64, column = slab * SLAB;
                box_load(m.x + at, qkv_map, full, (PASS == PASS_DQ ? q_column : k_column) + column, row, work.b);
                box_load(m.y + at, PASS == PASS_DQ ? dout_map : qkv_map, full,
                         (PASS == PASS_DQ ? q_column : v_column) + column, row, work.b);
            }
            if (PASS == PASS_DQ) {
                run_load(to, statistics.lse_log2 + from + group * 64, 64 * 4, full);
                run_load(to + 64 * 4, statistics.minus_delta + from + group * 64, 64 * 4, full);
            }
        }
    }
}

// one thread: A and B
template <int HS, int PASS>
__device__ __forceinline__ void backward_produce_columns(const CUtensorMap* qkv_map, const CUtensorMap* dout_map,
                                                         BackwardMemory m, BackwardStatistics statistics,
                                                         AttentionShape s, TileOrder order) {
    typedef BackwardTile<HS, PASS> Tile;
    RingPosition ring = {0, 0};
    for (int wave = 0; tile_of_wave(wave) < order.total; wave++) {
        RowTile work = backward_work<PASS, Tile::ROWS>(s, order, tile_of_wave(wave));
        BackwardWalk w = backward_walk<PASS, Tile::ROWS, Tile::COLS>(s, work.row0);
        int k_column = (s.NH + work.head / (s.NH / s.NKV)) * HS, v_column = k_column + s.NKV * HS;
#pragma unroll 1
        for (int head = work.head; head < work.head + w.heads; head++) {
            size_t from = ((size_t)work.b * s.NH + head) * statistics.T_padded;
#pragma unroll 1
            for (int tile = w.first; tile < w.end; tile++) {
                uint32_t full = m.ring_full + ring.stage * 8, a = m.ring + ring.stage * 2 * Tile::COL_BYTES;
                uint32_t b = a + Tile::COL_BYTES;
                barrier_wait_idle(m.ring_empty + ring.stage * 8, ring.phase ^ 1);
                barrier_expect(full, 2 * Tile::COL_BYTES + (PASS == PASS_DKV ? Tile::COLS * 8 : 0));
                tile_copy_boxes<Tile::COLS, HS>(a, qkv_map, full, PASS == PASS_DQ ? k_column : head * HS,
                                                tile * Tile::COLS, work.b);
                tile_copy_boxes<Tile::COLS, HS>(b, PASS == PASS_DQ ? qkv_map : dout_map, full,
                                                PASS == PASS_DQ ? v_column : head * HS, tile * Tile::COLS, work.b);
                if (PASS == PASS_DKV) {
                    uint32_t to = m.statistics + ring.stage * Tile::STATISTICS * 8;
                    run_load(to, statistics.lse_log2 + from + tile * Tile::COLS, Tile::COLS * 4, full);
                    run_load(to + Tile::COLS * 4, statistics.minus_delta + from + tile * Tile::COLS, Tile::COLS * 4,
                             full);
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

// From the step before on to the next one that these rows see, and wait for its A, B; 0 if there is none. ring stays
// behind the last one read.
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
        turn_wait(step->group);  // every tile is a turn of every group
        turn_pass<Tile::GROUPS>(step->group);
        barrier_arrive_warp(m.ring_empty + step->ring.stage * 8, 1);
    }
}

// start s (64, COLS) [+]= 64 rows of x . A^T or y . B^T
template <int HS, int PASS>
__device__ __forceinline__ void backward_scores(float* s, uint32_t rows, uint32_t columns, int group, int accumulate) {
    typedef BackwardTile<HS, PASS> Tile;
    products_begin();
    group_product_transposed<Tile::COLS, HS, Tile::ROWS>(
        s, tile_descriptor(rows + group * 64 * SLAB_ROW_BYTES, Tile::ROWS * SLAB_ROW_BYTES),
        tile_descriptor(columns, Tile::COLS * SLAB_ROW_BYTES), accumulate);
    products_commit();
}

// All steps of a tile of rows of a warpgroup, whose X and Y have come. The last products of a step still run while the
// next one's begin, so a stage is given back one step late.
template <int HS, int PASS>
__device__ __forceinline__ void backward_consume(float* acc1, float* acc2, BackwardStep* step, BackwardMemory m,
                                                 const float* statistics, float scale_log2) {
    typedef BackwardTile<HS, PASS> Tile;
    const int COLS = Tile::COLS;
    int lane = threadIdx.x % WARP_LANES, warp_row = threadIdx.x % WARPGROUP / WARP_LANES * 16 + lane / 4;
    int reading = -1;  // the stage that products still in flight read
    float scores[COLS / 2], dp[COLS / 2], row_lse[2] = {0, 0}, row_minus_delta[2] = {0, 0};
    uint32_t packed_p[PASS == PASS_DKV ? COLS / 4 : 1], packed_ds[COLS / 4];
    for (int r = 0; PASS == PASS_DQ && r < 2; r++) {
        row_lse[r] = statistics[step->group * 2 * 64 + warp_row + 8 * r];
        row_minus_delta[r] = statistics[step->group * 2 * 64 + 64 + warp_row + 8 * r];
    }
    step->head = 0;
    step->tile = step->walk.first - 1;
#pragma unroll 1
    while (backward_advance<HS, PASS>(step, m)) {
        int stage = step->ring.stage, col0 = step->tile * COLS;
        uint32_t a = m.ring + 2 * stage * Tile::COL_BYTES, b = a + Tile::COL_BYTES;
        const float* columns = statistics + (PASS == PASS_DKV ? stage * 2 * COLS + lane % 4 * 2 : 0);
        float2 column_lse[PASS == PASS_DKV ? COLS / 8 : 1];
        if constexpr (PASS == PASS_DKV) {
            columns_load<COLS>(column_lse, columns);
        }
        turn_wait(step->group);
        backward_scores<HS, PASS>(scores, m.x, a, step->group, 0);
        products_wait<1>();  // all of the step before is done: its packed P and dS make room for dP
        registers_settle<COLS / 4>(packed_ds);
        barrier_arrive_warp(m.ring_empty + reading * 8, reading >= 0);
        reading = stage;
        statistic_spread<PASS, COLS>(dp, row_minus_delta, columns + COLS);
        backward_scores<HS, PASS>(dp, m.y, b, step->group, 1);
        turn_pass<Tile::GROUPS>(step->group);
        products_wait<1>();
        registers_settle<COLS / 2>(scores);
        probabilities<PASS, COLS>(scores, row_lse, column_lse, scale_log2,
                                  !tile_is_full<PASS>(step->row, 64, col0, COLS), step->row + warp_row,
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
        score_gradients<COLS>(dp, scores);
        fragment_pack<COLS>(packed_ds, dp);
        products_begin();
        group_product<COLS, HS>(acc1, packed_ds, tile_descriptor(a, COLS * SLAB_ROW_BYTES));
        products_commit();
    }
    barrier_arrive_warp(m.rows_empty + step->group * 8, 1);
    products_wait<0>();
    registers_settle<HS / 2>(acc1);
    if constexpr (PASS == PASS_DKV) {
        registers_settle<HS / 2>(acc2);
    }
    barrier_arrive_warp(m.ring_empty + reading * 8, reading >= 0);
}

template <int HS, int PASS>
__device__ __forceinline__ void backward_consume_all(const CUtensorMap* dqkv_map, BackwardMemory m,
                                                     const float* statistics, AttentionShape s, TileOrder order,
                                                     int group, float scale) {
    typedef BackwardTile<HS, PASS> Tile;
    uint32_t staging = m.staging + group * 64 * HS * 2;
    float acc1[HS / 2], acc2[PASS == PASS_DKV ? HS / 2 : 2];
    BackwardStep step;
    step.group = group;
    step.ring = {Tile::STAGES - 1, 1};  // one before the first
    if (group == Tile::GROUPS - 1) {
        turn_pass<Tile::GROUPS>(group);  // the first turn is the first group's
    }
    for (int wave = 0; tile_of_wave(wave) < order.total; wave++) {
        fragment_zero<HS>(acc1);
        if constexpr (PASS == PASS_DKV) {
            fragment_zero<HS>(acc2);
        }
        barrier_wait(m.rows_full + group * 8, wave & 1);
        RowTile work = row_tile_take(m.work + group * sizeof(RowTile));
        step.row = work.row0 + group * 64;
        step.walk = backward_walk<PASS, Tile::ROWS, Tile::COLS>(s, work.row0);
        backward_consume<HS, PASS>(acc1, acc2, &step, m, statistics, scale * LOG2E);
        int column = PASS == PASS_DQ ? work.head * HS : (s.NH + work.head / (s.NH / s.NKV)) * HS;
        group_store<HS>(dqkv_map, staging, acc1, scale, scale, 1 + group, column, step.row, work.b);
        if constexpr (PASS == PASS_DKV) {
            group_store<HS>(dqkv_map, staging + Tile::ROW_BYTES, acc2, 1.0f, 1.0f, 1 + group, column + s.NKV * HS,
                            step.row, work.b);
        }
    }
    stores_wait();
}
#endif

template <int HS, int PASS>
__global__ void __launch_bounds__(BackwardTile<HS, PASS>::THREADS, 1)
    attention_backward_wgmma_kernel(const __grid_constant__ CUtensorMap dqkv_map,
                                    const __grid_constant__ CUtensorMap dout_map,
                                    const __grid_constant__ CUtensorMap qkv_map, BackwardStatistics statistics,
                                    AttentionShape s, TileOrder order, float scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef BackwardTile<HS, PASS> Tile;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    BackwardMemory m = backward_memory<HS, PASS>(attention_memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::GROUPS; i++) {
            barrier_init(m.rows_full + 8 * i, 1);
            barrier_init(m.rows_empty + 8 * i, WARPGROUP);
        }
        for (int i = 0; i < Tile::STAGES; i++) {
            barrier_init(m.ring_full + 8 * i, 1);
            barrier_init(m.ring_empty + 8 * i, WARPGROUP * Tile::GROUPS);
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
        const float* statistics_memory =
            (const float*)(attention_memory + (m.statistics - shared_address(attention_memory)));
        backward_consume_all<HS, PASS>(&dqkv_map, m, statistics_memory, s, order, group, scale);
    }
#endif
}

template <int HS, int PASS>
static void attention_backward_wgmma(floatX* dqkv, const floatX* dout, const floatX* qkv, BackwardStatistics statistics,
                                     AttentionShape s, TensorMapEncode encode) {
    typedef BackwardTile<HS, PASS> Tile;
    TileOrder order = backward_order<HS, PASS>(s, Tile::ROWS);
    int width = (s.NH + 2 * s.NKV) * HS;
    CUtensorMap dqkv_map = tensor_map(encode, dqkv, s.B, s.T, width);
    CUtensorMap dout_map = tensor_map(encode, dout, s.B, s.T, s.NH * HS);
    CUtensorMap qkv_map = tensor_map(encode, qkv, s.B, s.T, width);
    attention_backward_wgmma_kernel<HS, PASS>
        <<<min_int(gpu.sm_count, order.total), Tile::THREADS, Tile::BYTES, gpu.stream>>>(
            dqkv_map, dout_map, qkv_map, statistics, s, order, 1.0f / sqrtf((float)HS));
    cuda_check_launch();
}

template <int HS, int PASS>
static void attention_backward_wgmma_prepare(void) {
    cuda_check(cudaFuncSetAttribute(attention_backward_wgmma_kernel<HS, PASS>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, BackwardTile<HS, PASS>::BYTES));
}
#endif
