// cuda.h: every operation of the CUDA backend against the CPU backend on the same inputs (section cuda).
//
// Each operation runs twice into buffers that hold NaN before: both runs must give the same bits and leave the bytes
// behind the buffer alone. Discrete results and copies are bit-equal to the CPU's. For the rest, each backend may be
// off by the roundings on its path and one store, so the tolerance of formats.h is counted for both. Tensor-core
// attention also rounds P and dS to bf16: one rounding of each term of a sum, hence the root of the sum of the squared
// terms. Without a GPU, or in a build without CUDA, nothing is counted. Here: buffers, comparisons, layers; the update
// follows in cuda_update.h, products, attention and NaN in cuda_products.h, the whole model in cuda_model.h.
#pragma once
#include "ops.h"
#ifdef USE_CUDA

// is there a GPU? The backend is made ready once.
static int cuda_test_begin(const char* section) {
    static const Ops* ops;
    if (cuda_device_count() == 0) {
        printf("skip %s: no NVIDIA GPU is visible\n", section);
        return 0;
    }
    if (!ops) {
        ops = cuda_backend(0);
        ops->reserve((AttentionShape){.B = 2, .T = 384, .NH = 8, .NKV = 1, .HS = 128});  // the largest shape below
    }
    return 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// device buffers; a case gives all of its own back at its end

#define X_BYTES sizeof(floatX)
#define GUARD_BYTES 256
static void* device_buffers[64];
static int device_buffer_count;

static void* upload(const void* host, size_t bytes) {
    check(device_buffer_count < 64, "a case has too many device buffers");
    void* device = CUDA_OPS.alloc(bytes, "test");
    CUDA_OPS.copy_to_device(device, host, bytes);
    device_buffers[device_buffer_count++] = device;
    return device;
}

static void release_uploads(void) {
    CUDA_OPS.synchronize();
    while (device_buffer_count > 0) {
        CUDA_OPS.release(device_buffers[--device_buffer_count]);
    }
}

// what an operation writes: a buffer on the device for each of two runs
typedef struct { char* at[2]; size_t bytes; } Output;

// begins as host, or as NaN where that is NULL; a guard follows
static Output output_make(const void* host, size_t bytes) {
    char* begin = (char*)malloc_or_die(bytes + GUARD_BYTES, "test");
    memset(begin, 0xff, bytes + GUARD_BYTES);
    if (host) {
        memcpy(begin, host, bytes);
    }
    Output out = {.at = {(char*)upload(begin, bytes + GUARD_BYTES), (char*)upload(begin, bytes + GUARD_BYTES)},
                  .bytes = bytes};
    free(begin);
    return out;
}

static floatX* output_x(const Output* out, int run) { return (floatX*)out->at[run]; }
static float* output_f(const Output* out, int run) { return (float*)out->at[run]; }
static RealArray output_real(const Output* out, int run, RealType type) { return RealArray{type, out->at[run]}; }

// one run's output back on the host; the caller frees it
static char* output_take_run(const Output* out, int run, const char* what) {
    char *got = (char*)malloc_or_die(out->bytes + GUARD_BYTES, "test"), guard[GUARD_BYTES];
    memset(guard, 0xff, GUARD_BYTES);
    CUDA_OPS.copy_to_host(got, out->at[run], out->bytes + GUARD_BYTES);
    expect(!memcmp(got + out->bytes, guard, GUARD_BYTES), "%s: writes behind its output", what);
    return got;
}

// that of both, which must be the same; the caller frees it
static void* output_take(const Output* out, const char* what) {
    char* got[2] = {output_take_run(out, 0, what), output_take_run(out, 1, what)};
    expect(!memcmp(got[0], got[1], out->bytes), "%s: two runs give different bits", what);
    free(got[1]);
    return got[0];
}

// ---------------------------------------------------------------------------------------------------------------------
// comparisons. `want` is the CPU's.

// name of a case in messages; good for 15 calls more
static const char* label(const char* format, ...) PRINTF_LIKE(1, 2);
static const char* label(const char* format, ...) {
    static char text[16][128];
    static int turn;
    turn = (turn + 1) % 16;
    va_list args;
    va_start(args, format);
    vsnprintf(text[turn], sizeof text[turn], format, args);
    va_end(args);
    return text[turn];
}

static void expect_bits(char* got, const void* want, size_t bytes, const char* what) {
    expect(!memcmp(got, want, bytes), "%s: not the bits of the CPU", what);
    got[bytes - 1] ^= 1;
    expect(memcmp(got, want, bytes) != 0, "%s: a planted bit is not seen", what);
    got[bytes - 1] ^= 1;
}

static void output_same(const Output* out, const void* want, const char* what) {
    char* got = (char*)output_take(out, what);
    expect_bits(got, want, out->bytes, what);
    free(got);
}

// error of one backend before the store: the given ones (NULL: none), at least `roundings` of the value; both may err
static void near_want_pair(Near* near, size_t i, double want, const double* error, double roundings) {
    double mine = fmax(error ? error[i] : 0.0, roundings * F32_ROUNDING * fabs(want));
    near_want_error(near, i, want, 2.0 * mine + near->store * fabs(want));
}

static void output_near_x(const Output* out, const floatX* want, const double* error, double roundings,
                          const char* what) {
    floatX* got = (floatX*)output_take(out, what);
    Near near = near_floatX(got, out->bytes / X_BYTES);
    for (size_t i = 0; i < near.n; i++) {
        near_want_pair(&near, i, (double)floatX_to_f32(want[i]), error, roundings);
    }
    near_expect(&near, "%s", what);
    free(got);
}

static void output_near_f(const Output* out, const float* want, const double* error, double roundings,
                          const char* what) {
    float* got = (float*)output_take(out, what);
    Near near = near_f32(got, out->bytes / sizeof(float));
    for (size_t i = 0; i < near.n; i++) {
        near_want_pair(&near, i, (double)want[i], error, roundings);
    }
    near_expect(&near, "%s", what);
    free(got);
}

// numbers of either type
static void output_near_real(const Output* out, RealArray want, const double* error, double roundings,
                             const char* what) {
    if (want.type == REAL_F32) {
        output_near_f(out, (const float*)want.data, error, roundings, what);
    } else {
        output_near_x(out, (const floatX*)want.data, error, roundings, what);
    }
}

// on the host: x (n) rounded to that type; x becomes what it holds then. The caller frees .data
static RealArray test_reals(RealType type, float* x, size_t n) {
    RealArray y = {type, calloc_or_die(n * real_bytes(type), "test")};
    for (size_t i = 0; i < n; i++) {
        real_set(y, i, x[i]);
        x[i] = real_get(y, i);
    }
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// embedding, add: copies and single additions, bit-equal

static void cuda_test_embedding_forward(int BT, int V, int C) {
    size_t n = (size_t)BT * C, nw = (size_t)V * C;
    floatX *weight = test_tensor(nw, 1, 1.0), *want = test_tensor(n, 3, 1.0);
    int32_t* tokens = (int32_t*)malloc_or_die((size_t)BT * sizeof(int32_t), "test");
    for (int t = 0; t < BT; t++) {
        tokens[t] = t % 3 == 2 ? V - 1 : t * 7 % V;
    }
    Output out = output_make(NULL, n * X_BYTES);
    const int32_t* dtokens = (const int32_t*)upload(tokens, (size_t)BT * sizeof(int32_t));
    const floatX* dweight = (const floatX*)upload(weight, nw * X_BYTES);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.embedding_forward(output_x(&out, run), dtokens, dweight, BT, C);
    }
    CPU_OPS.embedding_forward(want, tokens, weight, BT, C);
    output_same(&out, want, label("embedding of %d tokens, V %d, C %d", BT, V, C));
    release_uploads();
    test_free(weight, want, tokens);
}

// A token's rows are summed by pieces of at least 16 rows: with no more tokens than that in all, and from zero, the
// order is the CPU's and so are the bits.
static void cuda_test_embedding_backward(int BT, int V, int C, RealType type, int from_zero) {
    const char* what = label("embedding backward of %d tokens, V %d, C %d, %s, from %s", BT, V, C,
                             type == REAL_F32 ? "f32" : "floatX", from_zero ? "zero" : "values");
    size_t n = (size_t)BT * C, nw = (size_t)V * C;
    floatX* dout = test_tensor(n, 2, 1.0);
    float* begin = test_zero_floats(nw);
    double *error = test_zeros(nw), *count = test_zeros(nw);
    int32_t* tokens = (int32_t*)malloc_or_die((size_t)BT * sizeof(int32_t), "test");
    for (size_t i = 0; i < nw; i++) {
        begin[i] = from_zero ? 0.0f : (float)(i % 64) * 0.125f;
        error[i] = pow((double)begin[i], 2), count[i] = 1.0;
    }
    for (int t = 0; t < BT; t++) {
        tokens[t] = t % 3 == 2 ? V - 1 : t * 7 % V;
    }
    RealArray want = test_reals(type, begin, nw);
    Output dweight = output_make(want.data, nw * real_bytes(type));
    const int32_t* dtokens = (const int32_t*)upload(tokens, (size_t)BT * sizeof(int32_t));
    const floatX* ddout = (const floatX*)upload(dout, n * X_BYTES);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.embedding_backward(output_real(&dweight, run, type), ddout, dtokens, BT, V, C);
    }
    CPU_OPS.embedding_backward(want, dout, tokens, BT, V, C);
    for (size_t i = 0; i < n; i++) {
        size_t at = (size_t)tokens[i / C] * C + i % C;
        error[at] += pow((double)floatX_to_f32(dout[i]), 2);
        count[at] += 1.0;
    }
    for (size_t i = 0; i < nw; i++) {
        error[i] = sqrt(error[i]) * sqrt(count[i]) * F32_ROUNDING;
    }
    if (from_zero && BT <= 16) {
        output_same(&dweight, want.data, what);
    } else {
        output_near_real(&dweight, want, error, 1.0, what);
    }
    release_uploads();
    test_free(dout, begin, error, count, tokens, want.data);
}

