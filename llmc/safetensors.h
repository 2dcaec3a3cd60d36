// safetensors.h: a strict reader and a streaming writer of the safetensors format.
//
//   8 bytes   H, the length of the header, little-endian
//   H bytes   a JSON object, padded with spaces so that the data begins at a multiple of 8:
//             {"__metadata__": {"format": "pt"}, NAME: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
//   the rest  the tensors, row-major, little-endian; data_offsets [begin, end) count from the first byte of the data
// "format": "pt" is what HF transformers asks for. Strict: the tensors tile the data without gap or overlap, and the
// file ends where they end; so a truncated or extended file never opens. What the data say is not checked here: the
// writer returns an XXH64 of the whole file, which the checkpoint's state.json keeps.
//
// Errors are returned (-1 and a text), never fatal: a damaged checkpoint makes the loader take an older one, and a full
// disk must not end a training run. Offsets and counts are 64 bits throughout.
#pragma once
#include "json.h"
#include "xxh64.h"

#define SAFETENSORS_MAX_RANK 8
#define SAFETENSORS_MAX_HEADER 100000000  // bytes; the limit of the reference implementation
#define SAFETENSORS_ERROR_BYTES 1024

typedef enum {
    SAFETENSORS_F64, SAFETENSORS_F32, SAFETENSORS_F16, SAFETENSORS_BF16, SAFETENSORS_F8_E4M3, SAFETENSORS_F8_E5M2,
    SAFETENSORS_I64, SAFETENSORS_I32, SAFETENSORS_I16, SAFETENSORS_I8,
    SAFETENSORS_U64, SAFETENSORS_U32, SAFETENSORS_U16, SAFETENSORS_U8, SAFETENSORS_BOOL,
    SAFETENSORS_DTYPES
} SafetensorsDtype;

static const struct { const char* name; int bytes; } safetensors_dtypes[SAFETENSORS_DTYPES] = {
    {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
    {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1},
    {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1}, {"BOOL", 1},
};

typedef struct {
    const char* name;
    SafetensorsDtype dtype;
    int rank;
    int64_t shape[SAFETENSORS_MAX_RANK];
    int64_t count;   // elements: the product of shape, 1 for rank 0
    int64_t offset;  // of the first byte, from the start of the data
    int64_t bytes;   // count * size of dtype
} SafetensorsEntry;

// return safetensors_fail(...): writes the text and returns -1
static int safetensors_fail(char* error, size_t error_bytes, const char* format, ...) PRINTF_LIKE(3, 4);
static int safetensors_fail(char* error, size_t error_bytes, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error, error_bytes, format, args);
    va_end(args);
    return -1;
}

