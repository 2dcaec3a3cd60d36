// cuda/embedding.cuh: rows of the embedding out, and their gradients back in, deterministic.
//
// Backward: the positions of a micro-batch are sorted by token (stable radix sort, CUB, only the bits that V needs), so
// that equal tokens stand together in token order. A frequent token has thousands of positions, so blocks do not take
// tokens: they take shares of the sorted positions, all of one length. The part of a token's run that lies in a share
// is a piece; its rows are added in order. A run of one piece is added to the token's gradient at once. The pieces of a
// run that crosses the border of a share go to memory, and a second kernel adds them in order. No atomics; one order,
// which depends on tokens and sizes only; gradients in floatX are rounded once.
#pragma once
#include "vectors.cuh"
#include <cub/device/device_radix_sort.cuh>

// one warp a row
template <int N>
__global__ void embedding_forward_kernel(floatX* out, const int32_t* tokens, const floatX* weight, int BT, int C) {
    int row = blockIdx.x * (blockDim.x / WARP_LANES) + threadIdx.x / WARP_LANES;
    if (row >= BT) {
        return;
    }
    const floatX* from = weight + (size_t)tokens[row] * C;
    floatX* to = out + (size_t)row * C;
    for (int c = threadIdx.x % WARP_LANES * N; c < C; c += WARP_LANES * N) {
        lanes_store(to + c, lanes_load<N>(from + c));
    }
}

static void cuda_embedding_forward(floatX* out, const int32_t* tokens, const floatX* weight, int BT, int C) {
    int blocks = (int)ceil_div(BT, 8);
    if (C % VEC == 0) {
        embedding_forward_kernel<VEC><<<blocks, 256, 0, gpu.stream>>>(out, tokens, weight, BT, C);
    } else {
        embedding_forward_kernel<1><<<blocks, 256, 0, gpu.stream>>>(out, tokens, weight, BT, C);
    }
    cuda_check_launch();
}

__global__ void positions_kernel(int32_t* positions, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        positions[i] = i;
    }
}

// Where the sum goes when a row has been added: on, to the token's gradient, or to slot 0 or 1 of the share's pieces
enum { PIECE_GOES_ON, PIECE_IS_RUN, PIECE_CONTINUES, PIECE_BEGINS };

// sorted (BT) tokens with their positions; block x takes the `length` of them from x * length on, threads take
// channels. pieces (shares, 2, C): slot 0 is the piece that continues the run of the share before, slot 1 one that
// begins here.
template <int N, class T>
__global__ void embedding_pieces_kernel(T* dweight, float* pieces, const floatX* dout, const int32_t* sorted,
                                        const int32_t* positions, int BT, int C, int length) {
    extern __shared__ int32_t share[];
    int begin = blockIdx.x * length, count = min(length, BT - begin);
    int32_t *tokens = share, *position = share + length, *goes = share + 2 * length;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        int at = begin + i, token = sorted[at], last = i == count - 1;
        int continues = begin > 0 && sorted[begin - 1] == token, on = at + 1 < BT && sorted[at + 1] == token;
        tokens[i] = token;
        position[i] = positions[at];
        goes[i] = on && !last ? PIECE_GOES_ON : continues ? PIECE_CONTINUES : on ? PIECE_BEGINS : PIECE_IS_RUN;
    }
    __syncthreads();
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    float sum[N] = {0}, total[N];
    for (int i = 0; c < C && i < count; i += 4) {
        Reals<N, floatX> row[4];
        Reals<N, T> old[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {  // all loads before the first use
            if (i + k < count) {
                row[k] = reals_load<N>(dout + (size_t)position[i + k] * C + c);
                if (goes[i + k] == PIECE_IS_RUN) {
                    old[k] = reals_load<N>(dweight + (size_t)tokens[i + k] * C + c);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int to = i + k < count ? goes[i + k] : PIECE_GOES_ON;
#pragma unroll
            for (int j = 0; j < N; j++) {
                sum[j] += i + k < count ? reals_get(row[k], j) : 0.0f;
                total[j] = reals_get(old[k], j) + sum[j];
            }
            if (to == PIECE_IS_RUN) {
                reals_store(dweight + (size_t)tokens[i + k] * C + c, reals_of<N, T>(total));
            } else if (to != PIECE_GOES_ON) {
                float* piece = pieces + ((size_t)blockIdx.x * 2 + (to == PIECE_BEGINS)) * C + c;
                reals_store(piece, reals_of<N, float>(sum));
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                sum[j] = to == PIECE_GOES_ON ? sum[j] : 0.0f;
            }
        }
    }
}

// block x: the run that begins in share x and goes on behind it, if there is one
template <int N, class T>
__global__ void embedding_runs_kernel(T* dweight, const float* pieces, const int32_t* sorted, int BT, int C,
                                      int length) {
    int begin = blockIdx.x * length, end = begin + length;
    if (end >= BT || sorted[end] != sorted[end - 1] || (begin > 0 && sorted[begin - 1] == sorted[end])) {
        return;
    }
    int token = sorted[end], following = 0, found;  // shares that begin with that token: they stand behind each other
    do {
        int64_t first = (int64_t)end + (int64_t)(following + threadIdx.x) * length;
        found = __syncthreads_count(first < BT && sorted[first] == token);
        following += found;
    } while (found == (int)blockDim.x);
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c >= C) {
        return;
    }
    Reals<N, float> piece = reals_load<N>(pieces + ((size_t)blockIdx.x * 2 + 1) * C + c);
    Reals<N, T> old = reals_load<N>(dweight + (size_t)token * C + c);
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        sum[j] = reals_get(piece, j);
    }
#pragma unroll 4
    for (int i = 1; i <= following; i++) {
        piece = reals_load<N>(pieces + ((size_t)blockIdx.x + i) * 2 * C + c);
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum[j] += reals_get(piece, j);
        }
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        sum[j] += reals_get(old, j);
    }
    reals_store(dweight + (size_t)token * C + c, reals_of<N, T>(sum));
}

