// cuda/backend.cuh: the CUDA backend's entry. Its operations are not written yet: --device cuda says so and ends with exit code 69,
// --device auto takes the CPU and prints that.
#pragma once
#include "../ops.h"

// How many GPUs the driver shows; 0 where there is none or no driver
static int cuda_device_count(void) {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
