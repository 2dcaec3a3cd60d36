// checkpoint.h: what a checkpoint is, and reading one: verify, fall back, load on any number of ranks.
//
//   OUT/step_00001000/  model.safetensors, config.json (tokenizer.json)   a Hugging Face Llama folder as it stands
//                       optim-00000-of-00002.safetensors  one a rank: f32 master weights (where the run keeps them), m,
//                                                         v, each the rank's slices of the flat buffer, end to end
//                       state.json                        run, step, options, data, the ranges of the flat buffer that
//                                                         each optimizer file holds, size and XXH64 of each file
// So any number of ranks reads what any other number wrote, each rank the ranges that it needs.
//
// Written (by checkpoint_save.h) into step_00001000.tmp: every file is fsynced, then the folder, then it is renamed,
// then OUT is fsynced. So a folder without .tmp is whole, whenever the machine stopped. Loading still verifies sizes
// and checksums (state.json guards itself by a checksum of its own text): a damaged checkpoint is named and the next
// older one is taken. A committed step is never overwritten. All else is a function of the step: data position,
// learning rate, random numbers.
#pragma once
#include "comm.h"
#include "config.h"
#include "optimizer.h"
#include "safetensors.h"
#include "tokenizer.h"
#include "watch.h"

#define CHECKPOINT_VERSION 2  // 1 had one optimizer file and gave its range as begin and end
#define CHECKPOINT_CHUNK ((size_t)4 << 20)  // elements copied at a time

typedef struct {
    int64_t step, tokens;       // finished steps, tokens they saw
    uint64_t data_fingerprint;
    char run_id[32];
} RunState;

typedef struct { char name[64]; int64_t bytes; uint64_t checksum; } CheckpointFile;

// ---------------------------------------------------------------------------------------------------------------------
// folders

static void checkpoint_slice_name(char* name, size_t bytes, int rank, int ranks) {
    snprintf(name, bytes, "optim-%05d-of-%05d.safetensors", rank, ranks);
}

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

