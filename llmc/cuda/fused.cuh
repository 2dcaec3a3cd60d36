// cuda/fused.cuh: passes of a quantized linear layer that take the operation before or behind them along. Each equals a
// composition of operations of ops.h bit for bit: what that would store in floatX is rounded in registers at the same
// point. Bytes an element, fp8 carrier, codes, scales and mask kept:
//
//                                          fused                         composition
//   swiglu_quantize              fused     4 + 0.66 + 1 = 5.7            8 + ...     = 9.7
//   add_rmsnorm_quantize         fused     4 + 2 + 0.66 + 1 = 7.7        9.7 + 2     = 11.7
//   rmsnorm_quantize             fused     2 + 0.66 + 1 = 3.7            4 + 3.7     = 7.7
//   swiglu_backward_unrotate     backward  2 + 0.13 + 4 + 4 = 10.1       4.1 + 10    = 14.1
//   rmsnorm_backward_unrotate    backward  2 + 0.13 + 4 + 2 = 8.1        4.1 + 8     = 12.1
// (fused_backward.cuh has the last two.)
//
// How: elementwise operations and norms read 16 bytes a lane, VEC elements, lane by lane along the row. So a group of
// 32 lies in the registers of GROUP / VEC neighbouring lanes, a `part` of it in each; it stays there. The Hadamard
// transform's distances below VEC are additions within a lane, the others take the partner's value by shuffle:
// lower lane a + b, upper lane a - b = fma(-1, b, a), each rounded once and in the order of hadamard.cuh. The sums of
// QuEST are trees over adjacent pairs, which go on over lanes in the same way. Every access of the results, too, is one
// stretch of memory a warp; nothing passes through shared memory, and 8 values a lane leave registers for many warps.
#pragma once
#include "elementwise.cuh"
#include "quantize.cuh"
#include "rmsnorm.cuh"

#define PART_LANES (GROUP / VEC)  // lanes that share a group
#define FUSED_THREADS 256

// ---------------------------------------------------------------------------------------------------------------------
// a group in PART_LANES lanes. All lanes of a warp call these; groups never share a lane.

// v = H v
__device__ __forceinline__ void part_hadamard(float* v) {
#pragma unroll
    for (int distance = 1; distance < VEC; distance *= 2) {
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            if (!(k & distance)) {
                float a = v[k], b = v[k + distance];
                v[k] = add_rn(a, b);
                v[k + distance] = sub_rn(a, b);
            }
        }
    }
#pragma unroll
    for (int lanes = 1; lanes < PART_LANES; lanes *= 2) {
        float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            v[k] = fma_rn(sign, v[k], __shfl_xor_sync(FULL_WARP, v[k], lanes));
        }
    }
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        v[k] = mul_rn(v[k], HADAMARD_SCALE);
    }
}

// sum over the group by adjacent pairs; v is overwritten
__device__ __forceinline__ float part_sum(float* v) {
#pragma unroll
    for (int h = 1; h < VEC; h *= 2) {
#pragma unroll
        for (int k = 0; k < VEC; k += 2 * h) {
            v[k] = add_rn(v[k], v[k + h]);
        }
    }
#pragma unroll
    for (int lanes = 1; lanes < PART_LANES; lanes *= 2) {
        v[0] = add_rn(v[0], __shfl_xor_sync(FULL_WARP, v[0], lanes));
    }
    return v[0];
}

// as quest_scale
__device__ __forceinline__ uint32_t part_quest_scale(const float* v) {
    float values[VEC], squares[VEC];
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        values[k] = v[k];
        squares[k] = mul_rn(v[k], v[k]);
    }
    float mean = mul_rn(part_sum(values), 0.03125f);
    float variance = sub_rn(mul_rn(part_sum(squares), 0.03125f), mul_rn(mean, mean));
    variance = variance < 0.0f ? 0.0f : variance;
    float s = add_rn(mul_rn(sqrt_rn(variance), QUEST_SCALE), QUEST_EPSILON);
    return f32_bits(s) >> 23 & 255u;
}

