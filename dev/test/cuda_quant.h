// cuda_quant.h: Quartet on the GPU against the CPU, on every carrier that runs here (section cuda_quant). Here: the six
// operands, rounded to nearest and stochastically. Codes, scales and masks are the CPU's bits; what the carrier
// multiplies, its bases and its count of groups under the window follow from those codes by the definition in
// llmc/quant.h, whatever base was expected and whether codes are kept. Products and layers follow in
// cuda_quant_linear.h, the whole model in cuda_quant_model.h. The operands of the FP4 carrier are made on any GPU, so
// they are compared on any; its products need Blackwell.
#pragma once
#include "cuda_model.h"
#include "linear.h"
#ifdef USE_CUDA

// is that a carrier of this GPU and build?
static int quant_carrier_runs(const Carrier* carrier) {
    Format format = carrier->format[OPERAND_X];
    int bytes = gpu.major == 9 || (gpu.major == 8 && gpu.minor == 9), fp4 = backend_has_fp4(gpu.major, gpu.minor);
    return format == FORMAT_FLOATX || (sizeof(floatX) == 2 && (format == FORMAT_NVFP4 ? fp4 : bytes));
}
static int quant_carrier_fp4(const Carrier* carrier) { return carrier->format[OPERAND_X] == FORMAT_NVFP4; }
static int quant_carrier_bytes(void) { return gpu.carrier->format[OPERAND_X] == FORMAT_E4M3; }

// plans are kept for every shape of a process; the tests have more shapes than a training
static void quant_forget_plans(void) {
    CUDA_OPS.synchronize();
    for (int i = 0; i < gemm_plan_count; i++) {
        blas_check(cublasLtMatmulDescDestroy(gemm_plans[i].operation));
        blas_check(cublasLtMatrixLayoutDestroy(gemm_plans[i].a));
        blas_check(cublasLtMatrixLayoutDestroy(gemm_plans[i].b));
        blas_check(cublasLtMatrixLayoutDestroy(gemm_plans[i].out));
    }
    gemm_plan_count = 0;
}

static void* upload_zeros(size_t bytes) {
    void *zeros = calloc_or_die(bytes, "test"), *device = upload(zeros, bytes);
    free(zeros);
    return device;
}

// ---------------------------------------------------------------------------------------------------------------------
// what all cases share: a layer, its random numbers, inputs

#define QUANT_LAYERS 2
#define QUANT_BASES (QUANT_LAYERS * LINEAR_KINDS * OPERANDS)
static const char* const OPERAND_NAMES[OPERANDS] = {"x", "w", "dy", "wt", "dyt", "xt"};
static const char* const ROUNDING_NAMES[] = {"rtn", "sr"};
static const uint64_t QUANT_POSITION = (uint64_t)3 << 32 | 41;

static LinearContext quant_context(Rounding rounding) {
    LinearContext ctx = {};
    ctx.ops = &CPU_OPS;
    ctx.option_rounding = rounding;
    ctx.seed = 0x123456789abcull;
    ctx.position = &QUANT_POSITION;
    return ctx;
}

// the same on the GPU; its buffers are uploads
static LinearContext quant_context_gpu(Rounding rounding) {
    LinearContext ctx = quant_context(rounding);
    ctx.ops = &CUDA_OPS;
    ctx.carrier = gpu.carrier;
    ctx.bases = (CarrierBase*)upload_zeros(sizeof(CarrierBase) * QUANT_BASES);
    ctx.position = (const uint64_t*)upload(&QUANT_POSITION, sizeof QUANT_POSITION);
    return ctx;
}

static Linear quant_linear(void) {
    Linear linear = {};
    linear.recipe = recipe_find("quartet");
    linear.kind = LINEAR_GATE_UP;
    linear.layer = QUANT_LAYERS - 1;
    return linear;
}

