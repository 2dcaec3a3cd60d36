// tokenizer.h: tests of llmc/tokenizer.h (section tokenizer).
#pragma once

static void test_tokenizer_put(const char* path, const char* text) {
    FILE* file = fopen_or_die(path, "wb");
    check(fputs(text, file) >= 0 && fclose(file) == 0, "cannot write '%s': %s", path, strerror(errno));
}

static int test_tokenizer_is(const Tokenizer* tokenizer, int id, const char* bytes, size_t count) {
    size_t got_count;
    const char* got = tokenizer_decode(tokenizer, id, &got_count);
    return got_count == count && memcmp(got, bytes, count) == 0;
}

#define expect_token(tokenizer, id, text)                                         \
    expect(test_tokenizer_is(tokenizer, id, text, sizeof text - 1), "token %d", id)

static void test_tokenizer_bytes(void) {
    Tokenizer* tokenizer = tokenizer_byte();
    char text[256];
    int ids[256];
    for (int i = 0; i < 256; i++) {
        char byte = (char)i;
        expect(test_tokenizer_is(tokenizer, i, &byte, 1), "byte %d", i);
        text[i] = (char)(i + 1);  // ends in the zero that terminates it
    }
    expect(tokenizer_encode(tokenizer, text, ids, 256) == 255, "not all bytes are encoded");
    for (int i = 0; i < 255; i++) {
        expect(ids[i] == i + 1, "byte %d becomes %d", i + 1, ids[i]);
    }
    expect(tokenizer_encode(tokenizer, "abc", ids, 3) == 3 && tokenizer_encode(tokenizer, "abc", ids, 2) == -1, "max");
    expect(tokenizer_encode(tokenizer, "", ids, 0) == 0, "the empty text");
    expect(tokenizer_separator(tokenizer) == 256, "separator %d", tokenizer_separator(tokenizer));
    expect_token(tokenizer, 256, "<|endoftext|>");
    expect_token(tokenizer, 257, "\xEF\xBF\xBD");
    expect_token(tokenizer, -1, "\xEF\xBF\xBD");
    expect_token(tokenizer, INT_MAX, "\xEF\xBF\xBD");
    tokenizer_free(tokenizer);
    tokenizer_free(NULL);
}

// the byte tokenizer as data/prepare.py writes it, but with ids in another order. The alphabet is made here as GPT-2's
// encoder.py makes it: bytes that print stand for themselves, the rest get 256, 257, ... as they come.
static Tokenizer* test_tokenizer_make_bytes(const char* path, const char* normalizer, const char* prefix_space,
                                            const char* merges, const char* more_vocab, int bytes) {
    FILE* file = fopen_or_die(path, "wb");
    fprintf(file, "{\"added_tokens\": [{\"id\": 256, \"content\": \"<|endoftext|>\", \"special\": true}],\n"
                  "\"normalizer\": %s, \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": %s},\n"
                  "\"decoder\": {\"type\": \"ByteLevel\"},\n"
                  "\"model\": {\"type\": \"BPE\", \"merges\": [%s], \"vocab\": {", normalizer, prefix_space, merges);
    int others = 0;
    for (int i = 0; i < bytes; i++) {
        int prints = (i >= '!' && i <= '~') || (i >= 0xA1 && i <= 0xAC) || (i >= 0xAE && i <= 0xFF);
        fprintf(file, "%s\"\\u%04x\": %d", i ? ", " : "", prints ? i : 256 + others, (i * 5 + 3) % 256);
        others += !prints;
    }
    fprintf(file, "%s}}}\n", more_vocab);
    check(fclose(file) == 0, "cannot write '%s': %s", path, strerror(errno));
    return tokenizer_load(path);
}

