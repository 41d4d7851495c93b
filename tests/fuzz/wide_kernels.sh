#!/bin/sh
# Compiles the kernels of AVX-512 over emulated intrinsics, and the program that compares them with float64; nothing is
# done where PROGRAM was made of the same sources by the same compiler with the same flags (PROGRAM.key says so).
# Usage: tests/fuzz/wide_kernels.sh PROGRAM [FLAG...]; CXX chooses the compiler (GCC or Clang).
set -eu
cd "$(dirname "$0")/../.."
program=$1
shift
compile="${CXX:-c++} -std=c++20 -O1 -w -Wno-psabi $*"
emulated="-Itests/fuzz/avx512_on_cpu -D__AVX512F__ -D__AVX512BW__ -D__AVX512VL__ -D__AVX512DQ__"
key=$({ echo "$compile"; "${CXX:-c++}" --version; cat tests/fuzz/wide_kernels.sh csrc/cpu/*.h csrc/cpu/*.cpp csrc/*.h tests/fuzz/*.cpp tests/fuzz/avx512_on_cpu/*.h; } | cksum)
if [ -x "$program" ] && [ "$(cat "$program.key" 2>/dev/null)" = "$key" ]; then exit 0; fi
mkdir -p "$(dirname "$program")"
rm -f "$program.key"
for unit in attention merge; do
  $compile -c csrc/cpu/${unit}_portable.cpp -o "$program.${unit}_portable.o"
  $compile $emulated -c csrc/cpu/${unit}_avx512.cpp -o "$program.${unit}_avx512.o"
done
$compile $emulated -D__AVX512BF16__ -c csrc/cpu/attention_avx512_bf16.cpp -o "$program.attention_avx512_bf16.o"
$compile tests/fuzz/wide_kernels.cpp "$program".*.o -o "$program"
echo "$key" > "$program.key"
