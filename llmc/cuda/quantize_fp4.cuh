// cuda/quantize_fp4.cuh: the operand of the FP4 carrier (quant.h), equal bit for bit to cpu/quantize_fp4.h. Runs on any
// GPU; the product that multiplies it (gemm.cuh) needs Blackwell, where nothing of this has run yet.
//
// The quantizers write MXFP4's codes and scales as they do for nobody's carrier. Then two passes over the scales: the
// largest of the tensor, or of each row; the scales in tiles. Codes that nobody keeps lie in the operand already, and
// only those under the window are touched; others are copied. No base is predicted, and nothing is written twice.
//   bytes an element, beside the quantizer's   x, w 0.03 + 0.03 + 0.06 + 1     dy, wt, dyt, xt 0.03 + 0.03 + 0.06
#pragma once
#include "fused_backward.cuh"

#define FP4_THREADS 256

typedef struct {
    uint32_t rows, groups;          // groups of a row
    const uint8_t *codes, *scales;  // MXFP4
    uint8_t *to, *tiles;            // codes and scales of the operand
    CarrierBase* base;              // or
    float* row_scale;
    int32_t* under;                 // groups under the window are added, or NULL
} Fp4Job;

// the base, from the largest scale: a warp has whole rows
__global__ void __launch_bounds__(FP4_THREADS) fp4_base_kernel(Fp4Job job) {
    const uint32_t warps = FP4_THREADS / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    int of_rows = CARRIER_NONE;
    for (uint32_t row = blockIdx.x * warps + threadIdx.x / WARP_LANES; row < job.rows; row += gridDim.x * warps) {
        const uint8_t* scales = job.scales + (size_t)row * job.groups;
        int largest = CARRIER_NONE;
        for (uint32_t g = lane; g < job.groups; g += WARP_LANES) {
            int scale = scales[g];
            largest = scale == UE8M0_NAN ? largest : max(largest, scale - 127);
        }
        largest = __reduce_max_sync(FULL_WARP, largest);
        of_rows = max(of_rows, largest);
        if (job.row_scale && lane == 0) {
            job.row_scale[row] = power_of_two(nvfp4_base(largest));
        }
    }
    if (job.base && lane == 0) {
        atomicMax(&job.base->largest, of_rows);
    }
}

// 8 codes, `under` octaves under the window
__device__ __forceinline__ uint32_t fp4_codes(uint32_t codes, int under) {
    uint32_t rounded = 0;
#pragma unroll 1
    for (int i = 0; i < 32; i += 4) {
        rounded |= nvfp4_code(codes >> i & 15u, under) << i;
    }
    return rounded;
}

// Group `at` of the operand, which is that of the source but for codes under the window; returns whether one of those
// was not zero. Packed codes have 4-byte alignment (masks of an odd number of groups lie before them).
__device__ __forceinline__ int fp4_group(const Fp4Job& job, size_t at, int under) {
    const uint32_t* from = (const uint32_t*)job.codes + at * (GROUP / 8);
    uint32_t* to = (uint32_t*)job.to + at * (GROUP / 8);
    uint32_t any = 0;
    if (under == 0 && from == to) {
        return 0;
    }
#pragma unroll
    for (int i = 0; i < GROUP / 8; i++) {
        uint32_t codes = from[i];
        any |= under ? codes & 0x77777777u : 0u;
        to[i] = under ? fp4_codes(codes, under) : codes;
    }
    return any != 0;
}

// A thread has two groups of a row, whose scales are a word of the tiles. Words of the padding are zero.
__global__ void __launch_bounds__(FP4_THREADS) fp4_operand_kernel(Fp4Job job, uint32_t words) {
    uint32_t step = gridDim.x * FP4_THREADS;
    int base = job.base ? nvfp4_base(job.base->largest) : 0, count = 0;
    for (uint32_t w = blockIdx.x * FP4_THREADS + threadIdx.x; w < words; w += step) {
        Nvfp4Word place = nvfp4_word(w, job.groups);
        uint32_t word = 0;
        if (job.row_scale && place.row < job.rows) {
            base = f32_biased_exponent(job.row_scale[place.row]) - 127;
        }
        for (uint32_t i = 0; i < 2 && place.row < job.rows && place.group + i < job.groups; i++) {
            size_t at = (size_t)place.row * job.groups + place.group + i;
            Nvfp4Scale scale = nvfp4_scale(job.scales[at], base);
            count += fp4_group(job, at, scale.under);
            word |= (uint32_t)scale.code * 0x0101u << (16 * i);
        }
        ((uint32_t*)job.tiles)[w] = word;
    }
    count = __reduce_add_sync(FULL_WARP, count);
    if (job.under && count && threadIdx.x % WARP_LANES == 0) {
        atomicAdd(job.under, count);
    }
    if (job.base && blockIdx.x == 0 && threadIdx.x == 0) {
        job.base->base = base;
        job.base->scale = power_of_two(base);
    }
}

