// cuda_quant_linear.h: section cuda_quant, the linear layer: its three products on the GPU against an f64
// decode-and-multiply of the CPU's codes; linear_forward, linear_backward, linear_finish_gradient and telemetry against
// the CPU's.
//
// Products. Elements are products of two e2m1 codes and powers of two, exact in every carrier. What is off is how
// tensor cores add: they align the terms of one instruction and what was summed before at the largest of them and cut
// what lies below, so every term loses up to one unit, and the sum up to one unit an instruction, always towards zero.
//   carrier   unit of the largest        terms an instruction   kept in those registers
//   fp8       2^-13 (14 bits are kept)   32                     all K, or 128 where gemm_fast_accumulate is 0
//   bf16      2^-23                      16                     all K
//   fp4       2^-23: not measured yet    64                     all K
//   f32       2^-24, rounded             1                      all K
// Terms have either sign, hence sqrt(K) units for them. The cuts of the sum do not average: half a unit each. A sum
// kept for 128 terms has the share sqrt(128 / K) of the size, and as many of these add up like a walk: the bound is
// that of K = 128. The size is, as everywhere, the larger of the result and the root of the sum of the squared terms.
// Elements have the comparator's factor 2 of slack, the root mean square of all errors has none.
#pragma once
#include "cuda_quant.h"
#ifdef USE_CUDA

// ---------------------------------------------------------------------------------------------------------------------
// products

// the part of a sum's size that one backend's product of K terms may be off by, before it is stored
static double product_share(const LinearContext* ctx, int K) {
    double f32 = (sqrt((double)K) + 3.0) * F32_ROUNDING;
    if (!ctx->carrier || sizeof(floatX) == sizeof(float)) {
        return f32;
    }
    if (ctx->carrier->format[OPERAND_X] != FORMAT_E4M3) {
        return (sqrt((double)K) + K / 32.0) * 0x1p-23;
    }
    int kept = gemm_fast_accumulate ? K : min_int(K, 128);
    return (sqrt((double)kept) + kept / 64.0) * 0x1p-13 + f32;
}

// factor * a (M, K) . b (N, K)^T in f64, and the size that errors are relative to; both +=
static void product_reference(double* value, double* size, const double* a, const double* b, int M, int N, int K,
                              double factor) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            double sum = 0.0, squares = 0.0;
            for (int k = 0; k < K; k++) {
                double term = a[(size_t)i * K + k] * b[(size_t)j * K + k];
                sum += term;
                squares += term * term;
            }
            value[(size_t)i * N + j] += factor * sum;
            size[(size_t)i * N + j] += factor * fmax(fabs(sum), sqrt(squares));
        }
    }
}

// near_expect with planted errors that suit any tolerance: three times that of the largest element, and a NaN
static void quant_near_expect(Near* near, const char* what) {
    size_t worst = 0, largest = 0, seen = 0;
    for (size_t i = 1; i < near->n; i++) {
        largest = fabs(near->want[i]) > fabs(near->want[largest]) ? i : largest;
    }
    size_t before = near_failures(near, &worst);
    expect(before == 0, "%s: %zu of %zu elements differ, worst at %zu: %.9g instead of %.9g, tolerance %.3g", what,
           before, near->n, worst, near->got[worst], near->want[worst], near->tolerance[worst]);
    double saved = near->got[largest];
    double planted[2] = {near->want[largest] + 3.0 * near->tolerance[largest], NAN};
    for (int i = 0; i < 2; i++) {
        near->got[largest] = planted[i];
        seen += near_failures(near, &worst) >= 1 && worst == largest;
    }
    near->got[largest] = saved;
    expect(seen == 2 || before > 0, "%s: a planted error at %zu is not seen", what, largest);
}

typedef struct { OperandCase a, b; int M, N, K; double *da, *db, *value, *size; } ProductCase;

static ProductCase product_case(OperandId a_id, Rounding rounding, int M, int N, int K, Draw draw) {
    ProductCase c = {};
    c.M = M, c.N = N, c.K = K;
    c.a = operand_case(a_id, rounding, M, K, draw);
    c.b = operand_case((OperandId)(a_id + 1), rounding, N, K, draw == DRAW_ROWS ? DRAW_NORMAL : draw);
    c.da = test_decoded(&c.a.q), c.db = test_decoded(&c.b.q);
    c.value = test_zeros((size_t)M * N), c.size = test_zeros((size_t)M * N);
    product_reference(c.value, c.size, c.da, c.db, M, N, K, (double)c.a.q.owed * (double)c.b.q.owed);
    return c;
}

