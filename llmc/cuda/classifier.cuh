// cuda/classifier.cuh: softmax cross-entropy over one chunk of logits, the gradient written over the logits.
//
//   loss = log sum exp(x) - x[target];  dx = (softmax(x) - onehot(target)) grad_scale
// A chunk is larger than the L2 cache, so a row must be read from memory once: it is copied to shared memory (cp.async)
// and stays there for its three uses, the maximum, the sum of exponentials and the gradient. Blocks are as many as are
// resident and walk over the rows. A thread reads only the vectors that it copied itself, so it needs no barrier for
// them, and as soon as it has written a vector's gradient it sends for the same vector of the block's next row: loads
// and stores of memory run side by side. What of a row does not fit into shared memory (V above 115 thousand of bf16)
// is read again, from the L2 cache. A thread takes exponentials relative to the maximum of its own share; warps and
// block then rescale and add the sums in a fixed order. V that is no multiple of a vector takes the plain kernel.
#pragma once
#include "vectors.cuh"

// exp(x) within 2 + 1.17 |x| units, as __expf; results below 2^-126 are 0
__device__ __forceinline__ float exp_flushed(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}

// what exponentials are relative to: the maximum; 0 where all are -inf, so that they become 0 and a NaN stays one
__device__ __forceinline__ float exp_base(float largest) { return largest > -INFINITY ? largest : 0.0f; }

// sum of exponentials relative to `largest`, all threads' together: both become those of all
__device__ __forceinline__ void exp_sum_warp(float* largest, float* sum) {
    float all = warp_max(*largest);
    *sum = warp_sum(*largest > -INFINITY ? *sum * exp_flushed(*largest - all) : *sum);
    *largest = all;
}

// the same over a block; the arrays are one of two pairs that take turns, so that one barrier a row is enough
template <int THREADS> __device__ __forceinline__ void exp_sum_block(float* largest, float* sum, float (*shared)[32]) {
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    exp_sum_warp(largest, sum);
    if (lane == 0) {
        shared[0][warp] = *largest;
        shared[1][warp] = *sum;
    }
    __syncthreads();
    *largest = lane < THREADS / WARP_LANES ? shared[0][lane] : -INFINITY;
    *sum = lane < THREADS / WARP_LANES ? shared[1][lane] : 0.0f;
    exp_sum_warp(largest, sum);
}

__device__ __forceinline__ void copy_async(Vector* shared, const Vector* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(from)
                 : "memory");
}

// shared memory holds the first `resident` vectors of a row
template <int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
crossentropy_kernel(float* losses, floatX* logits, const int32_t* targets, int rows, int V, float grad_scale,
                    int with_grad, int resident) {
    extern __shared__ Vector kept[];
    __shared__ float sums[2][2][WARP_LANES];
    int vectors = V / VEC, turn = 0;
    for (int v = threadIdx.x; v < resident; v += THREADS) {
        copy_async(kept + v, (const Vector*)(logits + (size_t)blockIdx.x * V) + v);
    }
    for (int row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
        floatX* x = logits + (size_t)row * V;
        Vector *packed = (Vector*)x, *next = row + (int)gridDim.x < rows ? (Vector*)(x + (size_t)gridDim.x * V) : NULL;
        int target = targets[row];
        float largest = -INFINITY, sum = 0.0f;
        asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 2
        for (int v = threadIdx.x; v < vectors; v += THREADS) {
            Vector at = v < resident ? kept[v] : packed[v];
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                largest = fmaxf(largest, reals_get(at, j));
            }
        }
        float base = exp_base(largest);
#pragma unroll 2
        for (int v = threadIdx.x; v < vectors; v += THREADS) {
            Vector at = v < resident ? kept[v] : packed[v];
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                sum += exp_flushed(reals_get(at, j) - base);
            }
        }
        exp_sum_block<THREADS>(&largest, &sum, sums[turn]);
        int mine = target / VEC % THREADS == (int)threadIdx.x;  // this thread has the target
        float scale = grad_scale / sum, logit = 0.0f;
        if (mine) {
            logit = floatX_to_f32(target / VEC < resident ? ((const floatX*)kept)[target] : x[target]);
            losses[row] = logf(sum) + (largest - logit);
        }
