// watch.h: a thread on every rank that notices what the training loop cannot: another rank is gone, or nothing moves.
//
// Every rank holds a TCP connection to rank 0, apart from MPI and NCCL. Where a process ends, its system closes the
// connection at once; where a host or cable is gone, TCP keep-alive does within 4 s. Rank 0 names the rank and tells
// all others to end, because a collective operation without one of its ranks would wait for ever.
//
// The loop says what it is about to do (watch_phase). Where it says nothing for --hang-seconds and for 10 usual steps,
// every rank prints where it stands, and all exit with 124. Before the first step nothing is usual: 30 times the limit.
#pragma once
#include "comm.h"
#include "data.h"
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

enum { WATCH_ADDRESSES = 16 };
typedef struct {
    uint64_t token;  // who does not know it is not of this run
    uint16_t port;
    int count;
    uint32_t list[WATCH_ADDRESSES];
    char host[64];
} WatchAddress;

// LEAVE: the end that all agreed on. DIE: with that exit code, its message is printed. LOST: that rank, by rank 0.
// HANG: report where you stand. REPORTED: done.
typedef enum { WATCH_LEAVE, WATCH_DIE, WATCH_LOST, WATCH_HANG, WATCH_REPORTED } WatchKind;
typedef struct { int32_t kind, value; } WatchMessage;
typedef struct { uint64_t token; int32_t rank, unused; } WatchHello;

typedef struct {
    const Comm* comm;
    int peers;               // connections: rank 0 has one to every other rank, the others one to rank 0
    struct pollfd* sockets;
    int* leaving;            // of each connection: it said LEAVE
    int* reported;
    char (*hosts)[64];       // of all ranks, on rank 0
    double hang_seconds;
    int running, stopping;
    pthread_t thread;
    // written by the loop, read by the thread
    const char* phase;
    int64_t step;
    int64_t moved_ns;        // when the loop last said something
    int64_t usual_ns;        // a step's time; 0: not known yet
} Watch;
static Watch watch;

static int64_t watch_now(void) { return (int64_t)(clock_seconds() * 1e9); }

// the loop is about to do this; a string that stays
static void watch_phase(const char* phase) {
    __atomic_store_n(&watch.phase, phase, __ATOMIC_RELAXED);
    __atomic_store_n(&watch.moved_ns, watch_now(), __ATOMIC_RELEASE);
}

static void watch_step(int64_t step, double seconds) {
    int64_t ns = (int64_t)(seconds * 1e9), usual = __atomic_load_n(&watch.usual_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&watch.usual_ns, usual == 0 ? ns : usual + (ns - usual) / 8, __ATOMIC_RELAXED);
    __atomic_store_n(&watch.step, step, __ATOMIC_RELAXED);
}

// ---------------------------------------------------------------------------------------------------------------------
// connections

static void watch_send(int peer, WatchKind kind, int value) {
    WatchMessage message = {kind, value};
    ssize_t sent = send(watch.sockets[peer].fd, &message, sizeof message, MSG_NOSIGNAL);
    (void)sent;  // who is gone is found by reading
}

static void watch_send_all(WatchKind kind, int value) {
    for (int i = 0; i < watch.peers; i++) {
        if (watch.sockets[i].fd >= 0) {
            watch_send(i, kind, value);
        }
    }
}

static void watch_keep_alive(int fd) {
    int on = 1, seconds = 1, probes = 3, timeout = 4000;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &seconds, sizeof seconds);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &seconds, sizeof seconds);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof timeout);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// rank 0: a socket that listens, and where it can be reached
static int watch_listen(WatchAddress* address) {
    struct sockaddr_in any = {};
    socklen_t length = sizeof any;
    any.sin_family = AF_INET;
    any.sin_addr.s_addr = htonl(INADDR_ANY);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr*)&any, sizeof any) != 0 || listen(fd, 4096) != 0 ||
        getsockname(fd, (struct sockaddr*)&any, &length) != 0) {
        fprintf(stderr, "train_llama: no TCP socket to watch the ranks with: %s\n", strerror(errno));
        return fd;
    }
    address->port = any.sin_port;
    struct ifaddrs *list = NULL;
    if (getifaddrs(&list) == 0) {
        for (struct ifaddrs* at = list; at && address->count < WATCH_ADDRESSES; at = at->ifa_next) {
            if (at->ifa_addr && at->ifa_addr->sa_family == AF_INET) {
                address->list[address->count++] = ((struct sockaddr_in*)at->ifa_addr)->sin_addr.s_addr;
            }
        }
        freeifaddrs(list);
    }
    return fd;
}

