// cuda_quant_model.h: section cuda_quant, a small Llama with the quartet recipe on the GPU against the CPU, and the
// self-test.
//
// A whole model has no counted tolerance. Signs and random bits are the same on both backends, but where an activation
// differs by a rounding, a code now and then falls on the other side of a threshold and jumps by a step of the grid,
// and so on from layer to layer: a relative difference e of the activations makes one of about sqrt(e/5) in the
// operand, and from 1e-3 on the noise of two backends' codes is all but independent. What that is in a gradient is
// measured, on the CPU: the same step again with the embedding and the norms' weights, which all activations come
// through, off by as much as a store (bf16: one rounding, 2^-8) or the longest product (f32: sqrt(F) roundings) can
// make of it in every element. The distance (L2) of the GPU's gradients is at most 1.5 times the largest of these; the
// lengths, which noise leaves alone and a lost factor does not, agree within six standard deviations of theirs.
#pragma once
#include "cuda_quant_linear.h"
#ifndef USE_CUDA
static void test_cuda_quant(void) { printf("skip cuda_quant: this binary was built without CUDA\n"); }
#else

// ---------------------------------------------------------------------------------------------------------------------
// a small model: one step's losses and gradients

#define QUANT_TOKENS (MODEL_B * MODEL_T)
#define QUANT_JITTERS 8
#define QUANT_JITTERED_CURVES 6  // two were too few: 0.050 allowed where the GPU was 0.057 off (FP32, 20 steps)

static void quant_model_make(Model* model, const Ops* ops, int HS, int tied, Rounding rounding, Recompute recompute) {
    ModelConfig m = cuda_model_config(HS, tied);
    TrainingMemory training = MEMORY_EXACT;
    training.recompute = recompute;
    model_prepare(model, ops, &m, recipe_find("quartet"), training, MODEL_B, MODEL_T);
    model->linear.option_rounding = rounding;
    model->linear.seed = 4321;
    model_allocate(model);
}

// Initial weights on the CPU, norms that do something. Larger weights, as in cuda_model_fill, would make of a code that
// falls on the other side what another code makes.
static void quant_fill(Model* model) {
    uint64_t state = 11;
    model_init_weights(model, 5);
    for (int p = 0; p < model->table.count; p++) {
        const Param* param = &model->table.list[p];
        for (size_t i = param->offset; !param->is_matrix && i < param->offset + param->count; i++) {
            model->master[i] += 0.2f * (float)test_normal(&state);
            model->params[i] = f32_to_floatX(model->master[i]);
        }
    }
    model->weights_quantized = 0;
}

typedef struct { double loss; float *losses, *grads; } QuantRun;

// of batch 0, as micro-batch `micro` of step 0
static QuantRun quant_run(Model* model, int micro) {
    int32_t inputs[QUANT_TOKENS], targets[QUANT_TOKENS];
    QuantRun run;
    model_batch(inputs, targets, 0, model->config.V);
    model_zero_gradients(model);
    model_begin_step(model, 0.0, 0.0, 0.0, 0);
    model_load_batch(model, inputs, targets, 0, micro);
    model_run_forward(model, 1.0f / QUANT_TOKENS, 1);
    model_backward(model);
    model_finish_gradients(model);
    run.loss = model_read_control(model).loss_sum / QUANT_TOKENS;
    run.losses = (float*)malloc_or_die(QUANT_TOKENS * sizeof(float), "test");
    run.grads = (float*)malloc_or_die(model->table.elements * sizeof(float), "test");
    model->ops->copy_to_host(run.losses, model->losses, QUANT_TOKENS * sizeof(float));
    model->ops->copy_to_host(run.grads, model->grads.data, model->table.elements * sizeof(float));
    return run;
}
static void quant_run_free(QuantRun* run) { test_free(run->losses, run->grads); }

static double quant_gradient_distance(const Model* model, const QuantRun* a, const QuantRun* b, int param) {
    const Param* p = &model->table.list[param];
    return relative_distance(a->grads + p->offset, b->grads + p->offset, p->count, 1.0);
}

