// cuda/attention_tiles.cuh: what the tensor-core attention kernels are made of, in bf16, for head sizes 64 and 128.
//
// Fragments. mma.sync (m16n8k16) and wgmma (m64nNk16, whose four warps own 16 rows each) keep a 16-row piece of a
// matrix in a warp's registers in one layout: thread `lane` holds rows r = lane/4 and r + 8, columns 8i + 2 (lane%4) +
// {0, 1}:
//   s[4i], s[4i+1] of row r;  s[4i+2], s[4i+3] of row r + 8
// and eight neighbours s[8k .. 8k+7], rounded to pairs of bf16, are the A operand of the k-th 16 columns of a following
// product. So softmax, masks and packing are written once, and P and dS never leave the registers.
//
// Swizzle. Shared memory has 32 banks of 4 bytes; eight rows of 128 bytes lie in the same banks. So chunk c (16 bytes)
// of row r is stored at chunk c ^ (r % 8): eight rows of a column of chunks then touch all banks once. For mma.sync a
// row is the whole head (HS elements); for wgmma and the copy engine, whose 128-byte swizzle is this very pattern, a
// tile of rows x HS is cut into HS/64 slabs of rows x 64 elements, each slab beginning at a multiple of 1024 bytes.
#pragma once
#include "common.cuh"
#ifndef PRECISION_FP32
#include <cuda.h>

#define LOG2E 1.44269504f
#define SLAB 64                 // elements in a 128-byte row of a slab
#define SLAB_ROW_BYTES 128
#define WARPGROUP 128           // threads

// ---------------------------------------------------------------------------------------------------------------------
// the order of the work: long causal rows first, and few heads at a time so that what they share stays in L2

// Heads are cut into sections; in a section rank 0 (the longest row tile) of every head comes first.
typedef struct { int row_tiles, heads, section, total; } TileOrder;

#define SECTION_BYTES (20 << 20)  // of streamed operands: well inside the 50 MB L2 of Hopper
#define SECTION_WAVES 4           // but at least this many tiles an SM, or the end of a section leaves SMs idle

static TileOrder tile_order(int T, int rows, int heads, size_t streamed_bytes_per_head) {
    TileOrder order;
    order.row_tiles = (int)ceil_div(T, rows);
    order.heads = heads;
    int64_t fit = (int64_t)(SECTION_BYTES / streamed_bytes_per_head);
    int64_t balanced = ceil_div((int64_t)SECTION_WAVES * gpu.sm_count, order.row_tiles);
    order.section = (int)min_i64(heads, max_i64(fit, balanced));
    check((int64_t)order.row_tiles * heads <= INT_MAX, "attention: %d heads of %d positions are too many tiles", heads,
          T);
    order.total = order.row_tiles * heads;
    return order;
}

__device__ __forceinline__ void tile_decode(TileOrder order, int index, int* rank, int* head) {
    int per_section = order.section * order.row_tiles, section = index / per_section;
    int rest = index - section * per_section;
    int first = section * order.section, here = min(order.section, order.heads - first);
    *rank = rest / here;
    *head = first + rest % here;
}

// A block that stays takes one tile of each wave, from the other end in every second wave: long tiles meet short ones.
__device__ __forceinline__ int tile_of_wave(int wave) {
    int at = wave & 1 ? (int)(gridDim.x - 1 - blockIdx.x) : (int)blockIdx.x;
    return wave * (int)gridDim.x + at;
}

// The tile of rows that one thread looked up (integer divisions) for all that compute it: passed through shared memory
typedef struct __align__(16) { int b, head, row0, unused; } RowTile;

