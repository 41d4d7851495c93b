#!/bin/sh
# Random calls of every CPU op under AddressSanitizer and UndefinedBehaviorSanitizer, each compared with the float64 reference.
# Usage: tests/fuzz/run.sh [CALLS] [SEED]; PYTHON and CXX choose the interpreter and the compiler (GCC), BUILD the folder (build/fuzz), so that two
# runs need not share one. Exit status 77: the compiler has no AddressSanitizer that can be preloaded.
set -eu
cd "$(dirname "$0")/../.."
calls=${1:-2000}
seed=${2:-$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}
python=${PYTHON:-python3}
export CXX=${CXX:-c++}
build=${BUILD:-build/fuzz}
sanitizer=$("$CXX" -print-file-name=libasan.so 2>/dev/null || true)

if [ ! -e "$sanitizer" ]; then
  echo "fuzz: SKIPPED: $CXX has no libasan.so; install GCC's (libasan8, libgcc-12-dev) or set CXX" >&2
  exit 77
fi
echo "fuzz: $calls calls, seed $seed (again: tests/fuzz/run.sh $calls $seed)"
mkdir -p "$build"
P3B_EXT_CUDA=0 P3B_EXT_SANITIZE=1 "$python" setup.py -q build_ext --build-lib "$build/lib" --build-temp "$build/temp" >"$build/build.log" 2>&1 || {
  cat "$build/build.log"
  exit 1
}
LD_PRELOAD="$sanitizer $("$CXX" -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:handle_segv=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" \
  "$python" tests/fuzz/fuzz.py --library "$build/lib" --calls "$calls" --seed "$seed"

# The kernels of AVX-512 over emulated intrinsics. Without UBSan: it makes GCC take minutes over the unrolled tiles.
tests/fuzz/wide_kernels.sh "$build/wide_kernels" -fsanitize=address
"$build/wide_kernels" $((calls / 40 + 10)) "$seed"
