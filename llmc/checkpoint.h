// checkpoint.h: commit, verify, fall back.
//
//   OUT/step_00001000/  model.safetensors, config.json (tokenizer.json)   a Hugging Face Llama folder as it stands
//                       optim-00000-of-00001.safetensors  f32 master weights (where the run keeps them), m, v, each one
//                                                         range of the flat buffer
//                       state.json                        run, step, options, data, size and XXH64 of each file
// Written into step_00001000.tmp: every file is fsynced, then the folder, then it is renamed, then OUT is fsynced. So a
// folder without .tmp is whole, whenever the machine stopped. Loading still verifies sizes and checksums (state.json
// guards itself by a checksum of its own text): a damaged checkpoint is named and the next older one is taken. A
// committed step is never overwritten. All else is a function of the step: data position, learning rate, random
// numbers.
#pragma once
#include "config.h"
#include "model.h"
#include "safetensors.h"
#include "tokenizer.h"

#define CHECKPOINT_VERSION 1
#define CHECKPOINT_CHUNK ((size_t)4 << 20)  // elements copied at a time

typedef struct {
    int64_t step, tokens;       // finished steps, tokens they saw
    uint64_t data_fingerprint;
    char run_id[32];
} RunState;

typedef struct { char name[64]; int64_t bytes; uint64_t checksum; } CheckpointFile;

typedef struct {
    char* folder;               // where it is being written
    CheckpointFile files[8];
    int file_count;
    char error[512];            // the first failure; empty while there is none
} CheckpointWriter;

// ---------------------------------------------------------------------------------------------------------------------
// folders

// newest first
static int compare_steps(const void* a, const void* b) {
    int64_t x = *(const int64_t*)a, y = *(const int64_t*)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// the step that a folder name commits, or -1
static int64_t checkpoint_name_step(const char* name) {
    int64_t step = 0;
    if (!starts_with(name, "step_")) {
        return -1;
    }
    const char* digits = name + 5;
    size_t length = strspn(digits, "0123456789");
    if (length < 8 || length > 18 || digits[length]) {
        return -1;
    }
    for (const char* at = digits; *at; at++) {
        step = step * 10 + (*at - '0');
    }
    return step;
}

// steps of the committed checkpoints in out, newest first; the caller frees the list
static int64_t* checkpoint_list(const char* out, int* count) {
    int64_t* steps = NULL;
    *count = 0;
    DIR* folder = opendir(out);
    if (!folder) {
        return NULL;
    }
    for (struct dirent* entry; (entry = readdir(folder)) != NULL;) {
        int64_t step = checkpoint_name_step(entry->d_name);
        if (step >= 0) {
            steps = (int64_t*)realloc(steps, sizeof(int64_t) * (size_t)(*count + 1));
            check_or(steps, EXIT_NO_MEMORY, "out of memory listing checkpoints");
            steps[(*count)++] = step;
        }
    }
    closedir(folder);
    if (*count) {
        qsort(steps, (size_t)*count, sizeof(int64_t), compare_steps);
    }
    return steps;
}

static char* checkpoint_path(const char* out, int64_t step, const char* suffix) {
    return format_string("%s/step_%08lld%s", out, (long long)step, suffix);
}

// remove a flat folder; a failure leaves it, it is only garbage
static void remove_flat_folder(const char* path) {
    DIR* folder = opendir(path);
    if (!folder) {
        return;
    }
    for (struct dirent* entry; (entry = readdir(folder)) != NULL;) {
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) {
            char* file = format_string("%s/%s", path, entry->d_name);
            unlink(file);
            free(file);
        }
    }
    closedir(folder);
    rmdir(path);
}

// what an interrupted save or removal left behind. Only the owner of the folder's lock may call it.
static void checkpoint_clean(const char* out) {
    DIR* folder = opendir(out);
    if (!folder) {
        return;
    }
    for (struct dirent* entry; (entry = readdir(folder)) != NULL;) {
        size_t length = strlen(entry->d_name);
        if (starts_with(entry->d_name, "step_") && length > 4 && !strcmp(entry->d_name + length - 4, ".tmp")) {
            char* path = format_string("%s/%s", out, entry->d_name);
            remove_flat_folder(path);
            free(path);
        }
    }
    closedir(folder);
}

