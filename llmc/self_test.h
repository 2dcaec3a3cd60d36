// self_test.h: does the running device compute what the recipe says? Known answers for quantization, rotation and
// products.
//
// The codes, scales and masks of a fixed input are compared by XXH64 with values recorded from the reference (the CPU
// backend, which the tests hold bit for bit against dev/ref/quartet_ref.py); products are compared with an f64
// decode-and-multiply, and what the FP4 carrier multiplies byte by byte with quant.h's definition. Well under a second.
#pragma once
#include "cpu/quantize_fp4.h"
#include "linear.h"
#include "xxh64.h"

#define SELF_TEST_ROWS 96
#define SELF_TEST_COLS 128

typedef struct { const char* name; QuantSpec spec; int transposed; uint64_t answer; } SelfTestCase;

// bf16-representable values over many octaves, the same in every build
static float self_test_value(int i) {
    uint64_t z = rand_u64(2505, (uint64_t)i, rand_stream(RAND_INIT, 0, 0, 14669));
    int mantissa = (int)(z & 0xff) - 128, octave = (int)(z >> 8 & 0xff) % 12;
    return (float)mantissa * f32_from_bits((uint32_t)(115 + octave) << 23);
}

static int self_test_case(const Ops* ops, const SelfTestCase* test, const floatX* inp, int verbose) {
    int rows = test->transposed ? SELF_TEST_COLS : SELF_TEST_ROWS,
        cols = test->transposed ? SELF_TEST_ROWS : SELF_TEST_COLS;
    size_t bytes = qtensor_bytes(&test->spec, rows, cols);
    void *device = ops->alloc(bytes, "self-test"), *host = malloc_or_die(bytes, "self-test");
    QTensor out = qtensor_at(&test->spec, rows, cols, device);
    QuantizeArgs args = {.out = &out,
                         .spec = test->spec,
                         .tensor = inp,
                         .saved = NULL,
                         .transposed = test->transposed,
                         .seed = 7,
                         .sign_stream = rand_stream(RAND_SIGNS, 1, 2, 3),
                         .sign_index = 1ull << 56,
                         .round_stream = rand_stream(RAND_ROUND, 1, 2, 3),
                         .round_index = 2ull << 56, .position = NULL,
                         .stats = NULL,
                         .row_under = NULL, .again = 0};
    ops->quantize(&args);
    ops->copy_to_host(host, device, bytes);
    Xxh64 hash = xxh64_begin(0);
    xxh64_update(&hash, host, bytes);
    uint64_t answer = xxh64_end(&hash);
    int ok = answer == test->answer;
    if (verbose || !ok) {
        printf("self-test  %-34s %016llx %s\n", test->name, (unsigned long long)answer, ok ? "ok" : "WRONG");
    }
    ops->release(device);
    free(host);
    return ok;
}

// the share of the result that a product may be wrong by: f32 sums, or what an 8-bit product keeps below its largest
// term (about 14 bits). What FP4 products keep nobody here has measured: as of 8 bits.
static double self_test_tolerance(const Carrier* carrier) {
    int narrow = carrier && carrier->format[OPERAND_X] != FORMAT_FLOATX;
    return narrow ? 0x1p-10 : 8.0 * sqrt((double)SELF_TEST_COLS) * 5.9604645e-8;
}

// What products are made of: values as above, groups of other sizes side by side, some of them under every carrier's
// window, and an infinity. Rows and groups fill no tile of any carrier.
#define SELF_TEST_M 160
#define SELF_TEST_K 160
#define SELF_TEST_FAULT_ROW 1

static floatX* self_test_tensor(void) {
    floatX* x = (floatX*)malloc_or_die(sizeof(floatX) * SELF_TEST_M * SELF_TEST_K, "self-test");
    for (int i = 0; i < SELF_TEST_M * SELF_TEST_K; i++) {
        int row = i / SELF_TEST_K, group = i % SELF_TEST_K / GROUP;
        int octaves = group == 2 && row >= 3 && row < 9 ? 14 + row : (3 * row + 5 * group) % 7;
        int fault = row == SELF_TEST_FAULT_ROW && i % SELF_TEST_K == 40;
        x[i] = f32_to_floatX(fault ? INFINITY : self_test_value(i) * ldexpf(1.0f, -octaves));
    }
    return x;
}

// an operand of a product, on the device and, decoded, here
typedef struct {
    QTensor q;
    void *device, *operand;
    double* values;
} SelfTestOperand;

