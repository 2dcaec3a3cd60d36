// cuda/hadamard.cuh: the 32-point Hadamard transform in the registers of one thread, random signs, and the way rotated
// gradients are turned back.
//
//   H x    = butterflies at distances 1, 2, 4, 8, 16 (a, b -> a + b, a - b), then times f32(1/sqrt(32))
//   R x    = H (s * x), s = +-1 from the sign word of the block of 32 (Quartet, arXiv 2505.14669 v4, Algorithm 1)
//   dX     = H (mask * dXq), for H is symmetric and H H = 1
// One thread owns one group of 32: no shuffles, 5 additions an element, and every f32 operation is the one that
// cpu/quantize.h makes, in its order, rounded once: results are equal bit for bit. The functions marked GROUP_INLINE
// run on the host, too, so that dev/cuda/quantize_bench.cu can compare them with the CPU's without a GPU.
//
// A warp's 32 neighbouring groups are one stretch of memory. They are read and written in 16-byte chunks in the order
// of memory and pass through a staging area of the warp in shared memory to the lanes that own them.
#pragma once
#include "../cpu/quantize.h"
#include "common.cuh"

#define GROUP_INLINE static HOST_DEVICE __forceinline__
#ifdef __CUDA_ARCH__
#define GROUP_UNROLL _Pragma("unroll")
#else
#define GROUP_UNROLL  // unknown to the host's compiler
#endif
#define GROUP_THREADS 256
#define GROUP_WARPS (GROUP_THREADS / WARP_LANES)

// One rounding each, never contracted to a fused multiply-add. Host builds need -ffp-contract=off.
#ifdef __CUDA_ARCH__
GROUP_INLINE float add_rn(float a, float b) { return __fadd_rn(a, b); }
GROUP_INLINE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
GROUP_INLINE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
GROUP_INLINE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GROUP_INLINE float sqrt_rn(float a) { return __fsqrt_rn(a); }
GROUP_INLINE float max_nan(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
#else
GROUP_INLINE float add_rn(float a, float b) { return a + b; }
GROUP_INLINE float sub_rn(float a, float b) { return a - b; }
GROUP_INLINE float mul_rn(float a, float b) { return a * b; }
GROUP_INLINE float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
GROUP_INLINE float sqrt_rn(float a) { return sqrtf(a); }
GROUP_INLINE float max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }
#endif

// butterflies at one distance
GROUP_INLINE void group_butterflies(float* v, int distance) {
GROUP_UNROLL
    for (int k = 0; k < GROUP; k++) {
        if (!(k & distance)) {
            float a = v[k], b = v[k + distance];
            v[k] = add_rn(a, b);
            v[k + distance] = sub_rn(a, b);
        }
    }
}

// v = sqrt(32) H v, the butterflies alone. Returns the largest magnitude, NaN where there is one: of the last
// butterflies' results a + b and a - b the larger magnitude is fl(|a| + |b|). least: bits of the least of those; where
// it is not zero, there is no sum -0.
GROUP_INLINE float group_butterfly_sums(float* v, uint32_t* least) {
    float largest = 0.0f;
    *least = ~0u;
    group_butterflies(v, 1);
    group_butterflies(v, 2);
    group_butterflies(v, 4);
    group_butterflies(v, 8);
GROUP_UNROLL
    for (int k = 0; k < GROUP / 2; k++) {
        float larger = add_rn(fabsf(v[k]), fabsf(v[k + GROUP / 2]));
        largest = max_nan(largest, larger);
        *least = min(*least, f32_bits(larger));
    }
    group_butterflies(v, 16);
    return largest;
}

// v = H v. Returns the largest magnitude, NaN where there is one: rounding of the final product keeps the order.
GROUP_INLINE float group_hadamard(float* v) {
    uint32_t least;
    float largest = group_butterfly_sums(v, &least);
GROUP_UNROLL
    for (int k = 0; k < GROUP; k++) {
        v[k] = mul_rn(v[k], HADAMARD_SCALE);
    }
    return mul_rn(largest, HADAMARD_SCALE);
}

GROUP_INLINE float group_largest(const float* v) {
    float largest = 0.0f;
GROUP_UNROLL
    for (int k = 0; k < GROUP; k++) {
        largest = max_nan(largest, fabsf(v[k]));
    }
    return largest;
}

// ---------------------------------------------------------------------------------------------------------------------
// a group as words of memory: T is bf16 or float

#define GROUP_WORDS(T) (GROUP * (int)sizeof(T) / 4)
#define GROUP_CHUNKS(T) (GROUP * (int)sizeof(T) / 16)

