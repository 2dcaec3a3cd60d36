// json.h: tests of llmc/json.h (section json).
#pragma once

static Json* test_json_try(const char* text, size_t bytes, char* error, size_t error_bytes) {
    // a copy of exactly this size, so that the address sanitizer sees a read past the end
    char* exact = (char*)malloc_or_die(bytes, "a test");
    memcpy(exact, text, bytes);
    Json* root = json_try_parse(exact, bytes, "x.json", error, error_bytes);
    free(exact);
    return root;
}

static void test_json_values(void) {
    const char* text =
        " {\"zero\": 0, \"min\": -9223372036854775808,\r\n"
        "\t\"max\": 9223372036854775807, \"past\": 9223372036854775808,\n"
        "\"list\": [true, false, null, [], {}, \"\", -0.5e1, 1e3, 0.1],\n"
        "\"a\\u00e9\\\"\\\\\\/\\b\\f\\n\\r\\t\\uD83D\\ude42\\u0000z\": \"\xE6\x97\xA5\"} \n";
    Json* root = json_parse(text, strlen(text), "x.json");
    expect(root->type == JSON_OBJECT && root->count == 6, "%d keys", root->count);
    expect(json_int(json_need(root, "zero")) == 0, "zero");
    expect(json_int(json_need(root, "min")) == INT64_MIN, "the smallest int64 is not exact");
    expect(json_int(json_need(root, "max")) == INT64_MAX, "the largest int64 is not exact");
    int64_t whole;
    expect(json_try_int(json_get(root, "past"), &whole) == -1, "2^63 passes for an int64");
    expect(json_double(json_get(root, "past")) == 9223372036854775808.0, "2^63 as a double");
    const Json* list = json_need(root, "list");
    static const JsonType types[] = {JSON_BOOL, JSON_BOOL, JSON_NULL, JSON_ARRAY, JSON_OBJECT, JSON_STRING, JSON_NUMBER,
                                     JSON_NUMBER, JSON_NUMBER};
    int at = 0;
    for (const Json* item = list->first; item; item = item->next, at++) {
        expect(at < 9 && item->type == types[at] && item->line == 3, "element %d has type %d, line %d", at, item->type,
               item->line);
    }
    expect(at == 9 && list->count == 9, "%d elements, count %d", at, list->count);
    const Json* number = list->first->next->next->next->next->next->next;
    expect(json_bool(list->first) == 1 && json_bool(list->first->next) == 0, "true, false");
    expect(json_int(number) == -5 && json_int(number->next) == 1000, "-0.5e1 and 1e3 are integers");
    expect(json_try_int(number->next->next, &whole) == -1 && json_double(number->next->next) == 0.1, "0.1");
    const Json* last = list->next;
    const char key[] = "a\xC3\xA9\"\\/\b\f\n\r\t\xF0\x9F\x99\x82\0z";
    expect(last && !last->next && last->key_bytes == (int)sizeof key - 1 && !memcmp(last->key, key, sizeof key),
           "escapes in a key: %s", last ? last->key : "(none)");
    expect(last && strcmp(json_string(last), "\xE6\x97\xA5") == 0, "UTF-8 in a string");
    expect(!json_get(root, "Zero") && !json_get(list, "zero") && !json_get(NULL, "zero"), "found what is not there");
    expect(json_int_or(root, "none", 7) == 7 && json_int_or(root, "zero", 7) == 0, "json_int_or");
    expect(json_double_or(root, "none", .5) == .5 && json_bool_or(root, "none", 1) == 1, "fallbacks");
    expect(strcmp(json_string_or(root, "none", "no"), "no") == 0, "json_string_or");
    json_free(root);
}

