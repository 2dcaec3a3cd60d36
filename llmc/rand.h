// rand.h: every random number is a function of (key, index, stream). There is no RNG state anywhere, so nothing has to
// be saved in a checkpoint, and no number depends on how many ranks, threads or micro-batches the work is cut into.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): ten rounds of
//   c0', c1', c2', c3' = hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0);   k0 += W0, k1 += W1
// map a 128-bit counter {index lo, index hi, stream lo, stream hi} under a 64-bit key (the seed) to four 32-bit words.
#pragma once
#include <assert.h>
#include "common.h"

typedef struct {
    uint32_t w[4];
} Philox;

static HOST_DEVICE inline Philox philox(uint64_t key, uint64_t index, uint64_t stream) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53u * c0;
        uint64_t product1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)product1;
        c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)product0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Philox{{c0, c1, c2, c3}};
}

// ---------------------------------------------------------------------------------------------------------------------
// streams: who draws. Two purposes never share a stream, so adding a draw in one place moves no number in another.
// The values are part of what a seed means: append, never renumber.

enum RandPurpose {
    RAND_INIT = 0,      // initial weights
    RAND_SHUFFLE = 1,   // order of the training samples
    RAND_SIGNS = 2,     // signs of the randomized Hadamard transform
    RAND_ROUND = 3,     // stochastic rounding
    RAND_SAMPLE = 4,    // text generation
    RAND_UPDATE = 5,    // stochastic rounding of weights and optimizer state
};

// purpose 4 bits | a 12 bits | b 16 bits | c 32 bits. The parameters are wider than their fields so that an argument
// that does not fit stops the program instead of sharing another one's stream.
static HOST_DEVICE inline uint64_t rand_stream(enum RandPurpose purpose, uint64_t a, uint64_t b, uint64_t c) {
    uint64_t top = (uint64_t)purpose;
    int fits = top < 16 && a < (1u << 12) && b < (1u << 16) && c < (1ull << 32);
#ifdef __CUDA_ARCH__
    assert(fits);
#else
    check(fits, "internal: random stream (%llu, %llu, %llu, %llu) does not fit 4 + 12 + 16 + 32 bits",
          (unsigned long long)top, (unsigned long long)a, (unsigned long long)b, (unsigned long long)c);
#endif
    return top << 60 | a << 48 | b << 32 | c;
}

// ---------------------------------------------------------------------------------------------------------------------
// draws

static HOST_DEVICE inline uint64_t rand_u64(uint64_t key, uint64_t index, uint64_t stream) {
    Philox p = philox(key, index, stream);
    return (uint64_t)p.w[1] << 32 | p.w[0];
}

// uniform on the 2^24 multiples of 2^-24 in [0, 1): exact in f32, so the same bits on every backend
static HOST_DEVICE inline float rand_uniform(uint64_t key, uint64_t index, uint64_t stream) {
    return (float)(philox(key, index, stream).w[0] >> 8) * 0x1p-24f;
}

// N(0, 1) by Box-Muller, in double and on the host only. One normal per index (the sine twin is thrown away), so that
// weight i is the same whichever rank fills it and wherever its slice begins.
static double rand_normal(uint64_t key, uint64_t index, uint64_t stream) {
    Philox p = philox(key, index, stream);
    uint64_t bits1 = ((uint64_t)p.w[1] << 32 | p.w[0]) >> 11;
    uint64_t bits2 = ((uint64_t)p.w[3] << 32 | p.w[2]) >> 11;
    double u1 = (double)(bits1 + 1) * 0x1p-53;   // in (0, 1]: its logarithm is finite
    double u2 = (double)bits2 * 0x1p-53;         // in [0, 1)
    return sqrt(-2.0 * log(u1)) * cos(6.283185307179586477 * u2);
}

// ---------------------------------------------------------------------------------------------------------------------
// the keyed permutation of 0 .. n-1: where index goes, in O(1) memory.
//
// A balanced Feistel network (L, R -> R, L ^ f(R)) permutes the 4^h >= n pairs of h-bit halves whatever f is. Results
// that fall outside 0 .. n-1 are mapped again until one falls inside ("cycle walking"), which leaves a permutation
// of 0 .. n-1 and takes less than 4 tries on average, because h is the smallest that serves.
enum { PERMUTE_ROUNDS = 8 };

static uint64_t permute_index(uint64_t key, uint64_t stream, uint64_t index, uint64_t n) {
    check(index < n, "internal: permute_index of %llu in %llu", (unsigned long long)index, (unsigned long long)n);
    if (n == 1) {
        return 0;
    }
    int half_bits = 1;
    while (half_bits < 32 && (1ull << 2 * half_bits) < n) {
        half_bits++;
    }
    uint64_t mask = (1ull << half_bits) - 1;
    uint64_t at = index;
    do {
        uint64_t left = at >> half_bits, right = at & mask;
        for (uint64_t round = 0; round < PERMUTE_ROUNDS; round++) {
            uint64_t mixed = left ^ (philox(key, round << 32 | right, stream).w[0] & mask);
            left = right;
            right = mixed;
        }
        at = left << half_bits | right;
    } while (at >= n);
    return at;
}
