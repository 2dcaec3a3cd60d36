// cuda/gemm.cuh: out (M, N) [+]= alpha * a (M, K) . b (N, K)^T through cuBLASLt.
//
// cuBLASLt is column-major: our row-major out (M, N) is its (N, M), so it computes op(b) op(a). A matrix that lies
// K-contiguous is taken transposed ("T") on the left and plain ("N") on the right, one that lies transposed the other
// way round; no copy is ever made. Quantized operands come as the carrier's bytes, always K-contiguous, with 2^base in
// device memory. A plan (descriptors and algorithm) is made once per shape: the heuristic's candidates are timed
// on the real operands. f32 accumulation.
//
// FP4: MXFP4 as NVFP4 (quant.h). The library's scale pointers are the operands' tiles of scales, so that the bases go
// into alpha, which it then reads from device memory (CUBLASLT_POINTER_MODE_DEVICE, and beta with it); one thread
// writes it before the product. Not run on hardware yet.
#pragma once
#include "common.cuh"

#define GEMM_PLANS 256
#define GEMM_CANDIDATES 8
#define GEMM_MARGIN 0.98  // another candidate must be that much faster than the best so far
#define GEMM_WORKSPACE ((size_t)64 << 20)

// alignment: of all three pointers in bytes, at most 256. a_format, b_format: FLOATX, or E4M3, E5M2, NVFP4 of a carrier
typedef struct {
    int M, N, K, a_transposed, b_transposed, a_format, b_format, out_type, accumulate, fast, alignment;
} GemmKey;

typedef struct {
    GemmKey key;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, out;
    cublasLtMatmulAlgo_t algorithm;
    double seconds;  // of the chosen algorithm when it was measured
} GemmPlan;

// 8-bit products add up in the tensor cores' own registers (about 14 bits below the largest term) for the whole of K
// instead of leaving them for f32 ones every few steps
static int gemm_fast_accumulate = 1;

static GemmPlan gemm_plans[GEMM_PLANS];
static int gemm_plan_count;

static void blas_check_at(cublasStatus_t status, const char* call, const char* file, int line) {
    check(status == CUBLAS_STATUS_SUCCESS, "%s:%d: %s: %s", file, line, call, cublasLtGetStatusString(status));
}
#define blas_check(call) blas_check_at((call), #call, __FILE__, __LINE__)

static cudaDataType_t gemm_floatX_type(void) { return sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F; }
static cudaDataType_t gemm_type(int format) {
#if CUDART_VERSION >= 12080
    if (format == FORMAT_NVFP4) {
        return CUDA_R_4F_E2M1;
    }
#endif
    return format == FORMAT_E4M3 ? CUDA_R_8F_E4M3 : format == FORMAT_E5M2 ? CUDA_R_8F_E5M2 : gemm_floatX_type();
}

// what the library multiplies
static const void* gemm_operand(const QTensor* q) {
    return q->operand ? q->operand : q->format == FORMAT_FLOATX ? (const void*)q->dense : (const void*)q->codes;
}
static Format gemm_format(const QTensor* q) { return q->operand ? q->carrier : q->format; }

static cublasStatus_t gemm_run(const GemmPlan* plan, const cublasLtMatmulAlgo_t* algorithm, void* out,
                               const GemmArgs* args) {
    float alpha = args->alpha * (args->a->owed * args->b->owed), beta = args->accumulate ? 1.0f : 0.0f;
    int fp4 = plan->key.a_format == FORMAT_NVFP4;
    const float* alpha_at = fp4 ? gpu.fp4_scalars : &alpha;
    const float* beta_at = fp4 ? gpu.fp4_scalars + (args->accumulate ? 8 : 4) : &beta;
    return cublasLtMatmul(gpu.blas, plan->operation, alpha_at, gemm_operand(args->b), plan->b, gemm_operand(args->a),
                          plan->a, beta_at, out, plan->out, out, plan->out, algorithm, gpu.workspace,
                          gpu.workspace_bytes, gpu.stream);
}

