// llama.h: the whole model against dev/ref/golden/llama.safetensors, which PyTorch made (section llama, FP32 build):
// ten training steps, the gradients of the first, the logits of a tied model with Llama-3 rope scaling, its
// frequencies.
//
// Tolerances. Losses: 1e-4 relative, as the issue asks. The run of peak rate 1e-2 is chaotic: the reference in f64
// drifts from itself in f32 by 4e-7 at step 0, 5e-5 at step 4 and 2e-4 at the end (dev/ref/README.md), so there the
// first 6 steps count. The run of peak rate 3e-3 drifts by 1.6e-6 (loss), 6.9e-6 (gradient norm) and 2.4e-7 (norms of
// the final weights): two f32 programs may each be that far off, and with the factor 2 of slack that is 4 times those,
// which still tells beta2 .951 from .95.
#pragma once
#include "gradient.h"

#ifdef PRECISION_FP32
#define GOLDEN_LLAMA "dev/ref/golden/llama.safetensors"
#define LLAMA_STEPS 10

static double llama_number(const SafetensorsFile* file, const char* prefix, const char* name) {
    char full[96];
    snprintf(full, sizeof full, "%sconfig.%s", prefix, name);
    const SafetensorsEntry* entry = safetensors_find(file, full);
    check(entry && entry->count == 1, "no '%s' in '%s'", full, file->path);
    void* data = golden_read(file, full, entry->dtype, NULL, NULL);
    double number = entry->dtype == SAFETENSORS_I32 ? (double)*(int32_t*)data : (double)*(float*)data;
    free(data);
    return number;
}

static ModelConfig llama_config(const SafetensorsFile* file, const char* prefix, int scaled) {
    ModelConfig m = {};
    m.V = (int)llama_number(file, prefix, "vocab_size");
    m.C = (int)llama_number(file, prefix, "hidden_size");
    m.L = (int)llama_number(file, prefix, "num_hidden_layers");
    m.NH = (int)llama_number(file, prefix, "num_attention_heads");
    m.NKV = (int)llama_number(file, prefix, "num_key_value_heads");
    m.HS = (int)llama_number(file, prefix, "head_dim");
    m.F = (int)llama_number(file, prefix, "intermediate_size");
    m.tied = (int)llama_number(file, prefix, "tie_word_embeddings");
    m.max_positions = (int)llama_number(file, prefix, "T");
    m.rope_theta = llama_number(file, prefix, "rope_theta");
    m.rms_eps = llama_number(file, prefix, "rms_norm_eps");
    if (scaled) {
        m.rope_factor = llama_number(file, prefix, "factor");
        m.rope_low = llama_number(file, prefix, "low_freq_factor");
        m.rope_high = llama_number(file, prefix, "high_freq_factor");
        m.rope_original = (int)llama_number(file, prefix, "original_max_position_embeddings");
    }
    return m;
}

static Model llama_model(const SafetensorsFile* file, const char* config_prefix, const char* weight_prefix,
                         int scaled) {
    ModelConfig m = llama_config(file, config_prefix, scaled);
    Model model;
    model_prepare(&model, &CPU_OPS, &m, recipe_find("bf16"), MEMORY_EXACT, (int)llama_number(file, config_prefix, "B"),
                  m.max_positions);
    model_allocate(&model);
    for (int p = 0; p < model.table.count; p++) {
        const Param* param = &model.table.list[p];
        char name[128];
        int rows, cols;
        snprintf(name, sizeof name, "%s%s", weight_prefix, param->name);
        float* values = (float*)golden_read(file, name, SAFETENSORS_F32, &rows, &cols);
        check(rows == param->rows && cols == param->cols, "the shape of '%s'", name);
        memcpy(model.params + param->offset, values, param->count * sizeof(float));
        memcpy(model.master + param->offset, values, param->count * sizeof(float));
        free(values);
    }
    return model;
}

// ---------------------------------------------------------------------------------------------------------------------
// training

typedef struct {
    double losses[LLAMA_STEPS], norms[LLAMA_STEPS], lrs[LLAMA_STEPS];
    double* final_norms;  // one a parameter
} LlamaRun;

// roundings on the way to a gradient, there and back, relative to the tensor's root mean square
static void llama_expect_gradients(const SafetensorsFile* file, const Model* model) {
    // a backward GEMM or loop for each of two operands
    double roundings = 3.0 * llama_roundings(&model->config, model->T);
    for (int p = 0; p < model->table.count; p++) {
        const Param* param = &model->table.list[p];
        char name[128];
        double squares = 0.0;
        snprintf(name, sizeof name, "grad.%s", param->name);
        float* want = (float*)golden_read(file, name, SAFETENSORS_F32, NULL, NULL);
        for (size_t i = 0; i < param->count; i++) {
            squares += (double)want[i] * (double)want[i] / (double)param->count;
        }
        Near near = near_f32((float*)model->grads.data + param->offset, param->count);
        for (size_t i = 0; i < param->count; i++) {
            near_want(&near, i, (double)want[i], sqrt(squares), roundings);
        }
        near_expect(&near, "%s", name);
        free(want);
    }
}

