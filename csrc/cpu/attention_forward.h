// Attention forward: one task computes a chunk of the query rows of one head, with the side outputs that were asked for.
#pragma once

#include "attention_shared.h"

namespace p3b {
namespace {

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
    if (a.value_square && task.first == 0) value_square(task);  // after the packing, which has brought V into the cache
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

}  // namespace
}  // namespace p3b
