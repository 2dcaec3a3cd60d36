// bench_ops.h: what --bench times: each operation of a step as a function of one argument, on the model's own buffers.
#pragma once
#include "optimizer.h"
#include "run.h"

#define BENCH_MAX_REPEATS 50

// What the operations that are timed work on
typedef struct {
    Model* model;
    int block;                        // whose buffers are used: the first quantized one, or 0
    double copy_rate, gemm_rate;      // ceilings: bytes a second, FLOP/s
    double step_seconds;              // of a step with one micro-batch
    LinearKind kind;                  // linear layer in work
    QTensor made[OPERANDS];           // its operands of backward
    Owed owed;                        // by its dX
} Bench;

static int bench_tokens(const Model* model) { return model->B * model->T; }
static BlockActivations* bench_block(const Bench* bench) { return &bench->model->blocks[bench->block]; }
static Linear* bench_linear(const Bench* bench) {
    return &bench->model->linears[bench->block * LINEAR_KINDS + bench->kind];
}

static Bench bench_begin(Model* model) {
    Bench bench;
    memset(&bench, 0, sizeof bench);
    bench.model = model;
    for (int l = model->config.L - 1; l >= 0; l--) {
        bench.block = block_is_dense(model, l) ? bench.block : l;
    }
    return bench;
}

static int compare_doubles(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return x < y ? -1 : x > y;
}

// Median seconds of a call, over about a third of a second. The first call, with bases of its own, finds those that the
// others expect, as a micro-batch of training does for the next: a quantizer that expects another base writes twice.
static double bench_time(Bench* bench, void (*run)(Bench* bench)) {
    double times[BENCH_MAX_REPEATS], begin = clock_seconds();
    const Ops* ops = bench->model->ops;
    int n = 0;
    model_begin_operands(bench->model);
    run(bench);
    model_begin_operands(bench->model);
    run(bench);
    ops->synchronize();
    double once = clock_seconds();
    run(bench);
    ops->synchronize();
    int inner = clock_seconds() - once < 2e-3 ? 10 : 1;  // short ones back to back, so that waiting does not count
    while (n < BENCH_MAX_REPEATS && (n < 5 || clock_seconds() - begin < 0.3)) {
        double start = clock_seconds();
        for (int i = 0; i < inner; i++) {
            run(bench);
        }
        ops->synchronize();
        times[n++] = (clock_seconds() - start) / inner;
    }
    qsort(times, (size_t)n, sizeof(double), compare_doubles);
    return times[n / 2];
}

// A micro-batch, then the block's forward once more: all buffers hold what they hold in training, whatever was timed.
static void bench_refresh(Bench* bench) {
    Model* model = bench->model;
    model->weights_quantized = 0;
    model_run_forward(model, 1.0f / (float)bench_tokens(model), 1);
    model_backward(model);
    model_enter_block(model, &model->linear, bench->block, bench_block(bench)->inp, NULL);
    model_forward_block_inside(model, &model->linear, bench->block);
}

// ---------------------------------------------------------------------------------------------------------------------
// passes of the bf16 model

static void bench_rmsnorm(Bench* bench) {
    Model* model = bench->model;
    BlockActivations* b = bench_block(bench);
    model->ops->rmsnorm_forward(b->norm1, b->rstd1, b->inp, model_weight(model, P_NORM1, bench->block),
                                bench_tokens(model), model->config.C, (float)model->config.rms_eps);
}
static void bench_add_rmsnorm(Bench* bench) {
    Model* model = bench->model;
    BlockActivations* b = bench_block(bench);
    model->ops->add_rmsnorm_forward(b->mid, b->norm2, b->rstd2, b->inp, model->projection,
                                    model_weight(model, P_NORM2, bench->block), bench_tokens(model), model->config.C,
                                    (float)model->config.rms_eps);
}
static void bench_rmsnorm_backward(Bench* bench) {
    Model* model = bench->model;
    BlockActivations* b = bench_block(bench);
    model->ops->rmsnorm_backward(model->dresidual, model_grad(model, P_NORM1, bench->block), model->dnorm,
                                 model->dresidual, b->inp, model_weight(model, P_NORM1, bench->block), b->rstd1,
                                 bench_tokens(model), model->config.C);
}
static void bench_swiglu(Bench* bench) {
    BlockActivations* b = bench_block(bench);
    bench->model->ops->swiglu_forward(b->act, b->int8[SAVED_GATE_UP], b->gate_up, bench_tokens(bench->model),
                                      bench->model->config.F);
}
static void bench_swiglu_backward(Bench* bench) {
    Model* model = bench->model;
    const BlockActivations* b = bench_block(bench);
    model->ops->swiglu_backward(model->dgate_up, model->dact, b->gate_up, b->int8[SAVED_GATE_UP], bench_tokens(model),
                                model->config.F);
}

