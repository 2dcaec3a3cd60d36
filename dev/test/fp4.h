// fp4.h: the FP4 carrier without its hardware (section fp4). Scale codes, tiles, window and bases against their
// definition; then a backend whose products are those of cuBLASLt's NVFP4 kernel as documented, in f64: codes times
// ue4m3 scales found through cuBLAS's own formula, times alpha. On it the products, the linear layer and the self-test
// run, and the self-test must see what can be wrong on a real device.
#pragma once
#include "linear.h"

// ---------------------------------------------------------------------------------------------------------------------
// scale codes and tiles

static void test_fp4_scales(void) {
    int wrong = 0, seen = 0;
    for (int k = NVFP4_BOTTOM; k <= NVFP4_TOP; k++) {
        uint8_t code = ue4m3_power(k), next = ue4m3_power(k < NVFP4_TOP ? k + 1 : k - 1);
        wrong += ue4m3_to_f32(code) != ldexpf(1.0f, k) || f32_to_ue4m3(ldexpf(1.0f, k)) != code;
        seen += ue4m3_to_f32(next) != ldexpf(1.0f, k);
    }
    expect(wrong == 0 && seen == 18, "%d of 18 scale codes are wrong, %d of 18 planted ones seen", wrong, seen);
    expect(ue4m3_to_f32(UE4M3_NAN) != ue4m3_to_f32(UE4M3_NAN), "the NaN of ue4m3");
    expect(f32_to_ue4m3(ldexpf(1.0f, NVFP4_TOP + 1)) == 0x7e && f32_to_ue4m3(ldexpf(1.0f, NVFP4_BOTTOM - 1)) == 0,
           "the window is wider than that");
    for (int byte = 0; byte < 256; byte++) {  // of every group under every base
        for (int base = byte - 127 - NVFP4_TOP; byte < 255 && base < 150; base++) {
            Nvfp4Scale scale = nvfp4_scale((uint32_t)byte, base);
            double value = (double)ue4m3_to_f32(scale.code) * ldexp(1.0, base);
            wrong += value != ldexp(1.0, max_int(byte - 127, base + NVFP4_BOTTOM));
            wrong += ldexp(value, -scale.under) != ldexp(1.0, byte - 127);
        }
    }
    Nvfp4Scale nan = nvfp4_scale(UE8M0_NAN, -8);
    expect(wrong == 0 && nan.code == UE4M3_NAN && nan.under == 0, "%d clamped scales are wrong", wrong);
    for (uint32_t code = 0; code < 16; code++) {
        for (int under = 0; under < 300; under++) {
            float value = ldexpf(e2m1_to_f32(code), -min_int(under, 100));
            wrong += nvfp4_code(code, under) != (f32_to_e2m1(value) | (code & 8u));
        }
    }
    expect(wrong == 0 && nvfp4_code(7, 4) == 1 && nvfp4_code(7, 5) == 0 && nvfp4_code(9, 1) == 8 &&
               nvfp4_code(3, 1) == 2, "%d codes under the window", wrong);
}

// where cuBLAS documents the scale of block `inner` of row `outer`
static size_t cublas_scale_at(size_t outer, size_t inner, size_t inner_tiles) {
    size_t tile = outer / 128 * inner_tiles + inner / 4, row = outer % 128;
    return tile * 512 + row % 32 * 16 + row / 32 * 4 + inner % 4;
}

