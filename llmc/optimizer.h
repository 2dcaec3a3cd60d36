// optimizer.h: one optimizer step from accumulated gradients: sum over ranks, norm, clip, finite?, AdamW (Loshchilov &
// Hutter 2019), weight decay where the table says.
//
// With several ranks the gradients of a segment (slices.h) are summed over ranks as soon as backward has finished them,
// beside the backward of the next one. --zero 1: each rank then holds the sum of its slices only, updates those, and
// the new parameters are gathered, a segment behind the update. --zero 0: every rank holds all sums and updates all.
//
// A step whose loss or gradient norm is not finite, on any rank, is found before the update: nothing is changed, the
// caller counts the skip.
#pragma once
#include "comm.h"
#include "model.h"

static int optimizer_is_sharded(const Model* model) { return model->training.ranks > 1; }

// The gradients of a segment are complete on this rank: out of the rotated space, then summed over ranks
static void optimizer_reduce_segment(Model* model, const Comm* comm, const Config* config, int segment) {
    model_finish_segment(model, segment);
    if (comm->size == 1) {
        return;
    }
    Range range = segment_range(&model->config, &model->table, segment);
    RealArray grads = real_from(model->grads, range.begin);
    comm->ops->begin();
    comm->ops->reduce_scatter(comm, grads, range.count,
                              strcmp(config->reduce_dtype, "bf16") ? grads.type : REAL_FLOATX);
    if (!optimizer_is_sharded(model)) {
        comm->ops->all_gather(comm, grads, range.count);
    }
}

// loss and squares of the gradients, over all ranks; then what the step does
static void optimizer_decide(Model* model, const Comm* comm, const Config* config) {
    const Ops* ops = model->ops;
    const Slices* slices = &model->slices;
    StepControl* control = model->control;
    if (comm->size > 1) {
        comm->ops->sum(comm, &control->loss_sum, &control->loss_sum, 1);
    }
    if (optimizer_is_sharded(model)) {
        for (int i = 0; i < slices->count; i++) {
            ops->sum_squares(&model->squares[i], real_from(model->grads, slices->list[i].begin), slices->list[i].count);
        }
        comm->ops->sum(comm, &control->grad_squares, model->squares, slices->count);
    } else {
        ops->sum_squares(&control->grad_squares, model->grads, model->table.elements);
    }
    ops->step_decide(control, (float)config->grad_clip);
}

// AdamW on a slice, one call for each run of parameters with the same decay
static void optimizer_update_slice(Model* model, const Config* config, Slice slice) {
    const ParamTable* table = &model->table;
    for (int p = 0; p < table->count;) {
        int decay = PARAM_SPECS[table->list[p].kind].decay;
        size_t begin = table->list[p].offset, end = begin;
        for (; p < table->count && PARAM_SPECS[table->list[p].kind].decay == decay; p++) {
            end = table->list[p].offset + table->list[p].count;
        }
        Range part = range_overlap(Range{begin, end - begin}, Range{slice.begin, slice.count});
        size_t at = slice.at + (part.begin - slice.begin);
        AdamwArgs args = {.param = model->params + part.begin,
                          .master = model->master ? model->master + at : NULL,
                          .m = real_from(model->m, at),
                          .v = real_from(model->v, at),
                          .grad = real_from(model->grads, part.begin),
                          .first = part.begin,
                          .count = part.count,
                          .beta1 = (float)config->beta1,
                          .beta2 = (float)config->beta2,
                          .eps = (float)config->eps,
                          .weight_decay = decay ? (float)config->weight_decay : 0.0f,
                          .seed = model->linear.seed,
                          .control = model->control};
        if (part.count) {
            model->ops->adamw(&args);
        }
    }
}

// the parameters of a segment, which ranks updated slice by slice, on all of them
static void optimizer_gather_segment(Model* model, const Comm* comm, int segment) {
    Range range = segment_range(&model->config, &model->table, segment);
    comm->ops->begin();
    comm->ops->all_gather(comm, real_floatX(model->params + range.begin), range.count);
}

// the parameters of all segments, of which every rank has made its slices; nothing where each rank has all
static void optimizer_gather(Model* model, const Comm* comm) {
    for (int i = 0; optimizer_is_sharded(model) && i < model->slices.count; i++) {
        optimizer_gather_segment(model, comm, i);
        comm->ops->wait();
    }
}

// Update from model_begin_step's lr and corrections and the gradients that are summed up. The result is in
// model->control; the host is not asked. grad_clip 0 does not clip.
static void optimizer_step(Model* model, const Comm* comm, const Config* config) {
    optimizer_decide(model, comm, config);
    for (int i = 0; i < model->slices.count; i++) {
        optimizer_update_slice(model, config, model->slices.list[i]);
        if (optimizer_is_sharded(model)) {
            optimizer_gather_segment(model, comm, i);
        }
    }
    if (optimizer_is_sharded(model)) {
        comm->ops->wait();
    }
    model->weights_quantized = 0;
}
