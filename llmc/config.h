// config.h: every option once. KNOBS makes the struct, the parser, --help, --print-config and the log's run record.
//
// Sources, the later wins: defaults < model preset < --config FILE < command line. A knob whose default is "auto" is
// filled by the preset or by a rule that says what it chose; until then it holds AUTO_INT, AUTO_REAL or the text
// "auto".
#pragma once
#include "common.h"

#define PROGRAM_VERSION "0.1.0"
#define AUTO_INT INT64_MIN
#define AUTO_REAL (-1e300)

static inline int is_auto_real(double x) { return x == AUTO_REAL; }
static inline int is_auto_text(const char* text) { return !strcmp(text, "auto"); }

// X(kind, name, default, group, values, help). Kinds: COUNT integers, with k M G or 1e9 notation; REAL; TEXT; CHOICE
// one of `values`; SWITCH an option that needs no value.
#define KNOBS(X)                                                                                                      \
    X(TEXT, model, "200m", "Model", "NAME|DIR",                                                                       \
      "preset (see the end of this page) or a folder with an HF config.json")                                         \
    X(CHOICE, recipe, "quartet", "Model", "bf16|fp8|quartet",                                                         \
      "what the linear layers compute: baselines of 16 and 8 bits, or Quartet MXFP4")                                 \
    X(CHOICE, bwd_rounding, "rtn", "Model", "rtn|sr",                                                                 \
      "rounding of the FP4 backward operands: to nearest or stochastic")                                              \
    X(TEXT, bf16_layers, "none", "Model", "none|first:N,last:M",                                                      \
      "blocks at the beginning and the end whose linear layers stay in bf16")                                         \
    X(COUNT, layers, "auto", "Model", "N", "transformer blocks, instead of the preset's")                             \
    X(COUNT, channels, "auto", "Model", "N", "hidden size C")                                                         \
    X(COUNT, heads, "auto", "Model", "N", "query heads")                                                              \
    X(COUNT, kv_heads, "auto", "Model", "N", "key/value heads; fewer than heads is grouped-query attention")          \
    X(COUNT, ffn, "auto", "Model", "N", "width F of the SwiGLU layer")                                                \
    X(COUNT, vocab_size, "auto", "Model", "N", "vocabulary")                                                          \
    X(REAL, rope_theta, "auto", "Model", "X", "base of the rotary position embedding")                                \
    X(COUNT, tied, "auto", "Model", "0|1", "1: the output head shares the embedding's weights")                       \
    X(TEXT, train_data, "", "Data", "FILES", "token shards: a folder, 'glob*.bin' or a comma-separated list")         \
    X(TEXT, val_data, "", "Data", "FILES", "validation shards; if not given, those in the training folder")           \
    X(TEXT, tokenizer, "auto", "Data", "FILE", "tokenizer.json for samples; auto: beside the shards; byte")           \
    X(COUNT, seq_len, "auto", "Data", "TOKENS", "length T of a training sample")                                      \
    X(COUNT, batch_tokens, "auto", "Data", "TOKENS", "tokens of one optimizer step, over all ranks")                  \
    X(COUNT, batch_size, "auto", "Data", "ROWS",                                                                      \
      "samples of one micro-batch on one rank; accumulation follows; auto: what fits and is fast")                    \
    X(COUNT, allow_data_change, "0", "Data", "0|1", "1: resume although the training data changed")                   \
    X(COUNT, steps, "auto", "Schedule", "N", "optimizer steps of the whole run")                                      \
    X(COUNT, tokens, "auto", "Schedule", "N", "the same in tokens (300M, 1e9); 20 per parameter if neither is given") \
    X(REAL, lr, "auto", "Schedule", "X", "peak learning rate")                                                        \
    X(REAL, min_lr_ratio, "0.1", "Schedule", "X", "last learning rate over the peak")                                 \
    X(COUNT, warmup_steps, "auto", "Schedule", "N", "linear warm-up; auto: a tenth of the run")                       \
    X(CHOICE, schedule, "cosine", "Schedule", "cosine|linear|constant|wsd",                                           \
      "decay; wsd holds the peak, decays over the last fifth")                                                        \
    X(REAL, weight_decay, "0.1", "Optimizer", "X", "decoupled, on the 2-D weights of the blocks")                     \
    X(REAL, beta1, "0.9", "Optimizer", "X", "AdamW, first moment")                                                    \
    X(REAL, beta2, "0.95", "Optimizer", "X", "AdamW, second moment")                                                  \
    X(REAL, eps, "1e-8", "Optimizer", "X", "AdamW, added to the root")                                                \
    X(REAL, grad_clip, "1.0", "Optimizer", "X", "largest global gradient norm; 0: no clipping")                       \
    X(CHOICE, grad_dtype, "f32", "Optimizer", "f32|bf16", "gradients of parameters, summed over micro-batches")       \
    X(CHOICE, adam_dtype, "f32", "Optimizer", "f32|bf16",                                                             \
      "bf16: moments in bf16 and no f32 copy of the weights; all three rounded stochastically")                       \
    X(COUNT, max_skips, "10", "Optimizer", "N", "stop (exit 76) after this many non-finite steps in a row")           \
    X(COUNT, seed, "1337", "Run", "N", "weights, sample order, rotation signs and rounding follow from it")           \
    X(TEXT, out, "auto", "Run", "DIR", "output folder; auto: runs/MODEL-RECIPE")                                      \
    X(COUNT, save_every, "1000", "Run", "STEPS", "checkpoint interval; 0: only at the end")                           \
    X(CHOICE, async_save, "auto", "Run", "auto|on|off",                                                               \
      "checkpoints are copied to host memory and written beside training; auto: where memory allows,"             \
      " unless --save-every 0")                                                                                       \
    X(COUNT, keep, "3", "Run", "N", "checkpoints kept, at least 2")                                                   \
    X(TEXT, resume, "auto", "Run", "auto|never|must|PATH",                                                            \
      "continue from the newest valid checkpoint of --out, or begin with PATH's")                                      \
    X(COUNT, val_every, "250", "Run", "STEPS", "validation interval; 0: only at the end")                             \
    X(COUNT, val_batches, "20", "Run", "N", "micro-batches of one validation")                                        \
    X(COUNT, log_every, "10", "Run", "STEPS", "interval of the FP4 telemetry, of one micro-batch; 0: none")            \
    X(COUNT, sample_every, "0", "Run", "STEPS", "interval of sample texts; 0: none")                                  \
    X(TEXT, prompt, "", "Run", "TEXT|ids:1,2|data:N",                                                                 \
      "start of a sample; without --train-data: sample from the checkpoint, stop")                                    \
    X(COUNT, sample_tokens, "128", "Run", "N", "tokens of a sample")                                                  \
    X(REAL, temperature, "0.8", "Run", "X", "of sampling; 0: always the likeliest token")                             \
    X(REAL, max_minutes, "0", "Run", "MINUTES", "save and exit 75 after this time; 0: no limit")                      \
    X(CHOICE, zero, "auto", "Ranks", "auto|0|1",                                                                      \
      "1: optimizer state is divided over ranks (ZeRO-1); 0: every rank holds all of it; auto: 1")                    \
    X(CHOICE, reduce_dtype, "f32", "Ranks", "f32|bf16", "gradients on their way between ranks; f32: as --grad-dtype") \
    X(REAL, nccl_timeout, "120", "Ranks", "SECONDS", "for all GPUs to find each other")                               \
    X(REAL, hang_seconds, "60", "Ranks", "SECONDS",                                                                   \
      "exit 124 when nothing moves for this long and 10 usual steps; 0: wait")                                        \
    X(TEXT, plant, "", "Ranks", "nan|hang:RANK:STEP", "make that fault happen, to see what follows")                  \
    X(CHOICE, device, "auto", "Machine", "auto|cpu|cuda", "who computes")                                             \
    X(CHOICE, carrier, "auto", "Machine", "auto|f32|bf16|fp8|fp4",                                                    \
      "instruction that multiplies quantized operands; f32 on the CPU; fp4: Blackwell, has not run on hardware yet")  \
    X(CHOICE, recompute, "auto", "Machine", "auto|none|norm|ffn|block",                                               \
      "made again in backward: norms, SwiGLU, FP4 of x | also gate+up | whole blocks; auto: the least that fits")      \
    X(CHOICE, saved_int8, "none", "Machine", "none|ffn|all",                                                           \
      "kept for backward as MXINT8 (8 bits, a scale per 32): ffn: gate+up; all: q k v, attention, residuals, too")     \
    X(CHOICE, graphs, "auto", "Machine", "auto|on|off", "CUDA graphs: a step's kernels are launched as one")          \
    X(COUNT, threads, "auto", "Machine", "N", "CPU threads")                                                          \
    X(TEXT, config, "", "Machine", "FILE", "read options from lines `name = value`")                                  \
    X(SWITCH, print_config, "0", "Instead of training", "", "print every option with its value and source, exit")     \
    X(SWITCH, plan, "0", "Instead of training", "",                                                                   \
      "print the memory per rank by class of tensor, exit; nothing is allocated")                                     \
    X(SWITCH, self_test, "0", "Instead of training", "",                                                              \
      "known-answer test of the device's quantizers and products, exit")                                              \
    X(SWITCH, bench, "0", "Instead of training", "", "time the operations and a training step, exit")                 \
    X(SWITCH, version, "0", "Instead of training", "", "print the version, exit")                                     \
    X(SWITCH, help, "0", "Instead of training", "", "print this page, exit")

