// cuda/quantize.cuh: quantization to MXFP4 on the GPU (Quartet, arXiv 2505.14669 v4), codes, scales and masks equal bit
// for bit to cpu/quantize.h, together with the operand that the carrier's instruction multiplies.
//
//   kernel    source                      operands of Quartet   bytes an element, fp8 carrier
//   rows      floatX (rows, K)            x, w                  2 + 0.53 + 0.13 + 1
//   row_base  floatX (rows, K)            dy                    2 + 1
//   columns   floatX (K, rows)            dyt                   2 + 1
//   saved     packed codes (K, rows)      wt, xt                0.53 + 1
// This file has row_base, whose operand has a base for each row, and the choice between the kernels.
//
// row_base: the largest scale of a row must be known before a byte of the row is written, so a block keeps the codes of
// whole rows in registers, as e5m2 bytes, which hold e2m1 exactly; rescaling them in f16 is exact, too, down to where
// all bytes are zero. A thread has up to ROW_CHUNKS groups of one row, or a block several short rows. Rows of more than
// ROW_CHUNKS * 256 groups are computed twice, first for their base.
#pragma once
#include "quantize_saved.cuh"

#define ROW_CHUNKS 4
#define ROWS_IN_BLOCK 256

// how a block of `threads` shares rows: `rows` rows of `groups` each, or one row in chunks of `chunk` groups
typedef struct { int rows, groups, chunk, chunks, threads; } RowPlan;

static RowPlan row_plan(int cols) {
    RowPlan p;
    p.groups = cols / GROUP;
    p.chunks = min_int((int)ceil_div(p.groups, GROUP_THREADS), ROW_CHUNKS);
    p.chunk = (int)ceil_div(p.groups, p.chunks);
    if (p.chunk > GROUP_THREADS) {  // computed twice
        p.chunks = (int)ceil_div(p.groups, GROUP_THREADS);
        p.chunk = GROUP_THREADS;
    }
    p.rows = max_int(1, GROUP_THREADS / p.groups);
    p.threads = (int)round_up(p.rows > 1 ? p.rows * p.groups : p.chunk, WARP_LANES);
    return p;
}

// e2m1 values, as e5m2 bytes, times 2^k in the carrier's format. Below 2^-24 only zeros are left.
__device__ __forceinline__ uint32_t bytes_rescale(uint32_t bytes, __half2 factor, Format carrier) {
    uint32_t half[2] = {__byte_perm(bytes, 0, 0x1404), __byte_perm(bytes, 0, 0x3424)};  // e5m2 is the top of an f16
    __half2 low = __hmul2(*(const __half2*)&half[0], factor), high = __hmul2(*(const __half2*)&half[1], factor);
#if __CUDA_ARCH__ >= 890
    uint16_t a, b;
    if (carrier == FORMAT_E4M3) {
        asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(a) : "r"(*(uint32_t*)&low));
        asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(b) : "r"(*(uint32_t*)&high));
    } else {
        asm("cvt.rn.satfinite.e5m2x2.f16x2 %0, %1;" : "=h"(a) : "r"(*(uint32_t*)&low));
        asm("cvt.rn.satfinite.e5m2x2.f16x2 %0, %1;" : "=h"(b) : "r"(*(uint32_t*)&high));
    }
    return (uint32_t)a | (uint32_t)b << 16;
#else
    float2 x = __half22float2(low), y = __half22float2(high);
    return fp8_pack(x.x, x.y, y.x, y.y, carrier);
#endif
}

__device__ __forceinline__ __half2 half_power_of_two(uint32_t scale, int base) {
    int k = (int)scale - 127 - base;
    uint32_t bits = k >= -14 ? (uint32_t)(min(k, 15) + 15) << 10 : k >= -24 ? 1u << (k + 24) : 0u;
    bits = scale == UE8M0_NAN ? 0x7fffu : bits;
    bits |= bits << 16;
    return *(__half2*)&bits;
}

