// cuda_products.h: section cuda, second half: matrix products, attention, and a NaN that goes in comes out.
#pragma once
#include "cuda_update.h"
#ifdef USE_CUDA

// ---------------------------------------------------------------------------------------------------------------------
// matrix products

// has cuBLASLt an algorithm for that product at all?
static int gemm_is_possible(int M, int N, int K, int a_transposed, int b_transposed, RealType type) {
    GemmPlan plan = {};
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    plan.key.M = M, plan.key.N = N, plan.key.K = K, plan.key.out_type = type;
    plan.key.a_transposed = a_transposed, plan.key.b_transposed = b_transposed;
    gemm_describe(&plan);
    blas_check(cublasLtMatmulPreferenceCreate(&preference));
    blas_check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                    &gpu.workspace_bytes, sizeof gpu.workspace_bytes));
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(gpu.blas, plan.operation, plan.b, plan.a, plan.out, plan.out,
                                                           preference, 1, &found, &count);
    cublasLtMatmulPreferenceDestroy(preference);
    return status == CUBLAS_STATUS_SUCCESS && count > 0;
}

// Euclidean length of each row of the operand (rows, cols)
static double* operand_lengths(const QTensor* q) {
    double* lengths = test_zeros((size_t)q->rows);
    for (int i = 0; i < q->rows; i++) {
        for (int k = 0; k < q->cols; k++) {
            size_t at = q->transposed ? (size_t)k * q->rows + i : (size_t)i * q->cols + k;
            lengths[i] += pow((double)floatX_to_f32(q->dense[at]), 2);
        }
        lengths[i] = sqrt(lengths[i]);
    }
    return lengths;
}

// what the CPU says, onto start (M, N) where accumulate, and the error of one backend
static void gemm_want(float* want, double* error, const float* start, const QTensor* a, const QTensor* b,
                      int accumulate) {
    size_t n = (size_t)a->rows * b->rows;
    double *lengths_a = operand_lengths(a), *lengths_b = operand_lengths(b), K = a->cols;
    memcpy(want, start, n * sizeof(float));
    GemmArgs args = {.out = real_f32(want), .accumulate = accumulate, .a = a, .b = b, .alpha = 0.75f};
    CPU_OPS.gemm(&args);
    for (size_t i = 0; i < n; i++) {
        double terms = 0.75 * lengths_a[i / b->rows] * lengths_b[i % b->rows] / sqrt(K);  // root of their squares' sum
        double value = fabs((double)want[i]) + (accumulate ? 2.0 * fabs((double)start[i]) : 0.0);
        error[i] = (sqrt(K) + 3.0) * F32_ROUNDING * fmax(terms, value);
    }
    test_free(lengths_a, lengths_b);
}

// kind 0: to floatX, 1: to f32, 2: f32 +=
static void cuda_test_gemm_kind(const QTensor* a, const QTensor* b, const QTensor* da, const QTensor* db, int kind) {
    const char* names[] = {"floatX", "f32", "f32 +="};
    const char* what = label("gemm %d %d %d, transposed %d %d, %s", a->rows, b->rows, a->cols, a->transposed,
                             b->transposed, names[kind]);
    size_t n = (size_t)a->rows * b->rows;
    float *start = test_zero_floats(n), *want = test_zero_floats(n);
    floatX* want_x = test_tensor(n, 3, 0.0);
    double* error = test_zeros(n);
    for (size_t i = 0; i < n; i++) {
        start[i] = 0.125f * (float)(i % 64);
    }
    Output out = output_make(kind == 2 ? start : NULL, n * (kind ? sizeof(float) : X_BYTES));
    RealType type = kind ? REAL_F32 : REAL_FLOATX;
    GemmArgs args = {.out = output_real(&out, 0, type), .accumulate = kind == 2, .a = da, .b = db, .alpha = 0.75f};
    for (int run = 0; run < 2; run++) {
        args.out = output_real(&out, run, type);
        CUDA_OPS.gemm(&args);
    }
    gemm_want(want, error, start, a, b, kind == 2);
    for (size_t i = 0; i < n; i++) {
        want_x[i] = f32_to_floatX(want[i]);
    }
    if (kind) {
        output_near_f(&out, want, error, 0.0, what);
    } else {
        output_near_x(&out, want_x, error, 0.0, what);
    }
    test_free(start, want, want_x, error);
}