template <typename T> GROUP_INLINE void group_unpack(float* v, const uint32_t* words) {
GROUP_UNROLL
    for (int i = 0; i < GROUP_WORDS(T); i++) {
        if (sizeof(T) == 2) {
            v[2 * i % GROUP] = f32_from_bits(words[i] << 16);
            v[(2 * i + 1) % GROUP] = f32_from_bits(words[i] & 0xffff0000u);
        } else {
            v[i] = f32_from_bits(words[i]);
        }
    }
}

template <typename T> GROUP_INLINE void group_pack(uint32_t* words, const float* v) {
GROUP_UNROLL
    for (int i = 0; i < GROUP_WORDS(T); i++) {
        if (sizeof(T) == 4) {
            words[i] = f32_bits(v[i]);
        } else {
            float low = v[2 * i % GROUP], high = v[(2 * i + 1) % GROUP];
#ifdef __CUDA_ARCH__
            __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
            words[i] = *(uint32_t*)&pair;
#else
            words[i] = (uint32_t)f32_to_bf16(low).bits | (uint32_t)f32_to_bf16(high).bits << 16;
#endif
        }
    }
}

// The sign word so that a shift brings the signs of memory word i to where its elements have theirs. f32: the word
// itself, word i << (31 - i). bf16: even elements in the low half, odd ones in the high half, each from its top bit
// down, word i << i.
template <typename T> GROUP_INLINE uint32_t signs_spread(uint32_t word) {
    if (sizeof(T) == 4) {
        return word;
    }
    uint32_t spread = 0;
GROUP_UNROLL
    for (int parity = 0; parity < 2; parity++) {
        uint32_t x = word >> parity & 0x55555555u;  // every other bit, brought together
        x = (x | x >> 1) & 0x33333333u;
        x = (x | x >> 2) & 0x0f0f0f0fu;
        x = (x | x >> 4) & 0x00ff00ffu;
        x = (x | x >> 8) & 0x0000ffffu;
        spread |= x << (16 * parity);
    }
    // bit i to bit 15 - i in each half
    spread = (spread >> 1 & 0x55555555u) | (spread & 0x55555555u) << 1;
    spread = (spread >> 2 & 0x33333333u) | (spread & 0x33333333u) << 2;
    spread = (spread >> 4 & 0x0f0f0f0fu) | (spread & 0x0f0f0f0fu) << 4;
    return (spread >> 8 & 0x00ff00ffu) | (spread & 0x00ff00ffu) << 8;
}

template <typename T> GROUP_INLINE void group_flip_signs(uint32_t* words, uint32_t spread) {
GROUP_UNROLL
    for (int i = 0; i < GROUP_WORDS(T); i++) {
        words[i] ^= sizeof(T) == 4 ? (spread << (31 - i)) & 0x80000000u : (spread << i) & 0x80008000u;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the staging area of a warp: chunks of 16 bytes

#define STAGE_CHUNKS(T) (WARP_LANES * GROUP_CHUNKS(T))

// Where chunk q lies: what 8 lanes touch at once, neighbours or every second, fourth or eighth, covers all banks.
// Chunk lane * N + i, N 2, 4 or 8, lies at stage_index(lane * N) ^ i; chunk lane + 32 i at 32 i + (stage_index(lane) ^
// i % 2 * 4). stage_lane has the compiler make an index once, and not again for every chunk under its predicate.
__device__ __forceinline__ int stage_index(int q) { return q ^ (q >> 3 & 7); }

__device__ __forceinline__ int stage_lane(int q) {
    int index = stage_index(q);
    asm volatile("" : "+r"(index));
    return index;
}

// words: this lane's N chunks, N up to 8, from the staging area
template <int N> __device__ __forceinline__ void stage_take(uint32_t* words, const uint4* stage) {
    int first = stage_lane(threadIdx.x % WARP_LANES * N);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint4 x = stage[first ^ i];
        words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
    }
    __syncwarp();
}

// words: this lane's N chunks of the N * 32 at `from`, of which the first `valid` are there; the others are zero
template <int N>
__device__ __forceinline__ void stage_read(uint32_t* words, const void* from, int valid, uint4* stage) {
    int lane = threadIdx.x % WARP_LANES;
    uint4 x[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        int q = lane + WARP_LANES * i;
        x[i] = q < valid ? ((const uint4*)from)[q] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        stage[(stage_index(lane) ^ i % 2 * 4) + WARP_LANES * i] = x[i];
    }
    stage_take<N>(words, stage);
}

// 16 bytes to shared memory, which are there after stage_commit and stage_wait
__device__ __forceinline__ void chunk_copy(uint4* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from)
                 : "memory");
}

