// quant.h: tests of quantization to MXFP4 against dev/ref/golden/quartet.safetensors and against itself (section
// quant).
//
// The golden inputs are f32 and most are no bf16 values. Therefore
//   both builds   the tile functions of llmc/cpu/quantize.h, which the operation is made of, on f32 inputs: every
//                 golden tensor
//   FP32 build    the operation itself (ops->quantize) on every golden tensor that needs no given random numbers
//   both builds   the operation on inputs of the build's floatX: orientations, sources, odd row counts, signs and
//                 random bits of the documented index, statistics; rotation
#pragma once
#include "formats.h"

// ---------------------------------------------------------------------------------------------------------------------
// golden files; a missing one ends the tests

#define GOLDEN_QUARTET "dev/ref/golden/quartet.safetensors"

static SafetensorsFile golden_open(const char* path) {
    SafetensorsFile file;
    char error[SAFETENSORS_ERROR_BYTES];
    check_or(safetensors_open(&file, path, error, sizeof error) == 0, EXIT_NO_INPUT,
             "%s; run the tests from the repository's root", error);
    return file;
}

// the whole tensor on the heap; rows and cols (may be NULL) are its shape, cols 1 for a vector
static void* golden_read(const SafetensorsFile* file, const char* name, SafetensorsDtype dtype, int* rows, int* cols) {
    char error[SAFETENSORS_ERROR_BYTES];
    const SafetensorsEntry* entry = safetensors_find(file, name);
    check(entry && entry->dtype == dtype && entry->rank >= 1, "no tensor '%s' of that type in '%s'", name, file->path);
    void* data = malloc_or_die((size_t)entry->bytes, name);
    check(safetensors_read(file, entry, data, 0, entry->count, error, sizeof error) == 0, "%s", error);
    if (rows) {
        *rows = (int)entry->shape[0];
    }
    if (cols) {
        *cols = (int)(entry->count / entry->shape[0]);
    }
    return data;
}

// ---------------------------------------------------------------------------------------------------------------------
// quantization by the tile functions, with everything given

#define TEST_QUEST \
    (QuantSpec){.format = FORMAT_MXFP4, .scale = SCALE_QUEST, .rotation = ROTATE_HADAMARD, \
                .rounding = ROUND_NEAREST, .group = 32, .source = SOURCE_TENSOR}
#define TEST_ABSMAX(rotate, round) \
    (QuantSpec){.format = FORMAT_MXFP4, .scale = SCALE_ABSMAX, .rotation = rotate, .rounding = round, .group = 32, \
                .source = SOURCE_TENSOR}

static QTensor test_qtensor(const QuantSpec* spec, int rows, int cols) {
    return qtensor_at(spec, rows, cols, calloc_or_die(qtensor_bytes(spec, rows, cols), "test operand"));
}

static void test_qtensor_free(QTensor* q) { free(q->mask ? (void*)q->mask : (void*)q->codes); }

// out = quantized x (rows, cols) f32, read transposed from (cols, rows) where asked. signs: a word a block of 32
// columns, or NULL. random: 16 bits an element in out's order, or NULL for rounding to nearest.
static void quantize_given(QTensor* out, const QuantSpec* spec, const float* x, int transposed, const uint32_t* signs,
                           const uint16_t* random) {
    for (int r0 = 0; r0 < out->rows; r0 += TILE_LANES) {
        for (int c0 = 0; c0 < out->cols; c0 += GROUP) {
            int lanes = min_int(TILE_LANES, out->rows - r0);
            Tile tile;
            memset(&tile, 0, sizeof tile);
            for (int i = 0; i < GROUP * lanes; i++) {
                int k = i % GROUP, l = i / GROUP;
                size_t row = (size_t)(r0 + l), col = (size_t)(c0 + k);
                tile.v[k][l] = x[transposed ? col * out->rows + row : row * out->cols + col];
            }
            if (signs) {
                tile_flip_signs(&tile, signs[c0 / GROUP]);
            }
            if (spec->rotation != ROTATE_NONE) {
                tile_hadamard(&tile);
            }
            if (spec->scale == SCALE_QUEST) {
                tile_quest(&tile);
            } else {
                tile_absmax_scale(&tile);
                tile_absmax_nearest(&tile);
            }
            for (int i = 0; random && i < GROUP * lanes; i++) {
                int k = i % GROUP, l = i / GROUP;
                uint32_t code = f32_to_e2m1_stochastic(tile.v[k][l], random[(size_t)(r0 + l) * out->cols + (c0 + k)]);
                tile.code[k][l] = tile.scale[l] == UE8M0_NAN ? 0u : code;
            }
            tile_store(&tile, out, r0, c0, lanes);
        }
    }
}

