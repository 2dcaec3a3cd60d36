// checkpoint_save.h: writing a checkpoint beside training.
//
// A save holds training for a copy to host memory only (saver_begin). Then a thread of every rank writes the rank's
// optimizer file, and another of rank 0 the model; when all are done (the loop asks at every step: saver_advance), a
// thread of rank 0 writes state.json, commits by rename and removes what --keep does not keep. Until the rename the
// folder is named .tmp, so a save that is cut short leaves nothing that could be taken for a checkpoint. One save at a
// time: the next waits (saver_wait).
//
// Without a snapshot (--async-save off, or no memory for it) the threads read the device themselves, training waits.
#pragma once
#include "checkpoint.h"
#include "watch.h"
#include <pthread.h>

enum { WRITER_FILES = 4 };
typedef struct {
    char* folder;               // where it is being written
    CheckpointFile files[WRITER_FILES];
    int file_count;
    char error[512];            // the first failure; empty while there is none
} CheckpointWriter;

// what a rank writes: parameters (rank 0), its master copy, m, v; on the host where there is a snapshot
typedef enum { SAVED_PARAMS, SAVED_MASTER, SAVED_M, SAVED_V, SAVED_KINDS } SavedKind;
typedef enum { SAVER_IDLE, SAVER_WRITING, SAVER_COMMITTING } SaverPhase;
typedef enum { SAVE_NONE, SAVE_DONE, SAVE_FAILED } SaveResult;

typedef struct {
    const Comm* comm;
    const char* out;
    const Model* model;
    const Config* config;
    char* tokenizer;                   // on rank 0, the bytes of tokenizer.json, or NULL
    size_t tokenizer_bytes;
    int separator;                     // the document token, or -1
    int log;                           // file descriptor of metrics.jsonl, made durable with each checkpoint, or -1
    Slices slices;                     // what each rank writes: what it owns, or its share where every rank owns all
    int is_async;                      // the same on all ranks
    char* snapshot[SAVED_KINDS];       // NULL: none, also of what this rank has nothing of
    // of the save in progress
    SaverPhase phase;
    RunState state;
    CheckpointWriter writer;
    CheckpointWriter weights;          // of rank 0's second thread
    CheckpointFile* slice_files;       // (ranks), on rank 0
    pthread_t thread;
    int done;                          // the thread's last word
    int64_t written;                   // bytes, for who waits
    double begin, held;                // when it began; seconds that training stood still for it
    char error[512];
} Saver;

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
    check(writer->file_count < WRITER_FILES, "internal: too many checkpoint files");
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

static const void* saver_device(const Saver* saver, SavedKind kind) {
    const Model* model = saver->model;
    const void* device[] = {model->params, model->master, model->m.data, model->v.data};
    return device[kind];
}

