// busy.cpp: how much of a training run's time is the GPU busy? A CUPTI activity tracer that is injected into an
// unchanged program; dev/cuda/busy.sh builds it and starts a command under it:
//
//     CUDA_INJECTION64_PATH=build/busy/libbusy.so ./train_llama ...
//
// It keeps the interval of every kernel, memcpy and memset in memory and, when the program exits, looks at the steady
// steps only. A step ends with the last of the kernels whose name contains BUSY_MARK (default adamw_kernel); marks with
// fewer than 16 other kernels between them belong to the same step. The window goes from the end of step BUSY_SKIP
// (default 3) to the end of the last step. Printed to stderr, and written as JSON to the file that BUSY_JSON names:
//   busy share = union of all intervals / window;  idle time by length of the gap;  the largest gaps with the kernels
//   around them;  the 25 kernels that take most time.
// BUSY_LAST_MS=N takes the last N ms before the end of the last step instead; without any mark it is the last 60 % of
// the traced time. One GPU: intervals of several devices would be united as if they were one. Kernels of a CUDA graph
// are traced one by one. Tracing costs a little time at each launch, so a step under the tracer is somewhat longer and
// its busy share, if anything, too low: compare the ms a step it prints with those of a run without it. A program that
// ends by a signal or _exit prints nothing.
#include <cupti.h>
#include <cxxabi.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The newest record types of the headers at hand: busy.sh finds their names.
#ifndef BUSY_KERNEL
#define BUSY_KERNEL CUpti_ActivityKernel10
#define BUSY_MEMCPY CUpti_ActivityMemcpy6
#define BUSY_MEMSET CUpti_ActivityMemset4
#endif

enum { BUFFER_BYTES = 8 << 20, OTHERS_BETWEEN_STEPS = 16, TOP_KERNELS = 25, TOP_GAPS = 10, SHORT_NAME = 72 };

typedef struct { uint64_t start, end; const char* name; } Interval;  // ns; the name is CUPTI's and stays
typedef struct { uint64_t length, at; const char *before, *after; } Gap;
typedef struct { const char* name; uint64_t calls, total; } KernelSum;

static struct {
    Interval* list;
    size_t count, capacity;
    size_t dropped, out_of_memory;
    int closed;  // the report is being made: what comes later is not wanted
    pthread_mutex_t mutex;
} trace = {NULL, 0, 0, 0, 0, 0, PTHREAD_MUTEX_INITIALIZER};

static int cupti_ok(CUptiResult result, const char* what) {
    if (result != CUPTI_SUCCESS) {
        const char* text = "unknown";
        cuptiGetResultString(result, &text);
        fprintf(stderr, "busy: %s failed: %s; nothing is traced\n", what, text);
    }
    return result == CUPTI_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// collecting, on CUPTI's threads

static void trace_add(uint64_t start, uint64_t end, const char* name) {
    if (start == 0 || end < start) {  // CUPTI's mark for "could not be measured"
        trace.dropped++;
        return;
    }
    if (trace.count == trace.capacity) {
        size_t capacity = trace.capacity ? 2 * trace.capacity : 1 << 16;
        Interval* list = (Interval*)realloc(trace.list, capacity * sizeof(Interval));
        if (!list) {
            trace.out_of_memory++;
            return;
        }
        trace.list = list;
        trace.capacity = capacity;
    }
    trace.list[trace.count++] = {start, end, name};
}

static void CUPTIAPI buffer_requested(uint8_t** buffer, size_t* size, size_t* max_records) {
    *buffer = (uint8_t*)aligned_alloc(8, BUFFER_BYTES);
    *size = *buffer ? BUFFER_BYTES : 0;
    *max_records = 0;
}

static void record_add(const CUpti_Activity* record) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL || record->kind == CUPTI_ACTIVITY_KIND_KERNEL) {
        const BUSY_KERNEL* kernel = (const BUSY_KERNEL*)record;
        trace_add(kernel->start, kernel->end, kernel->name ? kernel->name : "(no name)");
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
        const BUSY_MEMCPY* copy = (const BUSY_MEMCPY*)record;
        const char* name = copy->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_HTOD   ? "[memcpy to device]"
                           : copy->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOH ? "[memcpy to host]"
                                                                               : "[memcpy on device]";
        trace_add(copy->start, copy->end, name);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
        const BUSY_MEMSET* set = (const BUSY_MEMSET*)record;
        trace_add(set->start, set->end, "[memset]");
    }
}