// what backward reads as MXINT8 but for gate_up, which SwiGLU packs and unpacks
static void bench_pack(Bench* bench) {
    for (int t = 0; t < SAVED_GATE_UP; t++) {
        model_pack(bench->model, bench->block, (SavedTensor)t);
    }
}
static void bench_unpack(Bench* bench) {
    for (int t = 0; t < SAVED_GATE_UP; t++) {
        model_unpack(bench->model, bench->block, (SavedTensor)t);
    }
}
// bytes of either
static double bench_pack_bytes(const Bench* bench) {
    size_t BT = (size_t)bench_tokens(bench->model), bytes = 0;
    for (int t = 0; t < SAVED_GATE_UP; t++) {
        size_t columns = (size_t)saved_columns(&bench->model->config, (SavedTensor)t);
        bytes += bench_block(bench)->int8[t].codes ? BT * columns * sizeof(floatX) + mxint8_bytes(BT, columns) : 0;
    }
    return (double)bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// operations of the linear layer bench->kind, in the order in which each finds what it needs

// what the layer reads and writes: inp, dinp (BT, C), out, dout (BT, OC)
typedef struct { const floatX* inp; floatX *out, *dinp; const floatX* dout; } LinearBuffers;
static LinearBuffers bench_buffers(const Bench* bench) {
    const Model* model = bench->model;
    const BlockActivations* b = bench_block(bench);
    const LinearBuffers buffers[LINEAR_KINDS] = {{b->norm1, b->qkv, model->dnorm, model->dqkv},
                                                 {b->att, model->projection, model->datt, model->dresidual},
                                                 {b->norm2, b->gate_up, model->dnorm, model->dgate_up},
                                                 {b->act, model->projection, model->dact, model->dresidual}};
    return buffers[bench->kind];
}

// the entry of a block behind another, as that of the block behind this one: what this one keeps stays
static void bench_enter_added(Bench* bench) {
    Model* model = bench->model;
    BlockActivations* b = bench_block(bench);
    b->x[LINEAR_QKV] = linear_norm_input(&model->linear, bench_linear(bench), b->x_memory[LINEAR_QKV], b->norm1,
                                         model->out, model->rstd_final, b->mid, model->projection,
                                         model_weight(model, P_NORM1, bench->block), bench_tokens(model),
                                         (float)model->config.rms_eps);
}
static void bench_enter(Bench* bench) {
    model_enter_block(bench->model, &bench->model->linear, bench->block, bench_block(bench)->inp, NULL);
}
static void bench_middle_added(Bench* bench) {
    model_norm_middle(bench->model, &bench->model->linear, bench->block, bench->model->projection);
}
static void bench_middle(Bench* bench) { model_norm_middle(bench->model, &bench->model->linear, bench->block, NULL); }
static void bench_quantize_x(Bench* bench) {
    BlockActivations* b = bench_block(bench);
    b->x[bench->kind] = linear_input(&bench->model->linear, bench_linear(bench), b->x_memory[bench->kind],
                                     bench_buffers(bench).inp, bench_tokens(bench->model));
}
static void bench_swiglu_x(Bench* bench) {
    BlockActivations* b = bench_block(bench);
    b->x[LINEAR_DOWN] = linear_swiglu_input(&bench->model->linear, bench_linear(bench), b->x_memory[LINEAR_DOWN],
                                            b->act, b->int8[SAVED_GATE_UP], b->gate_up, bench_tokens(bench->model));
}
static void bench_carry_w(Bench* bench) { bench->model->ops->carry(&bench_linear(bench)->w); }
static void bench_forward(Bench* bench) {
    GemmArgs gemm = {.out = real_floatX(bench_buffers(bench).out), .accumulate = 0,
                     .a = &bench_block(bench)->x[bench->kind], .b = &bench_linear(bench)->w, .alpha = 1.0f};
    bench->model->ops->gemm(&gemm);
}

static void bench_operand(Bench* bench, OperandId id, void* scratch, int rows, int cols, const floatX* tensor,
                          const QTensor* saved, int transposed) {
    bench->made[id] = linear_operand(&bench->model->linear, id, bench_linear(bench), NULL, scratch, rows, cols, tensor,
                                     saved, transposed, NULL);
}
static void bench_quantize_dy(Bench* bench) {
    bench_operand(bench, OPERAND_DY, bench->model->linear.operand_a, bench_tokens(bench->model),
                  bench_linear(bench)->OC, bench_buffers(bench).dout, NULL, 0);
}
static void bench_quantize_wt(Bench* bench) {
    Linear* linear = bench_linear(bench);
    bench_operand(bench, OPERAND_WT, bench->model->linear.operand_b, linear->C, linear->OC, linear->weight, &linear->w,
                  1);
}
static void bench_quantize_dyt(Bench* bench) {
    bench_operand(bench, OPERAND_DYT, bench->model->linear.operand_a, bench_linear(bench)->OC,
                  bench_tokens(bench->model), bench_buffers(bench).dout, NULL, 1);
}
static void bench_quantize_xt(Bench* bench) {
    const QTensor* x = &bench_block(bench)->x[bench->kind];
    bench_operand(bench, OPERAND_XT, bench->model->linear.operand_b, bench_linear(bench)->C,
                  bench_tokens(bench->model), x->dense, x, 1);
}
static void bench_gemm_dx(Bench* bench) {
    GemmArgs args = {.out = real_floatX(bench_buffers(bench).dinp), .accumulate = 0, .a = &bench->made[OPERAND_DY],
                     .b = &bench->made[OPERAND_WT], .alpha = 1.0f};
    bench->model->ops->gemm(&args);
}
static void bench_gemm_dw(Bench* bench) {
    GemmArgs args = {.out = bench_linear(bench)->dweight, .accumulate = 1, .a = &bench->made[OPERAND_DYT],
                     .b = &bench->made[OPERAND_XT], .alpha = 1.0f};
    bench->model->ops->gemm(&args);
}

static void bench_finish(Bench* bench) {
    Model* model = bench->model;
    const BlockActivations* b = bench_block(bench);
    const Owed* owed = &bench->owed;
    int BT = bench_tokens(model);
    switch (bench->kind) {
    case LINEAR_QKV: model_norm_backward(model, *owed, P_NORM1, bench->block, b->inp, b->rstd1); break;
    case LINEAR_GATE_UP: model_norm_backward(model, *owed, P_NORM2, bench->block, b->mid, b->rstd2); break;
    case LINEAR_DOWN:
        model->ops->unrotate_swiglu_backward(model->dgate_up, model->dact, owed->mask, owed->row_scale, b->gate_up,
                                             b->int8[SAVED_GATE_UP], BT, model->config.F);
        break;
    default:
        model->ops->unrotate(real_floatX(bench_buffers(bench).dinp), owed->mask, owed->row_scale, BT,
                             bench_linear(bench)->C);
    }
}

static void bench_quantize_w(Bench* bench) {
    Model* model = bench->model;
    char* at = (char*)model->quantized_memory;
    for (const Linear* linear = model->linears; linear < bench_linear(bench); linear++) {
        at += linear_weight_bytes(linear->recipe, linear->C, linear->OC);
    }
    linear_quantize_weight(&model->linear, bench_linear(bench), at);
}
static void bench_finish_dw(Bench* bench) { linear_finish_gradient(&bench->model->linear, bench_linear(bench)); }

// all operands of the layer as training has them; its backward, too
static void bench_prepare(Bench* bench, LinearKind kind) {
    LinearBuffers buffers;
    bench->kind = kind;
    bench_refresh(bench);
    buffers = bench_buffers(bench);
    bench->owed = linear_backward_owed(&bench->model->linear, bench_linear(bench), buffers.dinp, buffers.dout,
                                       &bench_block(bench)->x[kind], bench_tokens(bench->model));
    bench_quantize_dy(bench);
    bench_quantize_wt(bench);
    bench_quantize_dyt(bench);
    bench_quantize_xt(bench);
}

// Factors of one for the rows of dX: it is finished in place many times over, which real ones would make all zeros.
static void bench_clear_owed(Bench* bench) {
    size_t rows = (size_t)bench_tokens(bench->model);
    if (bench->made[OPERAND_DY].row_scale) {
        float* ones = (float*)malloc_or_die(sizeof(float) * rows, "row factors");
        for (size_t i = 0; i < rows; i++) {
            ones[i] = 1.0f;
        }
        bench->model->ops->copy_to_device(bench->made[OPERAND_DY].row_scale, ones, sizeof(float) * rows);
        bench->model->ops->synchronize();
        free(ones);
    }
}
