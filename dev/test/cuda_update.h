// cuda_update.h: section cuda, the end of a step: sums, the decision to skip, AdamW with state in either type.
#pragma once
#include "cuda.h"
#ifdef USE_CUDA

static void cuda_test_loss_sum(size_t n) {
    float* x = test_zero_floats(n);
    uint64_t state = n;
    double begin = 0.75, want = 0.75, absolute = 0.75;
    for (size_t i = 0; i < n; i++) {
        x[i] = i + 1 == n ? 262144.0f : (float)(test_normal(&state) * ldexp(1.0, (int)(i % 40) - 20));
        absolute += fabs((double)x[i]);
    }
    CPU_OPS.loss_sum(&want, x, (int)n);
    const float* dx = (const float*)upload(x, n * sizeof(float));
    Output sum = output_make(&begin, sizeof begin);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.loss_sum((double*)sum.at[run], dx, (int)n);
    }
    double *got = (double*)output_take(&sum, "loss_sum"), allowed = 4.0 * (sqrt((double)n) + 1.0) * ldexp(1.0, -53);
    allowed *= absolute;
    expect(fabs(*got - want) <= allowed, "sum of %zu is %.17g, the CPU's %.17g", n, *got, want);
    expect(fabs(*got + 1.0 - want) > allowed, "a planted error of a sum of %zu is not seen", n);
    release_uploads();
    test_free(x, got);
}

// of the elements from `skipped` on, so that they do not begin on 16 bytes where that is odd. Terms are positive and
// summed in f64; a square may be rounded to f32.
static void cuda_test_sum_squares(size_t n, RealType type, size_t skipped) {
    float* x = test_zero_floats(n + skipped);
    uint64_t state = n;
    for (size_t i = 0; i < n + skipped; i++) {
        double value = test_normal(&state) * ldexp(1.0, (int)(i % 40) - 20);
        x[i] = i < skipped || i + 1 == n + skipped ? 262144.0f : (float)value;
    }
    RealArray reals = test_reals(type, x, n + skipped);
    RealArray device = {type, upload(reals.data, (n + skipped) * real_bytes(type))};
    Output sum = output_make(NULL, sizeof(double));
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.sum_squares((double*)sum.at[run], real_from(device, skipped), n);
    }
    double want, *got = (double*)output_take(&sum, "sum_squares");
    CPU_OPS.sum_squares(&want, real_from(reals, skipped), n);
    double allowed = 2.0 * F32_ROUNDING * want;
    expect(fabs(*got - want) <= allowed, "%zu squares of type %d are %.17g, the CPU's %.17g", n, (int)type, *got, want);
    expect(fabs(*got * 1.000001 - want) > allowed, "a planted error of %zu squares is not seen", n);
    release_uploads();
    test_free(x, reals.data, got);
}

static void cuda_test_decide(double loss, double squares, float clip) {
    StepControl control = test_control(0.5f, 0.9, 0.95, 3);
    control.loss_sum = loss;
    control.grad_squares = squares;
    Output out = output_make(&control, sizeof control);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.step_decide((StepControl*)out.at[run], clip);
    }
    CPU_OPS.step_decide(&control, clip);
    StepControl* got = (StepControl*)output_take(&out, "step_decide");
    int same = got->skip == control.skip && got->lr == control.lr && got->correction2 == control.correction2;
    int scale = !memcmp(&got->grad_scale, &control.grad_scale, sizeof(float));
    expect(same && (scale || control.skip), "decision on loss %g, squares %g, clip %g: skip %d, scale %.9g", loss,
           squares, (double)clip, got->skip, (double)got->grad_scale);
    release_uploads();
    free(got);
}

// errors of the weights before they are rounded, as test_ops_adamw counts them; 0 for the first `pad`
static double* adamw_errors(float* const memory[4], size_t pad, const AdamwArgs* a) {
    const StepControl* control = a->control;
    double* error = test_zeros(a->count + pad);
    for (size_t i = pad; i < a->count + pad; i++) {
        double g = (double)memory[3][i] * (double)control->grad_scale, b1 = a->beta1, b2 = a->beta2;
        double w = fabs((double)memory[0][i]), lr = control->lr;
        double m_size = b1 * fabs((double)memory[1][i]) + (1.0 - b1) * fabs(g);
        double v = b2 * (double)memory[2][i] + (1.0 - b2) * g * g;
        double step_size = m_size / (double)control->correction1 /
                           (sqrt(v / (double)control->correction2) + (double)a->eps);
        error[i] = F32_ROUNDING * (2.0 * w + 10.0 * lr * step_size + 4.0 * lr * (double)a->weight_decay * w);
    }
    return error;
}

