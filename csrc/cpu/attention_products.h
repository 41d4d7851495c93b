// Scratch memory, operands, packing and matrix products of the attention kernels, over a vector type V (simd.h). Internal linkage throughout, as
// in every header that attention_kernels.h puts together.
#pragma once

#include "simd.h"

namespace p3b {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out pieces of a task's scratch memory; with a null base it only counts. Under AddressSanitizer the gaps between pieces are poisoned.
struct Arena {
  char* base;
  size_t used = 0;

  template <class U>
  U* take(int64_t count) {
    constexpr size_t kLine = 64, kGap = 64;
    char* piece = base ? base + used : nullptr;
    const size_t bytes = size_t(count) * sizeof(U);
    used += (bytes + kLine - 1) / kLine * kLine + kGap;
    poison(piece, bytes, used - size_t(base ? piece - base : 0));
    return reinterpret_cast<U*>(piece);
  }

  static void poison(char* piece, size_t bytes, size_t room);
};

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(void const volatile*, size_t);
extern "C" void __asan_unpoison_memory_region(void const volatile*, size_t);
inline void Arena::poison(char* piece, size_t bytes, size_t room) {
  if (!piece) return;
  __asan_unpoison_memory_region(piece, bytes);
  __asan_poison_memory_region(piece + (bytes + 7) / 8 * 8, room - (bytes + 7) / 8 * 8);
}
#else
inline void Arena::poison(char*, size_t, size_t) {}
#endif

// Rows of a tensor: row i is row index[i] of it, its channels times gate (where there is one) and times scale[i].
template <class T, class A>
struct Rows {
  const T* data;
  int64_t stride;
  const int32_t* index;
  const A* gate;
  const A* scale;

  const T* row(int64_t i) const { return data + (index ? index[i] : i) * stride; }
};

// Fetches row i + 8 when row i is packed: rows of packed qkv lie in pages of their own, which hardware prefetch does not cross (4 % of the forward).
template <class T, class A>
inline void prefetch(const Rows<T, A>& x, int64_t i, int64_t n, int64_t D) {
  constexpr int64_t kAhead = 8;
  if (i + kAhead < n)
    for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(x.row(i + kAhead) + d);
}

// Channels [d, d + W) of row i, zero beyond D.
template <class V, class T>
inline typename V::R channels(const Rows<T, typename V::A>& x, int64_t i, int64_t d, int64_t D) {
  typename V::R r;
  if (d + V::W <= D) {
    r = V::load(x.row(i) + d);
  } else {
    T tail[V::W] = {};
    for (int64_t c = d; c < D; c++) tail[c - d] = x.row(i)[c];
    r = V::load(tail);
  }
  if (x.gate) r = V::mul(r, V::load(x.gate + d));
  if (x.scale) r = V::mul(r, V::set(x.scale[i]));
  return r;
}

// ---- operands ---------------------------------------------------------------------------------------------------------------------------------
// The products read operands in units of one 32-bit lane (64-bit for double): one number, or two bfloat16 along the summed axis.
// The right operand lies in panels of two vectors, [K][2 W] units each, a last odd vector in a panel [K][W]: a step of the sum reads one or two
// whole vectors that follow each other. (Reading K or V in place costs a cache line of its own per step, 256 bytes apart: conflicts in L1.)

struct Strided {  // units of a left operand: row i, step k at data[i * row + k * step]
  const void* data;
  int64_t row, step;
};

template <class V_>
struct Single {
  using V = V_;
  using A = typename V::A;
  using Unit = A;
  static constexpr int kPack = 1;
  static typename V::R multiply_add(typename V::R c, const Unit* a, typename V::R b) { return V::fma(V::set(*a), b, c); }

