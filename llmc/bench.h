// bench.h: --bench. Times every class of operation at the model's own shapes, and whole training steps, against the
// ceilings measured in the same run: the rate that the library reaches alone on large products (BLAS in f32, cuBLASLt
// in floatX), and the bandwidth of a large copy.
//
// Work is counted as the fewest floating-point operations and bytes that the operation needs: every input read once,
// every output written once. The model's own rate counts 6 operations per parameter of a matrix and token, plus
// attention (12 L T A / 2 a token, causal): forward 2, backward 4.
#pragma once
#include "optimizer.h"
#include "run.h"

typedef struct {
    const char* name;
    void (*run)(Model* model);
    double calls;         // a micro-batch
    double flops, bytes;  // a call
} BenchRow;

#define BENCH_BLOCK 0  // the block whose buffers are used
#define BENCH_MAX_REPEATS 50

static Linear* bench_linear(Model* model, LinearKind kind) {
    return &model->linears[BENCH_BLOCK * LINEAR_KINDS + kind];
}
static int bench_tokens(const Model* model) { return model->B * model->T; }

static void bench_embedding(Model* model) {
    model->ops->embedding_forward(model->blocks[0].inp, model->inputs, model_weight(model, P_EMBED, -1),
                                  bench_tokens(model), model->config.C);
}
static void bench_rmsnorm(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    model->ops->rmsnorm_forward(b->norm1, b->rstd1, b->inp, model_weight(model, P_NORM1, BENCH_BLOCK),
                                bench_tokens(model), model->config.C, (float)model->config.rms_eps);
}
static void bench_rmsnorm_backward(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    model->ops->rmsnorm_backward(model->dresidual, model_grad(model, P_NORM1, BENCH_BLOCK), model->dnorm,
                                 model->dresidual, b->inp, model_weight(model, P_NORM1, BENCH_BLOCK), b->rstd1,
                                 bench_tokens(model), model->config.C);
}
static void bench_rope(Model* model) {
    model->ops->rope(model->blocks[BENCH_BLOCK].qkv, model->rope_table, attention_shape(model, model->B, model->T), 0,
                     0);
}
static void bench_attention(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    model->ops->attention_forward(b->att, b->lse, b->qkv, attention_shape(model, model->B, model->T));
}
static void bench_attention_backward(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    model->ops->attention_backward(model->dqkv, model->datt, b->att, b->qkv, b->lse,
                                   attention_shape(model, model->B, model->T));
}
static void bench_swiglu(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    model->ops->swiglu_forward(b->act, MXFP8_NONE, b->gate_up, bench_tokens(model), model->config.F);
}
static void bench_swiglu_backward(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    model->ops->swiglu_backward(model->dgate_up, model->dact, b->gate_up, MXFP8_NONE, bench_tokens(model),
                                model->config.F);
}
static void bench_add_rmsnorm(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    model->ops->add_rmsnorm_forward(b->mid, b->norm2, b->rstd2, b->inp, model->projection,
                                    model_weight(model, P_NORM2, BENCH_BLOCK), bench_tokens(model), model->config.C,
                                    (float)model->config.rms_eps);
}
static void bench_classifier(Model* model) { model_classifier(model, 1e-6f, 1); }

// the parts of the gate+up layer, the widest one: quantizers, products, finish
static void bench_quantize_x(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    linear_operand(&model->linear, OPERAND_X, bench_linear(model, LINEAR_GATE_UP), b->x_memory[LINEAR_GATE_UP],
                   model->linear.operand_a,
                   bench_tokens(model), model->config.C, b->norm2, NULL, 0, NULL);
}
static void bench_quantize_dy(Model* model) {
    linear_operand(&model->linear, OPERAND_DY, bench_linear(model, LINEAR_GATE_UP), NULL, model->linear.operand_a,
                   bench_tokens(model), 2 * model->config.F, model->dgate_up, NULL, 0, NULL);
}
static void bench_quantize_dyt(Model* model) {
    linear_operand(&model->linear, OPERAND_DYT, bench_linear(model, LINEAR_GATE_UP), NULL, model->linear.operand_a,
                   2 * model->config.F, bench_tokens(model), model->dgate_up, NULL, 1, NULL);
}
static void bench_quantize_wt(Model* model) {
    Linear* linear = bench_linear(model, LINEAR_GATE_UP);
    linear_operand(&model->linear, OPERAND_WT, linear, NULL, model->linear.operand_b, linear->C, linear->OC,
                   linear->weight, &linear->w, 1, NULL);
}
static void bench_quantize_xt(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    linear_operand(&model->linear, OPERAND_XT, bench_linear(model, LINEAR_GATE_UP), NULL, model->linear.operand_b,
                   model->config.C, bench_tokens(model), b->norm2, &b->x[LINEAR_GATE_UP], 1, NULL);
}
static void bench_unrotate(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    model->ops->unrotate(real_floatX(model->dnorm), b->x[LINEAR_GATE_UP].mask, NULL, bench_tokens(model),
                         model->config.C);
}
static void bench_linears_forward(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    const floatX* inputs[] = {b->norm1, b->att, b->norm2, b->act};
    floatX* outputs[] = {b->qkv, model->projection, b->gate_up, model->projection};
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        linear_forward(&model->linear, bench_linear(model, (LinearKind)kind), outputs[kind], &b->x[kind],
                       b->x_memory[kind], inputs[kind], bench_tokens(model));
    }
}
static void bench_linears_backward(Model* model) {
    BlockActivations* b = &model->blocks[BENCH_BLOCK];
    floatX* dinps[] = {model->dnorm, model->datt, model->dnorm, model->dact};
    const floatX* douts[] = {model->dqkv, model->dresidual, model->dgate_up, model->dresidual};
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        linear_backward(&model->linear, bench_linear(model, (LinearKind)kind), dinps[kind], douts[kind], &b->x[kind],
                        bench_tokens(model));
    }
}

