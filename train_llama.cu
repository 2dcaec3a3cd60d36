// train_llama.cu: pretrains a Llama whose linear layers run forward and backward in FP4. The story, from main down:
//
//   ranks -> options -> model shape -> backend -> data -> checkpoint or fresh weights -> loop
//   step: for each micro-batch { data -> forward -> backward };  sum over ranks -> norm, clip, finite? -> AdamW -> log;
//   every N: validate, sample, save
// All ranks run all of it; what is printed and logged is rank 0's.
//
// Read next: llmc/ops.h (every operation), llmc/recipe.h and llmc/linear.h (what FP4 training is), llmc/model.h.
#include "llmc/common.h"
#include "llmc/dtypes.h"
#include "llmc/rand.h"
#include "llmc/xxh64.h"
#include "llmc/json.h"
#include "llmc/config.h"
#include "llmc/quant.h"
#include "llmc/ops.h"
#include "llmc/recipe.h"
#include "llmc/comm.h"
#include "llmc/backend.h"
#include "llmc/linear.h"
#include "llmc/model.h"
#include "llmc/data.h"
#include "llmc/schedule.h"
#include "llmc/watch.h"
#include "llmc/optimizer.h"
#include "llmc/safetensors.h"
#include "llmc/tokenizer.h"
#include "llmc/checkpoint.h"
#include "llmc/checkpoint_save.h"
#include "llmc/log.h"
#include "llmc/generate.h"
#include "llmc/run.h"
#include "llmc/ranks.h"
#include "llmc/sample.h"
#include "llmc/start.h"
#include "llmc/self_test.h"
#include "llmc/bench.h"
#include <signal.h>

// ---------------------------------------------------------------------------------------------------------------------
// asked to stop: SIGTERM, SIGUSR1 and the first Ctrl-C finish the step, save and exit 75

static volatile sig_atomic_t stop_requested;
static volatile sig_atomic_t stop_said;  // by this rank: the first
#define STOP_TEXT "stopping   after this step, with a checkpoint; a second Ctrl-C ends at once and saves nothing\n"

static void handle_stop(int signal_number) {
    if (stop_requested && signal_number == SIGINT) {
        _exit(130);
    }
    if (!stop_requested && stop_said) {
        ssize_t said = write(STDOUT_FILENO, STOP_TEXT, sizeof STOP_TEXT - 1);
        (void)said;
    }
    stop_requested = 1;
}

static void install_signal_handlers(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handle_stop;
    action.sa_flags = SA_RESTART;
    int signals[] = {SIGTERM, SIGUSR1, SIGINT};
    sigset_t heard;
    sigemptyset(&heard);
    for (int i = 0; i < 3; i++) {
        sigaction(signals[i], &action, NULL);
        sigaddset(&heard, signals[i]);
    }
    pthread_or_die(pthread_sigmask(SIG_UNBLOCK, &heard, NULL), "pthread_sigmask");  // a parent may have blocked them
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);  // a file size limit shows as a failed write, with a message
}

// ---------------------------------------------------------------------------------------------------------------------
// validation

// mean loss over the same evenly spaced validation samples each time, in nats per token
static double validate(Trainer* t) {
    const Comm* comm = &t->run.comm;
    int64_t B = t->run.B, rows = min_i64(t->run.config.val_batches * B, max_i64(B, t->val.samples / B * B));
    model_begin_step(&t->model, 0.0, 0.0, 0.0, 0);
    for (int64_t row = comm->rank * B; row < rows; row += B * comm->size) {
        int64_t slot = row / B / comm->size % t->run.accumulation;
        watch_phase("validation");
        if (slot == 0) {
            t->model.ops->synchronize();  // the device may still be reading the batch that stands there
        }
        int32_t *inputs = t->inputs + slot * B * t->run.T, *targets = t->targets + slot * B * t->run.T;
        data_read_even(&t->val, inputs, targets, row, (int)B, rows);
        model_forward(&t->model, inputs, targets, 0.0f, 0);
    }
    return comm_sum_of(comm, model_read_control(&t->model).loss_sum) / ((double)rows * t->run.T);
}

// ---------------------------------------------------------------------------------------------------------------------
// one step

enum { REPLAY_WEIGHTS, REPLAY_MICRO_BATCH, REPLAY_LAST_MICRO_BATCH, REPLAY_UPDATE };

