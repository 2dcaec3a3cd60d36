#!/usr/bin/env bash
# prepare.sh: tests data/prepare.py (and, where the Python package tokenizers is installed, data/train_bpe.py).
#
#     dev/test/prepare.sh                               needs only python3
#     PYTHON=/path/to/venv/bin/python dev/test/prepare.sh   tests the BPE path too
#
# The checker below reads shards with its own few lines of Python and shares no code with what it tests. Each kind of
# comparison is first shown a planted error and must report it.
set -u
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-python3}
export PYTHONDONTWRITEBYTECODE=1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$WORK" || exit 1
passed=0 failed=0 skipped=0

ok()   { echo "ok $1"; passed=$((passed + 1)); }
fail() { echo "FAIL $1: $2"; failed=$((failed + 1)); }
skip() { echo "skip $1: $2"; skipped=$((skipped + 1)); }

# The program under test. -S hides installed packages: whatever works here needs the standard library only.
prepare() { "$PYTHON" -S "$ROOT/data/prepare.py" "$@"; }
byte()    { prepare --tokenizer byte "$@"; }
checker() { "$PYTHON" checker.py "$@"; }

# check NAME COMMAND...: the command must succeed.  check_fails: it must fail (a planted error must be seen).
check() {
    local name=$1; shift
    if "$@" >out.txt 2>&1; then ok "$name"; else fail "$name" "$(tail -n 1 out.txt)"; fi
}
check_fails() {
    local name=$1; shift
    if "$@" >out.txt 2>&1; then fail "$name" "the planted error was not seen"; else ok "$name"; fi
}
# check_exit NAME CODE WORDS COMMAND...: this exit code, one line on stderr that holds WORDS, no traceback.
check_exit() {
    local name=$1 code=$2 words=$3; shift 3
    "$@" >out.txt 2>err.txt; local got=$?
    if [ $got -ne "$code" ]; then fail "$name" "exit code $got, not $code: $(tail -n 1 err.txt)"
    elif ! grep -qF -- "$words" err.txt; then fail "$name" "no '$words' in: $(tail -n 1 err.txt)"
    elif grep -q '^Traceback' err.txt; then fail "$name" "a traceback"
    elif [ "$(grep -cv '^usage\|^  ' err.txt)" -ne 1 ]; then fail "$name" "more than one line on stderr"
    else ok "$name"; fi
}
# no shard in these folders, whole or half
check_empty() {
    local name=$1 found; shift
    found=$(find "$@" -name '*.bin*' 2>/dev/null)
    if [ -z "$found" ]; then ok "$name"; else fail "$name" "$found"; fi
}

cat >checker.py <<'PYTHON'
import glob, json, os, random, struct, sys

def read_shards(folder, split, separator=256):
    """Tokens and per-shard counts of one split; every property of the format is asserted."""
    tokens, counts = [], []
    for number, path in enumerate(sorted(glob.glob(f"{folder}/{split}_*.bin"))):
        assert os.path.basename(path) == f"{split}_{number:06}.bin", path
        data = open(path, "rb").read()
        magic, version, count = struct.unpack("<3i", data[:12])
        assert (magic, version) in ((20240520, 1), (20240801, 7)), f"{path}: magic {magic} version {version}"
        width = 2 if version == 1 else 4
        assert len(data) == 1024 + width * count, f"{path}: {len(data)} bytes for {count} tokens"
        assert not any(data[12:1024]), f"{path}: header is not zero after the count"
        tokens += struct.unpack(f"<{count}{'HI'[width > 2]}", data[1024:])
        counts.append(count)
    assert not tokens or tokens[0] == separator, "the first token is no separator"
    return tokens, counts

def documents(tokens, separator=256):
    """Token lists between separators."""
    found = []
    for token in tokens:
        if token == separator:
            found.append([])
        else:
            found[-1].append(token)
    return found

def byte_documents(folder, split):
    return [bytes(document) for document in documents(read_shards(folder, split)[0])]

