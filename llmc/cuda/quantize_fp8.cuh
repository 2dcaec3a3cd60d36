// cuda/quantize_fp8.cuh: whole tensors to E4M3 or E5M2 with one power-of-two factor (the fp8 recipe), equal bit for bit
// to cpu/quantize_fp8.h.
//
// The factor follows from the tensor's largest value, which is known only when all of it has been read. As for the
// carriers of MXFP4 (quant.h, CarrierBase) the first launch writes with the factor of the last use and finds the
// largest value, the second one writes again where that was wrong. Bytes an element: 2 read, 1 written; a saved operand
// that is turned round 1 and 1.
#pragma once
#include "quantize_group.cuh"

#define FP8_THREADS 256
#define FP8_LANE 16                     // elements of a thread: 16 bytes of result
#define FP8_TILE_ROWS 64                // rows of the operand, columns of its transposed source
#define FP8_TILE_K 128
#define FP8_TILE_STRIDE (FP8_TILE_K + 4)

typedef struct {
    uint8_t* out;
    CarrierBase* base;
    Format format;
    int check;
} Fp8Job;

// The base to write with; false: nothing to do. What is written is right, or another launch follows.
__device__ __forceinline__ bool fp8_begin(const Fp8Job& job, int* base) {
    int before = job.base->base;
    *base = before;
    if (!job.check) {
        return true;
    }
    *base = carrier_base(job.format, job.base->largest);
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        job.base->scale = power_of_two(*base);
    }
    return *base != before;
}

// all threads: the largest magnitude, as bits, that this one has seen among finite values
__device__ __forceinline__ void fp8_end(const Fp8Job& job, uint32_t largest) {
    __shared__ uint32_t of_block;
    if (job.check) {
        return;
    }
    if (threadIdx.x == 0) {
        of_block = 0;
    }
    __syncthreads();
    largest = __reduce_max_sync(FULL_WARP, largest);
    if (threadIdx.x % WARP_LANES == 0 && largest > 0) {
        atomicMax(&of_block, largest);
    }
    __syncthreads();
    if (threadIdx.x == 0 && of_block > 0) {
        atomicMax(&job.base->largest, f32_biased_exponent(f32_from_bits(of_block)) - 128);
    }
}

__device__ __forceinline__ float fp8_scaled(float x, float inverse, uint32_t* largest) {
    uint32_t magnitude = f32_bits(x) & 0x7fffffffu;
    bool finite = magnitude < 0x7f800000u;
    *largest = finite && magnitude > *largest ? magnitude : *largest;
    return finite ? __fmul_rn(x, inverse) : f32_from_bits(0x7fc00000u);
}

__global__ void __launch_bounds__(FP8_THREADS) quantize_fp8_kernel(Fp8Job job, const floatX* x, size_t n) {
    int base;
    if (!fp8_begin(job, &base)) {
        return;
    }
    float inverse = power_of_two(-base);
    uint32_t largest = 0;
    size_t stride = (size_t)gridDim.x * FP8_THREADS * FP8_LANE;
    for (size_t i = ((size_t)blockIdx.x * FP8_THREADS + threadIdx.x) * FP8_LANE; i < n; i += stride) {
        if (i + FP8_LANE <= n) {
            uint32_t bytes[FP8_LANE / 4];
            float v[FP8_LANE];
#pragma unroll
            for (int part = 0; part < FP8_LANE / VEC; part++) {
                Lanes<VEC> lanes = lanes_load<VEC>(x + i + part * VEC);
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    v[part * VEC + j] = fp8_scaled(floatX_to_f32(lanes.v[j]), inverse, &largest);
                }
            }
#pragma unroll
            for (int j = 0; j < FP8_LANE / 4; j++) {
                bytes[j] = fp8_pack(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3], job.format);
            }
            *(uint4*)(job.out + i) = *(uint4*)bytes;
        } else {
            for (size_t j = i; j < n; j++) {
                float v = fp8_scaled(floatX_to_f32(x[j]), inverse, &largest);
                job.out[j] = (uint8_t)fp8_pack(v, 0.0f, 0.0f, 0.0f, job.format);
            }
        }
    }
    fp8_end(job, largest);
}

