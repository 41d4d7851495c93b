// Calls one op from C++ through the stable dispatcher: attention over one key is that key's value.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <optional>

using torch::stable::Tensor;

int main() {
  const int64_t B = 2, H = 3, N = 4, D = 8;
  Tensor q = torch::stable::empty({B, H, N, D}, torch::headeronly::ScalarType::Float);
  Tensor v = torch::stable::empty({B, H, N, D}, torch::headeronly::ScalarType::Float);
  Tensor mask = torch::stable::empty({B, N}, torch::headeronly::ScalarType::Bool);
  for (int64_t i = 0; i < B * H * N * D; i++) {
    static_cast<float*>(q.data_ptr())[i] = static_cast<float>(i % 7) - 3.f;
    static_cast<float*>(v.data_ptr())[i] = static_cast<float>(i);
  }
  for (int64_t i = 0; i < B * N; i++) static_cast<bool*>(mask.data_ptr())[i] = i % N == 1;  // only key 1

  std::array<StableIValue, 8> stack{torch::stable::detail::from(q),
                                    torch::stable::detail::from(q),
                                    torch::stable::detail::from(v),
                                    torch::stable::detail::from(std::optional<Tensor>(mask)),
                                    torch::stable::detail::from(std::optional<Tensor>()),
                                    torch::stable::detail::from(std::optional<Tensor>()),
                                    torch::stable::detail::from(0.5),
                                    torch::stable::detail::from(int64_t{0})};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("p3b_ext::masked_attention", "", stack.data(), TORCH_ABI_VERSION));
  Tensor out = torch::stable::detail::to<Tensor>(stack[0]);  // [B, N, H, D]
  const float* o = static_cast<const float*>(out.data_ptr());
  for (int64_t b = 0; b < B; b++)
    for (int64_t i = 0; i < N; i++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t d = 0; d < D; d++) {
          const float got = o[((b * N + i) * H + h) * D + d];
          const float want = static_cast<float>(((b * H + h) * N + 1) * D + d);
          if (std::fabs(got - want) > 1e-4f * std::fabs(want)) {
            std::printf("out[%ld, %ld, %ld, %ld] must be %g, got %g\n", long(b), long(i), long(h), long(d), want, got);
            return 1;
          }
        }
  std::puts("1 passed");
  return 0;
}
