// What the attention's forward, backward and columns share: shapes of a call in vectors, one task's rows, masks, sizes, softmax of a block of rows.
#pragma once

#include "attention_args.h"
#include "attention_products.h"

namespace p3b {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Rows of queries in a block. On a Zen 3 (512 KiB of L2 per core) 24 to 96 rows were within 2 % of each other at N = 197; above N = 1024 fewer
// rows keep the block of logits in L2, and below 24 rows K and V come from L3 too often.
constexpr int64_t kBlockRows = 48, kMinBlockRows = 24, kBlockFloats = 48 * 1024;

template <class O>
struct Shape {
  using V = typename O::V;
  int64_t D_units, D_row, D_vectors;  // channels in units; accumulator rows; vectors
  int64_t N_row;                      // row of logits, an odd number of cache lines: rows 2^k apart would share few sets of L1
  int64_t block;                      // query rows per block

  explicit Shape(const AttentionArgs& a) {
    D_units = units<O>(a.D);
    D_vectors = (a.D + V::W - 1) / V::W;
    D_row = D_vectors * V::W;
    const int64_t line = 64 / sizeof(typename V::A), lines = (round_up(a.N, V::W) + line - 1) / line;
    N_row = (lines + (lines % 2 == 0)) * line;
    block = round_up(smaller(kBlockRows, larger(kMinBlockRows, kBlockFloats / N_row)), V::kTileRows);
    block = smaller(block, round_up(a.N, V::kTileRows));
  }
};

struct Task {
  int64_t head_index, b, h, first, last;  // query rows [first, last)

  Task(const AttentionArgs& a, int64_t task, int64_t tile_rows) {
    head_index = task / a.chunks;
    b = head_index / a.H;
    h = head_index % a.H;
    const int64_t tiles = (a.N + tile_rows - 1) / tile_rows, per_chunk = (tiles + a.chunks - 1) / a.chunks * tile_rows;
    first = smaller(a.N, task % a.chunks * per_chunk);
    last = smaller(a.N, first + per_chunk);
  }
};

template <class T>
T* head_of(const Heads& x, int64_t b, int64_t h) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head;
}

template <class A>
const A* gate_of(const AttentionArgs& a, int64_t h) {
  return a.gate ? static_cast<const A*>(a.gate) + h * a.gate_head : nullptr;
}

// Positions of the keys that may be attended.
inline int64_t kept_keys(const AttentionArgs& a, int64_t b, int32_t* index) {
  int64_t kept = 0;
  for (int64_t n = 0; n < a.N; n++) {
    index[kept] = int32_t(n);
    kept += !a.key_mask || a.key_mask[b * a.mask_batch + n * a.mask_token];
  }
  return kept;
}

// log2(size) of the kept keys, -inf in the rest of the last vector: columns of padding get weight 0 without being asked about again.
template <class V>
void key_bias(const AttentionArgs& a, int64_t b, const int32_t* index, int64_t kept, typename V::A* bias) {
  const auto* sizes = static_cast<const typename V::A*>(a.bias);
  for (int64_t j = 0; j < kept; j++) bias[j] = sizes ? sizes[b * a.N + index[j]] : 0;
  for (int64_t j = kept; j < round_up(kept, V::W); j++) bias[j] = -__builtin_inf();
}

template <class A>
struct RowSums {
  A max, sum, weighted;  // of s, of p, and of p * (s - max)
};

template <class V>
typename V::A row_max(const typename V::A* s, int64_t vectors) {
  typename V::R m0 = V::load(s), m1 = m0;
  int64_t v = 1;
  for (; v + 1 < vectors; v += 2) {
    m0 = V::max(m0, V::load(s + v * V::W));
    m1 = V::max(m1, V::load(s + (v + 1) * V::W));
  }
  if (v < vectors) m0 = V::max(m0, V::load(s + v * V::W));
  return V::max(V::max(m0, m1));
}

// A row of logits becomes p = exp2(s - max), not yet divided by its sum. A NaN stays NaN.
template <class V, bool kWeighted>
RowSums<typename V::A> exponentiate(typename V::A* s, int64_t vectors, typename V::A row_maximum) {
  using R = typename V::R;
  const R max = V::set(row_maximum), least = V::set(V::kLeastExponent);
  R sum0 = V::zero(), sum1 = V::zero(), weighted0 = V::zero(), weighted1 = V::zero();
  const auto step = [&](int64_t v, R& sum, R& weighted) {
    const R x = V::max(least, V::sub(V::load(s + v * V::W), max)), p = V::exp2(x);
    V::store(s + v * V::W, p);
    sum = V::add(sum, p);
    if (kWeighted) weighted = V::fma(p, x, weighted);
  };
  int64_t v = 0;
  for (; v + 1 < vectors; v += 2) {
    step(v, sum0, weighted0);
    step(v + 1, sum1, weighted1);
  }
  if (v < vectors) step(v, sum0, weighted0);
  return {row_maximum, V::sum(V::add(sum0, sum1)), kWeighted ? V::sum(V::add(weighted0, weighted1)) : 0};
}

// Rows of a block. The maxima of some rows come first: the wait for one row's maximum, then its exponentials, would leave the multipliers idle.
template <class V, bool kWeighted, class Store>
void exponentiate_rows(typename V::A* s, int64_t ld, int64_t rows, int64_t vectors, Store store) {
  constexpr int64_t kAhead = 8;
  typename V::A max[kAhead];
  for (int64_t first = 0; first < rows; first += kAhead) {
    const int64_t count = smaller(kAhead, rows - first);
    for (int64_t i = 0; i < count; i++) max[i] = row_max<V>(s + (first + i) * ld, vectors);
    for (int64_t i = 0; i < count; i++) store(first + i, exponentiate<V, kWeighted>(s + (first + i) * ld, vectors, max[i]));
  }
}

// Stores channels [0, D) of a row.
template <class V, class T, class Channel>
void store_row(T* to, int64_t D, Channel channel) {
  for (int64_t d = 0; d < D; d += V::W) {
    const typename V::R r = channel(d);
    if (d + V::W <= D) {
      V::store(to + d, r);
    } else {
      T tail[V::W];
      V::store(tail, r);
      for (int64_t c = d; c < D; c++) to[c] = tail[c - d];
    }
  }
}

}  // namespace
}  // namespace p3b
