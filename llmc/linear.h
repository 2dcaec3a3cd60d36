// linear.h: the three GEMMs of a quantized linear layer. It names no recipe: the row of recipe.h says what each operand
// is.
//
//   forward   out (BT, OC) = x . w^T                          x = quantize(inp), w quantized once per optimizer step
//   backward  dinp (BT, C) = [H^T mask] (dy . wt^T)           dweight (OC, C) += dyt . xt^T
// Where the forward operands are rotated and saved, gradients come out in rotated space. That of inp is turned back at
// once. That of the weight is a sum over micro-batches of one and the same linear map, so it stays rotated until
// linear_finish_gradient.
#pragma once
#include "ops.h"
#include "recipe.h"

typedef enum { LINEAR_QKV, LINEAR_O, LINEAR_GATE_UP, LINEAR_DOWN, LINEAR_KINDS } LinearKind;
static const char* const LINEAR_NAMES[LINEAR_KINDS] = {"qkv", "o", "gate_up", "down"};

typedef enum { OPERAND_X, OPERAND_W, OPERAND_DY, OPERAND_WT, OPERAND_DYT, OPERAND_XT } OperandId;

typedef struct {
    LinearKind kind;
    int layer;
    int C, OC;
    const floatX* weight;  // (OC, C)
    RealArray dweight;     // (OC, C), in rotated space until finished where the recipe rotates
    QTensor w;             // the forward operand of this step
} Linear;

typedef struct { QuantStats x[LINEAR_KINDS], w[LINEAR_KINDS]; } LinearTelemetry;

// What every linear layer of a run shares
typedef struct {
    const Ops* ops;
    const Recipe* recipe;
    Rounding option_rounding;    // --bwd-rounding
    uint64_t seed;
    const uint64_t* position;    // on the device: StepControl.position, which random numbers derive from
    void *operand_a, *operand_b; // scratch of linear_scratch_bytes each: backward operands live here for one GEMM
    LinearTelemetry* telemetry;  // or NULL
} LinearContext;

// A backward operand is at most (BT or OC or C) rows of its contraction dimension
static size_t linear_scratch_bytes(const Recipe* recipe, int BT, int C, int OC) {
    size_t a = max_size(qtensor_bytes(&recipe->dy, BT, OC), qtensor_bytes(&recipe->dyt, OC, BT));
    size_t b = max_size(qtensor_bytes(&recipe->wt, C, OC), qtensor_bytes(&recipe->xt, C, BT));
    return max_size(a, b);
}

// The operand (rows, cols) as the recipe's spec makes it of tensor, or of saved where the spec says so. transposed: the
// source lies as (cols, rows). A spec without quantization is a view; transposition is then a flag that the GEMM
// library reads at no cost.
static QTensor linear_operand(const LinearContext* ctx, OperandId id, const Linear* linear, void* memory, int rows,
                              int cols, const floatX* tensor, const QTensor* saved, int transposed, QuantStats* stats) {
    const Recipe* r = ctx->recipe;
    const QuantSpec* specs[] = {&r->x, &r->w, &r->dy, &r->wt, &r->dyt, &r->xt};
    QuantSpec spec = *specs[id];
    if (spec.format == FORMAT_FLOATX) {
        return qtensor_view(tensor, rows, cols, transposed);
    }
    spec.rounding = spec.rounding == ROUND_OPTION ? ctx->option_rounding : spec.rounding;
    QTensor out = qtensor_at(&spec, rows, cols, memory);
    // the two operands of a GEMM draw the same signs; every operand rounds with numbers of its own
    uint64_t gemm = (uint64_t)id / 2, kind = (uint64_t)linear->kind;
    QuantizeArgs args = {
        .out = &out,
        .spec = spec,
        .tensor = tensor,
        .saved = saved,
        .transposed = transposed,
        .seed = ctx->seed,
        .sign_stream = rand_stream(RAND_SIGNS, (uint64_t)linear->layer, 0, 0),
        .sign_index = (kind * 8 + gemm) << 56,
        .round_stream = rand_stream(RAND_ROUND, (uint64_t)linear->layer, 0, 0),
        .round_index = (kind * 8 + (uint64_t)id) << 56,
        .position = ctx->position,
        .stats = stats};
    ctx->ops->quantize(&args);
    return out;
}