// first row in which two operands differ, or -1
static int qtensor_first_difference(const QTensor* a, const QTensor* b, int rows) {
    size_t cols = (size_t)a->cols;
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)r * cols;
        int same = !memcmp(a->codes + at / 2, b->codes + at / 2, cols / 2) &&
                   !memcmp(a->scales + at / GROUP, b->scales + at / GROUP, cols / GROUP) && !a->mask == !b->mask &&
                   (!a->mask || !memcmp(a->mask + at / GROUP, b->mask + at / GROUP, cols / GROUP * sizeof(uint32_t)));
        if (!same) {
            return r;
        }
    }
    return -1;
}

#define expect_same_operand(a, b, ...) \
    expect((a)->rows == (b)->rows && (a)->cols == (b)->cols && qtensor_first_difference(a, b, (a)->rows) == -1, \
           __VA_ARGS__)

// the operation on a floatX tensor
static QTensor quantize_op(const QuantSpec* spec, int rows, int cols, const floatX* x, int transposed, uint64_t seed) {
    QTensor out = test_qtensor(spec, rows, cols);
    QuantizeArgs args = {.out = &out, .spec = *spec, .tensor = x, .saved = NULL, .transposed = transposed, .seed = seed,
                         .sign_stream = 77, .sign_index = 5ull << 56, .round_stream = 99, .round_index = 9ull << 56, .position = NULL,
                         .stats = NULL,
                         .row_under = NULL, .again = 0};
    CPU_OPS.quantize(&args);
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// the golden million: one CRC a row

// zlib's CRC-32, bit by bit
static int64_t crc32_of(const void* data, size_t bytes) {
    uint32_t crc = ~0u;
    for (size_t i = 0; i < bytes; i++) {
        crc ^= ((const uint8_t*)data)[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1u ? 0xEDB88320u : 0u);
        }
    }
    return (int64_t)(crc ^ ~0u);
}

#define MILLION_ROWS 1024

// rows whose checksum is not the golden one; the last of them in *row
static int million_differing_rows(const int64_t* golden, const void* data, size_t row_bytes, int* row) {
    int differing = 0;
    for (int r = 0; r < MILLION_ROWS; r++) {
        if (crc32_of((const uint8_t*)data + (size_t)r * row_bytes, row_bytes) != golden[r]) {
            differing++;
            *row = r;
        }
    }
    return differing;
}

static void million_expect(const SafetensorsFile* file, const char* prefix, const char* part, void* data,
                           size_t row_bytes, const char* by) {
    char name[64];
    snprintf(name, sizeof name, "million.%s%s_crc", prefix, part);
    int row = -1, planted_row = -1;
    int64_t* golden = (int64_t*)golden_read(file, name, SAFETENSORS_I64, NULL, NULL);
    int differing = million_differing_rows(golden, data, row_bytes, &row);
    expect(differing == 0, "%s by %s: %d rows differ from the reference, one is %d", name, by, differing, row);
    uint8_t* byte = (uint8_t*)data + 700 * row_bytes + row_bytes / 2;  // planted: one bit of row 700
    *byte ^= 4;
    differing = million_differing_rows(golden, data, row_bytes, &planted_row);
    *byte ^= 4;
    expect(differing == 1 && planted_row == 700, "%s: a flipped bit is not seen", name);
    free(golden);
}

