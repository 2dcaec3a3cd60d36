// cuda/fused.cuh: the forward half of the passes that take their neighbour along (ops.h): the operand x straight from
// what SwiGLU or a norm is computed of. fused_backward.cuh has the other half. Each function equals a composition of
// operations bit for bit: what that would store in floatX is rounded in registers at the same point. Where a shape, the
// build or telemetry asks for more than the fused kernels can, the composition itself runs.
//
//   bytes an element, fp8 carrier, codes kept     fused                        composition
//   swiglu_quantize                               4 + 0.66 + 1     = 5.66      4 + 2 + 3.66     = 9.66
//   the same with gate_up kept as MXINT8          7.72                         11.72
//   rmsnorm_quantize, with the add                6 + 0.66 + 1     = 7.66      6 + 2 + 3.66     = 11.66
//   rmsnorm_quantize                              2 + 0.66 + 1     = 3.66      2 + 2 + 3.66     = 7.66
//
// SwiGLU does as quantize_rows_kernel: a lane owns a group of 32, which reaches it through the warp's staging area. A
// norm's row lies lane by lane, 16 bytes each, and must be summed in the order of rmsnorm.cuh; there a group stays in
// the GROUP / VEC = 4 neighbouring lanes that loaded it, a `part` of it in each, and lanes exchange values by shuffles:
// H's additions at distances below VEC are within a lane; beyond, the lower lane has a + b and the upper one
// a - b = fma(-1, b, a), each rounded once, in hadamard.cuh's order. QuEST's sums over adjacent pairs go on over lanes
// in the same way.
#pragma once
#include "elementwise.cuh"
#include "quantize.cuh"
#include "rmsnorm.cuh"

// the compositions: args with scratch for a tensor
static void quantize_of_scratch(const QuantizeArgs* args, const floatX* scratch) {
    QuantizeArgs of_scratch = *args;
    of_scratch.tensor = scratch;
    cuda_quantize(&of_scratch);
}

static void unfused_swiglu_quantize(const QuantizeArgs* args, floatX* scratch, Mxint8 kept, const floatX* gate_up,
                                    int BT, int F) {
    cuda_swiglu_forward(scratch, kept, gate_up, BT, F);
    quantize_of_scratch(args, scratch);
}

static void unfused_rmsnorm_quantize(const QuantizeArgs* args, floatX* scratch, floatX* sum, float* rstd,
                                     const floatX* a, const floatX* b, const floatX* weight, int BT, int C, float eps) {
    if (b) {
        cuda_add_rmsnorm_forward(sum, scratch, rstd, a, b, weight, BT, C, eps);
    } else {
        cuda_rmsnorm_forward(scratch, rstd, a, weight, BT, C, eps);
    }
    quantize_of_scratch(args, scratch);
}

#ifdef PRECISION_FP32
#define cuda_swiglu_quantize unfused_swiglu_quantize
#define cuda_rmsnorm_quantize unfused_rmsnorm_quantize
#else

// ---------------------------------------------------------------------------------------------------------------------
// the job of an operand x that is made on the way; source: what the kernel reads in 16-byte accesses

static int fused_can(const QuantizeArgs* args) {
    return args->spec.scale == SCALE_QUEST && args->spec.rotation == ROTATE_HADAMARD && !args->transposed &&
           args->stats == NULL;
}

static QuantizeJob fused_job(const QuantizeArgs* args, const floatX* source, int rows, int cols) {
    const QTensor* out = args->out;
    QuantizeArgs checked = *args;
    checked.tensor = source;
    quantize_check(&checked);
    check(out->rows == rows && out->cols == cols, "internal: operand (%d, %d) of (%d, %d)", out->rows, out->cols, rows,
          cols);
    QuantizeJob job;
    memset(&job, 0, sizeof job);
    job.rotation = args->spec.rotation;
    job.carrier = out->carrier;
    job.rows = (uint32_t)rows;
    job.cols = (uint32_t)cols;
    job.tensor = source;
    job.codes = out->codes;
    job.scales = out->scales;
    job.mask = out->mask;
    job.operand = out->operand;
    job.base = out->operand && out->carrier != FORMAT_FLOATX ? out->base : NULL;
    job.again = args->again;
    job.owed = out->owed;
    return job;
}

