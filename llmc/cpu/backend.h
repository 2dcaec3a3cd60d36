// cpu/backend.h: the CPU's table of operations.
#pragma once
#include "attention.h"
#include "gemm.h"
#include "layers.h"
#include "quantize.h"
#include <sys/resource.h>

static void* cpu_alloc(size_t bytes, const char* what) { return calloc_or_die(bytes, what); }
static void cpu_zero(void* memory, size_t bytes) { memset(memory, 0, bytes); }
static void cpu_copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

static void cpu_synchronize(void) {}
static const Carrier* cpu_carrier(void) { return NULL; }
static void cpu_carrier_begin(CarrierBase*, int) {}
static void cpu_carry(const QTensor*) { check(0, "internal: the CPU has no carrier"); }
static void cpu_reserve(AttentionShape shape) { (void)shape; }  // grows as it goes

static size_t cpu_scratch_bytes(OperandSizes largest, AttentionShape shape, int threads) {
    size_t tiles = sizeof(floatX) == sizeof(float) ? 0 : sizeof(float) * GEMM_TILE_M * GEMM_TILE_N;
    return (largest.a + largest.b) * sizeof(float) +
           (size_t)threads * max_size(tiles, attention_scratch_floats(shape) * sizeof(float));
}

// measured: the binary with libc and OpenMP, and OpenBLAS's packing buffers, of which each thread touches a part
static size_t cpu_program_bytes(int threads) { return ((size_t)12 << 20) + ((size_t)threads * 5 << 20); }

static double cpu_peak_flops(void) { return 0.0; }  // unknown: --bench measures what BLAS reaches

// MemAvailable of /proc/meminfo
static size_t cpu_available_bytes(void) {
    FILE* file = fopen("/proc/meminfo", "r");
    unsigned long long kib = 0;
    char line[256];
    while (file && fgets(line, sizeof line, file) && sscanf(line, "MemAvailable: %llu kB", &kib) != 1) {
    }
    if (file) {
        fclose(file);
    }
    return (size_t)kib << 10;
}

static size_t cpu_used_bytes(void) {
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (size_t)usage.ru_maxrss << 10 : 0;
}

static void cpu_replay(int, void (*work)(void* argument), void* argument) { work(argument); }

#ifdef _OPENMP
#include <omp.h>
static int cpu_threads(void) { return omp_get_max_threads(); }
static void cpu_set_threads(int n) { omp_set_num_threads(n); }
#else
static int cpu_threads(void) { return 1; }
static void cpu_set_threads(int n) { (void)n; }
#endif

static double cpu_gemm_rate(void) { return blas_rate(2048, cpu_threads()); }

// a parallel copy of 256 MiB, the best of five
static double cpu_copy_rate(void) {
    const size_t bytes = (size_t)256 << 20, chunk = (size_t)1 << 20;
    char *from = (char*)calloc_or_die(bytes, "copy"), *to = (char*)calloc_or_die(bytes, "copy");
    double best = 1e30;
    for (int i = 0; i < 5; i++) {
        double begin = clock_seconds();
#pragma omp parallel for schedule(static)
        for (size_t at = 0; at < bytes; at += chunk) {
            memcpy(to + at, from + at, chunk);
        }
        double seconds = clock_seconds() - begin;
        best = seconds < best ? seconds : best;
    }
    free(from);
    free(to);
    return 2.0 * (double)bytes / best;
}

static void cpu_describe(char* buffer, size_t bytes) {
    snprintf(buffer, bytes, "%d threads, BLAS %s", cpu_threads(), CPU_BLAS_NAME);
}

static void cpu_identify(char* buffer, size_t) { buffer[0] = 0; }

// ---------------------------------------------------------------------------------------------------------------------
// the compositions

static void cpu_swiglu_quantize(const QuantizeArgs* args, floatX* scratch, Mxint8 kept, const floatX* gate_up, int BT,
                                int F) {
    QuantizeArgs of_scratch = *args;
    of_scratch.tensor = scratch;
    cpu_swiglu_forward(scratch, kept, gate_up, BT, F);
    cpu_quantize(&of_scratch);
}

