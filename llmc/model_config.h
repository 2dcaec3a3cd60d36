// model_config.h: the shape of a Llama: presets, Hugging Face config.json both ways, and the table of its parameters.
//
// PARAM_SPECS has one row per parameter of a block and of the model; everything that walks over parameters (layout,
// init, weight decay, quantization, checkpoints, --plan) reads that table. Parameters lie in one flat buffer, layer by
// layer in the order of the table, so q, k, v and gate, up are each one contiguous matrix that a fused linear layer
// uses as it lies.
#pragma once
#include "config.h"
#include "json.h"

typedef struct {
    char name[64];
    int L, C, NH, NKV, HS, F, V;
    int tied;
    int max_positions;
    double rope_theta, rms_eps;
    // Llama-3 rope_scaling; factor 0 is none
    double rope_factor, rope_low, rope_high;
    int rope_original;
} ModelConfig;

// Training defaults that come with a preset
typedef struct {
    const char* name;
    int L, C, NH, NKV, F, V, T, tied;
    double rope_theta, rope_factor;
    double lr;
    int64_t batch_tokens;
    const char* what;
} Preset;

#define QUARTET_BATCH 262144
static const Preset PRESETS[] = {
    // name            L   C     NH  NKV F      V       T     tied theta factor lr    batch tokens   what
    {"tiny",           4,  128,  4,  4,  384,   288,    128,  0, 1e4, 0,  4e-3,    4096,          "quick start"},
    {"30m",            6,  640,  5,  5,  1792,  32000,  512,  0, 1e4, 0,  1.2e-3,  QUARTET_BATCH, "Quartet paper"},
    {"50m",            7,  768,  6,  6,  2048,  32000,  512,  0, 1e4, 0,  1.2e-3,  QUARTET_BATCH, "Quartet paper"},
    {"100m",           8,  1024, 8,  8,  2816,  32000,  512,  0, 1e4, 0,  6e-4,    QUARTET_BATCH, "Quartet paper"},
    {"200m",           10, 1280, 10, 10, 3584,  32000,  512,  0, 1e4, 0,  3e-4,    QUARTET_BATCH, "Quartet paper"},
    {"430m",           13, 1664, 13, 13, 4608,  32000,  512,  0, 1e4, 0,  1.5e-4,  QUARTET_BATCH, "Quartet paper"},
    {"800m",           16, 2048, 16, 16, 5632,  32000,  512,  0, 1e4, 0,  7.5e-5,  QUARTET_BATCH, "Quartet paper"},
    {"1.6b",           20, 2560, 20, 20, 6912,  32000,  512,  0, 1e4, 0,  3.75e-5, QUARTET_BATCH, "Quartet paper"},
    {"7b",             32, 4096, 32, 32, 11008, 32000,  512,  0, 1e4, 0,  9.4e-6,  QUARTET_BATCH, "Quartet paper"},
    {"tinyllama-1.1b", 22, 2048, 32, 4,  5632,  32000,  2048, 0, 1e4, 0,  4e-4,    2097152,       "TinyLlama"},
    {"llama2-7b",      32, 4096, 32, 32, 11008, 32000,  4096, 0, 1e4, 0,  3e-4,    4194304,       "Llama 2"},
    {"llama3.2-1b",    16, 2048, 32, 8,  8192,  128256, 4096, 1, 5e5, 32, 3e-4,    4194304,       "Llama 3.2"},
    {"llama3-8b",      32, 4096, 32, 8,  14336, 128256, 8192, 0, 5e5, 0,  3e-4,    4194304,       "Llama 3"},
};
#define PRESET_COUNT ((int)(sizeof PRESETS / sizeof PRESETS[0]))

