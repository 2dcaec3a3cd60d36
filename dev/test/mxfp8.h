// mxfp8.h: gate_up as backward may keep it, MXFP8 (section mxfp8): codes and scales against the definition of OCP MX 1.0
// in f64, SwiGLU with it, a whole model's gradients and memory by recipe and level of recomputation.
#pragma once
#include "memory.h"
#include "ops.h"

// ---------------------------------------------------------------------------------------------------------------------
// the definition

static double mxfp8_magnitudes[128];  // of the codes 0 to 0x7e

// nearest by search; halves to the even code; 448 beyond
static int mxfp8_nearest(double x) {
    int low = 0, high = 0x7e;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        *(mxfp8_magnitudes[middle] <= x ? &low : &high) = middle;
    }
    double below = x - mxfp8_magnitudes[low], above = mxfp8_magnitudes[high] - x;
    return below < above || (below == above && low % 2 == 0) ? low : high;
}

// one group; returns the scale's byte
static int mxfp8_definition(uint8_t* codes, const floatX* x) {
    double largest = 0.0;
    int faults = 0;
    for (int k = 0; k < GROUP; k++) {
        double v = fabs((double)floatX_to_f32(x[k]));
        faults += !isfinite(v);
        largest = fmax(largest, v);
    }
    if (faults) {
        memset(codes, 0x7f, GROUP);
        return 255;
    }
    int e = largest > 0.0 ? max_int(ilogb(largest) - 8, -127) : -127;
    for (int k = 0; k < GROUP; k++) {
        double v = (double)floatX_to_f32(x[k]);
        codes[k] = (uint8_t)(mxfp8_nearest(ldexp(fabs(v), -e)) | (signbit(v) ? 0x80 : 0));
    }
    return e + 127;
}

static size_t mxfp8_faults(const floatX* x, Mxfp8 got, int rows, int cols) {
    size_t wrong = 0;
#pragma omp parallel for schedule(static) reduction(+ : wrong)
    for (int64_t group = 0; group < (int64_t)rows * (cols / GROUP); group++) {
        uint8_t codes[GROUP];
        int scale = mxfp8_definition(codes, x + group * GROUP);
        wrong += got.scales[group] != scale || memcmp(codes, got.codes + group * GROUP, GROUP) != 0;
    }
    return wrong;
}

static Mxfp8 mxfp8_new(int rows, int cols) {
    return mxfp8_at((size_t)rows, (size_t)cols, malloc_or_die(mxfp8_bytes((size_t)rows, (size_t)cols), "test"));
}

// every bf16 number beside a largest one, at both ends of an octave, and alone
static void test_mxfp8_encode(void) {
    enum { NUMBERS = 65536 };
    const int octaves[] = {0, 1, 7, 8, 9, 64, 118, 119, 120, 127, 128, 200, 254};
    floatX* x = (floatX*)calloc_or_die((size_t)NUMBERS * GROUP * sizeof(floatX), "test");
    Mxfp8 got = mxfp8_new(NUMBERS, GROUP);
    uint64_t state = 17;
    for (int top = 0; top < 26; top++) {
        bf16 largest = {(uint16_t)(octaves[top / 2] << 7 | (top % 2 ? 0x7f : 0))};
        for (int i = 0; i < NUMBERS; i++) {
            floatX* group = x + (size_t)i * GROUP;
            bf16 number = {(uint16_t)i};
            for (int k = 0; k < 4; k++) {  // some of its size
                group[8 * k + 3] = f32_to_floatX(bf16_to_f32(number) * (float)(test_random(&state) % 512) / 512.0f);
            }
            group[5] = f32_to_floatX(bf16_to_f32(number));
            group[17] = f32_to_floatX(-bf16_to_f32(largest));
        }
        mxfp8_encode(got, x, NUMBERS, GROUP);
        size_t wrong = mxfp8_faults(x, got, NUMBERS, GROUP);
        expect(wrong == 0, "%zu of 65536 groups with %g are not the definition", wrong, (double)bf16_to_f32(largest));
        got.codes[5 * GROUP + 5] ^= 1;
        expect(mxfp8_faults(x, got, NUMBERS, GROUP) == wrong + 1, "a planted code is not seen");
    }
    test_free(x, got.codes);
}