static void cuda_test_gemm(int M, int N, int K, int orientation) {
    int ta = orientation & 1, tb = orientation >> 1, whole = M % 8 == 0 && N % 8 == 0 && K % 8 == 0;
    floatX *x = test_tensor((size_t)M * K, 1, 1.0), *y = test_tensor((size_t)N * K, 2, 0.5);
    QTensor a = qtensor_view(x, M, K, ta), b = qtensor_view(y, N, K, tb);
    for (int kind = 0; kind < 3; kind++) {
        QTensor da = a, db = b;
        da.dense = (const floatX*)upload(x, (size_t)M * K * X_BYTES);
        db.dense = (const floatX*)upload(y, (size_t)N * K * X_BYTES);
        if (gemm_is_possible(M, N, K, ta, tb, kind ? REAL_F32 : REAL_FLOATX)) {
            cuda_test_gemm_kind(&a, &b, &da, &db, kind);
        } else {
            printf("  note: cuBLASLt has no algorithm for %d x %d x %d, transposed %d %d, kind %d\n", M, N, K, ta, tb,
                   kind);
            expect(!whole, "no product where all sizes are multiples of 8");
        }
        release_uploads();
    }
    test_free(x, y);
}

// ---------------------------------------------------------------------------------------------------------------------
// attention

// does the GPU round P and dS to floatX for its tensor cores?
static double attention_packing(AttentionShape s) {
    return cuda_attention_path(s) == ATTENTION_PLAIN ? 0.0 : (double)FLOATX_EPSILON;
}

// sums of the squared terms P v of each element of out, and dS k, dS q, P dout of each element of dqkv
static void attention_squares(double* out_squares, double* squares, const double* dout, const double* out,
                              const double* qkv, AttentionShape s) {
    double *weights = test_zeros((size_t)s.T), scale = 1.0 / sqrt((double)s.HS);
    for (int i = 0; i < s.B * s.NH * s.T; i++) {
        int t = i % s.T, h = i / s.T % s.NH, b = i / s.T / s.NH, kv = h / (s.NH / s.NKV);
        size_t at = ((size_t)(b * s.T + t) * s.NH + h) * s.HS;
        double lse, delta = dot_f64(dout + at, out + at, s.HS);
        attention_row_f64(weights, &lse, qkv, s, b, h, t);
        for (int j = 0; j <= t; j++) {
            size_t q = (size_t)(qkv_row(qkv, s, b, t, h) - qkv), k = (size_t)(qkv_row(qkv, s, b, j, s.NH + kv) - qkv);
            size_t v = k + (size_t)s.NKV * s.HS;
            double p = weights[j], ds = p * (dot_f64(dout + at, qkv + v, s.HS) - delta) * scale;
            for (int c = 0; c < s.HS; c++) {
                out_squares[at + c] += p * p * qkv[v + c] * qkv[v + c];
                squares[q + c] += ds * ds * qkv[k + c] * qkv[k + c];
                squares[k + c] += ds * ds * qkv[q + c] * qkv[q + c];
                squares[v + c] += p * p * dout[at + c] * dout[at + c];
            }
        }
    }
    free(weights);
}

// a case: inputs, the CPU's results, and the errors of one backend
typedef struct {
    AttentionShape s;
    size_t nq, no, rows;  // elements of qkv and out, rows of lse
    floatX *qkv, *dout, *out, *dqkv;
    float* lse;
    double *out_error, *lse_error, *dqkv_error;
} AttentionCase;

