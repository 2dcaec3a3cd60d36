// json.h: a small strict JSON reader (RFC 8259) and the one writing function that is easy to get wrong.
//
// A text becomes a tree of Json nodes in one heap block: the nodes, then a copy of the text in which strings are
// decoded in place (a decoded string is never longer than its source). json_free(root) frees it all. Children of an
// array or object keep their order: for (const Json* item = node->first; item; item = item->next). Lookup is linear.
// Strict: UTF-8 is validated, surrogates must pair, control characters must be escaped, keys may not repeat, nothing
// may follow the value, nesting ends at 64. An integral number within int64 is exact in `integer`; all are in `number`.
// Errors say 'name', line, column (in bytes, from 1), what was expected and what is there.
#pragma once
#include "common.h"

#define JSON_MAX_DEPTH 64
#define JSON_ERROR_BYTES 1024  // holds a long path and a message

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json Json;
struct Json {
    JsonType type;
    int is_integer;      // of a number: `integer` holds it exactly
    int line;            // where the value begins, from 1
    int count;           // children of an array or object; bytes of a string
    int key_bytes;
    const char* key;     // in an object: decoded, zero-terminated. It may hold zero bytes too: see key_bytes
    const char* string;  // decoded, zero-terminated. It may hold zero bytes too: see count
    int64_t integer;     // number if is_integer; bool: 0 or 1
    double number;
    Json* first;         // array, object: the first child, NULL when empty
    Json* next;          // the next child of the same parent, NULL at the end
    const char* name;    // of the document, for errors
};

typedef struct {
    const char* source;  // the caller's text, untouched
    char* text;          // our copy: decoded up to `at`, equal to source from there on
    size_t bytes;
    size_t at;
    int line;
    Json* nodes;
    size_t used, capacity;
    const char* name;
    char* error;
    size_t error_bytes;
} JsonParser;

// ---------------------------------------------------------------------------------------------------------------------
// UTF-8

// the code point that begins at text, and its length in bytes (1 to 4); 0 when these bytes are not valid UTF-8
static int utf8_decode(uint32_t* code_point, const char* text, size_t bytes) {
    const unsigned char* at = (const unsigned char*)text;
    if (bytes > 0 && at[0] < 0x80) {
        *code_point = at[0];
        return 1;
    }
    int length = bytes == 0 ? 0 : at[0] >= 0xF0 ? 4 : at[0] >= 0xE0 ? 3 : at[0] >= 0xC2 ? 2 : 0;
    if (length == 0 || at[0] > 0xF4 || (size_t)length > bytes) {
        return 0;
    }
    uint32_t value = at[0] & (0x7Fu >> length);
    for (int i = 1; i < length; i++) {
        if ((at[i] & 0xC0) != 0x80) {
            return 0;
        }
        value = value << 6 | (at[i] & 0x3Fu);
    }
    uint32_t smallest = length == 2 ? 0x80 : length == 3 ? 0x800 : 0x10000;
    if (value < smallest || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) {
        return 0;
    }
    *code_point = value;
    return length;
}

// writes 1 to 4 bytes and returns how many
static int utf8_encode(char* out, uint32_t code_point) {
    if (code_point < 0x80) {
        out[0] = (char)code_point;
        return 1;
    }
    int length = code_point < 0x800 ? 2 : code_point < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (code_point & 0x3F));
        code_point >>= 6;
    }
    out[0] = (char)((0xF00 >> length & 0xFF) | code_point);
    return length;
}

// ---------------------------------------------------------------------------------------------------------------------
// parser: every json_parse_* returns 0, or -1 with the error written

static int json_fail_at(JsonParser* parser, size_t offset, const char* format, ...) PRINTF_LIKE(3, 4);
static int json_fail_at(JsonParser* parser, size_t offset, const char* format, ...) {
    size_t line = 1, line_start = 0;
    for (size_t i = 0; i < offset; i++) {
        if (parser->source[i] == '\n') {
            line++;
            line_start = i + 1;
        }
    }
    char message[256];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    snprintf(parser->error, parser->error_bytes, "'%s', line %zu, column %zu: %s", parser->name, line,
             offset - line_start + 1, message);
    return -1;
}

