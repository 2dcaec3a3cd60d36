// quant.h: what it means to quantize an operand of a linear layer, and how the result lies in memory.
//
// A QuantSpec says what is computed; a QTensor holds the result. An operand is always (rows, cols) with cols the
// contraction dimension K of its GEMM, so groups, rotations and packing all run along contiguous memory. Sources that
// lie the other way round are read transposed by the quantizer.
//   MXFP4: packed e2m1 codes, two a byte (even column in the low nibble); one ue8m0 scale per 32 columns; where the
//   rule has a
//          trust mask, one bit per element (bit j of a word is column j of the group). 4 + 8/32 + 1 bits an element.
//   E4M3, E5M2: one byte an element, one power-of-two factor for all of them (its base)
//   FLOATX: no data of its own, a view of a floatX tensor (the bf16 recipe), with a flag where it lies transposed.
#pragma once
#include "dtypes.h"
#include "rand.h"

#define GROUP 32  // elements of an MXFP4 group and of a rotation block

typedef enum { FORMAT_FLOATX, FORMAT_E4M3, FORMAT_E5M2, FORMAT_MXFP4, FORMAT_NVFP4 } Format;

typedef enum {
    SCALE_NONE,
    SCALE_TENSOR_ABSMAX,  // one power of two for all: the largest magnitude lies in the format's top octaves (fp8)
    SCALE_ROW_ABSMAX,     // one f32 scale a row (fp8)
    SCALE_QUEST,          // Gaussian-optimal power of two, trust mask |x/s| < 6 (Quartet, forward)
    SCALE_ABSMAX,         // 2^(floor(log2 max|x|) - 2), codes of 3/4 x/s: the product owes 4/3 (Quartet, backward)
    SCALE_ABSMAX_UE4M3,   // e4m3 scale per 16, f32 scale per tensor (NVFP4)
} ScaleRule;

typedef enum { ROTATE_NONE, ROTATE_HADAMARD, ROTATE_SIGNED } Rotation;  // x | H x | H (signs * x), blocks of 32 along K

typedef enum { ROUND_NEAREST, ROUND_STOCHASTIC, ROUND_OPTION } Rounding;  // OPTION: what --bwd-rounding says

typedef enum { SOURCE_TENSOR, SOURCE_SAVED } Source;  // the tensor itself | the dequantized forward operand

typedef struct {
    Format format;
    ScaleRule scale;
    Rotation rotation;
    Rounding rounding;
    int group;      // elements that share a scale; 0: see the scale rule
    Source source;  // backward operands of x and w only
} QuantSpec;

// The base of a carrier's 8-bit operand, in device memory. An element is code * 2^(e - base), e the exponent of its
// group's scale, rounded to the carrier's format; products owe 2^base. A base is chosen so that the group with the
// largest e just fits, rounded up to a multiple of 4 octaves, so that it seldom changes from one use to the next: the
// quantizer writes with the base of the last use and, where that proves wrong, once more. So the bits are a function of
// the operand alone. An operand of the FP4 carrier (below) is made when all scales are there: its base is exact.
typedef struct {
    float scale;      // 2^base; cuBLASLt reads it here, and wants it 16-byte aligned
    int32_t base;
    int32_t largest;  // largest e of this use among groups with a code that is not zero; CARRIER_NONE: no such group
    int32_t under;    // groups, all uses, so far below the largest that their codes are rounded or lost
} CarrierBase;
#define CARRIER_NONE INT32_MIN
#define CARRIER_STEP 4

// of 8 bits: highest k with 6 * 2^k in the format, and lowest k at which every e2m1 code times 2^k is exact
static inline HOST_DEVICE int carrier_top(Format carrier) { return carrier == FORMAT_E4M3 ? 6 : 13; }
static inline HOST_DEVICE int carrier_bottom(Format carrier) { return carrier == FORMAT_E4M3 ? -8 : -15; }
static inline HOST_DEVICE int carrier_base(Format carrier, int largest) {
    int up = largest == CARRIER_NONE ? 0 : (largest + 1024 + CARRIER_STEP - 1) / CARRIER_STEP * CARRIER_STEP - 1024;
    return up - carrier_top(carrier);
}