static AttentionCase attention_case(AttentionShape s, double scale) {
    AttentionCase c = {};
    c.s = s;
    c.no = (size_t)s.B * s.T * s.NH * s.HS, c.rows = (size_t)s.B * s.NH * s.T;
    c.nq = (size_t)s.B * s.T * (s.NH + 2 * s.NKV) * s.HS;
    c.qkv = test_tensor(c.nq, 1, scale), c.dout = test_tensor(c.no, 3, 1.0);
    c.out = test_tensor(c.no, 2, 1.0), c.dqkv = test_tensor(c.nq, 4, 1.0), c.lse = test_zero_floats(c.rows);
    CPU_OPS.attention_forward(c.out, c.lse, c.qkv, s);
    CPU_OPS.attention_backward(c.dqkv, c.dout, c.out, c.qkv, c.lse, s);
    double *inp = test_double(c.qkv, c.nq), *dout = test_double(c.dout, c.no), *out = test_double(c.out, c.no);
    double *exact = test_zeros(c.no), *size = test_zeros(c.no), *lse = test_zeros(c.rows), *grad = test_zeros(c.nq);
    double *out_squares = test_zeros(c.no), *squares = test_zeros(c.nq), packing = attention_packing(s);
    c.out_error = test_zeros(c.no), c.lse_error = test_zeros(c.rows), c.dqkv_error = test_zeros(c.nq);
    attention_f64_full(exact, lse, size, c.lse_error, inp, s);  // lse_error: roundings, for now
    attention_backward_f64(grad, c.dqkv_error, dout, out, inp, s);
    attention_squares(out_squares, squares, dout, out, inp, s);
    for (size_t i = 0; i < c.no; i++) {
        int h = (int)(i / s.HS % s.NH), t = (int)(i / s.HS / s.NH % s.T), b = (int)(i / s.HS / s.NH / s.T);
        double roundings = c.lse_error[(b * s.NH + h) * s.T + t];
        c.out_error[i] = roundings * F32_ROUNDING * size[i] + packing * sqrt(out_squares[i]);
    }
    for (size_t i = 0; i < c.rows; i++) {
        c.lse_error[i] *= F32_ROUNDING * fmax(1.0, fabs(lse[i]));
    }
    for (size_t i = 0; i < c.nq; i++) {
        c.dqkv_error[i] = c.dqkv_error[i] * F32_ROUNDING + packing * sqrt(squares[i]);
    }
    test_free(inp, dout, out, exact, size, lse, grad, out_squares, squares);
    return c;
}

// decoding: a first piece of several tokens, then one by one
static void cuda_test_attention_cached(const AttentionCase* c, const char* what) {
    AttentionShape s = c->s;
    int width = (s.NH + 2 * s.NKV) * s.HS;
    size_t cache = (size_t)s.T * s.NKV * s.HS;
    floatX *keys = test_tensor(cache, 5, 1.0), *values = test_tensor(cache, 6, 1.0), *want = test_tensor(c->no, 7, 1.0);
    Output out = output_make(NULL, c->no * X_BYTES), k = output_make(NULL, cache * X_BYTES);
    Output v = output_make(NULL, cache * X_BYTES);
    const floatX* qkv = (const floatX*)upload(c->qkv, c->nq * X_BYTES);
    for (int first = 0; first < s.T;) {
        AttentionShape piece = s;
        piece.T = first == 0 ? (s.T + 1) / 2 : 1;
        size_t from = (size_t)first * width, to = (size_t)first * s.NH * s.HS;
        CPU_OPS.attention_cached(want + to, keys, values, c->qkv + from, piece, first);
        for (int run = 0; run < 2; run++) {
            CUDA_OPS.attention_cached(output_x(&out, run) + to, output_x(&k, run), output_x(&v, run), qkv + from, piece,
                                      first);
        }
        first += piece.T;
    }
    output_near_x(&out, want, c->out_error, 0.0, label("%s: cached", what));
    output_same(&k, keys, label("%s: cached keys", what));
    output_same(&v, values, label("%s: cached values", what));
    test_free(keys, values, want);
}

