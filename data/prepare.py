#!/usr/bin/env python3
"""prepare.py: text files to the token shards that train_llama reads.

    data/prepare.py --tokenizer byte --out data/kjv kjv.txt
    data/prepare.py --tokenizer tokenizer.json --out data/web --shard-tokens 100M web-*.jsonl.xz

writes into the folder --out
    train_000000.bin ... val_000000.bin ...   the tokens; README.md beside this file has the format
    tokenizer.json                            what turns the tokens back into text
    info.json                                 counts and options; written last, so a folder that has it is complete

Each document is preceded by the separator token. The split is by document and needs no second pass: document 0 is
for training, document 1 for validation (so that neither is empty), and any other goes to validation when the hash of
(seed, its index) falls below --val-fraction. The same input and options give the same files, byte for byte.

Input is streamed; memory stays small whatever its size. Needs Python 3.9 and, for a tokenizer.json, the package
`tokenizers`.
"""
import argparse
import array
import hashlib
import json
import os
import re
import signal
import struct
import sys

import text_input
from text_input import BAD_DATA, IO_ERROR, NO_INPUT, UNEXPECTED, USAGE, Failure

SEPARATOR_NAMES = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]")
PIECE_BYTES = 1 << 17       # longest text given to a tokenizer at once; the library needs some 100 times as much memory
BATCH_BYTES = 4 << 20       # text gathered before a BPE tokenizer is called, which spreads it over the cores
OUTPUT_NAME = re.compile(r"(train|val)_.*\.bin")      # what --train-data 'FOLDER/train_*.bin' would pick up


# ---------------------------------------------------------------------------------------------------------------------
# shards

def shard_header(count, token_bytes):
    """The 1024 bytes in front of the tokens: 256 little-endian int32."""
    magic, version = {2: (20240520, 1), 4: (20240801, 7)}[token_bytes]
    words = (count, 0, 0) if count < 1 << 31 else (-1, count & 0xFFFFFFFF, count >> 32)
    return struct.pack("<iiiII", magic, version, *words).ljust(1024, b"\0")


class ShardWriter:
    """Cuts one split's token stream into shards of shard_tokens. A shard is written as NAME.tmp, gets its header when
    it is full, and its own name only in publish(), when the whole run has succeeded."""

    def __init__(self, folder, split, vocab_size, shard_tokens):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.token_bytes = 2 if vocab_size <= 65536 else 4
        self.shards = []            # [name, tokens] of each shard, the open one included
        self.file = None
        self.documents = self.text_bytes = self.tokens = 0

    def write(self, data):
        """Appends tokens, given as little-endian integers of token_bytes each."""
        view = memoryview(data)
        while view:
            if self.file is None:
                self.open()
            part = view[:(self.shard_tokens - self.shards[-1][1]) * self.token_bytes]
            self.guard(self.file.write, part)
            count = len(part) // self.token_bytes
            self.tokens += count
            self.shards[-1][1] += count
            if self.shards[-1][1] == self.shard_tokens:
                self.close()
            view = view[len(part):]

    def open(self):
        name = f"{self.split}_{len(self.shards):06}.bin"
        self.shards.append([name, 0])
        self.file = self.guard(open, self.temporary(name), "wb", 1 << 20)
        self.guard(self.file.write, bytes(1024))

    def close(self):
        if self.file is not None:
            file, self.file = self.file, None
            self.guard(self.finish, file)

    def finish(self, file):
        with file:
            file.seek(0)
            file.write(shard_header(self.shards[-1][1], self.token_bytes))
            file.flush()
            os.fsync(file.fileno())

    def publish(self):
        for name, _ in self.shards:
            self.guard(os.replace, self.temporary(name), os.path.join(self.folder, name))

    def discard(self):
        """Removes what is not published; used when the run fails, so errors here no longer matter."""
        if self.file is not None:
            try:
                self.file.close()
            except OSError:
                pass
        for name, _ in self.shards:
            remove_if_there(self.temporary(name))

    def temporary(self, name):
        return os.path.join(self.folder, name + ".tmp")

    def guard(self, call, *arguments):
        """call(*arguments), where an I/O error becomes one clear line."""
        try:
            return call(*arguments)
        except OSError as error:
            name = os.path.join(self.folder, self.shards[-1][0])
            raise Failure(IO_ERROR, f"cannot write {name}: {error.strerror}; nothing was kept") from None


