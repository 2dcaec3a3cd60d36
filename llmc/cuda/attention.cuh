// cuda/attention.cuh: the attention rows of ops.h on CUDA. Three implementations, chosen by shape and device alone:
//   wgmma      bf16, head size 64 or 128, on a GPU of compute capability 9.0 with code built for sm_90a
//   mma.sync   bf16, head size 64 or 128, on every other GPU (sm_80 and later)
//   plain      f32, and any even head size up to 256
// All are deterministic to the bit, keep no T*T memory, launch on gpu.stream without synchronizing, and can be captured
// in a graph.
#pragma once
#include "attention_backward_wgmma.cuh"
#include "attention_forward.cuh"
#include "attention_plain.cuh"

typedef enum { ATTENTION_PLAIN, ATTENTION_MMA, ATTENTION_WGMMA } AttentionPath;
static const char* const attention_path_names[] = {"plain", "mma.sync", "wgmma"};

typedef struct {
    float* scratch;  // cuda_attention_scratch_bytes of it
    int has_wgmma;
#ifndef PRECISION_FP32
    TensorMapEncode encode;
#endif
} CudaAttention;
static CudaAttention cuda_attention;

#ifndef PRECISION_FP32
// 1 in the image for sm_90a, 0 in the others: which of them the driver chose
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
static __device__ int attention_wgmma_compiled = 1;
#else
static __device__ int attention_wgmma_compiled = 0;
#endif
#endif

static void cuda_attention_check(AttentionShape s) {
    check(s.HS % 2 == 0 && s.HS >= 2 && s.HS <= PLAIN_HS,
          "attention: head size %d; the CUDA backend needs an even one up to %d", s.HS, PLAIN_HS);
    check(s.NKV > 0 && s.NH % s.NKV == 0, "attention: %d query heads are not a multiple of %d key heads", s.NH, s.NKV);
    check((int64_t)s.B * s.T * s.NH < INT_MAX / 2, "attention: %d x %d x %d rows of heads are too many for one launch",
          s.B, s.T, s.NH);
}

// which implementation the shape gets, to be printed at start
static AttentionPath cuda_attention_path(AttentionShape s) {
#ifdef PRECISION_FP32
    (void)s;
    return ATTENTION_PLAIN;
#else
    if (s.HS != 64 && s.HS != 128) {
        return ATTENTION_PLAIN;
    }
    return cuda_attention.has_wgmma ? ATTENTION_WGMMA : ATTENTION_MMA;
#endif
}

// backward's scratch: lse log2(e) and -delta, each (B, NH, T rounded up to 128) in f32; plain needs less
static size_t cuda_attention_scratch_bytes(AttentionShape s) {
    return 2 * sizeof(float) * (size_t)s.B * (size_t)s.NH * (size_t)round_up(s.T, 128);
}

#ifndef PRECISION_FP32
// more than 48 KB of shared memory must be asked for
template <int HS>
static void attention_prepare(int wgmma) {
    attention_forward_mma_prepare<HS>();
    attention_backward_mma_prepare<HS, PASS_DQ>();
    attention_backward_mma_prepare<HS, PASS_DKV>();
    if (wgmma) {
        attention_forward_wgmma_prepare<HS>();
        attention_backward_wgmma_prepare<HS, PASS_DQ>();
        attention_backward_wgmma_prepare<HS, PASS_DKV>();
    }
}
#endif