// steps of the committed checkpoints in out, newest first; the caller frees the list. A folder that is there and cannot
// be read ends the program: taken for empty, a run would begin anew over what it holds.
static int64_t* checkpoint_list(const char* out, int* count) {
    int64_t* steps = NULL;
    *count = 0;
    DIR* folder = opendir(out);
    check_or(folder || errno == ENOENT || errno == ENOTDIR, EXIT_IO, "cannot list '%s': %s", out, strerror(errno));
    if (!folder) {
        return NULL;
    }
    errno = 0;
    for (struct dirent* entry; (entry = readdir(folder)) != NULL; errno = 0) {
        int64_t step = checkpoint_name_step(entry->d_name);
        if (step >= 0) {
            steps = (int64_t*)realloc(steps, sizeof(int64_t) * (size_t)(*count + 1));
            check_or(steps, EXIT_NO_MEMORY, "out of memory listing checkpoints");
            steps[(*count)++] = step;
        }
    }
    check_or(errno == 0, EXIT_IO, "cannot list '%s': %s", out, strerror(errno));
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
        } else if (version < 1 || version > CHECKPOINT_VERSION) {
            snprintf(error, error_bytes, "'%s' has version %lld, this program reads 1 to %d", path, (long long)version,
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

static void checkpoint_verify_moved(void) { watch_phase("checking the files of a checkpoint"); }

// is every file there, of the recorded size and checksum? Ranks share the files out.
static int checkpoint_verify_files(const Comm* comm, const char* folder, const Json* state, char* error,
                                   size_t error_bytes) {
    const Json* files = json_get(state, "files");
    int number = 0;
    for (const Json* file = files ? files->first : NULL; file && !error[0]; file = file->next) {
        if (number++ % comm->size != comm->rank) {
            continue;
        }
        const char *name = json_string(json_need(file, "name")), *stored = json_string(json_need(file, "xxh64"));
        int64_t expected = json_int(json_need(file, "bytes")), bytes = 0;
        checkpoint_verify_moved();
        uint64_t checksum = 0;
        char* path = format_string("%s/%s", folder, name);
        struct stat info;
        if (stat(path, &info) != 0) {
            snprintf(error, error_bytes, "'%s' is missing", path);
        } else if (info.st_size != expected) {
            snprintf(error, error_bytes, "'%s' has %lld bytes instead of %lld", path, (long long)info.st_size,
                     (long long)expected);
        } else if (xxh64_file(&checksum, &bytes, path, checkpoint_verify_moved, error, error_bytes) == 0) {
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

// The verified state of a checkpoint folder; NULL on all ranks with a text in error
static Json* checkpoint_verify(const Comm* comm, const char* folder, char* error, size_t error_bytes) {
    error[0] = 0;
    Json* state = checkpoint_read_state(folder, error, error_bytes);
    if (state) {
        checkpoint_verify_files(comm, folder, state, error, error_bytes);
    }
    if (comm_any_error(comm, error, error_bytes)) {
        json_free(state);
        return NULL;
    }
    return state;
}

// The newest valid checkpoint in out, or NULL, the same on all ranks. Damaged ones are named on stderr and counted.
static char* checkpoint_find(const Comm* comm, const char* out, Json** state, int* damaged) {
    int count = 0;
    int64_t* steps = comm->rank == 0 ? checkpoint_list(out, &count) : NULL;
    char* found = NULL;
    comm_broadcast(comm, &count, sizeof count, 0);
    if (comm->rank > 0) {
        steps = (int64_t*)malloc_or_die(sizeof(int64_t) * (size_t)count, "the list of checkpoints");
    }
    comm_broadcast(comm, steps, sizeof(int64_t) * (size_t)count, 0);
    *damaged = 0;
    for (int i = 0; i < count && !found; i++) {
        char error[1024];
        char* folder = checkpoint_path(out, steps[i], "");
        *state = checkpoint_verify(comm, folder, error, sizeof error);
        if (*state) {
            found = folder;
        } else {
            (*damaged)++;
            if (comm->rank == 0) {
                fprintf(stderr, "train_llama: checkpoint '%s' is not usable: %s; trying the next older one\n", folder,
                        error);
            }
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
    watch_phase("reading a checkpoint");
    if (device.type == REAL_F32) {
        model->ops->copy_to_device(device.data, values, count * sizeof(float));
        return;
    }
    floatX* rounded = (floatX*)malloc_or_die(count * sizeof(floatX), "checkpoint buffer");
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) {
        rounded[i] = f32_to_floatX(values[i]);
    }
    model->ops->copy_to_device(device.data, rounded, count * sizeof(floatX));
    free(rounded);
}

// The tensor of that name, which must hold f32 or bf16 values
static const SafetensorsEntry* find_reals(const SafetensorsFile* file, const char* name) {
    const SafetensorsEntry* entry = safetensors_find(file, name);
    check_or(entry, EXIT_BAD_DATA, "'%s' has no tensor '%s'", file->path, name);
    check_or(entry->dtype == SAFETENSORS_F32 || entry->dtype == SAFETENSORS_BF16, EXIT_BAD_DATA,
             "'%s': tensor '%s' is neither f32 nor bf16", file->path, name);
    return entry;
}

// elements first .. first + count - 1 of a tensor into one or two device arrays; data of the second may be NULL
static void load_elements(const SafetensorsFile* file, const SafetensorsEntry* entry, size_t first, size_t count,
                          const Model* model, RealArray a, RealArray b) {
    char error[SAFETENSORS_ERROR_BYTES];
    int wide = entry->dtype == SAFETENSORS_F32;
    size_t most = count < CHECKPOINT_CHUNK ? count : CHECKPOINT_CHUNK;
    float* chunk = (float*)malloc_or_die(most * sizeof(float), "checkpoint buffer");
    bf16* narrow = (bf16*)malloc_or_die(most * sizeof(bf16), "checkpoint buffer");
    for (size_t begin = 0; begin < count; begin += CHECKPOINT_CHUNK) {
        size_t n = count - begin < CHECKPOINT_CHUNK ? count - begin : CHECKPOINT_CHUNK;
        check_or(safetensors_read(file, entry, wide ? (void*)chunk : (void*)narrow, (int64_t)(first + begin),
                                  (int64_t)n, error, sizeof error) == 0,
                 EXIT_BAD_DATA, "%s", error);
        if (!wide) {
#pragma omp parallel for schedule(static)
            for (size_t i = 0; i < n; i++) {
                chunk[i] = bf16_to_f32(narrow[i]);
            }
        }
        copy_reals(model, real_from(a, begin), chunk, n);
        if (b.data) {
            copy_reals(model, real_from(b, begin), chunk, n);
        }
    }
    free(narrow);
    free(chunk);
}

static SafetensorsFile open_or_die(const char* folder, const char* name) {
    char error[SAFETENSORS_ERROR_BYTES];
    char* path = format_string("%s/%s", folder, name);
    SafetensorsFile file;
    check_or(safetensors_open(&file, path, error, sizeof error) == 0, EXIT_BAD_DATA, "%s", error);
    free(path);
    return file;
}

// the weights of this rank's slices from model.safetensors, and the master copy, where there is one, from them
static void load_weights(const Model* model, const char* folder) {
    SafetensorsFile file = open_or_die(folder, "model.safetensors");
    for (int p = 0; p < model->table.count; p++) {
        const Param* param = &model->table.list[p];
        const SafetensorsEntry* entry = find_reals(&file, param->name);
        check_or(entry->count == (int64_t)param->count, EXIT_BAD_DATA, "'%s': tensor '%s' has %lld values, not %zu",
                 file.path, param->name, (long long)entry->count, param->count);
        for (int i = 0; i < model->slices.count; i++) {
            const Slice* slice = &model->slices.list[i];
            Range part = range_overlap(Range{slice->begin, slice->count}, Range{param->offset, param->count});
            if (part.count) {
                float* master = model->master ? model->master + slice->at + (part.begin - slice->begin) : NULL;
                load_elements(&file, entry, part.begin - param->offset, part.count, model,
                              real_floatX(model->params + part.begin), real_f32(master));
            }
        }
    }
    safetensors_close(&file);
}

// the k-th range of the flat buffer that an optimizer file holds; count 0: it has no k-th
static Range saved_range(const Json* slice, int k) {
    const Json* ranges = json_get(slice, "ranges");
    if (!ranges) {  // version 1
        int64_t begin = json_int(json_need(slice, "begin")), end = json_int(json_need(slice, "end"));
        return Range{(size_t)begin, k == 0 ? (size_t)(end - begin) : 0};
    }
    const Json* pair = ranges->first;
    while (pair && k-- > 0) {
        pair = pair->next;
    }
    if (!pair || !pair->first || !pair->first->next) {
        return Range{0, 0};
    }
    int64_t begin = json_int(pair->first), end = json_int(pair->first->next);
    return Range{(size_t)begin, (size_t)(end - begin)};
}

// What this rank owns of m, v and, where has_master, the master copy, from one optimizer file. Returns the elements.
static size_t load_slices(Model* model, const char* folder, const Json* saved, int has_master) {
    const Slices* slices = &model->slices;
    SafetensorsFile file = {};
    size_t first = 0, loaded = 0;  // first: element of the file's tensors at which the range begins
    Range range;
    for (int k = 0; (range = saved_range(saved, k)).count > 0; k++, first += range.count) {
        for (int i = 0; i < slices->count; i++) {
            const Slice* slice = &slices->list[i];
            Range part = range_overlap(range, Range{slice->begin, slice->count});
            if (!part.count) {
                continue;
            }
            if (!file.path) {
                file = open_or_die(folder, json_string(json_need(saved, "file")));
            }
            size_t from = first + (part.begin - range.begin), at = slice->at + (part.begin - slice->begin);
            RealArray none = real_f32(NULL);
            if (has_master) {
                load_elements(&file, find_reals(&file, "master"), from, part.count, model, real_f32(model->master + at),
                              real_floatX(model->params + part.begin));
            }
            load_elements(&file, find_reals(&file, "m"), from, part.count, model, real_from(model->m, at), none);
            load_elements(&file, find_reals(&file, "v"), from, part.count, model, real_from(model->v, at), none);
            loaded += part.count;
        }
    }
    if (file.path) {
        safetensors_close(&file);
    }
    return loaded;
}

// Load a verified checkpoint: weights, m, v. Where it has a master copy the parameters are the rounded master, as after
// every update; a run with and one without a master copy, or with moments of another type, read each other's.
static RunState checkpoint_load(const Comm* comm, Model* model, const char* folder, const Json* state) {
    model_config_must_match(&model->config, folder);
    RunState run = {};
    run.step = json_int(json_need(state, "step"));
    run.tokens = json_int(json_need(state, "tokens"));
    run.data_fingerprint = strtoull(json_string(json_need(state, "data_fingerprint")), NULL, 16);
    snprintf(run.run_id, sizeof run.run_id, "%s", json_string(json_need(state, "run_id")));
    const Json* saved = json_need(state, "slices")->first;
    check_or(saved, EXIT_BAD_DATA, "'%s/state.json' names no optimizer file", folder);
    SafetensorsFile any = open_or_die(folder, json_string(json_need(saved, "file")));
    int has_master = model->master && safetensors_find(&any, "master");
    safetensors_close(&any);
    if (!has_master) {
        load_weights(model, folder);
    }
    size_t loaded = 0, owned = slices_owned(&model->slices);
    for (; saved; saved = saved->next) {
        loaded += load_slices(model, folder, saved, has_master);
    }
    check_or(loaded == owned, EXIT_BAD_DATA, "the optimizer files of '%s' hold %zu of the %zu values of this rank",
             folder, loaded, owned);
    optimizer_gather(model, comm);
    model->weights_quantized = 0;
    return run;
}