def remove_if_there(path):
    try:
        os.remove(path)
    except OSError:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers. Each has kind, vocab_size, separator_name, separator_id, json_bytes (the tokenizer.json to keep) and
#     add(writer, piece, starts)   append a piece of a document, after the separator where it starts one
#     flush()                      write what add() has kept back

class ByteTokenizer:
    """Token = byte; 256 separates documents."""
    kind, vocab_size, separator_name, separator_id = "byte", 257, "<|endoftext|>", 256
    text_is_utf8 = False

    def __init__(self):
        self.json_bytes = byte_tokenizer_json()
        self.separator = struct.pack("<H", self.separator_id)

    def add(self, writer, piece, starts):
        tokens = bytearray(2 * len(piece))
        tokens[::2] = piece         # low bytes; the high bytes are zero
        writer.write(self.separator + tokens if starts else tokens)

    def flush(self):
        pass


def byte_characters():
    """The printable character by which byte-level BPE writes each byte: itself where it is one, else U+0100 onwards."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def byte_tokenizer_json():
    """A tokenizer.json that gives every byte its own value: byte-level BPE without a single merge."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    separator = {"id": 256, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocabulary, "merges": []}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [separator], "normalizer": None,
             "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model}
    return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode()


class FileTokenizer:
    """A Hugging Face tokenizer.json. The names of special tokens that stand in the text are encoded as plain text."""
    kind, text_is_utf8 = "tokenizer.json", True

    def __init__(self, path, separator_name, jobs):
        try:
            with open(path, "rb") as file:
                self.json_bytes = file.read()
        except OSError as error:
            raise Failure(NO_INPUT, f"cannot read tokenizer {path}: {error.strerror}") from None
        os.environ["TOKENIZERS_PARALLELISM"] = "true"       # read by the library below, as is the number of threads
        if jobs:
            os.environ["RAYON_NUM_THREADS"] = str(jobs)
        try:
            import tokenizers
        except ImportError:
            raise Failure(UNEXPECTED, f"--tokenizer {path} needs the Python package tokenizers: "
                                      "python3 -m pip install tokenizers (or use --tokenizer byte)") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(self.json_bytes)
        except Exception as error:      # the library raises plain Exception for whatever it cannot parse
            raise Failure(BAD_DATA, f"{path} is not a tokenizer.json: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if not hasattr(self.tokenizer, "encode_special_tokens"):
            raise Failure(UNEXPECTED, f"tokenizers {tokenizers.__version__} is too old: pip install -U tokenizers")
        self.tokenizer.encode_special_tokens = True         # "<|endoftext|>" in a document is text
        self.encode_batch = getattr(self.tokenizer, "encode_batch_fast", self.tokenizer.encode_batch)

        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        names = [separator_name] if separator_name else [name for name in SEPARATOR_NAMES if name in vocabulary]
        if not names or names[0] not in vocabulary:
            what = f"no token {separator_name}" if separator_name else "none of " + " ".join(SEPARATOR_NAMES)
            raise Failure(USAGE, f"{path} has {what}; name the token to put before each document with --bos-token")
        self.separator_name, self.separator_id = names[0], vocabulary[names[0]]
        self.typecode = "H" if self.vocab_size <= 65536 else "I"
        self.waiting, self.waiting_bytes = [], 0            # (writer, text, starts)

    def add(self, writer, piece, starts):
        self.waiting.append((writer, piece.decode(), starts))
        self.waiting_bytes += len(piece)
        if self.waiting_bytes >= BATCH_BYTES:
            self.flush()

    def flush(self):
        encodings = self.encode_batch([text for _, text, _ in self.waiting], add_special_tokens=False)
        for (writer, _, starts), encoding in zip(self.waiting, encodings):
            tokens = array.array(self.typecode, [self.separator_id] if starts else [])
            tokens.extend(encoding.ids)
            if sys.byteorder == "big":
                tokens.byteswap()
            writer.write(tokens.tobytes())
        self.waiting, self.waiting_bytes = [], 0


# ---------------------------------------------------------------------------------------------------------------------
# the run

def is_validation(index, seed, fraction):
    """Which split document `index` belongs to; a pure function, so that the input needs to be read only once."""
    if index < 2 or fraction == 0:
        return index == 1 and fraction > 0
    digest = hashlib.blake2b(struct.pack("<Q", index), digest_size=8, key=b"%d" % seed).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def encode_documents(documents, tokenizer, writer_of):
    """Sends every document to the writer that writer_of(index) names."""
    index, writer = -1, None
    for piece, starts, _ in text_input.cut_pieces(documents, PIECE_BYTES):
        if starts:
            index += 1
            writer = writer_of(index)
            writer.documents += 1
        writer.text_bytes += len(piece)
        tokenizer.add(writer, piece, starts)
    tokenizer.flush()


def parse_options():
    parser = argparse.ArgumentParser(description="Turns text files into the token shards that train_llama reads.",
                                     epilog="Counts may be written 5000, 100M, 1e9. The .bin format: data/README.md")
    parser.add_argument("--tokenizer", required=True, metavar="byte|FILE",
                        help="'byte' (257 tokens, needs no package) or a Hugging Face tokenizer.json")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the shards go; created if missing")
    parser.add_argument("--shard-tokens", type=text_input.parse_count, default=100_000_000, metavar="N",
                        help="tokens in each shard but the last (default 100M)")
    parser.add_argument("--bos-token", metavar="NAME",
                        help="token before each document (default: the first that the tokenizer has of "
                             + " ".join(SEPARATOR_NAMES) + ")")
    parser.add_argument("--jobs", type=text_input.parse_count, metavar="N",
                        help="threads of the BPE tokenizer (default: all cores)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace what an earlier run left in FOLDER: once the new shards are complete, all other "
                             "train_*.bin and val_*.bin there are deleted")
    group = parser.add_argument_group("validation split").add_mutually_exclusive_group()
    group.add_argument("--val-fraction", type=float, default=0.01, metavar="F",
                       help="share of the documents that goes to validation (default 0.01; 0: none)")
    group.add_argument("--val", nargs="+", metavar="FILE", help="take the validation documents from these files")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="picks the validation documents (default 0)")
    text_input.add_input_options(parser)
    options = parser.parse_args()

    options.out = options.out.rstrip("/") or "/"
    if not 0 <= options.val_fraction < 1:
        parser.error(f"--val-fraction {options.val_fraction:g} is not in [0, 1)")
    if options.tokenizer == "byte" and options.bos_token:
        parser.error("--bos-token goes with a tokenizer.json; the byte tokenizer always uses token 256")
    text_input.check_input_options(parser, options, options.inputs + (options.val or []) if options.inputs else [])
    return options