// how much longer a's gradient is, in logarithm
static double quant_gradient_longer(const Model* model, const QuantRun* a, const QuantRun* b, int param) {
    const Param* p = &model->table.list[param];
    double x = 0.0, y = 0.0;
    for (size_t i = p->offset; i < p->offset + p->count; i++) {
        x += pow((double)a->grads[i], 2);
        y += pow((double)b->grads[i], 2);
    }
    return 0.5 * log(x / y);
}

// root of the mean square of the tokens' differences
static double quant_loss_distance(const QuantRun* a, const QuantRun* b) {
    double squares = 0.0;
    for (int t = 0; t < QUANT_TOKENS; t++) {
        squares += pow((double)a->losses[t] - (double)b->losses[t], 2);
    }
    return sqrt(squares / QUANT_TOKENS);
}

// Step `step` of a training: batch, learning rate, random numbers
static double quant_train_step(Model* model, int step, double lr) {
    int32_t inputs[QUANT_TOKENS], targets[QUANT_TOKENS];
    ReplayedStep work = {model, lr};
    model_batch(inputs, targets, step, model->config.V);
    model_begin_step(model, lr, 0.9, 0.95, step + 1);
    model_load_batch(model, inputs, targets, step, 0);
    replayed_step(&work);
    StepControl result = model_read_control(model);
    expect(!result.skip, "step %d was skipped", step);
    return result.loss_sum / QUANT_TOKENS;
}

static void quant_train_curve(Model* model, double* losses, double lr) {
    for (int s = 0; s < CURVE_STEPS; s++) {
        losses[s] = quant_train_step(model, s, lr);
    }
}

static double curve_distance(const double* a, const double* b) {
    double most = 0.0;
    for (int s = 0; s < CURVE_STEPS; s++) {
        double off = fabs(a[s] - b[s]);
        most = off <= most ? most : off;  // a NaN stays
    }
    return most;
}

// ---------------------------------------------------------------------------------------------------------------------
// what the CPU says, and how far from it is near

#define QUANT_LR 2e-3

typedef struct {
    Model model;
    Rounding rounding;
    char* begin;  // its state
    QuantRun run;
    double curve[CURVE_STEPS];
    double *grad_allowed, *length_allowed;  // one a parameter
    double token_allowed, loss_allowed, curve_allowed;
} QuantReference;

static void quant_jitter(Model* model, uint64_t seed) {
#ifdef PRECISION_FP32
    double size = sqrt((double)model->config.F) * F32_ROUNDING;
#else
    double size = (double)FLOATX_EPSILON;
#endif
    for (int p = 0; p < model->table.count; p++) {
        const Param* param = &model->table.list[p];
        int touched = param->kind == P_EMBED || !param->is_matrix;
        for (size_t i = param->offset; touched && i < param->offset + param->count; i++) {
            double x = (double)model->master[i] * (1.0 + size * test_normal(&seed));
            model->master[i] = (float)x;
            model->params[i] = f32_to_floatX((float)x);
        }
    }
    model->weights_quantized = 0;
}

