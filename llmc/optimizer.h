// optimizer.h: one optimizer step from accumulated gradients: norm, clip, finite?, AdamW (Loshchilov & Hutter 2019),
// weight decay where the table says.
//
// A step whose loss or gradient norm is not finite is found before the update: nothing is changed, the caller counts
// the skip.
#pragma once
#include "comm.h"
#include "model.h"

// Update from model_begin_step's lr and corrections and the gradients that are summed up. The result is in
// model->control; the host is not asked. grad_clip 0 does not clip.
static void optimizer_step(Model* model, const Comm* comm, const Config* config) {
    const Ops* ops = model->ops;
    ops->sum_squares(&model->control->grad_squares, model->grads, model->table.elements);
    comm_sum(comm, &model->control->grad_squares);
    ops->step_decide(model->control, (float)config->grad_clip);
    const ParamTable* table = &model->table;
    for (int p = 0; p < table->count;) {
        int decay = PARAM_SPECS[table->list[p].kind].decay;
        size_t begin = table->list[p].offset, end = begin;
        for (; p < table->count && PARAM_SPECS[table->list[p].kind].decay == decay; p++) {
            end = table->list[p].offset + table->list[p].count;
        }
        AdamwArgs args = {.param = model->params + begin,
                          .master = model->master ? model->master + begin : NULL,
                          .m = real_from(model->m, begin),
                          .v = real_from(model->v, begin),
                          .grad = real_from(model->grads, begin),
                          .first = begin,
                          .count = end - begin,
                          .beta1 = (float)config->beta1,
                          .beta2 = (float)config->beta2,
                          .eps = (float)config->eps,
                          .weight_decay = decay ? (float)config->weight_decay : 0.0f,
                          .seed = model->linear.seed,
                          .control = model->control};
        ops->adamw(&args);
    }
    model->weights_quantized = 0;
}
