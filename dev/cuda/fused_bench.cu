// fused_bench.cu: checks and times llmc/cuda/fused.cuh and fused_backward.cuh on a GPU, beside no other part of the
// trainer.
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Xcompiler "-O3 -march=native -fopenmp -ffp-contract=off"
//        dev/cuda/fused_bench.cu -o fused_bench
//   ./fused_bench [check | bench | small]
// Both first ones without an argument; exit code 1 if a check failed.
//
// check   every function against the composition of operations that it stands for, bit for bit (NaN is NaN), with bases
//         that were predicted right and wrong; SwiGLU for each of the 65536 gates; MXINT8 of gate_up against the CPU's,
//         and what backward makes of it against the same of its decoded values; operands from their codes; planted
//         errors
// bench   medians of 20, fused and unfused, on the layers of 200m, tinyllama-1.1b and llama2-7b; bytes are the fewest
//         that the fused pass must move, and the share is that of a device-to-device copy of 2 GiB in the same run
// small   each kernel once, for compute-sanitizer
#include "../../llmc/cpu/layers.h"
#include "../../llmc/cuda/fused_backward.cuh"
#include "quantize_check.h"

// ---------------------------------------------------------------------------------------------------------------------
// the functions under test, fused and not, on the same tensors

typedef enum { SWIGLU, SWIGLU_KEPT, NORM, ADD_NORM, ADD_NORM_IN_PLACE, QUANTIZERS } Quantizer;
static const char* const quantizer_names[] = {"swiglu_quantize", "swiglu_quantize, kept", "rmsnorm_quantize", "rmsnorm_quantize, add",
                                              "rmsnorm_quantize, add in place"};

enum { UNFUSED, FUSED, SIDES };

// device memory of both sides: what they write is there twice
typedef struct {
    floatX *inp, *b, *weight, *scratch;  // inp: gate_up, or the norm's a
    floatX* sum[SIDES];
    float* rstd[SIDES];
    QTensor out[SIDES];
    floatX *dout[SIDES], *dinp[SIDES], *residual;
    void* dweight[SIDES];
    float* row_scale;
    CarrierBase* base[SIDES];
    void* kept[SIDES];  // MXINT8 of gate_up
    void *host[SIDES];
    size_t capacity;  // elements of inp
} Sides;

static void quantizer_run(const Sides* s, Quantizer kind, const QuantizeArgs* args, int side) {
    int BT = args->out->rows, C = args->out->cols;
    const float eps = 1e-5f;
    if (kind <= SWIGLU_KEPT) {
        Mxint8 kept = kind == SWIGLU ? MXINT8_NONE : mxint8_at((size_t)BT, 2 * (size_t)C, s->kept[side]);
        side == FUSED ? cuda_swiglu_quantize(args, s->scratch, kept, s->inp, BT, C)
                      : unfused_swiglu_quantize(args, s->scratch, kept, s->inp, BT, C);
        return;
    }
    const floatX *a = s->inp, *b = kind == NORM ? NULL : s->b;
    if (kind == ADD_NORM_IN_PLACE) {
        cuda_check(cudaMemcpyAsync(s->sum[side], a, (size_t)BT * C * sizeof(floatX), cudaMemcpyDeviceToDevice,
                                   gpu.stream));
        a = s->sum[side];
    }
    side == FUSED ? cuda_rmsnorm_quantize(args, s->scratch, s->sum[side], s->rstd[side], a, b, s->weight, BT, C, eps)
                  : unfused_rmsnorm_quantize(args, s->scratch, s->sum[side], s->rstd[side], a, b, s->weight, BT, C,
                                             eps);
}

