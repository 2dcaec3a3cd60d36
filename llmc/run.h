// run.h: from options to a run: batch arithmetic, length, folders, the plan of memory, the choice of a checkpoint.
#pragma once
#include "checkpoint_save.h"
#include "comm.h"
#include "data.h"
#include "log.h"
#include "schedule.h"
#include "watch.h"
#include <sys/file.h>

typedef struct {
    Config config;
    ModelConfig model_config;
    const Recipe* recipe;
    Comm comm;
    int B, T;                  // rows and length of a micro-batch
    int64_t rows;              // samples of a step on each rank
    int64_t accumulation;      // micro-batches of a step on each rank
    TrainingMemory training;
    int64_t samples_per_step;  // over all ranks
    char* tokenizer_path;      // NULL: none
    Tokenizer* tokenizer;      // NULL: samples are printed as ids
    char* out;
    int lock;                  // file descriptor that holds OUT/lock
} Run;

// ---------------------------------------------------------------------------------------------------------------------
// batch and length

// up to 12 divisors of n, as text
static void divisors_text(char* buffer, size_t bytes, int64_t n) {
    buffer[0] = 0;
    int shown = 0;
    for (int64_t d = 1; d <= n && shown < 12; d++) {
        if (n % d == 0) {
            snprintf(buffer + strlen(buffer), bytes - strlen(buffer), "%s%lld", shown++ ? ", " : "", (long long)d);
        }
    }
}

static void run_resolve_batch(Run* run) {
    Config* c = &run->config;
    int64_t T = c->seq_len, tokens = c->batch_tokens, ranks = run->comm.size;
    check_or(
        tokens > 0 && tokens % (T * ranks) == 0, EXIT_USAGE,
        "--batch-tokens %lld is not a multiple of --seq-len %lld x %lld ranks; %lld and %lld are the nearest that fit; "
        "or start another number of ranks",
        (long long)tokens, (long long)T, (long long)ranks, (long long)max_i64(1, tokens / (T * ranks)) * T * ranks,
        (long long)(tokens / (T * ranks) + 1) * T * ranks);
    run->rows = tokens / T / ranks;
    run->T = (int)T;
    run->samples_per_step = tokens / T;
    int64_t B = c->batch_size;
    char fits[256];
    divisors_text(fits, sizeof fits, run->rows);
    check_or(B == AUTO_INT || (B > 0 && run->rows % B == 0), EXIT_USAGE,
             "--batch-size %lld does not divide the %lld rows a rank has in a step (--batch-tokens %lld / --seq-len "
             "%lld / %lld ranks); these fit: %s",
             (long long)B, (long long)run->rows, (long long)tokens, (long long)T, (long long)ranks, fits);
    check_or(B == AUTO_INT || B * T < INT32_MAX, EXIT_USAGE,
             "--batch-size %lld x --seq-len %lld is beyond 2^31 tokens a micro-batch", (long long)B, (long long)T);
}

static void run_resolve_length(Run* run) {
    Config* c = &run->config;
    check_or(c->steps == AUTO_INT || c->tokens == AUTO_INT || c->tokens == c->steps * c->batch_tokens, EXIT_USAGE,
             "--steps %lld and --tokens %lld say different lengths (--batch-tokens is %lld); give one of them",
             (long long)c->steps, (long long)c->tokens, (long long)c->batch_tokens);
    if (c->tokens != AUTO_INT) {
        c->steps = ceil_div(c->tokens, c->batch_tokens);
    } else if (c->steps == AUTO_INT) {
        ParamTable table = param_table(&run->model_config);
        c->steps = ceil_div((int64_t)(20 * table.block_size * (size_t)run->model_config.L), c->batch_tokens);
        free(table.list);
    }
    check_or(c->steps > 0 && c->steps < (1ll << 32), EXIT_USAGE, "a run of %lld steps is out of range (1 to 2^32)",
             (long long)c->steps);
    c->tokens = c->steps * c->batch_tokens;
    if (c->warmup_steps == AUTO_INT) {
        c->warmup_steps = c->steps / 10;
    }
}

