// bench_linear.h: --bench, the linear layers. Times each operation that makes up qkv, o, gate_up and down of one block,
// as a step runs them, on the model's own buffers:
//
//   quantize   x with what comes before it (norm, SwiGLU), dy, wt and xt from saved codes, dyt
//   gemm       forward, dX, dW
//   finish     mask and H^T of dX, with what comes behind it (backward of norm, SwiGLU)
//   once       of an optimizer step, not of a micro-batch: quantize w, mask and H^T of dW
//   pass       the norm or SwiGLU that the row above has within it, timed alone: a dense model does it, too
//
// Bytes are the fewest that the operation needs for what is kept (linear.h) and for the carrier in use: every input
// read once, every output written once; vectors of a row or column (rstd, norm weights, row factors) do not count.
// What is not GEMM is summed twice: fused operations whole, and net, which is what they take beyond their pass. On the
// CPU products decode codes themselves, within their time.
#pragma once
#include "bench_ops.h"

typedef enum { PART_QUANTIZE, PART_GEMM, PART_FINISH, PART_ONCE, PART_PASS, PARTS } BenchPart;
static const char* const PART_NAMES[PARTS] = {"quantize", "gemm", "finish", "once", "pass"};

typedef struct {
    const char* name;
    BenchPart part;
    void (*run)(Bench* bench);
    double calls;         // a micro-batch, or a step where the part is `once`
    double flops, bytes;  // a call
    double seconds;       // a call, as measured
} LinearRow;

#define LINEAR_ROWS 18
typedef struct { LinearRow row[LINEAR_ROWS]; int count; } LinearTable;

// of an operand: what later passes read again, and all that its quantizer writes
static double bench_saved_bytes(const QTensor* q) {
    double elements = (double)q->rows * q->cols;
    return elements * (q->format == FORMAT_MXFP4 ? 0.5 + 1.0 / GROUP : 1.0);
}
// of an element: floatX, 8 bits, or 4 with a scale byte for each 16
static double bench_carrier_bytes(Format carrier) {
    return carrier == FORMAT_FLOATX ? (double)sizeof(floatX) : carrier == FORMAT_NVFP4 ? 0.5 + 1.0 / 16 : 1.0;
}
static double bench_made_bytes(const QTensor* q) {
    double elements = (double)q->rows * q->cols;
    return (q->codes ? bench_saved_bytes(q) : 0.0) + (q->mask ? elements / 8 : 0.0) +
           (q->operand ? elements * bench_carrier_bytes(q->carrier) : 0.0);
}

// what backward keeps of gate and up where that is not gate_up itself
static double bench_kept_bytes(const Bench* bench) {
    size_t BT = (size_t)bench_tokens(bench->model), F = (size_t)bench->model->config.F;
    return bench_block(bench)->int8[SAVED_GATE_UP].codes ? (double)mxint8_bytes(BT, 2 * F) : 0.0;
}

// Of the blocks that are as the timed one, quantized or dense, so many are entered behind a residual add, and backward
// makes so many of them again: whole, or their packed operands, with the gate+up product or without.
typedef struct { double blocks, added, rebuilt_block, rebuilt_packed, rebuilt_ffn; } BlockCalls;
static BlockCalls bench_calls(const Bench* bench) {
    const Model* model = bench->model;
    Recompute recompute = model->training.recompute;
    BlockCalls n = {0, 0, 0, 0, 0};
    for (int l = 0; l < model->config.L; l++) {
        if (block_is_dense(model, l) == block_is_dense(model, bench->block)) {
            int last = l + 1 == model->config.L;
            n.blocks += 1;
            n.added += l > 0;
            n.rebuilt_block += recompute == RECOMPUTE_BLOCK && !last;
            n.rebuilt_packed += (recompute == RECOMPUTE_NORM || recompute == RECOMPUTE_FFN) && !last;
            n.rebuilt_ffn += recompute == RECOMPUTE_FFN && !last;
        }
    }
    return n;
}

// rows that the model never runs are left out
static void table_add(LinearTable* table, const char* name, BenchPart part, void (*run)(Bench* bench), double calls,
                      double flops, double bytes) {
    if (calls > 0) {
        check(table->count < LINEAR_ROWS, "internal: more than %d rows of a linear layer", LINEAR_ROWS);
        table->row[table->count++] = LinearRow{name, part, run, calls, flops, bytes, 0.0};
    }
}

