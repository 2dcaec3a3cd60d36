#!/usr/bin/env bash
# quickstart.sh: from a fresh clone to a small Llama, trained with FP4 linear layers, that writes English. Needs no GPU;
# where there is one, a larger model is trained on it.
#
#     ./scripts/quickstart.sh                         the King James Bible, byte by byte: a few minutes on 2 cores
#     TEXT=novel.txt ./scripts/quickstart.sh          your own text ("a.txt b.txt": several)
#     STEPS=3000 ./scripts/quickstart.sh              trains longer, going on from where it was
#     RECIPE=bf16 ./scripts/quickstart.sh             the same without FP4, to compare
#     DEVICE=cpu ./scripts/quickstart.sh              the small model on the CPU, although there is a GPU
#
# Five steps: install what is missing, build, text to token shards, train, sample. Stop it whenever you like (Ctrl-C saves a
# checkpoint): the same command goes on. What it makes lies in data/quickstart* and runs/quickstart*.
set -euo pipefail

# Threads that wait sleep instead of spinning: on cores that are shared with other work that is several times faster.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
STEPS=${STEPS:-600}
DEVICE=${DEVICE:-$(nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)}
RECIPE=${RECIPE:-quartet}
TEXT=${TEXT:-}

fail() { echo "quickstart: $1" >&2; exit "${2:-1}"; }
step() { echo; echo "== $1 of 5: $2"; begin=$SECONDS; }
took() { echo "   ($((SECONDS - begin)) s)"; }

# The texts, as absolute paths, because we go to the repository's folder now.
texts=()
if [ -n "$TEXT" ]; then
    [ -f "$TEXT" ] && names=("$TEXT") || read -r -a names <<<"$TEXT"
    for name in "${names[@]}"; do
        [ -f "$name" ] || fail "TEXT: there is no file '$name'" 66
        texts+=("$(realpath "$name")")
    done
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# data/quickstart and runs/quickstart; own text: -NAME; another recipe: runs/...-RECIPE; on the GPU: runs/...-gpu
name=quickstart
if [ -n "$TEXT" ]; then
    own=$(basename "${texts[0]}")
    name=quickstart-${own%%.*}
fi
data=data/$name
run=runs/$name
[ "$RECIPE" = quartet ] || run=$run-$RECIPE
[ "$DEVICE" = cpu ] || run=$run-gpu

step 1 "what is missing here?"
./scripts/install_deps.sh
took

step 2 "build"
make -s --no-print-directory found train_llama || {
    [ "$DEVICE" = cpu ] || fail "this did not build; DEVICE=cpu does without the GPU"
    echo "quickstart: this did not build. Trying without CUDA, which the quick start does not need"
    make -s --no-print-directory CUDA=0 train_llama
}
took

step 3 "text to token shards: $data"
mkdir -p "$data"
if [ -z "$TEXT" ]; then
    if [ ! -s $data/kjv.txt ]; then
        command -v bible >/dev/null || fail "the King James text is missing (Debian and Ubuntu: apt-get install bible-kjv). \
TEXT=file trains on a text of yours" 66
        # one verse a line; the word in front says which: Ge1:1 In the beginning God created the heaven and the earth.
        bible -f -l1000 gen1:1-rev22:21 </dev/null | sed 's/^[^ ]* //' >$data/kjv.txt.tmp
        mv $data/kjv.txt.tmp $data/kjv.txt
    fi
    texts=("$data/kjv.txt")
fi
# info.json is written last: where it is, the shards are whole
if [ -e "$data/info.json" ]; then
    [ "$(cat "${texts[@]}" | cksum)" = "$(cat "$data/text.cksum")" ] || fail "the shards in $data were made from another text. \
Move $data and $run away, or give the text another name" 65
    echo "here already"
else
    cat "${texts[@]}" | cksum >"$data/text.cksum"
    # bytes are the tokens; every 20th piece of 16 KiB is kept for validation
    python3 data/prepare.py --tokenizer byte --val-fraction 0.05 --document-bytes 16KiB --out "$data" --overwrite "${texts[@]}"
fi
took

step 4 "train $STEPS steps: $run"
code=0
if [ "$DEVICE" = cuda ]; then
    model=(--model 30m --vocab-size 288 --batch-tokens 32768)  # bytes and a few marks
else
    model=(--model tiny)
fi
train=(./train_llama "${model[@]}" --device "$DEVICE" --recipe "$RECIPE" --train-data "$data" --out "$run" --steps "$STEPS"
    --save-every 200)
echo "${train[*]}"
"${train[@]}" || code=$?
[ $code -eq 75 ] && fail "stopped and saved. The same command goes on from here" 75
[ $code -eq 0 ] || fail "training ended with exit code $code; the line above says why" $code
took

step 5 "what has it learned?"
# the last validation in the run's record; a token is a byte here
awk -F'"loss":' '/"type":"val"/ { loss = $2 + 0; found = 1 }
    END { if (found) printf "validation loss %.3f nats a byte, %.2f bits a byte, on text it has not seen\n", loss, loss / log(2)
          else print "no validation: the text is too short to keep a part of it back" }' "$run/metrics.jsonl"
prompt="In the beginning"
[ -z "$TEXT" ] || prompt=$(head -c 200 "${texts[0]}" | tr -s '[:space:]' ' ' | cut -d' ' -f1-3)
sample=(./train_llama --resume "$run" --prompt "${prompt:-The}")
"${sample[@]}"
took

text_option=${TEXT:+"TEXT='$TEXT' "}
[ "$RECIPE" = quartet ] || text_option="${text_option}RECIPE=$RECIPE "
cat <<END

Where to go from here:
  train longer           ${text_option}STEPS=$((STEPS * 3)) ./scripts/quickstart.sh
  more samples           ./train_llama --resume $run --prompt "${prompt:-The}" --temperature 0.7 --seed 2
  compare without FP4    ${TEXT:+"TEXT='$TEXT' "}RECIPE=bf16 ./scripts/quickstart.sh
  your own text          TEXT=novel.txt ./scripts/quickstart.sh
  watch                  $run/metrics.jsonl (one JSON object a step)
  other tools            $run/step_* are Hugging Face Llama folders
  larger models, own data, the code: README.md, data/README.md, ./train_llama --help
END
