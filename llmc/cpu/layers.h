// cpu/layers.h: embedding, RMSNorm, RoPE, SwiGLU, cross-entropy, AdamW, sums on the CPU. Readable loops that vectorize.
//
// `omp simd` stands where the compiler cannot see that an output does not overlap the inputs (in-place use is index by
// index). Deterministic: a sum has one order, whatever the number of threads. Gradients of weights are parallel over
// columns, so each thread adds all tokens of its columns in token order.
#pragma once
#include "../ops.h"

#define COLUMN_STRIP 64

// exp(x), within 2 units in the last place, as a polynomial so that loops over it vectorize: 2^n e^r, |r| <= ln2/2
static inline float cpu_exp(float x) {
    float clamped = x > 88.0f ? 88.0f : x > -87.0f ? x : -87.0f;  // NaN becomes -87 here and is put back below
    float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166665763f + r * (0.0416665561f + r * (0.00836319476f +
              r * 0.00139262038f)))));
    float y = p * f32_from_bits((uint32_t)((int)n + 127) << 23);
    y = x < -87.0f ? 0.0f : y;
    return x != x ? x : x > 88.0f ? f32_from_bits(0x7f800000u) : y;
}

static void cpu_embedding_forward(floatX* out, const int32_t* tokens, const floatX* weight, int BT, int C) {
#pragma omp parallel for schedule(static)
    for (int t = 0; t < BT; t++) {
        memcpy(out + (size_t)t * C, weight + (size_t)tokens[t] * C, sizeof(floatX) * (size_t)C);
    }
}

// floatX gradients: the tokens are summed in f32, one token id after the other, so that each is rounded once
static void embedding_backward_floatX(floatX* dweight, const floatX* dout, const int32_t* tokens, int BT, int C) {
    int32_t last = 0;
    for (int t = 0; t < BT; t++) {
        last = tokens[t] > last ? tokens[t] : last;
    }
    int32_t* first = (int32_t*)malloc_or_die(sizeof(int32_t) * ((size_t)last + 1 + (size_t)BT), "positions by token");
    int32_t* next = first + last + 1;  // positions of a token as a list in order
    memset(first, 0xff, sizeof(int32_t) * ((size_t)last + 1));
    for (int t = BT - 1; t >= 0; t--) {
        next[t] = first[tokens[t]];
        first[tokens[t]] = t;
    }
#pragma omp parallel for schedule(dynamic, 64)
    for (int32_t token = 0; token <= last; token++) {
        floatX* row = dweight + (size_t)token * C;
        for (int c = 0; first[token] >= 0 && c < C; c++) {
            float sum = floatX_to_f32(row[c]);
            for (int t = first[token]; t >= 0; t = next[t]) {
                sum += floatX_to_f32(dout[(size_t)t * C + c]);
            }
            row[c] = f32_to_floatX(sum);
        }
    }
    free(first);
}

static void cpu_embedding_backward(RealArray dweight, const floatX* dout, const int32_t* tokens, int BT, int V,
                                   int C) {
    (void)V;
    if (dweight.type == REAL_FLOATX) {
        embedding_backward_floatX((floatX*)dweight.data, dout, tokens, BT, C);
        return;
    }
    int strips = (int)ceil_div(C, COLUMN_STRIP);
#pragma omp parallel for schedule(static)
    for (int strip = 0; strip < strips; strip++) {
        int begin = strip * COLUMN_STRIP, end = min_int(C, begin + COLUMN_STRIP);
        for (int t = 0; t < BT; t++) {
            float* row = (float*)dweight.data + (size_t)tokens[t] * C;
            const floatX* gradient = dout + (size_t)t * C;
#pragma omp simd
            for (int c = begin; c < end; c++) {
                row[c] += floatX_to_f32(gradient[c]);
            }
        }
    }
}

// sum of a row's products by 16 partial sums, so that it vectorizes without reassociating
static inline float sum_of_squares_row(const floatX* x, int C) {
    float partial[16] = {0};
    int c = 0;
    for (; c + 16 <= C; c += 16) {
        for (int j = 0; j < 16; j++) {
            float v = floatX_to_f32(x[c + j]);
            partial[j] += v * v;
        }
    }
    for (; c < C; c++) {
        partial[0] += floatX_to_f32(x[c]) * floatX_to_f32(x[c]);
    }
    float sum = 0.0f;
    for (int j = 0; j < 16; j++) {
        sum += partial[j];
    }
    return sum;
}

static void cpu_rmsnorm_forward(floatX* out, float* rstd, const floatX* inp, const floatX* weight, int BT, int C,
                                float eps) {
#pragma omp parallel for schedule(static)
    for (int t = 0; t < BT; t++) {
        const floatX* x = inp + (size_t)t * C;
        floatX* y = out + (size_t)t * C;
        float r = 1.0f / sqrtf(sum_of_squares_row(x, C) / (float)C + eps);
#pragma omp simd
        for (int c = 0; c < C; c++) {
            y[c] = f32_to_floatX(floatX_to_f32(x[c]) * r * floatX_to_f32(weight[c]));
        }
        rstd[t] = r;
    }
}