static void quantize_weights(void* argument) {
    Trainer* t = (Trainer*)argument;
    t->model.weights_quantized = 0;
    model_quantize_weights(&t->model);
}

static void micro_batch(void* argument) {
    Trainer* t = (Trainer*)argument;
    model_run_forward(&t->model, 1.0f / (float)t->run.config.batch_tokens, 1);
    model_backward(&t->model);
}

static void segment_ready(void* argument, int segment) {
    Trainer* t = (Trainer*)argument;
    optimizer_reduce_segment(&t->model, &t->run.comm, &t->run.config, segment);
}

// of a step: gradients leave for the other ranks while backward goes on
static void last_micro_batch(void* argument) {
    Trainer* t = (Trainer*)argument;
    t->model.segment_ready = segment_ready;
    t->model.ready_argument = t;
    micro_batch(t);
    t->model.segment_ready = NULL;
    if (t->run.comm.size > 1) {
        t->run.comm.ops->wait();
    }
}

static void update(void* argument) {
    Trainer* t = (Trainer*)argument;
    optimizer_step(&t->model, &t->run.comm, &t->run.config);
}

// --plant: faults to test with
static void plant_faults(Trainer* t) {
    float nan_value = NAN;
    if (ranks_planted(&t->run.comm, &t->run.config, "nan", t->state.step)) {
        t->model.ops->copy_to_device(t->model.grads.data, &nan_value, sizeof nan_value);
    }
    while (ranks_planted(&t->run.comm, &t->run.config, "hang", t->state.step)) {
        watch.phase = "a planted hang";
        pause();
    }
}

// on the device, at once or as recorded before
static void issue(Trainer* t, int recorded, int id, void (*work)(void* argument)) {
    if (recorded) {
        t->model.ops->replay(id, work, t);
    } else {
        work(t);
    }
}

static StepRecord train_step(Trainer* t, DataLoader* loader) {
    const Config* config = &t->run.config;
    Model* model = &t->model;
    int64_t step = t->state.step;
    double begin = clock_seconds();
    int observe =
        config->log_every > 0 && (step + 1) % config->log_every == 0 && t->run.recipe->x.format == FORMAT_MXFP4;
    model_begin_telemetry(model, observe);
    double lr = schedule_lr(config, step);
    model_begin_step(model, lr, config->beta1, config->beta2, step + 1);
    model_zero_gradients(model);
    plant_faults(t);
    int recorded = !observe && strcmp(config->graphs, "off");
    issue(t, recorded, REPLAY_WEIGHTS, quantize_weights);
    model->weights_quantized = 1;
    for (int64_t a = 0; a < t->run.accumulation; a++) {
        int32_t *inputs = t->inputs + a * t->run.B * t->run.T, *targets = t->targets + a * t->run.B * t->run.T;
        int last = a + 1 == t->run.accumulation;
        watch_phase("waiting for data");
        loader_next(loader, inputs, targets);
        model_load_batch(model, inputs, targets, step, a * t->run.comm.size + t->run.comm.rank);
        watch_phase(last ? "the last micro-batch and the sum of gradients over ranks" : "a micro-batch");
        issue(t, recorded, last ? REPLAY_LAST_MICRO_BATCH : REPLAY_MICRO_BATCH, last ? last_micro_batch : micro_batch);
        if (observe && a == 0) {
            t->telemetry = model_read_telemetry(model);
            recorded = strcmp(config->graphs, "off");
        }
    }
    watch_phase("the update");
    model->ops->snapshot_fence();
    issue(t, recorded, REPLAY_UPDATE, update);
    watch_phase("waiting for the device to finish the step");
    model->weights_quantized = 0;
    StepControl result = model_read_control(model);
    double loss = result.loss_sum / (double)config->batch_tokens;
    t->state.step++;
    t->state.tokens += config->batch_tokens;
    double seconds = clock_seconds() - begin, peak = model->ops->peak_flops() * t->run.comm.size;
    watch_step(t->state.step, seconds);
    double mfu = peak > 0 ? model_flops_per_token(model) * (double)config->batch_tokens / seconds / peak : 0.0;
    return (StepRecord){.step = t->state.step,
                        .steps = config->steps,
                        .tokens = t->state.tokens,
                        .step_tokens = config->batch_tokens,
                        .loss = loss,
                        .grad_norm = sqrt(result.grad_squares),
                        .lr = lr,
                        .seconds = seconds,
                        .mfu = mfu,
                        .skipped = result.skip,
                        .telemetry = observe ? &t->telemetry : NULL};
}