static void million_expect_operand(const SafetensorsFile* file, const char* prefix, QTensor* q, const char* by) {
    size_t row = (size_t)q->cols;
    char dotted[32];
    snprintf(dotted, sizeof dotted, "%s.", prefix);
    million_expect(file, dotted, "codes", q->codes, row / 2, by);
    million_expect(file, dotted, "scales", q->scales, row / GROUP, by);
    if (q->mask) {
        million_expect(file, dotted, "mask", q->mask, row / GROUP * 4, by);
    }
    test_qtensor_free(q);
}

static void million_fill(float* x, uint16_t* r) {
    uint64_t state = 0;
    for (int i = 0; i < MILLION_ROWS * MILLION_ROWS; i++) {
        // the reference's state of number i is i+1 times the increment: what a running splitmix64 from 0 has
        uint64_t z = test_random(&state);
        int t = (int)(z & 0xffff) + (int)(z >> 16 & 0xffff) + (int)(z >> 32 & 0xffff) + (int)(z >> 48) - 131070;
        x[i] = (float)ldexp((double)t, -16 + i / 32 * 7 % 41 - 30);
        r[i] = (uint16_t)(z >> 48);
    }
}

static void test_quant_million(const SafetensorsFile* file) {
    const struct { const char* prefix; QuantSpec spec; int transposed, stochastic; } cases[] = {
        {"quest", TEST_QUEST, 0, 0},
        {"quest_t", TEST_QUEST, 1, 0},
        {"absmax_rtn", TEST_ABSMAX(ROTATE_NONE, ROUND_NEAREST), 0, 0},
        {"absmax_rtn_h", TEST_ABSMAX(ROTATE_HADAMARD, ROUND_NEAREST), 0, 0},
        {"absmax_rtn_h_t", TEST_ABSMAX(ROTATE_HADAMARD, ROUND_NEAREST), 1, 0},
        {"absmax_sr", TEST_ABSMAX(ROTATE_NONE, ROUND_STOCHASTIC), 0, 1},
    };
    const int n = MILLION_ROWS;
    float* x = (float*)malloc_or_die((size_t)n * n * sizeof(float), "test");
    uint16_t* r = (uint16_t*)malloc_or_die((size_t)n * n * sizeof(uint16_t), "test");
    million_fill(x, r);
    expect(crc32_of("123456789", 9) == 0xCBF43926, "the CRC itself");
    million_expect(file, "", "x", x, (size_t)n * 4, "generator");
    million_expect(file, "", "r", r, (size_t)n * 2, "generator");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        QTensor q = test_qtensor(&cases[i].spec, n, n);
        quantize_given(&q, &cases[i].spec, x, cases[i].transposed, NULL, cases[i].stochastic ? r : NULL);
        million_expect_operand(file, cases[i].prefix, &q, "tile functions");
#ifdef PRECISION_FP32
        if (!cases[i].stochastic) {
            QTensor by_op = quantize_op(&cases[i].spec, n, n, x, cases[i].transposed, 1);
            million_expect_operand(file, cases[i].prefix, &by_op, "the operation");
        }
#endif
    }
    free(x);
    free(r);
}

// ---------------------------------------------------------------------------------------------------------------------
// golden edge cases, group by group, and the intermediate values

static const char* edge_name(const char* names, int bytes, int row, char* out, size_t out_bytes) {
    int at = 0;
    for (int i = 0; i < row; i++) {
        while (at < bytes && names[at++] != '\n') {
        }
    }
    int end = at;
    while (end < bytes && names[end] != '\n') {
        end++;
    }
    snprintf(out, out_bytes, "%.*s", end - at, names + at);
    return out;
}

