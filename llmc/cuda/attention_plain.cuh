// cuda/attention_plain.cuh: causal attention without tensor cores, for any even head size up to 256 and for f32; and
// decoding.
//
// One warp owns one row (a query, or in the gradient of K and V a key) and holds its HS elements spread over the lanes:
// lane j has j, j + 32, ... Keys or queries follow one by one; sums over HS are warp sums. Everything is f32, every sum
// has one order. The oracle of the tensor-core kernels on shapes that the CPU is too slow for.
#pragma once
#include "common.cuh"

#define PLAIN_HS 256                     // largest head size
#define PLAIN_LANE (PLAIN_HS / WARP_LANES)     // elements of a lane
#define PLAIN_THREADS 128

// element i of `lane` is lane + 32 i; past HS it is 0
__device__ __forceinline__ void row_load(float* x, const floatX* row, int HS) {
    int lane = threadIdx.x % WARP_LANES;
#pragma unroll
    for (int i = 0; i < PLAIN_LANE; i++) {
        x[i] = lane + i * WARP_LANES < HS ? floatX_to_f32(row[lane + i * WARP_LANES]) : 0.0f;
    }
}
__device__ __forceinline__ void row_store(floatX* row, const float* x, float factor, int HS) {
    int lane = threadIdx.x % WARP_LANES;
#pragma unroll
    for (int i = 0; i < PLAIN_LANE; i++) {
        if (lane + i * WARP_LANES < HS) {
            row[lane + i * WARP_LANES] = to_floatX(x[i] * factor);
        }
    }
}
__device__ __forceinline__ float row_dot(const float* a, const float* b) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PLAIN_LANE; i++) {
        sum += a[i] * b[i];
    }
    return warp_sum(sum);
}
// y += a x
__device__ __forceinline__ void row_add(float* y, float a, const float* x) {
#pragma unroll
    for (int i = 0; i < PLAIN_LANE; i++) {
        y[i] = fmaf(a, x[i], y[i]);
    }
}

// a running softmax of one row
typedef struct { float largest, sum, out[PLAIN_LANE]; } RunningSoftmax;

__device__ __forceinline__ RunningSoftmax softmax_begin(void) {
    RunningSoftmax r;
    r.largest = -INFINITY;
    r.sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PLAIN_LANE; i++) {
        r.out[i] = 0.0f;
    }
    return r;
}
__device__ __forceinline__ void softmax_add(RunningSoftmax* r, float score, const float* v) {
    float top = fmaxf(r->largest, score), correction = expf(r->largest - top), p = expf(score - top);
    r->largest = top;
    r->sum = r->sum * correction + p;
#pragma unroll
    for (int i = 0; i < PLAIN_LANE; i++) {
        r->out[i] = fmaf(p, v[i], r->out[i] * correction);
    }
}

// The row of a warp: time t, longest rows first for queries (last = T - 1) or for keys (last = 0); head of a sequence
// b. 0 where there is none
typedef struct { int b, t, head; } PlainRow;
__device__ __forceinline__ int plain_row(PlainRow* row, int B, int T, int heads, int last) {
    size_t index = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP_LANES, columns = (size_t)B * heads;
    if (index >= columns * T) {
        return 0;
    }
    int t = (int)(index / columns);
    row->t = last ? T - 1 - t : t;
    row->b = (int)(index % columns) / heads;
    row->head = (int)(index % columns) % heads;
    return 1;
}

__global__ void __launch_bounds__(PLAIN_THREADS)
attention_forward_plain_kernel(floatX* out, float* lse, const floatX* qkv, AttentionShape s, float scale) {
    PlainRow row;
    if (!plain_row(&row, s.B, s.T, s.NH, 1)) {
        return;
    }
    int width = (s.NH + 2 * s.NKV) * s.HS, kv = row.head / (s.NH / s.NKV);
    const floatX* base = qkv + (size_t)row.b * s.T * width;
    float q[PLAIN_LANE], x[PLAIN_LANE];
    row_load(q, base + (size_t)row.t * width + (size_t)row.head * s.HS, s.HS);
    RunningSoftmax softmax = softmax_begin();
    for (int j = 0; j <= row.t; j++) {
        const floatX* k = base + (size_t)j * width + (size_t)(s.NH + kv) * s.HS;
        row_load(x, k, s.HS);
        float score = row_dot(q, x) * scale;
        row_load(x, k + (size_t)s.NKV * s.HS, s.HS);
        softmax_add(&softmax, score, x);
    }
    row_store(out + (((size_t)row.b * s.T + row.t) * s.NH + row.head) * s.HS, softmax.out, 1.0f / softmax.sum, s.HS);
    if (threadIdx.x % WARP_LANES == 0) {
        lse[((size_t)row.b * s.NH + row.head) * s.T + row.t] = softmax.largest + logf(softmax.sum);
    }
}

