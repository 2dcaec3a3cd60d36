// cuda/rmsnorm.cuh: RMSNorm forward and backward, with the residual add in the same pass.
//
//   out = x r w, r = 1/sqrt(mean(x^2) + eps);  dx = dresidual + r (w dy - x r^2 mean(w dy x));  dw += sum over tokens
//   of dy x r
// One warp a row; the row is read from memory once, its second use comes from the cache. The weight's gradient is
// summed by a fixed number of blocks, each over its own rows in order, into partial sums that a second kernel adds in
// order.
#pragma once
#include "common.cuh"

#define NORM_WARPS 4

// with b: sum = a + b is stored, too (the residual stream), and normalized as stored
template <int N>
__global__ void rmsnorm_forward_kernel(floatX* sum, floatX* out, float* rstd, const floatX* a, const floatX* b,
                                       const floatX* weight, int BT, int C, float eps) {
    int row = blockIdx.x * NORM_WARPS + threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    if (row >= BT) {
        return;
    }
    const floatX *x = a + (size_t)row * C, *y = b ? b + (size_t)row * C : NULL;
    floatX* stored = b ? sum + (size_t)row * C : NULL;
    float squares = 0.0f;
    for (int c = lane * N; c < C; c += WARP_LANES * N) {
        Lanes<N> v = lanes_load<N>(x + c);
        if (b) {
            Lanes<N> w = lanes_load<N>(y + c);
#pragma unroll
            for (int i = 0; i < N; i++) {
                v.v[i] = to_floatX(floatX_to_f32(v.v[i]) + floatX_to_f32(w.v[i]));
            }
            lanes_store(stored + c, v);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            squares += floatX_to_f32(v.v[i]) * floatX_to_f32(v.v[i]);
        }
    }
    float r = rsqrtf(warp_sum(squares) / (float)C + eps);
    const floatX* again = b ? stored : x;
    for (int c = lane * N; c < C; c += WARP_LANES * N) {
        Lanes<N> v = lanes_load<N>(again + c), w = lanes_load<N>(weight + c), o;
#pragma unroll
        for (int i = 0; i < N; i++) {
            o.v[i] = to_floatX(floatX_to_f32(v.v[i]) * r * floatX_to_f32(w.v[i]));
        }
        lanes_store(out + (size_t)row * C + c, o);
    }
    if (lane == 0) {
        rstd[row] = r;
    }
}

static void rmsnorm_forward_launch(floatX* sum, floatX* out, float* rstd, const floatX* a, const floatX* b,
                                   const floatX* weight, int BT, int C, float eps) {
    int blocks = (int)ceil_div(BT, NORM_WARPS), threads = NORM_WARPS * WARP_LANES;
    if (C % VEC == 0) {
        rmsnorm_forward_kernel<VEC><<<blocks, threads, 0, gpu.stream>>>(sum, out, rstd, a, b, weight, BT, C, eps);
    } else {
        rmsnorm_forward_kernel<1><<<blocks, threads, 0, gpu.stream>>>(sum, out, rstd, a, b, weight, BT, C, eps);
    }
    cuda_check_launch();
}

static void cuda_rmsnorm_forward(floatX* out, float* rstd, const floatX* inp, const floatX* weight, int BT, int C,
                                 float eps) {
    rmsnorm_forward_launch(NULL, out, rstd, inp, NULL, weight, BT, C, eps);
}

static void cuda_add_rmsnorm_forward(floatX* sum, floatX* out, float* rstd, const floatX* a, const floatX* b,
                                     const floatX* weight, int BT, int C, float eps) {
    rmsnorm_forward_launch(sum, out, rstd, a, b, weight, BT, C, eps);
}

template <int N>
__global__ void rmsnorm_backward_kernel(floatX* dinp, const floatX* dout, const floatX* dresidual, const floatX* inp,
                                        const floatX* weight, const float* rstd, int BT, int C) {
    int row = blockIdx.x * NORM_WARPS + threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    if (row >= BT) {
        return;
    }
    size_t first = (size_t)row * C;
    float dot = 0.0f, r = rstd[row];
    for (int c = lane * N; c < C; c += WARP_LANES * N) {
        Lanes<N> dy = lanes_load<N>(dout + first + c), x = lanes_load<N>(inp + first + c),
                 w = lanes_load<N>(weight + c);
#pragma unroll
        for (int i = 0; i < N; i++) {
            dot += floatX_to_f32(dy.v[i]) * floatX_to_f32(w.v[i]) * floatX_to_f32(x.v[i]);
        }
    }
    float along = warp_sum(dot) / (float)C * r * r;
    for (int c = lane * N; c < C; c += WARP_LANES * N) {
        Lanes<N> dy = lanes_load<N>(dout + first + c), x = lanes_load<N>(inp + first + c),
                 w = lanes_load<N>(weight + c), o;
        Lanes<N> residual = dresidual ? lanes_load<N>(dresidual + first + c) : dy;
#pragma unroll
        for (int i = 0; i < N; i++) {
            float g = r * (floatX_to_f32(w.v[i]) * floatX_to_f32(dy.v[i]) - floatX_to_f32(x.v[i]) * along);
            o.v[i] = to_floatX(dresidual ? floatX_to_f32(residual.v[i]) + g : g);
        }
        lanes_store(dinp + first + c, o);
    }
}

// partial (gridDim.y, C): block y sums its share of the rows of columns blockIdx.x * blockDim.x ...
__global__ void rmsnorm_dweight_kernel(float* partial, const floatX* dout, const floatX* inp, const float* rstd, int BT,
                                       int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) {
        return;
    }
    int share = (BT + (int)gridDim.y - 1) / (int)gridDim.y, begin = blockIdx.y * share, end = min(BT, begin + share);
    float sum = 0.0f;
#pragma unroll 8
    for (int row = begin; row < end; row++) {
        size_t i = (size_t)row * C + c;
        sum += floatX_to_f32(dout[i]) * floatX_to_f32(inp[i]) * rstd[row];
    }
    partial[(size_t)blockIdx.y * C + c] = sum;
}

__global__ void rmsnorm_dweight_finish_kernel(float* dweight, const float* partial, int parts, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < C) {
        float sum = 0.0f;
        for (int p = 0; p < parts; p++) {
            sum += partial[(size_t)p * C + c];
        }
        dweight[c] += sum;
    }
}

static void cuda_rmsnorm_backward(floatX* dinp, float* dweight, const floatX* dout, const floatX* dresidual,
                                  const floatX* inp, const floatX* weight, const float* rstd, int BT, int C) {
    int columns = (int)ceil_div(C, 128),
        parts = max_int(1, min_int(min_int(BT, CUDA_PARTIALS / C), 16 * gpu.sm_count / columns));
    rmsnorm_dweight_kernel<<<dim3((unsigned)columns, (unsigned)parts), 128, 0, gpu.stream>>>(gpu.partial, dout, inp,
                                                                                             rstd, BT, C);
    rmsnorm_dweight_finish_kernel<<<columns, 128, 0, gpu.stream>>>(dweight, gpu.partial, parts, C);
    int blocks = (int)ceil_div(BT, NORM_WARPS), threads = NORM_WARPS * WARP_LANES;
    if (C % VEC == 0) {
        rmsnorm_backward_kernel<VEC>
            <<<blocks, threads, 0, gpu.stream>>>(dinp, dout, dresidual, inp, weight, rstd, BT, C);
    } else {
        rmsnorm_backward_kernel<1><<<blocks, threads, 0, gpu.stream>>>(dinp, dout, dresidual, inp, weight, rstd, BT, C);
    }
    cuda_check_launch();
}
