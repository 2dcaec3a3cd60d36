// comm.h: ranks. This version runs one process; the interface is the one that several ranks will use, and size 1 is a
// no-op.
#pragma once
#include "common.h"

typedef struct { int rank, size; } Comm;

// Started by mpirun or srun with several ranks, each would train the same model into the same folder: refuse.
static Comm comm_init(void) {
    const char* names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (int i = 0; i < 3; i++) {
        const char* value = getenv(names[i]);
        check_or(
            !value || atoi(value) <= 1, EXIT_USAGE,
            "started as %s processes, but this version trains in one process; start it without mpirun or with one task",
            value);
    }
    return (Comm){.rank = 0, .size = 1};
}

// *value, in device memory, becomes its sum over all ranks
static void comm_sum(const Comm* comm, double* value) {
    (void)value;
    check(comm->size == 1, "internal: communication between ranks is not built");
}
