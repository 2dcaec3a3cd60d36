// comm.h: ranks: who we are, what all ranks agree on, and collective operations on device memory.
//
// Host side: MPI. A run of one process needs none of it: MPI is initialized only where a launcher (mpirun, srun) says
// that it started several. Device side: a table of collectives (CommOps), by MPI where the backend computes in host
// memory (CPU ranks), by NCCL on GPUs (cuda/comm.cuh). MPI's sums are taken in the order of ranks, NCCL's in its own. A
// run on the same number of ranks is the same to the bit. With one rank everything here is a no-op.
//
// Only the main thread communicates. A rank that dies with a message ends all others with its exit code.
#pragma once
#include "ops.h"
#include "slices.h"
#include "xxh64.h"
#ifdef USE_MPI
#include <mpi.h>
#endif

typedef struct Comm Comm;

// Collectives on device memory. They are given work like the backend; begin: what follows waits for what the backend
// was given so far; wait: what the backend is given from now on waits for all that was given here. Between the two a
// device may run both side by side. Slices are range_slice's.
typedef struct {
    const char* name;
    void (*begin)(void);
    void (*wait)(void);
    // x (count): slice `rank` of it = the sum over all ranks, taken from values rounded to `wire`; the rest of x is
    // undefined then
    void (*reduce_scatter)(const Comm* comm, RealArray x, size_t count, RealType wire);
    // x (count): every rank's slice of it, on all ranks
    void (*all_gather)(const Comm* comm, RealArray x, size_t count);
    // *out = the sum of values (n) of all ranks, the same on all; out may be values
    void (*sum)(const Comm* comm, double* out, const double* values, int n);
    const char* (*fault)(void);  // what went wrong asynchronously, or NULL; any thread may ask
} CommOps;

struct Comm {
    int rank, size;
    int local_rank, local_size;  // among the ranks of this host
    const CommOps* ops;          // NULL where size is 1
    char host[64];
};
static const Comm COMM_SINGLE = {.rank = 0, .size = 1, .local_rank = 0, .local_size = 1, .ops = NULL, .host = {}};

// ---------------------------------------------------------------------------------------------------------------------
// start

// How many processes a launcher says it started; 0: it started this one, but does not say; 1: no launcher
static int launcher_size(void) {
    const char* names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (int i = 0; i < 3; i++) {
        const char* value = getenv(names[i]);
        if (value) {
            return max_int(1, atoi(value));
        }
    }
    return getenv("PMIX_RANK") || getenv("PMI_RANK") ? 0 : 1;
}

#ifdef USE_MPI
static void mpi_check_at(int error, const char* call) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    if (error != MPI_SUCCESS) {
        MPI_Error_string(error, text, &length);
        die(EXIT_UNEXPECTED, "%s: %s; was another rank lost?", call, text);
    }
}
#define mpi_check(call) mpi_check_at((call), #call)

// for die: the launcher ends all ranks and returns this code; an alarm, should that not come back
static void comm_abort(int exit_code) {
    signal(SIGALRM, SIG_DFL);
    alarm(4);
    MPI_Abort(MPI_COMM_WORLD, exit_code);
    _exit(exit_code);
}
#endif

static Comm comm_init(void) {
    Comm comm = COMM_SINGLE;
    int started = launcher_size();
    gethostname(comm.host, sizeof comm.host - 1);
#ifdef USE_MPI
    if (started != 1) {
        int provided;
        MPI_Comm local;
        check_or(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) == MPI_SUCCESS, EXIT_UNEXPECTED,
                 "MPI does not start; start with mpirun, or with srun --mpi=pmix");
        MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
        mpi_check(MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank));
        mpi_check(MPI_Comm_size(MPI_COMM_WORLD, &comm.size));
        check_or(!started || comm.size == started, EXIT_USAGE,
                 "started as %d processes, but MPI knows of %d; start with the mpirun of the MPI this was built with, "
                 "or with srun --mpi=pmix",
                 started, comm.size);
        mpi_check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, comm.rank, MPI_INFO_NULL, &local));
        mpi_check(MPI_Comm_rank(local, &comm.local_rank));
        mpi_check(MPI_Comm_size(local, &comm.local_size));
        mpi_check(MPI_Comm_free(&local));
        if (comm.rank > 0) {
            snprintf(process.name, sizeof process.name, "rank %d (%s): ", comm.rank, comm.host);
            check(freopen("/dev/null", "w", stdout), "cannot open /dev/null");  // rank 0 speaks for all
        }
        process.end_all = comm_abort;
    }
#else
    check_or(started == 1, EXIT_USAGE,
             "started as %d processes, but this binary was built without MPI and trains in one; install MPI "
             "(apt-get install libopenmpi-dev openmpi-bin) and run make again, or start one process without a launcher",
             started);
#endif
    return comm;
}

// ---------------------------------------------------------------------------------------------------------------------
// host memory: small things that all ranks must know

