// run.h: options, schedule, checkpoints, generation and memory plan, in one process. Shell tests drive the same through
// the binary.
#pragma once

static Config test_config(int argc, const char** argv) {
    Config config;
    config_parse(&config, argc, (char**)argv);
    return config;
}

static void test_parse(void* argument) {
    const char* argv[] = {"train_llama", (const char*)argument};
    Config config = test_config(2, argv);
    model_config_resolve(&config);
}

static void test_options(void) {
    const char* values[] = {"1000", "300M", "1e9", "4k", "2.5G", "262144", "1B", "0"};
    int64_t want[] = {1000, 300000000, 1000000000, 4000, 2500000000, 262144, 1000000000, 0}, value = -1;
    for (int i = 0; i < 8; i++) {
        expect(parse_count(values[i], &value) && value == want[i], "'%s' parsed as %lld", values[i], (long long)value);
    }
    const char* bad[] = {"", "x", "1.5", "3x", "1e", "0x10", "nan", "inf", "1e30", "12 3", "1e-3"};
    for (int i = 0; i < 11; i++) {
        expect(!parse_count(bad[i], &value), "'%s' was taken as %lld", bad[i], (long long)value);
    }
    expect_exit(EXIT_USAGE, "did you mean --batch-size?", test_parse, (void*)"--batchsize=3");
    expect_exit(EXIT_USAGE, "--lr is 'fast'", test_parse, (void*)"--lr=fast");
    expect_exit(EXIT_USAGE, "--layers is -3, but cannot be negative", test_parse, (void*)"--layers=-3");
    expect_exit(EXIT_USAGE, "must be one of bf16|fp8|quartet", test_parse, (void*)"--recipe=quarte");
    expect_exit(EXIT_USAGE, "needs a value", test_parse, (void*)"--seed");
    expect_exit(EXIT_USAGE, "is not an option", test_parse, (void*)"tiny");
    expect_exit(EXIT_USAGE, "did you mean 200m?", test_parse, (void*)"--model=200mm");
    expect_exit(EXIT_USAGE, "not a multiple of --heads", test_parse, (void*)"--heads=7");

    // command line over file over preset over default, both spellings
    char* folder = make_temp_folder();
    char* path = format_string("%s/options", folder);
    FILE* file = fopen_or_die(path, "w");
    fprintf(file, "# a comment\nlr = 0.5   # another\n  seq_len = 64\nbatch-tokens=640\nprompt = a#b c\n");
    fclose(file);
    const char* argv[] = {"train_llama", "--config", path, "--model", "30m", "--lr=0.25"};
    Config config = test_config(6, argv);
    ModelConfig model = model_config_resolve(&config);
    expect(config.lr == 0.25 && config.origin[ID_lr] == FROM_COMMAND_LINE, "lr %g", config.lr);
    expect(config.seq_len == 64 && config.batch_tokens == 640 && config.origin[ID_seq_len] == FROM_FILE, "seq_len %lld",
           (long long)config.seq_len);
    expect(!strcmp(config.prompt, "a#b c"), "prompt '%s'", config.prompt);
    expect(model.C == 640 && config.channels == 640 && config.origin[ID_channels] == FROM_PRESET, "channels %d",
           model.C);
    expect(config.beta2 == 0.95 && config.origin[ID_beta2] == FROM_DEFAULT, "beta2 %g", config.beta2);
    free(config.file_text);
    free(path);
    remove_folder(folder);

    // the parameter counts of the Llamas that presets are named after, from their published sizes
    struct { const char* name; size_t elements;
    } known[] = {{"tinyllama-1.1b", 1100048384},
                 {"llama2-7b", 6738415616},
                 {"llama3.2-1b", 1235814400},
                 {"llama3-8b", 8030261248}};
    for (int i = 0; i < 4; i++) {
        ModelConfig m = preset_model(preset_find(known[i].name));
        ParamTable table = param_table(&m);
        expect(table.elements == known[i].elements, "%s has %zu parameters instead of %zu", known[i].name,
               table.elements, known[i].elements);
        free(table.list);
    }
    for (int i = 0; i < PRESET_COUNT; i++) {
        const Preset* p = &PRESETS[i];
        expect(p->C % p->NH == 0 && p->NH % p->NKV == 0 && p->batch_tokens % p->T == 0 && p->F % 32 == 0, "preset %s",
               p->name);
    }
}