static void cpu_add(floatX* out, const floatX* a, const floatX* b, size_t n);

static void cpu_add_rmsnorm_forward(floatX* sum, floatX* out, float* rstd, const floatX* a, const floatX* b,
                                    const floatX* weight, int BT, int C, float eps) {
    cpu_add(sum, a, b, (size_t)BT * C);
    cpu_rmsnorm_forward(out, rstd, sum, weight, BT, C, eps);
}

// y = x r w: dx = r (w dy - x r^2 mean(w dy x)), dw = sum over tokens of dy x r
static void cpu_rmsnorm_backward(floatX* dinp, RealArray dweight, const floatX* dout, const floatX* dresidual,
                                 const floatX* inp, const floatX* weight, const float* rstd, int BT, int C) {
    int strips = (int)ceil_div(C, COLUMN_STRIP);
#pragma omp parallel for schedule(static)
    for (int strip = 0; strip < strips; strip++) {
        int begin = strip * COLUMN_STRIP, end = min_int(C, begin + COLUMN_STRIP);
        float sum[COLUMN_STRIP] = {0};
        for (int t = 0; t < BT; t++) {
            const floatX *dy = dout + (size_t)t * C, *x = inp + (size_t)t * C;
#pragma omp simd
            for (int c = begin; c < end; c++) {
                sum[c - begin] += floatX_to_f32(dy[c]) * floatX_to_f32(x[c]) * rstd[t];
            }
        }
        for (int c = begin; c < end; c++) {
            real_set(dweight, (size_t)c, real_get(dweight, (size_t)c) + sum[c - begin]);
        }
    }
#pragma omp parallel for schedule(static)
    for (int t = 0; t < BT; t++) {
        const floatX *dy = dout + (size_t)t * C, *x = inp + (size_t)t * C;
        float partial[16] = {0}, dot = 0.0f, r = rstd[t];
        int c = 0;
        for (; c + 16 <= C; c += 16) {
            for (int j = 0; j < 16; j++) {
                partial[j] += floatX_to_f32(dy[c + j]) * floatX_to_f32(weight[c + j]) * floatX_to_f32(x[c + j]);
            }
        }
        for (; c < C; c++) {
            partial[0] += floatX_to_f32(dy[c]) * floatX_to_f32(weight[c]) * floatX_to_f32(x[c]);
        }
        for (int j = 0; j < 16; j++) {
            dot += partial[j];
        }
        float along = dot / (float)C * r * r;
        floatX* dx = dinp + (size_t)t * C;
        const floatX* residual = dresidual ? dresidual + (size_t)t * C : NULL;
#pragma omp simd
        for (int i = 0; i < C; i++) {
            float g = r * (floatX_to_f32(weight[i]) * floatX_to_f32(dy[i]) - floatX_to_f32(x[i]) * along);
            dx[i] = f32_to_floatX(residual ? floatX_to_f32(residual[i]) + g : g);
        }
    }
}

static void cpu_add(floatX* out, const floatX* a, const floatX* b, size_t n) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) {
        out[i] = f32_to_floatX(floatX_to_f32(a[i]) + floatX_to_f32(b[i]));
    }
}

static void cpu_rope(floatX* qkv, const float* table, AttentionShape s, int first_position, int inverse) {
    int half = s.HS / 2, width = (s.NH + 2 * s.NKV) * s.HS;
    float direction = inverse ? -1.0f : 1.0f;
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < s.B * s.T; bt++) {
        const float* angles = table + (size_t)(first_position + bt % s.T) * half * 2;
        for (int h = 0; h < s.NH + s.NKV; h++) {
            floatX* x = qkv + (size_t)bt * width + (size_t)h * s.HS;
#pragma omp simd
            for (int j = 0; j < half; j++) {
                float cosine = angles[2 * j], sine = direction * angles[2 * j + 1];
                float a = floatX_to_f32(x[j]), b = floatX_to_f32(x[j + half]);
                x[j] = f32_to_floatX(a * cosine - b * sine);
                x[j + half] = f32_to_floatX(b * cosine + a * sine);
            }
        }
    }
}