// delta (B, NH, T) = sum(dout * out), and the queries of dqkv
__global__ void __launch_bounds__(PLAIN_THREADS)
    attention_dq_plain_kernel(floatX* dqkv, float* delta, const floatX* dout, const floatX* out, const floatX* qkv,
                              const float* lse, AttentionShape s, float scale) {
    PlainRow row;
    if (!plain_row(&row, s.B, s.T, s.NH, 1)) {
        return;
    }
    int width = (s.NH + 2 * s.NKV) * s.HS, kv = row.head / (s.NH / s.NKV);
    const floatX* base = qkv + (size_t)row.b * s.T * width;
    size_t at = (size_t)row.t * width + (size_t)row.head * s.HS;
    size_t statistic = ((size_t)row.b * s.NH + row.head) * s.T + row.t;
    size_t out_at = (((size_t)row.b * s.T + row.t) * s.NH + row.head) * s.HS;
    float q[PLAIN_LANE], d[PLAIN_LANE], k[PLAIN_LANE], v[PLAIN_LANE], dq[PLAIN_LANE] = {0.0f};
    row_load(q, base + at, s.HS);
    row_load(d, dout + out_at, s.HS);
    row_load(k, out + out_at, s.HS);
    float sum = row_dot(d, k);
    for (int j = 0; j <= row.t; j++) {
        const floatX* from = base + (size_t)j * width + (size_t)(s.NH + kv) * s.HS;
        row_load(k, from, s.HS);
        row_load(v, from + (size_t)s.NKV * s.HS, s.HS);
        float p = expf(row_dot(q, k) * scale - lse[statistic]);
        row_add(dq, p * (row_dot(d, v) - sum), k);
    }
    row_store(dqkv + (size_t)row.b * s.T * width + at, dq, scale, s.HS);
    if (threadIdx.x % WARP_LANES == 0) {
        delta[statistic] = sum;
    }
}

// the keys and values of dqkv
__global__ void __launch_bounds__(PLAIN_THREADS)
    attention_dkv_plain_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse,
                               const float* delta, AttentionShape s, float scale) {
    PlainRow row;
    if (!plain_row(&row, s.B, s.T, s.NKV, 0)) {
        return;
    }
    int width = (s.NH + 2 * s.NKV) * s.HS, group = s.NH / s.NKV;
    const floatX* base = qkv + (size_t)row.b * s.T * width;
    size_t at = (size_t)row.t * width + (size_t)(s.NH + row.head) * s.HS;
    float q[PLAIN_LANE], d[PLAIN_LANE], k[PLAIN_LANE], v[PLAIN_LANE], dk[PLAIN_LANE] = {0.0f}, dv[PLAIN_LANE] = {0.0f};
    row_load(k, base + at, s.HS);
    row_load(v, base + at + (size_t)s.NKV * s.HS, s.HS);
    for (int h = row.head * group; h < (row.head + 1) * group; h++) {
        for (int i = row.t; i < s.T; i++) {
            size_t statistic = ((size_t)row.b * s.NH + h) * s.T + i;
            row_load(q, base + (size_t)i * width + (size_t)h * s.HS, s.HS);
            row_load(d, dout + (((size_t)row.b * s.T + i) * s.NH + h) * s.HS, s.HS);
            float p = expf(row_dot(q, k) * scale - lse[statistic]);
            row_add(dv, p, d);
            row_add(dk, p * (row_dot(d, v) - delta[statistic]), q);
        }
    }
    floatX* to = dqkv + (size_t)row.b * s.T * width + at;
    row_store(to, dk, scale, s.HS);
    row_store(to + (size_t)s.NKV * s.HS, dv, 1.0f, s.HS);
}

