// model.h: the Llama. Forward and backward, in terms of ops.h and linear.h only: no backend and no recipe is
// named here.
//
//   x_0 = embed(tokens);  for each block: a = x + o(attention(rope(qkv(norm1(x)))));  x' = a +
//   down(swiglu(gate_up(norm2(a)))) loss = mean crossentropy(lm_head(norm(x_L)), targets)
// The head and the cross-entropy run over chunks of rows, so that logits are never (BT, V) at once; in training each
// chunk makes its gradient at once, and backward starts from dfinal.
#pragma once
#include "model_memory.h"

// ---------------------------------------------------------------------------------------------------------------------
// forward

static void model_begin_operands(const Model* model) {
    model->ops->carrier_begin(model->linear.bases, model->config.L * LINEAR_KINDS * OPERANDS);
}

// forward operands of all weights, unless they match already. Whoever changes weights clears weights_quantized.
static void model_quantize_weights(Model* model) {
    if (model->weights_quantized) {
        return;
    }
    char* at = (char*)model->quantized_memory;
    model_begin_operands(model);
    for (int i = 0; i < model->config.L * LINEAR_KINDS; i++) {
        Linear* linear = &model->linears[i];
        linear_quantize_weight(&model->linear, linear, at);
        at += linear_weight_bytes(linear->recipe, linear->C, linear->OC);
    }
    model->weights_quantized = 1;
}

// Where backward reads a tensor of block l as MXINT8: what forward has completed goes there; what backward reads comes
// from there, into a buffer that all blocks share.
static floatX* block_tensor(const BlockActivations* b, SavedTensor tensor) {
    floatX* const tensors[SAVED_TENSORS] = {b->inp, b->qkv, b->att, b->mid, b->gate_up};
    return tensors[tensor];
}
static void model_pack(Model* model, int l, SavedTensor tensor) {
    const BlockActivations* b = &model->blocks[l];
    if (b->int8[tensor].codes) {
        model->ops->mxint8_pack(b->int8[tensor], block_tensor(b, tensor), model->B * model->T,
                                saved_columns(&model->config, tensor));
    }
}
static void model_unpack(Model* model, int l, SavedTensor tensor) {
    const BlockActivations* b = &model->blocks[l];
    if (b->int8[tensor].codes) {
        model->ops->mxint8_unpack(block_tensor(b, tensor), b->int8[tensor], model->B * model->T,
                                  saved_columns(&model->config, tensor));
    }
}

// the entry of block l, which is a + b (b NULL: what stands there), behind its first norm: the operand of qkv
static void model_enter_block(Model* model, const LinearContext* ctx, int l, const floatX* a, const floatX* b) {
    BlockActivations* block = &model->blocks[l];
    block->x[LINEAR_QKV] = linear_norm_input(ctx, &model->linears[l * LINEAR_KINDS + LINEAR_QKV],
                                             block->x_memory[LINEAR_QKV], block->norm1, block->inp, block->rstd1, a, b,
                                             model_weight(model, P_NORM1, l), model->B * model->T,
                                             (float)model->config.rms_eps);
    model_pack(model, l, SAVED_INP);
}

// the operand of gate+up: of mid = inp + b, or of mid as it stands where b is NULL
static void model_norm_middle(Model* model, const LinearContext* ctx, int l, const floatX* b) {
    BlockActivations* block = &model->blocks[l];
    block->x[LINEAR_GATE_UP] = linear_norm_input(
        ctx, &model->linears[l * LINEAR_KINDS + LINEAR_GATE_UP], block->x_memory[LINEAR_GATE_UP], block->norm2,
        block->mid, block->rstd2, b ? block->inp : block->mid, b, model_weight(model, P_NORM2, l), model->B * model->T,
        (float)model->config.rms_eps);
    model_pack(model, l, SAVED_MID);
}

// the operands of o and down, of what their inputs are made of
static void model_enter_o(Model* model, const LinearContext* ctx, int l) {
    BlockActivations* b = &model->blocks[l];
    b->x[LINEAR_O] = linear_input(ctx, &model->linears[l * LINEAR_KINDS + LINEAR_O], b->x_memory[LINEAR_O], b->att,
                                  model->B * model->T);
}
static void model_enter_down(Model* model, const LinearContext* ctx, int l) {
    BlockActivations* b = &model->blocks[l];
    b->x[LINEAR_DOWN] = linear_swiglu_input(ctx, &model->linears[l * LINEAR_KINDS + LINEAR_DOWN],
                                            b->x_memory[LINEAR_DOWN], b->act, b->int8[SAVED_GATE_UP], b->gate_up,
                                            model->B * model->T);
}