// out (rows, K) of a source (K, rows), floatX or bytes that are there already: through shared memory, a tile a block
template <class T>
__global__ void __launch_bounds__(FP8_THREADS) transpose_fp8_kernel(Fp8Job job, const T* source, int rows, int K) {
    __shared__ __align__(16) uint8_t tile[FP8_TILE_ROWS][FP8_TILE_STRIDE];
    const bool bytes = sizeof(T) == 1;
    int base = 0, row0 = blockIdx.x * FP8_TILE_ROWS, k0 = blockIdx.y * FP8_TILE_K;
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    if (!bytes && !fp8_begin(job, &base)) {
        return;
    }
    float inverse = power_of_two(-base);
    uint32_t largest = 0;
#pragma unroll 4
    for (int k = warp; k < FP8_TILE_K; k += FP8_THREADS / WARP_LANES) {
#pragma unroll
        for (int half = 0; half < FP8_TILE_ROWS / WARP_LANES; half++) {
            int row = lane + half * WARP_LANES;
            if (k0 + k < K && row0 + row < rows) {
                T value = source[(size_t)(k0 + k) * rows + row0 + row];
                if constexpr (bytes) {
                    tile[row][k] = value;
                } else {
                    float v = fp8_scaled(floatX_to_f32(value), inverse, &largest);
                    tile[row][k] = (uint8_t)fp8_pack(v, 0.0f, 0.0f, 0.0f, job.format);
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < FP8_TILE_ROWS * FP8_TILE_K / 4; i += FP8_THREADS) {
        int row = i / (FP8_TILE_K / 4), k = i % (FP8_TILE_K / 4) * 4;
        size_t at = (size_t)(row0 + row) * K + k0 + k;
        if (row0 + row < rows && k0 + k + 4 <= K && K % 4 == 0) {
            *(uint32_t*)(job.out + at) = *(uint32_t*)&tile[row][k];
        } else {
            for (int j = 0; j < 4 && row0 + row < rows && k0 + k + j < K; j++) {
                job.out[at + j] = tile[row][k + j];
            }
        }
    }
    if (!bytes) {
        fp8_end(job, largest);
    }
}

__global__ void copy_base_kernel(CarrierBase* to, const CarrierBase* from) { to->scale = from->scale; }

static int cuda_fp8_supports(const QuantSpec* spec) {
    return (spec->format == FORMAT_E4M3 || spec->format == FORMAT_E5M2) && spec->scale == SCALE_TENSOR_ABSMAX &&
           spec->rotation == ROTATE_NONE && spec->rounding == ROUND_NEAREST;
}

static void cuda_quantize_fp8(const QuantizeArgs* args) {
    QTensor* out = args->out;
    Fp8Job job = {out->codes, out->base, out->format, 0};
    size_t n = (size_t)out->rows * out->cols;
    dim3 tiles((unsigned)ceil_div(out->rows, FP8_TILE_ROWS), (unsigned)ceil_div(out->cols, FP8_TILE_K));
    check(cuda_fp8_supports(&args->spec) && out->base, "internal: quantizer without an implementation");
    if (args->spec.source == SOURCE_SAVED) {
        transpose_fp8_kernel<uint8_t><<<tiles, FP8_THREADS, 0, gpu.stream>>>(job, args->saved->codes, out->rows,
                                                                             out->cols);
        copy_base_kernel<<<1, 1, 0, gpu.stream>>>(out->base, args->saved->base);
    } else {
        for (; job.check < 2; job.check++) {
            if (args->transposed) {
                transpose_fp8_kernel<floatX><<<tiles, FP8_THREADS, 0, gpu.stream>>>(job, args->tensor, out->rows,
                                                                                    out->cols);
            } else {
                int blocks = (int)min_i64(8 * gpu.sm_count, ceil_div((int64_t)n, FP8_THREADS * FP8_LANE));
                quantize_fp8_kernel<<<max_int(1, blocks), FP8_THREADS, 0, gpu.stream>>>(job, args->tensor, n);
            }
        }
    }
    cuda_check_launch();
}
