// cuda_model.h: a small Llama on the CPU and on the GPU (section cuda_model): loss, gradients, twenty training steps,
// checkpoints that change the device, generation.
//
// Tolerances, as everywhere, are roundings times slack. FP32 build: llama_roundings of the path, as in llama.h. BF16
// build: every tensor of the path is rounded once where it is stored, independently, so the relative error (L2) of what
// comes out is the root of the number of stores times 2^-8; a backward pass stores about as much again. Both backends
// err, independently (sqrt 2), and 2 is slack. A mean loss averages over its rows; from step to step errors add up like
// a random walk.
#pragma once
#include "cuda_products.h"
#include "run.h"
#ifndef USE_CUDA
static void test_cuda(void) { printf("skip cuda: this binary was built without CUDA\n"); }
static void test_cuda_model(void) { printf("skip cuda_model: this binary was built without CUDA\n"); }
#else

#define CURVE_STEPS 20
#define MODEL_B 4
#define MODEL_T 96

static ModelConfig cuda_model_config(int HS, int tied) {
    return (ModelConfig){.name = "test", .L = 2, .C = 4 * HS, .NH = 4, .NKV = 2, .HS = HS, .F = 11 * HS, .V = 320,
                         .tied = tied, .max_positions = MODEL_T, .rope_theta = 1e4, .rms_eps = 1e-5, .rope_factor = 0,
                         .rope_low = 0, .rope_high = 0, .rope_original = 0};
}

static void cuda_model_make(Model* model, const Ops* ops, int HS, int tied, TrainingMemory training) {
    ModelConfig m = cuda_model_config(HS, tied);
    model_prepare(model, ops, &m, recipe_find("bf16"), training, MODEL_B, MODEL_T);
    model->linear.option_rounding = ROUND_NEAREST;
    model_allocate(model);
}

// initial weights on the CPU, livelier than at the start of a training
static void cuda_model_fill(Model* model) {
    uint64_t state = 11;
    model_init_weights(model, 5);
    for (int p = 0; p < model->table.count; p++) {
        const Param* param = &model->table.list[p];
        for (size_t i = param->offset; i < param->offset + param->count; i++) {
            float w = model->master[i];
            model->master[i] = param->is_matrix ? 3.0f * w : w + 0.2f * (float)test_normal(&state);
            model->params[i] = f32_to_floatX(model->master[i]);
        }
    }
    model->weights_quantized = 0;
}

// master, m, v, params on the host; the caller frees it
static size_t model_state_bytes(const Model* model) { return model->table.elements * (3 * sizeof(float) + X_BYTES); }
static char* model_state_get(const Model* model) {
    size_t N = model->table.elements * sizeof(float);
    char* state = (char*)malloc_or_die(model_state_bytes(model), "test");
    model->ops->copy_to_host(state, model->master, N);
    model->ops->copy_to_host(state + N, model->m.data, N);
    model->ops->copy_to_host(state + 2 * N, model->v.data, N);
    model->ops->copy_to_host(state + 3 * N, model->params, model->table.elements * X_BYTES);
    return state;
}
static void model_state_set(Model* model, const char* state) {
    size_t N = model->table.elements * sizeof(float);
    model->ops->copy_to_device(model->master, state, N);
    model->ops->copy_to_device(model->m.data, state + N, N);
    model->ops->copy_to_device(model->v.data, state + 2 * N, N);
    model->ops->copy_to_device(model->params, state + 3 * N, model->table.elements * X_BYTES);
    model->ops->synchronize();
    model->weights_quantized = 0;
}
static void model_state_copy(Model* to, const Model* from) {
    char* state = model_state_get(from);
    model_state_set(to, state);
    free(state);
}
static void expect_same_state(const Model* a, const Model* b, const char* what) {
    char *x = model_state_get(a), *y = model_state_get(b);
    expect_bits(x, y, model_state_bytes(a), what);
    test_free(x, y);
}

