// quantize_check.h: the sections `host` and `check` of quantize_bench.cu.
//
// host   without a GPU: the arithmetic of llmc/cuda/quantize_group.cuh, run by the CPU, against llmc/dtypes.h for every
//        f32 that matters, and whole operands against cpu_quantize
// check  codes, scales and masks of every kernel against cpu_quantize; bytes, bases and counts against the definitions
//        in quant.h, with a base that was predicted wrong and one that was right; statistics; rotation back
#pragma once
#include "../../llmc/cuda/quantize.cuh"

static int failures, checks;

#define report(ok, ...)                     \
    do {                                    \
        checks++;                           \
        if (!(ok)) {                        \
            failures++;                     \
            if (failures <= 40) {           \
                printf("FAIL ");            \
                printf(__VA_ARGS__);        \
                printf("\n");               \
            }                               \
        }                                   \
    } while (0)

// ---------------------------------------------------------------------------------------------------------------------
// ways to launch the same operation; the first is cuda_quantize

typedef enum { LAUNCH_DEFAULT, LAUNCH_DIRECT, LAUNCH_APART, LAUNCHES } Launch;
static const char* const launch_names[] = {"", "direct", "apart"};
static Launch launch;  // of the case that runs

// direct: nothing is read ahead. apart: the second launch begins when the first one has ended.
static void quantize(const QuantizeArgs* args) {
    switch (launch) {
    case LAUNCH_DIRECT: quantize_launch<1>(args, 1); break;
    case LAUNCH_APART: quantize_launch<SOURCE_STAGES>(args, 0); break;
    default: cuda_quantize(args);
    }
}

static void* device_alloc(size_t bytes) {
    void* memory;
    cuda_check(cudaMalloc(&memory, bytes));
    return memory;
}

static uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

// ---------------------------------------------------------------------------------------------------------------------
// inputs

typedef enum { NORMAL, OCTAVES, GROUP_OCTAVES, ZEROS, SUBNORMALS, FAULTS, TIES, DISTRIBUTIONS } Distribution;
static const char* const distribution_names[] = {"normal",     "octaves", "group octaves", "zeros",
                                                 "subnormals", "faults",  "ties"};

// element i, of a row of `cols`; groups of 32 along the row and of 32 rows share what GROUP_OCTAVES and FAULTS draw
static float draw(Distribution distribution, size_t i, int cols, uint64_t seed) {
    uint64_t z = mix(i * 0x2545F4914F6CDD1Dull + seed), row = i / (size_t)cols, col = i % (size_t)cols;
    uint64_t group = mix((row / 32) * 1000003 + col / 32 + seed * 77);
    float u = (float)((z & 0xffffff) + 1) * 0x1p-24f, v = (float)(z >> 40) * 0x1p-23f;
    float x = sqrtf(-2.0f * logf(u)) * cosf(3.14159265f * v);
    switch (distribution) {
    case OCTAVES: return ldexpf(x, (int)(mix(z) % 41) - 20);
    case GROUP_OCTAVES: return ldexpf(x, (int)(group % 41) - 30);
    case ZEROS: return group % 4 == 0 ? x : z >> 20 & 1 ? 0.0f : -0.0f;
    case SUBNORMALS: return group % 8 == 0 ? ldexpf(x, -118) : ldexpf(x, group % 8 < 4 ? -128 : -134);
    case FAULTS: return group % 5 || mix(z) % 64 ? x : group % 3 == 0 ? INFINITY : group % 3 == 1 ? -NAN : 3.3e38f;
    case TIES: return (float)((int)(z >> 20 & 31) - 16) * ldexpf(0.25f, (int)(group % 9) - 4);
    default: return x;
    }
}

static void fill(floatX* x, size_t count, int cols, Distribution distribution, uint64_t seed) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < (int64_t)count; i++) {
        x[i] = f32_to_floatX(draw(distribution, (size_t)i, cols, seed));
    }
}

