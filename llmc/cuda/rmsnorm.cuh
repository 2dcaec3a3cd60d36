// cuda/rmsnorm.cuh: RMSNorm forward and backward, with the residual add in the same pass.
//
//   out = x r w, r = 1/sqrt(mean(x^2) + eps);  dx = dresidual + r (w dy - x r^2 mean(w dy x));  dw += sum over tokens
//   of dy x r
//
// A group of 1, 2, 4 ... warps works on a row: thread t of its T holds the vectors t, t + T, ... (16 bytes each, K of
// them) in registers, so that a row is read from memory once and all of its loads are under way together. The fewest
// warps are taken that leave K within the registers: up to 2048 channels of bf16 one warp, which needs no barrier.
// Forward, groups take one row and end. Backward, a fixed grid of groups walks over the rows, and each thread sums its
// channels of the weight's gradient in registers: groups of a block are added through shared memory, blocks by a second
// kernel, in one order. Channels that are no multiple of a vector take the plain kernels, one element a load.
#pragma once
#include "vectors.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// how a row is cut

typedef struct { int warps, vectors; } RowShape;  // warps a row, vectors a thread; vectors 0: not cut, plain kernels

static RowShape row_shape(int C, int most_warps, int most_vectors) {
    int warps = 1, vectors = C / VEC;
    while (warps < most_warps && vectors > warps * WARP_LANES * most_vectors) {
        warps *= 2;
    }
    int each = (int)ceil_div(vectors, warps * WARP_LANES);
    return RowShape{warps, C % VEC == 0 && each <= most_vectors ? each : 0};
}

// vectors t, t + T, ... of the row that begins at `row`; 0 beyond its end
template <int K> __device__ __forceinline__ void row_load(Vector* x, const floatX* row, int t, int T, int vectors) {
#pragma unroll
    for (int k = 0; k < K; k++) {
        int v = t + k * T;
        x[k] = v < vectors ? ((const Vector*)row)[v] : Vector{};
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// forward

#define NORM_FORWARD_VECTORS 8
#define NORM_FORWARD_WARPS 8  // of a row and of a block at most

// with b: sum = a + b is stored, too (the residual stream), and normalized as stored. A block is T threads a row by
// its rows.
typedef struct {
    floatX *sum, *out;
    float* rstd;
    const floatX *a, *b, *weight;
    int BT, C;
    float eps;
} NormForward;

template <int K, int ADD>
__global__ void __launch_bounds__(NORM_FORWARD_WARPS * WARP_LANES, K > 6 ? 3 : 4)
rmsnorm_forward_kernel(NormForward p) {
    __shared__ float sums[NORM_FORWARD_WARPS];
    int T = blockDim.x, t = threadIdx.x, warps = T / WARP_LANES;
    int row = blockIdx.x * blockDim.y + threadIdx.y, vectors = row < p.BT ? p.C / VEC : 0;
    size_t first = (size_t)row * p.C;
    Vector x[K], w[K];
    row_load<K>(x, p.a + first, t, T, vectors);
    if (ADD) {
        Vector y[K];
        row_load<K>(y, p.b + first, t, T, vectors);
#pragma unroll
        for (int k = 0; k < K; k++) {
            float sum[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                sum[i] = reals_get(x[k], i) + reals_get(y[k], i);
            }
            x[k] = reals_of<VEC, floatX>(sum);
            if (t + k * T < vectors) {
                ((Vector*)(p.sum + first))[t + k * T] = x[k];
            }
        }
    }
    row_load<K>(w, p.weight, t, T, vectors);
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            squares += reals_get(x[k], i) * reals_get(x[k], i);
        }
    }
    reals_keep<K>(x);
    squares = warp_sum(squares);
    if (warps > 1) {
        float* mine = sums + threadIdx.y * warps;
        mine[t / WARP_LANES] = squares;
        __syncthreads();
        squares = 0.0f;
        for (int i = 0; i < warps; i++) {
            squares += mine[i];
        }
    }
    float r = rsqrtf(squares / (float)p.C + p.eps);
#pragma unroll
    for (int k = 0; k < K; k++) {
        float out[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            out[i] = reals_get(x[k], i) * r * reals_get(w[k], i);
        }
        if (t + k * T < vectors) {
            ((Vector*)(p.out + first))[t + k * T] = reals_of<VEC, floatX>(out);
        }
    }
    if (t == 0 && row < p.BT) {
        p.rstd[row] = r;
    }
}

// any C, one warp a row
__global__ void rmsnorm_forward_plain_kernel(NormForward p) {
    int row = blockIdx.x * (blockDim.x / WARP_LANES) + threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    if (row >= p.BT) {
        return;
    }
    size_t first = (size_t)row * p.C;
    float squares = 0.0f;
    for (int c = lane; c < p.C; c += WARP_LANES) {
        floatX x = p.a[first + c];
        if (p.b) {
            x = to_floatX(floatX_to_f32(x) + floatX_to_f32(p.b[first + c]));
            p.sum[first + c] = x;
        }
        squares += floatX_to_f32(x) * floatX_to_f32(x);
    }
    float r = rsqrtf(warp_sum(squares) / (float)p.C + p.eps);
    const floatX* again = p.b ? p.sum : p.a;
    for (int c = lane; c < p.C; c += WARP_LANES) {
        p.out[first + c] = to_floatX(floatX_to_f32(again[first + c]) * r * floatX_to_f32(p.weight[c]));
    }
    if (lane == 0) {
        p.rstd[row] = r;
    }
}