def prepare_folder(options, tokenizer):
    """Creates the folder; stops at an earlier run's files. Returns the names --overwrite will remove."""
    try:
        os.makedirs(options.out, exist_ok=True)
        names = os.listdir(options.out)
    except OSError as error:
        raise Failure(IO_ERROR, f"cannot create folder {options.out}: {error.strerror}") from None
    if not os.access(options.out, os.W_OK | os.X_OK):
        raise Failure(IO_ERROR, f"cannot write into folder {options.out}: Permission denied")
    for name in names:      # what a killed run left
        if name.endswith(".tmp") and (OUTPUT_NAME.fullmatch(name[:-4]) or name[:-4] in ("info.json", "tokenizer.json")):
            remove_if_there(os.path.join(options.out, name))
    stale = [name for name in names if OUTPUT_NAME.fullmatch(name)]
    if stale and not options.overwrite:
        raise Failure(USAGE, f"{options.out} already holds {len(stale)} shards ({min(stale)}, ...); "
                             "choose another --out, or replace them with --overwrite")
    if "tokenizer.json" in names and not options.overwrite:
        path = os.path.join(options.out, "tokenizer.json")
        try:
            with open(path, "rb") as file:
                same = file.read() == tokenizer.json_bytes
        except OSError as error:
            raise Failure(IO_ERROR, f"cannot read {path}: {error.strerror}") from None
        if not same:
            raise Failure(USAGE, f"{path} is another tokenizer; choose another --out, or replace it with --overwrite")
    return stale