typedef enum { KNOB_COUNT, KNOB_REAL, KNOB_TEXT, KNOB_CHOICE, KNOB_SWITCH } KnobKind;

#define FIELD_COUNT(name) int64_t name;
#define FIELD_REAL(name) double name;
#define FIELD_TEXT(name) const char* name;
#define FIELD_CHOICE(name) const char* name;
#define FIELD_SWITCH(name) int64_t name;
#define KNOB_FIELD(kind, name, initial, group, values, help) FIELD_##kind(name)
#define KNOB_ENUM(kind, name, initial, group, values, help) ID_##name,
#define KNOB_ROW(kind, name, initial, group, values, help) \
    {KNOB_##kind, #name, initial, group, values, help, offsetof(Config, name)},

enum KnobId { KNOBS(KNOB_ENUM) KNOB_COUNT_ALL };

typedef enum { FROM_DEFAULT, FROM_PRESET, FROM_FILE, FROM_COMMAND_LINE } KnobOrigin;
static const char* const ORIGIN_NAMES[] = {"default", "preset", "file", "command line"};

typedef struct {
    KNOBS(KNOB_FIELD)
    KnobOrigin origin[KNOB_COUNT_ALL];
    char* file_text;  // of --config: knobs point into it
} Config;

typedef struct {
    KnobKind kind;
    const char *name, *initial, *group, *values, *help;
    size_t offset;
} Knob;

static const Knob KNOB_TABLE[] = {KNOBS(KNOB_ROW)};

static inline int64_t* knob_int(const Config* config, int id) {
    return (int64_t*)((char*)config + KNOB_TABLE[id].offset);
}
static inline double* knob_real(const Config* config, int id) {
    return (double*)((char*)config + KNOB_TABLE[id].offset);
}
static inline const char** knob_text(const Config* config, int id) {
    return (const char**)((char*)config + KNOB_TABLE[id].offset);
}

// the option's spelling: underscores become hyphens
static const char* knob_option(int id, char* buffer) {
    const char* name = KNOB_TABLE[id].name;
    size_t i = 0;
    for (; name[i]; i++) {
        buffer[i] = name[i] == '_' ? '-' : name[i];
    }
    buffer[i] = 0;
    return buffer;
}

// the value as text, the way the parser reads it back
static const char* knob_value(const Config* config, int id, char* buffer, size_t bytes) {
    KnobKind kind = KNOB_TABLE[id].kind;
    if (kind == KNOB_TEXT || kind == KNOB_CHOICE) {
        snprintf(buffer, bytes, "%s", *knob_text(config, id));
    } else if (kind == KNOB_REAL) {
        double x = *knob_real(config, id);
        snprintf(buffer, bytes, is_auto_real(x) ? "auto" : "%.10g", x);
    } else {
        int64_t x = *knob_int(config, id);
        snprintf(buffer, bytes, x == AUTO_INT ? "auto" : "%lld", (long long)x);
    }
    return buffer;
}

// ---------------------------------------------------------------------------------------------------------------------
// parsing

// Levenshtein distance of two option names
static int edit_distance(const char* a, const char* b) {
    int row[64];
    int n = (int)strlen(b);
    n = min_int(n, 63);
    for (int j = 0; j <= n; j++) {
        row[j] = j;
    }
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = min_int(change, min_int(row[j], row[j - 1]) + 1);
        }
    }
    return row[n];
}

