// Kernels for AVX-512 with bfloat16 dot products, used for bfloat16; other storage types run as in attention_avx512.cpp.
#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "attention_kernels.h"
#include "simd_avx512.h"

namespace p3b {

const AttentionKernels* attention_avx512_bf16(Storage storage) {
  return storage == Storage::kBFloat16 ? &Table<Paired<Avx512>, BFloat16>::kernels : attention_avx512(storage);
}

}  // namespace p3b
#endif
