// data.h: tests of llmc/rand.h (section rand) and llmc/data.h (section data).
#pragma once

// ---------------------------------------------------------------------------------------------------------------------
// rand

static int philox_differs(Philox a, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
    return a.w[0] != w0 || a.w[1] != w1 || a.w[2] != w2 || a.w[3] != w3;
}

// philox4x32 10 of kat_vectors in the Random123 distribution
static void test_rand_known_answers(void) {
    expect(!philox_differs(philox(0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8), "zeros");
    expect(!philox_differs(philox(~0ull, ~0ull, ~0ull), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd), "ones");
    Philox pi = philox(0x299f31d0a4093822ull, 0x85a308d3243f6a88ull, 0x0370734413198a2eull);
    expect(!philox_differs(pi, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1), "digits of pi");
    pi.w[3] ^= 1;
    expect(philox_differs(pi, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1), "planted error not seen");
    expect(rand_u64(0, 0, 0) == 0xe169c58d6627e8d5ull, "rand_u64 takes words 0 and 1");
    expect(rand_uniform(0, 0, 0) == (float)(0x6627e8d5u >> 8) / 16777216.0f, "rand_uniform takes the top of word 0");
    expect(rand_stream(RAND_SAMPLE, 0xabc, 0x1234, 0xdeadbeef) == 0x4abc1234deadbeefull, "layout of a stream");
    expect(rand_stream(RAND_SHUFFLE, 4095, 65535, 0xffffffff) == 0x1fffffffffffffffull, "the largest arguments fit");
}

// mean and variance of n normals, in units of their standard errors 1/sqrt(n) and sqrt(2/n)
static double normal_misfit(double scale, double offset) {
    const int count = 100000;
    double sum = 0, sum_squares = 0;
    for (uint64_t i = 0; i < (uint64_t)count; i++) {
        double x = scale * rand_normal(1234, i, rand_stream(RAND_INIT, 0, 3, 0)) + offset;
        sum += x;
        sum_squares += x * x;
    }
    double mean = sum / count, variance = sum_squares / count - mean * mean;
    return fmax(fabs(mean) * sqrt((double)count), fabs(variance - 1.0) * sqrt(count / 2.0));
}

static void test_rand_draws(void) {
    expect(normal_misfit(1.0, 0.0) < 4.0, "mean or variance %.1f standard errors off", normal_misfit(1.0, 0.0));
    expect(normal_misfit(1.0, 0.02) > 4.0, "planted mean not seen");
    expect(normal_misfit(1.03, 0.0) > 4.0, "planted variance not seen");
    // by an independent implementation; the slack is for libm's log and cos
    double x = rand_normal(42, 7, 0);
    expect(fabs(x - 0.559938517966526) < 1e-14, "rand_normal(42, 7, 0) is %.17g", x);
    double sum = 0, smallest = 1, largest = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        double u = rand_uniform(99, i, 5);
        sum += u;
        smallest = fmin(smallest, u);
        largest = fmax(largest, u);
    }
    expect(smallest >= 0 && smallest < 1e-3 && largest > 0.999 && largest < 1, "range %g .. %g", smallest, largest);
    expect(fabs(sum / 1e5 - 0.5) < 4 * sqrt(1.0 / 12 / 1e5), "mean %g", sum / 1e5);
}

// how many of 0 .. n-1 are hit not exactly once; planted: index 0 is mapped to where index 1 goes
static int64_t permutation_faults(uint64_t key, uint64_t stream, int64_t n, int planted) {
    uint8_t* hits = (uint8_t*)calloc_or_die((size_t)n, "hits");
    int64_t faults = 0;
    for (int64_t i = 0; i < n; i++) {
        uint64_t at = permute_index(key, stream, (uint64_t)(planted && i == 0 ? 1 : i), (uint64_t)n);
        if (at < (uint64_t)n) {
            hits[at]++;
        } else {
            faults++;
        }
    }
    for (int64_t i = 0; i < n; i++) {
        faults += hits[i] != 1;
    }
    free(hits);
    return faults;
}