typedef struct {
    Format format;
    int rows, cols;         // cols is K
    float owed;             // the decoded value is owed this factor; the GEMM multiplies it in
    uint8_t* codes;         // MXFP4: rows * cols / 2 bytes; E4M3, E5M2: rows * cols
    uint8_t* scales;        // MXFP4: rows * cols / 32 bytes
    uint32_t* mask;         // rows * cols / 32 words, or NULL where the rule has no trust mask
    const floatX* dense;    // FLOATX: the tensor that this is a view of
    int transposed;         // FLOATX: dense lies as (cols, rows)
    // what the instruction multiplies, on backends that do not decode codes themselves; else operand is NULL. Codes,
    // scales and mask are then written only where they are not NULL.
    Format carrier;         // E4M3 or E5M2: one byte an element; FLOATX: decoded values; NVFP4: see below
    void* operand;          // (rows, cols)
    CarrierBase* base;      // of the whole operand, or of E4M3 and E5M2 codes; NULL where every row has its own
    float* row_scale;       // (rows) 2^base of each row: a factor of the product's rows that its reader owes; or NULL
} QTensor;

// A (rows, cols) tensor in MXINT8: signed integers, one byte an element, and a ue8m0 scale per 32 columns (dtypes.h,
// mxint8_scale); 33/32 byte an element, cols % 32 == 0. Its values are integer * step, exact in floatX. codes NULL:
// there is none.
typedef struct { uint8_t *codes, *scales; } Mxint8;
static const Mxint8 MXINT8_NONE = {NULL, NULL};

static inline size_t mxint8_bytes(size_t rows, size_t cols) { return rows * cols + rows * cols / GROUP; }
static inline Mxint8 mxint8_at(size_t rows, size_t cols, void* memory) {
    return memory ? Mxint8{(uint8_t*)memory, (uint8_t*)memory + rows * cols} : MXINT8_NONE;
}
static HOST_DEVICE inline float mxint8_decode(uint32_t code, uint32_t scale) {
    return (float)(int8_t)code * mxint8_step(scale);
}

// Sums over the elements of one operand, for telemetry: error = |decoded - rotated input|
typedef struct { double error_sq, input_sq, clipped, zero, count; } QuantStats;

// One call of ops->quantize. The source is (rows, cols), or (cols, rows) where transposed.
typedef struct {
    QTensor* out;
    QuantSpec spec;          // rounding already resolved
    const floatX* tensor;    // SOURCE_TENSOR
    const QTensor* saved;    // SOURCE_SAVED, always read transposed
    int transposed;
    uint64_t seed;           // of signs and rounding; they are functions of (seed, stream, index)
    uint64_t sign_stream;    // word b of philox(seed, sign_index + b/4, sign_stream), b the block: bit j set = minus
    uint64_t sign_index;
    uint64_t round_stream;   // 16 bits an element, eight to a Philox call: element/8 + round_index
    uint64_t round_index;
    const uint64_t* position;  // in device memory, ORed into both streams: micro-batch << 32 | step; or NULL
    QuantStats* stats;       // added to; or NULL
    int32_t* row_under;      // where rows have bases: groups under their row's window are added; or NULL
    int again;               // made once before: groups under a base's window are not counted a second time
} QuantizeArgs;

// Bytes of a quantized operand's parts. cols % 32 == 0.
static inline size_t qtensor_codes_bytes(int rows, int cols) { return (size_t)rows * cols / 2; }
static inline size_t qtensor_scales_bytes(int rows, int cols) { return (size_t)rows * cols / GROUP; }
static inline size_t qtensor_mask_bytes(int rows, int cols) { return (size_t)rows * cols / GROUP * sizeof(uint32_t); }

static inline size_t qtensor_bytes(const QuantSpec* spec, int rows, int cols) {
    if (spec->format == FORMAT_E4M3 || spec->format == FORMAT_E5M2) {
        return (size_t)rows * cols;
    }
    if (spec->format != FORMAT_MXFP4) {
        return 0;
    }
    return qtensor_codes_bytes(rows, cols) + qtensor_scales_bytes(rows, cols) +
           (spec->scale == SCALE_QUEST ? qtensor_mask_bytes(rows, cols) : 0);
}