static void test_tokenizer_byte_file(const char* path) {
    Tokenizer* tokenizer = test_tokenizer_make_bytes(path, "null", "false", "", "", 256);
    for (int i = 0; i < 256; i++) {
        char text[2] = {(char)i, 0};
        int id;
        expect(test_tokenizer_is(tokenizer, (i * 5 + 3) % 256, text, 1), "byte %d", i);
        expect(i == 0 || (tokenizer_encode(tokenizer, text, &id, 1) == 1 && id == (i * 5 + 3) % 256), "byte %d", i);
    }
    expect(tokenizer_separator(tokenizer) == 256, "separator %d", tokenizer_separator(tokenizer));
    tokenizer_free(tokenizer);
    // each of these means that a text is not simply its bytes: encoding is refused rather than wrong
    static const struct { const char *normalizer, *prefix_space, *merges, *more_vocab; int bytes; } others[] = {
        {"{\"type\": \"NFC\"}", "false", "", "", 256},
        {"null", "true", "", "", 256},
        {"null", "false", "\"t h\"", "", 256},
        {"null", "false", "", ", \"th\": 257", 256},
        {"null", "false", "", "", 255},
    };
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        int id;
        tokenizer = test_tokenizer_make_bytes(path, others[i].normalizer, others[i].prefix_space, others[i].merges,
                                              others[i].more_vocab, others[i].bytes);
        expect(tokenizer_encode(tokenizer, "t", &id, 1) == -1, "variant %zu encodes", i);
        tokenizer_free(tokenizer);
    }
}

static void test_tokenizer_byte_level(const char* path) {
    test_tokenizer_put(path,
        "{\"added_tokens\": [{\"id\": 9, \"content\": \"<|begin_of_text|>\"}, {\"id\": 0, \"content\": \"  \"}],\n"
        // no "type", as in GPT-2's own file; \u0120 is a space, \u010a a newline, \u00e6\u0139\u00a5 the bytes E6 97 A5
        "\"model\": {\"merges\": [\"t h\", \"th e\"], \"vocab\": {\"\\u0120the\": 1, \"\\u00e6\\u0139\": 2,\n"
        "\"\\u00a5\": 3, \"\\u010a\\u010a\": 4, \"\\u0120\\u65e5\": 5, \"<|begin_of_text|>\": 9, \"\": 7}},\n"
        "\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"ByteLevel\"}]}}");
    Tokenizer* tokenizer = tokenizer_load(path);
    int id;
    expect_token(tokenizer, 0, "  ");
    expect_token(tokenizer, 1, " the");
    expect_token(tokenizer, 2, "\xE6\x97");
    expect_token(tokenizer, 3, "\xA5");
    expect_token(tokenizer, 4, "\n\n");
    expect_token(tokenizer, 5, "\xC4\xA0\xE6\x97\xA5");  // U+65E5 is not in the alphabet: the token is text
    expect_token(tokenizer, 6, "\xEF\xBF\xBD");          // a hole
    expect_token(tokenizer, 7, "");
    expect_token(tokenizer, 9, "<|begin_of_text|>");
    expect_token(tokenizer, 10, "\xEF\xBF\xBD");
    expect(tokenizer->vocab == 10 && tokenizer_separator(tokenizer) == 9, "vocab %d", tokenizer->vocab);
    expect(tokenizer_encode(tokenizer, "the", &id, 1) == -1, "encodes without its merges");
    tokenizer_free(tokenizer);
}

