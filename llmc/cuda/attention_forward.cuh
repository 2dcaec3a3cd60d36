// cuda/attention_forward.cuh: causal attention forward on tensor cores, after FlashAttention-2 (Dao 2023) and, on
// sm_90a, FlashAttention-3 (Shah et al. 2024).
//
// A block owns ROWS queries of one head and walks over the tiles of COLS keys that they see, from the diagonal back to
// key 0:
//   S = Q K^T;  m' = max(m, max S);  P = exp(scale (S - m'));  c = exp(scale (m - m'));  l = c l + sum P;  O = c O + PV
// and in the end out = O / l, lse = scale m + ln l. Exponentials are powers of two: scale is scale_log2 = log2(e) /
// sqrt(HS). Only the first tile holds the diagonal and needs a mask; keys past T are masked by causality, queries past
// T are not written.
//   mma.sync   8 warps x 16 queries; tiles of 64 keys, K and V double-buffered by cp.async; 96 KB at HS 128, so
//              sm_86, 89 and 120 fit
//   wgmma      two threads feed Q and a ring of K and V tiles of 128 keys through the copy engine, 2 (HS 128) or 3 (HS
//              64) warpgroups compute 64 queries each. They take turns at starting products, so that one's run during
//              the others' exponentials. S of a tile is multiplied together with P V of the one before, across tiles of
//              queries too: blocks stay on their SM and take tile after tile, and the next Q, K, V arrive during the
//              last output.
#pragma once
#include "attention_tiles.cuh"
#ifndef PRECISION_FP32

// ---------------------------------------------------------------------------------------------------------------------
// mma.sync

#define MMA_ROWS 128
#define MMA_THREADS 256
#define FORWARD_MMA_COLS 64

template <int HS>
static size_t forward_mma_bytes(void) { return sizeof(floatX) * HS * (MMA_ROWS + 4 * FORWARD_MMA_COLS); }