// rank 0: take the others' connections, for 10 s at most
static void watch_accept(int listener, const WatchAddress* address) {
    double deadline = clock_seconds() + 10.0;
    int connected = 0;
    struct pollfd wait = {listener, POLLIN, 0};
    while (listener >= 0 && connected < watch.peers && clock_seconds() < deadline) {
        if (poll(&wait, 1, 200) <= 0) {
            continue;
        }
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        struct timeval second = {1, 0};
        WatchHello hello = {};
        if (fd < 0) {
            continue;
        }
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second);
        int known = recv(fd, &hello, sizeof hello, MSG_WAITALL) == (ssize_t)sizeof hello &&
                    hello.token == address->token && hello.rank > 0 && hello.rank <= watch.peers &&
                    watch.sockets[hello.rank - 1].fd < 0;
        char answer = 0;  // none from a rank that has tired of waiting and tries another address
        if (!known || send(fd, "k", 1, MSG_NOSIGNAL) != 1 || recv(fd, &answer, 1, 0) != 1 || answer != 'k') {
            close(fd);
            continue;
        }
        watch_keep_alive(fd);
        watch.sockets[hello.rank - 1].fd = fd;
        connected++;
    }
    if (listener >= 0) {
        close(listener);
    }
}

// the others: a connection to rank 0 by that address, or -1
static int watch_connect_to(uint32_t ip, const WatchAddress* address, int rank) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in to = {};
    struct timeval seconds = {2, 0};
    WatchHello hello = {address->token, rank, 0};
    char answer = 0;
    to.sin_family = AF_INET;
    to.sin_port = address->port;
    to.sin_addr.s_addr = ip;
    if (fd < 0) {
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &seconds, sizeof seconds);  // of connect, too
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &seconds, sizeof seconds);
    if (connect(fd, (struct sockaddr*)&to, sizeof to) != 0 ||
        send(fd, &hello, sizeof hello, MSG_NOSIGNAL) != (ssize_t)sizeof hello || recv(fd, &answer, 1, 0) != 1 ||
        answer != 'k' || send(fd, "k", 1, MSG_NOSIGNAL) != 1) {
        close(fd);
        return -1;
    }
    watch_keep_alive(fd);
    return fd;
}

static void watch_connect(const WatchAddress* address, const Comm* comm) {
    int same_host = !strcmp(address->host, comm->host), fd = -1;
    for (int pass = 0; pass < 2 && fd < 0; pass++) {  // loopback first on the same host, last on another
        for (int i = 0; i < address->count && fd < 0; i++) {
            int loopback = (ntohl(address->list[i]) >> 24) == 127;
            if (pass != (loopback == same_host)) {
                fd = watch_connect_to(address->list[i], address, comm->rank);
            }
        }
    }
    watch.sockets[0].fd = fd;
}

// ---------------------------------------------------------------------------------------------------------------------
// the thread

[[noreturn]] static void watch_exit(int code, double seconds) {
    struct timespec pause = {(time_t)seconds, (long)((seconds - floor(seconds)) * 1e9)};
    fflush(stderr);
    nanosleep(&pause, NULL);  // so that messages reach the launcher
    _exit(code);
}

static void watch_report(void) {
    double stood = (double)(watch_now() - __atomic_load_n(&watch.moved_ns, __ATOMIC_ACQUIRE)) * 1e-9;
    char line[512];
    snprintf(line, sizeof line, "train_llama: rank %d (%s): nothing moved for %.1f s after step %lld, in: %s\n",
             watch.comm->rank, watch.comm->host, stood, (long long)__atomic_load_n(&watch.step, __ATOMIC_RELAXED),
             __atomic_load_n(&watch.phase, __ATOMIC_RELAXED));
    fputs(line, stderr);
}