// ---------------------------------------------------------------------------------------------------------------------
// SwiGLU

// the place of a 16-byte vector of gate in gate_up and in its row; steps go on by a fixed number of vectors without
// divisions
typedef struct { uint32_t at, in_row; } GatePlace;

__device__ __forceinline__ GatePlace gate_place(uint64_t vector, uint32_t row_vectors) {
    uint64_t row = vector / row_vectors;
    return GatePlace{(uint32_t)(vector + row * row_vectors), (uint32_t)(vector - row * row_vectors)};
}

__device__ __forceinline__ void gate_step(GatePlace* place, GatePlace step, uint32_t row_vectors) {
    place->at += step.at;
    place->in_row += step.in_row;
    if (place->in_row >= row_vectors) {  // on to the next row, across this one's up
        place->in_row -= row_vectors;
        place->at += row_vectors;
    }
}

// silu(gate) * up as swiglu_forward_kernel computes it, element by element in a loop: seldom needed
__device__ __forceinline__ Vector swiglu_any(Vector gate, Vector up) {
#pragma unroll 1
    for (int pair = 0; pair < VEC / 2; pair++) {  // the first word is done and goes to the end
        float act[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float g = reals_get(gate, i);
            act[i] = g / (1.0f + __expf(-g)) * reals_get(up, i);
        }
        uint32_t done = reals_of<2, floatX>(act).w[0], up_done = up.w[0];
#pragma unroll
        for (int i = 0; i + 1 < VEC / 2; i++) {
            gate.w[i] = gate.w[i + 1];
            up.w[i] = up.w[i + 1];
        }
        gate.w[VEC / 2 - 1] = done;
        up.w[VEC / 2 - 1] = up_done;
    }
    return gate;
}

// The same where no gate is below -80. g / (1 + exp(-g)) rounded to nearest: the exponential is __expf's but for what
// is lost beside 1, and the quotient is corrected once. bf16 has only 65536 gates; dev/cuda/fused_bench.cu compares all
// of them. Of an infinite gate it makes a NaN, which is the same fault to the quantizer.
__device__ __forceinline__ Vector swiglu_narrow(const Vector& gate, const Vector& up) {
    float act[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        float g = reals_get(gate, i), e, r;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(mul_rn(-g, 1.4426950408889634f)));
        float d = add_rn(1.0f, e);
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
        float q = mul_rn(g, r);
        act[i] = mul_rn(fma_rn(-fma_rn(d, q, -g), r, q), reals_get(up, i));  // so that -0 stays -0
    }
    return reals_of<VEC, floatX>(act);
}

template <int N> __device__ __forceinline__ int gates_narrow(const Vector* gate) {
    __nv_bfloat162 least = *(const __nv_bfloat162*)&gate[0].w[0];
#pragma unroll
    for (int i = 1; i < N * VEC / 2; i++) {
        least = __hmin2(least, *(const __nv_bfloat162*)&gate[i / (VEC / 2)].w[i % (VEC / 2)]);
    }
    return __low2float(least) >= -80.0f && __high2float(least) >= -80.0f;
}

// v: a lane's group of silu(gate) * up from the warp's vectors in the order of memory
template <int N>
__device__ __forceinline__ void swiglu_group(float* v, const Vector* gate, const Vector* up, uint4* stage) {
    int lane = threadIdx.x % WARP_LANES;
    uint32_t words[GROUP_WORDS(floatX)];
    if (gates_narrow<N>(gate)) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            Vector act = swiglu_narrow(gate[i], up[i]);
            stage[stage_index(lane + WARP_LANES * i)] = make_uint4(act.w[0], act.w[1], act.w[2], act.w[3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            Vector act = swiglu_any(gate[i], up[i]);
            stage[stage_index(lane + WARP_LANES * i)] = make_uint4(act.w[0], act.w[1], act.w[2], act.w[3]);
        }
    }
    stage_take<N>(words, stage);
    group_unpack<floatX>(v, words);
}

