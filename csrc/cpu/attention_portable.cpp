// Kernels for any machine: 16-byte vectors (SSE2 on x86-64, NEON on AArch64), and all of float64.
#include "attention_kernels.h"

namespace p3b {
namespace {

// 8 accumulators, 2 vectors of the right operand and a product of the left one: what 16 registers hold where there is no fused multiply-add.
using Floats = Single<Generic<float, 4, 4>>;
using Doubles = Single<Generic<double, 2, 4>>;

}  // namespace

const AttentionKernels* attention_portable(Storage storage) {
  switch (storage) {
    case Storage::kFloat:
      return &Table<Floats, float>::kernels;
    case Storage::kBFloat16:
      return &Table<Floats, BFloat16>::kernels;
    case Storage::kHalf:
      return &Table<Floats, Half>::kernels;
    case Storage::kDouble:
      return &Table<Doubles, double>::kernels;
  }
  return nullptr;
}

}  // namespace p3b