// elements of a buffer, on the host or on the device, into the open file
static void saver_stream(Saver* saver, SafetensorsWriter* file, SavedKind kind, size_t first, size_t count,
                         size_t element_bytes) {
    const void* all = saver->snapshot[kind] ? saver->snapshot[kind] : saver_device(saver, kind);
    const char* source = (const char*)all + first * element_bytes;
    char* chunk = saver->snapshot[kind] ? NULL : (char*)malloc_or_die(CHECKPOINT_CHUNK * element_bytes, "checkpoint");
    for (size_t begin = 0; begin < count; begin += CHECKPOINT_CHUNK) {
        size_t n = count - begin < CHECKPOINT_CHUNK ? count - begin : CHECKPOINT_CHUNK;
        const char* at = source + begin * element_bytes;
        if (chunk) {
            saver->model->ops->copy_to_host(chunk, at, n * element_bytes);
        }
        safetensors_write(file, chunk ? chunk : at, n * element_bytes);
        __atomic_fetch_add(&saver->written, (int64_t)(n * element_bytes), __ATOMIC_RELAXED);
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

static void writer_put_weights(Saver* saver) {
    const ParamTable* table = &saver->model->table;
    SafetensorsWriter file = {};
    for (int p = 0; p < table->count; p++) {
        const Param* param = &table->list[p];
        int64_t shape[] = {param->rows, param->cols};
        safetensors_declare(&file, param->name, sizeof(floatX) == 2 ? SAFETENSORS_BF16 : SAFETENSORS_F32, shape,
                            param->is_matrix ? 2 : 1);
    }
    char* path = format_string("%s/model.safetensors", saver->weights.folder);
    safetensors_write_begin(&file, path);
    saver_stream(saver, &file, SAVED_PARAMS, 0, table->elements, sizeof(floatX));
    writer_end(&saver->weights, &file, "model.safetensors");
    free(path);
}

static SafetensorsDtype real_dtype(RealType type) {
    return type == REAL_F32 || sizeof(floatX) == sizeof(float) ? SAFETENSORS_F32 : SAFETENSORS_BF16;
}

// master (where there is one), m, v: this rank's slices, end to end
static void writer_put_optimizer(Saver* saver) {
    const Model* model = saver->model;
    const char* names[] = {"", "master", "m", "v"};
    const RealArray arrays[] = {real_floatX(NULL), real_f32(model->master), model->m, model->v};
    char name[64];
    SafetensorsWriter file = {};
    int64_t shape[] = {(int64_t)slices_owned(&saver->slices)};
    for (int kind = SAVED_MASTER; kind < SAVED_KINDS; kind++) {
        if (arrays[kind].data) {
            safetensors_declare(&file, names[kind], real_dtype(arrays[kind].type), shape, 1);
        }
    }
    checkpoint_slice_name(name, sizeof name, saver->comm->rank, saver->comm->size);
    char* path = format_string("%s/%s", saver->writer.folder, name);
    safetensors_write_begin(&file, path);
    for (int kind = SAVED_MASTER; kind < SAVED_KINDS; kind++) {
        for (int i = 0; arrays[kind].data && i < saver->slices.count; i++) {
            const Slice* slice = &saver->slices.list[i];
            saver_stream(saver, &file, (SavedKind)kind, slice->at, slice->count, real_bytes(arrays[kind].type));
        }
    }
    writer_end(&saver->writer, &file, name);
    free(path);
}

// the ranges that each optimizer file holds, in its order
static void saver_write_slices(const Saver* saver, FILE* file) {
    const Model* model = saver->model;
    fprintf(file, "\"elements\":%zu,\"slices\":[", model->table.elements);
    for (int r = 0; r < saver->comm->size; r++) {
        char name[64];
        int shown = 0;
        Slices slices = slices_make(&model->config, &model->table, r, saver->comm->size);
        checkpoint_slice_name(name, sizeof name, r, saver->comm->size);
        fprintf(file, "%s\n  {\"file\":\"%s\",\"ranges\":[", r ? "," : "", name);
        for (int i = 0; i < slices.count; i++) {
            Slice s = slices.list[i];
            if (s.count) {
                fprintf(file, "%s[%zu,%zu]", shown++ ? "," : "", s.begin, s.begin + s.count);
            }
        }
        fprintf(file, "]}");
        free(slices.list);
    }
    fprintf(file, "],\n");
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

static void saver_write_file(FILE* file, const CheckpointFile* f, int first) {
    fprintf(file, "%s\n  {\"name\":\"%s\",\"bytes\":%lld,\"xxh64\":\"%016llx\"}", first ? "" : ",", f->name,
            (long long)f->bytes, (unsigned long long)f->checksum);
}

static void writer_put_state(Saver* saver) {
    CheckpointWriter* writer = &saver->writer;
    const RunState* state = &saver->state;
    char* text = NULL;
    size_t bytes = 0;
    FILE* file = open_memstream(&text, &bytes);
    check_or(file, EXIT_NO_MEMORY, "out of memory for state.json");
    fprintf(file, "{\"format\":\"train_llama checkpoint\",\"version\":%d,\"program\":\"%s\",\n", CHECKPOINT_VERSION,
            PROGRAM_VERSION);
    fprintf(file, "\"run_id\":\"%s\",\"step\":%lld,\"tokens\":%lld,\"ranks\":%d,\"precision\":\"%s\",\n", state->run_id,
            (long long)state->step, (long long)state->tokens, saver->comm->size, FLOATX_NAME);
    saver_write_slices(saver, file);
    fprintf(file, "\"data_fingerprint\":\"%016llx\",\n\"options\":", (unsigned long long)state->data_fingerprint);
    config_write_json(file, saver->config);
    fprintf(file, ",\n\"files\":[");
    for (int i = 0; i < writer->file_count; i++) {  // the first is this rank's optimizer file, as are the others'
        saver_write_file(file, &writer->files[i], i == 0);
    }
    for (int r = 1; r < saver->comm->size; r++) {
        saver_write_file(file, &saver->slice_files[r], 0);
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

static void writer_put_configs(Saver* saver) {
    CheckpointWriter* writer = &saver->writer;
    char* text = NULL;
    size_t bytes = 0;
    FILE* file = open_memstream(&text, &bytes);
    check_or(file, EXIT_NO_MEMORY, "out of memory for config.json");
    model_config_write(file, &saver->model->config, saver->separator);
    fclose(file);
    writer_put_text(writer, "config.json", text, bytes, 1);
    free(text);
    if (saver->tokenizer) {
        writer_put_text(writer, "tokenizer.json", saver->tokenizer, saver->tokenizer_bytes, 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the threads

static void saver_say_done(Saver* saver) { __atomic_store_n(&saver->done, 1, __ATOMIC_RELEASE); }
static int saver_is_done(const Saver* saver) { return __atomic_load_n(&saver->done, __ATOMIC_ACQUIRE); }

static void* saver_write_weights(void* argument) {
    Saver* saver = (Saver*)argument;
    saver->model->ops->snapshot_wait();
    writer_put_weights(saver);
    return NULL;
}

// rank 0, which has more to write than the others, writes its two large files at once
static void* saver_write(void* argument) {
    Saver* saver = (Saver*)argument;
    int first = saver->comm->rank == 0;
    pthread_t weights;
    saver->weights = saver->writer;
    if (first) {
        pthread_or_die(pthread_create(&weights, NULL, saver_write_weights, saver), "pthread_create");
    }
    saver->model->ops->snapshot_wait();
    writer_put_optimizer(saver);
    if (first) {
        pthread_or_die(pthread_join(weights, NULL), "pthread_join");
        if (saver->weights.error[0]) {
            writer_fail(&saver->writer, "%s", saver->weights.error);
        } else {
            writer_add(&saver->writer, "model.safetensors", saver->weights.files[0].bytes,
                       saver->weights.files[0].checksum);
        }
        writer_put_configs(saver);
    }
    saver_say_done(saver);
    return NULL;
}

static void* saver_commit(void* argument) {
    Saver* saver = (Saver*)argument;
    CheckpointWriter* writer = &saver->writer;
    char* final_path = checkpoint_path(saver->out, saver->state.step, "");
    writer_put_state(saver);
    if (saver->log >= 0) {
        fsync(saver->log);  // a resumed run does not write these records again; without them it still goes on
    }
    if (!writer->error[0] && fsync_path(writer->folder) != 0) {
        writer_fail(writer, "cannot flush folder '%s': %s", writer->folder, strerror(errno));
    }
    if (!writer->error[0] && rename(writer->folder, final_path) != 0) {
        writer_fail(writer, "cannot rename '%s': %s", writer->folder, strerror(errno));
    }
    if (!writer->error[0] && fsync_path(saver->out) != 0) {
        writer_fail(writer, "'%s' is complete, but whether its name is on disk is not known: %s", final_path,
                    strerror(errno));
    }
    if (!writer->error[0]) {
        checkpoint_prune(saver->out, saver->config->keep);  // here, because removing large files takes a while
    }
    free(final_path);
    saver_say_done(saver);
    return NULL;
}

static void* saver_nothing(void* argument) {
    saver_say_done((Saver*)argument);
    return NULL;
}

static void saver_start_thread(Saver* saver, void* (*run)(void* argument)) {
    saver->done = 0;
    pthread_or_die(pthread_create(&saver->thread, NULL, run, saver), "pthread_create");
}

// ---------------------------------------------------------------------------------------------------------------------
// what the loop calls, all ranks together

static size_t saver_bytes(const Saver* saver, SavedKind kind) {
    const Model* model = saver->model;
    size_t owned = model->slices.elements, moment = real_bytes(model->m.type);
    size_t bytes[] = {saver->comm->rank == 0 ? model->table.elements * sizeof(floatX) : 0,
                      model->training.has_master ? owned * sizeof(float) : 0, owned * moment, owned * moment};
    return bytes[kind];
}

// host memory that a snapshot takes on this rank
static size_t saver_snapshot_bytes(const Saver* saver) {
    size_t bytes = 0;
    for (int kind = 0; kind < SAVED_KINDS; kind++) {
        bytes += saver_bytes(saver, (SavedKind)kind);
    }
    return bytes;
}

// out, model and config must stay
static Saver saver_open(const Comm* comm, const char* out, const Model* model, const Config* config,
                        const char* tokenizer_path, int separator) {
    Saver saver = {};
    saver.comm = comm, saver.out = out, saver.model = model, saver.config = config;
    saver.separator = separator;
    saver.log = -1;
    if (tokenizer_path && comm->rank == 0) {  // now: it may lie in a checkpoint that is pruned one day
        saver.tokenizer = read_file_or_die(tokenizer_path, &saver.tokenizer_bytes);
    }
    saver.slices = slices_make(&model->config, &model->table, comm->rank, comm->size);
    for (int i = 0; model->training.ranks == 1 && i < saver.slices.count; i++) {
        saver.slices.list[i].at = saver.slices.list[i].begin;
    }
    saver.slice_files = (CheckpointFile*)calloc_or_die(sizeof(CheckpointFile) * (size_t)comm->size, "checkpoint");
    return saver;
}

// Is there to be host memory for a snapshot, if it has room? Not for a save at which training ends anyway.
static int saver_wants_snapshot(const Config* config) {
    return !strcmp(config->async_save, "on") || (is_auto_text(config->async_save) && config->save_every > 0);
}

static void saver_allocate_snapshot(Saver* saver) {
    saver->is_async = 1;
    for (int kind = 0; kind < SAVED_KINDS; kind++) {
        size_t bytes = saver_bytes(saver, (SavedKind)kind);
        saver->snapshot[kind] = bytes ? (char*)saver->model->ops->alloc_host(bytes, "checkpoint snapshot") : NULL;
    }
}

static int saver_is_async(const Saver* saver) { return saver->is_async; }

static void saver_close(Saver* saver) {
    check(saver->phase == SAVER_IDLE, "internal: a save is in progress");
    for (int kind = 0; kind < SAVED_KINDS; kind++) {
        if (saver->snapshot[kind]) {
            saver->model->ops->release_host(saver->snapshot[kind]);
        }
    }
    free(saver->tokenizer);
    free(saver->slices.list);
    free(saver->slice_files);
}

// is this rank's part of a save still being written?
static int saver_is_busy(const Saver* saver) { return saver->phase != SAVER_IDLE && !saver_is_done(saver); }

static SaveResult saver_finish(Saver* saver, int failed) {
    saver->phase = SAVER_IDLE;
    if (failed && saver->comm->rank == 0) {
        remove_flat_folder(saver->writer.folder);
    }
    free(saver->writer.folder);
    saver->writer.folder = NULL;
    return failed ? SAVE_FAILED : SAVE_DONE;
}

// Go on with the save in progress. busy: saver_is_busy of any rank, the same on all. SAVE_FAILED: nothing is committed,
// what was written is removed, the reason is in error.
static SaveResult saver_advance(Saver* saver, int busy) {
    if (saver->phase == SAVER_IDLE || busy) {
        return SAVE_NONE;
    }
    pthread_or_die(pthread_join(saver->thread, NULL), "pthread_join");
    snprintf(saver->error, sizeof saver->error, "%s", saver->writer.error);
    if (comm_any_error(saver->comm, saver->error, sizeof saver->error)) {
        return saver_finish(saver, 1);
    }
    if (saver->phase == SAVER_COMMITTING) {
        return saver_finish(saver, 0);
    }
    comm_gather(saver->comm, saver->slice_files, &saver->writer.files[0], sizeof(CheckpointFile));
    saver->phase = SAVER_COMMITTING;
    saver_start_thread(saver, saver->comm->rank == 0 ? saver_commit : saver_nothing);
    return SAVE_NONE;
}

// Until the save in progress is through. A slow disk is no hang: what is written may be in the system's memory and take
// long to reach the disk, of which nothing is heard; nothing for 30 times --hang-seconds is one.
static SaveResult saver_wait(Saver* saver) {
    SaveResult result = SAVE_NONE;
    int64_t before = 0;
    double moved = clock_seconds();
    while (saver->phase != SAVER_IDLE && result == SAVE_NONE) {
        struct timespec pause = {0, 2000000};
        int64_t agreed[] = {saver_is_busy(saver), __atomic_load_n(&saver->written, __ATOMIC_RELAXED)};
        comm_max(saver->comm, agreed, 2);
        moved = agreed[1] != before || !agreed[0] ? clock_seconds() : moved;
        before = agreed[1];
        if (clock_seconds() - moved < 30 * saver->config->hang_seconds) {
            watch_phase("waiting for a checkpoint to reach the disk");
        }
        result = saver_advance(saver, (int)agreed[0]);
        if (agreed[0]) {
            nanosleep(&pause, NULL);
        }
    }
    return result;
}

static void saver_take_snapshot(Saver* saver) {
    for (int kind = 0; kind < SAVED_KINDS; kind++) {
        if (saver->snapshot[kind]) {
            saver->model->ops->snapshot_copy(saver->snapshot[kind], saver_device(saver, (SavedKind)kind),
                                             saver_bytes(saver, (SavedKind)kind));
        }
    }
}

// Begin to save the model after state->step steps; nothing else may be in progress. SAVE_NONE: it began. SAVE_FAILED:
// with the reason in error; one is that a checkpoint of this step is there, which another run has made.
static SaveResult saver_begin(Saver* saver, const RunState* state) {
    check(saver->phase == SAVER_IDLE, "internal: two saves at once");
    saver->begin = clock_seconds();
    saver->state = *state;
    saver->written = 0;
    memset(&saver->writer, 0, sizeof saver->writer);
    saver->writer.folder = checkpoint_path(saver->out, state->step, ".tmp");
    saver->error[0] = 0;
    if (saver->comm->rank == 0) {
        char* final_path = checkpoint_path(saver->out, state->step, "");
        remove_flat_folder(saver->writer.folder);
        if (path_is_folder(final_path)) {
            snprintf(saver->error, sizeof saver->error, "'%s' is there already, from another run", final_path);
        } else if (mkdir(saver->writer.folder, 0777) != 0) {
            snprintf(saver->error, sizeof saver->error, "cannot create folder '%s': %s", saver->writer.folder,
                     strerror(errno));
        }
        free(final_path);
    }
    if (comm_any_error(saver->comm, saver->error, sizeof saver->error)) {
        return saver_finish(saver, 1);
    }
    saver_take_snapshot(saver);
    saver->phase = SAVER_WRITING;
    saver_start_thread(saver, saver_write);
    return SAVE_NONE;
}

// A whole save of one rank, at once. 0, or -1 with a text in error.
static int checkpoint_save(const char* out, const Model* model, const Config* config, const RunState* state,
                           const char* tokenizer_path, int separator, char* error, size_t error_bytes) {
    Saver saver = saver_open(&COMM_SINGLE, out, model, config, tokenizer_path, separator);
    SaveResult result = saver_begin(&saver, state);
    result = result == SAVE_NONE ? saver_wait(&saver) : result;
    snprintf(error, error_bytes, "%s", saver.error);
    saver_close(&saver);
    return result == SAVE_FAILED ? -1 : 0;
}
