// linear.h: tests of llmc/linear.h and of the recipe table (section linear).
//
//   golden       the quartet layer of dev/ref/golden/quartet.safetensors: six operands bit for bit given its sign
//                words, and the three products; built from the tile functions, ops->gemm and ops->unrotate
//   composition  linear_forward, linear_backward, linear_finish_gradient against the literal f64 composition of
//                Algorithm 1, the sign words and random bits taken from Philox here
//   unbiased     with stochastic rounding the mean over 10,000 seeds of dX and dW is the product of the unrounded
//                operands
#pragma once
#include "quant.h"

#define TEST_ROTATION_ROUNDINGS 6.0  // five sums and a factor

static double* test_decoded(const QTensor* q) {
    double* x = test_zeros((size_t)q->rows * q->cols);
    for (int i = 0; i < q->rows * q->cols; i++) {
        x[i] = (double)qtensor_decode(q, i / q->cols, i % q->cols);
    }
    return x;
}

// value (M, N) += factor * a (M, K) . b (N, K)^T in f64, error += roundings of K terms in f32
static void product_f64(double* value, double* error, const double* a, const double* b, int M, int N, int K,
                        double factor) {
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            double sum = 0.0, squares = 0.0;
            for (int k = 0; k < K; k++) {
                double term = a[(size_t)i * K + k] * b[(size_t)j * K + k];
                sum += term;
                squares += term * term;
            }
            size_t at = (size_t)i * N + j;
            value[at] += factor * sum;
            error[at] += (sqrt((double)K) + 3.0) * F32_ROUNDING * factor * fmax(fabs(sum), sqrt(squares));
        }
    }
}

// value = H (value * mask) in blocks of 32, by the matrix; the errors of a block's elements are independent
static void unrotate_f64(double* value, double* error, const uint32_t* mask, size_t n) {
    for (size_t g = 0; g < n / GROUP; g++) {
        double x[GROUP], squares = 0.0, size = 0.0;
        for (int k = 0; k < GROUP; k++) {
            int on = !mask || (mask[g] >> k & 1u);
            x[k] = on ? value[g * GROUP + k] : 0.0;
            squares += on ? error[g * GROUP + k] * error[g * GROUP + k] : 0.0;
            size += x[k] * x[k];
        }
        for (int i = 0; i < GROUP; i++) {
            double sum = 0.0;
            for (int k = 0; k < GROUP; k++) {
                sum += __builtin_popcount((unsigned)(i & k)) % 2 ? -x[k] : x[k];
            }
            value[g * GROUP + i] = sum / sqrt(32.0);
            error[g * GROUP + i] = sqrt(squares / 32.0) + TEST_ROTATION_ROUNDINGS * F32_ROUNDING * sqrt(size / 32.0);
        }
    }
}

