// cpu/quantize.h: rotation, QuEST and absmax quantization to MXFP4 on the CPU; the oracle of every other backend.
//
// DESIGN of the arithmetic (arXiv 2505.14669 v4, Algorithm 1; every operation is one f32 rounding, in this order, on
// every backend, so that codes, scales and masks are equal bit for bit):
//   H x        butterflies over 32 values at distances 1, 2, 4, 8, 16 (a, b -> a + b, a - b), then times
//   f32(1/sqrt(32)) quest      sums of xh and xh^2 by adjacent pairs, five levels; var = max(0, s2/32 - (s1/32)^2); v =
//   sqrt(var) * 0.48707976 + 1e-8;
//              s = 2^floor(log2 v); code = rtn(xh/s); mask = |xh/s| < 6
//   absmax     s = 2^(floor(log2 max|x|) - 2), at least 2^-127; code = round(3/4 * (x/s)); the value is owed 4/3
//   A group with a NaN or an infinity (quest: or whose squares overflow) gets the NaN scale 255, codes 0 and mask 0, so
//   that the fault reaches the loss and the step is skipped instead of being trained on.
//
// A tile is one rotation block (32 values along K) of TILE_LANES rows, value-major: every loop over lanes is one vector
// operation.
#pragma once
#include "quantize_fp8.h"

#define TILE_LANES 16

#define HADAMARD_SCALE 0.17677669529663687f          // 1/sqrt(32)
#define QUEST_SCALE ((float)(2.92247856 / 6.0))  // MSE-optimal clipping of a Gaussian for E2M1, over its largest value
#define QUEST_EPSILON 1e-8f

typedef struct {
    float v[GROUP][TILE_LANES];
    uint32_t code[GROUP][TILE_LANES];
    uint32_t scale[TILE_LANES], mask[TILE_LANES];
} Tile;

// rows r0 .. r0+lanes-1, columns c0 .. c0+31 of the operand; lanes past the end are zero
static void tile_load(Tile* tile, const QuantizeArgs* args, int r0, int c0, int lanes) {
    int rows = args->out->rows, cols = args->out->cols;
    if (lanes < TILE_LANES) {
        memset(tile->v, 0, sizeof tile->v);
    }
    if (args->spec.source == SOURCE_SAVED) {  // the source is (cols, rows): its row is our column
        float scale[GROUP];
        for (int k = 0; k < GROUP; k++) {
            size_t i = (size_t)(c0 + k) * rows + r0;
            uint64_t codes;  // of all 16 lanes: the source's columns are a multiple of 32
            memcpy(&codes, args->saved->codes + i / 2, sizeof codes);
            for (int l = 0; l < TILE_LANES; l++) {
                tile->code[k][l] = (uint32_t)(codes >> (4 * l)) & 15u;
            }
            scale[k] = ue8m0_to_f32(args->saved->scales[i / GROUP]);
        }
        for (int k = 0; k < GROUP; k++) {
#pragma omp simd
            for (int l = 0; l < TILE_LANES; l++) {
                tile->v[k][l] = e2m1_to_f32(tile->code[k][l]) * scale[k];
            }
        }
    } else if (args->transposed) {
        for (int k = 0; k < GROUP; k++) {
            const floatX* line = args->tensor + (size_t)(c0 + k) * rows + r0;
            for (int l = 0; l < lanes; l++) {
                tile->v[k][l] = floatX_to_f32(line[l]);
            }
        }
    } else {
        for (int l = 0; l < lanes; l++) {
            const floatX* line = args->tensor + (size_t)(r0 + l) * cols + c0;
            for (int k = 0; k < GROUP; k++) {
                tile->v[k][l] = floatX_to_f32(line[k]);
            }
        }
    }
}

