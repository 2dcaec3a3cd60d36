// recipe.h: what a linear layer computes, one row per recipe, data only.
//
// A linear layer Y = X W^T has three GEMMs and six operands, each (rows, K) with K the contraction dimension:
//   forward  Y  (BT, OC) = x  (BT, C)  . w  (OC, C)^T     along C
//   backward dX (BT, C)  = dy (BT, OC) . wt (C, OC)^T     along OC
//   backward dW (OC, C)  = dyt (OC, BT) . xt (C, BT)^T    along tokens
// A row says for each operand its format, scale rule, rotation, rounding, group and source; and how the gradient gets
// from the quantized forward operands back to X and W.
#pragma once
#include "quant.h"

// the six operands; two and two are of one GEMM
typedef enum { OPERAND_X, OPERAND_W, OPERAND_DY, OPERAND_WT, OPERAND_DYT, OPERAND_XT, OPERANDS } OperandId;

// What a GPU's instructions multiply in place of codes and scales: the same values, or nearly (see CarrierBase). For
// each operand its type, and whether each row has a base of its own: a factor that the reader of the product's rows
// owes.
typedef struct {
    const char* name;
    Format format[OPERANDS];
    int row_base[OPERANDS];
} Carrier;

static const Carrier CARRIERS[] = {
    {"bf16", {FORMAT_FLOATX, FORMAT_FLOATX, FORMAT_FLOATX, FORMAT_FLOATX, FORMAT_FLOATX, FORMAT_FLOATX}, {0}},
    {"fp8", {FORMAT_E4M3, FORMAT_E4M3, FORMAT_E5M2, FORMAT_E4M3, FORMAT_E5M2, FORMAT_E4M3}, {0, 0, 1, 0, 0, 0}},
    {"fp4", {FORMAT_NVFP4, FORMAT_NVFP4, FORMAT_NVFP4, FORMAT_NVFP4, FORMAT_NVFP4, FORMAT_NVFP4}, {0, 0, 1, 0, 0, 0}},
};
#define CARRIER_COUNT ((int)(sizeof CARRIERS / sizeof CARRIERS[0]))

static const Carrier* carrier_find(const char* name) {
    for (int i = 0; i < CARRIER_COUNT; i++) {
        if (!strcmp(CARRIERS[i].name, name)) {
            return &CARRIERS[i];
        }
    }
    return NULL;
}

typedef enum {
    GRAD_STRAIGHT,    // straight-through: the quantizer's derivative is 1
    GRAD_TRUST_MASK,  // 1 where the forward operand was not clipped, else 0 (QuEST, Quartet)
    GRAD_DGE,         // differentiable gradient estimator: a power law around each rounding threshold (msfp4)
} GradRule;

typedef struct {
    const char* name;
    const char* what;                          // one line for --help
    QuantSpec x, w, dy, wt, dyt, xt;
    GradRule x_grad, w_grad;
    float outlier_quantile;  // > 0: values of x beyond this quantile go a sparse high-precision way (msfp4)
} Recipe;

#define AS_IS \
    {.format = FORMAT_FLOATX, .scale = SCALE_NONE, .rotation = ROTATE_NONE, .rounding = ROUND_NEAREST, .group = 0, \
     .source = SOURCE_TENSOR}
#define QUEST                                                                                                 \
    {                                                                                                         \
        .format = FORMAT_MXFP4, .scale = SCALE_QUEST, .rotation = ROTATE_HADAMARD, .rounding = ROUND_NEAREST, \
        .group = 32, .source = SOURCE_TENSOR                                                                  \
    }
#define ABSMAX(from) \
    {.format = FORMAT_MXFP4, .scale = SCALE_ABSMAX, .rotation = ROTATE_SIGNED, .rounding = ROUND_OPTION, .group = 32, \
     .source = from}

#define EIGHT_BITS(type, from) \
    {.format = type, .scale = SCALE_TENSOR_ABSMAX, .rotation = ROTATE_NONE, .rounding = ROUND_NEAREST, .group = 0, \
     .source = from}

