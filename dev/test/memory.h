// memory.h: what changes how much memory a run takes: stochastic rounding, AdamW without a master copy, gradients in
// floatX, recomputation, and the choice of what fits.
#pragma once
#include "gradient.h"
#include "harness.h"
#include "run.h"
#include "update.h"

// of the 65536 random numbers as many round away from zero as x lies above its lower neighbour
static void test_stochastic_bf16(void) {
    const float values[] = {1.0f, 1.003f, -2.718f, 3e-39f, 1e-45f, -6.5e37f, 0.0f, -0.0f};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        uint32_t bits = f32_bits(values[i]), ups = 0, other = 0;
        for (uint32_t random = 0; random < 65536; random++) {
            uint32_t code = f32_to_bf16_stochastic(values[i], random).bits;
            ups += code == (bits >> 16) + 1;
            other += code != bits >> 16 && code != (bits >> 16) + 1;
        }
        expect(ups == (bits & 0xffffu) && other == 0, "%g: %u of 65536 round up, %u elsewhere", (double)values[i], ups,
               other);
    }
    expect(f32_to_bf16_stochastic(INFINITY, 65535).bits == 0x7f80 &&
           f32_to_bf16_stochastic(-INFINITY, 65535).bits == 0xff80 &&
           bf16_to_f32(f32_to_bf16_stochastic(NAN, 65535)) != bf16_to_f32(f32_to_bf16_stochastic(NAN, 65535)),
           "infinity or NaN changes");
}

typedef struct { floatX *param, *m16, *v16, *grad16; float *master, *m, *v, *grad; } LeanState;

static LeanState lean_state(size_t n) {
    LeanState s;
    s.param = test_tensor(n, 5, 1.0), s.m16 = test_tensor(n, 6, 0.01), s.v16 = test_tensor(n, 7, 0.01);
    s.grad16 = test_tensor(n, 8, 0.1);
    float** wide[] = {&s.master, &s.m, &s.v, &s.grad};
    floatX* narrow[] = {s.param, s.m16, s.v16, s.grad16};
    for (int k = 0; k < 4; k++) {
        *wide[k] = (float*)malloc_or_die(n * sizeof(float), "test");
        for (size_t i = 0; i < n; i++) {
            narrow[k][i] = k == 2 ? f32_to_floatX(fabsf(floatX_to_f32(narrow[k][i]))) : narrow[k][i];
            (*wide[k])[i] = floatX_to_f32(narrow[k][i]);
        }
    }
    return s;
}

// Without a master copy and with narrow state the update is the exact one, rounded by the promised random bits.
static void test_adamw_lean(size_t n, size_t first) {
    LeanState s = lean_state(n);
    StepControl control = test_control(1e-3f, 0.9, 0.95, 3);
    AdamwArgs exact = {.param = test_tensor(n, 5, 1.0), .master = s.master, .m = real_f32(s.m), .v = real_f32(s.v),
                       .grad = real_f32(s.grad), .first = first, .count = n, .beta1 = 0.9f, .beta2 = 0.95f,
                       .eps = 1e-8f, .weight_decay = 0.1f, .seed = 99, .control = &control};
    AdamwArgs lean = exact;
    lean.param = s.param, lean.master = NULL, lean.m = real_floatX(s.m16), lean.v = real_floatX(s.v16);
    lean.grad = real_floatX(s.grad16);
    CPU_OPS.adamw(&exact);
    CPU_OPS.adamw(&lean);
    uint64_t stream = rand_stream(RAND_UPDATE, 0, 0, control.update);
    int same[3] = {1, 1, 1}, shifted = 1;
    for (size_t i = 0; i < n; i++) {
        const float wide[] = {s.master[i], s.m[i], s.v[i]};
        const floatX narrow[] = {s.param[i], s.m16[i], s.v16[i]};
        for (uint64_t k = 0; k < 3; k++) {
            floatX want = f32_to_floatX_stochastic(wide[k], round_bits(99, stream, k << 56, first + i));
            same[k] &= !memcmp(&want, &narrow[k], sizeof want);
        }
        floatX other = f32_to_floatX_stochastic(wide[0], round_bits(99, stream, 0, first + i + 1));
        shifted &= !memcmp(&other, &narrow[0], sizeof other);
    }
    expect(same[0] && same[1] && same[2], "n %zu from %zu: param %d, m %d, v %d", n, first, same[0], same[1], same[2]);
    expect(sizeof(floatX) == 4 || !shifted, "the random bits of the neighbour are not told apart");
    test_free(s.param, s.m16, s.v16, s.grad16, s.master, s.m, s.v, s.grad, exact.param);
}

