// bench.h: --bench. Times every class of operation at the model's own shapes, and whole training steps, against the
// ceilings measured in the same run: the rate that the library reaches alone on large products (BLAS in f32, cuBLASLt
// in floatX), and the bandwidth of a large copy. bench_linear.h takes the linear layers apart.
//
// Work is counted as the fewest floating-point operations and bytes that the operation needs: every input read once,
// every output written once. The model's own rate counts 6 operations per parameter of a matrix and token, plus
// attention (12 L T A / 2 a token, causal): forward 2, backward 4. Each operation stands by itself here: those that
// quantizing blocks fuse (norms, SwiGLU) are in the linear layers' rows once more.
#pragma once
#include "bench_linear.h"

typedef struct {
    const char* name;
    void (*run)(Bench* bench);
    double calls;         // a micro-batch
    double flops, bytes;  // a call
} BenchRow;

static void bench_embedding(Bench* bench) {
    Model* model = bench->model;
    model->ops->embedding_forward(model->blocks[0].inp, model->inputs, model_weight(model, P_EMBED, -1),
                                  bench_tokens(model), model->config.C);
}
static void bench_rope(Bench* bench) {
    Model* model = bench->model;
    model->ops->rope(bench_block(bench)->qkv, model->rope_table, attention_shape(model, model->B, model->T), 0, 0);
}
static void bench_attention(Bench* bench) {
    Model* model = bench->model;
    BlockActivations* b = bench_block(bench);
    model->ops->attention_forward(b->att, b->lse, b->qkv, attention_shape(model, model->B, model->T));
}
static void bench_attention_backward(Bench* bench) {
    Model* model = bench->model;
    BlockActivations* b = bench_block(bench);
    model->ops->attention_backward(model->dqkv, model->datt, b->att, b->qkv, b->lse,
                                   attention_shape(model, model->B, model->T));
}
static void bench_classifier(Bench* bench) { model_classifier(bench->model, 1e-6f, 1); }

static void bench_linears_forward(Bench* bench) {
    Model* model = bench->model;
    BlockActivations* b = bench_block(bench);
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        bench->kind = (LinearKind)kind;
        LinearBuffers buffers = bench_buffers(bench);
        linear_forward(&model->linear, bench_linear(bench), buffers.out, &b->x[kind], b->x_memory[kind], buffers.inp,
                       bench_tokens(model));
    }
}
static void bench_linears_backward(Bench* bench) {
    Model* model = bench->model;
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        bench->kind = (LinearKind)kind;
        LinearBuffers buffers = bench_buffers(bench);
        linear_backward(&model->linear, bench_linear(bench), buffers.dinp, buffers.dout, &bench_block(bench)->x[kind],
                        bench_tokens(model));
    }
}

