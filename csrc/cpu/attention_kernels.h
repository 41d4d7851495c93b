// Masked attention and its gradients as templates over a vector type V (simd.h), an operand type O and a storage type T, so that every
// instruction set runs the same algorithm. Everything here has internal linkage: each unit that includes this file is compiled for another machine.
//
// One task computes a chunk of the query rows of one head. It packs K and V of the head once, into panels that stay in the L2 cache, and then
// goes through its rows in blocks whose logits [rows, N] stay there too: whole rows, so that the softmax needs no running maximum.
// Masked keys are left out when packing, and everything behind it sees a shorter K and V: no -inf, no NaN from 0 * inf.
//
// Logits are kept in units of log 2: s = scale * log2(e) * q.k + log2(size), and p = exp2(s - max).
//
// Every element is summed in an order that depends on the shapes only, never on threads or on the chunk of a row; sums over rows (gradients of
// k, v, gates, sizes) go chunk by chunk, and AttentionArgs::chunks depends on the shapes only where such sums are taken.
#pragma once

#include "attention_args.h"
#include "simd.h"

namespace p3b {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Rows of queries in a block. On a Zen 3 (512 KiB of L2 per core) 24 to 96 rows were within 2 % of each other at N = 197; above N = 1024 fewer
// rows keep the block of logits in L2, and below 24 rows K and V come from L3 too often.
constexpr int64_t kBlockRows = 48, kMinBlockRows = 24, kBlockFloats = 48 * 1024;

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

// ---- what forward, backward and columns share -------------------------------------------------------------------------------------------------

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

// ---- forward ----------------------------------------------------------------------------------------------------------------------------------

template <class O, class T>
struct Forward {
  using V = typename O::V;
  using A = typename V::A;
  using Unit = typename O::Unit;

  const AttentionArgs& a;
  const Shape<O> shape;
  int32_t* index;
  A *bias, *s, *o, *max, *sum, *weighted;
  Unit *k, *v, *q, *p;
  size_t bytes;

  Forward(const AttentionArgs& args, void* scratch) : a(args), shape(args) {
    Arena arena{static_cast<char*>(scratch)};
    index = arena.take<int32_t>(a.N + 1);
    bias = arena.take<A>(shape.N_row);
    k = arena.take<Unit>(shape.D_units * round_up(a.N, V::W));
    v = arena.take<Unit>(units<O>(a.N) * shape.D_row);
    q = arena.take<Unit>(shape.block * shape.D_row);
    s = arena.take<A>(shape.block * shape.N_row);
    p = arena.take<Unit>(O::kPack > 1 ? shape.block * shape.N_row : 0);
    o = arena.take<A>(shape.block * shape.D_row);
    max = arena.take<A>(shape.block + V::W);
    sum = arena.take<A>(shape.block + V::W);
    weighted = arena.take<A>(shape.block + V::W);
    bytes = arena.used;
  }

  void run(int64_t number) {
    const Task task(a, number, V::kTileRows);
    if (task.first == task.last) return;
    const int64_t kept = kept_keys(a, task.b, index);
    if (kept > 0) pack(task, kept);
    if (a.value_square && task.first == 0) value_square(task);  // behind the packing, which has brought V into the cache
    if (kept == 0) return no_keys(task);
    const int64_t rows = task.last - task.first, blocks = (rows + shape.block - 1) / shape.block;
    const int64_t per_block = round_up((rows + blocks - 1) / blocks, V::kTileRows);
    for (int64_t row = task.first; row < task.last; row += per_block) block(task, row, smaller(per_block, task.last - row), kept);
  }

  void pack(const Task& task, int64_t kept) {
    key_bias<V>(a, task.b, index, kept, bias);
    const A* gate = gate_of<A>(a, task.h);
    pack_transposed<O>(Rows<T, A>{head_of<T>(a.k, task.b, task.h), a.k.token, index, gate, nullptr}, kept, a.D, k);
    pack_panels<O>(Rows<T, A>{head_of<T>(a.v, task.b, task.h), a.v.token, index, gate, nullptr}, kept, a.D, v);
  }