static int json_fail(JsonParser* parser, const char* expected) {
    if (parser->at >= parser->bytes) {
        return json_fail_at(parser, parser->at, "expected %s, found the end of the text", expected);
    }
    int found = (unsigned char)parser->source[parser->at];
    if (found < 0x21 || found > 0x7E) {
        return json_fail_at(parser, parser->at, "expected %s, found byte 0x%02X", expected, found);
    }
    return json_fail_at(parser, parser->at, "expected %s, found '%c'", expected, found);
}

// the byte at the cursor, -1 at the end
static inline int json_peek(const JsonParser* parser) {
    return parser->at < parser->bytes ? (unsigned char)parser->text[parser->at] : -1;
}

static void json_skip_space(JsonParser* parser) {
    for (;; parser->at++) {
        int c = json_peek(parser);
        if (c == '\n') {
            parser->line++;
        } else if (c != ' ' && c != '\t' && c != '\r') {
            return;
        }
    }
}

static int json_parse_hex4(JsonParser* parser, uint32_t* value) {
    *value = 0;
    for (int i = 0; i < 4; i++, parser->at++) {
        int c = json_peek(parser);
        static const char digits[] = "0123456789abcdef0123456789ABCDEF";
        const char* digit = c > 0 ? strchr(digits, c) : NULL;
        if (!digit) {
            return json_fail(parser, "four hexadecimal digits after \\u");
        }
        *value = *value << 4 | (uint32_t)((digit - digits) & 15);
    }
    return 0;
}

// at a backslash: *length bytes to out. At most as many as the escape has, so decoding in place is safe.
static int json_parse_escape(JsonParser* parser, char* out, int* length) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    parser->at++;
    int c = json_peek(parser);
    const char* simple = c > 0 ? strchr(names, c) : NULL;
    if (simple) {
        parser->at++;
        *out = values[simple - names];
        *length = 1;
        return 0;
    }
    if (c != 'u') {
        return json_fail(parser, "one of \" \\ / b f n r t u after a backslash");
    }
    parser->at++;
    uint32_t code_point, low;
    if (json_parse_hex4(parser, &code_point) != 0) {
        return -1;
    }
    if (code_point >= 0xDC00 && code_point < 0xE000) {
        return json_fail_at(parser, parser->at - 4, "expected a high surrogate before the low one \\u%04X", code_point);
    }
    if (code_point >= 0xD800 && code_point < 0xDC00) {
        if (parser->bytes - parser->at < 2 || memcmp(parser->text + parser->at, "\\u", 2) != 0) {
            return json_fail(parser, "\\u and a low surrogate after the high one");
        }
        parser->at += 2;
        if (json_parse_hex4(parser, &low) != 0) {
            return -1;
        }
        if (low < 0xDC00 || low >= 0xE000) {
            return json_fail_at(parser, parser->at - 4, "expected a low surrogate after the high, found \\u%04X", low);
        }
        code_point = 0x10000 + ((code_point - 0xD800) << 10) + (low - 0xDC00);
    }
    *length = utf8_encode(out, code_point);
    return 0;
}

// at an opening quote
static int json_parse_string(JsonParser* parser, const char** string, int* bytes) {
    char* text = parser->text;
    size_t start = ++parser->at, end = start;
    for (;;) {
        int c = json_peek(parser);
        int length = 1;
        if (c == '"') {
            break;
        } else if (c == '\\') {
            if (json_parse_escape(parser, text + end, &length) != 0) {
                return -1;
            }
            end += (size_t)length;
            continue;
        } else if (c < 0x20) {
            return json_fail(parser, c < 0 ? "a closing double quote" : "control characters in a string to be escaped");
        } else if (c >= 0x80) {
            uint32_t code_point;
            length = utf8_decode(&code_point, text + parser->at, parser->bytes - parser->at);
            if (length == 0) {
                return json_fail(parser, "valid UTF-8");
            }
        }
        for (int i = 0; i < length; i++) {
            text[end++] = text[parser->at++];
        }
    }
    parser->at++;
    text[end] = 0;  // at the latest over the closing quote
    *string = text + start;
    *bytes = (int)(end - start);
    return 0;
}

static int json_parse_digits(JsonParser* parser) {
    if (json_peek(parser) < '0' || json_peek(parser) > '9') {
        return json_fail(parser, "a digit");
    }
    while (json_peek(parser) >= '0' && json_peek(parser) <= '9') {
        parser->at++;
    }
    return 0;
}