__device__ __forceinline__ void row_tile_pass(uint32_t to, RowTile tile) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %3};" ::"r"(to), "r"(tile.b), "r"(tile.head), "r"(tile.row0)
                 : "memory");
}
// shfl tells the compiler that the values are the same in all lanes: it multiplies in order of need only where branches
// are uniform
__device__ __forceinline__ RowTile row_tile_take(uint32_t from) {
    RowTile tile;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.b), "=r"(tile.head), "=r"(tile.row0), "=r"(tile.unused)
                 : "r"(from)
                 : "memory");
    tile.b = __shfl_sync(FULL_WARP, tile.b, 0);
    tile.head = __shfl_sync(FULL_WARP, tile.head, 0);
    tile.row0 = __shfl_sync(FULL_WARP, tile.row0, 0);
    return tile;
}

// ---------------------------------------------------------------------------------------------------------------------
// arithmetic on fragments

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// 2^x, within 2 units in the last place; 2^-inf = 0
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// scores of keys after the query become -inf; row, col: position of s[0]
template <int N>
__device__ __forceinline__ void scores_mask(float* s, int row, int col) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        int key = col + i / 4 * 8 + i % 2, query = row + (i & 2) * 4;
        s[i] = key > query ? -INFINITY : s[i];
    }
}

// Online softmax over tiles of N keys, in two parts. First: largest is brought up to date; correction is what earlier
// sums and outputs must be multiplied by. Every row has at least one key that is not masked.
template <int N>
__device__ __forceinline__ void softmax_maximum(const float* s, float largest[2], float correction[2],
                                                float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
        for (int i = 4; i < N / 2; i += 4) {
            top = fmaxf(top, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
        }
        top = fmaxf(largest[r], quad_max(top));
        correction[r] = exp2_fast((largest[r] - top) * scale_log2);
        largest[r] = top;
    }
}

// Second: s = exp(scale (s - largest)); sum, of this thread's columns only, is brought up to date
template <int N>
__device__ __forceinline__ void softmax_exponentials(float* s, const float largest[2], float sum[2],
                                                     const float correction[2], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float offset = largest[r] * scale_log2, total = 0.0f;
#pragma unroll
        for (int i = 0; i < N / 2; i += 4) {
            float a = exp2_fast(fmaf(s[i + 2 * r], scale_log2, -offset));
            float b = exp2_fast(fmaf(s[i + 2 * r + 1], scale_log2, -offset));
            s[i + 2 * r] = a;
            s[i + 2 * r + 1] = b;
            total += a + b;
        }
        sum[r] = fmaf(sum[r], correction[r], total);
    }
}

template <int N>
__device__ __forceinline__ void softmax_step(float* s, float largest[2], float sum[2], float correction[2],
                                             float scale_log2) {
    softmax_maximum<N>(s, largest, correction, scale_log2);
    softmax_exponentials<N>(s, largest, sum, correction, scale_log2);
}

template <int N>
__device__ __forceinline__ void fragment_pack(uint32_t* packed, const float* s) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        packed[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
    }
}

template <int N>
__device__ __forceinline__ void fragment_scale(float* x, float factor0, float factor1) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        x[i] *= i & 2 ? factor1 : factor0;
    }
}

template <int N>
__device__ __forceinline__ void fragment_zero(float* x) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        x[i] = 0.0f;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// sm_80 and later: cp.async, ldmatrix, mma.sync. A tile is rows x HS, swizzled as a whole.

__device__ __forceinline__ uint32_t shared_address(const void* at) { return (uint32_t)__cvta_generic_to_shared(at); }

template <int HS>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    return (uint32_t)(row * (HS / 8) + (chunk ^ (row & 7))) * 16u;
}

