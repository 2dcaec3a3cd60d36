// cuda/fused_backward.cuh: the backward half of the passes that take their neighbour along (ops.h): a gradient in
// rotated space, dX = H (mask * row_scale * dXq), is turned back where it is read, rounded to floatX as unrotate would
// store it, and goes on through the backward pass of SwiGLU or of a norm. See fused.cuh: a group of 32 stays in the
// four neighbouring lanes that loaded it.
//
//   bytes an element                fused                              composition
//   unrotate_swiglu_backward        2 + 0.13 + 4 + 4     = 10.1        4.1 + 10    = 14.1
//   the same of MXINT8              2 + 0.13 + 2.06 + 4  = 8.2         4.1 + 8.1   = 12.2
//   unrotate_rmsnorm_backward       2 + 0.13 + 4 + 2     = 8.1         4.1 + 8     = 12.1
#pragma once
#include "fused.cuh"

static void unfused_unrotate_swiglu_backward(floatX* dinp, floatX* dact, const uint32_t* mask, const float* row_scale,
                                             const floatX* inp, Mxint8 kept, int BT, int F) {
    cuda_unrotate(real_floatX(dact), mask, row_scale, BT, F);
    cuda_swiglu_backward(dinp, dact, inp, kept, BT, F);
}

static void unfused_unrotate_rmsnorm_backward(floatX* dinp, RealArray dweight, floatX* dnorm, const uint32_t* mask,
                                              const float* row_scale, const floatX* dresidual, const floatX* inp,
                                              const floatX* weight, const float* rstd, int BT, int C) {
    cuda_unrotate(real_floatX(dnorm), mask, row_scale, BT, C);
    cuda_rmsnorm_backward(dinp, dweight, dnorm, dresidual, inp, weight, rstd, BT, C);
}

#ifdef PRECISION_FP32
#define cuda_unrotate_swiglu_backward unfused_unrotate_swiglu_backward
#define cuda_unrotate_rmsnorm_backward unfused_unrotate_rmsnorm_backward
#else

// the trust mask of vector number i, VEC bits
__device__ __forceinline__ uint32_t vector_mask(const uint32_t* mask, size_t i) { return ((const uint8_t*)mask)[i]; }

// dx = H (scale * mask * dx), rounded; all lanes of the warp
__device__ __forceinline__ Vector vector_unrotate(const Vector& dx, uint32_t mask, float scale) {
    float v[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        v[i] = mask >> i & 1u ? mul_rn(reals_get(dx, i), scale) : 0.0f;  // times 1 is exact
    }
    part_hadamard(v);
    return reals_of<VEC, floatX>(v);
}

// ---------------------------------------------------------------------------------------------------------------------
// SwiGLU: a thread has neighbouring vectors of gate, up and dact; KEPT: gate and up are kept's

