// slices.h: who updates which elements of the flat parameter buffer (ZeRO-1), and where their optimizer state lies.
//
// The buffer is a row of segments in the order in which forward needs them: the embedding, each block, what follows the
// blocks. Backward finishes the gradients of a segment as a whole, so each is reduced and gathered on its own; rank r
// owns slice r of every segment. Slices begin at multiples of SLICE_UNIT elements of the segment; the last rank's takes
// the rest, so any size works with any number of ranks. Optimizer state of a rank is one array of its slices, each
// placed so that an element keeps its alignment of the flat buffer.
#pragma once
#include "model_config.h"

#define SLICE_UNIT ((size_t)32)

typedef struct { size_t begin, count; } Range;                // elements of the flat buffer
typedef struct { size_t begin, count, at; } Slice;            // at: element of the optimizer's arrays
typedef struct { int count; Slice* list; size_t elements; } Slices;  // elements: of the optimizer's arrays

// slice `rank` of `size` of elements begin .. begin + count - 1
static Range range_slice(Range whole, int rank, int size) {
    size_t unit = whole.count / (size_t)size / SLICE_UNIT * SLICE_UNIT, first = unit * (size_t)rank;
    return Range{whole.begin + first, rank == size - 1 ? whole.count - first : unit};
}

static Range range_overlap(Range a, Range b) {
    size_t begin = max_size(a.begin, b.begin);
    size_t end = a.begin + a.count < b.begin + b.count ? a.begin + a.count : b.begin + b.count;
    return Range{begin, end > begin ? end - begin : 0};
}

// the embedding, the blocks, the rest
static int segment_count(const ModelConfig* m) { return m->L + 2; }
static Range segment_range(const ModelConfig* m, const ParamTable* table, int segment) {
    size_t blocks_end = table->block_first + table->block_size * (size_t)m->L;
    if (segment == 0) {
        return Range{0, table->block_first};
    }
    if (segment == m->L + 1) {
        return Range{blocks_end, table->elements - blocks_end};
    }
    return Range{table->block_first + table->block_size * (size_t)(segment - 1), table->block_size};
}

// What rank `rank` of `size` owns, one slice a segment; size 1: one slice, all of it
static Slices slices_make(const ModelConfig* m, const ParamTable* table, int rank, int size) {
    int count = size == 1 ? 1 : segment_count(m);
    Slices slices = {count, (Slice*)calloc_or_die(sizeof(Slice) * (size_t)count, "slices"), 0};
    for (int i = 0; i < count; i++) {
        Range whole = size == 1 ? Range{0, table->elements} : segment_range(m, table, i);
        Range mine = range_slice(whole, rank, size);
        size_t at = (size_t)round_up((int64_t)slices.elements, SLICE_UNIT) + mine.begin % SLICE_UNIT;
        slices.list[i] = Slice{mine.begin, mine.count, at};
        slices.elements = at + mine.count;
    }
    return slices;
}

// elements that the slices hold, without what lies between them in the optimizer's arrays
static size_t slices_owned(const Slices* slices) {
    size_t owned = 0;
    for (int i = 0; i < slices->count; i++) {
        owned += slices->list[i].count;
    }
    return owned;
}