template <int HS>
__global__ void __launch_bounds__(MMA_THREADS, HS == 64 ? 2 : 1)
    attention_forward_mma_kernel(floatX* out, float* lse, const floatX* qkv, AttentionShape s, TileOrder order,
                                 float scale_log2) {
    const int COLS = FORWARD_MMA_COLS;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    uint32_t q_tile = shared_address(attention_memory), k_tile = q_tile + MMA_ROWS * HS * 2;
    uint32_t v_tile = k_tile + 2 * COLS * HS * 2;
    int rank, head, width = (s.NH + 2 * s.NKV) * HS, lane = threadIdx.x % WARP_LANES, warp = threadIdx.x / WARP_LANES;
    tile_decode(order, blockIdx.x, &rank, &head);
    int row0 = (order.row_tiles - 1 - rank) * MMA_ROWS, b = head / s.NH, h = head % s.NH, kv = h / (s.NH / s.NKV);
    const floatX* base = qkv + (size_t)b * s.T * width;
    const floatX *q = base + (size_t)h * HS, *k = base + (size_t)(s.NH + kv) * HS,
                 *v = base + (size_t)(s.NH + s.NKV + kv) * HS;

    int tile = (min(row0 + MMA_ROWS, s.T) - 1) / COLS, stage = 0;
    tile_copy<HS, MMA_ROWS, MMA_THREADS>(q_tile, q, width, row0, s.T);
    tile_copy<HS, COLS, MMA_THREADS>(k_tile, k, width, tile * COLS, s.T);
    tile_copy<HS, COLS, MMA_THREADS>(v_tile, v, width, tile * COLS, s.T);
    copies_commit();

    float o[HS / 2], scores[COLS / 2], largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, correction[2];
    uint32_t p[COLS / 4];
    fragment_zero<HS>(o);
    int row = row0 + warp * 16;  // the first of this warp
    for (; tile >= 0; tile--, stage ^= 1) {
        copies_wait<0>();
        __syncthreads();  // this tile is here, and nobody reads the other stage any more
        if (tile > 0) {
            tile_copy<HS, COLS, MMA_THREADS>(k_tile + (stage ^ 1) * COLS * HS * 2, k, width, (tile - 1) * COLS, s.T);
            tile_copy<HS, COLS, MMA_THREADS>(v_tile + (stage ^ 1) * COLS * HS * 2, v, width, (tile - 1) * COLS, s.T);
        }
        copies_commit();
        if (tile * COLS > row + 15) {
            continue;  // wholly after these queries
        }
        fragment_zero<COLS>(scores);
        warp_product_transposed<COLS, HS>(scores, q_tile, warp * 16, k_tile + stage * COLS * HS * 2);
        if (tile * COLS + COLS - 1 > row) {
            scores_mask<COLS>(scores, row + lane / 4, tile * COLS + lane % 4 * 2);
        }
        softmax_step<COLS>(scores, largest, sum, correction, scale_log2);
        fragment_pack<COLS>(p, scores);
        fragment_scale<HS>(o, correction[0], correction[1]);
        warp_product<COLS, HS>(o, p, v_tile + stage * COLS * HS * 2);
    }
    row += lane / 4;
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
    fragment_store<HS>(out + (size_t)b * s.T * s.NH * HS + (size_t)h * HS, s.NH * HS, o, 1.0f / sum[0], 1.0f / sum[1],
                       row, s.T);
    for (int r = 0; r < 2; r++) {
        if (lane % 4 == 0 && row + 8 * r < s.T) {
            lse[(size_t)head * s.T + row + 8 * r] = (largest[r] * scale_log2 + log2f(sum[r])) / LOG2E;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma

template <int HS>
struct ForwardTile {
    static constexpr int GROUPS = HS == 64 ? 3 : 2, ROWS = 64 * GROUPS, COLS = 128, STAGES = HS == 64 ? 3 : 2;
    static constexpr int THREADS = WARPGROUP * (GROUPS + 1);
    static constexpr int Q_BYTES = ROWS * HS * 2, KV_BYTES = COLS * HS * 2;  // out is staged in as much as Q
    static constexpr int BARRIERS = 4 + 4 * STAGES;
    static constexpr int BYTES =
        3 * Q_BYTES + 2 * STAGES * KV_BYTES + 2 * sizeof(RowTile) + BARRIERS * 8 + 1024;  // 1024: to align
};

// Shared memory of a block: two Q, rings of K and V, staging of out; barriers full[i] (the data has come) and empty[i]
// (all consumer warps have read it)
typedef struct {
    uint32_t q, k, v, staging, work;
    uint32_t q_full, q_empty, k_full, k_empty, v_full, v_empty;
} ForwardMemory;

template <int HS>
__device__ __forceinline__ ForwardMemory forward_memory(unsigned char* memory) {
    typedef ForwardTile<HS> Tile;
    ForwardMemory m;
    m.q = (shared_address(memory) + 1023u) & ~1023u;
    m.k = m.q + 2 * Tile::Q_BYTES;
    m.v = m.k + Tile::STAGES * Tile::KV_BYTES;
    m.staging = m.v + Tile::STAGES * Tile::KV_BYTES;
    m.work = m.staging + Tile::Q_BYTES;
    m.q_full = m.work + 2 * sizeof(RowTile);
    m.q_empty = m.q_full + 8 * 2;
    m.k_full = m.q_empty + 8 * 2;
    m.k_empty = m.k_full + 8 * Tile::STAGES;
    m.v_full = m.k_empty + 8 * Tile::STAGES;
    m.v_empty = m.v_full + 8 * Tile::STAGES;
    return m;
}

template <int HS>
__device__ __forceinline__ RowTile forward_work(AttentionShape s, TileOrder order, int wave) {
    RowTile work;
    int rank, head;
    tile_decode(order, tile_of_wave(wave), &rank, &head);
    work.b = head / s.NH;
    work.head = head % s.NH;
    work.row0 = (order.row_tiles - 1 - rank) * ForwardTile<HS>::ROWS;
    return work;
}
// the last tile of keys that these queries see
template <int HS>
__device__ __forceinline__ int forward_last(AttentionShape s, int row0) {
    return (min(row0 + ForwardTile<HS>::ROWS, s.T) - 1) / ForwardTile<HS>::COLS;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// one thread
template <int HS>
__device__ __forceinline__ void forward_produce_q(const CUtensorMap* qkv_map, ForwardMemory m, AttentionShape s,
                                                  TileOrder order) {
    typedef ForwardTile<HS> Tile;
    for (int wave = 0; tile_of_wave(wave) < order.total; wave++) {
        RowTile work = forward_work<HS>(s, order, wave);
        uint32_t buffer = wave & 1, full = m.q_full + buffer * 8;
        barrier_wait_idle(m.q_empty + buffer * 8, ~(wave >> 1) & 1);
        row_tile_pass(m.work + buffer * sizeof(RowTile), work);
        barrier_expect(full, Tile::Q_BYTES);
        tile_copy_boxes<Tile::ROWS, HS>(m.q + buffer * Tile::Q_BYTES, qkv_map, full, work.head * HS, work.row0, work.b);
    }
}

// one thread: the tiles in the order in which the consumers take them
template <int HS>
__device__ __forceinline__ void forward_produce_kv(const CUtensorMap* qkv_map, ForwardMemory m, AttentionShape s,
                                                   TileOrder order) {
    typedef ForwardTile<HS> Tile;
    RingPosition ring = {0, 0};
    for (int wave = 0; tile_of_wave(wave) < order.total; wave++) {
        RowTile work = forward_work<HS>(s, order, wave);
        int column = (s.NH + work.head / (s.NH / s.NKV)) * HS, b = work.b;
#pragma unroll 1
        for (int tile = forward_last<HS>(s, work.row0); tile >= 0; tile--) {
            uint32_t k_full = m.k_full + ring.stage * 8, v_full = m.v_full + ring.stage * 8;
            barrier_wait_idle(m.k_empty + ring.stage * 8, ring.phase ^ 1);
            barrier_expect(k_full, Tile::KV_BYTES);
            tile_copy_boxes<Tile::COLS, HS>(m.k + ring.stage * Tile::KV_BYTES, qkv_map, k_full, column,
                                            tile * Tile::COLS, b);
            barrier_wait_idle(m.v_empty + ring.stage * 8, ring.phase ^ 1);
            barrier_expect(v_full, Tile::KV_BYTES);
            tile_copy_boxes<Tile::COLS, HS>(m.v + ring.stage * Tile::KV_BYTES, qkv_map, v_full, column + s.NKV * HS,
                                            tile * Tile::COLS, b);
            ring_next<Tile::STAGES>(&ring);
        }
    }
}

// where a warpgroup stands: 64 queries from `row` of a head against a tile of keys, which lies at `ring` of K and V
typedef struct {
    int wave, b, head, row, tile;
    RingPosition ring;
} ForwardStep;

// to the first step of step->wave, the one that holds the diagonal; 0 if there is no such wave. step->ring: where the
// producer goes on.
template <int HS>
__device__ __forceinline__ int forward_enter(ForwardStep* step, ForwardMemory m, AttentionShape s, TileOrder order,
                                             int group) {
    typedef ForwardTile<HS> Tile;
    if (tile_of_wave(step->wave) >= order.total) {
        return 0;
    }
    barrier_wait(m.q_full + (step->wave & 1) * 8, step->wave >> 1 & 1);
    RowTile work = row_tile_take(m.work + (step->wave & 1) * sizeof(RowTile));
    int last = forward_last<HS>(s, work.row0);
    step->b = work.b;
    step->head = work.head;
    step->row = work.row0 + group * 64;
    step->tile = min(last, (step->row + 63) / Tile::COLS);
#pragma unroll 1
    for (int tile = last; tile > step->tile; tile--) {  // wholly after these queries: for the other warpgroups only
        barrier_wait(m.k_full + step->ring.stage * 8, step->ring.phase);
        barrier_wait(m.v_full + step->ring.stage * 8, step->ring.phase);
        turn_wait(group);  // every tile but the very first is a turn of every group
        turn_pass<Tile::GROUPS>(group);
        barrier_arrive_warp(m.k_empty + step->ring.stage * 8, 1);
        barrier_arrive_warp(m.v_empty + step->ring.stage * 8, 1);
        ring_next<Tile::STAGES>(&step->ring);
    }
    return 1;
}

// start scores (64, COLS) = Q K^T of that step
template <int HS>
__device__ __forceinline__ void forward_scores(float* scores, ForwardMemory m, ForwardStep step, int group) {
    typedef ForwardTile<HS> Tile;
    uint64_t q = tile_descriptor(m.q + (step.wave & 1) * Tile::Q_BYTES + group * 64 * SLAB_ROW_BYTES,
                                 Tile::ROWS * SLAB_ROW_BYTES);
    uint64_t k = tile_descriptor(m.k + step.ring.stage * Tile::KV_BYTES, Tile::COLS * SLAB_ROW_BYTES);
    products_begin();
    group_product_transposed<Tile::COLS, HS, Tile::ROWS>(scores, q, k, 0);
    products_commit();
}

// the scores of that step have come: give back K, and Q after its last use
template <int HS>
__device__ __forceinline__ void forward_scores_done(float* scores, ForwardMemory m, ForwardStep step) {
    registers_settle<ForwardTile<HS>::COLS / 2>(scores);
    barrier_arrive_warp(m.k_empty + step.ring.stage * 8, 1);
    barrier_arrive_warp(m.q_empty + (step.wave & 1) * 8, step.tile == 0);
}

// start o += P V of that step
template <int HS>
__device__ __forceinline__ void forward_output(float* o, const uint32_t* p, ForwardMemory m, ForwardStep step) {
    typedef ForwardTile<HS> Tile;
    uint64_t v = tile_descriptor(m.v + step.ring.stage * Tile::KV_BYTES, Tile::COLS * SLAB_ROW_BYTES);
    barrier_wait(m.v_full + step.ring.stage * 8, step.ring.phase);
    products_begin();
    group_product<Tile::COLS, HS>(o, p, v);
    products_commit();
}

// all keys of that step's queries are done: write out and lse
template <int HS>
__device__ __forceinline__ void forward_finish(const CUtensorMap* out_map, float* lse, const float* o,
                                               const float* largest, const float* sum, ForwardMemory m,
                                               ForwardStep step, AttentionShape s, int group, float scale_log2) {
    int lane = threadIdx.x % WARP_LANES;
    float total[2] = {quad_sum(sum[0]), quad_sum(sum[1])};
    group_store<HS>(out_map, m.staging + group * 64 * HS * 2, o, 1.0f / total[0], 1.0f / total[1], 1 + group,
                    step.head * HS, step.row, step.b);
    for (int r = 0; r < 2; r++) {
        int row = step.row + threadIdx.x % WARPGROUP / WARP_LANES * 16 + lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < s.T) {
            lse[((size_t)step.b * s.NH + step.head) * s.T + row] = (largest[r] * scale_log2 + log2f(total[r])) / LOG2E;
        }
    }
}

// P V of `step` has come: give back V
template <int HS>
__device__ __forceinline__ void forward_output_done(float* o, uint32_t* p, ForwardMemory m, ForwardStep step) {
    registers_settle<HS / 2>(o);
    registers_settle<ForwardTile<HS>::COLS / 4>(p);
    barrier_arrive_warp(m.v_empty + step.ring.stage * 8, 1);
}

// start the scores of `next` and, with the P of `step`, its output; wait for the scores
template <int HS>
__device__ __forceinline__ void forward_products(float* scores, float* o, const uint32_t* p, ForwardMemory m,
                                                 ForwardStep step, ForwardStep next, int group) {
    typedef ForwardTile<HS> Tile;
    barrier_wait(m.k_full + next.ring.stage * 8, next.ring.phase);
    turn_wait(group);
    forward_scores<HS>(scores, m, next, group);
    forward_output<HS>(o, p, m, step);
    turn_pass<Tile::GROUPS>(group);
    products_wait<1>();
    forward_scores_done<HS>(scores, m, next);
}

// All steps of a warpgroup. While the P V of a step is multiplied, so are the scores of the next one, across tiles of
// queries too.
template <int HS>
__device__ __forceinline__ void forward_consume(const CUtensorMap* out_map, float* lse, ForwardMemory m,
                                                AttentionShape s, TileOrder order, int group, float scale_log2) {
    typedef ForwardTile<HS> Tile;
    const int COLS = Tile::COLS;
    float o[HS / 2], scores[COLS / 2], largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, correction[2];
    uint32_t p[COLS / 4];
    int lane = threadIdx.x % WARP_LANES, warp_row = threadIdx.x % WARPGROUP / WARP_LANES * 16 + lane / 4;
    if (group == Tile::GROUPS - 1) {
        turn_pass<Tile::GROUPS>(group);  // the first turn is the first group's
    }
    ForwardStep step = {0, 0, 0, 0, 0, {0, 0}};
    forward_enter<HS>(&step, m, s, order, group);
    barrier_wait(m.k_full + step.ring.stage * 8, step.ring.phase);
    forward_scores<HS>(scores, m, step, group);
    products_wait<0>();
    forward_scores_done<HS>(scores, m, step);
    scores_mask<COLS>(scores, step.row + warp_row, step.tile * COLS + lane % 4 * 2);
    softmax_step<COLS>(scores, largest, sum, correction, scale_log2);
    fragment_pack<COLS>(p, scores);
    fragment_zero<HS>(o);
    for (;;) {
        ForwardStep next = step;
#pragma unroll 1
        while (step.tile > 0) {
            next.tile--;
            ring_next<Tile::STAGES>(&next.ring);
            forward_products<HS>(scores, o, p, m, step, next, group);
            softmax_maximum<COLS>(scores, largest, correction, scale_log2);
            wait_not_before(order.total);
            products_wait<0>();
            forward_output_done<HS>(o, p, m, step);
            softmax_exponentials<COLS>(scores, largest, sum, correction, scale_log2);
            fragment_scale<HS>(o, correction[0], correction[1]);
            fragment_pack<COLS>(p, scores);
            step = next;
        }
        next.wave++;
        ring_next<Tile::STAGES>(&next.ring);
        if (!forward_enter<HS>(&next, m, s, order, group)) {
            break;
        }
        forward_products<HS>(scores, o, p, m, step, next, group);
        products_wait<0>();
        forward_output_done<HS>(o, p, m, step);
        forward_finish<HS>(out_map, lse, o, largest, sum, m, step, s, group, scale_log2);
        fragment_zero<HS>(o);
        largest[0] = largest[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
        scores_mask<COLS>(scores, next.row + warp_row, next.tile * COLS + lane % 4 * 2);
        softmax_step<COLS>(scores, largest, sum, correction, scale_log2);
        fragment_pack<COLS>(p, scores);
        step = next;
    }
    forward_output<HS>(o, p, m, step);
    products_wait<0>();
    registers_settle<HS / 2>(o);
    forward_finish<HS>(out_map, lse, o, largest, sum, m, step, s, group, scale_log2);
    stores_wait();
}
#endif

template <int HS>
__global__ void __launch_bounds__(ForwardTile<HS>::THREADS, 1)
    attention_forward_wgmma_kernel(const __grid_constant__ CUtensorMap qkv_map,
                                   const __grid_constant__ CUtensorMap out_map, float* lse, AttentionShape s,
                                   TileOrder order, float scale_log2) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef ForwardTile<HS> Tile;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    ForwardMemory m = forward_memory<HS>(attention_memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(m.q_full + 8 * i, 1);
            barrier_init(m.q_empty + 8 * i, WARPGROUP * Tile::GROUPS);
        }
        for (int i = 0; i < Tile::STAGES; i++) {
            barrier_init(m.k_full + 8 * i, 1);
            barrier_init(m.v_full + 8 * i, 1);
            barrier_init(m.k_empty + 8 * i, WARPGROUP * Tile::GROUPS);
            barrier_init(m.v_empty + 8 * i, WARPGROUP * Tile::GROUPS);
        }
        async_proxy_fence();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Tile::GROUPS == 3 ? 32 : 24));
        if (threadIdx.x == 0) {
            forward_produce_kv<HS>(&qkv_map, m, s, order);
        } else if (threadIdx.x == WARP_LANES) {
            forward_produce_q<HS>(&qkv_map, m, s, order);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Tile::GROUPS == 3 ? 160 : 240));
        int group = __shfl_sync(FULL_WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;  // uniform, for the compiler
        forward_consume<HS>(&out_map, lse, m, s, order, group, scale_log2);
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// launches

template <int HS>
static void attention_forward_mma(floatX* out, float* lse, const floatX* qkv, AttentionShape s) {
    TileOrder order = tile_order(s.T, MMA_ROWS, s.B * s.NH, (size_t)s.T * HS * 4 * s.NKV / s.NH);
    attention_forward_mma_kernel<HS><<<order.total, MMA_THREADS, forward_mma_bytes<HS>(), gpu.stream>>>(
        out, lse, qkv, s, order, LOG2E / sqrtf((float)HS));
    cuda_check_launch();
}

template <int HS>
static void attention_forward_wgmma(floatX* out, float* lse, const floatX* qkv, AttentionShape s,
                                    TensorMapEncode encode) {
    typedef ForwardTile<HS> Tile;
    TileOrder order = tile_order(s.T, Tile::ROWS, s.B * s.NH, (size_t)s.T * HS * 4 * s.NKV / s.NH);
    CUtensorMap qkv_map = tensor_map(encode, qkv, s.B, s.T, (s.NH + 2 * s.NKV) * HS);
    CUtensorMap out_map = tensor_map(encode, out, s.B, s.T, s.NH * HS);
    attention_forward_wgmma_kernel<HS><<<min_int(gpu.sm_count, order.total), Tile::THREADS, Tile::BYTES, gpu.stream>>>(
        qkv_map, out_map, lse, s, order, LOG2E / sqrtf((float)HS));
    cuda_check_launch();
}

template <int HS>
static void attention_forward_mma_prepare(void) {
    cuda_check(cudaFuncSetAttribute(attention_forward_mma_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)forward_mma_bytes<HS>()));
}

template <int HS>
static void attention_forward_wgmma_prepare(void) {
    cuda_check(cudaFuncSetAttribute(attention_forward_wgmma_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    ForwardTile<HS>::BYTES));
}
#endif