static void test_rand_permutation(void) {
    const int64_t sizes[] = {1, 2, 3, 4, 5, 31, 32, 33, 1000, 65536, 65537};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (uint64_t epoch = 0; epoch < 2; epoch++) {
            uint64_t stream = rand_stream(RAND_SHUFFLE, 0, 0, epoch);
            expect(permutation_faults(77, stream, sizes[i], 0) == 0, "n %lld is no bijection", (long long)sizes[i]);
        }
    }
    expect(permutation_faults(77, 0, 33, 1) == 2, "planted error not seen");
    // by an independent implementation: a resumed run depends on these for ever
    const uint64_t places[2][8] = {{852, 9, 519, 883, 467, 425, 300, 953}, {245, 748, 317, 161, 799, 344, 204, 65}};
    for (int i = 0; i < 16; i++) {
        uint64_t at = permute_index(42, rand_stream(RAND_SHUFFLE, 0, 0, (uint64_t)i / 8), (uint64_t)i % 8, 1000);
        expect(at == places[i / 8][i % 8], "epoch %d, index %d gives %d", i / 8, i % 8, (int)at);
    }
    uint64_t far = permute_index(0x123456789abcdefull, rand_stream(RAND_SHUFFLE, 0, 0, 7), 1, 1000000000000ull);
    expect(far == 840658743139ull, "n 10^12 gives %llu", (unsigned long long)far);
    expect(permute_index(1, 0, ~0ull - 1, ~0ull) < ~0ull, "n 2^64 - 1");
    // Are keys and places independent? Where index 0 goes under 3100 keys: chi-squared of 30 degrees of freedom.
    double expected = 100, chi_squared = 0;
    int hits[31] = {0};
    for (uint64_t key = 0; key < 3100; key++) {
        hits[permute_index(key, 0, 0, 31)]++;
    }
    for (int i = 0; i < 31; i++) {
        chi_squared += (hits[i] - expected) * (hits[i] - expected) / expected;
    }
    expect(chi_squared < 60, "chi-squared %.1f, of which 60 has probability 1e-3", chi_squared);
}

static void run_wide_stream(void* argument) {
    const uint64_t* field = (const uint64_t*)argument;
    rand_stream(RAND_INIT, field[0], field[1], field[2]);
}

static void run_permute_outside(void*) { permute_index(1, 2, 5, 5); }

static void test_rand(void) {
    test_rand_known_answers();
    test_rand_draws();
    test_rand_permutation();
    uint64_t wide[3][3] = {{1u << 12, 0, 0}, {0, 1u << 16, 0}, {0, 0, 1ull << 32}};
    for (int i = 0; i < 3; i++) {
        expect_exit(EXIT_UNEXPECTED, "does not fit", run_wide_stream, wide[i]);
    }
    expect_exit(EXIT_UNEXPECTED, "permute_index of 5 in 5", run_permute_outside, NULL);
}

// ---------------------------------------------------------------------------------------------------------------------
// data: writing shards

static void pwrite_or_die(int fd, const void* memory, size_t bytes, int64_t offset) {
    check(pwrite(fd, memory, bytes, (off_t)offset) == (ssize_t)bytes, "cannot write a test shard: %s", strerror(errno));
}

// a shard of zeros that takes hardly any disk; the count goes into words 3 and 4 if long_count. Returns it open.
static int shard_create(const char* path, int width, int64_t count, int long_count) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    check(fd >= 0, "cannot create '%s': %s", path, strerror(errno));
    int32_t header[256] = {width == 2 ? 20240520 : 20240801, width == 2 ? 1 : 7, (int32_t)count};
    if (long_count) {
        header[2] = -1;
        header[3] = (int32_t)(uint32_t)count;
        header[4] = (int32_t)(count >> 32);
    }
    pwrite_or_die(fd, header, sizeof header, 0);
    check(ftruncate(fd, (off_t)(1024 + count * width)) == 0, "cannot extend '%s': %s", path, strerror(errno));
    return fd;
}

