// tokenizer.h: token ids to text, for samples in the log. Training needs no tokenizer: shards hold ids.
//
// A Tokenizer is a table id -> bytes, read from a HF tokenizer.json with a BPE model in one of two alphabets:
//   byte-level (GPT-2, Llama-3): each character of a token stands for one byte. The 188 printable bytes 33-126,
//   161-172, 174-255 are their own code point, the other 68 are 256, 257, ... in order, so a space is U+0120.
//   SentencePiece (Llama-2): tokens are text with U+2581 for a space, and <0x0A> is the byte 10.
// Which one is read off the decoder. added_tokens are their own text. The decoder's Strip step (Llama-2 drops the space
// that begins a text) is a matter of whole texts and is left out. What is not understood is refused by name.
// Or tokenizer_byte: ids 0 to 255 are bytes, 256 is the document separator.
#pragma once
#include "json.h"
#include <ctype.h>

#define TOKENIZER_MAX_VOCAB (1 << 24)  // an id from there on is damage, not a vocabulary

typedef struct {
    int vocab;             // ids are 0 .. vocab - 1; there may be holes
    size_t* begins;        // (vocab) where a token begins in text
    int* lengths;          // (vocab) its bytes; -1 for a hole
    char* text;            // of all tokens, each followed by a zero
    size_t used, capacity;
    int separator;         // -1 if there is none
    int byte_ids[256];     // the id of a byte; -1 if no token is just that byte
    int can_encode;
} Tokenizer;

// what the decoder of a tokenizer.json does to one token
typedef struct {
    int byte_level;
    int byte_fallback;
    const char* pattern;  // replaced by content wherever it occurs; NULL: nothing is
    const char* content;
} TokenizerDecoder;

static void tokenizer_free(Tokenizer* tokenizer) {
    if (tokenizer) {
        free(tokenizer->begins);
        free(tokenizer->lengths);
        free(tokenizer->text);
        free(tokenizer);
    }
}

static Tokenizer* tokenizer_new(int vocab) {
    Tokenizer* tokenizer = (Tokenizer*)calloc_or_die(sizeof *tokenizer, "the tokenizer");
    tokenizer->vocab = vocab;
    tokenizer->begins = (size_t*)calloc_or_die((size_t)vocab * sizeof(size_t), "the tokenizer");
    tokenizer->lengths = (int*)malloc_or_die((size_t)vocab * sizeof(int), "the tokenizer");
    for (int i = 0; i < vocab; i++) {
        tokenizer->lengths[i] = -1;
    }
    tokenizer->separator = -1;
    for (int i = 0; i < 256; i++) {
        tokenizer->byte_ids[i] = -1;
    }
    return tokenizer;
}

static void tokenizer_append(Tokenizer* tokenizer, const char* bytes, size_t count) {
    if (tokenizer->capacity - tokenizer->used < count) {
        tokenizer->capacity = 2 * (tokenizer->capacity + count) + 4096;
        tokenizer->text = (char*)realloc(tokenizer->text, tokenizer->capacity);
        check_or(tokenizer->text, EXIT_NO_MEMORY, "out of memory: %zu bytes for the tokenizer", tokenizer->capacity);
    }
    memcpy(tokenizer->text + tokenizer->used, bytes, count);
    tokenizer->used += count;
}

// token id is the bytes that were appended since `begin`
static void tokenizer_finish_token(Tokenizer* tokenizer, int id, size_t begin) {
    tokenizer->begins[id] = begin;
    tokenizer->lengths[id] = (int)(tokenizer->used - begin);
    tokenizer_append(tokenizer, "", 1);
}

static Tokenizer* tokenizer_byte(void) {
    Tokenizer* tokenizer = tokenizer_new(257);
    for (int i = 0; i < 257; i++) {
        char byte = (char)i;
        size_t begin = tokenizer->used;
        tokenizer_append(tokenizer, i < 256 ? &byte : "<|endoftext|>", i < 256 ? 1 : strlen("<|endoftext|>"));
        tokenizer_finish_token(tokenizer, i, begin);
        if (i < 256) {
            tokenizer->byte_ids[i] = i;
        }
    }
    tokenizer->separator = 256;
    tokenizer->can_encode = 1;
    return tokenizer;
}

// ---------------------------------------------------------------------------------------------------------------------
// tokenizer.json

// the byte that a character of a byte-level token stands for, -1 if none
static int tokenizer_byte_of_character(uint32_t code_point) {
    if ((code_point >= 33 && code_point <= 126) || (code_point >= 161 && code_point <= 172) ||
        (code_point >= 174 && code_point <= 255)) {
        return (int)code_point;
    }
    int rank = (int)code_point - 256;  // among the bytes 0-32, 127-160, 173
    if (code_point < 256 || rank >= 33 + 34 + 1) {
        return -1;
    }
    return rank < 33 ? rank : rank < 33 + 34 ? rank - 33 + 127 : 173;
}

