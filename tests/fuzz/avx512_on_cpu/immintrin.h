// The AVX-512 intrinsics that csrc/cpu/simd_avx512.h uses, lane by lane as Intel's intrinsics guide defines them, so that its kernels run on any
// machine. Found before the compiler's own <immintrin.h> by -I; a kernel that needs another intrinsic does not compile until it stands here.
#pragma once

#include <stdint.h>
#include <string.h>

#define FOR_LANES(i, n) for (int i = 0; i < n; i++)

typedef float __m512 __attribute__((vector_size(64)));
typedef int32_t Lanes __attribute__((vector_size(64)));
typedef uint32_t UnsignedLanes __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(32)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef short __m256bh __attribute__((vector_size(32)));
typedef float __m128 __attribute__((vector_size(16)));
typedef uint16_t __mmask16;

enum { _CMP_UNORD_Q = 0x03, _CMP_LT_OQ = 0x11, _MM_FROUND_TO_NEAREST_INT = 0 };

static inline __m512 _mm512_setzero_ps() { return __m512{}; }
static inline __m512 _mm512_set1_ps(float x) { return x - __m512{}; }
static inline __m512i _mm512_set1_epi32(int32_t x) { return (__m512i)(x - Lanes{}); }

static inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 r;
  memcpy(&r, p, sizeof r);
  return r;
}
static inline void _mm512_storeu_ps(void* p, __m512 r) { memcpy(p, &r, sizeof r); }
static inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i r;
  memcpy(&r, p, sizeof r);
  return r;
}
static inline void _mm256_storeu_si256(__m256i* p, __m256i r) { memcpy(p, &r, sizeof r); }
static inline __m128 _mm_load_ss(const float* p) { return __m128{*p, 0, 0, 0}; }
static inline __m512 _mm512_broadcastss_ps(__m128 x) { return _mm512_set1_ps(x[0]); }

static inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
static inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
static inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
static inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return a * b + c; }  // rounds twice: tests allow for it
static inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
static inline float _mm512_reduce_add_ps(__m512 r) {
  float sum = 0;
  FOR_LANES(i, 16) sum += r[i];
  return sum;
}
static inline float _mm512_reduce_max_ps(__m512 r) {
  float most = r[0];
  FOR_LANES(i, 16) most = most > r[i] ? most : r[i];
  return most;
}

static inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((UnsignedLanes)a + (UnsignedLanes)b); }
static inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((UnsignedLanes)a - (UnsignedLanes)b); }
static inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
static inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
static inline __m512i _mm512_slli_epi32(__m512i a, unsigned count) { return (__m512i)((UnsignedLanes)a << count); }
static inline __m512i _mm512_srli_epi32(__m512i a, unsigned count) { return (__m512i)((UnsignedLanes)a >> count); }
static inline __m512i _mm512_srai_epi32(__m512i a, unsigned count) { return (__m512i)((Lanes)a >> int(count)); }

static inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
static inline __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
static inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  __m512 r;
  FOR_LANES(i, 16) r[i] = float(((Lanes)a)[i]);
  return r;
}
static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  Lanes r;
  FOR_LANES(i, 16) r[i] = ((Words)a)[i];
  return (__m512i)r;
}
static inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  Words r;
  FOR_LANES(i, 16) r[i] = uint16_t(((Lanes)a)[i]);
  return (__m256i)r;
}
static inline __m512 _mm512_cvtph_ps(__m256i a) {
  __m512 r;
  FOR_LANES(i, 16) {
    const uint16_t bits = ((Words)a)[i];
    r[i] = float(__builtin_bit_cast(_Float16, bits));
  }
  return r;
}
static inline __m256i _mm512_cvtps_ph(__m512 a, int) {
  Words r;
  FOR_LANES(i, 16) r[i] = __builtin_bit_cast(uint16_t, _Float16(a[i]));
  return (__m256i)r;
}

static inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  __mmask16 mask = 0;
  FOR_LANES(i, 16) mask |= __mmask16((how == _CMP_LT_OQ ? a[i] < b[i] : a[i] != a[i] || b[i] != b[i]) << i);
  return mask;
}
static inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  FOR_LANES(i, 16) a[i] = mask >> i & 1 ? b[i] : a[i];
  return a;
}
static inline __m512i _mm512_mask_or_epi32(__m512i source, __mmask16 mask, __m512i a, __m512i b) {
  Lanes r = (Lanes)source;
  FOR_LANES(i, 16) r[i] = mask >> i & 1 ? ((Lanes)a)[i] | ((Lanes)b)[i] : r[i];
  return (__m512i)r;
}

static inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  __m512 r;
  FOR_LANES(i, 16) r[i] = (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2];
  return r;
}
static inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  __m512 r;
  FOR_LANES(i, 16) r[i] = (i % 2 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2];
  return r;
}
static inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int how) {
  __m512 r;
  FOR_LANES(i, 16) r[i] = (i % 4 < 2 ? a : b)[i / 4 * 4 + (how >> i % 4 * 2 & 3)];
  return r;
}
static inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int how) {
  __m512 r;
  FOR_LANES(i, 16) r[i] = (i < 8 ? a : b)[(how >> i / 4 * 2 & 3) * 4 + i % 4];
  return r;
}

static inline __m256bh _mm512_cvtneps_pbh(__m512 a) {  // to nearest even; denormals become 0, NaN quiet
  Words r;
  FOR_LANES(i, 16) {
    uint32_t u = __builtin_bit_cast(uint32_t, float(a[i]));
    if ((u & 0x7f800000) == 0) u &= 0x80000000;
    r[i] = uint16_t(a[i] != a[i] ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  return (__m256bh)r;
}
static inline __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  const UnsignedLanes x = (UnsignedLanes)a, y = (UnsignedLanes)b;
  c += (__m512)(x & 0xffff0000u) * (__m512)(y & 0xffff0000u);
  return c + (__m512)(x << 16) * (__m512)(y << 16);
}
