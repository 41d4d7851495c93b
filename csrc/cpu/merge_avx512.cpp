// RowKernels for AVX-512 (F, BW, VL, DQ). No torch header here: see merge_kernels.h.
#if defined(__AVX512F__)
#include "merge_kernels.h"

// GCC 12 takes the deliberately undefined operand inside its own intrinsics for a mistake (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace p3b {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

struct F32x16 {
  using Acc = float;
  using Index = __m512i;
  // 24 sums, 4 columns and 1 broadcast row of 32 registers; 98 destinations are 7 vectors, one tile of 4 and one of 3.
  static constexpr int kWidth = 16, kRows = 6, kColumns = 4;
  static constexpr float kMax = __FLT_MAX__, kInfinity = __builtin_inff(), kShrink = 0x1p-80f;

  __m512 v;

  static F32x16 zero() { return {_mm512_setzero_ps()}; }
  static F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static F32x16 divide(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32x16 load(const Bf16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
  }
  static F32x16 load(const F16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
  static void store(F16* p, F32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(Bf16* p, F32x16 a) {  // round to nearest even; NaN stays NaN
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  static float sum(F32x16 a) { return _mm512_reduce_add_ps(a.v); }
  static Index count_from(int64_t start) {
    return _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(start)), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static __mmask16 below(Index index, int64_t n) { return _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(static_cast<int>(n))); }
  static void keep_greater(F32x16 score, Index index, __mmask16 valid, F32x16& best, Index& at) {
    const __mmask16 greater = _mm512_mask_cmp_ps_mask(valid, score.v, best.v, _CMP_GT_OQ);
    best.v = _mm512_mask_mov_ps(best.v, greater, score.v);
    at = _mm512_mask_mov_epi32(at, greater, index);
  }
  static void store_index(int32_t* p, Index index) { _mm512_storeu_si512(p, index); }
  static void transpose(const float* in, int64_t in_stride, float* out) {
    const __m512i rows = _mm512_mullo_epi32(count_from(0), _mm512_set1_epi32(static_cast<int>(in_stride)));
    for (int d = 0; d < 16; d++) _mm512_storeu_ps(out + d * 16, _mm512_i32gather_ps(rows, in + d, 4));
  }
};

#include "merge_kernels_impl.h"

}  // namespace

const RowKernels kRowKernelsAvx512[3] = {make_row_kernels<F32x16, float>(), make_row_kernels<F32x16, Bf16>(), make_row_kernels<F32x16, F16>()};

}  // namespace p3b
#endif
