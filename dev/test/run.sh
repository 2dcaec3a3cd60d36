#!/usr/bin/env bash
# run.sh: every test that runs on this machine; `make test` calls it.
#
#     dev/test/run.sh                 or with arguments for make: CUDA=0 SAN=1 PRECISION=FP32 ARCH=x86-64-v3
#     ONLY="resume kill" dev/test/run.sh     some of the shell tests, and nothing else
#
# Builds; runs test_llama in this precision and in FP32; runs dev/test/*.sh. Each part ends with its own line `N passed, N failed`;
# a part that does not (it crashed, hung or did not build) counts as one failure, and the end of what it said is shown. The last
# line adds all up. SAN=1: under AddressSanitizer and UBSan, any report of which fails the part.
set -u
cd "$(dirname "$0")/../.." || exit 1
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap 'exit 130' INT TERM

passed=0 failed=0 skipped=0
# part NAME COMMAND...: runs it and counts
part() {
    local name=$1 begin=$SECONDS log=$logs/part line code; shift
    timeout --kill-after=10 1500 "$@" >"$log" 2>&1 </dev/null; code=$?
    line=$(tail -n 1 "$log")
    if [[ ! $line =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed(,\ ([0-9]+)\ skipped)?$ ]]; then
        failed=$((failed + 1))
        line="died with exit code $code, without a last line of results"
        tail -n 30 "$log" | sed 's/^/    /'
    else
        passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2])) skipped=$((skipped + ${BASH_REMATCH[4]:-0}))
        if [ "${BASH_REMATCH[2]}" -gt 0 ]; then awk '/FAIL/ || (shown && /^ /) { print; shown = 1; next } { shown = 0 }' "$log" | head -n 60
        elif [ $code -ne 0 ]; then failed=$((failed + 1)); line="$line, but exit code $code"; tail -n 30 "$log" | sed 's/^/    /'; fi
        grep '^skip' "$log"
    fi
    printf '%-34s %4d s   %s\n' "$name" $((SECONDS - begin)) "$line"
}
# build NAME TARGET...: one passed or failed; a warning is a failure
build() {
    part "build $1" bash -c 'if make -s --no-print-directory "$@" && ! grep -q "warning:" '"$logs"'/part; then echo "1 passed, 0 failed"
        else echo "FAIL the build"; echo "0 passed, 1 failed"; fi' make "${arguments[@]}" "${@:2}"
}
# a variable of the Makefile
make_variable() { make -pqn "$@" 2>/dev/null | sed -n "s/^$variable := //p" | head -n 1; }

arguments=("$@")
export MAKEFLAGS=
variable=BUILD
base=$(make_variable "${arguments[@]}")
fp32=$(make_variable "${arguments[@]}" PRECISION=FP32)
sanitize=0
for argument in "${arguments[@]}"; do [ "$argument" != SAN=1 ] || sanitize=1; done
if [ $sanitize -eq 1 ]; then
    export ASAN_OPTIONS=halt_on_error=1:exitcode=99:detect_leaks=1
    export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:exitcode=99
fi
export OMP_WAIT_POLICY=passive     # idle threads do not spin: other work may share the cores

if [ -z "${ONLY:-}" ]; then
    ./scripts/install_deps.sh
    make -s --no-print-directory found "${arguments[@]}"
    build "$base" "$base/train_llama" "$base/test_llama" train_llama test_llama
    [ "$fp32" = "$base" ] || build "$fp32" PRECISION=FP32 "$fp32/test_llama"
    part "$base/test_llama" "$base/test_llama"
    [ "$fp32" = "$base" ] || part "$fp32/test_llama" "$fp32/test_llama"
fi
export TRAIN=$PWD/$base/train_llama
for test in dev/test/*.sh; do
    name=$(basename "$test" .sh)
    [ "$name" != run ] && [ "$name" != lib ] || continue
    [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $name "* ]] || continue
    # these drive Python and the build, not the binary under the sanitizers
    [ $sanitize -eq 0 ] || { [ "$name" != prepare ] && [ "$name" != quickstart ]; } || continue
    part "$test" "$test"
done

if [ $skipped -eq 0 ]; then echo "$passed passed, $failed failed"
else echo "$passed passed, $failed failed, $skipped skipped"; fi
[ $failed -eq 0 ]
