// attention_check.h: problems for attention_bench.cu, their f64 reference on the CPU, and the section `check`.
#pragma once
#include "../../llmc/cuda/attention.cuh"
#include "../../llmc/cpu/attention.h"
#include "../../llmc/rand.h"

static int failures;
static int only_path = -1;  // the second argument

static void* device_alloc(size_t bytes) {
    void* memory;
    cuda_check(cudaMalloc(&memory, bytes));
    return memory;
}

__global__ void random_kernel(floatX* x, size_t count, uint64_t stream) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        Philox p = philox(1234, i, stream);
        float u = (float)((p.w[0] >> 8) + 1) * 0x1p-24f, angle = (float)(p.w[1] >> 8) * 0x1p-23f;
        x[i] = to_floatX(sqrtf(-2.0f * logf(u)) * cospif(angle));
    }
}

// normally distributed, on the device
static floatX* random_floats(size_t count, uint64_t stream) {
    floatX* x = (floatX*)device_alloc(sizeof(floatX) * count);
    random_kernel<<<1024, 256, 0, gpu.stream>>>(x, count, stream);
    cuda_check_launch();
    return x;
}

static floatX* host_copy(const floatX* device, size_t count) {
    floatX* x = (floatX*)malloc_or_die(sizeof(floatX) * count, "a copy");
    cuda_check(cudaStreamSynchronize(gpu.stream));
    cuda_check(cudaMemcpy(x, device, sizeof(floatX) * count, cudaMemcpyDeviceToHost));
    return x;
}

// one problem; host copies of the inputs where asked for
typedef struct {
    AttentionShape s;
    size_t qkv_count, out_count, lse_count;
    floatX *qkv, *dout;                  // host
    floatX *d_qkv, *d_dout, *d_out, *d_dqkv;
    float* d_lse;
} Problem;

static Problem problem_new(AttentionShape s, int on_host) {
    Problem p;
    p.s = s;
    p.qkv_count = (size_t)s.B * s.T * (s.NH + 2 * s.NKV) * s.HS;
    p.out_count = (size_t)s.B * s.T * s.NH * s.HS;
    p.lse_count = (size_t)s.B * s.NH * s.T;
    p.d_qkv = random_floats(p.qkv_count, 1);
    p.d_dout = random_floats(p.out_count, 2);
    p.d_dqkv = (floatX*)device_alloc(sizeof(floatX) * p.qkv_count);
    p.d_out = (floatX*)device_alloc(sizeof(floatX) * p.out_count);
    p.d_lse = (float*)device_alloc(sizeof(float) * p.lse_count);
    p.qkv = on_host ? host_copy(p.d_qkv, p.qkv_count) : NULL;
    p.dout = on_host ? host_copy(p.d_dout, p.out_count) : NULL;
    return p;
}

static void problem_free(Problem* p) {
    free(p->qkv);
    free(p->dout);
    cuda_check(cudaFree(p->d_qkv));
    cuda_check(cudaFree(p->d_dqkv));
    cuda_check(cudaFree(p->d_dout));
    cuda_check(cudaFree(p->d_out));
    cuda_check(cudaFree(p->d_lse));
}

// every output NaN
static void problem_poison(Problem* p) {
    cuda_check(cudaMemsetAsync(p->d_dqkv, 0xff, sizeof(floatX) * p->qkv_count, gpu.stream));
    cuda_check(cudaMemsetAsync(p->d_out, 0xff, sizeof(floatX) * p->out_count, gpu.stream));
    cuda_check(cudaMemsetAsync(p->d_lse, 0xff, sizeof(float) * p->lse_count, gpu.stream));
}

static void problem_run(Problem* p, AttentionPath path) {
    attention_forward_on(path, p->d_out, p->d_lse, p->d_qkv, p->s);
    attention_backward_on(path, p->d_dqkv, p->d_dout, p->d_out, p->d_qkv, p->d_lse, p->s);
}

static void problem_name(char* name, size_t size, AttentionShape s) {
    snprintf(name, size, "B%d_T%d_NH%d_NKV%d_HS%d", s.B, s.T, s.NH, s.NKV, s.HS);
}

// ---------------------------------------------------------------------------------------------------------------------
// check: the f64 loop, and the naive one in low precision

typedef struct { double *out, *lse, *dqkv; } Reference;

