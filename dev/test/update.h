// update.h: the end of a step: sums, the decision to skip, AdamW, the residual add with its norm.
#pragma once
#include "formats.h"

static float* test_zero_floats(size_t n) { return (float*)calloc_or_die(n * sizeof(float), "test"); }

static void test_ops_sum_squares(size_t n) {
    float* x = (float*)malloc_or_die(n * sizeof(float), "test");
    long double want = 0.0L;
    uint64_t state = n;
    for (size_t i = 0; i < n; i++) {
        x[i] = i + 1 == n ? 262144.0f : (float)(test_normal(&state) * ldexp(1.0, (int)(i % 40) - 20));
        want += (long double)x[i] * (long double)x[i];
    }
    double got, tolerance = 2.0 * (sqrt((double)n) + 1.0) * ldexp(1.0, -53) * (double)want;
    CPU_OPS.sum_squares(&got, real_f32(x), n);
    expect(fabs(got - (double)want) <= tolerance, "sum of %zu squares is %.17g, not %.17Lg", n, got, want);
    x[n - 1] = 262145.0f;
    CPU_OPS.sum_squares(&got, real_f32(x), n);
    expect(fabs(got - (double)want) > tolerance, "the last of %zu elements is not seen", n);
    free(x);
}

static StepControl test_control(float lr, double beta1, double beta2, int64_t t) {
    return (StepControl){.loss_sum = 0.0,
                         .grad_squares = 0.0,
                         .update = (uint64_t)t,
                         .position = 0,
                         .lr = lr,
                         .correction1 = (float)(1.0 - pow(beta1, (double)t)),
                         .correction2 = (float)(1.0 - pow(beta2, (double)t)),
                         .grad_scale = 1.0f,
                         .skip = 0};
}

// clip factor and the decision to skip; a skipped update writes nothing
static void test_ops_step_decide(void) {
    struct { double loss, squares; float clip, scale; int skip;
    } cases[] = {{1.0, 4.0, 1.0f, 0.5f, 0},      {1.0, 0.25, 1.0f, 1.0f, 0}, {1.0, 4.0, 0.0f, 1.0f, 0},
                 {NAN, 1.0, 1.0f, 1.0f, 1},      {1.0, NAN, 1.0f, 1.0f, 1},  {1.0, INFINITY, 1.0f, 0.0f, 1},
                 {INFINITY, 1.0, 1.0f, 1.0f, 1}, {1.0, 1.0, 1.0f, 1.0f, 0}};
    for (int i = 0; i < 8; i++) {
        StepControl control = test_control(1.0f, 0.9, 0.9, 1);
        float losses[3] = {0.25f, (float)cases[i].loss, -0.25f};
        CPU_OPS.loss_sum(&control.loss_sum, losses, 3);
        control.grad_squares = cases[i].squares;
        CPU_OPS.step_decide(&control, cases[i].clip);
        expect(control.skip == cases[i].skip, "case %d: skip is %d", i, control.skip);
        expect(cases[i].skip || (control.grad_scale == cases[i].scale && control.loss_sum == cases[i].loss),
               "case %d: scale %g", i, (double)control.grad_scale);
        float state[4] = {1, 2, 3, 4};
        floatX param = f32_to_floatX(5.0f);
        AdamwArgs args = {.param = &param,
                          .master = &state[0],
                          .m = real_f32(&state[1]),
                          .v = real_f32(&state[2]),
                          .grad = real_f32(&state[3]),
                          .first = 0,
                          .count = 1,
                          .beta1 = 0.9f,
                          .beta2 = 0.9f,
                          .eps = 1.0f,
                          .weight_decay = 0.1f,
                          .seed = 1,
                          .control = &control};
        CPU_OPS.adamw(&args);
        int same = state[0] == 1 && state[1] == 2 && state[2] == 3 && floatX_to_f32(param) == 5.0f;
        expect(same == cases[i].skip, "case %d: a skipped update wrote, or one that was not skipped did not", i);
    }
}

// the residual add and the norm in one are the two operations
static void test_ops_add_rmsnorm(int BT, int C) {
    size_t n = (size_t)BT * C;
    floatX *a = test_tensor(n, 1, 1.0), *b = test_tensor(n, 2, 0.3), *weight = test_tensor((size_t)C, 3, 1.0);
    floatX *sum = test_tensor(n, 4, 0.0), *out = test_tensor(n, 5, 0.0), *sum2 = test_tensor(n, 6, 0.0),
           *out2 = test_tensor(n, 7, 0.0);
    float *rstd = test_zero_floats((size_t)BT), *rstd2 = test_zero_floats((size_t)BT);
    CPU_OPS.add_rmsnorm_forward(sum, out, rstd, a, b, weight, BT, C, 1e-5f);
    CPU_OPS.add(sum2, a, b, n);
    CPU_OPS.rmsnorm_forward(out2, rstd2, sum2, weight, BT, C, 1e-5f);
    expect(!memcmp(sum, sum2, n * sizeof(floatX)) && !memcmp(out, out2, n * sizeof(floatX)) &&
           !memcmp(rstd, rstd2, (size_t)BT * sizeof(float)), "add_rmsnorm %d x %d is not add and rmsnorm", BT, C);
    CPU_OPS.rmsnorm_forward(out2, rstd2, a, weight, BT, C, 1e-5f);
    expect(C == 1 || memcmp(out, out2, n * sizeof(floatX)) != 0,
           "a norm of the wrong tensor is not seen");  // C 1: always 1
    test_free(a, b, weight, sum, out, sum2, out2, rstd, rstd2);
}

