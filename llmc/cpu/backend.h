// cpu/backend.h: the CPU's table of operations.
#pragma once
#include "attention.h"
#include "gemm.h"
#include "layers.h"
#include "quantize.h"

static void* cpu_alloc(size_t bytes, const char* what) { return calloc_or_die(bytes, what); }
static void cpu_zero(void* memory, size_t bytes) { memset(memory, 0, bytes); }
static void cpu_copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

static const Ops CPU_OPS = {
    .name = "cpu",
    .alloc = cpu_alloc,
    .release = free,
    .zero = cpu_zero,
    .copy_to_device = cpu_copy,
    .copy_to_host = cpu_copy,
    .embedding_forward = cpu_embedding_forward,
    .embedding_backward = cpu_embedding_backward,
    .rmsnorm_forward = cpu_rmsnorm_forward,
    .rmsnorm_backward = cpu_rmsnorm_backward,
    .add = cpu_add,
    .rope = cpu_rope,
    .attention_forward = cpu_attention_forward,
    .attention_backward = cpu_attention_backward,
    .attention_cached = cpu_attention_cached,
    .swiglu_forward = cpu_swiglu_forward,
    .swiglu_backward = cpu_swiglu_backward,
    .crossentropy = cpu_crossentropy,
    .quantize = cpu_quantize,
    .quantize_supports = cpu_quantize_supports,
    .gemm = cpu_gemm,
    .unrotate = cpu_unrotate,
    .unrotate_f32 = cpu_unrotate_f32,
    .sum_squares = cpu_sum_squares,
    .adamw = cpu_adamw,
};

static const Ops* cpu_backend(void) {
    blas_single_thread();
    return &CPU_OPS;
}