def publish(options, tokenizer, writers, stale, info):
    """Old files out, new files in, info.json last."""
    for number in (signal.SIGINT, signal.SIGTERM):     # a few renames: not worth leaving half done
        signal.signal(number, signal.SIG_IGN)
    remove_if_there(os.path.join(options.out, "info.json"))
    try:
        for name in stale:
            os.remove(os.path.join(options.out, name))
        write_file(options.out, "tokenizer.json", tokenizer.json_bytes)
        for writer in writers:
            writer.publish()
        write_file(options.out, "info.json", (json.dumps(info, indent=1, ensure_ascii=False) + "\n").encode(
            "utf-8", "surrogateescape"))
        folder = os.open(options.out, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise Failure(IO_ERROR, f"cannot write into {options.out}: {error.strerror}") from None


def write_file(folder, name, data):
    temporary = os.path.join(folder, name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(folder, name))
    except OSError:
        remove_if_there(temporary)
        raise


def run_info(options, tokenizer, writers, rules_used):
    return {
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                      "separator_token": tokenizer.separator_name, "separator_id": tokenizer.separator_id},
        "token_bytes": writers[0].token_bytes,
        "splits": {writer.split: {"documents": writer.documents, "tokens": writer.tokens,
                                  "text_bytes": writer.text_bytes, "shards": dict(writer.shards)}
                   for writer in writers},
        "documents_by_rule": rules_used,        # how many files were split how
        "options": {**vars(options), "separator": options.separator.decode("utf-8", "surrogateescape")},
    }


def print_summary(options, tokenizer, writers, rules_used):
    texts = {"separator": "split at separator lines", "file": "one document each", "line": "one document a line",
             "blank": "split at blank lines", "jsonl": "one document a JSON line",
             "chunk": f"cut into documents of up to {options.document_bytes:,} bytes"}
    for rule, count in rules_used.items():
        print(f"input   {count} file{'s' * (count > 1)} {texts[rule]}")
    for writer in writers:
        ratio = writer.text_bytes / max(writer.tokens, 1)
        print(f"{writer.split:<7} {writer.tokens:,} tokens, {writer.documents:,} documents, {writer.text_bytes:,} "
              f"bytes of text, {ratio:.3f} bytes a token, {len(writer.shards)} shard{'s' * (len(writer.shards) != 1)}")
    print(f"vocab   {tokenizer.vocab_size:,} ({tokenizer.kind}), {8 * writers[0].token_bytes} bits a token, "
          f"{tokenizer.separator_name} ({tokenizer.separator_id}) before each document")
    if not writers[1].tokens:
        why = "there is only one document; see --document and --val" if options.val_fraction else "--val-fraction 0"
        print(f"note    no validation split: {why}")
    validation = f" --val-data '{options.out}/val_*.bin'" if writers[1].tokens else ""
    model = "--model tiny " if tokenizer.kind == "byte" else ""
    print(f"next    ./train_llama {model}--train-data '{options.out}/train_*.bin'{validation}")


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C: leave nothing behind
    options = parse_options()
    tokenizer = (ByteTokenizer() if options.tokenizer == "byte"
                 else FileTokenizer(options.tokenizer, options.bos_token, options.jobs))
    stale = prepare_folder(options, tokenizer)
    writers = [ShardWriter(options.out, split, tokenizer.vocab_size, options.shard_tokens)
               for split in ("train", "val")]
    progress = text_input.Progress(text_input.total_bytes(options.inputs + (options.val or [])))
    rules_used = {}

    def documents_of(paths):
        return text_input.read_documents(paths, options, progress, tokenizer.text_is_utf8, rules_used)

    try:
        if options.val:
            encode_documents(documents_of(options.inputs), tokenizer, lambda index: writers[0])
            encode_documents(documents_of(options.val), tokenizer, lambda index: writers[1])
        else:
            encode_documents(documents_of(options.inputs), tokenizer,
                             lambda index: writers[is_validation(index, options.seed, options.val_fraction)])
        for writer in writers:
            writer.close()
        if not writers[0].tokens or (options.val and not writers[1].tokens):
            raise Failure(BAD_DATA, f"no text in {'the input' if not writers[0].tokens else 'the files of --val'}")
        publish(options, tokenizer, writers, stale, run_info(options, tokenizer, writers, rules_used))
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    finally:
        progress.close()
    print_summary(options, tokenizer, writers, rules_used)


if __name__ == "__main__":
    text_input.run_main(main)
