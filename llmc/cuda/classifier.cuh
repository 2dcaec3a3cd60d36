// cuda/classifier.cuh: softmax cross-entropy over one chunk of logits, the gradient written over the logits.
//
// One block a row. First pass: running maximum and sum of exponentials of each thread's share, then over the block in a
// fixed order; second pass, where a gradient is wanted: (softmax - onehot) * grad_scale in place; the row comes from
// the L2 cache then.
#pragma once
#include "common.cuh"

#define CLASSIFIER_THREADS 512

template <int N>
__global__ void crossentropy_kernel(float* losses, floatX* logits, const int32_t* targets, int V, float grad_scale,
                                    int with_grad) {
    floatX* row = logits + (size_t)blockIdx.x * V;
    int target = targets[blockIdx.x];
    float largest = -INFINITY, sum = 0.0f;
    for (int v = threadIdx.x * N; v < V; v += CLASSIFIER_THREADS * N) {
        Lanes<N> x = lanes_load<N>(row + v);
        float top = floatX_to_f32(x.v[0]);
#pragma unroll
        for (int j = 1; j < N; j++) {
            top = fmaxf(top, floatX_to_f32(x.v[j]));
        }
        if (top > largest) {
            sum *= __expf(largest - top);
            largest = top;
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            float value = floatX_to_f32(x.v[j]);  // while all are -inf, their exponentials are 0 and a NaN stays one
            sum += largest > -INFINITY ? __expf(value - largest) : value != value ? value : 0.0f;
        }
    }
    float row_largest = block_max(largest);
    sum = block_sum(largest > -INFINITY ? sum * __expf(largest - row_largest) : sum);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) + row_largest - floatX_to_f32(row[target]);
    }
    if (!with_grad) {
        return;
    }
    __syncthreads();  // the target's logit is read above, before it is overwritten
    float scale = grad_scale / sum;
    for (int v = threadIdx.x * N; v < V; v += CLASSIFIER_THREADS * N) {
        Lanes<N> x = lanes_load<N>(row + v);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float p = __expf(floatX_to_f32(x.v[j]) - row_largest);
            x.v[j] = to_floatX(v + j == target ? (p / sum - 1.0f) * grad_scale : p * scale);
        }
        lanes_store(row + v, x);
    }
}

static void cuda_crossentropy(float* losses, floatX* logits, const int32_t* targets, int rows, int V, float grad_scale,
                              int with_grad) {
    if (V % VEC == 0) {
        crossentropy_kernel<VEC>
            <<<rows, CLASSIFIER_THREADS, 0, gpu.stream>>>(losses, logits, targets, V, grad_scale, with_grad);
    } else {
        crossentropy_kernel<1>
            <<<rows, CLASSIFIER_THREADS, 0, gpu.stream>>>(losses, logits, targets, V, grad_scale, with_grad);
    }
    cuda_check_launch();
}