  void block(const Task& task, int64_t first, int64_t rows, int64_t kept) {
    const int64_t vectors = (kept + V::W - 1) / V::W;
    const Rows<T, A> queries{head_of<T>(a.q, task.b, task.h) + first * a.q.token, a.q.token, nullptr, gate_of<A>(a, task.h), nullptr};
    O::pack_rows(queries, rows, a.D, q, shape.D_row);
    product<O, Into::kLogits>(rows, Strided{q, shape.D_row, 1}, k, vectors, shape.D_units, {s, shape.N_row, bias, A(a.scale * kLog2e)});
    const auto keep = [&](int64_t i, const RowSums<A>& sums) {
      max[i] = sums.max;
      sum[i] = sums.sum;
      weighted[i] = sums.weighted;
    };
    if (a.entropy)
      exponentiate_rows<V, true>(s, shape.N_row, rows, vectors, keep);
    else
      exponentiate_rows<V, false>(s, shape.N_row, rows, vectors, keep);
    product<O, Into::kStore>(rows, O::by_row(s, shape.N_row, rows, kept, p), v, shape.D_vectors, units<O>(kept), {o, shape.D_row, nullptr, 0});
    store(task, first, rows);
    if (a.cls_attention && first == 0) cls_attention(task, kept);
  }

  void store(const Task& task, int64_t first, int64_t rows) {
    const int64_t at = task.head_index * a.N + first;
    for (int64_t i = 0; i < rows; i++) {
      const typename V::R inverse = V::set(1 / sum[i]);
      store_row<V>(head_of<T>(a.out, task.b, task.h) + (first + i) * a.out.token, a.D,
                   [&](int64_t d) { return V::mul(V::load(o + i * shape.D_row + d), inverse); });
    }
    // lse = ln 2 (max + log2 sum); entropy = lse - sum_j p_j s_j = ln 2 (log2 sum - weighted / sum), both 0 at one key up to rounding.
    for (int64_t i = 0; i < rows; i += V::W) {
      const typename V::R total = V::load(sum + i), log = V::log2(total), ln2 = V::set(A(kLn2));
      store_some(static_cast<A*>(a.lse) + at + i, rows - i, V::mul(ln2, V::add(V::load(max + i), log)));
      if (a.entropy)
        store_some(static_cast<A*>(a.entropy) + at + i, rows - i, V::max(V::zero(), V::mul(ln2, V::sub(log, V::div(V::load(weighted + i), total)))));
    }
  }

  static void store_some(A* to, int64_t count, typename V::R r) {
    A lanes[V::W];
    V::store(lanes, r);
    for (int64_t i = 0; i < smaller(count, V::W); i++) to[i] = lanes[i];
  }

  void cls_attention(const Task& task, int64_t kept) {
    A* to = static_cast<A*>(a.cls_attention) + task.head_index * a.N;
    if (kept < a.N) __builtin_memset(to, 0, size_t(a.N) * sizeof(A));
    for (int64_t j = 0; j < kept; j++) to[index[j]] = s[j] / sum[0];
  }

  void value_square(const Task& task) {
    const Rows<T, A> values{head_of<T>(a.v, task.b, task.h), a.v.token, nullptr, gate_of<A>(a, task.h), nullptr};
    A* to = static_cast<A*>(a.value_square) + task.head_index * a.N;
    for (int64_t n = 0; n < a.N; n++) {
      typename V::R square = V::zero();
      for (int64_t d = 0; d < a.D; d += V::W) {
        const typename V::R x = channels<V>(values, n, d, a.D);
        square = V::fma(x, x, square);
      }
      to[n] = V::sum(square);
    }
  }

  void no_keys(const Task& task) {
    for (int64_t n = task.first; n < task.last; n++) {
      store_row<V>(head_of<T>(a.out, task.b, task.h) + n * a.out.token, a.D, [](int64_t) { return V::zero(); });
      static_cast<A*>(a.lse)[task.head_index * a.N + n] = -__builtin_inf();
      if (a.entropy) static_cast<A*>(a.entropy)[task.head_index * a.N + n] = 0;
      if (a.cls_attention) static_cast<A*>(a.cls_attention)[task.head_index * a.N + n] = 0;
    }
  }
};

// ---- backward ---------------------------------------------------------------------------------------------------------------------------------

// dS = P (dP - rowsum(P dP)) with P recomputed, maximum and all: from a rounded lse, logits of 1e4 would cost P three digits. The row sum could be
// had from the output, rowsum(dO O), but not to more digits than a bfloat16 output has; taking it from P and dP costs no more than reading dO and O.
// P stays undivided by its row sum; the division goes into dO for dV and into dP for dS.
template <class O, class T>
struct Backward {
  using V = typename O::V;
  using A = typename V::A;
  using Unit = typename O::Unit;

