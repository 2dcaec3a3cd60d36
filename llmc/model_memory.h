// model_memory.h: the model's shape in memory: what every buffer is for, how large it is, what is kept from forward for
// backward, initial weights. model.h computes with it.
//
// Every buffer is cut from one layout function, model_layout: with memory it assigns, without it counts (--plan), so
// the two cannot differ.
#pragma once
#include "linear.h"
#include "model_config.h"
#include "slices.h"

// What forward does not keep and backward makes again, bit for bit the same: nothing; what no product is needed for
// (the norms' and SwiGLU's outputs, the four quantized operands); also the gate and up product; everything but the
// block's entry.
typedef enum { RECOMPUTE_NONE, RECOMPUTE_NORM, RECOMPUTE_FFN, RECOMPUTE_BLOCK, RECOMPUTE_LEVELS } Recompute;
static const char* const RECOMPUTE_NAMES[RECOMPUTE_LEVELS] = {"none", "norm", "ffn", "block"};

// What backward reads as MXINT8 instead of as forward computed it, where that is kept at all (block_saves_int8)
typedef enum { SAVED_INT8_NONE, SAVED_INT8_FFN, SAVED_INT8_ALL, SAVED_INT8_CHOICES } SavedInt8;
static const char* const SAVED_INT8_NAMES[SAVED_INT8_CHOICES] = {"none", "ffn", "all"};

// what training keeps, in which types, and whose linear layers stay dense
typedef struct {
    Recompute recompute;
    RealType grad_type, moment_type;
    int has_master;  // f32 copy of the weights; without it they are rounded stochastically
    int dense_first, dense_last;  // so many blocks at the beginning and at the end do not quantize
    int rank, ranks;  // optimizer state is that of slice `rank` of `ranks`
    SavedInt8 saved_int8;
} TrainingMemory;
static const TrainingMemory MEMORY_EXACT = {RECOMPUTE_NONE, REAL_F32, REAL_F32, 1, 0, 0, 0, 1, SAVED_INT8_NONE};

// tensors of a block that may be MXINT8 for backward
typedef enum { SAVED_INP, SAVED_QKV, SAVED_ATT, SAVED_MID, SAVED_GATE_UP, SAVED_TENSORS } SavedTensor;

// Kept from forward for backward, one a block; a buffer that is not kept is the same one in all blocks. So is that of a
// tensor that backward reads as MXINT8: forward packs it when it is complete, backward unpacks it where it is read. inp
// and mid then are model->out, added to in place, and gate_up is dgate_up, as no one else needs those meanwhile.
typedef struct {
    floatX* inp;         // (BT, C) residual stream at the block's entry
    float* rstd1;        // (BT)
    floatX* norm1;       // (BT, C). Of a quantizing block norm1, norm2 and act are one scratch: operands stand for them
    floatX* qkv;         // (BT, A + 2 KV) after rope
    float* lse;          // (B, NH, T)
    floatX* att;         // (BT, A)
    floatX* mid;         // (BT, C) residual stream after attention
    float* rstd2;        // (BT)
    floatX* norm2;       // (BT, C)
    floatX* gate_up;     // (BT, 2F)
    floatX* act;         // (BT, F)
    Mxint8 int8[SAVED_TENSORS];  // where backward reads that; with gate_up what is made of it, act or x of down, stays
    char* x_memory[LINEAR_KINDS];
    QTensor x[LINEAR_KINDS];  // forward operands of the four linear layers
} BlockActivations;

typedef enum {
    MEMORY_PARAMS, MEMORY_GRADS, MEMORY_OPTIMIZER, MEMORY_QUANTIZED_WEIGHTS, MEMORY_ACTIVATIONS, MEMORY_BACKWARD,
    MEMORY_CLASSIFIER, MEMORY_BATCH, MEMORY_CLASSES,
} MemoryClass;
static const char* const MEMORY_NAMES[MEMORY_CLASSES] = {
    "parameters", "gradients", "optimizer state", "quantized weights", "saved activations",
    "backward scratch", "classifier chunk", "batch",
};