// as quest_round; the mask has VEC bits
__device__ __forceinline__ uint32_t part_quest_round(float* v, uint32_t scale) {
    float factor = mul_rn(f32_from_bits((254u - min(scale, 254u)) << 23), CODE_UNIT);
    uint32_t mask = 0;
#pragma unroll
    for (int k = VEC - 1; k >= 0; k--) {
        float x = mul_rn(v[k], factor);
        mask = mask << 1 | f32_bits(sub_rn(fabsf(x), 6.0f * CODE_UNIT)) >> 31;  // the sign of |x| - 6
        v[k] = e2m1_nearest(x, CODE_UNIT, 1);
    }
    return scale == UE8M0_NAN ? 0u : mask;
}

// base_count for a group whose lanes hold v. Only a group that changes something is looked at: one above the largest
// so far, or below the window
__device__ __forceinline__ void part_count(const QuantizeJob& job, BaseUse* use, const float* v, uint32_t scale,
                                           int valid) {
    int e = (int)scale - 127;
    int news = e > use->largest || e - max(use->base, use->before) < carrier_bottom(job.carrier);
    if (!job.base || !__any_sync(FULL_WARP, news)) {
        return;
    }
    uint32_t lane = threadIdx.x % WARP_LANES, first = lane / PART_LANES * PART_LANES;
    uint32_t any = __ballot_sync(FULL_WARP, valid && scale != UE8M0_NAN && values_any<VEC>(v));
    int counts = (any >> first & ((1u << PART_LANES) - 1u)) != 0;
    if (counts && lane == first) {
        base_count(use, job, scale);
    }
    use->largest = max(use->largest, __reduce_max_sync(FULL_WARP, counts ? e : CARRIER_NONE));
}

// codes (where kept), scale and mask of part number `part` of the operand; v in CODE_UNITs
__device__ __forceinline__ void part_store(const QuantizeJob& job, const float* v, size_t part, uint32_t scale,
                                           uint32_t mask, int valid) {
    if constexpr (VEC == 8) {
        if (job.codes && valid) {
            ((uint32_t*)job.codes)[part] = scale == UE8M0_NAN ? 0u : codes_pack(v);
        }
        if (job.mask && valid) {
            ((uint8_t*)job.mask)[part] = (uint8_t)mask;
        }
    } else {
        float four[8] = {v[0], v[1], v[2], v[3], 0.0f, 0.0f, 0.0f, 0.0f};
        uint32_t upper = __shfl_xor_sync(FULL_WARP, mask, 1);
        if (job.codes && valid) {
            ((uint16_t*)job.codes)[part] = (uint16_t)(scale == UE8M0_NAN ? 0u : codes_pack(four));
        }
        if (job.mask && valid && part % 2 == 0) {
            ((uint8_t*)job.mask)[part / 2] = (uint8_t)(mask | upper << 4);
        }
    }
    if (job.scales && valid && threadIdx.x % PART_LANES == 0) {
        job.scales[part / PART_LANES] = (uint8_t)scale;
    }
}

// what the carrier multiplies; v is overwritten
__device__ __forceinline__ void part_carry(const QuantizeJob& job, float* v, size_t part, uint32_t scale, int base,
                                           int valid) {
    if (job.carrier == FORMAT_FLOATX) {
        values_decode<VEC>(v, scale);
        if (job.operand && valid) {
            reals_store((floatX*)job.operand + part * VEC, reals_of<VEC, floatX>(v));
        }
        return;
    }
    uint32_t bytes[VEC / 4];
    carrier_pack<VEC>(bytes, v, carrier_factor(scale, base, CODE_UNIT_LOG2), job.carrier);
    if (job.operand && valid) {
        if constexpr (VEC == 8) {
            ((uint2*)job.operand)[part] = make_uint2(bytes[0], bytes[1]);
        } else {
            ((uint32_t*)job.operand)[part] = bytes[0];
        }
    }
}

