// What the select and merge families share on a CPU: tensors seen as rows, rows grouped by the output row they go to, and loops that may throw.
// Letters: B batch, N rows in, M rows out, C channels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <vector>

#include "../checks.h"
#include "memory.h"
#include "merge_kernels.h"

namespace p3b {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// body(begin, end) over [0, count) in parallel. An exception must not cross the C ABI of torch::stable::parallel_for, so it is carried over; of
// several, that of the lowest range is kept, which is the first bad element for every thread count as long as body goes upwards.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  std::mutex mutex;
  std::exception_ptr error;
  int64_t error_begin = std::numeric_limits<int64_t>::max();
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (begin < error_begin) {
        error_begin = begin;
        error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

// Units that are worth a thread: waking one costs a few microseconds, in which a core copies some 64 KiB.
inline int64_t grain_of(int64_t unit_bytes) { return (int64_t{64} << 10) / std::max<int64_t>(1, unit_bytes) + 1; }

// body(own, b, begin, end) for rows begin to end of image b of B images with N rows, all in one parallel loop: on a busy machine every loop may wait
// for a thread that is not running. Where there are fewer images than threads, an image is cut into parts, each of which repeats the image's
// planning; begin = 0 occurs exactly once for each image. `own` is one thread's Scratch.
template <class Scratch, class Body>
void parallel_images(int64_t B, int64_t N, int64_t image_bytes, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = B >= threads || B == 0 ? 1 : std::max<int64_t>(1, std::min(N, (threads + B - 1) / B));
  parallel(B * parts, grain_of(image_bytes / parts), [&](int64_t begin, int64_t end) {
    Scratch own;
    for (int64_t u = begin; u < end; u++) {
      const int64_t part = u % parts;
      body(own, u / parts, N * part / parts, N * (part + 1) / parts);
    }
  });
}

// f.template operator()<T>() for the element type of t.
template <class F>
auto dispatch(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    default:
      return f.template operator()<float>();
  }
}

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr RowType row_type() {
  if constexpr (std::is_same_v<T, double>) return RowType::kFloat64;
  if constexpr (std::is_same_v<T, BFloat16>) return RowType::kBFloat16;
  if constexpr (std::is_same_v<T, Half>) return RowType::kFloat16;
  return RowType::kFloat32;
}

// A [B, N, C] tensor whose last axis is contiguous, copied if it was not; keeps the tensor alive.
template <class T>
struct RowsIn {
  Tensor tensor;
  const T* data;
  int64_t image_stride, row_stride;

  explicit RowsIn(const Tensor& t)
      : tensor(t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t)),
        data(static_cast<const T*>(tensor.const_data_ptr())),
        image_stride(tensor.stride(0)),
        row_stride(tensor.stride(1)) {}

  const T* image(int64_t b) const { return data + b * image_stride; }
  const T* row(int64_t b, int64_t n) const { return data + b * image_stride + n * row_stride; }
};

// A small tensor (scores, sizes, slots, indices) as a contiguous array; null when absent.
template <class T>
struct ArrayIn {
  std::optional<Tensor> tensor;
  const T* data = nullptr;

  explicit ArrayIn(const Tensor& t) : tensor(torch::stable::contiguous(t)), data(static_cast<const T*>(tensor->const_data_ptr())) {}
  explicit ArrayIn(const std::optional<Tensor>& t) {
    if (!t) return;
    tensor = torch::stable::contiguous(*t);
    data = static_cast<const T*>(tensor->const_data_ptr());
  }
  const T* at(int64_t b, int64_t row) const { return data ? data + b * row : nullptr; }
};

inline Tensor empty_rows(const Tensor& like, int64_t B, int64_t M, int64_t C) {
  Tensor rows = torch::stable::new_empty(like, {B, M, C});
  prefer_large_pages(rows);
  return rows;
}

// The input rows of one image grouped by output row, ascending inside a group, which fixes the order of every sum: group m is
// rows[first[m]] up to rows[first[m + 1]].
struct Groups {
  std::vector<int32_t> first, rows;

  // target[n]: output row of input row n, negative = none; already checked to be below M.
  template <class Index>
  void fill(const Index* target, int64_t N, int64_t M) {
    first.assign(M + 2, 0);
    rows.resize(N);
    int32_t* next = first.data() + 1;  // counts, then starts shifted by one, which the last loop moves to their ends: the next group's start
    for (int64_t n = 0; n < N; n++)
      if (target[n] >= 0) next[target[n] + 1]++;
    for (int64_t m = 0; m < M; m++) next[m + 1] += next[m];
    for (int64_t n = 0; n < N; n++)
      if (target[n] >= 0) rows[next[target[n]]++] = static_cast<int32_t>(n);
  }
  const int32_t* begin(int64_t m) const { return rows.data() + first[m]; }
  const int32_t* end(int64_t m) const { return rows.data() + first[m + 1]; }
  int64_t count(int64_t m) const { return first[m + 1] - first[m]; }
};

// out[m] = sum over group m of coeff * in for one image; a group of one with coefficient 1 is copied. coeff follows groups.rows; null: all 1.
// Works in input order, which reads the larger tensor in sequence: a group's row is written when its first member is met, by the part [begin, end)
// that holds it.
template <class T, class Index>
void sum_groups(const T* in, int64_t row_stride, const Groups& groups, const Index* target, int64_t begin, int64_t end, const acc_t<T>* coeff,
                const RowKernels& kernels, T* out, int64_t M, int64_t C) {
  if (begin == 0)
    for (int64_t m = 0; m < M; m++)
      if (groups.count(m) == 0) std::fill_n(out + m * C, C, T(0));
  for (int64_t n = begin; n < end; n++) {
    const int64_t m = target[n];
    if (m < 0 || *groups.begin(m) != n) continue;
    const acc_t<T>* w = coeff ? coeff + groups.first[m] : nullptr;
    if (groups.count(m) == 1 && (!w || *w == 1))
      std::memcpy(out + m * C, in + n * row_stride, C * sizeof(T));
    else
      kernels.weighted_sum(out + m * C, in, row_stride, groups.begin(m), w, groups.count(m), C);
  }
}

// out[b, i] = in[b, source(b, i)], or `fill` where source is negative; source may throw.
template <class T, class Source>
void gather_rows(const RowsIn<T>& in, int64_t B, int64_t M, int64_t C, const Source& source, T fill, T* out) {
  parallel(B * M, grain_of(C * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / M, n = source(b, i % M);
      if (n >= 0)
        std::memcpy(out + i * C, in.row(b, n), C * sizeof(T));
      else
        std::fill_n(out + i * C, C, fill);
    }
  });
}

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

// The best `count` keys come first, in no particular order; taken[i] = 1 for their indices, 0 for the others.
template <class T>
void take_best(std::vector<Key<T>>& keys, int64_t count, std::vector<uint8_t>& taken) {
  taken.assign(keys.size(), 0);
  if (count > 0 && count < static_cast<int64_t>(keys.size())) std::nth_element(keys.begin(), keys.begin() + count - 1, keys.end());
  for (int64_t i = 0; i < count; i++) taken[keys[i].index()] = 1;
}

}  // namespace p3b
