// ops.h: tests of every operation of llmc/ops.h on the CPU table (section ops).
//
// Forward: against an f64 loop over the same inputs. Backward: against an f64 analytic loop, and that loop against
// central differences of the f64 forward. The tolerances count roundings (formats.h); the comparators are fed planted
// errors, and every operation is also compared with the result of a wrong parameter, which must not fit. Attention and
// products are tested in gradient.h, which keeps this file short.
#pragma once
#include "gradient.h"
#include "update.h"

// ---------------------------------------------------------------------------------------------------------------------
// embedding, add

static void test_ops_embedding(int BT, int V, int C) {
    floatX *weight = test_tensor((size_t)V * C, 1, 1.0), *dout = test_tensor((size_t)BT * C, 2, 1.0);
    floatX* out = test_tensor((size_t)BT * C, 3, 1.0);
    float* dweight = (float*)calloc_or_die((size_t)V * C * sizeof(float), "test");
    int32_t* tokens = (int32_t*)malloc_or_die((size_t)BT * sizeof(int32_t), "test");
    int exact = 1;
    for (int t = 0; t < BT; t++) {
        tokens[t] = t % 3 == 2 ? V - 1 : t * 7 % V;  // the last token of the vocabulary stands often
    }
    CPU_OPS.embedding_forward(out, tokens, weight, BT, C);
    for (int i = 0; i < BT * C; i++) {
        exact &= !memcmp(out + i, weight + (size_t)tokens[i / C] * C + i % C, sizeof(floatX));
    }
    expect(exact, "embedding of %d tokens, V %d, C %d", BT, V, C);
    double *want = test_zeros((size_t)V * C), *size = test_zeros((size_t)V * C), *count = test_zeros((size_t)V * C);
    for (int i = 0; i < V * C; i++) {
        dweight[i] = want[i] = (float)i * 0.01f;  // += is part of the contract
        size[i] = want[i] * want[i];
    }
    CPU_OPS.embedding_backward(real_f32(dweight), dout, tokens, BT, V, C);
    for (int i = 0; i < BT * C; i++) {
        size_t at = (size_t)tokens[i / C] * C + i % C;
        want[at] += (double)floatX_to_f32(dout[i]);
        size[at] += pow((double)floatX_to_f32(dout[i]), 2);
        count[at] += 1.0;
    }
    Near near = near_f32(dweight, (size_t)V * C);
    for (size_t i = 0; i < near.n; i++) {
        near_want(&near, i, want[i], sqrt(size[i]), sqrt(count[i]));
    }
    near_expect(&near, "embedding backward, %d tokens, V %d, C %d", BT, V, C);
    test_free(weight, dout, out, dweight, tokens, want, size, count);
}