// a save that ended: says how
static void save_report(Trainer* t, SaveResult result) {
    Saver* saver = &t->saver;
    int64_t step = saver->state.step;
    if (result == SAVE_NONE) {
        return;
    }
    char* path = checkpoint_path(t->run.out, step, "");
    double seconds = clock_seconds() - saver->begin;
    if (result == SAVE_FAILED && t->run.comm.rank == 0) {
        fprintf(stderr, "train_llama: checkpoint of step %lld not saved: %s; earlier checkpoints stand\n",
                (long long)step, saver->error);
    } else if (result == SAVE_DONE) {
        log_save(&t->log, step, saver->state.tokens, path, seconds, saver->held);
    }
    free(path);
}

// Begin to save, after the save before; where `now` or without a snapshot, until it is done. 0, or -1 after a message:
// the disk may be full for a while, training goes on.
static int save(Trainer* t, int now) {
    watch_phase("saving");
    double begin = clock_seconds();
    save_report(t, saver_wait(&t->saver));
    SaveResult result = saver_begin(&t->saver, &t->state);
    if (result == SAVE_NONE && (now || !saver_is_async(&t->saver))) {
        result = saver_wait(&t->saver);
    }
    t->saver.held = clock_seconds() - begin;
    save_report(t, result);
    return result == SAVE_FAILED ? -1 : 0;
}

static int due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

// the loop; returns the exit code
static int train(Trainer* t) {
    const Config* config = &t->run.config;
    install_signal_handlers();  // again, after the device's libraries
    LoaderPlan plan = {.B = t->run.B, .rank = t->run.comm.rank, .ranks = t->run.comm.size,
                       .g0 = t->state.step * t->run.samples_per_step};
    DataLoader* loader = t->state.step < config->steps ? loader_start(&t->train, &plan) : NULL;
    double begin = clock_seconds();
    int64_t skips = 0, steps_here = 0;
    int code = EXIT_DONE;
    while (t->state.step < config->steps && code == EXIT_DONE) {
        StepRecord record = train_step(t, loader);
        log_step(&t->log, &record);
        if (++steps_here == 2) {
            log_memory(&t->log, t->state.step, t->model.ops->used_bytes());
        }
        skips = record.skipped ? skips + 1 : 0;
        if (skips >= config->max_skips) {
            code = EXIT_NUMERICS;
            break;
        }
        int64_t step = t->state.step;
        int last = step == config->steps;
        int64_t agreed[] = {stop_requested || (config->max_minutes > 0 &&
                                               clock_seconds() - begin >= 60 * config->max_minutes),
                            saver_is_busy(&t->saver)};
        watch_phase("waiting for all ranks at the end of a step");
        comm_max(&t->run.comm, agreed, 2);
        int stop = (int)agreed[0];
        save_report(t, saver_advance(&t->saver, (int)agreed[1]));
        if (t->has_val && (last || (due(config->val_every, step) && !stop))) {
            log_val(&t->log, step, t->state.tokens, validate(t));
        }
        if (due(config->sample_every, step) && !stop) {
            print_sample(&t->run, &t->model, sample_data(t), step);
        }
        if (last || stop || due(config->save_every, step)) {
            int failed = save(t, last || stop);
            code = failed && (last || stop) ? EXIT_IO : stop && !last ? EXIT_REQUEUE : EXIT_DONE;
        }
    }
    save_report(t, saver_wait(&t->saver));
    if (loader) {
        loader_stop(loader);
    }
    if (code == EXIT_REQUEUE) {
        printf("stopped    as asked at step %lld of %lld; the same command goes on from here\n",
               (long long)t->state.step, (long long)config->steps);
    } else if (code == EXIT_NUMERICS && t->run.comm.rank == 0) {
        fprintf(stderr,
                "train_llama: %lld steps in a row were not finite; stopped. The last good checkpoint in '%s' stands; a "
                "lower "
                "--lr or --grad-clip may help\n",
                (long long)skips, t->run.out);
    }
    return code;
}

// ---------------------------------------------------------------------------------------------------------------------
// from the start to the end

