// fp8.h: the fp8 recipe: codes and base of a tensor against their definition, the three products against f64.
#pragma once
#include "linear.h"

// code by code, and the base: the largest value lies in the format's top four octaves
static void test_fp8_tensor(Format format, double scale, int transposed, int faults) {
    const int rows = 33, cols = 96;
    const size_t n = (size_t)rows * cols;
    floatX* x = test_tensor(n, 17, scale);
    float largest = 0.0f;
    for (size_t i = 0; i < n; i++) {
        x[i] = faults && i % 997 == 5 ? f32_to_floatX(i % 2 ? INFINITY : NAN) : x[i];
        float magnitude = fabsf(floatX_to_f32(x[i]));
        largest = isfinite(magnitude) && magnitude > largest ? magnitude : largest;
    }
    QuantSpec spec = {.format = format, .scale = SCALE_TENSOR_ABSMAX, .rotation = ROTATE_NONE,
                      .rounding = ROUND_NEAREST, .group = 0, .source = SOURCE_TENSOR};
    CarrierBase base = {}, saved_base = {};
    QTensor q = qtensor_at(&spec, rows, cols, malloc_or_die(n, "test"));
    q.base = &base;
    QuantizeArgs args = {.out = &q, .spec = spec, .tensor = x, .saved = NULL, .transposed = transposed, .seed = 0,
                         .sign_stream = 0, .sign_index = 0, .round_stream = 0, .round_index = 0, .position = NULL,
                         .stats = NULL,
                         .row_under = NULL, .again = 0};
    CPU_OPS.quantize(&args);
    double top = format == FORMAT_E4M3 ? 448.0 : 57344.0, scaled = (double)largest / (double)base.scale;
    expect(scale == 0.0 || (scaled <= top && scaled > top / 32.0), "scale %g: the largest value becomes %g", scale,
           scaled);
    expect(base.scale == ldexpf(1.0f, base.base), "the factor is not 2^base");
    int wrong = 0, moved = 0;
    for (size_t i = 0; i < n; i++) {
        size_t from = transposed ? i % cols * rows + i / cols : i;
        float value = floatX_to_f32(x[from]);
        uint8_t want = !isfinite(value)        ? 0x7f
                       : format == FORMAT_E4M3 ? f32_to_e4m3(value / base.scale)
                                               : f32_to_e5m2(value / base.scale);
        wrong += q.codes[i] != want;
        moved += q.codes[i] != (uint8_t)(want ^ 1);
    }
    expect(wrong == 0 && (size_t)moved == n, "%d of %zu codes differ, transposed %d", wrong, n, transposed);
    QTensor back = q;  // the saved operand, transposed
    QuantizeArgs again = args;
    back.rows = cols, back.cols = rows, back.base = &saved_base, back.codes = (uint8_t*)malloc_or_die(n, "test");
    again.out = &back, again.saved = &q, again.spec.source = SOURCE_SAVED, again.tensor = NULL;
    CPU_OPS.quantize(&again);
    wrong = saved_base.base != base.base || saved_base.scale != base.scale;
    for (int row = 0; row < rows; row++) {
        for (int col = 0; col < cols; col++) {
            wrong += back.codes[(size_t)col * rows + row] != q.codes[(size_t)row * cols + col];
        }
    }
    expect(wrong == 0, "the saved operand's bytes are not those of its source");
    test_free(x, q.codes, back.codes);
}

static void test_fp8_linear(int BT, int C, int OC) {
    LinearCase c = linear_case("fp8", ROUND_NEAREST, BT, C, OC);
    size_t nx = (size_t)BT * C, nw = (size_t)OC * C, ny = (size_t)BT * OC;
    CarrierBase base = {};
    QTensor dyq = linear_operand(&c.ctx, OPERAND_DY, &c.linear, NULL, malloc_or_die(ny, "test"), BT, OC, c.dy, NULL, 0,
                                 NULL);
    base = *dyq.base;
    dyq.base = &base;
    double *x = test_decoded(&c.saved), *w = test_decoded(&c.linear.w), *dy = test_decoded(&dyq);
    double *xt = transposed_f64(x, BT, C), *wt = transposed_f64(w, OC, C), *dyt = transposed_f64(dy, BT, OC);
    double *value = test_zeros(nx + nw + ny), *error = test_zeros(nx + nw + ny);
    linear_backward(&c.ctx, &c.linear, c.dx, c.dy, &c.saved, BT);
    linear_backward(&c.ctx, &c.linear, c.dx, c.dy, &c.saved, BT);
    linear_finish_gradient(&c.ctx, &c.linear);
    product_f64(value, error, x, w, BT, OC, C, 1.0);
    product_f64(value + ny, error + ny, dy, wt, BT, C, OC, 1.0);
    product_f64(value + ny + nx, error + ny + nx, dyt, xt, OC, C, BT, 2.0);
    Near near[3] = {near_floatX(c.y, ny), near_floatX(c.dx, nx), near_f32(c.dw, nw)};
    Near planted = near_floatX(c.y, ny);
    near_want_all(&near[0], value, error);
    near_want_all(&near[1], value + ny, error + ny);
    near_want_all(&near[2], value + ny + nx, error + ny + nx);
    for (size_t i = 0; i < ny; i++) {
        value[i] *= 2.0;
    }
    near_want_all(&planted, value, error);
    for (int i = 0; i < 3; i++) {
        near_expect(&near[i], "fp8 %s, %d %d %d", i == 0 ? "y" : i == 1 ? "dx" : "dw", BT, C, OC);
    }
    near_expect_far(&planted, "another base");
    test_free(x, w, dy, xt, wt, dyt, value, error, dyq.codes);
    linear_case_free(&c);
}

static void test_fp8(void) {
    const double scales[] = {1.0, 1e-3, 3e4, 1e-20, 0.0};
    for (int i = 0; i < 5; i++) {
        for (int how = 0; how < 4; how++) {
            test_fp8_tensor(how & 1 ? FORMAT_E4M3 : FORMAT_E5M2, scales[i], how >> 1, i == 0);
        }
    }
    test_fp8_linear(32, 64, 96);
    test_fp8_linear(96, 32, 160);
}