static void test_fp4_tiles(int rows, int cols) {
    int blocks = cols / NVFP4_BLOCK, padded_rows = (rows + 127) / 128 * 128, padded = (blocks + 3) / 4 * 4, same = 1;
    size_t bytes = nvfp4_tile_bytes(rows, cols), twice = 0, other = 0, turned = 0;
    uint8_t* used = (uint8_t*)calloc_or_die(bytes, "test");
    expect(bytes == (size_t)padded_rows * padded, "%d x %d: %zu bytes of scales", rows, cols, bytes);
    for (int row = 0; row < padded_rows; row++) {
        for (int block = 0; block < padded; block++) {
            size_t at = nvfp4_tile_index(row, block, blocks);
            same &= at < bytes;
            twice += at < bytes && used[at]++;
            other += at != cublas_scale_at((size_t)row, (size_t)block, (size_t)padded / 4);
            turned += at != cublas_scale_at((size_t)row, (size_t)block, (size_t)padded_rows / 128);  // planted
        }
    }
    for (uint32_t w = 0; w < bytes / 4; w++) {
        Nvfp4Word place = nvfp4_word(w, (uint32_t)cols / GROUP);
        for (int i = 0; i < 4; i++) {
            other += nvfp4_tile_index((int)place.row, 2 * (int)place.group + i, blocks) != 4 * (size_t)w + (size_t)i;
        }
    }
    expect(same && twice == 0 && other == 0, "%d x %d: %zu places twice, %zu not where cuBLAS reads", rows, cols,
           twice, other);
    expect(turned > 0 || padded / 4 == padded_rows / 128 || padded_rows == 128, "%d x %d: other tiles are not seen",
           rows, cols);
    free(used);
}

// dy's row factors are read after dyt was made in the same scratch; neither leaves its place
static void test_fp4_memory(int BT, int C, int OC) {
    LinearContext ctx = {};
    Linear linear = {};
    CarrierBase bases[OPERANDS];
    linear.recipe = recipe_find("quartet");
    ctx.carrier = carrier_find("fp4");
    ctx.bases = bases;
    size_t bytes = linear_scratch_bytes(&ctx, linear.recipe, BT, C, OC);
    char* scratch = (char*)malloc_or_die(bytes, "test");
    QTensor dy = linear_operand_memory(&ctx, OPERAND_DY, &linear, &linear.recipe->dy, BT, OC, NULL, scratch);
    QTensor dyt = linear_operand_memory(&ctx, OPERAND_DYT, &linear, &linear.recipe->dyt, OC, BT, NULL, scratch);
    QTensor source = nvfp4_source(&dyt);
    uint8_t *tiles = nvfp4_tiles(&dyt), *end = source.scales + qtensor_scales_bytes(OC, BT);
    expect(source.codes == (uint8_t*)scratch && tiles >= source.codes + qtensor_codes_bytes(OC, BT) &&
               source.scales >= tiles + nvfp4_tile_bytes(OC, BT) && (char*)end <= (char*)dy.row_scale,
           "dyt (%d, %d) reaches the factors of dy's rows", OC, BT);
    expect((char*)(dy.row_scale + BT) <= scratch + bytes && dy.base == NULL && dyt.row_scale == NULL && dyt.base,
           "the factors of %d rows do not fit, or bases", BT);
    free(scratch);
}

// ---------------------------------------------------------------------------------------------------------------------
// operands

// one element as the tensor cores see it, its base left out
static double fp4_element(const QTensor* q, int row, int col) {
    size_t i = (size_t)row * q->cols + col;
    size_t at = cublas_scale_at((size_t)row, (size_t)(col / 16), (size_t)(q->cols / 16 + 3) / 4);
    uint32_t code = ((const uint8_t*)q->operand)[i / 2] >> (i % 2 * 4) & 15u;
    return (double)e2m1_to_f32(code) * (double)ue4m3_to_f32(nvfp4_tiles(q)[at]);
}

// the nearest code times unit, of two the even code, without the program's rounding
static double nearest_code(double x, double unit) {
    const double values[] = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
    int best = 0;
    for (int i = 1; i < 8; i++) {
        double off = fabs(fabs(x) - values[i] * unit), least = fabs(fabs(x) - values[best] * unit);
        best = off < least || (off == least && i % 2 == 0) ? i : best;
    }
    return copysign(values[best] * unit, x);
}

static int scales_largest(const QTensor* q, int first_row, int rows) {
    int largest = INT32_MIN;
    for (int g = first_row * (q->cols / GROUP); g < (first_row + rows) * (q->cols / GROUP); g++) {
        largest = q->scales[g] == UE8M0_NAN || (int)q->scales[g] - 127 < largest ? largest : (int)q->scales[g] - 127;
    }
    return largest;
}