// out->operand and its base or bases from what source holds; groups under the window are added to *under, or NULL.
// Asynchronous.
static void fp4_operand(const QTensor* out, const QTensor* source, int32_t* under) {
    check((out->base != NULL) != (out->row_scale != NULL) && out->cols % GROUP == 0,
          "internal: an FP4 operand has one base, or one a row");
    check((uintptr_t)out->operand % 16 == 0 && (uintptr_t)source->codes % 4 == 0,
          "internal: an FP4 operand is not aligned");
    Fp4Job job = {.rows = (uint32_t)out->rows, .groups = (uint32_t)(out->cols / GROUP), .codes = source->codes,
                  .scales = source->scales, .to = (uint8_t*)out->operand, .tiles = nvfp4_tiles(out), .base = out->base,
                  .row_scale = out->row_scale, .under = under};
    size_t words = nvfp4_tile_bytes(out->rows, out->cols) / sizeof(uint32_t);
    if (words == 0) {
        return;
    }
    int blocks = (int)min_i64(ceil_div(out->rows, FP4_THREADS / WARP_LANES), 8 * gpu.sm_count);
    fp4_base_kernel<<<blocks, FP4_THREADS, 0, gpu.stream>>>(job);
    blocks = (int)min_i64(ceil_div((int64_t)words, FP4_THREADS), 16 * gpu.sm_count);
    fp4_operand_kernel<<<blocks, FP4_THREADS, 0, gpu.stream>>>(job, (uint32_t)words);
    cuda_check_launch();
}

// ---------------------------------------------------------------------------------------------------------------------
// the quantizers of MXFP4 for every carrier

static int fp4_wanted(const QuantizeArgs* args) {
    return args->out->operand && args->out->carrier == FORMAT_NVFP4;
}

// args for a quantizer: for the FP4 carrier it writes codes and scales into *source, and no operand
static QuantizeArgs fp4_begin(const QuantizeArgs* args, QTensor* source) {
    QuantizeArgs begun = *args;
    *source = fp4_wanted(args) ? nvfp4_source(args->out) : *args->out;
    begun.out = source;
    return begun;
}

static void fp4_end(const QuantizeArgs* args, const QTensor* source) {
    if (fp4_wanted(args)) {
        int32_t* under = args->out->base ? &args->out->base->under : args->row_under;
        fp4_operand(args->out, source, args->again ? NULL : under);
    }
}

// q has its codes: nothing is counted again, and the base comes out as it was
static void cuda_carry_mxfp4(const QTensor* q) {
    if (q->carrier == FORMAT_NVFP4) {
        fp4_operand(q, q, NULL);
    } else {
        cuda_carry(q);
    }
}

static void cuda_quantize_mxfp4(const QuantizeArgs* args) {
    QTensor source;
    QuantizeArgs begun = fp4_begin(args, &source);
    cuda_quantize(&begun);
    fp4_end(args, &source);
}

static void cuda_swiglu_quantize_mxfp4(const QuantizeArgs* args, floatX* scratch, Mxint8 kept, const floatX* gate_up,
                                       int BT, int F) {
    QTensor source;
    QuantizeArgs begun = fp4_begin(args, &source);
    cuda_swiglu_quantize(&begun, scratch, kept, gate_up, BT, F);
    fp4_end(args, &source);
}

static void cuda_rmsnorm_quantize_mxfp4(const QuantizeArgs* args, floatX* scratch, floatX* sum, float* rstd,
                                        const floatX* a, const floatX* b, const floatX* weight, int BT, int C,
                                        float eps) {
    QTensor source;
    QuantizeArgs begun = fp4_begin(args, &source);
    cuda_rmsnorm_quantize(&begun, scratch, sum, rstd, a, b, weight, BT, C, eps);
    fp4_end(args, &source);
}