  const AttentionArgs& a;
  const Shape<O> shape;
  int32_t* index;
  A *bias, *s, *ds, *dq, *dk, *dv, *inverse, *size_sum, *gate_sum;
  Unit *kt, *vt, *k, *q_rows, *q_panels, *do_rows, *do_panels, *left;
  size_t bytes;

  Backward(const AttentionArgs& args, void* scratch) : a(args), shape(args) {
    Arena arena{static_cast<char*>(scratch)};
    const int64_t keys = round_up(a.N, V::W);
    index = arena.take<int32_t>(a.N + 1);
    bias = arena.take<A>(shape.N_row);
    kt = arena.take<Unit>(shape.D_units * keys);
    vt = arena.take<Unit>(shape.D_units * keys);
    k = arena.take<Unit>(units<O>(a.N) * shape.D_row);
    q_rows = arena.take<Unit>(shape.block * shape.D_row);
    q_panels = arena.take<Unit>(shape.block * shape.D_row);
    do_rows = arena.take<Unit>(shape.block * shape.D_row);
    do_panels = arena.take<Unit>(shape.block * shape.D_row);
    s = arena.take<A>(shape.block * shape.N_row);
    ds = arena.take<A>(shape.block * shape.N_row);
    left = arena.take<Unit>(O::kPack > 1 ? shape.block * shape.N_row : 0);
    dq = arena.take<A>(shape.block * shape.D_row);
    inverse = arena.take<A>(shape.block);
    size_sum = arena.take<A>(shape.N_row);
    gate_sum = arena.take<A>(shape.D_row);
    dk = a.grad_kv_partial ? nullptr : arena.take<A>(a.N * shape.D_row);
    dv = a.grad_kv_partial ? nullptr : arena.take<A>(a.N * shape.D_row);
    bytes = arena.used;
  }

  void run(int64_t number) {
    const Task task(a, number, V::kTileRows);
    const int64_t kept = kept_keys(a, task.b, index);
    if (a.grad_kv_partial) {
      dk = static_cast<A*>(a.grad_kv_partial) + number * 2 * a.N * shape.D_row;
      dv = dk + a.N * shape.D_row;
    }
    clear(dk, kept * shape.D_row);
    clear(dv, kept * shape.D_row);
    clear(size_sum, shape.N_row);
    clear(gate_sum, shape.D_row);
    if (kept == 0)
      no_keys(task);
    else
      query_rows(task, kept);
    if (a.grad_size_partial) scatter_sizes(static_cast<A*>(a.grad_size_partial) + number * a.N, kept);
    if (a.grad_gate_partial) copy_gate(task.head_index, number % a.chunks);
    if (a.chunks == 1) write_keys(task, kept);
  }

  // Sums the chunks of a head in their order.
  void finish(int64_t head) {
    const Task task(a, head * a.chunks, V::kTileRows);
    const int64_t kept = kept_keys(a, task.b, index), both = 2 * a.N * shape.D_row;
    dk = static_cast<A*>(a.grad_kv_partial) + head * a.chunks * both;
    dv = dk + a.N * shape.D_row;
    for (int64_t chunk = 1; chunk < a.chunks; chunk++) {
      add_to(dk, dk + chunk * both, kept * shape.D_row);
      add_to(dv, dv + chunk * both, kept * shape.D_row);
    }
    write_keys(task, kept);
  }

 private:
  static void add_to(A* sum, const A* x, int64_t count) {
    for (int64_t i = 0; i < count; i += V::W) V::store(sum + i, V::add(V::load(sum + i), V::load(x + i)));
  }

  static void clear(A* x, int64_t count) { __builtin_memset(x, 0, size_t(count) * sizeof(A)); }