// a quantized operand, its groups up to `spread` octaves apart, and what the carrier multiplies of it
typedef struct { QTensor q; CarrierBase base; float* row_scale; void* memory; int under; } Fp4Case;

static Fp4Case fp4_case(const QuantSpec* spec, int rows, int cols, int spread, int by_row, int faults) {
    floatX* x = test_tensor((size_t)rows * cols, (uint64_t)(7 * rows + cols + spread), 1.0);
    for (int i = 0; i < rows * cols; i++) {
        int row = i / cols, group = i % cols / GROUP, octaves = (11 * row + 5 * group) % (spread + 1);
        float value = ldexpf(floatX_to_f32(x[i]), -octaves + (by_row ? row % 37 - 18 : 0));
        x[i] = f32_to_floatX((row + group) % 7 == 3 ? 0.0f * value : faults && i % 499 == 498 ? INFINITY : value);
    }
    Fp4Case c = {};
    c.q = quantize_op(spec, rows, cols, x, 0, 3);
    c.memory = malloc_or_die(nvfp4_bytes(rows, cols), "test");
    c.row_scale = (float*)malloc_or_die(sizeof(float) * (size_t)rows, "test");
    memset(c.memory, 0xff, nvfp4_bytes(rows, cols));
    free(x);
    return c;
}

// not when it is made, for it points into itself
static QTensor fp4_case_operand(Fp4Case* c, int by_row) {
    QTensor q = c->q;
    q.carrier = FORMAT_NVFP4;
    q.operand = c->memory;
    q.base = by_row ? NULL : &c->base;
    q.row_scale = by_row ? c->row_scale : NULL;
    return q;
}

static void fp4_case_free(Fp4Case* c) {
    test_qtensor_free(&c->q);
    test_free(c->memory, c->row_scale);
}

// elements that are not as defined; *under: groups under the window with a code that is not zero
static int fp4_differences(const QTensor* q, int* under) {
    int wrong = 0;
    *under = 0;
    for (int row = 0; row < q->rows; row++) {
        int largest = q->row_scale ? scales_largest(q, row, 1) : scales_largest(q, 0, q->rows);
        double base = (double)(q->row_scale ? q->row_scale[row] : q->base->scale);
        largest = largest == INT32_MIN ? 0 : largest;
        wrong += base != ldexp(1.0, largest - 8);
        for (int g = 0; g < q->cols / GROUP; g++) {
            int byte = q->scales[row * (q->cols / GROUP) + g], any = 0;
            int below = byte != UE8M0_NAN && byte - 127 < largest - 17;
            for (int col = g * GROUP; col < (g + 1) * GROUP; col++) {
                double value = (double)qtensor_decode(q, row, col), got = fp4_element(q, row, col) * base;
                double want = below ? nearest_code(value, ldexp(1.0, largest - 17)) : value;
                wrong += !(got == want && !signbit(got) == !signbit(want)) && !(got != got && want != want);
                any |= below && value != 0.0;
            }
            *under += any;
        }
    }
    return wrong;
}