static void shard_put_token(int fd, int width, int64_t position, uint32_t id) {
    pwrite_or_die(fd, &id, (size_t)width, 1024 + position * width);
}

// a shard whose tokens are first, first+1, ...
static void shard_create_counting(const char* folder, const char* name, int width, int count, uint32_t first) {
    char* path = format_string("%s/%s", folder, name);
    int fd = shard_create(path, width, count, 0);
    for (int i = 0; i < count; i++) {
        shard_put_token(fd, width, i, first + (uint32_t)i);
    }
    close(fd);
    free(path);
}

// Four shards for T = 8, token values unique in all of them: a (u16) of 9 samples exactly, b (u32) of 5 samples and 3
// tokens over, c (u32) too small for a sample, d (u16) of 1 sample with a 64-bit count. 15 samples.
enum { SET_T = 8, SET_VOCAB = 400, SET_SAMPLES = 15, SET_SEED = 1337 };
static const int set_count[4] = {9 * SET_T + 1, 5 * SET_T + 1 + 3, SET_T, SET_T + 1};
static const int set_first[4] = {100, 200, 300, SET_VOCAB - SET_T - 1};   // the last token is vocabulary - 1
static const int set_samples[4] = {9, 5, 0, 1};

static char* make_shard_set(void) {
    char* folder = make_temp_folder();
    shard_create_counting(folder, "train_a.bin", 2, set_count[0], (uint32_t)set_first[0]);
    shard_create_counting(folder, "train_b.bin", 4, set_count[1], (uint32_t)set_first[1]);
    shard_create_counting(folder, "train_c.bin", 4, set_count[2], (uint32_t)set_first[2]);
    char* path = format_string("%s/train_d.bin", folder);
    int fd = shard_create(path, 2, set_count[3], 1);
    for (int i = 0; i < set_count[3]; i++) {
        shard_put_token(fd, 2, i, (uint32_t)(set_first[3] + i));
    }
    close(fd);
    free(path);
    return folder;
}

static void open_set(Dataset* dataset, const char* pattern) {
    dataset_open(dataset, pattern, "train", SET_T, SET_VOCAB, SET_SEED);
}

// how many of n token ids differ
static int tokens_differ(const int32_t* a, const int32_t* b, size_t n) {
    int differ = 0;
    for (size_t i = 0; i < n; i++) {
        differ += a[i] != b[i];
    }
    return differ;
}

// ---------------------------------------------------------------------------------------------------------------------
// data: order and content

// Over one epoch, each sample's inputs must come once, as first, first+1, ...; returns the number of faults.
static int epoch_faults(const Dataset* dataset, int64_t epoch, int planted) {
    int32_t inputs[SET_T], targets[SET_T];
    int hits[SET_VOCAB] = {0}, used[SET_VOCAB] = {0}, faults = 0;
    for (int64_t i = 0; i < SET_SAMPLES; i++) {
        data_read(dataset, inputs, targets, epoch * SET_SAMPLES + i, 1);
        inputs[3] += planted && i == 5;
        for (int t = 0; t < SET_T; t++) {
            faults += inputs[t] != inputs[0] + t || targets[t] != inputs[0] + t + 1;
            hits[inputs[t]]++;
            used[inputs[t]] = used[targets[t]] = 1;
        }
    }
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < set_count[k]; i++) {
            faults += hits[set_first[k] + i] != (i < set_samples[k] * SET_T);
            // every token of a shard that is cut without rest serves, its last one as a target
            faults += (k == 0 || k == 3) && !used[set_first[k] + i];
        }
    }
    return faults;
}