  void query_rows(const Task& task, int64_t kept) {
    key_bias<V>(a, task.b, index, kept, bias);
    const A* gate = gate_of<A>(a, task.h);
    const Rows<T, A> keys{head_of<T>(a.k, task.b, task.h), a.k.token, index, gate, nullptr};
    const Rows<T, A> values{head_of<T>(a.v, task.b, task.h), a.v.token, index, gate, nullptr};
    pack_transposed<O>(keys, kept, a.D, kt);
    pack_transposed<O>(values, kept, a.D, vt);
    pack_panels<O>(keys, kept, a.D, k);
    for (int64_t row = task.first; row < task.last; row += shape.block) block(task, row, smaller(shape.block, task.last - row), kept);
  }

  void block(const Task& task, int64_t first, int64_t rows, int64_t kept) {
    const int64_t vectors = (kept + V::W - 1) / V::W, ld = shape.N_row;
    const Rows<T, A> queries{head_of<T>(a.q, task.b, task.h) + first * a.q.token, a.q.token, nullptr, gate_of<A>(a, task.h), nullptr};
    Rows<T, A> grads{head_of<T>(a.grad_out, task.b, task.h) + first * a.grad_out.token, a.grad_out.token, nullptr, nullptr, nullptr};
    O::pack_rows(queries, rows, a.D, q_rows, shape.D_row);
    pack_panels<O>(queries, rows, a.D, q_panels);
    O::pack_rows(grads, rows, a.D, do_rows, shape.D_row);
    product<O, Into::kLogits>(rows, Strided{q_rows, shape.D_row, 1}, kt, vectors, shape.D_units, {s, ld, bias, A(a.scale * kLog2e)});
    product<O, Into::kStore>(rows, Strided{do_rows, shape.D_row, 1}, vt, vectors, shape.D_units, {ds, ld, nullptr, 0});
    exponentiate_rows<V, false>(s, ld, rows, vectors, [&](int64_t i, const RowSums<A>& sums) { inverse[i] = 1 / sums.sum; });
    for (int64_t i = 0; i < rows; i++) logit_grads(s + i * ld, ds + i * ld, vectors, inverse[i]);
    if (a.grad_size_partial) sum_columns(rows, vectors);
    grads.scale = inverse;
    pack_panels<O>(grads, rows, a.D, do_panels);

    const Target<V> to_dk{dk, shape.D_row, nullptr, 0}, to_dv{dv, shape.D_row, nullptr, 0}, to_dq{dq, shape.D_row, nullptr, 0};
    product_by_strips<O, Into::kAdd>(kept, O::by_column(s, ld, rows, kept, left), do_panels, shape.D_vectors, units<O>(rows), to_dv);
    product_by_strips<O, Into::kAdd>(kept, O::by_column(ds, ld, rows, kept, left), q_panels, shape.D_vectors, units<O>(rows), to_dk);
    product<O, Into::kStore>(rows, O::by_row(ds, ld, rows, kept, left), k, shape.D_vectors, units<O>(kept), to_dq);
    for (int64_t i = 0; i < rows; i++)
      write_grad(head_of<T>(a.grad_q, task.b, task.h) + (first + i) * a.grad_q.token, head_of<T>(a.q, task.b, task.h) + (first + i) * a.q.token,
                 dq + i * shape.D_row, gate_of<A>(a, task.h), A(a.scale));
  }

  // A row of dP becomes dS. Columns of padding have p = 0.
  static void logit_grads(const A* p, A* ds, int64_t vectors, A inverse) {
    using R = typename V::R;
    R sum0 = V::zero(), sum1 = V::zero();
    int64_t v = 0;
    for (; v + 1 < vectors; v += 2) {
      sum0 = V::fma(V::load(p + v * V::W), V::load(ds + v * V::W), sum0);
      sum1 = V::fma(V::load(p + (v + 1) * V::W), V::load(ds + (v + 1) * V::W), sum1);
    }
    if (v < vectors) sum0 = V::fma(V::load(p + v * V::W), V::load(ds + v * V::W), sum0);
    const R scale = V::set(inverse), mean = V::set(-inverse * V::sum(V::add(sum0, sum1)));
    for (v = 0; v < vectors; v++) {
      const R shifted = V::mul(scale, V::add(V::load(ds + v * V::W), mean));
      V::store(ds + v * V::W, V::mul(V::load(p + v * V::W), shifted));
    }
  }

