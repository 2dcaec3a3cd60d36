"""text_input.py: reads text as a stream of documents, for prepare.py and train_bpe.py.

Every stage is a generator, so the memory in use is a few blocks, whatever the size of the input:

    read_blocks     bytes of a plain, .gz, .bz2 or .xz file or of stdin, 1 MiB at a time
    utf8_blocks     the same bytes, checked to be UTF-8 (or repaired) and cut between characters
    split_*         (piece, end) pairs: a document is the pieces up to and including the one with end = True
    cut_pieces      the same documents with every piece short enough for a tokenizer

A document may be larger than memory: it is then many pieces. Only a line of JSON has to fit in memory whole.
Empty documents are passed on as (b"", True); who counts documents skips them.
"""
import argparse
import bz2
import codecs
import errno
import gzip
import itertools
import json
import lzma
import os
import re
import sys
import time
import zlib

# Exit codes, those of train_llama.
UNEXPECTED, USAGE, BAD_DATA, NO_INPUT, IO_ERROR = 1, 2, 65, 66, 74

BLOCK_BYTES = 1 << 20       # bytes read at once
LONG_LINE_BYTES = 1 << 16   # a longer line is passed on in parts; a separator line is never that long
PEEK_BYTES = 4 << 20        # --document auto looks this far for a separator line
JSON_LINE_BYTES = 1 << 28   # a longer line of JSON is refused

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DOCUMENT_RULES = ("auto", "separator", "file", "line", "blank", "chunk")


