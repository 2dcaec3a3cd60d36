// ranks.h: what the ranks of a run make sure of at the start, each within seconds: the same program, the same options,
// the same data, a GPU of their own, an output folder that all see. Who differs is named, and all exit.
#pragma once
#include "run.h"

// program, precision and options, before anything follows from them
static void ranks_agree_options(const Comm* comm, const Config* config) {
    char *text = NULL, value[4096], error[256];
    size_t bytes = 0;
    uint64_t binary = 0;
    int64_t binary_bytes = 0;
    if (comm->size == 1) {
        return;
    }
    xxh64_file(&binary, &binary_bytes, "/proc/self/exe", NULL, error, sizeof error);
    FILE* file = open_memstream(&text, &bytes);
    check_or(file, EXIT_NO_MEMORY, "out of memory for the list of options");
    fprintf(file, "version %s, %s, binary %016llx\n", PROGRAM_VERSION, FLOATX_NAME, (unsigned long long)binary);
    for (int id = 0; id < KNOB_COUNT_ALL; id++) {
        char option[64];
        if (id != ID_config) {
            fprintf(file, "--%s %s\n", knob_option(id, option), knob_value(config, id, value, sizeof value));
        }
    }
    fclose(file);
    comm_agree(comm, text, EXIT_USAGE, "program or options", "start all ranks with the same binary and options");
    free(text);
}

static void ranks_agree_data(const Comm* comm, const Dataset* data) {
    char text[256];
    snprintf(text, sizeof text, "%d shards, %lld tokens, fingerprint %016llx", data->shard_count,
             (long long)data->tokens, (unsigned long long)dataset_fingerprint(data));
    comm_agree(comm, text, EXIT_BAD_DATA, data->split[0] == 't' ? "the training data" : "the validation data",
               "give all hosts the same shards");
}

typedef struct { int rank, on_cpu; char host[64], device[160], id[32]; } RankPlace;

static int rank_place_compare(const void* a, const void* b) {
    const RankPlace *x = (const RankPlace*)a, *y = (const RankPlace*)b;
    int order = strcmp(x->host, y->host);
    order = order ? order : strcmp(x->id, y->id);
    return order ? order : x->rank - y->rank;
}

// the two ranks of lowest number that share a device, in `pair`; 0 where none do
static int ranks_find_shared(RankPlace* places, int size, RankPlace pair[2]) {
    int found = 0;
    qsort(places, (size_t)size, sizeof *places, rank_place_compare);
    for (int i = 1; i < size && !found; i++) {
        found = places[i].id[0] && !strcmp(places[i].id, places[i - 1].id) &&
                !strcmp(places[i].host, places[i - 1].host);
        pair[0] = places[i - 1], pair[1] = places[i];
    }
    return found;
}

// Who computes where, printed once; a GPU that two ranks use, and ranks on CPUs beside ranks on GPUs, end the run.
static void ranks_print(const Comm* comm, const Ops* ops) {
    RankPlace mine = {}, pair[2];
    if (comm->size == 1) {
        return;
    }
    mine.rank = comm->rank;
    mine.on_cpu = ops->shares_memory;
    memcpy(mine.host, comm->host, sizeof mine.host);
    ops->describe(mine.device, sizeof mine.device);
    ops->identify(mine.id, sizeof mine.id);
    RankPlace* places = (RankPlace*)calloc_or_die(sizeof mine * (size_t)comm->size, "the table of ranks");
    comm_gather(comm, places, &mine, sizeof mine);
    printf("ranks      %d, collectives by %s\n", comm->size, ops->shares_memory ? "MPI" : "NCCL");
    for (int r = 0; comm->rank == 0 && r < comm->size; r++) {
        printf("  rank %-5d %-16s %s%s%s\n", r, places[r].host, places[r].device, places[r].id[0] ? ", " : "",
               places[r].id);
    }
    fflush(stdout);
    char message[320] = "";
    int mixed = 0;
    for (int r = 1; comm->rank == 0 && r < comm->size && !mixed; r++) {
        mixed = places[r].on_cpu != places[0].on_cpu;
        snprintf(message, sizeof message, "rank %d (%s) has %s, rank 0 (%s) %s; --device cuda says why there is no GPU",
                 r, places[r].host, places[r].on_cpu ? "no GPU" : "a GPU", places[0].host,
                 places[0].on_cpu ? "none" : "has one");
    }
    int shared = comm->rank == 0 && !mixed && ranks_find_shared(places, comm->size, pair);
    if (shared) {
        snprintf(message, sizeof message, "rank %d and rank %d both use the GPU at %s of host %s; start one rank a GPU",
                 pair[0].rank, pair[1].rank, pair[0].id, pair[0].host);
    }
    if (comm_max_of(comm, shared || mixed)) {
        comm_die(comm, EXIT_NO_DEVICE, message);
    }
    free(places);
}

// Rank 0 holds OUT/lock; the others must see what it wrote there.
static void ranks_lock(Run* run) {
    const Comm* comm = &run->comm;
    uint64_t token = rand_u64((uint64_t)time(NULL), (uint64_t)getpid(), 99), seen = 0;
    if (comm->rank == 0) {
        run_lock(run);
    }
    if (comm->rank == 0 && comm->size > 1) {
        check_or(pwrite(run->lock, &token, sizeof token, 0) == (ssize_t)sizeof token && fsync(run->lock) == 0, EXIT_IO,
                 "cannot write '%s/lock': %s", run->out, strerror(errno));
    }
    comm_broadcast(comm, &token, sizeof token, 0);
    if (comm->rank > 0) {
        char* path = format_string("%s/lock", run->out);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        int same = fd >= 0 && pread(fd, &seen, sizeof seen, 0) == (ssize_t)sizeof seen && seen == token;
        check_or(same, EXIT_USAGE,
                 "this host does not see the folder --out '%s' of rank 0; it must lie on a file system that all hosts "
                 "share",
                 run->out);
        close(fd);
        free(path);
    }
}

// --plant FAULT:RANK:STEP: is it this fault, on this rank, in the step that begins after `step` steps?
static int ranks_planted(const Comm* comm, const Config* config, const char* fault, int64_t step) {
    char kind[16] = "";
    long long rank = -1, at = -1;
    if (!config->plant[0]) {
        return 0;
    }
    int parts = sscanf(config->plant, "%15[a-z]:%lld:%lld", kind, &rank, &at);
    check_or(parts == 3 && (!strcmp(kind, "nan") || !strcmp(kind, "hang")), EXIT_USAGE,
             "--plant is '%s', but must be nan:RANK:STEP or hang:RANK:STEP", config->plant);
    return !strcmp(kind, fault) && rank == comm->rank && at == step + 1;
}
