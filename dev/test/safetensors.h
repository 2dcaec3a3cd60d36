// safetensors.h: tests of llmc/xxh64.h and llmc/safetensors.h (section safetensors).
#pragma once
#include <sys/resource.h>

// ---------------------------------------------------------------------------------------------------------------------
// XXH64. The values are those of the Python package xxhash 4.1.0 (xxhash.xxh64(data, seed=seed).hexdigest()).

static void test_xxh64(void) {
    static const struct { size_t bytes; uint64_t seed, checksum; } cases[] = {
        {0, 0, 0xEF46DB3751D8E999ull}, {1000, 0, 0x021F7A7424085EA4ull}, {1000, 20240520, 0x57B86D26BCC3025Dull},
    };
    unsigned char data[1000];
    for (int i = 0; i < 1000; i++) {
        data[i] = (unsigned char)((i * 7 + 3) % 251);
    }
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Xxh64 state = xxh64_begin(cases[i].seed);
        xxh64_update(&state, data, cases[i].bytes);
        expect(xxh64_end(&state) == cases[i].checksum, "%zu bytes, seed %llu: %016llx", cases[i].bytes,
               (unsigned long long)cases[i].seed, (unsigned long long)xxh64_end(&state));
    }
    Xxh64 state = xxh64_begin(0);
    xxh64_update(&state, "a", 1);
    expect(xxh64_end(&state) == 0xD24EC4F1A98C6E5Bull, "\"a\": %016llx", (unsigned long long)xxh64_end(&state));
    xxh64_update(&state, NULL, 0);
    xxh64_update(&state, "bc", 2);  // going on after an end
    expect(xxh64_end(&state) == 0x44BC2CF5AD770999ull, "\"abc\": %016llx", (unsigned long long)xxh64_end(&state));
    for (size_t piece = 1; piece <= 100; piece++) {
        state = xxh64_begin(0);
        for (size_t at = 0; at < 1000; at += piece) {
            xxh64_update(&state, data + at, at + piece <= 1000 ? piece : 1000 - at);
        }
        expect(xxh64_end(&state) == 0x021F7A7424085EA4ull, "in pieces of %zu", piece);
    }
    for (int i = 0; i < 8000; i++) {  // planted: a checksum that misses any single bit is of no use
        data[i / 8] ^= (unsigned char)(1 << i % 8);
        state = xxh64_begin(0);
        xxh64_update(&state, data, 1000);
        expect(xxh64_end(&state) != 0x021F7A7424085EA4ull, "a flipped bit %d is not seen", i);
        data[i / 8] ^= (unsigned char)(1 << i % 8);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// round trip

static void test_safetensors_put(const char* path, const void* data, size_t bytes) {
    FILE* file = fopen_or_die(path, "wb");
    check(fwrite(data, 1, bytes, file) == bytes && fclose(file) == 0, "cannot write '%s': %s", path, strerror(errno));
}

// opens the file and closes it again. 0, or -1 with a text.
static int test_safetensors_try(const char* path, char* error) {
    SafetensorsFile file;
    strcpy(error, "(accepted)");
    int failed = safetensors_open(&file, path, error, SAFETENSORS_ERROR_BYTES);
    if (!failed) {
        safetensors_close(&file);
    }
    expect(failed == 0 || (failed == -1 && strstr(error, path)), "an error without the path: %s", error);
    return failed;
}

// 60 + 8 + 0 + 7 bytes of data: an f32 matrix, an i64 scalar, an empty tensor and 7 bytes
static void test_safetensors_data(unsigned char* data) {
    for (int i = 0; i < 15; i++) {
        float x = 0.5f * (float)i;
        memcpy(data + 4 * i, &x, 4);
    }
    int64_t scalar = -9;
    memcpy(data + 60, &scalar, 8);
    for (int i = 0; i < 7; i++) {
        data[68 + i] = (unsigned char)(i + 1);
    }
}

static void test_safetensors_declare(SafetensorsWriter* writer) {
    static const int64_t matrix[] = {3, 5}, empty[] = {0, 5}, seven[] = {7};
    safetensors_declare(writer, "a\"b\\\n\xC3\xA9", SAFETENSORS_F32, matrix, 2);
    safetensors_declare(writer, "scalar", SAFETENSORS_I64, NULL, 0);
    safetensors_declare(writer, "empty", SAFETENSORS_BF16, empty, 2);
    safetensors_declare(writer, "u8", SAFETENSORS_U8, seven, 1);
}

// writes the sample in pieces of at most `piece` bytes; returns its checksum
static uint64_t test_safetensors_sample(const char* path, size_t piece) {
    unsigned char data[75];
    SafetensorsWriter writer = {};
    int64_t file_bytes, seen_bytes;
    uint64_t checksum, seen;
    char error[SAFETENSORS_ERROR_BYTES];
    test_safetensors_data(data);
    test_safetensors_declare(&writer);
    safetensors_write_begin(&writer, path);
    for (size_t at = 0; at < 75; at += piece) {
        safetensors_write(&writer, data + at, at + piece <= 75 ? piece : 75 - at);
    }
    int failed = safetensors_write_end(&writer, &file_bytes, &checksum);
    expect(!failed, "cannot write: %s", writer.error);
    failed = xxh64_file(&seen, &seen_bytes, path, NULL, error, sizeof error);
    expect(!failed && seen == checksum && seen_bytes == file_bytes, "the file is not what was checksummed");
    return checksum;
}

static void test_safetensors_ranges(const SafetensorsFile* file) {
    char error[SAFETENSORS_ERROR_BYTES] = "";
    const SafetensorsEntry* matrix = safetensors_find(file, "a\"b\\\n\xC3\xA9");
    if (!expect(matrix && matrix->dtype == SAFETENSORS_F32 && matrix->rank == 2 && matrix->count == 15 &&
                matrix->shape[0] == 3 && matrix->shape[1] == 5, "the matrix is not what was declared")) {
        return;
    }
    for (int first = 0; first <= 15; first++) {
        for (int count = 0; first + count <= 15; count++) {
            float* out = (float*)malloc_or_die((size_t)count * 4, "a test");
            int wrong = safetensors_read(file, matrix, out, first, count, error, sizeof error);
            for (int i = 0; i < count; i++) {
                wrong |= out[i] != 0.5f * (float)(first + i);
            }
            expect(!wrong, "elements %d to %d: %s", first, first + count, error);
            free(out);
        }
    }
    static const int64_t outside[][2] = {{0, 16}, {15, 1}, {16, 0}, {-1, 1}, {1, -1}, {1, INT64_MAX}, {INT64_MAX, 1}};
    for (size_t i = 0; i < sizeof outside / sizeof outside[0]; i++) {
        int failed = safetensors_read(file, matrix, NULL, outside[i][0], outside[i][1], error, sizeof error);
        expect(failed == -1 && strstr(error, "which has 15"), "range %zu is read: %s", i, error);
    }
}

static void test_safetensors_round_trip(const char* path) {
    char error[SAFETENSORS_ERROR_BYTES] = "";
    // the file of this checksum was read right by the Python package safetensors 0.8.0, metadata included
    for (size_t piece = 1; piece <= 75; piece++) {
        uint64_t checksum = test_safetensors_sample(path, piece);
        expect(checksum == 0x62DA14CD21457422ull, "pieces of %zu: %016llx", piece, (unsigned long long)checksum);
    }
    SafetensorsFile file;
    if (!expect(safetensors_open(&file, path, error, sizeof error) == 0, "%s", error)) {
        return;
    }
    expect(file.count == 4 && file.data_offset % 8 == 0 && file.file_bytes == 363, "%d tensors", file.count);
    test_safetensors_ranges(&file);
    const SafetensorsEntry* scalar = safetensors_find(&file, "scalar");
    const SafetensorsEntry* empty = safetensors_find(&file, "empty");
    const SafetensorsEntry* last = safetensors_find(&file, "u8");
    int64_t value = 0;
    unsigned char bytes[7] = {0};
    expect(scalar && scalar->rank == 0 && safetensors_read(&file, scalar, &value, 0, 1, error, sizeof error) == 0 &&
           value == -9, "the scalar: %s", error);
    expect(empty && empty->rank == 2 && empty->count == 0 && empty->dtype == SAFETENSORS_BF16 &&
           safetensors_read(&file, empty, bytes, 0, 0, error, sizeof error) == 0, "the empty tensor: %s", error);
    expect(last && safetensors_read(&file, last, bytes, 2, 5, error, sizeof error) == 0 && bytes[0] == 3 &&
           bytes[4] == 7, "the last tensor: %s", error);
    expect(!safetensors_find(&file, "u") && !safetensors_find(&file, "__metadata__"), "found what is not there");
    // a file that shrinks while it is open is an error, not a hang or a fault
    check(truncate(path, 360) == 0, "cannot truncate: %s", strerror(errno));
    int failed = safetensors_read(&file, last, bytes, 0, 7, error, sizeof error);
    expect(failed == -1 && strstr(error, "truncated"), "%s", error);
    safetensors_close(&file);
}

// ---------------------------------------------------------------------------------------------------------------------
// damage

static void test_safetensors_damage(const char* path) {
    char error[SAFETENSORS_ERROR_BYTES];
    uint64_t good = test_safetensors_sample(path, 75), checksum;
    int64_t file_bytes;
    size_t bytes;
    char* text = read_file_or_die(path, &bytes);
    expect(test_safetensors_try(path, error) == 0, "the undamaged file is refused: %s", error);
    for (size_t kept = 0; kept < bytes; kept++) {
        test_safetensors_put(path, text, kept);
        expect(test_safetensors_try(path, error) == -1, "truncated to %zu of %zu bytes and accepted", kept, bytes);
    }
    test_safetensors_put(path, text, bytes + 1);  // the string ends in a zero
    expect(test_safetensors_try(path, error) == -1 && strstr(error, "something follows"), "one byte more: %s", error);
    // A flipped bit of a name or of the padding can leave a valid header, so opening may succeed, but never faults. The
    // checksum sees every one, in the data too.
    int accepted = 0, seen = 0;
    size_t data_begins = bytes - 75;
    for (size_t bit = 0; bit < 8 * bytes; bit++) {
        text[bit / 8] ^= (char)(1 << bit % 8);
        test_safetensors_put(path, text, bytes);
        int opens = test_safetensors_try(path, error) == 0;
        accepted += opens && bit < 8 * data_begins;
        expect(opens || bit < 8 * data_begins, "a flip in the data, bit %zu, cannot be opened: %s", bit, error);
        seen += xxh64_file(&checksum, &file_bytes, path, NULL, error, sizeof error) == 0 && checksum != good;
        text[bit / 8] ^= (char)(1 << bit % 8);
    }
    expect(seen == (int)(8 * bytes), "the checksum sees %d of %zu flipped bits", seen, 8 * bytes);
    expect(accepted < (int)(8 * data_begins) / 4, "%d of %zu flips in the header pass", accepted, 8 * data_begins);
    for (size_t at = 0; at < data_begins; at++) {  // whole bytes, to the values that matter in JSON
        static const char values[] = "\0\"\\{}[]:,-9e \n\xFF";
        for (size_t i = 0; i < sizeof values - 1; i++) {
            char saved = text[at];
            text[at] = values[i];
            test_safetensors_put(path, text, bytes);
            test_safetensors_try(path, error);
            text[at] = saved;
        }
    }
    free(text);
}

// a file of this header and so many bytes of data. claimed: the header length that it states, -1 for the true one.
static void test_safetensors_craft(const char* path, const char* header, int64_t claimed, size_t data_bytes) {
    uint64_t length = claimed == -1 ? strlen(header) : (uint64_t)claimed;
    size_t bytes = 8 + strlen(header) + data_bytes;
    char* text = (char*)calloc_or_die(bytes, "a test");
    memcpy(text, &length, 8);
    memcpy(text + 8, header, strlen(header));
    test_safetensors_put(path, text, bytes);
    free(text);
}

#define TEST_TENSOR(name, dtype, shape, begin, end) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

static void test_safetensors_crafted(const char* path) {
    static const struct { const char* header; size_t data_bytes; const char* error; } cases[] = {
        {"{}", 0, NULL},
        {"{}   ", 0, NULL},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 4) "}", 4, NULL},
        {"{" TEST_TENSOR("b", "F16", "[2]", 4, 8) "," TEST_TENSOR("a", "F8_E4M3", "[2,2]", 0, 4) "}", 8, NULL},
        {"{" TEST_TENSOR("b", "U8", "[4]", 0, 4) "," TEST_TENSOR("e", "F64", "[0]", 0, 0) "}", 4, NULL},
        {"{\"__metadata__\":{\"any\":\"thing\"}}", 0, NULL},
        {"", 0, "expected a value, found the end"},
        {" {}", 0, "does not begin with '{'"},
        {"[]", 0, "does not begin with '{'"},
        {"{} x", 0, "expected nothing after the value"},
        {"{", 0, "expected a key"},
        {"{\"__metadata__\":{\"any\":1}}", 0, "__metadata__ is not an object of strings"},
        {"{\"__metadata__\":\"pt\"}", 0, "__metadata__ is not an object of strings"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 4) "," TEST_TENSOR("a", "U8", "[4]", 4, 8) "}", 8, "a second \"a\""},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 4) "," TEST_TENSOR("b", "U8", "[4]", 3, 7) "}", 7, "they overlap"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 4) "," TEST_TENSOR("b", "U8", "[4]", 0, 4) "}", 4, "they overlap"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 4) "," TEST_TENSOR("b", "U8", "[4]", 5, 9) "}", 9, "there is a gap"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 1, 5) "}", 5, "there is a gap"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 4) "}", 5, "something follows the last tensor"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 4) "}", 3, "the file is truncated"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 5) "}", 5, "needs 4 bytes, but its data_offsets span 5"},
        {"{" TEST_TENSOR("a", "F32", "[4]", 0, 4) "}", 4, "needs 16 bytes, but its data_offsets span 4"},
        {"{" TEST_TENSOR("a", "F4", "[4]", 0, 4) "}", 4, "unknown dtype \"F4\""},
        {"{" TEST_TENSOR("a", "u8", "[4]", 0, 4) "}", 4, "unknown dtype \"u8\""},
        {"{" TEST_TENSOR("a", "U8\\u0000", "[4]", 0, 4) "}", 4, "not described by dtype"},
        {"{" TEST_TENSOR("a\\u0000", "U8", "[4]", 0, 4) "}", 4, "a tensor name has a zero byte"},
        {"{" TEST_TENSOR("a", "U8", "[-4]", 0, 4) "}", 4, "the shape of tensor \"a\""},
        {"{" TEST_TENSOR("a", "U8", "[4.5]", 0, 4) "}", 4, "the shape of tensor \"a\""},
        {"{" TEST_TENSOR("a", "U8", "4", 0, 4) "}", 4, "the shape of tensor \"a\""},
        {"{" TEST_TENSOR("a", "U8", "[1,1,1,1,1,1,1,1,4]", 0, 4) "}", 4, "a list of at most 8 sizes"},
        {"{" TEST_TENSOR("a", "U8", "[4294967296,4294967297]", 0, 4) "}", 4, "too large"},  // 4294967296 modulo 2^64
        {"{" TEST_TENSOR("a", "F64", "[2305843009213693952]", 0, 0) "}", 0, "too large"},   // 2^64 bytes
        {"{" TEST_TENSOR("a", "U8", "[4]", -4, 0) "}", 4, "has no data_offsets"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 4, 0) "}", 4, "has no data_offsets"},
        {"{" TEST_TENSOR("a", "U8", "[4]", 0, 18446744073709551615) "}", 4, "has no data_offsets"},
        {"{" TEST_TENSOR("a", "U8", "[9223372036854775807]", 0, 9223372036854775807) "}", 4, "the file is truncated"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4,4]}}", 4, "has no data_offsets"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4]}}", 4, "not described by dtype, shape, data_offsets"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"x\":1}}", 4, "not described by dtype"},
        {"{\"a\":[]}", 0, "not described by dtype"},
    };
    char error[SAFETENSORS_ERROR_BYTES];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        test_safetensors_craft(path, cases[i].header, -1, cases[i].data_bytes);
        int failed = test_safetensors_try(path, error);
        expect(cases[i].error ? failed && strstr(error, cases[i].error) : !failed, "%s: expected '%s', got '%s'",
               cases[i].header, cases[i].error ? cases[i].error : "(accepted)", error);
    }
    static const int64_t lengths[] = {3, 1000, 100000001, (int64_t)1 << 40, INT64_MAX, INT64_MIN, -8, -2};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        test_safetensors_craft(path, "{}", lengths[i], 0);
        expect(test_safetensors_try(path, error) == -1 && strstr(error, "claims a header of"), "%s", error);
    }
    expect(test_safetensors_try("/nonexistent/x", error) == -1 && strstr(error, "No such file"), "%s", error);
    expect(test_safetensors_try("/tmp", error) == -1 && strstr(error, "not a regular file"), "%s", error);
}

