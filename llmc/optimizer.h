// optimizer.h: one optimizer step from accumulated gradients: norm, clip, finite?, AdamW, weight decay where the table says.
//
// A step whose loss or gradient norm is not finite is found before the update: nothing is changed, the caller counts the skip.
#pragma once
#include "comm.h"
#include "model.h"

typedef struct {
    double grad_norm;  // before clipping, over all parameters
    int skipped;
} OptimizerResult;

// decoupled AdamW (Loshchilov & Hutter 2019). t counts updates from 1; grad_clip 0 does not clip.
static OptimizerResult optimizer_step(Model* model, const Comm* comm, const Config* config, double loss, double lr, int64_t t) {
    const Ops* ops = model->ops;
    OptimizerResult result;
    result.grad_norm = sqrt(comm_sum(comm, ops->sum_squares(model->grads, model->table.elements)));
    result.skipped = !isfinite(result.grad_norm) || !isfinite(loss);
    if (result.skipped) {
        return result;
    }
    double clip = config->grad_clip > 0 && result.grad_norm > config->grad_clip ? config->grad_clip / result.grad_norm : 1.0;
    const ParamTable* table = &model->table;
    for (int p = 0; p < table->count;) {
        int decay = PARAM_SPECS[table->list[p].kind].decay;
        size_t begin = table->list[p].offset, end = begin;
        for (; p < table->count && PARAM_SPECS[table->list[p].kind].decay == decay; p++) {
            end = table->list[p].offset + table->list[p].count;
        }
        AdamwArgs args = {.param = model->params + begin,
                          .master = model->master + begin,
                          .m = model->m + begin,
                          .v = model->v + begin,
                          .grad = model->grads + begin,
                          .count = end - begin,
                          .lr = (float)lr,
                          .beta1 = (float)config->beta1,
                          .beta2 = (float)config->beta2,
                          .eps = (float)config->eps,
                          .weight_decay = decay ? (float)config->weight_decay : 0.0f,
                          .grad_scale = (float)clip,
                          .t = t};
        ops->adamw(&args);
    }
    model->weights_quantized = 0;
    return result;
}
