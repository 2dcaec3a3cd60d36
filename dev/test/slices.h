// slices.h: ranges and slices of the flat buffer: every element belongs to one rank, whatever the sizes; state saved by
// N ranks is found again by M.
#pragma once

static void test_slices_of(const ModelConfig* m, int size) {
    ParamTable table = param_table(m);
    unsigned char* owners = (unsigned char*)calloc_or_die(table.elements, "owners");
    size_t owned = 0;
    int aligned = 1, ordered = 1;
    for (int rank = 0; rank < size; rank++) {
        Slices slices = slices_make(m, &table, rank, size);
        size_t end = 0;
        for (int i = 0; i < slices.count; i++) {
            Slice s = slices.list[i];
            Range whole = size == 1 ? Range{0, table.elements} : segment_range(m, &table, i);
            Range again = range_slice(whole, rank, size);
            ordered &= s.at >= end && s.at + s.count <= slices.elements && again.begin == s.begin;
            aligned &= s.at % SLICE_UNIT == s.begin % SLICE_UNIT;
            end = s.at + s.count;
            for (size_t e = s.begin; e < s.begin + s.count; e++) {
                owners[e]++;
            }
        }
        owned += slices_owned(&slices);
        free(slices.list);
    }
    size_t wrong = 0;
    for (size_t e = 0; e < table.elements; e++) {
        wrong += owners[e] != 1;
    }
    expect(wrong == 0 && owned == table.elements, "%d ranks: %zu of %zu elements have no or two owners", size, wrong,
           table.elements);
    expect(aligned && ordered, "%d ranks: slices overlap in the optimizer's arrays or lose their alignment", size);
    free(owners);
    free(table.list);
}

static void test_slices(void) {
    ModelConfig m = {.name = {}, .L = 2, .C = 24, .NH = 3, .NKV = 1, .HS = 8, .F = 40, .V = 37, .tied = 0,
                     .max_positions = 16, .rope_theta = 1e4, .rms_eps = 1e-5, .rope_factor = 0, .rope_low = 1,
                     .rope_high = 4, .rope_original = 16};
    const int sizes[] = {1, 2, 3, 4, 7, 64, 1000};
    for (int tied = 0; tied < 2; tied++) {
        m.tied = tied;
        for (int i = 0; i < 7; i++) {
            test_slices_of(&m, sizes[i]);
        }
    }
    Range part = range_overlap(Range{10, 20}, Range{25, 100}), none = range_overlap(Range{10, 20}, Range{30, 5});
    expect(part.begin == 25 && part.count == 5 && none.count == 0, "overlaps %zu + %zu, %zu", part.begin, part.count,
           none.count);
}
