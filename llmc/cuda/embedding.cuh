// cuda/embedding.cuh: rows of the embedding out, and their gradients back in, deterministic.
//
// Backward: the positions of a micro-batch are sorted by token (stable radix sort, CUB), so that equal tokens stand
// together in token order; the block that finds the first of a run adds all of the run's rows to that token's gradient.
// No atomics, one order.
#pragma once
#include "common.cuh"
#include <cub/device/device_radix_sort.cuh>

// one warp a row
template <int N>
__global__ void embedding_forward_kernel(floatX* out, const int32_t* tokens, const floatX* weight, int BT, int C) {
    int row = blockIdx.x * (blockDim.x / WARP_LANES) + threadIdx.x / WARP_LANES;
    if (row >= BT) {
        return;
    }
    const floatX* from = weight + (size_t)tokens[row] * C;
    floatX* to = out + (size_t)row * C;
    for (int c = threadIdx.x % WARP_LANES * N; c < C; c += WARP_LANES * N) {
        lanes_store(to + c, lanes_load<N>(from + c));
    }
}

static void cuda_embedding_forward(floatX* out, const int32_t* tokens, const floatX* weight, int BT, int C) {
    int blocks = (int)ceil_div(BT, 8);
    if (C % VEC == 0) {
        embedding_forward_kernel<VEC><<<blocks, 256, 0, gpu.stream>>>(out, tokens, weight, BT, C);
    } else {
        embedding_forward_kernel<1><<<blocks, 256, 0, gpu.stream>>>(out, tokens, weight, BT, C);
    }
    cuda_check_launch();
}

__global__ void positions_kernel(int32_t* positions, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        positions[i] = i;
    }
}

// sorted (BT) tokens with their positions; block x at sorted index x, threads over channels
__global__ void embedding_backward_kernel(float* dweight, const floatX* dout, const int32_t* sorted,
                                          const int32_t* positions, int BT, int C) {
    int begin = blockIdx.x, token = sorted[begin];
    if (begin > 0 && sorted[begin - 1] == token) {
        return;
    }
    int end = begin + 1;
    while (end < BT && sorted[end] == token) {
        end++;
    }
    for (int c = blockIdx.y * blockDim.x + threadIdx.x; c < C; c += gridDim.y * blockDim.x) {
        float sum = dweight[(size_t)token * C + c];
        int i = begin;
        for (; i + 4 <= end; i += 4) {  // four loads in flight, added in order
            float a = floatX_to_f32(dout[(size_t)positions[i] * C + c]),
                  b = floatX_to_f32(dout[(size_t)positions[i + 1] * C + c]);
            float d = floatX_to_f32(dout[(size_t)positions[i + 2] * C + c]),
                  e = floatX_to_f32(dout[(size_t)positions[i + 3] * C + c]);
            sum += a;
            sum += b;
            sum += d;
            sum += e;
        }
        for (; i < end; i++) {
            sum += floatX_to_f32(dout[(size_t)positions[i] * C + c]);
        }
        dweight[(size_t)token * C + c] = sum;
    }
}

// scratch of the sort, grown on demand before a graph is captured: keys and values twice, and CUB's own
typedef struct {
    int32_t *sorted, *positions, *unsorted_positions;
    void* temporary;
    size_t temporary_bytes;
    int capacity;
} EmbeddingSort;
static EmbeddingSort embedding_sort;

static void embedding_sort_reserve(int BT) {
    if (embedding_sort.capacity >= BT) {
        return;
    }
    cudaFree(embedding_sort.sorted);
    cudaFree(embedding_sort.temporary);
    embedding_sort.temporary_bytes = 0;
    cuda_check(cub::DeviceRadixSort::SortPairs(NULL, embedding_sort.temporary_bytes, (const int32_t*)NULL,
                                               (int32_t*)NULL, (const int32_t*)NULL, (int32_t*)NULL, BT, 0, 32,
                                               gpu.stream));
    cuda_check(cudaMalloc(&embedding_sort.sorted, sizeof(int32_t) * 3 * (size_t)BT));
    cuda_check(cudaMalloc(&embedding_sort.temporary, embedding_sort.temporary_bytes));
    embedding_sort.positions = embedding_sort.sorted + BT;
    embedding_sort.unsorted_positions = embedding_sort.sorted + 2 * (size_t)BT;
    embedding_sort.capacity = BT;
}

static void cuda_embedding_backward(float* dweight, const floatX* dout, const int32_t* tokens, int BT, int C) {
    EmbeddingSort* s = &embedding_sort;
    embedding_sort_reserve(BT);
    positions_kernel<<<(int)ceil_div(BT, 256), 256, 0, gpu.stream>>>(s->unsorted_positions, BT);
    cuda_check(cub::DeviceRadixSort::SortPairs(s->temporary, s->temporary_bytes, tokens, s->sorted,
                                               s->unsorted_positions, s->positions, BT, 0, 32, gpu.stream));
    dim3 grid(BT, (unsigned)ceil_div(C, 256));
    embedding_backward_kernel<<<grid, 256, 0, gpu.stream>>>(dweight, dout, s->sorted, s->positions, BT, C);
    cuda_check_launch();
}
