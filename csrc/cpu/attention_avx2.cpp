// Kernels for AVX2, FMA and F16C. bfloat16 and float16 become float when packed.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "attention_kernels.h"
#include "simd_avx2.h"

namespace p3b {
namespace {

using Floats = Single<Avx2>;

}  // namespace

const AttentionKernels* attention_avx2(Storage storage) {
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
