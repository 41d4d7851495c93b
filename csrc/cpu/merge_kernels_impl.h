// Bodies of RowKernels as templates over a vector type V (simd.h) and a storage type T, so that every instruction set runs the same algorithm.
// Everything here has internal linkage: each unit that includes this file is compiled for another machine.
#pragma once

#include "merge_kernels.h"
#include "simd.h"

namespace p3b {
namespace {

template <class A>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kMax = __FLT_MAX__, kShrink = 0x1p-80f;  // kShrink: by which even the largest number can be squared
};
template <>
struct Limits<double> {
  static constexpr double kMax = __DBL_MAX__, kShrink = 0x1p-600;
};

template <class V, class T>
typename V::R load_part(const T* p, int64_t n) {
  T part[V::W] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return V::load(part);
}

template <class V, class T>
void store_part(T* p, typename V::R v, int64_t n) {
  T part[V::W];
  V::store(part, v);
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

template <class V, class T>
void weighted_sum(void* y_, const void* x_, int64_t stride, const int32_t* rows, const void* coeff_, int64_t count, int64_t C) {
  constexpr int kUnroll = 4, W = V::W;
  using R = typename V::R;
  const T* x = static_cast<const T*>(x_);
  const auto* coeff = static_cast<const typename V::A*>(coeff_);
  T* y = static_cast<T*>(y_);
  int64_t c = 0;
  for (; c + kUnroll * W <= C; c += kUnroll * W) {
    R sum[kUnroll];
    for (int u = 0; u < kUnroll; u++) sum[u] = V::zero();
    for (int64_t i = 0; i < count; i++) {
      const T* p = x + rows[i] * stride + c;
      const R w = V::set(coeff ? coeff[i] : 1);
      for (int u = 0; u < kUnroll; u++) sum[u] = V::fma(V::load(p + u * W), w, sum[u]);
    }
    for (int u = 0; u < kUnroll; u++) V::store(y + c + u * W, sum[u]);
  }
  for (; c < C; c += W) {
    const int64_t n = C - c < W ? C - c : W;
    R sum = V::zero();
    for (int64_t i = 0; i < count; i++) sum = V::fma(load_part<V>(x + rows[i] * stride + c, n), V::set(coeff ? coeff[i] : 1), sum);
    store_part<V>(y + c, sum, n);
  }
}

template <class V, class T>
double dot_difference(const void* g_, const void* x_, const void* y_, int64_t C) {
  constexpr int W = V::W;
  const T *g = static_cast<const T*>(g_), *x = static_cast<const T*>(x_), *y = static_cast<const T*>(y_);
  typename V::R sum = V::zero();
  for (int64_t c = 0; c < C; c += W) {
    const int64_t n = C - c < W ? C - c : W;
    const bool whole = n == W;
    typename V::R d = whole ? V::load(x + c) : load_part<V>(x + c, n);
    if (y) d = V::sub(d, whole ? V::load(y + c) : load_part<V>(y + c, n));
    sum = V::fma(whole ? V::load(g + c) : load_part<V>(g + c, n), d, sum);
  }
  return V::sum(sum);
}

// out[0..D) = x / max(|x|, 1e-12); false where x is not finite.
template <class V, class T>
bool normalize(const T* x, int64_t D, typename V::A* out) {
  using A = typename V::A;
  using R = typename V::R;
  constexpr int W = V::W;
  R partial[4] = {V::zero(), V::zero(), V::zero(), V::zero()};  // four chains, so that one multiply-add need not wait for the one before
  int64_t c = 0;
  for (; c + 4 * W <= D; c += 4 * W)
    for (int u = 0; u < 4; u++) {
      const R v = V::load(x + c + u * W);
      partial[u] = V::fma(v, v, partial[u]);
    }
  R squares = V::add(V::add(partial[0], partial[1]), V::add(partial[2], partial[3]));
  for (; c < D; c += W) {
    const R v = D - c >= W ? V::load(x + c) : load_part<V>(x + c, D - c);
    squares = V::fma(v, v, squares);
  }
  const A square = V::sum(squares);
  if (!(square <= Limits<A>::kMax)) {  // NaN, infinity, or squares that overflow: look at each, and go on with a smaller x
    for (int64_t d = 0; d < D; d += W) {
      const int64_t n = D - d < W ? D - d : W;
      A v[W];
      V::store(v, load_part<V>(x + d, n));
      for (int64_t i = 0; i < n; i++) {
        if (!(v[i] <= Limits<A>::kMax && v[i] >= -Limits<A>::kMax)) return false;
        out[d + i] = v[i] * Limits<A>::kShrink;
      }
    }
    return normalize<V>(out, D, out);
  }
  A norm = sizeof(A) == 4 ? __builtin_sqrtf(square) : __builtin_sqrt(square);
  if (norm < A(1e-12)) norm = A(1e-12);
  const R divisor = V::set(norm);
  for (int64_t d = 0; d < D; d += W) {
    const int64_t n = D - d < W ? D - d : W;
    // A product with 1 / norm would round x / |x| to less than 1.
    const R unit = V::div(n == W ? V::load(x + d) : load_part<V>(x + d, n), divisor);
    if (n == W)
      V::store(out + d, unit);
    else
      store_part<V>(out + d, unit, n);
  }
  return true;
}

// Scores of kRows sources against kColumns vectors of destinations, and the running maximum over the columns. Every score is one chain of
// multiply-adds over d, whatever its place in the tiles: equal tokens get equal scores, and ties can be settled by index. Column numbers are kept as
// numbers of type A, which holds them exactly up to 2^24.
template <class V, int kRows, int kColumns>
void match_tile(const typename V::A* a, const typename V::A* b, int64_t D, int64_t first_column, int64_t num_columns, typename V::R* best,
                typename V::R* partner) {
  using A = typename V::A;
  using R = typename V::R;
  R score[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; j++) score[i][j] = V::zero();
#pragma GCC unroll 1
  for (int64_t d = 0; d < D; d++) {
    R column[kColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; j++) column[j] = V::load(b + (j * D + d) * V::W);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      const R row = V::set(a[i * D + d]);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; j++) score[i][j] = V::fma(row, column[j], score[i][j]);
    }
  }
  A lanes[V::W];
  for (int l = 0; l < V::W; l++) lanes[l] = A(l);
  const R count = V::set(A(num_columns)), least = V::set(-A(__builtin_inf()));
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; j++) {
    const R index = V::add(V::set(A(first_column + j * V::W)), V::load(lanes));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      const R valid = V::where_less(index, count, score[i][j], least);  // columns of padding have score 0
      partner[i] = V::where_less(best[i], valid, index, partner[i]);
      best[i] = V::max(valid, best[i]);
    }
  }
}

