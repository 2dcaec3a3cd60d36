#pragma once
#include "run.h"
static void bench_run(const Run* run, Model* model) { (void)run; (void)model; }