static void presets_print(FILE* file) {
    fprintf(file, "\nPresets (--model)    layers channels heads kv   ffn   vocab seq-len   lr      batch-tokens\n");
    for (int i = 0; i < PRESET_COUNT; i++) {
        const Preset* p = &PRESETS[i];
        fprintf(file, "  %-18s %6d %8d %5d %3d %6d %7d %6d   %-8g %9lld  %s\n", p->name, p->L, p->C, p->NH, p->NKV,
                p->F, p->V, p->T, p->lr, (long long)p->batch_tokens, p->what);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Hugging Face config.json

// rope parameters stand in rope_scaling (transformers 4) or rope_parameters (transformers 5)
static void model_config_read_rope(ModelConfig* m, const Json* root, const char* path) {
    m->rope_theta = json_double_or(root, "rope_theta", 10000.0);
    const Json* rope = json_get(root, "rope_parameters");
    rope = rope && rope->type == JSON_OBJECT ? rope : json_get(root, "rope_scaling");
    if (!rope || rope->type != JSON_OBJECT) {
        return;
    }
    m->rope_theta = json_double_or(rope, "rope_theta", m->rope_theta);
    const char* type = json_string_or(rope, "rope_type", json_string_or(rope, "type", "default"));
    if (!strcmp(type, "default")) {
        return;
    }
    check_or(!strcmp(type, "llama3"), EXIT_BAD_DATA, "'%s': rope type '%s' is not supported; default and llama3 are",
             path, type);
    m->rope_factor = json_double_or(rope, "factor", 8.0);
    m->rope_low = json_double_or(rope, "low_freq_factor", 1.0);
    m->rope_high = json_double_or(rope, "high_freq_factor", 4.0);
    m->rope_original = (int)json_int_or(rope, "original_max_position_embeddings", 8192);
}

static ModelConfig model_config_read(const char* path) {
    Json* root = json_read_file(path);
    ModelConfig m = {};
    snprintf(m.name, sizeof m.name, "%s", json_string_or(root, "model_type", "llama"));
    check_or(!strcmp(m.name, "llama"), EXIT_BAD_DATA, "'%s': model_type '%s' is not llama", path, m.name);
    check_or(!json_bool_or(root, "attention_bias", 0) && !json_bool_or(root, "mlp_bias", 0), EXIT_BAD_DATA,
             "'%s': linear layers with biases are not supported", path);
    const char* activation = json_string_or(root, "hidden_act", "silu");
    check_or(!strcmp(activation, "silu"), EXIT_BAD_DATA, "'%s': hidden_act '%s' is not supported; silu is", path,
             activation);
    m.C = (int)json_int(json_need(root, "hidden_size"));
    m.L = (int)json_int(json_need(root, "num_hidden_layers"));
    m.NH = (int)json_int(json_need(root, "num_attention_heads"));
    m.F = (int)json_int(json_need(root, "intermediate_size"));
    m.V = (int)json_int(json_need(root, "vocab_size"));
    m.NKV = (int)json_int_or(root, "num_key_value_heads", m.NH);
    m.HS = (int)json_int_or(root, "head_dim", m.NH ? m.C / m.NH : 0);
    m.rms_eps = json_double_or(root, "rms_norm_eps", 1e-6);
    m.tied = json_bool_or(root, "tie_word_embeddings", 0);
    m.max_positions = (int)json_int_or(root, "max_position_embeddings", 2048);
    model_config_read_rope(&m, root, path);
    json_free(root);
    return m;
}

// separator: token id of the document separator (bos), or -1
static void model_config_write(FILE* file, const ModelConfig* m, int separator) {
    fprintf(
        file,
        "{\n  \"architectures\": [\"LlamaForCausalLM\"],\n  \"model_type\": \"llama\",\n  \"torch_dtype\": \"%s\",\n",
        sizeof(floatX) == 2 ? "bfloat16" : "float32");
    fprintf(file, "  \"hidden_size\": %d,\n  \"num_hidden_layers\": %d,\n  \"num_attention_heads\": %d,\n", m->C, m->L,
            m->NH);
    fprintf(file, "  \"num_key_value_heads\": %d,\n  \"head_dim\": %d,\n  \"intermediate_size\": %d,\n", m->NKV, m->HS,
            m->F);
    fprintf(file, "  \"vocab_size\": %d,\n  \"max_position_embeddings\": %d,\n", m->V, m->max_positions);
    fprintf(file, "  \"hidden_act\": \"silu\",\n  \"rms_norm_eps\": %.10g,\n  \"rope_theta\": %.10g,\n", m->rms_eps,
            m->rope_theta);
    if (m->rope_factor > 0) {
        fprintf(file, "  \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": %.10g, \"low_freq_factor\": %.10g, "
                      "\"high_freq_factor\": %.10g, \"original_max_position_embeddings\": %d},\n",
                m->rope_factor, m->rope_low, m->rope_high, m->rope_original);
    } else {
        fprintf(file, "  \"rope_scaling\": null,\n");
    }
    if (separator >= 0) {
        fprintf(file, "  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n", separator, separator);
    }
    fprintf(file, "  \"attention_bias\": false,\n  \"mlp_bias\": false,\n  \"attention_dropout\": 0.0,\n"
                  "  \"initializer_range\": 0.02,\n  \"use_cache\": true,\n  \"tie_word_embeddings\": %s\n}\n",
            m->tied ? "true" : "false");
}

// ---------------------------------------------------------------------------------------------------------------------
// options -> shape

static void model_config_check(const ModelConfig* m) {
    check_or(m->L > 0 && m->C > 0 && m->NH > 0 && m->NKV > 0 && m->F > 0 && m->V > 1 && m->HS > 0, EXIT_USAGE,
             "a model needs positive sizes: layers %d, channels %d, heads %d, kv heads %d, head size %d, ffn %d, "
             "vocabulary %d",
             m->L, m->C, m->NH, m->NKV, m->HS, m->F, m->V);
    check_or(m->L < 4096, EXIT_USAGE, "--layers %d is above the 4095 that random streams are numbered for", m->L);
    check_or(m->NH % m->NKV == 0, EXIT_USAGE, "--heads %d is not a multiple of --kv-heads %d", m->NH, m->NKV);
    check_or(m->HS % 2 == 0, EXIT_USAGE, "head size %d (channels %d / heads %d) is odd; rotary embedding needs pairs",
             m->HS, m->C, m->NH);
    check_or(m->rope_theta > 0 && m->rms_eps > 0, EXIT_USAGE, "--rope-theta %g and rms_norm_eps %g must be positive",
             m->rope_theta, m->rms_eps);
}

static const Preset* preset_find(const char* name) {
    for (int i = 0; i < PRESET_COUNT; i++) {
        if (!strcmp(PRESETS[i].name, name)) {
            return &PRESETS[i];
        }
    }
    return NULL;
}

[[noreturn]] static void die_unknown_model(const char* name) {
    const char* nearest = PRESETS[0].name;
    int distance = 1000;
    char names[512] = {0};
    for (int i = 0; i < PRESET_COUNT; i++) {
        int d = edit_distance(name, PRESETS[i].name);
        if (d < distance) {
            nearest = PRESETS[i].name, distance = d;
        }
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "", PRESETS[i].name);
    }
    die(EXIT_USAGE, "--model '%s' is neither a preset nor a folder with a config.json; did you mean %s? Presets: %s",
        name, nearest, names);
}

// a knob that the user left at auto takes the preset's value
static void knob_fill_int(Config* config, int id, int64_t value) {
    if (*knob_int(config, id) == AUTO_INT) {
        *knob_int(config, id) = value;
        config->origin[id] = FROM_PRESET;
    }
}

static void knob_fill_real(Config* config, int id, double value) {
    if (is_auto_real(*knob_real(config, id))) {
        *knob_real(config, id) = value;
        config->origin[id] = FROM_PRESET;
    }
}

static ModelConfig preset_model(const Preset* p) {
    ModelConfig m = {.name = {},
                     .L = p->L,
                     .C = p->C,
                     .NH = p->NH,
                     .NKV = p->NKV,
                     .HS = p->C / p->NH,
                     .F = p->F,
                     .V = p->V,
                     .tied = p->tied,
                     .max_positions = p->T,
                     .rope_theta = p->rope_theta,
                     .rms_eps = 1e-5,
                     .rope_factor = p->rope_factor,
                     .rope_low = 1.0,
                     .rope_high = 4.0,
                     .rope_original = 8192};
    snprintf(m.name, sizeof m.name, "%s", p->name);
    return m;
}

// The model that --model and the single-dimension options describe; fills every knob that the preset decides.
static ModelConfig model_config_resolve(Config* config) {
    ModelConfig m = {};
    const Preset* preset = preset_find(config->model);
    if (preset) {
        m = preset_model(preset);
        knob_fill_int(config, ID_seq_len, preset->T);
        knob_fill_int(config, ID_batch_tokens, preset->batch_tokens);
        knob_fill_real(config, ID_lr, preset->lr);
    } else {
        char* path = format_string("%s/config.json", config->model);
        if (!path_is_file(path)) {
            die_unknown_model(config->model);
        }
        m = model_config_read(path);
        const char* slash = strrchr(config->model, '/');
        snprintf(m.name, sizeof m.name, "%s", slash && slash[1] ? slash + 1 : config->model);
        free(path);
        knob_fill_int(config, ID_seq_len, min_int(m.max_positions, 2048));
        knob_fill_int(config, ID_batch_tokens, QUARTET_BATCH);
        knob_fill_real(config, ID_lr, 3e-4);
    }
    int reshaped = config->channels != AUTO_INT || config->heads != AUTO_INT;
    int reheaded = config->heads != AUTO_INT && config->kv_heads == AUTO_INT && m.NH == m.NKV;
    knob_fill_int(config, ID_layers, m.L);
    knob_fill_int(config, ID_channels, m.C);
    knob_fill_int(config, ID_heads, m.NH);
    knob_fill_int(config, ID_kv_heads, reheaded ? config->heads : m.NKV);
    knob_fill_int(config, ID_ffn, config->channels != m.C ? round_up(ceil_div(8 * config->channels, 3), 256) : m.F);
    knob_fill_int(config, ID_vocab_size, m.V);
    knob_fill_int(config, ID_tied, m.tied);
    knob_fill_real(config, ID_rope_theta, m.rope_theta);
    const int64_t most = 1 << 30;
    check_or(config->layers < most && config->channels < most && config->heads < most && config->kv_heads < most &&
                 config->ffn < most && config->vocab_size < most && config->seq_len < most && config->seq_len > 0,
             EXIT_USAGE, "a model dimension is out of range (1 to 2^30)");
    m.L = (int)config->layers, m.C = (int)config->channels, m.NH = (int)config->heads, m.NKV = (int)config->kv_heads;
    m.F = (int)config->ffn, m.V = (int)config->vocab_size, m.tied = config->tied != 0,
    m.rope_theta = config->rope_theta;
    check_or(m.NH > 0 && (!reshaped || m.C % m.NH == 0), EXIT_USAGE, "--channels %d is not a multiple of --heads %d",
             m.C, m.NH);
    m.HS = reshaped ? m.C / m.NH : m.HS;
    m.max_positions = max_int(m.max_positions, (int)config->seq_len);
    model_config_check(&m);
    return m;
}

// ---------------------------------------------------------------------------------------------------------------------
// the parameters

typedef enum { DIM_NONE, DIM_C, DIM_A, DIM_KV, DIM_F, DIM_V } Dim;  // A = NH * HS, KV = NKV * HS
typedef enum { INIT_ONE, INIT_NORMAL, INIT_SCALED } Init;           // 1 | N(0, 0.02) | N(0, 0.02 / sqrt(2L))

typedef enum {
    P_EMBED, P_NORM1, P_Q, P_K, P_V, P_O, P_NORM2, P_GATE, P_UP, P_DOWN, P_NORM, P_HEAD, P_COUNT,
    P_FIRST_OF_BLOCK = P_NORM1, P_LAST_OF_BLOCK = P_DOWN,
} ParamKind;

typedef struct {
    const char* name;  // Hugging Face; %d is the layer
    Dim rows, cols;    // (rows, cols), or a vector of rows where cols is DIM_NONE
    Init init;
    int decay, quantized;
} ParamSpec;

static const ParamSpec PARAM_SPECS[P_COUNT] = {
    {"model.embed_tokens.weight",                        DIM_V,  DIM_C,    INIT_NORMAL, 0, 0},
    {"model.layers.%d.input_layernorm.weight",           DIM_C,  DIM_NONE, INIT_ONE,    0, 0},
    {"model.layers.%d.self_attn.q_proj.weight",          DIM_A,  DIM_C,    INIT_NORMAL, 1, 1},
    {"model.layers.%d.self_attn.k_proj.weight",          DIM_KV, DIM_C,    INIT_NORMAL, 1, 1},
    {"model.layers.%d.self_attn.v_proj.weight",          DIM_KV, DIM_C,    INIT_NORMAL, 1, 1},
    {"model.layers.%d.self_attn.o_proj.weight",          DIM_C,  DIM_A,    INIT_SCALED, 1, 1},
    {"model.layers.%d.post_attention_layernorm.weight",  DIM_C,  DIM_NONE, INIT_ONE,    0, 0},
    {"model.layers.%d.mlp.gate_proj.weight",             DIM_F,  DIM_C,    INIT_NORMAL, 1, 1},
    {"model.layers.%d.mlp.up_proj.weight",               DIM_F,  DIM_C,    INIT_NORMAL, 1, 1},
    {"model.layers.%d.mlp.down_proj.weight",             DIM_C,  DIM_F,    INIT_SCALED, 1, 1},
    {"model.norm.weight",                                DIM_C,  DIM_NONE, INIT_ONE,    0, 0},
    {"lm_head.weight",                                   DIM_V,  DIM_C,    INIT_NORMAL, 0, 0},
};

typedef struct {
    char name[80];
    ParamKind kind;
    int layer;         // -1 outside the blocks
    int rows, cols;    // cols 1 for a vector
    int is_matrix;
    size_t offset, count;  // elements of the flat buffer
} Param;

typedef struct {
    Param* list;
    int count;
    size_t elements;     // of the flat buffer
    size_t block_first;  // element where block 0 begins
    size_t block_size;   // elements of one block
} ParamTable;

static int model_dim(const ModelConfig* m, Dim dim) {
    int sizes[] = {1, m->C, m->NH * m->HS, m->NKV * m->HS, m->F, m->V};
    return sizes[dim];
}

static void param_append(ParamTable* table, const ModelConfig* m, ParamKind kind, int layer) {
    const ParamSpec* spec = &PARAM_SPECS[kind];
    Param* p = &table->list[table->count++];
    snprintf(p->name, sizeof p->name, spec->name, layer);
    p->kind = kind;
    p->layer = layer;
    p->rows = model_dim(m, spec->rows);
    p->cols = model_dim(m, spec->cols);
    p->is_matrix = spec->cols != DIM_NONE;
    p->offset = table->elements;
    p->count = (size_t)p->rows * p->cols;
    table->elements += p->count;
}

static ParamTable param_table(const ModelConfig* m) {
    ParamTable table = {};
    int most = m->L * (P_LAST_OF_BLOCK - P_FIRST_OF_BLOCK + 1) + 3;
    table.list = (Param*)malloc_or_die(sizeof(Param) * (size_t)most, "the table of parameters");
    param_append(&table, m, P_EMBED, -1);
    table.block_first = table.elements;
    for (int layer = 0; layer < m->L; layer++) {
        for (int kind = P_FIRST_OF_BLOCK; kind <= P_LAST_OF_BLOCK; kind++) {
            param_append(&table, m, (ParamKind)kind, layer);
        }
        table.block_size = layer == 0 ? table.elements - table.block_first : table.block_size;
    }
    param_append(&table, m, P_NORM, -1);
    if (!m->tied) {
        param_append(&table, m, P_HEAD, -1);
    }
    return table;
}

static const Param* param_at(const ParamTable* table, ParamKind kind, int layer) {
    int per_block = P_LAST_OF_BLOCK - P_FIRST_OF_BLOCK + 1;
    int blocks = (table->count - 1) / per_block;
    int index = kind == P_EMBED ? 0 : kind <= P_LAST_OF_BLOCK ? 1 + layer * per_block + (kind - P_FIRST_OF_BLOCK)
                                                               : 1 + blocks * per_block + (kind - P_NORM);
    check(index < table->count && table->list[index].kind == kind, "internal: no parameter %d of layer %d", kind,
          layer);
    return &table->list[index];
}