static void test_safetensors_dtypes(const char* path) {
    static const struct { const char* name; SafetensorsDtype dtype; int bytes; } dtypes[] = {
        {"F64", SAFETENSORS_F64, 8}, {"F32", SAFETENSORS_F32, 4}, {"F16", SAFETENSORS_F16, 2},
        {"BF16", SAFETENSORS_BF16, 2}, {"I64", SAFETENSORS_I64, 8}, {"I32", SAFETENSORS_I32, 4},
        {"I16", SAFETENSORS_I16, 2}, {"I8", SAFETENSORS_I8, 1}, {"U8", SAFETENSORS_U8, 1},
        {"BOOL", SAFETENSORS_BOOL, 1}, {"U32", SAFETENSORS_U32, 4}, {"U16", SAFETENSORS_U16, 2},
        {"U64", SAFETENSORS_U64, 8}, {"F8_E4M3", SAFETENSORS_F8_E4M3, 1}, {"F8_E5M2", SAFETENSORS_F8_E5M2, 1},
    };
    static_assert(sizeof dtypes / sizeof dtypes[0] == SAFETENSORS_DTYPES, "a dtype is not tested");
    for (int i = 0; i < SAFETENSORS_DTYPES; i++) {
        char error[SAFETENSORS_ERROR_BYTES] = "";
        int bytes = 3 * dtypes[i].bytes;
        char* header = format_string("{\"a\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[0,%d]}}", dtypes[i].name,
                                     bytes);
        test_safetensors_craft(path, header, -1, (size_t)bytes);
        SafetensorsFile file;
        if (expect(safetensors_open(&file, path, error, sizeof error) == 0, "%s: %s", dtypes[i].name, error)) {
            expect(file.entries[0].dtype == dtypes[i].dtype && file.entries[0].bytes == bytes, "%s", dtypes[i].name);
            safetensors_close(&file);
        }
        free(header);
    }
}