// after the device is chosen; memory: cuda_attention_scratch_bytes of the largest shape, on the device
static void cuda_attention_init(void* memory) {
    cuda_attention.scratch = (float*)memory;
    cuda_attention.has_wgmma = 0;
#ifndef PRECISION_FP32
    if (gpu.major == 9 && gpu.minor == 0) {
        cuda_check(cudaMemcpyFromSymbol(&cuda_attention.has_wgmma, attention_wgmma_compiled, sizeof(int)));
    }
    int wgmma = cuda_attention.has_wgmma;
    if (wgmma) {
        cudaDriverEntryPointQueryResult found;
        void* entry = NULL;
        cuda_check(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
        check(found == cudaDriverEntryPointSuccess && entry,
              "the CUDA driver has no cuTensorMapEncodeTiled; it needs version 12.0 or later");
        cuda_attention.encode = (TensorMapEncode)entry;
    }
    attention_prepare<64>(wgmma);
    attention_prepare<128>(wgmma);
#endif
}

#ifndef PRECISION_FP32
template <int HS>
static void attention_forward_tensor(floatX* out, float* lse, const floatX* qkv, AttentionShape s, AttentionPath path) {
    if (path == ATTENTION_WGMMA) {
        attention_forward_wgmma<HS>(out, lse, qkv, s, cuda_attention.encode);
    } else {
        attention_forward_mma<HS>(out, lse, qkv, s);
    }
}

template <int HS>
static void attention_backward_tensor(floatX* dqkv, const floatX* dout, const floatX* out, const floatX* qkv,
                                      const float* lse, AttentionShape s, AttentionPath path) {
    BackwardStatistics statistics = attention_delta<HS>(cuda_attention.scratch, dout, out, lse, s);
    if (path == ATTENTION_WGMMA) {
        attention_backward_wgmma<HS, PASS_DKV>(dqkv, dout, qkv, statistics, s, cuda_attention.encode);
        attention_backward_wgmma<HS, PASS_DQ>(dqkv, dout, qkv, statistics, s, cuda_attention.encode);
    } else {
        attention_backward_mma<HS, PASS_DKV>(dqkv, dout, qkv, statistics, s);
        attention_backward_mma<HS, PASS_DQ>(dqkv, dout, qkv, statistics, s);
    }
}
#endif

// with a given implementation, for tests
static void attention_forward_on(AttentionPath path, floatX* out, float* lse, const floatX* qkv, AttentionShape s) {
    cuda_attention_check(s);
#ifndef PRECISION_FP32
    if (path != ATTENTION_PLAIN) {
        s.HS == 64 ? attention_forward_tensor<64>(out, lse, qkv, s, path)
                   : attention_forward_tensor<128>(out, lse, qkv, s, path);
        return;
    }
#endif
    (void)path;
    attention_forward_plain(out, lse, qkv, s);
}

static void attention_backward_on(AttentionPath path, floatX* dqkv, const floatX* dout, const floatX* out,
                                  const floatX* qkv, const float* lse, AttentionShape s) {
    cuda_attention_check(s);
#ifndef PRECISION_FP32
    if (path != ATTENTION_PLAIN) {
        s.HS == 64 ? attention_backward_tensor<64>(dqkv, dout, out, qkv, lse, s, path)
                   : attention_backward_tensor<128>(dqkv, dout, out, qkv, lse, s, path);
        return;
    }
#endif
    (void)path;
    attention_backward_plain(dqkv, cuda_attention.scratch, dout, out, qkv, lse, s);
}

static void cuda_attention_forward(floatX* out, float* lse, const floatX* qkv, AttentionShape s) {
    attention_forward_on(cuda_attention_path(s), out, lse, qkv, s);
}

static void cuda_attention_backward(floatX* dqkv, const floatX* dout, const floatX* out, const floatX* qkv,
                                    const float* lse, AttentionShape s) {
    attention_backward_on(cuda_attention_path(s), dqkv, dout, out, qkv, lse, s);
}

static void cuda_attention_cached(floatX* out, floatX* key_cache, floatX* value_cache, const floatX* qkv,
                                  AttentionShape s, int first_position) {
    cuda_attention_check(s);
    check(s.B == 1, "attention: decoding is of one sequence, not %d", s.B);
    attention_append_kernel<<<s.T, 256, 0, gpu.stream>>>(key_cache, value_cache, qkv, s, first_position);
    cuda_check_launch();
    attention_cached_kernel<<<s.T * s.NH, CACHED_WARPS * WARP_LANES, 0, gpu.stream>>>(
        out, key_cache, value_cache, qkv, s, first_position, 1.0f / sqrtf((float)s.HS));
    cuda_check_launch();
}