template <int K> static void rmsnorm_forward_launch(NormForward p, int warps) {
    int rows = max_int(1, 4 / warps), blocks = (int)ceil_div(p.BT, rows);
    dim3 threads((unsigned)(warps * WARP_LANES), (unsigned)rows);
    if (p.b) {
        rmsnorm_forward_kernel<K, 1><<<blocks, threads, 0, gpu.stream>>>(p);
    } else {
        rmsnorm_forward_kernel<K, 0><<<blocks, threads, 0, gpu.stream>>>(p);
    }
}

static void rmsnorm_forward_any(NormForward p) {
    RowShape shape = row_shape(p.C, NORM_FORWARD_WARPS, NORM_FORWARD_VECTORS);
    switch (shape.vectors) {
    case 1: rmsnorm_forward_launch<1>(p, shape.warps); break;
    case 2: rmsnorm_forward_launch<2>(p, shape.warps); break;
    case 3: rmsnorm_forward_launch<3>(p, shape.warps); break;
    case 4: rmsnorm_forward_launch<4>(p, shape.warps); break;
    case 5: rmsnorm_forward_launch<5>(p, shape.warps); break;
    case 6: rmsnorm_forward_launch<6>(p, shape.warps); break;
    case 7: rmsnorm_forward_launch<7>(p, shape.warps); break;
    case 8: rmsnorm_forward_launch<8>(p, shape.warps); break;
    default: rmsnorm_forward_plain_kernel<<<(int)ceil_div(p.BT, 4), 4 * WARP_LANES, 0, gpu.stream>>>(p);
    }
    cuda_check_launch();
}

static void cuda_rmsnorm_forward(floatX* out, float* rstd, const floatX* inp, const floatX* weight, int BT, int C,
                                 float eps) {
    rmsnorm_forward_any(NormForward{.sum = NULL, .out = out, .rstd = rstd, .a = inp, .b = NULL, .weight = weight,
                                    .BT = BT, .C = C, .eps = eps});
}

static void cuda_add_rmsnorm_forward(floatX* sum, floatX* out, float* rstd, const floatX* a, const floatX* b,
                                     const floatX* weight, int BT, int C, float eps) {
    rmsnorm_forward_any(NormForward{.sum = sum, .out = out, .rstd = rstd, .a = a, .b = b, .weight = weight, .BT = BT,
                                    .C = C, .eps = eps});
}

// ---------------------------------------------------------------------------------------------------------------------
// backward

#define NORM_BACKWARD_VECTORS 5
#define NORM_BACKWARD_WARPS 16  // of a row and of a block at most

// A block is T threads a row by groups.
typedef struct {
    floatX* dinp;
    float* partial;  // (blocks, C): each block's sum for the weight's gradient
    const floatX *dout, *dresidual, *inp, *weight;
    const float* rstd;
    int BT, C;
} NormBackward;

// warps of a block: as many as the registers of a multiprocessor hold
static constexpr int norm_backward_warps(int K) { return K == 5 ? 12 : NORM_BACKWARD_WARPS; }

static RowShape norm_backward_shape(int C) {
    RowShape shape = row_shape(C, NORM_BACKWARD_WARPS, NORM_BACKWARD_VECTORS);
    shape.vectors = shape.warps > norm_backward_warps(shape.vectors) ? 0 : shape.vectors;
    return shape;
}

// sum over the T threads of a group, the same value in each. dots is one of two arrays that take turns: a slot is
// written again only behind the next row's barrier. Named barriers, because groups differ in the number of their rows.
__device__ __forceinline__ float group_sum(float x, float* dots) {
    int warps = blockDim.x / WARP_LANES;
    float* mine = dots + threadIdx.y * warps;
    x = warp_sum(x);
    if (warps > 1) {
        mine[threadIdx.x / WARP_LANES] = x;
        asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.y), "r"(blockDim.x) : "memory");
        x = 0.0f;
        for (int i = 0; i < warps; i++) {
            x += mine[i];
        }
    }
    return x;
}

