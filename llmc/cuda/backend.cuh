// cuda/backend.cuh: the CUDA device and its table of operations.
#pragma once
#include "attention.cuh"
#include "classifier.cuh"
#include "common.cuh"
#include "elementwise.cuh"
#include "embedding.cuh"
#include "fused_backward.cuh"
#include "gemm.cuh"
#include "optimizer.cuh"
#include "quantize_fp4.cuh"
#include "quantize_fp8.cuh"
#include "rmsnorm.cuh"

// How many GPUs the driver shows; 0 where there is none or no driver
static int cuda_device_count(void) {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// Dense bf16 tensor-core peaks with f32 accumulation in TFLOP/s, from the vendor's datasheets, by a part of the
// device's name. The longer names stand first.
static const struct { const char* name; double tflops;
} GPU_PEAKS[] = {
    {"H100 PCIe", 756}, {"H100 NVL", 835},   {"H100", 989},         {"H200", 989},       {"GH200", 989},
    {"H20", 148},       {"B200", 2250},      {"B300", 2250},        {"GB200", 2250},     {"A100", 312},
    {"A800", 312},      {"A40", 150},        {"A10", 125},          {"L40S", 362},       {"L40", 181},
    {"L4", 121},        {"RTX 5090", 209.5}, {"RTX 5080", 112.6},   {"RTX 4090", 165.2}, {"RTX 4080", 97.5},
    {"RTX 3090", 71},   {"RTX A6000", 155},  {"RTX 6000 Ada", 364},
};

static double cuda_gemm_rate(void);
static double cuda_peak_flops(void) {
    static double measured;
    for (size_t i = 0; i < sizeof GPU_PEAKS / sizeof GPU_PEAKS[0]; i++) {
        if (strstr(gpu.name, GPU_PEAKS[i].name)) {
            return GPU_PEAKS[i].tflops * 1e12;
        }
    }
    measured = measured > 0 ? measured : cuda_gemm_rate();
    return measured;
}

static size_t cuda_available_bytes(void) {
    size_t available = 0, total = 0;
    cuda_check(cudaMemGetInfo(&available, &total));
    return available;
}

static size_t cuda_used_bytes(void) {
    size_t available = 0, total = 0;
    cuda_check(cudaMemGetInfo(&available, &total));
    return total - available;
}

static void* cuda_alloc(size_t bytes, const char* what) {
    void* memory = NULL;
    cudaError_t error = cudaMalloc(&memory, bytes ? bytes : 1);
    if (error == cudaErrorMemoryAllocation) {
        size_t available = 0, total = 0;
        cudaMemGetInfo(&available, &total);
        die(EXIT_NO_MEMORY,
            "out of GPU memory: %.0f MiB for %s, %.0f of %.0f MiB are free; a smaller --batch-size needs less, --plan "
            "shows "
            "what takes it",
            (double)bytes / 1048576.0, what, (double)available / 1048576.0, (double)total / 1048576.0);
    }
    cuda_check(error);
    cuda_check(cudaMemsetAsync(memory, 0, bytes, gpu.stream));
    return memory;
}

static void* cuda_alloc_host(size_t bytes, const char* what) {
    void* memory = NULL;
    cudaError_t error = cudaMallocHost(&memory, bytes ? bytes : 1);
    check_or(error != cudaErrorMemoryAllocation, EXIT_NO_MEMORY, "out of page-locked memory: %.1f MiB for %s",
             (double)bytes / 1048576.0, what);
    cuda_check(error);
    return memory;
}
static void cuda_release_host(void* memory) { cuda_check(cudaFreeHost(memory)); }

static void cuda_release(void* memory) { cuda_check(cudaFree(memory)); }
static void cuda_zero(void* memory, size_t bytes) { cuda_check(cudaMemsetAsync(memory, 0, bytes, gpu.stream)); }
static void cuda_copy_to_device(void* device, const void* host, size_t bytes) {
    cuda_check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, gpu.stream));
}
static void cuda_copy_to_host(void* host, const void* device, size_t bytes) {
    cuda_check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
}
static const Carrier* cuda_carrier(void) { return gpu.carrier; }
static void cuda_carrier_begin(CarrierBase* bases, int count) {
    if (gpu.carrier) {
        carrier_bases_advance(bases, count, gpu.carrier);
    }
}
static void cuda_synchronize(void) { cuda_check(cudaStreamSynchronize(gpu.stream)); }

static void cuda_snapshot_copy(void* host, const void* device, size_t bytes) {
    cuda_check(cudaEventRecord(gpu.snapshot_begin, gpu.stream));
    cuda_check(cudaStreamWaitEvent(gpu.snapshot_stream, gpu.snapshot_begin, 0));
    cuda_check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, gpu.snapshot_stream));
    cuda_check(cudaEventRecord(gpu.snapshot_end, gpu.snapshot_stream));
}
static void cuda_snapshot_fence(void) { cuda_check(cudaStreamWaitEvent(gpu.stream, gpu.snapshot_end, 0)); }
static void cuda_snapshot_wait(void) {
    cuda_check(cudaSetDevice(gpu.device));  // a new thread begins with device 0
    cuda_check(cudaEventSynchronize(gpu.snapshot_end));
}

