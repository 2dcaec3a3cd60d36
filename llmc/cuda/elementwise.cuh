// cuda/elementwise.cuh: residual add, RoPE, SwiGLU. Bound by memory: 16 bytes a thread and load, each byte moved once.
#pragma once
#include "mxint8.cuh"

#define ELEMENT_THREADS 256

static int element_blocks(size_t items) { return (int)ceil_div((int64_t)items, ELEMENT_THREADS); }

template <int N>
__global__ void add_kernel(floatX* out, const floatX* a, const floatX* b, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i < n) {
        Lanes<N> x = lanes_load<N>(a + i), y = lanes_load<N>(b + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            x.v[j] = to_floatX(floatX_to_f32(x.v[j]) + floatX_to_f32(y.v[j]));
        }
        lanes_store(out + i, x);
    }
}

static void cuda_add(floatX* out, const floatX* a, const floatX* b, size_t n) {
    if (n % VEC == 0) {
        add_kernel<VEC><<<element_blocks(n / VEC), ELEMENT_THREADS, 0, gpu.stream>>>(out, a, b, n);
    } else {
        add_kernel<1><<<element_blocks(n), ELEMENT_THREADS, 0, gpu.stream>>>(out, a, b, n);
    }
    cuda_check_launch();
}

// one thread turns N pairs (j, j + HS/2) of one head of one token, in place; table (positions, HS/2, 2)
template <int N>
__global__ void rope_kernel(floatX* qkv, const float* table, int BT, int T, int heads, int width, int HS,
                            int first_position, float direction) {
    int per_head = HS / 2 / N;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)BT * heads * per_head) {
        return;
    }
    int j = (int)(i % per_head) * N, h = (int)(i / per_head % heads);
    size_t bt = i / per_head / heads;
    floatX *low = qkv + bt * width + (size_t)h * HS + j, *high = low + HS / 2;
    const float* angles = table + ((size_t)(first_position + bt % T) * (HS / 2) + j) * 2;
    Lanes<N> a = lanes_load<N>(low), b = lanes_load<N>(high);
#pragma unroll
    for (int k = 0; k < N; k++) {
        float cosine = angles[2 * k], sine = direction * angles[2 * k + 1];
        float x = floatX_to_f32(a.v[k]), y = floatX_to_f32(b.v[k]);
        a.v[k] = to_floatX(x * cosine - y * sine);
        b.v[k] = to_floatX(y * cosine + x * sine);
    }
    lanes_store(low, a);
    lanes_store(high, b);
}

static void cuda_rope(floatX* qkv, const float* table, AttentionShape s, int first_position, int inverse) {
    int BT = s.B * s.T, heads = s.NH + s.NKV, width = (s.NH + 2 * s.NKV) * s.HS;
    float direction = inverse ? -1.0f : 1.0f;
    if (s.HS / 2 % VEC == 0) {
        size_t items = (size_t)BT * heads * (s.HS / 2 / VEC);
        rope_kernel<VEC><<<element_blocks(items), ELEMENT_THREADS, 0, gpu.stream>>>(qkv, table, BT, s.T, heads, width,
                                                                                    s.HS, first_position, direction);
    } else {
        size_t items = (size_t)BT * heads * (s.HS / 2);
        rope_kernel<1><<<element_blocks(items), ELEMENT_THREADS, 0, gpu.stream>>>(qkv, table, BT, s.T, heads, width,
                                                                                  s.HS, first_position, direction);
    }
    cuda_check_launch();
}

// KEEP: inp also goes to kept; N is VEC then, F a multiple of GROUP
template <int N, int KEEP>
__global__ void swiglu_forward_kernel(floatX* out, Mxint8 kept, const floatX* inp, size_t BT, int F) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    int valid = i < BT * F;
    if (!KEEP && !valid) {
        return;
    }
    i = valid ? i : 0;
    size_t row = i / F, f = i % F, at = row * 2 * F + f;
    if constexpr (KEEP) {
        vector_keep(kept, at / N, reals_load<N>(inp + at), valid);
        vector_keep(kept, (at + F) / N, reals_load<N>(inp + at + F), valid);
    }
    Lanes<N> gate = lanes_load<N>(inp + at), up = lanes_load<N>(inp + at + F);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float g = floatX_to_f32(gate.v[j]);
        gate.v[j] = to_floatX(g / (1.0f + __expf(-g)) * floatX_to_f32(up.v[j]));
    }
    if (valid) {
        lanes_store(out + i, gate);
    }
}

