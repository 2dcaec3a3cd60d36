// mxint8.h: what backward may keep as MXINT8 (section mxint8): codes and scales against the definition of OCP MX 1.0 in
// f64, the operations with it, a whole model's gradients and memory by recipe and level of recomputation.
#pragma once
#include "memory.h"
#include "ops.h"

// ---------------------------------------------------------------------------------------------------------------------
// the definition

// one group; returns the scale's byte
static int mxint8_definition(uint8_t* codes, const floatX* x) {
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
    int e = largest > 0.0 ? max_int(ilogb(largest), -120) : -120;
    for (int k = 0; k < GROUP; k++) {
        double v = nearbyint(ldexp((double)floatX_to_f32(x[k]), 6 - e));
        codes[k] = (uint8_t)(int8_t)fmax(fmin(v, 127.0), -127.0);
    }
    return e + 127;
}

static size_t mxint8_faults(const floatX* x, Mxint8 got, int rows, int cols) {
    size_t wrong = 0;
#pragma omp parallel for schedule(static) reduction(+ : wrong)
    for (int64_t group = 0; group < (int64_t)rows * (cols / GROUP); group++) {
        uint8_t codes[GROUP];
        int scale = mxint8_definition(codes, x + group * GROUP);
        wrong += got.scales[group] != scale || memcmp(codes, got.codes + group * GROUP, GROUP) != 0;
    }
    return wrong;
}

static Mxint8 mxint8_new(int rows, int cols) {
    return mxint8_at((size_t)rows, (size_t)cols, malloc_or_die(mxint8_bytes((size_t)rows, (size_t)cols), "test"));
}

// every bf16 number beside a largest one, at both ends of an octave, and alone
static void test_mxint8_encode(void) {
    enum { NUMBERS = 65536 };
    const int octaves[] = {0, 1, 7, 8, 9, 64, 118, 119, 120, 127, 128, 200, 254};
    floatX* x = (floatX*)calloc_or_die((size_t)NUMBERS * GROUP * sizeof(floatX), "test");
    Mxint8 got = mxint8_new(NUMBERS, GROUP);
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
        CPU_OPS.mxint8_pack(got, x, NUMBERS, GROUP);
        size_t wrong = mxint8_faults(x, got, NUMBERS, GROUP);
        expect(wrong == 0, "%zu of 65536 groups with %g are not the definition", wrong, (double)bf16_to_f32(largest));
        got.codes[5 * GROUP + 5] ^= 1;
        expect(mxint8_faults(x, got, NUMBERS, GROUP) == wrong + 1, "a planted code is not seen");
    }
    test_free(x, got.codes);
}

// what is unpacked is what the codes and scales say, in floatX, and packs to the same again; a fault stays one
static void mxint8_expect_unpacked(Mxint8 packed, int rows, int cols) {
    size_t n = (size_t)rows * cols, wrong = 0;
    floatX* values = test_tensor(n, 9, 1.0);
    Mxint8 again = mxint8_new(rows, cols);
    CPU_OPS.mxint8_unpack(values, packed, rows, cols);
    CPU_OPS.mxint8_pack(again, values, rows, cols);
    for (size_t i = 0; i < n; i++) {
        int code = packed.codes[i], scale = packed.scales[i / GROUP];
        double want = scale == 255 ? NAN : ldexp((double)(int8_t)code, scale - 127 - 6);
        double value = (double)floatX_to_f32(values[i]);
        wrong += scale == 255 ? !isnan(value) : value != want;
    }
    expect(wrong == 0, "(%d, %d): %zu values are not what they were packed to", rows, cols, wrong);
    expect(!memcmp(again.codes, packed.codes, n + n / GROUP), "(%d, %d): packed again it changes", rows, cols);
    again.codes[n / 2] ^= 0x81;
    CPU_OPS.mxint8_unpack(values, again, rows, cols);
    CPU_OPS.mxint8_pack(again, values, rows, cols);
    expect(memcmp(again.codes, packed.codes, n + n / GROUP) != 0, "a planted code is not seen");
    test_free(values, again.codes);
}