typedef struct {
    const Ops* ops;
    ModelConfig config;
    ParamTable table;
    TrainingMemory training;
    const Recipe* recipe; // of the linear layers, but for those of dense blocks
    int B, T;             // rows and length of a micro-batch
    int classifier_rows;  // rows of a chunk of logits

    floatX* params;       // all parameters, flat
    RealArray grads;
    Slices slices;        // what this rank updates; m, v, master hold its elements
    RealArray m, v;
    float* master;        // or NULL
    double* squares;      // (slices) of the gradients
    // called where given when the gradients of a segment (slices.h) are complete, by model_backward
    void (*segment_ready)(void* argument, int segment);
    void* ready_argument;
    LinearContext linear;
    Linear* linears;      // (L, LINEAR_KINDS)
    float* rope_table;    // (positions, HS/2, 2) cos, sin

    BlockActivations* blocks;
    floatX *out;          // (BT, C) residual stream after the last block; all along where its blocks keep MXINT8 of it
    floatX *final_norm;   // (BT, C)
    float *rstd_final, *losses;  // (BT)
    floatX* logits;       // (classifier_rows, V), turned into its gradient in place
    floatX* projection;   // (BT, C) output of o and down before it is added to the stream
    floatX *dresidual, *dnorm, *dqkv, *datt, *dgate_up, *dact;
    void* quantized_memory;
    int weights_quantized;  // do the forward operands of the weights match the weights?
    int32_t *inputs, *targets;
    StepControl* control; // on the device, as
    LinearTelemetry* telemetry;

    void* memory[MEMORY_CLASSES];
    size_t memory_bytes[MEMORY_CLASSES];
} Model;

static const Param* model_param(const Model* model, ParamKind kind, int layer) {
    return param_at(&model->table, kind, layer);
}
static floatX* model_weight(const Model* model, ParamKind kind, int layer) {
    return model->params + model_param(model, kind, layer)->offset;
}
static RealArray model_grad(const Model* model, ParamKind kind, int layer) {
    return real_from(model->grads, model_param(model, kind, layer)->offset);
}

static AttentionShape attention_shape(const Model* model, int B, int T) {
    return (AttentionShape){.B = B, .T = T, .NH = model->config.NH, .NKV = model->config.NKV, .HS = model->config.HS};
}

// ---------------------------------------------------------------------------------------------------------------------
// memory

typedef struct { char* base; size_t used; } Arena;

// bytes, 256-byte aligned; NULL where the arena only counts
static void* arena_take(Arena* arena, size_t bytes) {
    void* at = arena->base ? arena->base + arena->used : NULL;
    arena->used += (size_t)round_up((int64_t)bytes, 256);
    return at;
}

static RealArray arena_take_reals(Arena* arena, RealType type, size_t count) {
    return RealArray{type, arena_take(arena, count * real_bytes(type))};
}

// columns C and rows OC of a linear layer
static void linear_shape(const ModelConfig* m, LinearKind kind, int* C, int* OC) {
    int A = m->NH * m->HS, KV = m->NKV * m->HS;
    int in[] = {m->C, A, m->C, m->F}, out[] = {A + 2 * KV, m->C, 2 * m->F, m->C};
    *C = in[kind];
    *OC = out[kind];
}

static int block_is_dense(const Model* model, int l) {
    return model->linears[l * LINEAR_KINDS].recipe->x.format == FORMAT_FLOATX;
}

