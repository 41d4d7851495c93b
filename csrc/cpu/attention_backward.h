// Attention backward: gradients of q, k and v, and of sizes and gates where asked for.
#pragma once

#include "attention_shared.h"

namespace p3b {
namespace {

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

}  // namespace
}  // namespace p3b