// batch `step` of a stream that repeats every two
static void model_batch(int32_t* inputs, int32_t* targets, int step, int V) {
    uint64_t state = 77 + (uint64_t)(step % 2);
    for (int i = 0; i < MODEL_B * MODEL_T; i++) {
        inputs[i] = (int32_t)(test_random(&state) % (uint64_t)V);
        targets[i] = (int32_t)(test_random(&state) % (uint64_t)V);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// tolerances

// relative error of a loss's logits, or of a gradient, between the backends
static double model_tolerance(const Model* model, int backward) {
#ifdef PRECISION_FP32
    double one = (backward ? 3.0 : 1.0) * llama_roundings(&model->config, model->T) * F32_ROUNDING;
#else
    // a block stores norm, qkv, its turn, P, att, projection, sum, norm, gate_up, act, projection, sum; backward dact,
    // dgate_up, dnorm, dresidual, datt, dS, dqkv, its turn, dnorm, dresidual
    double forward = 12.0 * model->config.L + 2.0, back = 10.0 * model->config.L + 3.0;
    double one = sqrt(forward + (backward ? back : 0.0)) * (double)FLOATX_EPSILON;
#endif
    return 2.0 * sqrt(2.0) * one;
}

// of the mean loss after `step` updates
static double model_loss_tolerance(const Model* model, int step) {
    return model_tolerance(model, 0) * log((double)model->config.V) / sqrt((double)MODEL_B * MODEL_T) *
           sqrt(1.0 + step);
}

// ---------------------------------------------------------------------------------------------------------------------
// loss and gradients

// gradients of batch 0 on the host; the caller frees them
static float* model_gradients(Model* model, double* loss) {
    int32_t inputs[MODEL_B * MODEL_T], targets[MODEL_B * MODEL_T];
    model_batch(inputs, targets, 0, model->config.V);
    model_zero_gradients(model);
    model_begin_step(model, 0.0, 0.0, 0.0, 0);
    model_forward(model, inputs, targets, 1.0f / (MODEL_B * MODEL_T), 1);
    model_backward(model);
    model_finish_gradients(model);
    *loss = model_read_control(model).loss_sum / (MODEL_B * MODEL_T);
    float* grads = (float*)malloc_or_die(model->table.elements * sizeof(float), "test");
    model->ops->copy_to_host(grads, model->grads.data, model->table.elements * sizeof(float));
    return grads;
}

// |factor got - want| / |want|
static double relative_distance(const float* got, const float* want, size_t n, double factor) {
    double off = 0.0, size = 0.0;
    for (size_t i = 0; i < n; i++) {
        off += pow(factor * (double)got[i] - (double)want[i], 2);
        size += pow((double)want[i], 2);
    }
    return sqrt(off / size);
}

// Of a gradient that has gone through MXINT8 on its way. Codes are of tensors that differ between the backends; where a
// rounding decides between two, they part by a step, 2^-6 of the group's largest, 2^-5 of its root of the mean square and
// more: a relative difference d becomes sqrt(2^-5 d). Of d that root counts, without slack.
static double model_saved_tolerance(const Model* model) {
    double tensors = 0.0;
    for (int i = 0; i < model->config.L * SAVED_TENSORS; i++) {
        tensors += block_saves_int8(model, i / SAVED_TENSORS, (SavedTensor)(i % SAVED_TENSORS));
    }
    return model_tolerance(model, 1) + sqrt(tensors * 0.03125 * model_tolerance(model, 0) / (2.0 * sqrt(2.0)));
}

static void cuda_test_model_gradients(Model* gpu_model, Model* cpu_model) {
    double loss[2], allowed = model_loss_tolerance(cpu_model, 0);
    float *want = model_gradients(cpu_model, &loss[0]), *got = model_gradients(gpu_model, &loss[1]);
    int HS = cpu_model->config.HS;
    expect(fabs(loss[1] - loss[0]) <= allowed, "HS %d: loss %.9g, the CPU's %.9g, allowed %.3g", HS, loss[1], loss[0],
           allowed);
    expect(fabs(1.01 * loss[1] - loss[0]) > allowed, "HS %d: a loss 1 %% larger is not seen", HS);
    double limit = model_saved_tolerance(cpu_model), worst = 0.0;
    for (int p = 0; p < cpu_model->table.count; p++) {
        const Param* param = &cpu_model->table.list[p];
        const float *a = got + param->offset, *b = want + param->offset;
        double off = relative_distance(a, b, param->count, 1.0);
        worst = fmax(worst, off);
        expect(off <= limit, "HS %d: gradient of %s is %.3g from the CPU's, allowed %.3g", HS, param->name, off, limit);
        expect(relative_distance(a, b, param->count, 1.0 + 2.0 * limit) > limit &&
                   relative_distance(a, b, param->count, -1.0) > limit,
               "HS %d: a planted error in the gradient of %s is not seen", HS, param->name);
    }
    printf("  HS %d: loss %.3g from the CPU's (allowed %.3g), gradients at most %.3g (%.3g)\n", HS,
           fabs(loss[1] - loss[0]), allowed, worst, limit);
    test_free(want, got);
}

// ---------------------------------------------------------------------------------------------------------------------
// training

static double model_train_step(Model* model, int step, double lr) {
    int32_t inputs[MODEL_B * MODEL_T], targets[MODEL_B * MODEL_T];
    Comm comm = COMM_SINGLE;
    Config config;
    memset(&config, 0, sizeof config);
    config.beta1 = 0.9, config.beta2 = 0.95, config.eps = 1e-8, config.weight_decay = 0.1, config.grad_clip = 1.0;
    model_batch(inputs, targets, step, model->config.V);
    model_zero_gradients(model);
    model_begin_step(model, lr, config.beta1, config.beta2, step + 1);
    model_forward(model, inputs, targets, 1.0f / (MODEL_B * MODEL_T), 1);
    model_backward(model);
    model_finish_gradients(model);
    optimizer_step(model, &comm, &config);
    StepControl result = model_read_control(model);
    expect(!result.skip, "step %d was skipped", step);
    return result.loss_sum / (MODEL_B * MODEL_T);
}

// Steps where the curves are further apart than allowed, which is `more` than what roundings in floatX do; *worst: the
// largest share of that
static int curves_differ(const double* a, const double* b, const Model* model, double more, double* worst) {
    int differ = 0;
    *worst = 0.0;
    for (int s = 0; s < CURVE_STEPS; s++) {
        double share = fabs(a[s] - b[s]) / (model_loss_tolerance(model, s) + (s > 0 ? more : 0.0));
        differ += !(share <= 1.0);
        *worst = fmax(*worst, share);
    }
    return differ;
}

// leaves both models trained; twin is another CUDA model
static void cuda_test_model_curve(Model* gpu_model, Model* twin, Model* cpu_model, double more) {
    const double lr = 2e-3;
    double want[CURVE_STEPS], got[CURVE_STEPS], again[CURVE_STEPS], other[CURVE_STEPS];
    double worst = 0.0, planted = 0.0;
    int HS = cpu_model->config.HS;
    char* begin = model_state_get(cpu_model);
    for (int s = 0; s < CURVE_STEPS; s++) {
        other[s] = model_train_step(twin, s, 1.5 * lr);
    }
    model_state_set(twin, begin);
    for (int s = 0; s < CURVE_STEPS; s++) {
        want[s] = model_train_step(cpu_model, s, lr);
        got[s] = model_train_step(gpu_model, s, lr);
        again[s] = model_train_step(twin, s, lr);
    }
    free(begin);
    int differ = curves_differ(got, want, cpu_model, more, &worst);
    expect(differ == 0, "HS %d: losses of %d steps differ, by up to %.3g of what is allowed; the last: %.9g, %.9g", HS,
           differ, worst, got[CURVE_STEPS - 1], want[CURVE_STEPS - 1]);
    expect(curves_differ(other, want, cpu_model, more, &planted) > 0, "HS %d: another learning rate is not seen: %.3g", HS,
           planted);
    expect(got[CURVE_STEPS - 1] < 0.9 * got[0], "HS %d: does not learn: %.6g after %.6g", HS, got[CURVE_STEPS - 1],
           got[0]);
    expect(!memcmp(got, again, sizeof got) && memcmp(got, other, sizeof got), "HS %d: two runs have other losses", HS);
    expect_same_state(gpu_model, twin, "two CUDA runs");
    printf("  HS %d: %d steps, loss %.4f to %.4f, %.3g of the allowed distance from the CPU's (planted: %.3g)\n", HS,
           CURVE_STEPS, got[0], got[CURVE_STEPS - 1], worst, planted);
}

// ---------------------------------------------------------------------------------------------------------------------
// checkpoints, generation

// saved from one, loaded by the other: the same bits, and the next step's loss agrees
static void cuda_test_model_checkpoint(Model* from, Model* to, const char* what) {
    char error[1024], *out = make_temp_folder();
    Config config = test_config(0, NULL);
    RunState state = {.step = 20, .tokens = 777, .data_fingerprint = 1, .run_id = "abc"};
    int damaged;
    Json* saved = NULL;
    expect(checkpoint_save(out, from, &config, &state, NULL, 3, error, sizeof error) == 0, "%s", error);
    to->ops->zero(to->memory[MEMORY_PARAMS], to->memory_bytes[MEMORY_PARAMS]);
    to->ops->zero(to->memory[MEMORY_OPTIMIZER], to->memory_bytes[MEMORY_OPTIMIZER]);
    char* folder = checkpoint_find(&COMM_SINGLE, out, &saved, &damaged);
    if (expect(folder && damaged == 0, "%s: no checkpoint found", what)) {
        RunState loaded = checkpoint_load(&COMM_SINGLE, to, folder, saved);
        expect(loaded.step == 20 && loaded.tokens == 777, "%s: state differs", what);
        expect_same_state(to, from, what);
        char* before = model_state_get(from);
        double a = model_train_step(from, CURVE_STEPS, 1e-3), b = model_train_step(to, CURVE_STEPS, 1e-3);
        double c = model_train_step(from, CURVE_STEPS + 1, 1e-3), d = model_train_step(to, CURVE_STEPS + 1, 1e-3);
        expect(fabs(a - b) <= model_loss_tolerance(from, 0) && fabs(c - d) <= model_loss_tolerance(from, 1),
               "%s: goes on with losses %.9g %.9g instead of %.9g %.9g", what, b, d, a, c);
        model_state_set(from, before);
        free(before);
    }
    free(folder);
    json_free(saved);
    remove_folder(out);
}

static void cuda_test_model_generate(Model* gpu_model, Model* cpu_model) {
    const int V = cpu_model->config.V;
    int a[MODEL_T] = {1, 2, 3, 4, 5}, b[MODEL_T] = {1, 2, 3, 4, 5}, c[MODEL_T] = {1, 2, 3, 4, 5};
    model_state_copy(gpu_model, cpu_model);
    int n = generate(gpu_model, a, 5, MODEL_T, V, 0.0, 7, 1), again = generate(gpu_model, b, 5, MODEL_T, V, 0.0, 7, 1);
    int within = n == MODEL_T;
    for (int i = 0; i < n; i++) {
        within &= a[i] >= 0 && a[i] < V;
    }
    expect(again == n && !memcmp(a, b, sizeof a) && within, "HS %d: greedy generation", cpu_model->config.HS);
    generate(cpu_model, c, 5, MODEL_T, V, 0.0, 7, 1);
#ifdef PRECISION_FP32
    expect(!memcmp(a, c, sizeof a), "HS %d: greedy tokens are not the CPU's", cpu_model->config.HS);
#endif
    c[5]++;
    expect(memcmp(a, c, sizeof a) != 0, "HS %d: another token is not seen", cpu_model->config.HS);
}

// ---------------------------------------------------------------------------------------------------------------------
// memory and graphs

// gradients do not depend on what is made again; where backward reads MXINT8 they are near
static void cuda_test_model_recompute(const Model* cpu_model) {
    float* want = NULL;
    double loss;
    const int exact_from[SAVED_INT8_CHOICES] = {RECOMPUTE_NONE, RECOMPUTE_NORM, RECOMPUTE_BLOCK};
    for (int i = 0; i < (int)SAVED_INT8_CHOICES * RECOMPUTE_LEVELS; i++) {
        int level = i % RECOMPUTE_LEVELS, choice = i / RECOMPUTE_LEVELS;
        const char* what = label("--recompute %s, --saved-int8 %s", RECOMPUTE_NAMES[level], SAVED_INT8_NAMES[choice]);
        Model model;
        TrainingMemory training = MEMORY_EXACT;
        training.recompute = (Recompute)level;
        training.saved_int8 = (SavedInt8)choice;
        cuda_model_make(&model, &CUDA_OPS, cpu_model->config.HS, cpu_model->config.tied, training);
        model_state_copy(&model, cpu_model);
        float* got = model_gradients(&model, &loss);
        if (i == 0) {
            want = got;
        } else {
            int same = !memcmp(got, want, model.table.elements * sizeof(float));
            expect(same == (level >= exact_from[choice]), "%s: %s gradients", what, same ? "the same" : "other");
            expect(relative_distance(got, want, model.table.elements, 1.0) < 0.125, "%s: far gradients", what);
            got[model.table.elements / 2] += 1.0f;
            expect(memcmp(got, want, model.table.elements * sizeof(float)) != 0, "a changed gradient is not seen");
            free(got);
        }
        model_free(&model);
    }
    free(want);
}

typedef struct { Model* model; double lr; } ReplayedStep;
static void replayed_step(void* argument) {
    Model* model = ((ReplayedStep*)argument)->model;
    Comm comm = COMM_SINGLE;
    Config config;
    memset(&config, 0, sizeof config);
    config.beta1 = 0.9, config.beta2 = 0.95, config.eps = 1e-8, config.weight_decay = 0.1, config.grad_clip = 1.0;
    model_zero_gradients(model);
    model_run_forward(model, 1.0f / (MODEL_B * MODEL_T), 1);
    model_backward(model);
    model_finish_gradients(model);
    optimizer_step(model, &comm, &config);
}

// losses of 6 steps, recorded or issued
static void replay_curve(double* losses, Model* model, int recorded) {
    int32_t inputs[MODEL_B * MODEL_T], targets[MODEL_B * MODEL_T];
    ReplayedStep step = {model, 2e-3};
    for (int s = 0; s < 6; s++) {
        model_batch(inputs, targets, s, model->config.V);
        model_begin_step(model, step.lr * (s + 1), 0.9, 0.95, s + 1);
        model_load_batch(model, inputs, targets, s, 0);
        if (recorded) {
            CUDA_OPS.replay(GRAPH_IDS - 1, replayed_step, &step);
        } else {
            replayed_step(&step);
        }
        losses[s] = model_read_control(model).loss_sum;
    }
}

// a recorded step does what the issued one does, with and without a master copy; both learn
static void cuda_test_model_replay(const Model* cpu_model, int lean, SavedInt8 choice) {
    TrainingMemory training = {RECOMPUTE_NONE, lean ? REAL_FLOATX : REAL_F32, lean ? REAL_FLOATX : REAL_F32, 1, 0, 0,
                               0, 1, choice};
    double losses[2][6];
    char* states[2];
    for (int recorded = 0; recorded < 2; recorded++) {
        Model model;
        cuda_model_make(&model, &CUDA_OPS, cpu_model->config.HS, cpu_model->config.tied, training);
        size_t x_bytes = model.table.elements * X_BYTES;
        CUDA_OPS.copy_to_device(model.params, cpu_model->params, x_bytes);
        CUDA_OPS.copy_to_device(model.master, cpu_model->master, model.table.elements * sizeof(float));
        float* master = model.master;
        model.master = lean ? NULL : master;
        recorded_work[GRAPH_IDS - 1] = (RecordedWork){0, NULL};
        replay_curve(losses[recorded], &model, recorded);
        states[recorded] = (char*)malloc_or_die(x_bytes, "test");
        CUDA_OPS.copy_to_host(states[recorded], model.params, x_bytes);
        model.master = master;
        if (recorded) {
            expect(recorded_work[GRAPH_IDS - 1].graph != NULL, "nothing was recorded");
            expect_bits(states[0], states[1], x_bytes, "weights after recorded steps");
        }
        model_free(&model);
    }
    expect(!memcmp(losses[0], losses[1], sizeof losses[0]), "lean %d: losses of recorded steps differ", lean);
    expect(losses[0][5] < 0.97 * losses[0][1], "lean %d: does not learn: %g after %g", lean, losses[0][5], losses[0][1]);
    test_free(states[0], states[1]);
}

// Gradients and training with --saved-int8 all. The backends part by some of the codes: losses by at most twice what all
// of MXINT8 does on the CPU.
static void cuda_test_model_saved(const Model* exact) {
    Model models[4];  // exact and not on the CPU, not twice on the GPU
    double curves[2][CURVE_STEPS], more = 0.0;
    for (int i = 0; i < 4; i++) {
        TrainingMemory training = MEMORY_EXACT;
        training.saved_int8 = i ? SAVED_INT8_ALL : SAVED_INT8_NONE;
        cuda_model_make(&models[i], i < 2 ? cpu_backend() : &CUDA_OPS, exact->config.HS, exact->config.tied, training);
        model_state_copy(&models[i], exact);
    }
    for (int s = 0; s < CURVE_STEPS; s++) {
        curves[0][s] = model_train_step(&models[0], s, 2e-3), curves[1][s] = model_train_step(&models[1], s, 2e-3);
        more = fmax(more, 2.0 * fabs(curves[0][s] - curves[1][s]));
    }
    expect(curves[0][0] == curves[1][0] && more > 0.0, "--saved-int8 all: %g nats from the exact curve", more / 2.0);
    model_state_copy(&models[1], exact);
    cuda_test_model_gradients(&models[2], &models[1]);
    cuda_test_model_curve(&models[2], &models[3], &models[1], more);
    for (int i = 0; i < 4; i++) {
        model_free(&models[i]);
    }
}

static void cuda_test_model_size(int HS, int tied) {
    Model cpu_model, gpu_model, twin;
    cuda_model_make(&cpu_model, cpu_backend(), HS, tied, MEMORY_EXACT);
    cuda_model_make(&gpu_model, &CUDA_OPS, HS, tied, MEMORY_EXACT);
    cuda_model_make(&twin, &CUDA_OPS, HS, tied, MEMORY_EXACT);
    cuda_model_fill(&cpu_model);
    model_state_copy(&gpu_model, &cpu_model);
    model_state_copy(&twin, &cpu_model);
    cuda_test_model_gradients(&gpu_model, &cpu_model);
    cuda_test_model_recompute(&cpu_model);
    cuda_test_model_saved(&cpu_model);
    cuda_test_model_replay(&cpu_model, 0, SAVED_INT8_NONE);
    cuda_test_model_replay(&cpu_model, 0, SAVED_INT8_ALL);
    cuda_test_model_replay(&cpu_model, 1, SAVED_INT8_NONE);
    cuda_test_model_curve(&gpu_model, &twin, &cpu_model, 0.0);
    cuda_test_model_checkpoint(&gpu_model, &cpu_model, "GPU to CPU");
    cuda_test_model_checkpoint(&cpu_model, &gpu_model, "CPU to GPU");
    cuda_test_model_generate(&gpu_model, &cpu_model);
    model_free(&cpu_model);
    model_free(&gpu_model);
    model_free(&twin);
}

static void test_cuda_model(void) {
    if (cuda_test_begin("cuda_model")) {
        cuda_test_model_size(32, 0);
        cuda_test_model_size(64, 1);
    }
}
#endif
