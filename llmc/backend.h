// backend.h: --device and --carrier -> a table of operations. Automatic choices are printed; an impossible request ends here.
#pragma once
#include "config.h"
#include "cpu/backend.h"
#ifdef USE_CUDA
#include "cuda/backend.cuh"
#endif

#ifdef _OPENMP
#include <omp.h>
static int cpu_threads(void) { return omp_get_max_threads(); }
static void cpu_set_threads(int n) { omp_set_num_threads(n); }
#else
static int cpu_threads(void) { return 1; }
static void cpu_set_threads(int n) { (void)n; }
#endif

// what --device auto found, for the header
static const char* backend_note = "";

static const Ops* backend_init(const Config* config) {
    int gpus = 0;
#ifdef USE_CUDA
    gpus = cuda_device_count();
#endif
    if (!strcmp(config->device, "cuda")) {
#ifdef USE_CUDA
        check_or(gpus > 0, EXIT_NO_DEVICE, "--device cuda: no NVIDIA GPU is visible; nvidia-smi shows what the driver sees; "
                                           "--device cpu trains without one");
        die(EXIT_NO_DEVICE, "--device cuda: %d GPU(s) are visible, but this version trains on the CPU only; use --device cpu", gpus);
#else
        die(EXIT_NO_DEVICE, "--device cuda: this binary was built without CUDA; build with nvcc on the path (make CUDA=1), or use "
                            "--device cpu");
#endif
    }
    backend_note = gpus > 0 ? " (a GPU is visible, but this version trains on the CPU only)" : "";
    check_or(!strcmp(config->carrier, "auto") || !strcmp(config->carrier, "f32"), EXIT_USAGE,
             "--carrier %s needs a GPU; the CPU multiplies decoded operands in f32 (--carrier f32 or auto)", config->carrier);
    if (config->threads != AUTO_INT) {
        cpu_set_threads((int)config->threads);
    }
    return cpu_backend();
}
