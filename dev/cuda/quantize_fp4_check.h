// quantize_fp4_check.h: the operand of the FP4 carrier (llmc/cuda/quantize_fp4.cuh) on whatever GPU is here against
// llmc/cpu/quantize_fp4.h: codes, tiles of scales, base or bases of the rows, groups under the window; made of codes that
// are kept and of codes that are not. The products need Blackwell: test_llama cuda_quant.
#pragma once
#include "../../llmc/cpu/quantize_fp4.h"
#include "../../llmc/cuda/quantize_fp4.cuh"
#include "quantize_check.h"

// of the case whose codes check_case left in b->want
static void check_fp4(Bench* b, const Case* c, int rows, int cols, const char* input) {
    Rounding rounding = c->scale == SCALE_QUEST ? ROUND_NEAREST : ROUND_STOCHASTIC;
    size_t codes = qtensor_codes_bytes(rows, cols), at = nvfp4_tile_offset(rows, cols);
    size_t tiles = nvfp4_tile_bytes(rows, cols), bytes = nvfp4_bytes(rows, cols);
    uint8_t *want = (uint8_t*)malloc_or_die(bytes, "an operand"), *got = (uint8_t*)malloc_or_die(bytes, "an operand");
    for (int how = 0; how < 4; how++) {
        int keep = how & 1, by_row = how >> 1;
        char name[256];
        snprintf(name, sizeof name, "fp4 %s (%d, %d) %s, codes %s, base a %s", c->name, rows, cols, input,
                 keep ? "kept" : "not kept", by_row ? "row" : "tensor");
        CarrierBase base = {0.0f, 0, CARRIER_NONE, 0}, want_base = base;
        QTensor q = b->want, out = b->d_out;
        q.carrier = out.carrier = FORMAT_NVFP4;
        q.operand = want, out.operand = b->d_operand;
        q.base = by_row ? NULL : &want_base, out.base = by_row ? NULL : b->d_base;
        q.row_scale = by_row ? b->expected.row_scale : NULL, out.row_scale = by_row ? b->d_row_scale : NULL;
        out.codes = keep ? out.codes : NULL, out.scales = keep ? out.scales : NULL;
        out.mask = keep && c->scale == SCALE_QUEST ? out.mask : NULL;
        cpu_fp4_operand(&q, &b->want);
        cuda_check(cudaMemcpyAsync(b->d_base, &base, sizeof base, cudaMemcpyHostToDevice, gpu.stream));
        cuda_check(cudaMemsetAsync(b->d_operand, 0xaa, bytes, gpu.stream));
        cuda_check(cudaMemsetAsync(b->d_row_scale, 0xaa, 65536, gpu.stream));
        QuantizeArgs args = case_args(c, rounding, &out, b->d_tensor, &b->d_saved, b->d_position);
        cuda_quantize_mxfp4(&args);
        fetch(got, b->d_operand, bytes);
        fetch(&base, b->d_base, sizeof base);
        int64_t wrong = differing(want, got, codes), wrong_scales = differing(want + at, got + at, tiles);
        report(!wrong && !wrong_scales, "%s: %lld bytes of codes, %lld scales differ", name, (long long)wrong,
               (long long)wrong_scales);
        if (by_row) {
            fetch(b->row_scale, b->d_row_scale, sizeof(float) * (size_t)rows);
            wrong = differing(b->expected.row_scale, b->row_scale, sizeof(float) * (size_t)rows);
            report(wrong == 0, "%s: %lld bytes of the row scales differ", name, (long long)wrong);
        } else {
            report(!memcmp(&base, &want_base, sizeof base), "%s: scale %g, base %d, largest %d, under %d instead of %g, "
                   "%d, %d, %d", name, base.scale, base.base, base.largest, base.under, want_base.scale, want_base.base,
                   want_base.largest, want_base.under);
        }
        if (keep) {
            check_codes(b, out.codes, name, c->scale == SCALE_QUEST);
        }
    }
    free(want);
    free(got);
}