static int compare_doubles(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return x < y ? -1 : x > y;
}

static void bench_norm(Model* model) {
    model->ops->sum_squares(&model->control->grad_squares, model->grads, model->table.elements);
}
static void bench_adamw(Model* model) {
    AdamwArgs args = {.param = model->params,
                      .master = model->master,
                      .m = model->m,
                      .v = model->v,
                      .grad = model->grads,
                      .first = 0,
                      .count = model->table.elements,
                      .beta1 = 0.9f,
                      .beta2 = 0.95f,
                      .eps = 1e-8f,
                      .weight_decay = 0.1f,
                      .seed = 1,
                      .control = model->control};
    model->ops->adamw(&args);
}
// read and written for one element: weights, moments, gradient
static double bench_adamw_bytes(const Model* model) {
    size_t weights = model->master ? 2 * sizeof(float) + sizeof(floatX) : 2 * sizeof(floatX);
    return (double)(weights + 4 * real_bytes(model->m.type) + real_bytes(model->grads.type));
}
static void bench_embedding_backward(Model* model) {
    model->ops->embedding_backward(model_grad(model, P_EMBED, -1), model->dresidual, model->inputs, bench_tokens(model),
                                   model->config.V, model->config.C);
}
static void bench_crossentropy(Model* model) {
    model->ops->crossentropy(model->losses, model->logits, model->targets, model->classifier_rows, model->config.V,
                             1e-6f, 1);
}

// median seconds of a call, over about a third of a second
static double bench_time(Model* model, void (*run)(Model* model)) {
    double times[BENCH_MAX_REPEATS], begin = clock_seconds();
    int n = 0;
    run(model);
    model->ops->synchronize();
    double once = clock_seconds();
    run(model);
    model->ops->synchronize();
    int inner = clock_seconds() - once < 2e-3 ? 10 : 1;  // short ones back to back, so that waiting does not count
    while (n < BENCH_MAX_REPEATS && (n < 5 || clock_seconds() - begin < 0.3)) {
        double start = clock_seconds();
        for (int i = 0; i < inner; i++) {
            run(model);
        }
        model->ops->synchronize();
        times[n++] = (clock_seconds() - start) / inner;
    }
    qsort(times, (size_t)n, sizeof(double), compare_doubles);
    return times[n / 2];
}

static void bench_table(Model* model, double gemm_ceiling, double copy_ceiling) {
    const ModelConfig* m = &model->config;
    double BT = bench_tokens(model), C = m->C, F = m->F, A = (double)m->NH * m->HS, KV = (double)m->NKV * m->HS,
           L = m->L;
    double x = sizeof(floatX), linear = (A + 2 * KV) * C + A * C + 3 * C * F, attention = 4.0 * BT * model->T / 2 * A;
    double packed = 0.5 + 1.0 / 32;
    BenchRow rows[] = {
        {"embedding", bench_embedding, 1, 0, 2 * x * BT * C},
        {"rmsnorm forward", bench_rmsnorm, 1, 0, 2 * x * BT * C},
        {"rmsnorm backward", bench_rmsnorm_backward, 2 * L, 0, 4 * x * BT * C},
        {"add and rmsnorm forward", bench_add_rmsnorm, 2 * L, 0, 4 * x * BT * C},
        {"rope", bench_rope, 2 * L, 0, 2 * x * BT * (A + KV)},
        {"swiglu forward", bench_swiglu, L, 0, 3 * x * BT * F},
        {"swiglu backward", bench_swiglu_backward, L, 0, 5 * x * BT * F},
        {"attention forward", bench_attention, L, attention, 0},
        {"attention backward", bench_attention_backward, L, 2.5 * attention, 0},
        {"linear forward (4 layers)", bench_linears_forward, L, 2 * BT * linear, 0},
        {"linear backward (4 layers)", bench_linears_backward, L, 4 * BT * linear, 0},
        {"head and cross-entropy", bench_classifier, 1, 6 * BT * C * m->V, 0},
        {"  of it: cross-entropy", bench_crossentropy, BT / model->classifier_rows, 0,
         2 * x * model->classifier_rows * m->V},
        {"embedding backward", bench_embedding_backward, 1, 0, (x + 8) * BT * C},
        {"gradient norm", bench_norm, 0, 0, (double)real_bytes(model->grads.type) * (double)model->table.elements},
        {"AdamW", bench_adamw, 0, 0, bench_adamw_bytes(model) * (double)model->table.elements},
        {"  of gate_up: quantize x", bench_quantize_x, L, 0, BT * C * (x + packed + 0.125)},
        {"  of gate_up: quantize dy", bench_quantize_dy, L, 0, BT * 2 * F * (x + packed)},
        {"  of gate_up: quantize dyT", bench_quantize_dyt, L, 0, BT * 2 * F * (x + packed)},
        {"  of gate_up: quantize wT", bench_quantize_wt, L, 0, C * 2 * F * 2 * packed},
        {"  of gate_up: quantize xT", bench_quantize_xt, L, 0, BT * C * 2 * packed},
        {"  of gate_up: mask and H^T", bench_unrotate, L, 0, BT * C * (2 * x + 0.125)},
    };
    int quantized = model->recipe->x.format == FORMAT_MXFP4;
    printf("%-28s %8s %10s %10s %12s %6s\n", "operation", "calls", "ms a call", "ms", "rate", "% max");
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (strstr(rows[i].name, "of gate_up") && !quantized) {
            continue;
        }
        double seconds = bench_time(model, rows[i].run);
        double rate = (rows[i].flops > 0 ? rows[i].flops : rows[i].bytes) / seconds * 1e-9;
        printf("%-28s %8.0f %10.3f %10.2f %7.1f %s %5.0f%%\n", rows[i].name, rows[i].calls, seconds * 1e3,
               seconds * 1e3 * rows[i].calls, rate, rows[i].flops > 0 ? "GF/s" : "GB/s",
               100 * rate / (rows[i].flops > 0 ? gemm_ceiling : copy_ceiling));
        fflush(stdout);
    }
}