__device__ __forceinline__ void stage_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// until the lane's copies are there but for the `later` groups committed last
template <int later> __device__ __forceinline__ void stage_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory");
}

// stage_read ahead of its time: stage_take after stage_commit and stage_wait. What is not there stays what it was.
template <int N> __device__ __forceinline__ void stage_prefetch(uint4* stage, const void* from, int valid) {
    int lane = threadIdx.x % WARP_LANES, even = stage_lane(lane);
    const uint4* at = (const uint4*)from + lane;
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (lane + WARP_LANES * i < valid) {
            chunk_copy(&stage[(even ^ i % 2 * 4) + WARP_LANES * i], at + WARP_LANES * i);
        }
    }
}

template <int N>
__device__ __forceinline__ void stage_write(void* to, const uint32_t* words, int valid, uint4* stage) {
    int lane = threadIdx.x % WARP_LANES, first = stage_lane(lane * N), even = stage_lane(lane);
#pragma unroll
    for (int i = 0; i < N; i++) {
        stage[first ^ i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; i++) {
        int q = lane + WARP_LANES * i;
        if (q < valid) {
            ((uint4*)to)[q] = stage[(even ^ i % 2 * 4) + WARP_LANES * i];
        }
    }
    __syncwarp();
}

// blocks of a kernel that walks over `items` units of work in a loop: as many as run at once
template <typename Kernel> static int persistent_blocks(Kernel kernel, int threads, size_t items) {
    int resident = 0;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0));
    size_t blocks = (size_t)max_int(resident, 1) * (size_t)gpu.sm_count;
    return (int)(items < blocks ? items : blocks);
}

// ---------------------------------------------------------------------------------------------------------------------
// x (rows, cols) = H (mask * (row_scale * x)) in place

template <typename T>
__global__ void __launch_bounds__(GROUP_THREADS, 3)
    unrotate_kernel(T* x, const uint32_t* mask, const float* row_scale, uint32_t groups, uint32_t row_groups) {
    __shared__ uint4 stages[GROUP_WARPS][STAGE_CHUNKS(T)];
    const int N = GROUP_CHUNKS(T);
    uint32_t lane = threadIdx.x % WARP_LANES;
    uint4* stage = stages[threadIdx.x / WARP_LANES];
    uint32_t first = (blockIdx.x * GROUP_THREADS + threadIdx.x) / WARP_LANES * WARP_LANES;
    for (; first < groups; first += gridDim.x * GROUP_THREADS) {
        uint32_t words[GROUP_WORDS(T)], group = first + lane, keep = ~0u;
        int valid = (int)min(groups - first, (uint32_t)WARP_LANES) * N;
        T* at = x + (size_t)first * GROUP;
        float v[GROUP], scale = 1.0f;
        if (group < groups) {
            keep = mask ? mask[group] : ~0u;
            scale = row_scale ? row_scale[group / row_groups] : 1.0f;
        }
        stage_read<N>(words, at, valid, stage);
        group_unpack<T>(v, words);
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            v[k] = keep >> k & 1u ? mul_rn(v[k], scale) : 0.0f;  // times 1 is exact
        }
        group_hadamard(v);
        group_pack<T>(words, v);
        stage_write<N>(at, words, valid, stage);
    }
}

static void cuda_unrotate(RealArray x, const uint32_t* mask, const float* row_scale, int rows, int cols) {
    check(cols % GROUP == 0 && (uintptr_t)x.data % 16 == 0, "internal: cannot rotate (%d, %d) at %p", rows, cols,
          x.data);
    size_t groups = (size_t)rows * cols / GROUP, tiles = (groups + GROUP_THREADS - 1) / GROUP_THREADS;
    check(groups < (1u << 31), "internal: %zu groups are more than 2^31", groups);
    if (groups == 0) {
        return;
    }
    if (x.type == REAL_F32) {
        int blocks = persistent_blocks(unrotate_kernel<float>, GROUP_THREADS, tiles);
        unrotate_kernel<float><<<blocks, GROUP_THREADS, 0, gpu.stream>>>((float*)x.data, mask, row_scale,
                                                                         (uint32_t)groups, (uint32_t)(cols / GROUP));
    } else {
        int blocks = persistent_blocks(unrotate_kernel<floatX>, GROUP_THREADS, tiles);
        unrotate_kernel<floatX><<<blocks, GROUP_THREADS, 0, gpu.stream>>>((floatX*)x.data, mask, row_scale,
                                                                          (uint32_t)groups, (uint32_t)(cols / GROUP));
    }
    cuda_check_launch();
}