// groups of numbers of all sizes, of zeros, with faults
static void test_mxfp8_groups(int rows, int cols) {
    size_t n = (size_t)rows * cols;
    floatX* x = test_tensor(n, 3, 4.0);
    Mxfp8 got = mxfp8_new(rows, cols);
    for (size_t i = 0; i < n; i++) {
        size_t group = i / GROUP;
        float v = floatX_to_f32(x[i]);
        v = group % 5 == 0 ? 0.0f * v : group % 5 == 1 ? ldexpf(v, (int)(group % 250) - 130) : v;
        v = group % 5 != 2 || i % GROUP != group % GROUP ? v : group % 3 ? -INFINITY : NAN;
        x[i] = f32_to_floatX(v);
    }
    mxfp8_encode(got, x, rows, cols);
    expect(mxfp8_faults(x, got, rows, cols) == 0, "groups of (%d, %d) are not the definition", rows, cols);
    int decoded = 1;
    for (int scale = 0; scale < 256; scale++) {
        for (int code = 0; code < 256; code++) {
            float value = mxfp8_decode((uint32_t)code, (uint32_t)scale);
            double want = ldexp(mxfp8_magnitudes[code & 0x7f] * (code & 0x80 ? -1.0 : 1.0), scale - 127);
            want = scale > 246 ? want * 0.0 : want;  // never made, but for 255
            decoded &= scale == 255 || (code & 0x7f) == 0x7f ? isnan(value) : scale > 246 || (double)value == want;
        }
    }
    expect(decoded, "a code is not decoded exactly");
    test_free(x, got.codes);
}

// ---------------------------------------------------------------------------------------------------------------------
// operations

// with kept forward is the same, and backward is that of kept's values; fused as not
static void test_mxfp8_swiglu(int BT, int F, double scale) {
    size_t n = (size_t)BT * F;
    floatX *x = test_tensor(2 * n, 1, scale), *dy = test_tensor(n, 2, 1.0), *values = test_tensor(2 * n, 3, 1.0);
    floatX *out[2], *dx[2];
    uint32_t* mask = (uint32_t*)malloc_or_die(n / 8, "test");
    Mxfp8 kept = mxfp8_new(BT, 2 * F);
    for (int k = 0; k < 2; k++) {
        out[k] = test_tensor(n, 4, 1.0), dx[k] = test_tensor(2 * n, 5, 1.0);
    }
    memset(mask, 0x5e, n / 8);
    CPU_OPS.swiglu_forward(out[0], MXFP8_NONE, x, BT, F);
    CPU_OPS.swiglu_forward(out[1], kept, x, BT, F);
    expect(!memcmp(out[0], out[1], n * sizeof(floatX)) && mxfp8_faults(x, kept, BT, 2 * F) == 0,
           "swiglu %d x %d that keeps its input", BT, F);
    for (size_t i = 0; i < 2 * n; i++) {
        values[i] = f32_to_floatX(mxfp8_decode(kept.codes[i], kept.scales[i / GROUP]));
    }
    CPU_OPS.swiglu_backward(dx[0], dy, values, MXFP8_NONE, BT, F);
    CPU_OPS.swiglu_backward(dx[1], dy, NULL, kept, BT, F);
    expect(!memcmp(dx[0], dx[1], 2 * n * sizeof(floatX)), "swiglu backward %d x %d of MXFP8", BT, F);
    memcpy(out[0], dy, n * sizeof(floatX));
    CPU_OPS.unrotate(real_floatX(out[0]), mask, NULL, BT, F);
    CPU_OPS.swiglu_backward(dx[0], out[0], values, MXFP8_NONE, BT, F);
    CPU_OPS.unrotate_swiglu_backward(dx[1], dy, mask, NULL, NULL, kept, BT, F);
    expect(!memcmp(dx[0], dx[1], 2 * n * sizeof(floatX)), "unrotate_swiglu_backward %d x %d of MXFP8", BT, F);
    kept.codes[n] ^= 1;
    CPU_OPS.swiglu_backward(dx[1], out[0], NULL, kept, BT, F);
    expect(memcmp(dx[0], dx[1], 2 * n * sizeof(floatX)) != 0, "a planted code is not seen");
    test_free(x, dy, values, out[0], out[1], dx[0], dx[1], mask, kept.codes);
}