static void cpu_mxint8_pack(Mxint8 out, const floatX* x, int rows, int cols) {
    int64_t groups = (int64_t)rows * (cols / GROUP);
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        const floatX* from = x + group * GROUP;
        uint8_t* codes = out.codes + group * GROUP;
        uint32_t largest = 0;
        for (int k = 0; k < GROUP; k++) {
            uint32_t bits = f32_bits(floatX_to_f32(from[k])) & 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        uint32_t scale = mxint8_scale(largest);
        float inverse = mxint8_inverse_step(scale);
#pragma omp simd
        for (int k = 0; k < GROUP; k++) {
            codes[k] = f32_to_int8(floatX_to_f32(from[k]) * inverse);
        }
        out.scales[group] = (uint8_t)scale;
    }
}

static void cpu_mxint8_unpack(floatX* out, Mxint8 packed, int rows, int cols) {
    int64_t groups = (int64_t)rows * (cols / GROUP);
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        const uint8_t* codes = packed.codes + group * GROUP;
        uint32_t scale = packed.scales[group];
        floatX* to = out + group * GROUP;
#pragma omp simd
        for (int k = 0; k < GROUP; k++) {
            to[k] = f32_to_floatX(mxint8_decode(codes[k], scale));
        }
    }
}

static void cpu_swiglu_forward(floatX* out, Mxint8 kept, const floatX* inp, int BT, int F) {
    if (kept.codes) {
        cpu_mxint8_pack(kept, inp, BT, 2 * F);
    }
#pragma omp parallel for schedule(static)
    for (int t = 0; t < BT; t++) {
        const floatX *gate = inp + (size_t)t * 2 * F, *up = gate + F;
        floatX* y = out + (size_t)t * F;
#pragma omp simd
        for (int f = 0; f < F; f++) {
            float g = floatX_to_f32(gate[f]);
            y[f] = f32_to_floatX(g / (1.0f + cpu_exp(-g)) * floatX_to_f32(up[f]));
        }
    }
}

// v = n neighbouring elements from the one at `first` on, of kept's groups where there is one
static inline void swiglu_load(float* v, const floatX* inp, Mxint8 kept, size_t first, int n) {
    if (kept.codes) {
        uint32_t scale = kept.scales[first / GROUP];
#pragma omp simd
        for (int k = 0; k < n; k++) {
            v[k] = mxint8_decode(kept.codes[first + (size_t)k], scale);
        }
        return;
    }
#pragma omp simd
    for (int k = 0; k < n; k++) {
        v[k] = floatX_to_f32(inp[first + (size_t)k]);
    }
}

// silu'(g) = s (1 + g (1 - s)), s = sigmoid(g)
static void cpu_swiglu_backward(floatX* dinp, const floatX* dout, const floatX* inp, Mxint8 kept, int BT, int F) {
#pragma omp parallel for schedule(static)
    for (int t = 0; t < BT; t++) {
        for (int begin = 0; begin < F; begin += GROUP) {
            int n = min_int(GROUP, F - begin);
            size_t at = (size_t)t * 2 * F + begin;
            const floatX* dy = dout + (size_t)t * F + begin;
            floatX *dgate = dinp + at, *dup = dgate + F;
            float gate[GROUP], up[GROUP];
            swiglu_load(gate, inp, kept, at, n);
            swiglu_load(up, inp, kept, at + F, n);
#pragma omp simd
            for (int f = 0; f < n; f++) {
                float g = gate[f], u = up[f], d = floatX_to_f32(dy[f]);
                float s = 1.0f / (1.0f + cpu_exp(-g));
                dgate[f] = f32_to_floatX(d * u * s * (1.0f + g * (1.0f - s)));
                dup[f] = f32_to_floatX(d * g * s);
            }
        }
    }
}

static void crossentropy_row(float* loss, floatX* logits, int target, int V, float grad_scale, int with_grad) {
    float partial[16];
    for (int j = 0; j < 16; j++) {
        partial[j] = -INFINITY;
    }
    int v = 0;
    for (; v + 16 <= V; v += 16) {
        for (int j = 0; j < 16; j++) {
            float x = floatX_to_f32(logits[v + j]);
            partial[j] = x > partial[j] ? x : partial[j];
        }
    }
    for (; v < V; v++) {
        float x = floatX_to_f32(logits[v]);
        partial[0] = x > partial[0] ? x : partial[0];
    }
    float largest = partial[0];
    for (int j = 1; j < 16; j++) {
        largest = partial[j] > largest ? partial[j] : largest;
    }
    memset(partial, 0, sizeof partial);
    v = 0;
    for (; v + 16 <= V; v += 16) {
        for (int j = 0; j < 16; j++) {
            partial[j] += cpu_exp(floatX_to_f32(logits[v + j]) - largest);
        }
    }
    for (; v < V; v++) {
        partial[0] += cpu_exp(floatX_to_f32(logits[v]) - largest);
    }
    double sum = 0.0;
    for (int j = 0; j < 16; j++) {
        sum += (double)partial[j];
    }
    *loss = (float)(log(sum) + (double)largest - (double)floatX_to_f32(logits[target]));
    if (with_grad) {
        float scale = (float)((double)grad_scale / sum), target_logit = floatX_to_f32(logits[target]);
        for (int i = 0; i < V; i++) {
            logits[i] = f32_to_floatX(cpu_exp(floatX_to_f32(logits[i]) - largest) * scale);
        }
        logits[target] = f32_to_floatX((cpu_exp(target_logit - largest) / (float)sum - 1.0f) * grad_scale);
    }
}