  // Columns of dS summed for the gradient of the sizes.
  void sum_columns(int64_t rows, int64_t vectors) {
    const int64_t ld = shape.N_row;
    for (int64_t v = 0; v < vectors; v++) {
      typename V::R sum = V::load(size_sum + v * V::W);
      for (int64_t i = 0; i < rows; i++) sum = V::add(sum, V::load(ds + i * ld + v * V::W));
      V::store(size_sum + v * V::W, sum);
    }
  }

  // grad = gate * factor * sums; gate_sum += x * factor * sums, where x is the row as it was given.
  void write_grad(T* grad, const T* x, const A* sums, const A* gate, A factor) {
    const Rows<T, A> given{x, 0, nullptr, nullptr, nullptr};
    const typename V::R f = V::set(factor);
    store_row<V>(grad, a.D, [&](int64_t d) {
      const typename V::R g = V::mul(V::load(sums + d), f);
      if (!gate) return g;
      V::store(gate_sum + d, V::fma(channels<V>(given, 0, d, a.D), g, V::load(gate_sum + d)));
      return V::mul(g, V::load(gate + d));
    });
  }

  void write_keys(const Task& task, int64_t kept) {
    clear(gate_sum, shape.D_row);
    const A* gate = gate_of<A>(a, task.h);
    T *grad_k = head_of<T>(a.grad_k, task.b, task.h), *grad_v = head_of<T>(a.grad_v, task.b, task.h);
    const T *k_row = head_of<T>(a.k, task.b, task.h), *v_row = head_of<T>(a.v, task.b, task.h);
    for (int64_t j = 0, n = 0; n < a.N; n++) {
      const bool masked = j == kept || index[j] != n;
      if (masked) {
        zero_row(grad_k + n * a.grad_k.token);
        zero_row(grad_v + n * a.grad_v.token);
      } else {
        write_grad(grad_k + n * a.grad_k.token, k_row + n * a.k.token, dk + j * shape.D_row, gate, A(a.scale));
        write_grad(grad_v + n * a.grad_v.token, v_row + n * a.v.token, dv + j * shape.D_row, gate, A(1));
        j++;
      }
    }
    if (a.grad_gate_partial) copy_gate(task.head_index, a.chunks);
  }

  void zero_row(T* to) {
    store_row<V>(to, a.D, [](int64_t) { return V::zero(); });
  }

  void no_keys(const Task& task) {
    for (int64_t n = task.first; n < task.last; n++) zero_row(head_of<T>(a.grad_q, task.b, task.h) + n * a.grad_q.token);
  }

  void scatter_sizes(A* to, int64_t kept) {
    clear(to, a.N);
    for (int64_t j = 0; j < kept; j++) to[index[j]] = size_sum[j];
  }

  void copy_gate(int64_t head, int64_t part) {
    A* to = static_cast<A*>(a.grad_gate_partial) + (head * (a.chunks + 1) + part) * a.gate_row;
    for (int64_t d = 0; d < a.D; d++) to[d] = gate_sum[d];
  }
};

// ---- columns ----------------------------------------------------------------------------------------------------------------------------------

template <class O, class T>
struct ColumnSums {
  using V = typename O::V;
  using A = typename V::A;
  using Unit = typename O::Unit;

  const AttentionArgs& a;
  const Shape<O> shape;
  int32_t* index;
  A *bias, *s, *received;
  Unit *k, *q;
  size_t bytes;

  ColumnSums(const AttentionArgs& args, void* scratch) : a(args), shape(args) {
    Arena arena{static_cast<char*>(scratch)};
    index = arena.take<int32_t>(a.N + 1);
    bias = arena.take<A>(shape.N_row);
    received = arena.take<A>(shape.N_row);
    k = arena.take<Unit>(shape.D_units * round_up(a.N, V::W));
    q = arena.take<Unit>(shape.block * shape.D_row);
    s = arena.take<A>(shape.block * shape.N_row);
    bytes = arena.used;
  }

