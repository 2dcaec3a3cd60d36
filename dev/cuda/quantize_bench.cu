// quantize_bench.cu: checks and times llmc/cuda/quantize.cuh on a GPU, beside no other part of the trainer.
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Xcompiler "-O3 -march=native -fopenmp -ffp-contract=off"
//        dev/cuda/quantize_bench.cu -o quantize_bench
//   ./quantize_bench [host | check | bench | small]
// The first three without an argument; exit code 1 if a check failed. -DPRECISION_FP32 checks the other build.
//
// host, check   see quantize_check.h; check also makes the operands of the FP4 carrier, see quantize_fp4_check.h
// bench         medians of 20 over rotating buffers on the linear layers of tinyllama-1.1b and llama2-7b, each whole
//               call (both launches); bytes are the fewest that the operation must move, and the share is that of a
//               device-to-device copy of 2 GiB in the same run. After each line, the same operation launched otherwise:
//               "direct" reads nothing ahead, "apart" keeps the second launch from overlapping the first
// small         each kernel once, for compute-sanitizer
#include "quantize_check.h"
#include "quantize_fp4_check.h"

// ---------------------------------------------------------------------------------------------------------------------
// check

static void upload_tensor(Bench* b, size_t count) {
    cuda_check(cudaMemcpy(b->d_tensor, b->tensor, count * sizeof(floatX), cudaMemcpyHostToDevice));
}

static void upload_saved(Bench* b, int rows, int cols) {
    size_t count = (size_t)rows * cols;
    b->d_saved.rows = rows;
    b->d_saved.cols = cols;
    cuda_check(cudaMemcpy(b->d_saved.codes, b->saved.codes, count / 2, cudaMemcpyHostToDevice));
    cuda_check(cudaMemcpy(b->d_saved.scales, b->saved.scales, count / 32, cudaMemcpyHostToDevice));
}

// operand (rows, cols) of every case that reads floatX
static void check_tensor(Bench* b, int rows, int cols, Distribution d, int count_of_cases, int stats) {
    size_t count = (size_t)rows * cols;
    for (int c = 0; c < count_of_cases; c++) {
        if (cases[c].source == SOURCE_TENSOR) {
            fill(b->tensor, count, cases[c].transposed ? rows : cols, d, (uint64_t)(rows * 7 + cols));
            upload_tensor(b, count);
            check_case(b, &cases[c], rows, cols, distribution_names[d], stats && d <= OCTAVES);
            check_fp4(b, &cases[c], rows, cols, distribution_names[d]);
        }
    }
}

// of every case that reads packed codes: of a quantized tensor, or, distribution < 0, of any
static void check_saved(Bench* b, int rows, int cols, int distribution, int spread, int stats) {
    char input[64];
    b->saved.rows = cols;
    b->saved.cols = rows;
    if (distribution >= 0) {
        fill(b->tensor, (size_t)rows * cols, rows, (Distribution)distribution, (uint64_t)(rows * 5 + cols));
        QuantizeArgs args = case_args(&cases[0], ROUND_NEAREST, &b->saved, b->tensor, NULL, NULL);
        cpu_quantize(&args);
        snprintf(input, sizeof input, "%s", distribution_names[distribution]);
    } else {
        fill_packed(&b->saved, spread == 13 ? 80 : -3, spread, (uint64_t)(rows + cols));
        snprintf(input, sizeof input, "scales within %d octaves", spread);
    }
    upload_saved(b, cols, rows);
    for (int c = 0; c < CASES; c++) {
        if (cases[c].source == SOURCE_SAVED) {
            check_case(b, &cases[c], rows, cols, input, stats && distribution == NORMAL);
            check_fp4(b, &cases[c], rows, cols, input);
        }
    }
}