static LlamaRun llama_train(const SafetensorsFile* file, double peak, double beta2, double decay, int check_gradients) {
    Model model = llama_model(file, "", "init.", 0);
    int B = model.B, T = model.T, rows;
    int32_t *tokens = (int32_t*)golden_read(file, "tokens", SAFETENSORS_I32, &rows, NULL), inputs[64], targets[64];
    check(rows == LLAMA_STEPS && B * T <= 64, "the shape of the golden tokens");
    Config config;
    memset(&config, 0, sizeof config);
    config.lr = peak, config.min_lr_ratio = 0.1, config.warmup_steps = 3, config.schedule = "cosine";
    config.steps = LLAMA_STEPS + 1;  // the reference's cosine would reach its floor at step 10, which it does not run
    config.beta1 = 0.9, config.beta2 = beta2, config.eps = 1e-8, config.weight_decay = decay, config.grad_clip = 1.0;
    Comm comm = COMM_SINGLE;
    LlamaRun run = {{}, {}, {}, test_zeros((size_t)model.table.count)};
    for (int s = 0; s < LLAMA_STEPS; s++) {
        for (int i = 0; i < B * T; i++) {
            const int32_t* row = tokens + (size_t)(s * B + i / T) * (T + 1) + i % T;
            inputs[i] = row[0];
            targets[i] = row[1];
        }
        model_zero_gradients(&model);
        run.lrs[s] = schedule_lr(&config, s);
        model_begin_step(&model, run.lrs[s], config.beta1, config.beta2, s + 1);
        model_forward(&model, inputs, targets, 1.0f / (float)(B * T), 1);
        model_backward(&model);
        model_finish_gradients(&model);
        if (s == 0 && check_gradients) {
            llama_expect_gradients(file, &model);
        }
        optimizer_step(&model, &comm, &config);
        StepControl result = model_read_control(&model);
        expect(!result.skip, "step %d was skipped", s);
        run.losses[s] = result.loss_sum / (B * T);
        run.norms[s] = sqrt(result.grad_squares);
    }
    int rounded = 1;
    for (int p = 0; p < model.table.count; p++) {
        const Param* param = &model.table.list[p];
        CPU_OPS.sum_squares(&run.final_norms[p], real_f32(model.master + param->offset), param->count);
        run.final_norms[p] = sqrt(run.final_norms[p]);
        rounded &= !memcmp(model.master + param->offset, model.params + param->offset, param->count * sizeof(float));
    }
    expect(rounded, "parameters and master weights differ");
    model_free(&model);
    free(tokens);
    return run;
}

// elements of got further than tolerance (relative) from the golden tensor
static int llama_differing(const SafetensorsFile* file, const char* prefix, const char* name, const double* got,
                           int count, double tolerance) {
    char full[160];
    int differing = 0;
    snprintf(full, sizeof full, "%s%s", prefix, name);
    float* want = (float*)golden_read(file, full, SAFETENSORS_F32, NULL, NULL);
    for (int i = 0; i < count; i++) {
        differing += !(fabs(got[i] / (double)want[i] - 1.0) <= tolerance);
    }
    free(want);
    return differing;
}

static int llama_differing_norms(const SafetensorsFile* file, const char* prefix, const LlamaRun* run,
                                 double tolerance) {
    ModelConfig m = llama_config(file, "", 0);
    ParamTable table = param_table(&m);
    int differing = 0;
    for (int p = 0; p < table.count; p++) {
        char name[128];
        snprintf(name, sizeof name, "final_norm.%s", table.list[p].name);
        differing += llama_differing(file, prefix, name, &run->final_norms[p], 1, tolerance);
    }
    free(table.list);
    return differing;
}

static void test_llama_training(const SafetensorsFile* file) {
    LlamaRun hot = llama_train(file, 1e-2, 0.95, 0.1, 1), run = llama_train(file, 3e-3, 0.95, 0.1, 0);
    expect(llama_differing(file, "", "losses", hot.losses, 6, 1e-4) == 0,
           "losses of the run of peak rate 1e-2, first 6 steps");
    expect(llama_differing(file, "", "grad_norms", hot.norms, 2, 1e-4) == 0,
           "gradient norms of that run, first 2 steps");
    expect(llama_differing(file, "", "lrs", hot.lrs, LLAMA_STEPS, 2.0 * F32_ROUNDING) == 0, "learning rates");
    expect(llama_differing(file, "gentle.", "losses", run.losses, LLAMA_STEPS, 1e-4) == 0, "losses, 1e-4");
    expect(llama_differing(file, "gentle.", "losses", run.losses, LLAMA_STEPS, 4 * 1.6e-6) == 0,
           "losses, to the reference's own drift");
    expect(llama_differing(file, "gentle.", "grad_norms", run.norms, LLAMA_STEPS, 4 * 6.9e-6) == 0, "gradient norms");
    expect(llama_differing(file, "gentle.", "lrs", run.lrs, LLAMA_STEPS, 2.0 * F32_ROUNDING) == 0, "learning rates");
    expect(llama_differing_norms(file, "gentle.", &run, 4 * 2.4e-7) == 0, "norms of the weights after ten steps");
    expect(llama_differing(file, "", "losses", run.losses, 6, 1e-4) > 0,
           "planted: the losses of the other run are not told apart");
    LlamaRun other = llama_train(file, 3e-3, 0.951, 0.1, 0), flat = llama_train(file, 3e-3, 0.95, 0.0, 0);
    expect(llama_differing_norms(file, "gentle.", &other, 4 * 2.4e-7) > 0,
           "planted: beta2 .951 is not seen in the weights");
    expect(llama_differing(file, "gentle.", "losses", other.losses, LLAMA_STEPS, 4 * 1.6e-6) > 0,
           "planted: nor in the losses");
    expect(llama_differing(file, "gentle.", "losses", flat.losses, LLAMA_STEPS, 1e-4) > 0,
           "planted: no decay is not seen");
    test_free(hot.final_norms, run.final_norms, other.final_norms, flat.final_norms);
}