static void cuda_test_add(size_t n) {
    floatX *a = test_tensor(n, 1, 1.0), *b = test_tensor(n, 2, 1e-2), *want = test_tensor(n, 3, 1.0);
    const floatX *da = (const floatX*)upload(a, n * X_BYTES), *db = (const floatX*)upload(b, n * X_BYTES);
    Output out = output_make(NULL, n * X_BYTES), on_a = output_make(a, n * X_BYTES), on_b = output_make(b, n * X_BYTES);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.add(output_x(&out, run), da, db, n);
        CUDA_OPS.add(output_x(&on_a, run), output_x(&on_a, run), db, n);
        CUDA_OPS.add(output_x(&on_b, run), da, output_x(&on_b, run), n);
    }
    CPU_OPS.add(want, a, b, n);
    output_same(&out, want, label("add of %zu", n));
    output_same(&on_a, want, label("add of %zu on a", n));
    output_same(&on_b, want, label("add of %zu on b", n));
    release_uploads();
    test_free(a, b, want);
}

// ---------------------------------------------------------------------------------------------------------------------
// RMSNorm; x holds the tokens (BT, C), then the weight (C)

static void cuda_test_rmsnorm_forward(int BT, int C) {
    const char* what = label("rmsnorm %d x %d", BT, C);
    size_t n = (size_t)BT * C;
    double roundings = sqrt((double)C) + 8.0;  // rsqrt within 2 units
    floatX *x = test_tensor(n + C, 1, 1.0), *b = test_tensor(n, 2, 0.3);
    floatX *want = test_tensor(n, 3, 1.0), *want_sum = test_tensor(n, 4, 1.0);
    float* want_rstd = test_zero_floats((size_t)BT);
    const floatX *dx = (const floatX*)upload(x, (n + C) * X_BYTES), *db = (const floatX*)upload(b, n * X_BYTES);
    Output out = output_make(NULL, n * X_BYTES), rstd = output_make(NULL, (size_t)BT * 4);
    Output sum = output_make(NULL, n * X_BYTES), in_place = output_make(x, n * X_BYTES);
    Output out_sum = output_make(NULL, n * X_BYTES), rstd_sum = output_make(NULL, (size_t)BT * 4);
    Output out_place = output_make(NULL, n * X_BYTES);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.rmsnorm_forward(output_x(&out, run), output_f(&rstd, run), dx, dx + n, BT, C, 1e-5f);
        CUDA_OPS.add_rmsnorm_forward(output_x(&sum, run), output_x(&out_sum, run), output_f(&rstd_sum, run), dx, db,
                                     dx + n, BT, C, 1e-5f);
        CUDA_OPS.add_rmsnorm_forward(output_x(&in_place, run), output_x(&out_place, run), output_f(&rstd_sum, run),
                                     output_x(&in_place, run), db, dx + n, BT, C, 1e-5f);
    }
    CPU_OPS.rmsnorm_forward(want, want_rstd, x, x + n, BT, C, 1e-5f);
    output_near_x(&out, want, NULL, roundings, what);
    output_near_f(&rstd, want_rstd, NULL, roundings, label("%s: rstd", what));
    CPU_OPS.add_rmsnorm_forward(want_sum, want, want_rstd, x, b, x + n, BT, C, 1e-5f);
    output_same(&sum, want_sum, label("%s: sum", what));
    output_same(&in_place, want_sum, label("%s: sum in place", what));
    output_near_x(&out_sum, want, NULL, roundings, label("%s of a sum", what));
    output_near_x(&out_place, want, NULL, roundings, label("%s of a sum in place", what));
    output_near_f(&rstd_sum, want_rstd, NULL, roundings, label("%s: rstd of a sum", what));
    release_uploads();
    test_free(x, b, want, want_sum, want_rstd);
}