// this warp's part of a block's neighbouring groups: its lanes' codes as e5m2 bytes. first: the operand's group of
// thread 0; word: the lane's sign word
template <Rounding ROUND>
__device__ __forceinline__ uint32_t row_quantize(const QuantizeJob& job, uint32_t* bytes, size_t first, int count,
                                                 uint32_t signs, uint64_t round_stream, int store, uint4* stage) {
    const int N = GROUP_CHUNKS(floatX);
    uint32_t words[GROUP_WORDS(floatX)], mask;
    int at_warp = threadIdx.x / WARP_LANES * WARP_LANES, valid = max(0, min(WARP_LANES, count - at_warp));
    size_t group = first + threadIdx.x;
    float v[GROUP];
    stage_read<N>(words, job.tensor + (first + at_warp) * GROUP, valid * N, stage);
    if (job.rotation == ROTATE_SIGNED) {
        group_flip_signs<floatX>(words, signs);
    }
    group_unpack<floatX>(v, words);
    uint32_t scale = group_quantize<SCALE_ABSMAX, ROUND, 0>(job, v, &mask, 1.0f, round_stream, group * GROUP, 1);
#pragma unroll
    for (int i = 0; i < GROUP / 4; i++) {
        bytes[i] = fp8_pack(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3], FORMAT_E5M2);
    }
    if (store && (job.codes || job.scales) && (int)threadIdx.x < count) {
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            v[k] = mul_rn(v[k], CODE_UNIT);
        }
        group_store(job, v, group, scale, mask);
    }
    return scale;
}

// e of a group for the row's base
__device__ __forceinline__ int row_exponent(const uint32_t* bytes, uint32_t scale) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < GROUP / 4; i++) {
        bits |= bytes[i];
    }
    return scale == UE8M0_NAN || !(bits & 0x7f7f7f7fu) ? CARRIER_NONE : (int)scale - 127;
}

__device__ __forceinline__ void row_store(const QuantizeJob& job, uint32_t* bytes, size_t first, int count,
                                          uint32_t scale, int base, uint4* stage) {
    int at_warp = threadIdx.x / WARP_LANES * WARP_LANES, valid = max(0, min(WARP_LANES, count - at_warp));
    __half2 factor = half_power_of_two(scale, base);
#pragma unroll
    for (int i = 0; i < GROUP / 4; i++) {
        bytes[i] = bytes_rescale(bytes[i], factor, job.carrier);
    }
    stage_write<2>((uint8_t*)job.operand + (first + at_warp) * GROUP, bytes, valid * 2, stage);
}

// the sign words of all groups of a row, spread, by the whole block
__device__ __forceinline__ void row_signs(uint32_t* signs, const QuantizeJob& job, int groups, uint64_t stream) {
    for (int i = threadIdx.x; 4 * i < groups && job.rotation == ROTATE_SIGNED; i += blockDim.x) {
        Philox p = philox(job.seed, job.sign_index + (uint64_t)i, stream);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            signs[4 * i + j] = signs_spread<floatX>(p.w[j]);  // groups up to a multiple of 4 have room
        }
    }
    __syncthreads();
}

// the row's largest exponent so far; three slots in turn: one is filled, one read, one cleared
__device__ __forceinline__ void row_raise(int* slot, int exponent, int whole_warp) {
    if (whole_warp) {
        exponent = __reduce_max_sync(FULL_WARP, exponent);
        if (threadIdx.x % WARP_LANES == 0) {
            atomicMax(slot, exponent);
        }
    } else {
        atomicMax(slot, exponent);
    }
}