// from the operand of qkv to that of down
static void model_forward_block_inside(Model* model, const LinearContext* ctx, int l) {
    const Ops* ops = model->ops;
    BlockActivations* b = &model->blocks[l];
    const Linear* linears = model->linears + l * LINEAR_KINDS;
    AttentionShape shape = attention_shape(model, model->B, model->T);
    linear_product(ctx, &linears[LINEAR_QKV], b->qkv, &b->x[LINEAR_QKV]);
    ops->rope(b->qkv, model->rope_table, shape, 0, 0);
    ops->attention_forward(b->att, b->lse, b->qkv, shape);
    model_pack(model, l, SAVED_QKV);
    model_pack(model, l, SAVED_ATT);
    model_enter_o(model, ctx, l);
    linear_product(ctx, &linears[LINEAR_O], model->projection, &b->x[LINEAR_O]);
    model_norm_middle(model, ctx, l, model->projection);
    linear_product(ctx, &linears[LINEAR_GATE_UP], b->gate_up, &b->x[LINEAR_GATE_UP]);
    model_enter_down(model, ctx, l);
}

// From the operand of qkv to that of the next block: each residual add is one operation with the norm behind it.
static void model_forward_block(Model* model, int l) {
    const ModelConfig* m = &model->config;
    BlockActivations* b = &model->blocks[l];
    model_forward_block_inside(model, &model->linear, l);
    linear_product(&model->linear, &model->linears[l * LINEAR_KINDS + LINEAR_DOWN], model->projection,
                   &b->x[LINEAR_DOWN]);
    if (l + 1 < m->L) {
        model_enter_block(model, &model->linear, l + 1, b->mid, model->projection);
    } else {
        model->ops->add_rmsnorm_forward(model->out, model->final_norm, model->rstd_final, b->mid, model->projection,
                                        model_weight(model, P_NORM, -1), model->B * model->T, m->C,
                                        (float)m->rms_eps);
    }
}

// What forward did not keep of a block, made again as forward made it and not counted again. The last block's is still
// there. Where no product follows, backward reads only what is packed, not what the carrier multiplies.
static void model_rebuild_block(Model* model, int l) {
    BlockActivations* b = &model->blocks[l];
    Recompute recompute = model->training.recompute;
    LinearContext again = model->linear;
    again.telemetry = NULL;
    again.again = 1;
    LinearContext packed = again;
    packed.operand_a = NULL;
    if (recompute == RECOMPUTE_NONE || l + 1 == model->config.L) {
        return;
    }
    if (recompute == RECOMPUTE_BLOCK) {
        model_enter_block(model, &again, l, b->inp, NULL);
        model_forward_block_inside(model, &again, l);
        return;
    }
    model_enter_block(model, &packed, l, b->inp, NULL);
    model_enter_o(model, &packed, l);
    model_norm_middle(model, recompute == RECOMPUTE_FFN ? &again : &packed, l, NULL);
    if (recompute == RECOMPUTE_FFN) {
        linear_product(&again, &model->linears[l * LINEAR_KINDS + LINEAR_GATE_UP], b->gate_up, &b->x[LINEAR_GATE_UP]);
    }
    if (!b->int8[SAVED_GATE_UP].codes) {
        model_enter_down(model, &packed, l);
    }
}

// losses of all rows; where with_grad, dnorm (BT, C) = gradient of final_norm and the head's gradient +=
static void model_classifier(Model* model, float grad_scale, int with_grad) {
    const Ops* ops = model->ops;
    const ModelConfig* m = &model->config;
    ParamKind head = m->tied ? P_EMBED : P_HEAD;
    int BT = model->B * model->T;
    QTensor weight = qtensor_view(model_weight(model, head, -1), m->V, m->C, 0);
    QTensor weight_t = qtensor_view(model_weight(model, head, -1), m->C, m->V, 1);
    for (int row = 0; row < BT; row += model->classifier_rows) {
        int rows = min_int(model->classifier_rows, BT - row);
        const floatX* x = model->final_norm + (size_t)row * m->C;
        QTensor inp = qtensor_view(x, rows, m->C, 0);
        GemmArgs forward = {
            .out = real_floatX(model->logits), .accumulate = 0, .a = &inp, .b = &weight, .alpha = 1.0f};
        ops->gemm(&forward);
        ops->crossentropy(model->losses + row, model->logits, model->targets + row, rows, m->V, grad_scale, with_grad);
        if (with_grad) {
            QTensor dlogits = qtensor_view(model->logits, rows, m->V, 0);
            QTensor dlogits_t = qtensor_view(model->logits, m->V, rows, 1);
            QTensor inp_t = qtensor_view(x, m->C, rows, 1);
            GemmArgs input = {.out = real_floatX(model->dnorm + (size_t)row * m->C),
                              .accumulate = 0,
                              .a = &dlogits,
                              .b = &weight_t,
                              .alpha = 1.0f};
            ops->gemm(&input);
            GemmArgs grad = {.out = model_grad(model, head, -1), .accumulate = 1, .a = &dlogits_t,
                             .b = &inp_t, .alpha = 1.0f};
            ops->gemm(&grad);
        }
    }
}