// how: no residual gradient, one, in place on it; with one, the weight's gradient is floatX
static void cuda_test_rmsnorm_backward(int BT, int C, int how) {
    const char* what = label("rmsnorm backward %d x %d, residual %d", BT, C, how);
    size_t n = (size_t)BT * C;
    double roundings = sqrt((double)C) + 8.0;
    floatX *x = test_tensor(n + C, 1, 1.0), *dout = test_tensor(n, 2, 1.0), *residual = test_tensor(n, 4, 1.0);
    floatX* want = test_tensor(n, 3, 1.0);
    float *rstd = test_zero_floats((size_t)BT), *begin = test_zero_floats((size_t)C);
    begin[0] = 0.25f;  // += is part of the contract
    RealArray grad = test_reals(how == 1 ? REAL_FLOATX : REAL_F32, begin, (size_t)C);
    CPU_OPS.rmsnorm_forward(want, rstd, x, x + n, BT, C, 1e-5f);
    Output dx = output_make(how == 2 ? residual : NULL, n * X_BYTES);
    Output dw = output_make(grad.data, (size_t)C * real_bytes(grad.type));
    const floatX *inp = (const floatX*)upload(x, (n + C) * X_BYTES), *dy = (const floatX*)upload(dout, n * X_BYTES);
    const floatX* other = (const floatX*)upload(residual, n * X_BYTES);
    const float* drstd = (const float*)upload(rstd, (size_t)BT * 4);
    for (int run = 0; run < 2; run++) {
        const floatX* added[] = {NULL, other, output_x(&dx, run)};
        CUDA_OPS.rmsnorm_backward(output_x(&dx, run), output_real(&dw, run, grad.type), dy, added[how], inp, inp + n,
                                  drstd, BT, C);
    }
    CPU_OPS.rmsnorm_backward(want, grad, dout, how ? residual : NULL, x, x + n, rstd, BT, C);
    double *inp64 = test_double(x, n + C), *dout64 = test_double(dout, n), *ignored = test_zeros(n + C);
    double* error = test_zeros(n + C);
    rmsnorm_backward_f64(ignored, error, inp64, dout64, (NormShape){BT, C, (double)1e-5f});
    for (size_t i = 0; i < n; i++) {
        error[i] += how ? fabs((double)floatX_to_f32(residual[i])) : 0.0;
        error[i] *= 2.0 * roundings * F32_ROUNDING;
    }
    for (int c = 0; c < C; c++) {
        error[n + c] *= (sqrt((double)BT) + roundings) * F32_ROUNDING;
    }
    output_near_x(&dx, want, error, 1.0, what);
    output_near_real(&dw, grad, error + n, 1.0 + sqrt((double)BT), label("%s: weight", what));
    release_uploads();
    test_free(x, dout, residual, want, rstd, begin, grad.data, inp64, dout64, ignored, error);
}

