// select family on the CPU: ranking tokens, and moving whole rows. Meaning: p3b_ext/reference.py. Letters: csrc/select.h.
#include "../select.h"

#include <bit>
#include <cmath>

#include "select_merge.h"

namespace p3b {
namespace {

// A score and its index as one number (two for float64): ascending order is descending score, then ascending index.
template <class T>
struct Key {
  uint64_t value;
  uint32_t index() const { return static_cast<uint32_t>(value); }
  bool operator<(const Key& other) const { return value < other.value; }

  static Key make(T score, int64_t index) {
    // + 0 turns -0 into 0, which it equals; flipping the sign bit of positive and all bits of negative numbers orders floats as integers
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(score) + 0.0f);
    const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return {uint64_t{~ascending} << 32 | static_cast<uint32_t>(index)};
  }
};

template <>
struct Key<double> {
  double score;
  uint32_t position;
  uint32_t index() const { return position; }
  bool operator<(const Key& other) const { return score > other.score || (score == other.score && position < other.position); }

  static Key make(double score, int64_t index) { return {score, static_cast<uint32_t>(index)}; }
};

// emit(b, best, count): the indices of the `keep` highest scores of image b, by descending score or by position.
template <class T, class Emit>
void rank(const char* op, const Tensor& scores, const Scores& s, int64_t keep, bool by_score, const Emit& emit) {
  const T* data = static_cast<const T*>(scores.const_data_ptr());
  const int64_t image_stride = scores.stride(0), stride = scores.stride(1);
  parallel(s.B, 4096 / (s.S + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<Key<T>> keys(s.S);
    std::vector<uint32_t> best(keep);
    for (int64_t b = begin; b < end; b++) {
      const T* row = data + b * image_stride;
      for (int64_t i = 0; i < s.S; i++) {
        const T score = row[i * stride];
        P3B_CHECK(!std::isnan(static_cast<acc_t<T>>(score)), op, ": scores must not be NaN, got NaN in image ", b, ", score ", i);
        keys[i] = Key<T>::make(score, i);
      }
      if (keep > 0 && keep < s.S) std::nth_element(keys.begin(), keys.begin() + keep - 1, keys.end());
      if (by_score) std::sort(keys.begin(), keys.begin() + keep);
      for (int64_t i = 0; i < keep; i++) best[i] = keys[i].index();
      if (!by_score) std::sort(best.begin(), best.end());
      emit(b, best.data());
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
    rank<T>(op, scores, s, keep, by_score, [&](int64_t b, const uint32_t* best) {
      for (int64_t p = 0; p < num_prefix; p++) out[b * M + p] = p;
      for (int64_t i = 0; i < keep; i++) out[b * M + num_prefix + i] = num_prefix + best[i];
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
    rank<T>(op, scores, s, keep, by_score, [&](int64_t b, const uint32_t* best) {
      for (int64_t p = 0; p < num_prefix; p++) out[b * N + p] = static_cast<int32_t>(p);
      int32_t* slots = out + b * N + num_prefix;
      std::fill_n(slots, s.S, -1);
      for (int64_t i = 0; i < keep; i++) slots[best[i]] = static_cast<int32_t>(num_prefix + i);
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
  Groups groups(s.B, s.M, num_tokens);  // an index that occurs twice collects both gradients, in the order of the rows
  parallel(s.B, row_grain(s.M * 16), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      for (int64_t m = 0; m < s.M; m++) checked_index(op, indices.data, b, s.M, m, num_tokens);
      groups.fill(b, [&](int64_t m) { return indices.data[b * s.M + m]; });
    }
  });
  dispatch(grad, [&]<class T>() {
    sum_groups<T>(RowsIn<T>(grad), groups, [&](int64_t b, int64_t m) { return indices.data[b * s.M + m]; }, nullptr,
                  static_cast<T*>(grad_x.mutable_data_ptr()), s.C);
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
