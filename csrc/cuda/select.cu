// Ranking by score and gathering rows: kernel -> launch -> op.
#include "rows.cuh"

namespace p3b::cuda {
namespace {

constexpr int kRankThreads = 256;

// A key that orders as the scores do: equal scores (0 and -0 too) equal keys, NaN below everything.
__device__ __forceinline__ uint32_t score_key(float score) {
  if (score != score) return 0;
  const float x = score == 0 ? 0.f : score;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One block per image: the rank of a token is the number of tokens before it, counted in shared memory.
// index [B, P + keep] takes the positions that stay; slot [B, P + S] the row of every token, -1 where it goes.
template <class T>
__global__ void __launch_bounds__(kRankThreads)
    rank_kernel(const T* scores, int64_t stride, int S, int P, int keep, bool by_score, int64_t* index, int* slot) {
  P3B_SHARED(memory);
  uint32_t* key = reinterpret_cast<uint32_t*>(memory);
  uint32_t* kept = key + S;  // one bit per token
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < S; i += blockDim.x) key[i] = score_key(to_float(scores[b * stride + i]));
  __syncthreads();

  auto put = [&](int i, int row) {  // token i of the scores goes to row `row` behind the prefix, or nowhere
    if (index && row >= 0) index[b * (P + keep) + P + row] = P + i;
    if (slot) slot[b * (P + S) + P + i] = row < 0 ? -1 : P + row;
  };
  for (int i0 = 0; i0 < S; i0 += blockDim.x) {
    const int i = i0 + threadIdx.x;
    int rank = S;
    if (i < S) {
      const uint32_t mine = key[i];
      rank = 0;
      for (int j = 0; j < i; j++) rank += key[j] >= mine;
      for (int j = i + 1; j < S; j++) rank += key[j] > mine;
    }
    if (by_score && i < S) put(i, rank < keep ? rank : -1);
    const unsigned bits = __ballot_sync(kAllLanes, rank < keep);
    if (lane == 0 && i < S) kept[i / 32] = bits;
  }
  __syncthreads();
  if (!by_score) {
    for (int i = threadIdx.x; i < S; i += blockDim.x) {
      int row = __popc(kept[i / 32] & ((1u << i % 32) - 1));
      for (int w = 0; w < i / 32; w++) row += __popc(kept[w]);
      put(i, kept[i / 32] >> i % 32 & 1 ? row : -1);
    }
  }
  for (int i = threadIdx.x; i < P; i += blockDim.x) {
    if (index) index[b * (P + keep) + i] = i;
    if (slot) slot[b * (P + S) + i] = i;
  }
}

}  // namespace

template <class T>
cudaError_t rank_tokens(const T* scores, int64_t stride, int64_t B, int S, int P, int keep, bool by_score, int64_t* index, int* slot,
                        cudaStream_t stream) {
  return launch(rank_kernel<T>, B, kRankThreads, (S + ceil_div(S, 32)) * 4, stream, scores, stride, S, P, keep, by_score, index, slot);
}

}  // namespace p3b::cuda

#ifndef P3B_CUDA_ON_CPU
#include "../select.h"
#include "ops.cuh"

namespace p3b::cuda {
namespace {

void rank(const char* op, const Tensor& scores_in, const Scores& s, int64_t keep, bool by_score, int64_t* index, int* slot) {
  const Tensor scores = with_contiguous_rows(scores_in);
  const OnDevice device(scores);
  const int S = to_int(op, "tokens", s.S), P = to_int(op, "num_prefix", s.num_prefix);
  with_dtype(op, scores, [&](auto zero) {
    using T = decltype(zero);
    check_launch(op, rank_tokens(pointer<T>(scores), scores.stride(0), s.B, S, P, static_cast<int>(keep), by_score, index, slot, device.stream));
  });
}

Tensor topk_tokens(Tensor scores, int64_t keep, int64_t num_prefix, bool by_score) {
  const char* op = "topk_tokens";
  const Scores s = check_scores(op, scores, "keep", keep, num_prefix);
  Tensor index = empty(scores, {s.B, num_prefix + keep}, ScalarType::Long);
  rank(op, scores, s, keep, by_score, pointer<int64_t>(index), nullptr);
  return index;
}

Tensor prune_slots(Tensor scores, int64_t r, int64_t num_prefix, bool by_score) {
  const char* op = "prune_slots";
  const Scores s = check_scores(op, scores, "r", r, num_prefix);
  Tensor slot = empty(scores, {s.B, num_prefix + s.S}, ScalarType::Int);
  rank(op, scores, s, s.S - r, by_score, nullptr, pointer<int>(slot));
  return slot;
}

Tensor select_tokens(Tensor x_in, Tensor index_in) {
  const char* op = "select_tokens";
  const Rows s = check_select(op, x_in, index_in);
  const Tensor x = with_contiguous_rows(x_in), index = torch::stable::contiguous(index_in);
  const OnDevice device(x);
  Tensor y = empty(x, {s.B, s.M, s.C}, x.scalar_type());
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    const RowsIn<T> in{pointer<T>(x), x.stride(0), x.stride(1)};
    check_launch(op, gather_rows(in, pointer<int64_t>(index), pointer<T>(y), s.B, to_int(op, "rows", s.M), to_int(op, "tokens", s.N),
                                 to_int(op, "channels", s.C), 0.f, device.stream));
  });
  return y;
}

Tensor select_tokens_backward(Tensor grad_in, Tensor index_in, int64_t num_tokens) {
  const char* op = "select_tokens_backward";
  const Rows s = check_select(op, grad_in, index_in, "grad");
  check_size(op, "index", index_in, 1, grad_in.size(1));
  P3B_CHECK(num_tokens >= 0, op, ": num_tokens must be at least 0, got ", num_tokens);
  const Tensor grad = with_contiguous_rows(grad_in), index = torch::stable::contiguous(index_in);
  const OnDevice device(grad);
  Tensor grad_x = empty(grad, {s.B, num_tokens, s.C}, grad.scalar_type());
  with_dtype(op, grad, [&](auto zero) {
    using T = decltype(zero);
    CombineArguments<T, int64_t> a{};
    a.x = {pointer<T>(grad), grad.stride(0), grad.stride(1)};
    a.slot = pointer<int64_t>(index);
    a.out = pointer<T>(grad_x);
    a.B = s.B;
    a.N = to_int(op, "rows", s.M);
    a.M = to_int(op, "num_tokens", num_tokens);
    a.C = to_int(op, "channels", s.C);
    check_launch(op, combine_rows(a, device.stream));
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(p3b_ext, CUDA, m) {
  m.impl("topk_tokens", TORCH_BOX(&topk_tokens));
  m.impl("prune_slots", TORCH_BOX(&prune_slots));
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("select_tokens_backward", TORCH_BOX(&select_tokens_backward));
}

}  // namespace p3b::cuda
#endif