// job.tensor is gate_up; KEEP: which goes to job.kept, too
template <int KEEP>
__global__ void __launch_bounds__(GROUP_THREADS, 3) swiglu_quantize_kernel(const __grid_constant__ QuantizeJob job) {
    __shared__ uint4 stages[GROUP_WARPS][STAGE_CHUNKS(floatX)];
    const int N = GROUP_CHUNKS(floatX);
    BaseUse use;
    if (!base_begin(job, &use)) {
        return;
    }
    uint4* stage = stages[threadIdx.x / WARP_LANES];
    uint32_t row_vectors = job.cols / VEC, groups = job.rows * (job.cols / GROUP), lane = threadIdx.x % WARP_LANES;
    uint32_t first = (blockIdx.x * GROUP_THREADS + threadIdx.x) / WARP_LANES * WARP_LANES;
    GatePlace step = gate_place(WARP_LANES, row_vectors);
    GatePlace jump = gate_place((uint64_t)(gridDim.x * GROUP_THREADS - WARP_LANES) * N, row_vectors);
    GatePlace place = gate_place((uint64_t)first * N + lane, row_vectors);
    for (; first < groups; first += gridDim.x * GROUP_THREADS) {
        uint32_t group = first + lane, mask;
        int count = (int)min(groups - first, (uint32_t)WARP_LANES);
        Vector gate[N], up[N];
        float v[GROUP];
        GatePlace place_kept = place;
#pragma unroll
        for (int i = 0; i < N; i++) {
            int valid = (int)lane + WARP_LANES * i < count * N;  // beyond the end any will do
            const Vector* at = (const Vector*)job.tensor + (valid ? place.at : 0);
            gate[i] = at[0];
            up[i] = at[row_vectors];
            gate_step(&place, step, row_vectors);
        }
        gate_step(&place, jump, row_vectors);
#pragma unroll
        for (int i = 0; KEEP && i < N; i++) {
            int valid = (int)lane + WARP_LANES * i < count * N;
            vector_keep(job.kept, place_kept.at, gate[i], valid);
            vector_keep(job.kept, (size_t)place_kept.at + row_vectors, up[i], valid);
            gate_step(&place_kept, step, row_vectors);
        }
        swiglu_group<N>(v, gate, up, stage);
        GroupTops tops;
        uint32_t scale = group_tops<SCALE_QUEST, ROUND_NEAREST>(&tops, &mask, v, ROTATE_HADAMARD, &job.keys, 0, 0);
        if (group < groups) {
            tops_store(job, &tops, group, scale, mask);
            if (job.base && tops_counts<SCALE_QUEST>(&tops, scale)) {
                base_count(&use, job, scale);
            }
        }
        if (job.operand && job.carrier != FORMAT_FLOATX) {
            uint32_t bytes[GROUP / 4];
            tops_carry(bytes, &tops, scale, use.base, job.carrier);
            stage_write<2>((uint8_t*)job.operand + (size_t)first * GROUP, bytes, count * 2, stage);
        } else if (job.operand) {
            uint32_t words[GROUP_WORDS(floatX)];
            tops_decode(words, &tops, scale);
            stage_write<N>((floatX*)job.operand + (size_t)first * GROUP, words, count * N, stage);
        }
    }
    base_end(job, &use);
}

