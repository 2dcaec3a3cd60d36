// cuda/vectors.cuh: vectors of numbers whose type T is an option (RealArray): float or floatX. At most 16 bytes of them
// are one access.
//
// They stay packed in registers as they lie in memory: registers decide how many warps run. Values are widened at each
// use, and reals_keep hides from the compiler that it has widened them before.
#pragma once
#include "common.cuh"

template <int BYTES> struct RealsUnit { typedef uint32_t type; };
template <> struct RealsUnit<2> { typedef uint16_t type; };

template <int N, class T> struct __align__(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Reals {
    typename RealsUnit<N * sizeof(T)>::type w[N * sizeof(T) / sizeof(typename RealsUnit<N * sizeof(T)>::type)];
};
typedef Reals<VEC, floatX> Vector;  // 16 bytes

template <int N, class T> __device__ __forceinline__ Reals<N, T> reals_load(const T* at) {
    return *(const Reals<N, T>*)at;
}
template <int N, class T> __device__ __forceinline__ void reals_store(T* at, const Reals<N, T>& x) {
    *(Reals<N, T>*)at = x;
}

template <int N, class T> __device__ __forceinline__ float reals_get(const Reals<N, T>& x, int i) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return f32_from_bits(x.w[i]);
    } else if constexpr (N == 1) {
        return f32_from_bits((uint32_t)x.w[0] << 16);
    } else {
        return f32_from_bits(i % 2 ? x.w[i / 2] & 0xffff0000u : x.w[i / 2] << 16);
    }
}

// rounded to nearest, as to_floatX does
template <int N, class T> __device__ __forceinline__ Reals<N, T> reals_of(const float* x) {
    Reals<N, T> y;
    if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            y.w[i] = f32_bits(x[i]);
        }
    } else if constexpr (N == 1) {
        floatX rounded = to_floatX(x[0]);
        y.w[0] = *(uint16_t*)&rounded;
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            y.w[i] = *(uint32_t*)&pair;
        }
    }
    return y;
}

// element i with the 16 random bits that round_bits takes from that Philox call; f32 stays as it is. As
// f32_to_floatX_stochastic, but for the payload of a NaN.
template <class T> __device__ __forceinline__ Reals<8, T> reals_of_stochastic(const float* x, const Philox& random) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return reals_of<8, T>(x);
    } else {
        Reals<8, T> y;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t low = fabsf(x[2 * i]) < INFINITY ? random.w[i] & 0xffffu : 0u;
            uint32_t high = fabsf(x[2 * i + 1]) < INFINITY ? random.w[i] >> 16 : 0u;
            y.w[i] = __byte_perm(f32_bits(x[2 * i]) + low, f32_bits(x[2 * i + 1]) + high, 0x7632);  // upper halves
        }
        return y;
    }
}

template <int K> __device__ __forceinline__ void reals_keep(Vector* x) {
#pragma unroll
    for (int k = 0; k < K; k++) {
        asm volatile("" : "+r"(x[k].w[0]), "+r"(x[k].w[1]), "+r"(x[k].w[2]), "+r"(x[k].w[3]));
    }
}