// Is the FP4 carrier's operand what quant.h says of these codes and scales?
static int self_test_fp4_operand(const Ops* ops, const QTensor* q, const QTensor* codes, const char* name,
                                 int verbose) {
    size_t bytes = nvfp4_bytes(q->rows, q->cols), tiles = nvfp4_tile_offset(q->rows, q->cols);
    uint8_t *got = (uint8_t*)malloc_or_die(bytes, "self-test"), *want = (uint8_t*)malloc_or_die(bytes, "self-test");
    CarrierBase base = {}, want_base = {};
    float row_scale[SELF_TEST_M], want_row_scale[SELF_TEST_M];
    QTensor here = *q;
    here.operand = want;
    here.base = q->base ? &want_base : NULL;
    here.row_scale = q->row_scale ? want_row_scale : NULL;
    cpu_fp4_operand(&here, codes);
    ops->copy_to_host(got, q->operand, bytes);
    if (q->base) {
        ops->copy_to_host(&base, q->base, sizeof base);
    } else {
        ops->copy_to_host(row_scale, q->row_scale, sizeof row_scale);
    }
    int codes_ok = !memcmp(got, want, qtensor_codes_bytes(q->rows, q->cols));
    int tiles_ok = !memcmp(got + tiles, want + tiles, nvfp4_tile_bytes(q->rows, q->cols));
    int base_ok = q->base ? base.scale == want_base.scale : !memcmp(row_scale, want_row_scale, sizeof row_scale);
    int ok = codes_ok && tiles_ok && base_ok;
    if (verbose || !ok) {
        printf("self-test  FP4 operand, %-21s codes %s, scales %s, bases %s\n", name, codes_ok ? "ok" : "WRONG",
               tiles_ok ? "ok" : "WRONG", base_ok ? "ok" : "WRONG");
    }
    free(got);
    free(want);
    return ok;
}

// *operand is number id of a layer, of inp
static int self_test_operand(SelfTestOperand* operand, const LinearContext* ctx, const QuantSpec* spec, OperandId id,
                             const floatX* inp, const char* name, int verbose) {
    const Ops* ops = ctx->ops;
    const int M = SELF_TEST_M, K = SELF_TEST_K;
    Linear linear = {};
    linear.recipe = recipe_find("quartet");
    size_t bytes = qtensor_bytes(spec, M, K);
    void* host = malloc_or_die(bytes, "self-test");
    operand->device = ops->alloc(bytes, "self-test");
    operand->operand = ops->alloc(max_size(1, carrier_bytes(ctx, linear.recipe, id, M, K)), "self-test");
    operand->q = linear_operand_memory(ctx, id, &linear, spec, M, K, operand->device, operand->operand);
    operand->values = (double*)malloc_or_die(sizeof(double) * M * K, "self-test");
    QuantizeArgs args = {.out = &operand->q,
                         .spec = *spec,
                         .tensor = inp,
                         .saved = NULL,
                         .transposed = 0,
                         .seed = 7,
                         .sign_stream = 0,
                         .sign_index = 0,
                         .round_stream = 0,
                         .round_index = 0,
                         .position = NULL,
                         .stats = NULL,
                         .row_under = NULL, .again = 0};
    ops->quantize(&args);
    ops->copy_to_host(host, operand->device, bytes);
    QTensor copy = qtensor_at(spec, M, K, host);
    for (int i = 0; i < M * K; i++) {
        operand->values[i] = (double)qtensor_decode(&copy, i / K, i % K);
    }
    int fp4 = operand->q.operand && operand->q.carrier == FORMAT_NVFP4;
    int ok = !fp4 || self_test_fp4_operand(ops, &operand->q, &copy, name, verbose);
    free(host);
    return ok;
}

// |got - times * want| relative to |want|, infinite where not the same elements are NaN; row_scale may be NULL
static double self_test_distance(RealArray got, const double* want, const float* row_scale, double times) {
    double error = 0.0, size = 0.0;
    for (int i = 0; i < SELF_TEST_M * SELF_TEST_M; i++) {
        double value = (double)real_get(got, (size_t)i) * (row_scale ? (double)row_scale[i / SELF_TEST_M] : 1.0);
        if (isfinite(value) != isfinite(want[i])) {
            return INFINITY;
        }
        error += isfinite(value) ? (value - times * want[i]) * (value - times * want[i]) : 0.0;
        size += isfinite(value) ? times * times * want[i] * want[i] : 0.0;
    }
    return sqrt(error / size);
}

// a . b^T in f64
static double* self_test_product(const SelfTestOperand* a, const SelfTestOperand* b) {
    const int M = SELF_TEST_M, K = SELF_TEST_K;
    double *want = (double*)malloc_or_die(sizeof(double) * M * M, "self-test"),
           owed = (double)a->q.owed * (double)b->q.owed;
    for (int i = 0; i < M * M; i++) {
        double sum = 0.0;
        for (int k = 0; k < K; k++) {
            sum += a->values[i / M * K + k] * b->values[i % M * K + k];
        }
        want[i] = owed * sum;
    }
    return want;
}

