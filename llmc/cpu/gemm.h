// cpu/gemm.h: out (M, N) [+]= alpha * a (M, K) . b (N, K)^T through single-precision BLAS (cblas_sgemm, OpenBLAS).
//
// Carrier f32: operands are decoded to f32, which is exact for every format of the program, and multiplied in f32. The
// output is cut into fixed tiles, one BLAS call each, the calls spread over the OpenMP threads with BLAS itself on one
// thread: no second thread pool fights the first, and results do not depend on the number of threads.
#pragma once
#include "quantize_fp8.h"
#ifdef USE_BLAS
#include <cblas.h>
#ifdef OPENBLAS_VERSION
#define CPU_BLAS_NAME "OpenBLAS"
static void blas_single_thread(void) { openblas_set_num_threads(1); }
#else
#define CPU_BLAS_NAME "BLAS"
static void blas_single_thread(void) {}
#endif
#else
#define CPU_BLAS_NAME "none (own loop, slow; install OpenBLAS)"
static void blas_single_thread(void) {}
#endif

#define GEMM_TILE_M 256
#define GEMM_TILE_N 512

// row-major out (M, N), ld ldo = alpha * op(a) . op(b)^T + beta * out, where op(a) is (M, K), lying as (K, M) where
// a_transposed
static void sgemm(float* out, int ldo, const float* a, int lda, int a_transposed, const float* b, int ldb,
                  int b_transposed, int M, int N, int K, float alpha, float beta) {
#ifdef USE_BLAS
    cblas_sgemm(CblasRowMajor, a_transposed ? CblasTrans : CblasNoTrans, b_transposed ? CblasNoTrans : CblasTrans, M, N,
                K, alpha, a, lda, b, ldb, beta, out, ldo);
#else
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k++) {
                sum += (a_transposed ? a[(size_t)k * lda + i] : a[(size_t)i * lda + k]) *
                       (b_transposed ? b[(size_t)k * ldb + j] : b[(size_t)j * ldb + k]);
            }
            out[(size_t)i * ldo + j] = alpha * sum + (beta == 0.0f ? 0.0f : beta * out[(size_t)i * ldo + j]);
        }
    }
#endif
}

// Scratch of the CPU backend: decoded operands. It grows to the largest GEMM; gemm_scratch_bytes is what --plan counts.
typedef struct {
    float* operand[2];
    size_t capacity[2];
} CpuContext;
static CpuContext cpu;

// The f32 rate that BLAS itself reaches on `threads` cores: the best of a few products of n x n matrices, in FLOP/s
static double blas_rate(int n, int threads) {
    size_t count = (size_t)n * n;
    float* memory = (float*)malloc_or_die(3 * count * sizeof(float), "a matrix product");
    for (size_t i = 0; i < 3 * count; i++) {
        memory[i] = (float)(i * 2654435761u % 1000) * 1e-3f - 0.5f;
    }
#ifdef OPENBLAS_VERSION
    openblas_set_num_threads(threads);
#else
    (void)threads;
#endif
    double best = 1e30;
    for (int i = 0; i < 6; i++) {
        double begin = clock_seconds();
        sgemm(memory, n, memory + count, n, 0, memory + 2 * count, n, 0, n, n, n, 1.0f, 0.0f);
        double seconds = clock_seconds() - begin;
        best = seconds < best ? seconds : best;
    }
    blas_single_thread();
    free(memory);
    return 2.0 * n * n * n / best;
}

static int operand_needs_decoding(const QTensor* q) {
    return q->format != FORMAT_FLOATX || sizeof(floatX) != sizeof(float);
}

static void decode_group(float* out, const uint8_t* codes, float scale) {
    uint32_t words[GROUP / 8];
    memcpy(words, codes, sizeof words);
    for (int w = 0; w < GROUP / 8; w++) {
#pragma omp simd
        for (int j = 0; j < 8; j++) {
            out[8 * w + j] = e2m1_to_f32(words[w] >> (4 * j) & 15u) * scale;
        }
    }
}