// as stats_add: v codes in CODE_UNITs, rotated what was quantized
__device__ __forceinline__ void part_stats(const QuantizeJob& job, const float* v, const float* rotated, uint32_t scale,
                                           uint32_t mask, int valid) {
    double sums[5] = {0, 0, 0, 0, 0};
    float s = ue8m0_to_f32(scale);
    for (int k = 0; valid && k < VEC; k++) {
        float q = scale == UE8M0_NAN ? 0.0f : mul_rn(v[k], 1.0f / CODE_UNIT);
        float error = sub_rn(mul_rn(mul_rn(q, s), job.owed), rotated[k]);
        sums[0] += (double)error * error;
        sums[1] += (double)rotated[k] * rotated[k];
        sums[2] += !(mask >> k & 1u);
        sums[3] += q == 0.0f;
        sums[4] += 1;
    }
    double* to[5] = {&job.stats->error_sq, &job.stats->input_sq, &job.stats->clipped, &job.stats->zero,
                     &job.stats->count};
    for (int i = 0; i < 5; i++) {
        for (int offset = WARP_LANES / 2; offset; offset /= 2) {
            sums[i] += __shfl_xor_sync(FULL_WARP, sums[i], offset);
        }
        if (threadIdx.x % WARP_LANES == 0) {
            atomicAdd(to[i], sums[i]);
        }
    }
}

// v, elements of part number `part`, through H and QuEST to where the job says; v is overwritten
template <int STATS>
__device__ __forceinline__ void part_quantize(const QuantizeJob& job, BaseUse* use, float* v, size_t part, int valid) {
    part_hadamard(v);
    uint32_t scale = part_quest_scale(v);
    if (STATS) {
        float rotated[VEC];
        memcpy(rotated, v, sizeof rotated);
        uint32_t mask = part_quest_round(v, scale);
        part_stats(job, v, rotated, scale, mask, valid);
    } else {
        uint32_t mask = part_quest_round(v, scale);
        part_count(job, use, v, scale, valid);
        part_store(job, v, part, scale, mask, valid);
        part_carry(job, v, part, scale, use->base, valid);
    }
}

// the job of an operand x that is not read from args->tensor but made on the way
static QuantizeJob fused_job(const QuantizeArgs* args, const void* source, int rows, int cols) {
    const QTensor* out = args->out;
    QuantizeArgs checked = *args;
    checked.tensor = (const floatX*)source;
    quantize_check(&checked);
    check(args->spec.scale == SCALE_QUEST && args->spec.rotation == ROTATE_HADAMARD && !args->transposed &&
              out->rows == rows && out->cols == cols,
          "internal: no fused quantizer for this operand (%d, %d)", out->rows, out->cols);
    check((uintptr_t)out->codes % 4 == 0 && out->row_scale == NULL, "internal: codes at %p", out->codes);
    QuantizeJob job;
    memset(&job, 0, sizeof job);
    job.rotation = args->spec.rotation;
    job.carrier = out->carrier;
    job.rows = (uint32_t)rows;
    job.cols = (uint32_t)cols;
    job.codes = out->codes;
    job.scales = out->scales;
    job.mask = out->mask;
    job.operand = out->operand;
    job.base = out->operand && out->carrier != FORMAT_FLOATX ? out->base : NULL;
    job.owed = out->owed;
    job.stats = args->stats;
    return job;
}

// ---------------------------------------------------------------------------------------------------------------------
// SwiGLU

// the place (row, part of the row) of a thread that goes on by the same number of parts each time, without divisions
typedef struct { uint32_t row, part, step_rows, step_parts, row_parts; } PartWalk;