// a packed operand that no quantizer made: any codes, scales within `spread` octaves of 2^centre; spread 255: any byte
static void fill_packed(QTensor* q, int centre, int spread, uint64_t seed) {
    size_t groups = (size_t)q->rows * q->cols / GROUP;
    for (size_t g = 0; g < groups; g++) {
        uint64_t z = mix(g + seed), row = mix(g * GROUP / (size_t)q->cols + seed);
        for (int i = 0; i < 16; i++) {
            q->codes[g * 16 + (size_t)i] = row % 37 == 0 ? (uint8_t)(z & 0x88) : (uint8_t)(mix(z + (uint64_t)i) >> 9);
        }
        q->scales[g] = (uint8_t)(spread == 255 ? z >> 30 : 127 + centre - z % (uint64_t)(spread + 1));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// cases

typedef struct {
    const char* name;
    ScaleRule scale;
    Rotation rotation;
    Source source;
    int transposed;
    Format carrier;
    int row_base;
} Case;

static const Case cases[] = {
    {"x, w", SCALE_QUEST, ROTATE_HADAMARD, SOURCE_TENSOR, 0, FORMAT_E4M3, 0},
    {"dy", SCALE_ABSMAX, ROTATE_SIGNED, SOURCE_TENSOR, 0, FORMAT_E5M2, 1},
    {"dyt", SCALE_ABSMAX, ROTATE_SIGNED, SOURCE_TENSOR, 1, FORMAT_E5M2, 0},
    {"wt, xt", SCALE_ABSMAX, ROTATE_SIGNED, SOURCE_SAVED, 1, FORMAT_E4M3, 0},
    {"absmax plain, row base", SCALE_ABSMAX, ROTATE_NONE, SOURCE_TENSOR, 0, FORMAT_E4M3, 1},
    {"absmax signed", SCALE_ABSMAX, ROTATE_SIGNED, SOURCE_TENSOR, 0, FORMAT_E4M3, 0},
    {"absmax plain", SCALE_ABSMAX, ROTATE_NONE, SOURCE_TENSOR, 0, FORMAT_E5M2, 0},
    {"absmax plain transposed", SCALE_ABSMAX, ROTATE_NONE, SOURCE_TENSOR, 1, FORMAT_E4M3, 0},
    {"absmax plain saved", SCALE_ABSMAX, ROTATE_NONE, SOURCE_SAVED, 1, FORMAT_E5M2, 0},
    {"quest transposed", SCALE_QUEST, ROTATE_HADAMARD, SOURCE_TENSOR, 1, FORMAT_E4M3, 0},
    {"quest plain", SCALE_QUEST, ROTATE_NONE, SOURCE_TENSOR, 0, FORMAT_E4M3, 0},
};
enum { CASES = sizeof cases / sizeof cases[0], PATH_CASES = 4 };

static QuantSpec case_spec(const Case* c, Rounding rounding) {
    return QuantSpec{.format = FORMAT_MXFP4, .scale = c->scale, .rotation = c->rotation, .rounding = rounding,
                     .group = GROUP, .source = c->source};
}

static uint64_t test_position = (uint64_t)3 << 32 | 41;

static QuantizeArgs case_args(const Case* c, Rounding rounding, QTensor* out, const floatX* tensor,
                              const QTensor* saved, const uint64_t* position) {
    return QuantizeArgs{.out = out, .spec = case_spec(c, rounding), .tensor = tensor, .saved = saved,
                        .transposed = c->transposed, .seed = 0x123456789abcull,
                        .sign_stream = (uint64_t)RAND_SIGNS << 60 | (uint64_t)7 << 48, .sign_index = 5ull << 56,
                        .round_stream = (uint64_t)RAND_ROUND << 60 | (uint64_t)7 << 48, .round_index = 9ull << 56,
                        .position = position, .stats = NULL,
                         .row_under = NULL, .again = 0};
}

static QTensor operand_new(int rows, int cols) {
    QuantSpec spec = case_spec(&cases[0], ROUND_NEAREST);
    return qtensor_at(&spec, rows, cols, calloc_or_die(qtensor_bytes(&spec, rows, cols), "an operand"));
}

// ---------------------------------------------------------------------------------------------------------------------
// host

// codes of sums times 1/sqrt(32), or 3/4 of that, without those products: 1 where one differs from the definition's
static int sum_codes_wrong(float x, uint64_t random) {
    float sums[GROUP], rotated = mul_rn(x, HADAMARD_SCALE), value = mul_rn(rotated, 0.75f);
    PhiloxKeys keys = philox_keys(random);
    uint32_t nearest = f32_to_e2m1(value), quest = f32_to_e2m1(rotated), bits = f32_bits(x);
    GroupTops tops;
    for (int k = 0; k < GROUP; k++) {
        sums[k] = k % 2 ? x : -x;
    }
    int wrong = 0;
    if (fabsf(value) < 6.0f) {
        tops_absmax_nearest(&tops, sums, 127);
        wrong |= tops_codes(&tops, 3) != (nearest * 0x11111111u ^ 0x08080808u);
        Philox p = philox(random, 3, 9);
        tops_absmax_stochastic(&tops, sums, 127, &keys, 0, 9);
        for (int k = 0; k < 8; k++) {
            uint32_t want = f32_to_e2m1_stochastic(k % 2 ? value : -value, p.w[k / 2] >> (k % 2 * 16) & 0xffffu);
            wrong |= (tops_codes(&tops, 3) >> (4 * k) & 15u) != want;
            float saved = saved_stochastic(k % 2 ? value : -value, 1.0f, p.w[k / 2], k % 2);
            wrong |= saved != e2m1_to_f32(want);
        }
        if ((bits & ((1u << (24 - SAVED_BITS)) - 1)) == 0) {
            wrong |= saved_nearest(x * 0x1p19f, 0x1.4p22f) != e2m1_to_f32(nearest);
            wrong |= saved_nearest(-x * 0x1p19f, 0x1.4p22f) != e2m1_to_f32(nearest ^ 8u);
        }
    }
    uint32_t mask = tops_quest(&tops, sums, 127);
    wrong |= tops_codes(&tops, 3) != (quest * 0x11111111u ^ 0x08080808u) || mask != (fabsf(rotated) < 6.0f ? ~0u : 0u);
    return wrong;
}

// the carrier's bytes of any codes, from the table and from the values
static void host_bytes(void) {
    int64_t wrong = 0;
    for (uint64_t i = 0; i < 200000; i++) {
        float v[GROUP], again[GROUP];
        uint32_t bytes[GROUP / 4], want[GROUP / 4], scale = mix(i) % 255;
        int base = (int)scale - 127 + (int)(mix(i + 77) % (i % 2 ? 300 : 40)) - 20;
        Format carrier = i % 4 < 2 ? FORMAT_E4M3 : FORMAT_E5M2;
        GroupTops tops;
        for (int k = 0; k < GROUP; k++) {
            v[k] = mul_rn(e2m1_to_f32(mix(32 * i + (uint64_t)k) >> 40 & 15u), CODE_UNIT);
        }
        tops_from_values(&tops, v);
        tops_values(again, &tops);
        tops_carry(bytes, &tops, scale, base, carrier);
        carrier_pack<GROUP>(want, v, carrier_factor(scale, base, CODE_UNIT_LOG2), carrier);
        wrong += memcmp(bytes, want, sizeof bytes) != 0 || memcmp(v, again, sizeof v) != 0;
        wrong += tops_codes(&tops, 0) != codes_pack(v) || tops_codes(&tops, 3) != codes_pack(v + 24);
    }
    report(wrong == 0, "bytes: %lld groups differ", (long long)wrong);
}

static void host_rounding(void) {
    int64_t wrong = 0, wrong_product = 0, wrong_random = 0, wrong_pack = 0;
    const uint32_t end = f32_bits(64.0f);
#pragma omp parallel for schedule(static) reduction(+ : wrong, wrong_product, wrong_random, wrong_pack)
    for (uint32_t u = 0; u < end; u++) {
        float x = f32_from_bits(u ^ (u & 1u) << 31);  // every magnitude, odd ones negative
        float q = e2m1_nearest(x, 1.0f, 1);
        uint32_t code = f32_to_e2m1(x);
        wrong += f32_bits(q) != f32_bits(e2m1_to_f32(code));
        if (fabsf(x) <= 6.0f) {
            wrong += f32_bits(e2m1_nearest(x, 1.0f, 0)) != f32_bits(e2m1_to_f32(code));
            wrong += e2m1_nearest_unsigned_zero(x, 1.0f) != e2m1_to_f32(code);
            wrong += f32_bits(e2m1_nearest(x * 0x1p-14f, 0x1p-14f, 1)) != f32_bits(e2m1_to_f32(code) * 0x1p-14f) &&
                     fabsf(x) > 0x1p-100f;
            uint32_t bits = (uint32_t)(mix(u) & 0xffff);
            float r = e2m1_stochastic(x, 1.0f, bits | bits << 16, (int)(u >> 1 & 1));
            wrong_random += f32_bits(r) != f32_bits(e2m1_to_f32(f32_to_e2m1_stochastic(x, bits)));
        }
        if (u >= f32_bits(1.0f) && fabsf(x) < 45.0f) {  // six octaves of a sum
            wrong_product += sum_codes_wrong(x, mix(u));
        }
    }
    for (uint32_t word = 0; word < 65536; word++) {
        float v[8];
        uint32_t codes = word | (uint32_t)mix(word) << 16;
        for (int k = 0; k < 8; k++) {
            v[k] = e2m1_to_f32(codes >> 4 * k & 15u) * CODE_UNIT;
        }
        wrong_pack += codes_pack(v) != codes;
    }
    host_bytes();
    report(wrong == 0, "nearest: %lld of all f32 up to 64 differ", (long long)wrong);
    report(wrong_random == 0, "stochastic: %lld differ", (long long)wrong_random);
    report(wrong_product == 0, "codes of sums: %lld sums have others", (long long)wrong_product);
    report(wrong_pack == 0, "packing: %lld words differ", (long long)wrong_pack);
    for (int e = -160; e < 140; e++) {
        report(power_of_two(e) == ldexpf(1.0f, e > 127 ? 127 : e), "2^%d is %a", e, power_of_two(e));
    }
}

static uint32_t host_half_mul(uint32_t a, uint32_t b) {  // one value; the product is exact in f32
    float x = __half2float(__ushort_as_half((uint16_t)a)), y = __half2float(__ushort_as_half((uint16_t)b));
    return __half_as_ushort(__float2half_rn(x * y));
}

// quantize_saved_mma.cuh, half: the codes of all sums below every largest sum of a group, and the decoded bytes
static void host_half(void) {
    int64_t wrong_codes = 0, wrong_exponents = 0, wrong_decoded = 0;
    for (uint32_t most = 1; most <= HALF_LARGEST; most++) {
        uint32_t largest = __half_as_ushort(__float2half_rn((float)most * 0x1p-9f));
        uint32_t exponent = host_half_mul(largest, HALF_HADAMARD & 0xffffu) & 0x7c00u;
        uint32_t scale = absmax_scale(mul_rn((float)most, HADAMARD_SCALE));
        wrong_exponents += (exponent >> 10) + 119 != scale;  // 2^k is exponent field k + 8, less 2^-9
        for (uint32_t n = 0; n <= most; n++) {
            uint32_t sum = __half_as_ushort(__float2half_rn((float)n * 0x1p-9f));
            uint32_t code = host_half_mul(sum, (HALF_PRODUCT & 0xffffu) - exponent) + (PAIR_HALF & 0xffffu);
            float value = mul_rn(mul_rn((float)n, HADAMARD_SCALE), absmax_factor(scale, 1.0f));
            wrong_codes += (code >> 9 & 15u) != f32_to_e2m1(value);
        }
    }
    for (uint32_t i = 0; i < 65536; i++) {
        uint32_t pair = (i & 255u) | i >> 8 << 16, half[2] = {codes_half<0>(pair), codes_half<1>(pair)};
        for (int k = 0; k < 4; k++) {
            float value = __half2float(__ushort_as_half((uint16_t)(half[k / 2] >> (k % 2 * 16))));
            wrong_decoded += value != e2m1_to_f32(pair >> (k % 2 * 16 + k / 2 * 4) & 15u) * 0x1p-14f;
        }
    }
    report(wrong_exponents == 0, "half: %lld exponents of sums differ", (long long)wrong_exponents);
    report(wrong_codes == 0, "half: %lld codes of sums differ", (long long)wrong_codes);
    report(wrong_decoded == 0, "half: %lld codes are decoded differently", (long long)wrong_decoded);
}

// the group functions over an operand, as the rows and columns kernels call them
static void host_quantize(const QuantizeArgs* args) {
    QTensor* out = args->out;
    uint64_t position = quantize_position(args);
    PhiloxKeys keys = philox_keys(args->seed);
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < (int64_t)out->rows * out->cols / GROUP; g++) {
        int row = (int)(g * GROUP / out->cols), col = (int)(g * GROUP % out->cols);
        uint32_t words[GROUP], mask = ~0u, scale;
        float v[GROUP];
        for (int k = 0; k < GROUP; k++) {
            v[k] = floatX_to_f32(args->transposed ? args->tensor[(size_t)(col + k) * out->rows + row]
                                                  : args->tensor[g * GROUP + k]);
        }
        group_pack<floatX>(words, v);
        if (args->spec.rotation == ROTATE_SIGNED) {
            uint32_t sign = sign_word(args->seed, args->sign_stream | position, args->sign_index, col / GROUP);
            group_flip_signs<floatX>(words, signs_spread<floatX>(sign));
        }
        group_unpack<floatX>(v, words);
        GroupTops tops;
        uint64_t index = args->round_index + (uint64_t)g * (GROUP / 8), stream = args->round_stream | position;
        Rotation rotation = args->spec.rotation;
        if (args->spec.scale == SCALE_QUEST) {
            scale = group_tops<SCALE_QUEST, ROUND_NEAREST>(&tops, &mask, v, rotation, &keys, index, stream);
        } else if (args->spec.rounding == ROUND_STOCHASTIC) {
            scale = group_tops<SCALE_ABSMAX, ROUND_STOCHASTIC>(&tops, &mask, v, rotation, &keys, index, stream);
        } else {
            scale = group_tops<SCALE_ABSMAX, ROUND_NEAREST>(&tops, &mask, v, rotation, &keys, index, stream);
        }
        for (int i = 0; i < 4; i++) {
            uint32_t codes = tops_codes(&tops, i);
            memcpy(out->codes + g * 16 + 4 * i, &codes, 4);
        }
        out->scales[g] = (uint8_t)scale;
        out->mask[g] = mask;
    }
}

static int64_t differing(const void* a, const void* b, size_t bytes) {
    int64_t count = 0;
    for (size_t i = 0; i < bytes; i++) {
        count += ((const uint8_t*)a)[i] != ((const uint8_t*)b)[i];
    }
    return count;
}

static void run_host(void) {
    host_rounding();
    host_half();
    const int rows = 67, cols = 2080;
    size_t count = (size_t)rows * cols;
    floatX* x = (floatX*)malloc_or_die(count * sizeof(floatX), "inputs");
    QTensor a = operand_new(rows, cols), b = operand_new(rows, cols);
    for (int d = 0; d < DISTRIBUTIONS; d++) {
        for (int c = 0; c < CASES; c++) {
            for (int round = 0; round < (cases[c].scale == SCALE_QUEST ? 1 : 2); round++) {
                if (cases[c].source == SOURCE_SAVED) {
                    continue;
                }
                fill(x, count, cases[c].transposed ? rows : cols, (Distribution)d, (uint64_t)d);
                QuantizeArgs want = case_args(&cases[c], (Rounding)round, &a, x, NULL, &test_position), got = want;
                got.out = &b;
                cpu_quantize(&want);
                host_quantize(&got);
                int64_t codes = differing(a.codes, b.codes, count / 2);
                int64_t scales = differing(a.scales, b.scales, count / 32);
                int64_t masks = cases[c].scale == SCALE_QUEST ? differing(a.mask, b.mask, count / 8) : 0;
                report(!codes && !scales && !masks, "host %s, %s, %s: %lld code, %lld scale, %lld mask bytes differ",
                       cases[c].name, distribution_names[d], round ? "sr" : "rtn", (long long)codes, (long long)scales,
                       (long long)masks);
            }
        }
    }
    free(x);
    free(a.mask);
    free(b.mask);
}

// ---------------------------------------------------------------------------------------------------------------------
// check: what the definitions say, from the codes and scales of the CPU

typedef struct { uint8_t* bytes; floatX* values; float* row_scale; CarrierBase base; } Expected;

static int group_largest_exponent(const QTensor* q, size_t group) {
    int any = 0;
    for (int i = 0; i < 16; i++) {
        any |= q->codes[group * 16 + (size_t)i] & 0x77;
    }
    return q->scales[group] == UE8M0_NAN || !any ? CARRIER_NONE : (int)q->scales[group] - 127;
}

static void expected_group(Expected* e, const QTensor* q, size_t group, Format carrier, int base) {
    for (size_t i = group * GROUP; i < (group + 1) * GROUP; i++) {
        uint32_t code = q->codes[i / 2] >> (i % 2 * 4) & 15u, scale = q->scales[group];
        float value = ldexpf(e2m1_to_f32(code), max_int((int)scale - 127 - base, -100));
        uint8_t byte = carrier == FORMAT_E4M3 ? f32_to_e4m3(value) : f32_to_e5m2(value);
        e->bytes[i] = scale == UE8M0_NAN ? 0x7f : byte;
        e->values[i] = f32_to_floatX(e2m1_to_f32(code) * ue8m0_to_f32(scale));
    }
}

static void expect_operand(Expected* e, const QTensor* q, const Case* c) {
    int64_t groups = (int64_t)q->rows * q->cols / GROUP, row_groups = q->cols / GROUP;
    int largest = CARRIER_NONE, under = 0;
#pragma omp parallel for reduction(max : largest)
    for (int64_t g = 0; g < groups; g++) {
        largest = max_int(largest, group_largest_exponent(q, (size_t)g));
    }
    int base = carrier_base(c->carrier, largest);
#pragma omp parallel for reduction(+ : under)
    for (int row = 0; row < q->rows; row++) {
        int row_largest = CARRIER_NONE, use = base;
        for (int64_t g = row * row_groups; g < (row + 1) * row_groups; g++) {
            row_largest = max_int(row_largest, group_largest_exponent(q, (size_t)g));
        }
        use = c->row_base ? carrier_base(c->carrier, row_largest) : base;
        e->row_scale[row] = ldexpf(1.0f, use);
        for (int64_t g = row * row_groups; g < (row + 1) * row_groups; g++) {
            int exponent = group_largest_exponent(q, (size_t)g);
            under += exponent != CARRIER_NONE && exponent - use < carrier_bottom(c->carrier);
            expected_group(e, q, (size_t)g, c->carrier, use);
        }
    }
    e->base = CarrierBase{ldexpf(1.0f, base), base, largest, under};
}

// ---------------------------------------------------------------------------------------------------------------------
// check: one operand on the GPU

enum { MAX_ELEMENTS = 257 * 11264 + 11264 * 64 };

typedef struct {
    floatX *tensor, *d_tensor;
    QTensor saved, d_saved, want, out, d_out;  // host and device
    void *operand, *d_operand;
    float *row_scale, *d_row_scale;
    CarrierBase* d_base;
    uint64_t* d_position;
    QuantStats* d_stats;
    Expected expected;
} Bench;

static QTensor device_operand(void) {
    QTensor q = operand_new(32, 32);
    free(q.mask);
    q.codes = (uint8_t*)device_alloc(MAX_ELEMENTS / 2 + 16);
    q.scales = (uint8_t*)device_alloc(MAX_ELEMENTS / GROUP);
    q.mask = (uint32_t*)device_alloc(MAX_ELEMENTS / 8);
    return q;
}

static Bench bench_new(void) {
    Bench b;
    memset(&b, 0, sizeof b);
    b.tensor = (floatX*)malloc_or_die(MAX_ELEMENTS * sizeof(floatX), "inputs");
    b.d_tensor = (floatX*)device_alloc(MAX_ELEMENTS * sizeof(floatX));
    b.saved = operand_new(1, MAX_ELEMENTS / 32 * 32), b.want = operand_new(1, MAX_ELEMENTS / 32 * 32);
    b.out = operand_new(1, MAX_ELEMENTS / 32 * 32);
    b.d_saved = device_operand(), b.d_out = device_operand();
    b.operand = malloc_or_die(MAX_ELEMENTS * 4, "an operand");
    b.d_operand = device_alloc(MAX_ELEMENTS * 4);
    b.row_scale = (float*)malloc_or_die(65536, "row scales");
    b.d_row_scale = (float*)device_alloc(65536);
    b.d_base = (CarrierBase*)device_alloc(sizeof(CarrierBase));
    b.d_position = (uint64_t*)device_alloc(8);
    b.d_stats = (QuantStats*)device_alloc(sizeof(QuantStats));
    b.expected.bytes = (uint8_t*)malloc_or_die(MAX_ELEMENTS, "bytes");
    b.expected.values = (floatX*)malloc_or_die(MAX_ELEMENTS * sizeof(floatX), "values");
    b.expected.row_scale = (float*)malloc_or_die(65536, "row scales");
    cuda_check(cudaMemcpy(b.d_position, &test_position, 8, cudaMemcpyHostToDevice));
    return b;
}

static void fetch(void* to, const void* from, size_t bytes) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
}