// ---------------------------------------------------------------------------------------------------------------------
// RoPE, SwiGLU, cross-entropy

static void cuda_test_rope(AttentionShape s, int first, int inverse) {
    const char* what = label("rope T %d HS %d from %d, inverse %d", s.T, s.HS, first, inverse);
    int width = (s.NH + 2 * s.NKV) * s.HS, half = s.HS / 2;
    size_t n = (size_t)s.B * s.T * width, positions = (size_t)first + s.T;
    ModelConfig m = {};
    m.HS = s.HS, m.max_positions = (int)positions, m.rope_theta = 10000.0;
    float* table = (float*)malloc_or_die(positions * s.HS * sizeof(float), "test");
    rope_table_fill(table, &m);
    floatX *x = test_tensor(n, 5, 1.0), *want = test_tensor(n, 5, 1.0);
    double* error = test_zeros(n);
    Output qkv = output_make(x, n * X_BYTES);
    const float* dtable = (const float*)upload(table, positions * s.HS * sizeof(float));
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.rope(output_x(&qkv, run), dtable, s, first, inverse);
    }
    CPU_OPS.rope(want, table, s, first, inverse);
    for (size_t i = 0; i < n; i++) {
        size_t partner = (int)(i % s.HS) < half ? i + half : i - half;
        int turned = (int)(i % width) < (s.NH + s.NKV) * s.HS;
        error[i] = turned ? 4.0 * F32_ROUNDING * hypot(floatX_to_f32(x[i]), floatX_to_f32(x[partner])) : 0.0;
    }
    output_near_x(&qkv, want, error, 0.0, what);
    floatX* got = (floatX*)output_take(&qkv, what);
    int same = 1;
    for (size_t i = 0; i < n; i++) {
        same &= (int)(i % width) < (s.NH + s.NKV) * s.HS || !memcmp(got + i, x + i, X_BYTES);
    }
    expect(same, "%s: changes the values", what);
    release_uploads();
    test_free(table, x, want, error, got);
}