// Blocks of 32 x 32 share what they draw, so that groups do in either orientation. OCTAVES goes beyond every window,
// WINDOW stays within all of them; ROWS: the rows of the source are of any size.
typedef enum { DRAW_NORMAL, DRAW_OCTAVES, DRAW_FAULTS, DRAW_ZEROS, DRAW_TINY, DRAW_WINDOW, DRAW_ROWS } Draw;
static const char* const DRAW_NAMES[] = {"normal", "octaves", "faults", "zeros", "tiny", "window", "rows"};

static float draw_value(Draw draw, size_t row, size_t col, size_t width, uint64_t seed) {
    uint64_t at = (row * width + col) * 0x2545F4914F6CDD1Dull + seed, block_at = (row / 32 << 32 | col / 32) + seed;
    float x = (float)test_normal(&at);
    uint64_t z = test_random(&at), block = test_random(&block_at);
    switch (draw) {
    case DRAW_OCTAVES: return ldexpf(x, (int)(block % 41) - 30);
    case DRAW_FAULTS: return block % 5 || z % 64 ? x : block % 3 == 0 ? INFINITY : block % 3 == 1 ? -NAN : 3.3e38f;
    case DRAW_ZEROS: return block % 4 == 0 ? x : z & 1 ? 0.0f : -0.0f;
    case DRAW_TINY: return ldexpf(x, block % 8 == 0 ? -118 : block % 8 < 4 ? -128 : -134);
    case DRAW_WINDOW: return ldexpf(x, (int)(block % 9) - 4);
    case DRAW_ROWS: return ldexpf(x, (int)(row * 7 % 41) - 20);
    default: return x;
    }
}

static floatX* draw_tensor(Draw draw, int rows, int cols, uint64_t seed) {
    floatX* x = (floatX*)malloc_or_die((size_t)rows * cols * X_BYTES, "test tensor");
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < (int64_t)rows * cols; i++) {
        x[i] = f32_to_floatX(draw_value(draw, (size_t)(i / cols), (size_t)(i % cols), (size_t)cols, seed));
    }
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// one operand: its source and what the CPU makes of it

typedef struct {
    OperandId id;
    Rounding rounding;
    int rows, cols, transposed;  // the source lies as (cols, rows)
    floatX* tensor;              // the source; of wt and xt what it was quantized from
    void *saved_memory, *memory;
    QTensor saved, q;
} OperandCase;

static const QuantSpec* operand_spec(OperandId id) { return recipe_spec(recipe_find("quartet"), id); }
static int operand_from_saved(OperandId id) { return operand_spec(id)->source == SOURCE_SAVED; }

static OperandCase operand_case(OperandId id, Rounding rounding, int rows, int cols, Draw draw) {
    LinearContext ctx = quant_context(rounding);
    Linear linear = quant_linear();
    OperandCase c = {};
    c.id = id, c.rounding = rounding, c.rows = rows, c.cols = cols, c.transposed = id >= OPERAND_WT;
    int height = c.transposed ? cols : rows, width = c.transposed ? rows : cols;
    c.tensor = draw_tensor(draw, height, width, (uint64_t)(100 * id + rows));
    if (operand_from_saved(id)) {
        OperandId forward = id == OPERAND_WT ? OPERAND_W : OPERAND_X;
        c.saved_memory = calloc_or_die(qtensor_bytes(operand_spec(forward), height, width), "test");
        c.saved = linear_operand(&ctx, forward, &linear, c.saved_memory, NULL, height, width, c.tensor, NULL, 0, NULL);
    }
    c.memory = calloc_or_die(qtensor_bytes(operand_spec(id), rows, cols), "test");
    c.q = linear_operand(&ctx, id, &linear, c.memory, NULL, rows, cols, c.tensor, &c.saved, c.transposed, NULL);
    return c;
}

static void operand_case_free(OperandCase* c) { test_free(c->tensor, c->saved_memory, c->memory); }