static QuantReference quant_reference(int HS, int tied, Rounding rounding) {
    QuantReference r = {};
    double curve[CURVE_STEPS];
    r.rounding = rounding;
    quant_model_make(&r.model, cpu_backend(), HS, tied, rounding, RECOMPUTE_NONE);
    quant_fill(&r.model);
    r.begin = model_state_get(&r.model);
    r.run = quant_run(&r.model, 0);
    int count = r.model.table.count;
    r.grad_allowed = test_zeros((size_t)count), r.length_allowed = test_zeros((size_t)count);
    quant_train_curve(&r.model, r.curve, QUANT_LR);
    for (int k = 0; k < QUANT_JITTERS; k++) {
        model_state_set(&r.model, r.begin);
        quant_jitter(&r.model, (uint64_t)(k + 1));
        QuantRun run = quant_run(&r.model, 0);
        for (int p = 0; p < count; p++) {
            r.grad_allowed[p] = fmax(r.grad_allowed[p], 1.5 * quant_gradient_distance(&r.model, &run, &r.run, p));
            r.length_allowed[p] += 36.0 / QUANT_JITTERS * pow(quant_gradient_longer(&r.model, &run, &r.run, p), 2);
        }
        r.token_allowed = fmax(r.token_allowed, 1.5 * quant_loss_distance(&run, &r.run));
        r.loss_allowed = fmax(r.loss_allowed, 2.0 * fabs(run.loss - r.run.loss));
        if (k < QUANT_JITTERED_CURVES) {
            quant_train_curve(&r.model, curve, QUANT_LR);
            r.curve_allowed = fmax(r.curve_allowed, 2.0 * curve_distance(curve, r.curve));
        }
        quant_run_free(&run);
    }
    for (int p = 0; p < count; p++) {
        r.length_allowed[p] = sqrt(r.length_allowed[p]);
    }
    // a mean over tokens: four standard errors, were they independent
    r.loss_allowed = fmax(r.loss_allowed, 4.0 * r.token_allowed / sqrt((double)QUANT_TOKENS));
    model_state_set(&r.model, r.begin);
    return r;
}

static void quant_reference_free(QuantReference* r) {
    quant_run_free(&r->run);
    test_free(r->begin, r->grad_allowed, r->length_allowed);
    model_free(&r->model);
}

static void quant_model_gpu(Model* model, const QuantReference* r, Recompute recompute) {
    const ModelConfig* m = &r->model.config;
    quant_model_make(model, &CUDA_OPS, m->HS, m->tied, r->rounding, recompute);
    model_state_set(model, r->begin);
}

// ---------------------------------------------------------------------------------------------------------------------
// loss and gradients, training

static void quant_test_gradients(Model* model, const QuantReference* r) {
    QuantRun got = quant_run(model, 0), again = quant_run(model, 0), elsewhere = quant_run(model, 1);
    const char* carrier = gpu.carrier->name;
    int HS = model->config.HS, count = model->table.count;
    size_t bytes = model->table.elements * sizeof(float);
    double loss = fabs(got.loss - r->run.loss), tokens = quant_loss_distance(&got, &r->run), worst[2] = {0.0, 0.0};
    expect(loss <= r->loss_allowed && tokens <= r->token_allowed,
           "HS %d, carrier %s: loss %.9g, the CPU's %.9g, allowed %.3g; tokens %.3g apart, allowed %.3g", HS, carrier,
           got.loss, r->run.loss, r->loss_allowed, tokens, r->token_allowed);
    expect(fabs(1.01 * got.loss - r->run.loss) > r->loss_allowed, "HS %d: a loss 1 %% larger is not seen", HS);
    for (int p = 0; p < count; p++) {
        const Param* param = &model->table.list[p];
        double off = quant_gradient_distance(model, &got, &r->run, p), limit = r->grad_allowed[p];
        double longer = quant_gradient_longer(model, &got, &r->run, p), length = r->length_allowed[p];
        worst[0] = fmax(worst[0], off / limit), worst[1] = fmax(worst[1], fabs(longer) / length);
        expect(off <= limit && fabs(longer) <= length,
               "HS %d, carrier %s: gradient of %s is %.3g from the CPU's (allowed %.3g), its logarithm %.3g (%.3g)", HS,
               carrier, param->name, off, limit, longer, length);
        const float *a = got.grads + param->offset, *b = r->run.grads + param->offset;
        expect(relative_distance(a, b, param->count, -1.0) > limit && fabs(longer + log(4.0 / 3.0)) > length,
               "HS %d: a wrong sign or a factor 4/3 in the gradient of %s is not seen", HS, param->name);
    }
    expect(!memcmp(got.grads, again.grads, bytes) && !memcmp(got.losses, again.losses, QUANT_TOKENS * sizeof(float)),
           "HS %d, carrier %s: two runs have other bits", HS, carrier);
    // signs of another micro-batch; they leave the loss alone
    expect(memcmp(got.grads, elsewhere.grads, bytes) &&
               !memcmp(got.losses, elsewhere.losses, QUANT_TOKENS * sizeof(float)),
           "HS %d, carrier %s: another micro-batch has the same gradients, or another loss", HS, carrier);
    printf("  HS %d %s, carrier %s: loss %.2g from the CPU's (allowed %.2g), tokens %.2g (%.2g), gradients %.2g of the "
           "allowed distance, lengths %.2g\n", HS, ROUNDING_NAMES[r->rounding], carrier, loss, r->loss_allowed, tokens,
           r->token_allowed, worst[0], worst[1]);
    quant_run_free(&got), quant_run_free(&again), quant_run_free(&elsewhere);
}

