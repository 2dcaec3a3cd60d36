// generate.h: text from the model, with a key/value cache: each new token costs one pass over one row.
//
// The same linear layers as in training (the recipe's forward operands), so a sample shows what was trained. Sampling
// draws from softmax(logits / temperature); the random number of position p is a function of (seed, step, p).
#pragma once
#include "model.h"
#include "tokenizer.h"

#define GENERATE_ROWS 64  // prompt tokens that go through the model at once

typedef struct {
    floatX *x, *norm, *qkv, *att, *projection, *gate_up, *act, *logits;
    float* rstd;
    floatX *keys, *values;  // (L, positions, NKV*HS)
    int32_t* tokens;
    void *operand, *carried;
    int positions;
} Generator;

static Generator generator_open(const Model* model, int positions) {
    const Ops* ops = model->ops;
    const ModelConfig* m = &model->config;
    size_t A = (size_t)m->NH * m->HS, KV = (size_t)m->NKV * m->HS, R = GENERATE_ROWS, X = sizeof(floatX);
    size_t widest = max_size(max_size((size_t)m->C, A), (size_t)m->F);
    const char* what = "text generation";
    Generator g;
    g.x = (floatX*)ops->alloc(R * m->C * X, what);
    g.norm = (floatX*)ops->alloc(R * m->C * X, what);
    g.qkv = (floatX*)ops->alloc(R * (A + 2 * KV) * X, what);
    g.att = (floatX*)ops->alloc(R * A * X, what);
    g.projection = (floatX*)ops->alloc(R * m->C * X, what);
    g.gate_up = (floatX*)ops->alloc(R * 2 * m->F * X, what);
    g.act = (floatX*)ops->alloc(R * m->F * X, what);
    g.logits = (floatX*)ops->alloc((size_t)m->V * X, what);
    g.rstd = (float*)ops->alloc(R * sizeof(float), what);
    g.keys = (floatX*)ops->alloc((size_t)m->L * positions * KV * X, what);
    g.values = (floatX*)ops->alloc((size_t)m->L * positions * KV * X, what);
    g.tokens = (int32_t*)ops->alloc(R * sizeof(int32_t), what);
    g.operand = ops->alloc(max_size(1, qtensor_bytes(&model->recipe->x, GENERATE_ROWS, (int)widest)), what);
    g.carried = ops->alloc(
        max_size(1, carrier_bytes(&model->linear, model->recipe, OPERAND_X, GENERATE_ROWS, (int)widest)), what);
    g.positions = positions;
    return g;
}

static void generator_close(const Model* model, Generator* g) {
    void* buffers[] = {g->x,      g->norm, g->qkv,  g->att,    g->projection, g->gate_up, g->act,
                       g->logits, g->rstd, g->keys, g->values, g->tokens,     g->operand, g->carried};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) {
        model->ops->release(buffers[i]);
    }
}

static void generator_block(const Model* model, Generator* g, int l, int rows, int position) {
    const Ops* ops = model->ops;
    const ModelConfig* m = &model->config;
    LinearContext ctx = model->linear;
    ctx.telemetry = NULL;
    ctx.operand_a = g->carried;
    int padded = ctx.carrier ? (int)round_up(rows, 16) : rows;  // 8-bit products want multiples of 16
    const Linear* linears = model->linears + l * LINEAR_KINDS;
    AttentionShape shape = attention_shape(model, 1, rows);
    size_t cache = (size_t)l * g->positions * m->NKV * m->HS;
    QTensor x;
    ops->rmsnorm_forward(g->norm, g->rstd, g->x, model_weight(model, P_NORM1, l), rows, m->C, (float)m->rms_eps);
    linear_forward(&ctx, &linears[LINEAR_QKV], g->qkv, &x, g->operand, g->norm, padded);
    ops->rope(g->qkv, model->rope_table, shape, position, 0);
    ops->attention_cached(g->att, g->keys + cache, g->values + cache, g->qkv, shape, position);
    linear_forward(&ctx, &linears[LINEAR_O], g->projection, &x, g->operand, g->att, padded);
    ops->add(g->x, g->x, g->projection, (size_t)rows * m->C);
    ops->rmsnorm_forward(g->norm, g->rstd, g->x, model_weight(model, P_NORM2, l), rows, m->C, (float)m->rms_eps);
    linear_forward(&ctx, &linears[LINEAR_GATE_UP], g->gate_up, &x, g->operand, g->norm, padded);
    ops->swiglu_forward(g->act, MXINT8_NONE, g->gate_up, rows, m->F);
    linear_forward(&ctx, &linears[LINEAR_DOWN], g->projection, &x, g->operand, g->act, padded);
    ops->add(g->x, g->x, g->projection, (size_t)rows * m->C);
}