template <int KEPT>
__global__ void __launch_bounds__(ELEMENT_THREADS, 5)
    unrotate_swiglu_backward_kernel(floatX* dinp, const floatX* dact, const uint32_t* mask, const float* row_scale,
                                    const floatX* inp, Mxint8 kept, uint32_t BT, uint32_t F) {
    uint32_t row_vectors = F / VEC, warp_lane = threadIdx.x % WARP_LANES;
    uint64_t vectors = (uint64_t)BT * row_vectors, step = (uint64_t)gridDim.x * ELEMENT_THREADS;
    uint64_t vector = (uint64_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    uint32_t row = (uint32_t)(vector / row_vectors), in_row = (uint32_t)(vector % row_vectors);
    uint32_t step_rows = (uint32_t)(step / row_vectors), step_in_row = (uint32_t)(step % row_vectors);
    for (; vector - warp_lane < vectors; vector += step) {
        int valid = vector < vectors;
        size_t at = valid ? (size_t)row * 2 * row_vectors + in_row : 0, from = valid ? vector : 0;
        Vector gate, up;
        KeptVector kept_gate, kept_up;
        if constexpr (KEPT) {
            kept_gate = kept_load(kept, at), kept_up = kept_load(kept, at + row_vectors);
        } else {
            gate = ((const Vector*)inp)[at], up = ((const Vector*)inp)[at + row_vectors];
        }
        Vector dy = ((const Vector*)dact)[from];
        dy = vector_unrotate(dy, vector_mask(mask, from), row_scale ? row_scale[valid ? row : 0] : 1.0f);
        float dgate[VEC], dup[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) {  // as swiglu_backward_kernel
            float g = KEPT ? kept_get(kept_gate, i) : reals_get(gate, i), d = reals_get(dy, i);
            float u = KEPT ? kept_get(kept_up, i) : reals_get(up, i);
            float s = 1.0f / (1.0f + __expf(-g));
            dgate[i] = d * u * s * (1.0f + g * (1.0f - s));
            dup[i] = d * g * s;
        }
        if (valid) {
            ((Vector*)dinp)[at] = reals_of<VEC, floatX>(dgate);
            ((Vector*)dinp)[at + row_vectors] = reals_of<VEC, floatX>(dup);
        }
        row += step_rows;
        in_row += step_in_row;
        if (in_row >= row_vectors) {
            in_row -= row_vectors;
            row++;
        }
    }
}

typedef void (*SwigluBackwardKernel)(floatX*, const floatX*, const uint32_t*, const float*, const floatX*, Mxint8,
                                     uint32_t, uint32_t);

// dinp (BT, 2F) = swiglu_backward of inp or kept with dout = unrotate(dact (BT, F), mask, row_scale); dact may be
// overwritten
static void cuda_unrotate_swiglu_backward(floatX* dinp, floatX* dact, const uint32_t* mask, const float* row_scale,
                                          const floatX* inp, Mxint8 kept, int BT, int F) {
    size_t tiles = (size_t)ceil_div((int64_t)BT * F / VEC, ELEMENT_THREADS);
    if (mask == NULL || tiles == 0) {
        unfused_unrotate_swiglu_backward(dinp, dact, mask, row_scale, inp, kept, BT, F);
        return;
    }
    check(F % GROUP == 0, "internal: cannot rotate (%d, %d)", BT, F);
    kept_check(kept, F);
    SwigluBackwardKernel kernel =
        kept.codes ? unrotate_swiglu_backward_kernel<1> : unrotate_swiglu_backward_kernel<0>;
    int blocks = persistent_blocks(kernel, ELEMENT_THREADS, tiles);
    kernel<<<blocks, ELEMENT_THREADS, 0, gpu.stream>>>(dinp, dact, mask, row_scale, inp, kept, (uint32_t)BT,
                                                       (uint32_t)F);
    cuda_check_launch();
}

// ---------------------------------------------------------------------------------------------------------------------
// RMSNorm: rmsnorm_backward_kernel with the turned gradient for dout; the same grid, so that the sums of the weight's
// gradient have the same order

// the masks of the vectors of row_load, four to a word
template <int K>
__device__ __forceinline__ void row_masks(uint32_t* keep, const uint32_t* mask, size_t first, int t, int T,
                                          int vectors) {
#pragma unroll
    for (int k = 0; k < K; k++) {
        int v = t + k * T;
        uint32_t m = v < vectors ? vector_mask(mask, first / VEC + v) : 0u;
        keep[k / 4] = k % 4 ? keep[k / 4] | m << (VEC * (k % 4)) : m;
    }
}

template <int K>
__global__ void __launch_bounds__(norm_backward_warps(K) * WARP_LANES, 1)
    unrotate_rmsnorm_backward_kernel(const __grid_constant__ NormBackward p, const uint32_t* mask,
                                     const float* row_scale) {
    __shared__ float dots[2][NORM_BACKWARD_WARPS];
    __shared__ float parts[NORM_BACKWARD_WARPS * WARP_LANES * VEC];
    int T = blockDim.x, t = threadIdx.x, groups = blockDim.y, thread = threadIdx.y * T + t;
    int vectors = p.C / VEC, turn = 0;
    float sum[K][VEC] = {};
    for (int row = threadIdx.y * gridDim.x + blockIdx.x; row < p.BT; row += gridDim.x * groups, turn ^= 1) {
        size_t first = (size_t)row * p.C;
        Vector dy[K], x[K], w[K], residual[K];
        row_load<K>(dy, p.dout + first, t, T, vectors);
        row_load<K>(x, p.inp + first, t, T, vectors);
        row_load<K>(residual, p.dresidual + first, t, T, p.dresidual ? vectors : 0);
        uint32_t keep[(K + 3) / 4];
        row_masks<K>(keep, mask, first, t, T, vectors);
        float dot = 0.0f, r = p.rstd[row], scale = row_scale ? row_scale[row] : 1.0f;
#pragma unroll
        for (int k = 0; k < K; k++) {
            dy[k] = vector_unrotate(dy[k], keep[k / 4] >> (VEC * (k % 4)), scale);
            __syncwarp();  // keeps ptxas from having several in work at once, for which registers are short
        }
        row_load<K>(w, p.weight, t, T, vectors);
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float product = reals_get(dy[k], i) * reals_get(x[k], i);
                dot += product * reals_get(w[k], i);
                sum[k][i] += product * r;
            }
        }
        reals_keep<K>(dy);
        reals_keep<K>(x);
        reals_keep<K>(w);
        float along = group_sum(dot, dots[turn]) / (float)p.C * r * r;
#pragma unroll
        for (int k = 0; k < K; k++) {
            float dx[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float g = r * (reals_get(w[k], i) * reals_get(dy[k], i) - reals_get(x[k], i) * along);
                dx[i] = reals_get(residual[k], i) + g;
            }
            if (t + k * T < vectors) {
                ((Vector*)(p.dinp + first))[t + k * T] = reals_of<VEC, floatX>(dx);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < K; k++) {  // the groups of this block in order, T vectors at a time
        __syncthreads();
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            parts[thread * VEC + i] = sum[k][i];
        }
        __syncthreads();
        for (int j = thread; j < T * VEC; j += T * groups) {
            int c = k * T * VEC + j;
            float total = 0.0f;
            for (int g = 0; g < groups; g++) {
                total += parts[g * T * VEC + j];
            }
            if (c < p.C) {
                p.partial[(size_t)blockIdx.x * p.C + c] = total;
            }
        }
    }
}