template <Rounding ROUND, int CHUNKS>
__global__ void __launch_bounds__(GROUP_THREADS, ROUND == ROUND_NEAREST && CHUNKS < 4 ? 3 : 2)
    quantize_row_base_kernel(const __grid_constant__ QuantizeJob job, RowPlan plan) {
    __shared__ uint4 stages[GROUP_WARPS][STAGE_CHUNKS(floatX)];
    __shared__ int largest[3][ROWS_IN_BLOCK];
    extern __shared__ uint32_t signs[];
    Streams streams = job_streams(job);
    uint4* stage = stages[threadIdx.x / WARP_LANES];
    int thread = threadIdx.x, slot = 0, row_of = plan.rows > 1 ? min(thread / plan.groups, plan.rows - 1) : 0;
    for (int i = thread; i < 3 * ROWS_IN_BLOCK; i += blockDim.x) {
        largest[i / ROWS_IN_BLOCK][i % ROWS_IN_BLOCK] = CARRIER_NONE;
    }
    row_signs(signs, job, plan.groups, streams.sign);
    for (uint32_t row = blockIdx.x * plan.rows; row < job.rows; row += gridDim.x * plan.rows) {
        uint32_t bytes[CHUNKS][GROUP / 4], scale[CHUNKS];
        int rows = min(plan.rows, (int)(job.rows - row));
        size_t first = (size_t)row * plan.groups;
        int next = slot == 2 ? 0 : slot + 1;
        if (thread < plan.rows) {
            largest[next][thread] = CARRIER_NONE;
        }
        int exponent = CARRIER_NONE;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int at = c * plan.chunk, count = plan.rows > 1 ? rows * plan.groups : min(plan.chunk, plan.groups - at);
            uint32_t word = signs[plan.rows > 1 ? thread % plan.groups : min(at + thread, plan.groups - 1)];
            scale[c] = row_quantize<ROUND>(job, bytes[c], first + at, count, word, streams.round, 1, stage);
            exponent = thread < count ? max(exponent, row_exponent(bytes[c], scale[c])) : exponent;
        }
        row_raise(&largest[slot][row_of], exponent, plan.rows == 1 || plan.groups % WARP_LANES == 0);
        __syncthreads();
        int base = carrier_base(job.carrier, largest[slot][row_of]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int at = c * plan.chunk, count = plan.rows > 1 ? rows * plan.groups : min(plan.chunk, plan.groups - at);
            row_store(job, bytes[c], first + at, count, scale[c], base, stage);
        }
        if (thread < rows) {
            job.row_scale[row + thread] = power_of_two(carrier_base(job.carrier, largest[slot][thread]));
        }
        slot = next;
    }
}

// longer rows: once for the base, once more to write
template <Rounding ROUND>
__global__ void __launch_bounds__(GROUP_THREADS)
    quantize_long_row_kernel(const __grid_constant__ QuantizeJob job, RowPlan plan) {
    __shared__ uint4 stages[GROUP_WARPS][STAGE_CHUNKS(floatX)];
    __shared__ int largest;
    extern __shared__ uint32_t signs[];
    Streams streams = job_streams(job);
    uint4* stage = stages[threadIdx.x / WARP_LANES];
    int thread = threadIdx.x;
    row_signs(signs, job, plan.groups, streams.sign);
    for (uint32_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
        uint32_t bytes[GROUP / 4];
        int base = 0, exponent = CARRIER_NONE;
        if (thread == 0) {
            largest = CARRIER_NONE;
        }
        __syncthreads();
        for (int write = 0; write < 2; write++) {
            for (int at = 0; at < plan.groups; at += plan.chunk) {
                int count = min(plan.chunk, plan.groups - at);
                size_t first = (size_t)row * plan.groups + at;
                uint32_t word = signs[min(at + thread, plan.groups - 1)];
                uint32_t scale = row_quantize<ROUND>(job, bytes, first, count, word, streams.round, write, stage);
                exponent = thread < count ? max(exponent, row_exponent(bytes, scale)) : exponent;
                if (write) {
                    row_store(job, bytes, first, count, scale, base, stage);
                }
            }
            if (!write) {
                row_raise(&largest, exponent, 1);
            }
            __syncthreads();
            base = carrier_base(job.carrier, largest);
        }
        if (thread == 0) {
            job.row_scale[row] = power_of_two(base);
        }
        __syncthreads();
    }
}

