// common.h: errors, exit codes, checked libc calls, exact arithmetic on sizes, the clock.
//
// Contract: nothing in this program fails silently. check() is always on; die() prints one line that names what is
// wrong, with the values, and what to do, and ends the process with a documented exit code. Every libc call that can
// fail goes through a wrapper here or is checked where it stands.
#pragma once
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

// The exit codes that the README documents. Scripts depend on them: a number never changes its meaning.
enum ExitCode {
    EXIT_DONE = 0,
    EXIT_UNEXPECTED = 1,   // a check that should never fail; a rank was lost
    EXIT_USAGE = 2,        // an option is unknown, malformed or impossible
    EXIT_BAD_DATA = 65,    // a file is there but damaged or does not fit
    EXIT_NO_INPUT = 66,    // a file or folder is missing
    EXIT_NO_DEVICE = 69,   // GPU or NCCL unavailable
    EXIT_SELF_TEST = 70,   // the device does not compute what the recipe says
    EXIT_NO_MEMORY = 71,
    EXIT_IO = 74,          // writing or reading failed: full disk, no permission
    EXIT_REQUEUE = 75,     // checkpoint saved on request: start the same command again
    EXIT_NUMERICS = 76,    // too many non-finite steps in a row
    EXIT_LOCKED = 77,      // another run owns the output folder
    EXIT_HANG = 124,
};

// functions that kernels call, too
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))

// Of several processes: who this one is ("rank 2 (node7): ", rank 0 needs no name), what ends all of them, and what
// each does when all leave.
typedef struct { char name[96]; void (*end_all)(int exit_code); void (*leave)(void); } Process;
static Process process;

[[noreturn]] static void die(int exit_code, const char* format, ...) PRINTF_LIKE(2, 3);
[[noreturn]] static void die(int exit_code, const char* format, ...) {
    char line[8192];
    fflush(stdout);
    if (process.name[0]) {  // where all ranks fail alike, rank 0 has ended them by then and its line stands alone
        signal(SIGTERM, SIG_DFL);
        sleep(1);
    }
    int used = snprintf(line, sizeof line, "train_llama: %s", process.name);
    va_list args;
    va_start(args, format);
    vsnprintf(line + used, sizeof line - (size_t)used - 1, format, args);
    va_end(args);
    strcat(line, "\n");
    fputs(line, stderr);  // unbuffered: one write, so that lines of several processes do not mix
    fflush(stderr);
    if (process.end_all) {
        process.end_all(exit_code);
    }
    exit(exit_code);
}

// check: an impossible state is a bug of ours (exit 1). check_or: the user can cause it, and the code says how it ends.
#define check(cond, ...) do { if (!(cond)) { die(EXIT_UNEXPECTED, __VA_ARGS__); } } while (0)
#define check_or(cond, exit_code, ...) do { if (!(cond)) { die(exit_code, __VA_ARGS__); } } while (0)

// ---------------------------------------------------------------------------------------------------------------------
// arithmetic on sizes

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// a / b where the caller has promised that it divides
static inline int64_t exact_div(int64_t a, int64_t b) {
    check(b != 0 && a % b == 0, "internal: %lld is not a multiple of %lld", (long long)a, (long long)b);
    return a / b;
}

// ---------------------------------------------------------------------------------------------------------------------
// checked libc

static void* malloc_or_die(size_t bytes, const char* what) {
    void* memory = malloc(bytes ? bytes : 1);
    check_or(memory, EXIT_NO_MEMORY, "out of memory: %.1f MiB for %s; a smaller --batch-size or model needs less",
             (double)bytes / 1048576.0, what);
    return memory;
}

static void* calloc_or_die(size_t bytes, const char* what) {
    void* memory = calloc(bytes ? bytes : 1, 1);
    check_or(memory, EXIT_NO_MEMORY, "out of memory: %.1f MiB for %s; a smaller --batch-size or model needs less",
             (double)bytes / 1048576.0, what);
    return memory;
}

static void pthread_or_die(int result, const char* what) {
    check(result == 0, "%s failed: %s", what, strerror(result));
}

static char* strdup_or_die(const char* text) {
    char* copy = (char*)malloc_or_die(strlen(text) + 1, "a string");
    strcpy(copy, text);
    return copy;
}

// a heap string made like printf; the caller frees it
static char* format_string(const char* format, ...) PRINTF_LIKE(1, 2);
static char* format_string(const char* format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    char* text = (char*)malloc_or_die((size_t)length + 1, "a string");
    vsnprintf(text, (size_t)length + 1, format, again);
    va_end(again);
    return text;
}

static inline int starts_with(const char* text, const char* prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

static int path_is_file(const char* path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

static int path_is_folder(const char* path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

static FILE* fopen_or_die(const char* path, const char* mode) {
    FILE* file = fopen(path, mode);
    int reading = mode[0] == 'r';
    check_or(file, reading ? (errno == ENOENT ? EXIT_NO_INPUT : EXIT_IO) : EXIT_IO, "cannot open '%s' for %s: %s", path,
             reading ? "reading" : "writing", strerror(errno));
    return file;
}

// read exactly bytes at offset; a short file is bad data. Works past 2^31: offsets are 64 bits.
static void pread_or_die(int fd, void* memory, size_t bytes, int64_t offset, const char* path) {
    size_t done = 0;
    while (done < bytes) {
        ssize_t got = pread(fd, (char*)memory + done, bytes - done, (off_t)(offset + (int64_t)done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        check_or(got >= 0, EXIT_IO, "cannot read '%s': %s", path, strerror(errno));
        check_or(got > 0, EXIT_BAD_DATA,
                 "'%s' ends at byte %lld, where %zu more bytes are needed: the file is truncated", path,
                 (long long)(offset + (int64_t)done), bytes - done);
        done += (size_t)got;
    }
}

// the whole file as a heap string with a terminating zero; *bytes_out (may be NULL) is its length without it
static char* read_file_or_die(const char* path, size_t* bytes_out) {
    FILE* file = fopen_or_die(path, "rb");
    struct stat info;
    check_or(fstat(fileno(file), &info) == 0 && S_ISREG(info.st_mode), EXIT_NO_INPUT, "'%s' is not a regular file",
             path);
    char* text = (char*)malloc_or_die((size_t)info.st_size + 1, path);
    pread_or_die(fileno(file), text, (size_t)info.st_size, 0, path);
    text[info.st_size] = 0;
    fclose(file);
    if (bytes_out) {
        *bytes_out = (size_t)info.st_size;
    }
    return text;
}

// mkdir -p
static void make_folder_or_die(const char* path) {
    char* partial = strdup_or_die(path);
    for (char* at = partial + 1;; at++) {
        if (*at == '/' || *at == 0) {
            char saved = *at;
            *at = 0;
            int failed = mkdir(partial, 0777) != 0 && errno != EEXIST;
            check_or(!failed && path_is_folder(partial), EXIT_IO,
                     "cannot create folder '%s': %s; choose another --out or fix its permissions", partial,
                     failed ? strerror(errno) : "a file of that name is in the way");
            *at = saved;
            if (!saved) {
                break;
            }
        }
    }
    free(partial);
}

// seconds on a clock that never goes back
static double clock_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