static void kept_check(Mxint8 kept, int F) {
    check(kept.codes == NULL || (F % GROUP == 0 && (uintptr_t)kept.codes % VEC == 0),
          "internal: no MXINT8 of rows of 2 x %d at %p", F, (void*)kept.codes);
}

// out (BT, F) = silu(gate) * up, inp (BT, 2F); kept (BT, 2F) = inp where there is one
static void cuda_swiglu_forward(floatX* out, Mxint8 kept, const floatX* inp, int BT, int F) {
    size_t n = (size_t)BT * F;
    int blocks = element_blocks(F % VEC == 0 ? n / VEC : n);
    kept_check(kept, F);
    if (kept.codes) {
        swiglu_forward_kernel<VEC, 1><<<blocks, ELEMENT_THREADS, 0, gpu.stream>>>(out, kept, inp, BT, F);
    } else if (F % VEC == 0) {
        swiglu_forward_kernel<VEC, 0><<<blocks, ELEMENT_THREADS, 0, gpu.stream>>>(out, kept, inp, BT, F);
    } else {
        swiglu_forward_kernel<1, 0><<<blocks, ELEMENT_THREADS, 0, gpu.stream>>>(out, kept, inp, BT, F);
    }
    cuda_check_launch();
}

// KEPT: of kept instead of inp, N as above
template <int N, int KEPT>
__global__ void swiglu_backward_kernel(floatX* dinp, const floatX* dout, const floatX* inp, Mxint8 kept, size_t BT,
                                       int F) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= BT * F) {
        return;
    }
    size_t row = i / F, f = i % F, at = row * 2 * F + f;
    Lanes<N> gate, up, dy = lanes_load<N>(dout + i);
    KeptVector kept_gate, kept_up;
    if constexpr (KEPT) {
        kept_gate = kept_load(kept, at / N), kept_up = kept_load(kept, (at + F) / N);
    } else {
        gate = lanes_load<N>(inp + at), up = lanes_load<N>(inp + at + F);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        float g = KEPT ? kept_get(kept_gate, j) : floatX_to_f32(gate.v[j]);
        float u = KEPT ? kept_get(kept_up, j) : floatX_to_f32(up.v[j]), d = floatX_to_f32(dy.v[j]);
        float s = 1.0f / (1.0f + __expf(-g));
        gate.v[j] = to_floatX(d * u * s * (1.0f + g * (1.0f - s)));
        up.v[j] = to_floatX(d * g * s);
    }
    lanes_store(dinp + at, gate);
    lanes_store(dinp + at + F, up);
}

// dinp (BT, 2F) = gradient at inp or, where there is one, at kept's values
static void cuda_swiglu_backward(floatX* dinp, const floatX* dout, const floatX* inp, Mxint8 kept, int BT, int F) {
    size_t n = (size_t)BT * F;
    int blocks = element_blocks(F % VEC == 0 ? n / VEC : n);
    kept_check(kept, F);
    if (kept.codes) {
        swiglu_backward_kernel<VEC, 1><<<blocks, ELEMENT_THREADS, 0, gpu.stream>>>(dinp, dout, inp, kept, BT, F);
    } else if (F % VEC == 0) {
        swiglu_backward_kernel<VEC, 0><<<blocks, ELEMENT_THREADS, 0, gpu.stream>>>(dinp, dout, inp, kept, BT, F);
    } else {
        swiglu_backward_kernel<1, 0><<<blocks, ELEMENT_THREADS, 0, gpu.stream>>>(dinp, dout, inp, kept, BT, F);
    }
    cuda_check_launch();
}