// an update far below the distance of two bf16 numbers moves the mean as it should; rounded to nearest it is lost
static void test_adamw_small_updates(void) {
    const size_t n = 1 << 18;
    float* zeros = (float*)calloc_or_die(3 * n * sizeof(float), "test");
    floatX* param = (floatX*)malloc_or_die(n * sizeof(floatX), "test");
    for (size_t i = 0; i < n; i++) {
        param[i] = f32_to_floatX(1.0f);
        zeros[2 * n + i] = 1.0f;
    }
    StepControl control = test_control(1e-4f, 0.9, 0.95, 1);
    AdamwArgs args = {.param = param, .master = NULL, .m = real_f32(zeros), .v = real_f32(zeros + n),
                      .grad = real_f32(zeros + 2 * n), .first = 0, .count = n, .beta1 = 0.9f, .beta2 = 0.95f,
                      .eps = 1e-8f, .weight_decay = 0.0f, .seed = 7, .control = &control};
    CPU_OPS.adamw(&args);
    double mean = 0.0;
    for (size_t i = 0; i < n; i++) {
        mean += floatX_to_f32(param[i]) / (double)n;
    }
    double step = 0x1p-8, p = 1e-4 / step, deviation = step * sqrt(p * (1 - p) / (double)n);
    expect(fabs(mean - (1.0 - 1e-4)) < 5 * deviation + 1e-7, "mean %.8f after an update of 1e-4", mean);
    expect(fabs(1.0 - (1.0 - 1e-4)) > 5 * deviation + 1e-7, "a lost update would not be seen");
    test_free(zeros, param);
}

// gradients in floatX: what f32 gradients would be, rounded once an operation
static void test_narrow_gradients(void) {
    const int BT = 40, C = 24, V = 9;
    floatX *dout = test_tensor((size_t)BT * C, 3, 1.0), *x = test_tensor((size_t)BT * C, 4, 1.0);
    floatX *weight = test_tensor((size_t)C, 5, 1.0), *narrow = test_tensor((size_t)V * C, 6, 1.0),
           *dx = test_tensor((size_t)BT * C, 7, 1.0);
    float *wide = (float*)malloc_or_die((size_t)V * C * sizeof(float), "test"), rstd[BT];
    int32_t tokens[BT];
    for (int i = 0; i < V * C; i++) {
        wide[i] = floatX_to_f32(narrow[i]);
    }
    for (int t = 0; t < BT; t++) {
        tokens[t] = t * 5 % (V - 1);
        rstd[t] = 0.5f + 0.01f * (float)t;
    }
    int same = 1, moved = 0;
    for (int op = 0; op < 2; op++) {
        if (op) {
            CPU_OPS.rmsnorm_backward(dx, real_floatX(narrow), dout, NULL, x, weight, rstd, BT, C);
            CPU_OPS.rmsnorm_backward(dx, real_f32(wide), dout, NULL, x, weight, rstd, BT, C);
        } else {
            CPU_OPS.embedding_backward(real_floatX(narrow), dout, tokens, BT, V, C);
            CPU_OPS.embedding_backward(real_f32(wide), dout, tokens, BT, V, C);
        }
        for (int i = 0; i < V * C; i++) {
            floatX want = f32_to_floatX(wide[i]);
            same &= !memcmp(&want, &narrow[i], sizeof want);
            moved += floatX_to_f32(narrow[i]) != wide[i];
            wide[i] = floatX_to_f32(narrow[i]);
        }
        double squares, narrow_squares;
        CPU_OPS.sum_squares(&squares, real_f32(wide), (size_t)V * C);
        CPU_OPS.sum_squares(&narrow_squares, real_floatX(narrow), (size_t)V * C);
        expect(fabs(squares - narrow_squares) < 1e-12 * squares, "sums of squares %g, %g", squares, narrow_squares);
    }
    expect(same && (moved > 0) == (sizeof(floatX) == 2), "floatX gradients are not the rounded f32 ones (%d)", moved);
    QTensor a = qtensor_view(dout, C, BT, 1), b = qtensor_view(x, C, BT, 1);
    floatX* product = test_tensor((size_t)C * C, 8, 1.0);
    float* sum = (float*)malloc_or_die((size_t)C * C * sizeof(float), "test");
    for (int i = 0; i < C * C; i++) {
        sum[i] = floatX_to_f32(product[i]);
    }
    GemmArgs args = {.out = real_floatX(product), .accumulate = 1, .a = &a, .b = &b, .alpha = 0.5f};
    CPU_OPS.gemm(&args);
    args.out = real_f32(sum);
    CPU_OPS.gemm(&args);
    Near near = near_floatX(product, (size_t)C * C);
    for (int i = 0; i < C * C; i++) {
        near_want(&near, (size_t)i, sum[i], 40.0, 2.0 * BT);
    }
    near_expect(&near, "product added to floatX");
    test_free(dout, x, weight, narrow, dx, wide, product, sum);
}

