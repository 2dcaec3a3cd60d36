// test_llama.cu: the tests. Includes the whole trainer, then the sections of dev/test/, one file each.
//   ./test_llama              all sections
//   ./test_llama quant data   some of them
//   ./test_llama list         their names
//   ./test_llama export DIR   a checkpoint and our logits for dev/ref/hf_check.py (export-rope: with Llama-3 rope
//   scaling)
// Ends with a line `N passed, N failed`; exit code 1 if any check failed. Run it from the repository's root (golden
// files).
#define TESTING
#include "train_llama.cu"

#include "dev/test/harness.h"

#include "dev/test/bench.h"
#include "dev/test/comm.h"
#include "dev/test/cuda_fp8.h"
#include "dev/test/cuda_quant_model.h"
#include "dev/test/data.h"
#include "dev/test/export.h"
#include "dev/test/formats.h"
#include "dev/test/fp4.h"
#include "dev/test/fp8.h"
#include "dev/test/gradient.h"
#include "dev/test/json.h"
#include "dev/test/linear.h"
#include "dev/test/llama.h"
#include "dev/test/memory.h"
#include "dev/test/mxint8.h"
#include "dev/test/ops.h"
#include "dev/test/quant.h"
#include "dev/test/run.h"
#include "dev/test/safetensors.h"
#include "dev/test/slices.h"
#include "dev/test/tokenizer.h"
#include "dev/test/update.h"

typedef struct { const char* name; void (*run)(void); const char* what; } Section;

static const Section SECTIONS[] = {
    {"rand", test_rand, "Philox known answers, normals, permutation"},
    {"json", test_json, "JSON reader"},
    {"safetensors", test_safetensors, "safetensors reader and writer, checksums"},
    {"tokenizer", test_tokenizer, "tokenizer.json decoding"},
    {"data", test_data, "token shards, order, loader"},
    {"formats", test_formats, "number formats and their rounding"},
    {"quant", test_quant, "quantizers against the NumPy reference, bit for bit"},
    {"linear", test_linear, "quantized linear layers, recipes, unbiased rounding"},
    {"fp8", test_fp8, "8-bit operands and linear layers"},
    {"fp4", test_fp4, "the FP4 carrier, its products emulated"},
    {"ops", test_ops, "every operation against f64"},
    {"update", test_update, "sums, skip, AdamW"},
    {"memory", test_memory, "narrow state, recomputation, what fits"},
    {"bench", test_bench, "--bench: rows of linear layers are what a step runs"},
    {"mxint8", test_mxint8, "what backward may keep of gate and up"},
    {"gradient", test_gradient, "whole-model gradients by finite differences (FP32 build)"},
    {"llama", test_llama_golden, "ten training steps of the PyTorch reference (FP32 build)"},
    {"options", test_options, "options, presets"},
    {"schedule", test_schedule, "learning rates"},
    {"comm", test_comm, "collectives, under mpirun only"},
    {"slices", test_slices, "who owns which part of the flat buffer"},
    {"checkpoint", test_checkpoint, "save, verify, damage"},
    {"generate", test_generate, "cached decoding, sampling"},
    {"cuda", test_cuda, "every operation on the GPU against the CPU"},
    {"cuda_model", test_cuda_model, "a whole model on the GPU against the CPU: gradients, training, checkpoints"},
    {"cuda_quant", test_cuda_quant, "Quartet on the GPU against the CPU: operands, products, layers, a whole model"},
    {"cuda_fp8", test_cuda_fp8, "the fp8 recipe on the GPU against the CPU"},
};
#define SECTION_COUNT ((int)(sizeof SECTIONS / sizeof SECTIONS[0]))

int main(int argc, char** argv) {
    if (argc > 1 && !strcmp(argv[1], "list")) {
        for (int i = 0; i < SECTION_COUNT; i++) {
            printf("%-12s %s\n", SECTIONS[i].name, SECTIONS[i].what);
        }
        return 0;
    }
    if (argc == 3 && (!strcmp(argv[1], "export") || !strcmp(argv[1], "export-rope"))) {
        return export_checkpoint(argv[2], !strcmp(argv[1], "export-rope"));
    }
    for (int a = 1; a < argc; a++) {
        int known = 0;
        for (int i = 0; i < SECTION_COUNT; i++) {
            known |= !strcmp(SECTIONS[i].name, argv[a]);
        }
        check_or(known, EXIT_USAGE, "no test section '%s'; ./test_llama list names them", argv[a]);
    }
    for (int i = 0; i < SECTION_COUNT; i++) {
        int wanted = argc == 1;
        for (int a = 1; a < argc; a++) {
            wanted |= !strcmp(SECTIONS[i].name, argv[a]);
        }
        if (wanted) {
            int passed = tests_passed, failed = tests_failed;
            double begin = clock_seconds();
            SECTIONS[i].run();
            int checks = tests_passed - passed + tests_failed - failed;
            printf("%s %-12s %6d checks, %.1f s\n",
                   tests_failed > failed ? "FAIL"
                   : checks              ? "ok  "
                                         : "skip",
                   SECTIONS[i].name, checks, clock_seconds() - begin);
            fflush(stdout);
        }
    }
    printf("%d passed, %d failed\n", tests_passed, tests_failed);
    return tests_failed > 0;
}
