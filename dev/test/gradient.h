// gradient.h: gradients against differences: the machinery; attention and matrix products (part of section ops, both
// builds, here because ops.h is long); and the whole model (section gradient, FP32 build).
#pragma once
#include "linear.h"

// ---------------------------------------------------------------------------------------------------------------------
// analytic gradients against differences: f maps inp (n) to out (m); sum(dout * f) has the gradient dinp

typedef void (*ForwardF64)(double* out, const double* inp, const void* shape);

static double gradient_difference(ForwardF64 f, const void* shape, const double* inp, const double* direction, size_t n,
                                  const double* dout, size_t m, double step) {
    double *at = test_zeros(n), *out = test_zeros(m), result = 0.0;
    for (int side = -1; side <= 1; side += 2) {
        for (size_t i = 0; i < n; i++) {
            at[i] = inp[i] + side * step * direction[i];
        }
        f(out, at, shape);
        for (size_t i = 0; i < m; i++) {
            result += side * dout[i] * out[i] / (2.0 * step);
        }
    }
    test_free(at, out);
    return result;
}

// Along three random directions, with a step of 2e-4 and 1e-4 of the input's size, extrapolated to 0: (1e-4)^4 is left
// of the fifth derivative, 2^-53 / 1e-4 = 1e-12 of f64 rounding. 1e-7 of the lengths allows both to be 1e5 larger;
// planted: 1e-3 of the gradient.
static void expect_gradient(const char* what, ForwardF64 f, const void* shape, const double* inp, size_t n,
                            const double* dout, size_t m, const double* dinp) {
    double *direction = test_zeros(n), inp_size = 0.0;
    uint64_t state = 99;
    int good = 1, seen = 0;
    for (size_t i = 0; i < n; i++) {
        inp_size += inp[i] * inp[i] / (double)n;
    }
    for (int trial = 0; trial < 3; trial++) {
        double along = 0.0, length = 0.0, size = 0.0, step = 1e-4 * sqrt(inp_size);
        for (size_t i = 0; i < n; i++) {
            direction[i] = test_normal(&state);
            along += direction[i] * dinp[i];
            length += direction[i] * direction[i];
            size += dinp[i] * dinp[i];
        }
        double wide = gradient_difference(f, shape, inp, direction, n, dout, m, 2.0 * step);
        double narrow = gradient_difference(f, shape, inp, direction, n, dout, m, step),
            allowed = 1e-7 * sqrt(length * size) + 1e-9;
        double difference = (4.0 * narrow - wide) / 3.0;
        good &= fabs(difference - along) <= allowed;
        seen |= !(fabs(difference - along * 1.001) <= allowed);
    }
    expect(good, "%s: the analytic gradient is not that of the forward pass", what);
    expect(seen, "%s: a planted error of 1e-3 is not seen by the differences", what);
    free(direction);
}

// ---------------------------------------------------------------------------------------------------------------------
// attention in f64. weights (B, NH, T, T) = softmax, lse (B, NH, T); out (B, T, NH, HS). Tests read qkv by head.

static const double* qkv_row(const double* qkv, AttentionShape s, int b, int t, int head) {
    return qkv + ((size_t)(b * s.T + t) * (s.NH + 2 * s.NKV) + head) * s.HS;
}

