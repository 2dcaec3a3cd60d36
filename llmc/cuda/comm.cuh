// cuda/comm.cuh: collectives of GPUs, by NCCL, on a stream of their own beside the backend's.
//
// begin makes that stream wait for gpu.stream, wait the reverse; both are events, so a recorded step holds the
// collectives, too. Counts are elements. Slices are range_slice's: equal ones by one collective, and what the last rank
// has more by a reduce or broadcast in the same group. NCCL_NVLS_ENABLE and all other variables of NCCL stay as the
// environment sets them.
#pragma once
#include "../comm.h"
#include "common.cuh"
#include <nccl.h>
#include <pthread.h>

typedef struct {
    ncclComm_t comm;
    cudaStream_t stream;
    cudaEvent_t given, done;
    floatX* wire;          // gradients on their way in a narrower type
    size_t wire_elements;
    double* sums;          // (ranks)
    // of the start
    ncclUniqueId id;
    int rank, size, finished;
    ncclResult_t result;
} NcclContext;
static NcclContext nccl;

static void nccl_check_at(ncclResult_t result, const char* call, const char* file, int line) {
    check_or(result == ncclSuccess, EXIT_NO_DEVICE, "%s:%d: %s: %s: %s; NCCL_DEBUG=INFO says more", file, line, call,
             ncclGetErrorString(result), ncclGetLastError(nccl.comm));
}
#define nccl_check(call) nccl_check_at((call), #call, __FILE__, __LINE__)

static ncclDataType_t nccl_type(RealType type) {
    return type == REAL_F32 || sizeof(floatX) == sizeof(float) ? ncclFloat32 : ncclBfloat16;
}

static void nccl_begin(void) {
    cuda_check(cudaEventRecord(nccl.given, gpu.stream));
    cuda_check(cudaStreamWaitEvent(nccl.stream, nccl.given, 0));
}
static void nccl_wait(void) {
    cuda_check(cudaEventRecord(nccl.done, nccl.stream));
    cuda_check(cudaStreamWaitEvent(gpu.stream, nccl.done, 0));
}

__global__ void nccl_narrow_kernel(floatX* out, const float* inp, size_t n) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        out[i] = to_floatX(inp[i]);
    }
}
__global__ void nccl_widen_kernel(float* out, const floatX* inp, size_t n) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        out[i] = floatX_to_f32(inp[i]);
    }
}
// *out = values in their order
__global__ void nccl_sum_kernel(double* out, const double* values, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) {
        sum += values[i];
    }
    *out = sum;
}

// slice `rank` of x (count), in place
static void nccl_reduce_slices(const Comm* comm, void* x, size_t count, RealType type) {
    Range whole = {0, count}, mine = range_slice(whole, comm->rank, comm->size);
    Range last = range_slice(whole, comm->size - 1, comm->size);
    size_t each = range_slice(whole, 0, comm->size).count, rest = last.count - each, width = real_bytes(type);
    char *own = (char*)x + mine.begin * width, *tail = (char*)x + (count - rest) * width;
    nccl_check(ncclGroupStart());
    if (each) {
        nccl_check(ncclReduceScatter(x, own, each, nccl_type(type), ncclSum, nccl.comm, nccl.stream));
    }
    if (rest) {
        nccl_check(ncclReduce(tail, tail, rest, nccl_type(type), ncclSum, comm->size - 1, nccl.comm, nccl.stream));
    }
    nccl_check(ncclGroupEnd());
}

static void nccl_reduce_scatter(const Comm* comm, RealArray x, size_t count, RealType wire) {
    if (real_bytes(wire) == real_bytes(x.type)) {
        nccl_reduce_slices(comm, x.data, count, x.type);
        return;
    }
    check(count <= nccl.wire_elements, "internal: %zu gradients at once, %zu expected", count, nccl.wire_elements);
    Range mine = range_slice(Range{0, count}, comm->rank, comm->size);
    int blocks = 2 * gpu.sm_count;
    nccl_narrow_kernel<<<blocks, 512, 0, nccl.stream>>>(nccl.wire, (const float*)x.data, count);
    nccl_reduce_slices(comm, nccl.wire, count, wire);
    if (mine.count) {
        nccl_widen_kernel<<<blocks, 512, 0, nccl.stream>>>((float*)x.data + mine.begin, nccl.wire + mine.begin,
                                                          mine.count);
    }
    cuda_check_launch();
}

static void nccl_all_gather(const Comm* comm, RealArray x, size_t count) {
    Range whole = {0, count}, mine = range_slice(whole, comm->rank, comm->size);
    Range last = range_slice(whole, comm->size - 1, comm->size);
    size_t each = range_slice(whole, 0, comm->size).count, rest = last.count - each, width = real_bytes(x.type);
    char *own = (char*)x.data + mine.begin * width, *tail = (char*)x.data + (count - rest) * width;
    nccl_check(ncclGroupStart());
    if (each) {
        nccl_check(ncclAllGather(own, x.data, each, nccl_type(x.type), nccl.comm, nccl.stream));
    }
    if (rest) {
        nccl_check(ncclBroadcast(tail, tail, rest, nccl_type(x.type), comm->size - 1, nccl.comm, nccl.stream));
    }
    nccl_check(ncclGroupEnd());
}

static void nccl_sum(const Comm* comm, double* out, const double* values, int n) {
    nccl_begin();
    nccl_sum_kernel<<<1, 1, 0, nccl.stream>>>(&nccl.sums[comm->rank], values, n);
    nccl_check(ncclAllGather(&nccl.sums[comm->rank], nccl.sums, 1, ncclFloat64, nccl.comm, nccl.stream));
    nccl_sum_kernel<<<1, 1, 0, nccl.stream>>>(out, nccl.sums, comm->size);
    cuda_check_launch();
    nccl_wait();
}

