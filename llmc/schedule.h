// schedule.h: learning rate = f(step). No state, so a resumed run goes on exactly.
#pragma once
#include "config.h"

// Peak rate for step s of the run: linear warm-up to 1 over warmup steps, then by name down to min_ratio, which the
// last step reaches exactly. constant stays at the peak; wsd holds the peak and falls linearly over the last fifth.
static double schedule_lr(const Config* config, int64_t step) {
    double peak = config->lr, floor = peak * config->min_lr_ratio;
    int64_t warmup = config->warmup_steps, last = config->steps - 1;
    if (step < warmup) {
        return peak * (double)(step + 1) / (double)warmup;
    }
    if (!strcmp(config->schedule, "constant")) {
        return peak;
    }
    int64_t begin = !strcmp(config->schedule, "wsd") ? max_i64(warmup, last - config->steps / 5) : warmup;
    double done = last > begin ? (double)(min_i64(step, last) - begin) / (double)(last - begin) : 1.0;
    done = done < 0 ? 0 : done;
    if (!strcmp(config->schedule, "cosine")) {
        return floor + 0.5 * (1.0 + cos(M_PI * done)) * (peak - floor);
    }
    return peak + (floor - peak) * done;
}