// milliseconds of one run, the best of five; a candidate that fails takes forever
static float gemm_time(const GemmPlan* plan, const cublasLtMatmulAlgo_t* algorithm, void* out, const GemmArgs* args) {
    cudaEvent_t begin, end;
    float best = INFINITY;
    cuda_check(cudaEventCreate(&begin));
    cuda_check(cudaEventCreate(&end));
    for (int i = 0; i < 6; i++) {
        cuda_check(cudaEventRecord(begin, gpu.stream));
        if (gemm_run(plan, algorithm, out, args) != CUBLAS_STATUS_SUCCESS) {
            break;
        }
        cuda_check(cudaEventRecord(end, gpu.stream));
        cuda_check(cudaEventSynchronize(end));
        float ms;
        cuda_check(cudaEventElapsedTime(&ms, begin, end));
        best = i > 0 && ms < best ? ms : best;
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return best;
}

// alpha of an FP4 product, with the bases of its operands; a base of the row is not in it
__global__ void gemm_fp4_alpha_kernel(float* alpha, float factor, const CarrierBase* a, const CarrierBase* b) {
    *alpha = factor * ((a ? a->scale : 1.0f) * (b ? b->scale : 1.0f));
}

// what cuBLASLt asks of FP4 products, and the alpha that gemm_run names
static void gemm_begin_fp4(const GemmArgs* args) {
    const QTensor *a = args->a, *b = args->b;
    check(gemm_format(a) == FORMAT_NVFP4 && gemm_format(b) == FORMAT_NVFP4,
          "internal: an FP4 operand is multiplied with another format");
    check(a->cols % 32 == 0 && (size_t)b->rows * real_bytes(args->out.type) % 16 == 0 &&
              (uintptr_t)args->out.data % 16 == 0,
          "the FP4 carrier multiplies %d x %d x %d only where the last is a multiple of 32 and a row of the result has "
          "a multiple of 16 bytes; --carrier bf16 has no such rule", a->rows, b->rows, a->cols);
    gemm_fp4_alpha_kernel<<<1, 1, 0, gpu.stream>>>(gpu.fp4_scalars, args->alpha * (a->owed * b->owed), a->base,
                                                   b->base);
    cuda_check_launch();
}

static void gemm_describe_fp4(GemmPlan* plan) {
#if CUDART_VERSION >= 12080
    cublasLtPointerMode_t pointers = CUBLASLT_POINTER_MODE_DEVICE;
    cublasLtMatmulMatrixScale_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3;
    cublasLtMatmulDescAttributes_t modes[] = {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE};
    blas_check(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_POINTER_MODE, &pointers,
                                              sizeof pointers));
    for (int i = 0; i < 2; i++) {
        blas_check(cublasLtMatmulDescSetAttribute(plan->operation, modes[i], &mode, sizeof mode));
    }
#else
    check(plan == NULL, "the FP4 carrier needs a build with CUDA 12.8 or newer");
#endif
}

static void gemm_describe(GemmPlan* plan) {
    const GemmKey* k = &plan->key;
    cudaDataType_t out_type = k->out_type == REAL_F32 ? CUDA_R_32F : gemm_floatX_type();
    cublasOperation_t op_b = k->b_transposed ? CUBLAS_OP_N : CUBLAS_OP_T,
                      op_a = k->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    blas_check(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    blas_check(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b));
    blas_check(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a));
    if (k->fast) {
        int8_t fast = 1;
        blas_check(
            cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
    }
    if (k->a_format == FORMAT_NVFP4) {
        gemm_describe_fp4(plan);
    }
    int64_t M = k->M, N = k->N, K = k->K;
    blas_check(cublasLtMatrixLayoutCreate(&plan->b, gemm_type(k->b_format), k->b_transposed ? N : K,
                                          k->b_transposed ? K : N, k->b_transposed ? N : K));
    blas_check(cublasLtMatrixLayoutCreate(&plan->a, gemm_type(k->a_format), k->a_transposed ? M : K,
                                          k->a_transposed ? K : M, k->a_transposed ? M : K));
    blas_check(cublasLtMatrixLayoutCreate(&plan->out, out_type, N, M, N));
}

