// cuda/quantize.cuh: quantization to MXFP4 on the GPU (Quartet, arXiv 2505.14669 v4), codes, scales and masks equal bit
// for bit to cpu/quantize.h, together with the operand that the carrier's instruction multiplies.
//
//   kernel    source                      operands of Quartet   bytes an element, fp8 carrier
//   rows      floatX (rows, K)            x, w                  2 + 0.53 + 0.13 + 1
//   row_base  floatX (rows, K)            dy                    2 + 1
//   columns   floatX (K, rows)            dyt                   2 + 1
//   saved     packed codes (K, rows)      wt, xt                0.53 + 1
//   carry     packed codes (rows, K)      w, for each product   0.53 + 1
// This file has row_base, whose operand has a base for each row, the choice between the kernels, and carry.
//
// row_base: the largest scale of a row must be known before a byte of the row is written, so a block keeps the codes of
// whole rows in registers. A thread has up to ROW_CHUNKS groups of one row, or a block several short rows. Rows of more
// than ROW_CHUNKS * 256 groups are computed twice, first for their base.
#pragma once
#include "quantize_saved_mma.cuh"

#define ROW_CHUNKS 4
#define ROWS_IN_BLOCK 256

// how a block of `threads` shares rows: `rows` rows of `groups` each, `chunk` together, or one row in chunks of `chunk`
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
    p.chunk *= p.rows;
    p.threads = (int)round_up(p.chunk, WARP_LANES);
    return p;
}

// a block's neighbouring groups: of the operand from `first` on, `count` of them
typedef struct { uint32_t first; int count; } RowPiece;

// chunk c of the rows from `row` on; count not above 0 past the end
__device__ __forceinline__ RowPiece row_piece(const QuantizeJob& job, RowPlan plan, uint32_t row, int c) {
    int rows = min(plan.rows, (int)job.rows - (int)row), at = c * plan.chunk;
    return RowPiece{row * (uint32_t)plan.groups + (uint32_t)at, min(plan.chunk, rows * plan.groups - at)};
}

// groups of this thread's warp in the piece
__device__ __forceinline__ int piece_valid(RowPiece piece) {
    return max(0, min(WARP_LANES, piece.count - (int)threadIdx.x / WARP_LANES * WARP_LANES));
}

__device__ __forceinline__ void piece_prefetch(const QuantizeJob& job, RowPiece piece, uint4* stage) {
    const int N = GROUP_CHUNKS(floatX);
    uint32_t first = piece.first + threadIdx.x / WARP_LANES * WARP_LANES;
    int valid = piece_valid(piece);
    if (valid) {
        stage_prefetch<N>(stage, job.tensor + (size_t)first * GROUP, valid * N);
    }
}

// this warp's part of a piece: its lanes' codes. signs: the lane's sign word, spread. STAGES 2: in `stage` already
template <Rounding ROUND, int STAGES>
__device__ __forceinline__ uint32_t row_quantize(const QuantizeJob& job, GroupTops* tops, RowPiece piece,
                                                 uint32_t signs, uint64_t round_stream, int store, uint4* stage) {
    const int N = GROUP_CHUNKS(floatX);
    uint32_t words[GROUP_WORDS(floatX)], mask;
    uint32_t first = piece.first + threadIdx.x / WARP_LANES * WARP_LANES, group = piece.first + threadIdx.x;
    float v[GROUP];
    if (STAGES == 1) {
        stage_read<N>(words, job.tensor + (size_t)first * GROUP, piece_valid(piece) * N, stage);
    } else {
        stage_take<N>(words, stage);
    }
    if (job.rotation == ROTATE_SIGNED) {
        group_flip_signs<floatX>(words, signs);
    }
    group_unpack<floatX>(v, words);
    int valid = (int)threadIdx.x < piece.count;
    uint32_t scale = group_tops_where<SCALE_ABSMAX, ROUND>(valid, tops, &mask, v, job.rotation, &job.keys,
                                                           job.round_index + (uint64_t)group * (GROUP / 8),
                                                           round_stream);
    if (store && (job.codes || job.scales) && valid) {
        tops_store(job, tops, group, scale, mask);
    }
    return scale;
}

// e of a group for the row's base
__device__ __forceinline__ int row_exponent(const GroupTops* tops, uint32_t scale) {
    return scale == UE8M0_NAN || !tops_any(tops) ? CARRIER_NONE : (int)scale - 127;
}