static void product_case_free(ProductCase* c) {
    test_free(c->da, c->db, c->value, c->size);
    operand_case_free(&c->a);
    operand_case_free(&c->b);
}

// the reference with the scale of one group of row 0 of a doubled: the group that adds most to the row
static void product_plant(ProductCase* c) {
    int best = 0;
    double most = -1.0;
    for (int g = 0; g < c->K / GROUP; g++) {
        double squares = 0.0;
        for (int j = 0; j < c->N; j++) {
            double sum = 0.0;
            for (int k = g * GROUP; k < (g + 1) * GROUP; k++) {
                sum += c->da[k] * c->db[(size_t)j * c->K + k];
            }
            squares += sum * sum;
        }
        best = squares > most ? g : best;
        most = fmax(most, squares);
    }
    for (int k = best * GROUP; k < (best + 1) * GROUP; k++) {
        c->da[k] *= 2.0;
    }
    memset(c->value, 0, sizeof(double) * (size_t)c->N);
    memset(c->size, 0, sizeof(double) * (size_t)c->N);
    product_reference(c->value, c->size, c->da, c->db, 1, c->N, c->K, (double)c->a.q.owed * (double)c->b.q.owed);
}

// what the GPU made, in the type it made it in, on the host
static Near product_near(const Output* out, const ProductCase* c, RealType type, const float* row_scale, float begin,
                         double share, const char* what) {
    void* got = output_take(out, what);
    size_t n = (size_t)c->M * c->N;
    Near near = type == REAL_F32 ? near_f32((const float*)got, n) : near_floatX((const floatX*)got, n);
    for (size_t i = 0; i < n; i++) {
        near.got[i] *= row_scale ? (double)row_scale[i / (size_t)c->N] : 1.0;
        double start = (double)begin * (double)(i % 64);
        near_want_error(&near, i, start + c->value[i], share * c->size[i] + 2.0 * F32_ROUNDING * fabs(start));
    }
    free(got);
    return near;
}

// relative to the reference (L2): what was measured, and what the bound allows
typedef struct { double measured, allowed; } ProductError;

static void product_error_raise(ProductError* error, const Near* near, const ProductCase* c, double share) {
    double off = 0.0, size = 0.0, allowed = 0.0;
    for (size_t i = 0; i < near->n; i++) {
        off += pow(near->got[i] - c->value[i], 2);
        size += pow(c->value[i], 2);
        allowed += pow(share * c->size[i], 2);
    }
    error->measured = fmax(error->measured, sqrt(off / size));
    error->allowed = fmax(error->allowed, sqrt(allowed / size));
}