static void test_ops_adamw(size_t n, int64_t t, float decay) {
    floatX* param = test_tensor(n, 9, 1.0);
    float* memory[4];  // master, m, v, grad
    for (int k = 0; k < 4; k++) {
        uint64_t state = (uint64_t)k + 1;
        memory[k] = (float*)malloc_or_die(n * sizeof(float), "test");
        for (size_t i = 0; i < n; i++) {
            double x = test_normal(&state) * (k == 0 ? 1.0 : 1e-2);
            memory[k][i] = t == 1 && (k == 1 || k == 2) ? 0.0f : (float)(k == 2 ? x * x : x);
        }
    }
    memory[3][0] = 0.0f;
    const float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, lr = 3e-2f, scale = 0.7f;
    Near near[3] = {near_f32(memory[0], n), near_f32(memory[1], n), near_f32(memory[2], n)},
        wrong = near_f32(memory[2], n);
    for (size_t i = 0; i < n; i++) {
        double w = memory[0][i], m = memory[1][i], v = memory[2][i], g = (double)memory[3][i] * (double)scale, v0 = v;
        double b1 = beta1, b2 = beta2, m_size = b1 * fabs(m) + (1 - b1) * fabs(g);
        m = b1 * m + (1 - b1) * g;
        v = b2 * v + (1 - b2) * g * g;
        double root = sqrt(v / (1 - pow(b2, (double)t))) + (double)eps, correction = 1 - pow(b1, (double)t);
        double step = m / correction / root, step_size = m_size / correction / root;
        near_want_error(&near[0], i, w - (double)lr * step - (double)lr * (double)decay * w,
                        F32_ROUNDING * (fabs(w) * 2.0 + (double)lr * step_size * 10.0 +
                                        4.0 * (double)(lr * decay) * fabs(w)));
        near_want(&near[1], i, m, m_size, 4.0);
        near_want(&near[2], i, v, 0.0, 5.0);
        near_want(&wrong, i, 0.951 * v0 + 0.049 * g * g, 0.0, 5.0);
    }
    StepControl control = test_control(lr, beta1, beta2, t);
    control.grad_scale = scale;
    AdamwArgs args = {.param = param,
                      .master = memory[0],
                      .m = real_f32(memory[1]),
                      .v = real_f32(memory[2]),
                      .grad = real_f32(memory[3]),
                      .first = 0,
                      .count = n,
                      .beta1 = beta1,
                      .beta2 = beta2,
                      .eps = eps,
                      .weight_decay = decay,
                      .seed = 1,
                      .control = &control};
    CPU_OPS.adamw(&args);
    int rounded = 1;
    for (size_t i = 0; i < n; i++) {
        for (int k = 0; k < 3; k++) {
            near[k].got[i] = (double)memory[k][i];
        }
        wrong.got[i] = (double)memory[2][i];
        floatX master = f32_to_floatX(memory[0][i]);
        rounded &= !memcmp(&master, &param[i], sizeof(floatX));
    }
    for (int k = 0; k < 3; k++) {
        near_expect(&near[k], "adamw %s, n %zu, t %lld", k == 0 ? "master" : k == 1 ? "m" : "v", n, (long long)t);
    }
    if (n > 1) {
        near_expect_far(&wrong, "adamw with beta2 .951");
    } else {
        near_free(&wrong);
    }
    expect(rounded, "the parameter is not the rounded master");
    test_free(param, memory[0], memory[1], memory[2], memory[3]);
}

static void test_update(void) {
    const size_t counts[] = {1, 7, 8, 65535, 65536, 65537, 200001};
    for (int i = 0; i < 7; i++) {
        test_ops_sum_squares(counts[i]);
    }
    const int64_t updates[] = {1, 2, 10, 1000, 1000000};
    for (int i = 0; i < 5; i++) {
        test_ops_adamw(i ? 1000 + (size_t)i : 1, updates[i], i % 2 ? 0.1f : 0.0f);
    }
    test_ops_step_decide();
    const int channels[] = {1, 3, 64, 640};
    for (int i = 0; i < 4; i++) {
        test_ops_add_rmsnorm(1 + 4 * i, channels[i]);
    }
}