// --bf16-layers: none, or first:N and last:M in any order
static void run_resolve_dense(Run* run) {
    const char *text = run->config.bf16_layers, *at = text;
    int L = run->model_config.L;
    while (strcmp(text, "none") && *at) {
        int last = starts_with(at, "last:"), skip = last ? 5 : 6, used = 0, count = -1;
        int ok = (last || starts_with(at, "first:")) && sscanf(at + skip, "%d%n", &count, &used) == 1 && count >= 0 &&
                 (at[skip + used] == 0 || (at[skip + used] == ',' && at[skip + used + 1]));
        check_or(ok, EXIT_USAGE, "--bf16-layers is '%s', but must be none or as first:1,last:2", text);
        *(last ? &run->training.dense_last : &run->training.dense_first) = count;
        at += skip + used + (at[skip + used] == ',');
    }
    check_or(run->training.dense_first + run->training.dense_last <= L, EXIT_USAGE,
             "--bf16-layers %s names %d blocks, the model has %d", text,
             run->training.dense_first + run->training.dense_last, L);
}

static void run_resolve_training(Run* run) {
    const Config* c = &run->config;
    run_resolve_dense(run);
    int lean = !strcmp(c->adam_dtype, "bf16"), narrow = !strcmp(c->grad_dtype, "bf16");
    check_or(sizeof(floatX) == 2 || (!lean && !narrow), EXIT_USAGE,
             "--adam-dtype bf16 and --grad-dtype bf16 need the build of make PRECISION=BF16; this one computes in f32");
    run->training.grad_type = narrow ? REAL_FLOATX : REAL_F32;
    run->training.moment_type = lean ? REAL_FLOATX : REAL_F32;
    run->training.has_master = !lean;
    int sharded = run->comm.size > 1 && strcmp(c->zero, "0");
    run->training.rank = sharded ? run->comm.rank : 0;
    run->training.ranks = sharded ? run->comm.size : 1;
    check_or(sizeof(floatX) == 2 || strcmp(c->reduce_dtype, "bf16"), EXIT_USAGE,
             "--reduce-dtype bf16 needs the build of make PRECISION=BF16; this one computes in f32");
    for (int i = 0; i < SAVED_INT8_CHOICES; i++) {
        run->training.saved_int8 = strcmp(c->saved_int8, SAVED_INT8_NAMES[i]) ? run->training.saved_int8 : (SavedInt8)i;
    }
}

static void run_check_ranges(const Config* c) {
    check_or(c->lr > 0, EXIT_USAGE, "--lr %g must be positive", c->lr);
    check_or(c->min_lr_ratio >= 0 && c->min_lr_ratio <= 1, EXIT_USAGE, "--min-lr-ratio %g is not within 0 and 1",
             c->min_lr_ratio);
    check_or(c->beta1 >= 0 && c->beta1 < 1 && c->beta2 >= 0 && c->beta2 < 1, EXIT_USAGE,
             "--beta1 %g and --beta2 %g must be at least 0 and below 1", c->beta1, c->beta2);
    check_or(
        c->eps > 0 && c->weight_decay >= 0 && c->grad_clip >= 0 && c->temperature >= 0 && c->max_minutes >= 0,
        EXIT_USAGE,
        "--eps %g must be positive; --weight-decay %g, --grad-clip %g, --temperature %g, --max-minutes %g not negative",
        c->eps, c->weight_decay, c->grad_clip, c->temperature, c->max_minutes);
    check_or(c->nccl_timeout > 0 && c->hang_seconds >= 0, EXIT_USAGE,
             "--nccl-timeout %g must be positive, --hang-seconds %g not negative", c->nccl_timeout, c->hang_seconds);
    check_or(c->keep >= 2, EXIT_USAGE,
             "--keep %lld: at least 2 checkpoints are kept, so that a damaged one has a predecessor",
             (long long)c->keep);
    check_or(c->sample_tokens > 0 && c->val_batches > 0 && c->max_skips > 0, EXIT_USAGE,
             "--sample-tokens, --val-batches and --max-skips must be positive");
    check_or(c->tied == 0 || c->tied == 1, EXIT_USAGE, "--tied is %lld, but must be 0 or 1", (long long)c->tied);
    check_or(c->allow_data_change == 0 || c->allow_data_change == 1, EXIT_USAGE, "--allow-data-change must be 0 or 1");
    check_or(c->threads == AUTO_INT || (c->threads > 0 && c->threads < 65536), EXIT_USAGE,
             "--threads %lld is out of range", (long long)c->threads);
}