// rank 0, after all were asked where they stand: who did not answer, and the end
[[noreturn]] static void watch_end_hang(void) {
    for (int i = 0; i < watch.peers; i++) {
        if (watch.sockets[i].fd >= 0 && !watch.reported[i]) {
            fprintf(stderr, "train_llama: rank %d (%s) does not answer\n", i + 1, watch.hosts[i + 1]);
        }
    }
    fprintf(stderr, "train_llama: hang: all ranks exit with %d; the last checkpoint stands\n", EXIT_HANG);
    watch_exit(EXIT_HANG, 0.3);
}

// how the connection ended: not by LEAVE
static void watch_lost(int peer, const char* how) {
    if (watch.comm->rank == 0) {
        fprintf(stderr, "train_llama: rank %d (%s) is lost: %s; all ranks stop, the last checkpoint stands\n", peer + 1,
                watch.hosts[peer + 1], how);
        watch_send_all(WATCH_LOST, peer + 1);
    } else if (watch.comm->rank == 1) {
        fprintf(stderr, "train_llama: rank 0 (%s) is lost: %s; all ranks stop, the last checkpoint stands\n",
                watch.hosts[0], how);
    }
    watch_exit(EXIT_UNEXPECTED, 0.3);
}

// deadline: when rank 0 ends a hang, or 0
static void watch_receive(int peer, double* deadline) {
    WatchMessage message;
    ssize_t got = recv(watch.sockets[peer].fd, &message, sizeof message, MSG_DONTWAIT | MSG_WAITALL);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (got != (ssize_t)sizeof message) {
        int leaving = watch.leaving[peer] || __atomic_load_n(&watch.stopping, __ATOMIC_ACQUIRE) || *deadline > 0;
        close(watch.sockets[peer].fd);
        watch.sockets[peer].fd = -1;
        if (!leaving) {
            watch_lost(peer, got < 0 && errno == ETIMEDOUT ? "its host does not answer" : "its process ended");
        }
        return;
    }
    switch (message.kind) {
    case WATCH_LEAVE: watch.leaving[peer] = 1; break;
    case WATCH_DIE: watch_send_all(WATCH_DIE, message.value); watch_exit(message.value, 0.3);
    case WATCH_LOST: watch_exit(EXIT_UNEXPECTED, 0.3);
    case WATCH_REPORTED: watch.reported[peer] = 1; break;
    case WATCH_HANG:
        watch.reported[peer] = 1;
        if (*deadline == 0) {
            watch_send_all(watch.comm->rank == 0 ? WATCH_HANG : WATCH_REPORTED, 0);
            watch_report();
            *deadline = clock_seconds() + (watch.comm->rank == 0 ? 1.0 : 3.0);
        }
        break;
    }
}

static int watch_hangs(void) {
    double stood = (double)(watch_now() - __atomic_load_n(&watch.moved_ns, __ATOMIC_ACQUIRE)) * 1e-9;
    double usual = (double)__atomic_load_n(&watch.usual_ns, __ATOMIC_RELAXED) * 1e-9;
    double limit = usual > 0 ? fmax(watch.hang_seconds, 10 * usual) : 30 * watch.hang_seconds;
    return watch.hang_seconds > 0 && stood > limit;
}

