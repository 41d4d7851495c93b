// Kernels for AVX-512 without bfloat16 instructions: bfloat16 and float16 become float when packed.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "attention_kernels.h"
#include "simd_avx512.h"

namespace p3b {
namespace {

using Floats = Single<Avx512>;

}  // namespace

const AttentionKernels* attention_avx512(Storage storage) {
  switch (storage) {
    case Storage::kFloat:
      return &Table<Floats, float>::kernels;
    case Storage::kBFloat16:
      return &Table<Floats, BFloat16>::kernels;
    case Storage::kHalf:
      return &Table<Floats, Half>::kernels;
    case Storage::kDouble:
      return nullptr;
  }
  return nullptr;
}

}  // namespace p3b
#endif