  template <class T>
  static void pack_rows(const Rows<T, A>& x, int64_t n, int64_t D, Unit* to, int64_t ld) {
    for (int64_t i = 0; i < n; i++) {
      prefetch(x, i, n, D);
      for (int64_t d = 0; d < D; d += V::W) V::store(to + i * ld + d, channels<V>(x, i, d, D));
    }
  }
  template <class T>
  static typename V::R transposable(const Rows<T, A>& x, int64_t i, int64_t unit, int64_t D) {
    return channels<V>(x, i, unit, D);
  }
  template <class T>
  static typename V::R panel(const Rows<T, A>& x, int64_t step, int64_t, int64_t d, int64_t D) {
    return channels<V>(x, step, d, D);
  }
  // The block of numbers s [rows][ld] as a left operand summed over its columns, and over its rows.
  static Strided by_row(const A* s, int64_t ld, int64_t, int64_t, Unit*) { return {s, ld, 1}; }
  static Strided by_column(const A* s, int64_t ld, int64_t, int64_t, Unit*) { return {s, 1, ld}; }
};

// Two bfloat16 per unit for the bfloat16 dot products of AVX-512.
template <class V_>
struct Paired {
  using V = V_;
  using A = float;
  using Unit = float;  // moved as bits only
  static constexpr int kPack = 2;
  static typename V::R multiply_add(typename V::R c, const Unit* a, typename V::R b) { return V::dot_pairs(c, V::set_bits(a), b); }

  template <class T>
  static void pack_rows(const Rows<T, A>& x, int64_t n, int64_t D, Unit* to, int64_t ld) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t d = 0; d < D; d += V::W) V::store(reinterpret_cast<BFloat16*>(to + i * ld) + d, channels<V>(x, i, d, D));
  }
  template <class T>
  static typename V::R transposable(const Rows<T, A>& x, int64_t i, int64_t unit, int64_t D) {
    alignas(64) BFloat16 two[2 * V::W];
    V::store(two, channels<V>(x, i, 2 * unit, D));
    V::store(two + V::W, channels<V>(x, i, 2 * unit + V::W, larger(D, 2 * unit + V::W)));
    return V::load_bits(two);
  }
  template <class T>
  static typename V::R panel(const Rows<T, A>& x, int64_t step, int64_t n, int64_t d, int64_t D) {
    return V::pairs(channels<V>(x, 2 * step, d, D), 2 * step + 1 < n ? channels<V>(x, 2 * step + 1, d, D) : V::zero());
  }
  static Strided by_row(const A* s, int64_t ld, int64_t rows, int64_t columns, Unit* to) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j += V::W) V::store(reinterpret_cast<BFloat16*>(to + i * ld) + j, V::load(s + i * ld + j));
    return {to, ld, 1};
  }
  static Strided by_column(const A* s, int64_t ld, int64_t rows, int64_t columns, Unit* to) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < columns; j += V::W)
        V::store(to + i / 2 * ld + j, V::pairs(V::load(s + i * ld + j), i + 1 < rows ? V::load(s + (i + 1) * ld + j) : V::zero()));
    return {to, 1, ld};
  }
};

template <class O>
int64_t units(int64_t n) {
  return (n + O::kPack - 1) / O::kPack;
}

// Where vector v of a right operand of K steps and `vectors` vectors begins, and how far its steps lie apart.
template <class V>
struct Panel {
  int64_t offset, step;
  Panel(int64_t v, int64_t vectors, int64_t K) {
    const bool lone = v % 2 == 0 && v + 1 == vectors;
    step = lone ? V::W : 2 * V::W;
    offset = v / 2 * 2 * V::W * K + v % 2 * V::W;
  }
};

// x [n, D] as a right operand summed over n.
template <class O, class T>
void pack_panels(const Rows<T, typename O::A>& x, int64_t n, int64_t D, typename O::Unit* to) {
  using V = typename O::V;
  const int64_t K = units<O>(n), vectors = (D + V::W - 1) / V::W;
  for (int64_t k = 0; k < K; k++) {
    for (int i = 0; i < O::kPack; i++) prefetch(x, k * O::kPack + i, n, D);
    for (int64_t v = 0; v < vectors; v++) {
      const Panel<V> p(v, vectors, K);
      V::store(to + p.offset + k * p.step, O::panel(x, k, n, v * V::W, D));
    }
  }
}

// x [n, D] as a right operand summed over D; columns beyond n are zero.
template <class O, class T>
void pack_transposed(const Rows<T, typename O::A>& x, int64_t n, int64_t D, typename O::Unit* to) {
  using V = typename O::V;
  const int64_t K = units<O>(D), vectors = (n + V::W - 1) / V::W;
  for (int64_t v = 0; v < vectors; v++) {
    const Panel<V> p(v, vectors, K);
    for (int64_t i = 0; i < V::W; i++) prefetch(x, v * V::W + i, n, D);
    for (int64_t k = 0; k < K; k += V::W) {
      typename V::R r[V::W];
      for (int64_t i = 0; i < V::W; i++) r[i] = v * V::W + i < n ? O::transposable(x, v * V::W + i, k, D) : V::zero();
      V::transpose(r);
      for (int64_t i = 0; i < V::W && k + i < K; i++) V::store(to + p.offset + (k + i) * p.step, r[i]);
    }
  }
}