static void test_fp4_operand(const QuantSpec* spec, int rows, int cols, int spread, int by_row, int faults) {
    Fp4Case c = fp4_case(spec, rows, cols, spread, by_row, faults);
    QTensor q = fp4_case_operand(&c, by_row);
    const char* kind = spec->scale == SCALE_QUEST ? "quest" : "absmax";
    size_t codes = qtensor_codes_bytes(rows, cols), tiles = nvfp4_tile_bytes(rows, cols), padding = 0, used = 0;
    int under, seen = 0;
    cpu_fp4_operand(&q, &c.q);
    int wrong = fp4_differences(&q, &under);
    expect(wrong == 0, "%s (%d, %d), %d octaves, base a %s: %d elements are wrong", kind, rows, cols, spread,
           by_row ? "row" : "tensor", wrong);
    expect(by_row || c.base.under == under, "%d groups under the window instead of %d", c.base.under, under);
    expect((under > 0) == (spread > 20) || by_row || rows * cols < 1000, "%d groups under the window, %d octaves",
           under, spread);
    for (size_t i = 0; i < tiles; i++) {
        padding += nvfp4_tiles(&q)[i] == 0;
        used += nvfp4_tiles(&q)[i] != 0;
    }
    expect(used == (size_t)rows * (size_t)(cols / 16) && used + padding == tiles, "%zu scales, %zu zeros", used,
           padding);
    // where nobody keeps codes and scales
    QTensor alone = q;
    alone.codes = alone.scales = NULL;
    alone.operand = malloc_or_die(nvfp4_bytes(rows, cols), "test");
    QTensor source = nvfp4_source(&alone);
    memcpy(source.codes, q.codes, codes);
    memcpy(source.scales, q.scales, qtensor_scales_bytes(rows, cols));
    cpu_fp4_operand(&alone, &source);
    expect(!memcmp(alone.operand, q.operand, codes) && !memcmp(nvfp4_tiles(&alone), nvfp4_tiles(&q), tiles),
           "(%d, %d): other bytes where codes are not kept", rows, cols);
    free(alone.operand);
    // planted in a group that has the largest scale: the sign of a code, a scale, a base
    size_t group = 0;
    for (size_t g = 1; g < (size_t)rows * (size_t)(cols / GROUP); g++) {
        int more = q.scales[group] == UE8M0_NAN || q.scales[g] > q.scales[group];
        group = q.scales[g] != UE8M0_NAN && more ? g : group;
    }
    int row = (int)(group / (size_t)(cols / GROUP)), block = (int)(group % (size_t)(cols / GROUP)) * 2;
    float* base = by_row ? &c.row_scale[row] : &c.base.scale;
    for (int i = 0; i < 3; i++) {
        uint8_t* scales = nvfp4_tiles(&q) + nvfp4_tile_index(row, block, cols / 16);
        uint8_t *byte = i ? scales : (uint8_t*)q.operand + group * (GROUP / 2), old = *byte;
        float scale = *base;
        *byte = i < 2 ? old ^ 8 : old;
        *base = i < 2 ? scale : 2.0f * scale;
        seen += fp4_differences(&q, &under) > wrong;
        *byte = old, *base = scale;
    }
    expect(seen == 3, "%s (%d, %d): %d of 3 planted errors are seen", kind, rows, cols, seen);
    fp4_case_free(&c);
}

// ---------------------------------------------------------------------------------------------------------------------
// a backend with FP4 tensor cores

// what a real one may have wrong: where it finds scales, what alpha and beta are, NaN, how operands are made
typedef enum {
    FAULT_NONE, FAULT_TILES, FAULT_ROW_TILES, FAULT_ALPHA, FAULT_BETA, FAULT_NAN, FAULT_OPERAND, FAULT_BASE, FAULTS
} Fp4Fault;
static Fp4Fault fp4_fault;

static double fp4_faulty_element(const QTensor* q, int row, int col) {
    const uint8_t *codes = (const uint8_t*)q->operand, *tiles = nvfp4_tiles(q);
    size_t i = (size_t)row * q->cols + col, block = (size_t)(col / 16), across = (size_t)(q->cols / 16 + 3) / 4;
    size_t at = fp4_fault == FAULT_TILES       ? (size_t)row * (size_t)(q->cols / 16) + block  // not in tiles
                : fp4_fault == FAULT_ROW_TILES ? cublas_scale_at((size_t)row % 128, block, across)
                                               : cublas_scale_at((size_t)row, block, across);
    float scale = ue4m3_to_f32(tiles[at]);
    return (double)e2m1_to_f32(codes[i / 2] >> (i % 2 * 4) & 15u) *
           (double)(fp4_fault == FAULT_NAN && scale != scale ? 0.0f : scale);
}

static double* fp4_elements(const QTensor* q) {
    double* x = test_zeros((size_t)q->rows * q->cols);
    for (int i = 0; i < q->rows * q->cols; i++) {
        x[i] = fp4_faulty_element(q, i / q->cols, i % q->cols);
    }
    return x;
}