enum Variant { KEEP, BYTES, VALUES, CODES, VARIANTS };
static const char* const variant_names[] = {"codes and bytes", "bytes", "codes and values", "codes"};

static void check_codes(Bench* b, const uint8_t* d_codes, const char* name, int has_mask) {
    size_t count = (size_t)b->want.rows * b->want.cols;
    fetch(b->out.codes, d_codes, count / 2);
    fetch(b->out.scales, b->d_out.scales, count / 32);
    fetch(b->out.mask, b->d_out.mask, count / 8);
    int64_t codes = differing(b->want.codes, b->out.codes, count / 2);
    int64_t scales = differing(b->want.scales, b->out.scales, count / 32);
    int64_t masks = has_mask ? differing(b->want.mask, b->out.mask, count / 8) : 0;
    report(!codes && !scales && !masks, "%s: %lld code, %lld scale, %lld mask bytes differ", name, (long long)codes,
           (long long)scales, (long long)masks);
}

// zero_sign 0: zeros may have any sign
static int64_t differing_bytes(const uint8_t* a, const uint8_t* b, size_t count, int zero_sign) {
    int64_t wrong = 0;
    for (size_t i = 0; i < count; i++) {
        wrong += a[i] != b[i] && (zero_sign || ((a[i] | b[i]) & 0x7f) != 0);
    }
    return wrong;
}