def expect_same(got, wanted):
    got, wanted = sorted(got), sorted(wanted)
    for a, b in zip(got, wanted):
        assert a == b, f"document differs: {a[:40]!r} and {b[:40]!r}"
    assert len(got) == len(wanted), f"{len(got)} documents, not {len(wanted)}"

def make(kind, path):
    """Known inputs; documents are all different."""
    random.seed(1)
    if kind == "binary":        # every byte value, but no line that would separate
        made = [b"%d:" % i + bytes(random.randrange(256) for _ in range(random.randrange(1, 300))) + b"\n"
                for i in range(300)]
        made = [document.replace(b"\n\x1e", b"\nx") for document in made]
        open(path, "wb").write(b"\x1e\n".join(made))
    else:                       # words, with quotes, blank lines and non-English letters
        made = [f"{i} " + "".join(random.choice(["the ", "Zeit ", "\u6c34", "\"q\" ", "a\nb", "\n\n", "\u00e9t\u00e9 "])
                                  for _ in range(random.randrange(1, 99))) + "." for i in range(200)]
        with open(path, "w", encoding="utf-8", newline="") as file:
            for document in made:
                file.write(json.dumps({"id": 1, "text": document}) + "\n")
    json.dump([d.decode("latin-1") if kind == "binary" else d for d in made], open(path + ".list", "w"))

def wanted(path, coding):
    return [document.encode(coding) for document in json.load(open(path + ".list"))]

def round_trip(folder, path, coding):
    expect_same(byte_documents(folder, "train") + byte_documents(folder, "val"), wanted(path, coding))
    info = json.load(open(f"{folder}/info.json"))
    for split in ("train", "val"):
        tokens, counts = read_shards(folder, split)
        said = info["splits"][split]
        assert (said["tokens"], said["documents"]) == (len(tokens), tokens.count(256)), said
        assert list(said["shards"].values()) == counts and said["text_bytes"] == len(tokens) - tokens.count(256), said

def disjoint(folder, low, high):
    """No document in both splits; validation has between low and high documents."""
    train, val = set(byte_documents(folder, "train")), set(byte_documents(folder, "val"))
    assert not train & val, f"{len(train & val)} documents in both splits"
    assert int(low) <= len(val) <= int(high), f"{len(val)} validation documents"

def sizes(folder, size):
    """Every train shard but the last has exactly `size` tokens."""
    counts = read_shards(folder, "train")[1]
    assert len(counts) > 2 and set(counts[:-1]) == {int(size)} and counts[-1] <= int(size), counts

def lengths(folder, *wanted_lengths):
    got = sorted(len(document) for split in ("train", "val") for document in byte_documents(folder, split))
    assert got == sorted(map(int, wanted_lengths)), f"document lengths {got}"

def split_is(folder, train, val):
    got = len(byte_documents(folder, "train")), len(byte_documents(folder, "val"))
    assert got == (int(train), int(val)), f"{got} documents in train, val"

def corrupt(path, offset):
    with open(path, "r+b") as file:
        file.seek(int(offset))
        byte = file.read(1)
        file.seek(int(offset))
        file.write(bytes([byte[0] ^ 1]))

def writer(data_folder):
    """The 32-bit twin and the 64-bit count, through the writer itself."""
    sys.path.insert(0, data_folder)
    import prepare
    for vocab_size, code, first in ((65536, "H", (20240520, 1, 3)), (65537, "I", (20240801, 7, 3))):
        shard = prepare.ShardWriter(".", "val", vocab_size, 10)
        shard.write(struct.pack("<3" + code, 5, 65535, vocab_size - 1))
        assert not os.path.exists("val_000000.bin"), "a name before publish()"
        shard.close()
        shard.publish()
        tokens, counts = read_shards(".", "val", separator=5)
        assert tokens == [5, 65535, vocab_size - 1] and counts == [3], tokens
        assert struct.unpack("<3i", open("val_000000.bin", "rb").read(12)) == first
        os.remove("val_000000.bin")
    for count, words in ((2**31 - 1, (2**31 - 1, 0, 0)), (2**31, (-1, 2**31, 0)), (3 * 10**9, (-1, 3 * 10**9, 0)),
                         (2**34 + 7, (-1, 7, 4))):
        header = prepare.shard_header(count, 2)
        assert len(header) == 1024 and struct.unpack("<iII", header[8:20]) == words, (count, header[8:20])

