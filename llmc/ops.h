// ops.h: every operation of the program, one row each. A backend (cpu, cuda) fills one struct Ops; the model sees
// nothing else.
//
// Conventions: outputs first, then inputs, then sizes. `=` overwrites and `+=` accumulates, as each row says: weight
// gradients accumulate, all else overwrites. Tensors are contiguous, the last index runs fastest. Activations and
// parameters are floatX, gradients of parameters and optimizer state f32 or floatX (RealArray), statistics f32; all
// sums are in f32 or better.
//   B batch rows, T time, BT = B*T tokens, C channels, F ffn width, NH query heads, NKV key/value heads, HS head size,
//   V vocabulary. qkv (B, T, (NH + 2 NKV) * HS): the query heads, then the key heads, then the value heads of each
//   token.
// In-place use is allowed where a row says so and nowhere else.
#pragma once
#include "recipe.h"

typedef struct { int B, T, NH, NKV, HS; } AttentionShape;

typedef struct { size_t a, b; } OperandSizes;  // elements

// numbers whose type is an option: gradients of parameters, optimizer state, results of products
typedef enum { REAL_FLOATX, REAL_F32 } RealType;
typedef struct { RealType type; void* data; } RealArray;

static HOST_DEVICE inline RealArray real_f32(float* data) { return RealArray{REAL_F32, data}; }
static HOST_DEVICE inline RealArray real_floatX(floatX* data) { return RealArray{REAL_FLOATX, data}; }
static HOST_DEVICE inline size_t real_bytes(RealType type) {
    return type == REAL_F32 ? sizeof(float) : sizeof(floatX);
}
// the array from element i on
static HOST_DEVICE inline RealArray real_from(RealArray x, size_t i) {
    return RealArray{x.type, (char*)x.data + i * real_bytes(x.type)};
}
static HOST_DEVICE inline float real_get(RealArray x, size_t i) {
    return x.type == REAL_F32 ? ((const float*)x.data)[i] : floatX_to_f32(((const floatX*)x.data)[i]);
}
// rounded to nearest
static HOST_DEVICE inline void real_set(RealArray x, size_t i, float value) {
    if (x.type == REAL_F32) {
        ((float*)x.data)[i] = value;
    } else {
        ((floatX*)x.data)[i] = f32_to_floatX(value);
    }
}

// out (M, N) [+]= alpha * owed * decode(a) (M, K) . decode(b) (N, K)^T
typedef struct {
    RealArray out;
    int accumulate;
    const QTensor *a, *b;
    float alpha;
} GemmArgs;

// What a step knows of itself, in device memory, so that the host need not be asked inside a step. The host writes lr
// and corrections (1 - beta^t, t the update's number from 1) and zeroes the sums before the step, and reads all of it
// once at its end.
typedef struct {
    double loss_sum;      // nats over the step's tokens
    double grad_squares;  // of the gradients before clipping
    uint64_t update;      // number of the update that follows, from 1
    uint64_t position;    // micro-batch << 32 | step: random numbers of a micro-batch derive from it
    float lr, correction1, correction2;
    float grad_scale;     // multiplies every gradient: the clip factor
    int32_t skip;         // loss or gradients are not finite: the update leaves everything as it is
} StepControl;

// norm = sqrt(grad_squares); grad_scale = min(1, grad_clip / norm), 1 where grad_clip is 0; skip where norm or loss is
// not finite
static HOST_DEVICE inline void step_decide(StepControl* control, float grad_clip) {
    double norm = sqrt(control->grad_squares);
    control->skip = !isfinite(norm) || !isfinite(control->loss_sum);
    control->grad_scale = grad_clip > 0.0f && norm > (double)grad_clip ? (float)((double)grad_clip / norm) : 1.0f;
}

// Elements first .. first + count - 1 of the flat buffer; all arrays begin at element `first`. With a master copy:
// master is updated, param = rounded master. Without: param itself is updated and rounded stochastically, so that
// updates below half a unit in its last place are not lost. m and v in floatX are rounded stochastically, too. The 16
// random bits of element i are round_bits(seed, rand_stream(RAND_UPDATE, 0, 0, update), which << 56, i), which 0 for
// param, 1 for m, 2 for v.
typedef struct {
    floatX* param;
    float* master;               // or NULL
    RealArray m, v, grad;
    size_t first, count;
    float beta1, beta2, eps, weight_decay;
    uint64_t seed;
    const StepControl* control;  // update, lr, corrections, grad_scale; where skip is set nothing is written
} AdamwArgs;