// Types and place: elements first ... of the flat buffer, in buffers that begin `pad` elements earlier; where pad is
// not first modulo 8, vectors do not lie on their boundaries.
typedef struct { RealType moments, grad; int master; size_t first, pad; } AdamwKind;

// one unit in the last place of a floatX of that size
static double floatX_unit(double x) {
    int exponent;
    frexp(x, &exponent);
    return ldexp(2.0 * (double)FLOATX_EPSILON, exponent - 1);
}

// Parameters without a master copy: the rounding draws the same bits on both sides, so that a result differs only where
// the f32 values before it, which differ by `error` on each side, lie on different sides of a threshold, of which there
// are 2^16 a unit. Then it is one unit. Twice the expected number of these, and 4, are allowed.
static size_t adamw_other_params(const floatX* got, const floatX* want, const double* error, size_t n,
                                 double* allowed) {
    size_t other = 0;
    *allowed = 4.0;
    for (size_t i = 0; i < n; i++) {
        double x = floatX_to_f32(got[i]), y = floatX_to_f32(want[i]), unit = floatX_unit(fmax(fabs(x), fabs(y)));
        int near = fabs(x - y) <= unit;  // not where one is a NaN
        other += memcmp(got + i, want + i, X_BYTES) ? (near ? 1 : n) : 0;
        *allowed += 2.0 * fmin(1.0, 2.0 * error[i] / unit);
    }
    return other;
}

static void adamw_expect_params(const Output* out, const AdamwArgs* begin, const floatX* want, const double* error,
                                const char* what) {
    size_t n = begin->count, pad = out->bytes / X_BYTES - n;
    if (sizeof(floatX) == sizeof(float)) {  // nothing is drawn
        output_near_x(out, want, error, 0.0, what);
        return;
    }
    double allowed;
    floatX* got = (floatX*)output_take(out, what);
    size_t other = adamw_other_params(got + pad, want + pad, error + pad, n, &allowed);
    expect(!memcmp(got, want, pad * X_BYTES), "%s: writes before its parameters", what);
    expect((double)other <= allowed, "%s: %zu of %zu parameters differ, %.1f allowed", what, other, n, allowed);
    if (n >= 64) {  // the bits of another element are seen
        AdamwArgs moved = *begin;
        moved.first++;
        CPU_OPS.adamw(&moved);
        other = adamw_other_params(got + pad, moved.param, error + pad, n, &allowed);
        expect((double)other > allowed, "%s: random bits of the next element are not seen", what);
    }
    free(got);
}