static void CUPTIAPI buffer_completed(CUcontext context, uint32_t stream, uint8_t* buffer, size_t, size_t valid) {
    CUpti_Activity* record = NULL;
    size_t lost = 0;
    pthread_mutex_lock(&trace.mutex);
    while (valid && !trace.closed && cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        record_add(record);
    }
    if (cuptiActivityGetNumDroppedRecords(context, stream, &lost) == CUPTI_SUCCESS) {
        trace.dropped += lost;
    }
    pthread_mutex_unlock(&trace.mutex);
    free(buffer);
}

// ---------------------------------------------------------------------------------------------------------------------
// the window

static int compare_starts(const void* a, const void* b) {
    uint64_t x = ((const Interval*)a)->start, y = ((const Interval*)b)->start;
    return x < y ? -1 : x > y;
}

static double environment_number(const char* name, double otherwise) {
    const char* text = getenv(name);
    return text && *text ? atof(text) : otherwise;
}

// ends of the steps, ascending; the caller frees them
static uint64_t* find_step_ends(const char* mark, size_t* steps) {
    uint64_t* ends = (uint64_t*)malloc(sizeof(uint64_t) * (trace.count + 1));
    size_t others = OTHERS_BETWEEN_STEPS;
    *steps = 0;
    for (size_t i = 0; ends && i < trace.count; i++) {
        const Interval* x = &trace.list[i];
        if (strstr(x->name, mark)) {
            *steps += others >= OTHERS_BETWEEN_STEPS;
            ends[*steps - 1] = x->end;
            others = 0;
        } else if (x->name[0] != '[') {
            others++;
        }
    }
    return ends;
}

typedef struct { uint64_t begin, end; size_t steps, steps_seen; } Window;

static Window choose_window(void) {
    const char* mark = getenv("BUSY_MARK");
    double last_ms = environment_number("BUSY_LAST_MS", 0), skip_wanted = environment_number("BUSY_SKIP", 3);
    size_t steps, skip = skip_wanted >= 1 ? (size_t)skip_wanted : 1;
    uint64_t first = trace.list[0].start, last = 0;
    for (size_t i = 0; i < trace.count; i++) {
        last = trace.list[i].end > last ? trace.list[i].end : last;
    }
    uint64_t* ends = find_step_ends(mark && *mark ? mark : "adamw_kernel", &steps);
    Window window = {last - (last - first) / 5 * 3, last, 0, steps};
    if (steps && last_ms > 0) {
        uint64_t length = (uint64_t)(last_ms * 1e6);
        window.end = ends[steps - 1];
        window.begin = window.end - first > length ? window.end - length : first;
    } else if (steps > 1) {
        skip = skip < steps ? skip : steps - 1;
        window.begin = ends[skip - 1];
        window.end = ends[steps - 1];
        window.steps = steps - skip;
    }
    free(ends);
    return window;
}

// ---------------------------------------------------------------------------------------------------------------------
// busy time, gaps, kernels

static const uint64_t GAP_CLASSES[] = {2000, 10000, 100000, 1000000, UINT64_MAX};  // ns, upper ends
static const char* const GAP_NAMES[] = {"under 2 us", "2 to 10 us", "10 to 100 us", "0.1 to 1 ms", "over 1 ms"};
enum { GAP_CLASS_COUNT = 5 };

typedef struct {
    Window window;
    uint64_t busy;
    uint64_t idle[GAP_CLASS_COUNT], gaps[GAP_CLASS_COUNT];
    Gap largest[TOP_GAPS];
    KernelSum* kernels;
    size_t kernel_count;
} Report;

static void gap_add(Report* r, uint64_t begin, uint64_t end, const char* before, const char* after) {
    if (end <= begin) {
        return;
    }
    uint64_t length = end - begin;
    int kind = 0;
    while (length >= GAP_CLASSES[kind] && kind < GAP_CLASS_COUNT - 1) {
        kind++;
    }
    r->idle[kind] += length;
    r->gaps[kind]++;
    int place = TOP_GAPS;
    while (place > 0 && r->largest[place - 1].length < length) {
        place--;
    }
    if (place < TOP_GAPS) {
        memmove(&r->largest[place + 1], &r->largest[place], sizeof(Gap) * (size_t)(TOP_GAPS - 1 - place));
        r->largest[place] = {length, begin, before, after};
    }
}