// the source on the GPU
typedef struct { const floatX* tensor; QTensor saved; } OperandSource;
static OperandSource operand_upload(const OperandCase* c) {
    OperandSource source = {NULL, c->saved};
    if (operand_from_saved(c->id)) {
        const QuantSpec* spec = operand_spec(c->id == OPERAND_WT ? OPERAND_W : OPERAND_X);
        void* memory = upload(c->saved_memory, qtensor_bytes(spec, c->saved.rows, c->saved.cols));
        source.saved = qtensor_at(spec, c->saved.rows, c->saved.cols, memory);
    } else {
        source.tensor = (const floatX*)upload(c->tensor, (size_t)c->rows * c->cols * X_BYTES);
    }
    return source;
}

// the operand by the GPU; kept may be NULL
static QTensor operand_gpu(const OperandCase* c, const LinearContext* ctx, const OperandSource* source, void* kept,
                           void* carried) {
    Linear linear = quant_linear();
    return linear_operand(ctx, c->id, &linear, kept, carried, c->rows, c->cols, source->tensor, &source->saved,
                          c->transposed, NULL);
}

// ---------------------------------------------------------------------------------------------------------------------
// what the carrier multiplies, by definition

typedef struct {
    Format format;
    size_t count;
    void* elements;    // bytes or floatX; of NVFP4 `count` bytes of codes and, from `tiles_at` on, the tiles of scales
    size_t tiles_at, tiles;
    float* row_scale;  // (rows), where rows have bases
    CarrierBase base;  // where the operand has one
} CarrierWant;

// e of a group, CARRIER_NONE where it has no code but zero, or NaN
static int group_exponent(const QTensor* q, size_t group) {
    int any = 0;
    for (size_t i = group * 16; i < group * 16 + 16; i++) {
        any |= q->codes[i] & 0x77;
    }
    return q->scales[group] == UE8M0_NAN || !any ? CARRIER_NONE : (int)q->scales[group] - 127;
}

static int largest_exponent(const QTensor* q, size_t first, size_t groups) {
    int largest = CARRIER_NONE;
    for (size_t g = first; g < first + groups; g++) {
        largest = max_int(largest, group_exponent(q, g));
    }
    return largest;
}

static void carrier_want_group(CarrierWant* want, const QTensor* q, size_t group, int base) {
    uint32_t scale = q->scales[group];
    for (size_t i = group * GROUP; i < (group + 1) * GROUP; i++) {
        float code = e2m1_to_f32(q->codes[i / 2] >> (i % 2 * 4) & 15u);
        float element = ldexpf(code, max_int((int)scale - 127 - base, -100));
        if (want->format == FORMAT_FLOATX) {
            ((floatX*)want->elements)[i] = f32_to_floatX(code * ue8m0_to_f32(scale));
        } else {
            uint8_t byte = want->format == FORMAT_E4M3 ? f32_to_e4m3(element) : f32_to_e5m2(element);
            ((uint8_t*)want->elements)[i] = scale == UE8M0_NAN ? 0x7f : byte;
        }
    }
}

static void carrier_want_fp4(CarrierWant* want, const OperandCase* c) {
    QTensor q = c->q;
    q.carrier = FORMAT_NVFP4;
    q.operand = want->elements;
    q.base = gpu.carrier->row_base[c->id] ? NULL : &want->base;
    q.row_scale = gpu.carrier->row_base[c->id] ? want->row_scale : NULL;
    want->count = qtensor_codes_bytes(c->rows, c->cols);
    want->tiles_at = nvfp4_tile_offset(c->rows, c->cols);
    want->tiles = nvfp4_tile_bytes(c->rows, c->cols);
    int under = cpu_fp4_operand(&q, &c->q);
    want->base.under = under;  // of the tensor, or of the rows together
}