static const Recipe RECIPES[] = {
    {.name = "bf16", .what = "linear layers in the precision of the build: the baseline",
     .x = AS_IS, .w = AS_IS, .dy = AS_IS, .wt = AS_IS, .dyt = AS_IS, .xt = AS_IS,
     .x_grad = GRAD_STRAIGHT, .w_grad = GRAD_STRAIGHT, .outlier_quantile = 0},
    {.name = "fp8", .what = "E4M3 forward, E5M2 gradients, one power-of-two scale a tensor: the baseline of 8 bits",
     .x = EIGHT_BITS(FORMAT_E4M3, SOURCE_TENSOR), .w = EIGHT_BITS(FORMAT_E4M3, SOURCE_TENSOR),
     .dy = EIGHT_BITS(FORMAT_E5M2, SOURCE_TENSOR), .wt = EIGHT_BITS(FORMAT_E4M3, SOURCE_SAVED),
     .dyt = EIGHT_BITS(FORMAT_E5M2, SOURCE_TENSOR), .xt = EIGHT_BITS(FORMAT_E4M3, SOURCE_SAVED),
     .x_grad = GRAD_STRAIGHT, .w_grad = GRAD_STRAIGHT, .outlier_quantile = 0},
    {.name = "quartet", .what = "MXFP4 forward and backward: Quartet, arXiv 2505.14669 v4, Algorithm 1",
     .x = QUEST, .w = QUEST, .dy = ABSMAX(SOURCE_TENSOR), .wt = ABSMAX(SOURCE_SAVED), .dyt = ABSMAX(SOURCE_TENSOR),
     .xt = ABSMAX(SOURCE_SAVED), .x_grad = GRAD_TRUST_MASK, .w_grad = GRAD_TRUST_MASK, .outlier_quantile = 0},
};
#define RECIPE_COUNT ((int)(sizeof RECIPES / sizeof RECIPES[0]))

#undef EIGHT_BITS
#undef QUEST
#undef ABSMAX
#undef AS_IS

static const Recipe* recipe_find(const char* name) {
    for (int i = 0; i < RECIPE_COUNT; i++) {
        if (!strcmp(RECIPES[i].name, name)) {
            return &RECIPES[i];
        }
    }
    return NULL;
}

// Does the forward product live in rotated space? Then gradients of saved operands do, too, and are rotated back.
static inline int recipe_rotates(const Recipe* recipe) { return recipe->x.rotation != ROTATE_NONE; }

// A row must be consistent, whoever wrote it: the two operands of a GEMM share rotation, a saved source exists, groups
// fit.
static const char* recipe_fault(const Recipe* r) {
    const QuantSpec* specs[6] = {&r->x, &r->w, &r->dy, &r->wt, &r->dyt, &r->xt};
    for (int pair = 0; pair < 3; pair++) {
        const QuantSpec *a = specs[2 * pair], *b = specs[2 * pair + 1];
        if (a->rotation != b->rotation) {
            return "the two operands of a GEMM differ in rotation";
        }
        if ((a->format == FORMAT_FLOATX) != (b->format == FORMAT_FLOATX)) {
            return "only one operand of a GEMM is quantized";
        }
    }
    if (r->x.source == SOURCE_SAVED || r->w.source == SOURCE_SAVED || r->dy.source == SOURCE_SAVED ||
        r->dyt.source == SOURCE_SAVED) {
        return "only wt and xt can come from a saved forward operand";
    }
    if ((r->wt.source == SOURCE_SAVED && r->w.format == FORMAT_FLOATX) ||
        (r->xt.source == SOURCE_SAVED && r->x.format == FORMAT_FLOATX)) {
        return "a backward operand comes from a forward operand that is not quantized";
    }
    if (recipe_rotates(r) && (r->wt.source != r->xt.source)) {
        return "wt and xt come from different spaces";
    }
    if ((r->x_grad == GRAD_TRUST_MASK && r->x.scale != SCALE_QUEST) ||
        (r->w_grad == GRAD_TRUST_MASK && r->w.scale != SCALE_QUEST)) {
        return "a trust mask needs the quest scale rule";
    }
    for (int i = 0; i < 6; i++) {
        int want = specs[i]->format == FORMAT_MXFP4 ? 32 : specs[i]->format == FORMAT_NVFP4 ? 16 : 0;
        if (specs[i]->group != want) {
            return "MXFP4 has groups of 32, NVFP4 of 16, the other formats none";
        }
    }
    return NULL;
}
