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

// One pass for the usual shapes: thread t of a block holds columns t*VEC .. +VEC-1 for all rows of the block, so the
// sum for the weight's gradient stays in its registers and every tensor is read once. Two rows at a time, to have more
// loads in flight.
__global__ void __launch_bounds__(1024)
rmsnorm_backward_fused_kernel(floatX* dinp, float* partial, const floatX* dout, const floatX* dresidual,
                                              const floatX* inp, const floatX* weight, const float* rstd, int BT,
                                              int C) {
    int c = threadIdx.x * VEC, active = c < C;
    Lanes<VEC> w;
    float sum[VEC] = {0};
    if (active) {
        w = lanes_load<VEC>(weight + c);
    }
    int share = (BT + (int)gridDim.x - 1) / (int)gridDim.x, begin = blockIdx.x * share, end = min(BT, begin + share);
    for (int row = begin; row < end; row += 2) {
        Lanes<VEC> dy[2], x[2];
        float dot[2] = {0.0f, 0.0f}, r[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int valid = active && row + k < end;
            size_t at = (size_t)(valid ? row + k : begin) * C + (active ? c : 0);
            dy[k] = lanes_load<VEC>(dout + at);
            x[k] = lanes_load<VEC>(inp + at);
            r[k] = valid ? rstd[row + k] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float product = floatX_to_f32(dy[k].v[i]) * floatX_to_f32(x[k].v[i]);
                dot[k] += active ? product * floatX_to_f32(w.v[i]) : 0.0f;
                sum[i] += product * r[k];
            }
        }
        dot[0] = block_sum(dot[0]);
        dot[1] = block_sum(dot[1]);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            if (active && row + k < end) {
                size_t at = (size_t)(row + k) * C + c;
                float along = dot[k] / (float)C * r[k] * r[k];
                Lanes<VEC> residual = dresidual ? lanes_load<VEC>(dresidual + at) : dy[k], o;
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    float g =
                        r[k] * (floatX_to_f32(w.v[i]) * floatX_to_f32(dy[k].v[i]) - floatX_to_f32(x[k].v[i]) * along);
                    o.v[i] = to_floatX(dresidual ? floatX_to_f32(residual.v[i]) + g : g);
                }
                lanes_store(dinp + at, o);
            }
        }
    }
    if (active) {
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            partial[(size_t)blockIdx.x * C + c + i] = sum[i];
        }
    }
}

// parts of the sums over threads; columns of threads add up their share in order, then the shares in order
__global__ void rmsnorm_dweight_finish_kernel(float* dweight, const float* partial, int parts, int C) {
    __shared__ float sums[8][WARP_LANES];
    int c = blockIdx.x * WARP_LANES + threadIdx.x;
    float sum = 0.0f;
    if (c < C) {
        for (int p = threadIdx.y; p < parts; p += 8) {
            sum += partial[(size_t)p * C + c];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < C) {
        for (int i = 1; i < 8; i++) {
            sum += sums[i][threadIdx.x];
        }
        dweight[c] += sum;
    }
}

static void rmsnorm_dweight_finish(float* dweight, int parts, int C) {
    dim3 threads(WARP_LANES, 8);
    rmsnorm_dweight_finish_kernel<<<(int)ceil_div(C, WARP_LANES), threads, 0, gpu.stream>>>(dweight, gpu.partial, parts,
                                                                                            C);
}

static void cuda_rmsnorm_backward(floatX* dinp, float* dweight, const floatX* dout, const floatX* dresidual,
                                  const floatX* inp, const floatX* weight, const float* rstd, int BT, int C) {
    int fused_threads = (int)round_up(C / VEC, WARP_LANES);
    if (C % VEC == 0 && fused_threads <= 1024) {
        int resident = max_int(1, 2048 / fused_threads);
        int blocks = max_int(1, min_int(min_int(BT, CUDA_PARTIALS / C), resident * gpu.sm_count));
        rmsnorm_backward_fused_kernel<<<blocks, fused_threads, 0, gpu.stream>>>(dinp, gpu.partial, dout, dresidual, inp,
                                                                               weight, rstd, BT, C);
        rmsnorm_dweight_finish(dweight, blocks, C);
        cuda_check_launch();
        return;
    }
    int columns = (int)ceil_div(C, 128);
    int parts = max_int(1, min_int(min_int(BT, CUDA_PARTIALS / C), 16 * gpu.sm_count / columns));
    rmsnorm_dweight_kernel<<<dim3((unsigned)columns, (unsigned)parts), 128, 0, gpu.stream>>>(gpu.partial, dout, inp,
                                                                                            rstd, BT, C);
    rmsnorm_dweight_finish(dweight, parts, C);
    int blocks = (int)ceil_div(BT, NORM_WARPS), threads = NORM_WARPS * WARP_LANES;
    if (C % VEC == 0) {
        rmsnorm_backward_kernel<VEC>
            <<<blocks, threads, 0, gpu.stream>>>(dinp, dout, dresidual, inp, weight, rstd, BT, C);
    } else {
        rmsnorm_backward_kernel<1>
            <<<blocks, threads, 0, gpu.stream>>>(dinp, dout, dresidual, inp, weight, rstd, BT, C);
    }
    cuda_check_launch();
}