// as linear layers store it (y, dx: floatX; dw: added to f32), and to f32, where only the sum is off
static void cuda_test_product(ProductCase* c, Draw draw, ProductError* error) {
    const char* const names[] = {"f32", "floatX", "f32 +="};
    size_t n = (size_t)c->M * c->N;
    LinearContext ctx = quant_context_gpu(c->a.rounding);
    Linear linear = quant_linear();
    OperandSource source_a = operand_upload(&c->a), source_b = operand_upload(&c->b);
    CUDA_OPS.carrier_begin(ctx.bases, QUANT_BASES);
    QTensor a = operand_gpu(&c->a, &ctx, &source_a, NULL,
                            upload_zeros(carrier_bytes(&ctx, linear.recipe, c->a.id, c->M, c->K)));
    QTensor b = operand_gpu(&c->b, &ctx, &source_b, NULL,
                            upload_zeros(carrier_bytes(&ctx, linear.recipe, c->b.id, c->N, c->K)));
    float *row_scale = a.row_scale ? test_zero_floats((size_t)c->M) : NULL, *start = test_zero_floats(n);
    if (row_scale) {
        CUDA_OPS.copy_to_host(row_scale, a.row_scale, sizeof(float) * (size_t)c->M);
    }
    for (size_t i = 0; i < n; i++) {
        start[i] = 0.125f * (float)(i % 64);
    }
    for (int kind = 0; kind < 2; kind++) {
        int stored = kind == 0 ? 0 : c->a.id == OPERAND_DYT ? 2 : 1;
        char what[128];
        snprintf(what, sizeof what, "%s . %s %s, %d %d %d, %s, carrier %s, fast %d, to %s", OPERAND_NAMES[c->a.id],
                 OPERAND_NAMES[c->b.id], ROUNDING_NAMES[c->a.rounding], c->M, c->N, c->K, DRAW_NAMES[draw],
                 gpu.carrier->name, gemm_fast_accumulate, names[stored]);
        RealType type = stored == 1 ? REAL_FLOATX : REAL_F32;
        Output out = output_make(stored == 2 ? start : NULL, n * real_bytes(type));
        for (int run = 0; run < 2; run++) {
            GemmArgs args = {.out = output_real(&out, run, type), .accumulate = stored == 2, .a = &a, .b = &b,
                             .alpha = 1.0f};
            CUDA_OPS.gemm(&args);
        }
        double share = product_share(&ctx, c->K);
        Near near = product_near(&out, c, type, row_scale, stored == 2 ? 0.125f : 0.0f, share, what);
        quant_near_expect(&near, what);
        if (kind == 0) {
            product_error_raise(error, &near, c, share);
        }
        near_free(&near);
        if (kind == 1 && gemm_fast_accumulate) {
            ProductCase planted = *c;
            size_t elements = (size_t)c->M * c->K * sizeof(double);
            planted.value = test_zeros(n), planted.size = test_zeros(n);
            planted.da = (double*)malloc_or_die(elements, "test");
            memcpy(planted.value, c->value, n * sizeof(double));
            memcpy(planted.size, c->size, n * sizeof(double));
            memcpy(planted.da, c->da, elements);
            product_plant(&planted);
            near = product_near(&out, &planted, type, row_scale, stored == 2 ? 0.125f : 0.0f, share, what);
            near_expect_far(&near, label("%s: the scale of one group doubled", what));
            test_free(planted.value, planted.size, planted.da);
        }
    }
    test_free(row_scale, start);
    release_uploads();
}

static void cuda_test_products_of_carrier(void) {
    const int shapes[][3] = {{32, 32, 32}, {96, 64, 128}, {256, 512, 512}, {64, 160, 2048}, {64, 96, 5632},
                             {32, 64, 11008}};
    for (int s = 0; s < 6; s++) {
        int M = shapes[s][0], N = shapes[s][1], K = shapes[s][2];
        ProductError error[2] = {};
        for (int pair = 0; pair < 3; pair++) {
            OperandId id = (OperandId)(2 * pair);
            const Draw draws[] = {DRAW_NORMAL, DRAW_WINDOW, DRAW_ROWS};
            for (int d = 0; d < (id == OPERAND_DY ? 3 : 2); d++) {
                ProductCase c = product_case(id, d == 1 ? ROUND_STOCHASTIC : ROUND_NEAREST, M, N, K, draws[d]);
                for (gemm_fast_accumulate = 1; gemm_fast_accumulate >= 0; gemm_fast_accumulate--) {
                    if (gemm_fast_accumulate || quant_carrier_bytes()) {
                        cuda_test_product(&c, draws[d], &error[gemm_fast_accumulate]);
                    }
                }
                gemm_fast_accumulate = 1;
                product_case_free(&c);
            }
        }
        expect(error[1].measured <= error[1].allowed && error[0].measured <= error[0].allowed,
               "carrier %s, K %d: relative errors %.3g, not fast %.3g; allowed %.3g, %.3g", gpu.carrier->name, K,
               error[1].measured, error[0].measured, error[1].allowed, error[0].allowed);
        printf("  products, carrier %s, K %5d: relative error %.2g (bound %.2g)", gpu.carrier->name, K,
               error[1].measured, error[1].allowed);
        if (quant_carrier_bytes()) {
            printf("; not fast %.2g (bound %.2g)", error[0].measured, error[0].allowed);
        }
        printf("\n");
    }
}
// ---------------------------------------------------------------------------------------------------------------------
// linear layers: LinearCase of linear.h on the CPU, the same on the GPU

typedef struct {
    LinearContext ctx;
    Linear linear;
    QTensor saved;
    const floatX *x, *dy;
    void *w_memory, *x_memory;
} LinearGpu;