// as rmsnorm_backward_launch, whose kernel sets the number of blocks
template <int K>
static int unrotate_rmsnorm_backward_launch(NormBackward p, const uint32_t* mask, const float* row_scale, int warps) {
    int groups = max_int(1, norm_backward_warps(K) / warps), resident = 0;
    dim3 threads((unsigned)(warps * WARP_LANES), (unsigned)groups);
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, rmsnorm_backward_kernel<K>,
                                                             groups * warps * WARP_LANES, 0));
    int blocks = max_int(1, min_int(min_int(p.BT, CUDA_PARTIALS / p.C), resident * gpu.sm_count));
    unrotate_rmsnorm_backward_kernel<K><<<blocks, threads, 0, gpu.stream>>>(p, mask, row_scale);
    return blocks;
}

// rmsnorm_backward with dout = unrotate(dnorm (BT, C), mask, row_scale); dnorm may be overwritten
static void cuda_unrotate_rmsnorm_backward(floatX* dinp, RealArray dweight, floatX* dnorm, const uint32_t* mask,
                                           const float* row_scale, const floatX* dresidual, const floatX* inp,
                                           const floatX* weight, const float* rstd, int BT, int C) {
    RowShape shape = norm_backward_shape(C);
    if (mask == NULL || shape.vectors == 0 || BT == 0) {
        unfused_unrotate_rmsnorm_backward(dinp, dweight, dnorm, mask, row_scale, dresidual, inp, weight, rstd, BT, C);
        return;
    }
    check(C % GROUP == 0, "internal: cannot rotate (%d, %d)", BT, C);
    NormBackward p = {.dinp = dinp, .partial = gpu.partial, .dout = dnorm, .dresidual = dresidual, .inp = inp,
                      .weight = weight, .rstd = rstd, .BT = BT, .C = C};
    int parts = 0;
    switch (shape.vectors) {
    case 1: parts = unrotate_rmsnorm_backward_launch<1>(p, mask, row_scale, shape.warps); break;
    case 2: parts = unrotate_rmsnorm_backward_launch<2>(p, mask, row_scale, shape.warps); break;
    case 3: parts = unrotate_rmsnorm_backward_launch<3>(p, mask, row_scale, shape.warps); break;
    case 4: parts = unrotate_rmsnorm_backward_launch<4>(p, mask, row_scale, shape.warps); break;
    default: parts = unrotate_rmsnorm_backward_launch<5>(p, mask, row_scale, shape.warps);
    }
    rmsnorm_dweight_finish_kernel<<<(int)ceil_div(C, WARP_LANES), dim3(WARP_LANES, WARP_LANES), 0, gpu.stream>>>(
        dweight, gpu.partial, parts, C);
    cuda_check_launch();
}
#endif