// Does backward read that tensor of block l as MXINT8? Not where it is made again, nor where operands are made again of
// it, nor where it is one (att of a dense block); nor gate_up where act would have to be kept for that.
static int block_saves_int8(const Model* model, int l, SavedTensor tensor) {
    Recompute recompute = model->training.recompute;
    int dense = block_is_dense(model, l), all = model->training.saved_int8 == SAVED_INT8_ALL;
    switch (tensor) {
    case SAVED_QKV: return all && recompute < RECOMPUTE_BLOCK;
    case SAVED_ATT: return all && recompute < RECOMPUTE_NORM && !dense;
    case SAVED_GATE_UP:
        return model->training.saved_int8 != SAVED_INT8_NONE && recompute < (dense ? RECOMPUTE_NORM : RECOMPUTE_FFN);
    default: return all && recompute < RECOMPUTE_NORM;
    }
}

// its columns
static int saved_columns(const ModelConfig* m, SavedTensor tensor) {
    const int columns[SAVED_TENSORS] = {m->C, (m->NH + 2 * m->NKV) * m->HS, m->NH * m->HS, m->C, 2 * m->F};
    return columns[tensor];
}

// A buffer of a block that is kept, or the one that all blocks share which do not keep theirs
typedef struct { void* at; int taken; } SharedBuffer;
static void* arena_take_shared(Arena* arena, SharedBuffer* shared, int keep, size_t bytes) {
    if (keep) {
        return arena_take(arena, bytes);
    }
    if (!shared->taken) {
        shared->at = arena_take(arena, bytes);
        shared->taken = 1;
    }
    return shared->at;
}

static void model_layout_block(Model* model, Arena* arena, int l, SharedBuffer* shared) {
    const ModelConfig* m = &model->config;
    size_t BT = (size_t)model->B * model->T, A = (size_t)m->NH * m->HS, KV = (size_t)m->NKV * m->HS;
    Recompute recompute = model->training.recompute;
    BlockActivations* b = &model->blocks[l];
    int dense = block_is_dense(model, l), kept = recompute < RECOMPUTE_NORM, outputs = dense && kept;
    int ffn = recompute < RECOMPUTE_FFN, block = recompute < RECOMPUTE_BLOCK, int8[SAVED_TENSORS];
    for (int t = 0; t < SAVED_TENSORS; t++) {
        size_t columns = (size_t)saved_columns(m, (SavedTensor)t);
        int8[t] = block_saves_int8(model, l, (SavedTensor)t);
        b->int8[t] = int8[t] ? mxint8_at(BT, columns, arena_take(arena, mxint8_bytes(BT, columns))) : MXINT8_NONE;
    }
    b->inp = int8[SAVED_INP] ? model->out : (floatX*)arena_take(arena, BT * m->C * sizeof(floatX));
#define TAKE(keep, field, type, count) \
    b->field = (type*)arena_take_shared(arena, shared++, keep, (count) * sizeof(type))
    TAKE(block, rstd1, float, BT);
    if (dense) {
        TAKE(outputs, norm1, floatX, BT * m->C);
        TAKE(outputs, norm2, floatX, BT * m->C);
        TAKE(outputs, act, floatX, BT * m->F);
        shared++;
    } else {
        shared += 3;
        TAKE(0, act, floatX, BT * (size_t)max_int(m->C, m->F));
        b->norm1 = b->norm2 = b->act;
    }
    TAKE(block && !int8[SAVED_QKV], qkv, floatX, BT * (A + 2 * KV));
    TAKE(block, lse, float, BT * m->NH);
    TAKE(block && !int8[SAVED_ATT], att, floatX, BT * A);
    if (int8[SAVED_MID]) {
        b->mid = model->out;
        shared++;
    } else {
        TAKE(block, mid, floatX, BT * m->C);
    }
    TAKE(block, rstd2, float, BT);
    if (int8[SAVED_GATE_UP]) {  // model_layout_backward
        shared++;
    } else {
        TAKE(ffn, gate_up, floatX, BT * 2 * m->F);
    }
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        const Linear* linear = &model->linears[l * LINEAR_KINDS + kind];
        TAKE(dense || kept || (int8[SAVED_GATE_UP] && kind == LINEAR_DOWN), x_memory[kind], char,
             qtensor_bytes(&linear->recipe->x, (int)BT, linear->C));
    }