// a large piece of an odd size; then a limit within it, and a file that ends within it
static void test_safetensors_large(const char* path) {
    const int64_t part = (int64_t)8 << 20;
    int64_t shape[] = {3 + 5 * part + 77};
    unsigned char* data = (unsigned char*)malloc_or_die((size_t)shape[0], "a test");
    for (int64_t i = 0; i < shape[0]; i++) {
        data[i] = (unsigned char)(i * 2654435761u >> 13);
    }
    struct rlimit before, limited;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    check(getrlimit(RLIMIT_FSIZE, &before) == 0, "getrlimit: %s", strerror(errno));
    for (int full = 0; full < 2; full++) {
        SafetensorsWriter writer = {};
        int64_t file_bytes = 0;
        uint64_t checksum = 0;
        safetensors_declare(&writer, "large", SAFETENSORS_U8, shape, 1);
        safetensors_write_begin(&writer, path);
        int64_t header = writer.file_bytes;
        limited = before;
        limited.rlim_cur = full ? (rlim_t)(header + 3 + 3 * part) : before.rlim_cur;
        check(setrlimit(RLIMIT_FSIZE, &limited) == 0, "setrlimit: %s", strerror(errno));
        safetensors_write(&writer, data, 3);
        int failed = safetensors_write(&writer, data + 3, (size_t)shape[0] - 3);
        expect(failed == -full, "a limit on the size of a file: %d", failed);
        char error[SAFETENSORS_ERROR_BYTES] = "", at[96];
        expect(safetensors_write_end(&writer, &file_bytes, &checksum) == -full, "%s", writer.error);
        setrlimit(RLIMIT_FSIZE, &before);
        if (full) {
            snprintf(at, sizeof at, "at byte %lld of %lld", (long long)limited.rlim_cur, (long long)(header + shape[0]));
            expect(strstr(writer.error, at) && strstr(writer.error, path), "%s: %s", at, writer.error);
            continue;
        }
        Xxh64 all = xxh64_begin(0);
        size_t bytes;
        char* text = read_file_or_die(path, &bytes);
        xxh64_update(&all, text, bytes);
        expect(file_bytes == header + shape[0] && (size_t)file_bytes == bytes && checksum == xxh64_end(&all) &&
               !memcmp(text + header, data, (size_t)shape[0]), "%zu bytes", bytes);
        free(text);
        SafetensorsFile file;
        unsigned char* back = (unsigned char*)calloc_or_die((size_t)shape[0], "a test");
        check(safetensors_open(&file, path, error, sizeof error) == 0, "%s", error);
        failed = safetensors_read(&file, file.entries, back, 0, shape[0], error, sizeof error);
        expect(!failed && !memcmp(back, data, (size_t)shape[0]), "read again: %s", error);
        int64_t end = header + 3 * part;
        check(truncate(path, end) == 0, "cannot truncate: %s", strerror(errno));
        failed = safetensors_read(&file, file.entries, back, 0, shape[0], error, sizeof error);
        snprintf(at, sizeof at, "ends at byte %lld, where %lld more", (long long)end,
                 (long long)(header + shape[0] - end));
        expect(failed && strstr(error, at), "%s: %s", at, error);
        safetensors_close(&file);
        free(back);
    }
    signal(SIGXFSZ, handler);
    free(data);
}