static void comm_barrier(const Comm* comm) {
#ifdef USE_MPI
    if (comm->size > 1) {
        mpi_check(MPI_Barrier(MPI_COMM_WORLD));
    }
#endif
    (void)comm;
}

// each of values (n) becomes the largest of all ranks
static void comm_max(const Comm* comm, int64_t* values, int n) {
#ifdef USE_MPI
    if (comm->size > 1) {
        mpi_check(MPI_Allreduce(MPI_IN_PLACE, values, n, MPI_INT64_T, MPI_MAX, MPI_COMM_WORLD));
    }
#endif
    (void)comm, (void)values, (void)n;
}

static int64_t comm_max_of(const Comm* comm, int64_t value) {
    comm_max(comm, &value, 1);
    return value;
}
static int64_t comm_min_of(const Comm* comm, int64_t value) { return -comm_max_of(comm, -value); }

static void comm_broadcast(const Comm* comm, void* data, size_t bytes, int root) {
#ifdef USE_MPI
    if (comm->size > 1) {
        check(bytes <= INT_MAX, "internal: a broadcast of %zu bytes", bytes);
        mpi_check(MPI_Bcast(data, (int)bytes, MPI_BYTE, root, MPI_COMM_WORLD));
    }
#endif
    (void)comm, (void)data, (void)bytes, (void)root;
}

// all (size * bytes), on rank 0 only: mine of every rank
static void comm_gather(const Comm* comm, void* all, const void* mine, size_t bytes) {
    if (comm->size == 1) {
        memcpy(all, mine, bytes);
        return;
    }
#ifdef USE_MPI
    mpi_check(MPI_Gather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, 0, MPI_COMM_WORLD));
#endif
}

// the sum over all ranks, in their order
static double comm_sum_of(const Comm* comm, double value) {
    double sum = value;
#ifdef USE_MPI
    if (comm->size > 1) {
        double* all = (double*)malloc_or_die(sizeof(double) * (size_t)comm->size, "a sum over ranks");
        mpi_check(MPI_Allgather(&value, 1, MPI_DOUBLE, all, 1, MPI_DOUBLE, MPI_COMM_WORLD));
        sum = 0.0;
        for (int r = 0; r < comm->size; r++) {
            sum += all[r];
        }
        free(all);
    }
#endif
    (void)comm;
    return sum;
}

// root's heap string on all ranks; the others pass NULL and free theirs
static char* comm_broadcast_text(const Comm* comm, char* text, int root) {
    int64_t length = comm->rank == root ? (int64_t)strlen(text) : 0;
    comm_broadcast(comm, &length, sizeof length, root);
    if (comm->rank != root) {
        text = (char*)calloc_or_die((size_t)length + 1, "a text");
    }
    comm_broadcast(comm, text, (size_t)length, root);
    return text;
}

// error: a text, empty where this rank has none. 1 where any rank has one: then all hold that of the first such rank.
static int comm_any_error(const Comm* comm, char* error, size_t bytes) {
    int64_t first = -comm_max_of(comm, error[0] ? -(int64_t)comm->rank : -INT64_MAX);
    if (first == INT64_MAX) {
        return 0;
    }
    comm_broadcast(comm, error, bytes, (int)first);
    return 1;
}

// the last thing that all ranks do together; the caller exits with code
static int comm_end(const Comm* comm, int code) {
    fflush(stdout);
    comm_barrier(comm);
    if (process.leave) {
        process.leave();
    }
#ifdef USE_MPI
    if (comm->size > 1) {
        process.end_all = NULL;
        mpi_check(MPI_Finalize());
    }
#endif
    return code;
}

// The same exit code on all ranks, after a line by rank 0 and a barrier
[[noreturn]] static void comm_die(const Comm* comm, int code, const char* message) {
    if (comm->rank == 0) {
        fflush(stdout);
        fprintf(stderr, "train_llama: %s\n", message);
        fflush(stderr);
    }
    exit(comm_end(comm, code));
}

// the first line in which b differs from a, both to be freed
static void first_difference(const char* a, const char* b, char** line_a, char** line_b) {
    while (*a && *b) {
        size_t n = strcspn(a, "\n"), m = strcspn(b, "\n");
        if (n != m || memcmp(a, b, n)) {
            break;
        }
        a += n + (a[n] == '\n'), b += m + (b[m] == '\n');
    }
    *line_a = format_string("%.*s", (int)strcspn(a, "\n"), a);
    *line_b = format_string("%.*s", (int)strcspn(b, "\n"), b);
}

