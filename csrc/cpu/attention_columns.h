// Columns of the attention matrix: each query's attention to key 0, and the attention that each key receives.
#pragma once

#include "attention_shared.h"

namespace p3b {
namespace {

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

}  // namespace
}  // namespace p3b
