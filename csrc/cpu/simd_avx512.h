// The vector type of AVX-512 (F, BW, VL, DQ), for the units that are compiled for it.
#pragma once

#include <immintrin.h>

// GCC 12 warns of the undefined operand inside its own masked intrinsics.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "simd.h"

namespace p3b {
namespace {

struct Avx512 {
  using A = float;
  using R = __m512;
  static constexpr int W = 16;
  static constexpr int kTileRows = 12, kLoneRows = 24;  // 24 of 32 registers accumulate; 12 x 2 was as fast as 6 x 4 and 8 x 3 on a Zen 5
  static constexpr float kLeastExponent = -127;

  static R zero() { return _mm512_setzero_ps(); }
  static R set(float x) { return _mm512_set1_ps(x); }
  static R load(const float* p) { return _mm512_loadu_ps(p); }
  static R load(const BFloat16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(p)), 16)); }
  static R load(const Half* p) { return _mm512_cvtph_ps(load_words(p)); }
  static void store(float* p, R r) { _mm512_storeu_ps(p, r); }
  static void store(BFloat16* p, R r) { store_words(p, bfloat16(r)); }
  static void store(Half* p, R r) { store_words(p, _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT)); }

  static R add(R a, R b) { return _mm512_add_ps(a, b); }
  static R sub(R a, R b) { return _mm512_sub_ps(a, b); }
  static R mul(R a, R b) { return _mm512_mul_ps(a, b); }
  static R div(R a, R b) { return _mm512_div_ps(a, b); }
  static R fma(R a, R b, R c) { return _mm512_fmadd_ps(a, b, c); }
  static R max(R a, R b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static R where_less(R a, R b, R x, R y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
  static float sum(R r) { return _mm512_reduce_add_ps(r); }
  static float max(R r) { return _mm512_reduce_max_ps(r); }
  static R exp2(R x) { return exp2_polynomial<Avx512>(x); }
  static R shifted_exponent(R t) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23)); }
  static R log2(R x) {
    // x = 2^e * m with m in [sqrt(1/2), sqrt(2)): the exponent field of x / sqrt(1/2), as integers.
    const __m512i offset = _mm512_set1_epi32(0x3f3504f3), u = _mm512_sub_epi32(_mm512_castps_si512(x), offset);
    const R e = _mm512_cvtepi32_ps(_mm512_srai_epi32(u, 23));
    const R m = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_and_si512(u, _mm512_set1_epi32(0x7fffff)), offset));
    return log2_polynomial<Avx512>(e, m);
  }
  static void transpose(R* r) {
    R t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)  // r[i + c] holds, in quarter l, column 4 l + c of rows i..i+3
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
        r[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
      }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {  // 4 x 4 quarters: gather quarter l of r[c], r[4 + c], r[8 + c], r[12 + c]
      const R low0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x44), high0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xee);
      const R low1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x44), high1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xee);
      t[c] = _mm512_shuffle_f32x4(low0, low1, 0x88);
      t[4 + c] = _mm512_shuffle_f32x4(low0, low1, 0xdd);
      t[8 + c] = _mm512_shuffle_f32x4(high0, high1, 0x88);
      t[12 + c] = _mm512_shuffle_f32x4(high0, high1, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = t[i];
  }

#if defined(__AVX512BF16__)
  static R load_bits(const void* p) { return _mm512_loadu_ps(p); }
  static R set_bits(const void* p) { return _mm512_broadcastss_ps(_mm_load_ss(static_cast<const float*>(p))); }
  static R pairs(R low, R high) {
    const __m512i words = _mm512_cvtepu16_epi32(bfloat16(high));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(words, 16), _mm512_cvtepu16_epi32(bfloat16(low))));
  }
  static R dot_pairs(R c, R a, R b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#endif

 private:
  static __m256i load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_words(void* p, __m256i words) { _mm256_storeu_si256(static_cast<__m256i*>(p), words); }
  static __m256i bfloat16(R r) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(r);
#else  // to nearest even; a NaN keeps its sign and becomes quiet
    const __m512i u = _mm512_castps_si512(r), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000)), 16));
#endif
  }
};

}  // namespace
}  // namespace p3b