static int run_training(Trainer* t, const Ops* ops) {
    Run* run = &t->run;
    if (run->config.self_test) {
        self_test(ops, 1);
        return EXIT_DONE;
    }
    start_model(t, ops);
    if (run->config.plan) {
        run_print_plan(run, &t->model, cpu_threads());
        return EXIT_DONE;
    }
    if (run->config.bench) {
        bench_run(run, &t->model);
        return EXIT_DONE;
    }
    check_or(run->config.train_data[0], EXIT_USAGE,
             "--train-data is missing: token shards to train on (data/prepare.py makes them); "
             "./scripts/quickstart.sh shows a whole run");
    open_data(t);
    ranks_lock(run);
    Json* saved;
    char* checkpoint = run_find_checkpoint(run, &saved);
    if (checkpoint) {
        run_compare_options(run, saved);
    }
    if (run->recipe->x.format == FORMAT_MXFP4) {
        self_test(ops, 0);
    }
    ops->peak_flops();  // measured now, where it must be: later there is no memory for it
    model_allocate(&t->model);
    start_weights(t, checkpoint, saved);
    check_fingerprint(t, checkpoint);
    if (checkpoint && run->comm.rank == 0) {
        run_set_aside(run, t->state.step);
    }
    run_find_tokenizer(run, &t->train, checkpoint);
    json_free(saved);
    size_t tokens = (size_t)run->B * run->T * (size_t)run->accumulation;
    t->inputs = (int32_t*)ops->alloc_host(tokens * sizeof(int32_t), "batch");
    t->targets = (int32_t*)ops->alloc_host(tokens * sizeof(int32_t), "batch");
    start_saver(t);
    print_header(t, ops);
    t->log = log_open(&run->comm, run->out, checkpoint ? t->state.step : -1);
    t->saver.log = fileno(t->log.metrics);
    log_run(&t->log, &run->config, &t->model, &t->state, run->comm.size);
    if (checkpoint) {
        printf("resume     %s: step %lld of %lld\n", checkpoint, (long long)t->state.step,
               (long long)run->config.steps);
        log_event(&t->log, "resume", t->state.step, t->state.tokens, "path", checkpoint, 0.0);
    }
    int code = EXIT_DONE;
    if (t->state.step >= run->config.steps) {
        printf(
            "done       this run already has its %lld steps; a larger --steps or --tokens goes on, --prompt samples "
            "from it\n",
            (long long)run->config.steps);
    } else {
        code = train(t);
    }
    if (code == EXIT_DONE && run->config.sample_every > 0 && !due(run->config.sample_every, t->state.step)) {
        print_sample(run, &t->model, sample_data(t), t->state.step);
    }
    saver_close(&t->saver);
    char ended[16];
    snprintf(ended, sizeof ended, "%d", code);
    log_event(&t->log, "end", t->state.step, t->state.tokens, "exit_code", ended, clock_seconds() - t->log.begin);
    log_close(&t->log);
    free(checkpoint);
    return code;
}

static int run_program(Trainer* t, int argc) {
    Config* config = &t->run.config;
    const Comm* comm = &t->run.comm;
    if (config->help || argc == 1) {
        config_print_help(stdout);
        presets_print(stdout);
        return EXIT_DONE;
    }
    if (config->version) {
        printf("train_llama %s (%s)\n", PROGRAM_VERSION, FLOATX_NAME);
        return EXIT_DONE;
    }
    ranks_agree_options(comm, config);
    ranks_planted(comm, config, "", 0);
    int sampling = config->prompt[0] && !config->train_data[0] && !config->plan && !config->print_config;
    watch_start(comm, sampling || config->bench ? 0.0 : config->hang_seconds);
    check_or(comm->size == 1 || (!sampling && !config->bench), EXIT_USAGE,
             "--%s runs in one process; start it without mpirun", sampling ? "prompt without --train-data" : "bench");
    if (sampling) {
        return run_prompt_only(t);
    }
    run_resolve(&t->run);
    const Ops* ops = backend_init(config, t->run.recipe, comm);
    start_ranks(t, ops);
    run_fit(&t->run, ops);
    if (config->print_config) {
        config_print(config, stdout);
        return EXIT_DONE;
    }
    return run_training(t, ops);
}

#ifndef TESTING
int main(int argc, char** argv) {
    static Trainer trainer;
    install_signal_handlers();
    trainer.run.comm = comm_init();
    install_signal_handlers();  // again: a library that MPI loads may have taken them, as LLVM does in an OpenCL driver
    stop_said = trainer.run.comm.rank == 0;
    config_parse(&trainer.run.config, argc, argv);
    return comm_end(&trainer.run.comm, run_program(&trainer, argc));
}
#endif