static Model memory_model(const char* recipe, Recompute recompute, int lean, int dense_first, int dense_last) {
    ModelConfig m = {.name = {}, .L = 3, .C = 64, .NH = 4, .NKV = 2, .HS = 16, .F = 96, .V = 50, .tied = 0,
                     .max_positions = 32, .rope_theta = 10000.0, .rms_eps = 1e-5, .rope_factor = 0, .rope_low = 1,
                     .rope_high = 4, .rope_original = 16};
    TrainingMemory training = {recompute, lean ? REAL_FLOATX : REAL_F32, lean ? REAL_FLOATX : REAL_F32, !lean,
                               dense_first, dense_last, 0, 1, SAVED_INT8_NONE};
    Model model;
    model_prepare(&model, &CPU_OPS, &m, recipe_find(recipe), training, 2, 32);
    model.linear.option_rounding = ROUND_STOCHASTIC;
    model_allocate(&model);
    model_init_weights(&model, 5);
    return model;
}

static void memory_forward(Model* model) {
    int32_t inputs[64], targets[64];
    uint64_t state = 3;
    for (int i = 0; i < 64; i++) {
        inputs[i] = (int32_t)(test_random(&state) % 50), targets[i] = (int32_t)(test_random(&state) % 50);
    }
    model_begin_step(model, 0.0, 0.9, 0.9, 1);
    model_zero_gradients(model);
    model_forward(model, inputs, targets, 1.0f / 64.0f, 1);
}

static void memory_gradients(Model* model) {
    memory_forward(model);
    model_backward(model);
    model_finish_gradients(model);
}

// every level makes the same gradients to the bit, in less memory
static void test_recompute(const char* recipe, int dense) {
    float* want = NULL;
    size_t before = 0;
    for (int level = 0; level < RECOMPUTE_LEVELS; level++) {
        Model model = memory_model(recipe, (Recompute)level, 0, dense, dense);
        memory_gradients(&model);
        memory_gradients(&model);  // starts from what the first left in the buffers
        size_t bytes = model.memory_bytes[MEMORY_ACTIVATIONS], grads = model.table.elements * sizeof(float);
        if (level == 0) {
            want = (float*)malloc_or_die(grads, "test");
            memcpy(want, model.grads.data, grads);
        } else {
            expect(!memcmp(want, model.grads.data, grads), "%s: gradients change with --recompute %s", recipe,
                   RECOMPUTE_NAMES[level]);
            expect(bytes < before, "%s: --recompute %s takes %zu bytes, the level before %zu", recipe,
                   RECOMPUTE_NAMES[level], bytes, before);
        }
        before = bytes;
        if (level == RECOMPUTE_BLOCK) {  // the comparison sees another gradient
            model.blocks[1].inp[7] = f32_to_floatX(3.0f);
            model_zero_gradients(&model);
            model_backward(&model);
            model_finish_gradients(&model);
            expect(memcmp(want, model.grads.data, grads) != 0, "%s: a changed activation is not seen", recipe);
        }
        model_free(&model);
    }
    free(want);
}

// What one more block of a model keeps: of the quantizing recipes less than of bf16, and the same where the packed
// operands are made again.
static size_t memory_block_bytes(const char* recipe, Recompute level, SavedInt8 saved_int8) {
    size_t bytes[2];
    for (int k = 0; k < 2; k++) {
        Model small = memory_model("bf16", RECOMPUTE_BLOCK, 0, 0, 0), model;
        ModelConfig m = small.config;
        m.L = 2 + k;
        TrainingMemory training = MEMORY_EXACT;
        training.recompute = level;
        training.saved_int8 = saved_int8;
        model_prepare(&model, &CPU_OPS, &m, recipe_find(recipe), training, 2, 32);
        bytes[k] = model.memory_bytes[MEMORY_ACTIVATIONS];
        model_free_tables(&model);
        model_free(&small);
    }
    return bytes[1] - bytes[0];
}