static double rounded(double x, int low) { return low ? (double)floatX_to_f32(f32_to_floatX((float)x)) : x; }

// one query head: out, lse, dq, and dk, dv of this head alone (T, HS)
static void reference_head(const Problem* p, Reference r, int low, int b, int h, double* dk, double* dv, double* prob,
                           double* dp) {
    AttentionShape s = p->s;
    int width = (s.NH + 2 * s.NKV) * s.HS, kv = h / (s.NH / s.NKV);
    const floatX *q = p->qkv + (size_t)b * s.T * width + (size_t)h * s.HS,
                 *k = p->qkv + (size_t)b * s.T * width + (size_t)(s.NH + kv) * s.HS;
    const floatX *v = k + (size_t)s.NKV * s.HS, *d = p->dout + (size_t)b * s.T * s.NH * s.HS + (size_t)h * s.HS;
    double* out = r.out + (size_t)b * s.T * s.NH * s.HS + (size_t)h * s.HS;
    double* dq = r.dqkv + (size_t)b * s.T * width + (size_t)h * s.HS;
    double scale = 1.0 / sqrt((double)s.HS);
    for (int i = 0; i < s.T; i++) {
        double top = -INFINITY, sum = 0, D = 0;
        for (int j = 0; j <= i; j++) {
            double score = 0, grad = 0;
            for (int c = 0; c < s.HS; c++) {
                score += (double)floatX_to_f32(q[(size_t)i * width + c]) * floatX_to_f32(k[(size_t)j * width + c]);
                grad += (double)floatX_to_f32(d[(size_t)i * s.NH * s.HS + c]) * floatX_to_f32(v[(size_t)j * width + c]);
            }
            prob[j] = rounded(rounded(score, low) * scale, low);
            dp[j] = rounded(grad, low);
            top = prob[j] > top ? prob[j] : top;
        }
        for (int j = 0; j <= i; j++) {
            prob[j] = exp(prob[j] - top);
            sum += prob[j];
        }
        r.lse[((size_t)b * s.NH + h) * s.T + i] = top + log(sum);
        for (int j = 0; j <= i; j++) {
            prob[j] = rounded(prob[j] / sum, low);
            D += prob[j] * dp[j];
        }
        for (int j = 0; j <= i; j++) {
            dp[j] = rounded(rounded(prob[j] * (dp[j] - D), low) * scale, low);
        }
        for (int c = 0; c < s.HS; c++) {
            double o = 0, g = 0;
            for (int j = 0; j <= i; j++) {
                o += prob[j] * floatX_to_f32(v[(size_t)j * width + c]);
                g += dp[j] * floatX_to_f32(k[(size_t)j * width + c]);
                dk[(size_t)j * s.HS + c] += dp[j] * floatX_to_f32(q[(size_t)i * width + c]);
                dv[(size_t)j * s.HS + c] += prob[j] * floatX_to_f32(d[(size_t)i * s.NH * s.HS + c]);
            }
            out[(size_t)i * s.NH * s.HS + c] = rounded(o, low);
            dq[(size_t)i * width + c] = rounded(g, low);
        }
    }
}

static Reference reference_new(const Problem* p, int low) {
    AttentionShape s = p->s;
    Reference r;
    r.out = (double*)calloc_or_die(sizeof(double) * p->out_count, "reference");
    r.lse = (double*)calloc_or_die(sizeof(double) * p->lse_count, "reference");
    r.dqkv = (double*)calloc_or_die(sizeof(double) * p->qkv_count, "reference");
    size_t head = (size_t)s.T * s.HS, each = 2 * head + 2 * (size_t)s.T;  // dk, dv, two rows of scores
    double* memory = (double*)calloc_or_die(sizeof(double) * each * (size_t)(s.B * s.NH), "reference");
#pragma omp parallel for
    for (int bh = 0; bh < s.B * s.NH; bh++) {
        double* mine = memory + (size_t)bh * each;
        reference_head(p, r, low, bh / s.NH, bh % s.NH, mine, mine + head, mine + 2 * head, mine + 2 * head + s.T);
    }
    int group = s.NH / s.NKV, width = (s.NH + 2 * s.NKV) * s.HS;
    for (int bh = 0; bh < s.B * s.NH; bh++) {
        double* mine = memory + (size_t)bh * each;
        for (size_t i = 0; i < 2 * head; i++) {
            size_t t = i % head / s.HS,
                   column = (size_t)(s.NH + (i < head ? 0 : s.NKV) + bh % s.NH / group) * s.HS + i % s.HS;
            r.dqkv[((size_t)(bh / s.NH) * s.T + t) * width + column] += rounded(mine[i], low);
        }
    }
    free(memory);
    for (size_t i = 0; low && i < p->qkv_count; i++) {
        r.dqkv[i] = rounded(r.dqkv[i], low);
    }
    return r;
}