def flood(megabytes, limit_megabytes, limit_seconds, *command):
    """Feeds text through a pipe; peak memory and time of the command must stay below the limits."""
    import resource, subprocess, time
    block = b"".join(b"%d some text that goes on for a while, as text does.\n" % i for i in range(20000))
    start = time.monotonic()
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    total = 0
    while total < int(megabytes) * 10**6:
        total += child.stdin.write(block)
    child.stdin.close()
    assert child.wait() == 0, f"exit code {child.returncode}"
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{total / 1e6:.0f} MB in {seconds:.1f} s, {total / 1e6 / seconds:.0f} MB/s, peak memory {peak:.0f} MB")
    assert peak < float(limit_megabytes), f"peak memory {peak:.0f} MB"
    assert seconds < float(limit_seconds), f"{seconds:.1f} s"

def kill(signal_number, wait_for, *command):
    """Starts the command with an endless stdin, signals it once the file wait_for is there; prints its exit code."""
    import subprocess, time
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while child.poll() is None and not os.path.exists(wait_for):
        child.stdin.write(b"a line\n" * 10000)
    child.send_signal(int(signal_number))
    try:
        child.stdin.close()
    except BrokenPipeError:
        pass
    print(child.wait())

def hugging_face_bytes(path):
    """The byte tokenizer.json gives each byte its value, both ways."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(path)
    codes = [*range(256), 0x6C34, 0x1F600, *b" \n\n  x", *range(0x80, 0x10FFFF, 31)]
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == list(text.encode()), "ids are not the bytes"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text, "decoding differs"
    in_text = set(ids)
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(257)) and tokenizer.token_to_id("<|endoftext|>") == 256
    # bytes that no UTF-8 text contains (c0, c1, f5 to ff): against the byte-level alphabet, as GPT-2 has it
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = dict(zip(plain + [b for b in range(256) if b not in plain], plain + list(range(256, 324))))
    assert all(vocabulary[chr(table[byte])] == byte for byte in range(256)), "a byte has another id"
    assert len(in_text) >= 243, f"only {len(in_text)} byte values in the text"

def bpe_round_trip(folder, path, tokenizer_path, separator):
    """Shards against the library's own encoding of each whole document."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(tokenizer_path)
    tokenizer.encode_special_tokens = True
    got = []
    for split in ("train", "val"):
        got += documents(read_shards(folder, split, int(separator))[0], int(separator))
    texts = json.load(open(path + ".list"))
    expect_same(got, [tokenizer.encode(text, add_special_tokens=False).ids for text in texts])
    expect_same([tokenizer.decode(ids).encode() for ids in got], [text.encode() for text in texts])

globals()[sys.argv[1]](*sys.argv[2:])
PYTHON

# ---------------------------------------------------------------------------------------------------------------------
# documents and splits

check "python 3.9 can read the programs" "$PYTHON" -c "import ast, sys
for path in sys.argv[1:]: ast.parse(open(path).read(), feature_version=(3, 9))" "$ROOT"/data/*.py
checker make binary binary.txt
checker make words words.jsonl
byte --out a --val-fraction 0.1 binary.txt >/dev/null
check "byte round trip" checker round_trip a binary.txt latin-1
cp -r a planted; checker corrupt planted/train_000000.bin 1030
check_fails "planted: one wrong token" checker round_trip planted binary.txt latin-1
cp a/train_000000.bin planted/; checker corrupt planted/train_000000.bin 8
check_fails "planted: count and size disagree" checker round_trip planted binary.txt latin-1
check "split by document" checker disjoint a 10 60
cp a/val_000000.bin planted/train_000000.bin
check_fails "planted: a document in both splits" checker disjoint planted 10 60
byte --out a2 --val-fraction 0.1 binary.txt >/dev/null; byte --out a3 --val-fraction 0.1 --seed 1 binary.txt >/dev/null
check "same seed, same files" cmp a/val_000000.bin a2/val_000000.bin
check_fails "another seed, another split" cmp a/val_000000.bin a3/val_000000.bin
byte --out jsonl words.jsonl >/dev/null
check "jsonl" checker round_trip jsonl words.jsonl utf-8
sed 's/"text"/"body"/' words.jsonl | byte --out jsonl2 --format jsonl --field body - >/dev/null
check "jsonl from stdin, another field" cmp jsonl/train_000000.bin jsonl2/train_000000.bin
byte --out val_files --val binary.txt --shard-tokens 1e6 words.jsonl >/dev/null
check "--val takes other files" checker split_is val_files 200 300