  void run(int64_t number) {
    const Task task(a, number, V::kTileRows);
    int64_t kept = kept_keys(a, task.b, index);
    const bool cls_kept = kept > 0 && index[0] == 0;
    __builtin_memset(received, 0, size_t(shape.N_row) * sizeof(A));
    if (a.to_cls && !cls_kept)
      for (int64_t n = task.first; n < task.last; n++) static_cast<A*>(a.to_cls)[task.head_index * a.N + n] = 0;
    const bool only_cls = !a.received_partial;
    if (only_cls) kept = cls_kept;  // with the saved lse, column 0 needs key 0 alone
    if (kept > 0) {
      key_bias<V>(a, task.b, index, kept, bias);
      pack_transposed<O>(Rows<T, A>{head_of<T>(a.k, task.b, task.h), a.k.token, index, gate_of<A>(a, task.h), nullptr}, kept, a.D, k);
      for (int64_t row = task.first; row < task.last; row += shape.block)
        block(task, row, smaller(shape.block, task.last - row), kept, cls_kept, only_cls);
    }
    if (only_cls) return;
    A* to = static_cast<A*>(a.received_partial) + number * a.N;
    __builtin_memset(to, 0, size_t(a.N) * sizeof(A));
    for (int64_t j = 0; j < kept; j++) to[index[j]] = received[j];
  }

  void block(const Task& task, int64_t first, int64_t rows, int64_t kept, bool cls_kept, bool only_cls) {
    const int64_t vectors = (kept + V::W - 1) / V::W, ld = shape.N_row, at = task.head_index * a.N + first;
    const Rows<T, A> queries{head_of<T>(a.q, task.b, task.h) + first * a.q.token, a.q.token, nullptr, gate_of<A>(a, task.h), nullptr};
    O::pack_rows(queries, rows, a.D, q, shape.D_row);
    product<O, Into::kLogits>(rows, Strided{q, shape.D_row, 1}, k, vectors, shape.D_units, {s, ld, bias, A(a.scale * kLog2e)});
    for (int64_t i = 0; i < rows; i++) {
      A* row = s + i * ld;
      if (only_cls) {
        const typename V::R x = V::sub(V::load(row), V::set(static_cast<const A*>(a.saved_lse)[at + i] * A(kLog2e)));
        V::store(row, V::exp2(V::max(V::set(V::kLeastExponent), x)));
      } else {
        const typename V::R inverse = V::set(1 / exponentiate<V, false>(row, vectors, row_max<V>(row, vectors)).sum);
        for (int64_t v = 0; v < vectors; v++) V::store(row + v * V::W, V::mul(V::load(row + v * V::W), inverse));
      }
      if (a.to_cls && cls_kept) static_cast<A*>(a.to_cls)[at + i] = row[0];
    }
    if (only_cls) return;
    for (int64_t v = 0; v < vectors; v++) {
      typename V::R sum = V::load(received + v * V::W);
      for (int64_t i = 0; i < rows; i++) sum = V::add(sum, V::load(s + i * ld + v * V::W));
      V::store(received + v * V::W, sum);
    }
  }
};

// ---- tables -----------------------------------------------------------------------------------------------------------------------------------

// The kernels for operands O and storage T.
template <class O, class T>
struct Table {
  static size_t forward_scratch(const AttentionArgs& a) { return Forward<O, T>(a, nullptr).bytes; }
  static void forward(const AttentionArgs& a, int64_t task, void* scratch) { Forward<O, T>(a, scratch).run(task); }
  static size_t backward_scratch(const AttentionArgs& a) { return Backward<O, T>(a, nullptr).bytes; }
  static void backward(const AttentionArgs& a, int64_t task, void* scratch) { Backward<O, T>(a, scratch).run(task); }
  static void backward_finish(const AttentionArgs& a, int64_t head, void* scratch) { Backward<O, T>(a, scratch).finish(head); }
  static size_t columns_scratch(const AttentionArgs& a) { return ColumnSums<O, T>(a, nullptr).bytes; }
  static void columns(const AttentionArgs& a, int64_t task, void* scratch) { ColumnSums<O, T>(a, scratch).run(task); }
  static constexpr AttentionKernels kernels = {O::V::kTileRows, &forward_scratch, &forward,         &backward_scratch,
                                               &backward,       &backward_finish, &columns_scratch, &columns};
};

}  // namespace
}  // namespace p3b