__device__ __forceinline__ PartWalk walk_begin(size_t part, size_t step, uint32_t row_parts) {
    return PartWalk{(uint32_t)(part / row_parts), (uint32_t)(part % row_parts), (uint32_t)(step / row_parts),
                    (uint32_t)(step % row_parts), row_parts};
}

__device__ __forceinline__ void walk_step(PartWalk* walk) {
    walk->row += walk->step_rows;
    walk->part += walk->step_parts;
    if (walk->part >= walk->row_parts) {
        walk->part -= walk->row_parts;
        walk->row++;
    }
}

// g / (1 + exp(-g)), the quotient rounded to nearest, for -80 <= g: the exponential as __expf computes it but for what
// is lost beside 1, and one correction of the quotient. There are only 65536 values of bf16; dev/cuda/fused_bench.cu
// compares all of them. Of infinity it makes a NaN, which ends as the same fault.
__device__ __forceinline__ float silu_narrow(float g) {
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(mul_rn(-g, 1.4426950408889634f)));
    float d = add_rn(1.0f, e);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
    float q = mul_rn(g, r);
    return fma_rn(fma_rn(-d, q, g), r, q);
}

// v = silu(gate) * up, rounded to floatX, as swiglu_forward_kernel
__device__ __forceinline__ void swiglu_part(float* v, const Vector& gate, const Vector& up) {
    int wide = sizeof(floatX) == 4;
#ifndef PRECISION_FP32
    const __nv_bfloat162* pair = (const __nv_bfloat162*)gate.w;
    __nv_bfloat162 least = __hmin2(__hmin2(pair[0], pair[1]), __hmin2(pair[2], pair[3]));
    wide = !(__low2float(least) >= -80.0f && __high2float(least) >= -80.0f);
#endif
    if (wide) {
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            float g = reals_get(gate, i);
            v[i] = g / (1.0f + __expf(-g));
        }
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            v[i] = silu_narrow(reals_get(gate, i));
        }
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        v[i] *= reals_get(up, i);
    }
    Vector rounded = reals_of<VEC, floatX>(v);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        v[i] = reals_get(rounded, i);
    }
}

#define SWIGLU_PARTS 2  // of a thread at a time, so that enough loads are under way

template <int STATS>
__global__ void __launch_bounds__(FUSED_THREADS, STATS ? 1 : 4)
    swiglu_quantize_kernel(const __grid_constant__ QuantizeJob job, const floatX* gate_up) {
    BaseUse use;
    if (!base_begin(job, &use)) {
        return;
    }
    uint32_t row_parts = job.cols / VEC, lane = threadIdx.x % WARP_LANES;
    size_t parts = (size_t)job.rows * row_parts, step = (size_t)gridDim.x * FUSED_THREADS;
    size_t part = (size_t)blockIdx.x * FUSED_THREADS + threadIdx.x;
    PartWalk walk = walk_begin(part, step, row_parts);
    while (part - lane < parts) {
        Vector gate[SWIGLU_PARTS], up[SWIGLU_PARTS];
#pragma unroll
        for (int u = 0; u < SWIGLU_PARTS; u++) {
            const Vector* row = (const Vector*)(gate_up + (size_t)walk.row * 2 * job.cols) + walk.part;
            int valid = part + u * step < parts;
            gate[u] = valid ? row[0] : Vector{};
            up[u] = valid ? row[row_parts] : Vector{};
            walk_step(&walk);
        }
#pragma unroll
        for (int u = 0; u < SWIGLU_PARTS; u++) {
            float v[VEC];
            swiglu_part(v, gate[u], up[u]);
            part_quantize<STATS>(job, &use, v, part, part < parts);
            part += step;
        }
    }
    base_end(job, &use);
}

template <int STATS> static void swiglu_quantize_launch(const QuantizeJob* job, const floatX* gate_up) {
    size_t parts = (size_t)job->rows * job->cols / VEC;
    size_t tiles = (parts + FUSED_THREADS * SWIGLU_PARTS - 1) / (FUSED_THREADS * SWIGLU_PARTS);
    int blocks = persistent_blocks(swiglu_quantize_kernel<STATS>, FUSED_THREADS, tiles);
    swiglu_quantize_kernel<STATS><<<blocks, FUSED_THREADS, 0, gpu.stream>>>(*job, gate_up);
    cuda_check_launch();
}