__global__ void gemm_compare_kernel(int* different, const uint32_t* a, const uint32_t* b, size_t words) {
    size_t stride = (size_t)gridDim.x * blockDim.x;
    int differ = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += stride) {
        differ |= a[i] != b[i];
    }
    if (differ) {
        *different = 1;
    }
}

static int gemm_same_bits(const void* a, const void* b, size_t bytes) {
    int *flag = (int*)gpu.partial, different = 0;
    cuda_check(cudaMemsetAsync(flag, 0, sizeof(int), gpu.stream));
    gemm_compare_kernel<<<4 * gpu.sm_count, 256, 0, gpu.stream>>>(flag, (const uint32_t*)a, (const uint32_t*)b,
                                                                 bytes / sizeof(uint32_t));
    cuda_check(cudaMemcpyAsync(&different, flag, sizeof(int), cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
    return !different;
}

// Does a product show in what order its sums were taken? Two orders differ by about 2^-23 of a sum, which is a bit of
// an f32 result every few elements and crosses a boundary of bf16 about every 10^4; a small result may have the same
// bits by chance, and others in the next step.
static int gemm_shows_order(const GemmPlan* plan) {
    size_t results = (size_t)plan->key.M * plan->key.N;
    int wide = plan->key.out_type == REAL_F32 || sizeof(floatX) == sizeof(float);
    return results >= (size_t)1 << (wide ? 12 : 19);
}

// Which of the heuristic's candidates is fastest is a matter of measurement, and no two runs measure the same; so that
// runs have the same bits nevertheless, only a candidate whose product has the bits of the first one's may take its
// place. Where that shows nothing, or there is no room to measure in, it is the first.
static void gemm_choose_found(GemmPlan* plan, const GemmArgs* args, const cublasLtMatmulHeuristicResult_t* found,
                              int count) {
    size_t bytes = (size_t)round_up(
        (int64_t)((size_t)plan->key.M * plan->key.N * real_bytes((RealType)plan->key.out_type)), sizeof(uint32_t));
    void *first = NULL, *other = NULL;
    plan->algorithm = found[0].algo;
    count = gemm_shows_order(plan) ? count : 1;
    int measured = cudaMalloc(&first, bytes) == cudaSuccess && cudaMalloc(&other, bytes) == cudaSuccess;
    cudaGetLastError();
    for (int i = 0; measured && i < count; i++) {
        void* out = i ? other : first;
        cuda_check(cudaMemsetAsync(out, 0, bytes, gpu.stream));
        int runs = gemm_run(plan, &found[i].algo, out, args) == CUBLAS_STATUS_SUCCESS;
        check(i > 0 || runs, "no cuBLASLt algorithm runs a %d x %d x %d product", plan->key.M, plan->key.N,
              plan->key.K);
        if (runs && (i == 0 || gemm_same_bits(first, other, bytes))) {
            double seconds = (double)gemm_time(plan, &found[i].algo, other, args) * 1e-3;
            if (i == 0 || seconds < plan->seconds * GEMM_MARGIN) {
                plan->seconds = seconds;
                plan->algorithm = found[i].algo;
            }
        }
    }
    cudaFree(first);
    cudaFree(other);
}

static void gemm_choose(GemmPlan* plan, const GemmArgs* args) {
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found[GEMM_CANDIDATES];
    int count = 0;
    blas_check(cublasLtMatmulPreferenceCreate(&preference));
    blas_check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                    &gpu.workspace_bytes, sizeof gpu.workspace_bytes));
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // no sums in bf16
    uint32_t alignment = (uint32_t)plan->key.alignment;
    blas_check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions,
                                                    sizeof reductions));
    const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; i++) {
        blas_check(cublasLtMatmulPreferenceSetAttribute(preference, alignments[i], &alignment, sizeof alignment));
    }
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(gpu.blas, plan->operation, plan->b, plan->a, plan->out,
                                                           plan->out, preference, GEMM_CANDIDATES, found, &count);
    check(status == CUBLAS_STATUS_SUCCESS && count > 0, "cuBLASLt has no algorithm for a %d x %d x %d product%s",
          plan->key.M, plan->key.N, plan->key.K,
          plan->key.a_format == FORMAT_NVFP4 ? " of the FP4 carrier; --carrier bf16 needs none" : "");
    cublasLtMatmulPreferenceDestroy(preference);
    gemm_choose_found(plan, args, found, count);
}