static CarrierWant carrier_want(const OperandCase* c) {
    const QTensor* q = &c->q;
    size_t row_groups = (size_t)c->cols / GROUP;
    int by_row = gpu.carrier->row_base[c->id], under = 0;
    CarrierWant want = {};
    want.format = gpu.carrier->format[c->id];
    want.count = (size_t)c->rows * c->cols;
    want.elements = malloc_or_die(carrier_operand_bytes(gpu.carrier, c->id, c->rows, c->cols), "test");
    want.row_scale = test_zero_floats((size_t)c->rows);
    if (want.format == FORMAT_NVFP4) {
        carrier_want_fp4(&want, c);
        return want;
    }
    want.base.largest = largest_exponent(q, 0, row_groups * (size_t)c->rows);
    want.base.base = carrier_base(want.format, want.base.largest);
    want.base.scale = ldexpf(1.0f, want.base.base);
#pragma omp parallel for schedule(static) reduction(+ : under)
    for (int row = 0; row < c->rows; row++) {
        size_t first = (size_t)row * row_groups;
        int base = by_row ? carrier_base(want.format, largest_exponent(q, first, row_groups)) : want.base.base;
        want.row_scale[row] = ldexpf(1.0f, base);
        for (size_t g = first; g < first + row_groups; g++) {
            int exponent = group_exponent(q, g);
            under += exponent != CARRIER_NONE && exponent - base < carrier_bottom(want.format);
            carrier_want_group(&want, q, g, base);
        }
    }
    want.base.under = under;
    return want;
}

static void carrier_want_free(CarrierWant* want) { test_free(want->elements, want->row_scale); }

// elements that differ; a NaN is a NaN. zeros: of which any sign will do
static size_t carrier_differences(const CarrierWant* want, const void* got, int zeros) {
    size_t differ = 0;
    for (size_t i = want->tiles_at; i < want->tiles_at + want->tiles; i++) {
        differ += ((const uint8_t*)want->elements)[i] != ((const uint8_t*)got)[i];
    }
#pragma omp parallel for schedule(static) reduction(+ : differ)
    for (int64_t i = 0; i < (int64_t)want->count; i++) {
        if (want->format == FORMAT_NVFP4) {
            differ += ((const uint8_t*)want->elements)[i] != ((const uint8_t*)got)[i];
        } else if (want->format == FORMAT_FLOATX) {
            float a = floatX_to_f32(((const floatX*)want->elements)[i]), b = floatX_to_f32(((const floatX*)got)[i]);
            differ += f32_bits(a) != f32_bits(b) && !(a != a && b != b) && !(zeros && a == 0.0f && b == 0.0f);
        } else {
            uint8_t a = ((const uint8_t*)want->elements)[i], b = ((const uint8_t*)got)[i];
            differ += a != b && !(zeros && ((a | b) & 0x7f) == 0);
        }
    }
    return differ;
}

// Where zeros have no sign the two runs, of which one was written twice, may differ in it: each is compared.
static void carrier_expect(const CarrierWant* want, const Output* out, int zeros, int rows, const char* what) {
    char* got = zeros ? output_take_run(out, 1, what) : (char*)output_take(out, what);
    if (zeros) {
        char* first = output_take_run(out, 0, what);
        size_t off = carrier_differences(want, first, zeros);
        expect(off == 0, "%s: %zu of %zu elements of the first run are not what the codes say", what, off, want->count);
        free(first);
    }
    size_t differ = carrier_differences(want, got, zeros), middle = want->count / 2;
    expect(differ == 0, "%s: %zu of %zu elements of the operand are not what the codes say", what, differ, want->count);
    if (want->format == FORMAT_FLOATX) {
        float old = floatX_to_f32(((const floatX*)got)[middle]);
        ((floatX*)got)[middle] = f32_to_floatX(old == 1.0f ? 2.0f : 1.0f);
    } else {
        got[middle] ^= 1;
    }
    got[want->tiles ? want->tiles_at : 0] ^= want->tiles ? 8 : 0;  // planted: a scale, too
    expect(carrier_differences(want, got, zeros) == (want->tiles ? 2 : 1) || differ > 0,
           "%s: a planted element is not seen", what);
    if (rows > 0) {
        size_t at = out->bytes - sizeof(float) * (size_t)rows;
        expect_bits(got + at, want->row_scale, sizeof(float) * (size_t)rows, label("%s: bases of the rows", what));
    }
    free(got);
}