static void test_block_bytes(void) {
    const char* const recipes[] = {"quartet", "fp8"};
    for (int level = 0; level < RECOMPUTE_LEVELS; level++) {
        size_t dense = memory_block_bytes("bf16", (Recompute)level, SAVED_INT8_NONE);
        for (int k = 0; k < 2; k++) {
            size_t bytes = memory_block_bytes(recipes[k], (Recompute)level, SAVED_INT8_NONE);
            expect(level == RECOMPUTE_NONE ? bytes < dense : bytes == dense,
                   "--recompute %s: a %s block keeps %zu bytes, a bf16 one %zu", RECOMPUTE_NAMES[level], recipes[k],
                   bytes, dense);
        }
    }
}

static int stats_same(const QuantStats* a, const QuantStats* b) {
    return a->count == b->count && a->zero == b->zero && a->clipped == b->clipped &&
           fabs(a->error_sq - b->error_sq) <= 1e-9 * a->error_sq &&
           fabs(a->input_sq - b->input_sq) <= 1e-9 * a->input_sq;
}

// what is made again is not counted again
static void test_recompute_telemetry(void) {
    LinearTelemetry want = {};
    for (int level = 0; level < RECOMPUTE_LEVELS; level++) {
        Model model = memory_model("quartet", (Recompute)level, 0, 0, 0);
        model_begin_telemetry(&model, 1);
        memory_gradients(&model);
        LinearTelemetry got = model_read_telemetry(&model);
        want = level == 0 ? got : want;
        for (int kind = 0; kind < LINEAR_KINDS; kind++) {
            QuantStats off = got.x[kind];
            off.zero += 1;
            expect(got.x[kind].count > 0 && stats_same(&got.x[kind], &want.x[kind]) &&
                       stats_same(&got.w[kind], &want.w[kind]),
                   "--recompute %s: telemetry of %s counts %.0f elements instead of %.0f", RECOMPUTE_NAMES[level],
                   LINEAR_NAMES[kind], got.x[kind].count, want.x[kind].count);
            expect(!stats_same(&off, &want.x[kind]), "one more zero is not seen");
        }
        model_free(&model);
    }
}

// all blocks dense is the bf16 recipe; one dense block is neither that nor quartet
static void test_dense_blocks(void) {
    const struct { const char* recipe; int first, last; } cases[] = {
        {"bf16", 0, 0}, {"quartet", 3, 0}, {"quartet", 1, 2}, {"quartet", 0, 3}, {"quartet", 0, 0}, {"quartet", 1, 0},
        {"quartet", 0, 1}};
    Model models[7];
    for (int i = 0; i < 7; i++) {
        models[i] = memory_model(cases[i].recipe, RECOMPUTE_NONE, 0, cases[i].first, cases[i].last);
        memory_gradients(&models[i]);
        for (int j = 0; j < i; j++) {
            int same = !memcmp(models[i].grads.data, models[j].grads.data, models[i].table.elements * sizeof(float));
            expect(same == (i < 4), "blocks %d and %d dense, and %d and %d: %s gradients", cases[i].first,
                   cases[i].last, cases[j].first, cases[j].last, same ? "the same" : "other");
        }
    }
    for (int i = 0; i < 7; i++) {
        model_free(&models[i]);
    }
}