static void test_data_epochs(const Dataset* dataset) {
    expect(dataset->shard_count == 4 && dataset->samples == SET_SAMPLES && dataset->fully_scanned, "%d shards, %lld "
           "samples", dataset->shard_count, (long long)dataset->samples);
    expect(dataset->tokens == set_count[0] + set_count[1] + set_count[2] + set_count[3], "tokens");
    for (int k = 0; k < 4; k++) {
        expect(dataset->shards[k].samples == set_samples[k], "samples of shard %d", k);
    }
    for (int64_t epoch = 0; epoch < 4; epoch++) {
        expect(epoch_faults(dataset, epoch, 0) == 0, "epoch %lld does not cover the set once", (long long)epoch);
    }
    expect(epoch_faults(dataset, 0, 1) > 0, "planted token not seen");
    int32_t inputs[2][SET_SAMPLES * SET_T], targets[SET_SAMPLES * SET_T];
    data_read(dataset, inputs[0], targets, 0, SET_SAMPLES);
    data_read(dataset, inputs[1], targets, SET_SAMPLES, SET_SAMPLES);
    expect(tokens_differ(inputs[0], inputs[1], SET_SAMPLES * SET_T), "two epochs have the same order");
    Dataset other = *dataset;
    other.seed++;
    data_read(&other, inputs[1], targets, 0, SET_SAMPLES);
    expect(tokens_differ(inputs[0], inputs[1], SET_SAMPLES * SET_T), "two seeds have the same order");
    // far into a long run, where g and epoch pass 2^31
    expect(epoch_faults(dataset, 4000000000, 0) == 0, "epoch 4e9");
}

// validation: rows in file order, evenly spaced, each once if total is N
static void test_data_even(const Dataset* dataset) {
    int32_t inputs[2 * SET_SAMPLES * SET_T], targets[2 * SET_SAMPLES * SET_T], again[2 * SET_T];
    data_read_even(dataset, inputs, targets, 0, SET_SAMPLES, SET_SAMPLES);
    for (int i = 0; i < SET_SAMPLES; i++) {
        int first = i < 9 ? set_first[0] + i * SET_T : i < 14 ? set_first[1] + (i - 9) * SET_T : set_first[3];
        expect(inputs[i * SET_T] == first && targets[i * SET_T + 7] == first + 8, "row %d", i);
    }
    data_read_even(dataset, inputs, targets, 0, 5, 5);
    for (int i = 0; i < 5; i++) {
        int sample = i * 3;
        int first = sample < 9 ? set_first[0] + sample * SET_T : set_first[1] + (sample - 9) * SET_T;
        expect(inputs[i * SET_T] == first, "row %d of 5 begins %d", i, inputs[i * SET_T]);
    }
    data_read_even(dataset, again, targets, 3, 2, 5);
    expect(tokens_differ(again, inputs + 3 * SET_T, 2 * SET_T) == 0, "rows 3 and 4 of 5 depend on the batch");
    data_read_even(dataset, inputs, targets, 0, 2 * SET_SAMPLES, 2 * SET_SAMPLES);
    expect(inputs[0] == set_first[0] && inputs[SET_T] == set_first[0], "more rows than samples repeat");
}

// Steps 1 .. 3 of 24 samples each, cut into (B, R, A) and read by one loader a rank, against data_read row by row.
// They cross epoch ends (N is 15) and shard borders. Returns the number of wrong tokens.
static int loader_faults(const Dataset* dataset, int B, int R, int A, int planted) {
    int faults = 0;
    int32_t* inputs = (int32_t*)malloc_or_die((size_t)B * SET_T * 4, "inputs");
    int32_t* targets = (int32_t*)malloc_or_die((size_t)B * SET_T * 4, "targets");
    int32_t row_inputs[SET_T], row_targets[SET_T];
    for (int r = 0; r < R; r++) {
        LoaderPlan plan = {.B = B, .rank = r, .ranks = R, .g0 = 24};
        DataLoader* loader = loader_start(dataset, &plan);
        for (int s = 1; s < 4; s++) {
            for (int a = 0; a < A; a++) {
                loader_next(loader, inputs, targets);
                targets[B * SET_T - 1] += planted && s == 2;
                for (int b = 0; b < B; b++) {
                    int64_t g = (int64_t)s * (B * R * A) + a * (B * R) + r * B + b;
                    data_read(dataset, row_inputs, row_targets, g, 1);
                    faults += tokens_differ(inputs + b * SET_T, row_inputs, SET_T);
                    faults += tokens_differ(targets + b * SET_T, row_targets, SET_T);
                }
            }
        }
        loader_stop(loader);
    }
    free(inputs);
    free(targets);
    return faults;
}