// ---------------------------------------------------------------------------------------------------------------------
// operands

// what the carrier multiplies, from the codes: as it was made with them, before the bases go on and after
static void cuda_test_carry(const OperandCase* c, const LinearContext* ctx, const OperandSource* source,
                            const CarrierWant* want, void* kept, const char* what) {
    Output carried = output_make(NULL, carrier_bytes(ctx, quant_linear().recipe, c->id, c->rows, c->cols));
    for (int run = 0; run < 2; run++) {
        QTensor q = operand_gpu(c, ctx, source, kept, carried.at[run]);
        CUDA_OPS.zero(q.operand, carrier_operand_bytes(gpu.carrier, c->id, c->rows, c->cols));
        if (run == 1) {
            CUDA_OPS.carrier_begin(ctx->bases, QUANT_BASES);
        }
        CUDA_OPS.carry(&q);
    }
    carrier_expect(want, &carried, 0, 0, label("%s, from its codes", what));
}

// run 0 expects a base that proves wrong, run 1 that of the use before
static void cuda_test_operand(const OperandCase* c, Draw draw) {
    char what[128];
    snprintf(what, sizeof what, "%s %s (%d, %d) %s, carrier %s", OPERAND_NAMES[c->id], ROUNDING_NAMES[c->rounding],
             c->rows, c->cols, DRAW_NAMES[draw], gpu.carrier->name);
    LinearContext ctx = quant_context_gpu(c->rounding);
    Linear linear = quant_linear();
    int by_row = gpu.carrier->row_base[c->id];
    if (by_row) {  // whose groups under the window are counted for telemetry only
        ctx.telemetry = (LinearTelemetry*)CUDA_OPS.alloc(sizeof(LinearTelemetry), "test");
    }
    const CarrierBase wrong = {0.0f, 0, 60, 0};
    CarrierBase *base = ctx.bases + (linear.layer * LINEAR_KINDS + linear.kind) * OPERANDS + c->id, got;
    OperandSource source = operand_upload(c);
    size_t bytes = carrier_bytes(&ctx, linear.recipe, c->id, c->rows, c->cols);
    Output kept = output_make(NULL, qtensor_bytes(operand_spec(c->id), c->rows, c->cols));
    Output carried = output_make(NULL, bytes), alone = output_make(NULL, bytes);
    for (int run = 0; run < 2; run++) {
        for (int keep = 1; keep >= 0; keep--) {
            if (run == 0) {
                CUDA_OPS.copy_to_device(base, &wrong, sizeof wrong);
            }
            CUDA_OPS.carrier_begin(ctx.bases, QUANT_BASES);
            operand_gpu(c, &ctx, &source, keep ? kept.at[run] : NULL, keep ? carried.at[run] : alone.at[run]);
        }
    }
    output_same(&kept, c->memory, what);
    CarrierWant want = carrier_want(c);
    carrier_expect(&want, &carried, 0, by_row ? c->rows : 0, what);
    // a group of zeros has no sign where nobody keeps its codes
    carrier_expect(&want, &alone, operand_from_saved(c->id), by_row ? c->rows : 0, label("%s, codes not kept", what));
    if (want.format != FORMAT_FLOATX && !by_row) {
        CUDA_OPS.copy_to_host(&got, base, sizeof got);
        expect(got.scale == want.base.scale && got.largest == want.base.largest && got.under == 3 * want.base.under,
               "%s: scale %g, largest %d, under %d in 3 uses instead of %g, %d, %d", what, (double)got.scale,
               got.largest, got.under, (double)want.base.scale, want.base.largest, 3 * want.base.under);
    } else if (by_row) {
        CUDA_OPS.copy_to_host(&got, base, sizeof got);
        expect(got.under == 3 * want.base.under, "%s: %d groups under their rows' windows in 3 uses instead of %d", what,
               got.under, 3 * want.base.under);
        CUDA_OPS.release(ctx.telemetry);
        ctx.telemetry = NULL;
    }
    if (c->id <= OPERAND_W) {
        cuda_test_carry(c, &ctx, &source, &want, kept.at[0], what);
    }
    if (operand_spec(c->id)->rotation == ROTATE_SIGNED && draw == DRAW_NORMAL) {  // planted: another position
        const uint64_t elsewhere = QUANT_POSITION + 1;
        CUDA_OPS.copy_to_device((void*)ctx.position, &elsewhere, sizeof elsewhere);
        operand_gpu(c, &ctx, &source, kept.at[0], carried.at[0]);
        char* other = (char*)malloc_or_die(kept.bytes, "test");
        CUDA_OPS.copy_to_host(other, kept.at[0], kept.bytes);
        expect(memcmp(other, c->memory, kept.bytes) != 0, "%s: another position gives the same bits", what);
        free(other);
    }
    carrier_want_free(&want);
    release_uploads();
}