// Every automatic choice that needs neither data nor device. `--out auto` becomes runs/MODEL-RECIPE.
static void run_resolve(Run* run) {
    Config* c = &run->config;
    run->model_config = model_config_resolve(c);
    run->recipe = recipe_find(c->recipe);
    check(run->recipe, "internal: --recipe %s is not in the table", c->recipe);
    run_check_ranges(c);
    run_resolve_batch(run);
    run_resolve_training(run);
    run_resolve_length(run);
    if (is_auto_text(c->out)) {
        c->out = format_string("runs/%s-%s", run->model_config.name, c->recipe);
    }
    run->out = strdup_or_die(c->out);
}

// ---------------------------------------------------------------------------------------------------------------------
// what fits: micro-batch and recomputation

// largest number of gradients that travel at once in a narrower type than they lie in; 0: they do not
static size_t run_wire_elements(const Run* run) {
    size_t most = 0;
    ParamTable table = param_table(&run->model_config);
    for (int segment = 0; segment < segment_count(&run->model_config); segment++) {
        most = max_size(most, segment_range(&run->model_config, &table, segment).count);
    }
    free(table.list);
    int narrow = !strcmp(run->config.reduce_dtype, "bf16") && run->training.grad_type == REAL_F32;
    return narrow && run->comm.size > 1 ? most : 0;
}

// bytes on the device that the run allocates
static size_t run_memory(const Run* run, const Ops* ops, int B, TrainingMemory training) {
    Model model;
    training.rank = max_int(1, training.ranks) - 1;  // whose slices are the largest, so that all ranks decide the same
    model_prepare(&model, ops, &run->model_config, run->recipe, training, B, run->T);
    size_t bytes = ops->scratch_bytes(model_largest_operands(&model), attention_shape(&model, B, run->T), 1);
    for (int kind = 0; kind < MEMORY_CLASSES; kind++) {
        bytes += model.memory_bytes[kind];
    }
    model_free_tables(&model);
    return bytes;
}

static int run_fits(const Run* run, const Ops* ops, int64_t B, TrainingMemory training, size_t room) {
    int whole = run->recipe->x.format == FORMAT_FLOATX || B * run->T % GROUP == 0;
    return whole && (room == 0 || run_memory(run, ops, (int)B, training) <= room);
}

// the largest micro-batch of at most `most` rows that divides the step's and fits, or 0
static int64_t run_largest_batch(const Run* run, const Ops* ops, int64_t most, TrainingMemory training, size_t room) {
    for (int64_t B = min_i64(most, run->rows); B > 0; B--) {
        if (run->rows % B == 0 && run_fits(run, ops, B, training, room)) {
            return B;
        }
    }
    return 0;
}

static void advice_add(char* text, size_t bytes, int64_t B, TrainingMemory training) {
    size_t used = strlen(text);
    snprintf(text + used, bytes - used, "%s--batch-size %lld --recompute %s%s%s", used ? "; " : "", (long long)B,
             RECOMPUTE_NAMES[training.recompute], training.has_master ? "" : " --adam-dtype bf16",
             training.grad_type == REAL_F32 ? "" : " --grad-dtype bf16");
}

// what would fit, the nearest to the request first; empty where nothing does
static void run_advise(const Run* run, const Ops* ops, int64_t wanted, size_t room, char* text, size_t bytes) {
    text[0] = 0;
    for (int lean = 0; lean < 3 && !text[0]; lean++) {
        TrainingMemory training = run->training;
        training.has_master = training.has_master && lean < 1;
        training.moment_type = lean < 1 ? training.moment_type : REAL_FLOATX;
        training.grad_type = lean < 2 ? training.grad_type : REAL_FLOATX;
        int64_t last = 0;
        for (int level = 0; level < RECOMPUTE_LEVELS && last < wanted; level++) {
            training.recompute = (Recompute)level;
            int64_t B = run_largest_batch(run, ops, wanted, training, room);
            if (B > last) {
                advice_add(text, bytes, B, training);
                last = B;
            }
        }
    }
}

[[noreturn]] static void die_does_not_fit(const Run* run, const Ops* ops, int64_t B, size_t available, size_t room) {
    char fits[512];
    run_advise(run, ops, B, room, fits, sizeof fits);
    die(EXIT_NO_MEMORY,
        "out of memory: --model %s with --batch-size %lld --recompute %s needs %.1f GiB, %.1f GiB are free on device "
        "%s; "
        "%s%s (--plan lists what takes it)",
        run->model_config.name, (long long)B, RECOMPUTE_NAMES[run->training.recompute],
        (double)run_memory(run, ops, (int)B, run->training) / 1073741824.0, (double)available / 1073741824.0, ops->name,
        fits[0] ? "this fits: " : "no setting of this model fits", fits);
}

