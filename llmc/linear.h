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

typedef struct {
    const Recipe* recipe;
    LinearKind kind;
    int layer;
    int C, OC;
    const floatX* weight;  // (OC, C)
    RealArray dweight;     // (OC, C), in rotated space until finished where the recipe rotates
    QTensor w;             // the forward operand of this step; what the carrier multiplies of it is scratch
} Linear;

// Of the weights and the first micro-batch of a step. under: groups of a carrier's operand too far below the largest
// one to be exact, and all of its groups
typedef struct {
    QuantStats x[LINEAR_KINDS], w[LINEAR_KINDS];
    double under[LINEAR_KINDS][OPERANDS], groups[LINEAR_KINDS][OPERANDS];
} LinearTelemetry;

// What every linear layer of a run shares
typedef struct {
    const Ops* ops;
    const Carrier* carrier;      // NULL: products decode codes themselves
    CarrierBase* bases;          // (layers, LINEAR_KINDS, OPERANDS), on the device
    Rounding option_rounding;    // --bwd-rounding
    uint64_t seed;
    const uint64_t* position;    // on the device: StepControl.position, which random numbers derive from
    void *operand_a, *operand_b; // scratch of linear_scratch_bytes each: operands live here for one GEMM
    LinearTelemetry* telemetry;  // on the device, or NULL
    int again;                   // operands are made once more, for backward: nothing is counted
} LinearContext;

static const QuantSpec* recipe_spec(const Recipe* r, OperandId id) {
    const QuantSpec* specs[OPERANDS] = {&r->x, &r->w, &r->dy, &r->wt, &r->dyt, &r->xt};
    return specs[id];
}

// what the carrier multiplies of an operand: its elements, then the factors of its rows where it has such
static size_t carrier_operand_bytes(const Carrier* carrier, OperandId id, int rows, int cols) {
    if (carrier->format[id] == FORMAT_NVFP4) {
        return nvfp4_bytes(rows, cols);
    }
    return (size_t)rows * cols * (carrier->format[id] == FORMAT_FLOATX ? sizeof(floatX) : 1);
}
static size_t carrier_bytes(const LinearContext* ctx, const Recipe* recipe, OperandId id, int rows, int cols) {
    if (!ctx->carrier || recipe_spec(recipe, id)->format != FORMAT_MXFP4) {
        return 0;
    }
    size_t bytes = (size_t)round_up((int64_t)carrier_operand_bytes(ctx->carrier, id, rows, cols), 256);
    return bytes + (ctx->carrier->row_base[id] ? sizeof(float) * (size_t)rows : 0);
}

// Scratch for one operand of any GEMM: the carrier's elements, or codes where products decode
static size_t linear_scratch_bytes(const LinearContext* ctx, const Recipe* recipe, int BT, int C, int OC) {
    const int shapes[OPERANDS][2] = {{BT, C}, {OC, C}, {BT, OC}, {C, OC}, {OC, BT}, {C, BT}};
    size_t most = 0;
    for (int id = 0; id < OPERANDS; id++) {
        int rows = shapes[id][0], cols = shapes[id][1];
        size_t codes = id <= OPERAND_W ? 0 : qtensor_bytes(recipe_spec(recipe, (OperandId)id), rows, cols);
        size_t carried = carrier_bytes(ctx, recipe, (OperandId)id, rows, cols);
        most = max_size(most, carried ? carried : codes);
    }
    return most;
}

// what a weight keeps for the step
static size_t linear_weight_bytes(const Recipe* recipe, int C, int OC) {
    return (size_t)round_up((int64_t)qtensor_bytes(&recipe->w, OC, C), 256);
}

// on the device, or NULL where there are none
static CarrierBase* linear_base(const LinearContext* ctx, const Linear* linear, OperandId id) {
    return ctx->bases ? &ctx->bases[(linear->layer * LINEAR_KINDS + linear->kind) * OPERANDS + id] : NULL;
}

// where an operand's parts lie: codes, scales and mask over `kept`, the carrier's elements over `scratch`; each nowhere
// where NULL
static QTensor linear_operand_memory(const LinearContext* ctx, OperandId id, const Linear* linear,
                                     const QuantSpec* spec, int rows, int cols, void* kept, void* scratch) {
    CarrierBase* base = linear_base(ctx, linear, id);
    if (!ctx->carrier || spec->format != FORMAT_MXFP4) {
        QTensor plain = qtensor_at(spec, rows, cols, kept ? kept : scratch);
        plain.base = spec->format == FORMAT_MXFP4 ? NULL : base;
        return plain;
    }
    QTensor out = qtensor_at(spec, rows, cols, kept);
    if (!kept) {
        out.codes = out.scales = NULL;
        out.mask = NULL;
    }
    out.carrier = ctx->carrier->format[id];
    out.operand = scratch;
    if (!scratch) {
        return out;
    }
    if (ctx->carrier->row_base[id]) {
        size_t bytes = (size_t)round_up((int64_t)carrier_operand_bytes(ctx->carrier, id, rows, cols), 256);
        out.row_scale = (float*)((char*)scratch + bytes);
    } else if (out.carrier != FORMAT_FLOATX) {
        out.base = base;
    }
    return out;
}