// the operand as f32, in the orientation it lies in
static const float* operand_decode(const QTensor* q, int slot) {
    if (!operand_needs_decoding(q)) {
        return (const float*)(const void*)q->dense;
    }
    size_t count = (size_t)q->rows * q->cols;
    if (cpu.capacity[slot] < count) {
        free(cpu.operand[slot]);
        cpu.operand[slot] = (float*)malloc_or_die(count * sizeof(float), "decoded operands of a matrix product");
        cpu.capacity[slot] = count;
    }
    float* out = cpu.operand[slot];
    float values[256];  // of the codes of an 8-bit format
    for (int code = 0; code < 256 && q->base && q->format != FORMAT_FLOATX; code++) {
        values[code] = fp8_decode(q->format, (uint8_t)code) * q->base->scale;
    }
    const size_t chunk = 8192;
    int64_t chunks = ceil_div((int64_t)count, (int64_t)chunk);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        size_t begin = (size_t)c * chunk, end = begin + chunk < count ? begin + chunk : count;
        if (q->format == FORMAT_E4M3 || q->format == FORMAT_E5M2) {
            for (size_t i = begin; i < end; i++) {
                out[i] = values[q->codes[i]];
            }
        } else if (q->format == FORMAT_FLOATX) {
            for (size_t i = begin; i < end; i++) {
                out[i] = floatX_to_f32(q->dense[i]);
            }
        } else {
            for (size_t g = begin / GROUP; g < end / GROUP; g++) {
                decode_group(out + g * GROUP, q->codes + g * (GROUP / 2), ue8m0_to_f32(q->scales[g]));
            }
        }
    }
    return out;
}

static void cpu_gemm(const GemmArgs* args) {
    const QTensor *a = args->a, *b = args->b;
    int M = a->rows, N = b->rows, K = a->cols;
    check(b->cols == K, "internal: a GEMM contracts %d with %d", K, b->cols);
    const float *fa = operand_decode(a, 0), *fb = operand_decode(b, 1);
    int lda = a->transposed ? M : K, ldb = b->transposed ? N : K;
    float alpha = args->alpha * (a->owed * b->owed);
    int direct = real_bytes(args->out.type) == sizeof(float);
    int tiles_m = (int)ceil_div(M, GEMM_TILE_M), tiles_n = (int)ceil_div(N, GEMM_TILE_N);
#pragma omp parallel
    {
        float* tile = NULL;
        if (!direct) {
            tile = (float*)malloc_or_die(sizeof(float) * GEMM_TILE_M * GEMM_TILE_N, "a tile of a matrix product");
        }
#pragma omp for schedule(dynamic)
        for (int t = 0; t < tiles_m * tiles_n; t++) {
            int m0 = t / tiles_n * GEMM_TILE_M, n0 = t % tiles_n * GEMM_TILE_N;
            int m = min_int(GEMM_TILE_M, M - m0), n = min_int(GEMM_TILE_N, N - n0);
            const float* ta = a->transposed ? fa + m0 : fa + (size_t)m0 * K;
            const float* tb = b->transposed ? fb + n0 : fb + (size_t)n0 * K;
            float* out = direct ? (float*)args->out.data + (size_t)m0 * N + n0 : tile;
            sgemm(out, direct ? N : n, ta, lda, a->transposed, tb, ldb, b->transposed, m, n, K, alpha,
                  direct && args->accumulate ? 1.0f : 0.0f);
            for (int i = 0; !direct && i < m; i++) {
                floatX* row = (floatX*)args->out.data + (size_t)(m0 + i) * N + n0;
                for (int j = 0; j < n; j++) {
                    float sum = tile[(size_t)i * n + j];
                    row[j] = f32_to_floatX(args->accumulate ? floatX_to_f32(row[j]) + sum : sum);
                }
            }
        }
        free(tile);
    }
}

static void cpu_gemm_release(void) {
    for (int slot = 0; slot < 2; slot++) {
        free(cpu.operand[slot]);
        cpu.operand[slot] = NULL;
        cpu.capacity[slot] = 0;
    }
}