static void sides_alloc(Sides* s, size_t count, int rows, int most_columns) {
    memset(s, 0, sizeof *s);
    s->capacity = count;
    s->inp = (floatX*)device_alloc(2 * count * sizeof(floatX));
    s->b = (floatX*)device_alloc(count * sizeof(floatX));
    s->weight = (floatX*)device_alloc((size_t)most_columns * sizeof(floatX));
    s->scratch = (floatX*)device_alloc(count * sizeof(floatX));
    s->residual = (floatX*)device_alloc(count * sizeof(floatX));
    s->row_scale = (float*)device_alloc(sizeof(float) * (size_t)rows);
    QuantSpec spec = case_spec(&cases[0], ROUND_NEAREST);
    for (int side = 0; side < SIDES; side++) {
        s->sum[side] = (floatX*)device_alloc(count * sizeof(floatX));
        s->rstd[side] = (float*)device_alloc(sizeof(float) * (size_t)rows);
        s->out[side] = qtensor_at(&spec, 1, (int)(count / GROUP + 64) * GROUP, device_alloc(count + 8192));
        s->out[side].operand = device_alloc(count * sizeof(floatX));
        s->dout[side] = (floatX*)device_alloc(count * sizeof(floatX));
        s->dinp[side] = (floatX*)device_alloc(2 * count * sizeof(floatX));
        s->dweight[side] = device_alloc(sizeof(float) * (size_t)most_columns);
        s->base[side] = (CarrierBase*)device_alloc(sizeof(CarrierBase));
        s->kept[side] = device_alloc(mxint8_bytes(2, count));
        s->host[side] = malloc_or_die(2 * count * sizeof(float), "results");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// check

static int64_t differing_floats(const float* a, const float* b, size_t count) {
    int64_t wrong = 0;
    for (size_t i = 0; i < count; i++) {
        wrong += memcmp(&a[i], &b[i], sizeof(float)) != 0 && !(a[i] != a[i] && b[i] != b[i]);
    }
    return wrong;
}

typedef enum { AS_BYTES, AS_FLOATX, AS_F32 } Compare;

// elements of the two sides that differ
static int64_t sides_differ(const Sides* s, const void* a, const void* b, size_t count, Compare as) {
    size_t bytes = count * (as == AS_BYTES ? 1 : as == AS_FLOATX ? sizeof(floatX) : sizeof(float));
    fetch(s->host[0], a, bytes);
    fetch(s->host[1], b, bytes);
    return as == AS_BYTES    ? differing(s->host[0], s->host[1], bytes)
           : as == AS_FLOATX ? differing_values((const floatX*)s->host[0], (const floatX*)s->host[1], count)
                             : differing_floats((const float*)s->host[0], (const float*)s->host[1], count);
}

#define report_equal(s, a, b, count, as, ...)                                      \
    do {                                                                           \
        int64_t wrong_ = sides_differ((s), (a), (b), (count), (as));               \
        char what_[256];                                                           \
        snprintf(what_, sizeof what_, __VA_ARGS__);                                \
        report(wrong_ == 0, "%s: %lld differ", what_, (long long)wrong_);          \
    } while (0)

// in the order of the stream
static void to_device(void* to, const void* from, size_t bytes) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
}

// rows of `cols`, times 2^scale_log2
static void upload(floatX* to, size_t count, int cols, Distribution d, uint64_t seed, int scale_log2) {
    floatX* x = (floatX*)malloc_or_die(count * sizeof(floatX), "inputs");
    fill(x, count, cols, d, seed);
    for (size_t i = 0; scale_log2 && i < count; i++) {
        x[i] = f32_to_floatX(ldexpf(floatX_to_f32(x[i]), scale_log2));
    }
    to_device(to, x, count * sizeof(floatX));
    free(x);
}

// the parts of an operand that the variant keeps
static QTensor variant_out(const Sides* s, int side, int BT, int C, enum Variant variant) {
    QTensor out = s->out[side];
    out.rows = BT, out.cols = C;
    out.carrier = variant == VALUES ? FORMAT_FLOATX : FORMAT_E4M3;
    out.base = variant <= BYTES ? s->base[side] : NULL;
    out.operand = variant == CODES ? NULL : out.operand;
    if (variant == BYTES) {
        out.codes = out.scales = NULL;
        out.mask = NULL;
    } else if (variant == CODES) {
        out.codes += 4;  // alignment of 4 is enough
    }
    return out;
}

// both sides against the CPU, and planted errors
static void check_kept(const Sides* s, int BT, int F, const char* name) {
    size_t count = 2 * (size_t)BT * F, bytes = mxint8_bytes(2, count / 2);
    floatX* x = (floatX*)malloc_or_die(count * sizeof(floatX), "gate_up");
    uint8_t* want = (uint8_t*)malloc_or_die(bytes, "MXINT8");
    fetch(x, s->inp, count * sizeof(floatX));
    cpu_mxint8_pack(mxint8_at((size_t)BT, 2 * (size_t)F, want), x, BT, 2 * F);
    for (int side = 0; side < SIDES; side++) {
        fetch(s->host[side], s->kept[side], bytes);
        int64_t wrong = differing(s->host[side], want, bytes);
        report(wrong == 0, "%s: MXINT8 of side %d: %lld bytes differ from the CPU's", name, side, (long long)wrong);
        ((uint8_t*)s->host[side])[bytes - 1] ^= 1;
        report(differing(s->host[side], want, bytes) == wrong + 1 || wrong, "%s: a planted scale is not seen", name);
    }
    free(x);
    free(want);
}

static void check_outputs(const Sides* s, Quantizer kind, const QTensor* out, enum Variant variant, const char* name) {
    size_t BT = (size_t)out[0].rows, count = BT * (size_t)out[0].cols;
    if (variant != BYTES) {
        report_equal(s, out[0].codes, out[1].codes, count / 2, AS_BYTES, "%s: codes", name);
        report_equal(s, out[0].scales, out[1].scales, count / GROUP, AS_BYTES, "%s: scales", name);
        report_equal(s, out[0].mask, out[1].mask, count / 8, AS_BYTES, "%s: mask", name);
    }
    if (variant <= BYTES) {
        report_equal(s, out[0].operand, out[1].operand, count, AS_BYTES, "%s: operand", name);
        report_equal(s, s->base[0], s->base[1], sizeof(CarrierBase), AS_BYTES, "%s: base", name);
    } else if (variant == VALUES) {
        report_equal(s, out[0].operand, out[1].operand, count, AS_FLOATX, "%s: values", name);
    }
    if (variant == KEEP || variant == VALUES) {
        cuda_check(cudaMemsetAsync(out[1].operand, 0xaa, count, gpu.stream));
        cuda_carry(&out[1]);
        report_equal(s, out[0].operand, out[1].operand, count, variant == KEEP ? AS_BYTES : AS_FLOATX, "%s: carry",
                     name);
    }
    if (kind == SWIGLU_KEPT) {
        check_kept(s, out[0].rows, out[0].cols, name);
    }
    if (kind >= NORM) {
        report_equal(s, s->rstd[0], s->rstd[1], BT, AS_F32, "%s: rstd", name);
    }
    if (kind >= ADD_NORM) {
        report_equal(s, s->sum[0], s->sum[1], count, AS_FLOATX, "%s: sum", name);
    }
}

// inputs are there; every variant, with bases of other uses and then of this one
static void check_quantizer(Sides* s, Quantizer kind, int BT, int C, const char* input) {
    const int predictions[] = {0, 120, -120, 3};
    const Carrier carrier = carrier_of(FORMAT_E4M3);
    size_t count = (size_t)BT * C;
    for (int variant = 0; variant < VARIANTS; variant++) {
        for (int use = 0; use < (variant == KEEP ? 5 : 1); use++) {
            char name[256];
            QTensor out[SIDES];
            snprintf(name, sizeof name, "%s (%d, %d) %s, %s, use %d", quantizer_names[kind], BT, C, input,
                     variant_names[variant], use);
            for (int side = 0; side < SIDES; side++) {
                out[side] = variant_out(s, side, BT, C, (enum Variant)variant);
                if (use < 4) {
                    CarrierBase base = {0, 0, predictions[use], 0};
                    to_device(s->base[side], &base, sizeof base);
                }
                carrier_bases_advance(s->base[side], 1, &carrier);
                cuda_check(cudaMemsetAsync(s->out[side].mask, 0xaa, count + 64, gpu.stream));
                cuda_check(cudaMemsetAsync(s->out[side].operand, 0xaa, count * sizeof(floatX), gpu.stream));
                cuda_check(cudaMemsetAsync(s->sum[side], 0xaa, count * sizeof(floatX), gpu.stream));
                cuda_check(cudaMemsetAsync(s->rstd[side], 0xaa, (size_t)BT * sizeof(float), gpu.stream));
                cuda_check(cudaMemsetAsync(s->scratch, 0xff, count * sizeof(floatX), gpu.stream));
                cuda_check(cudaMemsetAsync(s->kept[side], 0xaa, mxint8_bytes(2, count), gpu.stream));
                QuantizeArgs args = case_args(&cases[0], ROUND_NEAREST, &out[side], NULL, NULL, NULL);
                quantizer_run(s, kind, &args, side);
            }
            check_outputs(s, kind, out, (enum Variant)variant, name);
        }
    }
}

static void check_quantizers(Sides* s, int BT, int C, int first, int last) {
    size_t count = (size_t)BT * C;
    for (int d = 0; d < DISTRIBUTIONS; d++) {
        for (int kind = first; kind <= last; kind++) {
            int both = kind <= SWIGLU_KEPT ? 2 : 1;
            upload(s->inp, both * count, both * C, (Distribution)d, (uint64_t)(BT * 3 + C),
                   both == 2 && d == NORMAL ? 3 : 0);
            upload(s->b, count, C, (Distribution)d, (uint64_t)(BT * 5 + C), 0);
            upload(s->weight, (size_t)C, C, NORMAL, 11, 0);
            check_quantizer(s, (Quantizer)kind, BT, C, distribution_names[d]);
        }
    }
}

// same inputs for both sides of a backward function; BT rows of C
static void backward_inputs(Sides* s, int BT, int C, Distribution d) {
    size_t count = (size_t)BT * C;
    float* scales = (float*)malloc_or_die(sizeof(float) * (size_t)BT, "row scales");
    uint32_t* mask = (uint32_t*)malloc_or_die(count / 8, "mask");
    for (int row = 0; row < BT; row++) {
        scales[row] = ldexpf(1.0f, row % 40 - 30);
    }
    for (size_t g = 0; g < count / GROUP; g++) {
        mask[g] = (uint32_t)mix(g);
    }
    to_device(s->row_scale, scales, sizeof(float) * (size_t)BT);
    to_device(s->out[0].mask, mask, count / 8);
    upload(s->inp, 2 * count, 2 * C, NORMAL, (uint64_t)(BT + C), 2);
    upload(s->dout[0], count, C, d, (uint64_t)(BT * 9 + C), 0);
    cuda_check(cudaMemcpyAsync(s->dout[1], s->dout[0], count * sizeof(floatX), cudaMemcpyDeviceToDevice, gpu.stream));
    free(scales);
    free(mask);
}

static void check_swiglu_backward(Sides* s, int BT, int F, Distribution d, int with_scale) {
    size_t count = (size_t)BT * F;
    const float* scale = with_scale ? s->row_scale : NULL;
    backward_inputs(s, BT, F, d);
    for (int side = 0; side < SIDES; side++) {
        cuda_check(cudaMemsetAsync(s->dinp[side], 0xaa, 2 * count * sizeof(floatX), gpu.stream));
    }
    unfused_unrotate_swiglu_backward(s->dinp[0], s->dout[0], s->out[0].mask, scale, s->inp, MXINT8_NONE, BT, F);
    cuda_unrotate_swiglu_backward(s->dinp[1], s->dout[1], s->out[0].mask, scale, s->inp, MXINT8_NONE, BT, F);
    report_equal(s, s->dinp[0], s->dinp[1], 2 * count, AS_FLOATX, "unrotate_swiglu_backward (%d, %d) %s, scale %d", BT,
                 F, distribution_names[d], with_scale);
}

// of MXINT8: fused, and not, and of the values that it stands for, which are exact in floatX here
static void check_swiglu_backward_kept(Sides* s, int BT, int F, Distribution d, int with_scale) {
    size_t count = 2 * (size_t)BT * F, bytes = mxint8_bytes(2, count / 2);
    const float* scale = with_scale ? s->row_scale : NULL;
    floatX* x = (floatX*)malloc_or_die(count * sizeof(floatX), "gate_up");
    void* memory = malloc_or_die(bytes, "MXINT8");
    Mxint8 host = mxint8_at((size_t)BT, 2 * (size_t)F, memory), kept = mxint8_at((size_t)BT, 2 * (size_t)F, s->kept[0]);
    for (int fused = 0; fused < 2; fused++) {
        backward_inputs(s, BT, F, d);
        fetch(x, s->inp, count * sizeof(floatX));
        cpu_mxint8_pack(host, x, BT, 2 * F);
        for (size_t i = 0; i < count; i++) {
            x[i] = f32_to_floatX(mxint8_decode(host.codes[i], host.scales[i / GROUP]));
        }
        to_device(s->kept[0], memory, bytes);
        for (int side = 0; side < SIDES; side++) {
            cuda_check(cudaMemsetAsync(s->dinp[side], 0xaa, count * sizeof(floatX), gpu.stream));
        }
        (fused ? cuda_unrotate_swiglu_backward : unfused_unrotate_swiglu_backward)(
            s->dinp[0], s->dout[0], s->out[0].mask, scale, NULL, kept, BT, F);
        to_device(s->inp, x, count * sizeof(floatX));
        unfused_unrotate_swiglu_backward(s->dinp[1], s->dout[1], s->out[0].mask, scale, s->inp, MXINT8_NONE, BT, F);
        report_equal(s, s->dinp[0], s->dinp[1], count, AS_FLOATX, "swiglu_backward of MXINT8 (%d, %d) %s, fused %d", BT,
                     F, distribution_names[d], fused);
    }
    free(x);
    free(memory);
}

// residual: 0 none, 1 of its own, 2 in place
static void check_norm_backward(Sides* s, int BT, int C, Distribution d, int residual, RealType type) {
    size_t count = (size_t)BT * C;
    backward_inputs(s, BT, C, d);
    upload(s->residual, count, C, NORMAL, 21, 0);
    upload(s->weight, (size_t)C, C, NORMAL, 22, 0);
    cuda_rmsnorm_forward(s->scratch, s->rstd[0], s->inp, s->weight, BT, C, 1e-5f);
    for (int side = 0; side < SIDES; side++) {
        const floatX* from = residual == 0 ? NULL : residual == 1 ? s->residual : s->dinp[side];
        RealArray dweight = {type, s->dweight[side]};
        cuda_check(cudaMemsetAsync(s->dweight[side], 0x3f, sizeof(float) * (size_t)C, gpu.stream));
        cuda_check(cudaMemcpyAsync(s->dinp[side], s->residual, count * sizeof(floatX), cudaMemcpyDeviceToDevice,
                                   gpu.stream));
        side == FUSED ? cuda_unrotate_rmsnorm_backward(s->dinp[side], dweight, s->dout[side], s->out[0].mask,
                                                       s->row_scale, from, s->inp, s->weight, s->rstd[0], BT, C)
                      : unfused_unrotate_rmsnorm_backward(s->dinp[side], dweight, s->dout[side], s->out[0].mask,
                                                          s->row_scale, from, s->inp, s->weight, s->rstd[0], BT, C);
    }
    char name[256];
    snprintf(name, sizeof name, "unrotate_rmsnorm_backward (%d, %d) %s, residual %d", BT, C, distribution_names[d],
             residual);
    report_equal(s, s->dinp[0], s->dinp[1], count, AS_FLOATX, "%s: dinp", name);
    report_equal(s, s->dweight[0], s->dweight[1], (size_t)C, type == REAL_F32 ? AS_F32 : AS_FLOATX, "%s: dweight",
                 name);
}

#ifndef PRECISION_FP32
// as swiglu_quantize_kernel computes it, stored
__global__ void swiglu_vectors_kernel(floatX* out, const floatX* gate_up, int vectors, int row_vectors) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < vectors) {
        const Vector* row = (const Vector*)gate_up + (size_t)(i / row_vectors) * 2 * row_vectors + i % row_vectors;
        Vector gate = row[0], up = row[row_vectors];
        ((Vector*)out)[i] = gates_narrow<1>(&gate) ? swiglu_narrow(gate, up) : swiglu_any(gate, up);
    }
}

