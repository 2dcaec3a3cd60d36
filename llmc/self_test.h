// self_test.h: does the running device compute what the recipe says? Known answers for quantization, rotation and
// products.
//
// The codes, scales and masks of a fixed input are compared by XXH64 with values recorded from the reference (the CPU
// backend, which the tests hold bit for bit against dev/ref/quartet_ref.py); products are compared with an f64
// decode-and-multiply. Well under a second.
#pragma once
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
// term (about 14 bits)
static double self_test_tolerance(const Carrier* carrier) {
    int narrow = carrier && carrier->format[OPERAND_X] != FORMAT_FLOATX;
    return narrow ? 0x1p-10 : 8.0 * sqrt((double)SELF_TEST_COLS) * 5.9604645e-8;
}

// One of the three products of a linear layer, on the carrier that runs, against f64; both operands are made of inp.
static int self_test_gemm(const Ops* ops, const QuantSpec* spec, OperandId a_id, const char* name, const floatX* inp,
                          int verbose) {
    const int M = SELF_TEST_ROWS, K = SELF_TEST_COLS;
    LinearContext ctx = {};
    Linear linear = {};
    linear.recipe = recipe_find("quartet");
    ctx.ops = ops, ctx.carrier = ops->carrier();
    ctx.bases = (CarrierBase*)ops->alloc(sizeof(CarrierBase) * OPERANDS, "self-test");
    size_t bytes = qtensor_bytes(spec, M, K);
    float *out = (float*)ops->alloc(sizeof(float) * M * M, "self-test"), result[SELF_TEST_ROWS * SELF_TEST_ROWS],
          row_scale[SELF_TEST_ROWS];
    QTensor q[2], copy[2];
    void *device[2], *operand[2], *host[2];
    ops->carrier_begin(ctx.bases, OPERANDS);
    for (int i = 0; i < 2; i++) {
        OperandId id = (OperandId)(a_id + i);
        device[i] = ops->alloc(bytes, "self-test"), host[i] = malloc_or_die(bytes, "self-test");
        operand[i] = ops->alloc(max_size(1, carrier_bytes(&ctx, linear.recipe, id, M, K)), "self-test");
        q[i] = linear_operand_memory(&ctx, id, &linear, spec, M, K, device[i], operand[i]);
        copy[i] = qtensor_at(spec, M, K, host[i]);
        QuantizeArgs args = {.out = &q[i],
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
        ops->copy_to_host(host[i], device[i], bytes);
    }
    GemmArgs gemm = {.out = real_f32(out), .accumulate = 0, .a = &q[0], .b = &q[1], .alpha = 1.0f};
    ops->gemm(&gemm);
    ops->copy_to_host(result, out, sizeof(float) * M * M);
    if (q[0].row_scale) {
        ops->copy_to_host(row_scale, q[0].row_scale, sizeof row_scale);
    }
    double error = 0.0, size = 0.0;
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < M; j++) {
            double sum = 0.0, got = (double)result[i * M + j] * (q[0].row_scale ? (double)row_scale[i] : 1.0);
            for (int k = 0; k < K; k++) {
                sum += (double)qtensor_decode(&copy[0], i, k) * (double)qtensor_decode(&copy[1], j, k);
            }
            sum *= (double)q[0].owed * (double)q[1].owed;
            error += (sum - got) * (sum - got);
            size += sum * sum;
        }
    }
    double relative = sqrt(error / size);
    int ok = relative < self_test_tolerance(ctx.carrier);
    if (verbose || !ok) {
        printf("self-test  %-34s relative error %.2g %s\n", name, relative, ok ? "ok" : "WRONG");
    }
    for (int i = 0; i < 2; i++) {
        ops->release(device[i]);
        ops->release(operand[i]);
        free(host[i]);
    }
    ops->release(out);
    ops->release(ctx.bases);
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
    ok &= self_test_gemm(ops, &quest, OPERAND_X, "product x . w against f64", inp, verbose);
    ok &= self_test_gemm(ops, &nearest, OPERAND_DY, "product dy . wT against f64", inp, verbose);
    ok &= self_test_gemm(ops, &nearest, OPERAND_DYT, "product dyT . xT against f64", inp, verbose);
    ops->release(inp);
    free(host);
    check_or(ok, EXIT_SELF_TEST,
             "device %s does not compute what the recipe says (the lines marked WRONG); nothing was trained",
             ops->name);
}