#pragma unroll 2
        for (int v = threadIdx.x; v < vectors; v += THREADS) {
            if (with_grad) {
                Vector at = v < resident ? kept[v] : packed[v];
                float gradient[VEC];
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    gradient[j] = exp_flushed(reals_get(at, j) - largest) * scale;
                }
                packed[v] = reals_of<VEC, floatX>(gradient);
            }
            if (next && v < resident) {
                copy_async(kept + v, next + v);
            }
        }
        if (mine && with_grad) {  // behind this thread's store of the whole vector
            x[target] = to_floatX((exp_flushed(logit - largest) / sum - 1.0f) * grad_scale);
        }
    }
}

// any V, one block a row; the row's second use comes from the L2 cache
#define CLASSIFIER_THREADS 512
__global__ void crossentropy_plain_kernel(float* losses, floatX* logits, const int32_t* targets, int V,
                                          float grad_scale, int with_grad) {
    __shared__ float sums[2][WARP_LANES];
    floatX* x = logits + (size_t)blockIdx.x * V;
    int target = targets[blockIdx.x];
    float largest = -INFINITY, sum = 0.0f;
    for (int v = threadIdx.x; v < V; v += CLASSIFIER_THREADS) {
        float value = floatX_to_f32(x[v]);
        if (value > largest) {
            sum *= exp_flushed(largest - value);
            largest = value;
        }
        sum += exp_flushed(value - exp_base(largest));
    }
    exp_sum_block<CLASSIFIER_THREADS>(&largest, &sum, sums);
    if (target % CLASSIFIER_THREADS == (int)threadIdx.x) {  // before this thread writes over it
        losses[blockIdx.x] = logf(sum) + (largest - floatX_to_f32(x[target]));
    }
    float scale = grad_scale / sum;
    for (int v = threadIdx.x; with_grad && v < V; v += CLASSIFIER_THREADS) {
        float p = exp_flushed(floatX_to_f32(x[v]) - largest);
        x[v] = to_floatX(v == target ? (p / sum - 1.0f) * grad_scale : p * scale);
    }
}

typedef struct { int block_bytes, total_bytes; } SharedMemory;  // that a block, all blocks of a multiprocessor may have

static SharedMemory shared_memory(void) {
    SharedMemory m = {};
    cuda_check(cudaDeviceGetAttribute(&m.block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.device));
    cuda_check(cudaDeviceGetAttribute(&m.total_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, gpu.device));
    return m;
}

#define CLASSIFIER_STATIC_BYTES 2048  // of a block: the sums, and what the system takes

template <int THREADS, int BLOCKS>
static void crossentropy_launch(float* losses, floatX* logits, const int32_t* targets, int rows, int V,
                                float grad_scale, int with_grad, int resident) {
    int bytes = resident * 16, blocks = 0;
    cuda_check(cudaFuncSetAttribute(crossentropy_kernel<THREADS, BLOCKS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    bytes));
    cuda_check(cudaFuncSetAttribute(crossentropy_kernel<THREADS, BLOCKS>,
                                    cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, crossentropy_kernel<THREADS, BLOCKS>, THREADS,
                                                             (size_t)bytes));
    blocks = min_int(rows, max_int(1, blocks) * gpu.sm_count);
    crossentropy_kernel<THREADS, BLOCKS><<<blocks, THREADS, (size_t)bytes, gpu.stream>>>(
        losses, logits, targets, rows, V, grad_scale, with_grad, resident);
}

// three blocks of 512 threads where three rows fit into a multiprocessor, or two; else one of 1024
static void cuda_crossentropy(float* losses, floatX* logits, const int32_t* targets, int rows, int V, float grad_scale,
                              int with_grad) {
    SharedMemory memory = shared_memory();
    int most = (memory.block_bytes - CLASSIFIER_STATIC_BYTES) / 16, resident = min_int(V / VEC, most);
    if (V % VEC != 0) {
        crossentropy_plain_kernel<<<rows, CLASSIFIER_THREADS, 0, gpu.stream>>>(losses, logits, targets, V, grad_scale,
                                                                               with_grad);
    } else if (2 * (resident * 16 + CLASSIFIER_STATIC_BYTES) <= memory.total_bytes) {
        crossentropy_launch<512, 3>(losses, logits, targets, rows, V, grad_scale, with_grad, resident);
    } else {
        crossentropy_launch<1024, 1>(losses, logits, targets, rows, V, grad_scale, with_grad, resident);
    }
    cuda_check_launch();
}