// v = H v, each lane on its own: stages 1, 2, 4 on eight neighbouring rows, then 8, 16 and the scale on four rows 8
// apart, so that the tile passes through the registers twice instead of six times. The order of the additions is that
// of the definition.
static void tile_hadamard(Tile* tile) {
    for (int k = 0; k < GROUP; k += 8) {
#pragma omp simd
        for (int l = 0; l < TILE_LANES; l++) {
            float x[8], y[8];
            for (int i = 0; i < 8; i++) {
                x[i] = tile->v[k + i][l];
            }
            for (int i = 0; i < 8; i++) {
                y[i] = i & 1 ? x[i ^ 1] - x[i] : x[i] + x[i ^ 1];
            }
            for (int i = 0; i < 8; i++) {
                x[i] = i & 2 ? y[i ^ 2] - y[i] : y[i] + y[i ^ 2];
            }
            for (int i = 0; i < 8; i++) {
                tile->v[k + i][l] = i & 4 ? x[i ^ 4] - x[i] : x[i] + x[i ^ 4];
            }
        }
    }
    for (int k = 0; k < 8; k++) {
#pragma omp simd
        for (int l = 0; l < TILE_LANES; l++) {
            float a = tile->v[k][l], b = tile->v[k + 8][l], c = tile->v[k + 16][l], d = tile->v[k + 24][l];
            float ab = a + b, ba = a - b, cd = c + d, dc = c - d;
            tile->v[k][l] = (ab + cd) * HADAMARD_SCALE;
            tile->v[k + 8][l] = (ba + dc) * HADAMARD_SCALE;
            tile->v[k + 16][l] = (ab - cd) * HADAMARD_SCALE;
            tile->v[k + 24][l] = (ba - dc) * HADAMARD_SCALE;
        }
    }
}

static void tile_flip_signs(Tile* tile, uint32_t word) {
    for (int k = 0; k < GROUP; k++) {
        uint32_t flip = (word >> k & 1u) << 31;
        for (int l = 0; l < TILE_LANES; l++) {
            tile->v[k][l] = f32_from_bits(f32_bits(tile->v[k][l]) ^ flip);
        }
    }
}

// sum over the 32 values by adjacent pairs
static void tile_sum(float* sum, float pairs[GROUP][TILE_LANES]) {
    for (int h = 1; h < GROUP; h *= 2) {
        for (int k = 0; k < GROUP; k += 2 * h) {
            for (int l = 0; l < TILE_LANES; l++) {
                pairs[k][l] += pairs[k + h][l];
            }
        }
    }
    memcpy(sum, pairs[0], sizeof(float) * TILE_LANES);
}

static void tile_quest(Tile* tile) {
    float pairs[GROUP][TILE_LANES], s1[TILE_LANES], s2[TILE_LANES], inverse[TILE_LANES];
    memcpy(pairs, tile->v, sizeof pairs);
    tile_sum(s1, pairs);
    for (int k = 0; k < GROUP; k++) {
        for (int l = 0; l < TILE_LANES; l++) {
            pairs[k][l] = tile->v[k][l] * tile->v[k][l];
        }
    }
    tile_sum(s2, pairs);
    for (int l = 0; l < TILE_LANES; l++) {
        float mean = s1[l] * 0.03125f;
        float variance = s2[l] * 0.03125f - mean * mean;
        variance = variance < 0.0f ? 0.0f : variance;
        float v = sqrtf(variance) * QUEST_SCALE + QUEST_EPSILON;
        uint32_t exponent = f32_bits(v) >> 23 & 255u;  // 255 where v is NaN, of either sign, or infinite: the NaN scale
        tile->scale[l] = exponent;
        inverse[l] = exponent == UE8M0_NAN ? 0.0f : f32_from_bits((254u - exponent) << 23);
        tile->mask[l] = 0;
    }
    for (int k = 0; k < GROUP; k++) {
        for (int l = 0; l < TILE_LANES; l++) {
            float x = tile->v[k][l] * inverse[l];
            uint32_t broken = tile->scale[l] == UE8M0_NAN;
            uint32_t code = f32_to_e2m1(x);
            uint32_t inside = (f32_bits(x) & 0x7fffffffu) < f32_bits(6.0f);
            tile->code[k][l] = broken ? 0u : code;
            tile->mask[l] |= (broken ? 0u : inside) << k;
        }
    }
}

// 3/4 x/s of every value, in place; scales of the lanes
static void tile_absmax_scale(Tile* tile) {
    uint32_t largest[TILE_LANES] = {0};
    for (int k = 0; k < GROUP; k++) {
        for (int l = 0; l < TILE_LANES; l++) {
            uint32_t magnitude = f32_bits(tile->v[k][l]) & 0x7fffffffu;  // orders like the value; NaN above infinity
            largest[l] = magnitude > largest[l] ? magnitude : largest[l];
        }
    }
    float inverse[TILE_LANES];
    for (int l = 0; l < TILE_LANES; l++) {
        int exponent = f32_biased_exponent(f32_from_bits(largest[l])) - 2;
        uint32_t byte = largest[l] == 0 || exponent < 0 ? 0u : (uint32_t)exponent;
        tile->scale[l] = largest[l] >= 0x7f800000u ? UE8M0_NAN : byte;
        inverse[l] = f32_from_bits((254u - byte) << 23);
    }
    for (int k = 0; k < GROUP; k++) {
        for (int l = 0; l < TILE_LANES; l++) {
            tile->v[k][l] = tile->v[k][l] * inverse[l] * 0.75f;
        }
    }
}

