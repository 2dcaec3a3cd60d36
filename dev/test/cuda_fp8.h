// cuda_fp8.h: 8-bit operands and linear layers of the fp8 recipe on the GPU against the CPU (section cuda_fp8).
#pragma once
#include "cuda_model.h"
#include "fp8.h"
#ifndef USE_CUDA
static void test_cuda_fp8(void) { printf("skip cuda_fp8: this binary was built without CUDA\n"); }
#else

static void* device_copy(const void* host, size_t bytes) {
    void* device = CUDA_OPS.alloc(bytes, "test");
    CUDA_OPS.copy_to_device(device, host, bytes);
    CUDA_OPS.synchronize();
    return device;
}

// MXINT8 is packed to the CPU's bits and unpacked to its values, faults and zeros among them
static void cuda_test_mxint8(int rows, int cols) {
    const char* what = label("MXINT8 of %d x %d", rows, cols);
    size_t n = (size_t)rows * cols, bytes = mxint8_bytes((size_t)rows, (size_t)cols), wrong = 0;
    floatX *x = test_tensor(n, 21, 4.0), *values = test_tensor(n, 22, 1.0);
    for (size_t i = 0; i < n; i++) {  // groups of all sizes
        size_t group = i / GROUP;
        float v = ldexpf(floatX_to_f32(x[i]), (int)(group % 250) - 130);
        v = group % 7 == 3 ? 0.0f * v : group % 11 != 5 || i % GROUP != group % GROUP ? v : group % 2 ? -INFINITY : NAN;
        x[i] = f32_to_floatX(v);
    }
    void* want = malloc_or_die(bytes, "test");
    Mxint8 host = mxint8_at((size_t)rows, (size_t)cols, want);
    CPU_OPS.mxint8_pack(host, x, rows, cols);
    CPU_OPS.mxint8_unpack(values, host, rows, cols);
    const floatX* source = (const floatX*)upload(x, n * X_BYTES);
    Output packed = output_make(NULL, bytes), out = output_make(NULL, n * X_BYTES);
    for (int run = 0; run < 2; run++) {
        Mxint8 device = mxint8_at((size_t)rows, (size_t)cols, packed.at[run]);
        CUDA_OPS.mxint8_pack(device, source, rows, cols);
        CUDA_OPS.mxint8_unpack(output_x(&out, run), device, rows, cols);
    }
    output_same(&packed, want, what);
    floatX* got = (floatX*)output_take(&out, what);
    for (size_t i = 0; i < n; i++) {  // the payload of a NaN may differ
        wrong += memcmp(&got[i], &values[i], X_BYTES) && !(isnan(floatX_to_f32(got[i])) && isnan(floatX_to_f32(values[i])));
    }
    expect(wrong == 0, "%s: %zu unpacked values are not the CPU's", what, wrong);
    release_uploads();
    test_free(x, values, want, got);
}

// codes and base equal the CPU's, whatever base was expected; a saved operand's too
static void cuda_test_fp8_operand(int rows, int cols, Format format, int transposed, double scale, int faults) {
    size_t n = (size_t)rows * cols;
    floatX* x = test_tensor(n, 21, scale);
    for (size_t i = 0; i < n && faults; i += 1009) {
        x[i] = f32_to_floatX(i % 2 ? INFINITY : NAN);
    }
    QuantSpec spec = {.format = format, .scale = SCALE_TENSOR_ABSMAX, .rotation = ROTATE_NONE,
                      .rounding = ROUND_NEAREST, .group = 0, .source = SOURCE_TENSOR};
    CarrierBase want_base = {}, got_base, *bases = (CarrierBase*)CUDA_OPS.alloc(2 * sizeof(CarrierBase), "test");
    uint8_t *want = (uint8_t*)malloc_or_die(n, "test"), *got = (uint8_t*)malloc_or_die(n, "test");
    floatX* dx = (floatX*)device_copy(x, n * sizeof(floatX));
    QTensor on_cpu = qtensor_at(&spec, rows, cols, want), on_gpu = qtensor_at(&spec, rows, cols, CUDA_OPS.alloc(n, "test"));
    on_cpu.base = &want_base, on_gpu.base = bases;
    QuantizeArgs args = {.out = &on_cpu, .spec = spec, .tensor = x, .saved = NULL, .transposed = transposed, .seed = 0,
                         .sign_stream = 0, .sign_index = 0, .round_stream = 0, .round_index = 0, .position = NULL,
                         .stats = NULL,
                         .row_under = NULL, .again = 0};
    CPU_OPS.quantize(&args);
    args.out = &on_gpu, args.tensor = dx;
    for (int expected = 0; expected < 3; expected++) {  // unknown; right; wrong
        CarrierBase start = {0, expected == 1 ? want_base.base : expected == 2 ? want_base.base + 4 : 0, CARRIER_NONE, 0};
        CUDA_OPS.copy_to_device(bases, &start, sizeof start);
        CUDA_OPS.quantize(&args);
        CUDA_OPS.copy_to_host(got, on_gpu.codes, n);
        CUDA_OPS.copy_to_host(&got_base, bases, sizeof got_base);
        expect(!memcmp(want, got, n) && got_base.scale == want_base.scale,
               "%d x %d, format %d, transposed %d, scale %g, expected %d: codes differ or the factor %g is not %g", rows,
               cols, format, transposed, scale, expected, (double)got_base.scale, (double)want_base.scale);
    }
    got[n / 2] ^= 1;
    expect(memcmp(want, got, n) != 0, "a changed code is not seen");
    QTensor turned = on_gpu;
    turned.rows = cols, turned.cols = rows, turned.base = bases + 1, turned.codes = (uint8_t*)CUDA_OPS.alloc(n, "test");
    args.out = &turned, args.saved = &on_gpu, args.spec.source = SOURCE_SAVED, args.tensor = NULL;
    CUDA_OPS.quantize(&args);
    CUDA_OPS.copy_to_host(got, turned.codes, n);
    CUDA_OPS.copy_to_host(&got_base, bases + 1, sizeof got_base);
    int wrong = got_base.scale != want_base.scale;
    for (int row = 0; row < rows; row++) {
        for (int col = 0; col < cols; col++) {
            wrong += got[(size_t)col * rows + row] != want[(size_t)row * cols + col];
        }
    }
    expect(wrong == 0, "%d x %d: %d bytes of the saved operand differ", rows, cols, wrong);
    CUDA_OPS.release(on_gpu.codes), CUDA_OPS.release(turned.codes), CUDA_OPS.release(dx), CUDA_OPS.release(bases);
    test_free(x, want, got);
}