// id of the knob of that name (hyphens or underscores), or -1
static int knob_find(const char* name) {
    for (int id = 0; id < KNOB_COUNT_ALL; id++) {
        const char *a = KNOB_TABLE[id].name, *b = name;
        while (*a && (*a == *b || (*a == '_' && *b == '-'))) {
            a++, b++;
        }
        if (!*a && !*b) {
            return id;
        }
    }
    return -1;
}

[[noreturn]] static void die_unknown_option(const char* where, const char* name) {
    int best = 0, distance = 1000;
    char buffer[64];
    for (int id = 0; id < KNOB_COUNT_ALL; id++) {
        int d = edit_distance(name, knob_option(id, buffer));
        if (d < distance) {
            best = id, distance = d;
        }
    }
    knob_option(best, buffer);
    if (distance <= 1 + (int)strlen(name) / 3) {
        die(EXIT_USAGE, "%sunknown option --%s; did you mean --%s?", where, name, buffer);
    }
    die(EXIT_USAGE, "%sunknown option --%s; --help lists them all", where, name);
}

// 300M, 1e9, 262144, 4k: an exact integer, or 0 returned
static int parse_count(const char* text, int64_t* value) {
    char* end;
    errno = 0;
    long long exact = strtoll(text, &end, 10);
    if (end != text && *end == 0 && errno == 0) {
        *value = exact;
        return 1;
    }
    errno = 0;
    double x = strtod(text, &end);
    if (end == text || errno == ERANGE || strpbrk(text, "xXnN")) {
        return 0;
    }
    double unit = *end == 'k' || *end == 'K'   ? 1e3
                  : *end == 'M'                ? 1e6
                  : *end == 'B' || *end == 'G' ? 1e9
                  : *end == 'T'                ? 1e12
                                               : 0;
    if (unit > 0) {
        end++;
    }
    x = unit > 0 ? x * unit : x;
    if (*end || !(x >= -9e15 && x <= 9e15) || x != (double)(int64_t)x) {
        return 0;
    }
    *value = (int64_t)x;
    return 1;
}

