// xxh64.h: the XXH64 checksum, streaming. It finds damage on disk and in transit; it is no defence against malice.
//
// Four 64-bit lanes each absorb 8 bytes of every 32-byte stripe, lane = rotl(lane + word * P2, 31) * P1; at the end
// the lanes are merged, the tail of fewer than 32 bytes is mixed in, and the result is avalanched. Arithmetic is modulo
// 2^64, words are little-endian. The value depends on the bytes and the seed alone, never on how updates were cut.
// Contract: state = xxh64_begin(seed); any number of xxh64_update; xxh64_end may be called at any time, and again.
#pragma once
#include "common.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read and hashed as little-endian words");

#define XXH64_P1 0x9E3779B185EBCA87ull
#define XXH64_P2 0xC2B2AE3D27D4EB4Full
#define XXH64_P3 0x165667B19E3779F9ull
#define XXH64_P4 0x85EBCA77C2B2AE63ull
#define XXH64_P5 0x27D4EB2F165667C5ull

typedef struct {
    uint64_t lanes[4];
    uint64_t seed;
    uint64_t total_bytes;
    unsigned char stripe[32];  // the bytes since the last full stripe: total_bytes % 32 of them
} Xxh64;

static inline uint64_t xxh64_rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
static inline uint64_t xxh64_round(uint64_t lane, uint64_t word) {
    return xxh64_rotate(lane + word * XXH64_P2, 31) * XXH64_P1;
}

static inline uint64_t xxh64_word(const unsigned char* at) {
    uint64_t word;
    memcpy(&word, at, sizeof word);  // the address need not be aligned
    return word;
}

static Xxh64 xxh64_begin(uint64_t seed) {
    Xxh64 state = {};
    state.lanes[0] = seed + XXH64_P1 + XXH64_P2;
    state.lanes[1] = seed + XXH64_P2;
    state.lanes[2] = seed;
    state.lanes[3] = seed - XXH64_P1;
    state.seed = seed;
    return state;
}

static void xxh64_update(Xxh64* state, const void* data, size_t bytes) {
    if (bytes == 0) {
        return;  // data may be NULL then, which memcpy must not see
    }
    const unsigned char* at = (const unsigned char*)data;
    const unsigned char* end = at + bytes;
    size_t held = (size_t)(state->total_bytes % 32);
    state->total_bytes += bytes;
    if (held + bytes < 32) {
        memcpy(state->stripe + held, at, bytes);
        return;
    }
    if (held > 0) {
        memcpy(state->stripe + held, at, 32 - held);
        at += 32 - held;
        for (int i = 0; i < 4; i++) {
            state->lanes[i] = xxh64_round(state->lanes[i], xxh64_word(state->stripe + 8 * i));
        }
    }
    uint64_t a = state->lanes[0], b = state->lanes[1], c = state->lanes[2], d = state->lanes[3];
    for (; end - at >= 32; at += 32) {
        a = xxh64_round(a, xxh64_word(at));
        b = xxh64_round(b, xxh64_word(at + 8));
        c = xxh64_round(c, xxh64_word(at + 16));
        d = xxh64_round(d, xxh64_word(at + 24));
    }
    state->lanes[0] = a, state->lanes[1] = b, state->lanes[2] = c, state->lanes[3] = d;
    memcpy(state->stripe, at, (size_t)(end - at));
}

static uint64_t xxh64_end(const Xxh64* state) {
    uint64_t hash = state->seed + XXH64_P5;
    if (state->total_bytes >= 32) {
        hash = xxh64_rotate(state->lanes[0], 1) + xxh64_rotate(state->lanes[1], 7) + xxh64_rotate(state->lanes[2], 12) +
               xxh64_rotate(state->lanes[3], 18);
        for (int i = 0; i < 4; i++) {
            hash = (hash ^ xxh64_round(0, state->lanes[i])) * XXH64_P1 + XXH64_P4;
        }
    }
    hash += state->total_bytes;
    const unsigned char* at = state->stripe;
    const unsigned char* end = at + state->total_bytes % 32;
    for (; end - at >= 8; at += 8) {
        hash = xxh64_rotate(hash ^ xxh64_round(0, xxh64_word(at)), 27) * XXH64_P1 + XXH64_P4;
    }
    if (end - at >= 4) {
        uint32_t word;
        memcpy(&word, at, sizeof word);
        hash = xxh64_rotate(hash ^ word * XXH64_P1, 23) * XXH64_P2 + XXH64_P3;
        at += 4;
    }
    for (; at < end; at++) {
        hash = xxh64_rotate(hash ^ *at * XXH64_P5, 11) * XXH64_P1;
    }
    hash = (hash ^ hash >> 33) * XXH64_P2;
    hash = (hash ^ hash >> 29) * XXH64_P3;
    return hash ^ hash >> 32;
}

// *checksum and *file_bytes of a whole file, seed 0. Returns 0, or -1 with a text in error: a checkpoint that cannot be
// read is one to report and pass over, not one to die of. moved, where it is not NULL, is called after every MiB.
static int xxh64_file(uint64_t* checksum, int64_t* file_bytes, const char* path, void (*moved)(void), char* error,
                      size_t error_bytes) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        snprintf(error, error_bytes, "cannot open '%s' for reading: %s", path, strerror(errno));
        return -1;
    }
    const size_t chunk_bytes = (size_t)1 << 20;
    char* chunk = (char*)malloc_or_die(chunk_bytes, "reading a file");
    Xxh64 state = xxh64_begin(0);
    ssize_t got;
    while ((got = read(fd, chunk, chunk_bytes)) != 0) {
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            snprintf(error, error_bytes, "cannot read '%s': %s", path, strerror(errno));
            break;
        }
        xxh64_update(&state, chunk, (size_t)got);
        if (moved) {
            moved();
        }
    }
    free(chunk);
    close(fd);
    *checksum = xxh64_end(&state);
    *file_bytes = (int64_t)state.total_bytes;
    return got < 0 ? -1 : 0;
}