// gradients depend neither on what is made again nor on telemetry, which counts once
static void quant_test_recompute(const QuantReference* r) {
    QuantRun want = {};
    LinearTelemetry counted = {};
    for (int i = 0; i < 2 * RECOMPUTE_LEVELS; i++) {
        int level = i / 2, observe = i % 2;
        Model model;
        quant_model_gpu(&model, r, (Recompute)level);
        const char* what = label("HS %d, carrier %s, --recompute %s, telemetry %d", model.config.HS,
                                 gpu.carrier->name, RECOMPUTE_NAMES[level], observe);
        size_t bytes = model.table.elements * sizeof(float);
        model_begin_telemetry(&model, observe);
        QuantRun got = quant_run(&model, 0);
        if (observe) {
            LinearTelemetry t = model_read_telemetry(&model);
            counted = level == 0 ? t : counted;
            for (int kind = 0; kind < LINEAR_KINDS; kind++) {
                expect(t.x[kind].count == counted.x[kind].count && t.x[kind].zero == counted.x[kind].zero &&
                           !memcmp(t.under[kind], counted.under[kind], sizeof t.under[kind]),
                       "%s: what is made again is counted again", what);
            }
        }
        if (i == 0) {
            want = got;
        } else {
            expect_bits((char*)got.grads, want.grads, bytes, label("%s: gradients", what));
            quant_run_free(&got);
        }
        model_free(&model);
    }
    quant_run_free(&want);
}

// what backward reads as MXINT8: the loss is exact, gradients are near and, where nothing of it is kept, exact
static void quant_test_saved(const QuantReference* r, SavedInt8 choice) {
    QuantRun runs[RECOMPUTE_LEVELS + 1];
    int exact_from = choice == SAVED_INT8_FFN ? RECOMPUTE_FFN : RECOMPUTE_BLOCK;
    size_t bytes = r->model.table.elements * sizeof(float);
    for (int i = 0; i <= RECOMPUTE_LEVELS; i++) {  // the last one exact
        Model model;
        TrainingMemory training = MEMORY_EXACT;
        training.recompute = (Recompute)(i % RECOMPUTE_LEVELS);
        training.saved_int8 = i < RECOMPUTE_LEVELS ? choice : SAVED_INT8_NONE;
        model_prepare(&model, &CUDA_OPS, &r->model.config, recipe_find("quartet"), training, MODEL_B, MODEL_T);
        model.linear.option_rounding = r->rounding;
        model.linear.seed = 4321;
        model_allocate(&model);
        model_state_set(&model, r->begin);
        runs[i] = quant_run(&model, 0);
        model_free(&model);
    }
    const QuantRun* exact = &runs[RECOMPUTE_LEVELS];
    for (int i = 0; i < RECOMPUTE_LEVELS; i++) {
        int same = !memcmp(runs[i].grads, exact->grads, bytes);
        const char* what = label("HS %d, carrier %s, --recompute %s, --saved-int8 %s", r->model.config.HS,
                                 gpu.carrier->name, RECOMPUTE_NAMES[i], SAVED_INT8_NAMES[choice]);
        expect(same == (i >= exact_from) && !memcmp(runs[i].losses, exact->losses, QUANT_TOKENS * sizeof(float)),
               "%s: %s gradients, or other losses", what, same ? "the same" : "other");
        expect(relative_distance(runs[i].grads, exact->grads, r->model.table.elements, 1.0) < 0.25,
               "%s: far gradients", what);
    }
    int agree = !memcmp(runs[0].grads, runs[1].grads, bytes);
    expect(agree == (choice == SAVED_INT8_FFN), "HS %d, --saved-int8 %s: levels none and norm", r->model.config.HS,
           SAVED_INT8_NAMES[choice]);
    for (int i = 0; i <= RECOMPUTE_LEVELS; i++) {
        quant_run_free(&runs[i]);
    }
}

