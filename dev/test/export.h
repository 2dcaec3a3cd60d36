// export.h: `./test_llama export DIR` saves a small model with unusual shapes (grouped queries, Llama-3 rope scaling,
// own head size) as a checkpoint, and the logits of our forward pass beside it, for dev/ref/hf_check.py to compare with
// transformers.
#pragma once

static void export_logits(Model* model, const int32_t* tokens, int B, int T, const char* path) {
    const ModelConfig* m = &model->config;
    int BT = B * T;
    model_forward(model, tokens, tokens, 0.0f, 0);  // targets do not matter
    floatX* raw = (floatX*)malloc_or_die(sizeof(floatX) * (size_t)BT * m->V, "logits");
    float* logits = (float*)malloc_or_die(sizeof(float) * (size_t)BT * m->V, "logits");
    QTensor x = qtensor_view(model->final_norm, BT, m->C, 0);
    QTensor head = qtensor_view(model_weight(model, m->tied ? P_EMBED : P_HEAD, -1), m->V, m->C, 0);
    GemmArgs gemm = {.out = real_floatX(raw), .accumulate = 0, .a = &x, .b = &head, .alpha = 1.0f};
    model->ops->gemm(&gemm);
    for (size_t i = 0; i < (size_t)BT * m->V; i++) {
        logits[i] = floatX_to_f32(raw[i]);
    }
    SafetensorsWriter file = {};
    int64_t token_shape[] = {B, T}, logits_shape[] = {B, T, m->V}, bytes;
    uint64_t checksum;
    safetensors_declare(&file, "tokens", SAFETENSORS_I32, token_shape, 2);
    safetensors_declare(&file, "logits", SAFETENSORS_F32, logits_shape, 3);
    safetensors_write_begin(&file, path);
    safetensors_write(&file, tokens, sizeof(int32_t) * (size_t)BT);
    safetensors_write(&file, logits, sizeof(float) * (size_t)BT * m->V);
    check(safetensors_write_end(&file, &bytes, &checksum) == 0, "%s", file.error);
    free(raw);
    free(logits);
}

static int export_checkpoint(const char* out, int scaled_rope) {
    ModelConfig m = {.name = "export",
                     .L = 3,
                     .C = 96,
                     .NH = 6,
                     .NKV = 2,
                     .HS = 32,
                     .F = 160,
                     .V = 300,
                     .tied = scaled_rope,
                     .max_positions = 128,
                     .rope_theta = scaled_rope ? 5e5 : 1e4,
                     .rms_eps = 1e-5,
                     .rope_factor = scaled_rope ? 8.0 : 0.0,
                     .rope_low = 1.0,
                     .rope_high = 4.0,
                     .rope_original = 32};
    Model model;
    model_prepare(&model, cpu_backend(), &m, recipe_find("bf16"), MEMORY_EXACT, 2, 96);
    model_allocate(&model);
    model_init_weights(&model, 42);
    for (size_t i = 0; i < model.table.elements;
         i++) {  // larger weights and norms that are not 1, so that an error shows
        model.master[i] = model.master[i] * 4.0f + 0.02f * (float)rand_normal(43, i, 0);
        model.params[i] = f32_to_floatX(model.master[i]);
    }
    int32_t tokens[2 * 96];
    for (int i = 0; i < 2 * 96; i++) {
        tokens[i] = (int32_t)(philox(44, (uint64_t)i, 0).w[0] % (uint32_t)m.V);
    }
    make_folder_or_die(out);
    Config config;
    config_parse(&config, 0, NULL);
    RunState state = {.step = 1, .tokens = 192, .data_fingerprint = 0, .run_id = "export"};
    char error[512];
    check(checkpoint_save(out, &model, &config, &state, NULL, -1, error, sizeof error) == 0, "%s", error);
    char* path = format_string("%s/step_00000001/logits.safetensors", out);
    export_logits(&model, tokens, 2, 96, path);
    printf("wrote %s/step_00000001\n", out);
    free(path);
    model_free(&model);
    return 0;
}
