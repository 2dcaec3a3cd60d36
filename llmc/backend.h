// backend.h: --device and --carrier -> a table of operations. Automatic choices are printed; an impossible request ends
// here.
#pragma once
#include "comm.h"
#include "config.h"
#include "recipe.h"
#include "cpu/backend.h"
#ifdef USE_CUDA
#include "cuda/backend.cuh"
#endif
#ifdef USE_NCCL
#include "cuda/comm.cuh"
#endif

// what --device auto chose and why, for the header
static const char* backend_note = "";

static int backend_supports(const Ops* ops, const Recipe* recipe) {
    const QuantSpec* specs[] = {&recipe->x, &recipe->w, &recipe->dy, &recipe->wt, &recipe->dyt, &recipe->xt};
    for (int i = 0; i < 6; i++) {
        if (!ops->quantize_supports(specs[i])) {
            return 0;
        }
    }
    return 1;
}

#ifdef USE_CUDA
// does a GPU of that compute capability have FP4 tensor cores that cuBLASLt uses? B200, B300; RTX 50, GB10
static int backend_has_fp4(int major, int minor) {
    return (major == 10 && (minor == 0 || minor == 3)) || (major == 12 && minor <= 1);
}

// --carrier on this GPU; automatic: the narrowest products that there are, else the precision of the build
static const Ops* backend_init_cuda(const Config* config, const Recipe* recipe, const Comm* comm, int gpus) {
    check_or(gpus == 1 || comm->local_rank < gpus, EXIT_NO_DEVICE,
             "this is one of %d ranks on host %s, where %d GPUs are visible; start %d ranks a host", comm->local_size,
             comm->host, gpus, gpus);
    const Ops* ops = cuda_backend(gpus == 1 ? 0 : comm->local_rank);  // a launcher may show each rank its own GPU only
    const char* wanted = config->carrier;
    int bytes = sizeof(floatX) == 2 && (gpu.major > 8 || (gpu.major == 8 && gpu.minor >= 9)) && gpu.major < 10;
    int fp4 = sizeof(floatX) == 2 && backend_has_fp4(gpu.major, gpu.minor) && CUDART_VERSION >= 12080;
    check_or(strcmp(wanted, "f32"), EXIT_USAGE, "--carrier f32 is the CPU's; on a GPU: auto, bf16, fp8 or fp4");
    check_or(strcmp(wanted, "fp4") || fp4, EXIT_NO_DEVICE,
             "--carrier fp4 needs FP4 tensor cores (a GPU of compute capability 10.0, 10.3, 12.0 or 12.1), the BF16 "
             "build and CUDA 12.8 or newer; this is %s, %d.%d, %s, CUDA %d.%d; --carrier bf16 runs everywhere",
             gpu.name, gpu.major, gpu.minor, FLOATX_NAME, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    check_or(strcmp(wanted, "fp8") || bytes, EXIT_NO_DEVICE,
             "--carrier fp8 needs a GPU of compute capability 8.9 or 9.0 and the BF16 build; this is %s, %d.%d, %s; "
             "--carrier bf16 runs everywhere",
             gpu.name, gpu.major, gpu.minor, FLOATX_NAME);
    gpu.carrier = carrier_find(!is_auto_text(wanted) ? wanted : fp4 ? "fp4" : bytes ? "fp8" : "bf16");
    if (!strcmp(gpu.carrier->name, "fp4") && recipe->x.format == FORMAT_MXFP4) {
        backend_note = " (has never run on hardware before; --carrier bf16 has)";
    }
    return ops;
}
#endif

// CPU threads of a rank: what the launcher bound it to, and its share of the host
static int backend_cpu_threads(const Comm* comm) {
    int64_t cores = sysconf(_SC_NPROCESSORS_ONLN), share = max_i64(1, cores / comm->local_size);
    return (int)min_i64(cpu_threads(), share);
}

static const Ops* backend_init(const Config* config, const Recipe* recipe, const Comm* comm) {
    int want_cuda = !strcmp(config->device, "cuda"), automatic = !strcmp(config->device, "auto");
#ifdef USE_CUDA
    int gpus = want_cuda || automatic ? cuda_device_count() : 0;
    check_or(!want_cuda || gpus > 0, EXIT_NO_DEVICE,
             "--device cuda: no NVIDIA GPU is visible; nvidia-smi shows what the driver sees; "
             "--device cpu trains without one");
    check_or(!want_cuda || backend_supports(&CUDA_OPS, recipe), EXIT_NO_DEVICE,
             "--device cuda: --recipe %s does not run on the GPU in this version; use --recipe bf16, or --device cpu",
             recipe->name);
    if (want_cuda || (automatic && gpus > 0 && backend_supports(&CUDA_OPS, recipe))) {
        return backend_init_cuda(config, recipe, comm, gpus);
    }
    backend_note = gpus > 0 ? " (a GPU is visible, but this recipe does not run on it in this version)" : "";
#else
    (void)automatic;
    (void)recipe;
    check_or(!want_cuda, EXIT_NO_DEVICE,
             "--device cuda: this binary was built without CUDA; build with nvcc on the path (make CUDA=1), or use "
             "--device cpu");
#endif
    check_or(!strcmp(config->carrier, "auto") || !strcmp(config->carrier, "f32"), EXIT_USAGE,
             "--carrier %s needs a GPU; the CPU multiplies decoded operands in f32 (--carrier f32 or auto)",
             config->carrier);
    if (config->threads != AUTO_INT) {
        cpu_set_threads((int)config->threads);
    } else if (comm->local_size > 1) {
        cpu_set_threads(backend_cpu_threads(comm));
    }
    return cpu_backend();
}

#ifdef USE_MPI
// the collectives of several ranks on that device; wire_elements as in nccl_start
static const CommOps* backend_collectives(const Ops* ops, const Comm* comm, const Config* config,
                                          size_t wire_elements) {
    (void)comm, (void)config, (void)wire_elements;
    if (ops->shares_memory) {
        return &MPI_OPS;
    }
#ifdef USE_NCCL
    return nccl_start(comm, config->nccl_timeout, wire_elements);
#else
    die(EXIT_NO_DEVICE, "%d GPUs need NCCL, which this binary was built without; install it and run make again, or "
        "start one process", comm->size);
#endif
}
#endif
