// select family on the CPU: ranking tokens, and moving whole rows. Meaning: p3b_ext/reference.py. Letters: csrc/select.h.
#include "../select.h"

#include <cmath>

#include "select_merge.h"

namespace p3b {
namespace {

template <class T>
struct Ranking {
  std::vector<Key<T>> keys;
  std::vector<uint8_t> taken;
};

// emit(b, ranking) for every image: the best `keep` keys come first (sorted where by_score), taken marks their indices.
template <class T, class Emit>
void rank(const char* op, const Tensor& scores, const Scores& s, int64_t keep, bool by_score, const Emit& emit) {
  const T* data = static_cast<const T*>(scores.const_data_ptr());
  const int64_t image_stride = scores.stride(0), stride = scores.stride(1);
  parallel(s.B, grain_of(s.S * 64), [&](int64_t begin, int64_t end) {
    Ranking<T> own;
    own.keys.resize(s.S);
    for (int64_t b = begin; b < end; b++) {
      const T* row = data + b * image_stride;
      for (int64_t i = 0; i < s.S; i++) {
        const T score = row[i * stride];
        P3B_CHECK(!std::isnan(static_cast<acc_t<T>>(score)), op, ": scores must not be NaN, got NaN in image ", b, ", score ", i);
        own.keys[i] = Key<T>::make(score, i);
      }
      take_best(own.keys, keep, own.taken);
      if (by_score) std::sort(own.keys.begin(), own.keys.begin() + keep);
      emit(b, own);
    }
  });
}

Tensor topk_tokens(Tensor scores, int64_t keep, int64_t num_prefix, bool by_score) {
  const char* op = "topk_tokens";
  const Scores s = check_scores(op, scores, "keep", keep, num_prefix);
  const int64_t M = num_prefix + keep;
  Tensor index = torch::stable::new_empty(scores, {s.B, M}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(index.mutable_data_ptr());
  dispatch(scores, [&]<class T>() {
    rank<T>(op, scores, s, keep, by_score, [&](int64_t b, const Ranking<T>& ranking) {
      int64_t* row = out + b * M;
      for (int64_t p = 0; p < num_prefix; p++) *row++ = p;
      if (by_score) {
        for (int64_t i = 0; i < keep; i++) *row++ = num_prefix + ranking.keys[i].index();
      } else {
        for (int64_t i = 0; i < s.S; i++)
          if (ranking.taken[i]) *row++ = num_prefix + i;
      }
    });
  });
  return index;
}

Tensor prune_slots(Tensor scores, int64_t r, int64_t num_prefix, bool by_score) {
  const char* op = "prune_slots";
  const Scores s = check_scores(op, scores, "r", r, num_prefix);
  const int64_t N = num_prefix + s.S, keep = s.S - r;
  Tensor slot = torch::stable::new_empty(scores, {s.B, N}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(slot.mutable_data_ptr());
  dispatch(scores, [&]<class T>() {
    rank<T>(op, scores, s, keep, by_score, [&](int64_t b, const Ranking<T>& ranking) {
      int32_t* slots = out + b * N;
      int32_t row = 0;
      for (int64_t p = 0; p < num_prefix; p++) *slots++ = row++;
      if (by_score) {
        std::fill_n(slots, s.S, -1);
        for (int64_t i = 0; i < keep; i++) slots[ranking.keys[i].index()] = row++;
      } else {
        for (int64_t i = 0; i < s.S; i++) slots[i] = ranking.taken[i] ? row++ : -1;
      }
    });
  });
  return slot;
}

int64_t checked_index(const char* op, const int64_t* index, int64_t b, int64_t M, int64_t m, int64_t N) {
  const int64_t n = index[b * M + m];
  P3B_CHECK(n >= 0 && n < N, op, ": index must be from 0 to ", N - 1, ", got ", n, " in image ", b, ", row ", m);
  return n;
}

Tensor select_tokens(Tensor x, Tensor index) {
  const char* op = "select_tokens";
  const Rows s = check_select(op, x, index);
  Tensor y = empty_rows(x, s.B, s.M, s.C);
  const ArrayIn<int64_t> indices(index);
  dispatch(x, [&]<class T>() {
    const auto source = [&](int64_t b, int64_t m) { return checked_index(op, indices.data, b, s.M, m, s.N); };
    gather_rows(RowsIn<T>(x), s.B, s.M, s.C, source, T(0), static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

Tensor select_tokens_backward(Tensor grad, Tensor index, int64_t num_tokens) {
  const char* op = "select_tokens_backward";
  const Rows s = check_select(op, grad, index, "grad");
  check_size(op, "index", index, 1, grad.size(1));
  P3B_CHECK(num_tokens >= 0, op, ": num_tokens must be at least 0, got ", num_tokens);
  Tensor grad_x = empty_rows(grad, s.B, num_tokens, s.C);
  const ArrayIn<int64_t> indices(index);
  dispatch(grad, [&]<class T>() {
    const RowsIn<T> in(grad);
    T* out = static_cast<T*>(grad_x.mutable_data_ptr());
    const RowKernels& kernels = row_kernels(row_type<T>());
    parallel_images<Groups>(s.B, s.M, s.M * s.C * sizeof(T), [&](Groups& groups, int64_t b, int64_t begin, int64_t end) {
      const int64_t* target = indices.data + b * s.M;
      for (int64_t m = 0; m < s.M; m++) checked_index(op, indices.data, b, s.M, m, num_tokens);
      groups.fill(target, s.M, num_tokens);  // an index that occurs twice collects both gradients, in the order of the rows
      sum_groups<T>(in.image(b), in.row_stride, groups, target, begin, end, nullptr, kernels, out + b * num_tokens * s.C, num_tokens, s.C);
    });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(p3b_ext, CPU, m) {
  m.impl("topk_tokens", TORCH_BOX(&topk_tokens));
  m.impl("prune_slots", TORCH_BOX(&prune_slots));
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("select_tokens_backward", TORCH_BOX(&select_tokens_backward));
}

}  // namespace p3b