class Failure(Exception):
    """Something the user can act on: one line and an exit code."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def run_main(main):
    """Calls main() and turns what goes wrong into one line on stderr and an exit code."""
    name = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except Failure as failure:
        print(f"{name}: {failure}", file=sys.stderr)
        sys.exit(failure.code)
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing was written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:     # the reader of our summary went away; the files are complete
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_count(text):
    """'100M', '1e9', '2.5B', '64KiB' as an integer: K M G B T are powers of 1000, KiB MiB GiB of 1024."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)(KiB|MiB|GiB|[KMGBT]?)", text.strip(), re.IGNORECASE)
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12,
             "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
    try:
        value = float(match.group(1)) * units[match.group(2).lower()]
    except (AttributeError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a count such as 5000, 100M, 1e9 or 64KiB") from None
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(value)


def add_input_options(parser):
    """The options about input that prepare.py and train_bpe.py have in common."""
    group = parser.add_argument_group("input")
    group.add_argument("inputs", nargs="*", metavar="INPUT",
                       help="text or .jsonl files, plain or .gz, .bz2, .xz; '-' is stdin")
    group.add_argument("--document", choices=DOCUMENT_RULES, default="auto",
                       help="what ends a document of plain text: a separator line; the end of the file; each line; "
                            "blank lines; about --document-bytes, at a line end (chunk). auto, the default: separator "
                            "for a file whose first 4 MiB hold a separator line, else chunk. The end of a file "
                            "always ends a document")
    group.add_argument("--separator", metavar="STR",
                       help="the whole line that separates documents (default: the character U+001E); implies "
                            "--document separator")
    group.add_argument("--document-bytes", type=parse_count, default=1 << 16, metavar="N",
                       help="length of the documents that chunk makes (default 64KiB)")
    group.add_argument("--format", choices=("auto", "text", "jsonl"), default="auto",
                       help="auto: jsonl for files named .jsonl (.jsonl.xz, ...), else text")
    group.add_argument("--field", default="text", help="the field of each JSON line that holds the text (default text)")
    group.add_argument("--errors", choices=("strict", "replace"), default="strict",
                       help="invalid UTF-8: stop, or replace it by U+FFFD. The byte tokenizer takes plain text as it "
                            "is and does not look")


def check_input_options(parser, options, paths):
    """Settles the options of add_input_options; stops at what cannot be read before any work is done."""
    if not paths:
        parser.error("no INPUT (files after --val belong to --val: put INPUT first)")
    if paths.count("-") > 1:
        parser.error("'-' (stdin) can be given only once")
    if options.separator is not None:
        if options.document not in ("auto", "separator"):
            parser.error(f"--separator and --document {options.document} exclude each other")
        options.document = "separator"
    separator = "\x1e" if options.separator is None else options.separator
    options.separator = separator.encode("utf-8", "surrogateescape")
    if not options.separator or b"\n" in options.separator or len(options.separator) > 1024:
        parser.error("--separator must be one line of 1 to 1024 bytes")
    if options.document_bytes > 1 << 28:
        parser.error("--document-bytes above 256MiB: use --document file, which has no limit")
    for path in paths:
        if path == "-":
            continue
        if path.endswith(".zst"):
            raise Failure(USAGE, f"{path}: zstd is not in Python's standard library; use: zstd -dc {path} | ... -")
        if os.path.isdir(path):
            raise Failure(NO_INPUT, f"{path} is a folder; name the files in it")
        if not os.access(path, os.R_OK):
            code = errno.EACCES if os.path.exists(path) else errno.ENOENT
            raise Failure(NO_INPUT, f"cannot read {path}: {os.strerror(code)}")


def input_name(path):
    return "stdin" if path == "-" else path


def total_bytes(paths):
    """Bytes on disk of all inputs, or None where one is a pipe."""
    if all(os.path.isfile(path) for path in paths):
        return sum(os.path.getsize(path) for path in paths)
    return None


class Progress:
    """Bytes read, speed and time left on stderr: a line in place on a terminal, else a line every ten seconds."""

    def __init__(self, total, stream=None):
        self.total = total
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.before = 0     # bytes of the files that are finished
        self.now = 0
        self.start = self.shown = time.monotonic()

    def update(self, bytes_of_file):
        self.now = self.before + bytes_of_file
        if time.monotonic() - self.shown >= (0.2 if self.terminal else 10):
            self.show()

    def file_done(self):
        self.before = self.now

    def show(self):
        self.shown = time.monotonic()
        rate = self.now / max(self.shown - self.start, 1e-9)
        line = f"read {self.now / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s"
        if self.total:
            left = int((self.total - self.now) / max(rate, 1))
            bar = "#" * (24 * self.now // self.total)
            line = (f"[{bar:<24}] {100 * self.now / self.total:3.0f} % of {self.total / 1e6:,.1f} MB, "
                    f"{rate / 1e6:.1f} MB/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal else "\n", file=self.stream,
              flush=True)

    def close(self):
        if self.terminal:
            print("\r\033[K", end="", file=self.stream, flush=True)


def read_blocks(path, progress):
    """The bytes of one input, decompressed, in blocks of at most BLOCK_BYTES."""
    opener = OPENERS.get(os.path.splitext(path)[1].lower())
    passed = 0
    try:
        raw = sys.stdin.buffer if path == "-" else open(path, "rb")
    except OSError as error:
        raise Failure(NO_INPUT, f"cannot read {path}: {error.strerror}") from None
    try:
        seekable = raw.seekable()
        stream = opener(raw) if opener else raw
        while True:
            block = stream.read(BLOCK_BYTES)
            if not block:
                break
            passed += len(block)
            progress.update(raw.tell() if seekable else passed)     # of a compressed file: compressed bytes
            yield block
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise Failure(BAD_DATA, f"{path} is damaged after {passed} bytes of text: {error}") from None
    except OSError as error:
        if error.errno is None:     # gzip and bz2 report damage this way
            raise Failure(BAD_DATA, f"{path} is damaged after {passed} bytes of text: {error}") from None
        raise Failure(IO_ERROR, f"cannot read {input_name(path)}: {error.strerror}") from None
    finally:
        progress.file_done()
        if path != "-":
            raw.close()


def utf8_blocks(blocks, name, errors):
    """blocks, each ending between two characters. Invalid UTF-8 stops with its offset, or becomes U+FFFD."""
    tail = b""      # the begun character at the end of the last block
    offset = 0      # of tail in the input
    for block in itertools.chain(blocks, [None]):
        data = tail if block is None else tail + block
        try:
            text, used = codecs.utf_8_decode(data, errors, block is None)
        except UnicodeDecodeError as error:
            raise Failure(BAD_DATA, f"{name}: byte {offset + error.start} is not UTF-8 (0x{data[error.start]:02x}); "
                                    "convert the file with iconv, or use --errors replace") from None
        if used:
            yield data[:used] if errors == "strict" else text.encode()
        tail = data[used:]
        offset += used


def whole_lines(blocks):
    """(block, starts_line) pairs: blocks that end at a line end, except inside a line of LONG_LINE_BYTES or more."""
    rest = b""
    starts_line = True
    for block in blocks:
        block = rest + block
        cut = block.rfind(b"\n") + 1
        if len(block) - cut >= LONG_LINE_BYTES:
            cut = len(block)
        rest = block[cut:]
        if cut:
            yield block[:cut], starts_line
            starts_line = block[cut - 1] == ord("\n")
    if rest:
        yield rest, starts_line


def separator_pattern(separator):
    return re.compile(rb"(?m)^" + re.escape(separator) + rb"(?:\r?\n|\r?\Z)")


def split_file(blocks):
    """The whole file is one document."""
    for block in blocks:
        yield block, False
    yield b"", True


def split_at_pattern(blocks, pattern, must_hold):
    """Lines that match pattern end a document and belong to none. must_hold: bytes without which none can match."""
    for block, starts_line in whole_lines(blocks):
        at = 0
        if must_hold in block:
            for match in pattern.finditer(block, 0 if starts_line else 1):
                yield block[at:match.start()], True
                at = match.end()
        yield block[at:], False
    yield b"", True


def split_lines(blocks):
    """Each line is a document, without its line end."""
    for block, _ in whole_lines(blocks):
        lines = block.split(b"\n")
        for line in lines[:-1]:
            yield line.removesuffix(b"\r"), True
        yield lines[-1], False
    yield b"", True


def split_chunks(documents, size):
    """Cuts each of documents into documents of at most size bytes: at a line end, else before a space, else between
    characters, and in the second half of the size."""
    buffer = b""
    for piece, end in documents:
        buffer += piece
        start = 0
        while len(buffer) - start > size:
            middle, limit = start + size // 2, start + size
            cut = buffer.rfind(b"\n", middle, limit) + 1
            if not cut:
                cut = max(buffer.rfind(b" ", middle + 1, limit), 0) or character_start(buffer, limit)
            yield buffer[start:cut], True
            start = cut
        buffer = buffer[start:]
        if end:
            yield buffer, True
            buffer = b""


def character_start(data, at):
    """The last position <= at that does not lie inside a UTF-8 character (or at, where data is not UTF-8)."""
    for back in range(min(4, at)):
        if data[at - back] & 0xC0 != 0x80:
            return at - back
    return at


def split_jsonl(blocks, name, field, errors):
    """One JSON object a line; its field `field` is a document."""
    number, rest = 0, []
    for block in itertools.chain(blocks, [b"\n"]):
        lines = block.split(b"\n")
        if len(lines) > 1:
            lines[0] = b"".join(rest) + lines[0]
            rest = []
        for line in lines[:-1]:
            number += 1
            if line.strip():
                yield json_text(line, f"{name}: line {number}", field, errors), True
        rest.append(lines[-1])
        if sum(map(len, rest)) > JSON_LINE_BYTES:
            raise Failure(BAD_DATA, f"{name}: line {number + 1} is longer than {JSON_LINE_BYTES >> 20} MiB")


def json_text(line, where, field, errors):
    """The text in one line of JSON, as UTF-8."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Failure(BAD_DATA, f"{where} is not JSON: {error}") from None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = "fields: " + ", ".join(record) if isinstance(record, dict) else "it is no object"
        raise Failure(BAD_DATA, f"{where} has no string field '{field}' ({found}); name it with --field")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:      # JSON can hold half of a surrogate pair, which is no character
        if errors == "strict":
            raise Failure(BAD_DATA, f"{where} holds an unpaired surrogate; use --errors replace") from None
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode("utf-8")


def read_documents(paths, options, progress, text_is_utf8, rules_used):
    """(piece, end) pairs of all paths. Counts in the dict rules_used how many files were split by which rule."""
    for path in paths:
        blocks = read_blocks(path, progress)
        name = input_name(path)
        stem, extension = os.path.splitext(path)
        jsonl = (stem if extension.lower() in OPENERS else path).lower().endswith(".jsonl")
        rule = options.document
        if options.format == "jsonl" or (options.format == "auto" and jsonl):
            rule = "jsonl"
        if text_is_utf8 or rule == "jsonl":
            blocks = utf8_blocks(blocks, name, options.errors)
        pattern = separator_pattern(options.separator)
        if rule == "auto":
            head, peeked = [], 0
            while peeked < PEEK_BYTES:
                block = next(blocks, b"")
                if not block:
                    break
                head.append(block)
                peeked += len(block)
            text = b"".join(head)
            rule = "separator" if options.separator in text and pattern.search(text) else "chunk"
            blocks = itertools.chain(head, blocks)
            del text
        rules_used[rule] = rules_used.get(rule, 0) + 1
        if rule == "jsonl":
            yield from split_jsonl(blocks, name, options.field, options.errors)
        elif rule == "file":
            yield from split_file(blocks)
        elif rule == "line":
            yield from split_lines(blocks)
        elif rule == "blank":
            yield from split_at_pattern(blocks, re.compile(rb"(?m)^(?:[ \t\r]*\n)+"), b"\n")
        elif rule == "separator":
            yield from split_at_pattern(blocks, pattern, options.separator)
        else:   # chunk; a separator line still ends a document, should one come late
            documents = split_at_pattern(blocks, pattern, options.separator)
            yield from split_chunks(documents, options.document_bytes)


def cut_pieces(documents, size):
    """The same documents as (piece, starts, end), each piece at most about size bytes and documents without text left
    out. Tokenizers of the GPT-2 kind never join text across a newline between two non-blank characters, so cutting
    there changes no token; a stretch without such a place is cut before a space, or at last between characters."""
    buffer, starts = b"", True
    for piece, end in documents:
        buffer = buffer + piece if buffer else piece
        while len(buffer) > size:
            cut = quiet_cut(buffer, size)
            yield buffer[:cut], starts, False
            buffer, starts = buffer[cut:], False
        if end:
            if buffer:
                yield buffer, starts, True
            buffer, starts = b"", True


def quiet_cut(data, size):
    """Where to cut data at or before size, so that a tokenizer does not notice; see cut_pieces."""
    blank = b" \t\n\r\f\v"
    for mark, width in ((b"\n", 1), (b" ", 0)):
        at = data.rfind(mark, size // 2, size)
        while at > 0:
            if data[at - 1] not in blank and data[at + 1] not in blank:
                return at + width
            at = data.rfind(mark, size // 2, at)
    return character_start(data, size)