// start copying rows row0 .. row0 + ROWS - 1 of a head; head points to its row 0; rows from T on become 0
template <int HS, int ROWS, int THREADS>
__device__ __forceinline__ void tile_copy(uint32_t tile, const floatX* head, int stride, int row0, int T) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * (HS / 8); i += THREADS) {
        int row = i / (HS / 8), chunk = i % (HS / 8), inside = row0 + row < T;
        const floatX* from = head + (size_t)(inside ? row0 + row : 0) * stride + chunk * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile + tile_offset<HS>(row, chunk)),
                     "l"(from), "r"(inside ? 16 : 0));
    }
}
__device__ __forceinline__ void copies_commit(void) { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ __forceinline__ void copies_wait(void) { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

__device__ __forceinline__ void matrix_load(uint32_t* r, uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void matrix_load_transposed(uint32_t* r, uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// d (16, 8) += a (16, 16) . b (16, 8)
__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// s (16, N) += x . a^T: x the 16 rows from row0 of tile x (rows, HS), a (N, HS)
template <int N, int HS>
__device__ __forceinline__ void warp_product_transposed(float* s, uint32_t x, int row0, uint32_t a) {
    int lane = threadIdx.x % WARP_LANES;
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t left[4], right[4];
        matrix_load(left, x + tile_offset<HS>(row0 + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
            matrix_load(right, a + tile_offset<HS>(16 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
            mma(s + 8 * j, left, right);
            mma(s + 8 * j + 4, left, right + 2);
        }
    }
}

// acc (16, HS) += p (16, N) . a (N, HS), p packed
template <int N, int HS>
__device__ __forceinline__ void warp_product(float* acc, const uint32_t* p, uint32_t a) {
    int lane = threadIdx.x % WARP_LANES;
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
#pragma unroll
        for (int j = 0; j < HS / 16; j++) {
            uint32_t right[4];
            matrix_load_transposed(right, a + tile_offset<HS>(16 * k + lane % 16, 2 * j + lane / 16));
            mma(acc + 8 * j, p + 4 * k, right);
            mma(acc + 8 * j + 4, p + 4 * k, right + 2);
        }
    }
}

// rows `row` and row + 8 (where < T) of out (T, stride) = the fragment acc (16, HS) times factor0, factor1
template <int HS>
__device__ __forceinline__ void fragment_store(floatX* out, int stride, const float* acc, float factor0, float factor1,
                                               int row, int T) {
    int col = threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float factor = r ? factor1 : factor0;
        floatX* to = out + (size_t)(row + 8 * r) * stride + col;
#pragma unroll
        for (int i = 0; i < HS / 8; i++) {
            if (row + 8 * r < T) {
                *(uint32_t*)(to + 8 * i) = pack_bf16(acc[4 * i + 2 * r] * factor, acc[4 * i + 2 * r + 1] * factor);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// sm_90a: barriers in shared memory, the bulk tensor copy engine, wgmma. A tile is HS/64 slabs of rows x 64.

// a phase of the barrier ends after `arrivals` arrivals and the bytes announced
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// All threads of a warp have read what the barrier guards, and say so one by one: one lane's arrival after __syncwarp
// would do, but racecheck does not follow that. Nothing if not `really`, which is the same in all lanes.
__device__ __forceinline__ void barrier_arrive_warp(uint32_t barrier, int really) {
    if (really) {
        barrier_arrive(barrier);
    }
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// wait for the end of the phase of that parity; a new barrier is in phase 0, and the one before (parity 1) counts as
// ended
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra AGAIN;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// the same for a thread that has nothing else to do: it sleeps up to a millisecond at a time instead of taking issue
// slots from the others
__device__ __forceinline__ void barrier_wait_idle(uint32_t barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 1000000;\n"
                 "@!done bra AGAIN;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void warpgroup_barrier(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// ordinary writes to shared memory become visible to wgmma and the copy engine
__device__ __forceinline__ void async_proxy_fence(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A ring of STAGES buffers: the position of the next one to fill or to read, and its phase
typedef struct { int stage, phase; } RingPosition;
template <int STAGES>
__device__ __forceinline__ void ring_next(RingPosition* at) {
    if (++at->stage == STAGES) {
        at->stage = 0;
        at->phase ^= 1;
    }
}

// The warpgroups take turns at the tensor cores, so that one's products run during the others' exponentials instead of
// all computing the same thing at once. Barriers TURN_BARRIER + group are used by a group, which waits, and the one
// before it.
#define TURN_BARRIER 4
__device__ __forceinline__ void turn_wait(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(TURN_BARRIER + group) : "memory");
}
template <int GROUPS>
__device__ __forceinline__ void turn_pass(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(TURN_BARRIER + (group == GROUPS - 1 ? 0 : group + 1)) : "memory");
}

// one box of 64 rows x 64 elements at (column, row, b); what lies past T is read as 0 and never written
__device__ __forceinline__ void box_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         int b) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(b)
        : "memory");
}
__device__ __forceinline__ void box_store(const CUtensorMap* map, uint32_t from, int column, int row, int b) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(from), "r"(column), "r"(row), "r"(b)
                 : "memory");
}
// a run of bytes, a multiple of 16
__device__ __forceinline__ void run_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void stores_commit(void) { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// until the stores have read shared memory
__device__ __forceinline__ void stores_wait_read(void) {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void stores_wait(void) { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// a tile (ROWS, HS) of a head that begins at `column`
template <int ROWS, int HS>
__device__ __forceinline__ void tile_copy_boxes(uint32_t tile, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int b) {
#pragma unroll
    for (int slab = 0; slab < HS / SLAB; slab++) {
#pragma unroll
        for (int r = 0; r < ROWS; r += 64) {
            box_load(tile + (slab * ROWS + r) * SLAB_ROW_BYTES, map, barrier, column + slab * SLAB, row + r, b);
        }
    }
}

// Matrix descriptors of wgmma: address, leading and stride byte offsets in units of 16, 128-byte swizzle. The stride
// offset is from 8 rows of a slab to the next 8 (1024 bytes), whether the contraction runs along the rows or down them;
// in the latter case the leading offset leads to the next slab. Moving on along a row by 16 elements adds 32 bytes,
// down by 16 rows 2048.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, int slab_bytes) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(slab_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           1ull << 62;
}
#define DESCRIPTOR_BYTES(n) ((uint64_t)((n) >> 4))

// operands of inline assembly: 32 accumulators from d[i] on, and their names
#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F32S(d, i) F16(d, i), F16(d, i + 16)
#define D16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define D32 D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D48 D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define D64 D48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d (64, N) [+]= a (64, 16) . b (N, 16)^T, both in shared memory
template <int N>
__device__ __forceinline__ void wgmma_transposed(float* d, uint64_t a, uint64_t b, int accumulate) {
    static_assert(N == 64 || N == 128, "");
    if constexpr (N == 64) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" D32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                     : F32S(d, 0) : "l"(a), "l"(b), "r"(accumulate));
    } else {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" D64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
                     : F32S(d, 0), F32S(d, 32) : "l"(a), "l"(b), "r"(accumulate));
    }
}

// d (64, N) += a (64, 16) . b (16, N), a in registers
template <int N>
__device__ __forceinline__ void wgmma_registers(float* d, const uint32_t* a, uint64_t b) {
    static_assert(N == 64 || N == 128, "");
    if constexpr (N == 64) {
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" D32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"
            : F32S(d, 0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    } else {
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" D64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}"
            : F32S(d, 0), F32S(d, 32)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    }
}

// before products that read registers just written
__device__ __forceinline__ void products_begin(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// until all but the last PENDING committed groups are done; they end in order
template <int PENDING>
__device__ __forceinline__ void products_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// ptxas moves products_wait up, before arithmetic that is meant to run beside the product. It cannot move it past a
// branch: this is one, and number is never negative.
__device__ __forceinline__ void wait_not_before(int number) {
    asm volatile("{\n.reg .pred usual;\nsetp.ge.s32 usual, %0, 0;\n@usual bra GO_ON;\n"
                 "wgmma.wait_group.sync.aligned 0;\nexit;\nGO_ON:\n}" ::"r"(number) : "memory");
}

// The compiler does not know that a product ends at products_wait: these keep it from moving uses of the registers
// across.
template <int COUNT>
__device__ __forceinline__ void registers_settle(float* r) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+f"(r[i])::"memory");
    }
}
template <int COUNT>
__device__ __forceinline__ void registers_settle(uint32_t* r) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+r"(r[i])::"memory");
    }
}

// s (64, N) [+]= x (64, HS) . a (N, HS)^T; x: 64 rows of a tile of X_ROWS
template <int N, int HS, int X_ROWS>
__device__ __forceinline__ void group_product_transposed(float* s, uint64_t x, uint64_t a, int accumulate) {
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        int slab = k / 4, inside = k % 4 * 32;
        wgmma_transposed<N>(s, x + DESCRIPTOR_BYTES(slab * X_ROWS * SLAB_ROW_BYTES + inside),
                            a + DESCRIPTOR_BYTES(slab * N * SLAB_ROW_BYTES + inside), accumulate || k > 0);
    }
}

// acc (64, HS) += p (64, N) . a (N, HS), p packed
template <int N, int HS>
__device__ __forceinline__ void group_product(float* acc, const uint32_t* p, uint64_t a) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        wgmma_registers<HS>(acc, p + 4 * k, a + DESCRIPTOR_BYTES(k * 16 * SLAB_ROW_BYTES));
    }
}

