#!/usr/bin/env bash
# check.sh: what every commit passes, in about a minute: CPU build without warnings, fast tests, limits of size.
#
#     dev/check.sh        the last line is `ok` or `FAILED: N`; `make test` is the whole
set -u
cd "$(dirname "$0")/.." || exit 1
export OMP_WAIT_POLICY=passive
problems=0
# problem LINES: the first ten are shown
problem() {
    local lines; lines=$(wc -l <<<"$1")
    problems=$((problems + 1))
    head -n 10 <<<"$1" | sed 's/^/  /'
    [ "$lines" -le 10 ] || echo "  ... and $((lines - 10)) more"
}
title() { printf '%-12s %3d s  %s\n' "$1" $((SECONDS - begin)) "$2"; begin=$SECONDS; }
begin=$SECONDS

# in a folder of its own, with warnings as errors; what you built otherwise stays
log=$(mktemp)
trap 'rm -f "$log"' EXIT
make -s --no-print-directory CUDA=0 BUILD=build/check CXX="${CXX:-g++} -Werror" build/check/{train,test}_llama >"$log" 2>&1 ||
    problem "$(grep -E 'error|warning' "$log" | head -n 20)"
title build "CPU, -Wall -Wextra -Werror"

# every section of test_llama that is not named here as slow
slow=" "
if [ -x build/check/test_llama ]; then
    sections=$(build/check/test_llama list | awk -v slow="$slow" '!index(slow, " " $1 " ") { print $1 }')
    # shellcheck disable=SC2086
    timeout 300 build/check/test_llama $sections >"$log" 2>&1 || problem "$(grep -A 2 FAIL "$log" | head -n 20; tail -n 1 "$log")"
    title tests "$(tail -n 1 "$log")"
fi

files=$(git ls-files --cached --others --exclude-standard -- '*.h' '*.cu' '*.cuh' '*.py' '*.sh')
code=$(grep -E '\.(h|cu|cuh)$' <<<"$files")
found=$(for file in $files; do
    lines=$(wc -l <"$file")
    [ "$lines" -le 600 ] || echo "$file has $lines lines, more than 600"
done)
[ -z "$found" ] || problem "$found"
# a function begins and ends in column 1
found=$(awk '/^[a-zA-Z[].*\{$/ && !/^(typedef|enum|struct|union|namespace|extern)/ { begin = FNR; head = $0 }
    /^}/ && begin { n = FNR - begin + 1; if (n > 80) print FILENAME ":" begin ": " n " lines, more than 80: " head; begin = 0 }' $code)
[ -z "$found" ] || problem "$found"
found=$(awk 'length > 120 { print FILENAME ":" FNR ": " length " columns, more than 120" }' $(grep '^llmc/' <<<"$code"))
[ -z "$found" ] || problem "$found"
title size "files of 600 lines, functions of 80, lines of llmc of 120 columns at most"

found=$(git diff --check HEAD; grep -nE '[[:space:]]+$' $files)
[ -z "$found" ] || problem "$found"
for file in $(grep '\.sh$' <<<"$files") .ci/run; do bash -n "$file" || problem "$file does not parse"; done
title text "no space at line ends, shell scripts parse"

if [ $problems -eq 0 ]; then echo ok; else echo "FAILED: $problems"; fi
[ $problems -eq 0 ]
