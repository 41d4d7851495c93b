// Masked attention and its gradients as templates over a vector type V (simd.h), an operand type O and a storage type T, so that every
// instruction set runs the same algorithm. Everything here and in those headers has internal linkage: each unit
// that includes this file is compiled for another machine.
//
// One task computes a chunk of the query rows of one head. It packs K and V of the head once, into panels that stay in the L2 cache, and then
// goes through its rows in blocks whose logits [rows, N] stay there too: whole rows, so that the softmax needs no running maximum.
// Masked keys are left out when packing, and everything after it sees a shorter K and V: no -inf, no NaN from 0 * inf.
//
// Logits are kept in units of log 2: s = scale * log2(e) * q.k + log2(size), and p = exp2(s - max).
//
// Every element is summed in an order that depends on the shapes only, never on threads or on the chunk of a row; sums over rows (gradients of
// k, v, gates, sizes) go chunk by chunk, and AttentionArgs::chunks depends on the shapes only where such sums are taken.
//
// attention_products.h: scratch memory, operands, packing, matrix products; attention_shared.h: shapes, tasks, keys, the softmax of a block;
// attention_forward.h, attention_backward.h, attention_columns.h: the three kernels; here: their table.
#pragma once

#include "attention_backward.h"
#include "attention_columns.h"
#include "attention_forward.h"

namespace p3b {
namespace {

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
  static constexpr AttentionKernels kernels = {&forward_scratch, &forward,         &backward_scratch, &backward,
                                               &backward_finish, &columns_scratch, &columns};
};

}  // namespace
}  // namespace p3b