template <Rounding ROUND> static void row_base_launch(const QuantizeJob* job) {
    RowPlan plan = row_plan((int)job->cols);
    size_t items = (size_t)ceil_div(job->rows, plan.rows), shared = sizeof(uint32_t) * (size_t)round_up(plan.groups, 4);
    check(shared <= 16384, "internal: rows of %u elements have more sign words than fit", job->cols);
#define ROW_BASE(kernel)                                                                            \
    do {                                                                                            \
        int blocks = 0;                                                                             \
        cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, plan.threads, shared)); \
        blocks = (int)min_i64((int64_t)items, (int64_t)blocks * gpu.sm_count);                      \
        kernel<<<blocks, plan.threads, shared, gpu.stream>>>(*job, plan);                           \
    } while (0)
    switch (plan.chunks) {
    case 1: ROW_BASE((quantize_row_base_kernel<ROUND, 1>)); break;
    case 2: ROW_BASE((quantize_row_base_kernel<ROUND, 2>)); break;
    case 3: ROW_BASE((quantize_row_base_kernel<ROUND, 3>)); break;
    case 4: ROW_BASE((quantize_row_base_kernel<ROUND, 4>)); break;
    default: ROW_BASE((quantize_long_row_kernel<ROUND>));
    }
#undef ROW_BASE
    cuda_check_launch();
}

// ---------------------------------------------------------------------------------------------------------------------
// which kernel

static int cuda_quantize_supports(const QuantSpec* spec) {
    if (spec->format == FORMAT_FLOATX) {
        return spec->scale == SCALE_NONE && spec->rotation == ROTATE_NONE;
    }
    return spec->format == FORMAT_MXFP4 && spec->group == GROUP &&
           (spec->scale == SCALE_ABSMAX ||
            (spec->scale == SCALE_QUEST && spec->rounding == ROUND_NEAREST && spec->source == SOURCE_TENSOR));
}

template <ScaleRule RULE, Rounding ROUND, int STATS>
static void source_launch(const QuantizeJob* job, int saved, int transposed) {
    size_t blocks = job->cols / GROUP;
    if (saved) {
        size_t items = (size_t)ceil_div(blocks, SAVED_BLOCKS) * (size_t)ceil_div(job->rows, SAVED_TILE);
        int mma = !STATS && job->base && !job->check && job->rotation != ROTATE_NONE && !job->codes && !job->scales &&
                  job->carrier == FORMAT_E4M3;
        if (mma) {
            int grid = persistent_blocks(quantize_saved_kernel<ROUND, 0, 1>, GROUP_THREADS, items);
            quantize_saved_kernel<ROUND, 0, 1><<<grid, GROUP_THREADS, 0, gpu.stream>>>(*job);
        } else {
            int grid = persistent_blocks(quantize_saved_kernel<ROUND, STATS, 0>, GROUP_THREADS, items);
            quantize_saved_kernel<ROUND, STATS, 0><<<grid, GROUP_THREADS, 0, gpu.stream>>>(*job);
        }
    } else if (transposed) {
        size_t items = (size_t)ceil_div(blocks, COLUMN_BLOCKS) * (size_t)ceil_div(job->rows, COLUMN_WARP);
        int grid = persistent_blocks(quantize_columns_kernel<RULE, ROUND, STATS>, COLUMN_THREADS, items);
        quantize_columns_kernel<RULE, ROUND, STATS><<<grid, COLUMN_THREADS, 0, gpu.stream>>>(*job);
    } else {
        size_t items = (size_t)ceil_div(job->rows * blocks, GROUP_THREADS);
        int grid = persistent_blocks(quantize_rows_kernel<RULE, ROUND, STATS>, GROUP_THREADS, items);
        quantize_rows_kernel<RULE, ROUND, STATS><<<grid, GROUP_THREADS, 0, gpu.stream>>>(*job);
    }
    cuda_check_launch();
}

