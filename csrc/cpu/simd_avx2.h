// The vector type of AVX2, FMA and F16C, for the units that are compiled for them.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace p3b {
namespace {

struct Avx2 {
  using A = float;
  using R = __m256;
  static constexpr int W = 8;
  // 6 x 2 of the 16 registers accumulate: 12 independent sums cover two multiply-adds per cycle of latency 4, and 8 loads per step fit beside
  // 12 multiply-adds. A lone vector takes 12 x 1.
  static constexpr int kTileRows = 6, kLoneRows = 12;
  static constexpr float kLeastExponent = -127;

  static R zero() { return _mm256_setzero_ps(); }
  static R set(float x) { return _mm256_set1_ps(x); }
  static R load(const float* p) { return _mm256_loadu_ps(p); }
  static R load(const BFloat16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words(p)), 16)); }
  static R load(const Half* p) { return _mm256_cvtph_ps(load_words(p)); }
  static void store(float* p, R r) { _mm256_storeu_ps(p, r); }
  static void store(BFloat16* p, R r) {  // to nearest even; a NaN keeps its sign and becomes quiet
    const __m256i u = _mm256_castps_si256(r), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(Half* p, R r) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT)); }

  static R add(R a, R b) { return _mm256_add_ps(a, b); }
  static R sub(R a, R b) { return _mm256_sub_ps(a, b); }
  static R mul(R a, R b) { return _mm256_mul_ps(a, b); }
  static R div(R a, R b) { return _mm256_div_ps(a, b); }
  static R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
  static R max(R a, R b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static R where_less(R a, R b, R x, R y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static float sum(R r) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float max(R r) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static R exp2(R x) { return exp2_polynomial<Avx2>(x); }
  static R shifted_exponent(R t) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23)); }
  static R log2(R x) {
    // x = 2^e * m with m in [sqrt(1/2), sqrt(2)): the exponent field of x / sqrt(1/2), as integers.
    const __m256i offset = _mm256_set1_epi32(0x3f3504f3), u = _mm256_sub_epi32(_mm256_castps_si256(x), offset);
    const R e = _mm256_cvtepi32_ps(_mm256_srai_epi32(u, 23));
    const R m = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffff)), offset));
    return log2_polynomial<Avx2>(e, m);
  }
  static void transpose(R* r) {
    R t[8];
    for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
        r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
      }
    for (int i = 0; i < 4; i++) {
      const R low = r[i], high = r[i + 4];
      r[i] = _mm256_permute2f128_ps(low, high, 0x20);
      r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
  }

 private:
  static __m128i load_words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};

}  // namespace
}  // namespace p3b