#undef TAKE
}

static void model_layout_activations(Model* model, Arena* arena) {
    const ModelConfig* m = &model->config;
    size_t BT = (size_t)model->B * model->T;
    SharedBuffer shared[16] = {};
    model->out = (floatX*)arena_take(arena, BT * m->C * sizeof(floatX));
    for (int l = 0; l < m->L; l++) {
        model_layout_block(model, arena, l, shared);
    }
    model->final_norm = (floatX*)arena_take(arena, BT * m->C * sizeof(floatX));
    model->rstd_final = (float*)arena_take(arena, BT * sizeof(float));
    model->losses = (float*)arena_take(arena, BT * sizeof(float));
    model->projection = (floatX*)arena_take(arena, BT * m->C * sizeof(floatX));
    model->rope_table = (float*)arena_take(arena, (size_t)m->max_positions * m->HS * sizeof(float));
}

static void model_layout_backward(Model* model, Arena* arena) {
    const ModelConfig* m = &model->config;
    size_t BT = (size_t)model->B * model->T, A = (size_t)m->NH * m->HS, KV = (size_t)m->NKV * m->HS;
    model->dresidual = (floatX*)arena_take(arena, BT * m->C * sizeof(floatX));
    model->dnorm = (floatX*)arena_take(arena, BT * m->C * sizeof(floatX));
    model->dqkv = (floatX*)arena_take(arena, BT * (A + 2 * KV) * sizeof(floatX));
    model->datt = (floatX*)arena_take(arena, BT * A * sizeof(floatX));
    model->dgate_up = (floatX*)arena_take(arena, BT * 2 * m->F * sizeof(floatX));
    for (int l = 0; l < m->L; l++) {  // forward's own gate_up is over when its gradient begins
        model->blocks[l].gate_up =
            block_saves_int8(model, l, SAVED_GATE_UP) ? model->dgate_up : model->blocks[l].gate_up;
    }
    model->dact = (floatX*)arena_take(arena, BT * m->F * sizeof(floatX));
    size_t operand = 0;
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        int C, OC;
        linear_shape(m, (LinearKind)kind, &C, &OC);
        operand = max_size(operand, linear_scratch_bytes(&model->linear, model->recipe, (int)BT, C, OC));
    }
    model->linear.operand_a = arena_take(arena, operand);
    model->linear.operand_b = arena_take(arena, operand);
}

static void model_layout(Model* model, MemoryClass kind, Arena* arena) {
    const ModelConfig* m = &model->config;
    size_t BT = (size_t)model->B * model->T, N = model->table.elements;
    switch (kind) {
    case MEMORY_PARAMS: model->params = (floatX*)arena_take(arena, N * sizeof(floatX)); break;
    case MEMORY_GRADS: model->grads = arena_take_reals(arena, model->training.grad_type, N); break;
    case MEMORY_OPTIMIZER: {
        size_t owned = model->slices.elements;
        model->master = model->training.has_master ? (float*)arena_take(arena, owned * sizeof(float)) : NULL;
        model->m = arena_take_reals(arena, model->training.moment_type, owned);
        model->v = arena_take_reals(arena, model->training.moment_type, owned);
        break;
    }
    case MEMORY_QUANTIZED_WEIGHTS: {
        size_t bytes = 0;
        for (int i = 0; i < m->L * LINEAR_KINDS; i++) {
            const Linear* linear = &model->linears[i];
            bytes += linear_weight_bytes(linear->recipe, linear->C, linear->OC);
        }
        model->quantized_memory = arena_take(arena, bytes);
        break;
    }
    case MEMORY_ACTIVATIONS: model_layout_activations(model, arena); break;
    case MEMORY_BACKWARD: model_layout_backward(model, arena); break;
    case MEMORY_CLASSIFIER:
        model->logits = (floatX*)arena_take(arena, (size_t)model->classifier_rows * m->V * sizeof(floatX));
        break;
    case MEMORY_BATCH:
        model->inputs = (int32_t*)arena_take(arena, BT * sizeof(int32_t));
        model->targets = (int32_t*)arena_take(arena, BT * sizeof(int32_t));
        model->control = (StepControl*)arena_take(arena, sizeof(StepControl));
        model->squares = (double*)arena_take(arena, sizeof(double) * (size_t)model->slices.count);
        model->telemetry = (LinearTelemetry*)arena_take(arena, sizeof(LinearTelemetry));
        model->linear.bases =
            (CarrierBase*)arena_take(arena, sizeof(CarrierBase) * (size_t)m->L * LINEAR_KINDS * OPERANDS);
        break;
    case MEMORY_CLASSES: break;
    }
}