// Lay a QTensor of that spec over memory of qtensor_bytes. Masks come first: they want 4-byte alignment.
static inline QTensor qtensor_at(const QuantSpec* spec, int rows, int cols, void* memory) {
    QTensor q = {.format = spec->format, .rows = rows, .cols = cols, .owed = 1.0f, .codes = NULL, .scales = NULL,
                 .mask = NULL, .dense = NULL, .transposed = 0, .carrier = FORMAT_FLOATX, .operand = NULL, .base = NULL,
                 .row_scale = NULL};
    if (spec->format == FORMAT_MXFP4) {
        uint8_t* at = (uint8_t*)memory;
        if (spec->scale == SCALE_QUEST) {
            q.mask = (uint32_t*)at;
            at += qtensor_mask_bytes(rows, cols);
        }
        q.codes = at;
        q.scales = at + qtensor_codes_bytes(rows, cols);
        q.owed = spec->scale == SCALE_ABSMAX ? 4.0f / 3.0f : 1.0f;
    } else if (spec->format == FORMAT_E4M3 || spec->format == FORMAT_E5M2) {
        q.codes = (uint8_t*)memory;
    }
    return q;
}

// A floatX tensor as an operand: (rows, cols), lying as (cols, rows) where transposed
static inline QTensor qtensor_view(const floatX* tensor, int rows, int cols, int transposed) {
    QTensor q = {.format = FORMAT_FLOATX, .rows = rows, .cols = cols, .owed = 1.0f, .codes = NULL, .scales = NULL,
                 .mask = NULL, .dense = tensor, .transposed = transposed, .carrier = FORMAT_FLOATX, .operand = NULL,
                 .base = NULL, .row_scale = NULL};
    return q;
}

// The value of one element, before the owed factor. The readable definition; backends decode in bulk.
static inline float qtensor_decode(const QTensor* q, int row, int col) {
    if (q->format == FORMAT_FLOATX) {
        return floatX_to_f32(q->dense[q->transposed ? (size_t)col * q->rows + row : (size_t)row * q->cols + col]);
    }
    size_t i = (size_t)row * q->cols + col;
    if (q->format == FORMAT_E4M3) {
        return e4m3_to_f32(q->codes[i]) * q->base->scale;
    }
    if (q->format == FORMAT_E5M2) {
        return e5m2_to_f32(q->codes[i]) * q->base->scale;
    }
    uint32_t code = (q->codes[i / 2] >> (i % 2 * 4)) & 15u;
    return e2m1_to_f32(code) * ue8m0_to_f32(q->scales[i / GROUP]);
}

// the streams of a call, with its position
static HOST_DEVICE inline uint64_t quantize_position(const QuantizeArgs* args) {
    return args->position ? *args->position : 0;
}

// The sign word of rotation block b: bit j set means that element j of the block changes its sign
static HOST_DEVICE inline uint32_t sign_word(uint64_t seed, uint64_t stream, uint64_t index, int b) {
    return philox(seed, index + (uint64_t)(b / 4), stream).w[b % 4];
}

// The 16 random bits of element i
static HOST_DEVICE inline uint32_t round_bits(uint64_t seed, uint64_t stream, uint64_t index, size_t i) {
    uint32_t word = philox(seed, index + i / 8, stream).w[i % 8 / 2];
    return i % 2 ? word >> 16 : word & 0xffffu;
}

// ---------------------------------------------------------------------------------------------------------------------
// The operand of the FP4 carrier: MXFP4 as an NVFP4 matrix, which is what cuBLASLt multiplies on Blackwell's FP4 tensor
// cores (CUDA_R_4F_E2M1 with CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3; it has no MXFP4 product).
//
//   element = e2m1 code * ue4m3 scale of its 16 elements * 2^base
//
// A group's scale 2^e becomes 2^k, k = e - base, twice, for its two blocks of 16; base = largest e - 8 of the tensor or
// of the row, so k <= 8. ue4m3 has the powers of two from 2^-9 to 2^8: 18 octaves are exact. A group below them gets
// 2^-9, and its codes are rounded to nearest even at that scale: codes, not what they were made of. So the operand is a
// function of the packed codes and scales, which alone are saved, and a value is never better than the recipe's own.
// NaN scales become ue4m3's NaN.
//
// The codes lie as MXFP4's. The scales lie in tiles of 128 rows x 4 blocks, tiles of the same rows one behind the
// other, padded with zeros (cuBLAS documentation, "1D Block Scaling Factors Layout").