// args->out (BT, F) = quantize(swiglu_forward(gate_up (BT, 2F))), kept (BT, 2F) = gate_up where there is one;
// args->tensor is not read, scratch (BT, F) may stay as it was. Asynchronous, as cuda_quantize.
static void cuda_swiglu_quantize(const QuantizeArgs* args, floatX* scratch, Mxint8 kept, const floatX* gate_up, int BT,
                                 int F) {
    if (!fused_can(args) || (uint64_t)BT * 2 * (uint64_t)F / VEC >> 32) {
        unfused_swiglu_quantize(args, scratch, kept, gate_up, BT, F);
        return;
    }
    QuantizeJob job = fused_job(args, gate_up, BT, F);
    job.kept = kept;
    kept_check(kept, F);
    size_t tiles = (size_t)ceil_div((int64_t)BT * (F / GROUP), GROUP_THREADS);
    for (job.check = 0; tiles > 0 && job.check < (job.base ? 2 : 1); job.check++) {
        int keep = kept.codes && !job.check;
        job_launch(keep ? swiglu_quantize_kernel<1> : swiglu_quantize_kernel<0>, &job, GROUP_THREADS, tiles, 1);
    }
    cuda_check_launch();
}

// ---------------------------------------------------------------------------------------------------------------------
// a group in PART_LANES lanes: the functions of quantize_group.cuh for a part. All lanes of a warp call these.

// v = sqrt(32) H v
__device__ __forceinline__ void part_butterflies(float* v) {
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
}

// v = H v
__device__ __forceinline__ void part_hadamard(float* v) {
    part_butterflies(v);
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

// As tops_quest, of the eight sums of a part: the first two words of tops, and a mask of eight bits
__device__ __forceinline__ uint32_t part_tops_quest(GroupTops* tops, const float* sums, uint32_t scale) {
    float second = mul_rn(f32_from_bits((254u - scale) << 23), QUEST_SECOND * CODE_UNIT);
    uint32_t pairs[4], mask = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int low = PAIR_LOW(i);
        uint32_t pair = pair_cut(mul_rn(mul_rn(sums[low], QUEST_FIRST), second),
                                 mul_rn(mul_rn(sums[low + 2], QUEST_FIRST), second));
        mask |= pair_inside(pair) & 0x00010001u << low;
        pairs[i] = pair_saturate(pair) + PAIR_HALF;
    }
    tops_gather(tops, pairs, 0);
    return (mask | mask >> 14) & 0xffu;
}

// the same for scales that tops_quest does not serve, in the words of the definition; v = H x
__device__ __forceinline__ uint32_t part_tops_any(GroupTops* tops, const float* v, uint32_t scale) {
    float factor = mul_rn(f32_from_bits((254u - min(scale, 254u)) << 23), CODE_UNIT), code[VEC];
    uint32_t pairs[4], mask = 0;
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        float x = mul_rn(v[k], factor);
        mask |= (f32_bits(sub_rn(fabsf(x), 6.0f * CODE_UNIT)) >> 31) << k;  // the sign of |x| - 6
        code[k] = scale == UE8M0_NAN ? 0.0f : e2m1_nearest(x, CODE_UNIT, 1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        pairs[i] = pair_cut(code[PAIR_LOW(i)], code[PAIR_LOW(i) + 2]);
    }
    tops_gather(tops, pairs, 0);
    return scale == UE8M0_NAN ? 0u : mask;
}

// base_count for the group of which this lane has a part. Only a group that changes something is looked at: one above
// the largest so far, or below the window.
__device__ __forceinline__ void part_count(const QuantizeJob& job, BaseUse* use, const GroupTops* tops, uint32_t scale,
                                           int valid) {
    int e = (int)scale - 127;
    int news = e > use->largest || e - max(use->base, use->before) < carrier_bottom(job.carrier);
    if (!job.base || !__any_sync(FULL_WARP, news)) {
        return;
    }
    uint32_t lane = threadIdx.x % WARP_LANES, first = lane / PART_LANES * PART_LANES;
    uint32_t bits = (tops->words[0] | tops->words[1]) & 0x0e0e0e0eu;
    uint32_t any = __ballot_sync(FULL_WARP, valid && scale != UE8M0_NAN && bits);
    int counts = (any >> first & ((1u << PART_LANES) - 1u)) != 0;
    if (counts && lane == first) {
        base_count(use, job, scale);
    }
    use->largest = max(use->largest, __reduce_max_sync(FULL_WARP, counts ? e : CARRIER_NONE));
}