for how in gzip:gz bzip2:bz2 xz:xz; do
    "$PYTHON" -c "import gzip, bz2, lzma, sys
sys.stdout.buffer.write({'gz': gzip, 'bz2': bz2, 'xz': lzma}[sys.argv[1]].compress(open('binary.txt', 'rb').read()))" \
        "${how#*:}" >"binary.txt.${how#*:}"
    byte --out "c_${how#*:}" --val-fraction 0.1 "binary.txt.${how#*:}" >/dev/null
    check "${how%:*} input" cmp a/train_000000.bin "c_${how#*:}/train_000000.bin"
done

printf 'one\ntwo two\n\n  \nthree\r\n\nfour' >rules.txt
rule() {        # rule NAME LENGTHS...: the lengths of the documents that --document NAME finds
    byte --out "r_$1" --document "$1" rules.txt >/dev/null
    check "--document $1" checker lengths "r_$1" "${@:2}"
}
rule line 3 7 2 5 4
rule blank 12 7 4
rule file 28
rule chunk 28
rule auto 28
check_fails "planted: other lengths" checker lengths r_line 3 7 2 5 5
byte --out r_own --separator two rules.txt >/dev/null
check "--separator is a whole line" checker lengths r_own 28
printf 'a\n<doc>\nbb\n<doc>\r\n<doc>\nccc\n<doc>' | byte --out r_own2 --separator '<doc>' - >/dev/null
check "--separator, CRLF, empty documents, last line" checker lengths r_own2 2 3 4
head -c 200000 /dev/zero | tr '\0' x | byte --out longline - >/dev/null
check "a line without end is cut" checker lengths longline 65536 65536 65536 3392
{ head -c 5000000 /dev/zero | tr '\0' x; printf '\n\036\nend'; } | byte --out late --document separator - >/dev/null
check "a separator line after a line of 5 MB" checker lengths late 5000001 3
{ head -c 1048576 /dev/zero | tr '\0' x; printf '\036\nend'; } | byte --out inside --document separator - >/dev/null
check "a separator inside a line separates nothing" checker lengths inside 1048581
printf 'a\n\036\nb\n' | byte --out two --val-fraction 0.001 - >/dev/null
check "two documents: one in each split" checker split_is two 1 1
printf 'a\n' | byte --out one --val-fraction 0.9 - >one.txt
check "one document: training" checker split_is one 1 0
check "and a note says so" grep -q 'no validation split' one.txt

# ---------------------------------------------------------------------------------------------------------------------
# shards

byte --out shards --val-fraction 0.1 --shard-tokens 1000 binary.txt >/dev/null
check "several shards" checker round_trip shards binary.txt latin-1
check "each of --shard-tokens" checker sizes shards 1000
check_fails "planted: another size" checker sizes shards 999
before=$(cat shards/* | cksum)
check_exit "an earlier run is not overwritten" 2 "already holds" byte --out shards binary.txt
check "and is untouched" test "$before" = "$(cat shards/* | cksum)"
check_exit "--overwrite with bad input" 66 "nope.txt" byte --out shards --overwrite nope.txt
check "leaves it untouched" test "$before" = "$(cat shards/* | cksum)"
check "--overwrite" byte --out shards --overwrite --val-fraction 0.1 binary.txt
check "leaves no old shard" checker round_trip shards binary.txt latin-1
mkdir other; echo '{}' >other/tokenizer.json
check_exit "another tokenizer.json is kept" 2 "another tokenizer" byte --out other binary.txt
mkdir writer
check "32-bit tokens, 64-bit count" sh -c "cd writer && '$PYTHON' ../checker.py writer '$ROOT/data'"

# ---------------------------------------------------------------------------------------------------------------------
# what goes wrong

check_exit "missing file" 66 "nope.txt: No such file" byte --out e nope.txt
check_exit "folder as input" 66 "is a folder" byte --out e .
check_exit "missing tokenizer" 66 "cannot read tokenizer nope.json" prepare --tokenizer nope.json --out e binary.txt
check_exit "no input" 2 "no INPUT" byte --out e
check_exit "unknown option" 2 "--shard-token" byte --out e --shard-tokenz 5 binary.txt
check_exit "malformed count" 2 "'12Q' is not a count" byte --out e --shard-tokens 12Q binary.txt
check_exit "fraction out of range" 2 "not in [0, 1)" byte --out e --val-fraction 1 binary.txt
: >empty.txt
check_exit "empty input" 65 "no text" byte --out e empty.txt
head -c 9000 binary.txt.xz >cut.txt.xz
check_exit "damaged xz" 65 "cut.txt.xz is damaged" byte --out e cut.txt.xz
{ head -c 5000 binary.txt.gz; echo nonsense; } >cut.txt.gz
check_exit "damaged gz" 65 "cut.txt.gz is damaged" byte --out e cut.txt.gz
printf '{"text": "a"}\n{"text": 5}\n' >bad.jsonl
check_exit "jsonl without the field" 65 "bad.jsonl: line 2 has no string field 'text'" byte --out e bad.jsonl
printf '{"text": "a"}\n\n{"text": \n' >bad2.jsonl
check_exit "not JSON" 65 "bad2.jsonl: line 3 is not JSON" byte --out e bad2.jsonl
{ head -c 2000000 /dev/zero | tr '\0' ' '; printf '\303\251\377'; } >bad3.jsonl
check_exit "invalid UTF-8, with its offset" 65 "bad3.jsonl: byte 2000002 is not UTF-8 (0xff)" byte --out e bad3.jsonl
check_exit "out is a file" 74 "cannot create folder empty.txt" byte --out empty.txt binary.txt
limited() { (ulimit -f 20; byte "$@"); }      # no file above 20 KiB, the nearest thing to a full disk
check_exit "disk full" 74 "cannot write full/train_000000.bin" limited --out full binary.txt
check_empty "a failed run leaves no shard" e full
mkdir stub; echo 'raise ImportError("no")' >stub/tokenizers.py; echo '{}' >stub/t.json
check_exit "tokenizers not installed" 1 "pip install tokenizers" env PYTHONPATH=stub "$PYTHON" "$ROOT/data/prepare.py" \
    --tokenizer stub/t.json --out e binary.txt

run=("$PYTHON" -S "$ROOT/data/prepare.py" --tokenizer byte --out killed --shard-tokens 100000 -)
check "SIGTERM ends it" test "$(checker kill 15 killed/train_000001.bin.tmp "${run[@]}")" = 130
check_empty "and leaves nothing" killed
check "SIGKILL ends it" test "$(checker kill 9 killed/train_000001.bin.tmp "${run[@]}")" = -9
check "and leaves .tmp files" test -e killed/train_000001.bin.tmp
check_fails "but no shard" ls killed/train_000000.bin
byte --out killed --val-fraction 0.1 binary.txt >/dev/null
check "the next run is whole" checker round_trip killed binary.txt latin-1
check_fails "and clears the .tmp files" ls killed/train_000001.bin.tmp

# ---------------------------------------------------------------------------------------------------------------------
# memory and speed: 200 MB through a pipe

flood=("$PYTHON" -S "$ROOT/data/prepare.py" --tokenizer byte --out flood --overwrite -)
check_fails "planted: a memory limit of 5 MB" checker flood 1 5 20 "${flood[@]}"
check "200 MB from stdin in bounded memory" checker flood 200 100 20 "${flood[@]}"
head -n 1 out.txt
check "200 MB as one document" checker flood 200 100 20 "${flood[@]}" --document file
head -n 1 out.txt
rm -rf flood

# ---------------------------------------------------------------------------------------------------------------------
# BPE

if "$PYTHON" -c 'import tokenizers' 2>/dev/null; then
    bpe() { "$PYTHON" "$ROOT/data/prepare.py" --tokenizer tok.json "$@"; }
    train_bpe() { "$PYTHON" "$ROOT/data/train_bpe.py" "$@"; }
    check "tokenizers loads the byte tokenizer.json" checker hugging_face_bytes a/tokenizer.json
    sed 's/": 65,/": 66,/; t; s/": 66,/": 65,/' a/tokenizer.json >swapped.json
    check_fails "planted: two bytes swapped" checker hugging_face_bytes swapped.json
    check "train_bpe.py" train_bpe --vocab-size 400 --out tok.json words.jsonl
    check "token 0 is the separator" "$PYTHON" -c "from tokenizers import Tokenizer
assert Tokenizer.from_file('tok.json').token_to_id('<|endoftext|>') == 0"
    check_exit "train_bpe.py keeps an old file" 2 "tok.json exists" train_bpe --out tok.json words.jsonl
    check_exit "train_bpe.py, missing file" 66 "nope.txt" train_bpe --out t2.json nope.txt
    check_exit "train_bpe.py, bad input midway" 65 "bad.jsonl: line 2" train_bpe --out t2.json words.jsonl bad.jsonl
    bpe --out bpe --val-fraction 0.1 words.jsonl >/dev/null
    check "BPE round trip" checker bpe_round_trip bpe words.jsonl tok.json 0
    checker corrupt bpe/train_000000.bin 1030
    check_fails "planted: one wrong BPE token" checker bpe_round_trip bpe words.jsonl tok.json 0
    "$PYTHON" -c "import json
text = 'A text that names <|endoftext|> is text.\n'
text += ''.join(f'Zeit {i}: \u00e9t\u00e9,\n  the {i * i}.\n' for i in range(90000))
assert len(text.encode()) > 2 << 20
open('big.txt', 'w').write(text); json.dump([text], open('big.txt.list', 'w'))"
    bpe --out big --document file big.txt >/dev/null
    check "a document of several pieces, naming a special token" checker bpe_round_trip big big.txt tok.json 0
    check_exit "BPE, invalid UTF-8" 65 "is not UTF-8" bpe --out e binary.txt
    check "BPE, --errors replace" bpe --out replaced --errors replace binary.txt
    check_exit "--bos-token unknown" 2 "no token [X]" bpe --out e --bos-token '[X]' words.jsonl
    check_exit "not a tokenizer.json" 65 "other/tokenizer.json is not a tokenizer.json" \
        bpe --tokenizer other/tokenizer.json --out e words.jsonl
    check_empty "failed BPE runs leave no shard" e
else
    skip "BPE" "$PYTHON has no module tokenizers"
fi
if "$PYTHON" -c 'import transformers' 2>/dev/null; then
    check "transformers loads the byte tokenizer.json" "$PYTHON" -c "from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast(tokenizer_file='a/tokenizer.json', eos_token='<|endoftext|>')
assert tokenizer.encode('h\u00e9 \n\n<|endoftext|>') == list('h\u00e9 \n\n'.encode()) + [256] and len(tokenizer) == 257
assert tokenizer.decode(tokenizer.encode('h\u00e9  x')) == 'h\u00e9  x'"
else
    skip "transformers" "$PYTHON has no module transformers"
fi

if [ $skipped -eq 0 ]; then echo "$passed passed, $failed failed"
else echo "$passed passed, $failed failed, $skipped skipped"; fi
[ $failed -eq 0 ]