static void cuda_test_swiglu(int BT, int F, double scale) {
    const char* what = label("swiglu %d x %d, scale %g", BT, F, scale);
    size_t n = (size_t)BT * F;
    floatX *x = test_tensor(2 * n, 1, scale), *dout = test_tensor(n, 2, 1.0);
    floatX *want = test_tensor(n, 3, 1.0), *want_dx = test_tensor(2 * n, 4, 1.0);
    double *error = test_zeros(n), *error_dx = test_zeros(2 * n);
    Output out = output_make(NULL, n * X_BYTES), dx = output_make(NULL, 2 * n * X_BYTES);
    const floatX *inp = (const floatX*)upload(x, 2 * n * X_BYTES), *dy = (const floatX*)upload(dout, n * X_BYTES);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.swiglu_forward(output_x(&out, run), MXINT8_NONE, inp, BT, F);
        CUDA_OPS.swiglu_backward(output_x(&dx, run), dy, inp, MXINT8_NONE, BT, F);
    }
    CPU_OPS.swiglu_forward(want, MXINT8_NONE, x, BT, F);
    CPU_OPS.swiglu_backward(want_dx, dout, x, MXINT8_NONE, BT, F);
    for (size_t i = 0; i < n; i++) {
        size_t at = i / F * 2 * F + i % F;
        double g = floatX_to_f32(x[at]), u = floatX_to_f32(x[at + F]), d = floatX_to_f32(dout[i]);
        double sigmoid = 1.0 / (1.0 + exp(-g));
        // CUDA's __expf(g) is off by 2 + 1.17 |g| units (CUDA C++ Programming Guide), a unit is two roundings
        double roundings = (12.0 + 2.4 * fabs(g)) * F32_ROUNDING;
        error[i] = roundings * fabs(g * u) * sigmoid;
        error_dx[at] = roundings * fabs(d * u) * sigmoid * (1.0 + fabs(g));
        error_dx[at + F] = roundings * fabs(d * g) * sigmoid;
    }
    output_near_x(&out, want, error, 8.0, what);
    output_near_x(&dx, want_dx, error_dx, 8.0, label("%s: backward", what));
    release_uploads();
    test_free(x, dout, want, want_dx, error, error_dx);
}