// Elements of part number `part` of the operand through H and QuEST to where the job says; v is overwritten. Parts that
// are not valid are zero and go nowhere.
__device__ __forceinline__ void part_quantize(const QuantizeJob& job, BaseUse* use, float* v, size_t part, int valid) {
    GroupTops tops;
    float rotated[VEC];
    part_butterflies(v);
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        rotated[k] = mul_rn(v[k], HADAMARD_SCALE);
    }
    uint32_t scale = part_quest_scale(rotated);
    uint32_t mask = scale - 40u < 160u ? part_tops_quest(&tops, v, scale) : part_tops_any(&tops, rotated, scale);
    part_count(job, use, &tops, scale, valid);
    if (!valid) {
        return;
    }
    if (job.codes) {
        ((uint32_t*)job.codes)[part] = tops_codes(&tops, 0);
    }
    if (job.mask) {
        ((uint8_t*)job.mask)[part] = (uint8_t)mask;
    }
    if (job.scales && threadIdx.x % PART_LANES == 0) {
        job.scales[part / PART_LANES] = (uint8_t)scale;
    }
    if (job.operand && job.carrier != FORMAT_FLOATX) {
        uint32_t bytes[GROUP / 4];  // of which the first eight elements' are used
        tops_carry(bytes, &tops, scale, use->base, job.carrier);
        ((uint2*)job.operand)[part] = make_uint2(bytes[0], bytes[1]);
    } else if (job.operand) {
        float values[GROUP];
        tops_values(values, &tops);
        values_decode<VEC>(values, scale);
        ((Vector*)job.operand)[part] = reals_of<VEC, floatX>(values);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// RMSNorm: a row is cut as in rmsnorm_forward_kernel. It waits for its norm in shared memory, each vector where the
// thread that loaded it finds it again: then the quantizer, which is long, can be a loop.

// x = the row's vectors of this thread, with b added and stored where ADD; returns their squares' sum
template <int K, int ADD>
__device__ __forceinline__ float norm_row_load(const NormForward& p, size_t first, int t, int T, int vectors,
                                               Vector* waiting) {
    Vector x[K];
    float squares = 0.0f;
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
#pragma unroll
    for (int k = 0; k < K; k++) {
        waiting[k * blockDim.x] = x[k];
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            squares += reals_get(x[k], i) * reals_get(x[k], i);
        }
    }
    return squares;
}

// with ADD the first launch, whose grid covers all rows
template <int K, int ADD>
__global__ void __launch_bounds__(NORM_FORWARD_WARPS * WARP_LANES, K > 6 ? 3 : 4)
    norm_quantize_kernel(const __grid_constant__ NormForward p, const __grid_constant__ QuantizeJob job, int T) {
    extern __shared__ Vector rows[];  // [K][threads]
    __shared__ float sums[2][NORM_FORWARD_WARPS];
    BaseUse use;
    if (!ADD && !base_begin(job, &use)) {
        return;
    }
    Vector* waiting = rows + threadIdx.x;
    int t = threadIdx.x % T, row_of = threadIdx.x / T, warps = T / WARP_LANES, turn = 0;
    int step = ADD ? p.BT : gridDim.x * (blockDim.x / T);
    for (int row0 = blockIdx.x * (blockDim.x / T); row0 < p.BT; row0 += step, turn ^= 1) {
        int row = row0 + row_of, vectors = row < p.BT ? p.C / VEC : 0;
        size_t first = (size_t)row * p.C;
        float squares = warp_sum(norm_row_load<K, ADD>(p, first, t, T, vectors, waiting));
        if (warps > 1) {  // the two arrays take turns: one is written again only behind the next row's barrier
            float* mine = sums[turn] + row_of * warps;
            mine[t / WARP_LANES] = squares;
            __syncthreads();
            squares = 0.0f;
#pragma unroll 1
            for (int i = 0; i < warps; i++) {
                squares += mine[i];
            }
        }
        float r = rsqrtf(squares / (float)p.C + p.eps);
        if (t == 0 && row < p.BT) {
            p.rstd[row] = r;
        }
        if (ADD) {  // only now: registers are short while loads are under way
            base_begin(job, &use);
        }
#pragma unroll 1
        for (int k = 0; k < K; k++) {
            int v = t + k * T, valid = v < vectors;
            Vector x = waiting[k * blockDim.x], w = valid ? ((const Vector*)p.weight)[v] : Vector{};
            float out[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                out[i] = reals_get(x, i) * r * reals_get(w, i);
            }
            x = reals_of<VEC, floatX>(out);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                out[i] = reals_get(x, i);
            }
            part_quantize(job, &use, out, first / VEC + v, valid);
        }
    }
    base_end(job, &use);
}

