// attention_bench.cu: checks and times llmc/cuda/attention.cuh on a GPU, beside no other part of the trainer.
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Xcompiler -fopenmp dev/cuda/attention_bench.cu -o bench
//   ./bench [check | large | time | profile | small [plain | mma.sync | wgmma]]
// The first three without an argument; exit code 1 if a check failed.
//
// check  small shapes against an f64 loop on the CPU. FlashAttention's criterion: the error, largest and root mean
//        square, is at most twice that of a naive loop which rounds S, P, dP, dS and every output to floatX, plus
//        counted roundings. The CPU backend must meet the same. Outputs are NaN before each run; two runs, and a
//        captured graph, must give the same bits; a planted error must be found.
// large  shapes with many tiles and waves of blocks against the plain kernels, which `check` compares with f64
// time   medians of 20 over rotating buffers; lines for attention_sdpa.py, which puts PyTorch's SDPA beside them
// profile, small   each kernel once on the model shapes, for ncu; on small ones, for compute-sanitizer
#include "attention_check.h"

// ---------------------------------------------------------------------------------------------------------------------
// large: against the plain kernels, compared on the device

#define COMPARE_BLOCKS 1024

// sums (block, 2): squares of a - b, and of b. NaN stays NaN.
__global__ void compare_kernel(double* sums, const floatX* a, const floatX* b, size_t count, int width, int first,
                               int last) {
    __shared__ double shared[2][256];
    double difference = 0, square = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        int column = (int)(i % width);
        if (column >= first && column < last) {
            double x = floatX_to_f32(a[i]), y = floatX_to_f32(b[i]);
            difference += (x - y) * (x - y);
            square += y * y;
        }
    }
    shared[0][threadIdx.x] = difference;
    shared[1][threadIdx.x] = square;
    __syncthreads();
    if (threadIdx.x < 2) {
        double sum = 0;
        for (int i = 0; i < 256; i++) {
            sum += shared[threadIdx.x][i];
        }
        sums[2 * blockIdx.x + threadIdx.x] = sum;
    }
}

// |a - b| / |b|
static double relative_difference(const floatX* a, const floatX* b, size_t count, int width, int first, int last) {
    double *d_sums = (double*)device_alloc(sizeof(double) * 2 * COMPARE_BLOCKS), sums[2 * COMPARE_BLOCKS],
           total[2] = {0, 0};
    compare_kernel<<<COMPARE_BLOCKS, 256, 0, gpu.stream>>>(d_sums, a, b, count, width, first, last);
    cuda_check_launch();
    cuda_check(cudaStreamSynchronize(gpu.stream));
    cuda_check(cudaMemcpy(sums, d_sums, sizeof sums, cudaMemcpyDeviceToHost));
    cuda_check(cudaFree(d_sums));
    for (int i = 0; i < 2 * COMPARE_BLOCKS; i++) {
        total[i % 2] += sums[i];
    }
    return sqrt(total[0] / total[1]);
}

static void large_shape(AttentionShape s) {
    Problem p = problem_new(s, 0), plain = p;
    plain.d_out = (floatX*)device_alloc(sizeof(floatX) * p.out_count);
    plain.d_dqkv = (floatX*)device_alloc(sizeof(floatX) * p.qkv_count);
    plain.d_lse = (float*)device_alloc(sizeof(float) * p.lse_count);
    problem_poison(&plain);
    problem_run(&plain, ATTENTION_PLAIN);
    char name[128];
    problem_name(name, sizeof name, s);
    int width = (s.NH + 2 * s.NKV) * s.HS, k = s.NH * s.HS, v = k + s.NKV * s.HS;
    // P or dS rounded, each operand of plain exact, both outputs rounded: three roundings
    double bound = 3.0 * FLOATX_EPSILON;
    for (int path = 1; path <= (int)cuda_attention_path(s); path++) {
        if (only_path >= 0 && path != only_path) {
            continue;
        }
        problem_poison(&p);
        problem_run(&p, (AttentionPath)path);
        double e[4] = {relative_difference(p.d_out, plain.d_out, p.out_count, k, 0, k),
                       relative_difference(p.d_dqkv, plain.d_dqkv, p.qkv_count, width, 0, k),
                       relative_difference(p.d_dqkv, plain.d_dqkv, p.qkv_count, width, k, v),
                       relative_difference(p.d_dqkv, plain.d_dqkv, p.qkv_count, width, v, width)};
        int ok = e[0] <= bound && e[1] <= bound && e[2] <= bound && e[3] <= bound;
        printf("%s %s %s against plain: out %.1e dq %.1e dk %.1e dv %.1e, bound %.1e\n", ok ? "ok  " : "FAIL", name,
               attention_path_names[path], e[0], e[1], e[2], e[3], bound);
        failures += !ok;
        HostOutputs first = outputs_new(&p);
        outputs_fetch(&first, &p);
        check_reproducible(&p, (AttentionPath)path, &first, name);
        outputs_free(&first);
    }
    cuda_check(cudaFree(plain.d_out));
    cuda_check(cudaFree(plain.d_dqkv));
    cuda_check(cudaFree(plain.d_lse));
    problem_free(&p);
}