// leaves both models trained
static void quant_test_curve(Model* model, Model* twin, const QuantReference* r) {
    double got[CURVE_STEPS], again[CURVE_STEPS], other[CURVE_STEPS];
    int HS = model->config.HS;
    quant_train_curve(twin, other, 1.5 * QUANT_LR);
    model_state_set(model, r->begin);
    model_state_set(twin, r->begin);
    quant_train_curve(model, got, QUANT_LR);
    quant_train_curve(twin, again, QUANT_LR);
    double off = curve_distance(got, r->curve), planted = curve_distance(other, r->curve);
    expect(off <= r->curve_allowed, "HS %d, carrier %s: losses %.3g from the CPU's, allowed %.3g", HS,
           gpu.carrier->name, off, r->curve_allowed);
    expect(planted > r->curve_allowed, "HS %d: another learning rate is not seen: %.3g, allowed %.3g", HS, planted,
           r->curve_allowed);
    expect(got[CURVE_STEPS - 1] < 0.9 * got[0], "HS %d: does not learn: %.6g after %.6g", HS, got[CURVE_STEPS - 1],
           got[0]);
    expect(!memcmp(got, again, sizeof got) && memcmp(got, other, sizeof got), "HS %d: two runs have other losses", HS);
    expect_same_state(model, twin, label("two CUDA runs, carrier %s", gpu.carrier->name));
    printf("  HS %d %s, carrier %s: %d steps, loss %.4f to %.4f, the CPU's %.4f, at most %.3g apart (allowed %.3g, "
           "planted %.3g)\n", HS, ROUNDING_NAMES[r->rounding], gpu.carrier->name, CURVE_STEPS, got[0],
           got[CURVE_STEPS - 1], r->curve[CURVE_STEPS - 1], off, r->curve_allowed, planted);
}

// ---------------------------------------------------------------------------------------------------------------------
// recorded steps: the same bits as issued ones, with random numbers of their own

#define REPLAYED_STEPS 6

// on one and the same batch; frozen: the position stands still
static char* quant_replay(const QuantReference* r, double* losses, double* squares, int recorded, int frozen,
                          double lr) {
    Model model;
    int32_t inputs[QUANT_TOKENS], targets[QUANT_TOKENS];
    quant_model_gpu(&model, r, RECOMPUTE_NONE);
    ReplayedStep work = {&model, lr};
    RecordedWork* slot = &recorded_work[GRAPH_IDS - 1];
    *slot = RecordedWork{0, NULL};
    model_batch(inputs, targets, 0, model.config.V);
    for (int s = 0; s < REPLAYED_STEPS; s++) {
        model_begin_step(&model, lr, 0.9, 0.95, s + 1);
        model_load_batch(&model, inputs, targets, frozen ? 0 : s, 0);
        if (recorded) {
            CUDA_OPS.replay(GRAPH_IDS - 1, replayed_step, &work);
        } else {
            replayed_step(&work);
        }
        StepControl result = model_read_control(&model);
        losses[s] = result.loss_sum;
        squares[s] = result.grad_squares;
    }
    expect(!recorded || slot->graph, "nothing was recorded");
    if (slot->graph) {
        cuda_check(cudaGraphExecDestroy(slot->graph));
    }
    *slot = RecordedWork{0, NULL};
    char* state = model_state_get(&model);
    model_free(&model);
    return state;
}