static void cpu_crossentropy(float* losses, floatX* logits, const int32_t* targets, int rows, int V, float grad_scale,
                             int with_grad) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        crossentropy_row(losses + row, logits + (size_t)row * V, targets[row], V, grad_scale, with_grad);
    }
}

static void cpu_sum_squares(double* total, RealArray array, size_t n) {
    const size_t chunk = 65536;
    int64_t chunks = ceil_div((int64_t)n, (int64_t)chunk);
    double* partial = (double*)malloc_or_die(sizeof(double) * (size_t)chunks, "partial sums");
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        size_t begin = (size_t)c * chunk, end = begin + chunk < n ? begin + chunk : n;
        double lanes[8] = {0};
        size_t i = begin;
        const float* x = (const float*)array.data;
        for (; array.type == REAL_F32 && i + 8 <= end; i += 8) {
            for (int j = 0; j < 8; j++) {
                lanes[j] += (double)x[i + j] * (double)x[i + j];
            }
        }
        for (; i < end; i++) {
            double value = (double)real_get(array, i);
            lanes[i % 8] += value * value;
        }
        partial[c] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    }
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; c++) {
        sum += partial[c];
    }
    free(partial);
    *total = sum;
}

static void cpu_loss_sum(double* sum, const float* losses, int n) {
    double mine = 0.0;
    for (int i = 0; i < n; i++) {
        mine += (double)losses[i];
    }
    *sum += mine;
}

static void cpu_step_decide(StepControl* control, float grad_clip) { step_decide(control, grad_clip); }

// with a master copy and f32 state: the loop vectorizes
static void adamw_f32(const AdamwArgs* a) {
    float correction1 = a->control->correction1, correction2 = a->control->correction2, lr = a->control->lr;
    float *master = a->master, *first = (float*)a->m.data, *second = (float*)a->v.data;
    const float* grad = (const float*)a->grad.data;
    floatX* param = a->param;
    float beta1 = a->beta1, beta2 = a->beta2, eps = a->eps, decay = lr * a->weight_decay,
          scale = a->control->grad_scale;
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < a->count; i++) {
        float g = grad[i] * scale;
        float m = beta1 * first[i] + (1.0f - beta1) * g;
        float v = beta2 * second[i] + (1.0f - beta2) * g * g;
        float step = (m / correction1) / (sqrtf(v / correction2) + eps);
        float w = master[i];
        w = (w - decay * w) - lr * step;
        first[i] = m;
        second[i] = v;
        master[i] = w;
        param[i] = f32_to_floatX(w);
    }
}

// state in either type: one element at a time
static void adamw_general(const AdamwArgs* a) {
    const StepControl* control = a->control;
    float beta1 = a->beta1, beta2 = a->beta2, decay = control->lr * a->weight_decay;
    uint64_t stream = rand_stream(RAND_UPDATE, 0, 0, control->update);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < a->count; i++) {
        uint64_t element = a->first + i;
        float g = real_get(a->grad, i) * control->grad_scale;
        float m = beta1 * real_get(a->m, i) + (1.0f - beta1) * g;
        float v = beta2 * real_get(a->v, i) + (1.0f - beta2) * g * g;
        float step = (m / control->correction1) / (sqrtf(v / control->correction2) + a->eps);
        float w = a->master ? a->master[i] : floatX_to_f32(a->param[i]);
        w = (w - decay * w) - control->lr * step;
        if (a->master) {
            a->master[i] = w;
            a->param[i] = f32_to_floatX(w);
        } else {
            a->param[i] = f32_to_floatX_stochastic(w, round_bits(a->seed, stream, 0, element));
        }
        if (a->m.type == REAL_F32) {
            real_set(a->m, i, m);
            real_set(a->v, i, v);
        } else {
            ((floatX*)a->m.data)[i] = f32_to_floatX_stochastic(m, round_bits(a->seed, stream, 1ull << 56, element));
            ((floatX*)a->v.data)[i] = f32_to_floatX_stochastic(v, round_bits(a->seed, stream, 2ull << 56, element));
        }
    }
}

static void cpu_adamw(const AdamwArgs* a) {
    check(a->m.type == a->v.type, "internal: the moments differ in type");
    if (a->control->skip) {
        return;
    }
    if (a->master && a->m.type == REAL_F32 && a->grad.type == REAL_F32) {
        adamw_f32(a);
    } else {
        adamw_general(a);
    }
}