// how x is made; a pass stands behind the operation that has it within it
static void table_add_x(LinearTable* t, const Bench* bench, BlockCalls n, double inp, double x) {
    double again = n.rebuilt_block, packed = n.rebuilt_packed, kept = bench_kept_bytes(bench);
    switch (bench->kind) {
    case LINEAR_QKV:
        table_add(t, "add + rmsnorm + quantize x", PART_QUANTIZE, bench_enter_added, n.added, 0, 3 * inp + x);
        table_add(t, "add + rmsnorm", PART_PASS, bench_add_rmsnorm, n.added, 0, 4 * inp);
        table_add(t, "rmsnorm + quantize x", PART_QUANTIZE, bench_enter, n.blocks - n.added + again + packed, 0,
                  inp + x);
        table_add(t, "rmsnorm", PART_PASS, bench_rmsnorm, n.blocks - n.added + again + packed, 0, 2 * inp);
        break;
    case LINEAR_GATE_UP:
        table_add(t, "add + rmsnorm + quantize x", PART_QUANTIZE, bench_middle_added, n.blocks + again, 0, 3 * inp + x);
        table_add(t, "add + rmsnorm", PART_PASS, bench_add_rmsnorm, n.blocks + again, 0, 4 * inp);
        table_add(t, "rmsnorm + quantize x", PART_QUANTIZE, bench_middle, packed, 0, inp + x);
        table_add(t, "rmsnorm", PART_PASS, bench_rmsnorm, packed, 0, 2 * inp);
        break;
    case LINEAR_DOWN:
        again += kept > 0 ? 0 : packed;
        table_add(t, "swiglu + quantize x", PART_QUANTIZE, bench_swiglu_x, n.blocks + again, 0, 2 * inp + kept + x);
        table_add(t, "swiglu", PART_PASS, bench_swiglu, n.blocks + again, 0, 3 * inp + kept);
        break;
    default: table_add(t, "quantize x", PART_QUANTIZE, bench_quantize_x, n.blocks + again + packed, 0, inp + x);
    }
}

static void table_add_finish(LinearTable* t, const Bench* bench, double blocks, double inp) {
    double mask = bench->owed.mask ? inp / sizeof(floatX) / 8 : 0.0, kept = bench_kept_bytes(bench);
    double gate_up = kept > 0 ? kept : 2 * inp;
    switch (bench->kind) {
    case LINEAR_QKV:
    case LINEAR_GATE_UP:
        table_add(t, "unrotate + rmsnorm backward", PART_FINISH, bench_finish, blocks, 0, 4 * inp + mask);
        table_add(t, "rmsnorm backward", PART_PASS, bench_rmsnorm_backward, blocks, 0, 4 * inp);
        break;
    case LINEAR_DOWN:
        table_add(t, "unrotate + swiglu backward", PART_FINISH, bench_finish, blocks, 0, 3 * inp + gate_up + mask);
        table_add(t, "swiglu backward", PART_PASS, bench_swiglu_backward, blocks, 0, 3 * inp + gate_up);
        break;
    default: table_add(t, "unrotate", PART_FINISH, bench_finish, blocks, 0, 2 * inp + mask);
    }
}

// of the layer that bench_prepare was called for
static LinearTable bench_linear_table(const Bench* bench) {
    LinearTable t = {};
    const Linear* linear = bench_linear(bench);
    const QTensor *x = &bench_block(bench)->x[bench->kind], *w = &linear->w, *made = bench->made;
    double BT = bench_tokens(bench->model), weights = (double)linear->C * linear->OC, flops = 2 * BT * weights;
    double inp = sizeof(floatX) * BT * linear->C, dout = sizeof(floatX) * BT * linear->OC;
    BlockCalls n = bench_calls(bench);
    int quantized = !block_is_dense(bench->model, bench->block);
    double forward = n.blocks + (bench->kind == LINEAR_DOWN ? 0 : n.rebuilt_block) +
                     (bench->kind == LINEAR_GATE_UP ? n.rebuilt_ffn : 0), backward = quantized ? n.blocks : 0;
    if (quantized) {
        table_add_x(&t, bench, n, inp, bench_made_bytes(x));
    }
    if (w->operand) {
        table_add(&t, "w for the product", PART_QUANTIZE, bench_carry_w, forward, 0,
                  bench_made_bytes(w) - (w->mask ? weights / 8 : 0.0));  // codes are read here, not written
    }
    table_add(&t, "GEMM forward", PART_GEMM, bench_forward, forward, flops, 0);
    table_add(&t, "quantize dy", PART_QUANTIZE, bench_quantize_dy, backward, 0,
              dout + bench_made_bytes(&made[OPERAND_DY]));
    table_add(&t, "quantize wt", PART_QUANTIZE, bench_quantize_wt, backward, 0,
              bench_saved_bytes(w) + bench_made_bytes(&made[OPERAND_WT]));
    table_add(&t, "GEMM dX", PART_GEMM, bench_gemm_dx, n.blocks, flops, 0);
    table_add(&t, "quantize dyt", PART_QUANTIZE, bench_quantize_dyt, backward, 0,
              dout + bench_made_bytes(&made[OPERAND_DYT]));
    table_add(&t, "quantize xt", PART_QUANTIZE, bench_quantize_xt, backward, 0,
              bench_saved_bytes(x) + bench_made_bytes(&made[OPERAND_XT]));
    table_add(&t, "GEMM dW", PART_GEMM, bench_gemm_dw, n.blocks, flops, 0);
    if (bench->owed.rotated) {
        table_add_finish(&t, bench, n.blocks, inp);
    }
    table_add(&t, "quantize w", PART_ONCE, bench_quantize_w, backward, 0,
              sizeof(floatX) * weights + bench_made_bytes(w));
    table_add(&t, "unrotate dW", PART_ONCE, bench_finish_dw, bench->owed.rotated ? n.blocks : 0, 0,
              2.0 * (double)real_bytes(linear->dweight.type) * weights + (w->mask ? weights / 8 : 0.0));
    return t;
}