template <int K>
__global__ void __launch_bounds__(norm_backward_warps(K) * WARP_LANES, 1) rmsnorm_backward_kernel(NormBackward p) {
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
        row_load<K>(w, p.weight, t, T, vectors);
        float dot = 0.0f, r = p.rstd[row];
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

// any C, one warp a row
__global__ void rmsnorm_backward_plain_kernel(NormBackward p) {
    int row = blockIdx.x * (blockDim.x / WARP_LANES) + threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    if (row >= p.BT) {
        return;
    }
    size_t first = (size_t)row * p.C;
    float dot = 0.0f, r = p.rstd[row];
    for (int c = lane; c < p.C; c += WARP_LANES) {
        dot += floatX_to_f32(p.dout[first + c]) * floatX_to_f32(p.weight[c]) * floatX_to_f32(p.inp[first + c]);
    }
    float along = warp_sum(dot) / (float)p.C * r * r;
    for (int c = lane; c < p.C; c += WARP_LANES) {
        float g = r * (floatX_to_f32(p.weight[c]) * floatX_to_f32(p.dout[first + c]) -
                       floatX_to_f32(p.inp[first + c]) * along);
        p.dinp[first + c] = to_floatX(p.dresidual ? floatX_to_f32(p.dresidual[first + c]) + g : g);
    }
}

// block (x, y) sums share y of the rows for columns x * blockDim.x ...
__global__ void rmsnorm_dweight_plain_kernel(NormBackward p) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= p.C) {
        return;
    }
    int share = (p.BT + (int)gridDim.y - 1) / (int)gridDim.y, begin = blockIdx.y * share,
        end = min(p.BT, begin + share);
    float sum = 0.0f;
#pragma unroll 8
    for (int row = begin; row < end; row++) {
        size_t i = (size_t)row * p.C + c;
        sum += floatX_to_f32(p.dout[i]) * floatX_to_f32(p.inp[i]) * p.rstd[row];
    }
    p.partial[(size_t)blockIdx.y * p.C + c] = sum;
}

// dweight (C) += partial (parts, C): row y of the threads adds up the parts y, y + 32, ..., then the rows in order
__global__ void rmsnorm_dweight_finish_kernel(RealArray dweight, const float* partial, int parts, int C) {
    __shared__ float sums[WARP_LANES][WARP_LANES];
    int c = blockIdx.x * WARP_LANES + threadIdx.x;
    float sum = 0.0f;
    if (c < C) {
#pragma unroll 8
        for (int p = threadIdx.y; p < parts; p += WARP_LANES) {
            sum += partial[(size_t)p * C + c];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < C) {
#pragma unroll
        for (int i = 1; i < WARP_LANES; i++) {
            sum += sums[i][threadIdx.x];
        }
        real_set(dweight, (size_t)c, real_get(dweight, (size_t)c) + sum);
    }
}

// the number of blocks, which is that of the partial sums
template <int K> static int rmsnorm_backward_launch(NormBackward p, int warps) {
    int groups = max_int(1, norm_backward_warps(K) / warps), resident = 0;
    dim3 threads((unsigned)(warps * WARP_LANES), (unsigned)groups);
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, rmsnorm_backward_kernel<K>,
                                                             groups * warps * WARP_LANES, 0));
    int blocks = max_int(1, min_int(min_int(p.BT, CUDA_PARTIALS / p.C), resident * gpu.sm_count));
    rmsnorm_backward_kernel<K><<<blocks, threads, 0, gpu.stream>>>(p);
    return blocks;
}

static int rmsnorm_backward_plain_launch(NormBackward p) {
    int columns = (int)ceil_div(p.C, 128);
    int parts = max_int(1, min_int(min_int(p.BT, CUDA_PARTIALS / p.C), 16 * gpu.sm_count / columns));
    rmsnorm_dweight_plain_kernel<<<dim3((unsigned)columns, (unsigned)parts), 128, 0, gpu.stream>>>(p);
    rmsnorm_backward_plain_kernel<<<(int)ceil_div(p.BT, 4), 4 * WARP_LANES, 0, gpu.stream>>>(p);
    return parts;
}

static void cuda_rmsnorm_backward(floatX* dinp, RealArray dweight, const floatX* dout, const floatX* dresidual,
                                  const floatX* inp, const floatX* weight, const float* rstd, int BT, int C) {
    RowShape shape = norm_backward_shape(C);
    NormBackward p = {.dinp = dinp, .partial = gpu.partial, .dout = dout, .dresidual = dresidual, .inp = inp,
                      .weight = weight, .rstd = rstd, .BT = BT, .C = C};
    int parts = 0;
    switch (shape.vectors) {
    case 1: parts = rmsnorm_backward_launch<1>(p, shape.warps); break;
    case 2: parts = rmsnorm_backward_launch<2>(p, shape.warps); break;
    case 3: parts = rmsnorm_backward_launch<3>(p, shape.warps); break;
    case 4: parts = rmsnorm_backward_launch<4>(p, shape.warps); break;
    case 5: parts = rmsnorm_backward_launch<5>(p, shape.warps); break;
    default: parts = rmsnorm_backward_plain_launch(p);
    }
    rmsnorm_dweight_finish_kernel<<<(int)ceil_div(C, WARP_LANES), dim3(WARP_LANES, WARP_LANES), 0, gpu.stream>>>(
        dweight, gpu.partial, parts, C);
    cuda_check_launch();
}
