// cuda/optimizer.cuh: sums, the step's decision and AdamW on the device. The host is asked nothing inside a step: norm,
// clip factor and "skip" stay in a StepControl in device memory, and the update reads them there.
//
// Sums are deterministic: a fixed grid of blocks, each over its own elements in a fixed order, then one block over the
// partial sums.
#pragma once
#include "common.cuh"

#define SUM_BLOCKS 1024
#define SUM_THREADS 256

__device__ __forceinline__ double block_sum_f64(double x) {
    __shared__ double sums[SUM_THREADS];
    sums[threadIdx.x] = x;
    __syncthreads();
    for (int half = SUM_THREADS / 2; half; half /= 2) {
        if ((int)threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
        }
        __syncthreads();
    }
    return sums[0];
}

__global__ void sum_squares_kernel(double* partial, const float* x, size_t n) {
    double sum = 0.0;
    int aligned = (uintptr_t)x % 16 == 0;
    size_t stride = (size_t)gridDim.x * blockDim.x * 4;
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < n; i += stride) {
        if (aligned && i + 4 <= n) {
            float4 v = *(const float4*)(x + i);
            sum += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z + (double)v.w * v.w;
        } else {
            for (size_t j = i; j < n && j < i + 4; j++) {
                sum += (double)x[j] * x[j];
            }
        }
    }
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

// *sum = or += the partial sums, one block
__global__ void sum_finish_kernel(double* sum, const double* partial, int n, int accumulate) {
    double mine = 0.0;
    for (int i = threadIdx.x; i < n; i += SUM_THREADS) {
        mine += partial[i];
    }
    mine = block_sum_f64(mine);
    if (threadIdx.x == 0) {
        *sum = accumulate ? *sum + mine : mine;
    }
}

static void cuda_sum_squares(double* sum, const float* x, size_t n) {
    double* partial = (double*)gpu.partial;
    int blocks = (int)min_i64(SUM_BLOCKS, max_i64(1, ceil_div((int64_t)n, SUM_THREADS * 4)));
    sum_squares_kernel<<<blocks, SUM_THREADS, 0, gpu.stream>>>(partial, x, n);
    sum_finish_kernel<<<1, SUM_THREADS, 0, gpu.stream>>>(sum, partial, blocks, 0);
    cuda_check_launch();
}

__global__ void loss_sum_kernel(double* sum, const float* losses, int n) {
    double mine = 0.0;
    for (int i = threadIdx.x; i < n; i += SUM_THREADS) {
        mine += (double)losses[i];
    }
    mine = block_sum_f64(mine);
    if (threadIdx.x == 0) {
        *sum += mine;
    }
}

static void cuda_loss_sum(double* sum, const float* losses, int n) {
    loss_sum_kernel<<<1, SUM_THREADS, 0, gpu.stream>>>(sum, losses, n);
    cuda_check_launch();
}

__global__ void step_decide_kernel(StepControl* control, float grad_clip) { step_decide(control, grad_clip); }

static void cuda_step_decide(StepControl* control, float grad_clip) {
    step_decide_kernel<<<1, 1, 0, gpu.stream>>>(control, grad_clip);
    cuda_check_launch();
}

// four elements a thread; one by one at the end, and where a group of parameters does not begin on 16 bytes
__global__ void adamw_kernel(floatX* param, float* master, float* first, float* second, const float* grad, size_t n,
                             float beta1, float beta2, float eps, float weight_decay, const StepControl* control) {
    if (control->skip) {
        return;
    }
    float lr = control->lr, scale = control->grad_scale, correction1 = control->correction1,
          correction2 = control->correction2;
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    int count = i + 4 <= n ? 4 : i < n ? (int)(n - i) : 0;
    int whole = count == 4 && ((uintptr_t)master | (uintptr_t)first | (uintptr_t)second | (uintptr_t)grad) % 16 == 0 &&
                (uintptr_t)param % (4 * sizeof(floatX)) == 0;
    float w[4] = {0}, m[4] = {0}, v[4] = {0}, g[4] = {0};
    if (whole) {
        *(float4*)w = *(const float4*)(master + i);
        *(float4*)m = *(const float4*)(first + i);
        *(float4*)v = *(const float4*)(second + i);
        *(float4*)g = *(const float4*)(grad + i);
    } else {
        for (int j = 0; j < count; j++) {
            w[j] = master[i + j], m[j] = first[i + j], v[j] = second[i + j], g[j] = grad[i + j];
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float gradient = g[j] * scale;
        m[j] = beta1 * m[j] + (1.0f - beta1) * gradient;
        v[j] = beta2 * v[j] + (1.0f - beta2) * gradient * gradient;
        float step = (m[j] / correction1) / (sqrtf(v[j] / correction2) + eps);
        w[j] = (w[j] - lr * weight_decay * w[j]) - lr * step;
    }
    if (whole) {
        *(float4*)(master + i) = *(float4*)w;
        *(float4*)(first + i) = *(float4*)m;
        *(float4*)(second + i) = *(float4*)v;
        Lanes<4> rounded;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            rounded.v[j] = to_floatX(w[j]);
        }
        lanes_store(param + i, rounded);
    } else {
        for (int j = 0; j < count; j++) {
            master[i + j] = w[j], first[i + j] = m[j], second[i + j] = v[j];
            param[i + j] = to_floatX(w[j]);
        }
    }
}

static void cuda_adamw(const AdamwArgs* a) {
    int blocks = (int)ceil_div((int64_t)ceil_div((int64_t)a->count, 4), 256);
    adamw_kernel<<<blocks, 256, 0, gpu.stream>>>(a->param, a->master, a->m, a->v, a->grad, a->count, a->beta1, a->beta2,
                                                 a->eps, a->weight_decay, a->control);
    cuda_check_launch();
}