static void test_ops_add(int n) {
    floatX *a = test_tensor((size_t)n, 1, 1.0), *b = test_tensor((size_t)n, 2, 1e-2),
        *out = test_tensor((size_t)n, 3, 1.0);
    CPU_OPS.add(out, a, b, (size_t)n);
    Near near = near_floatX(out, (size_t)n);
    for (int i = 0; i < n; i++) {
        near_want(&near, (size_t)i, (double)floatX_to_f32(a[i]) + (double)floatX_to_f32(b[i]), 0.0, 1.0);
    }
    near_expect(&near, "add of %d", n);
    CPU_OPS.add(a, a, b, (size_t)n);
    expect(!memcmp(a, out, (size_t)n * sizeof(floatX)), "add in place on a");
    free(a);
    a = test_tensor((size_t)n, 1, 1.0);
    CPU_OPS.add(b, a, b, (size_t)n);
    expect(!memcmp(b, out, (size_t)n * sizeof(floatX)), "add in place on b");
    test_free(a, b, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// RMSNorm. In the f64 functions inp is the tokens (BT, C), then the weight (C); so is the gradient.

typedef struct { int BT, C; double eps; } NormShape;

static void rmsnorm_f64(double* out, const double* inp, const void* shape) {
    const NormShape s = *(const NormShape*)shape;
    for (int t = 0; t < s.BT; t++) {
        double sum = 0.0;
        for (int c = 0; c < s.C; c++) {
            sum += inp[t * s.C + c] * inp[t * s.C + c];
        }
        for (int c = 0; c < s.C; c++) {
            out[t * s.C + c] = inp[t * s.C + c] / sqrt(sum / s.C + s.eps) * inp[s.BT * s.C + c];
        }
    }
}

// gradient, and what the roundings of each element are relative to
static void rmsnorm_backward_f64(double* dinp, double* size, const double* inp, const double* dout, NormShape s) {
    const double* w = inp + (size_t)s.BT * s.C;
    double *dw = dinp + (size_t)s.BT * s.C, *dw_size = size + (size_t)s.BT * s.C;
    for (int t = 0; t < s.BT; t++) {
        const double *x = inp + (size_t)t * s.C, *dy = dout + (size_t)t * s.C;
        double sum = 0.0, dot = 0.0, dot_size = 0.0;
        for (int c = 0; c < s.C; c++) {
            sum += x[c] * x[c];
            dot += w[c] * dy[c] * x[c];
            dot_size += pow(w[c] * dy[c] * x[c], 2);
        }
        double r = 1.0 / sqrt(sum / s.C + s.eps);
        for (int c = 0; c < s.C; c++) {
            dinp[(size_t)t * s.C + c] = r * (w[c] * dy[c] - x[c] * dot / s.C * r * r);
            double along = fmax(fabs(dot), sqrt(dot_size)) / s.C * r * r;
            size[(size_t)t * s.C + c] = r * (fabs(w[c] * dy[c]) + fabs(x[c]) * along);
            dw[c] += dy[c] * x[c] * r;
            dw_size[c] += pow(dy[c] * x[c] * r, 2);
        }
    }
    for (int c = 0; c < s.C; c++) {
        dw_size[c] = sqrt(dw_size[c]);
    }
}

static void test_ops_rmsnorm(int BT, int C, double scale) {
    NormShape s = {BT, C, (double)1e-5f};
    size_t n = (size_t)BT * C;
    floatX *x = test_tensor(n + C, 1, scale), *dy = test_tensor(n, 2, 1.0), *y = test_tensor(n, 3, 1.0),
        *res = test_tensor(n, 4, 1.0);
    float *rstd = (float*)malloc_or_die(BT * sizeof(float), "test"),
        *dw = (float*)calloc_or_die(C * sizeof(float), "test");
    double *inp = test_double(x, n + C), *dout = test_double(dy, n), *want = test_zeros(n), *dinp = test_zeros(n + C);
    double *size = test_zeros(n + C), roundings = sqrt((double)C) + 6.0;
    CPU_OPS.rmsnorm_forward(y, rstd, x, x + n, BT, C, 1e-5f);
    rmsnorm_f64(want, inp, &s);
    Near near = near_floatX(y, n), wrong = near_floatX(y, n), near_rstd = near_f32(rstd, (size_t)BT);
    for (size_t i = 0; i < n; i++) {
        near_want(&near, i, want[i], 0.0, roundings);
        near_want(&wrong, i, want[i] * 1.03, 0.0, roundings);
    }
    for (int t = 0; t < BT; t++) {
        double sum = 0.0;
        for (int c = 0; c < C; c++) {
            sum += inp[t * C + c] * inp[t * C + c];
        }
        near_want(&near_rstd, (size_t)t, 1.0 / sqrt(sum / C + s.eps), 0.0, roundings);
    }
    near_expect(&near, "rmsnorm, %d x %d", BT, C);
    near_expect(&near_rstd, "rstd, %d x %d", BT, C);
    near_expect_far(&wrong, "rmsnorm of another eps");
    rmsnorm_backward_f64(dinp, size, inp, dout, s);
    expect_gradient("rmsnorm", rmsnorm_f64, &s, inp, n + C, dout, n, dinp);
    for (int with = 0; with < 3; with++) {  // no residual gradient, one, in place on it
        floatX* dx = with == 2 ? res : y;
        dw[0] = 0.25f;
        memset(dw + 1, 0, (C - 1) * sizeof(float));
        double* residual = test_double(res, n);
        CPU_OPS.rmsnorm_backward(dx, real_f32(dw), dy, with ? res : NULL, x, x + n, rstd, BT, C);
        near = near_floatX(dx, n);
        for (size_t i = 0; i < n; i++) {
            double add = with ? residual[i] : 0.0;
            near_want(&near, i, dinp[i] + add, size[i] + fabs(add), 2 * roundings);
        }
        near_expect(&near, "rmsnorm backward, residual %d, %d x %d", with, BT, C);
        near = near_f32(dw, (size_t)C);
        for (int c = 0; c < C; c++) {
            near_want(&near, (size_t)c, dinp[n + c] + (c ? 0.0 : 0.25), size[n + c], sqrt((double)BT) + roundings);
        }
        near_expect(&near, "rmsnorm weight gradient, %d x %d", BT, C);
        free(residual);
    }
    test_free(x, dy, y, res, rstd, dw, inp, dout, want, dinp, size);
}

// ---------------------------------------------------------------------------------------------------------------------
// RoPE: the angle is computed here; planted: interleaved pairs (2j, 2j+1)

static void test_ops_rope(AttentionShape s, int first) {
    int width = (s.NH + 2 * s.NKV) * s.HS, half = s.HS / 2;
    size_t n = (size_t)s.B * s.T * width;
    ModelConfig m = {};
    m.HS = s.HS, m.max_positions = first + s.T, m.rope_theta = 10000.0;
    float* table = (float*)malloc_or_die((size_t)m.max_positions * s.HS * sizeof(float), "test");
    rope_table_fill(table, &m);
    floatX *x = test_tensor(n, 5, 1.0), *again = test_tensor(n, 5, 1.0);
    double* inp = test_double(x, n);
    CPU_OPS.rope(x, table, s, first, 0);
    Near near = near_floatX(x, n), wrong = near_floatX(x, n);
    for (size_t i = 0; i < n; i++) {
        int head = (int)(i % width) / s.HS, j = (int)(i % s.HS), t = (int)(i / width % s.T);
        double turned[2];
        for (int interleaved = 0; interleaved < 2; interleaved++) {
            int k = interleaved ? j / 2 : j % half, upper = interleaved ? j % 2 : j / half;
            size_t a = i - j + (interleaved ? 2 * k : k), b = a + (interleaved ? 1 : half);
            double angle = (first + t) * pow(10000.0, -2.0 * k / s.HS);
            turned[interleaved] = upper ? inp[b] * cos(angle) + inp[a] * sin(angle)
                                        : inp[a] * cos(angle) - inp[b] * sin(angle);
        }
        size_t partner = j < half ? i + half : i - half;
        double size = hypot(inp[i], inp[partner]);
        near_want(&near, i, head < s.NH + s.NKV ? turned[0] : inp[i], size, 4.0);
        near_want(&wrong, i, head < s.NH + s.NKV ? turned[1] : inp[i], size, 4.0);
    }
    near_expect(&near, "rope, T %d HS %d from %d", s.T, s.HS, first);
    if (half > 1 && first + s.T > 1) {
        near_expect_far(&wrong, "rope of interleaved pairs");
    } else {
        near_free(&wrong);
    }
    CPU_OPS.rope(x, table, s, first, 1);
    near = near_floatX(x, n);
    for (size_t i = 0; i < n; i++) {
        size_t j = i % s.HS, partner = (int)j < half ? i + half : i - half;
        double size = hypot(inp[i], inp[partner]);  // two stores; that of the first turn is mixed by the second
        near_want_error(&near, i, inp[i], 8.0 * F32_ROUNDING * size + (double)FLOATX_EPSILON * size);
    }
    near_expect(&near, "rope and back, T %d HS %d", s.T, s.HS);
    // values stay as they are, bit for bit
    int same = 1;
    for (size_t i = 0; i < n; i++) {
        same &= (int)(i % width) < (s.NH + s.NKV) * s.HS || !memcmp(x + i, again + i, sizeof(floatX));
    }
    expect(same, "rope changes the values");
    test_free(table, x, again, inp);
}

// ---------------------------------------------------------------------------------------------------------------------
// SwiGLU

typedef struct { int BT, F; } GluShape;

static void swiglu_f64(double* out, const double* inp, const void* shape) {
    const GluShape s = *(const GluShape*)shape;
    for (int i = 0; i < s.BT * s.F; i++) {
        const double* gate = inp + (size_t)(i / s.F) * 2 * s.F + i % s.F;
        out[i] = gate[0] / (1.0 + exp(-gate[0])) * gate[s.F];
    }
}

static void test_ops_swiglu(int BT, int F, double scale) {
    GluShape s = {BT, F};
    size_t n = (size_t)BT * F;
    floatX *x = test_tensor(2 * n, 1, scale), *dy = test_tensor(n, 2, 1.0), *y = test_tensor(n, 3, 1.0),
        *dx = test_tensor(2 * n, 4, 1.0);
    double *inp = test_double(x, 2 * n), *dout = test_double(dy, n), *want = test_zeros(n), *dinp = test_zeros(2 * n);
    CPU_OPS.swiglu_forward(y, MXINT8_NONE, x, BT, F);
    CPU_OPS.swiglu_backward(dx, dy, x, MXINT8_NONE, BT, F);
    swiglu_f64(want, inp, &s);
    Near near = near_floatX(y, n), back = near_floatX(dx, 2 * n);
    // exp within 2 units in the last place is 4 roundings, and exp, 1 + exp, a quotient, products follow
    for (size_t i = 0; i < n; i++) {
        size_t at = i / F * 2 * F + i % F;
        double g = inp[at], u = inp[at + F], d = dout[i], sigmoid = 1.0 / (1.0 + exp(-g));
        dinp[at] = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
        dinp[at + F] = d * g * sigmoid;
        near_want(&near, i, want[i], 0.0, 8.0);
        near_want(&back, at, dinp[at], fabs(d * u) * sigmoid * (1.0 + fabs(g)), 12.0);
        near_want(&back, at + F, dinp[at + F], 0.0, 8.0);
    }
    near_expect(&near, "swiglu, %d x %d, scale %g", BT, F, scale);
    near_expect(&back, "swiglu backward, %d x %d, scale %g", BT, F, scale);
    expect_gradient("swiglu", swiglu_f64, &s, inp, 2 * n, dout, n, dinp);
    test_free(x, dy, y, dx, inp, dout, want, dinp);
}

// exp itself: its header says within 2 units in the last place where the result is normal
static void test_ops_exp(void) {
    double most = 0.0;
    for (double x = -87.0; x < 88.0; x += 1e-4) {
        double want = exp((double)(float)x);
        most = fmax(most, fabs((double)cpu_exp((float)x) - want) / ldexp(1.0, ilogb(want) - 23));
    }
    expect(most <= 2.0, "cpu_exp is %.3f units off", most);
    expect(cpu_exp(-1e30f) == 0.0f && isinf(cpu_exp(1e30f)) && isnan(cpu_exp(NAN)) && cpu_exp(0.0f) == 1.0f,
           "cpu_exp at the ends");
    expect(cpu_exp(-INFINITY) == 0.0f && isinf(cpu_exp(INFINITY)), "cpu_exp of infinity");
}

// ---------------------------------------------------------------------------------------------------------------------
// cross-entropy

typedef struct { int rows, V; const int32_t* targets; } LossShape;

static void crossentropy_f64(double* losses, const double* logits, const void* shape) {
    const LossShape s = *(const LossShape*)shape;
    for (int r = 0; r < s.rows; r++) {
        const double* x = logits + (size_t)r * s.V;
        double largest = x[0], sum = 0.0;
        for (int v = 0; v < s.V; v++) {
            largest = fmax(largest, x[v]);
        }
        for (int v = 0; v < s.V; v++) {
            sum += exp(x[v] - largest);
        }
        losses[r] = log(sum) + largest - x[s.targets[r]];
    }
}

static void test_ops_crossentropy(int rows, int V, double scale) {
    size_t n = (size_t)rows * V;
    int32_t* targets = (int32_t*)malloc_or_die(rows * sizeof(int32_t), "test");
    for (int r = 0; r < rows; r++) {
        targets[r] = r == 0 ? 0 : r == 1 ? V - 1 : r * 7919 % V;
    }
    LossShape s = {rows, V, targets};
    floatX *x = test_tensor(n, 1, scale), *untouched = test_tensor(n, 1, scale);
    float* losses = (float*)malloc_or_die(rows * sizeof(float), "test");
    double *inp = test_double(x, n), *want = test_zeros(rows), *grad = test_zeros(n), *dout = test_zeros(rows);
    const float grad_scale = 0.37f;
    crossentropy_f64(want, inp, &s);
    CPU_OPS.crossentropy(losses, x, targets, rows, V, grad_scale, 0);
    expect(!memcmp(x, untouched, n * sizeof(floatX)), "crossentropy without gradient changes the logits");
    CPU_OPS.crossentropy(losses, x, targets, rows, V, grad_scale, 1);
    Near near = near_f32(losses, (size_t)rows), back = near_floatX(x, n);
    for (int r = 0; r < rows; r++) {
        double largest = -INFINITY, spread = 0.0;
        for (int v = 0; v < V; v++) {
            largest = fmax(largest, inp[(size_t)r * V + v]);
        }
        for (int v = 0; v < V; v++) {
            double d = largest - inp[(size_t)r * V + v], lse = want[r] + inp[(size_t)r * V + targets[r]] - largest;
            double p = exp(-d - lse);
            spread += p * d;  // the rounding of x - largest, weighted
            double hit = v == targets[r], roundings = d + lse + sqrt((double)V) + 8.0;
            grad[(size_t)r * V + v] = (p - hit) * (double)grad_scale;
            near_want(&back, (size_t)r * V + v, grad[(size_t)r * V + v], (p + hit) * (double)grad_scale, roundings);
        }
        near_want(&near, (size_t)r, want[r], 1.0, sqrt((double)V) + spread + 4.0);
        dout[r] = (double)grad_scale;
    }
    near_expect(&near, "crossentropy, %d x %d, scale %g", rows, V, scale);
    near_expect(&back, "crossentropy gradient, %d x %d, scale %g", rows, V, scale);
    if (V > 1 && scale < 100) {
        expect_gradient("crossentropy", crossentropy_f64, &s, inp, n, dout, (size_t)rows, grad);
    }
    test_free(targets, x, untouched, losses, inp, want, grad, dout);
}

// ---------------------------------------------------------------------------------------------------------------------
// unrotate, sum of squares, AdamW

static void test_ops_unrotate(int rows, int cols) {
    size_t n = (size_t)rows * cols;
    floatX* x = test_tensor(n, 1, 1.0);
    float* x32 = (float*)malloc_or_die(n * sizeof(float), "test");
    uint32_t* mask = (uint32_t*)malloc_or_die(n / GROUP * sizeof(uint32_t), "test");
    uint64_t state = 5;
    for (size_t g = 0; g < n / GROUP; g++) {
        mask[g] = (uint32_t)test_random(&state) | (uint32_t)test_random(&state);
    }
    for (int with_mask = 0; with_mask < 2; with_mask++) {
        double *want = test_double(x, n), *error = test_zeros(n);
        for (size_t i = 0; i < n; i++) {
            x32[i] = floatX_to_f32(x[i]);
        }
        unrotate_f64(want, error, with_mask ? mask : NULL, n);
        CPU_OPS.unrotate(real_floatX(x), with_mask ? mask : NULL, NULL, rows, cols);
        CPU_OPS.unrotate(real_f32(x32), with_mask ? mask : NULL, NULL, rows, cols);
        Near near = near_floatX(x, n), near32 = near_f32(x32, n);
        near_want_all(&near, want, error);
        near_want_all(&near32, want, error);
        near_expect(&near, "unrotate, mask %d, %d x %d", with_mask, rows, cols);
        near_expect(&near32, "unrotate f32, mask %d, %d x %d", with_mask, rows, cols);
        test_free(want, error);
    }
    test_free(x, x32, mask);
}

// ---------------------------------------------------------------------------------------------------------------------
// a NaN that goes in comes out; and the number of threads changes no bit

static int has_nan(const floatX* x, size_t n) {
    int found = 0;
    for (size_t i = 0; i < n; i++) {
        found |= isnan(floatX_to_f32(x[i]));
    }
    return found;
}

static void test_ops_nan(void) {
    const int BT = 4, C = 64;
    const AttentionShape s = {1, 4, 1, 1, 16};
    const size_t n = 4 * 64;
    int32_t tokens[4] = {0, 1, 2, 3};
    float table[4 * 16] = {0}, stats[4] = {1, 1, 1, 1}, sums[256], weights[256] = {0}, zeros[256] = {0};
    for (size_t i = 0; i < n; i += 37) {
        floatX *x = test_tensor(n, 1, 1.0), *y = test_tensor(n, 2, 1.0), *z = test_tensor(n, 3, 1.0);
        floatX *clean = test_tensor(n, 4, 1.0), *caches = test_tensor(n, 5, 1.0);
        expect(!has_nan(x, n), "finds a NaN where there is none");
        x[i] = f32_to_floatX(NAN);
        int row = (int)i / C;
        CPU_OPS.embedding_forward(y, tokens, x, BT, C);
        expect(has_nan(y + row * C, C), "embedding loses a NaN");
        CPU_OPS.rmsnorm_forward(y, sums, x, clean, BT, C, 1e-5f);
        expect(has_nan(y + row * C, C), "rmsnorm loses a NaN");
        CPU_OPS.rmsnorm_backward(y, real_f32(sums), x, NULL, clean, clean, stats, BT, C);
        expect(has_nan(y + row * C, C) && isnan(sums[i % C]), "rmsnorm backward loses a NaN");
        CPU_OPS.add(y, x, clean, n);
        expect(has_nan(y + i, 1), "add loses a NaN");
        memcpy(y, x, n * sizeof(floatX));
        CPU_OPS.rope(y, table, s, 0, 0);
        expect(has_nan(y, n), "rope loses a NaN");
        CPU_OPS.attention_forward(y, stats, x, s);
        expect(i >= (size_t)BT * 48 || has_nan(y, (size_t)BT * 16), "attention loses a NaN");
        CPU_OPS.attention_cached(z, caches, caches + n / 2, x, s, 0);
        expect(i >= (size_t)BT * 48 || has_nan(z, (size_t)BT * 16), "cached attention loses a NaN");
        stats[0] = stats[1] = stats[2] = stats[3] = 1.0f;
        CPU_OPS.attention_backward(y, x, clean, clean, stats, s);
        expect(i >= (size_t)BT * 16 || has_nan(y, (size_t)BT * 48), "attention backward loses a NaN");
        CPU_OPS.swiglu_forward(y, MXINT8_NONE, x, BT, C / 2);
        expect(has_nan(y + row * C / 2, C / 2), "swiglu loses a NaN");
        CPU_OPS.swiglu_backward(y, clean, x, MXINT8_NONE, BT, C / 2);
        expect(has_nan(y + row * C, C), "swiglu backward loses a NaN");
        memcpy(y, x, n * sizeof(floatX));
        CPU_OPS.crossentropy(sums, y, tokens, BT, C, 1.0f, 1);
        expect(isnan(sums[row]) && has_nan(y + row * C, C), "crossentropy loses a NaN");
        const QuantSpec specs[] = {TEST_QUEST, TEST_ABSMAX(ROTATE_SIGNED, ROUND_NEAREST),
                                   TEST_ABSMAX(ROTATE_SIGNED, ROUND_STOCHASTIC)};
        for (int k = 0; k < 3; k++) {
            QTensor a = quantize_op(&specs[k], BT, C, x, 0, 1), b = quantize_op(&specs[k], BT, C, clean, 0, 1);
            GemmArgs args = {.out = real_floatX(y), .accumulate = 0, .a = &a, .b = &b, .alpha = 1.0f};
            CPU_OPS.gemm(&args);
            expect(has_nan(y + row * BT, BT), "quantization and product lose a NaN");
            test_qtensor_free(&a);
            test_qtensor_free(&b);
        }
        memcpy(y, x, n * sizeof(floatX));
        CPU_OPS.unrotate(real_floatX(y), NULL, NULL, BT, C);
        expect(has_nan(y + i / GROUP * GROUP, GROUP), "unrotate loses a NaN");
        sums[0] = NAN;
        StepControl control = test_control(1.0f, 0.9, 0.9, 1);
        AdamwArgs adamw = {.param = y, .master = weights, .m = real_f32(zeros), .v = real_f32(zeros),
                           .grad = real_f32(sums), .first = 0, .count = 1, .beta1 = 0.9f, .beta2 = 0.9f, .eps = 1.0f,
                           .weight_decay = 0.0f, .seed = 1, .control = &control};
        CPU_OPS.adamw(&adamw);
        double squares;
        CPU_OPS.sum_squares(&squares, real_f32(sums), 256);
        expect(isnan(squares) && isnan(weights[0]) && has_nan(y, 1),
               "adamw or sum_squares lose a NaN");
        weights[0] = zeros[0] = 0.0f;
        test_free(x, y, z, clean, caches);
    }
}

// all results of a few operations, one behind the other; returns their number of bytes
static size_t threaded_results(uint8_t* out, const floatX* x, size_t n, const float* x32) {
    const AttentionShape s = {2, 65, 4, 2, 16};  // qkv 2 * 65 * 128
    const int rows = 130, C = 128;
    uint8_t* at = out;
    floatX *y = (floatX*)malloc_or_die(n * sizeof(floatX), "test"),
        *y2 = (floatX*)malloc_or_die(n * sizeof(floatX), "test");
    float *stats = (float*)calloc_or_die(n * sizeof(float), "test"),
        *sums = (float*)calloc_or_die(n * sizeof(float), "test");
    double squares;
    CPU_OPS.sum_squares(&squares, real_f32((float*)x32), n);
    CPU_OPS.rmsnorm_forward(y, stats, x, x, rows, C, 1e-5f);
    CPU_OPS.rmsnorm_backward(y2, real_f32(sums), y, x, x, x, stats, rows, C);
    const void* parts[] = {y, y2, stats, sums, &squares};
    const size_t sizes[] = {(size_t)rows * C * sizeof(floatX), (size_t)rows * C * sizeof(floatX), rows * 4, C * 4, 8};
    for (int i = 0; i < 5; i++) {
        memcpy(at, parts[i], sizes[i]);
        at += sizes[i];
    }
    CPU_OPS.attention_forward(y, stats, x, s);
    memcpy(at, y, (size_t)rows * 64 * sizeof(floatX)), at += (size_t)rows * 64 * sizeof(floatX);
    CPU_OPS.attention_backward(y2, x, y, x, stats, s);
    memcpy(at, y2, (size_t)rows * C * sizeof(floatX)), at += (size_t)rows * C * sizeof(floatX);
    const QuantSpec spec = TEST_ABSMAX(ROTATE_SIGNED, ROUND_STOCHASTIC);
    QTensor q = quantize_op(&spec, rows * 8, C, x, 0, 1);
    GemmArgs args = {.out = real_f32(sums), .accumulate = 1, .a = &q, .b = &q, .alpha = 1.0f};
    CPU_OPS.gemm(&args);  // 1040 x 1040: five tiles by three
    memcpy(at, sums, (size_t)rows * 8 * rows * 8 * 4), at += (size_t)rows * 8 * rows * 8 * 4;
    test_qtensor_free(&q);
    test_free(y, y2, stats, sums);
    return (size_t)(at - out);
}

static void test_ops_threads(void) {
    const size_t n = 1040 * 1040;
    floatX* x = test_tensor(n, 1, 1.0);
    float* x32 = (float*)malloc_or_die(n * sizeof(float), "test");
    uint8_t* results[3];
    size_t bytes = 0;
    int threads = cpu_threads();
    for (size_t i = 0; i < n; i++) {
        x32[i] = floatX_to_f32(x[i]) * (float)(i % 1000);
    }
    for (int k = 0; k < 3; k++) {
        cpu_set_threads(k + 1);
        results[k] = (uint8_t*)calloc_or_die(16 << 20, "test");
        bytes = threaded_results(results[k], x, n, x32);
    }
    cpu_set_threads(threads);
    expect(!memcmp(results[0], results[1], bytes) && !memcmp(results[0], results[2], bytes),
           "results depend on the number of threads");
    results[1][bytes - 1] ^= 1;
    expect(memcmp(results[0], results[1], bytes) != 0, "a planted bit is not seen");
    test_free(x, x32, results[0], results[1], results[2]);
}

static void test_ops(void) {
    test_ops_embedding(1, 2, 1);
    test_ops_embedding(7, 3, 5);
    test_ops_embedding(96, 288, 130);
    test_ops_add(1);
    test_ops_add(1023);
    const int norm_channels[] = {1, 3, 63, 64, 65, 128, 640, 4096};
    for (int i = 0; i < 8; i++) {
        test_ops_rmsnorm(i % 3 == 0 ? 1 : i % 3 == 1 ? 5 : 33, norm_channels[i], i % 2 ? 1.0 : 3e-3);
    }
    test_ops_rope((AttentionShape){1, 1, 1, 1, 2}, 0);
    test_ops_rope((AttentionShape){2, 5, 3, 1, 6}, 0);
    test_ops_rope((AttentionShape){1, 33, 4, 2, 16}, 7);
    test_ops_rope((AttentionShape){1, 512, 2, 1, 128}, 0);
    test_ops_swiglu(1, 1, 1.0);
    test_ops_swiglu(5, 33, 2.0);
    test_ops_swiglu(3, 1792, 4.0);
    test_ops_swiglu(2, 17, 60.0);
    const int vocabularies[] = {1, 2, 3, 16, 17, 257, 288};
    for (int i = 0; i < 7; i++) {
        test_ops_crossentropy(5, vocabularies[i], 2.0);
        test_ops_crossentropy(3, vocabularies[i], 1e4);
    }
    test_ops_crossentropy(2, 32000, 3.0);
    test_ops_exp();
    test_ops_attention();
    const int shapes[][3] = {{1, 1, 32}, {3, 5, 32}, {33, 1, 96}, {1, 65, 64}, {257, 513, 64}, {128, 96, 640}};
    for (int i = 0; i < 6 * TEST_OPERANDS * TEST_OPERANDS; i++) {
        const int* shape = shapes[i / 9];
        test_ops_gemm((TestOperand)(i % 3), (TestOperand)(i / 3 % 3), shape[0], shape[1], shape[2]);
    }
    for (int i = 0; i < 4; i++) {
        test_ops_gemm((TestOperand)(i % 2), (TestOperand)(i / 2), 7, 9, 31);
        test_ops_gemm((TestOperand)(i % 2), (TestOperand)(i / 2), 1, 1, 1);
    }
    test_ops_unrotate(1, 32);
    test_ops_unrotate(33, 96);
    test_ops_nan();
    test_ops_threads();
}