// x = H (mask * (row_scale * x)) of floatX or f32 values, against the CPU's on scaled f32 values
static void check_unrotate(Bench* b, int rows, int cols, RealType type, int with_mask, int with_scale) {
    size_t count = (size_t)rows * cols;
    float* want = (float*)malloc_or_die(count * sizeof(float), "values");
    uint32_t* mask = b->out.mask;
    RealArray x = {type, b->operand}, d_x = {type, b->d_operand}, in_f32 = {REAL_F32, want};
    for (int row = 0; row < rows; row++) {
        b->row_scale[row] = with_scale ? ldexpf(1.0f, row % 40 - 30) : 1.0f;
    }
    for (size_t i = 0; i < count; i++) {
        real_set(x, i, draw(NORMAL, i, cols, 5));
        want[i] = real_get(x, i);
        mask[i / 32] = (uint32_t)mix(i / 32);
    }
    cuda_check(cudaMemcpy(b->d_operand, b->operand, count * real_bytes(type), cudaMemcpyHostToDevice));
    cuda_check(cudaMemcpy(b->d_out.mask, mask, count / 8, cudaMemcpyHostToDevice));
    cuda_check(cudaMemcpy(b->d_row_scale, b->row_scale, sizeof(float) * (size_t)rows, cudaMemcpyHostToDevice));
    cuda_unrotate(d_x, with_mask ? b->d_out.mask : NULL, with_scale ? b->d_row_scale : NULL, rows, cols);
    cpu_unrotate(in_f32, with_mask ? mask : NULL, with_scale ? b->row_scale : NULL, rows, cols);
    for (size_t i = 0; i < count; i++) {
        real_set(x, i, want[i]);
    }
    memcpy(want, b->operand, count * real_bytes(type));
    fetch(b->operand, b->d_operand, count * real_bytes(type));
    int64_t wrong = differing(want, b->operand, count * real_bytes(type));
    report(wrong == 0, "unrotate (%d, %d) type %d mask %d scale %d: %lld bytes differ", rows, cols, (int)type,
           with_mask, with_scale, (long long)wrong);
    free(want);
}

// every comparator must see a planted error
static void check_planted(void) {
    uint8_t a[64], b[64];
    floatX x[4] = {f32_to_floatX(1.0f), f32_to_floatX(0.0f), f32_to_floatX(NAN), f32_to_floatX(-2.0f)}, y[4];
    memset(a, 3, sizeof a);
    memcpy(b, a, sizeof b);
    memcpy(y, x, sizeof y);
    report(differing(a, b, 64) == 0 && differing_bytes(a, b, 64, 1) == 0 && differing_values(x, y, 4) == 0, "equal");
    b[40] ^= 4;
    y[1] = f32_to_floatX(-0.0f);
    report(differing(a, b, 64) == 1 && differing_bytes(a, b, 64, 0) == 1 && differing_values(x, y, 4) == 1,
           "a planted error is not seen");
    a[40] = 0, b[40] = 0x80;
    report(differing_bytes(a, b, 64, 1) == 1 && differing_bytes(a, b, 64, 0) == 0, "the sign of a zero");
}

static void run_check(void) {
    const int rows[] = {1, 33, 104, 257}, cols[] = {32, 96, 2048, 5632, 11264}, saved_rows[] = {32, 96, 160, 288};
    Bench b = bench_new();
    check_planted();
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 5; j++) {
            int light = cols[j] > 2048;  // the long shapes: the operands of training only, and fewer inputs
            for (int d = 0; d < DISTRIBUTIONS; d++) {
                if (!light || d == NORMAL || d == GROUP_OCTAVES || d == FAULTS) {
                    check_tensor(&b, rows[i], cols[j], (Distribution)d, light ? (int)PATH_CASES : (int)CASES, !light);
                    check_saved(&b, saved_rows[i], cols[j], d, 0, !light);
                }
            }
            for (int spread = 0; spread < 20; spread += spread == 4 ? 8 : 1) {
                if (spread <= 1 || spread == 4 || (spread >= 12 && spread < 15)) {
                    check_saved(&b, saved_rows[i], cols[j], -1, spread, 0);
                }
            }
            check_saved(&b, saved_rows[i], cols[j], -1, 255, 0);
            for (int k = 0; k < 8; k++) {
                check_unrotate(&b, rows[i], cols[j], k & 1 ? REAL_F32 : REAL_FLOATX, k & 2, k & 4);
            }
        }
        printf("check: %d rows, %d checks, %d failed\n", rows[i], checks, failures);
    }
    for (int j = 0; j < 4; j++) {  // dy: every way to share rows, up to those that are computed twice
        const int wide[] = {4096, 22016, 28672, 57344};
        for (int d = 0; d < DISTRIBUTIONS; d += 2) {
            check_tensor(&b, 5, wide[j], (Distribution)d, PATH_CASES, 0);
        }
    }
    for (int other = LAUNCH_DEFAULT; other < LAUNCHES; other++) {  // few blocks, which walk over many tiles
        const int some_rows[] = {33, 5, 200, 104}, some_cols[] = {96, 22016, 5632, 2048};
        const int multiprocessors = gpu.sm_count;
        launch = (Launch)other;
        gpu.sm_count = 1;
        for (int i = 0; i < 4; i++) {
            for (int d = 0; d < DISTRIBUTIONS; d++) {
                check_tensor(&b, some_rows[i], some_cols[i], (Distribution)d, i == 1 ? (int)PATH_CASES : (int)CASES, 0);
                check_saved(&b, (some_rows[i] + 31) / 32 * 32, some_cols[i], d, 0, 0);
            }
        }
        gpu.sm_count = multiprocessors;
        printf("check: launch \"%s\", %d checks, %d failed\n", launch_names[launch], checks, failures);
    }
    launch = LAUNCH_DEFAULT;
}