// as gemm_fp4_alpha_kernel
static float fp4_alpha(const GemmArgs* args) {
    const CarrierBase *a = args->a->base, *b = fp4_fault == FAULT_ALPHA ? NULL : args->b->base;
    return args->alpha * (args->a->owed * args->b->owed) * ((a ? a->scale : 1.0f) * (b ? b->scale : 1.0f));
}

static void fp4_gemm(const GemmArgs* args) {
    if (args->a->format == FORMAT_FLOATX) {
        CPU_OPS.gemm(args);
        return;
    }
    int M = args->a->rows, N = args->b->rows, K = args->a->cols;
    double *a = fp4_elements(args->a), *b = fp4_elements(args->b), alpha = (double)fp4_alpha(args);
    for (int i = 0; i < M * N; i++) {
        double sum = 0.0;
        for (int k = 0; k < K; k++) {
            sum += a[(size_t)(i / N) * K + k] * b[(size_t)(i % N) * K + k];
        }
        int add = args->accumulate && fp4_fault != FAULT_BETA;
        real_set(args->out, (size_t)i, (float)(alpha * sum + (add ? (double)real_get(args->out, (size_t)i) : 0.0)));
    }
    test_free(a, b);
}

// as fp4_begin, the quantizer, fp4_end of cuda/quantize_fp4.cuh
static void fp4_quantize(const QuantizeArgs* args) {
    QTensor source = args->out->operand ? nvfp4_source(args->out) : *args->out;
    QuantizeArgs of_codes = *args;
    of_codes.out = &source;
    CPU_OPS.quantize(&of_codes);
    if (args->out->operand) {
        cpu_fp4_operand(args->out, &source);
        nvfp4_tiles(args->out)[5] ^= fp4_fault == FAULT_OPERAND ? 8 : 0;
        if (fp4_fault == FAULT_BASE && args->out->base) {
            args->out->base->scale *= 2.0f;
        }
    }
}

// as cuda_carry_mxfp4
static void fp4_carry(const QTensor* q) {
    int under = q->base->under;
    cpu_fp4_operand(q, q);
    q->base->under = under;
}

static const Carrier* fp4_carrier(void) { return carrier_find("fp4"); }

static Ops fp4_ops(void) {
    Ops ops = CPU_OPS;
    ops.name = "emulated";
    ops.quantize = fp4_quantize;
    ops.carry = fp4_carry;
    ops.gemm = fp4_gemm;
    ops.carrier = fp4_carrier;
    return ops;
}

// a (M, K) . b (N, K)^T of decoded codes: the same number where no group lies under the window; else off by at most a
// quarter of the clamped scale for each element that was rounded
static void test_fp4_product(OperandId id, int M, int N, int K, int spread) {
    const Recipe* recipe = recipe_find("quartet");
    QuantSpec spec = *recipe_spec(recipe, id);
    spec.rounding = ROUND_NEAREST, spec.source = SOURCE_TENSOR;
    int by_row = fp4_carrier()->row_base[id], wrong = 0, seen = 0;
    Fp4Case a = fp4_case(&spec, M, K, spread, by_row, 0), b = fp4_case(&spec, N, K, spread, 0, 0);
    QTensor qa = fp4_case_operand(&a, by_row), qb = fp4_case_operand(&b, 0);
    cpu_fp4_operand(&qa, &a.q);
    cpu_fp4_operand(&qb, &b.q);
    double *da = test_decoded(&a.q), *db = test_decoded(&b.q), *off_a = test_zeros((size_t)M * K),
           *off_b = test_zeros((size_t)N * K);
    for (int i = 0; i < M * K; i++) {
        off_a[i] = fabs(fp4_element(&qa, i / K, i % K) * (double)(by_row ? a.row_scale[i / K] : a.base.scale) - da[i]);
    }
    for (int i = 0; i < N * K; i++) {
        off_b[i] = fabs(fp4_element(&qb, i / K, i % K) * (double)b.base.scale - db[i]);
        wrong += off_b[i] > 0.25 * ldexp(1.0, b.base.base + NVFP4_BOTTOM);
    }
    float* out = (float*)malloc_or_die(sizeof(float) * (size_t)M * N, "test");
    GemmArgs args = {.out = real_f32(out), .accumulate = 0, .a = &qa, .b = &qb, .alpha = 1.0f};
    fp4_gemm(&args);
    for (int i = 0; i < M * N; i++) {
        double sum = 0.0, bound = 0.0, size = 0.0, owed = (double)(qa.owed * qb.owed);
        for (int k = 0; k < K; k++) {
            size_t at = (size_t)(i / N) * K + k, bt = (size_t)(i % N) * K + k;
            sum += da[at] * db[bt];
            size += fabs(da[at] * db[bt]);
            bound += off_a[at] * fabs(db[bt]) + off_b[bt] * (fabs(da[at]) + off_a[at]);
        }
        double got = (double)out[i] * (by_row ? (double)a.row_scale[i / N] : 1.0);
        bound = owed * (bound + K * 0x1p-52 * size) + F32_ROUNDING * fabs(got);  // sums in f64, stored as f32
        wrong += !(fabs(got - owed * sum) <= bound);
        seen += sum != 0.0 && !(fabs(got - 1.5 * owed * sum) <= bound);
    }
    expect(wrong == 0, "products %d x %d x %d of operand %d, %d octaves: %d are wrong", M, N, K, id, spread, wrong);
    expect(seen > M * N / (spread > 20 ? 5 : 2), "products half as large again are not seen: %d", seen);
    test_free(da, db, off_a, off_b, out);
    fp4_case_free(&a);
    fp4_case_free(&b);
}