static const AttentionShape model_shapes[] = {{16, 2048, 32, 4, 64}, {4, 2048, 32, 32, 128}, {64, 512, 10, 10, 128}};

static void run_large(void) {
    AttentionShape more[] = {{3, 1000, 6, 2, 64}, {3, 1000, 6, 2, 128}, {1, 4096, 16, 2, 128}, {1, 4097, 8, 1, 64}};
    for (int i = 0; i < 4; i++) {
        large_shape(more[i]);
    }
    for (int i = 0; i < 3; i++) {
        large_shape(model_shapes[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// time

enum { TIMED_RUNS = 20, WARM_UP = 5, BUFFERS = 3 };

static int compare_floats(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

enum Timed { TIME_FORWARD, TIME_BACKWARD, TIME_DELTA, TIME_DQ, TIME_DKV, TIMED };
static const char* const timed_names[] = {"forward", "backward", "(delta)", "(dq)", "(dkv)"};

#ifndef PRECISION_FP32
template <int HS>
static void run_part(Problem* p, AttentionPath path, int what) {
    int T_padded = (int)round_up(p->s.T, STATISTICS_ROWS);
    BackwardStatistics statistics = {cuda_attention.scratch,
                                     cuda_attention.scratch + (size_t)p->s.B * p->s.NH * T_padded, T_padded};
    if (what == TIME_DELTA) {
        attention_delta<HS>(cuda_attention.scratch, p->d_dout, p->d_out, p->d_lse, p->s);
    } else if (path == ATTENTION_WGMMA) {
        what == TIME_DQ ? attention_backward_wgmma<HS, PASS_DQ>(p->d_dqkv, p->d_dout, p->d_qkv, statistics, p->s,
                                                                cuda_attention.encode)
                        : attention_backward_wgmma<HS, PASS_DKV>(p->d_dqkv, p->d_dout, p->d_qkv, statistics, p->s,
                                                                 cuda_attention.encode);
    } else {
        what == TIME_DQ ? attention_backward_mma<HS, PASS_DQ>(p->d_dqkv, p->d_dout, p->d_qkv, statistics, p->s)
                        : attention_backward_mma<HS, PASS_DKV>(p->d_dqkv, p->d_dout, p->d_qkv, statistics, p->s);
    }
}
#endif

static void run_timed(Problem* p, AttentionPath path, int what) {
    if (what == TIME_FORWARD) {
        attention_forward_on(path, p->d_out, p->d_lse, p->d_qkv, p->s);
    } else if (what == TIME_BACKWARD) {
        attention_backward_on(path, p->d_dqkv, p->d_dout, p->d_out, p->d_qkv, p->d_lse, p->s);
    } else {
#ifndef PRECISION_FP32
        p->s.HS == 64 ? run_part<64>(p, path, what) : run_part<128>(p, path, what);
#endif
    }
}

static void time_shape(AttentionShape s, AttentionPath path) {
    Problem p[BUFFERS];
    for (int i = 0; i < BUFFERS; i++) {
        p[i] = problem_new(s, 0);
    }
    char name[128];
    problem_name(name, sizeof name, s);
    double forward_flop = 4.0 * s.B * s.NH * (double)s.T * s.T * s.HS / 2;
    const double flop[TIMED] = {forward_flop, 2.5 * forward_flop, 0, 1.5 * forward_flop,
                                2 * forward_flop};  // parts: what they compute
    cudaEvent_t begin[TIMED_RUNS], end[TIMED_RUNS];
    for (int i = 0; i < TIMED_RUNS; i++) {
        cuda_check(cudaEventCreate(&begin[i]));
        cuda_check(cudaEventCreate(&end[i]));
    }
    for (int what = 0; what < TIMED; what++) {
        for (int i = -WARM_UP; i < TIMED_RUNS; i++) {
            if (i >= 0) {
                cuda_check(cudaEventRecord(begin[i], gpu.stream));
            }
            run_timed(&p[(i + WARM_UP) % BUFFERS], path, what);
            if (i >= 0) {
                cuda_check(cudaEventRecord(end[i], gpu.stream));
            }
        }
        cuda_check(cudaStreamSynchronize(gpu.stream));
        float ms[TIMED_RUNS];
        for (int i = 0; i < TIMED_RUNS; i++) {
            cuda_check(cudaEventElapsedTime(&ms[i], begin[i], end[i]));
        }
        qsort(ms, TIMED_RUNS, sizeof(float), compare_floats);
        float median = ms[TIMED_RUNS / 2];
        printf("time %-8s %-28s %-9s %8.4f ms %7.1f TFLOP/s\n", attention_path_names[path], name, timed_names[what],
               median, flop[what] / median * 1e-9);
    }
    for (int i = 0; i < TIMED_RUNS; i++) {
        cuda_check(cudaEventDestroy(begin[i]));
        cuda_check(cudaEventDestroy(end[i]));
    }
    for (int i = 0; i < BUFFERS; i++) {
        problem_free(&p[i]);
    }
}

static void run_time(void) {
    for (int i = 0; i < 3; i++) {
        for (int path = (int)cuda_attention_path(model_shapes[i]); path > 0; path--) {
            if (only_path < 0 || path == only_path) {
                time_shape(model_shapes[i], (AttentionPath)path);
            }
        }
    }
}

// each kernel once on those shapes, on every implementation or the one named: for ncu and compute-sanitizer
static void run_once(const AttentionShape* shapes, int count) {
    for (int i = 0; i < count; i++) {
        Problem p = problem_new(shapes[i], 0);
        for (int path = 0; path <= (int)cuda_attention_path(shapes[i]); path++) {
            if (only_path < 0 || path == only_path) {
                problem_run(&p, (AttentionPath)path);
            }
        }
        cuda_check(cudaStreamSynchronize(gpu.stream));
        problem_free(&p);
    }
}

static const AttentionShape small_shapes[] = {
    {2, 257, 4, 2, 64}, {1, 130, 2, 1, 16}, {8, 600, 6, 6, 128}, {8, 600, 8, 4, 64}};

int main(int argc, char** argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char* what = argc > 1 ? argv[1] : "";
    for (int path = 0; argc > 2 && path < 3; path++) {
        only_path = !strcmp(argv[2], attention_path_names[path]) ? path : only_path;
    }
    check(argc <= 2 || only_path >= 0, "no implementation is called '%s'", argv[2]);
    cudaDeviceProp properties;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("skip: no GPU\n");
        return 0;
    }
    cuda_check(cudaSetDevice(0));
    cuda_check(cudaGetDeviceProperties(&properties, 0));
    cuda_check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    gpu.sm_count = properties.multiProcessorCount;
    gpu.major = properties.major;
    gpu.minor = properties.minor;
    cuda_attention_init(device_alloc((size_t)64 << 20));
    printf("%s, %s, %d SMs, %s for head size 128\n", properties.name, FLOATX_NAME, gpu.sm_count,
           attention_path_names[cuda_attention_path(model_shapes[1])]);
    if (!*what || !strcmp(what, "check")) {
        run_check();
    }
    if (!*what || !strcmp(what, "large")) {
        run_large();
    }
    if (!*what || !strcmp(what, "time")) {
        run_time();
    }
    if (!strcmp(what, "profile")) {
        run_once(model_shapes, 3);
    }
    if (!strcmp(what, "small")) {
        run_once(small_shapes, 4);
    }
    printf("%d failed\n", failures);
    return failures > 0;
}
