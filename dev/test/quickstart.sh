#!/usr/bin/env bash
# quickstart.sh: scripts/quickstart.sh in short form, in a copy of the tree, so that your data/ and runs/ are not touched: first
# time, again, longer, interrupted at each stage, own text.
source "$(dirname "$0")/lib.sh"
mkdir tree
(cd "$ROOT" && tar cf - Makefile train_llama.cu test_llama.cu llmc scripts data/*.py) | tar xf - -C tree
# what make has built already is not built again
[ ! -d "$ROOT/build" ] || cp -a "$ROOT/build" tree/
export STEPS=12 DEVICE=cpu
quick() { tree/scripts/quickstart.sh >quick.txt 2>quick.err; got=$?; }      # from another folder
says() { grep -q "$1" quick.txt; }
finished() {    # finished NAME RUN STEPS: exit 0, validation loss, a sample, a whole checkpoint of that step
    if [ $got -ne 0 ]; then fail "$1" "exit code $got: $(tail -n 2 quick.err | xargs -0)"
    elif ! says '^validation loss [0-9.]* nats a byte'; then fail "$1" "no validation loss"
    elif ! says '^--- sample after'; then fail "$1" "no sample"
    elif [ "$(compare newest "tree/runs/$2")" != "$3" ]; then fail "$1" "newest checkpoint $(compare newest "tree/runs/$2"), not $3"
    elif ! compare whole "tree/runs/$2" >check.txt; then fail "$1" "$(cat check.txt)"
    elif ! compare steps "tree/runs/$2" >check.txt; then fail "$1" "$(cat check.txt)"
    else ok "$1"; fi
}

name=quickstart
if ! command -v bible >/dev/null; then
    quick
    check "without the King James text: says what to do" test $got -eq 66 -a -n "$(grep 'TEXT=file' quick.err)"
    skip "King James" "package bible-kjv is not installed; own text instead"
    make_text 200000 3 >kjv.txt
    export TEXT=$WORK/kjv.txt
    name=quickstart-kjv
fi

# stopped inside step 3 (text to shards) and step 4 (training); each start goes on
setsid tree/scripts/quickstart.sh >quick.txt 2>quick.err &
pid=$!
background+=($pid)
for _ in $(seq 3000); do says '^== 3' && break; sleep 0.01; done
kill -9 -- -$pid; wait $pid 2>/dev/null
check "killed while it made shards" test ! -e tree/runs/$name
setsid tree/scripts/quickstart.sh >quick.txt 2>quick.err &
pid=$!
background+=($pid)
for _ in $(seq 6000); do says '^step      2/' && break; sleep 0.01; done
for process in /proc/[0-9]*; do        # only the trainer, not the script around it
    [ "$(readlink "$process/exe")" != "$WORK/tree/train_llama" ] || kill -TERM "${process#/proc/}"
done
wait $pid; got=$?
background=()
check "stopped in training: exit 75, says that it goes on" test $got -eq 75 -a -n "$(grep 'The same command goes on' quick.err)"
quick
finished "the same command finishes it" $name 12
check "from where it was" says '^resume .*step [1-9][0-9]* of 12'
quick
finished "again" $name 12
check "says that it is done" says '^done '
check "does not make the shards again" says '^here already'
STEPS=15 quick
finished "STEPS=15 goes on" $name 15
RECIPE=bf16 STEPS=3 quick
finished "RECIPE=bf16 has a folder of its own" $name-bf16 3

make_text 60000 5 >novel.part.txt; make_text 60000 6 >"second.txt"
export STEPS=3
TEXT="novel.part.txt second.txt" quick
finished "own text, two files" quickstart-novel 3
check "120,000 bytes and the separators" python3 -c "import json
splits = json.load(open('tree/data/quickstart-novel/info.json'))['splits']
assert sum(s['text_bytes'] for s in splits.values()) == 120000, splits"
TEXT=nope.txt quick
check "own text, missing" test $got -eq 66 -a -n "$(grep "no file 'nope.txt'" quick.err)"
make_text 70000 8 >novel.part.txt
TEXT="novel.part.txt" quick
check "another text under the same name is refused" test $got -eq 65 -a -n "$(grep 'another text' quick.err)"
make_text 5000 9 >short.txt
TEXT="short.txt" quick
check "a text too short for validation trains" test $got -eq 0 -a -n "$(grep '^no validation' quick.txt)"
finish