static void tokenizer_append_byte_level(Tokenizer* tokenizer, const char* token, size_t bytes) {
    size_t begin = tokenizer->used;
    for (size_t at = 0; at < bytes;) {
        uint32_t code_point;
        at += (size_t)utf8_decode(&code_point, token + at, bytes - at);  // the JSON reader has checked that it is valid
        int value = tokenizer_byte_of_character(code_point);
        if (value < 0) {  // one foreign character makes the whole token plain text, as in HF tokenizers
            tokenizer->used = begin;
            tokenizer_append(tokenizer, token, bytes);
            return;
        }
        char byte = (char)value;
        tokenizer_append(tokenizer, &byte, 1);
    }
}

static void tokenizer_append_decoded(Tokenizer* tokenizer, const TokenizerDecoder* decoder, const char* token,
                                     size_t bytes) {
    if (decoder->byte_level) {
        tokenizer_append_byte_level(tokenizer, token, bytes);
        return;
    }
    if (decoder->byte_fallback && bytes == 6 && starts_with(token, "<0x") && token[5] == '>' &&
        isxdigit((unsigned char)token[3]) && isxdigit((unsigned char)token[4])) {
        char byte = (char)strtol(token + 3, NULL, 16);
        tokenizer_append(tokenizer, &byte, 1);
        return;
    }
    size_t pattern_bytes = decoder->pattern ? strlen(decoder->pattern) : 0;
    for (size_t at = 0; at < bytes;) {
        if (pattern_bytes > 0 && bytes - at >= pattern_bytes && !memcmp(token + at, decoder->pattern, pattern_bytes)) {
            tokenizer_append(tokenizer, decoder->content, strlen(decoder->content));
            at += pattern_bytes;
        } else {
            tokenizer_append(tokenizer, token + at, 1);
            at++;
        }
    }
}

static void tokenizer_read_replacement(TokenizerDecoder* decoder, const char* path, const char* pattern,
                                       const char* content) {
    check_or(pattern && *pattern, EXIT_BAD_DATA,
             "'%s': its decoder replaces something other than a fixed string, which is not supported", path);
    check_or(!decoder->pattern, EXIT_BAD_DATA, "'%s': its decoder replaces two strings, which is not supported", path);
    decoder->pattern = pattern;
    decoder->content = content;
}

static void tokenizer_read_decoder(TokenizerDecoder* decoder, const Json* node, const char* path) {
    const char* type = json_string(json_need(node, "type"));
    if (strcmp(type, "Sequence") == 0) {
        for (const Json* step = json_need(node, "decoders")->first; step; step = step->next) {
            tokenizer_read_decoder(decoder, step, path);
        }
    } else if (strcmp(type, "ByteLevel") == 0) {
        decoder->byte_level = 1;
    } else if (strcmp(type, "ByteFallback") == 0) {
        decoder->byte_fallback = 1;
    } else if (strcmp(type, "Replace") == 0) {
        const char* pattern = json_string_or(json_need(node, "pattern"), "String", NULL);
        tokenizer_read_replacement(decoder, path, pattern, json_string(json_need(node, "content")));
    } else if (strcmp(type, "Metaspace") == 0) {
        tokenizer_read_replacement(decoder, path, json_string(json_need(node, "replacement")), " ");
    } else {
        check_or(strcmp(type, "Fuse") == 0 || strcmp(type, "Strip") == 0, EXIT_BAD_DATA,
                 "'%s': decoder '%s' is not supported; ByteLevel, Replace, Metaspace, ByteFallback, Fuse, Strip are",
                 path, type);
    }
}

static TokenizerDecoder tokenizer_find_decoder(const Json* root, const char* path) {
    TokenizerDecoder decoder = {};
    const Json* node = json_get_value(root, "decoder");
    check_or(node, EXIT_BAD_DATA, "'%s': a tokenizer without a decoder is not supported", path);
    tokenizer_read_decoder(&decoder, node, path);
    int sentence_piece = decoder.byte_fallback || decoder.pattern;
    check_or(decoder.byte_level != sentence_piece, EXIT_BAD_DATA,
             "'%s': its decoder is not one of byte-level and SentencePiece's kind: not supported", path);
    return decoder;
}

static int tokenizer_id(const Json* node) {
    int64_t id = json_int(node);
    check_or(id >= 0 && id < TOKENIZER_MAX_VOCAB, EXIT_BAD_DATA, "'%s', line %d: token id %lld is not in 0 .. %d",
             node->name, node->line, (long long)id, TOKENIZER_MAX_VOCAB - 1);
    return (int)id;
}

