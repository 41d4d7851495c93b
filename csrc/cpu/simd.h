// Storage types, and the vector type that any compiler with vector extensions turns into what the machine has. Widths beyond the machine's
// work as well, which is how tests run the block shapes of AVX-512 anywhere.
#pragma once

#include <math.h>
#include <stdint.h>

namespace p3b {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
  // The half's exponent and fraction in a float's place are the value times 2^-112; exact for subnormal halves too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }

inline void narrow(float x, BFloat16* to) {
  const uint32_t u = bits_of(x);
  to->bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);  // to nearest even
}

inline void narrow(float x, Half* to) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    to->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    to->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: let an addition round to a multiple of 2^-24
    to->bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  } else {
    to->bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
}

// 2^x for x in [-127, 127], NaN for NaN; exactly 0 at -127, where callers clamp, and exactly 1 at 0. 2^f by a minimax polynomial of degree 5 on
// [-0.5, 0.5] with constant term 1 (relative error 9.2e-8), 2^round(x) by its bits. Adding 1.5 * 2^23 + 127 leaves round(x) + 127 in the low bits,
// which a shift makes an exponent.
template <class V>
inline typename V::R exp2_polynomial(typename V::R x) {
  const auto magic = V::set(12583039.f);
  const auto t = V::add(x, magic);
  const auto f = V::sub(x, V::sub(t, magic));
  auto p = V::fma(V::set(1.326472731307149e-3f), f, V::set(9.671512991189957e-3f));
  p = V::fma(p, f, V::set(5.550733581185341e-2f));
  p = V::fma(p, f, V::set(2.4022242426872253e-1f));
  p = V::fma(p, f, V::set(6.931470036506653e-1f));
  p = V::fma(p, f, V::set(1.f));
  return V::mul(p, V::shifted_exponent(t));
}

// log2 of 2^e * m, m in [sqrt(1/2), sqrt(2)): e + 2 / ln 2 * artanh((m - 1) / (m + 1)) by an odd polynomial, relative error 7e-10.
template <class V>
inline typename V::R log2_polynomial(typename V::R e, typename V::R m) {
  const auto one = V::set(1.f), z = V::div(V::sub(m, one), V::add(m, one)), w = V::mul(z, z);
  auto p = V::fma(V::set(0.4317358732223511f), w, V::set(0.5767143964767456f));
  p = V::fma(p, w, V::set(0.9617988467216492f));
  p = V::fma(p, w, V::set(2.885390043258667f));
  return V::fma(p, z, e);
}

template <class A>
struct IntegerLike;
template <>
struct IntegerLike<float> {
  using type = int32_t;
};
template <>
struct IntegerLike<double> {
  using type = int64_t;
};

// W lanes of A. Every vector type has the members of this one. A tile of attention_products.h has kTileRows x 2 or kLoneRows x 1 vectors of
// accumulators.
template <class A_, int W_, int kTileRows_>
struct Generic {
  using A = A_;
  using I = typename IntegerLike<A>::type;
  static constexpr int W = W_;
  static constexpr int kTileRows = kTileRows_, kLoneRows = 2 * kTileRows_;
  static constexpr A kLeastExponent = sizeof(A) == 8 ? -1022 : -127;  // exp2 of it is 0
  typedef A R __attribute__((vector_size(W_ * sizeof(A_))));
  typedef I RI __attribute__((vector_size(W_ * sizeof(A_))));

  static R zero() { return R{}; }
  static R set(A x) { return x - R{}; }
  static R load(const A* p) {
    R r;
    __builtin_memcpy(&r, p, sizeof(R));
    return r;
  }
  template <class T>
  static R load(const T* p) {
    R r{};
    for (int i = 0; i < W; i++) r[i] = widen(p[i]);
    return r;
  }
  static void store(A* p, R r) { __builtin_memcpy(p, &r, sizeof(R)); }
  template <class T>
  static void store(T* p, R r) {
    for (int i = 0; i < W; i++) narrow(r[i], p + i);
  }
  static R add(R a, R b) { return a + b; }
  static R sub(R a, R b) { return a - b; }
  static R mul(R a, R b) { return a * b; }
  static R div(R a, R b) { return a / b; }
  static R fma(R a, R b, R c) { return a * b + c; }
  static R max(R a, R b) { return a > b ? a : b; }  // b where either is NaN
  static R where_less(R a, R b, R x, R y) { return a < b ? x : y; }
  static A sum(R r) {
    A s = r[0];
    for (int i = 1; i < W; i++) s += r[i];
    return s;
  }
  static A max(R r) {
    A m = r[0];
    for (int i = 1; i < W; i++) m = r[i] > m ? r[i] : m;
    return m;
  }
  static R exp2(R x) {  // x >= kLeastExponent or NaN
    if constexpr (sizeof(A) == 8) {
      for (int i = 0; i < W; i++) x[i] = x[i] <= -1022 ? 0 : ::exp2(x[i]);
      return x;
    } else {
      return exp2_polynomial<Generic>(x);
    }
  }
  static R shifted_exponent(R t) { return (R)((RI)t << 23); }
  static R log2(R x) {
    for (int i = 0; i < W; i++) x[i] = sizeof(A) == 8 ? ::log2(x[i]) : ::log2f(x[i]);
    return x;
  }
  static void transpose(R* r) {
    for (int i = 0; i < W; i++)
      for (int j = 0; j < i; j++) {
        const A x = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = x;
      }
  }
};

}  // namespace
}  // namespace p3b