static void cuda_test_adamw(size_t n, int64_t t, float decay, int skip, AdamwKind kind) {
    const char* what = label("adamw of %zu from %zu, pad %zu, moments %d, grad %d, master %d, t %lld, skip %d", n,
                             kind.first, kind.pad, kind.moments, kind.grad, kind.master, (long long)t, skip);
    const RealType types[] = {kind.master ? REAL_F32 : REAL_FLOATX, kind.moments, kind.moments, kind.grad};
    size_t all = n + kind.pad;
    float* memory[4];  // weight, m, v, grad
    RealArray host[4], again[4];
    for (int k = 0; k < 4; k++) {
        uint64_t state = (uint64_t)k + 1;
        memory[k] = test_zero_floats(all);
        for (size_t i = 0; i < all; i++) {
            double x = test_normal(&state) * (k == 0 ? 1.0 : 1e-2);
            memory[k][i] = t == 1 && (k == 1 || k == 2) ? 0.0f : (float)(k == 2 ? x * x : x);
        }
        host[k] = test_reals(types[k], memory[k], all), again[k] = test_reals(types[k], memory[k], all);
    }
    floatX* param = kind.master ? test_tensor(all, 9, 1.0) : (floatX*)host[0].data;
    StepControl control = test_control(3e-2f, 0.9, 0.95, t);
    control.grad_scale = 0.7f, control.skip = skip;
    AdamwArgs args = {.param = param + kind.pad, .master = kind.master ? (float*)host[0].data + kind.pad : NULL,
                      .m = real_from(host[1], kind.pad), .v = real_from(host[2], kind.pad),
                      .grad = real_from(host[3], kind.pad), .first = kind.first, .count = n, .beta1 = 0.9f,
                      .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = decay, .seed = 77, .control = &control};
    AdamwArgs device = args, begin = args;  // begin: a second copy of the state, which the CPU may use up
    begin.param = (floatX*)again[0].data + kind.pad, begin.m = real_from(again[1], kind.pad);
    begin.v = real_from(again[2], kind.pad);
    Output out[3], out_param = output_make(param, all * X_BYTES);
    for (int k = 0; k < 3; k++) {
        out[k] = output_make(host[k].data, all * real_bytes(types[k]));
    }
    device.grad = real_from(RealArray{kind.grad, upload(host[3].data, all * real_bytes(kind.grad))}, kind.pad);
    device.control = (const StepControl*)upload(&control, sizeof control);
    for (int run = 0; run < 2; run++) {
        device.param = output_x(&out_param, run) + kind.pad;
        device.master = kind.master ? output_f(&out[0], run) + kind.pad : NULL;
        device.m = real_from(output_real(&out[1], run, kind.moments), kind.pad);
        device.v = real_from(output_real(&out[2], run, kind.moments), kind.pad);
        CUDA_OPS.adamw(&device);
    }
    double* error = adamw_errors(memory, kind.pad, &args);
    CPU_OPS.adamw(&args);
    output_same(&out[1], host[1].data, label("%s: m", what));  // rounded operation by operation on both sides
    output_same(&out[2], host[2].data, label("%s: v", what));
    if (skip) {
        output_same(&out_param, param, label("%s: parameter", what));
    } else if (kind.master) {
        output_near_f(&out[0], (float*)host[0].data, error, 0.0, label("%s: master", what));
        float* master = (float*)output_take(&out[0], what);
        for (size_t i = kind.pad; i < all; i++) {
            param[i] = f32_to_floatX(master[i]);
        }
        output_same(&out_param, param, label("%s: parameter", what));
        free(master);
    } else {
        adamw_expect_params(&out_param, &begin, param, error, label("%s: parameter", what));
    }
    release_uploads();
    for (int k = 0; k < 4; k++) {
        test_free(memory[k], host[k].data, again[k].data);
    }
    test_free(error, kind.master ? param : NULL);
}

static void test_cuda_update(void) {
    const size_t counts[] = {1, 3, 4, 1023, 1 << 20, (1 << 20) + 5, 3000001};
    for (int i = 0; i < 7; i++) {
        cuda_test_loss_sum(counts[i]);
        for (int k = 0; k < 4; k++) {
            cuda_test_sum_squares(counts[i], k / 2 ? REAL_FLOATX : REAL_F32, k % 2);
        }
    }
    const double losses[] = {1.0, NAN, INFINITY}, squares[] = {4.0, 0.25, 3.0, NAN, INFINITY};
    for (int i = 0; i < 45; i++) {
        cuda_test_decide(losses[i % 3], squares[i / 3 % 5], i / 15 ? 1.5f - (float)(i / 15) * 0.5f : 0.0f);
    }
    const int64_t updates[] = {1, 2, 10, 1000, 1000000};
    const size_t places[][3] = {{1, 0, 0}, {65536, 0, 0}, {1001, 3, 3}, {1002, 64, 0}, {5, 6, 6}, {1013, 5, 2},
                                {4099, ((size_t)1 << 33) + 5, 5}};  // count, first, pad
    for (int kind = 0; kind < 8; kind++) {
        for (int i = 0; i < 7; i++) {
            AdamwKind k = {kind & 1 ? REAL_FLOATX : REAL_F32, kind & 2 ? REAL_FLOATX : REAL_F32, !(kind & 4),
                           places[i][1], places[i][2]};
            cuda_test_adamw(places[i][0], updates[(i + kind) % 5], i % 2 ? 0.1f : 0.0f, 0, k);
        }
        cuda_test_adamw(1000, 7, 0.1f, 1, (AdamwKind){REAL_F32, REAL_F32, !(kind & 4), 0, 0});
    }
}
#endif