static const char* nccl_fault(void) {
    ncclResult_t result = ncclSuccess;
    if (nccl.comm && ncclCommGetAsyncError(nccl.comm, &result) == ncclSuccess && result != ncclSuccess &&
        result != ncclInProgress) {
        return ncclGetErrorString(result);
    }
    return NULL;
}

static const CommOps NCCL_OPS = {
    .name = "NCCL",
    .begin = nccl_begin,
    .wait = nccl_wait,
    .reduce_scatter = nccl_reduce_scatter,
    .all_gather = nccl_all_gather,
    .sum = nccl_sum,
    .fault = nccl_fault,
};

// ---------------------------------------------------------------------------------------------------------------------
// start

static void* nccl_connect(void* unused) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    (void)unused;
    cuda_check(cudaSetDevice(gpu.device));
    ncclComm_t made = NULL;
    ncclResult_t result = ncclCommInitRankConfig(&made, nccl.size, nccl.id, nccl.rank, &config);
    nccl.comm = made;
    nccl.result = result;
    __atomic_store_n(&nccl.finished, 1, __ATOMIC_RELEASE);
    return NULL;
}

// The first collectives make the connections that training uses, and must give what is known: element i of rank r is
// (r % 8 + 1) (i % 7 + 1), whose sums f32 holds, summed by slices and gathered; and the sum of r % 8 + 1
static void nccl_prove(const Comm* comm) {
    const size_t count = ((size_t)1 << 20) + 5;  // the last slice is longer
    double value = comm->rank % 8 + 1, sum = 0.0, expected = 0.0;
    float *x = NULL, *host = (float*)malloc_or_die(count * sizeof(float), "NCCL's known answer");
    double* device = NULL;
    size_t wrong = 0;
    for (size_t i = 0; i < count; i++) {
        host[i] = (float)(comm->rank % 8 + 1) * (float)(i % 7 + 1);
    }
    for (int rank = 0; rank < comm->size; rank++) {
        expected += rank % 8 + 1;
    }
    cuda_check(cudaMalloc((void**)&x, count * sizeof(float)));
    cuda_check(cudaMalloc((void**)&device, sizeof(double)));
    cuda_check(cudaMemcpyAsync(x, host, count * sizeof(float), cudaMemcpyHostToDevice, gpu.stream));
    cuda_check(cudaMemcpyAsync(device, &value, sizeof value, cudaMemcpyHostToDevice, gpu.stream));
    nccl_begin();
    nccl_reduce_scatter(comm, real_f32(x), count, REAL_F32);
    nccl_all_gather(comm, real_f32(x), count);
    nccl_wait();
    nccl_sum(comm, device, device, 1);
    cuda_check(cudaMemcpyAsync(&sum, device, sizeof sum, cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaMemcpyAsync(host, x, count * sizeof(float), cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
    for (size_t i = 0; i < count; i++) {
        wrong += (double)host[i] != expected * (double)(i % 7 + 1);
    }
    check_or(sum == expected && wrong == 0, EXIT_SELF_TEST,
             "NCCL sums over %d ranks to %g instead of %g, and %zu of %zu elements over slices are wrong", comm->size,
             sum, expected, wrong, count);
    cuda_check(cudaFree(x));
    cuda_check(cudaFree(device));
    free(host);
}

// All GPUs find each other within `seconds`; the unique id goes over MPI. wire_elements: largest number of gradients
// that are reduced at once in a narrower type, or 0.
static const CommOps* nccl_start(const Comm* comm, double seconds, size_t wire_elements) {
    pthread_t thread;
    double deadline = clock_seconds() + seconds;
    if (comm->rank == 0) {
        nccl_check(ncclGetUniqueId(&nccl.id));
    }
    comm_broadcast(comm, &nccl.id, sizeof nccl.id, 0);
    nccl.rank = comm->rank, nccl.size = comm->size;
    check(pthread_create(&thread, NULL, nccl_connect, NULL) == 0, "cannot start a thread");
    while (!__atomic_load_n(&nccl.finished, __ATOMIC_ACQUIRE)) {
        struct timespec pause = {0, 5000000};
        nanosleep(&pause, NULL);
        check_or(clock_seconds() < deadline, EXIT_NO_DEVICE,
                 "NCCL has not connected the %d GPUs within --nccl-timeout %g s; NCCL_DEBUG=INFO shows where it waits, "
                 "NCCL_SOCKET_IFNAME picks the network interface",
                 comm->size, seconds);
    }
    check(pthread_join(thread, NULL) == 0, "cannot join a thread");
    check_or(nccl.result == ncclSuccess, EXIT_NO_DEVICE, "NCCL does not start: %s: %s; NCCL_DEBUG=INFO says more",
             ncclGetErrorString(nccl.result), ncclGetLastError(NULL));
    int least = 0, greatest = 0;
    cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    cuda_check(cudaStreamCreateWithPriority(&nccl.stream, cudaStreamNonBlocking, greatest));
    cuda_check(cudaEventCreateWithFlags(&nccl.given, cudaEventDisableTiming));
    cuda_check(cudaEventCreateWithFlags(&nccl.done, cudaEventDisableTiming));
    cuda_check(cudaMalloc((void**)&nccl.sums, sizeof(double) * (size_t)comm->size));
    nccl.wire_elements = wire_elements;
    if (wire_elements) {
        cuda_check(cudaMalloc((void**)&nccl.wire, wire_elements * sizeof(floatX)));
    }
    nccl_prove(comm);
    return &NCCL_OPS;
}
