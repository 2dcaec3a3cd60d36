// cpu/quantize_fp4.h: the operand of the FP4 carrier on the CPU, the oracle of cuda/quantize_fp4.cuh for the tests and
// the self-test; quant.h defines it. The CPU backend itself multiplies decoded codes.
#pragma once
#include "../ops.h"

// largest exponent of `groups` scales, NaN aside, or CARRIER_NONE. A group of zeros has the smallest scale that its
// rule can make, so that it has the largest one only where all groups have it.
static int cpu_fp4_largest(const uint8_t* scales, size_t groups) {
    int largest = CARRIER_NONE;
    for (size_t g = 0; g < groups; g++) {
        largest = scales[g] == UE8M0_NAN ? largest : max_int(largest, (int)scales[g] - 127);
    }
    return largest;
}

// 16 bytes of codes; returns whether one of them, under the window, was not zero before
static int cpu_fp4_group(uint8_t* to, const uint8_t* codes, int under) {
    int any = 0;
    for (int i = 0; i < GROUP / 2; i++) {
        uint32_t low = codes[i] & 15u, high = codes[i] >> 4;
        any |= under > 0 && (codes[i] & 0x77) != 0;
        to[i] = (uint8_t)(nvfp4_code(low, under) | nvfp4_code(high, under) << 4);
    }
    return any;
}

// out->operand with its base, or bases of the rows, from source's codes and scales, which may be nvfp4_source(out).
// Returns the groups under the window with a code that is not zero.
static int cpu_fp4_operand(const QTensor* out, const QTensor* source) {
    int rows = out->rows, groups = out->cols / GROUP, under = 0;
    uint8_t* tiles = nvfp4_tiles(out);
    check(out->carrier == FORMAT_NVFP4 && (out->base != NULL) != (out->row_scale != NULL) && out->cols % GROUP == 0,
          "internal: not an operand of the FP4 carrier");
    int largest = cpu_fp4_largest(source->scales, (size_t)rows * groups);
    memset(tiles, 0, nvfp4_tile_bytes(rows, out->cols));
    for (int row = 0; row < rows; row++) {
        const uint8_t* scales = source->scales + (size_t)row * groups;
        int base = nvfp4_base(out->row_scale ? cpu_fp4_largest(scales, (size_t)groups) : largest);
        for (int g = 0; g < groups; g++) {
            Nvfp4Scale scale = nvfp4_scale(scales[g], base);
            size_t at = ((size_t)row * groups + g) * (GROUP / 2);
            tiles[nvfp4_tile_index(row, 2 * g, 2 * groups)] = scale.code;
            tiles[nvfp4_tile_index(row, 2 * g + 1, 2 * groups)] = scale.code;
            under += cpu_fp4_group((uint8_t*)out->operand + at, source->codes + at, scale.under);
        }
        if (out->row_scale) {
            out->row_scale[row] = ldexpf(1.0f, base);
        }
    }
    if (out->base) {
        int base = nvfp4_base(largest);
        *out->base = CarrierBase{ldexpf(1.0f, base), base, largest, out->base->under + under};
    }
    return under;
}