#define NVFP4_BLOCK 16
#define NVFP4_TOP 8       // highest and lowest k with 2^k among the scales
#define NVFP4_BOTTOM (-9)

static inline HOST_DEVICE int nvfp4_base(int largest) { return (largest == CARRIER_NONE ? 0 : largest) - NVFP4_TOP; }

static inline size_t nvfp4_tile_bytes(int rows, int cols) {
    return (size_t)round_up(rows, 128) * (size_t)round_up(cols / NVFP4_BLOCK, 4);
}

// where the scale of block `block` of row `row` lies, of `blocks` a row
static inline HOST_DEVICE size_t nvfp4_tile_index(int row, int block, int blocks) {
    size_t tile = (size_t)(row >> 7) * (size_t)((blocks + 3) / 4) + (size_t)(block >> 2);
    return tile * 512 + (size_t)((row & 31) * 16 + (row >> 5 & 3) * 4 + (block & 3));
}

// The row and the first of the two groups whose scales, each twice, are word number `word` of the tiles; either may lie
// in the padding.
typedef struct { uint32_t row, group; } Nvfp4Word;
static inline HOST_DEVICE Nvfp4Word nvfp4_word(uint32_t word, uint32_t groups) {
    uint32_t across = (groups + 1) / 2, tile = word / 128, in_tile = word % 128;
    Nvfp4Word place = {tile / across * 128 + in_tile / 4 + in_tile % 4 * 32, tile % across * 2};
    return place;
}

// the scale of a group with MXFP4's scale `byte`, and the octaves that it lies under the window
typedef struct { uint8_t code; int under; } Nvfp4Scale;
static inline HOST_DEVICE Nvfp4Scale nvfp4_scale(uint32_t byte, int base) {
    int k = (int)byte - 127 - base, under = k < NVFP4_BOTTOM ? NVFP4_BOTTOM - k : 0;
    Nvfp4Scale scale = {byte == UE8M0_NAN ? (uint8_t)UE4M3_NAN : ue4m3_power(k + under),
                        byte == UE8M0_NAN ? 0 : under};
    return scale;
}

// a code of a group that lies `under` octaves under the window; from 5 on all are zero, of the same sign
static inline HOST_DEVICE uint32_t nvfp4_code(uint32_t code, int under) {
    int octaves = under < 8 ? under : 8;
    return f32_to_e2m1(e2m1_to_f32(code) * f32_from_bits((uint32_t)(127 - octaves) << 23));
}

// An operand's memory: codes, scales in tiles, then a place for MXFP4's scales while it is made, where nobody keeps
// them. As much for (rows, cols) as for (cols, rows), as of the other carriers.
static inline size_t nvfp4_tile_offset(int rows, int cols) {
    return (size_t)round_up((int64_t)qtensor_codes_bytes(rows, cols), 256);
}
static inline size_t nvfp4_scales_offset(int rows, int cols) {
    size_t tiles = nvfp4_tile_bytes(rows, cols), turned = nvfp4_tile_bytes(cols, rows);
    return nvfp4_tile_offset(rows, cols) + (size_t)round_up((int64_t)max_size(tiles, turned), 256);
}
static inline size_t nvfp4_bytes(int rows, int cols) {
    return nvfp4_scales_offset(rows, cols) + qtensor_scales_bytes(rows, cols);
}
static inline uint8_t* nvfp4_tiles(const QTensor* q) {
    return (uint8_t*)q->operand + nvfp4_tile_offset(q->rows, q->cols);
}

// MXFP4 codes and scales of an operand of the FP4 carrier: kept, or where the operand itself is made of them
static inline QTensor nvfp4_source(const QTensor* q) {
    QTensor source = *q;
    source.codes = q->codes ? q->codes : (uint8_t*)q->operand;
    source.scales = q->scales ? q->scales : (uint8_t*)q->operand + nvfp4_scales_offset(q->rows, q->cols);
    source.carrier = FORMAT_FLOATX;
    source.operand = NULL;
    source.base = NULL;
    source.row_scale = NULL;
    return source;
}