template <int K, int ADD> static void norm_quantize_blocks(const NormForward* p, const QuantizeJob* job, int warps) {
    int rows = max_int(1, 4 / warps), T = warps * WARP_LANES, threads = T * rows;
    int blocks = (int)ceil_div(p->BT, rows);
    if (job->check) {  // seldom has anything to do
        blocks = min_int(blocks, gpu.sm_count);
    }
    cudaLaunchAttribute early = {};  // as job_launch
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = sizeof(Vector) * K * (size_t)threads;
    config.stream = gpu.stream;
    config.attrs = &early;
    config.numAttrs = job->check && gpu.major >= 9;
    cuda_check(cudaLaunchKernelEx(&config, norm_quantize_kernel<K, ADD>, *p, *job, T));
}

// the check launch starts from the stored sum: sum may lie on a
template <int K> static void norm_quantize_launch(NormForward p, QuantizeJob job, int warps) {
    if (p.b) {
        norm_quantize_blocks<K, 1>(&p, &job, warps);
        p.a = p.sum;
        p.b = NULL;
    } else {
        norm_quantize_blocks<K, 0>(&p, &job, warps);
    }
    job.check = 1;
    if (job.base) {
        norm_quantize_blocks<K, 0>(&p, &job, warps);
    }
}

// args->out (BT, C) = quantize(add_rmsnorm_forward(a, b)), or of rmsnorm_forward(a) where b is NULL; sum and rstd as
// there, sum may be in place on a; args->tensor is not read, scratch (BT, C) may stay as it was. Asynchronous, as
// cuda_quantize.
static void cuda_rmsnorm_quantize(const QuantizeArgs* args, floatX* scratch, floatX* sum, float* rstd, const floatX* a,
                                  const floatX* b, const floatX* weight, int BT, int C, float eps) {
    RowShape shape = row_shape(C, NORM_FORWARD_WARPS, NORM_FORWARD_VECTORS);
    if (!fused_can(args) || shape.vectors == 0 || BT == 0) {
        unfused_rmsnorm_quantize(args, scratch, sum, rstd, a, b, weight, BT, C, eps);
        return;
    }
    QuantizeJob job = fused_job(args, a, BT, C);
    NormForward p = {.sum = sum, .out = NULL, .rstd = rstd, .a = a, .b = b, .weight = weight, .BT = BT, .C = C,
                     .eps = eps};
    switch (shape.vectors) {
    case 1: norm_quantize_launch<1>(p, job, shape.warps); break;
    case 2: norm_quantize_launch<2>(p, job, shape.warps); break;
    case 3: norm_quantize_launch<3>(p, job, shape.warps); break;
    case 4: norm_quantize_launch<4>(p, job, shape.warps); break;
    case 5: norm_quantize_launch<5>(p, job, shape.warps); break;
    case 6: norm_quantize_launch<6>(p, job, shape.warps); break;
    case 7: norm_quantize_launch<7>(p, job, shape.warps); break;
    default: norm_quantize_launch<8>(p, job, shape.warps);
    }
}
#endif