// w for this step. memory: qtensor_bytes(w), kept until the next call.
static void linear_quantize_weight(const LinearContext* ctx, Linear* linear, void* memory) {
    QuantStats* stats = ctx->telemetry ? &ctx->telemetry->w[linear->kind] : NULL;
    linear->w = linear_operand(ctx, OPERAND_W, linear, memory, linear->OC, linear->C, linear->weight, NULL, 0, stats);
}

// out (BT, OC) = x . w^T. x, which backward needs, lies over memory of qtensor_bytes(x), or views inp where the recipe
// is dense.
static void linear_forward(const LinearContext* ctx, const Linear* linear, floatX* out, QTensor* x, void* memory,
                           const floatX* inp, int BT) {
    QuantStats* stats = ctx->telemetry ? &ctx->telemetry->x[linear->kind] : NULL;
    *x = linear_operand(ctx, OPERAND_X, linear, memory, BT, linear->C, inp, NULL, 0, stats);
    GemmArgs gemm = {.out = real_floatX(out), .accumulate = 0, .a = x, .b = &linear->w, .alpha = 1.0f};
    ctx->ops->gemm(&gemm);
}

// the operand x alone, as linear_forward made it of inp
static void linear_operand_again(const LinearContext* ctx, const Linear* linear, QTensor* x, void* memory,
                                 const floatX* inp, int BT) {
    *x = linear_operand(ctx, OPERAND_X, linear, memory, BT, linear->C, inp, NULL, 0, NULL);
}

// dinp (BT, C) = gradient of inp; dweight += gradient of the weight, in rotated space where the recipe rotates
static void linear_backward(const LinearContext* ctx, const Linear* linear, floatX* dinp, const floatX* dout,
                            const QTensor* x, int BT) {
    const Recipe* recipe = ctx->recipe;
    int C = linear->C, OC = linear->OC;
    QTensor dy = linear_operand(ctx, OPERAND_DY, linear, ctx->operand_a, BT, OC, dout, NULL, 0, NULL);
    QTensor wt = linear_operand(ctx, OPERAND_WT, linear, ctx->operand_b, C, OC, linear->weight, &linear->w, 1, NULL);
    GemmArgs input = {.out = real_floatX(dinp), .accumulate = 0, .a = &dy, .b = &wt, .alpha = 1.0f};
    ctx->ops->gemm(&input);
    if (recipe_rotates(recipe) && recipe->wt.source == SOURCE_SAVED) {
        ctx->ops->unrotate(real_floatX(dinp), recipe->x_grad == GRAD_TRUST_MASK ? x->mask : NULL, BT, C);
    }
    QTensor dyt = linear_operand(ctx, OPERAND_DYT, linear, ctx->operand_a, OC, BT, dout, NULL, 1, NULL);
    QTensor xt = linear_operand(ctx, OPERAND_XT, linear, ctx->operand_b, C, BT, x->dense, x, 1, NULL);
    GemmArgs weight = {
        .out = linear->dweight, .accumulate = 1, .a = &dyt, .b = &xt, .alpha = 1.0f};
    ctx->ops->gemm(&weight);
}

// once per optimizer step, after the last micro-batch: the gradient back into the weight's own space
static void linear_finish_gradient(const LinearContext* ctx, const Linear* linear) {
    const Recipe* recipe = ctx->recipe;
    if (recipe_rotates(recipe) && recipe->xt.source == SOURCE_SAVED) {
        ctx->ops->unrotate(linear->dweight, recipe->w_grad == GRAD_TRUST_MASK ? linear->w.mask : NULL, linear->OC,
                               linear->C);
    }
}