// ---------------------------------------------------------------------------------------------------------------------
// print: a line a row and a line a sum, numbers by column, the operation's name at the end

static void bench_print_row(const Bench* bench, const LinearRow* r) {
    int gemm = r->flops > 0;
    double rate = (gemm ? r->flops : r->bytes) / r->seconds;
    printf("op     %-8s %-8s %5.0f %10.4f %10.3f %6.2f%% %9.4g %-5s %9.4g %-7s %5.0f%%  %s\n",
           LINEAR_NAMES[bench->kind], PART_NAMES[r->part], r->calls, r->seconds * 1e3, r->seconds * 1e3 * r->calls,
           100 * r->seconds * r->calls / bench->step_seconds, gemm ? r->flops * 1e-9 : r->bytes * 1e-6,
           gemm ? "GFLOP" : "MB", rate * 1e-12, gemm ? "TFLOP/s" : "TB/s",
           100 * rate / (gemm ? bench->gemm_rate : bench->copy_rate), r->name);
    fflush(stdout);
}

// seconds of each part; pass: what is within them of the passes
typedef struct { double part[PARTS], pass[PARTS]; } LinearSums;

static void sums_add(LinearSums* sums, const LinearTable* table) {
    BenchPart within = PART_GEMM;
    for (int i = 0; i < table->count; i++) {
        const LinearRow* r = &table->row[i];
        if (r->part == PART_PASS) {
            sums->pass[within] += r->calls * r->seconds;
        } else {
            sums->part[r->part] += r->calls * r->seconds;
            within = r->part;
        }
    }
}

// net: without the passes
static void bench_print_sums(const Bench* bench, const char* name, const LinearSums* sums, int net) {
    double share = 100 / bench->step_seconds, seconds[PARTS];
    for (int i = 0; i < PARTS; i++) {
        seconds[i] = sums->part[i] - (net ? sums->pass[i] : 0.0);
    }
    double q = seconds[PART_QUANTIZE], g = seconds[PART_GEMM], f = seconds[PART_FINISH], once = seconds[PART_ONCE];
    printf("sum    %-8s %-8s %10.3f %10.3f %10.3f %8.1f%% %9.2f%% %9.2f%% %9.2f%% %10.3f %9.2f%%\n", name,
           net ? "net" : "whole", q * 1e3, g * 1e3, f * 1e3, 100 * (q + f) / g, q * share, g * share, f * share,
           once * 1e3, once * share);
}

// the rows of a linear layer, timed in their order and printed
static LinearTable bench_linear_measure(Bench* bench, LinearKind kind) {
    bench_prepare(bench, kind);
    LinearTable table = bench_linear_table(bench);
    for (int i = 0; i < table.count; i++) {
        LinearRow* row = &table.row[i];
        if (row->part == PART_FINISH) {
            bench_clear_owed(bench);
        }
        row->seconds = bench_time(bench, row->run);
        bench_print_row(bench, row);
    }
    return table;
}

static void bench_linears(Bench* bench) {
    LinearSums sums[LINEAR_KINDS] = {}, all = {};
    int dense = block_is_dense(bench->model, bench->block);
    printf("linears    block %d, as are %.0f of %d blocks; calls: of a micro-batch (once: of a step); %%step: of the "
           "step below; %%max: of the ceilings\n",
           bench->block, bench_calls(bench).blocks, bench->model->config.L);
    printf("%-6s %-8s %-8s %5s %10s %10s %7s %15s %17s %6s  %s\n", "op", "kind", "part", "calls", "ms/call", "ms",
           "%step", "work/call", "rate", "%max", "operation");
    for (int kind = 0; kind < LINEAR_KINDS; kind++) {
        LinearTable table = bench_linear_measure(bench, (LinearKind)kind);
        sums_add(&sums[kind], &table);
        sums_add(&all, &table);
    }
    printf("sums       ms of a micro-batch (once: of a step) and shares of the step; net: fused operations less their "
           "pass\n");
    printf("%-6s %-8s %-8s %10s %10s %10s %9s %10s %10s %10s %10s %10s\n", "sum", "kind", "count", "quantize", "gemm",
           "finish", "non/gemm", "quantize%", "gemm%", "finish%", "once", "once%");
    for (int kind = 0; kind <= LINEAR_KINDS; kind++) {
        for (int net = 0; net <= !dense; net++) {
            bench_print_sums(bench, kind < LINEAR_KINDS ? LINEAR_NAMES[kind] : "all",
                             kind < LINEAR_KINDS ? &sums[kind] : &all, net);
        }
    }
}