// a small model with the fp8 recipe: close to the CPU's, learns, and its gradients do not depend on recomputation
static void cuda_test_fp8_model(void) {
    ModelConfig m = cuda_model_config(32, 0);
    Model cpu_model, gpu_model;
    model_prepare(&cpu_model, cpu_backend(), &m, recipe_find("fp8"), MEMORY_EXACT, MODEL_B, MODEL_T);
    model_prepare(&gpu_model, &CUDA_OPS, &m, recipe_find("fp8"), MEMORY_EXACT, MODEL_B, MODEL_T);
    model_allocate(&cpu_model);
    model_allocate(&gpu_model);
    cuda_model_fill(&cpu_model);
    model_state_copy(&gpu_model, &cpu_model);
    double loss[2], first = 0.0, last = 0.0;
    float *want = model_gradients(&cpu_model, &loss[0]), *got = model_gradients(&gpu_model, &loss[1]);
    double off = relative_distance(got, want, cpu_model.table.elements, 1.0);
    // a code of E4M3 is up to 2^-4 from its value: where a bf16 rounding decides between two, backends part by that
    double allowed = 2.0 * model_tolerance(&cpu_model, 1);
    expect(fabs(loss[1] - loss[0]) <= 4.0 * model_loss_tolerance(&cpu_model, 0) && off <= allowed,
           "fp8: loss %.6g, the CPU's %.6g; gradients %.3g apart, allowed %.3g", loss[1], loss[0], off, allowed);
    expect(relative_distance(got, want, cpu_model.table.elements, 1.0 + 2.0 * allowed) > allowed,
           "a longer gradient is not seen");
    printf("  fp8: loss %.3g from the CPU's, gradients %.3g (allowed %.3g)\n", fabs(loss[1] - loss[0]), off, allowed);
    for (int s = 0; s < CURVE_STEPS; s++) {
        last = model_train_step(&gpu_model, s, 2e-3);
        first = s == 0 ? last : first;
    }
    expect(last < 0.9 * first, "fp8 does not learn: %g after %g", last, first);
    test_free(want, got);
    model_free(&cpu_model);
    model_free(&gpu_model);
}

static void test_cuda_fp8(void) {
    if (!cuda_test_begin("cuda_fp8")) {
        return;
    }
    // less than a warp's 1024 elements, as many, more; blocks that are not full
    const int packs[][2] = {{1, 32}, {3, 32}, {31, 32}, {32, 32}, {33, 96}, {7, 4096}, {1000, 1056}, {5, 11008}, {2048, 4096}};
    for (int i = 0; i < 9; i++) {
        cuda_test_mxint8(packs[i][0], packs[i][1]);
    }
    QuantSpec spec = recipe_find("fp8")->x;
    if (!CUDA_OPS.quantize_supports(&spec)) {
        printf("skip cuda_fp8: this build or GPU has no 8-bit products\n");
        return;
    }
    const int shapes[][2] = {{1, 32}, {33, 96}, {64, 128}, {100, 544}, {257, 2048}, {2048, 352}};
    const double scales[] = {1.0, 1e-6, 2e4, 0.0};
    for (int i = 0; i < 48; i++) {
        cuda_test_fp8_operand(shapes[i / 8][0], shapes[i / 8][1], i & 1 ? FORMAT_E4M3 : FORMAT_E5M2, i >> 1 & 1,
                              scales[i / 2 % 4], i % 3 == 0);
    }
    cuda_test_fp8_model();
}
#endif
