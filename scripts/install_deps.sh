#!/usr/bin/env bash
# install_deps.sh: finds what building and testing need, and installs what is missing (Debian, Ubuntu: apt-get).
#
#     ./scripts/install_deps.sh        says nothing where nothing is missing
#
# Installs as root or through sudo without a password. Otherwise it prints the line to run. Exit code 0 where the build can
# go on (g++ and make are there), else 1. Nothing else of this repository installs anything.
set -u

has() { command -v "$1" >/dev/null 2>&1; }

# OpenBLAS with its header: as the Makefile asks for it, first by pkg-config, then by trying
has_openblas() {
    pkg-config --exists openblas 2>/dev/null && return
    has g++ && printf '#include <cblas.h>\nint main() { cblas_sscal(1, 1, 0, 1); }\n' |
        g++ -x c++ - -lopenblas -o /dev/null 2>/dev/null
}

# packages <- the packages of what is missing;  reasons <- what they are for
find_missing() {
    packages=() reasons=()
    need() { packages+=("${@:2}"); reasons+=("$1"); }
    has g++                   || need "the C++ compiler g++" g++
    has make                  || need "make" make
    has pkg-config            || need "pkg-config, which finds libraries" pkg-config
    has_openblas              || need "OpenBLAS, for fast matrix products" libopenblas-dev
    { has mpicc && has mpirun; } || need "OpenMPI, for several processes" libopenmpi-dev openmpi-bin
    has python3               || need "python3, which makes token shards" python3
    bible -f gen1:1 </dev/null >/dev/null 2>&1 || need "the King James text of the quick start" bible-kjv bible-kjv-text
    has xz                    || need "xz, for compressed text" xz-utils
}

can_build() { has g++ && has make; }

# finish: the verdict where something is still missing
finish() {
    if can_build; then
        echo "install_deps: going on with what is there" >&2
        exit 0
    fi
    echo "install_deps: without g++ and make nothing can be built" >&2
    exit 1
}

find_missing
[ ${#packages[@]} -eq 0 ] && exit 0
echo "install_deps: missing here:"
printf '  %s\n' "${reasons[@]}"

if ! has apt-get; then
    echo "install_deps: this system has no apt-get. Install these with its own package manager (Debian's names):" >&2
    echo "    ${packages[*]}" >&2
    finish
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=(env DEBIAN_FRONTEND=noninteractive)
elif has sudo && sudo -n true 2>/dev/null; then
    as_root=(sudo -n env DEBIAN_FRONTEND=noninteractive)
else
    echo "install_deps: installing takes root. Run this line, or have it run:" >&2
    echo "    sudo apt-get update && sudo apt-get install -y --no-install-recommends ${packages[*]}" >&2
    finish
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null >>"$log" 2>&1; }
install() { apt install -y --no-install-recommends "$@"; }

echo "install_deps: installing ${packages[*]}"
begin=$SECONDS
apt update || echo "install_deps: apt-get update failed; trying with the package lists that are here" >&2
# all at once; where one of them is not to be had, at least the others
install "${packages[@]}" || for package in "${packages[@]}"; do
    install "$package" || echo "install_deps: apt-get could not install $package" >&2
done
echo "install_deps: done in $((SECONDS - begin)) s"

find_missing
[ ${#packages[@]} -eq 0 ] && exit 0
echo "install_deps: still missing: ${packages[*]}. apt-get said:" >&2
grep -E '^(E|W|Err)' "$log" | tail -n 5 >&2
finish