// what makes the operand (rows, cols) into *out, but for its source
static QuantizeArgs linear_operand_args(const LinearContext* ctx, OperandId id, const Linear* linear, QTensor* out,
                                        void* kept, void* scratch, int rows, int cols) {
    QuantSpec spec = *recipe_spec(linear->recipe, id);
    spec.rounding = spec.rounding == ROUND_OPTION ? ctx->option_rounding : spec.rounding;
    *out = linear_operand_memory(ctx, id, linear, &spec, rows, cols, kept, scratch);
    // the two operands of a GEMM draw the same signs; every operand rounds with numbers of its own
    uint64_t gemm = (uint64_t)id / 2, kind = (uint64_t)linear->kind;
    return (QuantizeArgs){.out = out,
                          .spec = spec,
                          .tensor = NULL,
                          .saved = NULL,
                          .transposed = 0,
                          .seed = ctx->seed,
                          .sign_stream = rand_stream(RAND_SIGNS, (uint64_t)linear->layer, 0, 0),
                          .sign_index = (kind * 8 + gemm) << 56,
                          .round_stream = rand_stream(RAND_ROUND, (uint64_t)linear->layer, 0, 0),
                          .round_index = (kind * 8 + (uint64_t)id) << 56,
                          .position = ctx->position,
                          .stats = NULL,
                          .row_under = NULL,
                          .again = ctx->again};
}

// The operand (rows, cols) as the recipe's spec makes it of tensor, or of saved where the spec says so. transposed: the
// source lies as (cols, rows). A spec without quantization is a view; transposition is then a flag that the GEMM
// library reads at no cost.
static QTensor linear_operand(const LinearContext* ctx, OperandId id, const Linear* linear, void* kept, void* scratch,
                              int rows, int cols, const floatX* tensor, const QTensor* saved, int transposed,
                              QuantStats* stats) {
    if (recipe_spec(linear->recipe, id)->format == FORMAT_FLOATX) {
        return qtensor_view(tensor, rows, cols, transposed);
    }
    QTensor out;
    QuantizeArgs args = linear_operand_args(ctx, id, linear, &out, kept, scratch, rows, cols);
    args.tensor = tensor, args.saved = saved, args.transposed = transposed, args.stats = stats;
    args.row_under = out.row_scale && ctx->telemetry ? &linear_base(ctx, linear, id)->under : NULL;
    ctx->ops->quantize(&args);
    return out;
}

// w for this step. memory: linear_weight_bytes, kept until the next call. What the carrier multiplies is made, too, for
// its base, but not kept: a byte or two of each parameter, for which every product instead reads half a byte and writes
// scratch, less than 1 % of its time.
static void linear_quantize_weight(const LinearContext* ctx, Linear* linear, void* memory) {
    QuantStats* stats = ctx->telemetry ? &ctx->telemetry->w[linear->kind] : NULL;
    linear->w = linear_operand(ctx, OPERAND_W, linear, memory, ctx->operand_b, linear->OC, linear->C, linear->weight,
                               NULL, 0, stats);
}

// where this step's telemetry of a layer's x goes, or NULL
static QuantStats* linear_stats(const LinearContext* ctx, const Linear* linear) {
    return ctx->telemetry ? &ctx->telemetry->x[linear->kind] : NULL;
}

// The operand x of inp (BT, C). memory: qtensor_bytes(x), what backward needs of it; a view of inp where the recipe is
// dense. What the carrier multiplies lies in scratch until the next operand is made; operand_a NULL: it is not made.
static QTensor linear_input(const LinearContext* ctx, const Linear* linear, void* memory, const floatX* inp, int BT) {
    return linear_operand(ctx, OPERAND_X, linear, memory, ctx->operand_a, BT, linear->C, inp, NULL, 0,
                          linear_stats(ctx, linear));
}

// The same behind a norm: sum = a + b, norm = rmsnorm(sum) * weight and rstd, x of norm. b NULL: the norm of a, sum is
// not written. norm is stored where the recipe is dense, else it is scratch.
static QTensor linear_norm_input(const LinearContext* ctx, const Linear* linear, void* memory, floatX* norm,
                                 floatX* sum, float* rstd, const floatX* a, const floatX* b, const floatX* weight,
                                 int BT, float eps) {
    int C = linear->C;
    if (linear->recipe->x.format == FORMAT_MXFP4 && !ctx->telemetry) {
        QTensor x;
        QuantizeArgs args = linear_operand_args(ctx, OPERAND_X, linear, &x, memory, ctx->operand_a, BT, C);
        ctx->ops->rmsnorm_quantize(&args, norm, sum, rstd, a, b, weight, BT, C, eps);
        return x;
    }
    if (b) {
        ctx->ops->add_rmsnorm_forward(sum, norm, rstd, a, b, weight, BT, C, eps);
    } else {
        ctx->ops->rmsnorm_forward(norm, rstd, a, weight, BT, C, eps);
    }
    return linear_input(ctx, linear, memory, norm, BT);
}