static void bench_norm(Bench* bench) {
    Model* model = bench->model;
    model->ops->sum_squares(&model->control->grad_squares, model->grads, model->table.elements);
}
static void bench_adamw(Bench* bench) {
    Model* model = bench->model;
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
static void bench_embedding_backward(Bench* bench) {
    Model* model = bench->model;
    model->ops->embedding_backward(model_grad(model, P_EMBED, -1), model->dresidual, model->inputs, bench_tokens(model),
                                   model->config.V, model->config.C);
}
static void bench_crossentropy(Bench* bench) {
    Model* model = bench->model;
    model->ops->crossentropy(model->losses, model->logits, model->targets, model->classifier_rows, model->config.V,
                             1e-6f, 1);
}

static void bench_table(Bench* bench) {
    const Model* model = bench->model;
    const ModelConfig* m = &model->config;
    double BT = bench_tokens(model), C = m->C, F = m->F, A = (double)m->NH * m->HS, KV = (double)m->NKV * m->HS,
           L = m->L, like = bench_calls(bench).blocks;
    double x = sizeof(floatX), linear = (A + 2 * KV) * C + A * C + 3 * C * F, attention = 4.0 * BT * model->T / 2 * A;
    double kept = bench_kept_bytes(bench);
    BenchRow rows[] = {
        {"embedding", bench_embedding, 1, 0, 2 * x * BT * C},
        {"rmsnorm forward", bench_rmsnorm, 1, 0, 2 * x * BT * C},
        {"rmsnorm backward", bench_rmsnorm_backward, 2 * L, 0, 4 * x * BT * C},
        {"add and rmsnorm forward", bench_add_rmsnorm, 2 * L, 0, 4 * x * BT * C},
        {"rope", bench_rope, 2 * L, 0, 2 * x * BT * (A + KV)},
        {"swiglu forward", bench_swiglu, L, 0, 3 * x * BT * F + kept},
        {"swiglu backward", bench_swiglu_backward, L, 0, 3 * x * BT * F + (kept > 0 ? kept : 2 * x * BT * F)},
        {"pack as MXINT8", bench_pack, like, 0, bench_pack_bytes(bench)},
        {"unpack MXINT8", bench_unpack, like, 0, bench_pack_bytes(bench)},
        {"attention forward", bench_attention, L, attention, 0},
        {"attention backward", bench_attention_backward, L, 2.5 * attention, 0},
        {"linear forward (4 layers)", bench_linears_forward, like, 2 * BT * linear, 0},
        {"linear backward (4 layers)", bench_linears_backward, like, 4 * BT * linear, 0},
        {"head and cross-entropy", bench_classifier, 1, 6 * BT * C * m->V, 0},
        {"  of it: cross-entropy", bench_crossentropy, BT / model->classifier_rows, 0,
         2 * x * model->classifier_rows * m->V},
        {"embedding backward", bench_embedding_backward, 1, 0, (x + 8) * BT * C},
        {"gradient norm", bench_norm, 0, 0, (double)real_bytes(model->grads.type) * (double)model->table.elements},
        {"AdamW", bench_adamw, 0, 0, bench_adamw_bytes(model) * (double)model->table.elements},
    };
    printf("%-28s %8s %10s %10s %12s %6s\n", "operation", "calls", "ms a call", "ms", "rate", "% max");
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (rows[i].flops + rows[i].bytes <= 0) {  // nothing to do, as to pack where nothing is kept
            continue;
        }
        double seconds = bench_time(bench, rows[i].run);
        double rate = (rows[i].flops > 0 ? rows[i].flops : rows[i].bytes) / seconds;
        printf("%-28s %8.0f %10.3f %10.2f %7.1f %s %5.0f%%\n", rows[i].name, rows[i].calls, seconds * 1e3,
               seconds * 1e3 * rows[i].calls, rate * 1e-9, rows[i].flops > 0 ? "GF/s" : "GB/s",
               100 * rate / (rows[i].flops > 0 ? bench->gemm_rate : bench->copy_rate));
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
    Bench bench = bench_begin(model);
    bench.gemm_rate = model->ops->gemm_rate();
    bench.copy_rate = model->ops->copy_rate();
    char device[320];
    model->ops->describe(device, sizeof device);
    printf("device     %s\nceilings   GEMM %.0f GFLOP/s, copy %.1f GB/s\n", device, bench.gemm_rate * 1e-9,
           bench.copy_rate * 1e-9);
    printf("model      %s, recipe %s, micro-batch %d x %d\n", m->name, run->recipe->name, model->B, model->T);
    double issued = bench_steps(model, run, tokens, tokens + 1, 0);
    double seconds = bench_steps(model, run, tokens, tokens + 1, 1), flops = BT * model_flops_per_token(model);
    bench.step_seconds = seconds;
    bench_linears(&bench);  // before AdamW is timed, which moves the weights far
    bench_refresh(&bench);
    bench_table(&bench);
    printf(
        "step       %.1f ms a micro-batch and update, %.0f tokens/s, model %.1f GFLOP/s, %.0f %% of the GEMM ceiling\n",
        seconds * 1e3, BT / seconds, flops / seconds * 1e-9, 100 * flops / seconds / bench.gemm_rate);
    printf("graphs     the step takes %.1f ms where its operations are issued one by one\n", issued * 1e3);
    printf("memory     %.1f GiB in use\n", (double)model->ops->used_bytes() / 1073741824.0);
    free(tokens);
}