// a fault in a group of gate or up is one in its elements' gradients
static void test_mxfp8_nan(void) {
    const int F = 64;
    floatX *x = test_tensor(2 * F, 1, 1.0), *dy = test_tensor(F, 2, 1.0), *dx = test_tensor(2 * F, 3, 1.0);
    floatX* act = test_tensor(F, 4, 1.0);
    Mxfp8 kept = mxfp8_new(1, 2 * F);
    for (int k = 0; k < 2; k++) {
        x[k ? 7 : F + 40] = f32_to_floatX(k ? NAN : INFINITY);
        CPU_OPS.swiglu_forward(act, kept, x, 1, F);
        CPU_OPS.swiglu_backward(dx, dy, NULL, kept, 1, F);
        int nans = 0;
        for (int i = 0; i < F; i++) {
            nans += isnan(floatX_to_f32(dx[i]));
        }
        expect(nans == (k ? F : GROUP), "%d gradients are NaN", nans);
    }
    test_free(x, dy, dx, act, kept.codes);
}

// ---------------------------------------------------------------------------------------------------------------------
// a model

static Model mxfp8_model(const char* recipe, Recompute level, int dense, int fp8) {
    Model exact = memory_model(recipe, level, 0, dense, dense), model;
    TrainingMemory training = exact.training;
    training.gate_up_fp8 = fp8;
    model_prepare(&model, &CPU_OPS, &exact.config, exact.recipe, training, exact.B, exact.T);
    model.linear.option_rounding = ROUND_STOCHASTIC;
    model_allocate(&model);
    model_init_weights(&model, 5);
    model_free(&exact);
    return model;
}

typedef struct { float* grads; double loss; size_t bytes, count; } Mxfp8Run;

static Mxfp8Run mxfp8_run(const char* recipe, int level, int dense, int fp8) {
    Model model = mxfp8_model(recipe, (Recompute)level, dense, fp8);
    memory_gradients(&model);
    memory_gradients(&model);  // starts from what the first left in the buffers
    Mxfp8Run run = {NULL, model_read_control(&model).loss_sum, model.memory_bytes[MEMORY_ACTIVATIONS],
                    model.table.elements};
    run.grads = (float*)malloc_or_die(run.count * sizeof(float), "test");
    memcpy(run.grads, model.grads.data, run.count * sizeof(float));
    model_free(&model);
    return run;
}

static int mxfp8_same(const Mxfp8Run* a, const Mxfp8Run* b) {
    return !memcmp(a->grads, b->grads, a->count * sizeof(float));
}

