// bench.h: the rows of --bench for linear layers (section bench): they are what a step runs, as often as it does. What
// the binary prints of them is checked by bench.sh.
#pragma once
#include "memory.h"

// how often the operations were called that linear layers consist of
typedef enum {
    CALLED_GEMM, CALLED_QUANTIZE, CALLED_UNROTATE, CALLED_SWIGLU, CALLED_RMSNORM, CALLED_SWIGLU_BACKWARD,
    CALLED_RMSNORM_BACKWARD, CALLED_KINDS,
} Called;
static const char* const CALLED_NAMES[CALLED_KINDS] = {
    "gemm", "quantize", "unrotate", "swiglu_quantize", "rmsnorm_quantize", "unrotate_swiglu_backward",
    "unrotate_rmsnorm_backward"};
static int called[CALLED_KINDS];

static void called_gemm(const GemmArgs* args) {
    called[CALLED_GEMM]++;
    CPU_OPS.gemm(args);
}
static void called_quantize(const QuantizeArgs* args) {
    called[CALLED_QUANTIZE]++;
    CPU_OPS.quantize(args);
}
static void called_unrotate(RealArray x, const uint32_t* mask, const float* row_scale, int rows, int cols) {
    called[CALLED_UNROTATE]++;
    CPU_OPS.unrotate(x, mask, row_scale, rows, cols);
}
static void called_swiglu(const QuantizeArgs* args, floatX* scratch, Mxint8 kept, const floatX* gate_up, int BT,
                          int F) {
    called[CALLED_SWIGLU]++;
    CPU_OPS.swiglu_quantize(args, scratch, kept, gate_up, BT, F);
}
static void called_rmsnorm(const QuantizeArgs* args, floatX* scratch, floatX* sum, float* rstd, const floatX* a,
                           const floatX* b, const floatX* weight, int BT, int C, float eps) {
    called[CALLED_RMSNORM]++;
    CPU_OPS.rmsnorm_quantize(args, scratch, sum, rstd, a, b, weight, BT, C, eps);
}
static void called_swiglu_backward(floatX* dinp, floatX* dact, const uint32_t* mask, const float* row_scale,
                                   const floatX* inp, Mxint8 kept, int BT, int F) {
    called[CALLED_SWIGLU_BACKWARD]++;
    CPU_OPS.unrotate_swiglu_backward(dinp, dact, mask, row_scale, inp, kept, BT, F);
}
static void called_rmsnorm_backward(floatX* dinp, RealArray dweight, floatX* dnorm, const uint32_t* mask,
                                    const float* row_scale, const floatX* dresidual, const floatX* inp,
                                    const floatX* weight, const float* rstd, int BT, int C) {
    called[CALLED_RMSNORM_BACKWARD]++;
    CPU_OPS.unrotate_rmsnorm_backward(dinp, dweight, dnorm, mask, row_scale, dresidual, inp, weight, rstd, BT, C);
}

static Ops called_ops(void) {
    Ops ops = CPU_OPS;
    ops.gemm = called_gemm, ops.quantize = called_quantize, ops.unrotate = called_unrotate;
    ops.swiglu_quantize = called_swiglu, ops.rmsnorm_quantize = called_rmsnorm;
    ops.unrotate_swiglu_backward = called_swiglu_backward, ops.unrotate_rmsnorm_backward = called_rmsnorm_backward;
    return ops;
}

// calls of a micro-batch (of what a step does once, where `once`), as the rows of a block say: each row is run
static void bench_count_rows(double* want, Model* model, int block, int once) {
    Bench bench = bench_begin(model);
    bench.block = block;
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        bench_prepare(&bench, (LinearKind)kind);
        LinearTable table = bench_linear_table(&bench);
        for (int i = 0; i < table.count; i++) {
            const LinearRow* row = &table.row[i];
            memset(called, 0, sizeof called);
            row->run(&bench);
            for (int c = 0; c < CALLED_KINDS && row->part != PART_PASS; c++) {
                want[c] += (row->part == PART_ONCE) == once ? row->calls * called[c] : 0.0;
            }
        }
    }
}