// The operand x (BT, F) of the down layer from gate_up (BT, 2F): swiglu_forward, then quantize with args, whose tensor
// is not used; no activation is stored. Asynchronous; out->base as in cuda_quantize.
static void cuda_swiglu_quantize(const QuantizeArgs* args, const floatX* gate_up, int BT, int F) {
    QuantizeJob job = fused_job(args, gate_up, BT, F);
    if (BT == 0) {
        return;
    }
    swiglu_quantize_launch<0>(&job, gate_up);
    job.check = 1;
    if (job.base) {
        swiglu_quantize_launch<0>(&job, gate_up);
    }
    if (job.stats) {
        job.check = 0;
        job.base = NULL;
        swiglu_quantize_launch<1>(&job, gate_up);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// RMSNorm. A row is cut as in rmsnorm_forward_kernel and its sums have the same order. The row waits in shared memory
// for its norm, each vector where the thread that loaded it finds it again: then the quantizer, which is long, is a
// loop.

template <int K, int ADD, int STATS>
__global__ void __launch_bounds__(NORM_FORWARD_WARPS * WARP_LANES, STATS ? 1 : K > 6 ? 3 : 4)
    norm_quantize_kernel(const __grid_constant__ NormForward p, const __grid_constant__ QuantizeJob job, int T) {
    extern __shared__ Vector waiting[];  // [K][threads]
    __shared__ float sums[2][NORM_FORWARD_WARPS];
    BaseUse use;
    if (!base_begin(job, &use)) {
        return;
    }
    int t = threadIdx.x % T, row_of = threadIdx.x / T, rows = blockDim.x / T, warps = T / WARP_LANES, turn = 0;
    for (int row0 = blockIdx.x * rows; row0 < p.BT; row0 += gridDim.x * rows, turn ^= 1) {
        int row = row0 + row_of, vectors = row < p.BT ? p.C / VEC : 0;
        size_t first = (size_t)row * p.C;
        Vector x[K];
        row_load<K>(x, p.a + first, t, T, vectors);
        if (ADD) {
            Vector y[K];
            row_load<K>(y, p.b + first, t, T, vectors);
#pragma unroll
            for (int k = 0; k < K; k++) {
                float sum[VEC];
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    sum[i] = reals_get(x[k], i) + reals_get(y[k], i);
                }
                x[k] = reals_of<VEC, floatX>(sum);
                if (t + k * T < vectors) {
                    ((Vector*)(p.sum + first))[t + k * T] = x[k];
                }
            }
        }
        float squares = 0.0f;
#pragma unroll
        for (int k = 0; k < K; k++) {
            waiting[k * blockDim.x + threadIdx.x] = x[k];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                squares += reals_get(x[k], i) * reals_get(x[k], i);
            }
        }
        squares = warp_sum(squares);
        if (warps > 1) {
            float* mine = sums[turn] + row_of * warps;
            mine[t / WARP_LANES] = squares;
            __syncthreads();
            squares = 0.0f;
            for (int i = 0; i < warps; i++) {
                squares += mine[i];
            }
        }
        float r = rsqrtf(squares / (float)p.C + p.eps);
        if (t == 0 && row < p.BT) {
            p.rstd[row] = r;
        }
#pragma unroll 1
        for (int k = 0; k < K; k++) {
            int v = t + k * T, valid = v < vectors;
            Vector inp = waiting[k * blockDim.x + threadIdx.x], w = valid ? ((const Vector*)p.weight)[v] : Vector{};
            float out[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                out[i] = reals_get(inp, i) * r * reals_get(w, i);
            }
            Vector rounded = reals_of<VEC, floatX>(out);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                out[i] = reals_get(rounded, i);
            }
            part_quantize<STATS>(job, &use, out, first / VEC + v, valid);
        }
    }
    base_end(job, &use);
}