// the data begin at a multiple of 8 whatever the length of the header
static void test_safetensors_padding(const char* path) {
    for (int length = 1; length <= 16; length++) {
        SafetensorsWriter writer = {};
        SafetensorsFile file;
        int64_t file_bytes;
        uint64_t checksum;
        char name[17] = {0}, error[SAFETENSORS_ERROR_BYTES] = "";
        memset(name, 'n', (size_t)length);
        safetensors_declare(&writer, name, SAFETENSORS_U8, NULL, 0);
        safetensors_write_begin(&writer, path);
        safetensors_write(&writer, "", 1);
        expect(safetensors_write_end(&writer, &file_bytes, &checksum) == 0, "%s", writer.error);
        if (expect(safetensors_open(&file, path, error, sizeof error) == 0, "%s", error)) {
            expect(file.data_offset % 8 == 0, "a name of %d: data at %lld", length, (long long)file.data_offset);
            safetensors_close(&file);
        }
    }
}

// offsets past 2^32, in a sparse file
static void test_safetensors_far(const char* path) {
    const char* header = "{" TEST_TENSOR("far", "F32", "[5,268435456]", 0, 5368709120) "}";
    const int64_t last = 5 * 268435456ll - 1;
    char error[SAFETENSORS_ERROR_BYTES] = "";
    float mark = 1.25f, out[3] = {9, 9, 9};
    test_safetensors_craft(path, header, -1, 0);
    int64_t data_begins = 8 + (int64_t)strlen(header);
    int fd = open(path, O_WRONLY);
    check(fd >= 0 && pwrite(fd, &mark, 4, data_begins + 4 * last) == 4 && close(fd) == 0, "cannot write '%s': %s", path,
          strerror(errno));
    SafetensorsFile file;
    if (expect(safetensors_open(&file, path, error, sizeof error) == 0, "%s", error)) {
        int failed = safetensors_read(&file, &file.entries[0], out, last - 2, 3, error, sizeof error);
        expect(!failed && out[0] == 0 && out[1] == 0 && out[2] == mark, "%g %g %g %s", out[0], out[1], out[2], error);
        safetensors_close(&file);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// failing writes

static void test_safetensors_write_faults(const char* path) {
    static const struct { const char* path; size_t bytes; const char* error; } cases[] = {
        {"/dev/full", 75, "cannot write '/dev/full' at byte 0 of 363: No space left on device"},
        {"/nonexistent/x", 75, "cannot open '/nonexistent/x' for writing: No such file or directory"},
        {NULL, 74, "got 362 of its 363 bytes"},
        {NULL, 76, "gets more than the declared 75 bytes"},
        {NULL, 0, "got 288 of its 363 bytes"},
    };
    char data[76] = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        SafetensorsWriter writer = {};
        int64_t file_bytes;
        uint64_t checksum;
        test_safetensors_declare(&writer);
        int failed = safetensors_write_begin(&writer, cases[i].path ? cases[i].path : path);
        expect(failed == (cases[i].path ? -1 : 0), "begin returns %d", failed);
        failed = safetensors_write(&writer, data, cases[i].bytes);
        expect(failed == (cases[i].path || cases[i].bytes > 75 ? -1 : 0), "write returns %d", failed);
        failed = safetensors_write_end(&writer, &file_bytes, &checksum);
        expect(failed == -1 && strstr(writer.error, cases[i].error), "expected '%s', got '%s'", cases[i].error,
               writer.error);
    }
}

static void test_safetensors_declare_twice(void*) {
    SafetensorsWriter writer = {};
    safetensors_declare(&writer, "same", SAFETENSORS_F32, NULL, 0);
    safetensors_declare(&writer, "same", SAFETENSORS_F32, NULL, 0);
}

static void test_safetensors(void) {
    char* folder = make_temp_folder();
    char* path = format_string("%s/x.safetensors", folder);
    test_xxh64();
    test_safetensors_round_trip(path);
    test_safetensors_damage(path);
    test_safetensors_crafted(path);
    test_safetensors_dtypes(path);
    test_safetensors_large(path);
    test_safetensors_padding(path);
    test_safetensors_far(path);
    test_safetensors_write_faults(path);
    expect_exit(EXIT_UNEXPECTED, "tensor 'same' is declared twice", test_safetensors_declare_twice, NULL);
    free(path);
    remove_folder(folder);
}