// -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?
static int json_parse_number(JsonParser* parser, Json* node) {
    const char* begin = parser->text + parser->at;
    parser->at += *begin == '-';
    if (json_peek(parser) == '0') {
        parser->at++;
        if (json_peek(parser) >= '0' && json_peek(parser) <= '9') {
            return json_fail(parser, "no digit after a leading zero");
        }
    } else if (json_parse_digits(parser) != 0) {
        return -1;
    }
    int digits_only = 1;
    if (json_peek(parser) == '.') {
        digits_only = 0;
        parser->at++;
        if (json_parse_digits(parser) != 0) {
            return -1;
        }
    }
    if (json_peek(parser) == 'e' || json_peek(parser) == 'E') {
        digits_only = 0;
        parser->at++;
        parser->at += json_peek(parser) == '+' || json_peek(parser) == '-';
        if (json_parse_digits(parser) != 0) {
            return -1;
        }
    }
    // the grammar is checked, so the C library cannot see an infinity, hex or a sign that JSON forbids; our copy of the
    // text ends in a zero, so it cannot run past the end either
    node->type = JSON_NUMBER;
    node->number = strtod(begin, NULL);
    if (!isfinite(node->number)) {
        return json_fail_at(parser, (size_t)(begin - parser->text), "expected a number within the range of a double");
    }
    if (digits_only) {
        errno = 0;
        node->integer = strtoll(begin, NULL, 10);
        node->is_integer = errno == 0;
    } else if (fabs(node->number) <= 9007199254740992.0 && trunc(node->number) == node->number) {
        node->integer = (int64_t)node->number;  // 1e3 and 4096.0 are integral too; up to 2^53 a double has no gaps
        node->is_integer = 1;
    }
    return 0;
}

// keys may not repeat. A hash table: a tokenizer's vocabulary is one object of 10^5 keys.
static int json_check_keys(JsonParser* parser, const Json* object) {
    size_t slots = 4;
    while (slots < 2 * (size_t)object->count) {
        slots *= 2;
    }
    const Json** table = (const Json**)calloc(slots, sizeof *table);
    if (!table) {
        return json_fail(parser, "more memory");
    }
    int result = 0;
    for (const Json* item = object->first; item && result == 0; item = item->next) {
        uint64_t hash = 0xCBF29CE484222325ull;  // FNV-1a
        for (int i = 0; i < item->key_bytes; i++) {
            hash = (hash ^ (unsigned char)item->key[i]) * 0x100000001B3ull;
        }
        size_t slot = (size_t)(hash ^ hash >> 32) & (slots - 1);
        for (; table[slot]; slot = (slot + 1) & (slots - 1)) {
            const Json* other = table[slot];
            if (other->key_bytes == item->key_bytes && !memcmp(other->key, item->key, (size_t)item->key_bytes)) {
                result = json_fail_at(parser, (size_t)(item->key - parser->text) - 1,
                                      "expected different keys, found a second \"%.80s\"", item->key);
                break;
            }
        }
        table[slot] = item;
    }
    free(table);
    return result;
}

static int json_parse_value(JsonParser* parser, Json* node, int depth);

// at the opening bracket of parent, an array or an object
static int json_parse_children(JsonParser* parser, Json* parent, int depth) {
    int is_object = parent->type == JSON_OBJECT;
    int close = is_object ? '}' : ']';
    if (depth >= JSON_MAX_DEPTH) {
        return json_fail(parser, "at most 64 levels of nesting");
    }
    parser->at++;
    json_skip_space(parser);
    if (json_peek(parser) == close) {
        parser->at++;
        return 0;
    }
    for (Json** link = &parent->first;; link = &(*link)->next) {
        check(parser->used < parser->capacity, "internal: '%s' has more JSON values than were counted", parser->name);
        Json* child = *link = &parser->nodes[parser->used++];
        memset(child, 0, sizeof *child);
        if (is_object) {
            if (json_peek(parser) != '"') {
                return json_fail(parser, parent->count ? "a key in double quotes" : "a key in double quotes or '}'");
            }
            if (json_parse_string(parser, &child->key, &child->key_bytes) != 0) {
                return -1;
            }
            json_skip_space(parser);
            if (json_peek(parser) != ':') {
                return json_fail(parser, "':' after the key");
            }
            parser->at++;
            json_skip_space(parser);
        }
        if (json_parse_value(parser, child, depth + 1) != 0) {
            return -1;
        }
        parent->count++;
        json_skip_space(parser);
        int c = json_peek(parser);
        if (c != close && c != ',') {
            return json_fail(parser, is_object ? "',' or '}'" : "',' or ']'");
        }
        parser->at++;
        if (c == close) {
            return is_object ? json_check_keys(parser, parent) : 0;
        }
        json_skip_space(parser);
    }
}