// Micro-batch and recomputation, as asked or the best that fits: the least recomputation that leaves a micro-batch of a
// quarter of what keeps the device busy. Where nothing fits: exit 71 and what would; --plan goes on.
static void run_fit(Run* run, const Ops* ops) {
    Config* c = &run->config;
    int any_batch = c->batch_size == AUTO_INT, any_level = is_auto_text(c->recompute);
    size_t available = ops->available_bytes() / (size_t)(ops->shares_memory ? run->comm.local_size : 1);
    available = (size_t)comm_min_of(&run->comm, (int64_t)available);  // all ranks choose the same
    size_t room = available / 100 * 98;
    int64_t most = any_batch ? max_i64(1, (int64_t)ops->micro_tokens / run->T) : c->batch_size;
    int64_t least = any_batch ? 1 : c->batch_size;
    int64_t enough = min_i64(run_largest_batch(run, ops, most, run->training, 0),
                             max_i64(least, (int64_t)ops->micro_tokens / 4 / run->T));
    TrainingMemory training = run->training;
    int64_t best = 0;
    for (int level = 0; level < RECOMPUTE_LEVELS && (best == 0 || best < enough); level++) {
        training.recompute = (Recompute)level;
        if (any_level || !strcmp(c->recompute, RECOMPUTE_NAMES[level])) {
            int64_t B = run_largest_batch(run, ops, most, training, room);
            if (B >= least && B > best) {
                best = B;
                run->training.recompute = training.recompute;
            }
        }
    }
    if (best == 0) {
        best = any_batch ? 1 : c->batch_size;
        while (!any_level && strcmp(c->recompute, RECOMPUTE_NAMES[run->training.recompute])) {
            run->training.recompute = (Recompute)(run->training.recompute + 1);
        }
        if (room > 0 && !c->plan) {
            die_does_not_fit(run, ops, best, available, room);
        }
    }
    int64_t level = run->training.recompute, chosen[] = {best, -best, level, -level};
    comm_max(&run->comm, chosen, 4);
    check_or(chosen[0] == -chosen[1] && chosen[2] == -chosen[3], EXIT_USAGE,
             "the ranks' devices differ: micro-batches of %lld to %lld rows would fit them best; give --batch-size and "
             "--recompute", (long long)-chosen[1], (long long)chosen[0]);
    c->batch_size = best;
    c->recompute = RECOMPUTE_NAMES[run->training.recompute];
    run->B = (int)best;
    run->accumulation = run->rows / best;
    check_or(run->accumulation * run->comm.size < 65536, EXIT_USAGE,
             "%lld micro-batches a step are more than the 65535 that random streams are numbered for; raise "
             "--batch-size",
             (long long)(run->accumulation * run->comm.size));
}

// ---------------------------------------------------------------------------------------------------------------------
// folder

// one run a folder: a lock that the system drops when the process ends, however it ends
static void run_lock(Run* run) {
    make_folder_or_die(run->out);
    char* path = format_string("%s/lock", run->out);
    run->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    check_or(run->lock >= 0, EXIT_IO, "cannot write into --out '%s': %s", run->out, strerror(errno));
    int locked = flock(run->lock, LOCK_EX | LOCK_NB) == 0;
    check_or(locked || errno == EWOULDBLOCK, EXIT_IO,
             "cannot lock '%s': %s; the file system of --out must know flock (NFS with its lock service, Lustre with "
             "-o flock)", path, strerror(errno));
    check_or(locked, EXIT_LOCKED, "another run is using --out '%s'; wait for it, or choose another folder", run->out);
    free(path);
    checkpoint_clean(run->out);
}

// The newest checkpoint in OUT, if a run that began with this same --resume PATH made it: started again, that command
// goes on from there, not from PATH. NULL: there is none.
static char* run_find_begun(const Run* run, Json** state) {
    int damaged, count;
    const char* resume = NULL;
    free(checkpoint_list(run->out, &count));
    if (comm_max_of(&run->comm, count) == 0) {
        return NULL;
    }
    char* found = checkpoint_find(&run->comm, run->out, state, &damaged);
    if (found && json_try_string(json_get(json_get(*state, "options"), "resume"), &resume) == 0 &&
        !strcmp(resume, run->config.resume)) {
        return found;
    }
    json_free(found ? *state : NULL);
    free(found);
    *state = NULL;
    return NULL;
}