static int64_t differing_values(const floatX* a, const floatX* b, size_t count) {
    int64_t wrong = 0;
    for (size_t i = 0; i < count; i++) {
        float x = floatX_to_f32(a[i]), y = floatX_to_f32(b[i]);
        wrong += memcmp(&a[i], &b[i], sizeof(floatX)) != 0 && !(x != x && y != y);
    }
    return wrong;
}

static Carrier carrier_of(Format format) {
    return Carrier{"test", {format, format, format, format, format, format}, {0, 0, 0, 0, 0, 0}};
}

// runs the operation with a base that was predicted from `predicted`, and again with what it found
static void check_bytes(Bench* b, const Case* c, const QuantizeArgs* args, const char* name, int zero_sign) {
    size_t count = (size_t)b->want.rows * b->want.cols;
    const int predictions[] = {0, 120, -120, 3};
    const CarrierBase* want = &b->expected.base;
    CarrierBase base;
    for (int use = 0; use < (c->row_base ? 1 : 5); use++) {
        if (use < 4) {
            base = CarrierBase{0, 0, predictions[use], 0};
            cuda_check(cudaMemcpyAsync(b->d_base, &base, sizeof base, cudaMemcpyHostToDevice, gpu.stream));
        }
        Carrier carrier = carrier_of(c->carrier);
        carrier_bases_advance(b->d_base, 1, &carrier);
        cuda_check(cudaMemsetAsync(b->d_operand, 0xaa, count, gpu.stream));
        cuda_check(cudaMemsetAsync(b->d_row_scale, 0xaa, 65536, gpu.stream));
        QuantizeArgs counting = *args;
        counting.row_under = c->row_base ? &b->d_base->under : NULL;
        quantize(&counting);
        fetch(b->operand, b->d_operand, count);
        fetch(b->row_scale, b->d_row_scale, sizeof(float) * (size_t)b->want.rows);
        fetch(&base, b->d_base, sizeof base);
        int64_t wrong = differing_bytes(b->expected.bytes, (const uint8_t*)b->operand, count, zero_sign);
        report(wrong == 0, "%s, use %d: %lld bytes of the operand differ", name, use, (long long)wrong);
        if (c->row_base) {
            wrong = differing(b->expected.row_scale, b->row_scale, sizeof(float) * (size_t)b->want.rows);
            report(wrong == 0, "%s: %lld bytes of the row scales differ", name, (long long)wrong);
            report(base.under == want->under, "%s: %d groups under their row's window instead of %d", name, base.under,
                   want->under);
        } else {
            int times = use == 4 ? 2 : 1;  // the last use found the base of the one before
            report(base.scale == want->scale && base.largest == want->largest && base.under == times * want->under &&
                       (use < 4 || base.base == want->base || want->largest == CARRIER_NONE),  // zeros leave it alone
                   "%s, use %d: scale %g, largest %d, under %d instead of %g, %d, %d", name, use, base.scale,
                   base.largest, base.under, want->scale, want->largest, times * want->under);
        }
    }
}