// One of the three products of a linear layer, on the carrier that runs, against f64; both operands are made of inp.
// The fault must reach its row and column, and nothing else. First to f32, then as training stores it: y and dX in
// floatX, dW added to what is there, which is the first result.
static int self_test_gemm(const Ops* ops, const QuantSpec* spec, OperandId a_id, const char* a_name,
                          const char* b_name, const floatX* inp, int verbose) {
    const int count = SELF_TEST_M * SELF_TEST_M, adds = a_id == OPERAND_DYT;
    LinearContext ctx = {};
    SelfTestOperand a, b;
    ctx.ops = ops, ctx.carrier = ops->carrier();
    ctx.bases = (CarrierBase*)ops->alloc(sizeof(CarrierBase) * OPERANDS, "self-test");
    ops->carrier_begin(ctx.bases, OPERANDS);
    int ok = self_test_operand(&a, &ctx, spec, a_id, inp, a_name, verbose);
    ok &= self_test_operand(&b, &ctx, spec, (OperandId)(a_id + 1), inp, b_name, verbose);
    double* want = self_test_product(&a, &b);
    void* out = ops->alloc(sizeof(float) * (size_t)count, "self-test");
    float *result = (float*)malloc_or_die(sizeof(float) * (size_t)count, "self-test"), row_scale[SELF_TEST_M];
    if (a.q.row_scale) {
        ops->copy_to_host(row_scale, a.q.row_scale, sizeof row_scale);
    }
    for (int run = 0; run < 2; run++) {
        RealType type = run && !adds ? REAL_FLOATX : REAL_F32;
        GemmArgs gemm = {.out = {type, out}, .accumulate = run && adds, .a = &a.q, .b = &b.q, .alpha = 1.0f};
        ops->gemm(&gemm);
        ops->copy_to_host(result, out, real_bytes(type) * (size_t)count);
        double relative = self_test_distance(RealArray{type, result}, want, a.q.row_scale ? row_scale : NULL,
                                             run && adds ? 2.0 : 1.0);
        double tolerance = self_test_tolerance(ctx.carrier) + (type == REAL_FLOATX ? (double)FLOATX_EPSILON : 0.0);
        int product_ok = relative < tolerance;
        if (verbose || !product_ok) {
            printf("self-test  product %3s . %-2s to %-14s relative error %.2g%s %s\n", a_name, b_name,
                   type == REAL_FLOATX ? FLOATX_NAME : run ? "f32, added," : "f32", relative,
                   isfinite(relative) ? "" : ": a NaN lost, or where none should be,", product_ok ? "ok" : "WRONG");
        }
        ok &= product_ok;
    }
    void* device[] = {a.device, a.operand, b.device, b.operand, out, ctx.bases};
    for (int i = 0; i < 6; i++) {
        ops->release(device[i]);
    }
    free(a.values);
    free(b.values);
    free(want);
    free(result);
    return ok;
}

static QuantSpec self_test_spec(ScaleRule scale, Rotation rotation, Rounding rounding) {
    return (QuantSpec){.format = FORMAT_MXFP4,
                       .scale = scale,
                       .rotation = rotation,
                       .rounding = rounding,
                       .group = GROUP,
                       .source = SOURCE_TENSOR};
}

// Ends the process with exit 70 where the device is wrong.
static void self_test(const Ops* ops, int verbose) {
    const int count = SELF_TEST_ROWS * SELF_TEST_COLS;
    floatX* host = (floatX*)malloc_or_die(sizeof(floatX) * count, "self-test");
    for (int i = 0; i < count; i++) {
        host[i] = f32_to_floatX(self_test_value(i));
    }
    floatX* inp = (floatX*)ops->alloc(sizeof(floatX) * count, "self-test");
    ops->copy_to_device(inp, host, sizeof(floatX) * count);
    QuantSpec quest = self_test_spec(SCALE_QUEST, ROTATE_HADAMARD, ROUND_NEAREST);
    QuantSpec nearest = self_test_spec(SCALE_ABSMAX, ROTATE_SIGNED, ROUND_NEAREST);
    QuantSpec stochastic = self_test_spec(SCALE_ABSMAX, ROTATE_SIGNED, ROUND_STOCHASTIC);
    SelfTestCase cases[] = {
        {"quest, H", quest, 0, 0x5747e99e9bc8333f},
        {"absmax, signed H, nearest", nearest, 0, 0xea7e0ae8168382e8},
        {"absmax, signed H, nearest, T", nearest, 1, 0xd88f3f4668d65025},
        {"absmax, signed H, stochastic", stochastic, 0, 0x8e3eb752d7383bd6},
        {"absmax, signed H, stochastic, T", stochastic, 1, 0xf4fbd2fe325e4a47},
    };
    int ok = 1;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ok &= self_test_case(ops, &cases[i], inp, verbose);
    }
    ops->release(inp);
    free(host);
    host = self_test_tensor();
    inp = (floatX*)ops->alloc(sizeof(floatX) * SELF_TEST_M * SELF_TEST_K, "self-test");
    ops->copy_to_device(inp, host, sizeof(floatX) * SELF_TEST_M * SELF_TEST_K);
    ok &= self_test_gemm(ops, &quest, OPERAND_X, "x", "w", inp, verbose);
    ok &= self_test_gemm(ops, &nearest, OPERAND_DY, "dy", "wT", inp, verbose);
    ok &= self_test_gemm(ops, &nearest, OPERAND_DYT, "dyT", "xT", inp, verbose);
    ops->release(inp);
    free(host);
    check_or(ok, EXIT_SELF_TEST,
             "device %s, carrier %s, does not compute what the recipe says (the lines marked WRONG); nothing was "
             "trained%s", ops->name, ops->carrier() ? ops->carrier()->name : "f32",
             ops->carrier() ? "; --carrier bf16 is the plainest" : "");
}