// one pass over the intervals in order of their starts; `reach` is the end of what has been covered
static void measure_busy(Report* r) {
    const Window* w = &r->window;
    uint64_t reach = w->begin;
    const char* before = "(begin of the window)";
    for (size_t i = 0; i < trace.count; i++) {
        const Interval* x = &trace.list[i];
        uint64_t start = x->start > w->begin ? x->start : w->begin, end = x->end < w->end ? x->end : w->end;
        if (end <= start) {
            continue;
        }
        gap_add(r, reach, start, before, x->name);
        uint64_t fresh = start > reach ? start : reach;
        r->busy += end > fresh ? end - fresh : 0;
        if (end >= reach) {
            reach = end;
            before = x->name;
        }
    }
    gap_add(r, reach, w->end, before, "(end of the window)");
}

static int compare_names(const void* a, const void* b) {
    return strcmp(((const KernelSum*)a)->name, ((const KernelSum*)b)->name);
}

static int compare_totals(const void* a, const void* b) {
    uint64_t x = ((const KernelSum*)a)->total, y = ((const KernelSum*)b)->total;
    return x < y ? 1 : x > y ? -1 : 0;
}

// time of each kernel whose end lies in the window
static void measure_kernels(Report* r) {
    r->kernels = (KernelSum*)malloc(sizeof(KernelSum) * (trace.count + 1));
    size_t n = 0, kinds = 0;
    for (size_t i = 0; r->kernels && i < trace.count; i++) {
        const Interval* x = &trace.list[i];
        if (x->end > r->window.begin && x->end <= r->window.end) {
            r->kernels[n++] = {x->name, 1, x->end - x->start};
        }
    }
    if (n) {
        qsort(r->kernels, n, sizeof(KernelSum), compare_names);
    }
    for (size_t i = 0; i < n; i++) {
        if (kinds && strcmp(r->kernels[kinds - 1].name, r->kernels[i].name) == 0) {
            r->kernels[kinds - 1].calls++;
            r->kernels[kinds - 1].total += r->kernels[i].total;
        } else {
            r->kernels[kinds++] = r->kernels[i];
        }
    }
    if (kinds) {
        qsort(r->kernels, kinds, sizeof(KernelSum), compare_totals);
    }
    r->kernel_count = kinds;
}

// ---------------------------------------------------------------------------------------------------------------------
// saying it

// demangled, without return type and parameter list, at most SHORT_NAME characters; valid until the next call but one
static const char* short_name(const char* name) {
    static char texts[2][SHORT_NAME + 1];
    static int turn;
    char* text = texts[turn ^= 1];
    int status, depth = 0;
    char* plain = abi::__cxa_demangle(name, NULL, NULL, &status);
    const char* from = plain ? plain : name;
    if (name[0] == '(' || name[0] == '[') {
        from = name;
    } else if (strncmp(from, "void ", 5) == 0) {
        from += 5;
    }
    size_t length = 0;
    const char* anonymous = "(anonymous namespace)";
    for (const char* at = from; *at && length < SHORT_NAME; at++) {
        depth += *at == '<' ? 1 : *at == '>' ? -1 : 0;
        if (*at == '(' && at != name && depth == 0) {
            if (strncmp(at, anonymous, strlen(anonymous)) != 0) {
                break;
            }
            at += strlen(anonymous) + 1;  // and the :: behind it
            continue;
        }
        text[length++] = *at;
    }
    text[length] = 0;
    free(plain);
    return text;
}

static void print_json_string(FILE* file, const char* text) {
    fputc('"', file);
    for (const char* at = text; *at; at++) {
        if (*at == '"' || *at == '\\') {
            fputc('\\', file);
        }
        fputc((unsigned char)*at < 0x20 ? ' ' : *at, file);
    }
    fputc('"', file);
}

static double share(uint64_t part, const Window* w) { return 100.0 * (double)part / (double)(w->end - w->begin); }