static size_t cuda_scratch_bytes(OperandSizes largest, AttentionShape shape, int threads) {
    (void)largest;
    (void)threads;
    size_t sort = (size_t)shape.B * shape.T * 3 * sizeof(int32_t) + ((size_t)shape.B * shape.T * 8 + ((size_t)1 << 20));
    return GEMM_WORKSPACE + CUDA_PARTIALS * sizeof(float) + cuda_attention_scratch_bytes(shape) + sort;
}
// measured on an H200 with driver 580: the context, cuBLASLt's kernels and this program's
static size_t cuda_program_bytes(int threads) {
    (void)threads;
    return (size_t)600 << 20;
}

// scratch of attention for a model's shape, before the first step; it only grows
static void cuda_reserve(AttentionShape shape) {
    static void* scratch;
    static size_t reserved;
    size_t bytes = cuda_attention_scratch_bytes(shape);
    embedding_sort_reserve(shape.B * shape.T);
    if (bytes > reserved) {
        cuda_release(scratch);
        scratch = cuda_alloc(bytes, "attention scratch");
        reserved = bytes;
        cuda_attention_init(scratch);
    }
}

__global__ void bench_fill_kernel(floatX* out, size_t n) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        out[i] = to_floatX((float)(philox(1, i, 0).w[0] >> 8) * 0x1p-24f - 0.5f);
    }
}

// 8192^3 on random data, as the library multiplies in the precision of the build
static double cuda_gemm_rate(void) {
    const int n = 8192;
    size_t count = (size_t)n * n;
    floatX* memory = (floatX*)cuda_alloc(3 * count * sizeof(floatX), "a matrix product");
    bench_fill_kernel<<<4 * gpu.sm_count, 256, 0, gpu.stream>>>(memory, 2 * count);
    QTensor a = qtensor_view(memory, n, n, 0), b = qtensor_view(memory + count, n, n, 0);
    GemmArgs args = {
        .out = real_floatX(memory + 2 * count), .accumulate = 0, .a = &a, .b = &b, .alpha = 1.0f};
    double seconds = gemm_plan(&args)->seconds;
    cuda_release(memory);
    return 2.0 * n * n * n / seconds;
}

// a device-to-device copy of 2 GiB, the best of five
static double cuda_copy_rate(void) {
    const size_t bytes = (size_t)2 << 30;
    char* memory = (char*)cuda_alloc(2 * bytes, "copy");
    double best = 1e30;
    for (int i = 0; i < 5; i++) {
        cuda_synchronize();
        double begin = clock_seconds();
        cuda_check(cudaMemcpyAsync(memory, memory + bytes, bytes, cudaMemcpyDeviceToDevice, gpu.stream));
        cuda_synchronize();
        double seconds = clock_seconds() - begin;
        best = seconds < best ? seconds : best;
    }
    cuda_release(memory);
    return 2.0 * (double)bytes / best;
}

static void cuda_describe(char* buffer, size_t bytes) {
    snprintf(buffer, bytes, "GPU %d, %s, %.0f GiB", gpu.device, gpu.name, (double)gpu.memory_bytes / 1073741824.0);
}

// the PCI address
static void cuda_identify(char* buffer, size_t bytes) {
    cuda_check(cudaDeviceGetPCIBusId(buffer, (int)bytes, gpu.device));
}

// Work is issued as it is the first time, which makes plans of matrix products and grows scratch; the second time it is
// recorded into a graph; from then on the graph is launched.
#define GRAPH_IDS 4
typedef struct { int issued; cudaGraphExec_t graph; } RecordedWork;
static RecordedWork recorded_work[GRAPH_IDS];

static void cuda_replay(int id, void (*work)(void* argument), void* argument) {
    check(id >= 0 && id < GRAPH_IDS, "internal: no recorded work %d", id);
    RecordedWork* recorded = &recorded_work[id];
    if (!recorded->issued) {
        recorded->issued = 1;
        work(argument);
        return;
    }
    if (!recorded->graph) {
        cudaGraph_t graph;
        cuda_check(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal));
        work(argument);
        cuda_check(cudaStreamEndCapture(gpu.stream, &graph));
        cuda_check(cudaGraphInstantiate(&recorded->graph, graph, 0));
        cuda_check(cudaGraphDestroy(graph));
    }
    cuda_check(cudaGraphLaunch(recorded->graph, gpu.stream));
}