static void test_schedule(void) {
    const char* names[] = {"cosine", "linear", "constant", "wsd"};
    for (int i = 0; i < 4; i++) {
        const char* argv[] = {"train_llama", "--lr=2", "--steps=100", "--warmup-steps=10", "--schedule", names[i]};
        Config config = test_config(6, argv);
        expect(fabs(schedule_lr(&config, 0) - 0.2) < 1e-12 && fabs(schedule_lr(&config, 9) - 2.0) < 1e-12,
               "%s: warm-up", names[i]);
        double last = schedule_lr(&config, 99), want = i == 2 ? 2.0 : 0.2;
        expect(fabs(last - want) < 1e-12, "%s ends at %g instead of %g", names[i], last, want);
        int falls = 1;
        for (int s = 10; s < 100; s++) {
            falls &= schedule_lr(&config, s) <= schedule_lr(&config, s - 1) + 1e-12;
        }
        expect(falls, "%s rises after warm-up", names[i]);
    }
    const char* argv[] = {"train_llama", "--lr=2", "--steps=1", "--warmup-steps=0"};
    Config config = test_config(4, argv);
    expect(isfinite(schedule_lr(&config, 0)), "one step");
}

// a model of a recipe, initialized, with one step's worth of optimizer state
static void test_make_model(Model* model, const char* recipe, int tied) {
    ModelConfig m = {.name = "test",
                     .L = 2,
                     .C = 64,
                     .NH = 4,
                     .NKV = 2,
                     .HS = 16,
                     .F = 96,
                     .V = 96,
                     .tied = tied,
                     .max_positions = 128,
                     .rope_theta = 1e4,
                     .rms_eps = 1e-5,
                     .rope_factor = 0,
                     .rope_low = 0,
                     .rope_high = 0,
                     .rope_original = 0};
    model_prepare(model, cpu_backend(), &m, recipe_find(recipe), MEMORY_EXACT, 2, 32);
    model->linear.option_rounding = ROUND_NEAREST;
    model_allocate(model);
    model_init_weights(model, 5);
    for (size_t i = 0; i < model->table.elements; i++) {
        ((float*)model->m.data)[i] = (float)i * 1e-6f;
        ((float*)model->v.data)[i] = (float)i * 1e-7f;
    }
}

static void test_checkpoint_round_trip(const char* out, int tied) {
    Model a, b;
    test_make_model(&a, "quartet", tied);
    test_make_model(&b, "quartet", tied);
    Config config = test_config(0, NULL);
    RunState state = {.step = 7, .tokens = 777, .data_fingerprint = 0xfeedbeefull << 32, .run_id = "abc"};
    char error[1024];
    expect(checkpoint_save(out, &a, &config, &state, NULL, 3, error, sizeof error) == 0, "%s", error);
    size_t n = a.table.elements;
    memset(b.master, 0, n * sizeof(float));
    memset(b.m.data, 0, n * sizeof(float));
    memset(b.v.data, 0, n * sizeof(float));
    memset(b.params, 0, n * sizeof(floatX));
    Json* saved = NULL;
    int damaged;
    char* folder = checkpoint_find(&COMM_SINGLE, out, &saved, &damaged);
    if (expect(folder && damaged == 0, "no checkpoint found in %s", out)) {
        RunState loaded = checkpoint_load(&COMM_SINGLE, &b, folder, saved);
        expect(loaded.step == 7 && loaded.tokens == 777 && loaded.data_fingerprint == state.data_fingerprint &&
               !strcmp(loaded.run_id, "abc"), "state differs");
        expect(!memcmp(a.master, b.master, n * sizeof(float)) && !memcmp(a.m.data, b.m.data, n * sizeof(float)) &&
                   !memcmp(a.v.data, b.v.data, n * sizeof(float)) && !memcmp(a.params, b.params, n * sizeof(floatX)),
               "loaded state is not bit-equal");
        b.master[n / 2] += 1.0f;  // the comparison sees an error
        expect(memcmp(a.master, b.master, n * sizeof(float)) != 0, "planted error not seen");
    }
    free(folder);
    json_free(saved);
    model_free(&a);
    model_free(&b);
}