// ---------------------------------------------------------------------------------------------------------------------
// bench

enum { TIMED_RUNS = 20, WARM_UP = 3, MAX_BUFFERS = 8 };

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

// what one operand of the bench needs, once for each of the buffers that are used in turn
typedef struct {
    int buffers;
    floatX* tensor[MAX_BUFFERS];
    QTensor saved[MAX_BUFFERS], out[MAX_BUFFERS];
} Timed;

static double copy_rate;

static double median_ms(void (*run)(void* state, int buffer), void* state, int buffers) {
    cudaEvent_t begin[TIMED_RUNS], end[TIMED_RUNS];
    float ms[TIMED_RUNS];
    for (int i = 0; i < TIMED_RUNS; i++) {
        cuda_check(cudaEventCreate(&begin[i]));
        cuda_check(cudaEventCreate(&end[i]));
    }
    for (int i = -WARM_UP * buffers; i < TIMED_RUNS; i++) {
        if (i >= 0) {
            cuda_check(cudaEventRecord(begin[i], gpu.stream));
        }
        run(state, (i + WARM_UP * buffers) % buffers);
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

static void run_copy(void* state, int) {
    cuda_check(cudaMemcpyAsync((char*)state + ((size_t)2 << 30), state, (size_t)2 << 30, cudaMemcpyDeviceToDevice,
                               gpu.stream));
}

typedef struct { const Case* c; Rounding rounding; Timed* timed; uint64_t* position; } TimedCase;

static void run_case(void* state, int buffer) {
    TimedCase* t = (TimedCase*)state;
    QuantizeArgs args = case_args(t->c, t->rounding, &t->timed->out[buffer], t->timed->tensor[buffer],
                                  &t->timed->saved[buffer], t->position);
    quantize(&args);
}

typedef struct { RealType type; void* x[MAX_BUFFERS]; uint32_t* mask; float* scale; int rows, cols; } TimedUnrotate;

static void run_unrotate(void* state, int buffer) {
    TimedUnrotate* t = (TimedUnrotate*)state;
    cuda_unrotate(RealArray{t->type, t->x[buffer]}, t->mask, t->scale, t->rows, t->cols);
}

static void print_time(const char* name, int rows, int cols, const char* rounding, double ms, double bytes) {
    double rate = (double)rows * cols * bytes / (ms * 1e-3);
    printf("time %-8s (%6d, %6d) %-4s %8.4f ms %7.0f GB/s %5.1f %% of copy  %s\n", name, rows, cols, rounding, ms,
           rate * 1e-9, 100.0 * rate / copy_rate, launch_names[launch]);
}

// does the launch differ from the default's for this case?
static int launch_differs(const Case* c, Launch other) {
    return other == LAUNCH_DIRECT ? c->source == SOURCE_TENSOR && SOURCE_STAGES > 1
                                  : other == LAUNCH_APART ? !c->row_base : 1;
}

// enough buffers that their sum is several times the L2
static int buffers_for(size_t bytes) {
    size_t n = ((size_t)512 << 20) / bytes + 1;
    return n > MAX_BUFFERS ? (int)MAX_BUFFERS : (int)n;
}

static QTensor packed_new(int rows, int cols, int mask) {
    QTensor q = operand_new(32, 32);
    size_t count = (size_t)rows * cols;
    free(q.mask);
    q.rows = rows, q.cols = cols;
    q.codes = (uint8_t*)device_alloc(count / 2);
    q.scales = (uint8_t*)device_alloc(count / GROUP);
    q.mask = mask ? (uint32_t*)device_alloc(count / 8) : NULL;
    return q;
}

static void packed_free(QTensor* q) {
    cuda_check(cudaFree(q->codes));
    cuda_check(cudaFree(q->scales));
    cuda_check(cudaFree(q->mask));
}

// kind: the row of `cases`; name: the operand
static void time_case(int kind, const char* name, int rows, int cols) {
    const Case* c = &cases[kind];
    size_t count = (size_t)rows * cols;
    Timed t;
    int saved = c->source == SOURCE_SAVED;
    uint64_t* position = (uint64_t*)device_alloc(8);
    CarrierBase* bases = (CarrierBase*)device_alloc(sizeof(CarrierBase) * MAX_BUFFERS);
    cuda_check(cudaMemset(position, 0, 8));
    cuda_check(cudaMemset(bases, 0, sizeof(CarrierBase) * MAX_BUFFERS));
    memset(&t, 0, sizeof t);
    t.buffers = buffers_for(count * (saved ? 1 : 3));
    for (int i = 0; i < t.buffers; i++) {
        t.tensor[i] = (floatX*)device_alloc(count * sizeof(floatX));
        random_kernel<<<1024, 256, 0, gpu.stream>>>(t.tensor[i], count, (uint64_t)i);
        if (saved) {
            t.saved[i] = packed_new(cols, rows, 1);
            QuantizeArgs args = case_args(&cases[0], ROUND_NEAREST, &t.saved[i], t.tensor[i], NULL, NULL);
            cuda_quantize(&args);
            cuda_check(cudaStreamSynchronize(gpu.stream));
            cuda_check(cudaFree(t.tensor[i]));
        }
        t.out[i] = kind == 0 ? packed_new(rows, cols, 1) : operand_new(32, 32);
        if (kind != 0) {
            free(t.out[i].mask);
            t.out[i].rows = rows, t.out[i].cols = cols;
            t.out[i].codes = NULL, t.out[i].scales = NULL, t.out[i].mask = NULL;
        }
        t.out[i].carrier = c->carrier;
        t.out[i].operand = device_alloc(count);
        t.out[i].base = c->row_base ? NULL : bases + i;
        t.out[i].row_scale = c->row_base ? (float*)device_alloc(sizeof(float) * (size_t)rows) : NULL;
    }
    double bytes = saved ? 1.53125 : kind == 0 ? 3.65625 : 3.0;
    for (int round = 0; round < (c->scale == SCALE_QUEST ? 1 : 2); round++) {
        TimedCase state = {c, (Rounding)round, &t, position};
        for (int use = 0; use < 2; use++) {  // the second time with the right base, as in training
            for (int i = 0; i < t.buffers; i++) {
                run_case(&state, i);
            }
            Carrier carrier = carrier_of(c->carrier);
            carrier_bases_advance(bases, MAX_BUFFERS, &carrier);
        }
        for (int other = LAUNCH_DEFAULT; other < LAUNCHES; other++) {
            launch = (Launch)other;
            if (launch_differs(c, launch)) {
                print_time(name, rows, cols, round ? "sr" : "rtn", median_ms(run_case, &state, t.buffers), bytes);
            }
        }
        launch = LAUNCH_DEFAULT;
    }
    for (int i = 0; i < t.buffers; i++) {
        if (saved) {
            packed_free(&t.saved[i]);
        } else {
            cuda_check(cudaFree(t.tensor[i]));
        }
        packed_free(&t.out[i]);
        cuda_check(cudaFree(t.out[i].operand));
        cuda_check(cudaFree(t.out[i].row_scale));
    }
    cuda_check(cudaFree(position));
    cuda_check(cudaFree(bases));
}

static void time_unrotate(RealType type, int rows, int cols) {
    size_t count = (size_t)rows * cols;
    TimedUnrotate t = {type, {NULL}, (uint32_t*)device_alloc(count / 8), NULL, rows, cols};
    int buffers = buffers_for(count * real_bytes(type));
    t.scale = type == REAL_F32 ? NULL : (float*)device_alloc(sizeof(float) * (size_t)rows);
    cuda_check(cudaMemset(t.mask, 0xf3, count / 8));
    if (t.scale) {
        cuda_check(cudaMemset(t.scale, 0x3f, sizeof(float) * (size_t)rows));
    }
    for (int i = 0; i < buffers; i++) {
        t.x[i] = device_alloc(count * real_bytes(type));
        random_kernel<<<1024, 256, 0, gpu.stream>>>((floatX*)t.x[i], count * real_bytes(type) / sizeof(floatX), 9);
    }
    double ms = median_ms(run_unrotate, &t, buffers);
    print_time("unrotate", rows, cols, type == REAL_F32 ? "f32" : "X", ms, 2.0 * (double)real_bytes(type) + 0.125);
    for (int i = 0; i < buffers; i++) {
        cuda_check(cudaFree(t.x[i]));
    }
    cuda_check(cudaFree(t.mask));
    cuda_check(cudaFree(t.scale));
}

static void run_bench(void) {
    void* memory = device_alloc((size_t)4 << 30);
    cuda_check(cudaMemset(memory, 1, (size_t)4 << 30));
    copy_rate = 4.0 * 1073741824.0 / (median_ms(run_copy, memory, 1) * 1e-3);
    cuda_check(cudaFree(memory));
    printf("copy %.0f GB/s\n", copy_rate * 1e-9);
    const struct { int BT, C, OC; } linears[] = {{32768, 2048, 2560}, {32768, 2048, 11264}, {32768, 5632, 2048},
                                                 {16384, 4096, 4096}, {16384, 4096, 22016}, {16384, 11008, 4096}};
    for (int i = 0; i < 6; i++) {
        int BT = linears[i].BT, C = linears[i].C, OC = linears[i].OC;
        time_case(0, "x", BT, C);
        time_case(0, "w", OC, C);
        time_case(1, "dy", BT, OC);
        time_case(2, "dyt", OC, BT);
        time_case(3, "wt", C, OC);
        time_case(3, "xt", C, BT);
        time_unrotate(REAL_FLOATX, BT, C);
        time_unrotate(REAL_F32, OC, C);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// each kernel once: for compute-sanitizer
static void run_small(void) {
    Bench b = bench_new();
    check_tensor(&b, 33, 96, NORMAL, CASES, 1);
    check_tensor(&b, 40, 160, GROUP_OCTAVES, CASES, 0);
    check_tensor(&b, 2, 57344, NORMAL, 2, 0);
    check_saved(&b, 160, 96, NORMAL, 0, 1);
    check_saved(&b, 160, 96, -1, 255, 0);
    check_unrotate(&b, 33, 96, REAL_FLOATX, 1, 1);
    check_unrotate(&b, 33, 96, REAL_F32, 1, 0);
}

int main(int argc, char** argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char* what = argc > 1 ? argv[1] : "";
    if (!*what || !strcmp(what, "host")) {
        run_host();
        printf("host: %d checks, %d failed\n", checks, failures);
    }
    cudaDeviceProp properties;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("skip: no GPU\n");
        return failures > 0;
    }
    cuda_check(cudaSetDevice(0));
    cuda_check(cudaGetDeviceProperties(&properties, 0));
    cuda_check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    gpu.sm_count = properties.multiProcessorCount;
    gpu.major = properties.major;
    gpu.minor = properties.minor;
    printf("%s, %s, %d SMs\n", properties.name, FLOATX_NAME, gpu.sm_count);
    if (!*what || !strcmp(what, "check")) {
        double begin = clock_seconds();
        run_check();
        printf("check: %d checks, %d failed, %.0f s\n", checks, failures, clock_seconds() - begin);
    }
    if (!strcmp(what, "small")) {
        run_small();
    }
    if (!*what || !strcmp(what, "bench")) {
        run_bench();
    }
    printf("%d failed\n", failures);
    return failures > 0;
}