// gate_up kept as MXINT8: the CPU's bits, and the gradient of its values, which are exact in floatX here
static void cuda_test_swiglu_kept(int BT, int F, double scale) {
    const char* what = label("swiglu %d x %d that keeps MXINT8, scale %g", BT, F, scale);
    size_t n = (size_t)BT * F, bytes = mxint8_bytes((size_t)BT, 2 * (size_t)F);
    floatX *x = test_tensor(2 * n, 1, scale), *dout = test_tensor(n, 2, 1.0), *y = test_tensor(n, 3, 1.0);
    for (size_t i = 0; i < 2 * n; i++) {  // groups of all sizes
        x[i] = f32_to_floatX(ldexpf(floatX_to_f32(x[i]), -(int)(i / GROUP % 40)));
    }
    void* want = malloc_or_die(bytes, "test");
    Mxint8 host = mxint8_at((size_t)BT, 2 * (size_t)F, want);
    Output out = output_make(NULL, n * X_BYTES), plain = output_make(NULL, n * X_BYTES);
    Output kept = output_make(NULL, bytes), dx = output_make(NULL, 2 * n * X_BYTES);
    Output dx_values = output_make(NULL, 2 * n * X_BYTES);
    const floatX *inp = (const floatX*)upload(x, 2 * n * X_BYTES), *dy = (const floatX*)upload(dout, n * X_BYTES);
    CPU_OPS.swiglu_forward(y, host, x, BT, F);
    for (size_t i = 0; i < 2 * n; i++) {
        x[i] = f32_to_floatX(mxint8_decode(host.codes[i], host.scales[i / GROUP]));
    }
    const floatX* values = (const floatX*)upload(x, 2 * n * X_BYTES);
    for (int run = 0; run < 2; run++) {
        Mxint8 device = mxint8_at((size_t)BT, 2 * (size_t)F, kept.at[run]);
        CUDA_OPS.swiglu_forward(output_x(&plain, run), MXINT8_NONE, inp, BT, F);
        CUDA_OPS.swiglu_forward(output_x(&out, run), device, inp, BT, F);
        CUDA_OPS.swiglu_backward(output_x(&dx, run), dy, NULL, device, BT, F);
        CUDA_OPS.swiglu_backward(output_x(&dx_values, run), dy, values, MXINT8_NONE, BT, F);
    }
    output_same(&kept, want, what);
    char *y_plain = (char*)output_take(&plain, what), *dx_plain = (char*)output_take(&dx_values, what);
    output_same(&out, y_plain, label("%s: the same", what));
    output_same(&dx, dx_plain, label("%s: backward", what));
    release_uploads();
    test_free(x, dout, y, want, y_plain, dx_plain);
}