// keep the newest `keep` (at least two). A checkpoint to go is renamed first, so that it is never seen half removed.
static void checkpoint_prune(const char* out, int64_t keep) {
    int count;
    int64_t* steps = checkpoint_list(out, &count);
    for (int i = (int)max_i64(2, keep); i < count; i++) {
        char *path = checkpoint_path(out, steps[i], ""), *trash = checkpoint_path(out, steps[i], ".old.tmp");
        if (rename(path, trash) == 0) {
            remove_flat_folder(trash);
        }
        free(path);
        free(trash);
    }
    free(steps);
}

// ---------------------------------------------------------------------------------------------------------------------
// writing

static void writer_fail(CheckpointWriter* writer, const char* format, ...) PRINTF_LIKE(2, 3);
static void writer_fail(CheckpointWriter* writer, const char* format, ...) {
    if (writer->error[0]) {
        return;
    }
    va_list args;
    va_start(args, format);
    vsnprintf(writer->error, sizeof writer->error, format, args);
    va_end(args);
}

static void writer_add(CheckpointWriter* writer, const char* name, int64_t bytes, uint64_t checksum) {
    check(writer->file_count < 8, "internal: too many checkpoint files");
    CheckpointFile* file = &writer->files[writer->file_count++];
    snprintf(file->name, sizeof file->name, "%s", name);
    file->bytes = bytes;
    file->checksum = checksum;
}

static int fsync_path(const char* path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -1;
    }
    int failed = fsync(fd);
    close(fd);
    return failed;
}

// a small file from memory, synced
static void writer_put_text(CheckpointWriter* writer, const char* name, const char* text, size_t bytes, int listed) {
    if (writer->error[0]) {
        return;
    }
    char* path = format_string("%s/%s", writer->folder, name);
    FILE* file = fopen(path, "wb");
    int ok = file && fwrite(text, 1, bytes, file) == bytes && fflush(file) == 0 && fsync(fileno(file)) == 0;
    int error = errno;
    if (file && fclose(file) != 0 && ok) {
        ok = 0, error = errno;
    }
    if (!ok) {
        writer_fail(writer, "cannot write '%s': %s", path, strerror(error));
    } else if (listed) {
        Xxh64 state = xxh64_begin(0);
        xxh64_update(&state, text, bytes);
        writer_add(writer, name, (int64_t)bytes, xxh64_end(&state));
    }
    free(path);
}

// copy elements of a device buffer into the open file
static void writer_stream(SafetensorsWriter* file, const Model* model, const void* device, size_t count,
                          size_t element_bytes) {
    char* chunk = (char*)malloc_or_die(CHECKPOINT_CHUNK * element_bytes, "checkpoint buffer");
    for (size_t begin = 0; begin < count; begin += CHECKPOINT_CHUNK) {
        size_t n = count - begin < CHECKPOINT_CHUNK ? count - begin : CHECKPOINT_CHUNK;
        model->ops->copy_to_host(chunk, (const char*)device + begin * element_bytes, n * element_bytes);
        safetensors_write(file, chunk, n * element_bytes);
    }
    free(chunk);
}

static void writer_end(CheckpointWriter* writer, SafetensorsWriter* file, const char* name) {
    int64_t bytes;
    uint64_t checksum;
    if (safetensors_write_end(file, &bytes, &checksum) != 0) {
        writer_fail(writer, "%s", file->error);
    } else {
        writer_add(writer, name, bytes, checksum);
    }
}

static void writer_put_weights(CheckpointWriter* writer, const Model* model) {
    SafetensorsWriter file = {};
    for (int p = 0; p < model->table.count; p++) {
        const Param* param = &model->table.list[p];
        int64_t shape[] = {param->rows, param->cols};
        safetensors_declare(&file, param->name, sizeof(floatX) == 2 ? SAFETENSORS_BF16 : SAFETENSORS_F32, shape,
                            param->is_matrix ? 2 : 1);
    }
    char* path = format_string("%s/model.safetensors", writer->folder);
    safetensors_write_begin(&file, path);
    writer_stream(&file, model, model->params, model->table.elements, sizeof(floatX));
    writer_end(writer, &file, "model.safetensors");
    free(path);
}