static void edge_expect(const SafetensorsFile* file, const char* kind, const char* codes_name, const QTensor* got,
                        const char* by) {
    char name[64], text[96];
    int rows, cols, name_bytes;
    snprintf(name, sizeof name, "edge.%s.%s", kind, codes_name);
    QTensor want = *got;
    want.codes = (uint8_t*)golden_read(file, name, SAFETENSORS_U8, &rows, &cols);
    check(rows == got->rows && cols == 16, "the shape of '%s'", name);
    snprintf(name, sizeof name, "edge.%s.scales", kind);
    want.scales = (uint8_t*)golden_read(file, name, SAFETENSORS_U8, NULL, NULL);
    snprintf(name, sizeof name, "edge.%s.mask", kind);
    want.mask = got->mask ? (uint32_t*)golden_read(file, name, SAFETENSORS_I32, NULL, NULL) : NULL;
    snprintf(name, sizeof name, "edge.%s.names", kind);
    char* names = (char*)golden_read(file, name, SAFETENSORS_U8, &name_bytes, NULL);
    for (int r = 0; r < rows; r++) {
        int mask_same = !want.mask || want.mask[r] == got->mask[r];
        expect(!memcmp(want.codes + r * 16, got->codes + r * 16, 16) && want.scales[r] == got->scales[r] && mask_same,
               "edge.%s by %s, row %d '%s': scale %d, reference %d", kind, by, r,
               edge_name(names, name_bytes, r, text, sizeof text), got->scales[r], want.scales[r]);
    }
    want.codes[16 * 5] ^= 1;  // planted
    expect(qtensor_first_difference(&want, got, rows) == 5, "edge.%s: a flipped bit is not seen", kind);
    free(want.codes);
    free(want.scales);
    free(want.mask);
    free(names);
}

static void test_quant_edges(const SafetensorsFile* file) {
    int rows, cols;
    const QuantSpec quest = TEST_QUEST, absmax = TEST_ABSMAX(ROTATE_NONE, ROUND_NEAREST);
    float* x = (float*)golden_read(file, "edge.quest.x", SAFETENSORS_F32, &rows, &cols);
    QTensor q = test_qtensor(&quest, rows, cols);
    quantize_given(&q, &quest, x, 0, NULL, NULL);
    edge_expect(file, "quest", "codes", &q, "tile functions");
    test_qtensor_free(&q);
#ifdef PRECISION_FP32
    q = quantize_op(&quest, rows, cols, x, 0, 1);
    edge_expect(file, "quest", "codes", &q, "the operation");
    test_qtensor_free(&q);
#endif
    free(x);
    x = (float*)golden_read(file, "edge.absmax.x", SAFETENSORS_F32, &rows, &cols);
    q = test_qtensor(&absmax, rows, cols);
    quantize_given(&q, &absmax, x, 0, NULL, NULL);
    edge_expect(file, "absmax", "codes", &q, "tile functions");
    int32_t* r = (int32_t*)golden_read(file, "edge.absmax.r", SAFETENSORS_I32, NULL, NULL);
    uint16_t* random = (uint16_t*)malloc_or_die((size_t)rows * cols * sizeof(uint16_t), "test");
    for (int i = 0; i < rows * cols; i++) {
        random[i] = (uint16_t)r[i];
    }
    quantize_given(&q, &absmax, x, 0, NULL, random);
    edge_expect(file, "absmax", "sr_codes", &q, "tile functions");
    test_qtensor_free(&q);
#ifdef PRECISION_FP32
    q = quantize_op(&absmax, rows, cols, x, 0, 1);
    edge_expect(file, "absmax", "codes", &q, "the operation");
    test_qtensor_free(&q);
#endif
    free(random);
    free(r);
    free(x);
}

// row of 16 lanes of a stage, against the golden bits
static void stage_expect(const SafetensorsFile* file, const char* name, const float* got, size_t n) {
    float* want = (float*)golden_read(file, name, SAFETENSORS_F32, NULL, NULL);
    expect(!memcmp(got, want, n * sizeof(float)), "%s differs in a bit", name);
    want[n / 2] = nextafterf(want[n / 2], INFINITY);
    expect(memcmp(got, want, n * sizeof(float)) != 0, "%s: a planted last bit is not seen", name);
    free(want);
}