// errors of losses (rows) and logits' gradients (rows, V); terms as in ops.h, __expf as above
static void crossentropy_errors(double* loss_error, double* grad_error, const floatX* x, const int32_t* targets,
                                int rows, int V, double grad_scale) {
    for (int r = 0; r < rows; r++) {
        double largest = -INFINITY, sum = 0.0, spread = 0.0;
        for (int v = 0; v < V; v++) {
            largest = fmax(largest, (double)floatX_to_f32(x[(size_t)r * V + v]));
        }
        for (int v = 0; v < V; v++) {
            sum += exp((double)floatX_to_f32(x[(size_t)r * V + v]) - largest);
        }
        for (int v = 0; v < V; v++) {
            double d = largest - (double)floatX_to_f32(x[(size_t)r * V + v]), p = exp(-d) / sum;
            double roundings = 3.4 * d + log(sum) + sqrt((double)V) + 12.0;
            spread += 3.4 * p * d;
            grad_error[(size_t)r * V + v] = roundings * F32_ROUNDING * (p + (v == targets[r])) * grad_scale;
        }
        double target = (double)floatX_to_f32(x[(size_t)r * V + targets[r]]);
        double size = fmax(1.0, fmax(fabs(largest), fabs(target)));
        loss_error[r] = (sqrt((double)V) + spread + 8.0 + 2.0 * size) * F32_ROUNDING;
    }
}

static void cuda_test_crossentropy(int rows, int V, double scale) {
    const char* what = label("crossentropy %d x %d, scale %g", rows, V, scale);
    size_t n = (size_t)rows * V;
    const float grad_scale = 0.37f;
    int32_t* targets = (int32_t*)malloc_or_die((size_t)rows * sizeof(int32_t), "test");
    for (int r = 0; r < rows; r++) {
        targets[r] = r == 0 ? 0 : r == 1 ? V - 1 : r * 7919 % V;
    }
    floatX *x = test_tensor(n, 1, scale), *want = test_tensor(n, 1, scale);
    float* want_losses = test_zero_floats((size_t)rows);
    double *loss_error = test_zeros((size_t)rows), *grad_error = test_zeros(n);
    crossentropy_errors(loss_error, grad_error, x, targets, rows, V, (double)grad_scale);
    Output losses = output_make(NULL, (size_t)rows * 4), again = output_make(NULL, (size_t)rows * 4);
    Output logits = output_make(x, n * X_BYTES), kept = output_make(x, n * X_BYTES);
    const int32_t* dtargets = (const int32_t*)upload(targets, (size_t)rows * sizeof(int32_t));
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.crossentropy(output_f(&losses, run), output_x(&kept, run), dtargets, rows, V, grad_scale, 0);
        CUDA_OPS.crossentropy(output_f(&again, run), output_x(&logits, run), dtargets, rows, V, grad_scale, 1);
    }
    output_same(&kept, x, label("%s: logits without gradient", what));
    CPU_OPS.crossentropy(want_losses, want, targets, rows, V, grad_scale, 1);
    output_near_f(&losses, want_losses, loss_error, 0.0, what);
    output_near_f(&again, want_losses, loss_error, 0.0, label("%s: with gradient", what));
    output_near_x(&logits, want, grad_error, 0.0, label("%s: gradient", what));
    release_uploads();
    test_free(targets, x, want, want_losses, loss_error, grad_error);
}

// all logits but the target's and one more are -inf: the loss is log 2, the gradients are halves and zeros
static void cuda_test_crossentropy_masked(int V, int with_target) {
    const int32_t target = V / 3;
    floatX* x = test_tensor((size_t)V, 1, 0.0);
    for (int v = 0; v < V; v++) {
        x[v] = f32_to_floatX(-INFINITY);
    }
    x[V - 1] = x[with_target ? target : V - 2] = f32_to_floatX(-200.0f);
    Output loss = output_make(NULL, sizeof(float)), logits = output_make(x, (size_t)V * X_BYTES);
    const int32_t* dtarget = (const int32_t*)upload(&target, sizeof target);
    for (int run = 0; run < 2; run++) {
        CUDA_OPS.crossentropy(output_f(&loss, run), output_x(&logits, run), dtarget, 1, V, 2.0f, 1);
    }
    float* got_loss = (float*)output_take(&loss, "masked logits");
    floatX* got = (floatX*)output_take(&logits, "masked logits");
    int same = with_target ? fabs((double)got_loss[0] - log(2.0)) < 16.0 * F32_ROUNDING : got_loss[0] == INFINITY;
    for (int v = 0; v < V; v++) {
        float want = v == V - 1 || (!with_target && v == V - 2) ? 1.0f : 0.0f;
        want = v == target ? (with_target ? -1.0f : -2.0f) : want;
        same &= floatX_to_f32(got[v]) == want;
    }
    expect(same, "V %d: loss or gradient of masked logits, loss %.9g", V, (double)got_loss[0]);
    release_uploads();
    test_free(x, got_loss, got);
}

