// Scoring, ranking and gathering rows: kernel -> launch -> op.
#include <type_traits>

#include "rank.cuh"

namespace p3b::cuda {
namespace {

constexpr int kRankThreads = kRowWarps * 32;
constexpr int kRankRows = kRowWarps * kRowsInFlight;  // tokens that a block places at a time
constexpr int kRankGroups = 8;                        // how often, where it moves no rows: 256 tokens a block

}  // namespace

// The score of token P + i: data [B, H, S] averaged over heads, times factor [B, S] unless null.
template <class S>
struct ScoresIn {
  const S* data;
  int64_t batch, head;  // strides in elements
  int H;
  const float* factor;
  int64_t factor_batch;
};

template <class S, class T>
struct RankArguments {
  ScoresIn<S> scores;
  int64_t* index;  // [B, P + keep] or null: the positions that stay
  int* slot;       // [B, P + S] or null: the row of every token, -1 where it goes
  RowsIn<T> x;     // [B, P + S, C]
  T* y;            // [B, P + keep, C]
  int64_t B;
  int num_scores, P, keep, C;  // C = 0: nothing is moved
  bool by_score;
  int tiles, groups;
};

namespace {

// The most scores that the shared memory of a block of rank_kernel holds.
inline int64_t most_ranked() { return shared_memory_limit() / 4 - 2 * kRowWarps; }

// A block scores all tokens of an image, finds out which stay, and places its own: their positions, slots and rows.
template <class S, class T, int kSize>
__global__ void __launch_bounds__(kRankThreads) rank_kernel(RankArguments<S, T> a) {
  P3B_SHARED(memory);
  uint32_t* keys = reinterpret_cast<uint32_t*>(memory);
  int* counts = reinterpret_cast<int*>(keys + a.num_scores);
  const int lane = threadIdx.x % 32, pieces = a.C / kSize, N = a.P + a.num_scores;
  const int64_t b = blockIdx.x / a.tiles, M = a.P + a.keep;
  const S* scores = a.scores.data + b * a.scores.batch;
  for (int i = threadIdx.x; i < a.num_scores; i += blockDim.x) {
    float sum = 0;
#pragma unroll 4
    for (int h = 0; h < a.scores.H; h++) sum += to_float(scores[h * a.scores.head + i]);
    keys[i] = score_key(sum / a.scores.H * (a.scores.factor ? a.scores.factor[b * a.scores.factor_batch + i] : 1.f));
  }
  __syncthreads();
  const Cut cut = a.by_score ? Cut{} : find_cut(keys, a.num_scores, a.keep, counts);

#pragma unroll 1
  for (int group = 0; group < a.groups; group++) {
    const int first = ((blockIdx.x % a.tiles * a.groups + group) * kRowWarps + threadIdx.x / 32) * kRowsInFlight;
    if (first >= N) return;  // no barrier follows
    int row[kRowsInFlight];
    if (a.by_score)
      rows_by_score(row, keys, a.num_scores, a.keep, first - a.P);
    else
      rows_by_position(row, keys, a.num_scores, cut, first - a.P);
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++) {
      const int n = first + r;
      if (n < a.P)
        row[r] = n;
      else if (row[r] >= 0)
        row[r] += a.P;
      if (lane == r && n < N) {
        if (a.index && row[r] >= 0) a.index[b * M + row[r]] = n;
        if (a.slot) a.slot[b * N + n] = row[r];
      }
    }
    for (int p = lane; p < pieces; p += 32) {
      Piece<T, kSize> piece[kRowsInFlight];
#pragma unroll
      for (int r = 0; r < kRowsInFlight; r++)
        if (row[r] >= 0) piece[r] = Piece<T, kSize>::load(a.x.data + b * a.x.batch + (first + r) * a.x.row + p * kSize);
#pragma unroll
      for (int r = 0; r < kRowsInFlight; r++)
        if (row[r] >= 0) piece[r].store(a.y + (b * M + row[r]) * a.C + p * kSize);
    }
  }
}

template <class S, class T>
cudaError_t rank(RankArguments<S, T> a, cudaStream_t stream) {
  constexpr int kWide = std::is_same_v<S, float> ? 16 / sizeof(T) : 1;  // scores of other types only rank
  const int64_t parts = ceil_div(a.P + a.num_scores, kRankRows);
  a.groups = a.C ? 1 : static_cast<int>(min(parts, int64_t{kRankGroups}));
  a.tiles = a.groups ? static_cast<int>(ceil_div(parts, a.groups)) : 0;
  const bool wide = a.C % kWide == 0 && fits16(a.x.data, a.x.batch) && fits16(a.x.data, a.x.row) && fits16(a.y);
  const size_t bytes = (static_cast<size_t>(a.num_scores) + 2 * kRowWarps) * 4;
  return launch(wide ? rank_kernel<S, T, kWide> : rank_kernel<S, T, 1>, a.B * a.tiles, kRankThreads, bytes, stream, a);
}

}  // namespace