static void print_report(FILE* file, const Report* r) {
    const Window* w = &r->window;
    double ms = (double)(w->end - w->begin) * 1e-6;
    fprintf(file, "busy: GPU busy %.2f %% of %.2f ms", share(r->busy, w), ms);
    if (w->steps) {
        fprintf(file, ", %zu steady steps of %zu, %.3f ms a step, of it idle %.3f ms", w->steps, w->steps_seen,
                ms / (double)w->steps, (ms - (double)r->busy * 1e-6) / (double)w->steps);
    }
    fprintf(file, "; %zu intervals traced, %zu lost\n", trace.count, trace.dropped + trace.out_of_memory);
    for (int i = 0; i < GAP_CLASS_COUNT; i++) {
        fprintf(file, "busy: idle in gaps %-12s %9.3f ms  %6.2f %%  %8llu gaps\n", GAP_NAMES[i],
                (double)r->idle[i] * 1e-6, share(r->idle[i], w), (unsigned long long)r->gaps[i]);
    }
    for (int i = 0; i < TOP_GAPS && r->largest[i].length; i++) {
        const Gap* gap = &r->largest[i];
        fprintf(file, "busy: gap %9.1f us at %9.3f ms, after %s", (double)gap->length * 1e-3,
                (double)(gap->at - w->begin) * 1e-6, short_name(gap->before));
        fprintf(file, ", before %s\n", short_name(gap->after));
    }
    fprintf(file, "busy: %-*s %8s %11s %9s %7s\n", SHORT_NAME, "kernel", "calls", "ms", "us a call", "share");
    for (size_t i = 0; i < r->kernel_count && i < TOP_KERNELS; i++) {
        const KernelSum* k = &r->kernels[i];
        fprintf(file, "busy: %-*s %8llu %11.3f %9.1f %6.2f%%\n", SHORT_NAME, short_name(k->name),
                (unsigned long long)k->calls, (double)k->total * 1e-6, (double)k->total * 1e-3 / (double)k->calls,
                share(k->total, w));
    }
}

static void write_json(const char* path, const Report* r) {
    FILE* file = fopen(path, "w");
    if (!file) {
        fprintf(stderr, "busy: cannot write '%s'\n", path);
        return;
    }
    const Window* w = &r->window;
    fprintf(file, "{\"busy_share\": %.6f, \"window_ms\": %.3f, \"busy_ms\": %.3f, \"steps\": %zu, ",
            share(r->busy, w) / 100, (double)(w->end - w->begin) * 1e-6, (double)r->busy * 1e-6, w->steps);
    fprintf(file, "\"steps_seen\": %zu,\n \"intervals\": %zu, \"lost\": %zu, \"idle_ms\": {", w->steps_seen,
            trace.count, trace.dropped + trace.out_of_memory);
    for (int i = 0; i < GAP_CLASS_COUNT; i++) {
        fprintf(file, "%s\"%s\": %.3f", i ? ", " : "", GAP_NAMES[i], (double)r->idle[i] * 1e-6);
    }
    fprintf(file, "},\n \"gaps\": [");
    for (int i = 0; i < TOP_GAPS && r->largest[i].length; i++) {
        const Gap* gap = &r->largest[i];
        fprintf(file, "%s\n  {\"us\": %.1f, \"at_ms\": %.3f, \"after\": ", i ? "," : "", (double)gap->length * 1e-3,
                (double)(gap->at - w->begin) * 1e-6);
        print_json_string(file, short_name(gap->before));
        fprintf(file, ", \"before\": ");
        print_json_string(file, short_name(gap->after));
        fprintf(file, "}");
    }
    fprintf(file, "],\n \"kernels\": [");
    for (size_t i = 0; i < r->kernel_count; i++) {
        const KernelSum* k = &r->kernels[i];
        fprintf(file, "%s\n  {\"name\": ", i ? "," : "");
        print_json_string(file, short_name(k->name));
        fprintf(file, ", \"calls\": %llu, \"ms\": %.4f}", (unsigned long long)k->calls, (double)k->total * 1e-6);
    }
    fprintf(file, "]}\n");
    fclose(file);
}

static void report(void) {
    if (trace.count == 0) {
        fprintf(stderr, "busy: no kernel was traced (%zu records lost)\n", trace.dropped);
        return;
    }
    qsort(trace.list, trace.count, sizeof(Interval), compare_starts);
    Report r = {};
    r.window = choose_window();
    if (r.window.end <= r.window.begin) {
        fprintf(stderr, "busy: the window is empty (%zu intervals)\n", trace.count);
        return;
    }
    measure_busy(&r);
    measure_kernels(&r);
    print_report(stderr, &r);
    if (getenv("BUSY_JSON")) {
        write_json(getenv("BUSY_JSON"), &r);
    }
    free(r.kernels);
}

static void at_exit(void) {
    cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    pthread_mutex_lock(&trace.mutex);
    trace.closed = 1;
    pthread_mutex_unlock(&trace.mutex);
    report();
}

// the entry point of an injected library: called by the driver before the first context
extern "C" __attribute__((visibility("default"))) int InitializeInjection(void) {
    if (cupti_ok(cuptiActivityRegisterCallbacks(buffer_requested, buffer_completed), "registering with CUPTI") &&
        cupti_ok(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "tracing of kernels") &&
        cupti_ok(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY), "tracing of memcpy") &&
        cupti_ok(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET), "tracing of memset")) {
        atexit(at_exit);
    }
    return 1;
}