static void quant_test_replay(const QuantReference* r) {
    double issued[2][REPLAYED_STEPS], recorded[2][REPLAYED_STEPS], frozen[2][REPLAYED_STEPS];
    size_t bytes = model_state_bytes(&r->model), half = 2 * sizeof(double), all = sizeof issued[0];
    const char* what = label("HS %d, carrier %s", r->model.config.HS, gpu.carrier->name);
    char* a = quant_replay(r, issued[0], issued[1], 0, 0, QUANT_LR);
    char* b = quant_replay(r, recorded[0], recorded[1], 1, 0, QUANT_LR);
    char* c = quant_replay(r, frozen[0], frozen[1], 1, 1, QUANT_LR);
    expect(!memcmp(issued, recorded, sizeof issued), "%s: losses or norms of recorded steps differ", what);
    expect_bits(a, b, bytes, label("%s: state after recorded steps", what));
    // the first step has the same position; the second one has the loss of the first one's update, and another gradient
    expect(!memcmp(recorded[0], frozen[0], half) && recorded[1][0] == frozen[1][0], "%s: the first steps differ", what);
    for (int s = 1; s < REPLAYED_STEPS; s++) {
        expect(recorded[1][s] != frozen[1][s] && (s < 2 || recorded[0][s] != frozen[0][s]),
               "%s: step %d was replayed with the random numbers of step 0", what, s);
    }
    expect(memcmp(b, c, bytes) != 0 && issued[0][5] < issued[0][0], "%s: frozen numbers are not seen, or no learning",
           what);
    test_free(a, b, c);
    // nothing learnt: gradients differ by their random numbers alone
    a = quant_replay(r, recorded[0], recorded[1], 1, 0, 0.0);
    b = quant_replay(r, frozen[0], frozen[1], 1, 1, 0.0);
    expect(!memcmp(recorded[0], frozen[0], all), "%s: losses without learning differ", what);
    for (int s = 1; s < REPLAYED_STEPS; s++) {
        expect(frozen[1][s] == frozen[1][0] && recorded[1][s] != recorded[1][s - 1],
               "%s: gradient of step %d, norm %.9g after %.9g, frozen %.9g after %.9g", what, s, recorded[1][s],
               recorded[1][s - 1], frozen[1][s], frozen[1][0]);
    }
    test_free(a, b);
}

// ---------------------------------------------------------------------------------------------------------------------
// checkpoints, generation

// saved by one, loaded by the other: the same bits
static void quant_move(Model* from, Model* to, int step, const char* what) {
    char error[1024], *out = make_temp_folder();
    Config config = test_config(0, NULL);
    RunState state = {.step = step, .tokens = 777, .data_fingerprint = 1, .run_id = "abc"};
    int damaged;
    Json* saved = NULL;
    expect(checkpoint_save(out, from, &config, &state, NULL, 3, error, sizeof error) == 0, "%s", error);
    to->ops->zero(to->memory[MEMORY_PARAMS], to->memory_bytes[MEMORY_PARAMS]);
    to->ops->zero(to->memory[MEMORY_OPTIMIZER], to->memory_bytes[MEMORY_OPTIMIZER]);
    char* folder = checkpoint_find(&COMM_SINGLE, out, &saved, &damaged);
    if (expect(folder && damaged == 0, "%s: no checkpoint found", what)) {
        RunState loaded = checkpoint_load(&COMM_SINGLE, to, folder, saved);
        expect(loaded.step == step && loaded.tokens == 777, "%s: state differs", what);
        expect_same_state(to, from, what);
    }
    free(folder);
    json_free(saved);
    remove_folder(out);
}

