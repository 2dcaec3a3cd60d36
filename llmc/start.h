// start.h: what a run begins with: ranks, data, model, weights from a seed or a checkpoint, the saver, the header that
// it prints; and --prompt, which needs only a part of that.
#pragma once
#include "backend.h"
#include "checkpoint_save.h"
#include "data.h"
#include "log.h"
#include "ranks.h"
#include "run.h"
#include "sample.h"

typedef struct {
    Run run;
    Model model;
    Dataset train, val;
    int has_val;
    RunState state;
    Log log;
    Saver saver;
    LinearTelemetry telemetry;  // of the step in progress
    int32_t *inputs, *targets;  // a step's micro-batches on the host, one behind the other
} Trainer;

static const Dataset* sample_data(const Trainer* t) { return t->has_val ? &t->val : &t->train; }

// who computes where; collectives of the device
static void start_ranks(Trainer* t, const Ops* ops) {
    Comm* comm = &t->run.comm;
    ranks_print(comm, ops);
#ifdef USE_MPI
    if (comm->size > 1) {
        comm->ops = backend_collectives(ops, comm, &t->run.config, run_wire_elements(&t->run));
    }
#endif
}

// validation shards: as given, or those of a folder that is given for training
static void open_data(Trainer* t) {
    Config* c = &t->run.config;
    dataset_open(&t->train, c->train_data, "train", t->run.T, t->run.model_config.V, (uint64_t)c->seed);
    if (!c->val_data[0] && path_is_folder(c->train_data) && folder_has_split(c->train_data, "val")) {
        c->val_data = c->train_data;
    }
    t->has_val = c->val_data[0] != 0;
    ranks_agree_data(&t->run.comm, &t->train);
    comm_agree(&t->run.comm, t->has_val ? "validation shards" : "no validation shards", EXIT_BAD_DATA,
               "what it finds for validation", "give all hosts the same shards");
    if (t->has_val) {
        dataset_open(&t->val, c->val_data, "val", t->run.T, t->run.model_config.V, (uint64_t)c->seed);
        ranks_agree_data(&t->run.comm, &t->val);
    }
}

// a name for this run that no other has: from the time and the process
static void make_run_id(char* id, size_t bytes) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t mixed = rand_u64((uint64_t)now.tv_sec, (uint64_t)now.tv_nsec, (uint64_t)getpid());
    snprintf(id, bytes, "%016llx", (unsigned long long)mixed);
}

static void start_model(Trainer* t, const Ops* ops) {
    const Config* c = &t->run.config;
    model_prepare(&t->model, ops, &t->run.model_config, t->run.recipe, t->run.training, t->run.B, t->run.T);
    t->model.linear.option_rounding = !strcmp(c->bwd_rounding, "sr") ? ROUND_STOCHASTIC : ROUND_NEAREST;
    t->model.linear.seed = (uint64_t)c->seed;
}

// weights and state, from a checkpoint or fresh
static void start_weights(Trainer* t, const char* checkpoint, const Json* saved) {
    if (checkpoint) {
        t->state = checkpoint_load(&t->run.comm, &t->model, checkpoint, saved);
    } else {
        make_run_id(t->state.run_id, sizeof t->state.run_id);
        model_init_weights(&t->model, (uint64_t)t->run.config.seed);
        optimizer_gather(&t->model, &t->run.comm);
    }
}

static void check_fingerprint(Trainer* t, const char* checkpoint) {
    uint64_t fingerprint = dataset_fingerprint(&t->train);
    check_or(!checkpoint || fingerprint == t->state.data_fingerprint || t->run.config.allow_data_change, EXIT_BAD_DATA,
             "the training data is not what checkpoint '%s' was trained on (fingerprint %016llx, then %016llx): its "
             "order would differ; restore the shards, or pass --allow-data-change 1",
             checkpoint, (unsigned long long)fingerprint, (unsigned long long)t->state.data_fingerprint);
    t->state.data_fingerprint = fingerprint;
}

// checkpoints go through host memory where all ranks have twice what that takes
static void start_saver(Trainer* t) {
    const Run* run = &t->run;
    int separator = run->tokenizer ? tokenizer_separator(run->tokenizer) : -1;
    t->saver = saver_open(&run->comm, run->out, &t->model, &run->config, run->tokenizer_path, separator);
    size_t bytes = 2 * saver_snapshot_bytes(&t->saver);
    for (int kind = 0; t->model.ops->shares_memory && kind < MEMORY_CLASSES; kind++) {
        bytes += t->model.memory_bytes[kind];  // allocated, but not all of it has been touched
    }
    int64_t fits = comm_min_of(&run->comm, bytes * (size_t)run->comm.local_size < cpu_available_bytes());
    if (saver_wants_snapshot(&run->config) && (fits || !strcmp(run->config.async_save, "on"))) {
        saver_allocate_snapshot(&t->saver);
    }
}