// scratch of the sort, grown on demand before a graph is captured: keys and values twice, and CUB's own
typedef struct {
    int32_t *sorted, *positions, *unsorted_positions;
    void* temporary;
    size_t temporary_bytes;
    int capacity;
} EmbeddingSort;
static EmbeddingSort embedding_sort;

static void embedding_sort_reserve(int BT) {
    if (embedding_sort.capacity >= BT) {
        return;
    }
    cuda_check(cudaFree(embedding_sort.sorted));
    cuda_check(cudaFree(embedding_sort.temporary));
    embedding_sort.temporary_bytes = 0;
    cuda_check(cub::DeviceRadixSort::SortPairs(NULL, embedding_sort.temporary_bytes, (const int32_t*)NULL,
                                               (int32_t*)NULL, (const int32_t*)NULL, (int32_t*)NULL, BT, 0, 32,
                                               gpu.stream));
    cuda_check(cudaMalloc(&embedding_sort.sorted, sizeof(int32_t) * 3 * (size_t)BT));
    cuda_check(cudaMalloc(&embedding_sort.temporary, embedding_sort.temporary_bytes));
    embedding_sort.positions = embedding_sort.sorted + BT;
    embedding_sort.unsorted_positions = embedding_sort.sorted + 2 * (size_t)BT;
    embedding_sort.capacity = BT;
    positions_kernel<<<(int)ceil_div(BT, 256), 256, 0, gpu.stream>>>(embedding_sort.unsorted_positions, BT);
    cuda_check_launch();
}

template <int N, class T> static void embedding_sums(T* dweight, const floatX* dout, int BT, int C) {
    const EmbeddingSort* s = &embedding_sort;
    int64_t length = 16;
    while (2 * ceil_div(BT, length) * C > CUDA_PARTIALS) {
        length *= 2;
    }
    int threads = min_int(256, (int)round_up(ceil_div(C, N), WARP_LANES));
    dim3 grid((unsigned)ceil_div(BT, length), (unsigned)ceil_div(C, threads * N));
    embedding_pieces_kernel<N, T><<<grid, threads, 3 * (size_t)length * sizeof(int32_t), gpu.stream>>>(
        dweight, gpu.partial, dout, s->sorted, s->positions, BT, C, (int)length);
    embedding_runs_kernel<N, T>
        <<<grid, threads, 0, gpu.stream>>>(dweight, gpu.partial, s->sorted, BT, C, (int)length);
}

static void cuda_embedding_backward(RealArray dweight, const floatX* dout, const int32_t* tokens, int BT, int V,
                                    int C) {
    EmbeddingSort* s = &embedding_sort;
    int bits = 1, vectors = C % VEC == 0 && (uintptr_t)dweight.data % 16 == 0;
    while (bits < 31 && 1 << bits < V) {
        bits++;
    }
    embedding_sort_reserve(BT);
    cuda_check(cub::DeviceRadixSort::SortPairs(s->temporary, s->temporary_bytes, tokens, s->sorted,
                                               s->unsorted_positions, s->positions, BT, 0, bits, gpu.stream));
    if (dweight.type == REAL_F32 && vectors) {
        embedding_sums<VEC>((float*)dweight.data, dout, BT, C);
    } else if (dweight.type == REAL_F32) {
        embedding_sums<1>((float*)dweight.data, dout, BT, C);
    } else if (vectors) {
        embedding_sums<VEC>((floatX*)dweight.data, dout, BT, C);
    } else {
        embedding_sums<1>((floatX*)dweight.data, dout, BT, C);
    }
    cuda_check_launch();
}
