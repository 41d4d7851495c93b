// The only check macros of the extension, and the wording of every error:
//   "<op>: <argument> must be <expected>, got <actual>"
// The public Python functions check first and more finely (TypeError, NotImplementedError); these checks stand between a raw op call and an
// illegal access, and look at values. torch 2.11 makes ValueError of std::invalid_argument, the stable ABI of torch 2.15 RuntimeError of every
// exception; run in p3b_ext/ops/autograd.py makes that a ValueError again.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#define P3B_CHECK(condition, ...)                                             \
  do {                                                                        \
    if (!(condition)) throw std::invalid_argument(p3b::message(__VA_ARGS__)); \
  } while (false)

namespace p3b {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); i++) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

// The dtype of sums, sizes, gates and side outputs beside tensors of dtype t.
inline ScalarType acc_dtype(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  const auto d = t.scalar_type();
  P3B_CHECK(d == ScalarType::Float || d == ScalarType::BFloat16 || d == ScalarType::Half || d == ScalarType::Double, op, ": ", name,
            " must be float32, bfloat16, float16 or float64, got another dtype");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType d) {
  P3B_CHECK(t.scalar_type() == d, op, ": ", name, " must have dtype ", torch::headeronly::toString(d), ", got ",
            torch::headeronly::toString(t.scalar_type()));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  P3B_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got shape ", shape(t));
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t axis, int64_t size) {
  P3B_CHECK(t.size(axis) == size, op, ": ", name, " must have size ", size, " on axis ", axis, ", got shape ", shape(t));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  P3B_CHECK(t.is_cuda() == like.is_cuda() && t.get_device() == like.get_device(), op, ": ", name, " must be on the device of the first argument");
}

// A tensor whose last axis has stride 1 (or size <= 1), the only requirement of the kernels on strides.
inline void check_rows(const char* op, const char* name, const Tensor& t) {
  P3B_CHECK(t.dim() > 0 && (t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1), op, ": ", name, " must have a contiguous last axis, got stride ",
            t.stride(t.dim() - 1));
}

}  // namespace p3b