// ---------------------------------------------------------------------------------------------------------------------
// the tied model with rope scaling

// rope_table_fill against published frequencies: the angles of position 1 and of the last. The golden file has f32
// frequencies: one rounding, times the position; cos and sin are stored in f32, one more.
static void llama_expect_frequencies(const SafetensorsFile* file, const char* name, ModelConfig m) {
    float* frequency = (float*)golden_read(file, name, SAFETENSORS_F32, NULL, NULL);
    float* table = (float*)malloc_or_die((size_t)m.max_positions * m.HS * sizeof(float), "test");
    rope_table_fill(table, &m);
    const int positions[] = {0, 1, m.max_positions - 1};
    for (int k = 0; k < 3; k++) {
        int t = positions[k];
        Near near = near_f32(table + (size_t)t * m.HS, (size_t)m.HS);
        for (int j = 0; j < m.HS / 2; j++) {
            double angle = t * (double)frequency[j];
            near_want(&near, (size_t)2 * j, cos(angle), 1.0, angle + 1.0);
            near_want(&near, (size_t)2 * j + 1, sin(angle), 1.0, angle + 1.0);
        }
        near_expect(&near, "%s, position %d", name, t);
    }
    m.rope_factor *= 1.01;  // planted
    rope_table_fill(table, &m);
    Near near = near_f32(table + (size_t)(m.max_positions - 1) * m.HS, (size_t)m.HS);
    for (int j = 0; j < m.HS / 2; j++) {
        double angle = (m.max_positions - 1) * (double)frequency[j];
        near_want(&near, (size_t)2 * j, cos(angle), 1.0, angle + 1.0);
        near_want(&near, (size_t)2 * j + 1, sin(angle), 1.0, angle + 1.0);
    }
    near_expect_far(&near, "rope scaling with a factor 1 % larger");
    test_free(frequency, table);
}

static void test_llama_rope(const SafetensorsFile* file) {
    int32_t *tokens = (int32_t*)golden_read(file, "rope.tokens", SAFETENSORS_I32, NULL, NULL), targets[64] = {0};
    float* want = (float*)golden_read(file, "rope.logits", SAFETENSORS_F32, NULL, NULL);
    Model model = llama_model(file, "rope.", "rope.", 1);
    ModelConfig m = model.config;
    int rows = model.B * model.T;
    check(rows <= 64 && model.classifier_rows == rows, "the golden model is larger than expected");
    double squares = 0.0, roundings = llama_roundings(&m, model.T);
    for (int i = 0; i < rows * m.V; i++) {
        squares += (double)want[i] * (double)want[i] / (rows * m.V);
    }
    for (int planted = 0; planted < 2; planted++) {  // second: without the scaling
        ModelConfig plain = m;
        plain.rope_factor = planted ? 0.0 : m.rope_factor;
        rope_table_fill(model.rope_table, &plain);
        model_forward(&model, tokens, targets, 1.0f, 0);  // leaves the logits
        Near near = near_f32(model.logits, (size_t)rows * m.V);
        for (size_t i = 0; i < near.n; i++) {
            near_want(&near, i, (double)want[i], sqrt(squares), roundings);
        }
        if (planted) {
            near_expect_far(&near, "logits without rope scaling");
        } else {
            near_expect(&near, "logits of the tied model with rope scaling");
        }
    }
    llama_expect_frequencies(file, "rope.inv_freq", m);
    ModelConfig published = m;
    published.rope_low = 1, published.rope_high = 4, published.rope_original = 8192, published.max_positions = 1000;
    published.HS = 128, published.rope_factor = 8;
    llama_expect_frequencies(file, "rope.inv_freq.llama3.1-8b", published);
    published.HS = 64, published.rope_factor = 32;
    llama_expect_frequencies(file, "rope.inv_freq.llama3.2-1b", published);
    model_free(&model);
    test_free(tokens, want);
}

static void test_llama_golden(void) {
    SafetensorsFile file = golden_open(GOLDEN_LLAMA);
    test_llama_training(&file);
    test_llama_rope(&file);
    safetensors_close(&file);
}
#else
static void test_llama_golden(void) { printf("skip llama: the golden run needs the PRECISION=FP32 build\n"); }
#endif
