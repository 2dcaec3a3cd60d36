// cpu/quantize_fp8.h: whole tensors to 8-bit floats with one power-of-two factor, the fp8 recipe.
//
// code = rtn(x / 2^base) in E4M3 or E5M2, saturating; base = carrier_base(format, floor(log2 max|x|) - 1), so that the
// largest value lies in the format's top four octaves. NaN and infinity become the code of NaN, and count for no base.
// An operand from a saved one has its bytes, transposed, and its base.
#pragma once
#include "../ops.h"

static uint8_t fp8_encode(Format format, float x, float inverse) {
    if ((f32_bits(x) & 0x7f800000u) == 0x7f800000u) {
        return 0x7f;
    }
    return format == FORMAT_E4M3 ? f32_to_e4m3(x * inverse) : f32_to_e5m2(x * inverse);
}

static float fp8_decode(Format format, uint8_t code) {
    return format == FORMAT_E4M3 ? e4m3_to_f32(code) : e5m2_to_f32(code);
}

// floor(log2 max|x|) - 1 over the finite values, or CARRIER_NONE
static int fp8_largest(const floatX* x, size_t n) {
    uint32_t largest = 0;
#pragma omp parallel for reduction(max : largest) schedule(static)
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = f32_bits(floatX_to_f32(x[i])) & 0x7fffffffu;
        largest = magnitude < 0x7f800000u && magnitude > largest ? magnitude : largest;
    }
    return largest == 0 ? CARRIER_NONE : f32_biased_exponent(f32_from_bits(largest)) - 128;
}

static void cpu_quantize_fp8(const QuantizeArgs* args) {
    QTensor* out = args->out;
    int rows = out->rows, cols = out->cols;
    if (args->spec.source == SOURCE_SAVED) {
        *out->base = *args->saved->base;
#pragma omp parallel for schedule(static)
        for (int row = 0; row < rows; row++) {
            for (int col = 0; col < cols; col++) {
                out->codes[(size_t)row * cols + col] = args->saved->codes[(size_t)col * rows + row];
            }
        }
        return;
    }
    out->base->largest = fp8_largest(args->tensor, (size_t)rows * cols);
    out->base->base = carrier_base(out->format, out->base->largest);
    out->base->scale = ldexpf(1.0f, out->base->base);
    float inverse = ldexpf(1.0f, -out->base->base);
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        for (int col = 0; col < cols; col++) {
            size_t from = args->transposed ? (size_t)col * rows + row : (size_t)row * cols + col;
            out->codes[(size_t)row * cols + col] =
                fp8_encode(out->format, floatX_to_f32(args->tensor[from]), inverse);
        }
    }
}
