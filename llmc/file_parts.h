// file_parts.h: large pieces of a file, read or written by several threads at once. One thread moves 1 to 3 GB/s
// between memory and the cache of the system, while the disks of training machines take more.
//
//     FilePart parts[FILE_THREADS];
//     int count = file_parts_begin(parts, fd, FILE_WRITE, data, bytes, offset);
//     ...                                               what can be done meanwhile with data that nobody changes
//     const FilePart* failed = file_parts_end(parts, count);      NULL, or the first part that was not done
// A small piece is moved by file_parts_end itself.
#pragma once
#include "common.h"
#include <pthread.h>

enum { FILE_THREADS = 4, FILE_PART = 8 << 20 };  // threads for a piece; bytes that are worth one
typedef enum { FILE_READ, FILE_WRITE } FileDirection;

typedef struct {
    pthread_t thread;
    FileDirection direction;
    int fd;
    char* data;
    size_t bytes, done;
    int64_t offset;  // in the file
    int ended;       // the file ended, or took nothing, before all was done
    int error;       // errno, or 0
} FilePart;

static void* file_part_move(void* argument) {
    FilePart* part = (FilePart*)argument;
    while (part->done < part->bytes && !part->error && !part->ended) {
        char* data = part->data + part->done;
        size_t bytes = part->bytes - part->done;
        off_t offset = (off_t)(part->offset + (int64_t)part->done);
        ssize_t moved = part->direction == FILE_WRITE ? pwrite(part->fd, data, bytes, offset)
                                                      : pread(part->fd, data, bytes, offset);
        part->done += moved > 0 ? (size_t)moved : 0;
        part->ended = moved == 0;
        part->error = moved < 0 && errno != EINTR ? errno : 0;
    }
#ifdef SYNC_FILE_RANGE_WRITE  // the disk begins now, not when it is waited for at the end; what fails shows there
    if (part->direction == FILE_WRITE) {
        sync_file_range(part->fd, (off_t)part->offset, (off_t)part->bytes, SYNC_FILE_RANGE_WRITE);
    }
#endif
    return NULL;
}

// parts has room for FILE_THREADS. Returns how many there are.
static int file_parts_begin(FilePart* parts, int fd, FileDirection direction, void* data, size_t bytes,
                            int64_t offset) {
    size_t count = bytes / FILE_PART;
    count = count < 1 ? 1 : count > (size_t)FILE_THREADS ? (size_t)FILE_THREADS : count;
    memset(parts, 0, count * sizeof *parts);
    for (size_t i = 0; i < count; i++) {
        size_t begin = bytes * i / count, end = bytes * (i + 1) / count;
        parts[i].direction = direction;
        parts[i].fd = fd;
        parts[i].data = (char*)data + begin;
        parts[i].bytes = end - begin;
        parts[i].offset = offset + (int64_t)begin;
        if (count > 1) {
            pthread_or_die(pthread_create(&parts[i].thread, NULL, file_part_move, &parts[i]), "pthread_create");
        }
    }
    return (int)count;
}

static const FilePart* file_parts_end(FilePart* parts, int count) {
    const FilePart* failed = NULL;
    for (int i = 0; i < count; i++) {
        if (count > 1) {
            pthread_or_die(pthread_join(parts[i].thread, NULL), "pthread_join");
        } else {
            file_part_move(&parts[i]);
        }
        failed = !failed && parts[i].done < parts[i].bytes ? &parts[i] : failed;
    }
    return failed;
}