static void check_stats(Bench* b, const QuantizeArgs* args, const QuantStats* want, const char* name) {
    QuantStats got = {0, 0, 0, 0, 0};
    QuantizeArgs with = *args;
    with.stats = b->d_stats;
    cuda_check(cudaMemcpyAsync(b->d_stats, &got, sizeof got, cudaMemcpyHostToDevice, gpu.stream));
    quantize(&with);
    fetch(&got, b->d_stats, sizeof got);
    int ok = got.count == want->count && got.zero == want->zero && got.clipped == want->clipped &&
             fabs(got.error_sq - want->error_sq) <= 1e-9 * want->error_sq &&
             fabs(got.input_sq - want->input_sq) <= 1e-9 * want->input_sq;
    report(ok, "%s: statistics %g %g %g %g %g instead of %g %g %g %g %g", name, got.error_sq, got.input_sq, got.clipped,
           got.zero, got.count, want->error_sq, want->input_sq, want->clipped, want->zero, want->count);
}

// the source is in b->tensor or b->saved, on both sides
static void check_case(Bench* b, const Case* c, int rows, int cols, const char* input, int stats) {
    for (int round = 0; round < (c->scale == SCALE_QUEST ? 1 : 2); round++) {
        QuantStats want_stats = {0, 0, 0, 0, 0};
        b->want.rows = b->d_out.rows = rows;
        b->want.cols = b->d_out.cols = cols;
        b->want.owed = b->d_out.owed = c->scale == SCALE_ABSMAX ? 4.0f / 3.0f : 1.0f;
        QuantizeArgs args = case_args(c, (Rounding)round, &b->want, b->tensor, &b->saved, &test_position);
        args.stats = &want_stats;
        cpu_quantize(&args);
        expect_operand(&b->expected, &b->want, c);
        for (int variant = 0; variant < VARIANTS; variant++) {
            char name[256];
            snprintf(name, sizeof name, "%s (%d, %d) %s %s, %s %s", c->name, rows, cols, input, round ? "sr" : "rtn",
                     variant_names[variant], launch_names[launch]);
            size_t count = (size_t)rows * cols;
            QTensor out = b->d_out;
            out.codes = variant == BYTES ? NULL : out.codes + (variant == CODES ? 4 : 0);  // alignment of 4 is enough
            out.scales = variant == BYTES ? NULL : out.scales;
            out.mask = variant == BYTES || c->scale != SCALE_QUEST ? NULL : out.mask;
            out.operand = variant == CODES ? NULL : b->d_operand;
            out.carrier = variant == VALUES ? FORMAT_FLOATX : c->carrier;
            out.base = variant <= BYTES && !c->row_base ? b->d_base : NULL;
            out.row_scale = variant <= BYTES && c->row_base ? b->d_row_scale : NULL;
            args = case_args(c, (Rounding)round, &out, b->d_tensor, &b->d_saved, b->d_position);
            cuda_check(cudaMemsetAsync(b->d_out.codes, 0xaa, count / 2 + 4, gpu.stream));
            cuda_check(cudaMemsetAsync(b->d_out.scales, 0xaa, count / 32, gpu.stream));
            cuda_check(cudaMemsetAsync(b->d_out.mask, 0xaa, count / 8, gpu.stream));
            if (variant <= BYTES) {
                check_bytes(b, c, &args, name, c->source != SOURCE_SAVED || variant == KEEP);
            } else {
                cuda_check(cudaMemsetAsync(b->d_operand, 0xaa, count * sizeof(floatX), gpu.stream));
                quantize(&args);
            }
            if (variant == VALUES) {
                fetch(b->operand, b->d_operand, count * sizeof(floatX));
                int64_t wrong = differing_values(b->expected.values, (const floatX*)b->operand, count);
                report(wrong == 0, "%s: %lld decoded values differ", name, (long long)wrong);
            }
            if (variant != BYTES) {
                check_codes(b, out.codes, name, c->scale == SCALE_QUEST);
            }
            if (variant == CODES && stats) {
                check_stats(b, &args, &want_stats, name);
            }
        }
    }
}
