// RowKernels for AVX2, FMA and F16C. No torch header here: see merge_kernels.h.
#if defined(__AVX2__)
#include <immintrin.h>

#include "merge_kernels.h"

namespace p3b {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

struct F32x8 {
  using Acc = float;
  using Index = __m256i;
  // 12 sums, 2 columns and 1 broadcast row are 15 of the 16 registers.
  static constexpr int kWidth = 8, kRows = 6, kColumns = 2;
  static constexpr float kMax = __FLT_MAX__, kInfinity = __builtin_inff(), kShrink = 0x1p-80f;

  __m256 v;

  static F32x8 zero() { return {_mm256_setzero_ps()}; }
  static F32x8 broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static F32x8 divide(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
  static F32x8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32x8 load(const Bf16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
  }
  static F32x8 load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static void store(float* p, F32x8 a) { _mm256_storeu_ps(p, a.v); }
  static void store(F16* p, F32x8 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(Bf16* p, F32x8 a) {  // round to nearest even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static float sum(F32x8 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static Index count_from(int64_t start) {
    return _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(start)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Index below(Index index, int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index); }
  static void keep_greater(F32x8 score, Index index, Index valid, F32x8& best, Index& at) {
    const __m256 greater = _mm256_and_ps(_mm256_cmp_ps(score.v, best.v, _CMP_GT_OQ), _mm256_castsi256_ps(valid));
    best.v = _mm256_blendv_ps(best.v, score.v, greater);
    at = _mm256_blendv_epi8(at, index, _mm256_castps_si256(greater));
  }
  static void store_index(int32_t* p, Index index) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), index); }
  static void transpose(const float* in, int64_t in_stride, float* out) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(in + i * in_stride);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
      _mm256_storeu_ps(out + i * 8, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      _mm256_storeu_ps(out + (i + 4) * 8, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
};

#include "merge_kernels_impl.h"

}  // namespace

const RowKernels kRowKernelsAvx2[3] = {make_row_kernels<F32x8, float>(), make_row_kernels<F32x8, Bf16>(), make_row_kernels<F32x8, F16>()};

}  // namespace p3b
#endif
