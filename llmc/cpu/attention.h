// cpu/attention.h: causal grouped-query attention on the CPU, forward and backward, in blocks of query rows.
//
// With S = q k^T / sqrt(HS) over keys 0..t, P = softmax(S), out = P v, lse = log sum exp S. Backward (Dao et al. 2022,
// section 3.1):
//   D = sum(dout * out);  dP = dout v^T;  dS = P (dP - D);  dq = dS k / sqrt(HS);  dk = dS^T q / sqrt(HS);  dv = P^T
//   dout
// P is recomputed from lse. Scratch is one block of QUERY_BLOCK rows of S a thread, never T*T.
#pragma once
#include "gemm.h"
#include "layers.h"

#define QUERY_BLOCK 64

// scratch of one thread
typedef struct {
    float *q, *k, *v, *s, *dp;              // (T, HS) q, k, v; (QUERY_BLOCK, T) s, dp
    float *o, *dout, *dq, *dk, *dv, *delta; // (QUERY_BLOCK, HS) o, dout, dq; (T, HS) dk, dv; (QUERY_BLOCK) delta
    float* memory;
} AttentionScratch;

static size_t attention_scratch_floats(AttentionShape s) {
    return (size_t)s.T * s.HS * 5 + (size_t)QUERY_BLOCK * s.T * 2 + (size_t)QUERY_BLOCK * s.HS * 3 + QUERY_BLOCK;
}

static AttentionScratch attention_scratch(AttentionShape s) {
    size_t row = (size_t)s.T * s.HS, square = (size_t)QUERY_BLOCK * s.T, block = (size_t)QUERY_BLOCK * s.HS;
    AttentionScratch a;
    a.memory = (float*)malloc_or_die(attention_scratch_floats(s) * sizeof(float), "attention scratch");
    float* at = a.memory;
    a.q = at, at += row;
    a.k = at, at += row;
    a.v = at, at += row;
    a.dk = at, at += row;
    a.dv = at, at += row;
    a.s = at, at += square;
    a.dp = at, at += square;
    a.o = at, at += block;
    a.dout = at, at += block;
    a.dq = at, at += block;
    a.delta = at;
    return a;
}

// rows of one head out of a (rows, stride) floatX matrix
static void head_load(float* out, const floatX* inp, int rows, int stride, int HS) {
    for (int t = 0; t < rows; t++) {
        for (int j = 0; j < HS; j++) {
            out[(size_t)t * HS + j] = floatX_to_f32(inp[(size_t)t * stride + j]);
        }
    }
}

static void head_store(floatX* out, const float* inp, int rows, int stride, int HS) {
    for (int t = 0; t < rows; t++) {
        for (int j = 0; j < HS; j++) {
            out[(size_t)t * stride + j] = f32_to_floatX(inp[(size_t)t * HS + j]);
        }
    }
}

// softmax of the first `keys` scores in place; the rest up to width becomes 0. Returns log sum exp.
static float softmax_row(float* scores, int keys, int width) {
    float largest = scores[0];
    for (int j = 1; j < keys; j++) {
        largest = scores[j] > largest ? scores[j] : largest;
    }
    float partial[16] = {0};
    int j = 0;
    for (; j + 16 <= keys; j += 16) {
        for (int i = 0; i < 16; i++) {
            scores[j + i] = cpu_exp(scores[j + i] - largest);
            partial[i] += scores[j + i];
        }
    }
    for (; j < keys; j++) {
        scores[j] = cpu_exp(scores[j] - largest);
        partial[0] += scores[j];
    }
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) {
        sum += partial[i];
    }
    float inverse = 1.0f / sum;
    for (int i = 0; i < keys; i++) {
        scores[i] *= inverse;
    }
    for (int i = keys; i < width; i++) {
        scores[i] = 0.0f;
    }
    return logf(sum) + largest;
}