static void cpu_rmsnorm_quantize(const QuantizeArgs* args, floatX* scratch, floatX* sum, float* rstd, const floatX* a,
                                 const floatX* b, const floatX* weight, int BT, int C, float eps) {
    QuantizeArgs of_scratch = *args;
    of_scratch.tensor = scratch;
    if (b) {
        cpu_add_rmsnorm_forward(sum, scratch, rstd, a, b, weight, BT, C, eps);
    } else {
        cpu_rmsnorm_forward(scratch, rstd, a, weight, BT, C, eps);
    }
    cpu_quantize(&of_scratch);
}

static void cpu_unrotate_swiglu_backward(floatX* dinp, floatX* dact, const uint32_t* mask, const float* row_scale,
                                         const floatX* inp, Mxint8 kept, int BT, int F) {
    cpu_unrotate(real_floatX(dact), mask, row_scale, BT, F);
    cpu_swiglu_backward(dinp, dact, inp, kept, BT, F);
}

static void cpu_unrotate_rmsnorm_backward(floatX* dinp, RealArray dweight, floatX* dnorm, const uint32_t* mask,
                                          const float* row_scale, const floatX* dresidual, const floatX* inp,
                                          const floatX* weight, const float* rstd, int BT, int C) {
    cpu_unrotate(real_floatX(dnorm), mask, row_scale, BT, C);
    cpu_rmsnorm_backward(dinp, dweight, dnorm, dresidual, inp, weight, rstd, BT, C);
}

static const Ops CPU_OPS = {
    .name = "cpu",
    .alloc = cpu_alloc,
    .release = free,
    .alloc_host = cpu_alloc,
    .release_host = free,
    .zero = cpu_zero,
    .copy_to_device = cpu_copy,
    .copy_to_host = cpu_copy,
    .synchronize = cpu_synchronize,
    .snapshot_copy = cpu_copy,
    .snapshot_fence = cpu_synchronize,
    .snapshot_wait = cpu_synchronize,
    .reserve = cpu_reserve,
    .scratch_bytes = cpu_scratch_bytes,
    .program_bytes = cpu_program_bytes,
    .classifier_bytes = (size_t)32 << 20,
    .peak_flops = cpu_peak_flops,
    .available_bytes = cpu_available_bytes,
    .used_bytes = cpu_used_bytes,
    .micro_tokens = 8192,
    .replay = cpu_replay,
    .describe = cpu_describe,
    .shares_memory = 1,
    .identify = cpu_identify,
    .gemm_rate = cpu_gemm_rate,
    .copy_rate = cpu_copy_rate,
    .embedding_forward = cpu_embedding_forward,
    .embedding_backward = cpu_embedding_backward,
    .rmsnorm_forward = cpu_rmsnorm_forward,
    .add_rmsnorm_forward = cpu_add_rmsnorm_forward,
    .rmsnorm_backward = cpu_rmsnorm_backward,
    .add = cpu_add,
    .rope = cpu_rope,
    .attention_forward = cpu_attention_forward,
    .attention_backward = cpu_attention_backward,
    .attention_cached = cpu_attention_cached,
    .swiglu_forward = cpu_swiglu_forward,
    .swiglu_backward = cpu_swiglu_backward,
    .mxint8_pack = cpu_mxint8_pack,
    .mxint8_unpack = cpu_mxint8_unpack,
    .crossentropy = cpu_crossentropy,
    .quantize = cpu_quantize,
    .carry = cpu_carry,
    .quantize_supports = cpu_quantize_supports,
    .gemm = cpu_gemm,
    .carrier = cpu_carrier,
    .carrier_begin = cpu_carrier_begin,
    .unrotate = cpu_unrotate,
    .swiglu_quantize = cpu_swiglu_quantize,
    .rmsnorm_quantize = cpu_rmsnorm_quantize,
    .unrotate_swiglu_backward = cpu_unrotate_swiglu_backward,
    .unrotate_rmsnorm_backward = cpu_unrotate_rmsnorm_backward,
    .loss_sum = cpu_loss_sum,
    .sum_squares = cpu_sum_squares,
    .step_decide = cpu_step_decide,
    .adamw = cpu_adamw,
};

static const Ops* cpu_backend(void) {
    blas_single_thread();
    return &CPU_OPS;
}