// Rows of one group, of several and of many; a row that several threads, a warp, a block or more than a block's
// registers hold; tokens and columns that fill tiles and that do not; widths of TinyLlama and of the 7B.
static const struct { OperandId id; int rows, cols; } OPERAND_SHAPES[] = {
    {OPERAND_X, 1, 32},      {OPERAND_X, 33, 96},    {OPERAND_X, 257, 64},    {OPERAND_X, 67, 2048},
    {OPERAND_X, 5, 11008},   {OPERAND_W, 96, 32},    {OPERAND_W, 35, 4096},   {OPERAND_DY, 1, 32},
    {OPERAND_DY, 33, 96},    {OPERAND_DY, 300, 64},  {OPERAND_DY, 100, 2560}, {OPERAND_DY, 7, 11264},
    {OPERAND_DY, 5, 22016},  {OPERAND_DY, 3, 57344}, {OPERAND_WT, 32, 32},    {OPERAND_WT, 96, 160},
    {OPERAND_WT, 2048, 96},  {OPERAND_WT, 32, 22016}, {OPERAND_DYT, 1, 32},   {OPERAND_DYT, 33, 96},
    {OPERAND_DYT, 67, 160},  {OPERAND_DYT, 2560, 64}, {OPERAND_DYT, 22016, 32}, {OPERAND_DYT, 100, 2048},
    {OPERAND_XT, 32, 32},    {OPERAND_XT, 160, 96},  {OPERAND_XT, 288, 2048}, {OPERAND_XT, 11008, 32},
};

static void cuda_test_operands(void) {
    int broken = 0, under = 0;
    for (size_t i = 0; i < sizeof OPERAND_SHAPES / sizeof OPERAND_SHAPES[0]; i++) {
        OperandId id = OPERAND_SHAPES[i].id;
        int rows = OPERAND_SHAPES[i].rows, cols = OPERAND_SHAPES[i].cols;
        int roundings = operand_spec(id)->rounding == ROUND_OPTION ? 2 : 1, draws = rows * cols < 50000 ? 5 : 3;
        for (int k = 0; k < roundings * draws; k++) {
            Draw draw = (Draw)(k / roundings);
            OperandCase c = operand_case(id, (Rounding)(k % roundings), rows, cols, draw);
            for (int g = 0; g < rows * (cols / GROUP); g++) {
                broken += c.q.scales[g] == UE8M0_NAN;
            }
            for (int carrier = 0; carrier < CARRIER_COUNT; carrier++) {
                if (quant_carrier_runs(&CARRIERS[carrier]) || quant_carrier_fp4(&CARRIERS[carrier])) {
                    gpu.carrier = &CARRIERS[carrier];
                    CarrierWant want = carrier_want(&c);
                    under += want.format != FORMAT_FLOATX ? want.base.under : 0;
                    carrier_want_free(&want);
                    cuda_test_operand(&c, draw);
                }
            }
            operand_case_free(&c);
        }
    }
    expect(broken > 0 && under > 0, "no group with a NaN, or none under the window");
}
#endif