static void test_bench_calls(const char* recipe, Recompute recompute, int dense_first, int dense_last) {
    Model model = memory_model(recipe, recompute, 0, dense_first, dense_last);
    Ops ops = called_ops();
    memory_gradients(&model);
    model.ops = model.linear.ops = &ops;
    for (int once = 0; once < 2; once++) {
        double want[CALLED_KINDS] = {};
        int got[CALLED_KINDS], other[LINEAR_KINDS] = {}, seen = 0;
        for (int l = 0; l < model.config.L; l++) {  // one quantized block and one dense one stand for the others
            int dense = block_is_dense(&model, l);
            if (!other[dense]++) {
                bench_count_rows(want, &model, l, once);
            }
        }
        memset(called, 0, sizeof called);
        if (once) {
            model.weights_quantized = 0;
            model_quantize_weights(&model);
            model_finish_gradients(&model);
        } else {
            want[CALLED_GEMM] += 3;  // the head
            model_run_forward(&model, 1.0f / 64.0f, 1);
            model_backward(&model);
        }
        memcpy(got, called, sizeof got);
        for (int c = 0; c < CALLED_KINDS; c++) {
            expect(want[c] == got[c], "%s, --recompute %s, dense %d and %d: %s %d times a %s, the rows say %g", recipe,
                   RECOMPUTE_NAMES[recompute], dense_first, dense_last, CALLED_NAMES[c], got[c],
                   once ? "step" : "micro-batch", want[c]);
            seen += got[c];
        }
        expect(seen > 0 || (once && dense_first + dense_last == model.config.L) || (once && !strcmp(recipe, "bf16")),
               "nothing was counted");
    }
    model_free(&model);
}

// The rows, one after the other, leave what the layer's own backward leaves; every number of a row is positive.
static void test_bench_rows(const char* recipe) {
    Model model = memory_model(recipe, RECOMPUTE_NONE, 0, 0, 0);
    memory_gradients(&model);
    Bench bench = bench_begin(&model);
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        bench_prepare(&bench, (LinearKind)kind);
        const Linear* linear = bench_linear(&bench);
        LinearBuffers buffers = bench_buffers(&bench);
        size_t inp_bytes = sizeof(floatX) * 64 * (size_t)linear->C;
        size_t weight_bytes = sizeof(float) * (size_t)linear->C * (size_t)linear->OC;
        void *dinp = malloc_or_die(inp_bytes, "test"), *dweight = malloc_or_die(weight_bytes, "test");
        memset(linear->dweight.data, 0, weight_bytes);
        linear_backward_owed(&model.linear, linear, buffers.dinp, buffers.dout, &bench_block(&bench)->x[kind], 64);
        memcpy(dinp, buffers.dinp, inp_bytes);
        memcpy(dweight, linear->dweight.data, weight_bytes);
        memset(linear->dweight.data, 0, weight_bytes);
        memset(buffers.dinp, 0, inp_bytes);
        LinearTable table = bench_linear_table(&bench);
        int compared = 0;
        for (int i = 0; i < table.count; i++) {
            const LinearRow* row = &table.row[i];
            row->run(&bench);
            int gemm = row->part == PART_GEMM;
            expect(row->calls > 0 && (row->flops > 0) == gemm && (row->bytes > 0) == !gemm,
                   "%s %s: %g calls, %g FLOP, %g bytes", LINEAR_NAMES[kind], row->name, row->calls, row->flops,
                   row->bytes);
            if (row->run == bench_gemm_dx) {
                compared += expect(!memcmp(dinp, buffers.dinp, inp_bytes), "%s %s: another dX", recipe,
                                   LINEAR_NAMES[kind]);
            } else if (row->run == bench_gemm_dw) {
                compared += expect(!memcmp(dweight, linear->dweight.data, weight_bytes), "%s %s: another dW", recipe,
                                   LINEAR_NAMES[kind]);
                row->run(&bench);
                expect(memcmp(dweight, linear->dweight.data, weight_bytes) != 0, "a second dW is not seen");
            }
        }
        expect(compared == 2, "%d products of %s were compared", compared, LINEAR_NAMES[kind]);
        test_free(dinp, dweight);
    }
    model_free(&model);
}

static void test_bench(void) {
    const char* recipes[] = {"quartet", "fp8", "bf16"};
    for (int r = 0; r < 3; r++) {
        test_bench_rows(recipes[r]);
        for (int level = 0; level < RECOMPUTE_LEVELS; level++) {
            test_bench_calls(recipes[r], (Recompute)level, 0, 0);
        }
    }
    for (int level = 0; level < RECOMPUTE_LEVELS; level++) {
        test_bench_calls("quartet", (Recompute)level, 1, 0);
        test_bench_calls("quartet", (Recompute)level, 0, 1);
        test_bench_calls("quartet", (Recompute)level, 1, 1);
    }
    test_bench_calls("quartet", RECOMPUTE_NONE, 3, 0);
}