// A micro-batch for model_run_forward. inputs, targets: (B*T) host arrays that do not change before the next
// synchronize. Random numbers follow from the step and the micro-batch's number in it, over all ranks.
static void model_load_batch(Model* model, const int32_t* inputs, const int32_t* targets, int64_t step, int64_t micro) {
    size_t BT = (size_t)model->B * model->T;
    uint64_t position = (uint64_t)micro << 32 | (uint64_t)step;
    model->ops->copy_to_device(&model->control->position, &position, sizeof position);
    model->ops->copy_to_device(model->inputs, inputs, BT * sizeof(int32_t));
    model->ops->copy_to_device(model->targets, targets, BT * sizeof(int32_t));
}

// The loaded micro-batch; its losses are added to control->loss_sum. grad_scale multiplies every gradient: 1 / tokens
// of the whole step makes the step's gradient the gradient of its mean loss.
static void model_run_forward(Model* model, float grad_scale, int with_grad) {
    const Ops* ops = model->ops;
    const ModelConfig* m = &model->config;
    BlockActivations* first = &model->blocks[0];
    size_t BT = (size_t)model->B * model->T;
    model_quantize_weights(model);
    model_begin_operands(model);
    ops->embedding_forward(first->inp, model->inputs, model_weight(model, P_EMBED, -1), (int)BT, m->C);
    model_enter_block(model, &model->linear, 0, first->inp, NULL);
    for (int l = 0; l < m->L; l++) {
        model_forward_block(model, l);
    }
    model_classifier(model, grad_scale, with_grad);
    ops->loss_sum(&model->control->loss_sum, model->losses, (int)BT);
}

static void model_forward(Model* model, const int32_t* inputs, const int32_t* targets, float grad_scale,
                          int with_grad) {
    model_load_batch(model, inputs, targets, 0, 0);
    model_run_forward(model, grad_scale, with_grad);
}

// The sums begin at zero; lr and the bias corrections of update t (from 1) are set. t 0: no update follows.
static void model_begin_step(Model* model, double lr, double beta1, double beta2, int64_t t) {
    StepControl control;
    memset(&control, 0, sizeof control);
    control.update = (uint64_t)t;
    control.lr = (float)lr;
    control.correction1 = (float)(1.0 - pow(beta1, (double)t));
    control.correction2 = (float)(1.0 - pow(beta2, (double)t));
    model->ops->copy_to_device(model->control, &control, sizeof control);
}

// waits for the device
static StepControl model_read_control(const Model* model) {
    StepControl control;
    model->ops->copy_to_host(&control, model->control, sizeof control);
    return control;
}

// ---------------------------------------------------------------------------------------------------------------------
// backward: gradients of all parameters +=, after a model_forward with_grad of the same micro-batch

// dresidual += gradient of the norm's input inp; dnorm owes `owed`
static void model_norm_backward(Model* model, Owed owed, ParamKind norm, int l, const floatX* inp, const float* rstd) {
    int BT = model->B * model->T, C = model->config.C;
    RealArray dweight = model_grad(model, norm, l);
    const floatX* weight = model_weight(model, norm, l);
    if (owed.rotated) {
        model->ops->unrotate_rmsnorm_backward(model->dresidual, dweight, model->dnorm, owed.mask, owed.row_scale,
                                              model->dresidual, inp, weight, rstd, BT, C);
    } else {
        model->ops->rmsnorm_backward(model->dresidual, dweight, model->dnorm, model->dresidual, inp, weight, rstd, BT,
                                     C);
    }
}