// every gate there is, with ups of all magnitudes; faults may differ in kind
static void check_gates(Sides* s) {
    enum { GATES = 65536, F = 32 };
    floatX* x = (floatX*)malloc_or_die(2 * GATES * sizeof(floatX), "gates");
    for (int pass = 0; pass < 8; pass++) {
        for (int i = 0; i < GATES; i++) {
            size_t at = (size_t)(i / F) * 2 * F + (size_t)(i % F);
            x[at].bits = (uint16_t)i;
            float up = ldexpf(draw(NORMAL, (size_t)i, F, (uint64_t)pass), pass == 7 ? 120 : pass == 6 ? -120 : 0);
            x[at + F] = f32_to_floatX(pass ? up : 1.0f);
        }
        to_device(s->inp, x, 2 * GATES * sizeof(floatX));
        cuda_swiglu_forward(s->dinp[0], MXINT8_NONE, s->inp, GATES / F, F);
        swiglu_vectors_kernel<<<GATES / VEC / 256, 256, 0, gpu.stream>>>(s->dinp[1], s->inp, GATES / VEC, F / VEC);
        fetch(s->host[0], s->dinp[0], GATES * sizeof(floatX));
        fetch(s->host[1], s->dinp[1], GATES * sizeof(floatX));
        const floatX *a = (const floatX*)s->host[0], *b = (const floatX*)s->host[1];
        int wrong = 0, gate = -1;
        for (int i = 0; i < GATES; i++) {
            int fault = !isfinite(floatX_to_f32(a[i])) && !isfinite(floatX_to_f32(b[i]));
            int differs = a[i].bits != b[i].bits && !fault;
            gate = differs && gate < 0 ? i : gate;
            wrong += differs;
        }
        report(wrong == 0, "silu, pass %d: %d of %d gates differ, the first one is 0x%04x", pass, wrong, (int)GATES,
               gate);
    }
    free(x);
}
#else
static void check_gates(Sides*) {}
#endif

