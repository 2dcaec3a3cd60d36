// log.h: what a run says: the console, OUT/metrics.jsonl, rates and the time left.
//
// metrics.jsonl holds one object a line: {"type":"run",..every option..}, then "step", "val", "save", "resume", "skip",
// "memory" (bytes in use), "end" records. Losses are nats per token, grad_norm is before clipping, dt_ms is the wall
// time of the step. A resumed run first drops the records of steps after its checkpoint, so no step stands twice; the
// file is replaced by rename, never cut in place.
#pragma once
#include "checkpoint.h"

typedef struct {
    FILE* metrics;
    char* path;
    int complained;          // about a failed write
    double step_seconds;     // smoothed, for the time left
    double begin;
} Log;

// keep the lines that a run resumed at `step` still stands for: runs, and records of steps up to it
static void metrics_rewind(const char* path, int64_t step) {
    FILE* old = fopen(path, "r");
    check_or(old || errno == ENOENT, EXIT_IO, "cannot read '%s': %s", path, strerror(errno));
    if (!old) {
        return;
    }
    char* temporary = format_string("%s.tmp", path);
    FILE* fresh = fopen_or_die(temporary, "w");
    char *line = NULL, error[256];
    size_t capacity = 0;
    ssize_t length;
    while ((length = getline(&line, &capacity, old)) > 0) {
        Json* record =
            line[length - 1] == '\n' ? json_try_parse(line, (size_t)length - 1, path, error, sizeof error) : NULL;
        int64_t at = 0;
        if (record && (json_try_int(json_get(record, "step"), &at) != 0 || at <= step)) {
            fwrite(line, 1, (size_t)length, fresh);
        }
        json_free(record);
    }
    free(line);
    check_or(!ferror(old), EXIT_IO, "cannot read '%s': %s", path, strerror(errno));
    fclose(old);
    int ok = !ferror(fresh) && fflush(fresh) == 0 && fsync(fileno(fresh)) == 0;
    ok = fclose(fresh) == 0 && ok && rename(temporary, path) == 0;
    check_or(ok, EXIT_IO, "cannot rewrite '%s': %s", path, strerror(errno));
    free(temporary);
}

// resumed_step < 0: a fresh run, the file begins anew. Rank 0 writes for all.
static Log log_open(const Comm* comm, const char* out, int64_t resumed_step) {
    Log log = {};
    log.path = comm->rank == 0 ? format_string("%s/metrics.jsonl", out) : strdup_or_die("/dev/null");
    if (resumed_step >= 0 && comm->rank == 0) {
        metrics_rewind(log.path, resumed_step);
    }
    log.metrics = fopen_or_die(log.path, resumed_step >= 0 ? "a" : "w");
    log.begin = clock_seconds();
    return log;
}

static void log_close(Log* log) {
    if (log->metrics) {
        fclose(log->metrics);
    }
    free(log->path);
}

// every record ends here: a full disk is reported once and does not end the training
static void log_line_end(Log* log) {
    fprintf(log->metrics, "}\n");
    if (fflush(log->metrics) != 0 && !log->complained) {
        fprintf(stderr, "train_llama: cannot write '%s': %s; training goes on without its records\n", log->path,
                strerror(errno));
        log->complained = 1;
        clearerr(log->metrics);
    }
}

// a number as JSON: NaN and infinities, which JSON lacks, become null
static void log_number(Log* log, const char* key, double x, const char* format) {
    fprintf(log->metrics, ",\"%s\":", key);
    if (isfinite(x)) {
        fprintf(log->metrics, format, x);
    } else {
        fprintf(log->metrics, "null");
    }
}

static void log_run(Log* log, const Config* config, const Model* model, const RunState* state, int ranks) {
    fprintf(log->metrics,
            "{\"type\":\"run\",\"run_id\":\"%s\",\"program\":\"%s\",\"device\":\"%s\",\"precision\":\"%s\","
            "\"parameters\":%zu,\"ranks\":%d,"
            "\"from_step\":%lld,\"options\":",
            state->run_id, PROGRAM_VERSION, model->ops->name, FLOATX_NAME, model->table.elements, ranks,
            (long long)state->step);
    config_write_json(log->metrics, config);
    log_line_end(log);
}

static void format_duration(char* buffer, size_t bytes, double seconds) {
    int64_t s = (int64_t)(seconds + 0.5);
    if (s < 60) {
        snprintf(buffer, bytes, "%llds", (long long)s);
    } else if (s < 3600) {
        snprintf(buffer, bytes, "%lldm%02llds", (long long)(s / 60), (long long)(s % 60));
    } else if (s < 86400) {
        snprintf(buffer, bytes, "%lldh%02lldm", (long long)(s / 3600), (long long)(s / 60 % 60));
    } else {
        snprintf(buffer, bytes, "%lldd%02lldh", (long long)(s / 86400), (long long)(s / 3600 % 24));
    }
}

// 12345678 -> 12.3M
static void format_count(char* buffer, size_t bytes, double x) {
    const char* units[] = {"", "k", "M", "G", "T"};
    int unit = 0;
    while (x >= 999.5 && unit < 4) {
        x /= 1000;
        unit++;
    }
    snprintf(buffer, bytes, unit && x < 99.95 ? "%.1f%s" : "%.0f%s", x, units[unit]);
}

// relative; 1 where the numbers are no numbers
static double quant_error(const QuantStats* stats) {
    double error = sqrt(stats->error_sq / (stats->input_sq + 1e-300));
    return isfinite(error) ? error : 1.0;
}