// bits of H x, the two sums, the variance and the argument of log2. The last two are spelled as tile_quest spells them,
// which keeps them to itself: that tile_quest has the same bits is then seen in its scales.
static void test_quant_stages(const SafetensorsFile* file) {
    int rows, cols;
    float* x = (float*)golden_read(file, "stage.x", SAFETENSORS_F32, &rows, &cols);
    check(rows == 64 && cols == 32, "the shape of stage.x");
    float h[64 * 32], s1[64], s2[64], variance[64], v[64];
    int scales_agree = 1;
    for (int r0 = 0; r0 < rows; r0 += TILE_LANES) {
        Tile tile;
        for (int i = 0; i < GROUP * TILE_LANES; i++) {
            tile.v[i % GROUP][i / GROUP] = x[r0 * GROUP + i];
        }
        tile_hadamard(&tile);
        float pairs[GROUP][TILE_LANES];
        memcpy(pairs, tile.v, sizeof pairs);
        tile_sum(s1 + r0, pairs);
        for (int i = 0; i < GROUP * TILE_LANES; i++) {
            h[r0 * GROUP + i] = tile.v[i % GROUP][i / GROUP];
            pairs[i / TILE_LANES][i % TILE_LANES] = tile.v[i / TILE_LANES][i % TILE_LANES] * tile.v[i / TILE_LANES][i % TILE_LANES];
        }
        tile_sum(s2 + r0, pairs);
        tile_quest(&tile);
        for (int l = 0; l < TILE_LANES; l++) {
            float mean = s1[r0 + l] * 0.03125f;
            float var = s2[r0 + l] * 0.03125f - mean * mean;
            variance[r0 + l] = var < 0.0f ? 0.0f : var;
            v[r0 + l] = sqrtf(variance[r0 + l]) * QUEST_SCALE + QUEST_EPSILON;
            scales_agree &= (int)tile.scale[l] == ilogb((double)v[r0 + l]) + 127;
        }
    }
    stage_expect(file, "stage.h", h, 64 * 32);
    stage_expect(file, "stage.s1", s1, 64);
    stage_expect(file, "stage.s2", s2, 64);
    stage_expect(file, "stage.var", variance, 64);
    stage_expect(file, "stage.v", v, 64);
    expect(scales_agree, "the scale is not 2^floor(log2 v)");
    free(x);
}

// ---------------------------------------------------------------------------------------------------------------------
// the operation against itself: orientations, sources, odd rows; random numbers of the documented index

static void test_quant_orientations(const QuantSpec* spec, const char* what) {
    const int rows = 96, cols = 160;
    floatX* x = test_tensor((size_t)rows * cols, 3, 1.7);
    floatX* xt = (floatX*)malloc_or_die((size_t)rows * cols * sizeof(floatX), "test");
    for (int i = 0; i < rows * cols; i++) {
        xt[(size_t)(i % cols) * rows + i / cols] = x[i];
    }
    QTensor plain = quantize_op(spec, rows, cols, x, 0, 11), turned = quantize_op(spec, rows, cols, xt, 1, 11);
    expect_same_operand(&plain, &turned, "%s: the transposed source gives another operand", what);
    QTensor wrong = quantize_op(spec, rows, cols, xt, 0, 11);
    expect(qtensor_first_difference(&plain, &wrong, rows) == 0, "%s: a source read the wrong way round is not seen",
           what);
    test_qtensor_free(&wrong);
    test_qtensor_free(&turned);
    // fewer rows: the same rows, and nothing behind them is written
    const int counts[] = {1, 3, 17, 33};
    for (int i = 0; i < 4; i++) {
        QTensor few = test_qtensor(spec, rows, cols);
        memset(few.codes, 0xA5, qtensor_codes_bytes(rows, cols));
        memset(few.scales, 0xA5, qtensor_scales_bytes(rows, cols));
        few.rows = counts[i];
        QuantizeArgs args = {.out = &few, .spec = *spec, .tensor = x, .saved = NULL, .transposed = 0, .seed = 11,
                             .sign_stream = 77, .sign_index = 5ull << 56, .round_stream = 99, .round_index = 9ull << 56, .position = NULL,
                             .stats = NULL,
                         .row_under = NULL, .again = 0};
        CPU_OPS.quantize(&args);
        expect(qtensor_first_difference(&plain, &few, counts[i]) == -1, "%s: %d rows differ from the same rows of %d",
               what, counts[i], rows);
        expect(few.codes[counts[i] * cols / 2] == 0xA5 && few.scales[counts[i] * cols / GROUP] == 0xA5,
               "%s: %d rows write past their end", what, counts[i]);
        test_qtensor_free(&few);
    }
    test_qtensor_free(&plain);
    free(x);
    free(xt);
}