static void reference_free(Reference* r) {
    free(r->out);
    free(r->lse);
    free(r->dqkv);
}

// of x against reference, in columns [first, last) of rows of `width`: largest and root-mean-square difference,
// infinite for NaN
typedef struct { double largest, rms, top; } Distance;

static Distance distance(const floatX* x, const double* other, const double* reference, size_t count, int width,
                         int first, int last) {
    Distance e = {0, 0, 0};
    size_t n = 0;
    for (size_t i = 0; i < count; i++) {
        int column = (int)(i % width);
        if (column < first || column >= last) {
            continue;
        }
        double d = fabs((x ? (double)floatX_to_f32(x[i]) : other[i]) - reference[i]);
        d = d == d ? d : INFINITY;
        e.largest = d > e.largest ? d : e.largest;
        e.rms += d * d;
        e.top = fabs(reference[i]) > e.top ? fabs(reference[i]) : e.top;
        n++;
    }
    e.rms = sqrt(e.rms / (double)n);
    return e;
}

// 1 if x is as good as the naive loop allows. floor: roundings counted besides: one of the output; sums of T and HS
// terms in f32; the cancellation of dP and delta, each a sum of HS products of order 1
static int distance_ok(Distance e, Distance naive, AttentionShape s) {
    double sums = 4.0 * (sqrt((double)s.T) + sqrt((double)s.HS)) * 0x1p-24;
    double floor_error = (FLOATX_EPSILON + sums) * naive.top + s.HS * 0x1p-22;
    return e.largest <= 2 * naive.largest + floor_error && e.rms <= 2 * naive.rms + floor_error;
}

static void check_tensor(const char* who, const char* what, const Problem* p, floatX* x, const double* exact,
                         const double* naive, size_t count, int width, int first, int last) {
    Distance e = distance(x, NULL, exact, count, width, first, last),
             n = distance(NULL, naive, exact, count, width, first, last);
    if (!distance_ok(e, n, p->s)) {
        char name[128];
        problem_name(name, sizeof name, p->s);
        printf("FAIL %s %s %s: largest error %.3e, naive %.3e; rms %.3e, naive %.3e; largest value %.3e\n", name, who,
               what, e.largest, n.largest, e.rms, n.rms, n.top);
        failures++;
        return;
    }
    size_t at = (size_t)first;  // the planted error: one element wrong by more than rounding
    floatX saved = x[at];
    x[at] = f32_to_floatX(floatX_to_f32(saved) + 0.5f + (float)n.top);
    if (distance_ok(distance(x, NULL, exact, count, width, first, last), n, p->s)) {
        printf("FAIL %s: the comparator does not see a planted error\n", what);
        failures++;
    }
    x[at] = saved;
}

static void check_all(const char* who, const Problem* p, floatX* out, const float* lse, floatX* dqkv, Reference exact,
                      Reference naive) {
    AttentionShape s = p->s;
    int width = (s.NH + 2 * s.NKV) * s.HS, k = s.NH * s.HS, v = k + s.NKV * s.HS;
    check_tensor(who, "out", p, out, exact.out, naive.out, p->out_count, s.NH * s.HS, 0, s.NH * s.HS);
    check_tensor(who, "dq", p, dqkv, exact.dqkv, naive.dqkv, p->qkv_count, width, 0, k);
    check_tensor(who, "dk", p, dqkv, exact.dqkv, naive.dqkv, p->qkv_count, width, k, v);
    check_tensor(who, "dv", p, dqkv, exact.dqkv, naive.dqkv, p->qkv_count, width, v, width);
    // lse: a score is a sum of HS products, scaled; then exp, a sum of T terms, log. Tensor cores add a bit less
    // exactly than f32: factor 4
    double worst = 0, bound = 4.0 * (sqrt((double)s.HS) + sqrt((double)s.T) + 8) * 0x1p-24 * 8;
    for (size_t i = 0; i < p->lse_count; i++) {
        double d = fabs((double)lse[i] - exact.lse[i]);
        worst = d == d ? (d > worst ? d : worst) : INFINITY;
    }
    if (!(worst <= bound)) {
        char name[128];
        problem_name(name, sizeof name, s);
        printf("FAIL %s %s lse: error %.3e, bound %.3e\n", name, who, worst, bound);
        failures++;
    }
}