static void cuda_test_attention(AttentionShape s, double scale) {
    const char* what = label("attention B %d T %d NH %d NKV %d HS %d, %s", s.B, s.T, s.NH, s.NKV, s.HS,
                             attention_path_names[cuda_attention_path(s)]);
    AttentionCase c = attention_case(s, scale);
    Output out = output_make(NULL, c.no * X_BYTES), lse = output_make(NULL, c.rows * 4);
    Output dqkv = output_make(NULL, c.nq * X_BYTES);
    const floatX *qkv = (const floatX*)upload(c.qkv, c.nq * X_BYTES), *o = (const floatX*)upload(c.out, c.no * X_BYTES);
    const floatX* dout = (const floatX*)upload(c.dout, c.no * X_BYTES);
    const float* cpu_lse = (const float*)upload(c.lse, c.rows * 4);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.attention_forward(output_x(&out, run), output_f(&lse, run), qkv, s);
        CUDA_OPS.attention_backward(output_x(&dqkv, run), dout, o, qkv, cpu_lse, s);
    }
    output_near_x(&out, c.out, c.out_error, 0.0, what);
    output_near_f(&lse, c.lse, c.lse_error, 0.0, label("%s: lse", what));
    output_near_x(&dqkv, c.dqkv, c.dqkv_error, 0.0, label("%s: backward", what));
    if (s.B == 1) {
        cuda_test_attention_cached(&c, what);
    }
    release_uploads();
    test_free(c.qkv, c.dout, c.out, c.dqkv, c.lse, c.out_error, c.lse_error, c.dqkv_error);
}

// ---------------------------------------------------------------------------------------------------------------------
// a NaN that goes in comes out

// are there NaN among count elements from `first` of the output's first run, beginning as it did? Poison is NaN, too,
// so outputs here begin as zeros.
static int output_has_nan(const Output* out, const char* what, size_t first, size_t count) {
    floatX* got = (floatX*)output_take(out, what);
    int found = has_nan(got + first, count);
    free(got);
    return found;
}

static Output output_zeros(size_t bytes) {
    void* zeros = calloc_or_die(bytes, "test");
    Output out = output_make(zeros, bytes);
    free(zeros);
    return out;
}

// x, clean (BT, C) on the device; the NaN is element i of x
static void cuda_test_nan_layers(const floatX* x, const floatX* clean, size_t i, int BT, int C) {
    size_t n = (size_t)BT * C, row = i / C;
    int32_t tokens[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const int32_t* dtokens = (const int32_t*)upload(tokens, sizeof tokens);
    const float* rstd = (const float*)upload(ones, sizeof ones);
    Output y[8], sums = output_zeros((size_t)C * 4), stats = output_zeros((size_t)BT * 4);
    for (int k = 0; k < 8; k++) {
        y[k] = output_zeros(n * X_BYTES);
    }
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.embedding_forward(output_x(&y[0], run), dtokens, x, BT, C);
        CUDA_OPS.rmsnorm_forward(output_x(&y[1], run), output_f(&stats, run), x, clean, BT, C, 1e-5f);
        CUDA_OPS.add_rmsnorm_forward(output_x(&y[2], run), output_x(&y[3], run), output_f(&stats, run), x, clean, clean,
                                     BT, C, 1e-5f);
        CUDA_OPS.rmsnorm_backward(output_x(&y[4], run), output_real(&sums, run, REAL_F32), clean, NULL, x, clean, rstd,
                                  BT, C);
        CUDA_OPS.add(output_x(&y[5], run), clean, x, n);
        CUDA_OPS.swiglu_forward(output_x(&y[6], run), MXINT8_NONE, x, BT, C / 2);
        CUDA_OPS.swiglu_backward(output_x(&y[7], run), clean, x, MXINT8_NONE, BT, C / 2);
    }
    const char* names[] = {"embedding", "rmsnorm", "add_rmsnorm's sum", "add_rmsnorm", "rmsnorm backward", "add",
                           "swiglu", "swiglu backward"};
    for (int k = 0; k < 8; k++) {
        size_t width = k == 6 ? C / 2 : C;
        expect(output_has_nan(&y[k], names[k], row * width, width), "%s loses NaN %zu of %d columns", names[k], i, C);
    }
    float *dw = (float*)output_take(&sums, "nan"), *r = (float*)output_take(&stats, "nan");
    expect(isnan(dw[i % C]) && isnan(r[row]), "rmsnorm's weight gradient or rstd lose NaN %zu of %d columns", i, C);
    test_free(dw, r);
}