// ---- products ---------------------------------------------------------------------------------------------------------------------------------

enum class Into { kStore, kAdd, kLogits };  // c = ab, c += ab, c = factor * ab + bias (bias: one per column)

template <class V>
struct Target {
  typename V::A* c;
  int64_t ld;
  const typename V::A* bias;
  typename V::A factor;
};

// A tile of kRows x kVectors accumulators, in registers for all of the sum.
template <class O, Into kInto, int kRows, int kVectors>
inline void tile(const typename O::Unit* __restrict a, int64_t row, int64_t step, const typename O::Unit* __restrict b, int64_t K,
                 const Target<typename O::V>& to) {
  using V = typename O::V;
  using R = typename V::R;
  R c[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) c[i][j] = kInto == Into::kAdd ? V::load(to.c + i * to.ld + j * V::W) : V::zero();
  for (int64_t k = 0; k < K; k++) {
    R bk[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) bk[j] = V::load(b + (k * kVectors + j) * V::W);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) c[i][j] = O::multiply_add(c[i][j], a + i * row + k * step, bk[j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      if (kInto == Into::kLogits) c[i][j] = V::fma(c[i][j], V::set(to.factor), V::load(to.bias + j * V::W));
      V::store(to.c + i * to.ld + j * V::W, c[i][j]);
    }
}

// The last rows of a product, fewer than a tile has.
template <class O, Into kInto, int kRows, int kVectors>
void short_tile(int64_t rows, const typename O::Unit* a, int64_t row, int64_t step, const typename O::Unit* b, int64_t K,
                const Target<typename O::V>& to) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      tile<O, kInto, kRows, kVectors>(a, row, step, b, K, to);
    else
      short_tile<O, kInto, kRows - 1, kVectors>(rows, a, row, step, b, K, to);
  }
}

template <class O, Into kInto, int kRows, int kVectors>
void column_of_tiles(int64_t rows, const typename O::Unit* a, int64_t row, int64_t step, const typename O::Unit* b, int64_t K,
                     Target<typename O::V> to) {
  for (; rows >= kRows; rows -= kRows, a += kRows * row, to.c += kRows * to.ld) tile<O, kInto, kRows, kVectors>(a, row, step, b, K, to);
  if (rows > 0) short_tile<O, kInto, kRows - 1, kVectors>(rows, a, row, step, b, K, to);
}

// c [rows, vectors * W] = a [rows, K] b. A panel of b stays in L1 while a passes.
template <class O, Into kInto>
void product(int64_t rows, const Strided& a, const typename O::Unit* b, int64_t vectors, int64_t K, Target<typename O::V> to) {
  using V = typename O::V;
  const auto* left = static_cast<const typename O::Unit*>(a.data);
  for (int64_t v = 0; v < vectors; v += 2) {
    if (v + 1 < vectors)
      column_of_tiles<O, kInto, V::kTileRows, 2>(rows, left, a.row, a.step, b, K, to);
    else  // twice the rows: a lone vector per row leaves too few independent sums to fill the multipliers
      column_of_tiles<O, kInto, V::kLoneRows, 1>(rows, left, a.row, a.step, b, K, to);
    b += 2 * V::W * K;
    to.c += 2 * V::W;
    if (kInto == Into::kLogits) to.bias += 2 * V::W;
  }
}

// The same where a is read by columns and b is small (a block of rows): here b stays in L1, and a strip of a is read once for all panels.
template <class O, Into kInto>
void product_by_strips(int64_t rows, const Strided& a, const typename O::Unit* b, int64_t vectors, int64_t K, Target<typename O::V> to) {
  constexpr int64_t kRows = O::V::kTileRows;
  for (int64_t i = 0; i < rows; i += kRows) {
    const Strided strip{static_cast<const typename O::Unit*>(a.data) + i * a.row, a.row, a.step};
    Target<typename O::V> part = to;
    part.c += i * to.ld;
    product<O, kInto>(smaller(kRows, rows - i), strip, b, vectors, K, part);
  }
}

}  // namespace
}  // namespace p3b