// rows of logits worked on at once
static int classifier_chunk_rows(size_t bytes, int BT, int V) {
    int64_t rows = (int64_t)(bytes / ((size_t)V * sizeof(floatX)));
    return (int)max_i64(1, min_i64(BT, rows >= 64 ? rows / 64 * 64 : rows));
}

// Floating-point operations of one trained token: 6 per parameter of a matrix that multiplies (forward 2, backward 4;
// the embedding does not), and causal attention 12 L T A / 2 with A = NH * HS. MFU is this times tokens per second over
// the device's peak.
static double model_flops_per_token(const Model* model) {
    const ModelConfig* m = &model->config;
    double matrices = (double)model->table.block_size * m->L + (double)m->V * m->C;
    return 6.0 * matrices + 6.0 * m->L * (double)model->T * m->NH * m->HS;
}

// the largest left and right operand of any GEMM of a step
static OperandSizes model_largest_operands(const Model* model) {
    const ModelConfig* m = &model->config;
    size_t BT = (size_t)model->B * model->T, rows = (size_t)model->classifier_rows;
    OperandSizes largest = {max_size(rows * m->C, rows * m->V), max_size((size_t)m->V * m->C, rows * m->C)};
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        int C, OC;
        linear_shape(m, (LinearKind)kind, &C, &OC);
        largest.a = max_size(largest.a, BT * max_size((size_t)C, (size_t)OC));
        largest.b = max_size(largest.b, max_size((size_t)OC * C, BT * (size_t)C));
    }
    return largest;
}

// MXINT8 needs rows of whole groups
static void model_check_saved(const ModelConfig* m, SavedInt8 choice) {
    const struct { const char* what; int width; } rows[] = {
        {"--ffn", m->F},
        {"--channels", m->C},
        {"(--heads + 2 x --kv-heads) x head size", (m->NH + 2 * m->NKV) * m->HS},
        {"--heads x head size", m->NH * m->HS}};
    int count = choice == SAVED_INT8_ALL ? 4 : choice == SAVED_INT8_FFN ? 1 : 0;
    for (int i = 0; i < count; i++) {
        int width = rows[i].width, below = max_int(width / GROUP, 1) * GROUP;
        check_or(width % GROUP == 0, EXIT_USAGE,
                 "--saved-int8 %s needs %s to be a multiple of %d, but it is %d; %d and %d are the nearest",
                 SAVED_INT8_NAMES[choice], rows[i].what, GROUP, width, below, below + GROUP);
    }
}