// every comparison must see a planted error
static void check_planted(Sides* s) {
    floatX x[4] = {f32_to_floatX(1.0f), f32_to_floatX(2.0f), f32_to_floatX(NAN), f32_to_floatX(0.0f)};
    for (int side = 0; side < SIDES; side++) {
        x[3] = f32_to_floatX(side ? -0.0f : 0.0f);
        to_device(s->dinp[side], x, sizeof x);
    }
    report(sides_differ(s, s->dinp[0], s->dinp[1], 3, AS_FLOATX) == 0 &&
               sides_differ(s, s->dinp[0], s->dinp[1], 4, AS_FLOATX) == 1 &&
               sides_differ(s, s->dinp[0], s->dinp[1], sizeof x, AS_BYTES) == 1 &&
               sides_differ(s, s->dinp[0], s->dinp[1], sizeof x / 4, AS_F32) == 1, "a planted error is not seen");
}

static void run_check(int small) {
    const int rows[] = {33, 1, 257}, channels[] = {64, 640, 1280, 2048, 4096, 96, 5120, 8192},
              widths[] = {96, 1792, 5632, 11008, 32};
    Sides s;
    sides_alloc(&s, (size_t)257 * 11008, 1024, 24576);
    check_planted(&s);
    check_gates(&s);
    for (int i = 0; i < (small ? 1 : 3); i++) {
        for (int j = 0; j < (small ? 2 : 5); j++) {
            check_quantizers(&s, rows[i], widths[j], SWIGLU, SWIGLU_KEPT);
            for (int d = 0; d < DISTRIBUTIONS; d++) {
                check_swiglu_backward(&s, rows[i], widths[j], (Distribution)d, d % 2 == 0);
                check_swiglu_backward_kept(&s, rows[i], widths[j], (Distribution)d, d % 2 == 0);
            }
        }
        for (int j = 0; j < (small ? 5 : 8); j++) {
            check_quantizers(&s, rows[i], channels[j], NORM, ADD_NORM_IN_PLACE);
            for (int d = 0; d < DISTRIBUTIONS; d++) {
                check_norm_backward(&s, rows[i], channels[j], (Distribution)d, d % 3, d % 2 ? REAL_F32 : REAL_FLOATX);
            }
        }
        printf("check: %d rows, %d checks, %d failed\n", rows[i], checks, failures);
    }
    if (!small) {  // many rows: every block has several; rows that only the composition can do
        check_quantizers(&s, 1000, 1280, NORM, ADD_NORM_IN_PLACE);
        check_norm_backward(&s, 1000, 2048, NORMAL, 2, REAL_F32);
        check_norm_backward(&s, 1000, 640, NORMAL, 2, REAL_F32);
        check_quantizers(&s, 3, 24576, NORM, ADD_NORM);
        check_norm_backward(&s, 3, 24576, NORMAL, 2, REAL_F32);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// bench

enum { TIMED_RUNS = 20, WARM_UP = 3 };

static int compare_floats(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

__global__ void random_kernel(floatX* x, size_t count, uint64_t stream) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        Philox p = philox(1234, i, stream);
        float u = (float)((p.w[0] >> 8) + 1) * 0x1p-24f, angle = (float)(p.w[1] >> 8) * 0x1p-23f;
        x[i] = to_floatX(sqrtf(-2.0f * logf(u)) * cospif(angle));
    }
}

static double median_ms(void (*run)(void* state), void* state) {
    cudaEvent_t begin[TIMED_RUNS], end[TIMED_RUNS];
    float ms[TIMED_RUNS];
    for (int i = 0; i < TIMED_RUNS; i++) {
        cuda_check(cudaEventCreate(&begin[i]));
        cuda_check(cudaEventCreate(&end[i]));
    }
    for (int i = -WARM_UP; i < TIMED_RUNS; i++) {
        if (i >= 0) {
            cuda_check(cudaEventRecord(begin[i], gpu.stream));
        }
        run(state);
        if (i >= 0) {
            cuda_check(cudaEventRecord(end[i], gpu.stream));
        }
    }
    cuda_check(cudaStreamSynchronize(gpu.stream));
    for (int i = 0; i < TIMED_RUNS; i++) {
        cuda_check(cudaEventElapsedTime(&ms[i], begin[i], end[i]));
        cuda_check(cudaEventDestroy(begin[i]));
        cuda_check(cudaEventDestroy(end[i]));
    }
    qsort(ms, TIMED_RUNS, sizeof(float), compare_floats);
    return ms[TIMED_RUNS / 2];
}

static void run_copy(void* memory) {
    cuda_check(cudaMemcpyAsync((char*)memory + ((size_t)2 << 30), memory, (size_t)2 << 30, cudaMemcpyDeviceToDevice,
                               gpu.stream));
}

enum { TIMED_SWIGLU, TIMED_SWIGLU_KEPT, TIMED_NORM, TIMED_ADD_NORM, TIMED_SWIGLU_BACKWARD,
       TIMED_SWIGLU_BACKWARD_KEPT, TIMED_NORM_BACKWARD, TIMED_CARRY, TIMED };
static const struct { const char* name; double bytes; int wide; } timed[] = {
    {"swiglu_quantize", 5.65625, 1},         {"swiglu_quantize, kept", 7.71875, 1},
    {"rmsnorm_quantize", 3.65625, 0},        {"rmsnorm_quantize, add", 7.65625, 0},
    {"unrotate_swiglu_backward", 10.125, 1}, {"the same, kept", 8.1875, 1},
    {"unrotate_rmsnorm_backward", 8.125, 0}, {"carry; quantize unfused", 1.53125, 1}};

typedef struct { const Sides* s; int what, side, BT, C; } TimedRun;

static void run_timed(void* state) {
    const TimedRun* t = (const TimedRun*)state;
    const Sides* s = t->s;
    int BT = t->BT, C = t->C, fused = t->side == FUSED;
    if (t->what <= TIMED_ADD_NORM) {
        QTensor out = variant_out(s, t->side, BT, C, KEEP);
        QuantizeArgs args = case_args(&cases[0], ROUND_NEAREST, &out, NULL, NULL, NULL);
        quantizer_run(s, (Quantizer)t->what, &args, t->side);
    } else if (t->what == TIMED_CARRY) {
        QTensor out = variant_out(s, 0, BT, C, KEEP);
        QuantizeArgs args = case_args(&cases[0], ROUND_NEAREST, &out, s->inp, NULL, NULL);
        fused ? cuda_carry(&out) : cuda_quantize(&args);
    } else if (t->what <= TIMED_SWIGLU_BACKWARD_KEPT) {
        Mxint8 kept = mxint8_at((size_t)BT, 2 * (size_t)C, s->kept[0]);
        (fused ? cuda_unrotate_swiglu_backward : unfused_unrotate_swiglu_backward)(
            s->dinp[0], s->dout[0], s->out[0].mask, s->row_scale, s->inp,
            t->what == TIMED_SWIGLU_BACKWARD ? MXINT8_NONE : kept, BT, C);
    } else {
        (fused ? cuda_unrotate_rmsnorm_backward : unfused_unrotate_rmsnorm_backward)(
            s->dinp[0], real_f32((float*)s->dweight[0]), s->dout[0], s->out[0].mask, s->row_scale, s->dinp[0], s->inp,
            s->weight, s->rstd[0], BT, C);
    }
}

static double copy_rate;

static void time_layer(const Sides* s, int what, int BT, int C) {
    const Carrier carrier = carrier_of(FORMAT_E4M3);
    double ms[SIDES];
    for (int side = 0; side < SIDES; side++) {
        TimedRun run = {s, what, side, BT, C};
        cuda_check(cudaMemsetAsync(s->out[0].mask, 0xf3, (size_t)BT * C / 8, gpu.stream));
        cuda_check(cudaMemsetAsync(s->row_scale, 0x3f, sizeof(float) * (size_t)BT, gpu.stream));
        cuda_check(cudaMemsetAsync(s->base[side], 0, sizeof(CarrierBase), gpu.stream));
        for (int use = 0; use < 2; use++) {  // the second time with the right base, as in training
            carrier_bases_advance(s->base[side], 1, &carrier);
            run_timed(&run);
        }
        carrier_bases_advance(s->base[side], 1, &carrier);
        ms[side] = median_ms(run_timed, &run);
    }
    double rate = (double)BT * C * timed[what].bytes / (ms[FUSED] * 1e-3);
    printf("time %-26s (%5d, %5d) unfused %7.4f fused %7.4f ms, %.2f times; %5.0f GB/s, %5.1f %% of copy\n",
           timed[what].name, BT, C, ms[UNFUSED], ms[FUSED], ms[UNFUSED] / ms[FUSED], rate * 1e-9,
           100.0 * rate / copy_rate);
}

static void run_bench(void) {
    void* memory = device_alloc((size_t)4 << 30);
    cuda_check(cudaMemset(memory, 1, (size_t)4 << 30));
    copy_rate = 4.0 * 1073741824.0 / (median_ms(run_copy, memory) * 1e-3);
    cuda_check(cudaFree(memory));
    printf("copy %.0f GB/s\n", copy_rate * 1e-9);
    const struct { int BT, C, F; } models[] = {{32768, 1280, 3584}, {32768, 2048, 5632}, {16384, 4096, 11008}};
    Sides s;
    sides_alloc(&s, (size_t)32768 * 5632, 32768, 11008);
    for (int i = 0; i < 3; i++) {
        for (int what = 0; what < TIMED; what++) {
            int C = timed[what].wide ? models[i].F : models[i].C;
            size_t count = (size_t)models[i].BT * C;
            random_kernel<<<1024, 256, 0, gpu.stream>>>(s.inp, 2 * count, 1);
            random_kernel<<<1024, 256, 0, gpu.stream>>>(s.b, count, 2);
            random_kernel<<<1024, 256, 0, gpu.stream>>>(s.weight, (size_t)C, 3);
            random_kernel<<<1024, 256, 0, gpu.stream>>>(s.dout[0], count, 4);
            random_kernel<<<1024, 256, 0, gpu.stream>>>(s.dinp[0], count, 5);
            cuda_rmsnorm_forward(s.scratch, s.rstd[0], s.inp, s.weight, models[i].BT, C, 1e-5f);
            time_layer(&s, what, models[i].BT, C);
        }
    }
}

int main(int argc, char** argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char* what = argc > 1 ? argv[1] : "";
    cudaDeviceProp properties;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("skip: no GPU\n");
        return 0;
    }
    cuda_check(cudaSetDevice(0));
    cuda_check(cudaGetDeviceProperties(&properties, 0));
    cuda_check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    cuda_check(cudaMalloc(&gpu.partial, CUDA_PARTIALS * sizeof(float)));
    gpu.sm_count = properties.multiProcessorCount;
    gpu.major = properties.major;
    gpu.minor = properties.minor;
    printf("%s, %s, %d SMs\n", properties.name, FLOATX_NAME, gpu.sm_count);
    if (!*what || !strcmp(what, "check") || !strcmp(what, "small")) {
        double begin = clock_seconds();
        run_check(!strcmp(what, "small"));
        printf("check: %d checks, %d failed, %.0f s\n", checks, failures, clock_seconds() - begin);
    }
    if (!*what || !strcmp(what, "bench")) {
        run_bench();
    }
    printf("%d failed\n", failures);
    return failures > 0;
}