static LinearGpu linear_gpu(const LinearCase* c) {
    LinearGpu g = {};
    const Recipe* recipe = c->linear.recipe;
    size_t x_bytes = (size_t)c->BT * c->C * X_BYTES;
    g.ctx = c->ctx;
    g.ctx.ops = &CUDA_OPS;
    g.ctx.carrier = gpu.carrier;
    g.ctx.bases = (CarrierBase*)upload_zeros(sizeof(CarrierBase) * (size_t)(c->linear.layer + 1) * LINEAR_KINDS *
                                             OPERANDS);
    g.ctx.position = (const uint64_t*)upload_zeros(sizeof(uint64_t));
    size_t scratch = linear_scratch_bytes(&g.ctx, recipe, c->BT, c->C, c->OC);
    g.ctx.operand_a = upload_zeros(scratch), g.ctx.operand_b = upload_zeros(scratch);
    g.linear = c->linear;
    g.linear.weight = (const floatX*)upload(c->w, (size_t)c->OC * c->C * X_BYTES);
    g.x = (const floatX*)upload(c->x, x_bytes);
    g.dy = (const floatX*)upload(c->dy, (size_t)c->BT * c->OC * X_BYTES);
    g.w_memory = upload_zeros(linear_weight_bytes(recipe, c->C, c->OC));
    g.x_memory = upload_zeros(qtensor_bytes(&recipe->x, c->BT, c->C));
    return g;
}

static void linear_gpu_position(const LinearGpu* g, uint64_t position) {
    CUDA_OPS.copy_to_device((void*)g->ctx.position, &position, sizeof position);
    CUDA_OPS.carrier_begin(g->ctx.bases, (g->linear.layer + 1) * LINEAR_KINDS * OPERANDS);
}

// f64 values in rotated space and what errors are relative to, of y, dx and dw; wanted for tolerances only
typedef struct { double *value, *size; } LinearSizes;

static LinearSizes linear_sizes(size_t n) { return LinearSizes{test_zeros(n), test_zeros(n)}; }

// one backend's error of a result: product, what is stored before it is turned back (dx), rotation (mask not NULL)
static void linear_error_add(double* error, const LinearSizes* s, size_t n, double share, double store,
                             const uint32_t* mask) {
    double *one = test_zeros(n), *value = test_zeros(n);
    for (size_t i = 0; i < n; i++) {
        one[i] = share * s->size[i] + store * fabs(s->value[i]);
        value[i] = s->value[i];
    }
    if (mask) {
        unrotate_f64(value, one, mask, n);
    }
    for (size_t i = 0; i < n; i++) {
        error[i] += one[i];
    }
    test_free(one, value);
}

static void linear_expect(Near near, double* error, const RealArray want, const char* what, int far) {
    for (size_t i = 0; i < near.n; i++) {
        double value = (double)real_get(want, i);
        near_want_error(&near, i, value, error[i] + near.store * fabs(value));
    }
    if (far) {
        near_expect_far(&near, what);
    } else {
        quant_near_expect(&near, what);
        near_free(&near);
    }
}

static uint64_t linear_position(int micro) { return (uint64_t)micro << 32 | TEST_STEP; }

// the CPU's backward of two micro-batches, and the sizes of what it sums
static void linear_cpu_backward(LinearCase* c, LinearSizes* dx, LinearSizes* dw, const double* x, const double* w,
                                const double* dy) {
    for (int micro = 0; micro < 2; micro++) {
        uint64_t position = linear_position(micro);
        c->ctx.position = &position;
        linear_backward(&c->ctx, &c->linear, c->dx, c->dy, &c->saved, c->BT);
        double *a = composed_operand(c, OPERAND_DY, c->BT, c->OC, dy, 0);
        double *b = composed_operand(c, OPERAND_WT, c->C, c->OC, w, 1);
        memset(dx->value, 0, sizeof(double) * (size_t)c->BT * c->C);
        memset(dx->size, 0, sizeof(double) * (size_t)c->BT * c->C);
        product_reference(dx->value, dx->size, a, b, c->BT, c->C, c->OC, 16.0 / 9.0);
        test_free(a, b);
        a = composed_operand(c, OPERAND_DYT, c->OC, c->BT, dy, 1);
        b = composed_operand(c, OPERAND_XT, c->C, c->BT, x, 1);
        product_reference(dw->value, dw->size, a, b, c->OC, c->C, c->BT, 16.0 / 9.0);
        test_free(a, b);
    }
    c->ctx.position = &TEST_POSITION;
    linear_finish_gradient(&c->ctx, &c->linear);
}