// Which checkpoint to continue from: its folder and verified state, or NULL for a fresh run.
static char* run_find_checkpoint(const Run* run, Json** state) {
    const char* resume = run->config.resume;
    int damaged = 0, count = 0;
    char error[1024];
    *state = NULL;
    if (!strcmp(resume, "never")) {
        free(checkpoint_list(run->out, &count));
        check_or(count == 0, EXIT_USAGE,
                 "--resume never, but '%s' holds %d checkpoints; choose another --out or remove them", run->out, count);
        return NULL;
    }
    int path_given = strcmp(resume, "auto") && strcmp(resume, "must");
    if (path_given && run->config.train_data[0]) {
        char* begun = run_find_begun(run, state);
        if (begun) {
            return begun;
        }
    }
    if (path_given) {
        check_or(path_is_folder(resume), EXIT_NO_INPUT,
                 "--resume '%s' is not a folder; auto, never and must are the other choices", resume);
        char* state_path = format_string("%s/state.json", resume);
        int single = path_is_file(state_path);
        free(state_path);
        if (single) {
            *state = checkpoint_verify(&run->comm, resume, error, sizeof error);
            check_or(*state, EXIT_BAD_DATA, "--resume '%s' is not usable: %s", resume, error);
            return strdup_or_die(resume);
        }
    }
    const char* folder = path_given ? resume : run->out;
    char* found = checkpoint_find(&run->comm, folder, state, &damaged);
    check_or(found || damaged == 0, EXIT_BAD_DATA,
             "none of the %d checkpoints in '%s' is usable; --resume never with another --out "
             "starts anew",
             damaged, folder);
    check_or(found || !(path_given || !strcmp(resume, "must")), EXIT_NO_INPUT,
             "--resume %s: there is no checkpoint in '%s'", resume, folder);
    return found;
}

// A run that continues from step `from` writes later checkpoints anew. Those that stand there, damaged or from a way
// not taken, are kept under another name: a committed step is never overwritten.
static void run_set_aside(const Run* run, int64_t from) {
    int count;
    int64_t* steps = checkpoint_list(run->out, &count);
    for (int i = 0; i < count; i++) {
        for (int number = 1; steps[i] > from; number++) {
            char suffix[32];
            snprintf(suffix, sizeof suffix, ".aside-%d", number);
            char *path = checkpoint_path(run->out, steps[i], ""), *aside = checkpoint_path(run->out, steps[i], suffix);
            int taken = path_is_folder(aside);
            check_or(taken || rename(path, aside) == 0, EXIT_IO, "cannot rename '%s': %s", path, strerror(errno));
            if (!taken) {
                printf("resume     '%s' is newer than step %lld: kept as '%s'\n", path, (long long)from, aside);
            }
            free(path);
            free(aside);
            if (!taken) {
                break;
            }
        }
    }
    free(steps);
}

