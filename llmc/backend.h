// backend.h: --device and --carrier -> a table of operations. Automatic choices are printed; an impossible request ends
// here.
#pragma once
#include "config.h"
#include "recipe.h"
#include "cpu/backend.h"
#ifdef USE_CUDA
#include "cuda/backend.cuh"
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
static const Ops* backend_init_cuda(const Config* config) {
    check_or(!strcmp(config->carrier, "auto") || !strcmp(config->carrier, "bf16"), EXIT_USAGE,
             "--carrier %s: the GPU of this version multiplies in the precision of the build (--carrier auto)",
             config->carrier);
    return cuda_backend(0);
}
#endif

static const Ops* backend_init(const Config* config, const Recipe* recipe) {
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
        return backend_init_cuda(config);
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
    }
    return cpu_backend();
}