// MXFP4 or 8 bits
static int cuda_supports_any(const QuantSpec* spec) {
    return cuda_quantize_supports(spec) ||
           (cuda_fp8_supports(spec) && sizeof(floatX) == 2 &&
            (gpu.major == 0 || gpu.major > 8 || (gpu.major == 8 && gpu.minor == 9)));  // 0: not asked yet
}
static void cuda_quantize_any(const QuantizeArgs* args) {
    if (args->spec.format == FORMAT_MXFP4) {
        cuda_quantize_mxfp4(args);
    } else {
        cuda_quantize_fp8(args);
    }
}

static const Ops CUDA_OPS = {
    .name = "cuda",
    .alloc = cuda_alloc,
    .release = cuda_release,
    .alloc_host = cuda_alloc_host,
    .release_host = cuda_release_host,
    .zero = cuda_zero,
    .copy_to_device = cuda_copy_to_device,
    .copy_to_host = cuda_copy_to_host,
    .synchronize = cuda_synchronize,
    .snapshot_copy = cuda_snapshot_copy,
    .snapshot_fence = cuda_snapshot_fence,
    .snapshot_wait = cuda_snapshot_wait,
    .reserve = cuda_reserve,
    .scratch_bytes = cuda_scratch_bytes,
    .program_bytes = cuda_program_bytes,
    .classifier_bytes = (size_t)512 << 20,
    .peak_flops = cuda_peak_flops,
    .available_bytes = cuda_available_bytes,
    .used_bytes = cuda_used_bytes,
    .micro_tokens = 32768,
    .replay = cuda_replay,
    .describe = cuda_describe,
    .shares_memory = 0,
    .identify = cuda_identify,
    .gemm_rate = cuda_gemm_rate,
    .copy_rate = cuda_copy_rate,
    .embedding_forward = cuda_embedding_forward,
    .embedding_backward = cuda_embedding_backward,
    .rmsnorm_forward = cuda_rmsnorm_forward,
    .add_rmsnorm_forward = cuda_add_rmsnorm_forward,
    .rmsnorm_backward = cuda_rmsnorm_backward,
    .add = cuda_add,
    .rope = cuda_rope,
    .attention_forward = cuda_attention_forward,
    .attention_backward = cuda_attention_backward,
    .attention_cached = cuda_attention_cached,
    .swiglu_forward = cuda_swiglu_forward,
    .swiglu_backward = cuda_swiglu_backward,
    .mxint8_pack = cuda_mxint8_pack,
    .mxint8_unpack = cuda_mxint8_unpack,
    .crossentropy = cuda_crossentropy,
    .quantize = cuda_quantize_any,
    .carry = cuda_carry_mxfp4,
    .quantize_supports = cuda_supports_any,
    .gemm = cuda_gemm,
    .carrier = cuda_carrier,
    .carrier_begin = cuda_carrier_begin,
    .unrotate = cuda_unrotate,
    .swiglu_quantize = cuda_swiglu_quantize_mxfp4,
    .rmsnorm_quantize = cuda_rmsnorm_quantize_mxfp4,
    .unrotate_swiglu_backward = cuda_unrotate_swiglu_backward,
    .unrotate_rmsnorm_backward = cuda_unrotate_rmsnorm_backward,
    .loss_sum = cuda_loss_sum,
    .sum_squares = cuda_sum_squares,
    .step_decide = cuda_step_decide,
    .adamw = cuda_adamw,
};

static const Ops* cuda_backend(int device) {
    struct cudaDeviceProp properties;
    cuda_check(cudaSetDevice(device));
    cuda_check(cudaGetDeviceProperties(&properties, device));
    gpu.device = device;
    gpu.sm_count = properties.multiProcessorCount;
    gpu.major = properties.major;
    gpu.minor = properties.minor;
    gpu.memory_bytes = properties.totalGlobalMem;
    snprintf(gpu.name, sizeof gpu.name, "%s", properties.name);
    check_or(gpu.major >= 8, EXIT_NO_DEVICE,
             "GPU %d, %s, has compute capability %d.%d; 8.0 (Ampere) or newer is needed", device, gpu.name, gpu.major,
             gpu.minor);
    cuda_check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    cuda_check(cudaStreamCreateWithFlags(&gpu.snapshot_stream, cudaStreamNonBlocking));
    cuda_check(cudaEventCreateWithFlags(&gpu.snapshot_begin, cudaEventDisableTiming));
    cuda_check(cudaEventCreateWithFlags(&gpu.snapshot_end, cudaEventDisableTiming));
    blas_check(cublasLtCreate(&gpu.blas));
    gpu.workspace_bytes = GEMM_WORKSPACE;
    cuda_check(cudaMalloc(&gpu.workspace, GEMM_WORKSPACE));
    cuda_check(cudaMalloc(&gpu.partial, CUDA_PARTIALS * sizeof(float)));
    const float fp4_scalars[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0};
    cuda_check(cudaMalloc(&gpu.fp4_scalars, sizeof fp4_scalars));
    cuda_check(cudaMemcpy(gpu.fp4_scalars, fp4_scalars, sizeof fp4_scalars, cudaMemcpyHostToDevice));
    return &CUDA_OPS;
}