static void cpu_attention_forward(floatX* out, float* lse, const floatX* qkv, AttentionShape s) {
    int width = (s.NH + 2 * s.NKV) * s.HS, T = s.T, HS = s.HS, group = s.NH / s.NKV;
    float scale = 1.0f / sqrtf((float)HS);
#pragma omp parallel
    {
        AttentionScratch a = attention_scratch(s);
#pragma omp for schedule(dynamic)
        for (int bh = 0; bh < s.B * s.NH; bh++) {
            int b = bh / s.NH, h = bh % s.NH, kv = h / group;
            const floatX* base = qkv + (size_t)b * T * width;
            head_load(a.q, base + (size_t)h * HS, T, width, HS);
            head_load(a.k, base + (size_t)(s.NH + kv) * HS, T, width, HS);
            head_load(a.v, base + (size_t)(s.NH + s.NKV + kv) * HS, T, width, HS);
            for (int t0 = 0; t0 < T; t0 += QUERY_BLOCK) {
                int rows = min_int(QUERY_BLOCK, T - t0), keys = t0 + rows;
                sgemm(a.s, keys, a.q + (size_t)t0 * HS, HS, 0, a.k, HS, 0, rows, keys, HS, scale, 0.0f);
                for (int i = 0; i < rows; i++) {
                    lse[(size_t)bh * T + t0 + i] = softmax_row(a.s + (size_t)i * keys, t0 + i + 1, keys);
                }
                sgemm(a.o, HS, a.s, keys, 0, a.v, HS, 1, rows, HS, keys, 1.0f, 0.0f);
                head_store(out + ((size_t)b * T + t0) * s.NH * HS + (size_t)h * HS, a.o, rows, s.NH * HS, HS);
            }
        }
        free(a.memory);
    }
}

// one block of query rows of one head: adds to a.dk and a.dv, writes dq
static void attention_backward_block(AttentionScratch* a, floatX* dq, const floatX* dout, const floatX* out,
                                     const float* lse, AttentionShape s, int t0, float scale) {
    int HS = s.HS, rows = min_int(QUERY_BLOCK, s.T - t0), keys = t0 + rows, stride = s.NH * HS;
    int width = (s.NH + 2 * s.NKV) * HS;
    head_load(a->dout, dout, rows, stride, HS);
    head_load(a->o, out, rows, stride, HS);
    for (int i = 0; i < rows; i++) {
        float dot = 0.0f;
        for (int j = 0; j < HS; j++) {
            dot += a->dout[i * HS + j] * a->o[i * HS + j];
        }
        a->delta[i] = dot;
    }
    sgemm(a->s, keys, a->q + (size_t)t0 * HS, HS, 0, a->k, HS, 0, rows, keys, HS, scale, 0.0f);
    sgemm(a->dp, keys, a->dout, HS, 0, a->v, HS, 0, rows, keys, HS, 1.0f, 0.0f);
    for (int i = 0; i < rows; i++) {
        float *p = a->s + (size_t)i * keys, *dp = a->dp + (size_t)i * keys;
        int visible = t0 + i + 1;
        for (int j = 0; j < visible; j++) {
            p[j] = cpu_exp(p[j] - lse[t0 + i]);
            dp[j] = p[j] * (dp[j] - a->delta[i]);
        }
        for (int j = visible; j < keys; j++) {
            p[j] = 0.0f;
            dp[j] = 0.0f;
        }
    }
    sgemm(a->dv, HS, a->s, keys, 1, a->dout, HS, 1, keys, HS, rows, 1.0f, 1.0f);
    sgemm(a->dk, HS, a->dp, keys, 1, a->q + (size_t)t0 * HS, HS, 1, keys, HS, rows, scale, 1.0f);
    sgemm(a->dq, HS, a->dp, keys, 0, a->k, HS, 1, rows, HS, keys, scale, 0.0f);
    head_store(dq, a->dq, rows, width, HS);
}