// options that a resumed run must not change: data position and random numbers hang on them; others are reported
static void run_compare_options(const Run* run, const Json* state) {
    static const int fixed[] = {ID_seq_len, ID_batch_tokens, ID_seed};
    static const int silent[] = {ID_out,         ID_resume,    ID_model, ID_train_data, ID_val_data,
                                 ID_max_minutes, ID_config,    ID_keep,  ID_prompt,     ID_tokenizer,
                                 ID_threads,     ID_recompute, ID_graphs, ID_async_save, ID_nccl_timeout,
                                 ID_hang_seconds, ID_plant};
    const Json* options = json_get(state, "options");
    for (int id = 0; id < KNOB_COUNT_ALL; id++) {
        const char* before = NULL;
        char now[4096];
        if (KNOB_TABLE[id].kind == KNOB_SWITCH ||
            json_try_string(json_get(options, KNOB_TABLE[id].name), &before) != 0 ||
            !strcmp(before, knob_value(&run->config, id, now, sizeof now))) {
            continue;
        }
        char option[64];
        knob_option(id, option);
        int is_fixed = 0, is_silent = 0;
        for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++) {
            is_fixed |= fixed[i] == id;
        }
        for (size_t i = 0; i < sizeof silent / sizeof silent[0]; i++) {
            is_silent |= silent[i] == id;
        }
        is_silent &= id != ID_recompute || !strcmp(run->config.saved_int8, "none");  // it says what is kept as MXINT8
        check_or(!is_fixed, EXIT_USAGE,
                 "the checkpoint was made with --%s %s, this command says %s: the order of the data would "
                 "change; give the old value, or another --out for a new run",
                 option, before, now);
        if (!is_silent) {
            printf("resume     --%s was %s, is now %s\n", option, before, now);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// tokenizer

// beside the training shards, else in the checkpoint that is continued, else bytes where the vocabulary is that small
static void run_find_tokenizer(Run* run, const Dataset* train, const char* checkpoint) {
    const char* given = run->config.tokenizer;
    if (!strcmp(given, "byte")) {
        run->tokenizer = tokenizer_byte();
        return;
    }
    if (!is_auto_text(given)) {
        run->tokenizer_path = strdup_or_die(given);
    } else {
        const char* shard = train ? train->shards[0].path : "";
        const char* slash = strrchr(shard, '/');
        char* beside =
            slash ? format_string("%.*s/tokenizer.json", (int)(slash - shard), shard) : strdup_or_die("tokenizer.json");
        char* saved = format_string("%s/tokenizer.json", checkpoint ? checkpoint : ".");
        if (train && path_is_file(beside)) {
            run->tokenizer_path = beside;
            free(saved);
        } else if (checkpoint && path_is_file(saved)) {
            run->tokenizer_path = saved;
            free(beside);
        } else {
            free(beside);
            free(saved);
        }
    }
    if (run->tokenizer_path) {
        run->tokenizer = tokenizer_load(run->tokenizer_path);
    } else if (run->model_config.V <= 512) {
        run->tokenizer = tokenizer_byte();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// memory

// " (of no effect)" where no block keeps anything that --saved-int8 could make smaller
static const char* run_saved_note(const Model* model) {
    int saved = 0;
    for (int i = 0; i < model->config.L * SAVED_TENSORS; i++) {
        saved += block_saves_int8(model, i / SAVED_TENSORS, (SavedTensor)(i % SAVED_TENSORS));
    }
    return model->training.saved_int8 != SAVED_INT8_NONE && saved == 0 ? " (of no effect)" : "";
}

// What the process holds besides the model's own buffers: decoded operands and attention scratch of the CPU backend,
// batches read ahead, program and libraries.
static void run_print_plan(const Run* run, const Model* model, int threads) {
    const double MiB = 1048576.0;
    size_t total = 0;
    printf("memory per rank, %s, micro-batch %d x %d tokens, --recompute %s, --saved-int8 %s%s, --adam-dtype %s, "
           "--grad-dtype %s:\n",
           model->ops->name, run->B, run->T, run->config.recompute, run->config.saved_int8,
           run_saved_note(model), run->config.adam_dtype, run->config.grad_dtype);
    for (int kind = 0; kind < MEMORY_CLASSES; kind++) {
        printf("  %-32s %10.1f MiB\n", MEMORY_NAMES[kind], (double)model->memory_bytes[kind] / MiB);
        total += model->memory_bytes[kind];
    }
    size_t scratch =
        model->ops->scratch_bytes(model_largest_operands(model), attention_shape(model, run->B, run->T), threads);
    size_t program = model->ops->program_bytes(threads);
    printf("  %-32s %10.1f MiB\n  %-32s %10.1f MiB\n", "backend scratch", (double)scratch / MiB,
           "program and libraries", (double)program / MiB);
    Saver saver = saver_open(&run->comm, run->out, model, &run->config, NULL, -1);
    size_t wire = model->ops->shares_memory ? 0 : run_wire_elements(run) * sizeof(floatX);
    size_t snapshot = saver_wants_snapshot(&run->config) ? saver_snapshot_bytes(&saver) : 0;
    size_t on_device = model->ops->shares_memory ? snapshot : 0;
    saver_close(&saver);
    if (wire) {
        printf("  %-32s %10.1f MiB\n", "gradients on their way", (double)wire / MiB);
    }
    printf("  %-32s %10.1f MiB%s\n", "checkpoint snapshot", (double)snapshot / MiB, on_device ? "" : " of the host");
    total += wire + on_device;
    printf("  %-32s %10.1f MiB\n", "total", (double)(total + scratch + program) / MiB);
    size_t available = model->ops->available_bytes(), needed = total + scratch - wire;  // which is there already
    if (available > 0) {
        printf("  %-32s %10.1f MiB%s\n", "free now", (double)available / MiB,
               needed > available ? ": this does not fit" : "");
    }
}
