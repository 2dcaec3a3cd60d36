// data.h: token shards, the order in which samples are visited, and the thread that reads ahead.
//
// A shard is a header of 256 little-endian int32 (magic, version, token count, zeros) and then the tokens, as llm.c
// writes them: magic 20240520, version 1, uint16 tokens; or magic 20240801, version 7, uint32 tokens. Where word 2 is
// -1 the count has 64 bits, in words 3 (low) and 4 (high).
//
// A sample is T+1 consecutive tokens at stride T: inputs are the first T, targets the last T, and a shard of `count`
// tokens has floor((count - 1) / T) of them. Samples are numbered through all shards, 0 .. N-1, in the order of the
// shards' names. The run visits g = 0, 1, 2, ...; visit g is sample permute_index(g % N) under a key of (seed, g / N).
// So what is read is a function of (files, T, seed, g): there is no state to save, and the order is the same for every
// number of ranks and every micro-batch size. data_read is that function; the loader only calls it ahead of time.
#pragma once
#include <glob.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include "common.h"
#include "rand.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are read as they lie on disk: little-endian");
static_assert(sizeof(off_t) == 8, "shards may pass 2 GiB");

enum {
    SHARD_HEADER_WORDS = 256,
    SHARD_HEADER_BYTES = SHARD_HEADER_WORDS * 4,
    SHARD_MAGIC_16 = 20240520,
    SHARD_VERSION_16 = 1,
    SHARD_MAGIC_32 = 20240801,
    SHARD_VERSION_32 = 7,
    SCAN_LIMIT_BYTES = 1 << 30,   // up to here every token id is checked at start: about a second
    SCAN_CHUNK_BYTES = 1 << 20,
    PROBES = 1024,                // beyond, this many probes, shared out by shard size,
    PROBE_BYTES = 4096,           // of this size
};

typedef struct {
    char* path;
    int fd;
    int width;              // bytes a token: 2 or 4
    int64_t count;          // tokens
    int64_t samples;        // floor((count - 1) / T)
    int64_t first_sample;   // number of this shard's first sample among all samples
} Shard;

// Const after dataset_open, so threads may share it.
typedef struct {
    const char* split;      // "train" or "val": what a folder is searched for, and the option named in messages
    Shard* shards;          // sorted by file name
    int shard_count;
    int T;
    int vocab_size;
    uint64_t seed;
    int64_t tokens;         // of all shards together
    int64_t samples;
    int fully_scanned;      // 1: every token id was checked at start; 0: probes were
} Dataset;

static const char* path_base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int64_t shard_file_bytes(const Shard* shard) { return SHARD_HEADER_BYTES + shard->count * shard->width; }

// ---------------------------------------------------------------------------------------------------------------------
// which files

[[noreturn]] static void die_no_shards(const Dataset* dataset, const char* pattern, const char* problem) {
    die(EXIT_NO_INPUT, "no token shards for --%s-data '%s': %s; name .bin files, a folder of them or a quoted pattern, "
        "or prepare some with data/prepare.py (data/README.md says how)", dataset->split, pattern, problem);
}

static void dataset_add_file(Dataset* dataset, const char* path) {
    size_t bytes = (size_t)(dataset->shard_count + 1) * sizeof(Shard);
    dataset->shards = (Shard*)realloc(dataset->shards, bytes);
    check_or(dataset->shards, EXIT_NO_MEMORY, "out of memory: %zu bytes for the list of shards", bytes);
    Shard* shard = &dataset->shards[dataset->shard_count++];
    *shard = Shard{};
    shard->path = strdup_or_die(path);
}

// Is one of the words of a file name this one, as in train_000.bin, fineweb_train_000001.bin, tiny-val.bin?
static int name_says(const char* name, const char* word) {
    for (const char* at = strstr(name, word); at; at = strstr(at + 1, word)) {
        if (at == name || strchr("_-.", at[-1])) {
            return 1;
        }
    }
    return 0;
}