__device__ __forceinline__ void row_store(const QuantizeJob& job, const GroupTops* tops, RowPiece piece,
                                          uint32_t scale, int base, uint4* stage) {
    uint32_t bytes[GROUP / 4];
    if (job.row_under && (int)threadIdx.x < piece.count) {
        int exponent = row_exponent(tops, scale);
        if (exponent != CARRIER_NONE && exponent - base < carrier_bottom(job.carrier)) {
            atomicAdd(job.row_under, 1);
        }
    }
    uint32_t first = piece.first + threadIdx.x / WARP_LANES * WARP_LANES;
    tops_carry(bytes, tops, scale, base, job.carrier);
    stage_write<2>((uint8_t*)job.operand + (size_t)first * GROUP, bytes, piece_valid(piece) * 2, stage);
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

// STAGES 2: while a piece is worked on, the next one, of this row or the next, is on its way
template <Rounding ROUND, int CHUNKS, int STAGES>
__global__ void __launch_bounds__(GROUP_THREADS, CHUNKS > (ROUND == ROUND_STOCHASTIC ? 1 : 3) ? 2 : 3)
    quantize_row_base_kernel(const __grid_constant__ QuantizeJob job, RowPlan plan) {
    __shared__ uint4 stages[GROUP_WARPS][STAGES][STAGE_CHUNKS(floatX)];
    __shared__ int largest[3][ROWS_IN_BLOCK];
    extern __shared__ uint32_t signs[];
    Streams streams = job_streams(job);
    uint4 *stage = stages[threadIdx.x / WARP_LANES][0], *other = stages[threadIdx.x / WARP_LANES][STAGES - 1];
    int thread = threadIdx.x, slot = 0, row_of = plan.rows > 1 ? min(thread / plan.groups, plan.rows - 1) : 0;
    int group_of = plan.rows > 1 ? thread % plan.groups : thread;
    uint32_t row = blockIdx.x * plan.rows, step = gridDim.x * plan.rows;
    if (STAGES > 1) {
        piece_prefetch(job, row_piece(job, plan, row, 0), stage);
        stage_commit();
    }
    for (int i = thread; i < 3 * ROWS_IN_BLOCK; i += blockDim.x) {
        largest[i / ROWS_IN_BLOCK][i % ROWS_IN_BLOCK] = CARRIER_NONE;
    }
    row_signs(signs, job, plan.groups, streams.sign);
    for (; row < job.rows; row += step) {
        GroupTops tops[CHUNKS];
        uint32_t scale[CHUNKS];
        int rows = min(plan.rows, (int)(job.rows - row)), next = slot == 2 ? 0 : slot + 1;
        if (thread < plan.rows) {
            largest[next][thread] = CARRIER_NONE;
        }
        int exponent = CARRIER_NONE;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            RowPiece piece = row_piece(job, plan, row, c);
            if (STAGES > 1) {
                piece_prefetch(job, row_piece(job, plan, c + 1 < CHUNKS ? row : row + step, (c + 1) % CHUNKS), other);
                stage_commit();
                stage_wait<1>();
            }
            uint32_t word = signs[min(c * plan.chunk + group_of, plan.groups - 1)];
            scale[c] = row_quantize<ROUND, STAGES>(job, &tops[c], piece, word, streams.round, 1, stage);
            exponent = thread < piece.count ? max(exponent, row_exponent(&tops[c], scale[c])) : exponent;
            uint4* taken = stage;
            stage = other;
            other = taken;
        }
        row_raise(&largest[slot][row_of], exponent, plan.rows == 1 || plan.groups % WARP_LANES == 0);
        __syncthreads();
        int base = carrier_base(job.carrier, largest[slot][row_of]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            row_store(job, &tops[c], row_piece(job, plan, row, c), scale[c], base, other);
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
        GroupTops tops;
        int base = 0, exponent = CARRIER_NONE;
        if (thread == 0) {
            largest = CARRIER_NONE;
        }
        __syncthreads();
        for (int write = 0; write < 2; write++) {
            for (int c = 0; c < plan.chunks; c++) {
                RowPiece piece = row_piece(job, plan, row, c);
                uint32_t word = signs[min(c * plan.chunk + thread, plan.groups - 1)];
                uint32_t scale = row_quantize<ROUND, 1>(job, &tops, piece, word, streams.round, write, stage);
                exponent = thread < piece.count ? max(exponent, row_exponent(&tops, scale)) : exponent;
                if (write) {
                    row_store(job, &tops, piece, scale, base, stage);
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

template <Rounding ROUND, int STAGES> static void row_base_launch(const QuantizeJob* job) {
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
    case 1: ROW_BASE((quantize_row_base_kernel<ROUND, 1, STAGES>)); break;
    case 2: ROW_BASE((quantize_row_base_kernel<ROUND, 2, STAGES>)); break;
    case 3: ROW_BASE((quantize_row_base_kernel<ROUND, 3, STAGES>)); break;
    case 4: ROW_BASE((quantize_row_base_kernel<ROUND, 4, STAGES>)); break;
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

typedef void (*JobKernel)(QuantizeJob);

// As many blocks as run at once. The second launch seldom has anything to do: it gets one block a multiprocessor and,
// where `overlap`, may start while the first one ends, for which it then waits (launch_order).
static void job_launch(JobKernel kernel, const QuantizeJob* job, int threads, size_t items, int overlap) {
    int blocks = job->check ? (int)min_i64((int64_t)items, gpu.sm_count) : persistent_blocks(kernel, threads, items);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.stream = gpu.stream;
    config.attrs = &early;
    config.numAttrs = overlap && job->check && gpu.major >= 9;
    cuda_check(cudaLaunchKernelEx(&config, kernel, *job));
}

template <ScaleRule RULE, Rounding ROUND, int STATS, int STAGES>
static void source_launch(const QuantizeJob* job, int saved, int transposed, int overlap) {
    size_t blocks = job->cols / GROUP;
    if (saved) {
        size_t items = (size_t)ceil_div(blocks, SAVED_BLOCKS) * (size_t)ceil_div(job->rows, SAVED_TILE);
        int mma = !STATS && job->base && !job->check && job->rotation != ROTATE_NONE && !job->codes && !job->scales &&
                  job->carrier == FORMAT_E4M3;
        job_launch(mma ? quantize_saved_mma_kernel<ROUND> : quantize_saved_kernel<ROUND, STATS>, job,
                   GROUP_THREADS, items, overlap);
    } else if (transposed) {
        size_t items = (size_t)ceil_div(blocks, COLUMN_BLOCKS) * (size_t)ceil_div(job->rows, COLUMN_WARP);
        int chunks = STAGES > 1 && job->rows % VEC == 0;
        job_launch(chunks ? quantize_columns_kernel<RULE, ROUND, STATS, STAGES>
                          : quantize_columns_kernel<RULE, ROUND, STATS, 1>,
                   job, COLUMN_THREADS, items, overlap);
    } else {
        size_t items = (size_t)ceil_div(job->rows * blocks, GROUP_THREADS);
        job_launch(quantize_rows_kernel<RULE, ROUND, STATS, STAGES>, job, GROUP_THREADS, items, overlap);
    }
}

template <int STATS, int STAGES>
static void spec_launch(const QuantizeArgs* args, const QuantizeJob* job, int overlap) {
    int saved = args->spec.source == SOURCE_SAVED;
    if (args->spec.scale == SCALE_QUEST) {
        source_launch<SCALE_QUEST, ROUND_NEAREST, STATS, STAGES>(job, 0, args->transposed, overlap);
    } else if (args->spec.rounding == ROUND_STOCHASTIC) {
        source_launch<SCALE_ABSMAX, ROUND_STOCHASTIC, STATS, STAGES>(job, saved, args->transposed, overlap);
    } else {
        source_launch<SCALE_ABSMAX, ROUND_NEAREST, STATS, STAGES>(job, saved, args->transposed, overlap);
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
    check(args->round_index % 4 == 0, "internal: a group's random numbers begin at %llu, not at a multiple of 4",
          (unsigned long long)args->round_index);
    check(!fp8 || (out->base != NULL) != (out->row_scale != NULL), "internal: an 8-bit operand has one base, or one a "
          "row");
    check(!(fp8 && out->row_scale) || (args->spec.source == SOURCE_TENSOR && !args->transposed &&
                                       args->spec.scale == SCALE_ABSMAX), "internal: no base a row for this operand");
    uintptr_t bits = (uintptr_t)out->codes % 4 | (uintptr_t)out->operand;
    bits |= args->spec.source == SOURCE_TENSOR ? (uintptr_t)args->tensor : (uintptr_t)args->saved->codes;
    check(bits % 16 == 0, "internal: an operand is not 16-byte aligned");
}

// STAGES, overlap: see the kernels and job_launch
template <int STAGES> static void quantize_launch(const QuantizeArgs* args, int overlap) {
    quantize_check(args);
    const QTensor *out = args->out, *saved = args->saved;
    int from_saved = args->spec.source == SOURCE_SAVED, fp8 = out->operand && out->carrier != FORMAT_FLOATX;
    QuantizeJob job = {.rotation = args->spec.rotation, .carrier = out->carrier, .check = 0,
                       .rows = (uint32_t)out->rows, .cols = (uint32_t)out->cols, .tensor = args->tensor,
                       .kept = MXINT8_NONE,
                       .saved_codes = from_saved ? saved->codes : NULL,
                       .saved_scales = from_saved ? saved->scales : NULL, .codes = out->codes, .scales = out->scales,
                       .mask = out->mask, .operand = out->operand, .base = fp8 ? out->base : NULL,
                       .row_scale = fp8 ? out->row_scale : NULL,
                       .row_under = args->row_under, .again = args->again, .seed = args->seed,
                       .sign_stream = args->sign_stream, .sign_index = args->sign_index,
                       .round_stream = args->round_stream, .round_index = args->round_index,
                       .position = args->position, .owed = out->owed, .stats = args->stats,
                       .keys = philox_keys(args->seed)};
    if (out->rows == 0 || out->cols == 0) {
        return;
    }
    if (job.row_scale) {
        args->spec.rounding == ROUND_STOCHASTIC ? row_base_launch<ROUND_STOCHASTIC, STAGES>(&job)
                                                : row_base_launch<ROUND_NEAREST, STAGES>(&job);
    } else {
        spec_launch<0, STAGES>(args, &job, overlap);
        job.check = 1;
        if (job.base) {
            spec_launch<0, STAGES>(args, &job, overlap);
        }
    }
    if (args->stats) {  // a kernel of its own, which writes nothing else
        job.check = 0;
        job.base = NULL;
        spec_launch<1, 1>(args, &job, 0);
    }
}

// asynchronous; out->base->scale, or row_scale, is there when the stream comes by
static void cuda_quantize(const QuantizeArgs* args) { quantize_launch<SOURCE_STAGES>(args, 1); }

// ---------------------------------------------------------------------------------------------------------------------
// carry: a thread has 16 elements of a row

#define CARRY_ELEMENTS 16
#define CARRY_THREADS 256

// the bits 3 of the lower four digits at the bits 7 of four bytes
__device__ __forceinline__ uint32_t signs_of_codes(uint32_t codes) {
    uint32_t pairs = ((codes & 0x8888u) | (codes & 0x8800u) << 8) & 0x00880088u;
    return ((pairs | pairs << 4) & 0x08080808u) << 4;
}

__global__ void __launch_bounds__(CARRY_THREADS) carry_kernel(const __grid_constant__ QTensor q, size_t pieces) {
    size_t i = (size_t)blockIdx.x * CARRY_THREADS + threadIdx.x;
    if (i >= pieces) {
        return;
    }
    uint32_t scale = q.scales[i / (GROUP / CARRY_ELEMENTS)];
    const uint32_t* from = (const uint32_t*)q.codes + 2 * i;
    uint32_t codes[2] = {from[0], from[1]};
    if (q.carrier != FORMAT_FLOATX) {
        // as the quantizer's second launch; carrier_bases_advance takes `largest` along
        int base = q.base->largest == CARRIER_NONE ? q.base->base : carrier_base(q.carrier, q.base->largest);
        const float magnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        uint32_t table[2], bytes[CARRY_ELEMENTS / 4];
        carrier_pack<8>(table, magnitudes, carrier_factor(scale, base, 0), q.carrier);
#pragma unroll
        for (int k = 0; k < CARRY_ELEMENTS / 4; k++) {
            uint32_t four = codes[k / 2] >> (k % 2 * 16);
            bytes[k] = bytes_pick(table[0], table[1], four & 0x7777u) | signs_of_codes(four);
        }
        ((uint4*)q.operand)[i] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
        return;
    }
    float s = ue8m0_to_f32(scale);
#pragma unroll
    for (int k = 0; k < CARRY_ELEMENTS; k += VEC) {
        Lanes<VEC> lanes;
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            lanes.v[j] = to_floatX(mul_rn(e2m1_to_f32(codes[(k + j) / 8] >> (4 * ((k + j) % 8)) & 15u), s));
        }
        lanes_store((floatX*)q.operand + i * CARRY_ELEMENTS + k, lanes);
    }
}

// q->operand again from q->codes and q->scales, as cuda_quantize wrote it with them. Asynchronous.
static void cuda_carry(const QTensor* q) {
    size_t pieces = (size_t)q->rows * q->cols / CARRY_ELEMENTS;
    int fp8 = q->carrier != FORMAT_FLOATX;
    check(q->operand && q->codes && q->cols % GROUP == 0 && (!fp8 || q->base) && (uintptr_t)q->codes % 4 == 0 &&
              (uintptr_t)q->operand % 16 == 0,
          "internal: nothing to make an operand (%d, %d) of", q->rows, q->cols);
    if (pieces > 0) {
        carry_kernel<<<(unsigned)ceil_div((int64_t)pieces, CARRY_THREADS), CARRY_THREADS, 0, gpu.stream>>>(*q, pieces);
        cuda_check_launch();
    }
}