static void tile_absmax_nearest(Tile* tile) {
    for (int k = 0; k < GROUP; k++) {
        for (int l = 0; l < TILE_LANES; l++) {
            uint32_t code = f32_to_e2m1(tile->v[k][l]);
            tile->code[k][l] = tile->scale[l] == UE8M0_NAN ? 0u : code;
        }
    }
}

// lanes past the end draw numbers, too, and are not stored
static void tile_absmax_stochastic(Tile* tile, const QuantizeArgs* args, int r0, int c0) {
    for (int k = 0; k < GROUP; k += 8) {
        uint32_t words[4][TILE_LANES];
        for (int l = 0; l < TILE_LANES; l++) {
            uint64_t element = (uint64_t)(r0 + l) * (uint64_t)args->out->cols + (uint64_t)(c0 + k);
            Philox random =
                philox(args->seed, args->round_index + element / 8, args->round_stream | quantize_position(args));
            words[0][l] = random.w[0], words[1][l] = random.w[1], words[2][l] = random.w[2], words[3][l] = random.w[3];
        }
        for (int j = 0; j < 8; j++) {
            for (int l = 0; l < TILE_LANES; l++) {
                uint32_t bits = words[j / 2][l] >> (j % 2 * 16) & 0xffffu;
                uint32_t code = f32_to_e2m1_stochastic(tile->v[k + j][l], bits);
                tile->code[k + j][l] = tile->scale[l] == UE8M0_NAN ? 0u : code;
            }
        }
    }
}

static void tile_store(const Tile* tile, QTensor* out, int r0, int c0, int lanes) {
    uint8_t packed[GROUP / 2][TILE_LANES];
    for (int k = 0; k < GROUP / 2; k++) {
        for (int l = 0; l < TILE_LANES; l++) {
            packed[k][l] = (uint8_t)(tile->code[2 * k][l] | tile->code[2 * k + 1][l] << 4);
        }
    }
    for (int l = 0; l < lanes; l++) {
        size_t group = ((size_t)(r0 + l) * out->cols + c0) / GROUP;
        uint8_t* codes = out->codes + group * (GROUP / 2);
        for (int k = 0; k < GROUP / 2; k++) {
            codes[k] = packed[k][l];
        }
        out->scales[group] = (uint8_t)tile->scale[l];
        if (out->mask) {
            out->mask[group] = tile->mask[l];
        }
    }
}

// reference is the rotated input; the tile holds codes and scales
static void tile_stats(QuantStats* stats, const Tile* tile, float reference[GROUP][TILE_LANES], float owed, int lanes) {
    double error_sq = 0, input_sq = 0, clipped = 0, zero = 0;
    for (int k = 0; k < GROUP; k++) {
        for (int l = 0; l < lanes; l++) {
            float x = reference[k][l];
            float error = e2m1_to_f32(tile->code[k][l]) * ue8m0_to_f32(tile->scale[l]) * owed - x;
            error_sq += (double)error * error;
            input_sq += (double)x * x;
            zero += (tile->code[k][l] & 7u) == 0;
            clipped += !(tile->mask[l] >> k & 1u);
        }
    }
    stats->error_sq += error_sq;
    stats->input_sq += input_sq;
    stats->zero += zero;
    stats->clipped += clipped;
    stats->count += (double)GROUP * lanes;
}

static int cpu_quantize_supports(const QuantSpec* spec) {
    if (spec->format == FORMAT_FLOATX) {
        return spec->scale == SCALE_NONE && spec->rotation == ROTATE_NONE;
    }
    if (spec->format == FORMAT_E4M3 || spec->format == FORMAT_E5M2) {
        return spec->scale == SCALE_TENSOR_ABSMAX && spec->rotation == ROTATE_NONE && spec->rounding == ROUND_NEAREST;
    }
    return spec->format == FORMAT_MXFP4 && spec->group == GROUP &&
           (spec->scale == SCALE_ABSMAX ||
            (spec->scale == SCALE_QUEST && spec->rounding == ROUND_NEAREST && spec->source == SOURCE_TENSOR));
}