static void test_tokenizer_sentencepiece(const char* path) {
    test_tokenizer_put(path,
        "{\"added_tokens\": [{\"id\": 0, \"content\": \"<unk>\"}, {\"id\": 1, \"content\": \"<s>\"}],\n"
        "\"model\": {\"type\": \"BPE\", \"byte_fallback\": true, \"merges\": [[\"\xE2\x96\x81\", \"t\"]],\n"
        "\"vocab\": {\"<unk>\": 0, \"<s>\": 1, \"<0x0A>\": 2, \"<0xfF>\": 3, \"<0x00>\": 4, \"<0x0G>\": 5,\n"
        "\"\xE2\x96\x81the\": 6, \"\xE2\x96\x81\xE2\x96\x81\": 7, \"a\xE2\x96\x81\": 8,\n"
        "\"\xE6\x97\xA5\": 9, \"<0x0A>>\": 10, \"<0x0A]\": 11}},\n"
        "\"decoder\": {\"type\": \"Sequence\", \"decoders\": [\n"
        "{\"type\": \"Replace\", \"pattern\": {\"String\": \"\xE2\x96\x81\"}, \"content\": \" \"},\n"
        "{\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"},\n"
        "{\"type\": \"Strip\", \"content\": \" \", \"start\": 1, \"stop\": 0}]}}");
    Tokenizer* tokenizer = tokenizer_load(path);
    expect_token(tokenizer, 0, "<unk>");
    expect_token(tokenizer, 1, "<s>");
    expect_token(tokenizer, 2, "\n");
    expect_token(tokenizer, 3, "\xFF");
    expect_token(tokenizer, 4, "\0");
    expect_token(tokenizer, 5, "<0x0G>");
    expect_token(tokenizer, 6, " the");
    expect_token(tokenizer, 7, "  ");
    expect_token(tokenizer, 8, "a ");
    expect_token(tokenizer, 9, "\xE6\x97\xA5");
    expect_token(tokenizer, 10, "<0x0A>>");
    expect_token(tokenizer, 11, "<0x0A]");
    expect(tokenizer_separator(tokenizer) == 1, "separator %d", tokenizer_separator(tokenizer));
    tokenizer_free(tokenizer);
}

static void test_tokenizer_run_load(void* path) { tokenizer_load((const char*)path); }

static void test_tokenizer_refused(char* path) {
    static const struct { const char* text; const char* error; } cases[] = {
        {"{\"model\": ", "line 1, column 11: expected a value"},
        {"[]", "expected an object"},
        {"{}", "the key \"model\" is missing"},
        {"{\"model\": {\"type\": \"BPE\"}}", "the key \"vocab\" is missing"},
        {"{\"model\": {\"type\": \"WordPiece\", \"vocab\": {}}}", "type 'WordPiece' is not supported, only BPE"},
        {"{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", -1.5]]}}", "type 'Unigram' is not supported"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": []}}", "there is no vocabulary"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}}, \"decoder\": null}",
         "without a decoder is not supported"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}}, \"decoder\": {\"type\": \"CTC\"}}",
         "decoder 'CTC' is not supported"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}}, \"decoder\": {\"type\": \"Fuse\"}}",
         "not one of byte-level and SentencePiece's kind"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}}, \"decoder\": {\"type\": \"Sequence\", \"decoders\": "
         "[{\"type\": \"ByteLevel\"}, {\"type\": \"ByteFallback\"}]}}",
         "not one of byte-level and SentencePiece's kind"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}}, \"decoder\": {\"type\": \"Replace\", \"pattern\": "
         "{\"Regex\": \".\"}, \"content\": \"\"}}", "replaces something other than a fixed string"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 0}}, \"decoder\": {\"type\": \"ByteLevel\"}}",
         "token id 0 is given to two tokens"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}}, \"decoder\": {\"type\": \"ByteLevel\"}}",
         "token id -1 is not in 0 .. 16777215"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 5000000000}}, \"decoder\": {\"type\": \"ByteLevel\"}}",
         "token id 5000000000 is not in"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": \"x\"}}, \"decoder\": {\"type\": \"ByteLevel\"}}",
         "expected an integer within 64 bits for \"a\""},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}}, \"decoder\": {\"type\": \"ByteLevel\"}, "
         "\"added_tokens\": [{\"id\": 3}]}", "the key \"content\" is missing"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        test_tokenizer_put(path, cases[i].text);
        expect_exit(EXIT_BAD_DATA, cases[i].error, test_tokenizer_run_load, path);
        expect_exit(EXIT_BAD_DATA, path, test_tokenizer_run_load, path);
    }
    check(unlink(path) == 0, "cannot remove '%s'", path);
    expect_exit(EXIT_NO_INPUT, path, test_tokenizer_run_load, path);
}

static void test_tokenizer(void) {
    char* folder = make_temp_folder();
    char* path = format_string("%s/tokenizer.json", folder);
    test_tokenizer_bytes();
    test_tokenizer_byte_file(path);
    test_tokenizer_byte_level(path);
    test_tokenizer_sentencepiece(path);
    test_tokenizer_refused(path);
    free(path);
    remove_folder(folder);
}