static void test_json_errors(void) {
    static const struct { const char* text; const char* error; } cases[] = {
        {"", "'x.json', line 1, column 1: expected a value, found the end of the text"},
        {"\n\n  x", "line 3, column 3: expected a value, found 'x'"},
        {"[1,]", "column 4: expected a value, found ']'"},
        {"[1 2]", "column 4: expected ',' or ']', found '2'"},
        {"{\"a\":1,}", "column 8: expected a key in double quotes, found '}'"},
        {"{\"a\" 1}", "column 6: expected ':' after the key, found '1'"},
        {"{a:1}", "expected a key in double quotes or '}', found 'a'"},
        {"{\"a\":1,\n \"b\":2, \"a\":3}", "line 2, column 9: expected different keys, found a second \"a\""},
        {"{\"k1\":1,\"k\\u0031\":2}", "column 9: expected different keys, found a second \"k1\""},
        {"1 2", "column 3: expected nothing after the value, found '2'"},
        {"01", "expected no digit after a leading zero, found '1'"},
        {"-", "expected a digit, found the end of the text"},
        {"+1", "expected a value, found '+'"},
        {".5", "expected a value, found '.'"},
        {"1.", "expected a digit"},
        {"1e+", "expected a digit"},
        {"[1e999]", "column 2: expected a number within the range of a double"},
        {"NaN", "expected a value, found 'N'"},
        {"Infinity", "expected a value"},
        {"nul", "expected a value, found 'n'"},
        {"truth", "expected a value, found 't'"},
        {"\"a\nb\"", "expected control characters in a string to be escaped, found byte 0x0A"},
        {"\"abc", "expected a closing double quote, found the end of the text"},
        {"\"\\x41\"", "expected one of \" \\ / b f n r t u after a backslash, found 'x'"},
        {"\"\\u12g4\"", "expected four hexadecimal digits after \\u, found 'g'"},
        {"\"\\ud83d\"", "expected \\u and a low surrogate after the high one"},
        {"\"\\ud83d\\u0041\"", "expected a low surrogate after the high, found \\u0041"},
        {"\"\\ude42\"", "expected a high surrogate before the low one \\uDE42"},
        {"\"\xFF\"", "expected valid UTF-8, found byte 0xFF"},
        {"\"\xC0\x80\"", "expected valid UTF-8"},          // zero, in two bytes
        {"\"\xE0\x9F\xBF\"", "expected valid UTF-8"},      // U+07FF in three
        {"\"\xF0\x8F\xBF\xBF\"", "expected valid UTF-8"},  // U+FFFF in four
        {"\"\xED\xA0\x80\"", "expected valid UTF-8"},      // a surrogate
        {"\"\xF4\x90\x80\x80\"", "expected valid UTF-8"},  // past U+10FFFF
        {"\"\xE6\x97\"", "expected valid UTF-8"},          // cut off
        {"\xEF\xBB\xBF{}", "expected a value, found byte 0xEF"},
        {"// no\n1", "expected a value, found '/'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char error[JSON_ERROR_BYTES] = "accepted";
        Json* root = test_json_try(cases[i].text, strlen(cases[i].text), error, sizeof error);
        expect(!root && strstr(error, cases[i].error), "%s: expected '%s', got '%s'", cases[i].text, cases[i].error,
               error);
        json_free(root);
    }
    char error[JSON_ERROR_BYTES];
    expect(!test_json_try("1\0", 2, error, sizeof error) && strstr(error, "byte 0x00"), "a zero after the value");
    const char* text = "{\"a\": [1, -2.5e3, \"x\\u00e9\\ud83d\\ude42\xE6\x97\xA5\", true, null], \"b\": {\"c\": {}}}";
    for (size_t bytes = 0; bytes < strlen(text); bytes++) {
        Json* root = test_json_try(text, bytes, error, sizeof error);
        expect(!root, "the first %zu bytes of %s are accepted", bytes, text);
        json_free(root);
    }
    char small[8];
    expect(!json_try_parse("[", 1, "a/long/name.json", small, sizeof small) && strlen(small) == 7, "a short buffer");
}

// every code point there and back, and no prefix of one is taken for another
static void test_json_utf8(void) {
    int wrong = 0;
    for (uint32_t code_point = 0; code_point <= 0x110000; code_point++) {
        char text[4];
        uint32_t seen = 0;
        int length = utf8_encode(text, code_point);
        int valid = code_point < 0x110000 && (code_point < 0xD800 || code_point > 0xDFFF);
        wrong += utf8_decode(&seen, text, 4) != (valid ? length : 0) || (valid && seen != code_point);
        for (int bytes = 0; bytes < length; bytes++) {
            wrong += utf8_decode(&seen, text, (size_t)bytes) != 0;
        }
    }
    expect(wrong == 0, "%d wrong", wrong);
}

static void test_json_depth(void) {
    char text[2 * JSON_MAX_DEPTH + 2], error[JSON_ERROR_BYTES] = "";
    memset(text, '[', JSON_MAX_DEPTH + 1);
    memset(text + JSON_MAX_DEPTH + 1, ']', JSON_MAX_DEPTH + 1);
    Json* root = test_json_try(text + 1, 2 * JSON_MAX_DEPTH, error, sizeof error);
    expect(root, "64 levels are refused: %s", error);
    json_free(root);
    root = test_json_try(text, sizeof text, error, sizeof error);
    expect(!root && strstr(error, "column 65: expected at most 64 levels"), "65 levels: %s", error);
}

static void test_json_die_int(void* root) { json_int(json_need((const Json*)root, "b")); }
static void test_json_die_bool(void* root) { json_bool_or((const Json*)root, "n", 0); }
static void test_json_die_string(void* root) { json_string(json_need((const Json*)root, "z")); }
static void test_json_die_need(void* root) { json_need((const Json*)root, "c"); }
static void test_json_die_object(void* root) { json_need(((const Json*)root)->first, "c"); }
static void test_json_die_parse(void*) { json_parse("[", 1, "x.json"); }
static void test_json_die_file(void*) { json_read_file("/nonexistent/x.json"); }

static void test_json_accessors_die(void) {
    const char* text = "{\"n\": 1.5,\n \"b\": \"text\",\n \"z\": \"\\u0000\"}";
    Json* root = json_parse(text, strlen(text), "x.json");
    expect_exit(EXIT_BAD_DATA,
                "'x.json', line 2: expected an integer within 64 bits for \"b\", found the string \"text\"",
                test_json_die_int, root);
    expect_exit(EXIT_BAD_DATA, "'x.json', line 1: expected true or false for \"n\", found the number 1.5",
                test_json_die_bool, root);
    expect_exit(EXIT_BAD_DATA, "line 3: expected a string without zero bytes", test_json_die_string, root);
    expect_exit(EXIT_BAD_DATA, "'x.json', line 1: the key \"c\" is missing", test_json_die_need, root);
    expect_exit(EXIT_BAD_DATA, "'x.json', line 1: expected an object for \"n\"", test_json_die_object, root);
    expect_exit(EXIT_BAD_DATA, "'x.json', line 1, column 2: expected a value", test_json_die_parse, NULL);
    expect_exit(EXIT_NO_INPUT, "cannot open '/nonexistent/x.json'", test_json_die_file, NULL);
    json_free(root);
}

// what json_write_string makes of text, parsed again
static void test_json_written(const char* text, const char* expected) {
    char* written = NULL;
    size_t bytes;
    char error[JSON_ERROR_BYTES] = "";
    FILE* stream = open_memstream(&written, &bytes);
    json_write_string(stream, text);
    check(fclose(stream) == 0, "cannot write to memory: %s", strerror(errno));
    Json* root = test_json_try(written, bytes, error, sizeof error);
    expect(root && root->type == JSON_STRING && strcmp(root->string, expected) == 0, "%s: %s", written, error);
    json_free(root);
    free(written);
}

static void test_json_writer(void) {
    char ascii[128];
    for (int i = 0; i < 127; i++) {
        ascii[i] = (char)(i + 1);
    }
    ascii[127] = 0;
    test_json_written(ascii, ascii);
    test_json_written("", "");
    test_json_written("\xC3\xA9\xE6\x97\xA5\xF0\x9F\x99\x82", "\xC3\xA9\xE6\x97\xA5\xF0\x9F\x99\x82");
    test_json_written("a\xFF\xE6\x97z", "a\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBDz");  // not UTF-8
}

// 10 MB with an object of 10^5 keys, as in a tokenizer.json: a quadratic step would take minutes
static void test_json_large(void) {
    char* text = NULL;
    size_t bytes;
    const int keys = 130000, pairs = 400000;
    FILE* stream = open_memstream(&text, &bytes);
    fprintf(stream, "{\"vocab\":{");
    for (int i = 0; i < keys; i++) {
        fprintf(stream, "%s\n      \"\xC4\xA0token%d\": %d", i ? "," : "", i, i);
    }
    fprintf(stream, "},\"merges\":[");
    for (int i = 0; i < pairs; i++) {
        fprintf(stream, "%s[\"t\",\"h%d\"]", i ? "," : "", i);
    }
    fprintf(stream, "]}");
    check(fclose(stream) == 0, "cannot write to memory: %s", strerror(errno));
    double start = clock_seconds();
    Json* root = json_parse(text, bytes, "large.json");
    double seconds = clock_seconds() - start;
    int at = 0;
    for (const Json* item = json_need(root, "vocab")->first; item && item->integer == at; item = item->next) {
        at++;
    }
    expect(at == keys && json_get(root, "merges")->count == pairs, "order is lost at key %d", at);
    // measured 0.1 s; the bound leaves room for sanitizers and a busy machine
    expect(bytes > 10000000 && seconds < 5, "%zu bytes took %.3f s", bytes, seconds);
    json_free(root);
    free(text);
}

static void test_json(void) {
    test_json_values();
    test_json_errors();
    test_json_utf8();
    test_json_depth();
    test_json_accessors_die();
    test_json_writer();
    test_json_large();
}