// The factors 2^base of the operands, in device memory, or tiles of scales. Before the plan is chosen: the heuristic
// wants to know of them.
static void gemm_set_scales(const GemmPlan* plan, const GemmArgs* args) {
    const QTensor* operands[] = {args->b, args->a};
    const cublasLtMatmulDescAttributes_t attributes[] = {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                                                         CUBLASLT_MATMUL_DESC_B_SCALE_POINTER};
    for (int i = 0; i < 2; i++) {
        const void* scale = operands[i]->base ? &operands[i]->base->scale : NULL;
        if (gemm_format(operands[i]) == FORMAT_NVFP4) {
            scale = nvfp4_tiles(operands[i]);
        }
        if (gemm_format(operands[i]) != FORMAT_FLOATX) {
            blas_check(cublasLtMatmulDescSetAttribute(plan->operation, attributes[i], &scale, sizeof scale));
        }
    }
}

static const GemmPlan* gemm_plan(const GemmArgs* args) {
    Format a_format = gemm_format(args->a), b_format = gemm_format(args->b);
    GemmKey key = {args->a->rows,
                   args->b->rows,
                   args->a->cols,
                   args->a->transposed,
                   args->b->transposed,
                   a_format,
                   b_format,
                   args->out.type,
                   args->accumulate,
                   (a_format == FORMAT_E4M3 || a_format == FORMAT_E5M2) && gemm_fast_accumulate,
                   0};
    uintptr_t bits = (uintptr_t)gemm_operand(args->a) | (uintptr_t)gemm_operand(args->b) | (uintptr_t)args->out.data;
    for (key.alignment = 256; bits % (uintptr_t)key.alignment; key.alignment /= 2) {
    }
    for (int i = 0; i < gemm_plan_count; i++) {
        if (!memcmp(&gemm_plans[i].key, &key, sizeof key)) {
            gemm_set_scales(&gemm_plans[i], args);
            return &gemm_plans[i];
        }
    }
    check(gemm_plan_count < GEMM_PLANS, "internal: more than %d shapes of matrix products", GEMM_PLANS);
    GemmPlan* plan = &gemm_plans[gemm_plan_count];
    plan->key = key;
    gemm_describe(plan);
    gemm_set_scales(plan, args);
    gemm_choose(plan, args);
    gemm_plan_count++;
    return plan;
}

static void cuda_gemm(const GemmArgs* args) {
    check(gemm_operand(args->a) && gemm_operand(args->b), "internal: an operand without what the GPU multiplies");
    check(args->a->cols == args->b->cols, "internal: a GEMM contracts %d with %d", args->a->cols, args->b->cols);
    if (gemm_format(args->a) == FORMAT_NVFP4 || gemm_format(args->b) == FORMAT_NVFP4) {
        gemm_begin_fp4(args);
    }
    const GemmPlan* plan = gemm_plan(args);
    blas_check(gemm_run(plan, &plan->algorithm, args->out.data, args));
}