static void cuda_test_nan_products(const floatX* x, const floatX* clean, size_t i, int BT, int C) {
    size_t n = (size_t)BT * C, row = i / C;
    int32_t targets[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    float zeros[8] = {0};
    const int32_t* dtargets = (const int32_t*)upload(targets, sizeof targets);
    StepControl control = test_control(1.0f, 0.9, 0.9, 1);
    control.grad_squares = NAN;
    Output logits = output_zeros(n * X_BYTES), losses = output_make(zeros, (size_t)BT * 4);
    Output product = output_zeros((size_t)BT * BT * X_BYTES), squares = output_zeros(sizeof(double));
    Output decided = output_make(&control, sizeof control), squares_x = output_zeros(sizeof(double));
    floatX* copy = (floatX*)malloc_or_die(n * X_BYTES, "test");
    float* wide = test_zero_floats(n);
    CUDA_OPS.copy_to_host(copy, x, n * X_BYTES);
    for (size_t k = 0; k < n; k++) {
        wide[k] = floatX_to_f32(copy[k]);
    }
    RealArray device_wide = {REAL_F32, upload(wide, n * 4)}, device_x = {REAL_FLOATX, upload(copy, n * X_BYTES)};
    QTensor a = qtensor_view(x, BT, C, 0), b = qtensor_view(clean, BT, C, 0);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.copy_to_device(logits.at[run], copy, n * X_BYTES);
        CUDA_OPS.crossentropy(output_f(&losses, run), output_x(&logits, run), dtargets, BT, C, 1.0f, 1);
        GemmArgs args = {.out = output_real(&product, run, REAL_FLOATX), .accumulate = 0, .a = &a, .b = &b,
                         .alpha = 1.0f};
        CUDA_OPS.gemm(&args);
        CUDA_OPS.sum_squares((double*)squares.at[run], device_wide, n);
        CUDA_OPS.sum_squares((double*)squares_x.at[run], device_x, n);
        CUDA_OPS.step_decide((StepControl*)decided.at[run], 1.0f);
    }
    float* loss = (float*)output_take(&losses, "nan");
    double *sum = (double*)output_take(&squares, "nan"), *sum_x = (double*)output_take(&squares_x, "nan");
    StepControl* decision = (StepControl*)output_take(&decided, "nan");
    expect(isnan(loss[row]), "crossentropy's loss loses NaN %zu of %d columns", i, C);
    expect(output_has_nan(&logits, "nan", row * C, C), "crossentropy's gradient loses NaN %zu of %d columns", i, C);
    expect(output_has_nan(&product, "nan", row * BT, BT), "gemm loses NaN %zu of %d columns", i, C);
    expect(isnan(*sum) && isnan(*sum_x) && decision->skip, "sum_squares or step_decide lose NaN %zu of %d columns", i,
           C);
    test_free(copy, wide, loss, sum, sum_x, decision);
}

// one head; the NaN is in q, k or v of token t, so the output of token t has one
static void cuda_test_nan_attention(int T, int HS, int t, int column) {
    AttentionShape s = {1, T, 1, 1, HS};
    size_t n = (size_t)T * 3 * HS, no = (size_t)T * HS, at = (size_t)t * 3 * HS + column;
    floatX *x = test_tensor(n, 1, 1.0), *y = test_tensor(no, 2, 1.0);
    float* lse = test_zero_floats((size_t)T);
    const floatX *clean = (const floatX*)upload(x, n * X_BYTES), *out = (const floatX*)upload(y, no * X_BYTES);
    x[at] = f32_to_floatX(NAN);
    y[(size_t)t * HS + column % HS] = f32_to_floatX(NAN);
    const floatX *broken = (const floatX*)upload(x, n * X_BYTES), *dout = (const floatX*)upload(y, no * X_BYTES);
    const float* dlse = (const float*)upload(lse, (size_t)T * 4);
    Output o = output_zeros(no * X_BYTES), stats = output_zeros((size_t)T * 4), cached = output_zeros(no * X_BYTES);
    Output k = output_zeros(no * X_BYTES), v = output_zeros(no * X_BYTES);
    Output d1 = output_zeros(n * X_BYTES), d2 = output_zeros(n * X_BYTES);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.attention_forward(output_x(&o, run), output_f(&stats, run), broken, s);
        CUDA_OPS.attention_cached(output_x(&cached, run), output_x(&k, run), output_x(&v, run), broken, s, 0);
        CUDA_OPS.attention_backward(output_x(&d1, run), dout, out, clean, dlse, s);
        CUDA_OPS.attention_backward(output_x(&d2, run), out, out, broken, dlse, s);
    }
    const char* what = label("T %d HS %d, token %d, column %d", T, HS, t, column);
    expect(output_has_nan(&o, what, (size_t)t * HS, HS), "attention loses a NaN, %s", what);
    expect(output_has_nan(&cached, what, (size_t)t * HS, HS), "cached attention loses a NaN, %s", what);
    expect(output_has_nan(&d1, what, (size_t)t * 3 * HS, 3 * HS), "attention backward loses a NaN of dout, %s", what);
    expect(output_has_nan(&d2, what, (size_t)t * 3 * HS, 3 * HS), "attention backward loses a NaN of qkv, %s", what);
    release_uploads();
    test_free(x, y, lse);
}