static int json_parse_value(JsonParser* parser, Json* node, int depth) {
    node->name = parser->name;
    node->line = parser->line;
    const char* at = parser->text + parser->at;
    size_t left = parser->bytes - parser->at;
    int c = json_peek(parser);
    if (c == '"') {
        node->type = JSON_STRING;
        return json_parse_string(parser, &node->string, &node->count);
    } else if (c == '{' || c == '[') {
        node->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        return json_parse_children(parser, node, depth);
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        return json_parse_number(parser, node);
    }
    static const char* const words[] = {"false", "true", "null"};
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(words[i]);
        if (left >= length && memcmp(at, words[i], length) == 0) {
            node->type = i < 2 ? JSON_BOOL : JSON_NULL;
            node->integer = i == 1;
            parser->at += length;
            return 0;
        }
    }
    return json_fail(parser, "a value");
}

// the tree, or NULL with a text in error. name (usually the path) is for messages and is copied.
static Json* json_try_parse(const char* text, size_t bytes, const char* name, char* error, size_t error_bytes) {
    if (bytes >= (size_t)INT_MAX) {
        snprintf(error, error_bytes, "'%s': expected less than 2 GiB of JSON, found %zu bytes", name, bytes);
        return NULL;
    }
    // a value is the root, the first of its parent, or follows a comma: count once, allocate once
    size_t capacity = 1;
    for (size_t i = 0; i < bytes; i++) {
        capacity += text[i] == ',' || text[i] == '[' || text[i] == '{';
    }
    size_t name_bytes = strlen(name) + 1;
    Json* nodes = (Json*)malloc_or_die(capacity * sizeof(Json) + bytes + 1 + name_bytes, name);
    char* copy = (char*)(nodes + capacity);
    if (bytes > 0) {
        memcpy(copy, text, bytes);
    }
    copy[bytes] = 0;
    memcpy(copy + bytes + 1, name, name_bytes);
    JsonParser parser = {.source = text, .text = copy, .bytes = bytes, .at = 0, .line = 1, .nodes = nodes, .used = 1,
                         .capacity = capacity, .name = copy + bytes + 1, .error = error, .error_bytes = error_bytes};
    memset(nodes, 0, sizeof nodes[0]);
    json_skip_space(&parser);
    int failed = json_parse_value(&parser, &nodes[0], 0);
    if (!failed) {
        json_skip_space(&parser);
        failed = parser.at < bytes ? json_fail(&parser, "nothing after the value") : 0;
    }
    if (failed) {
        free(nodes);
        return NULL;
    }
    return nodes;
}

static Json* json_parse(const char* text, size_t bytes, const char* name) {
    char error[JSON_ERROR_BYTES];
    Json* root = json_try_parse(text, bytes, name, error, sizeof error);
    check_or(root, EXIT_BAD_DATA, "%s", error);
    return root;
}

static Json* json_read_file(const char* path) {
    size_t bytes;
    char* text = read_file_or_die(path, &bytes);
    Json* root = json_parse(text, bytes, path);
    free(text);
    return root;
}

static inline void json_free(Json* root) { free(root); }

// ---------------------------------------------------------------------------------------------------------------------
// lookup. json_try_*: 0, or -1 when node is NULL or of another kind. json_int and its like die, naming file and line.

// the value of a key; NULL when it is absent, or when node is NULL or no object
static const Json* json_get(const Json* node, const char* key) {
    if (!node || node->type != JSON_OBJECT) {
        return NULL;
    }
    size_t bytes = strlen(key);
    for (const Json* item = node->first; item; item = item->next) {
        if ((size_t)item->key_bytes == bytes && memcmp(item->key, key, bytes) == 0) {
            return item;
        }
    }
    return NULL;
}