static void quantize_tile(const QuantizeArgs* args, int r0, int c0) {
    QTensor* out = args->out;
    int lanes = min_int(TILE_LANES, out->rows - r0);
    Tile tile;
    tile_load(&tile, args, r0, c0, lanes);
    if (args->spec.rotation == ROTATE_SIGNED) {
        tile_flip_signs(
            &tile, sign_word(args->seed, args->sign_stream | quantize_position(args), args->sign_index, c0 / GROUP));
    }
    if (args->spec.rotation != ROTATE_NONE) {
        tile_hadamard(&tile);
    }
    float reference[GROUP][TILE_LANES];
    if (args->stats) {
        memcpy(reference, tile.v, sizeof reference);
    }
    if (args->spec.scale == SCALE_QUEST) {
        tile_quest(&tile);
    } else {
        tile_absmax_scale(&tile);
        if (args->spec.rounding == ROUND_STOCHASTIC) {
            tile_absmax_stochastic(&tile, args, r0, c0);
        } else {
            tile_absmax_nearest(&tile);
        }
        memset(tile.mask, 0xff, sizeof tile.mask);
    }
    tile_store(&tile, out, r0, c0, lanes);
    if (args->stats) {
        QuantStats local = {0, 0, 0, 0, 0};
        tile_stats(&local, &tile, reference, out->owed, lanes);
#pragma omp critical(quantize_stats)
        {
            args->stats->error_sq += local.error_sq;
            args->stats->input_sq += local.input_sq;
            args->stats->clipped += local.clipped;
            args->stats->zero += local.zero;
            args->stats->count += local.count;
        }
    }
}

static void cpu_quantize(const QuantizeArgs* args) {
    QTensor* out = args->out;
    check(cpu_quantize_supports(&args->spec), "internal: quantizer without an implementation");
    if (out->format != FORMAT_MXFP4) {
        cpu_quantize_fp8(args);
        return;
    }
    check(out->cols % GROUP == 0, "contraction dimension %d is not a multiple of %d, which MXFP4 groups need",
          out->cols, GROUP);
    if (args->spec.source == SOURCE_SAVED) {
        check(args->saved && args->saved->rows == out->cols && args->saved->cols == out->rows && out->rows % GROUP == 0,
              "internal: the saved operand is not (%d, %d)", out->cols, out->rows);
    }
    // strips of rows, so that a source that is read across its rows uses whole cache lines
    const int strip_rows = 8 * TILE_LANES;
    int strips = (int)ceil_div(out->rows, strip_rows), blocks = out->cols / GROUP;
#pragma omp parallel for collapse(2) schedule(static)
    for (int strip = 0; strip < strips; strip++) {
        for (int block = 0; block < blocks; block++) {
            int end = min_int(out->rows, (strip + 1) * strip_rows);
            for (int r0 = strip * strip_rows; r0 < end; r0 += TILE_LANES) {
                quantize_tile(args, r0, block * GROUP);
            }
        }
    }
}

// x (rows, cols) = H (x * mask), of floatX or f32, by tiles: undoes mask and rotation
static void unrotate_tile(RealArray x, const uint32_t* mask, const float* row_scale, int r0, int c0, int cols,
                          int lanes) {
    Tile tile;
    float line[GROUP];
    if (lanes < TILE_LANES) {
        memset(tile.v, 0, sizeof tile.v);
    }
    for (int l = 0; l < lanes; l++) {
        size_t first = (size_t)(r0 + l) * cols + c0;
        uint32_t keep = mask ? mask[first / GROUP] : ~0u;
        float factor = row_scale ? row_scale[r0 + l] : 1.0f;
        for (int k = 0; k < GROUP; k++) {
            float v = real_get(x, first + (size_t)k);
            line[k] = keep >> k & 1u ? v * factor : 0.0f;
        }
        for (int k = 0; k < GROUP; k++) {
            tile.v[k][l] = line[k];
        }
    }
    tile_hadamard(&tile);
    for (int l = 0; l < lanes; l++) {
        size_t first = (size_t)(r0 + l) * cols + c0;
        for (int k = 0; k < GROUP; k++) {
            line[k] = tile.v[k][l];
        }
        for (int k = 0; k < GROUP; k++) {
            real_set(x, first + (size_t)k, line[k]);
        }
    }
}

static void cpu_unrotate(RealArray x, const uint32_t* mask, const float* row_scale, int rows, int cols) {
    int tiles = (int)ceil_div(rows, TILE_LANES), blocks = cols / GROUP;
#pragma omp parallel for collapse(2) schedule(static)
    for (int tile = 0; tile < tiles; tile++) {
        for (int block = 0; block < blocks; block++) {
            unrotate_tile(x, mask, row_scale, tile * TILE_LANES, block * GROUP, cols,
                          min_int(TILE_LANES, rows - tile * TILE_LANES));
        }
    }
}