// the next entry of a folder that ends in .bin and is not hidden, NULL at the end
static const char* next_bin_name(DIR* folder, const char* path) {
    for (;;) {
        errno = 0;
        struct dirent* entry = readdir(folder);
        check_or(entry || errno == 0, EXIT_IO, "cannot read folder '%s': %s", path, strerror(errno));
        if (!entry) {
            return NULL;
        }
        size_t length = strlen(entry->d_name);
        if (entry->d_name[0] != '.' && length > 4 && strcmp(entry->d_name + length - 4, ".bin") == 0) {
            return entry->d_name;
        }
    }
}

// A folder gives its *.bin files that are named for the split. Only where no name mentions either split are all of them
// taken: a folder with training shards alone must not silently become the validation set.
static void dataset_add_folder(Dataset* dataset, const char* path) {
    const char* other = strcmp(dataset->split, "train") == 0 ? "val" : "train";
    DIR* folder = opendir(path);
    check_or(folder, EXIT_IO, "cannot read folder '%s': %s", path, strerror(errno));
    int mine = 0, theirs = 0, total = 0;
    for (const char* name = next_bin_name(folder, path); name; name = next_bin_name(folder, path)) {
        total++;
        mine += name_says(name, dataset->split);
        theirs += name_says(name, other);
    }
    if (total == 0) {
        die_no_shards(dataset, path, "the folder has no .bin file");
    }
    if (mine == 0 && theirs > 0) {
        die_no_shards(dataset, path, "its .bin files are named for the other split");
    }
    rewinddir(folder);
    for (const char* name = next_bin_name(folder, path); name; name = next_bin_name(folder, path)) {
        if (mine == 0 || name_says(name, dataset->split)) {
            char* full = format_string("%s%s%s", path, path[strlen(path) - 1] == '/' ? "" : "/", name);
            dataset_add_file(dataset, full);
            free(full);
        }
    }
    check(closedir(folder) == 0, "cannot close folder '%s': %s", path, strerror(errno));
}

static int folder_has_split(const char* path, const char* split) {
    DIR* folder = opendir(path);
    check_or(folder, EXIT_IO, "cannot open folder '%s': %s", path, strerror(errno));
    int found = 0;
    for (const char* name; !found && (name = next_bin_name(folder, path)) != NULL;) {
        found = name_says(name, split);
    }
    closedir(folder);
    return found;
}

static void dataset_add_path(Dataset* dataset, const char* path) {
    if (path_is_folder(path)) {
        dataset_add_folder(dataset, path);
    } else {
        dataset_add_file(dataset, path);
    }
}

// one item of the comma-separated list: what exists under just this name, else a pattern
static void dataset_add_item(Dataset* dataset, const char* item) {
    struct stat info;
    if (stat(item, &info) == 0) {
        dataset_add_path(dataset, item);
        return;
    }
    glob_t found;
    int result = glob(item, 0, NULL, &found);
    if (result == GLOB_NOMATCH) {
        die_no_shards(dataset, item, "it matches no file");
    }
    check_or(result == 0, EXIT_IO, "cannot expand the pattern '%s': %s", item, strerror(errno));
    const char *train = NULL, *val = NULL;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        const char* name = path_base_name(found.gl_pathv[i]);
        train = name_says(name, "train") ? name : train;
        val = name_says(name, "val") ? name : val;
        dataset_add_path(dataset, found.gl_pathv[i]);
    }
    check_or(!train || !val, EXIT_USAGE,
             "the pattern '%s' matches shards of both kinds, '%s' and '%s': what is trained on cannot validate; give "
             "the folder, or a pattern of one kind", item, train, val);
    globfree(&found);
}

// By file name before folder: moving shards to another folder then keeps their order.
static int shard_compare(const void* a, const void* b) {
    const char* path_a = ((const Shard*)a)->path;
    const char* path_b = ((const Shard*)b)->path;
    int order = strcmp(path_base_name(path_a), path_base_name(path_b));
    return order ? order : strcmp(path_a, path_b);
}