static void test_data_loader(const Dataset* dataset) {
    const int cuts[][3] = {{24, 1, 1}, {1, 24, 1}, {1, 1, 24}, {2, 3, 4}, {4, 2, 3}, {3, 8, 1}};
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        int faults = loader_faults(dataset, cuts[i][0], cuts[i][1], cuts[i][2], 0);
        expect(faults == 0, "B %d, R %d, A %d: %d tokens differ", cuts[i][0], cuts[i][1], cuts[i][2], faults);
    }
    expect(loader_faults(dataset, 4, 2, 3, 1) == 2 * 3, "planted tokens not seen");
    // stopping at once, while the thread still reads, and when all slots are full
    LoaderPlan plan = {.B = 3, .rank = 0, .ranks = 1, .g0 = 0};
    loader_stop(loader_start(dataset, &plan));
    DataLoader* loader = loader_start(dataset, &plan);
    usleep(20000);
    loader_stop(loader);
}

// ---------------------------------------------------------------------------------------------------------------------
// data: naming shards

static uint64_t fingerprint_of(const char* pattern, int* shard_count) {
    Dataset dataset;
    open_set(&dataset, pattern);
    uint64_t fingerprint = dataset_fingerprint(&dataset);
    *shard_count = dataset.shard_count;
    dataset_close(&dataset);
    return fingerprint;
}

// number of shards that a folder gives for a split
static int split_shards(const char* folder, const char* split) {
    Dataset dataset;
    dataset_open(&dataset, folder, split, SET_T, SET_VOCAB, 0);
    int count = dataset.shard_count;
    dataset_close(&dataset);
    return count;
}

static void run_split_val(void* folder) { split_shards((const char*)folder, "val"); }
static void run_open_set(void* pattern) {
    Dataset dataset;
    open_set(&dataset, (const char*)pattern);
}

static void test_data_names(char* folder) {
    int count = 0;
    uint64_t whole = fingerprint_of(folder, &count);
    expect(count == 4, "a folder gives %d shards", count);
    char* patterns[3] = {
        format_string("%s/*.bin", folder),
        format_string("%s/", folder),
        format_string("%s/train_[cd].bin,%s/train_b*,%s/train_a.bin", folder, folder, folder),
    };
    for (int i = 0; i < 3; i++) {
        expect(fingerprint_of(patterns[i], &count) == whole && count == 4, "'%s' gives other shards", patterns[i]);
        free(patterns[i]);
    }
    expect_exit(EXIT_NO_INPUT, "named for the other split", run_split_val, folder);
    char* twice = format_string("%s/*.bin,%s/train_b.bin", folder, folder);
    expect_exit(EXIT_USAGE, "train_b.bin' twice", run_open_set, twice);
    free(twice);

    char* mixed = make_temp_folder();   // names as llm.c gives them; no name mentions a split at first
    shard_create_counting(mixed, "text.bin", 2, 50, 0);
    shard_create_counting(mixed, ".hidden.bin", 2, 50, 0);
    shard_create_counting(mixed, "notes.txt", 2, 50, 0);
    expect(split_shards(mixed, "train") == 1 && split_shards(mixed, "val") == 1, "without names, all .bin files");
    shard_create_counting(mixed, "tiny_train.bin", 2, 50, 0);
    shard_create_counting(mixed, "fineweb_train_000001.bin", 2, 50, 0);
    shard_create_counting(mixed, "fineweb_val_000000.bin", 2, 50, 0);
    shard_create_counting(mixed, "interval.bin", 2, 50, 0);
    expect(split_shards(mixed, "train") == 2, "%d train shards", split_shards(mixed, "train"));
    expect(split_shards(mixed, "val") == 1, "%d val shards", split_shards(mixed, "val"));
    remove_folder(mixed);

    // the fingerprint sees names, counts, widths and both ends, and not the folder
    char* moved = make_shard_set();
    expect(fingerprint_of(moved, &count) == whole, "another folder changes the fingerprint");
    char* path = format_string("%s/train_e.bin", moved);
    int fd = shard_create(path, 4, 5000, 0);   // its ends do not overlap
    uint64_t longer = fingerprint_of(moved, &count);
    expect(longer != whole, "another shard is not seen");
    const int ends[2] = {0, 4999};
    for (int i = 0; i < 2; i++) {
        shard_put_token(fd, 4, ends[i], 1);
        expect(fingerprint_of(moved, &count) != longer, "another token %d is not seen", ends[i]);
        shard_put_token(fd, 4, ends[i], 0);
    }
    close(fd);
    expect(fingerprint_of(moved, &count) == longer, "the tokens are back, the fingerprint is not");
    char* renamed = format_string("%s/train_f.bin", moved);   // same order, same length
    expect(rename(path, renamed) == 0 && fingerprint_of(moved, &count) != longer, "another name is not seen");
    free(renamed);
    free(path);
    remove_folder(moved);
}

