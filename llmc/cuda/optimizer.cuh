// cuda/optimizer.cuh: sums, the step's decision and AdamW on the device. The host is asked nothing inside a step: norm,
// clip factor and "skip" stay in a StepControl in device memory, and the update reads them there.
//
// Sums are deterministic: a fixed grid of blocks, each over its own elements in a fixed order, then one block over the
// partial sums.
//
// AdamW: m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, w -= lr (m/c1 / (sqrt(v/c2) + eps) + decay w), c1 and c2 the bias
// corrections. m and v are rounded operation by operation as on the CPU (no contraction of a*b+c), so they have the
// CPU's bits, and so has what stochastic rounding makes of them. The step takes the hardware's approximate root and
// quotient, within 10 roundings in all: with IEEE ones an element of 14 bytes costs 119 instructions (counted in the
// machine code), and an H200 issues about 110 while its memory brings the next element; so it is 73.
#pragma once
#include "vectors.cuh"

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

template <int N, class T> __device__ __forceinline__ double reals_squares(const Reals<N, T>& x) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        sum += (double)reals_get(x, i) * (double)reals_get(x, i);
    }
    return sum;
}

// 16 bytes a load, two loads under way; one by one at the end, and where x does not begin on 16 bytes
template <class T> __global__ void sum_squares_kernel(double* partial, const T* x, size_t n) {
    const int N = 16 / sizeof(T);
    size_t vectors = (uintptr_t)x % 16 == 0 ? n / N : 0, stride = (size_t)gridDim.x * blockDim.x;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, v = thread;
    double sum = 0.0;
    for (; v + stride < vectors; v += 2 * stride) {
        Reals<N, T> a = reals_load<N>(x + v * N), b = reals_load<N>(x + (v + stride) * N);
        sum += reals_squares(a);
        sum += reals_squares(b);
    }
    if (v < vectors) {
        sum += reals_squares(reals_load<N>(x + v * N));
    }
    for (size_t i = vectors * N + thread; i < n; i += stride) {
        sum += reals_squares(reals_load<1>(x + i));
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

static void cuda_sum_squares(double* sum, RealArray x, size_t n) {
    double* partial = (double*)gpu.partial;
    int each = 16 / (int)real_bytes(x.type);
    int blocks = (int)min_i64(SUM_BLOCKS, max_i64(1, ceil_div((int64_t)n, SUM_THREADS * each)));
    if (x.type == REAL_F32) {
        sum_squares_kernel<<<blocks, SUM_THREADS, 0, gpu.stream>>>(partial, (const float*)x.data, n);
    } else {
        sum_squares_kernel<<<blocks, SUM_THREADS, 0, gpu.stream>>>(partial, (const floatX*)x.data, n);
    }
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

// ---------------------------------------------------------------------------------------------------------------------
// AdamW

// what all elements have in common
typedef struct {
    float beta1, beta2, keep1, keep2, inverse1, inverse2, eps, decay, lr, grad_scale;
    uint64_t stream;  // of the rounding
} AdamwStep;

__device__ __forceinline__ AdamwStep adamw_step(const AdamwArgs& a) {
    const StepControl* control = a.control;
    return AdamwStep{.beta1 = a.beta1, .beta2 = a.beta2, .keep1 = 1.0f - a.beta1, .keep2 = 1.0f - a.beta2,
                     .inverse1 = 1.0f / control->correction1, .inverse2 = 1.0f / control->correction2, .eps = a.eps,
                     .decay = __fmul_rn(control->lr, a.weight_decay), .lr = control->lr,
                     .grad_scale = control->grad_scale, .stream = rand_stream(RAND_UPDATE, 0, 0, control->update)};
}

__device__ __forceinline__ void adamw_element(float* w, float* m, float* v, float grad, const AdamwStep& s) {
    float g = __fmul_rn(grad, s.grad_scale), root, step;
    *m = __fadd_rn(__fmul_rn(s.beta1, *m), __fmul_rn(s.keep1, g));
    *v = __fadd_rn(__fmul_rn(s.beta2, *v), __fmul_rn(__fmul_rn(s.keep2, g), g));
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(__fmul_rn(*v, s.inverse2)));
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(step) : "f"(__fmul_rn(*m, s.inverse1)), "f"(__fadd_rn(root, s.eps)));
    *w = __fsub_rn(__fsub_rn(*w, __fmul_rn(s.decay, *w)), __fmul_rn(s.lr, step));
}

// which (0 parameter, 1 m, 2 v) of elements group * N ..., rounded stochastically where T is floatX: then N is 8
template <int N, class T>
__device__ __forceinline__ Reals<N, T> adamw_narrow(const float* x, uint64_t which, uint64_t group, const AdamwArgs& a,
                                                    const AdamwStep& s) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return reals_of<N, T>(x);
    } else {
        return reals_of_stochastic<T>(x, philox(a.seed, (which << 56) + group, s.stream));
    }
}

