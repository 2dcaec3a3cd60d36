// cuda/common.cuh: error checks, the one mutable global of the CUDA backend, 16-byte vectors, reductions.
//
// Every kernel is launched on gpu.stream; nothing here synchronizes but cuda_copy_to_host and cuda_synchronize. Kernels
// end in _kernel and read and write 16 bytes a thread where they are bound by memory. Sums over threads have a fixed
// order: runs are bit-reproducible.
#pragma once
#include "../ops.h"
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

// what a failed CUDA call of this program means and what to do: out of memory is the user's case, all else is ours
static void cuda_check_at(cudaError_t error, const char* call, const char* file, int line) {
    if (error == cudaSuccess) {
        return;
    }
    check_or(error != cudaErrorMemoryAllocation, EXIT_NO_MEMORY,
             "out of GPU memory; a smaller --batch-size needs less, and --plan shows what takes it (%s)", call);
    die(EXIT_UNEXPECTED, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
}
#define cuda_check(call) cuda_check_at((call), #call, __FILE__, __LINE__)
#define cuda_check_launch() cuda_check_at(cudaGetLastError(), "kernel launch", __FILE__, __LINE__)

typedef struct {
    int device, sm_count, major, minor;
    size_t memory_bytes;
    char name[256];
    cudaStream_t stream;
    cudaStream_t snapshot_stream;  // copies of a checkpoint to the host
    cudaEvent_t snapshot_begin, snapshot_end;
    cublasLtHandle_t blas;
    void* workspace;        // of cuBLASLt
    size_t workspace_bytes;
    float* partial;         // block partial sums, CUDA_PARTIALS floats
    float* fp4_scalars;     // alpha of an FP4 product, 0, 1, each in 16 bytes of its own
    const Carrier* carrier; // of quantized operands
} CudaContext;
static CudaContext gpu;

#define CUDA_PARTIALS (4 << 20)
#define WARP_LANES 32
#define FULL_WARP 0xffffffffu

// ---------------------------------------------------------------------------------------------------------------------
// floatX in vectors: Lanes<VEC> is 16 bytes, Lanes<1> serves shapes that do not divide

#define VEC ((int)(16 / sizeof(floatX)))  // 8 bf16 or 4 f32
template <int N> struct __align__(N * sizeof(floatX)) Lanes { floatX v[N]; };

template <int N> __device__ __forceinline__ Lanes<N> lanes_load(const floatX* at) { return *(const Lanes<N>*)at; }
template <int N> __device__ __forceinline__ void lanes_store(floatX* at, const Lanes<N>& x) { *(Lanes<N>*)at = x; }

// rounding on the device: the hardware's cvt.rn, equal to f32_to_floatX bit for bit except for the payload of a NaN
__device__ __forceinline__ floatX to_floatX(float x) {
#ifdef PRECISION_FP32
    return x;
#else
    __nv_bfloat16 y = __float2bfloat16_rn(x);
    return *(floatX*)&y;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// reductions

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP_LANES / 2; offset; offset /= 2) {
        x += __shfl_xor_sync(FULL_WARP, x, offset);
    }
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP_LANES / 2; offset; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    }
    return x;
}

// sum over the block, the same value in every thread; blockDim.x is a multiple of 32. Call it with all threads.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[WARP_LANES];
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES, warps = blockDim.x / WARP_LANES;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) {
        sums[warp] = x;
    }
    __syncthreads();
    return warp_sum(lane < warps ? sums[lane] : 0.0f);
}

__device__ __forceinline__ float block_max(float x) {
    __shared__ float largest[WARP_LANES];
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES, warps = blockDim.x / WARP_LANES;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) {
        largest[warp] = x;
    }
    __syncthreads();
    return warp_max(lane < warps ? largest[lane] : -INFINITY);
}