// What no backend can do with this recipe, shape or batch is said here, before anything is allocated.
static void model_check(const Model* model) {
    const ModelConfig* m = &model->config;
    const Recipe* recipe = model->recipe;
    const QuantSpec* specs[] = {&recipe->x, &recipe->w, &recipe->dy, &recipe->wt, &recipe->dyt, &recipe->xt};
    const char* fault = recipe_fault(recipe);
    check(!fault, "internal: recipe %s: %s", recipe->name, fault);
    for (int i = 0; i < 6; i++) {
        check_or(model->ops->quantize_supports(specs[i]), EXIT_USAGE,
                 "--recipe %s needs a quantizer that device %s does not have", recipe->name, model->ops->name);
    }
    model_check_saved(m, model->training.saved_int8);
    if (recipe->x.format == FORMAT_FLOATX) {
        return;
    }
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        int C, OC;
        linear_shape(m, (LinearKind)kind, &C, &OC);
        check_or(C % GROUP == 0 && OC % GROUP == 0, EXIT_USAGE,
                 "--recipe %s needs sizes that are multiples of %d, but the %s layer is %d x %d; change --channels, "
                 "--ffn or "
                 "--heads",
                 recipe->name, GROUP, LINEAR_NAMES[kind], OC, C);
    }
    check_or((int64_t)model->B * model->T % GROUP == 0, EXIT_USAGE,
             "--recipe %s needs a micro-batch of a multiple of %d tokens, but --batch-size %d x --seq-len %d is %d",
             recipe->name, GROUP, model->B, model->T, model->B * model->T);
}

// Shapes and memory sizes; nothing is allocated but the tables. B rows of T tokens a micro-batch.
static void model_prepare(Model* model, const Ops* ops, const ModelConfig* config, const Recipe* recipe,
                          TrainingMemory training, int B, int T) {
    memset(model, 0, sizeof *model);
    model->ops = ops;
    model->training = training;
    model->config = *config;
    model->table = param_table(config);
    model->slices = slices_make(config, &model->table, training.rank, max_int(1, training.ranks));
    model->B = B;
    model->T = T;
    model->classifier_rows = classifier_chunk_rows(ops->classifier_bytes, B * T, config->V);
    model->linear.ops = ops;
    model->recipe = recipe;
    model->linear.carrier = ops->carrier();
    model_check(model);
    model->blocks = (BlockActivations*)calloc_or_die(sizeof(BlockActivations) * (size_t)config->L, "block table");
    model->linears = (Linear*)calloc_or_die(sizeof(Linear) * (size_t)config->L * LINEAR_KINDS, "linear table");
    for (int i = 0; i < config->L * LINEAR_KINDS; i++) {
        Linear* linear = &model->linears[i];
        linear->layer = i / LINEAR_KINDS;
        linear->kind = (LinearKind)(i % LINEAR_KINDS);
        int dense = linear->layer < training.dense_first || linear->layer >= config->L - training.dense_last;
        linear->recipe = dense ? recipe_find("bf16") : recipe;
        linear_shape(config, linear->kind, &linear->C, &linear->OC);
    }
    for (int kind = 0; kind < MEMORY_CLASSES; kind++) {
        Arena arena = {NULL, 0};
        model_layout(model, (MemoryClass)kind, &arena);
        model->memory_bytes[kind] = arena.used;
    }
}

// cos and sin of position * theta^(-2j/HS), the frequencies stretched as Llama 3.1 does where rope_scaling says so:
// wavelengths longer than original/low are divided by factor, those shorter than original/high stay, between them it is
// linear in 1/wavelength
static void rope_table_fill(float* table, const ModelConfig* m) {
    for (int j = 0; j < m->HS / 2; j++) {
        double frequency = pow(m->rope_theta, -2.0 * j / m->HS);
        if (m->rope_factor > 0) {
            double turns = m->rope_original * frequency / 6.283185307179586;  // original length in wavelengths
            double blend = (turns - m->rope_low) / (m->rope_high - m->rope_low);
            blend = blend < 0 ? 0 : blend > 1 ? 1 : blend;
            frequency = (1 - blend) * frequency / m->rope_factor + blend * frequency;
        }
        for (int t = 0; t < m->max_positions; t++) {
            table[((size_t)t * (m->HS / 2) + j) * 2] = (float)cos(t * frequency);
            table[((size_t)t * (m->HS / 2) + j) * 2 + 1] = (float)sin(t * frequency);
        }
    }
}

