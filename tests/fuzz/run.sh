#!/bin/sh
# Random calls of every CPU op under AddressSanitizer and UndefinedBehaviorSanitizer, each compared with the float64 reference.
# Usage: tests/fuzz/run.sh [CALLS] [SEED]; PYTHON and CXX choose the interpreter and the compiler (GCC).
set -eu
cd "$(dirname "$0")/../.."
calls=${1:-2000}
seed=${2:-$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}
python=${PYTHON:-python3}
cxx=${CXX:-c++}
build=build/fuzz

echo "fuzz: $calls calls, seed $seed (again: tests/fuzz/run.sh $calls $seed)"
mkdir -p "$build"
P3B_EXT_CUDA=0 P3B_EXT_SANITIZE=1 "$python" setup.py -q build_ext --build-lib "$build/lib" --build-temp "$build/temp" >"$build/build.log" 2>&1 || {
  cat "$build/build.log"
  exit 1
}
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:handle_segv=1 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" tests/fuzz/fuzz.py --library "$build/lib" --calls "$calls" --seed "$seed"

# The block shapes of AVX-512 through an emulated vector type. Without UBSan: it makes GCC take minutes over the unrolled tiles.
[ "$build/wide_kernels" -nt csrc/cpu/attention_kernels.h ] && [ "$build/wide_kernels" -nt tests/fuzz/wide_kernels.cpp ] ||
  "$cxx" -std=c++20 -O1 -w -Wno-psabi -fsanitize=address tests/fuzz/wide_kernels.cpp -o "$build/wide_kernels"
"$build/wide_kernels" $((calls / 40 + 10)) "$seed"