// rows (at most GENERATE_ROWS) tokens from position on; logits (V), on the host, of the last of them
static void generator_forward(Model* model, Generator* g, float* logits, const int* tokens, int rows, int position) {
    const Ops* ops = model->ops;
    const ModelConfig* m = &model->config;
    int32_t ids[GENERATE_ROWS];
    for (int i = 0; i < rows; i++) {
        ids[i] = tokens[i];
    }
    model_quantize_weights(model);
    model_begin_operands(model);
    ops->copy_to_device(g->tokens, ids, sizeof(int32_t) * (size_t)rows);
    ops->embedding_forward(g->x, g->tokens, model_weight(model, P_EMBED, -1), rows, m->C);
    for (int l = 0; l < m->L; l++) {
        generator_block(model, g, l, rows, position);
    }
    ops->rmsnorm_forward(g->norm, g->rstd, g->x, model_weight(model, P_NORM, -1), rows, m->C, (float)m->rms_eps);
    QTensor last = qtensor_view(g->norm + (size_t)(rows - 1) * m->C, 1, m->C, 0);
    QTensor head = qtensor_view(model_weight(model, m->tied ? P_EMBED : P_HEAD, -1), m->V, m->C, 0);
    GemmArgs gemm = {.out = real_floatX(g->logits), .accumulate = 0, .a = &last, .b = &head, .alpha = 1.0f};
    ops->gemm(&gemm);
    floatX* raw = (floatX*)malloc_or_die(sizeof(floatX) * (size_t)m->V, "logits");
    ops->copy_to_host(raw, g->logits, sizeof(floatX) * (size_t)m->V);
    for (int v = 0; v < m->V; v++) {
        logits[v] = floatX_to_f32(raw[v]);
    }
    free(raw);
}

// index drawn from softmax(logits / temperature) by a uniform number in [0, 1); temperature 0: the largest
static int sample_logits(const float* logits, int V, double temperature, float uniform) {
    int best = 0;
    for (int v = 1; v < V; v++) {
        best = logits[v] > logits[best] ? v : best;
    }
    if (temperature <= 0) {
        return best;
    }
    double sum = 0.0, running = 0.0;
    for (int v = 0; v < V; v++) {
        sum += exp(((double)logits[v] - (double)logits[best]) / temperature);
    }
    for (int v = 0; v < V; v++) {
        running += exp(((double)logits[v] - (double)logits[best]) / temperature);
        if (running > (double)uniform * sum) {
            return v;
        }
    }
    return best;
}

// Extend ids, which hold count >= 1 tokens, to at most `total` (never beyond the model's positions); returns their
// number. Tokens from `vocab` on are never drawn: a model's vocabulary is often padded beyond its tokenizer's.
static int generate(Model* model, int* ids, int count, int total, int vocab, double temperature, uint64_t seed,
                    int64_t step) {
    total = min_int(total, model->config.max_positions);
    check_or(count >= 1 && count < total, EXIT_USAGE,
             "the prompt's %d tokens leave no room in the model's %d positions", count, total);
    Generator g = generator_open(model, total);
    float* logits = (float*)malloc_or_die(sizeof(float) * (size_t)model->config.V, "logits");
    uint64_t stream = rand_stream(RAND_SAMPLE, 0, 0, (uint64_t)step);
    int position = 0;
    while (count < total) {
        int rows = min_int(GENERATE_ROWS, count - position);
        watch_phase("generating a sample");
        generator_forward(model, &g, logits, ids + position, rows, position);
        position += rows;
        if (position == count) {
            ids[count] = sample_logits(logits, min_int(vocab, model->config.V), temperature,
                                       rand_uniform(seed, (uint64_t)count, stream));
            count++;
        }
    }
    free(logits);
    generator_close(model, &g);
    return count;
}

// decoded text, with control characters other than line ends made visible; a separator token is a blank line
static void print_tokens(const Tokenizer* tokenizer, const int* ids, int count) {
    for (int i = 0; i < count; i++) {
        size_t bytes;
        const char* text = tokenizer_decode(tokenizer, ids[i], &bytes);
        if (ids[i] == tokenizer_separator(tokenizer)) {
            printf(i ? "\n\n" : "");
            continue;
        }
        for (size_t j = 0; j < bytes; j++) {
            unsigned char c = (unsigned char)text[j];
            if (c < 32 && c != '\n' && c != '\t') {
                printf("\\x%02x", c);
            } else {
                putchar(c);
            }
        }
    }
}