static void near_want_all(Near* near, const double* want, const double* error) {
    for (size_t i = 0; i < near->n; i++) {
        near_want_error(near, i, want[i], error[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// golden

static void golden_expect_operand(const SafetensorsFile* file, const char* prefix, const char* mask_name,
                                  const QTensor* got) {
    char name[64];
    int rows, bytes;
    QTensor want = *got;
    snprintf(name, sizeof name, "linear.%s_codes", prefix);
    want.codes = (uint8_t*)golden_read(file, name, SAFETENSORS_U8, &rows, &bytes);
    check(rows == got->rows && bytes * 2 == got->cols, "the shape of '%s'", name);
    snprintf(name, sizeof name, "linear.%s_scales", prefix);
    want.scales = (uint8_t*)golden_read(file, name, SAFETENSORS_U8, NULL, NULL);
    want.mask = mask_name ? (uint32_t*)golden_read(file, mask_name, SAFETENSORS_I32, NULL, NULL) : NULL;
    int row = qtensor_first_difference(&want, got, rows);
    expect(row == -1, "linear.%s: row %d differs from the reference", prefix, row);
    want.codes[(size_t)7 * bytes] ^= 8;
    expect(qtensor_first_difference(&want, got, rows) == 7, "linear.%s: a flipped bit is not seen", prefix);
    free(want.codes);
    free(want.scales);
    free(want.mask);
}

static void golden_expect_product(const SafetensorsFile* file, const char* name, const float* got, const double* error,
                                  size_t n) {
    float* want = (float*)golden_read(file, name, SAFETENSORS_F32, NULL, NULL);
    Near near = near_f32(got, n);
    for (size_t i = 0; i < n; i++) {
        near_want_error(&near, i, (double)want[i], error[i]);
    }
    near_expect(&near, "%s", name);
    free(want);
}

// one backward GEMM: D = a . b^T, then 16/9 and H^T (D * mask)
static void golden_backward(const SafetensorsFile* file, const char* raw_name, const char* name, const QTensor* a,
                            const QTensor* b, const uint32_t* mask) {
    size_t n = (size_t)a->rows * b->rows;
    float* out = (float*)malloc_or_die(n * sizeof(float), "test");
    double *value = test_zeros(n), *error = test_zeros(n), *da = test_decoded(a), *db = test_decoded(b);
    QTensor raw_a = *a, raw_b = *b;
    raw_a.owed = raw_b.owed = 1.0f;
    GemmArgs raw = {.out = real_f32(out), .accumulate = 0, .a = &raw_a, .b = &raw_b, .alpha = 1.0f};
    product_f64(value, error, da, db, a->rows, b->rows, a->cols, 1.0);
    CPU_OPS.gemm(&raw);
    golden_expect_product(file, raw_name, out, error, n);
    GemmArgs owed = {.out = real_f32(out), .accumulate = 0, .a = a, .b = b, .alpha = 1.0f};
    CPU_OPS.gemm(&owed);
    CPU_OPS.unrotate(real_f32(out), mask, NULL, a->rows, b->rows);
    for (size_t i = 0; i < n; i++) {
        value[i] *= 16.0 / 9.0;
        error[i] *= 16.0 / 9.0;
    }
    unrotate_f64(value, error, mask, n);
    golden_expect_product(file, name, out, error, n);
    free(out);
    free(value);
    free(error);
    free(da);
    free(db);
}

static QTensor golden_backward_operand(int rows, int cols, const float* x, int transposed, const int32_t* signs) {
    const QuantSpec spec = TEST_ABSMAX(ROTATE_SIGNED, ROUND_NEAREST);
    QTensor q = test_qtensor(&spec, rows, cols);
    quantize_given(&q, &spec, x, transposed, (const uint32_t*)signs, NULL);
    return q;
}

static void test_linear_golden(void) {
    const int BT = 64, C = 96, OC = 64;
    const QuantSpec quest = TEST_QUEST;
    SafetensorsFile file = golden_open(GOLDEN_QUARTET);
    const char* names[] = {"linear.x", "linear.w", "linear.dy"};
    float* inputs[3];
    floatX* tensors[3];
    for (int i = 0; i < 3; i++) {
        int rows, cols;
        inputs[i] = (float*)golden_read(&file, names[i], SAFETENSORS_F32, &rows, &cols);
        tensors[i] = (floatX*)malloc_or_die((size_t)rows * cols * sizeof(floatX), "test");
        int exact = 1;
        for (int j = 0; j < rows * cols; j++) {
            tensors[i][j] = f32_to_floatX(inputs[i][j]);
            exact &= floatX_to_f32(tensors[i][j]) == inputs[i][j];
        }
        expect(exact, "%s has values that are no bf16", names[i]);
    }
    QTensor x = quantize_op(&quest, BT, C, tensors[0], 0, 0), w = quantize_op(&quest, OC, C, tensors[1], 0, 0);
    golden_expect_operand(&file, "xq", "linear.x_mask", &x);
    golden_expect_operand(&file, "wq", "linear.w_mask", &w);
    double *dx = test_decoded(&x), *dw = test_decoded(&w), *y = test_zeros(BT * OC), *error = test_zeros(BT * OC);
    float out[64 * 64], xf[64 * 96], wf[64 * 96];
    GemmArgs forward = {.out = real_f32(out), .accumulate = 0, .a = &x, .b = &w, .alpha = 1.0f};
    CPU_OPS.gemm(&forward);
    product_f64(y, error, dx, dw, BT, OC, C, 1.0);
    golden_expect_product(&file, "linear.y", out, error, (size_t)BT * OC);
    for (int i = 0; i < 64 * 96; i++) {
        xf[i] = (float)dx[i];
        wf[i] = (float)dw[i];
    }
    int32_t* dx_signs = (int32_t*)golden_read(&file, "linear.dx_signs", SAFETENSORS_I32, NULL, NULL);
    int32_t* dw_signs = (int32_t*)golden_read(&file, "linear.dw_signs", SAFETENSORS_I32, NULL, NULL);
    QTensor dy = golden_backward_operand(BT, OC, inputs[2], 0, dx_signs),
        wt = golden_backward_operand(C, OC, wf, 1, dx_signs);
    QTensor dyt = golden_backward_operand(OC, BT, inputs[2], 1, dw_signs),
        xt = golden_backward_operand(C, BT, xf, 1, dw_signs);
    golden_expect_operand(&file, "dy", NULL, &dy);
    golden_expect_operand(&file, "wt", NULL, &wt);
    golden_expect_operand(&file, "dyt", NULL, &dyt);
    golden_expect_operand(&file, "xt", NULL, &xt);
    golden_backward(&file, "linear.dxq", "linear.dx", &dy, &wt, x.mask);
    golden_backward(&file, "linear.dwq", "linear.dw", &dyt, &xt, w.mask);
    QTensor* operands[] = {&x, &w, &dy, &wt, &dyt, &xt};
    for (int i = 0; i < 6; i++) {
        test_qtensor_free(operands[i]);
    }
    test_free(inputs[0], inputs[1], inputs[2], tensors[0], tensors[1], tensors[2], dx, dw, y, error, dx_signs,
              dw_signs);
    safetensors_close(&file);
}

// ---------------------------------------------------------------------------------------------------------------------
// a layer and all that it needs

typedef struct {
    int BT, C, OC;
    floatX *x, *w, *dy, *y, *dx;
    float* dw;
    LinearContext ctx;
    Linear linear;
    QTensor saved;  // x
    void *w_memory, *x_memory;
} LinearCase;

#define TEST_STEP 17ull
static const uint64_t TEST_POSITION = TEST_STEP;

static LinearCase linear_case_on(const Ops* ops, const char* recipe, Rounding rounding, int BT, int C, int OC) {
    LinearCase c = {};
    c.BT = BT, c.C = C, c.OC = OC;
    c.x = test_tensor((size_t)BT * C, 31, 1.0);
    c.w = test_tensor((size_t)OC * C, 32, 0.05);
    c.dy = test_tensor((size_t)BT * OC, 33, 1e-3);
    c.y = test_tensor((size_t)BT * OC, 34, 1.0);
    c.dx = test_tensor((size_t)BT * C, 35, 1.0);
    const Recipe* r = recipe_find(recipe);
    c.dw = (float*)calloc_or_die((size_t)OC * C * sizeof(float), "test");
    c.ctx.ops = ops;
    c.ctx.carrier = ops->carrier();
    c.linear.recipe = r;
    c.ctx.option_rounding = rounding;
    c.ctx.seed = 4321;
    c.ctx.position = &TEST_POSITION;
    size_t scratch = linear_scratch_bytes(&c.ctx, r, BT, C, OC);
    c.ctx.operand_a = malloc_or_die(scratch, "test");
    c.ctx.operand_b = malloc_or_die(scratch, "test");
    c.ctx.bases = (CarrierBase*)calloc_or_die(sizeof(CarrierBase) * 4 * LINEAR_KINDS * OPERANDS, "test");
    c.linear.kind = LINEAR_GATE_UP;
    c.linear.layer = 3;
    c.linear.C = C;
    c.linear.OC = OC;
    c.linear.weight = c.w;
    c.linear.dweight = real_f32(c.dw);
    c.w_memory = malloc_or_die(linear_weight_bytes(r, C, OC), "test");
    c.x_memory = malloc_or_die(qtensor_bytes(&r->x, BT, C), "test");
    linear_quantize_weight(&c.ctx, &c.linear, c.w_memory);
    linear_forward(&c.ctx, &c.linear, c.y, &c.saved, c.x_memory, c.x, BT);
    return c;
}

static LinearCase linear_case(const char* recipe, Rounding rounding, int BT, int C, int OC) {
    return linear_case_on(&CPU_OPS, recipe, rounding, BT, C, OC);
}

static void linear_case_free(LinearCase* c) {
    test_free(c->ctx.bases, c->x, c->w, c->dy, c->y, c->dx, c->dw, c->ctx.operand_a, c->ctx.operand_b, c->w_memory, c->x_memory);
}

// ---------------------------------------------------------------------------------------------------------------------
// the literal composition

// A backward operand (rows, cols) of x (rows, cols), or of (cols, rows) where transposed, decoded; id 2 .. 5 as
// OperandId
static double* composed_operand(const LinearCase* c, int id, int rows, int cols, const double* x, int transposed) {
    const QuantSpec spec = TEST_ABSMAX(ROTATE_SIGNED, c->ctx.option_rounding);
    size_t n = (size_t)rows * cols;
    uint64_t place = (uint64_t)c->linear.layer << 48 | *c->ctx.position;
    uint64_t sign_at = (uint64_t)(c->linear.kind * 8 + id / 2) << 56,
        round_at = (uint64_t)(c->linear.kind * 8 + id) << 56;
    uint32_t* signs = (uint32_t*)malloc_or_die((size_t)cols / GROUP * sizeof(uint32_t), "test");
    uint16_t* random = (uint16_t*)malloc_or_die(n * sizeof(uint16_t), "test");
    float* values = (float*)malloc_or_die(n * sizeof(float), "test");
    for (int b = 0; b < cols / GROUP; b++) {
        signs[b] = philox(c->ctx.seed, sign_at + (uint64_t)b / 4, (uint64_t)RAND_SIGNS << 60 | place).w[b % 4];
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t word = philox(c->ctx.seed, round_at + i / 8, (uint64_t)RAND_ROUND << 60 | place).w[i % 8 / 2];
        random[i] = (uint16_t)(word >> i % 2 * 16);
        values[i] = (float)x[i];
    }
    QTensor q = test_qtensor(&spec, rows, cols);
    quantize_given(&q, &spec, values, transposed, signs, spec.rounding == ROUND_STOCHASTIC ? random : NULL);
    double* decoded = test_decoded(&q);
    test_qtensor_free(&q);
    free(signs);
    free(random);
    free(values);
    return decoded;
}

// the composed gradients of the current micro-batch, in rotated space; dx =, dw +=
static void composed_backward(const LinearCase* c, double* dx, double* dx_error, double* dw, double* dw_error,
                              const double* x, const double* w, const double* dy) {
    int BT = c->BT, C = c->C, OC = c->OC;
    size_t n = (size_t)BT * C;
    double *a = composed_operand(c, 2, BT, OC, dy, 0), *b = composed_operand(c, 3, C, OC, w, 1);
    memset(dx, 0, n * sizeof(double));
    memset(dx_error, 0, n * sizeof(double));
    product_f64(dx, dx_error, a, b, BT, C, OC, 16.0 / 9.0);
    for (size_t i = 0; i < n; i++) {
        dx_error[i] += (double)FLOATX_EPSILON * fabs(dx[i]);  // stored, then turned back
    }
    free(a);
    free(b);
    a = composed_operand(c, 4, OC, BT, dy, 1);
    b = composed_operand(c, 5, C, BT, x, 1);
    product_f64(dw, dw_error, a, b, OC, C, BT, 16.0 / 9.0);
    free(a);
    free(b);
}

// ops: a backend on the host
static void test_linear_quartet(const Ops* ops, Rounding rounding, int BT, int C, int OC) {
    LinearCase c = linear_case_on(ops, "quartet", rounding, BT, C, OC);
    const char* name = rounding == ROUND_NEAREST ? "rtn" : "sr";
    size_t nx = (size_t)BT * C, nw = (size_t)OC * C, ny = (size_t)BT * OC;
    const QuantSpec quest = TEST_QUEST;
    QTensor xq = quantize_op(&quest, BT, C, c.x, 0, 0), wq = quantize_op(&quest, OC, C, c.w, 0, 0);
    expect_same_operand(&xq, &c.saved, "the saved x is not quest(x)");
    expect_same_operand(&wq, &c.linear.w, "the weight is not quest(w)");
    double *x = test_decoded(&xq), *w = test_decoded(&wq), *dy = test_double(c.dy, ny), *y = test_zeros(ny),
        *y_error = test_zeros(ny);
    double *dx = test_zeros(nx), *dx_error = test_zeros(nx), *dw = test_zeros(nw), *dw_error = test_zeros(nw);
    product_f64(y, y_error, x, w, BT, OC, C, 1.0);
    Near near = near_floatX(c.y, ny);
    near_want_all(&near, y, y_error);
    near_expect(&near, "quartet %s y, %d %d %d", name, BT, C, OC);
    for (int micro = 0; micro < 2; micro++) {
        uint64_t position = (uint64_t)micro << 32 | TEST_STEP;
        c.ctx.position = &position;
        linear_backward(&c.ctx, &c.linear, c.dx, c.dy, &c.saved, BT);
        composed_backward(&c, dx, dx_error, dw, dw_error, x, w, dy);
    }
    unrotate_f64(dx, dx_error, xq.mask, nx);
    near = near_floatX(c.dx, nx);
    near_want_all(&near, dx, dx_error);
    near_expect(&near, "quartet %s dx, %d %d %d", name, BT, C, OC);
    linear_finish_gradient(&c.ctx, &c.linear);
    unrotate_f64(dw, dw_error, wq.mask, nw);
    near = near_f32(c.dw, nw);
    near_want_all(&near, dw, dw_error);
    near_expect(&near, "quartet %s dw, %d %d %d", name, BT, C, OC);
    // planted: the composition with the signs of another micro-batch
    const uint64_t elsewhere = 2ull << 32 | TEST_STEP;
    c.ctx.position = &elsewhere;
    composed_backward(&c, dx, dx_error, dw, dw_error, x, w, dy);
    unrotate_f64(dx, dx_error, xq.mask, nx);
    near = near_floatX(c.dx, nx);
    near_want_all(&near, dx, dx_error);
    near_expect_far(&near, "signs of another micro-batch");
    test_free(x, w, dy, y, y_error, dx, dx_error, dw, dw_error);
    test_qtensor_free(&xq);
    test_qtensor_free(&wq);
    linear_case_free(&c);
}

static double* transposed_f64(const double* x, int rows, int cols) {
    double* y = test_zeros((size_t)rows * cols);
    for (int i = 0; i < rows * cols; i++) {
        y[(size_t)(i % cols) * rows + i / cols] = x[i];
    }
    return y;
}

// the bf16 recipe: any shape, also odd ones
static void test_linear_dense(int BT, int C, int OC) {
    LinearCase c = linear_case("bf16", ROUND_NEAREST, BT, C, OC);
    size_t nx = (size_t)BT * C, nw = (size_t)OC * C, ny = (size_t)BT * OC;
    double *x = test_double(c.x, nx), *w = test_double(c.w, nw), *dy = test_double(c.dy, ny);
    double *xt = transposed_f64(x, BT, C), *wt = transposed_f64(w, OC, C), *dyt = transposed_f64(dy, BT, OC);
    double *value = test_zeros(nx + nw + ny), *error = test_zeros(nx + nw + ny);
    linear_backward(&c.ctx, &c.linear, c.dx, c.dy, &c.saved, BT);
    linear_backward(&c.ctx, &c.linear, c.dx, c.dy, &c.saved, BT);  // dweight accumulates, dinp does not
    linear_finish_gradient(&c.ctx, &c.linear);
    product_f64(value, error, x, w, BT, OC, C, 1.0);
    product_f64(value + ny, error + ny, dy, wt, BT, C, OC, 1.0);
    product_f64(value + ny + nx, error + ny + nx, dyt, xt, OC, C, BT, 2.0);
    Near near[3] = {near_floatX(c.y, ny), near_floatX(c.dx, nx), near_f32(c.dw, nw)};
    near_want_all(&near[0], value, error);
    near_want_all(&near[1], value + ny, error + ny);
    near_want_all(&near[2], value + ny + nx, error + ny + nx);
    for (int i = 0; i < 3; i++) {
        near_expect(&near[i], "bf16 %s, %d %d %d", i == 0 ? "y" : i == 1 ? "dx" : "dw", BT, C, OC);
    }
    test_free(x, w, dy, xt, wt, dyt, value, error);
    linear_case_free(&c);
}

// signs are fresh for every seed, step, micro-batch, layer, linear layer and GEMM
static void test_linear_fresh_signs(void) {
    LinearCase c = linear_case("quartet", ROUND_NEAREST, 32, 64, 32);
    void* memory = malloc_or_die(qtensor_bytes(&c.linear.recipe->dy, 32, 32), "test");
    QTensor base = linear_operand(&c.ctx, OPERAND_DY, &c.linear, NULL, memory, 32, 32, c.dy, NULL, 0, NULL);
    for (int change = 0; change < 7; change++) {
        LinearContext ctx = c.ctx;
        Linear linear = c.linear;
        ctx.seed += change == 1;
        uint64_t position = *c.ctx.position + (change == 2) + ((uint64_t)(change == 3) << 32);
        ctx.position = &position;
        linear.layer += change == 4;
        linear.kind = change == 5 ? LINEAR_DOWN : linear.kind;
        OperandId id = change == 6 ? OPERAND_DYT : OPERAND_DY;
        QTensor other = linear_operand(&ctx, id, &linear, NULL, ctx.operand_a, 32, 32, c.dy, NULL, 0, NULL);
        int same = qtensor_first_difference(&base, &other, 32) == -1;
        expect(same == (change == 0), "signs: change %d gives %s operand", change, same ? "the same" : "another");
    }
    free(memory);
    linear_case_free(&c);
}

// ---------------------------------------------------------------------------------------------------------------------
// unbiasedness. In rotated space, before the mask: dX is to be dY . decode(Wq), dW = dY^T . decode(Xq). Of n elements,
// n times 6.3e-5 lie outside 4 standard errors and none outside 6 (2e-9); a Poisson number of mean m exceeds m + 4
// sqrt(m) + 4 about never.

#define UNBIASED_SEEDS 10000

static void unrotate_nothing(RealArray, const uint32_t*, const float*, int, int) {}

typedef struct { size_t n, beyond4, beyond6; double mean_square; } Deviations;

static Deviations deviations_of(const double* sum, const double* squares, const double* want, size_t n, double bias) {
    Deviations d = {n, 0, 0, 0.0};
    for (size_t i = 0; i < n; i++) {
        double mean = sum[i] / UNBIASED_SEEDS, variance = squares[i] / UNBIASED_SEEDS - mean * mean;
        double z = (mean - want[i] * (1.0 + bias)) / sqrt(variance / UNBIASED_SEEDS);
        d.beyond4 += !(fabs(z) <= 4.0);
        d.beyond6 += !(fabs(z) <= 6.0);
        d.mean_square += z * z / (double)n;
    }
    return d;
}

// the squares average 1 within 5 deviations of as many squared normals as there are rounded numbers on either side
static int deviations_fit(Deviations d, double rounded) {
    double expected = (double)d.n * 6.334e-5;
    return d.beyond6 == 0 && (double)d.beyond4 <= expected + 4.0 * sqrt(expected) + 4.0 &&
           fabs(d.mean_square - 1.0) <= 5.0 * sqrt(2.0 / rounded);
}

// sums over the seeds of dX (BT, C) and then dW (OC, C), and of their squares
static void unbiased_sums(Rounding rounding, double* sum, double* squares, double* want) {
    const int BT = 32, C = 64, OC = 32;
    LinearCase c = linear_case("quartet", rounding, BT, C, OC);
    Ops ops = CPU_OPS;
    ops.unrotate = unrotate_nothing;
    c.ctx.ops = &ops;
    size_t nx = (size_t)BT * C, nw = (size_t)OC * C;
    double *x = test_decoded(&c.saved), *w = test_decoded(&c.linear.w), *dy = test_double(c.dy, (size_t)BT * OC);
    double *xt = transposed_f64(x, BT, C), *wt = transposed_f64(w, OC, C), *dyt = transposed_f64(dy, BT, OC);
    double* ignored = test_zeros(nx + nw);
    product_f64(want, ignored, dy, wt, BT, C, OC, 1.0);
    product_f64(want + nx, ignored + nx, dyt, xt, OC, C, BT, 1.0);
    for (int seed = 0; seed < UNBIASED_SEEDS; seed++) {
        c.ctx.seed = (uint64_t)seed;
        memset(c.dw, 0, nw * sizeof(float));
        linear_backward(&c.ctx, &c.linear, c.dx, c.dy, &c.saved, BT);
        for (size_t i = 0; i < nx + nw; i++) {
            double value = i < nx ? (double)floatX_to_f32(c.dx[i]) : (double)c.dw[i - nx];
            sum[i] += value;
            squares[i] += value * value;
        }
    }
    test_free(x, w, dy, xt, wt, dyt, ignored);
    linear_case_free(&c);
}

static void test_linear_unbiased(void) {
    const size_t n = 32 * 64;
    double *sum = test_zeros(2 * n), *squares = test_zeros(2 * n), *want = test_zeros(2 * n);
    int threads = cpu_threads();
    cpu_set_threads(1);  // the products are small
    unbiased_sums(ROUND_STOCHASTIC, sum, squares, want);
    for (size_t part = 0; part < 2; part++) {
        const char* name = part ? "dW" : "dX";
        size_t at = part * n;
        Deviations d = deviations_of(sum + at, squares + at, want + at, n, 0.0);
        expect(deviations_fit(d, 32 * 32), "%s is biased: %zu beyond 4, %zu beyond 6 standard errors, mean square %.3f",
               name, d.beyond4, d.beyond6, d.mean_square);
        Deviations biased = deviations_of(sum + at, squares + at, want + at, n, 0.01);
        expect(!deviations_fit(biased, 32 * 32), "%s: a bias of 1 %% is not seen: %zu beyond 4", name, biased.beyond4);
    }
    // planted: rounding to nearest is biased, and only slightly
    memset(sum, 0, 2 * n * sizeof(double));
    memset(squares, 0, 2 * n * sizeof(double));
    memset(want, 0, 2 * n * sizeof(double));
    unbiased_sums(ROUND_NEAREST, sum, squares, want);
    Deviations nearest = deviations_of(sum, squares, want, 2 * n, 0.0);
    expect(!deviations_fit(nearest, 32 * 32),
           "the bias of rounding to nearest is not seen: %zu beyond 4, %zu beyond 6, %.3f", nearest.beyond4,
           nearest.beyond6, nearest.mean_square);
    cpu_set_threads(threads);
    free(sum);
    free(squares);
    free(want);
}

// ---------------------------------------------------------------------------------------------------------------------
// the table of recipes: our rows are sound, bad rows are named, and rows that later recipes need can be written

#define TEST_SPEC(format_, scale_, rotation_, rounding_, group_, source_) \
    {.format = format_, .scale = scale_, .rotation = rotation_, .rounding = rounding_, .group = group_, \
     .source = source_}
#define TEST_E4M3 TEST_SPEC(FORMAT_E4M3, SCALE_TENSOR_ABSMAX, ROTATE_NONE, ROUND_NEAREST, 0, SOURCE_TENSOR)
#define TEST_E5M2 TEST_SPEC(FORMAT_E5M2, SCALE_TENSOR_ABSMAX, ROTATE_NONE, ROUND_NEAREST, 0, SOURCE_TENSOR)
#define TEST_MXFP4 TEST_SPEC(FORMAT_MXFP4, SCALE_ABSMAX, ROTATE_NONE, ROUND_NEAREST, 32, SOURCE_TENSOR)
#define TEST_DENSE TEST_SPEC(FORMAT_FLOATX, SCALE_NONE, ROTATE_NONE, ROUND_NEAREST, 0, SOURCE_TENSOR)
#define TEST_NVFP4(rotation_, rounding_, source_) \
    TEST_SPEC(FORMAT_NVFP4, SCALE_ABSMAX_UE4M3, rotation_, rounding_, 16, source_)

static void test_linear_recipes(void) {
    const Recipe later[] = {
        {.name = "fp8", .what = "", .x = TEST_E4M3, .w = TEST_E4M3, .dy = TEST_E5M2, .wt = TEST_E4M3, .dyt = TEST_E5M2,
         .xt = TEST_E4M3, .x_grad = GRAD_STRAIGHT, .w_grad = GRAD_STRAIGHT, .outlier_quantile = 0},
        {.name = "msfp4", .what = "", .x = TEST_MXFP4, .w = TEST_MXFP4, .dy = TEST_DENSE, .wt = TEST_DENSE,
         .dyt = TEST_DENSE, .xt = TEST_DENSE, .x_grad = GRAD_STRAIGHT, .w_grad = GRAD_DGE, .outlier_quantile = 0.99f},
        {.name = "quartet2", .what = "", .x = TEST_NVFP4(ROTATE_NONE, ROUND_NEAREST, SOURCE_TENSOR),
         .w = TEST_NVFP4(ROTATE_NONE, ROUND_NEAREST, SOURCE_TENSOR),
         .dy = TEST_NVFP4(ROTATE_SIGNED, ROUND_STOCHASTIC, SOURCE_TENSOR),
         .wt = TEST_NVFP4(ROTATE_SIGNED, ROUND_STOCHASTIC, SOURCE_SAVED),
         .dyt = TEST_NVFP4(ROTATE_SIGNED, ROUND_STOCHASTIC, SOURCE_TENSOR),
         .xt = TEST_NVFP4(ROTATE_SIGNED, ROUND_STOCHASTIC, SOURCE_SAVED),
         .x_grad = GRAD_STRAIGHT, .w_grad = GRAD_STRAIGHT, .outlier_quantile = 0},
    };
    for (int i = 0; i < RECIPE_COUNT; i++) {
        const char* fault = recipe_fault(&RECIPES[i]);
        expect(!fault && recipe_find(RECIPES[i].name) == &RECIPES[i], "recipe %s: %s", RECIPES[i].name, fault);
    }
    for (size_t i = 0; i < sizeof later / sizeof later[0]; i++) {
        expect(!recipe_fault(&later[i]), "recipe %s: %s", later[i].name, recipe_fault(&later[i]));
    }
    expect(!recipe_find("quartet3"), "a recipe that does not exist");
    const Recipe quartet = *recipe_find("quartet"), bf16_recipe = *recipe_find("bf16");
    Recipe bad[10];
    for (int i = 0; i < 10; i++) {
        bad[i] = quartet;
    }
    bad[0].wt.rotation = ROTATE_NONE;
    bad[1].w.format = FORMAT_FLOATX;
    bad[2].dy.source = SOURCE_SAVED;
    bad[3] = bf16_recipe, bad[3].wt.source = SOURCE_SAVED;
    bad[4].xt.source = SOURCE_TENSOR;
    bad[5].x.scale = SCALE_ABSMAX;
    bad[6].w.group = 16;
    bad[7] = later[2], bad[7].xt.group = 32;
    bad[8].x.source = SOURCE_SAVED;
    bad[9] = later[0], bad[9].x.group = 32;
    const char* words[10] = {"rotation", "only one operand", "only wt and xt", "not quantized", "different spaces",
                             "trust mask", "groups", "groups", "only wt and xt", "groups"};
    for (int i = 0; i < 10; i++) {
        const char* fault = recipe_fault(&bad[i]);
        expect(fault && strstr(fault, words[i]), "planted bad row %d: '%s'", i, fault ? fault : "no fault");
    }
    for (int id = 0; id < 6; id++) {
        const QuantSpec* specs[] = {&quartet.x, &quartet.w, &quartet.dy, &quartet.wt, &quartet.dyt, &quartet.xt};
        expect(CPU_OPS.quantize_supports(specs[id]), "operand %d of quartet is not supported", id);
    }
    QuantSpec by_row = later[0].x;
    by_row.scale = SCALE_ROW_ABSMAX;
    expect(!CPU_OPS.quantize_supports(&by_row) && !CPU_OPS.quantize_supports(&later[2].x),
           "claims a quantizer it lacks");
}

static void test_linear(void) {
    test_linear_recipes();
    test_linear_golden();
    const int BT[] = {32, 64, 96}, C[] = {32, 64, 160}, OC[] = {32, 96};
    for (int i = 0; i < 18; i++) {
        test_linear_quartet(&CPU_OPS, ROUND_NEAREST, BT[i % 3], C[i / 3 % 3], OC[i / 9]);
        test_linear_quartet(&CPU_OPS, ROUND_STOCHASTIC, BT[i % 3], C[i / 3 % 3], OC[i / 9]);
    }
    test_linear_dense(1, 1, 1);
    test_linear_dense(3, 5, 7);
    test_linear_dense(33, 64, 130);
    test_linear_dense(64, 640, 256);
    test_linear_fresh_signs();
    test_linear_unbiased();
}