// groups of numbers of all sizes, of zeros, with faults
static void test_mxint8_groups(int rows, int cols) {
    size_t n = (size_t)rows * cols;
    floatX* x = test_tensor(n, 3, 4.0);
    Mxint8 got = mxint8_new(rows, cols);
    for (size_t i = 0; i < n; i++) {
        size_t group = i / GROUP;
        float v = floatX_to_f32(x[i]);
        v = group % 5 == 0 ? 0.0f * v : group % 5 == 1 ? ldexpf(v, (int)(group % 250) - 130) : v;
        v = group % 5 != 2 || i % GROUP != group % GROUP ? v : group % 3 ? -INFINITY : NAN;
        x[i] = f32_to_floatX(v);
    }
    CPU_OPS.mxint8_pack(got, x, rows, cols);
    expect(mxint8_faults(x, got, rows, cols) == 0, "groups of (%d, %d) are not the definition", rows, cols);
    mxint8_expect_unpacked(got, rows, cols);
    int decoded = 1;
    for (int scale = 7; scale < 256; scale++) {
        for (int code = 0; code < 256; code++) {
            float value = mxint8_decode((uint32_t)code, (uint32_t)scale);
            double want = ldexp((double)(int8_t)code, scale - 127 - 6);
            decoded &= scale == 255 ? isnan(value) : code == 0x80 || (double)value == want;  // -128 is never made
        }
    }
    expect(decoded, "a code is not decoded exactly");
    test_free(x, got.codes);
}

// ---------------------------------------------------------------------------------------------------------------------
// operations

// with kept forward is the same, and backward is that of kept's values; fused as not
static void test_mxint8_swiglu(int BT, int F, double scale) {
    size_t n = (size_t)BT * F;
    floatX *x = test_tensor(2 * n, 1, scale), *dy = test_tensor(n, 2, 1.0), *values = test_tensor(2 * n, 3, 1.0);
    floatX *out[2], *dx[2];
    uint32_t* mask = (uint32_t*)malloc_or_die(n / 8, "test");
    Mxint8 kept = mxint8_new(BT, 2 * F);
    for (int k = 0; k < 2; k++) {
        out[k] = test_tensor(n, 4, 1.0), dx[k] = test_tensor(2 * n, 5, 1.0);
    }
    memset(mask, 0x5e, n / 8);
    CPU_OPS.swiglu_forward(out[0], MXINT8_NONE, x, BT, F);
    CPU_OPS.swiglu_forward(out[1], kept, x, BT, F);
    expect(!memcmp(out[0], out[1], n * sizeof(floatX)) && mxint8_faults(x, kept, BT, 2 * F) == 0,
           "swiglu %d x %d that keeps its input", BT, F);
    for (size_t i = 0; i < 2 * n; i++) {
        values[i] = f32_to_floatX(mxint8_decode(kept.codes[i], kept.scales[i / GROUP]));
    }
    CPU_OPS.swiglu_backward(dx[0], dy, values, MXINT8_NONE, BT, F);
    CPU_OPS.swiglu_backward(dx[1], dy, NULL, kept, BT, F);
    expect(!memcmp(dx[0], dx[1], 2 * n * sizeof(floatX)), "swiglu backward %d x %d of MXINT8", BT, F);
    memcpy(out[0], dy, n * sizeof(floatX));
    CPU_OPS.unrotate(real_floatX(out[0]), mask, NULL, BT, F);
    CPU_OPS.swiglu_backward(dx[0], out[0], values, MXINT8_NONE, BT, F);
    CPU_OPS.unrotate_swiglu_backward(dx[1], dy, mask, NULL, NULL, kept, BT, F);
    expect(!memcmp(dx[0], dx[1], 2 * n * sizeof(floatX)), "unrotate_swiglu_backward %d x %d of MXINT8", BT, F);
    kept.codes[n] ^= 1;
    CPU_OPS.swiglu_backward(dx[1], out[0], NULL, kept, BT, F);
    expect(memcmp(dx[0], dx[1], 2 * n * sizeof(floatX)) != 0, "a planted code is not seen");
    test_free(x, dy, values, out[0], out[1], dx[0], dx[1], mask, kept.codes);
}