static int plain_blocks(size_t rows) { return (int)ceil_div((int64_t)rows * WARP_LANES, PLAIN_THREADS); }

static void attention_forward_plain(floatX* out, float* lse, const floatX* qkv, AttentionShape s) {
    attention_forward_plain_kernel<<<plain_blocks((size_t)s.B * s.T * s.NH), PLAIN_THREADS, 0, gpu.stream>>>(
        out, lse, qkv, s, 1.0f / sqrtf((float)s.HS));
    cuda_check_launch();
}

// delta: scratch (B, NH, T)
static void attention_backward_plain(floatX* dqkv, float* delta, const floatX* dout, const floatX* out,
                                     const floatX* qkv, const float* lse, AttentionShape s) {
    float scale = 1.0f / sqrtf((float)s.HS);
    attention_dq_plain_kernel<<<plain_blocks((size_t)s.B * s.T * s.NH), PLAIN_THREADS, 0, gpu.stream>>>(
        dqkv, delta, dout, out, qkv, lse, s, scale);
    cuda_check_launch();
    attention_dkv_plain_kernel<<<plain_blocks((size_t)s.B * s.T * s.NKV), PLAIN_THREADS, 0, gpu.stream>>>(
        dqkv, dout, qkv, lse, delta, s, scale);
    cuda_check_launch();
}

// ---------------------------------------------------------------------------------------------------------------------
// decoding: one sequence, new tokens at first_position and after; caches (position, NKV*HS)

__global__ void attention_append_kernel(floatX* key_cache, floatX* value_cache, const floatX* qkv, AttentionShape s,
                                        int first_position) {
    int width = (s.NH + 2 * s.NKV) * s.HS, stride = s.NKV * s.HS;
    const floatX* from = qkv + (size_t)blockIdx.x * width + (size_t)s.NH * s.HS;
    size_t to = (size_t)(first_position + blockIdx.x) * stride;
    for (int i = threadIdx.x; i < stride; i += blockDim.x) {
        key_cache[to + i] = from[i];
        value_cache[to + i] = from[stride + i];
    }
}

// a block is one query of one head; its warps take every CACHED_WARPS-th key and are merged in their order
#define CACHED_WARPS 8
__global__ void __launch_bounds__(CACHED_WARPS* WARP_LANES)
    attention_cached_kernel(floatX* out, const floatX* key_cache, const floatX* value_cache, const floatX* qkv,
                            AttentionShape s, int first_position, float scale) {
    __shared__ RunningSoftmax parts[CACHED_WARPS][WARP_LANES];
    int t = blockIdx.x / s.NH, h = blockIdx.x % s.NH, stride = s.NKV * s.HS;
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    size_t head = (size_t)(h / (s.NH / s.NKV)) * s.HS;
    float q[PLAIN_LANE], x[PLAIN_LANE];
    row_load(q, qkv + (size_t)t * (s.NH + 2 * s.NKV) * s.HS + (size_t)h * s.HS, s.HS);
    RunningSoftmax softmax = softmax_begin();
    for (int j = warp; j <= first_position + t; j += CACHED_WARPS) {
        row_load(x, key_cache + (size_t)j * stride + head, s.HS);
        float score = row_dot(q, x) * scale;
        row_load(x, value_cache + (size_t)j * stride + head, s.HS);
        softmax_add(&softmax, score, x);
    }
    parts[warp][lane] = softmax;
    __syncthreads();
    if (warp > 0) {
        return;
    }
    float top = softmax.largest, sum = 0.0f;  // warp 0 has key 0: top is finite
    for (int w = 1; w < CACHED_WARPS; w++) {
        top = fmaxf(top, parts[w][lane].largest);
    }
    float total[PLAIN_LANE] = {0.0f};
    for (int w = 0; w < CACHED_WARPS; w++) {
        float factor = expf(parts[w][lane].largest - top);
        sum += parts[w][lane].sum * factor;
        row_add(total, factor, parts[w][lane].out);
    }
    row_store(out + ((size_t)t * s.NH + h) * s.HS, total, 1.0f / sum, s.HS);
}