static void test_cuda_nan(void) {
    const int BT = 4, columns[] = {64, 72, 30, 4104};  // vectors, scalars, several vectors a thread
    for (int k = 0; k < 4; k++) {
        int C = columns[k];
        size_t n = (size_t)BT * C;
        for (size_t i = 5; i < n; i += n / 5) {
            floatX *x = test_tensor(n, 1, 1.0), *clean = test_tensor(n, 4, 1.0);
            const floatX* dclean = (const floatX*)upload(clean, n * X_BYTES);
            x[i] = f32_to_floatX(NAN);
            const floatX* dx = (const floatX*)upload(x, n * X_BYTES);
            cuda_test_nan_layers(dx, dclean, i, BT, C);
            release_uploads();
            dclean = (const floatX*)upload(clean, n * X_BYTES), dx = (const floatX*)upload(x, n * X_BYTES);
            cuda_test_nan_products(dx, dclean, i, BT, C);
            release_uploads();
            test_free(x, clean);
        }
    }
    const int sizes[] = {16, 64, 128}, tokens[] = {0, 1, 69};
    for (int k = 0; k < 27; k++) {
        int HS = sizes[k / 9];
        cuda_test_nan_attention(70, HS, tokens[k / 3 % 3], k % 3 * HS + 5);
    }
}

static void test_cuda_products(void) {
    const int products[][3] = {{1, 1, 1},     {1, 8, 8},      {7, 64, 129},    {129, 7, 64},   {64, 129, 7},
                               {64, 64, 64},  {129, 64, 1024}, {1024, 128, 64}, {7, 1024, 1024}};
    for (int i = 0; i < 36; i++) {
        cuda_test_gemm(products[i / 4][0], products[i / 4][1], products[i / 4][2], i % 4);
    }
    // TinyLlama: down, its input's gradient, its weight's gradient over few tokens, the head
    cuda_test_gemm(5, 2048, 5632, 0);
    cuda_test_gemm(5, 5632, 2048, 2);
    cuda_test_gemm(2048, 5632, 8, 3);
    cuda_test_gemm(3, 32000, 2048, 0);
    const int sizes[] = {16, 64, 128}, lengths[] = {1, 3, 63, 64, 65, 130, 257};
    const int heads[][2] = {{1, 1}, {4, 2}, {2, 1}, {2, 2}, {4, 1}, {8, 4}, {8, 1}};
    for (int i = 0; i < 21; i++) {
        AttentionShape s = {.B = 1 + i % 2, .T = lengths[i % 7], .NH = heads[i % 7][0], .NKV = heads[i % 7][1],
                            .HS = sizes[i / 7]};
        cuda_test_attention(s, i % 7 == 5 ? 3.0 : 1.0);
    }
}

static void test_cuda(void) {
    if (cuda_test_begin("cuda")) {
        test_cuda_layers();
        test_cuda_update();
        test_cuda_products();
        test_cuda_nan();
    }
}
#endif