[[noreturn]] static void json_die(const Json* node, const char* expected) {
    static const char* const names[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
    char found[96];
    if (node->type == JSON_NUMBER) {
        snprintf(found, sizeof found, "the number %.17g", node->number);
    } else if (node->type == JSON_STRING) {
        snprintf(found, sizeof found, "the string \"%.60s\"", node->string);
    } else {
        snprintf(found, sizeof found, "%s", names[node->type]);
    }
    die(EXIT_BAD_DATA, "'%s', line %d: expected %s%s%s%s, found %s", node->name, node->line, expected,
        node->key ? " for \"" : "", node->key ? node->key : "", node->key ? "\"" : "", found);
}

// the value of a key that must be there
static const Json* json_need(const Json* node, const char* key) {
    if (node->type != JSON_OBJECT) {
        json_die(node, "an object");
    }
    const Json* value = json_get(node, key);
    check_or(value, EXIT_BAD_DATA, "'%s', line %d: the key \"%s\" is missing", node->name, node->line, key);
    return value;
}

static int json_try_string(const Json* node, const char** value) {
    if (!node || node->type != JSON_STRING || strlen(node->string) != (size_t)node->count) {
        return -1;  // a string with a zero byte is no C string
    }
    *value = node->string;
    return 0;
}

static int json_try_int(const Json* node, int64_t* value) {
    if (!node || node->type != JSON_NUMBER || !node->is_integer) {
        return -1;
    }
    *value = node->integer;
    return 0;
}

static int json_try_double(const Json* node, double* value) {
    if (!node || node->type != JSON_NUMBER) {
        return -1;
    }
    *value = node->number;
    return 0;
}

static const char* json_string(const Json* node) {
    const char* value;
    if (json_try_string(node, &value) != 0) {
        json_die(node, "a string without zero bytes");
    }
    return value;
}

static int64_t json_int(const Json* node) {
    int64_t value;
    if (json_try_int(node, &value) != 0) {
        json_die(node, "an integer within 64 bits");
    }
    return value;
}

static double json_double(const Json* node) {
    double value;
    if (json_try_double(node, &value) != 0) {
        json_die(node, "a number");
    }
    return value;
}

static int json_bool(const Json* node) {
    if (node->type != JSON_BOOL) {
        json_die(node, "true or false");
    }
    return (int)node->integer;
}

// the value of a key, or the fallback when it is absent or null; another kind of value still dies
static const Json* json_get_value(const Json* object, const char* key) {
    const Json* node = json_get(object, key);
    return node && node->type != JSON_NULL ? node : NULL;
}

static const char* json_string_or(const Json* object, const char* key, const char* fallback) {
    const Json* node = json_get_value(object, key);
    return node ? json_string(node) : fallback;
}

static int64_t json_int_or(const Json* object, const char* key, int64_t fallback) {
    const Json* node = json_get_value(object, key);
    return node ? json_int(node) : fallback;
}

static double json_double_or(const Json* object, const char* key, double fallback) {
    const Json* node = json_get_value(object, key);
    return node ? json_double(node) : fallback;
}

static int json_bool_or(const Json* object, const char* key, int fallback) {
    const Json* node = json_get_value(object, key);
    return node ? json_bool(node) : fallback;
}

// ---------------------------------------------------------------------------------------------------------------------
// writing

// text in double quotes, escaped. A byte that is not UTF-8 (a path can hold one) becomes U+FFFD, so that what we write
// is always JSON that we read. Errors stay in the stream: the caller checks ferror or fclose.
static void json_write_string(FILE* file, const char* text) {
    size_t left = strlen(text);
    fputc('"', file);
    while (left > 0) {
        uint32_t code_point;
        int length = utf8_decode(&code_point, text, left);
        if (length == 0) {
            fputs("\\ufffd", file);
            length = 1;
        } else if (code_point == '"' || code_point == '\\') {
            fprintf(file, "\\%c", (int)code_point);
        } else if (code_point < 0x20) {
            fprintf(file, "\\u%04x", code_point);
        } else {
            fwrite(text, 1, (size_t)length, file);
        }
        text += length;
        left -= (size_t)length;
    }
    fputc('"', file);
}