// flip one byte at a time in every file: each is found, the older checkpoint is taken
static void test_checkpoint_damage(const char* out) {
    Model model;
    test_make_model(&model, "bf16", 0);
    Config config = test_config(0, NULL);
    char error[1024];
    RunState state = {.step = 1, .tokens = 1, .data_fingerprint = 0, .run_id = "x"};
    expect(checkpoint_save(out, &model, &config, &state, NULL, -1, error, sizeof error) == 0, "%s", error);
    state.step = 2;
    expect(checkpoint_save(out, &model, &config, &state, NULL, -1, error, sizeof error) == 0, "%s", error);
    const char* names[] = {"model.safetensors", "config.json", "optim-00000-of-00001.safetensors", "state.json"};
    char* folder = checkpoint_path(out, 2, "");
    for (int i = 0; i < 4; i++) {
        char* path = format_string("%s/%s", folder, names[i]);
        size_t bytes;
        char* text = read_file_or_die(path, &bytes);
        size_t at[] = {0, bytes / 3, bytes / 2, bytes - 3};
        for (int j = 0; j < 5; j++) {
            FILE* file = fopen_or_die(path, "wb");
            if (j < 4) {
                text[at[j]] ^= 1;
                fwrite(text, 1, bytes, file);
                text[at[j]] ^= 1;
            } else {
                fwrite(text, 1, bytes - 1, file);  // one byte short
            }
            fclose(file);
            Json* saved = checkpoint_verify(&COMM_SINGLE, folder, error, sizeof error);
            expect(!saved && error[0], "%s: change %d was not found", names[i], j);
            json_free(saved);
        }
        FILE* file = fopen_or_die(path, "wb");
        fwrite(text, 1, bytes, file);
        fclose(file);
        Json* saved = checkpoint_verify(&COMM_SINGLE, folder, error, sizeof error);
        expect(saved != NULL, "restored %s: %s", names[i], error);
        json_free(saved);
        free(text);
        free(path);
    }
    free(folder);
    model_free(&model);
}

static void test_checkpoint_names(void) {
    expect(checkpoint_name_step("step_00001000") == 1000 && checkpoint_name_step("step_123456789") == 123456789,
           "names");
    const char* others[] = {"step_00001000.tmp", "step_1000", "step_0000100x",
                            "xstep_00001000",    "step_",     "step_00001000.old.tmp"};
    for (int i = 0; i < 6; i++) {
        expect(checkpoint_name_step(others[i]) == -1, "%s was taken for a checkpoint", others[i]);
    }
}

static void test_checkpoint(void) {
    test_checkpoint_names();
    for (int i = 0; i < 3; i++) {
        char* folder = make_temp_folder();
        if (i < 2) {
            test_checkpoint_round_trip(folder, i);
        } else {
            test_checkpoint_damage(folder);
        }
        remove_folder(folder);
    }
}

