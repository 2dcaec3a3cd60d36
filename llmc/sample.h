// sample.h: from --prompt to a printed sample of the model.
#pragma once
#include "generate.h"
#include "run.h"

static int parse_prompt_ids(const char* text, int* ids, int most, int V) {
    int count = 0;
    while (*text) {
        char* end;
        long id = strtol(text, &end, 10);
        check_or(end != text && id >= 0 && id < V, EXIT_USAGE,
                 "--prompt ids: '%s' is not a list of token ids below the vocabulary %d", text, V);
        check_or(count < most, EXIT_USAGE, "--prompt has more than the %d tokens that the model has positions for",
                 most);
        ids[count++] = (int)id;
        text = *end == ',' ? end + 1 : end;
    }
    return count;
}

// the first tokens of the data: `data` or `data:N`
static int prompt_from_data(const Run* run, const Dataset* data, int* ids, int most) {
    const char* digits = run->config.prompt + 4;
    int64_t wanted = 32;
    check_or(!*digits || (*digits == ':' && parse_count(digits + 1, &wanted) && wanted > 0), EXIT_USAGE,
             "--prompt '%s': expected data or data:N with N tokens", run->config.prompt);
    check_or(data, EXIT_USAGE, "--prompt data needs --train-data");
    int32_t* tokens = (int32_t*)malloc_or_die(2 * sizeof(int32_t) * (size_t)run->T, "a sample of the data");
    data_read_even(data, tokens, tokens + run->T, 0, 1, 1);
    int count = (int)min_i64(wanted, min_int(most, run->T));
    memcpy(ids, tokens, sizeof(int) * (size_t)count);
    free(tokens);
    return count;
}

// the prompt as tokens: given ids, tokens of the data, encoded text, or the document separator
static int prompt_tokens(const Run* run, const Dataset* data, int* ids, int most) {
    const char* prompt = run->config.prompt;
    if (!strcmp(prompt, "data") || starts_with(prompt, "data:")) {
        return prompt_from_data(run, data, ids, most);
    }
    if (starts_with(prompt, "ids:")) {
        int count = parse_prompt_ids(prompt + 4, ids, most, run->model_config.V);
        check_or(count > 0, EXIT_USAGE, "--prompt ids: names no token");
        return count;
    }
    int separator = run->tokenizer ? tokenizer_separator(run->tokenizer) : -1;
    int count = 0;
    if (separator >= 0 && separator < run->model_config.V) {
        ids[count++] = separator;
    }
    if (*prompt) {
        check_or(run->tokenizer, EXIT_USAGE,
                 "--prompt as text needs a tokenizer; give --tokenizer FILE or --prompt ids:1,2,3");
        int added = tokenizer_encode(run->tokenizer, prompt, ids + count, most - count);
        check_or(added >= 0, EXIT_USAGE,
                 "--prompt '%s' cannot be encoded here: its tokenizer merges bytes, or it is longer than %d "
                 "tokens; give ids: --prompt ids:1,2,3 (HF tokenizers prints them)",
                 prompt, most - count);
        count += added;
    }
    ids[count] = 0;
    return max_int(count, 1);
}

// A sample text after `step` steps, to stdout. data: what a prompt `data` reads, or NULL.
static void print_sample(const Run* run, Model* model, const Dataset* data, int64_t step) {
    int most = run->model_config.max_positions;
    int* ids = (int*)malloc_or_die(sizeof(int) * (size_t)(most + 1), "sample");
    int count = prompt_tokens(run, data, ids, most - 1);
    int vocab = run->tokenizer ? run->tokenizer->vocab : run->model_config.V;
    int total = (int)min_i64(most, count + run->config.sample_tokens);
    count = generate(model, ids, count, total, vocab, run->config.temperature, (uint64_t)run->config.seed,
                     step);
    printf("--- sample after %lld steps\n", (long long)step);
    if (run->tokenizer) {
        print_tokens(run->tokenizer, ids, count);
    } else {
        for (int i = 0; i < count; i++) {
            printf("%d ", ids[i]);
        }
    }
    printf("\n---\n");
    fflush(stdout);
    free(ids);
}
