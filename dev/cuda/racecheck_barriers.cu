// racecheck_barriers.cu: does compute-sanitizer's racecheck follow named barriers as the norm's backward kernels use them?
//
//   nvcc -gencode arch=compute_90a,code=sm_90a dev/cuda/racecheck_barriers.cu -o racecheck_barriers
//   for mode in 0 1 2 3; do compute-sanitizer --tool racecheck ./racecheck_barriers $mode; done
//
// Each group of a block (threads of one threadIdx.y) adds up its rows, meeting at a barrier of its own a row; then all
// groups exchange their sums in shared memory between two __syncthreads.
//
//   0  every group has 2 rows                       no race
//   1  only the first has any                       no race, but racecheck of CUDA 13.0 reports some
//   2  the same, no named barrier                   no race
//   3  as 1, no __syncthreads behind the writes     a race
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

__global__ void exchange(float* x, int mode) {
    __shared__ float dots[2][16];
    __shared__ float parts[512];
    int T = blockDim.x, warps = T / 32, thread = threadIdx.y * T + threadIdx.x;
    int rows = mode == 0 || threadIdx.y == 0 ? 2 : 0;
    float sum = 0.0f;
    for (int row = 0; row < rows; row++) {
        float value = x[thread + row];
        if (mode == 2) {
            sum += value;
            continue;
        }
        float* mine = dots[row] + threadIdx.y * warps;
        if (threadIdx.x % 32 == 0) {
            mine[threadIdx.x / 32] = value;
        }
        asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.y), "r"(T) : "memory");
        for (int i = 0; i < warps; i++) {
            sum += mine[i];
        }
    }
    for (int k = 0; k < 4; k++) {
        __syncthreads();
        parts[thread] = sum + k;
        if (mode != 3) {
            __syncthreads();
        }
        if (threadIdx.y == 0) {
            float total = 0.0f;
            for (int group = 0; group < blockDim.y; group++) {
                total += parts[group * T + threadIdx.x];
            }
            x[1024 + k * T + threadIdx.x] = total;
        }
    }
}

int main(int argc, char** argv) {
    float* x;
    int mode = argc > 1 ? atoi(argv[1]) : 0;
    if (cudaMalloc(&x, 1 << 16) != cudaSuccess) {
        printf("skip: no GPU\n");
        return 0;
    }
    cudaMemset(x, 0, 1 << 16);
    exchange<<<1, dim3(128, 4)>>>(x, mode);
    cudaError_t result = cudaDeviceSynchronize();
    printf("mode %d: %s\n", mode, cudaGetErrorString(result));
    return result != cudaSuccess;
}