static void model_bind_linears(Model* model) {
    const ParamKind first[] = {P_Q, P_O, P_GATE, P_DOWN};
    for (int l = 0; l < model->config.L; l++) {
        for (int kind = 0; kind < LINEAR_KINDS; kind++) {
            Linear* linear = &model->linears[l * LINEAR_KINDS + kind];
            linear->weight = model_weight(model, first[kind], l);
            linear->dweight = model_grad(model, first[kind], l);
        }
    }
}

static void model_allocate(Model* model) {
    for (int kind = 0; kind < MEMORY_CLASSES; kind++) {
        Arena arena = {(char*)model->ops->alloc(model->memory_bytes[kind], MEMORY_NAMES[kind]), 0};
        model->memory[kind] = arena.base;
        model_layout(model, (MemoryClass)kind, &arena);
    }
    model_bind_linears(model);
    model->linear.position = &model->control->position;
    model->ops->reserve(attention_shape(model, model->B, model->T));
    size_t count = (size_t)model->config.max_positions * model->config.HS;
    float* table = (float*)malloc_or_die(count * sizeof(float), "rope table");
    rope_table_fill(table, &model->config);
    model->ops->copy_to_device(model->rope_table, table, count * sizeof(float));
    free(table);
}

// what model_prepare made
static void model_free_tables(Model* model) {
    free(model->blocks);
    free(model->linears);
    free(model->table.list);
    free(model->slices.list);
}

static void model_free(Model* model) {
    for (int kind = 0; kind < MEMORY_CLASSES; kind++) {
        model->ops->release(model->memory[kind]);
    }
    model_free_tables(model);
}

// n initial values of a tensor from element `first` on, and the same rounded
static void model_draw_weights(const Model* model, const Param* param, uint64_t seed, size_t first, int64_t n,
                               float* values, floatX* rounded) {
    Init init = PARAM_SPECS[param->kind].init;
    double std = init == INIT_SCALED ? 0.02 / sqrt(2.0 * model->config.L) : 0.02;
    uint64_t stream = rand_stream(RAND_INIT, (uint64_t)(param->layer + 1), (uint64_t)param->kind, 0);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        values[i] = init == INIT_ONE ? 1.0f : (float)(std * rand_normal(seed, first + (size_t)i, stream));
        rounded[i] = f32_to_floatX(values[i]);
    }
}

// Initial master weights of this rank's slices from the seed, and the parameters rounded from them; with several ranks
// optimizer_gather then brings the others' parameters. Element i of a tensor is a function of (seed, tensor, i).
static void model_init_weights(Model* model, uint64_t seed) {
    const size_t chunk = (size_t)1 << 21;
    float* values = (float*)malloc_or_die(chunk * sizeof(float), "initial weights");
    floatX* rounded = (floatX*)malloc_or_die(chunk * sizeof(floatX), "initial weights");
    for (int p = 0; p < model->table.count; p++) {
        const Param* param = &model->table.list[p];
        for (int s = 0; s < model->slices.count; s++) {
            const Slice* slice = &model->slices.list[s];
            Range part = range_overlap(Range{slice->begin, slice->count}, Range{param->offset, param->count});
            for (size_t done = 0; done < part.count; done += chunk) {
                size_t begin = part.begin + done, n = part.count - done < chunk ? part.count - done : chunk;
                model_draw_weights(model, param, seed, begin - param->offset, (int64_t)n, values, rounded);
                if (model->master) {
                    model->ops->copy_to_device(model->master + slice->at + (begin - slice->begin), values,
                                               n * sizeof(float));
                }
                model->ops->copy_to_device(model->params + begin, rounded, n * sizeof(floatX));
            }
        }
    }
    free(values);
    free(rounded);
}
