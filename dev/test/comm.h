// comm.h: collectives against sums that are exact, on the ranks that mpirun starts this with (dev/test/ranks.sh does):
// sizes that do not divide, several rounds of messages, both types. In one process there is nothing to test.
#pragma once

// small whole numbers: their sums over ranks are exact in every type
static float comm_test_value(int rank, size_t i) { return (float)((i * 7 + (size_t)rank * 3) % 11); }

static void test_comm_size(const Comm* comm, size_t count, RealType type, RealType wire) {
    Range mine = range_slice(Range{0, count}, comm->rank, comm->size);
    RealArray x = {type, malloc_or_die(count * real_bytes(type), "test")};
    size_t wrong = 0, off = 0;
    for (size_t i = 0; i < count; i++) {
        real_set(x, i, comm_test_value(comm->rank, i));
    }
    comm->ops->begin();
    comm->ops->reduce_scatter(comm, x, count, wire);
    comm->ops->all_gather(comm, x, count);
    comm->ops->wait();
    for (size_t i = 0; i < count; i++) {
        float sum = 0.0f;
        for (int r = 0; r < comm->size; r++) {
            sum += comm_test_value(r, i);
        }
        wrong += real_get(x, i) != sum;
        off += real_get(x, i) != sum + (float)(i == mine.begin);  // one element is planted
    }
    wrong = (size_t)comm_max_of(comm, (int64_t)wrong);
    expect(wrong == 0, "%zu of %zu sums over %d ranks are wrong", wrong, count, comm->size);
    expect(mine.count == 0 || off == 1, "the planted error was not seen");
    free(x.data);
}

static void test_comm_host(const Comm* comm) {
    double values[3] = {comm->rank + 1.0, 10.0, 100.0}, sum = 0.0, expected = 0.5 * comm->size * (comm->size + 1);
    comm->ops->sum(comm, &sum, values, 3);
    expect(sum == expected + 110.0 * comm->size, "sum %g", sum);
    expect(comm_sum_of(comm, comm->rank + 1.0) == expected, "sum on the host");
    expect(comm_max_of(comm, comm->rank) == comm->size - 1 && comm_min_of(comm, comm->rank) == 0, "largest, least");
    char error[64] = "";
    expect(!comm_any_error(comm, error, sizeof error), "an error that nobody has");
    if (comm->rank > 0) {
        snprintf(error, sizeof error, "of rank %d", comm->rank);
    }
    expect(comm_any_error(comm, error, sizeof error) && !strcmp(error, "of rank 1"), "error '%s'", error);
    char* text = comm_broadcast_text(comm, comm->rank == 1 ? strdup_or_die("from rank 1") : NULL, 1);
    expect(!strcmp(text, "from rank 1"), "text '%s'", text);
    free(text);
}

static void test_comm(void) {
#ifdef USE_MPI
    Comm comm = comm_init();
    if (comm.size == 1) {
        return;
    }
    comm.ops = &MPI_OPS;
    const size_t counts[] = {1, 31, 32 * (size_t)comm.size, 4097, 2 * MPI_CHUNK + 12345};
    for (int i = 0; i < 5; i++) {
        test_comm_size(&comm, counts[i], REAL_F32, REAL_F32);
        test_comm_size(&comm, counts[i], REAL_F32, REAL_FLOATX);
        test_comm_size(&comm, counts[i], REAL_FLOATX, REAL_FLOATX);
    }
    test_comm_host(&comm);
    comm_end(&comm, 0);
#endif
}