typedef struct { Output y, dx, dw, dx_other, dw_other; } LinearOutputs;

static LinearOutputs linear_gpu_run(LinearGpu* g, const LinearCase* c) {
    size_t nx = (size_t)c->BT * c->C, nw = (size_t)c->OC * c->C, ny = (size_t)c->BT * c->OC;
    LinearOutputs out = {output_make(NULL, ny * X_BYTES), output_make(NULL, nx * X_BYTES), output_zeros(nw * 4),
                         output_make(NULL, nx * X_BYTES), output_zeros(nw * 4)};
    for (int run = 0; run < 2; run++) {
        linear_gpu_position(g, linear_position(0));
        linear_quantize_weight(&g->ctx, &g->linear, g->w_memory);
        linear_forward(&g->ctx, &g->linear, output_x(&out.y, run), &g->saved, g->x_memory, g->x, c->BT);
        g->linear.dweight = output_real(&out.dw, run, REAL_F32);
        for (int micro = 0; micro < 2; micro++) {
            linear_gpu_position(g, linear_position(micro));
            linear_backward(&g->ctx, &g->linear, output_x(&out.dx, run), g->dy, &g->saved, c->BT);
        }
        linear_finish_gradient(&g->ctx, &g->linear);
        g->linear.dweight = output_real(&out.dw_other, run, REAL_F32);
        for (int micro = 0; micro < 2; micro++) {
            linear_gpu_position(g, linear_position(5 + micro));
            linear_backward(&g->ctx, &g->linear, output_x(&out.dx_other, run), g->dy, &g->saved, c->BT);
        }
        linear_finish_gradient(&g->ctx, &g->linear);
    }
    return out;
}

// rows: dy's rows are of any size, so that they need bases of their own
static void cuda_test_linear(Rounding rounding, int BT, int C, int OC, int rows) {
    char what[128];
    snprintf(what, sizeof what, "linear %s %d %d %d, carrier %s%s", ROUNDING_NAMES[rounding], BT, C, OC,
             gpu.carrier->name, rows ? ", rows of any size" : "");
    LinearCase c = linear_case("quartet", rounding, BT, C, OC);
    size_t nx = (size_t)BT * C, nw = (size_t)OC * C, ny = (size_t)BT * OC;
    for (size_t i = 0; rows && i < ny; i++) {
        c.dy[i] = f32_to_floatX(ldexpf(floatX_to_f32(c.dy[i]), -(int)(i / (size_t)OC * 7 % 30)));
    }
    double *x = test_decoded(&c.saved), *w = test_decoded(&c.linear.w), *dy = test_double(c.dy, ny);
    LinearSizes y = linear_sizes(ny), dx = linear_sizes(nx), dw = linear_sizes(nw);
    product_reference(y.value, y.size, x, w, BT, OC, C, 1.0);
    linear_cpu_backward(&c, &dx, &dw, x, w, dy);
    LinearGpu g = linear_gpu(&c);
    LinearOutputs out = linear_gpu_run(&g, &c);
    double *error[3] = {test_zeros(ny), test_zeros(nx), test_zeros(nw)};
    const LinearContext* both[] = {&c.ctx, &g.ctx};
    for (int k = 0; k < 2; k++) {
        linear_error_add(error[0], &y, ny, product_share(both[k], C), 0.0, NULL);
        linear_error_add(error[1], &dx, nx, product_share(both[k], OC), (double)FLOATX_EPSILON, c.saved.mask);
        linear_error_add(error[2], &dw, nw, product_share(both[k], BT), F32_ROUNDING, c.linear.w.mask);
    }
    const Output* outputs[] = {&out.y, &out.dx, &out.dw, &out.dx_other, &out.dw_other};
    const RealArray wants[] = {real_floatX(c.y), real_floatX(c.dx), real_f32(c.dw)};
    const char* const names[] = {"y", "dx", "dw"};
    for (int i = 0; i < 5; i++) {
        int of = i < 3 ? i : i - 2;
        void* got = output_take(outputs[i], what);
        Near near = of == 2 ? near_f32((const float*)got, nw) : near_floatX((const floatX*)got, of ? nx : ny);
        const char* name = label("%s: %s%s", what, names[of], i < 3 ? "" : ", other micro-batches");
        linear_expect(near, error[of], wants[of], name, i >= 3);
        free(got);
    }
    release_uploads();
    test_free(x, w, dy, y.value, y.size, dx.value, dx.size, dw.value, dw.size, error[0], error[1], error[2]);
    linear_case_free(&c);
}