// what must be right for products, seen at the start of a run
static void fp4_self_test(void* fault) {
    Ops ops = fp4_ops();
    fp4_fault = *(const Fp4Fault*)fault;
    cpu_set_threads(1);  // the others are the parent's
    if (!freopen("/dev/null", "w", stdout)) {
        die(EXIT_UNEXPECTED, "cannot write to /dev/null");
    }
    self_test(&ops, 0);
}

static void test_fp4_self_test(void) {
    for (int i = FAULT_NONE; i < FAULTS; i++) {
        Fp4Fault fault = (Fp4Fault)i;
        expect_exit(i ? EXIT_SELF_TEST : 0, i ? "carrier fp4" : "", fp4_self_test, &fault);
    }
}

static void test_fp4(void) {
    const Ops ops = fp4_ops();
    const int shapes[][2] = {{1, 32}, {33, 96}, {128, 64}, {160, 160}, {300, 32}, {64, 2048}};
    const QuantSpec quest = TEST_QUEST, absmax = TEST_ABSMAX(ROTATE_SIGNED, ROUND_STOCHASTIC);
    test_fp4_scales();
    for (int i = 0; i < 6; i++) {
        test_fp4_tiles(shapes[i][0], shapes[i][1]);
        for (int spread = 0; spread <= 48; spread += 16) {
            int octaves = spread == 16 ? 10 : spread;
            test_fp4_operand(&quest, shapes[i][0], shapes[i][1], octaves, 0, spread > 16);
            test_fp4_operand(&absmax, shapes[i][0], shapes[i][1], octaves, 0, spread == 32);
            test_fp4_operand(&absmax, shapes[i][0], shapes[i][1], octaves, 1, spread == 32);
        }
    }
    test_fp4_memory(2048, 32, 32);
    test_fp4_memory(32, 64, 2048);
    test_fp4_memory(512, 640, 96);
    for (int id = 0; id < OPERANDS; id += 2) {
        for (int spread = 0; spread <= 40; spread += 10) {
            test_fp4_product((OperandId)id, 33, 40, 160, spread);
            test_fp4_product((OperandId)id, 150, 24, 64, spread);
        }
    }
    const int layers[][3] = {{32, 32, 32}, {96, 160, 64}, {64, 96, 160}, {2048, 32, 32}, {32, 64, 544}};
    for (int i = 0; i < 10; i++) {
        test_linear_quartet(&ops, i % 2 ? ROUND_STOCHASTIC : ROUND_NEAREST, layers[i / 2][0], layers[i / 2][1],
                            layers[i / 2][2]);
    }
    test_fp4_self_test();
}