// checkpoints of runs with and without a master copy are each other's
static void test_lean_checkpoints(void) {
    for (int from = 0; from < 2; from++) {
        for (int to = 0; to < 2; to++) {
            char *out = make_temp_folder(), error[1024];
            Model a = memory_model("bf16", RECOMPUTE_NONE, from, 0, 0),
                  b = memory_model("bf16", RECOMPUTE_NONE, to, 0, 0);
            size_t n = a.table.elements;
            for (size_t i = 0; i < n; i++) {
                real_set(a.m, i, 1e-3f * (float)i), real_set(a.v, i, 1e-5f * (float)i);
                a.params[i] = f32_to_floatX(floatX_to_f32(a.params[i]) + 0.1f);
                if (a.master) {
                    a.master[i] += 0.1f, a.params[i] = f32_to_floatX(a.master[i]);
                }
            }
            Config config = test_config(0, NULL);
            RunState state = {.step = 3, .tokens = 9, .data_fingerprint = 1, .run_id = "x"};
            Json* saved = NULL;
            int damaged, same = 1;
            expect(checkpoint_save(out, &a, &config, &state, NULL, 3, error, sizeof error) == 0, "%s", error);
            char* folder = checkpoint_find(&COMM_SINGLE, out, &saved, &damaged);
            checkpoint_load(&COMM_SINGLE, &b, folder, saved);
            for (size_t i = 0; i < n; i++) {
                float m = real_get(a.m, i), v = real_get(a.v, i);
                float w = a.master ? a.master[i] : floatX_to_f32(a.params[i]);
                same &= real_get(b.m, i) == (to ? floatX_to_f32(f32_to_floatX(m)) : m);
                same &= real_get(b.v, i) == (to ? floatX_to_f32(f32_to_floatX(v)) : v);
                same &= !memcmp(&a.params[i], &b.params[i], sizeof(floatX)) && (!b.master || b.master[i] == w);
            }
            expect(same, "lean %d -> lean %d: the loaded state differs", from, to);
            json_free(saved);
            free(folder);
            model_free(&a);
            model_free(&b);
            remove_folder(out);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the choice of what fits, on a device of a given size

static size_t test_room;
static size_t test_available(void) { return test_room; }

static Run fit_run(Ops* ops, const char* const* options, int count) {
    const char* arguments[16] = {"train_llama", "--model", "200m", "--recipe", "bf16", "--device", "cpu"};
    memcpy(arguments + 7, options, sizeof(char*) * (size_t)count);
    Run run = {};
    config_parse(&run.config, 7 + count, (char**)arguments);
    run.comm = comm_init();
    run_resolve(&run);
    *ops = CPU_OPS;
    ops->available_bytes = test_available;
    ops->micro_tokens = 32768;
    return run;
}

static void fit_or_die(void* options) {
    Ops ops;
    Run run = fit_run(&ops, (const char* const*)options, 2);
    run_fit(&run, &ops);
}

static void test_fit(void) {
    Ops ops;
    const struct { double GiB; const char *batch, *recompute; int B; const char* level;
    } cases[] = {{0, "auto", "auto", 64, "none"},      {100, "auto", "auto", 64, "none"}, {100, "8", "auto", 8, "none"},
                 {100, "auto", "block", 64, "block"},  {9.2, "auto", "auto", 16, "none"}, {6.4, "auto", "auto", 0, ""},
                 {6.4, "auto", "none", 0, "none"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char* options[] = {"--batch-size", cases[i].batch, "--recompute", cases[i].recompute};
        test_room = (size_t)(cases[i].GiB * 1073741824.0);
        Run run = fit_run(&ops, options, 4);
        run_fit(&run, &ops);
        size_t needed = run_memory(&run, &ops, run.B, run.training);
        expect(cases[i].B == 0 || (run.B == cases[i].B && !strcmp(run.config.recompute, cases[i].level)),
               "%.1f GiB: micro-batch %d, recompute %s", cases[i].GiB, run.B, run.config.recompute);
        expect(test_room == 0 || needed <= test_room, "%.1f GiB: the choice needs %zu bytes", cases[i].GiB, needed);
        expect(run.accumulation * run.B == 512, "%lld micro-batches of %d", (long long)run.accumulation, run.B);
        free(run.out);
        free((void*)run.config.out);  // runs/MODEL-RECIPE, made by run_resolve
    }
    const char* large[] = {"--batch-size", "512"};
    test_room = (size_t)12 << 30;
    expect_exit(EXIT_NO_MEMORY, "this fits: --batch-size", fit_or_die, large);
    test_room = (size_t)1 << 30;
    expect_exit(EXIT_NO_MEMORY, "no setting of this model fits", fit_or_die, large);
    test_room = (size_t)3 << 30;
    expect_exit(EXIT_NO_MEMORY, "--adam-dtype bf16", fit_or_die, large);
}

static void test_memory(void) {
    test_stochastic_bf16();
    test_adamw_lean(1, 0);
    test_adamw_lean(1001, 5);
    if (sizeof(floatX) == 2) {
        test_adamw_small_updates();
        test_fit();
    }
    test_narrow_gradients();
    test_recompute("bf16", 0);
    test_recompute("fp8", 0);
    test_recompute("quartet", 0);
    test_recompute("quartet", 1);
    test_block_bytes();
    test_recompute_telemetry();
    test_dense_blocks();
    test_lean_checkpoints();
}