// ---------------------------------------------------------------------------------------------------------------------
// data: damage

// What is done to a good shard of 100 tokens 0 .. 99, and what opening it with this T and vocabulary then says.
typedef struct {
    int code;
    const char* words;
    int width, T, vocab_size;
    int word;               // header word to overwrite with value; -1 for none
    int32_t value;
    int size_change;        // bytes to add to the file
} Damage;

static const Damage damages[] = {
    {EXIT_DONE,     "",                                        2, 8,  100, -1, 0,        0},
    {EXIT_DONE,     "",                                        4, 8,  100, -1, 0,        0},
    {EXIT_DONE,     "",                                        2, 99, 100, -1, 0,        0},
    {EXIT_BAD_DATA, "not one sample",                          2, 100, 100, -1, 0,       0},
    {EXIT_BAD_DATA, "--seq-len 100 takes 101 tokens",          4, 100, 100, -1, 0,       0},
    {EXIT_BAD_DATA, "token id 99 at position 99",              2, 8,  99,  -1, 0,        0},
    {EXIT_BAD_DATA, "vocabulary of 99: give the --vocab-size", 4, 8,  99,  -1, 0,        0},
    {EXIT_BAD_DATA, "token id 50 at position 50",              4, 8,  50,  -1, 0,        0},
    {EXIT_BAD_DATA, "damaged.bin' is truncated",               2, 8,  100, -1, 0,       -1},
    {EXIT_BAD_DATA, "1424 bytes are expected, and 1423",       4, 8,  100, -1, 0,       -1},
    {EXIT_BAD_DATA, "is too long",                             2, 8,  100, -1, 0,        1},
    {EXIT_BAD_DATA, "1224 bytes are expected, and 1225",       2, 8,  100, -1, 0,        1},
    {EXIT_BAD_DATA, "prepare it again with data/prepare.py",   2, 8,  100, -1, 0,        2},
    {EXIT_BAD_DATA, "a header of 1024 bytes",                  2, 8,  100, -1, 0,       -201},
    {EXIT_BAD_DATA, "the file has 0",                          2, 8,  100, -1, 0,       -1224},
    {EXIT_BAD_DATA, "magic number is 20240521",                2, 8,  100, 0, 20240521,  0},
    {EXIT_BAD_DATA, "version 1, and only version 7",           2, 8,  100, 0, 20240801,  0},   // the twin's magic
    {EXIT_BAD_DATA, "version 7, and only version 1",           2, 8,  100, 1, 7,         0},
    {EXIT_BAD_DATA, "is truncated",                            2, 8,  100, 2, 101,       0},
    {EXIT_BAD_DATA, "is too long",                             4, 8,  100, 2, 99,        0},
    {EXIT_BAD_DATA, "-2 tokens, which cannot be",              2, 8,  100, 2, -2,        0},
    {EXIT_BAD_DATA, "is too long",                             2, 8,  100, 2, -1,        0},   // 64-bit count of 0
};