// The columns from first_column on, kColumns vectors at a time and the rest in narrower tiles.
template <class V, int kRows, int kColumns>
void match_tiles(const typename V::A* a, const typename V::A* columns, int64_t D, int64_t first_column, int64_t num_columns, typename V::R* best,
                 typename V::R* partner) {
  int64_t j = first_column;
  for (; j + (kColumns - 1) * V::W < num_columns; j += kColumns * V::W)
    match_tile<V, kRows, kColumns>(a, columns + j * D, D, j, num_columns, best, partner);
  if constexpr (kColumns > 1)
    if (j < num_columns) match_tiles<V, kRows, kColumns - 1>(a, columns, D, j, num_columns, best, partner);
}

// Where the pieces of match()'s scratch memory begin, in numbers of type A: rows [num_sources, D] row by row, columns [num_destinations / W][D][W],
// so that one load fetches W destinations, and a block [W, padded_D] of destinations on their way into columns.
template <class V, int kRows>
struct MatchScratch {
  static constexpr int64_t kLine = 64 / sizeof(typename V::A);
  int64_t padded_D, rows, block, end;

  MatchScratch(int64_t D, int64_t num_sources, int64_t num_destinations) {
    padded_D = round_up(D, V::W);
    rows = round_up(round_up(num_destinations, V::W) * D, kLine);
    block = rows + round_up(round_up(num_sources, kRows) * D, kLine);
    end = block + V::W * padded_D;
  }
};

template <class V, int kRows>
int64_t match_scratch(int64_t D, int64_t num_sources, int64_t num_destinations) {
  return MatchScratch<V, kRows>(D, num_sources, num_destinations).end * int64_t(sizeof(typename V::A));
}

template <class V, class T, int kRows, int kColumns>
int64_t match(const void* x_, int64_t stride, int64_t D, const int32_t* sources, int64_t num_sources, const int32_t* destinations,
              int64_t num_destinations, void* best_, int32_t* partner, void* scratch) {
  using A = typename V::A;
  using R = typename V::R;
  constexpr int W = V::W;
  const T* x = static_cast<const T*>(x_);
  A* best = static_cast<A*>(best_);
  const MatchScratch<V, kRows> at(D, num_sources, num_destinations);
  A* const columns = static_cast<A*>(scratch);
  A* const rows = columns + at.rows;
  A* const block = columns + at.block;
  for (int64_t i = 0; i < num_sources; i++)
    if (!normalize<V>(x + sources[i] * stride, D, rows + i * D)) return sources[i];
  for (int64_t i = num_sources * D; i < round_up(num_sources, kRows) * D; i++) rows[i] = 0;
  for (int64_t i = 0; i < W * at.padded_D; i++) block[i] = 0;
  for (int64_t j = 0; j < num_destinations; j += W) {
    for (int64_t l = 0; l < W; l++) {
      if (j + l < num_destinations) {
        if (!normalize<V>(x + destinations[j + l] * stride, D, block + l * at.padded_D)) return destinations[j + l];
      } else {
        for (int64_t d = 0; d < D; d++) block[l * at.padded_D + d] = 0;
      }
    }
    A* const out = columns + j * D;
    for (int64_t d = 0; d < D; d += W) {
      R r[W];
      for (int64_t l = 0; l < W; l++) r[l] = V::load(block + l * at.padded_D + d);
      V::transpose(r);
      for (int64_t l = 0; l < W && d + l < D; l++) V::store(out + (d + l) * W, r[l]);
    }
  }
  for (int64_t i = 0; i < num_sources; i += kRows) {
    R value[kRows], index[kRows];
    for (int k = 0; k < kRows; k++) {
      value[k] = V::set(-A(__builtin_inf()));
      index[k] = V::zero();
    }
    match_tiles<V, kRows, kColumns>(rows + i * D, columns, D, 0, num_destinations, value, index);
    for (int k = 0; k < kRows && i + k < num_sources; k++) {
      A v[W], columns_of[W];
      V::store(v, value[k]);
      V::store(columns_of, index[k]);
      A highest = v[0], column = columns_of[0];
      for (int l = 1; l < W; l++)
        if (v[l] > highest || (v[l] == highest && columns_of[l] < column)) {
          highest = v[l];
          column = columns_of[l];
        }
      best[i + k] = highest;
      partner[i + k] = int32_t(column);
    }
  }
  return -1;
}

// kRows x kColumns vectors of scores are held in registers.
template <class V, class T, int kRows, int kColumns>
constexpr RowKernels make_row_kernels() {
  return {&weighted_sum<V, T>, &dot_difference<V, T>, &match<V, T, kRows, kColumns>, &match_scratch<V, kRows>};
}

}  // namespace
}  // namespace p3b