// Where gate_up is made again, backward is exact; where it is kept as MXFP8, levels agree. Of a dense block that is the
// level none only. The loss never changes. An element's rounding, at most 2^-4 of it but for those that saturate,
// bounds the distance of the gradients.
static void test_mxfp8_model(const char* recipe, int dense) {
    Mxfp8Run exact[RECOMPUTE_LEVELS], kept[RECOMPUTE_LEVELS];
    int all_dense = recipe_find(recipe)->x.format == FORMAT_FLOATX;
    for (int level = 0; level < RECOMPUTE_LEVELS; level++) {
        exact[level] = mxfp8_run(recipe, level, dense, 0), kept[level] = mxfp8_run(recipe, level, dense, 1);
        int effect = level < (all_dense ? RECOMPUTE_NORM : RECOMPUTE_FFN);
        expect(mxfp8_same(&exact[level], &kept[level]) == !effect && exact[level].loss == kept[level].loss,
               "%s, %d dense, --recompute %s: gradients %s, loss %.9g instead of %.9g", recipe, dense,
               RECOMPUTE_NAMES[level], effect ? "do not change" : "change", kept[level].loss, exact[level].loss);
        expect(effect || kept[level].bytes == exact[level].bytes,
               "%s, %d dense, --recompute %s: %zu bytes instead of %zu", recipe, dense, RECOMPUTE_NAMES[level],
               kept[level].bytes, exact[level].bytes);
    }
    if (!all_dense) {
        expect(mxfp8_same(&kept[0], &kept[1]) == !dense, "%s, %d dense: levels none and norm", recipe, dense);
    }
    double far = 0.0, size = 0.0, product = 0.0;
    for (size_t i = 0; i < exact[0].count; i++) {
        far += pow((double)exact[0].grads[i] - (double)kept[0].grads[i], 2);
        size += pow((double)exact[0].grads[i], 2);
        product += (double)exact[0].grads[i] * (double)kept[0].grads[i];
    }
    expect(sqrt(far / size) < 0.0625 && product > 0.99 * size, "%s: gradients are %.3g apart", recipe, sqrt(far / size));
    for (int level = 0; level < RECOMPUTE_LEVELS; level++) {
        test_free(exact[level].grads, kept[level].grads);
    }
}

// one more block keeps as much less as the format says, and at norm the operand of down instead of making it again
static void test_mxfp8_bytes(void) {
    const size_t gate_up = 64 * 2 * 96;
    size_t saved = gate_up * sizeof(floatX) - (size_t)round_up((int64_t)gate_up * 33 / 32, 256);
    const char* const recipes[] = {"bf16", "fp8", "quartet"};
    for (int k = 0; k < 3; k++) {
        size_t down = (size_t)round_up((int64_t)qtensor_bytes(&recipe_find(recipes[k])->x, 64, 96), 256);
        for (int level = 0; level < RECOMPUTE_LEVELS; level++) {
            size_t want = level == 0 ? saved : level == 1 && k > 0 ? saved - down : 0;
            size_t bytes[2];
            for (int fp8 = 0; fp8 < 2; fp8++) {
                bytes[fp8] = memory_block_bytes(recipes[k], (Recompute)level, fp8);
            }
            expect(bytes[0] - bytes[1] == want, "%s, --recompute %s: a block keeps %zu bytes instead of %zu", recipes[k],
                   RECOMPUTE_NAMES[level], bytes[1], bytes[0] - want);
        }
    }
}

static void mxfp8_odd_width(void*) {
    Model model;
    ModelConfig m = {.name = {}, .L = 1, .C = 64, .NH = 4, .NKV = 2, .HS = 16, .F = 100, .V = 50, .tied = 0,
                     .max_positions = 32, .rope_theta = 10000.0, .rms_eps = 1e-5, .rope_factor = 0, .rope_low = 1,
                     .rope_high = 4, .rope_original = 16};
    TrainingMemory training = MEMORY_EXACT;
    training.gate_up_fp8 = 1;
    model_prepare(&model, &CPU_OPS, &m, recipe_find("bf16"), training, 2, 32);
}

static void test_mxfp8(void) {
    for (int code = 0; code < 128; code++) {
        mxfp8_magnitudes[code] = code < 8 ? ldexp(code, -9) : ldexp(8 + code % 8, code / 8 - 10);
    }
    test_mxfp8_encode();
    test_mxfp8_groups(7, 32);
    test_mxfp8_groups(33, 1792);
    test_mxfp8_swiglu(1, 32, 1.0);
    test_mxfp8_swiglu(5, 1792, 4.0);
    test_mxfp8_swiglu(33, 96, 30.0);
    test_mxfp8_nan();
    test_mxfp8_model("bf16", 0);
    test_mxfp8_model("fp8", 0);
    test_mxfp8_model("quartet", 0);
    test_mxfp8_model("quartet", 1);
    test_mxfp8_bytes();
    expect_exit(EXIT_USAGE, "--gate-up-dtype fp8 needs an --ffn that is a multiple of 32, but it is 100; 96 and 128",
                mxfp8_odd_width, NULL);
}