// vocab and added tokens into the table. Returns how many tokens of the vocabulary proper are not single bytes.
static int tokenizer_read_tokens(Tokenizer* tokenizer, const TokenizerDecoder* decoder, const Json* vocab,
                                 const Json* added) {
    for (const Json* item = added ? added->first : NULL; item; item = item->next) {
        const char* content = json_string(json_need(item, "content"));
        size_t begin = tokenizer->used;
        tokenizer_append(tokenizer, content, strlen(content));
        tokenizer_finish_token(tokenizer, tokenizer_id(json_need(item, "id")), begin);
    }
    size_t added_end = tokenizer->used;
    int longer = 0;
    for (const Json* item = vocab->first; item; item = item->next) {
        int id = tokenizer_id(item);
        size_t begin = tokenizer->used;
        if (tokenizer->lengths[id] >= 0 && tokenizer->begins[id] < added_end) {
            continue;  // an added token may stand in the vocabulary too: its own text counts
        }
        check_or(tokenizer->lengths[id] < 0, EXIT_BAD_DATA, "'%s', line %d: token id %d is given to two tokens",
                 item->name, item->line, id);
        tokenizer_append_decoded(tokenizer, decoder, item->key, (size_t)item->key_bytes);
        tokenizer_finish_token(tokenizer, id, begin);
        if (tokenizer->lengths[id] == 1) {
            tokenizer->byte_ids[(unsigned char)tokenizer->text[begin]] = id;
        } else {
            longer++;
        }
    }
    return longer;
}

// A tokenizer.json does not say which token separates documents. These do in the tokenizers at hand: the names and the
// order of data/prepare.py, so that what it puts before a document is what we take for a separator.
static int tokenizer_find_separator(const Json* vocab, const Json* added) {
    static const char* const names[] = {"<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        for (const Json* item = added ? added->first : NULL; item; item = item->next) {
            if (strcmp(json_string(json_need(item, "content")), names[i]) == 0) {
                return tokenizer_id(json_need(item, "id"));
            }
        }
        const Json* plain = json_get(vocab, names[i]);
        if (plain) {
            return tokenizer_id(plain);
        }
    }
    return -1;
}

static Tokenizer* tokenizer_load(const char* path) {
    Json* root = json_read_file(path);
    const Json* model = json_need(root, "model");
    const Json* vocab = json_need(model, "vocab");
    const Json* merges = json_get(model, "merges");
    const Json* added = json_get_value(root, "added_tokens");
    // GPT-2's own file leaves the type out
    const char* type = json_string_or(model, "type", merges && vocab->type == JSON_OBJECT ? "BPE" : "unnamed");
    check_or(strcmp(type, "BPE") == 0, EXIT_BAD_DATA, "'%s': a tokenizer model of type '%s' is not supported, only BPE",
             path, type);
    check_or(vocab->type == JSON_OBJECT && vocab->count > 0, EXIT_BAD_DATA, "'%s', line %d: there is no vocabulary",
             path, vocab->line);
    check_or(!added || added->type == JSON_ARRAY, EXIT_BAD_DATA, "'%s': added_tokens is not an array", path);
    TokenizerDecoder decoder = tokenizer_find_decoder(root, path);
    int last = 0;
    for (const Json* item = vocab->first; item; item = item->next) {
        last = max_int(last, tokenizer_id(item));
    }
    for (const Json* item = added ? added->first : NULL; item; item = item->next) {
        last = max_int(last, tokenizer_id(json_need(item, "id")));
    }
    Tokenizer* tokenizer = tokenizer_new(last + 1);
    int longer = tokenizer_read_tokens(tokenizer, &decoder, vocab, added);
    tokenizer->separator = tokenizer_find_separator(vocab, added);
    // Without merges a byte-level vocabulary of just the bytes has one way to encode a text, provided that nothing
    // rewrites the text before.
    const Json* splitter = json_get_value(root, "pre_tokenizer");
    tokenizer->can_encode = decoder.byte_level && longer == 0 && (!merges || merges->count == 0) &&
                            !json_get_value(root, "normalizer") && !json_bool_or(splitter, "add_prefix_space", 0);
    for (int i = 0; i < 256; i++) {
        tokenizer->can_encode = tokenizer->can_encode && tokenizer->byte_ids[i] >= 0;
    }
    json_free(root);
    return tokenizer;
}

// ---------------------------------------------------------------------------------------------------------------------
// use

// the bytes of a token, followed by a zero; they may be a part of a UTF-8 character, or hold zeros themselves. Special
// tokens are their own text. An id that names no token (a model's vocabulary is often padded) is U+FFFD.
static const char* tokenizer_decode(const Tokenizer* tokenizer, int id, size_t* bytes) {
    if (id < 0 || id >= tokenizer->vocab || tokenizer->lengths[id] < 0) {
        *bytes = 3;
        return "\xEF\xBF\xBD";
    }
    *bytes = (size_t)tokenizer->lengths[id];
    return tokenizer->text + tokenizer->begins[id];
}

// ids (up to max) of a zero-terminated text and their number. -1 when the tokenizer has more than bytes (encoding with
// merges is not done here) or when max is too small. The text of a special token is encoded like any other.
static int tokenizer_encode(const Tokenizer* tokenizer, const char* text, int* ids, int max) {
    size_t count = strlen(text);
    if (!tokenizer->can_encode || max < 0 || count > (size_t)max) {
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        ids[i] = tokenizer->byte_ids[(unsigned char)text[i]];
    }
    return (int)count;
}

// the token that separates documents, -1 if none is known
static int tokenizer_separator(const Tokenizer* tokenizer) { return tokenizer->separator; }