// first launches have a block for its rows and end; others, which seldom do anything, have few blocks
template <int K, int ADD, int STATS> static void norm_quantize_blocks(const NormForward* p, const QuantizeJob* job,
                                                                      int warps) {
    int rows = max_int(1, 4 / warps), T = warps * WARP_LANES, threads = T * rows;
    int blocks = (int)ceil_div(p->BT, rows);
    blocks = job->check ? min_int(blocks, 4 * gpu.sm_count) : blocks;
    size_t shared = sizeof(Vector) * K * (size_t)threads;
    norm_quantize_kernel<K, ADD, STATS><<<blocks, threads, shared, gpu.stream>>>(*p, *job, T);
    cuda_check_launch();
}

// all launches of one call. Those behind the first start from the stored sum, for `sum` may lie on `a`.
template <int K> static void norm_quantize_launch(NormForward p, QuantizeJob job, int warps) {
    if (p.b) {
        norm_quantize_blocks<K, 1, 0>(&p, &job, warps);
        p.a = p.sum;
        p.b = NULL;
    } else {
        norm_quantize_blocks<K, 0, 0>(&p, &job, warps);
    }
    job.check = 1;
    if (job.base) {
        norm_quantize_blocks<K, 0, 0>(&p, &job, warps);
    }
    if (job.stats) {
        job.check = 0;
        job.base = NULL;
        norm_quantize_blocks<K, 0, 1>(&p, &job, warps);
    }
}

static void norm_quantize_any(const QuantizeArgs* args, NormForward p) {
    QuantizeJob job = fused_job(args, p.a, p.BT, p.C);
    RowShape shape = row_shape(p.C, NORM_FORWARD_WARPS, NORM_FORWARD_VECTORS);
    if (p.BT == 0) {
        return;
    }
    switch (shape.vectors) {
    case 1: norm_quantize_launch<1>(p, job, shape.warps); break;
    case 2: norm_quantize_launch<2>(p, job, shape.warps); break;
    case 3: norm_quantize_launch<3>(p, job, shape.warps); break;
    case 4: norm_quantize_launch<4>(p, job, shape.warps); break;
    case 5: norm_quantize_launch<5>(p, job, shape.warps); break;
    case 6: norm_quantize_launch<6>(p, job, shape.warps); break;
    case 7: norm_quantize_launch<7>(p, job, shape.warps); break;
    case 8: norm_quantize_launch<8>(p, job, shape.warps); break;
    default: die(EXIT_UNEXPECTED, "internal: rows of %d are too long for the fused norm", p.C);
    }
}

// The operand x (BT, C) = quantize(rmsnorm(inp)) with args, whose tensor is not used, and rstd (BT): rmsnorm_forward,
// then quantize; the normalized tensor is not stored.
static void cuda_rmsnorm_quantize(const QuantizeArgs* args, float* rstd, const floatX* inp, const floatX* weight,
                                  int BT, int C, float eps) {
    norm_quantize_any(args, NormForward{.sum = NULL, .out = NULL, .rstd = rstd, .a = inp, .b = NULL, .weight = weight,
                                        .BT = BT, .C = C, .eps = eps});
}

// sum (BT, C) = a + b, and the same of sum: add_rmsnorm_forward, then quantize. sum may be in place on a.
static void cuda_add_rmsnorm_quantize(const QuantizeArgs* args, floatX* sum, float* rstd, const floatX* a,
                                      const floatX* b, const floatX* weight, int BT, int C, float eps) {
    norm_quantize_any(args, NormForward{.sum = sum, .out = NULL, .rstd = rstd, .a = a, .b = b, .weight = weight,
                                        .BT = BT, .C = C, .eps = eps});
}