static int choice_matches(const char* values, const char* value) {
    size_t length = strlen(value);
    for (const char* at = values; at; at = strchr(at, '|') ? strchr(at, '|') + 1 : NULL) {
        size_t word = strcspn(at, "|");
        if (word == length && !strncmp(at, value, length)) {
            return 1;
        }
    }
    return 0;
}

// where: prefix of error messages, empty for the command line. Strings are kept, not copied.
static void knob_set(Config* config, int id, const char* value, KnobOrigin origin, const char* where) {
    const Knob* knob = &KNOB_TABLE[id];
    char option[64];
    knob_option(id, option);
    if (origin < config->origin[id]) {
        return;
    }
    config->origin[id] = origin;
    int automatic = is_auto_text(value) && is_auto_text(knob->initial);
    if (knob->kind == KNOB_TEXT) {
        *knob_text(config, id) = value;
    } else if (knob->kind == KNOB_CHOICE) {
        check_or(choice_matches(knob->values, value), EXIT_USAGE, "%s--%s is '%s', but must be one of %s", where,
                 option, value, knob->values);
        *knob_text(config, id) = value;
    } else if (knob->kind == KNOB_REAL) {
        char* end;
        double x = automatic ? AUTO_REAL : strtod(value, &end);
        check_or(automatic || (end != value && *end == 0 && isfinite(x)), EXIT_USAGE,
                 "%s--%s is '%s', which is not a number such as %s", where, option, value,
                 is_auto_text(knob->initial) ? "3e-4" : knob->initial);
        *knob_real(config, id) = x;
    } else {
        int64_t x = AUTO_INT;
        check_or(automatic || parse_count(value, &x), EXIT_USAGE,
                 "%s--%s is '%s', which is not a whole number (1000, 300M, 1e9 are)", where, option, value);
        check_or(automatic || x >= 0, EXIT_USAGE, "%s--%s is %s, but cannot be negative", where, option, value);
        *knob_int(config, id) = x;
    }
}

// lines `name = value`; # at the start of a line or after a blank starts a comment
static void config_read_file(Config* config, const char* path) {
    char* text = read_file_or_die(path, NULL);
    config->file_text = text;
    int line_number = 0;
    for (char *line = text, *next; line; line = next) {
        line_number++;
        next = strchr(line, '\n');
        if (next) {
            *next++ = 0;
        }
        for (char* at = line; *at; at++) {
            if (*at == '#' && (at == line || strchr(" \t", at[-1]))) {
                *at = 0;
                break;
            }
        }
        line += strspn(line, " \t\r");
        size_t end = strlen(line);
        while (end && strchr(" \t\r", line[end - 1])) {
            line[--end] = 0;
        }
        if (!*line) {
            continue;
        }
        char where[512];
        snprintf(where, sizeof where, "%s:%d: ", path, line_number);
        char* equals = strchr(line, '=');
        check_or(equals, EXIT_USAGE, "%sexpected `name = value`, found '%s'", where, line);
        char* value = equals + 1 + strspn(equals + 1, " \t");
        while (equals > line && strchr(" \t", equals[-1])) {
            equals--;
        }
        *equals = 0;
        const char* name = starts_with(line, "--") ? line + 2 : line;
        int id = knob_find(name);
        if (id < 0) {
            die_unknown_option(where, name);
        }
        check_or(id != ID_config, EXIT_USAGE, "%sa --config file cannot name another one", where);
        knob_set(config, id, value, FROM_FILE, where);
    }
}