static SafetensorsDtype real_dtype(RealType type) {
    return type == REAL_F32 || sizeof(floatX) == sizeof(float) ? SAFETENSORS_F32 : SAFETENSORS_BF16;
}

// master (where there is one), m, v
static void writer_put_optimizer(CheckpointWriter* writer, const Model* model) {
    const char* names[] = {"master", "m", "v"};
    const RealArray arrays[] = {real_f32(model->master), model->m, model->v};
    SafetensorsWriter file = {};
    int64_t shape[] = {(int64_t)model->table.elements};
    for (int i = 0; i < 3; i++) {
        if (arrays[i].data) {
            safetensors_declare(&file, names[i], real_dtype(arrays[i].type), shape, 1);
        }
    }
    char* path = format_string("%s/optim-00000-of-00001.safetensors", writer->folder);
    safetensors_write_begin(&file, path);
    for (int i = 0; i < 3; i++) {
        if (arrays[i].data) {
            writer_stream(&file, model, arrays[i].data, model->table.elements, real_bytes(arrays[i].type));
        }
    }
    writer_end(writer, &file, "optim-00000-of-00001.safetensors");
    free(path);
}

// options as one JSON object, every knob as a string
static void config_write_json(FILE* file, const Config* config) {
    char value[4096];
    fprintf(file, "{");
    int first = 1;
    for (int id = 0; id < KNOB_COUNT_ALL; id++) {
        if (KNOB_TABLE[id].kind == KNOB_SWITCH) {
            continue;
        }
        fprintf(file, "%s\"%s\":", first ? "" : ",", KNOB_TABLE[id].name);
        json_write_string(file, knob_value(config, id, value, sizeof value));
        first = 0;
    }
    fprintf(file, "}");
}

static void writer_put_state(CheckpointWriter* writer, const Model* model, const Config* config,
                             const RunState* state) {
    char* text = NULL;
    size_t bytes = 0;
    FILE* file = open_memstream(&text, &bytes);
    check_or(file, EXIT_NO_MEMORY, "out of memory for state.json");
    fprintf(file, "{\"format\":\"train_llama checkpoint\",\"version\":%d,\"program\":\"%s\",\n", CHECKPOINT_VERSION,
            PROGRAM_VERSION);
    fprintf(file, "\"run_id\":\"%s\",\"step\":%lld,\"tokens\":%lld,\"ranks\":1,\"precision\":\"%s\",\n", state->run_id,
            (long long)state->step, (long long)state->tokens, FLOATX_NAME);
    fprintf(file,
            "\"elements\":%zu,\"slices\":[{\"file\":\"optim-00000-of-00001.safetensors\",\"begin\":0,\"end\":%zu}],\n",
            model->table.elements, model->table.elements);
    fprintf(file, "\"data_fingerprint\":\"%016llx\",\n\"options\":", (unsigned long long)state->data_fingerprint);
    config_write_json(file, config);
    fprintf(file, ",\n\"files\":[");
    for (int i = 0; i < writer->file_count; i++) {
        const CheckpointFile* f = &writer->files[i];
        fprintf(file, "%s\n  {\"name\":\"%s\",\"bytes\":%lld,\"xxh64\":\"%016llx\"}", i ? "," : "", f->name,
                (long long)f->bytes, (unsigned long long)f->checksum);
    }
    fprintf(file, "],\n");
    fflush(file);
    Xxh64 hash = xxh64_begin(0);
    xxh64_update(&hash, text, bytes);
    fprintf(file, "\"xxh64_of_the_text_above\":\"%016llx\"}", (unsigned long long)xxh64_end(&hash));
    fclose(file);
    writer_put_text(writer, "state.json", text, bytes, 0);
    free(text);
}