// Decoding with the cache gives the logits of the whole forward pass: one row at a time, and in chunks beyond
// GENERATE_ROWS.
static void test_generate_recipe(const char* recipe) {
    Model model;
    test_make_model(&model, recipe, 0);
    int T = model.T, V = model.config.V;
    int32_t tokens[64];
    int ids[64];
    for (int i = 0; i < 2 * T; i++) {
        tokens[i] = ids[i] = (int)(philox(9, (uint64_t)i, 0).w[0] % (uint32_t)V);
    }
    model_forward(&model, tokens, tokens, 0.0f, 0);
    QTensor x = qtensor_view(model.final_norm, T, model.config.C, 0),
            head = qtensor_view(model_weight(&model, P_HEAD, -1), V, model.config.C, 0);
    floatX* all = (floatX*)malloc_or_die(sizeof(floatX) * (size_t)T * V, "logits");
    float *logits = (float*)malloc_or_die(sizeof(float) * (size_t)V, "logits");
    GemmArgs gemm = {.out = real_floatX(all), .accumulate = 0, .a = &x, .b = &head, .alpha = 1.0f};
    model.ops->gemm(&gemm);
    Generator g = generator_open(&model, 64);
    double error = 0.0, size = 0.0, planted = 0.0;
    for (int t = 0; t < T; t++) {  // the first half of row 0 in one go, then token by token
        int rows = t == 0 ? T / 2 : 1;
        generator_forward(&model, &g, logits, ids + t, rows, t);
        t += rows - 1;
        for (int v = 0; v < V; v++) {
            double want = (double)floatX_to_f32(all[(size_t)t * V + v]), got = (double)logits[v];
            double other = (double)floatX_to_f32(all[(size_t)(t / 2) * V + v]);
            error += (got - want) * (got - want);
            planted += (got - other) * (got - other);
            size += want * want;
        }
    }
    // Attention sums in another order. bf16 recipe: about 16 roundings on the way, factor 2. quartet: a last bit may
    // move a code by a step, a quarter of its value at most, so the bound is a tenth of that, which a wrong position or
    // cache row misses by far.
    double allowed = strcmp(recipe, "bf16") ? 0.025 : 2 * 16 * (double)FLOATX_EPSILON;
    expect(sqrt(error / size) <= allowed, "%s: cached logits differ by %g, allowed %g", recipe, sqrt(error / size),
           allowed);
    expect(sqrt(planted / size) > allowed, "%s: the logits of another position were not told apart: %g", recipe,
           sqrt(planted / size));
    generator_close(&model, &g);
    free(all);
    free(logits);
    model_free(&model);
}

static void test_sampling(void) {
    float logits[4] = {0.0f, logf(2.0f), logf(4.0f), logf(1.0f)};
    int counts[4] = {0};
    for (int i = 0; i < 80000; i++) {
        counts[sample_logits(logits, 4, 1.0, ((float)i + 0.5f) / 80000.0f)]++;
    }
    expect(abs(counts[0] - 10000) < 20 && abs(counts[1] - 20000) < 20 && abs(counts[2] - 40000) < 20 &&
               abs(counts[3] - 10000) < 20,
           "draws %d %d %d %d of 1:2:4:1", counts[0], counts[1], counts[2], counts[3]);
    expect(sample_logits(logits, 4, 0.0, 0.99f) == 2, "temperature 0 takes the largest");
    expect(sample_logits(logits, 2, 1.0, 0.999999f) == 1, "the vocabulary limits the draw");
}

static void test_generate(void) {
    test_sampling();
    test_generate_recipe("bf16");
    test_generate_recipe("quartet");
    Model model;
    test_make_model(&model, "quartet", 1);
    int a[128] = {1, 2, 3}, b[128] = {1, 2, 3};
    int n = generate(&model, a, 3, 100, 90, 1.0, 7, 1), again = generate(&model, b, 3, 100, 90, 1.0, 7, 1);
    int within = 1;
    for (int i = 0; i < n; i++) {
        within &= a[i] >= 0 && a[i] < 90;
    }
    expect(n == 100 && again == n && !memcmp(a, b, sizeof a) && within, "generation is a function of the seed");
    b[0] = 9;
    generate(&model, b, 3, 100, 90, 1.0, 8, 1);
    expect(memcmp(a, b, sizeof a) != 0, "another seed gives another text");
    model_free(&model);
}