// Ranks scores [B, S] of B images `stride` elements apart; fills index or slot.
template <class S>
cudaError_t rank_tokens(const S* scores, int64_t stride, int64_t B, int count, int P, int keep, bool by_score, int64_t* index, int* slot,
                        cudaStream_t stream) {
  RankArguments<S, S> a{};
  a.scores = {scores, stride, 0, 1, nullptr, 0};
  a.index = index;
  a.slot = slot;
  a.B = B;
  a.num_scores = count;
  a.P = P;
  a.keep = keep;
  a.by_score = by_score;
  return rank(a, stream);
}

// Scores, ranks and gathers in one launch.
template <class T>
cudaError_t keep_tokens(const RankArguments<float, T>& a, cudaStream_t stream) {
  return rank(a, stream);
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
  check_tokens(op, "scores", s.S, most_ranked());
  const int S = static_cast<int>(s.S), P = to_int(op, "tokens", s.S + s.num_prefix) - S;
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

std::tuple<Tensor, Tensor> keep_tokens_op(Tensor x_in, Tensor attention_in, std::optional<Tensor> value_norm_in, int64_t keep, int64_t num_prefix,
                                          bool by_score) {
  const char* op = "keep_tokens";
  const Keep s = check_keep(op, x_in, attention_in, value_norm_in, keep, num_prefix);
  const Tensor x = with_contiguous_rows(x_in), attention = torch::stable::contiguous(attention_in);
  const std::optional<Tensor> value_norm = contiguous(value_norm_in);
  const OnDevice device(x);
  check_tokens(op, "x", s.N - num_prefix, most_ranked());
  Tensor y = empty(x, {s.B, num_prefix + keep, s.C}, x.scalar_type()), index = empty(x, {s.B, num_prefix + keep}, ScalarType::Long);
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    RankArguments<float, T> a{};
    a.P = to_int(op, "num_prefix", num_prefix);
    a.num_scores = to_int(op, "tokens", s.N) - a.P;
    a.scores.data = pointer<float>(attention) + a.P;
    a.scores.batch = s.H * s.N;
    a.scores.head = s.N;
    a.scores.H = to_int(op, "heads", s.H);
    a.scores.factor = value_norm ? pointer<float>(value_norm) + a.P : nullptr;
    a.scores.factor_batch = s.N;
    a.index = pointer<int64_t>(index);
    a.x = {pointer<T>(x), x.stride(0), x.stride(1)};
    a.y = pointer<T>(y);
    a.B = s.B;
    a.keep = static_cast<int>(keep);
    a.C = to_int(op, "channels", s.C);
    a.by_score = by_score;
    check_launch(op, keep_tokens(a, device.stream));
  });
  return {y, index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(p3b_ext, CUDA, m) {
  m.impl("topk_tokens", TORCH_BOX(&topk_tokens));
  m.impl("prune_slots", TORCH_BOX(&prune_slots));
  m.impl("keep_tokens", TORCH_BOX(&keep_tokens_op));
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("select_tokens_backward", TORCH_BOX(&select_tokens_backward));
}

}  // namespace p3b::cuda
#endif