static void writer_put_configs(CheckpointWriter* writer, const Model* model, const char* tokenizer_path,
                               int separator) {
    char* text = NULL;
    size_t bytes = 0;
    FILE* file = open_memstream(&text, &bytes);
    check_or(file, EXIT_NO_MEMORY, "out of memory for config.json");
    model_config_write(file, &model->config, separator);
    fclose(file);
    writer_put_text(writer, "config.json", text, bytes, 1);
    free(text);
    if (tokenizer_path) {
        size_t size;
        char* tokenizer = read_file_or_die(tokenizer_path, &size);
        writer_put_text(writer, "tokenizer.json", tokenizer, size, 1);
        free(tokenizer);
    }
}

// Save a checkpoint of the model after state->step steps. 0, or -1 with a text in error: nothing is committed then,
// what was written is removed and training can go on. tokenizer_path may be NULL; separator is the document token, or
// -1.
static int checkpoint_save(const char* out, const Model* model, const Config* config, const RunState* state,
                           const char* tokenizer_path, int separator, char* error, size_t error_bytes) {
    char* final_path = checkpoint_path(out, state->step, "");
    if (path_is_folder(final_path)) {  // committed before; it is the same state
        free(final_path);
        return 0;
    }
    CheckpointWriter writer = {
        .folder = checkpoint_path(out, state->step, ".tmp"), .files = {}, .file_count = 0, .error = {}};
    remove_flat_folder(writer.folder);
    if (mkdir(writer.folder, 0777) != 0) {
        writer_fail(&writer, "cannot create folder '%s': %s", writer.folder, strerror(errno));
    } else {
        writer_put_weights(&writer, model);
        writer_put_optimizer(&writer, model);
        writer_put_configs(&writer, model, tokenizer_path, separator);
        writer_put_state(&writer, model, config, state);
    }
    if (!writer.error[0] && fsync_path(writer.folder) != 0) {
        writer_fail(&writer, "cannot flush folder '%s': %s", writer.folder, strerror(errno));
    }
    if (!writer.error[0] && rename(writer.folder, final_path) != 0) {
        writer_fail(&writer, "cannot rename '%s': %s", writer.folder, strerror(errno));
    }
    if (writer.error[0]) {
        remove_flat_folder(writer.folder);
    } else if (fsync_path(out) != 0) {
        writer_fail(&writer, "cannot flush folder '%s': %s", out, strerror(errno));
    }
    snprintf(error, error_bytes, "%s", writer.error);
    free(writer.folder);
    free(final_path);
    return error[0] ? -1 : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// reading

// state.json of a checkpoint, its own checksum verified; NULL with a text in error
static Json* checkpoint_read_state(const char* folder, char* error, size_t error_bytes) {
    char* path = format_string("%s/state.json", folder);
    if (!path_is_file(path)) {
        snprintf(error, error_bytes, "'%s' is missing", path);
        free(path);
        return NULL;
    }
    size_t bytes;
    char* text = read_file_or_die(path, &bytes);
    Json* root = json_try_parse(text, bytes, path, error, error_bytes);
    const char* last = strstr(text, "\"xxh64_of_the_text_above\"");
    const char* stored = NULL;
    if (root && (!last || json_try_string(json_get(root, "xxh64_of_the_text_above"), &stored) != 0)) {
        snprintf(error, error_bytes, "'%s' is not a train_llama state", path);
        json_free(root);
        root = NULL;
    }
    if (root) {
        Xxh64 hash = xxh64_begin(0);
        xxh64_update(&hash, text, (size_t)(last - text));
        char hex[17];
        snprintf(hex, sizeof hex, "%016llx", (unsigned long long)xxh64_end(&hash));
        int64_t version = 0;
        json_try_int(json_get(root, "version"), &version);
        if (strcmp(hex, stored)) {
            snprintf(error, error_bytes, "'%s' does not match its checksum", path);
        } else if (version != CHECKPOINT_VERSION) {
            snprintf(error, error_bytes, "'%s' has version %lld, this program reads %d", path, (long long)version,
                     CHECKPOINT_VERSION);
        }
        if (error[0]) {
            json_free(root);
            root = NULL;
        }
    }
    free(text);
    free(path);
    return root;
}

// is every file there, of the recorded size and checksum?
static int checkpoint_verify_files(const char* folder, const Json* state, char* error, size_t error_bytes) {
    const Json* files = json_get(state, "files");
    for (const Json* file = files ? files->first : NULL; file && !error[0]; file = file->next) {
        const char *name = json_string(json_need(file, "name")), *stored = json_string(json_need(file, "xxh64"));
        int64_t expected = json_int(json_need(file, "bytes")), bytes = 0;
        uint64_t checksum = 0;
        char* path = format_string("%s/%s", folder, name);
        struct stat info;
        if (stat(path, &info) != 0) {
            snprintf(error, error_bytes, "'%s' is missing", path);
        } else if (info.st_size != expected) {
            snprintf(error, error_bytes, "'%s' has %lld bytes instead of %lld", path, (long long)info.st_size,
                     (long long)expected);
        } else if (xxh64_file(&checksum, &bytes, path, error, error_bytes) == 0) {
            char hex[17];
            snprintf(hex, sizeof hex, "%016llx", (unsigned long long)checksum);
            if (strcmp(hex, stored)) {
                snprintf(error, error_bytes, "'%s' is damaged: its checksum is %s instead of %s", path, hex, stored);
            }
        }
        free(path);
    }
    return error[0] ? -1 : 0;
}

// the verified state of a checkpoint folder; NULL with a text in error
static Json* checkpoint_verify(const char* folder, char* error, size_t error_bytes) {
    error[0] = 0;
    Json* state = checkpoint_read_state(folder, error, error_bytes);
    if (state && checkpoint_verify_files(folder, state, error, error_bytes) != 0) {
        json_free(state);
        return NULL;
    }
    return state;
}

// The newest valid checkpoint in out, or NULL. Damaged ones are named on stderr and counted.
static char* checkpoint_find(const char* out, Json** state, int* damaged) {
    int count;
    int64_t* steps = checkpoint_list(out, &count);
    char* found = NULL;
    *damaged = 0;
    for (int i = 0; i < count && !found; i++) {
        char error[1024];
        char* folder = checkpoint_path(out, steps[i], "");
        *state = checkpoint_verify(folder, error, sizeof error);
        if (*state) {
            found = folder;
        } else {
            (*damaged)++;
            fprintf(stderr, "train_llama: checkpoint '%s' is not usable: %s; trying the next older one\n", folder,
                    error);
            free(folder);
        }
    }
    free(steps);
    return found;
}

static void model_config_must_match(const ModelConfig* have, const char* folder) {
    char* path = format_string("%s/config.json", folder);
    ModelConfig saved = model_config_read(path);
    const char* names[] = {"layers", "channels", "heads", "kv-heads", "head size", "ffn", "vocab-size", "tied"};
    int a[] = {saved.L, saved.C, saved.NH, saved.NKV, saved.HS, saved.F, saved.V, saved.tied};
    int b[] = {have->L, have->C, have->NH, have->NKV, have->HS, have->F, have->V, have->tied};
    for (int i = 0; i < 8; i++) {
        check_or(a[i] == b[i], EXIT_USAGE,
                 "checkpoint '%s' has %s %d, this command asks for %d; use --model %s, or another --out for a new run",
                 folder, names[i], a[i], b[i], folder);
    }
    check_or(saved.rope_theta == have->rope_theta && saved.rope_factor == have->rope_factor, EXIT_USAGE,
             "checkpoint '%s' has rope theta %g and scaling factor %g, this command asks for %g and %g; use --model %s",
             folder, saved.rope_theta, saved.rope_factor, have->rope_theta, have->rope_factor, folder);
    free(path);
}

// copy a host array of f32 to the device in the array's type
static void copy_reals(const Model* model, RealArray device, const float* values, size_t count) {
    if (device.type == REAL_F32) {
        model->ops->copy_to_device(device.data, values, count * sizeof(float));
        return;
    }
    floatX* rounded = (floatX*)malloc_or_die(count * sizeof(floatX), "checkpoint buffer");
    for (size_t i = 0; i < count; i++) {
        rounded[i] = f32_to_floatX(values[i]);
    }
    model->ops->copy_to_device(device.data, rounded, count * sizeof(floatX));
    free(rounded);
}

// `count` values of a tensor, f32 or bf16, into one or two device arrays; data of the second may be NULL
static void load_tensor(const SafetensorsFile* file, const char* name, const Model* model, size_t count,
                        RealArray first, RealArray second) {
    char error[SAFETENSORS_ERROR_BYTES];
    const SafetensorsEntry* entry = safetensors_find(file, name);
    check_or(entry, EXIT_BAD_DATA, "'%s' has no tensor '%s'", file->path, name);
    int wide = entry->dtype == SAFETENSORS_F32;
    size_t width = wide ? sizeof(float) : sizeof(bf16);
    check_or((wide || entry->dtype == SAFETENSORS_BF16) && entry->bytes == (int64_t)(count * width), EXIT_BAD_DATA,
             "'%s' does not hold %zu f32 or bf16 values of '%s'", file->path, count, name);
    float* chunk = (float*)malloc_or_die(CHECKPOINT_CHUNK * sizeof(float), "checkpoint buffer");
    bf16* narrow = (bf16*)malloc_or_die(CHECKPOINT_CHUNK * sizeof(bf16), "checkpoint buffer");
    for (size_t begin = 0; begin < count; begin += CHECKPOINT_CHUNK) {
        size_t n = count - begin < CHECKPOINT_CHUNK ? count - begin : CHECKPOINT_CHUNK;
        check_or(safetensors_read(file, entry, wide ? (void*)chunk : (void*)narrow, (int64_t)begin, (int64_t)n, error,
                                  sizeof error) == 0,
                 EXIT_IO, "%s", error);
        for (size_t i = 0; !wide && i < n; i++) {
            chunk[i] = bf16_to_f32(narrow[i]);
        }
        copy_reals(model, real_from(first, begin), chunk, n);
        if (second.data) {
            copy_reals(model, real_from(second, begin), chunk, n);
        }
    }
    free(narrow);
    free(chunk);
}

// the weights of a run without a master copy, tensor by tensor
static void load_weights(const Model* model, const char* folder) {
    char error[SAFETENSORS_ERROR_BYTES];
    char* path = format_string("%s/model.safetensors", folder);
    SafetensorsFile file;
    check_or(safetensors_open(&file, path, error, sizeof error) == 0, EXIT_BAD_DATA, "%s", error);
    for (int p = 0; p < model->table.count; p++) {
        const Param* param = &model->table.list[p];
        RealArray master = real_f32(model->master ? model->master + param->offset : NULL);
        load_tensor(&file, param->name, model, param->count, real_floatX(model->params + param->offset), master);
    }
    safetensors_close(&file);
    free(path);
}

// Load a verified checkpoint: weights, m, v. Where it has a master copy the parameters are the rounded master, as after
// every update; a run with and one without a master copy, or with moments of another type, read each other's.
static RunState checkpoint_load(Model* model, const char* folder, const Json* state) {
    model_config_must_match(&model->config, folder);
    RunState run = {};
    run.step = json_int(json_need(state, "step"));
    run.tokens = json_int(json_need(state, "tokens"));
    run.data_fingerprint = strtoull(json_string(json_need(state, "data_fingerprint")), NULL, 16);
    snprintf(run.run_id, sizeof run.run_id, "%s", json_string(json_need(state, "run_id")));
    char error[SAFETENSORS_ERROR_BYTES];
    char* path = format_string("%s/optim-00000-of-00001.safetensors", folder);
    SafetensorsFile file;
    check_or(safetensors_open(&file, path, error, sizeof error) == 0, EXIT_BAD_DATA, "%s", error);
    size_t N = model->table.elements;
    RealArray none = real_f32(NULL);
    if (model->master && safetensors_find(&file, "master")) {
        load_tensor(&file, "master", model, N, real_f32(model->master), real_floatX(model->params));
    } else {
        load_weights(model, folder);
    }
    load_tensor(&file, "m", model, N, model->m, none);
    load_tensor(&file, "v", model, N, model->v, none);
    safetensors_close(&file);
    free(path);
    model->weights_quantized = 0;
    return run;
}
