// What the select and merge families share on a CPU: tensors seen as rows, rows grouped by the output row they go to, and loops that may throw.
// Letters: B batch, N rows in, M rows out, C channels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <vector>

#include "../checks.h"
#include "merge_kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

// Rows that are worth a thread: waking one costs a few microseconds, in which a core copies some 64 KiB.
inline int64_t row_grain(int64_t row_bytes) { return (int64_t{64} << 10) / std::max<int64_t>(1, row_bytes) + 1; }

// f.template operator()<T>() for the element type of t.
template <class F>
auto dispatch(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return f.template operator()<double>();
    case ScalarType::BFloat16: return f.template operator()<BFloat16>();
    case ScalarType::Half: return f.template operator()<Half>();
    default: return f.template operator()<float>();
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
};

inline Tensor empty_rows(const Tensor& like, int64_t B, int64_t M, int64_t C) { return torch::stable::new_empty(like, {B, M, C}); }

// Copies rows of one size to a contiguous output.
class RowCopier {
 public:
  RowCopier(int64_t row_bytes, int64_t rows) : bytes_(static_cast<size_t>(row_bytes)) {
#if defined(__SSE2__)
    stream_ = row_bytes % 16 == 0 && row_bytes * rows >= kStreamFrom;
#else
    (void)rows;
#endif
  }

  void operator()(void* to, const void* from) const {
#if defined(__SSE2__)
    if (stream_ && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      auto* d = static_cast<__m128i*>(to);
      const auto* s = static_cast<const __m128i*>(from);
      for (size_t i = 0; i < bytes_ / 16; i++) _mm_stream_si128(d + i, _mm_loadu_si128(s + i));
      return;
    }
#endif
    std::memcpy(to, from, bytes_);
  }

  // Streamed stores are not ordered with the stores that release the threads: call at the end of each thread's range.
  void finish() const {
#if defined(__SSE2__)
    if (stream_) _mm_sfence();
#endif
  }

 private:
  // From this size on the output will have left the cache before anybody reads it, and stores that bypass the cache save reading it first.
  static constexpr int64_t kStreamFrom = int64_t{24} << 20;

  size_t bytes_;
  bool stream_ = false;
};

// Input rows grouped by output row, ascending inside a group (which fixes the order of every sum): image b's group m is
// rows[b * N + first[b * (M + 1) + m]] up to first[... + m + 1].
struct Groups {
  int64_t B, N, M;
  std::vector<int32_t> first, rows;

  Groups(int64_t B, int64_t N, int64_t M) : B(B), N(N), M(M), first(B * (M + 1)), rows(B * N) {}

  int64_t begin(int64_t b, int64_t m) const { return first[b * (M + 1) + m]; }
  int64_t end(int64_t b, int64_t m) const { return first[b * (M + 1) + m + 1]; }
  const int32_t* image(int64_t b) const { return rows.data() + b * N; }

  // target(n): output row of input row n of image b, negative = none; already checked to be below M.
  template <class Target>
  void fill(int64_t b, const Target& target) {
    int32_t* f = first.data() + b * (M + 1);
    int32_t* list = rows.data() + b * N;
    for (int64_t n = 0; n < N; n++)
      if (target(n) >= 0) f[target(n) + 1]++;
    for (int64_t m = 0; m < M; m++) f[m + 1] += f[m];
    for (int64_t n = 0; n < N; n++)
      if (target(n) >= 0) list[f[target(n)]++] = static_cast<int32_t>(n);
    for (int64_t m = M; m > 0; m--) f[m] = f[m - 1];  // the loop above moved every start to its end
    f[0] = 0;
  }
};

// out[b, m] = sum over the group of coeff * in; a group of one with coefficient 1 is copied. coeff follows groups.rows; null: all 1.
// Works in input order, which reads the larger tensor in sequence, and writes a row when it meets the first member of its group.
template <class T, class Target>
void sum_groups(const RowsIn<T>& in, const Groups& groups, const Target& target, const acc_t<T>* coeff, T* out, int64_t C) {
  const int64_t N = groups.N, M = groups.M;
  const RowKernels& kernels = row_kernels(row_type<T>());
  const RowCopier copy(C * sizeof(T), groups.B * M);
  std::vector<acc_t<T>> ones(coeff ? 0 : N, acc_t<T>(1));
  parallel(groups.B, row_grain(M * sizeof(int32_t)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t m = 0; m < M; m++)
        if (groups.begin(b, m) == groups.end(b, m)) std::fill_n(out + (b * M + m) * C, C, T(0));
  });
  parallel(groups.B * N, row_grain(C * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / N, n = i % N, m = target(b, n);
      if (m < 0) continue;
      const int64_t g = groups.begin(b, m), count = groups.end(b, m) - g;
      const int32_t* list = groups.image(b) + g;
      if (list[0] != n) continue;
      const acc_t<T>* w = coeff ? coeff + b * N + g : ones.data();
      T* y = out + (b * M + m) * C;
      if (count == 1 && w[0] == 1)
        copy(y, in.row(b, n));
      else
        kernels.weighted_sum(y, in.image(b), in.row_stride, list, w, count, C);
    }
    copy.finish();
  });
}

// out[b, i] = in[b, source(b, i)], or `fill` where source is negative; source may throw.
template <class T, class Source>
void gather_rows(const RowsIn<T>& in, int64_t B, int64_t M, int64_t C, const Source& source, T fill, T* out) {
  const RowCopier copy(C * sizeof(T), B * M);
  parallel(B * M, row_grain(C * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / M, n = source(b, i % M);
      if (n >= 0)
        copy(out + i * C, in.row(b, n));
      else
        std::fill_n(out + i * C, C, fill);
    }
    copy.finish();
  });
}

}  // namespace p3b
