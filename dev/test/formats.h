// formats.h: tests of llmc/dtypes.h and of MXFP4 packing (section formats), and the comparator that the numeric
// sections share.
#pragma once

// ---------------------------------------------------------------------------------------------------------------------
// random inputs: splitmix64, the generator that dev/ref/README.md describes

static uint64_t test_random(uint64_t* state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// about N(0, 1): four uniform numbers
static double test_normal(uint64_t* state) {
    uint64_t z = test_random(state);
    double sum = 0.0;
    for (int i = 0; i < 4; i++) {
        sum += (double)(z >> 16 * i & 0xffff) - 32767.5;
    }
    return sum / 65536.0 * 1.7320508075688772;
}

static floatX* test_tensor(size_t n, uint64_t seed, double scale) {
    floatX* x = (floatX*)malloc_or_die(n * sizeof(floatX), "test tensor");
    for (size_t i = 0; i < n; i++) {
        x[i] = f32_to_floatX((float)(scale * test_normal(&seed)));
    }
    return x;
}

static double* test_zeros(size_t n) { return (double*)calloc_or_die(n * sizeof(double), "test reference"); }

#define test_free(...) \
    do { void* list[] = {__VA_ARGS__}; test_free_list(list, sizeof list / sizeof list[0]); } while (0)
static void test_free_list(void** list, size_t count) {
    for (size_t i = 0; i < count; i++) {
        free(list[i]);
    }
}

static double* test_double(const floatX* x, size_t n) {
    double* y = test_zeros(n);
    for (size_t i = 0; i < n; i++) {
        y[i] = (double)floatX_to_f32(x[i]);
    }
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// The comparator. A tolerance is counted, not tuned: 2 * (roundings * 2^-24 * size + one rounding to the output's
// type), with sqrt(K) roundings for a sum of K terms, and size what the roundings are relative to: the larger of the
// result and the root of the sum of the squared terms. Below 2^-125 exp is flushed to zero; values there are not
// compared.

#define F32_ROUNDING 5.9604644775390625e-8  // 2^-24
#define NEAR_FLOOR 2.3509887016445750e-38   // 2^-125

typedef struct {
    size_t n;
    double store;  // one rounding to the type of the result
    double *got, *want, *tolerance;
} Near;

static Near near_make(size_t n, double store) {
    Near near = {.n = n, .store = store, .got = test_zeros(n), .want = test_zeros(n), .tolerance = test_zeros(n)};
    return near;
}

static Near near_floatX(const floatX* got, size_t n) {
    Near near = near_make(n, (double)FLOATX_EPSILON);
    for (size_t i = 0; i < n; i++) {
        near.got[i] = (double)floatX_to_f32(got[i]);
    }
    return near;
}

static Near near_f32(const float* got, size_t n) {
    Near near = near_make(n, F32_ROUNDING);
    for (size_t i = 0; i < n; i++) {
        near.got[i] = (double)got[i];
    }
    return near;
}

// error: what the arithmetic before the store can be off
static void near_want_error(Near* near, size_t i, double want, double error) {
    near->want[i] = want;
    near->tolerance[i] = 2.0 * (error + near->store * fabs(want)) + NEAR_FLOOR;
}

static void near_want(Near* near, size_t i, double want, double size, double roundings) {
    near_want_error(near, i, want, roundings * F32_ROUNDING * fmax(fabs(want), size));
}

static size_t near_failures(const Near* near, size_t* worst) {
    size_t failures = 0;
    double most = 0.0;
    for (size_t i = 0; i < near->n; i++) {
        double off = fabs(near->got[i] - near->want[i]) / near->tolerance[i];
        off = off >= 0.0 ? off : INFINITY;  // NaN
        failures += off > 1.0;
        if (off > most) {
            most = off;
            *worst = i;
        }
    }
    return failures;
}

static void near_free(Near* near) {
    free(near->got);
    free(near->want);
    free(near->tolerance);
}

// The comparison, fed three planted errors first: half a percent (4 % in bf16) of the largest element, a sign, a NaN
static void near_expect(Near* near, const char* format, ...) PRINTF_LIKE(2, 3);
static void near_expect(Near* near, const char* format, ...) {
    char what[160];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    size_t worst = 0, largest = 0;
    for (size_t i = 1; i < near->n; i++) {
        largest = fabs(near->want[i]) > fabs(near->want[largest]) ? i : largest;
    }
    double saved = near->got[largest], want = near->want[largest];
    double share = near->store > F32_ROUNDING ? 0.04 : 0.005;
    double planted[3] = {want * (1.0 + share), -want, NAN};
    size_t before = near_failures(near, &worst), seen = 0;
    if (before == 0) {
        for (int i = want == 0.0 ? 2 : 0; i < 3; i++) {
            near->got[largest] = planted[i];
            seen += near_failures(near, &worst) == 1 && worst == largest;
        }
        near->got[largest] = saved;
        expect(seen == (want == 0.0 ? 1 : 3), "%s: a planted error at %zu was not seen", what, largest);
    }
    expect(before == 0, "%s: %zu of %zu elements differ, worst at %zu: %.9g, f64 says %.9g, tolerance %.3g", what,
           before, near->n, worst, near->got[worst], near->want[worst], near->tolerance[worst]);
    near_free(near);
}

// ... and a comparison that must fail, because the reference was made for something else
static void near_expect_far(Near* near, const char* what) {
    size_t worst;
    expect(near_failures(near, &worst) > 0, "%s: this planted error is not seen", what);
    near_free(near);
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16

// nearest bf16 of a finite value, in f64; rint rounds ties to even
static double bf16_by_search(double x) {
    if (x == 0.0) {
        return x;
    }
    int e = ilogb(x);
    e = e < -126 ? -126 : e;
    double y = ldexp(rint(ldexp(x, 7 - e)), e - 7);
    return fabs(y) > 3.3895313892515355e38 ? copysign(INFINITY, x) : y;
}

static int bf16_is_nearest(float x) {
    double got = (double)bf16_to_f32(f32_to_bf16(x)), want = bf16_by_search((double)x);
    return got == want && signbit(got) == signbit(x);
}

static void test_formats_bf16(void) {
    int same = 1, nan = 1, nearest = 1;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        bf16 x = {(uint16_t)bits};
        float value = bf16_to_f32(x);
        same &= f32_bits(value) == bits << 16;
        if (value != value) {
            float again = bf16_to_f32(f32_to_bf16(value));
            float low = f32_from_bits((bits & 0xff80u) << 16 | 1u);  // a NaN whose payload lies in the dropped bits
            float kept = bf16_to_f32(f32_to_bf16(low));
            nan &= again != again && kept != kept && signbit(kept) == signbit(low);
            continue;
        }
        same &= f32_to_bf16(value).bits == bits;
        // the tie with the next code, and the floats on either side of it
        for (uint32_t low = 0x7fff; low <= 0x8001 && !isinf(value); low++) {
            nearest &= bf16_is_nearest(f32_from_bits(bits << 16 | low));
        }
    }
    expect(same, "decode and encode do not restore every bf16");
    expect(nan, "a NaN is lost");
    expect(nearest, "not nearest, ties to even, next to a tie");
    int sweep = 1;
    for (uint64_t bits = 0; bits < 1ull << 32; bits += 4093) {
        float x = f32_from_bits((uint32_t)bits);
        sweep &= !isfinite(x) || bf16_is_nearest(x);
    }
    expect(sweep, "not nearest over all f32");
    expect(f32_to_bf16(INFINITY).bits == 0x7f80 && f32_to_bf16(-INFINITY).bits == 0xff80, "infinity");
    expect(f32_to_bf16(3.4e38f).bits == 0x7f80 && f32_to_bf16(3.3895e38f).bits == 0x7f7f, "overflow");
    expect(f32_to_bf16(-0.0f).bits == 0x8000, "the sign of zero");
    expect(bf16_by_search(1.00390625) == 1.0 && bf16_by_search(1.01171875) == 1.015625, "the search itself at ties");
}

// ---------------------------------------------------------------------------------------------------------------------
// small floats: by brute force over a table that is computed in f64 from the definition

typedef struct {
    const char* name;
    int mantissa, bias, max_code, sign_shift, nan_code;
    uint32_t (*encode)(float);
    float (*decode)(uint32_t);
    double values[128];
} SmallFloat;

static uint32_t small_e4m3_encode(float x) { return f32_to_e4m3(x); }
static uint32_t small_e5m2_encode(float x) { return f32_to_e5m2(x); }
static uint32_t small_ue4m3_encode(float x) { return f32_to_ue4m3(x); }
static uint32_t small_e2m1_encode(float x) { return f32_to_e2m1(x); }
static float small_e4m3_decode(uint32_t code) { return e4m3_to_f32((uint8_t)code); }
static float small_e5m2_decode(uint32_t code) { return e5m2_to_f32((uint8_t)code); }
static float small_ue4m3_decode(uint32_t code) { return ue4m3_to_f32((uint8_t)code); }
static float small_e2m1_decode(uint32_t code) { return e2m1_to_f32(code); }

static void small_fill(SmallFloat* f) {
    for (int code = 0; code <= f->max_code; code++) {
        int exponent = code >> f->mantissa, fraction = code & ((1 << f->mantissa) - 1);
        f->values[code] = exponent ? ldexp(1.0 + ldexp(fraction, -f->mantissa), exponent - f->bias)
                                   : ldexp(fraction, 1 - f->bias - f->mantissa);
    }
}

// nearest magnitude, ties to the even code, saturating
static uint32_t small_search(const SmallFloat* f, float x) {
    double a = fabs((double)x);
    if (x != x) {
        return f->nan_code >= 0 ? (uint32_t)f->nan_code | (uint32_t)(f->sign_shift ? signbit(x) : 0) << 7 : 0u;
    }
    int best = 0;
    for (int code = 1; code <= f->max_code; code++) {
        double d = fabs(a - f->values[code]), least = fabs(a - f->values[best]);
        best = d < least || (d == least && code % 2 == 0) ? code : best;
    }
    best = a >= f->values[f->max_code] ? f->max_code : best;
    int negative = signbit(x) != 0;
    if (!f->sign_shift) {
        return negative ? 0u : (uint32_t)best;
    }
    return (uint32_t)negative << f->sign_shift | (uint32_t)best;
}

static int small_agrees(const SmallFloat* f, float x) {
    return (x != x && f->nan_code < 0) || f->encode(x) == small_search(f, x);
}

static int small_agrees_around(const SmallFloat* f, double at) {
    float x = (float)at, up = nextafterf(x, INFINITY), down = nextafterf(x, -INFINITY);
    return small_agrees(f, x) && small_agrees(f, up) && small_agrees(f, down) && small_agrees(f, -x) &&
        small_agrees(f, -up) && small_agrees(f, -down);
}

static void test_formats_small(SmallFloat* f) {
    small_fill(f);
    int restored = 1, decoded = 1, around = 1, sweep = 1;
    for (int code = 0; code <= f->max_code; code++) {
        for (uint32_t sign = 0; sign <= (f->sign_shift ? 1u : 0u); sign++) {
            uint32_t full = (uint32_t)code | sign << f->sign_shift;
            float value = f->decode(full);
            decoded &= (double)value == (sign ? -f->values[code] : f->values[code]) &&
                (signbit(value) != 0) == (sign != 0);
            restored &= f->encode(value) == full;
        }
        around &= small_agrees_around(f, f->values[code]);
        if (code < f->max_code) {
            around &= small_agrees_around(f, (f->values[code] + f->values[code + 1]) / 2);
        }
    }
    around &= small_agrees_around(f, f->values[f->max_code] * 1.0625) && small_agrees_around(f, f->values[1] * 0.25);
    for (uint64_t bits = 0; bits < 1ull << 32; bits += 4093) {
        sweep &= small_agrees(f, f32_from_bits((uint32_t)bits));
    }
    expect(decoded, "%s: a code does not decode to its definition", f->name);
    expect(restored, "%s: decode and encode do not restore every code", f->name);
    expect(around, "%s: wrong next to a value or a midpoint", f->name);
    expect(sweep, "%s: not nearest over all f32", f->name);
    uint32_t top = (uint32_t)f->max_code;
    expect(f->encode(3.4e38f) == top && f->encode(INFINITY) == top, "%s: does not saturate", f->name);
    expect(f->encode(-INFINITY) == (f->sign_shift ? top | 1u << f->sign_shift : 0u), "%s: -infinity", f->name);
    expect(f->encode(-0.0f) == (f->sign_shift ? 1u << f->sign_shift : 0u), "%s: the sign of zero", f->name);
    if (f->nan_code >= 0) {
        expect((f->encode(NAN) & 0x7fu) == (uint32_t)f->nan_code && isnan(f->decode((uint32_t)f->nan_code)), "%s: NaN",
               f->name);
    }
    // planted: the table of a format with another bias must not fit
    SmallFloat other = *f;
    other.bias++;
    small_fill(&other);
    expect(!small_agrees_around(&other, 1.0) || !small_agrees_around(&other, 1.25), "%s: a wrong bias is not seen",
           f->name);
}

static void test_formats_e5m2_specials(void) {
    expect(isinf(e5m2_to_f32(0x7c)) && e5m2_to_f32(0xfc) == -INFINITY, "e5m2 infinity");
    expect(isnan(e5m2_to_f32(0x7d)) && isnan(e5m2_to_f32(0x7e)) && isnan(e5m2_to_f32(0xff)), "e5m2 NaN");
    expect(isnan(e4m3_to_f32(0xff)) && isnan(ue4m3_to_f32(127)), "e4m3 NaN");
}

// ---------------------------------------------------------------------------------------------------------------------
// stochastic rounding: over all 65536 random numbers

static void test_formats_stochastic(void) {
    const float inputs[] = {0.0f, -0.0f, 1e-30f, 1e-5f, 0.1f, 0.25f, -0.3f, 0.5f, 0.77f, -1.0f, 1.3f, 1.5f, 1.75f,
                            1.99999f, 2.0f, -2.4f, 2.5f, 3.0f, 3.25f, 3.9999f, -4.0f, 4.7f, 5.0f, -5.5f, 5.9999f, 6.0f,
                            7.5f, -100.0f, 0.4999999f};
    for (size_t i = 0; i < sizeof inputs / sizeof inputs[0]; i++) {
        float x = inputs[i];
        double a = fmin(fabs((double)x), 6.0), step = a < 2 ? 0.5 : a < 4 ? 1.0 : 2.0;
        double below = floor(a / step) * step, above = fmin(below + step, 6.0), sum = 0.0;
        int neighbours = 1;
        for (uint32_t r = 0; r < 65536; r++) {
            uint32_t code = f32_to_e2m1_stochastic(x, r);
            double value = (double)e2m1_to_f32(code & 7u);
            neighbours &= (value == below || value == above) && (code >> 3 & 1u) == (signbit(x) ? 1u : 0u);
            sum += value;
        }
        expect(neighbours, "%g rounds to more than its two neighbours", (double)x);
        expect(fabs(sum / 65536.0 - a) <= step / 65536.0, "%g has the mean %.9g", (double)x, sum / 65536.0);
        double biased = sum / 65536.0 + 2.0 * step / 65536.0;
        expect(!(fabs(biased - a) <= step / 65536.0), "a bias of two random numbers is not seen");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// scales and packing

static void test_formats_scales(void) {
    int decoded = 1, inverse = 1;
    for (uint32_t byte = 0; byte < 255; byte++) {
        decoded &= (double)ue8m0_to_f32(byte) == ldexp(1.0, (int)byte - 127);
        inverse &= (double)ue8m0_inverse(byte) == ldexp(1.0, 127 - (int)byte);
    }
    expect(decoded && isnan(ue8m0_to_f32(255)), "ue8m0 to f32");
    expect(inverse && isnan(ue8m0_inverse(255)), "1 / ue8m0");
    int exponent = 1;
    for (uint32_t bits = 1; bits < 1u << 23; bits++) {  // all denormals
        exponent &= f32_biased_exponent(f32_from_bits(bits)) == ilogb((double)f32_from_bits(bits)) + 127;
    }
    expect(exponent, "exponent of a denormal");
    for (uint32_t bits = 1u << 23; bits < 0x7f800000u; bits += 1021) {
        exponent &= f32_biased_exponent(f32_from_bits(bits)) == ilogb((double)f32_from_bits(bits)) + 127;
    }
    for (int e = -149; e < 128; e++) {
        float power = (float)ldexp(1.0, e), below = nextafterf(power, 0.0f), above = nextafterf(power, INFINITY);
        exponent &= f32_biased_exponent(power) == e + 127;
        exponent &= below == 0.0f || f32_biased_exponent(below) == ilogb((double)below) + 127;
        exponent &= f32_biased_exponent(above) == ilogb((double)above) + 127;
    }
    expect(exponent, "exponent of a normal number or next to a power of two");
}

// every scale with every code: packed by the quantizer's store, decoded one by one and in bulk, and encoded again
static void test_formats_packing(void) {
    QuantSpec spec = {.format = FORMAT_MXFP4, .scale = SCALE_ABSMAX, .rotation = ROTATE_NONE, .rounding = ROUND_NEAREST,
                      .group = 32, .source = SOURCE_TENSOR};
    const int rows = 256, cols = 32;
    void* memory = malloc_or_die(qtensor_bytes(&spec, rows, cols), "test");
    QTensor q = qtensor_at(&spec, rows, cols, memory);
    for (int r0 = 0; r0 < rows; r0 += TILE_LANES) {
        Tile tile;
        for (int l = 0; l < TILE_LANES; l++) {
            tile.scale[l] = (uint32_t)(r0 + l);
            tile.mask[l] = ~0u;
            for (int k = 0; k < GROUP; k++) {
                tile.code[k][l] = (uint32_t)(k * 5 + r0 + l) % 16;  // 5 is odd: each code twice
            }
        }
        tile_store(&tile, &q, r0, 0, TILE_LANES);
    }
    const float* bulk = operand_decode(&q, 0);
    const double index_value[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    int exact = 1, same = 1, restored = 1;
    for (int r = 0; r < rows; r++) {
        for (int k = 0; k < cols; k++) {
            uint32_t code = (uint32_t)(k * 5 + r) % 16;
            double want = (code & 8 ? -1.0 : 1.0) * ldexp(index_value[code & 7], r - 127);
            float got = qtensor_decode(&q, r, k);
            float other = bulk[r * cols + k];
            same &= f32_bits(got) == f32_bits(other) || (got != got && other != other);
            if (r == 255) {
                exact &= isnan(got);
                continue;
            }
            exact &= got == (float)want && (signbit(got) != 0) == (code >= 8);
            restored &= !isfinite(got) || f32_to_e2m1(got * ue8m0_inverse((uint32_t)r)) == code;
        }
    }
    expect(exact, "a code with a scale does not decode to its definition");
    expect(same, "the backend's bulk decoding differs");
    expect(restored, "decode and encode do not restore every code under every scale");
    float before = qtensor_decode(&q, 1, 3);
    q.codes[(cols + 3) / 2] ^= 0x10;
    expect(qtensor_decode(&q, 1, 3) != before, "a flipped bit is not seen");
    free(memory);
}

static void test_formats(void) {
    SmallFloat formats[] = {
        {"e4m3", 3, 7, 0x7e, 7, 0x7f, small_e4m3_encode, small_e4m3_decode, {}},
        {"e5m2", 2, 15, 0x7b, 7, 0x7f, small_e5m2_encode, small_e5m2_decode, {}},
        {"ue4m3", 3, 7, 0x7e, 0, 0x7f, small_ue4m3_encode, small_ue4m3_decode, {}},
        {"e2m1", 1, 1, 7, 3, -1, small_e2m1_encode, small_e2m1_decode, {}},
    };
    test_formats_bf16();
    for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++) {
        test_formats_small(&formats[i]);
    }
    test_formats_e5m2_specials();
    test_formats_stochastic();
    test_formats_scales();
    test_formats_packing();
}