// N whole elements a thread, from element `begin` of the arrays on, which is a multiple of N in the flat buffer; M is
// the type of m and v, G of the gradient
template <int N, class M, class G, int MASTER> __global__ void adamw_kernel(AdamwArgs a, size_t begin, size_t groups) {
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, i = begin + thread * N;
    if (thread >= groups || a.control->skip) {
        return;
    }
    M *first = (M*)a.m.data + i, *second = (M*)a.v.data + i;
    Reals<N, float> master;
    Reals<N, floatX> param;
    if constexpr (MASTER) {
        master = reals_load<N>(a.master + i);
    } else {
        param = reals_load<N>(a.param + i);
    }
    Reals<N, M> old_m = reals_load<N>(first), old_v = reals_load<N>(second);
    Reals<N, G> grad = reals_load<N>((const G*)a.grad.data + i);
    const AdamwStep s = adamw_step(a);
    const uint64_t group = (a.first + i) / N;
    float w[N], m[N], v[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        w[j] = MASTER ? reals_get(master, j) : reals_get(param, j);
        m[j] = reals_get(old_m, j), v[j] = reals_get(old_v, j);
        adamw_element(&w[j], &m[j], &v[j], reals_get(grad, j), s);
    }
    if constexpr (MASTER) {
        reals_store(a.master + i, reals_of<N, float>(w));
        reals_store(a.param + i, reals_of<N, floatX>(w));
    } else {
        reals_store(a.param + i, adamw_narrow<N, floatX>(w, 0, group, a, s));
    }
    reals_store(first, adamw_narrow<N, M>(m, 1, group, a, s));
    reals_store(second, adamw_narrow<N, M>(v, 2, group, a, s));
}

// The same, one element a thread and any types: elements 0 .. head - 1 and `tail` and further ones
__global__ void adamw_plain_kernel(AdamwArgs a, size_t head, size_t tail) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    i = i < head ? i : tail + (i - head);
    if (i >= a.count || a.control->skip) {
        return;
    }
    const AdamwStep s = adamw_step(a);
    uint64_t element = a.first + i;
    float w = a.master ? a.master[i] : floatX_to_f32(a.param[i]), m = real_get(a.m, i), v = real_get(a.v, i);
    adamw_element(&w, &m, &v, real_get(a.grad, i), s);
    if (a.master) {
        a.master[i] = w;
        a.param[i] = to_floatX(w);
    } else {
        a.param[i] = f32_to_floatX_stochastic(w, round_bits(a.seed, s.stream, 0, element));
    }
    if (a.m.type == REAL_F32) {
        real_set(a.m, i, m);
        real_set(a.v, i, v);
    } else {
        ((floatX*)a.m.data)[i] = f32_to_floatX_stochastic(m, round_bits(a.seed, s.stream, 1ull << 56, element));
        ((floatX*)a.v.data)[i] = f32_to_floatX_stochastic(v, round_bits(a.seed, s.stream, 2ull << 56, element));
    }
}

// does an element whose number is a multiple of n stand on the boundary that n of them need?
static int adamw_is_aligned(const void* data, size_t bytes, size_t first, size_t n) {
    size_t boundary = n * bytes < 16 ? n * bytes : 16;
    return ((uintptr_t)data - first * bytes) % boundary == 0;
}

template <int N, class M, class G, int MASTER> static void adamw_launch(const AdamwArgs* a) {
    int aligned = adamw_is_aligned(a->param, sizeof(floatX), a->first, N) &&
                  (!MASTER || adamw_is_aligned(a->master, sizeof(float), a->first, N)) &&
                  adamw_is_aligned(a->m.data, sizeof(M), a->first, N) &&
                  adamw_is_aligned(a->v.data, sizeof(M), a->first, N) &&
                  adamw_is_aligned(a->grad.data, sizeof(G), a->first, N);
    size_t head = (N - a->first % N) % N, groups = aligned && a->count > head ? (a->count - head) / N : 0;
    head = groups ? head : a->count;
    size_t tail = head + groups * N, rest = a->count - groups * N;
    if (groups) {
        adamw_kernel<N, M, G, MASTER>
            <<<(unsigned)ceil_div((int64_t)groups, 256), 256, 0, gpu.stream>>>(*a, head, groups);
    }
    if (rest) {
        adamw_plain_kernel<<<(unsigned)ceil_div((int64_t)rest, 256), 256, 0, gpu.stream>>>(*a, head, tail);
    }
}

template <class M, class G> static void adamw_typed(const AdamwArgs* a) {
    if (a->master) {
        adamw_launch<8, M, G, 1>(a);
    } else {
        adamw_launch<8, M, G, 0>(a);
    }
}

static void cuda_adamw(const AdamwArgs* a) {
    check(a->m.type == a->v.type, "internal: the moments differ in type");
    int wide_moments = a->m.type == REAL_F32, wide_grad = a->grad.type == REAL_F32;
    if (wide_moments && wide_grad && a->master) {
        adamw_launch<4, float, float, 1>(a);  // no random numbers: 4 elements are 16 bytes of each array
    } else if (wide_moments && wide_grad) {
        adamw_launch<8, float, float, 0>(a);
    } else if (wide_moments) {
        adamw_typed<float, floatX>(a);
    } else if (wide_grad) {
        adamw_typed<floatX, float>(a);
    } else {
        adamw_typed<floatX, floatX>(a);
    }
    cuda_check_launch();
}