// All ranks must hold the same text. Otherwise the first that differs from rank 0 is named with the line that differs,
// and all exit. what: of which the text consists; remedy: what to do.
static void comm_agree(const Comm* comm, const char* text, int code, const char* what, const char* remedy) {
    if (comm->size == 1) {
        return;
    }
    Xxh64 hash = xxh64_begin(0);
    xxh64_update(&hash, text, strlen(text));
    uint64_t mine = xxh64_end(&hash);
    uint64_t* all = (uint64_t*)malloc_or_die(sizeof mine * (size_t)comm->size, "an agreement");
    int64_t other = 0;
    comm_gather(comm, all, &mine, sizeof mine);
    for (int r = comm->size - 1; comm->rank == 0 && r > 0; r--) {
        other = all[r] != mine ? r : other;
    }
    free(all);
    comm_broadcast(comm, &other, sizeof other, 0);
    if (other == 0) {
        return;
    }
    char *theirs = comm_broadcast_text(comm, comm->rank == other ? strdup_or_die(text) : NULL, (int)other), *a, *b;
    char* host = comm_broadcast_text(comm, comm->rank == other ? strdup_or_die(comm->host) : NULL, (int)other);
    first_difference(text, theirs, &a, &b);
    char* message = format_string("rank %d (%s) differs from rank 0 (%s) in %s: '%s', not '%s'; %s", (int)other, host,
                                  comm->host, what, b, a, remedy);
    comm_die(comm, code, message);
}

// ---------------------------------------------------------------------------------------------------------------------
// device memory that is host memory: collectives by MPI

#ifdef USE_MPI
#define MPI_CHUNK ((size_t)4 << 20)  // elements that a rank sends at a time, to all

static void mpi_nothing(void) {}
static const char* mpi_no_fault(void) { return NULL; }

// n elements of x from `first` on, in the type they travel in
static void wire_pack(char* out, RealArray x, size_t first, size_t n, RealType wire) {
    size_t width = real_bytes(wire);
    if (wire == x.type) {
        memcpy(out, (const char*)x.data + first * width, n * width);
        return;
    }
    RealArray packed = {wire, out};
    for (size_t i = 0; i < n; i++) {
        real_set(packed, i, real_get(x, first + i));
    }
}

static void mpi_reduce_scatter(const Comm* comm, RealArray x, size_t count, RealType wire) {
    int size = comm->size;
    size_t width = real_bytes(wire), chunk = max_size(1024, MPI_CHUNK / (size_t)size);
    Range whole = {0, count}, mine = range_slice(whole, comm->rank, size);
    size_t rounds = (size_t)ceil_div((int64_t)range_slice(whole, size - 1, size).count, (int64_t)chunk);  // the longest
    char* send = (char*)malloc_or_die(chunk * width * (size_t)size, "gradients on their way");
    char* receive = (char*)malloc_or_die(chunk * width * (size_t)size, "gradients on their way");
    int* counts = (int*)malloc_or_die(4 * sizeof(int) * (size_t)size, "gradients on their way");
    int *send_at = counts + size, *receive_counts = send_at + size, *receive_at = receive_counts + size;
    for (size_t k = 0; k < rounds; k++) {
        size_t sent = 0;
        Range part = range_overlap(Range{mine.begin + k * chunk, chunk}, mine);
        for (int r = 0; r < size; r++) {
            Range theirs = range_slice(whole, r, size);
            Range piece = range_overlap(Range{theirs.begin + k * chunk, chunk}, theirs);
            counts[r] = (int)(piece.count * width), send_at[r] = (int)(sent * width);
            receive_counts[r] = (int)(part.count * width), receive_at[r] = (int)((size_t)r * part.count * width);
            wire_pack(send + sent * width, x, piece.begin, piece.count, wire);
            sent += piece.count;
        }
        mpi_check(MPI_Alltoallv(send, counts, send_at, MPI_BYTE, receive, receive_counts, receive_at, MPI_BYTE,
                                MPI_COMM_WORLD));
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < part.count; i++) {
            float sum = 0.0f;
            for (int r = 0; r < size; r++) {
                sum += real_get(RealArray{wire, receive}, (size_t)r * part.count + i);
            }
            real_set(x, part.begin + i, sum);
        }
    }
    free(send);
    free(receive);
    free(counts);
}

static void mpi_all_gather(const Comm* comm, RealArray x, size_t count) {
    int size = comm->size;
    check(count < INT_MAX, "internal: %zu elements at once", count);
    int* counts = (int*)malloc_or_die(2 * sizeof(int) * (size_t)size, "parameters on their way");
    for (int r = 0; r < size; r++) {
        Range slice = range_slice(Range{0, count}, r, size);
        counts[r] = (int)slice.count, counts[size + r] = (int)slice.begin;
    }
    MPI_Datatype type = real_bytes(x.type) == 2 ? MPI_UINT16_T : MPI_FLOAT;
    mpi_check(MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, x.data, counts, counts + size, type, MPI_COMM_WORLD));
    free(counts);
}

static void mpi_sum(const Comm* comm, double* out, const double* values, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) {
        sum += values[i];
    }
    *out = comm_sum_of(comm, sum);
}

static const CommOps MPI_OPS = {
    .name = "MPI",
    .begin = mpi_nothing,
    .wait = mpi_nothing,
    .reduce_scatter = mpi_reduce_scatter,
    .all_gather = mpi_all_gather,
    .sum = mpi_sum,
    .fault = mpi_no_fault,
};
#endif