// a saved operand, read transposed, is the tensor that it decodes to
static void test_quant_saved(const QuantSpec* spec, const char* what) {
    const int rows = 64, cols = 96;
    const QuantSpec quest = TEST_QUEST;
    floatX* x = test_tensor((size_t)rows * cols, 4, 1.0);
    QTensor saved = quantize_op(&quest, rows, cols, x, 0, 0);
    for (int i = 0; i < rows * cols; i++) {
        x[i] = f32_to_floatX(qtensor_decode(&saved, i / cols, i % cols));
    }
    QTensor from_tensor = quantize_op(spec, cols, rows, x, 1, 21), from_saved = test_qtensor(spec, cols, rows);
    QuantizeArgs args = {.out = &from_saved, .spec = *spec, .tensor = NULL, .saved = &saved, .transposed = 1,
                         .seed = 21, .sign_stream = 77, .sign_index = 5ull << 56, .round_stream = 99,
                         .round_index = 9ull << 56, .position = NULL, .stats = NULL,
                         .row_under = NULL, .again = 0};
    args.spec.source = SOURCE_SAVED;
    CPU_OPS.quantize(&args);
    expect_same_operand(&from_tensor, &from_saved, "%s: the saved operand gives another one than its values", what);
    saved.codes[3] ^= 0x22;  // planted
    CPU_OPS.quantize(&args);
    expect(qtensor_first_difference(&from_tensor, &from_saved, cols) >= 0, "%s: another source is not seen", what);
    test_qtensor_free(&from_saved);
    test_qtensor_free(&from_tensor);
    test_qtensor_free(&saved);
    free(x);
}

// word b of philox(seed, sign_index + b/4, sign_stream); 16 bits of element i: half i%2 of word (i%8)/2 of
// philox(seed, round_index + i/8, round_stream)
static void test_quant_random_numbers(Rotation rotation, Rounding rounding, const char* what) {
    const int rows = 19, cols = 32 * 9;  // nine blocks: three Philox calls of signs
    const QuantSpec spec = TEST_ABSMAX(rotation, rounding);
    const uint64_t seed = 0x123456789abcdefull;
    floatX* x = test_tensor((size_t)rows * cols, 5, 0.01);
    float* x32 = (float*)malloc_or_die((size_t)rows * cols * sizeof(float), "test");
    uint16_t* random = (uint16_t*)malloc_or_die((size_t)rows * cols * sizeof(uint16_t), "test");
    uint32_t signs[9];
    for (int b = 0; b < 9; b++) {
        signs[b] = philox(seed, (5ull << 56) + (uint64_t)b / 4, 77).w[b % 4];
    }
    for (int i = 0; i < rows * cols; i++) {
        x32[i] = floatX_to_f32(x[i]);
        random[i] = (uint16_t)(philox(seed, (9ull << 56) + (uint64_t)i / 8, 99).w[i % 8 / 2] >> i % 2 * 16);
    }
    QTensor got = quantize_op(&spec, rows, cols, x, 0, seed), want = test_qtensor(&spec, rows, cols);
    const uint32_t* given_signs = rotation == ROTATE_SIGNED ? signs : NULL;
    const uint16_t* given_random = rounding == ROUND_STOCHASTIC ? random : NULL;
    quantize_given(&want, &spec, x32, 0, given_signs, given_random);
    expect_same_operand(&want, &got, "%s: not the signs or random bits of the documented index", what);
    signs[8] ^= 1;
    random[rows * cols - 5] ^= 0xffff;
    quantize_given(&want, &spec, x32, 0, given_signs, given_random);
    if (given_signs) {
        expect(qtensor_first_difference(&want, &got, rows) >= 0, "%s: a planted sign is not seen", what);
    }
    QTensor other = quantize_op(&spec, rows, cols, x, 0, seed + 1);
    expect(qtensor_first_difference(&other, &got, rows) == 0, "%s: another seed gives the same operand", what);
    test_qtensor_free(&other);
    test_qtensor_free(&want);
    test_qtensor_free(&got);
    free(random);
    free(x32);
    free(x);
}