static void model_backward_block(Model* model, int l) {
    const Ops* ops = model->ops;
    const ModelConfig* m = &model->config;
    const LinearContext* ctx = &model->linear;
    const BlockActivations* b = &model->blocks[l];
    const Linear* linears = model->linears + l * LINEAR_KINDS;
    int BT = model->B * model->T;
    AttentionShape shape = attention_shape(model, model->B, model->T);

    model_rebuild_block(model, l);
    Owed owed = linear_backward_owed(ctx, &linears[LINEAR_DOWN], model->dact, model->dresidual, &b->x[LINEAR_DOWN], BT);
    if (owed.rotated) {
        ops->unrotate_swiglu_backward(model->dgate_up, model->dact, owed.mask, owed.row_scale, b->gate_up,
                                      b->int8[SAVED_GATE_UP], BT, m->F);
    } else {
        ops->swiglu_backward(model->dgate_up, model->dact, b->gate_up, b->int8[SAVED_GATE_UP], BT, m->F);
    }
    owed =
        linear_backward_owed(ctx, &linears[LINEAR_GATE_UP], model->dnorm, model->dgate_up, &b->x[LINEAR_GATE_UP], BT);
    model_unpack(model, l, SAVED_MID);
    model_norm_backward(model, owed, P_NORM2, l, b->mid, b->rstd2);

    linear_backward(ctx, &linears[LINEAR_O], model->datt, model->dresidual, &b->x[LINEAR_O], BT);
    model_unpack(model, l, SAVED_ATT);
    model_unpack(model, l, SAVED_QKV);
    ops->attention_backward(model->dqkv, model->datt, b->att, b->qkv, b->lse, shape);
    ops->rope(model->dqkv, model->rope_table, shape, 0, 1);
    owed = linear_backward_owed(ctx, &linears[LINEAR_QKV], model->dnorm, model->dqkv, &b->x[LINEAR_QKV], BT);
    model_unpack(model, l, SAVED_INP);
    model_norm_backward(model, owed, P_NORM1, l, b->inp, b->rstd1);
}

static void model_tell_ready(Model* model, int segment) {
    if (model->segment_ready) {
        model->segment_ready(model->ready_argument, segment);
    }
}

static void model_backward(Model* model) {
    const Ops* ops = model->ops;
    const ModelConfig* m = &model->config;
    int BT = model->B * model->T;
    ops->rmsnorm_backward(model->dresidual, model_grad(model, P_NORM, -1), model->dnorm, NULL, model->out,
                          model_weight(model, P_NORM, -1), model->rstd_final, BT, m->C);
    model_tell_ready(model, m->L + 1);
    for (int l = m->L - 1; l >= 0; l--) {
        model_backward_block(model, l);
        model_tell_ready(model, l + 1);
    }
    ops->embedding_backward(model_grad(model, P_EMBED, -1), model->dresidual, model->inputs, BT, m->V, m->C);
    model_tell_ready(model, 0);
}

// telemetry of the weights and of the next micro-batch, or none
static void model_begin_telemetry(Model* model, int observe) {
    model->linear.telemetry = observe ? model->telemetry : NULL;
    if (observe) {
        model->ops->zero(model->telemetry, sizeof(LinearTelemetry));
        model->ops->zero(model->linear.bases,
                         sizeof(CarrierBase) * (size_t)model->config.L * LINEAR_KINDS * OPERANDS);
    }
}

// after that micro-batch, and the end of it; waits for the device
static LinearTelemetry model_read_telemetry(Model* model) {
    LinearTelemetry t;
    size_t count = (size_t)model->config.L * LINEAR_KINDS * OPERANDS;
    CarrierBase* bases = (CarrierBase*)malloc_or_die(sizeof(CarrierBase) * count, "telemetry");
    model->ops->copy_to_host(&t, model->telemetry, sizeof t);
    model->ops->copy_to_host(bases, model->linear.bases, sizeof(CarrierBase) * count);
    for (size_t i = 0; i < count; i++) {
        const Linear* linear = &model->linears[i / OPERANDS];
        int id = (int)(i % OPERANDS), BT = model->B * model->T;
        if (recipe_spec(linear->recipe, (OperandId)id)->format == FORMAT_FLOATX) {
            continue;
        }
        double sizes[OPERANDS] = {(double)BT * linear->C,  (double)linear->C * linear->OC, (double)BT * linear->OC,
                                  (double)linear->C * linear->OC, (double)BT * linear->OC, (double)BT * linear->C};
        t.under[linear->kind][id] += (double)bases[i].under;
        t.groups[linear->kind][id] += sizes[id] / GROUP;
    }
    free(bases);
    model->linear.telemetry = NULL;
    return t;
}

static void model_zero_gradients(Model* model) {
    model->ops->zero(model->grads.data, model->table.elements * real_bytes(model->grads.type));
}

// after the last micro-batch of a step: weight gradients of a segment leave the rotated space they were summed in
static void model_finish_segment(Model* model, int segment) {
    for (int kind = 0; segment >= 1 && segment <= model->config.L && kind < LINEAR_KINDS; kind++) {
        linear_finish_gradient(&model->linear, &model->linears[(segment - 1) * LINEAR_KINDS + kind]);
    }
}

static void model_finish_gradients(Model* model) {
    for (int segment = 0; segment < segment_count(&model->config); segment++) {
        model_finish_segment(model, segment);
    }
}