typedef struct { floatX *out, *dqkv; float* lse; } HostOutputs;

static HostOutputs outputs_new(const Problem* p) {
    HostOutputs o;
    o.out = (floatX*)malloc_or_die(sizeof(floatX) * p->out_count, "outputs");
    o.dqkv = (floatX*)malloc_or_die(sizeof(floatX) * p->qkv_count, "outputs");
    o.lse = (float*)malloc_or_die(sizeof(float) * p->lse_count, "outputs");
    return o;
}
static void outputs_free(HostOutputs* o) {
    free(o->out);
    free(o->dqkv);
    free(o->lse);
}
static void outputs_fetch(HostOutputs* o, const Problem* p) {
    cuda_check(cudaStreamSynchronize(gpu.stream));
    cuda_check(cudaMemcpy(o->out, p->d_out, sizeof(floatX) * p->out_count, cudaMemcpyDeviceToHost));
    cuda_check(cudaMemcpy(o->dqkv, p->d_dqkv, sizeof(floatX) * p->qkv_count, cudaMemcpyDeviceToHost));
    cuda_check(cudaMemcpy(o->lse, p->d_lse, sizeof(float) * p->lse_count, cudaMemcpyDeviceToHost));
}
static int outputs_equal(const HostOutputs* a, const HostOutputs* b, const Problem* p) {
    return !memcmp(a->out, b->out, sizeof(floatX) * p->out_count) &&
           !memcmp(a->dqkv, b->dqkv, sizeof(floatX) * p->qkv_count) &&
           !memcmp(a->lse, b->lse, sizeof(float) * p->lse_count);
}

// run again, and through a graph, and compare bits with `first`
static void check_reproducible(Problem* p, AttentionPath path, const HostOutputs* first, const char* name) {
    HostOutputs again = outputs_new(p);
    for (int captured = 0; captured < 2; captured++) {
        problem_poison(p);
        if (captured) {
            cudaGraph_t graph;
            cudaGraphExec_t executable;
            cuda_check(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeGlobal));
            problem_run(p, path);
            cuda_check(cudaStreamEndCapture(gpu.stream, &graph));
            cuda_check(cudaGraphInstantiate(&executable, graph, 0));
            cuda_check(cudaGraphLaunch(executable, gpu.stream));
            cuda_check(cudaStreamSynchronize(gpu.stream));
            cuda_check(cudaGraphExecDestroy(executable));
            cuda_check(cudaGraphDestroy(graph));
        } else {
            problem_run(p, path);
        }
        outputs_fetch(&again, p);
        if (!outputs_equal(first, &again, p)) {
            printf("FAIL %s %s: %s differs in its bits from the first run\n", name, attention_path_names[path],
                   captured ? "a captured graph" : "a second run");
            failures++;
        }
    }
    outputs_free(&again);
}

static int shapes_passed[3];

static void check_shape(AttentionShape s) {
    Problem p = problem_new(s, 1);
    Reference exact = reference_new(&p, 0), naive = reference_new(&p, 1);
    HostOutputs got = outputs_new(&p);
    char name[128];
    problem_name(name, sizeof name, s);
    cpu_attention_forward(got.out, got.lse, p.qkv, s);
    cpu_attention_backward(got.dqkv, p.dout, got.out, p.qkv, got.lse, s);
    check_all("cpu", &p, got.out, got.lse, got.dqkv, exact, naive);
    for (int path = 0; path <= (int)cuda_attention_path(s); path++) {
        if (only_path >= 0 && path != only_path) {
            continue;
        }
        problem_poison(&p);
        problem_run(&p, (AttentionPath)path);
        outputs_fetch(&got, &p);
        int before = failures;
        check_all(attention_path_names[path], &p, got.out, got.lse, got.dqkv, exact, naive);
        check_reproducible(&p, (AttentionPath)path, &got, name);
        shapes_passed[path] += failures == before;
    }
    outputs_free(&got);
    reference_free(&exact);
    reference_free(&naive);
    problem_free(&p);
}