// ---------------------------------------------------------------------------------------------------------------------
// rotation: H H x = x, unrotate undoes it, and in a product the two sides of a signed rotation cancel. H is 5 sums and
// a factor: 6 roundings, relative to the norm of what they mix.

static void test_quant_rotation(void) {
    const int rows = TILE_LANES;
    uint64_t state = 6;
    Tile tile[2];
    double x[2][GROUP][TILE_LANES], dot[TILE_LANES], norm[2][TILE_LANES];
    memset(dot, 0, sizeof dot);
    memset(norm, 0, sizeof norm);
    for (int i = 0; i < GROUP * TILE_LANES; i++) {
        int k = i / TILE_LANES, l = i % TILE_LANES;
        for (int s = 0; s < 2; s++) {
            tile[s].v[k][l] = (float)(test_normal(&state) * ldexp(1.0, l - 8));
            x[s][k][l] = (double)tile[s].v[k][l];
            norm[s][l] += x[s][k][l] * x[s][k][l];
        }
        dot[l] += x[0][k][l] * x[1][k][l];
    }
    for (int s = 0; s < 2; s++) {
        tile_flip_signs(&tile[s], 0xDEADBEEFu);
        tile_hadamard(&tile[s]);
    }
    float products[TILE_LANES], restored[GROUP * TILE_LANES], group[GROUP];
    for (int l = 0; l < TILE_LANES; l++) {
        double sum = 0.0;
        for (int k = 0; k < GROUP; k++) {
            sum += (double)tile[0].v[k][l] * (double)tile[1].v[k][l];
        }
        products[l] = (float)sum;
    }
    Near near = near_f32(products, TILE_LANES);
    for (int l = 0; l < TILE_LANES; l++) {
        near_want(&near, (size_t)l, dot[l], sqrt(norm[0][l] * norm[1][l]), 12.0);
    }
    near_expect(&near, "a product of two rotated rows");
    for (int s = 0; s < 2; s++) {  // tile_hadamard twice; tile_hadamard, then the group's unrotate: the same bits
        int same = 1;
        for (int l = 0; l < rows; l++) {
            for (int k = 0; k < GROUP; k++) {
                restored[l * GROUP + k] = tile[s].v[k][l];
            }
        }
        CPU_OPS.unrotate(real_f32(restored), NULL, NULL, rows, GROUP);
        tile_hadamard(&tile[s]);
        tile_flip_signs(&tile[s], 0xDEADBEEFu);
        for (int l = 0; l < rows; l++) {
            for (int k = 0; k < GROUP; k++) {
                group[k] = 0xDEADBEEFu >> k & 1u ? -restored[l * GROUP + k] : restored[l * GROUP + k];
                same &= f32_bits(group[k]) == f32_bits(tile[s].v[k][l]);
            }
        }
        expect(same, "unrotate and the rotation differ in a bit");
        near = near_f32(&tile[s].v[0][0], GROUP * TILE_LANES);
        for (int i = 0; i < GROUP * TILE_LANES; i++) {
            near_want(&near, (size_t)i, x[s][i / TILE_LANES][i % TILE_LANES], sqrt(norm[s][i % TILE_LANES]), 12.0);
        }
        near_expect(&near, "H H x");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// statistics

// signs are those of quantize_op's index; the rotated value is computed here in f64
static double rotated_f64(const floatX* row, const uint32_t* signs, int c, Rotation rotation) {
    if (rotation == ROTATE_NONE) {
        return (double)floatX_to_f32(row[c]);
    }
    double sum = 0.0;
    for (int k = 0; k < GROUP; k++) {
        double x = (double)floatX_to_f32(row[c / GROUP * GROUP + k]);
        x = rotation == ROTATE_SIGNED && (signs[c / GROUP] >> k & 1u) ? -x : x;
        sum += __builtin_popcount((unsigned)(k & (c % GROUP))) % 2 ? -x : x;
    }
    return sum / sqrt(32.0);
}

static void test_quant_stats(QuantSpec spec, int rows, int cols, const char* what) {
    floatX* x = test_tensor((size_t)rows * cols, 8, 3.0);
    QTensor q = test_qtensor(&spec, rows, cols);
    QuantStats got = {1.0, 2.0, 3.0, 4.0, 5.0};  // added to
    QuantizeArgs args = {.out = &q, .spec = spec, .tensor = x, .saved = NULL, .transposed = 0, .seed = 2,
                         .sign_stream = 77, .sign_index = 5ull << 56, .round_stream = 99, .round_index = 9ull << 56, .position = NULL,
                         .stats = &got,
                         .row_under = NULL, .again = 0};
    CPU_OPS.quantize(&args);
    double error_sq = 1.0, input_sq = 2.0, clipped = 3.0, zero = 4.0, slack = 0.0, input_slack = 0.0;
    uint32_t signs[16];
    for (int b = 0; b < cols / GROUP; b++) {
        signs[b] = sign_word(2, 77, 5ull << 56, b);
    }
    for (int i = 0; i < rows * cols; i++) {
        int r = i / cols, c = i % cols;
        double norm = 0.0, xh = rotated_f64(x + (size_t)r * cols, signs, c, spec.rotation);
        for (int k = 0; k < GROUP; k++) {
            norm += pow((double)floatX_to_f32(x[(size_t)r * cols + c / GROUP * GROUP + k]), 2);
        }
        double value = (double)qtensor_decode(&q, r, c) * (spec.scale == SCALE_ABSMAX ? 4.0 / 3.0 : 1.0),
            error = value - xh;
        double rounding = F32_ROUNDING * (6.0 * sqrt(norm / 32.0) + 3.0 * fabs(value) + fabs(error));
        error_sq += error * error;
        input_sq += xh * xh;
        slack += 2.0 * 2.0 * fabs(error) * rounding;
        input_slack += 2.0 * 2.0 * fabs(xh) * rounding;
        zero += value == 0.0;
        clipped += q.mask && !(q.mask[((size_t)r * cols + c) / GROUP] >> c % GROUP & 1u);
    }
    expect(fabs(got.error_sq - error_sq) <= slack, "%s: error %.9g, f64 says %.9g", what, got.error_sq, error_sq);
    expect(fabs(got.input_sq - input_sq) <= input_slack, "%s: input %.9g, f64 says %.9g", what, got.input_sq, input_sq);
    expect(fabs(got.error_sq * 1.0001 - error_sq) > slack && fabs(got.input_sq * 1.0001 - input_sq) > input_slack,
           "%s: a planted error of 1e-4 is not seen", what);
    expect(got.zero == zero && got.clipped == clipped && got.count == 5.0 + (double)rows * cols,
           "%s: counts %g %g %g, not %g %g", what, got.zero, got.clipped, got.count, zero, clipped);
    test_qtensor_free(&q);
    free(x);
}

static void test_quant(void) {
    SafetensorsFile file = golden_open(GOLDEN_QUARTET);
    test_quant_million(&file);
    test_quant_edges(&file);
    test_quant_stages(&file);
    safetensors_close(&file);
    const QuantSpec quest = TEST_QUEST, nearest = TEST_ABSMAX(ROTATE_SIGNED, ROUND_NEAREST);
    const QuantSpec stochastic = TEST_ABSMAX(ROTATE_SIGNED, ROUND_STOCHASTIC),
        plain = TEST_ABSMAX(ROTATE_NONE, ROUND_NEAREST);
    test_quant_orientations(&quest, "quest");
    test_quant_orientations(&nearest, "absmax rtn");
    test_quant_orientations(&stochastic, "absmax sr");
    test_quant_saved(&nearest, "absmax rtn");
    test_quant_saved(&stochastic, "absmax sr");
    test_quant_random_numbers(ROTATE_SIGNED, ROUND_NEAREST, "signs");
    test_quant_random_numbers(ROTATE_NONE, ROUND_STOCHASTIC, "rounding");
    test_quant_random_numbers(ROTATE_SIGNED, ROUND_STOCHASTIC, "signs and rounding");
    test_quant_rotation();
    test_quant_stats(quest, 17, 96, "stats of quest");
    test_quant_stats(plain, 5, 64, "stats of absmax");
    test_quant_stats(stochastic, 33, 32, "stats of absmax sr");
}
