#!/usr/bin/env bash
# busy.sh: builds the tracer busy.cpp and runs a command under it. What it prints is described at the top of busy.cpp.
#
#     dev/cuda/busy.sh ./train_llama --model 200m --recipe bf16 ...
#     dev/cuda/busy.sh --build                                          builds only
#
# Environment: BUSY_JSON=FILE, BUSY_SKIP=N, BUSY_LAST_MS=N, BUSY_MARK=NAME. CUPTI (headers and library) is looked for in
# the CUDA Toolkit and in the nvidia packages of python3, which PyTorch brings. Exit code: the command's; 69 where there
# is no CUPTI.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$root/build/busy

fail() { echo "busy: $1" >&2; exit "${2:-1}"; }
[ $# -gt 0 ] || fail "no command: dev/cuda/busy.sh COMMAND... or --build" 2

# folders that may hold headers or libraries
nvcc=$(command -v nvcc || true)
toolkit=${CUDA_HOME:-}
[ -n "$toolkit" ] || [ -z "$nvcc" ] || toolkit=$(dirname "$(dirname "$(realpath "$nvcc")")")
toolkit=${toolkit:-/usr/local/cuda}
packages=()
while IFS= read -r folder; do packages+=("$folder"); done < <(python3 - 2>/dev/null <<'END' || true
import glob, site, sys, sysconfig
folders = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages(), *sys.path}
for folder in sorted(f for f in folders if f):
    for name in sorted(glob.glob(f"{glob.escape(folder)}/nvidia/*/")):
        print(name.rstrip("/"))
END
)

# the library's major version is that of the headers; before CUDA 13 they counted otherwise
major_version() {
    local version
    version=$(sed -n 's/^#define CUPTI_API_VERSION *\([0-9]*\).*/\1/p' "$1/cupti_version.h" 2>/dev/null)
    if [ "${version:-0}" -ge 130000 ]; then echo $((version / 10000)); else echo 12; fi
}
# library_of HEADERS PLACE...: the first library of that version in PLACE/lib64 or PLACE/lib
library_of() {
    local major place file
    major=$(major_version "$1"); shift
    for place in "$@"; do
        for file in "$place/lib64/libcupti.so.$major" "$place/lib/libcupti.so.$major"; do
            if [ -f "$file" ]; then echo "$file"; return; fi
        done
    done
}

# headers with a library beside them; else any headers with a library of the same major version
headers="" library=""
places=("$toolkit/extras/CUPTI" "$toolkit" "$toolkit/targets/x86_64-linux" ${packages[@]+"${packages[@]}"})
for beside in 1 0; do
    for place in "${places[@]}"; do
        if [ -z "$library" ] && [ -f "$place/include/cupti.h" ]; then
            headers=$place/include
            if [ $beside -eq 1 ]; then library=$(library_of "$headers" "$place")
            else library=$(library_of "$headers" "${places[@]}"); fi
        fi
    done
done
[ -n "$library" ] || fail "no cupti.h with its libcupti.so in $toolkit or in the nvidia packages of python3: \
install the CUDA Toolkit with CUPTI, or pip install nvidia-cuda-cupti" 69

# cuda.h, where it does not lie beside cupti.h
includes=("-I$headers")
for place in "${places[@]}"; do
    if [ -f "$place/include/cuda.h" ]; then includes+=("-I$place/include"); break; fi
done

# the current record types: the ones that are not in cupti_activity_deprecated.h
newest() { sed -n "s/^} \(CUpti_Activity$1[0-9]*\);.*/\1/p" "$headers/cupti_activity.h" | sort -V | tail -n 1; }
mkdir -p "$out"
"${CXX:-g++}" -std=c++17 -O2 -Wall -Wextra -fPIC -shared -fvisibility=hidden "${includes[@]}" \
    -DBUSY_KERNEL="$(newest Kernel)" -DBUSY_MEMCPY="$(newest Memcpy)" -DBUSY_MEMSET="$(newest Memset)" \
    "$root/dev/cuda/busy.cpp" -o "$out/libbusy.so.tmp" "$library" -Wl,-rpath,"$(dirname "$library")" -pthread
mv "$out/libbusy.so.tmp" "$out/libbusy.so"
echo "busy: CUPTI $(realpath "$library"), headers $headers" >&2
[ "$1" != --build ] || exit 0

code=0
CUDA_INJECTION64_PATH=$out/libbusy.so "$@" || code=$?
exit $code