// a fault in a group of gate or up is one in its elements' gradients
static void test_mxint8_nan(void) {
    const int F = 64;
    floatX *x = test_tensor(2 * F, 1, 1.0), *dy = test_tensor(F, 2, 1.0), *dx = test_tensor(2 * F, 3, 1.0);
    floatX* act = test_tensor(F, 4, 1.0);
    Mxint8 kept = mxint8_new(1, 2 * F);
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

static Model mxint8_model(const char* recipe, Recompute level, int dense, SavedInt8 choice) {
    Model exact = memory_model(recipe, level, 0, dense, dense), model;
    TrainingMemory training = exact.training;
    training.saved_int8 = choice;
    model_prepare(&model, &CPU_OPS, &exact.config, exact.recipe, training, exact.B, exact.T);
    model.linear.option_rounding = ROUND_STOCHASTIC;
    model_allocate(&model);
    model_init_weights(&model, 5);
    model_free(&exact);
    return model;
}

typedef struct {
    float* grads;
    double loss;
    size_t bytes, count;
    Range blocks;  // their gradients
} Mxint8Run;

// frees the model
static Mxint8Run mxint8_take(Model* model) {
    Mxint8Run run = {NULL, model_read_control(model).loss_sum, model->memory_bytes[MEMORY_ACTIVATIONS],
                    model->table.elements,
                    {model_param(model, P_NORM1, 0)->offset, model->table.block_size * (size_t)model->config.L}};
    run.grads = (float*)malloc_or_die(run.count * sizeof(float), "test");
    memcpy(run.grads, model->grads.data, run.count * sizeof(float));
    model_free(model);
    return run;
}

static Mxint8Run mxint8_run(const char* recipe, int level, int dense, SavedInt8 choice, uint64_t seed) {
    Model model = mxint8_model(recipe, (Recompute)level, dense, choice);
    model.linear.seed = seed;
    memory_gradients(&model);
    memory_gradients(&model);  // starts from what the first left in the buffers
    return mxint8_take(&model);
}

static int mxint8_same(const Mxint8Run* a, const Mxint8Run* b) {
    return !memcmp(a->grads, b->grads, a->count * sizeof(float));
}

// what --saved-int8 promises of a block at that level of recomputation
static int mxint8_promised(SavedInt8 choice, int level, int dense, SavedTensor tensor) {
    if (tensor == SAVED_GATE_UP) {
        return choice != SAVED_INT8_NONE && (level == RECOMPUTE_NONE || (level == RECOMPUTE_NORM && !dense));
    }
    int kept = tensor == SAVED_QKV ? level <= RECOMPUTE_FFN : level == RECOMPUTE_NONE;
    return choice == SAVED_INT8_ALL && kept && !(tensor == SAVED_ATT && dense);
}

// What such a run is: forward keeps everything, then what is promised goes through MXINT8, then backward. What else is
// made of those tensors has been made before, but for SwiGLU's output of dense blocks, which is kept. skip: a tensor
// that stays as it is.
static Mxint8Run mxint8_oracle(const char* recipe, int level, int dense, SavedInt8 choice, int skip) {
    Model model = mxint8_model(recipe, RECOMPUTE_NONE, dense, SAVED_INT8_NONE);
    memory_forward(&model);
    for (int l = 0; l < model.config.L; l++) {
        for (int t = 0; t < SAVED_TENSORS; t++) {
            int columns = saved_columns(&model.config, (SavedTensor)t);
            floatX* x = block_tensor(&model.blocks[l], (SavedTensor)t);
            Mxint8 packed = mxint8_new(64, columns);
            if (t != skip && mxint8_promised(choice, level, block_is_dense(&model, l), (SavedTensor)t)) {
                CPU_OPS.mxint8_pack(packed, x, 64, columns);
                CPU_OPS.mxint8_unpack(x, packed, 64, columns);
            }
            free(packed.codes);
        }
    }
    model_backward(&model);
    model_finish_gradients(&model);
    return mxint8_take(&model);
}

// |factor a - b| / |b| of the blocks' gradients
static double mxint8_distance(const Mxint8Run* a, const Mxint8Run* b, double factor) {
    double far = 0.0, size = 0.0;
    for (size_t i = a->blocks.begin; i < a->blocks.begin + a->blocks.count; i++) {
        far += pow(factor * (double)a->grads[i] - (double)b->grads[i], 2);
        size += pow((double)b->grads[i], 2);
    }
    return sqrt(far / size);
}

static void test_mxint8_level(const char* recipe, int dense, int level, SavedInt8 choice) {
    Mxint8Run exact = mxint8_run(recipe, level, dense, SAVED_INT8_NONE, 0);
    Mxint8Run run = mxint8_run(recipe, level, dense, choice, 0);
    Mxint8Run want = mxint8_oracle(recipe, level, dense, choice, SAVED_TENSORS);
    const char *what = SAVED_INT8_NAMES[choice], *name = RECOMPUTE_NAMES[level];
    int quantizes = recipe_find(recipe)->x.format != FORMAT_FLOATX, effect = 0;
    expect(mxint8_same(&run, &want) && run.loss == exact.loss,
           "%s, %d dense, --recompute %s, --saved-int8 %s: gradients are not those of what is promised, or loss %.9g "
           "instead of %.9g", recipe, dense, name, what, run.loss, exact.loss);
    for (int t = 0; t < SAVED_TENSORS; t++) {
        if (mxint8_promised(choice, level, !quantizes, (SavedTensor)t)) {
            Mxint8Run planted = mxint8_oracle(recipe, level, dense, choice, t);
            expect(!mxint8_same(&planted, &want), "%s, --recompute %s, --saved-int8 %s: tensor %d makes no difference",
                   recipe, name, what, t);
            free(planted.grads);
            effect = 1;
        }
    }
    expect(effect || (run.bytes == exact.bytes && mxint8_same(&run, &exact)),
           "%s, --recompute %s, --saved-int8 %s: %zu bytes instead of %zu", recipe, name, what, run.bytes,
           exact.bytes);
    // An element's rounding is at most 2^-7 of its group's largest, and a group's length at least that. Each tensor adds
    // its own to the gradients behind it, up to five a block of three. Where those gradients are quantized again, any
    // change rounds others differently, by 2^-4 of them (fp8). Of quartet, half of what other signs do is allowed.
    int tensors = choice == SAVED_INT8_FFN ? 1 : SAVED_TENSORS;
    double far = mxint8_distance(&run, &exact, 1.0), allowed = sqrt(3.0 * tensors) * (quantizes ? 0.0625 : 0.0078125);
    if (!strcmp(recipe, "quartet")) {
        Mxint8Run other = mxint8_run(recipe, level, dense, SAVED_INT8_NONE, 77);
        allowed = 0.5 * mxint8_distance(&other, &exact, 1.0);
        free(other.grads);
    }
    expect(far <= allowed, "%s, --recompute %s, --saved-int8 %s: gradients are %.3g apart", recipe, name, what, far);
    expect(mxint8_distance(&run, &exact, 1.0 + 2.0 * allowed) > allowed, "longer gradients are not seen");
    test_free(exact.grads, run.grads, want.grads);
}

// MXINT8 of one more block takes as much less as the format says, and at norm the operand of down is kept instead of
// made again
static void test_mxint8_bytes(void) {
    const size_t columns[SAVED_TENSORS] = {64, 128, 64, 64, 192};
    const char* const recipes[] = {"bf16", "fp8", "quartet"};
    for (int i = 0; i < 3 * RECOMPUTE_LEVELS * SAVED_INT8_CHOICES; i++) {
        int k = i % 3, level = i / 3 % RECOMPUTE_LEVELS;
        SavedInt8 choice = (SavedInt8)(i / 3 / RECOMPUTE_LEVELS);
        size_t down = (size_t)round_up((int64_t)qtensor_bytes(&recipe_find(recipes[k])->x, 64, 96), 256), want = 0;
        for (int t = 0; t < SAVED_TENSORS; t++) {
            size_t n = 64 * columns[t], packed = (size_t)round_up((int64_t)n * 33 / 32, 256);
            want += mxint8_promised(choice, level, k == 0, (SavedTensor)t) ? n * sizeof(floatX) - packed : 0;
        }
        want -= choice != SAVED_INT8_NONE && level == RECOMPUTE_NORM && k > 0 ? down : 0;
        size_t exact = memory_block_bytes(recipes[k], (Recompute)level, SAVED_INT8_NONE);
        size_t bytes = memory_block_bytes(recipes[k], (Recompute)level, choice);
        expect(exact - bytes == want, "%s, --recompute %s, --saved-int8 %s: a block keeps %zu bytes instead of %zu",
               recipes[k], RECOMPUTE_NAMES[level], SAVED_INT8_NAMES[choice], bytes, exact - want);
    }
}

// bytes a token that `layers` blocks of llama2-7b keep, and all that goes with them
static double mxint8_activations(const char* recipe, SavedInt8 choice, int layers) {
    ModelConfig m = preset_model(preset_find("llama2-7b"));
    TrainingMemory training = MEMORY_EXACT;
    Model model;
    training.saved_int8 = choice;
    m.L = layers;
    model_prepare(&model, &CPU_OPS, &m, recipe_find(recipe), training, 8, 2048);
    double bytes = (double)model.memory_bytes[MEMORY_ACTIVATIONS] / (8 * 2048);
    model_free_tables(&model);
    return bytes;
}

// the target: of a 7B block at most half of what bf16 keeps, counted as a block more and as the whole of 32
static void test_mxint8_share(void) {
    for (int choice = 0; choice < SAVED_INT8_CHOICES; choice++) {
        double whole = mxint8_activations("quartet", (SavedInt8)choice, 32);
        double block = whole - mxint8_activations("quartet", (SavedInt8)choice, 31);
        double dense = mxint8_activations("bf16", SAVED_INT8_NONE, 32);
        double dense_block = dense - mxint8_activations("bf16", SAVED_INT8_NONE, 31);
        printf("  llama2-7b, --saved-int8 %s: a quartet block keeps %.1f KB a token, %.3f of bf16's; of all %.3f\n",
               SAVED_INT8_NAMES[choice], block / 1024, block / dense_block, whole / dense);
        int half = block <= 0.5 * dense_block && whole <= 0.5 * dense;
        expect(half == (choice == SAVED_INT8_ALL), "--saved-int8 %s: %.3f and %.3f", SAVED_INT8_NAMES[choice],
               block / dense_block, whole / dense);
    }
}

static ModelConfig mxint8_shape;
static void mxint8_odd_shape(void* choice) {
    Model model;
    TrainingMemory training = MEMORY_EXACT;
    training.saved_int8 = *(SavedInt8*)choice;
    model_prepare(&model, &CPU_OPS, &mxint8_shape, recipe_find("bf16"), training, 2, 32);
}

static void test_mxint8_shapes(void) {
    const struct { SavedInt8 choice; int C, NH, NKV, HS, F; const char* words; } cases[] = {
        {SAVED_INT8_FFN, 64, 4, 2, 16, 100, "--saved-int8 ffn needs --ffn to be a multiple of 32, but it is 100; 96 and 128"},
        {SAVED_INT8_ALL, 64, 4, 2, 16, 100, "--saved-int8 all needs --ffn to be a multiple of 32, but it is 100; 96 and 128"},
        {SAVED_INT8_ALL, 48, 4, 2, 16, 96, "--saved-int8 all needs --channels to be a multiple of 32, but it is 48; 32 and 64"},
        {SAVED_INT8_ALL, 64, 3, 1, 16, 96, "(--heads + 2 x --kv-heads) x head size to be a multiple of 32, but it is 80"},
        {SAVED_INT8_ALL, 96, 6, 1, 8, 96, "--heads x head size to be a multiple of 32, but it is 48; 32 and 64"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        mxint8_shape = (ModelConfig){.name = {}, .L = 1, .C = cases[i].C, .NH = cases[i].NH, .NKV = cases[i].NKV,
                                    .HS = cases[i].HS, .F = cases[i].F, .V = 50, .tied = 0, .max_positions = 32,
                                    .rope_theta = 10000.0, .rms_eps = 1e-5, .rope_factor = 0, .rope_low = 1,
                                    .rope_high = 4, .rope_original = 16};
        SavedInt8 choice = cases[i].choice;
        expect_exit(EXIT_USAGE, cases[i].words, mxint8_odd_shape, &choice);
    }
}

static void test_mxint8(void) {
    test_mxint8_encode();
    test_mxint8_groups(7, 32);
    test_mxint8_groups(33, 1792);
    test_mxint8_swiglu(1, 32, 1.0);
    test_mxint8_swiglu(5, 1792, 4.0);
    test_mxint8_swiglu(33, 96, 30.0);
    test_mxint8_nan();
    const struct { const char* recipe; int dense; } models[] = {{"bf16", 0}, {"fp8", 0}, {"quartet", 0}, {"quartet", 1}};
    for (int i = 0; i < 4 * RECOMPUTE_LEVELS; i++) {
        test_mxint8_level(models[i % 4].recipe, models[i % 4].dense, i / 4, SAVED_INT8_FFN);
        test_mxint8_level(models[i % 4].recipe, models[i % 4].dense, i / 4, SAVED_INT8_ALL);
    }
    test_mxint8_bytes();
    test_mxint8_share();
    test_mxint8_shapes();
}