// ---------------------------------------------------------------------------------------------------------------------

static void test_cuda_layers(void) {
    // the last ones: runs over many shares of positions, more than a block has threads
    const int embeddings[][3] = {{1, 2, 1},       {7, 3, 5},     {16, 3, 64},   {96, 288, 130},
                                 {300, 257, 2048}, {64, 32000, 64}, {2000, 3, 72}, {1500, 1, 30}};
    for (int i = 0; i < 8; i++) {
        int BT = embeddings[i][0], V = embeddings[i][1], C = embeddings[i][2];
        cuda_test_embedding_forward(BT, V, C);
        for (int k = 0; k < 4; k++) {
            cuda_test_embedding_backward(BT, V, C, k / 2 ? REAL_FLOATX : REAL_F32, k % 2);
        }
    }
    const size_t counts[] = {1, 8, 1023, 65536 + 8};
    for (int i = 0; i < 4; i++) {
        cuda_test_add(counts[i]);
    }
    // a row is one warp's, two warps', ... and nobody's; more rows than run at a time
    const int norms[][2] = {{1, 1},    {3, 5},    {33, 63},    {5, 64},      {1025, 128},  {257, 640},  {40, 1280},
                            {5, 2048}, {2, 4096}, {3500, 640}, {1100, 1664}, {300, 8192}, {3, 11008}, {2, 16400}, {2, 20488}};
    for (int i = 0; i < 15; i++) {
        cuda_test_rmsnorm_forward(norms[i][0], norms[i][1]);
        for (int how = 0; how < 3 && norms[i][1] > 1; how++) {  // of one channel the gradient is all cancellation
            cuda_test_rmsnorm_backward(norms[i][0], norms[i][1], how);
        }
    }
    for (int inverse = 0; inverse < 2; inverse++) {
        cuda_test_rope((AttentionShape){1, 1, 1, 1, 2}, 0, inverse);
        cuda_test_rope((AttentionShape){2, 5, 3, 1, 6}, 0, inverse);
        cuda_test_rope((AttentionShape){2, 33, 4, 2, 16}, 7, inverse);
        cuda_test_rope((AttentionShape){2, 65, 8, 1, 64}, 0, inverse);
        cuda_test_rope((AttentionShape){1, 512, 2, 1, 128}, 3, inverse);
    }
    const int glus[][2] = {{1, 1}, {5, 33}, {7, 64}, {3, 5632}};
    for (int i = 0; i < 8; i++) {
        cuda_test_swiglu(glus[i / 2][0], glus[i / 2][1], i % 2 ? 20.0 : 2.0);
    }
    cuda_test_swiglu_kept(1, 32, 1.0);
    cuda_test_swiglu_kept(33, 96, 20.0);
    cuda_test_swiglu_kept(3, 5632, 4.0);
    const int vocabularies[] = {1, 2, 5, 257, 512, 513, 4104, 32000};
    for (int i = 0; i < 16; i++) {
        cuda_test_crossentropy(i % 5 + 1, vocabularies[i / 2], i % 2 ? 30.0 : 3.0);
    }
    cuda_test_crossentropy(3, 32000, 3.0);
    // more rows than run at a time; rows that fit in twos, in ones, not quite
    const int chunks[][2] = {{900, 128}, {600, 4104}, {2, 50304}, {2, 100000}, {140, 128256}};
    for (int i = 0; i < 5; i++) {
        cuda_test_crossentropy(chunks[i][0], chunks[i][1], 3.0);
    }
    const int masked[] = {7, 64, 4104, 128256};
    for (int i = 0; i < 8; i++) {
        cuda_test_crossentropy_masked(masked[i / 2], i % 2);
    }
}
#endif