// fills count and bytes from dtype and shape; -1 when a dimension is negative or the size passes 2^63
static int safetensors_size(SafetensorsEntry* entry) {
    int64_t size = safetensors_dtypes[entry->dtype].bytes;
    entry->count = 1;
    for (int i = 0; i < entry->rank; i++) {
        int64_t n = entry->shape[i];
        if (n < 0 || (n > 0 && entry->count > INT64_MAX / size / n)) {
            return -1;
        }
        entry->count *= n;
    }
    entry->bytes = entry->count * size;
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// reader

typedef struct {
    char* path;
    int fd;
    int64_t file_bytes;
    int64_t data_offset;        // of the first data byte in the file
    int64_t data_bytes;
    int count;
    SafetensorsEntry* entries;  // in the order of the data
    Json* header;
} SafetensorsFile;

static int safetensors_pread(int fd, const char* path, void* memory, int64_t bytes, int64_t offset, char* error,
                             size_t error_bytes) {
    int64_t done = 0;
    while (done < bytes) {
        ssize_t got = pread(fd, (char*)memory + done, (size_t)(bytes - done), (off_t)(offset + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return safetensors_fail(error, error_bytes, "cannot read '%s': %s", path, strerror(errno));
        }
        if (got == 0) {
            return safetensors_fail(error, error_bytes, "'%s' ends at byte %lld, where %lld more are needed: truncated",
                                    path, (long long)(offset + done), (long long)(bytes - done));
        }
        done += got;
    }
    return 0;
}

static int safetensors_parse_metadata(const SafetensorsFile* file, const Json* node, char* error, size_t error_bytes) {
    int good = node->type == JSON_OBJECT;
    for (const Json* item = node->first; good && item; item = item->next) {
        good = item->type == JSON_STRING;
    }
    if (!good) {
        return safetensors_fail(error, error_bytes, "'%s': __metadata__ is not an object of strings", file->path);
    }
    return 0;
}

static int safetensors_parse_shape(SafetensorsEntry* entry, const Json* shape) {
    if (!shape || shape->type != JSON_ARRAY || shape->count > SAFETENSORS_MAX_RANK) {
        return -1;
    }
    for (const Json* item = shape->first; item; item = item->next) {
        if (json_try_int(item, &entry->shape[entry->rank++]) != 0) {
            return -1;
        }
    }
    return 0;
}

static int safetensors_parse_entry(SafetensorsEntry* entry, const SafetensorsFile* file, const Json* node, char* error,
                                   size_t error_bytes) {
    memset(entry, 0, sizeof *entry);
    entry->name = node->key;
    if (strlen(node->key) != (size_t)node->key_bytes) {
        return safetensors_fail(error, error_bytes, "'%s': a tensor name has a zero byte: \"%.80s\"", file->path,
                                node->key);
    }
    const char* dtype = "";
    if (node->type != JSON_OBJECT || node->count != 3 || json_try_string(json_get(node, "dtype"), &dtype) != 0) {
        return safetensors_fail(error, error_bytes,
                                "'%s': tensor \"%.80s\" is not described by dtype, shape, data_offsets", file->path,
                                node->key);
    }
    int known = 0;
    while (known < SAFETENSORS_DTYPES && strcmp(dtype, safetensors_dtypes[known].name) != 0) {
        known++;
    }
    if (known == SAFETENSORS_DTYPES) {
        return safetensors_fail(error, error_bytes, "'%s': tensor \"%.80s\" has the unknown dtype \"%.40s\"",
                                file->path, node->key, dtype);
    }
    entry->dtype = (SafetensorsDtype)known;
    if (safetensors_parse_shape(entry, json_get(node, "shape")) != 0 || safetensors_size(entry) != 0) {
        return safetensors_fail(error, error_bytes,
                                "'%s': the shape of tensor \"%.80s\" is not a list of at most %d sizes, or too large",
                                file->path, node->key, SAFETENSORS_MAX_RANK);
    }
    const Json* offsets = json_get(node, "data_offsets");
    int64_t begin = -1, end = -1;
    if (!offsets || offsets->type != JSON_ARRAY || offsets->count != 2 || json_try_int(offsets->first, &begin) != 0 ||
        json_try_int(offsets->first->next, &end) != 0 || begin < 0 || end < begin) {
        return safetensors_fail(error, error_bytes,
                                "'%s': tensor \"%.80s\" has no data_offsets of the form [begin, end]",
                                file->path, node->key);
    }
    if (end - begin != entry->bytes) {
        return safetensors_fail(error, error_bytes,
                                "'%s': tensor \"%.80s\" needs %lld bytes, but its data_offsets span %lld", file->path,
                                node->key, (long long)entry->bytes, (long long)(end - begin));
    }
    entry->offset = begin;
    return 0;
}

static int safetensors_compare_offsets(const void* a, const void* b) {
    const SafetensorsEntry* x = (const SafetensorsEntry*)a;
    const SafetensorsEntry* y = (const SafetensorsEntry*)b;
    if (x->offset != y->offset) {
        return x->offset < y->offset ? -1 : 1;
    }
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;  // an empty tensor stands before the one that begins there
}

// the entries, sorted by offset, must tile the data
static int safetensors_check_layout(const SafetensorsFile* file, char* error, size_t error_bytes) {
    int64_t at = 0;
    for (int i = 0; i < file->count; i++) {
        const SafetensorsEntry* entry = &file->entries[i];
        if (entry->offset != at) {
            return safetensors_fail(error, error_bytes,
                                    "'%s': tensor \"%.80s\" begins at data byte %lld, the one before ends at %lld: %s",
                                    file->path, entry->name, (long long)entry->offset, (long long)at,
                                    entry->offset < at ? "they overlap" : "there is a gap");
        }
        at += entry->bytes;  // cannot overflow: offset + bytes is an end that was read as int64
    }
    if (at != file->data_bytes) {
        return safetensors_fail(error, error_bytes, "'%s' has %lld bytes of data, but its header describes %lld: %s",
                                file->path, (long long)file->data_bytes, (long long)at,
                                file->data_bytes < at ? "the file is truncated" : "something follows the last tensor");
    }
    return 0;
}

// the header, from an open file of known size: fills everything but path, fd and file_bytes
static int safetensors_read_header(SafetensorsFile* file, char* error, size_t error_bytes) {
    uint64_t header_bytes = 0;
    if (file->file_bytes < 8) {
        return safetensors_fail(error, error_bytes, "'%s' has %lld bytes, no safetensors file is that short",
                                file->path, (long long)file->file_bytes);
    }
    if (safetensors_pread(file->fd, file->path, &header_bytes, 8, 0, error, error_bytes) != 0) {
        return -1;
    }
    if (header_bytes > SAFETENSORS_MAX_HEADER || (int64_t)header_bytes > file->file_bytes - 8) {
        return safetensors_fail(error, error_bytes,
                                "'%s' has %lld bytes, but claims a header of %llu: truncated, or no safetensors file",
                                file->path, (long long)file->file_bytes, (unsigned long long)header_bytes);
    }
    file->data_offset = 8 + (int64_t)header_bytes;
    file->data_bytes = file->file_bytes - file->data_offset;
    char* text = (char*)malloc_or_die(header_bytes, file->path);
    if (safetensors_pread(file->fd, file->path, text, (int64_t)header_bytes, 8, error, error_bytes) == 0) {
        file->header = json_try_parse(text, header_bytes, file->path, error, error_bytes);
    }
    int braced = header_bytes > 0 && text[0] == '{';
    free(text);
    if (!file->header) {
        return -1;
    }
    if (!braced) {
        return safetensors_fail(error, error_bytes, "'%s': the header does not begin with '{'", file->path);
    }
    file->entries = (SafetensorsEntry*)calloc_or_die((size_t)file->header->count * sizeof *file->entries, file->path);
    for (const Json* node = file->header->first; node; node = node->next) {
        int failed;
        if (strcmp(node->key, "__metadata__") == 0) {
            failed = safetensors_parse_metadata(file, node, error, error_bytes);
        } else {
            failed = safetensors_parse_entry(&file->entries[file->count++], file, node, error, error_bytes);
        }
        if (failed) {
            return -1;
        }
    }
    qsort(file->entries, (size_t)file->count, sizeof *file->entries, safetensors_compare_offsets);
    return safetensors_check_layout(file, error, error_bytes);
}

static void safetensors_close(SafetensorsFile* file) {
    if (file->fd >= 0) {
        close(file->fd);
    }
    json_free(file->header);
    free(file->entries);
    free(file->path);
    memset(file, 0, sizeof *file);
    file->fd = -1;
}

// 0, or -1 with a text in error; then there is nothing to close
static int safetensors_open(SafetensorsFile* file, const char* path, char* error, size_t error_bytes) {
    memset(file, 0, sizeof *file);
    file->path = strdup_or_die(path);
    file->fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    int failed = 0;
    if (file->fd < 0 || fstat(file->fd, &info) != 0) {
        failed = safetensors_fail(error, error_bytes, "cannot open '%s': %s", path, strerror(errno));
    } else if (!S_ISREG(info.st_mode)) {
        failed = safetensors_fail(error, error_bytes, "'%s' is not a regular file", path);
    } else {
        file->file_bytes = (int64_t)info.st_size;
        failed = safetensors_read_header(file, error, error_bytes);
    }
    if (failed) {
        safetensors_close(file);
    }
    return failed;
}

// NULL when there is no tensor of that name
static const SafetensorsEntry* safetensors_find(const SafetensorsFile* file, const char* name) {
    for (int i = 0; i < file->count; i++) {
        if (strcmp(file->entries[i].name, name) == 0) {
            return &file->entries[i];
        }
    }
    return NULL;
}

// out (count) = elements [first, first + count) of the tensor, as they are stored
static int safetensors_read(const SafetensorsFile* file, const SafetensorsEntry* entry, void* out, int64_t first,
                            int64_t count, char* error, size_t error_bytes) {
    if (first < 0 || count < 0 || first > entry->count || count > entry->count - first) {
        return safetensors_fail(error, error_bytes, "'%s': %lld elements from %lld of tensor \"%.80s\", which has %lld",
                                file->path, (long long)count, (long long)first, entry->name, (long long)entry->count);
    }
    int64_t size = safetensors_dtypes[entry->dtype].bytes;
    return safetensors_pread(file->fd, file->path, out, count * size, file->data_offset + entry->offset + first * size,
                             error, error_bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// writer. Declare every tensor, begin, push the data in the order of the declarations in pieces of any size, end.
//
//     SafetensorsWriter writer = {};
//     safetensors_declare(&writer, "lm_head.weight", SAFETENSORS_BF16, shape, 2);
//     safetensors_write_begin(&writer, path);
//     safetensors_write(&writer, data, bytes);
//     if (safetensors_write_end(&writer, &file_bytes, &checksum) != 0) { ... writer.error ... }
// The first failure sticks, as in a FILE: later calls do nothing and return -1, so checking the end is enough. The end
// must be reached once, it frees everything but the error text. A failed file is left for the caller to remove. Every
// push is one write(2), so push large pieces.

typedef struct {
    SafetensorsEntry* entries;
    int count, capacity;
    int64_t data_bytes;   // declared
    int64_t file_bytes;   // written so far, header included
    int64_t total_bytes;  // of the finished file
    char* path;
    int fd;               // valid once path is set
    int failed;
    Xxh64 checksum;
    char error[SAFETENSORS_ERROR_BYTES];
} SafetensorsWriter;

// name is copied. What is declared wrongly is a bug of ours and ends the program.
static void safetensors_declare(SafetensorsWriter* writer, const char* name, SafetensorsDtype dtype,
                                const int64_t* shape, int rank) {
    check(!writer->path, "internal: tensor '%s' is declared after the file was begun", name);
    check(rank >= 0 && rank <= SAFETENSORS_MAX_RANK, "internal: tensor '%s' has %d dimensions", name, rank);
    check(strcmp(name, "__metadata__") != 0, "internal: a tensor cannot be called __metadata__");
    for (int i = 0; i < writer->count; i++) {
        check(strcmp(writer->entries[i].name, name) != 0, "internal: tensor '%s' is declared twice", name);
    }
    if (writer->count == writer->capacity) {
        writer->capacity = 2 * writer->capacity + 64;
        size_t bytes = (size_t)writer->capacity * sizeof *writer->entries;
        writer->entries = (SafetensorsEntry*)realloc(writer->entries, bytes);
        check_or(writer->entries, EXIT_NO_MEMORY, "out of memory for %d tensor descriptions", writer->capacity);
    }
    SafetensorsEntry* entry = &writer->entries[writer->count++];
    memset(entry, 0, sizeof *entry);
    entry->name = strdup_or_die(name);
    entry->dtype = dtype;
    entry->rank = rank;
    for (int i = 0; i < rank; i++) {
        entry->shape[i] = shape[i];
    }
    check(safetensors_size(entry) == 0 && entry->bytes <= INT64_MAX - writer->data_bytes,
          "internal: the shape of tensor '%s' is negative or too large", name);
    entry->offset = writer->data_bytes;
    writer->data_bytes += entry->bytes;
}

// the header as a heap string, with the 8 bytes of its length in front
static char* safetensors_make_header(const SafetensorsWriter* writer, size_t* bytes) {
    char* header = NULL;
    FILE* stream = open_memstream(&header, bytes);
    check_or(stream, EXIT_NO_MEMORY, "out of memory for the header of '%s'", writer->path);
    fwrite("\0\0\0\0\0\0\0\0", 1, 8, stream);
    fputs("{\"__metadata__\":{\"format\":\"pt\"}", stream);
    for (int i = 0; i < writer->count; i++) {
        const SafetensorsEntry* entry = &writer->entries[i];
        fputc(',', stream);
        json_write_string(stream, entry->name);
        fprintf(stream, ":{\"dtype\":\"%s\",\"shape\":[", safetensors_dtypes[entry->dtype].name);
        for (int j = 0; j < entry->rank; j++) {
            fprintf(stream, "%s%lld", j ? "," : "", (long long)entry->shape[j]);
        }
        fprintf(stream, "],\"data_offsets\":[%lld,%lld]}", (long long)entry->offset,
                (long long)(entry->offset + entry->bytes));
    }
    fputc('}', stream);
    for (int64_t at = (int64_t)ftello(stream); at % 8 != 0; at++) {
        fputc(' ', stream);
    }
    check_or(fclose(stream) == 0, EXIT_NO_MEMORY, "out of memory for the header of '%s'", writer->path);
    uint64_t length = *bytes - 8;
    check(length <= SAFETENSORS_MAX_HEADER, "internal: %d tensors make a header of more than %d bytes", writer->count,
          SAFETENSORS_MAX_HEADER);
    memcpy(header, &length, 8);
    return header;
}

static int safetensors_write(SafetensorsWriter* writer, const void* data, size_t bytes) {
    if (writer->failed) {
        return -1;
    }
    check(writer->path, "internal: safetensors_write before safetensors_write_begin");
    if (bytes > (uint64_t)(writer->total_bytes - writer->file_bytes)) {
        writer->failed = 1;
        return safetensors_fail(writer->error, sizeof writer->error,
                                "internal: '%s' gets more than the declared %lld bytes", writer->path,
                                (long long)writer->data_bytes);
    }
    size_t done = 0;
    while (done < bytes) {
        ssize_t put = write(writer->fd, (const char*)data + done, bytes - done);
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            writer->failed = 1;
            return safetensors_fail(writer->error, sizeof writer->error, "cannot write '%s' at byte %lld of %lld: %s",
                                    writer->path, (long long)writer->file_bytes + (long long)done,
                                    (long long)writer->total_bytes, put < 0 ? strerror(errno) : "nothing was written");
        }
        done += (size_t)put;
    }
#ifdef SYNC_FILE_RANGE_WRITE  // the disk begins now, not when it is waited for at the end; what fails shows there
    sync_file_range(writer->fd, (off_t)writer->file_bytes, (off_t)bytes, SYNC_FILE_RANGE_WRITE);
#endif
    xxh64_update(&writer->checksum, data, bytes);
    writer->file_bytes += (int64_t)bytes;
    return 0;
}

static int safetensors_write_begin(SafetensorsWriter* writer, const char* path) {
    check(!writer->path, "internal: '%s' is begun twice", path);
    writer->path = strdup_or_die(path);
    writer->checksum = xxh64_begin(0);
    writer->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (writer->fd < 0) {
        writer->failed = 1;
        return safetensors_fail(writer->error, sizeof writer->error, "cannot open '%s' for writing: %s", path,
                                strerror(errno));
    }
    size_t bytes;
    char* header = safetensors_make_header(writer, &bytes);
    writer->total_bytes = (int64_t)bytes + writer->data_bytes;
    int failed = safetensors_write(writer, header, bytes);
    free(header);
    return failed;
}

// checks that exactly the declared bytes came, makes them durable, frees. Size and XXH64 (seed 0) of the whole file.
static int safetensors_write_end(SafetensorsWriter* writer, int64_t* file_bytes, uint64_t* checksum) {
    check(writer->path, "internal: safetensors_write_end before safetensors_write_begin");
    if (!writer->failed && writer->file_bytes != writer->total_bytes) {
        writer->failed = 1;
        safetensors_fail(writer->error, sizeof writer->error, "internal: '%s' got %lld of its %lld bytes", writer->path,
                         (long long)writer->file_bytes, (long long)writer->total_bytes);
    }
    while (!writer->failed && fsync(writer->fd) != 0) {
        if (errno != EINTR) {
            writer->failed = 1;
            safetensors_fail(writer->error, sizeof writer->error, "cannot flush '%s' to disk: %s", writer->path,
                             strerror(errno));
        }
    }
    // a network file system may report a full disk only here; EINTR of close leaves nothing to repeat on Linux
    if (writer->fd >= 0 && close(writer->fd) != 0 && errno != EINTR && !writer->failed) {
        writer->failed = 1;
        safetensors_fail(writer->error, sizeof writer->error, "cannot close '%s': %s", writer->path, strerror(errno));
    }
    *file_bytes = writer->file_bytes;
    *checksum = xxh64_end(&writer->checksum);
    for (int i = 0; i < writer->count; i++) {
        free((char*)writer->entries[i].name);
    }
    free(writer->entries);
    free(writer->path);
    writer->entries = NULL;
    writer->path = NULL;
    writer->count = writer->capacity = 0;
    writer->fd = -1;
    return writer->failed ? -1 : 0;
}