typedef struct {
    const Damage* damage;
    const char* path;
} DamagedOpen;

static void run_damaged_open(void* argument) {
    const DamagedOpen* open = (const DamagedOpen*)argument;
    Dataset dataset;
    dataset_open(&dataset, open->path, "train", open->damage->T, open->damage->vocab_size, 0);
    dataset_close(&dataset);
}

static void test_data_damage(void) {
    char* folder = make_temp_folder();
    char* path = format_string("%s/damaged.bin", folder);
    for (size_t i = 0; i < sizeof damages / sizeof damages[0]; i++) {
        const Damage* damage = &damages[i];
        shard_create_counting(folder, "damaged.bin", damage->width, 100, 0);
        int fd = open(path, O_RDWR);
        if (damage->word >= 0) {
            pwrite_or_die(fd, &damage->value, 4, damage->word * 4);
        }
        check(ftruncate(fd, 1024 + 100 * damage->width + damage->size_change) == 0, "ftruncate: %s", strerror(errno));
        close(fd);
        DamagedOpen argument = {damage, path};
        expect_exit(damage->code, damage->words, run_damaged_open, &argument);
    }
    // a count whose size in bytes would pass 2^63
    int32_t huge[3] = {-1, 0, 0x40000000};
    shard_create_counting(folder, "damaged.bin", 2, 100, 0);
    int fd = open(path, O_RDWR);
    pwrite_or_die(fd, huge, sizeof huge, 8);
    close(fd);
    expect_exit(EXIT_BAD_DATA, "4611686018427387904 tokens, which cannot be", run_open_set, path);
    // the scan reads in chunks: the last token of the second one
    fd = shard_create(path, 2, 600000, 0);
    shard_put_token(fd, 2, 599999, SET_VOCAB);
    close(fd);
    expect_exit(EXIT_BAD_DATA, "token id 400 at position 599999", run_open_set, path);
    free(path);

    char* missing[] = {
        format_string("%s/nothing.bin", folder),
        format_string("%s/*.bim", folder),
        format_string("%s/damaged.bin,%s/nothing/*.bin", folder, folder),
        format_string("%s/empty", folder),
        strdup_or_die(""),
    };
    check(mkdir(missing[3], 0777) == 0, "mkdir: %s", strerror(errno));
    for (size_t i = 0; i < sizeof missing / sizeof missing[0]; i++) {
        const char* comma = strchr(missing[i], ',');
        char* words = format_string("'%s':", comma ? comma + 1 : missing[i]);
        expect_exit(EXIT_NO_INPUT, words, run_open_set, missing[i]);
        expect_exit(EXIT_NO_INPUT, "data/prepare.py", run_open_set, missing[i]);
        free(words);
        free(missing[i]);
    }
    remove_folder(folder);
}

// Files that go bad after they were checked: reading directly and through the loader's thread must end the process.
static void run_read_all(void* pointer) {
    const Dataset* dataset = (const Dataset*)pointer;
    int32_t inputs[SET_SAMPLES * SET_T], targets[SET_SAMPLES * SET_T];
    data_read(dataset, inputs, targets, 0, SET_SAMPLES);
}

static void run_load_all(void* pointer) {
    LoaderPlan plan = {.B = 1, .rank = 0, .ranks = 1, .g0 = 0};
    int32_t inputs[SET_T], targets[SET_T];
    DataLoader* loader = loader_start((const Dataset*)pointer, &plan);
    for (int i = 0; i < SET_SAMPLES; i++) {
        loader_next(loader, inputs, targets);
    }
    loader_stop(loader);
}