// The same behind SwiGLU of gate_up (BT, 2C), which goes to kept, too, where there is one; act (BT, C) as norm above
static QTensor linear_swiglu_input(const LinearContext* ctx, const Linear* linear, void* memory, floatX* act,
                                   Mxint8 kept, const floatX* gate_up, int BT) {
    if (linear->recipe->x.format == FORMAT_MXFP4 && !ctx->telemetry) {
        QTensor x;
        QuantizeArgs args = linear_operand_args(ctx, OPERAND_X, linear, &x, memory, ctx->operand_a, BT, linear->C);
        ctx->ops->swiglu_quantize(&args, act, kept, gate_up, BT, linear->C);
        return x;
    }
    ctx->ops->swiglu_forward(act, kept, gate_up, BT, linear->C);
    return linear_input(ctx, linear, memory, act, BT);
}

// out (BT, OC) = x . w^T; operand_b is overwritten
static void linear_product(const LinearContext* ctx, const Linear* linear, floatX* out, const QTensor* x) {
    if (linear->w.operand) {
        ctx->ops->carry(&linear->w);
    }
    GemmArgs gemm = {.out = real_floatX(out), .accumulate = 0, .a = x, .b = &linear->w, .alpha = 1.0f};
    ctx->ops->gemm(&gemm);
}

// both for inp (BT, C)
static void linear_forward(const LinearContext* ctx, const Linear* linear, floatX* out, QTensor* x, void* memory,
                           const floatX* inp, int BT) {
    *x = linear_input(ctx, linear, memory, inp, BT);
    linear_product(ctx, linear, out, x);
}

// What a gradient that comes out in rotated space still owes: x = H (x * row_scale * mask)
typedef struct { int rotated; const uint32_t* mask; const float* row_scale; } Owed;

// dinp (BT, C) = gradient of inp, which owes what is returned (until the next linear_backward); dweight += gradient of
// the weight, in rotated space where the recipe rotates
static Owed linear_backward_owed(const LinearContext* ctx, const Linear* linear, floatX* dinp, const floatX* dout,
                                 const QTensor* x, int BT) {
    const Recipe* recipe = linear->recipe;
    int C = linear->C, OC = linear->OC;
    void *a = ctx->operand_a, *b = ctx->operand_b;
    QTensor dy = linear_operand(ctx, OPERAND_DY, linear, NULL, a, BT, OC, dout, NULL, 0, NULL);
    QTensor wt = linear_operand(ctx, OPERAND_WT, linear, NULL, b, C, OC, linear->weight, &linear->w, 1, NULL);
    GemmArgs input = {.out = real_floatX(dinp), .accumulate = 0, .a = &dy, .b = &wt, .alpha = 1.0f};
    ctx->ops->gemm(&input);
    // dyt takes as many bytes as dy, so the factors of dy's rows, which lie behind them, stay
    QTensor dyt = linear_operand(ctx, OPERAND_DYT, linear, NULL, a, OC, BT, dout, NULL, 1, NULL);
    QTensor xt = linear_operand(ctx, OPERAND_XT, linear, NULL, b, C, BT, x->dense, x, 1, NULL);
    GemmArgs weight = {.out = linear->dweight, .accumulate = 1, .a = &dyt, .b = &xt, .alpha = 1.0f};
    ctx->ops->gemm(&weight);
    int rotated = recipe_rotates(recipe) && recipe->wt.source == SOURCE_SAVED;
    return (Owed){rotated, recipe->x_grad == GRAD_TRUST_MASK ? x->mask : NULL, dy.row_scale};
}

// the same with nothing owed
static void linear_backward(const LinearContext* ctx, const Linear* linear, floatX* dinp, const floatX* dout,
                            const QTensor* x, int BT) {
    Owed owed = linear_backward_owed(ctx, linear, dinp, dout, x, BT);
    if (owed.rotated) {
        ctx->ops->unrotate(real_floatX(dinp), owed.mask, owed.row_scale, BT, linear->C);
    }
}

// once per optimizer step, after the last micro-batch: the gradient back into the weight's own space
static void linear_finish_gradient(const LinearContext* ctx, const Linear* linear) {
    const Recipe* recipe = linear->recipe;
    if (recipe_rotates(recipe) && recipe->xt.source == SOURCE_SAVED) {
        ctx->ops->unrotate(linear->dweight, recipe->w_grad == GRAD_TRUST_MASK ? linear->w.mask : NULL, NULL,
                           linear->OC, linear->C);
    }
}