// rows row .. row + 63 of a head at `column` = the warpgroup's fragments times factors, through its staging memory (64,
// HS)
template <int HS>
__device__ __forceinline__ void group_store(const CUtensorMap* map, uint32_t staging, const float* acc, float factor0,
                                            float factor1, int barrier_id, int column, int row, int b) {
    int thread = threadIdx.x % WARPGROUP, lane = thread % WARP_LANES;
    if (thread == 0) {
        stores_wait_read();
    }
    warpgroup_barrier(barrier_id);
    uint32_t line = staging + (thread / WARP_LANES * 16 + lane / 4) * SLAB_ROW_BYTES + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < HS / 8; i++) {
        uint32_t at = line + i / 8 * (64 * SLAB_ROW_BYTES) + (uint32_t)((i % 8) ^ (lane / 4)) * 16u;
        uint32_t upper = pack_bf16(acc[4 * i] * factor0, acc[4 * i + 1] * factor0);
        uint32_t lower = pack_bf16(acc[4 * i + 2] * factor1, acc[4 * i + 3] * factor1);
        asm volatile("st.shared.b32 [%0], %1;\nst.shared.b32 [%2], %3;" ::"r"(at), "r"(upper),
                     "r"(at + 8 * SLAB_ROW_BYTES), "r"(lower)
                     : "memory");
    }
    async_proxy_fence();
    warpgroup_barrier(barrier_id);
    if (thread == 0) {
#pragma unroll
        for (int slab = 0; slab < HS / SLAB; slab++) {
            box_store(map, staging + slab * 64 * SLAB_ROW_BYTES, column + slab * SLAB, row, b);
        }
        stores_commit();
    }
}

typedef CUresult (*TensorMapEncode)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// the boxes of 64 rows x 64 elements of a (B, T, width) tensor
static CUtensorMap tensor_map(TensorMapEncode encode, const floatX* data, int B, int T, int width) {
    CUtensorMap map;
    cuuint64_t sizes[3] = {(cuuint64_t)width, (cuuint64_t)T, (cuuint64_t)B};
    cuuint64_t strides[2] = {sizeof(floatX) * (cuuint64_t)width, sizeof(floatX) * (cuuint64_t)width * (cuuint64_t)T};
    cuuint32_t box[3] = {SLAB, 64, 1}, steps[3] = {1, 1, 1};
    CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)data, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS, "attention: no tensor map for (%d, %d, %d) at %p: CUDA error %d", B, T, width,
          (const void*)data, (int)result);
    return map;
}
#endif
