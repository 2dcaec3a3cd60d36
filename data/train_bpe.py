#!/usr/bin/env python3
"""train_bpe.py: learns a byte-level BPE vocabulary from text and writes it as a Hugging Face tokenizer.json.

    data/train_bpe.py --vocab-size 32000 --out tokenizer.json web-*.jsonl.xz
    data/prepare.py --tokenizer tokenizer.json --out data/web web-*.jsonl.xz

The tokenizer is of the GPT-2 kind: text is cut into words by its regular expression, a word is its UTF-8 bytes, and
merges join them; any text can be encoded and decoded without loss. Token 0 is <|endoftext|>, then the 256 bytes, then
the merges in the order learned. Input is streamed; memory grows with the number of different words only, which
--limit-bytes bounds. Needs the package `tokenizers`.
"""
import argparse
import os
import sys

import text_input
from text_input import BAD_DATA, IO_ERROR, UNEXPECTED, USAGE, Failure

SEPARATOR = "<|endoftext|>"
PIECE_BYTES = 1 << 16


def limited(pieces, limit):
    """The pieces of text_input.cut_pieces as text, until limit bytes have been passed on."""
    for piece, _, _ in pieces:
        yield piece.decode()
        limit -= len(piece)
        if limit <= 0:
            return


def sample_texts(options, progress, failures):
    """Text of all inputs. With --limit-bytes each gets an equal share of what is left, so that none is left out.
    The library reports an exception from here as its own, so a Failure is kept in the list failures as well."""
    left = options.limit_bytes
    try:
        for index, path in enumerate(options.inputs):
            share = left / (len(options.inputs) - index)
            documents = text_input.read_documents([path], options, progress, True, {})
            for text in limited(text_input.cut_pieces(documents, PIECE_BYTES), share):
                left -= len(text.encode())
                options.sampled_bytes += len(text.encode())
                yield text
    except Failure as failure:
        failures.append(failure)
        raise


def parse_options():
    parser = argparse.ArgumentParser(description="Trains a byte-level BPE tokenizer.json.")
    parser.add_argument("--vocab-size", type=text_input.parse_count, default=32000, metavar="N",
                        help="tokens in all, at least 257 (default 32000)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--limit-bytes", type=text_input.parse_count, default=float("inf"), metavar="N",
                        help="learn from the first N bytes, taken in equal shares from all inputs (default: all; "
                             "some GB are plenty)")
    parser.add_argument("--min-frequency", type=text_input.parse_count, default=2, metavar="N",
                        help="a pair seen less often is not merged (default 2)")
    parser.add_argument("--jobs", type=text_input.parse_count, metavar="N", help="threads (default: all cores)")
    text_input.add_input_options(parser)
    options = parser.parse_args()
    if options.vocab_size < 257:
        parser.error(f"--vocab-size {options.vocab_size} is below 257: 256 bytes and {SEPARATOR}")
    if os.path.exists(options.out) and not options.overwrite:
        raise Failure(USAGE, f"{options.out} exists; choose another --out, or replace it with --overwrite")
    folder = os.path.dirname(options.out) or "."
    if os.path.isdir(options.out) or not os.access(folder, os.W_OK):
        raise Failure(IO_ERROR, f"cannot write {options.out}: no such folder, or not writable")
    text_input.check_input_options(parser, options, options.inputs)
    options.sampled_bytes = 0
    return options


def train(options):
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if options.jobs:
        os.environ["RAYON_NUM_THREADS"] = str(options.jobs)
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise Failure(UNEXPECTED, "train_bpe.py needs the Python package tokenizers: "
                                  "python3 -m pip install tokenizers") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=options.vocab_size, min_frequency=options.min_frequency,
                                  special_tokens=[SEPARATOR], show_progress=sys.stderr.isatty(),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    progress = text_input.Progress(text_input.total_bytes(options.inputs))
    progress.terminal = False       # the library draws its own bars on a terminal
    failures = []
    try:
        tokenizer.train_from_iterator(sample_texts(options, progress, failures), trainer)
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    return tokenizer


def main():
    options = parse_options()
    tokenizer = train(options)
    if not options.sampled_bytes:
        raise Failure(BAD_DATA, "no text in the input")
    temporary = options.out + ".tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(tokenizer.to_str(pretty=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, options.out)
    except OSError as error:
        raise Failure(IO_ERROR, f"cannot write {options.out}: {error.strerror}") from None
    size = tokenizer.get_vocab_size()
    print(f"{options.out}: {size:,} tokens, learned from {options.sampled_bytes:,} bytes of text")
    if size < options.vocab_size:
        print(f"note: the text has no pair left that occurs {options.min_frequency} times, "
              f"so there are fewer tokens than the {options.vocab_size:,} asked for")
    print(f"next: data/prepare.py --tokenizer {options.out} --out FOLDER INPUT...")


if __name__ == "__main__":
    text_input.run_main(main)