static void dataset_list_shards(Dataset* dataset, const char* pattern) {
    char* list = strdup_or_die(pattern ? pattern : "");
    char* item = list;
    while (item) {
        char* comma = strchr(item, ',');
        if (comma) {
            *comma = 0;
        }
        dataset_add_item(dataset, item);
        item = comma ? comma + 1 : NULL;
    }
    free(list);
    qsort(dataset->shards, (size_t)dataset->shard_count, sizeof(Shard), shard_compare);
    for (int i = 1; i < dataset->shard_count; i++) {
        check_or(strcmp(dataset->shards[i].path, dataset->shards[i - 1].path) != 0, EXIT_USAGE,
                 "--%s-data '%s' names '%s' twice: its samples would count double; name it once", dataset->split,
                 pattern, dataset->shards[i].path);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// verifying one shard

// the number of tokens by the header, and the width; dies on a header that llm.c would not have written
static void shard_parse_header(Shard* shard, const int32_t* header) {
    check_or(header[0] == SHARD_MAGIC_16 || header[0] == SHARD_MAGIC_32, EXIT_BAD_DATA,
             "'%s' is not a token shard: its magic number is %d, not %d (uint16 tokens) or %d (uint32 tokens); prepare "
             "the data with data/prepare.py", shard->path, header[0], SHARD_MAGIC_16, SHARD_MAGIC_32);
    shard->width = header[0] == SHARD_MAGIC_16 ? 2 : 4;
    int version = shard->width == 2 ? SHARD_VERSION_16 : SHARD_VERSION_32;
    check_or(header[1] == version, EXIT_BAD_DATA,
             "'%s' is a shard of version %d, and only version %d of magic %d is known; prepare it again with "
             "data/prepare.py", shard->path, header[1], version, header[0]);
    shard->count = header[2];
    if (header[2] == -1) {
        shard->count = (int64_t)((uint64_t)(uint32_t)header[4] << 32 | (uint32_t)header[3]);
    }
    check_or(shard->count >= 0 && shard->count < (int64_t)1 << 60, EXIT_BAD_DATA,
             "'%s' says in its header that it holds %lld tokens, which cannot be (from 2^31 tokens on, word 2 is -1 "
             "and words 3 and 4 hold the count); prepare it again with data/prepare.py", shard->path,
             (long long)shard->count);
}

static void shard_open(Shard* shard, int T) {
    shard->fd = open(shard->path, O_RDONLY | O_CLOEXEC);
    check_or(shard->fd >= 0, errno == ENOENT ? EXIT_NO_INPUT : EXIT_IO, "cannot open the token shard '%s': %s%s",
             shard->path, strerror(errno), errno == EMFILE ? "; raise the limit with ulimit -n, or merge shards" : "");
    struct stat info;
    check_or(fstat(shard->fd, &info) == 0, EXIT_IO, "cannot stat '%s': %s", shard->path, strerror(errno));
    check_or(S_ISREG(info.st_mode), EXIT_NO_INPUT, "the token shard '%s' is not a regular file", shard->path);
    check_or(info.st_size >= SHARD_HEADER_BYTES, EXIT_BAD_DATA,
             "'%s' is truncated: a header of %d bytes is expected, and the file has %lld; copy it again or prepare it "
             "again with data/prepare.py", shard->path, SHARD_HEADER_BYTES, (long long)info.st_size);
    int32_t header[SHARD_HEADER_WORDS];
    pread_or_die(shard->fd, header, sizeof header, 0, shard->path);
    shard_parse_header(shard, header);
    int64_t expected = shard_file_bytes(shard), found = info.st_size;
    check_or(found == expected, EXIT_BAD_DATA,
             "'%s' is %s: its header says %lld tokens of %d bytes, so %lld bytes are expected, and %lld were found; "
             "copy it again or prepare it again with data/prepare.py", shard->path,
             found < expected ? "truncated" : "too long", (long long)shard->count, shard->width, (long long)expected,
             (long long)found);
    shard->samples = shard->count > 0 ? (shard->count - 1) / T : 0;
}

// the place of the first of n tokens that is not below vocab_size, or n where all are
static int64_t find_bad_token(const void* tokens, int64_t n, int width, int vocab_size) {
    const uint16_t* narrow = (const uint16_t*)tokens;
    const uint32_t* wide = (const uint32_t*)tokens;
    for (int64_t i = 0; i < n; i++) {
        uint32_t id = width == 2 ? narrow[i] : wide[i];
        if (id >= (uint32_t)vocab_size) {
            return i;
        }
    }
    return n;
}

// tokens of the shard from position on; dies on an id outside the vocabulary. Every token that is used comes this way.
static void shard_read(void* tokens, const Shard* shard, int64_t position, int64_t n, int vocab_size) {
    pread_or_die(shard->fd, tokens, (size_t)n * (size_t)shard->width, SHARD_HEADER_BYTES + position * shard->width,
                 shard->path);
    int64_t bad = find_bad_token(tokens, n, shard->width, vocab_size);
    if (bad < n) {
        uint32_t id = shard->width == 2 ? ((const uint16_t*)tokens)[bad] : ((const uint32_t*)tokens)[bad];
        die(EXIT_BAD_DATA, "'%s' holds token id %u at position %lld, outside the vocabulary of %d: give the "
            "--vocab-size of the tokenizer that wrote it, or prepare the data again", shard->path, id,
            (long long)(position + bad), vocab_size);
    }
}

// Look at every token where the whole set is small, else at chunks evenly spaced from the first to the last.
static void shard_scan(const Shard* shard, const Dataset* dataset, int64_t total_bytes, void* buffer) {
    int64_t chunk = min_i64((dataset->fully_scanned ? SCAN_CHUNK_BYTES : PROBE_BYTES) / shard->width, shard->count);
    int64_t chunks = chunk ? ceil_div(shard->count, chunk) : 0;
    if (!dataset->fully_scanned) {
        int64_t share = (int64_t)((double)PROBES * (double)shard_file_bytes(shard) / (double)total_bytes);
        chunks = min_i64(chunks, max_i64(share, 2));
    }
    for (int64_t i = 0; i < chunks; i++) {
        // in floating point, because the product of positions and chunks may pass 2^63
        double part = chunks > 1 ? (double)i / (double)(chunks - 1) : 0.0;
        int64_t position = dataset->fully_scanned ? i * chunk : (int64_t)(part * (double)(shard->count - chunk));
        shard_read(buffer, shard, position, min_i64(chunk, shard->count - position), dataset->vocab_size);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the dataset

// Every shard stays open for the run, and the usual soft limit is 1024 open files.
static void raise_open_file_limit(int more) {
    struct rlimit limit;
    check(getrlimit(RLIMIT_NOFILE, &limit) == 0, "cannot read the limit of open files: %s", strerror(errno));
    if (limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < limit.rlim_max) {
        rlim_t room = limit.rlim_max - limit.rlim_cur;
        limit.rlim_cur += room < (rlim_t)more ? room : (rlim_t)more;
        check(setrlimit(RLIMIT_NOFILE, &limit) == 0, "cannot raise the limit of open files: %s", strerror(errno));
    }
}

// Find and verify the shards of --<split>-data. pattern is a glob pattern, a folder, or a comma-separated list of
// those; split ("train" or "val", kept by reference) is what folders are searched for.
static void dataset_open(Dataset* dataset, const char* pattern, const char* split, int T, int vocab_size,
                         uint64_t seed) {
    check(T > 0 && vocab_size > 0, "internal: dataset of T %d and vocabulary %d", T, vocab_size);
    *dataset = Dataset{};
    dataset->split = split;
    dataset->T = T;
    dataset->vocab_size = vocab_size;
    dataset->seed = seed;
    dataset_list_shards(dataset, pattern);
    raise_open_file_limit(dataset->shard_count);
    int64_t total_bytes = 0, longest = 0;
    for (int i = 0; i < dataset->shard_count; i++) {
        Shard* shard = &dataset->shards[i];
        shard_open(shard, T);
        shard->first_sample = dataset->samples;
        dataset->samples += shard->samples;
        dataset->tokens += shard->count;
        longest = max_i64(longest, shard->count);
        total_bytes += shard_file_bytes(shard);
    }
    check_or(dataset->samples > 0, EXIT_BAD_DATA,
             "--%s-data '%s' holds not one sample: a sample of --seq-len %d takes %d tokens, and the longest of %d "
             "shard(s) has %lld; give more text or a smaller --seq-len", split, pattern, T, T + 1, dataset->shard_count,
             (long long)longest);
    dataset->fully_scanned = total_bytes <= SCAN_LIMIT_BYTES;
    void* buffer = malloc_or_die(SCAN_CHUNK_BYTES, "checking token ids");
    for (int i = 0; i < dataset->shard_count; i++) {
        shard_scan(&dataset->shards[i], dataset, total_bytes, buffer);
    }
    free(buffer);
}

static void dataset_close(Dataset* dataset) {
    for (int i = 0; i < dataset->shard_count; i++) {
        check(close(dataset->shards[i].fd) == 0, "cannot close '%s': %s", dataset->shards[i].path, strerror(errno));
        free(dataset->shards[i].path);
    }
    free(dataset->shards);
    *dataset = Dataset{};
}

static uint64_t fnv1a_64(uint64_t hash, const void* memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        hash = (hash ^ ((const uint8_t*)memory)[i]) * 0x100000001B3ull;
    }
    return hash;
}

// Is this the data that the checkpoint was trained on? Covers each shard's file name (not its folder), token count,
// width, and first and last 4 KiB; not the bytes between, which would take minutes to read.
static uint64_t dataset_fingerprint(const Dataset* dataset) {
    uint64_t hash = 0xCBF29CE484222325ull;
    uint8_t edge[4096];
    for (int i = 0; i < dataset->shard_count; i++) {
        const Shard* shard = &dataset->shards[i];
        const char* name = path_base_name(shard->path);
        int64_t bytes = shard_file_bytes(shard);
        size_t edge_bytes = (size_t)min_i64(bytes, sizeof edge);
        hash = fnv1a_64(hash, name, strlen(name) + 1);
        hash = fnv1a_64(hash, &shard->count, sizeof shard->count);
        hash = fnv1a_64(hash, &shard->width, sizeof shard->width);
        pread_or_die(shard->fd, edge, edge_bytes, 0, shard->path);
        hash = fnv1a_64(hash, edge, edge_bytes);
        pread_or_die(shard->fd, edge, edge_bytes, bytes - (int64_t)edge_bytes, shard->path);
        hash = fnv1a_64(hash, edge, edge_bytes);
    }
    return hash;
}

// ---------------------------------------------------------------------------------------------------------------------
// reading samples

// inputs, targets (T) = sample number `sample`;  scratch holds T+1 tokens of any width
static void dataset_read_sample(int32_t* inputs, int32_t* targets, void* scratch, const Dataset* dataset,
                                int64_t sample) {
    check(sample >= 0 && sample < dataset->samples, "internal: sample %lld of %lld", (long long)sample,
          (long long)dataset->samples);
    int low = 0, high = dataset->shard_count;   // the last shard with first_sample <= sample is in low .. high-1
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (dataset->shards[middle].first_sample <= sample) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const Shard* shard = &dataset->shards[low];
    int T = dataset->T;
    struct stat info;
    check_or(fstat(shard->fd, &info) == 0, EXIT_IO, "cannot stat '%s': %s", shard->path, strerror(errno));
    check_or(info.st_size == shard_file_bytes(shard), EXIT_BAD_DATA,
             "'%s' was changed during the run: it had %lld bytes at the start and has %lld now; restore it and start "
             "the same command again", shard->path, (long long)shard_file_bytes(shard), (long long)info.st_size);
    shard_read(scratch, shard, (sample - shard->first_sample) * T, T + 1, dataset->vocab_size);
    for (int t = 0; t <= T; t++) {
        int32_t id = shard->width == 2 ? ((const uint16_t*)scratch)[t] : ((const int32_t*)scratch)[t];
        if (t < T) {
            inputs[t] = id;
        }
        if (t > 0) {
            targets[t - 1] = id;
        }
    }
}

// the sample that the run visits as its g-th
static int64_t dataset_sample_at(const Dataset* dataset, int64_t g) {
    check(g >= 0, "internal: sample %lld of the run", (long long)g);
    uint64_t N = (uint64_t)dataset->samples;
    uint64_t epoch = (uint64_t)g / N;
    return (int64_t)permute_index(dataset->seed, rand_stream(RAND_SHUFFLE, 0, 0, epoch), (uint64_t)g % N, N);
}

static void* sample_scratch(const Dataset* dataset) {
    return malloc_or_die(((size_t)dataset->T + 1) * sizeof(uint32_t), "reading samples");
}

// inputs, targets (B, T) = visits g0 .. g0+B-1 of the run
static void data_read(const Dataset* dataset, int32_t* inputs, int32_t* targets, int64_t g0, int B) {
    void* scratch = sample_scratch(dataset);
    for (int b = 0; b < B; b++) {
        size_t row = (size_t)b * (size_t)dataset->T;
        dataset_read_sample(inputs + row, targets + row, scratch, dataset, dataset_sample_at(dataset, g0 + b));
    }
    free(scratch);
}

// For validation: inputs, targets (B, T) = rows v0 .. v0+B-1 of `total` samples spaced evenly over the whole set. They
// are the same at each validation and for each number of ranks. total > N repeats samples, each about total / N times.
static void data_read_even(const Dataset* dataset, int32_t* inputs, int32_t* targets, int64_t v0, int B,
                           int64_t total) {
    check(v0 >= 0 && v0 + B <= total && total <= INT64_MAX / dataset->samples, "internal: rows %lld + %d of %lld",
          (long long)v0, B, (long long)total);
    void* scratch = sample_scratch(dataset);
    for (int b = 0; b < B; b++) {
        size_t row = (size_t)b * (size_t)dataset->T;
        dataset_read_sample(inputs + row, targets + row, scratch, dataset, (v0 + b) * dataset->samples / total);
    }
    free(scratch);
}

// ---------------------------------------------------------------------------------------------------------------------
// the loader: a thread that reads the next micro-batches while the present one is computed

// How the samples of a run are dealt to ranks. Micro-batch a of step s on rank r of R, with A micro-batches a step,
// holds visits s*(B*R*A) + a*(B*R) + r*B ... +B-1. Counting a rank's micro-batches through, m = s*A + a, that is
// m*(B*R) + r*B: A drops out.
typedef struct {
    int B;            // rows of a micro-batch
    int rank, ranks;
    int64_t g0;       // the visit at which the first step of this start begins, for all ranks: step * samples a step
} LoaderPlan;

// the first visit in micro-batch m = 0, 1, ... of this start
static int64_t loader_plan_visit(const LoaderPlan* plan, int64_t m) {
    return plan->g0 + (m * plan->ranks + plan->rank) * plan->B;
}

enum { LOADER_SLOTS = 4 };

typedef struct {
    const Dataset* dataset;
    LoaderPlan plan;
    int32_t* inputs[LOADER_SLOTS];    // (B, T); micro-batch m lies in slot m % LOADER_SLOTS
    int32_t* targets[LOADER_SLOTS];   // (B, T)
    int64_t filled;                   // micro-batches read so far       } guarded
    int64_t taken;                    // micro-batches handed out so far } by
    int stopping;                     //                                 } mutex
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t thread;
} DataLoader;

static void* loader_run(void* argument) {
    DataLoader* loader = (DataLoader*)argument;
    for (int64_t m = 0;; m++) {
        pthread_or_die(pthread_mutex_lock(&loader->mutex), "pthread_mutex_lock");
        while (!loader->stopping && m - loader->taken >= LOADER_SLOTS) {
            pthread_or_die(pthread_cond_wait(&loader->changed, &loader->mutex), "pthread_cond_wait");
        }
        int stopping = loader->stopping;
        pthread_or_die(pthread_mutex_unlock(&loader->mutex), "pthread_mutex_unlock");
        if (stopping) {
            return NULL;
        }
        int slot = (int)(m % LOADER_SLOTS);   // free: only loader_next reads it, and not before m < filled
        data_read(loader->dataset, loader->inputs[slot], loader->targets[slot], loader_plan_visit(&loader->plan, m),
                  loader->plan.B);
        pthread_or_die(pthread_mutex_lock(&loader->mutex), "pthread_mutex_lock");
        loader->filled = m + 1;
        pthread_or_die(pthread_cond_broadcast(&loader->changed), "pthread_cond_broadcast");
        pthread_or_die(pthread_mutex_unlock(&loader->mutex), "pthread_mutex_unlock");
    }
}

// dataset must outlive the loader. A read error in the thread ends the process with its message and exit code.
static DataLoader* loader_start(const Dataset* dataset, const LoaderPlan* plan) {
    check(plan->B > 0 && plan->rank >= 0 && plan->rank < plan->ranks && plan->g0 >= 0,
          "internal: loader of batch %d, rank %d of %d, from sample %lld", plan->B, plan->rank, plan->ranks,
          (long long)plan->g0);
    DataLoader* loader = (DataLoader*)calloc_or_die(sizeof(DataLoader), "the data loader");
    loader->dataset = dataset;
    loader->plan = *plan;
    size_t bytes = (size_t)plan->B * (size_t)dataset->T * sizeof(int32_t);
    for (int i = 0; i < LOADER_SLOTS; i++) {
        loader->inputs[i] = (int32_t*)malloc_or_die(bytes, "the data loader");
        loader->targets[i] = (int32_t*)malloc_or_die(bytes, "the data loader");
    }
    pthread_or_die(pthread_mutex_init(&loader->mutex, NULL), "pthread_mutex_init");
    pthread_or_die(pthread_cond_init(&loader->changed, NULL), "pthread_cond_init");
    // SIGTERM and SIGUSR1 are for the main thread: the loader inherits a mask that blocks everything
    sigset_t all, before;
    sigfillset(&all);
    pthread_or_die(pthread_sigmask(SIG_SETMASK, &all, &before), "pthread_sigmask");
    pthread_or_die(pthread_create(&loader->thread, NULL, loader_run, loader), "pthread_create");
    pthread_or_die(pthread_sigmask(SIG_SETMASK, &before, NULL), "pthread_sigmask");
    return loader;
}

// inputs, targets (B, T) = the next micro-batch of the plan; waits until it is read
static void loader_next(DataLoader* loader, int32_t* inputs, int32_t* targets) {
    pthread_or_die(pthread_mutex_lock(&loader->mutex), "pthread_mutex_lock");
    while (loader->filled <= loader->taken) {
        pthread_or_die(pthread_cond_wait(&loader->changed, &loader->mutex), "pthread_cond_wait");
    }
    int slot = (int)(loader->taken % LOADER_SLOTS);
    pthread_or_die(pthread_mutex_unlock(&loader->mutex), "pthread_mutex_unlock");
    size_t bytes = (size_t)loader->plan.B * (size_t)loader->dataset->T * sizeof(int32_t);
    memcpy(inputs, loader->inputs[slot], bytes);
    memcpy(targets, loader->targets[slot], bytes);
    pthread_or_die(pthread_mutex_lock(&loader->mutex), "pthread_mutex_lock");
    loader->taken++;   // from here on the thread may overwrite the slot
    pthread_or_die(pthread_cond_broadcast(&loader->changed), "pthread_cond_broadcast");
    pthread_or_die(pthread_mutex_unlock(&loader->mutex), "pthread_mutex_unlock");
}

static void loader_stop(DataLoader* loader) {
    pthread_or_die(pthread_mutex_lock(&loader->mutex), "pthread_mutex_lock");
    loader->stopping = 1;
    pthread_or_die(pthread_cond_broadcast(&loader->changed), "pthread_cond_broadcast");
    pthread_or_die(pthread_mutex_unlock(&loader->mutex), "pthread_mutex_unlock");
    pthread_or_die(pthread_join(loader->thread, NULL), "pthread_join");
    pthread_or_die(pthread_cond_destroy(&loader->changed), "pthread_cond_destroy");
    pthread_or_die(pthread_mutex_destroy(&loader->mutex), "pthread_mutex_destroy");
    for (int i = 0; i < LOADER_SLOTS; i++) {
        free(loader->inputs[i]);
        free(loader->targets[i]);
    }
    free(loader);
}