typedef struct { Model* model; const Run* run; } BenchStep;

static void bench_step_work(void* argument) {
    Model* model = ((BenchStep*)argument)->model;
    const Run* run = ((BenchStep*)argument)->run;
    model->weights_quantized = 0;
    model_zero_gradients(model);
    model_run_forward(model, 1.0f / (float)bench_tokens(model), 1);
    model_backward(model);
    model_finish_gradients(model);
    optimizer_step(model, &run->comm, &run->config);
}

// median seconds of optimizer steps of one micro-batch, recorded (as training runs) or issued one operation at a time
static double bench_steps(Model* model, const Run* run, const int32_t* inputs, const int32_t* targets, int recorded) {
    enum { STEPS = 7, WARM = 2 };
    double times[STEPS];
    BenchStep step = {model, run};
    for (int i = 0; i < STEPS; i++) {
        double begin = clock_seconds();
        model_begin_step(model, 1e-4, run->config.beta1, run->config.beta2, i + 1);
        model_load_batch(model, inputs, targets, i, 0);
        if (recorded) {
            model->ops->replay(0, bench_step_work, &step);
        } else {
            bench_step_work(&step);
        }
        model->ops->synchronize();
        times[i] = clock_seconds() - begin;
    }
    qsort(times + WARM, STEPS - WARM, sizeof(double), compare_doubles);
    return times[WARM + (STEPS - WARM) / 2];
}

static void bench_run(const Run* run, Model* model) {
    const ModelConfig* m = &model->config;
    int BT = bench_tokens(model);
    model_allocate(model);
    model_init_weights(model, (uint64_t)run->config.seed);
    int32_t* tokens = (int32_t*)malloc_or_die(sizeof(int32_t) * (size_t)(BT + 1), "tokens");
    for (int i = 0; i <= BT; i++) {
        tokens[i] = (int32_t)(philox(1, (uint64_t)i, 0).w[0] % (uint32_t)m->V);
    }
    double gemm_ceiling = model->ops->gemm_rate() * 1e-9, copy_ceiling = model->ops->copy_rate() * 1e-9;
    char device[320];
    model->ops->describe(device, sizeof device);
    printf("device     %s\nceilings   GEMM %.0f GFLOP/s, copy %.1f GB/s\n", device, gemm_ceiling, copy_ceiling);
    printf("model      %s, recipe %s, micro-batch %d x %d\n", m->name, run->recipe->name, model->B, model->T);
    double issued = bench_steps(model, run, tokens, tokens + 1, 0);
    double seconds = bench_steps(model, run, tokens, tokens + 1, 1), flops = BT * model_flops_per_token(model);
    bench_table(model, gemm_ceiling, copy_ceiling);
    printf(
        "step       %.1f ms a micro-batch and update, %.0f tokens/s, model %.1f GFLOP/s, %.0f %% of the GEMM ceiling\n",
        seconds * 1e3, BT / seconds, flops / seconds * 1e-9, 100 * flops / seconds * 1e-9 / gemm_ceiling);
    printf("graphs     the step takes %.1f ms where its operations are issued one by one\n", issued * 1e3);
    printf("memory     %.1f GiB in use\n", (double)model->ops->used_bytes() / 1073741824.0);
    free(tokens);
}