// GPU, a step on the CPU, GPU again: each step's loss is what the other device has for it. Gives the CPU's model back.
static void quant_test_checkpoint(Model* model, QuantReference* r) {
    const char* carrier = gpu.carrier->name;
    Model* cpu_model = &r->model;
    for (int k = 0; k < 2; k++) {
        int step = CURVE_STEPS + k;
        Model *from = k ? cpu_model : model, *to = k ? model : cpu_model;
        quant_move(from, to, step, label("%s, carrier %s", k ? "CPU to GPU" : "GPU to CPU", carrier));
        double a = quant_train_step(from, step, QUANT_LR), b = quant_train_step(to, step, QUANT_LR);
        expect(fabs(a - b) <= r->curve_allowed, "carrier %s: goes on with loss %.9g instead of %.9g, allowed %.3g",
               carrier, b, a, r->curve_allowed);
    }
    model_state_set(cpu_model, r->begin);
}

static void quant_test_generate(Model* model) {
    const int V = model->config.V;
    int a[MODEL_T] = {1, 2, 3, 4, 5}, b[MODEL_T] = {1, 2, 3, 4, 5}, c[MODEL_T] = {1, 2, 3, 4, 6}, within = 1;
    int n = generate(model, a, 5, MODEL_T, V, 0.0, 7, 1), again = generate(model, b, 5, MODEL_T, V, 0.0, 7, 1);
    generate(model, c, 5, MODEL_T, V, 0.0, 7, 1);
    for (int i = 0; i < MODEL_T; i++) {
        within &= a[i] >= 0 && a[i] < V;
    }
    expect(n == MODEL_T && again == n && within && !memcmp(a, b, sizeof a), "HS %d, carrier %s: greedy generation",
           model->config.HS, gpu.carrier->name);
    expect(memcmp(a + 5, c + 5, sizeof a - 5 * sizeof a[0]) != 0, "HS %d: another prompt is not seen",
           model->config.HS);
}

// ---------------------------------------------------------------------------------------------------------------------

static void cuda_test_quant_model(QuantReference* r) {
    Model model, twin;
    quant_model_gpu(&model, r, RECOMPUTE_NONE);
    quant_model_gpu(&twin, r, RECOMPUTE_NONE);
    quant_test_gradients(&model, r);
    quant_test_recompute(r);
    quant_test_saved(r, SAVED_INT8_FFN);
    quant_test_saved(r, SAVED_INT8_ALL);
    quant_test_replay(r);
    quant_test_curve(&model, &twin, r);
    quant_test_generate(&model);
    quant_test_checkpoint(&model, r);
    model_free(&model);
    model_free(&twin);
}

// each part on every carrier that runs here
static void quant_each_carrier(void (*part)(QuantReference*), QuantReference* r) {
    for (int i = 0; i < CARRIER_COUNT; i++) {
        if (quant_carrier_runs(&CARRIERS[i])) {
            gpu.carrier = &CARRIERS[i];
            quant_forget_plans();
            part(r);
        }
    }
}

static void quant_products_part(QuantReference*) { cuda_test_products_of_carrier(); }
static void quant_linears_part(QuantReference*) { cuda_test_linears_of_carrier(); }
static void quant_self_test_part(QuantReference*) {
    self_test(&CUDA_OPS, 0);  // ends the process where it fails
    expect(1, "self-test");
}

static void test_cuda_quant(void) {
    if (!cuda_test_begin("cuda_quant")) {
        return;
    }
    const Carrier* before = gpu.carrier;
    cuda_test_operands();
    quant_each_carrier(quant_products_part, NULL);
    quant_each_carrier(quant_linears_part, NULL);
    for (int k = 0; k < 2; k++) {
        QuantReference r = quant_reference(k ? 64 : 32, k, k ? ROUND_STOCHASTIC : ROUND_NEAREST);
        quant_each_carrier(cuda_test_quant_model, &r);
        quant_reference_free(&r);
    }
    quant_each_carrier(quant_self_test_part, NULL);
    quant_forget_plans();
    gpu.carrier = before;
}
#endif