static void* watch_run(void* unused) {
    (void)unused;
    double deadline = 0;
    while (!__atomic_load_n(&watch.stopping, __ATOMIC_ACQUIRE)) {
        int64_t asked = watch_now();
        poll(watch.sockets, (nfds_t)watch.peers, 100);
        int64_t slept = watch_now() - asked;
        if (slept > 2000000000) {  // this whole process stood (suspended, say): time in which nothing could move
            __atomic_add_fetch(&watch.moved_ns, slept, __ATOMIC_ACQ_REL);
        }
        for (int i = 0; i < watch.peers; i++) {
            if (watch.sockets[i].fd >= 0 && watch.sockets[i].revents) {
                watch_receive(i, &deadline);
            }
        }
        if (deadline == 0 && watch_hangs()) {
            watch_send_all(WATCH_HANG, 0);
            watch_report();
            deadline = clock_seconds() + (watch.comm->rank == 0 ? 1.0 : 3.0);
        }
        if (deadline > 0 && clock_seconds() > deadline) {
            if (watch.comm->rank == 0) {
                watch_end_hang();
            }
            _exit(EXIT_HANG);
        }
        const char* fault = watch.comm->ops ? watch.comm->ops->fault() : NULL;
        if (fault && !__atomic_load_n(&watch.stopping, __ATOMIC_ACQUIRE)) {
            fprintf(stderr, "train_llama: rank %d (%s): %s reports: %s\n", watch.comm->rank, watch.comm->host,
                    watch.comm->ops->name, fault);
            watch_send_all(WATCH_DIE, EXIT_NO_DEVICE);
            watch_exit(EXIT_NO_DEVICE, 0.3);
        }
    }
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// start and end

static void watch_stop(void);
static void (*watch_end_all_before)(int exit_code);
// for die: the other ranks end with this code, too
static void watch_end_all(int exit_code) {
    watch_send_all(WATCH_DIE, exit_code);
    watch_end_all_before(exit_code);
}

// ranks that rank 0 has no connection to are named; the run goes on
static void watch_check_connections(void) {
    for (int i = 0; watch.comm->rank == 0 && i < watch.peers; i++) {
        if (watch.sockets[i].fd < 0) {
            fprintf(stderr, "train_llama: rank %d (%s) has no TCP connection to rank 0 (%s): only MPI or NCCL will "
                    "notice when it is lost\n", i + 1, watch.hosts[i + 1], watch.comm->host);
        }
    }
}

// comm must stay. hang_seconds 0: a hang is not looked for.
static void watch_start(const Comm* comm, double hang_seconds) {
    WatchAddress address = {};
    watch.comm = comm;
    watch.hang_seconds = hang_seconds;
    watch.peers = comm->rank == 0 ? comm->size - 1 : 1;
    watch.sockets = (struct pollfd*)calloc_or_die(sizeof(struct pollfd) * (size_t)(watch.peers + 1), "watch");
    watch.leaving = (int*)calloc_or_die(sizeof(int) * (size_t)(watch.peers + 1), "watch");
    watch.reported = (int*)calloc_or_die(sizeof(int) * (size_t)(watch.peers + 1), "watch");
    watch.hosts = (char (*)[64])calloc_or_die(64 * (size_t)comm->size, "watch");
    for (int i = 0; i < watch.peers; i++) {
        watch.sockets[i] = (struct pollfd){-1, POLLIN, 0};
    }
    comm_gather(comm, watch.hosts, comm->host, 64);
    if (comm->size > 1) {
        raise_open_file_limit(comm->size);
        snprintf(address.host, sizeof address.host, "%s", comm->host);
        address.token = rand_u64((uint64_t)watch_now(), (uint64_t)getpid(), 77);
        int listener = comm->rank == 0 ? watch_listen(&address) : -1;
        comm_broadcast(comm, &address, sizeof address, 0);
        if (comm->rank == 0) {
            watch_accept(listener, &address);
        } else {
            memcpy(watch.hosts[0], address.host, 64);
            watch_connect(&address, comm);
        }
        watch_check_connections();
        watch_end_all_before = process.end_all;
        process.end_all = watch_end_all;
        process.leave = watch_stop;
    }
    watch_phase("start");
    sigset_t all, before;
    sigfillset(&all);
    pthread_or_die(pthread_sigmask(SIG_SETMASK, &all, &before), "pthread_sigmask");
    pthread_or_die(pthread_create(&watch.thread, NULL, watch_run, NULL), "pthread_create");
    pthread_or_die(pthread_sigmask(SIG_SETMASK, &before, NULL), "pthread_sigmask");
    watch.running = 1;
}

// this rank leaves as all agreed
static void watch_stop(void) {
    if (!watch.running) {
        return;
    }
    watch_send_all(WATCH_LEAVE, 0);
    __atomic_store_n(&watch.stopping, 1, __ATOMIC_RELEASE);
    pthread_or_die(pthread_join(watch.thread, NULL), "pthread_join");
    watch.running = 0;
    for (int i = 0; i < watch.peers; i++) {
        if (watch.sockets[i].fd >= 0) {
            close(watch.sockets[i].fd);
        }
    }
    free(watch.sockets);
    free(watch.leaving);
    free(watch.reported);
    free(watch.hosts);
}