template <int STATS> static void spec_launch(const QuantizeArgs* args, const QuantizeJob* job) {
    int saved = args->spec.source == SOURCE_SAVED;
    if (args->spec.scale == SCALE_QUEST) {
        source_launch<SCALE_QUEST, ROUND_NEAREST, STATS>(job, 0, args->transposed);
    } else if (args->spec.rounding == ROUND_STOCHASTIC) {
        source_launch<SCALE_ABSMAX, ROUND_STOCHASTIC, STATS>(job, saved, args->transposed);
    } else {
        source_launch<SCALE_ABSMAX, ROUND_NEAREST, STATS>(job, saved, args->transposed);
    }
}

static void quantize_check(const QuantizeArgs* args) {
    const QTensor* out = args->out;
    check(cuda_quantize_supports(&args->spec) && out->format == FORMAT_MXFP4,
          "internal: quantizer without an implementation");
    check(out->cols % GROUP == 0, "contraction dimension %d is not a multiple of %d, which MXFP4 groups need",
          out->cols, GROUP);
    if (args->spec.source == SOURCE_SAVED) {
        check(args->saved && args->saved->rows == out->cols && args->saved->cols == out->rows && out->rows % GROUP == 0,
              "internal: the saved operand is not (%d, %d)", out->cols, out->rows);
    }
    check((size_t)out->rows * (size_t)out->cols / GROUP < (1u << 31), "internal: an operand of %d x %d has too many "
          "groups", out->rows, out->cols);
    int fp8 = out->operand && out->carrier != FORMAT_FLOATX;
    check(!fp8 || gpu.major > 8 || (gpu.major == 8 && gpu.minor == 9),
          "internal: no 8-bit carrier on compute capability %d.%d", gpu.major, gpu.minor);
    check(!fp8 || (out->base != NULL) != (out->row_scale != NULL), "internal: an 8-bit operand has one base, or one a "
          "row");
    check(!(fp8 && out->row_scale) || (args->spec.source == SOURCE_TENSOR && !args->transposed &&
                                       args->spec.scale == SCALE_ABSMAX), "internal: no base a row for this operand");
    uintptr_t bits = (uintptr_t)out->codes % 4 | (uintptr_t)out->operand;
    bits |= args->spec.source == SOURCE_TENSOR ? (uintptr_t)args->tensor : (uintptr_t)args->saved->codes;
    check(bits % 16 == 0, "internal: an operand is not 16-byte aligned");
}

// asynchronous; out->base->scale, or row_scale, is there when the stream comes by
static void cuda_quantize(const QuantizeArgs* args) {
    quantize_check(args);
    const QTensor *out = args->out, *saved = args->saved;
    int from_saved = args->spec.source == SOURCE_SAVED, fp8 = out->operand && out->carrier != FORMAT_FLOATX;
    QuantizeJob job = {.rotation = args->spec.rotation, .carrier = out->carrier, .check = 0,
                       .rows = (uint32_t)out->rows, .cols = (uint32_t)out->cols, .tensor = args->tensor,
                       .saved_codes = from_saved ? saved->codes : NULL,
                       .saved_scales = from_saved ? saved->scales : NULL, .codes = out->codes, .scales = out->scales,
                       .mask = out->mask, .operand = out->operand, .base = fp8 ? out->base : NULL,
                       .row_scale = fp8 ? out->row_scale : NULL, .seed = args->seed, .sign_stream = args->sign_stream,
                       .sign_index = args->sign_index, .round_stream = args->round_stream,
                       .round_index = args->round_index, .position = args->position, .owed = out->owed,
                       .stats = args->stats};
    if (out->rows == 0 || out->cols == 0) {
        return;
    }
    if (job.row_scale) {
        args->spec.rounding == ROUND_STOCHASTIC ? row_base_launch<ROUND_STOCHASTIC>(&job)
                                                : row_base_launch<ROUND_NEAREST>(&job);
    } else {
        spec_launch<0>(args, &job);
        job.check = 1;
        if (job.base) {
            spec_launch<0>(args, &job);
        }
    }
    if (args->stats) {  // a kernel of its own, which writes nothing else
        job.check = 0;
        job.base = NULL;
        spec_launch<1>(args, &job);
    }
}