static void test_data_late_damage(char* folder) {
    Dataset dataset;
    open_set(&dataset, folder);
    void (*readers[2])(void*) = {run_read_all, run_load_all};
    char* path = format_string("%s/train_a.bin", folder);
    int fd = open(path, O_RDWR);
    for (int i = 0; i < 2; i++) {
        expect_exit(EXIT_DONE, "", readers[i], &dataset);
        shard_put_token(fd, 2, 70, SET_VOCAB);
        expect_exit(EXIT_BAD_DATA, "train_a.bin' holds token id 400 at position 70", readers[i], &dataset);
        shard_put_token(fd, 2, 70, SET_VOCAB - 1);
        expect_exit(EXIT_DONE, "", readers[i], &dataset);
        check(ftruncate(fd, 1100) == 0, "ftruncate: %s", strerror(errno));
        expect_exit(EXIT_BAD_DATA, "had 1170 bytes at the start and has 1100 now", readers[i], &dataset);
        check(ftruncate(fd, 1170) == 0, "ftruncate: %s", strerror(errno));
    }
    close(fd);
    free(path);
    dataset_close(&dataset);
}

// ---------------------------------------------------------------------------------------------------------------------
// data: files over 4 GiB, counts over 2^31

static void run_open_far(void* pattern) {
    Dataset dataset;
    dataset_open(&dataset, (const char*)pattern, "train", 1024, 50000, 0);
}

static void test_data_far_shard(int width, int64_t count) {
    enum { T = 1024 };
    char* folder = make_temp_folder();
    char* path = format_string("%s/far.bin", folder);
    int fd = shard_create(path, width, count, count > INT32_MAX);
    Dataset dataset;
    dataset_open(&dataset, path, "train", T, 50000, 3);
    expect(dataset.tokens == count && dataset.samples == (count - 1) / T && !dataset.fully_scanned, "%lld tokens, %lld "
           "samples", (long long)dataset.tokens, (long long)dataset.samples);
    // plant tokens in the last sample and in the one that is visited first, and read both back
    int64_t last = dataset.samples - 1, first_visited = dataset_sample_at(&dataset, 0);
    int32_t inputs[T], targets[T];
    for (int i = 0; i <= T; i++) {
        shard_put_token(fd, width, last * T + i, (uint32_t)(40000 + i));
        shard_put_token(fd, width, first_visited * T + i, (uint32_t)(20000 + i));
    }
    expect(last != first_visited && last * T * width > (int64_t)1 << 32, "the test reaches past 4 GiB");
    data_read_even(&dataset, inputs, targets, last, 1, dataset.samples);
    expect(inputs[0] == 40000 && targets[T - 1] == 40000 + T, "last sample %d .. %d", inputs[0], targets[T - 1]);
    data_read(&dataset, inputs, targets, 0, 1);
    expect(inputs[0] == 20000 && targets[T - 1] == 20000 + T, "sample %lld is %d .. %d", (long long)first_visited,
           inputs[0], targets[T - 1]);
    dataset_close(&dataset);
    // the probes at start include the first and the last token
    const int64_t ends[2] = {count - 1, 0};
    for (int i = 0; i < 2; i++) {
        shard_put_token(fd, width, ends[i], 50000);
        char* words = format_string("token id 50000 at position %lld,", (long long)ends[i]);
        expect_exit(EXIT_BAD_DATA, words, run_open_far, path);
        free(words);
        shard_put_token(fd, width, ends[i], 49999);
    }
    expect_exit(EXIT_DONE, "", run_open_far, path);
    close(fd);
    free(path);
    remove_folder(folder);
}

static void test_data(void) {
    char* folder = make_shard_set();
    Dataset dataset;
    open_set(&dataset, folder);
    test_data_epochs(&dataset);
    test_data_even(&dataset);
    test_data_loader(&dataset);
    dataset_close(&dataset);
    test_data_names(folder);
    test_data_damage();
    test_data_late_damage(folder);   // leaves train_a.bin damaged
    remove_folder(folder);
    test_data_far_shard(2, 3000000000);            // a 64-bit count
    test_data_far_shard(4, (5ll << 30) / 4);       // 5 GiB under a 32-bit count
}
