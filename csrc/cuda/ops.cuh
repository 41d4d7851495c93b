// Between PyTorch's tensors and the launches, which see raw pointers only: device and stream, dtypes, errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "common.cuh"

namespace p3b::cuda {

// Makes the device of a tensor current for a scope, and knows its current stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  explicit OnDevice(const Tensor& t) : guard(t.get_device()) {
    void* current = nullptr;
    if (aoti_torch_get_current_cuda_stream(t.get_device(), &current)) throw std::runtime_error("p3b_ext: no current CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }
};

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(message(op, ": CUDA kernel not launched: ", cudaGetErrorString(error)));
}

inline int to_int(const char* op, const char* name, int64_t x) {
  P3B_CHECK(x <= 0x7fffffff, op, ": ", name, " must be at most 2147483647, got ", x);
  return static_cast<int>(x);
}

// `most` is what the shared memory of a block holds.
inline void check_tokens(const char* op, const char* name, int64_t count, int64_t most) {
  P3B_CHECK(count <= most, op, ": ", name, " must have at most ", most, " tokens on this GPU, got ", count);
}

// Calls f with a value of the tensor's element type.
template <class F>
void with_dtype(const char* op, const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Half:
      return f(__half());
    case ScalarType::BFloat16:
      return f(__nv_bfloat16());
    default:
      P3B_CHECK(false, op, ": dtype must be float32, bfloat16 or float16 on a GPU, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

template <class T>
T* pointer(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

inline Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace p3b::cuda