// prompt of 5 tokens, then one by one: against the CPU backend
static void check_cached(AttentionShape s) {
    const int prompt = 5, steps = 40, positions = prompt + steps;
    int width = (s.NH + 2 * s.NKV) * s.HS, stride = s.NKV * s.HS;
    size_t cache = (size_t)positions * stride, out_count = (size_t)positions * s.NH * s.HS;
    floatX *d_qkv = random_floats((size_t)positions * width, 3), *qkv = host_copy(d_qkv, (size_t)positions * width);
    floatX *keys = (floatX*)malloc_or_die(sizeof(floatX) * cache, "cache"),
           *values = (floatX*)malloc_or_die(sizeof(floatX) * cache, "cache");
    floatX *want = (floatX*)malloc_or_die(sizeof(floatX) * out_count, "out"),
           *got = (floatX*)malloc_or_die(sizeof(floatX) * out_count, "out");
    floatX *d_keys = (floatX*)device_alloc(sizeof(floatX) * cache),
           *d_values = (floatX*)device_alloc(sizeof(floatX) * cache);
    floatX *d_out = (floatX*)device_alloc(sizeof(floatX) * out_count);
    cuda_check(cudaMemsetAsync(d_out, 0xff, sizeof(floatX) * out_count, gpu.stream));
    for (int at = 0; at < positions; at += s.T) {
        s.T = at ? 1 : prompt;
        size_t out_at = (size_t)at * s.NH * s.HS;
        cpu_attention_cached(want + out_at, keys, values, qkv + (size_t)at * width, s, at);
        cuda_attention_cached(d_out + out_at, d_keys, d_values, d_qkv + (size_t)at * width, s, at);
    }
    cuda_check(cudaStreamSynchronize(gpu.stream));
    cuda_check(cudaMemcpy(got, d_out, sizeof(floatX) * out_count, cudaMemcpyDeviceToHost));
    double worst = 0;  // both round once: at most one unit in the last place apart, and what f32 sums differ by
    for (size_t i = 0; i < out_count; i++) {
        double a = floatX_to_f32(want[i]),
               d = fabs(a - floatX_to_f32(got[i])) / (2 * FLOATX_EPSILON * fabs(a) + 64 * 0x1p-24);
        worst = d == d ? (d > worst ? d : worst) : INFINITY;
    }
    printf("%s cached NH%d NKV%d HS%d: %.2f of the bound\n", worst <= 1 ? "ok  " : "FAIL", s.NH, s.NKV, s.HS, worst);
    failures += !(worst <= 1);
    free(qkv), free(keys), free(values), free(want), free(got);
    cuda_check(cudaFree(d_keys));
    cuda_check(cudaFree(d_values));
    cuda_check(cudaFree(d_out));
    cuda_check(cudaFree(d_qkv));
}

static void run_check(void) {
    const int lengths[] = {1, 3, 63, 64, 65, 130, 257}, sizes[] = {64, 128, 16}, groups[] = {1, 2, 4, 8};
    for (int z = 0; z < 3; z++) {
        for (int t = 0; t < 7; t++) {
            for (int g = 0; g < 4; g++) {
                AttentionShape s = {2, lengths[t], 2 * groups[g], 2, sizes[z]};
                check_shape(s);
            }
        }
    }
    AttentionShape more[] = {{1, 33, 3, 1, 6}, {1, 40, 2, 2, 256}, {1, 450, 3, 3, 64}, {1, 450, 3, 1, 128}};
    for (int i = 0; i < 4; i++) {
        check_shape(more[i]);
    }
    for (int path = 0; path < 3; path++) {
        printf("check: %d shapes pass on %s\n", shapes_passed[path], attention_path_names[path]);
    }
    AttentionShape cached[] = {{1, 0, 8, 2, 64}, {1, 0, 4, 4, 128}, {1, 0, 3, 1, 16}};
    for (int i = 0; i < 3; i++) {
        check_cached(cached[i]);
    }
}