typedef struct Ops {
    const char* name;

    // memory on the device; alloc ends the process with exit 71 where there is none. zero and copies are in bytes.
    void* (*alloc)(size_t bytes, const char* what);
    void (*release)(void* memory);
    // host memory that the device copies from without waiting: it must not change before the next synchronize
    void* (*alloc_host)(size_t bytes, const char* what);
    void (*release_host)(void* memory);
    void (*zero)(void* memory, size_t bytes);
    void (*copy_to_device)(void* device, const void* host, size_t bytes);
    void (*copy_to_host)(void* host, const void* device, size_t bytes);
    void (*synchronize)(void);
    // A copy to alloc_host memory, of what was there when it was asked for, beside what is given next, which must not
    // change it before snapshot_fence: what is given after that waits on the device for the copies. snapshot_wait, on
    // any thread, until they are done; what that thread copies itself comes from this device.
    void (*snapshot_copy)(void* host, const void* device, size_t bytes);
    void (*snapshot_fence)(void);
    void (*snapshot_wait)(void);
    // scratch that depends on the largest micro-batch, once before the first operation of that shape
    void (*reserve)(AttentionShape shape);
    // bytes that the backend holds besides what alloc gave out: its own scratch (largest[i]: elements of the largest
    // left and right operand of a GEMM); its program and libraries
    size_t (*scratch_bytes)(OperandSizes largest, AttentionShape shape, int threads);
    size_t (*program_bytes)(int threads);
    size_t classifier_bytes;  // of a chunk of logits: within a cache or a budget, large enough for the library
    // dense bf16 peak of the device in FLOP/s: from its datasheet or, where the device is not in the table, gemm_rate,
    // measured at the first call; 0 on the CPU
    double (*peak_flops)(void);
    // bytes of the device that can still be allocated (0 where that is not known), and that are in use: on a GPU by all
    // programs, on the CPU this one's peak
    size_t (*available_bytes)(void);
    size_t (*used_bytes)(void);
    size_t micro_tokens;  // tokens of a micro-batch that keep the device busy
    // Run work(argument), which only calls operations of this table, always the same ones on the same memory. The
    // device may record it under that id and play it again.
    void (*replay)(int id, void (*work)(void* argument), void* argument);
    void (*describe)(char* buffer, size_t bytes);
    int shares_memory;  // with the other ranks of the host
    // which device of its host, where no two ranks may use the same; else empty
    void (*identify)(char* buffer, size_t bytes);
    // ceilings, measured now: the library's own rate on large matrix products in FLOP/s; bytes a second, read and
    // written, of a large copy
    double (*gemm_rate)(void);
    double (*copy_rate)(void);

    // out (BT, C) = weight[token]; weight (V, C)
    void (*embedding_forward)(floatX* out, const int32_t* tokens, const floatX* weight, int BT, int C);
    // dweight (V, C) += the rows of dout (BT, C) that stand at each token, in token order, summed in f32
    void (*embedding_backward)(RealArray dweight, const floatX* dout, const int32_t* tokens, int BT, int V, int C);

    // out (BT, C) = inp / rms(inp) * weight, rms = sqrt(mean(inp^2) + eps); rstd (BT) = 1/rms is kept for backward
    void (*rmsnorm_forward)(floatX* out, float* rstd, const floatX* inp, const floatX* weight, int BT, int C,
                            float eps);
    // sum = a + b, then rmsnorm of sum: the residual add and the norm behind it; sum may be in place on a
    void (*add_rmsnorm_forward)(floatX* sum, floatX* out, float* rstd, const floatX* a, const floatX* b,
                                const floatX* weight, int BT, int C, float eps);
    // dinp (BT, C) = dresidual (or 0 where NULL) + gradient of inp; may be in place on dresidual. dweight (C) +=
    void (*rmsnorm_backward)(floatX* dinp, RealArray dweight, const floatX* dout, const floatX* dresidual,
                             const floatX* inp, const floatX* weight, const float* rstd, int BT, int C);

    // out = a + b, n elements; may be in place on either
    void (*add)(floatX* out, const floatX* a, const floatX* b, size_t n);

    // rotate the query and key heads of qkv in place by the angles of positions first_position + t: HF half-split pairs
    // (j, j + HS/2). table (positions, HS/2, 2) holds cos, sin. inverse = 1 turns back, which is the backward pass.
    void (*rope)(floatX* qkv, const float* table, AttentionShape shape, int first_position, int inverse);

    // causal attention: out (B, T, NH*HS) = softmax(q k^T / sqrt(HS)) v; lse (B, NH, T) = log sum exp, kept for
    // backward
    void (*attention_forward)(floatX* out, float* lse, const floatX* qkv, AttentionShape shape);
    // dqkv = gradient of qkv
    void (*attention_backward)(floatX* dqkv, const floatX* dout, const floatX* out, const floatX* qkv, const float* lse,
                               AttentionShape shape);
    // decoding, B = 1: append the keys and values of shape.T new tokens to caches (position, NKV*HS) and attend to all
    void (*attention_cached)(floatX* out, floatX* key_cache, floatX* value_cache, const floatX* qkv,
                             AttentionShape shape, int first_position);

    // out (BT, F) = silu(gate) * up, inp (BT, 2F) = gate, up; kept (BT, 2F) = inp in MXINT8, where there is one
    void (*swiglu_forward)(floatX* out, Mxint8 kept, const floatX* inp, int BT, int F);
    // dinp (BT, 2F) = gradient at inp or, where there is one, at kept's values; inp is not read then
    void (*swiglu_backward)(floatX* dinp, const floatX* dout, const floatX* inp, Mxint8 kept, int BT, int F);

    // out = x (rows, cols) in MXINT8, cols % 32 == 0; and its values, which are exact
    void (*mxint8_pack)(Mxint8 out, const floatX* x, int rows, int cols);
    void (*mxint8_unpack)(floatX* out, Mxint8 packed, int rows, int cols);

    // losses (rows) = -log softmax(logits)[target] in nats; where with_grad, logits (rows, V) becomes its gradient
    // times grad_scale, in place
    void (*crossentropy)(float* losses, floatX* logits, const int32_t* targets, int rows, int V, float grad_scale,
                         int with_grad);

    // codes, scales and mask of one operand; the arithmetic is pinned, results are bit-equal between backends
    void (*quantize)(const QuantizeArgs* args);
    // q->operand = what the carrier multiplies, made again of q's codes, bit for bit as quantize made it with them
    void (*carry)(const QTensor* q);
    // can this backend compute that spec?
    int (*quantize_supports)(const QuantSpec* spec);
    void (*gemm)(const GemmArgs* args);
    // what products multiply instead of codes, as chosen at the start; NULL: they decode codes themselves
    const Carrier* (*carrier)(void);
    // before the operands of these bases (index modulo OPERANDS: whose) are quantized anew
    void (*carrier_begin)(CarrierBase* bases, int count);
    // x (rows, cols) = H (x * mask) in place: undoes trust mask and rotation of a gradient that lies in rotated space.
    // mask and row_scale may be NULL; row_scale (rows): powers of two that x's rows owe
    void (*unrotate)(RealArray x, const uint32_t* mask, const float* row_scale, int rows, int cols);

    // Passes that take their neighbour along. Each equals the operations it is named after, bit for bit; `scratch` is
    // where those store what lies between, and may stay as it was.
    // args->out = quantize(swiglu_forward(gate_up (BT, 2F))), kept as there; args->tensor is not read
    void (*swiglu_quantize)(const QuantizeArgs* args, floatX* scratch, Mxint8 kept, const floatX* gate_up, int BT,
                            int F);
    // args->out = quantize(add_rmsnorm_forward(a, b)), or of rmsnorm_forward(a) where b is NULL; sum, rstd as there
    void (*rmsnorm_quantize)(const QuantizeArgs* args, floatX* scratch, floatX* sum, float* rstd, const floatX* a,
                             const floatX* b, const floatX* weight, int BT, int C, float eps);
    // swiglu_backward with dout = unrotate(dact (BT, F), mask, row_scale); dact may be overwritten
    void (*unrotate_swiglu_backward)(floatX* dinp, floatX* dact, const uint32_t* mask, const float* row_scale,
                                     const floatX* inp, Mxint8 kept, int BT, int F);
    // rmsnorm_backward with dout = unrotate(dnorm (BT, C), mask, row_scale); dnorm may be overwritten
    void (*unrotate_rmsnorm_backward)(floatX* dinp, RealArray dweight, floatX* dnorm, const uint32_t* mask,
                                      const float* row_scale, const floatX* dresidual, const floatX* inp,
                                      const floatX* weight, const float* rstd, int BT, int C);

    // sums, deterministic: the order does not depend on the number of threads. *sum += the losses; *sum = the squares
    // of x
    void (*loss_sum)(double* sum, const float* losses, int n);
    void (*sum_squares)(double* sum, RealArray x, size_t n);
    void (*step_decide)(StepControl* control, float grad_clip);
    // one AdamW update with decoupled weight decay (Loshchilov & Hutter 2019)
    void (*adamw)(const AdamwArgs* args);
} Ops;