static void cpu_attention_backward(floatX* dqkv, const floatX* dout, const floatX* out, const floatX* qkv,
                                   const float* lse, AttentionShape s) {
    int width = (s.NH + 2 * s.NKV) * s.HS, T = s.T, HS = s.HS, group = s.NH / s.NKV;
    float scale = 1.0f / sqrtf((float)HS);
#pragma omp parallel
    {
        AttentionScratch a = attention_scratch(s);
#pragma omp for schedule(dynamic)
        for (int bkv = 0; bkv < s.B * s.NKV; bkv++) {
            int b = bkv / s.NKV, kv = bkv % s.NKV;
            const floatX* base = qkv + (size_t)b * T * width;
            floatX* dbase = dqkv + (size_t)b * T * width;
            head_load(a.k, base + (size_t)(s.NH + kv) * HS, T, width, HS);
            head_load(a.v, base + (size_t)(s.NH + s.NKV + kv) * HS, T, width, HS);
            memset(a.dk, 0, sizeof(float) * (size_t)T * HS);
            memset(a.dv, 0, sizeof(float) * (size_t)T * HS);
            for (int h = kv * group; h < (kv + 1) * group; h++) {
                head_load(a.q, base + (size_t)h * HS, T, width, HS);
                for (int t0 = 0; t0 < T; t0 += QUERY_BLOCK) {
                    size_t row = ((size_t)b * T + t0) * s.NH * HS + (size_t)h * HS;
                    attention_backward_block(&a, dbase + (size_t)t0 * width + (size_t)h * HS, dout + row, out + row,
                                             lse + ((size_t)b * s.NH + h) * T, s, t0, scale);
                }
            }
            head_store(dbase + (size_t)(s.NH + kv) * HS, a.dk, T, width, HS);
            head_store(dbase + (size_t)(s.NH + s.NKV + kv) * HS, a.dv, T, width, HS);
        }
        free(a.memory);
    }
}

static void cpu_attention_cached(floatX* out, floatX* key_cache, floatX* value_cache, const floatX* qkv,
                                 AttentionShape s, int first_position) {
    int width = (s.NH + 2 * s.NKV) * s.HS, HS = s.HS, group = s.NH / s.NKV, stride = s.NKV * HS;
    float scale = 1.0f / sqrtf((float)HS);
    for (int t = 0; t < s.T; t++) {
        size_t at = (size_t)(first_position + t) * stride;
        memcpy(key_cache + at, qkv + (size_t)t * width + (size_t)s.NH * HS, sizeof(floatX) * (size_t)stride);
        memcpy(value_cache + at, qkv + (size_t)t * width + (size_t)(s.NH + s.NKV) * HS,
               sizeof(floatX) * (size_t)stride);
    }
    float* scores = (float*)malloc_or_die(sizeof(float) * (size_t)(first_position + s.T) * s.NH, "attention scores");
    for (int t = 0; t < s.T; t++) {
        int keys = first_position + t + 1;
#pragma omp parallel for schedule(static)
        for (int h = 0; h < s.NH; h++) {
            const floatX *q = qkv + (size_t)t * width + (size_t)h * HS, *k = key_cache + (size_t)(h / group) * HS;
            const floatX* v = value_cache + (size_t)(h / group) * HS;
            float* p = scores + (size_t)h * (first_position + s.T);
            for (int j = 0; j < keys; j++) {
                float dot = 0.0f;
                for (int i = 0; i < HS; i++) {
                    dot += floatX_to_f32(q[i]) * floatX_to_f32(k[(size_t)j * stride + i]);
                }
                p[j] = dot * scale;
            }
            softmax_row(p, keys, keys);
            floatX* y = out + ((size_t)t * s.NH + h) * HS;
            for (int i = 0; i < HS; i++) {
                float sum = 0.0f;
                for (int j = 0; j < keys; j++) {
                    sum += p[j] * floatX_to_f32(v[(size_t)j * stride + i]);
                }
                y[i] = f32_to_floatX(sum);
            }
        }
    }
    free(scores);
}