static double dot_f64(const double* a, const double* b, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

// weights and lse of one query; returns how many roundings the weights suffer: q k by HS terms, the maximum taken off,
// exp
static double attention_row_f64(double* weights, double* lse, const double* qkv, AttentionShape s, int b, int h,
                                int t) {
    const double* q = qkv_row(qkv, s, b, t, h);
    int key = s.NH + h / (s.NH / s.NKV);
    double largest = -INFINITY, sum = 0.0, size = 0.0;
    for (int j = 0; j <= t; j++) {
        const double* k = qkv_row(qkv, s, b, j, key);
        weights[j] = dot_f64(q, k, s.HS) / sqrt((double)s.HS);
        largest = fmax(largest, weights[j]);
        // of unrelated q and k
        double terms = sqrt(dot_f64(q, q, s.HS) * dot_f64(k, k, s.HS) / s.HS) / sqrt((double)s.HS);
        size = fmax(size, fmax(fabs(weights[j]), terms));
    }
    for (int j = 0; j <= t; j++) {
        sum += exp(weights[j] - largest);
    }
    *lse = log(sum) + largest;
    for (int j = 0; j <= t; j++) {
        weights[j] = exp(weights[j] - *lse);
    }
    return (sqrt((double)s.HS) + 4.0) * size + fabs(*lse) + sqrt(t + 1.0) + 8.0;
}

// size and roundings (may be NULL): what the roundings of an element of out are relative to, and how many
static void attention_f64_full(double* out, double* lse, double* size, double* roundings, const double* qkv,
                               AttentionShape s) {
    double* weights = test_zeros((size_t)s.T);
    for (int i = 0; i < s.B * s.NH * s.T; i++) {
        int t = i % s.T, h = i / s.T % s.NH, b = i / s.T / s.NH;
        double row_lse, counted = attention_row_f64(weights, &row_lse, qkv, s, b, h, t);
        size_t at = ((size_t)(b * s.T + t) * s.NH + h) * s.HS;
        for (int c = 0; c < s.HS; c++) {
            double sum = 0.0, absolute = 0.0;
            for (int j = 0; j <= t; j++) {
                double term = weights[j] * qkv_row(qkv, s, b, j, s.NH + s.NKV + h / (s.NH / s.NKV))[c];
                sum += term;
                absolute += fabs(term);
            }
            out[at + c] = sum;
            if (size) {
                size[at + c] = absolute;
            }
        }
        if (size) {
            lse[i] = row_lse;
            roundings[i] = counted;
        }
    }
    free(weights);
}

static void attention_f64(double* out, const double* qkv, const void* shape) {
    attention_f64_full(out, NULL, NULL, NULL, qkv, *(const AttentionShape*)shape);
}

// out is an input of the operation: as it was stored
static void attention_backward_f64(double* dqkv, double* size, const double* dout, const double* out, const double* qkv,
                                   AttentionShape s) {
    double *weights = test_zeros((size_t)s.T), scale = 1.0 / sqrt((double)s.HS);
    for (int i = 0; i < s.B * s.NH * s.T; i++) {
        int t = i % s.T, h = i / s.T % s.NH, b = i / s.T / s.NH, kv = h / (s.NH / s.NKV);
        size_t at = ((size_t)(b * s.T + t) * s.NH + h) * s.HS;
        double lse, counted = attention_row_f64(weights, &lse, qkv, s, b, h, t);
        double delta = dot_f64(dout + at, out + at, s.HS);
        double delta_size = sqrt(dot_f64(dout + at, dout + at, s.HS) * dot_f64(out + at, out + at, s.HS) / s.HS);
        for (int j = 0; j <= t; j++) {
            size_t q = (size_t)(qkv_row(qkv, s, b, t, h) - qkv), k = (size_t)(qkv_row(qkv, s, b, j, s.NH + kv) - qkv);
            size_t v = (size_t)(qkv_row(qkv, s, b, j, s.NH + s.NKV + kv) - qkv);
            double dp = dot_f64(dout + at, qkv + v, s.HS), ds = weights[j] * (dp - delta) * scale;
            double dp_size = sqrt(dot_f64(dout + at, dout + at, s.HS) * dot_f64(qkv + v, qkv + v, s.HS) / s.HS);
            double sums = sqrt((double)s.HS) * (dp_size + delta_size) + fabs(dp) + fabs(delta);
            double ds_size = weights[j] * scale * (sums + counted * fabs(dp - delta));
            for (int c = 0; c < s.HS; c++) {
                dqkv[q + c] += ds * qkv[k + c];
                dqkv[k + c] += ds * qkv[q + c];
                dqkv[v + c] += weights[j] * dout[at + c];
                // roundings of ds, and of the sums over keys (queries) that it enters
                size[q + c] += (ds_size + sqrt((double)s.T) * fabs(ds)) * fabs(qkv[k + c]);
                size[k + c] += (ds_size + sqrt((double)s.T) * fabs(ds)) * fabs(qkv[q + c]);
                size[v + c] += (counted + sqrt((double)s.T)) * fabs(weights[j] * dout[at + c]);
            }
        }
    }
    free(weights);
}

static void attention_want(Near* near, const double* want, const double* size, const double* roundings,
                           AttentionShape s) {
    for (size_t i = 0; i < near->n; i++) {
        int h = (int)(i / s.HS % s.NH), t = (int)(i / s.HS / s.NH % s.T), b = (int)(i / s.HS / s.NH / s.T);
        near_want(near, i, want[i], size[i], roundings[(b * s.NH + h) * s.T + t]);
    }
}

// decoding: a first piece of several tokens, then one by one, every row as in the whole
static void attention_cached_check(const floatX* qkv, const double* want, const double* size, const double* roundings,
                                   AttentionShape s) {
    int width = (s.NH + 2 * s.NKV) * s.HS;
    floatX *out = test_tensor((size_t)s.T * s.NH * s.HS, 1, 1.0);
    floatX *keys = test_tensor((size_t)s.T * s.NKV * s.HS, 2, NAN),
        *values = test_tensor((size_t)s.T * s.NKV * s.HS, 3, NAN);
    for (int first = 0; first < s.T;) {
        AttentionShape piece = s;
        piece.T = first == 0 ? (s.T + 1) / 2 : 1;
        CPU_OPS.attention_cached(out + (size_t)first * s.NH * s.HS, keys, values, qkv + (size_t)first * width, piece,
                                 first);
        first += piece.T;
    }
    Near near = near_floatX(out, (size_t)s.T * s.NH * s.HS);
    attention_want(&near, want, size, roundings, s);
    near_expect(&near, "attention with a cache, T %d NH %d NKV %d HS %d", s.T, s.NH, s.NKV, s.HS);
    test_free(out, keys, values);
}

static void test_ops_attention_shape(AttentionShape s, double scale) {
    int width = (s.NH + 2 * s.NKV) * s.HS;
    size_t nq = (size_t)s.B * s.T * width, no = (size_t)s.B * s.T * s.NH * s.HS, rows = (size_t)s.B * s.NH * s.T;
    floatX *qkv = test_tensor(nq, 1, scale), *out = test_tensor(no, 2, 1.0), *dy = test_tensor(no, 3, 1.0),
        *dqkv = test_tensor(nq, 4, 1.0);
    float* lse = (float*)malloc_or_die(rows * sizeof(float), "test");
    double *inp = test_double(qkv, nq), *dout = test_double(dy, no), *want = test_zeros(no),
        *lse_want = test_zeros(rows);
    double *size = test_zeros(no), *roundings = test_zeros(rows), *grad = test_zeros(nq), *grad_size = test_zeros(nq);
    CPU_OPS.attention_forward(out, lse, qkv, s);
    CPU_OPS.attention_backward(dqkv, dy, out, qkv, lse, s);
    attention_f64_full(want, lse_want, size, roundings, inp, s);
    Near near = near_floatX(out, no), near_lse = near_f32(lse, rows), back = near_floatX(dqkv, nq);
    attention_want(&near, want, size, roundings, s);
    for (size_t i = 0; i < rows; i++) {
        near_want(&near_lse, i, lse_want[i], 1.0, roundings[i]);
    }
    near_expect(&near, "attention, B %d T %d NH %d NKV %d HS %d", s.B, s.T, s.NH, s.NKV, s.HS);
    near_expect(&near_lse, "lse, B %d T %d NH %d NKV %d HS %d", s.B, s.T, s.NH, s.NKV, s.HS);
    double* stored = test_double(out, no);
    attention_backward_f64(grad, grad_size, dout, stored, inp, s);
    for (size_t i = 0; i < nq; i++) {
        near_want_error(&back, i, grad[i], grad_size[i] * F32_ROUNDING);
    }
    near_expect(&back, "attention backward, B %d T %d NH %d NKV %d HS %d", s.B, s.T, s.NH, s.NKV, s.HS);
    if (s.B == 1) {
        attention_cached_check(qkv, want, size, roundings, s);
    }
    if (s.T > 1 && s.T < 64) {
        memset(grad, 0, nq * sizeof(double));
        attention_backward_f64(grad, grad_size, dout, want, inp, s);
        expect_gradient("attention", attention_f64, &s, inp, nq, dout, no, grad);
        near = near_floatX(out, no);
        // planted: the queries of head 0 are 20 % longer, as by another factor of the scores
        for (size_t i = 0; i < nq; i++) {
            inp[i] *= (int)(i % width) < s.HS ? 1.2 : 1.0;
        }
        attention_f64_full(want, lse_want, size, roundings, inp, s);
        attention_want(&near, want, size, roundings, s);
        near_expect_far(&near, "attention with another factor of the scores");
    }
    test_free(qkv, out, dy, dqkv, lse, inp, dout, want, lse_want, size, roundings, grad, grad_size, stored);
}

static void test_ops_attention(void) {
    const int lengths[] = {1, 3, 63, 64, 65, 130}, sizes[] = {16, 64, 128}, groups[] = {1, 2, 4};
    for (int i = 0; i < 18; i++) {
        int group = groups[(i + i / 6) % 3], T = lengths[i % 6];
        AttentionShape s = {.B = 1 + i % 2, .T = T, .NH = T > 64 && group < 4 ? 2 : 4, .NKV = 1, .HS = sizes[i / 6]};
        s.NKV = s.NH / group > 0 ? s.NH / group : 1;
        test_ops_attention_shape(s, i % 4 == 3 ? 3.0 : 1.0);
    }
    test_ops_attention_shape((AttentionShape){.B = 1, .T = 5, .NH = 6, .NKV = 3, .HS = 6}, 1.0);
    test_ops_attention_shape((AttentionShape){.B = 3, .T = 2, .NH = 1, .NKV = 1, .HS = 2}, 2.0);
}

// ---------------------------------------------------------------------------------------------------------------------
// products: every pair of dense, transposed and MXFP4 operands, each kind of output

typedef enum { TEST_OPERAND_DENSE, TEST_OPERAND_TRANSPOSED, TEST_OPERAND_MXFP4, TEST_OPERANDS } TestOperand;

static QTensor gemm_operand(TestOperand kind, int rows, int cols, uint64_t seed) {
    floatX* x = test_tensor((size_t)rows * cols, seed, 1.0);
    if (kind != TEST_OPERAND_MXFP4) {
        return qtensor_view(x, rows, cols, kind == TEST_OPERAND_TRANSPOSED);
    }
    const QuantSpec spec = TEST_ABSMAX(ROTATE_NONE, ROUND_NEAREST);
    QTensor q = quantize_op(&spec, rows, cols, x, 0, 1);
    free(x);
    return q;
}

static void gemm_operand_free(QTensor* q) {
    if (q->format == FORMAT_MXFP4) {
        test_qtensor_free(q);
    } else {
        free((void*)q->dense);
    }
}

static void test_ops_gemm(TestOperand kind_a, TestOperand kind_b, int M, int N, int K) {
    QTensor a = gemm_operand(kind_a, M, K, 1), b = gemm_operand(kind_b, N, K, 2);
    size_t n = (size_t)M * N;
    floatX* out = test_tensor(n, 3, NAN);  // what `=` overwrites must not matter
    float *out32 = (float*)malloc_or_die(n * sizeof(float), "test"),
    *sum32 = (float*)malloc_or_die(n * sizeof(float), "test");
    double *da = test_decoded(&a), *db = test_decoded(&b), *want = test_zeros(n), *error = test_zeros(n);
    for (size_t i = 0; i < n; i++) {
        out32[i] = NAN;
        sum32[i] = 0.125f * (float)(i % 64);
    }
    const float alpha = 0.75f;
    double owed = (kind_a == TEST_OPERAND_MXFP4 ? 4.0 / 3.0 : 1.0) * (kind_b == TEST_OPERAND_MXFP4 ? 4.0 / 3.0 : 1.0);
    product_f64(want, error, da, db, M, N, K, (double)alpha * owed);
    GemmArgs args = {.out = real_floatX(out), .accumulate = 0, .a = &a, .b = &b, .alpha = alpha};
    CPU_OPS.gemm(&args);
    args.out = real_f32(out32);
    CPU_OPS.gemm(&args);
    args.out = real_f32(sum32), args.accumulate = 1;
    CPU_OPS.gemm(&args);
    Near near[3] = {near_floatX(out, n), near_f32(out32, n), near_f32(sum32, n)}, wrong = near_f32(out32, n);
    for (size_t i = 0; i < n; i++) {
        near_want_error(&near[0], i, want[i], error[i]);
        near_want_error(&near[1], i, want[i], error[i]);
        near_want_error(&near[2], i, want[i] + 0.125 * (double)(i % 64), error[i] + 8.0 * F32_ROUNDING);
        near_want_error(&wrong, i, want[i] * 0.75, error[i]);
    }
    const char* names[3] = {"floatX", "f32", "f32 +="};
    for (int i = 0; i < 3; i++) {
        near_expect(&near[i], "gemm of kinds %d %d to %s, %d %d %d", kind_a, kind_b, names[i], M, N, K);
    }
    near_expect_far(&wrong, "gemm with another factor");
    gemm_operand_free(&a);
    gemm_operand_free(&b);
    test_free(out, out32, sum32, da, db, want, error);
}

// ---------------------------------------------------------------------------------------------------------------------
// the whole model, FP32 build: for every parameter tensor, the loss at weights moved both ways along a direction,
// against the gradient. The difference of the losses is compared with sum(gradient * (what the f32 weights really
// moved)), so that rounding the moved weights costs nothing. Two steps, h and h/2, extrapolated; what is left is the
// noise of the losses: a row's loss of about log V suffers the roundings of its path, rows are independent.

#ifdef PRECISION_FP32
// roundings on the way to a loss: sqrt(K) a product, sqrt(C) + 4 a norm, 8 swiglu, 3 rope, 1 an addition to the stream
static double llama_roundings(const ModelConfig* m, int T) {
    double norm = sqrt((double)m->C) + 4.0, attention = sqrt((double)m->HS) + sqrt((double)T) + 8.0;
    double products = 2.0 * sqrt((double)m->C) + sqrt((double)m->NH * m->HS) + sqrt((double)m->F);
    double head = norm + sqrt((double)m->C) + sqrt((double)m->V) + 6.0;
    return m->L * (2.0 * norm + products + 3.0 + attention + 8.0 + 2.0) + head;
}

static double gradient_loss(Model* model, const int32_t* inputs, const int32_t* targets) {
    model->weights_quantized = 0;
    model_begin_step(model, 0.0, 0.0, 0.0, 0);
    model_forward(model, inputs, targets, 1.0f, 0);
    return model_read_control(model).loss_sum / (model->B * model->T);
}

// loss(w + h d) - loss(w - h d); *predicted from the gradient of the tensor
static double gradient_move(Model* model, const Param* param, const double* direction, double h, const int32_t* inputs,
                            const int32_t* targets, double* predicted) {
    float *w = model->params + param->offset, *saved = (float*)malloc_or_die(param->count * sizeof(float), "test");
    const float* grad = (const float*)model->grads.data + param->offset;
    double difference = 0.0;
    memcpy(saved, w, param->count * sizeof(float));
    *predicted = 0.0;
    for (int side = -1; side <= 1; side += 2) {
        for (size_t i = 0; i < param->count; i++) {
            w[i] = (float)((double)saved[i] + side * h * direction[i]);
            *predicted += side * (double)grad[i] * (double)w[i];
        }
        difference += side * gradient_loss(model, inputs, targets);
    }
    memcpy(w, saved, param->count * sizeof(float));
    free(saved);
    return difference;
}

static void test_gradient_tensor(Model* model, const Param* param, const int32_t* inputs, const int32_t* targets) {
    double *direction = test_zeros(param->count), length = 0.0, along = 0.0;
    const float* grad = (const float*)model->grads.data + param->offset;
    uint64_t state = param->offset;
    for (size_t i = 0; i < param->count; i++) {
        length += (double)grad[i] * (double)grad[i];
    }
    for (size_t i = 0; i < param->count; i++) {  // half the gradient, half chance
        direction[i] = (double)grad[i] / sqrt(length) + test_normal(&state) / sqrt((double)param->count);
        along += (double)grad[i] * direction[i];
    }
    double noise = llama_roundings(&model->config, model->T) * F32_ROUNDING * log((double)model->config.V) /
                   sqrt((double)model->B * model->T);
    for (int wide = 0; wide < 3; wide++) {
        double off[2], h = ldexp(0.02, -wide) / fabs(along), allowed = 2.0 * noise * (4.0 * 2.0 + 1.0) / 3.0;
        for (int k = 0; k < 2; k++) {  // k = 1 has half the step, its numbers times two
            double predicted, difference = gradient_move(model, param, direction, ldexp(h, -k), inputs, targets,
                                                         &predicted);
            off[k] = ldexp(difference - predicted, k);
        }
        double extrapolated = (4.0 * off[1] - off[0]) / 3.0, planted = 2.0 * h * along * 0.02;
        expect(fabs(extrapolated) <= allowed, "%s: off by %.2e of a change of %.2e, allowed %.2e", param->name,
               extrapolated, 2.0 * h * along, allowed);
        expect(fabs(extrapolated + planted) > allowed, "%s: a gradient 2 %% too long is not seen", param->name);
    }
    free(direction);
}

static void test_gradient_model(int tied) {
    ModelConfig m = {.name = {}, .L = 2, .C = 32, .NH = 4, .NKV = 2, .HS = 8, .F = 48, .V = 40, .tied = tied,
                     .max_positions = 16, .rope_theta = 10000.0, .rms_eps = 1e-5, .rope_factor = 0, .rope_low = 1,
                     .rope_high = 4, .rope_original = 16};
    Model model;
    int32_t inputs[32], targets[32];
    model_prepare(&model, &CPU_OPS, &m, recipe_find("bf16"), MEMORY_EXACT, 2, 16);
    model_allocate(&model);
    model_init_weights(&model, 5);
    uint64_t state = 11;
    for (int p = 0; p < model.table.count; p++) {
        const Param* param = &model.table.list[p];
        for (size_t i = 0; i < param->count; i++) {  // livelier than at the start of a training
            float* w = model.params + param->offset + i;
            *w = param->is_matrix ? *w * 6.0f : *w + 0.2f * (float)test_normal(&state);
        }
    }
    for (int i = 0; i < 32; i++) {
        inputs[i] = (int32_t)(test_random(&state) % 40);
        targets[i] = (int32_t)(test_random(&state) % 40);
    }
    model.weights_quantized = 0;
    model_zero_gradients(&model);
    model_forward(&model, inputs, targets, 1.0f / 32.0f, 1);
    model_backward(&model);
    model_finish_gradients(&model);
    for (int p = 0; p < model.table.count; p++) {
        test_gradient_tensor(&model, &model.table.list[p], inputs, targets);
    }
    model_free(&model);
}

static void test_gradient(void) {
    test_gradient_model(0);
    test_gradient_model(1);
}
#else
static void test_gradient(void) { printf("skip gradient: differences need the PRECISION=FP32 build\n"); }
#endif