static void print_header(const Trainer* t, const Ops* ops) {
    const Config* c = &t->run.config;
    const ModelConfig* m = &t->run.model_config;
    char params[32], tokens[32], run_tokens[32], memory[32], device[320];
    size_t bytes = 0;
    for (int kind = 0; kind < MEMORY_CLASSES; kind++) {
        bytes += t->model.memory_bytes[kind];
    }
    format_count(params, sizeof params, (double)t->model.table.elements);
    format_count(tokens, sizeof tokens, (double)t->train.tokens);
    format_count(run_tokens, sizeof run_tokens, (double)c->tokens);
    format_count(memory, sizeof memory, (double)bytes);
    printf("train_llama %s\n", PROGRAM_VERSION);
    printf("model      %s: %s parameters, %d layers, %d channels, %d heads (%d kv), ffn %d, vocabulary %d%s\n", m->name,
           params, m->L, m->C, m->NH, m->NKV, m->F, m->V, m->tied ? ", tied" : "");
    printf("recipe     %s: %s%s%s\n", t->run.recipe->name, t->run.recipe->what,
           t->run.recipe->x.format == FORMAT_MXFP4 ? "; backward " : "",
           t->run.recipe->x.format == FORMAT_MXFP4 ? c->bwd_rounding : "");
    ops->describe(device, sizeof device);
    const Carrier* carrier = t->run.recipe->x.format == FORMAT_MXFP4 ? ops->carrier() : NULL;
    printf("device     %s: %s, %s%s%s%s\n", ops->name, device, FLOATX_NAME, carrier ? ", carrier " : "",
           carrier ? carrier->name : "", backend_note);
    printf("data       %s tokens in %d shards (ids %s), %lld samples of %d; validation %s\n", tokens,
           t->train.shard_count, t->train.fully_scanned ? "all checked" : "spot-checked, the rest as read",
           (long long)t->train.samples, t->run.T, t->has_val ? c->val_data : "none");
    char ranks[32] = "";
    if (t->run.comm.size > 1) {
        snprintf(ranks, sizeof ranks, "%d ranks x ", t->run.comm.size);
    }
    printf("batch      %lld tokens a step: %s%lld x %d rows x %d\n", (long long)c->batch_tokens, ranks,
           (long long)t->run.accumulation, t->run.B, t->run.T);
    printf("schedule   %lld steps, %s tokens, %.1f epochs; lr %g, %s, %lld warm-up steps\n", (long long)c->steps,
           run_tokens, (double)(c->steps * t->run.samples_per_step) / (double)t->train.samples, c->lr, c->schedule,
           (long long)c->warmup_steps);
    printf("memory     %sB for the model%s (--plan lists it); recompute %s; saved-int8 %s%s, gradients %s, "
           "AdamW %s%s\n", memory,
           t->run.comm.size > 1 ? " on each rank" : "", c->recompute, c->saved_int8,
           run_saved_note(&t->model), c->grad_dtype, c->adam_dtype,
           t->run.training.ranks > 1 ? " divided over ranks" : "");
    printf("checkpoint written %s\n", saver_is_async(&t->saver) ? "beside training" : "while training waits");
    printf("out        %s\n", t->run.out);
    fflush(stdout);
}

// --prompt without --train-data: model and recipe come from the checkpoint
static int run_prompt_only(Trainer* t) {
    Run* run = &t->run;
    Json* saved;
    int anywhere = !strcmp(run->config.resume, "auto") || !strcmp(run->config.resume, "must");
    check_or(!anywhere || !is_auto_text(run->config.out), EXIT_USAGE,
             "--prompt without --train-data samples from a checkpoint: name it with --resume PATH or --out DIR");
    run->out = strdup_or_die(run->config.out);
    char* checkpoint = run_find_checkpoint(run, &saved);
    check_or(checkpoint, EXIT_NO_INPUT, "there is no checkpoint in '%s' to sample from", run->out);
    if (run->config.origin[ID_model] == FROM_DEFAULT) {
        run->config.model = checkpoint;
    }
    const char* recipe;
    if (run->config.origin[ID_recipe] == FROM_DEFAULT &&
        json_try_string(json_get(json_get(saved, "options"), "recipe"), &recipe) == 0) {
        knob_set(&run->config, ID_recipe, recipe, FROM_PRESET, "");
    }
    run->config.batch_size = 1;
    run->config.steps = 1;
    run->config.seq_len = run->config.seq_len == AUTO_INT ? 32 : run->config.seq_len;
    run->config.batch_tokens = run->config.seq_len;
    free(run->out);
    run_resolve(run);
    const Ops* ops = backend_init(&run->config, run->recipe, &run->comm);
    run_fit(run, ops);
    start_model(t, ops);
    model_allocate(&t->model);
    start_weights(t, checkpoint, saved);
    run_find_tokenizer(run, NULL, checkpoint);
    print_sample(run, &t->model, NULL, t->state.step);
    return EXIT_DONE;
}
