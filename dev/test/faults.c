// faults.c: what tests let go wrong beneath the program (LD_PRELOAD; lib.sh compiles it). Each fault has its variable:
//
//   NO_FLUSH=TEXT       fsync of a file whose path holds TEXT fails: No space left on device
//   FLUSHED=FILE        appends the path of every file that is flushed to FILE
//   BAD_DIR=PATH        the second and later opendir of PATH fail: Input/output error
//   NO_LOCK=1           flock fails: No locks available
//   LATE_ACCEPT=1       rank 0 sleeps for 2.5 s before it takes its first connection of the watch
//   TAKE_SIGNALS=1      MPI_Init_thread takes SIGUSR1 and SIGTERM, as LLVM does in an OpenCL driver that hwloc looks at
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

int fsync(int fd) {
    char link[64], path[4096] = "";
    const char *bad = getenv("NO_FLUSH"), *list = getenv("FLUSHED");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) > 0 && bad && strstr(path, bad)) {
        errno = ENOSPC;
        return -1;
    }
    FILE* file = list ? fopen(list, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", path);
        fclose(file);
    }
    return REAL("fsync", int (*)(int))(fd);
}

DIR* opendir(const char* path) {
    static int count;
    const char* bad = getenv("BAD_DIR");
    if (bad && !strcmp(path, bad) && ++count >= 2) {
        errno = EIO;
        return NULL;
    }
    return REAL("opendir", DIR* (*)(const char*))(path);
}

int flock(int fd, int operation) {
    if (getenv("NO_LOCK")) {
        errno = ENOLCK;
        return -1;
    }
    return REAL("flock", int (*)(int, int))(fd, operation);
}

int accept4(int fd, struct sockaddr* address, socklen_t* length, int flags) {
    static int count;
    const char* rank = getenv("OMPI_COMM_WORLD_RANK");
    if (getenv("LATE_ACCEPT") && rank && !strcmp(rank, "0") && !address && count++ == 0) {
        usleep(2500000);
    }
    return REAL("accept4", int (*)(int, struct sockaddr*, socklen_t*, int))(fd, address, length, flags);
}

static void nothing(int number) { (void)number; }

int MPI_Init_thread(int* argc, char*** argv, int required, int* provided) {
    int result = REAL("MPI_Init_thread", int (*)(int*, char***, int, int*))(argc, argv, required, provided);
    if (getenv("TAKE_SIGNALS")) {
        signal(SIGUSR1, nothing);
        signal(SIGTERM, nothing);
    }
    return result;
}