static void config_parse_arguments(Config* config, int argc, char** argv) {
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "-h")) {
            config->help = 1;
            continue;
        }
        check_or(starts_with(argv[i], "--") && argv[i][2], EXIT_USAGE,
                 "'%s' is not an option: options are --name value or --name=value; --help lists them", argv[i]);
        char name[64];
        const char *given = argv[i] + 2, *equals = strchr(given, '=');
        size_t length = equals ? (size_t)(equals - given) : strlen(given);
        length = length < sizeof name - 1 ? length : sizeof name - 1;
        memcpy(name, given, length);
        name[length] = 0;
        int id = knob_find(name);
        if (id < 0) {
            die_unknown_option("", name);
        }
        const char* value = equals ? equals + 1 : NULL;
        if (!value && KNOB_TABLE[id].kind == KNOB_SWITCH) {
            value = "1";
        } else if (!value) {
            check_or(i + 1 < argc, EXIT_USAGE, "--%s needs a value (%s)", name, KNOB_TABLE[id].values);
            value = argv[++i];
        }
        knob_set(config, id, value, FROM_COMMAND_LINE, "");
    }
}

// Fill config from defaults, file and command line. Presets come later: they need the model table.
static void config_parse(Config* config, int argc, char** argv) {
    memset(config, 0, sizeof *config);
    for (int id = 0; id < KNOB_COUNT_ALL; id++) {
        knob_set(config, id, KNOB_TABLE[id].initial, FROM_DEFAULT, "");
    }
    config_parse_arguments(config, argc, argv);
    if (config->config[0]) {
        config_read_file(config, config->config);
    }
}

static void config_print_help(FILE* file) {
    fprintf(file,
            "train_llama %s: pretrains Llama models with linear layers in FP4 (Quartet), forward and backward.\n\n"
            "usage: train_llama --model NAME --train-data FILES [--option value ...]\n"
            "Options are --name value or --name=value. Counts take k, M, G (or B) and 1e9 notation.\n",
            PROGRAM_VERSION);
    const char* group = "";
    for (int id = 0; id < KNOB_COUNT_ALL; id++) {
        const Knob* knob = &KNOB_TABLE[id];
        if (strcmp(group, knob->group)) {
            group = knob->group;
            fprintf(file, "\n%s\n", group);
        }
        char option[64], left[128];
        knob_option(id, option);
        snprintf(left, sizeof left, "--%s %s", option, knob->values);
        fprintf(file, "  %-36s %s", left, knob->help);
        if (knob->kind != KNOB_SWITCH && knob->initial[0]) {
            fprintf(file, " [%s]", knob->initial);
        }
        fprintf(file, "\n");
    }
    fprintf(
        file,
        "\nMFU = (6 x parameters of matrices + 6 L T A) x tokens/s / peak: L layers, T --seq-len, A heads x head size; "
        "the\n"
        "  embedding does not count; peak is the GPU's dense bf16 rate from its datasheet, or, where the name is not "
        "known,\n"
        "  the rate of a large cuBLASLt product measured at the start.\n"
        "\nExit codes: 0 done, 1 unexpected, 2 usage, 65 bad data, 66 missing input, 69 no GPU or NCCL,\n"
        "  70 self-test failed, 71 out of memory, 74 input/output, 75 saved: start the same command again,\n"
        "  76 numerics, 77 folder in use, 124 nothing moved.\n"
        "SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit 75; a second Ctrl-C ends at once.\n");
}

// every option in the form that --config reads, with where its value comes from
static void config_print(const Config* config, FILE* file) {
    for (int id = 0; id < KNOB_COUNT_ALL; id++) {
        char value[4096];
        if (KNOB_TABLE[id].kind == KNOB_SWITCH || id == ID_config) {
            continue;
        }
        fprintf(file, "%-18s = %-24s # %s\n", KNOB_TABLE[id].name, knob_value(config, id, value, sizeof value),
                ORIGIN_NAMES[config->origin[id]]);
    }
}