static void log_telemetry(Log* log, const LinearTelemetry* telemetry) {
    static const char* const names[OPERANDS] = {"x", "w", "dy", "wt", "dyt", "xt"};
    fprintf(log->metrics, ",\"under_window\":{");
    for (int id = 0; id < OPERANDS; id++) {
        double worst = 0.0;  // of the kinds of linear layers
        for (int kind = 0; kind < LINEAR_KINDS; kind++) {
            worst = fmax(worst, telemetry->under[kind][id] / fmax(1.0, telemetry->groups[kind][id]));
        }
        fprintf(log->metrics, "%s\"%s\":%.3g", id ? "," : "", names[id], worst);
    }
    fprintf(log->metrics, "},\"fp4\":{");
    int any = 0;
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        const QuantStats *x = &telemetry->x[kind], *w = &telemetry->w[kind];
        if (x->count > 0 && w->count > 0) {  // else no block quantizes
            fprintf(log->metrics,
                    "%s\"%s\":{\"x_error\":%.5g,\"x_clipped\":%.5g,\"x_zero\":%.5g,\"w_error\":%.5g,\"w_clipped\":%.5g,"
                    "\"w_zero\":%.5g}",
                    any++ ? "," : "", LINEAR_NAMES[kind], quant_error(x), x->clipped / x->count, x->zero / x->count,
                    quant_error(w), w->clipped / w->count, w->zero / w->count);
        }
    }
    fprintf(log->metrics, "}");
}

typedef struct {
    int64_t step, steps, tokens, step_tokens;  // step counts from 1: the number of finished steps
    double loss, grad_norm, lr, seconds;
    double mfu;                                // share of the device's peak; 0 where that is not known
    int skipped;
    const LinearTelemetry* telemetry;          // or NULL
} StepRecord;

static void log_step(Log* log, const StepRecord* r) {
    double rate = (double)r->step_tokens / r->seconds;
    log->step_seconds = log->step_seconds > 0 ? 0.95 * log->step_seconds + 0.05 * r->seconds : r->seconds;
    char eta[32], tokens_per_second[32], mfu[32] = "";
    if (r->mfu > 0) {
        snprintf(mfu, sizeof mfu, " | %.1f%% mfu", 100 * r->mfu);
    }
    format_duration(eta, sizeof eta, log->step_seconds * (double)(r->steps - r->step));
    format_count(tokens_per_second, sizeof tokens_per_second, rate);
    printf("step %6lld/%lld | loss %7.4f | norm %7.3f | lr %.2e | %7.1f ms | %s tok/s%s | eta %s%s\n",
           (long long)r->step, (long long)r->steps, r->loss, r->grad_norm, r->lr, r->seconds * 1e3, tokens_per_second,
           mfu, eta, r->skipped ? " | SKIPPED: not finite, weights unchanged" : "");
    fflush(stdout);
    fprintf(log->metrics, "{\"type\":\"%s\",\"step\":%lld,\"tokens\":%lld", r->skipped ? "skip" : "step",
            (long long)r->step, (long long)r->tokens);
    log_number(log, "loss", r->loss, "%.9g");
    log_number(log, "grad_norm", r->grad_norm, "%.9g");
    log_number(log, "lr", r->lr, "%.9g");
    log_number(log, "dt_ms", r->seconds * 1e3, "%.3f");
    log_number(log, "tok_s", rate, "%.1f");
    if (r->mfu > 0) {
        log_number(log, "mfu", r->mfu, "%.4f");
    }
    if (r->telemetry) {
        log_telemetry(log, r->telemetry);
    }
    log_line_end(log);
}

static void log_val(Log* log, int64_t step, int64_t tokens, double loss) {
    printf("validation: step %lld, loss %.4f nats/token, perplexity %.2f\n", (long long)step, loss, exp(loss));
    fflush(stdout);
    fprintf(log->metrics, "{\"type\":\"val\",\"step\":%lld,\"tokens\":%lld", (long long)step, (long long)tokens);
    log_number(log, "loss", loss, "%.9g");
    log_line_end(log);
}

// bytes in use once everything has been allocated that ever is
static void log_memory(Log* log, int64_t step, size_t bytes) {
    printf("memory     %.2f GiB in use\n", (double)bytes / 1073741824.0);
    fflush(stdout);
    fprintf(log->metrics, "{\"type\":\"memory\",\"step\":%lld", (long long)step);
    log_number(log, "bytes", (double)bytes, "%.0f");
    log_line_end(log);
}

// a save that ended: seconds it took, and those that training stood still
static void log_save(Log* log, int64_t step, int64_t tokens, const char* path, double seconds, double held) {
    printf("saved      %s (%.1f s, training stood still for %.3f s)\n", path, seconds, held);
    fflush(stdout);
    fprintf(log->metrics, "{\"type\":\"save\",\"step\":%lld,\"tokens\":%lld,\"path\":", (long long)step,
            (long long)tokens);
    json_write_string(log->metrics, path);
    log_number(log, "seconds", seconds, "%.3f");
    log_number(log, "held_seconds", held, "%.6f");
    log_line_end(log);
}

// resume, end
static void log_event(Log* log, const char* type, int64_t step, int64_t tokens, const char* key, const char* text,
                      double seconds) {
    fprintf(log->metrics, "{\"type\":\"%s\",\"step\":%lld,\"tokens\":%lld,\"%s\":", type, (long long)step,
            (long long)tokens, key);
    json_write_string(log->metrics, text);
    log_number(log, "seconds", seconds, "%.3f");
    log_line_end(log);
}