// ---------------------------------------------------------------------------------------------------------------------
// telemetry: the same numbers, summed in another order

// sums of a and b that are further than 1e-6 apart
static int stats_differences(const QuantStats* a, const QuantStats* b, double factor) {
    const double x[] = {a->error_sq, a->input_sq, a->clipped, a->zero, a->count};
    const double y[] = {b->error_sq, b->input_sq, b->clipped, b->zero, b->count};
    int differ = 0;
    for (int i = 0; i < 5; i++) {
        differ += !(fabs(factor * x[i] - y[i]) <= 1e-6 * fabs(y[i]));
    }
    return differ;
}

static void cuda_test_telemetry(int BT, int C, int OC) {
    LinearCase c = linear_case("quartet", ROUND_NEAREST, BT, C, OC);
    LinearTelemetry want, got;
    memset(&want, 0, sizeof want);
    LinearGpu g = linear_gpu(&c);
    c.ctx.telemetry = &want;
    g.ctx.telemetry = (LinearTelemetry*)upload_zeros(sizeof want);
    floatX* y = (floatX*)upload_zeros((size_t)BT * OC * X_BYTES);
    for (int step = 0; step < 2; step++) {  // they are added to
        linear_quantize_weight(&c.ctx, &c.linear, c.w_memory);
        linear_forward(&c.ctx, &c.linear, c.y, &c.saved, c.x_memory, c.x, BT);
        linear_gpu_position(&g, linear_position(0));
        linear_quantize_weight(&g.ctx, &g.linear, g.w_memory);
        linear_forward(&g.ctx, &g.linear, y, &g.saved, g.x_memory, g.x, BT);
    }
    CUDA_OPS.copy_to_host(&got, g.ctx.telemetry, sizeof got);
    const QuantStats *a[] = {&got.x[c.linear.kind], &got.w[c.linear.kind]};
    const QuantStats *b[] = {&want.x[c.linear.kind], &want.w[c.linear.kind]};
    for (int i = 0; i < 2; i++) {
        const char* what = label("telemetry of %s, %d %d %d, carrier %s", i ? "w" : "x", BT, C, OC, gpu.carrier->name);
        expect(stats_differences(a[i], b[i], 1.0) == 0, "%s: %.9g %.9g %g %g %g instead of %.9g %.9g %g %g %g", what,
               a[i]->error_sq, a[i]->input_sq, a[i]->clipped, a[i]->zero, a[i]->count, b[i]->error_sq, b[i]->input_sq,
               b[i]->clipped, b[i]->zero, b[i]->count);
        expect(b[i]->count == 2.0 * (i ? OC : BT) * C && b[i]->error_sq > 0.0 && b[i]->clipped > 0.0 &&
                   stats_differences(a[i], b[i], 1.00001) == 5,
               "%s: sums 1e-5 larger are not seen", what);
    }
    want.x[c.linear.kind] = want.w[c.linear.kind] = got.x[c.linear.kind] = got.w[c.linear.kind] = QuantStats{};
    expect(!memcmp(&want, &got, sizeof want), "telemetry of another kind of layer");
    release_uploads();
    linear_case_free(&c);
}

static void cuda_test_linears_of_carrier(void) {
    const int shapes[][3] = {{32, 32, 32}, {96, 160, 64}, {64, 96, 1408}, {256, 512, 384}, {2048, 64, 96}};
    for (int i = 0; i < 5; i++) {
        for (int rounding = ROUND_NEAREST; rounding <= ROUND_STOCHASTIC; rounding++) {
            cuda_test_linear((Rounding)rounding, shapes[i][0], shapes[i][1], shapes[i][2], 0);
        }
    }
    cuda_test_linear(ROUND_NEAREST, 96, 160, 64, 1);
    cuda_test_linear(ROUND_STOCHASTIC, 64, 96, 1408, 1);
    cuda_test_telemetry(96, 160, 64);
    cuda_test_telemetry(33 * 32, 96, 2080);
}
#endif
